"""What the table promises: a row for each record, exact numbers, and a file that is whole at any time."""

import csv
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Trainer, hookimpl
from torchplug.testing import check_logger, check_plugin
from torchplug_csv import FIXED, Csv

BATCHES = 3


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watcher:
    """What another logger was given, and what lay on disk at that moment."""

    def __init__(self):
        self.records, self.on_disk, self.files = [], [], []

    @hookimpl
    def log_metrics(self, run, metrics, stage, step, epoch, samples, seconds):
        self.records.append({"step": step, "epoch": epoch, "samples": samples, "seconds": seconds, "stage": stage, **metrics})
        path = run.dir / "metrics.csv"
        self.on_disk.append(len(read(path)))
        self.files.append(path.stat().st_ino)


def loader():
    return DataLoader(TensorDataset(torch.arange(2.0 * 2 * BATCHES).reshape(-1, 2)), batch_size=2)


def trainer(tmp_path, *plugins, table=None, **options):
    options = {"max_epochs": 1, "log_every_n_steps": 1, "root_dir": tmp_path, "accelerator": "cpu", **options}
    return Trainer(plugins=[*plugins, {"csv": table or {}}], **options)


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def call(table, metrics, step=1):
    """One record, without a run around it."""
    run = SimpleNamespace(rank=0, options=SimpleNamespace(fast_dev_run=False), report={}, name_of=lambda plugin: "csv")
    table.log_metrics(run, metrics, "train", step, 0, 8 * step, 0.5 * step)
    return run


@pytest.mark.slow
def test_it_passes_the_conformance_checks():
    check_plugin("csv")


def test_there_is_a_row_for_each_record_with_exactly_its_values(tmp_path):
    watcher = Watcher()
    t = trainer(tmp_path, watcher, max_epochs=2)
    t.fit(Net(), loader(), loader())
    rows = read(t.run.dir / "metrics.csv")
    assert list(rows[0]) == [*FIXED, "loss_step", "val_loss", "loss_epoch"]
    assert len(rows) == len(watcher.records) == 2 * (BATCHES + 2)
    for row, record in zip(rows, watcher.records, strict=True):
        filled = {name: value for name, value in row.items() if value}
        assert filled.pop("stage") == record.pop("stage")
        assert {name: float(value) for name, value in filled.items()} == record


@pytest.mark.slow
def test_it_keeps_every_promise_of_a_logger():
    def stored(run_dir):
        rows = [({name: row.pop(name) for name in FIXED}, row) for row in read(run_dir / "metrics.csv")]
        return [(name.removeprefix("metric:"), place["step"], value) for place, row in rows for name, value in row.items() if value]

    check_logger("csv", read=stored)


def test_every_record_is_on_disk_before_the_next_plugin_sees_it(tmp_path):
    watcher = Watcher()
    trainer(tmp_path, watcher).fit(Net(), loader(), loader())
    assert watcher.on_disk == list(range(1, len(watcher.records) + 1))


def test_the_file_is_written_anew_only_when_a_column_is_added(tmp_path):
    watcher = Watcher()
    trainer(tmp_path, watcher, max_epochs=3).fit(Net(), loader(), loader())
    changes = [new != old for old, new in zip(watcher.files, watcher.files[1:], strict=False)]
    assert changes == [False] * (BATCHES - 1) + [True, True] + [False] * 2 * (BATCHES + 2)  # val_loss, then loss_epoch


def test_a_metric_that_appears_later_has_a_column_that_is_empty_before(tmp_path):
    table = Csv(dir=tmp_path)
    call(table, {"a": 0.1})
    call(table, {"b": 0.2, "a": 0.3}, step=2)
    table.on_run_end(call(table, {"b": 0.4}, step=3))
    assert (tmp_path / "metrics.csv").read_bytes() == (
        b"step,epoch,samples,seconds,stage,a,b\r\n1,0,8,0.5,train,0.1,\r\n2,0,16,1.0,train,0.3,0.2\r\n3,0,24,1.5,train,,0.4\r\n"
    )


characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
names = st.text(characters, min_size=1) | st.sampled_from(['a"b', "a,b", "a\r\nb", *FIXED])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(names, st.floats(), max_size=4), min_size=1, max_size=5))
def test_names_and_numbers_of_any_kind_come_back_as_they_were(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("table")
    table = Csv(dir=folder)
    for record in records:
        run = call(table, record)
    table.on_run_end(run)
    for row, record in zip(read(folder / "metrics.csv"), records, strict=True):
        assert [row[name] for name in FIXED] == ["1", "0", "8", "0.5", "train"]
        there = {name: float(row[f"metric:{name}" if name in FIXED else name]) for name in record}
        assert all(there[name] == value or (math.isnan(there[name]) and math.isnan(value)) for name, value in record.items())
        assert sum(value != "" for value in row.values()) == len(FIXED) + len(record)


def test_a_test_after_a_fit_goes_on_in_the_same_file(tmp_path):
    t = trainer(tmp_path)
    t.fit(Net(), loader(), loader())
    fitted = read(t.run.dir / "metrics.csv")
    (result,) = t.test(dataloaders=loader())
    rows = read(t.run.dir / "metrics.csv")
    assert [{name: row[name] for name in fitted[0]} for row in rows[:-1]] == fitted
    assert rows[-1]["stage"] == "test" and float(rows[-1]["test_loss"]) == result["test_loss"]


def test_a_new_fit_of_the_same_trainer_has_a_table_of_its_own(tmp_path):
    t = trainer(tmp_path)
    for version in (0, 1):
        t.fit(Net(), loader())
        assert t.run.dir.name == f"version_{version}"
        assert len(read(t.run.dir / "metrics.csv")) == BATCHES + 1


def test_the_rest_of_a_row_that_a_killed_process_left_is_cut_off(tmp_path):
    table = Csv(dir=tmp_path)
    table.on_run_end(call(table, {"a": 0.1}))
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("2,0,16,1.0,tra")
    table = Csv(dir=tmp_path)
    table.on_run_end(call(table, {"a": 0.3}, step=3))
    assert [(row["step"], row["a"]) for row in read(tmp_path / "metrics.csv")] == [("1", "0.1"), ("3", "0.3")]


def test_a_failure_while_a_column_is_added_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    table = Csv(dir=tmp_path)
    call(table, {"a": 0.1})
    before = (tmp_path / "metrics.csv").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("os.fsync", full)
        call(table, {"b": 0.2})
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_file_of_another_kind_is_not_touched_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "metrics.csv").write_text("my,own\n1,2")
    t = trainer(tmp_path, table={"dir": tmp_path})
    t.fit(Net(), loader())
    assert (tmp_path / "metrics.csv").read_text() == "my,own\n1,2"
    assert t.run.position.step == BATCHES
    assert "it begins with ['my', 'own']; move it away or choose another dir" in caplog.text
    assert "plugin 'csv' (torchplug-csv 0.1.0) failed in on_run_start and is switched off" in caplog.text


def test_an_empty_file_is_taken_for_a_new_one(tmp_path):
    (tmp_path / "metrics.csv").touch()
    trainer(tmp_path, table={"dir": tmp_path}).fit(Net(), loader())
    assert len(read(tmp_path / "metrics.csv")) == BATCHES + 1


def test_a_run_without_metrics_makes_no_file(tmp_path):
    t = trainer(tmp_path)
    t.predict(Net(), loader())
    assert not (t.run.dir / "metrics.csv").exists() and "csv" not in t.run.report


def test_a_trial_run_leaves_nothing_behind(tmp_path):
    trainer(tmp_path, table={"dir": tmp_path / "logs"}, fast_dev_run=True).fit(Net(), loader())
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_writes(tmp_path):
    class Second(Net):
        def setup(self, stage):
            self.run.rank = 1

    t = trainer(tmp_path)
    t.fit(Second(), loader())
    assert not (t.run.dir / "metrics.csv").exists()


