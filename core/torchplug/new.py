"""``torchplug new``: writes a plugin package that works and is tested, from the one in the folder ``template``.

The template is a plugin called quokka, with a variant of three files for a logger, a strategy and a list of hooks. An author's package
is the same files with other names in them.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import dataclasses
import importlib.util
import json
import keyword
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchplug import skeleton
from torchplug.discovery import PluginError, discover
from torchplug.hookspecs import SPECS
from torchplug.options import closest
from torchplug.settings import Settings

__all__ = ["add_command"]

TEMPLATE = Path(__file__).parent / "template"
FILES = (
    ".github/workflows/test.yml", ".gitignore", "LICENSE", "README.md", "hatch_build.py", "pyproject.toml", "tests/test_quokka.py",
    "torchplug_quokka.py",
)  # fmt: skip
SENTENCE = "Shows how a plugin for torchplug is made"
AUTHORS = 'authors = [{ name = "The torchplug maintainers" }]\n'

NAME = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"
SOMETHING = "take a name that says what the plugin does, such as 'batch_noise'"
# a name of these words alone, in any combination, is one that somebody forgot to choose
EMPTY_WORDS = {
    "a", "abc", "asdf", "bar", "baz", "demo", "dummy", "eggs", "example", "foo", "hello", "hook", "hooks", "mine", "module", "my", "name",
    "new", "package", "placeholder", "plugin", "plugins", "project", "quokka", "qux", "sample", "spam", "template", "temp", "test", "tests",
    "thing", "tmp", "todo", "torchplug", "untitled", "world", "xxx", "xyz", "your",
}  # fmt: skip
GENERIC = ("callback", "event", "events", "logger", "strategy")
MEANT_OTHERWISE = ("auto", "cpu", "none")  # by accelerator, strategy and TORCHPLUG_PLUGINS


@dataclass(frozen=True)
class Names:
    """What a plugin is called, in the four places where it has a name."""

    plugin: str
    distribution: str
    module: str
    cls: str


def add_command(commands: Any) -> None:
    """Adds ``new`` to the command line."""
    parser = commands.add_parser(
        "new",
        help="write a new plugin package",
        description="Write a plugin package that works and is tested: module, tests, README, pyproject.toml, CI, licence.",
    )
    parser.add_argument("name", metavar="NAME", help="what the plugin is called in Trainer(plugins=[...]), such as batch_noise")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--logger", action="store_true", help="a logger: it follows the run's journal")
    kinds.add_argument("--strategy", action="store_true", help="a strategy: it trains on several ranks")
    kinds.add_argument("--events", metavar="HOOK[,HOOK]", help="a plugin with these hooks, such as on_train_batch_end,on_validation_end")
    parser.add_argument("--description", metavar="TEXT", help="one sentence: what the plugin does; without it nothing can be published")
    parser.add_argument("--author", metavar="NAME", help="who wrote it (default: user.name of git)")
    parser.add_argument("--prefix", default="torchplug", help="how the package's name begins (default: %(default)s)")
    parser.add_argument("--into", type=Path, metavar="DIR", help="the folder of the package, which is made (default: its name)")
    parser.set_defaults(run=_new)


def _new(chosen: argparse.Namespace) -> int:
    names = _names(chosen.name, chosen.prefix)
    folder = chosen.into or Path(names.distribution)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PluginError(f"{folder} is there already and is not an empty folder; name another one with --into")
    description = _description(chosen.description)
    replaced = {
        "torchplug-quokka": names.distribution,
        "torchplug_quokka": names.module,
        "quokka": names.plugin,
        "Quokka": names.cls,
        AUTHORS: _authors(chosen.author),
        **_said(description),
    }
    texts = {_with(path, replaced): _with(text, replaced) for path, text in _texts(chosen).items()}
    for path, text in texts.items():
        if path.endswith(".py"):
            _check_class(names, text)
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    print(f"{names.distribution}: {len(texts)} files are in {folder}. Next:\n")
    print(f"    cd {shlex.quote(str(folder))}\n    pip install -e . pytest\n    pytest\n")
    if not description:
        print("Before you publish it, write what it does into pyproject.toml and README.md: it cannot be built without.")
    return 0


# ---------------------------------------------------------------------- names


def _names(name: str, prefix: str) -> Names:
    """The four names of a plugin.

    Raises:
        PluginError: it cannot be called so, or should not.
    """
    prefix = prefix.replace("-", "_")
    if not re.fullmatch(NAME, prefix):
        raise PluginError(f"prefix {prefix!r} must be lower-case words, such as 'acme'")
    if not re.fullmatch(NAME, name):
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
        better = re.sub(r"[^a-z0-9]+", "_", words).strip("_").lstrip("0123456789_")
        hint = f"write {better!r}" if re.fullmatch(NAME, better) else SOMETHING
        raise PluginError(f"name {name!r} must be lower-case words joined by '_': {hint}")
    if name.startswith(f"{prefix}_"):
        raise PluginError(f"name {name!r}: the package begins with {prefix!r} by itself, write {name.removeprefix(f'{prefix}_')!r}")
    names = Names(name, f"{prefix}_{name}".replace("_", "-"), f"{prefix}_{name}", "".join(word.capitalize() for word in name.split("_")))
    wrong = _wrong_with(names)
    if wrong:
        raise PluginError(f"name {name!r} {wrong}")
    return names


def _wrong_with(names: Names) -> str:
    """Why nothing should be called so, and what to do; empty if it may be."""
    name, words = names.plugin, names.plugin.split("_")
    if keyword.iskeyword(name) or hasattr(builtins, names.cls):
        return f"means something in Python; {SOMETHING}"
    if set(words) <= EMPTY_WORDS or name in GENERIC or len(name) == 1:
        return f"is a placeholder; {SOMETHING}"
    if words[-1] in ("plugin", "callback"):
        return f"stands where plugins are named: leave the last word out, write {'_'.join(words[:-1])!r}"
    if name in SPECS:
        return f"is a hook; {SOMETHING}"
    if name in MEANT_OTHERWISE or name in (field.name for field in dataclasses.fields(Settings)):
        return f"means something to Trainer; {SOMETHING}"
    for found in discover():
        if found.name == name:
            return f"is that of {found.distribution} {found.version}, which is installed; take another one, or pip uninstall it first"
    if importlib.util.find_spec(names.module) is not None:
        return f"makes the module {names.module}, which is there already; take another name, or another --prefix"
    return ""


def _check_class(names: Names, text: str) -> None:
    """Refuses a name whose class is also something that the package's own code imports or defines.

    Raises:
        PluginError: it is.
    """
    bound = []
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            bound.append(node.name)
    if bound.count(names.cls) > 1:
        raise PluginError(f"name {names.plugin!r}: its class {names.cls} would hide what a plugin needs under that name; {SOMETHING}")


# ---------------------------------------------------------------------- texts


def _texts(chosen: argparse.Namespace) -> dict[str, str]:
    """The template's files, those of the variant in the place of others."""
    variant = "logger" if chosen.logger else "strategy" if chosen.strategy else "events" if chosen.events is not None else ""
    texts = {}
    for path in FILES:
        special = TEMPLATE / variant / path
        texts[path] = (special if special.exists() else TEMPLATE / path).read_text(encoding="utf-8")
    if chosen.events is None:
        return texts
    hooks = _hooks(chosen.events)
    texts["torchplug_quokka.py"] = skeleton.with_hooks(texts["torchplug_quokka.py"], hooks)
    listed = {
        '("on_train_batch_end",)': "(\n" + "".join(f'    "{hook}",\n' for hook in hooks) + ")",
        "`on_train_batch_end`": ", ".join(f"`{hook}`" for hook in hooks),
    }
    return {path: text if path == "torchplug_quokka.py" else _with(text, listed) for path, text in texts.items()}


