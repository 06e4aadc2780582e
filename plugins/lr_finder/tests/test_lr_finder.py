"""What the learning-rate finder promises, in numbers."""

import copy
import dataclasses
import itertools
import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from torchplug import Module, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_lr_finder import METHODS, LearningRateFinder, RangeTest, lr_find


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Quadratic(Module):
    """0.5 x'Hx with eigenvalues from L / condition to L."""

    def __init__(self, seed, condition=10.0, largest=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.largest = largest or 10 ** float(torch.empty(1).uniform_(-1, 2, generator=generator))
        values = torch.logspace(math.log10(self.largest / condition), math.log10(self.largest), 10)
        basis = torch.linalg.qr(torch.randn(10, 10, generator=generator))[0]
        self.register_buffer("matrix", basis @ torch.diag(values) @ basis.T)
        self.x = nn.Parameter(torch.randn(10, generator=generator))

    def training_step(self, batch):
        return 0.5 * self.x @ self.matrix @ self.x

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.123)


class Net(Module):
    def __init__(self, lr=0.05, scheduler=None, groups=False, precision=None):
        super().__init__()
        self.save_hyperparameters("lr")
        self.scheduler, self.groups = scheduler, groups
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.rates = []

    def training_step(self, batch):
        self.rates.append([group["lr"] for group in self.optimizers().param_groups] if self.run.training else None)
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        lr = self.hparams.lr
        first, rest = {"params": self.layers[0].parameters()}, {"params": self.layers[1:].parameters(), "lr": lr / 5}
        optimizer = torch.optim.SGD([first, rest] if self.groups else self.parameters(), lr=lr, momentum=0.9)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer, lr), "interval": "step"}}


def data(batches=8):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4 * batches, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader(**options):
    return DataLoader(data(), 4, **{"shuffle": True, **options})


