"""Sets by epoch how many batches are accumulated before an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchplug import Run, hookimpl

__all__ = ["AccumulationSchedule"]


@dataclass(kw_only=True, eq=False)
class AccumulationSchedule:
    """Changes the length of the accumulation windows from epoch to epoch.

    A window never reaches over the end of an epoch; the loss is divided by the number of batches that a window really has, also in
    the short last one. The Trainer's own accumulate_grad_batches stays 1. A run that goes on from a checkpoint must have
    the same schedule.

    Args:
        scheduling: Batches for one optimizer step by the index of the epoch from which they hold: {0: 8, 4: 4} takes 8 in
            epochs 0 to 3 and 4 from epoch 4 on. Before the first epoch named it is 1.
    """

    scheduling: dict[int, int]

    _name: str = field(init=False, default="accumulation_schedule", repr=False)

    before = "*"  # what cannot be is refused before others begin
    in_trials = True

    def __post_init__(self) -> None:
        if not isinstance(self.scheduling, dict) or not self.scheduling:
            raise TypeError(f"scheduling must be a dict of batches by epoch, such as {{0: 8, 4: 4}}, got {self.scheduling!r}")
        self.scheduling = {  # a file of JSON has texts for keys
            int(epoch) if isinstance(epoch, str) and epoch.isdecimal() else epoch: batches for epoch, batches in self.scheduling.items()
        }
        for epoch, batches in self.scheduling.items():
            if type(epoch) is not int or epoch < 0:
                raise ValueError(f"scheduling: an epoch must be a whole number, at least 0, got {epoch!r}")
            if type(batches) is not int or batches < 1:
                raise ValueError(f"scheduling: the batches from epoch {epoch} on must be a whole number, at least 1, got {batches!r}")

    def batches_in(self, epoch: int) -> int:
        """How many batches an optimizer step takes in an epoch, given by its index from 0."""
        begun = [start for start in self.scheduling if start <= epoch]
        return self.scheduling[max(begun)] if begun else 1

    @hookimpl
    def setup(self, run: Run) -> None:
        self._name = run.name_of(self)
        if run.accumulation is not None:
            raise ValueError("the length of the windows is set by another plugin already; name one schedule")
        run.accumulation = self.batches_in

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        if run.purpose != "fit":
            return
        if run.options.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches={run.options.accumulate_grad_batches} and a schedule contradict each other; leave it at 1"
            )
        if not run.automatic:
            raise ValueError("a schedule is for automatic optimization; in manual optimization call step() every few batches")
        if any(run.closures) and max(self.scheduling.values()) > 1:
            raise ValueError("an optimizer that evaluates the loss itself (LBFGS) needs one batch at a time")

    def state_dict(self) -> dict[str, Any]:
        """The schedule, for the run that goes on."""
        return {"scheduling": self._listed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compares the schedules.

        Raises:
            ValueError: they are different.
        """
        if state["scheduling"] != self._listed():
            raise ValueError(
                f"the checkpoint was written with scheduling={dict(state['scheduling'])}, now it is {self.scheduling}; set it back, "
                f"or let another one begin with resume={{'exclude': ['plugin:{self._name}']}}"
            )

    def _listed(self) -> list[list[int]]:
        return [list(each) for each in sorted(self.scheduling.items())]
