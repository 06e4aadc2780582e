"""Bundled plugins in every pair, in both orders, and all at once: who observes changes nothing, and who acts does what it does alone."""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from torchplug import Module, Trainer
from torchplug.discovery import find
from torchplug.seed import generator_state
from torchplug.sharded import whole
from torchplug.testing import make_loader, tiny_trainer, two_ranks
from torchplug.testing.processes import Child
from torchplug.testing.subject import differences, quiet, result_of

pytestmark = pytest.mark.slow

Names = tuple[str, ...]
FOLDER = Path(__file__).parents[2] / "plugins"
NAMES = tuple(sorted(path.parent.name for path in FOLDER.glob("*/pyproject.toml")))
PATIENCE = 600  # seconds that a process with many runs may take

STRATEGIES = ("ddp", "fsdp")  # which share nothing out in one process: their pairs are made there, and by two ranks
TRACKERS = ("mlflow", "wandb")  # whose packages start threads and processes: their pairs are made in a process that is thrown away
APART = {"ray": "hands every run to processes that it starts; its pairs are made as they are in one of these"}
IN_PROCESS = tuple(name for name in NAMES if name not in (*TRACKERS, *APART))

# who acts on a run of one process, with the options below; the others change nothing there
ACTS = ("accumulation_schedule", "batch_size_finder", "early_stopping", "ema", "freeze", "lambda_hooks", "lr_finder", "swa")
IDLE = {
    "ddp": "with one process nothing is exchanged",
    "fsdp": "with one process nothing is spread",
    "gpu": "without a GPU the CPU is used",
    "ray": "within a process that it started it stands aside",
    "standard": "is a bundle of plugins that observe",
}

# pairs that cannot be, and what is said then; the two names stand in it in the order in which the plugins are called
REFUSED = {
    frozenset({"ema", "swa"}): "a module can hold one average of its weights, and {} and {} would each leave one in it",
    frozenset({"ddp", "fsdp"}): "a run has one strategy, and {} and {} are enabled: leave all but one out",
}
WITHOUT_STRATEGY = "plugin 'ray' starts workers that a strategy lets train together: write strategy='ddp' or 'fsdp' too"


