"""What is global in a process, and what of it was changed."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch

__all__ = ["Surroundings"]

PATIENCE = 2.0  # seconds that a thread gets to end after the run
OPENED = {"open files": "a file is still open", "threads": "a thread still runs"}  # of these more is wrong, and less is not


def _keep(those: list[Any], each: Any) -> None:
    if each not in those:
        those.insert(0, each)


def _drop(those: list[Any], each: Any) -> None:
    if each in those:
        those.remove(each)


# what libraries add at their first use, to stay there: how one of them is put there, and how it is taken away
ADDED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "environment": (lambda each: os.environ.setdefault(*each), lambda each: os.environ.pop(each[0], None)),
    "handlers of the root logger": (logging.getLogger().addHandler, logging.getLogger().removeHandler),
    "warning filters": (lambda each: _keep(_filters(), each), lambda each: _drop(_filters(), each)),
}


class Surroundings:
    """The global state of the process as it was when this was made.

    Attributes:
        added: what a first look left to a second one, each with the place where it is.
    """

    def __init__(self) -> None:
        self.before = _look()
        self.added: list[tuple[str, Any]] = []

    def changes(self, first: bool = False) -> Iterator[str]:
        """What is not as it was, in words.

        Args:
            first: what happened since may have used libraries for the first time, which open files, start threads, and set variables and
                filters of warnings that stay. These are not told of: `added` has what a second look, `without` it, finds again where
                it is done in every run.
        """
        gc.collect()  # a file may be closed by the end of its owner
        end = time.monotonic() + PATIENCE
        while not first and _look()["threads"].keys() - self.before["threads"].keys() and time.monotonic() < end:
            time.sleep(0.01)
        for name, value in _look().items():
            was = self.before[name]
            if name in OPENED:
                more = [str(value[key]) for key in value.keys() - was.keys()]
                if more and not first:
                    yield f"{OPENED[name]}: {', '.join(sorted(more))}"
            elif isinstance(value, dict):
                for key in sorted(key for key in {**value, **was} if value.get(key) != was.get(key)):
                    if first and key not in was:
                        self.added.append((name, (key, value[key])))
                    else:
                        yield f"{name}: {key} has changed: it was {was.get(key)!r} and is {value.get(key)!r}"
            elif isinstance(value, list):
                new, gone = ([each for each in one if each not in other] for one, other in ((value, was), (was, value)))
                if gone or (new and not first):
                    yield f"{name} has changed: new is {new}, gone is {gone}"
                else:
                    self.added += ((name, each) for each in new)
            elif value != was:
                yield f"{name} has changed: it was {was!r} and is {value!r}"

    @contextmanager
    def without(self) -> Iterator[None]:
        """Inside, what was `added` is not there."""
        for name, each in self.added:
            ADDED[name][1](each)
        try:
            yield
        finally:
            for name, each in reversed(self.added):
                ADDED[name][0](each)


def _filters() -> list[Any]:
    """The list that `warnings` looks at now."""
    return cast("list[Any]", warnings.filters)


def _look() -> dict[str, Any]:
    """What is global in a process, by name."""
    cudnn = torch.backends.cudnn
    places: dict[str, Callable[[], Any]] = {
        "grad mode": torch.is_grad_enabled,
        "inference mode": torch.is_inference_mode_enabled,
        "deterministic algorithms": lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "torch.backends.cudnn": lambda: (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        "anomaly detection": torch.is_anomaly_enabled,
        "autocast": lambda: (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "default dtype": torch.get_default_dtype,
        "default device": torch.get_default_device,
        "float32 matmul precision": torch.get_float32_matmul_precision,
        "number of threads of torch": torch.get_num_threads,
        "signal handlers": lambda: {each.name: signal.getsignal(each) for each in signal.Signals},
        "environment": lambda: dict(os.environ),
        "working directory": os.getcwd,
        "stdout and stderr": lambda: (sys.stdout, sys.stderr),
        "hooks of the interpreter": lambda: (sys.excepthook, threading.excepthook, sys.gettrace(), sys.getprofile()),
        "level of the root logger": lambda: logging.getLogger().level,
        "handlers of the root logger": lambda: list(logging.getLogger().handlers),
        "warning filters": lambda: list(warnings.filters),
        "garbage collection": lambda: (gc.isenabled(), gc.get_threshold()),
        "open files": _files,
        "threads": lambda: {thread.ident: thread.name for thread in threading.enumerate()},
    }
    return {name: look() for name, look in places.items()}


def _files() -> dict[str, str]:
    """Open files by their numbers, without pipes and sockets, which belong to libraries; none where that cannot be seen."""
    folder, found = Path("/proc/self/fd"), {}
    if folder.is_dir():
        for number in os.listdir(folder):
            with suppress(OSError):
                target = os.readlink(folder / number)
                if target.startswith("/") and not target.startswith(("/dev/", "/proc/")):
                    found[number] = target
    return found
