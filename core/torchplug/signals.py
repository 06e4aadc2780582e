"""Signals that end a run in good order: a handler only sets a flag, the loop acts on it between two optimizer steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.utils.data import get_worker_info

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["Interruption", "leave", "watching"]


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
        self.run, self.process = run, os.getpid()
        self.earlier: dict[int, Any] = {}
        self.raised: BaseException | None = None
        self._pressed = self._over = False

    def begin(self, name: str) -> None:
        """Takes a signal, unless there is none of this name, it is ignored, or its handler is not of Python and could not be put back."""
        number = getattr(signal, name, None)
        if number is None or number in self.earlier or signal.getsignal(number) in (signal.SIG_IGN, None):
            return
        self.earlier[number] = signal.getsignal(number)
        signal.signal(number, self.interrupt)

    def end(self) -> None:
        """Puts back what was there before, except where somebody else has taken the signal meanwhile and may call us."""
        try:
            for number in sorted(self.earlier, key=lambda number: number == signal.SIGINT):  # which may raise when it is put back
                if signal.getsignal(number) in (self.interrupt, self.child_ended):
                    signal.signal(number, self.earlier[number])
        finally:
            self._over = True

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        earlier = self.earlier[number]
        if self._over or os.getpid() != self.process:
            if get_worker_info() is None:  # a loader's worker waits for its run to end it
                _as_before(number, frame, earlier)
            return
        if number == signal.SIGINT and self._pressed:
            if not callable(earlier):
                raise KeyboardInterrupt
            earlier(number, frame)
            return
        self._pressed |= number == signal.SIGINT
        first = not self.run.interrupted
        if first:
            self.run.interrupted, self.run.attention = signal.Signals(number).name, True
            self._spare_loaders()
        if callable(earlier):
            try:
                earlier(number, frame)
            except BaseException as error:
                if first:
                    self.raised = error.with_traceback(None)

    def _spare_loaders(self) -> None:
        """A signal to the whole process group ends a loader's workers as well. torch would raise for each of them wherever the run
        stands; without that the step is finished, and a worker that is missed is an error when a batch is asked of it."""
        number = getattr(signal, "SIGCHLD", None)
        if number is not None and callable(signal.getsignal(number)):
            self.earlier[number] = signal.getsignal(number)
            signal.signal(number, self.child_ended)

    def child_ended(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGCHLD after a signal."""
        with suppress(RuntimeError):
            self.earlier[number](number, frame)


def _as_before(number: int, frame: FrameType | None, earlier: Any) -> None:
    """What happens to a signal in a process that was forked, or after the run: the same as without us."""
    if callable(earlier):
        earlier(number, frame)
    else:
        signal.signal(number, earlier)
        os.kill(os.getpid(), number)


def leave(name: str) -> None:
    """Ends the program as a signal asks it to, when everything is in order: with 128 + its number, or as Ctrl-C does.

    Raises:
        KeyboardInterrupt: the signal was Ctrl-C.
        SystemExit: it was another one; the exit code is 143 for SIGTERM.
    """
    if name == "SIGINT":
        raise KeyboardInterrupt
    raise SystemExit(128 + getattr(signal, name))
