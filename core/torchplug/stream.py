"""The exact place in the data: batches counted off by index, never loaded twice, and workers that draw the same numbers whoever they are.

The order of an epoch is the one that the loader itself draws. A run that goes on in mid-epoch puts the generators back to where
they were when the epoch began, lets the samplers draw again, passes over what was trained on, and puts the generators of the moment
of saving in place before the next batch is loaded.
"""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from torchplug.seed import generator_state, own_generators, restore_generators, samplers_of

__all__ = ["Stream", "begin", "exact", "explained"]


def has_state(thing: Any) -> bool:
    """Whether ``thing`` can be saved and put back by itself."""
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


# ---------------------------------------------------------------------- loaders


@dataclass(frozen=True)
class Drawn:
    """What a sampler gave for one batch, on its way to a worker, and the seed for what is drawn while it is loaded."""

    index: Any
    seed: bytes

    def __iter__(self) -> Iterator[Any]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


class Indices:
    """In the place of a loader's batch sampler: gives what that gives, from any batch of the epoch on.

    Attributes:
        drawn: batches that the sampler gave in this epoch, with those that workers load ahead; counted for workers alone.
        seed: the number that the seeds of the epoch's batches come from.
    """

    def __init__(self, inner: Any, workers: bool) -> None:
        self.inner, self.workers = inner, workers
        self.drawn = self.seed = 0
        self.resume: tuple[int, int, Callable[[], None]] | None = None

    def __iter__(self) -> Iterator[Any]:
        source = iter(self.inner)  # at once, as the loader does it: generators are drawn from in the same order
        return self._counted(source) if self.workers or self.resume else source

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _counted(self, source: Iterator[Any]) -> Iterator[Any]:
        begin, ahead = 0, []
        if self.resume is not None:
            begin, drawn, ready = self.resume
            self.resume = None
            gone = sum(1 for _ in islice(source, begin))
            if begin and not gone:  # a sampler that remembers its place was at the end of the epoch before
                source = iter(self.inner)
                gone = sum(1 for _ in islice(source, begin))
            if gone < begin:
                raise ValueError(f"the checkpoint stands after batch {begin} of the epoch, but the sampler gives only {gone} batches")
            ahead = list(islice(source, drawn - begin))
            ready()
        self.drawn = begin + len(ahead)
        for number, index in enumerate(chain(ahead, source), begin):
            self.drawn = max(self.drawn, number + 1)
            yield Drawn(index, _mixed(self.seed, number)) if self.workers else index


class Seeded:
    """In the place of a data set in worker processes: seeds every generator before a batch is loaded.

    What is drawn then depends on the epoch and the batch, not on which worker loads it, how many there are, or where a run began.
    """

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "_dataset", dataset)

    def __getitems__(self, drawn: Any) -> Any:
        dataset, index = self._dataset, drawn
        if isinstance(drawn, Drawn):
            _reseed(drawn.seed)
            index = drawn.index
        together = getattr(dataset, "__getitems__", None)
        return together(index) if together is not None else [dataset[i] for i in index]

    def __getitem__(self, drawn: Any) -> Any:
        if isinstance(drawn, Drawn):
            _reseed(drawn.seed)
            drawn = drawn.index
        return self._dataset[drawn]

    def __len__(self) -> int:
        return len(self._dataset)

    # what a worker's own code sees and sets is the data set

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __reduce__(self) -> Any:
        return Seeded, (self._dataset,)


def _mixed(*numbers: int) -> bytes:
    return hashlib.blake2b(repr(numbers).encode(), digest_size=20).digest()


def _reseed(seed: bytes) -> None:
    """Every global generator of this process from one seed, each from bits of its own."""
    torch.manual_seed(int.from_bytes(seed[:8], "little", signed=True))
    random.seed(seed[8:16])
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(int.from_bytes(seed[16:], "little"))


