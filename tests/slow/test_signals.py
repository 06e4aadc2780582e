"""Signals from outside, to a process and to its whole group, with workers and the real plugins; and to real programs."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import torchplug
from torchplug import Run, Trainer, hookimpl
from torchplug.checkpoint import load, verify
from torchplug.signals import held, sparing, watching

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")]

FORK = multiprocessing.get_context("fork")
SOON = 5  # seconds from a step's end to the end of the process


class Noisy(Dataset):
    """Samples that are different each time, and take as long as they are told."""

    def __init__(self, samples: int, seconds: float) -> None:
        self.samples, self.seconds = samples, seconds

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds)
        x = torch.full((4,), index / self.samples) + torch.rand(4) + random.random()
        return x, x.sum(0, keepdim=True)


class Net(torchplug.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))

    def training_step(self, batch: Any) -> Any:
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.layers(batch[0]), batch[1]) + torch.rand(()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Meeting:
    """Where the process of a run and that of the test meet: at the n-th call of a hook the run waits until it has got a signal.

    Args:
        hook: which one.
        count: n.
        number: of the signal.
        group: whether its whole process group gets it.
    """

    def __init__(self, hook: str, count: int, number: int = signal.SIGTERM, group: bool = True) -> None:
        self.hook, self.count, self.number, self.group = hook, count, number, group
        self.there, self.here = FORK.Pipe()

    def wait(self) -> None:
        """In the run."""
        workers = multiprocessing.active_children()
        self.there.send([each.pid for each in workers])
        self.there.recv()
        if self.group and workers:
            workers[0].join(0.3)
            assert all(each.is_alive() for each in workers)

    def send(self, process: Any) -> list[int]:
        """In the test: sends the signal when the time has come. The run's workers then."""
        while not self.here.poll(0.1):
            assert process.is_alive(), "the run was over before the time had come"
        workers: list[int] = self.here.recv()
        (os.killpg if self.group else os.kill)(process.pid, self.number)
        self.here.send(None)
        return workers


class Caller:
    """Goes to the meeting, and notes when the last step ended."""

    def __init__(self, meeting: Meeting | None, file: Path) -> None:
        self.meeting, self.file, self.calls = meeting, file, Counter[str]()

    def reached(self, hook: str, run: Run) -> None:
        self.calls[hook] += 1
        if self.meeting is not None and (hook, self.calls[hook]) == (self.meeting.hook, self.meeting.count):
            self.meeting.wait()
        if hook == "on_train_batch_end" and run.window_ends:
            self.file.write_text(str(time.time()))


def _hook(name: str) -> Any:
    return hookimpl(lambda self, run: self.reached(name, run))


for _name in ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"):
    setattr(Caller, _name, _hook(_name))
for _name in ("on_validation_start", "on_validation_batch_start", "on_validation_batch_end"):
    setattr(Caller, _name, _hook(_name))


@dataclass(frozen=True)
class Job:
    """A run of two epochs of seven batches, with four batches of validation.

    Args:
        root: where everything is.
        workers: of each loader.
        context: how they are started.
        persistent: whether they live longer than an epoch.
        seconds: that a sample takes.
        options: of the trainer.
    """

    root: Path
    workers: int = 2
    context: str = "fork"
    persistent: bool = False
    seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def fit(self, meeting: Meeting | None = None) -> Trainer:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        defaults: dict[str, Any] = {"max_epochs": 2, "seed": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0, "accelerator": "cpu"}
        plugins = ["journal", "csv", {"checkpoint": {"monitor": "val_loss"}}, Caller(meeting, self.root / "step")]
        trainer = Trainer(**{**defaults, **self.options}, root_dir=self.root / "runs", plugins=plugins)
        loading: dict[str, Any] = {"num_workers": self.workers}
        if self.workers:
            loading |= {"persistent_workers": self.persistent, "multiprocessing_context": self.context}
        train, val = (DataLoader(Noisy(samples, self.seconds), 2, shuffle=samples == 14, **loading) for samples in (14, 8))
        trainer.fit(Net(), train, val, ckpt_path="last")
        return trainer

    def finish(self) -> None:
        """Trains to the end and writes down what came of it."""
        trainer = self.fit()
        run = trainer.run
        assert run is not None
        tensors = [*run.module.state_dict().values(), torch.get_rng_state()]
        records = [[each["stage"], each["step"], each["metrics"]] for each in journal(self.root) if each["event"] == "log_metrics"]
        files = sorted(path.name for path in (run.dir / "checkpoints").iterdir())
        outcome = [[each.tolist() for each in tensors], dict(trainer.metrics), records, random.getstate(), files]
        (self.root / "outcome").write_text(json.dumps(outcome))


