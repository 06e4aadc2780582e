"""Two plugins in the file that uses them: one listens to an event, one surrounds an operation.

    python examples/own_plugin.py

`torchplug/hookspecs.py` draws the whole run and documents every hook. To use a plugin in other projects too, and by
name, make it a package of two files:

    torchplug_gradient_size.py  the class GradientSize below, and its imports

    pyproject.toml              [build-system]
                                requires = ["hatchling"]
                                build-backend = "hatchling.build"

                                [project]
                                name = "torchplug-gradient-size"
                                version = "0.1.0"
                                dependencies = ["torchplug>=0.1,<0.2"]

                                [project.entry-points.torchplug]
                                gradient_size = "torchplug_gradient_size:GradientSize"

After `pip install .` in its folder, `torchplug plugins` lists it, and it is enabled by its name, with its options:
`Trainer(plugins=["standard", {"gradient_size": {"norm_type": 1.0}}])`.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Trainer, hookimpl, seed_everything


@dataclass(kw_only=True, eq=False)
class GradientSize:
    """Logs the norm of all gradients just before they are clipped and used.

    Args:
        norm_type: which norm: 2 for the Euclidean length, inf for the largest element.
    """

    norm_type: float = 2.0

    def __post_init__(self):
        if self.norm_type <= 0:
            raise ValueError(f"norm_type must be above 0, got {self.norm_type!r}")

    # A hook takes the arguments that it names, of those that hookspecs.py lists for it.
    @hookimpl
    def on_before_optimizer_step(self, run, optimizer):
        if (run.position.step + 1) % run.options.log_every_n_steps == 0:  # the loggers get a record after this step
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            run.log("gradient_size", nn.utils.get_total_norm(gradients, self.norm_type))  # a tensor: nothing waits for the device


@dataclass(kw_only=True, eq=False)
class ValidationTime:
    """Measures how long validation takes, and says it when the run is over."""

    seconds: float = field(init=False, default=0.0)

    @hookimpl
    def setup(self):
        self.seconds = 0.0  # one object may take part in several runs

    # A wrapper runs up to its yield before the operation, and from there after it, whoever carries it out.
    @hookimpl(wrapper=True)
    def evaluate(self):
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            self.seconds += time.perf_counter() - start

    @hookimpl
    def on_fit_end(self, run):
        run.report["validation_time"] = f"{1000 * self.seconds:.1f} ms of {1000 * run.seconds:.1f} ms"


class Regression(Module):
    """Finds the weights that made the data."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def training_step(self, batch):
        inputs, targets = batch
        loss = F.mse_loss(self.linear(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):
        inputs, targets = batch
        self.log("val_loss", F.mse_loss(self.linear(inputs), targets))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main():
    seed_everything(0)
    inputs = torch.randn(1000, 8)
    targets = inputs @ torch.arange(8.0).unsqueeze(1) + 0.1 * torch.randn(1000, 1)
    train = DataLoader(TensorDataset(inputs[:800], targets[:800]), batch_size=20, shuffle=True)
    val = DataLoader(TensorDataset(inputs[800:], targets[800:]), batch_size=200)

    # Objects stand beside names.
    trainer = Trainer(max_epochs=5, log_every_n_steps=20, plugins=["standard", GradientSize(), ValidationTime()])
    trainer.fit(Regression(), train, val)
    print(f"gradient norm in the end: {trainer.metrics['gradient_size']:.2g}, validation loss {trainer.metrics['val_loss']:.2g}")


if __name__ == "__main__":
    main()
