"""The commands that run something, from the words of the command line to the exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

from torchplug.discovery import SWITCH, PluginError, discover
from torchplug_cli.reading import ConfigError, whole

__all__ = ["Config", "fit", "predict", "schema", "test", "tune", "validate"]

logger = logging.getLogger("torchplug")

ABOUT = {
    "fit": "Train as configuration files say.",
    "validate": "Evaluate on the validation data; the metrics are printed as JSON.",
    "test": "Evaluate on the test data; the metrics are printed as JSON.",
    "predict": "Predict; a plugin such as prediction_writer keeps the predictions.",
    "tune": "Let the finders among the plugins look for a learning rate or batch size; what they found is printed as JSON.",
}


def fit(arguments: list[str]) -> int:
    """``torchplug fit``."""
    return _said(lambda: _command("fit", arguments), "fit")


def validate(arguments: list[str]) -> int:
    """``torchplug validate``."""
    return _said(lambda: _command("validate", arguments), "validate")


def test(arguments: list[str]) -> int:
    """``torchplug test``."""
    return _said(lambda: _command("test", arguments), "test")


def predict(arguments: list[str]) -> int:
    """``torchplug predict``."""
    return _said(lambda: _command("predict", arguments), "predict")


def tune(arguments: list[str]) -> int:
    """``torchplug tune``."""
    return _said(lambda: _command("tune", arguments), "tune")


def schema(arguments: list[str]) -> int:
    """``torchplug schema``: the JSON Schema of a configuration file, for editors."""

    about = "Print the JSON Schema of a configuration file: the Trainer's arguments and every installed plugin's options."

    def work() -> int:
        from torchplug_cli.json_schema import config_schema

        _Parser("schema", about).parse(arguments)
        print(json.dumps(config_schema(), indent=2))
        return 0

    return _said(work, "schema")


def _said(work: Callable[[], int], name: str) -> int:
    """What ``work`` returns; a mistake of the user is one line and the exit code 2."""
    try:
        return work()
    except (ConfigError, PluginError) as error:
        print(f"torchplug {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """argparse, with a mistake said in one line."""

    def __init__(self, command: str, about: str) -> None:
        super().__init__(prog=f"torchplug {command}", description=about)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help says what there is)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments; files and options may come in any order."""
        return self.parse_intermixed_args(arguments)


def _command(name: str, arguments: Sequence[str]) -> int:
    parser = _Parser(name, ABOUT[name])
    parser.add_argument("config", nargs="*", help="configuration files; each is laid over those before it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="set one value, such as trainer.max_epochs=3 or plugins.ema.decay=0.99; may be given several times",
    )  # fmt: skip
    if name != "tune":
        what = "go on from this checkpoint" if name == "fit" else "load the weights of this checkpoint"
        parser.add_argument("--ckpt-path", metavar="PATH", help=f"{what}: a path, 'last' or 'best'")
    parser.add_argument("--no-plugins", action="store_true", help="run without any plugin")
    parser.add_argument("--print-config", action="store_true", help="print the configuration with every default and what it means, and end")
    chosen = parser.parse(arguments)
    if not chosen.config and not chosen.set and not chosen.print_config:
        raise ConfigError("give a configuration file, or what is needed with --set")
    config = Config(whole(chosen.config, chosen.set))
    if getattr(chosen, "ckpt_path", None) is not None:
        config.values["ckpt_path"] = chosen.ckpt_path
    with _without_plugins() if chosen.no_plugins else nullcontext():
        if chosen.print_config:
            from torchplug_cli.printing import print_config

            print(print_config(config))
            return 0
        return config.run(name)


