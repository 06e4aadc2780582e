"""What the long tests share: real processes, several at once, that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

FORK = multiprocessing.get_context("fork")  # torch is imported already
LIMIT = 120  # seconds that a process may take


class Processes:
    """Processes of a test. Each is the head of a group, so that a kill reaches a loader's workers too."""

    def __init__(self) -> None:
        self.begun: list[BaseProcess] = []

    def start(self, job: Callable[[], Any]) -> BaseProcess:
        """Does ``job`` in a new process. Its exit code is 1 if an exception came of it."""

        def main() -> None:
            os.setpgid(0, 0)
            job()

        process = FORK.Process(target=main)
        process.start()
        self.begun.append(process)
        return process

    def run(self, jobs: Sequence[Callable[[], Any]]) -> list[int | None]:
        """Does every job in a process of its own, as many at a time as there are cores; the exit codes, -9 for a kill."""
        waiting, running, made = list(jobs), [], []
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(self.start(waiting.pop(0)))
                made.append((running[-1], time.monotonic() + LIMIT))
            wait([process.sentinel for process in running], timeout=1)
            running = [process for process in running if process.exitcode is None]
            for process, deadline in made:
                if process in running and time.monotonic() > deadline:
                    pytest.fail(f"a process did not end within {LIMIT} s")
        return [process.exitcode for process, _ in made]

    def end(self) -> None:
        """Kills whatever is still there."""
        for process in self.begun:
            if process.is_alive():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()


@pytest.fixture(scope="session", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What torch imports at the first optimizer step, a second's work, is imported once for all processes that are made from this one."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    optimizer.zero_grad()
    optimizer.step()


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Starts processes that are gone when the test is over."""
    made = Processes()
    yield made
    made.end()
