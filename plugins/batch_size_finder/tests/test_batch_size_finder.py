"""What the batch-size finder promises: the size passed, twice; everything else is as it was before."""

from __future__ import annotations

import copy
import dataclasses
import errno
import gc
import logging
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from torchplug import DataModule, Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug.trials import out_of_memory, rebatched
from torchplug_batch_size_finder import BatchSizeFinder, _divisor, confirm, scale_batch_size, search


@pytest.fixture(autouse=True)
def _little_to_collect(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A search begins by collecting garbage, and by counting what is frozen; both take long with all that pytest and torch have loaded."""
    gc.freeze()
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 1)
    yield
    gc.unfreeze()


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def oom() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


class Samples(Dataset):
    """Samples with noise from every generator."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        x = torch.full((3,), index / self.length) + torch.rand(3) + random.random() + float(np.random.rand())
        return x, x.sum(0, keepdim=True)


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise oom()


class Adam(torch.optim.Adam):
    """Runs out of memory where its state is made, if it is told to."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails and not self.state:
            raise oom()
        return super().step(closure)


class Net(Module):
    """Runs out of memory above ``capacity`` samples, at ``place``; with everything that a step changes."""

    def __init__(self, samples: int = 40, capacity: float = math.inf, place: str = "forward", batch_size: Any = 4) -> None:
        super().__init__()
        self.samples, self.capacity, self.place, self.batch_size = samples, capacity, place, batch_size
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.2), nn.Linear(4, 1))
        self.count, self.sizes, self.validated = 0, [], []

    def train_dataloader(self) -> Any:
        self.data = Samples(self.samples)
        return DataLoader(self.data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Samples(self.samples), self.batch_size)

    def full(self, place: str, size: int) -> bool:
        return self.place == place and size > self.capacity

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        self.count += 1
        self.sizes.append(len(x))
        out = self.layers(x) if len(x) > 1 else self.layers[3](self.layers[0](x))
        if self.full("forward", len(x)):
            raise oom()
        if self.full("backward", len(x)):
            out = FailsInBackward.apply(out)
        self.optimizer.fails = self.full("optimizer", len(x))
        if self.place == "state" and self.optimizer.state and len(x) > self.capacity:
            raise oom()  # only where the state of the optimizer takes its part of the memory
        loss = nn.functional.mse_loss(out, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.validated.append(len(batch[0]))
        if self.full("validation", len(batch[0])):
            raise oom()
        self.log("val_loss", nn.functional.mse_loss(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        self.optimizer = Adam(self.parameters(), lr=0.01)
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(self.optimizer, 2), "interval": "step"},
        }


class Data(DataModule):
    """The same as a data module."""

    def __init__(self, samples: int = 40, batch_size: int = 4) -> None:
        super().__init__()
        self.samples, self.batch_size, self.asked = samples, batch_size, [0]

    def train_dataloader(self) -> Any:
        self.asked[0] += 1
        self.train_set = Samples(self.samples)
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Samples(self.samples), self.batch_size)


def trainer(path: Path, *plugins: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "num_sanity_val_steps": 1, "log_every_n_steps": 1}
    return Trainer(root_dir=path, plugins=list(plugins), **{**defaults, **options})


def seeded() -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def everything(module: Net, *others: Any) -> list[Any]:
    """What must be the same before and after; `others` are objects with attributes."""
    generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    weights = plain(module.state_dict()), [plain(p.grad) for p in module.parameters()], [m.training for m in module.modules()]
    attributes = [
        {n: copy.deepcopy(v) for n, v in vars(o).items() if type(v) in (int, float, str, list, bool, dict)} for o in (module, *others)
    ]
    names = [sorted(vars(each)) for each in (module, *others)]
    for each in attributes:
        for name in ("_modules", "_parameters", "_buffers", "plugins", "_members"):
            each.pop(name, None)
    return [generators, weights, attributes, names, plain(dict(module.hparams))]


def outcome(trained: Trainer, module: Module) -> list[Any]:
    """Everything that a fit comes to."""
    run = trained.run
    assert run is not None
    states = [plain(optimizer.state_dict()) for optimizer in run.optimizers], [plain(s.scheduler.state_dict()) for s in run.schedulers]
    numbers = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    attributes = [getattr(module, name, None) for name in ("count", "sizes", "validated")]
    return [plain(module.state_dict()), states, numbers, dict(trained.metrics), dataclasses.asdict(run.position), attributes]


# ---------------------------------------------------------------------- the search


def reachable(mode: str, init: int, limit: int) -> set[int]:
    if mode == "binary":
        return set(range(1, limit + 1))
    sizes, size = set(), min(init, limit)
    while size:
        sizes.add(size)
        size //= 2
    size = min(init, limit)
    while size <= limit:
        sizes.add(size)
        size *= 2
    return {size for size in sizes if size <= limit}


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("batch_size_finder", max=2)


@pytest.mark.parametrize("mode", ["power", "binary"])
@pytest.mark.parametrize("init", [2, *map(slow, (1, 7, 64, 500))])
def test_for_every_capacity_and_every_length_up_to_300_the_largest_size_is_found_in_few_trials(mode: str, init: int) -> None:
    for limit in range(1, 301):
        there = sorted(reachable(mode, init, limit))
        bound = math.log2(max(limit, init)) * (2 if mode == "binary" else 1) + 3
        for capacity in range(301):
            tried: list[int] = []

            def fits(size: int, tried: list[int] = tried, capacity: int = capacity) -> bool:
                tried.append(size)
                return size <= capacity

            found = search(fits, mode, init, limit)
            assert found == [0, *there][bisect_right(there, capacity)], (limit, capacity)
            assert not found or found in tried
            assert len(tried) <= bound and len(set(tried)) == len(tried), (limit, capacity, tried)
            assert all(1 <= size <= limit for size in tried)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["power", "binary"]), st.integers(1, 100), st.integers(1, 2**40))
def test_it_ends_whatever_the_trials_say(data: Any, mode: str, init: int, limit: int) -> None:
    tried: list[tuple[int, bool]] = []

    def fits(size: int) -> bool:
        tried.append((size, data.draw(st.booleans())))
        return tried[-1][1]

    found = search(fits, mode, init, limit)
    assert len(tried) <= 2 * math.log2(max(limit, init)) + 3
    assert (found, True) in tried or not found


def test_a_size_that_does_not_pass_again_is_halved() -> None:
    assert confirm(lambda size: size <= 10, 64, lambda size: size) == 8
    assert confirm(lambda size: False, 64, lambda size: size) == 0
    assert confirm(lambda size: size <= 20, 60, lambda size: _divisor(96, size)) == 12  # 48, then 24, then 12
    assert [_divisor(96, size) for size in (1, 5, 50, 96, 200)] == [1, 4, 48, 96, 96]


# ---------------------------------------------------------------------- from end to end


CASES = [(1, 1), (2, 300), (17, 3)]
SLOW_CASES = ((40, 40), (3, 17), (300, 1), (64, 31), (100, 250), (299, 300), (300, 299), (1000, 300))
CASES += [pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_CASES]


@pytest.mark.parametrize("mode", ["power", "binary"])
@pytest.mark.parametrize(("capacity", "length"), CASES)
def test_the_size_is_the_largest_that_passes_and_was_tried(tmp_path: Path, mode: str, capacity: int, length: int) -> None:
    module = Net(length, capacity)
    found = scale_batch_size(trainer(tmp_path), module, mode=mode)
    assert found.size == module.batch_size == max(size for size in reachable(mode, 2, length) if size <= capacity)
    passed = [size for size, error in found.trials if not error]
    assert passed.count(found.size) == 2 and found.trials[-1] == (found.size, "")
    assert all("CUDA out of memory" in error for size, error in found.trials if size > capacity)
    assert len(found.trials) <= 2 * math.log2(length + 1) + 4


@pytest.mark.parametrize("place", [slow("forward"), "backward", "optimizer", slow("state"), "validation"])
@pytest.mark.parametrize("mode", [slow("power"), "binary"])
def test_memory_may_run_out_anywhere(tmp_path: Path, mode: str, place: str) -> None:
    module = Net(60, 21, place)
    assert scale_batch_size(trainer(tmp_path), module, mode=mode).size == (21 if mode == "binary" else 16)
    seeded()
    fitted, finder = Net(60, 21, place), BatchSizeFinder(mode=mode)
    trainer(tmp_path, finder, max_epochs=1).fit(fitted)
    assert finder.result is not None and finder.result.size == max(fitted.sizes) == (21 if mode == "binary" else 16)


def test_with_evaluate_false_validation_is_left_alone(tmp_path: Path) -> None:
    assert scale_batch_size(trainer(tmp_path), Net(60, 21, "validation"), mode="binary", evaluate=False).size == 60
    module, finder = Net(), BatchSizeFinder(mode="binary", max=20, evaluate=False)
    trainer(tmp_path, finder, max_epochs=1).fit(module, DataLoader(Samples(40), 4), DataLoader(Samples(40), 5))
    assert set(module.sizes) == {20} and set(module.validated) == {5}


def test_each_trial_trains_full_batches_while_the_optimizer_has_its_state(tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    class Looks(Net):
        def training_step(self, batch: Any) -> Any:
            seen.append((len(batch[0]), bool(self.optimizer.state)))
            return super().training_step(batch)

    found = scale_batch_size(trainer(tmp_path), Looks(50, 37), mode="binary", steps_per_trial=4)
    tried = [size for size, _ in found.trials]
    assert {size for size, _ in seen} == set(tried), "no batch is shorter, though 50 is no multiple"
    assert {size for size, state in seen if state} == {size for size, error in found.trials if not error}
    assert len(seen) == sum(1 if error else 4 for _, error in found.trials)


def test_a_margin_takes_a_fraction_off_and_the_smaller_size_is_confirmed(tmp_path: Path) -> None:
    found = scale_batch_size(trainer(tmp_path), Net(200, 100), mode="binary", margin=0.1)
    assert found.size == 90 and found.trials[-1] == (90, "") and (100, "") in found.trials
    assert scale_batch_size(trainer(tmp_path), Net(200, 1), margin=0.9).size == 1


def test_a_size_that_passed_by_luck_is_not_returned(tmp_path: Path) -> None:
    class Lucky(Net):
        trials = 0

        def on_train_batch_start(self, batch: Any) -> None:
            if len(batch[0]) == 32 and not self.optimizer.state:
                type(self).trials += 1  # trial by trial: an instance has it put back
                if type(self).trials > 1:
                    raise oom()

    assert scale_batch_size(trainer(tmp_path), Lucky(40)).size == 16


def test_where_not_even_one_sample_has_memory_the_error_says_so(tmp_path: Path) -> None:
    module, heard = Net(40, 0), []

    class Hears:
        @hookimpl
        def on_out_of_memory(self, exception: BaseException) -> None:
            heard.append(str(exception))

    words = "there is no batch size with enough memory: with 1 sample: CUDA out of memory. Tried to allocate 2.00 GiB."
    with pytest.raises(MemoryError, match=words):
        scale_batch_size(trainer(tmp_path), module)
    with pytest.raises(MemoryError, match=words):
        trainer(tmp_path, BatchSizeFinder(), Hears()).fit(module)
    assert module.batch_size == 4 and module.count == 0 and heard == [words]


def test_what_the_dataloader_methods_set_in_trials_is_put_back(tmp_path: Path) -> None:
    made: list[Any] = []

    class Keeps(Data):
        def train_dataloader(self) -> Any:
            loader = super().train_dataloader()
            made.append(self.train_set)
            return loader

    data = Keeps()
    with pytest.raises(MemoryError):
        trainer(tmp_path, BatchSizeFinder()).fit(Net(40, 0), datamodule=data)
    assert len(made) > 2 and data.train_set is made[0] and (data.batch_size, data.asked) == (4, [1])


@pytest.mark.parametrize("precision", [slow("bf16-mixed"), "16-mixed"])
@pytest.mark.parametrize("place", [slow("forward"), slow("backward"), "optimizer", "state"])
def test_mixed_precision(tmp_path: Path, precision: Any, place: str) -> None:
    module = Net(60, 21, place)
    found = scale_batch_size(trainer(tmp_path, precision=precision), module, mode="binary")
    assert found.size == 21
    finder = BatchSizeFinder(mode="binary")
    fitted = trainer(tmp_path, finder, precision=precision, max_epochs=8)  # the scaler skips some steps
    fitted.fit(Net(60, 21, place))
    assert finder.result is not None and finder.result.size == 21
    assert fitted.run is not None and fitted.run.position.step > 3


def test_a_scaler_that_skips_the_first_steps_is_waited_for(tmp_path: Path) -> None:
    class Huge(Net):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch) * 1000.0

    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # from now on torch announces each step of its subclasses twice
    # 65536 is too much for a loss of thousands: the state of the optimizer is there after some steps only
    assert scale_batch_size(trainer(tmp_path, precision="16-mixed"), Huge(60, 21, "state"), mode="binary").size == 21


def test_manual_optimization_and_several_optimizers(tmp_path: Path) -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__(60, 21)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.optimizer = self.optimizers()[0].optimizer
            loss = super().training_step(batch)
            self.manual_backward(loss)
            self.optimizers()[0].step()
            if batch_idx % 4 == 3:
                self.optimizers()[1].step()
                if self.optimizers()[1].optimizer.state and batch_idx > 4 and len(batch[0]) > 9:
                    raise oom()
            return loss

        def configure_optimizers(self) -> Any:
            return [Adam(self.layers[0].parameters()), torch.optim.Adam(self.layers[3].parameters())]

    assert scale_batch_size(trainer(tmp_path), Two(), mode="binary").size == 9, "the second one steps twice too"


def test_an_optimizer_that_never_steps_is_an_error(tmp_path: Path) -> None:
    class Never(Net):
        def training_step(self, batch: Any) -> Any:
            super().training_step(batch)

    with pytest.raises(RuntimeError, match="no optimizer step was taken in 33 steps with batches of 2"):
        scale_batch_size(trainer(tmp_path), Never())


# ---------------------------------------------------------------------- no trace


def keeping_hparams(net: type[Net] = Net, **options: Any) -> Net:
    class Keeps(net):  # type: ignore[valid-type,misc]
        def __init__(self, batch_size: int = 4) -> None:
            super().__init__(**options)
            del self.batch_size
            self.save_hyperparameters()

        @property
        def batch_size(self) -> int:
            return self.hparams["batch_size"]

        @batch_size.deleter
        def batch_size(self) -> None:
            pass

        @batch_size.setter
        def batch_size(self, value: int) -> None:
            self.__dict__["unused"] = value

    return Keeps()


EVENTS = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_after_optimizer_step",
          "on_before_zero_grad", "on_train_batch_end", "on_validation_start", "on_validation_end"]  # fmt: skip
PLACES = ["train_dataloader", "val_dataloader", "configure_optimizers", "data set", "sampler", "collate", "move_batch", "training_step",
          "end of training_step", "backward", "clip_gradients", "optimizer", "validation_step", *EVENTS]  # fmt: skip


class Fuse:
    """Raises when a place is reached for the n-th time, while it is on."""

    def __init__(self, place: str, after: int, on: bool = True) -> None:
        self.place, self.left, self.on = place, after, on

    def __call__(self, place: str) -> None:
        if self.on and place == self.place:
            self.left -= 1
            if self.left == 0:
                raise KeyError(f"on purpose in {place}")


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fuse: Fuse) -> torch.Tensor:
        ctx.fuse = fuse
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.fuse("backward")
        return gradient, None


class Fails(Net):
    """Can fail in every place that a trial comes to."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__(40, 21)
        self.fuse = fuse

    def train_dataloader(self) -> Any:
        self.fuse("train_dataloader")
        fuse = self.fuse

        class Shuffles(RandomSampler):
            def __iter__(self) -> Any:
                fuse("sampler")
                return super().__iter__()

        class Reads(Samples):
            def __getitem__(self, index: int) -> Any:
                fuse("data set")
                return super().__getitem__(index)

        def collate(samples: Any) -> Any:
            fuse("collate")
            return torch.utils.data.default_collate(samples)

        self.data = Reads(40)
        sampler = Shuffles(self.data, generator=torch.Generator().manual_seed(3))
        return DataLoader(self.data, self.batch_size, sampler=sampler, collate_fn=collate)

    def val_dataloader(self) -> Any:
        self.fuse("val_dataloader")
        return super().val_dataloader()

    def training_step(self, batch: Any) -> Any:
        self.fuse("training_step")
        loss = Breaks.apply(super().training_step(batch), self.fuse)
        self.fuse("end of training_step")
        return loss

    def validation_step(self, batch: Any) -> None:
        self.fuse("validation_step")
        super().validation_step(batch)

    def configure_optimizers(self) -> Any:
        self.fuse("configure_optimizers")
        answer, fuse = super().configure_optimizers(), self.fuse
        self.optimizer.register_step_pre_hook(lambda *_: fuse("optimizer"))
        return answer


def announced(event: str) -> Callable[[Any], None]:
    return lambda self: self.fuse(event)


for event in EVENTS:
    setattr(Fails, event, announced(event))


class TakesPart:
    """A plugin in the steps, with a state."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse, self.moved, self.sizes = fuse, 0, []

    @hookimpl
    def move_batch(self, batch: Any) -> None:
        self.fuse("move_batch")
        self.moved += 1
        self.sizes.append(len(batch[0]))

    @hookimpl
    def clip_gradients(self) -> None:
        self.fuse("clip_gradients")

    def state_dict(self) -> Any:
        return {"moved": self.moved, "sizes": list(self.sizes)}

    def load_state_dict(self, state: Any) -> None:
        self.moved, self.sizes = state["moved"], list(state["sizes"])


OFTEN = {"train_dataloader", "configure_optimizers", "sampler", "training_step", "clip_gradients", "optimizer", "validation_step"}


@pytest.mark.parametrize("after", [2, slow(6)])
@pytest.mark.parametrize("place", [each if each in OFTEN else slow(each) for each in PLACES])
def test_an_error_anywhere_leaves_no_trace(tmp_path: Path, place: str, after: int) -> None:
    seeded()
    fuse = Fuse(place, after)
    module, takes_part = Fails(fuse), TakesPart(fuse)
    given = trainer(tmp_path, takes_part, "csv")
    before = everything(module, given, takes_part)
    with pytest.raises(KeyError, match="on purpose"):
        scale_batch_size(given, module, mode="binary")
    assert everything(module, given, takes_part) == before
    assert list(tmp_path.iterdir()) == []


class Probe:
    """Looks at everything in a run right before and after the search, which it lets fail."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse, self.seen = fuse, []
        self.held: list[Any] = []  # so that nothing new gets the place of something old

    @hookimpl(wrapper=True)
    def on_run_start(self, run: Any) -> Any:
        self.fuse.on = True
        self.look(run)
        try:
            return (yield)
        finally:
            self.fuse.on = False
            self.look(run)

    def look(self, run: Any) -> None:
        plugins = [each for each in run.plugins.values() if isinstance(each, TakesPart)]
        optimizers, schedulers = [each.state_dict() for each in run.optimizers], [each.scheduler.state_dict() for each in run.schedulers]
        position, options = dataclasses.asdict(run.position), {k: v for k, v in vars(run.options).items() if k != "plugins"}
        loader = run.loaders["train"][0]
        place = loader.generator, loader.sampler.generator.get_state().tolist(), loader._iterator
        rest = [plain(optimizers), plain(schedulers), position, options, place, dict(run.metrics.results()), run.stop_reason, run.limits]
        self.held += [run.stream, loader, *run.optimizers, *run.schedulers]
        same = [id(each) for each in (run.stream, loader, *run.optimizers, *run.schedulers)]
        self.seen.append((everything(run.module, *plugins), copy.deepcopy(rest), same))


@pytest.mark.parametrize("place", ["", "optimizer", "sampler", *(slow(each) for each in PLACES if each not in ("optimizer", "sampler"))])
def test_in_a_fit_no_trace_is_left_but_the_size_whatever_fails(tmp_path: Path, place: str) -> None:
    seeded()
    fuse = Fuse(place, 3, on=False)
    module, probe = Fails(fuse), Probe(fuse)
    given = trainer(tmp_path, TakesPart(fuse), probe, BatchSizeFinder(mode="binary"), max_epochs=1)
    if place:
        with pytest.raises(KeyError, match="on purpose"):
            given.fit(module)
        assert module.batch_size == 4 and probe.seen[0] == probe.seen[1]
        return
    given.fit(module)
    before, after = probe.seen
    assert before[0][2][0].pop("batch_size") == 4 and after[0][2][0].pop("batch_size") == 21
    assert before[:2] == after[:2] and not set(before[2]) & set(after[2])


def test_the_collector_of_garbage_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    scale_batch_size(trainer(tmp_path), Net(4), max=4)
    assert gc.get_freeze_count() > 0, "somebody else had frozen what was there"
    gc.unfreeze()
    scale_batch_size(trainer(tmp_path), Net(4), max=4)
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-true"}, {"accumulate_grad_batches": 3, "seed": 5}, *map(slow, ({}, {"precision": "16-mixed"}))]
)
@pytest.mark.parametrize(
    "source",
    ["module", slow("hparams"), "datamodule", "loaders", slow("cached")],
)
def test_nothing_is_changed_but_the_size(tmp_path: Path, source: str, options: dict[str, Any]) -> None:
    seeded()
    module: Net = keeping_hparams(samples=40, capacity=21) if source == "hparams" else Net(40, 21)
    data = Data() if source == "datamodule" else None
    loader = (
        DataLoader(Samples(40), 4, shuffle=True, generator=torch.Generator().manual_seed(3)) if source in ("loaders", "cached") else None
    )
    if source == "cached":
        module.kept = loader
        module.train_dataloader = lambda: module.kept  # type: ignore[method-assign]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.layers[2].eval()

    class Kept:
        """Takes part in the steps, and remembers things."""

        def __init__(self) -> None:
            self.stages: list[str] = []
            self.heard = 0

        @hookimpl
        def setup(self, stage: str) -> None:
            self.stages.append(stage)
            self.heard += 1

        @hookimpl
        def move_batch(self, batch: Any) -> Any:
            self.heard += 1
            return None

    kept = Kept()
    given = trainer(tmp_path, kept, "csv", **options)
    others = [each for each in (given, kept, data) if each is not None]
    before, pool = everything(module, *others), None if loader is None else loader.generator.get_state().tolist()
    parameters = [id(each) for each in module.parameters()]
    found = scale_batch_size(given, module, loader if source == "loaders" else None, data, mode="binary")
    assert found.size == 21 and found.before == 4 and found.attribute == (None if loader is not None else "batch_size")
    assert module.hparams.get("batch_size", 21) == 21
    owner = data if data is not None else module
    assert owner.batch_size == (4 if loader is not None else 21)
    if source == "hparams":
        module.hparams["batch_size"] = 4
        module.__dict__["unused"] = 4
    elif data is not None:
        assert module.batch_size == 21, "wherever it is written, it is the same"
        data.batch_size = module.batch_size = 4
    else:
        module.batch_size = 4
    assert everything(module, *others) == before
    assert [id(each) for each in module.parameters()] == parameters
    assert loader is None or (loader.batch_size == 4 and loader.generator.get_state().tolist() == pool and loader._iterator is None)
    assert list(tmp_path.iterdir()) == [] and given.run is None


