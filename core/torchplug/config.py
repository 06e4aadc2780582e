"""A run's configuration as a file: `config.yaml` says what the run was made of, and starts the same run again."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchplug.options import discreet
from torchplug.plugins import GPU, PROFILER, mentioned
from torchplug.state import versions

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["UNWRITTEN", "key", "recipe", "text", "write_config"]

UNWRITTEN = "unwritten"  # the only key of a mapping that stands for what cannot be written; its value says why, or what it was
UNSAVED = {UNWRITTEN: "not among the saved hyperparameters"}
WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")  # what some reader of YAML takes for something else


def write_config(run: Run, enabled: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Writes ``config.yaml`` into the run's folder: the Trainer's arguments, plugins with their options, module, data and versions.

    What comes by itself when the run is started again stands there as a comment: plugins that an argument of the Trainer names, and
    those that the module brings.

    Args:
        run: the run.
        enabled: the Trainer's plugins by name, in the order of the user.
        given: the loaders that the method was called with, by stage.
    """
    file = run.dir / "config.yaml"
    if file.exists() and run.work != "fit":  # an evaluation that goes on in the folder of its fit
        return
    options = {field.name: getattr(run.options, field.name) for field in dataclasses.fields(run.options) if field.name != "plugins"}
    lines = ["# written by torchplug; the command fit of torchplug-cli starts the same run again from it", *_section("trainer", options)]
    lines += _plugins(run, enabled)
    lines += _section("module", recipe(run.module))
    if run.datamodule is not None:
        lines += _section("data", recipe(run.datamodule))
    elif any(loaders is not None for loaders in given.values()):
        lines += _section("data", {UNWRITTEN: f"loaders that trainer.{run.work} was called with"})
    lines += _section("versions", {**versions(), **run.packages})
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _plugins(run: Run, enabled: Mapping[str, Any]) -> list[str]:
    accelerator, strategy, trace = run.options.accelerator, run.options.strategy, run.options.trace
    by_argument = {GPU if accelerator == "auto" else accelerator, strategy if isinstance(strategy, str) else next(iter(strategy))}
    by_argument |= {PROFILER} if trace is not None else set()
    by_argument -= mentioned(run.options.plugins or ())
    lines, aside = [], []
    for name, plugin in {**enabled, **run.plugins}.items():
        described = _options(plugin) if name in run.packages else recipe(plugin)
        if name not in enabled:
            aside.append(f"  # brought by {type(run.module).__name__}.configure_plugins(): {text({name: described})}")
        elif name.partition(":")[0] in by_argument:
            aside.append(f"  # named by accelerator, strategy or trace: {text({name: described})}")
        elif described:
            lines += [f"  - {key(name)}:", *(f"      {key(option)}: {text(value)}" for option, value in described.items())]
        else:
            lines.append(f"  - {key(name)}")
    return ["plugins:" if lines else "plugins: []", *lines, *aside]


def _section(name: str, values: Mapping[str, Any]) -> list[str]:
    return [f"{name}:" if values else f"{name}: {{}}", *(f"  {key(each)}: {text(value)}" for each, value in values.items())]


# ---------------------------------------------------------------------- what something was made of


def recipe(made: Any) -> dict[str, Any]:
    """Class path and arguments of an object: those that the command line was given, else what the object itself still knows of them.

    Of a dataclass these are its fields, of a module or data module the hyperparameters that it saved. An argument that is not known
    is there as `UNWRITTEN`: a run that silently took its default would be another run.
    """
    told: dict[str, Any] | None = getattr(made, "_recipe", None)
    return told if told is not None else {"class_path": _path(type(made)), "init_args": _arguments(made)}


def _options(plugin: Any) -> dict[str, Any]:
    """The options of a plugin, and what the user said about its errors."""
    if not dataclasses.is_dataclass(plugin):
        return {}
    options = {field.name: getattr(plugin, field.name, None) for field in dataclasses.fields(plugin) if field.init}
    return {**options, **{name: value for name, value in vars(plugin).items() if name == "on_error"}}


def _path(cls: type) -> Any:
    """``package.module.Class``, or ``folder/file.py:Class`` for a class in a script."""
    if "<locals>" in cls.__qualname__:
        return {UNWRITTEN: f"{cls.__qualname__} cannot be imported"}
    module = sys.modules.get(cls.__module__)
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    name = spec.name if cls.__module__ == "__main__" and spec is not None else cls.__module__
    if file is not None and "." not in name and "site-packages" not in file and Path(file).name != "__init__.py":
        here, there = Path.cwd(), Path(file).absolute()
        if name == "__main__" or (there.is_relative_to(here) and there.parent != here):
            return f"{there.relative_to(here) if there.is_relative_to(here) else there}:{cls.__qualname__}"
    return f"{name}.{cls.__qualname__}"


def _arguments(made: Any) -> dict[str, Any]:
    """The arguments of ``__init__``, as far as the object knows them."""
    if dataclasses.is_dataclass(made):
        return {field.name: getattr(made, field.name, UNSAVED) for field in dataclasses.fields(made) if field.init}
    saved: Mapping[str, Any] = getattr(made, "hparams", None) or {}
    if argument := getattr(made, "_hparams_argument", ""):  # they were given in one dict
        saved = {argument: dict(saved)}
    parameters = inspect.signature(type(made)).parameters.values()
    named = {each.name: saved.get(each.name, UNSAVED) for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    more = saved if any(each.kind is each.VAR_KEYWORD for each in parameters) else {}
    return {**more, **named}


# ---------------------------------------------------------------------- values as YAML, each on one line


def key(name: Any) -> str:
    """A key of a mapping: bare where every reader takes it for a text."""
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and name.lower() not in WORDS
    return str(name) if plain else text(name)


def text(value: Any) -> str:
    """``value`` as YAML that readers of YAML 1.1 and 1.2 understand alike; credentials in addresses are left out.

    An enum is its name, a time a text such as "90.0s", a dataclass or Namespace a mapping, anything unknown a mapping of `UNWRITTEN` to
    its ``repr``.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return _quoted(value.name)
    if isinstance(value, (str, PathLike)):
        return _quoted(discreet(str(fspath(value))))
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, timedelta):
        return _quoted(f"{value.total_seconds():f}".rstrip("0") + "0s")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key(name)}: {text(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(text(part) for part in value) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return text({field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init})
    if isinstance(value, Namespace):
        return text(vars(value))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of NumPy or torch
        return text(value.item())
    shown = " ".join(repr(value).split())
    return text({UNWRITTEN: shown if len(shown) <= 100 else shown[:97] + "..."})


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    digits, e, exponent = float.__repr__(value).partition("e")
    return digits + ("" if "." in digits else ".0") + e + exponent  # 1e-05 is a text for YAML 1.1, 1.0e-05 is a number


def _quoted(value: str) -> str:
    """In double quotes, with escapes for what YAML does not take as it is."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}

    def escaped(found: re.Match[str]) -> str:
        return escapes.get(found[0]) or (f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}")

    return '"' + re.sub('["\\\\\x00-\x1f\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]', escaped, value) + '"'
