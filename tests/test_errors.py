"""What a user is told when something is wrong: in clear words, early, and never as a success."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from torchplug import DataModule, Module, hookimpl


class Status:
    """How the run ended."""

    value = ""

    @hookimpl
    def on_run_end(self, status: str) -> None:
        self.value = status


@pytest.fixture
def returning(tiny: Any) -> Any:
    """Modules whose training_step returns what a function makes of the module and the batch's index."""

    def make(answer: Any, **options: Any) -> Any:
        class Returning(tiny.Module):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.batch = batch
                return answer(self, batch_idx)

        return Returning(**options)

    return make


# ---------------------------------------------------------------------- what training_step returns


@pytest.mark.parametrize(
    "answer",
    [
        lambda self, i: self.loss(self.batch).detach(),
        lambda self, i: torch.tensor(1.0),
        lambda self, i: {"loss": self.loss(self.batch).detach()},
        lambda self, i: torch.no_grad()(self.loss)(self.batch),
    ],
    ids=["detached", "constant", "in a dict", "no_grad"],
)
def test_a_loss_without_gradient_says_so_and_why_that_may_be(answer: Any, returning: Any, trainer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"training_step returned a loss without a gradient: .*torch.no_grad\(\).*are all parameters frozen"
    ):
        trainer().fit(returning(answer))


def test_a_frozen_model_says_so(tiny: Any, trainer: Any) -> None:
    module = tiny()
    module.freeze()
    with pytest.raises(ValueError, match=r"a loss without a gradient.*or are all parameters frozen"):
        trainer().fit(module)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (0,)], ids=str)
def test_a_loss_that_is_not_one_number_says_its_shape(shape: Any, returning: Any, trainer: Any) -> None:
    module = returning(lambda self, i: self(self.batch[0]).sum() * torch.ones(shape))
    with pytest.raises(ValueError) as caught:
        trainer().fit(module)
    assert f"a loss that is one number, got a tensor of shape {shape}; reduce it, for example with .mean()" in str(caught.value)


def test_a_loss_of_one_element_is_one_number(returning: Any, trainer: Any) -> None:
    trainer().fit(returning(lambda self, i: self(self.batch[0]).mean().reshape(1)))


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "float 0.5"), ("low", "str 'low'"), (True, "bool True"), ([0.5], r"list \[0.5\]")], ids=str
)
def test_something_else_than_a_tensor_is_an_error_with_what_is_taken(value: Any, text: str, returning: Any, trainer: Any) -> None:
    with pytest.raises(
        TypeError, match=f"training_step must return the loss as a tensor, a dict with it under 'loss', or None.*got {text}"
    ):
        trainer().fit(returning(lambda self, i: value))


def test_a_number_under_loss_is_an_error(returning: Any, trainer: Any) -> None:
    with pytest.raises(TypeError, match=r"training_step must return the loss as a tensor, got float 0.5 under 'loss'"):
        trainer().fit(returning(lambda self, i: {"loss": 0.5}))


@pytest.mark.parametrize(("keys", "listed"), [(("losses", "acc"), "losses, acc"), ((), "nothing")])
def test_a_dict_without_loss_lists_what_it_has(keys: Any, listed: str, returning: Any, trainer: Any) -> None:
    with pytest.raises(ValueError, match=rf"training_step returned a dict without the key 'loss' \(it has: {listed}\)"):
        trainer().fit(returning(lambda self, i: dict.fromkeys(keys, 1)))


@pytest.mark.parametrize("key", ["log", "progress_bar"])
def test_a_dict_of_old_tutorials_trains_and_is_told_once_what_is_read(key: str, returning: Any, trainer: Any, caplog: Any) -> None:
    made = trainer(max_epochs=2)
    made.fit(returning(lambda self, i: {"loss": self.loss(self.batch), key: {"x": 1}}))
    assert made.run.position.step == 8
    said = [line for line in caplog.messages if f"a dict with {key!r}" in line]
    assert len(said) == 1
    assert "only 'loss' is" in said[0]
    assert "self.log(name, value)" in said[0]


