"""A folder with a user's script and data, in which commands are run."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from torchplug.cli import main

NETS = '''
"""A user's own module and data."""

import os
import signal
from dataclasses import dataclass

import torch
import torchplug
from torch.utils.data import DataLoader, TensorDataset

from torchplug import DataModule, Module, hookimpl


class Encoder(torch.nn.Module):
    """Four numbers to some.

    Args:
        width: how many.
    """

    def __init__(self, width: int = 3):
        super().__init__()
        self.width, self.layer = width, torch.nn.Linear(4, width)

    def forward(self, x):
        return self.layer(x)


class Deep(Encoder):
    """Two layers.

    Args:
        drop: what is left out.
    """

    def __init__(self, drop: float = 0.5, **more):
        super().__init__(**more)
        self.drop = torch.nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.layer(x))


class Net(Module):
    """A small net.

    Args:
        lr: the learning rate.
        tag: any words.
    """

    def __init__(self, lr: float = 0.1, tag: str = "none", fails: str = "", ends: str | None = None):
        super().__init__()
        self.save_hyperparameters(ignore="encoder")
        self.encoder, self.head = Deep(), torch.nn.Linear(3, 1)

    def step(self, batch, name):
        x, y = batch
        loss = ((self.head(self.encoder(x)) - y) ** 2).mean()
        self.log(name, loss)
        return loss

    def training_step(self, batch):
        if self.hparams.fails:
            raise getattr(torchplug, self.hparams.fails, RuntimeError)("a mistake in the user's code")
        if self.hparams.ends:
            os.kill(os.getpid(), getattr(signal, self.hparams.ends))
        return self.step(batch, "train_loss")

    def validation_step(self, batch):
        self.step(batch, "val_loss")

    def test_step(self, batch):
        self.step(batch, "test_loss")

    def predict_step(self, batch):
        return self.head(self.encoder(batch[0]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class Loose(Net):
    """Takes anything."""

    def __init__(self, note=None, either: int | str = 0):
        super().__init__()


class Built(Net):
    """A net around an encoder that is given.

    Args:
        encoder: what it is built around.
    """

    def __init__(self, encoder: Encoder, lr: float = 0.1):
        super().__init__(lr=lr)
        self.encoder, self.head = encoder, torch.nn.Linear(encoder.width, 1)


class Points(DataModule):
    """Points near a plane.

    Args:
        n: how many.
        batch_size: samples in a batch.
    """

    def __init__(self, n: int = 24, batch_size: int = 4):
        super().__init__()
        self.hparams = {"n": n, "batch_size": batch_size}
        x = torch.randn(n, 4)
        self.set = TensorDataset(x, x.sum(1, keepdim=True))

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=self.hparams["batch_size"], shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.set, batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader


def loaders(n: int = 24):
    """Loaders for everything."""
    points = Points(n)
    return {"train": points.train_dataloader(), "val": points.val_dataloader(), "test": points.test_dataloader()}


def one_loader(n: int = 24):
    return Points(n).train_dataloader()


@dataclass(kw_only=True, eq=False)
class Count:
    """A plugin without an entry point.

    Args:
        every: count these.
    """

    every: int = 1

    @hookimpl
    def on_train_batch_end(self, run, batch_idx):
        if batch_idx % self.every == 0:
            run.report["count"] = str(int(run.report.get("count", "0")) + 1)
'''

CONFIG = """
trainer: {max_epochs: 2, seed: 3, accelerator: cpu}
plugins: [checkpoint]
module: {class_path: nets.Net}
data: {class_path: nets.Points}
"""


class Project:
    """The folder, and commands in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self.folder, self._capsys, self._caplog = folder, capsys, caplog

    def write(self, name: str, text: str) -> str:
        """Writes a file; returns its name."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return name

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Runs ``torchplug WORDS`` in this process; returns exit code, output, and errors with the lines of core."""
        self._capsys.readouterr()
        self._caplog.clear()
        code = main(list(words))
        output, self.errors = self._capsys.readouterr()
        return code, output, self.errors + "\n".join(self._caplog.messages)

    def refused(self, *words: str) -> str:
        """What a command says that is a mistake: one line."""
        code, output, said = self(*words)
        assert (code, output) == (2, ""), said
        assert self.errors.count("\n") == 1 and self.errors.startswith("torchplug "), said
        return self.errors.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any) -> Iterator[Project]:
    """A folder with nets.py and config.yaml, as the current directory."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TORCHPLUG_PLUGINS", "")
    before = set(sys.modules)
    logging.getLogger("torchplug").setLevel(logging.INFO)
    made = Project(tmp_path, capsys, caplog)
    made.write("nets.py", NETS)
    made.write("config.yaml", CONFIG)
    yield made
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def fields() -> Callable[[Any], dict[str, Any]]:
    """The options that an object holds, with its class; a tuple is the list that a file has in its place."""

    def of(made: Any) -> dict[str, Any]:
        options = {each.name: getattr(made, each.name) for each in dataclasses.fields(made) if each.init and not each.name.startswith("_")}
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {"class": type(made).__name__, "on_error": getattr(made, "on_error", None), **options}

    return of
