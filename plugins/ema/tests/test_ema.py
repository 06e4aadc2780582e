"""The average that a run keeps, against the recurrence by hand."""

import json
import logging
import os
import signal
import struct
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.checkpoint import load
from torchplug.testing import check_plugin
from torchplug_ema import Ema


def data(batches=6, size=4, shuffle=True):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=size, shuffle=shuffle)


class Net(Module):
    """Four inputs, BatchNorm, dropout, one output; fails in validation number ``fails``."""

    def __init__(self, norm=True, fails=None):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.fails, self.validations = fails, 0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        loss = F.mse_loss(self(batch[0]).float(), batch[1].float())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", F.mse_loss(self(batch[0]).float(), batch[1].float()))
        self.validations += 1
        if self.validations == self.fails:
            raise ArithmeticError("in validation")

    def test_step(self, batch):
        self.log("test_loss", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Watch:
    """What the module holds after each optimizer step, and in each validation."""

    def __init__(self):
        self.steps, self.validations, self.skipped = [], [], 0

    @hookimpl
    def on_train_batch_end(self, run):
        if run.position.step > len(self.steps):
            self.steps.append(values(run.module))

    @hookimpl
    def on_step_skipped(self):
        self.skipped += 1

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


def values(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items() if not nn.parameter.is_lazy(value)}


def fit(path, module, *plugins, loader=None, val=None, ckpt_path=None, seed=7, **options):
    torch.manual_seed(seed)
    length = {} if {"max_epochs", "max_steps", "max_time"} & options.keys() else {"max_epochs": 2}
    options = {"num_sanity_val_steps": 0, **length, **options}
    trainer = Trainer(root_dir=path, plugins=list(plugins), accelerator="cpu", **options)
    trainer.fit(module, loader or data(), val, ckpt_path=ckpt_path)
    return trainer


def recurrence(steps, decay=0.9, warmup=False, every=1):
    """The average by hand, in double precision, of the floating-point values in a list of states."""
    average, updates = None, 0
    for number, step in enumerate(steps, 1):
        if number % every and number != len(steps):
            continue
        now = {name: value.double() for name, value in step.items() if value.is_floating_point()}
        beta = min(decay, (1 + updates) / (10 + updates)) if warmup else decay
        average = now if average is None else {name: beta * average[name] + (1 - beta) * now[name] for name in now}
        updates += 1
    return average


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


# ---------------------------------------------------------------------- the recurrence


@pytest.mark.slow
def test_it_passes_the_conformance_checks():
    check_plugin("ema", decay=0.8)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"decay": 0.9}, {}),
        ({"decay": 0.0}, {"decay": 0.0}),
        ({"decay": 0.99, "warmup": True}, {"decay": 0.99, "warmup": True}),
        ({"decay": 0.3, "warmup": True}, {"decay": 0.3, "warmup": True}),
        ({"decay": 0.8, "every_n_steps": 5}, {"decay": 0.8, "every": 5}),  # the last of 12 steps is between two updates
        ({"decay": 0.8, "every_n_steps": 4, "warmup": True}, {"decay": 0.8, "every": 4, "warmup": True}),
        ({"decay": 0.8, "every_n_steps": 7, "warmup": True}, {"decay": 0.8, "every": 7, "warmup": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [1, 2])
def test_after_fit_the_module_holds_the_closed_recurrence(tmp_path, options, expected, window):
    module, watch = Net(), Watch()
    fit(tmp_path, module, watch, Ema(**options), max_epochs=2 * window, accumulate_grad_batches=window)
    assert len(watch.steps) == 12
    assert_close(module, recurrence(watch.steps, **expected))


def test_it_equals_the_averaged_model_of_torch(tmp_path):
    class ByHand:
        @hookimpl
        def on_fit_start(self, run):
            self.model = AveragedModel(run.module, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)

        @hookimpl
        def on_after_optimizer_step(self, run):
            self.model.update_parameters(run.module)

    module, hand = Net(), ByHand()
    fit(tmp_path, module, hand, Ema(decay=0.7))
    assert_close(module, {name: value for name, value in hand.model.module.state_dict().items() if value.is_floating_point()}, 1e-7)


@pytest.mark.parametrize("ending", ["max_steps", "max_time", "stop", "max_epochs"])
def test_whatever_ends_training_the_last_step_is_in_the_average_and_the_average_in_the_module(tmp_path, monkeypatch, ending):
    class Stop:
        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.micro_step == 8 and ending == "stop":
                run.request_stop("enough")
            if run.position.micro_step == 8 and ending == "max_time":
                monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 7200)

    options = {"max_steps": {"max_steps": 8}, "max_time": {"max_time": "1h"}, "stop": {"max_epochs": 9}, "max_epochs": {"max_epochs": 2}}
    module, watch = Net(), Watch()
    trainer = fit(tmp_path, module, watch, Stop(), Ema(decay=0.9), **options[ending])
    assert len(watch.steps) == (12 if ending == "max_epochs" else 8)
    assert_close(module, recurrence(watch.steps))
    assert "average of its weights at" in trainer.run.report["ema"]


