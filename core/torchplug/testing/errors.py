"""The check of what happens when a plugin fails: in each of its hooks once."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchplug.hookspecs import hookimpl
from torchplug.members import PARAMETERS
from torchplug.run import Run
from torchplug.testing.recorded import recorded
from torchplug.testing.subject import SETTINGS, Practice, Problems, Saver, Subject, quiet
from torchplug.testing.tiny import tiny_fit, tiny_trainer

__all__ = ["an_error_in_each_hook_is_named"]

AGAIN = ("while this error was handled, another one came up:", "which is switched off, ")  # what is said of a second error


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
    notes = [*getattr(raised, "__notes__", []), *lines]
    closed = "setup" not in around[0].names or all(each.names[-2:] == ["teardown", "on_run_end"] for each in around)
    yield from _wrong(subject, f"an error in {hook} ({work})", hook, raised, notes, closed)


def _wrong(subject: Subject, what: str, hook: str, raised: BaseException | None, notes: list[str], closed: bool) -> Problems:
    member, said = subject.member, "\n".join(notes)
    if not closed:
        yield f"{what} keeps other plugins from being torn down: let errors of hooks pass, and catch none that is not its own"
    again = [note.partition(marker)[2] for note in notes for marker in AGAIN if marker in note]
    if again and "Injected" not in again[0]:
        told = re.search(r"^(?!Traceback)\S.*", again[0].strip(), re.MULTILINE)
        yield f"{what} makes its own tear-down fail too ({told and told[0]}): give every attribute a value in __post_init__"
    if member.on_error == "disable":
        if f"{member.label} failed in {hook} and is switched off" not in said:
            yield f"{what} does not switch it off with a line that names it: let the error pass, core says what there is to say"
    elif f"raised by {member.label} in {hook}, rank 0" not in said:
        shown = "nothing" if raised is None else f"{type(raised).__name__}: {raised}"
        yield f"{what} is not named ({shown} came out): let errors of hooks pass as they are, and raise others from them"