def test_tune_sets_the_attribute_and_returns_the_result_by_name(tmp_path: Path) -> None:
    class Also:
        @hookimpl
        def tune(self, run: Any) -> Any:
            return {"also": run.loaders["train"][0].batch_size}

    seeded()
    module, finder = Net(40, 21), BatchSizeFinder(mode="binary")
    before = everything(module)
    found = trainer(tmp_path, Also(), finder).tune(module)
    assert found == {"batch_size_finder": finder.result, "also": 21} and finder.result is not None
    assert module.batch_size == finder.result.size == 21
    module.batch_size = 4
    after = everything(module)
    after[2][0].pop("data", None)
    after[3] = before[3]  # loaders were made, which a tuning leaves in the module as a fit does
    assert after[1:] == before[1:]


def test_two_searches_give_the_same(tmp_path: Path) -> None:
    seeded()
    module = Net(40, 21)
    first, second = scale_batch_size(trainer(tmp_path), module), scale_batch_size(trainer(tmp_path), module)
    assert (first.before, second.before) == (4, 16) and first == dataclasses.replace(second, before=4)


# ---------------------------------------------------------------------- the fit that follows


class Shuffled(Net):
    """Draws while its loaders are made, and asks the run how long it will be."""

    def train_dataloader(self) -> Any:
        parts = torch.utils.data.random_split(Samples(self.samples), [self.samples - 4, 4])
        return DataLoader(parts[0], self.batch_size, shuffle=True, num_workers=self.workers)

    workers = 0

    def configure_optimizers(self) -> Any:
        self.optimizer = Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=self.run.total_steps)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fitted(path: Path, module: Net, *plugins: Any, **options: Any) -> list[Any]:
    given = trainer(path, *plugins, **options)
    given.fit(module)
    return outcome(given, module)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", [Net, Shuffled])
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        *(slow(each) for each in ({}, {"precision": "16-mixed"}, {"seed": 3}, {"limit_train_batches": 2})),
    ],
    ids=str,
)
def test_the_fit_is_bit_for_bit_the_one_that_begins_with_the_size(tmp_path: Path, kind: type[Net], options: dict[str, Any]) -> None:
    seeded()
    expected = fitted(tmp_path, kind(40, 13, batch_size=13), **options)
    seeded()
    finder = BatchSizeFinder(mode="binary")
    assert fitted(tmp_path, kind(40, 13), finder, "csv", **options) == expected
    assert finder.result is not None and finder.result.size == 13
    seeded()
    module = kind(40, 13)
    scale_batch_size(trainer(tmp_path, **options), module, mode="binary")
    assert fitted(tmp_path, module, **options) == expected


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.slow
def test_the_same_with_workers(tmp_path: Path) -> None:
    class Workers(Shuffled):
        workers = 2

    seeded()
    expected = fitted(tmp_path, Workers(40, 13, batch_size=8))
    seeded()
    assert fitted(tmp_path, Workers(40, 13), BatchSizeFinder()) == expected


