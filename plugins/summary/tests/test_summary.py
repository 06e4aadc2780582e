"""What the summary plugin prints, and that its forward pass leaves no trace."""

import copy
import io
import random
import re
import sys
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_summary import Summary, _short


class Base(Module):
    """What every module here needs; subclasses bring layers."""

    def training_step(self, batch, batch_idx):
        return self(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Mlp(Base):
    """784-64-64-10, as in the Fashion-MNIST example."""

    def __init__(self):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(784, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        x = torch.relu(self.l1(x.flatten(1)))
        return self.l3(x + self.drop(torch.relu(self.l2(x))))


IMAGES = [torch.ones(2, 1, 28, 28)] * 2


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    torch.set_num_threads(1)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def fit(tmp_path, capsys):
    """Trains for an epoch and returns what was printed."""

    def run(module, batches, *plugins, summary=None, **options):
        options = {"max_epochs": 1, "num_sanity_val_steps": 0, **options}
        Trainer(plugins=[*plugins, summary or Summary()], root_dir=tmp_path, **options).fit(module, batches)
        return capsys.readouterr().err

    return run


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each row by the name of the layer."""
    table = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]
    return {name: cells for name, *cells in table[2:]}


# ---------------------------------------------------------------------- numbers


@pytest.mark.slow
def test_it_passes_the_conformance_checks():
    check_plugin("summary")


def test_parameters_and_sizes_are_those_of_the_formula(fit):
    text = fit(Mlp(), IMAGES)
    l1, l2, l3 = 784 * 64 + 64, 64 * 64 + 64, 64 * 10 + 10
    assert (l1, l2, l3) == (50240, 4160, 650)
    assert [cell.strip() for cell in text.splitlines()[0].split("|")] == ["name", "type", "params", "trainable", "size (MB)"]
    assert rows(text) == {
        "l1": ["Linear", "50.2 K", "50.2 K", f"{l1 * 4 / 1e6:.3f}"],
        "l2": ["Linear", "4.16 K", "4.16 K", f"{l2 * 4 / 1e6:.3f}"],
        "l3": ["Linear", "650", "650", f"{l3 * 4 / 1e6:.3f}"],
        "drop": ["Dropout", "0", "0", "0.000"],
    }
    total = l1 + l2 + l3
    assert f"parameters: 55 K ({total:,})\ntrainable: 55 K, non-trainable: 0\nsize: {total * 4 / 1e6:.3f} MB" in text


def test_frozen_parameters_are_told_apart(fit):
    module = Mlp()
    module.l2.requires_grad_(False)
    module.l3.bias.requires_grad_(False)
    text = fit(module, IMAGES)
    assert rows(text)["l2"][1:3] == ["4.16 K", "0"] and rows(text)["l3"][1:3] == ["650", "640"]
    assert "trainable: 50.9 K, non-trainable: 4.17 K" in text  # 55050 - 4170 and 4160 + 10


def test_parameters_that_layers_share_are_counted_once_in_the_totals(fit):
    class Tied(Base):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(100, 8), nn.Linear(8, 100, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    text = fit(Tied(), [torch.arange(4)])
    assert rows(text)["embed"][1] == rows(text)["head"][1] == "800"
    assert "parameters: 800 (800)" in text and "size: 0.003 MB" in text
    assert "shared between layers, counted once: 800" in text


def test_buffers_count_for_the_size_and_not_for_the_parameters(fit):
    class Normed(Base):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1000)

        def forward(self, x):
            return self.norm(x)

    text = fit(Normed(), [torch.randn(4, 1000)])
    assert rows(text)["norm"][1] == "2 K"  # weight and bias; mean, variance (float32) and a counter (int64) are buffers
    assert f"size: {(4 * 1000 * 4 + 8) / 1e6:.3f} MB" in text


def test_parameters_of_the_module_itself_have_rows(fit):
    class Own(Base):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(7))

        def forward(self, x):
            return x * self.scale

    assert rows(fit(Own(), [torch.ones(2, 7)]))["scale"][:2] == ["Parameter", "7"]


class Nested(Base):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.ReLU()))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("depth", "names"),
    [
        (0, []),
        (1, ["body"]),
        (2, ["body", "body.0", "body.1"]),
        (-1, ["body", "body.0", "body.1", "body.1.0", "body.1.1"]),
    ],
)
def test_max_depth_says_how_many_levels_are_shown_and_changes_no_total(fit, depth, names):
    text = fit(Nested(), [torch.ones(2, 2)], summary=Summary(max_depth=depth))
    assert list(rows(text)) == names
    assert "parameters: 25 (25)" in text  # 2*3 + 3 + 3*4 + 4


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (650, "650"),
        (999, "999"),
        (1000, "1 K"),
        (392_000, "392 K"),
        (50_240, "50.2 K"),
        (999_499, "999 K"),
        (999_600, "1 M"),
        (11_689_512, "11.7 M"),
        (7_000_000_000, "7 B"),
        (1_500_000_000_000, "1.5 T"),
        (12_345_000_000_000_000, "12,345 T"),
    ],
)
def test_numbers_are_short(number, text):
    assert _short(number) == text


# ---------------------------------------------------------------------- shapes


def conv(size: int, kernel: int, stride: int, padding: int) -> int:
    """The output size of a convolution or pooling, from its documentation."""
    return (size + 2 * padding - kernel) // stride + 1


def test_shapes_of_a_convolutional_network_are_those_of_the_formula(fit):
    class Conv(Base):
        def __init__(self):
            super().__init__()
            self.c1 = nn.Conv2d(3, 8, kernel_size=5, stride=2, padding=1)
            self.pool = nn.MaxPool2d(3, stride=2)
            self.c2 = nn.Conv2d(8, 4, kernel_size=3)
            self.example_input_array = torch.zeros(16, 3, 33, 47)

        def forward(self, x):
            return self.c2(self.pool(self.c1(x)))

    text = fit(Conv(), [torch.zeros(2, 3, 33, 47)])
    sizes = [(33, 47)]
    for kernel, stride, padding in ((5, 2, 1), (3, 2, 0), (3, 1, 0)):
        sizes.append(tuple(conv(size, kernel, stride, padding) for size in sizes[-1]))
    channels = (3, 8, 8, 4)
    shapes = [f"[16, {c}, {h}, {w}]" for c, (h, w) in zip(channels, sizes, strict=True)]
    assert [cell.strip() for cell in text.splitlines()[0].split("|")][5:] == ["input", "output"]
    assert {name: cells[4:] for name, cells in rows(text).items()} == {"c1": shapes[:2], "pool": shapes[1:3], "c2": shapes[2:]}


def test_inputs_may_be_a_tuple_or_keywords_and_outputs_nested(fit):
    class Inner(nn.Module):
        def forward(self, a, b=None):
            return {"sum": a + b, "parts": (a, [b, 3])}

    class Outer(Base):
        def __init__(self, example):
            super().__init__()
            self.inner, self.unused, self.weight = Inner(), nn.ReLU(), nn.Parameter(torch.ones(1))
            self.example_input_array = example

        def forward(self, a, b):
            return self.weight * self.inner(a, b=b)["sum"]

        def training_step(self, batch, batch_idx):
            return self(batch, batch).sum()

    a, b = torch.ones(2, 3), torch.ones(1, 3)
    for example in ((a, b), {"b": b, "a": a}):
        found = rows(fit(Outer(example), [a]))
        assert found["inner"][4:] == ["[2, 3], b=[1, 3]", "{sum: [2, 3], parts: ([2, 3], ([1, 3], int))}"]
        assert found["unused"][4:] == found["weight"][4:] == ["-", "-"]


def test_a_layer_that_is_used_twice_shows_its_first_shapes(fit):
    class Twice(Base):
        def __init__(self):
            super().__init__()
            self.act, self.layer = nn.ReLU(), nn.Linear(3, 5)
            self.example_input_array = torch.ones(2, 3)

        def forward(self, x):
            return self.act(self.layer(self.act(x)))

    assert rows(fit(Twice(), [torch.ones(2, 3)]))["act"][4:] == ["[2, 3]", "[2, 3]"]


class Messy(Base):
    """Draws from every generator, writes into buffers and into its input, and logs, in forward."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.frozen = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.generator = torch.Generator().manual_seed(3)
        self.example_input_array = torch.full((5, 3), 2.0)
        self.frozen.eval()
        self.modes = []

    def forward(self, x):
        self.modes.append((torch.is_grad_enabled(), self.drop.training))
        self.calls += 1
        self.replaced = self.replaced + 1
        noise = torch.rand(()) + torch.rand((), generator=self.generator) + random.random() + numpy.random.rand()
        self.log("inside", noise)
        x.mul_(2.0)
        return self.drop(self.frozen(self.norm(x + noise)))


def trace(module):
    """Everything that a forward pass could change."""
    state = copy.deepcopy(module.state_dict())
    tensors = [state[name] for name in sorted(state)] + [module.example_input_array, module.generator.get_state(), torch.get_rng_state()]
    kind, keys, *rest = numpy.random.get_state()
    plain = [random.getstate(), kind, keys.tolist(), rest, [child.training for child in module.modules()]]
    return [tensor.clone() for tensor in tensors], plain, [id(buffer) for buffer in module.buffers()]


def test_finding_shapes_leaves_no_trace(fit):
    module, seen = Messy(), []

    class Before:
        before = ("summary",)

        @hookimpl
        def on_fit_start(self, run):
            seen.append(trace(module))

    class After:
        after = ("summary",)

        @hookimpl
        def on_fit_start(self, run):
            seen.append(trace(module))
            assert all(parameter.grad is None for parameter in module.parameters())
            assert not any(child._forward_hooks or child._forward_hooks_with_kwargs for child in module.modules())
            assert "inside" not in run.metrics

    text = fit(module, [torch.ones(4, 3)], Before(), After())
    assert rows(text)["norm"][4:] == ["[5, 3]", "[5, 3]"]  # it did run
    assert module.modes == [(False, False), (True, True)]  # without gradients and in eval mode, then training
    (tensors, plain, buffers), (tensors_after, plain_after, buffers_after) = seen
    assert all(torch.equal(before, after) for before, after in zip(tensors, tensors_after, strict=True))
    assert plain == plain_after and buffers == buffers_after


def test_a_run_with_the_table_is_bitwise_the_run_without(tmp_path):
    weights = []
    for plugins in ([], [Summary()]):
        torch.manual_seed(5)
        module = Mlp()
        module.example_input_array = torch.ones(3, 1, 28, 28)
        loader = DataLoader(torch.randn(20, 1, 28, 28), batch_size=4, shuffle=True)
        Trainer(max_epochs=2, plugins=plugins, root_dir=tmp_path).fit(module, loader)
        weights.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


class Saves:
    """Writes a checkpoint in mid-epoch."""

    def __init__(self, path):
        self.path = path

    @hookimpl
    def on_train_batch_end(self, run):
        if run.position.step == 3:
            run.save_checkpoint(self.path)


def test_a_run_that_goes_on_has_the_table_too_and_is_bitwise_the_one_that_was_not_stopped(tmp_path, capsys):
    path, weights, printed, plugin = tmp_path / "here.safetensors", [], [], Summary()
    for plugins, start in ([Saves(path)], None), ([plugin], path), ([plugin], path):
        torch.manual_seed(5)
        module = Mlp()
        module.example_input_array = torch.ones(3, 1, 28, 28)
        loader = DataLoader(torch.randn(20, 1, 28, 28), batch_size=4, shuffle=True)
        Trainer(max_epochs=2, plugins=plugins, root_dir=tmp_path).fit(module, loader, ckpt_path=start)
        weights.append(module.state_dict())
        printed.append(capsys.readouterr().err)
    assert all(torch.equal(value, other[name]) for other in weights[1:] for name, value in weights[0].items())
    assert not rows(printed[0]) and rows(printed[1])["l2"][4:] == ["[3, 64]", "[3, 64]"] and printed[1] == printed[2]


def test_an_example_that_fails_leaves_shapes_out_says_why_and_training_goes_on(fit, caplog):
    module = Mlp()
    module.example_input_array = torch.ones(2, 7)
    module.drop.eval()
    modes = []

    class After:
        after = ("summary",)

        @hookimpl
        def on_fit_start(self):
            modes.extend((module.training, module.drop.training))

    text = fit(module, IMAGES, After())
    assert rows(text)["l1"] == ["Linear", "50.2 K", "50.2 K", "0.201"]
    (message,) = [record.message for record in caplog.records if "shapes" in record.message]
    assert message.startswith("summary: shapes are left out: forward of example_input_array failed: RuntimeError: ")
    assert message.endswith("(2x7 and 784x64)") and "\n" not in message
    assert module._run is None and not any(child._forward_hooks for child in module.modules())
    assert modes == [True, False]


def test_lazy_parameters_are_shown_as_such_and_not_initialized(fit, caplog):
    class Lazy(Base):
        def __init__(self):
            super().__init__()
            with warnings.catch_warnings():  # older versions of torch say that lazy modules may change
                warnings.simplefilter("ignore")
                self.lazy, self.last = nn.LazyLinear(4), nn.Linear(4, 1)
            self.example_input_array = torch.ones(1, 3)
            self.seen = None

        def forward(self, x):
            return self.last(self.lazy(x))

        def on_train_start(self):
            self.seen = [nn.parameter.is_lazy(parameter) for parameter in self.lazy.parameters()]

    module = Lazy()
    text = fit(module, [torch.ones(2, 3)])
    assert rows(text)["lazy"][1:] == ["uninitialized", "uninitialized", "?"]
    assert "parameters: 5 (5)" in text
    assert "uninitialized, not counted: 2 parameters, whose shapes the first batch decides" in text
    assert "shapes are left out: the first forward pass would initialize" in caplog.text
    assert module.seen == [True, True]


def test_a_compiled_module_is_not_compiled_for_the_example(fit):
    module, compiled = Mlp(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class After:
        after = ("summary",)

        @hookimpl
        def on_fit_start(self):
            compiled.append("summary is done")

    module.example_input_array = torch.ones(2, 1, 28, 28)
    module.compile(backend=backend)
    text = fit(module, IMAGES, After())
    assert rows(text)["l1"][4:] == ["[2, 784]", "[2, 64]"]
    assert compiled[0] == "summary is done" and len(compiled) > 1  # training did compile


def test_the_example_gets_the_type_of_the_parameters_in_true_half_precision(fit):
    module = Mlp()
    module.example_input_array = torch.ones(2, 1, 28, 28)
    text = fit(module, IMAGES, precision="bf16-true")
    assert rows(text)["l1"][3:] == [f"{50240 * 2 / 1e6:.3f}", "[2, 784]", "[2, 64]"]


# ---------------------------------------------------------------------- output


@pytest.mark.parametrize("variable", [None, "FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_file_gets_plain_ascii_without_control_characters(fit, monkeypatch, variable):
    if variable:
        monkeypatch.setenv(variable, "1")
    text = fit(Mlp(), IMAGES)
    assert re.fullmatch(r"[\n -~]+", text)


def test_nothing_is_cut_where_there_is_no_terminal(fit, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    name = "layer_" * 30
    module = Mlp()
    module.add_module(name, nn.Linear(1, 1))
    assert rows(fit(module, IMAGES))[name][:2] == ["Linear", "2"]


def test_nothing_is_cut_in_a_narrow_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "60")
    module = Mlp()
    module.add_module("a_rather_long_name_of_a_layer", nn.Linear(1, 1))
    Trainer(max_epochs=1, plugins=[Summary()], root_dir=tmp_path).fit(module, IMAGES)
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert "".join(line.split("|")[0].strip() for line in text.splitlines()).count("a_rather_long_name_of_a_layer") == 1
    assert max(map(len, text.splitlines())) <= 60


def test_the_table_comes_once_per_fit_and_not_for_evaluations(tmp_path, capsys):
    class Evaluated(Mlp):
        def validation_step(self, batch, batch_idx):
            self.log("val", self(batch).mean())

        test_step = validation_step

    module, loader = Evaluated(), DataLoader(torch.ones(4, 1, 28, 28), batch_size=2)
    trainer = Trainer(max_epochs=2, num_sanity_val_steps=2, plugins=["summary"], root_dir=tmp_path)
    trainer.fit(module, loader, loader)
    assert capsys.readouterr().err.count("l1 ") == 1
    trainer.validate(module, loader)
    trainer.test(module, loader)
    trainer.predict(module, loader)
    assert "l1 " not in capsys.readouterr().err
    trainer.fit(module, loader, loader)
    assert capsys.readouterr().err.count("l1 ") == 1


def test_fast_dev_run_has_the_table(fit):
    assert "l1" in rows(fit(Mlp(), IMAGES, fast_dev_run=True))


def test_only_the_first_process_prints(fit):
    class Second:
        @hookimpl
        def setup(self, run):
            run.rank = 1

    module = Mlp()
    module.example_input_array = IMAGES[0]
    assert fit(module, IMAGES, Second()) == ""


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (-2, ValueError, "max_depth must be -1 (all levels) or at least 0, got -2"),
        ("all", TypeError, "max_depth must be a whole number, got 'all'"),
        (True, TypeError, "max_depth must be a whole number, got True"),
    ],
)
def test_an_option_that_cannot_be_is_named_with_what_it_may_be(value, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        Summary(max_depth=value)


def test_options_by_name_are_checked_when_the_trainer_is_built(tmp_path):
    assert Trainer(max_epochs=1, plugins=[{"summary": {"max_depth": -1}}]).enabled["summary"].max_depth == -1
    with pytest.raises(PluginError, match=r"plugin 'summary' \(torchplug-summary .*\): max_depth must be -1"):
        Trainer(max_epochs=1, plugins=[{"summary": {"max_depth": -7}}])
