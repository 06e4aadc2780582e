"""A run that goes on: bit for bit the one that was never stopped, from the file that was meant, with the parts that were asked for."""

from __future__ import annotations

import copy
import logging
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

import torchplug
from torchplug import hookimpl, seed_everything
from torchplug.checkpoint import CheckpointError, load, verify, write

BATCHES, EPOCHS = 5, 2


# ---------------------------------------------------------------------- a module in which much happens


class Home:
    """A metric object that somebody wrote at home: what it adds up is in no state dict."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.values, self.count = torch.zeros(()), [], 0

    def update(self, value: Tensor) -> None:
        self.total, self.count = self.total + value, self.count + 1
        self.values.append(value)

    def compute(self) -> Tensor:
        return self.total / max(self.count, 1) + torch.stack(self.values).median()


def median(values: Tensor) -> Tensor:
    return values.median()


class Net(torchplug.Module):
    """Dropout, batch norm, metrics of every kind, two schedulers; validates on random data too."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 8})
        self.net = network()
        self.home = Home()

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        for kind in ("sum", "min", "max", median):
            self.log(getattr(kind, "__name__", kind), loss, on_step=False, on_epoch=True, reduce_fx=kind)
        self.log("number", random.random(), on_step=False, on_epoch=True)
        self.home.update(loss.detach())
        self.log("home", self.home, on_step=False, on_epoch=True)
        if batch_idx == 0:
            self.log("first", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) * torch.rand(()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        by_step = schedules.CosineAnnealingLR(optimizer, 20)
        by_epoch = schedules.ReduceLROnPlateau(optimizer, patience=0)
        return [optimizer], [
            {"scheduler": by_step, "interval": "step"}, {"scheduler": by_epoch, "interval": "epoch", "monitor": "val_loss"}
        ]  # fmt: skip

    def train_dataloader(self) -> Any:
        return DataLoader(data(), batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(data(), batch_size=8, shuffle=True)


def data(samples: int = 4 * BATCHES - 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(samples, 6, generator=generator), torch.randn(samples, 2, generator=generator))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))


# ---------------------------------------------------------------------- plugins that watch, save and remember

TRACED = [
    "on_sanity_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward", "on_after_optimizer_step",
    "on_scheduler_step", "on_step_skipped", "on_train_batch_end", "on_validation_start", "on_validation_batch_end", "on_validation_end",
    "on_train_epoch_end", "on_train_end",
]  # fmt: skip
START = ["on_train_start"]


def _traced(name: str) -> Callable[..., None]:
    def record(self: Any, run: Any) -> None:
        where = run.position
        self.events.append((name, where.stage, where.epoch, where.batch, where.step, where.micro_step, where.samples))

    return record


class _Trace:
    """Every event with the position, every record of metrics, and how many there were when something was saved."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.cuts: dict[str, int] = {}

    @hookimpl
    def log_metrics(self, run: Any, metrics: dict[str, float], step: int, epoch: int) -> None:
        self.events.append(("log_metrics", {name: value.hex() for name, value in metrics.items()}, step, epoch))

    @hookimpl
    def on_checkpoint_saved(self, path: Any) -> None:
        self.cuts[str(path)] = len(self.events)


Trace: Any = type("Trace", (_Trace,), {name: hookimpl(_traced(name)) for name in TRACED})


def saver(folder: Path, *hooks: str) -> Any:
    """A plugin that asks for a checkpoint in each call of the hooks."""
    count = iter(range(1000))

    def asked(hook: str) -> Callable[..., None]:
        def ask(self: Any, run: Any) -> None:
            if run.work == "fit":
                run.save_checkpoint(folder / f"{next(count):03}-{hook}.safetensors")

        return hookimpl(ask)

    return type("Saver", (), {hook: asked(hook) for hook in hooks})()


class Average:
    """Keeps a moving average of the parameters, as averaging plugins do."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    @hookimpl
    def setup(self) -> None:
        self.average = {}

    @hookimpl
    def on_after_optimizer_step(self, run: Any) -> None:
        for name, value in run.module.named_parameters():
            before = self.average.get(name, torch.zeros_like(value))
            self.average[name] = before.lerp(value.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]


class Monitor:
    """Acts once on each new value of some metrics."""

    names = ("val_loss", "loss")

    @hookimpl
    def setup(self) -> None:
        self.seen, self.values = dict.fromkeys(self.names, -1), []

    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        for name in self.names:
            reading = run.metrics.fresh(name, self.seen[name])
            if reading is not None:
                self.seen[name] = reading.serial
                self.values.append([name, reading.value, reading.step, reading.epoch, reading.serial])

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.values = dict(state["seen"]), list(state["values"])


# ---------------------------------------------------------------------- what is compared