def trainer(tmp_path, *plugins, **options):
    return Trainer(plugins=list(plugins), root_dir=tmp_path, **{"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1, **options})


def find(module, tmp_path, **options):
    return lr_find(trainer(tmp_path), module, [torch.zeros(1)] if isinstance(module, Quadratic) else loader(), **options)


# ---------------------------------------------------------------------- the curve


@pytest.mark.slow
def test_it_passes_the_conformance_checks():
    check_plugin("lr_finder", steps=20)


def test_a_constant_loss_is_that_constant_from_the_first_point_on_and_rates_are_geometric(tmp_path):
    class Constant(Net):
        def training_step(self, batch):
            return self.layers(batch[0]).sum() * 0 + 1.5

    found = find(Constant(), tmp_path, min_lr=1e-6, max_lr=1.0, steps=25)
    assert found.smoothed == pytest.approx([1.5] * 25, abs=1e-12)
    assert found.lrs == pytest.approx([10 ** (-6 + 6 * i / 24) for i in range(25)], rel=1e-12)
    assert found.suggestion() is None and not found.diverged


def test_linear_rates(tmp_path):
    found = find(Net(), tmp_path, min_lr=0.001, max_lr=0.011, steps=11, mode="linear")
    assert found.lrs == pytest.approx([0.001 * (1 + i) for i in range(11)])


def test_smoothing_is_the_corrected_exponential_mean(tmp_path):
    found = find(Net(), tmp_path, steps=20, max_lr=0.1, smoothing=0.8)
    weights = [0.2 * 0.8**i for i in range(20)]
    for i, smoothed in enumerate(found.smoothed):
        used = weights[: i + 1]
        assert smoothed == pytest.approx(sum(w * loss for w, loss in zip(used, found.losses[i::-1], strict=True)) / sum(used))


@pytest.mark.parametrize("condition", [10.0, pytest.param(1.0, marks=pytest.mark.slow), pytest.param(100.0, marks=pytest.mark.slow)])
def test_on_quadratics_the_suggestion_is_near_one_over_the_curvature(condition, tmp_path):
    for seed in range(20):
        module = Quadratic(seed, condition)
        found = find(module, tmp_path, max_lr=1000.0)
        assert found.diverged
        assert 1 / 3 < found.suggestion() * module.largest < 3, (seed, condition)
        for method in METHODS:
            rate = found.suggestion(method)
            assert rate is None or 1e-6 <= rate <= found.lrs[-1], method


def test_a_loss_that_is_not_a_number_ends_the_test(tmp_path):
    class Breaks(Net):
        def training_step(self, batch):
            loss = super().training_step(batch)
            return loss * float("nan") if self.optimizers().param_groups[0]["lr"] > 1e-3 else loss

    found = find(Breaks(), tmp_path)
    assert found.diverged and found.lrs[-2] <= 1e-3 < found.lrs[-1] and len(found.losses) == len(found.lrs) - 1
    assert found.suggestion("divergence") == pytest.approx(found.lrs[-1] / 10)


def test_a_negative_loss_that_falls_does_not_count_as_diverging(tmp_path):
    class Negative(Quadratic):
        def training_step(self, batch):
            return super().training_step(batch) - 50

    found = find(Negative(1, largest=1.0), tmp_path, max_lr=1.0)
    assert not found.diverged and len(found.lrs) == 100


# ---------------------------------------------------------------------- no trace


class Fuse:
    """Raises when a place is reached for the n-th time; while it is on."""

    def __init__(self, place="", after=1):
        self.place, self.left, self.on = place, after, True

    def __call__(self, place):
        if self.on and place == self.place:
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("on purpose")


class Noisy(Dataset):
    """Samples with noise from every generator."""

    def __init__(self, fuse):
        self.fuse = fuse

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.fuse("data set")
        x = torch.full((4,), index / 24) + torch.rand(4) + random.random() + float(np.random.rand())
        return x, x.sum(0, keepdim=True)


class Shuffles(RandomSampler):
    def __init__(self, data, fuse):
        super().__init__(data, generator=torch.Generator().manual_seed(3))
        self.fuse = fuse

    def __iter__(self):
        self.fuse("sampler")
        return super().__iter__()


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fuse):
        ctx.fuse = fuse
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.fuse("backward")
        return gradient, None


class Adam(torch.optim.Adam):
    fuse = Fuse()

    def step(self, closure=None):
        self.fuse("optimizer")
        return super().step(closure)


class Changes(Net):
    """Everything that a step, or making loaders and optimizers, can change; and every place in which something can fail."""

    def __init__(self, fuse):
        super().__init__()
        self.fuse, self.count, self.seen, self.lr = fuse, 0, [], 0.05
        self.layers[3].eval()
        for parameter in self.layers[0].parameters():
            parameter.grad = torch.ones_like(parameter)

    def setup(self, stage):
        self.fuse("setup")
        self.stage = stage

    def on_fit_start(self):
        self.fuse.on = False

    def on_train_epoch_start(self):
        self.fuse.on = self.run.position.epoch == 1

    def train_dataloader(self):
        self.fuse("train_dataloader")
        self.data = Noisy(self.fuse)
        return DataLoader(self.data, 4, sampler=Shuffles(self.data, self.fuse), collate_fn=self.collate)

    def collate(self, samples):
        self.fuse("collate")
        return torch.utils.data.default_collate(samples)

    def training_step(self, batch):
        self.fuse("training_step")
        self.count += 1
        self.seen.append(len(batch[0]))
        loss = Breaks.apply(super().training_step(batch), self.fuse)
        self.fuse("end of training_step")
        return loss

    def configure_optimizers(self):
        self.fuse("configure_optimizers")
        self.optimizer = Adam(self.parameters(), lr=self.hparams.lr)
        self.optimizer.fuse = self.fuse
        scheduler = lr_scheduler.OneCycleLR(self.optimizer, self.hparams.lr, total_steps=12)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


EVENTS = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_after_optimizer_step",
          "on_before_zero_grad", "on_train_batch_end"]  # fmt: skip


def announced(event):
    return lambda self: self.fuse(event)


for event in EVENTS:
    setattr(Changes, event, announced(event))


