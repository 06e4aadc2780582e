"""What two ranks cost on this machine's CPU: torchplug's ddp beside a loop by hand around torch's DistributedDataParallel.

Both run in the same one or two processes, in turn, with the same model, data in memory and one thread each. Figures are those of
rank 0: microseconds per step, by the clock and of CPU, as the 10th percentile of windows of 50 steps; the median over the repeats.

    python benchmarks/ranks.py
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import WINDOW, Batches, Row, Table, Tables, program, quiet, spread
from torch import Tensor, nn

from torchplug import Module, Trainer

COLUMNS = {
    "ranks": "{name}",
    "loop by hand, by the clock": "{hand:.0f}",
    "torchplug": "{ours:.0f}",
    "ratio": "{ratio:.2f}",
    "range": "{ratio_low:.2f} to {ratio_high:.2f}",
    "CPU by hand": "{hand_cpu:.0f}",
    "CPU of torchplug": "{ours_cpu:.0f}",
}


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
    strategy: dict[str, Any] = {"strategy": {"ddp": {"deal": False}}, "devices": ranks} if ranks > 1 else {}
    trainer = Trainer(max_epochs=1, plugins=[], root_dir=folder, accelerator="cpu", log_every_n_steps=WINDOW, **strategy)
    trainer.fit(Net(), batches)


def timed(steps: int) -> Batches:
    return Batches(steps, 64, (time.perf_counter, time.process_time))


def work(rank: int, ranks: int, port: int, steps: int, repeats: int, folder: str) -> None:
    """One process."""
    quiet()
    if ranks > 1:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in values.items()})
    figures: dict[str, list[tuple[float, float]]] = {"hand": [], "ours": []}
    with_trainer(timed(WINDOW), ranks, folder)  # makes the group, and warms up
    for _ in range(repeats):
        for name in figures:
            batches = timed(steps)
            if name == "hand":
                by_hand(batches, ranks)
            else:
                with_trainer(batches, ranks, folder)
            figures[name].append((batches.microseconds(0), batches.microseconds(1)))
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps(figures))


def together(ranks: int, repeats: int, steps: int) -> Row:
    """So many processes."""
    print(f"  {ranks} ranks", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.start_processes(work, args=(ranks, port, steps, repeats, folder), nprocs=ranks, start_method="spawn")  # type: ignore
        figures = json.loads(Path(folder, "figures.json").read_text())
    row: Row = {"name": str(ranks)}
    for name, pairs in figures.items():
        row |= {name: statistics.median(each[0] for each in pairs), f"{name}_cpu": statistics.median(each[1] for each in pairs)}
    return row | spread("ratio", [ours[0] / hand[0] for ours, hand in zip(figures["ours"], figures["hand"], strict=True)])


def tables(repeats: int = 5, steps: int = 1500) -> Tables:
    parameters = sum(parameter.numel() for parameter in model().parameters())
    rows = [{**together(ranks, repeats, steps), "parameters": parameters} for ranks in (1, 2)]
    return {"steps": Table(COLUMNS, rows)}


if __name__ == "__main__":
    program(tables)
