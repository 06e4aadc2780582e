"""The plugin keeps the rules of plugins, and is called when its hooks are."""

import dataclasses
import logging
from pathlib import Path

import pytest
from torchplug import PluginError, Trainer
from torchplug.testing import check_plugin, recorded, tiny_fit

from torchplug_quokka import Quokka

HOOKS = ("on_train_batch_end",)


def test_it_keeps_the_rules() -> None:
    check_plugin("quokka")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "torchplug_quokka"]


def test_it_is_called_whenever_its_hooks_are(caplog: pytest.LogCaptureFixture) -> None:
    calls = recorded(*HOOKS)
    with caplog.at_level(logging.INFO, "torchplug_quokka"):
        tiny_fit(calls, {"quokka": {"log_calls": True}}, max_epochs=2)
    assert said(caplog) == [f"{hook} is called" for hook in calls.names]


def test_it_says_nothing_unless_it_is_asked_to(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "torchplug_quokka"):
        tiny_fit("quokka")
    assert not said(caplog)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(PluginError, match="log_calls must be True or False, got 1"):
        Trainer(max_epochs=1, plugins=[{"quokka": {"log_calls": 1}}])


def test_the_readme_lists_every_option() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for option in dataclasses.fields(Quokka):
        assert not option.init or f"| `{option.name}` |" in readme
