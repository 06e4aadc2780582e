"""The loops by hand and the same work with torchplug: each takes batches, trains on them and returns the network.

Everybody has the same network, batches, optimizer and device; a test compares the networks that come out.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import WINDOW, Batch, Batches, unseen
from torch import Tensor, nn

import torchplug
from torchplug import Trainer, hookimpl

Work = Callable[[Batches], nn.Module]
STANDARD = ("standard", {"early_stopping": {"monitor": "val_loss"}})


class MLP(nn.Module):
    """32-64-10, the same for everybody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l1 = nn.Linear(32, 64)
        self.l2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(nn.functional.relu(self.l1(x)))


def measure(work: Work, steps: int) -> float:
    """Microseconds of CPU per step."""
    batches = Batches(steps)
    with unseen():
        work(batches)
    return batches.microseconds()


# ---------------------------------------------------------------------- by hand


def raw(batches: Batches) -> nn.Module:
    """Nothing but training."""
    net = MLP()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for x, y in batches:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def raw_clearing(batches: Batches) -> nn.Module:
    """Nothing but training, and gradients cleared as core clears them, without ``optimizer.zero_grad()``."""
    net = MLP()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for x, y in batches:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
    return net


def raw_nothing(batches: Batches) -> nn.Module:
    """A step whose own work is nothing: a call that returns a tensor."""
    loss = torch.tensor(1.0)

    def step(batch: Batch, batch_idx: int) -> Tensor:
        return loss

    for i, batch in enumerate(batches):
        step(batch, i)
    return nn.Module()


def by_hand(batches: Batches) -> nn.Module:
    """What the standard plugins do, by hand: means, a bar, validation, early stopping, checkpoints, two kinds of log."""
    with tempfile.TemporaryDirectory() as folder:
        return _by_hand(batches, Path(folder))


def _by_hand(batches: Batches, folder: Path) -> nn.Module:
    from rich.console import Console
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

    net = MLP()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    validation = Batches(WINDOW)
    writer, journal = SummaryWriter(str(folder)), open(folder / "log.jsonl", "w")  # type: ignore[no-untyped-call]  # noqa: SIM115
    best, total, seen, drawn = float("inf"), torch.zeros(()), 0, 0.0
    with Progress(console=Console(file=io.StringIO(), force_terminal=True)) as bar, journal:
        task = bar.add_task("train", total=len(batches))
        for step, (x, y) in enumerate(batches, 1):
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() * len(x)
            seen += len(x)
            now = time.perf_counter()
            if now - drawn > 0.1:
                bar.update(task, completed=step, description=f"loss {float(loss):.3f}")
                drawn = now
            if step % WINDOW == 0:
                writer.add_scalar("train_loss_step", float(loss), step)  # type: ignore[no-untyped-call]
                journal.write(json.dumps({"step": step, "train_loss_step": float(loss)}) + "\n")
        net.eval()
        with torch.no_grad():
            val_loss = float(sum(nn.functional.cross_entropy(net(x), y) for x, y in validation)) / WINDOW
        best = min(best, val_loss)
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.pt")
        writer.add_scalar("val_loss", val_loss, step)  # type: ignore[no-untyped-call]
        writer.add_scalar("train_loss_epoch", float(total) / seen, step)  # type: ignore[no-untyped-call]
        writer.close()  # type: ignore[no-untyped-call]
    return net


# ---------------------------------------------------------------------- torchplug


class Net(torchplug.Module):
    """The same network as a module of torchplug."""

    logs = False

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if self.logs:
            self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


class Validated(Net):
    """The same with a validation."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y))


class Nothing(Net):
    """A step without work; see `Answers`."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = torch.tensor(1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.logs:
            self.log("train_loss", self.loss, on_step=True, on_epoch=True, prog_bar=True)
        return self.loss


class Answers:
    """Answers the operations of a step with nothing, so that only the framework is left."""

    @hookimpl
    def backward(self) -> bool:
        return True

    @hookimpl
    def optimizer_step(self) -> bool:
        return True

    @hookimpl
    def zero_grad(self) -> bool:
        return True


def with_torchplug(module: Callable[[], Any], *plugins: Any, logs: bool = False) -> Work:
    def run(batches: Batches) -> nn.Module:
        net = module()
        net.logs = logs
        validation = Batches(WINDOW) if isinstance(net, Validated) else None
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(max_epochs=1, plugins=list(plugins), accelerator="cpu", root_dir=folder, num_sanity_val_steps=0)
            trainer.fit(net, batches, validation)
        trained: nn.Module = net.net
        return trained

    return run


def nothing(*plugins: Any, logs: bool = False) -> Work:
    """The framework alone."""
    return with_torchplug(Nothing, Answers(), *plugins, logs=logs)


bare = with_torchplug(Net)
usual = with_torchplug(Validated, *STANDARD, logs=True)
