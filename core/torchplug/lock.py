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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any

from torchplug.discovery import Catalogue, Found, PluginError

__all__ = ["Lock", "add_command", "fingerprint"]

FILE = "torchplug.lock"
CORE = "torchplug"
NEW = "to accept what is installed now, write the lock anew: torchplug lock"
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
            keys = ("distribution", "version", "hash")
            packages = {name: {key: str(each[key]) for key in keys} for name, each in content["packages"].items()}
        except FileNotFoundError:
            raise PluginError(f"lock={str(path)!r}: there is no such file; torchplug lock {path} writes it") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PluginError(f"lock={str(path)!r} is not a lock file ({type(error).__name__}: {error}); {NEW}") from None
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
        if name not in self.packages:
            raise PluginError(f"{label} is not in {self.path}; {NEW}")
        locked, mine = self.packages[name], _entry(label, package)
        for key in ("distribution", "version", "hash"):
            if locked[key] != mine[key]:
                raise PluginError(
                    f"{label} is not what {self.path} has: {key} {mine[key]} is installed, {locked[key]} is locked; "
                    f"install {locked['distribution']}=={locked['version']}, or {NEW}"
                )


def _core() -> Distribution:
    try:
        return distribution(CORE)
    except PackageNotFoundError:
        raise PluginError("torchplug itself is not installed as a package: it cannot be locked; pip install it") from None


def _entry(label: str, package: Distribution) -> dict[str, str]:
    return {"distribution": str(package.metadata["Name"]), "version": package.version, "hash": fingerprint(label, package)}


def fingerprint(label: str, package: Distribution) -> str:
    """A SHA-256 over the RECORD of an installed package, whose lines have to be true.

    Lines that say how it was installed, or are different on every machine (byte code, commands), are left out. An editable
    install records no code: there the files of its modules are taken instead.

    Raises:
        PluginError: the package has no RECORD, or a file was changed after it was installed.
    """
    text = package.read_text("RECORD")
    if text is None:
        raise PluginError(f"{label} was installed without a RECORD and cannot be locked; install it with pip")
    lines = []
    for path, digest, *_ in csv.reader(io.StringIO(text)):
        name = PurePosixPath(path)
        if name.suffix == ".pyc" or ".." in name.parts or (name.parent.suffix == ".dist-info" and name.name in LOCAL):
            continue
        file = Path(str(package.locate_file(path)))
        if digest and (not file.is_file() or _digest(file, digest.partition("=")[0]) != digest):
            raise PluginError(f"{label}: {file} was changed or removed after it was installed; pip install --force-reinstall it")
        lines.append(f"{path},{digest}")
    if _editable(package):
        lines = [line for line in lines if ".dist-info/" not in line and not line.partition(",")[0].endswith((".pth", ".py"))]
        lines += [f"{name},{_digest(file)}" for name, file in _sources(package)]
    return "sha256=" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _digest(file: Path, method: str = "sha256") -> str:
    """As a RECORD has it."""
    return f"{method}=" + base64.urlsafe_b64encode(hashlib.new(method, file.read_bytes()).digest()).decode().rstrip("=")


def _editable(package: Distribution) -> bool:
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def _sources(package: Distribution) -> Iterator[tuple[str, Path]]:
    """The Python files of the modules that the entry points of a package name; finding them imports nothing."""
    modules = {point.value.partition(":")[0].partition(".")[0] for point in package.entry_points}
    for module in sorted(modules):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        file = Path(spec.origin)
        for each in sorted(file.parent.rglob("*.py")) if spec.submodule_search_locations else [file]:
            yield each.relative_to(file.parent.parent if spec.submodule_search_locations else file.parent).as_posix(), each


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
        print("\n".join(problems) or f"{chosen.file}: what is installed is what is locked")
        return 1 if problems else 0
    names = [name.strip() for name in chosen.plugins.split(",")] if chosen.plugins else sorted({each.name for each in catalogue.found})
    chosen_ones = [catalogue.find(name) for name in names]
    packages = {CORE: _entry("torchplug", _core()), **{each.name: _entry(each.label, each.package) for each in chosen_ones}}
    Path(chosen.file).write_text(json.dumps({"version": 1, "packages": packages}, indent=2) + "\n", encoding="utf-8")
    print(f"{chosen.file}: torchplug and {len(chosen_ones)} plugins; use it with Trainer(lock={chosen.file!r})")
    return 0


def differences(lock: Lock, catalogue: Catalogue) -> Sequence[str]:
    """A line for each package of a lock that is not installed as it was."""
    problems = []
    for name in lock.packages:
        try:
            if name == CORE:
                lock.check_core()
            else:
                lock.check(catalogue.find(name))
        except PluginError as error:
            problems.append(str(error))
    return problems
