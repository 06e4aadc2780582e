"""What a trainer costs per step on a GPU: microseconds over the raw CUDA loop, and what bringing batches there ahead saves.

Every contender runs back to back with the raw loop that does the same work, in one process. A run is cut into windows of 50
steps, at whose ends the device is waited for; its figure is the median of their wall-clock time. The overhead is the median over
the pairs, with their range. Without a CUDA device nothing is measured.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --repeats 9 --steps 4000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchplug
from torchplug import Trainer

WINDOW = 50
DIFFERENT = 8  # batches that are given again and again


@dataclass(frozen=True)
class Work:
    """A step: an MLP from ``width`` over ``hidden`` features to 10 classes, on batches of ``samples``."""

    name: str
    samples: int
    width: int
    hidden: int

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(self.width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 10))

    @property
    def megabytes(self) -> float:
        return self.samples * (self.width * 4 + 8) / 1e6


WORKS = [
    Work("small steps", 32, 32, 64),
    Work("batches that take a while to copy", 4096, 4096, 4096),
]


class Batches:
    """Batches in pinned memory, the same in every run; the clock is read once a window."""

    def __init__(self, work: Work, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.data = [
            (
                torch.randn(work.samples, work.width, generator=generator).pin_memory(),
                torch.randint(0, 10, (work.samples,), generator=generator).pin_memory(),
            )
            for _ in range(DIFFERENT)
        ]
        self.steps = steps
        self.stamps: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.stamps = []
        for step in range(self.steps):
            if step % WINDOW == 0:
                self.stamp()
            yield self.data[step % DIFFERENT]
        self.stamp()

    def stamp(self) -> None:
        torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())

    def microseconds(self) -> float:
        """The median of the windows but the first, per step."""
        windows = [end - start for start, end in itertools.pairwise(self.stamps)]
        return statistics.median(windows[1:]) / WINDOW * 1e6


# ---------------------------------------------------------------------- contenders

Contender = Callable[[Work, Batches], None]


def raw(work: Work, batches: Batches) -> None:
    """The loop by hand: batches are copied, without waiting, in the stream of the steps."""
    net = work.module().cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    for x, y in batches:
        x, y = x.to("cuda", non_blocking=True), y.to("cuda", non_blocking=True)
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def raw_prefetching(work: Work, batches: Batches) -> None:
    """The loop by hand with a stream for copies."""
    net = work.module().cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    copies, steps = torch.cuda.Stream(), torch.cuda.current_stream()
    for x, y in batches:
        with torch.cuda.stream(copies):
            x, y = x.to("cuda", non_blocking=True), y.to("cuda", non_blocking=True)
        steps.wait_stream(copies)
        x.record_stream(steps)
        y.record_stream(steps)
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Net(torchplug.Module):
    """The same as a module of torchplug."""

    def __init__(self, work: Work, logs: bool) -> None:
        super().__init__()
        self.net, self.logs = work.module(), logs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if self.logs:
            self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=1e-4)


def with_torchplug(prefetch: bool, logs: bool = False, *plugins: Any) -> Contender:
    def run(work: Work, batches: Batches) -> None:
        with tempfile.TemporaryDirectory() as folder:
            named = [{"gpu": {"prefetch": prefetch}}, *plugins]
            trainer = Trainer(max_epochs=1, plugins=named, root_dir=folder, accelerator="gpu", log_every_n_steps=WINDOW)
            trainer.fit(Net(work, logs), batches)

    return run


# ---------------------------------------------------------------------- measuring


def measure(contender: Contender, work: Work, batches: Batches) -> float:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        contender(work, batches)
    return batches.microseconds()


def compare(name: str, contender: Contender, work: Work, repeats: int, steps: int) -> dict[str, Any]:
    """Pairs of the raw loop and ``contender``, back to back."""
    batches = Batches(work, steps)
    short = Batches(work, 2 * WINDOW)
    for each in (raw, contender):  # first-time work falls out
        measure(each, work, short)
    pairs = [(measure(raw, work, batches), measure(contender, work, batches)) for _ in range(repeats)]
    over = [there - here for here, there in pairs]
    row = {
        "work": work.name,
        "name": name,
        "base": statistics.median(here for here, _ in pairs),
        "step": statistics.median(there for _, there in pairs),
        "over": statistics.median(over),
        "low": min(over),
        "high": max(over),
        "ratio": statistics.median(there / here for here, there in pairs),
    }
    spread = f"{row['low']:+.1f} to {row['high']:+.1f}"
    print(f"| {name} | {row['base']:.1f} | {row['step']:.1f} | {row['over']:+.1f} | {spread} | {row['ratio']:.2f} |", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5, help="pairs for each row")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if options.repeats < 1 or options.steps < 2 * WINDOW:
        parser.error(f"at least 1 pair and {2 * WINDOW} steps are needed")
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing is measured")
        return
    logging.getLogger("torchplug").addHandler(logging.NullHandler())
    logging.getLogger("torchplug").setLevel(logging.CRITICAL)
    contenders: list[tuple[str, Contender]] = [
        ("loop by hand, a stream for copies", raw_prefetching),
        ("torchplug, prefetch=False", with_torchplug(False)),
        ("torchplug, prefetch=True", with_torchplug(True)),
        ("torchplug, prefetch=True, one log on step and epoch", with_torchplug(True, True)),
        ("torchplug, prefetch=True, standard plugins, one log", with_torchplug(True, True, "standard")),
    ]
    print(f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"microseconds per step, median of windows of {WINDOW} steps, of {options.repeats} pairs of {options.steps} steps each")
    rows = []
    for work in WORKS:
        print(f"\n{work.name}: batches of {work.megabytes:.2f} MB, MLP {work.width}-{work.hidden}-10\n")
        print("| | loop by hand | step | over it | range | ratio |\n|---|---|---|---|---|---|")
        rows += [compare(name, contender, work, options.repeats, options.steps) for name, contender in contenders]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
