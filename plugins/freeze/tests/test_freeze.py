"""What is frozen stays bit for bit, what is unfrozen trains as a hand-written loop with the same groups trains it."""

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, PluginError, Trainer, hookimpl, seed_everything
from torchplug.testing import check_plugin
from torchplug.trials import trial
from torchplug_freeze import Freeze

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)) + 2.0


def loader() -> Any:
    return DataLoader(TensorDataset(X), batch_size=3, shuffle=True)  # 4 batches


def parts() -> nn.ModuleDict:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.ModuleDict(
            {
                "backbone": nn.Sequential(
                    nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2)
                ),
                "head": nn.Linear(4, 1),
            }
        )


def loss_of(net: nn.ModuleDict, x: Tensor) -> Tensor:
    return (net["head"](net["backbone"](x)) - 1).square().mean()


def sgd(module: Any) -> Any:
    return SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


class Net(Module):
    def __init__(self, configure: Any = sgd) -> None:
        super().__init__()
        self.net, self.configure = parts(), configure

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = loss_of(self.net, batch[0])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.net, batch[0]))

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Watch:
    """The state of the module, its gradients and rates, at the end of every epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.trained: list[set[str]] = []
        self.rates: list[list[float]] = []
        self.moved: set[str] = set()

    @hookimpl
    def on_before_optimizer_step(self, run: Any) -> None:
        self.trained.append({name for name, p in run.module.named_parameters() if p.grad is not None})
        self.rates.append([float(group["lr"]) for group in run.optimizers[0].param_groups])

    @hookimpl
    def on_train_epoch_end(self, run: Any) -> None:
        self.states.append({name: value.clone() for name, value in run.module.state_dict().items()})


def fit(path: Any, module: Any, *plugins: Any, data: Any = None, val: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    seed_everything(5)
    trainer = Trainer(**{"max_epochs": 4, "root_dir": path, "log_every_n_steps": 1, **options}, plugins=list(plugins))
    trainer.fit(module, loader() if data is None else data, val, ckpt_path=ckpt_path)
    return trainer.run


def differing(one: Any, other: Any) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


PARAMETERS = {name for name, _ in Net().named_parameters()}
BACKBONE = {name for name in PARAMETERS if "backbone" in name}
HEAD = PARAMETERS - BACKBONE
START = {name: value.clone() for name, value in Net().state_dict().items()}
STAGED = {"frozen": ["net.backbone"], "unfreeze": {1: {"net.backbone.3": 0.05, "net.backbone.4": 0.05}, 3: {"net.backbone": 0.01}}}


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("freeze", frozen=["layer.bias"])


def test_what_is_frozen_stays_bit_for_bit_with_its_statistics(tmp_path: Any) -> None:
    module = Net()
    run = fit(tmp_path, module, Freeze(frozen=["net.backbone"]), val=loader())
    assert differing(module.state_dict(), START) == HEAD
    assert all(not run.optimizers[0].state.get(p) for name, p in module.named_parameters() if name in BACKBONE)


def test_a_gradient_that_is_left_over_from_before_moves_nothing(tmp_path: Any) -> None:
    module = Net()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    fit(tmp_path, module, Freeze(frozen=["net.backbone"]))
    assert differing(module.state_dict(), START) == HEAD


def test_frozen_normalization_normalizes_with_its_statistics_and_dropout_goes_on(tmp_path: Any) -> None:
    modes: list[dict[str, bool]] = []

    class Modes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            modes.append({name: each.training for name, each in self.net["backbone"].named_children()})
            return super().training_step(batch, batch_idx)

    module = Modes()
    fit(tmp_path, module, Freeze(frozen=["net.backbone"], unfreeze={2: ["net.backbone.4"]}), val=loader(), val_check_interval=1)
    frozen = {"0": True, "1": False, "2": True, "3": True, "4": False, "5": True}
    assert modes == [frozen] * 8 + [{**frozen, "4": True}] * 8
    moved = differing(module.state_dict(), START)
    assert {"net.backbone.4.running_mean", "net.backbone.4.running_var", "net.backbone.4.weight"} <= moved
    assert not {name for name in moved if "backbone.1" in name or "backbone.0" in name or "backbone.3" in name}


def test_parts_are_trained_from_their_epoch_on(tmp_path: Any) -> None:
    class Earlier:
        """Is listed first, and sees all the same what is trained in the epoch."""

        @hookimpl
        def on_train_epoch_start(self, run: Any) -> None:
            seen.append({name for name, p in run.module.named_parameters() if p.requires_grad})

    watch, seen = Watch(), list[set[str]]()
    fit(tmp_path, Net(), Earlier(), Freeze(**STAGED), watch)
    assert seen == watch.trained[::4]
    second = {name for name in BACKBONE if ".3." in name or ".4." in name}
    assert watch.trained == [HEAD] * 4 + [HEAD | second] * 8 + [PARAMETERS] * 4
    changed = [differing(a, b) & PARAMETERS for a, b in zip(watch.states, [START, *watch.states], strict=False)]
    assert changed == [HEAD, HEAD | second, HEAD | second, PARAMETERS]


def by_hand(configure: Any, epochs: int, stages: list[Any], scheduler: Any = None) -> nn.ModuleDict:
    """The plain loop: groups ``[head, *parts of the stages]``, parts without gradients and in eval mode until their epoch."""
    seed_everything(5)
    net, data = parts(), loader()
    groups = [[p for name, p in net.named_parameters() if name.startswith("head")]]
    groups += [[p for name, p in net.named_parameters() if name.startswith(prefixes)] for _, prefixes, _ in stages]
    optimizer = configure(groups)
    schedule = scheduler(optimizer) if scheduler else None
    for epoch in range(epochs):
        for first, prefixes, _ in stages:
            for name, p in net.named_parameters():
                if name.startswith(prefixes):
                    p.requires_grad_(epoch >= first)
            for name, layer in net.named_modules():
                if name.startswith(prefixes) and isinstance(layer, nn.BatchNorm1d):
                    layer.train(epoch >= first)
        for (x,) in data:
            loss_of(net, x).backward()
            optimizer.step()
            optimizer.zero_grad()
        if schedule:
            schedule.step()
    return net


STAGES = [(1, ("backbone.3", "backbone.4"), 0.05), (3, ("backbone.0", "backbone.1"), 0.013)]
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda ps: Adam(ps, lr=0.1, weight_decay=0.01),
    "AdamW": lambda ps: AdamW(ps, lr=0.1),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
}
ONE_EACH = {"frozen": ["net.backbone"], "unfreeze": {1: {"net.backbone.[34]": 0.05}, 3: {"net.backbone": 0.013}}}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_bit_for_bit_those_of_a_loop_with_the_same_groups(tmp_path: Any, name: str) -> None:
    make = OPTIMIZERS[name]
    module = Net(lambda module: make(module.parameters()))
    run = fit(tmp_path, module, Freeze(**ONE_EACH))

    def grouped(groups: Any) -> Any:
        return make([{"params": groups[0]}, *({"params": group, "lr": lr} for group, (_, _, lr) in zip(groups[1:], STAGES, strict=True))])

    hand = by_hand(grouped, 4, STAGES)
    assert differing(module.net.state_dict(), hand.state_dict()) == set()
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.1, 0.05, 0.013]
    assert [len(group["params"]) for group in run.optimizers[0].param_groups] == [2, 4, 4]


def warmup(epoch: int) -> float:
    return (epoch + 1) / 4


SCHEDULES: dict[str, Any] = {
    "lambda": lambda o: schedules.LambdaLR(o, warmup),
    "multiplied": lambda o: schedules.MultiplicativeLR(o, lambda epoch: 0.5),
    "step": lambda o: schedules.StepLR(o, 2, 0.1),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 4),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.7),
    "linear": lambda o: schedules.LinearLR(o, 0.25, total_iters=3),
    "polynomial": lambda o: schedules.PolynomialLR(o, 6),
    "one after another": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.5, total_iters=1), schedules.CosineAnnealingLR(o, 3)], [1]
    ),
    "chained": lambda o: schedules.ChainedScheduler([schedules.LinearLR(o, 0.5, total_iters=2), schedules.ExponentialLR(o, 0.9)]),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR of torch 2.6 gives it itself
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_treat_new_groups_as_if_they_had_always_been_there(tmp_path: Any, name: str) -> None:
    make = SCHEDULES[name]

    def configure(module: Any) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [make(optimizer)]

    def grouped(groups: Any) -> Any:
        rates = [0.1, *(lr for _, _, lr in STAGES)]
        return SGD([{"params": group, "lr": lr} for group, lr in zip(groups, rates, strict=True)], momentum=0.9)

    module, watch = Net(configure), Watch()
    fit(tmp_path, module, Freeze(**ONE_EACH), watch)
    hand = by_hand(grouped, 4, STAGES, make)
    reference = grouped([[nn.Parameter(torch.ones(1))] for _ in range(3)])
    schedule, rates = make(reference), []
    for _ in range(4):
        rates += [[group["lr"] for group in reference.param_groups]] * 4
        reference.step()
        schedule.step()
    assert watch.rates == [pytest.approx(each, rel=1e-12) for each in rates]
    for own, other in zip(module.net.state_dict().values(), hand.state_dict().values(), strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-7)


def test_one_cycle_takes_the_rate_as_its_highest(tmp_path: Any) -> None:
    def configure(module: Any) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": schedules.OneCycleLR(optimizer, 0.4, total_steps=16), "interval": "step"}]

    watch = Watch()
    fit(tmp_path, Net(configure), Freeze(frozen=["net.backbone"], unfreeze={1: {"net.backbone": 0.04}}), watch)
    assert max(rates[0] for rates in watch.rates) == pytest.approx(0.4, rel=0.05)
    assert all(rates[1] == pytest.approx(rates[0] / 10, rel=1e-9) for rates in watch.rates)


def test_cyclic_and_plateau_have_lists_by_group(tmp_path: Any) -> None:
    def cyclic(module: Any) -> Any:
        optimizer = SGD(module.parameters(), lr=0.01, momentum=0.9)
        return [optimizer], [{"scheduler": schedules.CyclicLR(optimizer, 0.01, 0.05, step_size_up=4), "interval": "step"}]

    def plateau(module: Any) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": schedules.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, min_lr=[0.001]),
            "monitor": "loss_epoch",
        }

    watch, other = Watch(), Watch()
    fit(tmp_path, Net(cyclic), Freeze(frozen=["net.backbone"], unfreeze={1: {"net.backbone": 0.005}}), watch)
    assert [round(rates[0], 6) for rates in watch.rates[:5]] == [0.01, 0.02, 0.03, 0.04, 0.05]
    assert all(rates[1] == pytest.approx(rates[0] / 2) for rates in watch.rates)
    fit(tmp_path, Net(plateau), Freeze(frozen=["net.backbone"], unfreeze={1: {"net.backbone": 0.05}}), other, max_epochs=5)
    assert other.rates[-1][0] < 0.02 and other.rates[-1][1] == pytest.approx(max(other.rates[-1][0] / 2, 0.001))


def test_a_rate_of_none_is_that_of_the_group_it_comes_from_and_options_follow(tmp_path: Any) -> None:
    def configure(module: Any) -> Any:
        weights = [p for name, p in module.named_parameters() if name.endswith("weight")]
        others = [p for name, p in module.named_parameters() if not name.endswith("weight")]
        return AdamW(
            [{"params": weights, "weight_decay": 0.3, "name": "decayed"}, {"params": others, "lr": 0.2, "weight_decay": 0.0}], lr=0.1
        )

    options: Any = {"frozen": ["net.backbone"], "unfreeze": {1: ["net.backbone.3"], 2: {"net.backbone": 0.5}}}
    run = fit(tmp_path, Net(configure), Freeze(**options))
    found = [(group["lr"], group["weight_decay"], group.get("name"), len(group["params"])) for group in run.optimizers[0].param_groups]
    assert found == [
        (0.1, 0.3, "decayed", 1), (0.2, 0.0, None, 1),
        (0.1, 0.3, "decayed/net.backbone.3", 1), (0.2, 0.0, None, 1),
        (0.5, 0.3, "decayed/net.backbone", 3), (0.5, 0.0, None, 3),
    ]  # fmt: skip


def test_tensor_rates_and_named_parameters(tmp_path: Any) -> None:
    def configure(module: Any) -> Any:
        optimizer = SGD(module.named_parameters(), lr=torch.tensor(0.1), foreach=False)
        return [optimizer], [schedules.ExponentialLR(optimizer, 0.5)]

    watch = Watch()
    run = fit(tmp_path, Net(configure), Freeze(frozen=["net.backbone"], unfreeze={1: {"net.backbone.0": 0.05}, 2: ["net.backbone"]}), watch)
    rates = [[rate * 0.5**epoch for rate in (0.1, 0.05, 0.1)] for epoch in range(4) for _ in range(4)]
    assert watch.rates == [pytest.approx(each) for each in rates]
    groups = run.optimizers[0].param_groups
    assert groups[0]["lr"] is not groups[2]["lr"]  # schedulers write into it
    assert [sorted(group["param_names"]) for group in groups[:2]] == [
        ["net.head.bias", "net.head.weight"],
        ["net.backbone.0.bias", "net.backbone.0.weight"],
    ]


def test_several_optimizers_keep_their_own(tmp_path: Any) -> None:
    class Turns(Net):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            return loss_of(self.net, batch[0])

        def configure_optimizers(self) -> Any:
            return [SGD(self.net["head"].parameters(), lr=0.1), Adam(self.net["backbone"].parameters(), lr=0.2)]

    class Skips(Turns):
        """The second optimizer has nothing to train in the first epoch."""

        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            return None if optimizer_idx == 1 and self.current_epoch == 0 else super().training_step(batch, batch_idx, optimizer_idx)

    run = fit(tmp_path, Skips(), Freeze(frozen=["net.backbone"], unfreeze={1: {"net.backbone": 0.05}}))
    assert [[(group["lr"], len(group["params"])) for group in optimizer.param_groups] for optimizer in run.optimizers] == [
        [(0.1, 2)], [(0.2, 0), (0.05, 8)]
    ]  # fmt: skip
    assert differing(run.module.state_dict(), START) >= PARAMETERS


def test_wildcards_take_names_across_dots_and_the_first_pattern_wins(tmp_path: Any) -> None:
    watch = Watch()
    fit(tmp_path, Net(), Freeze(frozen=["*.bias", "net.backbone.?"], unfreeze={2: ["*backbone*weight", "net.head"], 3: ["net"]}), watch)
    weights = {name for name in PARAMETERS if name.endswith("weight")}
    assert watch.trained[0] == {"net.head.weight"}
    assert watch.trained[8] == weights | {"net.head.bias"}
    assert watch.trained[12] == PARAMETERS


def test_a_parameter_that_is_shared_is_frozen_under_each_of_its_names(tmp_path: Any) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.net["backbone"][0]

    module, watch = Tied(), Watch()
    fit(tmp_path, module, Freeze(frozen=["again"], unfreeze={1: {"again": 0.5}}), watch)
    assert "net.backbone.0.weight" not in watch.trained[0] and "net.backbone.0.weight" in watch.trained[4]


@pytest.mark.parametrize("place", [0, 1])
def test_optimizers_that_are_made_anew_when_the_run_starts_get_the_groups_too(tmp_path: Any, place: int) -> None:
    class Reloads:
        """What a batch size finder does."""

        @hookimpl
        def on_run_start(self, run: Any) -> None:
            run.reload()

    plugins = [Freeze(**ONE_EACH)]
    plugins.insert(place, Reloads())  # type: ignore[arg-type]
    run, plain = fit(tmp_path, Net(scheduled), *plugins), fit(tmp_path, Net(scheduled), Freeze(**ONE_EACH))
    assert _alike(run.state()["optimizers"], plain.state()["optimizers"])
    assert differing(run.module.state_dict(), plain.module.state_dict()) == set()


def test_optimizers_that_are_made_anew_in_a_trial_or_while_tuning_have_the_groups_too(tmp_path: Any) -> None:
    sizes: list[list[int]] = []

    class Tunes:
        @hookimpl
        def tune(self, run: Any) -> Any:
            with trial(run) as attempt:
                attempt.reload()
                sizes.append([len(group["params"]) for group in run.optimizers[0].param_groups])
            run.reload()
            sizes.append([len(group["params"]) for group in run.optimizers[0].param_groups])
            return {}

    Trainer(max_epochs=1, root_dir=tmp_path, plugins=[Freeze(**STAGED), Tunes()]).tune(Net(), loader())
    assert sizes == [[2, 2, 2, 4]] * 2, "the head, two layers of epoch 1, the rest of epoch 3"


def test_a_learning_rate_is_looked_for_with_the_parts_that_are_frozen_in_the_fit(tmp_path: Any) -> None:
    from torchplug_lr_finder import LearningRateFinder, lr_find

    finder, module = LearningRateFinder(steps=12), Net()
    fit(tmp_path, Net(), Freeze(**STAGED), finder)
    seed_everything(5)
    found = lr_find(Trainer(root_dir=tmp_path, plugins=[Freeze(**STAGED)]), module, loader(), steps=12)
    assert finder.result is not None and found.losses == finder.result.losses
    assert all(parameter.requires_grad for parameter in module.parameters()) and differing(module.state_dict(), START) == set()


@pytest.mark.parametrize("place", [0, 1])
def test_rates_that_are_scaled_with_the_batch_size_keep_their_ratios(tmp_path: Any, place: int) -> None:
    plugins: list[Any] = [Freeze(**STAGED)]
    plugins.insert(place, {"batch_size_finder": {"init": 6, "max": 6, "scale_lr": "linear", "evaluate": False}})
    run = fit(tmp_path, Net(), *plugins, max_epochs=1)
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    assert rates == pytest.approx([0.2, 0.1, 0.1, 0.02]), "twice those of batches of 3"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{"ddp": {"start_method": "fork"}}, {"fsdp": {"start_method": "fork", "wrap": ["Linear"]}}], ids=str)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_ranks_train_what_one_process_trains(tmp_path: Any, strategy: Any) -> None:
    """Without BatchNorm and dropout, which see the samples of their rank alone."""

    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net["backbone"] = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))

    stages = {"frozen": ["net.backbone"], "unfreeze": {1: {"net.backbone.2": 0.05}, 3: ["net.backbone"]}}
    options: dict[str, Any] = {"max_epochs": 5, "accelerator": "cpu"}
    seed_everything(1)
    one, two = Plain(), Plain()
    two.load_state_dict(one.state_dict())
    fit(tmp_path, one, Freeze(**stages), data=DataLoader(TensorDataset(X), 6), **options)
    fit(tmp_path, two, Freeze(**stages), data=DataLoader(TensorDataset(X), 3), strategy=strategy, devices=2, **options)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert all(parameter.requires_grad for parameter in two.parameters())


def test_keys_that_are_texts_as_in_json_are_epochs() -> None:
    given: Any = {"3": ["net.head"], 1: {"net.backbone": 0.5}}
    plugin = Freeze(frozen=["net"], unfreeze=given)
    assert plugin.unfreeze == {1: {"net.backbone": 0.5}, 3: ["net.head"]} and "3" in given
    assert plugin.state_dict()["unfreeze"] == [[1, "net.backbone", 0.5], [3, "net.head", None]]


def test_from_epoch_0_on_a_part_has_only_a_rate_of_its_own(tmp_path: Any) -> None:
    module, other = (
        Net(),
        Net(lambda m: SGD([{"params": m.net["head"].parameters()}, {"params": m.net["backbone"].parameters(), "lr": 0.01}], lr=0.1)),
    )
    module.configure = lambda m: SGD(m.parameters(), lr=0.1)
    fit(tmp_path, module, Freeze(frozen=["net.backbone"], unfreeze={0: {"net.backbone": 0.01}}))
    fit(tmp_path, other)
    assert differing(module.state_dict(), other.state_dict()) == set()


def test_afterwards_everything_is_as_trainable_as_before_also_after_an_error(tmp_path: Any) -> None:
    class Fails:
        @hookimpl
        def on_train_epoch_end(self) -> None:
            raise ZeroDivisionError

    module = Net()
    module.net["head"].bias.requires_grad_(False)
    for plugins in ([], [Fails()]):
        with suppress(ZeroDivisionError):
            fit(tmp_path, module, Freeze(frozen=["net"], unfreeze={0: ["net.head.weight"]}), *plugins)
        assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"net.head.bias"}
        assert all(layer.training for layer in module.modules())


@pytest.mark.parametrize("every", [True, False])
def test_what_somebody_else_fixed_is_not_unfrozen(tmp_path: Any, every: bool) -> None:
    def configure(module: Any) -> Any:
        return SGD([p for p in module.parameters() if every or p.requires_grad], lr=0.1, weight_decay=0.1)

    module = Net(configure)
    module.net["backbone"][0].weight.requires_grad_(False)
    fit(tmp_path, module, Freeze(frozen=["net.backbone"], unfreeze={1: ["net.backbone"]}))
    assert differing(module.state_dict(), START) & PARAMETERS == PARAMETERS - {"net.backbone.0.weight"}
    with pytest.raises(
        ValueError, match=r"is no parameter that is frozen until then .*; what has requires_grad=False before the run stays so"
    ):
        fit(tmp_path, module, Freeze(frozen=["net.backbone"], unfreeze={1: ["net.backbone.0.weight"]}))


def test_a_layer_that_somebody_else_put_into_eval_mode_stays_there(tmp_path: Any) -> None:
    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net["backbone"][1].eval()

    module = Own()
    fit(tmp_path, module, Freeze(frozen=["net.backbone"], unfreeze={1: ["net.backbone"]}))
    assert not {name for name in differing(module.state_dict(), START) if "1.running" in name}
    assert {name for name in differing(module.state_dict(), START) if "4.running" in name}


# ---------------------------------------------------------------------- a run that goes on from a checkpoint


class Saves:
    """Saves after every batch, at every epoch's end, and when training begins and ends."""

    def __init__(self, path: Any) -> None:
        self.path = path

    @hookimpl
    def on_train_start(self, run: Any) -> None:
        run.save_checkpoint(self.path / "start.safetensors")

    @hookimpl
    def on_train_epoch_start(self, run: Any) -> None:
        run.save_checkpoint(self.path / f"begin-{run.position.epoch}.safetensors")

    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        run.save_checkpoint(self.path / f"{run.position.micro_step}.safetensors")

    @hookimpl
    def on_train_epoch_end(self, run: Any) -> None:
        run.save_checkpoint(self.path / f"end-{run.position.epoch}.safetensors")


