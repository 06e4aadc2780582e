"""What the files hold, against what trainer.predict returns."""

import json
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_prediction_writer import PredictionWriter

Pair = namedtuple("Pair", "low high")


class Own(Tensor):
    """A tensor that does not load with weights_only=True."""


def loader(samples: int = 10, batch_size: int = 4, first: int = 0) -> Any:
    x = torch.arange(first * 3, (first + samples) * 3, dtype=torch.float32).view(samples, 3)
    return DataLoader(TensorDataset(x), batch_size=batch_size)


class Net(Module):
    """Predicts what ``form`` makes of the logits."""

    def __init__(self, form: Any = lambda logits: logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.form = nn.Linear(3, 2), form

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.form(self.layer(batch[0]))


def predict(path: Path, module: Any, loaders: Any, *plugins: Any, keep: bool = True) -> tuple[Any, Path]:
    trainer = Trainer(root_dir=path, plugins=list(plugins))
    kept = trainer.predict(module, loaders, return_predictions=keep)
    assert trainer.run is not None
    return kept, trainer.run.dir / "predictions"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("prediction_writer")


def test_each_batch_is_a_file_with_what_predict_returned_and_where_it_belongs(tmp_path: Path) -> None:
    kept, folder = predict(tmp_path, Net(), loader(), PredictionWriter())
    assert names(folder) == [f"rank0-loader0-batch00000{i}.pt" for i in range(3)]
    samples = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for i, name in enumerate(names(folder)):
        record = load(folder / name)
        assert torch.equal(record.pop("predictions"), kept[i])
        assert record == {"batch_idx": i, "dataloader_idx": 0, "rank": 0, "samples": samples[i]}


def test_at_the_end_it_is_one_file_with_the_same_records(tmp_path: Path) -> None:
    kept, folder = predict(tmp_path, Net(), loader(), PredictionWriter(write_interval="epoch"))
    assert names(folder) == ["rank0.pt"]
    records = load(folder / "rank0.pt")
    assert [record["samples"] for record in records] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [record["batch_idx"] for record in records] == [0, 1, 2]
    assert all(torch.equal(record["predictions"], own) for record, own in zip(records, kept, strict=True))


@pytest.mark.parametrize("interval", ["batch", "epoch"])
def test_several_loaders_are_told_apart(tmp_path: Path, interval: Any) -> None:
    kept, folder = predict(tmp_path, Net(), [loader(4, 2), loader(3, 2, first=50)], PredictionWriter(write_interval=interval))
    if interval == "batch":
        assert names(folder) == [f"rank0-loader{j}-batch00000{i}.pt" for j in range(2) for i in range(2)]
        records = [load(folder / name) for name in names(folder)]
    else:
        records = load(folder / "rank0.pt")
    assert [record["samples"] for record in records] == [[0, 1], [2, 3], [0, 1], [2]]
    assert [(record["dataloader_idx"], record["batch_idx"]) for record in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(torch.equal(record["predictions"], own) for record, own in zip(records, [*kept[0], *kept[1]], strict=True))


def test_another_rank_has_files_of_its_own(tmp_path: Path) -> None:
    class Second:
        before = "*"

        @hookimpl
        def on_predict_start(self, run: Any) -> None:
            run.rank = 1

    for plugins in ([], [Second()]):
        predict(tmp_path, Net(), loader(4), *plugins, PredictionWriter(dir=tmp_path / "all"))
    assert names(tmp_path / "all") == ["rank0-loader0-batch000000.pt", "rank1-loader0-batch000000.pt"]
    assert [load(tmp_path / "all" / name)["rank"] for name in names(tmp_path / "all")] == [0, 1]


# ---------------------------------------------------------------------- forms

FORMS: dict[str, tuple[Any, Any]] = {
    "a dict": (lambda x: {"logits": x, "n": len(x)}, lambda x: {"logits": x, "n": len(x)}),
    "nested": (lambda x: [x, (x + 1, {"a": None, "b": "text"})], lambda x: [x, (x + 1, {"a": None, "b": "text"})]),
    "a named tuple": (lambda x: Pair(x, 2.5), lambda x: (x, 2.5)),
    "another mapping": (lambda x: OrderedDict(a=x), lambda x: {"a": x}),
    "arrays": (lambda x: {"a": x.numpy(), "n": numpy.float32(1.5), "b": numpy.bool_(True)}, lambda x: {"a": x, "n": 1.5, "b": True}),
    "an array that is reversed": (lambda x: x.numpy()[::-1], lambda x: x.flip(0)),
    "an array that may not be written to": (lambda x: numpy.frombuffer(x.numpy().tobytes(), "f4"), lambda x: x.flatten()),
    "an array in the other byte order": (lambda x: x.numpy().astype(">f4"), lambda x: x),
    "keys of numpy": (lambda x: {numpy.int64(3): x, (1, numpy.str_("a")): None}, lambda x: {3: x, (1, "a"): None}),
    "a complex number": (lambda x: [1j, numpy.complex64(2j)], lambda x: [1j, 2j]),
    "empty": (lambda x: {"a": [], "b": {}, "c": x[:0]}, lambda x: {"a": [], "b": {}, "c": x[:0]}),
    "with a graph": (lambda x: x.requires_grad_(), lambda x: x),
    "a parameter": (lambda x: nn.Parameter(x), lambda x: x),
    "a subclass": (lambda x: x.as_subclass(Own), lambda x: x),
    "half": (lambda x: x.bfloat16(), lambda x: x.bfloat16()),
    "transposed": (lambda x: x.T, lambda x: x.T),
    "nothing": (lambda x: None, lambda x: None),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(other, Tensor):
        return type(one) is Tensor and one.dtype == other.dtype and torch.equal(one, other) and not one.requires_grad
    if isinstance(other, dict):
        return type(one) is dict and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(other, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("name", FORMS)
def test_whatever_a_step_returns_is_written_in_plain_types(tmp_path: Path, name: str) -> None:
    form, plain = FORMS[name]
    _, folder = predict(tmp_path, Net(form), loader(4), PredictionWriter())
    logits, _ = predict(tmp_path, Net(), loader(4))
    assert same(load(folder / "rank0-loader0-batch000000.pt")["predictions"], plain(logits[0]))


def test_a_small_part_of_a_large_tensor_is_a_small_file(tmp_path: Path) -> None:
    _, folder = predict(tmp_path, Net(lambda x: torch.zeros(1_000_000)[:4]), loader(4), PredictionWriter())
    assert (folder / "rank0-loader0-batch000000.pt").stat().st_size < 5000


def test_what_is_changed_in_place_later_is_written_as_it_was(tmp_path: Path) -> None:
    shared = torch.zeros(2)

    def form(x: Tensor) -> Tensor:
        return shared.add_(1)

    _, folder = predict(tmp_path, Net(form), loader(12), PredictionWriter(write_interval="epoch"))
    assert [record["predictions"].tolist() for record in load(folder / "rank0.pt")] == [[1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda x: {"a": [x, Net()]}, r"predictions\.a\.1 is a Net, which is not written; return tensors, numbers"),
        (lambda x: (i for i in range(3)), r"predictions is a generator, which is not written"),
        (lambda x: {"a": numpy.array(["text"])}, r"predictions\.a is a ndarray, which is not written"),
        (lambda x: numpy.array([1.0], numpy.longdouble), r"predictions is a ndarray, which is not written"),
        (lambda x: [numpy.array([None])], r"predictions\.0 is a ndarray, which is not written"),
        (lambda x: {"a": numpy.datetime64("2020-01-01")}, r"predictions\.a is a date, which is not written"),
        (lambda x: numpy.longdouble(1), r"predictions is a longdouble, which is not written"),
        (lambda x: {"a": {Path("b"): x}}, r"the key PosixPath\('b'\) of predictions\.a is a PosixPath, which is not written"),
    ],
)
def test_what_has_no_plain_form_is_an_error_that_names_its_place(tmp_path: Path, form: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        predict(tmp_path, Net(form), loader(4), PredictionWriter())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
def test_sparse_tensors_are_written_to_pt_alone(tmp_path: Path) -> None:
    kept, folder = predict(tmp_path, Net(lambda x: x.to_sparse()), loader(4), PredictionWriter())
    found = load(folder / "rank0-loader0-batch000000.pt")["predictions"]
    assert found.is_sparse and torch.equal(found.to_dense(), kept[0].to_dense())
    with pytest.raises(TypeError, match="predictions is a Tensor, which safetensors cannot hold; write format='pt'"):
        predict(tmp_path, Net(lambda x: x.to_sparse()), loader(4), PredictionWriter(format="safetensors"))


def test_safetensors_have_tensors_under_their_path_and_the_record_beside(tmp_path: Path) -> None:
    def form(x: Tensor) -> Any:
        return {"logits": x.T, "parts": [x + 1, 3], "array": x.numpy().T}

    writer = PredictionWriter(format="safetensors")
    _, folder = predict(tmp_path, Net(form), loader(), writer)
    logits, _ = predict(tmp_path, Net(), loader())
    assert names(folder) == [f"rank0-loader0-batch00000{i}.safetensors" for i in range(3)]
    for i, name in enumerate(names(folder)):
        tensors = load_file(folder / name)
        assert sorted(tensors) == ["predictions.array", "predictions.logits", "predictions.parts.0", "predictions.parts.1"]
        assert torch.equal(tensors["predictions.logits"], logits[i].T)
        assert torch.equal(tensors["predictions.array"], logits[i].T)
        assert torch.equal(tensors["predictions.parts.0"], logits[i] + 1) and tensors["predictions.parts.1"].item() == 3
        with safe_open(folder / name, "pt") as file:
            record = json.loads(file.metadata()["record"])
        assert record == {"batch_idx": i, "dataloader_idx": 0, "rank": 0, "samples": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]][i]}


def test_safetensors_at_the_end_number_their_records(tmp_path: Path) -> None:
    kept, folder = predict(tmp_path, Net(), loader(), PredictionWriter(format="safetensors", write_interval="epoch"))
    tensors = load_file(folder / "rank0.safetensors")
    assert sorted(tensors) == [f"{i}.predictions" for i in range(3)]
    assert all(torch.equal(tensors[f"{i}.predictions"], kept[i]) for i in range(3))
    with safe_open(folder / "rank0.safetensors", "pt") as file:
        assert [record["batch_idx"] for record in json.loads(file.metadata()["record"])] == [0, 1, 2]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda x: {"a": "text"}, "predictions.a is a str, which safetensors cannot hold; write format='pt', or return tensors"),
        (lambda x: {"a": {"b": x}, "a.b": x}, "predictions.a.b stands for two predictions; rename a key, or write format='pt'"),
    ],
)
def test_what_safetensors_cannot_hold_is_an_error(tmp_path: Path, form: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        predict(tmp_path, Net(form), loader(4), PredictionWriter(format="safetensors"))


# ---------------------------------------------------------------------- memory, folders, failures


@pytest.mark.slow
def test_nothing_stays_in_memory_when_nothing_is_to_be_returned(tmp_path: Path) -> None:
    import gc
    import weakref

    alive: list[Any] = []
    held: list[int] = []
    writer = PredictionWriter()

    def form(x: Tensor) -> Tensor:
        gc.collect()
        held.append(sum(ref() is not None for ref in alive) + len(writer._kept))
        alive.append(weakref.ref(x))
        return x

    kept, folder = predict(tmp_path, Net(form), loader(16, 4), writer, keep=False)
    assert kept is None and len(names(folder)) == 4
    assert held == [0] * 4


def test_the_plugin_sees_what_others_made_of_the_outputs(tmp_path: Path) -> None:
    class Doubles:
        @hookimpl
        def on_predict_batch_end(self, outputs: Any) -> None:
            outputs.mul_(2)

    _, folder = predict(tmp_path, Net(), loader(4), PredictionWriter(), Doubles())
    kept, _ = predict(tmp_path, Net(), loader(4))
    assert torch.equal(load(folder / "rank0-loader0-batch000000.pt")["predictions"], 2 * kept[0])


def test_earlier_predictions_are_an_error_unless_they_may_be_deleted(tmp_path: Path) -> None:
    other = tmp_path / "out" / "notes.txt"
    predict(tmp_path, Net(), loader(12), PredictionWriter(dir=tmp_path / "out"))
    other.write_text("mine")
    own = [tmp_path / "out" / name for name in ("rank0-notes.txt", "rank0.pth", ".rank0.pt.tmp")]
    for path in own:
        path.write_text("mine")
    left = tmp_path / "out" / ".rank0-loader0-batch000003.pt.123.tmp"
    left.write_bytes(b"half")  # by a process that was killed
    with pytest.raises(FileExistsError, match="holds predictions already; give another dir, or overwrite=True to delete them"):
        predict(tmp_path, Net(), loader(4), PredictionWriter(dir=tmp_path / "out"))
    assert len(names(tmp_path / "out")) == 4 + len(own) + 1
    predict(tmp_path, Net(), loader(4), PredictionWriter(dir=str(tmp_path / "out"), overwrite=True))
    assert names(tmp_path / "out") == sorted(["notes.txt", "rank0-loader0-batch000000.pt", *(path.name for path in own)])


def test_a_trial_run_leaves_nothing_behind_and_deletes_nothing(tmp_path: Path) -> None:
    predict(tmp_path, Net(), loader(), PredictionWriter(dir=tmp_path / "out"))
    there = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    for options in ({}, {"overwrite": True}):
        writer = PredictionWriter(dir=tmp_path / "out", **options)
        Trainer(root_dir=tmp_path / "trial", fast_dev_run=True, plugins=[writer]).predict(Net(), loader())
        assert writer.files == 1
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == there and len(there) == 3


def test_a_prediction_that_fails_leaves_whole_files_alone(tmp_path: Path) -> None:
    done = []

    def form(x: Tensor) -> Any:
        done.append(1)
        return x if len(done) < 3 else {"a": lambda: None}

    writer = PredictionWriter(dir=tmp_path / "out")
    with pytest.raises(TypeError, match=r"predictions\.a is a function"):
        predict(tmp_path, Net(form), loader(), writer)
    assert [load(tmp_path / "out" / name)["batch_idx"] for name in names(tmp_path / "out")] == [0, 1]


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(record: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="No space left"):
        predict(tmp_path, Net(), loader(4), PredictionWriter(dir=tmp_path / "out"))
    assert names(tmp_path / "out") == []


def test_the_report_says_where_they_are(tmp_path: Path, caplog: Any) -> None:
    _, folder = predict(tmp_path, Net(), loader(), PredictionWriter())
    assert f"prediction_writer: 3 files with predictions in {folder}" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dir": 3}, "dir must be a folder or None, got 3"),
        ({"dir": ""}, "dir must be a folder or None, got ''"),
        ({"write_interval": "step"}, "write_interval must be 'batch' or 'epoch', got 'step'"),
        ({"format": "csv"}, "format must be 'pt' or 'safetensors', got 'csv'"),
        ({"overwrite": 1}, "overwrite must be True or False, got 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, words: str) -> None:
    with pytest.raises(PluginError, match=f"plugin 'prediction_writer' .torchplug-prediction-writer 0.1.0.: {words}"):
        Trainer(plugins=[{"prediction_writer": options}])
