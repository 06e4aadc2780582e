"""Compress handwritten digits into a few numbers, reload the best checkpoint, and use the encoder alone.

python examples/autoencoder.py
python examples/autoencoder.py --plot codes.png    # the first two numbers of each code, as a picture
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from torchplug import Module, Trainer, seed_everything


class Autoencoder(Module):
    """64 pixels -> ``code_size`` numbers -> 64 pixels.

    Args:
        code_size: how many numbers an image is compressed into.
        hidden: width of the layer between pixels and code, on both sides.
        lr: learning rate of Adam.
    """

    def __init__(self, code_size: int = 2, hidden: int = 128, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()  # kept in every checkpoint, so that load_from_checkpoint needs no arguments
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, code_size))
        self.decoder = nn.Sequential(nn.Linear(code_size, hidden), nn.ReLU(), nn.Linear(hidden, 64))

    def forward(self, images):
        return self.decoder(self.encoder(images))

    def training_step(self, batch):
        images, _ = batch
        loss = F.mse_loss(self(images), images)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch):
        images, _ = batch
        self.log("val_loss", F.mse_loss(self(images), images), prog_bar=True)

    def predict_step(self, batch):
        images, _ = batch
        return self.encoder(images)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def plot(codes: torch.Tensor, labels: torch.Tensor, path: str) -> None:
    """A scatter plot of the first two numbers of each code, one colour for each digit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6))
    axes = figure.subplots()
    dots = axes.scatter(codes[:, 0], codes[:, 1], c=labels, cmap="tab10", s=12)
    figure.colorbar(dots, label="digit")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--code-size", type=int, default=2)
    parser.add_argument("--plot", metavar="FILE", help="write a scatter plot of the test images' codes")
    options = parser.parse_args()

    seed_everything(1)
    digits = load_digits()
    dataset = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train, val = random_split(dataset, [1397, 400])
    train_loader, val_loader = DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=400)

    trainer = Trainer(max_epochs=options.epochs, plugins=["standard", {"checkpoint": {"monitor": "val_loss"}}])
    trainer.fit(Autoencoder(code_size=options.code_size), train_loader, val_loader)

    # predict_step with the best checkpoint, batch by batch: the codes of the training images
    train_codes = torch.cat(trainer.predict(dataloaders=DataLoader(train, batch_size=256))).cpu()

    # Later, or in another program, a path is all that is needed; the encoder alone is an ordinary nn.Module.
    path = trainer.run.best_path
    autoencoder = Autoencoder.load_from_checkpoint(path)
    autoencoder.freeze()
    images, labels = val[:]
    codes = autoencoder.encoder(images)
    print(f"\nreloaded {path} with the hyperparameters {dict(autoencoder.hparams)}")
    print(f"{len(images)} images of 64 pixels became codes of shape {tuple(codes.shape)}")

    error = F.mse_loss(autoencoder.decoder(codes), images).item()
    mean = F.mse_loss(train[:][0].mean(0).expand_as(images), images).item()
    print(f"reconstruction error: {error:.4f} (always showing the mean image: {mean:.4f})")
    neighbours = KNeighborsClassifier().fit(train_codes, train[:][1])
    print(f"digits told from the code alone, by nearest neighbours: {neighbours.score(codes, labels):.3f}")
    if options.plot:
        plot(codes, labels, options.plot)
        print(f"codes drawn in {options.plot}")


if __name__ == "__main__":
    main()
