"""Checks of how a plugin treats the process that it works in: what it leaves behind, and what it costs."""

from __future__ import annotations

import gc
import os
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchplug.hookspecs import hookimpl
from torchplug.run import Run
from torchplug.testing.subject import SETTINGS, NotApplicable, Practice, Problems, Subject
from torchplug.testing.surroundings import Surroundings
from torchplug.testing.tiny import tiny_trainer

__all__ = ["a_step_costs", "global_state_is_put_back", "memory_does_not_grow", "nothing_is_read_back_between_logging_steps"]


class _Breaks(Practice):
    """A module that fails in the middle of a run."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3:
            raise RuntimeError("the module of this check raises here")
        return super().training_step(batch, batch_idx)


# ---------------------------------------------------------------------- global state


def global_state_is_put_back(subject: Subject) -> Problems:
    """After a run, and after one that failed, the process is as it was before.

    That is grad mode, deterministic and other switches of torch, default dtype, threads of torch, signal handlers, environment,
    working directory, output streams, log handlers, warning filters, garbage collection, open files and live threads.
    """
    subject.one_process()
    found = {_place(text): f"after a run {text}" for text in subject.whole.left}
    with subject.whole.surroundings.without():
        for when, module in (("a run", Practice()), ("a run that failed", _Breaks())):
            before = Surroundings()
            trainer = tiny_trainer(subject.named, **{**SETTINGS, "root_dir": subject.root()})  # who is still there while it is looked
            with suppress(Exception):  # of the module, or what somebody made of it
                trainer.fit(module)
            found = {_place(text): f"after {when} {text}" for text in before.changes()} | found
            if found:
                break
    yield from (f"{text}; put it back in teardown, or in the finally of a wrapper" for text in found.values())


def _place(text: str) -> str:
    """What it is that has changed."""
    return text.partition(" has changed")[0]


# ---------------------------------------------------------------------- between logging steps

QUIET, STEPS = 50, 65  # logging steps are 50 apart; what happens from step FIRST to step LAST is between two of them
FIRST, LAST = 6, 46
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "allclose", "masked_select", "unique")
METHODS = ("tolist", "numpy", "cpu", "__array__")


class _ReadBacks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Who read a value back from the device, by the step in which it happened."""

    def __init__(self, package: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.package, self.step, self.found = package, 0, list[tuple[int, str, str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.note(name.strip("_"))
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        frames = [each for each in traceback.extract_stack() if self.package in each.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].line}" if frames else "~ in what it calls"
        self.found.append((self.step, what, where))

    @hookimpl
    def on_train_batch_start(self, run: Run) -> None:
        self.step = run.position.step + 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, methods that dispatch nothing on a CPU are seen too."""
        real = {name: getattr(Tensor, name) for name in METHODS}

        def seen(name: str) -> Callable[..., Any]:
            def method(tensor: Tensor, *args: Any, **options: Any) -> Any:
                self.note(name)
                return real[name](tensor, *args, **options)

            return method

        for name in METHODS:
            setattr(Tensor, name, seen(name))
        try:
            with self:
                yield
        finally:
            for name, method in real.items():
                setattr(Tensor, name, method)


def nothing_is_read_back_between_logging_steps(subject: Subject) -> Problems:
    """Between two logging steps no value is read from the device: each such read stops a GPU that runs ahead of the program."""
    subject.one_process()
    package = "bundle" if subject.bundle else subject.target.__module__.partition(".")[0]
    reads = []
    for fit in (subject.bare, subject.fit):
        reads.append(_ReadBacks(f"{os.sep}{package}"))
        with reads[-1].watching():
            fit(reads[-1], module=Practice(train=STEPS), log_every_n_steps=QUIET, max_epochs=1)
    bare, own = (Counter((step, what) for step, what, _ in each.found if FIRST <= step <= LAST) for each in reads)
    places = {(step, what): where for step, what, where in sorted(reads[1].found, key=lambda found: found[2], reverse=True)}
    for what, step in {what: step for step, what in sorted((own - bare).keys(), reverse=True)}.items():
        yield (
            f"at step {step}, between two logging steps, a value is read from the device by {what} ({places[step, what]}): keep tensors, "
            "detached, and read them in log_metrics or where run.position.step % run.options.log_every_n_steps == 0"
        )


class _Population:
    """How many objects and tensors are alive at some steps."""

    def __init__(self) -> None:
        self.at: dict[int, tuple[int, int]] = {}

    @hookimpl
    def on_train_batch_start(self, run: Run) -> None:
        if run.position.step in (FIRST, LAST):
            gc.collect()
            alive = gc.get_objects()
            self.at[run.position.step] = (len(alive), sum(issubclass(type(each), Tensor) for each in alive))

    def growth(self) -> tuple[int, int] | None:
        if len(self.at) < 2:
            return None
        (objects, tensors), (more, others) = self.at[FIRST], self.at[LAST]
        return more - objects, others - tensors


def memory_does_not_grow(subject: Subject) -> Problems:
    """Between two logging steps the number of live objects and tensors does not grow with the number of steps."""
    subject.one_process()
    grown = []
    gc.collect()
    gc.freeze()  # what was there before is not counted
    for fit in (subject.bare, subject.fit):
        population = _Population()
        fit(population, module=Practice(train=STEPS), log_every_n_steps=QUIET, max_epochs=1)
        grown.append(population.growth())
    bare, own = grown
    if bare is None or own is None:
        raise NotApplicable(f"with these options the run has no {LAST} steps")
    for what, without, with_it in zip(("objects", "tensors"), bare, own, strict=True):
        if with_it - without >= LAST - FIRST:
            yield (
                f"from step {FIRST} to {LAST}, between two logging steps, there are {with_it} more {what} (without it {without}): "
                "keep a running sum or the last value instead of one for each step, and detach what is kept"
            )


# ---------------------------------------------------------------------- cost

WINDOW, WINDOWS, ROUNDS = 20, 4, 3


class _Clock:
    """Seconds of a step, one value for each window of steps."""

    after = "*"

    def __init__(self) -> None:
        self.times: list[float] = []

    @hookimpl
    def on_train_batch_end(self, run: Run) -> None:
        if run.position.micro_step % WINDOW == 0:
            self.times.append(time.perf_counter())

    def windows(self) -> list[float]:
        return [(end - begin) / WINDOW for begin, end in zip(self.times, self.times[1:], strict=False)]


def a_step_costs(subject: Subject) -> Problems:
    """What it adds to a step is measured, side by side with a bare run: the medians over windows of steps. It is nothing where it is less
    than what lies between the quartiles of the bare windows."""
    subject.one_process()
    found: dict[str, list[float]] = {"bare": [], "own": []}
    for _ in range(ROUNDS):
        for name, fit in (("bare", subject.bare), ("own", subject.fit)):
            clock = _Clock()
            fit(clock, module=Practice(train=WINDOW * (WINDOWS + 1)), max_epochs=1, log_every_n_steps=QUIET)
            found[name] += clock.windows()
    if not found["own"]:
        raise NotApplicable(f"with these options the run has no {2 * WINDOW} batches")
    bare, own = (1e6 * statistics.median(found[name]) for name in ("bare", "own"))
    first, _, third = statistics.quantiles(found["bare"], n=4)
    noise = 1e6 * (third - first)
    subject.cost = own - bare if own - bare > noise else 0.0, bare, noise
    yield from ()
