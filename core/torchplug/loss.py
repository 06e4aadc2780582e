"""The loss: what a step may return, why a backward pass failed, and a loss that stays NaN."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchplug.sharded import local

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["LossWatch", "explain_backward", "loss_of"]

PERSISTS = 10  # batches in a row with a loss that is not finite


def loss_of(run: Run, outputs: Any) -> Tensor | None:
    """The loss in what ``training_step`` returned, None for a step to be skipped.

    Raises:
        TypeError: something else than a tensor, a dict or None.
        ValueError: a dict without ``loss``.
    """
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"training_step must return the loss as a tensor, a dict with it under 'loss', or None to skip the batch, "
            f"got {type(outputs).__name__} {outputs!r}"
        )
    if "loss" not in outputs:
        raise ValueError(f"training_step returned a dict without the key 'loss' (it has: {', '.join(map(str, outputs)) or 'nothing'})")
    for key in ("log", "progress_bar"):
        if key in outputs:
            run.say_once(
                f"training_step returned a dict with {key!r}, which is not read: only 'loss' is. "
                "Write self.log(name, value) for what you want to record, with prog_bar=True to show it"
            )
    loss = outputs["loss"]
    if loss is not None and not isinstance(loss, Tensor):
        raise TypeError(f"training_step must return the loss as a tensor, got {type(loss).__name__} {loss!r} under 'loss'")
    return loss


def explain_backward(loss: Tensor, error: RuntimeError) -> None:
    """Raises in clear words what torch's error about the loss means, if it is about the loss.

    Raises:
        ValueError: the loss is not a single number, or it depends on no parameter.
    """
    if loss.numel() != 1:
        raise ValueError(
            f"training_step must return a loss that is one number, got a tensor of shape {tuple(loss.shape)}; "
            "reduce it, for example with .mean()"
        ) from error
    if not loss.requires_grad:
        raise ValueError(
            "training_step returned a loss without a gradient: it depends on no parameter that is trained. Was it computed under "
            "torch.no_grad(), from .detach() or .item(), or are all parameters frozen?"
        ) from error


class LossWatch:
    """Looks at the loss seldom, so that the device is not waited for, and at every batch once it is not finite."""

    def __init__(self, run: Run) -> None:
        self.run, self.position = run, run.position
        self.policy = run.options.nonfinite_loss
        self.every = run.options.log_every_n_steps
        self.warned = False
        self.bad = 0  # batches in a row
        self.since: int | None = None  # the step at which the first of them was seen
        self.value = 0.0
        self.next = self.every - 1  # the micro step of the next check
        self.latest: Tensor | None = None  # kept where the last batch of the epoch cannot be foreseen
        self.due: float = math.inf if self.policy == "ignore" else 0

    def look(self, outputs: Any) -> None:
        """Looks at the loss of a batch if it is time, or the last batch, and says in ``due`` when to look next.

        Raises:
            FloatingPointError: it was not finite in `PERSISTS` batches in a row, and the policy is "error".
        """
        if self.policy == "ignore":
            return
        several = outputs if isinstance(outputs, list) else [outputs]  # one for each optimizer
        found = [each.get("loss") if isinstance(each, Mapping) else each for each in several]
        losses = [each.detach().sum() for each in found if isinstance(each, Tensor) and each.numel() == 1]
        position, batches = self.position, self.run.num_batches
        steps_left = (self.run.options.max_steps or sys.maxsize) - position.step  # this batch's update is counted already
        if losses:
            loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
            if position.micro_step >= self.next or position.batch + 1 == batches or steps_left <= 0:
                self._check(loss)
            elif batches is None:
                self.latest = loss
        to_the_last = 1 if batches is None else batches - 1 - position.batch
        if to_the_last <= 0:
            to_the_last += batches or 1
        self.due = position.micro_step + max(1, min(self.next - position.micro_step, to_the_last, steps_left))

    def _check(self, loss: Tensor) -> None:
        self.latest = None
        self.value = float(loss)
        if math.isfinite(self.value):
            self.bad, self.next = 0, self.position.micro_step + self.every
        else:
            self.next = self.position.micro_step + 1
            self._is_bad()

    def _is_bad(self) -> None:
        if self.bad == 0:
            self.since = self.position.step
        self.bad += 1
        if self.policy == "warn" and not self.warned:
            self.warned = True
            self.run.say_once(self._words(f"the loss is {self.value}"), logging.WARNING)
        elif self.policy == "error" and self.bad >= PERSISTS:
            raise FloatingPointError(self._words(f"the loss is {self.value}"))

    def conclude(self) -> None:
        """At the end of training: a loss or parameters that are not finite are no success.

        Raises:
            FloatingPointError: one of them is not finite, and the policy is "error".
        """
        if self.policy != "error":
            return
        if self.latest is not None:
            self._check(self.latest)
        if self.bad:
            raise FloatingPointError(self._words(f"the loss is {self.value}"))
        trained = [(name, p) for name, p in self.run.module.named_parameters() if p.requires_grad and p.numel()]
        if trained:
            finite = torch.stack([torch.isfinite(local(p.detach())).all() for _, p in trained]).tolist()
            names = [name for (name, _), good in zip(trained, finite, strict=True) if not good]
            if names:
                raise FloatingPointError(self._words(f"parameters are nan or infinite at the end of training ({', '.join(names[:5])})"))

    def _words(self, what: str) -> str:
        since = self.position.step if self.since is None else self.since
        return (
            f"{what} (seen first at step {since}, now at step {self.position.step}): lower the learning rate, "
            "clip gradients with gradient_clip_val, or find its origin with detect_anomaly=True; nonfinite_loss='warn' goes on all the same"
        )
