"""The command line: what is installed, what it does, in which order it would run, and what is in checkpoints."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torchplug import checkpoint_cli, replay
from torchplug.members import PARAMETERS, Member, PluginError
from torchplug.options import Field, closest, fields_of
from torchplug.plugins import BUNDLE, Found, build, discover, order
from torchplug.settings import RENAMED, Settings

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``torchplug ARGUMENTS``; returns the exit code (2 for a mistake in the arguments, which is said in one line)."""
    parser = argparse.ArgumentParser(prog="torchplug", description="Plugins, options and checkpoints of torchplug.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser("plugins", help="list the installed plugins", description="List the installed plugins.")
    listing.add_argument("-v", "--verbose", action="store_true", help="also hooks and options (imports the plugins)")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_plugins)

    explain = commands.add_parser(
        "explain",
        help="explain a Trainer argument, or the order in which plugins are called",
        description="Explain Trainer arguments, or show for plugins who is called in each hook, from which package, and why in this place.",
    )
    explain.add_argument("names", nargs="*", help="Trainer arguments, or plugins; nothing lists all Trainer arguments")
    explain.set_defaults(run=_explain)

    checkpoint_cli.add_commands(commands)
    replay.add_command(commands)

    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        return code
    except PluginError as error:
        print(f"torchplug: {error}", file=sys.stderr)
        return 2


def _plugins(chosen: argparse.Namespace) -> int:
    """``torchplug plugins``: names from metadata alone, hooks and options with ``-v``."""
    found = discover()
    on = set(_bundled(found))
    rows = [_row(each, each.name in on, chosen.verbose) for each in found]
    if chosen.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"no plugins are installed; pip install torchplug-{BUNDLE} brings the usual ones")
        return 0
    width = max(len(row["name"]) for row in rows)
    package = max(len(f"{row['distribution']} {row['version']}") for row in rows)
    for row in rows:
        origin = f"{row['distribution']} {row['version']}"
        print(f"{row['name']:<{width}}  {origin:<{package}}  {row['state']}")
        if "error" in row:
            print(f"    {row['error']}")
        if row.get("bundle"):
            print(f"    a bundle of {', '.join(row['bundle'])}")
        if row.get("hooks"):
            print(f"    hooks: {', '.join(row['hooks'])}")
        for option in row.get("options", []):
            print("    " + _line(Field(**option)))
    print("\non: used by Trainer() when no plugins are named; available: name it in Trainer(plugins=[...])")
    return 0


def _bundled(found: Sequence[Found]) -> list[str]:
    """The standard bundle and the plugins in it: those whose packages its own package requires."""
    bundle = next((each for each in found if each.name == BUNDLE), None)
    if bundle is None:
        return []
    packages = {re.split(r"[^\w.-]", line)[0] for line in importlib.metadata.requires(bundle.distribution) or []}
    return [BUNDLE, *(each.name for each in found if each.distribution in packages)]


def _row(found: Found, on: bool, verbose: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": found.name,
        "distribution": found.distribution,
        "version": found.version,
        "state": "on" if on else "available",
    }
    if not verbose:
        return row
    try:
        target = found.load()
    except PluginError as error:
        return {**row, "error": str(error)}
    if isinstance(target, (list, tuple)):
        return {**row, "bundle": [str(name) for name in target]}
    row["hooks"] = [name for name in PARAMETERS if hasattr(getattr(target, name, None), "torchplug_impl")]
    row["options"] = [asdict(field) for field in fields_of(target)]
    return row


def _line(field: Field) -> str:
    allowed = f" ({field.range})" if field.range else ""
    default = "required" if field.default == "required" else f"default {field.default}"
    return f"{field.name}: {field.type}{allowed}, {default}. {field.text}"


def _explain(chosen: argparse.Namespace) -> int:
    """``torchplug explain``: Trainer arguments, or the order of plugins."""
    arguments = {field.name: field for field in fields_of(Settings)}
    if not chosen.names:
        for field in arguments.values():
            print(_line(field))
        return 0
    if all(name in arguments for name in chosen.names):
        for name in chosen.names:
            print(_line(arguments[name]))
        return 0
    for name in chosen.names:
        if name in RENAMED:
            print(f"{name} is an argument of older trainers: {RENAMED[name]}")
            return 0
    installed = [each.name for each in discover()]
    for name in chosen.names:
        plain = name.rpartition("/")[2].partition(":")[0]
        if plain not in installed:
            hint = closest(plain, [*arguments, *installed])
            raise PluginError(f"{name!r} is neither a Trainer argument nor an installed plugin{hint}")
    _explain_order(order(build([_lenient(name) for name in chosen.names])))
    return 0


def _lenient(name: str) -> Any:
    """A plugin as it can be built without its required options: they do not change the order."""
    plain = name.rpartition("/")[2].partition(":")[0]
    target = next(each for each in discover() if each.name == plain).load()
    fields = fields_of(target) if isinstance(target, type) else []
    stand_ins = {"int": 1, "float": 1.0, "bool": True}
    return {name: {field.name: stand_ins.get(field.type, "...") for field in fields if field.default == "required"}}


def _explain_order(members: Sequence[Member]) -> None:
    print("order of plugins:")
    for place, member in enumerate(members, 1):
        print(f"  {place}. {member.name}  {member.distribution} {member.version}  ({member.rule})")
    for hook in PARAMETERS:
        callers = [member for member in members if hook in member.hooks]
        if callers:
            print(f"{hook}:")
            for member in callers:
                how = "  wraps it" if member.hooks[hook]["wrapper"] else ""
                print(f"    {member.name}  {member.distribution} {member.version}  ({member.rule}){how}")
