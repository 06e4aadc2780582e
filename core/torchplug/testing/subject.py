"""The plugin that is checked, what it is trained with, and the runs that several checks look at."""

from __future__ import annotations

import io
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchplug.discovery import Found, find
from torchplug.hookspecs import hookimpl
from torchplug.members import Member
from torchplug.plugins import build
from torchplug.run import Run
from torchplug.seed import generator_state
from torchplug.testing.surroundings import Surroundings
from torchplug.testing.tiny import TinyModule, make_loader, tiny_fit, tiny_trainer
from torchplug.trainer import Trainer

__all__ = ["KILLED", "SETTINGS", "Check", "NotApplicable", "Practice", "Problems", "Saver", "Subject", "differences", "quiet", "result_of"]

Problems = Iterator[str]
"""What a check yields: a line for each thing that is wrong, with what to do about it."""

SETTINGS: dict[str, Any] = {"max_epochs": 2, "seed": 7, "log_every_n_steps": 4, "num_sanity_val_steps": 1}
SAVED, KILLED = 5, 8  # after which batch of the run a checkpoint is written, and the process killed


class NotApplicable(Exception):
    """A check has nothing to say about this plugin; the message is the reason."""


class Practice(TinyModule):
    """A `TinyModule` whose training draws random numbers and has state: dropout, shuffled data, Adam, a schedule of its rate."""

    def __init__(self, train: int = 6) -> None:
        super().__init__(train=train)

    def forward(self, x: Tensor) -> Any:
        return self.layer(torch.nn.functional.dropout(x, 0.2, self.training))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    def train_dataloader(self) -> Any:
        return make_loader(self.batches["train"], self.batch_size, 1, shuffle=True)


@dataclass(eq=False)
class Saver:
    """Writes a checkpoint after a batch, and ends the process with SIGKILL after another one."""

    path: Path
    kills: bool = False
    saved: bool = False

    @hookimpl
    def on_train_batch_end(self, run: Run) -> None:
        if run.position.micro_step >= SAVED and not self.saved:
            self.saved = True
            run.save_checkpoint(self.path)
        if self.kills and run.position.micro_step >= KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


class Outcome(NamedTuple):
    """A fit that is over, what it came to, the checkpoint from the middle of it, and what it left changed in the process."""

    trainer: Trainer
    result: dict[str, Any]
    path: Path
    left: list[str]
    surroundings: Surroundings


