"""What a trainer costs per step: microseconds over the raw loop a good engineer writes, measured side by side.

Every contender runs back to back with the raw loop that does the same work, in one process and one thread. A run is cut
into windows of 50 steps; its figure is the 10th percentile of their CPU time, so that what other processes do to the
machine falls out. The overhead is the median over the pairs, with their range.

    python benchmarks/overhead.py                 # everything that is installed
    python benchmarks/overhead.py --only torchplug --repeats 8
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchplug
from torchplug import Trainer, hookimpl

WINDOW = 50
Batch = tuple[Tensor, Tensor]


class Batches:
    """Batches from memory, the same in every run; the clock is read once a window."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.data = [(torch.randn(32, 32, generator=generator), torch.randint(0, 10, (32,), generator=generator)) for _ in range(WINDOW)]
        self.steps = steps
        self.stamps: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            if step % WINDOW == 0:
                self.stamps.append(time.process_time())
            yield self.data[step % WINDOW]
        self.stamps.append(time.process_time())

    def microseconds(self) -> float:
        """The 10th percentile of the windows, per step."""
        windows = sorted(end - start for start, end in itertools.pairwise(self.stamps))
        return windows[len(windows) // 10] / WINDOW * 1e6


class MLP(nn.Module):
    """32-64-10, the same for everybody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l1 = nn.Linear(32, 64)
        self.l2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(nn.functional.relu(self.l1(x)))


# ---------------------------------------------------------------------- the raw loops


def raw(batches: Batches) -> None:
    """Nothing but training."""
    net = MLP()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for x, y in batches:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def raw_clearing(batches: Batches) -> None:
    """Nothing but training, and gradients cleared as core clears them, without ``optimizer.zero_grad()``."""
    net = MLP()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for x, y in batches:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def raw_nothing(batches: Batches) -> None:
    """A step whose own work is nothing: a call that returns a tensor."""
    loss = torch.tensor(1.0)

    def step(batch: Batch, batch_idx: int) -> Tensor:
        return loss

    for i, batch in enumerate(batches):
        step(batch, i)


def raw_by_hand(batches: Batches, folder: Path) -> None:
    """What the standard plugins do, by hand: means, a bar, validation, early stopping, checkpoints, two kinds of log."""
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

    net = MLP()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    validation = Batches(WINDOW)
    writer, journal = SummaryWriter(str(folder)), open(folder / "log.jsonl", "w")  # noqa: SIM115
    best, total, seen, drawn = float("inf"), torch.zeros(()), 0, 0.0
    with Progress(console=quiet_console()) as bar, journal:
        task = bar.add_task("train", total=len(batches))
        for step, (x, y) in enumerate(batches, 1):
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() * len(x)
            seen += len(x)
            now = time.perf_counter()
            if now - drawn > 0.1:
                bar.update(task, completed=step, description=f"loss {float(loss):.3f}")
                drawn = now
            if step % WINDOW == 0:
                writer.add_scalar("train_loss_step", float(loss), step)
                journal.write(json.dumps({"step": step, "train_loss_step": float(loss)}) + "\n")
        net.eval()
        with torch.no_grad():
            val_loss = float(sum(nn.functional.cross_entropy(net(x), y) for x, y in validation)) / WINDOW
        best = min(best, val_loss)
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.pt")
        writer.add_scalar("val_loss", val_loss, step)
        writer.add_scalar("train_loss_epoch", float(total) / seen, step)
        writer.close()


def quiet_console() -> Any:
    from rich.console import Console

    return Console(file=io.StringIO(), force_terminal=True)


# ---------------------------------------------------------------------- torchplug


class Net(torchplug.Module):
    """The same network as a module of torchplug."""

    logs = False

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if self.logs:
            self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


class Validated(Net):
    """The same with a validation."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y))


class Nothing(Net):
    """A step without work; see `Answers`."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = torch.tensor(1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.logs:
            self.log("train_loss", self.loss, on_step=True, on_epoch=True, prog_bar=True)
        return self.loss


class Answers:
    """Answers the operations of a step with nothing, so that only the framework is left."""

    @hookimpl
    def backward(self) -> bool:
        return True

    @hookimpl
    def optimizer_step(self) -> bool:
        return True

    @hookimpl
    def zero_grad(self) -> bool:
        return True


class Listens:
    """Listens to two events of every batch."""

    @hookimpl
    def on_train_batch_start(self, run: Any, batch: Any, batch_idx: int) -> None:
        pass

    @hookimpl
    def on_train_batch_end(self, run: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


class Deaf:
    """Listens to nothing that happens per batch."""

    @hookimpl
    def on_fit_start(self, run: Any) -> None:
        pass


def with_torchplug(
    module: type[Net], *, logs: bool = False, plugins: tuple[Any, ...] = (), validation: bool = False
) -> Callable[[Batches], None]:
    def run(batches: Batches) -> None:
        net = module()
        net.logs = logs
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(max_epochs=1, plugins=list(plugins), root_dir=folder, num_sanity_val_steps=0)
            trainer.fit(net, batches, Batches(WINDOW) if validation else None)

    return run


def by_hand(batches: Batches) -> None:
    with tempfile.TemporaryDirectory() as folder:
        raw_by_hand(batches, Path(folder))


# ---------------------------------------------------------------------- others


def with_lightning(*, logs: bool = False, usual: bool = False) -> Callable[[Batches], None]:
    """Lightning for the same work: bare, with one log, with its usual callbacks and loggers."""
    import lightning

    class Lit(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            if logs or usual:
                self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=32)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=0.01)

    class LitValidated(Lit):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", nn.functional.cross_entropy(self.net(x), y), batch_size=32)

    def run(batches: Batches) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            validation = None
            if usual:
                from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
                from lightning.pytorch.loggers import TensorBoardLogger

                options = {
                    "logger": TensorBoardLogger(folder),
                    "callbacks": [ModelCheckpoint(folder, monitor="val_loss"), EarlyStopping("val_loss")],
                }
                validation = Batches(WINDOW)
            trainer = lightning.Trainer(
                max_epochs=1, accelerator="cpu", enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, **options
            )
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.fit(LitValidated() if usual else Lit(), batches, validation)

    return run


# ---------------------------------------------------------------------- measuring


def measure(work: Callable[[Batches], None], steps: int) -> float:
    batches = Batches(steps)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        work(batches)
    return batches.microseconds()


def compare(name: str, work: Callable[[Batches], None], base: Callable[[Batches], None], repeats: int, steps: int) -> dict[str, Any]:
    """Pairs of ``base`` and ``work``, back to back."""
    measure(work, WINDOW * 4)  # imports and first-time work fall out
    pairs = [(measure(base, steps), measure(work, steps)) for _ in range(repeats)]
    over = [there - here for here, there in pairs]
    row = {
        "name": name,
        "base": statistics.median(here for here, _ in pairs),
        "step": statistics.median(there for _, there in pairs),
        "over": statistics.median(over),
        "low": min(over),
        "high": max(over),
        "ratio": statistics.median(there / here for here, there in pairs),
    }
    spread = f"{row['low']:+.2f} to {row['high']:+.2f}"
    print(f"| {name} | {row['base']:.1f} | {row['step']:.1f} | {row['over']:+.2f} | {spread} | {row['ratio']:.2f} |", flush=True)
    return row


def import_cost(repeats: int) -> str:
    """Milliseconds of CPU time of ``from torchplug import *``, which is all that a run needs, beyond ``import torch``.

    The first of several processes, which writes byte code, is not counted.
    """
    code = "import time, torch; start = time.process_time(); from torchplug import *; print((time.process_time() - start) * 1e3)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for _ in range(repeats + 1)
    ]
    costs = [float(run.stdout) for run in runs[1:]]
    return f"from torchplug import *: {statistics.median(costs):.0f} ms of CPU beyond import torch ({min(costs):.0f} to {max(costs):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7, help="pairs for each row")
    parser.add_argument("--steps", type=int, default=3000, help="steps of each run")
    parser.add_argument("--only", default="", help="rows whose name begins with this")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torchplug").addHandler(logging.NullHandler())
    logging.getLogger("torchplug").setLevel(logging.CRITICAL)

    standard = ("standard", {"early_stopping": {"monitor": "val_loss"}})
    nothing = (Answers(),)
    bare = with_torchplug(Nothing, plugins=nothing)

    def listening(count: int) -> Callable[[Batches], None]:
        return with_torchplug(Nothing, plugins=(*nothing, *({f"listens_{i}": Listens()} for i in range(count))))

    deaf = with_torchplug(Nothing, plugins=(*nothing, *({f"deaf_{i}": Deaf()} for i in range(50))))
    rows: list[tuple[str, Callable[[Batches], None], Callable[[Batches], None]]] = [
        ("torchplug, bare", with_torchplug(Net), raw),
        ("torchplug, one log on step and epoch", with_torchplug(Net, logs=True), raw),
        ("torchplug, bare, over a loop that clears gradients as core does", with_torchplug(Net), raw_clearing),
        ("torchplug, one log, over a loop that clears gradients as core does", with_torchplug(Net, logs=True), raw_clearing),
        (
            "torchplug, standard plugins, early stopping, validation, bar",
            with_torchplug(Validated, logs=True, plugins=standard, validation=True),
            by_hand,
        ),
        ("no work of its own: torchplug, bare", bare, raw_nothing),
        ("no work of its own: torchplug, one log", with_torchplug(Nothing, logs=True, plugins=nothing), raw_nothing),
        ("no work of its own: 5 plugins on two batch events", listening(5), bare),
        ("no work of its own: 20 plugins on two batch events", listening(20), bare),
        ("no work of its own: 50 plugins on two batch events", listening(50), bare),
        ("no work of its own: 50 plugins that listen to no batch event", deaf, bare),
    ]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchplug")]
    try:
        versions.append(f"lightning {importlib.metadata.version('lightning')}")
        rows += [
            ("lightning, bare", with_lightning(), raw),
            ("lightning, one log on step and epoch", with_lightning(logs=True), raw),
            ("lightning, usual callbacks and TensorBoard, validation, bar", with_lightning(usual=True), by_hand),
        ]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        pass
    print(f"Python {platform.python_version()}, {', '.join(versions)}, {platform.machine()}, 1 thread")
    print(f"microseconds of CPU per step, 10th percentile of windows of {WINDOW} steps")
    print(f"median of {options.repeats} pairs of {options.steps} steps each\n")
    print("| | loop by hand | step | over it | range | ratio |\n|---|---|---|---|---|---|")
    figures = [compare(name, work, base, options.repeats, options.steps) for name, work, base in rows if name.startswith(options.only)]
    print("\n" + import_cost(options.repeats))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