def test_given_loaders_are_replaced_by_copies_that_keep_everything_else(tmp_path: Path) -> None:
    class Own(DataLoader):
        note = ""

    def collate(samples: Any) -> Any:
        return tuple(torch.stack(each) for each in zip(*samples, strict=True))

    def loaders(size: int) -> list[DataLoader]:
        train, val = Samples(40), Samples(20)
        generator = torch.Generator().manual_seed(3)
        own = Own(train, size, sampler=RandomSampler(train, generator=generator), collate_fn=collate, drop_last=True, generator=generator)
        own.note = "kept"
        return [own, DataLoader(val, size)]

    def fit(size: int, *plugins: Any) -> Any:
        seeded()
        module, given = Net(40, 13, batch_size=99), trainer(tmp_path, *plugins)
        train, val = loaders(size)
        given.fit(module, train, val)
        assert (train.batch_size, val.batch_size, module.batch_size) == (size, size, 99)
        return given, outcome(given, module)

    _, expected = fit(13)
    finder = BatchSizeFinder(mode="binary")
    given, came = fit(4, finder)
    assert came == expected
    used = given.run.loaders["train"][0]
    assert type(used) is Own and used.note == "kept" and used.collate_fn is collate and used.drop_last and used.batch_size == 13
    assert finder.result is not None and finder.result.attribute is None


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (
            lambda: DataLoader(Samples(8), batch_sampler=[[0, 1], [2, 3]]),
            "a DataLoader that has its own batch_sampler .list. cannot be made",
        ),
        (lambda: DataLoader(Samples(8), batch_size=None), "a DataLoader that has batch_size=None cannot be made larger or smaller"),
        (lambda: [(torch.ones(2, 3), torch.ones(2, 1))] * 4, "the batches of a list cannot be made larger or smaller: give a DataLoader"),
        (lambda: iter([(torch.ones(2, 3), torch.ones(2, 1))]), "the training data are an iterator|the batches of a list_iterator cannot"),
    ],
)
def test_loaders_whose_batches_cannot_be_changed_are_refused(tmp_path: Path, loader: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        trainer(tmp_path, BatchSizeFinder()).fit(Net(), loader(), None)


def test_an_attribute_that_is_missing_or_has_no_effect_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"no attribute or hyperparameter 'bacth_size' in Net; did you mean attribute='batch_size'"):
        scale_batch_size(trainer(tmp_path), Net(), attribute="bacth_size")

    class Fixed(Net):
        def train_dataloader(self) -> Any:
            return DataLoader(Samples(40), 8)

    with pytest.raises(ValueError, match="batch_size=2 has no effect: train_dataloader made a loader with batch_size=8; let it use the"):
        scale_batch_size(trainer(tmp_path), Fixed())


