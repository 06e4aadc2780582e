"""Whatever ends a process while it saves, or keeps it from saving: the newest whole checkpoint is there, and no rubbish beside it."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torchplug
from torchplug import Run, Trainer, hookimpl
from torchplug.checkpoint import CheckpointError, load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")]

KILLS = 100  # for each way of saving
BATCHES = 2


class Counting(torchplug.Module):
    """Every number in it is the step that training is at: a state that is torn shows it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.register_buffer("seen", torch.zeros(size))

    def training_step(self, batch: Tensor) -> Tensor:
        self.seen += 1
        self.log("score", score(self.current_epoch), on_step=False, on_epoch=True)
        return -self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(BATCHES), batch_size=1)


def score(epoch: int) -> float:
    """Falls over time, up and down on the way."""
    return (7919 * epoch % 101) / 101 - epoch / 100


class Told:
    """Says where the run begins and what else is in the folder by then, and then each time when a checkpoint is complete."""

    def __init__(self, told: Connection) -> None:
        self.told = told

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        folder = run.dir / "checkpoints"
        self.told.send((run.position.step, [name for name in os.listdir(folder) if not name.endswith(".safetensors")]))

    @hookimpl
    def on_checkpoint_saved(self) -> None:
        self.told.send(time.monotonic())


def train(root: Path, background: bool, epochs: int, told: Connection | None = None) -> None:
    checkpoints = {"checkpoint": {"monitor": "score", "top_k": 2, "every_n_steps": 1, "background": background}}
    plugins = [checkpoints, *([Told(told)] if told is not None else [])]
    Trainer(max_epochs=epochs, accelerator="cpu", root_dir=root, plugins=plugins).fit(Counting(500_000), ckpt_path="last")


def whole(path: Path) -> int:
    """The step that a checkpoint is of; it can be loaded, and every value in it is of that step."""
    state = load(path)
    step: int = state["position"]["step"]
    for name in ("weight", "seen"):
        assert state["module"][name].unique().tolist() == [step]
    return step


@pytest.mark.parametrize("background", [False, True], ids=["saved at once", "saved behind training"])
def test_kills_while_saving_leave_whole_checkpoints_and_no_rubbish(background: bool, tmp_path: Path, processes: Any) -> None:
    moments = random.Random(4)
    newest, takes = 0, 0.01  # seconds that a save takes, about
    for number in range(KILLS):
        listen, tell = Pipe(duplex=False)
        process = processes.start(partial(train, tmp_path, background, 1_000_000, tell))
        tell.close()  # so that a process that fails is seen here
        assert listen.poll(60), "training did not start"
        step, rubbish = listen.recv()
        assert step == newest, "it did not go on from the newest checkpoint"
        assert rubbish == []
        saved = [listen.recv() for _ in range(moments.randrange(5))]
        takes = (saved[-1] - saved[0]) / (len(saved) - 1) if len(saved) > 1 else takes
        time.sleep(moments.uniform(0, 2 * takes))
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        listen.close()
        folder = max((tmp_path / "Counting").glob("version_*"), key=lambda each: int(each.name[8:])) / "checkpoints"
        names = os.listdir(folder)
        complete = [name for name in names if name.endswith(".safetensors")]
        assert len(complete) <= 4 and len(names) - len(complete) <= 2, f"after {number + 1} kills there are {sorted(names)}"
        newest = max((whole(folder / name) for name in complete), default=0)
    assert newest > KILLS / 2
    epochs = newest // BATCHES + 2
    assert processes.run([partial(train, tmp_path, background, epochs)]) == [0]
    best = sorted(range(epochs), key=score)[:2]
    expected = {f"epoch={epoch}-step={BATCHES * (epoch + 1)}.safetensors" for epoch in best} | {"last.safetensors"}
    assert set(os.listdir(folder)) == expected
    assert whole(folder / "last.safetensors") == BATCHES * epochs


# ---------------------------------------------------------------------- a disk that is full


class Growing:
    """A state that is larger by 256 KiB after each epoch."""

    def __init__(self) -> None:
        self.history = torch.zeros(0)

    @hookimpl
    def on_train_epoch_end(self) -> None:
        self.history = torch.cat((self.history, torch.ones(65_536)))

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]


def fill(root: Path, background: bool, top_k: int, epochs: int = 30) -> Trainer:
    """Saves at the end of each epoch; ``top_k`` -1 keeps everything."""
    checkpoints = {"checkpoint": {"top_k": top_k, "background": background}}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", root_dir=root, plugins=[Growing(), checkpoints])
    trainer.fit(Counting(1000), ckpt_path="last")
    return trainer


def newest_good(folder: Path) -> int:
    """The step of the newest checkpoint in a folder in which there are only whole ones."""
    steps = {path.name: whole(path) for path in folder.iterdir()}
    assert steps["last.safetensors"] == max(steps.values())
    return steps["last.safetensors"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system of 4 MiB takes rights to mount it: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("background", [False, True], ids=["saved at once", "saved behind training"])
def test_a_full_disk_is_said_and_the_last_good_checkpoint_goes_on(background: bool, disk: Path) -> None:
    with pytest.raises(CheckpointError, match="disk full") as caught:
        fill(disk, background, top_k=-1)
    folder = disk / "Counting" / "version_0" / "checkpoints"
    assert str(folder) in str(caught.value)
    good = newest_good(folder)
    assert good >= 4 * BATCHES
    with pytest.raises(CheckpointError, match="disk full"):  # nor does the next one do any harm
        fill(disk, background, top_k=-1)
    assert newest_good(folder) >= good
    for path in folder.glob("epoch=*"):
        path.unlink()
    trainer = fill(disk, background, top_k=1, epochs=6)
    assert trainer.run is not None and trainer.run.resumed == folder / "last.safetensors"
    assert newest_good(folder) == 6 * BATCHES


@pytest.mark.parametrize("background", [False, True], ids=["saved at once", "saved behind training"])
def test_a_file_that_may_not_grow_is_said_and_the_last_good_checkpoint_goes_on(background: bool, tmp_path: Path, processes: Any) -> None:
    def fail() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(CheckpointError, match="disk full"):
            fill(tmp_path, background, top_k=1)

    folder = tmp_path / "Counting" / "version_0" / "checkpoints"
    for _ in range(2):
        assert processes.run([fail]) == [0]
        assert newest_good(folder) == 3 * BATCHES  # four times 256 KiB are too much
    assert processes.run([partial(fill, tmp_path, background, 1, 6)]) == [0]
    assert newest_good(folder) == 6 * BATCHES
