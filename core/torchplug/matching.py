"""What a checkpoint and the run that goes on from it must have in common, and which parts of it are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchplug.checkpoint import CheckpointError
from torchplug.data import length
from torchplug.options import closest

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["PARTS", "Choice", "check", "check_model", "facts", "new_data", "stateful"]

PARTS = ("model", "optimizer", "scheduler", "position", "data", "rng", "metrics", "plugins")


class Choice:
    """Which parts of a checkpoint are resumed: ``{"include": [...]}`` or ``{"exclude": [...]}``, and ``"strict": False``.

    Args:
        resume: what the user wrote. Parts are model, optimizer, scheduler, position, data, rng, metrics, plugins, and
            ``plugin:NAME`` for one of them.

    Raises:
        ValueError: an unknown key or part, both kinds of list, or the place in the data without the position.
    """

    def __init__(self, resume: Mapping[str, Any] | None = None) -> None:
        resume = dict(resume or {})
        for key in resume:
            if key not in ("include", "exclude", "strict"):
                raise ValueError(f"resume has no key {key!r}; it takes include or exclude, and strict")
        if "include" in resume and "exclude" in resume:
            raise ValueError("resume takes include or exclude, not both")
        self.strict = bool(resume.get("strict", True))
        self.include = None if "include" not in resume else self._parts(resume["include"])
        self.exclude = self._parts(resume.get("exclude", ()))
        if self.include is not None and "position" not in self.include and self.include & {"data", "metrics"}:
            raise ValueError("resume: data and metrics belong to a position; include it too")

    @staticmethod
    def _parts(named: Any) -> set[str]:
        if isinstance(named, str):
            raise ValueError(f"resume takes lists of parts, got {named!r}; write [{named!r}]")
        for part in named:
            if part not in PARTS and not str(part).startswith("plugin:"):
                raise ValueError(f"resume: there is no part {part!r}{closest(str(part), PARTS)}: there are {', '.join(PARTS)}, plugin:NAME")
        return set(named)

    def __contains__(self, part: object) -> bool:
        plugin = str(part).startswith("plugin:")
        if (part in ("data", "metrics") or (plugin and self.include is None)) and "position" not in self:
            return False  # what a plugin remembers of one run means nothing in another, unless somebody says so
        names = {part, "plugins"} if plugin else {part}
        return not names & self.exclude and (self.include is None or bool(names & self.include))


def facts(run: Run) -> dict[str, Any]:
    """What must be the same for a place in the data to mean the same."""
    loader = run.loaders["train"][0]
    size = getattr(loader, "batch_size", None)
    dataset: Any = getattr(loader, "dataset", None)
    return {
        "accumulate_grad_batches": run.batches_per_step(run.position.epoch),
        "batch size": size if size is None or run.share is None else size * run.world_size,  # of all ranks together
        "length of the data set": length(dataset) if hasattr(dataset, "__getitem__") else None,
        "number of batches in an epoch": run.num_batches,
    }


def new_data(run: Run, state: Mapping[str, Any], path: Path | str | None) -> bool:
    """Whether a trainer goes on with its own earlier run, but with other data: between two epochs that is no mistake."""
    return path is None and not state["position"]["batch"] and state["data"]["facts"] != facts(run)


def stateful(run: Run) -> dict[str, Any]:
    """The enabled plugins whose state is saved, by name."""
    return {name: plugin for name, plugin in run.plugins.items() if hasattr(plugin, "state_dict")}


def check(run: Run, state: Mapping[str, Any], path: Path | str | None, choice: Choice) -> None:
    """Refuses a state that does not fit, before anything is changed.

    Raises:
        CheckpointError: what is different is named.
    """
    where = "the earlier run" if path is None else str(path)
    if state["kind"] != "run":
        raise CheckpointError(f"{where} holds weights only, which is not enough to resume from; load_from_checkpoint takes them")
    if "model" in choice:
        check_model(run, state["module"], where)
    if "optimizer" in choice:
        _check_optimizers(run, state["optimizers"], where)
    if "scheduler" in choice:
        now = [type(each.scheduler).__qualname__ for each in run.schedulers]
        before = _classes(state["schedulers"], now)
        if before != now:
            raise CheckpointError(f"{where} has {_many(before, 'scheduler')}, configure_optimizers gives {_many(now, 'scheduler')}")
    if "data" in choice and state["data"] is not None and not new_data(run, state, path):
        _check_data(run, state["data"], where)
    if "position" in choice:
        _check_end(run, state["position"], where)
    if choice.strict:
        _check_plugins(run, state["plugins"], where, choice)


def _classes(saved: list[dict[str, Any]], now: list[str]) -> list[str]:
    """The classes of what was saved; format 1 did not know them, which no class contradicts."""
    known = [*now, *["unknown"] * len(saved)]
    return [each["class"] or known[i] for i, each in enumerate(saved)]


def _many(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) != 1)}" + (f" ({', '.join(names)})" if names else "")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_model(run: Run, saved: Mapping[str, Any], where: str) -> None:
    """Refuses the weights of another model.

    Raises:
        CheckpointError: names or shapes are different.
    """
    own = run.module.state_dict()
    problems = []
    if lacking := [name for name in own if name not in saved]:
        problems.append(f"it lacks {_some(lacking)}")
    if unknown := [name for name in saved if name not in own]:
        problems.append(f"the module has no {_some(unknown)}")
    other = [
        f"{name} is {tuple(saved[name].shape)} in the file and {tuple(value.shape)} in the module"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(saved.get(name), Tensor) and not nn.parameter.is_lazy(value)
        if saved[name].shape != value.shape
    ]
    if other:
        problems.append(_some(other))
    if problems:
        raise CheckpointError(f"{where} is of another model than {type(run.module).__name__}: {'; '.join(problems)}")


def _check_optimizers(run: Run, saved: list[dict[str, Any]], where: str) -> None:
    now = [type(each).__qualname__ for each in run.optimizers]
    before = _classes(saved, now)
    if before != now:
        raise CheckpointError(
            f"{where} has {_many(before, 'optimizer')}, configure_optimizers gives {_many(now, 'optimizer')}; "
            "leave it out with resume={'exclude': ['optimizer', 'scheduler']} if that is meant"
        )
    for number, (each, optimizer) in enumerate(zip(saved, run.optimizers, strict=True)):
        sizes = [len(group["params"]) for group in each["state"]["param_groups"]]
        own = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != own:
            raise CheckpointError(
                f"{where}: optimizer {number} ({each['class']}) has {len(sizes)} parameter groups of {sizes} parameters, "
                f"that of configure_optimizers has {len(own)} of {own}"
            )


def _check_data(run: Run, state: dict[str, Any], where: str) -> None:
    saved, now = state["facts"], facts(run)
    other = [f"{name} was {value}, is {now[name]}" for name, value in saved.items() if value is not None and value != now.get(name)]
    other = [line for line in other if not line.endswith("is None")]
    if other:
        raise CheckpointError(
            f"{where} was written with other data or accumulation: {'; '.join(other)}; set it back, or begin the epoch anew with "
            "resume={'exclude': ['data']}"
        )
    try:
        run.stream.check(state)
    except ValueError as error:
        raise CheckpointError(f"{where} was written with other data: {error}") from None


def _check_end(run: Run, saved: Mapping[str, Any], where: str) -> None:
    options = run.options
    begun = saved["epoch"] + (saved["batch"] > 0)
    if options.max_epochs is not None and options.max_epochs < begun:
        raise CheckpointError(f"{where} stands in epoch {saved['epoch']}, which max_epochs={options.max_epochs} does not reach; raise it")
    if options.max_steps is not None and options.max_steps < saved["step"]:
        raise CheckpointError(f"{where} stands at step {saved['step']}, which is more than max_steps={options.max_steps}; raise it")


def _check_plugins(run: Run, saved: Mapping[str, Any], where: str, choice: Choice) -> None:
    own = stateful(run)
    extra = [name for name in saved if name not in own and f"plugin:{name}" in choice]
    lacking = [name for name in own if name not in saved and f"plugin:{name}" in choice]
    if extra or lacking:
        parts = [f"it has the state of {', '.join(extra)}, not enabled now"] * bool(extra)
        parts += [f"it has no state of {', '.join(lacking)}"] * bool(lacking)
        raise CheckpointError(
            f"{where} was written with other plugins: {'; '.join(parts)} (then: {', '.join(saved) or 'none'}; now: "
            f"{', '.join(own) or 'none'}); enable the same ones, or write resume={{'strict': False}}"
        )
