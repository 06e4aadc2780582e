"""Metrics as a table: one row for each record, one column for each metric, in a CSV file that everything opens."""

from __future__ import annotations

import csv
import os
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from torchplug import Run, hookimpl

__all__ = ["Csv"]

FIXED = ("step", "epoch", "samples", "seconds", "stage")


@dataclass(kw_only=True, eq=False)
class Csv:
    """Writes each metric record as a row of ``metrics.csv`` (RFC 4180, UTF-8).

    The first columns are step (optimizer steps), epoch, samples (training samples), seconds (since the run started) and stage.
    A metric that has one of these names stands under ``metric:name``. What a record does not have stays empty. Numbers are
    exact: reading one back gives the same float, ``nan`` and ``inf`` among them. A run that goes on in the same folder (a test
    after a fit) goes on in the same file. One that goes on from a checkpoint goes on behind the rows of its moment; those that
    stood there move to ``metrics.abandoned.csv``.

    Args:
        dir: Folder of metrics.csv. None: the directory of the run.
    """

    dir: str | os.PathLike[str] | None = None

    on_error = "disable"
    before = ("*",)  # a record is written before others act on it

    _table: _Table | None = field(init=False, default=None, repr=False)
    _back: dict[str, Any] | None = field(init=False, default=None, repr=False)  # the state to go back to
    _validating: dict[str, Any] | None = field(init=False, default=None, repr=False)  # the state when the validation began

    def __post_init__(self) -> None:
        if self.dir is not None and not isinstance(self.dir, (str, os.PathLike)):
            raise TypeError(f"dir must be a folder or None, got {self.dir!r}")

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        self._table = self._back = self._validating = None
        if run.rank == 0:
            self._open(run)

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        state, self._back = self._back, None
        if run.resumed is None or state is None or state["rows"] is None or self._table is None:
            return
        if state["rows"] < self._table.rows:
            self._table.cut(state["rows"], state["seconds"])

    @hookimpl
    def on_validation_start(self) -> None:
        self._validating = self.state_dict()

    @hookimpl
    def on_validation_end(self) -> None:
        self._validating = None

    @hookimpl
    def log_metrics(self, run: Run, metrics: dict[str, float], stage: str, step: int, epoch: int, samples: int, seconds: float) -> None:
        if run.rank != 0:
            return
        row: dict[str, Any] = dict(zip(FIXED, (step, epoch, samples, seconds, stage), strict=True))
        row.update({f"metric:{name}" if name in FIXED else _written(name): value for name, value in metrics.items()})
        (self._table or self._open(run)).add(row)

    @hookimpl
    def on_run_end(self, run: Run) -> None:
        if self._table is None:
            return
        if self._table.file is not None and not run.options.fast_dev_run:
            run.report[run.name_of(self)] = str(self._table.path)
        self._table.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: how many rows there are (None: unknown), and what the last of them is known by.

        A validation that is broken off does not count: the run that goes on begins it again.
        """
        if self._table is None:
            return {"rows": None, "seconds": ""}
        return self._validating or {"rows": self._table.rows, "seconds": self._table.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` stood, when the fit starts: what goes wrong with a file goes wrong in a hook."""
        self._back = state

    def _open(self, run: Run) -> _Table:
        folder = run.dir if self.dir is None or run.options.fast_dev_run else Path(self.dir)  # a trial run leaves nothing behind
        self._table = _Table(folder / "metrics.csv")
        return self._table


def _written(name: str) -> str:
    """A name may have halves of surrogate pairs, which UTF-8 has not, and a NUL, which not every reader of CSV takes: they are written
    as ``\\ud800`` and ``\\x00``."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


class _Table:
    """A table that goes on in the file that is there; without one the first row makes it.

    Raises:
        ValueError: there is a file of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None  # open since the first row
        self.columns: dict[str, None] = {}
        self.rows = 0
        self.seconds = ""  # of the last row, as they stand there
        if not path.exists():
            return
        with open(path, newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if not header:
            return
        if tuple(header[: len(FIXED)]) != FIXED:
            raise ValueError(f"{path} is not a table of this logger, it begins with {header!r}; move it away or choose another dir")
        self.columns = dict.fromkeys(header)
        with open(path, "rb") as binary:
            os.truncate(path, sum(len(line) for line in binary if line.endswith(b"\n")))  # a killed process may leave a part of a row
        with open(path, newline="", encoding="utf-8") as file:
            for row in islice(csv.reader(file), 1, None):
                self.rows, self.seconds = self.rows + 1, row[FIXED.index("seconds")]

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row, and a column more for each name that is new."""
        if new := [name for name in row if name not in self.columns]:
            self._widen(new)
        if self.file is None:
            self.file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        csv.writer(self.file).writerow([row.get(name, "") for name in self.columns])
        self.file.flush()
        self.rows, self.seconds = self.rows + 1, str(row["seconds"])

    def _widen(self, new: list[str]) -> None:
        """Adds columns: the file is written anew beside the old one and takes its place when it is complete."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = [*self.columns, *new]
        temporary = self.path.with_name(f".{self.path.name}.tmp")  # always the same name: what a killed process leaves is no heap
        try:
            with open(temporary, "w", newline="", encoding="utf-8") as target:
                writer = csv.writer(target)
                writer.writerow(columns)
                if self.columns:
                    with open(self.path, newline="", encoding="utf-8") as source:
                        rows = csv.reader(source)
                        next(rows)
                        writer.writerows([*row, *[""] * len(new)] for row in rows)
                target.flush()
                os.fsync(target.fileno())
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        self.columns = dict.fromkeys(columns)

    def cut(self, rows: int, seconds: str) -> None:
        """Keeps the first ``rows`` and moves the others to a table beside it, unless the last that stays is not that of ``seconds``."""
        with open(self.path, "rb+") as file:
            header = sum(1 for _ in file) - self.rows  # lines: the name of a metric may go over several, a row does not
            file.seek(0)
            last = deque(islice(file, header + rows), maxlen=1).pop()
            if rows and self._cells(last)["seconds"] != seconds:  # the table of something else
                return
            end = file.tell()
            abandoned = _Table(self.path.with_name(f"{self.path.stem}.abandoned{self.path.suffix}"))
            for line in file:
                abandoned.add(self._cells(line))
            abandoned.close(durably=True)  # only then they may go
            file.truncate(end)
        self.rows, self.seconds = rows, seconds

    def _cells(self, line: bytes) -> dict[str, str]:
        """What a row has, by column."""
        (cells,) = csv.reader([line.decode()])
        return {name: cell for name, cell in zip(self.columns, cells, strict=True) if cell}

    def close(self, durably: bool = False) -> None:
        """Closes the file; the next row opens it again."""
        file, self.file = self.file, None
        if file is not None:
            if durably:
                os.fsync(file.fileno())
            file.close()
