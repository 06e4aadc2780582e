"""What the journal promises: everything that happens is in it, in order, readable, and still there after a kill."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from datetime import timedelta
from enum import Enum
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Run, Trainer, hookimpl
from torchplug.hookspecs import Hooks
from torchplug.testing import check_logger, check_plugin
from torchplug_journal import Journal

BATCHES = 3
OF_BATCHES = {
    "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_after_optimizer_step",
    "on_before_zero_grad", "on_scheduler_step", "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end",
    "on_test_batch_start", "on_test_batch_end", "on_predict_batch_start", "on_predict_batch_end",
}  # fmt: skip
SAID_BY_OTHERS = {  # what they say stands in the events beside them
    "setup", "teardown", "on_validation_epoch_start", "on_validation_epoch_end", "on_test_epoch_start", "on_test_epoch_end",
    "on_predict_epoch_start", "on_predict_epoch_end",
}  # fmt: skip


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Recorder:
    """What another logger was given."""

    def __init__(self):
        self.records = []

    @hookimpl
    def log_metrics(self, metrics, stage, step, epoch, samples, seconds):
        where = {"stage": stage, "step": step, "epoch": epoch, "samples": samples, "seconds": seconds}
        self.records.append({"metrics": dict(metrics), **where})


def loader():
    return DataLoader(TensorDataset(torch.arange(2.0 * 2 * BATCHES).reshape(-1, 2)), batch_size=2)


def trainer(tmp_path, *plugins, journal=None, **options):
    options = {"max_epochs": 1, "log_every_n_steps": 1, "root_dir": tmp_path, "accelerator": "cpu", **options}
    return Trainer(plugins=[{"journal": journal or {}}, *plugins], **options)


def read(folder):
    return [json.loads(line) for line in (Path(folder) / "journal.jsonl").read_text().splitlines()]


def one(records, event):
    (record,) = [record for record in records if record["event"] == event]
    return record


# ---------------------------------------------------------------------- what is in it


@pytest.mark.slow
def test_it_passes_the_conformance_checks():
    check_plugin("journal")


def test_the_events_of_a_fit_stand_in_the_order_in_which_they_happened(tmp_path):
    t = trainer(tmp_path, max_epochs=2)
    t.fit(Net(), loader(), loader())
    epoch = [
        "on_train_epoch_start", *["log_metrics"] * BATCHES, "on_validation_start", "log_metrics", "on_validation_end", "on_train_epoch_end",
    ]  # fmt: skip
    assert [record["event"] for record in read(t.run.dir)] == [
        "on_run_start", "on_fit_start", "on_sanity_start", "on_sanity_end", "on_train_start", *epoch, *epoch,
        "on_train_end", "on_fit_end", "on_run_end",
    ]  # fmt: skip


@pytest.mark.slow
def test_it_keeps_every_promise_of_a_logger():
    def stored(run_dir):
        records = [record for record in read(run_dir) if record["event"] == "log_metrics"]
        return [(name, record["step"], value) for record in records for name, value in record["metrics"].items()]

    check_logger("journal", read=stored)


def test_the_events_of_test_and_predict_are_there_too(tmp_path):
    t = trainer(tmp_path)
    t.test(Net(), loader())
    assert [record["event"] for record in read(t.run.dir)] == ["on_run_start", "on_test_start", "log_metrics", "on_test_end", "on_run_end"]
    t.predict(Net(), loader())
    assert [record["event"] for record in read(t.run.dir)] == ["on_run_start", "on_predict_start", "on_predict_end", "on_run_end"]


def test_every_event_of_the_contract_is_recorded_or_belongs_to_single_batches():
    hooks = {name: spec for name, spec in vars(Hooks).items() if hasattr(spec, "torchplug_spec")}
    events = {name for name, spec in hooks.items() if not spec.torchplug_spec["firstresult"]}
    recorded = {name for name in vars(Journal) if name in hooks}
    assert recorded == events - OF_BATCHES - SAID_BY_OTHERS


def test_metric_records_are_those_of_every_other_logger_digit_by_digit(tmp_path):
    recorder = Recorder()
    t = trainer(tmp_path, recorder, max_epochs=2)
    t.fit(Net(), loader(), loader())
    mine = [record for record in read(t.run.dir) if record["event"] == "log_metrics"]
    assert len(mine) == 2 * (BATCHES + 1)
    assert [{key: record[key] for key in recorder.records[0]} for record in mine] == recorder.records


def test_each_line_has_a_number_a_time_and_the_place_of_the_run(tmp_path):
    before = time.time()
    t = trainer(tmp_path, max_epochs=2)
    t.fit(Net(), loader())
    records = read(t.run.dir)
    assert [record["n"] for record in records] == list(range(len(records)))
    times = [record["time"] for record in records]
    assert before <= times[0] and times == sorted(times) and times[-1] <= time.time()
    steps = [{key: r[key] for key in ("stage", "epoch", "batch", "step", "samples")} for r in records if r["event"] == "log_metrics"]
    assert steps == [
        {"stage": "train", "epoch": epoch, "batch": batch, "step": step, "samples": 2 * step}
        for step, (epoch, batch) in enumerate([(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)], start=1)
    ]


def test_the_start_names_run_versions_options_and_plugins(tmp_path):
    t = trainer(tmp_path, max_time=timedelta(minutes=90), seed=3)
    t.fit(Net(), loader())
    start = read(t.run.dir)[0]
    assert (start["id"], start["work"], start["module"], start["dir"]) == (t.run.id, "fit", "Net", str(t.run.dir))
    assert start["versions"]["torch"] == torch.__version__
    assert start["versions"]["journal"] == "torchplug-journal 0.1.0"
    assert start["plugins"] == {"journal": {"dir": None}}
    assert start["options"]["max_time"] == "5400.0s"
    assert start["options"]["root_dir"] == str(tmp_path)
    assert start["options"]["seed"] == 3
    assert Trainer(max_time=start["options"]["max_time"], plugins=[]).max_time  # it can be given back as it stands


def test_passwords_in_addresses_are_not_written_down(tmp_path):
    t = trainer(tmp_path)

    class Tells(Net):
        def on_train_start(self):
            self.run.log_text("from", "see http://me:secret@host/a and http://host/b@c")

    t.fit(Tells(), loader())
    assert one(read(t.run.dir), "log_text")["text"] == "see http://***@host/a and http://host/b@c"


class Size(Enum):
    SMALL = 1


def test_hyperparameters_of_every_kind_are_written_readably(tmp_path):
    class Described(Net):
        def __init__(self):
            super().__init__()
            weights, many = torch.tensor([0.5, 0.25]), torch.zeros(5000)
            self.save_hyperparameters({"lr": 0.1, "wait": timedelta(seconds=2), "data": Path("a/b"), "size": Size.SMALL,
                                       "weights": weights, "many": many, "by": {"pair": (1, 2), 3: None}})  # fmt: skip

    t = trainer(tmp_path)
    t.test(Described(), loader())
    values = one(read(t.run.dir), "log_hyperparameters")["hyperparameters"]
    assert values.pop("many").startswith("tensor([0., 0.,")
    assert values == {"lr": 0.1, "wait": 2.0, "data": "a/b", "size": 1, "weights": [0.5, 0.25], "by": {"pair": [1, 2], "3": None}}


class Square:
    """What a figure needs to be drawn; matplotlib itself may be missing."""

    def savefig(self, path, format):
        assert format == "png"
        Path(path).write_bytes(b"\x89PNG")


class Talker:
    """Does everything that a plugin can do between batches."""

    @hookimpl
    def on_train_epoch_end(self, run):
        path = run.dir / "one.safetensors"
        run.save_checkpoint(path, reason="best", metrics={"val_loss": 0.5})
        run.at_boundary(lambda: run.remove_checkpoint(path, reason="not the best any more"))
        run.log_text("note", "line\nand ünïcode")
        run.log_figure("curve", Square())
        run.log_artifact(run.dir / "config.yaml")
        run.request_stop("enough")


def test_checkpoints_texts_figures_artifacts_and_stops_are_recorded_with_their_arguments(tmp_path):
    t = trainer(tmp_path, Talker(), max_epochs=5)
    t.fit(Net(), loader())
    records = read(t.run.dir)
    path = str(t.run.dir / "one.safetensors")
    saved, removed = one(records, "on_checkpoint_saved"), one(records, "on_checkpoint_removed")
    assert (saved["path"], saved["reason"], saved["metrics"]) == (path, "best", {"val_loss": 0.5})
    assert (removed["path"], removed["reason"]) == (path, "not the best any more")
    text = one(records, "log_text")
    assert (text["name"], text["text"], text["step"]) == ("note", "line\nand ünïcode", BATCHES)
    figure = one(records, "log_figure")
    assert (figure["name"], figure["step"], figure["path"]) == ("curve", BATCHES, f"figures/{figure['n']}.png")
    assert (t.run.dir / figure["path"]).read_bytes().startswith(b"\x89PNG")
    assert (one(records, "log_artifact")["name"], one(records, "log_artifact")["path"]) == ("config.yaml", str(t.run.dir / "config.yaml"))
    assert (one(records, "on_stop_requested")["reason"], one(records, "on_stop_requested")["plugin"]) == ("enough", "talker")
    assert records[-1]["status"] == "stopped"


def test_an_event_stands_before_what_others_did_because_of_it(tmp_path):
    t = Trainer(max_epochs=1, root_dir=tmp_path, accelerator="cpu", plugins=[Talker(), "journal"])  # listed last
    t.fit(Net(), loader())
    events = [record["event"] for record in read(t.run.dir)]
    assert events.index("on_train_epoch_end") < events.index("on_checkpoint_saved")


def test_a_loaded_checkpoint_is_recorded(tmp_path):
    t = trainer(tmp_path)
    t.fit(Net(), loader())
    path = tmp_path / "some.safetensors"
    t.run.save_checkpoint(path)
    t.test(dataloaders=loader(), ckpt_path=path)
    assert one(read(t.run.dir), "on_checkpoint_loaded")["path"] == str(path)


def test_a_skipped_step_is_recorded(tmp_path):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx else None

    t = trainer(tmp_path)
    t.fit(Skips(), loader())
    assert one(read(t.run.dir), "on_step_skipped")["reason"] == "training_step returned None"


def test_numbers_that_are_not_finite_come_back_as_they_were(tmp_path):
    class Odd(Net):
        def training_step(self, batch, batch_idx):
            self.log_dict({"nan": math.nan, "up": math.inf, "down": -math.inf})
            return super().training_step(batch, batch_idx)

    t = trainer(tmp_path)
    t.fit(Odd(), loader())
    metrics = next(record["metrics"] for record in read(t.run.dir) if record["event"] == "log_metrics")
    assert math.isnan(metrics["nan"]) and metrics["up"] == math.inf and metrics["down"] == -math.inf


# ---------------------------------------------------------------------- runs that end badly


class Fails(Net):
    error: BaseException = ValueError("no luck\ntoday")

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise self.error
        return super().training_step(batch, batch_idx)


def test_an_error_is_recorded_with_its_traceback_and_the_run_ends_as_failed(tmp_path):
    t = trainer(tmp_path)
    with pytest.raises(ValueError, match="no luck"):
        t.fit(Fails(), loader())
    records = read(t.run.dir)
    assert [record["event"] for record in records[-3:]] == ["on_exception", "on_fit_end", "on_run_end"]
    assert records[-3]["exception"] == records[-2]["exception"] == "ValueError: no luck\ntoday"
    assert "in training_step" in records[-3]["traceback"]
    assert (records[-3]["stage"], records[-3]["batch"], records[-1]["status"]) == ("train", 1, "failed")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (MemoryError("too much"), "failed")])
def test_an_interruption_and_a_lack_of_memory_are_recorded(tmp_path, error, status):
    t, net = trainer(tmp_path), Fails()
    net.error = error
    with pytest.raises(type(error)):
        t.fit(net, loader())
    records = read(t.run.dir)
    assert records[-1]["status"] == status
    assert ("on_out_of_memory" in [record["event"] for record in records]) == isinstance(error, MemoryError)


def test_a_run_that_fails_before_it_starts_is_recorded_too(tmp_path):
    class Unready(Net):
        def setup(self, stage):
            raise OSError("no data")

    t = trainer(tmp_path)
    with pytest.raises(OSError, match="no data"):
        t.fit(Unready(), loader())
    assert [record["event"] for record in read(t.run.dir)] == ["on_exception", "on_fit_end", "on_run_end"]


def test_what_is_said_after_the_end_is_still_written(tmp_path):
    class Late(Net):
        def on_run_end(self):
            self.run.log_text("late", "words")

    t = trainer(tmp_path)
    t.fit(Late(), loader())
    records = read(t.run.dir)
    assert [record["event"] for record in records[-2:]] == ["on_run_end", "log_text"]
    assert t.enabled["journal"]._file is None  # and the file is closed


KILLED = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from torchplug import Module, Trainer

torch.set_num_threads(1)

class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        print(self.global_step, flush=True)  # so many records were written
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
Trainer(max_epochs=10**9, log_every_n_steps=1, root_dir=sys.argv[1], plugins=["journal"]).fit(Net(), data)
"""


