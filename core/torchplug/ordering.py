"""The one order in which plugins are called, from what they say of each other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from torchplug.discovery import PluginError
from torchplug.members import Member

__all__ = ["order"]


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
                earlier[second.name][first.name] = f"{member.name} says {names}={_shown(member, names)}"
    for member in members:  # "*" gives way to what others ask for by name, however indirectly
        for names, mine in (("after", True), ("before", False)):
            if "*" not in _wishes(member, names):
                continue
            for other in members:
                first, second = (other, member) if mine else (member, other)
                if other is not member and "*" not in _wishes(other, names) and not _reaches(second.name, first.name, earlier):
                    earlier[second.name].setdefault(first.name, f"{member.name} says {names}='*'")
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
