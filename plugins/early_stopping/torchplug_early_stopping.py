"""Stops training when a metric has stopped improving, has reached a goal, or has gone bad."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torchplug import Run, hookimpl

__all__ = ["EarlyStopping"]


@dataclass(kw_only=True, eq=False)
class EarlyStopping:
    """Watches one metric and asks the run to stop.

    A value counts once, when it is new: after the validation or at the end of the epoch that computed it. An old value
    means wait. A value that is NaN or infinite is never an improvement and uses up no patience; `check_finite` says
    whether it ends the run. A metric that nobody logs is an error as soon as every metric had its chance.

    A run that goes on from a checkpoint and had been asked to stop is asked again before it trains, for as long as the value
    that was the reason still is one: with a larger patience, other thresholds or without check_finite it may go on.

    Args:
        monitor: Name of the metric to watch, as it was logged.
        mode: Which values are better: 'min' for lower ones (a loss), 'max' for higher ones (an accuracy).
        patience: Stop when this many new values of the monitor in a row did not improve. The unit is values, one for each
            validation or epoch that computes the metric, not steps. 0 stops at the first one, as 1 does.
        min_delta: A value improves on the best one when it is better by more than this, in the units of the monitor.
        stopping_threshold: Stop as soon as a value is at least this good. None: there is no goal.
        divergence_threshold: Stop as soon as a value is this bad or worse. None: no value is too bad.
        check_finite: Stop as soon as a value is NaN or infinite. False passes such values over.

    Attributes:
        reason: Why training was asked to stop, empty if it was not.
        stopped_step: Optimizer steps that were finished when it was asked to stop, 0 if it was not.
        best_score: The best value so far, None before the first finite one.
        wait: New values in a row that did not improve.
    """

    monitor: str
    mode: Literal["min", "max"] = "min"
    patience: int = 3
    min_delta: float = 0.0
    stopping_threshold: float | None = None
    divergence_threshold: float | None = None
    check_finite: bool = True

    reason: str = field(init=False, default="")
    stopped_step: int = field(init=False, default=0)
    best_score: float | None = field(init=False, default=None)
    wait: int = field(init=False, default=0)
    _best_step: int = field(init=False, default=0, repr=False)
    _seen: int = field(init=False, default=-1, repr=False)  # serial of the last reading
    _cause: tuple[float, int] = field(init=False, default=(0.0, 0), repr=False)  # value and wait for which it was asked to stop

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ValueError(f"monitor must be the name of a metric, got {self.monitor!r}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {self.mode!r}")
        if type(self.patience) is not int or self.patience < 0:
            raise ValueError(f"patience must be a whole number of values, at least 0, got {self.patience!r}")
        if not _is_finite(self.min_delta) or self.min_delta < 0:
            raise ValueError(f"min_delta must be a finite number, at least 0 (mode says the direction), got {self.min_delta!r}")
        for name in ("stopping_threshold", "divergence_threshold"):
            value = getattr(self, name)
            if value is not None and not _is_finite(value):
                raise ValueError(f"{name} must be a finite number or None, got {value!r}")
        if not isinstance(self.check_finite, bool):
            raise TypeError(f"check_finite must be True or False, got {self.check_finite!r}")
        good, bad = self.stopping_threshold, self.divergence_threshold
        if good is not None and bad is not None and not self._better(good, bad):
            raise ValueError(f"stopping_threshold={good!r} must be better than divergence_threshold={bad!r} (mode={self.mode!r})")

    # ------------------------------------------------------------------ hooks

    @hookimpl
    def setup(self, stage: str) -> None:
        if stage == "fit":  # the instance may have been in a run before
            self.reason, self.stopped_step, self.best_score, self.wait = "", 0, None, 0
            self._best_step, self._seen, self._cause = 0, -1, (0.0, 0)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        if self.reason:  # of the run that is resumed
            run.request_stop(self.reason)

    @hookimpl
    def on_validation_end(self, run: Run) -> None:
        if run.work == "fit":  # trainer.validate is no part of training
            self._look(run)

    @hookimpl
    def on_train_epoch_end(self, run: Run) -> None:
        self._look(run)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        if self._seen < 0:
            there = ", ".join(sorted(run.metrics.results())) or "none"
            run.say_once(
                f"plugin {run.name_of(self)!r}: training ended before any value of {self.monitor!r} was computed, so nothing was "
                f"watched (there are: {there})"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        value, wait = self._cause
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "reason": self.reason,
            "stopped_step": self.stopped_step,
            "stopped_value": value,
            "stopped_wait": wait,
            "best_score": self.best_score,
            "best_step": self._best_step,
            "wait": self.wait,
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave. Values of another monitor or mode say nothing: then it begins anew."""
        if (state["monitor"], state["mode"]) != (self.monitor, self.mode):
            return
        self.best_score, self._best_step, self.wait, self._seen = state["best_score"], state["best_step"], state["wait"], state["seen"]
        self._cause = state["stopped_value"], state["stopped_wait"]
        still = bool(state["reason"] and self._why(*self._cause))  # the options may say otherwise by now
        self.reason, self.stopped_step = (state["reason"], state["stopped_step"]) if still else ("", 0)

    # ------------------------------------------------------------------ what a value means

    def _look(self, run: Run) -> None:
        """Acts on the monitored value if there is a new one."""
        reading = run.metrics.fresh(self.monitor, self._seen)
        if reading is None:
            return
        self._seen = reading.serial
        value = reading.value
        if math.isfinite(value):
            if self.best_score is None or self._better(value, self.best_score, self.min_delta):
                self.best_score, self._best_step, self.wait = value, reading.step, 0
            else:
                self.wait += 1
        reason = self._why(value, self.wait, f" at step {reading.step}")
        if reason and not self.reason:  # what follows while the run waits for min_epochs or min_steps changes nothing
            self.reason, self.stopped_step, self._cause = reason, run.position.step, (value, self.wait)
            run.request_stop(reason)

    def _why(self, value: float, wait: int, where: str = "") -> str:
        """The reason to stop at a value after ``wait`` ones that did not improve; empty if there is none."""
        best = "none" if self.best_score is None else f"{self.best_score:.6g} at step {self._best_step}"
        if not math.isfinite(value):
            said = f"{self.monitor} is {value}{where}, best {best} (write check_finite=False to pass over such values)"
            return said if self.check_finite else ""
        now = f"{value:.6g}{where}"
        good, bad = self.stopping_threshold, self.divergence_threshold
        if good is not None and not self._better(good, value):
            return f"{self.monitor} reached stopping_threshold={good:g}: {now}"
        if bad is not None and not self._better(value, bad):
            return f"{self.monitor} reached divergence_threshold={bad:g}: {now}, best {best}"
        if wait and wait >= self.patience:
            values = f"{wait} value{'s' * (wait > 1)}"
            return f"{self.monitor} did not improve for {values} in a row: {now}, best {best} (patience={self.patience} values)"
        return ""

    def _better(self, value: float, other: float, by: float = 0.0) -> bool:
        """Whether ``value`` is better than ``other`` by more than ``by``."""
        return other - value > by if self.mode == "min" else value - other > by


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
