"""A checkpoint gives back what was put in, refuses what it cannot hold, and notices when it was damaged."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import errno
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, namedtuple
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

from torchplug import checkpoint, hookimpl, layout
from torchplug.checkpoint import CheckpointError, header, load, plain, sweep, verify, write
from torchplug.files import replacing
from torchplug.module import Hyperparameters
from torchplug.seed import generator_state, restore_generators

FORMAT_1 = Path(__file__).parent / "fixtures" / "format_1.safetensors"


def shown(value: Any) -> str:
    """A value in the name of a test, the same in every process."""
    return "frozenset" if isinstance(value, frozenset) else re.sub(r" at 0x\w+", "", repr(value), flags=re.IGNORECASE)[:40]


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
        Counter({3: 2, "x": 1}), Counter(), Counter(a=torch.ones(1)),
        {"$counter": []}, "lone \ud800", {"lone \ud800": 1},
    ],
    ids=shown,
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


def test_an_ordered_dict_comes_back_as_a_dict_and_a_size_as_a_tuple(path: Path) -> None:
    assert equal(through(path, OrderedDict(b=1, a=torch.Size([2, 3]))), {"b": 1, "a": (2, 3)})


def test_conjugates_and_negatives_that_torch_has_not_computed_yet_come_back_as_what_they_stand_for(path: Path) -> None:
    value = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    back = through(path, {"value": value, "conjugate": value.conj(), "imaginary": value.conj().imag})
    assert equal(back, {"value": value, "conjugate": value.conj().resolve_conj(), "imaginary": torch.tensor([-2.0, 4.0])})


def test_a_name_that_is_no_proper_text_is_no_obstacle(path: Path) -> None:
    value = {"\ud800": torch.ones(1), "\\ud800": torch.zeros(1)}
    assert equal(through(path, value), value)
    with safe_open(str(path), framework="pt") as file:
        assert len(file.keys()) == 2


def test_every_type_is_read_by_the_safetensors_library_too(path: Path) -> None:
    """Bits, types and shapes, each at a multiple of its size, although they are written and read without it."""
    state = {str(dtype): (torch.rand(3) * 3).to(dtype) for dtype in DTYPES} | {"scalar": torch.tensor(1.5), "empty": torch.ones(2, 0)}
    write(path, state)
    with safe_open(str(path), framework="pt") as file:
        assert equal({name: file.get_tensor(name) for name in state}, state)
        assert file.metadata()["format"] == "pt"
    assert all(entry.begin % entry.dtype.itemsize == 0 for name, entry in header(path).items() if name != "format")


def test_loaded_tensors_lie_where_the_fast_paths_of_torch_want_them_and_own_their_memory(path: Path) -> None:
    back = through(path, {str(i): torch.ones(i) for i in range(1, 9)})
    for tensor in back.values():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


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
    ids=shown,
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


@pytest.mark.slow
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


def test_what_was_loaded_does_not_change_with_the_file(path: Path) -> None:
    back = through(path, torch.ones(100_000))
    path.write_bytes(b"")
    assert bool((back == 1).all())


def test_the_folder_is_made_if_it_is_not_there(tmp_path: Path) -> None:
    assert through(tmp_path / "a" / "b" / "x.safetensors", 1) == 1


def test_one_part_can_be_loaded_alone_and_the_others_are_not_read(path: Path) -> None:
    tied = torch.ones(10)
    write(path, {"module": {"a": tied, "b": torch.zeros(2)}, "optimizers": [{"momentum": torch.ones(1000), "tied": tied}], "epoch": 1})
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little") + header(path)["optimizers"][0]["momentum"].begin
    data[begin + 40] ^= 1
    path.write_bytes(data)
    assert equal(load(path, parts=["epoch", "module"]), {"epoch": 1, "module": {"a": tied, "b": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match="momentum is damaged"):
        load(path, parts=["optimizers"])
    with pytest.raises(CheckpointError, match=r"x.safetensors holds no scaler"):
        load(path, parts=["module", "scaler"])


# ---------------------------------------------------------------------- what is refused


class Colour(enum.Enum):
    RED = "red"


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, Colour.RED, Point(1, 2), numpy.float64(1), numpy.ones(2), Path("a"), lambda: 1, nn.Linear, 1j, defaultdict(int),
     Hyperparameters(a=1), datetime.timezone.utc],
    ids=shown,
)  # fmt: skip
def test_what_is_not_plain_is_refused_by_its_path_and_type(value: Any, path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"^plugins.ema.history\[1\] cannot be saved: .*is not a plain value or tensor; save "
    ) as caught:
        write(path, {"plugins": {"ema": {"history": [1, value]}}})
    assert type(value).__name__ in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize("key", [(1, 2), None, True, 1.5, Colour.RED, numpy.int64(1)], ids=repr)
def test_a_key_that_is_neither_text_nor_a_whole_number_is_refused_by_its_path(key: Any, path: Path) -> None:
    for value in ({key: 1}, Counter([key]), OrderedDict({key: 1})):
        with pytest.raises(CheckpointError, match=r"^plugins.ema cannot be saved: its key .* is a .*; keys must be texts or whole numbers"):
            write(path, {"plugins": {"ema": value}})


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.zeros(2, dtype=torch.complex128), "of type torch.complex128"),
        (lambda: torch.eye(2).to_sparse(), "of layout torch.sparse_coo"),
        (lambda: torch.zeros(2, device="meta"), "on the meta device"),
        (lambda: nn.LazyLinear(2).weight, "no values yet"),
        (lambda: torch.zeros(2).as_subclass(Own), "Own, a tensor with a class of its own"),
    ],
    ids=["complex128", "sparse", "meta", "lazy", "own class"],
)
def test_a_tensor_that_a_file_cannot_hold_is_refused_by_its_path(make: Any, reason: str, path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^module.x\[0\] cannot be saved: it .*{reason}"):
        write(path, {"module": {"x": [make()]}})
    assert not path.exists()


def test_state_that_contains_itself_is_refused_by_its_path(path: Path) -> None:
    value: dict[str, Any] = {}
    value["self"] = value
    with pytest.raises(CheckpointError, match=r"^plugins.ema.self.self.*cannot be saved: it contains itself"):
        write(path, {"plugins": {"ema": value}})


def test_more_plain_values_than_a_safetensors_file_may_have_are_refused(path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(layout, "LONGEST", 1000)
    with pytest.raises(CheckpointError, match="keep long lists of numbers as tensors"):
        write(path, {"value": list(range(1000))})
    assert list(path.parent.iterdir()) == []


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
        ({"a": {"b": numpy.float64(1)}}, {"a": {"b": 1.0}}), (torch.float16, "torch.float16"), (torch.device("cuda:1"), "cuda:1"),
        ({3, 1, 20}, [1, 3, 20]), (frozenset({"b", "a", 1, None}), [1, "a", "b", None]), (datetime.time(1, 2), "01:02:00"),
        ({numpy.int64(1): 2, Colour.RED: 3}, {1: 2, "red": 3}), (math.nan, math.nan), ([-math.inf], [-math.inf]),
        (numpy.datetime64("2026-01-02"), "2026-01-02"), (numpy.array([Path("a")], dtype=object), ["a"]), (torch.Size([1, 2]), [1, 2]),
        (type("Version", (str,), {})("1.2"), "1.2"), (enum.IntEnum("Level", "LOW").LOW, 1),
    ],
    ids=shown,
)  # fmt: skip
def test_hyperparameters_take_a_plain_form_that_can_be_saved(value: Any, expected: Any, path: Path) -> None:
    assert equal(through(path, plain({"x": value}, "hyperparameters")["x"]), expected)


@pytest.mark.parametrize(
    "value",
    [nn.ReLU(), lambda: 1, object(), numpy.longdouble(1), 1j, datetime.timezone.utc, range(3), numpy.random.default_rng()],
    ids=shown,
)
def test_a_hyperparameter_without_a_plain_form_is_refused_by_its_path(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^hyperparameters.net.act\[0\] cannot be saved: .* has no plain form; leave it out with"):
        plain({"net": {"act": [value]}}, "hyperparameters")


@pytest.mark.parametrize("keys", [[(1, 2)], [None], [True], [1.5], [Colour.RED, "red"]], ids=repr)
def test_hyperparameters_whose_keys_would_get_lost_are_refused_by_their_path(keys: list[Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^hyperparameters.net cannot be saved: .* keys must be different texts or whole numbers"):
        plain({"net": dict.fromkeys(keys, 1)}, "hyperparameters")


# ---------------------------------------------------------------------- damage


@pytest.fixture
def small(path: Path) -> Path:
    write(path, {"module": {"layer.weight": torch.arange(6.0), "layer.bias": torch.arange(2.0)}, "epoch": 3})
    return path


def rewrite(path: Path, change: Any) -> None:
    """Changes the header of a file by ``change(its JSON)``; the tensors stay."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    parts = json.loads(data[8:end])
    change(parts)
    text = json.dumps(parts).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


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