class TakesPart:
    """A plugin in the steps, with a state."""

    def __init__(self, fuse):
        self.fuse, self.moved, self.batches = fuse, 0, []

    @hookimpl
    def setup(self):
        self.batches.append("setup")

    @hookimpl
    def move_batch(self, batch):
        self.fuse("move_batch")
        self.moved += 1
        self.batches.append(len(batch))

    @hookimpl
    def clip_gradients(self, run, optimizer):
        self.fuse("clip_gradients")

    def state_dict(self):
        return {"moved": self.moved, "batches": list(self.batches)}

    def load_state_dict(self, state):
        self.moved, self.batches = state["moved"], list(state["batches"])


def plain(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return copy.copy(value) if isinstance(value, (int, float, str, set, type(None))) else id(value)


def everything(module, *others):
    """Values of what can be copied, identities of the rest."""
    parameters = [(id(p), str(p.dtype), p.requires_grad, plain(p.grad)) for p in module.parameters()]
    generators = torch.get_rng_state().tolist(), random.getstate(), plain(np.random.get_state()[1].tolist()), np.random.get_state()[2]
    modes = [part.training for part in module.modules()]
    return [plain(module.state_dict()), parameters, modes, generators, *(plain(vars(each)) for each in (module, *others))]


def inside(run):
    """The same in a run, with all that belongs to it but the rates."""
    rates = ("lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "_last_lr")

    def without(state):
        return {key: value for key, value in state.items() if key not in rates}

    optimizers = [[plain(each.state_dict()["state"]), [plain(without(group)) for group in each.param_groups]] for each in run.optimizers]
    schedulers = [plain(without(each.scheduler.state_dict())) for each in run.schedulers]
    loader = run.loaders["train"][0]
    place = [loader.sampler.generator.get_state().tolist(), loader._iterator is None]
    scaler = run.scaler and plain(run.scaler.state_dict())
    plugins = [plain(vars(each)) for each in run.plugins.values() if not isinstance(each, (LearningRateFinder, Probe))]
    options = {name: value for name, value in vars(run.options).items() if name != "plugins"}
    rest = [dataclasses.asdict(run.position), options, dict(run.metrics.results()), run.stop_reason, run.window]
    module = everything(run.module)
    module[4] = {key: value for key, value in module[4].items() if key not in ("lr", "_hparams")}
    return [module, optimizers, schedulers, place, scaler, plugins, rest, [id(each) for each in (*run.optimizers, run.stream, loader)]]


class Probe:
    """Looks at everything right before and after the finder."""

    def __init__(self):
        self.seen = []

    @hookimpl(wrapper=True)
    def on_train_epoch_start(self, run):
        self.seen.append(inside(run))
        try:
            return (yield)
        finally:
            self.seen.append(inside(run))


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def seeded():
    torch.manual_seed(1), random.seed(1), np.random.seed(1)


PLACES = ["data set", "sampler", "collate", "move_batch", "training_step", "end of training_step", "backward", "clip_gradients",
          "optimizer", *EVENTS]  # fmt: skip


OFTEN = {"sampler", "training_step", "clip_gradients", "optimizer"}


@pytest.mark.parametrize("after", [1, slow(5)])
@pytest.mark.parametrize("place", ["", "setup", "train_dataloader", "configure_optimizers", *PLACES])
def test_from_python_no_trace_is_left_whatever_fails(place, after, tmp_path):
    seeded()
    fuse = Fuse(place, after)
    module, takes_part = Changes(fuse), TakesPart(fuse)
    t = trainer(tmp_path / "runs", takes_part, "journal", gradient_clip_val=0.5, precision="bf16-true" if after > 1 else "32-true")
    before = everything(module, t, takes_part)
    if place in ("", "setup", "train_dataloader", "configure_optimizers", "sampler") and (after > 1 or not place):
        fuse.place = ""
        lr_find(t, module, steps=10)
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            lr_find(t, module, steps=10)
    fuse.place, fuse.left = place, after
    assert everything(module, t, takes_part) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("precision", ["32-true", slow("16-mixed")])
@pytest.mark.parametrize("place", ["", *(each if each in OFTEN else slow(each) for each in PLACES)])
def test_in_a_fit_no_trace_is_left_but_the_rate_whatever_fails(place, precision, tmp_path):
    seeded()
    fuse, probe = Fuse(place, 1 if place == "sampler" else 3), Probe()
    module = Changes(fuse)
    t = trainer(tmp_path, TakesPart(fuse), probe, {"lr_finder": {"steps": 10, "at_epochs": [1]}}, max_epochs=2, precision=precision)
    if not place:
        t.fit(module)
        assert module.lr == module.hparams.lr == t.enabled["lr_finder"].result.suggestion() != 0.05
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            t.fit(module)
        assert module.lr == module.hparams.lr == 0.05
    assert len(probe.seen) == 4
    assert probe.seen[3] == probe.seen[2]
    assert probe.seen[2][0] != probe.seen[0][0], "an epoch was trained before"


def test_what_the_plugins_of_the_trainer_do_in_a_step_is_done_in_the_test_too(tmp_path):
    class Clips:
        calls = 0

        @hookimpl
        def clip_gradients(self, optimizer):
            Clips.calls += 1
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.zero_()
            return True

    found = lr_find(trainer(tmp_path, Clips()), Quadratic(1), [torch.zeros(1)], steps=20)
    assert Clips.calls == 20 and len(set(found.losses)) == 1 and found.suggestion() is None


def test_two_calls_from_python_find_the_same(tmp_path):
    module, t, train = Net(), trainer(tmp_path), loader(generator=torch.Generator().manual_seed(3))
    order = train.generator.get_state()
    state = torch.get_rng_state()
    first, second = lr_find(t, module, train), lr_find(t, module, train)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(train.generator.get_state(), order)
    assert first == second and len(set(first.losses)) > 20


def test_after_a_signal_in_the_test_the_run_that_goes_on_has_the_rate(tmp_path):
    class Interrupted(Net):
        def training_step(self, batch):
            if self.run.optimizers[0].param_groups[0]["lr"] > 1e-4 and not self.run.training:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch)

    def fit(net, **options):
        torch.manual_seed(1)
        module, t = net(), trainer(tmp_path, {"lr_finder": {"steps": 30, "max_lr": 10.0}}, "checkpoint", name="net")
        t.fit(module, loader(), **options)
        return module

    whole = fit(Net)
    with pytest.raises(SystemExit):
        fit(Interrupted)
    again = fit(Net, ckpt_path="last")
    assert again.hparams.lr == whole.hparams.lr and again.rates == whole.rates[1:]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))