def test_the_end_of_the_run_says_where_it_is(tmp_path):
    t = trainer(tmp_path, table={"dir": tmp_path / "here"})
    t.fit(Net(), loader())
    assert t.run.report["csv"] == str(tmp_path / "here" / "metrics.csv") and Path(t.run.report["csv"]).exists()


def test_of_two_tables_each_says_where_it_is(tmp_path):
    tables = [{f"csv:{name}": {"dir": tmp_path / name}} for name in ("one", "two")]
    t = Trainer(max_epochs=1, root_dir=tmp_path / "runs", accelerator="cpu", plugins=tables)
    t.fit(Net(), loader())
    assert t.run.report == {f"csv:{name}": str(tmp_path / name / "metrics.csv") for name in ("one", "two")}


def test_a_folder_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="dir must be a folder or None, got 5"):
        Csv(dir=5)


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


class Odd(Net):
    """A metric that is logged in one step alone, and only in a process that is killed."""

    def on_train_batch_end(self):
        if self.global_step == 5 and self.extra:
            self.log("extra\nmetric", 1.0)

    extra = False


FIT = {"name": "net", "max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": 0, "seed": 1}


def fit(root, *plugins, path=None, table=None, net=Net, extra=False, **options):
    t = trainer(root, *plugins, table=table, **{**FIT, **options})
    torch.manual_seed(1)
    module = net()
    module.extra = extra
    t.fit(module, loader(), loader(), ckpt_path=path)
    return t.run


def rows(folder, name="metrics.csv"):
    """What stands in a table; the time since the start differs from run to run."""
    return [{name: value for name, value in row.items() if name != "seconds" and value} for row in read(Path(folder) / name)]


@pytest.mark.parametrize(("saved", "killed"), [(1, 3), (2, 4), (2, 5), (3, 5), (4, 6), (5, 6)])
def test_a_run_that_was_killed_and_goes_on_has_the_rows_of_one_that_was_not_and_loses_none(tmp_path, saved, killed):
    whole = fit(tmp_path / "a", Killed(saved, killed, tmp_path / "b")).dir
    folder = tmp_path / "b" / "net" / "version_0"
    left = read(folder / "metrics.csv")
    assert fit(tmp_path / "b", path=folder / f"{saved}.safetensors").dir == folder
    assert rows(folder) == rows(whole)
    assert list(read(folder / "metrics.csv")[0]) == list(read(whole / "metrics.csv")[0])
    moved = rows(folder, "metrics.abandoned.csv")
    kept = len(left) - len(moved)
    assert moved and rows(whole)[kept : kept + len(moved)] == moved


@pytest.mark.slow
def test_rows_of_several_kills_are_kept_together_with_the_columns_that_they_need(tmp_path):
    whole = fit(tmp_path / "0").dir
    fit(tmp_path / "0", Killed(1, 2, tmp_path / "1"))
    expected = []
    # goes on from, saves, is killed: the third time before it saved anything
    steps = [(1, 2, 3), (2, None, 6), (2, 4, 6), (4, None, None)]
    for number, (start, saved, killed) in enumerate(steps, start=1):
        folder = next((tmp_path / str(number)).glob("*/*"))
        left = rows(folder)
        with open(folder / "metrics.csv", "a") as file:
            file.write("5,0,16,1.0,tra")  # a row that could not be finished
        killer = Killed(saved, killed, tmp_path / str(number + 1))
        fit(tmp_path / str(number), killer, path=folder / f"{start}.safetensors", net=Odd, extra=killed == 6)
        before = sum(int(row["step"]) < start or (int(row["step"]) == start and row["stage"] == "train") for row in left)
        expected += left[before:]
    assert rows(folder) == rows(whole)
    assert rows(folder, "metrics.abandoned.csv") == expected
    assert any("extra\nmetric" in row for row in expected)


