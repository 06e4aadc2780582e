"""Writes what ``predict_step`` returns to files, batch by batch or at the end, one series of files for each rank."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from torchplug import Run, hookimpl

__all__ = ["PredictionWriter"]


@dataclass(kw_only=True, eq=False)
class PredictionWriter:
    """Writes predictions with the places that they belong to. With ``trainer.predict(..., return_predictions=False)`` and
    write_interval='batch' none of them stays in memory.

    A record is a dict of ``predictions`` (what predict_step returned, on the CPU), ``batch_idx``, ``dataloader_idx``, ``rank``
    and ``samples``: the numbers, from 0, that the samples of the batch have in the order of the loader; for an unshuffled one these
    are indices of the data set. A file of 'pt' holds one record, or with
    write_interval='epoch' the list of all. It has tensors, numbers, texts, None, lists, tuples and dicts alone, and loads with
    ``torch.load(path, weights_only=True)``. In a file of 'safetensors' each tensor or number of the predictions is a tensor under its
    path, such as ``predictions.logits`` or ``predictions.0``, and the rest of the record is JSON under ``record`` in the metadata;
    with write_interval='epoch' the number of the record comes first (``12.predictions.logits``), and ``record`` is a list.

    Args:
        dir: Folder to write to. None: the folder predictions in the directory of the run.
        write_interval: When to write: 'batch' after each batch, in files such as rank0-loader0-batch000012.pt; 'epoch' at the end,
            in one file such as rank0.pt, which keeps everything in memory until then.
        format: What to write: 'pt' (torch.save) or 'safetensors'.
        overwrite: Delete the predictions that are in the folder. False: they are an error.
    """

    dir: str | os.PathLike[str] | None = None
    write_interval: Literal["batch", "epoch"] = "batch"
    format: Literal["pt", "safetensors"] = "pt"
    overwrite: bool = False

    files: int = field(init=False, default=0)
    _folder: Path = field(init=False, default=Path(), repr=False)
    _samples: dict[int, int] = field(init=False, default_factory=dict, repr=False)  # of each loader, so far
    _kept: list[dict[str, Any]] = field(init=False, default_factory=list, repr=False)

    after = "*"  # the last word on what the outputs are
    observes = True  # an error of it ends the run all the same

    def __post_init__(self) -> None:
        if self.dir is not None and (not isinstance(self.dir, (str, os.PathLike)) or not str(self.dir)):
            raise TypeError(f"dir must be a folder or None, got {self.dir!r}")
        if self.write_interval not in ("batch", "epoch"):
            raise ValueError(f"write_interval must be 'batch' or 'epoch', got {self.write_interval!r}")
        if self.format not in ("pt", "safetensors"):
            raise ValueError(f"format must be 'pt' or 'safetensors', got {self.format!r}")
        if not isinstance(self.overwrite, bool):
            raise TypeError(f"overwrite must be True or False, got {self.overwrite!r}")

    # ------------------------------------------------------------------ hooks

    @hookimpl
    def on_predict_start(self, run: Run) -> None:
        self.files, self._samples, self._kept = 0, {}, []
        trial = run.options.fast_dev_run  # which leaves nothing behind, and deletes nothing
        self._folder = run.dir / "predictions" if self.dir is None or trial else Path(self.dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        own = r"rank\d+(-loader\d+-batch\d+)?\.(pt|safetensors)"
        paths, ranks = list(self._folder.iterdir()), max(run.world_size, run.rank + 1)
        paths = [path for path in paths if (rank := re.match(r"\.?rank(\d+)", path.name)) and int(rank[1]) % ranks == run.rank]
        earlier = [path for path in paths if re.fullmatch(own, path.name)]
        if earlier and not self.overwrite:
            raise FileExistsError(f"{self._folder} holds predictions already; give another dir, or overwrite=True to delete them")
        left = [path for path in paths if re.fullmatch(rf"\.{own}\.\d+\.tmp", path.name)]  # by a process that was killed
        for path in (*earlier, *left):
            path.unlink(missing_ok=True)

    @hookimpl
    def on_predict_batch_end(self, run: Run, outputs: Any, batch_idx: int, dataloader_idx: int) -> None:
        seen, size = self._samples.get(dataloader_idx, 0), run.metrics.size
        self._samples[dataloader_idx] = seen + size
        first = seen if run.world_size == 1 else _first(run, batch_idx, dataloader_idx, seen)
        record = {
            "predictions": _plain(outputs, "predictions"),
            "batch_idx": batch_idx,
            "dataloader_idx": dataloader_idx,
            "rank": run.rank,
            "samples": None if first is None else list(range(first, first + size)),
        }
        if self.write_interval == "epoch":
            self._kept.append(record)
        else:
            self._write(f"rank{run.rank}-loader{dataloader_idx}-batch{batch_idx:06}", record)

    @hookimpl
    def on_predict_end(self, run: Run) -> None:
        if self.write_interval == "epoch":
            kept, self._kept = self._kept, []
            self._write(f"rank{run.rank}", kept)
        files = self.files if run.agreement is None else sum(run.agreement.gather(self.files))
        run.report[run.name_of(self)] = f"{files} file{'s' * (files != 1)} with predictions in {self._folder}"

    @hookimpl
    def teardown(self) -> None:
        self._kept = []

    # ------------------------------------------------------------------ files

    def _write(self, name: str, record: Any) -> None:
        """A file that is whole or not there."""
        path = self._folder / f"{name}.{self.format}"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            if self.format == "pt":
                torch.save(record, temporary)
            else:
                _save_tensors(record, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self.files += 1


def _first(run: Run, batch_idx: int, dataloader_idx: int, seen: int) -> int | None:
    """The number of a batch's first sample where batches are dealt out to ranks in turn; None where their sizes are not known."""
    loader = run.loaders["predict"][dataloader_idx]
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):  # each rank has data of its own
        return seen
    size = getattr(loader, "batch_size", None)
    return None if size is None else (batch_idx * run.world_size + run.rank) * int(size)


