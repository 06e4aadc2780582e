"""Ranks that are killed and started again, or of which there are others when a run goes on: nothing is lost, and nothing is seen twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import torchplug
from torchplug import Run, Trainer, hookimpl
from torchplug.checkpoint import CheckpointError, load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")]

SAMPLES, BATCH, EPOCHS, STEPS = 54, 4, 2, 7  # a step has 8 samples, the last one of an epoch 6
WORKERS = (0, 2)


class Augmented(Dataset):
    """Samples (x, y, index) that are different each time."""

    def __init__(self, noise: float) -> None:
        self.noise, self.x = noise, torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = self.x[index]
        if self.noise:
            x = x + self.noise * (torch.randn(4) + random.random())
        return x, x.sum(0, keepdim=True), index


class Net(torchplug.Module):
    """Dropout, and BatchNorm where there is noise at all; each rank writes down what it saw."""

    def __init__(self, folder: Path, noise: float) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if noise else nn.Tanh(), nn.Dropout(noise / 2), nn.Linear(8, 1))
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        with open(self.folder / f"seen-{os.environ.get('RANK', '0')}", "a") as file:
            file.write(json.dumps([self.current_epoch, batch_idx, index.tolist()]) + "\n")
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.02)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Ends:
    """A rank is killed, or every one is asked to end, at a step of the first run in a folder."""

    def __init__(self, folder: Path, step: int, name: str) -> None:
        self.mark, self.step, self.name = folder / "ended", step, name

    @hookimpl
    def on_train_batch_end(self, run: Run) -> None:
        at = self.step - (run.rank == 0 and self.name == "SIGTERM")  # which comes to one rank a step before it comes to the other
        if run.position.micro_step != at or (self.mark.exists() and self.name == "SIGKILL") or run.resumed is not None:
            return
        if run.rank == 1 or self.name == "SIGTERM":
            self.mark.touch()
            os.kill(os.getpid(), getattr(signal, self.name))


def fit(
    folder: Path, workers: int = 0, *, ranks: int = 2, noise: float = 0.4, batch: int = BATCH, ckpt_path: Any = None, end: Any = None,
    strategy: Any = None,
) -> Trainer:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"every_n_steps": 3, "top_k": -1, "filename": "{step}", "every_n_epochs": 1}
    plugins: list[Any] = ["journal", {"checkpoint": kept}, *([] if end is None else [Ends(folder, *end)])]
    trainer = Trainer(
        max_epochs=EPOCHS, seed=7, accelerator="cpu", root_dir=folder, log_every_n_steps=2, plugins=plugins, num_sanity_val_steps=1,
        devices=ranks, strategy=strategy or ({"ddp": {"start_method": "fork", "timeout": "30s"}} if ranks > 1 else "auto"),
    )  # fmt: skip
    data = Augmented(noise)
    train = DataLoader(data, batch, shuffle=True, num_workers=workers)
    trainer.fit(Net(folder, noise), train, DataLoader(data, 5), ckpt_path=ckpt_path)
    return trainer


# ---------------------------------------------------------------------- what is compared


def directory(folder: Path) -> Path:
    (found,) = folder.glob("Net/version_*")
    return found


def last(folder: Path) -> dict[str, Any]:
    return load(directory(folder) / "checkpoints" / "last.safetensors")


def alike(one: Any, other: Any, path: str = "") -> None:
    """Both states are the same, bit for bit."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            alike(one[name], other[name], f"{path}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for number, (part, its) in enumerate(zip(one, other, strict=True)):
            alike(part, its, f"{path}.{number}")
    else:
        assert one == other, path


