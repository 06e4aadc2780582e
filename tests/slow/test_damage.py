"""A checkpoint of a real run, damaged at random places, is refused or right; a hostile pickle is refused and never runs."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchplug
from torchplug import Trainer
from torchplug.checkpoint import CheckpointError, header, load, verify
from torchplug.cli import main

pytestmark = pytest.mark.slow

PLACES = 500


class Net(torchplug.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.1), nn.Linear(width, 1))

    def training_step(self, batch: Any) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any) -> None:
        self.log("test_loss", self.net(batch[0]).mean())

    def predict_step(self, batch: Any) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])]


def loader(batches: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(batches)
    x = torch.randn(4 * batches, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=batches > 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run with shuffling, dropout, a scheduler and plugins with a state, written in mid-epoch."""
    plugins = [{"checkpoint": {"every_n_steps": 2, "monitor": "val_loss"}}, {"early_stopping": {"monitor": "val_loss"}}]
    trainer = Trainer(max_steps=8, seed=1, plugins=plugins, root_dir=tmp_path_factory.mktemp("run"))
    trainer.fit(Net(), loader(6), loader(2))
    assert trainer.run is not None
    path = Path(str(trainer.run.last_path))
    assert verify(path) == []
    assert header(path)["position"]["batch"] == 2
    return path


def bits(value: Any) -> Any:
    """A value in a form that is equal for equal bits alone."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return type(value).__name__, [(key, bits(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [bits(part) for part in value]
    return type(value).__name__, repr(value)


def refused(path: Path) -> str:
    """What ``load`` says about a file, empty if it takes it; ``verify`` and ``load`` must agree, and both name the file."""
    problems = verify(path)
    try:
        load(path)
    except CheckpointError as error:
        assert problems
        assert all(path.name in problem for problem in problems)
        assert path.name in str(error)
        return str(error)
    assert problems == []
    return ""


@pytest.mark.parametrize("where", ["anywhere", "header", "tensors"])
def test_every_flipped_bit_that_changes_a_loaded_value_is_detected(where: str, checkpoint: Path, tmp_path: Path) -> None:
    whole, expected = checkpoint.read_bytes(), bits(load(checkpoint))
    start = 8 + int.from_bytes(whole[:8], "little")
    first, last = {"anywhere": (0, len(whole)), "header": (0, start), "tensors": (start, len(whole))}[where]
    draw, path, harmless = random.Random(where), tmp_path / "damaged.safetensors", 0
    for _ in range(PLACES):
        place, bit = draw.randrange(first, last), draw.randrange(8)
        data = bytearray(whole)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        if not refused(path):
            assert bits(load(path)) == expected, f"bit {bit} of byte {place} is silently wrong"
            harmless += 1
    assert harmless < PLACES / 10, "hardly any bit means nothing"


def test_a_flipped_bit_in_a_tensor_is_reported_under_its_name(checkpoint: Path, tmp_path: Path) -> None:
    whole = checkpoint.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    entries = {name: part["data_offsets"] for name, part in json.loads(whole[8:start]).items() if name != "__metadata__"}
    draw, path = random.Random(0), tmp_path / "damaged.safetensors"
    for _ in range(PLACES):
        place = draw.randrange(start, len(whole))
        data = bytearray(whole)
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        (name,) = (name for name, (begin, end) in entries.items() if begin <= place - start < end)
        assert verify(path) == [f"{path}: entry {name} is damaged"]
        assert refused(path) == f"{path}: entry {name} is damaged"


def test_every_truncation_is_detected(checkpoint: Path, tmp_path: Path) -> None:
    whole, draw, path = checkpoint.read_bytes(), random.Random(0), tmp_path / "damaged.safetensors"
    for length in (draw.randrange(len(whole)) for _ in range(PLACES)):
        path.write_bytes(whole[:length])
        message = refused(path)
        assert f"damaged.safetensors is cut off: it has {length} of " in message or length < 9


# ---------------------------------------------------------------------- hostile pickles


class Payload:
    """Leaves a canary where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


def as_pickle(protocol: int) -> Callable[[Path, Any], None]:
    return lambda path, value: path.write_bytes(pickle.dumps(value, protocol)) and None


def as_zip(path: Path, value: Any) -> None:
    torch.save(value, path)


def as_legacy(path: Path, value: Any) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


HOSTILE = {**{f"pickle {n}": as_pickle(n) for n in range(6)}, "torch.save": as_zip, "legacy torch.save": as_legacy}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def state_with(payload: Payload) -> dict[str, Any]:
    """What looks like a checkpoint of somebody else's trainer."""
    return {"state_dict": {"net.0.weight": payload}, "module": payload, "kind": "run", "hyperparameters": {"width": payload}}


