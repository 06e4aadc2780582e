"""What is installed, read from the metadata of packages alone: no plugin is imported, and neither is torch.

The folders of ``sys.path`` are read directly, and what takes long to import is imported when it is needed: a listing of plugins
is there at once. The standard library's ``importlib.metadata`` does the rest as soon as something is loaded.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torchplug
from torchplug.versions import allows

if TYPE_CHECKING:
    from importlib.metadata import Distribution

__all__ = [
    "BUNDLE", "COMMANDS", "GROUP", "SWITCH", "Catalogue", "Found", "PluginError", "bare", "clash", "discover", "find", "installed", "load",
    "scan",
]  # fmt: skip

GROUP = "torchplug"
BUNDLE = "standard"  # what Trainer() takes when no plugins are named
COMMANDS = "torchplug.commands"  # entry points that bring a command: name -> a function of the words after it that gives the exit code
SWITCH = "TORCHPLUG_PLUGINS"  # an environment variable; "none" starts every run without plugins
METADATA = {".dist-info": "METADATA", ".egg-info": "PKG-INFO"}  # ending of a package's folder -> the file that describes it


class PluginError(Exception):
    """A plugin cannot be found, built, ordered or used. The message names it, its package, and what to do."""


class Found(NamedTuple):
    """An entry point of an installed package; `load` imports what it names.

    Args:
        name: the plugin's name.
        value: where it is, as module:attribute.
        distribution: the package.
        version: the package's version.
        folder: the folder with the package's metadata.
        summary: what the package says of itself in one sentence; empty if it does not.
    """

    name: str
    value: str
    distribution: str
    version: str
    folder: str
    summary: str

    @property
    def package(self) -> Distribution:
        """The package, as the standard library describes it."""
        from importlib.metadata import Distribution

        return Distribution.at(self.folder)

    @property
    def imported(self) -> Any:
        """What it names, if its module was imported already."""
        module, _, attributes = self.value.partition("[")[0].replace(" ", "").partition(":")
        return reduce(lambda part, name: getattr(part, name, None), attributes.split("."), sys.modules.get(module))

    @property
    def requires(self) -> list[str]:
        """What the package needs, as its metadata says it."""
        return re.findall(r"^Requires-Dist: *(.+?)\s*$", _header(self.folder), re.MULTILINE)

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"plugin {self.name!r} ({self.distribution} {self.version})"

    @property
    def range(self) -> str:
        """The versions of torchplug that its package asks for, such as ">=0.1,<0.2"; empty if it does not say."""
        ranges = []
        for line in self.requires:
            requirement, _, marker = (part.strip() for part in line.partition(";"))
            asked = re.fullmatch(r"torchplug(?![\w.-])\s*(?:\[[^\]]*\])?\s*\(?([^()@]*)\)?", requirement, re.IGNORECASE)
            if asked and _holds(marker):
                ranges.append(asked[1].replace(" ", ""))
        return ",".join(filter(None, ranges))

    def check_version(self) -> None:
        """Refuses a plugin that was made for another version of the core.

        Raises:
            PluginError: it says both versions and what to install.
        """
        try:
            fits = allows(self.range, torchplug.__version__)
        except ValueError as error:
            raise PluginError(f"{self.label}: its requirement torchplug{self.range} cannot be read: {error}") from None
        if not fits:
            raise PluginError(
                f"{self.label} is made for torchplug{self.range}, and torchplug {torchplug.__version__} is installed: "
                f"pip install --upgrade {self.distribution}, or pip install 'torchplug{self.range}'"
            )

    def load(self) -> Any:
        """The plugin's class, or the list of a bundle.

        Raises:
            PluginError: it is made for another core, or cannot be imported.
        """
        self.check_version()
        try:
            return load(self.value)
        except ModuleNotFoundError as error:
            if error.name is None:  # the author's own words
                raise PluginError(f"{self.label}: {self.value} cannot be imported: {error}") from error
            missing = error.name.partition(".")[0]
            mine = missing == self.value.partition(":")[0].partition(".")[0]
            raise PluginError(
                f"{self.label}: {self.value} cannot be imported: there is no module {error.name!r}: "
                + (f"pip install --force-reinstall {self.distribution}" if mine else f"pip install what {missing!r} is part of")
            ) from error
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.label}: {self.value} cannot be imported: {type(error).__name__}: {error}") from error


class Catalogue:
    """What is installed, read once and only if a name has to be looked up."""

    @cached_property
    def _read(self) -> tuple[list[Found], list[str]]:
        return scan(GROUP)

    @property
    def found(self) -> list[Found]:
        """All plugins, sorted by name."""
        return self._read[0]

    @property
    def unreadable(self) -> list[str]:
        """A line for each package whose metadata cannot be read; what is in it is not found."""
        return self._read[1]

    def find(self, name: str) -> Found:
        """The plugin ``name``, or ``distribution/name``.

        Raises:
            PluginError: it is not installed, or several packages have it.
        """
        distribution, _, plain = name.rpartition("/")
        hits = [each for each in self.found if each.name == plain and _key(distribution) in ("", _key(each.distribution))]
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise PluginError(clash("plugin", hits))
        from torchplug.options import closest

        names = [each.name for each in self.found]
        remedy = closest(plain.replace("-", "_").removeprefix("torchplug_"), names)
        if not remedy:  # a name that is nearly right is no package to install
            package = "torchplug-" + plain.replace("_", "-").removeprefix("torchplug-")
            remedy = f"; if it is a plugin of torchplug: pip install {package}"
        listed = f" (installed plugins: {', '.join(names) or 'none'})"
        raise PluginError(f"plugin {name!r} is not installed{remedy}{listed}" + "".join(f"; {line}" for line in self.unreadable))

    def origin(self, plugin: Any) -> Found | None:
        """The entry point of a plugin that was given as an object."""
        return next((each for each in self.found if each.imported is type(plugin)), None)


def bare() -> bool:
    """Whether the environment asks for runs without any plugin.

    Raises:
        PluginError: it asks for something else, which nobody knows.
    """
    value = os.environ.get(SWITCH, "")
    if value not in ("", "none"):
        raise PluginError(f"the environment variable {SWITCH} may be 'none', which starts without plugins, or not set; got {value!r}")
    return value == "none"


def clash(what: str, several: Sequence[Found]) -> str:
    """What is wrong where several packages have an entry point of one name, and what to do; ``what`` is "plugin" or "the command"."""
    first = several[0]
    if len({_key(each.distribution) for each in several}) == 1:
        return f"{what} {first.name!r}: {first.distribution} is installed twice; pip uninstall it twice, and install it again"
    both = " and ".join(f"{each.distribution} {each.version}" for each in several)
    remedy = f"write {f'{first.distribution}/{first.name}'!r} to take the first" if what == "plugin" else "uninstall one"
    return f"{what} {first.name!r} is provided by {both}: {remedy}"


def _holds(marker: str) -> bool:
    """Whether a requirement counts here: one for another Python does not, nor does one of an extra or of another system."""
    python = re.fullmatch(r"""python_(?:full_)?version\s*(<=|>=|<|>|==|!=)\s*['"]([\d.]+)['"]""", marker)
    if python:
        return allows("".join(python.groups()), ".".join(map(str, sys.version_info[:2])))
    return not marker


