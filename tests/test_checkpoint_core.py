"""A checkpoint gives back what was put in, refuses what it cannot hold, and notices when it was damaged."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import errno
import json
import math
import os
import random
import resource
import subprocess
import sys
from argparse import Namespace
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from torchplug import checkpoint, hookimpl
from torchplug.checkpoint import CheckpointError, load, plain, verify, write
from torchplug.seed import generator_state, restore_generators


def equal(left: Any, right: Any) -> bool:
    """Whether two values are the same in type and bits, NaN included."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and bool(torch.equal(left.reshape(-1).contiguous().view(torch.uint8), right.reshape(-1).contiguous().view(torch.uint8)))
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(type(a) is type(b) and equal(left[a], right[b]) for a, b in zip(left, right, strict=True))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right) or (left != left and right != right)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def through(path: Path, value: Any) -> Any:
    """A value after it was written and read."""
    write(path, {"value": value})
    assert verify(path) == []
    return load(path)["value"]


# ---------------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 2**80, 0.1, -0.0, math.inf, -math.inf, math.nan, "", "text", "ünïcode ☃ \n \" \\ \x00", b"", b"\x00\xff",
        [], (), {}, [1, [2, (3, None)]], (1, (2,)), {"a": {"b": []}}, {1: "int", 2: {3: 4}}, {"1": "text", 1: "int"}, {"$tensor": "x"},
        {"$items": []}, {"a.b": 1, "a": {"b": 2}}, [(1, 2.0, True, "x", b"y")], {-5: 1},
    ],
    ids=repr,
)  # fmt: skip
def test_plain_values_come_back_with_their_types(value: Any, path: Path) -> None:
    assert equal(through(path, value), value)


DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
          torch.float64, torch.complex64, torch.float8_e4m3fn, torch.uint16]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0,), (2, 0, 3)], ids=str)
def test_tensors_of_every_kind_come_back_bit_for_bit(dtype: Any, shape: Any, path: Path) -> None:
    tensor = (torch.rand(shape) * 3).to(dtype)
    assert equal(through(path, tensor), tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12.0).reshape(3, 4).t(),
        lambda: torch.arange(12.0)[::3],
        lambda: torch.arange(4.0).expand(3, 4),
        lambda: torch.ones(3, requires_grad=True),
        lambda: nn.Parameter(torch.ones(3)),
        lambda: torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.tensor([math.nan, math.inf, -0.0]),
    ],
    ids=["transposed", "strided", "expanded", "with gradient", "parameter", "channels last", "nan"],
)
def test_tensors_of_every_layout_come_back_as_plain_tensors(make: Any, path: Path) -> None:
    tensor = make()
    back = through(path, tensor)
    assert equal(back, tensor.detach())
    assert type(back) is torch.Tensor
    assert not back.requires_grad


def test_tied_tensors_are_written_once_and_are_tied_again(path: Path) -> None:
    weight = torch.randn(5, 5)
    back = through(path, {"encoder": weight, "decoder": weight, "view": weight.view(5, 5), "other": weight.clone()})
    assert back["encoder"] is back["decoder"] is back["view"]
    assert back["other"] is not back["encoder"]
    with safe_open(str(path), framework="pt") as file:
        assert sorted(file.keys()) == ["value.encoder", "value.other"]


def test_parts_of_one_storage_that_differ_are_not_mixed_up(path: Path) -> None:
    whole = torch.arange(6.0)
    value = {
        "whole": whole,
        "half": whole[:3],
        "shape": whole.view(2, 3),
        "turned": whole.view(2, 3).t(),
        "as int": whole.view(torch.int32),
    }
    assert equal(through(path, value), value)