def test_an_error_of_torch_that_is_not_about_the_loss_keeps_its_words(returning: Any, trainer: Any) -> None:
    def spoilt(self: Any, i: int) -> Tensor:
        hidden = self(self.batch[0]).exp()
        loss = hidden.sum()
        hidden.add_(1)  # exp needs its result for the backward pass
        return loss

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trainer().fit(returning(spoilt))


# ---------------------------------------------------------------------- skipped steps


def test_one_none_is_a_skip_said_once_and_not_counted(returning: Any, trainer: Any, caplog: Any, make_recorder: Any) -> None:
    skips = make_recorder("on_step_skipped")
    made = trainer(max_epochs=2, plugins=[skips])
    made.fit(returning(lambda self, i: None if i == 1 else self.loss(self.batch), train=4))
    assert (made.run.position.step, made.run.position.micro_step) == (6, 8)
    assert [call["reason"] for _, call in skips.calls] == ["training_step returned None"] * 2
    assert sum("training_step returned None: the batch is skipped (return the loss" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("answer", [None, {"loss": None}], ids=str)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_in_which_every_step_is_skipped_is_an_error_that_names_the_method(
    answer: Any, accumulate: int, returning: Any, trainer: Any
) -> None:
    status = Status()
    with pytest.raises(
        RuntimeError, match=r"no optimizer step was taken in epoch 0: .*training_step of Returning returned None.*return the loss"
    ):
        trainer(plugins=[status], accumulate_grad_batches=accumulate).fit(returning(lambda self, i: answer))
    assert status.value == "failed"


def test_manual_optimization_that_never_steps_is_an_error_that_says_what_to_call(tiny: Any, trainer: Any) -> None:
    class Manual(tiny.Module):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))

    with pytest.raises(
        RuntimeError, match=r"no optimizer step.*Manual must call self.manual_backward\(loss\) and step\(\) on self.optimizers\(\)"
    ):
        trainer().fit(Manual())


def test_a_run_whose_gradients_are_never_finite_is_an_error(tiny: Any, trainer: Any) -> None:
    class Overflowing(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch) * 1e35

    with pytest.raises((RuntimeError, FloatingPointError), match=r"no gradient was finite|inf|nan"):
        trainer(precision="16-mixed").fit(Overflowing())


# ---------------------------------------------------------------------- losses that are not finite


class Stream(IterableDataset[Any]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return ((torch.ones(4), torch.ones(1)) for _ in range(self.samples))


@pytest.fixture
def spoiling(tiny: Any) -> Any:
    """Modules whose loss is multiplied by a value in the micro steps that a function chooses."""

    def make(value: float, chosen: Any, harmless: bool = False, **options: Any) -> Any:
        class Spoiling(tiny.Module):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = self.loss(batch)
                if not chosen(self.run.position.micro_step):
                    return loss
                return loss + value if harmless else loss * value  # what is added has no gradient

        return Spoiling(**options)

    return make


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("every", [1, 50])
def test_a_loss_that_stays_non_finite_is_an_error_with_value_and_step(value: float, every: int, spoiling: Any, trainer: Any) -> None:
    status, module = Status(), spoiling(value, lambda step: step >= 5, harmless=True, train=100)
    with pytest.raises(
        FloatingPointError, match=rf"the loss is {value} \(seen first at step \d+, now at step \d+\): lower the learning rate"
    ) as caught:
        made = trainer(plugins=[status], log_every_n_steps=every, max_epochs=3)
        made.fit(module)
    assert status.value == "failed"
    assert made.run.position.step <= 70  # soon after it was seen, not at the end
    assert "nonfinite_loss='warn'" in str(caught.value)
    assert "detect_anomaly=True" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"max_epochs": 1}, {"max_steps": 7}, {"max_steps": 20, "log_every_n_steps": 3}, {"max_epochs": 1, "accumulate_grad_batches": 3},
     {"max_epochs": 1, "nonfinite_loss": "error", "log_every_n_steps": 1}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("first", [2, 9])
