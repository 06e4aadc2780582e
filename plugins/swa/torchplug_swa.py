"""Averages the weights of the last part of training, and leaves the mean in the module (stochastic weight averaging)."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchplug import Run, hookimpl
from torchplug.trial import trial

__all__ = ["Swa"]

FRACTION = 0.75  # of the training, where the paper begins


# ---------------------------------------------------------------------- what torchplug-ema and torchplug-swa have in common


class _Averaging:
    """The hooks that keep an average, validate with it, and put it into the module when training is over.

    A subclass says in `_stepped` when something is averaged, and in `_rest` with which weight the module's values at the end of
    training still belong into the average.
    """

    averages_weights = True  # the module can hold one average, so that there is one such plugin in a run

    buffers: str
    validate: bool
    updates: int
    _average: Average | None = None
    _own: dict[str, Tensor]  # the module's own values while it holds the average after training, else nothing
    _seen = _last = 0  # the step that was looked at last, and that of the last update
    _loaded: dict[str, Any] | None = None  # the state to go on from, until the module is known
    _run: Run | None = None

    def _stepped(self, run: Run, step: int) -> None:
        raise NotImplementedError

    def _rest(self) -> float:
        raise NotImplementedError

    def _epoch_is_over(self, run: Run) -> None:
        """All steps of an epoch are done; comes before its validation, and once more at its end."""

    def _look(self, run: Run) -> None:
        """Whatever the last batch was, an optimizer step that was taken counts once: skipped ones do not."""
        if run.position.step != self._seen:
            self._seen = run.position.step
            self._stepped(run, self._seen)

    def _update(self, run: Run, weight: float) -> None:
        if self._average is None:
            self._average = Average.begin(run.module, with_buffers=self.buffers == "average")
        else:
            self._average.update(weight)
        self.updates += 1
        self._last = run.position.step

    # ------------------------------------------------------------------ hooks

    @hookimpl
    def setup(self, run: Run, stage: str) -> None:
        if stage == "fit":  # the instance may have been in a run before
            self.updates, self._average, self._own, self._seen, self._last = 0, None, {}, run.position.step, run.position.step
            self._loaded = self._run = None
            both = [name for name, plugin in run.plugins.items() if getattr(plugin, "averages_weights", False)]
            if len(both) > 1:
                raise ValueError(f"a module can hold one average of its weights, and {' and '.join(both)} would each leave one in it")

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        self._run = run
        if self._loaded is not None:
            self._adopt(run, self._loaded)
        if self._average is not None and self._own:  # of a training that had ended
            self._average.put_back(self._own)
            self._own = {}
        if self.buffers == "recompute" and _batch_norms(run.module):
            if not run.automatic:
                raise ValueError(
                    "buffers='recompute' calls training_step without taking steps, which is not possible in manual optimization: "
                    "write buffers='average' or 'keep'"
                )
            if isinstance(run.loaders["train"][0], Iterator):
                raise ValueError(
                    "buffers='recompute' needs a second pass over the training data, and an iterator gives them once: give a "
                    "DataLoader, or write buffers='average' or 'keep'"
                )

    @hookimpl
    def on_train_epoch_start(self, run: Run) -> None:
        if self._average is not None:
            self._average.check()

    @hookimpl
    def on_before_optimizer_step(self) -> None:
        if self._average is not None and self._average.left_out:
            self._average.join()

    @hookimpl
    def on_train_batch_end(self, run: Run) -> None:
        if run.position.step != self._seen:
            self._look(run)

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run, stage: str) -> Generator[None, Any, Any]:
        if run.work == "fit" and self.validate:
            self._look(run)
            if run.is_last_batch:
                self._epoch_is_over(run)
        if run.work != "fit" or not self.validate or self._average is None:
            return (yield)
        own = self._put_in(0.0)
        try:
            if self.buffers == "recompute":
                recompute(run)
            return (yield)
        finally:
            self._average.put_back(own)

    @hookimpl
    def on_train_epoch_end(self, run: Run) -> None:
        self._look(run)  # a window that the loader's end cut short is stepped after its last batch
        self._epoch_is_over(run)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        name = run.name_of(self)
        if self._average is None:
            run.say_once(f"plugin {name!r}: training ended before anything was averaged: the module keeps its own weights")
            return
        own = self._put_in(self._rest() if self._last != self._seen else 0.0)
        whole = False
        try:
            whole = self.buffers != "recompute" or recompute(run)
        finally:
            if not whole:  # an error, or a signal: the run that goes on does it again
                self._average.put_back(own)
        if whole:
            self._own = own
            number = self.updates + (self._last != self._seen)
            run.report[name] = f"the module holds the average of its weights at {number} step{'s' * (number != 1)}"

    def _put_in(self, rest: float) -> dict[str, Tensor]:
        """The averages take the place of the module's own values, which are returned."""
        assert self._average is not None
        self._average.check()
        statistics = _statistics(self._average.module) if self.buffers == "recompute" else {}
        return {**statistics, **self._average.put_in(rest)}

    @hookimpl
    def teardown(self) -> None:
        self._run = None

    @hookimpl(wrapper=True)
    def load_checkpoint(self, run: Run) -> Generator[None, Any, Any]:
        """A checkpoint from within training has the averages beside the weights: evaluation uses what validation used."""
        state = yield
        kept = (state.get("plugins") or {}).get(run.name_of(self))
        if run.work in ("validate", "test", "predict") and self.validate and kept and kept["weights"]:
            weights = kept["weights"]
            module = {name: weights[name].to(value.dtype) if name in weights else value for name, value in state["module"].items()}
            state = {**state, "module": module}
            run.say_once(f"plugin {run.name_of(self)!r}: {run.work} with the averaged weights of the checkpoint", logging.INFO)
        return state

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the averages under the module's names, and what it takes to go on.

        They are ``weights`` while the module has its own values. After the end, when they are in the module, those values are ``own``,
        and the averages, without what only the end brought into them, ``average``.
        """
        if self._loaded is not None:
            return self._loaded
        averages = {} if self._average is None else self._average.named()
        kept = {"weights": {}, "average": averages, "own": self._own} if self._own else {"weights": averages, "average": {}, "own": {}}
        return {"updates": self.updates, "seen": self._seen, "last": self._last, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, as soon as the module is known."""
        self._loaded = state
        if self._run is not None:
            self._adopt(self._run, state)

    def _adopt(self, run: Run, state: dict[str, Any]) -> None:
        self._loaded = None
        self.updates, self._seen, self._last = state["updates"], state["seen"], state["last"]
        averages = state["average"] or state["weights"]
        self._average = Average.of(run.module, averages) if averages else None
        self._own = {name: value.to(_tensor(run.module, name).device, copy=True) for name, value in state["own"].items()}


