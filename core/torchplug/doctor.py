"""``torchplug doctor``: versions, devices, and everything about the installed plugins that would stop a run."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torchplug
from torchplug.discovery import COMMANDS, SWITCH, Catalogue, Found, PluginError, bare, clash, scan
from torchplug.lock import FILE, Lock, differences
from torchplug.options import fields_of

__all__ = ["add_command"]

BACKENDS = ("gloo", "nccl", "mpi", "ucc")


def add_command(commands: Any) -> None:
    """Adds ``doctor`` to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="look for what is wrong with the installation",
        description="Show versions and devices, import every installed plugin, and say what is wrong: plugins that cannot be "
        "imported or are made for another version, names that two packages have, broken metadata, a lock that does not fit. "
        "Exit code 1 if there is something.",
    )
    parser.add_argument("--lock", metavar="FILE", help=f"the lock to compare with (default: {FILE} where it is there)")
    parser.set_defaults(run=_doctor)


def _doctor(chosen: argparse.Namespace) -> int:
    catalogue = Catalogue()
    problems: list[str] = []
    for name, value in _facts(problems):
        print(f"{name:<12} {value}")
    different = _different(catalogue, chosen.lock)
    wrong = {found: _wrong_with(found) for found in catalogue.found if found.name not in different}  # what is not trusted is not imported
    print(f"{'plugins':<12} {', '.join(found.name for found, why in wrong.items() if not why) or 'none'}")
    problems += [*_problems(catalogue), *filter(None, wrong.values()), *different.values()]
    for problem in problems:
        print(f"PROBLEM {problem}")
    if not problems:
        print("nothing is wrong")
    return 1 if problems else 0


def _facts(problems: list[str]) -> Iterator[tuple[str, str]]:
    """What a bug report should say, by name."""
    yield "torchplug", torchplug.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "pluggy", version("pluggy")
    yield "safetensors", version("safetensors")
    try:
        torch: Any = import_module("torch")
    except Exception as error:  # a library of a driver that is not there, for example
        problems.append(f"torch cannot be imported: {type(error).__name__}: {error}")
        return
    yield "torch", str(torch.__version__)
    yield "devices", ", ".join(_devices(torch))
    distributed = torch.distributed
    there = [name for name in BACKENDS if distributed.is_available() and getattr(distributed, f"is_{name}_available")()]
    yield "distributed", ", ".join(there) or "not in this build of torch"


def _devices(torch: Any) -> Iterator[str]:
    yield f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield f"cuda:{index} {torch.cuda.get_device_name(index)} ({memory:.0f} GiB)"
    if torch.backends.mps.is_available():
        yield "mps"


def _wrong_with(found: Found) -> str:
    """Why a plugin or a command cannot be used, empty if it can."""
    try:
        target = found.load()
        if isinstance(target, type):
            fields_of(target)
    except PluginError as error:
        return str(error)
    except Exception as error:
        return f"{found.label}: {type(error).__name__}: {error}"
    return ""


def _problems(catalogue: Catalogue) -> Iterator[str]:
    try:
        if bare():
            yield f"the environment variable {SWITCH}=none leaves every plugin out of every run"
    except PluginError as error:
        yield str(error)
    yield from catalogue.unreadable
    commands = scan(COMMANDS)[0]
    yield from filter(None, map(_wrong_with, commands))
    for what, listed in (("plugin", catalogue.found), ("the command", commands)):
        groups = (list(group) for _, group in groupby(listed, lambda each: each.name))
        yield from (clash(what, several) for several in groups if len(several) > 1)


def _different(catalogue: Catalogue, path: str | None) -> dict[str, str]:
    """What is not as the lock says, by plugin."""
    if path is None and not Path(FILE).exists():
        print(f"{'lock':<12} none; torchplug lock writes {FILE}")
        return {}
    try:
        found = differences(Lock.read(path or FILE), catalogue)
    except PluginError as error:
        found = {"": str(error)}
    print(f"{'lock':<12} {path or FILE}, {f'differences: {len(found)}' if found else 'as installed'}")
    return found
