"""A run as one call that can be made here or in other processes: what goes there, and what comes back."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchplug.run import Run
from torchplug.seed import generator_state, restore_generators

if TYPE_CHECKING:
    from torchplug.module import Module
    from torchplug.trainer import Trainer

__all__ = ["Call", "Done", "Task"]

FIELDS = ("id", "dir", "best_path", "last_path", "ended", "stop_reason", "stopped_by", "interrupted", "resumed", "report")


@dataclass
class Call:
    """What a method of the Trainer was called with.

    Args:
        work: fit, validate, test, predict or tune.
        module: what to work on.
        given: loaders by stage, as they were given to the method.
        datamodule: the data module, if there is one.
        ckpt_path: what to start from.
        resume: which parts of it.
        keep: whether predictions are kept.
    """

    work: str
    module: Module
    given: dict[str, Any]
    datamodule: Any = None
    ckpt_path: str | Path | None = None
    resume: Mapping[str, Any] | None = None
    keep: bool = True


@dataclass
class Done:
    """What a run returned; None may be what it returned, and is no answer to an operation."""

    result: Any


@dataclass
class Task:
    """A run, as the operation ``launch`` gets it: calling it does the run in this process, and gives a `Done`.

    A strategy that has other processes do it pickles it: the copy there knows trainer, plugins, module, data and random generators,
    and does the same run. A process that was forked calls the task itself. In either, `outcome` writes what came of it into a file,
    which `take` brings back into the process that waits.
    """

    trainer: Trainer
    call: Call
    here: Callable[[], Done] | None = None
    generators: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Done:
        if self.here is not None:
            return self.here()
        restore_generators(self.generators)
        return Done(self.trainer.do(self.call))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "here": None, "generators": generator_state()}

    def outcome(self, path: Path, done: Done) -> None:
        """Writes what the waiting process gets to see of the run; what cannot be pickled stays, and is named there."""
        run = self.trainer.run
        assert run is not None
        lost: list[str] = []
        attributes = {name: value for name, value in vars(run.module).items() if name not in INNER}
        content = {
            "result": _packed({"result": done.result}, run.work, lost),
            "module": run.module.state_dict(),
            "attributes": _packed(attributes, type(run.module).__name__, lost),
            "plugins": {name: _packed(vars(each), name, lost) for name, each in run.plugins.items() if hasattr(each, "__dict__")},
            "run": _packed({name: getattr(run, name) for name in FIELDS}, "run", lost),
            "position": asdict(run.position),
            "seconds": run.seconds,
            "metrics": dict(run.metrics.results()),
            "generators": generator_state(),
            "lost": lost,
        }
        torch.save(content, path)

    def take(self, path: Path) -> Done:
        """Puts what `outcome` wrote into module, plugins, run and trainer of this process."""
        content = torch.load(path, map_location="cpu", weights_only=False)  # a file of our own, written a moment ago
        run = self.trainer.run
        assert run is not None
        run.module.load_state_dict(content["module"])
        vars(run.module).update(_unpacked(content["attributes"]))
        for name, parts in content["plugins"].items():
            vars(run.plugins[name]).update(_unpacked(parts))
        for owner, values in ((run, _unpacked(content["run"])), (run.position, content["position"])):
            for name, value in values.items():
                setattr(owner, name, value)
        run.set_seconds(content["seconds"])
        self.trainer.adopt(run, content["metrics"])
        restore_generators(content["generators"])
        if content["lost"]:
            run.say_once(f"stayed in the processes that did the run, as it cannot be pickled: {', '.join(content['lost'])}", logging.INFO)
        return Done(_unpacked(content["result"]).get("result"))


INNER = {*vars(nn.Module()), "_run"}  # what a module consists of, beside its attributes


def _packed(values: Mapping[str, Any], owner: str, lost: list[str]) -> dict[str, bytes]:
    """Each value by itself, as one that cannot be pickled must not take the others with it."""
    packed = {}
    for name, value in values.items():
        if isinstance(value, (Run, nn.Module)):  # the waiting process has its own
            continue
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
        except Exception:  # whatever an object of somebody else raises when it is pickled
            lost.append(f"{owner}.{name}")
        else:
            packed[name] = buffer.getvalue()
    return packed


def _unpacked(packed: Mapping[str, bytes]) -> dict[str, Any]:
    return {name: torch.load(io.BytesIO(each), map_location="cpu", weights_only=False) for name, each in packed.items()}
