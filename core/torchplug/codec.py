"""What a checkpoint can hold: nested values as JSON with the tensors put aside, and back."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import json
import os
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["DTYPES", "CheckpointError", "Encoder", "decode", "plain"]

PLAIN = (str, int, float, bool, type(None))
LAZY = "it has no values yet; call the module once before training, so that lazy layers know their size"
DTYPES = {  # the names of safetensors; older torch lacks some
    name: getattr(torch, dtype)
    for name, dtype in {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64",
        "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
    }.items()
    if hasattr(torch, dtype)
}  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names the file, the entry, and what is wrong."""


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


# ---------------------------------------------------------------------- hyperparameters


def plain(value: Any, path: str) -> Any:
    """Hyperparameters as values that a checkpoint and a logger can hold.

    Paths, dtypes and devices become text, an enum its value, dates and times ISO text, a timedelta seconds, NumPy values
    numbers and lists, a Namespace or dataclass a dict, a set a sorted list. Nothing is left out.

    Args:
        value: what to convert; it is not changed.
        path: where it stands, for messages.

    Raises:
        CheckpointError: something that has no such form, by its path.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value, path)
    if type(value) in PLAIN or isinstance(value, Tensor):
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):  # before float and str, which some of them are too
        found = value.tolist()
        if type(found) is not type(value):  # a long double stays what it is
            return plain(found, path)
    elif isinstance(value, (int, float, str)):
        return next(base(value) for base in (int, float, str) if isinstance(value, base))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Namespace):
        return plain(vars(value), path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return _plain_items(value, path)
    if isinstance(value, (set, frozenset)):
        return _sorted([plain(part, f"{path}{{{part!r}}}") for part in value])
    if isinstance(value, (list, tuple)):
        parts = [plain(part, f"{path}[{i}]") for i, part in enumerate(value)]
        return tuple(parts) if type(value) is tuple else parts
    raise CheckpointError(
        f"{path} cannot be saved: a {_kind(value)} has no plain form; leave it out with save_hyperparameters(ignore=[...]), or save "
        "what it is made from"
    )


def _plain_items(value: Mapping[Any, Any], path: str) -> dict[Any, Any]:
    items: dict[Any, Any] = {}
    for key, part in value.items():
        name = plain(key, f"the key {key!r} of {path}")
        if type(name) not in (str, int) or name in items:
            wrong = "stands for two of its keys" if name in items else f"is a {_kind(key)}"
            raise CheckpointError(f"{path} cannot be saved: {name!r} {wrong}; keys must be different texts or whole numbers")
        items[name] = plain(part, f"{path}.{name}")
    return items


def _sorted(values: list[Any]) -> list[Any]:
    """In an order that is the same in every process, whatever the types."""
    return sorted(values, key=lambda value: (isinstance(value, str), value) if isinstance(value, (int, float, str)) else (2, repr(value)))


# ---------------------------------------------------------------------- values and tensors


class Encoder:
    """Nested values to JSON; tensors are put aside under their path, the same one twice only once.

    Attributes:
        tensors: the tensors by name, contiguous and on the CPU.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[tuple[Any, ...], str] = {}
        self._path = ""  # where it is

    def text(self, state: Mapping[str, Any]) -> str:
        """The JSON of ``state``.

        Raises:
            CheckpointError: a value that has no safe form, by its path.
        """
        try:
            return json.dumps(self._encode(dict(state), ""))
        except RecursionError:
            raise CheckpointError(f"{self._path[:80]}... cannot be saved: it contains itself, or is nested too deeply") from None

    def _encode(self, value: Any, path: str) -> Any:
        self._path = path
        if isinstance(value, Tensor):
            return {"$tensor": self._tensor(value, path)}
        if type(value) in PLAIN:
            return value
        if type(value) is list:
            return [self._encode(part, f"{path}[{i}]") for i, part in enumerate(value)]
        if type(value) in (tuple, torch.Size):
            return {"$tuple": [self._encode(part, f"{path}[{i}]") for i, part in enumerate(value)]}
        if type(value) is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if type(value) is Counter:
            return {"$counter": self._items(value, path)}
        if type(value) in (dict, OrderedDict):
            items = self._items(value, path)
            if all(type(key) is str and not key.startswith("$") for key in value):
                return dict(items)
            return {"$items": items}
        raise CheckpointError(f"{path} cannot be saved: {_kind(value)} is not a plain value or tensor; {_advice(value)}")

    def _items(self, value: Mapping[Any, Any], path: str) -> list[list[Any]]:
        for key in value:
            if type(key) not in (str, int):
                raise CheckpointError(f"{path} cannot be saved: its key {key!r} is a {_kind(key)}; keys must be texts or whole numbers")
        return [[key, self._encode(part, f"{path}.{key}" if path else str(key))] for key, part in value.items()]

    def _tensor(self, tensor: Tensor, path: str) -> str:
        lazy = is_lazy(tensor)
        tensor = tensor if lazy else tensor.detach()
        reason = LAZY if lazy else _unfit(tensor)
        if reason:
            raise CheckpointError(f"{path} cannot be saved: {reason}")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg())
        if tensor.numel() and key in self._known:
            return self._known[key]
        name = path.encode("utf-8", "backslashreplace").decode()
        while name in self.tensors or name == "__metadata__":  # two places may read the same, and one name is the format's own
            name += "'"
        self._known[key] = name
        self.tensors[name] = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        return name


def _unfit(tensor: Tensor) -> str:
    """Why a tensor cannot be saved, empty if it can."""
    if type(tensor) is not Tensor:
        return f"it is a {_kind(tensor)}, a tensor with a class of its own; save value.as_subclass(torch.Tensor), or its parts"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"it is a tensor of layout {tensor.layout}; save its indices and values, or value.to_dense()"
    if tensor.device.type == "meta":
        return "it is a tensor on the meta device, which has no values"
    if tensor.dtype not in DTYPES.values():
        return f"it is a tensor of type {tensor.dtype}; save it as one of another type"
    return ""


def _advice(value: Any) -> str:
    """What to do about a value that cannot be saved."""
    if type(value).__module__ == "numpy":
        return "save value.tolist(), or torch.as_tensor(value)"
    if isinstance(value, Mapping):
        return "save dict(value)"
    if isinstance(value, (set, frozenset)):
        return "save sorted(value)"
    if isinstance(value, (int, float, str, tuple, list)):
        return f"save {next(base.__name__ for base in (int, float, str, tuple, list) if isinstance(value, base))}(value)"
    return "save what it is made from (numbers, texts, bytes, None, lists, tuples, dicts, tensors), and make it anew when loading"


def decode(value: Any, tensors: Mapping[str, Any]) -> Any:
    """What `Encoder.text` made JSON of, the tensors taken from ``tensors``."""
    if isinstance(value, list):
        return [decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(decode(part, tensors) for part in value["$tuple"])
    if "$bytes" in value:
        return base64.b64decode(value["$bytes"])
    if "$counter" in value:
        return Counter({key: decode(part, tensors) for key, part in value["$counter"]})
    if "$items" in value:
        return {key: decode(part, tensors) for key, part in value["$items"]}
    return {key: decode(part, tensors) for key, part in value.items()}
