"""Python, a file and the command line say the same, and build equal objects."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from torchplug import Trainer
from torchplug.discovery import installed
from torchplug.settings import Settings
from torchplug_cli.commands import Config
from torchplug_cli.reading import whole


def name_of(each):
    """The plugin that an entry of the list names."""
    return (each if isinstance(each, str) else next(iter(each))).partition(":")[0]


# every bundled plugin, with options that are not the defaults; two instances of one
ALL = [
    "progress",
    {"summary": {"max_depth": 2}},
    {"checkpoint": {"monitor": "val_loss", "top_k": 3, "every_time": "10m", "filename": "{epoch}-{val_loss:.3f}"}},
    {"checkpoint:best": {"mode": "max", "last": False, "dir": "best"}},
    {"journal": {"dir": "logs"}},
    {"tensorboard": {"close_timeout": 5, "hparams_metrics": {"val_loss": "min"}}},
    {"csv": {"on_error": "abort"}},
    {"early_stopping": {"monitor": "val_loss", "patience": 5, "min_delta": 1e-3, "stopping_threshold": -1}},
    {"ema": {"decay": 0.99, "warmup": True}},
    {"swa": {"start": 0.5, "lr": [1e-5, 0.1], "anneal": "linear"}},
    {"accumulation_schedule": {"scheduling": {0: 4, 10: 1}}},
    {"batch_size_finder": {"mode": "binary", "max": 512, "margin": 0.1}},
    {"lr_finder": {"min_lr": 1e-8, "at_epochs": [0, 3], "method": "valley"}},
    {"lr_monitor": {"logging_interval": "epoch"}},
    {"freeze": {"frozen": ["encoder"], "unfreeze": {3: ["encoder.*"]}}},
    {"grad_norm": {"norm_type": float("inf"), "per_layer": False}},
    {"device_stats": {"cpu_stats": False}},
    {"throughput": {"window_size": 10, "tokens": "input_ids", "peak_flops": 1e15}},
    {"profiler": {"rows": 5, "timeline": False}},
    {"prediction_writer": {"format": "safetensors", "write_interval": "epoch"}},
    {"lambda_hooks": {"hooks": {"on_fit_start": "gc:collect"}}},
    {"mlflow": {"experiment": "no", "tags": {"team": "off", "n": 3}, "log_model": "best"}},
    {"wandb": {"project": "p", "mode": "offline", "tags": ["a", "1"]}},
    {"gpu": {"matmul_precision": "high", "prefetch": False}},
    {"ddp": {"timeout": "1h", "static_graph": True}},
    {"fsdp": {"wrap": 1000, "param_dtype": "bfloat16"}},
    {"ray": {"address": "local", "resources_per_worker": {"CPU": 2}}},
]
PLUGINS = [each for each in ALL if installed(name_of(each))]
TRAINER = {
    "max_epochs": 3, "max_time": "00:12:00:00", "limit_train_batches": 0.5, "limit_val_batches": 10, "fast_dev_run": 2,
    "val_check_interval": "10m", "gradient_clip_val": 1e-2, "precision": "bf16-mixed", "deterministic": "warn", "benchmark": False,
    "signals": ["SIGTERM"], "seed": 7, "accelerator": "cpu", "devices": [0, 1], "strategy": {"ddp": {"timeout": "1m"}},
    "root_dir": "out", "name": "no",
}  # fmt: skip


def yaml_of(value):
    """A value as a user would write it: with numbers in YAML's short form, and JSON for the rest."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{yaml_of(key)}: {yaml_of(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_of, value)) + "]"
    if isinstance(value, float):
        return ".inf" if value == float("inf") else repr(value)
    return json.dumps(value)


@pytest.fixture(scope="module")
def in_python():
    return Trainer(**TRAINER, plugins=PLUGINS)


