"""Signals that end a run in good order: a handler only sets a flag, the loop acts on it between two optimizer steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    before: dict[int, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        earlier = before[number]
        if os.getpid() != process:
            _in_a_child(number, frame, earlier)
            return
        again = bool(run.interrupted)
        if not again:
            run.interrupted, run.attention = signal.Signals(number).name, True
            # A signal to the whole process group ends a loader's workers as well. torch would raise for each of them wherever the
            # run stands; without that the step is finished, and a worker that is missed is an error when a batch is asked of it.
            if hasattr(signal, "SIGCHLD"):
                before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if number == signal.SIGINT and earlier is signal.default_int_handler:
            if again:  # a second Ctrl-C is meant: it ends the run at once, and the next one ends even that
                signal.signal(number, earlier)
                earlier(number, frame)
        elif callable(earlier):
            earlier(number, frame)

    try:
        for name in (*names, "SIGINT"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.getsignal(number)
                signal.signal(number, interrupt)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier if earlier is not None else signal.SIG_DFL)


def _in_a_child(number: int, frame: FrameType | None, earlier: Any) -> None:
    """A forked process has the handler too: a loader's worker waits for its run to end it, any other one does what it did before."""
    if get_worker_info() is not None:
        return
    signal.signal(number, earlier)
    if callable(earlier):
        earlier(number, frame)
    else:
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
