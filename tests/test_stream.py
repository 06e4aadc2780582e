"""The place in the data: every kind of loader gives what a loop by hand gets of it, and goes on exactly where a run was stopped."""

from __future__ import annotations

import importlib
import logging
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)  # fmt: skip

import torchplug
from torchplug import hookimpl
from torchplug.loaders import close
from torchplug.seed import generator_state, own_generators

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

    def __init__(self, draws: bool = True) -> None:
        super().__init__()
        self.loads = torch.zeros(SAMPLES, dtype=torch.int32).share_memory_()
        self.generator, self.draws = torch.Generator().manual_seed(4), draws

    def give(self, index: int) -> Any:
        self.loads[index] += 1
        return {"index": torch.tensor(index), "drawn": draws(), "own": torch.rand((), generator=self.generator) if self.draws else 0}

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
    "flow with a state, that remembers and draws nothing": lambda: DataLoader(RememberedFlow(draws=False), 2),
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
        close(made.run.loaders["train"][0])
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
    "flow with a state, that remembers and draws nothing",
    "a list",
]


@pytest.mark.parametrize("kind", LIMITED)
def test_epochs_that_a_limit_cuts_are_those_of_a_loop_by_hand_and_go_on(kind: str, fit: Fit, tmp_path: Path) -> None:
    make = KINDS.get(kind) or BY_THEMSELVES[kind]
    way = Way(counted=not kind.startswith("flow"))  # samples are loaded to see what a new iterator does
    whole = goes_on(fit, make, tmp_path / "saved", way, limit_train_batches=3, max_epochs=3)
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
FEW = [
    "shuffled",
    "own generator",
    "sampler that draws at once",
    "sampler with a state, that goes back",
    "sampler with a state, that remembers",
    "sampler with generators that it keeps",
    "no batches",
    "subclass",
    "persistent workers",
    "persistent workers, own generator",
]


def some(kind: str, *stops: str) -> list[str]:
    """Two of the places, others for each kind: workers take their time to start."""
    return random.Random(kind).sample(stops, 2)


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
def test_with_workers_any_loader_goes_on(kind: str, fit: Fit, tmp_path: Path) -> None:
    make = with_workers(kind, 2)
    whole, hand = goes_on(fit, make, tmp_path / "saved", Way(some(kind, "01", "04", "05", "05-edge", "07"))), by_hand(make)
    assert indices(whole.batches) == indices(hand.batches)
    assert (whole.generators, whole.loads) == (hand.generators, hand.loads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_goes_on_with_another_number_of_workers(kind: str, workers: int, fit: Fit, tmp_path: Path) -> None:
    way = Way(some(f"{kind}{workers}", "01", "04", "05-edge", "07"), again=with_workers(kind, workers))
    goes_on(fit, with_workers(kind, 2), tmp_path / "saved", way)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
def test_with_workers_epochs_that_a_limit_cuts_go_on(kind: str, fit: Fit, tmp_path: Path) -> None:
    way = Way(some(kind, "01", "03", "03-edge", "05", "06-edge"), counted=False)  # workers load ahead
    goes_on(fit, with_workers(kind, 2), tmp_path / "saved", way, limit_train_batches=3, max_epochs=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Choosy, Foresighted, Headstrong])
