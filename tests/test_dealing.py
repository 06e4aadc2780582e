"""Dealing out data: together the ranks see what one process sees, step by step, and each goes on exactly where it was stopped."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)  # fmt: skip

from torchplug.dealing import dealt, share_of, shares_itself, shares_of
from torchplug.loaders import again, by_number, close, exact, indices_of, rebatched
from torchplug.seed import generator_state, own_generators, preserved, restore_generators
from torchplug.stream import Stream
from torchplug.stream import alike as same

SAMPLES = 11

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more than a small machine has cores
]


# ---------------------------------------------------------------------- ranks, one after the other


class Line:
    """Rank 0 speaks first and the others hear it later: each value as it was, and by all of them equally often."""

    def __init__(self) -> None:
        self.said: list[bytes] = []
        self.heard: dict[int, int] = {}

    def of(self, rank: int) -> Callable[[Any], Any]:
        self.heard[rank] = 0

        def alike(value: Any) -> Any:
            self.heard[rank] += 1
            if rank == 0:
                self.said.append(pickle.dumps(value))
            return pickle.loads(self.said[self.heard[rank] - 1])

        return alike

    def silent(self) -> None:
        assert set(self.heard.values()) == {len(self.said)}, "a rank did not listen"


def seed(number: int) -> None:
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)


def dropout() -> None:
    """Something draws between two batches, and differently on every rank."""
    random.random(), numpy.random.random(), torch.rand(())


def nothing() -> None:
    """Nothing does, so that steps of different length can be compared."""


def on_ranks(world: int, make: Callable[[], Any], work: Callable[[Any, int], Any], stage: str = "train", start: int = 5) -> list[Any]:
    """What ``work(loader, rank)`` gives on each rank; the global generators stand elsewhere on each."""
    line, found = Line(), []
    for rank in range(world):
        seed(start + 10 * rank)
        found.append(work(dealt(make(), stage, rank, world, line.of(rank)), rank))
    line.silent() if world > 1 else None
    return found


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: plain(part) for name, part in batch.items()}
    return batch.tolist() if isinstance(batch, Tensor) else list(batch) if isinstance(batch, (list, tuple)) else batch


def epochs(loader: Any, number: int = 2, between: Callable[[], None] = dropout) -> list[list[tuple[Any, float]]]:
    """Batches and their shares, epoch by epoch."""
    found = []
    for _ in range(number):
        found.append(list[tuple[Any, float]]())
        for batch_idx, batch in enumerate(loader):
            found[-1].append((plain(batch), share_of(loader, batch_idx)))
            between()
    return found


def counted(ranks: Sequence[Sequence[tuple[Any, float]]]) -> list[list[Any]]:
    """The samples of each step that count, in the order of the ranks."""
    assert len({len(batches) for batches in ranks}) == 1, "ranks differ in the number of batches"
    return [list(chain(*(batch for batch, share in step if share))) for step in zip(*ranks, strict=True)]


class Numbers(Dataset):
    """Sample i is i."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: Any) -> Any:
        return torch.tensor(index)


# ---------------------------------------------------------------------- samplers


class FromPython(Sampler):
    """Draws from Python's generator as it goes."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield random.randrange(1000)


class FromNumpy(FromPython):
    """Draws from NumPy's generator at once, when it is asked for an iterator."""

    def __iter__(self) -> Iterator[int]:
        return iter(numpy.random.permutation(SAMPLES).tolist())


class Endless(Sampler):
    """Does not say how long it is: draws as it goes, from a global generator and from one that it keeps."""

    def __init__(self, samples: int = 1000) -> None:
        self.samples, self.own, self.given = samples, random.Random(1), 0

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.samples):
            self.given += 1
            yield int(torch.randint(1000, ())) + 1000 * self.own.randrange(1000)


class Hidden(FromPython):
    """Draws from where nobody can look."""

    def __iter__(self) -> Iterator[int]:
        return iter([random.SystemRandom().randrange(10**9)] * SAMPLES)


