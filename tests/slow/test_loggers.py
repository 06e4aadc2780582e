"""One run in every logger at a time: they show the same values at the same steps, whatever happened to the process."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")]

Curves = dict[str, list[tuple[int, float]]]
IMPORTS = ("wandb", "mlflow", "torchplug_tensorboard")

PROGRAM = """
import sys, time
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchplug import Module, Trainer, hookimpl

class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch):
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("odd", float("nan") if self.global_step == 4 else float("inf") if self.global_step == 5 else 2**53 + 2 * self.global_step)
        self.log("even", self.global_step % 2 == 0)
        return loss
    def validation_step(self, batch):
        self.log("val/loss", self.layer(batch[0]).square().mean())
    def test_step(self, batch):
        self.log("test/loss", self.layer(batch[0]).square().mean())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.001)

class Says:
    @hookimpl
    def on_train_batch_end(self, run):
        time.sleep(float(sys.argv[2]))
        print(run.position.step, flush=True)

if __name__ == "__main__":
    torch.manual_seed(1)
    context = sys.argv[3] or None
    data = TensorDataset(torch.randn(40, 4))
    workers = {"num_workers": 1 if context == "spawn" else 2, "multiprocessing_context": context} if context else {}
    plugins = ["tensorboard", {"wandb": {"mode": "offline"}}, "mlflow", {"checkpoint": {"every_n_steps": 4}}, Says()]
    trainer = Trainer(max_epochs=3, accumulate_grad_batches=2, val_check_interval=6, log_every_n_steps=1, seed=1, root_dir=sys.argv[1], plugins=plugins)
    trainer.fit(Net(), DataLoader(data, 2, **workers), DataLoader(data, 20), ckpt_path="last")
    trainer.validate(dataloaders=DataLoader(data, 20))
    trainer.test(dataloaders=DataLoader(data, 20))
"""  # noqa: E501


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that MLflow has made, to be copied: it takes MLflow seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def program(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program above; what trackers keep for a user is in a folder of the test."""
    (tmp_path / "runs").mkdir()
    shutil.copy(empty, tmp_path / "runs")
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "user" / name))
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def start(program: Path, programs: Any, pause: float = 0.0, context: str = "") -> Any:
    with open(program.parent / "output", "a") as output:
        options = {"cwd": program.parent, "stdout": subprocess.PIPE, "stderr": output}
        arguments = [str(program.parent / "runs"), str(pause), context]
        if context == "spawn":  # whose workers import the program
            return subprocess.Popen([sys.executable, str(program), *arguments], text=True, **options)
        return programs.start(PROGRAM, *arguments, imports=IMPORTS, **options)


def finish(process: Any, program: Path) -> None:
    process.communicate(timeout=180)
    assert process.returncode == 0, (program.parent / "output").read_text()


def run_dir(program: Path) -> Path:
    return program.parent / "runs" / "Net" / "version_0"


# ---------------------------------------------------------------------- read back