@pytest.mark.slow
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
        if length >= 8:
            assert f"x.safetensors is cut off: it has {length} of " in problem
        else:
            assert "x.safetensors is" in problem
        for read in (load, header):
            with pytest.raises(CheckpointError, match=r"x.safetensors is"):
                read(small)


def test_bytes_behind_the_end_are_noticed(small: Path) -> None:
    small.write_bytes(small.read_bytes() + b"12")
    assert verify(small) == [f"{small}: 2 bytes at its end do not belong to it"]
    with pytest.raises(CheckpointError, match="2 bytes at its end"):
        load(small)


def as_other(parts: dict[str, Any]) -> None:
    parts["module.layer.bias"]["dtype"] = "I32"


def with_another_shape(parts: dict[str, Any]) -> None:
    parts["module.layer.weight"]["shape"] = [2, 3]


def in_each_others_place(parts: dict[str, Any]) -> None:
    parts["module.layer.bias"], parts["module.layer.weight"] = parts["module.layer.weight"], parts["module.layer.bias"]


@pytest.mark.parametrize(
    ("change", "names"),
    [(as_other, ["bias"]), (with_another_shape, ["weight"]), (in_each_others_place, ["weight", "bias"])],
)
def test_a_changed_type_or_shape_or_place_of_a_tensor_is_found(change: Any, names: list[str], small: Path) -> None:
    rewrite(small, change)
    assert sorted(verify(small)) == sorted(f"{small}: entry module.layer.{name} is damaged" for name in names)
    with pytest.raises(CheckpointError, match=f"entry module.layer.{names[0]} is damaged"):
        load(small)