def clamp(optimizer: Any) -> bool:
    """Clips gradients in a way of its own."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.clamp_(-0.5, 0.5)
    return True


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation_schedule": {"scheduling": {1: 2}},
    "batch_size_finder": {"max": 4, "steps_per_trial": 2},
    "checkpoint": {"monitor": "val_loss", "top_k": 2, "every_n_steps": 3},
    "early_stopping": {"monitor": "val_loss", "patience": 1, "min_delta": 1e9},
    "ema": {"decay": 0.5},
    "freeze": {"frozen": ["layer.bias"], "unfreeze": {1: {"layer.bias": 0.01}}},
    "lambda_hooks": {"hooks": {"clip_gradients": clamp}},
    "lr_finder": {"steps": 10, "max_lr": 1.0},
    "lr_monitor": {"log_momentum": True},
    "swa": {"start": 1, "every_n_steps": 2, "lr": 0.05, "anneal_epochs": 1},
    "wandb": {"mode": "offline"},
}


class Net(Module):
    """Dropout, shuffled data, Adam, a schedule; keeps what was recorded of its own metrics, and has what finders set."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.02, batch_size
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)
        self.told: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Any:
        return self.layer(torch.nn.functional.dropout(x, 0.2, self.training))

    def loss(self, batch: Any) -> Tensor:
        return torch.nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any) -> None:
        self.log("test_loss", self.loss(batch))

    def log_metrics(self, metrics: dict[str, float], stage: str, step: int, epoch: int, samples: int) -> None:
        own = {name: value for name, value in metrics.items() if name.startswith(("train_loss", "val_loss", "test_loss"))}
        if own:
            self.told.append((stage, step, epoch, samples, own))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    def train_dataloader(self) -> Any:
        return DataLoader(make_loader(8).dataset, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return make_loader(2, seed=2)

    def test_dataloader(self) -> Any:
        return make_loader(2, seed=3)

    def predict_dataloader(self) -> Any:
        return make_loader(2, seed=4)


# ---------------------------------------------------------------------- a run, and what comes of it


def made(names: Sequence[str], root: Path, strategy: str = "auto") -> Trainer:
    """A trainer with these plugins in this order; a strategy among them is named as the strategy too."""
    strategy = next((name for name in names if name in STRATEGIES), strategy)
    plugins = [{name: OPTIONS[name]} if name in OPTIONS else name for name in names]
    accelerator = "auto" if "gpu" in names and not torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {"max_epochs": 3, "seed": 7, "log_every_n_steps": 2, "num_sanity_val_steps": 1}
    return tiny_trainer(*plugins, strategy=strategy, accelerator=accelerator, root_dir=root, **settings)


def outcome(names: Sequence[str], root: Path, batch_size: int = 2) -> dict[str, Any] | str:
    """Fits, tests and predicts; what came of it, or the error that refuses the plugins."""
    module = Net(batch_size)
    with quiet() as lines:
        try:
            trainer = made(names, root)
            trainer.fit(module)
        except ValueError as error:
            return str(error)
        found = result_of(trainer)
        found["rate and batch size"] = (module.lr, module.batch_size)
        found["tested"] = trainer.test(module)
        found["predicted"] = trainer.predict(module)
    found["generators afterwards"] = generator_state()
    found["told"] = module.told
    assert not [line for line in lines if "switched off" in line or "not everything was delivered" in line], lines
    return whole(found, True)  # type: ignore[no-any-return]


def pairs(name: str, others: Sequence[str]) -> Iterator[Names]:
    """Those of one plugin with the others, in both orders."""
    for other in others:
        yield from ((name, other), (other, name))


class Alone:
    """What comes of runs with some plugins in one order, each made once.

    Args:
        root: where they write.
        base: who is in all of them.
        first: who is in one that is made before: what is imported for that may have random generators too.
    """

    def __init__(self, root: Path, base: Names = (), first: Names = ()) -> None:
        self.root, self.base = root, base
        self.known: dict[Names, Any] = {}
        outcome((*base, *first), root)

    def __call__(self, *names: str) -> Any:
        if names not in self.known:
            self.known[names] = outcome((*self.base, *names), self.root)
        return self.known[names]


@functools.cache
def alone() -> Alone:
    """For all tests of this process."""
    return Alone(Path(tempfile.mkdtemp(prefix="torchplug-")))


@pytest.fixture(autouse=True, scope="module")
def _no_folders_stay() -> Iterator[None]:
    yield
    shutil.rmtree(alone().root)


def wrong(several: Sequence[Names], root: Path, alone: Alone) -> Iterator[str]:
    """How runs with pairs of plugins, each in both orders, differ from what they should come to."""
    came = {names: outcome(names, root) for names in several}
    for names, result in came.items():
        said, acting = REFUSED.get(frozenset(names)), [name for name in names if name in ACTS]
        if said is not None:
            refused = [said.format(*order) for order in (names, names[::-1])]
            if result not in refused:
                yield f"{names}: {result if isinstance(result, str) else 'was not refused'}"
        elif isinstance(result, str):
            yield f"{names}: {result}"
        elif len(acting) < 2:
            yield from (f"{names}: {path} is not that of {acting}" for path in itertools.islice(differences(result, alone(*acting)), 3))
        else:
            yield from (f"{names}: {path} depends on the order" for path in itertools.islice(differences(result, came[names[::-1]]), 3))
            if "batch_size_finder" in acting:  # the fit is the one that begins with the size that was found
                began = outcome([name for name in names if name != "batch_size_finder"], root, OPTIONS["batch_size_finder"]["max"])
                yield from (f"{names}: {path} is not that of this size" for path in itertools.islice(differences(result, began), 3))
            for name in acting:
                if not list(differences(result["weights"], alone(name)["weights"])):
                    yield f"{names}: weights are those of {name} alone"


# ---------------------------------------------------------------------- who is who


def test_every_bundled_plugin_has_its_place_here() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 27
    assert {*STRATEGIES, *TRACKERS, *APART} <= set(NAMES)
    assert {*OPTIONS, *ACTS, *IDLE} <= set(NAMES)
    for name in NAMES:
        target: Any = find(name).load()
        if isinstance(target, (list, tuple)):
            assert name in IDLE
            continue
        observes = bool(getattr(target, "observes", getattr(target, "on_error", "abort") == "disable"))
        assert [observes, name in ACTS, name in IDLE].count(True) == 1, name


@pytest.mark.parametrize("name", IN_PROCESS)
def test_who_acts_changes_the_weights_and_who_observes_nothing(name: str) -> None:
    result, bare = alone()(name), alone()()
    assert not isinstance(result, str), result
    if name in ACTS:
        assert list(differences(result["weights"], bare["weights"]))
    else:
        assert not list(differences(result, bare))


# ---------------------------------------------------------------------- in one process


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_plugin_with_each_other_one(name: str, tmp_path: Path) -> None:
    others = IN_PROCESS[IN_PROCESS.index(name) + 1 :]
    assert not list(wrong(list(pairs(name, others)), tmp_path, alone()))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*STRATEGIES, "ray")])
def test_ray_without_a_strategy_is_refused_whoever_is_with_it(name: str, tmp_path: Path) -> None:
    for names in pairs("ray", [name]):
        with pytest.raises(ValueError) as caught, quiet():
            made(names, tmp_path).fit(Net())
        assert caught.value.args == (WITHOUT_STRATEGY,)


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_all_at_once_are_those_that_act_alone(average: str, tmp_path: Path) -> None:
    every = [name for name in IN_PROCESS if name not in {"ema", "swa", "fsdp"} - {average}]
    acting = outcome([name for name in every if name in ACTS], tmp_path)
    assert list(differences(acting, alone()(average)))
    for names in (every, every[::-1]):
        assert not list(differences(outcome(names, tmp_path), acting))


