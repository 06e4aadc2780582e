"""``torchplug replay``: a run that is over, or was killed, is sent from its journal to any logger."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchplug.discovery import PluginError, find
from torchplug.options import fields_of
from torchplug.plugins import build
from torchplug.tracking import Delivery, Place, deliver, first

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Adds ``replay`` to the command line."""
    parser = commands.add_parser(
        "replay",
        help="send a run's journal to a logger",
        description="Send the journal of a run to loggers, also to those that were not there when it ran. What a logger has already "
        "got is not sent again.",
    )
    parser.add_argument("run_dir", type=Path, help="the directory of the run, or its journal where that is somewhere else")
    parser.add_argument("--to", required=True, metavar="NAME[,NAME]", help="the loggers, by the names under which they are enabled")
    parser.add_argument(
        "--options",
        default="{}",
        metavar="JSON",
        help="""options, by logger: '{"mlflow": {"tracking_uri": "http://127.0.0.1:5000"}}'; those of the run otherwise""",
    )
    parser.set_defaults(run=_replay)


def _replay(chosen: argparse.Namespace) -> int:
    elsewhere = chosen.run_dir.is_file()
    journal = chosen.run_dir if elsewhere else chosen.run_dir / "journal.jsonl"
    if not journal.is_file():
        raise PluginError(f"{journal} is not there; name the directory of a run in which the plugin journal was enabled")
    try:
        start, options = first(journal), json.loads(chosen.options)
        if not isinstance(options, dict) or not all(isinstance(each, dict) for each in options.values()):
            raise ValueError(f"--options takes a JSON object with the options of each logger, got {chosen.options}")
    except ValueError as error:
        raise PluginError(str(error)) from error
    names = [name.strip() for name in chosen.to.split(",")]
    for name in options:
        if name not in names:
            raise PluginError(f"--options names {name!r}, which is not in --to {chosen.to}")
    plugins = {name: _tracker(name, start, options.get(name, {})) for name in names}
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    run_dir = Path(start["dir"]) if elsewhere else chosen.run_dir
    places = {name: Place(journal, start, run_dir, plugin.folder(run_dir, name)) for name, plugin in plugins.items()}
    return max(_send(name, plugin, places[name]) for name, plugin in plugins.items())


def _tracker(name: str, start: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A logger with the options that the run gave it, and those that are given now."""
    cls = find(name.partition(":")[0]).load()
    if not hasattr(cls, "backend"):
        raise PluginError(f"plugin {name!r} cannot take a journal: it has no backend (torchplug.tracking)")
    known = {field.name for field in fields_of(cls)}
    recorded = {option: value for option, value in start["plugins"].get(name, {}).items() if option in known}
    return build([{name: {**recorded, **options}}])[0].plugin


def _send(name: str, plugin: Any, place: Place) -> int:
    """Sends everything to one logger, and says what came of it; returns the exit code."""
    try:
        delivery: Delivery = deliver(plugin.backend(), place)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{name}: {delivery.sent} records sent; {delivery.backend.where}")
    for line in delivery.refused:
        print(f"{name} does not take {line}", file=sys.stderr)
    return 1 if delivery.refused else 0
