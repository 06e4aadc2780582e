"""Before the loop starts: data, module, loaders and optimizers are asked for, checked, and put into the run."""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchplug.blame import add_note
from torchplug.data import IN_WORDS, LOADERS, DataModule, length, limited
from torchplug.loaders import exact, explained
from torchplug.loop import update
from torchplug.module import Module, check_names, defines
from torchplug.optimizers import ManualOptimizer, needs_closure, parse
from torchplug.seed import remembered, spread
from torchplug.stream import Stream

if TYPE_CHECKING:
    from torchplug.hookspecs import Hooks
    from torchplug.run import Run

__all__ = ["Sources", "check_module", "is_datamodule", "make_directory", "prepare"]

STAGES = {
    "fit": ("train", "validate"),
    "tune": ("train", "validate"),
    "validate": ("validate",),
    "test": ("test",),
    "predict": ("predict",),
}
STEP_OF = {"train": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
LIMIT_OF = {
    "train": "limit_train_batches",
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}


@dataclass
class Sources:
    """Where loaders come from: those given to the method by stage, else the data module, else the module."""

    given: dict[str, Any]
    datamodule: Any = None


def check_module(module: Any, work: str) -> None:
    """Refuses what cannot be run, before anything else happens.

    Raises:
        TypeError: not a Module, or the method that the work needs is missing.
    """
    if inspect.isclass(module) and issubclass(module, Module):
        raise TypeError(f"trainer.{work} needs a module, got the class {module.__name__}, have you forgotten the ()?")
    if not isinstance(module, Module):
        hint = "; call module.compile() on the module itself instead" if hasattr(module, "_orig_mod") else ""
        raise TypeError(f"trainer.{work} needs a torchplug.Module, got {type(module).__name__}{hint}")
    if "_run" not in vars(module):
        raise TypeError(f"{type(module).__name__}.__init__ must call super().__init__() first")
    check_names(module)
    if work in ("fit", "tune") and not defines(module, "training_step"):
        raise TypeError(f"{type(module).__name__} has no training_step: define training_step(self, batch, batch_idx) and return the loss")
    if work in ("validate", "test") and not defines(module, STEP_OF[work]):
        raise TypeError(f"{type(module).__name__} has no {STEP_OF[work]}: define {STEP_OF[work]}(self, batch, batch_idx)")


def prepare(run: Run, hooks: Hooks, sources: Sources) -> None:
    """Sets up module, loaders and optimizers, in the order of the picture in `hookspecs.py`."""
    owners = [owner for owner in (run.datamodule, run.module) if owner is not None]
    if run.local_rank == 0:
        for owner in owners:
            _ask(owner, "prepare_data")
    if run.world_size > 1:
        hooks.barrier(run)  # what was downloaded is there for all
    hooks.setup(run, run.purpose)
    run.module.configure_model()
    run.module = hooks.setup_module(run, run.module)
    put_back = remembered()

    def load() -> None:
        put_back()
        _load(run, sources)
        if run.rank:
            spread(run.rank)

    run.reload = load
    load()


def _load(run: Run, sources: Sources) -> None:
    """Asks for loaders and optimizers."""
    run.loaders, run.limits = {}, {}
    for stage in STAGES[run.work]:
        _find_loaders(run, stage, sources)
    for stage, loaders in run.loaders.items():
        run.loaders[stage] = [run.hooks.prepare_loader(run, loader, stage, i) for i, loader in enumerate(loaders)]
    _overfit(run)
    _set_limits(run)
    if run.agreement is not None and "train" in run.loaders:
        run.agreement.lengths(run)
    if run.purpose == "fit":
        _set_optimizers(run)
    for stage, loaders in run.loaders.items():
        run.loaders[stage] = [exact(loader) for loader in loaders]
    if "train" in run.loaders:
        loader, others = run.loaders["train"][0], [each for stage, loaders in run.loaders.items() if stage != "train" for each in loaders]
        run.stream = Stream(loader, others, run.limits["train"][0])
        if run.work == "fit" and (inexact := explained(loader)):
            run.say_once(inexact, logging.INFO)


def _ask(owner: Any, method: str) -> Any:
    """``owner.method()``; an error in it says which method wanted what was missing."""
    try:
        return getattr(owner, method)()
    except Exception as error:
        add_note(error, f"while calling {type(owner).__name__}.{method}()")
        raise


# ---------------------------------------------------------------------- loaders


def _find_loaders(run: Run, stage: str, sources: Sources) -> None:
    """Puts the loaders of a stage into ``run.loaders``, or says clearly why there are none."""
    loaders = _loaders(run, stage, sources)
    method, step = LOADERS[stage], STEP_OF[stage]
    if run.work in ("fit", "tune") and stage == "validate":
        if run.options.limit_val_batches == 0:
            loaders = []
        elif loaders and not defines(run.module, step):
            run.say_once(f"there is a {method}, but {type(run.module).__name__} has no {step}: nothing is validated")
            loaders = []
        elif not loaders and defines(run.module, step):
            run.say_once(f"{type(run.module).__name__} has a {step}, but there is no {method}: nothing is validated")
    elif getattr(run.options, LIMIT_OF[stage]) == 0:
        raise ValueError(f"{LIMIT_OF[stage]}=0 leaves nothing for trainer.{run.work}")
    elif not loaders:
        raise TypeError(
            f"trainer.{run.work} needs data: give it a loader or a data module, or define {method} in {type(run.module).__name__}"
        )
    run.loaders[stage] = loaders


def _loaders(run: Run, stage: str, sources: Sources) -> list[Any]:
    given = sources.given.get(stage)
    if given is None:
        for owner in (run.datamodule, run.module):
            if owner is not None:
                given = _ask(owner, LOADERS[stage])
            if given is not None:
                break
    if given is None:
        return []
    if stage == "train":
        if isinstance(given, (list, tuple, dict)) and any(
            hasattr(part, "dataset") for part in (given.values() if isinstance(given, dict) else given)
        ):
            raise TypeError(
                "several training loaders are not combined for you: give one iterable of batches, for example a loader over a ConcatDataset"
            )
        loaders = [given]
    elif isinstance(given, dict):
        loaders = list(given.values())
    elif isinstance(given, (list, tuple)) and given and all(isinstance(part, (Tensor, tuple, dict)) for part in given):
        loaders = [given]  # batches, not loaders
    else:
        loaders = list(given) if isinstance(given, (list, tuple)) else [given]
    for loader in loaders:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(f"a loader must be an iterable of batches such as a DataLoader, got {type(loader).__name__} {loader!r}")
        if length(loader) == 0:
            raise ValueError(
                f"the {IN_WORDS[stage]} loader is empty; is its data set empty, or smaller than one batch with drop_last=True?"
            )
    return loaders


def _overfit(run: Run) -> None:
    """``overfit_batches``: the first batches, fetched once, are what is trained and validated on."""
    wanted = run.options.overfit_batches
    if not wanted or "train" not in run.loaders:
        return
    loader = run.loaders["train"][0]
    batches = list(islice(loader, limited("overfit_batches", length(loader), wanted)))
    run.loaders["train"] = [batches]
    if run.loaders.get("validate"):
        run.loaders["validate"] = [batches]


def _set_limits(run: Run) -> None:
    options = run.options
    for stage, loaders in run.loaders.items():
        name = LIMIT_OF[stage]
        run.limits[stage] = [limited(name, length(loader), getattr(options, name)) for loader in loaders]
        if run.agreement is not None:  # a rank without batches asks for one all the same, as the others do
            run.limits[stage] = [None if limit is None else max(limit, 1) for limit in run.limits[stage]]
    if "train" in run.loaders:
        run.num_batches = run.limits["train"][0] if length(run.loaders["train"][0]) is not None else None
    for stage, limits in run.limits.items():
        if getattr(options, LIMIT_OF[stage]) == 1.0 and isinstance(getattr(options, LIMIT_OF[stage]), float):
            run.limits[stage] = [None] * len(limits)  # a loader that gives more than its length says is not cut off
    if "validate" in run.limits and run.purpose == "fit":
        few = options.num_sanity_val_steps
        run.limits["sanity"] = [limit if few < 0 else few if limit is None else min(few, limit) for limit in run.limits["validate"]]


# ---------------------------------------------------------------------- optimizers


def _set_optimizers(run: Run) -> None:
    """Asks for optimizers and checks that they fit the way in which the module is optimized."""
    module, options = run.module, run.options
    name = type(module).__name__
    run.optimizers, run.schedulers = parse(module.configure_optimizers())
    for scheduler in run.schedulers:
        if not any(scheduler.optimizer is optimizer for optimizer in run.optimizers):
            raise ValueError(f"{name}.configure_optimizers returned a scheduler whose optimizer is not among the optimizers returned")
    run.optimizer_steps = [0] * len(run.optimizers)
    run.contributions = [0] * len(run.optimizers)
    run.closures = [needs_closure(optimizer) for optimizer in run.optimizers]
    run.manual_optimizers = [ManualOptimizer(run, i, partial(update, run, run.hooks, i)) for i in range(len(run.optimizers))]
    run.automatic = module.automatic_optimization
    if not run.automatic:
        if options.accumulate_grad_batches > 1:
            raise ValueError("accumulate_grad_batches is for automatic optimization; in manual optimization call step() every few batches")
        return
    run.turn = 0 if len(run.optimizers) == 1 else -1
    run.step_schedulers = [scheduler for scheduler in run.schedulers if scheduler.interval == "step"]
    run.epoch_schedulers = [scheduler for scheduler in run.schedulers if scheduler.interval == "epoch"]
    if not run.optimizers:
        raise ValueError(f"{name}.configure_optimizers returned no optimizer; return one, such as torch.optim.AdamW(self.parameters())")
    if any(run.closures) and options.accumulate_grad_batches > 1:
        raise ValueError("an optimizer that evaluates the loss itself (LBFGS) needs one batch at a time: accumulate_grad_batches must be 1")
    if len(run.optimizers) > 1 and "optimizer_idx" not in inspect.signature(module.training_step).parameters:
        raise ValueError(
            f"{name} has {len(run.optimizers)} optimizers: let training_step take optimizer_idx and return that optimizer's loss, "
            "or set self.automatic_optimization = False and step them yourself"
        )


# ---------------------------------------------------------------------- the run's directory


def make_directory(root: str | os.PathLike[str], name: str) -> Path:
    """A new folder ``root/name/version_N``; two processes that ask at once get two.

    Raises:
        OSError: it cannot be made; the message says to choose another ``root_dir``.
    """
    parent = Path(root) / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name[8:]) for p in parent.glob("version_*") if p.name[8:].isdigit()), default=-1)
        while True:
            folder = parent / f"version_{number}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise type(error)(
            error.errno, f"the run's directory cannot be made in {str(parent)!r} ({error.strerror}); choose another root_dir"
        ) from error


def is_datamodule(value: Any) -> bool:
    """Whether ``value`` stands for loaders as a whole."""
    return isinstance(value, DataModule)