def test_a_killed_process_loses_no_record(tmp_path, programs):
    child = programs.start(KILLED, tmp_path, stdout=subprocess.PIPE)
    for line in child.stdout:
        if int(line) >= 50:
            break
    child.kill()
    written = int((child.stdout.read().rpartition("\n")[0] or line).split()[-1])
    assert child.wait(60) == -signal.SIGKILL
    (folder,) = tmp_path.glob("*/version_0")
    records = read(folder)
    assert [record["n"] for record in records] == list(range(len(records)))
    steps = [record["step"] for record in records if record["event"] == "log_metrics"]
    assert written >= 50 and steps[:written] == list(range(1, written + 1))


# ---------------------------------------------------------------------- where it is written


def test_a_test_after_a_fit_goes_on_in_the_same_file(tmp_path):
    t = trainer(tmp_path)
    t.fit(Net(), loader())
    fitted = (t.run.dir / "journal.jsonl").read_bytes()
    t.test(dataloaders=loader())
    assert (t.run.dir / "journal.jsonl").read_bytes().startswith(fitted)
    records = read(t.run.dir)
    assert [record["n"] for record in records] == list(range(len(records)))
    starts = [record for record in records if record["event"] == "on_run_start"]
    assert [start["work"] for start in starts] == ["fit", "test"] and starts[0]["id"] == starts[1]["id"]


