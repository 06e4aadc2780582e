"""From names to plugins: find them by entry point, build them from options, put them in order.

Discovery reads metadata alone; only what is named is imported. How to write a plugin: one class with a few
``@hookimpl`` methods, its options as dataclass fields, and an entry point in the group ``torchplug``.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torchplug.members import Member, PluginError
from torchplug.options import check_fields, closest, fields_of

__all__ = ["Found", "build", "discover", "find", "installed", "mentioned", "order"]

GROUP = "torchplug"
BUNDLE = "standard"  # what Trainer() takes when no plugins are named
GPU = "gpu"  # what accelerator="auto" takes where there is a device


@dataclasses.dataclass(frozen=True)
class Found:
    """An installed plugin, known from metadata; `load` imports it."""

    name: str
    value: str
    entry: importlib.metadata.EntryPoint
    distribution: str
    version: str

    def load(self) -> Any:
        """The plugin's class, or the list of a bundle."""
        try:
            return self.entry.load()
        except Exception as error:
            raise PluginError(
                f"plugin {self.name!r} ({self.distribution} {self.version}): {self.value} cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error


def discover() -> list[Found]:
    """All installed plugins, sorted by name; nothing is imported."""
    found = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        distribution = entry.dist
        name, version = (distribution.name, distribution.version) if distribution else ("", "")
        found.append(Found(entry.name, entry.value, entry, name, version))
    unique = {(each.name, each.distribution, each.value): each for each in found}
    return sorted(unique.values(), key=lambda each: (each.name, each.distribution))


class _Catalogue:
    """What is installed, read once and only if a name has to be looked up."""

    @cached_property
    def found(self) -> list[Found]:
        return discover()

    def find(self, name: str) -> Found:
        """The plugin ``name``, or ``distribution/name``.

        Raises:
            PluginError: it is not installed, or several packages have it.
        """
        distribution, _, plain = name.rpartition("/")
        hits = [each for each in self.found if each.name == plain and (not distribution or each.distribution == distribution)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            both = " and ".join(f"{each.distribution} {each.version}" for each in hits)
            raise PluginError(f"plugin {plain!r} is provided by {both}: write {hits[0].distribution + '/' + plain!r} to take the first")
        package = "torchplug-" + plain.replace("_", "-")
        meant = closest(plain, [each.name for each in self.found])
        installed = ", ".join(each.name for each in self.found) or "none"
        raise PluginError(
            f"plugin {name!r} is not installed{meant or '.'} If it is a package of its own: pip install {package} "
            f"(installed plugins: {installed})"
        )

    def origin(self, plugin: Any) -> Found | None:
        """The entry point of a plugin that was given as an object."""
        value = f"{type(plugin).__module__}:{type(plugin).__qualname__}"
        return next((each for each in self.found if each.value.replace(" ", "") == value), None)


def installed(name: str) -> bool:
    """Whether a plugin of this name is installed; its module is not imported."""
    return any(entry.name == name for entry in importlib.metadata.entry_points(group=GROUP))


def find(name: str) -> Found:
    """The installed plugin ``name``; raises `PluginError` with what to do if there is none."""
    return _Catalogue().find(name)


def build(named: Sequence[Any]) -> list[Member]:
    """Members from what a user wrote: names, mappings name -> options, and objects.

    A bundle is opened; a plugin in it gives way where the user names the same plugin too, with options for example. What a plugin
    ``requires``, a tuple of names, is added with its default options where the user has not named it.

    Raises:
        PluginError: a name, option or object that cannot be used.
    """
    catalogue = _Catalogue()
    directly = mentioned(named, catalogue)
    members: dict[str, Member] = {}

    def add(name: str, plugin: Any, found: Found | None) -> None:
        if name in members:
            raise PluginError(
                f"{members[name].label}: named twice; give the instances names of their own: "
                f"{{'{name}:a': {{...}}}}, {{'{name}:b': {{...}}}}"
            )
        distribution, version = (found.distribution, found.version) if found else ("", "")
        members[name] = Member(name, plugin, distribution=distribution, version=version)

    def add_named(name: str, options: Any) -> None:
        base, _, instance = name.partition(":")
        if not isinstance(options, Mapping):  # {"name": object}
            _require_object(options)
            add(name, options, catalogue.origin(options))
            return
        found = catalogue.find(base)
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
            found = catalogue.origin(each)
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


def mentioned(named: Sequence[Any], catalogue: _Catalogue | None = None) -> set[str]:
    """The plugins that the user names directly, whatever their instances are called."""
    catalogue = catalogue or _Catalogue()
    names: set[str] = set()
    for each in named:
        if isinstance(each, (str, Mapping)):
            names.update(str(key).rpartition("/")[2].partition(":")[0] for key in ([each] if isinstance(each, str) else each))
        elif found := catalogue.origin(each):
            names.add(found.name)
    return names


def _build_one(name: str, found: Found, cls: Any, options: dict[str, Any]) -> Any:
    """An instance from options, with every mistake in them named."""
    label = f"plugin {name!r} ({found.distribution} {found.version})"
    if not inspect.isclass(cls):
        raise PluginError(f"{label}: its entry point {found.value} must be a class or a list of names, got {type(cls).__name__}")
    known = [field.name for field in fields_of(cls)]
    policy = None if "on_error" in known else options.pop("on_error", None)
    if dataclasses.is_dataclass(cls):
        for option in options:
            if option not in known:
                listed = ", ".join([*known, "on_error"]) if known else "none but on_error"
                raise PluginError(f"{label}: no option {option!r}{closest(option, known)} (options: {listed})")
    try:
        plugin: Any = cls(**options)
        if dataclasses.is_dataclass(plugin):
            check_fields(plugin)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{label}: {error}") from error
    if policy is not None:
        plugin.on_error = policy
    return plugin


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
