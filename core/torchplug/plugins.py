"""From names to plugins: build them from options, put them in order.

Only what is named is imported. How to write a plugin: one class with a few
``@hookimpl`` methods, its options as dataclass fields, and an entry point in the group ``torchplug``.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
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

__all__ = ["build", "mentioned", "named", "order"]

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
    catalogue = Catalogue()
    directly = mentioned(named, catalogue)
    members: dict[str, Member] = {}

    def check(found: Found) -> None:
        found.check_version()
        if lock is not None:
            lock.check(found)

    def origin(plugin: Any) -> Found | None:
        found = catalogue.origin(plugin)
        if found:
            check(found)
        return found

    def add(name: str, plugin: Any, found: Found | None) -> None:
        if name in members:
            raise PluginError(
                f"{members[name].label}: named twice; give the instances names of their own: {{'{name}:a': ...}}, {{'{name}:b': ...}}"
            )
        distribution, version = (found.distribution, found.version) if found else ("", "")
        members[name] = Member(name, plugin, distribution=distribution, version=version)

    def add_named(name: str, options: Any) -> None:
        base, _, instance = name.partition(":")
        if not isinstance(options, Mapping):  # {"name": object}
            if type(options).__module__ == "builtins" and not inspect.isclass(options):
                raise PluginError(f"plugin {name!r}: its options must be a mapping such as {{'option': value}}, got {options!r}")
            add(name, options, origin(options))
            return
        found = catalogue.find(base)
        check(found)
        target = found.load()
        if isinstance(target, (list, tuple)):
            if options:
                raise PluginError(
                    f"plugin {base!r} is a bundle of {', '.join(map(str, target))} and takes no options; name its plugins instead"
                )
            for each in target:
                if str(each) not in directly:
                    add_any(each)
            return
        own = found.name + (f":{instance}" if instance else "")
        add(own, _build_one(own, found, target, dict(options)), found)

    def add_any(each: Any) -> None:
        if isinstance(each, str):
            add_named(each, {})
        elif isinstance(each, Mapping):
            if len(each) != 1:
                raise PluginError(f"plugins takes names, {{name: options}} with one name each, and objects, got {dict(each)!r}")
            name, options = next(iter(each.items()))
            if not isinstance(name, str):
                raise PluginError(f"plugins takes {{name: options}}, got {name!r} as a name")
            add_named(name, {} if options is None else options)
        else:
            if inspect.isclass(each):
                raise PluginError(f"plugin {each.__name__}: got the class, have you forgotten the ()?")
            _require_object(each)
            found = origin(each)
            add(found.name if found else _snake(type(each).__name__), each, found)

    for each in named:
        add_any(each)
    waiting = list(members.values())
    while waiting:
        member = waiting.pop(0)
        for name in getattr(member.plugin, "requires", ()):
            if name not in {other.base for other in members.values()}:
                try:
                    add_named(name, {})
                except PluginError as error:
                    raise PluginError(f"{member.label} requires the plugin {name!r}: {error}") from error
                members[name].rule = f"required by {member.name}"
                waiting.append(members[name])
    return list(members.values())


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


def _build_one(name: str, found: Found, cls: Any, options: dict[str, Any]) -> Any:
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


def order(members: Sequence[Member]) -> list[Member]:
    """The one order in which plugins are called: by their ``before`` and ``after``, else as the user wrote them.

    Raises:
        PluginError: the wishes form a cycle, which is printed.
    """
    earlier: dict[str, dict[str, str]] = {member.name: {} for member in members}  # name -> who comes before it, and why
    for member in members:
        for names, mine in (("after", True), ("before", False)):
            for other in _meant(member, names, members):
                first, second = (other, member) if mine else (member, other)
                earlier[second.name][first.name] = f"{names}={_shown(member, names)} of {member.name}"
    for member in members:  # "*" gives way to what others ask for by name, however indirectly
        for names, mine in (("after", True), ("before", False)):
            if "*" not in _wishes(member, names):
                continue
            for other in members:
                first, second = (other, member) if mine else (member, other)
                if other is not member and "*" not in _wishes(other, names) and not _reaches(second.name, first.name, earlier):
                    earlier[second.name].setdefault(first.name, f"{names}='*' of {member.name}")
    placed: list[Member] = []
    waiting = list(members)
    while waiting:
        done = {member.name for member in placed}
        ready = next((member for member in waiting if earlier[member.name].keys() <= done), None)
        if ready is None:
            raise PluginError(f"plugins ask for an order that cannot be: {_cycle(waiting, earlier)}")
        ready.rule = "; ".join(sorted(set(earlier[ready.name].values()))) or ready.rule
        placed.append(ready)
        waiting.remove(ready)
    return placed


def _reaches(start: str, end: str, earlier: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether ``start`` has to come before ``end``."""
    waiting = [end]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name == start:
            return True
        if name not in seen:
            seen.add(name)
            waiting.extend(earlier[name])
    return False


def _wishes(member: Member, which: str) -> tuple[str, ...]:
    wishes = getattr(member.plugin, which, ())
    wishes = (wishes,) if isinstance(wishes, str) else wishes
    if not isinstance(wishes, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in wishes):
        raise PluginError(f"{member.label}: {which} must be a name or several, got {wishes!r}")
    return tuple(wishes)


def _shown(member: Member, which: str) -> str:
    return ",".join(repr(name) for name in _wishes(member, which))


def _meant(member: Member, which: str, members: Sequence[Member]) -> list[Member]:
    """The enabled members that ``before`` or ``after`` names; absent ones are ignored."""
    wishes = set(_wishes(member, which)) - {"*"}
    return [other for other in members if other is not member and (other.name in wishes or other.base in wishes)]


def _cycle(waiting: Sequence[Member], earlier: Mapping[str, Mapping[str, str]]) -> str:
    """One cycle among those that wait, as a chain of names with the wishes that make it."""
    names = {member.name for member in waiting}
    path = [waiting[0].name]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in earlier[path[-1]] if name in names))
    path = path[path.index(path[-1]) :][::-1]
    wishes = [earlier[second][first] for first, second in itertools.pairwise(path)]
    return " -> ".join(path) + f" ({'; '.join(dict.fromkeys(wishes))})"