class Unlike(FromPython):
    """Has a generator that begins elsewhere on every rank."""

    def __init__(self) -> None:
        self.numpy = numpy.random.default_rng(random.randrange(10**9))

    def __iter__(self) -> Iterator[int]:
        return iter(self.numpy.permutation(SAMPLES).tolist())


class Turning(FromPython):
    """Another order in each epoch that it is told, and a place that it remembers: after a state was loaded it goes on there."""

    epoch = begin = place = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        begin, self.begin = self.begin, 0
        for self.place in range(begin + 1, SAMPLES + 1):
            yield (3 * self.place + self.epoch) % SAMPLES

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = self.place = state["place"]


class Counting(FromPython):
    """Counts how often it was asked."""

    asked = 0

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        return iter([(self.asked + place) % SAMPLES for place in range(SAMPLES)])


class Pairs(Sampler):
    """Batches of one to three samples, drawn at once."""

    def __init__(self, batches: int = 5) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        sizes = torch.randint(1, 4, (self.batches,)).tolist()
        return iter([[random.randrange(1000) for _ in range(size)] for size in sizes])


def own(number: int = 6) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def numbers_of(samples: list[Tensor]) -> Tensor:
    return torch.stack(samples).flatten()


WEIGHTS = [0.1 + i for i in range(SAMPLES)]
SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "in order": dict,
    "shuffled": lambda: {"shuffle": True},
    "own generator": lambda: {"shuffle": True, "generator": own()},
    "a generator of the loader, another of the sampler": lambda: {
        "generator": own(), "sampler": RandomSampler(range(SAMPLES), generator=own(7)),
    },
    "replacement": lambda: {"sampler": RandomSampler(range(SAMPLES), replacement=True, num_samples=40)},
    "replacement, own generator": lambda: {"sampler": RandomSampler(range(SAMPLES), replacement=True, generator=own())},
    "weighted": lambda: {"sampler": WeightedRandomSampler(WEIGHTS, SAMPLES)},
    "subset": lambda: {"sampler": SubsetRandomSampler(range(2, 9))},
    "of Python's generator": lambda: {"sampler": FromPython()},
    "of NumPy's generator": lambda: {"sampler": FromNumpy()},
    "with a state": lambda: {"sampler": Turning()},
}  # fmt: skip


def shuffled(size: int, **options: Any) -> Callable[[], DataLoader]:
    return lambda: DataLoader(Numbers(), size, shuffle=True, **options)


# ---------------------------------------------------------------------- training


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.booleans())
def test_the_ranks_see_in_each_step_what_one_process_with_the_larger_batch_sees(
    samples: int, size: int, world: int, drop_last: bool, shuffle: bool
) -> None:
    def make(size: int = size) -> DataLoader:
        return DataLoader(Numbers(samples), size, shuffle=shuffle, drop_last=drop_last)

    seed(5)
    steps = [[batch.tolist() for batch in make(size * world)] for _ in range(2)]
    if not steps[0]:
        if world > 1:
            with pytest.raises(ValueError, match="too few for one step on"):
                on_ranks(world, make, lambda loader, rank: None)
        return
    ranks = on_ranks(world, make, lambda loader, rank: (len(loader), epochs(loader)))
    seed(5)
    loader = make(size * world)
    whole = [[plain(batch) for batch, _ in epoch] for epoch in epochs(loader)]
    assert whole[0] == steps[0]
    for epoch in range(2):
        own = [found[epoch] for _, found in ranks]
        assert counted(own) == whole[epoch]
        for step, parts in zip(whole[epoch], zip(*own, strict=True), strict=True):
            sizes = [len(batch) if share else 0 for batch, share in parts]
            assert max(sizes) - min(sizes) <= 1
            assert all(len(batch) == 1 and batch[0] in step for batch, share in parts if not share)
    assert {length for length, _ in ranks} == {len(loader)}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(2, 4))
