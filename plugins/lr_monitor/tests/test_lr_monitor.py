"""What the learning-rate monitor promises: the rates that steps were taken with, under names that tell them apart."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_lr_monitor import LRMonitor

BATCHES = [torch.ones(2, 3)] * 4


class Records:
    """Keeps what loggers get: (step, metrics)."""

    def __init__(self) -> None:
        self.all: list[tuple[int, dict[str, float]]] = []

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.all.append((step, metrics))

    def of(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.all if name in metrics}

    @property
    def names(self) -> set[str]:
        return {name for _, metrics in self.all for name in metrics}


class Net(Module):
    def __init__(self, configure: Any) -> None:
        super().__init__()
        self.one, self.two, self.configure = nn.Linear(3, 3), nn.Linear(3, 1), configure

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.two(self.one(batch)).square().mean()

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Turns(Net):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


def fit(path: Any, module: Any, plugin: Any, *others: Any, **options: Any) -> Records:
    records = Records()
    defaults = {"max_epochs": 2, "log_every_n_steps": 1, "root_dir": path}
    Trainer(**{**defaults, **options}, plugins=[plugin, *others, records]).fit(module, BATCHES)
    return records


def decaying(module: Any) -> Any:
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"}]


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("lr_monitor")


def test_a_record_has_the_rate_with_which_its_step_was_taken(tmp_path: Any) -> None:
    taken = {}

    class Watch:
        @hookimpl
        def optimizer_step(self, run: Any, optimizer: Any) -> None:
            taken[run.position.step + 1] = optimizer.param_groups[0]["lr"]

    records = fit(tmp_path, Net(decaying), LRMonitor(), Watch())
    assert records.of("lr-SGD") == taken == {step: 0.1 * 0.5 ** (step - 1) for step in range(1, 9)}
    assert records.names == {"lr-SGD"}


def test_only_logging_steps_are_logged(tmp_path: Any) -> None:
    records = fit(tmp_path, Net(decaying), LRMonitor(), log_every_n_steps=3)
    assert records.of("lr-SGD") == {3: 0.1 * 0.5**2, 6: 0.1 * 0.5**5}


def test_accumulated_batches_are_one_step(tmp_path: Any) -> None:
    records = fit(tmp_path, Net(decaying), LRMonitor(), log_every_n_steps=2, accumulate_grad_batches=2)
    assert records.of("lr-SGD") == {2: 0.05, 4: 0.1 * 0.5**3}


def test_by_epoch_it_is_the_rate_at_the_beginning_of_each(tmp_path: Any) -> None:
    def by_epoch(module: Any) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1)
        return [optimizer], [ExponentialLR(optimizer, 0.5)]

    records = fit(tmp_path, Net(by_epoch), LRMonitor(logging_interval="epoch"), max_epochs=3)
    assert records.of("lr-SGD") == {0: 0.1, 4: 0.05, 8: 0.025}
    (member,) = Trainer(max_epochs=1, plugins=[LRMonitor(logging_interval="epoch")])._members
    assert list(member.hooks) == ["on_train_epoch_start", "on_train_start"]  # none at every step


def test_what_another_plugin_sets_at_the_beginning_of_an_epoch_is_seen(tmp_path: Any) -> None:
    class Sets:
        @hookimpl
        def on_train_epoch_start(self, run: Any) -> None:
            run.optimizers[0].param_groups[0]["lr"] = (1 + run.position.epoch) / 64

    records = fit(tmp_path, Net(lambda module: SGD(module.parameters(), lr=0.1)), LRMonitor(logging_interval="epoch"), Sets())
    assert records.of("lr-SGD") == {0: 1 / 64, 4: 2 / 64}


def test_groups_momentum_and_weight_decay(tmp_path: Any) -> None:
    def groups(module: Any) -> Any:
        return Adam(
            [
                {"params": module.one.parameters(), "lr": 0.1, "betas": (0.8, 0.9)},
                {"params": module.two.parameters(), "weight_decay": 0.2, "name": "head"},
            ],
            lr=0.01,
        )

    records = fit(tmp_path, Net(groups), LRMonitor(log_momentum=True, log_weight_decay=True), max_steps=1)
    assert records.all == [
        (
            1,
            {
                "lr-Adam/pg1": 0.1, "lr-Adam/pg1-momentum": 0.8, "lr-Adam/pg1-weight_decay": 0.0,
                "lr-Adam/head": 0.01, "lr-Adam/head-momentum": 0.9, "lr-Adam/head-weight_decay": 0.2,
            },
        )
    ]  # fmt: skip


def test_momentum_of_sgd_and_none_for_an_optimizer_without(tmp_path: Any) -> None:
    records = fit(tmp_path, Net(decaying), LRMonitor(log_momentum=True, log_weight_decay=True), max_steps=1)
    assert records.all == [(1, {"lr-SGD": 0.1, "lr-SGD-momentum": 0.9, "lr-SGD-weight_decay": 0.01})]
    module = Net(lambda module: torch.optim.Rprop(module.parameters(), lr=0.1))
    records = fit(tmp_path, module, LRMonitor(log_momentum=True, log_weight_decay=True), max_steps=2)
    assert records.all == [(step, {"lr-Rprop": 0.1}) for step in (1, 2)]


def test_several_optimizers_of_a_class_and_the_names_of_schedulers(tmp_path: Any) -> None:
    def several(module: Any) -> Any:
        first, second = SGD(module.one.parameters(), lr=0.1), SGD(module.two.parameters(), lr=0.2)
        third, fourth = Adam(module.two.parameters(), lr=0.3), SGD(module.two.parameters(), lr=0.4)
        warmup = {"scheduler": LambdaLR(third, lambda step: 1 / (step + 1)), "interval": "step", "name": "warmup"}
        halved = {"scheduler": ExponentialLR(first, 0.5), "interval": "step"}
        return [first, second, third, fourth], [warmup, halved]

    records = fit(tmp_path, Turns(several), LRMonitor(), max_steps=2)
    assert records.all == [
        (1, {"lr-SGD": 0.1, "lr-SGD-1": 0.2, "warmup": 0.3, "lr-SGD-2": 0.4}),
        (2, {"lr-SGD": 0.05, "lr-SGD-1": 0.2, "warmup": 0.15, "lr-SGD-2": 0.4}),
    ]


def test_names_that_come_again_are_numbered(tmp_path: Any) -> None:
    def several(module: Any) -> Any:
        first = SGD([{"params": module.one.weight, "name": "head-1"}, {"params": module.one.bias, "name": "head", "lr": 0.2}], lr=0.1)
        first.add_param_group({"params": module.two.weight, "name": "head", "lr": 0.3})
        second = SGD([module.two.bias], lr=0.4)
        return [first, second], [{"scheduler": ExponentialLR(each, 0.5), "name": "warmup"} for each in (first, second)]

    records = fit(tmp_path, Turns(several), LRMonitor(), max_steps=1)
    assert records.all == [(1, {"warmup/head-1": 0.1, "warmup/head": 0.2, "warmup/head-2": 0.3, "warmup-1": 0.4})]


def test_a_group_that_is_added_while_training_is_logged_from_then_on(tmp_path: Any) -> None:
    class Adds:
        @hookimpl
        def on_train_batch_end(self, run: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                run.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.7})

    records = fit(tmp_path, Net(lambda module: SGD(module.parameters(), lr=0.1)), LRMonitor(), Adds(), max_epochs=1)
    both = {"lr-SGD/pg1": 0.1, "lr-SGD/pg2": 0.7}
    assert records.all == [(1, {"lr-SGD": 0.1}), (2, {"lr-SGD": 0.1}), (3, both), (4, both)]


def test_a_rate_that_is_a_tensor_is_copied(tmp_path: Any) -> None:
    def tensor(module: Any) -> Any:
        optimizer = Adam(module.parameters(), lr=torch.tensor(0.5), capturable=False, foreach=False)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"}]

    records = fit(tmp_path, Net(tensor), LRMonitor(), max_steps=3)
    assert records.of("lr-Adam") == {1: 0.5, 2: 0.25, 3: 0.125}


def test_an_instance_in_two_fits_begins_anew(tmp_path: Any) -> None:
    plugin = LRMonitor()
    for _ in range(2):
        assert fit(tmp_path, Net(decaying), plugin, log_every_n_steps=8).of("lr-SGD") == {8: 0.1 * 0.5**7}


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_run_that_goes_on_logs_what_the_other_did(tmp_path: Any, interval: str, step: int) -> None:
    class Saves:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            run.save_checkpoint(tmp_path / f"{run.position.micro_step}.safetensors")

    options: Any = {"log_every_n_steps": 2, "root_dir": tmp_path, "max_epochs": 3}
    runs = []
    for extra, path in ([Saves()], None), ([], tmp_path / f"{step}.safetensors"):
        records = Records()
        trainer = Trainer(**options, plugins=[LRMonitor(logging_interval=interval), records, *extra])  # type: ignore[arg-type]
        trainer.fit(Net(decaying), BATCHES, ckpt_path=path)
        runs.append(records.all)
    whole, rest = runs
    assert rest == [record for record in whole if record[0] > step or (interval == "epoch" and record[0] == step == 4)]  # epoch 1 begins
    assert rest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logging_interval": "batch"}, "logging_interval must be 'step' or 'epoch', got 'batch'"),
        ({"logging_interval": None}, "logging_interval must be 'step' or 'epoch', got None"),
        ({"log_momentum": 1}, "log_momentum must be True or False, got 1"),
        ({"log_weight_decay": "yes"}, "log_weight_decay must be True or False, got 'yes'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, words: str) -> None:
    with pytest.raises(PluginError, match=f"plugin 'lr_monitor' .torchplug-lr-monitor 0.1.0.: {words}"):
        Trainer(max_epochs=1, plugins=[{"lr_monitor": options}])
