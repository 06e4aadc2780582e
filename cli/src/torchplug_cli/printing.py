"""``--print-config``: a configuration with every default, and what it means as comments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from torchplug.config import UNWRITTEN, key, text
from torchplug.discovery import BUNDLE, find
from torchplug.options import Field, closest, default_of, fields_of
from torchplug.settings import Settings
from torchplug_cli.commands import Config
from torchplug_cli.objects import Recipe, data_recipe, module_recipe
from torchplug_cli.reading import ON_ERROR, ConfigError

__all__ = ["print_config"]

WIDTH = 120
EMPTY = ("#   class_path: package.module.Class, or folder/file.py:Class", "#   init_args: {}")


def print_config(config: Config) -> str:
    """The configuration as YAML. It is one itself; what must be given and is not stands in it as a comment.

    Raises:
        ConfigError: something in it is wrong.
    """
    values = config.values
    lines = ["# a configuration of torchplug: `torchplug fit FILE` runs it", "", "trainer:"]
    options = {field.name: field for field in fields_of(Settings) if field.name != "plugins"}
    lines += _options(Settings, options, values.get("trainer", {}), "  ")
    plugins, missing = _plugins(values.get("plugins", {BUNDLE: {}}))
    lines += ["", *plugins]
    if not missing:
        config.trainer()  # says what is wrong
    if "module" in values:
        lines += ["", *_object("module", module_recipe(values))]
    else:
        lines += ["", "# module:  # what to train", *EMPTY]
    data = data_recipe(values)
    if data is not None:
        lines += ["", *_object("data", data)]
    else:
        lines += ["", "# data:  # a data module, or a function that returns loaders", *EMPTY]
    lines += ["", "# A checkpoint to go on from, or whose weights to evaluate: a path, 'last' or 'best'."]
    lines += [f"ckpt_path: {text(values.get('ckpt_path'))}"]
    return "\n".join(lines)


def _plugins(named: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The lines of the plugins, bundles opened, and whether an option is missing."""
    lines: list[str] = []
    missing = False
    plain = {name.rpartition("/")[2] for name in named}
    for name, given in _opened(named, plain):
        if "class_path" in given:
            lines += [f"  - {key(name)}:", *_recipe(Recipe(f"plugins.{name}", given), "      ")]
            continue
        cls = find(name.partition(":")[0]).load()
        options = {field.name: field for field in fields_of(cls)}
        for option in given:
            if option not in options and option != "on_error" and options:
                raise ConfigError(f"plugin {name!r}: no option {option!r}{closest(option, options)} (options: {', '.join(options)})")
        inside = _options(cls, options, given, "      ")
        if "on_error" not in options:
            inside += [*_comment(ON_ERROR, "      "), f"      on_error: {text(given.get('on_error', getattr(cls, 'on_error', 'abort')))}"]
        lines += [*_comment(_summary(cls), "  "), f"  - {key(name)}:", *inside]
        missing = missing or any(field.default == "required" and field.name not in given for field in options.values())
    return ["plugins:" if lines else "plugins: []", *lines], missing


def _opened(named: Mapping[str, Any], plain: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The plugins in the order in which they are built: what a bundle holds where it is named, but for those named directly."""
    for name, given in named.items():
        target = [] if "class_path" in given else find(name.partition(":")[0]).load()
        if isinstance(target, (list, tuple)) and target and not given:
            inside = {str(each): dict[str, Any]() for each in target if str(each) not in {other.partition(":")[0] for other in plain}}
            yield from _opened(inside, plain)
        else:
            yield name, given


def _options(cls: type, fields: Mapping[str, Field], given: Mapping[str, Any], pad: str) -> list[str]:
    """A line for each option, under what it means; one that is required and not given is a comment."""
    own = {each.name: default_of(each) for each in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    defaults = {name: default for name, default in own.items() if default is not dataclasses.MISSING}
    lines: list[str] = []
    for name, field in fields.items():
        allowed = f" ({field.type}{', ' + field.range if field.range else ''})"
        lines += _comment(field.text + allowed, pad)
        lines.append(_line(name, given, defaults, pad))
    return lines + [f"{pad}{key(name)}: {text(value)}" for name, value in given.items() if name not in fields and name != "on_error"]


def _line(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any], pad: str) -> str:
    if name in given:
        return f"{pad}{key(name)}: {text(given[name])}"
    if name not in defaults:
        return f"{pad}# {key(name)}:  # must be given"
    value = text(defaults[name])
    return (
        f"{pad}# {key(name)}: {' '.join(repr(defaults[name]).split())}  # the default"
        if UNWRITTEN in value
        else f"{pad}{key(name)}: {value}"
    )


def _object(section: str, recipe: Recipe) -> list[str]:
    return [*_comment(_summary(recipe.target), ""), f"{section}:", *_recipe(recipe, "  ")]


def _recipe(recipe: Recipe, pad: str) -> list[str]:
    """Class path and arguments of an object."""
    lines = [f"{pad}class_path: {text(recipe.section['class_path'])}"]
    if not recipe.names and not recipe.given:
        return [*lines, f"{pad}init_args: {{}}"]
    given = recipe.section.get("init_args") or {}
    if all(name in given or name in recipe.defaults for name in recipe.names):
        recipe.parsed()
    recipe.check_names()
    lines.append(f"{pad}init_args:")
    for name in dict.fromkeys([*recipe.names, *given]):
        lines += _comment(recipe.texts.get(name, ""), pad + "  ")
        lines.append(_line(name, given, recipe.defaults, pad + "  "))
    return lines


def _summary(target: Any) -> str:
    """The first sentence of a docstring; that which a dataclass makes of its fields is none."""
    first = " ".join((getattr(target, "__doc__", None) or "").strip().partition("\n\n")[0].split())
    return "" if first.startswith(f"{getattr(target, '__name__', '')}(") else first


def _comment(words: str, pad: str) -> list[str]:
    return [f"{pad}# {line}" for line in wrap(words, WIDTH - len(pad) - 2)]
