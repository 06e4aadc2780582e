"""Averages of a module's weights: how they are kept, when the module holds them, and the statistics of BatchNorm that belong to them.

A plugin that averages is an `Averaging` that says which weights are averaged, and how much the newest ones weigh::

    @dataclass(kw_only=True, eq=False)
    class Mean(Averaging):
        def stepped(self, run):
            if run.position.epoch >= 5:
                self.update(run)

        def weight(self):
            return 1 / (self.updates + 1)

`Average` (the values) and `recompute` (the statistics) can be used without it.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchplug.hookspecs import hookimpl
from torchplug.options import check_fields
from torchplug.run import Run
from torchplug.sharded import is_spread, like, local
from torchplug.trials import trial

__all__ = ["Average", "Averaging", "recompute"]

# ---------------------------------------------------------------------- the values


class Average:
    """The running average of a module's parameters and, if wanted, of its floating-point buffers.

    Values of less than 32 bits are averaged in float32, because what one update changes is below their last bit; all others in
    their own type. Tied parameters are averaged once. Frozen ones are left out until `join`: so far they are their own average.

    Args:
        module: whose values are averaged; they are read where they are, and never replaced by other tensors.
        weights: the averages under the module's names, each tensor once; `begin` and `restored` make them.

    Attributes:
        left_out: the parameters that are not averaged, by name.
    """

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        self.module, self.weights = module, weights
        self._group()

    @classmethod
    def begin(cls, module: nn.Module, buffers: bool = False) -> Average:
        """The first update: the average is what the module holds now."""
        values: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if _is_trained(p)}
        if buffers:
            values |= {name: buffer for name, buffer in module.named_buffers() if not is_lazy(buffer)}
        kept = {name: value for name, value in values.items() if value.is_floating_point() or value.is_complex()}
        return cls(module, {name: _copied(value) for name, value in kept.items()})

    @classmethod
    def restored(cls, module: nn.Module, weights: dict[str, Tensor]) -> Average:
        """The average that `named` gave, perhaps on another device.

        Raises:
            ValueError: it is of another module.
        """
        once = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name in weights]
        if not once:
            raise ValueError(f"the averaged weights are of another module than {type(module).__name__}: it has no {next(iter(weights))}")
        return cls(module, {name: _beside(_tensor(module, name), weights[name]) for name in once})

    def named(self) -> dict[str, Tensor]:
        """The averages under all names of the module; tied ones are the same tensor."""
        first = {id(value): self.weights[name] for name, value in self.module.named_parameters() if name in self.weights}
        every = self.module.named_parameters(remove_duplicate=False)
        return {**self.weights, **{name: first[id(value)] for name, value in every if id(value) in first}}

    def _group(self) -> None:
        """Sorts everything by type and device, as multi-tensor operations need it."""
        parameters = dict(self.module.named_parameters())
        self.left_out = {name: p for name, p in parameters.items() if name not in self.weights}
        self._known = {id(p) for p in parameters.values()}
        groups: dict[Any, _Group] = {}
        for name in sorted(self.weights, key=lambda name: name not in parameters):  # parameters first
            average, value = self.weights[name], _tensor(self.module, name)
            group = groups.setdefault((value.dtype, average.dtype, value.device), _Group([], [], []))
            group.averages.append(local(average))
            if name in parameters:
                group.parameters.append(value)
            else:
                group.buffers.append(_place(self.module, name))
        self._groups = list(groups.items())
        self._spread = any(map(is_spread, parameters.values()))

    def update(self, weight: float) -> None:
        """``average += weight * (value - average)`` for all values."""
        with torch.no_grad():
            for (own, averaged, _), (averages, parameters, buffers) in self._groups:
                values = [*parameters, *(getattr(owner, name) for owner, name in buffers)] if buffers else parameters
                if self._spread:  # each rank averages its part
                    values = [local(value) for value in values]
                if own == averaged:
                    torch._foreach_lerp_(averages, values, weight)
                else:  # lerp takes one type
                    torch._foreach_mul_(averages, 1 - weight)
                    torch._foreach_add_(averages, values, alpha=weight)

    def join(self) -> None:
        """Parameters that were unfrozen are averaged from now on. It comes before the step that changes them for the first time."""
        fresh = {name: _copied(p) for name, p in self.left_out.items() if _is_trained(p)}
        if fresh:
            self.weights.update(fresh)
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

    def put_in(self, rest: float = 0.0) -> dict[str, Tensor]:
        """The averages take the place of the module's values, in the same tensors.

        Args:
            rest: with which weight the present values belong into what is put in; the averages stay as they are.

        Returns:
            Copies of the values that were there, for `put_back`.
        """
        own = {name: _tensor(self.module, name).detach().clone() for name in self.weights}
        try:
            with torch.no_grad():
                for name, average in self.weights.items():
                    whole = torch.lerp(average, own[name].to(average.dtype), rest) if rest else average
                    _tensor(self.module, name).copy_(whole)
        except BaseException:  # no memory, or Ctrl-C
            self.put_back(own)
            raise
        return own

    def put_back(self, own: dict[str, Tensor]) -> None:
        """Undoes `put_in`, bit for bit."""
        with torch.no_grad():
            for name, value in own.items():
                _tensor(self.module, name).copy_(value)


class _Group(NamedTuple):
    """Values of one type on one device: parameters, which stay the same tensors, then buffers, which may be others each time."""

    averages: list[Tensor]
    parameters: list[Tensor]
    buffers: list[tuple[nn.Module, str]]


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, attribute = name.rpartition(".")
    return module.get_submodule(owner), attribute


def _tensor(module: nn.Module, name: str) -> Tensor:
    value: Tensor = getattr(*_place(module, name))
    return value


def _is_trained(parameter: Tensor) -> bool:
    return parameter.requires_grad and not is_lazy(parameter)


def _beside(value: Tensor, other: Tensor) -> Tensor:
    """A copy of ``other`` on the device of ``value``, spread over ranks as that is."""
    spread = like(other, value)
    return other.to(value.device, copy=True) if spread is other else spread


def _copied(value: Tensor) -> Tensor:
    """A copy to average in."""
    low = value.is_floating_point() and torch.finfo(value.dtype).bits < 32
    return value.detach().to(torch.float32 if low else value.dtype, copy=True)


# ---------------------------------------------------------------------- statistics of BatchNorm


def batch_norms(module: nn.Module) -> dict[str, Any]:
    """The layers with statistics that training changes, by name."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}
    return {name: layer for name, layer in layers.items() if layer.training and layer.track_running_stats}


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    layers = batch_norms(module).items()
    return {f"{path}.{name}" if path else name: buffer.clone() for path, layer in layers for name, buffer in layer.named_buffers()}


