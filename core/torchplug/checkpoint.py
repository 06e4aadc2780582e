"""The state of a run as one safetensors file: write it, verify it, load it. No pickle anywhere.

Tensors lie under their path in the state (``module.l1.weight``), everything else as JSON in the file's metadata. Each tensor
has a CRC-32 over its type, shape and bytes, and the JSON has one that covers the number of the format. Any safetensors reader
opens the file.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import threading
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from torchplug import sharded
from torchplug.codec import CheckpointError, Encoder, decode, plain
from torchplug.files import remove, replacing, sweep
from torchplug.layout import FORMAT, WRONG, Entry, Layout, place, put_header, read_header
from torchplug.outflow import BLOCK, Outflow

__all__ = [
    "CheckpointError",
    "Entry",
    "entries_in",
    "header",
    "load",
    "plain",
    "remove",
    "replacing",
    "sweep",
    "verify",
    "weights",
    "write",
]

CHUNK = 1 << 20  # bytes that are read and summed up while they are in the processor's cache
SUM = (1 << 32) - 1  # no checksum has more digits
FEW = 1 << 20  # bytes that are not worth a thread


def write(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes ``state``: to a temporary name beside ``path``, flushed to disk, then renamed; a failure leaves the old file.

    May be called from any thread, while nobody changes the tensors.

    Raises:
        CheckpointError: a value that has no safe form (by its path), or a disk that is full.
        OSError: the folder cannot be written.
    """
    encoder = Encoder()
    body, tensors = encoder.text(state), encoder.tensors
    entries = place(tensors)
    longest = put_header(body, dict.fromkeys(tensors, SUM), entries, BLOCK)
    with replacing(Path(path)) as temporary, Outflow(temporary, len(longest)) as out:
        sums = {name: out.write(tensors[name], entry.seed(FORMAT)) for name, entry in entries.items()}
        out.finish(put_header(body, sums, entries, len(longest)))


def load(path: str | Path, parts: Collection[str] | None = None) -> dict[str, Any]:
    """The state in a checkpoint, its checksums compared, in the layout of the newest format.

    Args:
        path: the file, or the folder that ranks wrote together.
        parts: which parts of the state are wanted, such as "module"; the tensors of others are not read. None: all.

    Raises:
        CheckpointError: missing, empty, cut off, damaged, foreign, of a newer format, or without one of ``parts``.
    """
    path = Path(path)
    if sharded.is_sharded(path):
        number, state, files = sharded.state_in(path)
        state, tensors = _wanted(path, _newest(path, number, state), parts)
        _raise(sharded.problems(path, files))
        sharded.read(path, tensors)
    else:
        with _opened(path) as file:
            found = read_header(file, path)
            _raise(found.problems)
            state, tensors = _wanted(path, _state(path, found), parts)
            _raise(_read_tensors(file, path, found, {each.name: each for each in entries_in(state)}.values(), tensors))
    whole: dict[str, Any] = _filled(state, tensors)
    return whole


def _wanted(path: Path, state: dict[str, Any], parts: Collection[str] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The parts of a state that are wanted, and memory for the tensors in them."""
    if parts is not None:
        _raise([f"{path} holds no {name}" for name in parts if name not in state])
        state = {name: state[name] for name in parts}
    try:
        return state, {each.name: torch.empty(each.shape, dtype=each.dtype, device="cpu") for each in entries_in(state)}
    except (RuntimeError, TypeError, ValueError) as error:  # no memory, or a size that no tensor can have
        raise CheckpointError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error


def weights(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """The module's state dict in a checkpoint.

    Args:
        path: the file.
        name: a plugin that keeps weights besides the module's own (``weights`` in its state, by the module's names), such as an average:
            they take the place of the module's. None: the module's own.

    Raises:
        CheckpointError: as with `load`; or there is no such plugin in it, or it keeps no weights; those that do are named.
    """
    if name is None:
        module = load(path, parts=["module"])["module"]
    else:
        state = load(path, parts=["module", "plugins"])
        module, plugins = state["module"], state["plugins"]
        having = [each for each, kept in plugins.items() if isinstance(kept, dict) and isinstance(kept.get("weights"), dict)]
        if name not in having:
            raise CheckpointError(f"{path} holds no weights of {name!r}; there are those of {', '.join(having) or 'the module alone'}")
        kept = plugins[name]["weights"]
        module = {key: kept[key].to(value.dtype) if key in kept else value for key, value in module.items()}
    if not isinstance(module, dict):
        raise CheckpointError(f"{path} holds no module")
    return module


def verify(path: str | Path) -> list[str]:
    """What is wrong with a checkpoint, line by line; empty when it is good."""
    path = Path(path)
    try:
        if sharded.is_sharded(path):
            number, state, files = sharded.state_in(path)
            _newest(path, number, state)
            return sharded.problems(path, files)
        with _opened(path) as file:
            found = read_header(file, path)
            problems = found.problems + _read_tensors(file, path, found, found.entries.values())
        if not problems:
            _state(path, found)
        return problems
    except CheckpointError as error:
        return [str(error)]


def header(path: str | Path) -> dict[str, Any]:
    """What `load` gives, with an `Entry` in the place of each tensor, and ``"format"``: the number of the file's own format.

    No tensor is read or verified, the rest is: this takes milliseconds for a file of any size.

    Raises:
        CheckpointError: as with `load`.
    """
    path = Path(path)
    if sharded.is_sharded(path):
        number, state, _ = sharded.state_in(path)
        return {"format": number, **_newest(path, number, state)}
    with _opened(path) as file:
        found = read_header(file, path)
    _raise(found.problems)
    return {"format": found.format, **_state(path, found)}


def entries_in(value: Any) -> Iterator[Entry]:
    """The tensors in what `header` gave, or in a part of it; tied ones several times."""
    if isinstance(value, Entry):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from entries_in(part)


# ---------------------------------------------------------------------- reading


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, if it is one that can be read."""
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            raise CheckpointError(f"{path} is {'a folder; name a file in it' if stat.S_ISDIR(kind) else 'not a file'}")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _raise(problems: list[str]) -> None:
    if problems:
        raise CheckpointError("; ".join(problems))


