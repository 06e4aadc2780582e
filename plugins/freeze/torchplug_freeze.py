"""Fine-tuning: freezes parts of a module and unfreezes them by epoch, with learning rates of their own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from torchplug import Run, hookimpl
from torchplug.optimizers import GROUP_RATES, SCHEDULER_RATES, inner_schedulers

__all__ = ["Freeze"]

SCHEDULER_LISTS = (*SCHEDULER_RATES, "lr_lambdas", "min_lrs", "base_momentums", "max_momentums")  # with one entry for each group


class _Stage(NamedTuple):
    """What is unfrozen at an epoch, and its learning rate."""

    epoch: int
    pattern: str
    lr: float | None


@dataclass(kw_only=True, eq=False)
class Freeze:
    """Parts of the module are not trained, for the whole run or until an epoch.

    A pattern is the dotted name of a submodule or parameter, with the wildcards ``*`` (any text, dots too), ``?`` and ``[...]``; it
    takes everything below what it names. Frozen parameters get no gradients, and batch normalization in frozen parts keeps its
    statistics and uses them; other layers, such as dropout, go on as in training.

    What is to be unfrozen leaves the groups of its optimizer when the run starts and forms new groups at their end, with all
    options of the group that it comes from but the learning rate. Optimizers pass over parameters without gradients, so
    nothing happens to them before their epoch. Schedulers treat a new group as if it had been there from the beginning:
    its rate is what it would be with the given rate in `configure_optimizers`, also at the epoch at which it is unfrozen.

    `configure_optimizers` gives all parameters, also those that are frozen at first. What has requires_grad=False before the run is
    never unfrozen. After the run parameters and layers are as trainable as they were before. A run that goes on from a
    checkpoint must have the same options.

    Args:
        frozen: What is frozen when training starts: patterns.
        unfreeze: What is trained from the beginning of an epoch on: {epoch: {pattern: learning rate}}, epochs counted from 0. A
            rate of None is that of the group it comes from; {epoch: [patterns]} is the same for all. What two patterns take
            belongs to the first, by epoch and in the order written.
    """

    frozen: list[str] | tuple[str, ...]
    unfreeze: dict[int, Any] = field(default_factory=dict)

    _stages: list[_Stage] = field(init=False, default_factory=list, repr=False)
    _parameters: list[tuple[nn.Parameter, int | None, bool]] = field(init=False, default_factory=list, repr=False)  # see `_find`
    _layers: list[tuple[nn.Module, int | None]] = field(init=False, default_factory=list, repr=False)  # those with statistics
    _quiet: list[nn.Module] = field(init=False, default_factory=list, repr=False)  # layers that were put into eval mode

    before = ("batch_size_finder", "*")  # what is trained is settled first
    in_trials = True

    def __post_init__(self) -> None:
        if not isinstance(self.frozen, (list, tuple)) or not self.frozen or not all(isinstance(p, str) and p for p in self.frozen):
            raise TypeError(f"frozen must be a list of names or patterns, such as ['backbone'], got {self.frozen!r}")
        if not isinstance(self.unfreeze, dict):
            raise TypeError(f"unfreeze must be a dict {{epoch: {{pattern: learning rate}}}}, got {self.unfreeze!r}")
        self.unfreeze = {  # a file of JSON has texts for keys
            int(epoch) if isinstance(epoch, str) and epoch.isdecimal() else epoch: parts for epoch, parts in self.unfreeze.items()
        }
        for epoch in self.unfreeze:
            if type(epoch) is not int or epoch < 0:
                raise ValueError(f"unfreeze: an epoch must be a whole number, at least 0, got {epoch!r}")
        for epoch, parts in sorted(self.unfreeze.items()):
            if not isinstance(parts, (Mapping, list, tuple)) or not parts:
                raise TypeError(f"unfreeze: epoch {epoch} must have {{pattern: learning rate}} or [patterns], got {parts!r}")
            for pattern, lr in parts.items() if isinstance(parts, Mapping) else [(each, None) for each in parts]:
                if not isinstance(pattern, str) or not pattern:
                    raise TypeError(f"unfreeze: epoch {epoch} has {pattern!r} in place of a name or pattern")
                if lr is not None and (isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 <= lr < float("inf")):
                    raise ValueError(f"unfreeze: the learning rate of {pattern!r} must be a number, at least 0, or None, got {lr!r}")
                self._stages.append(_Stage(epoch, pattern, lr))

    # ------------------------------------------------------------------ hooks

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        if run.purpose != "fit":
            return
        self._find(run.module)
        self._apply(run.position.epoch)
        stage_of = {id(p): number for p, number, _ in self._parameters if number is not None}
        make_anew = run.reload

        def reload() -> None:
            """Optimizers that somebody has made anew, as a batch size finder does, have the groups too."""
            make_anew()
            _regroup(run, self._stages, stage_of)

        run.reload = reload
        _regroup(run, self._stages, stage_of)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self._apply(run.position.epoch)

    @hookimpl
    def on_train_epoch_start(self, run: Run) -> None:
        self._apply(run.position.epoch)

    @hookimpl
    def teardown(self) -> None:
        for parameter, _, was_trained in self._parameters:
            parameter.requires_grad_(was_trained)
        for layer in self._quiet:
            layer.train()
        self._parameters, self._layers, self._quiet = [], [], []

    def state_dict(self) -> dict[str, Any]:
        """The options, for the run that goes on."""
        return {"frozen": list(self.frozen), "unfreeze": [list(stage) for stage in self._stages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compares the options.

        Raises:
            ValueError: they are different.
        """
        own = self.state_dict()
        if other := [name for name in own if state[name] != own[name]]:
            raise ValueError(
                f"the checkpoint was written with {', '.join(f'{name}={state[name]}' for name in other)}, now it is "
                f"{', '.join(str(own[name]) for name in other)}; set it back, or leave the plugin's state out with resume"
            )

    # ------------------------------------------------------------------ what is frozen, and until when

    def _find(self, module: nn.Module) -> None:
        """Looks for the frozen parameters and layers: each with the number of the stage that unfreezes it, None for never, and
        parameters with whether they were trained before."""
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)  # of a shared parameter each name counts
        layers = {name: layer for name, layer in module.named_modules() if getattr(layer, "running_mean", None) is not None}
        there = {name: None for name, _ in (*module.named_modules(), *module.named_parameters(remove_duplicate=False)) if name}
        for pattern in self.frozen:
            if not any(_takes(pattern, name) for name in there):
                near = difflib.get_close_matches(pattern, there, n=1)
                raise ValueError(f"frozen: {pattern!r} is nothing in the module{f', did you mean {near[0]!r}?' if near else ''}")
        self._parameters, self._layers, self._quiet = [], [], []
        for parameter in module.parameters():
            own = names[id(parameter)]
            if self._is_frozen(own):
                trained = parameter.requires_grad  # somebody else's decision, if not: such as a fixed embedding
                self._parameters.append((parameter, self._stage_of(own) if trained else None, trained))
        for name, layer in layers.items():
            if self._is_frozen([name]):
                self._layers.append((layer, self._stage_of([name])))
        used = {number for _, number, _ in self._parameters}
        for number, stage in enumerate(self._stages):
            if number not in used:
                raise ValueError(
                    f"unfreeze: {stage.pattern!r} of epoch {stage.epoch} is no parameter that is frozen until then (frozen: "
                    f"{self.frozen}); what has requires_grad=False before the run stays so"
                )

    def _is_frozen(self, names: Iterable[str]) -> bool:
        return any(_takes(pattern, name) for pattern in self.frozen for name in names)

    def _stage_of(self, names: list[str]) -> int | None:
        return next((number for number, stage in enumerate(self._stages) if any(_takes(stage.pattern, name) for name in names)), None)

    def _apply(self, epoch: int) -> None:
        """Makes everything as trainable as it is in an epoch."""
        for parameter, number, _ in self._parameters:
            trained = number is not None and self._stages[number].epoch <= epoch
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None
        for layer, number in self._layers:
            trained = number is not None and self._stages[number].epoch <= epoch
            if not trained and layer.training:
                layer.eval()
                self._quiet.append(layer)
            elif trained and any(layer is other for other in self._quiet):
                layer.train()
                self._quiet = [other for other in self._quiet if other is not layer]


