"""The exact place in the training data: batches are counted off by index and never loaded twice.

The order of an epoch is the one that the loader itself draws. A run that goes on in mid-epoch puts the generators back to where
they were when the epoch began, lets the samplers draw again, passes over what was trained on, and puts the generators of the moment
of saving in place before the next batch is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from torchplug.loaders import (
    Tracked,
    begin,
    by_number,
    has_state,
    indices_of,
    places_of,
    samplers_of,
    set_working,
    workers_of,
    working,
)
from torchplug.seed import generator_state, own_generators, restore_generators

__all__ = ["Stream", "alike"]

PARTS = ("own", "samplers", "start", "cut", "drawn", "exhausted", "counted", "working", "ended", "keeper", "between")


class Stream:
    """The training data of a run, epoch by epoch, and the place in the present one.

    Args:
        loader: the training loader, as `exact` gave it.
        others: the other loaders of the run, whose generators are saved too.
        limit: batches of an epoch that are used, None for all.
    """

    def __init__(self, loader: Any, others: Sequence[Any], limit: int | None) -> None:
        self.loader, self.loaders, self.limit = loader, [loader, *others], limit
        self.indices = indices_of(loader)
        self.generators = own_generators([loader, *samplers_of(loader), *others])
        self.samplers = places_of(loader)
        dataset, workers = getattr(loader, "dataset", None), workers_of(loader)
        kept = dataset if workers == 0 and has_state(dataset) else None
        itself = has_state(loader) and self.indices is None
        self.keeper: Any = loader if itself else kept  # who else remembers a place in an epoch, if anybody does
        self.between: Any = kept  # who remembers something between two epochs: an iterator and its workers are gone by then
        if kept is None and itself and (not isinstance(loader, DataLoader) or (workers > 0 and loader.persistent_workers)):
            self.between = loader
        self._cut = False  # whether the limit ended an epoch
        self._start: dict[str, Any] | None = None  # generators and samplers as they were when the epoch began
        self._loaded: dict[str, Any] | None = None  # the state to go on from, until the data are asked for a batch

    # ------------------------------------------------------------------ epochs

    def epoch(self, number: int, seen: int) -> Iterator[Any]:
        """The batches of epoch ``number`` that are still to come when the first ``seen`` of them are done."""
        for owner in (self.loader, *samplers_of(self.loader)):
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(number)
        if seen:
            assert self._loaded is not None
            if seen == self.limit or self._loaded["ended"]:
                return self._nothing(seen, self._loaded)
            batches = self._rest(number, seen)
        elif self._loaded is not None and (self.between is not None or self.samplers):
            batches = self._after_an_edge(number)
        else:
            self._start, self._loaded = self._now(), None
            batches = begin(self.loader, number, 0)
        return batches if self.limit is None else self._limited(batches, self.limit - seen)

    def _limited(self, batches: Iterator[Any], left: int) -> Iterator[Any]:
        self._cut = False
        for number, batch in enumerate(islice(batches, left), 1):
            self._cut = number == left
            yield batch

    def _nothing(self, seen: int, state: dict[str, Any]) -> Iterator[Any]:
        """The epoch after its last batch. What remembers a place is brought there when the next epoch begins."""
        if self.between is None and not self.samplers:
            self._start, self._loaded, self._cut = state["start"], None, state["cut"]
            if self.indices is not None:
                self.indices.asked, self.indices.drawn = seen + self.indices.workers, state["drawn"]
                self.indices.ended = state["exhausted"]
        return iter(())

    def _rest(self, number: int, seen: int) -> Iterator[Any]:
        """The epoch from batch ``seen`` on. Nothing happens before the first batch is asked for."""
        assert self._loaded is not None
        state, now, self._loaded = self._loaded, self._now(), None
        self._start = state["start"]
        self._put(state["start"])
        set_working(self.loader, state["start"]["working"])
        if self.keeper is not None:
            self.keeper.load_state_dict(state["keeper"])

        def ready() -> None:
            self._put({**now, "samplers": []})  # samplers have drawn themselves to their place

        if self.indices is not None and state["counted"]:

            def resume(source: Iterator[Any]) -> Iterator[Any]:
                source = self._passed(source, seen, state)
                ready()
                return source

            self.indices.resume = resume
            yield from begin(self.loader, number, 0)
        elif self.keeper is not None and self.indices is None:  # it goes on by itself
            batches = begin(self.loader, number, 0)
            ready()
            yield from batches
        elif by_number(self.loader):
            ready()
            yield from map(self.loader.__getitem__, range(seen, len(self.loader)))
        else:
            batches = begin(self.loader, number, 0)
            self._enough(sum(1 for _ in islice(batches, seen)), seen)
            ready()
            yield from batches

    def _passed(self, source: Iterator[Any], seen: int, state: dict[str, Any]) -> Iterator[Any]:
        """What a sampler's iterator gives after the first ``seen`` batches. Its samplers have drawn what they had drawn then.

        A sampler with a state may have taken that of the epoch's beginning for a place to go on from, where it would have begun
        anew. Whether it did shows in the state that it comes to; then its iterator is used up once before it begins.
        """
        assert self.indices is not None
        drawn, begun = max(seen, state["drawn"]), self._now()
        for attempt in range(3):
            passed = sum(1 for _ in islice(source, seen))
            ahead = list(islice(source, drawn - seen))
            if state["exhausted"]:
                ahead += islice(source, 1)
            there = passed == seen and alike([each.state_dict() for each in self.samplers], state["samplers"])
            if there or not self.samplers or attempt == 2:
                break
            self._put({**begun, "samplers": state["start"]["samplers"]})
            if attempt == 0:
                for _ in islice(self.indices.inner, 1):
                    pass
                self._put({**begun, "samplers": []})
            source = iter(self.indices.inner)
        self._enough(passed, seen)
        self.indices.asked, self.indices.drawn = seen, seen + len(ahead)
        return chain(ahead, source)

    @staticmethod
    def _enough(passed: int, seen: int) -> None:
        if passed < seen:
            raise ValueError(f"the checkpoint stands after batch {seen} of the epoch, but there are only {passed} batches")

    def _after_an_edge(self, number: int) -> Iterator[Any]:
        """An epoch from its beginning, with something that remembers a place and may think that it is in the epoch before."""
        assert self._loaded is not None
        state, now, self._loaded = self._loaded, self._now(), None
        if self.samplers and state["cut"]:
            assert self.indices is not None
            self._put(state["start"])
            self._passed(iter(self.indices.inner), state["drawn"], state)
        else:
            for sampler, own in zip(self.samplers, state["samplers"], strict=True):
                sampler.load_state_dict(own)
        if self.between is not None and state["between"] is not None:
            self._begin_anew(state["between"], state["cut"])
        self._put({**now, "samplers": []})
        self._start = {**now, "samplers": state["samplers"]}
        batches = begin(self.loader, number, 0)
        first = list(islice(batches, 1))
        if not first:
            self._put({**now, "samplers": []})
            batches = begin(self.loader, number, 0)
        yield from first
        yield from batches

    def _begin_anew(self, state: dict[str, Any], cut: bool) -> None:
        """Lets something that remembers a place begin an epoch as it would after the one before, which may have been cut off.

        After that a new iterator may go on where the one before was left, or begin anew, unless a state was loaded in between: which
        it does shows when a few samples are asked for. What a DataLoader is given to load belongs to its first iterator alone.
        """

        def after(iterators: int) -> Any:
            self.between.load_state_dict(state)
            for _ in range(iterators):
                for _ in islice(self.between, 2 // iterators):
                    pass
            return copy.deepcopy(self.between.state_dict())

        used = 0
        if cut and isinstance(self.between, DataLoader):
            used = 1
        elif cut and self.indices is None:
            used = not alike(after(1), after(2))
        self.between.load_state_dict(state)
        if used:
            for _ in islice(self.between, 1):
                pass

    # ------------------------------------------------------------------ state

    def _now(self) -> dict[str, Any]:
        return {"generators": generator_state(), "own": self._own(), "samplers": self._places(), "working": working(self.loader)}

    def _own(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def _places(self) -> list[Any]:
        return [copy.deepcopy(sampler.state_dict()) for sampler in self.samplers]

    def _put(self, state: dict[str, Any]) -> None:
        restore_generators(state["generators"])
        for generator, own in zip(self.generators, state["own"], strict=True):
            generator.set_state(own)
        for sampler, own in zip(self.samplers, state["samplers"], strict=False):
            sampler.load_state_dict(own)

    def state_dict(self, seen: int) -> dict[str, Any]:
        """The place after ``seen`` batches of the epoch; 0 is the edge between two epochs."""
        if self._loaded is not None:  # no batch was asked for since
            state = {**self._loaded, "own": self._own()}
            return state if seen else {**state, "keeper": None, "start": state["start"] if state["cut"] else None}
        indices, dataset = self.indices, getattr(self.loader, "dataset", None)
        ended = type(dataset) is Tracked and dataset._ended
        cut = seen == self.limit if seen else self._cut
        begun = self._start is not None or self.between is not self.loader  # a loader that is asked too early makes an iterator
        return {
            "own": self._own(),
            "samplers": self._places(),
            "start": self._start if seen or cut else None,
            "cut": cut,
            "drawn": indices.drawn if indices is not None and indices.counts and (seen or cut) else seen,
            "exhausted": indices is not None and indices.counts and indices.ended and (seen > 0 or cut),
            "counted": indices is not None and indices.tells(seen),
            "working": [working(loader) for loader in self.loaders],
            "ended": ended,
            "keeper": self.keeper.state_dict() if self.keeper is not None and seen else None,
            "between": self.between.state_dict() if self.between is not None and begun and (cut or ended or not seen) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from ``state`` when the next epoch is asked for a batch. The global generators are not its business.

        Raises:
            ValueError: the loaders have other generators, or samplers with a state, than those of the state.
        """
        self.check(state)
        self._loaded = {name: state[name] for name in PARTS}
        for loader, was in zip(self.loaders, state["working"], strict=False):
            set_working(loader, was)
        self.restore()

    def check(self, state: dict[str, Any]) -> None:
        """Refuses the state of other loaders; nothing is changed.

        Raises:
            ValueError: the loaders have other generators, or samplers with a state, than those of the state.
        """
        for part, there in (("own", self.generators), ("samplers", self.samplers)):
            if len(state[part]) != len(there):
                names = {"own": "generators of their own", "samplers": "samplers with a state"}
                raise ValueError(f"the loaders have {len(there)} {names[part]}, those of the checkpoint had {len(state[part])}")

    def restore(self) -> None:
        """Puts the loaders' own generators to where the loaded state has them: what was drawn since then is forgotten."""
        if self._loaded is not None:
            for generator, own in zip(self.generators, self._loaded["own"], strict=True):
                generator.set_state(own)


def alike(one: Any, other: Any) -> bool:
    """Whether two states are the same: numbers and tensors of one type with equal values, where NaN is equal to NaN."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(part, other[key]) for key, part in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other) or bool(one != one and other != other)
