"""Checks of a logger: what it writes to fails, for a while or for good, or takes long."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from torchplug.run import Run
from torchplug.testing.case import NEVER, STEPS, Case, Done
from torchplug.testing.faults import Faults
from torchplug.testing.subject import Problems

__all__ = ["an_outage_loses_nothing", "an_outage_to_the_end_is_said_and_made_up_for", "training_waits_for_no_slow_backend"]

DOWN, UP = 4, 10  # the steps after which an outage begins and ends
SLOW = 0.25  # seconds that a slow backend takes for a record
SLACK = 2.0  # seconds that a busy machine may add
DEAR = 0.1  # seconds in which a logger must have written a record


def an_outage_loses_nothing(case: Case) -> Problems:
    """What it writes to fails for a while: training goes on, and nothing is lost, nothing there twice. A logger without a backend is
    switched off at worst, has what came before, and it is said."""
    faults = Faults()
    with ExitStack() as stack:

        def begin(run: Run) -> None:
            if case.follows:
                faults.wait_for_metrics()
            _cut(case, faults, stack)

        def wait(count: int) -> Callable[[Run], None]:
            met = case.outage is None and case.follows
            return lambda run: faults.wait_for(count) if met else time.sleep(0.2)

        def end(run: Run) -> None:
            faults.down = False
            stack.close()
            faults.meant = False

        done = case.fit({DOWN: begin, DOWN + 2: wait(2), DOWN + 4: wait(3), UP: end}, faults=faults)
    before = [point for point in done.values if point[1] < DOWN]
    yield from case.judged(done, off=not case.follows, wanted=before if done.off else None, said=done.said if done.off else ())


def an_outage_to_the_end_is_said_and_made_up_for(case: Case) -> Problems:
    """What it writes to fails and does not come back: the run ends well and in time, and says what is missing. Of a logger with a
    backend the journal has all of it, and `torchplug replay` sends it."""
    faults = Faults()
    with ExitStack() as stack:
        done = case.fit({DOWN: lambda run: _cut(case, faults, stack)}, faults=faults, close_timeout=5.0)
    yield from case.amiss(done, off=not case.follows)
    limit = min(5.0, getattr(case.logger(), "close_timeout", 5.0)) + SLACK
    if done.closing > limit:
        yield f"the end of the run took {done.closing:.1f} s: wait no longer than close_timeout for what does not answer"
    if not any(case.name in line and ("not everything" in line or "switched off" in line or "missing" in line) for line in done.said):
        yield "nothing said that values are missing: put it into run.report, as torchplug.tracking does, or let the error out of the hook"
    if case.follows:
        yield from _replayed(case, done)


def training_waits_for_no_slow_backend(case: Case) -> Problems:
    """What it writes to takes long: no training step waits, the end of the run waits for close_timeout at most, and what is missing is
    sent later. A logger without a backend takes little of each step."""
    if not case.follows:
        times = sorted(case.fit().faults.times)
        took = times[len(times) // 2] if times else 0.0
        if took > DEAR:
            yield f"a record takes {took:.2f} s of training: hand it to a thread, as torchplug.tracking does"
        return
    faults = Faults()
    faults.pause = SLOW
    done = case.fit(faults=faults, close_timeout=1.0)
    yield from case.amiss(done)
    trained = done.watch.trained - done.watch.began
    if trained > SLOW * STEPS / 2:
        yield f"{STEPS} steps took {trained:.1f} s with a backend that takes {SLOW} s for a record: let no hook wait for the backend"
    limit = min(1.0, getattr(case.logger(), "close_timeout", 1.0)) + SLACK
    if done.closing > limit:
        yield f"the end of the run took {done.closing:.1f} s with close_timeout=1.0: join the thread with what is left of close_timeout"
    yield from _replayed(case, done)


def _cut(case: Case, faults: Faults, stack: ExitStack) -> None:
    """From now on what the logger writes to fails, as the author says or in front of its backend."""
    if case.outage is not None:
        faults.meant = True
        stack.enter_context(case.outage())
    else:
        faults.down = True


def _replayed(case: Case, done: Done) -> Problems:
    """The journal has everything; sent from there, twice, it is there once."""
    for _ in range(2):
        faults = Faults()
        try:
            case.replay(done.run, faults)
        except Exception as error:
            told = faults.trouble or f"it raised {type(error).__name__}: {error}"
            advice = NEVER if told.startswith("send") else "connect must go on where an earlier process ended"
            yield f"torchplug replay failed: {told}: {advice}"
            return
    yield from case.compare(done.run.dir, done.values)