@pytest.mark.parametrize("window", [1, 2])
def test_a_step_that_the_loss_scaler_skips_is_no_step(tmp_path, window):
    module, watch, plugin = Net(), Watch(), Ema(decay=0.9)
    bad = (0, 1, 5, 9)  # batches
    trainer = fit(tmp_path, module, watch, Bad(*bad), plugin, precision="16-mixed", accumulate_grad_batches=window, max_epochs=3)
    assert watch.skipped >= len({micro // window for micro in bad})
    assert plugin.updates == trainer.run.position.step == len(watch.steps) == 18 // window - watch.skipped
    assert_close(module, recurrence(watch.steps))


def test_low_precision_is_averaged_in_float32(tmp_path):
    module, watch, plugin = Net(norm=False), Watch(), Ema(decay=0.999)
    fit(tmp_path, module, watch, plugin, precision="bf16-true", max_epochs=20)
    expected = recurrence(watch.steps, decay=0.999)
    averages = plugin.state_dict()["average"]
    assert {value.dtype for value in averages.values()} == {torch.float32}
    assert_close(averages, expected, 1e-5)
    for name, value in module.state_dict().items():
        assert torch.equal(value, averages[name].bfloat16()), name


def test_a_batch_in_which_several_optimizers_step_is_one_update(tmp_path):
    class Two(Net):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[3].parameters(), lr=0.01)]

    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            one, two = self.optimizers()
            for optimizer in (one, two) if batch_idx % 2 else (one,):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch))
                optimizer.step()

        configure_optimizers = Two.configure_optimizers

    for kind in (Two, Manual):
        module, watch, plugin = kind(norm=False), Watch(), Ema(decay=0.9)
        fit(tmp_path, module, watch, plugin)
        assert plugin.updates == 12
        assert_close(module, recurrence(watch.steps))


def test_a_window_that_the_loaders_end_cuts_short_is_in_the_average_of_the_validation_after_it(tmp_path):
    class Unknown:
        def __iter__(self):
            return iter(data(shuffle=False))

    module, watch, plugin = Net(), Watch(), Ema(decay=0.0, buffers="keep")
    trainer = fit(tmp_path, module, watch, plugin, loader=Unknown(), val=data(), accumulate_grad_batches=4, max_epochs=1)
    assert trainer.run.position.step == plugin.updates == 2
    assert_equal(
        {k: v for k, v in watch.validations[-1].items() if "running" not in k},
        {k: v for k, v in values(module).items() if "running" not in k},
    )


# ---------------------------------------------------------------------- what is averaged


def test_frozen_parameters_are_left_out_until_they_are_unfrozen(tmp_path):
    class Unfreeze:
        @hookimpl
        def on_train_epoch_start(self, run):
            if run.position.epoch == 1:
                run.module.net[0].requires_grad_(True)
                run.optimizers[0].add_param_group({"params": list(run.module.net[0].parameters())})

    class Frozen(Net):
        def configure_optimizers(self):
            self.net[0].requires_grad_(False)
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    class Count:
        @hookimpl
        def on_train_epoch_end(self):
            held.append(sorted(plugin.state_dict()["weights"]))

    for order in (0, 1):
        held, module, watch, plugin = [], Frozen(norm=False), Watch(), Ema(decay=0.9)
        fit(tmp_path, module, *([Unfreeze(), plugin] if order else [plugin, Unfreeze()]), watch, Count())
        assert held == [["net.3.bias", "net.3.weight"], ["net.0.bias", "net.0.weight", "net.3.bias", "net.3.weight"]]
        assert_close(module, recurrence(watch.steps))


