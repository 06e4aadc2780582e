"""Every plugin of the repository takes part in a run of two ranks, all of them in one pair of processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchplug
from torchplug import Run, Trainer, hookimpl, seed_everything
from torchplug.metrics import Metrics
from torchplug.run import Position
from torchplug.state import _of_this_rank

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]

PLUGINS = Path(__file__).parent.parent / "plugins"
RANKS, BATCH, STEPS = 2, 4, 6
LIMIT = 120  # seconds that a pair of processes may take


class Net(torchplug.Module):
    """Two layers and BatchNorm's running statistics only where a case asks for them; logs in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.batch_size, self.lr, self.too_large = BATCH, 0.05, sys.maxsize

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any) -> Tensor:
        if len(batch[0]) > self.too_large:
            raise torch.OutOfMemoryError("CUDA out of memory, as this test has it")
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val", self.loss(batch))

    def predict_step(self, batch: Any) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    def train_dataloader(self) -> Any:
        return DataLoader(data(22), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(data(7), 3)


def data(samples: int) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(samples))
    return TensorDataset(x, x.sum(1, keepdim=True))


class Listener:
    """Keeps what loggers are given, which hooks were called, and the stops."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.stops: list[Any] = []
        self.saved: list[Any] = []

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], stage: str, step: int, epoch: int, samples: int) -> None:
        self.records.append([stage, epoch, step, samples, metrics])

    @hookimpl
    def on_stop_requested(self, run: Run, reason: str) -> None:
        self.stops.append([run.position.step, reason])

    @hookimpl
    def on_checkpoint_saved(self, path: Path, reason: str) -> None:
        self.saved.append([path.name, reason])


@dataclass
class Outcome:
    """What a run came to on one rank.

    Args:
        weights: of the module, by name.
        records: what its loggers were given.
        stops: where it was asked to stop.
        saved: the checkpoints that were announced.
        attributes: of the plugin, as plain values.
        predictions: what ``predict`` returned.
        said: what was shown.
        root: the folder for the run's directory.
    """

    weights: dict[str, Tensor]
    records: list[Any]
    stops: list[Any]
    saved: list[Any]
    attributes: dict[str, Any]
    predictions: list[Tensor]
    said: str
    root: Path
    error: str = ""
    position: Any = None

    @property
    def dir(self) -> Path:
        """The one directory of the run."""
        (found,) = self.root.glob("*/*")
        return found


@dataclass
class Case:
    """How a plugin is run, and what must have come of it.

    Args:
        options: of the plugin.
        check: compares both ranks with one process, which may be None for a plugin that is at rest there.
        observes: whether training is that of the strategy alone.
        others: more plugins.
        epochs: how many.
        attributes: what is looked at in the plugin, as texts of expressions.
        before: changes a module and its rank before the run.
    """

    options: dict[str, Any] = field(default_factory=dict)
    check: Callable[[list[Outcome], Outcome], None] = lambda ranks, one: None
    observes: bool = True
    others: Sequence[Any] = ()
    epochs: int = 2
    attributes: Sequence[str] = ()
    before: Callable[[Net, int], None] | None = None
    predicts: bool = False
    named: bool = True


def perform(name: str, case: Case, root: Path, world: int) -> Outcome:
    """One run in this process, which is a rank of several or alone."""
    rank = int(os.environ.get("RANK", 0))
    seed_everything(5)
    module, listener, said = Net(), Listener(), StringIO()
    if world == 1:
        module.batch_size = BATCH * RANKS
    if case.before is not None:
        case.before(module, rank)
    plugins = [*case.others, *([{name: case.options}] if case.named and name != "ddp" else []), listener]
    strategy: Any = {"ddp": {"timeout": "30s", **(case.options if name == "ddp" else {})}} if world > 1 else "auto"
    with redirect_stderr(said):
        trainer = Trainer(
            max_epochs=case.epochs, log_every_n_steps=2, accelerator="cpu", root_dir=root, plugins=plugins, strategy=strategy,
            devices=world, num_sanity_val_steps=1,
        )  # fmt: skip
        error = ""
        try:
            trainer.fit(module)
        except Exception as raised:
            if not case.attributes == ("error",):
                raise
            error = f"{type(raised).__name__}: {raised}"
        predictions = []
        if case.predicts:
            predictions = trainer.predict(module, DataLoader(data(7), 2))
    plugin = trainer.enabled.get(name)
    attributes = (
        {} if error else {text: eval(text, {}, {"plugin": plugin, "module": module, "trainer": trainer}) for text in case.attributes}
    )
    assert trainer.run is not None
    weights = {key: value.detach().clone() for key, value in module.state_dict().items()}
    return Outcome(
        weights, listener.records, listener.stops, listener.saved, attributes, predictions, said.getvalue(), root, error,
        asdict(trainer.run.position),
    )  # fmt: skip


# ---------------------------------------------------------------------- what must have come of it


def close(one: Any, other: Any, at_least: float = 1e-6) -> None:
    """Both hold the same values."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        said = f"{name}: {value}, not {other[name]}"
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(other[name]), rtol=1e-5, atol=at_least, msg=said)


