"""Written against torchplug 0.1 and never changed since: a plugin that acts on the run, by an event, a wrapper and an answer."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torchplug import Run, hookimpl


@dataclass(kw_only=True, eq=False)
class Half:
    """Halves gradients, steps the optimizer itself, and ends the run after some steps.

    Args:
        factor: What gradients are multiplied by.
        stop_after: Optimizer steps after which the run ends; None lets it go on.
    """

    factor: float = 0.5
    stop_after: int | None = None

    after = ("frozen_counter",)

    losses: list[float] = field(init=False, default_factory=list)
    weighed: int = field(init=False, default=0)

    @hookimpl
    def on_before_optimizer_step(self, run: Run, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(self.factor)

    @hookimpl
    def optimizer_step(self, run: Run, optimizer: Optimizer, closure: Callable[[], Tensor] | None) -> bool | None:
        if closure is not None:
            return None
        optimizer.step()
        return True

    @hookimpl(wrapper=True)
    def train_step(self, run: Run, batch: Any) -> Generator[None, Any, Any]:
        loss = yield
        self.losses.append(float(loss.detach()))
        return loss

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run, stage: str) -> Generator[None, Any, Any]:
        try:
            results = yield
        finally:
            self.weighed += 1
        return results

    @hookimpl
    def on_after_optimizer_step(self, run: Run) -> None:
        run.log("half_factor", self.factor)
        if run.position.step == self.stop_after:
            run.request_stop(f"{self.stop_after} steps are enough")