@contextmanager
def _without_plugins() -> Iterator[None]:
    """Inside, this process and those that it starts run without plugins."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "none"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


class Config:
    """A configuration, and the objects that are made from it.

    Args:
        values: the sections, with the plugins by name.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        from torchplug_cli.objects import check_written

        self.values = values
        check_written({name: value for name, value in values.items() if name != "versions"}, "")

    @property
    def plugins(self) -> list[Any] | None:
        """The list that the Trainer takes; a plugin with a ``class_path`` is an object, made here."""
        from torchplug_cli.objects import Recipe, remember

        if "plugins" not in self.values:
            return None
        listed: list[Any] = []
        for name, options in self.values["plugins"].items():
            if "class_path" in options:
                recipe = Recipe(f"plugins.{name}", options)
                listed.append({name: remember(recipe.make(recipe.parsed()), options)})
            else:
                listed.append({name: options} if options else name)
        return listed

    def trainer(self) -> Any:
        """The Trainer.

        Raises:
            ConfigError: an argument or option is unknown, or its value is wrong.
        """
        from torchplug import Trainer

        options = self.values.get("trainer", {})
        if "plugins" in options:
            raise ConfigError("trainer: plugins have a section of their own: plugins: [...]")
        plugins = self.plugins
        try:
            return Trainer(**options, plugins=plugins)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"trainer: {error}") from error

    def run(self, work: str) -> int:
        """Does what the command is called, from the module's making to the report."""
        from torchplug import seed_everything
        from torchplug_cli.objects import data_recipe, make_data, module_recipe, remember

        module_from, data_from = module_recipe(self.values), data_recipe(self.values)
        arguments = module_from.parsed()
        of_data = data_from.parsed() if data_from is not None else None
        trainer = self.trainer()
        self._note_versions(trainer)
        seed = trainer.seed

        def seeded(make: Callable[[], Any]) -> Any:  # what one of the two draws does not change the other
            if seed is not None:
                seed_everything(seed)
            return make()

        data = seeded(lambda: make_data(data_from, of_data, work)) if data_from is not None and of_data is not None else None
        module = seeded(lambda: remember(module_from.make(arguments), module_from.section))
        given: dict[str, Any] = {"datamodule": data}
        if work != "tune":
            given["ckpt_path"] = self.values.get("ckpt_path")
        if work == "predict":
            given["return_predictions"] = False
        try:
            result = getattr(trainer, work)(module, **given)
        except Exception as error:
            if _is_mistake(error, trainer):
                raise ConfigError(str(error)) from error
            if isinstance(error, PluginError):  # which is one line where it comes before the run
                traceback.print_exc()
                return 1
            raise
        if result is not None and trainer.run.rank == 0:
            print(json.dumps(result, indent=2, default=_plain))
        return 0

    def _note_versions(self, trainer: Any) -> None:
        """Says where this is not what the file was written with."""
        from torchplug.state import versions

        plugins = {found.name: f"{found.distribution} {found.version}" for found in discover()}
        here = {**versions(), **{name: plugins.get(name.partition(":")[0], "") for name in trainer.enabled}}
        for name, version in self.values.get("versions", {}).items():
            if here.get(name, version) != version:
                logger.info("the configuration was written with %s %s, here is %s", name, version, here[name])


def _is_mistake(error: Exception, trainer: Any) -> bool:
    """Whether core itself refused something before the first batch: what was asked for, a plugin, or a checkpoint."""
    from torchplug.checkpoint import CheckpointError

    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    by_core = last is not None and str(last.tb_frame.f_globals.get("__name__")).startswith("torchplug.")
    begun = trainer.run is not None and trainer.run.position.stage
    return by_core and not begun and isinstance(error, (TypeError, ValueError, FileNotFoundError, PluginError, CheckpointError))


def _plain(found: Any) -> Any:
    """What a finder found, without the curves that led to it."""
    if not dataclasses.is_dataclass(found):
        return str(found)
    values = {name: value for name, value in vars(found).items() if isinstance(value, (str, int, float, bool, type(None)))}
    return {**values, "suggestion": found.suggestion()} if hasattr(found, "suggestion") else values