def _takes(pattern: str, name: str) -> bool:
    """Whether a pattern names ``name`` or something that it is part of."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


# ---------------------------------------------------------------------- optimizers and their schedulers


def _regroup(run: Run, stages: list[_Stage], stage_of: Mapping[int, int]) -> None:
    """Moves the parameters that ``stage_of`` has, by id, into groups of their own: one for each stage and group they come from."""
    if any(run.closures) and stage_of:
        raise ValueError("an optimizer that evaluates the loss itself (LBFGS) has one group alone: unfreeze cannot be used with it")
    held = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in run.module.named_parameters():
        if id(parameter) in stage_of and id(parameter) not in held:
            raise ValueError(
                f"unfreeze: no optimizer has {name!r}; let configure_optimizers give all parameters, also those that are frozen at first"
            )
    for optimizer in run.optimizers:
        groups = list(optimizer.param_groups)
        for number, stage in enumerate(stages):
            for index, group in enumerate(groups):
                if moved := _taken_out(group, {place for place, p in enumerate(group["params"]) if stage_of.get(id(p)) == number}):
                    _add_group(run, optimizer, index, moved, stage)


def _taken_out(group: dict[str, Any], places: set[int]) -> list[Any]:
    """Takes the parameters in ``places`` out of a group; with their names where the group has names."""
    entries = list(zip(group["param_names"], group["params"], strict=True)) if "param_names" in group else group["params"]
    moved = [entry for place, entry in enumerate(entries) if place in places]
    for key in ("params", "param_names"):
        if key in group and places:
            group[key] = [entry for place, entry in enumerate(group[key]) if place not in places]
    return moved


def _add_group(run: Run, optimizer: Optimizer, index: int, parameters: list[Any], stage: _Stage) -> None:
    """A new group with the options of group ``index`` and the rate of the stage, for the optimizer and its schedulers."""
    source, count = optimizer.param_groups[index], len(optimizer.param_groups)
    reference = source.get("max_lr", source.get("initial_lr", source["lr"]))
    if stage.lr is not None and not reference:
        raise ValueError(
            f"unfreeze: the group that {stage.pattern!r} comes from has the learning rate 0, so that none follows from {stage.lr}"
        )

    def scaled(rate: Any) -> Any:
        if isinstance(rate, Tensor):  # schedulers write into it, so each group has its own
            return rate.clone() if stage.lr is None else rate * (stage.lr / reference)
        if stage.lr is None:
            return rate
        return float(stage.lr) if rate == reference else rate * (stage.lr / reference)

    options = {key: scaled(value) if key in GROUP_RATES else value for key, value in source.items() if key not in ("params", "param_names")}
    if "name" in options:
        options["name"] = f"{options['name']}/{stage.pattern}"
    optimizer.add_param_group({"params": parameters, **options})
    own = [each.scheduler for each in run.schedulers if each.optimizer is optimizer]
    for scheduler in [inner for each in own for inner in inner_schedulers(each)]:
        for name in SCHEDULER_LISTS:
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == count:
                setattr(scheduler, name, [*values, scaled(values[index]) if name in SCHEDULER_RATES else values[index]])
