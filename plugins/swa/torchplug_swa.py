"""Averages the weights of the last part of training, and leaves the mean in the module (stochastic weight averaging)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from torchplug import Run, hookimpl
from torchplug.averaging import Averaging
from torchplug.optimizers import set_rate

__all__ = ["Swa"]

FRACTION = 0.75  # of the training, where the paper begins


@dataclass(kw_only=True, eq=False)
class Swa(Averaging):
    """Stochastic weight averaging: the mean of the weights at the ends of the last epochs, learned at a constant rate.

    From ``start`` on weights are averaged, those at the start itself not; where training ends between two of them, the weights at
    its end are in the mean as well. When training is over, whatever ended it but an error or a signal other than Ctrl-C, the module
    holds the mean; a run that goes on has its own weights again. A start that training does not reach averages nothing, and says so.

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

    _begun: tuple[int, int] | None = field(init=False, repr=False, default=None)  # the first epoch and the step before it
    _rates: list[list[float]] = field(init=False, repr=False, default_factory=list)  # at the start, of each optimizer's groups

    before = ("fsdp",)  # which makes parameters whole for an evaluation, when the average is in their place

    def __post_init__(self) -> None:
        super().__post_init__()
        for one, other in (("start", "start_step"), ("every_n_epochs", "every_n_steps")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} say the same in two ways: give one of them")
        if isinstance(self.start, float) and not 0 <= self.start <= 1:
            raise ValueError(f"start as a part of the training must be from 0 to 1, got {self.start!r}; an epoch is written as an int")
        for name, least in (("start", 0), ("start_step", 0), ("every_n_epochs", 1), ("every_n_steps", 1), ("anneal_epochs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        rates = self.lr if isinstance(self.lr, list) else [] if self.lr is None else [self.lr]
        if (self.lr is not None and not rates) or not all(map(_is_rate, rates)):
            raise ValueError(f"lr must be a number above 0, a list of them, or None, got {self.lr!r}")

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

    def stepped(self, run: Run) -> None:
        """Between two steps averaging may begin, or be due."""
        if self._begun is None:
            self._begin(run)
        elif self.every_n_steps is not None and (run.position.step - self._begun[1]) % self.every_n_steps == 0:
            self.update(run)

    def epoch_over(self, run: Run) -> None:
        """At the end of an epoch averaging may be due."""
        if self._begun is not None and self.every_n_steps is None and self.fresh:
            epochs = run.position.epoch - self._begun[0] + 1
            if epochs % (self.every_n_epochs or 1) == 0:
                self.update(run)

    def weight(self) -> float:
        """That of one among all."""
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
            self.counted = position.step  # the weights at the start are passed over
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
                set_rate(group, "lr", there * part + here * (1 - part))

    def _lrs(self, run: Run) -> list[list[float]]:
        """The rate of each parameter group of each optimizer after annealing."""
        sizes = [len(optimizer.param_groups) for optimizer in run.optimizers]
        if not isinstance(self.lr, list):
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
        return {**super().state_dict(), "begun": self._begun, "rates": [list(rates) for rates in self._rates]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, within a run."""
        super().load_state_dict(state)
        self._begun, self._rates = state["begun"], [list(rates) for rates in state["rates"]]


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
