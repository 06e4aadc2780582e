"""``torchplug replay``: what it sends, and what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchplug import Module, Trainer
from torchplug.cli import main


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any) -> Any:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    trainer = Trainer(max_epochs=2, log_every_n_steps=1, root_dir=tmp_path, plugins=["journal"], accelerator="cpu")
    trainer.fit(Net(), [torch.ones(2, 2)] * 3)
    assert trainer.run is not None
    return trainer.run.dir


def points(folder: Path) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]


def recorded(journal: Path) -> list[tuple[int, Any]]:
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    return [(record["step"], pytest.approx(record["metrics"]["loss"])) for record in records if record["event"] == "log_metrics"]


def test_a_logger_that_was_not_there_gets_everything_once(run_dir: Path, capsys: Any) -> None:
    lines = len((run_dir / "journal.jsonl").read_text().splitlines())
    for sent in (lines, 0):
        assert main(["replay", str(run_dir), "--to", "tensorboard"]) == 0
        assert capsys.readouterr().out == f"tensorboard: {sent} records sent; tensorboard --logdir {run_dir}\n"
        assert points(run_dir / "tensorboard") == recorded(run_dir / "journal.jsonl")


def test_options_are_those_of_the_run_and_those_that_are_given_now(tmp_path: Path) -> None:
    plugins = [{"tensorboard": {"dir": str(tmp_path / "first"), "close_timeout": 5.0}}]
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, root_dir=tmp_path, plugins=plugins, accelerator="cpu")
    trainer.fit(Net(), [torch.ones(2, 2)] * 3)
    assert trainer.run is not None
    expected = recorded(trainer.run.dir / "journal.jsonl")
    options = json.dumps({"tensorboard": {"dir": str(tmp_path / "second")}})
    assert main(["replay", str(trainer.run.dir), "--to", "tensorboard"]) == 0
    assert main(["replay", str(trainer.run.dir), "--to", "tensorboard", "--options", options]) == 0
    assert points(tmp_path / "first") == points(tmp_path / "second") == expected
    assert not (trainer.run.dir / "tensorboard").exists()


def test_a_journal_that_lies_elsewhere_is_named_itself(tmp_path: Path) -> None:
    plugins = [{"journal": {"dir": str(tmp_path / "journals")}}]
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, root_dir=tmp_path, plugins=plugins, accelerator="cpu")
    trainer.fit(Net(), [torch.ones(2, 2)] * 3)
    assert trainer.run is not None
    journal = tmp_path / "journals" / "journal.jsonl"
    assert main(["replay", str(journal), "--to", "tensorboard"]) == 0
    assert points(trainer.run.dir / "tensorboard") == recorded(journal)


def test_what_cannot_be_delivered_is_said_and_the_others_get_theirs(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "taken").write_text("a file")
    options = json.dumps({"tensorboard:a": {"dir": str(tmp_path / "taken")}})
    assert main(["replay", str(run_dir), "--to", "tensorboard:a, tensorboard:b", "--options", options]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("tensorboard:a: FileExistsError: ") and "tensorboard:b: " in said.out
    assert points(run_dir / "tensorboard_b") == recorded(run_dir / "journal.jsonl")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--to", "nothing"], "plugin 'nothing' is not installed"),
        (["--to", "csv"], "plugin 'csv' cannot take a journal"),
        (["--to", "tensorboard", "--options", '{"tensorboard": {"dirr": 1}}'], "no option 'dirr', did you mean 'dir'?"),
        (["--to", "tensorboard", "--options", '{"mlflow": {}}'], "--options names 'mlflow', which is not in --to tensorboard"),
        (["--to", "tensorboard", "--options", "[1]"], "--options takes a JSON object with the options of each logger, got [1]"),
        (["--to", "tensorboard", "--options", "{"], "Expecting property name"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], text: str, run_dir: Path, capsys: Any) -> None:
    assert main(["replay", str(run_dir), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("torchplug: ") and text in said and said.count("\n") == 1


def test_a_folder_without_a_journal_and_a_file_that_is_none(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["replay", str(tmp_path), "--to", "tensorboard"]) == 2
    assert "is not there; name the directory of a run in which the plugin journal was enabled" in capsys.readouterr().err
    (run_dir / "journal.jsonl").write_text("nothing of that kind\n")
    assert main(["replay", str(run_dir), "--to", "tensorboard"]) == 2
    assert "is not the journal of a run" in capsys.readouterr().err
