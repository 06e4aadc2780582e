"""Batches, loaders and data modules."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchplug import DataModule, hookimpl
from torchplug.data import batch_size, length, limited, move

META = torch.device("meta")


class Pair(NamedTuple):
    x: Any
    y: Any


Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Record:
    x: Tensor
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class Derived:
    """A field that is not an argument."""

    x: Tensor
    seen: list[int] = dataclasses.field(init=False, default_factory=list)


class Own:
    """An object that knows how to move itself."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> Own:
        return Own(self.x.to(device))


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        (torch.zeros(()), 1),
        (torch.zeros(0, 2), 0),
        ([torch.zeros(3), torch.zeros(5)], 3),
        ((torch.zeros(4, 1), "a"), 4),
        (["a", torch.zeros(4)], 4),
        ({"x": torch.zeros(6)}, 6),
        ({"a": "text", "b": {"c": [torch.zeros(7)]}}, 7),
        (UserDict(x=torch.zeros(6)), 6),
        (Pair(torch.zeros(2), torch.zeros(9)), 2),
        (Record(torch.zeros(8)), 8),
        ("text", 0),
        (["a", "b"], 0),
        ([], 0),
        ({}, 0),
        (None, 0),
        (5, 0),
    ],
    ids=repr,
)
def test_batch_size_is_the_first_dimension_of_the_first_tensor(batch: Any, size: int) -> None:
    assert batch_size(batch) == size


# ---------------------------------------------------------------------- moving


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: [x, x],
        lambda x: (x, [x]),
        lambda x: {"a": x, "b": (x, {"c": x})},
        lambda x: Pair(x, [x]),
        lambda x: Point(x, x),
        lambda x: Record(x),
        lambda x: Derived(x),
        lambda x: OrderedDict(a=x),
        lambda x: UserDict(a=x),
        lambda x: defaultdict(list, a=x),
        lambda x: Own(x),
        lambda x: [{"deep": [Record(x)]}],
    ],
    ids=["tensor", "list", "tuple", "dict", "NamedTuple", "namedtuple", "dataclass", "frozen dataclass", "OrderedDict", "UserDict",
         "defaultdict", "own", "nested"],
)  # fmt: skip
def test_every_tensor_in_a_batch_is_moved_and_the_container_keeps_its_type(make: Any) -> None:
    batch = make(torch.ones(2))
    moved = move(batch, META)
    assert type(moved) is type(batch)

    def devices(part: Any) -> list[str]:
        if isinstance(part, Tensor):
            return [part.device.type]
        if isinstance(part, (list, tuple)):
            return [device for each in part for device in devices(each)]
        if isinstance(part, (dict, UserDict)):
            return devices(list(part.values()))
        return devices(part.x)

    assert set(devices(moved)) == {"meta"}
    assert set(devices(batch)) == {"cpu"}  # the loader's own batch is left alone


@pytest.mark.parametrize("batch", ["text", 5, None, 2.5, b"x", ["a", 1], {"a": None}], ids=repr)
def test_what_is_no_tensor_is_left_as_it_is(batch: Any) -> None:
    assert move(batch, META) == batch


def test_a_packed_sequence_is_moved() -> None:
    assert move(pack_sequence([torch.ones(3), torch.ones(2)]), META).data.device == META


def test_only_floating_point_tensors_take_the_dtype() -> None:
    batch = {
        "x": torch.ones(2),
        "half": torch.ones(2, dtype=torch.float16),
        "index": torch.ones(2, dtype=torch.int64),
        "mask": torch.ones(2) > 0,
    }
    moved = move(batch, torch.device("cpu"), torch.bfloat16)
    assert {name: part.dtype for name, part in moved.items()} == {
        "x": torch.bfloat16, "half": torch.bfloat16, "index": torch.int64, "mask": torch.bool,
    }  # fmt: skip


def test_a_tensor_that_is_already_there_is_not_copied() -> None:
    x = torch.ones(2)
    assert move(x, torch.device("cpu")) is x


def test_batches_reach_the_device_that_a_plugin_chose(tiny: Any, trainer: Any) -> None:
    class OnMeta:
        @hookimpl
        def setup(self, run: Any) -> None:
            run.device = META

        @hookimpl
        def on_test_batch_start(self, run: Any, batch: Any) -> None:
            self.devices = {part.device for part in batch} | {run.module.device}

        @hookimpl
        def test_step(self) -> bool:
            return True

    plugin = OnMeta()
    trainer(plugins=[plugin]).test(tiny())
    assert plugin.devices == {META}


def test_a_module_may_move_its_batches_itself(tiny: Any, trainer: Any) -> None:
    class Moving(tiny.Module):
        def move_batch(self, batch: Any) -> Any:
            return [part * 0 for part in batch]

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("sum", batch[0].abs().sum())

    assert trainer().test(Moving()) == [{"sum": 0.0}]


# ---------------------------------------------------------------------- lengths and limits


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([torch.zeros(1)])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        ([1, 2, 3], 3),
        (DataLoader(TensorDataset(torch.zeros(5, 1)), batch_size=2), 3),
        (DataLoader(TensorDataset(torch.zeros(5, 1)), batch_size=2, drop_last=True), 2),
        (DataLoader(Stream()), None),
        (iter([1]), None),
        ((i for i in range(3)), None),
    ],
    ids=["list", "DataLoader", "drop_last", "iterable data set", "iterator", "generator"],
)
def test_length_is_what_can_be_relied_on(loader: Any, expected: int | None) -> None:
    assert length(loader) == expected


