"""--print-config: every default with what it means, and a configuration itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml

from torchplug.checkpoint import load as load_checkpoint
from torchplug.discovery import discover, find
from torchplug.options import fields_of
from torchplug.settings import Settings
from torchplug_cli.commands import Config
from torchplug_cli.reading import load, whole


def flat(text):
    """The text without line breaks and comment signs, to look for sentences that were wrapped."""
    return " ".join(text.replace("#", " ").split())


@pytest.fixture(scope="module")
def every():
    """All installed plugins that need no option, and those that need one with it."""
    needed = {
        "early_stopping": {"monitor": "x"},
        "freeze": {"frozen": ["a"]},
        "accumulation_schedule": {"scheduling": {0: 2}},
        "lambda_hooks": {"hooks": {}},
    }
    names = [found.name for found in discover() if isinstance(found.load(), type)]
    return [{name: needed.get(name, {})} for name in names]


def test_it_holds_every_default_of_the_trainer_and_of_the_plugins_with_its_text(project, every):
    file = project.write("all.yaml", f"trainer: {{seed: 5}}\nplugins: {every}")
    code, text, _ = project("fit", file, "--print-config")
    assert code == 0
    whole_text, values = flat(text), load(text)
    assert values["trainer"].keys() == {field.name for field in fields_of(Settings)} - {"plugins"}
    assert (values["trainer"]["seed"], values["trainer"]["max_epochs"], values["trainer"]["log_every_n_steps"]) == (5, None, 50)
    for field in fields_of(Settings):
        assert field.name == "plugins" or flat(field.text) in whole_text, field.name
    shown = {name: options for each in values["plugins"] for name, options in each.items()}
    for name in (next(iter(each)) for each in every):
        cls = find(name).load()
        for field in fields_of(cls):
            assert field.name in shown[name] and flat(field.text) in whole_text, (name, field.name)
        for field in dataclasses.fields(cls):
            if field.init and isinstance(field.default, (int, str, bool)):
                assert shown[name][field.name] == field.default


def test_what_is_printed_is_a_configuration_that_builds_the_same(project, every, fields):
    file = project.write(
        "all.yaml", f"plugins: {every}\nmodule: {{class_path: nets.Net, init_args: {{tag: no}}}}\ndata: {{class_path: nets.loaders}}"
    )
    text = project("fit", file, "--print-config", "--set", "plugins.ema.decay=0.5")[1]
    again = project.write("printed.yaml", text)
    assert project("fit", again, "--print-config")[1] == text
    printed, given = Config(whole([again], [])), Config(whole([file], ["plugins.ema.decay=0.5"]))
    one, other = printed.trainer(), given.trainer()
    for name, plugin in other.enabled.items():
        assert {**fields(one.enabled[name]), "on_error": 0} == {**fields(plugin), "on_error": 0}, name
    assert one.enabled["ema"].decay == 0.5
    assert yaml.safe_load(text)["module"] == {"class_path": "nets.Net", "init_args": {"lr": 0.1, "tag": "no", "fails": "", "ends": None}}


def test_it_runs_as_it_is_printed(project):
    again = project.write("printed.yaml", project("fit", "config.yaml", "--print-config")[1])
    assert project("fit", again)[0] == project("fit", "config.yaml")[0] == 0
    one, other = [load_checkpoint(project.folder / f"runs/Net/version_{n}/checkpoints/last.safetensors")["module"] for n in (0, 1)]
    assert one and all(torch.equal(one[name], other[name]) for name in one)


def test_arguments_of_classes_stand_there_with_their_texts(project):
    text = project("fit", "config.yaml", "--print-config")[1]
    module = text.partition("module:")[2]
    assert "# the learning rate.\n    lr: 0.1\n" in module
    assert '# how many.\n    "n": 24\n' in module or "# how many.\n    n: 24\n" in module
    assert "# A small net.\nmodule:" in text


def test_what_must_be_given_is_a_comment(project):
    text = project("fit", "config.yaml", "--print-config", "--set", "module.class_path=nets.Built", "--set", "plugins.early_stopping={}")[1]
    assert "# what it is built around.\n    # encoder:  # must be given\n" in text
    assert "# monitor:  # must be given" in text
    assert load(text)["module"]["init_args"] == {"lr": 0.1}


def test_a_default_that_cannot_be_written_is_a_comment(project):
    lines = (
        "import torch",
        "from nets import Net",
        "class Act(Net):",
        "    def __init__(self, act=torch.nn.ReLU()):",
        "        super().__init__()",
    )
    project.write("more.py", "\n".join(lines))
    text = project("fit", "config.yaml", "--print-config", "--set", "module.class_path=more.Act")[1]
    assert "    # act: ReLU()  # the default\n" in text
    assert load(text)["module"] == {"class_path": "more.Act", "init_args": None}
    assert project("fit", project.write("printed.yaml", text), "--print-config")[0] == 0


def test_without_a_file_it_is_a_template_with_the_plugins_that_a_trainer_has(project):
    code, text, _ = project("fit", "--print-config")
    assert code == 0
    assert [next(iter(each)) for each in load(text)["plugins"]] == find("standard").load()
    assert "# module:" in text and "module" not in load(text)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("trainer.max_epoch=1", "did you mean 'max_epochs'?"),
        ("plugins.ema.decy=1", "did you mean 'decay'?"),
        ("plugins.early_stopping.patince=1", "did you mean 'patience'?"),
        ("plugins.emma={}", "did you mean 'ema'?"),
        ("module.init_args.lrr=1", "did you mean 'lr'?"),
        ("module.init_args.lr=x", "module.init_args.lr must be of type float, got x"),
    ],
)
def test_a_mistake_is_said_here_too(project, setting, said):
    assert said in project.refused("fit", "config.yaml", "--print-config", "--set", setting)