def test_data_without_a_length(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __init__(self, length: int) -> None:
            self.length = length

        def __iter__(self) -> Any:
            return (Samples(self.length)[i] for i in range(self.length))

    for length, capacity, size in ((50, 21, 21), (30, 100, 30), (3, 100, 3)):
        loader = DataLoader(Stream(length), 2)
        assert scale_batch_size(trainer(tmp_path), Net(8, capacity), loader, mode="binary", max=256).size == size
    assert scale_batch_size(trainer(tmp_path), Net(8), DataLoader(Stream(40), 2), max=16).size == 16


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"limit_train_batches": 0.1}, 4), ({"overfit_batches": 0.25}, 10), ({"val_check_interval": 5}, 8),
        ({"limit_val_batches": 0.01}, 40),
        ({"limit_train_batches": 1}, 40),
    ],
)  # fmt: skip
def test_enough_batches_are_left_for_the_options(tmp_path: Path, options: dict[str, Any], size: int) -> None:
    module = Net(40)
    if "limit_val_batches" in options:
        module.val_dataloader = lambda: None  # type: ignore[method-assign]
    trainer(tmp_path, {"batch_size_finder": {"mode": "binary"}}, max_epochs=1, **options).fit(module)
    assert module.batch_size == size


# ---------------------------------------------------------------------- accumulation and learning rates


