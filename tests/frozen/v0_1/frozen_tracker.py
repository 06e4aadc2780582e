"""Written against torchplug 0.1 and never changed since: a logger that follows the run's journal from a thread of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchplug.tracking import Backend, Mark, Place, Tracker


class File:
    """Keeps marks and records as lines of JSON."""

    where = ""

    def connect(self, place: Place) -> list[Mark]:
        place.folder.mkdir(parents=True, exist_ok=True)
        self.path = place.folder / "records.jsonl"
        self.where = f"cat {self.path}"
        if not self.path.exists():
            return []
        marks = [Mark(*json.loads(line)["mark"]) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return [mark for mark in marks if mark.n]

    def go_back(self, mark: Mark) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["mark"][0] <= mark.n]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def send(self, records: list[dict[str, Any]], mark: Mark) -> None:
        metrics = [[each["step"], each["metrics"]] for each in records if each["event"] == "log_metrics"]
        self._add({"mark": list(mark), "metrics": metrics})

    def finish(self, status: str) -> None:
        self._add({"mark": [0, 0.0], "status": status})

    def close(self) -> None:
        pass

    def _add(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)


@dataclass(kw_only=True, eq=False)
class FileTracker(Tracker):
    """Metrics as lines of JSON.

    Args:
        dir: Folder of records.jsonl. None: a folder of the plugin's name in the directory of the run.
        close_timeout: Wait at most this many seconds over the whole run.
    """

    def backend(self) -> Backend:
        return File()


def read(run_dir: Path) -> tuple[list[Any], str]:
    """The records that were kept, and how the run ended."""
    lines = [json.loads(line) for line in (run_dir / "frozen_tracker" / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for line in lines for record in line.get("metrics", [])], next(line["status"] for line in lines if "status" in line)
