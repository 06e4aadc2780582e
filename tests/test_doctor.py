"""``torchplug doctor`` says what is installed, and what would stop a run, with the remedy."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest
import torch

import torchplug
from torchplug.cli import main
from torchplug.testing import hermetic

GOOD = """
    from torchplug import hookimpl

    class Good:
        @hookimpl
        def on_fit_start(self): ...
"""


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Any:
    """What it prints and its exit code, with nothing installed but what the test made."""

    def call(*names: str, arguments: tuple[str, ...] = ()) -> tuple[int, str]:
        with hermetic(*names):
            code = main(["doctor", *arguments])
        return code, capsys.readouterr().out

    return call


def problems(output: str) -> list[str]:
    return [line.removeprefix("PROBLEM ") for line in output.splitlines() if line.startswith("PROBLEM ")]


def test_it_shows_versions_and_devices(doctor: Any) -> None:
    code, output = doctor()
    shown = dict(re.split(r" +", line, maxsplit=1) for line in output.splitlines() if " " in line)
    assert code == 0 and "nothing is wrong" in output
    assert (shown["torchplug"], shown["torch"]) == (torchplug.__version__, str(torch.__version__))
    assert shown["devices"].startswith("cpu (") and "gloo" in shown["distributed"]
    assert {"python", "pluggy", "safetensors", "plugins", "lock"} <= shown.keys()


def test_a_good_plugin_is_listed_and_no_problem(doctor: Any, package: Any) -> None:
    package("acme-good", GOOD, good="Good")
    code, output = doctor("good")
    assert code == 0 and re.search(r"^plugins +good$", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("source", "requires", "said"),
    [
        ("import no_such_module", [], "there is no module 'no_such_module': pip install what 'no_such_module' is part of"),
        ("1 / 0", [], "acme_bad:Bad cannot be imported: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", [], "acme_bad:Bad cannot be imported: SystemExit: 3"),
        ("x = 1", [], "acme_bad:Bad cannot be imported: AttributeError"),
        (GOOD.replace("Good", "Bad"), ["torchplug>=9"], "is made for torchplug>=9, and torchplug "),
    ],
)
def test_a_plugin_that_cannot_be_used_is_a_problem_with_its_reason(
    doctor: Any, package: Any, source: str, requires: list[str], said: str
) -> None:
    package("acme-bad", source, requires=requires, bad="Bad")
    package("acme-good", GOOD, good="Good")
    code, output = doctor("bad", "good")
    (problem,) = problems(output)
    assert code == 1 and problem.startswith("plugin 'bad' (acme-bad 1.0)") and said in problem
    assert re.search(r"^plugins +good$", output, re.MULTILINE)


def test_a_name_that_two_packages_have_is_a_problem(package: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for distribution in ("acme-good", "other-good"):
        package(distribution, GOOD, good="Good")
    assert main(["doctor"]) == 1
    (problem,) = problems(capsys.readouterr().out)
    assert problem == "plugin 'good' is provided by acme-good 1.0 and other-good 1.0: write 'acme-good/good' to take the first"


def test_a_package_that_is_there_twice_is_a_problem(package: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = package("acme-good", GOOD, good="Good")
    shutil.copytree(next(folder.glob("*.dist-info")), folder / "acme_good-0.9.dist-info")
    assert main(["doctor"]) == 1
    assert problems(capsys.readouterr().out) == [
        "plugin 'good': acme-good is installed twice; pip uninstall it twice, and install it again"
    ]


def test_broken_metadata_is_a_problem_of_its_own(doctor: Any, package: Any) -> None:
    folder = package("acme-broken", GOOD, good="Good")
    package("acme-fine", GOOD, fine="Good")
    (next(folder.glob("*.dist-info")) / "METADATA").write_text("nothing", encoding="utf-8")
    code, output = doctor("fine")
    (problem,) = problems(output)
    assert code == 1 and "acme_broken-1.0.dist-info cannot be read: METADATA has no name or no version" in problem


def test_the_lock_is_compared(doctor: Any, tmp_path: Any) -> None:
    (tmp_path / "torchplug.lock").write_text(
        '{"version": 1, "packages": {"gone": {"distribution": "gone", "version": "1", "hash": "x"}}}', encoding="utf-8"
    )
    code, output = doctor()
    assert code == 1 and "torchplug.lock, differences: 2" in output and "plugin 'gone/gone' is not installed" in problems(output)[1]
    code, output = doctor(arguments=("--lock", "elsewhere.lock"))
    assert code == 1 and "there is no such file" in problems(output)[0]


def test_the_variable_that_leaves_plugins_out_is_said(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHPLUG_PLUGINS", "none")
    assert problems(doctor()[1]) == ["the environment variable TORCHPLUG_PLUGINS=none leaves every plugin out of every run"]


def test_what_the_lock_refuses_is_not_imported(doctor: Any, package: Any, tmp_path: Any) -> None:
    package("acme-bad", "raise SystemExit('imported')", bad="Bad")
    entry = {"distribution": "acme-bad", "version": "1.0", "hash": "x"}
    (tmp_path / "torchplug.lock").write_text(json.dumps({"version": 1, "packages": {"bad": entry}}), encoding="utf-8")
    found = problems(doctor("bad")[1])
    assert any("installed without a RECORD" in each for each in found) and not any("imported" in each for each in found)


def test_a_command_that_cannot_be_imported_or_is_there_twice_is_a_problem(doctor: Any, package: Any) -> None:
    for distribution in ("acme-good", "other-good"):
        info = next(package(distribution, "1 / 0").glob("*.dist-info"))
        (info / "entry_points.txt").write_text(f"[torchplug.commands]\nshout = {distribution.replace('-', '_')}:main\n", encoding="utf-8")
    found = problems(doctor()[1])
    assert sum("cannot be imported: ZeroDivisionError" in each for each in found) == 2
    assert "the command 'shout' is provided by acme-good 1.0 and other-good 1.0: uninstall one" in found
    assert main(["shout"]) == 2


def test_an_annotation_that_is_not_there_when_the_program_runs_is_a_problem(doctor: Any, package: Any) -> None:
    source = """
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from pathlib import Path

        @dataclass(kw_only=True, eq=False)
        class Bad:
            folder: Path | None = None
    """
    package("acme-bad", source, bad="Bad")
    said = "the annotation of an option of Bad names 'Path', which is not there when the program runs: import it outside of TYPE_CHECKING"
    assert said in problems(doctor("bad")[1])[0]
    with pytest.raises(torchplug.PluginError, match=said):
        torchplug.Trainer(plugins=["bad"])


def test_a_torch_that_cannot_be_imported_is_a_problem_and_no_traceback(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchplug import doctor as module

    def broken(name: str) -> Any:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(module, "import_module", broken)
    code, output = doctor()
    assert code == 1 and problems(output) == ["torch cannot be imported: ImportError: libcudart.so.12: cannot open shared object file"]
