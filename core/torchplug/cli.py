"""The command line: each command is a module, imported when it is asked for, or comes from another package by entry point."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import torchplug
from torchplug.discovery import COMMANDS, Found, PluginError, clash, scan

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
    try:
        code = _main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has seen enough, as in "torchplug plugins | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(words: list[str]) -> int:
    name = words[0] if words else ""
    try:
        if name in OWN:
            return _run(name, words)
        brought, unreadable = scan(COMMANDS)
        meant = [each for each in brought if each.name == name]
        if len(meant) > 1:
            raise PluginError(clash("the command", meant))
        if meant:
            code: int = meant[0].load()(words[1:])
            return code
        if name == "--version":
            print(f"torchplug {torchplug.__version__}")
            return 0
        if name in ("", "-h", "--help", "help"):
            _show(brought)
            return 0 if name else 2
        raise PluginError("; ".join([_unknown(name, [each.name for each in brought]), *unreadable]))
    except PluginError as error:
        print(f"torchplug: {error}", file=sys.stderr)
        return 2


def _run(name: str, words: list[str]) -> int:
    """One of core's own commands."""
    parser = argparse.ArgumentParser(prog="torchplug")
    module, _ = OWN[name]
    importlib.import_module(f"torchplug.{module}").add_command(parser.add_subparsers(dest="command"))
    chosen = parser.parse_args(words)
    try:
        code: int = chosen.run(chosen)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise PluginError(str(error)) from error
    return code


def _unknown(name: str, brought: Sequence[str]) -> str:
    if name in ELSEWHERE:
        return f"the command {name!r} comes with {ELSEWHERE[name]}: pip install {ELSEWHERE[name]}"
    from torchplug.options import closest

    return f"the command {name!r} is not there" + closest(name, [*OWN, *brought, *ELSEWHERE])


def _show(brought: Sequence[Found]) -> None:
    print("usage: torchplug COMMAND ...\n\nPlugins, options, checkpoints and runs of torchplug.\n")
    lines = {name: text for name, (_, text) in OWN.items()}
    lines |= {each.name: f"from {each.distribution} {each.version}" for each in brought}
    for name, text in lines.items():
        print(f"  {name:<10} {text}")
    print("\ntorchplug COMMAND --help says what its arguments are")
