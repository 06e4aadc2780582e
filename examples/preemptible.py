"""A job that may be stopped at any time: started again, it goes on where it was, and ends with the same weights, bit for bit.

python examples/preemptible.py                  # from start to end
python examples/preemptible.py --preempt-at 60  # gets SIGTERM at step 60, as from a scheduler, and exits with 143
python examples/preemptible.py                  # goes on from step 60
"""

import argparse
import os
import signal
import zlib

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from torchplug import Module, Trainer, hookimpl


class Shifted(Dataset):
    """Handwritten digits, moved by up to one pixel at random: what a worker draws is part of what must come back."""

    def __init__(self) -> None:
        digits = load_digits()
        self.images, self.labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return self.images[index].roll((down, right), (0, 1)), self.labels[index]


class Digits(Module):
    """A small network with dropout, which draws random numbers too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))

    def training_step(self, batch):
        images, labels = batch
        loss = F.cross_entropy(self.layers(images), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)}


class Preempt:
    """Does what a scheduler does that wants the machine back."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def on_train_batch_start(self, run) -> None:
        if run.position.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preempt-at", type=int, metavar="STEP")
    arguments = parser.parse_args()

    torch.manual_seed(1)
    module = Digits()
    data = DataLoader(Shifted(), batch_size=64, shuffle=True, num_workers=2)
    plugins = ["journal", {"checkpoint": {"every_time": "5m"}}]
    if arguments.preempt_at is not None:
        plugins.append(Preempt(arguments.preempt_at))
    trainer = Trainer(max_epochs=4, seed=1, name="preemptible", plugins=plugins)
    trainer.fit(module, data, ckpt_path="last")  # starts from the beginning where there is nothing to go on from

    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    loss, bits = trainer.metrics["train_loss"], zlib.crc32(weights.numpy().tobytes())
    print(f"steps: {trainer.run.position.step}, train_loss: {loss:.6f}, weights: {bits:08x}")


if __name__ == "__main__":
    main()