def test_a_tensor_that_is_missing_or_was_added_is_named(small: Path) -> None:
    def rename(parts: dict[str, Any]) -> None:
        parts["module.layer.bios"] = parts.pop("module.layer.bias")

    rewrite(small, rename)
    expected = [f"{small}: entry module.layer.bias is missing", f"{small}: entry module.layer.bios does not belong to it"]
    assert verify(small) == expected
    for read in (load, header):
        with pytest.raises(CheckpointError, match=r"bias is missing; .*bios does not belong"):
            read(small)


def test_the_number_of_the_format_is_protected(small: Path) -> None:
    rewrite(small, lambda parts: parts["__metadata__"].update(torchplug_format="1"))
    assert f"{small}: the JSON part is damaged" in verify(small)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["__metadata__"].pop("torchplug"),
        lambda parts: parts["__metadata__"].pop("torchplug_crc32"),
        lambda parts: parts["__metadata__"].update(torchplug_format="x"),
        lambda parts: parts["__metadata__"].update(torchplug_format="0"),
        lambda parts: parts["__metadata__"].update(torchplug_crc32="[]"),
        lambda parts: parts["module.layer.bias"].update(dtype="X"),
        lambda parts: parts["module.layer.bias"].update(shape=[-2]),
        lambda parts: parts["module.layer.bias"].update(shape="abc"),
        lambda parts: parts["module.layer.bias"].update(data_offsets=[0]),
        lambda parts: parts["module.layer.bias"].update(data_offsets=[0, 8]),
        lambda parts: parts["module.layer.bias"].pop("dtype"),
        lambda parts: parts.update(more=3),
        lambda parts: parts["module.layer.weight"].update(shape=[5]),
    ],
)
def test_a_header_that_makes_no_sense_is_called_damaged(change: Any, small: Path) -> None:
    rewrite(small, change)
    for read in (load, header):
        with pytest.raises(CheckpointError, match=r"x.safetensors: the header is damaged"):
            read(small)
    (problem,) = verify(small)
    assert "x.safetensors: the header is damaged" in problem


