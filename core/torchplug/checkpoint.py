"""The state of a run as one safetensors file: write it, verify it, load it. No pickle anywhere.

Tensors lie under their path in the state (``module.l1.weight``), everything else as JSON in the file's metadata,
with a CRC-32 for each tensor and one for the JSON. Any safetensors reader opens the file.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import datetime
import enum
import errno
import json
import os
import zlib
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

__all__ = ["CheckpointError", "load", "plain", "verify", "write"]

FORMAT = 1
PLAIN = (str, int, float, bool, type(None))


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names the file, the entry, and what is wrong."""


# ---------------------------------------------------------------------- values


def plain(value: Any, path: str) -> Any:
    """Hyperparameters as values that a checkpoint and a logger can hold; what has no plain form is refused by its path."""
    if isinstance(value, enum.Enum):
        return plain(value.value, path)
    if type(value) in PLAIN or isinstance(value, Tensor):
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):  # before float and str, which some of them are too
        return value.tolist()
    for base in (int, float, str):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Namespace):
        return plain(vars(value), path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(part, f"{path}.{key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [plain(part, f"{path}[{i}]") for i, part in enumerate(value)]
        return tuple(parts) if type(value) is tuple else parts
    raise CheckpointError(
        f"{path} cannot be saved: a {type(value).__module__}.{type(value).__qualname__} has no plain form; leave it out with "
        "save_hyperparameters(ignore=[...]), or save what it is made from"
    )


# ---------------------------------------------------------------------- codec


class _Encoder:
    """Nested values to JSON; tensors are put aside under their path, the same one twice only once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return {"$tensor": self._tensor(value.detach(), path)}
        if type(value) in PLAIN:
            return value
        if type(value) is list:
            return [self.encode(part, f"{path}[{i}]") for i, part in enumerate(value)]
        if type(value) is tuple:
            return {"$tuple": [self.encode(part, f"{path}[{i}]") for i, part in enumerate(value)]}
        if type(value) is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            if all(type(key) is str and not key.startswith("$") for key in value):
                return {key: self.encode(part, f"{path}.{key}" if path else key) for key, part in value.items()}
            return {"$items": [[key, self.encode(part, f"{path}.{key}")] for key, part in value.items()]}
        raise CheckpointError(f"{path} cannot be saved: {type(value).__module__}.{type(value).__qualname__} is not a plain value or tensor")

    def _tensor(self, tensor: Tensor, path: str) -> str:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in self._known:
            return self._known[key]
        while path in self.tensors or path == "__metadata__":  # two places may read the same, and one name is the format's own
            path += "'"
        self._known[key] = path
        self.tensors[path] = tensor.cpu().contiguous()
        return path


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_decode(part, tensors) for part in value["$tuple"])
    if "$bytes" in value:
        return base64.b64decode(value["$bytes"])
    if "$items" in value:
        return {key: _decode(part, tensors) for key, part in value["$items"]}
    return {key: _decode(part, tensors) for key, part in value.items()}


def _crc(tensor: Tensor) -> int:
    """CRC-32 of a contiguous CPU tensor's bytes."""
    size = tensor.numel() * tensor.element_size()
    return zlib.crc32((ctypes.c_char * size).from_address(tensor.data_ptr())) if size else 0


# ---------------------------------------------------------------------- files


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Writes ``state``: to a temporary name beside ``path``, flushed to disk, then renamed; a failure leaves the old file.

    Raises:
        CheckpointError: a value that has no safe form (by its path), or a disk that is full.
        OSError: the folder cannot be written.
    """
    encoder = _Encoder()
    body = json.dumps(encoder.encode(dict(state), ""))
    specs = {
        name: TensorSpec(
            dtype=str(t.dtype).removeprefix("torch."), shape=list(t.shape), data_ptr=t.data_ptr(), data_len=t.numel() * t.element_size()
        )
        for name, t in encoder.tensors.items()
    }
    metadata = {
        "format": "pt",
        "torchplug_format": str(FORMAT),
        "torchplug": body,
        "torchplug_crc32": json.dumps({"json": zlib.crc32(body.encode()), **{f"t:{k}": _crc(t) for k, t in encoder.tensors.items()}}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        serialize_file(specs, temporary, metadata=metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CheckpointError(f"disk full while writing {path}; the checkpoint that was there before is unharmed") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: Path) -> tuple[Any, dict[str, Tensor], list[str]]:
    """The JSON body, the tensors, and what is wrong with them."""
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of torchplug, or is cut off: {error}") from error
    if "torchplug" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of torchplug")
    try:
        found, body = int(metadata["torchplug_format"]), metadata["torchplug"]
        sums = dict(json.loads(metadata["torchplug_crc32"]))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: the header is damaged ({error!r})") from error
    if found > FORMAT:
        raise CheckpointError(f"{path} has format {found}, this torchplug reads up to {FORMAT}; install a newer torchplug")
    problems = [] if sums.get("json") == zlib.crc32(body.encode()) else [f"{path}: the JSON part is damaged"]
    for name, tensor in tensors.items():
        if sums.get(f"t:{name}") != _crc(tensor.contiguous()):
            problems.append(f"{path}: entry {name} is damaged")
    return body, tensors, problems


def verify(path: str | Path) -> list[str]:
    """What is wrong with a checkpoint, line by line; empty when it is good."""
    try:
        body, tensors, problems = _read(Path(path))
        if not problems:
            _decode(json.loads(body), tensors)
        return problems
    except (CheckpointError, ValueError, KeyError) as error:
        return [str(error)]


def load(path: str | Path) -> dict[str, Any]:
    """The state in a checkpoint, its checksums compared.

    Raises:
        CheckpointError: missing, empty, cut off, damaged, foreign, or of a newer format.
    """
    body, tensors, problems = _read(Path(path))
    if problems:
        raise CheckpointError("; ".join(problems))
    state: dict[str, Any] = _decode(json.loads(body), tensors)
    return state
