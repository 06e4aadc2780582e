"""What a user subclasses: hyperparameters, loading, freezing, exporting, copying."""

from __future__ import annotations

import copy
import dataclasses
import enum
import pickle
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchplug import DataModule, Module, hookimpl
from torchplug.checkpoint import CheckpointError, load


class Net(Module):
    """At module level, so that it can be pickled."""

    def __init__(self, width: int = 4, lr: float = 0.1, *, name: str = "net") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(4, width)
        self.bn = nn.BatchNorm1d(width)
        self.example_input_array = torch.ones(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.layer(x))

    def training_step(self, batch: Any) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


@pytest.fixture
def saved(trainer: Any, loader: Any, tmp_path: Path) -> Any:
    """Trains a module for a few steps and returns the path of its checkpoint."""

    def save(module: Module) -> Path:
        class Saver:
            @hookimpl
            def on_train_end(self, run: Any) -> None:
                run.save_checkpoint(tmp_path / "saved.safetensors")

        trainer(plugins=[Saver()]).fit(module, loader(2))
        return tmp_path / "saved.safetensors"

    return save


# ---------------------------------------------------------------------- save_hyperparameters


def holding(*args: Any, **options: Any) -> type[Module]:
    """A class whose `__init__` calls `save_hyperparameters` with these arguments."""

    class Holding(Module):
        def __init__(self, a: int, b: str = "x", *, c: float = 0.5, **rest: Any) -> None:
            super().__init__()
            local = 3  # not an argument  # noqa: F841
            self.save_hyperparameters(*args, **options)

    return Holding


@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ((), {}, {"a": 1, "b": "x", "c": 0.5, "d": 4}),
        (("a",), {}, {"a": 1}),
        (("b", "c"), {}, {"b": "x", "c": 0.5}),
        (("d",), {}, {"d": 4}),
        ((), {"ignore": "a"}, {"b": "x", "c": 0.5, "d": 4}),
        ((), {"ignore": ["a", "d"]}, {"b": "x", "c": 0.5}),
        (({"p": 1, "q": [2]},), {}, {"p": 1, "q": [2]}),
        (({"p": 1, "q": 2},), {"ignore": "q"}, {"p": 1}),
        ((Namespace(p=1, q=2),), {}, {"p": 1, "q": 2}),
    ],
    ids=str,
)
def test_save_hyperparameters_in_each_form(args: Any, options: Any, expected: dict[str, Any]) -> None:
    module = holding(*args, **options)(1, d=4)
    assert dict(module.hparams) == expected
    for name, value in expected.items():
        assert getattr(module.hparams, name) == value


def test_hyperparameters_from_a_dataclass() -> None:
    @dataclasses.dataclass
    class Config:
        p: int = 1
        q: str = "x"

    assert dict(holding(Config(p=5))(1).hparams) == {"p": 5, "q": "x"}


def test_a_name_that_is_no_argument_is_an_error_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"save_hyperparameters: Holding.__init__ has no argument 'widt', did you mean 'width'\?"):
        holding("widt")(1, width=3)


@pytest.mark.parametrize("value", [3, [1, 2], Net], ids=repr)
def test_something_that_holds_no_hyperparameters_is_an_error_with_the_forms(value: Any) -> None:
    with pytest.raises(TypeError, match=r"save_hyperparameters takes names of arguments, a dict, a Namespace or a dataclass, got"):
        holding(value)(1)