def compare(made, wanted, fields):
    for field in dataclasses.fields(Settings):
        if field.name != "plugins":
            one, other = getattr(made, field.name), getattr(wanted, field.name)
            assert (list(one) if isinstance(one, tuple) else one) == (list(other) if isinstance(other, tuple) else other), field.name
    assert list(made.enabled) == list(wanted.enabled)
    for name, plugin in wanted.enabled.items():
        assert fields(made.enabled[name]) == fields(plugin), name


def test_all_bundled_plugins_are_compared():
    folders = {folder.parent.name for folder in (Path(__file__).parents[2] / "plugins").glob("*/pyproject.toml")}
    assert {name_of(each) for each in ALL} == folders - {"standard"}


def test_a_file_builds_what_python_builds(project, in_python, fields):
    plugins = "\n".join(f"  - {yaml_of(each)}" for each in PLUGINS)
    file = project.write("all.yaml", f"trainer: {yaml_of(TRAINER)}\nplugins:\n{plugins}\n")
    compare(Config(whole([file], [])).trainer(), in_python, fields)


def test_the_command_line_builds_what_python_builds(in_python, fields):
    settings = [f"trainer.{name}={yaml_of(value)}" for name, value in TRAINER.items()] + ["plugins=[]"]
    for each in PLUGINS:
        name, options = (each, {}) if isinstance(each, str) else next(iter(each.items()))
        settings += [f"plugins.{name}.{option}={yaml_of(value)}" for option, value in options.items()] or [f"plugins.{name}={{}}"]
    compare(Config(whole([], settings)).trainer(), in_python, fields)


def test_half_in_a_file_and_half_on_the_command_line_is_the_same(project, in_python, fields):
    names, half = list(TRAINER), len(TRAINER) // 2
    file = project.write("half.yaml", f"trainer: {yaml_of({name: TRAINER[name] for name in names[:half]})}\nplugins: {yaml_of(PLUGINS)}")
    settings = [f"trainer.{name}={yaml_of(TRAINER[name])}" for name in names[half:]]
    compare(Config(whole([file], settings)).trainer(), in_python, fields)


def test_a_function_is_named_where_it_is_imported_from(project):
    project.write("functions.py", "def told(run):\n    run.report['told'] = 'yes'\n")
    code, _, said = project(
        "fit", "config.yaml", "--set", "plugins.lambda_hooks.hooks={on_fit_start: 'functions:told'}", "--set", "trainer.fast_dev_run=true"
    )
    assert code == 0 and "told: yes" in said


def test_nothing_said_is_nothing_said(fields):
    compare(Config({}).trainer(), Trainer(), fields)


@pytest.mark.slow
def test_the_file_of_a_run_builds_it_again_even_where_plugins_work_on_their_options(project, fields):
    """A plugin that resolved an option in the run, and kept the result in its place, would be another plugin next time."""
    alone = ("swa", "batch_size_finder", "mlflow", "wandb", "gpu", "ddp", "fsdp", "ray", "profiler", "freeze")
    plugins = [each for each in PLUGINS if isinstance(each, str) or next(iter(each)) not in alone]
    plugins += [{"profiler": {"rows": 5}}, {"freeze": {"frozen": ["head"], "unfreeze": {1: ["head"]}}}]
    plugins = [{"throughput": {"window_size": 10, "peak_flops": 1e15}} if "throughput" in each else each for each in plugins]
    plugins = [{"lr_finder": {"steps": 10, "method": "valley"}} if "lr_finder" in each else each for each in plugins]
    plugins = [
        {"checkpoint:best": {"mode": "max", "dir": "best", "monitor": "val_loss"}} if "checkpoint:best" in each else each
        for each in plugins
    ]
    file = project.write("most.yaml", f"plugins: {yaml_of(plugins)}")
    code, _, said = project("fit", "config.yaml", file, "--set", "trainer.max_epochs=1")
    assert code == 0, said
    given = Config(whole(["config.yaml", file], ["trainer.max_epochs=1"])).trainer()
    compare(Config(whole(["runs/Net/version_0/config.yaml"], [])).trainer(), given, fields)
