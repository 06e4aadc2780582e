"""What the benchmarks share: batches that keep the time, pairs back to back, tables, and a command line for each script."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WINDOW = 50  # steps between two looks at the clock
HERE = Path(__file__).parent

Batch = tuple[Tensor, Tensor]
Clock = Callable[[], float]
Row = dict[str, Any]

# what is compared with and may be left out: the module to import, what pip calls it
CONTENDERS = {
    "lightning": ("lightning", "lightning"),
    "ignite": ("ignite", "pytorch-ignite"),
    "skorch": ("skorch", "skorch"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}

# ---------------------------------------------------------------------- the clock


def low(values: Sequence[float]) -> float:
    """The 10th percentile: what other processes do to the machine makes a window longer, never shorter."""
    return sorted(values)[len(values) // 10]


class Batches:
    """Batches of 32 from memory, the same in every run; the clocks are read once a window."""

    def __init__(self, steps: int, width: int = 32, clocks: Sequence[Clock] = (time.process_time,)) -> None:
        self.data, self.steps, self.clocks = self.make(width), steps, clocks
        self.stamps: list[list[float]] = []

    def make(self, width: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)
        return [(torch.randn(32, width, generator=generator), torch.randint(0, 10, (32,), generator=generator)) for _ in range(WINDOW)]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        self.stamps = []
        for step in range(self.steps):
            if step % WINDOW == 0:
                self.stamp()
            yield self.data[step % len(self.data)]
        self.stamp()

    def stamp(self) -> None:
        self.stamps.append([clock() for clock in self.clocks])

    def windows(self, clock: int = 0) -> list[float]:
        """Microseconds per step, window by window."""
        whole = self.stamps[: self.steps // WINDOW + 1]
        return [(end[clock] - start[clock]) / WINDOW * 1e6 for start, end in itertools.pairwise(whole)]

    def microseconds(self, clock: int = 0) -> float:
        """The 10th percentile of the windows, per step."""
        return low(self.windows(clock))


def beside(name: str, base: Clock, work: Clock, repeats: int) -> Row:
    """Pairs of ``base`` and ``work``, back to back: the medians of both, and of difference and ratio with their ranges."""
    print(f"  {name}", file=sys.stderr, flush=True)
    pairs = [(base(), work()) for _ in range(repeats)]
    row: Row = {"name": name, "base": statistics.median(here for here, _ in pairs)}
    row |= spread("work", [there for _, there in pairs])
    row |= spread("over", [there - here for here, there in pairs])
    return row | spread("ratio", [there / here for here, there in pairs])


def spread(key: str, values: Sequence[float]) -> Row:
    """The median under ``key``, and the range."""
    return {key: statistics.median(values), f"{key}_low": min(values), f"{key}_high": max(values)}


# ---------------------------------------------------------------------- tables


@dataclass
class Table:
    """Rows, and the columns in which they are shown: what stands above one, and how a row fills it."""

    columns: dict[str, str]
    rows: list[Row]

    def __getitem__(self, which: str | int) -> Row:
        """The row of this name, or number."""
        return self.rows[which] if isinstance(which, int) else next(row for row in self.rows if row["name"] == which)

    def __str__(self) -> str:
        """As Markdown."""
        lines = [list(self.columns), ["---"] * len(self.columns)]
        lines += [[cell.format_map(_Row(row)) for cell in self.columns.values()] for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class _Row(Row):
    """A row whose missing values are shown as nothing."""

    def __missing__(self, key: str) -> Any:
        return _Nothing()

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key) if key in self else None
        return _Nothing() if value is None else value


class _Nothing:
    def __format__(self, form: str) -> str:
        return ""


Tables = dict[str, Table]

# ---------------------------------------------------------------------- programs


def quiet() -> None:
    """One thread, and no lines of trainers between those of a benchmark."""
    torch.set_num_threads(1)
    logging.getLogger("torchplug").addHandler(logging.NullHandler())
    logging.getLogger("torchplug").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """What is printed goes nowhere."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def taking_part(names: Sequence[str], without: Sequence[str]) -> list[str]:
    """Those of ``names`` that are not left out; one that is not installed ends the program."""
    there = [name for name in names if name not in without]
    for name in there:
        module, package = CONTENDERS[name]
        if importlib.util.find_spec(module) is None:
            sys.exit(f"{name!r} is not installed: pip install {package}, or leave it out with --without {name}")
    return there


def child(code: str) -> Any:
    """What ``code``, a program for a new interpreter that finds the benchmarks, prints as JSON in its last line."""
    # who says that no byte code is written would measure the compiler
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    paths = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"a program of the benchmark ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def program(measure: Callable[..., Tables], arguments: Sequence[str] | None = None) -> None:
    """The command line of a benchmark: an option for each argument of ``measure``, whose tables are printed or written as JSON."""
    parser = argparse.ArgumentParser(description=(inspect.getdoc(inspect.getmodule(measure)) or "").splitlines()[0])
    for name, parameter in inspect.signature(measure).parameters.items():
        if name == "without":
            parser.add_argument("--without", action="append", default=[], choices=list(CONTENDERS), help="leave this out")
        else:
            parser.add_argument(f"--{name}", type=type(parameter.default), default=parameter.default, help="%(default)s unless given")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = vars(parser.parse_args(arguments))
    for name, value in options.items():
        if isinstance(value, int) and value < (least := WINDOW if name == "steps" else 1):
            parser.error(f"--{name} {value}: it must be at least {least}")
    path = options.pop("json")
    quiet()
    tables = measure(**options)
    if path:
        path.write_text(json.dumps({name: asdict(table) for name, table in tables.items()}, indent=2) + "\n", encoding="utf-8")
    print("\n\n".join(map(str, tables.values())))