def _save_tensors(record: Any, path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    records = [_separated(each, f"{number}.", tensors) for number, each in enumerate(record)] if isinstance(record, list) else None
    rest = records if records is not None else _separated(record, "", tensors)
    save_file(tensors, path, {"record": json.dumps(rest)})


def _separated(record: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Puts the predictions of a record into ``tensors``; what is left of it."""
    _flatten(record["predictions"], f"{prefix}predictions", tensors)
    return {name: value for name, value in record.items() if name != "predictions"}


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, (list, tuple, dict)):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            _flatten(part, f"{path}.{name}", tensors)
    elif isinstance(value, (bool, int, float, complex)) or (isinstance(value, Tensor) and value.layout is torch.strided):
        if path in tensors:
            raise ValueError(f"{path} stands for two predictions; rename a key, or write format='pt'")
        tensors[path] = value.contiguous() if isinstance(value, Tensor) else torch.tensor(value)
    else:
        raise TypeError(f"{path} is a {type(value).__name__}, which safetensors cannot hold; write format='pt', or return tensors")


def _plain(value: Any, path: str) -> Any:
    """``value`` in types that load with weights_only=True: tensors on the CPU that share nothing with the run.

    Raises:
        TypeError: something that has no such form, by its path.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
        tensor = tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)
        # a copy is needed of what stays on the CPU: it may be changed later, or be a small part of a large storage
        if tensor.device.type != "cpu":
            return tensor.cpu()
        return tensor.clone(memory_format=torch.contiguous_format) if tensor.layout is torch.strided else tensor.clone()
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        array, value = value, value if value.ndim else value.tolist()
        if array.ndim:
            with suppress(TypeError):  # torch has no tensors of such values
                return torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))  # a copy
    if value is None or type(value) in (bool, int, float, complex, str):
        return value
    if isinstance(value, Mapping):
        return {_plain(name, f"the key {name!r} of {path}"): _plain(part, f"{path}.{name}") for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_plain(part, f"{path}.{number}") for number, part in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    raise TypeError(
        f"{path} is a {type(value).__name__}, which is not written; return tensors, numbers, texts, and lists, tuples and dicts of them"
    )
