"""Every way to end ends all ranks of a real program, started by torchrun or by itself, with the exit code that the README of `ddp` says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from torchplug.checkpoint import load, verify

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
LIMIT = 100  # seconds that a program may take
PROGRAM = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchplug import Module, Trainer

torch.set_num_threads(1)

class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.steps = 0

    def training_step(self, batch):
        how, last = sys.argv[1], self.run.rank == 1
        self.steps += 1
        if self.global_step == 3 and how != "clean":
            print("ready", flush=True)
            if how == "sigterm" and last:
                os.kill(os.getpid(), signal.SIGTERM)
            if how == "fail" and last:
                raise LookupError("rank 1 has had it")
            if how == "kill" and last:
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hang" and last:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch would wait 30 s before it kills
                time.sleep(600)
        if how == "wait":
            time.sleep(0.05)
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

def main():
    how = sys.argv[1]
    options = {"timeout": "4s" if how == "hang" else "60s"}
    plugins = ["checkpoint"] if how in ("wait", "sigterm") else []
    trainer = Trainer(
        max_epochs=2 if how == "clean" else 500, strategy={"ddp": options}, devices=2, plugins=plugins, accelerator="cpu",
        root_dir="runs", log_every_n_steps=2,
    )
    net, data = Net(), TensorDataset(torch.arange(32.0).repeat(4, 1).T)
    trainer.fit(net, DataLoader(data, 4))
    print(f"finished {net.steps} steps", flush=True)
"""
GUARD = '\nif __name__ == "__main__":\n    main()\n'


class Program:
    """A program that runs, and what it printed. Its processes are known by a word in their environment."""

    def __init__(self, folder: Path, *arguments: str, guarded: bool = True) -> None:
        (folder / "program.py").write_text(PROGRAM + (GUARD if guarded else "\nmain()\n"))
        self.word, self.folder = uuid.uuid4().hex, folder
        self.out, self.err = folder / "out", folder / "err"
        environment = {**os.environ, "TORCHPLUG_TEST": self.word, "OMP_NUM_THREADS": "1"}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env=environment, stdout=out, stderr=err, start_new_session=True
            )

    def ready(self) -> None:
        """Waits until both ranks train."""
        end = time.monotonic() + LIMIT
        while self.out.read_text().count("ready") < 2:
            assert self.process.poll() is None and time.monotonic() < end, self.err.read_text()
            time.sleep(0.05)

    def end(self) -> int:
        """The exit code, when no process is left."""
        code, end = self.process.wait(LIMIT), time.monotonic() + 5  # Python's own helper of spawned processes ends after them
        while self.left() and time.monotonic() < end:
            time.sleep(0.1)
        assert self.left() == [], f"processes are left behind: {self.err.read_text()}"
        return code

    def left(self) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.word.encode() in (folder / "environ").read_bytes() and (folder / "stat").read_text().rpartition(")")[2][1] != "Z":
                    found.append(int(folder.name))
        return found

    def kill(self) -> None:
        for process in self.left():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    def saved(self) -> int:
        """The step at which the last checkpoint was written, which is whole."""
        (path,) = self.folder.glob("runs/Net/version_0/checkpoints/last.safetensors")
        assert verify(path) == []
        return int(load(path)["position"]["step"])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts programs that are gone when the test is over."""
    made: list[Program] = []

    def begin(*arguments: str, **options: bool) -> Program:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Program(folder, *arguments, **options))
        return made[-1]

    yield begin
    for program in made:
        program.kill()


@pytest.mark.parametrize("how", [[], TORCHRUN], ids=["script", "torchrun"])
def test_a_clean_run_ends_with_0_again_and_again(how: list[str], start: Callable[..., Program]) -> None:
    for _ in range(3 if how else 2):
        program = start(*how, "program.py", "clean")
        assert program.end() == 0, program.err.read_text()
        assert program.out.read_text().count("finished 8 steps") == (2 if how else 1)
        assert "terminate called" not in program.err.read_text()


RANK = """
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Trainer

sys.modules["__main__"].ending.status = None  # the interpreter takes everything apart, as at the end of any script
torch.set_num_threads(1)


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


trainer = Trainer(max_epochs=2, strategy="ddp", accelerator="cpu", plugins=[], root_dir=sys.argv[1], log_every_n_steps=2)
trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(32, 4)), 4))
assert trainer.run.position.step == 8
"""


def test_ranks_are_taken_apart_without_harm_thirty_times(programs: Any, tmp_path: Path) -> None:
    codes = []
    for _ in range(30):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = []
        for rank in range(2):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
            both.append(programs.start(RANK, str(tmp_path), env=environment, imports=["torch.distributed", "torchplug.distributed"]))
        codes += [each.wait(60) for each in both]
    assert codes == [0] * 60


@pytest.mark.parametrize("how", [[], TORCHRUN], ids=["script", "torchrun"])
def test_ctrl_c_writes_a_checkpoint_and_ends_all_ranks(how: list[str], start: Callable[..., Program]) -> None:
    program = start(*how, "program.py", "wait")
    program.ready()
    began = time.monotonic()
    program.process.send_signal(signal.SIGINT)
    code = program.end()
    assert code == (1 if how else -signal.SIGINT), program.err.read_text()
    assert time.monotonic() - began < 20, "the launcher had to kill a rank"
    assert program.saved() > 3
    assert "finished" not in program.out.read_text()


def test_sigterm_to_one_rank_of_torchrun_writes_one_checkpoint_and_ends_all(start: Callable[..., Program]) -> None:
    program = start(*TORCHRUN, "program.py", "sigterm")
    assert program.end() == 1
    printed = program.err.read_text()
    assert program.saved() == 4
    assert "exitcode  : 143" in printed and "Traceback" not in printed.partition("ChildFailedError")[0].replace("Traceback", "", 1), printed


def test_an_error_on_one_rank_of_torchrun_is_the_first_that_is_printed(start: Callable[..., Program]) -> None:
    program = start(*TORCHRUN, "program.py", "fail")
    began = time.monotonic()
    program.ready()
    assert program.end() == 1 and time.monotonic() - began < 60
    printed = program.err.read_text()
    first = printed[printed.index("Traceback") :]
    assert first.index("LookupError: rank 1 has had it") < (first.find("Traceback", 1) % len(first))
    assert "exitcode  : 1 " in printed and "exitcode  : -6" not in printed, printed


def test_a_killed_rank_of_torchrun_ends_all(start: Callable[..., Program]) -> None:
    program = start(*TORCHRUN, "program.py", "kill")
    assert program.end() == 1
    assert "exitcode  : -9" in program.err.read_text()


def test_a_rank_that_hangs_is_named_after_the_timeout(start: Callable[..., Program]) -> None:
    program = start(*TORCHRUN, "program.py", "hang")
    program.ready()
    began = time.monotonic()
    assert program.end() != 0
    assert time.monotonic() - began < 60
    assert "out of reach, or killed: rank 1" in program.err.read_text()


def test_a_script_that_would_start_itself_again_is_told_what_to_write(start: Callable[..., Program]) -> None:
    program = start("program.py", "clean", guarded=False)
    assert program.end() == 1
    assert 'put what calls fit under `if __name__ == "__main__":`' in program.err.read_text()
