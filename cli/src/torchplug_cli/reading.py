"""Configuration files and settings of the command line, read and laid over each other into one mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from torchplug.discovery import BUNDLE, installed
from torchplug.options import closest

__all__ = ["ON_ERROR", "ConfigError", "load", "read", "unwritten", "whole"]

SECTIONS = ("trainer", "plugins", "module", "data", "ckpt_path", "versions")
OBJECT = ("class_path", "init_args")
ON_ERROR = "What an error in the plugin does: 'abort' ends the run, 'disable' switches a plugin off that only observes."


class ConfigError(Exception):
    """A mistake in a file or on the command line, said in one line."""


# ---------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML with the plain values of version 1.2: 1e-3 is a number; no, off, 010 and 12:30:00 are what they look like."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def load(text: str) -> Any:
    """The value of a YAML text."""
    return yaml.load(text, _Loader)


def read(path: str) -> dict[str, Any]:
    """The sections in a file.

    Raises:
        ConfigError: there is no such file, it is no YAML, or it holds something else than the sections.
    """
    try:
        content = load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path!r} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    try:
        return _checked({} if content is None else content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# ---------------------------------------------------------------------- the shape of it


def _checked(content: Any) -> dict[str, Any]:
    """The sections, each of the kind that it must be; the list of plugins is a mapping of names to options from here on."""
    if not isinstance(content, dict):
        raise ConfigError(f"must be a mapping of {', '.join(SECTIONS)}, got {content!r}")
    checked = {}
    for name, value in content.items():
        if name not in SECTIONS:
            raise ConfigError(f"there is no section {name!r}{closest(str(name), SECTIONS)} (sections: {', '.join(SECTIONS)})")
        if value is None and name != "plugins":
            continue
        if name == "plugins":
            value = _by_name(value)
        elif name != "ckpt_path" and not isinstance(value, dict):
            raise ConfigError(f"{name} must be a mapping, got {value!r}")
        checked[name] = value
    for name in ("module", "data"):
        _check_object(name, checked.get(name, {}))
    return checked


def _check_object(where: str, value: Mapping[str, Any]) -> None:
    if unwritten(value):
        return
    for each in value:
        if each not in OBJECT:
            meant = f", did you mean {where}.init_args.{each}?" if not closest(str(each), OBJECT) else closest(str(each), OBJECT)
            raise ConfigError(f"{where} has no key {each!r}{meant} (keys: {', '.join(OBJECT)})")
    if "class_path" in value and not (isinstance(value["class_path"], str) and value["class_path"]) and not unwritten(value["class_path"]):
        raise ConfigError(f"{where}.class_path must be where to import it from, got {value['class_path']!r}")
    if not isinstance(value.get("init_args", {}), (dict, type(None))):
        raise ConfigError(f"{where}.init_args must be a mapping, got {value['init_args']!r}")


def _by_name(listed: Any) -> dict[str, Any]:
    """The list of plugins as a mapping from names to options."""
    if listed is None:
        return {}
    if not isinstance(listed, list):
        raise ConfigError(f"plugins must be a list of names and {{name: options}}, got {listed!r}")
    named: dict[str, Any] = {}
    for each in listed:
        item = {each: {}} if isinstance(each, str) else each
        if not isinstance(item, dict) or len(item) != 1 or not isinstance(next(iter(item)), str):
            raise ConfigError(f"plugins lists names and {{name: options}} with one name each, got {each!r}")
        ((name, options),) = item.items()
        if not isinstance(options, (dict, type(None))):
            raise ConfigError(f"plugins: the options of {name!r} must be a mapping, got {options!r}")
        if _same(named, name) is not None:
            raise ConfigError(f"plugins lists {name!r} twice; give the instances names of their own: {name}:a, {name}:b")
        named[name] = dict(options or {})
    return named


def _same(named: Mapping[str, Any], name: str) -> str | None:
    """The instance in ``named`` that ``name`` means, with its distribution or without."""
    return next((each for each in named if each == name or each.rpartition("/")[2] == name.rpartition("/")[2]), None)


def unwritten(value: Any) -> bool:
    """Whether this stands for what a run could not write, with the reason: torchplug.config makes such mappings."""
    return isinstance(value, dict) and set(value) == {"unwritten"}


# ---------------------------------------------------------------------- one over the other


def whole(paths: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """The files, each over those before it, and the settings over all of them.

    The Trainer's arguments and the options of a plugin are replaced one by one, the arguments of module and data also in what is
    nested in them; another ``class_path`` takes the arguments of the former away. Plugins are added to those before, unless the list is
    empty: that takes all away.
    """
    config: dict[str, Any] = {}
    for path in paths:
        for name, value in read(path).items():
            config[name] = _laid_over(name, config[name], value) if name in config else value
    for setting in settings:
        set_value(config, setting)
    return config


def _laid_over(section: str, below: Any, above: Any) -> Any:
    if section == "plugins":
        if not above:
            return {}
        plugins = dict(below)
        for name, options in above.items():
            there = _same(plugins, name) or name
            plugins[there] = {**plugins.get(there, {}), **options}
        return plugins
    if section == "trainer":
        return {**below, **above}
    return _merged(below, above) if section in ("module", "data") else above


def _merged(below: Any, above: Any) -> Any:
    """Mappings key by key; one of another class in the place of the former."""
    if not isinstance(below, dict) or not isinstance(above, dict) or unwritten(below) or unwritten(above):
        return above
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return above
    return {**below, **{key: _merged(below[key], value) if key in below else value for key, value in above.items()}}


# ---------------------------------------------------------------------- --set


def set_value(config: dict[str, Any], setting: str) -> None:
    """Sets one value in the configuration: ``trainer.max_epochs=3``, ``plugins.checkpoint:best.top_k=3``.

    Raises:
        ConfigError: there is no such place, or the value is no YAML.
    """
    path, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set takes KEY=VALUE, such as trainer.max_epochs=3, got {setting!r}")
    try:
        value = load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"--set {path}: the value {text!r} is no YAML: {problem}") from None
    section, *keys = path.split(".")
    if section == "plugins" and keys:
        _set_plugin(config, path, value)
        return
    if keys:
        if section in ("module", "data") and keys == ["class_path"] and config.get(section, {}).get("class_path") != value:
            value, keys = {"class_path": value}, []
        else:
            _dig(config.setdefault(section, {}), keys, value, section)
            value = config[section]
    try:
        checked = _checked({section: value})
    except ConfigError as error:
        raise ConfigError(f"--set {setting}: {error}") from None
    config.pop(section, None)
    config.update(checked)


def _set_plugin(config: dict[str, Any], path: str, value: Any) -> None:
    """The options of a plugin, or one of them; a plugin that is not listed is added to those that there are."""
    rest = path.partition(".")[2]
    plugins = config.setdefault("plugins", {BUNDLE: {}} if installed(BUNDLE) else {})
    listed = [each for each in plugins if rest == each or rest.startswith(each + ".")]
    name = max(listed, key=len) if listed else rest.partition(".")[0]
    keys = rest[len(name) + 1 :].split(".") if len(rest) > len(name) else []
    name = _same(plugins, name) or name
    if keys:
        _dig(plugins.setdefault(name, {}), keys, value, f"plugins.{name}")
        return
    ((_, options),) = _by_name([{name: value}]).items()
    plugins[name] = options


def _dig(into: dict[Any, Any], keys: Sequence[str], value: Any, where: str) -> None:
    """Sets a value in nested mappings, which are made where there are none."""
    *above, last = keys
    for number, name in enumerate(above):
        where += f".{name}"
        key = _number(name) if number else name
        if into.get(key) is None or unwritten(into[key]):
            into[key] = {}
        into = into[key]
        if not isinstance(into, dict):
            raise ConfigError(f"--set: {where} is {into!r}, which has nothing inside to set")
    if last == "class_path" and into.get(last) != value:
        into.pop("init_args", None)
    into[_number(last) if above else last] = value


def _number(name: str) -> Any:
    """Keys of nested mappings may be numbers."""
    return int(name) if re.fullmatch(r"-?\d+", name) else name
