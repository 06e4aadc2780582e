"""Checks of how a plugin gets on with others: plugins before and after it, other ranks, and those that clean up after its errors."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from torchplug.testing.recorded import recorded
from torchplug.testing.subject import SETTINGS, NotApplicable, Practice, Problems, Saver, Subject, differences, quiet, result_of
from torchplug.testing.tiny import tiny_fit, tiny_trainer
from torchplug.tracking import Tracker
from torchplug.trainer import Trainer

__all__ = ["an_error_in_each_hook_is_named", "it_trains_on_two_ranks", "it_works_with_every_other_plugin"]

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
    for where, fit in (("after", lambda named: subject.fit(after=tuple(named))), ("before", lambda named: subject.fit(*named))):
        made = _together(subject, others, fit)
        if made is None:
            yield from filter(None, (_trouble(other, where, fit) for other in others))
            continue
        if not all(bool(torch.isfinite(value).all()) for value in made["weights"].values()):
            yield f"with all other plugins {where} it, parameters are not finite: look at what it does to gradients and weights"
        if subject.observer:
            for path in list(differences(made, result_of(subject.bare(*others))))[:1]:
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


def _trouble(other: Any, where: str, fit: Callable[[list[Any]], Any]) -> str:
    """What is wrong with one neighbour, empty if nothing is."""
    try:
        fit([other])
    except Exception as error:
        return (
            f"with {next(iter(other))!r} {where} it, a run fails with {type(error).__name__}: {error}; say with before and after where it "
            "must stand, or refuse the other one with a ValueError that names both"
        )
    return ""


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


# ---------------------------------------------------------------------- errors


class Injected(Exception):
    """Raised in a hook of the plugin by its check."""


class _Eventful(Practice):
    """A module in whose fit nearly every hook has a reason to be called."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 4 else super().training_step(batch, batch_idx)


class _Causes:
    """Does in a fit what makes the rarer hooks fire."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @hookimpl
    def on_train_batch_end(self, run: Run, batch_idx: int) -> None:
        if run.position.micro_step == 2:
            run.save_checkpoint(self.folder / "other.safetensors")
            run.remove_checkpoint(self.folder / "other.safetensors", "it was there to be removed")
            file = self.folder / "file.txt"
            file.write_text("of a check", encoding="utf-8")
            run.hooks.log_text(run, "text", "of a check", run.position.step)
            run.hooks.log_artifact(run, file, "file")
        if run.position.epoch == 1 and batch_idx == 3:
            run.request_stop("the check has seen enough")


class _Fails(Practice):
    """A module that raises ``error`` in the middle of a run."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise self.error
        return super().training_step(batch, batch_idx)


def _works(subject: Subject, *others: Any) -> dict[str, Callable[[], Any]]:
    """Runs of every kind, in which the hooks are called, each with other plugins beside the subject."""
    root = subject.root()

    def trainer() -> Any:
        return tiny_trainer(*others, subject.named, _Causes(root), **{**SETTINGS, "root_dir": root})

    def resumed() -> Any:
        path = root / "saved.safetensors"
        with _whole_class(subject):
            tiny_fit(subject.named, Saver(path), module=Practice(), **{**SETTINGS, "root_dir": root})
        return trainer().fit(Practice(), ckpt_path=path)

    return {
        "fit": lambda: trainer().fit(_Eventful()),
        "a fit that goes on": resumed,
        "a fit that fails": lambda: trainer().fit(_Fails(RuntimeError("the module of this check raises here"))),
        "a fit without memory": lambda: trainer().fit(_Fails(torch.OutOfMemoryError("out of memory, as this check has it"))),
        "test": lambda: trainer().test(Practice()),
        "predict": lambda: trainer().predict(Practice()),
        "tune": lambda: trainer().tune(Practice()),
        "a fit from the last": lambda: trainer().fit(Practice(), ckpt_path="last"),
    }


class _Seen:
    """Which hooks of a plugin are called; core tells it of every call."""

    def __init__(self, name: str) -> None:
        self.name, self.hooks = name, set[str]()

    def enter_call(self, member: str, hook: str) -> None:
        if member == self.name:
            self.hooks.add(hook)

    def leave_call(self) -> None:
        pass


