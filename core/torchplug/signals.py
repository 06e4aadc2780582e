"""Signals that end a run in good order: a handler only sets a flag, the loop acts on it between two optimizer steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["Interruption", "held", "leave", "sparing", "watching"]

NOW, EVER = 0, 1  # rows by number of a signal: how many runs of this process act on it, whether any did

_memory = torch.zeros(2, signal.NSIG, dtype=torch.uint8)
_owner = os.getpid()


def _watched() -> Tensor:
    """What this process watches. One that was forked begins with nothing: what it writes is no business of those it came from."""
    global _memory, _owner
    if _owner != os.getpid():
        _memory, _owner = torch.zeros_like(_memory), os.getpid()
    return _memory


class Interruption(BaseException):
    """Ends an evaluation within training from the inside, so that the run can end soon after a signal."""


@contextmanager
def watching(run: Run, names: Iterable[str]) -> Iterator[None]:
    """Inside, each of the signals, and the first Ctrl-C, sets ``run.interrupted``; afterwards their handlers are what they were.

    Handlers that were there before are called too, and signals that are ignored stay ignored. Python takes signals in its main
    thread alone: a run in another thread has to be stopped by ``run.request_stop``.

    Raises:
        BaseException: what an earlier handler raised at the first signal, now that the run has ended in good order.
        KeyboardInterrupt: at the second Ctrl-C, at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(run)
    try:
        for name in (*names, "SIGINT"):
            watch.begin(name)
        yield
    finally:
        watch.end()
    if watch.raised is not None:
        raise watch.raised


class _Watch:
    """The handlers of one run.

    Attributes:
        earlier: by the number of a signal, who handled it before.
        raised: what one of them raised at the first signal; raised where the signal came, it would break the step off.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.process, self.watched = run, os.getpid(), _watched()
        self.earlier: dict[int, Any] = {}
        self.raised: BaseException | None = None
        self._pressed = 0.0  # when Ctrl-C came first
        self._over = False

    def begin(self, name: str) -> None:
        """Takes a signal, unless there is none of this name, it is ignored, or its handler is not of Python and could not be put back."""
        number = getattr(signal, name, None)
        if number is None or number in self.earlier or signal.getsignal(number) in (signal.SIG_IGN, None):
            return
        self.earlier[number] = signal.getsignal(number)
        self.watched[NOW, number] += 1
        self.watched[EVER, number] = 1
        signal.signal(number, self.interrupt)

    def end(self) -> None:
        """Puts back what was there before, except where somebody else has taken the signal meanwhile and may call us."""
        try:
            for number in sorted(self.earlier, key=lambda number: number == signal.SIGINT):  # which may raise when it is put back
                if signal.getsignal(number) == self.interrupt:
                    signal.signal(number, self.earlier[number])
        finally:
            self._over = True
            for number in self.earlier if os.getpid() == self.process else ():
                self.watched[NOW, number] -= 1

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        earlier = self.earlier[number]
        if self._over or os.getpid() != self.process:
            _as_before(number, frame, earlier)
            return
        if number == signal.SIGINT and self._pressed and not self._echo():
            if not callable(earlier):
                raise KeyboardInterrupt
            earlier(number, frame)
            return
        if number == signal.SIGINT:
            self._pressed = self._pressed or time.monotonic()
        first = not self.run.asked_to_end
        if first:
            self.run.interrupt(signal.Signals(number).name)
        if callable(earlier):
            try:
                earlier(number, frame)
            except BaseException as error:
                if first:
                    self.raised = error.with_traceback(None)

    def _echo(self) -> bool:
        """Whether this is the first Ctrl-C once more: a terminal sends it to all ranks, and so does who started them."""
        return self.run.world_size > 1 and time.monotonic() - self._pressed < 1.0


def _as_before(number: int, frame: FrameType | None, earlier: Any) -> None:
    """What happens to a signal in a process that was forked, or after the run: the same as without us."""
    if callable(earlier):
        earlier(number, frame)
    else:
        signal.signal(number, earlier)
        os.kill(os.getpid(), number)


@dataclass
class Sparing:
    """What a loader's worker begins with, a ``worker_init_fn``: signals that its run acts on pass it by.

    Ctrl-C, a scheduler or a service manager signals every process of a job. The step that is running needs its batches still, and
    so do a window and an epoch that go on to their end. When the run is over, the next signal ends the worker.

    Args:
        watched: which signals runs act on, at present and ever, in memory that is shared with the workers.
        inner: the loader's own ``worker_init_fn``.
    """

    watched: Tensor
    inner: Callable[[int], Any] | None

    def __call__(self, worker: int) -> None:
        numbers = self.watched[EVER].nonzero().flatten().tolist()  # the run may be over before its worker begins
        for number in numbers:
            signal.signal(number, self._pass)
            if hasattr(signal, "siginterrupt"):
                signal.siginterrupt(number, False)  # what the system does for the worker goes on
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # what `held` blocked
        if self.inner is not None:
            self.inner(worker)

    def _pass(self, number: int, frame: FrameType | None) -> None:
        if not self.watched[NOW, number]:
            os._exit(0)


def sparing(inner: Callable[[int], Any] | None) -> Sparing:
    """The ``worker_init_fn`` of a loader whose own is ``inner``."""
    return Sparing(_watched().share_memory_(), inner)  # type: ignore[no-untyped-call]


@contextmanager
def held() -> Iterator[None]:
    """Inside, signals that a run acts on wait: one that came to a worker before it has its handlers would end it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _watched()[NOW].nonzero().flatten().tolist())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave(name: str) -> None:
    """Ends the program as a signal asks it to, when everything is in order: with 128 + its number, or as Ctrl-C does.

    Raises:
        KeyboardInterrupt: the signal was Ctrl-C.
        SystemExit: it was another one; the exit code is 143 for SIGTERM.
    """
    if name == "SIGINT":
        raise KeyboardInterrupt
    raise SystemExit(128 + getattr(signal, name))
