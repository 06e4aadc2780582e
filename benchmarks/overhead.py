"""What a trainer costs per step: microseconds over the raw loop a good engineer writes, measured side by side.

Every contender runs back to back with the loop by hand that does the same work, in one process and one thread. A run is cut
into windows of 50 steps; its figure is the 10th percentile of their CPU time, so that what other processes do to the
machine falls out. The overhead is the median over the pairs, with their range.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --without skorch --repeats 9
"""

from __future__ import annotations

from collections.abc import Sequence

from contenders import Net, Work, bare, by_hand, measure, nothing, raw, raw_clearing, raw_nothing, usual, with_torchplug
from measuring import WINDOW, Row, Table, Tables, beside, program, taking_part
from others import OTHERS

COLUMNS = {
    "": "{name}",
    "loop by hand": "{base:.1f}",
    "step": "{work:.1f}",
    "over it": "{over:+.2f}",
    "range": "{over_low:+.2f} to {over_high:+.2f}",
    "ratio": "{ratio:.2f}",
}


def pairs(name: str, work: Work, base: Work, repeats: int, steps: int) -> Row:
    """``work`` beside ``base``, after a short run of each, so that imports and first-time work fall out."""
    measure(base, WINDOW * 4)
    measure(work, WINDOW * 4)
    return beside(name, lambda: measure(base, steps), lambda: measure(work, steps), repeats)


def tables(repeats: int = 7, steps: int = 3000, without: Sequence[str] = ()) -> Tables:
    """Whole steps of all contenders, torchplug over a faster loop by hand, and torchplug without a step."""
    logging = with_torchplug(Net, logs=True)
    works: dict[str, Work] = {"torchplug, bare": bare, "torchplug, one log": logging, "torchplug, usual": usual}
    for name in taking_part(list(OTHERS), without):
        make, levels = OTHERS[name]
        works |= {f"{name}, {level}": make(level) for level in levels}
    steady = [pairs(name, work, by_hand if name.endswith("usual") else raw, repeats, steps) for name, work in works.items()]
    clearing = [
        pairs("torchplug, bare", bare, raw_clearing, repeats, steps),
        pairs("torchplug, one log", logging, raw_clearing, repeats, steps),
    ]
    alone = [
        pairs("torchplug, bare", nothing(), raw_nothing, repeats, steps),
        pairs("torchplug, one log", nothing(logs=True), raw_nothing, repeats, steps),
    ]
    return {"steps": Table(COLUMNS, steady), "clearing": Table(COLUMNS, clearing), "alone": Table(COLUMNS, alone)}


if __name__ == "__main__":
    program(tables)
