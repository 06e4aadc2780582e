"""What the TensorBoard logger promises, read back with TensorBoard's own reader."""

import io
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from torchplug import Module, Trainer, hookimpl
from torchplug.testing import check_logger, check_plugin
from torchplug.tracking import Delivery, Place, deliver, first
from torchplug_tensorboard import Events, Tensorboard, _events

BATCHES = 3
ALL = dict.fromkeys(("scalars", "images", "tensors", "histograms"), 0)


class Net(Module):
    def __init__(self, lr=0.1, **more):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr / 1000)


class Recorder:
    """What every logger is given: name -> (step, value)."""

    def __init__(self):
        self.values = {}

    @hookimpl
    def log_metrics(self, metrics, step):
        for name, value in metrics.items():
            self.values.setdefault(name, []).append((step, value))


def loader():
    return DataLoader(TensorDataset(torch.arange(2.0 * 2 * BATCHES).reshape(-1, 2)), batch_size=2)


def trainer(tmp_path, *plugins, board=None, **options):
    options = {"max_epochs": 1, "log_every_n_steps": 1, "root_dir": tmp_path, "accelerator": "cpu", **options}
    return Trainer(plugins=[*plugins, {"tensorboard": board or {}}], **options)


def read(folder):
    return EventAccumulator(str(folder), size_guidance=ALL).Reload()


def scalars(folder):
    events = read(folder)
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def session(folder, part):
    """What HPARAMS knows of a run: its ``session_start_info`` or ``session_end_info``."""
    content = read(folder).summary_metadata[f"_hparams_/{part}"].plugin_data.content
    return getattr(plugin_data_pb2.HParamsPluginData.FromString(content), part)


# ---------------------------------------------------------------------- metrics


@pytest.mark.slow
def test_it_passes_the_conformance_checks():
    check_plugin("tensorboard")