class Average:
    """The running average of a module's parameters and, if wanted, of its floating-point buffers.

    Values of less than 32 bits are averaged in float32: what one update changes is below their last bit. All others are averaged
    in their own type. Tied parameters are averaged once. Frozen parameters are left out until they are unfrozen: so far they were
    their own average.

    Args:
        module: whose values are averaged; they are read where they are, and never replaced by other tensors.
        weights: the averages under the module's names, each tensor once.

    Attributes:
        left_out: the parameters that are not averaged, by name.
    """

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        self.module, self.weights = module, weights
        self._group()

    @classmethod
    def begin(cls, module: nn.Module, with_buffers: bool) -> Average:
        """The first update: the average is what the module holds now."""
        values: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad and not is_lazy(p)}
        if with_buffers:
            values |= {name: buffer for name, buffer in module.named_buffers() if not is_lazy(buffer)}
        return cls(module, {name: _copied(value) for name, value in values.items() if _continuous(value)})

    @classmethod
    def of(cls, module: nn.Module, weights: dict[str, Tensor]) -> Average:
        """The average that `named` gave, perhaps on another device."""
        once = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name in weights]
        if not once:
            raise ValueError(f"the averaged weights are of another module than {type(module).__name__}: it has no {next(iter(weights))}")
        return cls(module, {name: weights[name].to(_tensor(module, name).device, copy=True) for name in once})

    def named(self) -> dict[str, Tensor]:
        """The averages under all names of the module; tied ones are the same tensor."""
        first = {id(value): self.weights.get(name) for name, value in self.module.named_parameters()}
        tied = {name: first[id(value)] for name, value in self.module.named_parameters(remove_duplicate=False)}
        return {**self.weights, **{name: value for name, value in tied.items() if value is not None}}

    def _group(self) -> None:
        """One list for each type and device, as multi-tensor operations need them."""
        parameters = dict(self.module.named_parameters())
        self.left_out = {name: p for name, p in parameters.items() if name not in self.weights}
        self._known = {id(p) for p in parameters.values()}
        fixed: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        places: dict[Any, tuple[list[Tensor], list[tuple[nn.Module, str]]]] = {}
        for name, average in self.weights.items():
            value = _tensor(self.module, name)
            kind = (value.dtype == average.dtype, value.dtype, value.device)
            if name in parameters:
                averages, values = fixed.setdefault(kind, ([], []))
                averages.append(average)
                values.append(value)
            else:  # a buffer may be another tensor each time
                averages, owners = places.setdefault(kind, ([], []))
                averages.append(average)
                owners.append(_place(self.module, name))
        self._parameters = [(kind[0], *lists) for kind, lists in fixed.items()]
        self._buffers = [(kind[0], *lists) for kind, lists in places.items()]

    def update(self, weight: float) -> None:
        """``average += weight * (value - average)`` in place, for all values at once."""
        with torch.no_grad():
            for same, averages, values in self._parameters:
                _move(averages, values, weight, same)
            for same, averages, owners in self._buffers:
                _move(averages, [getattr(owner, name) for owner, name in owners], weight, same)

    def join(self) -> None:
        """Parameters that were unfrozen are averaged too; this comes before they are changed."""
        fresh = {name: p for name, p in self.left_out.items() if p.requires_grad and not is_lazy(p)}
        if fresh:
            self.weights.update({name: _copied(p) for name, p in fresh.items()})
            self._group()

    def check(self) -> None:
        """Refuses parameters that came after averaging had begun.

        Raises:
            ValueError: there are some; they are named.
        """
        new = [name for name, p in self.module.named_parameters() if id(p) not in self._known]
        if new:
            raise ValueError(
                f"{type(self.module).__name__} has parameters that it did not have when averaging began, so they have no average: "
                f"{', '.join(new[:5])}; make them in __init__ or configure_model"
            )

    def put_in(self, rest: float) -> dict[str, Tensor]:
        """The averages take the place of the module's values, in the same tensors.

        Args:
            rest: with which weight the present values belong into what is put in; the averages stay as they are.

        Returns:
            Copies of the values that were there, for `put_back`.
        """
        own = {}
        with torch.no_grad():
            for name, average in self.weights.items():
                value = _tensor(self.module, name)
                own[name] = value.detach().clone()
                value.copy_(torch.lerp(average, value.to(average.dtype), rest) if rest else average)
        return own

    def put_back(self, own: dict[str, Tensor]) -> None:
        """Undoes `put_in`, bit for bit."""
        with torch.no_grad():
            for name, value in own.items():
                _tensor(self.module, name).copy_(value)


