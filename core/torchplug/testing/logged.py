"""Checks of a logger: what is logged arrives, also in runs that are broken off, go on, or take several processes."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torchplug.distributed import Ranks
from torchplug.run import Run
from torchplug.testing.case import Case, Noisy, Script, Watch, go, trainer_of
from torchplug.testing.faults import Faults
from torchplug.testing.processes import Child, two_ranks
from torchplug.testing.stored import Value
from torchplug.testing.subject import NotApplicable, Problems

__all__ = [
    "a_killed_run_that_goes_on_is_one_series",
    "a_resumed_run_is_one_series",
    "a_test_after_a_fit_is_added_to_it",
    "an_error_in_training_closes_it_as_failed",
    "empty_and_large_records_arrive",
    "fits_of_two_modules_stay_apart",
    "numbers_that_are_not_finite_arrive",
    "odd_names_arrive",
    "two_ranks_write_once",
    "values_arrive_once_at_their_step",
]

SAVED, ENDED = 6, 10  # the steps after which a checkpoint is written, and a run broken off

ODD = (
    "a/b", "a//b", "/a", "a b", " a", "a.b", "..", "a:b", "a@b", "a(b", "a,b", 'a"b', "a\nb", "%s", "<b>", "größe", "損失 🎉",
    "half \ud800", "loss", "Loss", "step", "name", "value", "_x40_", "nul \0", "x" * 300, "x" * 299 + "y",
)  # fmt: skip


# ---------------------------------------------------------------------- what is logged


def values_arrive_once_at_their_step(case: Case) -> Problems:
    """Every value arrives once, at its step, and the run is the same as without the logger."""
    done = case.fit()
    yield from case.judged(done)


def odd_names_arrive(case: Case) -> Problems:
    """Names with slashes, spaces, signs and letters of all kinds, long ones, and such as differ in one letter or its case only, all
    arrive, or a warning has the name of the one that does not."""

    def log(run: Run) -> None:
        for number, name in enumerate(ODD):
            run.log(name, run.position.step + number / 64)

    done = case.fit({3: log, 5: log})
    yield from case.judged(done, said=done.said)


def numbers_that_are_not_finite_arrive(case: Case) -> Problems:
    """NaN and infinities arrive as what they are, or a warning says that they do not; what stands beside them is not moved."""
    odd = {"before": 1.5, "nan": math.nan, "inf": math.inf, "minus inf": -math.inf, "tiny": 1e-30, "large": -1e30, "behind": 2.5}

    def log(run: Run) -> None:
        for name, value in odd.items():
            run.log(name, value)

    done = case.fit({3: log, 5: lambda run: run.log("nan", 0.5)})
    yield from case.judged(done, said=done.said)


def empty_and_large_records_arrive(case: Case) -> Problems:
    """A record with nothing in it changes nothing, and one of a thousand metrics arrives."""

    def log_nothing(run: Run) -> None:
        place = run.position
        run.hooks.log_metrics(run, {}, place.stage, place.step, place.epoch, place.samples, run.seconds)

    def log_much(run: Run) -> None:
        for number in range(1000):
            run.log(f"many/{number}", number / 64)

    done = case.fit({3: log_nothing, 5: log_much})
    yield from case.judged(done)


# ---------------------------------------------------------------------- runs that go on


def a_resumed_run_is_one_series(case: Case) -> Problems:
    """A run that is stopped and goes on from a checkpoint before that has one series, that of a run which was never stopped."""
    root = case.root()
    first = case.fit(_broken_off(root, lambda run: run.request_stop("check_logger asks for it")), root=root)
    yield from case.amiss(first, "stopped")
    yield from _gone_on(case, root)


def a_killed_run_that_goes_on_is_one_series(case: Case) -> Problems:
    """A run that is killed by SIGKILL and goes on from a checkpoint has one series, that of a run which was never killed."""
    if not hasattr(signal, "SIGKILL"):
        raise NotApplicable("there is no SIGKILL on this system")
    root = case.root()
    child = Child(_die, case.elsewhere, root, timeout=120)
    try:
        child.wait()
        if child.killed_by != "SIGKILL":
            child.result("the run that was to be killed")
            yield "the run was over before it could be killed"
    finally:
        child.close()
    yield from _gone_on(case, root)


def _die(case: Case, root: Path) -> None:
    """What the process does that is killed: so late that its logger could store something, so early that the end is missing."""

    def kill(run: Run) -> None:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    case.fit(_broken_off(root, kill), root=root)


def _broken_off(root: Path, end: Callable[[Run], None]) -> Script:
    """A run that saves and, some steps later, comes to its end."""
    return {SAVED: lambda run: run.save_checkpoint(root / "saved.safetensors"), ENDED: end}


def _gone_on(case: Case, root: Path) -> Problems:
    """The second half, and what is stored of both."""
    second = case.fit(root=root, start=root / "saved.safetensors")
    yield from case.judged(second, wanted=case.whole.values)


def fits_of_two_modules_stay_apart(case: Case) -> Problems:
    """A logger that is used for a fit, the same fit with more epochs, and the fit of another module: two runs that know nothing of each
    other."""
    watch, faults = Watch(), Faults()
    trainer, module = trainer_of(case.root(), {case.name: faults.put_into(case.logger())}, watch), Noisy()
    trainer.max_epochs = 1
    go(trainer, watch, faults, module)
    trainer.max_epochs = 2
    first = go(trainer, watch, faults, module)
    folder = first.run.dir
    troubles = list(case.judged(first))
    yield from troubles
    yield from case.judged(go(trainer, watch, faults, Noisy()))
    yield from case.compare(folder, watch.runs[folder]) if not troubles else ()  # the second must leave it as it was


def a_test_after_a_fit_is_added_to_it(case: Case) -> Problems:
    """A test after a fit goes on where that ended: its values arrive, and those of the fit stay."""
    watch, module, faults = Watch(), Noisy(), Faults()
    trainer = trainer_of(case.root(), {case.name: faults.put_into(case.logger())}, watch)
    yield from case.amiss(go(trainer, watch, faults, module))
    yield from case.judged(go(trainer, watch, faults, module, "test"))


def an_error_in_training_closes_it_as_failed(case: Case) -> Problems:
    """An error in training comes out as it is; the logger has what was logged before, closes as failed, and holds no file."""
    error = ValueError("check_logger breaks the training off")

    def fail(run: Run) -> None:
        raise error

    done = case.fit({ENDED: fail})
    if done.error is not error:
        yield f"the run ended with {done.error!r} in place of the error of training: let no exception out of on_fit_end and on_run_end"
    if case.follows and done.faults.seen[-2:] != ["finish failed", "close"]:
        seen = ", ".join(done.faults.seen[-2:]) or "nothing"
        yield f"its backend was told {seen} at the end, not to finish as failed and to close: call Tracker's on_run_end with the status"
    yield from (f"{path} is still open after the run: close it when the run ends" for path in _open_files(done.run.dir))
    yield from case.judged(done, "failed")


def _open_files(folder: Path) -> Problems:
    """The files under ``folder`` that this process holds, where the system tells."""
    for each in Path("/proc/self/fd").glob("*") if sys.platform == "linux" else ():
        try:
            path = os.readlink(each)
        except OSError:  # closed by now
            continue
        if Path(path).is_relative_to(folder.resolve()):
            yield path


def two_ranks_write_once(case: Case) -> Problems:
    """In a run of two processes every value is there once, and training is what it is without the logger."""
    (problems, folder, logged, undelivered), (others, *_) = two_ranks(_take_part, case.elsewhere, case.root(), timeout=120)
    yield from problems
    yield from (f"rank 1: {problem}" for problem in others)
    if undelivered:
        yield undelivered
    elif not problems:
        yield from case.compare(folder, logged)


def _take_part(case: Case, root: Path) -> tuple[list[str], Path, list[Value], str]:
    """What a rank does: a run without the logger, and one with it."""
    watches = [Watch(), Watch()]
    bare = go(trainer_of(root, Ranks(timeout="60s"), watches[0]), watches[0], Faults(), Noisy())
    faults = Faults()
    trainer = trainer_of(root, Ranks(timeout="60s"), {case.name: faults.put_into(case.logger())}, watches[1])
    done = go(trainer, watches[1], faults, Noisy())
    problems = list(case.amiss(done, bare=bare))
    return problems, done.run.dir, done.values, done.undelivered if case.follows and not problems else ""
