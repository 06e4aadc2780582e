"""When things happen in a run: limits, intervals, positions, modes, and what is left as it was."""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from torchplug import hookimpl
from torchplug.seed import generator_state


class Trace:
    """Which batches were trained on, and after how many of them (in the whole run) each other thing happened."""

    def __init__(self) -> None:
        self.batches = 0
        self.epochs: list[list[int]] = []  # batch indices of each epoch
        self.validated: list[int] = []
        self.val_batches: list[tuple[int, int]] = []  # (dataloader_idx, batch_idx)
        self.ended: list[int] = []
        self.records: list[tuple[str, int, dict[str, float]]] = []
        self.status = ""
        self.num_batches: Any = None

    @hookimpl
    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    @hookimpl
    def on_train_batch_end(self, batch_idx: int) -> None:
        self.batches += 1
        self.epochs[-1].append(batch_idx)

    @hookimpl
    def on_validation_start(self) -> None:
        self.validated.append(self.batches)

    @hookimpl
    def on_validation_batch_end(self, batch_idx: int, dataloader_idx: int) -> None:
        self.val_batches.append((dataloader_idx, batch_idx))

    @hookimpl
    def on_train_epoch_end(self, run: Any) -> None:
        self.ended.append(self.batches)
        self.num_batches = run.num_batches

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], stage: str, step: int) -> None:
        self.records.append((stage, step, metrics))

    @hookimpl
    def on_run_end(self, status: str) -> None:
        self.status = status