def test_a_replay_keeps_away_from_a_run_that_is_not_over(tmp_path):
    refused, elsewhere = [], []

    class Replays:
        @hookimpl
        def on_train_end(self, run):
            for folder in (run.dir / "tensorboard", tmp_path / "elsewhere"):
                place = Place(run.journal, first(run.journal), run.dir, folder)
                try:
                    elsewhere.append(deliver(Tensorboard().backend(), place).sent)
                except RuntimeError as error:
                    refused.append((folder, str(error)))

    recorder = Recorder()
    t = trainer(tmp_path, Replays(), recorder)
    t.fit(Net(), loader(), loader())
    folder = t.run.dir / "tensorboard"
    assert refused == [(folder, "this run is being sent there already, by itself or another replay; wait until that is over")]
    assert len(elsewhere) == 1 and scalars(tmp_path / "elsewhere").keys() == recorder.values.keys()
    expected = {name: [(step, np.float32(value)) for step, value in values] for name, values in recorder.values.items()}
    assert scalars(folder) == expected
    delivery = deliver(Tensorboard().backend(), Place(t.run.journal, first(t.run.journal), t.run.dir, folder))
    assert delivery.sent == 1 and scalars(folder) == expected  # on_run_end
    assert not list(t.run.dir.glob(".*"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_that_outlives_a_killed_run_keeps_no_replay_away(tmp_path):
    fork = multiprocessing.get_context("fork")
    born, over = fork.Event(), fork.Event()

    def worker():
        born.set()
        over.wait(60)

    def run():  # its loader has a worker when it is killed
        delivery = Delivery(Tensorboard().backend(), place, 10)
        delivery.turn.begin()
        fork.Process(target=worker).start()
        born.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)

    t = trainer(tmp_path)
    t.fit(Net(), loader())
    place = Place(t.run.journal, first(t.run.journal), t.run.dir, t.run.dir / "tensorboard")
    killed = fork.Process(target=run)
    killed.start()
    killed.join()  # with a time to wait it would wait for the worker too
    try:
        assert killed.exitcode == -signal.SIGKILL and len(list(t.run.dir.glob(".tensorboard.*.lock"))) == 1
        assert deliver(Tensorboard().backend(), place).sent == 1
        assert not list(t.run.dir.glob(".tensorboard.*"))
    finally:
        over.set()


def test_scalars_are_the_records_of_every_other_logger_at_their_steps(tmp_path):
    recorder = Recorder()
    t = trainer(tmp_path, recorder, max_epochs=2)
    t.fit(Net(), loader(), loader())
    expected = {name: [(step, np.float32(value)) for step, value in values] for name, values in recorder.values.items()}
    assert scalars(t.run.dir / "tensorboard") == expected
    assert [step for step, _ in expected["loss_step"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in expected["val/loss"]] == [step for step, _ in expected["loss_epoch"]] == [3, 6]


def test_files_begun_in_one_second_are_read_in_the_order_in_which_they_were_written(tmp_path, monkeypatch):
    """TensorBoard reads them in the order of their names, in which the number of a later process may be the smaller one."""
    t, net, pid = trainer(tmp_path), Net(), os.getpid()
    t.fit(net, loader(), loader())
    for number in range(3):
        monkeypatch.setattr(os, "getpid", lambda number=number: pid - 1 - number)
        t.test(net, loader())
    files = sorted((t.run.dir / "tensorboard").glob("*tfevents*"))
    assert [file.name.split(".")[-3] for file in files] == [str(pid - number) for number in range(4)]


@pytest.mark.slow
def test_it_keeps_every_promise_of_a_logger():
    def stored(run_dir):
        return [(name, *point) for name, points in scalars(run_dir / "tensorboard").items() for point in points]

    check_logger("tensorboard", read=stored)


def test_texts_that_utf8_has_not_are_written_in_another_way_and_hold_up_nothing(tmp_path):
    class Odd(Net):
        def on_train_start(self):
            self._run.log_text("text \ud800", "half \ud800")

    t = trainer(tmp_path)
    t.fit(Odd(**{"name \ud800": "half \ud800"}), loader())
    folder = t.run.dir / "tensorboard"
    assert session(folder, "session_start_info").hparams["name \\ud800"].string_value == "half \\ud800"
    (text,) = read(folder).Tensors("text \\ud800/text_summary")
    assert tensor_util.make_ndarray(text.tensor_proto).item().decode() == "half \\ud800"
    assert len(scalars(folder)["loss_step"]) == BATCHES


def test_names_and_numbers_of_any_kind_are_passed_on_as_they_are(tmp_path):
    odd = {"l(x)@1": math.nan, "größe mit leer": math.inf, "a/b.c": -math.inf}

    class Odd(Net):
        def on_train_epoch_end(self):
            self.log_dict(odd)

    t = trainer(tmp_path)
    t.fit(Odd(), loader())
    found = scalars(t.run.dir / "tensorboard")
    assert math.isnan(found["l(x)@1"][0][1])
    assert found["größe mit leer"] == [(BATCHES, math.inf)] and found["a/b.c"] == [(BATCHES, -math.inf)]


class Reader:
    """Looks at the files while the run goes on."""

    def __init__(self):
        self.seen = []

    def look(self, run):
        self.seen.append({name: len(values) for name, values in scalars(run.dir / "tensorboard").items()})

    @hookimpl
    def on_train_batch_start(self, run, batch_idx):
        if batch_idx == 0:
            self.look(run)

    @hookimpl
    def on_validation_end(self, run):
        self.look(run)


def test_the_versions_of_what_took_part_are_a_text(tmp_path):
    run = fit(tmp_path)
    ((_, content),) = everything(run.dir / "tensorboard")["tensorboard", "torchplug/versions/text_summary"]
    assert b"| tensorboard | torchplug-tensorboard 0.1.0 |" in content and f"| torch | {torch.__version__} |".encode() in content


def test_what_is_recorded_is_in_the_file_soon(tmp_path):
    class Waits(Net):
        def on_train_batch_end(self):
            begin = time.monotonic()
            while self.global_step > 1 and self.seen() < self.global_step - 1:
                assert time.monotonic() < begin + 10
                time.sleep(0.05)

        def seen(self):
            folder = self.run.dir / "tensorboard"
            events = read(folder)
            return len(events.Scalars("loss_step")) if "loss_step" in events.Tags()["scalars"] else 0

    # a record is made after on_train_batch_end: the first one is waited for in the second batch
    trainer(tmp_path).fit(Waits(), loader())


def test_a_test_after_a_fit_goes_on_in_the_same_folder(tmp_path):
    t = trainer(tmp_path)
    t.fit(Net(), loader())
    fitted = scalars(t.run.dir / "tensorboard")
    (result,) = t.test(dataloaders=loader())
    both = scalars(t.run.dir / "tensorboard")
    assert [value for _, value in both.pop("test_loss")] == [np.float32(result["test_loss"])]
    assert both == fitted


def test_a_new_fit_of_the_same_trainer_has_a_folder_of_its_own(tmp_path):
    t = trainer(tmp_path)
    for version in (0, 1):
        t.fit(Net(), loader())
        assert t.run.dir.name == f"version_{version}"
        assert len(scalars(t.run.dir / "tensorboard")["loss_step"]) == BATCHES


# ---------------------------------------------------------------------- hyperparameters


def test_hyperparameters_are_one_row_without_made_up_metrics(tmp_path):
    recorder = Recorder()
    t = trainer(tmp_path, recorder)
    t.fit(Net(lr=0.5, deep={"size": 3, "more": {"on": True}}, name="a b", nothing=None, most=math.inf, many=[1, 2]), loader())
    folder = t.run.dir / "tensorboard"
    row = session(folder, "session_start_info").hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in row.items()} == {
        "lr": 0.5, "deep/size": 3, "deep/more/on": True, "name": "a b", "nothing": "None", "most": "inf", "many": "[1, 2]",
    }  # fmt: skip
    assert session(folder, "session_end_info").status == api_pb2.STATUS_SUCCESS
    assert scalars(folder).keys() == recorder.values.keys()  # no hp_metric
    assert [path.parent for path in t.run.dir.rglob("*tfevents*")] == [folder]  # no folder and file of its own


@pytest.mark.parametrize("error", [ValueError("no luck"), KeyboardInterrupt()])
def test_a_run_that_ends_early_has_its_row_and_its_metrics_too(tmp_path, error):
    class Fails(Net):
        def on_train_batch_start(self, batch_idx):
            if batch_idx == 2:
                raise error

    t = trainer(tmp_path)
    with pytest.raises(type(error)):
        t.fit(Fails(), loader())
    folder = t.run.dir / "tensorboard"
    assert session(folder, "session_start_info").hparams["lr"].number_value == 0.1
    assert session(folder, "session_end_info").status == api_pb2.STATUS_FAILURE
    assert len(scalars(folder)["loss_step"]) == 2


def test_metrics_in_hparams_can_be_chosen_and_their_best_values_are_kept_over_several_runs(tmp_path):
    class Worse(Net):
        def training_step(self, batch, batch_idx):
            for name in ("low", "high", "end", "other"):
                self.log(name, float(abs(self.global_step - 2)))
            return super().training_step(batch, batch_idx)

    t = trainer(tmp_path, max_epochs=2, board={"hparams_metrics": {"low": "min", "high": "max", "end": "last"}})
    t.fit(Worse(), loader())
    t.test(dataloaders=loader())
    folder = t.run.dir / "tensorboard"
    content = read(folder).summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["min/low", "max/high", "end"]
    assert [info.name for info in experiment.hparam_infos] == ["lr"]
    found = scalars(folder)
    assert found["min/low"] == [(3, 0.0)] and found["max/high"] == [(6, 3.0)]
    assert found["end"][-1] == (6, 3.0)


def test_without_hyperparameters_there_is_no_row(tmp_path):
    class Bare(Net):
        def __init__(self):
            super().__init__()
            self.hparams.clear()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    t = trainer(tmp_path)
    t.fit(Bare(), loader())
    assert not [name for name in read(t.run.dir / "tensorboard").summary_metadata if name.startswith("_hparams_")]


# ---------------------------------------------------------------------- texts, figures, the graph


def test_texts_are_written_with_their_step(tmp_path):
    class Talks(Net):
        def on_run_start(self):
            self.run.log_text("early", "before any plugin was told of the start")

        def on_train_epoch_end(self):
            self.run.log_text("note", "**ünï**")

    t = trainer(tmp_path)
    t.fit(Talks(), loader())
    events = read(t.run.dir / "tensorboard")
    (note,) = events.Tensors("note/text_summary")
    assert note.step == BATCHES and tensor_util.make_ndarray(note.tensor_proto).item().decode() == "**ünï**"
    assert events.Tensors("early/text_summary")


def test_figures_are_written_and_left_as_they_were(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = pyplot.figure(figsize=(2, 1), dpi=50, facecolor=(1, 0, 0))
    canvas = figure.canvas

    class Draws(Net):
        def on_train_epoch_end(self):
            self.run.log_figure("red", figure)

    t = trainer(tmp_path)
    t.fit(Draws(), loader())
    (image,) = read(t.run.dir / "tensorboard").Images("red")
    assert (image.step, image.width, image.height) == (BATCHES, 100, 50)
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string))).reshape(-1, 4)
    assert np.unique(pixels, axis=0).tolist() == [[255, 0, 0, 255]]
    assert figure.canvas is canvas and pyplot.fignum_exists(figure.number)
    pyplot.close(figure)


