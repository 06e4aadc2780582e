"""The commands for checkpoint files: is it good, what is in it, and its weights for other programs."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from torchplug import checkpoint
from torchplug.checkpoint import CheckpointError, Entry, entries_in
from torchplug.files import replacing

__all__ = ["add_command"]

SUFFIXES = (".safetensors", ".pt")


def add_command(commands: Any) -> None:
    """Adds ``verify``, ``show`` and ``export`` to the subcommands of a parser."""
    verify = commands.add_parser(
        "verify",
        help="check that checkpoints are whole",
        description="Read checkpoints and compare all checksums. Exit code 0: all are good, 1: at least one is not.",
    )
    verify.add_argument("paths", nargs="+", metavar="FILE", type=Path, help="a checkpoint, or a folder for every *.safetensors in it")
    verify.set_defaults(run=_verify)

    show = commands.add_parser(
        "show",
        help="show what is in a checkpoint",
        description="Show position, run, versions, sizes, plugins and hyperparameters. Tensors are not read; verify does that.",
    )
    show.add_argument("path", metavar="FILE", type=Path, help="a checkpoint")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(run=_show)

    export = commands.add_parser(
        "export",
        help="write the weights in a checkpoint for other programs",
        description="Write the module's weights alone, under its own names: .safetensors for safetensors.torch.load_file, .pt for "
        "torch.load(weights_only=True).",
    )
    export.add_argument("path", metavar="CKPT", type=Path, help="a checkpoint")
    export.add_argument("target", metavar="OUT", type=Path, help="the file to write: its name ends in .safetensors or .pt")
    export.add_argument("--force", action="store_true", help="replace OUT if it is there")
    export.add_argument("--weights", metavar="NAME", help="those that this plugin keeps, such as ema (default: the module's own)")
    export.set_defaults(run=_export)


def _wrong(message: str, code: int) -> int:
    print(f"torchplug: {message}", file=sys.stderr)
    return code


# ---------------------------------------------------------------------- verify


def _verify(chosen: argparse.Namespace) -> int:
    """``torchplug verify``: a line for each file that is good, a line for each thing that is wrong."""
    good = True
    for path in chosen.paths:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            print(f"{path} is a folder without *.safetensors")
            good = False
        for file in files:
            problems = checkpoint.verify(file)
            print("\n".join(problems) if problems else f"{file}: good", flush=True)
            good = good and not problems
    return 0 if good else 1


# ---------------------------------------------------------------------- show


def _show(chosen: argparse.Namespace) -> int:
    """``torchplug show``: what a checkpoint holds besides the values of tensors."""
    try:
        facts = _facts(chosen.path)
    except CheckpointError as error:
        return _wrong(str(error), 1)
    if chosen.json:
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        print("\n".join(_lines(facts)))
    return 0


def _facts(path: Path) -> dict[str, Any]:
    state = checkpoint.header(path)
    parts: dict[str, Any] = {name: state.get(name) for name in ("module", "optimizers")}
    parts |= {f"plugin {name}": part for name, part in (state.get("plugins") or {}).items()}
    parts["the rest"] = {name: part for name, part in state.items() if name not in ("module", "optimizers", "plugins")}
    known: set[str] = set()  # tied tensors are there once
    sizes = {}
    for name, part in parts.items():
        entries = {entry.name: entry for entry in entries_in(part) if entry.name not in known}
        known |= entries.keys()
        sizes[name] = {"tensors": len(entries), "bytes": sum(entry.bytes for entry in entries.values())}
    names = ("kind", "format", "emergency", "position", "time", "run", "versions", "options", "hyperparameters")
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        **{name: _readable(state.get(name)) for name in names},
        "plugins": sorted(state.get("plugins") or {}),
        "sizes": {name: size for name, size in sizes.items() if size["tensors"]},
    }


def _readable(value: Any) -> Any:
    """As strict JSON has it: tensors by what they are, numbers that are not finite as text."""
    if isinstance(value, Entry):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): _readable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(part) for part in value]
    if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        return repr(value)
    return value


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    def line(name: str, text: str) -> str:
        return f"  {name:<16} {text}"

    def listed(values: Mapping[str, Any] | None) -> str:
        there = ((name, round(value, 1) if isinstance(value, float) else value) for name, value in (values or {}).items())
        return ", ".join(f"{name} {value}" for name, value in there if value != "") or "unknown"

    yield facts["path"]
    kinds = {"run": "the whole state of a run", "weights": "weights only, not enough to go on from"}
    yield line("kind", kinds.get(facts["kind"], "not the state of a run"))
    if facts["emergency"]:
        yield line("emergency", f"written after {facts['emergency']}")
    yield line("format", str(facts["format"]))
    yield line("position", listed(facts["position"]))
    yield line("written", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["time"])) if facts["time"] else "unknown")
    yield line("run", listed(facts["run"]))
    yield line("versions", listed(facts["versions"]))
    yield line("plugins", ", ".join(facts["plugins"]) or "none with a state")
    if facts["options"]:
        yield line("options", listed(facts["options"]))
    yield line("size", _size(facts["bytes"]))
    for name, size in facts["sizes"].items():
        yield line(f"  {name}", f"{_size(size['bytes'])} in {size['tensors']} tensor{'s' * (size['tensors'] != 1)}")
    yield line("hyperparameters", "" if facts["hyperparameters"] else "none").rstrip()
    for name, value in (facts["hyperparameters"] or {}).items():
        yield line(f"  {name}", json.dumps(value))


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


# ---------------------------------------------------------------------- export


def _export(chosen: argparse.Namespace) -> int:
    """``torchplug export``: the module's weights under its own names."""
    path, target = chosen.path, chosen.target
    if target.suffix not in SUFFIXES:
        return _wrong(f"{target} must end in {' or '.join(SUFFIXES)}, which says what is written", 2)
    if target.exists() and path.exists() and target.samefile(path):
        return _wrong(f"{target} is the checkpoint itself; choose another name", 2)
    if target.exists() and not chosen.force:
        return _wrong(f"{target} is there already; --force replaces it", 2)
    try:
        weights = _weights(path, chosen.weights, only_tensors=target.suffix == ".safetensors")
        with replacing(target) as temporary:
            _write(weights, temporary, target.suffix)
    except CheckpointError as error:
        return _wrong(str(error), 1)
    except OSError as error:
        return _wrong(f"{target} cannot be written: {error.strerror or error}", 1)
    print(f"{target}: {len(weights)} entries, {_size(target.stat().st_size)}")
    return 0


def _write(weights: dict[str, Any], path: Path, suffix: str) -> None:
    """Writes a state dict; what the system has against it comes as the OSError that it is."""
    if suffix == ".pt":
        with open(path, "wb") as file:
            try:
                torch.save(weights, file)
            except RuntimeError as error:
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        return
    path.touch()
    mode = path.stat().st_mode  # the library makes a file that nobody else may read
    try:
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    path.chmod(mode)


def _weights(path: Path, name: str | None, only_tensors: bool) -> dict[str, Any]:
    """The module's state dict; tied tensors are copies of each other where only tensors are possible, because one has one name then."""
    weights = checkpoint.weights(path, name)
    if not only_tensors:
        return weights
    known: set[int] = set()
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}, and a safetensors file holds tensors alone; export to .pt")
        if id(value) in known:
            weights[name] = value.clone()
        known.add(id(value))
    return weights