def recompute(run: Run) -> bool:
    """Takes the statistics of BatchNorm layers anew, for the weights that the module has now: their mean over one epoch of training data.

    The pass calls ``training_step`` without gradients, in a `trial`: it leaves no trace but the statistics. Layers in eval mode
    keep theirs. The result is that of `torch.optim.swa_utils.update_bn`, over the batches of all ranks.

    Returns:
        Whether the pass is complete; if a signal ended it, the statistics are what they were.

    Raises:
        TypeError: the training data are an iterator, which cannot be begun again.
    """
    module, signal = run.module, run.interrupted
    layers = batch_norms(module).values()
    if not layers:
        return True
    with trial(run) as attempt, torch.no_grad():
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean of all batches
        for batch_idx, batch in enumerate(attempt.batches()):
            if run.interrupted != signal:
                return False
            for optimizer_idx in range(len(run.optimizers)):
                run.hooks.train_step(run, batch, batch_idx, optimizer_idx)
        found = _statistics(module)
    for name, value in found.items():
        if run.agreement is not None:  # every rank had as many batches
            value = run.hooks.reduce(run, value.cpu(), "sum") / (run.world_size if value.is_floating_point() else 1)
        _tensor(module, name).copy_(value)
    return True


# ---------------------------------------------------------------------- the plugin


