"""Logs the norms of the gradients, in total and for each layer, as they are before clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchplug import Run, hookimpl

__all__ = ["GradNorm"]


@dataclass(kw_only=True, eq=False)
class GradNorm:
    """Logs the p-norm of the gradients that a logging step was taken with: unscaled, of the whole window, not yet clipped.

    ``grad_2.0_norm_total`` is the norm over all parameters of the optimizer (with several optimizers
    ``grad_2.0_norm_total/0`` and so on, by their order), ``grad_2.0_norm/NAME`` that over the parameters that a layer has
    itself. A parameter without a gradient counts for nothing. Values stay on their device until loggers get them. A step
    that the loss scaler skips is not logged.

    Args:
        norm_type: The p of the norm, above 0; float('inf') for the largest absolute value.
        per_layer: Log the norm of each layer too; False logs the total alone.
    """

    norm_type: float = 2.0
    per_layer: bool = True

    _norms: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)

    on_error = "disable"
    before = "*"  # whoever changes gradients comes later

    def __post_init__(self) -> None:
        p = self.norm_type
        if not isinstance(p, (int, float)) or isinstance(p, bool) or math.isnan(p) or p <= 0:
            raise ValueError(f"norm_type must be a number above 0, or inf, got {p!r}")
        if not isinstance(self.per_layer, bool):
            raise TypeError(f"per_layer must be True or False, got {self.per_layer!r}")
        self.norm_type = float(p)

    @hookimpl
    def on_before_optimizer_step(self, run: Run, optimizer: Optimizer) -> None:
        position = run.position
        step = position.step + (run.counted != position.micro_step)  # an earlier optimizer of this batch has counted it
        due = step % run.options.log_every_n_steps == 0
        self._norms = self._of(run, optimizer) if due else {}  # those of a step that was skipped are forgotten

    @hookimpl
    def on_after_optimizer_step(self, run: Run) -> None:
        for name, norm in self._norms.items():
            run.log(name, norm)

    def _of(self, run: Run, optimizer: Optimizer) -> dict[str, Tensor]:
        """The norms by name."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers: dict[str, list[Tensor]] = {}
        for name, parameter in run.module.named_parameters():
            gradient = parameter.grad
            if gradient is not None and gradient.numel() and id(parameter) in own:
                layer = name.rpartition(".")[0] or name  # a parameter of the module itself goes by its own name
                layers.setdefault(layer, []).append(self._norm(gradient))
        if not layers:
            return {}
        by_layer = {name: self._joined(norms) for name, norms in layers.items()}
        total = f"grad_{self.norm_type}_norm_total"
        if len(run.optimizers) > 1:
            total += f"/{next(i for i, each in enumerate(run.optimizers) if each is optimizer)}"
        norms = {f"grad_{self.norm_type}_norm/{name}": norm for name, norm in by_layer.items()} if self.per_layer else {}
        return {name: _whole(norm) for name, norm in {total: self._joined(list(by_layer.values())), **norms}.items()}

    def _norm(self, gradient: Tensor) -> Tensor:
        values = gradient.detach()
        if values.is_sparse:
            values = values.coalesce().values()
            values = values if values.numel() else values.new_zeros(1)  # of no element there is no largest one
        half = values.dtype in (torch.float16, torch.bfloat16)
        norm: Any = torch.linalg.vector_norm(values, self.norm_type, dtype=torch.float32 if half else None)
        return norm  # type: ignore[no-any-return]

    def _joined(self, norms: list[Tensor]) -> Tensor:
        """The norm of everything whose norms are given."""
        if len(norms) == 1:
            return norms[0]
        joined: Any = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]), self.norm_type)
        return joined  # type: ignore[no-any-return]


def _whole(norm: Any) -> Tensor:
    """A norm over parameters of which each rank has a part (torch's DTensor) is put together from those of the parts."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[no-any-return]