def test_a_checkpoint_before_the_first_row_brings_back_an_empty_table(tmp_path):
    whole = fit(tmp_path / "a", Killed(1, 5, tmp_path / "b"), log_every_n_steps=2, val_check_interval=1.0).dir
    folder = tmp_path / "b" / "net" / "version_0"
    assert len(rows(folder)) > 1
    fit(tmp_path / "b", path=folder / "1.safetensors", log_every_n_steps=2, val_check_interval=1.0)
    assert rows(folder) == rows(whole)


def test_a_fit_that_goes_on_with_more_epochs_takes_nothing_out(tmp_path):
    t, net = trainer(tmp_path, **FIT), Net()
    t.fit(net, loader(), loader())
    t.test(dataloaders=loader())
    before = rows(t.run.dir)
    t.max_epochs = 3
    t.fit(net, loader(), loader())
    assert rows(t.run.dir)[: len(before)] == before and len(rows(t.run.dir)) > len(before)
    assert [path.name for path in t.run.dir.glob("*.csv")] == ["metrics.csv"]


def test_a_table_that_is_not_the_one_of_the_checkpoint_is_left_as_it_is(tmp_path):
    run = fit(tmp_path, Killed(2))
    fit(tmp_path, table={"dir": tmp_path / "logs"})
    before = rows(tmp_path / "logs")
    fit(tmp_path, path=run.dir / "2.safetensors", table={"dir": tmp_path / "logs"})
    assert rows(tmp_path / "logs")[: len(before)] == before and not (tmp_path / "logs" / "metrics.abandoned.csv").exists()


def test_a_run_that_could_not_write_says_nothing_of_rows(tmp_path, caplog):
    fit(tmp_path / "a", Killed(3, 5, tmp_path / "b"))
    folder = tmp_path / "b" / "net" / "version_0"
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text("something else\n")
    fit(tmp_path / "b", Killed(4, 5, tmp_path / "c"), path=folder / "3.safetensors")  # the table is switched off
    folder = tmp_path / "c" / "net" / "version_0"
    (folder / "metrics.csv").write_text(text)
    before = rows(folder)
    fit(tmp_path / "c", path=folder / "4.safetensors")
    assert rows(folder)[: len(before)] == before and rows(folder)[-1]["step"] == "6" and not (folder / "metrics.abandoned.csv").exists()


def test_rows_of_a_validation_that_a_signal_breaks_off_stand_once(tmp_path):
    class Steps(Net):
        signalled = False

        def validation_step(self, batch, batch_idx):
            self.log("val_step", 1.0 * batch_idx, on_step=True)
            if self.signalled and self.global_step == 5 and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    class Signalled(Steps):
        signalled = True

    class Saves:
        @hookimpl
        def on_stop_requested(self, run):
            run.save_checkpoint(run.dir / "last.safetensors")

    whole = fit(tmp_path / "a", net=Steps).dir
    with pytest.raises(SystemExit):
        fit(tmp_path / "b", Saves(), net=Signalled)
    folder = tmp_path / "b" / "net" / "version_0"
    assert "val_step_step" in rows(folder)[-1]
    fit(tmp_path / "b", path=folder / "last.safetensors", net=Steps)
    assert rows(folder) == rows(whole)


def test_a_killed_widening_leaves_at_most_one_file_that_the_next_one_takes_away(tmp_path):
    (tmp_path / ".metrics.csv.tmp").write_text("half of a table")
    trainer(tmp_path, table={"dir": tmp_path}).fit(Net(), loader())
    assert not list(tmp_path.glob(".*")) and len(read(tmp_path / "metrics.csv")) == BATCHES + 1


def test_an_instance_in_two_fits_writes_the_same_twice_and_its_state_is_plain(tmp_path):
    table, traces = Csv(), []
    for _ in range(2):
        t = Trainer(root_dir=tmp_path, plugins=[table], accelerator="cpu", log_every_n_steps=1, **FIT)
        torch.manual_seed(1)
        t.fit(Net(), loader(), loader())
        traces.append(rows(t.run.dir))
        assert {name: type(value) for name, value in table.state_dict().items()} == {"rows": int, "seconds": str}
    assert traces[0] == traces[1]
