"""A run that is killed anywhere and resumed is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import torchplug
from torchplug import Run, Trainer, hookimpl
from torchplug.checkpoint import load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")]

BATCHES, EPOCHS, WINDOW, VALIDATE = 7, 2, 2, 3
OTHER = (
    ".time", ".run", ".versions", ".plugins.journal",  # which has more records after a resume
    ".data.drawn", ".data.exhausted", ".data.counted", ".data.ended", ".data.lasting",  # how far a loader is ahead of training
)  # fmt: skip
Place = tuple[str, "int | None", int]  # a hook, how many training batches are done, None for any number, and which of its calls it is
Kills = tuple[Place, ...]  # of one process after the other


# ---------------------------------------------------------------------- a run in which everything is random


class Augmented(Dataset):
    """Samples (x, y, index) that are different each time, by three generators."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(samples)
        self.x = torch.randn(samples, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = self.x[index] * (1 + random.random()) + numpy.random.normal() + torch.randn(4)
        return x, x.sum(0, keepdim=True), index


class Meter:
    """A metric object: what it has added up is in no state dict."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def update(self, value: Tensor) -> None:
        self.total, self.count = self.total + value, self.count + 1

    def compute(self) -> Tensor:
        return self.total / max(self.count, 1)


def spread(values: Tensor) -> Tensor:
    return values.max() - values.min()


@dataclass(frozen=True)
class Plan:
    """One process: a run from the beginning, or the rest of one.

    Args:
        root: the folder of the run.
        workers: of the training loader.
        persistent: whether they live longer than an epoch; the validation loader has some too then.
        own: whether the loader has a generator of its own.
        background: how the checkpoint plugin saves.
        average: a plugin that averages the weights, with its options.
        saves: in place of the checkpoint plugin, where `run.save_checkpoint` is called.
        kill: where the process kills itself.
        resume: what to go on from.
        turn: how many processes of this run there were before.
    """

    root: Path
    workers: int = 0
    persistent: bool = False
    own: bool = False
    background: bool = False
    average: Mapping[str, Any] | None = None
    saves: tuple[Place, ...] = ()
    kill: Place | None = None
    resume: str | Path | None = None
    turn: int = 0


class Net(torchplug.Module):
    """Dropout, two schedulers, a metric object; writes down what every batch was."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 8})
        self.plan = plan
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.meter = Meter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.meter.update(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("meter", self.meter, on_step=False, on_epoch=True)
        self.log("spread", loss, on_step=False, on_epoch=True, reduce_fx=spread)
        if torch.is_grad_enabled():  # a pass for the statistics of BatchNorm is no training
            line = [self.current_epoch, batch_idx, index.tolist(), digest(x), digest(loss.detach())]
            with open(self.plan.root / f"batches-{self.plan.turn}.jsonl", "a") as file:
                print(json.dumps(line), file=file)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        by_step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}, {"scheduler": by_epoch, "interval": "epoch"}]

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(7) if self.plan.own else None
        return self._loader(4 * BATCHES - 1, 4, generator=generator)

    def val_dataloader(self) -> DataLoader:
        return self._loader(6, 2)

    def _loader(self, samples: int, batch_size: int, **options: Any) -> DataLoader:
        plan = self.plan
        if plan.workers and (plan.persistent or samples > 6):
            options |= {"num_workers": plan.workers, "multiprocessing_context": "fork", "persistent_workers": plan.persistent}
        return DataLoader(Augmented(samples), batch_size=batch_size, shuffle=True, **options)


def at(hook: str, batches: int | None, count: int, action: Any) -> Any:
    """A plugin that calls ``action(run)`` at the ``count``-th call of ``hook`` with so many training batches done, or however many."""
    calls = []

    def called(self: Any, run: Run) -> None:
        if batches in (None, run.position.micro_step):
            calls.append(hook)
            if len(calls) == count:
                action(run)

    return type(f"At_{hook}_{batches}_{count}", (), {hook: hookimpl(called)})()


def kill(run: Run) -> None:
    os.killpg(0, signal.SIGKILL)