def test_with_workers_a_subclass_that_does_as_it_likes_goes_on(kind: type, fit: Fit, tmp_path: Path) -> None:
    goes_on(fit, lambda: kind(Augmented(), 2, shuffle=True, num_workers=2), tmp_path / "saved", Way(counted=False))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_begin_with_nothing_find_the_data_set(method: str, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "importable_data.py").write_text(
        textwrap.dedent("""
        import torch

        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 9

            def __getitem__(self, index):
                return {"index": torch.tensor(index), "drawn": torch.rand(3, dtype=torch.float64)}
        """)
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    data = importlib.import_module("importable_data").Data()

    def make(how: str = method) -> Any:
        return DataLoader(data, 2, shuffle=True, num_workers=1, persistent_workers=True, multiprocessing_context=how)

    assert goes_on(fit, make, tmp_path / "saved", Way(["03"])) == fit(lambda: make("fork"))
    del sys.modules["importable_data"]


# ---------------------------------------------------------------------- what workers draw


def jittered(samples: list[Any]) -> Any:
    """A collate function that draws too."""
    return {**default_collate(samples), "own": draws()}


class Validated(Watcher):
    """Validates on random data as well, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.validated: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(plain(batch))


def plain_numbers(batches: list[Any]) -> list[Any]:
    return [[*batch["drawn"], batch["own"]] for batch in batches]


@pytest.fixture
def numbers(trainer: Any) -> Callable[..., tuple[list[Any], list[Any]]]:
    """``numbers(workers)`` are those that training and validation batches of two epochs bring."""

    def run(workers: int, start: Path | None = None, save: Path | None = None, **options: Any) -> tuple[list[Any], list[Any]]:
        seed(5 if start is None else 77)
        module = Validated()
        made = trainer(max_epochs=2, plugins=[Saver(save, ["02", "05-edge"])] if save else [], val_check_interval=4)
        loaders = [DataLoader(Augmented(), 2, shuffle=True, collate_fn=jittered, num_workers=workers, **options) for _ in range(2)]
        made.fit(module, *loaders, ckpt_path=start)
        for loader in (*made.run.loaders["train"], *made.run.loaders["validate"]):
            close(loader)
        return plain_numbers(module.batches), plain_numbers(module.validated)

    return run


@pytest.mark.parametrize("persistent", [False, True])
def test_what_workers_draw_is_the_same_for_any_number_of_them_and_new_each_time(persistent: bool, numbers: Any) -> None:
    trained, validated = numbers(1, persistent_workers=persistent)
    assert numbers(2, persistent_workers=persistent) == (trained, validated)
    each = [number for batch in (*trained, *validated) for sample in batch for number in sample]
    assert len(each) == len(set(each)) == 2 * (2 * 9 + 2 * 5) * 3


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_what_workers_draw_is_the_same_wherever_a_run_was_stopped(persistent: bool, workers: int, numbers: Any, tmp_path: Path) -> None:
    trained, validated = numbers(2, save=tmp_path / "saved", persistent_workers=persistent)
    assert numbers(3, persistent_workers=persistent) == (trained, validated)
    assert numbers(workers, tmp_path / "saved" / "02", persistent_workers=persistent) == (trained[2:], validated)
    assert numbers(workers, tmp_path / "saved" / "05-edge", persistent_workers=persistent) == (trained[5:], validated[5:])


class Quiet(Validated):
    """Draws nothing itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(plain(batch))
        return self.weight.sum()


def test_what_workers_draw_depends_on_the_seed_and_is_new_in_each_epoch_though_nothing_else_is_drawn(trainer: Any) -> None:
    def run(number: int) -> list[float]:
        seed(number)
        module, made = Quiet(), trainer(max_epochs=2)
        loaders = [DataLoader(Augmented(), 2, collate_fn=jittered, num_workers=1, persistent_workers=True) for _ in range(2)]
        made.fit(module, *loaders)
        for loader in (*made.run.loaders["train"], *made.run.loaders["validate"]):
            close(loader)
        batches = plain_numbers(module.batches) + plain_numbers(module.validated)
        return [number for batch in batches for sample in batch for number in sample]

    assert len({*run(5), *run(6)}) == 2 * 2 * 2 * (9 + 5) * 3


class Repeated(DataLoader):
    """Every epoch is two passes."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(2):
            yield from super().__iter__()


def test_workers_draw_new_numbers_in_a_second_pass_of_the_same_epoch(fit: Fit) -> None:
    seen = fit(lambda: Repeated(Augmented(), 2, num_workers=1), max_epochs=1)
    each = [number for batch in seen.batches for sample in batch["drawn"] for number in sample]
    assert len(each) == len(set(each)) == 2 * SAMPLES * 3


# ---------------------------------------------------------------------- the user's own loader


@pytest.mark.parametrize("kind", ["shuffled", "own generator", "batches of a sampler with a generator", "subclass", "a batch at once"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_is_after_a_run_what_it_was_before(kind: str, workers: int, fit: Fit) -> None:
    used, fresh = KINDS[kind](num_workers=workers), KINDS[kind](num_workers=workers)
    before = dict(vars(used))
    fit(lambda: used)
    assert vars(used) == before
    for loader in (used, fresh):
        for generator in own_generators([loader]):
            generator.manual_seed(8)
    seed(8)
    by_used = [plain(batch) for batch in used]
    seed(8)
    assert by_used == [plain(batch) for batch in fresh]


def test_a_loader_with_persistent_workers_keeps_its_own(fit: Fit) -> None:
    loader = KINDS["shuffled"](num_workers=1, persistent_workers=True)
    list(loader)
    workers = loader._iterator
    assert fit(lambda: loader).batches == fit(with_workers("persistent workers", 1)).batches
    assert loader._iterator is workers and len(list(loader)) == BATCHES
    del loader._iterator


def test_one_loader_may_be_trained_and_validated_on(trainer: Any) -> None:
    loader, module = DataLoader(Augmented(), 2, shuffle=True, collate_fn=jittered), Validated()
    trainer(max_epochs=2).fit(module, loader, loader)
    assert [sorted(index for batch in epoch for index in batch["index"]) for epoch in (module.batches[:5], module.validated[5:])] == [
        list(range(SAMPLES))
    ] * 2


# ---------------------------------------------------------------------- data that cannot be reached by index

SAID = "a run that is resumed in mid-epoch loads the batches that were seen once more"


class Own:
    """An iterable of batches that is nothing else."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(BATCHES):
            yield {"index": torch.randint(100, (2,)), "drawn": draws()}


class OwnWithState(Place):
    """An iterable of batches that can say where it is."""

    def give(self, index: int) -> Any:
        return {"index": torch.tensor([index]), "drawn": draws()}


class Lazy(Sequence):
    """Batches by number, each made when it is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, number: int) -> Any:
        if number >= BATCHES:
            raise IndexError(number)
        self.asked.append(number)
        return {"index": torch.tensor([number]), "drawn": draws()}


@pytest.mark.parametrize("make", [Own, lambda: DataLoader(Shards(), 2)], ids=["own", "iterable data set"])
def test_data_without_a_state_are_passed_over_which_is_said_at_the_start(make: Any, fit: Fit, tmp_path: Path, caplog: Any) -> None:
    assert goes_on(fit, make, tmp_path / "saved", Way(counted=False)) == by_hand(make)
    caplog.clear()
    fit(make)
    said = [record for record in caplog.records if SAID in record.message]
    assert [record.levelno for record in said] == [logging.INFO]


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_of_an_iterable_data_set_go_on(persistent: bool, fit: Fit, tmp_path: Path) -> None:
    def make() -> Any:
        return DataLoader(Shards(), 2, num_workers=2, persistent_workers=persistent)

    assert goes_on(fit, make, tmp_path / "saved", Way(["01", "05", "06", "06-edge", "08"], counted=False)) == by_hand(make)


def test_an_iterable_with_a_state_goes_on_at_its_place(fit: Fit, tmp_path: Path, caplog: Any) -> None:
    assert goes_on(fit, OwnWithState, tmp_path / "saved", Way()) == by_hand(OwnWithState)
    assert SAID not in caplog.text


def test_batches_by_number_are_made_once(fit: Fit, tmp_path: Path, caplog: Any) -> None:
    made: list[Lazy] = []

    def make() -> Lazy:
        made.append(Lazy())
        return made[-1]

    goes_on(fit, make, tmp_path / "saved", Way(["03"]))
    assert made[-1].asked == [3, 4, 0, 1, 2, 3, 4]
    assert SAID not in caplog.text


def test_a_data_set_whose_state_workers_keep_to_themselves_is_said_at_the_start(fit: Fit, caplog: Any) -> None:
    fit(lambda: DataLoader(Learning(), 2, num_workers=1), max_epochs=1)
    assert "Learning has a state, but workers have copies of it that a DataLoader cannot ask" in caplog.text


def test_batches_in_any_order_are_said_at_the_start(fit: Fit, caplog: Any) -> None:
    fit(lambda: DataLoader(Augmented(), 2, num_workers=1, in_order=False), max_epochs=1)
    assert "in_order=False gives batches in any order" in caplog.text


@pytest.mark.parametrize("kind", ["shuffled", "sampler with a state, that remembers", "data set with a state", "a list"])
def test_nothing_is_said_of_data_whose_place_is_exact(kind: str, fit: Fit, caplog: Any) -> None:
    fit(KINDS.get(kind) or BY_THEMSELVES[kind])
    assert not [record for record in caplog.records if "resumed" in record.message or "state" in record.message]


# ---------------------------------------------------------------------- torchdata


@pytest.fixture
def stateful() -> Any:
    """torchdata's loader, which says of itself where it is."""
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader


TORCHDATA_KINDS: dict[str, Callable[..., Any]] = {
    "map": lambda loader, **o: loader(Augmented(), 2, shuffle=True, **o),
    "map, own generator": lambda loader, **o: loader(Augmented(), 2, shuffle=True, generator=own(), **o),
    "map with a state": lambda loader, **o: loader(Learning(), 2, shuffle=True, **o),
    "flow that goes back": lambda loader, **o: loader(Flow(), 2, **o),
    "flow that remembers": lambda loader, **o: loader(RememberedFlow(), 2, **o),
    "flow that remembers and draws nothing": lambda loader, **o: loader(RememberedFlow(draws=False), 2, **o),
    "flow that remembers, full batches": lambda loader, **o: loader(RememberedFlow(), 3, **o),
}
LASTING = ["map", "map, own generator", "map with a state", "flow that goes back"]  # a worker that has not begun says where it ended
ENDLESS = ["flow that remembers", "flow that remembers, full batches"]  # whose own generator nobody can put back without its place


@TORCHDATA
@pytest.mark.parametrize(
    ("kind", "limit"),
    [*((kind, None) for kind in TORCHDATA_KINDS), *((kind, 2) for kind in TORCHDATA_KINDS if kind not in ENDLESS)],
)
def test_a_stateful_loader_goes_on(kind: str, limit: int | None, stateful: Any, fit: Fit, tmp_path: Path) -> None:
    def make() -> Any:
        return TORCHDATA_KINDS[kind](stateful)

    options = {} if limit is None else {"limit_train_batches": limit}
    whole = goes_on(fit, make, tmp_path / "saved", Way(counted=limit is None), max_epochs=3, **options)
    assert whole == by_hand(make, limit, epochs=3)


@TORCHDATA
@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("kind", TORCHDATA_KINDS)
def test_a_stateful_loader_with_workers_goes_on(kind: str, limit: int | None, stateful: Any, fit: Fit, tmp_path: Path) -> None:
    def make() -> Any:
        return TORCHDATA_KINDS[kind](stateful, num_workers=2)

    stateful_goes_on(make, kind, limit, fit, tmp_path / "saved")


@TORCHDATA
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "limit"), [*((kind, None) for kind in LASTING), ("map", 2), ("map, own generator", 2)])
def test_a_stateful_loader_with_persistent_workers_goes_on(kind: str, limit: int | None, stateful: Any, fit: Fit, tmp_path: Path) -> None:
    def make() -> Any:
        return TORCHDATA_KINDS[kind](stateful, num_workers=2, persistent_workers=True)

    stateful_goes_on(make, kind, limit, fit, tmp_path / "saved")


def stateful_goes_on(make: Callable[[], Any], kind: str, limit: int | None, fit: Fit, folder: Path) -> None:
    options = {} if limit is None else {"limit_train_batches": limit}
    ends = some(kind, *(["01", "02", "02-edge", "03"] if limit else ["01", "05", "05-edge", "06", "06-edge", "07"]))
    by_index = kind in ("map", "map, own generator")
    whole = goes_on(fit, make, folder, Way(ends, counted=by_index and limit is None, content=by_index), **options)
    assert indices(whole.batches) == indices(by_hand(make, limit).batches)