SCHEDULERS = {
    "none": None,
    "one cycle": lambda optimizer, lr: lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=16
    ),
    "cosine": lambda optimizer, lr: lr_scheduler.CosineAnnealingLR(optimizer, 16),
    "steps": lambda optimizer, lr: lr_scheduler.StepLR(optimizer, 3),
    "warm-up": lambda optimizer, lr: lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5)),
    "one after the other": lambda optimizer, lr: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)], [4]
    ),
}


OPTIONS = {
    "": {},
    "accumulation": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
    "16-mixed": {"precision": "16-mixed"},
    "bf16-mixed": {"precision": "bf16-mixed"},
}
FAST = {("", "one after the other", True), ("accumulation", "cosine", True), ("16-mixed", "one cycle", False)}


@pytest.mark.parametrize(
    ("options", "name", "groups"),
    [pytest.param(*each, marks=() if each in FAST else pytest.mark.slow) for each in itertools.product(OPTIONS, SCHEDULERS, (False, True))],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # torch's SequentialLR in older versions
def test_the_fit_is_the_one_that_would_have_begun_with_the_rate(name, groups, options, tmp_path):
    def fit(lr, *plugins):
        torch.manual_seed(3)
        module = Net(lr, SCHEDULERS[name], groups)
        t = trainer(tmp_path, *plugins, max_epochs=2, **OPTIONS[options])
        t.fit(module, loader())
        return module, t

    module, t = fit(0.05, {"lr_finder": {"steps": 30, "max_lr": 100.0}})
    rate = t.enabled["lr_finder"].result.suggestion()
    assert rate != 0.05 and module.hparams.lr == rate
    expected, _ = fit(rate)
    for mine, theirs in zip(module.rates, expected.rates, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-15)
    for mine, theirs in zip(module.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert len(module.rates) == 16


# ---------------------------------------------------------------------- when


class Counts:
    def __init__(self):
        self.steps, self.texts, self.figures, self.metrics = 0, [], [], []

    @hookimpl
    def on_train_batch_end(self):
        self.steps += 1

    @hookimpl
    def log_metrics(self, step):
        self.metrics.append(step)

    @hookimpl
    def log_text(self, name, text):
        self.texts.append((name, text))

    @hookimpl
    def log_figure(self, name, figure):
        self.figures.append(name)


def test_it_is_looked_for_at_the_epochs_that_are_named_and_others_hear_of_the_result_alone(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    counts = Counts()
    t = trainer(tmp_path, {"lr_finder": {"at_epochs": [0, 2], "max_lr": 10.0}}, counts, max_epochs=3)
    t.fit(Net(), loader())
    assert counts.steps == 24 and sorted(set(counts.metrics)) == list(range(1, 25))
    assert counts.figures == ["lr_finder"] * 2 and [name for name, _ in counts.texts] == ["lr_finder"] * 2
    rate = t.enabled["lr_finder"].result.suggestion()
    assert f"lr_finder: learning rate {rate:.3e}, by minimum" in caplog.text
    assert counts.texts[1][1].count("\n") == len(t.enabled["lr_finder"].result.lrs) + 1


def test_a_run_that_goes_on_does_not_look_for_it_again(tmp_path):
    class Saves:
        @hookimpl
        def on_train_epoch_end(self, run):
            if run.position.epoch == 0:
                run.save_checkpoint(tmp_path / "edge.safetensors")

        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.step == 3:
                run.save_checkpoint(tmp_path / "middle.safetensors")

    torch.manual_seed(1)
    whole = Net()
    trainer(tmp_path, {"lr_finder": {"max_lr": 10.0}}, Saves(), max_epochs=2, seed=1).fit(whole, loader())
    for name in ("edge", "middle"):
        module = Net()
        t = trainer(tmp_path, {"lr_finder": {"max_lr": 10.0}}, max_epochs=2, seed=1)
        t.fit(module, loader(), ckpt_path=tmp_path / f"{name}.safetensors")
        assert t.enabled["lr_finder"].result is None
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), whole.state_dict().values(), strict=True))