def test_a_parameter_that_is_frozen_for_a_while_in_each_epoch_is_averaged(tmp_path):
    class Toggling(Net):
        def on_train_batch_start(self, batch_idx):
            self.net[0].requires_grad_(batch_idx > 2)

    module, watch = Toggling(norm=False), Watch()
    fit(tmp_path, module, watch, Ema(decay=0.9))
    assert_close(module, recurrence(watch.steps))


def test_tied_parameters_are_averaged_once_and_stay_tied(tmp_path):
    class Tied(Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def training_step(self, batch):
            return F.mse_loss(self.b(self.a(batch[0])).sum(1, keepdim=True), batch[1])

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.02)

    module, watch, plugin, path = Tied(), Watch(), Ema(decay=0.9), tmp_path / "tied.safetensors"
    trainer = fit(tmp_path, module, watch, plugin, val=data())
    assert module.b.weight is module.a.weight
    assert_close(module, recurrence(watch.steps))
    trainer.run.save_checkpoint(path)
    kept = load(path)["plugins"]["ema"]["average"]
    assert kept["a.weight"] is kept["b.weight"] and sorted(kept) == sorted(module.state_dict())
    again = Tied()
    fit(tmp_path, again, Ema(decay=0.9), val=data(), ckpt_path=path, seed=1)
    assert_equal(again, module)


