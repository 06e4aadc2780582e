"""What a logger stored, compared with what was logged."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

__all__ = ["Read", "Value", "differences", "named"]

SHOWN = 3  # steps that are listed
LONG = 40  # characters of a name that tell it from others

Value = tuple[str, int, float]
"""A name, a step, and what was logged there."""

Read = Callable[[Path], Iterable[Value]]
"""What is stored of the run in a folder, those of one name in the order in which they are stored."""


def differences(wanted: Iterable[Value], found: Iterable[Value]) -> Iterator[tuple[str, str]]:
    """How ``found`` differs from ``wanted`` in the names that were logged: pairs of a name and what is wrong. Numbers are compared
    with the 32 bits that every backend has; 1.797e308 is infinite there."""
    mine, theirs = _by_name(wanted), _by_name(found)
    for name, points in mine.items():
        if name in theirs:
            yield from ((name, f"metric {_short(name)} {text}") for text in _differences(points, theirs[name]))
        else:
            advice = "keep names apart and store each, or say in a warning, with its name in quotes, what is left out"
            yield name, f"metric {_short(name)} did not arrive: {advice}"


def _differences(wanted: list[tuple[int, str]], found: list[tuple[int, str]]) -> Iterator[str]:
    """What is wrong with the points of one metric."""
    missing, more = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
    places = {step for step, _ in missing} & {step for step, _ in more}
    changed = [f"{step} ({number}, not {true})" for step, true in sorted(missing) for other, number in sorted(more) if step == other]
    lost = [str(step) for step, _ in sorted(missing) if step not in places]
    twice = [str(step) for step, _ in sorted(more) if step not in places]
    if changed:
        yield f"has another value at step {_listed(changed)}: store numbers as they are"
    if lost:
        yield f"is missing at step {_listed(lost)}: remember a mark only with what is stored, and let an error of storing out of send"
    if twice:
        yield (
            f"is there twice, or was never logged, at step {_listed(twice)}: show once what is sent twice, and take back in go_back what "
            "is not the past any more"
        )
    steps = [step for step, _ in found]
    if not lost and not twice and steps != sorted(steps):
        yield f"goes back in its steps, {_listed([str(step) for step in steps])}: store records in the order in which they come"


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


def _listed(steps: Sequence[str]) -> str:
    return ", ".join(steps[:SHOWN]) + (", ..." if len(steps) > SHOWN else "")
