"""Train a classifier on scikit-learn's handwritten digits, watch it, and test the best checkpoint.

pip install -r requirements.txt
python examples/quickstart.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from torchplug import Module, Trainer, seed_everything


class Digits(Module):
    """Two convolutions and a linear layer that tell which digit an 8x8 image shows."""

    def __init__(self, width: int = 32, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classify = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * width, 10))
        self.example_input_array = torch.zeros(1, 1, 8, 8)  # lets the model table show the shapes

    def forward(self, images):
        return self.classify(self.features(images))

    def training_step(self, batch):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch):
        self.measure(batch, "val")

    def test_step(self, batch):
        self.measure(batch, "test")

    def measure(self, batch, stage):
        images, labels = batch
        logits = self(images)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log(f"{stage}_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    seed_everything(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8), from 0 to 1
    train, val, test = random_split(TensorDataset(images, torch.tensor(digits.target)), [1197, 300, 300])
    val, test = DataLoader(val, batch_size=300), DataLoader(test, batch_size=300)

    # "standard" is what a Trainer has anyway; here its checkpoint is told what is best, and a plugin is added to it.
    plugins = ["standard", {"checkpoint": {"monitor": "val_loss"}}, {"early_stopping": {"monitor": "val_loss"}}]
    trainer = Trainer(max_epochs=30, plugins=plugins)
    trainer.fit(Digits(), DataLoader(train, batch_size=32, shuffle=True), val)
    results = trainer.test(dataloaders=test)  # with the weights of the best checkpoint
    print(f"test accuracy: {results[0]['test_accuracy']:.3f}")


if __name__ == "__main__":
    main()
