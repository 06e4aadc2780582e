"""A run with two ranks, trackers and averaged weights that is killed three times: it ends as the one that never was."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchplug.checkpoint import load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")]

HERE = Path(__file__)
FASHION_MNIST = Path(os.environ.get("TORCHPLUG_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
IMPORTS = ("wandb", "mlflow", "torchplug_tensorboard", "torchvision", "numpy")
LIMIT = 300  # seconds that a process may take
OTHER = (
    ".time", ".run", ".versions", ".plugins.journal",  # which has more records after a resume
    ".data.drawn", ".data.exhausted", ".data.counted", ".data.ended", ".data.lasting",  # how far a loader is ahead of training
)  # fmt: skip

PROGRAM = """
import os, sys, time
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from safetensors.torch import load_file, save_file
from torchvision.transforms import RandomCrop, RandomHorizontalFlip
from torchplug import Module, Trainer, hookimpl

class Images(Dataset):
    def __init__(self, images, labels, augment):
        self.images, self.labels = images, labels
        self.augment = nn.Sequential(RandomCrop(28, padding=2), RandomHorizontalFlip()) if augment else nn.Identity()
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        return self.augment(self.images[index][None]) / 255, self.labels[index]

class Net(Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(16 * 6 * 6, 10),
        )
    def loss(self, batch):
        logits = self.network(batch[0])
        return cross_entropy(logits, batch[1]), (logits.argmax(1) == batch[1]).float().mean()
    def training_step(self, batch):
        loss, accuracy = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train_accuracy", accuracy, on_step=False, on_epoch=True)
        return loss
    def validation_step(self, batch):
        loss, accuracy = self.loss(batch)
        self.log("val_loss", loss, prog_bar=True)
        self.log("val_accuracy", accuracy)
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.003)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

class Waits:
    '''Says where it is at one place of the run, and waits there to be killed.'''
    def __init__(self, hook, step, rank):
        self.hook, self.step, self.rank = hook, int(step), int(rank)
    def at(self, hook, run, step):
        if (self.hook, self.step, self.rank) == (hook, step, run.rank):
            print(os.getpid(), flush=True)
            time.sleep(600)
    @hookimpl
    def on_train_batch_end(self, run):
        self.at("on_train_batch_end", run, run.position.step)
    @hookimpl
    def on_validation_batch_end(self, run, batch_idx):
        if batch_idx == 2:
            self.at("on_validation_batch_end", run, run.position.step)
    @hookimpl(wrapper=True)
    def save_checkpoint(self, run, state):  # in a thread of its own
        written = yield
        self.at("save_checkpoint", run, state["position"]["step"])
        return written

def main():
    torch.set_num_threads(1)
    torch.manual_seed(1)
    parts = load_file(sys.argv[1])
    train, val = [Images(parts[f"{name}_images"], parts[f"{name}_labels"], name == "train") for name in ("train", "val")]
    trainer = Trainer(
        max_epochs=3, val_check_interval=20, log_every_n_steps=5, num_sanity_val_steps=1, seed=3, deterministic=True, accelerator="cpu",
        strategy={"ddp": {"start_method": "fork"}}, devices=2, root_dir="runs",
        plugins=[
            "standard", {"early_stopping": {"monitor": "val_loss", "patience": 30}}, {"ema": {"decay": 0.9}}, "lr_monitor", "mlflow",
            {"wandb": {"mode": "offline"}}, {"checkpoint": {"monitor": "val_loss", "top_k": 2, "every_n_steps": 7}},
            *([Waits(*sys.argv[2:])] if sys.argv[2:] else []),
        ],
    )
    net = Net()
    loaders = DataLoader(train, 16, shuffle=True, num_workers=1, multiprocessing_context="fork"), DataLoader(val, 25)
    trainer.fit(net, *loaders, ckpt_path="last")
    save_file(net.state_dict(), "net.safetensors")

if __name__ == "__main__":
    main()
"""

KILLS = [  # where it waits, which rank, and what is killed
    (("on_train_batch_end", "29", "0"), "everything"),  # in the middle of an epoch
    (("on_validation_batch_end", "60", "1"), "rank 1"),  # in a validation in the second epoch
    (("save_checkpoint", "91", "0"), "everything"),  # a file is there, its other names and the books are not
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of Fashion-MNIST: 1280 images to train on, and 200."""
    if not (FASHION_MNIST / "train-labels-idx1-ubyte.gz").exists():
        pytest.fail(f"no Fashion-MNIST in {str(FASHION_MNIST)!r}: install Debian's package dataset-fashion-mnist")
    read, parts = _module(HERE.parents[2] / "examples" / "fashion_mnist.py").read_idx, {}
    for name, prefix, size in (("train", "train", 1280), ("val", "t10k", 200)):
        parts[f"{name}_images"] = read(FASHION_MNIST, f"{prefix}-images-idx3")[:size].clone()
        parts[f"{name}_labels"] = read(FASHION_MNIST, f"{prefix}-labels-idx1")[:size].long()
    path = tmp_path_factory.mktemp("images") / "images.safetensors"
    save_file(parts, path)
    return path