def train(plan: Plan) -> None:
    """What a process does: trains, and leaves behind what came of it."""
    checkpoints = {"checkpoint": {"monitor": "val_loss", "top_k": 2, "every_n_steps": 1, "background": plan.background}}
    plugins: list[Any] = ["journal", {"early_stopping": {"monitor": "val_loss", "patience": 99}}]
    for number, (hook, batches, count) in enumerate(plan.saves):
        plugins.append(at(hook, batches, count, lambda run, number=number: run.save_checkpoint(run.dir / f"{number}.safetensors")))
    if plan.average is not None:
        plugins.append(dict(plan.average))
    if plan.kill is not None:
        plugins.append(at(*plan.kill, kill))
    trainer = Trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=WINDOW, val_check_interval=VALIDATE, num_sanity_val_steps=2, log_every_n_steps=3,
        seed=5, accelerator="cpu", root_dir=plan.root, plugins=plugins if plan.saves else [*plugins, checkpoints],
    )  # fmt: skip
    trainer.fit(Net(plan), ckpt_path=plan.resume)
    run = trainer.run
    assert run is not None
    outcome = {
        "id": run.id, "dir": str(run.dir), "resumed": None if run.resumed is None else str(run.resumed),
        "best": str(run.best_path), "last": str(run.last_path), "state": leaves(run.state()),
        "metrics": {name: value.hex() for name, value in trainer.metrics.items()},
    }  # fmt: skip
    (plan.root / "outcome.json").write_text(json.dumps(outcome))


# ---------------------------------------------------------------------- what is compared


def digest(tensor: Tensor) -> str:
    return hashlib.sha1(tensor.contiguous().numpy().tobytes()).hexdigest()[:12]


def leaves(value: Any, path: str = "") -> dict[str, str]:
    """Every value in a state by its path, tensors as what their bytes come to; without what may differ."""
    if isinstance(value, Tensor):
        return {path: f"{value.dtype} {tuple(value.shape)} {digest(value)}"}
    if isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        found: dict[str, str] = {}
        for name, part in parts:
            if f"{path}.{name}" not in OTHER:
                found.update(leaves(part, f"{path}.{name}"))
        return found
    return {path: repr(value)}


def events(folder: Path) -> list[dict[str, Any]]:
    """The journal of a run as if there had been one process."""
    found: list[dict[str, Any]] = []
    starting = False
    for number, line in enumerate((folder / "journal.jsonl").read_text().splitlines()):
        record = json.loads(line.replace(str(folder), "DIR"))
        assert record.pop("n") == number
        for name in ("time", "seconds", "id", "dir", "options", "plugins", "versions"):
            record.pop(name, None)
        starting = starting or (record["event"] == "on_run_start" and bool(found))
        if not starting:
            found.append(record)
        starting = starting and record["event"] != "on_train_start"
    return found


@dataclass
class Outcome:
    """What a run left behind."""

    values: dict[str, Any]
    batches: list[list[Any]]
    events: list[dict[str, Any]]
    files: dict[str, dict[str, str]]
    turns: list[list[Any]]


def outcome(plan: Plan) -> Outcome:
    values = json.loads((plan.root / "outcome.json").read_text())
    folder = Path(values.pop("dir"))
    values = json.loads(json.dumps(values).replace(str(folder), "DIR"))
    turns = []
    for turn in range(plan.turn + 1):
        file = plan.root / f"batches-{turn}.jsonl"
        turns.append([json.loads(line) for line in file.read_text().splitlines()] if file.exists() else [])
    files = {str(path.relative_to(folder)): leaves(load(path)) for path in folder.rglob("*.safetensors")}
    files |= {str(path.relative_to(folder)): {} for path in folder.rglob("*.tmp")}
    return Outcome(values, turns[-1], events(folder), files, turns)


def boundary(batches: int) -> int:
    """After how many batches the state was whole for the last time when so many are done."""
    epochs, rest = divmod(batches, BATCHES)
    return epochs * BATCHES + rest - rest % WINDOW


def differences(whole: Outcome, ended: Outcome, starts: range) -> list[str]:
    """Where a run that was stopped differs from the whole one.

    Args:
        starts: after how many batches its last process may have begun.
    """
    found = []
    for number, turn in enumerate(ended.turns):
        start = BATCHES * turn[0][0] + turn[0][1] if turn else EPOCHS * BATCHES
        if turn != whole.batches[start : start + len(turn)]:
            found.append(f"process {number}: the batches from {start} on are others")
    if EPOCHS * BATCHES - len(ended.turns[-1]) not in starts:
        found.append(f"the last process trained {len(ended.turns[-1])} batches, not the rest from {starts} on")
    if ended.values["resumed"] is None and len(ended.turns[-1]) < EPOCHS * BATCHES:
        found.append("it began anew")
    for name in ("metrics", "best", "last"):
        if whole.values[name] != ended.values[name]:
            found.append(f"{name}: {ended.values[name]}, not {whole.values[name]}")
    found += _other("event", dict(enumerate(whole.events)), dict(enumerate(ended.events)))
    states = {"at the end": whole.values["state"], **whole.files}, {"at the end": ended.values["state"], **ended.files}
    found += [f"file {name}: only there in one of them" for name in states[0].keys() ^ states[1].keys()]
    for name in states[0].keys() & states[1].keys():
        found += _other(name, states[0][name], states[1][name])
    return found