class Deep(Net):
    """With everything that drawing the graph could disturb."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dropout, self.frozen, self.norm = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(2)
        self.example_input_array = torch.ones(2, 2)

    def on_fit_start(self):
        self.frozen.eval()

    def forward(self, x):
        if self.run.position.stage != "train":
            self.log("stray", 1.0)
        return {"out": self.layer(self.dropout(self.frozen(self.norm(x + torch.randn_like(x)))))}

    def training_step(self, batch, batch_idx):
        loss = self(batch[0])["out"].square().mean()
        self.log("loss", loss)
        return loss

    def on_train_start(self):
        self.modes = {name: part.training for name, part in self.named_modules()}


warns_of_tracing = pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace.*` is deprecated",
    "ignore:.*trace:torch.jit.TracerWarning",
)  # torch's own words on the way that it has for graphs


@warns_of_tracing
def test_drawing_the_graph_changes_nothing_else(tmp_path):
    trained, modes, found = [], [], []
    for log_graph in (False, True):
        torch.manual_seed(1)
        net, t = Deep(), trainer(tmp_path, board={"log_graph": log_graph}, max_epochs=2)
        t.fit(net, loader())
        trained.append({name: value.clone() for name, value in net.state_dict().items()})
        modes.append(net.modes)
        found.append(scalars(t.run.dir / "tensorboard"))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert modes[0] == modes[1] and modes[0]["frozen"] is False
    assert found[0] == found[1]
    operations = {node.op for node in read(t.run.dir / "tensorboard").Graph().node}
    assert {"aten::linear", "aten::batch_norm"} <= operations


def test_without_an_example_the_graph_is_left_out_and_that_is_said(tmp_path, caplog):
    t = trainer(tmp_path, board={"log_graph": True})
    t.fit(Net(), loader())
    assert "set self.example_input_array in the module" in caplog.text
    assert not read(t.run.dir / "tensorboard").Tags()["graph"]


@warns_of_tracing
def test_a_module_that_cannot_be_traced_is_trained_and_logged_all_the_same(tmp_path, caplog, capsys):
    class Wrong(Net):
        example_input_array = torch.ones(2, 3)

    t = trainer(tmp_path, board={"log_graph": True})
    t.fit(Wrong(), loader())
    assert "tensorboard: the graph could not be traced and is left out: RuntimeError: " in caplog.text
    assert "shapes cannot be multiplied (2x3 and 2x1)" in caplog.text
    assert "no graph saved" not in capsys.readouterr().out.lower()
    assert len(scalars(t.run.dir / "tensorboard")["loss_step"]) == BATCHES


# ---------------------------------------------------------------------- the writer


def test_experiment_is_tensorboards_own_writer_while_the_run_goes_on(tmp_path):
    board = Tensorboard()

    class Own(Net):
        def on_train_epoch_end(self):
            assert isinstance(board.experiment, SummaryWriter)
            board.experiment.add_histogram("weights", self.layer.weight, self.global_step)

    t = Trainer(max_epochs=1, root_dir=tmp_path, accelerator="cpu", plugins=[board])
    with pytest.raises(RuntimeError, match="is there from on_run_start to on_run_end"):
        board.experiment  # noqa: B018
    t.fit(Own(), loader())
    assert [event.step for event in read(t.run.dir / "tensorboard").Histograms("weights")] == [BATCHES]
    with pytest.raises(RuntimeError, match="is there from on_run_start to on_run_end"):
        board.experiment  # noqa: B018


class LastWords:
    @hookimpl
    def on_run_end(self, run):
        run.log_text("last", "words")


def test_it_is_open_until_all_other_plugins_have_finished(tmp_path):
    t = trainer(tmp_path, LastWords())
    t.fit(Net(), loader())
    assert read(t.run.dir / "tensorboard").Tensors("last/text_summary")


def test_what_comes_after_the_end_opens_no_new_file(tmp_path):
    class Late(Net):
        def on_run_end(self):
            self.run.log_text("late", "words")

    t = trainer(tmp_path)
    t.fit(Late(), loader())
    assert len(list((t.run.dir / "tensorboard").glob("*tfevents*"))) == 1


@pytest.mark.slow
def test_closing_waits_no_longer_than_close_timeout(tmp_path, monkeypatch, caplog):
    hangs = threading.Event()
    finish = Events.finish

    def slow(events, status):
        hangs.wait(60)
        finish(events, status)

    monkeypatch.setattr(Events, "finish", slow)
    t = trainer(tmp_path, board={"close_timeout": 0.05})
    t.fit(Net(), loader())
    assert "not everything was delivered (no answer within 0.05 s); torchplug replay" in caplog.text
    hangs.set()
    for thread in threading.enumerate():
        if thread.name == "torchplug tracking":
            thread.join(10)


@pytest.mark.slow
def test_an_error_while_closing_is_reported(tmp_path, monkeypatch, caplog):
    def broken(events, status):
        raise OSError("disk full")

    monkeypatch.setattr(Events, "finish", broken)
    trainer(tmp_path).fit(Net(), loader())
    assert "not everything was delivered (OSError: disk full)" in caplog.text


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_said_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "taken").write_text("a file")
    t = trainer(tmp_path, board={"dir": tmp_path / "taken"})
    t.fit(Net(), loader())
    assert t.run.position.step == BATCHES
    assert "tensorboard takes nothing at present, training goes on and the journal keeps everything: FileExistsError" in caplog.text


def test_only_the_first_process_writes(tmp_path):
    class Second(Net):
        def setup(self, stage):
            self.run.rank = 1

        def on_train_epoch_end(self):
            self.run.log_text("note", "words")

    t = trainer(tmp_path)
    t.fit(Second(), loader())
    assert not (t.run.dir / "tensorboard").exists() and "tensorboard" not in t.run.report


def test_a_trial_run_leaves_nothing_behind(tmp_path):
    t = trainer(tmp_path, board={"dir": tmp_path / "logs"}, fast_dev_run=True)
    t.fit(Net(), loader())
    assert list(tmp_path.iterdir()) == [] and "tensorboard" not in t.run.report


@pytest.mark.slow
def test_tensorboard_is_imported_only_when_a_run_starts():
    code = "import sys, torchplug; torchplug.Trainer(max_epochs=1, plugins=['tensorboard']); sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"close_timeout": 0}, "close_timeout must be above 0, got 0"),
        ({"close_timeout": "long"}, r"close_timeout must be a float \(above 0\), got 'long'"),
        ({"dir": 5}, "dir must be"),
        ({"hparams_metrics": ["loss"]}, "hparams_metrics must be"),
        ({"hparams_metrics": {"loss": "best"}}, r"hparams_metrics\['loss'\] must be one of last, min, max, got 'best'"),
    ],
)
def test_options_out_of_range_are_refused(options, text):
    with pytest.raises((TypeError, ValueError), match=text):
        Tensorboard(**options)


# ---------------------------------------------------------------------- the command that opens it


def test_the_end_of_the_run_gives_the_command_that_opens_it(tmp_path):
    t = trainer(tmp_path / "with space")
    t.fit(Net(), loader())
    assert t.run.report["tensorboard"] == f"tensorboard --logdir '{t.run.dir}'"
    t = trainer(tmp_path, board={"dir": tmp_path / "board"})
    t.fit(Net(), loader())
    assert t.run.report["tensorboard"] == f"tensorboard --logdir {tmp_path / 'board'}"
    assert scalars(tmp_path / "board")["loss_step"]


def test_a_server_started_with_that_command_shows_one_row_with_the_last_metrics(tmp_path):
    recorder = Recorder()
    t = trainer(tmp_path, recorder, max_epochs=2)
    t.fit(Net(lr=0.25, most=math.inf), loader(), loader())
    t.test(dataloaders=loader())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shlex.split(t.run.report["tensorboard"])
    command[0] = str(Path(sys.executable).with_name(command[0]))
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(page, **question):
        data = json.dumps(question).encode() if question else None
        request = urllib.request.Request(f"http://127.0.0.1:{port}/data/{page}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def rows():
        statuses = ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"]
        return ask("plugin/hparams/session_groups", allowedStatuses=statuses, colParams=[], startIndex=0, sliceSize=9)["sessionGroups"]

    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                found = rows()
                if found and len(found[0]["metricValues"]) == len(recorder.values):
                    break
            except OSError:
                assert server.poll() is None
            assert time.monotonic() < deadline, "the server did not show the run"
            time.sleep(0.2)
        (row,) = found
        assert row["hparams"] == {"lr": 0.25, "most": "inf"}
        last = {name: np.float32(values[-1][1]) for name, values in recorder.values.items()}
        assert {metric["name"]["tag"]: np.float32(metric["value"]) for metric in row["metricValues"]} == last
        assert [one["status"] for one in row["sessions"]] == ["STATUS_SUCCESS"]
        (run,) = ask("runs")
        curve = ask(f"plugin/scalars/scalars?tag=loss_step&run={run}")
        assert [(step, np.float32(value)) for _, step, value in curve] == [(s, np.float32(v)) for s, v in recorder.values["loss_step"]]
    finally:
        server.terminate()
        server.wait()


# ---------------------------------------------------------------------- a run that goes on from a checkpoint


class Killed:
    """Saves at a step, and takes a copy of the run's folder at a later one: what a process killed there leaves behind."""

    def __init__(self, saved=None, killed=None, into=None):
        self.saved, self.killed, self.into = saved, killed, into

    @hookimpl
    def on_train_batch_end(self, run):
        if run.position.step == self.saved:
            run.save_checkpoint(run.dir / f"{self.saved}.safetensors")
        if run.position.step == self.killed:
            run.plugins["tensorboard"].experiment.flush()  # all that it may have written
            shutil.copytree(run.dir, Path(self.into) / run.dir.parent.name / run.dir.name, ignore=shutil.ignore_patterns("*.tmp"))


