"""Every form that ``configure_optimizers`` may return, brought into one: optimizers, and schedulers with their turns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from torchplug.options import closest

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["ManualOptimizer", "Scheduler", "change_rates", "inner_schedulers", "needs_closure", "only", "outside_of_autocast", "parse"]
__all__ += ["set_rate"]

# torch has no public way to change the rates that a schedule starts from, to add a group to it, or to ask what it is made of
GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a parameter group; OneCycleLR and others write there too
SCHEDULER_RATES = ("base_lrs", "max_lrs", "_last_lr")  # of a scheduler, one for each group

FORMS = (
    "one optimizer, a list of them, a tuple (optimizers, schedulers), or dicts with 'optimizer' and, if wanted, "
    "'lr_scheduler' (a scheduler, or a dict with 'scheduler', 'interval', 'frequency', 'monitor')"
)


@dataclass(eq=False)
class Scheduler:
    """A learning-rate scheduler and when it is its turn.

    Args:
        scheduler: the scheduler itself.
        interval: "epoch" or "step" (an optimizer step).
        frequency: every how many of them.
        monitor: the metric that a ``ReduceLROnPlateau`` follows.
        strict: whether a missing metric is an error (True) or means to wait.
        name: what learning-rate monitors call it.
    """

    scheduler: LRScheduler | ReduceLROnPlateau
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    seen: int = -1  # the serial of the last monitored value that it was given

    def __post_init__(self) -> None:
        if not all(hasattr(self.scheduler, name) for name in ("step", "state_dict", "optimizer")):
            raise TypeError(f"configure_optimizers: {self.scheduler!r} is not a learning-rate scheduler")
        if self.interval not in ("epoch", "step"):
            raise ValueError(f"configure_optimizers: interval must be 'epoch' or 'step', got {self.interval!r}")
        if not isinstance(self.frequency, int) or self.frequency < 1:
            raise ValueError(f"configure_optimizers: frequency must be at least 1, got {self.frequency!r}")
        if self.follows_metric and not self.monitor:
            raise ValueError("configure_optimizers: ReduceLROnPlateau needs 'monitor', the name of a logged metric, in its dict")

    @property
    def follows_metric(self) -> bool:
        """Whether stepping it takes the value of a metric."""
        return isinstance(self.scheduler, ReduceLROnPlateau)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose rates it sets."""
        return self.scheduler.optimizer


def parse(answer: Any) -> tuple[list[Optimizer], list[Scheduler]]:
    """Optimizers and schedulers out of what ``configure_optimizers`` returned; None is a run without an optimizer.

    Raises:
        TypeError: it is none of the known forms; they are listed.
        ValueError: a key, interval or frequency that is not possible.
    """
    if answer is None:
        return [], []
    if isinstance(answer, Optimizer):
        return [answer], []
    if isinstance(answer, Mapping):
        return _from_dict(answer)
    if isinstance(answer, (list, tuple)):
        if len(answer) == 2 and isinstance(answer[0], (list, tuple)):
            optimizers = list(answer[0])
            schedulers = answer[1] if isinstance(answer[1], (list, tuple)) else [answer[1]]
            _require(optimizers)
            return optimizers, [_scheduler(each) for each in schedulers]
        if answer and all(isinstance(each, Mapping) for each in answer):
            parts = [_from_dict(each) for each in answer]
            return [o for part in parts for o in part[0]], [s for part in parts for s in part[1]]
        _require(answer)
        return list(answer), []
    raise TypeError(f"configure_optimizers must return {FORMS}, got {type(answer).__name__}")


def _require(optimizers: Sequence[Any]) -> None:
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(f"configure_optimizers must return {FORMS}, got {type(each).__name__} in place of an optimizer")


def _from_dict(answer: Mapping[str, Any]) -> tuple[list[Optimizer], list[Scheduler]]:
    keys = ("optimizer", "lr_scheduler", "monitor")
    for key in answer:
        if key not in keys:
            raise ValueError(f"configure_optimizers: unknown key {key!r}{closest(key, keys)} (there are: {', '.join(keys)})")
    _require([answer.get("optimizer")])
    schedulers = answer.get("lr_scheduler", [])
    schedulers = schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]
    return [answer["optimizer"]], [_scheduler(each, answer.get("monitor")) for each in schedulers]


def _scheduler(answer: Any, monitor: str | None = None) -> Scheduler:
    if isinstance(answer, Mapping):
        keys = ("scheduler", "interval", "frequency", "monitor", "strict", "name")
        for key in answer:
            if key not in (*keys, "reduce_on_plateau"):
                raise ValueError(f"configure_optimizers: unknown scheduler key {key!r}{closest(key, keys)} (there are: {', '.join(keys)})")
        known = {"monitor": monitor, **{key: value for key, value in answer.items() if key in keys}}
        if "scheduler" not in known:
            raise ValueError("configure_optimizers: the dict of a scheduler needs the key 'scheduler'")
        return Scheduler(**known)
    return Scheduler(answer, monitor=monitor)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step`` cannot do without a closure (LBFGS)."""
    parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    return parameter is not None and parameter.default is parameter.empty


def inner_schedulers(scheduler: Any) -> Iterator[Any]:
    """A scheduler, and those that it is made of (SequentialLR, ChainedScheduler)."""
    yield scheduler
    for each in getattr(scheduler, "_schedulers", ()):
        yield from inner_schedulers(each)


def set_rate(group: dict[str, Any], name: str, rate: float) -> None:
    """Sets a rate of a parameter group; one that is a tensor stays the same tensor, as others look at it."""
    if isinstance(group[name], torch.Tensor):
        group[name].fill_(rate)
    else:
        group[name] = rate


def change_rates(optimizers: Iterable[Optimizer], schedulers: Iterable[Scheduler], change: Callable[[float], float]) -> None:
    """Puts ``change(rate)`` in the place of every learning rate: those of the groups, and those that schedulers go by."""
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        for name in GROUP_RATES:
            if isinstance(group.get(name), (int, float, torch.Tensor)):
                set_rate(group, name, change(float(group[name])))
    for scheduler in [inner for each in schedulers for inner in inner_schedulers(each.scheduler)]:
        for name in SCHEDULER_RATES:
            if isinstance(getattr(scheduler, name, None), list):
                setattr(scheduler, name, [change(float(rate)) for rate in getattr(scheduler, name)])


@contextmanager
def only(optimizer: Optimizer, others: Sequence[Optimizer]) -> Iterator[None]:
    """Inside, parameters that belong to the other optimizers alone take no gradient: with several losses, each
    optimizer's gradients come from its own."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    frozen = [p for other in others for group in other.param_groups for p in group["params"] if id(p) not in own and p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def outside_of_autocast(run: Run) -> AbstractContextManager[Any]:
    """For what a ``training_step`` in manual optimization does besides the forward pass."""
    mixed = str(run.options.precision).endswith("-mixed")
    return torch.autocast(run.device.type, enabled=False) if mixed else nullcontext()


class ManualOptimizer:
    """An optimizer for manual optimization: ``step`` goes through the hooks, precision and counters of the run."""

    def __init__(self, run: Run, index: int, update: Callable[[Any], None]) -> None:
        self._run, self._update = run, update
        self.optimizer = run.optimizers[index]

    def step(self, closure: Any = None) -> None:
        """Updates the parameters: the hooks around an optimizer step fire, and the step is counted.

        The position counts one step for a batch in which at least one optimizer stepped.
        """
        with outside_of_autocast(self._run):
            self._update(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)