def _read_tensors(
    file: BinaryIO, path: Path, found: Layout, entries: Collection[Entry], into: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Reads tensors, to where they shall be if that is said; returns what is wrong with them."""
    damaged, turn = set(), threading.Lock()

    def read(entry: Entry) -> None:
        begin, left, total = found.start + entry.begin, entry.bytes, entry.seed(found.format)
        target = memoryview(bytearray(min(left, CHUNK))) if into is None else _view(into[entry.name])
        while left:
            part = target[: min(left, CHUNK)]
            count = _read_at(file, part, begin, turn)
            total = zlib.crc32(part[:count], total)
            begin, left, target = begin + count, left - count, target if into is None else target[count:]
        if total != found.sums.get(entry.name, total):
            damaged.add(entry.name)

    _in_threads(read, sorted(entries, key=lambda entry: entry.begin))
    return [f"{path}: entry {name} is damaged" for name in found.entries if name in damaged]


def _read_at(file: BinaryIO, part: memoryview, begin: int, turn: threading.Lock) -> int:
    """Reads into ``part`` from the place ``begin`` of the file; how many bytes."""
    if hasattr(os, "preadv"):
        count = os.preadv(file.fileno(), [part], begin)
    else:
        with turn:
            file.seek(begin)
            count = file.readinto(part)  # type: ignore[attr-defined]
    if not count:
        raise OSError(errno.EIO, "it became shorter while it was read")
    return count


def _state(path: Path, found: Layout) -> dict[str, Any]:
    """The state in the layout of the newest format, with an `Entry` in the place of each tensor."""
    try:
        state: dict[str, Any] = dict(decode(json.loads(found.body), found.entries))
    except WRONG as error:
        raise CheckpointError(f"{path} does not hold what a checkpoint of format {found.format} holds ({error!r})") from error
    return _newest(path, found.format, state)


def _newest(path: Path, number: int, state: dict[str, Any]) -> dict[str, Any]:
    """A state of format ``number`` in the layout of the newest one."""
    try:
        for older in range(number, FORMAT):
            state = MIGRATIONS[older](state)
    except WRONG as error:
        raise CheckpointError(f"{path} does not hold what a checkpoint of format {number} holds ({error!r})") from error
    return state


def _filled(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """``value`` with tensors in the place of entries."""
    if isinstance(value, Entry):
        return tensors[value.name]
    if isinstance(value, dict):
        return type(value)({key: _filled(part, tensors) for key, part in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(part, tensors) for part in value)
    return value


# ---------------------------------------------------------------------- older formats


def _from_1(state: dict[str, Any]) -> dict[str, Any]:
    """Format 1 did not know classes, the place in the data, sums of metrics, nor what plugins need to go on from there.

    Weights, hyperparameters, position, optimizers and schedulers are whole.
    """
    steps = zip(state["optimizers"], state["optimizer_steps"], strict=True)
    return {
        "time": 0.0,  # nobody knows
        "kind": "run",
        "emergency": "",
        "versions": state["versions"],
        "run": {**state["run"], "dir": "", "seconds": 0.0},
        "position": state["position"],
        "module": state["module"],
        "hyperparameters": state["hyperparameters"],
        "hyperparameters_argument": state["hyperparameters_argument"],
        "loop": {"validated": False},
        "optimizers": [{"class": None, "steps": count, "state": each} for each, count in steps],
        "schedulers": [{"class": None, "seen": each["seen"], "state": each["scheduler"]} for each in state["schedulers"]],
        "scaler": None,
        "generators": state["generators"],
        "data": None,
        "metrics": {},
        "plugins": {},
        "options": state["options"],
    }


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}  # each to the next number


# ---------------------------------------------------------------------- bytes and threads


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which must outlive what is returned."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


def _in_threads(work: Callable[[Entry], None], entries: Collection[Entry]) -> None:
    """``work`` for each entry, in as many threads as there are processors if it is enough for that."""
    waiting, failed = deque(entries), deque[BaseException]()

    def go() -> None:
        while not failed:
            try:
                entry = waiting.popleft()
            except IndexError:
                return
            try:
                work(entry)
            except BaseException as error:
                failed.append(error)

    count = min(len(waiting), os.cpu_count() or 1, 16) if sum(entry.bytes for entry in waiting) > FEW else 1
    threads = [threading.Thread(target=go, name="torchplug checkpoint") for _ in range(count - 1)]  # an executor takes no work at exit
    for thread in threads:
        thread.start()
    try:
        go()
    finally:
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
