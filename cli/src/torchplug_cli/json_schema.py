"""``torchplug schema``: the JSON Schema of a configuration file, made from the Trainer's arguments and the options of plugins."""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
import typing
from datetime import timedelta
from os import PathLike
from typing import Annotated, Any, Literal

from torchplug.discovery import Found, PluginError, discover
from torchplug.options import Range, default_of, documentation
from torchplug.settings import Settings
from torchplug_cli.reading import ON_ERROR

__all__ = ["config_schema"]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
OBJECT = {
    "type": "object",
    "properties": {
        "class_path": {"type": "string", "description": "package.module.Class, or folder/file.py:Class"},
        "init_args": {"type": ["object", "null"], "description": "the arguments of the class"},
    },
    "required": ["class_path"],
    "additionalProperties": False,
}
PLAIN = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", dict: "object", list: "array", tuple: "array"}


def config_schema() -> dict[str, Any]:
    """The schema. A plugin that cannot be imported takes anything in it, and is named on stderr."""
    plugins: dict[str, Any] = {}
    for found in discover():
        plugins.setdefault(found.name, _of_plugin(found))
    any_name = "|".join(plugins)
    listed = {
        "anyOf": [
            {"type": "string", "pattern": f"^([^/]+/)?({any_name})(:.+)?$"},
            {
                "type": "object",
                "minProperties": 1,
                "maxProperties": 1,
                "patternProperties": {f"^([^/]+/)?{name}(:.+)?$": {"$ref": f"#/$defs/{name}"} for name in plugins},
                "additionalProperties": {**OBJECT, "description": "a plugin of your own: a name for it, and where its class is"},
            },
        ]
    }
    return {
        "$schema": DRAFT,
        "title": "a configuration of torchplug",
        "type": "object",
        "properties": {
            "trainer": _of_fields(Settings, leave_out=("plugins",)) | {"description": "the arguments of Trainer"},
            "plugins": {"type": ["array", "null"], "items": listed, "description": documentation(Settings)["plugins"]},
            "module": OBJECT | {"description": "what to train"},
            "data": OBJECT | {"description": "a data module, or a function that returns loaders"},
            "ckpt_path": {"type": ["string", "null"], "description": "a checkpoint: a path, 'last' or 'best'"},
            "versions": {"type": "object", "description": "what a run was made with; written, not needed"},
        },
        "additionalProperties": False,
        "$defs": plugins,
    }


def _of_plugin(found: Found) -> dict[str, Any]:
    try:
        target = found.load()
        if isinstance(target, (list, tuple)):
            return {"type": ["object", "null"], "maxProperties": 0, "description": f"a bundle of {', '.join(map(str, target))}"}
        schema = _of_fields(target, more={"on_error": {"enum": ["abort", "disable"], "description": ON_ERROR}})
    except PluginError as error:
        print(f"torchplug schema: {error}", file=sys.stderr)
        return {"description": "cannot be imported here, so its options are not known"}
    return schema | {"description": (target.__doc__ or "").strip().partition("\n")[0]}


def _of_fields(cls: type, leave_out: tuple[str, ...] = (), more: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object whose properties are the fields of a dataclass."""
    if not dataclasses.is_dataclass(cls):
        return {"type": ["object", "null"]}
    texts, hints = documentation(cls), typing.get_type_hints(cls, include_extras=True)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        if not field.init or field.name.startswith("_") or field.name in leave_out:
            continue
        schema = _of_type(hints[field.name])
        default = default_of(field)
        if default is dataclasses.MISSING:
            required.append(field.name)
        elif (plain := _json(default)) is not dataclasses.MISSING:
            schema["default"] = plain
        properties[field.name] = schema | ({"description": texts[field.name]} if field.name in texts else {})
    whole: dict[str, Any] = {"type": "object", "properties": {**(more or {}), **properties}, "additionalProperties": False}
    if required:
        return whole | {"required": required}
    return whole if cls is Settings else whole | {"type": ["object", "null"]}


def _of_type(hint: Any, allowed: Range | None = None) -> dict[str, Any]:
    """The schema of an annotation; what a file cannot hold, such as a function, is left out of a union."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _of_type(arguments[0], next((each for each in arguments[1:] if isinstance(each, Range)), allowed))
    if origin in (typing.Union, types.UnionType):
        parts = [_of_type(each, allowed) for each in arguments if not _only_in_python(each)]
        unique = [each for number, each in enumerate(parts) if each not in parts[:number]]
        return unique[0] if len(unique) == 1 else {"anyOf": unique} if unique else {}
    if origin is Literal:
        return {"enum": list(arguments)}
    if hint in (int, float):
        return {"type": PLAIN[hint]} | ({} if allowed is None else {"exclusiveMinimum" if allowed.open else "minimum": allowed.low})
    if origin in (list, tuple):
        inner = [each for each in arguments if each is not ...]
        return {"type": "array"} | ({"items": _of_type(inner[0])} if inner and (origin is list or len(inner) == 1) else {})
    if origin is dict:
        of_texts = arguments and arguments[0] is str
        return {"type": "object"} | ({"additionalProperties": _of_type(arguments[1])} if of_texts else {})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [each.name for each in hint]}
    if hint is None or hint in PLAIN:
        return {"type": PLAIN[hint if hint is not None else type(None)]}
    return {"type": "string"} if _is_path(hint) or hint is timedelta else {}


def _only_in_python(hint: Any) -> bool:
    """Whether a value of this kind has no form in a file of its own; a path and a time are texts there."""
    return hint is timedelta or (typing.get_origin(hint) is not None and not _is_known(typing.get_origin(hint)) and not _is_path(hint))


def _is_known(origin: Any) -> bool:
    return origin in (list, tuple, dict, Literal, Annotated, typing.Union, types.UnionType)


def _is_path(hint: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    return isinstance(kind, type) and issubclass(kind, PathLike)


def _json(value: Any) -> Any:
    """A default as JSON; MISSING where it has no such form."""
    if isinstance(value, (list, tuple)):
        parts = [_json(each) for each in value]
        return dataclasses.MISSING if dataclasses.MISSING in parts else parts
    if isinstance(value, dict):
        return {str(name): _json(each) for name, each in value.items()}
    return value if value is None or isinstance(value, (str, int, float, bool)) else dataclasses.MISSING