def _module(path: Path) -> ModuleType:
    """A file of Python, imported from where it is."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------- run it, and kill it


class Process:
    """A process of the run, with what it printed."""

    def __init__(self, folder: Path, images: Path, programs: Any, place: tuple[str, ...] = ()) -> None:
        self.errors = folder / "errors"
        kept = {f"WANDB_{name}_DIR": str(folder / "user" / name) for name in ("DATA", "CACHE", "CONFIG")}
        environment = {**os.environ, **kept, "MLFLOW_DISABLE_TELEMETRY": "true"}
        with self.errors.open("a") as errors:
            self.program = programs.start(
                PROGRAM, str(images), *place, imports=IMPORTS, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors
            )

    def finish(self) -> None:
        self.program.communicate(timeout=LIMIT)
        assert self.program.returncode == 0, self.errors.read_text()

    def wait(self) -> int:
        """The id of the rank that has reached the place where it waits."""
        line = self.program.stdout.readline()
        assert line, self.errors.read_text()
        return int(line)

    def lose_the_machine(self) -> None:
        """Kills the program and everything that it has started, at one moment."""
        everything = [psutil.Process(self.program.pid)]
        everything += everything[0].children(recursive=True)
        for signals in (signal.SIGSTOP, signal.SIGKILL):
            for process in everything:
                process.send_signal(signals)
        assert len(everything) >= 5, "the program, two ranks, a worker of each"
        assert self.program.wait(LIMIT) == -signal.SIGKILL

    def lose_a_rank(self, rank: int) -> None:
        """Kills one rank. The program ends with an error, and nothing of it stays."""
        started = psutil.Process(self.program.pid).children(recursive=True)
        os.kill(rank, signal.SIGKILL)
        assert self.program.wait(LIMIT) == 1
        _, alive = psutil.wait_procs(started, timeout=60)
        assert not alive


# ---------------------------------------------------------------------- what came of it


def leaves(value: Any, path: str = "") -> dict[str, str]:
    """Every value in a state by its path, tensors as what their bytes come to; without what may differ."""
    if isinstance(value, Tensor):
        return {path: f"{value.dtype} {tuple(value.shape)} {hashlib.sha1(value.contiguous().numpy().tobytes()).hexdigest()}"}
    if isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        found: dict[str, str] = {}
        for name, part in parts:
            if f"{path}.{name}" not in OTHER:
                found.update(leaves(part, f"{path}.{name}"))
        return found
    return {path: repr(value)}


def events(folder: Path) -> list[dict[str, Any]]:
    """The journal of a run as if there had been one process."""
    found: list[dict[str, Any]] = []
    starting = False
    run = folder / "runs" / "Net" / "version_0"
    for number, line in enumerate((run / "journal.jsonl").read_text().splitlines()):
        record = json.loads(line.replace(str(folder), "FOLDER"))
        assert record.pop("n") == number
        for name in ("time", "seconds", "id", "options", "plugins", "versions"):
            record.pop(name, None)
        starting = starting or (record["event"] == "on_run_start" and bool(found))
        if not starting:
            found.append(record)
        starting = starting and record["event"] != "on_train_start"
    return found


def in_wandb(readers: Any, folder: Path) -> list[dict[str, Any]]:
    """The rows in all of its folders, wall times excepted."""
    files = sorted((folder / "runs" / "Net" / "version_0").glob("wandb/wandb/offline-run-*/*.wandb"))
    rows = [row for file in files for row in readers.rows(file)]
    return [{name: value for name, value in row.items() if name not in ("_timestamp", "_runtime", "seconds")} for row in rows]


def differences(whole: Mapping[Any, Any], other: Mapping[Any, Any]) -> list[str]:
    """The first entries in which they differ."""
    names = [name for name in {**whole, **other} if whole.get(name, "nothing") != other.get(name, "nothing")]
    return [f"{name}: {other.get(name, 'nothing')}, not {whole.get(name, 'nothing')}" for name in names[:5]]


def test_a_long_run_that_is_killed_three_times_is_the_one_that_never_was(tmp_path: Path, images: Path, programs: Any) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    never_killed = Process(whole, images, programs)
    for place, what in KILLS:
        process = Process(killed, images, programs, place)
        rank = process.wait()
        if what == "everything":
            process.lose_the_machine()
        else:
            process.lose_a_rank(rank)
    Process(killed, images, programs).finish()
    never_killed.finish()
    assert sum("goes on from" in line for line in (killed / "errors").read_text().splitlines()) == len(KILLS)

    assert differences(*(leaves(load_file(folder / "net.safetensors")) for folder in (whole, killed))) == []
    files = [sorted(path.relative_to(folder) for path in folder.glob("runs/**/*.safetensors")) for folder in (whole, killed)]
    assert files[0] == files[1] and len(files[0]) == 3
    for file in files[0]:
        assert differences(leaves(load(whole / file)), leaves(load(killed / file))) == [], file
    last = load(killed / "runs/Net/version_0/checkpoints/last.safetensors")
    assert last["position"]["step"] == 120 and last["plugins"]["ema"]["updates"] == 120
    assert not torch.equal(last["plugins"]["ema"]["own"]["network.0.weight"], last["module"]["network.0.weight"])

    assert differences(dict(enumerate(events(whole))), dict(enumerate(events(killed)))) == []
    readers: Any = _module(HERE.with_name("test_loggers.py"))
    expected = readers.recorded(whole / "program")
    assert {"train_loss_step", "train_loss_epoch", "val_loss", "val_accuracy", "lr-Adam"} <= expected.keys()
    for read in (readers.in_tensorboard, readers.in_mlflow):
        curves = [read(folder / "program") for folder in (whole, killed)]
        assert curves[0].keys() == expected.keys()
        assert differences(*curves) == []
    rows = [in_wandb(readers, folder) for folder in (whole, killed)]
    assert [row["_step"] for row in rows[1]] == [row["_step"] for row in rows[0]] == sorted({row["_step"] for row in rows[0]})
    assert rows[1] == rows[0]
