"""Checks of how a plugin gets on with others: plugins before and after it, and other ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchplug.discovery import Found, PluginError, discover, installed
from torchplug.distributed import Ranks
from torchplug.hookspecs import hookimpl
from torchplug.members import PARAMETERS
from torchplug.module import Module
from torchplug.options import fields_of
from torchplug.run import Run
from torchplug.sharded import whole
from torchplug.testing.processes import two_ranks
from torchplug.testing.stored import listed
from torchplug.testing.subject import SETTINGS, NotApplicable, Practice, Problems, Subject, differences, quiet, result_of
from torchplug.testing.tiny import tiny_fit
from torchplug.tracking import Tracker
from torchplug.trainer import Trainer

__all__ = ["it_trains_on_two_ranks", "it_works_with_every_other_plugin"]

# ---------------------------------------------------------------------- other plugins

# what an option that a neighbour requires is given, by its name
GIVEN: dict[str, Any] = {"monitor": "val_loss", "frozen": ["layer.bias"], "scheduling": {0: 1}, "hooks": {}}


def it_works_with_every_other_plugin(subject: Subject) -> Problems:
    """A run works with every other installed plugin before it, and after it, and an observer leaves training as those have it.

    Left out are what starts processes, what sends the journal to a tracker from a thread of its own, and what requires options that
    nobody can guess; the report names the last ones.
    """
    subject.one_process()
    others = list(_neighbours(subject))
    if not others:
        raise NotApplicable("no other plugin is installed")
    bare: tuple[list[Any], dict[str, Any]] = ([], {})  # the neighbours of a run without it, and what came of that
    for where, fit in (("after", lambda named: subject.fit(after=tuple(named))), ("before", lambda named: subject.fit(*named))):
        made = _together(subject, others, fit)
        if made is None:
            yield from _one_by_one(others, where, fit)
            continue
        if not all(bool(torch.isfinite(value).all()) for value in made["weights"].values()):
            yield f"with all other plugins {where} it, parameters are not finite: look at what it does to gradients and weights"
        if subject.observer:
            if bare[0] != others:
                bare = list(others), result_of(subject.bare(*others))
            for path in list(differences(made, bare[1]))[:1]:
                yield f"with all other plugins {where} it, training differs from that without it, in {path}: it must only observe"


def _together(subject: Subject, others: list[Any], fit: Callable[[list[Any]], Trainer]) -> dict[str, Any] | None:
    """What comes of a run with all of ``others``; who is refused by an error that names both sides is taken out. None if it fails."""
    while True:
        try:
            return result_of(fit(others))
        except Exception as error:
            named = [other for other in others if re.search(rf"\b{next(iter(other))}\b", str(error))]
            itself = re.search(rf"\b{subject.name}\b", str(error)) is not None
            if not isinstance(error, (ValueError, PluginError)) or not named or len(named) + itself < 2:
                return None
            others.remove(named[-1])
            if itself:
                subject.notes.append(f"not together with {next(iter(named[-1]))!r}: {error}")


def _one_by_one(others: list[Any], where: str, fit: Callable[[list[Any]], Any]) -> Problems:
    """With which neighbours a run fails, by the error."""
    errors: dict[str, list[str]] = {}
    for other in others:
        try:
            fit([other])
        except Exception as error:
            errors.setdefault(f"{type(error).__name__}: {error}", []).append(next(iter(other)))
    for said, names in errors.items():
        yield (
            f"with {listed(names)} {where} it, a run fails with {said}; say with before and after where it must stand, or refuse the "
            "other one with a ValueError that names both"
        )


def _neighbours(subject: Subject) -> Iterator[Any]:
    """How the other installed plugins are named."""
    own = {subject.name, *(subject.target if subject.bundle else ())}
    for found in discover():
        if found.name in own:
            continue
        target = _loaded(found, subject)
        if target is None or isinstance(target, (list, tuple)) or issubclass(target, Tracker) or _starts_processes(target):
            continue
        required = [option.name for option in fields_of(target) if option.default == "required"]
        if set(required) - GIVEN.keys():
            subject.notes.append(f"not tried with {found.name!r}, which requires {', '.join(required)}")
            continue
        yield {found.name: {name: GIVEN[name] for name in required}}


def _starts_processes(target: type) -> bool:
    """Whether it always answers ``launch``; what answers every hook answers those that its options name."""
    answers = [hook for hook in PARAMETERS if hasattr(getattr(target, hook, None), "torchplug_impl")]
    return "launch" in answers and len(answers) < len(PARAMETERS)


def _loaded(found: Found, subject: Subject) -> Any:
    try:
        return found.load()
    except PluginError as error:
        subject.notes.append(f"not tried with {found.name!r}, which cannot be loaded: {error}")
        return None


# ---------------------------------------------------------------------- two ranks


class Gloo(Ranks):
    """The smallest strategy: gradients are averaged when they are complete. It stands in where no other one is installed."""

    @hookimpl
    def setup_module(self, run: Run, module: Module) -> None:
        if run.world_size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0)

    @hookimpl
    def reduce_gradients(self, run: Run) -> bool:
        for parameter in run.module.parameters() if run.world_size > 1 else ():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
                parameter.grad /= run.world_size
        return True


def _on_a_rank(strategy: Any, root: Path, *named: Any) -> dict[str, Any]:
    """A run on this rank, and what came of it."""
    with quiet():
        module = Practice()
        tiny_fit(strategy, *named, module=module, **{**SETTINGS, "root_dir": root})
        weights: dict[str, Any] = whole(module.state_dict(), True)
    return {name: value.detach().clone() for name, value in weights.items()}


def _on_both(strategy: Any, root: Path, named: Any) -> list[Any]:
    """A run without and one with the plugin."""
    return [_on_a_rank(strategy, root, *each) for each in ((), (named,))]


def it_trains_on_two_ranks(subject: Subject) -> Problems:
    """Two ranks train with it to the end, and have the same finite weights; an observer leaves them as they are without it."""
    if subject.bundle or not {"launch", "gather"} <= subject.hooks.keys():
        strategy, named = "ddp" if installed("ddp") else Gloo(), subject.named
        task = partial(_on_both, strategy, subject.root(), named)
    else:
        task = partial(_on_itself, subject.named, subject.root())
    try:
        first, second = two_ranks(task)
    except TimeoutError as error:
        yield (
            f"two ranks wait for each other for ever: every rank must ask the others (run.agreement, reduce, gather, barrier) in the same "
            f"order, whatever its number: {error}"
        )
        return
    for path in list(differences(first[-1], second[-1]))[:1]:
        yield f"the two ranks have different weights at the end ({path}): what changes weights must be the same on every rank"
    if not all(bool(torch.isfinite(value).all()) for value in first[-1].values()):
        yield "on two ranks parameters are not finite at the end: look at what it does to gradients that are averaged"
    if subject.observer:
        for path in list(differences(*first))[:1]:
            yield f"on two ranks training with it differs from that without it, in {path}: it must only observe"


def _on_itself(named: Any, root: Path) -> list[Any]:
    """A run of two ranks by the strategy itself."""
    return [_on_a_rank(named, root)]
