"""What goes wrong between a logger and what it writes to: made on purpose, for `check_logger`."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torchplug import tracking
from torchplug.tracking import Backend, Mark, Place, Record

__all__ = ["PATIENCE", "Faults", "impatient"]

PATIENCE = 10.0  # seconds in which something that is waited for happens


class Faults:
    """What goes wrong between torchplug and what a logger writes to.

    A logger with a `Backend` meets it there, where its thread calls; any other one in ``log_metrics``.
    """

    def __init__(self) -> None:
        self.down = False
        self.raised = 0
        self.pause = 0.0  # seconds for each record
        self.over = threading.Event()  # nothing is slow any more
        self.seen: list[str] = []  # calls of the backend, with the status of finish
        self.times: list[float] = []  # seconds of each call of log_metrics

    def put_into(self, plugin: Any) -> None:
        """Stands between ``plugin`` and its backend from now on."""
        if hasattr(plugin, "backend"):
            make = plugin.backend
            plugin.backend = lambda: _Between(make(), self)
            return
        plugin.log_metrics = self._around(plugin.log_metrics)

    def _around(self, method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def around(*args: Any) -> None:
            self.fail()
            begin = time.perf_counter()
            method(*args)
            self.times.append(time.perf_counter() - begin)

        return around

    def fail(self) -> None:
        """Raises while it is down."""
        if self.down:
            self.raised += 1
            raise ConnectionError("check_logger has cut the connection")

    def wait_for(self, count: int) -> None:
        """Waits until it has raised so often."""
        end = time.monotonic() + PATIENCE
        while self.raised < count and time.monotonic() < end:
            time.sleep(0.005)


class _Between:
    """A backend with faults in front of it, and behind it: what was stored may be answered with an error too."""

    def __init__(self, backend: Backend, faults: Faults) -> None:
        self._backend, self._faults = backend, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def connect(self, place: Place) -> list[Mark]:
        if self._faults.raised % 2:  # every other time it is reached, and fails later
            self._faults.fail()
        return self._backend.connect(place)

    def send(self, records: Sequence[Record], mark: Mark) -> None:
        self._faults.over.wait(self._faults.pause * len(records))
        if self._faults.raised:
            self._faults.fail()
        self._backend.send(records, mark)
        self._faults.fail()  # the first time: it is stored, and the answer is lost

    def finish(self, status: str) -> None:
        self._faults.seen.append(f"finish {status}")
        self._faults.fail()
        self._backend.finish(status)

    def close(self) -> None:
        self._faults.seen.append("close")
        self._backend.close()


@contextmanager
def impatient() -> Iterator[None]:
    """Trackers try again soon."""
    before = tracking.PAUSES
    tracking.PAUSES = (0.02, 0.05)
    try:
        yield
    finally:
        tracking.PAUSES = before
