"""validate, test and predict: what they return, and with which weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from torchplug import hookimpl
from torchplug.checkpoint import CheckpointError


def mean_loss(module: Any, loader: Any) -> float:
    """The mean over samples, by hand."""
    with torch.no_grad():
        losses = [(float(F.mse_loss(module.layer(x), y)), len(x)) for x, y in loader]
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


@pytest.mark.parametrize(("work", "name"), [("validate", "val_loss"), ("test", "test_loss")])
def test_an_evaluation_returns_a_dict_of_floats_for_each_loader(work: str, name: str, tiny: Any, trainer: Any, loader: Any) -> None:
    module, loaders = tiny(), [loader(3, seed=1), loader(2, 5, seed=2)]
    results = getattr(trainer(), work)(module, loaders)
    assert results == [{f"{name}/dataloader_idx_{i}": mean_loss(module, each)} for i, each in enumerate(loaders)]
    assert all(type(value) is float for result in results for value in result.values())
    assert getattr(trainer(), work)(module, loaders[0]) == [{name: mean_loss(module, loaders[0])}]


def test_an_evaluation_takes_its_loaders_from_the_module_if_none_are_given(tiny: Any, trainer: Any) -> None:
    module = tiny()
    assert trainer().test(module) == [{"test_loss": mean_loss(module, module.test_dataloader())}]


def test_the_values_of_an_evaluation_are_in_trainer_metrics_and_go_to_loggers(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    recorder = make_recorder("log_metrics")
    made = trainer(plugins=[recorder])
    (result,) = made.test(tiny())
    assert dict(made.metrics) == result
    assert [(call["stage"], call["metrics"]) for _, call in recorder.calls] == [("test", "dict")]


def test_an_evaluation_changes_neither_parameters_nor_modes(tiny: Any, trainer: Any) -> None:
    module = tiny()
    module.train()
    before = module.layer.weight.detach().clone()
    made = trainer()
    for work in (made.validate, made.test, made.predict):
        work(module)
    assert torch.equal(module.layer.weight, before)
    assert module.training
    assert all(p.grad is None for p in module.parameters())


def test_an_evaluation_needs_no_optimizer_and_no_training_step(trainer: Any, loader: Any) -> None:
    from torchplug import Module

    class OnlyTest(Module):
        def test_step(self, batch: Any) -> None:
            self.log("x", batch[0].sum())

        def predict_step(self, batch: Any) -> int:
            return len(batch[0])

    assert set(trainer().test(OnlyTest(), loader(1))[0]) == {"x"}
    assert trainer().predict(OnlyTest(), loader(3)) == [2, 2, 2]


# ---------------------------------------------------------------------- predict


def test_predict_returns_what_predict_step_returned_in_order(tiny: Any, trainer: Any, loader: Any) -> None:
    class Naming(tiny.Module):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return {"index": batch_idx, "x": batch[0]}

    batches = list(loader(4))
    predictions = trainer().predict(Naming(), [batches])  # one loader
    assert [each["index"] for each in predictions] == [0, 1, 2, 3]
    assert all(torch.equal(each["x"], batch[0]) for each, batch in zip(predictions, batches, strict=True))


def test_predict_over_several_loaders_returns_a_list_for_each(tiny: Any, trainer: Any, loader: Any) -> None:
    class Naming(tiny.Module):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            return dataloader_idx, batch_idx

    assert trainer().predict(Naming(), [loader(2), loader(3)]) == [[(0, 0), (0, 1)], [(1, 0), (1, 1), (1, 2)]]
    assert trainer(limit_predict_batches=1).predict(Naming(), [loader(2), loader(3)]) == [[(0, 0)], [(1, 0)]]


def test_predict_builds_no_graph(tiny: Any, trainer: Any) -> None:
    assert not any(prediction.requires_grad for prediction in trainer().predict(tiny()))


def test_predictions_that_are_not_to_be_returned_go_to_the_hook(tiny: Any, trainer: Any) -> None:
    class Writing:
        def __init__(self) -> None:
            self.written: list[Any] = []

        @hookimpl
        def on_predict_batch_end(self, outputs: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.written.append((dataloader_idx, batch_idx, outputs.shape))

    writing = Writing()
    assert trainer(plugins=[writing]).predict(tiny(predict=3), return_predictions=False) is None
    assert writing.written == [(0, i, (2, 1)) for i in range(3)]


def test_predict_goes_through_every_sample_once_and_in_order(tiny: Any, trainer: Any, loader: Any) -> None:
    module, data = tiny(), loader(4, 3)
    together = torch.cat(trainer().predict(module, data))
    with torch.no_grad():
        assert torch.equal(together, torch.cat([module(x) for x, _ in data]))


# ---------------------------------------------------------------------- which weights


class Keeper:
    """Keeps a checkpoint after the first epoch as the best and one at the end as the last."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    @hookimpl
    def on_train_epoch_end(self, run: Any) -> None:
        if run.position.epoch == 0:
            run.best_path = run.save_checkpoint((self.folder or run.dir) / "best.safetensors")
            self.best = run.module.layer.weight.detach().clone()

    @hookimpl
    def on_train_end(self, run: Any) -> None:
        run.last_path = run.save_checkpoint((self.folder or run.dir) / "last.safetensors")
        self.last = run.module.layer.weight.detach().clone()


