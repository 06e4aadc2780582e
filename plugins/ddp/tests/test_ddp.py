"""Two ranks train as one process does with batches of twice the size, evaluate each sample once, and say what is wrong on every rank.

One pair of processes goes through all the cases, as torchrun would have them; each case returns plain values from each rank.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchplug import Module, Trainer, hookimpl, seed_everything
from torchplug.testing import check_plugin

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def data(samples: int) -> TensorDataset:
    x = torch.randn(samples, 10, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True))


class Net(Module):
    """A regression that logs its loss in every way."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
        self.options = options

    def loss(self, batch: Any) -> Any:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", batch[0].max(), on_epoch=True, on_step=False, reduce_fx="max")
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: Any) -> Any:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Records:
    """What loggers get."""

    def __init__(self) -> None:
        self.all: list[tuple[str, int, dict[str, float]]] = []

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], stage: str, step: int) -> None:
        self.all.append((stage, step, metrics))


def trainer(world: int, *plugins: Any, ddp: dict[str, Any] | None = None, **options: Any) -> Trainer:
    strategy: dict[str, Any] = {"strategy": {"ddp": ddp or {}}} if world > 1 else {}
    defaults: dict[str, Any] = {"max_epochs": 3, "log_every_n_steps": 2, "seed": 1, "num_sanity_val_steps": 1}
    return Trainer(plugins=list(plugins), root_dir="runs", accelerator="cpu", **{**defaults, **strategy, **options})


def fit(
    world: int, module: Callable[[], Module] = Net, *plugins: Any, samples: int = 100, drop_last: bool = False, **options: Any
) -> dict[str, Any]:
    """Trains with 32 samples in a step."""
    seed_everything(3)
    net, records = module(), Records()
    loader = DataLoader(data(samples), 32 // world, shuffle=True, drop_last=drop_last)
    run = trainer(world, records, *plugins, **options)
    run.fit(net, loader, DataLoader(data(7), 2))
    assert run.run is not None
    where = run.run.position
    weights = torch.cat([each.detach().flatten() for each in net.parameters()])
    return {
        "weights": weights.tolist(), "metrics": dict(run.metrics), "records": records.all,
        "position": (where.epoch, where.step, where.micro_step, where.samples),
    }  # fmt: skip


# ---------------------------------------------------------------------- cases that equal one process


class Two(Net):
    """Two optimizers, one for each layer."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        return self.loss(batch) * (1 + optimizer_idx)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), 0.05), torch.optim.Adam(self.net[2].parameters(), 0.01)]


class Manual(Net):
    """Steps every second batch."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Lbfgs(Net):
    """In float64: a search along a line makes much of the last bits."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def loss(self, batch: Any) -> Any:
        return super().loss([part.double() for part in batch])

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=5, line_search_fn="strong_wolfe")


class Scheduled(Net):
    """One rate falls with every step, the other where validation does not get better fast."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05)
        each_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
        return [optimizer], [{"scheduler": each_step, "interval": "step"}, {"scheduler": plateau, "monitor": "val"}]


class Skipping(Net):
    """Leaves out a batch in the middle of a window, and one at its end."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch)
        return None if (self.current_epoch, batch_idx) in ((0, 1), (1, 2)) else loss


class Thawing(Net):
    """The first layer is trained from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch > 0)