def test_tune_sets_the_rate_for_a_fit_that_follows(tmp_path):
    module, t = Net(), trainer(tmp_path, {"lr_finder": {"steps": 30}})
    weights = copy.deepcopy(module.state_dict())
    found = t.tune(module, loader())["lr_finder"]
    assert isinstance(found, RangeTest) and module.hparams.lr == found.suggestion()
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), weights.values(), strict=True))
    plain = trainer(tmp_path)
    plain.fit(module, loader())
    assert plain.run.optimizers[0].param_groups[0]["lr"] == found.suggestion()


def test_the_batch_size_is_looked_for_first_where_both_are_enabled(tmp_path):
    class Loads(Net):
        def __init__(self):
            super().__init__()
            self.batch_size = 2

        def train_dataloader(self):
            return DataLoader(data(), self.batch_size)

    module = Loads()
    found = trainer(tmp_path, {"lr_finder": {"steps": 30}}, {"batch_size_finder": {"max": 8}}).tune(module)
    assert set(found) == {"lr_finder", "batch_size_finder"} and module.batch_size == found["batch_size_finder"].size == 8
    assert module.hparams.lr == found["lr_finder"].suggestion()
    assert found["lr_finder"] == lr_find(trainer(tmp_path), module, steps=30)


def test_the_attribute_is_set_where_the_module_keeps_it(tmp_path):
    class Own(Quadratic):
        def __init__(self):
            super().__init__(1)
            self.rate = 0.01

        def on_before_backward(self):
            self.__class__.stepped = True

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.rate)

    module = Own()
    t = trainer(tmp_path, {"lr_finder": {"attribute": "rate", "steps": 40, "max_lr": 100.0}})
    assert t.tune(module, [torch.zeros(1)])["lr_finder"].suggestion() == module.rate
    assert Own.stepped
    del Own.stepped
    with pytest.raises(AttributeError, match="Own has no attribute 'speed', nor a hyperparameter of this name"):
        trainer(tmp_path, {"lr_finder": {"attribute": "speed", "steps": 40, "max_lr": 100.0}}).tune(module, [torch.zeros(1)])
    assert not hasattr(Own, "stepped"), "it is said before anything is tried"


