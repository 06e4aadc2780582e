"""Where batches come from: the DataModule, loaders and how many batches of them are used, batches and their sizes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

__all__ = ["DataModule", "batch_size", "length", "limited", "map_batch", "move"]

LOADERS = {
    "train": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


IN_WORDS = {"train": "training", "validate": "validation", "sanity": "validation", "test": "test", "predict": "prediction"}


class DataModule:
    """Data and how to load it, apart from the model. Define the methods you need; hooks by their names are called too.

    ``prepare_data`` runs once per machine (download here), ``setup(stage)`` in every process, then the
    ``..._dataloader`` methods, training first.
    """

    hparams: dict[str, Any]

    def __init__(self) -> None:
        self.hparams = {}

    def prepare_data(self) -> None:
        """Download and unpack; runs in one process of each machine."""

    def setup(self, stage: str) -> None:
        """Make the data sets; ``stage`` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Give back what ``setup`` took."""

    def train_dataloader(self) -> Any:
        """The loader to train on."""

    def val_dataloader(self) -> Any:
        """The loader, or list of loaders, to validate on."""

    def test_dataloader(self) -> Any:
        """The loader, or list of loaders, to test on."""

    def predict_dataloader(self) -> Any:
        """The loader, or list of loaders, to predict for."""


def length(loader: Any) -> int | None:
    """The number of batches that ``loader`` will give, None where that cannot be relied on.

    The ``len`` of an iterable dataset is what its author believes; it is never trusted.
    """
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    try:
        return len(loader)
    except TypeError:
        return None


def limited(name: str, total: int | None, limit: int | float) -> int | None:
    """How many of ``total`` batches are used under ``limit`` (a count, or a fraction up to 1.0); None for all of unknown.

    Raises:
        ValueError: a fraction of a length that is not known, or one so small that no batch is left.
    """
    if isinstance(limit, int):
        return limit if total is None else min(limit, total)
    if limit == 1.0:
        return total
    if total is None:
        raise ValueError(f"{name}={limit!r} is a fraction, but the loader's length is not known; give a number of batches")
    batches = int(total * limit)
    if batches == 0 and limit > 0 and total > 0:
        raise ValueError(f"{name}={limit!r} of {total} batches is less than one; give at least {1 / total:.3g}")
    return batches


def batch_size(batch: Any) -> int:
    """The first dimension of the first tensor in ``batch``; 0 if there is none."""
    if (type(batch) is list or type(batch) is tuple) and batch and type(batch[0]) is Tensor:  # nearly all batches are like this
        shape = batch[0].shape
        if shape:
            return shape[0]
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, (list, tuple)):
        parts: Any = batch
    elif isinstance(batch, Mapping):
        parts = batch.values()
    elif dataclasses.is_dataclass(batch):
        parts = vars(batch).values()
    else:
        return 0
    for part in parts:
        if isinstance(part, Tensor) and not part.dim():  # a weight or a temperature says nothing about the batch
            continue
        if size := batch_size(part):
            return size
    return 0


def move(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """``batch`` with every tensor inside it on ``device``, floating-point ones as ``dtype`` if it is given.

    Lists, tuples, named tuples, mappings and dataclasses are gone through; an object with a ``to`` method is asked.
    """

    def moved(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device, dtype if part.is_floating_point() else None, non_blocking=True)
        return part.to(device)

    return map_batch(moved, batch)


def map_batch(change: Callable[[Any], Any], batch: Any) -> Any:
    """``batch`` with ``change(part)`` in the place of every tensor inside it, and of every object with a ``to`` method.

    Lists, tuples, named tuples, mappings and dataclasses are gone through; anything else stays.
    """
    if isinstance(batch, Tensor) or hasattr(batch, "to"):  # before the containers, which a packed sequence or an encoding is too
        return change(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_batch(change, part) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)([map_batch(change, part) for part in batch])
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)
        for key, part in batch.items():
            changed[key] = map_batch(change, part)
        return changed
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        clone = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(clone, field.name, map_batch(change, getattr(batch, field.name)))  # frozen ones too
        return clone
    return batch
