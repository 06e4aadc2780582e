"""When things are due: the end of training, accumulation windows, validation."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from torchplug.blame import note_place
from torchplug.options import duration

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["Limits", "Validation", "evaluating"]


class Limits:
    """When training is over, and which batches belong to one optimizer step."""

    def __init__(self, run: Run) -> None:
        options = run.options
        self.run, self.position = run, run.position
        self.max_epochs = options.max_epochs or math.inf
        self.max_steps = options.max_steps or sys.maxsize
        self.min_epochs, self.min_steps = options.min_epochs or 0, options.min_steps or 0
        self.timed = options.max_time is not None
        if options.max_time is not None:
            self.deadline = run.seconds + duration("max_time", options.max_time)
        self.record = options.log_every_n_steps
        self.progress = 0  # the micro step up to which optimizer steps were taken
        # a loss scaler finds its scale by skipping steps: that may take more than an epoch of few batches
        self.patience = 30 if options.precision == "16-mixed" else 0

    def reached(self) -> bool:
        """Whether no further epoch begins, and none is to be ended."""
        if self.position.batch and self.run.is_last_batch and not self.run.interrupted:
            return False  # a run that goes on after an epoch's last batch
        return self.position.epoch >= self.max_epochs or self.stop()

    def stop(self) -> bool:
        """Whether training ends now, between two optimizer steps."""
        if self.run.interrupted or self.position.step >= self.max_steps:
            return True
        if self.timed and self.run.seconds >= self.deadline:
            self.run.request_stop(f"max_time={self.run.options.max_time} is over")
        if not self.run.stop_reason:
            return False
        if self.position.epoch >= self.min_epochs and self.position.step >= self.min_steps:
            return True
        self.run.say_once(f"a stop was requested ({self.run.stop_reason}); it waits for min_epochs and min_steps")
        return False

    def next_due(self) -> float:
        """The micro step after which training may end, or values be recorded: a step takes one batch at least."""
        if self.timed:
            return self.position.micro_step
        steps = min(self.max_steps - self.position.step, self.record - self.position.step % self.record)
        return self.position.micro_step + max(steps, 1) - 1

    def set_accumulation(self) -> int:
        """Looks up how many batches an optimizer step takes in this epoch."""
        self.accumulate = self.run.batches_per_step(self.position.epoch)
        if self.run.automatic:  # in manual optimization the module says where a window ends
            self.run.window, self.run.window_ends = 1, True
        return self.accumulate

    def open_window(self, batch_idx: int) -> None:
        """Says for a batch how long its accumulation window is and whether it ends there."""
        run, place = self.run, batch_idx % self.accumulate
        run.window = self.accumulate
        if run.num_batches is not None:
            if batch_idx >= run.num_batches:
                run.say_once(f"the training loader's length is {run.num_batches}, but it gives more batches; its length is ignored")
                run.num_batches = None
            else:
                run.window = min(self.accumulate, run.num_batches - (batch_idx - place))
        run.window_ends = place == run.window - 1

    def stands_in(self, batch_idx: int) -> bool:
        """Whether a batch only keeps this rank in step with the others, and counts for nothing."""
        run = self.run
        assert run.share is not None
        run.metrics.stand_in = stands_in = not run.share(batch_idx)
        if stands_in:
            run.metrics.size = 0
        return stands_in

    def exhausted(self) -> None:
        """The loader has no more batches.

        Raises:
            ValueError: it had none at all.
        """
        run = self.run
        if self.position.batch == 0:
            raise ValueError(
                f"the training loader gave no batch in epoch {self.position.epoch}; is its data set empty or smaller than "
                "one batch with drop_last=True, or is it an iterator that is used up?"
            )
        if run.num_batches is not None and self.position.batch != run.num_batches:
            run.say_once(
                f"the training loader's length is {run.num_batches}, but it gave {self.position.batch} batches; its length is ignored"
            )
            run.num_batches = None
        run.exhausted = True

    def check_progress(self, first_step: int) -> None:
        """An epoch without one optimizer step trains nothing.

        Raises:
            RuntimeError: no optimizer step was taken since ``first_step``.
        """
        if self.position.step > first_step or not self.run.optimizers:
            self.progress = self.position.micro_step
            return
        more = self.position.step or self.position.epoch + 1 < self.max_epochs
        if more and self.position.micro_step - self.progress < self.patience * self.accumulate:
            return
        if self.run.module.automatic_optimization:
            raise RuntimeError(
                f"no optimizer step was taken in epoch {self.position.epoch}: every batch was skipped because training_step of "
                f"{type(self.run.module).__name__} returned None, or no gradient was finite; return the loss from training_step"
            )
        raise RuntimeError(
            f"no optimizer step was taken in epoch {self.position.epoch}: with automatic_optimization = False, training_step of "
            f"{type(self.run.module).__name__} must call self.manual_backward(loss) and step() on self.optimizers()"
        )


class Validation:
    """When validation is due during training."""

    def __init__(self, run: Run) -> None:
        options = run.options
        self.run, self.position = run, run.position
        self.enabled = bool(run.loaders.get("validate"))
        self.epochs = options.check_val_every_n_epoch
        self.every: int | None = None  # batches
        self.seconds: float | None = None
        self.within_epoch = False  # whether it can be due before the epoch's last batch
        interval = options.val_check_interval
        if not self.enabled:
            return
        if isinstance(interval, (int, float)):
            self._by_batches(interval)
        else:
            self.seconds = duration("val_check_interval", interval)
            self.since = run.seconds
        self.within_epoch = self.every is not None or self.seconds is not None

    def _by_batches(self, interval: int | float) -> None:
        batches = self.run.num_batches
        if isinstance(interval, int):
            if self.epochs is not None and batches is not None and interval > batches:
                raise ValueError(
                    f"val_check_interval={interval} is more than the {batches} training batches of an epoch; lower it, or write "
                    "check_val_every_n_epoch=None to count batches over the whole run"
                )
            self.every = interval
        elif self.epochs is None:
            raise ValueError(
                f"with check_val_every_n_epoch=None, val_check_interval must be a number of batches or a time, got {interval!r}"
            )
        elif interval < 1.0:
            if batches is None:
                raise ValueError(
                    f"val_check_interval={interval!r} is a fraction, but the length of the training loader is not known; "
                    "give a number of batches"
                )
            self.every = max(1, int(batches * interval))

    def _this_epoch(self) -> bool:
        return self.epochs is None or (self.position.epoch + 1) % self.epochs == 0

    def next_due(self) -> float:
        """The micro step after which validation may be due within the epoch."""
        if not self.within_epoch:
            return math.inf
        if self.every is None:
            return self.position.micro_step
        return self.position.micro_step + self.every - self._count() % self.every - 1

    def _count(self) -> int:
        """The batches that val_check_interval counts."""
        return self.position.micro_step if self.epochs is None else self.position.batch

    def due_after_batch(self) -> bool:
        """Whether to validate after the batch that was just finished."""
        if self.every is not None:
            due = self._count() % self.every == 0 and self._this_epoch()
        else:
            assert self.seconds is not None
            due = self.run.seconds - self.since >= self.seconds and self._this_epoch()
        return due

    def over(self) -> None:
        """A validation within the epoch is over: its own time does not count towards the next one."""
        if self.seconds is not None:
            self.since = self.run.seconds

    def due_after_epoch(self) -> bool:
        """Whether to validate when all batches of the epoch are done."""
        return self.enabled and not self.within_epoch and self._this_epoch()


@contextmanager
def evaluating(run: Run, stage: str) -> Iterator[None]:
    """Inside, every module is in eval mode and no graph is built; afterwards each is in the mode it was in."""
    modes = [(module, module.training) for module in run.module.modules()]
    before, run.position.stage = run.position.stage, stage
    run.module.eval()
    try:
        with torch.no_grad():
            yield
    except BaseException as error:
        note_place(error, run)
        raise
    finally:
        run.position.stage = before
        for module, mode in modes:
            if module.training is not mode:
                module.training = mode