def same_records(ranks: list[Outcome], one: Outcome, without: str = "") -> None:
    """Loggers got the values of one process, on rank 0 alone."""
    assert ranks[1].records == []
    assert len(ranks[0].records) == len(one.records) > 0
    for (*place, values), (*expected, others) in zip(ranks[0].records, one.records, strict=True):
        assert place == expected
        if without:
            assert values.keys() == others.keys()
            values, others = ({k: v for k, v in each.items() if not k.startswith(without)} for each in (values, others))
        close(values, others)


def journal(outcome: Outcome, event: str = "log_metrics") -> list[Any]:
    lines = [json.loads(line) for line in (outcome.dir / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def recorded(outcome: Outcome) -> list[tuple[int, dict[str, float]]]:
    return [(step, metrics) for _, _, step, _, metrics in outcome.records]


def check_journal(ranks: list[Outcome], one: Outcome) -> None:
    assert [(each["step"], each["metrics"]) for each in journal(ranks[0])] == recorded(ranks[0])
    assert len(journal(ranks[0], "on_run_start")) == 1 and journal(ranks[0], "on_run_start")[0]["world_size"] == 2
    assert [path.name for path in ranks[0].dir.iterdir() if path.name.startswith("journal")] == ["journal.jsonl"]


def check_csv(ranks: list[Outcome], one: Outcome) -> None:
    import csv

    (file,) = ranks[0].root.rglob("*.csv")
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    found = [{name: float(row[name]) for name in ("loss_step", "loss_epoch", "val") if row[name]} for row in rows]
    assert found == [metrics for _, metrics in recorded(ranks[0])]
    assert [row["step"] for row in rows] == [str(step) for step, _ in recorded(ranks[0])]


def check_tensorboard(ranks: list[Outcome], one: Outcome) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = ranks[0].root.rglob("*tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    for name in ("loss_step", "val"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(step, metrics[name]) for step, metrics in recorded(ranks[0]) if name in metrics]
        assert [step for step, _ in found] == [step for step, _ in expected]
        torch.testing.assert_close([value for _, value in found], [value for _, value in expected])


def check_mlflow(ranks: list[Outcome], one: Outcome) -> None:
    import mlflow

    stores = [*ranks[0].root.rglob("*.db")]
    assert len(stores) == 1
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{stores[0]}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert len(runs) == 1
    found = [(each.step, each.value) for each in client.get_metric_history(runs[0].info.run_id, "val")]
    assert found == [(step, metrics["val"]) for step, metrics in recorded(ranks[0]) if "val" in metrics]


def check_wandb(ranks: list[Outcome], one: Outcome) -> None:
    found = [*ranks[0].root.rglob("run-*.wandb")]
    assert len(found) == 1 and found[0].stat().st_size > 0


def check_checkpoint(ranks: list[Outcome], one: Outcome) -> None:
    from torchplug.checkpoint import load

    assert ranks[0].saved == ranks[1].saved
    assert [name for name, _ in ranks[0].saved] == [name for name, _ in one.saved]
    assert ranks[0].attributes == ranks[1].attributes
    files = {path.name for path in (ranks[0].dir / "checkpoints").iterdir()}
    assert files == {path.name for path in (one.dir / "checkpoints").iterdir()}
    state = load(ranks[0].dir / "checkpoints" / "last.safetensors")
    close(state["module"], one.weights)
    assert len(state["ranks"]) == 1 and state["position"]["samples"] == 44
    assert not torch.equal(state["ranks"][0]["generators"]["torch"], state["generators"]["torch"])


def check_predictions(ranks: list[Outcome], one: Outcome) -> None:
    files = [*(ranks[0].dir / "predictions").iterdir()]
    records = [torch.load(path, weights_only=True) for path in files]
    numbers = [number for record in records for number in record["samples"]]
    assert sorted(numbers) == list(range(7))
    values = torch.empty(7, 1)
    for record in records:
        values[record["samples"]] = record["predictions"]
    torch.testing.assert_close(values, torch.cat(one.predictions))
    torch.testing.assert_close(torch.cat(ranks[0].predictions), torch.cat(one.predictions))
    assert ranks[0].attributes == {
        "trainer.run.report": {"prediction_writer": f"4 files with predictions in {ranks[0].dir / 'predictions'}"}
    }


def check_stop(ranks: list[Outcome], one: Outcome) -> None:
    assert ranks[0].position == ranks[1].position == one.position and one.position["epoch"] < 5
    assert ranks[0].attributes == ranks[1].attributes
    assert [step for step, _ in ranks[0].stops] == [step for step, _ in ranks[1].stops] == [step for step, _ in one.stops]


def check_lr(ranks: list[Outcome], one: Outcome) -> None:
    assert ranks[0].attributes == ranks[1].attributes
    torch.testing.assert_close(
        ranks[0].attributes["plugin.result.losses"][:20], one.attributes["plugin.result.losses"][:20], rtol=1e-3, atol=1e-4
    )


def check_batch_size(ranks: list[Outcome], one: Outcome) -> None:
    size = {"plugin.result.size": 4, "module.batch_size": 4}
    for rank in ranks:
        assert {name: rank.attributes[name] for name in size} == size
    tried = [rank.attributes["plugin.result.trials"] for rank in ranks]
    assert [size for size, _ in tried[0]] == [size for size, _ in tried[1]]
    assert [message for size, message in tried[0] if size == 8] == ["another rank ran out of memory"]
    assert ["as this test has it" in message for size, message in tried[1] if size == 8] == [True]


def check_rates(ranks: list[Outcome], one: Outcome) -> None:
    rows = [metrics for _, metrics in recorded(ranks[0]) if "throughput/samples_per_sec" in metrics]
    assert rows
    per_step = rows[0]["throughput/samples_per_sec"] / rows[0]["throughput/steps_per_sec"]
    assert per_step == pytest.approx(8, abs=1.5)  # of all ranks: 8 samples to a step, 6 in the last of an epoch


def check_device(ranks: list[Outcome], one: Outcome) -> None:
    rows = [metrics for _, metrics in recorded(ranks[0]) if "device_stats/process_rss_mb" in metrics]
    assert len(rows) == 3 and all(row["device_stats/process_rss_mb"] > 50 for row in rows)


def check_profile(ranks: list[Outcome], one: Outcome) -> None:
    assert {path.name for path in ranks[0].dir.glob("timeline-*")} == {"timeline-0.json", "timeline-1.json"}
    assert [rank.attributes["plugin.spent['core', 'train_step'].calls"] for rank in ranks] == [STEPS, STEPS]


def check_report(ranks: list[Outcome], one: Outcome) -> None:
    assert "37 (37)" in ranks[0].said and ranks[1].said == ""


def check_progress(ranks: list[Outcome], one: Outcome) -> None:
    assert "val" in ranks[0].said and ranks[1].said == ""


def check_calls(ranks: list[Outcome], one: Outcome) -> None:
    assert [rank.attributes["module.calls"] for rank in ranks] == [STEPS, STEPS] and one.attributes["module.calls"] == STEPS


def check_standard(ranks: list[Outcome], one: Outcome) -> None:
    check_journal(ranks, one)
    assert (ranks[0].dir / "checkpoints" / "last.safetensors").exists()
    assert "val" in ranks[0].said and ranks[1].said == ""


def count(run: Run) -> None:
    run.module.calls = getattr(run.module, "calls", 0) + 1


def small_memory(module: Net, rank: int) -> None:
    module.too_large = 4 if rank == 1 else sys.maxsize


CASES: dict[str, Case] = {
    "accumulation_schedule": Case({"scheduling": {0: 1, 1: 2}}, same_records, observes=False),
    "batch_size_finder": Case(
        {"init": 2}, check_batch_size, observes=False, before=small_memory,
        attributes=("plugin.result.size", "module.batch_size", "plugin.result.trials"),
    ),
    "checkpoint": Case(
        {"monitor": "val", "every_n_steps": 2, "every_time": "1h"}, check_checkpoint,
        attributes=("plugin.best_path", "plugin.last_path", "plugin.best_score"),
    ),
    "csv": Case(check=check_csv),
    "ddp": Case(check=same_records),
    "device_stats": Case(check=check_device),
    "early_stopping": Case(
        {"monitor": "val", "patience": 1, "min_delta": 0.5}, check_stop, observes=False, epochs=6,
        attributes=("plugin.stopped_step", "plugin.wait"),
    ),
    "ema": Case({"decay": 0.8}, same_records, observes=False),
    "freeze": Case({"frozen": ["net.0"], "unfreeze": {1: ["net.0"]}}, same_records, observes=False),
    "grad_norm": Case(check=same_records),
    "journal": Case(check=check_journal),
    "lambda_hooks": Case({"hooks": {"on_after_optimizer_step": count}}, check_calls, attributes=("module.calls",)),
    "lr_finder": Case(
        {"steps": 25, "max_lr": 1.0}, check_lr, observes=False,
        attributes=("plugin.result.losses", "plugin.result.suggestion()", "module.lr"),
    ),
    "lr_monitor": Case(check=same_records),
    "mlflow": Case(check=check_mlflow, others=["journal"]),
    "prediction_writer": Case(check=check_predictions, predicts=True, attributes=("trainer.run.report",)),
    "profiler": Case(check=check_profile, attributes=("plugin.spent['core', 'train_step'].calls",)),
    "progress": Case(check=check_progress),
    "standard": Case(check=check_standard),
    "summary": Case(check=check_report),
    "swa": Case({"start": 1, "every_n_steps": 1, "lr": 0.01}, same_records, observes=False),
    "tensorboard": Case(check=check_tensorboard, others=["journal"]),
    "throughput": Case({"window_size": 2}, check_rates),
    "wandb": Case({"mode": "offline"}, check_wandb, others=["journal"]),
}  # fmt: skip
SLOW = ("mlflow", "wandb")
ELSEWHERE = {
    "fsdp": "shards its module; its own tests compare it with ddp",
    "gpu": "needs a GPU; its tests are marked so",
    "ray": "starts ranks with Ray; its own tests do",
}
ALONE = ("batch_size_finder",)  # one process has no memory that runs out


# ---------------------------------------------------------------------- one pair of processes for all


def _rank(rank: int, port: int, names: Sequence[str], folder: Path) -> None:
    """What a process does: all runs, one after the other, in the group that the first one made."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    code = 1
    try:
        torch.set_num_threads(1)
        for name in names:
            outcome: Any
            try:
                outcome = perform(name, CASES.get(name, Case(named=False)), folder / name, RANKS)
            except BaseException:
                outcome = traceback.format_exc()
            with open(folder / f"{name}-{rank}", "wb") as file:
                pickle.dump(outcome, file)
            if isinstance(outcome, str):
                return
        torch.distributed.barrier()
        code = 0
    finally:
        os._exit(code)


def _pair(names: Sequence[str], folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_rank, args=(rank, port, names, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(LIMIT)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


class Runs:
    """The outcomes of all plugins' runs, made when the first one is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, set[str]()

    def of(self, name: str, together: Sequence[str]) -> list[Outcome]:
        """What ``name`` came to on both ranks; its run is made with those of ``together``."""
        if name not in self.made:
            self.made.update(together)
            _pair(together, self.folder)
        outcomes = []
        for rank in range(RANKS):
            path = self.folder / f"{name}-{rank}"
            if not path.exists():
                said = {each.name: pickle.loads(each.read_bytes()) for each in sorted(self.folder.glob("*-[01]"))}
                broken = [f"{run}: {text}" for run, text in said.items() if isinstance(text, str)]
                pytest.fail(f"the pair of processes did not come to {name!r}\n" + "\n".join(broken))
            outcomes.append(pickle.loads(path.read_bytes()))
        for outcome in outcomes:
            if isinstance(outcome, str):
                pytest.fail(outcome)
        return outcomes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # what torch imports at the first step is imported once
    optimizer.zero_grad()
    optimizer.step()
    return Runs(tmp_path_factory.mktemp("two_ranks"))


def names() -> list[Any]:
    found = sorted(path.parent.name for path in PLUGINS.glob("*/pyproject.toml"))
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_a_run_of_two_ranks_has_every_plugin_do_what_it_does_in_one_process(
    name: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ELSEWHERE:
        pytest.skip(ELSEWHERE[name])
    case = CASES[name]
    fast = ["bare", *(each for each in CASES if each not in SLOW)]
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    ranks = runs.of(name, ["bare", *SLOW] if name in SLOW else fast)
    one = perform(name, case, tmp_path / "one", 1) if name not in (*ALONE, *SLOW) else ranks[0]
    for key, value in ranks[0].weights.items():
        assert torch.equal(value, ranks[1].weights[key]), f"{key} is another one on each rank"
    if case.observes:
        bare = runs.of("bare", fast)[0]
        for key, value in ranks[0].weights.items():
            assert torch.equal(value, bare.weights[key]), f"{key} is not what it is without {name}"
    if name not in ("batch_size_finder", "lr_finder"):  # a rate that is a little different leads elsewhere
        close(ranks[0].weights, one.weights)
    assert len([*ranks[0].root.glob("*/version_*")]) == 1
    case.check(ranks, one)


def test_every_plugin_has_a_case() -> None:
    assert {path.parent.name for path in PLUGINS.glob("*/pyproject.toml")} == {*CASES, *ELSEWHERE}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_other_ranks_go_on_with_sums_that_count_once(before: int, after: int) -> None:
    """Means, sums and extremes of all ranks are the first one's; a metric object has the first one's, which is said."""
    metrics = [Metrics(Position()) for _ in range(before)]
    for rank, each in enumerate(metrics):
        with each.open("train"):
            each.batches()
            for value in range(1 + rank, 4):
                each.size = value
                for kind in ("mean", "sum", "min", "max"):
                    each.log(kind, float(value + 10 * rank), (False, None, True, True, kind, True, False))
            each.part = each.state_dict({}, False)  # type: ignore[attr-defined]
    own = [
        {"generators": f"those of {rank}", "metrics": {"values": each.part, "objects": {"meter": {"total": rank + 1}}}}  # type: ignore[attr-defined]
        for rank, each in enumerate(metrics)
    ]
    state = {**own[0], "ranks": own[1:], "position": {"batch": 2}, "data": "of the first"}
    said: list[str] = []
    found = []
    for rank in range(after):
        run: Any = SimpleNamespace(rank=rank, world_size=after, say_once=said.append)
        found.append(_of_this_rank(run, state))
    logged = [(value + 10 * rank, value) for rank in range(before) for value in range(1 + rank, 4)]
    first = Metrics(Position())
    with first.open("train"):
        first.load_state_dict(found[0]["metrics"]["values"], torch.device("cpu"), {})
        (results,) = first.finish()
    assert results["mean_epoch"] == pytest.approx(sum(value * size for value, size in logged) / sum(size for _, size in logged))
    values = [value for value, _ in logged]
    assert [results[f"{kind}_epoch"] for kind in ("sum", "min", "max")] == [sum(values), min(values), max(values)]
    assert [each["generators"] for each in found] == ["those of 0", *[None] * (after - 1)]
    assert [each["metrics"]["values"]["series"] for each in found[1:]] == [[]] * (after - 1)
    assert [each["metrics"]["objects"] for each in found] == [{"meter": {"total": 1}}, *[{}] * (after - 1)]
    assert len(set(said)) == 1 and f"{before} ranks wrote this, {after} go on: metric objects (meter)" in said[0]
