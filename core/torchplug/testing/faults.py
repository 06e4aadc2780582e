"""What goes wrong between a logger and what it writes to: made on purpose, for `check_logger`."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torchplug import tracking
from torchplug.testing.stored import listed, named
from torchplug.tracking import Backend, Mark, Place, Record, Refused

__all__ = ["PATIENCE", "Faults", "impatient"]

PATIENCE = 10.0  # seconds in which something that is waited for happens


class Faults:
    """What goes wrong between torchplug and what a logger writes to.

    A logger with a `Backend` meets it there, where its thread calls; any other one in ``log_metrics``.
    """

    def __init__(self) -> None:
        self.down = False
        self.meant = False  # whether what fails now is an outage that the author makes
        self.trouble = ""  # the first error of the backend itself
        self.finished = False  # whether everything was sent
        self.raised = 0
        self.stored = 0  # records of metrics that the backend took
        self.pause = 0.0  # seconds for each record
        self.over = threading.Event()  # nothing is slow any more
        self.seen: list[str] = []  # calls of the backend, with the status of finish
        self.times: list[float] = []  # seconds of each call of log_metrics

    def put_into(self, plugin: Any) -> Any:
        """Stands between ``plugin`` and its backend from now on; returns the plugin."""
        if hasattr(plugin, "backend"):
            make = plugin.backend
            plugin.backend = lambda: self.between(make())
        else:
            plugin.log_metrics = self._around(plugin.log_metrics)
        return plugin

    def between(self, backend: Backend) -> Backend:
        """A backend that fails as this says, and whose own errors are noted."""
        return _Between(backend, self)

    def note(self, method: str, error: Exception, records: Sequence[Record] = ()) -> None:
        """Keeps the first error that was not made on purpose."""
        if not (self.trouble or self.meant):
            self.trouble = f"{method} raised {type(error).__name__}: {error}{_culprits(error, records)}"

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

    def wait_for_metrics(self) -> None:
        """Waits until some were stored: an outage before that has nothing to lose."""
        end = time.monotonic() + PATIENCE / 5
        while not self.stored and time.monotonic() < end:
            time.sleep(0.005)

    def wait_for(self, count: int) -> None:
        """Waits until it has raised so often."""
        end = time.monotonic() + PATIENCE
        while self.raised < count and time.monotonic() < end:
            time.sleep(0.005)


def _culprits(error: Exception, records: Sequence[Record]) -> str:
    """On which metrics an error came up: those that it speaks of, or else all of them."""
    names = list(dict.fromkeys(name for record in records if record["event"] == "log_metrics" for name in record["metrics"]))
    if isinstance(error, UnicodeError):
        bad = getattr(error, "object", "")[getattr(error, "start", 0) : getattr(error, "end", 0)]
        told = [name for name in names if isinstance(bad, str) and bad and bad in name]
    else:
        told = [name for name in names if named(name, str(error))]
    if names:
        return f" on a record with {listed(told or names)}"
    return f" on a record of {records[0]['event']}" if len(records) == 1 else ""


class _Between:
    """A backend with faults in front of it, and behind it: what was stored may be answered with an error too."""

    def __init__(self, backend: Backend, faults: Faults) -> None:
        self._backend, self._faults = backend, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def connect(self, place: Place) -> list[Mark]:
        self._faults.finished = False
        if self._faults.raised % 2:  # every other time it is reached, and fails later
            self._faults.fail()
        with self._noted("connect"):
            return self._backend.connect(place)

    def go_back(self, mark: Mark) -> None:
        with self._noted("go_back"):
            self._backend.go_back(mark)

    def send(self, records: Sequence[Record], mark: Mark) -> None:
        self._faults.over.wait(self._faults.pause * len(records))
        if self._faults.raised:
            self._faults.fail()
        with self._noted("send", records):
            self._backend.send(records, mark)
        self._faults.stored += sum(record["event"] == "log_metrics" for record in records)
        self._faults.fail()  # the first time: it is stored, and the answer is lost

    def finish(self, status: str) -> None:
        self._faults.seen.append(f"finish {status}")
        self._faults.fail()
        with self._noted("finish"):
            self._backend.finish(status)
        self._faults.finished = True

    def close(self) -> None:
        self._faults.seen.append("close")
        with self._noted("close"):
            self._backend.close()

    @contextmanager
    def _noted(self, method: str, records: Sequence[Record] = ()) -> Iterator[None]:
        """Inside, a method of the backend is called."""
        try:
            yield
        except Refused:
            raise
        except Exception as error:
            self._faults.note(method, error, records)
            raise


@contextmanager
def impatient() -> Iterator[None]:
    """Trackers try again soon."""
    before = tracking.PAUSES
    tracking.PAUSES = (0.02, 0.05)
    try:
        yield
    finally:
        tracking.PAUSES = before