def test_with_its_shares_the_mean_of_the_gradients_is_that_of_the_global_batch(samples: int, size: int, world: int) -> None:
    x, y = torch.randn(samples, 3, dtype=torch.float64), torch.randn(samples, dtype=torch.float64)

    def gradient(indices: list[int]) -> Tensor:
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        ((x[indices] @ weight - y[indices]) ** 2).mean().backward()
        assert weight.grad is not None
        return weight.grad

    ranks = on_ranks(world, lambda: DataLoader(Numbers(samples), size, shuffle=True), lambda loader, rank: epochs(loader, 1)[0])
    seed(5)
    for step, parts in zip(DataLoader(Numbers(samples), size * world, shuffle=True), zip(*ranks, strict=True), strict=True):
        mean = sum(share * gradient(batch) for batch, share in parts) / world
        torch.testing.assert_close(mean, gradient(step.tolist()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("world", [2, 3])
def test_the_order_is_that_of_the_sampler_on_rank_0_wherever_the_generators_of_others_stand(kind: str, world: int) -> None:
    ends: list[Any] = []

    def work(loader: Any, rank: int) -> Any:
        found = epochs(exact(loader))
        ends.append([generator.get_state() for generator in own_generators([loader])])
        return found

    def make(size: int = 2) -> DataLoader:
        return DataLoader(Numbers(), size, **SAMPLERS[kind]())

    ranks = on_ranks(world, make, work)
    seed(5)
    whole = make(2 * world)
    lazily = kind == "of Python's generator"  # one process draws it in between: only the first epoch can be compared
    for epoch, batches in enumerate(epochs(exact(whole), 1 if lazily else 2)):
        steps = counted([found[epoch] for found in ranks])
        if not lazily:
            assert steps == [batch for batch, _ in batches]
    if lazily:
        seed(5)
        iterator = iter(whole)
        assert counted([found[0] for found in ranks]) == [plain(batch) for batch in iterator]
    assert all(same(states, [generator.get_state() for generator in own_generators([whole])]) for states in ends)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_generators_are_afterwards_where_they_were_and_on_rank_0_where_one_process_leaves_them(kind: str, workers: int) -> None:
    def work(loader: Any, rank: int) -> Any:
        for _ in range(2):
            list(loader)
        return generator_state()

    def make(size: int = 2) -> DataLoader:
        return DataLoader(Numbers(200), size, num_workers=workers, **SAMPLERS[kind]())

    ranks = on_ranks(2, make, work)
    seed(5)
    assert same(ranks[0], work(make(4), 0))
    seed(15)
    for _ in range(2):
        loader = DataLoader(Numbers(), num_workers=workers, generator=make().generator)
        list(loader)
    assert same(ranks[1], generator_state())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", [Counting, FromNumpy])
def test_a_sampler_that_begins_at_once_is_asked_equally_often_on_all_ranks(workers: int, sampler: Any) -> None:
    def make() -> DataLoader:
        return DataLoader(Numbers(), batch_size=None, sampler=sampler(), num_workers=workers)

    ranks = on_ranks(2, make, lambda loader, rank: epochs(exact(loader), 2, nothing))
    seed(5)
    for epoch, whole in enumerate(epochs(exact(make()), 2, nothing)):
        assert groups([sample for sample, _ in whole], 2) == [
            [sample for sample, share in step if share] for step in zip(*(found[epoch] for found in ranks), strict=True)
        ]


@pytest.mark.parametrize("stage", ["train", "validate"])
def test_what_is_preserved_with_a_loader_is_preserved_with_its_part(stage: str) -> None:
    sampler = RandomSampler(range(SAMPLES), generator=own())
    loader = exact(dealt(DataLoader(Numbers(), batch_sampler=BatchSampler(sampler, 2, False)), stage, 0, 2, Line().of(0)))
    before = sampler.generator.get_state()
    with preserved(loader):
        assert len(list(loader)) == 3 and not same(sampler.generator.get_state(), before)
    assert same(sampler.generator.get_state(), before)


def elsewhere() -> RandomSampler:
    return RandomSampler(range(SAMPLES), generator=own(random.randrange(10**9)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Numbers(), 2, sampler=Unlike()),
        lambda: DataLoader(Numbers(), 2, sampler=elsewhere()),
        lambda: DataLoader(Numbers(), 2, sampler=BatchSampler(BatchSampler(elsewhere(), 1, False), 1, False), collate_fn=numbers_of),
    ],
)
def test_a_generator_of_a_sampler_that_begins_elsewhere_on_each_rank_is_put_to_that_of_rank_0(make: Any) -> None:
    ranks = on_ranks(2, make, lambda loader, rank: epochs(loader))
    for epoch in range(2):
        assert sorted(chain(*counted([found[epoch] for found in ranks]))) == list(range(SAMPLES))
    assert ranks[0][0] != ranks[0][1]


def test_an_order_that_is_not_the_same_on_all_ranks_is_an_error() -> None:
    def work(loader: Any, rank: int) -> None:
        if rank == 0:
            list(loader)
        else:
            with pytest.raises(RuntimeError, match=r"another one on rank 1 than on rank 0: the data sets differ.*Hidden"):
                list(loader)

    on_ranks(2, lambda: DataLoader(Numbers(), 2, sampler=Hidden()), work)
    sizes = iter([8, 9])
    with pytest.raises(RuntimeError, match="another one on rank 1"):
        on_ranks(2, lambda: DataLoader(Numbers(next(sizes)), 2), lambda loader, rank: list(loader))


def test_a_sampler_that_does_not_say_how_long_it_is_is_drawn_from_bit_by_bit() -> None:
    def make() -> DataLoader:
        return DataLoader(Numbers(), 2, sampler=Endless())

    line, ranks = Line(), []
    for rank in range(2):
        seed(5 + rank)
        loader = dealt(make(), "train", rank, 2, line.of(rank))
        with pytest.raises(TypeError):
            len(loader)
        ranks.append(epochs(loader))
    line.silent()
    assert len(line.said) == 4  # two for each epoch, however long it is
    seed(5)
    assert list(chain(*counted([found[0] for found in ranks]))) == [plain(each) for each in chain(*make())]
    assert ranks[0][0] != ranks[0][1]
    loader = dealt(make(), "train", 0, 2, Line().of(0))
    batches, state = iter(loader), None
    for number, _ in enumerate(batches):
        if number == 0:
            assert 0 < loader.sampler.given < 500
            state = generator_state()
    assert loader.sampler.given == 1000 and same(generator_state(), state)  # what is drawn later moves nobody's generators


# ---------------------------------------------------------------------- batches that are made elsewhere


def groups(batches: Sequence[Any], world: int) -> list[list[Any]]:
    return [list(batches[i : i + world]) for i in range(0, len(batches), world)]


def mean_share(sizes: Sequence[int], world: int) -> list[float]:
    return [size * world / sum(sizes) for size in sizes] + [0.0] * (world - len(sizes))


@pytest.mark.parametrize("batches", [1, 4, 5, 6, 7])
@pytest.mark.parametrize("world", [2, 3])
def test_batches_of_a_batch_sampler_are_dealt_out_one_by_one(batches: int, world: int) -> None:
    ranks = on_ranks(
        world, lambda: DataLoader(Numbers(), batch_sampler=Pairs(batches)), lambda loader, rank: epochs(exact(loader), 2, nothing)
    )
    seed(5)
    for epoch, whole in enumerate(epochs(exact(DataLoader(Numbers(), batch_sampler=Pairs(batches))), 2, nothing)):
        expected = groups([batch for batch, _ in whole], world)
        for step, group in enumerate(expected):
            parts = [found[epoch][step] for found in ranks]
            shares = mean_share([len(batch) for batch in group], world)
            assert parts == [(batch, share) for batch, share in zip(group + group[:1] * world, shares, strict=False)]
        assert {len(found[epoch]) for found in ranks} == {len(expected)}


@pytest.mark.parametrize("world", [2, 3])
def test_without_batches_samples_are_dealt_out_one_by_one(world: int) -> None:
    def work(loader: Any, rank: int) -> Any:
        return len(loader), epochs(exact(loader), 2, nothing)[1]

    ranks = on_ranks(world, lambda: DataLoader(Numbers(), batch_size=None, shuffle=True), work)
    seed(5)
    whole = epochs(exact(DataLoader(Numbers(), batch_size=None, shuffle=True)), 2, nothing)[1]
    for step, group in enumerate(groups([sample for sample, _ in whole], world)):
        shares = mean_share([1] * len(group), world)
        assert [found[step] for _, found in ranks] == list(zip(group + group[:1] * world, shares, strict=False))
    assert {length for length, _ in ranks} == {-(-SAMPLES // world)}


class Sized:
    """Batches that are a sequence only by their length."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.epoch = list(batches), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Lazy(Sequence):
    """Batches by number; knows which were asked for."""

    def __init__(self, batches: int) -> None:
        self.batches, self.asked = batches, list[int]()

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> Any:
        if number >= self.batches:
            raise IndexError(number)
        self.asked.append(number)
        return torch.tensor([number, number])


class Unsized:
    """Batches whose number nobody knows."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.batches):
            yield torch.tensor([number, number])


class Resumable(Unsized):
    """Knows its place in between."""

    place = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        while self.place < self.batches:
            self.place += 1
            yield torch.tensor([self.place - 1] * 2)
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


@pytest.mark.parametrize("kind", [list, tuple, Sized])
@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [2, 2, 2, 1], [3, 1, 2], [1], [2, 2, 2, 2, 2]])
@pytest.mark.parametrize("world", [2, 3])
def test_batches_without_a_loader_are_dealt_out_one_by_one(kind: Any, sizes: list[int], world: int) -> None:
    batches = [torch.full((size,), i) for i, size in enumerate(sizes)]
    ranks = on_ranks(world, lambda: kind(batches), lambda loader, rank: (len(loader), by_number(loader), epochs(loader)))
    for step, group in enumerate(groups([batch.tolist() for batch in batches], world)):
        shares = mean_share([len(batch) for batch in group], world)
        for epoch in range(2):
            assert [found[epoch][step] for _, _, found in ranks] == list(zip(group + group[:1] * world, shares, strict=False))
    assert {found[:2] for found in ranks} == {(-(-len(sizes) // world), kind is not Sized)}


def test_of_batches_by_number_only_the_own_ones_are_made() -> None:
    sources: list[Lazy] = []

    def work(loader: Any, rank: int) -> Any:
        assert by_number(loader)
        found = epochs(loader, 1)[0]
        assert plain(loader[-1]) == found[-1][0]
        with pytest.raises(IndexError):
            loader[3]
        return found

    def make() -> Lazy:
        sources.append(Lazy(5))
        return sources[-1]

    ranks = on_ranks(2, make, work)
    assert [source.asked for source in sources] == [[0, 2, 4, 4], [1, 3, 4, 4]]
    assert [[share for _, share in found] for found in ranks] == [[1.0, 1.0, 2.0], [1.0, 1.0, 0.0]]


@pytest.mark.parametrize("make", [lambda: Unsized(5), lambda: Resumable(5), lambda: iter(Unsized(5))], ids=["unsized", "state", "iterator"])
def test_of_batches_whose_number_nobody_knows_every_second_one_is_taken(make: Any) -> None:
    ranks = on_ranks(2, make, lambda loader, rank: epochs(loader, 1)[0])
    if hasattr(make(), "__len__"):
        assert [len(dealt(make(), "train", rank, 2, Line().of(rank))) for rank in range(2)] == [3, 2]
    assert [[(batch[0], share) for batch, share in found] for found in ranks] == [[(0, 1.0), (2, 1.0), (4, 1.0)], [(1, 1.0), (3, 1.0)]]


def test_an_iterator_stays_one_and_an_iterable_keeps_its_methods() -> None:
    loader = dealt(iter([1, 2]), "train", 0, 2, Line().of(0))
    with pytest.raises(TypeError, match="cannot be begun again"):
        again(loader)
    source = Sized([])
    dealt(source, "predict", 0, 2, Line().of(0)).set_epoch(3)
    assert source.epoch == 3


class Flow(IterableDataset):
    """Its own author's business."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


@pytest.mark.parametrize("stage", ["train", "test"])
def test_a_loader_over_an_iterable_data_set_is_left_alone(stage: str) -> None:
    loader = DataLoader(Flow(), 2)
    assert dealt(loader, stage, 1, 2, Line().of(1)) is loader and shares_itself(loader) and share_of(loader, 2) == 1.0
    assert not shares_itself(DataLoader(Numbers(), 2)) and not shares_itself([1])


# ---------------------------------------------------------------------- evaluation


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.booleans(), st.sampled_from(["validate", "test", "predict"])
)
def test_evaluation_sees_each_batch_of_one_process_once(
    samples: int, size: int, world: int, drop_last: bool, shuffle: bool, stage: str
) -> None:
    def make() -> DataLoader:
        return DataLoader(Numbers(samples), size, shuffle=shuffle, drop_last=drop_last)

    ranks = on_ranks(world, make, lambda loader, rank: (len(loader), epochs(loader, 1)[0]), stage)
    seed(5)
    whole = [batch.tolist() for batch in make()]
    for rank, (length, found) in enumerate(ranks):
        assert found == [(batch, 1.0) for batch in whole[rank::world]]
        assert length == len(found)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Numbers(), batch_sampler=Pairs()),
        lambda: DataLoader(Numbers(5), batch_size=None, shuffle=True),
        lambda: [torch.tensor([i]) for i in range(5)],
        lambda: Lazy(5),
        lambda: Sized(torch.arange(5)),
        lambda: Unsized(5),
        lambda: iter(Unsized(5)),
        lambda: DataLoader(Numbers(), 2, sampler=Endless(10)),
    ],
)
@pytest.mark.parametrize("world", [2, 3, 7])
def test_evaluation_deals_out_batches_of_any_kind_once(make: Any, world: int) -> None:
    ranks = on_ranks(world, make, lambda loader, rank: (by_number(loader), epochs(loader, 1)[0]), "validate")
    seed(5)
    source = make()
    numbered, whole = by_number(source), [plain(batch) for batch in source]
    assert ranks == [(numbered, [(batch, 1.0) for batch in whole[rank::world]]) for rank in range(world)]


def test_evaluation_in_order_asks_nobody() -> None:
    line = Line()
    for make in (lambda: DataLoader(Numbers(3), 2), lambda: DataLoader(Numbers(3), batch_size=None, sampler=range(1))):
        assert len(list(dealt(make(), "test", 2, 3, line.of(2)))) == 0
    assert line.heard == {2: 0}


# ---------------------------------------------------------------------- going on in mid-epoch

RESUMED: dict[str, Callable[..., Any]] = {
    **{kind: lambda kind=kind, **o: DataLoader(Numbers(), 2, **SAMPLERS[kind](), **o) for kind in SAMPLERS},
    "endless": lambda **o: DataLoader(Numbers(), 2, sampler=Endless(270), **o),
    "batches": lambda **o: DataLoader(Numbers(), batch_sampler=Pairs(7), **o),
    "batches of a sampler with a generator": lambda **o: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(range(SAMPLES), generator=own()), 2, False), **o
    ),
    "no batches": lambda **o: DataLoader(Numbers(), batch_size=None, shuffle=True, **o),
}
OTHERS = {
    "list": lambda: [torch.full((1 + i % 3,), i) for i in range(7)],
    "sized": lambda: Sized([torch.full((1 + i % 3,), i) for i in range(7)]),
    "unsized": lambda: Unsized(8),
    "state": lambda: Resumable(8),
}


def stream(make: Callable[[], Any], rank: int, world: int, line: Line) -> tuple[Any, Stream]:
    loader = exact(dealt(make(), "train", rank, world, line.of(rank)))
    return loader, Stream(loader, [], None)


def trained(loader: Any, batches: Iterable[Any], first: int, done: Callable[[int], None] = lambda number: None) -> list[Any]:
    """Batches, their shares, and what is drawn in between."""
    found = []
    for number, batch in enumerate(batches, first):
        found.append((plain(batch), share_of(loader, number), random.random(), numpy.random.random(), torch.rand(()).item()))
        done(number + 1)
    return found


def whole_run(place: Stream, loader: Any) -> tuple[list[list[Any]], dict[tuple[int, int], Any]]:
    """Three epochs, and the states after each batch and at the edges."""
    states: dict[tuple[int, int], Any] = {}
    found = []
    for epoch in range(3):

        def save(seen: int, epoch: int = epoch) -> None:
            states[epoch, seen] = pickle.dumps((place.state_dict(seen), generator_state()))

        found.append(trained(loader, place.epoch(epoch, 0), 0, save))
        states[epoch + 1, 0] = pickle.dumps((place.state_dict(0), generator_state()))
    close(loader)
    return found, states


def gone_on(place: Stream, loader: Any, saved: bytes, epoch: int, seen: int) -> list[list[Any]]:
    state, generators = pickle.loads(saved)
    place.load_state_dict(state)
    restore_generators(generators)
    found = [trained(loader, place.epoch(number, done), done) for number, done in zip(range(epoch, 3), (seen, 0, 0), strict=False)]
    close(loader)
    return found


def goes_on(make: Callable[[], Any], world: int, some: Callable[[list[Any]], Iterable[Any]] = list) -> list[list[list[Any]]]:
    line, runs, saved = Line(), [], []
    for rank in range(world):
        seed(5 + 10 * rank)
        loader, place = stream(make, rank, world, line)
        found, states = whole_run(place, loader)
        runs.append(found)
        saved.append(states)
    line.silent()
    for epoch, seen in some(sorted(saved[0])):
        line = Line()
        for rank in range(world):
            seed(77)
            loader, place = stream(make, rank, world, line)
            found = gone_on(place, loader, saved[rank][epoch, seen], epoch, seen)
            assert found == [batches[0 if i else seen :] for i, batches in enumerate(runs[rank][epoch:])], (epoch, seen)
        line.silent()
    return runs


@pytest.mark.parametrize("kind", [*RESUMED, *OTHERS])
def test_each_rank_goes_on_after_any_batch(kind: str) -> None:
    few: Any = (lambda places: places[:: len(places) // 12]) if kind in ("endless", "replacement") else list
    runs = goes_on(RESUMED.get(kind) or OTHERS[kind], 3 if kind == "batches" else 2, few)
    if kind == "with a state":
        for epoch in range(3):  # `set_epoch` is told
            steps = counted([[(batch, share) for batch, share, *_ in run[epoch]] for run in runs])
            assert list(chain(*steps)) == [(3 * place + epoch) % SAMPLES for place in range(1, SAMPLES + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", ["own generator", "batches"])
def test_each_rank_goes_on_with_workers(kind: str, persistent: bool) -> None:
    def make() -> Any:
        return RESUMED[kind](num_workers=2, persistent_workers=persistent)

    runs = goes_on(make, 2, lambda places: [(0, 2), (1, 1), (2, 0)])
    without = goes_on(RESUMED[kind], 2, lambda places: [])
    if kind == "own generator":
        assert [[batch[:2] for batch in run[0]] for run in runs] == [[batch[:2] for batch in run[0]] for run in without]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SAMPLERS, "endless", "batches", "no batches"])
@pytest.mark.parametrize("persistent", [False, True])
def test_each_rank_of_any_kind_goes_on_with_workers(kind: str, persistent: bool) -> None:
    def make() -> Any:
        return RESUMED[kind](num_workers=2, persistent_workers=persistent)

    goes_on(make, 2, lambda places: [places[1], places[-2], *[place for place in places if place in ((1, 0), (1, 1))]])


def test_shares_are_known_before_the_workers_are_asked_and_seen_through_copies() -> None:
    def work(loader: Any, rank: int) -> None:
        copy = exact(loader)
        assert indices_of(copy) is not None and shares_of(copy) is shares_of(loader) is shares_of(again(copy))
        batches = iter(copy)
        next(batches)
        assert shares_of(copy) == ({0: 4 / 3} if rank == 0 else {0: 2 / 3})
        del batches

    on_ranks(2, lambda: DataLoader(Numbers(3), 2, num_workers=1), work)


# ---------------------------------------------------------------------- other batch sizes


@pytest.mark.parametrize("size", [1, 3, 4, 20])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_dealt_loader_can_be_given_another_batch_size(size: int, drop_last: bool) -> None:
    def work(loader: Any, rank: int) -> Any:
        other = rebatched(loader, size)
        return len(other), epochs(exact(other))

    ranks = on_ranks(2, shuffled(2, drop_last=drop_last), work)
    seed(5)
    whole = shuffled(2 * size, drop_last=drop_last)()
    for epoch, batches in enumerate(epochs(exact(whole))):
        assert counted([found[epoch] for _, found in ranks]) == [batch for batch, _ in batches]
    assert {length for length, _ in ranks} == {len(whole)}


def test_evaluation_can_be_given_another_batch_size() -> None:
    ranks = on_ranks(2, lambda: DataLoader(Numbers(), 2), lambda loader, rank: epochs(rebatched(loader, 3), 1)[0], "validate")
    assert [[batch for batch, _ in found] for found in ranks] == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10]]]


def test_own_batches_cannot_be_given_another_size() -> None:
    with pytest.raises(TypeError, match=r"its own batch_sampler \(Pairs\)"):
        rebatched(dealt(DataLoader(Numbers(), batch_sampler=Pairs()), "train", 0, 2, Line().of(0)), 3)


# ---------------------------------------------------------------------- the user's own loader, and mistakes


def test_the_loader_that_was_given_is_left_as_it_was() -> None:
    loader = DataLoader(Numbers(), 2, shuffle=True, num_workers=1, persistent_workers=True)
    list(loader)
    before = dict(vars(loader))
    mine = dealt(loader, "train", 0, 2, Line().of(0))
    assert len(list(mine)) == 3 and vars(loader) == before and mine._iterator is not loader._iterator
    del mine._iterator, loader._iterator, before
    assert dealt(loader, "train", 0, 1, Line().of(0)) is loader


def test_samplers_that_deal_out_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="would be dealt out twice: leave it out and write shuffle=True"):
        dealt(DataLoader(Numbers(), 2, sampler=DistributedSampler(Numbers(), 2, 0)), "test", 0, 2, Line().of(0))
    ranks = on_ranks(
        2, lambda: DataLoader(Numbers(), 2, sampler=DistributedSampler(Numbers(), 1, 0)), lambda loader, rank: epochs(loader, 1)[0]
    )
    assert sorted(chain(*counted(ranks))) == list(range(SAMPLES))


@pytest.mark.parametrize(("stage", "rank", "world"), [("sanity", 0, 2), ("train", 2, 2), ("train", -1, 2), ("train", 0, 0)])
def test_what_makes_no_sense_is_refused(stage: str, rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="stage must be one of train, validate, test, predict, and rank below world_size"):
        dealt([1], stage, rank, world, Line().of(0))


def test_equal_parts_are_not_written_down() -> None:
    loader = exact(dealt(DataLoader(Numbers(10), 2), "train", 0, 2, Line().of(0)))
    assert [share_of(loader, batch_idx) for batch_idx, _ in enumerate(loader)] == [1.0] * 3
    assert len(list(islice(loader, 3))) == 3 and shares_of(loader) == {}
    loader = exact(dealt(DataLoader(Numbers(11), 2), "train", 0, 2, Line().of(0)))
    assert len(list(loader)) == 3 and shares_of(loader) == {2: 4 / 3}
