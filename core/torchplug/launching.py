"""A run as one call that can be made here or in other processes: what goes there, and what comes back."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchplug.run import Run
from torchplug.seed import generator_state, restore_generators
from torchplug.sharded import whole

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

    def outcome(self, path: Path | None, done: Done, parts: Collection[str] = ()) -> None:
        """Writes what the waiting process gets to see of the run; what cannot be pickled stays, and is named there.

        Every rank calls it: tensors that are spread over ranks are whole in what is written.

        Args:
            path: the file, which is there when it is whole. None: this rank writes nothing.
            done: what the run returned.
            parts: the names in the module's state before the run: if it has others now, layers were made on the way, and go back.
        """
        run = self.trainer.run
        assert run is not None
        lost: list[str] = []
        module, run.ended = whole(run.module.state_dict(), path is not None), whole(run.ended, path is not None)
        plugins = {name: whole(vars(each), path is not None) for name, each in run.plugins.items() if hasattr(each, "__dict__")}
        if path is None:
            return
        attributes = {name: value for name, value in vars(run.module).items() if name not in INNER and not name.startswith(TORCHS)}
        grown = {} if run.module.state_dict().keys() == set(parts) else {name: vars(run.module)[name] for name in LAYERS}
        data = {} if run.datamodule is None else {name: value for name, value in vars(run.datamodule).items() if type(value) in PLAIN}
        content = {
            "result": _packed({"result": done.result}, run.work, lost),
            "layers": _packed(grown, type(run.module).__name__, lost),
            "module": module,
            "attributes": _packed(attributes, type(run.module).__name__, lost),
            "data": data,
            "plugins": {name: _packed(each, name, lost) for name, each in plugins.items()},
            "run": _packed({name: getattr(run, name) for name in FIELDS}, "run", lost),
            "position": asdict(run.position),
            "seconds": run.seconds,
            "metrics": dict(run.metrics.results()),
            "generators": generator_state(),
            "lost": lost,
        }
        unfinished = path.with_name(f"{path.name}.part")
        torch.save(content, unfinished)
        unfinished.rename(path)

    def take(self, path: Path) -> Done:
        """Puts what `outcome` wrote into module, plugins, run and trainer of this process."""
        content = torch.load(path, map_location="cpu", weights_only=False)  # a file of our own, written a moment ago
        run = self.trainer.run
        assert run is not None
        vars(run.module).update(_unpacked(content["layers"]))
        run.module.load_state_dict(content["module"])
        vars(run.module).update(_unpacked(content["attributes"]))
        if run.datamodule is not None:
            vars(run.datamodule).update(content["data"])
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
TORCHS = ("_is_fsdp_", "_fsdp_", "__composable_api_")  # how the names begin that torch gives a module whose parameters it shards
LAYERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
PLAIN = (bool, int, float, str, type(None))  # what a data module brings back: data themselves may be large, and are there already


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
