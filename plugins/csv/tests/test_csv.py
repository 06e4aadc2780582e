"""What the table promises: a row for each record, exact numbers, and a file that is whole at any time."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Trainer, hookimpl
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
    run = SimpleNamespace(rank=0, options=SimpleNamespace(fast_dev_run=False), report={})
    table.log_metrics(run, metrics, "train", step, 0, 8 * step, 0.5 * step)
    return run


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
    assert "plugin 'csv' (torchplug-csv 0.1.0) failed in log_metrics and is switched off" in caplog.text


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


def test_a_folder_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="dir must be a folder or None, got 5"):
        Csv(dir=5)