@pytest.mark.parametrize(
    ("capacity", "size", "accumulate"),
    [(100, 24, 1), (7, 6, 4), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((13, 12, 2), (1, 1, 24)))],
)
def test_keep_effective_keeps_the_samples_of_a_step(tmp_path: Path, capacity: int, size: int, accumulate: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 6, "max_epochs": 1}
    found = scale_batch_size(trainer(tmp_path, **options), Net(48, capacity), mode="binary", keep_effective=True)
    assert (found.size, found.accumulate_grad_batches) == (size, accumulate) and found.trials[-1] == (size, "")
    if size == 1:
        return
    seeded()
    given = trainer(tmp_path, BatchSizeFinder(mode="binary", keep_effective=True, scale_lr="linear"), **options)
    module = Net(48, capacity)
    given.fit(module)
    assert given.run is not None and given.run.position.step == 2 and given.accumulate_grad_batches == 6
    seeded()
    plainly = trainer(tmp_path, **{**options, "accumulate_grad_batches": accumulate})
    other = Net(48, capacity, batch_size=size)
    plainly.fit(other)
    assert outcome(given, module) == outcome(plainly, other)


@pytest.mark.parametrize(("scale", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
@pytest.mark.parametrize("kind", ["one cycle", *map(slow, ("none", "step", "cosine", "sequential"))])
def test_scale_lr_scales_every_rate_of_the_fit(tmp_path: Path, scale: Any, factor: float, kind: str) -> None:
    class Rates(Net):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.rates: list[list[float]] = []

        def configure_optimizers(self) -> Any:
            groups = [{"params": self.layers[0].parameters(), "lr": 0.01}, {"params": self.layers[3].parameters(), "lr": 0.03}]
            self.optimizer = Adam(groups)
            steps, rates = torch.optim.lr_scheduler, [0.1, 0.3]
            schedulers = {
                "none": lambda: None,
                "step": lambda: steps.StepLR(self.optimizer, 2, 0.5),
                "one cycle": lambda: steps.OneCycleLR(self.optimizer, rates, total_steps=self.run.total_steps),
                "cosine": lambda: steps.CosineAnnealingLR(self.optimizer, 5),
                "sequential": lambda: steps.SequentialLR(
                    self.optimizer, [steps.LinearLR(self.optimizer, 0.2, total_iters=3), steps.ExponentialLR(self.optimizer, 0.7)], [3]
                ),
            }
            scheduler = schedulers[kind]()
            return (
                self.optimizer
                if scheduler is None
                else {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
            )

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.rates.append([group["lr"] for group in optimizer.param_groups])

    module, other = Rates(capacity=16), Rates(batch_size=16)
    trainer(tmp_path, BatchSizeFinder(scale_lr=scale), max_epochs=3).fit(module)
    trainer(tmp_path, max_epochs=3).fit(other)
    assert len(module.rates) == 9
    assert torch.allclose(torch.tensor(module.rates), torch.tensor(other.rates) * factor, rtol=1e-6)


def test_the_result_tells_the_factor_and_nothing_is_scaled_where_no_fit_follows(tmp_path: Path) -> None:
    found = scale_batch_size(trainer(tmp_path, accumulate_grad_batches=2), Net(40, 16), scale_lr="sqrt")
    assert (found.lr_scale, found.accumulate_grad_batches, found.before) == (2.0, 2, 4)
    with pytest.raises(ValueError, match="keep_effective and scale_lr need a batch size to begin with"):
        scale_batch_size(trainer(tmp_path), Net(batch_size=None), scale_lr="linear")


# ---------------------------------------------------------------------- resume


class Saves:
    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        run.save_checkpoint(run.dir / f"{run.position.micro_step}.safetensors")


@pytest.mark.parametrize("source", ["attribute", "loaders"])
@pytest.mark.parametrize("batch", [2, 7, *map(slow, (1, 3, 4, 5, 6, 8))])
def test_a_run_that_goes_on_has_the_size_and_searches_no_more(tmp_path: Path, source: str, batch: int) -> None:
    options = {"keep_effective": True, "scale_lr": "linear", "mode": "binary"}

    def fit(module: Net, path: Path | None) -> Trainer:
        given = trainer(tmp_path, BatchSizeFinder(**options), Saves(), accumulate_grad_batches=5, name="net")
        loader = DataLoader(Samples(40), 4, shuffle=True) if source == "loaders" else None
        given.fit(module, loader, None, ckpt_path=path)
        return given

    seeded()
    module = Net(40, 13)
    whole = fit(module, None)
    assert whole.run is not None and whole.run.position.micro_step == 8  # 10 samples, twice for a step
    expected = outcome(whole, module)
    again = Net(40, 13)
    resumed = fit(again, whole.run.dir / f"{batch}.safetensors")
    came = outcome(resumed, again)
    assert came[:5] == expected[:5] and again.sizes == [10] * (8 - batch - batch % 2)  # in a window it is put off until its end
    assert resumed.run is not None and resumed.run.options.accumulate_grad_batches == 2


def test_a_fit_that_goes_on_with_a_larger_max_epochs_has_the_size_too(tmp_path: Path) -> None:
    def fit(*epochs: int) -> list[Any]:
        seeded()
        module, given = Net(40, 13), trainer(tmp_path, BatchSizeFinder())
        for each in epochs:
            given.max_epochs = each
            given.fit(module, DataLoader(Samples(40), 4, shuffle=True))
        assert set(module.sizes) == {8}
        return outcome(given, module)

    assert fit(1, 3)[:5] == fit(3)[:5]


def test_an_instance_in_another_fit_begins_anew(tmp_path: Path) -> None:
    finder = BatchSizeFinder()
    for capacity, size in ((13, 8), (30, 16)):
        trainer(tmp_path, finder).fit(Net(40, capacity), DataLoader(Samples(40), 4))
        assert finder.result is not None and finder.result.size == size


def test_fast_dev_run_looks_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("torchplug").setLevel(logging.INFO)
    module = Net()
    trainer(tmp_path, BatchSizeFinder(), fast_dev_run=True).fit(module)
    assert module.batch_size == 4 and module.count == 1
    assert "plugin 'batch_size_finder': fast_dev_run looks for no batch size" in caplog.messages


def test_the_report_and_the_hyperparameters_tell_the_size(tmp_path: Path) -> None:
    logged: list[Any] = []

    class Logs:
        @hookimpl
        def log_hyperparameters(self, hyperparameters: Any) -> None:
            logged.append(hyperparameters["batch_size"])

        @hookimpl
        def log_metrics(self, step: int) -> None:
            logged.append(step)

    given = trainer(tmp_path, Logs(), BatchSizeFinder(), max_epochs=1)
    given.fit(keeping_hparams(samples=40, capacity=21))
    assert logged[0] == 16 and logged[1:] == sorted(logged[1:]) and logged[1] == 1
    assert given.run is not None and given.run.report["batch_size_finder"] == "batch size 16, after 6 trials"


def test_a_signal_ends_the_search(tmp_path: Path) -> None:
    class Interrupted(Net):
        def on_train_batch_end(self) -> None:
            if self.count == 2:
                self.run.interrupted = "SIGTERM"

    module = Interrupted(40)
    with pytest.raises(SystemExit):
        trainer(tmp_path, BatchSizeFinder()).fit(module)
    assert module.batch_size == 4 and module.count == 0


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), torch.cuda.OutOfMemoryError("HIP out of memory"),
        RuntimeError("CUDA error: out of memory"), RuntimeError("HIP out of memory. Tried to allocate"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        OSError(errno.ENOMEM, "Cannot allocate memory"), np.exceptions.AxisError.__class__ and MemoryError("Unable to allocate 1 TiB"),
    ],
    ids=str,
)  # fmt: skip
def test_running_out_of_memory_is_recognised(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert triggered"), ValueError("out of memory"), OSError(errno.ENOENT, "out of memory")],
    ids=str,
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not out_of_memory(error)


def test_the_allocator_of_the_cpu_is_recognised_for_real(tmp_path: Path) -> None:
    class Greedy(Net):
        def training_step(self, batch: Any) -> Any:
            if len(batch[0]) > 9:
                torch.empty(2**60)
            return super().training_step(batch)

    assert scale_batch_size(trainer(tmp_path), Greedy(), mode="binary").size == 9


def test_what_a_failed_trial_held_is_given_back_before_the_next(tmp_path: Path) -> None:
    import weakref

    held: list[Any] = []

    class Holds(Net):
        def training_step(self, batch: Any) -> Any:
            big = torch.ones(1000)
            held.append(weakref.ref(big))
            big.itself = [big]  # a cycle
            return super().training_step(batch) + 0 * big.sum()

        def train_dataloader(self) -> Any:
            assert all(each() is None for each in held), "a trial begins with nothing of the one before"
            return super().train_dataloader()

    scale_batch_size(trainer(tmp_path), Holds(40, 21), mode="binary")
    assert all(each() is None for each in held)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_size_has_memory_and_memory_is_as_before(tmp_path: Path) -> None:
    torch.cuda.set_per_process_memory_fraction(0.02)

    class Wide(Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2
            self.layers = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1))

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.rand(2**17, 64)), self.batch_size)

        def training_step(self, batch: Any) -> Any:
            return self.layers(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

        def setup_module(self, run: Any) -> Any:
            run.device = torch.device("cuda")

    try:
        module = Wide()
        torch.zeros(1, device="cuda")
        before = torch.cuda.memory_allocated()
        found = scale_batch_size(trainer(tmp_path), module, mode="binary")
        assert 2 < found.size < 2**17 and any("out of memory" in error for _, error in found.trials)
        assert torch.cuda.memory_allocated() <= before + 2**25
        trainer(tmp_path, max_epochs=None, max_steps=5).fit(module)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "linear"}, "mode must be 'power' or 'binary', got 'linear'"),
        ({"init": 0}, "init must be a whole number, at least 1, got 0"),
        ({"steps_per_trial": 1}, "steps_per_trial must be a whole number, at least 2, got 1"),
        ({"max": 0}, "max must be a whole number of samples, at least 1, or None, got 0"),
        ({"max": 4, "init": 8}, "init=8 is more than max=4"),
        ({"margin": 1.0}, "margin must be a fraction from 0 to below 1, got 1.0"),
        ({"margin": float("nan")}, "margin must be a fraction from 0 to below 1, got nan"),
        ({"attribute": "hparams.size"}, "attribute must be the name of an attribute, got 'hparams.size'"),
        ({"evaluate": 1}, "evaluate must be True or False, got 1"),
        ({"scale_lr": True}, "scale_lr must be 'linear', 'sqrt' or None, got True"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        BatchSizeFinder(**options)
    with pytest.raises(PluginError, match=f"plugin 'batch_size_finder' .torchplug-batch-size-finder 0.1.0.: {words}"):
        Trainer(max_epochs=1, plugins=[{"batch_size_finder": options}])


def test_a_copy_has_the_size_and_the_loader_keeps_its_own() -> None:
    loader = DataLoader(Samples(10), 3, drop_last=True)
    copied = rebatched(loader, 5)
    assert (copied.batch_size, len(copied), loader.batch_size, len(loader)) == (5, 2, 3, 3)
    assert [len(batch[0]) for batch in copied] == [5, 5] and copied.sampler is loader.sampler
