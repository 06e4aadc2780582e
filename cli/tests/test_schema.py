"""The JSON Schema knows what a file may say, and refuses what core refuses."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from torchplug.discovery import discover
from torchplug.options import documentation, fields_of
from torchplug.settings import Settings
from torchplug_cli.json_schema import config_schema
from torchplug_cli.reading import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def schema():
    return config_schema()


@pytest.fixture(scope="module")
def problems(schema):
    """What a validator says of a text."""
    validator = Draft202012Validator(schema)
    return lambda text: [error.message for error in validator.iter_errors(json.loads(json.dumps(load(text))))]


def test_the_command_prints_it_as_a_schema_of_draft_2020_12(project, schema):
    code, output, _ = project("schema")
    assert code == 0 and json.loads(output) == json.loads(json.dumps(schema))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


def test_every_option_of_every_installed_plugin_is_in_it(schema):
    seen = set()
    for found in discover():
        cls = found.load()
        if not isinstance(cls, type):
            continue
        seen.add(found.name)
        properties = schema["$defs"][found.name]["properties"]
        assert set(properties) == {option.name for option in fields_of(cls)} | {"on_error"}, found.name
        for option in fields_of(cls):
            described = properties[option.name]
            assert described["description"] == documentation(cls)[option.name]
            assert ("default" in described) == (option.default != "required"), (found.name, option.name)
            assert {"type", "enum", "anyOf"} & set(described), (found.name, option.name)
    assert seen >= {"ema", "checkpoint", "tensorboard", "ddp"}
    assert len(seen) + 1 >= len(entry_points(group="torchplug"))


def test_every_argument_of_the_trainer_is_in_it_with_type_range_choices_and_default(schema):
    trainer = schema["properties"]["trainer"]["properties"]
    assert trainer.keys() == {field.name for field in fields_of(Settings)} - {"plugins"}
    assert trainer["log_every_n_steps"] == {
        "type": "integer",
        "minimum": 1,
        "default": 50,
        "description": documentation(Settings)["log_every_n_steps"],
    }
    assert trainer["gradient_clip_algorithm"]["enum"] == ["norm", "value"]
    assert {"type": "number", "exclusiveMinimum": 0} in trainer["limit_train_batches"]["anyOf"]
    assert trainer["signals"]["default"] == ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"]


@pytest.mark.parametrize(
    "text",
    [
        "trainer: {max_epochs: 3, precision: 16, devices: [0, 1], strategy: {ddp: {}}, max_time: 1h, root_dir: out, fast_dev_run: true}",
        "plugins: [standard, 'checkpoint:best', torchplug-ema/ema, {ema: {decay: 0.9}}]",
        "plugins: [{'checkpoint:best': {top_k: 3, every_time: 10m, on_error: abort}}]",
        "plugins: [{mine: {class_path: 'a.py:B', init_args: {x: 1}}}, {progress: null}]",
        "plugins: [{accumulation_schedule: {scheduling: {0: 4}}}, {swa: {lr: [0.1, 0.2], start: 0.5}}, {throughput: {tokens: key}}]",
        "plugins: [{lambda_hooks: {hooks: {on_fit_start: 'a:b'}}}, {tensorboard: {hparams_metrics: {a: min}}}]",
        "module: {class_path: a.B, init_args: {x: {class_path: c.D}}}\ndata: {class_path: a.c}\nckpt_path: last\nversions: {torch: '2'}",
        "{}",
    ],
)
def test_what_core_takes_is_valid(problems, text):
    assert problems(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "triner: {}", "trainer: {max_epoch: 3}", "trainer: {max_epochs: three}", "trainer: {max_epochs: 0}", "trainer: {precision: '64'}",
        "trainer: {plugins: []}", "trainer: {limit_train_batches: 0}", "plugins: {ema: {}}", "plugins: [emma]", "plugins: [{emma: {}}]",
        "plugins: [{ema: {decy: 0.9}}]", "plugins: [{ema: {decay: high}}]", "plugins: [{ema: {}, csv: {}}]", "plugins: [3]",
        "plugins: [{early_stopping: {patience: 3}}]", "plugins: [{checkpoint: {mode: most}}]", "plugins: [{ema: {on_error: ignore}}]",
        "plugins: [{standard: {a: 1}}]", "plugins: [{tensorboard: {close_timeout: 0}}]", "module: {init_args: {}}",
        "module: {class_path: 3}", "module: {class_path: a.B, lr: 1}", "module: nets.Net", "ckpt_path: 3",
    ],
)  # fmt: skip
def test_what_core_refuses_is_not(problems, text):
    assert problems(text)


def test_files_of_runs_printed_ones_and_the_example_are_valid(problems, project):
    assert project("fit", "config.yaml", "--set", "plugins.ema={decay: 0.9}", "--set", "plugins.csv={}")[0] == 0
    assert problems((project.folder / "config.yaml").read_text()) == []
    assert problems((project.folder / "runs/Net/version_0/config.yaml").read_text()) == []
    assert problems(project("fit", "config.yaml", "--print-config")[1]) == []
    assert problems(project("fit", "--print-config")[1]) == []
    assert problems((ROOT / "examples/config.yaml").read_text()) == []


def test_a_plugin_that_cannot_be_imported_is_named_and_does_not_break_it(project, monkeypatch):
    info = project.folder / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchplug]\nbroken = broken_module:Broken\n")
    project.write("broken_module.py", "raise RuntimeError('this one is broken')")
    monkeypatch.syspath_prepend(str(project.folder))
    code, output, said = project("schema")
    assert code == 0
    assert "plugin 'broken' (broken 1.0)" in said and "this one is broken" in said
    made = json.loads(output)
    assert "properties" not in made["$defs"]["broken"] and made["$defs"]["ema"]["properties"]
    assert not list(Draft202012Validator(made).iter_errors({"plugins": ["broken", {"broken": {"any": 1}}]}))