def test_arguments_of_a_whole_family_are_saved_whoever_calls() -> None:
    class Base(Module):
        def __init__(self, width: int, depth: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Child(Base):
        def __init__(self, heads: int, **options: Any) -> None:
            super().__init__(**options)

    class LateChild(Base):
        def __init__(self, heads: int, width: int) -> None:
            super().__init__(width=width * 2)
            self.save_hyperparameters()

    assert dict(Child(3, width=8).hparams) == {"heads": 3, "width": 8, "depth": 2}
    assert dict(LateChild(3, 8).hparams) == {"heads": 3, "width": 8, "depth": 2}  # what the child was built with


def test_hyperparameters_can_be_read_and_written_as_attributes() -> None:
    module = Net(3)
    module.hparams.lr = 0.7
    assert module.hparams["lr"] == 0.7
    with pytest.raises(AttributeError, match=r"no hyperparameter 'widht', did you mean 'width'\?"):
        _ = module.hparams.widht


def test_a_module_without_them_has_none(tiny: Any) -> None:
    assert dict(tiny().hparams) == {}


def test_loggers_get_the_hyperparameters_of_module_and_data_module_as_plain_values(trainer: Any, loader: Any) -> None:
    class Kind(enum.Enum):
        FAST = "fast"

    class Data(DataModule):
        def __init__(self) -> None:
            super().__init__()
            self.hparams = {"batch_size": 2}

        def train_dataloader(self) -> Any:
            return loader(1)

    class Rich(Net):
        def __init__(self, kind: Any, path: Any, time: Any, nested: Any) -> None:
            super().__init__()
            self.save_hyperparameters("kind", "path", "time", "nested")

    class Logger:
        @hookimpl
        def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
            self.got = hyperparameters

    log = Logger()
    trainer(plugins=[log]).fit(Rich(Kind.FAST, Path("a/b"), timedelta(seconds=3), Namespace(x=(1, 2))), datamodule=Data())
    assert log.got == {
        "batch_size": 2, "kind": "fast", "path": str(Path("a/b")), "time": 3.0, "nested": {"x": (1, 2)},
        "width": 4, "lr": 0.1, "name": "net",
    }  # fmt: skip


def test_hyperparameters_are_kept_from_loggers_when_the_user_says_so(trainer: Any, loader: Any, make_recorder: Any) -> None:
    class Quiet(Net):
        def __init__(self, width: int = 4) -> None:
            super().__init__(width)
            self.save_hyperparameters(logger=False)

    recorder = make_recorder("log_hyperparameters")
    trainer(plugins=[recorder]).fit(Quiet(), loader(1))
    assert recorder.calls == []


@pytest.mark.parametrize("logger", [True, False])
def test_a_hyperparameter_that_cannot_be_saved_is_named_before_training_starts(logger: bool, trainer: Any, loader: Any) -> None:
    class Holder(Net):
        def __init__(self, act: Any) -> None:
            super().__init__()
            self.save_hyperparameters(logger=logger)

        def training_step(self, batch: Any) -> Tensor:
            raise AssertionError("trained")

    with pytest.raises(
        CheckpointError, match=r"hyperparameters.act cannot be saved: a torch.nn.*ReLU has no plain form; leave it out with"
    ):
        trainer().fit(Holder(nn.ReLU()), loader(1))


# ---------------------------------------------------------------------- load_from_checkpoint


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_module_is_rebuilt_from_its_checkpoint_without_repeating_its_arguments(saved: Any) -> None:
    module = Net(7, 0.05, name="seven")
    again = Net.load_from_checkpoint(saved(module))
    assert same(module, again)
    assert dict(again.hparams) == {"width": 7, "lr": 0.05, "name": "seven"}


def test_overrides_take_the_place_of_what_was_saved(saved: Any) -> None:
    path = saved(Net(7))
    assert Net.load_from_checkpoint(path, lr=0.9).hparams.lr == 0.9
    with pytest.raises(RuntimeError, match=r"size mismatch for layer.weight"):
        Net.load_from_checkpoint(path, width=3)


@dataclasses.dataclass
class Config:
    width: int = 6
    lr: float = 0.2


@pytest.mark.parametrize("config", [Config(), Namespace(width=6, lr=0.2), {"width": 6, "lr": 0.2}], ids=["dataclass", "Namespace", "dict"])
def test_a_configuration_object_comes_back_under_its_own_argument(config: Any, saved: Any) -> None:
    class Configured(Net):
        def __init__(self, config: Any) -> None:
            Module.__init__(self)
            self.save_hyperparameters(config)
            width = config["width"] if isinstance(config, dict) else config.width
            self.layer, self.bn = nn.Linear(4, width), nn.BatchNorm1d(width)

    module = Configured(config)
    again = Configured.load_from_checkpoint(saved(module))
    assert same(module, again)
    assert dict(again.hparams) == {"width": 6, "lr": 0.2}


def test_keyword_arguments_come_back(saved: Any) -> None:
    class Open(Net):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)

    module = Open(width=5, lr=0.3)
    again = Open.load_from_checkpoint(saved(module))
    assert same(module, again)
    assert again.hparams.lr == 0.3


def test_arguments_that_were_not_saved_are_named_with_what_to_do(saved: Any) -> None:
    class Needy(Net):
        def __init__(self, width: int, backbone: Any, head: Any) -> None:
            Module.__init__(self)
            self.save_hyperparameters("width", {"lr": 0.1} and "width")
            self.hparams.lr = 0.1
            self.layer, self.bn = nn.Linear(4, width), nn.BatchNorm1d(width)

    module = Needy(3, None, None)
    path = saved(module)
    with pytest.raises(TypeError, match=r"Needy.load_from_checkpoint: .*saved.safetensors does not hold backbone, head; .*backbone=..."):
        Needy.load_from_checkpoint(path)
    assert same(module, Needy.load_from_checkpoint(path, backbone=None, head=None))