# ---------------------------------------------------------------------- with trackers


def with_tracker(name: str, root: Path) -> list[str]:
    """What is wrong with the pairs of a tracker, and with all plugins at once; each tracker is made in a process of its own."""
    warnings.filterwarnings("ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning)  # of MLflow
    root.mkdir()
    OPTIONS["mlflow"] = {"tracking_uri": f"sqlite:///{root / 'mlflow.db'}"}
    own = Alone(root / "alone", first=(name,))
    later = [other for other in TRACKERS if other > name]
    found = list(wrong([*pairs(name, [*IN_PROCESS, *later]), (name,)], root, own))
    if not later:
        every = [each for each in NAMES if each not in ("swa", "fsdp", "ray")]
        acting = outcome([each for each in every if each in ACTS], root)
        for names in (every, every[::-1]):
            found += [f"all at once: {path}" for path in differences(outcome(names, root), acting)]
    if name == "wandb":
        import wandb

        wandb.teardown()
    return found


def test_a_tracker_with_each_other_one(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in TRACKERS}
    children = [Child(with_tracker, *each, environment=kept_in(each[1]), timeout=PATIENCE) for each in folders.items()]
    try:
        assert [child.result() for child in children] == [[]] * len(children)
    finally:
        for child in children:
            child.close()


def kept_in(folder: Path) -> dict[str, str]:
    """Variables by which trackers keep in a folder what they keep for a user."""
    return {"MLFLOW_DISABLE_TELEMETRY": "true", **{f"WANDB_{each}_DIR": str(folder / each) for each in ("DATA", "CACHE", "CONFIG")}}


# ---------------------------------------------------------------------- with strategies


def with_strategy(name: str, root: Path) -> list[str]:
    """On each of two ranks: what is wrong with the pairs of a strategy, and with all plugins at once."""
    warnings.filterwarnings("ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning)
    OPTIONS["mlflow"] = {"tracking_uri": f"sqlite:///{root / 'mlflow.db'}"}
    own = Alone(root / "alone", (name,), TRACKERS)
    found = list(wrong(list(pairs(name, [other for other in NAMES if other != name])), root, own))
    every = [each for each in NAMES if each not in {"swa", *STRATEGIES} - {name}]
    acting = outcome([name, *(each for each in every if each in ACTS)], root)
    for names in (every, every[::-1]):
        found += [f"all at once: {path}" for path in differences(outcome(names, root), acting)]
    return found


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_of_two_ranks_with_each_other_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in kept_in(tmp_path).items():
        monkeypatch.setenv(variable, value)
    assert two_ranks(with_strategy, name, tmp_path, timeout=PATIENCE) == [[], []]


class Normed(Net):
    """Each rank has statistics of its own data, which it keeps as they are at each validation."""

    def __init__(self, sized: bool) -> None:
        super().__init__()
        self.sized = sized
        self.norm = torch.nn.BatchNorm1d(4)
        self.seen: list[list[float]] = []

    def forward(self, x: Tensor) -> Any:
        return self.layer(self.norm(x))

    def validation_step(self, batch: Any) -> None:
        self.seen.append(self.norm.running_mean.tolist())  # type: ignore[union-attr]
        super().validation_step(batch)

    def val_dataloader(self) -> Any:
        loader = make_loader(4, seed=2)
        return loader if self.sized else DataLoader(Streamed(loader.dataset), 2)


class Streamed(IterableDataset[Any]):
    """Samples of which nobody knows how many there are."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[index] for index in range(len(self.samples)))


def statistics(names: Names, sized: bool, root: Path) -> list[list[float]]:
    """Those that this rank has validated with."""
    module = Normed(sized)
    with quiet():
        made(names, root).fit(module)
    return module.seen


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("options", [{"ema": {"decay": 0.5}}, {"swa": {"start": 0, "buffers": "average", "validate": True}}])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_validate_with_one_average(
    strategy: str, options: dict[str, Any], sized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = options
    monkeypatch.setitem(OPTIONS, name, options[name])
    (first, second), (plain, _) = (two_ranks(statistics, names, sized, tmp_path) for names in ((strategy, name), (strategy,)))
    assert first[-1] == second[-1] != plain[-1]


# ---------------------------------------------------------------------- all pairs are made


def test_no_pair_is_left_out() -> None:
    in_process = set(itertools.combinations(IN_PROCESS, 2))
    tracked = {(name, other) for name in TRACKERS for other in (*IN_PROCESS, *TRACKERS) if name != other}
    refused = {("ray", name) for name in NAMES if name not in (*STRATEGIES, "ray")}
    shared = {(name, other) for name in STRATEGIES for other in NAMES if name != other}
    done = {frozenset(pair) for pair in (*in_process, *tracked, *refused, *shared)}
    assert done == {frozenset(pair) for pair in itertools.combinations(NAMES, 2)}
