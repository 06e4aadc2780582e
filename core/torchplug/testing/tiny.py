"""The smallest thing that trains: a module of five numbers, its loaders, and a fit of milliseconds on the CPU."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from torchplug.module import Module
from torchplug.trainer import Trainer

__all__ = ["TinyModule", "make_loader", "tiny_fit", "tiny_trainer"]


def make_loader(batches: int, batch_size: int = 2, seed: int = 0, **options: Any) -> DataLoader[tuple[Tensor, ...]]:
    """``batches`` full batches of (x of width 4, y of width 1), the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * batch_size, 4, generator=generator)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(batches * batch_size, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **options)


class TinyModule(Module):
    """Linear(4, 1) with every step; brings loaders of as many batches as it is told, none where that is 0.

    It logs ``train_loss``, ``val_loss`` and ``test_loss``.

    Args:
        train: batches of the training loader; likewise ``val``, ``test`` and ``predict``.
        batch_size: samples in a batch.
        lr: the learning rate of plain SGD.
        val_loaders: how many validation loaders there are.
    """

    def __init__(
        self, train: int = 4, val: int = 2, test: int = 2, predict: int = 2, batch_size: int = 2, lr: float = 0.1, val_loaders: int = 1
    ) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.1, -0.2, 0.3, -0.4]]))
            self.layer.bias.zero_()
        self.batches = {"train": train, "val": val, "test": test, "predict": predict}
        self.batch_size, self.lr, self.val_loaders = batch_size, lr, val_loaders

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return torch.nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def _loader(self, stage: str, seed: int) -> Any:
        return make_loader(self.batches[stage], self.batch_size, seed) if self.batches[stage] else None

    def train_dataloader(self) -> Any:
        return self._loader("train", 1)

    def val_dataloader(self) -> Any:
        loaders = [self._loader("val", 2 + i) for i in range(self.val_loaders)]
        return loaders if len(loaders) > 1 else loaders[0]

    def test_dataloader(self) -> Any:
        return self._loader("test", 102)

    def predict_dataloader(self) -> Any:
        return self._loader("predict", 103)


def tiny_trainer(*plugins: Any, **options: Any) -> Trainer:
    """A trainer on the CPU with these plugins and no others, without a sanity check; one epoch unless told otherwise.

    Args:
        plugins: names, mappings name -> options, and objects, as in ``Trainer(plugins=[...])``.
        options: those of the Trainer. Without ``root_dir`` its files lie in a temporary folder, which goes away with the trainer.
    """
    made = None if "root_dir" in options else tempfile.mkdtemp(prefix="torchplug-")
    defaults: dict[str, Any] = {"root_dir": made, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    if not {"max_epochs", "max_steps", "max_time", "fast_dev_run"} & options.keys():
        defaults["max_epochs"] = 1
    try:
        trainer = Trainer(**{**defaults, **options, "plugins": list(plugins)})
    except BaseException:
        if made is not None:
            shutil.rmtree(made)
        raise
    if made is not None:
        weakref.finalize(trainer, shutil.rmtree, made, ignore_errors=True)
    return trainer


def tiny_fit(*plugins: Any, module: Module | None = None, **options: Any) -> Trainer:
    """Fits a tiny module with `tiny_trainer`, and returns the trainer: ``.run.module`` is the trained module, ``.run.dir`` its folder.

    Args:
        plugins: as in `tiny_trainer`.
        module: what to train, with loaders of its own; `TinyModule()` if none is given.
        options: as in `tiny_trainer`.
    """
    trainer = tiny_trainer(*plugins, **options)
    trainer.fit(TinyModule() if module is None else module)
    return trainer
