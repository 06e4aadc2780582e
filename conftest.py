"""What all tests share, those of plugins too: one seed, programs that start at once, and tests that are alone on the machine."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from torchplug import seed_everything


class Program:
    """A Python program in a process of its own, with the part of `subprocess.Popen` that the tests use.

    Args:
        path: where a process is got from.
        server: who gives it.
        request: the program.
        files: its input, output and errors; the last two may be `subprocess.PIPE`.
    """

    def __init__(self, path: str, server: subprocess.Popen[bytes], request: dict[str, Any], files: tuple[Any, Any, Any]) -> None:
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        self.returncode: int | None = None
        given, ours = [], []
        for name, file in zip(("stdin", "stdout", "stderr"), files, strict=True):
            if file == subprocess.PIPE:
                read, write = os.pipe()
                mine, theirs = (write, read) if name == "stdin" else (read, write)
                setattr(self, name, open(mine, "w" if name == "stdin" else "r", encoding="utf-8"))  # noqa: SIM115
                ours.append(theirs)
            elif file == subprocess.DEVNULL:
                theirs = os.open(os.devnull, os.O_RDWR)
                ours.append(theirs)
            else:
                theirs = file if isinstance(file, int) else file.fileno()
            given.append(theirs)
        self._asked = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._asked.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                assert server.poll() is None, "the process that forks is not there"
                time.sleep(0.05)
        socket.send_fds(self._asked, [json.dumps(request).encode()], given)
        for file in ours:
            os.close(file)
        answer = b""
        while not answer.endswith(b"\n"):
            part = self._asked.recv(1)
            assert part, "the process that forks has failed"
            answer += part
        self.pid = int(answer)

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0.001)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._asked.settimeout(timeout)
            try:
                self.returncode = int(self._asked.recv(64))
            except TimeoutError:
                raise subprocess.TimeoutExpired("a program", timeout or 0) from None
            self._asked.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, text: str = "", timeout: float | None = None) -> tuple[str, str]:
        """Sends the input, reads what there is to read to its end, and waits."""
        if self.stdin is not None:
            self.stdin.write(text)
            self.stdin.close()
        with ThreadPoolExecutor(2) as pool:
            read = [pool.submit(file.read) if file is not None else None for file in (self.stdout, self.stderr)]
            self.wait(timeout)
            output, errors = [each.result() if each is not None else "" for each in read]
        self.close()
        return output, errors

    def close(self) -> None:
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                file.close()


class Programs:
    """Starts programs, each the fork of a process that has imported torch; the first one takes as long as that."""

    def __init__(self, folder: str) -> None:
        self._path = str(Path(folder, "socket"))
        self._made: list[Program] = []
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).parent / "tests" / "forks.py"), self._path]
        self._server = subprocess.Popen(command, env=environment, start_new_session=True)

    def start(
        self, code: str, *argv: str, imports: Sequence[str] = (), cwd: str | Path = ".", env: dict[str, str] | None = None,
        stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.DEVNULL, stderr: Any = subprocess.DEVNULL,
    ) -> Program:  # fmt: skip
        """Does what ``subprocess.Popen([python, "-c", code, *argv], ...)`` does.

        Args:
            imports: what is imported before the fork, so that the next one has it too.
        """
        request = {
            "imports": list(imports), "code": code, "argv": list(map(str, argv)), "folder": str(Path(cwd).absolute()),
            "environment": dict(os.environ if env is None else env),
        }  # fmt: skip
        self._made.append(Program(self._path, self._server, request, (stdin, stdout, stderr)))
        return self._made[-1]

    def run(self, code: str, *argv: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """Does what ``subprocess.run`` does, with the output kept as text."""
        program = self.start(code, *argv, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
        try:
            output = program.communicate(timeout=timeout)
        finally:
            program.kill()
        return subprocess.CompletedProcess(["python", "-c", code], program.wait(10), *output)

    def end(self) -> None:
        """Kills the programs that are still there."""
        for program in self._made:
            program.kill()
            program.wait(10)
            program.close()
        self._made.clear()

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Where several processes run tests, by pytest-xdist, one that is marked ``alone`` waits until the others have ended theirs."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return (yield)
    folder = Path(tempfile.gettempdir())
    # lockf and not flock: a worker of a loader that is still there, in a process forked from this one, holds no lock
    with open(folder / f"pytest-{run}-next", "a+") as turn, open(folder / f"pytest-{run}-now", "a+") as now:
        fcntl.lockf(turn, fcntl.LOCK_EX)  # who waits to be alone is not overtaken
        fcntl.lockf(now, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.lockf(turn, fcntl.LOCK_UN)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """What was captured is sent by pytest-xdist as UTF-8, which not every text can be."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True, scope="session")
def _signals() -> None:
    """Signals do what they do in a program at a terminal: who runs the tests in the background may have them ignored."""
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    """One thread, and the same random numbers, whichever tests came before."""
    torch.set_num_threads(1)
    seed_everything(0)


@pytest.fixture(scope="session")
def _forks() -> Iterator[Programs]:
    with tempfile.TemporaryDirectory() as folder:
        made = Programs(folder)
        yield made
        made.close()


@pytest.fixture
def programs(_forks: Programs) -> Iterator[Programs]:
    """Starts Python programs that are there at once, and gone when the test is over."""
    yield _forks
    _forks.end()