def journal(program: Path) -> list[dict[str, Any]]:
    lines = (run_dir(program) / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def recorded(program: Path) -> Curves:
    found: Curves = defaultdict(list)
    for record in journal(program):
        for name, value in record.get("metrics", {}).items() if record["event"] == "log_metrics" else ():
            found[name].append((record["step"], value))
    return found


def in_tensorboard(program: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir(program) / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def in_mlflow(program: Path) -> Curves:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{program.parent / 'runs' / 'mlflow.db'}")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {
        name: [(point.step, point.value) for point in sorted(points, key=lambda each: each.timestamp)] for name, points in history.items()
    }


def in_wandb(program: Path) -> Curves:
    found: Curves = defaultdict(list)
    for file in sorted(run_dir(program).glob("wandb/wandb/offline-run-*/*.wandb")):
        for row in rows(file):
            for name, value in row.items():
                if not name.startswith("_") and name not in ("step", "epoch", "samples", "seconds"):
                    found[name].append((row["_step"], float(value)))
    return found


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows in a file of wandb: a LevelDB log of messages."""
    from wandb.proto import wandb_internal_pb2 as messages

    data, place, message = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        check, length, kind = struct.unpack("<IHB", data[place : place + 7])
        body = data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind == 0 or len(body) < length:
            return
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) == check
        message = body if kind in (1, 2) else message + body
        if kind in (1, 4):
            record = messages.Record.FromString(message)
            if record.WhichOneof("record_type") == "history":
                yield {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


def same(program: Path) -> None:
    """Every logger shows what the journal holds, in its own precision."""
    expected = recorded(program)

    def nearly(curves: Curves, stored: Any = float) -> dict[str, list[tuple[int, str]]]:
        return {name: sorted((step, repr(stored(value))) for step, value in set(points)) for name, points in curves.items()}

    def in_32_bits(value: float) -> Any:
        return float(np.float32(value))

    def in_sql(value: float) -> float:
        return math.copysign(1.7976931348623157e308, value) if math.isinf(value) else float(value)

    assert nearly(in_tensorboard(program), in_32_bits) == nearly(expected, in_32_bits)
    assert nearly(in_mlflow(program), in_sql) == nearly(expected, in_sql)
    deadline = time.monotonic() + 5
    while nearly(in_wandb(program)) != nearly(expected) and time.monotonic() < deadline:
        time.sleep(0.1)  # its process writes the last rows after it has said that it did
    assert nearly(in_wandb(program)) == nearly(expected)
    for curves in (in_tensorboard(program), in_mlflow(program)):  # and each point as often as it was recorded
        assert {name: len(points) for name, points in curves.items()} == {name: len(points) for name, points in expected.items()}
    for points in expected.values():
        assert [step for step, _ in points] == sorted(step for step, _ in points)


def replay(program: Path, programs: Any) -> None:
    code = "import sys, torchplug.cli; sys.exit(torchplug.cli.main(sys.argv[1:]))"
    done = programs.run(code, "replay", run_dir(program), "--to", "tensorboard,wandb,mlflow", imports=IMPORTS)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- the tests


@pytest.mark.parametrize("context", ["", "fork", "spawn"])
def test_fit_validate_and_test_are_the_same_everywhere(context: str, program: Path, programs: Any) -> None:
    finish(start(program, programs, context=context), program)
    same(program)
    replay(program, programs)
    same(program)
    assert {name.partition("_")[0] for name in recorded(program)} >= {"train/loss", "val/loss", "test/loss", "odd", "even"}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_is_killed_and_goes_on_is_the_same_everywhere(seed: int, program: Path, programs: Any) -> None:
    when = random.Random(seed)
    for _ in range(2):
        kill(start(program, programs, pause=0.02), when.randint(6, 25))
    finish(start(program, programs), program)
    same(program)
    steps = [step for step, _ in recorded(program)["train/loss_step"]]
    assert steps == list(range(1, 31))


@pytest.mark.parametrize("seed", [1, 2])
def test_after_a_kill_a_replay_makes_every_logger_equal_to_the_journal(seed: int, program: Path, programs: Any) -> None:
    last = kill(start(program, programs, pause=0.01), random.Random(seed).randint(6, 28))
    steps = [step for step, _ in recorded(program)["train/loss_step"]]
    assert steps[-1] >= last - 1, "the journal loses nothing that was recorded"
    for _ in range(2):
        replay(program, programs)
        same(program)


def kill(process: Any, step: int) -> int:
    """Kills a run when it says that it has reached ``step``, at the latest; the step that it said last."""
    assert process.stdout is not None
    last = 0
    for line in process.stdout:
        last = int(line)
        if last >= step:
            os.kill(process.pid, signal.SIGKILL)
            break
    rest = process.stdout.read().split()
    process.wait(60)
    return int(rest[-1]) if rest else last


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_ends_the_run_in_every_logger(number: int, code: int, program: Path, programs: Any) -> None:
    from mlflow import MlflowClient

    process = start(program, programs, pause=0.02)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 8:
            process.send_signal(number)
            break
    process.communicate(timeout=60)
    assert process.returncode in (code, -number), (program.parent / "output").read_text()
    same(program)
    client = MlflowClient(f"sqlite:///{program.parent / 'runs' / 'mlflow.db'}")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.status == "KILLED"
    assert journal(program)[-1]["status"] == "interrupted"
    finish(start(program, programs), program)  # and goes on in each as the same run
    same(program)
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