def scheduled(module: Any) -> Any:
    optimizer = Adam(module.parameters(), lr=0.05, weight_decay=0.01)
    return [optimizer], [schedules.LambdaLR(optimizer, warmup), {"scheduler": schedules.ExponentialLR(optimizer, 0.97), "interval": "step"}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Any:
    path = tmp_path_factory.mktemp("whole")
    run = fit(path, Net(scheduled), Freeze(**STAGED), Saves(path), val=loader())
    return path, run.state(), run.metrics.results()


POINTS = ["start", *range(1, 16), *(f"begin-{i}" for i in range(4)), *(f"end-{i}" for i in range(3))]


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_goes_on_from_any_batch_is_the_uninterrupted_one(tmp_path: Any, whole: Any, point: Any) -> None:
    path, state, metrics = whole
    torch.manual_seed(99)
    run = fit(tmp_path, Net(scheduled), Freeze(**STAGED), val=loader(), ckpt_path=path / f"{point}.safetensors")
    own = run.state()
    for name in ("module", "optimizers", "schedulers", "generators", "position", "plugins"):
        assert _alike(own[name], state[name]), name
    assert run.metrics.results() == metrics


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other) if not hasattr(one, "shape") else bool((one == other).all())


@pytest.mark.parametrize("point", ["start", 6, "end-1"])
def test_a_module_that_was_in_eval_mode_goes_on_in_the_same_way(tmp_path: Any, whole: Any, point: Any) -> None:
    path, state, _ = whole
    run = fit(tmp_path, Net(scheduled).eval(), Freeze(**STAGED), val=loader(), ckpt_path=path / f"{point}.safetensors")
    assert differing(run.module.state_dict(), state["module"]) == set()


