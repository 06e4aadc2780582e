"""Loaders whose batches can be counted off by index, and whose workers draw the same numbers whoever they are."""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from torchplug.seed import preserved, remembered
from torchplug.signals import held, sparing

__all__ = [
    "Indices", "Tracked", "again", "begin", "by_number", "close", "exact", "explained", "has_state", "indices_of", "places_of",
    "rebatched", "samplers_of", "set_working", "workers_of", "working",
]  # fmt: skip

WORKING = "_torchplug_working"  # an attribute of the copies that `exact` makes


def has_state(thing: Any) -> bool:
    """Whether ``thing`` can be saved and put back by itself."""
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


# ---------------------------------------------------------------------- samplers


def samplers_of(loader: Any) -> list[Any]:
    """The samplers of a loader, and those inside of them, each once."""
    found: dict[int, Any] = {}
    waiting = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, Indices):
            each = each.inner
        if each is not None and id(each) not in found:
            found[id(each)] = each
            waiting.append(getattr(each, "sampler", None))
    return list(found.values())


def places_of(loader: Any) -> list[Any]:
    """What the samplers of a loader remember: those with a state, and the generators that others keep under any name."""
    found = [each if has_state(each) else Kept(each) for each in samplers_of(loader)]
    return [each for each in found if not isinstance(each, Kept) or each.generators]


class Kept:
    """The generators among the attributes of a sampler that has no state of its own."""

    def __init__(self, sampler: Any) -> None:
        attributes = getattr(sampler, "__dict__", {})
        self.generators = {name: each for name, each in attributes.items() if name != "generator" and _is_generator(each)}

    def state_dict(self) -> dict[str, Any]:
        """The state of each, as plain values and tensors."""
        return {name: _state_of(each) for name, each in self.generators.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        for name, each in self.generators.items():
            if isinstance(each, random.Random):
                each.setstate(state[name])
            elif hasattr(each, "bit_generator"):
                each.bit_generator.state = state[name]
            else:
                each.set_state(state[name])


def _is_generator(value: Any) -> bool:
    """One of Python, one of NumPy, or one of torch or NumPy's older kind, which have the same methods."""
    kinds = hasattr(value, "bit_generator") or (hasattr(value, "get_state") and hasattr(value, "set_state"))
    return type(value) is random.Random or kinds


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _plain(generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state())


def _plain(state: Any) -> Any:
    """The state of one of NumPy's generators, without arrays; it takes that back too."""
    if isinstance(state, dict):
        return {name: _plain(part) for name, part in state.items()}
    if isinstance(state, tuple):
        return tuple(map(_plain, state))
    return state.tolist() if hasattr(state, "tolist") and not isinstance(state, Tensor) else state


# ---------------------------------------------------------------------- in the place of a sampler


@dataclass(frozen=True)
class Drawn:
    """What a sampler gave for one batch, on its way to a worker, and the seed for what is drawn while it is loaded."""

    index: Any
    seed: bytes


class Indices:
    """In the place of a loader's batch sampler: gives what that gives, and counts it where that says something.

    Attributes:
        inner: the loader's own sampler.
        workers: batches that workers load ahead, 0 without workers.
        wrapped: whether the loader has an ``__iter__`` of its own, so that it may ask for more or fewer batches than it gives.
        counts: whether batches are counted.
        asked: how often the loader asked for a batch in this epoch.
        drawn: batches that the sampler gave in this epoch, with those that workers load ahead.
        ended: whether it had no more.
        unseen: there if what the loader draws to begin with, and not for the order of batches, is to be forgotten.
        seed: the number that the seeds of the epoch's batches come from.
        resume: what makes of the sampler's iterator one that begins in the middle of the epoch; called when the first batch is
            asked for, once.
    """

    def __init__(self, inner: Any, workers: int, wrapped: bool, counts: bool) -> None:
        self.inner, self.workers, self.wrapped, self.counts = inner, workers, wrapped, counts
        self.resume: Callable[[Iterator[Any]], Iterator[Any]] | None = None
        self.unseen: Unseen | None = None
        self.restart()

    def restart(self) -> None:
        """An epoch begins."""
        self.asked = self.drawn = self.seed = 0
        self.ended = False

    def __iter__(self) -> Iterator[Any]:
        if self.unseen is not None:
            self.unseen.put_back()
        source = iter(self.inner)  # at once, as the loader does it: generators are drawn from in the same order
        if self.unseen is not None:
            return _Asking(self, source, remembered(self.unseen.loader))
        return _Asking(self, source) if self.counts or self.resume else source

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def tells(self, seen: int) -> bool:
        """Whether the loader has given every batch that it asked for, and no other one, when it gave ``seen``."""
        return not self.wrapped or self.asked - self.workers == seen


class Unseen:
    """A loader begins with new workers, where the run that goes on had workers already, for which nothing was drawn.

    Attributes:
        put_back: puts the generators back to where they were before.
    """

    def __init__(self, loader: Any) -> None:
        self.loader, self.put_back = loader, remembered(loader)


class _Asking:
    """The batches of one epoch, or of the rest of one."""

    def __init__(self, indices: Indices, source: Iterator[Any], put_back: Callable[[], None] | None = None) -> None:
        self.indices, self.source, self.put_back = indices, source, put_back

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        indices = self.indices
        if self.put_back is not None:
            self.put_back()
            self.put_back = indices.unseen = None
        if indices.resume is not None:
            resume, indices.resume = indices.resume, None
            self.source = resume(self.source)
        number = indices.asked
        indices.asked = number + 1
        try:
            index = next(self.source)
        except StopIteration:
            indices.ended = True
            raise
        indices.drawn = max(indices.drawn, number + 1)
        return Drawn(index, _mixed(indices.seed, number)) if indices.workers else index


# ---------------------------------------------------------------------- in the place of a data set


class _InPlaceOf:
    """In the place of a data set: what code outside sees and sets is the data set."""

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "_dataset", dataset)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __reduce__(self) -> Any:
        return type(self), (self._dataset,)


