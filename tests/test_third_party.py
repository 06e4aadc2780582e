"""Somebody else's plugin: written, built, installed into a fresh environment beside torchplug, and enabled by its name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import venv
from pathlib import Path
from typing import Any

import pytest
from hatchling.build import build_wheel

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

PYPROJECT = """
    [build-system]
    requires = ["hatchling"]
    build-backend = "hatchling.build"

    [project]
    name = "acme-my-thing"
    version = "2.3.4"
    description = "Scales gradients"
    requires-python = ">=3.10"
    dependencies = ["torchplug>=0.1,<0.2"]

    [project.entry-points.torchplug]
    my_thing = "acme_my_thing:MyThing"
"""

MODULE = '''
    """A plugin as a stranger would write it."""

    from dataclasses import dataclass

    from torchplug import Run, hookimpl


    @dataclass(kw_only=True, eq=False)
    class MyThing:
        """Scales gradients before each step.

        Args:
            factor: Gradients are multiplied by this.
        """

        factor: float = 0.5

        @hookimpl
        def on_before_optimizer_step(self, optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(self.factor)

        @hookimpl
        def on_fit_end(self, run: Run):
            run.report["my_thing"] = f"{run.position.step} steps scaled by {self.factor}"
'''

PROGRAM = """
    import json, logging, sys
    import torch, torchplug, torchplug.discovery

    class Line(torchplug.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.zeros(()))
        def training_step(self, batch):
            return (-self.slope * batch).mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    def trained(plugins):
        line = Line()
        trainer = torchplug.Trainer(plugins=plugins, max_epochs=1, root_dir="runs", accelerator="cpu")
        trainer.fit(line, [torch.ones(1), torch.ones(1), torch.ones(1)])
        return line.slope.item(), trainer.run.packages

    result = {
        "bare": trained([]),
        "by name": trained(["my_thing"]),
        "with options": trained([{"my_thing": {"factor": 0.1}}]),
        "files": [torchplug.__file__, sys.modules["acme_my_thing"].__file__],
        "installed": [[each.name, each.distribution] for each in torchplug.discovery.discover()],
    }
    try:
        trained([{"my_thing": {"facter": 1.0}}])
    except torchplug.PluginError as error:
        result["error"] = str(error)
    json.dump(result, open("result.json", "w"))
"""


def build(folder: Path, into: Path) -> Path:
    """The wheel of the package in ``folder``, by the call that pip makes in a process of its own."""
    into.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return into / build_wheel(str(into))
    finally:
        os.chdir(before)


def _run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def environment(folder: Path, *wheels: Path) -> Path:
    """The interpreter of a fresh virtual environment with these wheels and, so that torch is not installed once more, what
    the running environment has apart from torchplug and its plugins."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", *map(str, wheels))
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for package in ("torch", "pluggy", "safetensors"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        for entry in Path(spec.origin).parents[1].iterdir():
            if "torchplug" not in entry.name and entry.suffix != ".pth" and not (borrowed / entry.name).exists():
                (borrowed / entry.name).symlink_to(entry)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    return python


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a program in a fresh environment saw, run from a folder of its own."""
    folder = tmp_path_factory.mktemp("third_party")
    source = folder / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text(textwrap.dedent(PYPROJECT), encoding="utf-8")
    (source / "acme_my_thing.py").write_text(textwrap.dedent(MODULE), encoding="utf-8")
    python = environment(folder, build(ROOT, folder / "core"), build(source, folder / "plugin"))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "program.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    _run(str(python), "-I", "program.py", cwd=elsewhere)
    found = json.loads((elsewhere / "result.json").read_text(encoding="utf-8"))
    return {**found, "venv": str(folder / "venv")}


def test_torchplug_and_the_plugin_are_the_installed_wheels(result: Any) -> None:
    assert all(file.startswith(result["venv"]) for file in result["files"])
    assert result["installed"] == [["my_thing", "acme-my-thing"]]


def test_a_third_party_plugin_is_enabled_by_its_name(result: Any) -> None:
    slope, packages = result["by name"]
    assert slope == pytest.approx(1.5)  # three steps of 1, halved
    assert packages == {"my_thing": "acme-my-thing 2.3.4"}


def test_it_takes_its_options(result: Any) -> None:
    assert result["with options"][0] == pytest.approx(0.3)


def test_installing_it_enables_nothing(result: Any) -> None:
    assert result["bare"] == [3.0, {}]


def test_its_mistakes_are_told_with_package_and_version(result: Any) -> None:
    assert result["error"] == (
        "plugin 'my_thing' (acme-my-thing 2.3.4): no option 'facter', did you mean 'factor'? (options: factor, on_error)"
    )