def test_a_new_fit_of_the_same_trainer_has_a_journal_of_its_own(tmp_path):
    t = trainer(tmp_path)
    for version in (0, 1):
        t.fit(Net(), loader())
        assert t.run.dir.name == f"version_{version}"
        assert [record["event"] for record in read(t.run.dir)].count("on_run_start") == 1


def test_dir_chooses_the_folder_and_a_second_run_goes_on_there(tmp_path):
    for _ in range(2):
        t = trainer(tmp_path, journal={"dir": tmp_path / "deep" / "folder"})
        t.fit(Net(), loader())
        assert not (t.run.dir / "journal.jsonl").exists()
    records = read(tmp_path / "deep" / "folder")
    assert [record["n"] for record in records] == list(range(len(records)))
    assert len({record["id"] for record in records if record["event"] == "on_run_start"}) == 2


def test_the_rest_of_a_line_that_a_killed_process_left_is_cut_off(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"n": 0, "event": "on_run_start"}\n{"n": 1, "event": "log_met')
    trainer(tmp_path, journal={"dir": tmp_path}).fit(Net(), loader())
    records = read(tmp_path)
    assert records[0] == {"n": 0, "event": "on_run_start"}
    assert [record["n"] for record in records] == list(range(len(records)))


def test_a_trial_run_leaves_nothing_behind(tmp_path):
    trainer(tmp_path, journal={"dir": tmp_path / "logs"}, fast_dev_run=True).fit(Net(), loader())
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_writes(tmp_path):
    class Second(Net):
        def setup(self, stage):
            self.run.rank = 1

    t = trainer(tmp_path)
    t.fit(Second(), loader())
    assert not (t.run.dir / "journal.jsonl").exists()


@pytest.mark.slow
def test_a_journal_that_cannot_be_written_is_switched_off_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "taken").write_text("a file")
    t = trainer(tmp_path, journal={"dir": tmp_path / "taken"})
    t.fit(Net(), loader())
    assert t.run.position.step == BATCHES
    assert "plugin 'journal' (torchplug-journal 0.1.0) failed in on_run_start and is switched off" in caplog.text