@dataclass(eq=False)
class Subject:
    """A plugin by its name and options, and the tiny runs in which it is checked.

    Args:
        name: its name.
        options: those that it is built with.
        folder: where its runs may write; it goes away afterwards.
        notes: what checks want to say besides what is wrong.
        cost: microseconds that it adds to a step, those of a bare step, and by how much bare steps differ.
    """

    name: str
    options: Mapping[str, Any]
    folder: Path
    notes: list[str] = field(default_factory=list)
    cost: tuple[float, float, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a process that is spawned gets: not the runs that are over."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    # ------------------------------------------------------------------ what it is

    @cached_property
    def found(self) -> Found:
        """Its entry point."""
        return find(self.name)

    @cached_property
    def target(self) -> Any:
        """What the entry point names: a class, or the list of a bundle."""
        return self.found.load()

    @property
    def bundle(self) -> bool:
        """Whether it is a list of other plugins."""
        return isinstance(self.target, (list, tuple))

    @property
    def named(self) -> Any:
        """How a trainer is told to use it."""
        return self.name if self.bundle or not self.options else {self.name: dict(self.options)}

    def build(self, **options: Any) -> Any:
        """A new instance, built as a trainer does it."""
        built = build([{self.name: {**self.options, **options}}])
        return next(member.plugin for member in built if member.name == self.name)

    @cached_property
    def member(self) -> Member:
        """An instance as a run sees it, with its hooks."""
        return Member(self.name, self.build(), distribution=self.found.distribution, version=self.found.version)

    @property
    def hooks(self) -> dict[str, Any]:
        """The hooks that it has with these options."""
        return {} if self.bundle else self.member.hooks

    @property
    def launcher(self) -> bool:
        """Whether it starts other processes and has no part in what they exchange: it cannot run in one process."""
        return "launch" in self.hooks and "gather" not in self.hooks

    @property
    def observer(self) -> bool:
        """Whether it promises to leave training as it is: ``observes``, or else ``on_error="disable"``."""
        return not self.bundle and bool(getattr(self.member.plugin, "observes", self.member.on_error == "disable"))

    def one_class(self) -> None:
        """For checks that look at a class.

        Raises:
            NotApplicable: it is a bundle.
        """
        if self.bundle:
            raise NotApplicable("a bundle has no class; its plugins are checked under their own names")

    def one_process(self) -> None:
        """For checks that train in this process.

        Raises:
            NotApplicable: it always starts others.
        """
        if self.launcher:
            raise NotApplicable("it hands every run to processes that it starts")

    # ------------------------------------------------------------------ runs

    def root(self) -> Path:
        """A new folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def fit(self, *before: Any, after: tuple[Any, ...] = (), module: TinyModule | None = None, **options: Any) -> Trainer:
        """A fit with it, between other plugins."""
        module = Practice() if module is None else module
        return tiny_fit(*before, self.named, *after, module=module, **{**SETTINGS, "root_dir": self.root(), **options})

    def bare(self, *others: Any, module: TinyModule | None = None, **options: Any) -> Trainer:
        """The same fit without it."""
        module = Practice() if module is None else module
        return tiny_fit(*others, module=module, **{**SETTINGS, "root_dir": self.root(), **options})

    def resume(self, root: Path, path: Path, *others: Any) -> Trainer:
        """A fit that goes on from a checkpoint of one in ``root``."""
        trainer = tiny_trainer(*others, self.named, **{**SETTINGS, "root_dir": root})
        trainer.fit(Practice(), ckpt_path=path)
        return trainer

    @cached_property
    def whole(self) -> Outcome:
        """A fit that nothing happens to, with a checkpoint from the middle of it."""
        path = self.root() / "saved.safetensors"
        self.bare()  # what torch itself does at a first step is no business of the plugin
        before = Surroundings()
        trainer = self.fit(Saver(path), root_dir=path.parent)
        return Outcome(trainer, result_of(trainer), path, list(before.changes(first=True)), before)

    @property
    def plugin(self) -> Any:
        """The instance that was in `whole`."""
        return self.whole.trainer.enabled[self.name]


def result_of(trainer: Trainer) -> dict[str, Any]:
    """What a fit that has just ended came to: weights, optimizers, random generators, position, and what the module logged."""
    run = trainer.run
    assert run is not None
    return {
        "weights": {name: value.detach().clone() for name, value in run.module.state_dict().items()},
        "optimizers": [optimizer.state_dict()["state"] for optimizer in run.optimizers],
        "generators": generator_state(),
        "position": {"epoch": run.position.epoch, "batch": run.position.batch, "step": run.position.step},
        "metrics": {name: trainer.metrics.get(name) for name in ("train_loss_epoch", "val_loss")},
    }


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """The paths at which two nested values are not the same, bit for bit; an empty one stands for the values themselves."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            place = f"{path}.{key}" if path else str(key)
            if key in one and key in other:
                yield from differences(one[key], other[key], place)
            else:
                yield place
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for index, (first, second) in enumerate(zip(one, other, strict=True)):
            yield from differences(first, second, f"{path}[{index}]")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or not torch.equal(_bits(one), _bits(other)):
            yield path
    elif not (one is other or (type(one) is type(other) and bool(one == other)) or (one != one and other != other)):
        yield path


def _bits(tensor: Tensor) -> Tensor:
    """The same for NaN in the same places."""
    return torch.nan_to_num(tensor.detach(), nan=1234.5) if tensor.is_floating_point() else tensor.detach()


class _Lines(logging.Handler):
    """Keeps the lines of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Inside, nothing is shown; gives the lines that torchplug logs."""
    logger, handler = logging.getLogger("torchplug"), _Lines()
    before = (list(logger.handlers), logger.propagate, logger.level)
    logger.handlers[:], logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield handler.lines
    finally:
        logger.handlers[:], logger.propagate = before[0], before[1]
        logger.setLevel(before[2])


Check = Callable[[Subject], Problems]