def journal(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "runs/Net/version_0/journal.jsonl").read_text().splitlines()]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is over and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def interrupt(processes: Any) -> Callable[..., tuple[int, int]]:
    """Starts a job, sends it a signal at a meeting, and says at which batch and step the checkpoint stands that it leaves."""

    def meet(job: Job, meeting: Meeting, soon: float = SOON) -> tuple[int, int]:
        process = processes.start(lambda: job.fit(meeting))
        workers = meeting.send(process)
        process.join(max(60, 3 * soon))
        over, step = time.time(), job.root / "step"
        assert process.exitcode == (1 if meeting.number == signal.SIGINT else 128 + meeting.number)
        assert not step.exists() or over - float(step.read_text()) < soon
        assert not [pid for pid in workers if alive(pid)]

        records = journal(job.root)
        assert (records[-1]["event"], records[-1]["status"]) == ("on_run_end", "interrupted")
        logged = len([each for each in records if each["event"] == "log_metrics"])
        if logged:
            with open(job.root / "runs/Net/version_0/metrics.csv", newline="") as file:
                assert len(list(csv.reader(file))) == 1 + logged
        path = job.root / "runs/Net/version_0/checkpoints/last.safetensors"
        assert verify(path) == [] and not list(path.parent.glob(".*"))
        position = load(path)["position"]
        return position["batch"], position["step"]

    return meet


def same(job: Job, processes: Any) -> bool:
    """Whether the rest of a job comes to what a job comes to that was never stopped."""
    whole = replace(job, root=job.root / "whole")
    whole.root.mkdir()
    assert processes.run([job.finish, whole.finish]) == [0, 0]
    return (job.root / "outcome").read_text() == (whole.root / "outcome").read_text()


# ---------------------------------------------------------------------- to a process and its workers


WINDOWS: dict[str, Any] = {"accumulate_grad_batches": 3}
OFTEN: dict[str, Any] = {"val_check_interval": 3}


@pytest.mark.parametrize(
    ("number", "group", "workers"),
    [
        *((number, True, 2) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)),
        *((signal.SIGTERM, False, 0), (signal.SIGUSR1, False, 2), (signal.SIGHUP, True, 0), (signal.SIGINT, False, 2)),
    ],
    ids=lambda value: signal.Signals(value).name if isinstance(value, signal.Signals) else None,
)
def test_a_signal_in_a_step_ends_the_program_soon_with_its_exit_code(
    number: int, group: bool, workers: int, tmp_path: Path, interrupt: Any, processes: Any
) -> None:
    job = Job(tmp_path, workers=workers)
    assert interrupt(job, Meeting("on_train_batch_start", 3, number, group)) == (3, 3)
    assert same(job, processes)


@pytest.mark.parametrize(
    ("hook", "count", "options", "batch", "step", "persistent"),
    [
        ("on_train_start", 1, {}, 0, 0, False),
        ("on_train_epoch_start", 2, {}, 1, 8, False),
        ("on_train_epoch_start", 2, {}, 1, 8, True),
        ("on_validation_start", 2, OFTEN, 6, 6, True),
        ("on_validation_batch_start", 2, {}, 7, 7, False),
        ("on_validation_batch_start", 2, OFTEN, 3, 3, False),
        ("on_validation_batch_start", 2, OFTEN, 3, 3, True),
        ("on_validation_batch_start", 2, {**OFTEN, "accumulate_grad_batches": 2}, 4, 2, True),
        ("on_train_batch_end", 4, WINDOWS, 6, 2, False),
        ("on_train_batch_end", 4, WINDOWS, 6, 2, True),
        ("on_train_batch_end", 6, WINDOWS, 6, 2, False),
    ],
)
def test_workers_outlive_a_signal_to_the_group_and_the_step_gets_the_batches_that_it_needs(
    hook: str, count: int, options: dict[str, Any], batch: int, step: int, persistent: bool, tmp_path: Path, interrupt: Any, processes: Any
) -> None:
    job = Job(tmp_path, persistent=persistent, options=options)
    assert interrupt(job, Meeting(hook, count)) == (batch, step)
    assert same(job, processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: signal.Signals(number).name)
