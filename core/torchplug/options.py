"""Options as dataclass fields: checked against their annotations, documented by the class's docstring."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

__all__ = [
    "Range",
    "above",
    "at_least",
    "check_fields",
    "check_values",
    "closest",
    "default_of",
    "discreet",
    "documentation",
    "duration",
    "fields_of",
]


@dataclass(frozen=True)
class Range:
    """The numbers that an option may take, as part of its annotation: ``Annotated[int, at_least(1)]``."""

    low: float
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return value > self.low if self.open else value >= self.low

    def __str__(self) -> str:
        return f"above {self.low:g}" if self.open else f"at least {self.low:g}"


def at_least(low: float) -> Range:
    """Numbers from ``low`` on."""
    return Range(low)


def above(low: float) -> Range:
    """Numbers greater than ``low``."""
    return Range(low, open=True)


@dataclass(frozen=True)
class Field:
    """One option as a reader sees it."""

    name: str
    type: str
    range: str
    default: str
    text: str

    def __str__(self) -> str:
        allowed = f" ({self.range})" if self.range else ""
        default = "required" if self.default == "required" else f"default {self.default}"
        return f"{self.name}: {self.type}{allowed}, {default}. {self.text}"


def closest(word: str, words: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` when one of ``words`` is near to ``word``, else an empty string."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def discreet(text: str) -> str:
    """``text`` without the name and password of an address in it, for what is written down."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


def check_fields(instance: Any) -> None:
    """Checks every field of a dataclass instance against its annotation.

    Raises:
        TypeError: a value of another type, named with the types that are possible.
        ValueError: a number out of range or a word that is not among the choices.
    """
    check_values(type(instance), {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)})


def check_values(cls: type, values: Mapping[str, Any]) -> None:
    """The same for values of which an instance is to be made."""
    hints = _hints(cls)
    for name, value in values.items():
        hint = hints[name]
        if not _fits(value, hint):
            kind = ValueError if _is_choice(value, hint) else TypeError
            raise kind(f"{name} must be {_words(hint)}, got {value!r}")
        for part in _parts(hint):
            if isinstance(part[1], Range) and _fits(value, part[0]) and value is not None and value not in part[1]:
                raise ValueError(f"{name} must be {part[1]}, got {value!r}")


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"the annotation of an option of {cls.__name__} names {error.name!r}, which is not there when the program runs: import it "
            "outside of TYPE_CHECKING"
        ) from None


def _parts(hint: Any) -> list[tuple[Any, Range | None]]:
    """The members of a union, each with its range."""
    if typing.get_origin(hint) is typing.Annotated:
        inner, *extras = typing.get_args(hint)
        allowed = next((extra for extra in extras if isinstance(extra, Range)), None)
        return [(member, allowed) for member, _ in _parts(inner)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(hint) for part in _parts(member)]
    return [(hint, None)]


def _fits(value: Any, hint: Any) -> bool:
    return any(_is_a(value, part) for part, _ in _parts(hint))


def _is_a(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if origin in (list, tuple, dict):
        return isinstance(value, origin)
    target = origin or hint
    return isinstance(value, target) if isinstance(target, type) else True


def _is_choice(value: Any, hint: Any) -> bool:
    choices = [part for part, _ in _parts(hint) if typing.get_origin(part) is typing.Literal]
    return any(type(value) is type(choice) for part in choices for choice in typing.get_args(part))


def _words(hint: Any) -> str:
    """An annotation in words: ``int | None`` is "an int or None"."""
    words = []
    for part, allowed in _parts(hint):
        if typing.get_origin(part) is typing.Literal:
            words += [repr(choice) for choice in typing.get_args(part)]
            continue
        if part is type(None):
            words.append("None")
            continue
        name = getattr(part, "__name__", str(part))
        words.append(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" + (f" ({allowed})" if allowed else ""))
    return " or ".join(dict.fromkeys(words))


def documentation(cls: type) -> dict[str, str]:
    """The text of each option in the ``Args:`` section of a class's docstring (Google style)."""
    texts: dict[str, str] = {}
    docstring = cls.__doc__ or ""
    section = re.search(r"^ *Args:\n(.*?)(?=^ *[A-Z]\w+:\n|\Z)", docstring, re.DOTALL | re.MULTILINE)
    lines = section.group(1).splitlines() if section else []
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    name = ""
    for line in lines:
        start = re.match(rf" {{{indent}}}(\w+): *(.*)", line)
        if start:
            name = start.group(1)
            texts[name] = start.group(2).strip()
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return texts


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass's field, made anew where a factory makes it; MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def fields_of(cls: type) -> list[Field]:
    """The options of a plugin or of the Trainer: public dataclass fields with type, range, default and text."""
    if not dataclasses.is_dataclass(cls):
        return []
    texts, hints = documentation(cls), _hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        if not field.init or field.name.startswith("_"):
            continue
        default = default_of(field)
        ranges = [str(allowed) for _, allowed in _parts(hints[field.name]) if allowed]
        names = [str(part) if typing.get_origin(part) else getattr(part, "__name__", str(part)) for part, _ in _parts(hints[field.name])]
        kinds = " | ".join(dict.fromkeys(name.replace("NoneType", "None").replace("typing.", "") for name in names))
        shown = "required" if default is dataclasses.MISSING else repr(default)
        found.append(Field(field.name, kinds, ", ".join(dict.fromkeys(ranges)), shown, texts.get(field.name, "")))
    return found


_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(name: str, value: Any) -> float:
    """A time in seconds, from ``"10s"``, ``"1h30m"``, ``"DD:HH:MM:SS"``, a timedelta or a dict of its arguments.

    Raises:
        ValueError: ``value`` is none of these, or not above 0; the message begins with ``name``.
    """
    seconds = None
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, Mapping):
        try:
            seconds = timedelta(**value).total_seconds()
        except TypeError:
            seconds = None
    elif not isinstance(value, str):
        pass
    elif re.fullmatch(r"\d+(:\d+){3}", value):
        days, hours, minutes, rest = (int(part) for part in value.split(":"))
        seconds = timedelta(days=days, hours=hours, minutes=minutes, seconds=rest).total_seconds()
    elif re.fullmatch(r"(\d+(\.\d+)?(ms|[smhd]))+", value):
        seconds = sum(float(n) * _UNITS[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|[smhd])", value))
    if seconds is None or seconds <= 0:
        raise ValueError(
            f"{name} must be a time above 0 such as '10s', '1h30m', '00:12:00:00' (days:hours:minutes:seconds), "
            f"a timedelta or a dict of its arguments, got {value!r}"
        )
    return seconds
