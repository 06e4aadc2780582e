"""The place in the data: every kind of loader gives what a loop by hand gets of it, and goes on exactly where a run was stopped."""

from __future__ import annotations

import copy
import logging
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler, ConcatDataset, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, Sampler, Subset,
    SubsetRandomSampler, WeightedRandomSampler, get_worker_info,
)  # fmt: skip

import torchplug
from torchplug import hookimpl
from torchplug.seed import generator_state

SAMPLES, BATCHES, EPOCHS = 9, 5, 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more than a small machine has cores
]
TORCHDATA = pytest.mark.filterwarnings("ignore:.*set_vital.*")


# ---------------------------------------------------------------------- data


def draws() -> Tensor:
    """A number from each of the global generators."""
    return torch.tensor([random.random(), numpy.random.random(), torch.rand((), dtype=torch.float64).item()], dtype=torch.float64)


class Augmented(Dataset):
    """Sample i is i and three random numbers; counts how often each was loaded, in workers too."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.loads = torch.zeros(samples, dtype=torch.int32).share_memory_()

    def __len__(self) -> int:
        return len(self.loads)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.loads[index] += 1
        return {"index": torch.tensor(index), "drawn": draws()}


class Together(Augmented):
    """Loads a batch at once."""

    def __getitems__(self, indices: Any) -> list[dict[str, Any]]:
        shift = draws()
        return [{"index": sample["index"], "drawn": sample["drawn"] + shift} for sample in (self[i] for i in indices)]


class Learning(Augmented):
    """Remembers how many samples it gave, and draws from a generator of its own."""

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__(samples)
        self.given, self.generator = 0, torch.Generator().manual_seed(3)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.given += 1
        return {**super().__getitem__(index), "given": self.given, "own": torch.rand((), generator=self.generator)}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]
        self.generator.set_state(state["generator"])


class Place:
    """A place in a sequence of numbers that is another one each time. At the end it goes back to the beginning by itself."""

    def __init__(self, length: int = SAMPLES) -> None:
        self.length, self.place, self.turn = length, 0, 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < self.length:
            self.place += 1
            yield self.give((2 * self.place + self.turn) % self.length)
        self.place, self.turn = 0, self.turn + 1

    def give(self, index: int) -> Any:
        return index

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "turn": self.turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.turn = state["place"], state["turn"]


class Remembered(Place):
    """Its state says where it was, also that it was at the end: after that was loaded, it gives nothing once."""

    begin = 0

    def __iter__(self) -> Iterator[Any]:
        begin, self.begin = self.begin, 0
        self.turn += begin == 0
        for place in range(begin, self.length):
            self.place = place + 1
            yield self.give((2 * place + self.turn) % self.length)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin, self.turn = state["place"], state["turn"]


class PlaceSampler(Place, Sampler):
    """A sampler that goes back by itself."""


class RememberedSampler(Remembered, Sampler):
    """A sampler that remembers the end."""


class FlowSamples:
    """What iterable data sets with a state have in common: samples that are drawn from a generator of their own too."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = torch.zeros(SAMPLES, dtype=torch.int32).share_memory_()
        self.generator = torch.Generator().manual_seed(4)

    def give(self, index: int) -> Any:
        self.loads[index] += 1
        return {"index": torch.tensor(index), "drawn": draws(), "own": torch.rand((), generator=self.generator)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])


class Flow(FlowSamples, Place, IterableDataset):
    """Goes back by itself."""


class RememberedFlow(FlowSamples, Remembered, IterableDataset):
    """Remembers the end."""


class Shards(IterableDataset):
    """Samples one after the other, without a state; workers share them."""

    def __init__(self) -> None:
        self.loads = torch.zeros(SAMPLES, dtype=torch.int32).share_memory_()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        for index in range(worker.id if worker else 0, SAMPLES, worker.num_workers if worker else 1):
            self.loads[index] += 1
            yield {"index": torch.tensor(index), "drawn": draws() if worker is None else torch.zeros(3)}


