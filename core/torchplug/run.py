"""What a run knows: position, module, optimizers, metrics, stop requests. Hooks receive it, the loop writes it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchplug import files
from torchplug.blame import add_note
from torchplug.data import length
from torchplug.metrics import Metrics
from torchplug.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from torchplug.agreement import Agreement
    from torchplug.hookspecs import Hooks
    from torchplug.module import Module
    from torchplug.optimizers import ManualOptimizer, Scheduler
    from torchplug.state import Resumption
    from torchplug.stream import Stream

__all__ = ["Position", "Run", "located"]

logger = logging.getLogger("torchplug")


def located(path: str | os.PathLike[str]) -> Path | str:
    """``path`` as hooks get it: a ``Path``, or the text of a URL."""
    return str(path) if "://" in str(path) else Path(path)


@dataclass(slots=True)
class Position:
    """Where a run stands.

    Args:
        stage: what the loop is doing: train, sanity, validate, test or predict; empty in between.
        epoch: index of the current epoch from 0, counted up after ``on_train_epoch_end``.
        batch: training batches finished in this epoch.
        step: finished optimizer steps of the run. With several optimizers a batch in which any of them stepped counts once.
        micro_step: training batches finished in the run.
        samples: training samples seen in the run.
    """

    stage: str = ""
    epoch: int = 0
    batch: int = 0
    step: int = 0
    micro_step: int = 0
    samples: int = 0


@dataclass(eq=False, kw_only=True, slots=True)
class Run:
    """One call of fit, validate, test or predict, as plugins see it.

    A plugin may call the methods, set ``device`` and ``accumulation`` in ``setup``, ``best_path`` and ``last_path`` when it keeps
    checkpoints, and put lines into ``report``. Everything else is read.

    Args:
        options: the Trainer's arguments.
        module: what is trained.
        datamodule: the data module, if there is one.
        work: fit, validate, test or predict.
        id: the same for all processes and loggers of the run.
        dir: where everything of this run is written.
        rank: this process among ``world_size``, from 0 on.
        world_size: processes that take part.
        local_rank: this process among those on the same machine.
        device: where module and batches are.
        optimizers: what ``configure_optimizers`` returned, in order.
        manual_optimizers: the same for manual optimization: their ``step`` is announced and counted.
        optimizer_steps: finished steps of each optimizer.
        schedulers: learning-rate schedulers with their turns.
        automatic: whether the loop calls backward and the optimizers, or the module does.
        turn: which optimizer the loop trains with, -1 for several in turn, or for none in manual optimization.
        step_schedulers: those among them that the loop steps after an optimizer step.
        epoch_schedulers: those that it steps at the end of an epoch; in manual optimization the module steps them all.
        loaders: the loaders of each stage (train, validate, test, predict).
        limits: how many batches of each loader are used, None for all.
        num_batches: training batches in an epoch, None if that is not known.
        exhausted: whether the training loader said that it has no more batches in this epoch.
        accumulation: batches of one optimizer step by the index of the epoch; None: ``accumulate_grad_batches`` in all.
        window: batches in the current accumulation window, as far as the loader's length tells.
        window_ends: whether the current batch ends it.
        contributions: losses that were added up in the current window, for each optimizer.
        closures: whether each optimizer evaluates the loss itself.
        counted: the micro step whose update was counted last.
        scaler: the loss scaler of half precision.
        training: whether the loop is training, so that state is whole at boundaries alone.
        stop_reason: why training was asked to stop, empty if it was not.
        stopped_by: which plugin asked, empty if none did.
        interrupted: the signal that asked the run to end, such as "SIGTERM"; empty if none did.
        attention: whether something has to be done at the next boundary.
        validated: whether the validation that was due after the last batch is done.
        resumed: the file that this run goes on from.
        resumption: what was loaded from it, skipped, and missing.
        stream: the training data and the place in them; a fit alone has them.
        loaded: what of a checkpoint is still to be put in place when training begins.
        reload: asks for loaders and optimizers once more, with the random numbers of the first time, and puts them into the run:
            for a plugin that has changed what they depend on, in ``on_run_start`` or ``tune``.
        ended: the state in which training ended, from which the next ``fit`` of the same module goes on.
        best_path: the best checkpoint so far.
        last_path: the newest checkpoint.
        agreement: where several ranks take part, what they agree on; a strategy makes it when the ranks have found each other.
        alone: whether this rank works by itself for a while, in a trial that may fail on one of them: nothing is exchanged.
        together: whether a checkpoint is written by all ranks, each its part, so that every one of them calls ``save_checkpoint``.
        share: where the data are dealt out to ranks, by the index of the batch in the epoch what its loss is multiplied with, so
            that the mean over ranks is the mean over samples; 0 for a batch that only keeps the ranks in step.
        journal: the file with everything that happens to the run, set by the plugin that writes it.
        report: lines that are shown when the run is over, by who wrote them.
    """

    options: Settings
    module: Module
    datamodule: Any = None
    work: str = "fit"
    id: str = ""
    dir: Path = Path()
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    position: Position = field(default_factory=Position)
    metrics: Metrics = field(init=False)
    optimizers: list[Optimizer] = field(default_factory=list)
    optimizer_steps: list[int] = field(default_factory=list)
    manual_optimizers: list[ManualOptimizer] = field(default_factory=list)
    schedulers: list[Scheduler] = field(default_factory=list)
    loaders: dict[str, list[Any]] = field(default_factory=dict)
    limits: dict[str, list[int | None]] = field(default_factory=dict)
    num_batches: int | None = None
    exhausted: bool = False
    accumulation: Callable[[int], int] | None = None
    window: int = 1
    window_ends: bool = True
    contributions: list[int] = field(default_factory=list)
    closures: list[bool] = field(default_factory=list)
    automatic: bool = True
    turn: int = -1
    step_schedulers: list[Scheduler] = field(default_factory=list)
    epoch_schedulers: list[Scheduler] = field(default_factory=list)
    counted: int = -1
    stop_reason: str = ""
    stopped_by: str = ""
    interrupted: str = ""
    attention: bool = False
    validated: bool = False
    resumed: Path | str | None = None
    resumption: Resumption | None = None
    stream: Stream = field(init=False, repr=False)
    reload: Callable[[], None] = field(init=False, repr=False)
    loaded: dict[str, Any] | None = field(default=None, repr=False)
    ended: dict[str, Any] | None = field(default=None, repr=False)
    scaler: torch.amp.GradScaler | None = field(default=None, repr=False)
    training: bool = False
    best_path: Path | str | None = None
    last_path: Path | str | None = None
    journal: Path | None = None
    report: dict[str, str] = field(default_factory=dict)
    collect: Callable[[Run, bool], dict[str, Any]] = field(init=False, repr=False)
    plugins: dict[str, Any] = field(default_factory=dict)  # what is enabled: name -> object
    packages: dict[str, str] = field(default_factory=dict)  # name -> distribution and version
    hooks: Hooks = field(init=False, repr=False)
    quiet: Hooks = field(init=False, repr=False)  # the same, with events that reach no plugin
    agreement: Agreement | None = field(default=None, repr=False)
    alone: bool = False
    together: bool = False
    share: Callable[[int], float] | None = field(default=None, repr=False)
    _asking: Callable[[], str] = field(default=str, repr=False)
    _started: float = field(default_factory=time.monotonic)
    _said: set[str] = field(default_factory=set)
    _put_off: list[tuple[str, Callable[[], Any]]] = field(default_factory=list, repr=False)
    _announced: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.position)

    def go_on_from(self, earlier: Run) -> None:
        """Makes this run a part of an earlier one: a test after a fit is recorded in the same place at the fit's last step."""
        self.id, self.dir = earlier.id, earlier.dir
        self.best_path, self.last_path = earlier.best_path, earlier.last_path
        self._started = earlier._started
        for name in ("epoch", "batch", "step", "micro_step", "samples"):
            setattr(self.position, name, getattr(earlier.position, name))

    def place(self, state: dict[str, Any]) -> None:
        """Takes over identity, position and time from a checkpoint that this run goes on from."""
        self.id = state["run"]["id"]
        self.set_seconds(state["run"]["seconds"])
        for name in ("epoch", "batch", "step", "micro_step", "samples"):
            setattr(self.position, name, state["position"][name])

    def __getstate__(self) -> dict[str, Any]:
        """A run that is pickled, or copied, is what a later run of the same module can go on from."""
        names = ("module", "work", "id", "dir", "position", "ended", "best_path", "last_path", "_started")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Run.__init__(self, options=Settings(), module=state["module"])
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def seconds(self) -> float:
        """Time since the run started. Where several ranks take part it is what they agreed on last, the same for all: what is
        decided by it is decided by all of them."""
        return self.agreement.seconds if self.agreement is not None else time.monotonic() - self._started

    @property
    def clock(self) -> float:
        """Time since the run started, as this process has it."""
        return time.monotonic() - self._started

    def set_seconds(self, seconds: float) -> None:
        """Sets the clock: so much time has passed since the run started."""
        self._started = time.monotonic() - seconds

    def lengths(self, stage: str) -> list[int | None]:
        """How many batches each loader of ``stage`` has, None for one that does not tell."""
        return [length(loader) for loader in self.loaders[stage]]

    def count_batches(self, stage: str) -> int | None:
        """The batches of all loaders of ``stage`` that are used, None if one of them does not tell."""
        total = 0
        for count, limit in zip(self.lengths(stage), self.limits[stage], strict=True):
            if count is None:  # a limit alone says only how many there are at most
                return None
            total += count if limit is None else min(count, limit)
        return total

    @property
    def purpose(self) -> str:
        """What ``setup`` and ``teardown`` prepare for: tuning needs what a fit needs."""
        return "fit" if self.work == "tune" else self.work

    @property
    def is_last_batch(self) -> bool:
        """Whether all training batches of the epoch are done: what comes now belongs to the epoch's end."""
        return self.exhausted or self.position.batch == self.num_batches

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps that this run will take, for schedulers that must know; None if that is open."""
        options = self.options
        batches, epochs = self.num_batches, options.max_epochs
        by_epochs = None
        if batches is not None and epochs is not None:
            by_epochs = sum(-(-batches // self.batches_per_step(epoch)) for epoch in range(epochs))
        limits = [limit for limit in (by_epochs, options.max_steps) if limit is not None]
        return min(limits) if limits else None

    def batches_per_step(self, epoch: int) -> int:
        """How many batches an optimizer step takes in an epoch, given by its index from 0."""
        return self.options.accumulate_grad_batches if self.accumulation is None else self.accumulation(epoch)

    def weighed(self, loss: Tensor) -> Tensor:
        """What of the loss of the current batch gradients are computed for, so that they add up to those of the mean."""
        loss = loss if self.window == 1 else loss / self.window
        share = 1.0 if self.share is None else self.share(self.position.batch)
        return loss if share == 1.0 else loss * share

    def name_of(self, plugin: Any) -> str:
        """Under which name ``plugin`` is enabled: its instance's own, which keys its state and its line in the report."""
        return next(name for name, other in self.plugins.items() if other is plugin)

    def request_stop(self, reason: str) -> None:
        """Asks training to end after the step that is running; ``min_epochs`` and ``min_steps`` are kept."""
        if self.stop_reason:
            return
        if self.agreement is not None:
            self.agreement.wish(reason, self._asking())
        else:
            self.stop(reason, self._asking())

    def stop(self, reason: str, plugin: str) -> None:
        """What a request to stop does, when all ranks know of it."""
        self.stop_reason, self.stopped_by, self.attention = reason, plugin, True
        self.hooks.on_stop_requested(self, reason, plugin)

    def interrupt(self, name: str) -> None:
        """A signal asks the run to end; called from its handler."""
        if self.agreement is not None:
            self.agreement.signal = self.agreement.signal or name
        elif not self.interrupted:
            self.interrupted, self.attention = name, True

    @property
    def asked_to_end(self) -> str:
        """The signal that came to this run, whether it came in time to end it or not; empty if none did."""
        return self.interrupted or (self.agreement.signal if self.agreement is not None else "")

    def agree(self) -> None:
        """Ranks that came here together tell each other what they were asked for. Where there is one process nothing happens."""
        if self.agreement is not None:
            self.agreement.reach(self)

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives on rank 0; an error of it is raised on all ranks."""
        if self.world_size == 1:
            return make()
        value, error = None, None
        if self.rank == 0:
            try:
                value = make()
            except Exception as raised:
                error = raised
        value, words = self.hooks.broadcast(self, (value, "" if error is None else f"{type(error).__name__} on rank 0: {error}"))
        if error is not None:
            raise error
        if words:
            raise RuntimeError(words)
        return value

    def log(self, name: str, value: Any, **options: Any) -> None:
        """Records a metric; the arguments are those of ``Module.log``."""
        self.module.log(name, value, **options)

    def log_figure(self, name: str, figure: Any) -> None:
        """Hands a matplotlib figure to the loggers.

        Raises:
            TypeError: it is something else.
        """
        if not hasattr(figure, "savefig"):
            raise TypeError(f"log_figure takes a matplotlib Figure, got {type(figure).__name__}; draw it with plt.figure() or Axes.imshow")
        self.hooks.log_figure(self, name, figure, self.position.step)

    def log_text(self, name: str, text: str) -> None:
        """Hands a text to the loggers."""
        self.hooks.log_text(self, name, text, self.position.step)

    def log_artifact(self, path: str | Path, name: str | None = None) -> None:
        """Hands a file to the loggers that keep files."""
        self.hooks.log_artifact(self, Path(path), name or Path(path).name)

    # ------------------------------------------------------------------ boundaries and checkpoints

    def at_boundary(self, call: Callable[[], Any]) -> None:
        """Calls ``call`` as soon as the state of the run is whole: between two optimizer steps, when every plugin has handled
        the event; at once where no training is going on."""
        if not self.training:
            call()
            return
        self._put_off.append((self._asking(), call))
        self.attention = True

    def settle(self) -> None:
        """The loop is at a boundary: what was put off is done; a signal is announced first."""
        if self.interrupted and not self._announced:
            self._announced = True
            self.hooks.on_stop_requested(self, self.interrupted, "")
        while self._put_off:
            plugin, call = self._put_off.pop(0)
            try:
                call()
            except BaseException as error:
                if plugin:  # it stands in no hook, so the traceback does not tell who asked for it
                    add_note(error, f"asked for by {plugin!r}, and put off until the state was whole")
                raise
        self.attention = bool(self.stop_reason)  # whoever calls this looks at `interrupted` next

    def state(self, weights_only: bool = False) -> dict[str, Any]:
        """Everything that the run can change, as nested dicts and lists of tensors and plain values; whole at a boundary alone.

        The tensors are those of the run itself: write or copy them before training goes on.

        Args:
            weights_only: only what it takes to use the module: weights, hyperparameters, versions, position.
        """
        return self.collect(self, weights_only)

    def save_checkpoint(self, path: str | Path, reason: str = "asked for", metrics: dict[str, float] | None = None) -> Path | str:
        """Writes the state of the run to ``path`` at the next boundary, and tells everybody. Returns the path."""
        path = located(path)

        def save() -> None:
            written = self.hooks.save_checkpoint(self, path, self.state())
            self.hooks.on_checkpoint_saved(self, written, metrics or {}, reason)

        self.at_boundary(save)
        return path

    def remove_checkpoint(self, path: str | Path, reason: str) -> None:
        """Deletes a local checkpoint, after what is still to be saved, and tells everybody."""

        def remove() -> None:
            if self.rank == 0:
                files.remove(Path(path))
            self.hooks.on_checkpoint_removed(self, Path(path), reason)

        self.at_boundary(remove)

    def say_once(self, text: str, level: int = logging.WARNING) -> None:
        """A line for the user, once in a run and from one process only."""
        if text not in self._said and self.rank == 0:
            self._said.add(text)
            logger.log(level, text)