class Seeded(_InPlaceOf):
    """A data set in worker processes: seeds every generator before a batch is loaded.

    What is drawn then depends on the epoch and the batch, not on which worker loads it, how many there are, or where a run began.
    """

    def __getitems__(self, drawn: Any) -> Any:
        dataset, indices = self._dataset, _seeded(drawn)
        together = getattr(dataset, "__getitems__", None)
        return together(indices) if together is not None else [dataset[i] for i in indices]

    def __getitem__(self, drawn: Any) -> Any:
        return self._dataset[_seeded(drawn)]


class Tracked(_InPlaceOf):
    """An iterable data set with a state: knows whether it has given everything, which a state of its own need not tell."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        object.__setattr__(self, "_ended", False)

    def __iter__(self) -> Iterator[Any]:
        self._set(False)
        return _UpTo(iter(self._dataset), self._set)

    def _set(self, ended: bool) -> None:
        object.__setattr__(self, "_ended", ended)


class _UpTo:
    """An iterator that says when it is at its end; it may have a state, as torchdata's loader wants it."""

    def __init__(self, source: Iterator[Any], say: Callable[[bool], None]) -> None:
        self.source, self.say = source, say

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.source)
        except StopIteration:
            self.say(True)
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def _mixed(*numbers: int) -> bytes:
    return hashlib.blake2b(repr(numbers).encode(), digest_size=20).digest()


def _seeded(drawn: Any) -> Any:
    """The index of a batch; every global generator of this process begins anew with its seed, each with bits of its own."""
    if not isinstance(drawn, Drawn):
        return drawn
    seed = drawn.seed
    torch.manual_seed(int.from_bytes(seed[:8], "little", signed=True))
    random.seed(seed[8:16])
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(int.from_bytes(seed[16:], "little"))
    return drawn.index


# ---------------------------------------------------------------------- loaders