APART = (".time", ".run", ".versions")


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every value in a state by its path, tensors as their bytes; without what differs from run to run."""
    if isinstance(value, Tensor):
        return {path: (str(value.dtype), tuple(value.shape), value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())}
    if path.endswith(".everything"):  # in how many parts it came together means nothing
        value = torch.cat(value) if value else None
        return leaves(value, path + ".all")
    if isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {n: v for name, part in parts if f"{path}.{name}" not in APART for n, v in leaves(part, f"{path}.{name}").items()}
    return {path: repr(value)}


def differing(one: Any, other: Any) -> list[str]:
    """The paths at which two states differ."""
    left, right = leaves(one), leaves(other)
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


class Ran:
    """What came of a fit."""

    def __init__(self, trainer: Any, trace: Any) -> None:
        self.trainer, self.run, self.trace, self.events = trainer, trainer.run, trace, trace.events
        self.state = copy.deepcopy(trainer.run.ended or trainer.run.state())
        self.metrics = {name: value.hex() for name, value in trainer.metrics.items()}

    def same(self, other: Ran) -> None:
        assert differing(self.state, other.state) == []
        assert self.metrics == other.metrics


@pytest.fixture
def fit(trainer: Any) -> Callable[..., Ran]:
    """Fits a module, `Net` unless told, with a trace; a run that goes on finds the generators anywhere."""

    def run(module: Any = None, *plugins: Any, ckpt_path: Any = None, resume: Any = None, data: Any = None, **options: Any) -> Ran:
        seed_everything(5 if ckpt_path is None else 77)
        trace = Trace()
        defaults: dict[str, Any] = {"max_epochs": EPOCHS, "log_every_n_steps": 2}
        made = trainer(**{**defaults, **options, "plugins": [trace, *plugins]})
        made.fit(module if module is not None else Net(), data, ckpt_path=ckpt_path, resume=resume)
        return Ran(made, trace)

    return run


Fit = Callable[..., Ran]


def goes_on(fit: Fit, folder: Path, hooks: tuple[str, ...], make: Any = Net, plugins: Any = tuple, data: Any = None, **options: Any) -> Ran:
    """Whether a run that is resumed from whatever was saved in some hooks is the whole one, in state, metrics and events."""
    given = (lambda: None) if data is None else data
    whole = fit(make(), *plugins(), saver(folder, *hooks), data=given(), **options)
    starts = {cut: path for path, cut in whole.trace.cuts.items()}  # one for each boundary
    assert len(starts) > 2
    for cut, path in starts.items():
        rest = fit(make(), *plugins(), saver(folder / "again", *hooks), ckpt_path=path, data=given(), **options)
        rest.same(whole)
        begun = [event for event in rest.events if event[0] not in START]
        assert begun == [event for event in whole.events[cut:] if event[0] not in START], path
    return whole


# ---------------------------------------------------------------------- exact, wherever it was asked for

ANYWHERE = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward", "on_after_backward", "on_after_optimizer_step",
    "on_before_zero_grad", "on_scheduler_step", "on_train_batch_end", "on_validation_start", "on_validation_batch_end", "on_validation_end",
    "on_train_epoch_end",
)  # fmt: skip
BOUNDARIES = ("on_train_batch_end", "on_train_epoch_end")


def remembering() -> list[Any]:
    return [Average(), Monitor()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "val_check_interval": 2},
        {"accumulate_grad_batches": 2, "val_check_interval": 3},
        {"accumulate_grad_batches": 3, "limit_train_batches": 4, "log_every_n_steps": 1, "gradient_clip_val": 0.1},
        {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
def test_a_checkpoint_asked_for_anywhere_goes_on_bit_for_bit(options: dict[str, Any], fit: Fit, tmp_path: Path) -> None:
    goes_on(fit, tmp_path / "saved", ANYWHERE, plugins=remembering, **options)


def test_a_checkpoint_asked_for_in_a_step_is_one_of_the_end_of_its_window(fit: Fit, tmp_path: Path) -> None:
    class Asking(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            path = tmp_path / f"{self._run.position.micro_step}.safetensors"
            assert self._run.save_checkpoint(path) == path
            assert not path.exists()
            return super().training_step(batch, batch_idx)

    fit(Asking(), accumulate_grad_batches=2)
    places = [load(tmp_path / f"{number}.safetensors")["position"] for number in range(2 * BATCHES)]
    assert [(place["epoch"], place["batch"], place["step"]) for place in places] == [
        (0, 2, 1), (0, 2, 1), (0, 4, 2), (0, 4, 2), (0, 5, 3), (1, 2, 4), (1, 2, 4), (1, 4, 5), (1, 4, 5), (1, 5, 6)
    ]  # fmt: skip


def test_outside_of_training_a_checkpoint_is_written_at_once(fit: Fit, tmp_path: Path) -> None:
    class Early:
        @hookimpl
        def on_fit_start(self, run: Any) -> None:
            run.save_checkpoint(tmp_path / "early.safetensors")
            assert verify(tmp_path / "early.safetensors") == []

    whole = fit(None, Early())
    fit(ckpt_path=tmp_path / "early.safetensors").same(whole)


@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_what_is_saved_when_max_steps_ends_an_epoch_in_the_middle_goes_on_with_more_steps(steps: int, fit: Fit, tmp_path: Path) -> None:
    whole = fit(None, *remembering(), max_steps=9, log_every_n_steps=1)
    fit(None, *remembering(), saver(tmp_path / "saved", "on_train_end"), max_steps=steps, log_every_n_steps=1)
    path = tmp_path / "saved" / "000-on_train_end.safetensors"
    rest = fit(None, *remembering(), max_steps=9, log_every_n_steps=1, ckpt_path=path)
    rest.same(whole)
    cut = next(i for i, event in enumerate(whole.events) if event[0] == "on_train_batch_start" and event[5] == steps)
    tail = ("on_train_epoch_start",) if steps == BATCHES else ()
    assert [event for event in rest.events if event[0] not in (*START, *tail)] == whole.events[cut:]


# ---------------------------------------------------------------------- exact, whatever is trained


class Plain(Net):
    """Without schedulers."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)


class Lbfgs(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=3, history_size=2)


