"""Logs the learning rates of all parameter groups, with momentum and weight decay on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torchplug import Run, hookimpl

__all__ = ["LRMonitor"]


@dataclass(kw_only=True, eq=False)
class LRMonitor:
    """Logs the rates with which a step was taken: those before the schedulers move on.

    The name of an optimizer is that of its scheduler, if that has one, else ``lr-`` and its class. Of several groups each has
    ``/pg1``, ``/pg2``, or ``/`` and the group's own ``name``. A name that comes again gets ``-1``, ``-2``.

    Args:
        logging_interval: When to log: 'step' at every logging step of the Trainer, 'epoch' at the beginning of each epoch.
        log_momentum: Log the momentum too, as NAME-momentum; the first of betas for optimizers that have them.
        log_weight_decay: Log the weight decay too, as NAME-weight_decay.
    """

    logging_interval: Literal["step", "epoch"] = "step"
    log_momentum: bool = False
    log_weight_decay: bool = False

    _logged: int = field(init=False, default=-1, repr=False)  # the last step that was logged

    on_error = "disable"
    after = "*"  # whoever sets a rate at the beginning of an epoch has done so

    def __post_init__(self) -> None:
        if self.logging_interval not in ("step", "epoch"):
            raise ValueError(f"logging_interval must be 'step' or 'epoch', got {self.logging_interval!r}")
        for name in ("log_momentum", "log_weight_decay"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.logging_interval == "epoch":
            self.on_after_optimizer_step = None  # type: ignore[method-assign, assignment]  # nobody is called at every step

    @hookimpl
    def on_train_start(self) -> None:
        self._logged = -1

    @hookimpl
    def on_train_epoch_start(self, run: Run) -> None:
        if self.logging_interval == "epoch":
            self._log(run)

    @hookimpl
    def on_after_optimizer_step(self, run: Run) -> None:
        step = run.position.step
        if step % run.options.log_every_n_steps or step == self._logged:
            return
        self._logged = step  # of several optimizers the first one to step logs all, before any scheduler moves
        self._log(run)

    def _log(self, run: Run) -> None:
        for name, group in _named_groups(run):
            run.log(name, group["lr"])
            momentum = group["betas"][0] if "betas" in group else group.get("momentum")
            if self.log_momentum and momentum is not None:
                run.log(f"{name}-momentum", momentum)
            if self.log_weight_decay and "weight_decay" in group:
                run.log(f"{name}-weight_decay", group["weight_decay"])


def _named_groups(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each parameter group of the run with its name."""
    taken: list[str] = []
    for optimizer in run.optimizers:
        named = next((each.name for each in run.schedulers if each.optimizer is optimizer and each.name), None)
        name = _numbered(named or f"lr-{type(optimizer).__name__}", taken)
        own: list[str] = []
        for number, group in enumerate(optimizer.param_groups, 1):
            part = group.get("name") or (f"pg{number}" if len(optimizer.param_groups) > 1 else "")
            yield (f"{name}/{_numbered(part, own)}" if part else name), group


def _numbered(name: str, taken: list[str]) -> str:
    """``name``, with ``-1``, ``-2`` after it where it is taken."""
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken.append(free)
    return free
