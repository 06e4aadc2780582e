"""Listing plugins reads metadata alone: quickly, without torch, and whatever is broken in one package is no matter of the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchplug
from torchplug.cli import main
from torchplug.discovery import Catalogue, discover, scan

PLUGIN = "raise SystemExit('imported')"
WATCH = """
import builtins, io, json, os, sys
read = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and "dist-info" in arguments[0]:
        read.append(arguments[0])
sys.addaudithook(watch)
from torchplug.cli import main
main(["plugins"])
mine = [name for name in sys.modules if name.startswith(("package_", "torchplug_"))]
heavy = [name for name in ("torch", "pluggy", "importlib.metadata", "numpy") if name in sys.modules]
print(json.dumps({"read": read, "imported": mine, "heavy": heavy}))
"""


def site(folder: Path, distributions: int, plugins: int) -> Path:
    """A folder as pip leaves it: of many packages, each with other entry points, a few are plugins."""
    for i in range(distributions):
        info = folder / f"package_{i}-1.{i}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: package-{i}\nVersion: 1.{i}\nSummary: Does thing {i} \n\nA text.\nName: no\n", encoding="utf-8"
        )
        group = "torchplug" if i < plugins else "console_scripts"
        if i % 3 == 0 or i < plugins:
            (info / "entry_points.txt").write_text(f"[{group}]\nname_{i} = package_{i}:Class\n", encoding="utf-8")
        (folder / f"package_{i}.py").write_text(PLUGIN, encoding="utf-8")
    return folder


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds ``folder`` first."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=60, check=True
    )


def test_with_300_packages_it_looks_once_at_each_and_imports_nothing(tmp_path: Path) -> None:
    lines = python(WATCH, site(tmp_path / "site", 300, 20)).stdout.splitlines()
    seen = json.loads(lines[-1])
    listed = [line.split(maxsplit=4) for line in lines if line.startswith("name_")]
    assert sorted(listed) == sorted([f"name_{i}", f"package-{i}", f"1.{i}", "available", f"Does thing {i}"] for i in range(20))
    assert seen["imported"] == [] and seen["heavy"] == []
    mine = [path for path in seen["read"] if "/package_" in path]
    assert len(mine) == 300 + 20 + 20, "entry points of all, and those and METADATA of the plugins"


def broken(folder: Path, name: str, **files: bytes | None) -> None:
    """A package with these files in its metadata."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    whole = {"METADATA": f"Name: {name}\nVersion: 1.0\n\n".encode(), "entry_points": f"[torchplug]\n{name} = {name}:X\n".encode(), **files}
    for file, content in whole.items():
        if content is not None:
            (info / {"entry_points": "entry_points.txt"}.get(file, file)).write_bytes(content)


CASES: dict[str, dict[str, bytes | None]] = {
    "no_metadata": {"METADATA": None},
    "empty_metadata": {"METADATA": b""},
    "no_version": {"METADATA": b"Name: no_version\n"},
    "binary_metadata": {"METADATA": b"\xff\xfe\x00"},
    "binary_entry_points": {"entry_points": b"[torchplug]\n\xff = \xfe"},
    "no_equals": {"entry_points": b"[torchplug]\njust words\n"},
    "no_value": {"entry_points": b"[torchplug]\nname =\n"},
}


@pytest.mark.parametrize("name", CASES)
def test_broken_metadata_is_said_and_does_not_break_the_listing(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    broken(tmp_path / "site", "fine")
    broken(tmp_path / "site", name, **CASES[name])
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert main(["plugins", "-v"]) == 0
    out, err = capsys.readouterr()
    assert "\nfine " in out and "\ncheckpoint " in out
    assert err.startswith(f"torchplug: the metadata in {tmp_path / 'site' / name}-1.0.dist-info cannot be read: ")
    assert len(err.splitlines()) == 1


def test_a_plugin_whose_import_fails_is_listed_with_the_reason(tmp_path: Path, monkeypatch, capsys) -> None:
    broken(tmp_path / "site", "fine")
    (tmp_path / "site" / "fine.py").write_text("1 / 0", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert main(["plugins"]) == 0
    assert "ZeroDivisionError" not in capsys.readouterr().out
    assert main(["plugins", "-v"]) == 0
    assert "fine:X cannot be imported: ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_a_name_that_is_not_found_says_which_metadata_cannot_be_read(tmp_path: Path, monkeypatch) -> None:
    broken(tmp_path / "site", "wanted", METADATA=None)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(Exception, match=r"plugin 'wanted' is not installed.*; the metadata in .*wanted-1.0.dist-info cannot be read"):
        Catalogue().find("wanted")


def test_the_first_of_two_versions_on_the_path_is_the_one(tmp_path: Path, monkeypatch) -> None:
    for place, entry in (("later", b"[torchplug]\ntwice = twice:Old\n"), ("first", b"[torchplug]\nagain = twice:New\n")):
        broken(tmp_path / place, "twice", entry_points=entry)
        monkeypatch.syspath_prepend(tmp_path / place)
    assert [(each.name, each.value) for each in discover() if each.distribution == "twice"] == [("again", "twice:New")]


def test_what_stands_in_the_metadata_is_read_as_the_standard_library_reads_it() -> None:
    from importlib.metadata import entry_points

    for group in ("torchplug", "torchplug.commands"):
        theirs = {(each.name, each.value, each.dist.name, each.dist.version) for each in entry_points(group=group) if each.dist}
        assert {(each.name, each.value, each.distribution, each.version) for each in scan(group)[0]} == theirs != set()


def test_other_packages_bring_commands(tmp_path: Path, monkeypatch, capsys) -> None:
    broken(tmp_path / "site", "acme", entry_points=b"[torchplug.commands]\nshout = acme:main\n")
    (tmp_path / "site" / "acme.py").write_text("def main(words):\n    print('!'.join(words))\n    return 5", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert main(["shout", "a", "--b"]) == 5
    assert capsys.readouterr().out == "a!--b\n"
    assert main([]) == 2 and "from acme 1.0" in capsys.readouterr().out
    assert main(["shoot"]) == 2 and "the command 'shoot' is not there, did you mean 'shout'?" in capsys.readouterr().err


def test_a_command_for_another_core_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    broken(
        tmp_path / "site", "acme", entry_points=b"[torchplug.commands]\nshout = acme:main\n",
        METADATA=b"Name: acme\nVersion: 1.0\nRequires-Dist: torchplug>=9\n\n",
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert main(["shout"]) == 2
    assert "is made for torchplug>=9" in capsys.readouterr().err


def test_the_version_is_said(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"torchplug {torchplug.__version__}\n"


@pytest.mark.slow
def test_who_reads_may_stop_reading() -> None:
    code = "import sys; from torchplug.cli import main; sys.exit(main(['explain']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_a_file_that_cannot_be_written_is_one_line(capsys) -> None:
    assert main(["lock", "/no/such/folder/a.lock", "--plugins", "csv"]) == 2
    assert "No such file or directory" in capsys.readouterr().err