def _key(distribution: str) -> str:
    """Names of packages are the same whatever stands between their words."""
    return re.sub(r"[-_.]+", "_", distribution).lower()


def scan(group: str) -> tuple[list[Found], list[str]]:
    """The entry points in a group, sorted by name, and a line for each package that cannot be read."""
    found, unreadable = list[Found](), list[str]()
    for folder in _packages():
        try:
            found += list(_entries(folder, group))
        except (OSError, ValueError) as error:  # whatever is wrong with one package is no matter of the others
            unreadable.append(f"the metadata in {folder} cannot be read: {error}")
    return sorted(found, key=lambda each: (each.name, each.distribution)), unreadable


def _packages() -> Iterator[str]:
    """The metadata folders of packages for torchplug; what comes first on the path hides others of its name."""
    seen: set[str] = set()
    for place in dict.fromkeys(sys.path):
        try:
            keys, packages = _in(place or ".", os.stat(place or ".").st_mtime_ns)
        except OSError:  # an archive, or not there
            continue
        yield from (folder for key, folder in packages if key not in seen)
        seen |= keys


@lru_cache(maxsize=200)
def _in(place: str, changed: int) -> tuple[frozenset[str], tuple[tuple[str, str], ...]]:
    """The names of all packages in a folder, and those that speak of torchplug; read again when the folder has ``changed``."""
    keys, packages = set(), list[tuple[str, str]]()
    for name in sorted(os.listdir(place)):
        stem, ending = os.path.splitext(name)
        if ending not in METADATA:
            continue
        keys.add(key := _key(stem.partition("-")[0]))
        with suppress(FileNotFoundError, NotADirectoryError):
            folder = os.path.join(place, name)
            if GROUP.encode() in _content(folder, "entry_points.txt"):
                packages.append((key, folder))
    return frozenset(keys), tuple(packages)


def _entries(folder: str, group: str) -> Iterator[Found]:
    inside = False
    for line in map(str.strip, _content(folder, "entry_points.txt").decode().splitlines()):
        if line.startswith("["):
            inside = line == f"[{group}]"
        elif inside and line and not line.startswith(("#", ";")):
            name, _, value = (part.strip() for part in line.partition("="))
            if not (name and value):
                raise ValueError(f"entry_points.txt has the line {line!r}, which is not name = module:attribute")
            distribution, version, summary = _described(folder)
            yield Found(name, value, distribution, version, folder, summary)


def _described(folder: str) -> tuple[str, str, str]:
    """Name, version and summary of a package."""
    fields = dict(re.findall(r"^(Name|Version|Summary): *(\S.*?)\s*$", _header(folder), re.MULTILINE))
    if not {"Name", "Version"} <= fields.keys():
        raise ValueError(f"{METADATA[os.path.splitext(folder)[1]]} has no name or no version")
    return fields["Name"], fields["Version"], fields.get("Summary", "")


def _header(folder: str) -> str:
    """What describes a package, without the long text below it."""
    return re.split(r"\r?\n\r?\n", _content(folder, METADATA[os.path.splitext(folder)[1]]).decode(), maxsplit=1)[0]


def _content(folder: str, name: str) -> bytes:
    with open(os.path.join(folder, name), "rb", buffering=0) as file:
        return file.read()


def load(value: str) -> Any:
    """What an entry point names."""
    from importlib.metadata import EntryPoint

    return EntryPoint("", value, "").load()


def discover() -> list[Found]:
    """All installed plugins, sorted by name; nothing is imported."""
    return Catalogue().found


def installed(name: str) -> bool:
    """Whether a plugin of this name is installed; its module is not imported."""
    return any(each.name == name for each in Catalogue().found)


def find(name: str) -> Found:
    """The installed plugin ``name``; raises `PluginError` with what to do if there is none."""
    return Catalogue().find(name)
