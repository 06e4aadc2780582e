"""What a running average of the weights costs: the plugins beside torch's AveragedModel called by hand, and beside memory.

First the MLP of `contenders.py`: a raw loop with an `AveragedModel` update after each step, back to back with torchplug and a plugin,
in windows of CPU time as in `overhead.py`. The costs of the averages alone are the differences to the same two loops without one.
Then a module of 50 million parameters: one update, back to back with one update by hand and with one read and write of the
parameters, `target.copy_(parameters)`, in wall time.

    python benchmarks/averaging.py
    python benchmarks/averaging.py --repeats 15 --threads 4
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from contenders import MLP, Net, Work, bare, measure, with_torchplug
from measuring import WINDOW, Batch, Batches, Row, Table, Tables, program, quiet, spread, unseen
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchplug import Module
from torchplug_ema import Ema

DECAY = 0.999
PLUGINS: dict[str, Any] = {
    "ema": {"ema": {"decay": DECAY}},
    "ema, every 10 steps": {"ema": {"decay": DECAY, "every_n_steps": 10}},
    "swa, every step": {"swa": {"start": 0, "every_n_steps": 1}},
    "swa, every epoch": {"swa": {"start": 0}},
}
SMALL = {
    "": "{name}",
    "AveragedModel by hand": "{theirs:.1f}",
    "torchplug": "{ours:.1f}",
    "ratio": "{ratio:.2f}",
    "range": "{ratio_low:.2f} to {ratio_high:.2f}",
    "average by hand": "{alone_theirs:.1f}",
    "of torchplug": "{alone_ours:.1f}",
}
LARGE = {
    "ema": "{ours:.1f}",
    "AveragedModel by hand": "{theirs:.1f}",
    "one read and write": "{copy:.1f}",
    "ema over it": "{ratio:.2f}",
    "10th to 90th percentile": "{ratio_10:.2f} to {ratio_90:.2f}",
}

# ---------------------------------------------------------------------- small steps


def by_hand(averaged: bool) -> Work:
    """A raw loop, with an average by hand or without."""

    def run(batches: Batches) -> nn.Module:
        net = MLP()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        for x, y in batches:
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if averaged:
                average.update_parameters(net)
        return net

    return run


def small(name: str, repeats: int, steps: int) -> Row:
    """The MLP: whole steps, and what the average adds to them."""
    print(f"  {name}", file=sys.stderr, flush=True)
    works = (by_hand(False), by_hand(True), bare, with_torchplug(Net, PLUGINS[name]))
    measure(works[-1], WINDOW * 4)  # first-time work falls out
    rounds = [tuple(measure(each, steps) for each in works) for _ in range(repeats)]
    theirs, ours = (statistics.median(each[i] for each in rounds) for i in (1, 3))
    alone = {f"alone_{who}": statistics.median(each[i] - each[i - 1] for each in rounds) for who, i in (("theirs", 1), ("ours", 3))}
    return {"name": name, "theirs": theirs, "ours": ours, **alone, **spread("ratio", [each[3] / each[1] for each in rounds])}


# ---------------------------------------------------------------------- many parameters


class Wide(Module):
    """50 million parameters in the shapes of 12 transformer layers; no work of its own."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(2048, 512), (512, 2048), (512, 1536), (512, 512), (2048,), (512,), (512,), (512,)]
        self.layers = nn.ParameterList(nn.Parameter(torch.full(size, 0.5)) for _ in range(16) for size in sizes)

    @property
    def net(self) -> Wide:
        """What a contender returns."""
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.layers[-1].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Clocked(Ema):
    """An average that is timed from outside: by itself, by hand, and against memory, one after the other, in each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.times: list[tuple[float, ...]] = []
        self.contenders: list[Callable[[], Any]] = []

    def stepped(self, run: Any) -> None:
        if not self.contenders:
            hand, parameters = AveragedModel(run.module, multi_avg_fn=get_ema_multi_avg_fn(DECAY)), list(run.module.parameters())
            target = [parameter.detach().clone() for parameter in parameters]

            def copied() -> None:
                with torch.no_grad():
                    for one, other in zip(target, parameters, strict=True):
                        one.copy_(other)

            self.contenders = [lambda: super(Clocked, self).stepped(run), lambda: hand.update_parameters(run.module), copied]
        row = []
        for contender in self.contenders:
            start = time.perf_counter()
            contender()
            row.append(time.perf_counter() - start)
        self.times.append(tuple(row))


def large(updates: int, threads: int) -> Row:
    """50 million parameters: milliseconds of one update."""
    print("  50 million parameters", file=sys.stderr, flush=True)
    module, plugin = Wide(), Clocked(decay=DECAY)
    torch.set_num_threads(threads)
    with unseen():
        with_torchplug(lambda: module, plugin)(Batches(updates))
    quiet()
    rows = plugin.times[3:]  # the first update is a copy
    ours, theirs, copy = (statistics.median(row[i] for row in rows) * 1e3 for i in range(3))
    ratios = sorted(row[0] / row[2] for row in rows)
    parameters = list(module.parameters())
    return {
        "name": "one update", "ours": ours, "theirs": theirs, "copy": copy, "ratio": statistics.median(ratios),
        "ratio_10": ratios[len(ratios) // 10], "ratio_90": ratios[-1 - len(ratios) // 10], "rounds": len(rows), "threads": threads,
        "tensors": len(parameters), "millions": sum(parameter.numel() for parameter in parameters) / 1e6,
    }  # fmt: skip


def tables(repeats: int = 7, steps: int = 3000, updates: int = 60, threads: int = 1) -> Tables:
    rows = [small(name, repeats, steps) for name in PLUGINS]
    return {"small": Table(SMALL, rows), "large": Table(LARGE, [large(updates, threads)])}


if __name__ == "__main__":
    program(tables)
