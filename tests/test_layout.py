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
from packaging.requirements import Requirement

import torchplug
from torchplug.members import PARAMETERS
from torchplug.options import fields_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(each for each in (ROOT / "plugins").iterdir() if each.is_dir() and not each.name.startswith((".", "_")))
PACKAGES = [ROOT, ROOT / "cli", *FOLDERS]
TYPED = "Typing :: Typed"
PUBLIC = {
    "torchplug", "torchplug.averaging", "torchplug.checkpoint", "torchplug.distributed", "torchplug.hookspecs", "torchplug.launching",
    "torchplug.optimizers", "torchplug.sharded", "torchplug.testing", "torchplug.tracking", "torchplug.trials",
}  # fmt: skip

each_plugin = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
each_package = pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: "core" if folder == ROOT else folder.name)


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def required(name: str) -> list[str]:
    """What a file of requirements asks for, line by line."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


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


@each_package
def test_a_package_is_described_like_every_other(folder: Path) -> None:
    whole, described, core = project(folder), project(folder)["project"], project(ROOT)["project"]
    assert whole["build-system"] == {"requires": ["hatchling"], "build-backend": "hatchling.build"}
    assert set(whole.get("tool", {})) <= {"hatch"} or folder == ROOT, "tools are configured in the root alone"
    assert (described["requires-python"], described["license"], described["readme"]) == (">=3.10", "Apache-2.0", "README.md")
    assert re.fullmatch(r"\d+\.\d+\.\d+", described["version"])
    assert described["description"] and not described["description"].endswith(".")
    assert (described["version"], described["authors"]) == (core["version"], core["authors"])
    typed = [TYPED] if any(folder.glob("*/torchplug*/py.typed")) else []
    assert described["classifiers"] == [each for each in core["classifiers"] if each != TYPED] + typed
    words = described["keywords"]
    assert {"pytorch", "training"} <= set(words) and len(words) == len(set(words)) > 3


@each_package
def test_a_package_carries_the_licence(folder: Path) -> None:
    assert project(folder)["project"]["license-files"] == ["LICENSE"]
    file = folder / "LICENSE"
    assert not file.is_symlink(), "an sdist would have a link to a file that is not in it"
    assert file.read_bytes() == (ROOT / "LICENSE").read_bytes()


@each_package
def test_a_package_needs_torchplug_in_the_range_of_its_version_and_a_lowest_version_of_everything_else(folder: Path) -> None:
    described = project(folder)["project"]
    needed = [Requirement(each) for each in described["dependencies"]]
    assert ("torchplug" in {each.name for each in needed}) == (folder != ROOT)
    for each in [*needed, *(Requirement(text) for extra in described.get("optional-dependencies", {}).values() for text in extra)]:
        if each.name.startswith("torchplug"):
            assert str(each.specifier) == "<0.2,>=0.1"
            assert project(ROOT)["project"]["version"] in each.specifier
        else:
            assert [bound.operator for bound in each.specifier] == [">="], f"{each} has no lowest version, or more than that"


def test_the_version_is_one_and_the_template_asks_for_its_range() -> None:
    assert project(ROOT)["project"]["version"] == torchplug.__version__
    assert project(ROOT / "core" / "torchplug" / "template")["project"]["dependencies"] == ["torchplug>=0.1,<0.2"]


def test_the_lowest_versions_are_the_ones_that_are_tested() -> None:
    needed = [Requirement(text) for folder in PACKAGES for text in project(folder)["project"]["dependencies"]]
    stated = {f"{each.name}{each.specifier}".replace(">=", "==") for each in needed if not each.name.startswith("torchplug")}
    assert required("requirements-lowest.txt") == sorted(stated)


def test_the_extras_bring_the_standard_plugins_or_everything() -> None:
    extras = project(ROOT)["project"]["optional-dependencies"]
    names = {extra: [Requirement(text).name for text in texts] for extra, texts in extras.items()}
    assert names == {"standard": ["torchplug-standard"], "all": [project(folder)["project"]["name"] for folder in PACKAGES[1:]]}


def test_the_first_command_installs_the_bundle_from_its_folders_and_the_second_one_everything() -> None:
    bundle = [Requirement(text).name for text in project(ROOT / "plugins" / "standard")["project"]["dependencies"]]
    folders = {f"./plugins/{name.removeprefix('torchplug-').replace('-', '_')}" for name in bundle[1:]}
    assert {".", "./plugins/standard", *folders} <= set(required("requirements.txt"))
    editable = [line.removeprefix("-e ./") for line in required("requirements-dev.txt") if line.startswith("-e ./")]
    assert editable == [str(folder.relative_to(ROOT)) for folder in PACKAGES[1:]]
    assert "-e ." in required("requirements-dev.txt")


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