def test_a_size_that_no_tensor_can_have_is_no_way_to_break_loading(small: Path) -> None:
    def change(parts: dict[str, Any]) -> None:
        sums = json.loads(parts["__metadata__"]["torchplug_crc32"])
        sums["t:module.layer.bias"] = zlib.crc32(f"F32 {[2**70, 0]}".encode())
        parts["module.layer.bias"].update(shape=[2**70, 0], data_offsets=[24, 24])
        parts["__metadata__"]["torchplug_crc32"] = json.dumps(sums)

    rewrite(small, change)
    os.truncate(small, small.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=r"x.safetensors"):
        load(small)


@pytest.mark.parametrize("body", ["[" * 100_000, "3", '{"a": {"$tensor": 5}}', '{"a": {"$tuple": 5}}', '{"a": {"$items": [1]}}', "{"])
def test_a_body_that_makes_no_sense_is_refused_although_its_sum_is_right(body: str, small: Path) -> None:
    def change(parts: dict[str, Any]) -> None:
        sums = json.loads(parts["__metadata__"]["torchplug_crc32"])
        sums["json"] = zlib.crc32(f"2 {body}".encode())
        parts["__metadata__"].update(torchplug=body, torchplug_crc32=json.dumps(sums))

    rewrite(small, change)
    for read in (load, header):
        with pytest.raises(CheckpointError, match=r"x.safetensors does not hold what a checkpoint of format 2 holds"):
            read(small)
    assert len(verify(small)) == 1


def test_an_empty_file_a_missing_file_and_a_folder_are_told_apart(path: Path, tmp_path: Path) -> None:
    assert verify(path) == [f"there is no checkpoint {path}"]
    path.touch()
    assert verify(path) == [f"{path} is empty"]
    (problem,) = verify(tmp_path)
    assert problem == f"{tmp_path} is a folder; name a file in it"
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to: who opened it would wait for ever
    for wrong, text in (
        (path, "is empty"),
        (tmp_path, "is a folder"),
        (tmp_path / "none", "there is no"),
        (tmp_path / "pipe", "not a file"),
    ):
        for read in (load, header):
            with pytest.raises(CheckpointError, match=text):
                read(wrong)


def test_a_file_that_cannot_be_read_is_named(small: Path, monkeypatch: Any) -> None:
    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    assert verify(small) == [f"{small} cannot be read: Input/output error"]
    with pytest.raises(CheckpointError, match=r"x.safetensors cannot be read: Input/output error"):
        load(small)


def test_a_system_without_parallel_reads_reads_the_same(path: Path, monkeypatch: Any) -> None:
    monkeypatch.delattr(os, "preadv")
    value = {str(i): torch.full((500_000,), float(i)) for i in range(4)}
    assert equal(through(path, value), value)