def test_a_run_whose_loss_turned_nan_is_never_a_success(options: Any, first: int, spoiling: Any, trainer: Any) -> None:
    status, module = Status(), spoiling(math.nan, lambda step: step >= first, train=10)
    if options.get("max_steps", 99) <= first:
        trainer(plugins=[status], **options).fit(module)  # ended before
        return
    with pytest.raises(FloatingPointError, match="nan"):
        trainer(plugins=[status], **options).fit(module)
    assert status.value == "failed"


def test_a_stop_in_mid_epoch_does_not_make_nan_a_success(spoiling: Any, trainer: Any) -> None:
    class Stop:
        @hookimpl
        def on_train_batch_end(self, run: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                run.request_stop("enough")

    with pytest.raises(FloatingPointError, match=r"parameters are nan or infinite at the end of training \(layer.weight, layer.bias\)"):
        trainer(plugins=[Stop()]).fit(spoiling(math.nan, lambda step: step == 2, train=10))


@pytest.mark.parametrize("length", ["known", "unknown"])
@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_nan_that_never_reaches_the_parameters_is_no_success_either(
    length: str, precision: str, spoiling: Any, trainer: Any, loader: Any
) -> None:
    """The loss scaler leaves such updates out, or what is NaN has no gradient; the loss itself still says so."""
    data = loader(20) if length == "known" else DataLoader(Stream(40), batch_size=2)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        trainer(precision=precision).fit(spoiling(math.nan, lambda step: step >= 5, harmless=precision == "32"), data)


def test_a_loss_that_recovers_is_no_error(spoiling: Any, trainer: Any) -> None:
    made = trainer(log_every_n_steps=1)
    made.fit(spoiling(math.inf, lambda step: 3 <= step < 9, harmless=True, train=20))
    assert made.run.position.step == 20


def test_the_last_update_that_spoils_the_parameters_is_an_error(tiny: Any, trainer: Any) -> None:
    class Spoilt(tiny.Module):
        def on_train_end(self) -> None:
            return

        def on_after_optimizer_step(self) -> None:
            if self.run.position.step == 4:
                with torch.no_grad():
                    self.layer.bias.fill_(math.inf)

    with pytest.raises(FloatingPointError, match=r"parameters are nan or infinite at the end of training \(layer.bias\)"):
        trainer().fit(Spoilt(train=4))


def test_policy_warn_goes_on_and_says_so_once(spoiling: Any, trainer: Any, caplog: Any) -> None:
    made = trainer(nonfinite_loss="warn", log_every_n_steps=1)
    made.fit(spoiling(math.nan, lambda step: step >= 3, train=30))
    assert made.run.position.step == 30
    assert sum("the loss is nan" in record.message and record.levelno == logging.WARNING for record in caplog.records) == 1


def test_policy_ignore_says_nothing(spoiling: Any, trainer: Any, caplog: Any) -> None:
    made = trainer(nonfinite_loss="ignore", log_every_n_steps=1)
    made.fit(spoiling(math.nan, lambda step: step >= 3, train=30))
    assert made.run.position.step == 30
    assert not any("nan" in line for line in caplog.messages)


def test_manual_optimization_is_watched_too(tiny: Any, trainer: Any) -> None:
    class Manual(tiny.Module):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch) * math.nan)
            self.optimizers().step()

    with pytest.raises(FloatingPointError, match="parameters are nan"):
        trainer().fit(Manual())


# ---------------------------------------------------------------------- data


class Empty(Dataset[Any]):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


