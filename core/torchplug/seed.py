"""Every random generator of the process: seed them, take their state, put it back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["generator_state", "own_generators", "preserved", "remembered", "restore_generators", "samplers_of", "seed_everything", "spread"]


def seed_everything(seed: int) -> int:
    """Seeds Python, NumPy (if it is loaded) and torch on every device; returns the seed.

    Two runs are equal bit for bit with this, ``Trainer(deterministic=True)`` and the same versions and hardware.

    Raises:
        ValueError: ``seed`` is not between 0 and 2**32 - 1, which NumPy needs.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an int between 0 and {2**32 - 1}, got {seed!r}")
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    torch.manual_seed(seed)
    return seed


def spread(rank: int) -> None:
    """Gives the generators of a rank a place of their own, that of rank 0 left out: dropout must not be the same everywhere.

    They begin where all ranks are, so a run with a seed has the same numbers on each rank again.
    """
    drawn = [int(torch.randint(2**62, ()).item()), random.getrandbits(62)]
    random.seed(drawn[1] + rank)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed((drawn[1] + rank) % 2**32)
    torch.manual_seed(drawn[0] + rank)


def generator_state() -> dict[str, Any]:
    """The state of every global generator, as numbers, lists and tensors."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_generators(state: dict[str, Any]) -> None:
    """Puts back what `generator_state` took."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    torch.set_rng_state(state["torch"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():  # there may be fewer devices than when it was taken, or none
        for device, own in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(own, device)


def samplers_of(loader: Any) -> list[Any]:
    """The samplers of a loader, each once."""
    batches = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return list({id(each): each for each in found if each is not None}.values())


def own_generators(loaders: Iterable[Any]) -> list[torch.Generator]:
    """The generators that loaders and their samplers have of their own, each once."""
    owners = [owner for loader in loaders for owner in (loader, *samplers_of(loader))]
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())


def remembered(*loaders: Any) -> Callable[[], None]:
    """What puts the global generators and those of ``loaders`` back to where they are now."""
    state = generator_state()
    states = [(generator, generator.get_state()) for generator in own_generators(loaders)]

    def put_back() -> None:
        restore_generators(state)
        for generator, before in states:
            generator.set_state(before)

    return put_back


@contextmanager
def preserved(*loaders: Any) -> Iterator[None]:
    """Whatever is drawn inside, the global generators and those of ``loaders`` are afterwards as they were before."""
    put_back = remembered(*loaders)
    try:
        yield
    finally:
        put_back()
