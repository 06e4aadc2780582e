"""What a long run keeps: resident memory, live tensors and objects at step 1,000 and at step 10,000 of one epoch.

Each contender trains in a process of its own, on batches that are made anew in each step, and is looked at between two steps,
after the garbage collector. A tensor that stays behind in each step would be 9,000 more at the end.

    python benchmarks/memory.py
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import contenders
import torch
from contenders import Work
from measuring import Batch, Batches, Row, Table, Tables, child, program, quiet, taking_part, unseen
from others import OTHERS

COLUMNS = {
    "": "{name}",
    "MB at step {first:,}": "{mb_first:.1f}",
    "at step {last:,}": "{mb_last:.1f}",
    "more": "{mb_more:+.1f}",
    "tensors at step {first:,}": "{tensors_first:,}",
    "at step {last:,} ": "{tensors_last:,}",
    "objects, more": "{objects_more:+,}",
}
OURS: dict[str, Work] = {"bare": contenders.bare, "usual": contenders.usual}
BY_HAND: dict[str, Work] = {"bare": contenders.raw, "usual": contenders.by_hand}


def resident(name: str = "VmRSS") -> int:
    """Bytes that this process has now, or had at most (``"VmHWM"``)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Fresh(Batches):
    """New batches in each step; memory is looked at before the steps that are named."""

    def __init__(self, steps: int, first: int) -> None:
        super().__init__(steps)
        self.first, self.seen = first, [Row()]

    def __iter__(self) -> Iterator[Batch]:
        self.seen = []
        for step in range(1, self.steps + 1):
            if step in (self.first, self.steps):
                self.seen.append(look())
            yield torch.randn(32, 32), torch.randint(0, 10, (32,))


def look() -> dict[str, Any]:
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
    return {"mb": resident() / 1e6, "tensors": tensors, "objects": len(objects)}


def one(trainer: str, level: str, first: int, last: int) -> list[Row]:
    """In a process of its own: one contender, looked at twice."""
    quiet()
    works: dict[str, dict[str, Work]] = {"torchplug": OURS, "loop by hand": BY_HAND}
    work = works[trainer][level] if trainer in works else OTHERS[trainer][0](level)
    batches = Fresh(last, first)
    with unseen():
        work(batches)
    return batches.seen


def row(trainer: str, level: str, first: int, last: int) -> Row:
    arguments = f"{trainer!r}, {level!r}, {first}, {last}"
    before, after = child(f"import json, memory; print(json.dumps(memory.one({arguments})))")
    found = {f"{key}_{when}": seen[key] for when, seen in (("first", before), ("last", after)) for key in seen}
    more = {f"{key}_more": after[key] - before[key] for key in before}
    return {"name": f"{trainer}, {level}", **found, **more}


def tables(first: int = 1000, last: int = 10000, without: Sequence[str] = ()) -> Tables:
    """Each contender with as little on as it can have, and with what is usual."""
    levels = {"loop by hand": ["bare", "usual"], "torchplug": ["bare", "usual"]}
    levels |= {name: [OTHERS[name][1][0], OTHERS[name][1][-1]] for name in taking_part(list(OTHERS), without)}
    rows = [row(trainer, level, first, last) for trainer, each in levels.items() for level in each]
    return {"growth": Table({head.format(first=first, last=last): cell for head, cell in COLUMNS.items()}, rows)}


if __name__ == "__main__":
    program(tables)
