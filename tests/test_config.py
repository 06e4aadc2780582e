"""config.yaml in a run's folder: what the run was made of, in YAML that every reader understands alike."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import math
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from torchplug import DataModule, Trainer, hookimpl
from torchplug.config import recipe, text, write_config
from torchplug.settings import Settings
from torchplug.testing import TinyModule

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


class Kept(TinyModule):
    def __init__(self, train: int = 4, lr: float = 0.1, note: Any = None) -> None:
        super().__init__(train=train, lr=lr)
        self.save_hyperparameters(ignore="note")


class Whole(TinyModule):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(train=options["train"])
        self.save_hyperparameters(options)


@dataclasses.dataclass(kw_only=True, eq=False)
class Counter:
    every: int = 1

    @hookimpl
    def on_train_start(self) -> None: ...


def written(trainer: Trainer) -> dict[str, Any]:
    """What the file of the last run says."""
    assert trainer.run is not None
    return yaml.safe_load((trainer.run.dir / "config.yaml").read_text(encoding="utf-8"))


def fitted(module: Any = None, *arguments: Any, **options: Any) -> Trainer:
    trainer = Trainer(**{"max_epochs": 1, "plugins": [], "accelerator": "cpu", **options})
    trainer.fit(TinyModule() if module is None else module, *arguments)
    return trainer


# ---------------------------------------------------------------------- values


@given(plain)
def test_a_value_is_read_back_as_it_was(value):
    read = yaml.safe_load("x: " + text(value))["x"]
    assert read == value or "://" in str(value)
    assert repr(type(read)) == repr(type(value))


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (1e-5, "1.0e-05"),
        (math.inf, ".inf"),
        (-math.inf, "-.inf"),
        ((1, 2.0), "[1, 2.0]"),
        ({"a": 1, "no": 2, 3: "x", "a b": None}, '{a: 1, "no": 2, 3: "x", "a b": null}'),
        (timedelta(minutes=1.5), '"90.0s"'),
        (timedelta(microseconds=10), '"0.000010s"'),
        (Path("a/b"), '"a/b"'),
        (enum.Enum("Color", "red").red, '"red"'),
        (argparse.Namespace(a=1), "{a: 1}"),
        (Counter(every=3), "{every: 3}"),
        (torch.tensor(2), "2"),
        ("http://me:secret@host/x", '"http://***@host/x"'),
        ({"u": ["s3://me:secret@host"]}, '{u: ["s3://***@host"]}'),
        (torch.nn.ReLU(), '{unwritten: "ReLU()"}'),
    ],
)
def test_other_values_have_a_form_too(value, line):
    assert text(value) == line


def test_nan_and_a_long_unknown_value_are_written():
    assert text(math.nan) == ".nan"
    assert len(text(torch.nn.Sequential(*[torch.nn.ReLU() for _ in range(50)]))) < 130


# ---------------------------------------------------------------------- the file


def test_the_file_holds_arguments_plugins_module_and_versions():
    trainer = fitted(Kept(lr=0.5), seed=3, max_time=timedelta(hours=1), plugins=[{"ema": {"decay": 0.9}}, {"csv": {"on_error": "abort"}}])
    config = written(trainer)
    assert list(config) == ["trainer", "plugins", "module", "versions"]
    assert config["trainer"].keys() == {field.name for field in dataclasses.fields(Settings)} - {"plugins"}
    assert (config["trainer"]["seed"], config["trainer"]["max_time"]) == (3, "3600.0s")
    ema, csv = config["plugins"]
    assert ema["ema"] == {"buffers": "average", "validate": True, "decay": 0.9, "warmup": False, "every_n_steps": 1}
    assert csv == {"csv": {"dir": None, "on_error": "abort"}}
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["ema"].startswith("torchplug-ema ")


def test_plugins_stand_in_the_order_of_the_user():
    config = written(fitted(plugins=["lr_monitor", {"checkpoint:b": {"top_k": 0}}, "csv", "checkpoint"]))
    assert [next(iter(each)) for each in config["plugins"]] == ["lr_monitor", "checkpoint:b", "csv", "checkpoint"]


def test_a_plugin_without_an_entry_point_has_its_class():
    config = written(fitted(plugins=[{"mine": Counter(every=2)}]))
    (mine,) = config["plugins"]
    assert mine["mine"]["class_path"].endswith("test_config.Counter") or "test_config.py:Counter" in mine["mine"]["class_path"]
    assert mine["mine"]["init_args"] == {"every": 2}


def test_what_comes_by_itself_is_a_comment():
    class Brings(TinyModule):
        def configure_plugins(self):
            return [{"ema": {"decay": 0.5}}]

    trainer = fitted(Brings(), trace="trace.json", plugins=["csv"])
    lines = (trainer.run.dir / "config.yaml").read_text().splitlines()
    assert [next(iter(each)) for each in written(trainer)["plugins"]] == ["csv"]
    assert any(line.startswith("  # brought by Brings.configure_plugins(): {ema: {") and "decay: 0.5" in line for line in lines)
    assert any(line.startswith("  # named by accelerator, strategy or trace: {profiler: {") for line in lines)


def test_a_plugin_that_an_argument_names_and_the_user_too_is_written(tmp_path):
    options = Settings(strategy="ddp", plugins=[{"ddp": {"timeout": "1m"}}])
    enabled = Trainer(accelerator="cpu", strategy="ddp", plugins=options.plugins).enabled
    run = SimpleNamespace(
        dir=tmp_path,
        options=options,
        module=TinyModule(),
        datamodule=None,
        work="fit",
        plugins=enabled,
        packages={"ddp": "torchplug-ddp 1"},
    )
    write_config(run, enabled, {})  # type: ignore[arg-type]
    (ddp,) = yaml.safe_load((tmp_path / "config.yaml").read_text())["plugins"]
    assert ddp["ddp"]["timeout"] == "1m"


def test_no_plugins_are_an_empty_list():
    assert written(fitted())["plugins"] == []


def test_an_evaluation_in_the_folder_of_its_fit_leaves_the_file_alone():
    trainer = fitted(Kept())
    file = trainer.run.dir / "config.yaml"
    file.write_text("of the fit")
    trainer.test()
    assert trainer.run.dir == file.parent and file.read_text() == "of the fit"


def test_credentials_are_not_written(caplog):
    trainer = fitted(plugins=[{"mine": Counter(every="http://me:secret@host/")}])  # type: ignore[arg-type]
    content = (trainer.run.dir / "config.yaml").read_text()
    assert "secret" not in content and "http://***@host/" in content


# ---------------------------------------------------------------------- module and data


def test_a_module_is_written_with_the_hyperparameters_that_it_saved():
    module = recipe(Kept(train=2, lr=0.5, note="x"))
    assert module["init_args"] == {"train": 2, "lr": 0.5, "note": {"unwritten": "not among the saved hyperparameters"}}
    assert recipe(Whole({"train": 3}))["init_args"] == {"options": {"train": 3}}


def test_a_module_that_saved_nothing_says_so_for_each_argument():
    arguments = recipe(TinyModule())["init_args"]
    assert arguments and all(value == {"unwritten": "not among the saved hyperparameters"} for value in arguments.values())


def test_what_the_command_line_was_given_goes_before():
    module = Kept()
    module._recipe = {"class_path": "a.B", "init_args": {"lr": 1}}
    assert written(fitted(module))["module"] == {"class_path": "a.B", "init_args": {"lr": 1}}


def test_a_data_module_is_written_and_loaders_cannot_be():
    class Data(DataModule):
        def __init__(self, train: int) -> None:
            super().__init__()
            self.hparams["train"] = train

        def train_dataloader(self):
            return TinyModule(train=self.hparams["train"]).train_dataloader()

    assert written(fitted(None, Data(3)))["data"]["init_args"] == {"train": 3}
    loader = TinyModule().train_dataloader()
    assert written(fitted(None, loader))["data"] == {"unwritten": "loaders that trainer.fit was called with"}
    assert "data" not in written(fitted())


def test_a_class_inside_of_a_function_cannot_be_imported():
    class Local(TinyModule): ...

    assert "cannot be imported" in recipe(Local())["class_path"]["unwritten"]


@pytest.mark.parametrize(
    ("file", "name", "path"),
    [
        ("net.py", "net", "net.Net"),
        ("scripts/net.py", "net", "scripts/net.py:Net"),
        ("scripts/train.py", "__main__", "scripts/train.py:Net"),
        ("package/net.py", "package.net", "package.net.Net"),
        (".venv/site-packages/net.py", "net", "net.Net"),
    ],
)
def test_a_class_in_a_script_has_the_path_of_its_file(tmp_path, monkeypatch, file, name, path):
    module = ModuleType(name)
    module.__file__ = str(tmp_path / file)
    monkeypatch.setitem(sys.modules, name, module)
    Net = type("Net", (Kept,), {"__module__": name})
    assert recipe(Net())["class_path"] == path


def test_a_module_that_is_run_with_m_has_its_own_name(monkeypatch):
    module = ModuleType("__main__")
    module.__spec__ = argparse.Namespace(name="package.train")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "__main__", module)
    assert recipe(type("Net", (Kept,), {"__module__": "__main__"})())["class_path"] == "package.train.Net"