@pytest.mark.parametrize(("batch", "noticed"), [(6, 6), (8, 12)])  # at the beginning of the next epoch, or at the end
def test_a_parameter_that_comes_later_is_refused_by_name(tmp_path, batch, noticed):
    class Grows(Net):
        def on_train_batch_end(self):
            if self.run.position.micro_step == batch:
                self.more = nn.Linear(2, 2)

    watch = Watch()
    with pytest.raises(ValueError, match=r"has parameters that it did not have when averaging began.*: more\.weight, more\.bias; make"):
        fit(tmp_path, Grows(), watch, Ema())
    assert len(watch.steps) == noticed


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_are_averaged_from_their_first_step_on(tmp_path):
    class Lazy(Net):
        def __init__(self):
            super().__init__(norm=False)
            self.net[3] = nn.LazyLinear(1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    module, watch = Lazy(), Watch()
    fit(tmp_path, module, watch, Ema(decay=0.9))
    assert_close(module, recurrence(watch.steps))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_that_are_not_used_at_first_are_averaged_as_soon_as_they_are(tmp_path):
    class Late(Net):
        def __init__(self):
            super().__init__(norm=False)
            self.late = nn.LazyLinear(1)

        def forward(self, x):
            return self.net(x) + (self.late(x) if self.global_step > 2 else 0)

    module, watch, plugin = Late(), Watch(), Ema(decay=0.5)
    fit(tmp_path, module, watch, plugin)
    assert_close(module, {k: v for k, v in recurrence(watch.steps[3:], decay=0.5).items() if "late" in k}, 0.01)  # begun one step earlier
    assert "late.weight" in plugin.state_dict()["average"]


@pytest.mark.parametrize("buffers", ["average", "keep", "recompute"])
def test_buffers_are_averaged_kept_or_taken_anew(tmp_path, buffers):
    module, watch = Net(), Watch()
    fit(tmp_path, module, watch, Ema(decay=0.9, buffers=buffers), loader=data(shuffle=False))
    expected = recurrence(watch.steps)
    if buffers == "keep":
        expected |= {name: value for name, value in watch.steps[-1].items() if "running" in name}
    if buffers == "recompute":
        hand = Net()
        hand.load_state_dict({**watch.steps[-1], **expected})
        update_bn(data(shuffle=False), hand)
        expected |= {name: value for name, value in hand.state_dict().items() if "running" in name or "num" in name}
    assert_close(module, expected)
    assert module.net[1].momentum == 0.1


def test_a_buffer_that_is_replaced_by_another_tensor_is_averaged(tmp_path):
    class Replaces(Net):
        def __init__(self):
            super().__init__(norm=False)
            self.register_buffer("seen", torch.zeros(2))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def training_step(self, batch):
            self.seen, self.count = self.seen + torch.tensor([1.0, 2.0]), self.count + 1
            return super().training_step(batch)

    module, watch = Replaces(), Watch()
    fit(tmp_path, module, watch, Ema(decay=0.9))
    assert_close(module, recurrence(watch.steps))
    assert module.count == 12


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize("interval", [1.0, 2])
@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_validation_uses_the_average_and_gives_the_weights_back_bit_for_bit(tmp_path, interval, buffers):
    plain, watched = Net(), Watch()
    fit(tmp_path, plain, watched, val=data(), val_check_interval=interval)
    module, watch = Net(), Watch()
    fit(tmp_path, module, watch, Ema(decay=0.9, buffers=buffers), val=data(), val_check_interval=interval)
    for one, other in zip(watched.steps, watch.steps, strict=True):
        assert_equal(one, other)
    every = 6 if interval == 1.0 else interval
    for number, seen in enumerate(watch.validations, 1):
        expected = recurrence(watch.steps[: number * every])
        if buffers == "keep":
            expected |= {k: v for k, v in watch.steps[number * every - 1].items() if "running" in k}
        assert_close(seen, expected)
    assert len(watch.validations) == 12 // every


def test_validate_false_validates_the_weights_that_are_trained(tmp_path):
    module, watch = Net(), Watch()
    fit(tmp_path, module, watch, Ema(decay=0.9, validate=False), val=data())
    assert_equal(watch.validations[1], watch.steps[11])
    assert_close(module, recurrence(watch.steps))


def test_before_the_first_update_validation_and_sanity_check_use_the_modules_own_weights(tmp_path):
    module, watch = Net(), Watch()
    before = values(module)

    class Sanity:
        @hookimpl
        def on_sanity_end(self, run):
            assert_equal(run.module, before)

    fit(tmp_path, module, watch, Sanity(), Ema(every_n_steps=4), val=data(), num_sanity_val_steps=1, val_check_interval=2, max_epochs=1)
    assert_equal(watch.validations[0], watch.steps[1])
    assert_close(watch.validations[1], recurrence(watch.steps[3:4]))


@pytest.mark.parametrize("buffers", ["average", "recompute"])
def test_after_an_exception_in_validation_the_module_holds_its_own_weights(tmp_path, buffers):
    module, watch = Net(fails=9), Watch()  # in the second validation
    with pytest.raises(ArithmeticError):
        fit(tmp_path, module, watch, Ema(decay=0.9, buffers=buffers), val=data())
    assert_equal(module, watch.steps[11])
    assert all(each.training for each in module.modules())


def test_statistics_that_are_taken_anew_before_validation_leave_no_trace_in_training(tmp_path):
    plain, watched = Net(), Watch()
    one = fit(tmp_path, plain, watched, val=data(), val_check_interval=2)
    module, watch = Net(), Watch()
    loader = data(shuffle=False)
    other = fit(tmp_path, module, watch, Ema(decay=0.9, buffers="recompute"), val=data(), val_check_interval=2)
    assert len(watch.steps) == len(watched.steps) == 12
    for left, right in zip(watched.steps, watch.steps, strict=True):
        assert_equal(left, right)
    assert one.metrics["train_loss_epoch"] == other.metrics["train_loss_epoch"]
    means = watch.validations[3]["net.1.running_mean"]
    assert not torch.allclose(means, watch.steps[7]["net.1.running_mean"]) and len(loader) == 6


# ---------------------------------------------------------------------- checkpoints


def saved(folder, number):
    return folder / f"{number}.safetensors"


class Save:
    """A checkpoint after every batch."""

    def __init__(self, folder):
        self.folder = folder

    @hookimpl
    def on_train_batch_end(self, run):
        run.save_checkpoint(saved(self.folder, run.position.micro_step))


@pytest.mark.parametrize(
    ("options", "ema"),
    [
        ({}, {"decay": 0.9}),
        ({"accumulate_grad_batches": 2}, {"decay": 0.9, "every_n_steps": 2, "warmup": True}),
        ({"precision": "16-mixed"}, {"decay": 0.9, "buffers": "recompute"}),
        ({"precision": "bf16-true"}, {"decay": 0.9, "buffers": "keep"}),
    ],
    ids=str,
)
def test_a_run_that_goes_on_from_any_batch_ends_with_the_same_bits(tmp_path, options, ema):
    def run(ckpt_path=None, *more, **seed):
        module, plugin, ways = Net(), Ema(**ema), {"val": data(shuffle=False), "val_check_interval": 3, "ckpt_path": ckpt_path}
        trainer = fit(tmp_path, module, Bad(3, 8), plugin, *more, **ways, **options, **seed)
        return module, plugin.state_dict(), trainer.metrics["val_loss"]

    module, state, loss = run(None, Save(tmp_path))
    for number in range(1, 13):
        if not saved(tmp_path, number).exists():  # within an accumulation window
            continue
        again, other, other_loss = run(saved(tmp_path, number), seed=number)
        assert_equal(again, module)
        assert other["average"] and not other["weights"]
        assert_equal(other["average"], state["average"])
        assert_equal(other["own"], state["own"])
        assert (other["updates"], other_loss) == (state["updates"], loss)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_leaves_the_modules_own_weights_and_ctrl_c_the_average_and_the_run_can_go_on(tmp_path, name):
    class Kill:
        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.step == 8:
                os.kill(os.getpid(), getattr(signal, name))

        @hookimpl
        def on_stop_requested(self, run):
            run.save_checkpoint(tmp_path / "stopped.safetensors")

    whole, watch = Net(), Watch()
    fit(tmp_path, whole, watch, Ema(decay=0.9))
    module = Net()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, module, Kill(), Ema(decay=0.9))
    if name == "SIGINT":
        assert_close(module, recurrence(watch.steps[:8]))
    else:
        assert_equal(module, watch.steps[7])
    state = load(tmp_path / "stopped.safetensors")
    assert_equal(state["module"], watch.steps[7])
    assert_close(state["plugins"]["ema"]["weights"], recurrence(watch.steps[:8]))
    again = Net()
    fit(tmp_path, again, Ema(decay=0.9), ckpt_path=tmp_path / "stopped.safetensors", seed=1)
    assert_equal(again, whole)


