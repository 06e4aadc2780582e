"""Train a network on Fashion-MNIST with plain SGD, with averaged weights (SWA), and with a moving average (EMA), and compare them.

    python examples/averaging.py                                          # downloads Fashion-MNIST into ./data
    python examples/averaging.py --data /usr/share/datasets/fashion-mnist   # a copy that is there already
    python examples/averaging.py --epochs 20 --seeds 5

SGD is run with two schedules: a constant rate, and one that falls to zero. SWA goes from the falling rate to a constant one after
three quarters of the epochs. The table has the accuracy on the test images after each training, in percent.
"""

import argparse
import statistics
from pathlib import Path

import torch
from fashion_mnist import datasets
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Trainer, seed_everything


class Classifier(Module):
    """784-256-128-10 with BatchNorm, whose statistics have to fit the averaged weights."""

    def __init__(self, lr: float, falls: bool, steps: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 256, bias=False),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Linear(256, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        self.lr, self.falls, self.steps = lr, falls, steps

    def training_step(self, batch):
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        if not self.falls:
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps), "interval": "step"}]


WAYS = {  # whether the schedule falls, and the plugins
    "SGD, constant rate": (False, []),
    "SGD, falling rate": (True, []),
    "SWA": (True, [{"swa": {"start": 0.75, "lr": 0.02, "anneal_epochs": 1}}]),
    "EMA, constant rate": (False, [{"ema": {"decay": 0.999, "warmup": True}}]),
    "EMA, falling rate": (True, [{"ema": {"decay": 0.999, "warmup": True}}]),
}


def accuracy(train: TensorDataset, test: TensorDataset, epochs: int, seed: int, way: str) -> float:
    """Trains in one of the ways; the accuracy of what the module holds afterwards, in percent."""
    falls, plugins = WAYS[way]
    seed_everything(seed)
    loader = DataLoader(train, batch_size=128, shuffle=True, drop_last=True)
    classifier = Classifier(lr=0.1, falls=falls, steps=epochs * len(loader))
    trainer = Trainer(max_epochs=epochs, plugins=plugins, accelerator="cpu", limit_val_batches=0)
    trainer.fit(classifier, loader)
    evaluation = Trainer(plugins=[], accelerator="cpu")
    return 100 * evaluation.validate(classifier, DataLoader(test, batch_size=500))[0]["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the IDX files (default: download into ./data)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, metavar="N", help="train on the first N images only")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train N times each, and show the mean")
    options = parser.parse_args()

    train, test = datasets(options.data)
    train = TensorDataset(*train[: options.limit])
    table = {way: [accuracy(train, test, options.epochs, seed, way) for seed in range(options.seeds)] for way in WAYS}

    print(f"\n{'':20}accuracy     lowest to highest of {options.seeds}")
    for way, values in table.items():
        print(f"{way:20}{statistics.mean(values):7.2f} %    {min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    main()