@dataclass(kw_only=True, eq=False)
class Averaging:
    """A plugin that keeps an average of the module's weights, evaluates with it, and leaves it in the module after training.

    A subclass says in `stepped` and `epoch_over` when to `update`, and in `weight` with which weight. Where training ends between
    two updates, the weights at its end are in what the module gets as well. A run that goes on from a checkpoint, or after its
    end, has its own weights again. A step that the loss scaler skipped is no step; with several optimizers a batch in which any of
    them stepped is one.

    Args:
        buffers: What becomes of buffers such as the statistics of BatchNorm: 'average' averages those that are floating-point
            numbers, 'recompute' takes statistics of BatchNorm anew in a pass over the training data, 'keep' leaves them as they are.
        validate: Validate with the average while training, and use it where validate, test or predict load a checkpoint of this run.

    Attributes:
        updates: how often the average was updated.
        counted: the optimizer step whose weights are in the average, or were passed over, last.
    """

    buffers: Literal["average", "recompute", "keep"] = "average"
    validate: bool = True

    updates: int = field(init=False, default=0)
    counted: int = field(init=False, default=0, repr=False)
    _seen: int = field(init=False, default=0, repr=False)  # the step that `stepped` was told of last
    _average: Average | None = field(init=False, default=None, repr=False)
    _own: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)  # the module's values while it holds the averages
    _run: Run | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)

    # ------------------------------------------------------------------ what a subclass says

    def stepped(self, run: Run) -> None:
        """An optimizer step was taken: ``run.position.step``."""

    def epoch_over(self, run: Run) -> None:
        """All steps of an epoch are done. Comes before the validation at its end, and once more after it."""

    def weight(self) -> float:
        """The weight of the module's values in the next update, from 0 to 1; the average gets the rest. The first update is a copy."""
        raise NotImplementedError(f"{type(self).__name__} does not say with which weight it averages")

    def update(self, run: Run) -> None:
        """The module's present values are averaged."""
        if self._average is None:
            self._average = Average.begin(run.module, self.buffers == "average")
        else:
            self._average.update(self.weight())
        self.updates += 1
        self.counted = run.position.step

    @property
    def fresh(self) -> bool:
        """Whether the module has taken steps since the weights that were averaged or passed over last."""
        return self.counted != self._seen

    # ------------------------------------------------------------------ training

    @hookimpl
    def setup(self, run: Run, stage: str) -> None:
        if stage != "fit":
            return
        both = [name for name, plugin in run.plugins.items() if isinstance(plugin, Averaging)]
        if len(both) > 1:
            raise ValueError(f"a module can hold one average of its weights, and {' and '.join(both)} would each leave one in it")
        self._run, self._average, self._own, self.updates = run, None, {}, 0  # the instance may have been in a run before
        self._seen = self.counted = run.position.step

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        self._seen, self.counted = min(self._seen, run.position.step), min(self.counted, run.position.step)
        self._put_back()  # a training that had ended goes on
        if self.buffers != "recompute" or not batch_norms(run.module):
            return
        other = "write buffers='average' or 'keep'"
        if not run.automatic:
            raise ValueError(
                f"buffers='recompute' calls training_step without taking steps, which is not possible in manual optimization: {other}"
            )
        if isinstance(run.loaders["train"][0], Iterator):
            raise ValueError(
                "buffers='recompute' needs a second pass over the training data, and an iterator gives them once: give a "
                f"DataLoader, or {other}"
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

    @hookimpl
    def on_train_epoch_end(self, run: Run) -> None:
        self._look(run)  # a window that the loader's end cut short is stepped after its last batch
        self.epoch_over(run)

    def _look(self, run: Run) -> None:
        """Tells of an optimizer step, once."""
        if run.position.step != self._seen:
            self._seen = run.position.step
            self.stepped(run)

    # ------------------------------------------------------------------ when the module holds the average

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run, stage: str) -> Generator[None, Any, Any]:
        if run.work == "fit" and stage == "validate":
            self._look(run)
            if run.is_last_batch:
                self.epoch_over(run)
            if self.validate and self._average is not None:
                with self._held(run):
                    return (yield)
        return (yield)

    @contextmanager
    def _held(self, run: Run) -> Iterator[None]:
        """Inside, the module holds the averages; on any way out its own values."""
        try:
            self._put_in(run)
            yield
        finally:
            self._put_back()

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        self._conclude(run)

    @hookimpl
    def on_fit_end(self, run: Run, exception: BaseException | None) -> None:
        if run.interrupted == "SIGINT" and exception is None and not self._own:  # who pressed Ctrl-C may want to use what was trained
            self._look(run)
            if self._average is not None and self.buffers == "recompute" and batch_norms(run.module):
                run.say_once(
                    f"plugin {run.name_of(self)!r}: takes the statistics of BatchNorm anew; Ctrl-C once more ends that", logging.INFO
                )
            self._conclude(run)

    def _conclude(self, run: Run) -> None:
        """Training is over: the module gets the averages, and what is still missing in them."""
        name = run.name_of(self)
        if self._average is None:
            run.say_once(f"plugin {name!r}: training ended before anything was averaged: the module keeps its own weights")
            return
        whole = False
        try:
            whole = self._put_in(run, self.weight() if self.fresh else 0.0)
        finally:
            if not whole:  # an error, or a signal: the run that goes on does it again
                self._put_back()
        if whole:
            steps = self.updates + self.fresh
            run.report[name] = f"the module holds the average of its weights at {steps} step{'s' * (steps != 1)}"

    def _put_in(self, run: Run, rest: float = 0.0) -> bool:
        """The averages take the place of the module's values. Whether everything is there: False if a signal came."""
        assert self._average is not None
        self._average.check()
        statistics = _statistics(run.module) if self.buffers == "recompute" else {}
        self._own = {**statistics, **self._average.put_in(rest)}
        return self.buffers != "recompute" or recompute(run)

    def _put_back(self) -> None:
        if self._own and self._average is not None:
            self._average.put_back(self._own)
        self._own = {}

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
        """What a checkpoint keeps, under the module's names, so that it has both sets of weights.

        While the module has its own weights, the averages are ``weights``. While it holds the averages, its own weights are ``own``,
        and the averages, without what only the end brought into them, ``average``.
        """
        averages = {} if self._average is None else self._average.named()
        kept = {"weights": {}, "average": averages, "own": self._own} if self._own else {"weights": averages, "average": {}, "own": {}}
        return {"updates": self.updates, "seen": self._seen, "counted": self.counted, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, within a run."""
        self.updates, self._seen, self.counted = state["updates"], state["seen"], state["counted"]
        self._average, self._own, averages = None, {}, state["average"] or state["weights"]
        if averages:
            if self._run is None:
                raise RuntimeError(f"{type(self).__name__} takes averages within a run, when it knows the module")
            module = self._run.module
            self._average = Average.restored(module, averages)
            self._own = {name: _beside(_tensor(module, name), value) for name, value in state["own"].items()}