class Two(Net):
    """Two optimizers in turn, each with a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.other = network()

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        loss = nn.functional.mse_loss((self.net, self.other)[optimizer_idx](batch[0]), batch[1])
        self.log(f"loss_{optimizer_idx}", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.AdamW(self.net.parameters(), lr=0.01), torch.optim.RMSprop(self.other.parameters(), lr=0.01)]
        first = {"scheduler": schedules.ExponentialLR(optimizers[0], 0.9), "interval": "step", "frequency": 2}
        return optimizers, [first, schedules.StepLR(optimizers[1], 1, 0.5)]


class Manual(Net):
    """Steps by hand after every batch, with two optimizers."""

    every = 1

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = network()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer, net in zip(optimizers, (self.net, self.other), strict=True):
            loss = nn.functional.mse_loss(net(batch[0]), batch[1])
            self.manual_backward(loss)
            if (batch_idx + 1) % self.every == 0 or batch_idx + 1 == BATCHES:
                optimizer.step()
                optimizer.zero_grad()
        self.log("loss", loss, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.net, self.other)]


class ManualWindows(Manual):
    """Adds gradients up over two batches by hand."""

    every = 2


@pytest.mark.slow
@pytest.mark.parametrize("make", [Plain, Lbfgs, Two, Manual, ManualWindows])
def test_every_kind_of_optimization_goes_on_bit_for_bit(make: Any, fit: Fit, tmp_path: Path) -> None:
    goes_on(fit, tmp_path / "saved", BOUNDARIES, make)


def test_gradients_that_are_added_up_by_hand_put_a_checkpoint_off_until_the_step(fit: Fit, tmp_path: Path) -> None:
    fit(ManualWindows(), saver(tmp_path, "on_train_batch_end"), max_epochs=1)
    places = [load(path)["position"] for path in sorted(tmp_path.glob("*.safetensors"))]
    assert [place["batch"] for place in places] == [2, 2, 4, 4, 5]


class Scaled(Plain):
    """Some losses are too big for half precision: the scaler skips steps and changes its scale."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * (1e38 if self.current_epoch == 0 and batch_idx == 2 else 1)


@pytest.mark.parametrize(("make", "precision"), [(Plain, "bf16-mixed"), (Plain, "bf16-true"), (Plain, "16-mixed"), (Scaled, "16-mixed")])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_every_precision_goes_on_bit_for_bit(make: Any, precision: str, fit: Fit, tmp_path: Path) -> None:
    whole = goes_on(fit, tmp_path / "saved", BOUNDARIES, make, precision=precision)
    assert make is not Scaled or (whole.state["scaler"]["scale"] < 2.0**16 and whole.state["position"]["step"] < 2 * BATCHES)


def lambda_lr(optimizer: Any) -> Any:
    return schedules.LambdaLR(optimizer, lambda step: 0.9**step)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda_lr,
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5, 7]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 9),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, 10),
    "ReduceLROnPlateau": lambda o: {"scheduler": schedules.ReduceLROnPlateau(o, patience=0), "interval": "epoch", "monitor": "loss"},
    "SequentialLR": lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o, 0.1, 3), schedules.ExponentialLR(o, 0.9)], [3]),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o, 0.1, 3), schedules.ExponentialLR(o, 0.9)], o),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # older torch says it of its own SequentialLR
def test_every_scheduler_of_torch_goes_on_bit_for_bit(name: str, fit: Fit, tmp_path: Path) -> None:
    class Scheduled(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = SCHEDULERS[name](optimizer)
            if name == "SWALR" and "anneal_func" in scheduler.state_dict():
                pytest.skip("older torch has a function in the state of this one, which cannot be saved")
            return [optimizer], [scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler, "interval": "step"}]

    whole = fit(Scheduled(), saver(tmp_path, "on_train_batch_end"))
    for number in (0, 4, 6):
        fit(Scheduled(), ckpt_path=tmp_path / f"{number:03}-on_train_batch_end.safetensors").same(whole)


# ---------------------------------------------------------------------- metrics


class Measured(Plain):
    """Metrics of torchmetrics, in the module and beside it."""

    def __init__(self) -> None:
        super().__init__()
        torchmetrics = pytest.importorskip("torchmetrics")
        self.error = torchmetrics.MeanSquaredError()
        self.several = torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError(), torchmetrics.MeanAbsolutePercentageError()])
        self.listed = torchmetrics.CatMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        guess = self.net(batch[0])
        self.error.update(guess, batch[1])
        self.several.update(guess, batch[1])
        self.listed.update(guess.mean())
        self.log("error", self.error, on_step=True, on_epoch=True)
        if batch_idx == 0:
            self.log("early error", self.error, on_step=False, on_epoch=True)
        return nn.functional.mse_loss(guess, batch[1])

    def on_train_epoch_end(self) -> None:
        self.log("listed", self.listed.compute().sum())
        self.log_dict(self.several.compute())
        self.listed.reset()
        self.several.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*update.*")
def test_the_sums_of_torchmetrics_go_on_bit_for_bit(fit: Fit, tmp_path: Path) -> None:
    goes_on(fit, tmp_path / "saved", BOUNDARIES, Measured)


def test_epoch_values_are_those_of_the_whole_epoch_and_none_of_a_part(fit: Fit, tmp_path: Path) -> None:
    whole = fit(None, saver(tmp_path, "on_train_batch_end"))
    rest = fit(ckpt_path=tmp_path / "002-on_train_batch_end.safetensors")
    names = {"loss", "loss_epoch", "loss_step", "sum", "min", "max", "median", "number", "home", "first", "val_loss"}
    assert whole.metrics.keys() == names
    first = next(event[1] for event in whole.events if event[0] == "log_metrics" and "loss_epoch" in event[1])
    again = next(event[1] for event in rest.events if event[0] == "log_metrics" and "loss_epoch" in event[1])
    assert again == first and {"sum", "min", "max", "median", "number", "home", "first"} <= first.keys()


def test_the_time_of_a_run_goes_on(fit: Fit, tmp_path: Path) -> None:
    fit(None, saver(tmp_path, "on_train_batch_end"))
    path = tmp_path / "007-on_train_batch_end.safetensors"
    state = load(path)
    state["run"]["seconds"] = 5000.0
    write(path, state)
    assert 5000.0 < fit(ckpt_path=path).run.seconds < 5060.0


# ---------------------------------------------------------------------- which file


class Finder:
    """Says which checkpoints there are, as the plugin that keeps them does."""

    def __init__(self, *paths: Path, **by_name: Any) -> None:
        self.paths: Any = list(paths)
        self.asked: list[Any] = []

    @hookimpl
    def find_checkpoints(self, run: Any, which: str) -> Any:
        self.asked.append((which, run.dir, run.id, type(run.module).__name__))
        return self.paths