def _hooks(events: str) -> list[str]:
    """The hooks that were asked for, in the order in which they fire."""
    asked = [name.strip() for name in events.split(",") if name.strip()]
    if not asked:
        raise PluginError(f"--events takes hooks, such as on_train_batch_end,on_validation_end, got {events!r}")
    for name in asked:
        if name not in SPECS:
            raise PluginError(f"--events: there is no hook {name!r}{closest(name, SPECS)} (hooks: {', '.join(SPECS)})")
    return [name for name in SPECS if name in asked]


def _with(text: str, replaced: Mapping[str, str]) -> str:
    """``text`` with other words, all at once: what has been put in is not looked at again."""
    return re.sub("|".join(map(re.escape, replaced)), lambda found: replaced[found[0]], text)


def _said(description: str) -> dict[str, str]:
    """What stands in the place of the template's sentence. Without a description there is a place for one, and no build."""
    if description:
        return {f'"{SENTENCE}"': json.dumps(description, ensure_ascii=False), SENTENCE: description}
    return {f'"{SENTENCE}"': '""  # one sentence, here and in README.md: it cannot be built without', f"{SENTENCE}.\n\n": ""}


def _description(text: str | None) -> str:
    """The sentence without its full stop; empty if none was given."""
    if text is None:
        return ""
    sentence = " ".join(text.split()).rstrip(".")
    words = set(re.findall(r"\w+", sentence.lower()))
    if not sentence.isprintable() or len(words) < 2 or words <= EMPTY_WORDS | set(GENERIC):
        raise PluginError(f"--description must say in one sentence what the plugin does, got {text!r}")
    return sentence


def _authors(author: str | None) -> str:
    """The line of pyproject.toml, empty if nobody is known."""
    if author is None:
        try:
            author = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, check=False).stdout
        except OSError:  # there is no git
            author = ""
    author = author.strip()
    if not author.isprintable():
        raise PluginError(f"--author must be a name, got {author!r}")
    return f"authors = [{{ name = {json.dumps(author, ensure_ascii=False)} }}]\n" if author else ""
