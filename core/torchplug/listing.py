"""``torchplug plugins``: what is installed, from metadata alone; ``-v`` imports the plugins for their hooks and options."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from torchplug.discovery import BUNDLE, Catalogue, Found, PluginError

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Adds ``plugins`` to the command line."""
    parser = commands.add_parser("plugins", help="list the installed plugins", description="List the installed plugins.")
    parser.add_argument("-v", "--verbose", action="store_true", help="also hooks and options (imports the plugins)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_plugins)


def _plugins(chosen: argparse.Namespace) -> int:
    """``torchplug plugins``: names from metadata alone, hooks and options with ``-v``."""
    catalogue = Catalogue()
    on = set(_bundled(catalogue.found))
    rows = [_row(each, each.name in on) | (_details(each) if chosen.verbose else {}) for each in catalogue.found]
    for problem in catalogue.unreadable:
        print(f"torchplug: {problem}", file=sys.stderr)
    if chosen.json:
        _print_json(rows)
    elif rows:
        _print_table(rows)
    else:
        print(f"no plugins are installed; pip install torchplug-{BUNDLE} brings the usual ones")
    return 0


def _bundled(found: Sequence[Found]) -> list[str]:
    """The standard bundle and the plugins in it: those whose packages its own package requires."""
    bundle = next((each for each in found if each.name == BUNDLE), None)
    if bundle is None:
        return []
    packages = {re.split(r"[^\w.-]", line)[0] for line in bundle.requires}
    return [BUNDLE, *(each.name for each in found if each.distribution in packages)]


def _row(found: Found, on: bool) -> dict[str, Any]:
    state = "on" if on else "available"
    return {
        "name": found.name, "distribution": found.distribution, "version": found.version, "state": state, "summary": found.summary,
    }  # fmt: skip


def _details(found: Found) -> dict[str, Any]:
    """What only the plugin itself knows, or why it cannot be imported."""
    from torchplug.members import PARAMETERS  # with torch, for which a listing of names does not wait
    from torchplug.options import fields_of

    try:
        target = found.load()
    except PluginError as error:
        return {"error": str(error)}
    if isinstance(target, (list, tuple)):
        return {"bundle": [str(name) for name in target]}
    hooks = [name for name in PARAMETERS if hasattr(getattr(target, name, None), "torchplug_impl")]
    return {"hooks": hooks, "options": fields_of(target)}


def _print_json(rows: Sequence[dict[str, Any]]) -> None:
    import json

    print(json.dumps(rows, indent=2, default=vars))


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    width = max(len(row["name"]) for row in rows)
    package = max(len(f"{row['distribution']} {row['version']}") for row in rows)
    for row in rows:
        origin = f"{row['distribution']} {row['version']}"
        print(f"{row['name']:<{width}}  {origin:<{package}}  {row['state']:<{len('available')}}  {row['summary']}".rstrip())
        if "error" in row:
            print(f"    {row['error']}")
        if row.get("bundle"):
            print(f"    a bundle of {', '.join(row['bundle'])}")
        if row.get("hooks"):
            print(f"    hooks: {', '.join(row['hooks'])}")
        for option in row.get("options", []):
            print(f"    {option}")
    print("\non: used by Trainer() when no plugins are named; available: name it in Trainer(plugins=[...])")