def test_a_checkpoint_of_another_module_is_refused_unless_not_strict(saved: Any) -> None:
    class Other(Net):
        def __init__(self, width: int = 4, lr: float = 0.1, name: str = "") -> None:
            super().__init__(width, lr)
            self.extra = nn.Linear(1, 1)

    path = saved(Net(4))
    with pytest.raises(RuntimeError, match=r"extra.weight"):
        Other.load_from_checkpoint(path)
    assert Other.load_from_checkpoint(path, strict=False).layer.out_features == 4


def test_the_encoder_of_a_trained_model_can_be_used_alone(saved: Any) -> None:
    module = Net(5)
    encoder = Net.load_from_checkpoint(saved(module)).layer
    assert type(encoder) is nn.Linear
    torch.testing.assert_close(encoder(torch.ones(1, 4)), module.layer(torch.ones(1, 4)))


def test_weights_stand_under_module_in_the_file(saved: Any) -> None:
    from safetensors.torch import load_file

    path = saved(Net(5))
    assert load_file(path)["module.layer.weight"].shape == (5, 4)
    assert load(path)["hyperparameters"] == {"width": 5, "lr": 0.1, "name": "net"}


# ---------------------------------------------------------------------- conveniences


def test_freeze_and_unfreeze() -> None:
    module = Net()
    module.freeze()
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(part.training for part in module.modules())
    module.unfreeze()
    assert all(p.requires_grad for p in module.parameters())
    assert all(part.training for part in module.modules())


def test_device_is_where_the_parameters_are() -> None:
    class Empty(Module):
        pass

    class Buffered(Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", torch.ones(1, device="meta"))

    assert (Net().device, Net().to("meta").device) == (torch.device("cpu"), torch.device("meta"))
    assert (Empty().device, Buffered().device) == (torch.device("cpu"), torch.device("meta"))


def test_the_state_dict_is_that_of_a_plain_module() -> None:
    assert list(Net().state_dict()) == [
        "layer.weight", "layer.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
    ]  # fmt: skip


def _trained(trainer: Any, loader: Any) -> Net:
    module = Net()
    trainer().fit(module, loader(2))
    return module


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "deepcopy", "pickle"]
)
def test_a_trained_module_can_be_copied_and_trained_again(how: Any, trainer: Any, loader: Any) -> None:
    module = _trained(trainer, loader)
    again = how(module)
    assert same(module, again)
    assert dict(again.hparams) == dict(module.hparams)
    trainer().fit(again, loader(2))


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "deepcopy", "pickle"]
)
def test_a_copy_that_is_made_during_a_run_is_no_part_of_it(how: Any, trainer: Any, loader: Any) -> None:
    class Copier:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            self.copy = how(run.module)

    copier, module = Copier(), Net()
    trainer(plugins=[copier]).fit(module, loader(2))
    assert same(copier.copy, module)
    with pytest.raises(RuntimeError, match="Net is not in a run"):
        _ = copier.copy.run


@pytest.mark.filterwarnings("ignore:`?torch.jit", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_to_torchscript(method: str, trainer: Any, loader: Any, tmp_path: Path) -> None:
    module = _trained(trainer, loader)
    module.layer.eval()
    x = torch.randn(3, 4)
    script = module.to_torchscript(tmp_path / "net.pt", method=method)
    assert (module.training, module.layer.training) == (True, False)  # exported in eval mode, left as it was
    module.eval()
    torch.testing.assert_close(script(x), module(x))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "net.pt"))(x), module(x))


def test_to_torchscript_refuses_another_method() -> None:
    with pytest.raises(ValueError, match="method must be 'script' or 'trace', got 'compile'"):
        Net().to_torchscript(method="compile")


def test_an_export_without_an_example_says_what_to_set() -> None:
    module = Net()
    module.example_input_array = None
    for export in (lambda: module.to_torchscript(method="trace"), lambda: module.to_onnx("x.onnx")):
        with pytest.raises(ValueError, match=r"Net has no example input: give one, or set self.example_input_array"):
            export()
    assert module.training