def records(folder: Path) -> list[Any]:
    """What the journal says about metrics."""
    lines = [json.loads(line) for line in (directory(folder) / "journal.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == list(range(len(lines)))
    return [[line[name] for name in ("stage", "epoch", "step", "samples", "metrics")] for line in lines if line["event"] == "log_metrics"]


def same_run(whole: Path, other: Path) -> None:
    """Parameters, optimizer, schedulers, generators of every rank, metrics, and what was recorded."""
    one, two = last(whole), last(other)
    for part in ("module", "optimizers", "schedulers", "generators", "position", "metrics"):
        alike(one[part], two[part], part)
    assert len(one["ranks"]) == 1
    for part in ("generators", "metrics"):
        alike(one["ranks"][0][part], two["ranks"][0][part], f"ranks.{part}")
    assert records(whole) == records(other) and len(records(whole)) > 10
    assert {path.name for path in (directory(whole) / "checkpoints").iterdir()} == {
        path.name for path in (directory(other) / "checkpoints").iterdir()
    }


def seen(folder: Path, rank: int = 0) -> Iterator[list[Any]]:
    for line in (folder / f"seen-{rank}").read_text().splitlines():
        yield json.loads(line)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Runs of two ranks that nothing happened to, by their number of workers; and those without noise, by their number of ranks."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    made: dict[Any, Path] = {f"{workers} workers": folder / f"workers-{workers}" for workers in WORKERS}
    made |= {f"{ranks} ranks": folder / f"ranks-{ranks}" for ranks in (1, 2)}
    for workers in WORKERS:
        fit(made[f"{workers} workers"], workers)
    for ranks in (1, 2):
        fit(made[f"{ranks} ranks"], ranks=ranks, noise=0.0, batch=2 * BATCH // ranks)
    return made


# ---------------------------------------------------------------------- the same ranks again

PROGRAM = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

spec = spec_from_file_location("test_elastic", sys.argv[1])
tests = sys.modules["test_elastic"] = module_from_spec(spec)
spec.loader.exec_module(tests)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for workers in tests.WORKERS:
        trainer = tests.fit(
            Path(sys.argv[2]) / f"workers-{workers}", workers, strategy={"ddp": {"timeout": "30s"}},
            ckpt_path="last", end=(5 + 2 * workers, "SIGKILL"),
        )
"""


def test_a_rank_that_is_killed_is_started_again_by_torchrun_and_the_run_is_the_one_that_was_never_stopped(
    tmp_path: Path, whole: dict[Any, Path]
) -> None:
    """One job, two runs in it, in each of which rank 1 is killed: in the middle of an epoch, and behind the first one."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "--monitor-interval=0.1", str(program), __file__, str(tmp_path),
    ]  # fmt: skip
    alone = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "start_new_session": True}
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **alone)  # type: ignore[call-overload]
    try:
        output, _ = job.communicate(timeout=150)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert job.returncode == 0, output
    assert output.count("goes on from") >= 2, output
    for workers in WORKERS:
        assert (tmp_path / f"workers-{workers}" / "ended").exists()
        same_run(whole[f"{workers} workers"], tmp_path / f"workers-{workers}")


@pytest.mark.parametrize("workers", WORKERS)
def test_ranks_that_are_all_asked_to_end_go_on_as_if_nothing_had_been(tmp_path: Path, whole: dict[Any, Path], workers: int) -> None:
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, workers, end=(5, "SIGTERM"))
    assert ended.value.code == 143
    stopped = last(tmp_path)["position"]
    assert (stopped["step"], stopped["batch"], stopped["samples"]) == (4, 4, 32)  # where ranks talk next
    fit(tmp_path, workers, ckpt_path="last")
    for rank in range(2):  # no batch was loaded twice, on any rank
        assert list(seen(tmp_path, rank)) == list(seen(whole[f"{workers} workers"], rank))
    same_run(whole[f"{workers} workers"], tmp_path)


# ---------------------------------------------------------------------- other ranks


@pytest.mark.parametrize(("before", "after", "step"), [(2, 1, 3), (2, 1, 9), (1, 2, 3), (1, 2, 7)])
def test_another_number_of_ranks_goes_on_with_the_same_samples_in_each_step(
    tmp_path: Path, whole: dict[Any, Path], before: int, after: int, step: int
) -> None:
    """Saved within the first epoch, within the second one, and between the two."""
    source = directory(whole[f"{before} ranks"]) / "checkpoints" / f"{step}.safetensors"
    fit(tmp_path, ranks=after, noise=0.0, batch=2 * BATCH // after, ckpt_path=source)
    parts = [list(seen(tmp_path, rank)) for rank in range(after)]
    together = [[*step_of_all[0][:2], [index for one in step_of_all for index in one[2]]] for step_of_all in zip(*parts, strict=True)]
    in_order = list(seen(whole["1 ranks"]))
    assert together == in_order[step:]
    epoch = step // STEPS
    steps = in_order[epoch * STEPS : step] + [one for one in together if one[0] == epoch]
    assert sorted(index for _, _, indices in steps for index in indices) == list(range(SAMPLES))
    one, other = last(whole[f"{before} ranks"]), last(tmp_path)
    for name, value in one["module"].items():
        torch.testing.assert_close(other["module"][name], value, rtol=0, atol=1e-6)
    assert other["position"] == one["position"]
    found = records(tmp_path)
    for (*place, values), (*expected, others) in zip(found, records(whole[f"{before} ranks"])[-len(found) :], strict=True):
        assert place == expected and values == pytest.approx(others, abs=1e-5)


def test_a_step_of_another_size_is_refused_with_both_sizes(tmp_path: Path, whole: dict[Any, Path]) -> None:
    source = directory(whole["2 ranks"]) / "checkpoints" / "3.safetensors"
    with pytest.raises(CheckpointError, match=r"batch size was 8, is 4; number of batches in an epoch was 7, is 14"):
        fit(tmp_path, ranks=1, noise=0.0, batch=BATCH, ckpt_path=source)