@pytest.fixture
def saved(fit: Fit, tmp_path: Path) -> Path:
    """The checkpoint of step 7 of a run, in the run's directory."""
    ran = fit(None, saver(tmp_path / "saved", "on_train_batch_end"))
    path = ran.run.dir / "checkpoints" / "some.safetensors"
    path.parent.mkdir()
    shutil.copy(tmp_path / "saved" / "006-on_train_batch_end.safetensors", path)
    return path


def changed(path: Path, name: str, **parts: Any) -> Path:
    """A copy of a checkpoint with other values in its state."""
    state = load(path)
    state.update(parts)
    write(path.with_name(name), state)
    return path.with_name(name)


def test_last_takes_the_first_that_can_be_used_and_says_what_it_passed_over(saved: Path, fit: Fit, caplog: Any) -> None:
    damaged, weights, emergency = (saved.with_name(f"{name}.safetensors") for name in ("damaged", "weights", "emergency"))
    damaged.write_bytes(saved.read_bytes()[:-7])
    changed(saved, "weights.safetensors", kind="weights")
    changed(saved, "emergency.safetensors", emergency="ZeroDivisionError: x")
    finder = Finder(damaged, weights, saved.with_name("gone.safetensors"), emergency, saved, damaged)
    caplog.clear()
    ran = fit(None, finder, ckpt_path="last")
    assert finder.asked == [("last", Path(), "", "Net")]
    assert (ran.run.resumed, ran.run.position.step, ran.run.resumption.path) == (saved, 10, saved)
    passed = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(passed) == 4 and all(line.startswith("passed over: ") for line in passed)
    for line, path, reason in zip(
        passed, finder.paths, ("", "weights only", "there is no", "written in an emergency (ZeroDivisionError: x)"), strict=False
    ):
        assert str(path) in line and reason in line


def test_best_is_asked_for_by_that_name(saved: Path, fit: Fit) -> None:
    finder = Finder(saved)
    assert fit(None, finder, ckpt_path="best").run.resumed == saved
    assert finder.asked[0][0] == "best"


def test_where_nothing_was_saved_last_begins_at_the_beginning_in_one_line(fit: Fit, caplog: Any) -> None:
    ran = fit(None, Finder(), ckpt_path="last")
    lines = [record for record in caplog.records if "there is no checkpoint of an earlier run" in record.message]
    assert [record.levelno for record in lines] == [logging.INFO]
    assert (ran.run.resumed, ran.run.resumption, ran.run.position.step) == (None, None, 2 * BATCHES)
    with pytest.raises(FileNotFoundError, match=r"ckpt_path='best': there is no checkpoint of an earlier run"):
        fit(None, Finder(), ckpt_path="best")