def _other(what: str, whole: dict[Any, Any], ended: dict[Any, Any]) -> list[str]:
    """The first few entries in which two dicts differ."""
    other = [key for key in {**whole, **ended} if whole.get(key, "nothing") != ended.get(key, "nothing")]
    return [f"{what} {key}: {ended.get(key, 'nothing')}, not {whole.get(key, 'nothing')}" for key in other[:5]]


# ---------------------------------------------------------------------- killed anywhere


ANY, SOME = range(EPOCHS * BATCHES), (0, 2, 4, 6, 7, 9, 11, 12)  # batches


@pytest.mark.parametrize(
    ("plan", "then"),
    [
        pytest.param(Plan(Path()), 0, id="no workers"),
        pytest.param(Plan(Path(), background=True, own=True), 0, id="no workers, saved behind training, own generator"),
        pytest.param(Plan(Path(), workers=2, background=True), 2, id="2 workers, saved behind training"),
        pytest.param(Plan(Path(), workers=2), 1, id="2 workers, then 1"),
        pytest.param(Plan(Path(), workers=2, persistent=True, own=True), 2, id="2 persistent workers, own generator"),
    ],
)
def test_a_run_killed_after_any_batch_goes_on_bit_for_bit(plan: Plan, then: int, tmp_path: Path, processes: Any) -> None:
    kills = [(("on_train_batch_start", k, 1),) for k in ANY]
    compare(replace(plan, root=tmp_path), [*kills, (("on_train_end", EPOCHS * BATCHES, 1),)], processes, then)