# ---------------------------------------------------------------------- samplers and loaders


class AtOnce(Sampler):
    """Draws when it is asked for an iterator."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SAMPLES).tolist())

    def __len__(self) -> int:
        return SAMPLES


class OneByOne(Sampler):
    """Draws while it goes, from Python's generator."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield random.randrange(SAMPLES)

    def __len__(self) -> int:
        return SAMPLES


class Batches(Sampler):
    """Draws batches while it goes, as tuples or lists."""

    def __init__(self, kind: Callable[[Any], Any]) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        for _ in range(BATCHES):
            yield self.kind(torch.randint(SAMPLES, (2,)).tolist())

    def __len__(self) -> int:
        return BATCHES


class Keeping(Sampler):
    """Draws from generators of its own, under names that nobody knows, and from those of a sampler inside of it."""

    def __init__(self, inner: Any = ()) -> None:
        self.python, self.numpy, self.old = random.Random(1), numpy.random.default_rng(2), numpy.random.RandomState(3)
        self.torch, self.sampler = own(4), inner

    def __iter__(self) -> Iterator[int]:
        kinds = [lambda: self.python.randrange(SAMPLES), lambda: self.numpy.integers(SAMPLES), lambda: self.old.randint(SAMPLES)]
        kinds.append(lambda: torch.randint(SAMPLES, (), generator=self.torch))
        others = list(self.sampler)
        for number in range(SAMPLES - len(others)):
            yield int(kinds[number % 4]())
        yield from others

    def __len__(self) -> int:
        return SAMPLES