def test_where_none_can_be_used_the_error_lists_each(saved: Path, fit: Fit, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    one.write_bytes(b"")
    two.write_bytes(saved.read_bytes()[:100])
    there = sorted(tmp_path.glob("Net/*"))
    with pytest.raises(CheckpointError, match=r"ckpt_path='last': none of 2 checkpoints can be used:\n  .*one.* is empty\n  .*two"):
        fit(None, Finder(one, two), ckpt_path="last")
    assert sorted(tmp_path.glob("Net/*")) == there


def test_without_a_plugin_that_keeps_checkpoints_last_is_an_error_that_says_so(fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"ckpt_path='last': no enabled plugin knows where checkpoints are; enable 'checkpoint'"):
        fit(ckpt_path="last")


def test_a_path_that_is_not_there_is_an_error_before_anything_begins(fit: Fit, make_recorder: Any, tmp_path: Path) -> None:
    recorder = make_recorder("setup", "launch", "on_exception", "teardown")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nothing\.safetensors"):
        fit(None, recorder, ckpt_path=tmp_path / "nothing.safetensors")
    assert recorder.names == ["launch"] and not list(tmp_path.glob("Net"))


def test_a_damaged_file_that_is_named_is_an_error_and_never_replaced_by_another(saved: Path, fit: Fit) -> None:
    saved.write_bytes(saved.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"some\.safetensors"):
        fit(None, Finder(saved), ckpt_path=saved)


def test_an_emergency_checkpoint_that_is_named_is_used_and_said(saved: Path, fit: Fit, caplog: Any) -> None:
    path = changed(saved, "emergency.safetensors", emergency="ZeroDivisionError: x")
    assert fit(ckpt_path=str(path)).run.position.step == 10
    assert "was written in an emergency (ZeroDivisionError: x)" in caplog.text


def test_weights_alone_are_not_enough_to_go_on_from(saved: Path, fit: Fit) -> None:
    path = changed(saved, "weights.safetensors", kind="weights")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors holds weights only"):
        fit(ckpt_path=path)


def test_the_checkpoint_plugin_finds_the_last_and_the_best_of_an_earlier_process(fit: Fit) -> None:
    options = {"monitor": "loss", "top_k": 1, "background": False}
    whole = fit(None, {"checkpoint": dict(options)}, max_epochs=4)
    first = fit(None, {"checkpoint": dict(options)}, max_epochs=2)
    again = fit(None, {"checkpoint": dict(options)}, max_epochs=4, ckpt_path="last")
    assert (again.run.dir, again.run.id) == (first.run.dir, first.run.id)
    assert differing(again.state["module"], whole.state["module"]) == [] and again.metrics == whole.metrics
    best = fit(None, {"checkpoint": dict(options)}, max_epochs=4, ckpt_path="best")
    assert best.run.resumed == again.run.best_path


# ---------------------------------------------------------------------- the same run


def test_a_run_goes_on_in_its_directory_under_its_id(saved: Path, fit: Fit, make_recorder: Any) -> None:
    class Early:
        @hookimpl
        def setup(self, run: Any) -> None:
            self.found = run.id, run.dir, run.position.step, run.resumed

    early, recorder = Early(), make_recorder("setup", "on_run_start", "on_checkpoint_loaded", "on_fit_start", "on_train_start")
    ran = fit(None, early, recorder, ckpt_path=saved)
    assert early.found == (load(saved)["run"]["id"], saved.parent.parent, 7, saved)
    assert (ran.run.id, ran.run.dir) == early.found[:2]
    assert recorder.names == ["setup", "on_run_start", "on_checkpoint_loaded", "on_fit_start", "on_train_start"]
    assert recorder.calls[2][1]["path"] == saved
    assert sorted(path.name for path in ran.run.dir.parent.iterdir()) == ["version_0"]


def test_a_directory_that_was_moved_is_the_one_that_goes_on(saved: Path, fit: Fit, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "Net" / "version_0"
    shutil.move(saved.parent.parent, moved)
    assert fit(ckpt_path=moved / "checkpoints" / saved.name, root_dir=tmp_path / "elsewhere").run.dir == moved


def test_a_checkpoint_from_another_place_goes_on_in_a_new_directory_under_the_same_id(saved: Path, fit: Fit, tmp_path: Path) -> None:
    ran = fit(ckpt_path=saved, root_dir=tmp_path / "elsewhere")
    assert ran.run.dir == tmp_path / "elsewhere" / "Net" / "version_0" and ran.run.id == load(saved)["run"]["id"]


def test_a_resumed_run_has_no_sanity_check(saved: Path, fit: Fit) -> None:
    assert "on_sanity_start" not in [event[0] for event in fit(ckpt_path=saved, num_sanity_val_steps=2).events]


def test_fast_dev_run_goes_on_nowhere_near_the_run(saved: Path, fit: Fit) -> None:
    before = sorted(path.name for path in saved.parent.parent.rglob("*"))
    fit(ckpt_path=saved, fast_dev_run=True, resume={"include": ["model"]})
    assert sorted(path.name for path in saved.parent.parent.rglob("*")) == before


# ---------------------------------------------------------------------- parts of it

EVERYTHING = ["model", "optimizer", "scheduler", "position", "data", "rng", "metrics", "plugin:average", "plugin:monitor"]


@pytest.fixture
def parts(fit: Fit, tmp_path: Path) -> Path:
    """The checkpoint of step 7 of a run with plugins that have a state."""
    fit(None, *remembering(), saver(tmp_path / "parts", "on_train_batch_end"))
    return tmp_path / "parts" / "006-on_train_batch_end.safetensors"


class Peek:
    """What the run was made of before the first batch."""

    state: Any = None

    @hookimpl
    def on_train_start(self, run: Any) -> None:
        run.at_boundary(lambda: setattr(self, "state", copy.deepcopy(run.state())))


FILE_OF = {
    "model": ["module"], "optimizer": ["optimizers"], "scheduler": ["schedulers"], "position": ["position"], "rng": ["generators"],
}  # fmt: skip


def begun(fit: Fit, path: Path, resume: Any, *plugins: Any, **options: Any) -> tuple[Any, Any]:
    """The state in which training begins, and the report."""
    peek = Peek()
    ran = fit(None, *(plugins or remembering()), peek, ckpt_path=path, resume=resume, **options)
    return peek.state, ran.run.resumption


@pytest.mark.parametrize("part", EVERYTHING)
def test_every_part_can_be_left_out_alone(part: str, parts: Path, fit: Fit) -> None:
    state, report = begun(fit, parts, {"exclude": [part]})
    whole, saved = load(parts), [each for each in EVERYTHING if each != part]
    if part == "position":  # without it nothing is left of the run but what was learned
        saved = ["model", "optimizer", "scheduler", "rng"]
    assert report.loaded == saved
    assert report.skipped == [each for each in EVERYTHING if each not in saved] and report.missing == []
    for name, keys in FILE_OF.items():
        if name == "rng" and part in ("rng", "position"):
            continue
        expected = {key: whole[key] for key in keys}
        if name == "position" and part == "data":
            expected["position"] = {**expected["position"], "batch": 0}
        there = {key: state[key] for key in keys}
        if name in ("optimizer", "scheduler") and name not in saved:
            assert [each.get("steps", 0) for each in there[keys[0]]] == [0] * len(there[keys[0]])
        elif name == "position":
            assert (differing({**there["position"], "stage": ""}, {**expected["position"], "stage": ""}) == []) == (name in saved)
        else:
            assert (differing(there, expected) == []) == (name in saved), name
    for name in ("average", "monitor"):
        assert (differing(state["plugins"][name], whole["plugins"][name]) == []) == (f"plugin:{name}" in saved)
    assert bool(state["metrics"]["values"]["series"]) == ("metrics" in saved and part != "data")


def test_only_what_is_included_is_taken(parts: Path, fit: Fit) -> None:
    state, report = begun(fit, parts, {"include": ["model", "plugin:average"]})
    whole = load(parts)
    assert report.loaded == ["model", "plugin:average"] and set(report.skipped) == set(EVERYTHING) - {"model", "plugin:average"}
    assert differing(state["module"], whole["module"]) == []
    assert state["position"]["step"] == state["position"]["batch"] == 0 and state["optimizers"][0]["steps"] == 0
    assert differing(state["plugins"]["average"], whole["plugins"]["average"]) == [] and state["plugins"]["monitor"]["values"] == []


def test_all_plugins_at_once_are_included_or_left_out(parts: Path, fit: Fit) -> None:
    assert begun(fit, parts, {"exclude": ["plugins"]})[1].skipped == ["plugin:average", "plugin:monitor"]
    assert begun(fit, parts, {"include": ["model", "plugins"]})[1].loaded == ["model", "plugin:average", "plugin:monitor"]


def test_without_the_position_it_is_another_run(saved: Path, fit: Fit) -> None:
    ran = fit(ckpt_path=saved, resume={"include": ["model"]})
    assert ran.run.id != load(saved)["run"]["id"] and ran.run.dir.name == "version_1"
    assert (ran.run.resumed, ran.run.position.step) == (None, 2 * BATCHES)
    assert "on_train_epoch_start" in [event[0] for event in ran.events[:2]]


def test_without_the_data_the_epoch_begins_anew_with_its_sums(parts: Path, fit: Fit) -> None:
    ran = fit(None, *remembering(), ckpt_path=parts, resume={"exclude": ["data"]}, data=DataLoader(data(12), batch_size=2, shuffle=True))
    first = ran.events[1]
    assert first[:1] + first[2:] == ("on_train_epoch_start", 1, 0, 7, 7, load(parts)["position"]["samples"])
    assert (ran.run.position.epoch, ran.run.position.step) == (2, 7 + 6)


def test_the_report_is_said_in_a_line_and_kept(parts: Path, fit: Fit, caplog: Any) -> None:
    ran = fit(None, Average(), Fresh(), ckpt_path=parts, resume={"exclude": ["rng"], "strict": False})
    report = ran.run.resumption
    assert (report.path, report.missing) == (parts, ["plugin:fresh"])
    assert report.skipped == ["rng", "plugin:monitor"]
    text = (
        "loaded: model, optimizer, scheduler, position, data, metrics, plugin:average; skipped: rng, plugin:monitor; missing: plugin:fresh"
    )
    assert str(report) == text
    assert f"goes on from {parts} at epoch 1, batch 2, step 7: {text}" in caplog.text


class Fresh:
    """A plugin that is new."""

    @hookimpl
    def setup(self) -> None:
        self.state = "of setup"

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ({"includes": []}, "resume has no key 'includes'; it takes include or exclude, and strict"),
        ({"include": ["model"], "exclude": ["rng"]}, "resume takes include or exclude, not both"),
        ({"include": ["modle"]}, "resume: there is no part 'modle', did you mean 'model'?"),
        ({"exclude": ["weights"]}, "resume: there is no part 'weights': there are model, optimizer, scheduler, position, data, rng,"),
        ({"exclude": "rng"}, "resume takes lists of parts, got 'rng'; write ['rng']"),
        ({"include": ["model", "data"]}, "resume: data and metrics belong to a position; include it too"),
    ],
)
def test_what_resume_does_not_take_is_refused_before_anything_is_read(resume: Any, message: str, fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        fit(ckpt_path=tmp_path / "not there", resume=resume)


def test_resume_without_a_checkpoint_is_an_error(fit: Fit) -> None:
    with pytest.raises(ValueError, match="resume says what to take from a checkpoint: give ckpt_path too"):
        fit(resume={"exclude": ["rng"]})


# ---------------------------------------------------------------------- what does not fit


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Linear(8, 3)
        self.extra = nn.Linear(1, 1)
        del self.net[2]


class Reshaped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Linear(8, 3)


class Smaller(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 2)


def optimized(configure: Callable[[Any], Any]) -> Any:
    return type("Net", (Net,), {"configure_optimizers": configure})()


def groups(self: Any) -> Any:
    return torch.optim.Adam([{"params": [p], "lr": 0.1} for p in self.parameters()])


def several(self: Any) -> Any:
    return [torch.optim.Adam([p]) for p in self.parameters()]


def one_scheduler(self: Any) -> Any:
    optimizer = torch.optim.Adam(self.parameters())
    return [optimizer], [schedules.CosineAnnealingLR(optimizer, 20)]


def other_scheduler(self: Any) -> Any:
    optimizer = torch.optim.Adam(self.parameters())
    return [optimizer], [schedules.StepLR(optimizer, 20), {"scheduler": schedules.ReduceLROnPlateau(optimizer), "monitor": "loss"}]


class InTurn(Net):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        return super().training_step(batch, batch_idx)

    configure_optimizers = several


def shuffled(samples: int = 4 * BATCHES - 1, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(data(samples), batch_size=batch_size, **{"shuffle": True, **options})


DIFFERENT: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "other layers": (
        Wider, {}, "is of another model than Wider: it lacks net.2.weight, net.2.bias, extra.weight, extra.bias; the module has no net.3."
    ),
    "other shapes": (
        Reshaped, {}, r"is of another model than Reshaped: net.3.weight is \(2, 8\) in the file and \(3, 8\) in the module, net.3.bias"
    ),
    "another optimizer": (
        lambda: optimized(lambda self: torch.optim.SGD(self.parameters(), lr=0.1)), {},
        r"has 1 optimizer \(Adam\), configure_optimizers gives 1 optimizer \(SGD\); leave it out with resume=",
    ),
    "more optimizers": (InTurn, {}, r"has 1 optimizer \(Adam\), configure_optimizers gives 6 optimizers \(Adam, Adam, Adam, Adam, "),
    "parameter groups": (
        lambda: optimized(groups), {},
        r"optimizer 0 \(Adam\) has 1 parameter groups of \[6\] parameters, that of configure_optimizers has 6 of \[1, 1, 1, 1, 1, 1\]",
    ),
    "fewer schedulers": (
        lambda: optimized(one_scheduler), {},
        r"has 2 schedulers \(CosineAnnealingLR, ReduceLROnPlateau\), configure_optimizers gives 1 scheduler \(CosineAnnealingLR\)",
    ),
    "other schedulers": (lambda: optimized(other_scheduler), {}, r"gives 2 schedulers \(StepLR, ReduceLROnPlateau\)"),
    "accumulation": (Net, {"accumulate_grad_batches": 2}, "other data or accumulation: accumulate_grad_batches was 1, is 2"),
    "batch size": (Net, {"data": lambda: shuffled(batch_size=3)}, "batch size was 4, is 3; number of batches in an epoch was 5, is 7"),
    "samples": (Net, {"data": lambda: shuffled(18)}, "length of the data set was 19, is 18; set it back, or begin the epoch anew"),
    "batches": (Net, {"limit_train_batches": 3}, "number of batches in an epoch was 5, is 3"),
    "last batch": (Net, {"data": lambda: shuffled(drop_last=True)}, "number of batches in an epoch was 5, is 4"),
    "a generator of its own": (
        Net, {"data": lambda: shuffled(generator=torch.Generator())},
        "written with other data: the loaders have 1 generators of their own, those of the checkpoint had 0",
    ),
    "too few epochs": (Net, {"max_epochs": 1}, "stands in epoch 1, which max_epochs=1 does not reach; raise it"),
    "too few steps": (Net, {"max_steps": 6}, "stands at step 7, which is more than max_steps=6; raise it"),
}  # fmt: skip


class Watch:
    """Keeps a copy of module and optimizers before a state is put in place."""

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        self.run, self.before = run, self.now(run)

    @staticmethod
    def now(run: Any) -> Any:
        generators = [torch.get_rng_state(), random.getstate(), run.stream.state_dict(0)["own"]]
        return copy.deepcopy([dict(run.module.state_dict()), [o.state_dict() for o in run.optimizers], run.optimizer_steps, generators])


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_does_not_fit_is_an_error_that_names_it_and_nothing_is_changed(name: str, saved: Path, fit: Fit, make_recorder: Any) -> None:
    make, options, message = DIFFERENT[name]
    watch, recorder = Watch(), make_recorder("on_exception", "on_fit_end", "teardown", "on_run_end", "on_checkpoint_loaded", "on_fit_start")
    loader = options.get("data", lambda: None)()
    with pytest.raises(CheckpointError, match=message) as error:
        fit(make(), watch, recorder, ckpt_path=saved, **{**options, "data": loader})
    assert str(saved) in str(error.value)
    assert differing(watch.now(watch.run), watch.before) == []
    assert recorder.names == ["on_exception", "on_fit_end", "teardown", "on_run_end"]


def test_a_plugin_that_is_missing_or_new_is_an_error_that_names_both_sides(parts: Path, fit: Fit) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"was written with other plugins: it has the state of monitor, not enabled now; it has no state of fresh "
        r"\(then: average, monitor; now: average, fresh\); enable the same ones, or write resume=\{'strict': False\}",
    ):
        fit(None, Average(), Fresh(), ckpt_path=parts)
    with pytest.raises(CheckpointError, match=r"state of average, monitor, not enabled now \(then: average, monitor; now: none\)"):
        fit(ckpt_path=parts)
    ran = fit(None, Average(), ckpt_path=parts, resume={"exclude": ["plugin:monitor"]})
    assert ran.run.resumption.skipped == ["plugin:monitor"]


