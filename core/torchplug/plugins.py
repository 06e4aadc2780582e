"""From names to plugins: find them, build them from options.

Only what is named is imported. How to write a plugin: one class with a few
``@hookimpl`` methods, its options as dataclass fields, and an entry point in the group ``torchplug``.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from torchplug.discovery import BUNDLE, SWITCH, Catalogue, Found, PluginError, bare, find, installed
from torchplug.lock import Lock
from torchplug.members import Member
from torchplug.options import check_fields, check_values, closest, fields_of
from torchplug.settings import Settings

__all__ = ["GPU", "PROFILER", "build", "build_one", "mentioned", "named"]

logger = logging.getLogger("torchplug")

GPU = "gpu"  # what accelerator="auto" takes where there is a device
MUTABLE = (list, dict, set, bytearray, torch.Tensor)
PROFILER = "profiler"  # what trace= takes


def named(options: Settings) -> list[Any]:
    """What the user named in ``plugins``, and before it what ``accelerator``, ``strategy`` and ``trace`` name."""
    if bare():
        left_out = [
            f"{name}={getattr(options, name)!r}" for name in ("plugins", "accelerator", "strategy", "devices", "num_nodes", "trace")
            if getattr(options, name) != getattr(Settings, name)
        ]  # fmt: skip
        logger.warning(
            "%s=none: runs in one process on the CPU without plugins%s", SWITCH, ", not with " * bool(left_out) + ", ".join(left_out)
        )
        return []
    listed = options.plugins
    if listed is None:
        listed = [BUNDLE] if installed(BUNDLE) else []
        if not listed:
            logger.info("trains without plugins: pip install torchplug-%s for progress, checkpoints and logs", BUNDLE)
    first: list[Any] = [*_accelerator(options), *_strategy(options)]
    known = mentioned(listed)
    if options.trace is not None:
        _require("trace", options.trace, PROFILER)
        if PROFILER in known:
            raise PluginError(
                f"trace={options.trace!r} takes the plugin {PROFILER!r}, which plugins names too: "
                f"write {{{PROFILER!r}: {{'timeline': {str(options.trace)!r}}}}} there, without trace"
            )
        first.append({PROFILER: {"timeline": os.path.abspath(options.trace)}})
    return [each for each in first if (each if isinstance(each, str) else next(iter(each))) not in known] + list(listed)


def _accelerator(options: Settings) -> list[Any]:
    there = torch.cuda.is_available() or torch.backends.mps.is_available()
    if options.accelerator not in ("auto", "cpu"):
        _require("accelerator", options.accelerator, options.accelerator)
        return [options.accelerator]
    if there and options.accelerator == "cpu":
        logger.info("a GPU is there and not used: write accelerator='auto' to use it")
    elif there and not installed(GPU):
        logger.info("a GPU is there and not used: pip install torchplug-%s", GPU)
    elif there:
        return [GPU]
    return []


def _strategy(options: Settings) -> list[Any]:
    devices, strategy = options.devices, options.strategy
    if strategy != "auto":
        name = next(iter(strategy)) if isinstance(strategy, dict) else strategy
        _require("strategy", name, name)
        return [strategy]
    if options.num_nodes > 1 or (isinstance(devices, int) and devices > 1) or (isinstance(devices, list) and len(devices) > 1):
        raise ValueError(
            f"devices={devices!r}, num_nodes={options.num_nodes} take several processes: name a strategy, such as strategy='ddp'"
        )
    return []


def _require(argument: str, value: Any, name: str) -> None:
    """Refuses an argument that names no installed plugin, before a message that speaks of plugins alone."""
    try:
        find(name)
    except PluginError as error:
        raise PluginError(f"{argument}={value!r}: {error}") from None


def build(named: Sequence[Any], lock: Lock | None = None) -> list[Member]:
    """Members from what a user wrote: names, mappings name -> options, and objects.

    A bundle is opened; a plugin in it gives way where the user names the same plugin too, with options for example. What a plugin
    ``requires``, a tuple of names, is added with its default options where the user has not named it.

    Raises:
        PluginError: a name, option or object that cannot be used, or a package that is not the locked one.
    """
    builder = _Builder(named, lock)
    for each in named:
        builder.add_any(each)
    builder.add_required()
    return list(builder.members.values())


class _Builder:
    """Makes members of plugins, one after the other."""

    def __init__(self, named: Sequence[Any], lock: Lock | None) -> None:
        self.catalogue, self.lock = Catalogue(), lock
        self.directly = mentioned(named, self.catalogue)
        self.members: dict[str, Member] = {}

    def add_any(self, each: Any) -> None:
        """A plugin in one of the three ways in which a user writes it."""
        if isinstance(each, str):
            self.add_named(each, {})
        elif isinstance(each, Mapping):
            if len(each) != 1:
                raise PluginError(f"plugins takes names, {{name: options}} with one name each, and objects, got {dict(each)!r}")
            name, options = next(iter(each.items()))
            if not isinstance(name, str):
                raise PluginError(f"plugins takes {{name: options}}, got {name!r} as a name")
            self.add_named(name, {} if options is None else options)
        else:
            if inspect.isclass(each):
                raise PluginError(f"plugin {each.__name__}: got the class, have you forgotten the ()?")
            _require_object(each)
            found = self._origin(each)
            self._add(found.name if found else _snake(type(each).__name__), each, found)

    def add_named(self, name: str, options: Any) -> None:
        """A plugin by its name, with options or as the object itself; those of a bundle, where it is one."""
        base, _, instance = name.partition(":")
        if not isinstance(options, Mapping):  # {"name": object}
            if type(options).__module__ == "builtins" and not inspect.isclass(options):
                raise PluginError(f"plugin {name!r}: its options must be a mapping such as {{'option': value}}, got {options!r}")
            self._add(name, options, self._origin(options))
            return
        found = self.catalogue.find(base)
        self._check(found)
        target = found.load()
        if isinstance(target, (list, tuple)):
            if options:
                raise PluginError(
                    f"plugin {base!r} is a bundle of {', '.join(map(str, target))} and takes no options; name its plugins instead"
                )
            for each in target:
                if str(each) not in self.directly:
                    self.add_any(each)
            return
        own = found.name + (f":{instance}" if instance else "")
        self._add(own, build_one(own, found, target, dict(options)), found)

    def add_required(self) -> None:
        """What those that are there require, and what that requires."""
        waiting = list(self.members.values())
        while waiting:
            member = waiting.pop(0)
            for name in getattr(member.plugin, "requires", ()):
                if name not in {other.base for other in self.members.values()}:
                    try:
                        self.add_named(name, {})
                    except PluginError as error:
                        raise PluginError(f"{member.label} requires the plugin {name!r}: {error}") from error
                    self.members[name].rule = f"required by {member.name}"
                    waiting.append(self.members[name])

    def _add(self, name: str, plugin: Any, found: Found | None) -> None:
        if name in self.members:
            raise PluginError(
                f"{self.members[name].label}: named twice; give the instances names of their own: {{'{name}:a': ...}}, {{'{name}:b': ...}}"
            )
        distribution, version = (found.distribution, found.version) if found else ("", "")
        self.members[name] = Member(name, plugin, distribution=distribution, version=version)

    def _origin(self, plugin: Any) -> Found | None:
        found = self.catalogue.origin(plugin)
        if found:
            self._check(found)
        return found

    def _check(self, found: Found) -> None:
        found.check_version()
        if self.lock is not None:
            self.lock.check(found)


def _require_object(plugin: Any) -> None:
    if type(plugin).__module__ == "builtins" and not inspect.isclass(plugin):  # a class has an error of its own
        raise PluginError(f"plugins takes names, {{name: options}}, and objects with hooks, got {plugin!r}")


def mentioned(named: Sequence[Any], catalogue: Catalogue | None = None) -> set[str]:
    """The plugins that the user names directly, whatever their instances are called."""
    catalogue = catalogue or Catalogue()
    names: set[str] = set()
    for each in named:
        if isinstance(each, (str, Mapping)):
            names.update(str(key).rpartition("/")[2].partition(":")[0] for key in ([each] if isinstance(each, str) else each))
        elif found := catalogue.origin(each):
            names.add(found.name)
    return names


def build_one(name: str, found: Found, cls: Any, options: dict[str, Any]) -> Any:
    """An instance from options, with every mistake in them named."""
    label = found._replace(name=name).label
    if not inspect.isclass(cls):
        raise PluginError(f"{label}: its entry point {found.value} must be a class or a list of names, got {type(cls).__name__}")
    try:
        policy = None if "on_error" in getattr(cls, "__dataclass_fields__", {}) else options.pop("on_error", None)
        _check_names(name, cls, options)
        plugin: Any = cls(**options)
        if dataclasses.is_dataclass(plugin):
            check_fields(plugin)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{label}: {_wrong_type(cls, options, str(error)) or error}") from error
    if policy is not None:
        plugin.on_error = policy
    return plugin


def _check_names(name: str, cls: Any, options: Mapping[str, Any]) -> None:
    """Refuses options that are not there, those that are missing, and defaults that are one object for all instances."""
    known = {field.name: field for field in fields_of(cls)}
    for option in options:
        if dataclasses.is_dataclass(cls) and option not in known:
            listed = ", ".join([*known, "on_error"]) if known else "none but on_error"
            raise TypeError(f"no option {option!r}{closest(option, known)} (options: {listed})")
    for option, field in known.items():
        if field.default == "required" and option not in options:
            raise TypeError(f"option {option!r} must be given, as in {{{name!r}: {{{option!r}: ...}}}}; {field.text}".rstrip("; ."))
    for option, default in _defaults(cls):
        if isinstance(default, MUTABLE):
            raise TypeError(
                f"the default of option {option!r} is one {type(default).__name__} that all instances would share; "
                "write field(default_factory=...)"
            )


def _wrong_type(cls: type, options: Mapping[str, Any], said: str) -> str:
    """Which option has a wrong type, where the plugin used it before it knew, and what it ``said`` names none."""
    if dataclasses.is_dataclass(cls) and not any(name in said for name in options):
        try:
            check_values(cls, options)
        except TypeError as error:
            return str(error)
    return ""


def _defaults(cls: type) -> Iterator[tuple[str, Any]]:
    """The options of a plugin and what is in them if nobody says; left out is what is made anew each time."""
    if not dataclasses.is_dataclass(cls):
        yield from ((name, parameter.default) for name, parameter in inspect.signature(cls).parameters.items())
        return
    for field in dataclasses.fields(cls):
        if field.default_factory is dataclasses.MISSING:
            yield field.name, field.default
        elif (default := field.default_factory()) is field.default_factory():
            yield field.name, default


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
