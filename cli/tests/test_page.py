"""What docs/command-line.md and the README of this package show is true: their files and commands are used as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from torchplug.checkpoint import load as load_checkpoint
from torchplug.cli import main
from torchplug_cli import commands
from torchplug_cli.reading import load

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "command-line.md"
README = ROOT / "cli" / "README.md"


def blocks(page, *languages):
    """Language and text of the blocks of a page."""
    return [found for found in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE) if found[0] in languages]


def test_the_page_can_be_followed(project):
    ran = []
    for language, text in blocks(PAGE, "python", "yaml", "sh"):
        if language == "sh":
            for line in text.splitlines():
                name, *words = shlex.split(line)
                if name == "torchplug":
                    assert main(words) == 0, line
                    ran.append(words)
        else:
            project.write(text.partition("\n")[0].removeprefix("# "), text)
    assert len(ran) >= 10 and {words[0] for words in ran} == {"fit", "validate", "schema"}
    first, *_ = sorted(project.folder.glob("runs/Line/version_*/config.yaml"), key=lambda path: int(path.parent.name[8:]))
    newest = max(project.folder.glob("runs/Line/version_*"), key=lambda path: int(path.name[8:]))
    one, other = [load_checkpoint(folder / "checkpoints" / "last.safetensors")["module"] for folder in (first.parent, newest)]
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert project("fit", str(first))[0] == 0


def test_the_readme_has_every_command_and_option(capsys):
    text = README.read_text()
    assert set(re.findall(r"^\| `torchplug (\w+)", text, re.MULTILINE)) == set(commands.ABOUT) | {"schema"}
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert set(re.findall(r"^\| `(--[a-z-]+)", text, re.MULTILINE)) == options
    ((_, example),) = blocks(README, "yaml")
    assert load(example).keys() == {"trainer", "plugins", "module", "data"}


def test_the_example_runs(project, monkeypatch):
    monkeypatch.chdir(ROOT)
    short = ["--set", "trainer.max_epochs=2", "--set", f"trainer.root_dir={project.folder}"]
    code, _, said = project("fit", "examples/config.yaml", *short)
    assert code == 0 and "val_accuracy" in said
    code, output, _ = project("test", "examples/config.yaml", *short, "--ckpt-path", "last")
    assert code == 0 and load(output)[0]["test_accuracy"] > 0.6