def test_without_a_suggestion_the_rate_stays(tmp_path, caplog):
    class Constant(Net):
        def training_step(self, batch):
            return self.layers(batch[0]).sum() * 0 + 1.5

    module, t = Constant(), trainer(tmp_path, "lr_finder")
    t.fit(module, loader())
    assert module.hparams.lr == 0.05 and t.run.optimizers[0].param_groups[0]["lr"] == 0.05
    assert "the losses suggest no learning rate, and it stays as it was" in caplog.text


# ---------------------------------------------------------------------- the result, and mistakes


def test_the_result_can_be_drawn_and_saved(tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    found = find(Quadratic(1), tmp_path, max_lr=1000.0)
    figure = found.plot()
    assert isinstance(figure, figures.Figure)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and list(axes.lines[1].get_ydata()) == found.smoothed
    assert axes.lines[2].get_xdata()[0] == found.suggestion()
    assert len(found.plot(suggest=False).axes[0].lines) == 2
    found.save(tmp_path / "found.json")
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["lrs"] == found.lrs and saved["suggestion"] == found.suggestion()


def test_methods_on_a_curve_that_was_drawn_by_hand():
    """Flat, down to the middle, flat, up and up: each method has its place on it."""
    lrs = [10 ** (-6 + i / 10) for i in range(80)]
    smoothed = [2.0] * 30 + [2.0 - 0.1 * i for i in range(1, 16)] + [0.5] * 15 + [0.5 + 0.02 * i * i for i in range(1, 21)]
    found = RangeTest(lrs, smoothed, smoothed, True)
    assert found.suggestion("divergence") == pytest.approx(lrs[-1] / 10)
    assert found.suggestion() == found.suggestion("minimum")
    assert lrs[28] <= found.suggestion("steepest") <= lrs[44]
    assert found.suggestion("minimum") == pytest.approx(lrs[44] / 10)
    assert lrs[34] <= found.suggestion("valley") <= lrs[40]
    assert lrs[40] <= found.suggestion("slide") <= lrs[62]
    rising = RangeTest(lrs[:12], *[[2.0 + i for i in range(12)]] * 2)
    assert rising.suggestion() == lrs[0], "no rate that was not tried"
    with pytest.raises(ValueError, match="method must be one of minimum, steepest, valley, slide, divergence, got 'best'"):
        found.suggestion("best")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr must be above 0 and below max_lr, got 1.0 and 0.1"),
        ({"min_lr": 0.0}, "min_lr must be above 0"),
        ({"steps": 5}, "steps must be at least 10, got 5"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1, got 1.0"),
        ({"divergence": 1.0}, "divergence must be above 1, got 1.0"),
        ({"method": "best"}, "method must be one of minimum, steepest, valley, slide, divergence, got 'best'"),
        ({"mode": "log"}, "mode must be one of exponential, linear, got 'log'"),
    ],
)
def test_options_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        LearningRateFinder(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"at_epochs": 3}, r"at_epochs must be a list of epochs, counted from 0, got 3; write \[0, 5\] for two of them"),
        ({"at_epochs": [0, -1]}, "at_epochs must be a list of epochs"),
        ({"at_epochs": ["0"]}, "at_epochs must be a list of epochs"),
        ({"steps": 50.0}, "steps must be a whole number, got 50.0"),
        ({"max_lr": True}, "max_lr must be a number, got True"),
    ],
)
def test_options_of_another_kind_are_refused(options, text):
    with pytest.raises(TypeError, match=text):
        LearningRateFinder(**options)


def test_several_optimizers_and_manual_optimization_are_refused(tmp_path):
    class Two(Quadratic):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    class Manual(Quadratic):
        def __init__(self, seed):
            super().__init__(seed)
            self.automatic_optimization = False

    for module, what in ((Two(1), "for 2 optimizers"), (Manual(1), "in manual optimization")):
        with pytest.raises(ValueError, match=f"a learning rate cannot be looked for {what}"):
            find(module, tmp_path)