def exact(loader: Any) -> Any:
    """``loader``, or in place of a DataLoader a copy whose batches can be passed over by index and whose workers are seeded.

    Loaders over iterable data sets, and those that save what their data set remembers, are left as they are.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if has_state(loader) and has_state(loader.dataset):
        return loader
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    if isinstance(getattr(loader, name), Indices):
        return loader
    clone = copy.copy(loader)
    # a loader does not let them be set once it was made, because its iterator would not follow; a copy has no iterator yet
    vars(clone).update({name: Indices(getattr(loader, name), loader.num_workers > 0), "_iterator": None})
    if loader.num_workers:
        vars(clone)["dataset"] = Seeded(loader.dataset)
    return clone


def explained(loader: Any) -> str:
    """What cannot be promised for a resume in the middle of an epoch of ``loader``; empty if it is exact."""
    if isinstance(loader, Sequence) or _indices(loader) is not None:
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, Seeded) and has_state(dataset):
            return (
                f"{type(dataset._dataset).__name__} has a state, but workers have copies of it that a DataLoader cannot ask: it is not "
                "saved (num_workers=0 or a loader with a state_dict of its own saves it)"
            )
        return ""
    if has_state(loader) or (_workers(loader) == 0 and has_state(getattr(loader, "dataset", None))):
        return ""
    return (
        "the training data cannot be reached by index and have no state_dict: a run that is resumed in mid-epoch loads the batches that "
        "were seen once more and passes over them"
    )


def _workers(loader: Any) -> int:
    return getattr(loader, "num_workers", 0)


def _indices(loader: Any) -> Indices | None:
    for name in ("batch_sampler", "sampler"):
        if isinstance(getattr(loader, name, None), Indices):
            found: Indices = getattr(loader, name)
            return found
    return None


def begin(loader: Any, *place: int) -> Iterator[Any]:
    """A new iterator over ``loader``; its workers draw what belongs to ``place``, the epoch and the batch of the run."""
    indices = _indices(loader)
    if indices is not None and indices.workers:
        generator = torch.Generator()
        generator.set_state(loader.generator.get_state() if loader.generator is not None else torch.get_rng_state())
        drawn = torch.empty((), dtype=torch.int64).random_(generator=generator)  # what the loader is about to draw for its workers
        indices.seed = int.from_bytes(_mixed(int(drawn), *place)[:8], "little")
    return iter(loader)


# ---------------------------------------------------------------------- the training data


class Stream:
    """The training data of a run, epoch by epoch, and the place in the present one.

    Args:
        loader: the training loader, as `exact` gave it.
        others: the other loaders of the run, whose generators are saved too.
        limit: batches of an epoch that are used, None for all.
    """

    def __init__(self, loader: Any, others: Sequence[Any], limit: int | None) -> None:
        self.loader, self.limit = loader, limit
        self.indices = _indices(loader)
        self.generators = own_generators([loader, *others])
        self.samplers = [each for each in samplers_of(loader) if has_state(each)]
        dataset = getattr(loader, "dataset", None)
        self.keeper = loader if has_state(loader) and self.indices is None else None  # who else remembers a place, if anybody does
        if self.keeper is None and has_state(dataset) and _workers(loader) == 0:
            self.keeper = dataset
        self._start: dict[str, Any] | None = None  # generators and samplers as they were when the epoch began
        self._loaded: dict[str, Any] | None = None  # the state to go on from

    # ------------------------------------------------------------------ epochs

    def epoch(self, number: int, seen: int) -> Iterator[Any]:
        """The batches of epoch ``number`` that are still to come when the first ``seen`` of them are done."""
        for owner in (self.loader, *samplers_of(self.loader)):
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(number)
        loaded, self._loaded = self._loaded, None
        left = None if self.limit is None else self.limit - seen
        if seen:
            assert loaded is not None
            batches = self._rest(number, seen, loaded)
        elif loaded is not None and (self.keeper is not None or self.samplers):
            batches = self._after_an_edge(number)
        else:
            self._start = self._now()
            batches = begin(self.loader, number, 0)
        return batches if left is None else islice(batches, left)

    def _rest(self, number: int, seen: int, state: dict[str, Any]) -> Iterator[Any]:
        """The epoch from batch ``seen`` on. Nothing happens before the first batch is asked for."""
        now, self._start = self._now(), state["start"]
        self._put(state["start"])

        def ready() -> None:
            self._put({**now, "samplers": []})  # samplers have drawn themselves to their place

        if self.indices is not None:
            self.indices.resume = (seen, max(seen, state["drawn"]), ready)
            batches = begin(self.loader, number, 0)
            first = list(islice(batches, 1))
            if self.indices.resume is not None:  # a loader that never asked its sampler
                self.indices.resume = None
                first = list(islice(batches, seen - 1, seen))
                ready()
        elif self.keeper is not None or isinstance(self.loader, Sequence):
            batches = iter(self.loader) if self.keeper is not None else islice(self.loader, seen, None)
            ready()
            first = []
        else:
            batches = begin(self.loader, number, 0)
            first = []
            for _ in islice(batches, seen):
                pass
            ready()
        yield from first
        yield from batches

    def _after_an_edge(self, number: int) -> Iterator[Any]:
        """An epoch from its beginning, with something that remembers a place and may think that it is at the end of the one before."""
        self._start = self._now()
        batches = begin(self.loader, number, 0)
        if isinstance(self.loader, DataLoader) and self.keeper is self.loader:  # what it loaded belongs to its first iterator alone
            first: list[Any] = []
        else:
            first = list(islice(batches, 1))
        if not first:
            self._put({**self._start, "samplers": []})
            batches = begin(self.loader, number, 0)
        yield from first
        yield from batches

    # ------------------------------------------------------------------ state

    def _now(self) -> dict[str, Any]:
        return {
            "generators": generator_state(),
            "own": [generator.get_state() for generator in self.generators],
            "samplers": [sampler.state_dict() for sampler in self.samplers],
        }

    def _put(self, state: dict[str, Any]) -> None:
        restore_generators(state["generators"])
        for generator, own in zip(self.generators, state["own"], strict=True):
            generator.set_state(own)
        for sampler, own in zip(self.samplers, state["samplers"], strict=False):
            sampler.load_state_dict(own)

    def state_dict(self, seen: int) -> dict[str, Any]:
        """The place after ``seen`` batches of the epoch; 0 is the edge between two epochs."""
        return {
            "own": [generator.get_state() for generator in self.generators],
            "samplers": [sampler.state_dict() for sampler in self.samplers],
            "start": self._start if seen else None,
            "drawn": self.indices.drawn if self.indices is not None and self.indices.workers else seen,
            "keeper": self.keeper.state_dict() if self.keeper is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from ``state`` when the next epoch is asked for. The global generators are not its business.

        Raises:
            ValueError: the loaders have other generators, or samplers with a state, than those of the state.
        """
        for part, there in (("own", self.generators), ("samplers", self.samplers)):
            if len(state[part]) != len(there):
                names = {"own": "generators of their own", "samplers": "samplers with a state"}
                raise ValueError(f"the loaders have {len(there)} {names[part]}, those of the checkpoint had {len(state[part])}")
        self._loaded = state
        if self.keeper is not None and state["keeper"] is not None:
            self.keeper.load_state_dict(state["keeper"])
        if state["start"] is None:  # in mid-epoch they begin where the epoch began
            for sampler, own in zip(self.samplers, state["samplers"], strict=True):
                sampler.load_state_dict(own)
        self.restore()

    def restore(self) -> None:
        """Puts the loaders' own generators to where the loaded state has them: what was drawn since then is forgotten."""
        if self._loaded is not None:
            for generator, own in zip(self.generators, self._loaded["own"], strict=True):
                generator.set_state(own)
