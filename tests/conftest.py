"""What the tests of core share: a tiny module, loaders, a plugin that records every hook, and a quiet trainer."""

from __future__ import annotations

import logging
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torchplug
from torchplug import hookimpl
from torchplug.members import PARAMETERS

PLAIN = (str, int, float, bool, type(None), Path)


@pytest.fixture(autouse=True, scope="session")
def _signals() -> None:
    """Signals do what they do in a program at a terminal: who runs the tests in the background may have them ignored."""
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, one seed, a working directory that goes away, and core's lines visible to caplog."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    logging.getLogger("torchplug").setLevel(logging.INFO)


def make_loader(batches: int, batch_size: int = 2, seed: int = 0, **options: Any) -> DataLoader:
    """``batches`` full batches of (x of width 4, y of width 1), the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * batch_size, 4, generator=generator)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(batches * batch_size, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **options)


class TinyModule(torchplug.Module):
    """Linear(4, 1) with every step; brings loaders of as many batches as it is told, none where that is 0.

    Args:
        train: batches of the training loader; likewise ``val``, ``test`` and ``predict``.
        batch_size: samples in a batch.
        lr: the learning rate of plain SGD.
        val_loaders: how many validation loaders there are.
    """

    def __init__(
        self, train: int = 4, val: int = 2, test: int = 2, predict: int = 2, batch_size: int = 2, lr: float = 0.1, val_loaders: int = 1
    ) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.1, -0.2, 0.3, -0.4]]))
            self.layer.bias.zero_()
        self.batches = {"train": train, "val": val, "test": test, "predict": predict}
        self.batch_size, self.lr, self.val_loaders = batch_size, lr, val_loaders

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def _loader(self, stage: str, seed: int) -> Any:
        return make_loader(self.batches[stage], self.batch_size, seed) if self.batches[stage] else None

    def train_dataloader(self) -> Any:
        return self._loader("train", 1)

    def val_dataloader(self) -> Any:
        loaders = [self._loader("val", 2 + i) for i in range(self.val_loaders)]
        return loaders if len(loaders) > 1 else loaders[0]

    def test_dataloader(self) -> Any:
        return self._loader("test", 102)

    def predict_dataloader(self) -> Any:
        return self._loader("predict", 103)


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


class Recording:
    """What a recorder has seen. Values that are no plain numbers or texts are kept as the name of their type."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    @property
    def names(self) -> list[str]:
        """The hooks in the order in which they were called."""
        return [name for name, _ in self.calls]

    def record(self, hook: str, arguments: dict[str, Any]) -> None:
        plain = {key: value if isinstance(value, PLAIN) else type(value).__name__ for key, value in arguments.items()}
        self.calls.append((hook, plain))


def _recording_hook(hook: str) -> Callable[..., None]:
    """A hook implementation that takes every argument of its spec, records the call and answers nothing."""
    parameters = PARAMETERS[hook]
    arguments = ", ".join(f"{name!r}: {name}" for name in parameters)
    namespace: dict[str, Any] = {}
    exec(f"def {hook}({', '.join(('self', *parameters))}):\n    self.record({hook!r}, {{{arguments}}})", namespace)
    return namespace[hook]


@pytest.fixture
def make_recorder() -> Callable[..., Any]:
    """A factory of plugins that record the hooks named (all if none are)."""

    def make(*hooks: str) -> Any:
        methods = {hook: hookimpl(_recording_hook(hook)) for hook in hooks or PARAMETERS}
        return type("Recorder", (Recording,), methods)()

    return make


@pytest.fixture
def recorder(make_recorder: Callable[..., Any]) -> Any:
    """A plugin that implements every hook and records each call: ``.names`` in order, ``.calls`` with plain arguments."""
    return make_recorder()


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., torchplug.Trainer]:
    """A factory of trainers without plugins and sanity check that write to ``tmp_path``; one epoch unless told otherwise."""

    def make(**options: Any) -> torchplug.Trainer:
        defaults: dict[str, Any] = {"root_dir": tmp_path, "plugins": [], "num_sanity_val_steps": 0, "accelerator": "cpu"}
        if not {"max_epochs", "max_steps", "max_time", "fast_dev_run"} & options.keys():
            defaults["max_epochs"] = 1
        return torchplug.Trainer(**{**defaults, **options})

    return make


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A factory of installed plugin packages: ``package("torchplug-shout", source, shout="Shout", version="2.0")``.

    The source becomes the module ``torchplug_shout`` in a folder of its own on ``sys.path``, next to the metadata that pip
    would have written; the other keywords are the entry points. The folder is returned.
    """
    made = []

    def make(distribution: str, source: str, /, version: str = "1.0", **entries: str) -> Path:
        module = distribution.replace("-", "_")
        folder = tmp_path / "site" / f"{distribution}-{len(made)}"
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8")
        lines = [f"{name} = {module}:{value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[torchplug]", *lines, ""]), encoding="utf-8")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)  # a real package of this name may have been imported before
        made.append(module)
        return folder

    yield make
    for module in made:
        sys.modules.pop(module, None)
