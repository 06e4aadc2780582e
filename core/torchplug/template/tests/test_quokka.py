"""The plugin keeps the rules of plugins, and counts."""

import dataclasses
from pathlib import Path

import pytest
from torchplug import PluginError, Trainer
from torchplug.testing import TinyModule, check_plugin, tiny_fit

from torchplug_quokka import Quokka


def test_it_keeps_the_rules() -> None:
    check_plugin("quokka")


def test_it_counts_batches_and_logs_the_count() -> None:
    trainer = tiny_fit({"quokka": {"every_n_epochs": 2}}, module=TinyModule(train=5), max_epochs=3)
    assert trainer.enabled["quokka"].batches == 15
    assert trainer.metrics["batches"] == 10  # of the second epoch, the last one in which it was logged


def test_it_counts_on_from_a_checkpoint() -> None:
    plugin, again = Quokka(), Quokka()
    tiny_fit(plugin, module=TinyModule(train=5))
    again.load_state_dict(plugin.state_dict())
    assert again.batches == 5


def test_it_begins_anew_in_another_run() -> None:
    plugin = Quokka()
    for _ in range(2):
        tiny_fit(plugin, module=TinyModule(train=5))
    assert plugin.batches == 5


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_options_that_cannot_be_are_refused(value: object) -> None:
    with pytest.raises(PluginError, match=f"every_n_epochs must be a whole number of epochs, at least 1, got {value!r}"):
        Trainer(max_epochs=1, plugins=[{"quokka": {"every_n_epochs": value}}])


def test_the_readme_lists_every_option() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for option in dataclasses.fields(Quokka):
        assert not option.init or f"| `{option.name}` |" in readme
