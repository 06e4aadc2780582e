"""What a run can change, taken out of it and put back: the state that a checkpoint holds."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from torchplug.checkpoint import plain
from torchplug.seed import generator_state

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["collect", "versions"]


def collect(run: Run) -> dict[str, Any]:
    """Everything that a run can change, as nested dicts and lists of tensors and plain values."""
    options = run.options
    return {
        "versions": {**versions(), **run.packages},
        "run": {"id": run.id, "class": type(run.module).__qualname__},
        "position": dataclasses.asdict(run.position),
        "module": dict(run.module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "optimizer_steps": list(run.optimizer_steps),
        "schedulers": [{"scheduler": s.scheduler.state_dict(), "seen": s.seen} for s in run.schedulers],
        "generators": generator_state(),
        "metrics": dict(run.metrics.results()),
        "plugins": run.plugin_states(),
        "hyperparameters": plain(run.module.hparams, "hyperparameters"),
        "hyperparameters_argument": run.module._hparams_argument,
        "options": {"accumulate_grad_batches": options.accumulate_grad_batches, "precision": options.precision},
    }


def versions() -> dict[str, str]:
    """The versions that a run's results depend on first of all."""
    try:
        own = version("torchplug")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "unknown"
    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchplug": own}
