"""Core's own answers to the operations: an ordinary set of hooks that is asked last."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchplug import checkpoint, loop
from torchplug.blame import add_note
from torchplug.data import move
from torchplug.hookspecs import Hooks, hookimpl
from torchplug.launching import Done, Task
from torchplug.metrics import MissingMetric
from torchplug.module import STEPS, Module
from torchplug.optimizers import Scheduler

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["Operations"]


class Operations:
    """What happens where no plugin answers: one process, the module's own steps, torch's own tools."""

    hooks: Hooks  # what the loop calls
    sanity_hooks: Hooks  # the same, with events for the module alone

    def __init__(self, run: Run) -> None:
        options = run.options
        self.dtype = torch.bfloat16 if options.precision == "bf16-true" else None  # of parameters and batches
        self.clip = options.gradient_clip_val
        if self.clip is None:
            self.clip_gradients = None  # type: ignore[method-assign, assignment]  # nobody is called where there is nothing to do
        self.clip_by_norm = options.gradient_clip_algorithm == "norm"
        self.stays = False  # whether batches need not be moved
        self.steps = {name: _positional(run.module, name) for name in STEPS}
        self.train_batch = loop.train_batch  # type: ignore[method-assign]  # the hottest calls have no object in between
        self.train_step = _direct(run.module)  # type: ignore[method-assign]

    # ------------------------------------------------------------------ start

    @hookimpl
    def launch(self, main: Task) -> Done:
        return main()

    @hookimpl
    def setup(self, run: Run) -> None:
        self.stays = run.device.type == "cpu" and self.dtype is None  # the device is known now

    @hookimpl
    def setup_module(self, run: Run, module: Module) -> Module:
        return module.to(run.device, self.dtype)

    @hookimpl
    def prepare_loader(self, loader: Any) -> Any:
        return loader

    # ------------------------------------------------------------------ batches

    @hookimpl
    def move_batch(self, run: Run, batch: Any) -> Any:
        if self.stays:
            return batch
        return move(batch, run.device, self.dtype)

    @hookimpl
    def train_batch(self, run: Run, batch: Any, batch_idx: int) -> Any:
        return loop.train_batch(run, batch, batch_idx)

    @hookimpl
    def evaluate(self, run: Run, stage: str) -> Any:
        return loop.evaluate(run, self.sanity_hooks if stage == "sanity" else self.hooks, stage)

    @hookimpl
    def train_step(self, run: Run, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        return self.steps["training_step"](batch, batch_idx, optimizer_idx)

    @hookimpl
    def validation_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return self.steps["validation_step"](batch, batch_idx, dataloader_idx)

    @hookimpl
    def test_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return self.steps["test_step"](batch, batch_idx, dataloader_idx)

    @hookimpl
    def predict_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return self.steps["predict_step"](batch, batch_idx, dataloader_idx)

    # ------------------------------------------------------------------ backward and update

    @hookimpl
    def backward(self, run: Run, loss: Tensor, optimizer: Optimizer | None) -> bool:
        loss.backward()  # type: ignore[no-untyped-call]
        return True

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
        if closure is None:
            optimizer.step()
        else:
            optimizer.step(closure)  # type: ignore[arg-type]
        return True

    @hookimpl
    def zero_grad(self, run: Run, optimizer: Optimizer) -> bool:
        if getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad:  # its own way of clearing is kept
            optimizer.zero_grad()
            return True
        # the same as torch's own zero_grad, without the profiler's context around it that costs ten times as much
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return True

    @hookimpl
    def scheduler_step(self, run: Run, scheduler: Scheduler) -> bool:
        if not scheduler.follows_metric:
            scheduler.scheduler.step()  # type: ignore[call-arg]
            return True
        assert scheduler.monitor is not None
        if not scheduler.strict and scheduler.monitor not in run.metrics:
            return False
        try:
            reading = run.metrics.fresh(scheduler.monitor, scheduler.seen)
        except MissingMetric as error:
            add_note(error, "a scheduler's metric must be logged before on_train_epoch_end, so that what is saved there has its new state")
            raise
        if reading is None:
            return False
        scheduler.seen = reading.serial
        scheduler.scheduler.step(reading.value)  # type: ignore[arg-type]
        return True

    # ------------------------------------------------------------------ one process

    @hookimpl
    def reduce(self, values: Tensor) -> Tensor:
        return values

    @hookimpl
    def gather(self, value: Any) -> list[Any]:
        return [value]

    @hookimpl
    def broadcast(self, value: Any) -> Any:
        return value

    @hookimpl
    def barrier(self) -> bool:
        return True

    # ------------------------------------------------------------------ checkpoints

    @hookimpl
    def save_checkpoint(self, run: Run, path: Path | str, state: dict[str, Any]) -> Path:
        if run.rank == 0:
            checkpoint.write(_local(path), state)
        return Path(path)

    @hookimpl
    def load_checkpoint(self, path: Path | str) -> dict[str, Any]:
        return checkpoint.load(_local(path))


def _local(path: Path | str) -> Path:
    if isinstance(path, Path):
        return path
    raise checkpoint.CheckpointError(f"{path!r} is not a local path, and no enabled plugin knows such places; enable 'checkpoint'")


def _direct(module: Module) -> Callable[..., Any]:
    """The module's ``training_step`` as an answer to the operation ``train_step``, with no call in between where it can be."""
    if _taken(module.training_step) == 2:
        return lambda run, batch, batch_idx, optimizer_idx: module.training_step(batch, batch_idx)
    call = _positional(module, "training_step")
    return lambda run, batch, batch_idx, optimizer_idx: call(batch, batch_idx, optimizer_idx)


def _taken(step: Callable[..., Any]) -> int | None:
    """How many arguments ``step`` takes, None for any number."""
    parameters = list(inspect.signature(step).parameters.values())
    return None if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters) else len(parameters)


def _positional(module: Module, name: str) -> Callable[..., Any]:
    """A step of ``module`` called with as many of (batch, batch_idx, dataloader_idx or optimizer_idx) as it takes.

    It is looked up at each call: a strategy may put something in its place that calls it.
    """
    step = getattr(module, name)
    taken = _taken(step)
    if taken == 1:
        return lambda batch, batch_idx, idx: getattr(module, name)(batch)
    if taken == 2:
        return lambda batch, batch_idx, idx: getattr(module, name)(batch, batch_idx)
    if taken in (3, None):
        return lambda batch, batch_idx, idx: getattr(module, name)(batch, batch_idx, idx)
    raise TypeError(f"{step.__qualname__} must take batch, or batch and batch_idx, or also dataloader_idx, got {inspect.signature(step)}")
