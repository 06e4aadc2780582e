"""Train a generator against a discriminator, each with its own optimizer (manual optimization).

The data are points on a ring of eight blobs. The printed number is the energy distance between generated and real
points (Szekely and Rizzo, 2013): 0 if the two distributions are the same, and much larger before training.

    python examples/gan.py
"""

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Trainer, seed_everything

BLOBS = 8


def centres() -> Tensor:
    """The middles of the blobs on the unit circle, shape (8, 2)."""
    angles = torch.arange(BLOBS) * 2 * math.pi / BLOBS
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def ring(count: int) -> Tensor:
    """Points around the centres with a standard deviation of 0.1, shape (count, 2)."""
    return centres()[torch.randint(BLOBS, (count,))] + 0.1 * torch.randn(count, 2)


def energy_distance(one: Tensor, other: Tensor) -> Tensor:
    """How different two samples are: 0 for equal distributions."""
    return 2 * torch.cdist(one, other).mean() - torch.cdist(one, one).mean() - torch.cdist(other, other).mean()


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, outputs)
    )


class Gan(Module):
    def __init__(self, noise: int = 8, hidden: int = 128, lr: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False  # training_step itself says what is updated, and when
        self.generator = mlp(noise, hidden, 2)
        self.discriminator = mlp(2, hidden, 1)

    def forward(self, count):
        return self.generator(torch.randn(count, self.hparams.noise, device=self.device))

    def training_step(self, batch):
        (real,) = batch
        generator_optimizer, discriminator_optimizer = self.optimizers()

        # The discriminator learns to tell real from generated; the generator is left alone.
        fake = self(len(real)).detach()
        loss_real, loss_fake = F.softplus(-self.discriminator(real)).mean(), F.softplus(self.discriminator(fake)).mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss_real + loss_fake)
        discriminator_optimizer.step()

        # The generator learns to be taken for real by it.
        loss = F.softplus(-self.discriminator(self(len(real)))).mean()
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()

        self.log("discriminator_loss", loss_real + loss_fake, prog_bar=True)
        self.log("generator_loss", loss, prog_bar=True)

    def validation_step(self, batch):
        (real,) = batch
        self.log("distance", energy_distance(self(len(real)), real), prog_bar=True)

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=self.hparams.lr, betas=(0.0, 0.9)) for part in (self.generator, self.discriminator)]


@torch.no_grad()
def distance(gan: Gan) -> float:
    return energy_distance(gan(2_000).cpu(), ring(2_000)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()

    seed_everything(3)
    gan = Gan()
    train = DataLoader(TensorDataset(ring(20_000)), batch_size=256, shuffle=True)
    val = DataLoader(TensorDataset(ring(2_000)), batch_size=2_000)
    before = distance(gan)
    Trainer(max_epochs=options.epochs).fit(gan, train, val)
    after = distance(gan)

    with torch.no_grad():
        distances, nearest = torch.cdist(gan(2_000).cpu(), centres()).min(dim=1)
    print(f"\nenergy distance to the real points: {before:.3f} before training, {after:.3f} after")
    print(f"blobs that the generator reaches: {len(nearest[distances < 0.3].unique())} of {BLOBS}")


if __name__ == "__main__":
    main()