@pytest.mark.parametrize(
    "value",
    [
        {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}},
        {1: torch.zeros(1), "1": torch.ones(1)},
        {"x[0]": torch.zeros(1), "x": [torch.ones(1)]},
        {"": torch.zeros(1), "a": {"": torch.ones(1)}},
        {"__metadata__": torch.zeros(1)},
    ],
    ids=repr,
)
def test_tensors_whose_paths_read_the_same_are_not_mixed_up(value: Any, path: Path) -> None:
    assert equal(through(path, value), value)
    write(path, value)  # and at the top
    assert equal(load(path), value)


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5),
    st.builds(lambda n, kind: torch.arange(n).to(kind), st.integers(0, 4), st.sampled_from([torch.float32, torch.int64, torch.bfloat16])),
)  # fmt: skip
keys = st.one_of(st.text(alphabet="ab.$[]01", max_size=4), st.integers(-2, 2))
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(state=st.dictionaries(st.text(alphabet="ab.$[]01", max_size=4), nested, max_size=4))
def test_any_nesting_comes_back(state: dict[str, Any], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write(path, state)
    assert verify(path) == []
    assert equal(load(path), state)


def test_a_loaded_tensor_can_be_changed_without_changing_the_file(path: Path) -> None:
    through(path, torch.zeros(1000)).add_(1)
    assert verify(path) == []
    assert load(path)["value"].sum() == 0


def test_the_folder_is_made_if_it_is_not_there(tmp_path: Path) -> None:
    assert through(tmp_path / "a" / "b" / "x.safetensors", 1) == 1


# ---------------------------------------------------------------------- what is refused


class Colour(enum.Enum):
    RED = "red"


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, Colour.RED, Point(1, 2), numpy.float64(1), numpy.ones(2), Path("a"), lambda: 1, nn.Linear, 1j, {(1, 2): 3},
     {None: 1}, {True: 1}, {1.5: 1}],
    ids=repr,
)  # fmt: skip
def test_what_is_not_plain_is_refused_by_its_path_and_type(value: Any, path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^plugins.ema.history\[1\] cannot be saved: .*is not a plain value or tensor") as caught:
        write(path, {"plugins": {"ema": {"history": [1, value]}}})
    assert type(value).__name__ in str(caught.value)
    assert not path.exists()


def test_the_state_of_a_plugin_that_cannot_be_saved_names_the_plugin_and_the_key(tiny: Any, trainer: Any) -> None:
    class Hoarder:
        def state_dict(self) -> dict[str, Any]:
            return {"seen": {3}}

        @hookimpl
        def on_train_end(self, run: Any) -> None:
            run.save_checkpoint(run.dir / "x.safetensors")

    with pytest.raises(CheckpointError, match=r"plugins.hoarder.seen cannot be saved: builtins.set"):
        trainer(plugins=[Hoarder()]).fit(tiny())


@dataclasses.dataclass
class Options:
    depth: int = 2
    where: Path = Path("a/b")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (numpy.float64(0.5), 0.5), (numpy.float32(0.5), 0.5), (numpy.int64(3), 3), (numpy.bool_(True), True), (numpy.str_("x"), "x"),
        (numpy.arange(3), [0, 1, 2]), (Path("a/b"), os.path.join("a", "b")), (Colour.RED, "red"), (Namespace(x=Colour.RED), {"x": "red"}),
        (Options(), {"depth": 2, "where": os.path.join("a", "b")}), (datetime.timedelta(minutes=1), 60.0),
        (datetime.date(2026, 1, 2), "2026-01-02"), (datetime.datetime(2026, 1, 2, 3), "2026-01-02T03:00:00"),
        ([Path("a"), (Colour.RED,)], ["a", ("red",)]), (Point(Colour.RED, 1), ["red", 1]),
        ({"a": {"b": numpy.float64(1)}}, {"a": {"b": 1.0}}),
        (type("Version", (str,), {})("1.2"), "1.2"), (enum.IntEnum("Level", "LOW").LOW, 1),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_hyperparameters_take_a_plain_form_that_can_be_saved(value: Any, expected: Any, path: Path) -> None:
    assert equal(through(path, plain({"x": value}, "hyperparameters")["x"]), expected)


@pytest.mark.parametrize("value", [nn.ReLU(), torch.float32, {1, 2}, lambda: 1, object()], ids=repr)
def test_a_hyperparameter_without_a_plain_form_is_refused_by_its_path(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^hyperparameters.net.act\[0\] cannot be saved: .* has no plain form; leave it out with"):
        plain({"net": {"act": [value]}}, "hyperparameters")


# ---------------------------------------------------------------------- damage


@pytest.fixture
def small(path: Path) -> Path:
    write(path, {"module": {"layer.weight": torch.arange(6.0), "layer.bias": torch.arange(2.0)}, "epoch": 3})
    return path


def flip(path: Path, position: int, bit: int = 0) -> bytes:
    """Flips one bit of a file; returns what was there before."""
    before = path.read_bytes()
    after = bytearray(before)
    after[position] ^= 1 << bit
    path.write_bytes(after)
    return before


@pytest.mark.parametrize(("name", "offset"), [("module.layer.weight", 0), ("module.layer.weight", 23), ("module.layer.bias", 7)])
def test_a_flipped_bit_is_found_and_the_entry_is_named(name: str, offset: int, small: Path) -> None:
    header = int.from_bytes(small.read_bytes()[:8], "little")
    begin = json.loads(small.read_bytes()[8 : 8 + header])[name]["data_offsets"][0]
    flip(small, 8 + header + begin + offset)
    assert verify(small) == [f"{small}: entry {name} is damaged"]
    with pytest.raises(CheckpointError, match=rf"x.safetensors: entry {name} is damaged"):
        load(small)


def test_no_flipped_bit_anywhere_is_taken_for_good(small: Path) -> None:
    """Each byte of the file in turn: the state is refused in clear words, or it is the right one all the same."""
    state = load(small)
    size = small.stat().st_size
    for position in range(size):
        before = flip(small, position, bit=position % 7)
        problems = verify(small)
        try:
            found = load(small)
        except CheckpointError as error:
            assert small.name in str(error)
            assert problems
            assert all(small.name in problem for problem in problems)
        else:
            assert equal(found, state), position
        small.write_bytes(before)


def test_a_file_that_was_cut_off_anywhere_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    for length in [*range(1, len(whole), 7), len(whole) - 1]:
        small.write_bytes(whole[:length])
        (problem,) = verify(small)
        assert "x.safetensors is not a checkpoint of torchplug, or is cut off" in problem
        with pytest.raises(CheckpointError, match="is cut off"):
            load(small)


def test_an_empty_file_a_missing_file_and_a_folder_are_told_apart(path: Path, tmp_path: Path) -> None:
    assert verify(path) == [f"there is no checkpoint {path}"]
    path.touch()
    assert verify(path) == [f"{path} is empty"]
    (problem,) = verify(tmp_path)
    assert "is not a checkpoint of torchplug" in problem
    for wrong, text in ((path, "is empty"), (tmp_path, "is not a checkpoint"), (tmp_path / "none", "there is no checkpoint")):
        with pytest.raises(CheckpointError, match=text):
            load(wrong)


def test_files_of_others_are_refused_by_name(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"x.safetensors is a safetensors file, but not a checkpoint of torchplug"):
        load(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"x.safetensors is not a checkpoint of torchplug, or is cut off"):
        load(path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match=r"x.safetensors is not a checkpoint of torchplug, or is cut off"):
        load(path)


def test_a_file_of_a_newer_format_asks_for_a_newer_torchplug(path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    write(path, {"a": 1})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has format 99, this torchplug reads up to \d+; install a newer torchplug"):
        load(path)


def test_nothing_in_a_file_can_run(path: Path) -> None:
    """A file that claims to hold code is data: there is no pickle and no import in it."""
    write(path, {"value": {"__reduce__": "os.system", "$class": "os.system", "py/object": "os.system"}})
    assert load(path)["value"] == {"__reduce__": "os.system", "$class": "os.system", "py/object": "os.system"}
    assert b"pickle" not in path.read_bytes()


# ---------------------------------------------------------------------- writes that fail


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "torchplug.checkpoint.serialize_file"])
@pytest.mark.parametrize("before", [True, False], ids=["over an old file", "new"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(function: str, before: bool, path: Path, monkeypatch: Any) -> None:
    if before:
        write(path, {"value": "old"})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(function, fail)
    with pytest.raises(OSError, match="broken disk"):
        write(path, {"value": torch.ones(100)})
    monkeypatch.undo()
    assert [each.name for each in path.parent.iterdir()] == ([path.name] if before else [])
    if before:
        assert load(path) == {"value": "old"}


def test_a_full_disk_is_called_that(path: Path, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(path, {"value": "old"})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"disk full while writing .*x.safetensors; the checkpoint that was there before is unharmed"):
        write(path, {"value": "new"})
    monkeypatch.undo()
    assert load(path) == {"value": "old"}


def test_a_file_system_that_takes_no_more_bytes_leaves_the_old_file(path: Path) -> None:
    """A real failure of the system, by a limit on the size of files."""
    write(path, {"value": "old"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises((OSError, CheckpointError, Exception)) as caught:
            write(path, {"value": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in str(caught.value).lower()
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert load(path) == {"value": "old"}


KILLED = """
import os, signal, sys, threading
from pathlib import Path
import torch
from torchplug.checkpoint import write

path = Path(sys.argv[1])
write(path, {"value": torch.zeros(2_000_000), "round": 0})
print("ready", flush=True)
threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
for i in range(1, 10_000):
    write(path, {"value": torch.full((2_000_000,), float(i)), "round": i})
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.01, 0.05, 0.1, 0.2, 0.3])
def test_a_process_that_is_killed_while_writing_leaves_a_whole_checkpoint(delay: float, path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(path), str(delay)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    assert verify(path) == []
    state = load(path)
    assert bool((state["value"] == state["round"]).all())


# ---------------------------------------------------------------------- the state of a run


class Keep:
    """Saves at the end of training."""

    def __init__(self) -> None:
        self.count = 0

    @hookimpl
    def on_train_batch_end(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    @hookimpl
    def on_train_end(self, run: Any) -> None:
        self.run, self.path = run, run.save_checkpoint(run.dir / "x.safetensors", reason="test", metrics={"a": 1.0})


def test_the_state_of_a_run_is_all_there(tiny: Any, trainer: Any) -> None:
    keep = Keep()

    class Scheduled(tiny.Module):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    module = Scheduled(train=3)
    made = trainer(max_epochs=2, plugins=[keep])
    made.fit(module)
    state = load(keep.path)
    assert state["position"] == {"stage": "train", "epoch": 2, "batch": 3, "step": 6, "micro_step": 6, "samples": 12}
    assert equal(state["module"], {name: tensor.detach() for name, tensor in module.state_dict().items()})
    assert equal(state["optimizers"], [keep.run.optimizers[0].state_dict()])
    assert equal(state["schedulers"][0]["scheduler"], keep.run.schedulers[0].scheduler.state_dict())
    assert state["plugins"] == {"keep": {"count": 6}}
    assert state["metrics"]["val_loss"] == made.metrics["val_loss"]
    assert state["versions"]["torch"] == str(torch.__version__)
    assert state["run"] == {"id": made.run.id, "class": Scheduled.__qualname__}


def test_the_generators_of_the_moment_are_in_it(path: Path) -> None:
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), numpy.random.randn()  # each keeps a second value for next time
    write(path, {"generators": generator_state()})

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn(), torch.rand(1).item()]

    first = draw()
    assert draw() != first
    restore_generators(load(path)["generators"])
    assert draw() == first


def test_everybody_is_told_of_a_checkpoint_and_of_its_removal(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    class Remove(Keep):
        @hookimpl
        def on_train_end(self, run: Any) -> None:
            super().on_train_end(run)
            run.remove_checkpoint(self.path, "no longer the best")

    keep, recorder = Remove(), make_recorder("save_checkpoint", "on_checkpoint_saved", "on_checkpoint_removed")
    trainer(plugins=[keep, recorder]).fit(tiny())
    assert recorder.names == ["save_checkpoint", "on_checkpoint_saved", "on_checkpoint_removed"]
    assert [call.get("reason") for _, call in recorder.calls] == [None, "test", "no longer the best"]
    assert {call["path"] for _, call in recorder.calls} == {keep.path}
    assert not keep.path.exists()


def test_a_plugin_can_write_checkpoints_in_its_own_way(tiny: Any, trainer: Any) -> None:
    class Own(Keep):
        @hookimpl
        def save_checkpoint(self, path: Path) -> Path:
            (path.parent / "own.txt").write_text("saved")
            return path.parent / "own.txt"

    own = Own()
    trainer(plugins=[own]).fit(tiny())
    assert own.path.name == "own.txt"
    assert list(own.path.parent.glob("*.safetensors")) == []


OPTIMIZERS = ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD", "LBFGS", "Adafactor"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_of_torch_can_be_saved_and_put_back(name: str, path: Path) -> None:
    def made() -> Any:
        layer = nn.Linear(3, 2)
        return layer, getattr(torch.optim, name)(layer.parameters(), lr=0.01)

    layer, optimizer = made()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    state = optimizer.state_dict()
    back = through(path, state)
    assert equal(back, {"state": dict(state["state"]), "param_groups": state["param_groups"]})
    _, other = made()
    other.load_state_dict(back)
    assert equal(other.state_dict()["param_groups"], state["param_groups"])


SCHEDULERS: dict[str, Any] = {
    "StepLR": {"step_size": 2}, "MultiStepLR": {"milestones": [1, 3]}, "ConstantLR": {}, "LinearLR": {}, "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5}, "CosineAnnealingWarmRestarts": {"T_0": 2}, "PolynomialLR": {}, "ReduceLROnPlateau": {"patience": 0},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10}, "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1},
    "LambdaLR": {"lr_lambda": lambda e: 0.9**e}, "MultiplicativeLR": {"lr_lambda": lambda e: 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_state_of_every_scheduler_of_torch_can_be_saved_and_put_back(name: str, path: Path) -> None:
    def made() -> Any:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05, momentum=0.9)
        return optimizer, getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])

    def steps(optimizer: Any, scheduler: Any, count: int) -> list[float]:
        rates = []
        for i in range(count):
            optimizer.step()
            scheduler.step(*([float(i)] if name == "ReduceLROnPlateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer, scheduler = made()
    steps(optimizer, scheduler, 2)
    back = through(path, {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    other, again = made()
    other.load_state_dict(back["optimizer"])
    again.load_state_dict(back["scheduler"])
    assert steps(other, again, 4) == steps(optimizer, scheduler, 4)