def test_a_folder_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="dir must be a folder or None, got 5"):
        Journal(dir=5)


def test_an_instance_can_be_given_and_used_again(tmp_path):
    journal = Journal()
    for _ in range(2):
        t = Trainer(max_epochs=1, root_dir=tmp_path, plugins=[journal], accelerator="cpu")
        t.fit(Net(), loader())
        assert isinstance(t.run, Run) and read(t.run.dir)[-1]["status"] == "finished"


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
            shutil.copytree(run.dir, Path(self.into) / run.dir.parent.name / run.dir.name)


START = ["on_run_start", "on_checkpoint_loaded", "on_fit_start", "on_train_start"]
FIT = {"name": "net", "max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": 0, "seed": 1}


def fit(root, *plugins, path=None, journal=None, **options):
    t = trainer(root, *plugins, journal=journal, **{**FIT, **options})
    t.fit(made(), loader(), loader(), ckpt_path=path)
    return t.run


def made(kind=Net):
    torch.manual_seed(1)
    return kind()


def happened(records):
    """What is the same in every run, without the checkpoints that are saved on the way."""
    changes = ("n", "time", "seconds", "path", "dir", "id", "versions", "options", "plugins")
    kept = [{key: value for key, value in record.items() if key not in changes} for record in records]
    return [record for record in kept if record["event"] != "on_checkpoint_saved"]


