"""Which suggestion of the learning-rate finder trains best: validation losses after fits with each, beside the best rate of a grid.

A network with two hidden layers of 64 units on scikit-learn's digits, batches of 32, four epochs, two seeds, six optimizers.

    python benchmarks/lr_methods.py
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from measuring import Row, Table, Tables, program
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Trainer
from torchplug_lr_finder import METHODS, lr_find

OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "SGD, momentum 0.9": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "AdamW": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
}
GRID = [10 ** (exponent / 2) for exponent in range(-8, 3)]


class Net(Module):
    def __init__(self, optimizer: str, norm: bool, lr: float = 1e-3) -> None:
        super().__init__()
        self.optimizer, self.lr = optimizer, lr
        norms = [nn.BatchNorm1d(64)] if norm else []
        self.layers = nn.Sequential(nn.Linear(64, 64), *norms, nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: Any) -> Any:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", F.cross_entropy(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters(), self.lr)


def data() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
    return TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])


def trained(optimizer: str, norm: bool, lr: float | None, seed: int, epochs: int) -> float:
    """The validation loss after a fit with this rate; infinite where it diverges, NaN where no rate was found."""
    if lr is None:
        return math.nan
    train, val = data()
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(max_epochs=epochs, plugins=[], accelerator="cpu", root_dir=folder, seed=seed)
        try:
            trainer.fit(Net(optimizer, norm, lr), DataLoader(train, 32, shuffle=True), DataLoader(val, 400))
        except FloatingPointError:
            return math.inf
        return trainer.metrics["val_loss"]


def row(optimizer: str, norm: bool, seeds: int, epochs: int) -> Row:
    """The losses with each suggestion, for each seed, and the best of the grid."""
    name = f"{optimizer}{', batch norm' * norm}"
    print(f"  {name}", file=sys.stderr, flush=True)
    losses: dict[str, list[str]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        torch.manual_seed(seed)
        trainer = Trainer(max_epochs=1, plugins=[], accelerator="cpu", seed=seed)
        found = lr_find(trainer, Net(optimizer, norm), DataLoader(data()[0], 32, shuffle=True))
        for method, each in losses.items():
            each.append(f"{trained(optimizer, norm, found.suggestion(method), seed, epochs):.2f}")  # type: ignore[arg-type]
    best = min(trained(optimizer, norm, lr, 0, epochs) for lr in GRID)
    return {"name": name, "best": best, **{method: ", ".join(each) for method, each in losses.items()}}


def tables(seeds: int = 2, epochs: int = 4) -> Tables:
    columns = {"optimizer": "{name}", "best": "{best:.2f}", **{method: f"{{{method}}}" for method in METHODS}}
    return {"losses": Table(columns, [row(optimizer, norm, seeds, epochs) for optimizer in OPTIMIZERS for norm in (False, True)])}


if __name__ == "__main__":
    program(tables)