@pytest.mark.parametrize("epochs", [[1, 4], [2, 3, 4], [3, 4]])
def test_a_second_fit_with_more_epochs_is_one_longer_run(tmp_path: Any, whole: Any, epochs: list[int]) -> None:
    seed_everything(5)
    trainer, module, data, val = (
        Trainer(max_epochs=1, root_dir=tmp_path, plugins=[Freeze(**STAGED)], log_every_n_steps=1),
        Net(scheduled),
        loader(),
        loader(),
    )
    for last in epochs:
        trainer.max_epochs = last
        trainer.fit(module, data, val)
    assert differing(module.state_dict(), whole[1]["module"]) == set()


def test_other_options_are_refused(tmp_path: Any, whole: Any) -> None:
    other: Any = {**STAGED, "frozen": ["net.backbone", "net.head.bias"]}
    with pytest.raises(
        ValueError, match=r"written with frozen=\['net.backbone'\], now it is \['net.backbone', 'net.head.bias'\]; set it back"
    ):
        fit(tmp_path, Net(scheduled), Freeze(**other), ckpt_path=whole[0] / "5.safetensors")


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frozen": ["net.bakbone"]}, r"frozen: 'net.bakbone' is nothing in the module, did you mean 'net.backbone'\?"),
        (
            {"frozen": ["net.head"], "unfreeze": {1: ["net.backbone"]}},
            r"unfreeze: 'net.backbone' of epoch 1 is no parameter that is frozen until then .frozen: \['net.head'\].",
        ),
        (
            {"frozen": ["net.head"], "unfreeze": {1: ["net.head"], 2: ["net.head.bias"]}},
            "unfreeze: 'net.head.bias' of epoch 2 is no parameter that is frozen until then",
        ),
    ],
)
def test_patterns_that_take_nothing_are_errors(tmp_path: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(tmp_path, Net(), Freeze(**options))


def test_parameters_that_no_optimizer_has_cannot_be_unfrozen(tmp_path: Any) -> None:
    options: Any = {"frozen": ["net.backbone"], "unfreeze": {1: ["net.backbone"]}}
    with pytest.raises(ValueError, match=r"no optimizer has 'net.backbone.0.weight'; let configure_optimizers give all parameters"):
        fit(tmp_path, Net(lambda module: SGD(module.net["head"].parameters(), lr=0.1)), Freeze(**options))
    with pytest.raises(ValueError, match=r"evaluates the loss itself .LBFGS. has one group alone"):
        fit(tmp_path, Net(lambda module: torch.optim.LBFGS(module.parameters())), Freeze(**options))
    with pytest.raises(
        ValueError, match=r"the group that 'net.backbone' comes from has the learning rate 0, so that none follows from 0.1"
    ):
        fit(
            tmp_path,
            Net(lambda module: SGD(module.parameters(), lr=0.0)),
            Freeze(frozen=["net.backbone"], unfreeze={1: {"net.backbone": 0.1}}),
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frozen": "net"}, "frozen must be a list of names or patterns, such as .'backbone'., got 'net'"),
        ({"frozen": []}, "frozen must be a list of names or patterns"),
        ({"frozen": [""]}, "frozen must be a list of names or patterns"),
        ({"unfreeze": [1]}, "unfreeze must be a dict {epoch: {pattern: learning rate}}, got .1."),
        ({"unfreeze": {"x": ["net"]}}, "unfreeze: an epoch must be a whole number, at least 0, got 'x'"),
        ({"unfreeze": {-1: ["net"]}}, "unfreeze: an epoch must be a whole number, at least 0, got -1"),
        ({"unfreeze": {1: "net"}}, "unfreeze: epoch 1 must have {pattern: learning rate} or .patterns., got 'net'"),
        ({"unfreeze": {1: []}}, "unfreeze: epoch 1 must have {pattern: learning rate} or .patterns., got"),
        ({"unfreeze": {1: [3]}}, "unfreeze: epoch 1 has 3 in place of a name or pattern"),
        ({"unfreeze": {1: {"net": -1}}}, "unfreeze: the learning rate of 'net' must be a number, at least 0, or None, got -1"),
        ({"unfreeze": {1: {"net": math.nan}}}, "unfreeze: the learning rate of 'net' must be a number, at least 0, or None, got nan"),
        ({"unfreeze": {1: {"net": "1e-4"}}}, "unfreeze: the learning rate of 'net' must be a number, at least 0, or None, got '1e-4'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, words: str) -> None:
    with pytest.raises(PluginError, match=f"plugin 'freeze' .torchplug-freeze 0.1.0.: {words}"):
        Trainer(max_epochs=1, plugins=[{"freeze": {"frozen": ["net"], **options}}])