def test_what_is_left_out_need_not_fit(saved: Path, fit: Fit) -> None:
    def other(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    ran = fit(optimized(other), ckpt_path=saved, resume={"exclude": ["optimizer", "scheduler"]})
    assert ran.run.position.step == 2 * BATCHES
    fit(ckpt_path=saved, resume={"exclude": ["data"]}, data=shuffled(30, 5))
    fewer = {"exclude": ["model", "optimizer", "scheduler", "data"]}
    fit(Smaller(), ckpt_path=saved, resume=fewer, data=DataLoader(data(20), batch_size=5), limit_val_batches=0)


def test_a_plugin_that_cannot_take_its_state_is_named(parts: Path, fit: Fit) -> None:
    class Picky(Monitor):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("best")

    Picky.__name__ = "Monitor"
    with pytest.raises(KeyError, match="best") as error:
        fit(None, Average(), Picky(), ckpt_path=parts)
    if sys.version_info >= (3, 11):
        assert "while plugin 'monitor' took its state from a checkpoint" in error.value.__notes__


@pytest.mark.parametrize("options", [{"max_steps": 7}, {"max_epochs": None, "max_steps": 7}])
def test_where_nothing_is_left_to_train_that_is_said_and_nothing_is_trained(options: Any, saved: Path, fit: Fit, caplog: Any) -> None:
    whole, ran = fit(), fit(ckpt_path=saved, **options)
    assert "nothing is left to train: max_epochs or max_steps is reached; raise it to go on" in caplog.text
    assert differing(ran.state["module"], load(saved)["module"]) == [] and "on_train_batch_start" not in [event[0] for event in ran.events]
    again(ran, max_steps=None, max_epochs=EPOCHS).same(whole)  # what was not trained can still be trained


def test_at_an_epochs_end_max_epochs_may_be_what_it_was(fit: Fit, tmp_path: Path, caplog: Any) -> None:
    whole = fit(None, saver(tmp_path, "on_train_epoch_end"))
    again = fit(ckpt_path=tmp_path / "001-on_train_epoch_end.safetensors")
    assert "nothing is left to train" in caplog.text
    again.same(whole)


# ---------------------------------------------------------------------- evaluation


def test_an_evaluation_takes_the_weights_of_a_checkpoint(saved: Path, trainer: Any, fit: Fit) -> None:
    class Constant(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("weight", self.net[0].weight.sum())

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return float(self.net[0].weight.sum())

    expected, loader = float(load(saved)["module"]["net.0.weight"].sum()), shuffled()
    for module in (Constant(), Constant()):
        made = trainer()
        assert made.validate(module, loader, ckpt_path=saved) == [{"weight": expected}]
        assert (made.run.resumed, made.run.position.step) == (None, 0)
    assert trainer().test(Constant(), loader, ckpt_path=str(saved)) == [{"weight": expected}]
    assert trainer().predict(Constant(), loader, ckpt_path=saved) == [expected] * BATCHES
    finder = Finder(saved.with_name("gone.safetensors"), changed(saved, "weights.safetensors", kind="weights"))
    assert trainer(plugins=[finder]).test(Constant(), loader, ckpt_path="best") == [{"weight": expected}]
    assert finder.asked[0][0] == "best"


def test_an_evaluation_after_a_fit_takes_what_the_fit_kept(fit: Fit, saved: Path) -> None:
    class Kept:
        @hookimpl
        def on_train_start(self, run: Any) -> None:
            run.best_path = run.last_path = saved

        @hookimpl
        def find_checkpoints(self) -> Any:
            raise AssertionError("the fit said which it was")

    ran = fit(None, Kept(), max_epochs=3)
    for which in ("best", "last"):
        ran.trainer.validate(ckpt_path=which)
        assert differing(dict(ran.run.module.state_dict()), load(saved)["module"]) == []


def test_an_evaluation_refuses_what_is_not_there_or_of_another_model(saved: Path, trainer: Any) -> None:
    with pytest.raises(CheckpointError, match="is of another model than Wider"):
        trainer().validate(Wider(), shuffled(), ckpt_path=saved)
    with pytest.raises(FileNotFoundError, match="ckpt_path='last': there is no checkpoint of an earlier run"):
        trainer(plugins=[Finder()]).validate(Net(), shuffled(), ckpt_path="last")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        trainer().validate(Net(), shuffled(), ckpt_path=saved.with_name("gone"))


# ---------------------------------------------------------------------- fit, and fit again


def again(ran: Ran, module: Any = None, **options: Any) -> Ran:
    """Another fit of the same trainer, with other limits."""
    seed_everything(77)
    for name, value in options.items():
        setattr(ran.trainer, name, value)
    ran.trainer.fit(module if module is not None else ran.run.module)
    return Ran(ran.trainer, ran.trace)


ENDS = ("on_train_start", "on_train_end")


def trained(events: list[Any]) -> list[Any]:
    return [event for event in events if event[0] not in ENDS]


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 3), (1, 3)])
def test_a_second_fit_with_more_epochs_is_one_longer_run(first: int, then: int, fit: Fit) -> None:
    options = {"log_every_n_steps": 1, "val_check_interval": 2}
    whole = fit(None, *remembering(), max_epochs=then, **options)
    part = fit(None, *remembering(), max_epochs=first, **options)
    identity = part.run.id, part.run.dir
    longer = again(part, max_epochs=then)
    longer.same(whole)
    assert trained(longer.events) == trained(whole.events)
    assert (longer.run.id, longer.run.dir) == identity and longer.run.resumption.path is None
    assert longer.run.seconds > part.run.seconds - 60


