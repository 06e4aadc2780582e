"""Trains on several ranks, each with the whole module: gradients are averaged when they are complete."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torchplug import Module, Run, hookimpl
from torchplug.distributed import Ranks, same

__all__ = ["Quokka"]


@dataclass(kw_only=True, eq=False)
class Quokka(Ranks):
    """Data parallel training in its simplest form: nothing is exchanged until an optimizer is about to step.

    `Ranks` starts the processes, lets them find each other, deals out the data and exchanges values; what is left is the module.

    Args:
        backend: What exchanges gradients: 'nccl', 'gloo' or another one of torch.distributed. None: nccl on CUDA, else gloo.
        timeout: How long a rank waits for the others before the run fails: '30m', '90s', a timedelta or a dict of its arguments.
        start_method: How processes are started from a plain script: 'spawn' needs `if __name__ == "__main__":` in it and things that
            can be pickled, 'fork' takes them as they are and cannot be used once CUDA is. 'auto' forks in a notebook and where
            something cannot be pickled.
        deal: Whether the data are dealt out over the ranks. False: the loaders give each rank its own part already.
        rendezvous: Where several machines meet, as host:port of the first one; torchrun has options of its own for that.
        exchange: The numbers that are exchanged: gradients 'as they are', or in 'bf16', which is half of the bytes and less exact.
    """

    exchange: Literal["as they are", "bf16"] = "as they are"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exchange not in ("as they are", "bf16"):
            raise ValueError(f"exchange must be 'as they are' or 'bf16', got {self.exchange!r}")

    @hookimpl(wrapper=True)
    def setup_module(self, run: Run, module: Module) -> Generator[None, Module, Module]:
        """Once: core, or a plugin behind this one, has moved the module to its device; every rank begins with the same numbers."""
        module = yield
        if run.world_size > 1:
            same(chain(module.parameters(), module.buffers()), run.device)
        return module

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run, stage: str) -> Generator[None, Any, Any]:
        """Around each evaluation: buffers, such as the statistics of BatchNorm, went their own ways on each rank."""
        if run.world_size > 1 and not run.alone:
            same(run.module.buffers(), run.device)
        return (yield)

    @hookimpl
    def reduce_gradients(self, run: Run, optimizer: Optimizer) -> bool | None:
        """At the end of a window, before anybody sees the gradients: they become their means over ranks."""
        if run.world_size == 1:
            return None
        if not run.alone:  # in a trial each rank works by itself
            self.average([parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad])
        return True

    def average(self, parameters: list[Tensor]) -> None:
        """Means over ranks. A gradient that a rank does not have counts as zero, if any rank has it."""
        if not parameters:
            return
        there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=parameters[0].device)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        for parameter, has in zip(parameters, there.tolist(), strict=True):
            if not has:
                continue
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            exchanged = gradient.to(torch.bfloat16 if self.exchange == "bf16" else gradient.dtype).contiguous()
            dist.all_reduce(exchanged)
            parameter.grad = gradient.copy_(exchanged).div_(dist.get_world_size())
