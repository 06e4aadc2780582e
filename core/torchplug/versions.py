"""Which versions a requirement allows, by PEP 440: enough to say whether an installed plugin was made for this core."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["allows"]

_VERSION = re.compile(
    r"v?(?:(?P<epoch>\d+)!)?(?P<release>\d+(?:\.\d+)*)"
    r"(?:[-_.]?(?P<pre>alpha|a|beta|b|preview|pre|c|rc)[-_.]?(?P<pre_n>\d*))?"
    r"(?:-(?P<implicit>\d+)|[-_.]?(?P<post>post|rev|r)[-_.]?(?P<post_n>\d*))?"
    r"(?:[-_.]?(?P<dev>dev)[-_.]?(?P<dev_n>\d*))?"
    r"(?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?"
)
_CLAUSE = re.compile(r"(~=|===?|!=|<=|>=|<|>)\s*(\S+)")
_PRE = {"a": 0, "alpha": 0, "b": 1, "beta": 1, "c": 2, "rc": 2, "pre": 2, "preview": 2}


class _Version:
    """A version and its place among the others.

    Raises:
        ValueError: it is not written as PEP 440 says.
    """

    def __init__(self, text: str) -> None:
        found = _VERSION.fullmatch(text.strip().lower())
        if found is None:
            raise ValueError(f"{text!r} is not a version")
        self.epoch, self.local = int(found["epoch"] or 0), found["local"] or ""
        self.release = tuple(int(part) for part in found["release"].split("."))
        self.pre = (_PRE[found["pre"]], int(found["pre_n"] or 0)) if found["pre"] else None
        self.post = int(found["implicit"] or found["post_n"] or 0) if found["implicit"] or found["post"] else None
        self.dev = int(found["dev_n"] or 0) if found["dev"] else None

    @property
    def base(self) -> tuple[Any, ...]:
        """Epoch and release: 1.0 and 1.0.0 are the same."""
        release = list(self.release)
        while release and release[-1] == 0:
            release.pop()
        return self.epoch, tuple(release)

    @property
    def public(self) -> tuple[Any, ...]:
        """The order of versions, the local part left out: dev, alpha, beta, candidate, the release, post."""
        bare = self.pre is None and self.post is None
        pre = (-1,) if bare and self.dev is not None else (3,) if self.pre is None else self.pre
        return *self.base, pre, -1 if self.post is None else self.post, (1,) if self.dev is None else (0, self.dev)


def allows(requirement: str, version: str) -> bool:
    """Whether ``version`` is among those that ``requirement`` names, such as ``">=0.1,<0.2"``; pre-releases count as any other.

    Raises:
        ValueError: one of the two is not written as PEP 440 says.
    """
    mine = _Version(version)
    clauses = [clause.strip() for clause in requirement.split(",") if clause.strip()]
    return all(_holds(clause, version, mine) for clause in clauses)


def _holds(clause: str, text: str, mine: _Version) -> bool:
    found = _CLAUSE.fullmatch(clause)
    if found is None:
        raise ValueError(f"{clause!r} is not a requirement on a version")
    operator, wanted = found.groups()
    if operator == "===":
        return text.strip().lower() == wanted.lower()
    if wanted.endswith(".*"):
        if operator not in ("==", "!="):
            raise ValueError(f"{clause!r}: only == and != take .*")
        return _begins(mine, _Version(wanted[:-2])) == (operator == "==")
    other = _Version(wanted)
    if operator == "~=":
        if len(other.release) < 2:
            raise ValueError(f"{clause!r}: ~= needs two numbers at least")
        return mine.public >= other.public and mine.epoch == other.epoch and _padded(mine, len(other.release) - 1) == other.release[:-1]
    if operator in ("==", "!="):
        same = mine.public == other.public and (not other.local or mine.local == other.local)
        return same == (operator == "==")
    if operator == "<":  # 0.2rc1 is not below 0.2, unless a pre-release was asked for
        early = mine.pre is not None or mine.dev is not None
        of_it = mine.base == other.base and other.pre is None and other.post is None and other.dev is None
        return mine.public < other.public and not (early and of_it)
    if operator == ">":
        of_it = (mine.base, mine.pre) == (other.base, other.pre) and other.dev is None
        return mine.public > other.public and not (mine.post is not None and other.post is None and of_it)
    return mine.public <= other.public if operator == "<=" else mine.public >= other.public


def _padded(version: _Version, length: int) -> tuple[int, ...]:
    return (version.release + (0,) * length)[:length]


def _begins(version: _Version, start: _Version) -> bool:
    """Whether ``start``, with its pre- and post-release if it has them, is how ``version`` begins."""
    if version.epoch != start.epoch or _padded(version, len(start.release)) != start.release:
        return False
    if start.pre is not None and version.pre != start.pre:
        return False
    return start.post is None or version.post == start.post
