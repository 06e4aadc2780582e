"""What a metric record costs the thread that trains, for each logger, beside the vendors' own blocking calls in the same run.

Each row is a run whose plugin hands records over, one after the other, from a hook: 3,000 records in windows of 50, the 10th
percentile of the windows' time, the median over the repeats with the range. "Handed over" is what the training thread itself
spends (thread CPU time); the wall time of the same calls holds what it waits for others, the interpreter's lock for one.
"Alone" is a trainer without loggers, whose call of the hook is taken off. The vendors' calls are made in the same process
with as many metrics, MLflow's on SQLite with fewer repetitions, because each takes milliseconds.

    python benchmarks/loggers.py
    python benchmarks/loggers.py --repeats 7 --records 1000000     # whether so many cost what the first ones do
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import WINDOW, Clock, Row, Table, Tables, low, program, spread, taking_part
from memory import resident

from torchplug import Module, Run, Trainer, hookimpl

WINDOWS = 60
TRACKERS = {"tensorboard": "tensorboard", "wandb, offline": "wandb", "mlflow, SQLite": "mlflow"}
SETS: dict[str, list[Any]] = {
    "alone": [],
    "journal": ["journal"],
    "tensorboard": ["tensorboard"],
    "wandb, offline": [{"wandb": {"mode": "offline"}}],
    "mlflow, SQLite": ["mlflow"],
}
COLUMNS = {
    "{width} per record": "{name}",
    "handed over": "{cpu:.1f}",
    "range": "{cpu_low:.1f} to {cpu_high:.1f}",
    "beyond alone": "{beyond:.1f}",
    "by the clock": "{wall:.1f}",
    "the vendor's own call": "{vendor:.0f}",
}
MANY = {"records": "{name}", "each": "{each:.1f}", "MB": "{mb:.0f}"}


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any) -> Any:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def windows(call: Callable[[int], None], clock: Clock, count: int, size: int) -> list[float]:
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


def table(width: int, repeats: int, without: Sequence[str]) -> Table:
    """Records of so many metrics."""
    trackers = {name: SETS[name] for name, tracker in TRACKERS.items() if tracker not in without}
    sets = {
        "alone": SETS["alone"],
        "journal": SETS["journal"],
        **trackers,
        "all of them": [plugin for each in trackers.values() for plugin in each],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sets}
    blocking: dict[str, list[float]] = {name: [] for name in trackers}
    for number in range(repeats):
        print(f"  round {number + 1} of {repeats}, {width} metrics per record", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for name, plugins in sets.items():
                found[name].append(ours(plugins, width, Path(folder)))
            for name, call in vendors(width, Path(folder)).items():
                if name in trackers:
                    blocking[name].append(call())
    alone, rows = statistics.median(cpu for cpu, _ in found["alone"]), []
    for name, pairs in found.items():
        row: Row = {"name": name, **spread("cpu", [cpu for cpu, _ in pairs]), "wall": statistics.median(wall for _, wall in pairs)}
        row["vendor"] = statistics.median(blocking[name]) if name in blocking else None
        rows.append({**row, "beyond": row["cpu"] - alone})
    heads = {head.format(width=f"{width} metric{'s' * (width > 1)}"): cell for head, cell in COLUMNS.items()}
    return Table(heads, rows)


class Many:
    """Hands over very many records, and looks at time and memory."""

    def __init__(self, count: int) -> None:
        self.count, self.rows = count, [Row()]

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        metrics = {"loss": 0.5}

        def call(step: int) -> None:
            run.hooks.log_metrics(run, metrics, "train", step, 0, step, 0.5)

        part, self.rows = self.count // 10, []
        for number in range(10):
            took = windows(call, time.thread_time, max(1, part // WINDOW), WINDOW)
            self.rows.append({"name": f"{number * part:,} to {(number + 1) * part:,}", "each": low(took), "mb": resident() / 1e6})


def tables(repeats: int = 3, records: int = 200_000, without: Sequence[str] = ()) -> Tables:
    """Records of one and of ten metrics, and very many of one metric in a run with TensorBoard."""
    taking_part(list(TRACKERS.values()), without)
    logging.disable(logging.WARNING)
    found = {"one": table(1, repeats, without), "ten": table(10, repeats, without)}
    with tempfile.TemporaryDirectory() as folder:
        many = Many(records)
        Trainer(max_epochs=1, plugins=["tensorboard", many], root_dir=folder, accelerator="cpu").fit(Net(), [torch.ones(1, 1)])
    return {**found, "many": Table(MANY, many.rows)}


if __name__ == "__main__":
    program(tables)
