"""What all ranks of a run do at the same step: they tell each other at logging steps and at the edges of epochs and evaluations."""

from __future__ import annotations

import signal
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["Agreement"]


class Agreement:
    """One rank's part in it. Between two exchanges a request to stop or a signal is known to the rank alone to which it came.

    An exchange is two reductions of a few numbers on the CPU; more is sent only where there is something to say. Ranks that come
    to it with different metrics are an error on all of them.

    Attributes:
        seconds: time since the run started, as the slowest clock had it at the last exchange.
        signal: the signal that came to this rank, such as "SIGTERM".
        uneven: whether ranks may have different numbers of training batches, so that each one has to be agreed on.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.seconds, self.signal, self.uneven = run, run.clock, "", False
        self._wish: tuple[str, str] | None = None
        self._samples: int | None = None  # of all ranks, up to the last exchange; None before training

    def begin(self) -> None:
        """Training begins, or goes on where an earlier run was: position and clock are those of all ranks from here on."""
        self._samples = self.run.position.samples
        self.reach(self.run)

    def wish(self, reason: str, plugin: str) -> None:
        """This rank wants training to end."""
        self._wish = self._wish or (reason, plugin)

    def reach(self, run: Run) -> None:
        """An exchange without values."""
        self.values((), (), ())

    def values(self, names: Sequence[str], values: Sequence[float], weights: Sequence[float]) -> list[float]:
        """An exchange; returns the means of the values over ranks, weighted by ``weights``.

        Raises:
            RuntimeError: the ranks have values under different names.
        """
        run, position = self.run, self.run.position
        number = int(getattr(signal, self.signal)) if self.signal else 0
        order = sorted(range(len(names)), key=names.__getitem__)  # ranks may log in another order
        key = zlib.crc32("\n".join(names[i] for i in order).encode())
        own = torch.tensor([run.clock, self._wish is not None, number, key, -key], dtype=torch.float64)
        seconds, wished, number, highest, lowest = run.hooks.reduce(run, own, "max").tolist()
        if highest != -lowest:
            raise RuntimeError(different(run.hooks.gather(run, set(names))))
        products = [value * weight if weight else 0.0 for value, weight in zip(values, weights, strict=True)]  # NaN of a stand-in is none
        own = torch.tensor(
            [position.samples - (self._samples or 0), *(products[i] for i in order), *(weights[i] for i in order)], dtype=torch.float64
        )
        samples, *sums = run.hooks.reduce(run, own, "sum").tolist()
        self.seconds = seconds
        self._samples = position.samples = (self._samples or 0) + int(samples)
        if wished:
            self._stop(run)
        if number and not run.interrupted:
            run.interrupted, run.attention = signal.Signals(int(number)).name, True
        count, means = len(names), [float("nan")] * len(names)
        for i, total, weight in zip(order, sums[:count], sums[count:], strict=True):
            if weight:
                means[i] = total / weight
        return means

    def _stop(self, run: Run) -> None:
        """Somebody wants to end: the lowest rank's reason is everybody's."""
        reason, plugin = next(wish for wish in run.hooks.gather(run, self._wish) if wish is not None)
        self._wish = None
        if not run.stop_reason:
            run.stop(reason, plugin)

    def lengths(self, run: Run) -> None:
        """Compares how many training batches the ranks have."""
        counts = self.gather(run.num_batches)
        self.uneven |= None in counts or len(set(counts)) > 1
        if None not in counts and len(set(counts)) > 1:
            run.num_batches = min(counts)
            run.say_once(f"ranks have {', '.join(map(str, counts))} training batches: an epoch ends after {run.num_batches}")

    def until_one_ends(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Batches as long as every rank has one, which takes a reduction for each. What others have left is said, and not trained on."""
        run, end = self.run, object()
        while True:
            batch = next(batches, end)
            more = torch.tensor([batch is not end], dtype=torch.float64)
            if not run.hooks.reduce(run, more, "min").item():
                left = [rank for rank, has in enumerate(self.gather(batch is not end)) if has]
                if left:
                    who = ", ".join(map(str, left))
                    run.say_once(f"ranks {who} had more training batches than the others: the epoch ends without them")
                return
            yield batch
            batch = None

    def gather(self, value: Any) -> list[Any]:
        """``value`` of each rank; in training the position has the samples of all of them then."""
        position = self.run.position
        new = position.samples - self._samples if self._samples is not None else 0
        gathered = self.run.hooks.gather(self.run, (value, new))
        if self._samples is not None:
            self._samples = position.samples = self._samples + sum(samples for _, samples in gathered)
        return [own for own, _ in gathered]


def different(names: Sequence[set[str]]) -> str:
    """What is said where ranks have metrics under different names."""
    common = set.intersection(*names)
    lines = [f"rank {rank} logged {', '.join(map(repr, sorted(own - common))) or 'nothing else'}" for rank, own in enumerate(names)]
    return f"ranks logged different metrics: {'; '.join(lines)}; log the same names on all ranks, or with rank_zero_only=True"
