"""fit(ckpt_path=...): which file, which parts of it, what must fit, and a second fit that goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from torchplug import hookimpl
from torchplug.checkpoint import CheckpointError, load, write


class Saver:
    """Asks for a checkpoint in one hook, whenever its condition holds."""

    def __init__(self, folder: Path, when: Any = lambda run: True) -> None:
        self.folder, self.when = folder, when

    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        if self.when(run):
            run.save_checkpoint(self.folder / f"{run.position.micro_step}.safetensors")


class Finder:
    """Knows where checkpoints are."""

    def __init__(self, *paths: Path) -> None:
        self.paths = list(paths)

    @hookimpl
    def find_checkpoints(self, which: str) -> list[Path]:
        return self.paths


class Counter:
    """A plugin with a state."""

    def __init__(self) -> None:
        self.count = 0

    @hookimpl
    def setup(self) -> None:
        self.count = 0

    @hookimpl
    def on_train_batch_end(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.fixture
def model(tiny: Any) -> type:
    class Model(tiny.Module):
        def __init__(self, wide: int = 4, groups: int = 1, kind: Any = torch.optim.Adam, schedulers: int = 1) -> None:
            super().__init__(val=0)
            self.layer = torch.nn.Linear(wide, 1)
            self.drop = torch.nn.Dropout(0.3)
            self.groups, self.kind, self.scheduled = groups, kind, schedulers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.drop(x[:, : self.layer.in_features]))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            parameters = list(self.parameters())
            groups = [{"params": parameters}] if self.groups == 1 else [{"params": [each]} for each in parameters]
            optimizer = self.kind(groups, lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1) for _ in range(self.scheduled)]

    return Model


def data(samples: int = 12, batch_size: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size, shuffle=True)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture
def saved(model: Any, trainer: Any, tmp_path: Path) -> Any:
    """An uninterrupted run of two epochs of six batches, and a checkpoint after each batch."""
    torch.manual_seed(1)
    folder, module, counter = tmp_path / "kept", model(), Counter()
    made = trainer(max_epochs=2, plugins=[{"saver": Saver(folder)}, {"counter": counter}])
    made.fit(module, data())
    return folder, module, made


def go_on(trainer: Any, module: Any, path: Any, loader: Any = None, resume: Any = None, plugins: Any = None, **options: Any) -> Any:
    made = trainer(**{"max_epochs": 2, "plugins": [{"counter": Counter()}] if plugins is None else plugins, **options})
    made.fit(module, data() if loader is None else loader, ckpt_path=path, resume=resume)
    return made


# ---------------------------------------------------------------------- which file


@pytest.mark.parametrize("batch", [1, 5, 6, 7, 12])
def test_a_run_goes_on_from_a_path_as_the_same_run_in_the_same_directory(
    batch: int, saved: Any, model: Any, trainer: Any, tmp_path: Path
) -> None:
    folder, whole, first = saved
    path = first.run.dir / "checkpoints" / f"{batch}.safetensors"
    path.parent.mkdir(exist_ok=True)
    (folder / path.name).rename(path)
    module = model()
    made = go_on(trainer, module, str(path))
    assert same(module, whole)
    assert made.metrics == first.metrics
    assert (made.run.id, made.run.dir, made.run.resumed) == (first.run.id, first.run.dir, path)
    assert made.enabled["counter"].count == 12
    assert [each.name for each in made.run.dir.parent.iterdir()] == ["version_0"]


def test_a_checkpoint_of_another_place_is_gone_on_from_in_a_directory_of_its_own(saved: Any, model: Any, trainer: Any) -> None:
    folder, whole, first = saved
    made = go_on(trainer, module := model(), folder / "7.safetensors", name="other")
    assert same(module, whole)
    assert made.run.dir != first.run.dir and made.run.id == first.run.id


def test_last_takes_the_first_that_can_be_used_and_reports_what_it_passed_over(
    saved: Any, model: Any, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder, whole, _ = saved
    damaged, weights, emergency, good = (folder / f"{i}.safetensors" for i in (10, 9, 8, 7))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    state = load(emergency)
    write(weights, {**{key: state[key] for key in ("time", "versions", "run", "position", "module", "emergency")}, "kind": "weights"})
    write(emergency, {**state, "emergency": "ValueError: bad"})
    finder = Finder(folder / "missing.safetensors", damaged, weights, emergency, good, folder / "1.safetensors")
    made = go_on(trainer, module := model(), "last", plugins=[{"counter": Counter()}, finder])
    assert same(module, whole)
    assert made.run.resumed == good
    passed = [line for line in caplog.messages if line.startswith("passed over: ")]
    assert len(passed) == 4
    assert "missing.safetensors" in passed[0] and "10.safetensors is cut off" in passed[1]
    assert "9.safetensors holds weights only" in passed[2] and "8.safetensors was written in an emergency (ValueError: bad)" in passed[3]


def test_last_starts_from_the_beginning_where_there_is_nothing_and_says_so(
    model: Any, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = go_on(trainer, model(), "last", plugins=[Finder()])
    assert "there is no checkpoint of an earlier run: training starts from the beginning" in caplog.messages
    assert made.run.position.micro_step == 12 and made.run.resumed is None


def test_last_is_an_error_that_lists_all_if_none_can_be_used(model: Any, trainer: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints can be used:\n  .*a is empty\n  .*b is empty"):
        go_on(trainer, model(), "last", plugins=[Finder(tmp_path / "a", tmp_path / "b")])


def test_best_without_a_checkpoint_and_names_without_a_plugin_are_errors(model: Any, trainer: Any) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint of an earlier run"):
        go_on(trainer, model(), "best", plugins=[Finder()])
    with pytest.raises(ValueError, match="no enabled plugin knows where checkpoints are"):
        go_on(trainer, model(), "last", plugins=[])


def test_an_emergency_checkpoint_given_by_path_is_used_with_a_warning(
    saved: Any, model: Any, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved[0] / "7.safetensors"
    write(path, {**load(path), "emergency": "ValueError: bad"})
    go_on(trainer, model(), path)
    assert any("was written in an emergency (ValueError: bad)" in line for line in caplog.messages)


# ---------------------------------------------------------------------- which parts


def test_everything_that_was_loaded_skipped_and_missing_is_reported(saved: Any, model: Any, trainer: Any) -> None:
    made = go_on(trainer, model(), saved[0] / "7.safetensors", plugins=[{"another": Counter()}], resume={"strict": False})
    report = made.run.resumption
    assert report.loaded == ["model", "optimizer", "scheduler", "position", "data", "rng", "metrics"]
    assert (report.skipped, report.missing) == (["plugin:counter"], ["plugin:another"])


def test_weights_alone_make_a_new_run(saved: Any, model: Any, trainer: Any) -> None:
    folder, _, first = saved
    begun: dict[str, Any] = {}

    class Look:
        @hookimpl
        def on_train_start(self, run: Any) -> None:
            begun.update(weight=run.module.layer.weight.detach().clone(), position=run.position.micro_step)

    made = go_on(trainer, model(), folder / "7.safetensors", resume={"include": ["model"]}, plugins=[Look()])
    assert torch.equal(begun["weight"], load(folder / "7.safetensors")["module"]["layer.weight"])
    assert begun["position"] == 0 and made.run.position.micro_step == 12
    assert made.run.id != first.run.id and made.run.dir != first.run.dir
    assert made.run.resumption.loaded == ["model"]


@pytest.mark.parametrize("part", ["optimizer", "scheduler", "rng", "metrics", "plugins", "plugin:counter"])
def test_a_part_can_be_left_out(part: str, saved: Any, model: Any, trainer: Any) -> None:
    made = go_on(trainer, model(), saved[0] / "7.safetensors", resume={"exclude": [part]})
    expected = "plugin:counter" if part == "plugins" else part
    assert made.run.resumption.skipped == [expected]
    assert made.run.position.micro_step == 12
    assert made.enabled["counter"].count == (5 if "plugin" in part else 12)


def test_without_the_place_in_the_data_the_epoch_begins_anew_and_the_data_may_be_others(saved: Any, model: Any, trainer: Any) -> None:
    made = go_on(trainer, model(), saved[0] / "9.safetensors", data(20, 4), resume={"exclude": ["data"]}, accumulate_grad_batches=2)
    assert (made.run.position.epoch, made.run.position.micro_step) == (2, 9 + 5)


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ({"includes": ["model"]}, "resume has no key 'includes'"),
        ({"include": ["weights"]}, "there is no part 'weights'"),
        ({"include": "model"}, r"resume takes lists of parts, got 'model'"),
        ({"include": ["model"], "exclude": ["rng"]}, "include or exclude, not both"),
        ({"include": ["model", "data"]}, "belong to a position"),
    ],
)
def test_a_wrong_choice_is_an_error_that_says_what_there_is(resume: Any, message: str, saved: Any, model: Any, trainer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        go_on(trainer, model(), saved[0] / "7.safetensors", resume=resume)
    with pytest.raises(ValueError, match="give ckpt_path too"):
        go_on(trainer, model(), None, resume={"include": ["model"]})


# ---------------------------------------------------------------------- what must fit


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"wide": 3}, r"is of another model than Model: layer.weight is \(1, 4\) in the file and \(1, 3\) in the module"),
        ({"kind": torch.optim.SGD}, r"has 1 optimizer \(Adam\), configure_optimizers gives 1 optimizer \(SGD\)"),
        ({"groups": 2}, r"optimizer 0 \(Adam\) has 1 parameter groups of \[2\] parameters, that of configure_optimizers has 2 of \[1, 1\]"),
        ({"schedulers": 2}, r"has 1 scheduler \(StepLR\), configure_optimizers gives 2 schedulers \(StepLR, StepLR\)"),
        ({"schedulers": 0}, r"has 1 scheduler \(StepLR\), configure_optimizers gives 0 schedulers"),
    ],
)
def test_another_model_or_optimizer_is_an_error_that_names_the_difference_and_nothing_is_changed(
    changed: Any, message: str, saved: Any, model: Any, trainer: Any
) -> None:
    module = model(**changed)
    before = [each.clone() for each in module.state_dict().values()]
    with pytest.raises(CheckpointError, match=message):
        go_on(trainer, module, saved[0] / "7.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before, module.state_dict().values(), strict=True))


def test_a_module_with_other_names_is_an_error_that_lists_them(saved: Any, model: Any, trainer: Any) -> None:
    class Other(model):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(1, 1)

    with pytest.raises(CheckpointError, match=r"it lacks more.weight, more.bias"):
        go_on(trainer, Other(), saved[0] / "7.safetensors")


@pytest.mark.parametrize(
    ("options", "loader", "message"),
    [
        ({"accumulate_grad_batches": 2}, data(), "accumulate_grad_batches was 1, is 2"),
        ({}, data(12, 3), "batch size was 2, is 3; number of batches in an epoch was 6, is 4"),
        ({}, data(14), "length of the data set was 12, is 14; number of batches in an epoch was 6, is 7"),
        ({"limit_train_batches": 5}, data(), "number of batches in an epoch was 6, is 5"),
        ({"max_epochs": 1}, data(), "stands in epoch 1, which max_epochs=1 does not reach"),
        ({"max_steps": 3}, data(), "stands at step 7, which is more than max_steps=3"),
        ({"plugins": []}, data(), "with other plugins: it has the state of counter, not enabled now"),
        ({"plugins": [{"counter": Counter()}, {"two": Counter()}]}, data(), r"it has no state of two \(then: counter; now: counter, two\)"),
    ],
)
def test_other_data_options_and_plugins_are_errors_that_name_the_difference(
    options: Any, loader: Any, message: str, saved: Any, model: Any, trainer: Any
) -> None:
    with pytest.raises(CheckpointError, match=message):
        go_on(trainer, model(), saved[0] / "7.safetensors", loader, **options)


def test_a_file_of_weights_cannot_be_resumed_and_says_what_can_be_done(saved: Any, model: Any, trainer: Any) -> None:
    path = saved[0] / "7.safetensors"
    write(path, {**load(path), "kind": "weights"})
    with pytest.raises(CheckpointError, match=r"holds weights only.*load_from_checkpoint takes them"):
        go_on(trainer, model(), path)


def test_a_finished_run_has_nothing_left_to_train_and_says_so(
    saved: Any, model: Any, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved[0]

    class AtTheEnd:
        @hookimpl
        def on_train_end(self, run: Any) -> None:
            run.save_checkpoint(folder / "end.safetensors")

    trainer(max_epochs=1, plugins=[AtTheEnd()]).fit(model(), data())
    made = go_on(trainer, model(), folder / "end.safetensors", max_epochs=1, plugins=[AtTheEnd()])
    assert "nothing is left to train: max_epochs or max_steps is reached; raise it to go on" in caplog.messages
    assert made.run.position.micro_step == 6


# ---------------------------------------------------------------------- where it was asked for


@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward", "on_train_batch_start", "on_validation_batch_end"])
def test_wherever_a_checkpoint_is_asked_for_it_is_taken_where_the_state_is_whole(
    hook: str, tiny: Any, trainer: Any, tmp_path: Path
) -> None:
    def ask(self: Any, run: Any) -> None:
        if run.position.micro_step == 4:
            run.save_checkpoint(tmp_path / "asked.safetensors")

    asker = type("Asker", (), {hook: hookimpl(ask)})()
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 4}
    whole = tiny(train=6, val=2)
    first = trainer(plugins=[asker], **options)
    first.fit(whole)
    assert load(tmp_path / "asked.safetensors")["position"]["micro_step"] == (4 if "validation" in hook else 6)
    module = tiny(train=6, val=2)
    made = trainer(plugins=[], **options)
    made.fit(module, ckpt_path=tmp_path / "asked.safetensors")
    assert same(module, whole) and made.metrics == first.metrics


# ---------------------------------------------------------------------- fit again


@pytest.mark.parametrize(("first", "then"), [({"max_epochs": 1}, {"max_epochs": 3}), ({"max_steps": 4}, {"max_steps": 15})])
def test_a_second_fit_with_a_later_end_is_one_longer_run(first: Any, then: Any, model: Any, trainer: Any) -> None:
    torch.manual_seed(3)
    whole = model()
    longer = trainer(plugins=[{"counter": Counter()}], **{"max_epochs": None, **then})
    longer.fit(whole, data())

    torch.manual_seed(3)
    module = model()
    made = trainer(plugins=[{"counter": Counter()}], **{"max_epochs": None, **first})
    made.fit(module, data())
    torch.randn(7)  # whatever happens in between
    for name, value in then.items():
        setattr(made, name, value)
    made.fit(module, data())
    assert same(module, whole)
    assert made.metrics == longer.metrics
    assert made.run.position == longer.run.position
    assert made.enabled["counter"].count == longer.enabled["counter"].count
    assert [each.name for each in made.run.dir.parent.iterdir()].count("version_0") == 1 and made.run.dir.name == "version_1"


def test_another_module_starts_anew_and_so_does_one_whose_fit_failed(model: Any, trainer: Any) -> None:
    made = trainer(max_epochs=1, plugins=[{"counter": Counter()}])
    made.fit(model(), data())
    made.fit(other := model(), data())
    assert made.run.position.micro_step == 6 and made.enabled["counter"].count == 6

    class Fails(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Fails

    other.drop.register_forward_hook(handle := fail)
    made.max_epochs = 2
    with pytest.raises(Fails):
        made.fit(other, data())
    other.drop._forward_hooks.clear()
    assert handle is fail
    made.fit(other, data())
    assert made.run.position.micro_step == 12


def test_between_epochs_a_second_fit_may_have_other_data(model: Any, trainer: Any) -> None:
    made = trainer(max_epochs=1, plugins=[])
    made.fit(module := model(), data())
    made.max_epochs = 2
    made.fit(module, data(20, 4))
    assert made.run.position.micro_step == 6 + 5
    assert "data" in made.run.resumption.missing


def test_the_report_of_a_resume_is_logged(saved: Any, model: Any, trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    go_on(trainer, model(), saved[0] / "7.safetensors")
    line = next(each for each in caplog.messages if each.startswith("goes on from"))
    assert "at epoch 1, batch 1, step 7: loaded: model, optimizer, scheduler, position, data, rng, metrics, plugin:counter" in line
