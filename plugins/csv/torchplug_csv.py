"""Metrics as a table: one row for each record, one column for each metric, in a CSV file that everything opens."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, field
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
    after a fit) goes on in the same file.

    Args:
        dir: Folder of metrics.csv. None: the directory of the run.
    """

    dir: str | os.PathLike[str] | None = None

    on_error = "disable"
    before = ("*",)  # a record is written before others act on it

    _path: Path = field(init=False, default=Path(), repr=False)
    _file: TextIO | None = field(init=False, default=None, repr=False)
    _columns: dict[str, None] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.dir is not None and not isinstance(self.dir, (str, os.PathLike)):
            raise TypeError(f"dir must be a folder or None, got {self.dir!r}")

    @hookimpl
    def log_metrics(self, run: Run, metrics: dict[str, float], stage: str, step: int, epoch: int, samples: int, seconds: float) -> None:
        if run.rank != 0:
            return
        if self._file is None:
            self._open(run)
        row: dict[str, Any] = dict(zip(FIXED, (step, epoch, samples, seconds, stage), strict=True))
        row.update({f"metric:{name}" if name in FIXED else name: value for name, value in metrics.items()})
        if new := [name for name in row if name not in self._columns]:
            self._widen(new)
        assert self._file is not None
        csv.writer(self._file).writerow([row.get(name, "") for name in self._columns])
        self._file.flush()

    @hookimpl
    def on_run_end(self, run: Run) -> None:
        if self._file is not None and not run.options.fast_dev_run:
            run.report["csv"] = str(self._path)
        self._close()

    def _open(self, run: Run) -> None:
        """Goes on in the file that is there; without one the first record makes it, together with its columns."""
        folder = run.dir if self.dir is None or run.options.fast_dev_run else Path(self.dir)  # a trial run leaves nothing behind
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.csv"
        self._columns = {}
        if not self._path.exists():
            return
        with open(self._path, newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if not header:
            return
        if tuple(header[: len(FIXED)]) != FIXED:
            raise ValueError(f"{self._path} is not a table of this logger, it begins with {header!r}; move it away or choose another dir")
        whole = self._path.read_bytes().rindex(b"\n") + 1
        os.truncate(self._path, whole)  # a killed process may have left a part of a row
        self._columns = dict.fromkeys(header)
        self._append()

    def _append(self) -> None:
        self._file = open(self._path, "a", newline="", encoding="utf-8")  # noqa: SIM115

    def _widen(self, new: list[str]) -> None:
        """Adds columns: the file is written anew beside the old one and takes its place when it is complete."""
        self._close()
        columns = [*self._columns, *new]
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", newline="", encoding="utf-8") as target:
                writer = csv.writer(target)
                writer.writerow(columns)
                if self._columns:
                    with open(self._path, newline="", encoding="utf-8") as source:
                        rows = csv.reader(source)
                        next(rows)
                        writer.writerows([*row, *[""] * len(new)] for row in rows)
                target.flush()
                os.fsync(target.fileno())
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        self._columns = dict.fromkeys(columns)
        self._append()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
