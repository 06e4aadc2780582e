"""What a run can change, taken out of it and put back: the state that a checkpoint holds."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import torchplug
from torchplug.blame import add_note
from torchplug.checkpoint import plain
from torchplug.data import move
from torchplug.loaders import has_state
from torchplug.matching import PARTS, Choice, check, facts, new_data, stateful
from torchplug.seed import generator_state, restore_generators
from torchplug.series import joined
from torchplug.sharded import like_parameters, spread

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["Resumption", "collect", "freeze_metrics", "go_on", "restore", "versions"]

# ---------------------------------------------------------------------- out of a run


def collect(run: Run, weights_only: bool = False) -> dict[str, Any]:
    """The state of a run, as nested dicts and lists of tensors and plain values; the tensors are the run's own."""
    own, ranks = ({}, []) if weights_only else _of_all_ranks(run)
    state = {
        "time": time.time(),
        "kind": "weights" if weights_only else "run",
        "emergency": "",
        "versions": {**versions(), **run.packages},
        "run": {"id": run.id, "class": type(run.module).__qualname__, "dir": str(run.dir.absolute()), "seconds": run.seconds},
        "position": dataclasses.asdict(run.position),
        "module": dict(run.module.state_dict()),
        "hyperparameters": plain(run.module.hparams, "hyperparameters"),
        "hyperparameters_argument": run.module._hparams_argument,
    }
    if weights_only:
        return state
    return {
        **state,
        "loop": {"validated": run.validated},
        "optimizers": [
            {"class": type(optimizer).__qualname__, "steps": steps, "state": optimizer.state_dict()}
            for optimizer, steps in zip(run.optimizers, run.optimizer_steps, strict=True)
        ],
        "schedulers": [
            {"class": type(each.scheduler).__qualname__, "seen": each.seen, "state": each.scheduler.state_dict()} for each in run.schedulers
        ],
        "scaler": None if run.scaler is None else run.scaler.state_dict(),
        **own,
        "ranks": ranks,
        "plugins": {name: plugin.state_dict() for name, plugin in run.plugins.items() if hasattr(plugin, "state_dict")},
        "options": {"accumulate_grad_batches": run.options.accumulate_grad_batches, "precision": run.options.precision},
    }


