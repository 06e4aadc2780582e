"""A trial leaves no trace: the fit after it is bit for bit the fit without it, on any way out of the trial."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchplug import DataModule, Module, Trainer, hookimpl
from torchplug.trials import trial

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Noisy(Dataset):
    """Samples with noise from every generator, and a count of how often it was asked."""

    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> Any:
        x = torch.full((4,), index / 14) + torch.rand(4) + random.random() + float(np.random.rand())
        return x, x.sum(0, keepdim=True)


class Net(Module):
    """With everything that a step changes: weights, buffers, plain attributes, metrics, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.count, self.seen = 0, []

    def training_step(self, batch: Any) -> Any:
        self.count += 1
        self.seen.append(len(batch[0]))
        self.passing = self.passing + batch[0].mean()
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.layers(batch[0]), batch[1]) + torch.rand(()))

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.layers[0].parameters(), "lr": 0.01}, {"params": self.layers[1:].parameters(), "lr": 0.02}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"}}


class Adam(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01, amsgrad=True)


class Two(Net):
    """Two optimizers, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> Any:
        loss = super().training_step(batch)
        one, two = self.optimizers()
        one.zero_grad(), two.zero_grad()
        self.manual_backward(loss)
        one.step(), two.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.layers[0].parameters(), lr=0.01),
            torch.optim.SGD(self.layers[1:].parameters(), lr=0.01, momentum=0.9),
        ]


class Stateful(torch.utils.data.RandomSampler):
    """A sampler that remembers how often it was begun, and draws differently each time."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.begun = 0

    def __iter__(self) -> Any:
        self.begun += 1
        return iter(torch.randperm(len(self.data_source), generator=torch.Generator().manual_seed(self.begun)).tolist())

    def state_dict(self) -> dict[str, int]:
        return {"begun": self.begun}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begun = state["begun"]


class Tries:
    """Makes a trial in a hook; ``fail`` raises inside of it after so many steps."""

    def __init__(self, hook: str, steps: int, fail: bool = False, epoch: int = 0, change: Any = None) -> None:
        self.hook, self.steps, self.fail, self.epoch, self.change = hook, steps, fail, epoch, change
        self.losses: list[float] = []

    def reached(self, hook: str, run: Any) -> None:
        if hook != self.hook or run.position.epoch != self.epoch:
            return
        try:
            with trial(run) as attempt:
                for _ in range(self.steps):
                    self.losses.append(attempt.step())
                if self.change is not None:
                    self.change(run)
                if self.fail:
                    raise RuntimeError("on purpose")
        except RuntimeError as error:
            assert str(error) == "on purpose"

    @hookimpl
    def on_fit_start(self, run: Any) -> None:
        self.reached("on_fit_start", run)

    @hookimpl
    def on_train_start(self, run: Any) -> None:
        self.reached("on_train_start", run)

    @hookimpl
    def on_train_epoch_start(self, run: Any) -> None:
        self.reached("on_train_epoch_start", run)