def test_a_signal_while_statistics_are_taken_anew_puts_everything_off_to_the_run_that_goes_on(tmp_path):
    class Stopped(Net):
        steps = 0

        def training_step(self, batch):
            Stopped.steps += 1
            if Stopped.steps == 14:  # the second batch of the pass after 12 batches of training
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch)

    class Keep:
        @hookimpl
        def on_stop_requested(self, run):
            run.save_checkpoint(tmp_path / "stopped.safetensors")

    whole, watch = Net(), Watch()
    fit(tmp_path, whole, watch, Ema(decay=0.9, buffers="recompute"))
    module = Stopped()
    with pytest.raises(SystemExit):
        fit(tmp_path, module, Keep(), Ema(decay=0.9, buffers="recompute"))
    assert Stopped.steps == 14
    assert_equal(module, watch.steps[11])
    again = Net()
    fit(tmp_path, again, Ema(decay=0.9, buffers="recompute"), ckpt_path=tmp_path / "stopped.safetensors", seed=1)
    assert_equal(again, whole)


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("buffers", ["average", "recompute"])
def test_training_that_goes_on_after_its_end_goes_on_with_its_own_weights(tmp_path, from_file, buffers):
    options = {"decay": 0.9, "every_n_steps": 5, "buffers": buffers}
    whole, watch = Net(), Watch()
    fit(tmp_path, whole, watch, Ema(**options), max_epochs=3)
    module, plugin, path = Net(), Ema(**options), tmp_path / "end.safetensors"
    first = fit(tmp_path, module, plugin, max_steps=9)
    assert_close(values(module), {k: v for k, v in recurrence(watch.steps[:9], every=5).items() if "running" not in k})
    if from_file:
        first.run.save_checkpoint(path)
        module = Net()
        fit(tmp_path, module, Ema(**options), max_epochs=3, ckpt_path=path, seed=1)
    else:
        first.max_steps, first.max_epochs = None, 3
        first.fit(module, data())
    assert_equal(module, whole)


