"""Trains on several ranks, each with the whole module: gradients are averaged while they are computed."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torchplug import Module, Run, hookimpl
from torchplug.distributed import Ranks, same

__all__ = ["Ddp"]


_OPTIONS = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"  # torch 2.15 renamed it


class _Step(nn.Module):
    """The training step as a forward pass, which is what torch's wrapper surrounds."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module
        self.step = module.training_step

    def forward(self, *args: Any) -> Any:
        return self.step(*args)


@dataclass(kw_only=True, eq=False)
class Ddp(Ranks):
    """Data parallel training (Li et al., "PyTorch Distributed", 2020): each rank computes gradients for its part of a step's samples.

    Started by torchrun, or from a plain script, ``Trainer(strategy="ddp", devices=2)``. Gradients are those of the mean over the
    samples of all ranks: 2 ranks with batches of 16 train as one process does with batches of 32. Within an accumulation window
    nothing is exchanged. In manual optimization, and with several optimizers, gradients are exchanged when an optimizer steps.

    Args:
        backend: What exchanges gradients: 'nccl', 'gloo' or another one of torch.distributed. None: nccl on CUDA, else gloo.
        timeout: How long a rank waits for the others before the run fails: '30m', '90s', a timedelta or a dict of its arguments.
        start_method: How processes are started from a plain script: 'spawn' needs `if __name__ == "__main__":` in it and things that
            can be pickled, 'fork' takes them as they are and cannot be used once CUDA is. 'auto' forks in a notebook and where
            something cannot be pickled.
        deal: Whether the data are dealt out over the ranks. False: the loaders give each rank its own part already.
        rendezvous: Where several machines meet, as host:port of the first one; torchrun has options of its own for that.
        sync_batchnorm: Whether BatchNorm takes the statistics of all ranks (on CUDA only, as torch has it).
        find_unused_parameters: Whether a step may leave parameters out. It costs a walk over the graph.
        static_graph: Whether every step uses the same parameters in the same order, which torch then relies on.
        gradient_as_bucket_view: Whether gradients are views of what is exchanged, which saves memory.
        bucket_cap_mb: Size of the parts in which gradients are exchanged, in MB.
        broadcast_buffers: Whether all ranks take the buffers (BatchNorm's statistics) of rank 0 at each training step that exchanges
            gradients, and before each evaluation, if there are any.
    """

    sync_batchnorm: bool = False
    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = True
    bucket_cap_mb: int = 25
    broadcast_buffers: bool = True

    _ddp: DistributedDataParallel | None = field(init=False, default=None, repr=False)
    _parameters: list[Tensor] = field(init=False, default_factory=list, repr=False)
    _trained: list[bool] = field(init=False, default_factory=list, repr=False)  # which of them torch's wrapper knows to be trained
    _pending: bool = field(init=False, default=False, repr=False)  # whether gradients are those of this rank alone
    _begun: bool = field(init=False, default=False, repr=False)  # whether torch's wrapper was used
    _checked: bool = field(init=False, default=False, repr=False)  # whether every parameter is known to take part

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bucket_cap_mb < 1:
            raise ValueError(f"bucket_cap_mb must be at least 1, got {self.bucket_cap_mb!r}")

    @hookimpl(wrapper=True)
    def setup_module(self, run: Run, module: Module) -> Generator[None, Module, Module]:
        module = yield
        if run.world_size == 1:
            return module
        if self.sync_batchnorm:
            if run.device.type == "cpu" and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
                raise ValueError("sync_batchnorm=True: torch has no BatchNorm over ranks for the CPU; leave it out there")
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        if run.purpose == "fit":
            self._wrap(run, module)
        if self._ddp is None:
            same(chain(module.parameters(), module.buffers()), run.device)
        return module

    def _wrap(self, run: Run, module: Module) -> None:
        """Surrounds the training step, for those parameters that are trained now."""
        self._parameters = list(module.parameters())
        self._trained = [parameter.requires_grad for parameter in self._parameters]
        vars(module).pop("training_step", None)
        self._ddp = None
        if not any(self._trained):
            return
        buffers: dict[str, Any] = {} if self.broadcast_buffers else {SYNC_BUFFERS: False}
        self._ddp = DistributedDataParallel(
            _Step(module),
            device_ids=[run.device.index] if run.device.type == "cuda" else None,
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            gradient_as_bucket_view=self.gradient_as_bucket_view,
            bucket_cap_mb=self.bucket_cap_mb,
            **buffers,
        )
        self._pending, self._begun, self._checked = False, False, self.find_unused_parameters
        vars(module)["training_step"] = self._through(self._ddp.module)

    def _through(self, wrapped: _Step) -> Callable[..., Any]:
        """The training step by way of torch's wrapper, the newest one: a trial may put this function back that was there before.
        Where it complains, parameters have names."""

        @functools.wraps(wrapped.step)  # core asks which arguments it takes
        def training_step(*args: Any) -> Any:
            try:
                return wrapped.step(*args) if self._ddp is None else self._ddp(*args)
            except RuntimeError as error:
                found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
                if found is not None:
                    names = [name for name, parameter in wrapped.module.named_parameters() if parameter.requires_grad]
                    raise RuntimeError(unused([names[int(index)] for index in found[1].split()])) from error
                raise

        return training_step

    @hookimpl(wrapper=True)
    def train_batch(self, run: Run) -> Generator[None, Any, Any]:
        if self._parameters and self._trained != [parameter.requires_grad for parameter in self._parameters]:  # some were unfrozen
            self._wrap(run, run.module)
        if self._ddp is not None:
            self._pending = not run.window_ends or not run.automatic or len(run.optimizers) > 1
            first = self.static_graph and not self._begun  # torch looks at a static graph while it exchanges
            self._begun = self._begun or not run.alone
            self._ddp.require_backward_grad_sync = (first or not self._pending) and not run.alone  # what its no_sync() sets
            if run.alone:
                self._ddp.require_forward_param_sync = False  # which the first step has, whatever no_sync() says
        return (yield)

    @hookimpl
    def on_step_skipped(self, run: Run, reason: str) -> None:
        super().on_step_skipped(run, reason)
        self._pending = True  # a window whose last batch is skipped has exchanged nothing

    @hookimpl
    def evaluate(self, run: Run) -> None:
        """Answers nothing. It is no wrapper, as it comes after whoever evaluates with other weights has put them in."""
        if self._ddp is not None and self.broadcast_buffers and not run.alone:
            same(run.module.buffers(), run.device)

    @hookimpl
    def reduce_gradients(self, run: Run, optimizer: Optimizer) -> bool | None:
        if self._ddp is None:
            return None
        if run.alone:
            return True
        if self._pending:
            average([parameter for group in optimizer.param_groups for parameter in group["params"]], run.world_size)
            return True
        if not self._checked:  # torch says so at the next step, when this one's update is made
            self._checked = True
            without = [name for name, each in run.module.named_parameters() if each.requires_grad and each.grad is None]
            if without:
                raise RuntimeError(unused(without))
        return True

    @hookimpl
    def teardown(self, run: Run) -> None:
        vars(run.module).pop("training_step", None)
        self._ddp, self._parameters = None, []


def unused(names: list[str]) -> str:
    """What is said of parameters that take no part in the loss."""
    return (
        f"parameters without a gradient: {', '.join(names)}; use them in training_step, set requires_grad=False for them, or write "
        "strategy={'ddp': {'find_unused_parameters': True}}"
    )


def average(parameters: list[Tensor], ranks: int) -> None:
    """The gradients become their means over ranks; one that a rank does not have counts as zero, if any rank has it."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return
    there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    chosen = [parameter for parameter, has in zip(parameters, there.tolist(), strict=True) if has]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_kind: dict[Any, list[Tensor]] = {}
    for parameter in chosen:
        assert parameter.grad is not None
        by_kind.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
    for gradients in by_kind.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= ranks
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
