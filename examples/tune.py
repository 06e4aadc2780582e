"""Find the batch size and the learning rate, look at the curve that says why, and train with both.

    python examples/tune.py
    python examples/tune.py --max-batch-size 256 --plot rates.png

Memory is no limit for these small images: the batch size ends at --max-batch-size.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from torchplug import Module, Trainer, seed_everything


class Digits(Module):
    """A network with two hidden layers, which makes its loaders itself, so that ``batch_size`` can be changed.

    Args:
        train: images and labels.
        val: the same, to validate on.
        batch_size: samples in a batch, as they are before anything is looked for.
        lr: learning rate of SGD, the same.
    """

    def __init__(self, train, val, batch_size: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters("batch_size", "lr")  # the finders write what they choose here
        self.train_set, self.val_set = train, val
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=self.hparams.batch_size)

    def training_step(self, batch):
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch):
        images, labels = batch
        logits = self.network(images)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="batch size before the search")
    parser.add_argument("--max-batch-size", type=int, default=64, metavar="N", help="the largest one that is tried")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate before the search")
    parser.add_argument("--plot", metavar="FILE", default="learning_rates.png", help="where the losses over the rates are drawn")
    options = parser.parse_args()

    seed_everything(1)
    digits = load_digits()
    dataset = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train, val = random_split(dataset, [1397, 400])
    module = Digits(train, val, options.batch_size, options.lr)

    # The order in the list says nothing: the batch size is found first, and the rate with batches of that size.
    finders = [{"lr_finder": {"max_lr": 10.0}}, {"batch_size_finder": {"mode": "binary", "max": options.max_batch_size}}]
    found = Trainer(max_epochs=1, plugins=finders).tune(module)
    size, rates = found["batch_size_finder"], found["lr_finder"]

    print(f"\nbatch size {size.size} (was {size.before}), after {len(size.trials)} trials: {[tried for tried, _ in size.trials]}")
    for method in ("minimum", "steepest", "valley", "slide"):
        rate = rates.suggestion(method)  # None where the curve does not say one
        print(f"learning rate by {method:8} {'none' if rate is None else f'{rate:.2e}'}{'   <- chosen' if method == rates.method else ''}")
    rates.plot().savefig(options.plot, dpi=120)
    print(f"losses over rates drawn in {options.plot}\n")

    # A fit of this module now has the batches and the rate that were chosen; its weights are the ones it had before the search.
    trainer = Trainer(max_epochs=options.epochs, plugins=["standard"])
    trainer.fit(module)
    used = trainer.run.optimizers[0].param_groups[0]["lr"]
    print(f"\ntrained with batches of {trainer.run.loaders['train'][0].batch_size} and a learning rate of {used:.2e}")
    print(f"accuracy on {len(val)} other images: {trainer.metrics['val_accuracy']:.3f}")


if __name__ == "__main__":
    main()
