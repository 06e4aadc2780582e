"""The packages as they are released: what is in each sdist and wheel, and a fresh environment that has the wheels and no checkout."""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hatchling.build import build_sdist, build_wheel
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT, *sorted(file.parent for pattern in ("cli", "plugins/*") for file in ROOT.glob(f"{pattern}/pyproject.toml"))]
CORE_SOURCES = ("core", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml")
CACHES = {"__pycache__", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache"}

pytestmark = pytest.mark.slow
each_package = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: "core" if folder == ROOT else folder.name)


def described(folder: Path) -> dict[str, Any]:
    """The table ``project`` of a package."""
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def files(*places: Path) -> Iterator[Path]:
    """What these folders have apart from caches."""
    for place in places:
        yield from (file for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file() and not CACHES & set(file.parts))


def modules(folder: Path) -> dict[str, bytes]:
    """What is imported of a package, by its place in a wheel."""
    above = next(each for each in (folder / "core", folder / "src", folder) if each.is_dir())
    return {str(file.relative_to(above)): file.read_bytes() for file in files(*above.glob("torchplug*"))}


def inside(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def unpacked(sdist: Path, into: Path) -> Path:
    """The one folder that is in an sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(into, filter="data")
    (folder,) = into.iterdir()
    return folder


def metadata(wheel: Path) -> Message:
    (text,) = [text for name, text in inside(wheel).items() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(text)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The sdists and wheels by their folders, and the wheels that come of the sdists; by the calls that pip and build make."""
    made = tmp_path_factory.mktemp("built")
    before, sdists, wheels, again = Path.cwd(), {}, {}, {}
    try:
        for number, folder in enumerate(FOLDERS):
            os.chdir(folder)
            sdists[folder] = made / "dist" / build_sdist(str(made / "dist"))
            wheels[folder] = made / "dist" / build_wheel(str(made / "dist"))
            os.chdir(unpacked(sdists[folder], made / "sources" / str(number)))
            again[folder] = made / "again" / build_wheel(str(made / "again"))
    finally:
        os.chdir(before)
    return SimpleNamespace(dist=made / "dist", sdists=sdists, wheels=wheels, again=again)


@each_package
def test_a_wheel_holds_the_modules_and_what_describes_them_and_nothing_else(folder: Path, built: Any) -> None:
    found, wheel = modules(folder), built.wheels[folder]
    about = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    names = [f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")]
    assert sorted(inside(wheel)) == sorted([*found, *names])
    assert {name: text for name, text in inside(wheel).items() if name in found} == found
    assert inside(wheel)[f"{about}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    entries = ConfigParser(delimiters="=")
    entries.optionxform = str  # type: ignore[assignment, method-assign]
    entries.read_string(inside(wheel)[f"{about}/entry_points.txt"].decode())
    said = described(folder)
    groups = {**said["entry-points"], **({"console_scripts": said["scripts"]} if "scripts" in said else {})}
    assert {name: dict(entries[name]) for name in entries.sections()} == groups


def test_the_wheel_of_core_has_its_types_its_stub_its_fixtures_and_the_template_with_hidden_files(built: Any) -> None:
    hidden = {"torchplug/template/.gitignore", "torchplug/template/.github/workflows/test.yml", "torchplug/template/pyproject.toml"}
    assert {"torchplug/py.typed", "torchplug/hookspecs.pyi", "torchplug_pytest.py", *hidden} <= set(inside(built.wheels[ROOT]))


@each_package
def test_the_metadata_says_what_the_project_says(folder: Path, built: Any) -> None:
    said, found = described(folder), metadata(built.wheels[folder])
    one = {key: found[key] for key in ("Name", "Version", "Summary", "License-Expression", "License-File", "Author", "Requires-Python")}
    assert one == {
        "Name": said["name"], "Version": said["version"], "Summary": said["description"], "License-Expression": "Apache-2.0",
        "License-File": "LICENSE", "Author": "The torchplug maintainers", "Requires-Python": ">=3.10",
    }  # fmt: skip
    assert found.get_all("Classifier") == said["classifiers"]
    assert sorted(found["Keywords"].split(",")) == sorted(said["keywords"])
    extras = said.get("optional-dependencies", {})
    assert sorted(found.get_all("Provides-Extra", [])) == sorted(extras)
    needed = {str(Requirement(text)) for text in said["dependencies"]}
    needed |= {str(Requirement(f"{text}; extra == '{extra}'")) for extra, texts in extras.items() for text in texts}
    assert {str(Requirement(text)) for text in found.get_all("Requires-Dist", [])} == needed
    assert found["Description-Content-Type"] == "text/markdown"
    readme = (folder / "README.md").read_bytes()
    (text,) = [text for name, text in inside(built.wheels[folder]).items() if name.endswith(".dist-info/METADATA")]
    assert text.endswith(readme), "the page of the package is its README"


@each_package
def test_an_sdist_holds_the_folder_and_makes_the_same_wheel(folder: Path, built: Any, tmp_path: Path) -> None:
    source = unpacked(built.sdists[folder], tmp_path)
    found = {str(file.relative_to(source)): file.read_bytes() for file in files(source)}
    assert not [file for file in source.rglob("*") if file.is_symlink()]
    added = {name: found.pop(name) for name in ("PKG-INFO", ".gitignore") if name in found}
    assert email.message_from_bytes(added["PKG-INFO"])["Name"] == described(folder)["name"]
    there = files(*(folder / name for name in CORE_SOURCES)) if folder == ROOT else files(folder)
    assert found == {str(file.relative_to(folder)): file.read_bytes() for file in there}
    assert inside(built.again[folder]) == inside(built.wheels[folder])


def needed_from_others() -> list[importlib.metadata.Distribution]:
    """The running environment's distributions that the packages and the quickstart need, one because of the other, torchplug's left out."""
    waiting = [Requirement(text) for folder in FOLDERS for text in described(folder)["dependencies"]] + [Requirement("scikit-learn")]
    found: dict[str, importlib.metadata.Distribution] = {}
    seen = set()
    while waiting:
        each = waiting.pop()
        if each.name.startswith("torchplug") or str(each) in seen:
            continue
        seen.add(str(each))
        found[each.name] = found.get(each.name) or importlib.metadata.distribution(each.name)
        for needed in map(Requirement, found[each.name].requires or []):
            if any(needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in ("", *each.extras)):
                waiting.append(needed)
    return list(found.values())


def borrow(into: Path) -> None:
    """Links to what the running environment has of other packages, so that torch is not installed once more."""
    into.mkdir()
    for distribution in needed_from_others():
        for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (into / name).is_symlink():
                (into / name).symlink_to(distribution.locate_file(name))


class Environment:
    """A fresh virtual environment outside of the checkout, with what others make and nothing of torchplug.

    Args:
        folder: where it is made.
        dist: the folder with the wheels, the only place that packages come from.
    """

    def __init__(self, folder: Path, dist: Path) -> None:
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        borrow(folder / "borrowed")
        (self.site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (self.site / "borrowed.pth").write_text(f"{folder / 'borrowed'}\n", encoding="utf-8")
        self.bin, self.work, self.dist = folder / "venv" / "bin", folder / "work", dist
        self.work.mkdir()
        settings = ("PYTEST_", "PYTHON", "PIP_", "TORCHPLUG_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
        self.variables = {**clean, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}

    def run(self, *command: str) -> str:
        """What a command prints; it has to succeed."""
        done = subprocess.run(command, cwd=self.work, env=self.variables, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def torchplug(self, *arguments: str) -> str:
        return self.run(str(self.bin / "torchplug"), *arguments)

    def pip(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "pip", "--python", str(self.bin / "python"), *arguments)

    def install(self, *names: str) -> set[str]:
        """Installs the wheels of these and of what they need; everything of torchplug that is there afterwards."""
        self.pip("install", "--quiet", "--no-compile", "--no-index", "--find-links", str(self.dist), *names)
        listed = json.loads(self.pip("list", "--format", "json"))
        return {each["name"] for each in listed if each["name"].startswith("torchplug")}


@pytest.fixture(scope="module")
def released(built: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is seen by somebody who installs the standard plugins, runs the quickstart and installs everything else."""
    environment = Environment(tmp_path_factory.mktemp("released"), built.dist)
    seen = SimpleNamespace(environment=environment, nothing=environment.pip("list"))
    seen.standard = environment.install("torchplug[standard]")
    environment.install("torchplug-early-stopping")
    shutil.copy(ROOT / "examples" / "quickstart.py", environment.work)
    seen.quickstart = environment.run(str(environment.bin / "python"), "quickstart.py")
    seen.all = environment.install("torchplug[all]")
    return seen


def test_there_is_no_torchplug_before_it_is_installed(released: Any) -> None:
    assert "torchplug" not in released.nothing
    assert "safetensors" in released.nothing


def test_the_extra_standard_brings_the_plugins_of_the_bundle(released: Any) -> None:
    bundle = {Requirement(text).name for text in described(ROOT / "plugins" / "standard")["dependencies"]}
    assert released.standard == {"torchplug-standard", *bundle}


def test_the_quickstart_runs_and_leaves_a_run(released: Any) -> None:
    accuracy = float(released.quickstart.rpartition("test accuracy: ")[2])
    assert accuracy > 0.9
    (run,) = (released.environment.work / "runs").glob("*/version_0")
    assert (run / "checkpoints" / "last.safetensors").exists()
    assert {"config.yaml", "journal.jsonl"} <= {file.name for file in run.iterdir()}


def test_the_extra_all_brings_every_package(released: Any) -> None:
    assert released.all == {described(folder)["name"] for folder in FOLDERS}


def test_what_is_imported_is_what_was_installed(released: Any) -> None:
    environment = released.environment
    names = ["torchplug", *sorted({name.split("/")[0].removesuffix(".py") for folder in FOLDERS[1:] for name in modules(folder)})]
    program = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {names}), sep='\\n')"
    found = [Path(line) for line in environment.run(str(environment.bin / "python"), "-c", program).splitlines()]
    assert len(found) == len(FOLDERS)
    assert all(file.is_relative_to(environment.site) for file in found)


def test_every_plugin_is_listed_with_its_package_and_version(released: Any) -> None:
    plugins = [folder for folder in FOLDERS if folder.parent.name == "plugins"]
    lines = [line.split()[:3] for line in released.environment.torchplug("plugins").partition("\n\n")[0].splitlines()]
    assert lines == [[folder.name, described(folder)["name"], described(folder)["version"]] for folder in plugins]


def test_the_doctor_finds_nothing_wrong(released: Any) -> None:
    said = released.environment.torchplug("doctor").splitlines()
    assert said[-1] == "nothing is wrong"
    (line,) = [line for line in said if line.startswith("plugins ")]
    assert line.removeprefix("plugins").strip().split(", ") == [folder.name for folder in FOLDERS if folder.parent.name == "plugins"]


def test_a_package_made_from_the_template_is_there(released: Any) -> None:
    released.environment.torchplug("new", "loss_printer")
    made = next(released.environment.work.glob("*loss*"))
    assert {"pyproject.toml", "README.md", ".gitignore", "torchplug_loss_printer.py"} <= {file.name for file in made.iterdir()}


def test_every_requirement_is_met(released: Any) -> None:
    assert released.environment.pip("check").strip() == "No broken requirements found."