class Listens:
    """A plugin with a state, that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        self.heard.append(run.position.micro_step)

    @hookimpl
    def log_metrics(self, metrics: Any, step: int) -> None:
        self.heard.append((step, dict(metrics)))

    def state_dict(self) -> dict[str, Any]:
        return {"heard": len(self.heard)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing has changed")


def outcome(root: Path, tries: Tries | None, net: type[Net] = Net, loading: Any = None, **options: Any) -> list[Any]:
    """Everything that a fit comes to."""
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    module, listens = net(), Listens()
    train = DataLoader(Noisy(), 2, **{"shuffle": True, **(loading or {})}) if not callable(loading) else loading()
    defaults: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 1, "accelerator": "cpu", "num_sanity_val_steps": 1}
    plugins = [listens, "journal", "early_stopping" if "monitor" in options else "csv", *([tries] if tries else [])]
    trainer = Trainer(root_dir=root, plugins=plugins, **{**defaults, **options})
    trainer.fit(module, train, DataLoader(Noisy(), 7))
    run = trainer.run
    assert run is not None
    tensors = [*module.state_dict().values(), module.passing, torch.get_rng_state()]
    moments = [value for optimizer in run.optimizers for state in optimizer.state.values() for value in state.values()]
    rates = [group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups]
    numbers = random.getstate(), np.random.get_state()[1].tolist()
    values = [[each.tolist() if hasattr(each, "tolist") else each for each in several] for several in (tensors, moments)]
    return [values, rates, module.count, module.seen, dict(trainer.metrics), listens.heard, numbers, dataclasses.asdict(run.position)]


PERSISTENT = {"num_workers": 2, "persistent_workers": True}


@pytest.mark.parametrize("fail", [False, True], ids=["", "with an error"])
@pytest.mark.parametrize(
    ("hook", "epoch"), [("on_fit_start", 0), ("on_train_start", 0), ("on_train_epoch_start", 0), ("on_train_epoch_start", 1)]
)
@pytest.mark.parametrize(
    ("net", "loading", "options"),
    [
        (Net, None, {}),
        (Adam, None, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
        (Two, None, {}),
        (Net, {"num_workers": 2}, {}),
        (Net, PERSISTENT, {"precision": "bf16-mixed"}),
        (Net, {"generator": "own"}, {"limit_train_batches": 3}),
        (Net, {"sampler": "stateful"}, {}),
    ],
    ids=["plain", "Adam, accumulation", "two by hand", "workers", "persistent workers", "own generator, limit", "stateful sampler"],
)
def test_a_fit_after_a_trial_is_the_fit_without_it(
    net: type[Net], loading: Any, options: dict[str, Any], hook: str, epoch: int, fail: bool, tmp_path: Path
) -> None:
    def given() -> Any:
        own = dict(loading or {})
        if own.get("generator") == "own":
            own["generator"] = torch.Generator().manual_seed(3)
        if own.get("sampler") == "stateful":
            own |= {"sampler": Stateful(Noisy()), "shuffle": False}
        return own

    whole = outcome(tmp_path / "whole", None, net, given(), **options)
    tries = Tries(hook, 9, fail, epoch)  # more steps than an epoch has
    tried = outcome(tmp_path / "tried", tries, net, given(), **options)
    assert len(tries.losses) == 9 and len(set(tries.losses)) == 9, "the steps did train"
    assert tried == whole


def test_what_a_trial_changes_by_hand_is_put_back_too(tmp_path: Path) -> None:
    def change(run: Any) -> None:
        run.request_stop("enough")
        run.options.accumulate_grad_batches = 5
        run.module.eval()
        run.module.count, run.module.new = 77, [1]
        run.module.layers[0].weight.requires_grad_(False)
        run.optimizers[0].param_groups[0]["lr"] = 9.0
        run.optimizers[0].param_groups[0]["weight_decay"] = 1.0
        run.schedulers[0].scheduler.base_lrs[0] = 5.0
        run.log("unwanted", 1.0)
        run.position.step = 99

    whole = outcome(tmp_path / "whole", None)
    assert outcome(tmp_path / "tried", Tries("on_train_start", 2, change=change)) == whole


def test_a_plugin_whose_state_has_changed_gets_it_back(tmp_path: Path) -> None:
    class Counts:
        def __init__(self) -> None:
            self.value, self.loaded = 1, []

        @hookimpl
        def on_train_start(self, run: Any) -> None:
            with trial(run):
                self.value = 5

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loaded.append(state)

    counts = Counts()
    Trainer(max_epochs=1, plugins=[counts], root_dir=tmp_path, accelerator="cpu").fit(Net(), DataLoader(Noisy(), 2))
    assert counts.loaded == [{"value": 1}]


def test_a_signal_that_comes_inside_is_not_lost(tmp_path: Path) -> None:
    def interrupt(run: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        outcome(tmp_path, Tries("on_train_start", 1, change=interrupt))


def test_gradients_that_are_there_come_back(tmp_path: Path) -> None:
    class Has(Net):
        def on_train_start(self) -> None:
            for parameter in self.parameters():
                parameter.grad = torch.full_like(parameter, 2.0)
            with trial(self.run) as attempt:
                attempt.step()
            assert all(torch.equal(parameter.grad, torch.full_like(parameter, 2.0)) for parameter in self.parameters())
            self.zero_grad()
            self.done = True

    module = Has()
    Trainer(max_epochs=1, plugins=[], root_dir=tmp_path, accelerator="cpu").fit(module, DataLoader(Noisy(), 2))
    assert module.done


def test_a_data_module_keeps_its_place(tmp_path: Path) -> None:
    class Data(DataModule):
        def __init__(self) -> None:
            super().__init__()
            self.given = 0

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.ones(8, 4), torch.ones(8, 1)), 2)

        def state_dict(self) -> dict[str, int]:
            return {"given": self.given}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.given = state["given"]

        def on_train_batch_start(self) -> None:
            self.given += 1

    data, tries = Data(), Tries("on_train_start", 3)
    Trainer(max_epochs=1, plugins=[tries], root_dir=tmp_path, accelerator="cpu").fit(Net(), datamodule=data)
    assert data.given == 4 and len(tries.losses) == 3


def test_data_that_can_be_passed_over_once_are_refused(tmp_path: Path) -> None:
    batches = iter([(torch.ones(2, 4), torch.ones(2, 1))] * 5)
    with pytest.raises(TypeError, match=r"the training data are an iterator .*, which cannot be begun again; give a DataLoader or a list"):
        Trainer(max_epochs=1, plugins=[Tries("on_train_start", 1)], root_dir=tmp_path, accelerator="cpu").fit(Net(), batches)
    assert len(list(batches)) == 5


def test_the_loss_is_the_mean_over_the_batches_of_a_step(tmp_path: Path) -> None:
    class Constant(Net):
        def training_step(self, batch: Any) -> Any:
            self.count += 1
            return self.layers(batch[0]).sum() * 0 + float(self.count)

    tries = Tries("on_train_start", 2)
    module = Constant()
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 3, "accelerator": "cpu", "num_sanity_val_steps": 0}
    Trainer(plugins=[tries], root_dir=tmp_path, **options).fit(module, DataLoader(Noisy(), 2))
    assert tries.losses == [2.0, 5.0] and module.count == 7


def test_a_signal_that_comes_in_a_trial_ends_the_run(tmp_path: Path) -> None:
    def change(run: Any) -> None:
        run.interrupted = "SIGTERM"

    module = Net()
    with pytest.raises(SystemExit):
        outcome_of(tmp_path, module, Tries("on_train_start", 2, change=change))
    assert module.count == 0


def outcome_of(root: Path, module: Module, *plugins: Any, val: Any = None, train: Any = None, **options: Any) -> Any:
    trainer = Trainer(**{"max_epochs": 1, "root_dir": root, "accelerator": "cpu", "num_sanity_val_steps": 0, "plugins": plugins, **options})
    trainer.fit(module, DataLoader(Noisy(), 2) if train is None else train, val)
    return trainer.run


class Evaluates:
    """Validates in a trial, after some steps."""

    def __init__(self, batches: int) -> None:
        self.batches, self.seen, self.heard = batches, [], 0

    @hookimpl
    def on_validation_batch_end(self) -> None:
        self.heard += 1

    @hookimpl
    def on_train_start(self, run: Any) -> None:
        with trial(run) as attempt:
            attempt.step()
            attempt.evaluate(self.batches)
            self.seen = list(run.module.sizes)
            assert run.module.layers.training and run.position.stage == "train"
            attempt.step()


class Sized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def validation_step(self, batch: Any) -> None:
        assert not self.layers.training and not torch.is_grad_enabled()
        self.sizes.append(len(batch[0]))
        super().validation_step(batch)


@pytest.mark.parametrize(("batches", "sizes"), [(1, [4, 3]), (2, [4, 4, 3, 3]), (9, [4, 4, 4, 2, 3, 3, 3, 3, 2])])
def test_a_trial_validates_on_the_first_batches_of_each_loader(batches: int, sizes: list[int], tmp_path: Path) -> None:
    evaluates, val = Evaluates(batches), [DataLoader(Noisy(), 4), DataLoader(Noisy(), 3)]
    module = Sized()
    whole, run = outcome_of(tmp_path, Sized(), val=val), outcome_of(tmp_path, module, evaluates, val=val)
    assert evaluates.seen == sizes and evaluates.heard == 9
    assert module.sizes == [4, 4, 4, 2, 3, 3, 3, 3, 2] == whole.module.sizes
    assert list(run.metrics.results()) == list(whole.metrics.results())


def test_without_validation_nothing_is_evaluated(tmp_path: Path) -> None:
    evaluates = Evaluates(2)
    outcome_of(tmp_path, Sized(), evaluates)
    assert evaluates.seen == []


def test_a_trial_tells_the_largest_batch_of_a_step(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Looks:
        @hookimpl
        def on_train_start(self, run: Any) -> None:
            with trial(run) as attempt:
                for _ in range(3):
                    attempt.step()
                    sizes.append(attempt.size)

    outcome_of(tmp_path, Net(), Looks(), train=DataLoader(Noisy(), 6))
    assert sizes == [6, 6, 2]


class Reloads:
    """Makes loaders and optimizers anew, with batches of another size: in a trial, and for the run."""

    def __init__(self, *sizes: int) -> None:
        self.sizes, self.seen = sizes, []

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        before = run.loaders, run.stream, run.optimizers, run.num_batches, run.total_steps
        for size in self.sizes[:-1]:
            with trial(run) as attempt:
                run.module.size = size
                attempt.reload()
                assert run.optimizers[0] is not before[2][0]
                attempt.step()
                self.seen.append((attempt.size, run.num_batches, run.total_steps))
            assert (run.loaders, run.stream, run.optimizers, run.num_batches, run.total_steps) == before
        run.module.size = self.sizes[-1]
        run.reload()


class Loads(Net):
    """Draws while loaders are made, and asks the run how long it will be."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def train_dataloader(self) -> Any:
        return DataLoader(torch.utils.data.random_split(Noisy(), [12, 2])[0], self.size, shuffle=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.run.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_a_run_whose_loaders_are_made_anew_is_the_one_that_began_with_them(precision: str, tmp_path: Path) -> None:
    def result(module: Loads, *plugins: Any) -> Any:
        random.seed(1), np.random.seed(1)
        trainer = Trainer(max_epochs=3, root_dir=tmp_path, accelerator="cpu", plugins=plugins, precision=precision, seed=3)
        trainer.fit(module)
        moments = [value.tolist() for state in trainer.run.optimizers[0].state.values() for value in state.values() if value is not None]
        weights = [value.tolist() for value in module.state_dict().values()]
        return (
            weights,
            moments,
            module.seen,
            dict(trainer.metrics),
            torch.get_rng_state().tolist(),
            dataclasses.asdict(trainer.run.position),
        )

    torch.manual_seed(0)
    expected = result(Loads(4))
    torch.manual_seed(0)
    reloads = Reloads(3, 12, 4)
    assert result(Loads(2), reloads) == expected
    assert reloads.seen == [(3, 4, 12), (12, 1, 3)]


@pytest.mark.parametrize("where", ["on_before_optimizer_step", "on_after_optimizer_step"])
def test_a_step_that_is_broken_off_leaves_the_loss_scaler_usable(where: str, tmp_path: Path) -> None:
    class Breaks(Two):
        breaks = True

    def hook(self: Any, optimizer: Any) -> None:
        if self.breaks and (where == "on_before_optimizer_step" or optimizer is self.run.optimizers[0]):
            raise RuntimeError("on purpose")

    setattr(Breaks, where, hook)

    class Tries2:
        @hookimpl
        def on_run_start(self, run: Any) -> None:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="on purpose"), trial(run) as attempt:
                    for _ in range(30):
                        attempt.step()
            run.module.breaks = False

    module = Breaks()
    run = outcome_of(tmp_path, module, Tries2(), precision="16-mixed", max_epochs=4)
    assert run.position.step > 5
