"""The command line: each command is a module, imported when it is asked for, or comes from another package by entry point."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

from torchplug.discovery import COMMANDS, Found, PluginError, load, scan

__all__ = ["main"]

# command -> the module whose add_command adds it, and what it is for
OWN = {
    "plugins": ("listing", "list the installed plugins"),
    "explain": ("explaining", "explain a Trainer argument, or the order in which plugins are called"),
    "doctor": ("doctor", "look for what is wrong with the installation"),
    "lock": ("lock", "write down which plugins are trusted, for Trainer(lock=...)"),
    "new": ("new", "write a new plugin package"),
    "verify": ("checkpoint_cli", "check that checkpoints are whole"),
    "show": ("checkpoint_cli", "show what is in a checkpoint"),
    "export": ("checkpoint_cli", "write the weights in a checkpoint for other programs"),
    "replay": ("replay", "send a run's journal to a logger"),
}
ELSEWHERE = dict.fromkeys(("fit", "validate", "test", "predict", "tune", "schema"), "torchplug-cli")  # known, and not in this package


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``torchplug ARGUMENTS``; returns the exit code (2 for a mistake in the arguments, which is said in one line)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else ""
    try:
        if name in OWN:
            return _run(name, words)
        brought = {each.name: each for each in scan(COMMANDS)[0]}
        if name in brought:
            code: int = load(brought[name].value)(words[1:])
            return code
        if name in ("", "-h", "--help"):
            _show(brought)
            return 0 if name else 2
        raise PluginError(_unknown(name, brought))
    except PluginError as error:
        print(f"torchplug: {error}", file=sys.stderr)
        return 2


def _run(name: str, words: list[str]) -> int:
    """One of core's own commands."""
    parser = argparse.ArgumentParser(prog="torchplug")
    module, _ = OWN[name]
    importlib.import_module(f"torchplug.{module}").add_command(parser.add_subparsers(dest="command"))
    chosen = parser.parse_args(words)
    code: int = chosen.run(chosen)
    return code


def _unknown(name: str, brought: Mapping[str, Found]) -> str:
    if name in ELSEWHERE:
        return f"the command {name!r} comes with {ELSEWHERE[name]}: pip install {ELSEWHERE[name]}"
    from torchplug.options import closest

    return f"the command {name!r} is not there" + closest(name, [*OWN, *brought, *ELSEWHERE])


def _show(brought: Mapping[str, Found]) -> None:
    print("usage: torchplug COMMAND ...\n\nPlugins, options, checkpoints and runs of torchplug.\n")
    lines = {name: text for name, (_, text) in OWN.items()}
    lines |= {name: f"from {found.distribution} {found.version}" for name, found in brought.items()}
    for name, text in lines.items():
        print(f"  {name:<10} {text}")
    print("\ntorchplug COMMAND --help says what its arguments are")
