"""What a trainer costs per step on a GPU: microseconds over the raw CUDA loop, and what bringing batches there ahead saves.

Every contender runs back to back with the raw loop that does the same work, in one process. A run is cut into windows of 50
steps, at whose ends the device is waited for; its figure is the median of their wall-clock time. The overhead is the median over
the pairs, with their range. Without a CUDA device nothing is measured.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --repeats 9 --steps 4000
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measuring import WINDOW, Batch, Row, Table, Tables, beside, program, unseen
from measuring import Batches as Timed
from torch import Tensor, nn

import torchplug
from torchplug import Trainer

DIFFERENT = 8  # batches that are given again and again
COLUMNS = {
    "": "{name}",
    "work": "{work_name}",
    "loop by hand": "{base:.1f}",
    "step": "{work:.1f}",
    "over it": "{over:+.1f}",
    "range": "{over_low:+.1f} to {over_high:+.1f}",
    "ratio": "{ratio:.2f}",
}


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


class Batches(Timed):
    """Batches in pinned memory, the same in every run; the clock is read once a window."""

    def __init__(self, work: Work, steps: int) -> None:
        self.work = work
        super().__init__(steps, work.width, (time.perf_counter,))

    def make(self, width: int) -> list[Batch]:
        generator, samples = torch.Generator().manual_seed(0), self.work.samples
        return [
            (
                torch.randn(samples, width, generator=generator).pin_memory(),
                torch.randint(0, 10, (samples,), generator=generator).pin_memory(),
            )
            for _ in range(DIFFERENT)
        ]

    def stamp(self) -> None:
        torch.cuda.synchronize()
        super().stamp()

    def microseconds(self, clock: int = 0) -> float:
        """The median of the windows but the first, per step."""
        return statistics.median(self.windows(clock)[1:])


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
    with unseen():
        contender(work, batches)
    return batches.microseconds()


def compare(name: str, contender: Contender, work: Work, repeats: int, steps: int) -> Row:
    """Pairs of the raw loop and ``contender``, back to back."""
    batches = Batches(work, steps)
    short = Batches(work, 2 * WINDOW)
    for each in (raw, contender):  # first-time work falls out
        measure(each, work, short)
    row = beside(name, lambda: measure(raw, work, batches), lambda: measure(contender, work, batches), repeats)
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    return {**row, "work_name": f"{work.name}, {work.megabytes:.2f} MB", **versions}


def tables(repeats: int = 5, steps: int = 1000) -> Tables:
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device: nothing is measured")
    if steps < 2 * WINDOW:
        sys.exit(f"--steps {steps}: it must be at least {2 * WINDOW}")
    contenders: dict[str, Contender] = {
        "loop by hand, a stream for copies": raw_prefetching,
        "torchplug, prefetch=False": with_torchplug(False),
        "torchplug, prefetch=True": with_torchplug(True),
        "torchplug, prefetch=True, one log": with_torchplug(True, True),
        "torchplug, prefetch=True, standard plugins, one log": with_torchplug(True, True, "standard"),
    }
    rows = [compare(name, contender, work, repeats, steps) for work in WORKS for name, contender in contenders.items()]
    return {"steps": Table(COLUMNS, rows)}


if __name__ == "__main__":
    program(tables)
