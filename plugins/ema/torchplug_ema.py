"""Keeps an exponential moving average of a module's weights, validates with it, and leaves it in the module after training."""

from __future__ import annotations

from dataclasses import dataclass

from torchplug import Run
from torchplug.averaging import Averaging

__all__ = ["Ema"]


@dataclass(kw_only=True, eq=False)
class Ema(Averaging):
    """Exponential moving average of the weights, ``average = decay * average + (1 - decay) * weights`` after optimizer steps.

    The average begins with the weights after the first step that counts. Where training ends between two updates, the weights at
    its end are in it as well. When training is over, whatever ended it but an error or a signal other than Ctrl-C, the module holds
    the average; a run that goes on has its own weights again. A step that the loss scaler skipped is no step. With several
    optimizers the average is updated once for a batch in which any of them stepped.

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

    before = ("fsdp",)  # which makes parameters whole for an evaluation, when the average is in their place

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be a number from 0 to below 1, got {self.decay!r}")
        if self.every_n_steps < 1:
            raise ValueError(f"every_n_steps must be a number of steps, at least 1, got {self.every_n_steps!r}")

    def stepped(self, run: Run) -> None:
        """Updates the average after each step that counts."""
        if run.position.step % self.every_n_steps == 0:
            self.update(run)

    def weight(self) -> float:
        """What the decay leaves."""
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        return 1 - decay
