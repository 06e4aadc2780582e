"""Where everything lies in a checkpoint file: the header of a safetensors file, written and read.

A safetensors file is the length of its header (8 bytes, the lowest first), the header as JSON, and the bytes of the tensors.
This is done here and not by the safetensors library: that writes under a temporary name that nobody can tell from others after
a crash, and reads by mapping the file, so that what was verified may change afterwards.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from torchplug.codec import DTYPES, CheckpointError

__all__ = ["FORMAT", "WRONG", "Entry", "Layout", "place", "put_header", "read_header"]

FORMAT = 2
LONGEST = 100_000_000  # bytes of a header that readers of safetensors accept
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRONG = (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError)  # what reading damaged values raises


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, without its values.

    Args:
        name: its path in the state.
        dtype: the type of its values.
        shape: its size along each axis.
        begin: where its bytes begin, counted from the end of the header.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def seed(self, number: int) -> int:
        """What its CRC-32 begins with in a file of format ``number``: type and shape, from 2 on."""
        return 0 if number == 1 else zlib.crc32(f"{NAMES[self.dtype]} {list(self.shape)}".encode())


@dataclass(frozen=True)
class Layout:
    """What stands in front of the tensors of a checkpoint.

    Args:
        format: the number of its format.
        body: the JSON of all that is not in tensors.
        sums: the CRC-32 of each tensor that should be there.
        entries: the tensors that are there.
        start: where the tensors begin in the file.
        problems: what is wrong with it.
    """

    format: int
    body: str
    sums: dict[str, int]
    entries: dict[str, Entry]
    start: int
    problems: list[str]


def place(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Where tensors lie, one right behind the other, each at a multiple of its element size."""
    entries, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        entries[name] = Entry(name, tensor.dtype, tuple(tensor.shape), end)
        end += entries[name].bytes
    return entries


def put_header(body: str, sums: Mapping[str, int], entries: Mapping[str, Entry], multiple: int = 8) -> bytes:
    """The header of a checkpoint of the newest format, filled up with blanks so that its length is a multiple.

    Raises:
        CheckpointError: it would be longer than readers accept.
    """
    checks = {"json": _body_sum(FORMAT, body), **{f"t:{name}": value for name, value in sums.items()}}
    metadata = {"format": "pt", "torchplug_format": str(FORMAT), "torchplug": body, "torchplug_crc32": json.dumps(checks)}
    named = {
        each.name: {"dtype": NAMES[each.dtype], "shape": each.shape, "data_offsets": [each.begin, each.begin + each.bytes]}
        for each in entries.values()
    }
    text = json.dumps({"__metadata__": metadata, **named}).encode()
    if len(text) > LONGEST:
        raise CheckpointError(
            f"all that is not in tensors takes {len(text) / 1e6:.0f} MB, more than the {LONGEST / 1e6:.0f} MB that a safetensors file "
            "may have; keep long lists of numbers as tensors"
        )
    text += b" " * (-(8 + len(text)) % multiple)
    return len(text).to_bytes(8, "little") + text


def read_header(file: BinaryIO, path: Path) -> Layout:
    """Reads what stands in front of the tensors.

    Raises:
        CheckpointError: empty, cut off, foreign, of a newer format, or damaged so that nothing can be read.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise CheckpointError(f"{path} is empty")
    first = file.read(9)
    start = 8 + int.from_bytes(first[:8], "little")
    if start > LONGEST + 8 or (size > 8 and first[8:] != b"{"):
        raise CheckpointError(f"{path} is not a checkpoint of torchplug{_foreign(first)}")
    if size < start:
        raise CheckpointError(f"{path} is cut off: it has {size} of at least {start} bytes")
    try:
        parts = json.loads(first[8:] + file.read(start - 9))
        metadata = parts.pop("__metadata__", {})
        if "torchplug" not in metadata and "torchplug_format" not in metadata:
            raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of torchplug")
        number = int(metadata["torchplug_format"])
        if number > FORMAT:
            raise CheckpointError(f"{path} has format {number}, this torchplug reads up to {FORMAT}; install a newer torchplug")
        if number < 1:
            raise ValueError(f"format {number}")
        body, checks = metadata["torchplug"], json.loads(metadata["torchplug_crc32"])
        sound = checks.pop("json") == _body_sum(number, body)
        sums = {name.removeprefix("t:"): int(value) for name, value in checks.items()}
        entries = _entries(parts)
    except WRONG as error:
        raise CheckpointError(f"{path}: the header is damaged ({error or type(error).__name__})") from error
    end = start + max((each.begin + each.bytes for each in entries.values()), default=0)
    if size < end:
        raise CheckpointError(f"{path} is cut off: it has {size} of {end} bytes")
    problems = [f"{path}: {size - end} bytes at its end do not belong to it"] * (size > end)
    problems += [f"{path}: the JSON part is damaged"] * (not sound)
    problems += [f"{path}: entry {name} is missing" for name in sums if name not in entries]
    problems += [f"{path}: entry {name} does not belong to it" for name in entries if name not in sums]
    return Layout(number, body, sums, entries, start, problems)


def _entries(parts: dict[str, Any]) -> dict[str, Entry]:
    """The tensors in the order in which they lie in the file; there is nothing between them."""
    entries, end = {}, 0
    for name, part in sorted(parts.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, stop = part["data_offsets"]
        shape = tuple(int(length) for length in part["shape"])
        if part["dtype"] not in DTYPES or min(shape, default=0) < 0:
            raise ValueError(f"entry {name} has type {part['dtype']!r} and shape {shape}")
        entries[name] = Entry(name, DTYPES[part["dtype"]], shape, int(begin))
        if begin != end or stop != end + entries[name].bytes:
            raise ValueError(f"entry {name} has a wrong place or size")
        end = stop
    return entries


def _foreign(first: bytes) -> str:
    """What another program's file may be, by its first bytes."""
    if first.startswith(b"PK") or re.match(rb"\x80[\x00-\x05]", first):
        return ": it is a pickle, as torch.save writes them, and torchplug never unpickles"
    return ", or its first bytes are damaged"


def _body_sum(number: int, body: str) -> int:
    return zlib.crc32((body if number == 1 else f"{number} {body}").encode("utf-8", "surrogatepass"))
