"""What happens behind training: a state is copied to host memory, and one thread writes it while training goes on."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

__all__ = ["HostCopy", "Writer"]


class HostCopy:
    """Copies of states, one after the other into the same host memory.

    A tensor that is there several times is copied once. Copies from a GPU go to pinned memory and are put behind the work that
    the GPU has, so that training does not wait for them; `ready` waits.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}  # by the place in the state
        self._events: list[torch.cuda.Event] = []

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of ``state``; the one before it is overwritten.

        Dicts, lists, tuples and tensors are copied; anything else is a value that does not change, or is refused when written.
        """
        before, self._buffers, self._events = self._buffers, {}, []
        known: dict[tuple[Any, ...], Tensor] = {}
        devices: set[torch.device] = set()

        def copied(value: Any, path: tuple[Any, ...]) -> Any:
            if isinstance(value, Tensor):
                return tensor(value.detach(), path)
            if type(value) in (dict, OrderedDict):
                return {key: copied(part, (*path, key)) for key, part in value.items()}
            if type(value) in (list, tuple):
                return type(value)(copied(part, (*path, i)) for i, part in enumerate(value))
            return copy.copy(value) if isinstance(value, dict) else value  # of a kind that the codec knows, or refuses

        def tensor(value: Tensor, path: tuple[Any, ...]) -> Tensor:
            if value.layout is not torch.strided or not value.numel():
                return value.clone()
            key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, value.device, value.is_conj(), value.is_neg())
            if key not in known:
                on_gpu = value.device.type == "cuda"
                place = (*path, on_gpu)
                buffer = before.pop(place, None)
                if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                    buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=on_gpu)
                buffer.copy_(value, non_blocking=on_gpu)
                if on_gpu:
                    devices.add(value.device)
                self._buffers[place] = known[key] = buffer
            return known[key]

        with torch.no_grad():
            whole: dict[str, Any] = copied(state, ())
        for device in devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)
        return whole

    def ready(self) -> None:
        """Waits until everything has arrived in host memory."""
        for event in self._events:
            event.synchronize()


class Writer:
    """One thread for all instances of a run, so that files are complete in the order in which their states were taken.

    A file that is there then means that every earlier one is there too. The thread begins with the first job and is no daemon:
    an interpreter that exits waits for what was begun.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Does ``job`` after those before it."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "torchplug checkpoint")
        return self._threads.submit(job)

    def drain(self) -> None:
        """Waits until every job is done, whatever came of it."""
        if self._threads is not None:
            self._threads.submit(int).result()

    def close(self) -> None:
        """Waits for the jobs and ends the thread."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()
