"""How the data of a loader are dealt out over the ranks of a distributed run, so that together they see what one process would see.

Nothing is drawn anew and nothing is rebuilt: the order is the one that the loader's own sampler gives, drawn on every rank from the
generators of rank 0, and each rank takes its part of it. Who calls this says how ranks agree on a value; nothing else is known of them.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, count, islice, pairwise
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler, SequentialSampler

from torchplug.data import LOADERS, batch_size, length
from torchplug.loaders import Indices, by_number, has_state, places_of, samplers_of
from torchplug.seed import generator_state, own_generators, preserved, restore_generators
from torchplug.stream import alike as same

__all__ = ["dealt", "share_of", "shares_itself", "shares_of"]

AHEAD = 64  # steps whose order is drawn at once where a sampler does not say how long it is
EQUAL: dict[int, float] = {}  # the shares of what was not dealt


def dealt(loader: Any, stage: str, rank: int, world_size: int, alike: Callable[[Any], Any]) -> Any:
    """What one rank loads of ``loader``; to be called before anything else is put around it.

    In training all ranks have equally many batches, and those of one number are one step. A DataLoader that makes its batches itself gives
    ``batch_size`` samples on each rank, consecutive ones of what one process with ``world_size`` times the size would see in
    that step; a last short step is split evenly. Batches that are made elsewhere (a ``batch_sampler``, ``batch_size=None``, a list) are
    dealt out one by one. A rank that is left without any gets a copy of what another one has, which `share_of` says not to count.
    In evaluation, and of an iterable whose length is not known or that has a state of its own, rank r has the batches
    r, r + world_size, ...: each once, and some ranks may have one less, or none.

    A DataLoader over an iterable data set is left as it is, see `shares_itself`. The order of an epoch is drawn when its first batch is
    asked for, as a whole where the sampler has a length.

    Args:
        loader: a DataLoader, a sequence of batches, or another iterable of them.
        stage: train, validate, test or predict.
        rank: the number of this rank, from 0.
        world_size: how many ranks there are; with 1 the loader is returned as it is.
        alike: gives every rank the value of rank 0, which is made of dicts, lists, tuples, numbers and tensors. Every rank calls it equally
            often: twice when the first batch of an epoch is asked for, not at all where evaluation draws nothing.

    Raises:
        ValueError: the loader deals out samples itself, or nothing is left to train on.
    """
    if stage not in LOADERS or not 0 <= rank < world_size:
        raise ValueError(f"stage must be one of {', '.join(LOADERS)}, and rank below world_size, got {stage!r}, {rank!r} of {world_size!r}")
    if world_size == 1 or shares_itself(loader):
        return loader
    ranks, mine = Ranks(rank, world_size, stage == "train", alike), loader
    if isinstance(loader, DataLoader):
        for sampler in samplers_of(loader):
            if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
                raise ValueError(
                    f"the loader for {stage} has a {type(sampler).__name__}, and its data would be dealt out twice: "
                    "leave it out and write shuffle=True or False; the data are dealt out over the ranks for you"
                )
        mine, name = copy.copy(loader), "sampler" if loader.batch_sampler is None else "batch_sampler"
        # a loader that was made does not let it be set, because its iterator would not follow; a copy has none yet
        vars(mine).update({name: Dealt(loader, getattr(loader, name), ranks), "_iterator": None})
    elif by_number(loader):
        mine = Numbered(loader, ranks)
    elif isinstance(loader, Iterator):
        return islice(loader, rank, None, world_size)  # an iterator too: it cannot be begun again, and who needs that can tell
    else:
        mine = Turns(loader, ranks)
    if ranks.train and isinstance(mine, DataLoader) and length(mine) == 0:
        raise ValueError(
            f"the training loader gives {length(loader)} batches, with drop_last=True too few for one step on {world_size} ranks: "
            "use a smaller batch_size, fewer ranks or drop_last=False"
        )
    return mine


def shares_itself(loader: Any) -> bool:
    """Whether the data come from an iterable data set, whose author deals them out over ranks (and workers), as nobody else can."""
    return isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)


def share_of(loader: Any, batch_idx: int) -> float:
    """What to multiply the loss of batch ``batch_idx`` of the epoch with, so that the mean over ranks is that over all samples.

    It is 1.0 but where the ranks' batches differ in size: this rank's number of samples times ``world_size``, divided by those of all.
    It is 0.0 for a batch that stands in because there was none left for this rank. ``loader`` is what `dealt` gave, or a copy of it.
    """
    return shares_of(loader).get(batch_idx, 1.0)


def shares_of(loader: Any) -> dict[int, float]:
    """The shares of the present epoch that are not 1.0, by number of the batch: always the same dict for a loader and its copies."""
    for name in ("batch_sampler", "sampler"):
        sampler = getattr(loader, name, None)
        if isinstance(sampler, Indices):
            sampler = sampler.inner
        if isinstance(sampler, Dealt):
            return sampler.shares
    return loader.shares if isinstance(loader, (Numbered, Turns)) else EQUAL


@dataclass(frozen=True)
class Ranks:
    """Where this rank stands among the others, and whether all must have equally many batches."""

    rank: int
    world_size: int
    train: bool
    alike: Callable[[Any], Any]

    def share(self, sizes: Sequence[int]) -> float:
        """This rank's share in a step, of the samples that each rank has in it; those without any may be left out."""
        return sizes[self.rank] * self.world_size / sum(sizes) if self.rank < len(sizes) else 0.0

    def turns(self, batches: int) -> range:
        """The numbers of those batches that fall to this rank."""
        return range(self.rank, batches, self.world_size)