@pytest.mark.parametrize(
    ("total", "limit", "expected"),
    [
        (10, 3, 3),
        (10, 99, 10),
        (10, 1, 1),
        (10, 0, 0),
        (None, 3, 3),
        (10, 1.0, 10),
        (None, 1.0, None),
        (10, 0.25, 2),
        (10, 0.1, 1),
        (10, 0.0, 0),
    ],
)
def test_limited(total: int | None, limit: Any, expected: int | None) -> None:
    assert limited("limit_train_batches", total, limit) == expected


def test_a_fraction_of_nothing_known_or_too_small_is_an_error_that_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"limit_x=0.5 is a fraction, but the loader's length is not known; give a number of batches"):
        limited("limit_x", None, 0.5)
    with pytest.raises(ValueError, match=r"limit_x=0.05 of 10 batches is less than one; give at least 0.1"):
        limited("limit_x", 10, 0.05)


# ---------------------------------------------------------------------- data modules


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def data(calls: list[str], loader: Any) -> DataModule:
    """A data module that notes each call."""

    class Data(DataModule):
        def prepare_data(self) -> None:
            calls.append("prepare_data")

        def setup(self, stage: str) -> None:
            calls.append(f"setup {stage}")

        def train_dataloader(self) -> Any:
            calls.append("train")
            return loader(3)

        def val_dataloader(self) -> Any:
            calls.append("val")
            return [loader(1), loader(2)]

        def test_dataloader(self) -> Any:
            calls.append("test")
            return loader(2)

        def predict_dataloader(self) -> Any:
            calls.append("predict")
            return loader(4)

        def teardown(self, stage: str) -> None:
            calls.append(f"teardown {stage}")

    return Data()


@pytest.mark.parametrize(
    ("work", "asked"), [("fit", ["train", "val"]), ("validate", ["val"]), ("test", ["test"]), ("predict", ["predict"])]
)
@pytest.mark.parametrize("place", ["datamodule", "loaders"])
def test_a_data_module_is_asked_in_order_for_what_is_needed(
    work: str, asked: list[str], place: str, tiny: Any, trainer: Any, data: Any, calls: list[str]
) -> None:
    method, module = getattr(trainer(), work), tiny(train=0, val=0, test=0, predict=0)
    method(module, data) if place == "loaders" else method(module, datamodule=data)
    assert calls == ["prepare_data", f"setup {work}", *asked, f"teardown {work}"]


def test_the_module_prepares_after_its_data_and_its_loaders_are_not_asked(tiny: Any, trainer: Any, data: Any, calls: list[str]) -> None:
    class Own(tiny.Module):
        def prepare_data(self) -> None:
            calls.append("module prepare_data")

        def setup(self, stage: str) -> None:
            calls.append("module setup")

        def train_dataloader(self) -> Any:
            raise AssertionError("asked")

        val_dataloader = train_dataloader

    trainer().fit(Own(), datamodule=data)
    assert calls == ["prepare_data", "module prepare_data", "setup fit", "module setup", "train", "val", "teardown fit"]


def test_loaders_that_are_given_come_before_those_of_data_module_and_module(tiny: Any, trainer: Any, data: Any, loader: Any) -> None:
    made = trainer()
    made.fit(tiny(), loader(7), datamodule=data)
    assert made.run.position.step == 7
    made.fit(tiny(train=5), val_dataloaders=loader(1))
    assert made.run.position.step == 5


def test_a_data_module_leaves_to_the_module_what_it_does_not_have(tiny: Any, trainer: Any, loader: Any) -> None:
    class OnlyTraining(DataModule):
        def train_dataloader(self) -> Any:
            return loader(6)

    made = trainer()
    made.fit(tiny(train=2, val=1), datamodule=OnlyTraining())
    assert made.run.position.step == 6
    assert "val_loss" in made.metrics


def test_hooks_of_a_data_module_are_called_before_those_of_the_module(tiny: Any, trainer: Any, loader: Any) -> None:
    order: list[str] = []

    class Data(DataModule):
        def train_dataloader(self) -> Any:
            return loader(1)

        def on_train_epoch_start(self, run: Any) -> None:
            order.append(f"data {run.position.epoch}")

    class Own(tiny.Module):
        def on_train_epoch_start(self) -> None:
            order.append("module")

    trainer().fit(Own(), datamodule=Data())
    assert order == ["data 0", "module"]


def test_teardown_of_a_data_module_runs_after_an_error(tiny: Any, trainer: Any, data: Any, calls: list[str]) -> None:
    class Broken(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        trainer().fit(Broken(), datamodule=data)
    assert calls[-1] == "teardown fit"


def test_a_data_module_without_super_init_works(tiny: Any, trainer: Any, loader: Any) -> None:
    class Data(DataModule):
        def __init__(self, count: int) -> None:
            self.count = count

        def train_dataloader(self) -> Any:
            return loader(self.count)

    made = trainer()
    made.fit(tiny(val=0), datamodule=Data(3))
    assert made.run.position.step == 3


@pytest.mark.parametrize("value", ["data", DataModule, 5], ids=repr)
def test_something_else_in_the_place_of_a_data_module_is_named(value: Any, tiny: Any, trainer: Any) -> None:
    with pytest.raises(TypeError, match=r"datamodule must be a torchplug.DataModule, got"):
        trainer().fit(tiny(), datamodule=value)


def test_a_loader_can_be_replaced_before_it_is_used(tiny: Any, trainer: Any) -> None:
    class Doubling:
        @hookimpl
        def prepare_loader(self, loader: Any, stage: str, dataloader_idx: int) -> Any:
            return [batch for batch in loader for _ in range(2)] if stage == "train" else None

    made = trainer(plugins=[Doubling()])
    made.fit(tiny(train=3))
    assert made.run.position.step == 6
