"""What a logger stored, compared with what was logged."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Read", "Value", "differences", "folded", "listed", "named"]

SHOWN = 3  # steps and names that are listed
LONG = 40  # characters of a name that tell it from others

Value = tuple[str, int, float]
"""A name, a step, and what was logged there."""

Read = Callable[[Path], Iterable[Value]]
"""What is stored of the run in a folder, those of one name in the order in which they are stored."""


class Difference(NamedTuple):
    """What is wrong with a metric, and what to do about it."""

    name: str
    text: str
    advice: str


def differences(wanted: Iterable[Value], found: Iterable[Value]) -> Iterator[Difference]:
    """How ``found`` differs from ``wanted`` in the names that were logged. Numbers are compared with the 32 bits that every backend has;
    1.797e308 is infinite there."""
    mine, theirs = _by_name(wanted), _by_name(found)
    for name, points in mine.items():
        if name in theirs:
            yield from (Difference(name, *each) for each in _differences(points, theirs[name]))
        else:
            advice = "keep names apart and store each, or say in a warning, with its name in quotes, what is left out"
            yield Difference(name, "did not arrive", advice)


def folded(found: Iterable[Difference]) -> Iterator[str]:
    """A line for each kind of difference: all of the first metric, and the names of the others."""
    kinds: dict[str, list[Difference]] = {}
    for each in found:
        kinds.setdefault(each.advice, []).append(each)
    for advice, (first, *others) in kinds.items():
        more = f", and so it is with {listed([each.name for each in others])}" if others else ""
        yield f"metric {_short(first.name)} {first.text}{more}: {advice}"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(_short(name) for name in names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _differences(wanted: list[tuple[int, str]], found: list[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    """What is wrong with the points of one metric, and what to do."""
    missing, more = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
    places = {step for step, _ in missing} & {step for step, _ in more}
    changed = [f"{step} ({number}, not {true})" for step, true in sorted(missing) for other, number in sorted(more) if step == other]
    lost = [str(step) for step, _ in sorted(missing) if step not in places]
    twice = [str(step) for step, _ in sorted(more) if step not in places]
    if changed:
        yield f"has another value at step {_steps(changed)}", "store numbers as they are"
    if lost:
        yield f"is missing at step {_steps(lost)}", "remember a mark only with what is stored, and let an error of storing out of send"
    if twice:
        yield (
            f"is there twice, or was never logged, at step {_steps(twice)}",
            "show once what is sent twice, and take back in go_back what is not the past any more",
        )
    steps = [step for step, _ in found]
    if not lost and not twice and steps != sorted(steps):
        yield f"goes back in its steps, {_steps([str(step) for step in steps])}", "store records in the order in which they come"


def _by_name(values: Iterable[Value]) -> dict[str, list[tuple[int, str]]]:
    """The points of each metric; numbers as texts, which are equal for NaN too, without the sign of 0. What UTF-8 and databases do not
    take may be written in a name as ``\\ud800`` and ``\\x00``."""
    points: dict[str, list[tuple[int, str]]] = {}
    for name, step, value in values:
        name = name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
        points.setdefault(name, []).append((step, repr(ctypes.c_float(value).value + 0.0)))
    return points


def named(name: str, line: str) -> bool:
    """Whether a line for the user has a metric's name in quotes, or the beginning of a long one."""
    spelt = {name, repr(name)[1:-1]}
    return any(f"{quote}{each}{quote}" in line or (len(each) > LONG and each[:LONG] in line) for quote in "'\"" for each in spelt)


def _short(name: str) -> str:
    return repr(name if len(name) < 60 else f"{name[:50]}...{name[-5:]}")


def _steps(steps: Sequence[str]) -> str:
    return ", ".join(steps[:SHOWN]) + (", ..." if len(steps) > SHOWN else "")
