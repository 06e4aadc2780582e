"""What the MLflow logger promises, read back with MLflow's own client from a real database and a real server."""

import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import torchplug_mlflow
from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_logger
from torchplug.tracking import Place, deliver, first
from torchplug_mlflow import Mlflow

# MLflow 3.17 with SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

BATCHES = 3
LARGEST = 1.7976931348623157e308  # in place of an infinite value


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


def loader(batches=BATCHES):
    return DataLoader(TensorDataset(torch.arange(2.0 * 2 * batches).reshape(-1, 2) / batches), batch_size=2)


def trainer(tmp_path, *plugins, mlflow=None, **options):
    options = {"max_epochs": 1, "log_every_n_steps": 1, "root_dir": tmp_path, "accelerator": "cpu", **options}
    return Trainer(plugins=[*plugins, {"mlflow": mlflow or {}}], **options)


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """A database that MLflow has made, to be copied: it takes MLflow seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tmp_path(tmp_path, empty):
    shutil.copy(empty, tmp_path / "mlflow.db")
    return tmp_path


def connect(where):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=where if isinstance(where, str) else f"sqlite:///{where}/mlflow.db")


class Found:
    """A run in MLflow, found by the id that torchplug gave it."""

    def __init__(self, where, run_id):
        self.client = connect(where)
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        (self.run,) = self.client.search_runs(experiments, f"tags.`torchplug.run_id` = '{run_id}'")
        self.id, self.status = self.run.info.run_id, self.run.info.status
        self.params, self.tags = self.run.data.params, self.run.data.tags
        self.names = {key[15:]: name for key, name in self.tags.items() if key.startswith("torchplug.name.")}

    def points(self):
        """Each value: (name, step, milliseconds, value) -> how often it is there."""
        histories = [(key, self.client.get_metric_history(self.id, key)) for key in self.run.data.metrics]
        return Counter((self.names.get(key, key), row.step, row.timestamp, repr(row.value)) for key, rows in histories for row in rows)

    def files(self, folder=None):
        found = set()
        for each in self.client.list_artifacts(self.id, folder):
            found |= self.files(each.path) if each.is_dir else {each.path}
        return found

    def content(self, path, tmp_path):
        return Path(self.client.download_artifacts(self.id, path, str(tmp_path))).read_bytes()


def read(folder):
    return [json.loads(line) for line in (Path(folder) / "journal.jsonl").read_text().splitlines()]


def expected(folder):
    """The points of a journal, as MLflow has them: SQLite keeps no sign of 0."""
    return Counter(
        (name, record["step"], int(record["time"] * 1000), repr(math.copysign(LARGEST, value) if math.isinf(value) else float(value) + 0.0))
        for record in read(folder)
        if record["event"] == "log_metrics"
        for name, value in record["metrics"].items()
    )


def steps(points):
    """Without the time: (name, step, value) -> how often."""
    return Counter({(name, step, value): sum(n for key, n in points.items() if (key[0], key[1], key[3]) == (name, step, value))
                    for name, step, _, value in points})  # fmt: skip


def replay(run_dir, **options):
    """What ``torchplug replay`` does."""
    plugin, journal = Mlflow(**options), Path(run_dir) / "journal.jsonl"
    place = Place(journal, first(journal), Path(run_dir), plugin.folder(run_dir, "mlflow"))
    return deliver(plugin.backend(), place)


# ---------------------------------------------------------------------- metrics and the run


@pytest.mark.slow
def test_it_passes_the_conformance_checks(tmp_path):
    """In a new interpreter: what mlflow changes at its first import is no fault of the plugin, and later it would look like one."""
    code = "import sys; from torchplug.testing import check_plugin; check_plugin('mlflow', tracking_uri=sys.argv[1])"
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/mlflow.db"]
    done = subprocess.run(command, cwd=tmp_path, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_values_are_those_of_the_journal_at_their_steps_and_times(tmp_path):
    t = trainer(tmp_path, max_epochs=2)
    t.fit(Net(), loader(), loader())
    found = Found(tmp_path, t.run.id)
    assert found.points() == expected(t.run.dir)
    assert sum(found.points().values()) == 2 * (BATCHES + 1 + 1)
    assert {step for name, step, *_ in found.points() if name == "val/loss"} == {BATCHES, 2 * BATCHES}


@pytest.mark.slow
def test_it_keeps_every_promise_of_a_logger():
    def stored(run_dir):
        found = Found(run_dir.parents[1], first(run_dir / "journal.jsonl")["id"])
        for key in found.run.data.metrics:
            yield from ((found.names.get(key, key), row.step, row.value) for row in found.client.get_metric_history(found.id, key))

    check_logger("mlflow", read=stored)


def test_the_run_has_the_names_the_times_and_the_status_of_the_journal(tmp_path):
    t = trainer(tmp_path, name="something")
    t.fit(Net(), loader())
    found, records = Found(tmp_path, t.run.id), read(t.run.dir)
    info = found.run.info
    assert (found.client.get_experiment(info.experiment_id).name, info.run_name, info.status) == ("something", "version_0", "FINISHED")
    assert info.start_time == int(records[0]["time"] * 1000) and 0 <= records[-1]["time"] * 1000 - info.end_time < 2000
    assert {"mlflow.source.name", "mlflow.user"} <= found.tags.keys()
    assert t.run.report["mlflow"] == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db --port 5000"
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.lock", "something"}


def test_options_name_experiment_run_tags_and_parent(tmp_path):
    t = trainer(tmp_path, mlflow={"experiment": "E", "run_name": "R", "tags": {"team": "a", "n": 3}, "parent": "abc"})
    t.fit(Net(), loader())
    found = Found(tmp_path, t.run.id)
    assert found.client.get_experiment(found.run.info.experiment_id).name == "E" and found.run.info.run_name == "R"
    assert [found.tags[name] for name in ("team", "n", "mlflow.parentRunId")] == ["a", "3", "abc"]


def test_fit_validate_and_test_are_one_run(tmp_path):
    t = trainer(tmp_path)
    module = Net()
    t.fit(module, loader(), loader())
    ids = [t.run.id]
    t.validate(module, loader())
    ids.append(t.run.id)
    statuses = []

    def look(batch, batch_idx):
        logger = t.run.plugins["mlflow"]
        statuses.append(logger.client.get_run(logger.run_id).info.status)
        Net.test_step(module, batch, batch_idx)

    module.test_step = look
    t.test(module, loader())
    assert set(statuses) == {"RUNNING"}
    found = Found(tmp_path, t.run.id)
    assert set(ids) == {t.run.id} and found.points() == expected(t.run.dir) and found.status == "FINISHED"
    assert {"loss_step", "val/loss", "test_loss"} <= {name for name, *_ in found.points()}
    assert 0 <= read(t.run.dir)[-1]["time"] * 1000 - found.run.info.end_time < 2000


def test_a_fit_that_goes_on_is_the_same_run_and_another_module_another(tmp_path):
    t = trainer(tmp_path, max_epochs=1)
    module = Net()
    t.fit(module, loader())
    one = t.run.id
    t.max_epochs = 2
    t.fit(module, loader())
    assert t.run.id == one and Found(tmp_path, one).points() == expected(t.run.dir)
    t.fit(Net(), loader())
    assert t.run.id != one and Found(tmp_path, t.run.id).points() == expected(t.run.dir)


ODD = {
        "l(x)@1": math.nan, "größe mit leer": math.inf, "a/b.c": -math.inf, "..": 1.0, "x" * 300: 2.0, "x" * 301: 3.0, "/a//b/": 4.0,
        "_x40_": 5.0, "@": 6.0, "zeile\n": 7.0, "a/./b": 8.0, "große Zahl": 2**53 + 2, "int": 3, "bool": True, "emoji 🎉": -0.0,
}  # fmt: skip


class Odd(Net):
    def on_train_epoch_end(self):
        self.log_dict(ODD)


def test_the_versions_of_what_took_part_are_a_tag(tmp_path):
    t = trainer(tmp_path, max_epochs=1)
    t.fit(Net(), loader(), loader())
    versions = json.loads(Found(tmp_path, t.run.id).tags["torchplug.versions"])
    assert versions["mlflow"] == "torchplug-mlflow 0.1.0" and versions["torch"] == torch.__version__


def test_odd_names_and_numbers_are_all_there_and_their_names_in_tags(tmp_path, caplog):
    t = trainer(tmp_path)
    t.fit(Odd(), loader(), loader())
    found = Found(tmp_path, t.run.id)
    assert found.points() == expected(t.run.dir) and ODD.keys() <= {name for name, *_ in found.points()}
    assert found.run.data.metrics["l_x28_x_x29__x40_1"] != found.run.data.metrics["l_x28_x_x29__x40_1"]
    assert found.names["_x40_"] == "@" and found.names["_x5f_x40_"] == "_x40_"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def original(name):
    return re.sub("_x([0-9a-f]*)_", lambda match: chr(int(match[1], 16)) if match[1] else "", name)


@given(st.text(alphabet=st.sampled_from("ab_x0f4/.:@ -\n~é\ud800"), max_size=12))
def test_a_name_becomes_one_that_mlflow_takes_and_that_no_other_becomes(name):
    from mlflow.utils.validation import path_not_unique, validate_param_and_metric_name

    new = torchplug_mlflow._taken(name)
    assert validate_param_and_metric_name(new) and not path_not_unique(new) and "\n" not in new
    fine = validate_param_and_metric_name(name) and not path_not_unique(name) and "\n" not in name
    has = re.search("_x[0-9a-f]*_", name)
    assert new == name if fine and not has else original(new) == name


@pytest.mark.parametrize("name", ["x" * 251, "@" * 200, "ü@" * 130, "x" * 250])
def test_a_long_name_is_cut_and_stays_different_from_others(name):
    one, other = torchplug_mlflow._taken(name), torchplug_mlflow._taken(name + "y")
    assert one != other and len(other) <= 230 and len(one) <= 250 and (one == name) == (len(name) == 250)


@pytest.mark.slow
def test_many_metrics_in_one_record_are_stored(tmp_path):
    class Many(Net):
        def on_train_epoch_end(self):
            self.log_dict({f"many/{i}": float(i) for i in range(2500)})

    t = trainer(tmp_path)
    t.fit(Many(), loader())
    assert Found(tmp_path, t.run.id).points() == expected(t.run.dir)


@pytest.mark.slow
def test_what_breaks_off_in_the_middle_is_sent_again(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    class Many(Net):
        def on_train_epoch_end(self):
            self.log_dict({f"many/{i}": float(i) for i in range(2500)})

    log_batch, large = MlflowClient.log_batch, []

    def breaks(self, *args, **options):
        if len(options.get("metrics", ())) > 500:
            large.append(options)
            if len(large) == 2:
                raise ConnectionError("broken")
        return log_batch(self, *args, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", breaks)
    t = trainer(tmp_path)
    t.fit(Many(), loader())
    assert len(large) > 4 and Found(tmp_path, t.run.id).points() == expected(t.run.dir)


# ---------------------------------------------------------------------- hyperparameters


def test_hyperparameters_are_texts_nested_ones_with_slashes_and_long_ones_in_parts(tmp_path):
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    long = "".join(chr(97 + i % 26) for i in range(2 * MAX_PARAM_VAL_LENGTH + 5))
    t = trainer(tmp_path)
    t.fit(Net(lr=0.5, nested={"a": {"b": [1, 2]}, "c": None}, flag=True, long=long, empty="", nothing={}, **{"odd@": 1}), loader())
    found = Found(tmp_path, t.run.id)
    short = {name: value for name, value in found.params.items() if not name.startswith("long")}
    assert short == {
        "lr": "0.5", "nested/a/b": "[1, 2]", "nested/c": "None", "flag": "True", "empty": "", "nothing": "{}", "odd_x40_": "1"
    }  # fmt: skip
    assert found.params["long"] + found.params["long.1"] + found.params["long.2"] == long and len(found.params) == len(short) + 3
    assert found.names["odd_x40_"] == "odd@"


def test_hundreds_of_hyperparameters_are_stored(tmp_path):
    many = {f"p{i}": "ü" * 1000 for i in range(350)}
    t = trainer(tmp_path)
    t.fit(Net(many=many), loader())
    assert Found(tmp_path, t.run.id).params == {"lr": "0.1", **{f"many/{name}": value for name, value in many.items()}}


def test_requests_stay_below_a_megabyte():
    """Which MLflow says is the most; a character takes up to 12 bytes in JSON."""
    items = [(f"p{i}", "🎉" * 6000) for i in range(100)] + [("long", "🎉" * 100_000), ("end", "")]
    portions = list(torchplug_mlflow._portions(items, 90))
    assert [item for portion in portions for item in portion] == items
    assert max(len(json.dumps(portion)) for portion in portions if len(portion) > 1) < 1_000_000


def test_a_hyperparameter_that_changes_keeps_its_value_and_the_new_one_is_a_tag(tmp_path, caplog):
    class Changes(Net):
        def on_train_end(self):
            self._run.hooks.log_hyperparameters(self._run, {"lr": 0.25, "new": 1, "same": "x" * 7000})
            self._run.hooks.log_hyperparameters(self._run, {"new": 2, "same": "x" * 7000})

    t = trainer(tmp_path)
    t.fit(Changes(same="x" * 7000), loader())
    found = Found(tmp_path, t.run.id)
    assert found.params == {"lr": "0.1", "new": "1", "same": "x" * 6000, "same.1": "x" * 1000}
    assert {name: value for name, value in found.tags.items() if ".changed." in name} == {
        "torchplug.changed.lr": "0.25", "torchplug.changed.new": "2"
    }  # fmt: skip
    assert "does not take" not in caplog.text and found.points() == expected(t.run.dir)


# ---------------------------------------------------------------------- files


class Files(Net):
    def on_train_end(self):
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        run, folder = self._run, Path(self._run.options.root_dir) / "mine"
        run.log_text("note/größe @", "hällo\n")
        figure = pyplot.figure()
        run.log_figure("curve", figure)
        pyplot.close(figure)
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "x.txt").write_text("x")
        (folder / "a #1%.txt").write_text("a")
        run.log_artifact(folder / "a #1%.txt")
        run.log_artifact(folder / "a #1%.txt", "other = name.txt")
        run.log_artifact(folder, "folder")
        run.log_artifact(folder / "none.txt")
        run.log_artifact(folder / "none.txt")


FILES = {
    "note/größe _x40_/3.txt", "figures/curve/3.png", "artifacts/a _x23_1_x25_.txt", "artifacts/other = name.txt",
    "artifacts/folder/sub/x.txt", "artifacts/folder/a _x23_1_x25_.txt",
}  # fmt: skip


def check_files(found, run_dir, tmp_path):
    tmp_path = tmp_path / "downloads"
    tmp_path.mkdir(exist_ok=True)
    assert found.files() == FILES
    (figure,) = (Path(run_dir) / "figures").iterdir()
    assert found.content("figures/curve/3.png", tmp_path) == figure.read_bytes()
    assert found.content("note/größe _x40_/3.txt", tmp_path) == "hällo\n".encode()
    assert found.content("artifacts/other = name.txt", tmp_path) == b"a"


def test_texts_figures_files_and_folders_are_artifacts(tmp_path, caplog):
    t = trainer(tmp_path)
    t.fit(Files(), loader())
    found = Found(tmp_path, t.run.id)
    check_files(found, t.run.dir, tmp_path)
    assert found.run.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())
    assert caplog.text.count("none.txt is not there") == 1 and found.points() == expected(t.run.dir)


@pytest.mark.slow
def test_a_file_that_cannot_be_stored_is_said_and_holds_up_nothing(tmp_path, caplog):
    class Clash(Net):
        def on_train_end(self):
            self._run.log_text("a", "a file")
            self._run.log_text("a/3.txt", "now it would be a folder")
            self._run.log_text("b", "later")

    t = trainer(tmp_path)
    t.fit(Clash(), loader())
    found = Found(tmp_path, t.run.id)
    assert found.files() == {"a/3.txt", "b/3.txt"} and found.status == "FINISHED" and found.points() == expected(t.run.dir)
    assert "mlflow does not take record" in caplog.text and "a/3.txt/3.txt cannot be stored" in caplog.text


def saved(t):
    return {f"checkpoints/{path.name}" for path in (t.run.dir / "checkpoints").glob("epoch*")}


@pytest.mark.slow
def test_all_checkpoints_are_stored_and_removed_with_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(Mlflow, "interval", 0.02)

    class Rises(Net):
        def on_train_epoch_start(self):
            time.sleep(0.3)  # all there is has been sent

        def validation_step(self, batch, batch_idx):
            self.log("score", float(self.current_epoch % 3))

    t = trainer(tmp_path, {"checkpoint": {"monitor": "score", "mode": "max", "top_k": 2}}, mlflow={"log_model": "all"}, max_epochs=5)
    t.fit(Rises(), loader(), loader())
    found = Found(tmp_path, t.run.id)
    assert len(list((tmp_path / "mlartifacts").rglob("*.safetensors"))) == len(found.files("checkpoints"))
    events = Counter(record["event"] for record in read(t.run.dir))
    assert events["on_checkpoint_removed"] >= 1 and len(saved(t)) == 2
    assert {path for path in found.files("checkpoints") if "last" not in path} == saved(t)
    for path in saved(t):
        assert found.content(path, tmp_path) == (t.run.dir / path).read_bytes()


def test_the_best_checkpoint_is_stored_once_when_the_run_is_over(tmp_path):
    class Rises(Net):
        def validation_step(self, batch, batch_idx):
            self.log("score", [1.0, 3.0, 2.0][self.current_epoch % 3])

    module = Rises()
    options = {"monitor": "score", "mode": "max", "top_k": 3}
    t = trainer(tmp_path, {"checkpoint": options}, mlflow={"log_model": "best"}, max_epochs=3)
    t.fit(module, loader(), loader())
    best = f"checkpoints/{Path(t.run.best_path).name}"
    found = Found(tmp_path, t.run.id)
    assert found.files() == {best} and found.content(best, tmp_path) == (t.run.dir / best).read_bytes()
    stored = next((tmp_path / "mlartifacts").rglob("*.safetensors"))
    before = stored.stat().st_mtime_ns, stored.stat().st_ino
    stored.chmod(0o444)
    t.test(module, loader())
    assert (stored.stat().st_mtime_ns, stored.stat().st_ino) == before and Found(tmp_path, t.run.id).files() == {best}


def test_a_checkpoint_that_is_gone_already_is_passed_over(tmp_path):
    t = trainer(tmp_path, {"checkpoint": {}}, mlflow={"log_model": "all"})
    t.fit(Net(), loader(), loader())
    shutil.rmtree(t.run.dir / "checkpoints")
    replay(t.run.dir, log_model="best", experiment="another")
    replay(t.run.dir, log_model="all", experiment="a third")
    client = connect(tmp_path)
    for name in ("another", "a third"):
        (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
        assert run.info.status == "FINISHED" and client.list_artifacts(run.info.run_id) == []


# ---------------------------------------------------------------------- replay, and going on


@pytest.mark.slow
def test_replay_makes_the_same_run_and_twice_makes_no_difference(tmp_path):
    t = Trainer(plugins=["journal"], max_epochs=1, log_every_n_steps=1, root_dir=tmp_path, accelerator="cpu")
    t.fit(Files(lr=0.5), loader(), loader())
    for _ in range(2):
        assert replay(t.run.dir).refused == []
        found = Found(tmp_path, t.run.id)
        assert found.points() == expected(t.run.dir) and found.status == "FINISHED" and found.params == {"lr": "0.5"}
        check_files(found, t.run.dir, tmp_path)
        found.client.delete_tag(found.id, "torchplug.records")  # the second time nobody knows how much is there


@pytest.mark.slow
def test_replay_of_a_live_run_adds_nothing_and_a_moved_run_is_known(tmp_path):
    t = trainer(tmp_path / "here", {"checkpoint": {}})
    t.fit(Net(), loader())
    (tmp_path / "here").rename(tmp_path / "there")
    run_dir = tmp_path / "there" / "Net" / "version_0"
    replay(run_dir)
    found = Found(tmp_path / "there", t.run.id)
    assert found.points() == expected(run_dir) and not (tmp_path / "here").exists()
    assert found.run.info.end_time == int(read(run_dir)[-1]["time"] * 1000)
    found.client.delete_run(found.id)
    replay(run_dir, log_model="best")
    assert Found(tmp_path / "there", t.run.id).files() == {"checkpoints/epoch=0-step=3.safetensors"}


class Breaks:
    """Ends the process like a power cut, behind a step."""

    def __init__(self, step):
        self.step = step

    @hookimpl
    def on_train_batch_start(self, run):
        if run.position.step == self.step:
            run.dir.joinpath("id").write_text(run.id)
            time.sleep(2.5)  # the logger has sent what is there
            os.kill(os.getpid(), signal.SIGKILL)


def fit_until(step, root, uri=None):
    """For another process: a run with a checkpoint each 2 steps, which breaks behind ``step``."""
    torch.manual_seed(0)
    plugins = [{"checkpoint": {"every_n_steps": 2}}, *([Breaks(step)] if step else [])]
    t = trainer(root, *plugins, mlflow={"tracking_uri": uri} if uri else {}, max_epochs=3)
    t.fit(Net(), loader(), loader(), ckpt_path=None if step else "last")


@pytest.fixture
def in_a_process(programs):
    """Calls a function of this file in a process of its own."""

    def run(code):
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_mlflow; test_mlflow.{code}"
        return programs.run(code, imports=["mlflow", "hypothesis", "pytest"])

    return run


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_has_each_point_once(tmp_path, in_a_process):
    assert in_a_process(f"fit_until(7, {str(tmp_path)!r})").returncode == -signal.SIGKILL
    run_dir = tmp_path / "Net" / "version_0"
    run_id = (run_dir / "id").read_text()
    before = Found(tmp_path, run_id)
    assert before.status == "RUNNING" and any(step == 7 for _, step, *_ in before.points())  # behind the checkpoint
    replay(run_dir)
    assert Found(tmp_path, run_id).status == "KILLED"
    done = in_a_process(f"fit_until(0, {str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    found = Found(tmp_path, run_id)
    assert (run_dir / "journal.abandoned.jsonl").exists() and found.status == "FINISHED"
    points = steps(expected(run_dir))
    assert set(points.values()) == {1} and steps(found.points()) == points
    found.client.delete_tag(found.id, "torchplug.records")
    replay(run_dir)
    assert steps(Found(tmp_path, run_id).points()) == points


@pytest.mark.slow
def test_values_that_a_resumed_run_has_again_show_once_also_to_who_connects_later(tmp_path):
    """The store says how much it has, but not that a part of it is no longer the past: that is said by a tag."""
    t = trainer(tmp_path, max_epochs=2)
    t.fit(Net(), loader(), loader())
    found, journal = Found(tmp_path, t.run.id), t.run.dir / "journal.jsonl"
    points = steps(found.points())
    lines = journal.read_text().splitlines(keepends=True)
    back = next(n for n, line in enumerate(lines) if '"step": 3' in line)
    again = [json.dumps({**json.loads(line), "time": json.loads(line)["time"] + 100}) + "\n" for line in lines[back:]]
    for end in (2, 4, len(again)):  # it goes on, and is broken off
        journal.write_text("".join(lines[:back] + again[:end]))
        replay(t.run.dir)
        assert steps(Found(tmp_path, t.run.id).points()) == points


# ---------------------------------------------------------------------- every way out


class Fails(Net):
    error = RuntimeError

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise self.error("broken")
        return super().training_step(batch, batch_idx)


class Interrupts(Fails):
    error = KeyboardInterrupt


class Stops(Net):
    def on_train_batch_end(self):
        self._run.request_stop("enough")


@pytest.mark.parametrize(
    ("net", "error", "status"), [(Fails, RuntimeError, "FAILED"), (Interrupts, KeyboardInterrupt, "KILLED"), (Stops, None, "FINISHED")]
)
def test_the_status_says_how_the_run_ended(tmp_path, net, error, status):
    t = trainer(tmp_path)
    try:
        t.fit(net(), loader())
    except BaseException as raised:
        assert type(raised) is error
    found = Found(tmp_path, t.run.id)
    assert found.status == status and found.points() == expected(t.run.dir)
    assert 0 <= read(t.run.dir)[-1]["time"] * 1000 - found.run.info.end_time < 2000


def fit_signalled(root):
    class Signalled(Net):
        def on_train_batch_end(self):
            Path(root, "id").write_text(self._run.id)
            os.kill(os.getpid(), signal.SIGTERM)

    trainer(root, max_epochs=100).fit(Signalled(), loader())


@pytest.mark.slow
def test_a_run_that_is_terminated_has_everything_and_the_status(tmp_path, in_a_process):
    done = in_a_process(f"fit_signalled({str(tmp_path)!r})")
    (folder,) = (tmp_path / "Signalled").iterdir()
    ended = read(folder)[-1]
    assert done.returncode != 0 and ended["event"] == "on_run_end"
    found = Found(tmp_path, (tmp_path / "id").read_text())
    assert found.status == {"interrupted": "KILLED", "stopped": "FINISHED"}[ended["status"]] and found.points() == expected(folder)


# ---------------------------------------------------------------------- the plugin in its surroundings


def test_client_and_run_id_are_mlflows_while_the_run_goes_on(tmp_path):
    class Tags(Net):
        def on_train_start(self):
            logger = self._run.plugins["mlflow"]
            logger.client.set_tag(logger.run_id, "mine", "yes")

    t = trainer(tmp_path)
    with pytest.raises(RuntimeError, match="from on_run_start to on_run_end"):
        _ = Mlflow().client
    t.fit(Tags(), loader())
    assert Found(tmp_path, t.run.id).tags["mine"] == "yes"
    with pytest.raises(RuntimeError, match="from on_run_start to on_run_end"):
        _ = t.run.plugins["mlflow"].run_id


@pytest.mark.slow
def test_mlflow_is_imported_when_a_run_starts_and_telemetry_is_off():
    code = """
