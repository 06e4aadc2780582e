"""Train the same network twice, with torchplug and with a plain torch loop, and compare them bit for bit.

    python examples/fashion_mnist.py                                          # downloads Fashion-MNIST into ./data
    python examples/fashion_mnist.py --data /usr/share/datasets/fashion-mnist   # a copy that is there already

``--data`` takes a folder with the original IDX files, packed (.gz) or not; the path above is where Debian's package
dataset-fashion-mnist puts them. The exit status is 1 if the two trainings differ in a single bit.
"""

import argparse
import gzip
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import FashionMNIST

from torchplug import Module, Trainer, seed_everything

# ---------------------------------------------------------------------- data


def datasets(folder: Path | None) -> list[TensorDataset]:
    """The 60,000 training and 10,000 test images as floats from 0 to 1, with their labels."""
    if folder is None:
        parts = [FashionMNIST("data", train=train, download=True) for train in (True, False)]
        arrays = [(part.data, part.targets) for part in parts]
    else:
        arrays = [(read_idx(folder, f"{part}-images-idx3"), read_idx(folder, f"{part}-labels-idx1")) for part in ("train", "t10k")]
    return [TensorDataset(images / 255, labels.long()) for images, labels in arrays]


def read_idx(folder: Path, name: str) -> torch.Tensor:
    """A file in IDX format: 0, 0, the type (8: bytes), the number of dimensions, each dimension's size, the bytes."""
    plain, packed = folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz"
    content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    dimensions = content[3]
    shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, dimensions + 1)]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * dimensions).reshape(shape)


def loaders(train: TensorDataset, test: TensorDataset) -> tuple[DataLoader, DataLoader]:
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=500)


# ---------------------------------------------------------------------- the network


class ResidualMLP(nn.Module):
    """784-64-64-10; the second layer's output is added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(784, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.dropout = nn.Dropout(0.1)

    def forward(self, images):
        h1 = F.relu(self.l1(images.flatten(1)))
        h2 = F.relu(self.l2(h1))
        return self.l3(self.dropout(h1 + h2))


def loss_and_accuracy(network: nn.Module, batch):
    images, labels = batch
    logits = network(images)
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


# ---------------------------------------------------------------------- with torchplug


class Classifier(Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = ResidualMLP()
        self.epochs: list[tuple[float, ...]] = []

    def training_step(self, batch):
        loss, accuracy = loss_and_accuracy(self.network, batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_accuracy", accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch):
        loss, accuracy = loss_and_accuracy(self.network, batch)
        self.log("test_loss", loss, prog_bar=True)
        self.log("test_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_train_epoch_end(self, run):
        self.epochs.append(tuple(run.metrics[name] for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")))


def with_torchplug(train: TensorDataset, test: TensorDataset, epochs: int) -> tuple[nn.Module, list[tuple[float, ...]]]:
    seed_everything(1)
    classifier = Classifier()
    Trainer(max_epochs=epochs, accelerator="cpu").fit(classifier, *loaders(train, test))
    return classifier.network, classifier.epochs


# ---------------------------------------------------------------------- by hand


def by_hand(train: TensorDataset, test: TensorDataset, epochs: int) -> tuple[nn.Module, list[tuple[float, ...]]]:
    torch.manual_seed(1)
    network = ResidualMLP()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    train_loader, test_loader = loaders(train, test)
    history = []
    for _ in range(epochs):
        network.train()
        total_loss = total_accuracy = 0.0
        for batch in train_loader:
            loss, accuracy = loss_and_accuracy(network, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total_loss += loss.item() * len(batch[0])  # the mean over samples: the last batch may be smaller
            total_accuracy += accuracy.item() * len(batch[0])
        means = [total_loss / len(train), total_accuracy / len(train)]

        network.eval()
        total_loss = total_accuracy = 0.0
        with torch.no_grad():
            for batch in test_loader:
                loss, accuracy = loss_and_accuracy(network, batch)
                total_loss += loss.item() * len(batch[0])
                total_accuracy += accuracy.item() * len(batch[0])
        history.append((*means, total_loss / len(test), total_accuracy / len(test)))
    return network, history


# ---------------------------------------------------------------------- side by side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the IDX files (default: download into ./data)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--limit", type=int, metavar="N", help="train on the first N images only")
    options = parser.parse_args()

    train, test = datasets(options.data)
    train = TensorDataset(*train[: options.limit])

    network, ours = with_torchplug(train, test, options.epochs)
    print("\nthe same training as a plain loop ...")
    plain_network, plain = by_hand(train, test, options.epochs)

    print("\nepoch            train loss  accuracy   test loss  accuracy")
    for epoch, (our, their) in enumerate(zip(ours, plain, strict=True)):
        for name, values in (("torchplug", our), ("plain loop", their)):
            print(f"{epoch:5}  {name:10}  {values[0]:9.6f}  {values[1]:8.4f}  {values[2]:9.6f}  {values[3]:8.4f}")
    parameters = zip(network.parameters(), plain_network.parameters(), strict=True)
    if ours != plain or not all(torch.equal(one, other) for one, other in parameters):
        raise SystemExit("the two trainings DIFFER")
    print("losses, accuracies and parameters are equal bit for bit")


if __name__ == "__main__":
    main()
