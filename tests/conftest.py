"""What the tests of core share: a tiny module, loaders, a plugin that records every hook, and a quiet trainer."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import torchplug
from torchplug.testing import TinyModule, make_loader, recorded, tiny_trainer


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory that goes away, and core's lines visible to caplog."""
    monkeypatch.chdir(tmp_path)
    logging.getLogger("torchplug").setLevel(logging.INFO)


class Tiny:
    """``tiny(train=8)`` makes a `TinyModule`; ``class Mine(tiny.Module)`` extends it."""

    Module = TinyModule

    def __call__(self, **options: Any) -> TinyModule:
        return TinyModule(**options)


@pytest.fixture
def tiny() -> Tiny:
    """A factory of tiny modules, whose class is ``tiny.Module``."""
    return Tiny()


@pytest.fixture
def rich() -> type[TinyModule]:
    """A module whose fit fires everything that the picture draws: hyperparameters, two schedulers, metrics at every turn."""

    class Rich(TinyModule):
        def __init__(self, train: int = 4) -> None:
            super().__init__(train=train)
            self.save_hyperparameters()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("val_loss", self.loss(batch), on_step=True, on_epoch=True)

        def on_validation_end(self) -> None:
            self.log("after_validation", 1.0)

        def on_train_end(self) -> None:
            self.log("after_training", 1.0)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for _ in range(2)]
            return [optimizer], [{"scheduler": schedulers[0], "interval": "step"}, {"scheduler": schedulers[1], "interval": "epoch"}]

    return Rich


@pytest.fixture
def loader() -> Callable[..., DataLoader]:
    """A factory of loaders: ``loader(batches, batch_size=2, seed=0, shuffle=...)``."""
    return make_loader


@pytest.fixture
def make_recorder() -> Callable[..., Any]:
    """A factory of plugins that record the hooks named (all if none are)."""

    return recorded


@pytest.fixture
def recorder(make_recorder: Callable[..., Any]) -> Any:
    """A plugin that implements every hook and records each call: ``.names`` in order, ``.calls`` with plain arguments."""
    return make_recorder()


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., torchplug.Trainer]:
    """A factory of trainers without plugins and sanity check that write to ``tmp_path``; one epoch unless told otherwise."""

    def make(plugins: Sequence[Any] = (), **options: Any) -> torchplug.Trainer:
        return tiny_trainer(*plugins, **{"root_dir": tmp_path, **options})

    return make


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A factory of installed plugin packages: ``package("torchplug-shout", source, shout="Shout", version="2.0")``.

    The source becomes the module ``torchplug_shout`` in a folder of its own on ``sys.path``, next to the metadata that pip
    would have written; the other keywords are the entry points. The folder is returned.
    """
    made = []

    def make(distribution: str, source: str, /, version: str = "1.0", requires: Sequence[str] = (), **entries: str) -> Path:
        module = distribution.replace("-", "_")
        folder = tmp_path / "site" / f"{distribution}-{len(made)}"
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needs}", encoding="utf-8")
        lines = [f"{name} = {module}:{value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[torchplug]", *lines, ""]), encoding="utf-8")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)  # a real package of this name may have been imported before
        made.append(module)
        return folder

    yield make
    for module in made:
        sys.modules.pop(module, None)