import sys, threading
from torchplug import Trainer
sys.path.insert(0, {folder!r})
t = Trainer(plugins=["mlflow"], max_epochs=1, accelerator="cpu")
assert "mlflow" not in sys.modules
import torchplug_mlflow
assert "mlflow" not in sys.modules
torchplug_mlflow.Mlflow().backend()
from mlflow.telemetry.client import get_telemetry_client
assert get_telemetry_client() is None
import os
assert not set(torchplug_mlflow.VARIABLES) & set(os.environ)
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_CURRENT_TEST", *torchplug_mlflow.VARIABLES)
    }
    done = subprocess.run(
        [sys.executable, "-c", code.format(folder=str(Path(__file__).parent))], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_variables_of_the_environment_are_set_for_the_run_unless_the_user_did(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    for name in torchplug_mlflow.VARIABLES.keys() - {"MLFLOW_HTTP_REQUEST_TIMEOUT"}:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    seen = {}

    class Looks(Net):
        def on_train_start(self):
            seen.update(os.environ)

    trainer(tmp_path).fit(Looks(), loader())
    assert {name: seen[name] for name in torchplug_mlflow.VARIABLES} == {**torchplug_mlflow.VARIABLES, "MLFLOW_HTTP_REQUEST_TIMEOUT": "77"}
    assert {name: value for name, value in os.environ.items() if "PYTEST" not in name} == {
        name: value for name, value in before.items() if "PYTEST" not in name
    }


def test_the_environment_stays_until_the_last_has_left_it(monkeypatch):
    for name in torchplug_mlflow.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with torchplug_mlflow._environment:
        with torchplug_mlflow._environment:
            pass
        assert torchplug_mlflow.VARIABLES.keys() <= os.environ.keys()
    assert not torchplug_mlflow.VARIABLES.keys() & os.environ.keys()


def test_the_environment_is_as_it_was_after_many_have_used_it_at_once(monkeypatch):
    for name in torchplug_mlflow.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    wrong = []

    def use():
        for _ in range(300):
            with torchplug_mlflow._environment:
                if any(os.environ.get(name) != value for name, value in torchplug_mlflow.VARIABLES.items()):
                    wrong.append(1)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not torchplug_mlflow.VARIABLES.keys() & os.environ.keys()


def test_a_trial_run_leaves_nothing(tmp_path):
    (tmp_path / "mlflow.db").unlink()
    t = trainer(tmp_path, mlflow={"tracking_uri": "http://127.0.0.1:9"}, fast_dev_run=True)
    t.fit(Net(), loader())
    assert list(tmp_path.iterdir()) == [] and "mlflow" not in t.run.report


def test_a_database_of_the_user_is_used_and_the_files_lie_with_the_runs(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mlflow.db").rename(tmp_path / "elsewhere" / "mlflow.db")
    t = trainer(tmp_path / "runs", mlflow={"tracking_uri": f"sqlite:///{tmp_path}/elsewhere/mlflow.db"})
    t.fit(Files(), loader())
    found = Found(tmp_path / "elsewhere", t.run.id)
    assert found.points() == expected(t.run.dir) and found.files() >= FILES
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"Files", "mlartifacts", "mlflow.lock", "mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "elsewhere"}


@pytest.mark.parametrize("name", ["with space", "ünï#", "a%3Db?c"])
def test_the_directory_of_all_runs_may_have_any_name(tmp_path, name):
    from mlflow import MlflowClient

    (tmp_path / name).mkdir()
    (tmp_path / "mlflow.db").rename(tmp_path / name / "mlflow.db")
    t = trainer(tmp_path / name)
    t.fit(Files(), loader())
    (tmp_path / name / "mlflow.db").rename(tmp_path / "mlflow.db")  # read under a plain name
    found = Found(tmp_path, t.run.id)
    assert found.points() == expected(t.run.dir) and found.files() >= FILES
    assert isinstance(found.client, MlflowClient)


@pytest.mark.slow
@pytest.mark.parametrize(("is_folder", "text"), [(True, "unable to open database file"), (False, "file is not a database")])
def test_a_database_that_cannot_be_opened_is_said_at_once_and_training_goes_on(tmp_path, caplog, is_folder, text):
    (tmp_path / "mlflow.db").unlink()
    (tmp_path / "mlflow.db").mkdir() if is_folder else (tmp_path / "mlflow.db").write_text("something else" * 100)
    begin = time.monotonic()
    t = trainer(tmp_path, mlflow={"close_timeout": 1.0})
    t.fit(Net(), loader())
    assert time.monotonic() - begin < 5 and "takes nothing at present" in caplog.text
    assert text in t.run.report["mlflow"] and read(t.run.dir)[-1]["event"] == "on_run_end"


@pytest.mark.slow
def test_a_run_that_is_deleted_in_mlflow_is_made_anew(tmp_path, caplog):
    class Deletes(Net):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                logger = self._run.plugins["mlflow"]
                time.sleep(1.5)
                logger.client.delete_run(logger.run_id)

    t = trainer(tmp_path, max_epochs=2)
    t.fit(Deletes(), loader())
    assert Found(tmp_path, t.run.id).points() == expected(t.run.dir)
    assert "the run was deleted in MLflow" in caplog.text and "does not take" not in caplog.text


@pytest.mark.slow
def test_a_deleted_experiment_is_an_error_that_says_so(tmp_path, caplog):
    client = connect(tmp_path)
    client.delete_experiment(client.create_experiment("Net"))
    t = trainer(tmp_path, mlflow={"close_timeout": 2.0})
    t.fit(Net(), loader())
    assert "the experiment 'Net' was deleted in MLflow" in caplog.text


def test_two_runs_at_once_do_not_share_anything(tmp_path):
    errors = []

    def fit(number):
        try:
            t = trainer(tmp_path, max_epochs=3, name="same")
            t.fit(Net(lr=number), loader(), loader())
            runs[number] = t.run
        except BaseException as error:
            errors.append(error)

    runs = {}
    threads = [threading.Thread(target=fit, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number, run in runs.items():
        found = Found(tmp_path, run.id)
        assert found.points() == expected(run.dir) and found.params["lr"] == str(number) and found.status == "FINISHED"


def fit_once(root):
    t = trainer(root)
    t.fit(Net(), loader(), loader())
    (t.run.dir / "id").write_text(t.run.id)


@pytest.mark.slow
def test_processes_that_begin_at_once_in_a_new_directory_do_not_disturb_each_other(tmp_path, in_a_process):
    (tmp_path / "mlflow.db").unlink()
    dones = []
    threads = [threading.Thread(target=lambda: dones.append(in_a_process(f"fit_once({str(tmp_path)!r})"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for done in dones:
        assert done.returncode == 0 and "takes nothing" not in done.stderr and "not everything" not in done.stderr, done.stderr
    for run_dir in (tmp_path / "Net").iterdir():
        assert Found(tmp_path, (run_dir / "id").read_text()).points() == expected(run_dir)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.lock", "Net"}


def test_two_trainers_by_turns_do_not_share_anything(tmp_path):
    modules, trainers = [Net(lr=1), Net(lr=2)], [trainer(tmp_path), trainer(tmp_path)]
    for work in ("fit", "test", "validate"):
        for t, module in zip(trainers, modules, strict=True):
            getattr(t, work)(module, loader())
    for number, t in enumerate(trainers, start=1):
        found = Found(tmp_path, t.run.id)
        assert found.points() == expected(t.run.dir) and found.params == {"lr": str(number)}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_of_a_loader_neither_hang_nor_write(tmp_path, method):
    data = TensorDataset(torch.arange(12.0).reshape(-1, 2))
    t = trainer(tmp_path, max_epochs=2 if method == "fork" else 1)  # each of them imports torch
    t.fit(Net(), DataLoader(data, batch_size=2, num_workers=2 if method == "fork" else 1, multiprocessing_context=method), loader())
    assert Found(tmp_path, t.run.id).points() == expected(t.run.dir)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"log_model": "some"}, "log_model must be"),
        ({"log_model": True}, "log_model must be"),
        ({"experiment": ""}, "experiment must not be empty"),
        ({"experiment": "x" * 501}, "at most 500 characters, got 501"),
        ({"tracking_uri": 5}, "tracking_uri must be"),
        ({"tags": {"a@": "b"}}, "no tag of the name 'a@', but 'a_x40_'"),
        ({"tags": {"a": None}}, "a tag must be a text or a number"),
        ({"tags": ["a"]}, "tags must be"),
        ({"close_timeout": 0}, "close_timeout must be above 0"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises((TypeError, ValueError), match=text):
        Mlflow(**options)
    with pytest.raises(PluginError, match=text):
        trainer(Path(), mlflow=options)


def test_passwords_are_not_shown():
    assert torchplug_mlflow._where("https://me:secret@host:1/x/", "1", "r") == "https://host:1/x/#/experiments/1/runs/r"


# ---------------------------------------------------------------------- a real server


class Server:
    """``mlflow server`` on loopback."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        if self.process is not None:
            return self
        command = [
            "server", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
            "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command], env=environment, cwd=self.folder, start_new_session=True, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return self
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.2)

    def signal(self, number):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self):
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def a_server(tmp_path_factory, empty):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty, folder / "mlflow.db")
    server = Server(folder)
    yield server
    server.kill()


@pytest.fixture
def server(a_server):
    yield a_server.start()
    if a_server.process is not None:
        a_server.signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_server_has_everything_that_a_database_has(server, tmp_path, caplog, capfd):
    class All(Files, Odd):
        pass

    more = {"empty": "", "long": "ü" * 13000, "nul": "a\0b", **{f"p{i}": "ü" * 3000 for i in range(150)}}
    t = trainer(
        tmp_path, {"checkpoint": {"monitor": "val/loss", "top_k": 1}}, mlflow={"tracking_uri": server.uri, "log_model": "all"}, max_epochs=3
    )
    with caplog.at_level(logging.WARNING):
        t.fit(All(**more), loader(), loader())
    found = Found(server.uri, t.run.id)
    assert found.points() == expected(t.run.dir) and found.status == "FINISHED"
    assert found.params["empty"] == "" and "".join(found.params[f"long{n}"] for n in ("", ".1", ".2")) == more["long"]
    assert found.params["nul"] == "a\\x00b" and all(found.params[f"p{i}"] == more[f"p{i}"] for i in range(150))
    text = found.content("note/größe _x40_/9.txt", tmp_path)
    assert text == "hällo\n".encode()
    assert {path for path in found.files("checkpoints") if "last" not in path} == saved(t) and len(saved(t)) == 1
    assert {name.replace("/3.", "/9.") for name in FILES} <= found.files()
    assert t.run.report["mlflow"] == f"{server.uri}/#/experiments/{found.run.info.experiment_id}/runs/{found.id}"
    for _ in range(2):
        replay(t.run.dir, tracking_uri=server.uri)
    assert Found(server.uri, t.run.id).points() == expected(t.run.dir)
    assert "View run" not in capfd.readouterr().out
    assert "takes nothing" not in caplog.text and "does not take" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("listens", [False, True])
def test_a_call_to_a_server_that_does_not_answer_is_given_up_soon(tmp_path, listens):
    t = Trainer(plugins=["journal"], max_epochs=1, root_dir=tmp_path, accelerator="cpu")
    t.fit(Net(), loader())
    errors = []

    def send(uri):
        try:
            replay(t.run.dir, tracking_uri=uri)
        except Exception as error:
            errors.append(error)

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        thread = threading.Thread(target=send, args=(f"http://127.0.0.1:{silent.getsockname()[1]}",), daemon=True)
        thread.start()
        thread.join(15 if listens else 3)
    assert errors, "it is still trying"


STEPS = 50


class Watch:
    """Does something at a step, outside of it, and measures the steps."""

    def __init__(self, actions):
        self.actions, self.seconds = actions, []

    @hookimpl
    def on_train_batch_start(self, run):
        self.actions.get(run.position.step, lambda: None)()
        self.begin = time.perf_counter()

    @hookimpl
    def on_train_batch_end(self):
        self.seconds.append(time.perf_counter() - self.begin)
        time.sleep(0.04)  # so that the run has a length


def long_fit(tmp_path, plugins, actions=None, **options):
    torch.manual_seed(0)
    watch, module = Watch(actions or {}), Net()
    t = Trainer(
        plugins=[watch, *plugins],
        max_epochs=1,
        log_every_n_steps=1,
        root_dir=tmp_path,
        accelerator="cpu",
        num_sanity_val_steps=0,
        **options,
    )
    begin = time.monotonic()
    t.fit(module, loader(STEPS), loader())
    return t.run, [parameter.detach().clone() for parameter in module.parameters()], watch, time.monotonic() - begin


class Errors(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500)
        self.end_headers()

    do_POST = do_PUT = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights after a run without a logger, and how long it took."""
    _, parameters, _, seconds = long_fit(tmp_path_factory.mktemp("plain"), [])
    return parameters, seconds


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("outage", ["absent", "killed", "restarted", "stopped", "continued", "errors"])
def test_an_outage_of_the_server_costs_nothing(server, plain, tmp_path, outage):
    close_timeout = 25.0 if outage in ("restarted", "continued") else 3.0
    weights, alone = plain
    uri, other, waited = server.uri, None, []

    def restart():
        begin = time.monotonic()
        server.start()
        waited.append(time.monotonic() - begin)

    actions = {
        "killed": {15: server.kill},
        "restarted": {15: server.kill, 40: restart},
        "stopped": {15: lambda: server.signal(signal.SIGSTOP)},
        "continued": {15: lambda: server.signal(signal.SIGSTOP), 40: lambda: server.signal(signal.SIGCONT)},
    }.get(outage, {})
    if outage == "absent":
        server.kill()
    if outage == "errors":
        other = HTTPServer(("127.0.0.1", 0), Errors)
        threading.Thread(target=other.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{other.server_port}"
    try:
        options = {"tracking_uri": uri, "close_timeout": close_timeout, "experiment": outage}
        run, parameters, watch, seconds = long_fit(tmp_path, ["journal", {"mlflow": options}], actions)
    finally:
        if other is not None:
            other.shutdown()
            other.server_close()
        server.signal(signal.SIGCONT) if server.process is not None else server.start()
    assert all(torch.equal(one, another) for one, another in zip(parameters, weights, strict=True))
    assert max(watch.seconds) < 0.05 and len(watch.seconds) == STEPS
    assert seconds - sum(waited) < alone + close_timeout + 3.0
    records = read(run.dir)
    assert [record["n"] for record in records] == list(range(len(records))) and records[-1]["event"] == "on_run_end"
    assert sum("loss_step" in record.get("metrics", {}) for record in records) == STEPS
    if outage in ("restarted", "continued"):
        found = Found(server.uri, run.id)
        assert found.points() == expected(run.dir) and found.status == "FINISHED"
    else:
        assert "torchplug replay" in run.report["mlflow"]
    for _ in range(2):
        replay(run.dir, tracking_uri=server.uri, experiment=outage)
        found = Found(server.uri, run.id)
        assert found.points() == expected(run.dir) and found.status == "FINISHED"