def numbered(records):
    return [record["n"] for record in records] == list(range(len(records)))


@pytest.mark.parametrize(("saved", "killed"), [(1, 2), (2, 3), (2, 5), (3, 4), (4, 5), (5, 6)])
def test_a_run_that_was_killed_and_goes_on_has_the_records_of_one_that_was_not_and_those_of_its_start(tmp_path, saved, killed):
    whole = read(fit(tmp_path / "a", Killed(saved, killed, tmp_path / "b")).dir)
    (folder,) = tmp_path.glob("b/*/*")
    left = read(folder)
    run = fit(tmp_path / "b", path=folder / f"{saved}.safetensors")
    records, abandoned = read(run.dir), read_abandoned(run.dir)
    assert run.dir == folder and numbered(records)
    kept = len(left) - len(abandoned)
    assert records[:kept] == left[:kept] and abandoned == left[kept:]
    assert [record["event"] for record in records[kept : kept + len(START)]] == START
    assert happened(records[:kept] + records[kept + len(START) :]) == happened(whole)
    assert abandoned[0]["event"] == "on_checkpoint_saved"  # of the checkpoint itself, whose state was taken before


def read_abandoned(folder):
    return [json.loads(line) for line in (Path(folder) / "journal.abandoned.jsonl").read_text().splitlines()]


def test_a_run_that_is_killed_again_and_again_has_one_timeline_and_loses_nothing(tmp_path):
    whole = read(fit(tmp_path / "0", Killed(1, 2, tmp_path / "1")).dir)
    seen = []
    # goes on from, saves, is killed: the third time before it saved anything
    for number, (start, saved, killed) in enumerate([(1, 2, 3), (2, None, 5), (2, 4, 5), (4, None, None)], start=1):
        (folder,) = (tmp_path / str(number)).glob("*/*")
        seen += read(folder)
        with open(folder / "journal.jsonl", "a") as file:
            file.write('{"n": 7, "event": "log_')  # a line that could not be finished
        fit(tmp_path / str(number), Killed(saved, killed, tmp_path / str(number + 1)), path=folder / f"{start}.safetensors")
    records, abandoned = read(folder), read_abandoned(folder)
    assert numbered(records)
    starts = [i for i, record in enumerate(records) if record["event"] == "on_run_start"][1:]
    assert len(starts) == 3  # from 1, from 2 and from 4: the first attempt from 2 was abandoned
    own = [record for i, record in enumerate(records) if not any(start <= i < start + len(START) for start in starts)]
    assert happened(own) == happened(whole)
    told = [{**record, "n": 0} for record in (*records, *abandoned)]
    assert all({**record, "n": 0} in told for record in seen)


def test_where_nothing_was_recorded_after_the_checkpoint_nothing_is_abandoned(tmp_path):
    class Prompt(Killed):
        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.step == self.saved:
                run.at_boundary(lambda: self.save(run))

        def save(self, run):
            run.hooks.save_checkpoint(run, run.dir / "2.safetensors", run.state())
            shutil.copytree(run.dir, self.into / "net" / "version_0")

    whole = read(fit(tmp_path / "a", Prompt(2, None, tmp_path / "b")).dir)
    folder = tmp_path / "b" / "net" / "version_0"
    left = read(folder)
    fit(tmp_path / "b", path=folder / "2.safetensors")
    records = read(folder)
    assert happened(left + records[len(left) + len(START) :]) == happened(whole) and records[: len(left)] == left
    assert not (folder / "journal.abandoned.jsonl").exists()


def test_a_fit_that_goes_on_with_more_epochs_takes_nothing_out(tmp_path):
    t, net = trainer(tmp_path, **FIT), Net()
    t.fit(net, loader(), loader())
    t.test(dataloaders=loader())
    before = read(t.run.dir)
    t.max_epochs = 3
    t.fit(net, loader(), loader())
    records = read(t.run.dir)
    assert records[: len(before)] == before and len(records) > len(before) and numbered(records)
    assert not (t.run.dir / "journal.abandoned.jsonl").exists()