class Spare(Net):
    """A layer that no loss knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


SAME: dict[str, Callable[[int], dict[str, Any]]] = {
    "shuffled": fit,
    "full batches alone": lambda world: fit(world, drop_last=True),
    "lengths that do not divide": lambda world: fit(world, samples=67),
    "accumulation with a short last window": lambda world: fit(world, accumulate_grad_batches=3),
    "clipping": lambda world: fit(world, gradient_clip_val=0.05),
    "two optimizers": lambda world: fit(world, Two, accumulate_grad_batches=3),
    "manual optimization": lambda world: fit(world, Manual),
    "LBFGS": lambda world: fit(world, Lbfgs),
    "schedulers": lambda world: fit(world, Scheduled),
    "skipped batches": lambda world: fit(world, Skipping, accumulate_grad_batches=3),
    "thawing": lambda world: fit(world, Thawing),
    "unused parameters": lambda world: fit(world, Spare, **ddp(world, find_unused_parameters=True)),
    "static graph": lambda world: fit(world, accumulate_grad_batches=3, **ddp(world, static_graph=True)),
    "copied buckets": lambda world: fit(world, **ddp(world, gradient_as_bucket_view=False, bucket_cap_mb=1)),
}
ROUGHLY = {
    "16-mixed": lambda world: fit(world, precision="16-mixed"),
    "bf16-mixed": lambda world: fit(world, precision="bf16-mixed"),
}


def ddp(world: int, **options: Any) -> dict[str, Any]:
    return {"ddp": options}


def evaluated(world: int) -> dict[str, Any]:
    seed_everything(3)
    net, each = Net(), {}
    for samples in (7, 5, 1):
        loader = DataLoader(data(samples), 2)
        each[samples] = trainer(world).validate(net, loader), trainer(world).test(net, [loader, DataLoader(data(3), 1)])
        each[-samples] = torch.cat(trainer(world).predict(net, loader)).flatten().tolist()
    return each


# ---------------------------------------------------------------------- cases of two ranks


def rank() -> int:
    return int(os.environ["RANK"])


def problem(of: Callable[[], Any]) -> dict[str, Any]:
    """What is said of it, and after how many seconds."""
    began = time.monotonic()
    try:
        of()
    except Exception as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        return {"error": f"{type(error).__name__}: {error}", "notes": notes, "seconds": time.monotonic() - began}
    return {"error": ""}


class Keys(Net):
    """Logs another name on each rank."""

    def training_step(self, batch: Any) -> Any:
        if self.options["where"] == "step":
            self.log(f"of rank {rank()}", 1.0)
        if self.options["where"] == "epoch":
            self.log(f"of rank {rank()}", 1.0, on_step=False, on_epoch=True)
        return self.loss(batch)

    def on_train_epoch_end(self) -> None:
        if self.options["where"] == "outside":
            self.log(f"of rank {rank()}", 1.0)


class Orders(Net):
    """The same names in another order, a value that differs, and one that rank 0 alone logs."""

    def training_step(self, batch: Any) -> Any:
        for name in ("a", "b")[:: 1 - 2 * rank()]:
            self.log(name, (10.0 if name == "b" else 1.0) + rank(), on_step=True, on_epoch=True)
        if rank() == 0:
            self.log("alone", 5.0, on_step=True, on_epoch=True, rank_zero_only=True)
        self.log("everywhere", float(rank()), rank_zero_only=True)
        return self.loss(batch)

    def on_train_epoch_end(self) -> None:
        self.log("outside", float(rank()))


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.means: list[Any] = []

    def on_validation_start(self) -> None:
        self.means.append(self.net[1].running_mean.tolist())


class OneSided(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 and rank() == 1 else self.loss(batch)


class LateSpare(Spare):
    """Has a layer without gradients from the third step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) + (self.spare.weight.sum() + self.spare.bias.sum() if batch_idx < 2 else 0)


class Stream(IterableDataset):
    """Gives each rank its own number of samples."""

    def __init__(self, sizes: tuple[int, int], told: bool = False) -> None:
        self.size = sizes[rank()]
        if told:
            Stream.__len__ = lambda stream: 12

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.size):
            yield torch.ones(10), torch.ones(1)


