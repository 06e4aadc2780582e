"""Times on a clock that only moves when the test says so, the timeline, and that nothing else changes."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import torchplug_profiler
from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_profiler import Profiler


class Clock:
    """Time as the test tells it, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter_ns(self) -> int:
        return round(self.now * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(torchplug_profiler, "time", made)
    return made


class Net(Module):
    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.clock = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2)), clock

    def spend(self, seconds: float) -> None:
        if self.clock is not None:
            self.clock.now += seconds

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.spend(3)
        return self.net(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.spend(7)

    def on_after_backward(self) -> None:
        self.spend(0.25)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Batches:
    """Takes five seconds for each batch."""

    def __init__(self, clock: Clock | None, count: int = 4) -> None:
        self.clock, self.count = clock, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> torch.Tensor:
        if i >= self.count:
            raise IndexError
        if self.clock is not None:
            self.clock.now += 5
        return torch.full((2, 3), float(i))


class Surrounds:
    """A second before a step and two after it, and half a second in an event."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    @hookimpl(wrapper=True)
    def train_step(self) -> Any:
        self.clock.now += 1
        loss = yield
        self.clock.now += 2
        return loss * 2

    @hookimpl
    def on_train_batch_end(self) -> None:
        self.clock.now += 0.5


def fit(path: Path, *plugins: Any, clock: Clock | None = None, module: Module | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        root_dir=path, plugins=list(plugins), accelerator="cpu", **{"max_epochs": 2, "num_sanity_val_steps": 0, "seed": 1, **options}
    )
    trainer.fit(module or Net(clock), Batches(clock), Batches(clock, 2) if clock else None)
    return trainer


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("profiler")


def test_each_hook_has_its_own_time(tmp_path: Path, clock: Clock) -> None:
    profiler = Profiler()
    begin = clock.now
    fit(tmp_path, {"surrounds": Surrounds(clock)}, profiler, clock=clock)
    spent = {key: (each.calls, each.total, each.own) for key, each in profiler.spent.items() if each.total}
    assert spent == {
        ("data", "next batch"): (12, 60, 60),  # 8 to train, 4 to validate
        ("core", "train_step"): (8, 24, 24),
        ("surrounds", "train_step"): (16, 24, 24),  # both parts of the wrapper, without what it surrounds
        ("surrounds", "on_train_batch_end"): (8, 4, 4),
        ("Net", "on_after_backward"): (8, 2, 2),
        ("core", "train_batch"): (8, 50, 0),  # everything is inside of it
        ("core", "evaluate"): (2, 48, 0),
        ("core", "validation_step"): (4, 28, 28),
    }
    assert profiler.seconds == clock.now - begin == sum(each.own for each in profiler.spent.values()) == 142


def test_the_table_adds_up(tmp_path: Path, clock: Clock) -> None:
    class Slow(Net):
        def configure_optimizers(self) -> Any:
            clock.now += 8  # in no hook
            return super().configure_optimizers()

    profiler = Profiler(rows=3)
    trainer = fit(tmp_path, profiler, clock=clock, module=Slow(clock))
    rows = profiler.table().splitlines()
    assert rows[0] == "122.00 s in all"
    assert rows[2].split() == ["data", "next", "batch", "12", "60.000", "60.000", "5000000.0", "49.2%"]
    assert [row.split()[0] for row in rows[3:5]] == ["core", "core"] and len(rows) == 7
    assert rows[5].split("more")[1].split()[2] == "2.000"  # on_after_backward, among those that have no row
    assert rows[6].split() == ["outside", "of", "hooks", "1", "8.000", "8.000", "8000000.0", "6.6%"]
    assert trainer.run is not None
    assert trainer.run.report["profiler"].splitlines()[:5] == rows[:5]  # what shows it is counted in the last rows when it has ended


def test_the_timeline_holds_the_calls(tmp_path: Path, clock: Clock) -> None:
    trainer = fit(tmp_path, Profiler(), clock=clock, max_epochs=1)
    assert trainer.run is not None
    document = json.loads((trainer.run.dir / "timeline-0.json").read_text(encoding="utf-8"))
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    steps = [(event["ts"], event["dur"]) for event in events if event["name"] == "core train_step"]
    assert steps == [((5 + 8.25 * i) * 1e6, 3e6) for i in range(4)]  # microseconds since the run began
    batch, backward = (next(event for event in events if event["name"] == f"core {name}") for name in ("train_batch", "backward"))
    assert batch["ts"] <= backward["ts"] and backward["ts"] + backward["dur"] <= batch["ts"] + batch["dur"]
    assert {event["pid"] for event in events} == {0} and len({event["tid"] for event in events}) == 1


def test_the_timeline_is_bounded_and_can_be_left_out(tmp_path: Path) -> None:
    profiler = Profiler(max_calls=10)
    trainer = fit(tmp_path / "a", profiler)
    assert trainer.run is not None
    document = json.loads((trainer.run.dir / "timeline-0.json").read_text(encoding="utf-8"))
    assert len(document["traceEvents"]) == 11
    calls = sum(each.calls for each in profiler.spent.values())
    later = int(trainer.run.report["profiler"].rpartition(", ")[2].split()[0])
    assert calls > 50 and later in (calls - 10, calls - 11)  # its own last call ends after the line was made
    trainer = fit(tmp_path / "b", Profiler(timeline=False))
    assert trainer.run is not None and not list(trainer.run.dir.glob("timeline*"))


def test_another_fit_is_measured_anew(tmp_path: Path, clock: Clock) -> None:
    profiler = Profiler()
    module = Net(clock)
    trainer = fit(tmp_path, profiler, clock=clock, module=module)
    trainer.validate(module, Batches(clock, 2))
    assert profiler.seconds == 24 and ("core", "train_step") not in profiler.spent
    assert profiler.spent["core", "validation_step"].own == 14


def test_calls_of_other_threads_do_not_mix_with_those_of_training(tmp_path: Path, clock: Clock) -> None:
    class Writes:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            def write() -> None:
                run.hooks.log_text(run, "note", "text", 1)

            thread = threading.Thread(target=write)
            thread.start()
            thread.join()

        @hookimpl
        def log_text(self) -> None:
            clock.now += 6

    profiler = Profiler()
    trainer = fit(tmp_path, Writes(), profiler, clock=clock)
    assert profiler.spent["writes", "log_text"].own == profiler.spent["writes", "on_train_batch_end"].own == 48
    assert trainer.run is not None
    document = json.loads((trainer.run.dir / "timeline-0.json").read_text(encoding="utf-8"))
    threads = {event["name"]: event["tid"] for event in document["traceEvents"]}
    assert threads["writes log_text"] != threads["writes on_train_batch_end"]


class Odd:
    """Wrappers that change answers, answer for others, and swallow errors."""

    @hookimpl(wrapper=True)
    def train_step(self, batch_idx: int) -> Any:
        try:
            loss = yield
        except ZeroDivisionError:
            return None  # the batch is skipped
        return loss * (1 + batch_idx)

    @hookimpl(wrapper=True)
    def move_batch(self) -> Any:
        batch = yield
        return batch + 1


class Fails(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def test_wrappers_do_what_they_do_without_it(tmp_path: Path) -> None:
    weights = []
    for plugins in ([Odd()], [Odd(), Profiler()], [Profiler(), Odd()]):
        module = Fails()
        trainer = fit(tmp_path, *plugins, module=module)
        assert trainer.run is not None and trainer.run.position.step == 6
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_an_error_is_still_that_of_its_plugin_and_what_was_measured_is_there(tmp_path: Path) -> None:
    class Breaks:
        @hookimpl
        def on_train_batch_end(self, batch_idx: int) -> None:
            if batch_idx == 1:
                raise KeyError("broken")

    profiler = Profiler()
    with pytest.raises(KeyError, match="broken") as caught:
        fit(tmp_path, {"breaks": Breaks()}, profiler)
    assert any(note.startswith("raised by plugin 'breaks' in on_train_batch_end") for note in caught.value.__notes__)
    assert profiler.spent["breaks", "on_train_batch_end"].calls == 2 and profiler.spent["core", "backward"].calls == 2
    assert len(list(tmp_path.rglob("timeline-0.json"))) == 1


def test_a_wrapper_that_yields_twice_is_refused_as_without_it(tmp_path: Path) -> None:
    class Twice:
        @hookimpl(wrapper=True)
        def train_step(self) -> Any:
            yield
            yield

    for plugins in ([Twice()], [Twice(), Profiler()]):
        with pytest.raises(RuntimeError, match="second yield"):
            fit(tmp_path, *plugins)


def test_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    data = DataLoader(torch.arange(48.0).view(16, 3) / 48, 4, shuffle=True)
    weights = []
    for plugins in ([], [Profiler()], [Profiler(synchronize=True)]):
        module = Net()
        trainer = Trainer(root_dir=tmp_path, plugins=plugins, accelerator="cpu", max_epochs=3, seed=3)
        trainer.fit(module, data)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be a whole number, at least 1, got 0"),
        ({"max_calls": -1}, "max_calls must be a whole number, at least 0, got -1"),
        ({"timeline": 3}, "timeline must be True, False or a path, got 3"),
        ({"synchronise": True}, "did you mean 'synchronize'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        Trainer(max_epochs=1, plugins=[{"profiler": options}])