def test_spawned_workers_outlive_it_too(number: int, tmp_path: Path, interrupt: Any, processes: Any, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # they import this file by its name
    job = Job(tmp_path, context="spawn", options={**WINDOWS, "max_epochs": 1})
    assert interrupt(job, Meeting("on_train_batch_end", 4, number), soon=60) == (6, 2)  # each imports torch
    assert same(job, processes)


def test_a_worker_that_is_just_being_started_outlives_it(tmp_path: Path, monkeypatch: Any, processes: Any) -> None:
    """Before it has handlers of its own, it has those that it was started with."""
    job = Job(tmp_path)
    start = multiprocessing.process.BaseProcess.start

    def started(self: Any) -> None:
        start(self)
        for _ in range(30):
            os.killpg(os.getpid(), signal.SIGTERM)
            self.join(0.002)
        assert self.is_alive()

    def alone() -> None:
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", started)
        job.fit()

    assert processes.run([alone]) == [128 + signal.SIGTERM]
    assert load(tmp_path / "runs/Net/version_0/checkpoints/last.safetensors")["position"]["step"] == 1
    assert same(job, processes)


def test_a_program_that_fails_with_workers_in_mid_epoch_ends(tmp_path: Path, processes: Any) -> None:
    """Python ends them by SIGTERM and waits for them, where a traceback has kept their loader."""

    def alone() -> None:
        class Failing(Net):
            def training_step(self, batch: Any) -> Any:
                raise ValueError("it does not work")

        train = DataLoader(Noisy(14, 0), 2, num_workers=2, multiprocessing_context="fork")
        try:
            Trainer(max_epochs=1, root_dir=tmp_path).fit(Failing(), train)
        except ValueError as error:
            workers = multiprocessing.active_children()
            assert len(workers) == 2 and error.__traceback__ is not None
            for each in workers:
                each.terminate()
            for each in workers:
                each.join(5)
                assert each.exitcode == 0
            return
        raise AssertionError("it should have failed")

    assert processes.run([alone]) == [0]


def test_a_worker_that_begins_when_the_run_is_over_ends_at_a_signal(tmp_path: Path, processes: Any) -> None:
    """It was started while signals waited, and slow; nobody acts on them any more when it has its handlers."""

    def alone() -> None:
        trainer = Trainer(max_epochs=1, root_dir=tmp_path)
        train = DataLoader(Noisy(14, 0), 2)
        trainer.fit(Net(), train)
        assert trainer.run is not None
        with watching(trainer.run, ["SIGTERM"]), held():
            late = FORK.Process(target=begin_late, args=(sparing(None),))
            late.start()
        late.terminate()
        late.join(10)
        assert late.exitcode == 0

    assert processes.run([alone]) == [0]


def test_a_forked_process_that_is_killed_in_its_run_leaves_nothing_watched_elsewhere(tmp_path: Path) -> None:
    sparing(None)  # what is watched is in shared memory from now on

    def killed() -> None:
        class Ends(Net):
            def on_train_batch_end(self) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

        Trainer(max_epochs=1, root_dir=tmp_path).fit(Ends(), DataLoader(Noisy(14, 0), 2))

    before = sparing(None).watched.clone()
    process = FORK.Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert torch.equal(sparing(None).watched, before)


def begin_late(begin: Any) -> None:
    time.sleep(1)
    begin(0)
    time.sleep(60)


def test_persistent_workers_are_gone_when_the_run_is(tmp_path: Path, processes: Any) -> None:
    job = Job(tmp_path, persistent=True)

    def alone() -> None:
        trainer = job.fit()
        assert trainer.run is not None and not multiprocessing.active_children()

    assert processes.run([alone]) == [0]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
def test_slow_data_do_not_hold_a_signal_back(hook: str, tmp_path: Path, interrupt: Any) -> None:
    job = Job(tmp_path, seconds=0.5, options=OFTEN)  # 1 s a batch
    assert interrupt(job, Meeting(hook, 2, group=False)) == ((2, 2) if hook == "on_train_batch_start" else (3, 3))


def test_a_job_that_is_interrupted_again_and_again_and_started_by_the_same_line_comes_to_its_end(
    tmp_path: Path, interrupt: Any, processes: Any
) -> None:
    job = Job(tmp_path, options=OFTEN)
    places = [
        interrupt(job, Meeting(hook, count, number))
        for hook, count, number in (
            ("on_train_batch_start", 2, signal.SIGUSR1),
            ("on_train_batch_start", 1, signal.SIGTERM),
            ("on_validation_batch_end", 2, signal.SIGTERM),
            ("on_train_batch_end", 5, signal.SIGINT),
            ("on_train_start", 1, signal.SIGHUP),
        )
    ]
    assert places == [(2, 2), (3, 3), (3, 3), (1, 8), (1, 8)]
    assert same(job, processes)


def test_a_run_after_an_interrupted_one_in_the_same_process_has_workers_like_any_other(tmp_path: Path, processes: Any) -> None:
    first, second, alone = (Job(tmp_path / name) for name in ("first", "second", "alone"))
    for job in (first, second, alone):
        job.root.mkdir()
    meeting = Meeting("on_train_batch_start", 10)

    def both() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            first.fit(meeting)
        assert signal.getsignal(signal.SIGTERM) is before and callable(signal.getsignal(signal.SIGCHLD))  # torch's own
        second.finish()
        assert not multiprocessing.active_children()

    process = processes.start(both)
    meeting.send(process)
    process.join(60)
    assert process.exitcode == 0 and processes.run([alone.finish]) == [0]
    assert (second.root / "outcome").read_text() == (alone.root / "outcome").read_text()


# ---------------------------------------------------------------------- to a program


PROGRAM = """
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset
from torchplug import Module, Trainer, hookimpl

class Line(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch):
        if self._run.position.step == 3:
            print("here", flush=True)
            sys.stdin.readline()
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = DataLoader(TensorDataset(torch.randn(40, 1)), 2, num_workers=2)
try:
    Trainer(max_epochs=2, accelerator="cpu").fit(Line(), data)
finally:
    print("left", flush=True)
"""


@pytest.mark.parametrize(
    ("names", "code", "saved"),
    [
        (["SIGTERM"], 143, True),
        (["SIGUSR1"], 128 + signal.SIGUSR1, True),
        (["SIGHUP"], 129, True),
        (["SIGINT"], -signal.SIGINT, True),
        (["SIGINT", "SIGINT"], -signal.SIGINT, False),
    ],
)
def test_a_program_with_the_standard_plugins_ends_as_the_signal_asks_it_to(
    names: list[str], code: int, saved: bool, tmp_path: Path, programs: Any
) -> None:
    program = programs.start(PROGRAM, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "here" not in program.stdout.readline():
        assert program.poll() is None
    for number, name in enumerate(names):
        if number:  # the one before has to have been heard: two that wait are one
            time.sleep(0.5)
        program.send_signal(getattr(signal, name))
    sent = time.monotonic()
    output, errors = program.communicate("\n", timeout=60)
    assert program.returncode == code, errors
    assert "left" in output and time.monotonic() - sent < SOON
    assert ("KeyboardInterrupt" in errors) is (names[0] == "SIGINT")
    run = tmp_path / "runs/Line/version_0"
    assert json.loads((run / "journal.jsonl").read_text().splitlines()[-1])["status"] == "interrupted"
    path = run / "checkpoints/last.safetensors"
    assert path.exists() is saved
    if saved:
        assert load(path)["position"]["step"] == 4
