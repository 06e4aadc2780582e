"""Checks of what a plugin does to training: its numbers, its state, and what becomes of both when the process is killed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from torchplug import checkpoint
from torchplug.hookspecs import hookimpl
from torchplug.run import Run
from torchplug.testing.processes import Child
from torchplug.testing.subject import KILLED, NotApplicable, Problems, Saver, Subject, differences, quiet, result_of

__all__ = [
    "a_killed_run_goes_on_as_if_nothing_had_happened",
    "an_observer_leaves_training_as_it_is",
    "its_state_survives_a_checkpoint",
    "parameters_are_finite",
    "runs_of_one_seed_are_equal",
]


def parameters_are_finite(subject: Subject) -> Problems:
    """A tiny module that it trains with has finite parameters at the end."""
    subject.one_process()
    run = subject.whole.trainer.run
    assert run is not None
    for name, parameter in run.module.named_parameters():
        if not torch.isfinite(parameter).all():
            yield f"parameter {name} is not finite after {run.position.step} steps: look at what the plugin does to gradients and weights"


def runs_of_one_seed_are_equal(subject: Subject) -> Problems:
    """Two runs with one seed agree bit for bit: weights, optimizers, random generators, metrics, and where they ended."""
    subject.one_process()
    for path in _first(differences(subject.whole.result, result_of(subject.fit(Saver(subject.root() / "saved.safetensors"))))):
        yield (
            f"two runs of one seed differ in {path}: draw random numbers from torch's, Python's or NumPy's global generators, which "
            "Trainer(seed=) seeds, and let nothing depend on time or on the order of a set"
        )


def an_observer_leaves_training_as_it_is(subject: Subject) -> Problems:
    """A plugin that only observes changes no weight and no optimizer, draws no random number and does not end the run.

    It observes if it has ``on_error = "disable"``, or ``observes = True`` where an error of it shall end the run all the same.
    """
    subject.one_class()
    if not subject.observer:
        raise NotApplicable("it acts on the run (neither on_error = 'disable' nor observes = True)")
    for path in _first(differences(subject.whole.result, result_of(subject.bare(Saver(subject.root() / "saved.safetensors"))))):
        yield (
            f"a run with it and one without it differ in {path}: work on detached copies, under torch.no_grad(), and draw random numbers "
            "inside of torchplug.preserved() or from a torch.Generator of its own; if it is meant to act on the run, let it have "
            "on_error = 'abort', and not say that it observes"
        )


def _first(paths: Any) -> list[str]:
    """The first of the differences: where one thing is different, others follow."""
    return [path for path, _ in zip(paths, range(1), strict=False)]


# ---------------------------------------------------------------------- state


class _Peek:
    """Notes what the plugin's state is when training begins."""

    after = "*"

    def __init__(self, name: str) -> None:
        self.name, self.state = name, dict[str, Any]()

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self.state = copy.deepcopy(run.plugins[self.name].state_dict())


def its_state_survives_a_checkpoint(subject: Subject) -> Problems:
    """What ``state_dict`` gives is safe to store, and a run that goes on from a checkpoint has it again when training begins.

    Safe is what a checkpoint holds without pickle, and ``torch.load(weights_only=True)`` reads: tensors, numbers, texts, None, and
    lists, tuples and dicts of them.
    """
    subject.one_class()
    subject.one_process()
    path, plugin = subject.whole.path, subject.plugin
    if not hasattr(plugin, "state_dict"):
        raise NotApplicable("it has no state_dict, so a checkpoint keeps nothing of it")
    state, advice = plugin.state_dict(), "give numbers, texts, tensors, and lists and dicts of them in state_dict"
    if not path.exists():
        raise NotApplicable("the run was over before a checkpoint could be written")
    torch.save(state, path.with_suffix(".pt"))
    try:
        read = torch.load(path.with_suffix(".pt"), weights_only=True)
    except Exception as error:
        yield f"its state cannot be read with weights_only=True ({str(error).splitlines()[0]}): {advice}"
        return
    for place in _first(differences(state, read)):
        yield f"its state is another one when it was stored and read, at {place or 'the whole of it'}: {advice}"
    saved = checkpoint.load(path)["plugins"][subject.name]
    new, loaded = _Peek(subject.name), _Peek(subject.name)
    subject.fit(new)
    subject.resume(path.parent, path, loaded)
    forgotten = set(differences(saved, loaded.state)) - set(differences(new.state, loaded.state))
    for place in sorted(forgotten)[:1]:
        yield (
            f"a run that goes on from a checkpoint has nothing of its state at {place or 'all'}: put it back in load_state_dict, and do "
            "not forget it in on_fit_start or on_train_start, which a run that goes on calls too"
        )


# ---------------------------------------------------------------------- a process that is killed


def _fit_until_killed(subject: Subject, root: Path, path: Path) -> None:
    with quiet():
        subject.fit(Saver(path, kills=True), root_dir=root)


def a_killed_run_goes_on_as_if_nothing_had_happened(subject: Subject) -> Problems:
    """A process is killed by SIGKILL after a batch; the run that goes on from its last checkpoint ends as the one that was not.

    Weights, optimizers, random generators and metrics agree bit for bit.
    """
    subject.one_process()
    root = subject.root()
    path = root / "saved.safetensors"
    child = Child(_fit_until_killed, subject, root, path)
    try:
        child.wait()
        if child.killed_by != "SIGKILL":
            child.result("the process that was to be killed")
            raise NotApplicable(f"with these options the run has no {KILLED} batches, so it could not be killed in the middle")
    finally:
        child.close()
    for place in _first(differences(subject.whole.result, result_of(subject.resume(root, path)))):
        yield (
            f"a run that was killed and went on from its checkpoint differs from one that was not, in {place}: keep in state_dict whatever "
            "decides how it goes on, and do not forget it in on_fit_start or on_train_start, which a run that goes on calls too"
        )