class Seen:
    """How many batches each epoch had, and what was said."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    @hookimpl
    def on_train_epoch_end(self, run: Any) -> None:
        self.batches.append(run.position.batch)


@contextmanager
def said() -> Iterator[list[str]]:
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, listener = logging.getLogger("torchplug"), Listener()
    log.addHandler(listener)
    try:
        yield lines
    finally:
        log.removeHandler(listener)


def uneven(loader: Any, **options: Any) -> dict[str, Any]:
    seen, net = Seen(), Net()
    with said() as lines:
        run = trainer(2, seen, ddp=options, max_epochs=2)
        run.fit(net, loader, DataLoader(data(4), 2))
    assert run.run is not None
    return {"batches": seen.batches, "said": lines, "samples": run.run.position.samples}


def orders() -> dict[str, Any]:
    records = Records()
    trainer(2, records, max_epochs=1).fit(Orders(), DataLoader(data(64), 16))
    return {"records": records.all}


def normed() -> dict[str, Any]:
    net = Normed()
    trainer(2, num_sanity_val_steps=0).fit(net, DataLoader(data(64), 16), DataLoader(data(4), 2))
    return {"means": net.means}


def from_elsewhere() -> dict[str, Any]:
    """Ranks that begin with different weights evaluate with those of rank 0."""
    torch.manual_seed(rank())
    results = trainer(2).validate(Net(), DataLoader(data(4), 2))
    return {"results": results}


class Counting:
    """Counts what is exchanged between two logging steps."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.counts = first, last, dict[str, int]()

    @hookimpl
    def on_train_batch_start(self, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profile.__enter__()

    @hookimpl
    def on_train_batch_end(self, batch_idx: int) -> None:
        if batch_idx == self.last:
            self.profile.__exit__(None, None, None)
            for event in self.profile.events():
                if "gloo" in event.name:
                    self.counts[event.name] = self.counts.get(event.name, 0) + 1


def counted(**options: Any) -> dict[str, Any]:
    counting = Counting(9, 14)
    trainer(2, counting, max_epochs=1, log_every_n_steps=9, **options).fit(Net(), DataLoader(data(640), 16), DataLoader(data(4), 2))
    return {"counts": counting.counts}


PAIR: dict[str, Callable[[], dict[str, Any]]] = {
    "keys step": lambda: problem(lambda: trainer(2).fit(Keys(where="step"), DataLoader(data(64), 16))),
    "keys epoch": lambda: problem(lambda: trainer(2).fit(Keys(where="epoch"), DataLoader(data(64), 16))),
    "keys outside": lambda: problem(lambda: trainer(2).fit(Keys(where="outside"), DataLoader(data(64), 16))),
    "orders": orders,
    "unused": lambda: problem(lambda: trainer(2).fit(Spare(), DataLoader(data(64), 16))),
    "unused later": lambda: problem(lambda: trainer(2).fit(LateSpare(), DataLoader(data(160), 16))),
    "batchnorm": lambda: problem(lambda: trainer(2, ddp={"sync_batchnorm": True}).fit(Normed(), DataLoader(data(64), 16))),
    "no batchnorm": lambda: problem(lambda: trainer(2, ddp={"sync_batchnorm": True}, max_epochs=1).fit(Net(), DataLoader(data(64), 16))),
    "devices": lambda: problem(lambda: trainer(2, devices=3).fit(Net(), DataLoader(data(64), 16))),
    "normed": normed,
    "from elsewhere": from_elsewhere,
    "iterable": lambda: uneven(DataLoader(Stream((10, 7)), 2)),
    "uneven": lambda: uneven(DataLoader(data((10, 7)[rank()]), 2), deal=False),
    "counted": counted,
    "counted in windows": lambda: counted(accumulate_grad_batches=3),
    "promised": lambda: uneven(DataLoader(Stream((12, 8), told=True), 2)),
    "one-sided": lambda: problem(lambda: trainer(2, ddp={"timeout": "2s"}).fit(OneSided(), DataLoader(data(64), 16))),  # last: they part
}


APART = "counted in windows"  # in processes of its own: torch's profiler may hang when a forked process uses it again


def go_through(number: int, port: int, file: Path, apart: bool) -> None:
    """What a rank does."""
    os.setpgid(0, 0)
    signal.alarm(100)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    outcomes: dict[str, Any] = {}
    try:
        cases: dict[str, Callable[[], Any]] = {name: lambda case=case: case(2) for name, case in {**SAME, **ROUGHLY}.items()}
        for name, case in {**cases, "evaluated": lambda: evaluated(2), **PAIR}.items():
            if (name == APART) != apart:
                continue
            began = time.monotonic()
            outcomes[name] = case()
            print(f"{name}: {time.monotonic() - began:.2f} s")
    except BaseException:
        traceback.print_exc()
        outcomes["broken"] = f"{name}: {traceback.format_exc()}"
    file.write_bytes(pickle.dumps(outcomes))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).step()  # what torch imports for the first one is imported once
    outcomes: list[dict[str, Any]] = [{}, {}]
    for apart in (False, True):
        for outcome, other in zip(outcomes, _of_two(folder, apart), strict=True):
            assert "broken" not in other, other["broken"]
            outcome.update(other)
    return outcomes


