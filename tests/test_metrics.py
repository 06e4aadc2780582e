"""From `self.log` to what loggers, monitors and the user get."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchplug import hookimpl


class Records:
    """What a logger gets."""

    def __init__(self) -> None:
        self.all: list[tuple[dict[str, float], str, int, int, int, float]] = []

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], stage: str, step: int, epoch: int, samples: int, seconds: float) -> None:
        assert all(type(value) is float for value in metrics.values())
        self.all.append((metrics, stage, step, epoch, samples, seconds))

    def of(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of each record with `name`."""
        return [(step, metrics[name]) for metrics, _, step, *_ in self.all if name in metrics]


class Sum:
    """A metric object: update, compute, reset, as torchmetrics has them."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.computed = self.resets = 0

    def update(self, value: float) -> None:
        self.values.append(value)

    def compute(self) -> Tensor:
        self.computed += 1
        return torch.tensor(float(sum(self.values)))

    def reset(self) -> None:
        self.resets += 1
        self.values = []


@pytest.fixture
def logging_in(tiny: Any, trainer: Any) -> Callable[..., Any]:
    """Trains, validates or tests with a function in place of each step or hook; returns trainer and records.

    ``logging_in(training_step=lambda self, batch_idx: self.log(...))``.
    """

    def run(work: str = "fit", sizes: dict[str, int] | None = None, plugins: Any = (), loaders: Any = (), **given: Any) -> Any:
        hooks = {name: value for name, value in given.items() if callable(value)}
        options = {name: value for name, value in given.items() if not callable(value)}
        step = hooks.pop("training_step", lambda self, batch_idx: None)
        check = hooks.pop("validation_step", lambda self, batch_idx, dataloader_idx: None)

        def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
            step(self, batch_idx)
            return self.loss(batch)

        def validation_step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            check(self, batch_idx, dataloader_idx)

        own = {"training_step": training_step, "validation_step": validation_step, "test_step": validation_step, **hooks}
        module = type("Logging", (tiny.Module,), own)(**({"val": 0} if sizes is None else sizes))
        records = Records()
        made = trainer(plugins=[records, *plugins], **options)
        made.results = getattr(made, work)(module, *loaders)
        made.module = module
        return made, records

    return run


# ---------------------------------------------------------------------- means and other reductions


@pytest.mark.parametrize("batches", [1, 3, 127, 128, 129, 300])
def test_an_epoch_mean_is_the_sequential_sum_in_float64_bit_for_bit(batches: int, logging_in: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(batches, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-8, 9, (batches,), generator=generator)
    sizes = torch.randint(1, 40, (batches,), generator=generator).tolist()
    made, _ = logging_in(
        training_step=lambda self, i: self.log("x", values[i], on_step=False, on_epoch=True, batch_size=sizes[i]),
        sizes={"train": batches, "val": 0},
    )
    total, weight = 0.0, 0
    for value, size in zip(values.tolist(), sizes, strict=True):
        total += value * size
        weight += size
    assert made.metrics["x"] == total / weight


def test_the_order_of_the_sum_makes_a_difference() -> None:
    """Otherwise the test above would prove nothing."""
    values = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float(values.sum()) != functools.reduce(operator.add, values.tolist())  # sum() rounds once since Python 3.12


def test_an_epoch_mean_of_losses_is_that_of_a_plain_loop_bit_for_bit(tiny: Any, trainer: Any, loader: Any) -> None:
    class Logging(tiny.Module):
        total, samples = 0.0, 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.total += float(loss.detach()) * len(batch[0])
            self.samples += len(batch[0])
            return loss

    module, made = Logging(val=0), trainer()
    made.fit(module, torch.utils.data.DataLoader(loader(150, 3).dataset, batch_size=4))
    assert made.metrics["loss"] == module.total / module.samples


def test_an_epoch_mean_is_weighted_by_the_sizes_of_the_batches(tiny: Any, trainer: Any, loader: Any) -> None:
    class Logging(tiny.Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", float(batch_idx))
            self.log("even", float(batch_idx), batch_size=1)

    data = torch.utils.data.DataLoader(loader(5).dataset, batch_size=4)  # 4, 4 and 2 samples
    (result,) = trainer().validate(Logging(), data)
    assert result == {"x": (4 * 1 + 2 * 2) / 10, "even": 1.0}


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        ([torch.zeros(3, 2), torch.zeros(5)], 3),
        (("name", torch.zeros(4)), 4),
        ({"text": ["a", "b"], "x": torch.zeros(4, 1)}, 4),
        ({"inner": {"x": [torch.zeros(6)]}}, 6),
        ([torch.tensor(1.0), torch.zeros(7)], 7),
    ],
    ids=repr,
)
def test_the_size_of_a_batch_is_found_in_its_first_tensor(batch: Any, size: int, tiny: Any, trainer: Any) -> None:
    class Logging(tiny.Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", float(batch_idx))

    (result,) = trainer().validate(Logging(), [[batch, torch.zeros(1)]])
    assert result["x"] == 1 / (size + 1)


def test_a_batch_without_a_tensor_needs_batch_size(tiny: Any, trainer: Any) -> None:
    class Logging(tiny.Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("sum", 1.0, reduce_fx="sum")
            self.log("x", 1.0, **({"batch_size": 5} if batch == "fine" else {}))

    assert trainer().validate(Logging(), [["fine"]]) == [{"sum": 1.0, "x": 1.0}]
    with pytest.raises(ValueError, match=r"log\('x'\): the size of the batch is not known; give batch_size="):
        trainer().validate(Logging(), [["text"]])


def test_a_weight_of_nothing_counts_nothing(logging_in: Any) -> None:
    """A mean over tokens, where a batch had none."""
    made, _ = logging_in(training_step=lambda self, i: self.log("x", float(i), on_epoch=True, batch_size=[3, 0, 1, 0][i]))
    assert made.metrics["x"] == (0 * 3 + 2 * 1) / 4


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("mean", 2.0), ("sum", 10.0), ("min", -4.0), ("max", 9.0), (torch.median, 2.0), (lambda values: values[-1], 2.0)],
    ids=["mean", "sum", "min", "max", "median", "last"],
)
@pytest.mark.parametrize("kind", [float, torch.tensor, lambda v: torch.tensor([v], dtype=torch.float16)], ids=["float", "tensor", "half"])
def test_reductions(reduction: Any, expected: float, kind: Any, logging_in: Any) -> None:
    values = [3.0, -4.0, 9.0, 0.0, 2.0]
    made, _ = logging_in(
        training_step=lambda self, i: self.log("x", kind(values[i]), on_step=False, on_epoch=True, reduce_fx=reduction),
        sizes={"train": 5, "val": 0},
    )
    assert made.metrics["x"] == expected


@pytest.mark.parametrize("reduction", ["sum", "min", "max", torch.median, "mean"])
def test_reductions_go_over_all_batches_of_a_long_epoch(reduction: Any, logging_in: Any) -> None:
    made, _ = logging_in(
        training_step=lambda self, i: self.log("x", (i * 7) % 300, on_step=False, on_epoch=True, reduce_fx=reduction),
        sizes={"train": 300, "val": 0},
        max_epochs=2,
    )
    expected = {"sum": 44850.0, "min": 0.0, "max": 299.0, "mean": 149.5}.get(reduction, 149.0)
    assert made.metrics["x"] == expected


def test_values_of_low_precision_are_added_up_in_high_precision(logging_in: Any) -> None:
    made, _ = logging_in(
        training_step=lambda self, i: self.log("x", torch.tensor(0.1, dtype=torch.bfloat16), on_epoch=True),
        sizes={"train": 600, "val": 0},
    )
    assert made.metrics["x"] == pytest.approx(float(torch.tensor(0.1, dtype=torch.bfloat16)), rel=1e-12)


@pytest.mark.parametrize(
    "value",
    [
        2,
        2.0,
        True,
        torch.tensor(2),
        torch.tensor([[2.0]]),
        torch.tensor(2, dtype=torch.uint8),
        numpy.float64(2),
        numpy.float32(2),
        numpy.int64(2),
    ],
    ids=repr,
)
def test_numbers_and_tensors_of_one_element_are_taken(value: Any, logging_in: Any) -> None:
    made, records = logging_in(training_step=lambda self, i: self.log("x", value, on_epoch=True), log_every_n_steps=1)
    assert made.metrics["x"] == float(value)
    assert records.of("x_step")[0] == (1, float(value))


def test_a_value_counts_as_it_was_when_it_was_logged(tiny: Any, trainer: Any) -> None:
    """A parameter, a buffer or a running sum goes on changing in place afterwards."""

    class Changing(tiny.Module):
        def __init__(self) -> None:
            super().__init__(val=0)
            self.seen, self.total = nn.Buffer(torch.zeros(())) if hasattr(nn, "Buffer") else torch.zeros(()), torch.zeros(())
            self.expected: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1
            self.total.add_(2.0)
            self.log_dict({"seen": self.seen, "total": self.total, "bias": self.layer.bias}, on_step=True, on_epoch=True)
            self.expected.append(float(self.layer.bias.detach()))
            return self.loss(batch)

    module, records = Changing(), Records()
    made = trainer(plugins=[records], log_every_n_steps=2)
    made.fit(module)
    assert (made.metrics["seen"], made.metrics["total"]) == (2.5, 5.0)
    assert made.metrics["bias"] == sum(module.expected) / 4
    assert records.of("bias_step") == [(2, module.expected[1]), (4, module.expected[3])]


def test_nan_stays_nan(logging_in: Any) -> None:
    def step(self: Any, i: int) -> None:
        value = math.nan if i == 1 else float(i)
        self.log("mean", value, on_step=False, on_epoch=True)
        self.log("min", value, on_step=False, on_epoch=True, reduce_fx="min")
        self.log("max", torch.tensor(value), on_step=False, on_epoch=True, reduce_fx="max")

    made, records = logging_in(training_step=step)
    assert all(math.isnan(made.metrics[name]) for name in ("mean", "min", "max"))
    assert math.isnan(records.of("mean")[0][1])


def test_a_new_epoch_begins_anew(logging_in: Any) -> None:
    _made, records = logging_in(
        training_step=lambda self, i: self.log("x", self.current_epoch * 10.0 + i, on_step=False, on_epoch=True, reduce_fx="sum"),
        max_epochs=3,
    )
    assert records.of("x") == [(4, 6.0), (8, 46.0), (12, 86.0)]


def test_a_validation_in_mid_epoch_leaves_the_training_means_alone(logging_in: Any) -> None:
    _made, records = logging_in(
        training_step=lambda self, i: self.log("loss", float(i), on_step=True, on_epoch=True),
        validation_step=lambda self, i, _: self.log("loss", 100.0),
        sizes={"train": 4, "val": 2},
        val_check_interval=1,
        log_every_n_steps=3,
    )
    assert records.of("loss") == [(1, 100.0), (2, 100.0), (3, 100.0), (4, 100.0)]
    assert records.of("loss_epoch") == [(4, 1.5)]
    assert records.of("loss_step") == [(3, 2.0), (4, 3.0)]


def test_what_an_epoch_that_was_broken_off_had_added_up_is_recorded(logging_in: Any) -> None:
    _made, records = logging_in(training_step=lambda self, i: self.log("x", float(i), on_step=False, on_epoch=True), max_steps=3)
    assert records.of("x") == [(3, 1.0)]


# ---------------------------------------------------------------------- names, steps and epochs


@pytest.mark.parametrize(
    ("on_step", "on_epoch", "names"),
    [
        (None, None, {"x"}),
        (True, None, {"x"}),
        (True, False, {"x"}),
        (False, True, {"x"}),
        (None, True, {"x_step", "x_epoch"}),
        (True, True, {"x_step", "x_epoch"}),
    ],
)
def test_suffixes_in_training(on_step: Any, on_epoch: Any, names: set[str], logging_in: Any) -> None:
    made, records = logging_in(training_step=lambda self, i: self.log("x", float(i), on_step=on_step, on_epoch=on_epoch))
    assert {name for metrics, *_ in records.all for name in metrics} == names
    assert made.metrics["x"] == (1.5 if on_epoch else 3.0)  # the plain name is there for monitors in any case


@pytest.mark.parametrize(
    ("on_step", "on_epoch", "names"), [(None, None, {"x"}), (False, True, {"x"}), (True, True, {"x_step", "x_epoch"}), (True, False, {"x"})]
)
@pytest.mark.parametrize("work", ["validate", "test"])
def test_suffixes_in_evaluations(on_step: Any, on_epoch: Any, names: set[str], work: str, logging_in: Any) -> None:
    _made, records = logging_in(
        work, validation_step=lambda self, i, _: self.log("x", float(i), on_step=on_step, on_epoch=on_epoch), sizes={}, log_every_n_steps=1
    )
    assert {name for metrics, *_ in records.all for name in metrics} == names
    assert {stage for _, stage, *_ in records.all} == {work}


def test_values_are_of_the_step_in_training_and_of_the_epoch_in_evaluations(logging_in: Any) -> None:
    _made, records = logging_in(
        training_step=lambda self, i: self.log("train", float(i)),
        validation_step=lambda self, i, _: self.log("val", float(i)),
        sizes={"train": 4, "val": 3},
        log_every_n_steps=1,
    )
    assert records.of("train") == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0)]
    assert records.of("val") == [(4, 1.0)]


def test_every_hook_can_log(logging_in: Any) -> None:
    hooks = ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward", "on_after_backward",
             "on_before_optimizer_step", "on_after_optimizer_step", "on_before_zero_grad", "on_train_batch_end", "on_validation_start",
             "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end",
             "on_validation_end", "on_train_epoch_end", "on_train_end"]  # fmt: skip

    def logger(name: str) -> Any:
        return lambda self: self.log(name, float(self.global_step))

    _made, records = logging_in(**{name: logger(name) for name in hooks}, sizes={"train": 2, "val": 2}, log_every_n_steps=1, max_epochs=2)
    first = {name: records.of(name)[0] for name in hooks}
    assert first["on_fit_start"][1] == first["on_train_start"][1] == first["on_train_epoch_start"][1] == 0.0
    assert first["on_after_backward"] == (1, 0.0)
    assert first["on_after_optimizer_step"] == first["on_train_batch_end"] == (1, 1.0)
    assert all(first[name] == (2, 2.0) for name in hooks[10:-1])
    assert first["on_train_end"] == (4, 4.0)
    assert [len(records.of(name)) for name in ("on_train_batch_end", "on_validation_batch_end", "on_train_epoch_end")] == [4, 2, 2]


def test_a_value_logged_when_the_fit_ends_reaches_the_loggers_unless_the_fit_goes_on_later(logging_in: Any) -> None:
    trainer, records = logging_in(on_fit_end=lambda self: self.log("late", 1.5))
    assert records.of("late") == [(trainer.run.position.step, 1.5)] and records.all[-1][1] == "train"

    class Signalled(Records):
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            run.interrupt("SIGUSR1")

    with pytest.raises(SystemExit):
        logging_in(on_fit_end=lambda self: self.log("late", 1.5), plugins=[signalled := Signalled()])
    assert signalled.of("late") == []


def test_values_logged_in_epoch_hooks_are_recorded_once_with_their_epoch(logging_in: Any) -> None:
    _made, records = logging_in(
        on_train_epoch_end=lambda self: self.log("end", 10.0 * self.current_epoch),
        on_validation_epoch_end=lambda self: self.log("checked", self.current_epoch),
        sizes={"train": 2, "val": 1},
        max_epochs=2,
    )
    assert [(metrics, stage, step, epoch) for metrics, stage, step, epoch, *_ in records.all] == [
        ({"checked": 0.0}, "validate", 2, 0),
        ({"end": 0.0}, "train", 2, 0),
        ({"checked": 1.0}, "validate", 4, 1),
        ({"end": 10.0}, "train", 4, 1),
    ]


def test_a_record_carries_step_epoch_samples_and_time(logging_in: Any) -> None:
    _made, records = logging_in(
        training_step=lambda self, i: self.log("x", 1.0), sizes={"train": 2, "val": 0, "batch_size": 3}, log_every_n_steps=1, max_epochs=2
    )
    assert [(stage, step, epoch, samples) for _, stage, step, epoch, samples, _ in records.all] == [
        ("train", 1, 0, 3), ("train", 2, 0, 6), ("train", 3, 1, 9), ("train", 4, 1, 12),
    ]  # fmt: skip
    seconds = [record[-1] for record in records.all]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_logger_false_keeps_a_value_from_loggers_and_not_from_monitors(logging_in: Any) -> None:
    def step(self: Any, i: int) -> None:
        self.log("quiet", float(i), logger=False, on_step=True, on_epoch=True)

    made, records = logging_in(training_step=step, on_train_epoch_end=lambda self: self.log("silent", 1.0, logger=False))
    assert records.all == []
    assert (made.metrics["quiet"], made.metrics["silent"]) == (1.5, 1.0)


def test_log_dict_logs_every_entry_with_the_same_arguments(logging_in: Any) -> None:
    _made, records = logging_in(training_step=lambda self, i: self.log_dict({"a": 1.0, "b": float(i)}, on_step=False, on_epoch=True))
    assert records.all[0][0] == {"a": 1.0, "b": 1.5}


def test_plugins_log_as_modules_do(logging_in: Any) -> None:
    class Norms:
        @hookimpl
        def on_before_optimizer_step(self, run: Any) -> None:
            run.log("norm", 2.0, on_step=False, on_epoch=True)

        @hookimpl
        def on_validation_epoch_end(self, run: Any) -> None:
            run.log("checked", 3)

    _made, records = logging_in(plugins=[Norms()], sizes={})
    assert (records.of("norm"), records.of("checked")) == ([(4, 2.0)], [(4, 3.0)])


def test_metrics_after_a_run_are_floats(logging_in: Any) -> None:
    made, _ = logging_in(training_step=lambda self, i: self.log("x", torch.tensor(1.5), on_step=True, on_epoch=True))
    assert dict(made.metrics) == {"x": 1.5, "x_step": 1.5, "x_epoch": 1.5}
    assert all(type(value) is float for value in made.metrics.values())


# ---------------------------------------------------------------------- several loaders


def test_values_of_several_loaders_are_told_apart_by_a_suffix(logging_in: Any, loader: Any) -> None:
    def check(self: Any, i: int, index: int) -> None:
        self.log("x", float(index))
        self.log("plain", 10.0 + index, add_dataloader_idx=False)

    made, _records = logging_in(
        "validate", validation_step=check, loaders=([loader(1), loader(2)],), on_validation_epoch_end=lambda self: self.log("all", 7.0)
    )
    assert made.results == [
        {"x/dataloader_idx_0": 0.0, "plain": 10.0, "all": 7.0},
        {"x/dataloader_idx_1": 1.0, "plain": 11.0, "all": 7.0},
    ]
    assert (made.metrics["x/dataloader_idx_0"], made.metrics["x/dataloader_idx_1"]) == (0.0, 1.0)


def test_step_and_epoch_values_of_several_loaders_have_both_suffixes(logging_in: Any, loader: Any) -> None:
    made, records = logging_in(
        "validate",
        validation_step=lambda self, i, index: self.log("x", float(index), on_step=True, on_epoch=True),
        loaders=([loader(1), loader(1)],),
        log_every_n_steps=1,
    )
    names = {name for metrics, *_ in records.all for name in metrics}
    assert names == {f"x_{kind}/dataloader_idx_{index}" for kind in ("step", "epoch") for index in (0, 1)}
    assert made.metrics["x/dataloader_idx_1"] == made.metrics["x_epoch/dataloader_idx_1"] == 1.0
    assert made.results == [{"x_epoch/dataloader_idx_0": 0.0}, {"x_epoch/dataloader_idx_1": 1.0}]


def test_one_loader_in_a_list_needs_no_suffix(logging_in: Any, loader: Any) -> None:
    made, _ = logging_in("validate", validation_step=lambda self, i, _: self.log("x", 1.0), loaders=([loader(1)],))
    assert made.results == [{"x": 1.0}]


# ---------------------------------------------------------------------- objects that compute


def test_metric_objects_are_computed_and_reset_at_the_end_of_each_epoch(logging_in: Any) -> None:
    train, val = Sum(), Sum()

    def step(self: Any, i: int) -> None:
        train.update(1.0)
        self.log("train_sum", train, on_step=False, on_epoch=True)

    def check(self: Any, i: int, _: int) -> None:
        val.update(5.0)
        self.log("val_sum", val)

    _made, records = logging_in(
        training_step=step, validation_step=check, sizes={"train": 3, "val": 2}, max_epochs=2, num_sanity_val_steps=2
    )
    assert records.of("train_sum") == [(3, 3.0), (6, 3.0)]
    assert records.of("val_sum") == [(3, 10.0), (6, 10.0)]
    assert (train.values, val.values) == ([], [])


def test_a_step_value_of_a_metric_object_does_not_spoil_its_epoch(logging_in: Any) -> None:
    total = Sum()

    def step(self: Any, i: int) -> None:
        total.update(1.0)
        self.log("x", total, on_step=True, on_epoch=True)

    _made, records = logging_in(training_step=step, log_every_n_steps=2)
    assert records.of("x_epoch") == [(4, 4.0)]
    assert [step for step, _ in records.of("x_step")] == [2, 4]


def test_a_metric_object_logged_at_the_end_of_an_epoch_is_computed_and_reset_there(logging_in: Any) -> None:
    total = Sum()
    _made, records = logging_in(
        training_step=lambda self, i: total.update(2.0), on_train_epoch_end=lambda self: self.log("total", total), max_epochs=2
    )
    assert records.of("total") == [(4, 8.0), (8, 8.0)]
    assert (total.computed, total.resets) == (2, 2)


@pytest.mark.slow
def test_torchmetrics_work(tiny: Any, trainer: Any) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Measured(tiny.Module):
        def __init__(self) -> None:
            super().__init__(val=3)
            self.error = torchmetrics.MeanSquaredError()
            self.both = torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError(), torchmetrics.R2Score()])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            prediction = self(batch[0])
            self.error.update(prediction, batch[1])
            self.both.update(prediction, batch[1])
            self.log("error", self.error)
            self.log_dict(self.both)

    module = Measured()
    trainer(num_sanity_val_steps=2, max_epochs=2).fit(module)
    (result,) = trainer().validate(module)
    x, y = (torch.cat(part) for part in zip(*module.val_dataloader(), strict=True))
    with torch.no_grad():
        difference = module(x) - y
        expected = {
            "error": difference.square().mean(),
            "MeanAbsoluteError": difference.abs().mean(),
            "R2Score": 1 - difference.square().sum() / (y - y.mean()).square().sum(),
        }
    assert result == {name: pytest.approx(float(value), rel=1e-5) for name, value in expected.items()}


# ---------------------------------------------------------------------- the progress display


def test_what_was_logged_for_the_progress_display_is_there_with_its_latest_value(logging_in: Any) -> None:
    seen: list[dict[str, float]] = []

    class Display:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            seen.append(run.metrics.progress())

        @hookimpl
        def on_train_epoch_end(self, run: Any) -> None:
            seen.append(run.metrics.progress())

    def step(self: Any, i: int) -> None:
        self.log("shown", float(i), prog_bar=True)
        self.log("both", float(i), prog_bar=True, on_step=True, on_epoch=True)
        self.log("hidden", float(i))

    _made, _ = logging_in(
        training_step=step, validation_step=lambda self, i, _: self.log("val", 5.0, prog_bar=True), sizes={"train": 2, "val": 1},
        plugins=[Display()],
    )  # fmt: skip
    assert seen[:2] == [{"shown": 0.0, "both_step": 0.0}, {"shown": 1.0, "both_step": 1.0}]
    assert seen[2] == {"shown": 1.0, "both_step": 1.0, "both": 0.5, "val": 5.0}


# ---------------------------------------------------------------------- monitors


def test_a_monitor_sees_each_value_once_and_knows_when_it_was_computed(logging_in: Any) -> None:
    readings: list[Any] = []

    class Monitor:
        seen = -1

        @hookimpl
        def on_train_epoch_end(self, run: Any) -> None:
            reading = run.metrics.fresh("val", self.seen)
            readings.append(reading and (reading.value, reading.step, reading.epoch))
            if reading:
                self.seen = reading.serial

    logging_in(
        validation_step=lambda self, i, _: self.log("val", float(self.global_step)), plugins=[Monitor()], sizes={"train": 3, "val": 1},
        max_epochs=5, check_val_every_n_epoch=2,
    )  # fmt: skip
    assert readings == [None, (6.0, 6, 1), None, (12.0, 12, 3), None]


def test_a_missing_metric_is_an_error_once_it_had_its_chance_and_lists_what_there_is(logging_in: Any) -> None:
    answers: list[Any] = []

    class Monitor:
        @hookimpl
        def on_train_start(self, run: Any) -> None:
            answers.append(run.metrics.fresh("val_los"))

        @hookimpl
        def on_train_epoch_end(self, run: Any) -> None:
            answers.append(run.metrics.fresh("val_los"))

    with pytest.raises(KeyError, match=r"no metric 'val_los' was logged, did you mean 'val_loss'\?; there are: train, val_loss"):
        logging_in(
            training_step=lambda self, i: self.log("train", 1.0, on_step=False, on_epoch=True),
            validation_step=lambda self, i, _: self.log("val_loss", 1.0),
            plugins=[Monitor()], sizes={"train": 2, "val": 1}, max_epochs=4, check_val_every_n_epoch=2,
        )  # fmt: skip
    assert answers == [None, None]  # before the first validation nobody can know


def test_a_value_logged_on_steps_alone_can_be_monitored_at_the_end_of_an_epoch(logging_in: Any) -> None:
    """`self.log("train_loss", loss)` in training_step, and a monitor of train_loss: an epoch may be shorter than log_every_n_steps."""
    values: list[float] = []

    class Monitor:
        @hookimpl
        def on_train_epoch_end(self, run: Any) -> None:
            reading = run.metrics.fresh("train_loss")
            values.append(reading and reading.value)

    _made, records = logging_in(
        training_step=lambda self, i: self.log("train_loss", 10.0 * self.current_epoch + i), plugins=[Monitor()], max_epochs=2
    )
    assert values == [3.0, 13.0]
    assert records.of("train_loss") == [(8, 13.0)]  # loggers get it when it is their turn


@pytest.mark.parametrize("where", ["trainer.metrics", "run.metrics", "a result"])
def test_looking_a_wrong_name_up_lists_what_there_is_and_the_closest(where: str, logging_in: Any) -> None:
    made, _ = logging_in("validate", validation_step=lambda self, i, _: self.log_dict({"val_loss": 1.0, "acc": 0.5}), sizes={})
    values = {"trainer.metrics": made.metrics, "run.metrics": made.run.metrics, "a result": made.results[0]}[where]
    assert values["val_loss"] == 1.0
    assert ("val_loss" in values, "val_los" in values) == (True, False)
    with pytest.raises(KeyError, match=r"no metric 'val_los' was logged, did you mean 'val_loss'\?; there are: acc, val_loss"):
        values["val_los"]
    with pytest.raises(KeyError, match=r"no metric 'zebra' was logged; there are: acc, val_loss"):
        values["zebra"]


# ---------------------------------------------------------------------- mistakes


def _other_arguments(self: Any, i: int) -> None:
    self.log("x", 1.0, on_epoch=bool(i))


def _as_string(self: Any, i: int) -> None:
    self.log("x", 1.0, on_epoch=True, batch_size="8")


def _negative(self: Any, i: int) -> None:
    self.log("x", 1.0, on_epoch=True, batch_size=-8)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (lambda self, i: self.log("x", "high"), r"log\('x'\) takes a number, a tensor with one element or a metric object, got str 'high'"),
        (lambda self, i: self.log("x", None), r"log\('x'\) takes a number.*got NoneType None"),
        (lambda self, i: self.log("x", {"a": 1}), r"log\('x'\) takes a number.*got dict \{'a': 1\}"),
        (lambda self, i: self.log("x", torch.ones(2, 3)), r"log\('x'\) takes one number, got a tensor of shape \(2, 3\); reduce it first"),
        (lambda self, i: self.log("x", torch.ones(0)), r"log\('x'\) takes one number, got a tensor of shape \(0,\)"),
        (lambda self, i: self.log(3, 1.0), r"the name of a metric must be a text, got 3"),
        (lambda self, i: self.log("", 1.0), r"the name of a metric must be a text, got ''"),
        (lambda self, i: self.log("x", 1.0, reduce_fx="avg"), r"reduce_fx must be one of mean, sum, min, max or a function, got 'avg'"),
        (lambda self, i: self.log("x", 1.0, on_step=False), r"log\('x'\): on_step and on_epoch are both False"),
        (lambda self, i: self.log("x", 1.0, on_step=False, on_epoch=False), r"both False, so nothing would be recorded"),
        (_other_arguments, r"log\('x'\) was called with other arguments before"),
        (_as_string, r"log\('x'\).*batch_size.*'8'"),
        (_negative, r"log\('x'\).*batch_size.*-8"),
        (lambda self, i: self.log("x", 1.0, onstep=True), r"onstep"),
    ],
    ids=["text", "None", "dict", "shape", "empty", "name", "no name", "reduce_fx", "only not on_step", "neither", "other arguments",
         "batch_size", "negative batch_size", "unknown argument"],
)  # fmt: skip
def test_a_wrong_argument_of_log_is_an_error_that_names_the_metric(step: Any, text: str, logging_in: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        logging_in(training_step=step)


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (lambda self: self.log("x", 1.0, on_step=True), r"log\('x'\): on_step=True has no meaning outside of batches; leave it out"),
        (lambda self: self.log("x", "high"), r"log\('x'\) takes a number"),
        (lambda self: self.log("x", torch.ones(2)), r"log\('x'\) takes one number, got a tensor of shape \(2,\)"),
        (lambda self: self.log("", 1.0), r"the name of a metric must be a text, got ''"),
    ],
    ids=["on_step", "text", "shape", "name"],
)
def test_a_wrong_argument_of_log_in_an_epoch_hook_is_an_error_too(hook: Any, text: str, logging_in: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        logging_in(on_train_epoch_end=hook)


# ---------------------------------------------------------------------- what logging costs the device


class ReadBacks(TorchDispatchMode):
    """At which steps a value was read back from the device."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.at = module, []

    def note(self) -> None:
        if self.module._run is not None:
            self.at.append(self.module._run.position.micro_step + 1)  # counted from 1, of the batch that is running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func):
            self.note()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 1, "gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"max_steps": 1000, "min_steps": 10, "max_time": "1h"},
    ],
    ids=str,
)
def test_nothing_is_read_back_from_the_device_between_logging_steps(
    options: Any, tiny: Any, trainer: Any, loader: Any, monkeypatch: Any
) -> None:
    class Logging(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("a", loss)
            self.log("b", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log("c", loss, on_step=False, on_epoch=True, reduce_fx="max")
            return loss

        def on_before_optimizer_step(self) -> None:
            self.log("norm", self.layer.weight.grad.norm(), on_step=True, on_epoch=True)

    module = Logging()
    counter, plain = ReadBacks(module), Tensor.tolist

    def tolist(self: Tensor) -> Any:
        counter.note()
        return plain(self)

    monkeypatch.setattr(Tensor, "tolist", tolist)  # reads without the operation that the mode sees
    batches = list(loader(100))  # a plain list: a loader that shuffles reads its own indices
    with counter:
        trainer(log_every_n_steps=25, limit_val_batches=0, **{"max_epochs": 1, **options}).fit(module, batches)
    assert set(counter.at) <= {25, 26, 50, 51, 75, 76, 100, 101}
    assert set(counter.at) >= {26, 51, 76}  # the records themselves, after the batch was counted


def test_an_evaluation_reads_back_at_its_logging_steps_and_its_end_alone(tiny: Any, trainer: Any, loader: Any) -> None:
    class Logging(tiny.Module):
        batches = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            Logging.batches += 1
            self.log("a", self.loss(batch), on_step=True, on_epoch=True)
            self.log("b", self.loss(batch))

    class Counting(TorchDispatchMode):
        at: list[int] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_local_scalar_dense" in str(func):
                self.at.append(Logging.batches)
            return func(*args, **(kwargs or {}))

    with Counting() as counting:
        trainer(log_every_n_steps=25).validate(Logging(), [list(loader(60))])
    assert set(counting.at) <= {0, 25, 50, 60}