class Clock:
    """Time as the loop reads it; a second goes by in each training batch."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    @hookimpl
    def on_train_batch_start(self) -> None:
        self.now += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def traced(trainer: Any) -> Callable[..., Trace]:
    """Fits a module and returns what happened."""

    def fit(module: Any, *loaders: Any, plugins: Any = (), **options: Any) -> Trace:
        trace = Trace()
        trainer(plugins=[trace, *plugins], **options).fit(module, *loaders)
        return trace

    return fit


class Stream(IterableDataset[Any]):
    """``samples`` pairs; ``claims`` is the length that its author believes, None for no length."""

    def __init__(self, samples: int, claims: int | None) -> None:
        self.samples, self.claims = samples, claims

    def __iter__(self) -> Iterator[Any]:
        for i in range(self.samples):
            yield torch.full((4,), i / self.samples), torch.ones(1)

    def __len__(self) -> int:
        if self.claims is None:
            raise TypeError("no length")
        return self.claims


class Misjudged:
    """An iterable of batches whose length is not what it says."""

    def __init__(self, batches: Any, claims: int) -> None:
        self.batches, self.claims = list(batches), claims

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return self.claims


# ---------------------------------------------------------------------- how many batches


@pytest.mark.parametrize(
    ("limit", "batches"), [(1.0, 8), (1, 1), (3, 3), (99, 8), (0.5, 4), (0.3, 2), (0.125, 1), (8, 8)], ids=lambda value: repr(value)
)
def test_limit_train_batches_is_a_count_or_a_fraction(limit: Any, batches: int, tiny: Any, traced: Any) -> None:
    trace = traced(tiny(train=8), limit_train_batches=limit, max_epochs=2)
    assert trace.epochs == [list(range(batches))] * 2
    assert trace.validated == [batches, 2 * batches]  # an epoch that was limited is complete


@pytest.mark.parametrize("work", ["validate", "test", "predict"])
@pytest.mark.parametrize(("limit", "batches"), [(1.0, 8), (1, 1), (99, 8), (0.5, 4), (0.3, 2)], ids=lambda value: repr(value))
def test_limits_of_evaluations_are_counts_or_fractions(
    work: str, limit: Any, batches: int, tiny: Any, trainer: Any, make_recorder: Any
) -> None:
    stage = {"validate": "validation"}.get(work, work)
    recorder = make_recorder(f"on_{stage}_batch_end")
    argument = {"validate": "limit_val_batches"}.get(work, f"limit_{work}_batches")
    getattr(trainer(plugins=[recorder], **{argument: limit}), work)(tiny(val=8, test=8, predict=8))
    assert [call["batch_idx"] for _, call in recorder.calls] == list(range(batches))


@pytest.mark.parametrize("limit", [0, 0.0])
def test_limit_val_batches_0_switches_validation_and_sanity_check_off(limit: Any, tiny: Any, trainer: Any, make_recorder: Any) -> None:
    recorder = make_recorder("on_sanity_start", "on_validation_start", "validation_step")
    trainer(plugins=[recorder], limit_val_batches=limit, num_sanity_val_steps=2).fit(tiny())
    assert recorder.calls == []


@pytest.mark.parametrize("work", ["validate", "test", "predict"])
def test_an_evaluation_that_was_limited_to_nothing_says_which_limit_it_was(work: str, tiny: Any, trainer: Any) -> None:
    argument = {"validate": "limit_val_batches"}.get(work, f"limit_{work}_batches")
    with pytest.raises(ValueError, match=f"{argument}=0"):
        getattr(trainer(**{argument: 0}), work)(tiny())


@pytest.mark.parametrize("argument", ["limit_train_batches", "limit_val_batches"])
def test_a_fraction_that_leaves_no_batch_is_an_error_with_the_smallest_that_works(argument: str, tiny: Any, trainer: Any) -> None:
    with pytest.raises(ValueError, match=rf"{argument}=0.1 of 8 batches is less than one; give at least 0.125"):
        trainer(**{argument: 0.1}).fit(tiny(train=8, val=8))


@pytest.mark.parametrize("argument", ["limit_train_batches", "overfit_batches"])
def test_a_fraction_of_an_unknown_length_is_an_error_that_names_the_argument(argument: str, tiny: Any, trainer: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument}=0.5 is a fraction, but the loader's length is not known; give a number of batches"):
        trainer(**{argument: 0.5}).fit(tiny(), DataLoader(Stream(8, None), batch_size=2))


def test_a_count_limits_a_loader_of_unknown_length(tiny: Any, traced: Any) -> None:
    trace = traced(tiny(), DataLoader(Stream(16, None), batch_size=2), limit_train_batches=3, limit_val_batches=1, max_epochs=2)
    assert trace.epochs == [[0, 1, 2]] * 2
    assert trace.val_batches == [(0, 0)] * 2


def test_several_validation_loaders_are_gone_through_in_order_each_with_its_limit(tiny: Any, traced: Any, loader: Any) -> None:
    trace = traced(tiny(), loader(2), [loader(2), loader(4)], limit_val_batches=0.5)
    assert trace.val_batches == [(0, 0), (1, 0), (1, 1)]
    assert set(trace.records[0][2]) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}


def test_validation_loaders_may_be_given_as_a_dict(tiny: Any, traced: Any, loader: Any) -> None:
    trace = traced(tiny(), loader(2), {"clean": loader(1), "noisy": loader(2)})
    assert trace.val_batches == [(0, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize(("value", "kept"), [(2, 2), (0.25, 2), (99, 8), (1, 1)])
def test_overfit_batches_trains_and_validates_on_the_same_batches_in_every_epoch(
    value: Any, kept: int, tiny: Any, trainer: Any, loader: Any
) -> None:
    class Seeing(tiny.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trained, self.checked = [], []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trained.append(batch[0])
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.checked.append(batch[0])

    module = Seeing()
    trainer(overfit_batches=value, max_epochs=3).fit(module, loader(8, shuffle=True), loader(5, seed=9))
    first = module.trained[:kept]
    assert len(module.trained) == len(module.checked) == 3 * kept
    for epoch in range(3):
        part = slice(epoch * kept, (epoch + 1) * kept)
        assert all(torch.equal(a, b) for a, b in zip(module.trained[part], first, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(module.checked[part], first, strict=True))


# ---------------------------------------------------------------------- loaders whose length is unknown or wrong


@pytest.mark.parametrize("claims", [None, 8, 3, 99], ids=["no length", "right", "too short", "too long"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterable_dataset_is_trained_on_to_its_end_whatever_it_claims(claims: int | None, workers: int, tiny: Any, traced: Any) -> None:
    loader = DataLoader(Stream(8, claims), batch_size=2, num_workers=workers)
    trace = traced(tiny(), loader, max_epochs=2)
    assert trace.epochs == [[0, 1, 2, 3]] * 2
    assert trace.validated == trace.ended == [4, 8]


def test_a_stream_without_end_is_trained_on_for_max_steps_and_validated_by_batches(tiny: Any, traced: Any) -> None:
    stream = DataLoader(Stream(10**9, None), batch_size=2)
    trace = traced(tiny(), stream, max_steps=7, val_check_interval=3, check_val_every_n_epoch=None)
    assert (trace.batches, trace.validated, trace.ended) == (7, [3, 6], [])


@pytest.mark.parametrize("claims", [2, 4, 9])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loader_with_a_wrong_length_is_trained_on_to_its_end_and_it_is_said_once(
    claims: int, accumulate: int, tiny: Any, traced: Any, loader: Any, caplog: Any
) -> None:
    trace = traced(tiny(), Misjudged(loader(5), claims), max_epochs=3, accumulate_grad_batches=accumulate)
    assert trace.epochs == [[0, 1, 2, 3, 4]] * 3
    assert trace.validated == trace.ended == [5, 10, 15]
    assert trace.num_batches is None
    said = [line for line in caplog.messages if "its length is ignored" in line]
    assert len(said) == 1
    assert f"the training loader's length is {claims}" in said[0]
    assert re.search("gave 5 batches" if claims == 9 else "gave 5 batches|gives more batches", said[0])


def test_a_validation_loader_of_unknown_length_is_gone_through_to_its_end(tiny: Any, traced: Any, loader: Any) -> None:
    trace = traced(tiny(), loader(2), DataLoader(Stream(6, 2), batch_size=2), num_sanity_val_steps=-1)
    assert trace.val_batches == [(0, 0), (0, 1), (0, 2)]


# ---------------------------------------------------------------------- when validation is due


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (1.0, [8, 16]),
        (0.25, [2, 4, 6, 8, 10, 12, 14, 16]),
        (0.5, [4, 8, 12, 16]),
        (0.4, [3, 6, 11, 14]),
        (3, [3, 6, 11, 14]),
        (8, [8, 16]),
        (1, list(range(1, 17))),
        (0.01, list(range(1, 17))),
    ],
    ids=repr,
)
def test_val_check_interval_counts_batches_of_an_epoch(interval: Any, expected: list[int], tiny: Any, traced: Any) -> None:
    assert traced(tiny(train=8), val_check_interval=interval, max_epochs=2).validated == expected


def test_a_fraction_is_one_of_the_limited_epoch(tiny: Any, traced: Any) -> None:
    assert traced(tiny(train=8), val_check_interval=0.5, limit_train_batches=4).validated == [2, 4]


def test_without_epochs_val_check_interval_counts_batches_of_the_whole_run(tiny: Any, traced: Any) -> None:
    trace = traced(tiny(train=4), val_check_interval=6, check_val_every_n_epoch=None, max_epochs=5)
    assert trace.validated == [6, 12, 18]


@pytest.mark.parametrize("interval", ["3s", timedelta(seconds=3), {"seconds": 3}, "00:00:00:03", "2s1000ms"], ids=repr)
def test_val_check_interval_can_be_a_time(interval: Any, tiny: Any, traced: Any, clock: Clock) -> None:
    assert traced(tiny(train=5), val_check_interval=interval, max_epochs=2, plugins=[clock]).validated == [3, 6, 9]


def test_a_time_waits_for_the_epochs_in_which_validation_is_wanted(tiny: Any, traced: Any, clock: Clock) -> None:
    trace = traced(tiny(train=4), val_check_interval="3s", check_val_every_n_epoch=2, max_epochs=4, plugins=[clock])
    assert trace.validated == [5, 8, 13, 16]  # overdue since the epoch before, then three batches later


def test_a_time_works_over_epochs_and_without_a_length(tiny: Any, traced: Any, clock: Clock) -> None:
    trace = traced(
        tiny(), DataLoader(Stream(8, None), batch_size=2), val_check_interval="3s", check_val_every_n_epoch=None, max_epochs=2,
        plugins=[clock],
    )  # fmt: skip
    assert trace.validated == [3, 6]


@pytest.mark.parametrize(("every", "expected"), [(1, [4, 8, 12, 16, 20]), (2, [8, 16]), (5, [20]), (6, [])])
def test_check_val_every_n_epoch(every: int, expected: list[int], tiny: Any, traced: Any) -> None:
    assert traced(tiny(train=4), check_val_every_n_epoch=every, max_epochs=5).validated == expected


def test_both_intervals_hold_together(tiny: Any, traced: Any) -> None:
    assert traced(tiny(train=4), check_val_every_n_epoch=2, val_check_interval=2, max_epochs=4).validated == [6, 8, 14, 16]


def test_an_interval_longer_than_the_epoch_is_an_error_with_the_way_out(tiny: Any, trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"val_check_interval=5 is more than the 4 training batches.*check_val_every_n_epoch=None"):
        trainer(val_check_interval=5).fit(tiny(train=4))


def test_a_fraction_of_an_epoch_of_unknown_length_is_an_error(tiny: Any, trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"val_check_interval=0.5 is a fraction, but the length of the training loader is not known"):
        trainer(val_check_interval=0.5).fit(tiny(), DataLoader(Stream(8, 8), batch_size=2))


def test_without_epochs_a_fraction_is_an_error(tiny: Any, trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"check_val_every_n_epoch=None, val_check_interval must be a number of batches or a time"):
        trainer(check_val_every_n_epoch=None).fit(tiny())


def test_a_number_of_batches_works_without_a_length(tiny: Any, traced: Any) -> None:
    assert traced(tiny(), DataLoader(Stream(10, None), batch_size=2), val_check_interval=2, max_epochs=2).validated == [2, 4, 7, 9]


# ---------------------------------------------------------------------- when training ends


@pytest.mark.parametrize(
    ("options", "batches", "epochs"),
    [
        ({"max_epochs": 3}, 12, 3),
        ({"max_steps": 3}, 3, 0),
        ({"max_steps": 4}, 4, 1),
        ({"max_steps": 6}, 6, 1),
        ({"max_steps": 100, "max_epochs": 2}, 8, 2),
        ({"max_steps": 6, "max_epochs": 9}, 6, 1),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, 6, 1),
        ({"max_steps": 3, "accumulate_grad_batches": 3}, 7, 1),
    ],
    ids=str,
)
def test_training_ends_after_max_epochs_or_max_steps_whichever_comes_first(
    options: Any, batches: int, epochs: int, tiny: Any, trainer: Any
) -> None:
    trace = Trace()
    made = trainer(plugins=[trace], **options)
    made.fit(tiny(train=4))
    assert (trace.batches, made.run.position.epoch, len(trace.ended)) == (batches, epochs, epochs)
    assert trace.status == "finished"


def test_max_steps_at_the_end_of_an_epoch_completes_the_epoch(tiny: Any, traced: Any) -> None:
    trace = traced(tiny(train=4), max_steps=4)
    assert (trace.epochs, trace.validated, trace.ended) == ([[0, 1, 2, 3]], [4], [4])


@pytest.mark.parametrize("limit", ["5s", timedelta(seconds=5), {"seconds": 5}, "00:00:00:05"], ids=repr)
def test_max_time_ends_training_after_the_step_that_is_running(limit: Any, tiny: Any, trainer: Any, clock: Clock) -> None:
    trace = Trace()
    made = trainer(max_time=limit, plugins=[trace, clock])
    made.fit(tiny(train=3))
    assert trace.epochs == [[0, 1, 2], [0, 1]]
    assert (trace.status, made.run.position.step) == ("stopped", 5)
    assert "max_time" in made.run.stop_reason


def test_max_time_finishes_the_accumulation_window(tiny: Any, traced: Any, clock: Clock) -> None:
    assert traced(tiny(train=9), max_time="4s", accumulate_grad_batches=3, plugins=[clock]).batches == 6


def test_max_time_waits_for_min_epochs(tiny: Any, traced: Any, clock: Clock) -> None:
    assert traced(tiny(train=3), max_time="2s", min_epochs=2, plugins=[clock]).epochs == [[0, 1, 2]] * 2


class Stopper:
    """Asks to stop after a number of batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        self.left -= 1
        if self.left == 0:
            run.request_stop("enough")