def _of_two(folder: Path, apart: bool) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [folder / f"rank_{number}_{apart}" for number in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        processes = [FORK.Process(target=go_through, args=(number, port, file, apart)) for number, file in enumerate(files)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(110)
            if process.is_alive():
                process.kill()
                process.join()
    return [pickle.loads(file.read_bytes()) for file in files]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Any]], Any]:
    """Goes through a case in this process."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return lambda case: case(1)


# ---------------------------------------------------------------------- what is promised


def close(one: Any, other: Any, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("ddp", timeout="30s")


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_train_as_one_process_with_twice_the_batch(name: str, ranks: list[dict[str, Any]], alone: Any) -> None:
    one, two = alone(SAME[name]), ranks[0][name]
    assert two["weights"] == pytest.approx(one["weights"], abs=1e-6)
    assert ranks[1][name]["weights"] == two["weights"]
    assert ranks[1][name]["metrics"] == two["metrics"]
    assert two["position"] == one["position"] == ranks[1][name]["position"]
    close(one["metrics"], two["metrics"], 2e-6)
    assert [each[:2] for each in one["records"]] == [each[:2] for each in two["records"]]
    for (_, _, mine), (_, _, theirs) in zip(one["records"], two["records"], strict=True):
        close(mine, theirs, 2e-6)
    assert ranks[1][name]["records"] == [], "loggers of other ranks hear nothing"


@pytest.mark.parametrize("name", ROUGHLY)
def test_half_precision_trains_on_ranks_roughly_as_alone(name: str, ranks: list[dict[str, Any]], alone: Any) -> None:
    one, two = alone(ROUGHLY[name]), ranks[0][name]
    assert two["weights"] == pytest.approx(one["weights"], abs=0.02)
    assert ranks[1][name]["weights"] == two["weights"]
    close(one["metrics"], two["metrics"], 0.05)


def test_evaluation_counts_every_sample_once_and_predictions_keep_their_order(ranks: list[dict[str, Any]], alone: Any) -> None:
    one = alone(evaluated)
    for samples in (7, 5, 1):
        assert ranks[0]["evaluated"][samples] == ranks[1]["evaluated"][samples] == one[samples]
        assert ranks[0]["evaluated"][-samples] == one[-samples]
        assert len(one[-samples]) == samples


@pytest.mark.parametrize("where", ["step", "epoch", "outside"])
def test_different_names_are_an_error_on_all_ranks_that_names_rank_and_name(where: str, ranks: list[dict[str, Any]]) -> None:
    for outcome in ranks:
        found = outcome[f"keys {where}"]
        assert "RuntimeError: ranks logged different metrics: rank 0 logged 'of rank 0'; rank 1 logged 'of rank 1'" in found["error"]
        assert found["seconds"] < 10


def test_the_same_names_in_another_order_are_the_means_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    records = {name: value for _, _, metrics in ranks[0]["orders"]["records"] for name, value in metrics.items()}
    assert (records["a_step"], records["b_step"], records["a_epoch"], records["b_epoch"]) == (1.5, 10.5, 1.5, 10.5)
    assert records["outside"] == 0.5


def test_what_rank_0_alone_logs_is_its_own_value(ranks: list[dict[str, Any]]) -> None:
    records = {name: value for _, _, metrics in ranks[0]["orders"]["records"] for name, value in metrics.items()}
    assert (records["alone_step"], records["alone_epoch"], records["everywhere"]) == (5.0, 5.0, 0.0)


def test_parameters_without_a_gradient_are_named_with_the_option_to_set(ranks: list[dict[str, Any]]) -> None:
    for outcome in ranks:
        for case in ("unused", "unused later"):
            assert "parameters without a gradient: spare.weight, spare.bias; use them" in outcome[case]["error"]
            assert "strategy={'ddp': {'find_unused_parameters': True}}" in outcome[case]["error"]
        assert "epoch 0, batch 0, step 0" in outcome["unused"]["notes"], "before anything is updated"


def test_batchnorm_over_ranks_is_refused_on_the_cpu_where_there_is_any(ranks: list[dict[str, Any]]) -> None:
    for outcome in ranks:
        assert "ValueError: sync_batchnorm=True: torch has no BatchNorm over ranks for the CPU" in outcome["batchnorm"]["error"]
        assert outcome["no batchnorm"]["error"] == ""


def test_another_number_of_processes_than_asked_for_is_an_error(ranks: list[dict[str, Any]]) -> None:
    for outcome in ranks:
        assert "2 processes were started, but devices=3 and num_nodes=1 ask for 3" in outcome["devices"]["error"]


def test_ranks_evaluate_with_the_weights_and_buffers_of_rank_0(ranks: list[dict[str, Any]]) -> None:
    assert len(ranks[0]["normed"]["means"]) == 3
    assert ranks[0]["normed"] == ranks[1]["normed"]
    assert ranks[0]["from elsewhere"] == ranks[1]["from elsewhere"]
    seed = torch.get_rng_state()
    torch.manual_seed(0)
    net = Net()
    torch.set_rng_state(seed)
    whole = net.loss(data(4)[:]).item()
    assert ranks[0]["from elsewhere"]["results"][0]["val"] == pytest.approx(whole)


@pytest.mark.parametrize("case", ["iterable", "uneven", "promised"])
def test_ranks_with_different_numbers_of_batches_end_the_epoch_together_and_say_so(case: str, ranks: list[dict[str, Any]]) -> None:
    assert [outcome[case]["batches"] for outcome in ranks] == [[4, 4], [4, 4]]
    told = " ".join(ranks[0][case]["said"])
    assert "ranks 0 had more training batches than the others" in told or "ranks have 5, 4 training batches" in told


def test_between_logging_steps_gradients_alone_are_exchanged(ranks: list[dict[str, Any]]) -> None:
    for outcome in ranks:
        assert outcome["counted"]["counts"] == {"gloo:all_reduce": 6}  # one bucket at each step
        assert outcome["counted in windows"]["counts"] == {"gloo:all_reduce": 2}


def test_a_batch_that_one_rank_alone_skips_is_an_error_that_names_it(ranks: list[dict[str, Any]]) -> None:
    assert "training_step returned None on rank 1, and not on all the others" in ranks[1]["one-sided"]["error"]
    assert ranks[0]["one-sided"]["error"]
    assert ranks[1]["one-sided"]["seconds"] < 10
