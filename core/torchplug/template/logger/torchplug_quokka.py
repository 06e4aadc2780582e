"""Writes the metrics of a run as lines of JSON: the smallest logger that misses nothing and shows nothing twice."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchplug.tracking import Mark, Place, Record, Tracker

__all__ = ["Quokka"]


@dataclass(kw_only=True, eq=False)
class Quokka(Tracker):
    """Follows the run's journal, from a thread of its own, and keeps the metrics in a file for each run.

    Args:
        dir: Folder of the file. None: quokka in the directory of the run.
        prefix: Keep the metrics whose names begin with this; '' keeps all.
        close_timeout: Wait at most this many seconds for the file to be complete when the run is over.
    """

    prefix: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix != self.prefix.strip():
            raise ValueError(f"prefix must be the beginning of a metric's name, without spaces around it, got {self.prefix!r}")

    def backend(self) -> Lines:
        """What a thread writes with, made anew for each run. Import what is slow or may be missing here."""
        return Lines(self.prefix)


class Lines:
    """A line for each delivery: the metrics in it, and the mark up to which everything has been delivered.

    Whatever is raised here means that the backend is out of reach now: it is closed, and connected again some time later.
    """

    where = ""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.path = Path()
        self.ends: dict[Mark, int] = {}  # where in the file the line of each mark ends

    def connect(self, place: Place) -> list[Mark]:
        """Opens what belongs to the run, which may be there from before, and says how far it has got."""
        place.folder.mkdir(parents=True, exist_ok=True)
        self.path = place.folder / f"{place.start['id']}.jsonl"
        self.where = f"tail {shlex.quote(str(self.path))}"
        self.path.touch()
        self.ends, end = {}, 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):  # else the process was killed while it wrote it
                end += len(line)
                self.ends[Mark(*json.loads(line)["mark"])] = end
        os.truncate(self.path, end)
        return list(self.ends)

    def go_back(self, mark: Mark) -> None:
        """The run goes on from a checkpoint: what was sent after ``mark`` is cut off."""
        self.ends = {each: end for each, end in self.ends.items() if each.n <= mark.n}
        os.truncate(self.path, self.ends.get(mark, 0))

    def send(self, records: Sequence[Record], mark: Mark) -> None:
        """Takes the next records of the journal. Of the many kinds of events it keeps the metrics."""
        rows = [self.row(record) for record in records if record["event"] == "log_metrics"]
        with open(self.path, "ab") as file:
            file.write(json.dumps({"mark": mark, "rows": rows}).encode() + b"\n")
            self.ends[mark] = file.tell()

    def row(self, record: Record) -> Record:
        """What is kept of a record."""
        metrics = {name: value for name, value in record["metrics"].items() if name.startswith(self.prefix)}
        return {**{key: record[key] for key in ("stage", "step", "epoch", "samples", "time")}, "metrics": metrics}

    def finish(self, status: str) -> None:
        """Everything was sent; ``status`` says how the run ended."""

    def close(self) -> None:
        """Lets go of what `connect` opened; here nothing stays open."""
