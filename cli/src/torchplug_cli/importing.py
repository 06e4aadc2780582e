"""What a ``class_path`` names: a class or function in a module, or in a file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torchplug.options import closest
from torchplug_cli.reading import ConfigError

__all__ = ["importable", "target"]


def target(path: str, where: str) -> Any:
    """What ``package.module.Class`` or ``folder/file.py:Class`` names; the current directory can be imported from.

    Raises:
        ConfigError: there is no such file, module or name in it.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    file, _, names = path.rpartition(":")
    if file.endswith(".py"):
        found = _script(file, where)
        for part in names.split("."):
            found = getattr(found, part) if hasattr(found, part) else _missing(found, part, path, where)
        return found
    first, *parts = path.replace(":", ".").split(".")
    if not first or not parts or not all(parts):
        raise ConfigError(f"{where} must be 'package.module.Class' or 'folder/file.py:Class', got {path!r}")
    found, module = _module(first), first
    if found is None:
        raise ConfigError(f"{where}: {path!r} cannot be imported, there is no module {first!r}")
    for part in parts:
        module = f"{module}.{part}"
        found = getattr(found, part) if hasattr(found, part) else _module(module) or _missing(found, part, path, where)
    return found


def _module(name: str) -> Any:
    """The module ``name``, or None where there is none; what it raises when it is imported is raised here."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not str(error).endswith("is not a package"):
            raise  # what the user's module wants to import is not there
        return None


def _missing(found: Any, part: str, path: str, where: str) -> Any:
    there = [each for each in dir(found) if not each.startswith("_")]
    raise ConfigError(f"{where}: {path!r} cannot be imported, there is no {part!r} in {found.__name__!r}{closest(part, there)}")


def _script(path: str, where: str) -> Any:
    """A file as a module of its own name, which other processes can import too."""
    file = Path(path).absolute()
    if not file.is_file():
        raise ConfigError(f"{where}: there is no file {path!r}")
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = importlib.import_module(file.stem)
    if not getattr(module, "__file__", None) or not Path(str(module.__file__)).samefile(file):
        raise ConfigError(f"{where}: {path!r} has the name of another module, {file.stem!r}: rename the file")
    return module


def importable(value: Any, where: str) -> Any:
    """``value`` with files in the class paths of what is nested in it turned into modules, which is what jsonargparse imports."""
    if isinstance(value, list):
        return [importable(each, where) for each in value]
    if not isinstance(value, dict):
        return value
    made = {name: importable(each, f"{where}.{name}") for name, each in value.items()}
    path = value.get("class_path")
    if isinstance(path, str) and ".py:" in path:
        found = target(path, f"{where}.class_path")
        made["class_path"] = f"{found.__module__}.{found.__qualname__}"
    return made