@pytest.mark.parametrize("steps", [3, 5, 8])
def test_a_second_fit_with_more_steps_goes_on_in_the_middle_of_an_epoch(steps: int, fit: Fit) -> None:
    options = {"log_every_n_steps": 1, "val_check_interval": 3}
    whole = fit(None, *remembering(), max_steps=9, **options)
    longer = again(fit(None, *remembering(), max_steps=steps, **options), max_steps=9)
    longer.same(whole)


class Stopper:
    """Asks for a stop at a step, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        if run.position.step == self.step:
            run.request_stop("enough for now")


@pytest.mark.parametrize("step", [3, 5])
def test_a_second_fit_goes_on_after_a_stop(step: int, fit: Fit) -> None:
    whole = fit(None, *remembering(), log_every_n_steps=1)
    part = fit(None, *remembering(), Stopper(step), log_every_n_steps=1)
    assert part.run.stop_reason == "enough for now" and part.run.position.step == step
    longer = again(part)
    longer.same(whole)
    assert longer.run.stop_reason == ""


def test_after_early_stopping_a_second_fit_with_more_patience_is_one_longer_run(fit: Fit) -> None:
    def early(patience: int) -> Any:
        return {"early_stopping": {"monitor": "val_loss", "patience": patience}}

    options = {"max_epochs": 6, "log_every_n_steps": 1}  # the last step of a training is always recorded
    whole, part = fit(None, early(3), **options), fit(None, early(1), **options)
    assert part.run.position.epoch < whole.run.position.epoch
    part.trainer.enabled["early_stopping"].patience = 3
    longer = again(part)
    assert differing(longer.state["module"], whole.state["module"]) == []
    assert (longer.metrics, trained(longer.events)) == (whole.metrics, trained(whole.events))


def test_a_fit_of_a_fresh_module_begins_anew_with_the_same_plugins(fit: Fit) -> None:
    whole = fit(None, *remembering())
    count, first = len(whole.events), whole.run
    seed_everything(5)
    whole.trainer.fit(Net())
    fresh = Ran(whole.trainer, whole.trace)
    fresh.same(Ran(whole.trainer, whole.trace))
    assert whole.events[count:] == whole.events[:count]
    assert differing(first.ended, fresh.state) == [] and fresh.run.id != first.id and fresh.run.dir != first.dir


def test_after_a_fit_that_failed_the_next_one_begins_anew(trainer: Any) -> None:
    class Failing:
        fails = False

        @hookimpl
        def on_train_batch_start(self, batch_idx: int) -> None:
            if self.fails and batch_idx == 3:
                raise ZeroDivisionError("once")

    failing, module = Failing(), Net()
    made = trainer(max_epochs=1, plugins=[failing])
    made.fit(module)
    made.max_epochs, failing.fails = 3, True
    with pytest.raises(ZeroDivisionError, match="once"):
        made.fit(module)
    failing.fails = False
    made.fit(module)
    assert (made.run.position.epoch, made.run.position.step, made.run.resumption) == (3, 3 * BATCHES, None)
    made.max_epochs = 4
    made.fit(module)
    assert made.run.position.step == 4 * BATCHES and made.run.resumption is not None


def test_a_second_fit_may_have_other_data_between_two_epochs(fit: Fit) -> None:
    part = fit(max_epochs=1)
    seed_everything(77)
    part.trainer.max_epochs = 2
    part.trainer.fit(part.run.module, shuffled(12, 3))
    assert (part.trainer.run.position.step, part.trainer.run.position.epoch) == (BATCHES + 4, 2)
    assert "data" in part.trainer.run.resumption.missing
    half = fit(max_steps=3)
    with pytest.raises(CheckpointError, match="the earlier run was written with other data or accumulation: batch size was 4, is 3"):
        half.trainer.fit(half.run.module, shuffled(12, 3))