class Labelled(DataLoader):
    """Has more arguments, and makes something of every batch."""

    def __init__(self, *arguments: Any, label: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.label = label

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield {**batch, "label": self.label}


class Headstrong(DataLoader):
    """Never asks its sampler."""

    def __iter__(self) -> Iterator[Any]:
        for indices in torch.randperm(SAMPLES).split(2):
            yield self.collate_fn([self.dataset[int(i)] for i in indices])


class Choosy(DataLoader):
    """Leaves batches out."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if batch["index"].sum() % 3 != 1:
                yield batch


class Foresighted(DataLoader):
    """Has the next batch ready before it gives one."""

    def __iter__(self) -> Iterator[Any]:
        source = super().__iter__()
        ready = list(islice(source, 1))
        for batch in source:
            yield from ready
            ready = [batch]
        yield from ready


def own(seed: int = 6) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marked(worker: int) -> None:
    """What people do in workers: give the data set something."""
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, Augmented)
    info.dataset.shift = 100


class Marked(Augmented):
    """Needs what its workers were given."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "shift": self.shift}


def weighted() -> Sampler:
    return WeightedRandomSampler([0.1 + i for i in range(SAMPLES)], SAMPLES)


KINDS: dict[str, Callable[..., Any]] = {
    "in order": lambda **o: DataLoader(Augmented(), 2, **o),
    "shuffled": lambda **o: DataLoader(Augmented(), 2, shuffle=True, **o),
    "the last batch dropped": lambda **o: DataLoader(Augmented(), 2, shuffle=True, drop_last=True, **o),
    "own generator": lambda **o: DataLoader(Augmented(), 2, shuffle=True, generator=own(), **o),
    "sampler that draws at once": lambda **o: DataLoader(Augmented(), 2, sampler=AtOnce(), **o),
    "sampler that draws as it goes": lambda **o: DataLoader(Augmented(), 2, sampler=OneByOne(), **o),
    "with replacement": lambda **o: DataLoader(
        Augmented(), 2, sampler=RandomSampler(range(SAMPLES), replacement=True, generator=own()), **o
    ),
    "weighted": lambda **o: DataLoader(Augmented(), 2, sampler=weighted(), **o),
    "random part": lambda **o: DataLoader(Augmented(), 2, sampler=SubsetRandomSampler(range(1, SAMPLES)), **o),
    "sampler with a state, that goes back": lambda **o: DataLoader(Augmented(), 2, sampler=PlaceSampler(), **o),
    "sampler with a state, that remembers": lambda **o: DataLoader(Augmented(), 2, sampler=RememberedSampler(), **o),
    "batches of a sampler with a generator": lambda **o: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(range(SAMPLES), generator=own()), 2, False), **o
    ),
    "sampler with generators that it keeps": lambda **o: DataLoader(Augmented(), 2, sampler=Keeping(), **o),
    "samplers inside of each other": lambda **o: DataLoader(
        Augmented(), batch_sampler=BatchSampler(Keeping(RandomSampler(range(3), generator=own())), 2, False), **o
    ),
    "own batch sampler": lambda **o: DataLoader(Augmented(), batch_sampler=Batches(list), **o),
    "tuples of indices": lambda **o: DataLoader(Augmented(), batch_sampler=Batches(tuple), **o),
    "no batches": lambda **o: DataLoader(Augmented(5), batch_size=None, shuffle=True, **o),
    "no batches, in order": lambda **o: DataLoader(Augmented(5), batch_size=None, sampler=range(5), **o),
    "distributed": lambda **o: DataLoader(Augmented(), 2, sampler=DistributedSampler(Augmented(), num_replicas=1, rank=0), **o),
    "subclass": lambda **o: Labelled(Augmented(), 2, label=5, shuffle=True, **o),
    "a batch at once": lambda **o: DataLoader(Together(), 2, shuffle=True, **o),
    "part of a data set": lambda **o: DataLoader(Subset(Together(), range(1, SAMPLES)), 2, shuffle=True, **o),
    "data sets in a row": lambda **o: DataLoader(ConcatDataset([Augmented(5), Augmented(4)]), 2, shuffle=True, **o),
}
PREFETCHING = {  # with workers alone
    "persistent workers": lambda **o: DataLoader(Augmented(), 2, shuffle=True, persistent_workers=True, **o),
    "persistent workers, own generator": lambda **o: DataLoader(
        Augmented(), 2, shuffle=True, generator=own(), persistent_workers=True, prefetch_factor=1, **o
    ),
    "data set marked in its workers": lambda **o: DataLoader(Marked(), 2, shuffle=True, worker_init_fn=marked, **o),
}
BY_THEMSELVES: dict[str, Callable[..., Any]] = {  # without workers alone
    "data set with a state": lambda: DataLoader(Learning(), 2, shuffle=True),
    "flow with a state, that goes back": lambda: DataLoader(Flow(), 2),
    "flow with a state, that remembers": lambda: DataLoader(RememberedFlow(), 2),
    "flow with a state, batches that are all full": lambda: DataLoader(Flow(), 3),
    "a list": lambda: [{"index": torch.tensor([i, i + 1])} for i in range(BATCHES)],
}


# ---------------------------------------------------------------------- runs, and what they saw


@dataclass
class Seen:
    """What came of a run.

    Args:
        batches: every batch, as plain values.
        generators: the global ones, at the end.
        weight: what was trained; it depends on every batch and on draws in between.
        loads: how often each sample was loaded, where the data set counts.
    """

    batches: list[Any]
    generators: dict[str, Any]
    weight: list[float]
    loads: list[int] | None