class Rich(Net):
    """With texts, and with histograms on an axis of their own."""

    def on_train_batch_end(self):
        self.run.log_text("note", f"step {self.global_step}")
        board = self.run.plugins["tensorboard"].experiment
        board.add_histogram("weights", self.layer.weight, 1000 - self.global_step)
        board.add_scalars("pair", {"a": self.global_step, "b": 0}, self.global_step)


FIT = {"name": "net", "max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": 0, "seed": 1}


def fit(root, *plugins, path=None, board=None, net=Rich, **options):
    t = trainer(root, *plugins, board=board, **{**FIT, **options})
    torch.manual_seed(1)
    t.fit(net(), loader(), loader(), ckpt_path=path)
    return t.run


def everything(folder):
    """Every point that TensorBoard shows, in order of its step."""
    found = {}
    for place in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        events = read(place)
        tags = events.Tags()
        for name in tags["scalars"]:
            found[place.name, name] = [(event.step, event.value) for event in events.Scalars(name)]
        for name in tags["histograms"]:
            found[place.name, name] = [(event.step, event.histogram_value) for event in events.Histograms(name)]
        for name in tags["tensors"]:
            if not name.startswith("_hparams_"):
                found[place.name, name] = [(event.step, event.tensor_proto.SerializeToString()) for event in events.Tensors(name)]
    # files of one second are read in the order of their other numbers
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