@pytest.mark.parametrize("background", [False, True], ids=["saved at once", "saved behind training"])
def test_a_run_killed_anywhere_between_two_batches_goes_on_bit_for_bit(background: bool, tmp_path: Path, processes: Any) -> None:
    places = [
        ("on_train_epoch_start", 7, 1), ("on_before_optimizer_step", 1, 1), ("on_after_optimizer_step", 5, 1), ("on_scheduler_step", 6, 1),
        ("on_validation_start", 3, 1), ("on_validation_batch_end", 3, 2), ("on_validation_batch_end", 6, 1), ("on_validation_end", 10, 1),
        ("on_validation_batch_end", 13, 3), ("on_validation_end", 13, 1), ("on_checkpoint_saved", 4, 1), ("on_checkpoint_saved", 6, 1),
        ("on_checkpoint_saved", 11, 1), ("on_checkpoint_removed", None, 1), ("on_train_epoch_end", 7, 1), ("on_train_epoch_end", 14, 1),
        ("log_metrics", 7, 1), ("on_fit_end", 14, 1),
    ]  # fmt: skip
    compare(Plan(tmp_path, background=background, own=True), [(place,) for place in places], processes)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_kill_in_the_same_epoch_changes_nothing(workers: int, tmp_path: Path, processes: Any) -> None:
    kills = []
    for first in SOME if workers else ANY:
        last = BATCHES * (first // BATCHES + 1) - 1
        kills.append((("on_train_batch_start", first, 1), ("on_train_batch_start", min(first + 1 + first % 3, last), 1)))
    compare(Plan(tmp_path, workers=workers, background=workers > 0), kills, processes)


@pytest.mark.parametrize(
    ("average", "workers"),
    [
        ({"ema": {"decay": 0.8, "warmup": True}}, 2),
        ({"ema": {"decay": 0.8, "every_n_steps": 3, "buffers": "recompute"}}, 0),
        ({"swa": {"start": 0, "every_n_steps": 2, "lr": 0.003, "anneal_epochs": 2, "validate": True}}, 0),
        ({"swa": {"start": 0, "lr": 0.02, "buffers": "average"}}, 2),
    ],
    ids=["ema", "ema, statistics anew", "swa by steps", "swa by epochs"],
)
def test_a_run_that_averages_its_weights_goes_on_bit_for_bit(
    average: Mapping[str, Any], workers: int, tmp_path: Path, processes: Any
) -> None:
    places = [("on_train_batch_start", batches, 1) for batches in ANY]
    places += [("on_validation_batch_end", 6, 2), ("on_validation_end", 10, 1), ("on_train_epoch_end", 7, 1), ("on_train_end", 14, 1)]
    compare(Plan(tmp_path, workers=workers, background=workers > 0, average=average), [(place,) for place in places], processes)
    (name,) = average
    kept = load(next(tmp_path.glob("whole/Net/version_0/**/last.safetensors")))["plugins"][name]
    assert kept["updates"] and kept["average"] and not torch.equal(kept["average"]["net.0.weight"], kept["own"]["net.0.weight"])


def compare(plan: Plan, kills: Sequence[Kills], processes: Any, then: int | None = None) -> None:
    """Lets one run end by itself, and others be killed in several ways, resumed from "last" each time, and compares what came of them.

    Args:
        plan: of all of them; in its root each gets a folder.
        kills: for each of them where its processes are killed, one after the other.
        then: how many workers the last process has.
    """
    whole = replace(plan, root=plan.root / "whole")
    runs = [replace(plan, root=plan.root / str(number)) for number in range(len(kills))]
    for each in (whole, *runs):
        each.root.mkdir()
    turns = len(kills[0])
    for turn in range(turns):
        runs = [replace(each, kill=own[turn], turn=turn, resume="last") for each, own in zip(runs, kills, strict=True)]
        assert processes.run([partial(train, each) for each in runs]) == [-signal.SIGKILL] * len(runs)
    runs = [replace(each, kill=None, turn=turns, resume="last", workers=plan.workers if then is None else then) for each in runs]
    assert processes.run([partial(train, each) for each in (whole, *runs)]) == [0] * (len(runs) + 1)
    expected = outcome(whole)
    found = []
    for own, each in zip(kills, runs, strict=True):
        batches = own[-1][1]
        if batches is None:
            starts = range(EPOCHS * BATCHES + 1)
        else:  # one save may have been in flight
            starts = range(boundary(max(boundary(batches) - 1, 0)) if plan.background else boundary(batches), boundary(batches) + 1)
        found += [f"killed at {own}: {line}" for line in differences(expected, outcome(each), starts)]
    assert not found, "\n".join(["", *found])


# ---------------------------------------------------------------------- saved anywhere


def test_a_checkpoint_asked_for_anywhere_is_one_of_the_next_boundary(tmp_path: Path, processes: Any) -> None:
    saves = (
        ("on_train_start", 0, 1), ("train_step", 0, 1), ("on_before_zero_grad", 3, 1), ("on_validation_batch_end", 3, 1),
        ("train_step", 4, 1), ("on_validation_batch_end", 6, 2), ("on_validation_end", 6, 1), ("on_train_batch_end", 7, 1),
        ("on_train_epoch_end", 7, 1), ("on_train_epoch_start", 7, 1), ("on_validation_batch_end", 10, 3), ("train_step", 13, 1),
        ("on_train_epoch_end", 14, 1),
    )  # fmt: skip
    places = [0, 2, 4, 4, 6, 6, 6, 7, 7, 9, 11, 14, 14]  # batches done at the next boundary
    whole = Plan(tmp_path / "whole", workers=2, saves=saves)
    whole.root.mkdir()
    assert processes.run([partial(train, whole)]) == [0]
    expected = outcome(whole)
    expected.events = [each for each in expected.events if each["event"] != "on_checkpoint_saved"]
    folder = Path("Net", "version_0")
    resumed = []
    for number in range(len(saves)):
        root = tmp_path / str(number)
        shutil.copytree(whole.root, root)
        resumed.append(replace(whole, root=root, turn=1, resume=root / folder / f"{number}.safetensors"))
    assert processes.run([partial(train, each) for each in resumed]) == [0] * len(resumed)
    found = []
    for save, place, each in zip(saves, places, resumed, strict=True):
        ended = outcome(each)
        ended.events = [event for event in ended.events if event["event"] != "on_checkpoint_saved"]  # that of the file itself is abandoned
        found += [f"saved at {save}: {line}" for line in differences(expected, ended, range(place, place + 1))]
    assert not found, "\n".join(["", *found])
