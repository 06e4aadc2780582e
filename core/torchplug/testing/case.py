"""A logger that is tried, the runs in which that happens, and what came of them: for `check_logger`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchplug.discovery import PluginError, find
from torchplug.hookspecs import hookimpl
from torchplug.plugins import build
from torchplug.run import Run
from torchplug.testing.faults import PATIENCE, Faults, impatient
from torchplug.testing.stored import Read, Value, differences, folded, named
from torchplug.testing.subject import NotApplicable, Problems, quiet
from torchplug.testing.tiny import TinyModule, tiny_trainer
from torchplug.tracking import Place, deliver, first
from torchplug.trainer import Trainer

__all__ = ["NEVER", "STEPS", "Case", "Done", "Noisy", "Script", "Watch", "go", "trainer_of"]

BATCHES, EPOCHS = 8, 2
STEPS = BATCHES * EPOCHS

NEVER = "raise Refused for what can never be stored, or write it in another way"
SELDOM = "raise only where trying again may help"

Script = Mapping[int, Callable[[Run], Any]]
"""What is done after a step, by its number."""


class Noisy(TinyModule):
    """A tiny module that draws random numbers, so that a logger which draws some too is seen in its weights. Not every step logs the
    same names."""

    def __init__(self) -> None:
        super().__init__(train=BATCHES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        if self.global_step % 5 == 4:
            self.log("noise/seldom", self.global_step + 0.5)
        return super().training_step((x + 0.01 * torch.randn_like(x), y), batch_idx)


class Watch:
    """What runs recorded, and what happens in them besides.

    Args:
        script: what is done after a step, by its number.
    """

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or {}
        self.runs: dict[Path, list[Value]] = {}
        self.status = ""
        self.began = self.trained = 0.0

    @hookimpl
    def on_train_start(self) -> None:
        self.began = time.monotonic()

    @hookimpl
    def log_metrics(self, run: Run, metrics: dict[str, float], step: int) -> None:
        self.runs.setdefault(run.dir, []).extend((name, step, value) for name, value in metrics.items())

    @hookimpl
    def on_train_batch_end(self, run: Run) -> None:
        if run.position.step in self.script:
            self.script[run.position.step](run)

    @hookimpl
    def on_fit_end(self) -> None:
        self.trained = time.monotonic()

    @hookimpl
    def on_run_end(self, status: str) -> None:
        self.status = status


@dataclass
class Done:
    """What came of a fit.

    Args:
        trainer: that did it.
        watch: what was recorded.
        faults: what stood between.
        error: that came out of it.
        said: warnings, and the lines at the end of the run.
        closing: seconds from the end of training to the end of the fit.
        weights: of the trained module.
    """

    trainer: Trainer
    watch: Watch
    faults: Faults
    error: BaseException | None
    said: list[str]
    closing: float
    weights: list[Tensor]

    @property
    def run(self) -> Run:
        assert self.trainer.run is not None
        return self.trainer.run

    @property
    def values(self) -> list[Value]:
        """What was logged."""
        return self.watch.runs.get(self.run.dir, [])

    @property
    def off(self) -> str:
        """How the logger was switched off, if it was."""
        return next((line for line in self.said if "was switched off: " in line), "")

    @property
    def undelivered(self) -> str:
        """Why the backend does not have everything; empty if it was told to finish."""
        if self.faults.finished:
            return ""
        if self.faults.trouble:
            return f"{self.faults.trouble}, so nothing after it arrived: {NEVER if 'send raised' in self.faults.trouble else SELDOM}"
        told = next((line for line in self.said if "not everything was delivered" in line), "finish of the backend was not called")
        return f"{told}: send what is there, then finish"


@dataclass
class Case:
    """A logger, and how it is tried.

    Args:
        name: under which it is enabled.
        options: with which it is built.
        read: what it stored of a run.
        outage: makes what it writes to fail.
        folder: for its runs.
    """

    name: str
    options: dict[str, Any]
    read: Read | None
    outage: Callable[[], AbstractContextManager[Any]] | None
    folder: Path
    _count: int = field(init=False, default=0)

    @cached_property
    def label(self) -> str:
        """How it is named.

        Raises:
            PluginError: it is not installed, or is no logger.
        """
        label = find(self.name).label
        if not hasattr(self.logger(), "backend") and not hasattr(self.logger(), "log_metrics"):
            raise PluginError(f"{label} is no logger: it has neither a backend (torchplug.tracking.Tracker) nor the hook log_metrics")
        return label

    def logger(self) -> Any:
        """The logger, built anew, in a hurry."""
        plugin = build([{self.name: self.options}])[0].plugin  # what it requires comes behind it
        if hasattr(plugin, "interval"):
            plugin.interval = 0.02
        return plugin

    @cached_property
    def follows(self) -> bool:
        """Whether it has a thread and a backend, as torchplug.tracking gives them, or writes by itself."""
        return hasattr(self.logger(), "backend")

    @cached_property
    def whole(self) -> Done:
        """A run that nothing happens to, without the logger."""
        watch = Watch()
        return go(trainer_of(self.root(), watch), watch, Faults(), Noisy())

    @property
    def elsewhere(self) -> Case:
        """The same for another process, where nothing is read: what the author gave may be functions that cannot be sent there."""
        return replace(self, read=None, outage=None)

    def root(self) -> Path:
        """A new folder for runs."""
        self._count += 1
        return self.folder / str(self._count)

    def fit(
        self, script: Script | None = None, *, root: Path | None = None, start: Path | None = None, faults: Faults | None = None,
        close_timeout: float | None = None,
    ) -> Done:  # fmt: skip
        """Fits with the logger, from the beginning or from a checkpoint."""
        plugin, faults, watch = self.logger(), faults or Faults(), Watch(script)
        if close_timeout is not None and hasattr(plugin, "close_timeout"):
            plugin.close_timeout = min(close_timeout, plugin.close_timeout)
        trainer = trainer_of(root or self.root(), {self.name: faults.put_into(plugin)}, watch)
        return go(trainer, watch, faults, Noisy(), ckpt_path=start)

    def replay(self, run: Run, faults: Faults) -> None:
        """What ``torchplug replay`` does."""
        assert run.journal is not None
        plugin = faults.put_into(self.logger())
        deliver(plugin.backend(), Place(run.journal, first(run.journal), run.dir, plugin.folder(run.dir, self.name)))

    # ------------------------------------------------------------------ what is wrong

    def amiss(self, done: Done, status: str = "finished", off: bool = False, bare: Done | None = None) -> Problems:
        """What a logger must never do to a run, whatever happens to it: each fault with what to do."""
        if done.error is not None and status != "failed":
            yield (
                f'the run ended with {type(done.error).__name__}: {done.error}: write on_error = "disable" in the class, and let no '
                "exception out of a thread of its own"
            )
            return
        if done.watch.status != status:
            yield f"the run ended as {done.watch.status!r}, not {status!r}: ask no run to stop"
        if done.off and not off:
            yield f"it failed: {done.off}: handle in that hook what the check did"
        bare = bare or self.whole
        if status == "finished" and not _equal(done.weights, bare.weights):
            yield "the trained weights are not those of a run without it: touch no module, optimizer, gradient and no random number"

    def judged(
        self, done: Done, status: str = "finished", *, off: bool = False, wanted: Iterable[Value] | None = None, said: Sequence[str] = ()
    ) -> Problems:  # fmt: skip
        """What a run came to, and what was stored of it. Where the cause of all that is missing is known, it is said alone."""
        yield from self.amiss(done, status, off)
        if (done.error is not None and status != "failed") or (done.off and not off):
            return
        if self.follows and done.undelivered:
            yield done.undelivered
            return
        found = list(self.compare(done.run.dir, done.values if wanted is None else wanted, said))
        if found and done.faults.trouble:
            yield f"{done.faults.trouble}; it was tried again: leave nothing half done behind when you raise"
        yield from found

    def compare(self, folder: Path, wanted: Iterable[Value], said: Sequence[str] = ()) -> Problems:
        """How what was stored of the run in ``folder`` differs from what was logged, unless it was ``said`` with the metric's name.

        Raises:
            NotApplicable: nobody can read it.
        """
        if self.read is None:
            raise NotApplicable(
                "what it stored was not compared, give read=, a function of the run's folder that gives (name, step, value)"
            )
        try:
            found = [(str(name), int(step), float(value)) for name, step, value in self.read(folder)]
        except Exception as error:
            yield f"read({str(folder)!r}) failed with {type(error).__name__}: {error}: was anything stored?"
            return
        yield from folded(each for each in differences(wanted, found) if not any(named(each.name, line) for line in said))


def trainer_of(root: Path, *plugins: Any) -> Trainer:
    """A trainer of `STEPS` steps that records each of them."""
    return tiny_trainer(*plugins, root_dir=root, max_epochs=EPOCHS, log_every_n_steps=1, seed=1)


def go(trainer: Trainer, watch: Watch, faults: Faults, module: Noisy, work: str = "fit", **given: Any) -> Done:
    """Fits, or tests, and returns when threads that it started have ended too."""
    error, before = None, set(threading.enumerate())
    with impatient(), quiet() as said:
        try:
            getattr(trainer, work)(module, **given)
        except Exception as raised:
            error = raised
        closing = time.monotonic() - watch.trained
        faults.over.set()
        for thread in set(threading.enumerate()) - before:
            if thread.name == "torchplug tracking":
                thread.join(PATIENCE)
    if trainer.run is not None:
        said += [f"{name}: {line}" for name, line in trainer.run.report.items()]
    return Done(trainer, watch, faults, error, said, closing, [each.detach().clone() for each in module.parameters()])


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(some, others, strict=True))
