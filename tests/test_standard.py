"""The standard plugins together: what they leave on disk, and what they cost the device."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchplug.checkpoint import verify
from torchplug.metrics import Metrics

STANDARD = ["standard", {"early_stopping": {"monitor": "val_loss"}}]


class ReadBacks(TorchDispatchMode):
    """In which batches (counted from 1) a value was read back from the device, and in which of them by the display."""

    def __init__(self, monkeypatch: Any) -> None:
        super().__init__()
        self.module: Any = None
        self.at: set[int] = set()
        self.shown: set[int] = set()
        plain, progress = Tensor.tolist, Metrics.progress

        def tolist(tensor: Tensor) -> Any:  # reads without the operation that the mode sees
            self.at.add(self.batch())
            return plain(tensor)

        def shows(metrics: Metrics) -> Any:
            self.shown.add(self.batch())
            return progress(metrics)

        monkeypatch.setattr(Tensor, "tolist", tolist)
        monkeypatch.setattr(Metrics, "progress", shows)

    def batch(self) -> int:
        return self.module._run.position.micro_step + 1 if self.module._run is not None else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func):
            self.at.add(self.batch())
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_over_100_steps_but_at_logging_steps_and_when_the_display_is_drawn(
    tiny: Any, trainer: Any, loader: Any, monkeypatch: Any
) -> None:
    class Logging(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            return loss

    reads = ReadBacks(monkeypatch)
    reads.module = Logging()
    with reads:
        trainer(plugins=STANDARD, max_epochs=1, log_every_n_steps=40).fit(reads.module, list(loader(100)), [list(loader(2))])
    records = {40, 41, 80, 81}  # the batch that completes a step, seen before and after it was counted
    the_end = {100, 101}  # the last batch of the epoch, its validation, its checkpoint
    the_start = {0, 1}  # before the first step: the model table, the sanity check
    assert reads.at & records
    assert reads.at - reads.shown <= records | the_end | the_start
    assert len(reads.shown & set(range(2, 100))) < 50, "the display is drawn now and then, not at every batch"


def test_a_fit_leaves_checkpoints_journal_and_event_files_and_numbers_that_agree(tiny: Any, trainer: Any, loader: Any) -> None:
    made = trainer(plugins=["standard", {"checkpoint": {"monitor": "val_loss", "top_k": 2}}], max_epochs=3)
    made.fit(tiny(), loader(4), loader(2))
    folder = made.run.dir
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml", "journal.jsonl", "tensorboard"]
    files = sorted((folder / "checkpoints").iterdir())
    assert len(files) == 3
    assert all(verify(path) == [] for path in files)
    assert made.run.best_path in files
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["event"] == "log_metrics" and "val_loss" in line["metrics"]]
    assert [record["step"] for record in records] == [4, 8, 12]
    assert records[-1]["metrics"]["val_loss"] == made.metrics["val_loss"]
    assert made.run.plugins["checkpoint"].best_score == min(record["metrics"]["val_loss"] for record in records)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_standard_plugins_only_observe(precision: str, tiny: Any, trainer: Any, loader: Any) -> None:
    finals = []
    for plugins in ([], STANDARD):
        torch.manual_seed(3)
        module = tiny()
        trainer(plugins=plugins, max_epochs=2, precision=precision).fit(module, loader(5, shuffle=True), loader(2))
        finals.append(module.layer.weight.detach().clone())
    assert torch.equal(finals[0], finals[1])