def test_a_run_that_goes_on_elsewhere_begins_a_journal_there(tmp_path):
    run = fit(tmp_path / "a", Killed(2))
    moved = tmp_path / "2.safetensors"
    moved.write_bytes((run.dir / "2.safetensors").read_bytes())
    shutil.rmtree(tmp_path / "a")
    again = fit(tmp_path / "b", path=moved)
    assert [record["event"] for record in read(again.dir)][: len(START)] == START
    assert not (again.dir / "journal.abandoned.jsonl").exists()


@pytest.mark.parametrize("other", ["journal of another run", "fewer records"])
def test_a_journal_that_is_not_the_one_of_the_checkpoint_is_left_as_it_is(tmp_path, other):
    run = fit(tmp_path, Killed(2))
    folder = tmp_path / "logs"
    if other == "fewer records":
        folder.mkdir()
        (folder / "journal.jsonl").write_text('{"n": 0, "event": "on_run_start"}\n')
    else:
        fit(tmp_path, journal={"dir": folder})
    before = read(folder)
    fit(tmp_path, path=run.dir / "2.safetensors", journal={"dir": folder})
    assert read(folder)[: len(before)] == before and numbered(read(folder))
    assert not (folder / "journal.abandoned.jsonl").exists()


def test_a_new_run_with_the_weights_of_another_takes_nothing_out_of_its_journal(tmp_path):
    folder = tmp_path / "logs"
    run = fit(tmp_path, Killed(2), journal={"dir": folder})
    before = read(folder)
    t = trainer(tmp_path, journal={"dir": folder}, **FIT)
    t.fit(Net(), loader(), loader(), ckpt_path=run.dir / "2.safetensors", resume={"exclude": ["position"]})
    assert read(folder)[: len(before)] == before and not (folder / "journal.abandoned.jsonl").exists()


def test_a_validation_that_a_signal_breaks_off_is_in_the_journal_once(tmp_path):
    class Signalled(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if self.global_step == 5 and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    class Saves:
        @hookimpl
        def on_stop_requested(self, run):
            run.save_checkpoint(run.dir / "last.safetensors")

    whole = read(fit(tmp_path / "a").dir)
    t = trainer(tmp_path / "b", Saves(), **FIT)
    with pytest.raises(SystemExit):
        t.fit(made(Signalled), loader(), loader())
    left = [record["event"] for record in read(t.run.dir)]
    assert left[-5:] == ["on_validation_start", "on_stop_requested", "on_checkpoint_saved", "on_fit_end", "on_run_end"]
    records = read(fit(tmp_path / "b", path=t.run.dir / "last.safetensors").dir)
    assert [record["event"] for record in read_abandoned(t.run.dir)] == left[-5:]
    module = [{**record, "module": "Net"} if "module" in record else record for record in records]
    kept = len(left) - 5
    assert happened(module[:kept] + module[kept + len(START) :]) == happened(whole)


def test_a_journal_that_cannot_be_cut_is_switched_off_and_training_goes_on(tmp_path, caplog):
    run = fit(tmp_path, Killed(2))
    (run.dir / "journal.abandoned.jsonl").mkdir()
    before = (run.dir / "journal.jsonl").read_bytes()
    again = fit(tmp_path, path=run.dir / "2.safetensors")
    assert again.position.step == 2 * BATCHES and (run.dir / "journal.jsonl").read_bytes().startswith(before)
    assert "plugin 'journal' (torchplug-journal 0.1.0) failed in on_checkpoint_loaded and is switched off" in caplog.text


def test_an_instance_that_was_switched_off_begins_anew_in_the_next_run(tmp_path, monkeypatch):
    journal = Journal()

    def full(*_):
        raise OSError(28, "No space left on device")

    t = Trainer(max_epochs=1, root_dir=tmp_path, plugins=[journal], accelerator="cpu")
    with monkeypatch.context() as patch:
        patch.setattr("torchplug_journal._plain", full)
        t.fit(Net(), loader())
    assert not (t.run.dir / "journal.jsonl").exists()
    t.fit(Net(), loader())
    assert t.run.dir.name == "version_1" and read(t.run.dir)[-1]["status"] == "finished"


def test_an_instance_in_two_fits_writes_the_same_twice_and_its_state_is_plain(tmp_path):
    journal, traces = Journal(), []
    for _ in range(2):
        t = Trainer(root_dir=tmp_path, plugins=[journal], accelerator="cpu", log_every_n_steps=1, **FIT)
        t.fit(made(), loader(), loader())
        traces.append(happened(read(t.run.dir)))
        assert {name: type(value) for name, value in journal.state_dict().items()} == {"n": int, "time": float}
    assert traces[0] == traces[1]
