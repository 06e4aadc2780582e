"""What two ranks cost on this machine's CPU: torchplug's ddp beside a loop by hand around torch's DistributedDataParallel.

Both run in the same two processes, in turn, with the same model, data in memory and one thread each. Figures are those of rank 0:
microseconds per step, by the clock and of CPU, as the 10th percentile of windows of 50 steps; the median over the repeats.

    python benchmarks/ranks.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from torchplug import Module, Trainer

WINDOW = 50


class Batches:
    """Batches from memory; the clocks are read once a window."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.data = [(torch.randn(32, 64, generator=generator), torch.randint(0, 10, (32,), generator=generator)) for _ in range(WINDOW)]
        self.steps = steps
        self.stamps: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self.steps):
            if step % WINDOW == 0:
                self.stamps.append((time.perf_counter(), time.process_time()))
            yield self.data[step % WINDOW]
        self.stamps.append((time.perf_counter(), time.process_time()))

    def microseconds(self) -> tuple[float, float]:
        """By the clock, and of CPU."""
        both = []
        for clock in range(2):
            windows = sorted(end[clock] - start[clock] for start, end in itertools.pairwise(self.stamps))
            both.append(windows[len(windows) // 10] / WINDOW * 1e6)
        return both[0], both[1]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def by_hand(batches: Batches, ranks: int) -> None:
    net = model()
    trained = nn.parallel.DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for step, (x, y) in enumerate(batches, 1):
        loss = nn.functional.cross_entropy(trained(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % WINDOW == 0:  # the mean over ranks, for a log
            mean = loss.detach().clone()
            if ranks > 1:
                dist.all_reduce(mean)
            mean.item()


def with_trainer(batches: Batches, ranks: int, folder: str) -> None:
    strategy = {"strategy": {"ddp": {"deal": False}}, "devices": ranks} if ranks > 1 else {}
    trainer = Trainer(max_epochs=1, plugins=[], root_dir=folder, accelerator="cpu", log_every_n_steps=WINDOW, **strategy)
    trainer.fit(Net(), batches)


def work(rank: int, ranks: int, port: int, steps: int, repeats: int, folder: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    logging.getLogger("torchplug").addHandler(logging.NullHandler())
    if ranks > 1:
        values = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in values.items()})
    figures: dict[str, list[tuple[float, float]]] = {"by hand": [], "torchplug": []}
    with_trainer(Batches(WINDOW), ranks, folder)  # makes the group, and warms up
    for _ in range(repeats):
        for name, run in (("by hand", by_hand), ("torchplug", with_trainer)):
            batches = Batches(steps)
            run(batches, ranks, *([folder] if name == "torchplug" else []))
            figures[name].append(batches.microseconds())
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, gloo, batches of 32 per rank")
    print(f"{options.repeats} repeats of {options.steps} steps\n")
    print("| ranks | loop by hand, us by the clock | torchplug | ratio (range) | CPU by hand | CPU torchplug |")
    print("|---|---|---|---|---|---|")
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            arguments = (ranks, port, options.steps, options.repeats, folder)
            mp.start_processes(work, args=arguments, nprocs=ranks, start_method="spawn")
            figures = json.loads(Path(folder, f"{ranks}.json").read_text())
        hand, ours = figures["by hand"], figures["torchplug"]
        ratios = sorted(one[0] / other[0] for one, other in zip(ours, hand, strict=True))
        middle = [statistics.median(each[clock] for each in side) for side in (hand, ours) for clock in (0, 1)]
        print(
            f"| {ranks} | {middle[0]:.0f} | {middle[2]:.0f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
            f"| {middle[1]:.0f} | {middle[3]:.0f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
