"""Logs the load of the machine at logging steps: CPU, RAM, and memory of the CUDA device where there is one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from torchplug import Run, hookimpl

__all__ = ["DeviceStats"]

MB = 1e6


@dataclass(kw_only=True, eq=False)
class DeviceStats:
    """Logs what the machine and this process use, under ``device_stats/``. Nothing is asked between two logging steps.

    Of the machine ``cpu_percent`` (all cores, since the last sample), ``cpu_vm_percent`` (RAM in use) and ``cpu_swap_percent``;
    of this process ``process_cpu_percent`` (100 for one core, since the last sample) and ``process_rss_mb`` (RAM that it holds).
    Of the CUDA device of the run ``cuda_allocated_mb`` and ``cuda_reserved_mb`` (what torch's tensors and allocator hold),
    ``cuda_max_allocated_mb`` (the most that tensors held so far), and ``cuda_used_percent`` (all processes together). MB are 10^6 bytes.
    With several ranks what is logged is the mean over them.

    Args:
        cpu_stats: Sample CPU and RAM; False leaves the CUDA device alone, which is nothing in a run without one.
    """

    cpu_stats: bool = True

    _process: psutil.Process | None = field(init=False, default=None, repr=False)
    _logged: int = field(init=False, default=-1, repr=False)  # the last step that was logged

    on_error = "disable"

    def __post_init__(self) -> None:
        if not isinstance(self.cpu_stats, bool):
            raise TypeError(f"cpu_stats must be True or False, got {self.cpu_stats!r}")

    def __getstate__(self) -> dict[str, Any]:
        """What other processes get: not what belongs to this one."""
        return {**vars(self), "_process": None}

    @hookimpl
    def on_train_start(self) -> None:
        self._logged = -1
        self._process = psutil.Process() if self.cpu_stats else None
        if self._process is not None:  # the first call begins the time that the next one speaks of
            psutil.cpu_percent()
            self._process.cpu_percent()

    @hookimpl
    def on_after_optimizer_step(self, run: Run) -> None:
        step = run.position.step
        if step % run.options.log_every_n_steps or step == self._logged:
            return
        self._logged = step
        for name, value in {**self._cpu(), **_cuda(run.device)}.items():
            run.log(f"device_stats/{name}", value)

    def _cpu(self) -> dict[str, float]:
        if self._process is None:
            return {}
        return {
            "cpu_percent": psutil.cpu_percent(),
            "cpu_vm_percent": psutil.virtual_memory().percent,
            "cpu_swap_percent": psutil.swap_memory().percent,
            "process_cpu_percent": self._process.cpu_percent(),
            "process_rss_mb": self._process.memory_info().rss / MB,
        }


def _cuda(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "cuda_allocated_mb": torch.cuda.memory_allocated(device) / MB,
        "cuda_reserved_mb": torch.cuda.memory_reserved(device) / MB,
        "cuda_max_allocated_mb": torch.cuda.max_memory_allocated(device) / MB,
        "cuda_used_percent": 100 * (1 - free / total),
    }