# ---------------------------------------------------------------------- in the place of a sampler


class Dealt(Sampler[Any]):
    """In the place of a loader's batch sampler, or of its sampler if that makes no batches: gives the part of one rank.

    Attributes:
        loader: the loader that was dealt out.
        sampler: what it had in this place; found under this name by who looks for samplers inside of samplers.
        shares: those of the present epoch that are not 1.0.
    """

    def __init__(self, loader: Any, sampler: Any, ranks: Ranks) -> None:
        self.loader, self.sampler, self.ranks = loader, sampler, ranks
        self.shares: dict[int, float] = {}
        self.begun = 0  # iterators that were asked for since an order was drawn: with workers a loader asks twice
        self.size = sampler.batch_size if type(sampler) is BatchSampler else 0  # 0: how batches are made is not known

    @property
    def generator(self) -> Any:
        """That of the sampler that a batch sampler draws from: `own_generators` looks no deeper than to this one and the next."""
        return getattr(getattr(self.sampler, "sampler", None), "generator", None)

    def over(self, sampler: Any) -> Dealt:
        """Another sampler of the same loader, dealt out in the same way."""
        return Dealt(self.loader, sampler, self.ranks)

    def __len__(self) -> int:
        batches, ranks = len(self.sampler), self.ranks
        if not ranks.train:
            return len(ranks.turns(batches))
        return batches // ranks.world_size if self.size and self.sampler.drop_last else -(-batches // ranks.world_size)

    def __iter__(self) -> Iterator[Any]:
        ranks = self.ranks
        if not ranks.train and _is_fixed(self.sampler):  # nothing to agree on: a rank that has no batch need not ask for one
            return islice(self.sampler, ranks.rank, None, ranks.world_size)
        before = self._state()
        source = iter(self.sampler) if ranks.rank == 0 else None  # at once, as the loader does it; others begin from where this is
        self.begun += 1
        return self._batches(self._order(before, source))

    # ------------------------------------------------------------------ the part of this rank

    def _batches(self, order: Iterator[Any]) -> Iterator[Any]:
        ranks = self.ranks
        self.shares.clear()
        for number in count():
            group = list(islice(order, ranks.world_size))
            whole = len(group) == ranks.world_size
            if not group or (ranks.train and self.size and self.sampler.drop_last and not whole):
                return
            if not ranks.train:
                yield from group[ranks.rank : ranks.rank + 1]
            elif whole and self.size and len(group[-1]) == self.size:
                yield group[ranks.rank]
            else:
                parts = self._evenly([*chain(*group)]) if self.size else group
                share = ranks.share([_samples(part) for part in parts])
                if share != 1.0:
                    self.shares[number] = share
                yield parts[ranks.rank] if share else parts[0]

    def _evenly(self, samples: list[Any]) -> list[list[Any]]:
        """As many parts as there are ranks; the first one has a sample in any case."""
        ends = [-(-rank * len(samples) // self.ranks.world_size) for rank in range(self.ranks.world_size + 1)]
        return [samples[low:high] for low, high in pairwise(ends)]

    # ------------------------------------------------------------------ the order of all

    def _order(self, before: dict[str, Any], source: Iterator[Any] | None) -> Iterator[Any]:
        """What the sampler gives on rank 0.

        Only rank 0's global generators move, by what is drawn up to the sampler's length. What is drawn later goes on from there, whatever
        was drawn by others in between: a run that goes on in mid-epoch comes to the same order.

        Args:
            before: generators and samplers as they were when the loader asked for an iterator; it drew a number since then.
            source: the sampler's iterator, None where it is still to be made.

        Raises:
            RuntimeError: it was another order than on rank 0.
        """
        ranks = self.ranks
        before, now, begun = ranks.alike((before, self._state(), self.begun))
        self.begun = 0
        with preserved() if ranks.rank else nullcontext():
            for _ in range(begun if source is None else 0):
                self._put(before)
                source = iter(self.sampler)
                self._put(now)
            assert source is not None
            known = length(self.sampler)
            size = AHEAD * ranks.world_size if known is None else known + 1  # with its end, which may change something too
            drawn, after = list(islice(source, size)), _global()
        mark = zlib.crc32(repr(drawn).encode())
        if ranks.alike(mark) != mark:
            raise RuntimeError(
                f"the order of samples is another one on rank {ranks.rank} than on rank 0: the data sets differ, or the sampler draws from "
                f"something hidden ({self._names()}); give all ranks the same data, and let it draw from the global generators of torch, "
                "Python or NumPy or from a generator that is one of its attributes"
            )
        yield from drawn
        while len(drawn) == size:
            with preserved():
                restore_generators(after)
                drawn, after = list(islice(source, size)), _global()
            yield from drawn

    def _state(self) -> dict[str, Any]:
        """Everything that an order may depend on."""
        return {
            "global": _global(),
            "own": [generator.get_state() for generator in own_generators(self._owners())],
            "places": [copy.deepcopy(place.state_dict()) for place in places_of(self.loader)],
        }

    def _put(self, state: dict[str, Any]) -> None:
        restore_generators(state["global"])
        for generator, own in zip(own_generators(self._owners()), state["own"], strict=True):
            generator.set_state(own)
        for place, own in zip(places_of(self.loader), state["places"], strict=True):
            if not same(place.state_dict(), own):  # a sampler may take a state for a place to go on from, even that where it stands
                place.load_state_dict(own)

    def _owners(self) -> list[Any]:
        return [self.loader, *samplers_of(self.loader)]

    def _names(self) -> str:
        return ", ".join(type(sampler).__name__ for sampler in samplers_of(self.loader))


def _global() -> dict[str, Any]:
    """The generators that samplers draw from: those of devices, of which ranks may have different ones, are not among them."""
    return {name: state for name, state in generator_state().items() if name in ("python", "numpy", "torch")}


def _is_fixed(sampler: Any) -> bool:
    """Whether the order is always the same."""
    return type(sampler.sampler if type(sampler) is BatchSampler else sampler) in (SequentialSampler, range, list, tuple)


def _samples(index: Any) -> int:
    """How many samples something stands for that a sampler gave."""
    if isinstance(index, torch.Tensor):
        return index.numel()
    return len(index) if isinstance(index, (list, tuple)) else 1


# ---------------------------------------------------------------------- in the place of batches that no DataLoader makes


class Numbered(Sequence[Any]):
    """In the place of a sequence of batches; those of other ranks are never asked for."""

    def __init__(self, loader: Sequence[Any], ranks: Ranks) -> None:
        self.loader, self.shares, total = loader, dict[int, float](), len(loader)
        self.places: Sequence[int] = ranks.turns(total)
        if ranks.train:
            first = range(0, total, ranks.world_size)
            self.places = [i + ranks.rank if i + ranks.rank < total else i for i in first]
            sizes = [batch_size(batch) or 1 for batch in loader] if type(loader) in (list, tuple) else [1] * total
            shares = (ranks.share(sizes[i : i + ranks.world_size]) for i in first)
            self.shares = {number: share for number, share in enumerate(shares) if share != 1.0}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: Any) -> Any:  # no slices: nobody takes one of batches
        return self.loader[self.places[number]]


class Turns:
    """In the place of an iterable of batches: every rank has to go through all of them. It has the other attributes of the iterable."""

    def __init__(self, loader: Any, ranks: Ranks) -> None:
        # one that goes on in mid-epoch by itself would not know the number of its next batch: nothing stands in, nothing is weighed
        self.padded = ranks.train and length(loader) is not None and not has_state(loader)
        self.loader, self.ranks, self.shares = loader, ranks, dict[int, float]()

    def __len__(self) -> int:
        batches = len(self.loader)
        return -(-batches // self.ranks.world_size) if self.padded else len(self.ranks.turns(batches))

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        ranks = self.ranks
        self.shares.clear()
        source = iter(self.loader)
        for number in count():
            group = list(islice(source, ranks.world_size))  # all of it, so that a state is that between two steps
            if not group:
                return
            if self.padded:
                share = ranks.share([batch_size(batch) or 1 for batch in group])
                if share != 1.0:
                    self.shares[number] = share
            group = group[ranks.rank : ranks.rank + 1] or group[: int(self.padded)]
            if group:
                yield group.pop()  # nothing is held while the next ones are fetched
