"""What the bundle promises: it names what it depends on, and Trainer takes it when no plugins are named."""

import re
import sys
from pathlib import Path

import pytest
import torch

from torchplug import PluginError, Trainer
from torchplug.testing import check_plugin
from torchplug_standard import plugins

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it


def project():
    return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


@pytest.mark.slow
def test_it_passes_the_conformance_checks():
    check_plugin("standard")


def test_the_list_names_exactly_the_plugins_that_the_package_depends_on_but_for_the_gpu_which_the_accelerator_names():
    needed = project()["dependencies"]
    assert needed[0] == "torchplug>=0.1,<0.2"
    assert needed[1:] == [f"torchplug-{name.replace('_', '-')}>=0.1,<0.2" for name in (*plugins, "gpu")]


@pytest.mark.parametrize("named", [None, ["standard"]])
def test_where_a_gpu_is_there_a_trainer_uses_it_unless_it_is_told_otherwise(named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert list(Trainer(max_epochs=1, plugins=named).enabled) == ["gpu", *plugins]
    assert list(Trainer(max_epochs=1, plugins=named, accelerator="cpu").enabled) == plugins
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert list(Trainer(max_epochs=1, plugins=named).enabled) == plugins


def test_the_entry_point_is_the_list():
    assert project()["entry-points"]["torchplug"] == {"standard": "torchplug_standard:plugins"}


def test_the_readme_shows_every_plugin_of_the_list():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)`", readme, re.MULTILINE) == plugins


@pytest.mark.parametrize("named", [None, ["standard"]])
def test_a_trainer_has_its_plugins_when_it_is_named_or_nothing_is(named):
    assert list(Trainer(max_epochs=1, plugins=named, accelerator="cpu").enabled) == plugins


def test_a_plugin_named_beside_the_bundle_has_the_options_given():
    trainer = Trainer(max_epochs=1, plugins=["standard", {"journal": {"dir": "elsewhere"}}], accelerator="cpu")
    assert sorted(trainer.enabled) == sorted(plugins)
    assert trainer.enabled["journal"].dir == "elsewhere"


def test_the_bundle_itself_takes_no_options():
    with pytest.raises(PluginError, match="is a bundle of progress, summary, checkpoint, journal, tensorboard and takes no options"):
        Trainer(max_epochs=1, plugins=[{"standard": {"rate": 5}}])
