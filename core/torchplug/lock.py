"""``torchplug.lock``: which plugins a project trusts, each held by a hash over the files that its package was installed with."""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any

from torchplug.discovery import Catalogue, Found, PluginError, discover

__all__ = ["FILE", "Lock", "add_command", "differences"]

FILE = "torchplug.lock"
CORE = "torchplug"
FORMAT = 1
LOCAL = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json"}  # how it was installed, not what


@dataclass(frozen=True)
class Lock:
    """What a lock file says.

    Args:
        path: the file.
        packages: name of the plugin -> distribution, version and hash; the core is among them as "torchplug".
    """

    path: str
    packages: dict[str, dict[str, str]]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Lock:
        """The lock in a file, checked.

        Raises:
            PluginError: there is none, or it is not one.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["version"] != FORMAT:
                raise ValueError(f"version {content['version']!r}, this torchplug knows {FORMAT}")
            keys = ("distribution", "version", "hash")
            packages = {name: {key: str(each[key]) for key in keys} for name, each in content["packages"].items()}
        except FileNotFoundError:
            raise PluginError(f"lock={str(path)!r}: there is no such file; torchplug lock {path} writes it") from None
        except OSError as error:
            raise PluginError(f"lock={str(path)!r} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"lock={str(path)!r} is not a lock file ({type(error).__name__}: {error})"
            raise PluginError(f"{what}; torchplug lock {path} writes it anew") from None
        return cls(str(path), packages)

    def check(self, found: Found) -> None:
        """Refuses a plugin that is not the one that was locked; nothing of it has been imported yet.

        Raises:
            PluginError: it is another package, another version, or its files are others.
        """
        self._compare(found.label, found.name, found.package)

    def check_core(self) -> None:
        """The same for torchplug itself."""
        self._compare("torchplug", CORE, _core())

    def _compare(self, label: str, name: str, package: Distribution) -> None:
        anew = f"to accept what is installed now, write the lock anew: {self._command(name)}"
        if name not in self.packages:
            raise PluginError(f"{self.path} refuses {label}, which is not in it; {anew}")
        try:
            locked, mine = self.packages[name], _entry(label, package)
        except PluginError as error:
            raise PluginError(f"{self.path} refuses {error}") from None
        for key in ("distribution", "version", "hash"):
            if locked[key] != mine[key]:
                raise PluginError(
                    f"{self.path} refuses {label}: {key} {mine[key]} is installed, {locked[key]} is locked; "
                    f"install {locked['distribution']}=={locked['version']}, or {anew}"
                )

    def _command(self, name: str) -> str:
        """What writes the lock anew, with the same plugins and ``name``."""
        there = {each.name for each in discover()}
        wanted = [each for each in dict.fromkeys([*self.packages, name]) if each in there]
        return f"torchplug lock {self.path}" + (f" --plugins {','.join(wanted)}" if wanted and there - {*wanted} else "")


def _core() -> Distribution:
    try:
        return distribution(CORE)
    except PackageNotFoundError:
        raise PluginError("torchplug itself is not installed as a package: it cannot be locked; pip install it") from None


def _entry(label: str, package: Distribution) -> dict[str, str]:
    return {"distribution": str(package.metadata["Name"]), "version": package.version, "hash": fingerprint(label, package)}


def fingerprint(label: str, package: Distribution) -> str:
    """A SHA-256 over the RECORD of an installed package, whose lines have to be true, and whose modules have to be those found.

    Lines that say how it was installed, or are different on every machine (byte code, commands), are left out. An editable
    install records no code: there the files of its modules are taken instead.

    Raises:
        PluginError: the package has no RECORD, a file was changed after it was installed, or another one would be imported.
    """
    text = package.read_text("RECORD")
    if text is None:
        raise PluginError(f"{label} was installed without a RECORD and cannot be locked; install it with pip")
    try:
        lines, held = _recorded(label, package, text)
        editable = json.loads(package.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable")
    except (ValueError, TypeError, AttributeError) as error:
        raise PluginError(f"{label}: its RECORD cannot be read ({error}); {_again(package)}") from None
    if editable:
        lines = [line for line in lines if ".dist-info/" not in line and not line.partition(",")[0].endswith((".pth", ".py"))]
        lines += [f"{name},{_digest(file)}" for name, file in _sources(label, package)]
    else:
        for file in _modules(label, package):
            if file.resolve() not in held:
                raise PluginError(f"{label}: {file} would be imported, which is not of this package; remove it, or look at sys.path")
    return "sha256=" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _recorded(label: str, package: Distribution, text: str) -> tuple[list[str], set[Path]]:
    """The lines of a RECORD that say what was installed, and the files that they are about."""
    lines, held = [], set[Path]()
    for path, digest, *_ in filter(None, csv.reader(io.StringIO(text))):
        name = PurePosixPath(path)
        if name.suffix == ".pyc" or ".." in name.parts or (name.parent.suffix == ".dist-info" and name.name in LOCAL):
            continue
        file = Path(str(package.locate_file(path)))
        if digest and (not file.is_file() or _digest(file, digest.partition("=")[0]) != digest):
            raise PluginError(f"{label}: {file} was changed or removed after it was installed; {_again(package)}")
        held.add(file.resolve())
        lines.append(f"{path},{digest}")
    return lines, held


def _again(package: Distribution) -> str:
    return f"pip install --force-reinstall --no-deps {package.metadata['Name']}=={package.version}"


def _digest(file: Path, method: str = "sha256") -> str:
    """As a RECORD has it."""
    return f"{method}=" + base64.urlsafe_b64encode(hashlib.new(method, file.read_bytes()).digest()).decode().rstrip("=")


def _modules(label: str, package: Distribution) -> Iterator[Path]:
    """The file of each module that the entry points of a package name, or of the package that it is in; nothing of it is imported."""
    for module in sorted({point.module for point in package.entry_points}):
        name, spec = "", None
        for part in module.split("."):  # what is above it may be a namespace, which has no code
            name = f"{name}.{part}" if name else part
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is not None:
                break
        if spec is None or spec.origin is None:
            raise PluginError(f"{label}: its module {module} is not there; {_again(package)}")
        yield Path(spec.origin)


def _sources(label: str, package: Distribution) -> Iterator[tuple[str, Path]]:
    """The files of these modules, by name."""
    for file in dict.fromkeys(_modules(label, package)):
        inside = file.name.startswith("__init__.")
        top = file.parent.parent if inside else file.parent
        for each in sorted(file.parent.rglob("*")) if inside else [file]:
            if each.is_file() and each.suffix != ".pyc":
                yield each.relative_to(top).as_posix(), each


def add_command(commands: Any) -> None:
    """Adds ``lock`` to the command line."""
    parser = commands.add_parser(
        "lock",
        help="write down which plugins are trusted, for Trainer(lock=...)",
        description="Write name, distribution, version and a hash over the installed files of every plugin to a file. "
        "Trainer(lock=FILE) refuses a plugin that is different. Nothing is imported.",
    )
    parser.add_argument("file", nargs="?", default=FILE, help=f"the file (default: {FILE})")
    parser.add_argument("--plugins", metavar="NAME[,NAME]", help="only these plugins (default: all that are installed)")
    parser.add_argument("--check", action="store_true", help="compare instead of writing; exit code 1 if something is different")
    parser.set_defaults(run=_lock)


def _lock(chosen: argparse.Namespace) -> int:
    catalogue = Catalogue()
    if chosen.check:
        problems = differences(Lock.read(chosen.file), catalogue)
        print("\n".join(problems.values()) or f"{chosen.file}: what is installed is what is locked")
        return 1 if problems else 0
    names = [name.strip() for name in chosen.plugins.split(",")] if chosen.plugins else sorted({each.name for each in catalogue.found})
    chosen_ones = [catalogue.find(name) for name in names]
    packages = {CORE: _entry("torchplug", _core()), **{each.name: _entry(each.label, each.package) for each in chosen_ones}}
    temporary = Path(f"{chosen.file}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"version": FORMAT, "packages": packages}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, chosen.file)
    print(f"{chosen.file}: torchplug and {', '.join(names) or 'no plugins'}; use it with Trainer(lock={chosen.file!r})")
    return 0


def differences(lock: Lock, catalogue: Catalogue) -> dict[str, str]:
    """The packages of a lock that are not installed as they were, by plugin, each with what is different."""
    problems = {}
    for name, locked in {CORE: {}, **lock.packages}.items():
        try:
            if name == CORE:
                lock.check_core()
            else:
                lock.check(catalogue.find(f"{locked['distribution']}/{name}"))
        except PluginError as error:
            problems[name] = str(error)
    return problems
