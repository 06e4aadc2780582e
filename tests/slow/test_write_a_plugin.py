"""docs/write-a-plugin.md, followed to the letter: its commands and files are taken from the page and done in a fresh environment."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "write-a-plugin.md"

pytestmark = pytest.mark.slow


def third_party() -> Any:
    """The test of somebody else's plugin, which has functions for wheels and environments."""
    spec = importlib.util.spec_from_file_location("third_party", ROOT / "tests" / "test_third_party.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps() -> Iterator[tuple[str, str, str]]:
    """What the page says to do: ``sh`` or ``python`` with the text, or ``file`` with a name, which stands above, and the text."""
    text = PAGE.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text[: block.start()].rstrip().splitlines()[-1]
        name = re.match(r"`([\w./]+)`.*:$", line)
        if line.startswith("<!-- not run: "):
            continue
        yield ("file", name[1], block[2]) if name else (block[1], "", block[2])


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of it: the outputs of all commands and of the examples, and the folders."""
    folder = tmp_path_factory.mktemp("author")
    kit = third_party()
    python = kit.environment(folder, kit.build(ROOT, folder / "core"))
    for tool in ("pip", "pytest"):
        script = python.parent / tool
        script.write_text(f'#!/bin/sh\nexec "{python}" -m {tool} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    env = {**clean, **offline, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    where, outputs, examples = folder / "work", {}, []
    where.mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    for kind, name, text in steps():
        if kind == "file":
            (where / name).write_text(text, encoding="utf-8")
        elif kind == "python":
            examples.append(text)
        else:
            for line in text.splitlines():
                if line.startswith("cd "):
                    where = where / line.removeprefix("cd ")
                else:
                    outputs.setdefault(line, []).append(run("sh", "-c", line))
    program = run(str(python), "-c", "\n".join(examples))
    located = run(str(python), "-c", "import torchplug, torchplug_smooth_loss as p; print(torchplug.__file__, p.__file__, sep='\\n')")
    return SimpleNamespace(outputs=outputs, program=program, located=located.splitlines(), folder=folder, examples=len(examples))


def test_the_page_has_commands_files_and_examples(followed: Any) -> None:
    assert {"pip install -e . pytest", "pytest", "python train.py", "torchplug plugins -v"} <= set(followed.outputs)
    assert [name for kind, name, _ in steps() if kind == "file"] == [
        "torchplug_smooth_loss.py", "tests/test_smooth_loss.py", "README.md", "train.py",
    ]  # fmt: skip
    assert followed.examples == 4


def test_the_tests_of_the_package_pass_before_the_edit_and_after(followed: Any) -> None:
    before, after = followed.outputs["pytest"]
    assert "= 8 passed in" in before and "= 7 passed in" in after, before + after


def test_what_is_used_is_the_installed_core_and_the_folder_of_the_author(followed: Any) -> None:
    core, plugin = followed.located
    assert core.startswith(str(followed.folder / "venv"))
    assert plugin == str(followed.folder / "work" / "torchplug-smooth-loss" / "torchplug_smooth_loss.py")


def test_a_trainer_uses_it_by_its_name(followed: Any) -> None:
    (printed,) = followed.outputs["python train.py"]
    loss, smooth = map(float, printed.split()[-2:])
    assert 0 < loss != smooth > 0


def test_torchplug_lists_it_with_its_option_and_explains_its_place(followed: Any) -> None:
    (listed,), (explained,) = followed.outputs["torchplug plugins -v"], followed.outputs["torchplug explain smooth_loss"]
    row = r"^smooth_loss +torchplug-smooth-loss 0\.1\.0 +available  Logs an exponential mean of the training loss$"
    assert re.search(row, listed, re.MULTILINE), listed
    assert "hooks: setup, on_before_backward" in listed and "decay: float, default 0.9. How much of the mean" in listed
    assert "smooth_loss  torchplug-smooth-loss 0.1.0  (as listed)" in explained


def test_the_examples_of_the_page_do_what_it_says(followed: Any) -> None:
    lines = followed.program.splitlines()
    assert [line.split()[0] for line in lines if re.fullmatch(r"[01] \d+\.\d+", line)] == ["0", "1"]
    assert any(re.fullmatch(r"validate took 0\.\d+ s", line) for line in lines), lines