@pytest.mark.parametrize(("saved", "killed"), [(1, 2), (2, 3), (2, 6), (3, 4), (5, 6)])
def test_a_run_that_was_killed_and_goes_on_shows_each_point_once(tmp_path, saved, killed):
    whole = everything(fit(tmp_path / "a", Killed(saved, killed, tmp_path / "b")).dir / "tensorboard")
    folder = tmp_path / "b" / "net" / "version_0"
    assert fit(tmp_path / "b", path=folder / f"{saved}.safetensors").dir == folder
    assert everything(folder / "tensorboard") == whole
    assert len(whole) == 8 and len(whole["tensorboard", "note/text_summary"]) == 6


def test_what_several_killed_processes_wrote_is_kept_beside_and_can_be_read(tmp_path):
    whole = everything(fit(tmp_path / "0").dir / "tensorboard")
    fit(tmp_path / "0", Killed(1, 2, tmp_path / "1"))
    # goes on from, saves, is killed: the third time before it saved anything
    for number, (start, saved, killed) in enumerate([(1, 2, 3), (2, None, 6), (2, 4, 6), (4, None, None)], start=1):
        (folder,) = (tmp_path / str(number)).glob("*/*")
        fit(tmp_path / str(number), Killed(saved, killed, tmp_path / str(number + 1)), path=folder / f"{start}.safetensors")
    board = folder / "tensorboard"
    assert everything(board) == whole
    for file in board.glob("*abandoned*"):  # what had been written of it when it was killed
        folder = tmp_path / "read" / file.name
        folder.mkdir(parents=True)
        shutil.copy(file, folder / file.name.replace("abandoned", "tfevents"))
        found = scalars(folder).get("loss_step", [])
        assert set(found) <= set(whole["tensorboard", "loss_step"])