def test_a_stop_asked_for_in_mid_epoch_ends_training_after_the_step(tiny: Any, trainer: Any) -> None:
    trace = Trace()
    made = trainer(max_epochs=5, plugins=[trace, Stopper(6)])
    made.fit(tiny(train=4))
    assert trace.epochs == [[0, 1, 2, 3], [0, 1]]
    assert (trace.ended, trace.validated) == ([4], [4])  # the epoch that was broken off has no end and no validation
    assert (made.run.position.epoch, made.run.position.batch, made.run.position.step) == (1, 2, 6)
    assert (trace.status, made.run.stop_reason) == ("stopped", "enough")


def test_a_stop_waits_for_the_end_of_the_accumulation_window(tiny: Any, trainer: Any) -> None:
    trace = Trace()
    made = trainer(accumulate_grad_batches=3, plugins=[trace, Stopper(4)])
    made.fit(tiny(train=9))
    assert (trace.batches, made.run.position.step) == (6, 2)


@pytest.mark.parametrize(("options", "batches"), [({"min_epochs": 2}, 8), ({"min_steps": 3}, 3), ({"min_epochs": 1, "min_steps": 7}, 7)])
def test_a_stop_waits_for_min_epochs_and_min_steps(options: Any, batches: int, tiny: Any, traced: Any, caplog: Any) -> None:
    assert traced(tiny(train=4), max_epochs=5, plugins=[Stopper(1)], **options).batches == batches
    assert sum("enough" in line and "min_epochs" in line for line in caplog.messages) == 1