def _of_all_ranks(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What each rank has for itself: this one's, and that of the others, in the order of their numbers without the first."""
    objects = dict(metric_objects(run.module))
    own = {
        "generators": generator_state(),
        "metrics": {
            "values": run.metrics.state_dict(objects, run.is_last_batch),
            "objects": run.metrics.frozen_sums or {path: sums(each) for path, each in objects.items()},
        },
        "data": _data(run) if "train" in run.loaders else None,
    }
    return own, [] if run.agreement is None else run.agreement.gather(move(own, torch.device("cpu")))[1:]


def versions() -> dict[str, str]:
    """The versions that a run's results depend on first of all."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchplug": torchplug.__version__}


def _data(run: Run) -> dict[str, Any]:
    """The place in the data, and what a data module remembers."""
    own = run.datamodule.state_dict() if has_state(run.datamodule) else None
    return {"facts": facts(run), "datamodule": own, **run.stream.state_dict(run.position.batch)}


def freeze_metrics(run: Run) -> None:
    """Training ends in the middle of an epoch: what it has added up is concluded now, and stays in the state for a run that goes on."""
    objects = dict(metric_objects(run.module))
    run.metrics.freeze(objects)
    run.metrics.frozen_sums = {path: _mapped(torch.clone, sums(each)) for path, each in objects.items()}


def metric_objects(module: nn.Module) -> list[tuple[str, Any]]:
    """The objects with update, compute and reset in a module, by path: what they add up is in no state dict."""
    inside = list(module.named_modules())[1:]
    beside = [(name, value) for name, value in vars(module).items() if not isinstance(value, nn.Module)]
    return [(path, each) for path, each in (*inside, *beside) if all(hasattr(each, name) for name in ("update", "compute", "reset"))]


def sums(metric: Any) -> dict[str, Any]:
    """The tensors, lists of tensors and numbers that a metric object holds."""
    found = {}
    for name, value in vars(metric).items():
        several = isinstance(value, list) and all(isinstance(part, Tensor) for part in value)
        if isinstance(value, Tensor) or several or type(value) in (bool, int, float, type(None)):
            found[name] = list(value) if several else value
    return found


# ---------------------------------------------------------------------- into a run


@dataclass
class Resumption:
    """What came of a resume: the parts that were put in place, left out, and not there.

    Args:
        path: the file, None where a trainer goes on with its own earlier run.
        loaded: parts that were put in place.
        skipped: parts of the file that were not, because of the choice or because nobody takes them.
        missing: parts of the run that the file knows nothing of.
    """

    path: Path | str | None
    loaded: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lists = (("loaded", self.loaded), ("skipped", self.skipped), ("missing", self.missing))
        return "; ".join(f"{name}: {', '.join(parts)}" for name, parts in lists if parts)


def restore(run: Run, state: Mapping[str, Any], path: Path | str | None, choice: Choice) -> Resumption:
    """Puts a state into a prepared run; everything is checked before anything is changed.

    Raises:
        CheckpointError: the state is of another model, other optimizers, plugins, data or options, or lies behind the end of
            the training; the message names the difference.
    """
    check(run, state, path, choice)
    state = _of_this_rank(run, state)
    report = Resumption(path)
    for part in PARTS[:-1]:
        taken = part in choice and _put(run, state, part, path)
        (report.loaded if taken else report.missing if part in choice else report.skipped).append(part)
    for name in sorted({*state["plugins"], *stateful(run)}):
        part, there = f"plugin:{name}", name in state["plugins"]
        if not there:
            report.missing.append(part)
        elif part not in choice or name not in stateful(run):
            report.skipped.append(part)
        else:
            _load_plugin(run, name, state["plugins"][name])
            report.loaded.append(part)
    if "position" in report.loaded:
        run.loaded = {part: state[key] for part, key in (("rng", "generators"), ("metrics", "metrics")) if part in report.loaded}
        if "data" not in report.loaded:  # the epoch begins anew, and so do its sums
            run.position.batch, run.validated = 0, False
            run.loaded.pop("metrics", None)
    return report


def _of_this_rank(run: Run, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state with the generators, sums and place in the data that belong to this rank.

    Where there were other ranks, the first of the new ones goes on with the generators of the first and the sums of all; the others
    go on with generators of their own and nothing summed up yet. What comes out is equal in distribution then, not in its bits. Of a
    metric object the sums of the first are there alone.
    """
    others = state.get("ranks", [])
    if len(others) == run.world_size - 1:
        return {**state, **others[run.rank - 1]} if run.rank else state
    metrics = dict(state["metrics"])
    values = [each["metrics"]["values"]["series"] for each in (state, *others)]
    metrics["values"] = {**metrics["values"], "series": [] if run.rank else joined(values)}
    if metrics["objects"] and state["position"]["batch"]:
        run.say_once(
            f"{len(others) + 1} ranks wrote this, {run.world_size} go on: metric objects ({', '.join(metrics['objects'])}) have what the "
            "first rank had added up in this epoch, because how the sums of ranks belong together is not known of them"
        )
    metrics["objects"] = {} if run.rank else metrics["objects"]
    return {**state, "metrics": metrics, "generators": None if run.rank else state["generators"]}


def go_on(run: Run) -> None:
    """Training begins: generators and sums are put in place once more, whatever hooks have drawn and logged on the way."""
    loaded, run.loaded = run.loaded, None
    if not loaded:
        return
    if "metrics" in loaded:
        run.metrics.load_state_dict(loaded["metrics"]["values"], run.device, dict(metric_objects(run.module)))
    if "rng" in loaded:
        restore_generators(loaded["rng"])
    run.stream.restore()


def _load_plugin(run: Run, name: str, state: Any) -> None:
    try:
        run.plugins[name].load_state_dict(state)
    except Exception as error:
        add_note(error, f"while plugin {name!r} took its state from a checkpoint")
        raise


def _put(run: Run, state: Mapping[str, Any], part: str, path: Path | str | None) -> bool:
    """Puts one part in place; False if the state does not have it."""
    if part == "model":
        run.module.load_state_dict(spread(state["module"], run.module.state_dict()))
    elif part == "optimizer":
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(like_parameters(saved["state"], optimizer))
            if saved["steps"]:  # schedulers warn if they are the first to step, and have no public way to hear of earlier steps
                vars(optimizer)["_opt_called"] = True
        run.optimizer_steps[:] = [saved["steps"] for saved in state["optimizers"]]
        if run.scaler is not None and state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
    elif part == "scheduler":
        for scheduler, saved in zip(run.schedulers, state["schedulers"], strict=True):
            scheduler.scheduler.load_state_dict(saved["state"])
            scheduler.seen = saved["seen"]
    elif part == "position":
        run.validated = state["loop"]["validated"]
    elif part == "data":
        if state["data"] is None or new_data(run, state, path):
            return False
        run.stream.load_state_dict(state["data"])
        if state["data"]["datamodule"] is not None and has_state(run.datamodule):
            run.datamodule.load_state_dict(state["data"]["datamodule"])
    elif part == "rng":
        if state["generators"] is None:
            return False
        restore_generators(state["generators"])
    elif part == "metrics":
        if not state["metrics"]:
            return False
        objects = dict(metric_objects(run.module))
        run.metrics.load_state_dict(state["metrics"]["values"], run.device, objects)
        for name, saved in state["metrics"]["objects"].items():
            if name in objects:
                vars(objects[name]).update(_mapped(lambda tensor: tensor.to(run.device), saved))
    return True


def _mapped(change: Callable[[Tensor], Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """What `sums` gave, with every tensor changed."""
    mapped: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            mapped[name] = change(value.detach())
        elif isinstance(value, list):
            mapped[name] = [change(part.detach()) for part in value]
        else:
            mapped[name] = value
    return mapped