def test_a_checkpoint_holds_both_sets_as_plain_tensors(tmp_path):
    module, watch, path = Net(), Watch(), tmp_path / "3.safetensors"
    fit(tmp_path, module, Save(tmp_path), watch, Ema(decay=0.9))
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        names = json.loads(file.read(size))
    from safetensors.torch import load_file

    tensors = load_file(path)
    assert set(tensors) < set(names)
    prefix = "plugins.ema.weights."
    averages = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    assert_close(averages, recurrence(watch.steps[:3]))
    plain = Net()
    plain.load_state_dict({**watch.steps[2], **averages})
    assert_close({k[7:]: v for k, v in tensors.items() if k.startswith("module.")}, watch.steps[2])


def test_evaluation_of_a_checkpoint_uses_the_average_that_validation_used(tmp_path):
    module, watch = Net(), Watch()
    trainer = fit(tmp_path, module, Save(tmp_path), watch, {"ema": {"decay": 0.9}})
    hand = Net()
    hand.load_state_dict({**watch.steps[2], **{name: value.float() for name, value in recurrence(watch.steps[:3]).items()}})
    expected = Trainer(root_dir=tmp_path, plugins=[], accelerator="cpu").test(hand, data())[0]["test_loss"]
    other = Net()
    assert trainer.test(other, data(), ckpt_path=saved(tmp_path, 3))[0]["test_loss"] == pytest.approx(expected, rel=1e-5)
    final = tmp_path / "final.safetensors"
    trainer.fit(module, data())
    trainer.run.save_checkpoint(final)
    assert_equal(load(final)["module"], module)
    trainer.test(other, data(), ckpt_path=final)
    assert_equal(other, module)
    own = Trainer(root_dir=tmp_path, plugins=[Ema(validate=False)], accelerator="cpu")
    own.test(other, data(), ckpt_path=saved(tmp_path, 3))
    assert_equal(other, watch.steps[2])


def test_an_instance_in_a_second_run_begins_anew(tmp_path):
    plugin, first, second = Ema(decay=0.9), Net(), Net()
    fit(tmp_path, first, plugin)
    fit(tmp_path, second, plugin)
    assert_equal(first, second)
    assert plugin.updates == 12


def test_nothing_averaged_is_said(tmp_path, caplog):
    module, watch = Net(), Watch()
    fit(tmp_path, module, watch, Ema(every_n_steps=100), val=data())
    assert_equal(module, watch.steps[11])
    assert [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING] == [
        "plugin 'ema': training ended before anything was averaged: the module keeps its own weights"
    ]


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("decay", 1.0, "decay must be a number from 0 to below 1, got 1.0"),
        ("decay", -0.1, "decay must be a number from 0 to below 1, got -0.1"),
        ("decay", "0.9", "decay must be a float, got '0.9'"),
        ("decay", float("nan"), "decay must be a float, got nan"),
        ("decay", True, "decay must be a float, got True"),
        ("every_n_steps", 0, "every_n_steps must be a number of steps, at least 1, got 0"),
        ("every_n_steps", 2.0, "every_n_steps must be an int, got 2.0"),
        ("buffers", "all", "buffers must be 'average' or 'recompute' or 'keep', got 'all'"),
        ("warmup", 10, "warmup must be a bool, got 10"),
        ("validate", "yes", "validate must be a bool, got 'yes'"),
    ],
)
def test_a_bad_option_is_one_clear_error(option, value, text):
    with pytest.raises((ValueError, TypeError)) as error:
        Ema(**{option: value})
    assert str(error.value) == text
    with pytest.raises(PluginError, match="plugin 'ema' "):
        Trainer(max_epochs=1, plugins=[{"ema": {option: value}}])


def test_statistics_cannot_be_taken_anew_from_an_iterator_or_in_manual_optimization(tmp_path):
    class Manual(Net):
        automatic_optimization = False

    with pytest.raises(ValueError, match="needs a second pass over the training data, and an iterator gives them once"):
        fit(tmp_path, Net(), Ema(buffers="recompute"), loader=iter(data()))
    with pytest.raises(ValueError, match="which is not possible in manual optimization: write buffers='average' or 'keep'"):
        fit(tmp_path, Manual(), Ema(buffers="recompute"))
    fit(tmp_path, Net(norm=False), Ema(buffers="recompute"), loader=iter(data()), max_epochs=1)


def test_two_averages_in_one_run_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="a module can hold one average of its weights, and ema:one and ema:two would each leave one in it"
    ):
        fit(tmp_path, Net(), {"ema:one": {}}, {"ema:two": {}})
