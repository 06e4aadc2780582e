"""Written against torchplug 0.1 and never changed since: a plugin that only observes, with state and an option."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchplug import Run, hookimpl


@dataclass(kw_only=True, eq=False)
class Counter:
    """Counts what happens, and writes the counts to a file.

    Args:
        file: Name of the file in the run's directory.
    """

    file: str = "counts.txt"

    on_error = "disable"

    counts: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.file:
            raise ValueError("file must have a name, got ''")

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    @hookimpl
    def setup(self, run: Run, stage: str) -> None:
        self._count(f"setup {stage}")

    @hookimpl
    def on_train_epoch_start(self) -> None:
        self._count("epoch start")

    @hookimpl
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs is not None and len(batch) == 2 and batch_idx >= 0
        self._count("batch")

    @hookimpl
    def on_validation_end(self, run: Run) -> None:
        assert run.metrics["val_loss"] >= 0
        self._count("validation")

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], step: int, epoch: int, samples: int, seconds: float, stage: str) -> None:
        assert all(isinstance(value, float) for value in metrics.values()) and min(step, epoch, samples) >= 0 and seconds > 0 and stage
        self._count("record")

    @hookimpl
    def on_stop_requested(self, reason: str, plugin: str) -> None:
        self._count(f"stop: {reason} ({plugin})")

    @hookimpl
    def on_run_end(self, run: Run, status: str) -> None:
        lines = [f"{name}: {count}" for name, count in self.counts.items()]
        (run.dir / self.file).write_text("\n".join([*lines, status]), encoding="utf-8")
        run.report[run.name_of(self)] = f"counts in {self.file}"

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = dict(state["counts"])