EMPTY: dict[str, Any] = {
    "no samples": lambda loader: DataLoader(Empty()),
    "smaller than a batch": lambda loader: DataLoader(loader(1).dataset, batch_size=50, drop_last=True),
    "an empty list": lambda loader: [[]][0],
    "no length": lambda loader: DataLoader(Stream(0)),
    "an empty iterator": lambda loader: iter(()),
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_an_empty_training_loader_is_an_error(make: Any, tiny: Any, trainer: Any, loader: Any) -> None:
    with pytest.raises(ValueError, match=r"the training loader (is empty|gave no batch)") as caught:
        trainer().fit(tiny(), make(loader))
    assert "data set empty" in str(caught.value)
    assert "drop_last=True" in str(caught.value)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("make", [EMPTY[name] for name in EMPTY if name != "an empty list"], ids=[n for n in EMPTY if n != "an empty list"])
def test_an_empty_validation_loader_is_an_error(make: Any, sanity: int, tiny: Any, trainer: Any, loader: Any) -> None:
    with pytest.raises(ValueError, match=r"the validation loader.* (is empty|gave no batch)"):
        trainer(num_sanity_val_steps=sanity).fit(tiny(), loader(2), make(loader))


@pytest.mark.parametrize("work", ["validate", "test", "predict"])
def test_an_empty_loader_of_an_evaluation_is_an_error(work: str, tiny: Any, trainer: Any) -> None:
    name = {"validate": "validation", "predict": "prediction"}.get(work, work)
    with pytest.raises(ValueError, match=rf"the {name} loader is empty"):
        getattr(trainer(), work)(tiny(), DataLoader(Empty()))
    with pytest.raises(ValueError, match=rf"the {name} loader 0 gave no batch"):
        getattr(trainer(), work)(tiny(), DataLoader(Stream(0)))


def test_an_iterator_that_is_used_up_is_an_error_in_the_second_epoch(tiny: Any, trainer: Any, loader: Any) -> None:
    with pytest.raises(ValueError, match=r"the training loader gave no batch in epoch 1; .*an iterator that is used up"):
        trainer(max_epochs=2).fit(tiny(), iter(loader(3)))


@pytest.mark.parametrize("work", ["fit", "validate", "test", "predict"])
def test_no_data_at_all_says_where_it_may_come_from(work: str, tiny: Any, trainer: Any) -> None:
    method = {"fit": "train_dataloader", "validate": "val_dataloader"}.get(work, f"{work}_dataloader")
    with pytest.raises(TypeError, match=rf"trainer.{work} needs data: give it a loader or a data module, or define {method} in TinyModule"):
        getattr(trainer(), work)(tiny(train=0, val=0, test=0, predict=0))


@pytest.mark.parametrize("value", [5, object()], ids=["5", "object"])
def test_a_loader_that_is_none_says_what_one_is(value: Any, tiny: Any, trainer: Any) -> None:
    with pytest.raises(TypeError, match=r"a loader must be an iterable of batches such as a DataLoader, got (int 5|object <)"):
        trainer().fit(tiny(), value)


@pytest.mark.parametrize("form", [list, dict], ids=["list", "dict"])
def test_several_training_loaders_are_refused_with_a_way_out(form: Any, tiny: Any, trainer: Any, loader: Any) -> None:
    several = [loader(2), loader(2)] if form is list else {"a": loader(2), "b": loader(2)}
    with pytest.raises(TypeError, match=r"several training loaders are not combined for you: .*ConcatDataset"):
        trainer().fit(tiny(), several)


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise ValueError("sample 5 is damaged")
        return torch.ones(4), torch.ones(1)


def _notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_data_set_says_in_which_stage_epoch_and_batch(workers: int, tiny: Any, trainer: Any) -> None:
    data = DataLoader(Broken(), batch_size=2, num_workers=workers)
    with pytest.raises(ValueError, match="sample 5 is damaged") as caught:
        trainer().fit(tiny(), data)
    assert "while in stage train: epoch 0, batch 2, step 2" in _notes(caught.value)


def test_an_error_in_a_validation_step_says_in_which_stage_it_was(tiny: Any, trainer: Any) -> None:
    class Failing(tiny.Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise KeyError("boom")

    for sanity, stage in ((2, "sanity"), (0, "validate")):
        with pytest.raises(KeyError, match="boom") as caught:
            trainer(num_sanity_val_steps=sanity).fit(Failing())
        assert f"while in stage {stage}: epoch 0" in _notes(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("sanity", [0, 2])
def test_a_validation_loader_may_need_what_the_training_loader_makes(sanity: int, tiny: Any, trainer: Any, loader: Any) -> None:
    class Split(tiny.Module):
        def train_dataloader(self) -> Any:
            self.val = loader(2, seed=5)
            return loader(4)

        def val_dataloader(self) -> Any:
            return self.val

    made = trainer(num_sanity_val_steps=sanity)
    made.fit(Split())
    assert "val_loss" in made.metrics


def test_a_data_module_may_do_the_same(tiny: Any, trainer: Any, loader: Any) -> None:
    class Split(DataModule):
        def train_dataloader(self) -> Any:
            self.val = loader(2, seed=5)
            return loader(4)

        def val_dataloader(self) -> Any:
            return self.val

    made = trainer(num_sanity_val_steps=2)
    made.fit(tiny(), datamodule=Split())
    assert "val_loss" in made.metrics


@pytest.mark.parametrize("method", ["prepare_data", "train_dataloader", "val_dataloader"])
@pytest.mark.parametrize("kind", ["module", "data module"])
def test_an_attribute_that_is_really_missing_names_the_method_that_wanted_it(
    method: str, kind: str, tiny: Any, trainer: Any, loader: Any
) -> None:
    def wants(self: Any) -> Any:
        return self.indices

    if kind == "module":
        owner = type("Wanting", (tiny.Module,), {method: wants})()
        given: Any = {"module": owner}
    else:
        methods = {"train_dataloader": lambda self: loader(2), "val_dataloader": lambda self: loader(2), method: wants}
        given = {"module": tiny(), "datamodule": type("Wanting", (DataModule,), methods)()}
    with pytest.raises(AttributeError, match="indices") as caught:
        trainer().fit(**given)
    assert f"while calling Wanting.{method}()" in _notes(caught.value)


# ---------------------------------------------------------------------- the module


def test_a_class_in_place_of_a_module_asks_for_the_parentheses(tiny: Any, trainer: Any) -> None:
    with pytest.raises(TypeError, match=r"trainer.fit needs a module, got the class TinyModule, have you forgotten the \(\)\?"):
        trainer().fit(tiny.Module)


@pytest.mark.parametrize("value", [nn.Linear(1, 1), "module", object()], ids=["nn.Module", "text", "object"])
def test_something_else_than_a_module_is_named(value: Any, trainer: Any) -> None:
    with pytest.raises(TypeError, match=rf"trainer.fit needs a torchplug.Module, got {type(value).__name__}"):
        trainer().fit(value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch 2.13 of itself
def test_a_compiled_module_says_how_to_compile_instead(tiny: Any, trainer: Any) -> None:
    with pytest.raises(TypeError, match=r"trainer.fit needs a torchplug.Module, got OptimizedModule; call module.compile\(\)"):
        trainer().fit(torch.compile(tiny()))


def test_a_forgotten_super_init_is_said(trainer: Any) -> None:
    class Forgot(Module):
        def __init__(self) -> None:
            self.x = 1

    with pytest.raises(TypeError, match=r"Forgot.__init__ must call super\(\).__init__\(\) first"):
        trainer().fit(Forgot())


def test_a_missing_step_is_named(trainer: Any, loader: Any) -> None:
    class Bare(Module):
        pass

    with pytest.raises(TypeError, match=r"Bare has no training_step: define training_step\(self, batch, batch_idx\) and return the loss"):
        trainer().fit(Bare(), loader(1))
    for work, step in (("validate", "validation_step"), ("test", "test_step")):
        with pytest.raises(TypeError, match=rf"Bare has no {step}: define {step}\(self, batch, batch_idx\)"):
            getattr(trainer(), work)(Bare(), loader(1))


def test_no_optimizer_is_an_error_before_anything_is_trained(tiny: Any, trainer: Any) -> None:
    class Without(tiny.Module):
        configure_optimizers = Module.configure_optimizers

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("trained")

    with pytest.raises(
        ValueError, match=r"Without.configure_optimizers returned no optimizer; return one, such as torch.optim.AdamW\(self"
    ):
        trainer().fit(Without())


@pytest.mark.parametrize(("wrong", "text"), [("sgd", "got str"), (torch.optim.SGD, "got type"), (3, "got int")], ids=str)
def test_an_optimizer_of_the_wrong_type_is_named(wrong: Any, text: str, tiny: Any, trainer: Any) -> None:
    class Wrong(tiny.Module):
        def configure_optimizers(self) -> Any:
            return wrong

    with pytest.raises(TypeError, match=f"configure_optimizers must return one optimizer, a list of them.*{text}"):
        trainer().fit(Wrong())


def test_a_step_with_too_many_arguments_is_told_which_there_are(tiny: Any, trainer: Any) -> None:
    class Greedy(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int, more: int) -> Any:
            return None

    with pytest.raises(TypeError, match=r"training_step must take batch, or batch and batch_idx"):
        trainer().fit(Greedy())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("configure_optimiser", "configure_optimizers"), ("configure_optimizer", "configure_optimizers"),
        ("configure_optimisers", "configure_optimizers"),
        ("train_dataloaders", "train_dataloader"), ("train_data_loader", "train_dataloader"), ("traning_step", "training_step"),
        ("training_setp", "training_step"), ("validaton_step", "validation_step"), ("val_dataloaders", "val_dataloader"),
        ("test_dataloaders", "test_dataloader"), ("predict_dataloaders", "predict_dataloader"), ("prepare_dataset", None),
        ("configure_plugin", "configure_plugins"), ("on_train_epoch_ends", "on_train_epoch_end"),
        ("on_train_epoche_end", "on_train_epoch_end"), ("on_validation_epoch_finish", "on_validation_epoch_end"),
        ("shared_step", None), ("compute_loss", None), ("encode", None),
        ("make_optimizer", None), ("val_loader", None), ("training_loss", None), ("setup_model", None), ("step", None),
    ],
)  # fmt: skip
def test_a_misspelt_method_is_named_with_the_closest_and_others_are_left_alone(
    name: str, meant: str | None, trainer: Any, loader: Any
) -> None:
    def training_step(self: Any, batch: Any) -> Any:
        return self.layer(batch[0]).square().mean()

    def __init__(self: Any) -> None:
        Module.__init__(self)
        self.layer = nn.Linear(4, 1)

    methods: dict[str, Any] = {
        "__init__": __init__,
        "training_step": training_step,
        "configure_optimizers": lambda self: torch.optim.SGD(self.parameters(), lr=0.01),
    }
    methods.pop(meant, None)
    module = type("Slip", (Module,), {**methods, name: lambda self: None})()
    if meant is None:
        trainer().fit(module, loader(2))
        return
    with pytest.raises(Exception, match=rf"Slip.{name} is not a (method that is called|hook), did you mean '{meant}'\?"):
        trainer().fit(module, loader(2))


@pytest.mark.parametrize("name", ["train_dataloaders", "val_dataloaders", "prepare_datas"])
def test_a_misspelt_method_of_a_data_module_is_named_too(name: str, tiny: Any, trainer: Any, loader: Any) -> None:
    methods = {"train_dataloader": lambda self: loader(2), "val_dataloader": lambda self: loader(2), "prepare_data": lambda self: None}
    del methods[name[:-1]]
    data = type("Slip", (DataModule,), {**methods, name: lambda self: loader(2)})()
    with pytest.raises(Exception, match=rf"Slip.{name} is not a method that is called, did you mean '{name[:-1]}'\?"):
        trainer().fit(tiny(train=0, val=0), datamodule=data)


@pytest.mark.parametrize(
    "name",
    ["training_epoch_end", "validation_epoch_end", "test_epoch_end", "validation_end", "test_end", "training_step_end", "tng_dataloader",
     "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step", "configure_callbacks", "transfer_batch_to_device",
     "get_progress_bar_dict", "optimizer_step"],
)  # fmt: skip
def test_a_method_of_older_trainers_is_an_error_with_what_to_write_now(name: str, tiny: Any, trainer: Any) -> None:
    module = type("Old", (tiny.Module,), {name: lambda self, outputs=None: None})()
    with pytest.raises(Exception, match=rf"Old.{name}\b.*(write|argument)"):
        trainer().fit(module)


def test_using_the_run_outside_of_one_is_an_error_that_says_where_it_works(tiny: Any) -> None:
    module = tiny()
    for use in (lambda: module.run, module.optimizers, module.lr_schedulers, lambda: module.manual_backward(torch.ones(()))):
        with pytest.raises(RuntimeError, match=r"TinyModule is not in a run: .*work inside of trainer.fit"):
            use()


def test_log_outside_of_a_run_is_said_once_per_name_and_records_nothing(tiny: Any, caplog: Any) -> None:
    module = tiny()
    for _ in range(3):
        module.training_step((torch.ones(2, 4), torch.ones(2, 1)), 0)
        module.log("only_here", 1.0)
    assert sum("'only_here'" in line and "outside of a run" in line for line in caplog.messages) == 1


# ---------------------------------------------------------------------- the trainer


def test_how_long_to_train_has_no_default(tiny: Any, tmp_path: Path) -> None:
    from torchplug import Trainer

    with pytest.raises(ValueError, match=r"how long to train is not said: give Trainer max_epochs, max_steps or max_time"):
        Trainer(plugins=[], root_dir=tmp_path).fit(tiny())
    Trainer(plugins=[], root_dir=tmp_path).validate(tiny())  # an evaluation needs none


@pytest.mark.parametrize("work", ["fit", "validate", "test", "predict"])
def test_a_directory_that_cannot_be_made_is_an_error_before_anything_is_computed(
    work: str, tiny: Any, trainer: Any, tmp_path: Path
) -> None:
    class Eager(tiny.Module):
        def prepare_data(self) -> None:
            raise AssertionError("began")

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"the run's directory cannot be made in '.*file.*' \(Not a directory\); choose another root_dir"):
        getattr(trainer(root_dir=tmp_path / "file" / "runs"), work)(Eager())


@pytest.mark.parametrize("work", ["validate", "test", "predict"])
def test_an_evaluation_without_a_module_and_without_an_earlier_run_is_an_error(work: str, trainer: Any) -> None:
    with pytest.raises(TypeError, match=rf"trainer.{work} needs a module; there was no earlier run to take it from"):
        getattr(trainer(), work)()


def test_a_plateau_scheduler_with_a_wrong_monitor_lists_the_keys_and_the_closest(tiny: Any, trainer: Any) -> None:
    class Plateau(tiny.Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_los"}

    with pytest.raises(KeyError, match=r"no metric 'val_los' was logged, did you mean 'val_loss'\?; there are: .*val_loss"):
        trainer().fit(Plateau())


def test_a_plateau_scheduler_that_is_not_strict_waits_for_its_metric(tiny: Any, trainer: Any) -> None:
    class Plateau(tiny.Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "other", "strict": False}}

    trainer(max_epochs=2).fit(Plateau())


def test_an_error_keeps_its_type_and_its_traceback(tiny: Any, trainer: Any) -> None:
    class Own(Exception):
        pass

    class Failing(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise Own("mine")

    with pytest.raises(Own, match="mine") as caught:
        trainer().fit(Failing())
    assert caught.traceback[-1].name == "training_step"
    assert caught.value.__cause__ is None