def test_a_stop_asked_for_in_validation_at_the_end_of_an_epoch_completes_the_epoch(tiny: Any, traced: Any) -> None:
    class AfterValidation:
        @hookimpl
        def on_validation_end(self, run: Any) -> None:
            run.request_stop("good enough")

    trace = traced(tiny(train=4), max_epochs=5, plugins=[AfterValidation()])
    assert (trace.batches, trace.ended, trace.status) == (4, [4], "stopped")


def test_a_module_can_ask_for_a_stop(tiny: Any, trainer: Any) -> None:
    class Stops(tiny.Module):
        def on_train_batch_end(self, run: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.run.request_stop("the module said so")

    made = trainer(max_epochs=3)
    made.fit(Stops(train=4))
    assert (made.run.position.step, made.run.stop_reason) == (2, "the module said so")


def test_a_second_fit_starts_from_the_beginning(tiny: Any, trainer: Any) -> None:
    made, module = trainer(max_steps=3), tiny(train=4)
    made.fit(module)
    first = made.run
    made.fit(module)
    assert made.run is not first
    assert (made.run.position.step, first.position.step) == (3, 3)


# ---------------------------------------------------------------------- fast_dev_run


@pytest.mark.parametrize(("value", "batches"), [(True, 1), (1, 1), (3, 3)])
def test_fast_dev_run_tries_everything_and_leaves_nothing_on_disk(
    value: Any, batches: int, tiny: Any, trainer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    class Writer:
        @hookimpl
        def on_train_end(self, run: Any) -> None:
            (run.dir / "weights").write_text("x")
            self.path = run.save_checkpoint(run.dir / "a.safetensors")

        @hookimpl
        def on_fit_end(self) -> None:
            assert self.path.exists()

    trace, writer, module = Trace(), Writer(), tiny(train=8, val=8, test=8)
    made = trainer(fast_dev_run=value, max_epochs=7, max_steps=100, plugins=[trace, writer], root_dir=tmp_path / "runs")
    made.fit(module)
    assert (trace.epochs, trace.val_batches) == ([list(range(batches))], [(0, i) for i in range(batches)])
    made.test(module)
    assert not writer.path.exists()
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "runs").exists()


def test_fast_dev_run_leaves_nothing_on_disk_after_an_error(tiny: Any, trainer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    class Broken(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        trainer(fast_dev_run=True).fit(Broken())
    assert list(temporary.iterdir()) == []


def test_fast_dev_run_does_not_change_the_trainer(tiny: Any, trainer: Any) -> None:
    made = trainer(fast_dev_run=True, max_epochs=7, limit_val_batches=0.5)
    made.fit(tiny())
    assert (made.max_epochs, made.limit_val_batches) == (7, 0.5)


# ---------------------------------------------------------------------- the sanity check


class Accuracy:
    """A metric object as torchmetrics has them."""

    def __init__(self) -> None:
        self.reset()

    def update(self, value: float) -> None:
        self.values.append(value)

    def compute(self) -> float:
        return float(sum(self.values))

    def reset(self) -> None:
        self.values: list[float] = []


@pytest.mark.parametrize(("wanted", "batches"), [(0, 0), (2, 2), (-1, 3), (9, 3)])
def test_the_sanity_check_tries_as_many_batches_as_it_is_told(wanted: int, batches: int, tiny: Any, trainer: Any, loader: Any) -> None:
    class Counting(tiny.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages: list[str] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.stages.append(self.run.position.stage)

    module = Counting()
    trainer(num_sanity_val_steps=wanted).fit(module, loader(1), loader(3))
    assert module.stages == ["sanity"] * batches + ["validate"] * 3


def test_the_sanity_check_goes_through_every_loader(tiny: Any, trainer: Any, loader: Any) -> None:
    class Counting(tiny.Module):
        seen: list[tuple[int, int]]

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            if self.run.position.stage == "sanity":
                self.seen.append((dataloader_idx, batch_idx))

    module = Counting()
    module.seen = []
    trainer(num_sanity_val_steps=2).fit(module, loader(1), [loader(3), loader(1)])
    assert module.seen == [(0, 0), (0, 1), (1, 0)]


def _shuffled(loader: Any, generator: torch.Generator | None, how: str) -> Any:
    data = loader(4).dataset
    if how == "sampler":
        return DataLoader(data, batch_size=2, sampler=RandomSampler(data, generator=generator))
    if how == "batch sampler":
        return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=generator), 2, False))
    return DataLoader(data, batch_size=2, shuffle=True, generator=generator)


@pytest.mark.parametrize("how", ["loader", "sampler", "batch sampler"])
@pytest.mark.parametrize("wanted", [2, -1])
def test_the_sanity_check_leaves_generators_as_they_were(how: str, wanted: int, tiny: Any, trainer: Any, loader: Any) -> None:
    """Python's, NumPy's and torch's generators, and those of the validation loaders: run with and without are the same."""
    import numpy

    class Drawing(tiny.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drawn: list[Any] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.drawn.append((batch[0].tolist(), random.random(), numpy.random.rand(), torch.rand(1).item()))

        def on_train_start(self) -> None:
            self.before = generator_state()
            self.drawn.clear()

    runs = []
    for steps in (0, wanted):
        random.seed(1)
        numpy.random.seed(2)
        torch.manual_seed(3)
        own = torch.Generator().manual_seed(4)
        module = Drawing()
        trainer(num_sanity_val_steps=steps, max_epochs=2).fit(module, loader(2, shuffle=True), _shuffled(loader, own, how))
        runs.append((module, own.get_state()))
    (plain, own_plain), (checked, own_checked) = runs
    assert plain.before["python"] == checked.before["python"]
    assert plain.before["numpy"] == checked.before["numpy"]
    assert torch.equal(plain.before["torch"], checked.before["torch"])
    assert plain.drawn == checked.drawn
    assert torch.equal(own_plain, own_checked)
    assert torch.equal(plain.layer.weight, checked.layer.weight)


def test_the_sanity_check_leaves_no_metric_and_hands_nothing_to_loggers(tiny: Any, trainer: Any) -> None:
    class Logging(tiny.Module):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy, self.on_steps = Accuracy(), Accuracy()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.accuracy.update(1.0)
            self.on_steps.update(1.0)
            self.log("accuracy", self.accuracy)
            self.log("on_steps", self.on_steps, on_step=True, on_epoch=False)
            self.log("val_loss", 1.0, on_step=True, on_epoch=True)

        def on_validation_epoch_end(self) -> None:
            self.log("extra", 3.0)

    class Looking:
        @hookimpl
        def on_sanity_end(self, run: Any) -> None:
            self.after = dict(run.metrics.results())
            self.fresh = run.metrics.fresh("val_loss")
            self.counts = (run.position.step, run.position.samples, run.position.batch)

        @hookimpl
        def on_train_start(self, run: Any) -> None:
            self.values = run.module.accuracy.values + run.module.on_steps.values

    looking, trace = Looking(), Trace()
    made = trainer(num_sanity_val_steps=2, plugins=[looking, trace], log_every_n_steps=1)
    made.fit(Logging())
    assert (looking.after, looking.fresh, looking.counts, looking.values) == ({}, None, (0, 0, 0), [])
    assert [step for stage, step, _ in trace.records if stage != "train"] == [4, 4, 4]
    assert made.metrics["accuracy"] == 2.0  # of the real validation's batches alone


def test_validation_events_of_the_sanity_check_reach_the_module_and_no_plugin(tiny: Any, trainer: Any) -> None:
    class Told(tiny.Module):
        told = 0

        def on_validation_start(self) -> None:
            self.told += 1

    trace, module = Trace(), Told()
    trainer(num_sanity_val_steps=2, plugins=[trace]).fit(module)
    assert (module.told, len(trace.validated)) == (2, 1)


# ---------------------------------------------------------------------- which steps are recorded


@pytest.mark.parametrize(("every", "steps"), [(1, list(range(1, 11))), (3, [3, 6, 9, 10]), (5, [5, 10]), (10, [10]), (50, [10])], ids=str)
def test_step_values_are_recorded_every_n_steps_and_at_the_last(every: int, steps: list[int], tiny: Any, traced: Any) -> None:
    trace = traced(tiny(train=5), log_every_n_steps=every, max_epochs=2, limit_val_batches=0)
    assert [step for _, step, _ in trace.records] == steps
    assert all(set(metrics) == {"train_loss"} for _, _, metrics in trace.records)


def test_log_every_n_steps_counts_optimizer_steps_not_batches(tiny: Any, traced: Any) -> None:
    trace = traced(tiny(train=8), log_every_n_steps=2, accumulate_grad_batches=2, limit_val_batches=0)
    assert [step for _, step, _ in trace.records] == [2, 4]


def test_the_last_step_is_recorded_when_training_is_broken_off(tiny: Any, traced: Any) -> None:
    trace = traced(tiny(train=8), log_every_n_steps=3, max_steps=5, limit_val_batches=0)
    assert [step for _, step, _ in trace.records] == [3, 5]


def test_the_value_recorded_is_that_of_the_step(tiny: Any, traced: Any) -> None:
    class Numbered(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("number", batch_idx)
            return self.loss(batch)

    trace = traced(Numbered(train=8), log_every_n_steps=3, limit_val_batches=0)
    assert [(step, metrics["number"]) for _, step, metrics in trace.records] == [(3, 2.0), (6, 5.0), (8, 7.0)]


# ---------------------------------------------------------------------- modes and gradients


def test_submodules_are_in_eval_mode_in_validation_and_afterwards_in_the_mode_they_were_in(tiny: Any, trainer: Any) -> None:
    class Frozen(tiny.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.dropout = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()), nn.Dropout()
            self.frozen.eval()
            self.modes: dict[str, set[Any]] = {"train": set(), "sanity": set(), "validate": set()}

        def note(self) -> None:
            self.modes[self.run.position.stage].add((self.training, self.frozen.training, self.frozen[0].training, self.dropout.training))
            assert torch.is_grad_enabled() == (self.run.position.stage == "train")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.note()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.note()

    module = Frozen()
    trainer(num_sanity_val_steps=1, val_check_interval=2, max_epochs=2).fit(module)
    assert module.modes["train"] == {(True, False, False, True)}
    assert module.modes["sanity"] == module.modes["validate"] == {(False,) * 4}


@pytest.mark.parametrize("work", ["fit", "validate", "test", "predict"])
def test_modes_are_restored_after_an_error_in_an_evaluation(work: str, tiny: Any, trainer: Any) -> None:
    class Broken(tiny.Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("boom")

        test_step = predict_step = validation_step

    module = Broken()
    module.layer.eval()
    with pytest.raises(RuntimeError, match="boom"):
        getattr(trainer(), work)(module)
    assert (module.training, module.layer.training, torch.is_grad_enabled()) == (True, False, True)


def test_gradients_are_there_after_the_update_and_gone_before_the_batch_ends(tiny: Any, trainer: Any) -> None:
    class Looking:
        def __init__(self) -> None:
            self.seen: list[tuple[str, bool]] = []

        def note(self, where: str, run: Any) -> None:
            self.seen.append((where, all(p.grad is not None for p in run.module.parameters())))

        @hookimpl
        def on_after_optimizer_step(self, run: Any) -> None:
            self.note("after step", run)

        @hookimpl
        def scheduler_step(self, run: Any) -> None:
            self.note("scheduler", run)

        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            self.note("end", run)

    class Scheduled(tiny.Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

    looking = Looking()
    trainer(plugins=[looking], accumulate_grad_batches=2).fit(Scheduled(train=4))
    window = [("end", True), ("after step", True), ("scheduler", False), ("end", False)]
    assert looking.seen == window * 2


# ---------------------------------------------------------------------- where a run stands


def test_positions_of_an_ordinary_run(tiny: Any, trainer: Any) -> None:
    class Positions:
        def __init__(self) -> None:
            self.seen: list[tuple[int, ...]] = []

        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            p = run.position
            self.seen.append((p.epoch, p.batch, p.step, p.micro_step, p.samples, run.is_last_batch))

    positions = Positions()
    made = trainer(plugins=[positions], max_epochs=2, accumulate_grad_batches=2)
    made.fit(tiny(train=3, batch_size=5))
    assert positions.seen == [
        (0, 1, 0, 1, 5, False), (0, 2, 1, 2, 10, False), (0, 3, 2, 3, 15, True),
        (1, 1, 2, 4, 20, False), (1, 2, 3, 5, 25, False), (1, 3, 4, 6, 30, True),
    ]  # fmt: skip
    assert (made.run.position.stage, made.run.position.epoch) == ("", 2)


def test_a_last_batch_that_is_smaller_counts_its_own_samples(tiny: Any, trainer: Any, loader: Any) -> None:
    made = trainer()
    made.fit(tiny(val=0), DataLoader(loader(5).dataset, batch_size=4))
    assert (made.run.position.samples, made.run.position.step) == (10, 3)


@pytest.fixture
def players(tiny: Any) -> Any:
    """A class of modules with two optimizers."""

    class Players(tiny.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__(val=0, **options)
            self.other = nn.Linear(4, 1)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.layer.parameters(), lr=0.01), torch.optim.SGD(self.other.parameters(), lr=0.01)]

        def loss_for(self, batch: Any, which: int) -> Tensor:
            return nn.functional.mse_loss((self.layer, self.other)[which](batch[0]), batch[1])

    return Players


def test_two_optimizers_count_one_step_for_each_batch_and_steps_of_their_own(players: Any, trainer: Any) -> None:
    class Automatic(players):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Tensor:
            return self.loss_for(batch, optimizer_idx)

    made = trainer(max_epochs=2, accumulate_grad_batches=2)
    made.fit(Automatic(train=5))
    assert (made.run.position.step, made.run.position.micro_step, made.run.optimizer_steps) == (6, 10, [6, 6])


def test_an_optimizer_whose_step_is_skipped_is_not_counted(players: Any, trainer: Any, make_recorder: Any) -> None:
    class EverySecond(players):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Tensor | None:
            return None if optimizer_idx == 1 and batch_idx % 2 else self.loss_for(batch, optimizer_idx)

    skips = make_recorder("on_step_skipped")
    made = trainer(plugins=[skips])
    made.fit(EverySecond(train=6))
    assert (made.run.position.step, made.run.optimizer_steps, len(skips.calls)) == (6, [6, 3], 3)


def test_in_manual_optimization_a_batch_counts_once_and_every_optimizer_its_own_steps(players: Any, trainer: Any) -> None:
    class OneToTwo(players):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for which in (0, 1, 1):
                optimizer = self.optimizers()[which]
                self.manual_backward(self.loss_for(batch, which))
                optimizer.step()
                optimizer.zero_grad()

    made = trainer(max_steps=10)
    made.fit(OneToTwo(train=8))
    assert (made.run.position.step, made.run.optimizer_steps) == (10, [10, 20])


def test_manual_optimization_can_be_chosen_when_the_module_is_made(players: Any, trainer: Any) -> None:
    class Chosen(players):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss_for(batch, 0))
            self.optimizers()[0].step()
            self.optimizers()[0].zero_grad()

    made = trainer()
    made.fit(Chosen())
    assert made.run.optimizer_steps == [4, 0]


def test_in_manual_optimization_a_batch_without_a_step_counts_none(players: Any, trainer: Any) -> None:
    class EveryThird(players):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss_for(batch, 0) / 3)
            if batch_idx % 3 == 2:
                self.optimizers()[0].step()
                self.optimizers()[0].zero_grad()

    made = trainer(max_epochs=1)
    made.fit(EveryThird(train=8))
    assert (made.run.position.step, made.run.position.micro_step, made.run.optimizer_steps) == (2, 8, [2, 0])


def test_in_manual_optimization_schedulers_step_when_the_module_steps_them(players: Any, trainer: Any) -> None:
    class Manual(players):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss_for(batch, 0))
            self.optimizers().step()
            self.optimizers().zero_grad()

        def on_train_epoch_end(self) -> None:
            self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            self.own = torch.optim.SGD(self.layer.parameters(), lr=1.0)
            return [self.own], [torch.optim.lr_scheduler.ExponentialLR(self.own, 0.5)]

    module = Manual()
    trainer(max_epochs=3).fit(module)
    assert module.own.param_groups[0]["lr"] == 0.125


def test_in_manual_optimization_gradients_stay_until_the_module_clears_them(players: Any, trainer: Any) -> None:
    class Keeping(players):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer, _ = self.optimizers()
            self.manual_backward(self.loss_for(batch, 0))
            optimizer.step()
            assert all(p.grad is not None for p in self.layer.parameters())
            optimizer.zero_grad()
            assert all(p.grad is None for p in self.layer.parameters())

    trainer().fit(Keeping())


def test_manual_steps_are_announced_like_any_other(players: Any, trainer: Any, make_recorder: Any) -> None:
    class Manual(players):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            optimizer, _ = self.optimizers()
            optimizer.zero_grad()
            loss = self.loss_for(batch, 0)
            self.manual_backward(loss)
            optimizer.step()
            return loss

    hooks = ("on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step", "clip_gradients", "optimizer_step",
             "on_after_optimizer_step", "on_train_batch_end")  # fmt: skip
    recorder = make_recorder(*hooks)
    trainer(plugins=[recorder], gradient_clip_val=1.0).fit(Manual(train=2))
    assert recorder.names == list(hooks) * 2
    assert recorder.calls[-1][1]["outputs"] == "Tensor"


# ---------------------------------------------------------------------- schedulers


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """Remembers what it was given."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, patience=0, factor=0.5)
        self.given: list[float] = []

    def step(self, metrics: Any, epoch: Any = None) -> None:
        self.given.append(float(metrics))
        super().step(metrics)


@pytest.fixture
def plateau(tiny: Any) -> Any:
    """A class of modules that log a value chosen by the test and follow one with a plateau scheduler."""

    class WithPlateau(tiny.Module):
        def __init__(self, monitor: str = "val_loss", interval: str = "epoch", **options: Any) -> None:
            super().__init__(**options)
            self.monitor, self.interval = monitor, interval
            self.values: list[float] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 10.0 - self.global_step)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train_loss", 100.0 * (self.current_epoch + 1), on_epoch=True)
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            self.plateau = Plateau(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": self.plateau, "monitor": self.monitor, "interval": self.interval},
            }

    return WithPlateau


def test_a_plateau_scheduler_sees_the_value_of_the_epoch_that_just_ended(plateau: Any, trainer: Any) -> None:
    module = plateau(train=2)
    trainer(max_epochs=3).fit(module)
    assert module.plateau.given == [8.0, 6.0, 4.0]


def test_a_plateau_scheduler_sees_the_training_mean_of_the_epoch_that_just_ended(plateau: Any, trainer: Any) -> None:
    module = plateau("train_loss", train=2)
    trainer(max_epochs=3).fit(module)
    assert module.plateau.given == [100.0, 200.0, 300.0]


def test_a_plateau_scheduler_waits_where_there_is_no_fresh_value(plateau: Any, trainer: Any, make_recorder: Any) -> None:
    module, stepped = plateau(train=2), make_recorder("on_scheduler_step")
    trainer(max_epochs=5, check_val_every_n_epoch=2, plugins=[stepped]).fit(module)
    assert module.plateau.given == [6.0, 2.0]
    assert len(stepped.calls) == 2


def test_a_plateau_scheduler_per_step_takes_each_value_once(plateau: Any, trainer: Any) -> None:
    module = plateau(interval="step", train=6)
    trainer(max_epochs=1, val_check_interval=2).fit(module)
    assert module.plateau.given == [8.0, 6.0]  # the last validation comes after the last step


def test_the_sanity_check_is_nothing_that_a_plateau_scheduler_steps_on(plateau: Any, trainer: Any) -> None:
    module = plateau(train=2)
    trainer(max_epochs=2, num_sanity_val_steps=2, check_val_every_n_epoch=2).fit(module)
    assert module.plateau.given == [6.0]


@pytest.mark.parametrize(
    ("interval", "frequency", "expected"),
    [
        ("epoch", 1, [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]),
        ("epoch", 2, [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]),
        ("step", 1, [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        ("step", 4, [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]),
    ],
)
def test_schedulers_step_at_their_interval_and_frequency(interval: str, frequency: int, expected: Any, tiny: Any, trainer: Any) -> None:
    class Scheduled(tiny.Module):
        def __init__(self) -> None:
            super().__init__(train=2)
            self.rates: list[float] = []

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.rates.append(optimizer.param_groups[0]["lr"])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch) * 1e-3

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": interval, "frequency": frequency}]

    module = Scheduled()
    trainer(max_epochs=3).fit(module)
    assert module.rates == expected


def test_schedulers_step_after_validation_and_before_the_end_of_the_epoch(plateau: Any, trainer: Any, make_recorder: Any) -> None:
    recorder = make_recorder("on_validation_end", "scheduler_step", "on_scheduler_step", "on_train_epoch_end")
    trainer(plugins=[recorder]).fit(plateau())
    assert recorder.names == ["on_validation_end", "scheduler_step", "on_scheduler_step", "on_train_epoch_end"]


# ---------------------------------------------------------------------- what is global


def _flags() -> tuple[Any, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.is_anomaly_enabled(),
    )


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    ("options", "inside"),
    [
        ({"deterministic": True}, (True, False, False, False)),
        ({"deterministic": "warn"}, (True, True, False, False)),
        ({"benchmark": True}, (False, False, True, False)),
        ({"benchmark": False}, (False, False, False, False)),
        ({"detect_anomaly": True}, (False, False, False, True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("fails", [False, True])
def test_global_switches_of_torch_hold_during_the_run_and_are_put_back(
    options: Any, inside: Any, fails: bool, tiny: Any, trainer: Any
) -> None:
    class Looking(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.flags = _flags()
            if fails:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    before, module = _flags(), Looking()
    try:
        trainer(**options).fit(module)
    except RuntimeError as error:
        assert "boom" in str(error)
    assert module.flags == inside
    assert _flags() == before == (False, False, False, False)


@pytest.mark.parametrize("before", [True, False])
def test_switches_that_the_user_set_stay_set(before: bool, tiny: Any, trainer: Any) -> None:
    torch.use_deterministic_algorithms(before, warn_only=before)
    torch.backends.cudnn.benchmark = before
    try:
        flags = _flags()
        trainer().fit(tiny())
        trainer(deterministic=True, benchmark=not before).fit(tiny())
        assert _flags() == flags
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_runs_with_the_same_seed_are_equal_and_runs_with_another_are_not(tiny: Any, trainer: Any, loader: Any) -> None:
    import numpy

    class Drawing(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.drawn.append((batch[0].tolist(), random.random(), numpy.random.rand(), torch.rand(1).item()))
            return super().training_step(batch, batch_idx)

    drawn = []
    for seed in (5, 5, 6):
        torch.rand(len(drawn))  # whatever was drawn before does not matter
        module = Drawing()
        module.drawn = []
        trainer(seed=seed).fit(module, loader(4, shuffle=True))
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_a_run_ends_with_finished_stopped_interrupted_or_failed(tiny: Any, trainer: Any) -> None:
    class Ends(tiny.Module):
        error: type[BaseException] | None = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.error:
                raise self.error
            return super().training_step(batch, batch_idx)

    statuses = []
    for error in (None, KeyboardInterrupt, ZeroDivisionError):
        trace, module = Trace(), Ends()
        module.error = error
        if error:
            with pytest.raises(error):
                trainer(plugins=[trace]).fit(module)
        else:
            trainer(plugins=[trace]).fit(module)
        statuses.append(trace.status)
    trace = Trace()
    trainer(plugins=[trace, Stopper(1)]).fit(Ends())
    assert [*statuses, trace.status] == ["finished", "interrupted", "failed", "stopped"]


def test_a_module_is_out_of_the_run_afterwards_also_after_an_error(tiny: Any, trainer: Any) -> None:
    class Broken(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("boom")

    module = Broken()
    with pytest.raises(RuntimeError, match="boom"):
        trainer().fit(module)
    with pytest.raises(RuntimeError, match=r"Broken is not in a run.*inside of trainer.fit"):
        _ = module.run
    assert (module.current_epoch, module.global_step) == (0, 0)