def test_a_fit_that_goes_on_with_more_epochs_takes_nothing_out(tmp_path):
    t, net = trainer(tmp_path, **FIT), Net()
    t.fit(net, loader(), loader())
    t.test(dataloaders=loader())
    before = everything(t.run.dir / "tensorboard")
    t.max_epochs = 3
    t.fit(net, loader(), loader())
    after = everything(t.run.dir / "tensorboard")
    assert {name: points[: len(before[name])] for name, points in after.items()} == before
    assert [step for step, _ in after["tensorboard", "loss_step"]] == list(range(1, 10))
    assert not list(t.run.dir.rglob("*abandoned*"))


def test_files_of_other_runs_in_the_same_folder_are_not_touched(tmp_path):
    board = {"dir": tmp_path / "board"}
    run = fit(tmp_path, Killed(2), board=board)
    others = fit(tmp_path, board=board).id
    before = {path: path.read_bytes() for path in board["dir"].rglob("*tfevents*") if others in path.name}
    fit(tmp_path, path=run.dir / "2.safetensors", board=board)
    assert before and all(path.read_bytes() == content for path, content in before.items())
    assert {run.id in path.name and others not in path.name for path in board["dir"].rglob("*abandoned*")} == {True}


def test_a_run_that_goes_on_elsewhere_is_whole_there(tmp_path):
    run = fit(tmp_path, Killed(2), board={"dir": tmp_path / "board"})
    before = everything(tmp_path / "board")
    for _ in range(2):
        fit(tmp_path, path=run.dir / "2.safetensors")
        after = everything(run.dir / "tensorboard")
        assert [step for step, _ in after["tensorboard", "loss_step"]] == [1, 2, 3, 4, 5, 6]
        assert after["tensorboard", "note/text_summary"] == before["board", "note/text_summary"]
    assert everything(tmp_path / "board") == before


