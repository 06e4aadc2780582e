"""The mean that stochastic weight averaging leaves in the module, against explicit means of snapshots and torch's own tools."""

import logging
import math
import os
import signal
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.checkpoint import load
from torchplug.testing import check_plugin
from torchplug_swa import Swa

BATCHES = 6


def data(batches=BATCHES, size=4, shuffle=True, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=size, shuffle=shuffle, **options)


class Net(Module):
    """Four inputs, BatchNorm, dropout, one output, two parameter groups; ``schedule`` makes a scheduler for its optimizer."""

    def __init__(self, norm=True, schedule=None, interval="epoch"):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.schedule, self.interval = schedule, interval

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        loss = F.mse_loss(self(batch[0]).float(), batch[1].float())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", F.mse_loss(self(batch[0]).float(), batch[1].float()))

    test_step = validation_step

    def configure_optimizers(self):
        groups = [{"params": self.net[:3].parameters(), "lr": 0.02}, {"params": self.net[3].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.016, momentum=0.9)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": self.interval, "monitor": "val_loss"}]


class Watch:
    """Weights after each optimizer step and in each validation, and rates in each batch; what a loss scaler skipped."""

    def __init__(self):
        self.steps, self.rates, self.validations, self.scheduled, self.ends = [], [], [], 0, []

    @hookimpl
    def on_train_batch_start(self, run):
        self.rates.append([group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups])

    @hookimpl
    def on_train_batch_end(self, run):
        if run.position.step > len(self.steps):
            self.steps.append(values(run.module))

    @hookimpl
    def on_train_epoch_end(self, run):
        self.ends.append(values(run.module))

    @hookimpl
    def on_scheduler_step(self):
        self.scheduled += 1

    @hookimpl
    def on_validation_start(self, run):
        self.validations.append(values(run.module))


class Bad:
    """Infinite gradients in the batches with these numbers, which a loss scaler skips."""

    def __init__(self, *batches):
        self.batches = batches

    @hookimpl
    def on_after_backward(self, run):
        if run.scaler is not None and run.position.micro_step in self.batches:
            next(run.module.parameters()).grad.fill_(torch.inf)


class Save:
    """A checkpoint after every batch."""

    def __init__(self, folder):
        self.folder = folder

    @hookimpl
    def on_train_batch_end(self, run):
        run.save_checkpoint(self.folder / f"{run.position.micro_step}.safetensors")


def values(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def fit(path, module, *plugins, loader=None, val=None, ckpt_path=None, seed=7, **options):
    torch.manual_seed(seed)
    length = {} if {"max_epochs", "max_steps", "max_time"} & options.keys() else {"max_epochs": 4}
    options = {"num_sanity_val_steps": 0, **length, **options}
    trainer = Trainer(root_dir=path, plugins=list(plugins), accelerator="cpu", **options)
    trainer.fit(module, loader or data(), val, ckpt_path=ckpt_path)
    return trainer


def mean(states, buffers=True):
    """The plain mean of floating-point values, in double precision."""
    names = [name for name, value in states[0].items() if value.is_floating_point() and (buffers or "running" not in name)]
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in names}


def assert_close(module, expected, tolerance=1e-6):
    now = module if isinstance(module, dict) else module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(
            now[name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_equal(one, other):
    one, other = (dict(each if isinstance(each, dict) else each.state_dict()) for each in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# ---------------------------------------------------------------------- which weights


@pytest.mark.slow
def test_it_passes_the_conformance_checks():
    check_plugin("swa", start=1, every_n_steps=1, lr=0.01)


@pytest.mark.parametrize(
    ("options", "numbers"),  # of the optimizer steps whose weights are averaged, 6 in an epoch, 24 in all
    [
        ({}, [24]),
        ({"start": 0.5}, [18, 24]),
        ({"start": 0.6}, [18, 24]),
        ({"start": 0.0}, [6, 12, 18, 24]),
        ({"start": 0}, [6, 12, 18, 24]),
        ({"start": 1}, [12, 18, 24]),
        ({"start": 1, "every_n_epochs": 2}, [18, 24]),  # the last one at the end of training
        ({"start": 0, "every_n_epochs": 2}, [12, 24]),
        ({"start": 2, "every_n_steps": 1}, list(range(13, 25))),
        ({"start": 2, "every_n_steps": 5}, [17, 22, 24]),
        ({"start_step": 8}, [12, 18, 24]),
        ({"start_step": 12}, [18, 24]),  # not the weights at the start
        ({"start_step": 0}, [6, 12, 18, 24]),
        ({"start_step": 8, "every_n_steps": 4}, [12, 16, 20, 24]),
        ({"start_step": 12, "every_n_epochs": 2}, [24]),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [1, 2])
def test_after_fit_the_module_holds_the_mean_of_the_snapshots(tmp_path, options, numbers, window):
    module, watch, plugin = Net(norm=False), Watch(), Swa(**options)
    trainer = fit(tmp_path, module, watch, plugin, loader=data(BATCHES * window), accumulate_grad_batches=window)
    assert len(watch.steps) == 24
    assert_close(module, mean([watch.steps[number - 1] for number in numbers]))
    assert f"at {len(numbers)} step" in trainer.run.report["swa"]


@pytest.mark.parametrize(
    ("ending", "numbers"),
    [("max_steps", [12, 18, 21]), ("max_time", [12, 15]), ("early_stopping", [12, 18]), ("stop", [12, 15])],
)
@pytest.mark.parametrize("norm", [False, True])
def test_whatever_ends_training_the_mean_is_in_the_module(tmp_path, monkeypatch, ending, numbers, norm):
    class Stop:
        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.step == 15 and ending == "stop":
                run.request_stop("enough")
            if run.position.step == 15 and ending == "max_time":
                monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 7200)

    options = {"max_steps": {"max_steps": 21}, "max_time": {"max_time": "1h"}}.get(ending, {"max_epochs": 9})
    module, watch, plugins = Net(norm=norm), Watch(), [Stop()]
    if ending == "early_stopping":
        plugins.append({"early_stopping": {"monitor": "val_loss", "divergence_threshold": 1e-9, "mode": "min"}})
        options["min_epochs"] = 3
    loader = data(shuffle=False)
    fit(tmp_path, module, watch, *plugins, Swa(start=1), loader=loader, val=data(), **options)
    assert len(watch.steps) == numbers[-1]
    expected = mean([watch.steps[number - 1] for number in numbers], buffers=False)
    hand = Net(norm=norm)
    hand.load_state_dict({**watch.steps[-1], **expected})
    update_bn(loader, hand)
    assert_close(module, {**hand.state_dict(), **expected})


def test_a_fraction_counts_steps_or_epochs_whichever_comes_first(tmp_path):
    for start, options, numbers in (
        (0.29, {"max_steps": 100}, list(range(30, 101))),  # 0.29 * 100 is a little less than 29
        (0.5, {"max_steps": 20}, list(range(11, 21))),
        (0.5, {"max_steps": 20, "max_epochs": 100}, list(range(11, 21))),
        (0.5, {"max_steps": 1000, "max_epochs": 4}, list(range(13, 25))),
    ):
        module, watch = Net(norm=False), Watch()
        fit(tmp_path, module, watch, Swa(start=start, every_n_steps=1), **options)
        assert_close(module, mean([watch.steps[number - 1] for number in numbers]))


@pytest.mark.parametrize("options", [{"start": 4}, {"start": 1.0}, {"start_step": 24}, {"start_step": 99, "every_n_steps": 1}], ids=str)
def test_a_start_beyond_the_end_averages_nothing_and_says_so(tmp_path, caplog, options):
    plain, module, watch = Net(), Net(), Watch()
    fit(tmp_path, plain, val=data())
    fit(tmp_path, module, watch, Swa(lr=0.5, **options), val=data())
    assert_equal(module, plain)
    assert [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING] == [
        "plugin 'swa': training ended before anything was averaged: the module keeps its own weights"
    ]


@pytest.mark.parametrize("buffers", ["recompute", "average", "keep"])
@pytest.mark.parametrize("precision", ["32", "bf16-true"])
def test_it_equals_torchs_swa_utils_on_the_same_schedule(tmp_path, buffers, precision):
    class ByHand:
        """The recipe of torch's documentation."""

        @hookimpl
        def on_fit_start(self, run):
            self.model = AveragedModel(run.module, use_buffers=buffers == "average")

        @hookimpl
        def on_train_epoch_start(self, run):
            if run.position.epoch == 3:
                self.rates = SWALR(run.optimizers[0], swa_lr=0.01, anneal_epochs=3, anneal_strategy="cos")

        @hookimpl
        def on_train_epoch_end(self, run):
            if run.position.epoch >= 3:
                self.model.update_parameters(run.module)
                self.rates.step()

    options = {"loader": data(shuffle=False), "max_epochs": 8, "precision": precision}
    module, watch, hand, watched = Net(), Watch(), ByHand(), Watch()
    fit(tmp_path, Net(), hand, watched, **options)
    fit(tmp_path, module, watch, Swa(start=3, lr=0.01, anneal_epochs=3, buffers=buffers), **options)
    torch.testing.assert_close(watch.rates, watched.rates, rtol=1e-9, atol=0)
    if buffers == "recompute":
        update_bn(options["loader"] if precision == "32" else [(x.bfloat16(), y) for x, y in options["loader"]], hand.model)
    low = precision != "32"  # torch adds up in bfloat16
    expected = {
        name: value for name, value in hand.model.module.state_dict().items() if value.is_floating_point() and not (low and "var" in name)
    }
    assert_close(module, expected, 2e-2 if low else 1e-6)
    if low:
        averages = mean(watch.ends[3:], buffers=False)
        for name, value in averages.items():
            assert torch.equal(module.state_dict()[name], value.bfloat16()), name


def test_a_step_that_the_loss_scaler_skips_is_no_step(tmp_path):
    module, watch = Net(norm=False), Watch()
    fit(
        tmp_path,
        module,
        watch,
        Bad(11, 12, 14),
        Swa(start_step=9, every_n_steps=1),
        precision="16-mixed",
        accumulate_grad_batches=2,
        max_epochs=8,
    )
    assert len(watch.steps) < 24 - 1
    assert_close(module, mean(watch.steps[9:]))


def test_several_optimizers_and_a_list_of_rates(tmp_path):
    class Two(Net):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch)

        def configure_optimizers(self):
            one, two = torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.Adam(self.net[3].parameters(), lr=0.01)
            return [one, two], [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (one, two)]

    module, watch = Two(norm=False), Watch()
    fit(tmp_path, module, watch, Swa(start=2, lr=[0.3, 0.004], anneal_epochs=1), max_epochs=5)
    assert_close(module, mean(watch.ends[2:]))
    torch.testing.assert_close(watch.rates[::6], [[0.1, 0.01], [0.05, 0.005], [0.025, 0.0025], [0.3, 0.004], [0.3, 0.004]])
    with pytest.raises(ValueError, match="lr names 3 rates, and there are 2 parameter groups"):
        fit(tmp_path, Two(norm=False), Swa(lr=[0.1, 0.2, 0.3]))


# ---------------------------------------------------------------------- statistics of BatchNorm


class Counted(Net):
    """Logs, counts and adds up in training_step, and draws at random; a buffer of its own changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(2))
        self.calls, self.meter = 0, Meter()

    def training_step(self, batch):
        self.queue.add_(1.0)
        self.calls += 1
        self.meter.update(batch[0].sum())
        self.log("meter", self.meter, on_step=False, on_epoch=True)
        return super().training_step(batch)


class Meter:
    def __init__(self):
        self.reset()

    def reset(self):
        self.total = torch.zeros(())

    def update(self, value):
        self.total = self.total + value

    def compute(self):
        return self.total


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}], ids=str)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_pass_over_the_data_leaves_no_trace_but_the_statistics(tmp_path, workers):
    class Look:
        def __init__(self):
            self.seen = []

        @hookimpl
        def on_validation_start(self, run):
            self.seen.append(torch.get_rng_state())

        @hookimpl
        def on_train_end(self, run):
            self.seen.append(torch.get_rng_state())

    def one(*plugins):
        module, watch, look = Counted(), Watch(), Look()
        trainer = fit(tmp_path, module, watch, *plugins, look, loader=data(**workers), val=data(), val_check_interval=2, max_epochs=2)
        return module, watch, look, trainer

    (plain, watched, before, first), (module, watch, after, second) = one(), one(Swa(start=0, every_n_steps=2, validate=True))
    for one, other in zip(watched.steps, watch.steps, strict=True):
        assert_equal(one, other)
    for one, other in zip(before.seen, after.seen, strict=True):
        assert torch.equal(one, other)
    assert module.calls == plain.calls == 12 and torch.equal(module.queue, plain.queue)
    assert first.metrics["meter"] == second.metrics["meter"] and first.metrics["train_loss_epoch"] == second.metrics["train_loss_epoch"]
    assert vars(first.run.position) if hasattr(first.run.position, "__dict__") else first.run.position == second.run.position
    assert module.net[1].momentum == 0.1
    assert not torch.allclose(module.net[1].running_mean, plain.net[1].running_mean)


def test_batches_that_training_does_not_use_and_layers_in_eval_mode_are_left_alone(tmp_path):
    class Part(Net):
        def __init__(self):
            super().__init__()
            self.frozen = nn.BatchNorm1d(4)
            self.frozen.running_mean.fill_(0.3)
            self.frozen.eval()

        def forward(self, x):
            return self.net(self.frozen(x))

    loader, module, watch = data(shuffle=False), Part(), Watch()
    fit(tmp_path, module, watch, Swa(start=0), loader=loader, limit_train_batches=3, max_epochs=2)
    hand = Net()
    hand.load_state_dict({k: v for k, v in {**watch.steps[-1], **mean(watch.ends, buffers=False)}.items() if "frozen" not in k})
    update_bn(
        [((x - 0.3) / math.sqrt(1 + 1e-5) * module.frozen.weight.detach() + module.frozen.bias.detach(), y) for x, y in list(loader)[:3]],
        hand,
    )
    assert_close(module, {name: value for name, value in hand.state_dict().items() if "running" in name})
    assert torch.equal(module.frozen.running_mean, torch.full((4,), 0.3))


@pytest.mark.parametrize("fail", [25, 28])
def test_an_error_in_the_pass_leaves_the_modules_own_weights(tmp_path, fail):
    class Fails(Net):
        calls = 0

        def training_step(self, batch):
            Fails.calls += 1
            if Fails.calls == fail:
                raise ArithmeticError("in the pass")
            return super().training_step(batch)

    module, watch = Fails(), Watch()
    with pytest.raises(ArithmeticError):
        fit(tmp_path, module, watch, Swa(start=0))
    assert_equal(module, watch.steps[-1])
    assert module.net[1].momentum == 0.1


# ---------------------------------------------------------------------- learning rates


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("schedule", ["none", "exponential", "cosine", "one cycle", "plateau"])
def test_rates_go_from_where_they_are_to_lr_and_stay_there_whatever_schedulers_want(tmp_path, anneal, schedule):
    schedules = torch.optim.lr_scheduler
    made, interval = {
        "none": (None, "epoch"),
        "exponential": (lambda o: schedules.ExponentialLR(o, 0.5), "epoch"),
        "cosine": (lambda o: schedules.CosineAnnealingLR(o, 30), "step"),
        "one cycle": (lambda o: schedules.OneCycleLR(o, [0.05, 0.02], total_steps=60), "step"),
        "plateau": (lambda o: schedules.ReduceLROnPlateau(o, patience=0), "epoch"),
    }[schedule]
    plain, module, watched, watch = Net(True, made, interval), Net(True, made, interval), Watch(), Watch()
    fit(tmp_path, plain, watched, val=data(), max_epochs=3)
    fit(tmp_path, module, watch, Swa(start=2, lr=0.01, anneal_epochs=4, anneal=anneal), val=data(), max_epochs=9)
    assert watch.rates[:12] == watched.rates[:12]
    start = watched.rates[12]
    for epoch in range(2, 9):
        t = min(1.0, (epoch - 2) / 4)
        t = t if anneal == "linear" else (1 - math.cos(math.pi * t)) / 2
        for rates in watch.rates[6 * epoch : 6 * epoch + 6]:
            torch.testing.assert_close(rates, [0.01 * t + rate * (1 - t) for rate in start], rtol=1e-9, atol=0)
    assert watch.rates[-1] == [0.01, 0.01]
    assert watch.scheduled == (0 if schedule == "none" else 12 if interval == "step" else 2)


def test_without_annealing_the_rate_is_there_at_once(tmp_path):
    watch = Watch()
    fit(tmp_path, Net(), watch, Swa(start_step=9, lr=0.5, anneal_epochs=0), max_epochs=2)
    assert watch.rates == [[0.02, 0.016]] * 9 + [[0.5, 0.5]] * 3


def test_without_lr_schedulers_go_on(tmp_path):
    schedule = lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=1, step_size_down=2, cycle_momentum=False)  # noqa: E731
    plain, module, watched, watch = Net(False, schedule, "step"), Net(False, schedule, "step"), Watch(), Watch()
    fit(tmp_path, plain, watched)
    fit(tmp_path, module, watch, Swa(start=2, every_n_steps=3))  # at the low points
    assert watch.rates == watched.rates and watch.scheduled == 24
    assert_close(module, mean(watch.steps[14::3]))


def test_a_parameter_group_that_is_added_later_is_annealed_from_its_own_rate(tmp_path):
    class Add:
        @hookimpl
        def on_train_epoch_start(self, run):
            if run.position.epoch == 2:
                run.module.extra.requires_grad_(True)
                run.optimizers[0].add_param_group({"params": list(run.module.extra.parameters()), "lr": 0.2})

    class Grown(Net):
        def __init__(self):
            super().__init__(norm=False)
            self.extra = nn.Linear(4, 1).requires_grad_(False)

        def forward(self, x):
            return super().forward(x) + self.extra(x)

    module, watch = Grown(), Watch()
    fit(tmp_path, module, Add(), watch, Swa(start=0, lr=0.01, anneal_epochs=4, anneal="linear"), max_epochs=5)
    torch.testing.assert_close(watch.rates[18], [0.02 / 4 + 0.01 * 3 / 4, 0.016 / 4 + 0.01 * 3 / 4, 0.2 / 4 + 0.01 * 3 / 4])
    assert_close(module, mean(watch.ends))


def test_a_rate_that_is_a_tensor_stays_one(tmp_path):
    class Capturable(Net):
        def configure_optimizers(self):
            self.optimizer = torch.optim.Adam(self.parameters(), lr=torch.tensor(0.1), foreach=False)
            return self.optimizer

    module = Capturable()
    fit(tmp_path, module, Swa(start=1, lr=0.02, anneal_epochs=1))
    rate = module.optimizer.param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor) and float(rate) == pytest.approx(0.02)


# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    ("options", "swa", "schedule"),
    [
        ({}, {"start": 1, "lr": 0.01, "anneal_epochs": 3}, "exponential"),
        ({"accumulate_grad_batches": 2}, {"start_step": 4, "every_n_steps": 2, "lr": 0.01, "anneal_epochs": 2}, "one cycle"),
        ({"precision": "16-mixed"}, {"start": 0.3, "every_n_epochs": 2, "validate": True}, "exponential"),
        ({"precision": "bf16-true"}, {"start": 1, "lr": [0.01, 0.02], "anneal": "linear", "buffers": "average"}, "exponential"),
    ],
    ids=str,
)
def test_a_run_that_goes_on_from_any_batch_ends_with_the_same_bits(tmp_path, options, swa, schedule):
    schedules = torch.optim.lr_scheduler
    made = {
        "exponential": (lambda o: schedules.ExponentialLR(o, 0.7), "epoch"),
        "one cycle": (lambda o: schedules.OneCycleLR(o, [0.05, 0.02], total_steps=60), "step"),
    }[schedule]

    def run(ckpt_path=None, *more, **seed):
        module, plugin, watch = Net(True, *made), Swa(**swa), Watch()
        trainer = fit(tmp_path, module, Bad(3, 8), plugin, watch, *more, val=data(shuffle=False), ckpt_path=ckpt_path, **options, **seed)
        return module, plugin.state_dict(), trainer.metrics["val_loss"], watch.rates

    module, state, loss, rates = run(None, Save(tmp_path))
    for number in range(1, 25):
        path = tmp_path / f"{number}.safetensors"
        if not path.exists():  # within an accumulation window
            continue
        again, other, other_loss, other_rates = run(path, seed=number)
        assert_equal(again, module)
        assert other["average"] and not other["weights"]
        assert_equal(other["average"], state["average"])
        assert (other["updates"], other["rates"], other_loss) == (state["updates"], state["rates"], loss)
        done = len(rates) - len(other_rates)
        assert other_rates == rates[done:] and done in (number, number + 1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_signal_leaves_the_modules_own_weights_and_ctrl_c_the_mean_and_the_run_can_go_on(tmp_path, name, norm):
    class Kill:
        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.step == 20:
                os.kill(os.getpid(), getattr(signal, name))

        @hookimpl
        def on_stop_requested(self, run):
            run.save_checkpoint(tmp_path / "stopped.safetensors")

    options, loader = {"start": 1, "lr": 0.02}, data(shuffle=False)
    whole, watch, module, again = Net(norm), Watch(), Net(norm), Net(norm)
    fit(tmp_path, whole, watch, Swa(**options), loader=loader)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, module, Kill(), Swa(**options), loader=loader)
    if name == "SIGINT":
        expected = mean([watch.steps[number - 1] for number in (12, 18, 20)], buffers=False)
        hand = Net(norm)
        hand.load_state_dict({**watch.steps[19], **expected})
        update_bn(loader, hand)
        assert_close(module, {**hand.state_dict(), **expected})
    else:
        assert_equal(module, watch.steps[19])
    state = load(tmp_path / "stopped.safetensors")
    assert_equal(state["module"], watch.steps[19])
    assert_close(state["plugins"]["swa"]["weights"], mean([watch.steps[11], watch.steps[17]], buffers=False))
    fit(tmp_path, again, Swa(**options), loader=loader, ckpt_path=tmp_path / "stopped.safetensors", seed=1)
    assert_equal(again, whole)
    assert_close(again, mean(watch.ends[1:], buffers=False))


@pytest.mark.parametrize("from_file", [True, False])
def test_training_that_goes_on_after_its_end_goes_on_with_its_own_weights(tmp_path, from_file):
    options = {"start": 1, "lr": 0.02, "anneal_epochs": 2}
    whole, watch = Net(), Watch()
    fit(tmp_path, whole, watch, Swa(**options), max_epochs=5)
    module, path = Net(), tmp_path / "end.safetensors"
    first = fit(tmp_path, module, Swa(**options), max_steps=15)
    assert_close(module, mean([watch.steps[11], watch.steps[14]], buffers=False))
    if from_file:
        first.run.save_checkpoint(path)
        assert_equal(load(path)["module"], module)
        module = Net()
        fit(tmp_path, module, Swa(**options), max_epochs=5, ckpt_path=path, seed=1)
    else:
        first.max_steps, first.max_epochs = None, 5
        first.fit(module, data())
    assert_equal(module, whole)


def test_validation_uses_the_mean_only_where_that_is_asked_for(tmp_path):
    for validate in (False, True):
        module, watch = Net(), Watch()
        fit(tmp_path, module, watch, Swa(start=1, validate=validate, buffers="average"), val=data(), val_check_interval=3)
        own = [watch.steps[number - 1] for number in range(3, 25, 3)]
        assert_equal(watch.validations[2], own[2])  # nothing was averaged yet
        for number, seen in enumerate(watch.validations):
            ends = watch.ends[1 : (number + 1) // 2]
            if validate and ends:
                assert_close(seen, mean(ends))
            else:
                assert_equal(seen, own[number])


def test_a_parameter_that_comes_later_is_refused_by_name(tmp_path):
    class Grows(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 3:
                self.more = nn.Linear(2, 2)

    with pytest.raises(
        ValueError, match=r"Grows has parameters that it did not have when averaging began.*: more\.weight, more\.bias; make"
    ):
        fit(tmp_path, Grows(), Swa(start=1))


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"start": 1, "start_step": 5}, "start and start_step say the same in two ways: give one of them"),
        ({"every_n_steps": 1, "every_n_epochs": 5}, "every_n_epochs and every_n_steps say the same in two ways: give one of them"),
        ({"start": 1.5}, "start as a part of the training must be from 0 to 1, got 1.5; an epoch is written as an int"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"start": True}, "start must be an int or a float or None, got True"),
        ({"start": "0.5"}, "start must be an int or a float or None, got '0.5'"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
        ({"every_n_steps": 1.0}, "every_n_steps must be an int or None, got 1.0"),
        ({"lr": 0}, "lr must be a number above 0, a list of them, or None, got 0"),
        ({"lr": []}, "lr must be a number above 0, a list of them, or None, got []"),
        ({"lr": [0.1, float("nan")]}, "lr must be a number above 0, a list of them, or None, got [0.1, nan]"),
        ({"anneal_epochs": -1}, "anneal_epochs must be at least 0, got -1"),
        ({"anneal": "exp"}, "anneal must be 'cos' or 'linear', got 'exp'"),
        ({"buffers": None}, "buffers must be 'average' or 'recompute' or 'keep', got None"),
        ({"validate": 1}, "validate must be a bool, got 1"),
    ],
    ids=str,
)
def test_a_bad_option_is_one_clear_error(options, text):
    with pytest.raises((ValueError, TypeError)) as error:
        Swa(**options)
    assert str(error.value) == text
    with pytest.raises(PluginError, match="plugin 'swa' "):
        Trainer(max_epochs=1, plugins=[{"swa": options}])


def test_what_cannot_work_is_said_when_the_run_starts(tmp_path):
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch))
            self.optimizers().step()

    schedule = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
    with pytest.raises(ValueError, match="start is a part of the training, whose length max_time does not tell"):
        fit(tmp_path, Net(), Swa(), max_time="1h")
    with pytest.raises(ValueError, match="in manual optimization the module steps them itself: leave lr out"):
        fit(tmp_path, Manual(False, schedule), Swa(lr=0.1))
    with pytest.raises(ValueError, match="not possible in manual optimization"):
        fit(tmp_path, Manual(), Swa())
    with pytest.raises(ValueError, match="an iterator gives them once"):
        fit(tmp_path, Net(), Swa(), loader=iter(data()))
    module, watch = Manual(False), Watch()
    fit(tmp_path, module, watch, Swa(start=1, lr=0.1, anneal_epochs=0))
    assert_close(module, mean(watch.ends[1:]))
    assert watch.rates[-1] == [0.1, 0.1]


def test_an_instance_in_a_second_run_begins_anew(tmp_path):
    plugin, first, second = Swa(start_step=3, every_n_steps=2, lr=0.005, anneal_epochs=1), Net(), Net()
    fit(tmp_path, first, plugin)
    fit(tmp_path, second, plugin)
    assert_equal(first, second)
    assert plugin.updates == 10


def test_two_averages_in_one_run_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="a module can hold one average of its weights, and swa:one and swa:two would each leave one in it"
    ):
        fit(tmp_path, Net(), {"swa:one": {}}, {"swa:two": {}})