def _reached(subject: Subject) -> dict[str, str]:
    """For each hook a kind of run that calls it, if there is one."""
    found: dict[str, str] = {}
    for work in _works(subject):
        seen = _Seen(subject.name)
        if subject.hooks.keys() - found.keys():
            try:
                _works(subject, seen)[work]()
            except Exception:
                if work in ("fit", "a fit that goes on"):  # the others fail, or have nothing to do without such a plugin
                    raise
        found.update({hook: work for hook in subject.hooks if hook in seen.hooks and hook not in found})
    return found


@contextmanager
def _whole_class(subject: Subject) -> Iterator[None]:
    """Inside, the hook that raises is the plugin's own one again."""
    target, broken = subject.target, {name: value for name, value in vars(subject.target).items() if hasattr(value, "injected")}
    for name, function in broken.items():
        _put(target, name, function.injected)
    try:
        yield
    finally:
        for name, function in broken.items():
            setattr(target, name, function)


def _put(target: type, name: str, function: Any) -> None:
    """Sets a method, or lets go of it where the class has inherited it."""
    if function is None:
        delattr(target, name)
    else:
        setattr(target, name, function)


@contextmanager
def _raising(subject: Subject, hook: str) -> Iterator[None]:
    """Inside, a hook of the plugin raises."""
    target = subject.target
    options = subject.hooks[hook]
    arguments = ", ".join(("self", *(name for name in PARAMETERS[hook])))
    ending = "; yield" if options["wrapper"] else ""
    namespace: dict[str, Any] = {"Injected": Injected}
    exec(f"def {hook}({arguments}):\n    raise Injected('an error of the check'){ending}", namespace)
    function = namespace[hook]
    function.injected = vars(target).get(hook)
    setattr(target, hook, hookimpl(**options)(function))
    try:
        yield
    finally:
        _put(target, hook, function.injected)


def an_error_in_each_hook_is_named(subject: Subject) -> Problems:
    """An error in any of its hooks ends the run and says plugin, package, version, hook and rank; everybody is still torn down.

    With ``on_error = "disable"`` it is switched off instead, with one line that says so, and the run goes on. Its own tear-down bears
    being called whatever hook failed before.
    """
    subject.one_class()
    subject.one_process()
    reached = _reached(subject)
    for hook, work in reached.items():
        yield from _with_an_error(subject, hook, work)
    unreached = [hook for hook in subject.hooks if hook not in reached]
    if unreached:
        subject.notes.append(f"hooks that no tiny run of one process calls, not made to fail: {', '.join(unreached)}")


def _with_an_error(subject: Subject, hook: str, work: str) -> Problems:
    """What is wrong when ``hook`` raises in a run of this kind."""
    around = [recorded("setup", "teardown", "on_run_end") for _ in range(2)]
    raised: BaseException | None = None
    with _raising(subject, hook), quiet() as lines, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a hook that was made to fail does not close its files
        try:
            _works(subject, {"first": around[0]}, {"second": around[1]})[work]()
        except Exception as error:
            raised = error.with_traceback(None)
        gc.collect()
    notes = "\n".join([*getattr(raised, "__notes__", []), *lines])
    closed = "setup" not in around[0].names or all(each.names[-2:] == ["teardown", "on_run_end"] for each in around)
    yield from _wrong(subject, f"an error in {hook} ({work})", hook, raised, notes, closed)


def _wrong(subject: Subject, what: str, hook: str, raised: BaseException | None, notes: str, closed: bool) -> Problems:
    member = subject.member
    if not closed:
        yield f"{what} keeps other plugins from being torn down: let errors of hooks pass, and catch none that is not its own"
    again = notes.partition("while this error was handled, another one came up:")[2]
    if (again and "Injected" not in again) or "which is switched off, failed in" in notes:
        told = re.search(r"^(?!Traceback)\S.*", again or notes.partition("which is switched off, ")[2], re.MULTILINE)
        yield f"{what} makes its own tear-down fail too ({told and told[0]}): give every attribute a value in __post_init__"
    if member.on_error == "disable":
        if f"{member.label} failed in {hook} and is switched off" not in notes:
            yield f"{what} does not switch it off with a line that names it: let the error pass, core says what there is to say"
        return
    if f"raised by {member.label} in {hook}, rank 0" not in notes:
        shown = "nothing" if raised is None else f"{type(raised).__name__}: {raised}"
        yield f"{what} is not named ({shown} came out): let errors of hooks pass as they are, and raise others from them"
