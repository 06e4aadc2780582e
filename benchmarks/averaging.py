"""What a running average of the weights costs: the plugins beside torch's AveragedModel called by hand, and beside memory.

First the MLP of `overhead.py`: a raw loop with an `AveragedModel` update after each step, back to back with torchplug and a plugin,
in windows of CPU time as in `overhead.py`. The costs of the averages alone are the differences to the same two loops without one.
Then a module of 50 million parameters: one update, back to back with one update by hand and with one read and write of the
parameters, `target.copy_(parameters)`, in wall time.

    python benchmarks/averaging.py
    python benchmarks/averaging.py --repeats 15 --threads 4
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from overhead import MLP, WINDOW, Batch, Batches, Net, measure, with_torchplug
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchplug import Module
from torchplug_ema import Ema

DECAY = 0.999


# ---------------------------------------------------------------------- small steps


def by_hand(averaged: bool) -> Callable[[Batches], None]:
    """A raw loop, with an average by hand or without."""

    def run(batches: Batches) -> None:
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

    return run


def small(repeats: int, steps: int) -> None:
    """The MLP: whole steps, and what the average adds to them."""
    plugins: dict[str, Any] = {
        "ema": {"ema": {"decay": DECAY}},
        "ema, every 10 steps": {"ema": {"decay": DECAY, "every_n_steps": 10}},
        "swa, every step": {"swa": {"start": 0, "every_n_steps": 1}},
        "swa, every epoch": {"swa": {"start": 0}},
    }
    raw, hand, bare = by_hand(False), by_hand(True), with_torchplug(Net)
    print(f"microseconds of CPU per step of the MLP, 10th percentile of windows of {WINDOW} steps")
    print(f"median of {repeats} rounds of {steps} steps each\n")
    print("| | AveragedModel by hand | torchplug | ratio | range | average by hand | of torchplug |\n|---|---|---|---|---|---|---|")
    for name, plugin in plugins.items():
        work = with_torchplug(Net, plugins=(plugin,))
        measure(work, WINDOW * 4)  # first-time work falls out
        rounds = [tuple(measure(each, steps) for each in (raw, hand, bare, work)) for _ in range(repeats)]
        ratios = [ours / theirs for _, theirs, _, ours in rounds]
        theirs, ours = (statistics.median(each[i] for each in rounds) for i in (1, 3))
        alone = [statistics.median(each[i] - each[i - 1] for each in rounds) for i in (1, 3)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"| {name} | {theirs:.1f} | {ours:.1f} | {statistics.median(ratios):.2f} | {spread} | {alone[0]:.1f} | {alone[1]:.1f} |",
            flush=True,
        )


# ---------------------------------------------------------------------- many parameters


class Wide(Module):
    """50 million parameters in the shapes of 12 transformer layers; no work of its own."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(2048, 512), (512, 2048), (512, 1536), (512, 512), (2048,), (512,), (512,), (512,)]
        self.layers = nn.ParameterList(nn.Parameter(torch.full(size, 0.5)) for _ in range(16) for size in sizes)

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


def large(steps: int) -> None:
    """50 million parameters: one update."""
    module, plugin = Wide(), Clocked(decay=DECAY)
    with_torchplug(lambda: module, plugins=(plugin,))(Batches(steps))  # type: ignore[arg-type]
    rows = plugin.times[3:]  # the first update is a copy
    ours, theirs, copy = (statistics.median(row[i] for row in rows) * 1e3 for i in range(3))
    ratios = sorted(row[0] / row[2] for row in rows)
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    count = sum(parameter.numel() for parameter in module.parameters())
    of = f"of {count / 1e6:.1f} million parameters, median of {len(rows)} rounds, {torch.get_num_threads()} threads"
    print(f"\nmilliseconds for one update {of}\n")
    print("| ema | AveragedModel by hand | one read and write | ema over it | 10th to 90th percentile |\n|---|---|---|---|---|")
    print(f"| {ours:.1f} | {theirs:.1f} | {copy:.1f} | {statistics.median(ratios):.2f} | {low:.2f} to {high:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7, help="rounds for each row")
    parser.add_argument("--steps", type=int, default=3000, help="steps of each run of the MLP")
    parser.add_argument("--updates", type=int, default=60, help="updates of the large module")
    parser.add_argument("--threads", type=int, default=1, help="threads for the large module")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torchplug").addHandler(logging.NullHandler())
    logging.getLogger("torchplug").setLevel(logging.CRITICAL)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchplug", "torchplug-ema", "torchplug-swa"))
    print(f"Python {platform.python_version()}, {versions}, {platform.machine()}, 1 thread")
    small(options.repeats, options.steps)
    torch.set_num_threads(options.threads)
    large(options.updates)


if __name__ == "__main__":
    main()
