"""One run in four places: the journal, TensorBoard, Weights & Biases (offline) and MLflow. Training waits for none of them.

python examples/loggers.py                # needs torchplug-wandb and torchplug-mlflow beside the standard plugins
python examples/loggers.py --later        # trains with the journal alone, and chooses the trackers afterwards
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from torchplug import Module, Trainer

LOGGERS = ["tensorboard", "wandb", "mlflow"]


class Digits(Module):
    """A small network. What it logs goes to every logger under the same name and at the same step."""

    def __init__(self, width: int = 64, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch):
        images, labels = batch
        loss = F.cross_entropy(self.layers(images), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch):
        images, labels = batch
        scores = self.layers(images)
        self.log("val_loss", F.cross_entropy(scores, labels))
        self.log("val_accuracy", (scores.argmax(1) == labels).float().mean(), prog_bar=True)

    def on_validation_end(self):
        figure = Figure(figsize=(4, 4))
        axes = figure.subplots()
        axes.imshow(self.layers[0].weight[0].detach().reshape(8, 8), cmap="gray")
        axes.set_title("what the first unit looks for")
        self.run.log_figure("first unit", figure)

    def on_fit_end(self):
        self.run.log_text("note", f"trained for **{self.global_step}** steps")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--root-dir", default="runs")
    parser.add_argument("--later", action="store_true")
    options = parser.parse_args()

    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target))
    train, val = random_split(data, [1500, 297], generator=torch.Generator().manual_seed(0))

    now = [{"tensorboard": {"hparams_metrics": {"val_loss": "min", "val_accuracy": "max"}}}, {"wandb": {"mode": "offline"}}, "mlflow"]
    trainer = Trainer(
        max_epochs=options.epochs,
        seed=1,
        log_every_n_steps=10,
        root_dir=options.root_dir,
        plugins=["progress", "journal", "checkpoint", *([] if options.later else now)],
    )
    trainer.fit(Digits(), DataLoader(train, 64, shuffle=True), DataLoader(val, 297))

    if options.later:  # the journal holds everything that a tracker needs, on this machine or on another one
        to_wandb = '{"wandb": {"mode": "offline"}}'
        command = ["replay", str(trainer.run.dir), "--to", ",".join(LOGGERS), "--options", to_wandb]
        print("torchplug", *command)
        subprocess.run([Path(sys.executable).with_name("torchplug"), *command], check=True)


if __name__ == "__main__":
    main()