def every_loading_path(path: Path, root: Path) -> dict[str, Callable[[], Any]]:
    """Each way in which torchplug reads a checkpoint."""

    def trainer() -> Trainer:
        return Trainer(max_steps=1, plugins=[], root_dir=root, num_sanity_val_steps=0)

    return {
        "load": lambda: load(path),
        "load a part": lambda: load(path, parts=["module"]),
        "header": lambda: header(path),
        "load_from_checkpoint": lambda: Net.load_from_checkpoint(path),
        "fit": lambda: trainer().fit(Net(), loader(2), ckpt_path=path),
        "validate": lambda: trainer().validate(Net(), loader(2), ckpt_path=path),
        "test": lambda: trainer().test(Net(), loader(2), ckpt_path=path),
        "predict": lambda: trainer().predict(Net(), loader(2), ckpt_path=path),
    }


@pytest.mark.parametrize("form", HOSTILE)
def test_a_hostile_pickle_is_live(form: str, canary: Path, tmp_path: Path) -> None:
    """The other tests mean something: this is what happens to those who unpickle."""
    HOSTILE[form](tmp_path / "evil", state_with(Payload(canary)))
    torch.load(tmp_path / "evil", weights_only=False) if "torch" in form else pickle.loads((tmp_path / "evil").read_bytes())
    assert canary.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("form", HOSTILE)
def test_a_hostile_pickle_is_refused_by_every_loading_path_and_never_executed(
    form: str, suffix: str, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"evil{suffix}"
    HOSTILE[form](path, state_with(Payload(canary)))
    for name, read in every_loading_path(path, tmp_path / "runs").items():
        with pytest.raises(CheckpointError, match="is not a checkpoint of torchplug") as caught:
            read()
        assert path.name in str(caught.value), name
        if form not in ("pickle 0", "pickle 1"):  # which look like any text
            assert "never unpickles" in str(caught.value)
    assert len(verify(path)) == 1
    for command in (
        ["verify", path],
        ["show", path],
        ["export", path, tmp_path / "out.pt"],
        ["export", path, tmp_path / "out.safetensors"],
    ):
        assert main([str(argument) for argument in command]) == 1
        shown = capsys.readouterr()
        assert "is not a checkpoint of torchplug" in shown.out + shown.err
    assert not canary.exists()
    assert not (tmp_path / "out.pt").exists()


def test_a_hostile_pickle_among_the_checkpoints_of_a_run_is_passed_over(canary: Path, tmp_path: Path) -> None:
    def trainer(steps: int) -> Trainer:
        return Trainer(max_steps=steps, plugins=[{"checkpoint": {"every_n_steps": 1, "top_k": -1}}], root_dir=tmp_path)

    first = trainer(2)
    first.fit(Net(), loader(6))
    assert first.run is not None
    evil = Path(str(first.run.last_path))
    evil.unlink()
    as_zip(evil, state_with(Payload(canary)))
    second = trainer(3)
    second.fit(Net(), loader(6), ckpt_path="last")
    assert second.run is not None
    assert second.run.position.step == 3
    assert not canary.exists()


CODE = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import test_damage as here
from torchplug.checkpoint import CheckpointError, verify

for path in map(Path, sys.argv[2:]):
    for name, read in here.every_loading_path(path, Path(sys.argv[1])).items():
        try:
            read()
        except CheckpointError:
            continue
        sys.exit(f"{{path}} was taken by {{name}}")
    assert verify(path)
    for command in ("verify", "show"):
        assert here.main([command, str(path)]) == 1
    assert here.main(["export", str(path), str(path) + ".out.pt"]) == 1
print("all refused")
"""


def test_a_hostile_pickle_is_not_executed_when_the_environment_asks_torch_for_it(canary: Path, tmp_path: Path) -> None:
    paths = []
    for form, write in HOSTILE.items():
        paths.append(tmp_path / f"{form}.safetensors")
        write(paths[-1], state_with(Payload(canary)))
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(folder=str(Path(__file__).parent)), str(tmp_path / "runs"), *map(str, paths)],
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all refused"
    assert not canary.exists()


def test_the_environment_makes_torch_itself_execute_it(canary: Path, tmp_path: Path) -> None:
    """What the test before protects from."""
    as_zip(tmp_path / "evil.pt", state_with(Payload(canary)))
    code = "import sys, torch; torch.load(sys.argv[1])"
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "evil.pt")], env=environment, check=True, timeout=120)
    assert canary.exists()
