"""Keeps an exponential moving average of a module's weights, validates with it, and leaves it in the module after training."""

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

__all__ = ["Ema"]


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
class Ema(_Averaging):
    """Exponential moving average of the weights, ``average = decay * average + (1 - decay) * weights`` after optimizer steps.

    The average begins with the weights after the first step that counts. Where training ends between two updates, the weights at
    its end are in it as well. When training is over, whatever ended it but an error or a signal, the module holds the average; a
    run that goes on has its own weights again. A step that the loss scaler skipped is no step. With several optimizers the average
    is updated once for a batch in which any of them stepped.

    Averaging over the steps of stochastic approximation: Polyak and Juditsky, "Acceleration of Stochastic Approximation by
    Averaging" (1992).

    Args:
        decay: Weight of the average in an update, from 0 to below 1; the present weights get the rest.
        warmup: In update number n, counted from 0, the decay is at most (1 + n) / (10 + n), so that the first weights, which
            are far from the last ones, are forgotten soon.
        every_n_steps: Update after every this many optimizer steps.
        buffers: What becomes of buffers such as the statistics of BatchNorm: 'average' averages those that are floating-point
            numbers, 'recompute' takes statistics of BatchNorm anew in a pass over the training data (at the end, and before each
            validation if validate says so), 'keep' leaves them as training has them.
        validate: Validate with the average while training, and use it where validate, test or predict load a checkpoint of this run.

    Attributes:
        updates: How often the average was updated.
    """

    decay: float = 0.999
    warmup: bool = False
    every_n_steps: int = 1
    buffers: Literal["average", "recompute", "keep"] = "average"
    validate: bool = True

    updates: int = field(init=False, default=0)
    _own: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        number = isinstance(self.decay, (int, float)) and not isinstance(self.decay, bool) and math.isfinite(self.decay)
        if not number or not 0 <= self.decay < 1:
            raise ValueError(f"decay must be a number from 0 to below 1, got {self.decay!r}")
        if type(self.every_n_steps) is not int or self.every_n_steps < 1:
            raise ValueError(f"every_n_steps must be a whole number of steps, at least 1, got {self.every_n_steps!r}")
        if self.buffers not in ("average", "recompute", "keep"):
            raise ValueError(f"buffers must be 'average', 'recompute' or 'keep', got {self.buffers!r}")
        for name in ("warmup", "validate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _stepped(self, run: Run, step: int) -> None:
        if step % self.every_n_steps == 0:
            self._update(run, self._rest())

    def _rest(self) -> float:
        """The weight of the module's values in the next update."""
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        return 1 - decay