@pytest.mark.slow
@pytest.mark.parametrize("left", ["whole", "torn event", "no list", "half a list"])
def test_what_a_killed_process_wrote_is_found_again_and_the_rest_is_sent(tmp_path, left):
    """Events were written, the list that says so was not; the last one is not whole. A replay then makes it so."""
    run = fit(tmp_path, net=Net)
    folder, whole = run.dir / "tensorboard", everything(run.dir / "tensorboard")
    (events,), (marks,) = folder.glob("*tfevents*"), folder.glob("*.json")
    ends = [end for end, _ in _events(events)]
    if left == "whole":
        marks.write_text(json.dumps(json.loads(marks.read_text())[:1]))
    elif left == "torn event":
        os.truncate(events, ends[4] + 7)
        marks.write_text("[]")
    elif left == "no list":
        marks.unlink()
    else:
        marks.write_bytes(marks.read_bytes()[:50])
    for _ in range(2):
        done = subprocess.run([Path(sys.executable).with_name("torchplug"), "replay", run.dir, "--to", "tensorboard"], capture_output=True)
        assert done.returncode == 0, done.stderr
        assert everything(folder) == whole


@pytest.mark.slow
def test_what_could_not_be_written_is_written_when_the_run_goes_on(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("no disk")

    path, folder = fit(tmp_path, Killed(2), net=Net).dir / "2.safetensors", tmp_path / "net" / "version_0"
    with monkeypatch.context() as patch:
        patch.setattr(Events, "connect", broken)
        fit(tmp_path, Killed(4), path=path, net=Net)
    fit(tmp_path, path=folder / "4.safetensors", net=Net)
    assert everything(folder / "tensorboard") == everything(fit(tmp_path / "whole", net=Net).dir / "tensorboard")


def test_points_of_a_validation_that_a_signal_breaks_off_show_once(tmp_path):
    class Steps(Net):
        signalled = False

        def validation_step(self, batch, batch_idx):
            self.log("val", 1.0 * batch_idx, on_step=True)
            if self.signalled and self.global_step == 5 and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    class Signalled(Steps):
        signalled = True

    class Saves:
        @hookimpl
        def on_stop_requested(self, run):
            run.save_checkpoint(run.dir / "last.safetensors")

    whole = everything(fit(tmp_path / "a", net=Steps).dir / "tensorboard")
    with pytest.raises(SystemExit):
        fit(tmp_path / "b", Saves(), net=Signalled)
    folder = tmp_path / "b" / "net" / "version_0"
    assert scalars(folder / "tensorboard")["val_step"][-1] == (5, 1.0)
    fit(tmp_path / "b", path=folder / "last.safetensors", net=Steps)
    assert everything(folder / "tensorboard") == whole


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, monkeypatch, caplog):
    write, fails = RecordWriter.write, []

    def full(writer, data):
        write(writer, data)
        if len(fails) < 2:
            fails.append(1)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    run = fit(tmp_path, Killed(2), net=Net)
    assert (run.dir / "2.safetensors").exists() and run.position.step == 2 * BATCHES and len(fails) == 2
    assert "tensorboard takes nothing at present, training goes on and the journal keeps everything: OSError: [Errno 28]" in caplog.text
    monkeypatch.undo()
    assert everything(run.dir / "tensorboard") == everything(fit(tmp_path / "whole", net=Net).dir / "tensorboard")