def _move(averages: list[Tensor], values: list[Tensor], weight: float, same: bool) -> None:
    if same:
        torch._foreach_lerp_(averages, values, weight)
    else:  # lerp takes one type
        torch._foreach_mul_(averages, 1 - weight)
        torch._foreach_add_(averages, values, alpha=weight)


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, attribute = name.rpartition(".")
    return module.get_submodule(owner), attribute


def _tensor(module: nn.Module, name: str) -> Tensor:
    value: Tensor = getattr(*_place(module, name))
    return value


def _continuous(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _copied(value: Tensor) -> Tensor:
    """A copy to average in."""
    low = value.is_floating_point() and torch.finfo(value.dtype).bits < 32
    return value.detach().to(torch.float32 if low else value.dtype, copy=True)


# ---------------------------------------------------------------------- statistics of BatchNorm


def _batch_norms(module: nn.Module) -> dict[str, Any]:
    """The layers with statistics that training changes, by name."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return {
        name: layer for name, layer in module.named_modules() if isinstance(layer, kinds) and layer.training and layer.track_running_stats
    }


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    layers = _batch_norms(module).items()
    return {f"{path}.{name}" if path else name: buffer.clone() for path, layer in layers for name, buffer in layer.named_buffers()}


def recompute(run: Run) -> bool:
    """Takes the statistics of BatchNorm layers anew, as `torch.optim.swa_utils.update_bn` does: their mean over one pass.

    The pass goes over the training data through ``training_step``, without gradients, and leaves no trace but the statistics.
    Layers in eval mode keep theirs.

    Returns:
        Whether the pass is complete; False if a signal came.
    """
    layers = list(_batch_norms(run.module).values())
    if not layers:
        return True
    with trial(run) as attempt, torch.no_grad():
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean of all batches
        for batch_idx, batch in enumerate(islice(attempt.loader, run.limits["train"][0])):
            if run.interrupted:
                break
            batch = run.hooks.move_batch(run, batch)
            run.metrics.size = 1  # what is logged is forgotten
            for optimizer_idx in range(len(run.optimizers)):
                run.hooks.train_step(run, batch, batch_idx, optimizer_idx)
        interrupted, statistics = run.interrupted, [buffer.clone() for layer in layers for buffer in layer.buffers()]
    if interrupted:  # a trial puts back what it was before
        run.interrupted, run.attention = interrupted, True
        return False
    for buffer, value in zip((buffer for layer in layers for buffer in layer.buffers()), statistics, strict=True):
        buffer.copy_(value)
    return True


# ---------------------------------------------------------------------- the plugin


@dataclass(kw_only=True, eq=False)
class Swa(_Averaging):
    """Stochastic weight averaging: the mean of the weights at the ends of the last epochs, learned at a constant rate.

    From ``start`` on weights are averaged, those at the start itself not; where training ends between two of them, the weights at
    its end are in the mean as well. When training is over, whatever ended it but an error or a signal, the module holds the mean;
    a run that goes on has its own weights again. A start that training does not reach averages nothing, and says so.

    Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (2018), arXiv:1803.05407.

    Args:
        start: Where averaging begins: an int is the index of an epoch, counted from 0, a float from 0 to 1 a part of max_epochs (in
            whole epochs) or of max_steps, whichever is reached first. None: 0.75, unless start_step is given.
        start_step: Begin after this many optimizer steps, in place of start.
        every_n_epochs: Average at the end of every n-th epoch from the start on. None: of every one, unless every_n_steps is given.
        every_n_steps: Average after every n-th optimizer step from the start on, in place of epochs.
        lr: Learning rate from the start on, or a list of them, one for each parameter group. Schedulers do not step any more. None
            leaves rates and schedulers alone, for a cyclic schedule of your own.
        anneal_epochs: Over how many epochs the rates go from where they are at the start to lr; 0 is at once.
        anneal: How they go there: 'cos' along half a cosine, 'linear' in equal steps.
        buffers: What becomes of buffers: 'recompute' takes statistics of BatchNorm anew in a pass over the training data when training
            is over (and before each validation if validate says so), as in the paper, 'average' averages those that are
            floating-point numbers, 'keep' leaves them as training has them.
        validate: Validate with the mean while training, and use it where validate, test or predict load a checkpoint of this run.

    Attributes:
        updates: How many weights are in the mean.
    """

    start: int | float | None = None
    start_step: int | None = None
    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    lr: float | list[float] | None = None
    anneal_epochs: int = 10
    anneal: Literal["cos", "linear"] = "cos"
    buffers: Literal["average", "recompute", "keep"] = "recompute"
    validate: bool = False

    updates: int = field(init=False, default=0)
    _own: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    _begun: tuple[int, int] | None = field(init=False, repr=False, default=None)  # the first epoch and the step before it
    _rates: list[list[float]] = field(init=False, repr=False, default_factory=list)  # at the start, of each optimizer's groups

    def __post_init__(self) -> None:
        for one, other in (("start", "start_step"), ("every_n_epochs", "every_n_steps")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} say the same in two ways: give one of them")
        if isinstance(self.start, bool) or not isinstance(self.start, (int, float, type(None))):
            raise TypeError(f"start must be the index of an epoch (an int) or a part of the training (a float), got {self.start!r}")
        if isinstance(self.start, float) and not 0 <= self.start <= 1:
            raise ValueError(f"start as a part of the training must be from 0 to 1, got {self.start!r}; an epoch is written as an int")
        _check_count("start", self.start if isinstance(self.start, int) else None, 0, "the index of an epoch")
        _check_count("start_step", self.start_step, 0, "a number of optimizer steps")
        _check_count("every_n_epochs", self.every_n_epochs, 1, "a number of epochs")
        _check_count("every_n_steps", self.every_n_steps, 1, "a number of optimizer steps")
        rates = self.lr if isinstance(self.lr, (list, tuple)) else [] if self.lr is None else [self.lr]
        if (self.lr is not None and not rates) or not all(_is_rate(rate) for rate in rates):
            raise ValueError(f"lr must be a number above 0, a list of them, or None, got {self.lr!r}")
        if type(self.anneal_epochs) is not int or self.anneal_epochs < 0:
            raise ValueError(f"anneal_epochs must be a number of epochs, at least 0, got {self.anneal_epochs!r}")
        if self.anneal not in ("cos", "linear"):
            raise ValueError(f"anneal must be 'cos' or 'linear', got {self.anneal!r}")
        if self.buffers not in ("average", "recompute", "keep"):
            raise ValueError(f"buffers must be 'average', 'recompute' or 'keep', got {self.buffers!r}")
        if not isinstance(self.validate, bool):
            raise TypeError(f"validate must be True or False, got {self.validate!r}")

    # ------------------------------------------------------------------ when

    @hookimpl
    def setup(self, run: Run, stage: str) -> None:
        super().setup(run, stage)
        if stage != "fit":
            return
        self._begun, self._rates = None, []
        options = run.options
        if self.start_step is None and not isinstance(self.start, int) and options.max_epochs is None and options.max_steps is None:
            raise ValueError("start is a part of the training, whose length max_time does not tell: give start as an epoch, or start_step")

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        super().on_fit_start(run)
        if self.lr is not None and run.schedulers and not run.automatic:
            raise ValueError("lr replaces the schedulers, and in manual optimization the module steps them itself: leave lr out")
        self._lrs(run)

    @hookimpl
    def on_train_epoch_start(self, run: Run) -> None:
        super().on_train_epoch_start(run)
        self._begin(run)
        if self._begun is not None:
            self._set_rates(run)

    def _stepped(self, run: Run, step: int) -> None:
        if self._begun is None:
            self._begin(run)
        elif self.every_n_steps is not None and (step - self._begun[1]) % self.every_n_steps == 0:
            self._update(run, self._rest())

    def _epoch_is_over(self, run: Run) -> None:
        if self._begun is None or self.every_n_steps is not None:
            return
        epoch, step = self._begun
        if (run.position.epoch - epoch + 1) % (self.every_n_epochs or 1) == 0 and self._seen > max(step, self._last):
            self._update(run, self._rest())

    def _rest(self) -> float:
        return 1 / (self.updates + 1)

    def _begin(self, run: Run) -> None:
        """Averaging begins if the start is reached: at the beginning of an epoch, or between two steps of one."""
        if self._begun is not None:
            return
        position, options = run.position, run.options
        start = FRACTION if self.start is None else self.start
        if self.start_step is not None:
            reached = position.step >= self.start_step
        elif isinstance(start, int):
            reached = position.epoch >= start
        else:
            parts = ((position.epoch, options.max_epochs), (position.step, options.max_steps))
            reached = any(limit is not None and done >= math.floor(start * limit + 1e-9) for done, limit in parts)  # 0.29 * 100 is below 29
        if reached:
            over = run.is_last_batch and position.batch > 0  # what is averaged first is the end of the next epoch
            self._begun = position.epoch + over, position.step
            if self.lr is not None:
                self._rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in run.optimizers]
                if not self.anneal_epochs:
                    self._set_rates(run)

    # ------------------------------------------------------------------ learning rates

    def _set_rates(self, run: Run) -> None:
        """The rates of the present epoch."""
        if self.lr is None or self._begun is None:
            return
        part = min(1.0, max(0, run.position.epoch - self._begun[0]) / self.anneal_epochs) if self.anneal_epochs else 1.0
        part = (1 - math.cos(math.pi * part)) / 2 if self.anneal == "cos" else part
        for optimizer, before, after in zip(run.optimizers, self._rates, self._lrs(run), strict=True):
            before += [float(group["lr"]) for group in optimizer.param_groups[len(before) :]]  # groups that were added since
            for group, here, there in zip(optimizer.param_groups, before, after, strict=True):
                rate = there * part + here * (1 - part)
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def _lrs(self, run: Run) -> list[list[float]]:
        """The rate of each parameter group of each optimizer after annealing."""
        sizes = [len(optimizer.param_groups) for optimizer in run.optimizers]
        if not isinstance(self.lr, (list, tuple)):
            return [[self.lr or 0.0] * size for size in sizes]
        if len(self.lr) != sum(sizes):
            raise ValueError(f"lr names {len(self.lr)} rates, and there are {sum(sizes)} parameter groups")
        rates = iter(self.lr)
        return [list(islice(rates, size)) for size in sizes]

    @hookimpl
    def scheduler_step(self) -> bool | None:
        return False if self._begun is not None and self.lr is not None else None

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the mean as ``weights``, under the module's names, and what it takes to go on."""
        if self._loaded is not None:
            return self._loaded
        return {**super().state_dict(), "begun": self._begun, "rates": [list(rates) for rates in self._rates]}

    def _adopt(self, run: Run, state: dict[str, Any]) -> None:
        super()._adopt(run, state)
        self._begun, self._rates = state["begun"], [list(rates) for rates in state["rates"]]


def _check_count(name: str, value: int | None, least: int, what: str) -> None:
    if value is not None and (type(value) is not int or value < least):
        raise ValueError(f"{name} must be {what}, at least {least}, got {value!r}")


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
