"""A run that goes on near the end of a long epoch is there at once, and loads only what is left."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import torchplug
from torchplug import Run, Trainer, hookimpl

pytestmark = [pytest.mark.slow, pytest.mark.alone]


class Counted(Dataset):
    """Counts how often each sample is loaded, in whatever process."""

    def __init__(self, samples: int) -> None:
        self.loads = torch.zeros(samples, dtype=torch.int32).share_memory_()

    def __len__(self) -> int:
        return len(self.loads)

    def __getitem__(self, index: int) -> Tensor:
        self.loads[index] += 1
        return torch.tensor([float(index)])


class Line(torchplug.Module):
    """Remembers which samples it was given, and when the first ones came."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.given: list[int] = []
        self.first = 0.0

    def training_step(self, batch: Tensor) -> Tensor:
        self.first = self.first or time.monotonic()
        self.given += batch.flatten().int().tolist()
        return self.layer(batch / 20_000).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_ten_thousand_batches_goes_on_near_its_end_at_once(workers: int, tmp_path: Path) -> None:
    batches, size, seen = 10_000, 2, 9_990

    def fit(module: Line, *plugins: Any, **options: Any) -> Tensor:
        data = Counted(batches * size)
        context = "fork" if workers else None
        loader = DataLoader(data, batch_size=size, shuffle=True, num_workers=workers, multiprocessing_context=context)
        Trainer(max_epochs=1, seed=1, accelerator="cpu", root_dir=tmp_path, plugins=plugins).fit(module, loader, **options)
        return data.loads

    class Stop:
        @hookimpl
        def on_train_batch_end(self, run: Run) -> None:
            if run.position.batch == seen:
                run.save_checkpoint(tmp_path / "late.safetensors")
                run.request_stop("near the end")

    module, again = Line(), Line()
    fit(module, Stop())
    begun = time.monotonic()
    loads = fit(again, ckpt_path=tmp_path / "late.safetensors")
    assert again.first - begun < 2
    assert sorted(module.given + again.given) == list(range(batches * size))
    assert loads.sum() == (batches - seen) * size
    assert set(loads.nonzero().flatten().tolist()) == set(again.given)