class Watcher(torchplug.Module):
    """Keeps what it is given, and draws between two batches as dropout would."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(plain(batch))
        return loss_of(self.weight, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def loss_of(weight: Tensor, batch: Any) -> Tensor:
    return (weight * draws() * (batch["drawn"].sum() if "drawn" in batch else 1)).sum()


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def flat(value: Any) -> Any:
    """Something to compare generators by."""
    if isinstance(value, dict):
        return {name: flat(part) for name, part in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def seed(number: int) -> None:
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)


def loads_of(loader: Any) -> list[int] | None:
    dataset = getattr(loader, "dataset", None)
    dataset = getattr(dataset, "dataset", dataset)
    return dataset.loads.tolist() if hasattr(dataset, "loads") else None


def by_hand(make: Callable[[], Any], limit: int | None = None, epochs: int = EPOCHS) -> Seen:
    """The loop that everybody writes."""
    seed(5)
    loader, module = make(), Watcher()
    optimizer = module.configure_optimizers()
    for epoch in range(epochs):
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for batch in islice(loader, limit):
            module.training_step(batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Seen(module.batches, flat(generator_state()), module.weight.tolist(), loads_of(loader))


class Saver:
    """Saves after batches, and between epochs, by the number of batches done: "03" and "05-edge" of those that are wanted."""

    def __init__(self, folder: Path, stops: Collection[str]) -> None:
        self.folder, self.stops = folder, stops

    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        self._save(run, f"{run.position.micro_step:02}")

    @hookimpl
    def on_train_epoch_end(self, run: Any) -> None:
        self._save(run, f"{run.position.micro_step:02}-edge")

    def _save(self, run: Any, name: str) -> None:
        if not self.stops or name in self.stops:
            run.save_checkpoint(self.folder / name)


Fit = Callable[..., Seen]


@pytest.fixture
def fit(trainer: Any) -> Fit:
    """``fit(make)`` trains on what ``make()`` gives; ``start`` is a number for the generators, or a file to go on from."""

    def run(make: Callable[[], Any], start: int | Path = 5, plugins: Collection[Any] = (), **options: Any) -> Seen:
        seed(start if isinstance(start, int) else 77)  # a run that goes on finds them anywhere
        loader, module = make(), Watcher()
        made = trainer(**{"max_epochs": EPOCHS, "plugins": list(plugins), **options})
        made.fit(module, loader, ckpt_path=start if isinstance(start, Path) else None)
        return Seen(module.batches, flat(generator_state()), module.weight.tolist(), loads_of(loader))

    return run


@dataclass
class Way:
    """How runs are stopped and go on.

    Args:
        stops: after which batches; none for all, and the edges between epochs.
        again: what makes the loader of a run that goes on, if that is another one.
        counted: whether no sample may be loaded twice.
        content: whether samples must be equal in content too, and generators at the end; their order is in any case.
    """

    stops: Collection[str] = ()
    again: Callable[[], Any] | None = None
    counted: bool = True
    content: bool = True


def goes_on(fit: Fit, make: Callable[[], Any], folder: Path, way: Way, **options: Any) -> Seen:
    """Whether a run that is stopped anywhere sees afterwards what the whole one saw. Returns what that saw."""
    whole = fit(make, plugins=[Saver(folder, way.stops)], **options)
    files = sorted(folder.iterdir())
    assert way.stops or len(files) == len(whole.batches) + options.get("max_epochs", EPOCHS)
    for file in files:
        rest, expected = fit(way.again or make, file, **options), whole.batches[int(file.name[:2]) :]
        assert indices(rest.batches) == indices(expected), file.name
        if way.content:
            assert rest.batches == expected, file.name
            assert rest.generators == whole.generators, file.name
            assert rest.weight == whole.weight, file.name
        if way.counted and rest.loads is not None:
            times = Counter(index for batch in indices(expected) for index in batch)
            assert rest.loads == [times[i] for i in range(len(rest.loads))], file.name
    return whole


def indices(batches: list[Any]) -> list[list[int]]:
    return [index if isinstance(index, list) else [index] for index in (batch["index"] for batch in batches)]


# ---------------------------------------------------------------------- without workers


@pytest.mark.parametrize("kind", [*KINDS, *BY_THEMSELVES])
def test_an_epoch_is_that_of_a_loop_by_hand_and_goes_on_after_any_batch(kind: str, fit: Fit, tmp_path: Path) -> None:
    make = KINDS.get(kind) or BY_THEMSELVES[kind]
    assert goes_on(fit, make, tmp_path / "saved", Way()) == by_hand(make)


LIMITED = [
    "shuffled",
    "own generator",
    "sampler that draws as it goes",
    "sampler with a state, that goes back",
    "sampler with a state, that remembers",
    "sampler with generators that it keeps",
    "samplers inside of each other",
    "no batches",
    "subclass",
    "data set with a state",
    "flow with a state, that goes back",
    "a list",
]


@pytest.mark.parametrize("kind", LIMITED)
def test_epochs_that_a_limit_cuts_are_those_of_a_loop_by_hand_and_go_on(kind: str, fit: Fit, tmp_path: Path) -> None:
    make = KINDS.get(kind) or BY_THEMSELVES[kind]
    whole = goes_on(fit, make, tmp_path / "saved", Way(), limit_train_batches=3, max_epochs=3)
    assert whole == by_hand(make, limit=3, epochs=3)


def test_a_subclass_that_leaves_batches_out_goes_on_after_those_it_gave(fit: Fit, tmp_path: Path) -> None:
    def make() -> Any:
        return Choosy(Augmented(), 2, shuffle=True)

    assert goes_on(fit, make, tmp_path / "saved", Way(counted=False)) == by_hand(make)


def test_a_subclass_that_has_the_next_batch_ready_loses_none(fit: Fit, tmp_path: Path) -> None:
    def make() -> Any:
        return Foresighted(Augmented(), 2, shuffle=True)

    assert goes_on(fit, make, tmp_path / "saved", Way(counted=False, content=False)) == by_hand(make)


def test_a_subclass_that_never_asks_its_sampler_goes_on(fit: Fit, tmp_path: Path) -> None:
    def make() -> Any:
        return Headstrong(Augmented(), 2)

    assert goes_on(fit, make, tmp_path / "saved", Way(counted=False)) == by_hand(make)


# ---------------------------------------------------------------------- with workers

QUICK = ["sampler that draws as it goes", "sampler with a state, that remembers", "tuples of indices", "persistent workers, own generator"]
WITH_WORKERS = {**KINDS, **PREFETCHING}


def with_workers(kind: str, workers: int) -> Callable[[], Any]:
    return lambda: WITH_WORKERS[kind](num_workers=workers)


@pytest.mark.parametrize("kind", QUICK)
def test_with_workers_the_order_is_that_of_a_loop_by_hand_and_goes_on(kind: str, fit: Fit, tmp_path: Path) -> None:
    make = with_workers(kind, 2)
    whole, hand = goes_on(fit, make, tmp_path / "saved", Way(["02", "05-edge"])), by_hand(make)
    assert indices(whole.batches) == indices(hand.batches)
    assert (whole.generators, whole.loads) == (hand.generators, hand.loads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_WORKERS)
def test_with_workers_any_loader_goes_on_after_any_batch(kind: str, fit: Fit, tmp_path: Path) -> None:
    make = with_workers(kind, 2)
    whole, hand = goes_on(fit, make, tmp_path / "saved", Way()), by_hand(make)
    assert indices(whole.batches) == indices(hand.batches)
    assert (whole.generators, whole.loads) == (hand.generators, hand.loads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_WORKERS)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_goes_on_with_another_number_of_workers(kind: str, workers: int, fit: Fit, tmp_path: Path) -> None:
    way = Way(["01", "04", "04-edge", "05", "05-edge", "07"], again=with_workers(kind, workers))
    goes_on(fit, with_workers(kind, 2), tmp_path / "saved", way)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_WORKERS)
def test_with_workers_epochs_that_a_limit_cuts_go_on(kind: str, fit: Fit, tmp_path: Path) -> None:
    way = Way(["01", "03", "03-edge", "05", "06", "06-edge"], counted=False)  # workers load ahead
    goes_on(fit, with_workers(kind, 2), tmp_path / "saved", way, limit_train_batches=3, max_epochs=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Choosy, Foresighted, Headstrong])
def test_with_workers_a_subclass_that_does_as_it_likes_goes_on(kind: type, fit: Fit, tmp_path: Path) -> None:
    goes_on(fit, lambda: kind(Augmented(), 2, shuffle=True, num_workers=2), tmp_path / "saved", Way(counted=False))
