"""Loggers that follow the journal: nothing is lost, nothing is sent in the wrong order, and training waits for nobody."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.tracking import Delivery, Mark, Place, Reader, Record, Refused, Tracker, deliver, first

Script = Callable[[str, Sequence[Record]], None]


class Net(Module):
    """Brings its own batches."""

    def __init__(self, train: int = 4) -> None:
        super().__init__()
        self.train_batches = train
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).square().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return [torch.ones(2, 4)] * self.train_batches

    def val_dataloader(self) -> Any:
        return [torch.ones(2, 4)] * 2

    test_dataloader = val_dataloader


class Memory:
    """A backend that keeps everything, also when it is made anew; ``script`` is called first by every method."""

    where = "in memory"

    def __init__(self, owner: Kept) -> None:
        self.owner = owner

    def connect(self, place: Place) -> list[Mark]:
        self.owner.note("connect")
        self.owner.place = place
        return list(self.owner.marks)

    def go_back(self, mark: Mark) -> None:
        self.owner.note("go_back")
        self.owner.marks = [each for each in self.owner.marks if each.n <= mark.n]
        del self.owner.got[mark.n :]

    def send(self, records: Sequence[Record], mark: Mark) -> None:
        self.owner.note("send", records)
        self.owner.got += records
        self.owner.marks.append(mark)

    def finish(self, status: str) -> None:
        self.owner.note(f"finish {status}")

    def close(self) -> None:
        self.owner.note("close")


@dataclass(kw_only=True, eq=False)
class Kept(Tracker):
    """What the backend of several runs was given.

    Args:
        dir: Not used.
        close_timeout: Seconds.
    """

    interval = 0.02
    _script: Any = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.calls: list[str] = []
        self.got: list[Record] = []
        self.marks: list[Mark] = []
        self.place: Place | None = None

    def backend(self) -> Memory:
        return Memory(self)

    def note(self, call: str, records: Sequence[Record] = ()) -> None:
        self.calls.append(call)
        if self._script is not None:
            self._script(call, records)


def journal(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def fit(root: Path, *plugins: Any, net: Any = None, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 1, "accelerator": "cpu", "seed": 1}
    trainer = Trainer(root_dir=root, plugins=list(plugins), **{**defaults, **options})
    torch.manual_seed(0)
    trainer.fit(net or Net())
    return trainer


def dir_of(trainer: Trainer) -> Path:
    assert trainer.run is not None
    return trainer.run.dir


# ---------------------------------------------------------------------- what arrives


def test_everything_in_the_journal_arrives_once_and_in_order(tmp_path: Path) -> None:
    kept = Kept()
    trainer = fit(tmp_path, kept)
    assert kept.got == journal(dir_of(trainer))[:-1]  # the last line is written when everybody has finished
    assert journal(dir_of(trainer))[-1]["event"] == "on_run_end"
    assert (kept.calls[0], kept.calls[-2:]) == ("connect", ["finish finished", "close"])
    assert kept.place == Place(dir_of(trainer) / "journal.jsonl", kept.got[0], dir_of(trainer), dir_of(trainer) / "kept")
    assert trainer.run is not None and trainer.run.report["kept"] == "in memory"


def test_records_come_while_the_run_goes_on_and_several_at_a_time(tmp_path: Path) -> None:
    class Waits(Net):
        def on_train_epoch_end(self) -> None:
            begin = time.monotonic()
            while not any(record["event"] == "log_metrics" and record["step"] >= self.global_step - 1 for record in kept.got):
                assert time.monotonic() < begin + 5, "nothing arrived"
                time.sleep(0.01)

    kept = Kept()
    fit(tmp_path, kept, net=Waits(train=50))
    assert kept.calls.count("send") < len(kept.got) / 2


def test_a_test_after_a_fit_goes_on_where_it_stood(tmp_path: Path) -> None:
    kept = Kept()
    trainer = fit(tmp_path, kept)
    trainer.test()
    trainer.validate()
    assert kept.got == journal(dir_of(trainer))[:-1]
    assert [call for call in kept.calls if call.startswith("finish")] == ["finish finished"] * 3


def test_the_status_is_that_of_the_run(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("no")

    class Interrupted(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyboardInterrupt

    class Stops(Net):
        def on_train_batch_end(self) -> None:
            self.run.request_stop("enough")

    for net, error, status in ((Fails, ValueError, "failed"), (Interrupted, KeyboardInterrupt, "interrupted"), (Stops, None, "stopped")):
        kept = Kept()
        if error is None:
            fit(tmp_path, kept, net=net())
        else:
            with pytest.raises(error):
                fit(tmp_path, kept, net=net())
        assert kept.calls[-2:] == [f"finish {status}", "close"]
        assert kept.got[-1]["event"] in ("on_exception", "on_fit_end")


def test_the_sanity_check_sends_nothing_but_that_it_was(tmp_path: Path) -> None:
    kept = Kept()
    fit(tmp_path, kept, num_sanity_val_steps=1)
    events = [record["event"] for record in kept.got]
    assert events.index("on_sanity_end") == events.index("on_sanity_start") + 1
    assert all(record["stage"] != "sanity" for record in kept.got if record["event"] == "log_metrics")


def test_only_the_first_process_sends(tmp_path: Path) -> None:
    class Second(Net):
        def setup(self, stage: str) -> None:
            self.run.rank = 1

    kept = Kept()
    fit(tmp_path, kept, net=Second())
    assert kept.calls == []
    with pytest.raises(RuntimeError, match="Kept is connected from on_run_start to on_run_end, and in the process of rank 0 only"):
        kept.connected  # noqa: B018


def test_a_run_that_goes_on_from_a_checkpoint_takes_back_what_came_after_it(tmp_path: Path) -> None:
    class Saves:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            if run.position.step == 3:
                run.save_checkpoint(tmp_path / "3.safetensors")

    kept = Kept()
    first_run = fit(tmp_path, kept, Saves())
    kept.calls.clear()
    trainer = Trainer(root_dir=tmp_path, plugins=[kept], max_epochs=2, log_every_n_steps=1, accelerator="cpu")
    trainer.fit(Net(), ckpt_path=tmp_path / "3.safetensors", resume={"strict": False})
    assert dir_of(trainer) == dir_of(first_run)
    assert kept.calls[:3] == ["connect", "go_back", "send"]
    assert kept.got == journal(dir_of(trainer))[:-1]
    steps = [record["step"] for record in kept.got if record["event"] == "log_metrics" and "train_loss" in record["metrics"]]
    assert steps == sorted(set(steps))


# ---------------------------------------------------------------------- a backend that fails


class Down:
    """Fails for a while, or hangs."""

    def __init__(self, calls: Sequence[str], times: int, hang: float = 0.0) -> None:
        self.calls, self.left, self.hang = calls, times, hang

    def __call__(self, call: str, records: Sequence[Record]) -> None:
        if call.split()[0] in self.calls and self.left:
            self.left -= 1
            time.sleep(self.hang)
            raise ConnectionError("nobody there")


@pytest.fixture
def quick(monkeypatch: Any) -> None:
    monkeypatch.setattr("torchplug.tracking.PAUSES", (0.02, 0.05))


@pytest.mark.parametrize("calls", [["connect"], ["send"], ["finish"], ["connect", "send"]])
def test_what_was_missed_is_sent_when_it_answers(calls: list[str], tmp_path: Path, quick: None, caplog: Any) -> None:
    kept = Kept()
    kept._script = Down(calls, 2)
    trainer = fit(tmp_path, kept)
    assert kept.got == journal(dir_of(trainer))[:-1]
    assert kept.calls[-2:] == ["finish finished", "close"]
    assert caplog.text.count("kept takes nothing at present, training goes on and the journal keeps everything: ConnectionError") == 1
    assert "not everything was delivered" not in caplog.text


def test_one_that_never_answers_costs_a_few_attempts_and_a_line_that_says_what_to_do(tmp_path: Path, quick: None, caplog: Any) -> None:
    alone = fit(tmp_path / "alone", "journal")
    kept = Kept()
    kept._script = Down(["connect"], 10**9)
    begin = time.monotonic()
    trainer = fit(tmp_path, kept)
    assert time.monotonic() - begin < 5
    assert f"not everything was delivered (ConnectionError: nobody there); torchplug replay {dir_of(trainer)} --to kept" in caplog.text
    for mine, theirs in zip(trainer.run.module.parameters(), alone.run.module.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(mine, theirs)
    kept._script = None
    delivery = deliver(kept.backend(), Place(dir_of(trainer) / "journal.jsonl", {}, dir_of(trainer), tmp_path), 7)
    assert kept.got == journal(dir_of(trainer)) and delivery.sent == len(kept.got)


@pytest.mark.alone
@pytest.mark.parametrize("call", ["connect", "send", "finish"])
def test_one_that_hangs_holds_the_run_up_for_no_longer_than_close_timeout(call: str, tmp_path: Path, caplog: Any) -> None:
    hangs = threading.Event()
    times = []

    class Clock:
        @hookimpl
        def on_train_batch_start(self) -> None:
            times.append(time.monotonic())

    def script(name: str, records: Sequence[Record]) -> None:
        if name.split()[0] == call:
            hangs.wait(20)

    kept = Kept(close_timeout=0.5)
    kept._script = script
    begin = time.monotonic()
    trainer = fit(tmp_path, kept, Clock())
    took = time.monotonic() - begin
    hangs.set()
    assert took < 0.5 + 1.0
    assert max(later - earlier for earlier, later in pairwise(times[:5])) < 0.05
    assert "not everything was delivered (no answer within 0.5 s)" in caplog.text
    assert journal(dir_of(trainer))[-1]["status"] == "finished"


def test_a_backend_that_hangs_holds_no_records_in_memory(tmp_path: Path) -> None:
    hangs = threading.Event()

    def script(name: str, records: Sequence[Record]) -> None:
        hangs.wait(60)

    def resident() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) // 1024

    sizes = []

    class Floods:
        @hookimpl
        def on_train_start(self, run: Any) -> None:
            metrics = {f"metric_{number}": 0.1 * number for number in range(10)}
            for count in (1_000, 60_000):  # 20 MB of journal
                for step in range(count):
                    run.hooks.log_metrics(run, metrics, "train", step, 0, step, 0.5)
                sizes.append(resident())

    kept = Kept(close_timeout=0.2)
    kept._script = script
    trainer = fit(tmp_path, kept, Floods())
    hangs.set()
    assert (dir_of(trainer) / "journal.jsonl").stat().st_size > 15e6
    assert sizes[1] - sizes[0] < 5, sizes


def test_records_that_are_refused_are_named_and_the_others_are_sent(tmp_path: Path, caplog: Any) -> None:
    def script(call: str, records: Sequence[Record]) -> None:
        if any(record["n"] == 3 for record in records):
            raise Refused("it is a 3")

    kept = Kept()
    kept._script = script
    trainer = fit(tmp_path, kept)
    assert kept.got == [record for record in journal(dir_of(trainer))[:-1] if record["n"] != 3]
    assert "kept does not take record 3: it is a 3" in caplog.text


def test_a_logger_that_cannot_be_made_is_switched_off(tmp_path: Path, caplog: Any) -> None:
    @dataclass(kw_only=True, eq=False)
    class Absent(Tracker):
        def backend(self) -> Any:
            raise ImportError("its package is not installed")

    trainer = fit(tmp_path, Absent())
    assert trainer.run is not None and trainer.run.position.step == 8
    assert "failed in on_run_start and is switched off" in caplog.text and "its package is not installed" in caplog.text


def test_two_runs_at_a_time_share_nothing(tmp_path: Path) -> None:
    loggers = [Kept(), Kept()]

    class Nested(Net):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 0:
                fit(tmp_path / "inner", loggers[1])

    outer = fit(tmp_path / "outer", loggers[0], net=Nested())
    assert loggers[0].got == journal(dir_of(outer))[:-1]
    assert loggers[1].got == journal(tmp_path / "inner" / "Net" / "version_0")[:-1]


# ---------------------------------------------------------------------- the journal


def test_a_logger_brings_the_journal_and_one_that_is_named_stays_as_it_is(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Kept())
    assert trainer.run is not None and list(trainer.run.plugins) == ["journal", "kept"]
    trainer = fit(tmp_path, Kept(), {"journal": {"dir": str(tmp_path / "elsewhere")}})
    assert (tmp_path / "elsewhere" / "journal.jsonl").exists() and not (dir_of(trainer) / "journal.jsonl").exists()


def test_a_plugin_that_is_required_and_not_there_is_named() -> None:
    class Needs:
        requires = ("nothing_of_this_name",)

        @hookimpl
        def on_fit_start(self) -> None:
            pass

    with pytest.raises(PluginError, match=r"plugin 'needs' requires the plugin 'nothing_of_this_name': .* pip install torchplug-nothing"):
        Trainer(plugins=[Needs()])


def test_a_line_that_is_not_finished_is_read_when_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with open(path, "w", buffering=1) as file:
        file.write('{"n": 0}\n{"n"')
        file.flush()
        reader = Reader(path)
        assert reader.records(10) == [{"n": 0}] and reader.records(10) == []
        file.write(": 1}\n")
        file.flush()
        assert reader.records(10) == [{"n": 1}] and reader.n == 2
    reader.close()


def test_a_reader_goes_to_the_newest_mark_that_stands_in_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(json.dumps({"n": n, "time": 10.0 + n}) + "\n" for n in range(6)))
    marks = [Mark(2, 11.0), Mark(4, 13.0), Mark(5, 99.0), Mark(9, 18.0)]  # the last two are of another past
    for known, found in ((marks, marks[1]), (marks[:1], marks[0]), (marks[2:], Mark()), ([], Mark())):
        reader = Reader(path)
        assert reader.seek(known) == found
        assert [record["n"] for record in reader.records(10)] == list(range(found.n, 6))
        reader.close()


def test_a_million_records_cost_the_same_each(tmp_path: Path) -> None:
    """Read in portions: what is held at a time does not grow with the journal."""
    path, most = tmp_path / "journal.jsonl", []
    path.write_text("".join(json.dumps({"n": n, "time": float(n), "event": "on_run_start"}) + "\n" for n in range(20_000)))

    class Counts(Memory):
        def send(self, records: Sequence[Record], mark: Mark) -> None:
            most.append(len(records))

    delivery = Delivery(Counts(Kept()), Place(path, first(path), tmp_path, tmp_path), 100)
    delivery.begin()
    while delivery.step():
        pass
    assert delivery.sent == 20_000 and set(most) == {100}
    delivery.close()
