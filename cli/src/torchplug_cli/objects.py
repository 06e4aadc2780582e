"""Objects from ``class_path`` and ``init_args``: imported, read by the types of their arguments, and made."""

from __future__ import annotations

import inspect
import re
import typing
from argparse import ArgumentError
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import jsonargparse
import yaml

from torchplug import DataModule, Module
from torchplug.options import closest
from torchplug_cli.importing import importable, target
from torchplug_cli.reading import ConfigError, load, unwritten

__all__ = ["Loaders", "Recipe", "check_written", "data_recipe", "make_data", "module_recipe", "remember"]

STAGE_OF = {"fit": "train", "tune": "train", "validate": "val", "test": "test", "predict": "predict"}
MODE = "torchplug"  # the name of `load` among jsonargparse's readers of text
jsonargparse.set_loader(MODE, load, exceptions=(yaml.YAMLError,))


class Recipe:
    """How to make an object: what to call, and with which arguments.

    Args:
        where: the section that it stands in, for messages.
        section: ``class_path`` and ``init_args``.

    Raises:
        ConfigError: there is no such class. What goes wrong inside of the user's own code is raised as it is.
    """

    def __init__(self, where: str, section: Mapping[str, Any]) -> None:
        self.where, self.section = where, section
        self.target = target(section["class_path"], f"{where}.class_path")
        self.given: dict[str, Any] = importable(dict(section.get("init_args") or {}), f"{where}.init_args")
        if not callable(self.target):
            raise ConfigError(f"{where}.class_path: {section['class_path']!r} is neither a class nor a function")

    @cached_property
    def _read(self) -> tuple[jsonargparse.ArgumentParser, list[str]]:
        """jsonargparse's view of the arguments, and their names."""
        parser = jsonargparse.ArgumentParser(parser_mode=MODE, exit_on_error=False, add_help=False)
        add = parser.add_class_arguments if inspect.isclass(self.target) else parser.add_function_arguments
        return parser, add(self.target, fail_untyped=False)

    @property
    def parser(self) -> jsonargparse.ArgumentParser:
        """What reads the arguments."""
        return self._read[0]

    @property
    def names(self) -> list[str]:
        """The names of all arguments that are known."""
        return self._read[1]

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The arguments that have a default, with it."""
        found: dict[str, Any] = self.parser.get_defaults().as_dict()
        needed = {action.dest for action in self.parser._actions if action.required}  # argparse has no public list of its arguments
        required = needed | {name for name, each in self._parameters.items() if each.default is each.empty}
        return {name: found.get(name) for name in self.names if name not in required}

    @cached_property
    def texts(self) -> dict[str, str]:
        """What each argument is for, as far as docstrings say it."""
        return {action.dest: action.help for action in self.parser._actions if action.help and action.dest in self.names}

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.target).parameters

    def check_names(self) -> None:
        """Refuses an argument that there is not.

        Raises:
            ConfigError: it names the closest one.
        """
        for name in self.given:
            if name not in self.names and not self._takes_more:
                listed = ", ".join(self.names) or "none"
                what = getattr(self.target, "__name__", self.target)
                raise ConfigError(
                    f"{self.where}.init_args: {what} has no argument {name!r}{closest(str(name), self.names)} (arguments: {listed})"
                )

    @property
    def _takes_more(self) -> bool:
        """Whether there is a ``**kwargs`` of which jsonargparse could not find out what it takes."""
        return any(each.kind is each.VAR_KEYWORD for each in self._parameters.values()) and set(self.names) <= set(self._parameters)

    def parsed(self) -> jsonargparse.Namespace:
        """The arguments, checked against their types.

        Raises:
            ConfigError: one is missing, unknown, or of a wrong type.
        """
        self.check_names()
        try:
            known = {name: value for name, value in self.given.items() if name in self.names}
            parsed: jsonargparse.Namespace = self.parser.parse_object(known)
            return parsed
        except ArgumentError as error:
            raise ConfigError(_reworded(f"{self.where}.init_args", " ".join(str(error).split()))) from None

    def make(self, parsed: jsonargparse.Namespace) -> Any:
        """The object."""
        arguments = vars(self.parser.instantiate(parsed))
        hints: dict[str, Any] = {}
        with suppress(Exception):  # names that only a type checker imports
            hints = typing.get_type_hints(self.target.__init__ if inspect.isclass(self.target) else self.target)
        for name, value in self.given.items():
            if name not in self.names or (isinstance(value, str) and _takes_text(hints.get(name, Any))):
                arguments[name] = value  # jsonargparse would make a number of a text that looks like one
        return self.target(**arguments)


def _reworded(where: str, text: str) -> str:
    """What jsonargparse has against an argument, with its place and its types as every other message of torchplug has them."""
    while found := re.match(r'Parser key "([^"]+)": (Problem with given class_path \S+: (?=Parser key))?', text):
        where, text = f"{where}.{found[1]}" + ".init_args" * bool(found[2]), text[found.end() :]
    for pattern in (
        r"Expected an? (.+?)\. Got value: (.*)",
        r"Does not validate .*?Subtypes: [\[(](.*?)[\])] Errors: .* Given value: (.*)",
    ):
        if wrong := re.fullmatch(pattern, text):
            types = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", wrong[1]).replace("NoneType", "None")
            return f"{where} must be of type {types.replace(', ', ' or ') if pattern[0] == 'D' else types}, got {wrong[2]}"
    return f"{where}: {text}"


def _takes_text(hint: Any) -> bool:
    return hint in (Any, str) or any(part is str for part in typing.get_args(hint))


def remember(made: Any, section: Mapping[str, Any]) -> Any:
    """``made``, which now knows for `config.yaml` what it was made of."""
    with suppress(AttributeError):  # an object with __slots__ has no place for it
        made._recipe = {"class_path": section["class_path"], "init_args": dict(section.get("init_args") or {})}
    return made


# ---------------------------------------------------------------------- module, data


def check_written(value: Any, where: str) -> None:
    """Refuses what a file written by a run could only hint at.

    Raises:
        ConfigError: it says what is missing, and how to give it.
    """
    if isinstance(value, dict):
        if unwritten(value):
            raise ConfigError(f"{where} is not in the file ({value['unwritten']}): write it there, or give --set {where}=...")
        for name, each in value.items():
            check_written(each, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            check_written(each, f"{where}.{number}")
    elif isinstance(value, str) and "://***@" in value:
        raise ConfigError(f"{where} is {value!r}, without the name and password that it had: give --set {where}=...")


def module_recipe(config: Mapping[str, Any]) -> Recipe:
    """How to make the module.

    Raises:
        ConfigError: there is none, or it is something else.
    """
    section = config.get("module", {})
    if "class_path" not in section:
        raise ConfigError("there is no module: write module: {class_path: ..., init_args: {...}}, or give --set module.class_path=...")
    recipe = Recipe("module", section)
    if not inspect.isclass(recipe.target) or not issubclass(recipe.target, Module):
        raise ConfigError(f"module.class_path: {section['class_path']!r} is no subclass of torchplug.Module")
    return recipe


def data_recipe(config: Mapping[str, Any]) -> Recipe | None:
    """How to make the data module, or the loaders; None where the module brings them.

    Raises:
        ConfigError: it is neither.
    """
    section = config.get("data", {})
    if not section:
        return None
    if "class_path" not in section:
        raise ConfigError("data has no class_path: write data: {class_path: ..., init_args: {...}}")
    return Recipe("data", section)


class Loaders(DataModule):
    """Loaders that a function made: one for the work at hand, or several in a dict.

    Args:
        made: an iterable of batches, or a dict of such under train, val, test and predict.
        work: fit, validate, test, predict or tune.
        name: what the function is called.

    Raises:
        ConfigError: there is another key in the dict.
    """

    def __init__(self, made: Any, work: str, name: str) -> None:
        super().__init__()
        self.loaders: dict[str, Any] = made if isinstance(made, dict) else {STAGE_OF[work]: made}
        for key in self.loaders:
            if key not in STAGE_OF.values():
                stages = dict.fromkeys(STAGE_OF.values())
                raise ConfigError(f"data: {name} returned loaders under {key!r}{closest(str(key), stages)} (keys: {', '.join(stages)})")

    def train_dataloader(self) -> Any:
        return self.loaders.get("train")

    def val_dataloader(self) -> Any:
        return self.loaders.get("val")

    def test_dataloader(self) -> Any:
        return self.loaders.get("test")

    def predict_dataloader(self) -> Any:
        return self.loaders.get("predict")


def make_data(recipe: Recipe, parsed: jsonargparse.Namespace, work: str) -> DataModule:
    """A data module: the one that was asked for, or one around the loaders that a function made."""
    made = recipe.make(parsed)
    if not isinstance(made, DataModule):
        made = Loaders(made, work, recipe.section["class_path"])
    data: DataModule = remember(made, recipe.section)
    return data
