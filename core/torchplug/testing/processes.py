"""Functions that run in processes of their own: one that may be killed, and two ranks that train together."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from torchplug.distributed import Ranks

__all__ = ["Child", "two_ranks"]

RANKS = 2
GRACE = 5.0  # seconds that a rank gets to end after the other one failed
WARN_EARLY = 0.5  # seconds before the limit at which a process writes down where it is


class _There(Exception):
    """Carries the traceback of another process."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class Child:
    """A function in a process of its own.

    It is forked, so that a function may be any and starts at once. Where an accelerator is there, whose state cannot be forked, and
    on Windows it is spawned: then function and arguments are pickled.

    Args:
        function: what to call; its answer is pickled.
        args: its arguments.
        environment: variables that it has besides those of this process.
        timeout: seconds after which it is killed.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="torchplug-")
        self._answer, self._stack = Path(self._folder.name, "answer"), Path(self._folder.name, "stack")
        self._end, self.timeout = time.monotonic() + timeout, timeout
        context: Any = multiprocessing.get_context("fork" if _can_fork() else "spawn")
        files = (self._answer, self._stack)
        self._process = context.Process(target=_perform, args=(function, args, dict(environment or {}), files, timeout))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child uses none of them
            self._process.start()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return int(self._process.pid)

    def ended(self) -> bool:
        """Whether it is over, by itself or because its time is; then it was killed."""
        if self._process.is_alive() and time.monotonic() > self._end:
            self.kill()
        return not self._process.is_alive()

    def wait(self) -> None:
        """Waits until it is over."""
        while not self.ended():
            self._process.join(min(0.2, max(0.01, self._end - time.monotonic())))

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._process.join()

    @property
    def killed_by(self) -> str:
        """The signal that ended it, empty if none did."""
        code = self._process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else ""

    @property
    def failed_at(self) -> float:
        """When it failed, on the clock of all processes; infinity if it did not."""
        return float(self._outcome().get("at", float("inf"))) if self.ended() else float("inf")

    def result(self, who: str = "the process") -> Any:
        """What the function returned.

        Raises:
            Exception: what it raised, caused by an exception that shows the traceback there.
            TimeoutError: it did not end in time; the message says where it was.
            RuntimeError: it ended without an answer.
        """
        self.wait()
        outcome = self._outcome()
        if "answer" in outcome:
            return outcome["answer"]
        if "error" in outcome:
            raise outcome["error"] from _There(f"in {who}:\n{outcome['text']}")
        if time.monotonic() > self._end:
            where = self._stack.read_text(encoding="utf-8") if self._stack.exists() else ""
            raise TimeoutError(f"{who} did not end within {self.timeout:g} s and was killed; it was here:\n{where}")
        raise RuntimeError(f"{who} ended without an answer, by {self.killed_by or f'exit code {self._process.exitcode}'}")

    def close(self) -> None:
        """Ends it if it is still there, and forgets it."""
        if self._process.is_alive():
            self.kill()
        self._process.join()
        self._process.close()
        self._folder.cleanup()

    def _outcome(self) -> dict[str, Any]:
        if not self._answer.exists():
            return {}
        outcome: dict[str, Any] = pickle.loads(self._answer.read_bytes())
        return outcome


def _can_fork() -> bool:
    """Whether a process can be forked that trains: torch's threads for the gradients of an accelerator do not come along."""
    return hasattr(os, "fork") and not torch.cuda.is_available() and not torch.backends.mps.is_available()


def _perform(
    function: Callable[..., Any], args: tuple[Any, ...], environment: Mapping[str, str], files: tuple[Path, Path], timeout: float
) -> None:
    """What the process does. It leaves without taking apart what it shares with the one it came from."""
    os.environ.update(environment)
    torch.set_num_threads(1)  # torch's pool of threads does not come along with a fork
    answer, stack = files
    with open(stack, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(max(timeout - WARN_EARLY, timeout / 2), file=file)
        try:
            outcome = _packed({"answer": function(*args)})
        except BaseException as error:
            outcome = _failure(error)
        finally:
            faulthandler.cancel_dump_traceback_later()
    unfinished = answer.with_name("unfinished")
    unfinished.write_bytes(outcome)
    unfinished.rename(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _packed(outcome: dict[str, Any]) -> bytes:
    return pickle.dumps(outcome)


def _failure(error: BaseException) -> bytes:
    """An error and its traceback; one that cannot be pickled, or not be made again, becomes a RuntimeError of the same words."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    outcome = {"error": error, "text": text, "at": time.time()}
    try:
        packed = _packed(outcome)
        pickle.loads(packed)
        return packed
    except Exception:  # whatever an exception of somebody else raises when it is pickled
        return _packed({**outcome, "error": RuntimeError(f"{type(error).__name__}: {error}")})


# ---------------------------------------------------------------------- ranks


def two_ranks(function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Calls ``function(*args)`` in two processes that are ranks 0 and 1 of a gloo group on this machine; returns both answers.

    The group is there when the function begins, and ``RANK`` and ``WORLD_SIZE`` are in the environment, as torchrun has them: a fit
    with ``strategy="ddp"`` in the function is one of two ranks.

    Args:
        function: what each rank does.
        args: what both get.
        timeout: seconds after which both are killed.

    Raises:
        Exception: what the first rank to fail raised, with its traceback; the other one is ended.
        TimeoutError: they did not end in time; the message says where they were.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [Child(_rank, function, args, environment=_environment(rank, port), timeout=timeout) for rank in range(RANKS)]
    try:
        end = float("inf")
        while not all(rank.ended() for rank in ranks) and time.monotonic() < end:
            if end == float("inf") and any(rank.ended() and _has_failed(rank) for rank in ranks):
                end = time.monotonic() + GRACE
            time.sleep(0.005)
        first = min(range(RANKS), key=lambda rank: (not ranks[rank].ended(), not ranks[rank].killed_by, ranks[rank].failed_at))
        ranks[first].result(f"rank {first}")
        return [each.result(f"rank {rank}") for rank, each in enumerate(ranks)]
    finally:
        for rank in ranks:
            rank.close()


def _has_failed(rank: Child) -> bool:
    return rank.failed_at < float("inf") or bool(rank.killed_by)


def _environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun says to a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    interface = {} if loopback is None else {"GLOO_SOCKET_IFNAME": loopback}
    return {**{name: str(number) for name, number in numbers.items()}, "MASTER_ADDR": "127.0.0.1", **interface}


def _rank(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What a rank does: it joins the group as every strategy does, and waits for the other one at the end."""
    options = SimpleNamespace(accelerator="cpu", devices=1)
    whoever: Any = SimpleNamespace(options=options, local_rank=int(os.environ["LOCAL_RANK"]))
    Ranks(timeout="30m")._connect(whoever)
    answer = function(*args)
    dist.barrier()
    return answer
