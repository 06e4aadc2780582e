"""Logs how fast a run trains: samples, steps and tokens per second, and how much of the device's peak that takes."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchplug import Run, hookimpl

__all__ = ["Throughput"]


class _Mark(NamedTuple):
    """How far the run was at some time of its clock."""

    seconds: float
    step: int
    micro_step: int
    samples: int
    tokens: float


@dataclass(kw_only=True, eq=False)
class Throughput:
    """Logs rates at every logging step, under ``throughput/``: samples_per_sec, steps_per_sec (optimizer steps), tokens_per_sec.

    A rate is taken over a window of steps that ends at the logging step. Waiting for data counts, and so does everything else
    between two batches, but for validation, checkpoints that are written while training waits, and the time from one epoch to
    the next. The first optimizer step of a run is left out. With several ranks, samples, tokens and operations are those of all ranks.

    With peak_flops it logs flops_per_sec and mfu too: the floating-point operations of the model, forward and backward, as
    `torch.utils.flop_counter` counts those of the first batch while it is trained on, and their share of the peak (Chowdhery
    et al., "PaLM", 2022, appendix B). They are taken to grow with the number of samples in a batch. What activation
    checkpointing computes again counts again.

    Args:
        window_size: Length of the window in optimizer steps. It begins and ends at a logging step, so it may be longer by up to
            the Trainer's log_every_n_steps.
        tokens: What counts the tokens of a batch: a function of the batch that gives a number, or the name of a key or attribute
            of the batch: a number, or a tensor with one element for each token. None counts none.
        peak_flops: Floating-point operations per second that the device can do at best, in the precision of the run, such as
            989e12 for an H100 in bfloat16. None logs no utilisation.
    """

    window_size: int = 100
    tokens: Callable[[Any], Any] | str | None = None
    peak_flops: float | None = None

    _marks: deque[_Mark] = field(init=False, default_factory=deque, repr=False)
    _samples: int = field(init=False, default=0, repr=False)  # of this process
    _tokens: Any = field(init=False, default=0, repr=False)  # since the last mark; on the device, if that is where they are counted
    _step: int = field(init=False, default=0, repr=False)  # at the last mark, or where training began
    _paused: float = field(init=False, default=0.0, repr=False)  # seconds that the clock stood still
    _since: float | None = field(init=False, default=None, repr=False)  # when it was stopped, if it is
    _thread: int = field(init=False, default=0, repr=False)
    _counter: FlopCounterMode | None = field(init=False, default=None, repr=False)  # while the first batch is counted
    _flops: float | None = field(init=False, default=None, repr=False)  # of a sample, or of a batch if its size is not known
    _by_sample: bool = field(init=False, default=True, repr=False)

    before = "*"  # what others do at an epoch's end, or for a validation, is a pause
    observes = True  # an error of it ends the run all the same

    def __post_init__(self) -> None:
        if type(self.window_size) is not int or self.window_size < 1:
            raise ValueError(f"window_size must be a whole number of steps, at least 1, got {self.window_size!r}")
        if self.tokens is not None and not callable(self.tokens) and not (isinstance(self.tokens, str) and self.tokens):
            raise TypeError(f"tokens must be a function of the batch, or the name of a key or attribute of it, got {self.tokens!r}")
        peak = self.peak_flops
        if peak is not None and (isinstance(peak, bool) or not isinstance(peak, (int, float)) or not 0 < peak < math.inf):
            raise ValueError(f"peak_flops must be a number of operations per second above 0, or None, got {peak!r}")
        if peak is None:
            self.on_train_batch_start = None  # type: ignore[method-assign, assignment]  # nobody is called at every step

    # ------------------------------------------------------------------ the clock

    def _now(self, run: Run) -> float:
        """Seconds that were trained, when the device has done all that it was given."""
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return time.perf_counter() - self._paused

    def _pause(self, run: Run) -> bool:
        """Stops the clock; False if it stands still already, or this is not the thread that trains."""
        if self._since is not None or threading.get_ident() != self._thread:
            return False
        self._now(run)  # what the device still has to do is training
        self._since = time.perf_counter()
        return True

    def _go_on(self) -> None:
        if self._since is not None:
            self._paused += time.perf_counter() - self._since
            self._since = None

    # ------------------------------------------------------------------ hooks

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self._marks, self._samples, self._tokens, self._flops, self._counter = deque(), 0, 0, None, None
        self._step = run.position.step
        self._paused, self._since = 0.0, None
        self._thread = threading.get_ident()

    @hookimpl(wrapper=True)
    def on_train_epoch_start(self) -> Iterator[Any]:
        yield  # what others do here is a pause too
        self._go_on()

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Iterator[Any]:
        stopped = self._pause(run)
        try:
            return (yield)
        finally:
            if stopped:
                self._go_on()

    @hookimpl(wrapper=True)
    def save_checkpoint(self, run: Run) -> Iterator[Any]:
        stopped = self._pause(run)
        try:
            return (yield)
        finally:
            if stopped:
                self._go_on()

    @hookimpl
    def on_train_epoch_end(self, run: Run) -> None:
        self._pause(run)

    @hookimpl
    def on_train_batch_start(self) -> None:
        if self._flops is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]  # left by on_train_batch_end, or on_exception

    @hookimpl
    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any) -> None:
        self._samples += run.metrics.size
        if self.tokens is not None:
            self._tokens = self._tokens + self._count(batch)
        if self._counter is not None:
            self._measured(run, outputs)
        step = run.position.step
        if step != self._step and not (self._marks and step % run.options.log_every_n_steps):
            self._mark(run)

    @hookimpl
    def on_exception(self) -> None:
        self._stop_counting()

    # ------------------------------------------------------------------ numbers

    def _mark(self, run: Run) -> None:
        """Notes where the run is, and logs the rates over the window that ends here."""
        now, where, marks = self._now(run), run.position, self._marks
        tokens = (marks[-1].tokens if marks else 0.0) + float(self._tokens)
        marks.append(_Mark(now, where.step, where.micro_step, self._samples, tokens))
        self._step, self._tokens = where.step, 0
        while len(marks) > 2 and where.step - marks[1].step >= self.window_size:
            marks.popleft()
        first, last = marks[0], marks[-1]
        if last is first:
            return
        seconds = last.seconds - first.seconds
        rates: dict[str, float] = {"samples": last.samples - first.samples, "steps": last.step - first.step}
        if self.tokens is not None:
            rates["tokens"] = last.tokens - first.tokens
        if self._flops and self.peak_flops is not None:
            count = last.samples - first.samples if self._by_sample else last.micro_step - first.micro_step
            rates["flops"] = self._flops * count
            run.log("throughput/mfu", self._flops * count / seconds / self.peak_flops)
        for name, amount in rates.items():
            if name != "samples" or last.samples:  # nothing is said of batches whose size is not known
                ranks = 1 if name == "steps" else run.world_size  # what is logged is the mean over ranks
                run.log(f"throughput/{name}_per_sec", ranks * amount / seconds)

    def _measured(self, run: Run, outputs: Any) -> None:
        """The first batch is over: what it took is known, unless it was skipped."""
        counter = self._stop_counting()
        assert counter is not None
        if run.automatic and all(each is None for each in (outputs if isinstance(outputs, list) else [outputs])):
            return
        size, flops = run.metrics.size, counter.get_total_flops()
        self._by_sample = size > 0
        self._flops = flops / size if size else float(flops)
        if not flops:
            run.say_once(f"plugin {run.name_of(self)!r}: the first batch has no operation that torch can count, so mfu is not logged")

    def _stop_counting(self) -> FlopCounterMode | None:
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return counter

    def _count(self, batch: Any) -> Any:
        """The tokens of a batch: a number, or a tensor with one element that can be added up."""
        if isinstance(self.tokens, str):
            count = batch.get(self.tokens) if isinstance(batch, Mapping) else getattr(batch, self.tokens, None)
            if count is None:
                raise ValueError(
                    f"tokens={self.tokens!r} is no key or attribute of the batch, a {type(batch).__name__}; give a function of it"
                )
            if isinstance(count, Tensor) and count.dim():
                return count.numel()
        else:
            assert self.tokens is not None
            count = self.tokens(batch)
        if isinstance(count, Tensor):  # a sum of few bits would soon stand still, or begin anew
            return count.detach().to(torch.float32 if count.is_floating_point() else torch.int64)
        return count