def test_files_of_others_are_refused_by_name(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"x.safetensors is a safetensors file, but not a checkpoint of torchplug"):
        load(path)
    for write_other in (
        lambda: torch.save({"weight": torch.ones(2)}, path),
        lambda: torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps({"weight": [1.0]}, 2)),
        lambda: path.write_bytes(pickle.dumps({"weight": [1.0]}, 4)),
    ):
        write_other()
        with pytest.raises(CheckpointError, match=r"x.safetensors is not a checkpoint of torchplug: it is a pickle, .* never unpickles"):
            load(path)
    for text in ("hello", "hello, this is a text and no checkpoint"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"x.safetensors is not a checkpoint of torchplug, or its first bytes are damaged"):
            load(path)


def test_a_file_of_a_newer_format_asks_for_a_newer_torchplug(path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(layout, "FORMAT", 99)
    write(path, {"a": 1})
    monkeypatch.undo()
    for read in (load, header):
        with pytest.raises(
            CheckpointError, match=r"x.safetensors has format 99, this torchplug reads up to \d+; install a newer torchplug"
        ):
            read(path)
    assert len(verify(path)) == 1


def test_nothing_in_a_file_can_run(path: Path) -> None:
    """A file that claims to hold code is data: there is no pickle and no import in it."""
    write(path, {"value": {"__reduce__": "os.system", "$class": "os.system", "py/object": "os.system"}})
    assert load(path)["value"] == {"__reduce__": "os.system", "$class": "os.system", "py/object": "os.system"}
    assert b"pickle" not in path.read_bytes()


# ---------------------------------------------------------------------- writes that fail


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "torchplug.outflow.Outflow._out"])
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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_called_that(number: int, path: Path, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, "the system's words")

    write(path, {"value": "old"})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"^disk full .*while writing .*x.safetensors; what was there before is unharmed"):
        write(path, {"value": "new"})
    monkeypatch.undo()
    assert load(path) == {"value": "old"}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_system_that_takes_no_more_bytes_leaves_the_old_file(path: Path) -> None:
    """A real failure of the system, by a limit on the size of files."""
    write(path, {"value": "old"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for size in (30_000, 1_000_000):  # the limit is met at the end, and in the middle
            with pytest.raises(CheckpointError, match=r"disk full \(a file may not be so large\) while writing .*x.safetensors"):
                write(path, {"value": torch.ones(size)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert load(path) == {"value": "old"}


def test_two_threads_do_not_write_the_same_file_at_a_time(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"first")
        with pytest.raises(CheckpointError, match=r"x.safetensors is being written already"):
            write(path, {"value": 1})
    assert path.read_bytes() == b"first"
    write(path, {"value": 1})


@pytest.mark.slow
def test_a_checkpoint_is_written_from_any_thread_and_while_the_interpreter_ends(path: Path) -> None:
    code = """
import sys, torch
from concurrent.futures import ThreadPoolExecutor
from torchplug.checkpoint import write

def job():
    try:
        while True:  # until the interpreter ends, when no executor takes work any more
            with ThreadPoolExecutor(1) as pool:
                pool.submit(int).result()
    except RuntimeError:
        write(sys.argv[1], {str(i): torch.full((500_000,), float(i)) for i in range(4)})

ThreadPoolExecutor(1).submit(job)
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)
    assert verify(path) == []


def test_a_mode_of_the_file_is_that_of_every_other_file(path: Path) -> None:
    write(path, {"value": 1})
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


# ---------------------------------------------------------------------- what killed writes leave behind


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_processes_that_are_gone_are_swept_and_nothing_else(tmp_path: Path) -> None:
    gone, alive = ended(), os.getppid()
    left = [tmp_path / f".last.safetensors.{gone}.tmp", tmp_path / f".epoch=1-step=2.safetensors.{gone}.tmp"]
    own = tmp_path / f".own.safetensors.{os.getpid()}.tmp"  # of an earlier process of this number, as in a container
    others = [
        *(f".last.safetensors.{alive}.tmp", f"last.safetensors.{gone}.tmp", f".notes.{gone}.tmp"),
        *(".x.safetensors.tmp", ".y.safetensors.1a.tmp", "last.safetensors"),
    ]
    for path in (*left, own, *(tmp_path / name for name in others)):
        path.touch()
    (tmp_path / f".folder.safetensors.{gone}.tmp").mkdir()
    assert sweep(tmp_path) == sorted([*left, own])
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([*others, f".folder.safetensors.{gone}.tmp"])


def test_a_write_that_is_under_way_is_not_swept(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"half")
        assert sweep(os.path.relpath(path.parent)) == []
        assert temporary.exists()


def test_sweeping_a_folder_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    assert sweep(tmp_path / "none") == []


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
def test_a_process_that_is_killed_while_writing_leaves_a_whole_checkpoint(delay: float, path: Path, programs: Any) -> None:
    assert programs.run(KILLED, path, str(delay)).returncode == -signal.SIGKILL
    assert verify(path) == []
    state = load(path)
    assert bool((state["value"] == state["round"]).all())
    sweep(path.parent)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


# ---------------------------------------------------------------------- the header alone


def test_the_header_has_everything_but_the_values_of_tensors(path: Path) -> None:
    tied = torch.ones(2, 3, dtype=torch.bfloat16)
    write(path, {"run": {"id": "x"}, "module": {"a": tied, "b": tied, "c": torch.zeros(())}, "list": [(1, math.inf)]})
    found = header(path)
    a, c = found["module"]["a"], found["module"]["c"]
    assert (a.name, a.dtype, a.shape, a.bytes) == ("module.a", torch.bfloat16, (2, 3), 12)
    assert (c.name, c.dtype, c.shape, c.bytes) == ("module.c", torch.float32, (), 4)
    assert found["module"]["b"] is a
    assert (found["format"], found["run"], found["list"]) == (2, {"id": "x"}, [(1, math.inf)])


def test_the_header_is_verified_and_the_tensors_are_not_read(small: Path) -> None:
    flip(small, small.stat().st_size - 1)
    assert header(small)["epoch"] == 3
    position = small.read_bytes().index(b"epoch")
    flip(small, position)
    with pytest.raises(CheckpointError, match="the JSON part is damaged"):
        header(small)


def test_the_header_of_a_big_file_takes_milliseconds(path: Path) -> None:
    write(path, {"epoch": 3, "big": torch.zeros(1)})
    rewrite(path, lambda parts: parts["big"].update(shape=[50_000_000_000], data_offsets=[0, 200_000_000_000]))
    os.truncate(path, path.stat().st_size - 4 + 200_000_000_000)  # a hole of 200 GB
    begin = time.process_time()
    assert header(path)["epoch"] == 3
    assert time.process_time() - begin < 0.5


# ---------------------------------------------------------------------- older formats


def test_a_checkpoint_of_format_1_is_brought_to_the_newest_layout() -> None:
    """The file was written by the code that wrote format 1; so were the values here, in that run."""
    assert verify(FORMAT_1) == []
    state, shown = load(FORMAT_1), header(FORMAT_1)
    assert shown["format"] == 1
    assert list(state) == [name for name in shown if name != "format"]
    assert (state["kind"], state["emergency"], state["time"]) == ("run", "", 0.0)
    assert state["run"] == {"id": "2c47ed22", "class": "Old", "dir": "", "seconds": 0.0}
    assert state["position"] == {"stage": "train", "epoch": 1, "batch": 3, "step": 6, "micro_step": 6, "samples": 24}
    assert state["hyperparameters"] == {"width": 2, "lr": 0.05, "name": "old"}
    assert state["hyperparameters_argument"] == ""
    assert state["versions"]["checkpoint"] == "torchplug-checkpoint 0.1.0"
    assert state["options"] == {"accumulate_grad_batches": 1, "precision": "32"}
    weight = torch.tensor([[-0.1056, 0.0663, 0.0198], [0.1276, 0.1895, 0.3083]])
    assert torch.allclose(state["module"]["layer.weight"], weight, atol=5e-5)
    assert torch.allclose(state["module"]["layer.bias"], torch.tensor([0.0036, 0.1545]), atol=5e-5)
    (optimizer,) = state["optimizers"]
    assert (optimizer["class"], optimizer["steps"]) == (None, 6)
    assert optimizer["state"]["param_groups"][0]["lr"] == 0.025
    assert torch.allclose(optimizer["state"]["state"][1]["exp_avg"], torch.tensor([0.1169, -0.1047]), atol=5e-5)
    (scheduler,) = state["schedulers"]
    assert (scheduler["class"], scheduler["seen"]) == (None, -1)
    assert scheduler["state"]["milestones"] == {1: 1, 3: 1}
    assert (state["loop"], state["scaler"], state["data"], state["metrics"], state["plugins"]) == ({"validated": False}, None, None, {}, {})
    assert state["generators"]["torch"].shape == (5056,)


def test_what_format_1_knew_can_be_used() -> None:
    state = load(FORMAT_1)
    layer = nn.Linear(3, 2)
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in state["module"].items()})
    optimizer = torch.optim.Adam(layer.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.5)
    optimizer.load_state_dict(state["optimizers"][0]["state"])
    scheduler.load_state_dict(state["schedulers"][0]["state"])
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0125
    restore_generators(state["generators"])


def test_damage_to_a_file_of_an_older_format_is_found(path: Path) -> None:
    data = bytearray(FORMAT_1.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (problem,) = verify(path)
    assert "is damaged" in problem


def test_formats_are_brought_up_one_after_the_other(path: Path, monkeypatch: Any) -> None:
    path.write_bytes(FORMAT_1.read_bytes())
    monkeypatch.setattr(checkpoint, "FORMAT", 4)
    monkeypatch.setitem(checkpoint.MIGRATIONS, 2, lambda state: {**state, "seen": ["2 to 3"]})
    monkeypatch.setitem(checkpoint.MIGRATIONS, 3, lambda state: {**state, "seen": [*state["seen"], "3 to 4"]})
    assert load(path)["seen"] == ["2 to 3", "3 to 4"]


def test_there_is_a_migration_from_every_older_format() -> None:
    assert list(checkpoint.MIGRATIONS) == list(range(1, layout.FORMAT))


def test_a_file_of_an_older_format_that_lacks_a_part_is_refused(path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    monkeypatch.setattr(layout, "FORMAT", 1)
    write(path, {"module": {}})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"x.safetensors does not hold what a checkpoint of format 1 holds \(KeyError"):
        load(path)


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
        self.run, self.path = run, run.dir / "x.safetensors"
        run.save_checkpoint(self.path, reason="test", metrics={"a": 1.0})


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
    assert state["position"] == {"stage": "train", "epoch": 2, "batch": 0, "step": 6, "micro_step": 6, "samples": 12}
    assert equal(state["module"], {name: tensor.detach() for name, tensor in module.state_dict().items()})
    assert equal(state["optimizers"], [{"class": "AdamW", "steps": 6, "state": keep.run.optimizers[0].state_dict()}])
    assert equal(state["schedulers"], [{"class": "StepLR", "seen": -1, "state": keep.run.schedulers[0].scheduler.state_dict()}])
    assert state["plugins"] == {"keep": {"count": 6}}
    assert state["metrics"]["values"]["published"]["val_loss"][0] == made.metrics["val_loss"]
    assert state["versions"]["torch"] == str(torch.__version__)
    assert (state["run"]["id"], state["run"]["class"]) == (made.run.id, Scheduled.__qualname__)
    assert list(header(keep.path)) == ["format", *state]


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
    class Other(Keep):
        @hookimpl
        def save_checkpoint(self, path: Path, state: dict[str, Any]) -> Path:
            (path.parent / "own.txt").write_text(state["kind"])
            return path.parent / "own.txt"

        @hookimpl
        def on_checkpoint_saved(self, path: Path) -> None:
            self.saved = path

    other = Other()
    trainer(plugins=[other]).fit(tiny())
    assert other.saved.read_text() == "run"
    assert list(other.saved.parent.glob("*.safetensors")) == []


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
