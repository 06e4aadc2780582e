"""Core's own answers to the operations: an ordinary set of hooks that is asked last."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchplug import checkpoint, loop
from torchplug.data import move
from torchplug.hookspecs import Hooks, hookimpl
from torchplug.module import STEPS, Module
from torchplug.optimizers import Scheduler, needs_closure

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["LossScaling", "Operations"]

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16-true": torch.bfloat16}


class Operations:
    """What happens where no plugin answers: one process, the module's own steps, torch's own tools."""

    hooks: Hooks  # what the loop calls
    sanity_hooks: Hooks  # the same, with events for the module alone

    def __init__(self, run: Run) -> None:
        options = run.options
        self.dtype = DTYPES.get(str(options.precision))
        self.mixed = str(options.precision).endswith("-mixed")
        self.cast = self.dtype if options.precision == "bf16-true" else None
        self.clip = options.gradient_clip_val
        if self.clip is None:
            self.clip_gradients = None  # type: ignore[method-assign, assignment]  # nobody is called where there is nothing to do
        self.clip_by_norm = options.gradient_clip_algorithm == "norm"
        self.scaler: torch.amp.GradScaler | None = None
        self.updated = True  # whether the scaler let the last step through
        self.stepped: list[Optimizer] = []  # who stepped since its last update
        self.stays = False  # whether batches need not be moved
        self.steps = {name: _positional(getattr(run.module, name)) for name in STEPS}
        self.train_batch = loop.train_batch  # type: ignore[method-assign]  # the hottest calls have no object in between
        if not self.mixed:
            self.train_step = _direct(run.module.training_step)  # type: ignore[method-assign]

    # ------------------------------------------------------------------ start

    @hookimpl
    def launch(self, run: Run, main: Callable[[], Any]) -> Any:
        return main()

    @hookimpl
    def setup_module(self, run: Run, module: Module) -> Module:
        self.stays = run.device.type == "cpu" and self.cast is None
        return module.to(run.device, self.cast)

    @hookimpl
    def prepare_loader(self, loader: Any) -> Any:
        return loader

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        if run.options.precision == "16-mixed":
            self.scaler = torch.amp.GradScaler(run.device.type)
            for optimizer in run.optimizers:  # the public way to learn whether the scaler let the step through
                optimizer.register_step_post_hook(self._note_update)

    def _note_update(self, *_: Any) -> None:
        self.updated = True

    # ------------------------------------------------------------------ batches

    @hookimpl
    def move_batch(self, run: Run, batch: Any) -> Any:
        if self.stays:
            return batch
        return move(batch, run.device, self.cast)

    @hookimpl
    def train_batch(self, run: Run, batch: Any, batch_idx: int) -> Any:
        return loop.train_batch(run, batch, batch_idx)

    @hookimpl
    def evaluate(self, run: Run, stage: str) -> Any:
        return loop.evaluate(run, self.sanity_hooks if stage == "sanity" else self.hooks, stage)

    def _autocast(self, run: Run) -> AbstractContextManager[Any]:
        return torch.autocast(run.device.type, self.dtype) if self.mixed else nullcontext()

    @hookimpl
    def train_step(self, run: Run, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        with self._autocast(run):
            return self.steps["training_step"](batch, batch_idx, optimizer_idx)

    @hookimpl
    def validation_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        with self._autocast(run):
            return self.steps["validation_step"](batch, batch_idx, dataloader_idx)

    @hookimpl
    def test_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        with self._autocast(run):
            return self.steps["test_step"](batch, batch_idx, dataloader_idx)

    @hookimpl
    def predict_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        with self._autocast(run):
            return self.steps["predict_step"](batch, batch_idx, dataloader_idx)

    # ------------------------------------------------------------------ backward and update

    @hookimpl
    def backward(self, run: Run, loss: Tensor, optimizer: Optimizer | None) -> bool:
        if self.scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return True
        if optimizer is None and self.stepped and not self._held_gradients(run):
            self.scaler.update()  # a batch in which an optimizer steps twice
            self.stepped.clear()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return True

    def _held_gradients(self, run: Run) -> bool:
        """Whether an optimizer that has yet to step holds gradients under the present loss scale."""
        waiting = [optimizer for optimizer in run.optimizers if all(optimizer is not other for other in self.stepped)]
        return any(p.grad is not None for optimizer in waiting for group in optimizer.param_groups for p in group["params"])

    @hookimpl
    def clip_gradients(self, optimizer: Optimizer) -> bool:
        assert self.clip is not None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.clip_by_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        else:
            torch.nn.utils.clip_grad_value_(parameters, self.clip)
        return True

    @hookimpl
    def optimizer_step(self, run: Run, optimizer: Optimizer, closure: Callable[[], Tensor] | None) -> bool:
        if self.scaler is None:
            if closure is None:
                optimizer.step()
            else:
                optimizer.step(closure)  # type: ignore[arg-type]
            if self.mixed:  # manual optimization may go forward again in the same autocast
                torch.clear_autocast_cache()
            return True
        if needs_closure(optimizer):
            raise ValueError(f"precision='16-mixed' cannot be used with {type(optimizer).__name__}, which evaluates the loss itself")
        self.updated = False
        self.stepped.append(optimizer)
        self.scaler.step(optimizer)
        torch.clear_autocast_cache()
        return self.updated

    @hookimpl
    def zero_grad(self, run: Run, optimizer: Optimizer) -> bool:
        optimizer.zero_grad()
        return True

    @hookimpl
    def scheduler_step(self, run: Run, scheduler: Scheduler) -> bool:
        if not scheduler.follows_metric:
            scheduler.scheduler.step()  # type: ignore[call-arg]
            return True
        assert scheduler.monitor is not None
        if not scheduler.strict and scheduler.monitor not in run.metrics:
            return False
        reading = run.metrics.fresh(scheduler.monitor, scheduler.seen)
        if reading is None:
            return False
        scheduler.seen = reading.serial
        scheduler.scheduler.step(reading.value)  # type: ignore[arg-type]
        return True

    # ------------------------------------------------------------------ checkpoints

    @hookimpl
    def save_checkpoint(self, run: Run, path: Path) -> Path:
        state = checkpoint.collect(run)
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        checkpoint.write(path, state)
        return path

    @hookimpl
    def load_checkpoint(self, run: Run, path: Path) -> dict[str, Any]:
        return checkpoint.load(path)


def _direct(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` as an answer to the operation ``train_step``, with no call in between where it takes batch and batch_idx."""
    if _taken(step) == 2:
        return lambda run, batch, batch_idx, optimizer_idx: step(batch, batch_idx)
    call = _positional(step)
    return lambda run, batch, batch_idx, optimizer_idx: call(batch, batch_idx, optimizer_idx)


def _taken(step: Callable[..., Any]) -> int | None:
    """How many arguments ``step`` takes, None for any number."""
    parameters = list(inspect.signature(step).parameters.values())
    return None if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters) else len(parameters)


def _positional(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` called with as many of (batch, batch_idx, dataloader_idx or optimizer_idx) as it takes."""
    taken = _taken(step)
    if taken == 1:
        return lambda batch, batch_idx, idx: step(batch)
    if taken == 2:
        return lambda batch, batch_idx, idx: step(batch, batch_idx)
    if taken in (3, None):
        return step
    raise TypeError(f"{step.__qualname__} must take batch, or batch and batch_idx, or also dataloader_idx, got {inspect.signature(step)}")


class LossScaling:
    """The loss scaler's part that comes before everybody: gradients that hooks see are unscaled."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations

    @hookimpl
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        scaler = self.operations.scaler
        assert scaler is not None
        scaler.unscale_(optimizer)

    @hookimpl
    def on_train_batch_end(self) -> None:
        scaler = self.operations.scaler
        assert scaler is not None
        if self.operations.stepped:  # several optimizers share one scale, which changes when all have stepped
            scaler.update()
            self.operations.stepped.clear()