def exact(loader: Any) -> Any:
    """``loader``, or in place of a DataLoader a copy that can begin anywhere in an epoch and whose workers are seeded.

    It is always a copy, because a loader keeps its iterator where it has persistent workers or a state.
    """
    if not isinstance(loader, DataLoader) or WORKING in vars(loader):
        return loader
    workers = loader.num_workers
    if isinstance(loader.dataset, IterableDataset):
        if workers == 0 and has_state(loader.dataset):
            return _copied(loader, dataset=Tracked(loader.dataset))
        return _copied(loader)
    if workers and has_state(loader) and has_state(loader.dataset):  # it alone can ask its workers, and skips by itself
        return _copied(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    wrapped = type(loader).__iter__ is not DataLoader.__iter__
    ahead = workers * (loader.prefetch_factor or 0)
    counts = bool(workers) or wrapped or bool(places_of(loader))
    parts = {name: Indices(getattr(loader, name), ahead, wrapped, counts)}
    return _copied(loader, **parts, **({"dataset": Seeded(loader.dataset)} if workers else {}))


def again(loader: Any) -> Any:
    """A loader over the data of ``loader``, which `exact` gave, that has a place of its own in them.

    Raises:
        TypeError: it is an iterator, which can be passed over once.
    """
    if isinstance(loader, Iterator):
        raise TypeError(
            f"the training data are an iterator ({type(loader).__name__}), which cannot be begun again; give a DataLoader or a list"
        )
    indices = indices_of(loader)
    if indices is None:
        return _copied(loader) if WORKING in getattr(loader, "__dict__", {}) else loader
    name = "batch_sampler" if isinstance(loader.batch_sampler, Indices) else "sampler"
    return _copied(loader, **{name: Indices(indices.inner, indices.workers, indices.wrapped, indices.counts)})


def rebatched(loader: Any, size: int) -> Any:
    """A copy of a DataLoader that gives batches of ``size`` samples; everything else (sampler, workers, collate) is the same.

    Raises:
        TypeError: it is no DataLoader, or does not make its batches itself (``batch_sampler=``, ``batch_size=None``).
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"the batches of a {type(loader).__name__} cannot be made larger or smaller: give a DataLoader with batch_size=")
    over = getattr(type(loader.batch_sampler), "over", None)  # one that gives a part of what another one does, see `dealing`
    made: Any = loader.batch_sampler
    own = made if over is None else made.sampler
    if loader.batch_size is None or type(own) is not BatchSampler:
        why = "has batch_size=None" if own is None else f"has its own batch_sampler ({type(own).__name__})"
        raise TypeError(f"the batches of a DataLoader that {why} cannot be made larger or smaller: give one with batch_size=")
    clone, batches = copy.copy(loader), BatchSampler(loader.sampler, size, loader.drop_last)
    # as in `_copied`: a loader that was made does not let them be set
    vars(clone).update(batch_size=size, batch_sampler=batches if over is None else over(loader.batch_sampler, batches), _iterator=None)
    return clone


def _copied(loader: Any, **parts: Any) -> Any:
    clone = copy.copy(loader)
    if loader.num_workers and WORKING not in vars(loader):
        parts["worker_init_fn"] = sparing(loader.worker_init_fn)
    # a loader does not let them be set once it was made, because its iterator would not follow; a copy has no iterator yet
    vars(clone).update({**parts, "_iterator": None, WORKING: False})
    return clone


def working(loader: Any) -> bool:
    """Whether a loader has persistent workers from an epoch before, for which it draws nothing any more."""
    attributes = getattr(loader, "__dict__", {})
    lasting = workers_of(loader) > 0 and bool(getattr(loader, "persistent_workers", False))
    return bool(attributes.get(WORKING)) or (lasting and WORKING in attributes and attributes["_iterator"] is not None)


def set_working(loader: Any, was: bool) -> None:
    """Lets a loader begin as if it had persistent workers already, if it ``was`` so in the run that goes on."""
    if WORKING in getattr(loader, "__dict__", {}):
        vars(loader)[WORKING] = was


def indices_of(loader: Any) -> Indices | None:
    """What stands in the place of the sampler of a loader that `exact` gave."""
    for name in ("batch_sampler", "sampler"):
        if isinstance(getattr(loader, name, None), Indices):
            found: Indices = getattr(loader, name)
            return found
    return None


def workers_of(loader: Any) -> int:
    """How many worker processes a loader has."""
    return getattr(loader, "num_workers", 0)


def by_number(loader: Any) -> bool:
    """Whether a loader is a sequence of batches, and gives them in their order."""
    return isinstance(loader, Sequence) and type(loader).__iter__ in (list.__iter__, tuple.__iter__, Sequence.__iter__)


def begin(loader: Any, *place: int) -> Iterator[Any]:
    """A new iterator over ``loader``; its workers draw what belongs to ``place``, the epoch and the batch of the run."""
    indices = indices_of(loader)
    if indices is not None:
        indices.restart()
        if indices.workers:
            generator = torch.Generator()
            generator.set_state(loader.generator.get_state() if loader.generator is not None else torch.get_rng_state())
            drawn = torch.empty((), dtype=torch.int64).random_(generator=generator)  # what the loader is about to draw for its workers
            rank = getattr(getattr(indices.inner, "ranks", None), "rank", 0)  # of data that were dealt out: each rank draws its own
            place = (*place, rank) if rank else place
            indices.seed = int.from_bytes(_mixed(int(drawn), *place)[:8], "little")
    attributes = getattr(loader, "__dict__", {})
    exactly = WORKING in attributes  # a loader that `exact` gave
    forgotten = exactly and attributes[WORKING]
    if exactly:
        attributes[WORKING] = False
    if forgotten and indices is not None:
        indices.unseen = Unseen(loader)
    with preserved(loader) if forgotten and indices is None else nullcontext(), held() if exactly else nullcontext():
        return iter(loader)


def close(loader: Any) -> None:
    """Ends the persistent workers of a loader that `exact` gave; torch takes seconds for that where they end as garbage. What the
    loader draws afterwards is what it would have drawn with them."""
    if WORKING in getattr(loader, "__dict__", {}):
        vars(loader).update({WORKING: working(loader), "_iterator": None})


def explained(loader: Any) -> str:
    """What cannot be promised for a resume in the middle of an epoch of ``loader``; empty if it is exact."""
    workers, dataset = workers_of(loader), getattr(loader, "dataset", None)
    if workers and not getattr(loader, "in_order", True):
        return "in_order=False gives batches in any order: a run that is resumed in mid-epoch may see some twice and others never"
    if by_number(loader) or indices_of(loader) is not None:
        if workers and has_state(dataset):
            return (
                f"{dataset.__class__.__name__} has a state, but workers have copies of it that a DataLoader cannot ask: it is not "
                "saved (num_workers=0 or a loader with a state_dict of its own saves it)"
            )
        return ""
    if has_state(loader) and workers:
        return "what workers draw at random is not put back by a loader that saves its own state: a run that is resumed draws other numbers"
    if has_state(loader) or (workers == 0 and has_state(dataset)):
        return ""
    return (
        "the training data cannot be reached by index and have no state_dict: a run that is resumed in mid-epoch loads the batches that "
        "were seen once more and passes over them"
    )
