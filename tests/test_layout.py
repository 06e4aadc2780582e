"""One name everywhere: each folder in `plugins/` is a package by the rules, documented, and imports torchplug's front door only."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import torchplug
from torchplug.members import PARAMETERS
from torchplug.options import fields_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(each for each in (ROOT / "plugins").iterdir() if each.is_dir() and not each.name.startswith((".", "_")))
PUBLIC = {
    "torchplug", "torchplug.averaging", "torchplug.checkpoint", "torchplug.distributed", "torchplug.hookspecs", "torchplug.launching",
    "torchplug.optimizers", "torchplug.sharded", "torchplug.testing", "torchplug.tracking", "torchplug.trials",
}  # fmt: skip

each_plugin = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def module_file(folder: Path) -> Path:
    """The plugin's module: one file, or a package under ``src`` when it outgrew that."""
    name = f"torchplug_{folder.name}"
    return next((file for file in (folder / f"{name}.py", folder / "src" / name / "__init__.py") if file.exists()), folder / f"{name}.py")


def target(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the entry point names: the plugin's class, or the list of a bundle."""
    (value,) = project(folder)["project"]["entry-points"]["torchplug"].values()
    module, _, attribute = value.partition(":")
    monkeypatch.syspath_prepend(folder / "src" if (folder / "src").is_dir() else folder)
    return getattr(importlib.import_module(module), attribute)


def test_there_are_plugins() -> None:
    assert {"standard", "progress", "summary", "checkpoint", "journal", "tensorboard", "csv", "early_stopping"} <= {f.name for f in FOLDERS}


@each_plugin
def test_folder_entry_point_module_and_distribution_have_one_name(folder: Path) -> None:
    name = folder.name
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    described = project(folder)["project"]
    assert described["name"] == "torchplug-" + name.replace("_", "-")
    ((entry, value),) = described["entry-points"]["torchplug"].items()
    assert (entry, value.partition(":")[0]) == (name, f"torchplug_{name}")
    assert module_file(folder).exists()


@each_plugin
def test_a_plugin_is_packaged_like_every_other(folder: Path) -> None:
    whole, described = project(folder), project(folder)["project"]
    assert whole["build-system"] == {"requires": ["hatchling"], "build-backend": "hatchling.build"}
    assert set(whole.get("tool", {})) <= {"hatch"}, "tools are configured in the root alone"
    assert "torchplug>=0.1,<0.2" in described["dependencies"]
    assert (described["requires-python"], described["license"], described["readme"]) == (">=3.10", "Apache-2.0", "README.md")
    assert re.fullmatch(r"\d+\.\d+\.\d+", described["version"])
    assert described["description"] and not described["description"].endswith(".")


@each_plugin
def test_a_plugin_has_tests_beside_it(folder: Path) -> None:
    file = folder / "tests" / f"test_{folder.name}.py"
    assert "\ndef test_" in file.read_text(encoding="utf-8")


@each_plugin
def test_the_readme_shows_how_to_install_and_use_it_and_lists_options_and_hooks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"pip install torchplug-{folder.name.replace('_', '-')}" in text
    assert "```python" in text
    assert text.partition("\n## Hooks\n")[2].strip(), "a section Hooks says which hooks it uses"
    plugin = target(folder, monkeypatch)
    if isinstance(plugin, list):
        assert all(f"`{name}`" in text for name in plugin)
        return
    for option in fields_of(plugin):
        assert re.search(rf"^\| `{option.name}` \|", text, re.MULTILINE), f"option {option.name} is not in the table"


@each_plugin
def test_a_plugin_is_a_dataclass_whose_options_are_all_documented(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = target(folder, monkeypatch)
    if isinstance(plugin, list):
        assert all(isinstance(name, str) for name in plugin)
        return
    assert dataclasses.is_dataclass(plugin) and plugin.__doc__
    parameters = plugin.__dataclass_params__  # type: ignore[attr-defined]
    assert not parameters.eq, "eq=False: equal plugins are two plugins"
    assert all(field.kw_only for field in dataclasses.fields(plugin) if field.init), "kw_only=True"
    for option in fields_of(plugin):
        assert option.text, f"option {option.name} has no text in Args:"
    assert not {"Plugin", "Callback"} & set(re.findall(r"[A-Z][a-z]+", plugin.__name__))


@each_plugin
def test_a_plugin_imports_the_front_door_of_torchplug_and_no_other_plugin(folder: Path) -> None:
    name = module_file(folder).stem if module_file(folder).stem != "__init__" else f"torchplug_{folder.name}"
    files = [module_file(folder)] if module_file(folder).stem != "__init__" else sorted(module_file(folder).parent.rglob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported = [str(node.module)]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                continue
            for module in imported:
                if module.split(".")[0].startswith("torchplug"):
                    assert module in PUBLIC or module.split(".")[0] == name, f"{file.name} imports {module}"


@each_plugin
def test_a_plugin_implements_hooks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = target(folder, monkeypatch)
    if not isinstance(plugin, list):
        assert any(hasattr(getattr(plugin, hook, None), "torchplug_impl") for hook in PARAMETERS)


def test_the_front_door_is_what_plugins_and_users_rely_on() -> None:
    settled = {"DataModule", "Module", "PluginError", "Run", "Trainer", "hookimpl", "seed_everything"}
    assert settled <= set(torchplug.__all__)
    assert all(hasattr(torchplug, name) for name in torchplug.__all__)