@pytest.mark.filterwarnings("ignore")
def test_to_onnx(trainer: Any, loader: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    module = _trained(trainer, loader)
    module.to_onnx(tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").stat().st_size > 0
    assert module.training


def test_to_onnx_hands_module_and_example_to_torch_in_eval_mode(monkeypatch: Any) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, path, **options: seen.append((model.training, args, path, options)))
    module = Net()
    module.to_onnx("net.onnx", opset_version=17)
    module.to_onnx("net.onnx", example=(torch.zeros(1, 4),))
    assert seen[0][0] is False
    assert torch.equal(seen[0][1][0], torch.ones(2, 4))
    assert seen[0][2:] == ("net.onnx", {"opset_version": 17})
    assert torch.equal(seen[1][1][0], torch.zeros(1, 4))
    assert module.training


# ---------------------------------------------------------------------- during a run


def test_the_default_prediction_is_forward_of_the_first_part_of_a_batch(trainer: Any) -> None:
    module = Net()
    x, y = torch.randn(3, 4), torch.randn(3)
    module.eval()
    with torch.no_grad():
        expected = module(x)
    for batch in (x, [x, y], (x, y)):
        (prediction,) = trainer().predict(module, [[batch]])
        assert torch.equal(prediction, expected)


def test_layers_made_in_configure_model_are_trained(trainer: Any, loader: Any) -> None:
    class Late(Net):
        def __init__(self) -> None:
            Module.__init__(self)
            self.calls: list[str] = []

        def setup(self, stage: str) -> None:
            self.calls.append(f"setup {stage}")

        def configure_model(self) -> None:
            self.calls.append("model")
            self.layer, self.bn = nn.Linear(4, 2), nn.BatchNorm1d(2)
            self.before = self.layer.weight.detach().clone()

        def configure_optimizers(self) -> Any:
            self.calls.append("optimizers")
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Late()
    trainer().fit(module, loader(2))
    assert module.calls == ["setup fit", "model", "optimizers"]
    assert not torch.equal(module.before, module.layer.weight)


def test_a_module_brings_its_own_plugins(trainer: Any, loader: Any) -> None:
    class Counter:
        count = 0

        @hookimpl
        def on_train_batch_end(self) -> None:
            self.count += 1

    class Bringing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.counter = Counter()

        def configure_plugins(self) -> list[Any]:
            return [self.counter]

    module, made = Bringing(), trainer()
    made.fit(module, loader(3))
    assert module.counter.count == 3
    assert made.enabled == {}  # the trainer's own list is left alone


def test_a_method_named_like_a_hook_is_called_with_the_arguments_that_it_names(trainer: Any, loader: Any) -> None:
    class Hooked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def on_train_batch_end(self, batch_idx: int, outputs: Any) -> None:
            self.calls.append((batch_idx, type(outputs)))

        def on_train_epoch_end(self) -> None:
            self.calls.append("epoch")

        def teardown(self, stage: str) -> None:
            self.calls.append(stage)

    module = Hooked()
    trainer().fit(module, loader(1))
    assert module.calls == [(0, Tensor), "epoch", "fit"]


def test_epoch_and_step_can_be_read_in_the_module(trainer: Any, loader: Any) -> None:
    class Reading(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, int]] = []

        def training_step(self, batch: Any) -> Tensor:
            self.seen.append((self.current_epoch, self.global_step))
            return super().training_step(batch)

    module = Reading()
    trainer(max_epochs=2).fit(module, loader(2))
    assert module.seen == [(0, 0), (0, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize(
    ("signature", "expected"),
    [("batch", 1), ("batch, batch_idx", 2), ("batch, batch_idx, dataloader_idx=0", 3), ("*args", 3), ("batch, i, j", 3)],
)
def test_a_step_takes_as_many_arguments_as_it_wants(signature: str, expected: int, trainer: Any, loader: Any) -> None:
    namespace: dict[str, Any] = {}
    names = [name.strip().partition("=")[0] for name in signature.split(",")]
    got = "args" if signature == "*args" else f"({', '.join(names)},)"
    exec(f"def validation_step(self, {signature}):\n    self.got = {got}", namespace)
    module = type("Taking", (Net,), namespace)()
    trainer().validate(module, loader(1))
    assert len(module.got) == expected
    assert module.got[1:] == (0, 0)[: expected - 1]


def test_a_module_in_manual_optimization_without_an_optimizer_runs(trainer: Any, loader: Any) -> None:
    """What has nothing to be trained, such as a method that only collects statistics, is no error."""

    class Collecting(Module):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.total = 0.0

        def training_step(self, batch: Any) -> None:
            self.total += 1

    module = Collecting()
    trainer(max_epochs=2).fit(module, loader(3))
    assert module.total == 6
