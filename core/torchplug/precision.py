"""Mixed precision: core's answers to the operations under autocast, with a loss scaler for half precision.

The method is that of Micikevicius et al., "Mixed Precision Training" (2018), as torch.amp provides it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchplug.hookspecs import hookimpl
from torchplug.operations import Operations
from torchplug.optimizers import needs_closure

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["Autocast", "ScaledAutocast", "Unscaling", "operations_for"]


def operations_for(run: Run) -> Operations:
    """Core's answers for the precision of ``run``."""
    kinds = {"bf16-mixed": Autocast, "16-mixed": ScaledAutocast}
    return kinds.get(str(run.options.precision), Operations)(run)


class Autocast(Operations):
    """Every step of the module runs under autocast; parameters, gradients and updates stay in float32."""

    low = torch.bfloat16

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        del self.train_step  # the step is not called directly here

    @hookimpl
    def train_step(self, run: Run, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        with torch.autocast(run.device.type, self.low):
            return self.steps["training_step"](batch, batch_idx, optimizer_idx)

    @hookimpl
    def validation_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        with torch.autocast(run.device.type, self.low):
            return self.steps["validation_step"](batch, batch_idx, dataloader_idx)

    @hookimpl
    def test_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        with torch.autocast(run.device.type, self.low):
            return self.steps["test_step"](batch, batch_idx, dataloader_idx)

    @hookimpl
    def predict_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        with torch.autocast(run.device.type, self.low):
            return self.steps["predict_step"](batch, batch_idx, dataloader_idx)

    @hookimpl
    def optimizer_step(self, run: Run, optimizer: Optimizer, closure: Callable[[], Tensor] | None) -> bool:
        updated = super().optimizer_step(run, optimizer, closure)
        torch.clear_autocast_cache()  # manual optimization may go forward again under the same autocast, with the new weights
        return updated


class ScaledAutocast(Autocast):
    """Half precision, whose gradients are so small that the loss is scaled up before the backward pass."""

    low = torch.float16

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.scaler = torch.amp.GradScaler(run.device.type)
        self.updated = True  # whether the scaler let the last step through
        self.stepped: list[Optimizer] = []  # who stepped since the scale was adapted

    @hookimpl
    def setup(self, run: Run) -> None:
        super().setup(run)
        self.scaler = run.scaler = torch.amp.GradScaler(run.device.type)

    def _note_update(self, *_: Any) -> None:
        self.updated = True

    @hookimpl
    def backward(self, run: Run, loss: Tensor, optimizer: Optimizer | None) -> bool:
        if optimizer is None and self.stepped and not self._held_gradients(run):  # a batch in which an optimizer steps twice
            self.adapt()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return True

    def _held_gradients(self, run: Run) -> bool:
        """Whether an optimizer that has yet to step holds gradients under the present loss scale."""
        waiting = [optimizer for optimizer in run.optimizers if all(optimizer is not other for other in self.stepped)]
        return any(p.grad is not None for optimizer in waiting for group in optimizer.param_groups for p in group["params"])

    @hookimpl
    def optimizer_step(self, run: Run, optimizer: Optimizer, closure: Callable[[], Tensor] | None) -> bool:
        if needs_closure(optimizer):
            raise ValueError(f"precision='16-mixed' cannot be used with {type(optimizer).__name__}, which evaluates the loss itself")
        self.updated = False
        self.stepped.append(optimizer)
        noting = optimizer.register_step_post_hook(self._note_update)  # the public way to learn whether the scaler let the step through
        try:
            self.scaler.step(optimizer)
        finally:
            noting.remove()
        torch.clear_autocast_cache()
        return self.updated

    def adapt(self) -> None:
        """Adapts the scale to what was seen since the last time; several optimizers share one scale until all have stepped."""
        if self.stepped:
            self.scaler.update()
            self.stepped.clear()


class Unscaling:
    """The part of the loss scaler that comes before everybody: the gradients that hooks see are unscaled."""

    def __init__(self, operations: ScaledAutocast) -> None:
        self.operations = operations

    @hookimpl
    def on_train_batch_start(self) -> None:
        self.operations.stepped.clear()  # of a step that was broken off in a trial

    @hookimpl
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.operations.scaler.unscale_(optimizer)

    @hookimpl
    def on_train_batch_end(self) -> None:
        self.operations.adapt()

    @hookimpl
    def on_train_epoch_end(self) -> None:  # a window that the loader's end cut short is stepped after its last batch
        self.operations.adapt()
