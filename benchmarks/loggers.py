"""What a metric record costs the thread that trains, for each logger, beside the vendors' own blocking calls in the same run.

Each row is a run whose plugin hands records over, one after the other, from a hook: 3,000 records in windows of 50, the 10th
percentile of the windows' time, the median over the repeats with the range. "Handed over" is what the training thread itself
spends (thread CPU time); the wall time of the same calls holds what it waits for others, the interpreter's lock for one.
"Alone" is a trainer without loggers, whose call of the hook is taken off. The vendors' calls are made in the same process
with as many metrics, MLflow's on SQLite with fewer repetitions, because each takes milliseconds.

    python benchmarks/loggers.py
    python benchmarks/loggers.py --repeats 7 --records 1000000     # whether the last ones cost what the first ones do
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchplug import Module, Run, Trainer, hookimpl

WINDOW, WINDOWS = 50, 60
SETS: dict[str, list[Any]] = {
    "alone": [],
    "journal": ["journal"],
    "tensorboard": ["tensorboard"],
    "wandb, offline": [{"wandb": {"mode": "offline"}}],
    "mlflow, SQLite": ["mlflow"],
    "all of them": ["tensorboard", {"wandb": {"mode": "offline"}}, "mlflow"],
}


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any) -> Any:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def windows(call: Callable[[int], None], clock: Callable[[], float], count: int, size: int) -> list[float]:
    """Microseconds per call, window by window."""
    found, step = [], 0
    for _ in range(count):
        begin = clock()
        for _ in range(size):
            call(step)
            step += 1
        found.append((clock() - begin) / size * 1e6)
        time.sleep(0.002)  # other threads have their turn between windows
    return found


def low(values: list[float]) -> float:
    return sorted(values)[len(values) // 10]


class Hand:
    """Hands records over, as the loop does, and measures that."""

    def __init__(self, width: int) -> None:
        self.metrics = {f"metric_{i}": 0.1234567 * (i + 1) for i in range(width)}
        self.cpu = self.wall = 0.0

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        def call(step: int) -> None:
            run.hooks.log_metrics(run, self.metrics, "train", step, 0, step, 0.5)

        self.cpu = low(windows(call, time.thread_time, WINDOWS, WINDOW))
        self.wall = low(windows(call, time.perf_counter, WINDOWS, WINDOW))


def ours(plugins: list[Any], width: int, root: Path) -> tuple[float, float]:
    hand = Hand(width)
    Trainer(max_epochs=1, plugins=[*plugins, hand], root_dir=root, accelerator="cpu").fit(Net(), [torch.ones(1, 1)])
    return hand.cpu, hand.wall


def vendors(width: int, root: Path) -> dict[str, Callable[[], float]]:
    """The blocking call of each vendor for a record, with its microseconds of wall time."""
    metrics = {f"metric_{i}": 0.1234567 * (i + 1) for i in range(width)}

    def tensorboard() -> float:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(root / "vendor"))  # type: ignore[no-untyped-call]

        def call(step: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

        took = low(windows(call, time.perf_counter, WINDOWS, WINDOW))
        writer.close()  # type: ignore[no-untyped-call]
        return took

    def wandb() -> float:
        import wandb

        run = wandb.init(mode="offline", dir=str(root), reinit="create_new", settings=wandb.Settings(console="off", silent=True))
        took = low(windows(lambda step: run.log(metrics, step=step), time.perf_counter, WINDOWS, WINDOW))
        run.finish()
        return took

    def mlflow() -> float:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        client = MlflowClient(f"sqlite:///{root}/vendor.db")
        run = client.create_run(client.create_experiment("vendor", artifact_location=str(root))).info.run_id

        def call(step: int) -> None:
            client.log_batch(run, [Metric(name, value, step, step) for name, value in metrics.items()])

        return low(windows(call, time.perf_counter, 10, 5))

    return {"tensorboard": tensorboard, "wandb, offline": wandb, "mlflow, SQLite": mlflow}


def table(width: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    print(f"\n| {width} metric{'s' * (width > 1)} per record | handed over, us | range | beyond alone | wall, us | the vendor's call, us |")
    print("|---|---|---|---|---|---|")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETS}
    blocking: dict[str, list[float]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for name, plugins in SETS.items():
                found[name].append(ours(plugins, width, Path(folder)))
            for name, call in vendors(width, Path(folder)).items():
                blocking.setdefault(name, []).append(call())
    alone = statistics.median(cpu for cpu, _ in found["alone"])
    for name, pairs in found.items():
        cpu = [cpu for cpu, _ in pairs]
        wall = statistics.median(wall for _, wall in pairs)
        vendor = f"{statistics.median(blocking[name]):.0f}" if name in blocking else ""
        row = {"name": name, "metrics": width, "cpu": statistics.median(cpu), "wall": wall, "vendor": vendor}
        rows.append(row)
        beyond = row["cpu"] - alone
        print(f"| {name} | {row['cpu']:.1f} | {min(cpu):.1f} to {max(cpu):.1f} | {beyond:.1f} | {wall:.1f} | {vendor} |", flush=True)
    return rows


def resident() -> float:
    """Megabytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


class Many:
    """Hands over very many records while the backend hangs, and looks at time and memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        metrics = {"loss": 0.5}

        def call(step: int) -> None:
            run.hooks.log_metrics(run, metrics, "train", step, 0, step, 0.5)

        part = self.count // 10
        print(f"\n| records, TensorBoard, {self.count:,} in all | us each | MB |\n|---|---|---|")
        for number in range(10):
            took = windows(call, time.thread_time, part // WINDOW, WINDOW)
            print(f"| {number * part:,} to {(number + 1) * part:,} | {low(took):.1f} | {resident():.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5, help="runs for each row")
    parser.add_argument("--records", type=int, default=0, help="also hand over so many records in one run")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for name in [name for name in SETS if not all(_there(plugin) for plugin in SETS[name])]:
        del SETS[name]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "tensorboard", "wandb", "mlflow", "torchplug")]
    print(f"Python {platform.python_version()}, {', '.join(versions)}, {platform.machine()}, {os.cpu_count()} processors")
    rows = [row for width in (1, 10) for row in table(width, options.repeats)]
    if options.records:
        with tempfile.TemporaryDirectory() as folder:
            many = Many(options.records)
            Trainer(max_epochs=1, plugins=["tensorboard", many], root_dir=folder, accelerator="cpu").fit(Net(), [torch.ones(1, 1)])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def _there(plugin: Any) -> bool:
    name = plugin if isinstance(plugin, str) else next(iter(plugin))
    return importlib.util.find_spec(f"torchplug_{name}") is not None


if __name__ == "__main__":
    main()
