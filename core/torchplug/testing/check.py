"""``check_plugin``: everything that a plugin promises, checked on tiny runs."""

from __future__ import annotations

import gc
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchplug.discovery import PluginError
from torchplug.seed import preserved
from torchplug.testing import company, errors, form, manners, training
from torchplug.testing.hermetic import scanned_once
from torchplug.testing.subject import Check, NotApplicable, Subject, quiet

__all__ = ["CHECKS", "Report", "check_plugin"]

CHECKS: tuple[Check, ...] = (
    form.entry_point_and_names_agree,
    form.it_can_be_built_with_these_options,
    form.hooks_have_their_signatures,
    form.every_option_is_documented,
    form.every_option_is_checked,
    training.parameters_are_finite,
    manners.global_state_is_put_back,
    form.built_twice_it_is_two_objects,
    training.runs_of_one_seed_are_equal,
    training.an_observer_leaves_training_as_it_is,
    training.its_state_survives_a_checkpoint,
    training.a_killed_run_goes_on_as_if_nothing_had_happened,
    manners.nothing_is_read_back_between_logging_steps,
    manners.memory_does_not_grow,
    form.it_goes_to_other_processes,
    company.it_works_with_every_other_plugin,
    company.it_trains_on_two_ranks,
    errors.an_error_in_each_hook_is_named,
    manners.a_step_costs,
)
# if one of these fails, the others would only tell of it again
FIRST = (
    form.entry_point_and_names_agree,
    form.it_can_be_built_with_these_options,
    form.hooks_have_their_signatures,
    training.parameters_are_finite,
    manners.global_state_is_put_back,
)


@dataclass
class Report:
    """What came of the checks of a plugin.

    Args:
        plugin: its name, package and version.
        passed: the checks that found nothing wrong.
        failed: what is wrong, by check.
        left_out: checks that do not apply, with the reason.
        notes: what else is worth knowing.
        cost: microseconds that it adds to a training step; None if that was not measured.
        bare: microseconds of the same step without it.
        noise: microseconds by which bare steps differ; a cost below that is 0.
    """

    plugin: str
    passed: list[str] = field(default_factory=list)
    failed: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cost: float | None = None
    bare: float | None = None
    noise: float | None = None

    def judge(self) -> None:
        """Prints itself if nothing is wrong.

        Raises:
            AssertionError: something is.
        """
        if self.failed:
            raise AssertionError(str(self))
        print(self)

    def __str__(self) -> str:
        lines = [f"{self.plugin}: {len(self.passed)} check{'s' * (len(self.passed) != 1)} passed"]
        lines += [f"  does not apply: {check} ({why})" for check, why in self.left_out.items()]
        lines += [f"  note: {note}" for note in self.notes]
        if self.cost is not None:
            costs = f"{self.cost:.1f} us per step" if self.cost else f"less than the noise of this machine, {self.noise:.1f} us per step"
            lines.append(f"  costs {costs} (a bare step of the tiny module takes {self.bare:.1f} us)")
        for check, problems in self.failed.items():
            lines += [f"  FAILED: {check}", *(f"    {problem}" for problem in problems)]
        return "\n".join(lines)


def check_plugin(name: str, **options: Any) -> Report:
    """Checks an installed plugin: its package, its options, its hooks, and what it does to runs of a tiny module.

    The module is a `TinyModule`, with parameters ``layer.weight`` and ``layer.bias`` and the metrics ``train_loss`` and ``val_loss``;
    its batches are of 2 samples. Everything is written into temporary folders. It takes a few seconds, and needs no pytest::

        def test_it_keeps_every_promise_of_a_plugin():
            check_plugin("early_stopping", monitor="val_loss")

    Args:
        name: the plugin, as it is named in ``Trainer(plugins=[...])``.
        options: those that it is built with.

    Returns:
        What was checked and what was not, and the cost of a step; it is printed too. One that fails is in the error alone.

    Raises:
        AssertionError: it lists everything that is wrong, each with what to do.
    """
    with tempfile.TemporaryDirectory(prefix="torchplug-") as folder, preserved(), scanned_once(), _frozen():
        subject = Subject(name, options, Path(folder))
        report = Report(f"plugin {name!r}", notes=subject.notes)
        with quiet():
            for check in CHECKS:
                if not _checked(check, subject, report):
                    break
    report.cost, report.bare, report.noise = subject.cost or (None, None, None)
    report.judge()
    return report


@contextmanager
def _frozen() -> Iterator[None]:
    """Inside, garbage is looked for among new objects alone, which takes a hundredth of the time."""
    already = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not already:
            gc.unfreeze()


def _checked(check: Check, subject: Subject, report: Report) -> bool:
    """Does one check; whether it makes sense to go on with the next."""
    words = check.__name__.replace("_", " ")
    try:
        problems = list(check(subject))
    except NotApplicable as why:
        report.left_out[words] = str(why)
        return True
    except PluginError as error:
        problems = [str(error)]
    except Exception as error:
        problems = [f"the run of this check fails, and must not: {_told(error)}"]
    else:
        report.plugin = subject.found.label
    if problems:
        report.failed[words] = problems
        return check not in FIRST
    report.passed.append(words)
    return True


def _told(error: Exception) -> str:
    """An error with its notes and the last places that it went through."""
    lines = "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-3)).rstrip()
    return "\n      ".join([f"{type(error).__name__}: {error}", *lines.splitlines()])
