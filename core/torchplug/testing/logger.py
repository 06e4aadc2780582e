"""`check_logger`: what a logger must stand, from odd names to a process that is killed, tried on the logger itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torchplug.seed import preserved
from torchplug.testing import logged, outages
from torchplug.testing.case import Case
from torchplug.testing.check import Report
from torchplug.testing.stored import Read
from torchplug.testing.subject import NotApplicable, Problems

__all__ = ["CHECKS", "check_logger"]

Check = Callable[[Case], Problems]

CHECKS: tuple[Check, ...] = (
    logged.a_killed_run_that_goes_on_is_one_series,  # these two first: they fork, and a logger that was used may have made threads
    logged.two_ranks_write_once,
    logged.values_arrive_once_at_their_step,
    logged.odd_names_arrive,
    logged.numbers_that_are_not_finite_arrive,
    logged.empty_and_large_records_arrive,
    outages.an_outage_loses_nothing,
    outages.an_outage_to_the_end_is_said_and_made_up_for,
    outages.training_waits_for_no_slow_backend,
    logged.a_resumed_run_is_one_series,
    logged.fits_of_two_modules_stay_apart,
    logged.a_test_after_a_fit_is_added_to_it,
    logged.an_error_in_training_closes_it_as_failed,
)


class _Report(Report):
    def __str__(self) -> str:
        _, *lines = super().__str__().replace("  does not apply: ", "  NOT MADE: ").splitlines()
        return "\n".join([f"{self.plugin} as a logger: {len(self.passed)} of {len(CHECKS)} checks passed", *lines])


def check_logger(
    name: str, /, *, read: Read | None = None, outage: Callable[[], AbstractContextManager[Any]] | None = None, **options: Any
) -> Report:
    """Checks an installed logger on tiny runs that meet every kind of trouble, and compares what it stored with what was logged.

    In each of them the weights must be those of a run without the logger. Everything is written into temporary folders. It takes some
    seconds, and needs no pytest::

        def read(run_dir):
            for line in (run_dir / "text_logger" / "metrics.txt").read_text().splitlines():
                ...
                yield name, step, value

        def test_it_keeps_every_promise_of_a_logger():
            check_logger("text_logger", read=read)

    Args:
        name: the logger, as it is named in ``Trainer(plugins=[...])``.
        read: what is stored of the run in a folder: an iterable of (name, step, value), those of one name in the order in which they are
            stored. It is called when the run is over, and waits until what it reads is complete. Names that the logger spells in
            another way it translates back. None: checks that need it are not made, which the report says.
        outage: ``with outage():`` makes what the logger writes to fail. None: its `Backend` fails, or its ``log_metrics`` where it
            does not use `torchplug.tracking`.
        options: those that the logger is built with.

    Returns:
        What was checked and what was not; it is printed too. One that fails is in the error alone.

    Raises:
        AssertionError: it lists everything that is wrong, each with what to do.
        PluginError: there is no such plugin, or it is no logger.
    """
    with tempfile.TemporaryDirectory(prefix="torchplug-", ignore_cleanup_errors=True) as folder, preserved():
        case = Case(name, options, read, outage, Path(folder))
        report = _Report(case.label)
        for check in CHECKS:
            _made(check, case, report)
    report.judge()
    return report


def _once(problem: str, report: Report) -> str:
    """A problem, or the check that has told it already."""
    before = next((check for check, problems in report.failed.items() if problem in problems), None)
    return problem if before is None else f"the same as in {before!r}"


def _made(check: Check, case: Case, report: Report) -> None:
    """Makes one check. What it found before it could not go on counts too."""
    words, problems = check.__name__.replace("_", " "), list[str]()
    try:
        for problem in check(case):
            problems.append(problem)
    except NotApplicable as why:
        report.left_out[words] = str(why)
    except Exception as error:
        problems.append(f"the run of this check failed, and must not: {type(error).__name__}: {error}")
    if problems:
        report.failed[words] = [_once(problem, report) for problem in problems]
    elif words not in report.left_out:
        report.passed.append(words)
