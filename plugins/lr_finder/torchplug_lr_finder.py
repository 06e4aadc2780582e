"""Looks for a good learning rate: a short trial in which the rate rises from step to step, and what its losses say.

The range test is that of L. Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186), with rates that rise
by the same factor each time. Nothing of the trial stays but the chosen rate.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Callable, Generator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

from torchplug import Module, Run, Trainer, hookimpl
from torchplug.optimizers import change_rates, set_rate
from torchplug.trials import apart, trial

__all__ = ["LearningRateFinder", "RangeTest", "lr_find"]

Method = Literal["minimum", "steepest", "valley", "slide", "divergence"]
ATTRIBUTES = ("lr", "learning_rate")
EARLY = 9  # steps whose mean is of too few losses to say anything
SLIDE = 15  # points between the two places whose slopes are compared


@dataclass
class RangeTest:
    """What a range test found.

    Args:
        lrs: the rates of the first parameter group, one for each step, rising.
        losses: the loss at each of them, the mean over the batches of the step.
        smoothed: their exponential means, corrected for the beginning (as Adam's moments are, arXiv:1412.6980).
        diverged: whether the test ended because the loss did.
        method: what `suggestion` uses if nothing else is said.
    """

    lrs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    diverged: bool = False
    method: Method = "minimum"

    def suggestion(self, method: Method | None = None) -> float | None:
        """A learning rate, or None if the losses do not say one.

        Args:
            method: ``"minimum"`` is a tenth of the rate of the lowest smoothed loss, ``"valley"`` the middle of the longest stretch
                in which it falls, ``"slide"`` where it begins to rise, seen from the end; the three are named as in fastai.
                ``"steepest"`` is where the smoothed loss falls fastest over the logarithm of the rate (Smith), ``"divergence"`` a
                tenth of the rate at which the loss diverged.
        """
        method = method or self.method
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if len(self.smoothed) < 3 or max(self.smoothed) - min(self.smoothed) <= 1e-6 * abs(self.smoothed[0]):
            return None
        rate = METHODS[method](self)
        return None if rate is None else max(rate, self.lrs[0])

    def plot(self, suggest: bool = True) -> Any:
        """The losses over the rates, as a matplotlib figure that belongs to no window.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        shown = self.lrs[: len(self.smoothed)]
        axes.plot(shown, self.losses[: len(shown)], color="0.8", label="loss")
        axes.plot(shown, self.smoothed, label="smoothed")
        rate = self.suggestion() if suggest else None
        if rate is not None:
            axes.axvline(rate, color="C1", label=f"{self.method}: {rate:.2e}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        if self.smoothed:
            low, high = min(self.smoothed), self.smoothed[0]
            margin = 0.3 * (high - low) or 0.1 * abs(low) or 1.0
            axes.set_ylim(low - margin, high + 2 * margin)
        axes.legend()
        return figure

    def table(self) -> str:
        """Rates and losses as Markdown."""
        rows = itertools.zip_longest(self.lrs, self.losses, self.smoothed, fillvalue=math.nan)
        return "\n".join(
            ["| learning rate | loss | smoothed |", "|---|---|---|", *(f"| {a:.3e} | {b:.4g} | {c:.4g} |" for a, b, c in rows)]
        )

    def save(self, path: str | Path) -> None:
        """Writes everything as JSON."""
        Path(path).write_text(json.dumps({**dataclasses.asdict(self), "suggestion": self.suggestion()}, indent=1))


# ---------------------------------------------------------------------- what the losses say


def _at_divergence(found: RangeTest) -> float | None:
    return found.lrs[-1] / 10 if found.diverged else _at_steepest(found)


def _at_steepest(found: RangeTest) -> float | None:
    smoothed, logs = found.smoothed, [math.log(rate) for rate in found.lrs]
    begin = EARLY if len(smoothed) > 2 * EARLY else 1
    slopes = {i: (smoothed[i + 1] - smoothed[i - 1]) / (logs[i + 1] - logs[i - 1]) for i in range(begin, len(smoothed) - 1)}
    steepest = min(slopes, key=slopes.__getitem__)
    return found.lrs[steepest] if slopes[steepest] < 0 else None


def _at_minimum(found: RangeTest) -> float | None:
    begin = EARLY if len(found.smoothed) > 2 * EARLY else 0
    return found.lrs[min(range(begin, len(found.smoothed)), key=found.smoothed.__getitem__)] / 10


def _in_the_valley(found: RangeTest) -> float | None:
    """The middle of the longest falling subsequence, which passes over short rises."""
    smoothed = found.smoothed
    longest, before = [1] * len(smoothed), [-1] * len(smoothed)
    for earlier, later in itertools.combinations(range(len(smoothed)), 2):
        if smoothed[later] < smoothed[earlier] and longest[earlier] + 1 > longest[later]:
            longest[later], before[later] = longest[earlier] + 1, earlier
    place, stretch = max(range(len(smoothed)), key=longest.__getitem__), []
    while place >= 0:
        stretch.append(place)
        place = before[place]
    return found.lrs[stretch[len(stretch) // 2]]


def _down_the_slide(found: RangeTest) -> float | None:
    """From the end backwards, until the slopes at two places with a fixed distance are nearly the same."""
    smoothed = found.smoothed
    slopes = [later - earlier for earlier, later in itertools.pairwise(smoothed)]
    near = 0.05 * (smoothed[0] - min(smoothed))
    right = len(slopes) - 1
    rate = None
    while right - SLIDE >= 0 and abs(slopes[right] - slopes[right - SLIDE]) > near:
        rate = found.lrs[right - SLIDE]
        right -= 1
    return rate


METHODS: dict[str, Callable[[RangeTest], float | None]] = {
    "minimum": _at_minimum, "steepest": _at_steepest, "valley": _in_the_valley, "slide": _down_the_slide, "divergence": _at_divergence,
}  # fmt: skip


# ---------------------------------------------------------------------- the plugin


@dataclass(kw_only=True, eq=False)
class LearningRateFinder:
    """Looks for a learning rate when a fit begins, and sets it; at the start of other epochs too if they are named.

    The rate is that of the first parameter group. All groups keep their ratios to it, and so do the rates that schedulers start
    from. The optimizer must be one alone, in automatic optimization. A run that goes on from a checkpoint has its rates from there.

    Args:
        min_lr: The lowest rate that is tried, for the first parameter group.
        max_lr: The highest one; the test ends before if the loss diverges.
        steps: Optimizer steps of a test.
        mode: 'exponential', rates that rise by the same factor, or 'linear'.
        smoothing: How much of the mean over earlier losses is kept at each step, from 0 to below 1.
        divergence: The loss diverges when it rises above its lowest mean by this many times minus 1 what it was worth or has fallen.
        method: How the rate is chosen: 'minimum', 'steepest', 'valley', 'slide' or 'divergence'.
        attribute: What the module calls its rate, also among its hyperparameters; it is set too. None: lr or learning_rate, if there.
        at_epochs: Epochs at whose start the rate is looked for.
    """

    min_lr: float = 1e-6
    max_lr: float = 100.0
    steps: int = 100
    mode: Literal["exponential", "linear"] = "exponential"
    smoothing: float = 0.9
    divergence: float = 4.0
    method: Method = "minimum"
    attribute: str | None = None
    at_epochs: list[int] | tuple[int, ...] = (0,)

    result: RangeTest | None = field(init=False, default=None, repr=False)  # the newest
    _done: list[int] = field(init=False, default_factory=list, repr=False)  # epochs
    _newest: float | None = field(init=False, default=None, repr=False)  # what the run found last
    _sets: bool = field(init=False, default=True, repr=False)  # whether what is found is used

    def __post_init__(self) -> None:
        for name in ("min_lr", "max_lr", "steps", "smoothing", "divergence"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if name == "steps" else (int, float)):
                raise TypeError(f"{name} must be a {'whole ' * (name == 'steps')}number, got {value!r}")
        if not isinstance(self.at_epochs, (list, tuple)) or not all(type(epoch) is int and epoch >= 0 for epoch in self.at_epochs):
            raise TypeError(f"at_epochs must be a list of epochs, counted from 0, got {self.at_epochs!r}; write [0, 5] for two of them")
        if not 0 < self.min_lr < self.max_lr:
            raise ValueError(f"min_lr must be above 0 and below max_lr, got {self.min_lr!r} and {self.max_lr!r}")
        if self.steps < 10:
            raise ValueError(f"steps must be at least 10, got {self.steps!r}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {self.smoothing!r}")
        if not self.divergence > 1:
            raise ValueError(f"divergence must be above 1, got {self.divergence!r}")
        for name, choice, choices in (("method", self.method, METHODS), ("mode", self.mode, ("exponential", "linear"))):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")

    # ------------------------------------------------------------------ when

    @hookimpl
    def on_run_start(self) -> None:
        self._done, self._newest = [], None

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        if self._newest is not None:  # of the run that goes on, whose module had it
            self._tell(run, self._newest)

    @hookimpl
    def on_train_epoch_start(self, run: Run) -> None:
        epoch = run.position.epoch
        if epoch not in self.at_epochs or epoch in self._done:
            return
        self._done.append(epoch)
        self.result = self._test(run)  # to its end even after a signal: the batch that follows needs the rate, as does a run that goes on
        self._use(run, self.result)
        self._show(run, self.result)

    @hookimpl(wrapper=True)
    def tune(self, run: Run) -> Generator[None, Any, dict[str, Any]]:
        others = yield  # what a batch size finder sets comes first
        self.result = self._test(run)
        if self._sets:
            self._use(run, self.result)
        return {run.name_of(self): self.result, **(others or {})}

    def state_dict(self) -> dict[str, Any]:
        """At which epochs a rate was looked for, and the newest: a run that goes on does not look for it again."""
        return {"done": list(self._done), "rate": self._newest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self._done, self._newest = list(state["done"]), state["rate"]

    # ------------------------------------------------------------------ the test

    def _test(self, run: Run) -> RangeTest:
        if not run.automatic or len(run.optimizers) != 1:
            what = "in manual optimization" if not run.automatic else f"for {len(run.optimizers)} optimizers"
            raise ValueError(f"a learning rate cannot be looked for {what}: it takes one optimizer, in automatic optimization")
        _places(run.module, self.attribute)  # refuses a name that is not there before anything is tried
        (optimizer,), found = run.optimizers, RangeTest(method=self.method)
        ratios = _ratios(optimizer)
        mean, lowest = 0.0, math.inf
        with trial(run) as attempt:
            for step in range(self.steps):
                rate = self._rate(step)
                for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                    set_rate(group, "lr", rate * ratio)
                found.lrs.append(rate)
                loss = attempt.step()
                if not math.isfinite(loss):
                    found.diverged = True
                    break
                mean = self.smoothing * mean + (1 - self.smoothing) * loss
                smoothed = mean / (1 - self.smoothing ** (step + 1))
                found.losses.append(loss)
                found.smoothed.append(smoothed)
                if step < EARLY:
                    continue
                lowest = min(lowest, smoothed)
                if smoothed > lowest + (self.divergence - 1) * max(abs(lowest), found.smoothed[EARLY] - lowest):
                    found.diverged = True
                    break
        return found

    def _rate(self, step: int) -> float:
        part = step / (self.steps - 1)
        if self.mode == "linear":
            return self.min_lr + (self.max_lr - self.min_lr) * part
        return float(self.min_lr * (self.max_lr / self.min_lr) ** part)

    # ------------------------------------------------------------------ what comes of it

    def _use(self, run: Run, found: RangeTest) -> None:
        """Sets the rate in the optimizer, its schedulers, and the module."""
        rate = found.suggestion()
        if rate is None:
            run.say_once(
                "lr_finder: the losses suggest no learning rate, and it stays as it was; another min_lr, max_lr or steps may show one"
            )
            return
        (optimizer,) = run.optimizers
        reference = _reference(optimizer.param_groups[0])
        # the quotient first: what equals the reference becomes the rate to the last bit
        change_rates([optimizer], run.schedulers, lambda value: rate * (value / reference))
        self._newest = rate
        self._tell(run, rate)

    def _tell(self, run: Run, rate: float) -> None:
        name, owners = _places(run.module, self.attribute)
        for owner in owners:
            if isinstance(owner, Module):
                setattr(owner, name, rate)
            else:
                owner[name] = rate

    def _show(self, run: Run, found: RangeTest) -> None:
        rate = found.suggestion()
        if rate is not None:
            run.say_once(f"lr_finder: learning rate {rate:.3e}, by {self.method} over {len(found.lrs)} steps", logging.INFO)
        run.log_text("lr_finder", found.table())
        try:
            figure = found.plot()
        except ImportError:
            return  # the table says it too
        run.log_figure("lr_finder", figure)


def lr_find(trainer: Trainer, module: Module, train_dataloaders: Any = None, datamodule: Any = None, **options: Any) -> RangeTest:
    """Makes a range test as ``trainer`` would train, and leaves no trace: nothing is set, written or logged.

    Args:
        trainer: its options are used (precision, accumulation, clipping), and those of its plugins that replace operations.
        module: what is to be trained.
        train_dataloaders: as for ``fit``.
        datamodule: as for ``fit``.
        options: those of `LearningRateFinder`.
    """
    finder = LearningRateFinder(**options)
    finder._sets = False
    if hasattr(train_dataloaders, "train_dataloader"):
        datamodule, train_dataloaders = train_dataloaders, None
    with apart(trainer, module, datamodule, lr_finder=finder) as tuner:
        tuner.tune(module, train_dataloaders, datamodule=datamodule)
    assert finder.result is not None
    return finder.result


# ---------------------------------------------------------------------- rates


def _places(module: Module, attribute: str | None) -> tuple[str, list[Module | MutableMapping[str, Any]]]:
    """The name of the module's rate, and where it stands: in the module, among its hyperparameters, or both.

    Raises:
        AttributeError: there is nothing of the name that was asked for.
    """
    for name in ATTRIBUTES if attribute is None else (attribute,):
        owners: list[Module | MutableMapping[str, Any]] = [module.hparams] if name in module.hparams else []
        if isinstance(getattr(module, name, None), (int, float)):
            owners.append(module)
        if owners:
            return name, owners
    if attribute is None:
        return "", []
    raise AttributeError(
        f"{type(module).__name__} has no attribute {attribute!r}, nor a hyperparameter of this name; "
        "name one in lr_finder's option attribute"
    )


def _reference(group: dict[str, Any]) -> float:
    """The rate that a scheduler goes by in a group, or that of the optimizer alone."""
    for name in ("max_lr", "initial_lr", "lr"):
        if name in group:
            return float(group[name])
    raise KeyError("lr")


def _ratios(optimizer: Optimizer) -> list[float]:
    """Each group's rate as a multiple of the first one's."""
    rates = [_reference(group) for group in optimizer.param_groups]
    if not rates[0] > 0:
        raise ValueError("the first parameter group has a learning rate of 0: the others have no ratio to it; give it any rate above 0")
    return [rate / rates[0] for rate in rates]
