"""What people stumble on in their first week with a trainer, and what they see here instead.

One test, or a few, for each thing that newcomers to older trainers noted; the names say it in their order.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchplug import Module, PluginError, Trainer, cli, seed_everything
from torchplug.settings import Settings

ROOT = Path(__file__).parent.parent

FIRST = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchplug import Module, Trainer

class Net(Module):
    def __init__(self, hidden=500):
        super().__init__()
        self.save_hyperparameters()
        self.l1 = nn.Linear(784, hidden)
        self.l2 = nn.Linear(hidden, 10)

    def forward(self, x):
        return self.l2(self.l1(x).relu())

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), prog_bar=True)

    def test_step(self, batch):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def loader(n):
    return DataLoader(TensorDataset(torch.randn(n, 784), torch.randint(0, 10, (n,))), batch_size=8)

trainer = Trainer(max_epochs=2, seed=1, plugins=["standard", {"checkpoint": {"monitor": "val_loss"}}])
trainer.fit(Net(), loader(40), loader(16))
trainer.validate(dataloaders=loader(16))
trainer.test(dataloaders=loader(16))
"""


class Seen:
    """What a first script with the standard plugins printed, and the folder it ran in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        done = subprocess.run(
            [sys.executable, "-c", FIRST],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        self.text = done.stdout + done.stderr
        self.lines = self.text.splitlines()

    def line(self, pattern: str) -> str:
        """The one line that matches."""
        found = [line for line in self.lines if re.search(pattern, line)]
        assert len(found) == 1, f"{len(found)} lines match {pattern!r} in:\n{self.text}"
        return found[0]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Seen(tmp_path_factory.mktemp("first"))


# ---------------------------------------------------------------------- nan, because nothing was returned


def test_a_training_step_that_returns_nothing_is_an_error_that_says_to_return_the_loss(tiny: Any, trainer: Any) -> None:
    class Forgot(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.log("train_loss", self.loss(batch))

    with pytest.raises(RuntimeError, match=r"training_step of Forgot returned None.*return the loss from training_step"):
        trainer().fit(Forgot())


def test_a_training_step_that_returns_nothing_once_is_a_skip_that_is_said_once(tiny: Any, trainer: Any, caplog: Any) -> None:
    class Once(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch) if batch_idx else None

    trainer(max_epochs=3).fit(Once())
    assert sum("the batch is skipped" in line for line in caplog.messages) == 1


def test_a_loss_that_is_nan_to_the_end_is_an_error_with_step_and_value(tiny: Any, trainer: Any) -> None:
    class Diverged(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch) * float("nan")

    with pytest.raises(FloatingPointError, match=r"the loss is nan \(seen first at step \d+, now at step \d+\)"):
        trainer().fit(Diverged(train=30))


# ---------------------------------------------------------------------- old tutorials


def test_a_dict_with_log_or_progress_bar_is_told_once_that_values_go_through_self_log(tiny: Any, trainer: Any, caplog: Any) -> None:
    class Tutorial(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            return {"loss": loss, "log": {"train_loss": loss}, "progress_bar": {"acc": 1}}

    trainer(max_epochs=2).fit(Tutorial())
    for key in ("log", "progress_bar"):
        (line,) = [line for line in caplog.messages if f"a dict with {key!r}" in line]
        assert "only 'loss' is" in line
        assert "self.log(name, value)" in line


@pytest.mark.parametrize(
    ("old", "new"),
    [("validation_epoch_end", "on_validation_epoch_end"), ("training_epoch_end", "on_train_epoch_end"),
     ("test_epoch_end", "on_test_epoch_end"), ("validation_end", "on_validation_epoch_end")],
)  # fmt: skip
def test_a_hook_of_an_older_version_is_named_with_todays_and_means_come_by_themselves(old: str, new: str, tiny: Any, trainer: Any) -> None:
    module = type("Old", (tiny.Module,), {old: lambda self, outputs: None})()
    with pytest.raises(
        TypeError, match=rf"Old.{old} is not called any more: write {new}; means of what you self.log in .* come by themselves"
    ):
        trainer().fit(module)


# ---------------------------------------------------------------------- where is the validation


def test_a_val_dataloader_without_validation_step_is_said_once(trainer: Any, loader: Any, caplog: Any) -> None:
    class Half(Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch: Any) -> Any:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def val_dataloader(self) -> Any:
            return loader(2)

    trainer(max_epochs=2).fit(Half(), loader(2))
    (line,) = [line for line in caplog.messages if "nothing is validated" in line]
    assert "there is a val_dataloader, but Half has no validation_step" in line


def test_a_validation_step_without_val_dataloader_is_said_once(tiny: Any, trainer: Any, caplog: Any) -> None:
    trainer(max_epochs=2).fit(tiny(val=0))
    (line,) = [line for line in caplog.messages if "nothing is validated" in line]
    assert "TinyModule has a validation_step, but there is no val_dataloader" in line


def test_nothing_is_said_where_validation_is_switched_off_or_not_wanted(tiny: Any, trainer: Any, loader: Any, caplog: Any) -> None:
    class Neither(Module):
        training_step = tiny.Module.training_step
        loss = tiny.Module.loss
        configure_optimizers = tiny.Module.configure_optimizers
        lr = 0.1

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Any) -> Any:
            return self.layer(x)

    trainer().fit(Neither(), loader(2))
    trainer(limit_val_batches=0).fit(tiny())
    assert not any("nothing is validated" in line for line in caplog.messages)


def test_validation_shows_its_numbers(seen: Seen) -> None:
    assert len([line for line in seen.lines if re.search(r"epoch \d/2.*val_loss \d", line)]) == 2
    assert re.search(r"validate: 2 batches, val_loss \d", seen.text)
    assert re.search(r"test: 2 batches, test_loss \d", seen.text)


# ---------------------------------------------------------------------- where are my metrics


def test_the_end_of_a_run_lists_what_was_logged_where_it_is_and_the_command_that_shows_it(seen: Seen) -> None:
    assert set(seen.line("metrics recorded").partition(": ")[2].split(", ")) == {"train_loss", "val_loss"}
    command = re.search(r"tensorboard --logdir (\S+)", seen.text)
    assert command
    assert list((seen.folder / command[1]).rglob("events.out.tfevents.*"))


def test_a_metric_that_was_never_logged_is_not_in_the_list_and_nothing_at_all_says_how(tiny: Any, trainer: Any, caplog: Any) -> None:
    class Silent(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

    trainer(limit_val_batches=0).fit(Silent())
    (line,) = [line for line in caplog.messages if "metrics recorded" in line]
    assert line == "metrics recorded: none; call self.log(name, value) in training_step"


def test_looking_up_a_metric_with_a_wrong_name_lists_what_there_is_and_the_closest(tiny: Any, trainer: Any) -> None:
    made = trainer()
    made.fit(tiny())
    with pytest.raises(KeyError, match=r"no metric 'trainloss' was logged, did you mean 'train_loss'\?; there are: train_loss, val_loss"):
        made.metrics["trainloss"]


@pytest.mark.parametrize("plugin", ["early_stopping", "checkpoint"])
def test_a_monitor_with_a_wrong_name_lists_what_there_is_and_the_closest(plugin: str, tiny: Any, trainer: Any) -> None:
    with pytest.raises(KeyError, match=r"'val_acc' was logged.*there are: .*train_loss.*val_loss") as caught:
        trainer(plugins=[{plugin: {"monitor": "val_acc"}}], max_epochs=3).fit(tiny())
    assert f"plugin {plugin!r} (torchplug-{plugin.replace('_', '-')} " in "\n".join(caught.value.__notes__)
    with pytest.raises(KeyError, match=r"no metric 'val_los' was logged, did you mean 'val_loss'"):
        trainer(plugins=[{plugin: {"monitor": "val_los"}}], max_epochs=3).fit(tiny())


# ---------------------------------------------------------------------- devices


def _gpu_there(monkeypatch: Any, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_a_gpu_that_is_there_and_not_used_is_one_line_with_what_to_write(monkeypatch: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "torchplug")
    _gpu_there(monkeypatch, True)
    monkeypatch.setattr("torchplug.plugins.installed", lambda name: False)
    Trainer(plugins=[])
    assert [line for line in caplog.messages if "GPU" in line] == ["a GPU is there and not used: pip install torchplug-gpu"]
    caplog.clear()
    Trainer(plugins=[], accelerator="cpu")
    assert [line for line in caplog.messages if "GPU" in line] == ["a GPU is there and not used: write accelerator='auto' to use it"]


def test_nothing_is_printed_about_devices_that_do_not_exist(seen: Seen, monkeypatch: Any, caplog: Any) -> None:
    _gpu_there(monkeypatch, False)
    for accelerator in ("auto", "cpu"):
        Trainer(plugins=[], accelerator=accelerator)
    assert caplog.messages == []
    assert not re.search(r"\b(TPU|IPU|HPU|MPS)\b", seen.text)


# ---------------------------------------------------------------------- arguments of another time


@pytest.mark.parametrize(
    ("argument", "value", "today"),
    [
        ("gpus", 1, "accelerator='gpu', devices="),
        ("tpu_cores", 8, "not supported"),
        ("auto_lr_find", True, "'lr_finder' to plugins"),
        ("progress_bar_refresh_rate", 20, "'progress'"),
        ("distributed_backend", "ddp", "strategy='ddp'"),
        ("callbacks", [], "plugins=[...]"),
        ("logger", True, "plugins=['tensorboard', ...]"),
        ("checkpoint_callback", True, "'checkpoint'"),
        ("default_root_dir", ".", "root_dir"),
    ],
)
def test_an_argument_of_an_older_version_is_answered_with_todays_words(argument: str, value: Any, today: str) -> None:
    with pytest.raises(TypeError) as caught:
        Trainer(**{argument: value})
    assert argument in str(caught.value)
    assert today in str(caught.value)


def test_the_options_that_such_an_answer_names_exist() -> None:
    from torchplug.settings import RENAMED

    checked = 0
    for answer in RENAMED.values():
        for plugin, option in re.findall(r"\{'(\w+)': \{'(\w+)':", answer):
            if plugin in ("ddp",):  # a package of its own that is not part of the development set
                continue
            with pytest.raises(PluginError) as caught:
                Trainer(plugins=[{plugin: {"no_such_option": 1}}])
            listed = re.search(r"\(options: (.*)\)$", str(caught.value))
            assert listed
            assert option in listed[1].split(", "), f"{answer!r} names an option that {plugin} does not have"
            checked += 1
    assert checked >= 3


def test_precision_16_and_16_mixed_mean_the_same() -> None:
    assert Trainer(plugins=[], precision=16).precision == Trainer(plugins=[], precision="16-mixed").precision == "16-mixed"


# ---------------------------------------------------------------------- the order of loaders, and names of methods


def test_a_val_dataloader_that_uses_what_train_dataloader_made_works_with_the_sanity_check(tiny: Any, trainer: Any, loader: Any) -> None:
    class Split(tiny.Module):
        def train_dataloader(self) -> Any:
            self.val = loader(2, seed=2)
            return loader(3, seed=1)

        def val_dataloader(self) -> Any:
            return self.val

    made = trainer(num_sanity_val_steps=2)
    made.fit(Split())
    assert "val_loss" in made.metrics


def test_an_attribute_that_is_missing_says_which_method_wanted_it(tiny: Any, trainer: Any) -> None:
    class Split(tiny.Module):
        def val_dataloader(self) -> Any:
            return self.val

    with pytest.raises(AttributeError, match="'val'") as caught:
        trainer().fit(Split())
    assert "while calling Split.val_dataloader()" in caught.value.__notes__


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("configure_optimiser", "configure_optimizers"), ("on_train_epoch_ends", "on_train_epoch_end"), ("val_dataloaders", "val_dataloader")],
)
def test_a_misspelt_method_is_named_with_the_right_one(wrong: str, right: str, tiny: Any, trainer: Any) -> None:
    class Slip(Module):
        training_step, loss, forward = tiny.Module.training_step, tiny.Module.loss, tiny.Module.forward

    setattr(Slip, wrong, lambda self: None)
    with pytest.raises((TypeError, PluginError), match=rf"Slip.{wrong} is not .*did you mean '{right}'\?"):
        trainer().fit(Slip())


# ---------------------------------------------------------------------- what does an argument mean


def test_gradient_clip_val_is_explained_with_unit_range_and_default(capsys: Any) -> None:
    cli.main(["explain", "gradient_clip_val"])
    text = capsys.readouterr().out
    for part in ("norm", "in the units of the gradient", "above 0", "default None", "0.1 to 10"):
        assert part in text


def test_every_argument_is_explained_and_there_is_a_list(capsys: Any) -> None:
    cli.main(["explain"])
    everything = capsys.readouterr().out
    for name in Settings.__dataclass_fields__:
        cli.main(["explain", name])
        text = capsys.readouterr().out
        assert text.startswith(f"{name}: ")
        assert "default " in text
        assert len(text) > 60
        assert name in everything


def test_which_batch_size_and_learning_rate_says_that_a_finder_is_needed(tiny: Any, trainer: Any) -> None:
    with pytest.raises(
        PluginError, match=r"no enabled plugin tunes anything: name one that does, such as a learning-rate finder, in plugins"
    ):
        trainer().tune(tiny())


# ---------------------------------------------------------------------- how fast was it


def test_the_end_of_a_run_prints_time_steps_and_samples_per_second(seen: Seen) -> None:
    assert re.fullmatch(r"fit took [\d.]+ s: 2 epochs, 10 steps \(\d+ steps/s, \d+ samples/s\)", seen.line("fit took"))


# ---------------------------------------------------------------------- from a plain loop


def test_the_documentation_shows_loop_and_module_side_by_side_and_their_numbers_are_equal() -> None:
    """The first three blocks, loop, module and trainer, are run as they stand; tests/test_docs.py runs the whole page."""
    page = (ROOT / "docs" / "from_a_loop.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:3]:
        exec(code, names)
    assert len(names["by_hand"]) == 6
    assert names["trainer"].metrics["val_loss"] == names["by_hand"][-1]
    assert all(torch.equal(a, b) for a, b in zip(names["net"].parameters(), names["module"].net.parameters(), strict=True))


# ---------------------------------------------------------------------- where is everything


def test_the_end_of_a_run_says_where_everything_is_and_which_checkpoint_is_the_best(seen: Seen) -> None:
    assert (seen.folder / seen.lines[[line.startswith("run directory: ") for line in seen.lines].index(True)].partition(": ")[2]).is_dir()
    best, last = re.findall(r"(?:best|last) (\S+\.safetensors)", seen.text[seen.text.index("\ncheckpoint: ") :])[:2]
    assert (seen.folder / best).is_file()
    assert (seen.folder / last).is_file()
    assert "val_loss=" in seen.line("^checkpoint: ")


def test_the_best_checkpoint_that_was_printed_can_be_loaded_and_a_part_of_the_model_used_alone(seen: Seen) -> None:
    best = seen.folder / re.findall(r"best (\S+\.safetensors)", seen.text)[0]
    names: dict[str, Any] = {"__name__": "first"}
    exec(FIRST.partition("trainer =")[0], names)
    module = names["Net"].load_from_checkpoint(best)
    assert module.hparams.hidden == 500
    assert module.l1(torch.zeros(1, 784)).shape == (1, 500)


@pytest.mark.parametrize("question", ["load_from_checkpoint", "encoder", "to_onnx|to_torchscript"], ids=["load", "encoder", "export"])
def test_there_is_an_example_of_loading_of_using_a_part_and_of_exporting(question: str) -> None:
    pages = [*(ROOT / "examples").glob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    assert any(re.search(question, page.read_text(encoding="utf-8")) for page in pages)


# ---------------------------------------------------------------------- the same numbers again


@pytest.mark.parametrize("workers", [0, 2])
def test_seed_everything_and_deterministic_give_bitwise_equal_runs(workers: int, tiny: Any, trainer: Any, loader: Any) -> None:
    class Dropping(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.mse_loss(self(F.dropout(batch[0], 0.3)), batch[1])

    finals = []
    for seed in (42, 42, 43):
        seed_everything(seed)
        module = Dropping()
        trainer(deterministic=True, max_epochs=2).fit(module, loader(4, shuffle=True, num_workers=workers))
        finals.append(module.layer.weight)
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])


def test_what_else_bitwise_equal_runs_need_is_said(capsys: Any) -> None:
    cli.main(["explain", "deterministic"])
    cli.main(["explain", "seed"])
    text = capsys.readouterr().out + (seed_everything.__doc__ or "")
    assert "CUBLAS_WORKSPACE_CONFIG" in text
    assert "workers" in text


# ---------------------------------------------------------------------- hyperparameters


@pytest.mark.parametrize("form", ["all", "names", "dict", "Namespace", "kwargs"])
def test_hyperparameters_are_saved_in_every_form_and_used_by_load_from_checkpoint(form: str, tiny: Any, trainer: Any) -> None:
    from argparse import Namespace

    class Net(tiny.Module):
        def __init__(self, hidden: int = 3, config: Any = None, **options: Any) -> None:
            super().__init__()
            if form == "all":
                self.save_hyperparameters()
            elif form == "names":
                self.save_hyperparameters("hidden")
            elif form == "kwargs":
                self.save_hyperparameters("hidden", *options)
            else:
                self.save_hyperparameters(config)
            self.first = nn.Linear(4, dict(self.hparams)["hidden"])

    given: dict[str, Any] = {"hidden": 7}
    if form == "dict":
        given = {"config": {"hidden": 7}}
    elif form == "Namespace":
        given = {"config": Namespace(hidden=7)}
    elif form == "kwargs":
        given["more"] = "x"
    made = trainer(plugins=["checkpoint"])
    made.fit(Net(**given))
    again = Net.load_from_checkpoint(made.run.last_path)
    assert again.first.out_features == 7
    assert again.hparams.hidden == 7


# ---------------------------------------------------------------------- which weights does test use


def test_test_and_validate_without_a_path_take_the_best_checkpoint_and_say_which(seen: Seen) -> None:
    best = re.findall(r"best (\S+\.safetensors)", seen.text)[0]
    for work in ("validate", "test"):
        assert seen.line(f"^{work} with the weights of ") == f"{work} with the weights of {best}"


# ---------------------------------------------------------------------- output that can be read


def test_output_in_a_file_has_no_control_characters_and_no_leaked_objects(seen: Seen) -> None:
    assert "\x1b" not in seen.text
    assert "\r" not in seen.text
    assert "Traceback" not in seen.text
    assert "Warning" not in seen.text
    assert not re.search(r"<[\w.]+ object at 0x|HBox|FloatProgress|VBox", seen.text)
    assert len(seen.lines) < 40
    assert max(map(len, seen.lines)) < 200


def test_the_table_of_the_model_has_names_types_parameters_totals_and_size(seen: Seen) -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in seen.lines if "|" in line]
    assert ["l1", "Linear", "392 K"] in [row[:3] for row in rows]
    assert any(row[:2] == ["l2", "Linear"] for row in rows)
    assert "397,510" in seen.line("^parameters: ")
    assert "MB" in seen.line("^size: ")
