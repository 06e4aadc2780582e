"""Counts the batches that a run trains on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchplug import Run, hookimpl

__all__ = ["Quokka"]


@dataclass(kw_only=True, eq=False)
class Quokka:
    """Counts the batches that a run trains on, and logs the count as ``batches`` at the end of an epoch.

    Args:
        every_n_epochs: Log the count in every n-th epoch.

    Attributes:
        batches: Batches so far; those before the checkpoint that a run goes on from are among them.
    """

    every_n_epochs: int = 1

    on_error = "disable"  # it only looks on: an error in it switches it off, and training goes on

    batches: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if type(self.every_n_epochs) is not int or self.every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be a whole number of epochs, at least 1, got {self.every_n_epochs!r}")

    @hookimpl
    def setup(self, run: Run, stage: str) -> None:
        """The instance may have been in a run before."""
        if stage == "fit":
            self.batches = 0

    @hookimpl
    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a batch; ``outputs`` is what the step returned, None if it was skipped."""
        self.batches += 1

    @hookimpl
    def on_train_epoch_end(self, run: Run) -> None:
        """After an epoch's batches, validation and schedulers."""
        if (run.position.epoch + 1) % self.every_n_epochs == 0:
            run.log("batches", self.batches)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: numbers, texts, tensors, and lists and dicts of them."""
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; it comes after ``setup``."""
        self.batches = state["batches"]
