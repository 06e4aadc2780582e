"""The logger keeps the rules of plugins and of loggers, and writes what was logged."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torchplug import PluginError, Trainer
from torchplug.testing import check_logger, check_plugin, tiny_fit
from torchplug.tracking import Place, deliver, first

from torchplug_quokka import Quokka


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of all deliveries of a run."""
    (file,) = (run_dir / "quokka").iterdir()
    return [row for line in file.read_text(encoding="utf-8").splitlines() for row in json.loads(line)["rows"]]


def stored(run_dir: Path) -> Iterator[tuple[str, int, float]]:
    """The same as name, step and value, for `check_logger`."""
    for row in rows(run_dir):
        for name, value in row["metrics"].items():
            yield name, row["step"], value


def written(**options: Any) -> list[dict[str, Any]]:
    """The rows of a tiny fit."""
    trainer = tiny_fit({"quokka": options}, max_epochs=2, log_every_n_steps=1)
    assert trainer.run is not None
    return rows(trainer.run.dir)


def test_it_keeps_the_rules() -> None:
    check_plugin("quokka")


def test_it_keeps_the_rules_of_loggers() -> None:
    check_logger("quokka", read=stored)


def test_it_writes_what_was_logged_at_the_steps_it_was_logged_at() -> None:
    train = [row for row in written() if "train_loss" in row["metrics"]]
    assert [(row["step"], row["epoch"], row["samples"]) for row in train] == [(step, (step - 1) // 4, 2 * step) for step in range(1, 9)]


def test_only_metrics_with_the_prefix_are_kept() -> None:
    assert {name for row in written(prefix="val") for name in row["metrics"]} == {"val_loss"}


def test_a_line_that_a_kill_cut_short_is_sent_again() -> None:
    trainer = tiny_fit("quokka", log_every_n_steps=1)
    assert trainer.run is not None
    folder, before = trainer.run.dir, rows(trainer.run.dir)
    (file,) = (folder / "quokka").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    journal = folder / "journal.jsonl"
    deliver(Quokka().backend(), Place(journal, first(journal), folder, folder / "quokka"))
    assert rows(folder) == before


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(PluginError, match="prefix must be the beginning of a metric's name, without spaces around it, got ' val'"):
        Trainer(max_epochs=1, plugins=[{"quokka": {"prefix": " val"}}])


def test_the_readme_lists_every_option() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for option in dataclasses.fields(Quokka):
        assert not option.init or f"| `{option.name}` |" in readme