@pytest.fixture
def fitted(tiny: Any, trainer: Any) -> Any:
    keeper, module = Keeper(), tiny()
    made = trainer(max_epochs=3, plugins=[keeper])
    made.fit(module)
    assert not torch.equal(keeper.best, keeper.last)
    return made, module, keeper


@pytest.mark.parametrize("work", ["validate", "test", "predict"])
def test_without_a_module_the_best_checkpoint_of_the_fit_is_used_and_named(work: str, fitted: Any, caplog: Any) -> None:
    made, module, keeper = fitted
    caplog.clear()
    getattr(made, work)()
    assert torch.equal(module.layer.weight, keeper.best)
    assert any(f"{work} with the weights of {made.run.dir / 'best.safetensors'}" in line for line in caplog.messages)


def test_with_a_module_its_own_weights_are_used(fitted: Any) -> None:
    made, module, keeper = fitted
    made.test(module)
    assert torch.equal(module.layer.weight, keeper.last)


def test_without_any_checkpoint_the_weights_of_the_fit_are_used(tiny: Any, trainer: Any) -> None:
    made, module = trainer(), tiny()
    made.fit(module)
    assert made.test() == trainer().test(module)


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("given", [True, False])
def test_best_and_last_can_be_asked_for_by_name(which: str, given: bool, fitted: Any) -> None:
    made, module, keeper = fitted
    made.test(*([module] if given else []), ckpt_path=which)
    assert torch.equal(module.layer.weight, getattr(keeper, which))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_checkpoint_can_be_asked_for_by_path_and_into_another_module(kind: Any, fitted: Any, tiny: Any, trainer: Any) -> None:
    made, _, keeper = fitted
    other = tiny()
    result = trainer().test(other, ckpt_path=kind(made.run.dir / "best.safetensors"))
    assert torch.equal(other.layer.weight, keeper.best)
    assert result == [{"test_loss": mean_loss(other, other.test_dataloader())}]


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_name_without_a_checkpoint_is_an_error_that_asks_for_the_plugin(which: str, tiny: Any, trainer: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"ckpt_path='{which}': no enabled plugin knows where checkpoints are; enable 'checkpoint', or give a path"
    ):
        trainer().test(tiny(), ckpt_path=which)


def test_a_path_that_is_not_there_is_an_error_before_anything_is_done(tiny: Any, trainer: Any, tmp_path: Path) -> None:
    class Eager(tiny.Module):
        def prepare_data(self) -> None:
            raise AssertionError("began")

    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nowhere.safetensors"):
        trainer().test(Eager(), ckpt_path=tmp_path / "nowhere.safetensors")


def test_a_file_that_is_no_checkpoint_is_an_error(tiny: Any, trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(CheckpointError, match=r"x.ckpt is not a checkpoint of torchplug"):
        trainer().test(tiny(), ckpt_path=tmp_path / "x.ckpt")


def test_a_checkpoint_of_another_model_lists_what_does_not_fit(fitted: Any, tiny: Any, trainer: Any) -> None:
    class Other(tiny.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

    wrong = r"best.safetensors is of another model than Other: layer.weight is \(1, 4\) in the file and \(1, 3\) in the module"
    with pytest.raises(CheckpointError, match=wrong):
        trainer().test(Other(), ckpt_path=fitted[0].run.dir / "best.safetensors")


def test_everybody_is_told_which_checkpoint_was_loaded(fitted: Any, make_recorder: Any, tiny: Any, trainer: Any) -> None:
    path = fitted[0].run.dir / "best.safetensors"
    recorder = make_recorder("load_checkpoint", "on_checkpoint_loaded", "on_test_start")
    trainer(plugins=[recorder]).test(tiny(), ckpt_path=path)
    assert recorder.names == ["load_checkpoint", "on_checkpoint_loaded", "on_test_start"]
    assert recorder.calls[1][1]["path"] == path


# ---------------------------------------------------------------------- where things are written


def test_an_evaluation_after_a_fit_goes_on_in_the_folder_of_the_fit(fitted: Any, tiny: Any) -> None:
    made, module, _ = fitted
    folder, identity = made.run.dir, made.run.id
    made.test(module)
    assert (made.run.dir, made.run.id) == (folder, identity)
    made.test(tiny())  # another module is another run
    assert made.run.dir != folder


def test_every_fit_has_a_folder_of_its_own(tiny: Any, trainer: Any, tmp_path: Path) -> None:
    made = trainer(name="mine")
    folders = []
    for _ in range(3):
        made.fit(tiny())
        folders.append(made.run.dir)
    assert folders == [tmp_path / "mine" / f"version_{i}" for i in range(3)]


def test_a_fit_after_an_evaluation_begins_anew(tiny: Any, trainer: Any) -> None:
    made, module = trainer(), tiny()
    made.validate(module)
    first = made.run.dir
    made.fit(module)
    assert made.run.dir != first
    assert made.run.best_path is None


def test_what_is_said_at_the_end_of_an_evaluation_is_not_about_training(tiny: Any, trainer: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    trainer().test(tiny())
    assert not any("steps/s" in line or "fit took" in line for line in caplog.messages)