def test_an_instance_in_two_fits_writes_the_same_twice(tmp_path):
    board, traces = Tensorboard(), []
    for _ in range(2):
        t = Trainer(root_dir=tmp_path, plugins=[board], accelerator="cpu", log_every_n_steps=1, **FIT)
        torch.manual_seed(1)
        t.fit(Net(), loader(), loader())
        traces.append(everything(t.run.dir / "tensorboard"))
        assert board.state_dict() == {"files": {}}
    assert traces[0] == traces[1]


# ---------------------------------------------------------------------- a disk that is full


@pytest.fixture
def disk(tmp_path):
    """A file system of 64 KiB; called with a size, it becomes larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system of its own takes rights to mount it: {mounted.stderr.strip()}")

    def grow(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", "tmpfs", folder], check=True)

    yield folder, grow
    subprocess.run(["umount", "-l", folder], check=True)


class Busy(Net):
    """Logs more than a small disk takes, and notes how long each step was."""

    def __init__(self, **more):
        super().__init__(**more)
        self.begun = []

    def on_train_batch_start(self):
        self.begun.append(time.monotonic())

    def training_step(self, batch, batch_idx):
        for number in range(20):
            self.log(f"a metric with a name of some length/{number}", float(self.global_step * number))
        time.sleep(0.001)
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
@pytest.mark.alone
def test_a_full_disk_costs_training_nothing_and_a_replay_makes_it_good(tmp_path, disk, caplog):
    folder, grow = disk
    data = DataLoader(TensorDataset(torch.ones(1200, 2)), batch_size=2)

    def run(root, plugins):
        torch.manual_seed(1)
        t, net = Trainer(max_epochs=2, log_every_n_steps=1, root_dir=root, plugins=plugins, accelerator="cpu", seed=1), Busy()
        begin = time.monotonic()
        t.fit(net, data)
        return t, net, time.monotonic() - begin

    _, alone, _ = run(tmp_path / "alone", ["journal"])
    for attempt in range(3):  # other programs may make a step wait too
        caplog.clear()
        t, net, took = run(tmp_path / f"full {attempt}", [{"tensorboard": {"dir": folder / str(attempt), "close_timeout": 5}}])
        waits = sorted(later - earlier for earlier, later in itertools.pairwise(net.begun))
        if waits[-1] < 0.5:
            break
    assert waits[-1] < 0.5, waits[-5:]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(net.parameters(), alone.parameters(), strict=True))
    assert took < (alone.begun[-1] - alone.begun[0]) * 5 + 2 * 5
    assert caplog.text.count("tensorboard takes nothing at present") == 1 and "No space left on device" in caplog.text
    assert f"torchplug replay {shlex.quote(str(t.run.dir))} --to tensorboard" in t.run.report["tensorboard"]
    records = [json.loads(line) for line in (t.run.dir / "journal.jsonl").read_text().splitlines()]
    assert records[-1]["status"] == "finished" and len([r for r in records if r["event"] == "log_metrics"]) == 1202

    grow("16m")
    for _ in range(2):
        done = subprocess.run(
            [Path(sys.executable).with_name("torchplug"), "replay", t.run.dir, "--to", "tensorboard"], capture_output=True
        )
        assert done.returncode == 0, done.stderr
        expected = {}
        for record in records:
            for name, value in record.get("metrics", {}).items():
                expected.setdefault(name, []).append((record["step"], np.float32(value)))
        assert {name: sorted(points) for name, points in scalars(folder / str(attempt)).items()} == expected
