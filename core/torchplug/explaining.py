"""``torchplug explain``: what a Trainer argument is, or who is called in each hook, and why in that order."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torchplug.discovery import PluginError, discover, find
from torchplug.members import PARAMETERS, Member
from torchplug.options import closest, fields_of
from torchplug.ordering import order
from torchplug.plugins import build
from torchplug.settings import RENAMED, Settings

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Adds ``explain`` to the command line."""
    parser = commands.add_parser(
        "explain",
        help="explain a Trainer argument, or the order in which plugins are called",
        description="Explain Trainer arguments, or show for plugins who is called in each hook, from which package, and why in this place.",
    )
    parser.add_argument("names", nargs="*", help="Trainer arguments, or plugins; nothing lists all Trainer arguments")
    parser.set_defaults(run=_explain)


def _explain(chosen: argparse.Namespace) -> int:
    """``torchplug explain``: Trainer arguments, or the order of plugins."""
    arguments = {field.name: field for field in fields_of(Settings)}
    if not chosen.names:
        for field in arguments.values():
            print(field)
        return 0
    if all(name in arguments for name in chosen.names):
        for name in chosen.names:
            print(arguments[name])
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
    target = find(name.partition(":")[0]).load()
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
