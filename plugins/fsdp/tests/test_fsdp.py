from __future__ import annotations

import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, PluginError, Run, Trainer, checkpoint, cli, seed_everything, sharded
from torchplug.testing import check_plugin

pytestmark = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on the CPU")


SEEN: dict[str, Any] = {}  # of the layers while they compute


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            SEEN.update(calls=SEEN.get("calls", 0) + 1, dtype=self.linear.weight.dtype, sharded=isinstance(self, FSDPModule))
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(Module):
    """Two blocks, and parameters of its own; ``saves`` says after which step the state is written, and where."""

    def __init__(self, skips: tuple[int, ...] = (), batchnorm: bool = False, compiled: bool = False, clips: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(5, 7)
        self.blocks = nn.ModuleList([Block(7), Block(7)])
        if compiled:
            self.blocks[1] = torch.compile(self.blocks[1], backend="eager")
        self.between = nn.BatchNorm1d(7) if batchnorm else nn.Identity()
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(7, 1)
        self.skips, self.saves, self.norms = skips, dict[int, Path](), list[float]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.between(x)) * self.scale.sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if batch_idx in self.skips:
            return None
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val", nn.functional.l1_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any) -> Tensor:
        return self(batch[0])

    def on_after_backward(self, run: Run) -> None:
        if not run.window_ends:
            SEEN["early"] = SEEN.get("early", False) or any(parameter.grad is not None for parameter in self.parameters())

    def on_before_optimizer_step(self, run: Run, optimizer: Any) -> None:
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))

    def on_train_batch_end(self, run: Run) -> None:
        if run.window_ends and run.position.step in self.saves:
            run.save_checkpoint(self.saves.pop(run.position.step))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.02)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def data(count: int = 44) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def fit(
    root: Path,
    strategy: Any = None,
    world: int = 1,
    module: Any = None,
    batch: int = 8,
    ckpt_path: Any = None,
    saves: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """What came of three epochs: of the whole steps of ``batch`` samples each rank has its part."""
    seed_everything(1)
    module = module or Net()
    module.saves = dict(saves or {})
    options = {"max_epochs": 3, "plugins": [], "accelerator": "cpu", "log_every_n_steps": 2, "seed": 4, **more}
    strategies = {} if strategy is None else {"strategy": strategy}
    trainer = Trainer(root_dir=root, **strategies, **options)
    SEEN.clear()
    trainer.fit(module, DataLoader(data(), batch // world, shuffle=True), DataLoader(data(7), 3), ckpt_path=ckpt_path)
    seen = dict(SEEN)
    assert not {"training_step", "validation_step", "forward"} & vars(module).keys()
    metrics = dict(trainer.metrics)
    predicted = trainer.predict(module, DataLoader(data(7), 2))
    return {"state": plain(module.state_dict()), "metrics": metrics, "norms": module.norms, "predicted": torch.cat(predicted), "seen": seen}


def plain(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone() for name, value in state.items()}


def ranks(count: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What ``work`` returns in each of several processes that find each other as torchrun's would."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    context = mp.get_context("fork")
    processes = [context.Process(target=_rank, args=(work, rank, count, port, folder, args)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    alive = [process.kill() for process in processes if process.is_alive()]
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(count) if (folder / f"rank{rank}.pt").exists()]
    errors = [each for each in found if isinstance(each, str)]
    assert not errors, errors[0]
    assert not alive and len(found) == count, f"{len(alive)} of {count} processes hung"
    return found


def _rank(work: Callable[..., Any], rank: int, count: int, port: int, folder: Path, args: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    result: Any = ""
    try:
        result = work(folder, *args)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, folder / f"rank{rank}.pt")


def close(one: Any, other: Any, tolerance: float) -> None:
    """The same keys and nearly the same values."""
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        assert torch.allclose(value.float(), other["state"][name].float(), rtol=0, atol=tolerance), name
    assert one["metrics"].keys() == other["metrics"].keys()
    for name, value in one["metrics"].items():
        assert value == pytest.approx(other["metrics"][name], abs=tolerance, rel=tolerance), name
    assert torch.allclose(one["predicted"], other["predicted"], rtol=0, atol=tolerance)
    assert one["norms"] == pytest.approx(other["norms"], abs=10 * tolerance, rel=10 * tolerance)


def same(one: Any, other: Any) -> None:
    assert all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())
    assert one["metrics"] == other["metrics"]


# ---------------------------------------------------------------------- two ranks and one process


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # options of Net, of Trainer, of the strategy
    "plain": ({}, {"gradient_clip_val": 0.5}, {"wrap": ["Block"]}),
    "accumulated": (
        {"skips": (3,)},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        {"wrap": 20},
    ),
    "recomputed": ({}, {}, {"activation_checkpointing": ["Block"], "reshard_after_forward": False, "wrap": ["Linear"]}),
    "low": ({}, {"precision": "bf16-mixed"}, {"wrap": ["Block"]}),
}


def variants(root: Path) -> dict[str, Any]:
    found = {}
    for name, (net, trainer, strategy) in VARIANTS.items():
        found[name] = fit(root, {"fsdp": strategy}, 2, Net(**net), **trainer)
    found["ddp"] = fit(root, "ddp", 2, gradient_clip_val=0.5)
    for strategy in ("ddp", "fsdp"):
        found[f"{strategy} with buffers"] = fit(root, strategy, 2, Net(batchnorm=True), max_epochs=1)
    return found


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("fsdp", timeout="30s")


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    first, second = ranks(2, variants, tmp_path)
    for name, (net, trainer, _) in VARIANTS.items():
        same(first[name], second[name])
        close(first[name], fit(tmp_path, module=Net(**net), **trainer), 0.05 if name == "low" else 1e-5)
    close(first["plain"], first["ddp"], 1e-5)
    close(first["fsdp with buffers"], first["ddp with buffers"], 1e-5)
    seen = {name: first[name]["seen"] for name in VARIANTS}
    assert seen["recomputed"]["calls"] == seen["plain"]["calls"] + 2 * 3 * 6  # once more for each block and training batch
    assert [seen[name]["sharded"] for name in ("plain", "accumulated", "recomputed")] == [True, False, False]
    assert seen["accumulated"]["early"] is False  # nothing is exchanged within a window
    assert (seen["plain"]["dtype"], seen["low"]["dtype"]) == (torch.float32, torch.bfloat16)


# ---------------------------------------------------------------------- checkpoints


def saved(root: Path) -> list[Any]:
    """An uninterrupted run that saves whole, one that saves in parts, and runs that go on from each."""
    options = {"plugins": ["ema"]}
    found = []
    for form in ("full", "sharded"):
        fsdp = {"fsdp": {"wrap": ["Block"], "checkpoint": form}}
        file = root / f"{form}.safetensors"
        found += [fit(root, fsdp, 2, saves={8: file}, **options), fit(root, fsdp, 2, ckpt_path=file, **options)]
    found.append(fit(root, {"fsdp": {}}, 2, ckpt_path=root / "alone.safetensors", **options))
    return found


@pytest.mark.slow
def test_checkpoints_are_whole_or_in_parts_and_any_number_of_ranks_goes_on(tmp_path: Path) -> None:
    alone = fit(tmp_path, saves={8: tmp_path / "alone.safetensors"}, plugins=["ema"])
    whole, goes_on, parts, goes_on_from_parts, from_one = ranks(2, saved, tmp_path)[0]
    same(whole, goes_on)
    same(whole, parts)
    same(whole, goes_on_from_parts)
    close(whole, alone, 1e-5)
    close(from_one, {**alone, "norms": alone["norms"][8:]}, 1e-5)
    for form in ("full", "sharded"):
        file = tmp_path / f"{form}.safetensors"
        assert file.is_dir() == (form == "sharded")
        assert checkpoint.verify(file) == []
        assert checkpoint.header(file)["position"]["step"] == 8
        here = fit(tmp_path, ckpt_path=file, plugins=["ema"])
        close(here, {**alone, "norms": alone["norms"][8:]}, 1e-5)
    one, other = (checkpoint.load(tmp_path / f"{form}.safetensors") for form in ("full", "sharded"))
    for part in ("module", "optimizers", "plugins", "schedulers"):
        assert _alike(one[part], other[part]), part
    _refuses_what_is_damaged(tmp_path / "sharded.safetensors")


def _refuses_what_is_damaged(folder: Path) -> None:
    part, index = folder / "__1_0.distcp", folder / ".metadata"
    good = part.read_bytes()
    part.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    assert checkpoint.verify(folder) == [f"{folder}: __1_0.distcp is damaged"]
    with pytest.raises(checkpoint.CheckpointError, match=r"__1_0\.distcp is damaged"):
        checkpoint.load(folder)
    part.write_bytes(good)
    index.write_bytes(pickle.dumps(os.getpid))
    with pytest.raises(checkpoint.CheckpointError, match="getpid has no place in the index of a checkpoint"):
        sharded.read(folder, {})
    (folder / "state.json").write_text("{}")
    assert "state.json is damaged" in checkpoint.verify(folder)[0]
    (folder / "state.json").unlink()
    assert checkpoint.verify(folder) == [f"{folder} is a folder; name a file in it"]


def on_four(root: Path) -> list[Any]:
    fsdp = {"fsdp": {"wrap": ["Block"], "checkpoint": "sharded"}}
    return [
        fit(root, fsdp, 4, ckpt_path=root / f"{form}.safetensors", saves={13: root / f"{form}4.safetensors"})
        for form in ("full", "sharded")
    ]


def of_two(root: Path) -> dict[str, Any]:
    for form in ("full", "sharded"):
        found = fit(root, {"fsdp": {"checkpoint": form}}, 2, saves={8: root / f"{form}.safetensors"})
    return found


@pytest.mark.slow
def test_what_two_ranks_saved_is_gone_on_with_by_four_and_by_one(tmp_path: Path) -> None:
    two = ranks(2, of_two, tmp_path)[0]
    norms = two["norms"]
    for form, found in zip(("full", "sharded"), ranks(4, on_four, tmp_path)[0], strict=True):
        close(found, {**two, "norms": norms[-len(found["norms"]) :]}, 1e-5)
        again = fit(tmp_path, ckpt_path=tmp_path / f"{form}4.safetensors")
        close(again, {**two, "norms": norms[-len(again["norms"]) :]}, 1e-5)


def compiled(root: Path) -> dict[str, Any]:
    return fit(root, {"fsdp": {"wrap": ["Block"]}}, 2, Net(compiled=True), max_epochs=1)


@pytest.mark.slow
def test_a_compiled_layer_keeps_its_names(tmp_path: Path) -> None:
    found = ranks(2, compiled, tmp_path)[0]
    assert found["state"].keys() == Net(compiled=True).state_dict().keys()
    found["state"] = {key.replace("_orig_mod.", ""): value for key, value in found["state"].items()}
    close(found, fit(tmp_path, max_epochs=1), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_as_on_the_cpu(tmp_path: Path) -> None:
    found = {}
    for offload in (False, True):
        found[offload] = spawned(tmp_path, {"fsdp": {"wrap": ["Block"], "cpu_offload": offload}})
    close(found[False], found[True], 1e-4)
    close(found[False], fit(tmp_path, gradient_clip_val=0.5), 1e-3)


def spawned(root: Path, strategy: Any) -> dict[str, Any]:
    """One rank, in a process of its own that torchrun's environment makes one."""
    context = mp.get_context("spawn")
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    process = context.Process(target=_rank, args=(on_cuda, 0, 1, port, root, (strategy,)))
    process.start()
    process.join(300)
    found: Any = torch.load(root / "rank0.pt", weights_only=False)
    assert isinstance(found, dict), found
    return found


def on_cuda(root: Path, strategy: Any) -> dict[str, Any]:
    found = fit(root, strategy, accelerator="gpu", gradient_clip_val=0.5)
    return {**found, "state": {name: value.cpu() for name, value in found["state"].items()}, "predicted": found["predicted"].cpu()}


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return type(one) is type(other) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


AVERAGES = {
    "ema": ["ema"],
    "ema_recomputed": [{"ema": {"buffers": "recompute"}}],
    "swa": [{"swa": {"start": 1, "validate": True}}],
}


def averaged(root: Path) -> dict[str, Any]:
    return {
        name: fit(root, {"fsdp": {"wrap": ["Block"]}}, 2, Net(batchnorm=name != "ema"), batch=44, plugins=plugins)
        for name, plugins in AVERAGES.items()
    }


@pytest.mark.slow
def test_averages_of_sharded_parameters_are_those_of_one_process(tmp_path: Path) -> None:
    first, second = ranks(2, averaged, tmp_path)
    for name, plugins in AVERAGES.items():
        same(first[name], second[name])
        # batches of the size that each rank has: those of BatchNorm are then the same
        alone = fit(tmp_path, module=Net(batchnorm=name != "ema"), batch=22, accumulate_grad_batches=2, plugins=plugins)
        first[name]["metrics"]["loss"] = alone["metrics"]["loss"]
        close(first[name], alone, 1e-6)


# ---------------------------------------------------------------------- evaluation


class Unknown:
    """Batches, and nobody knows how many."""

    def __iter__(self) -> Any:
        return iter(DataLoader(data(7), 2))


def evaluated(root: Path, **strategy: Any) -> list[Any]:
    """Loaders of which a rank has less than the other, or nothing."""
    seed_everything(1)
    trainer, module = Trainer(root_dir=root, plugins=[], accelerator="cpu", **strategy), Net()
    several = [DataLoader(data(7), 8), DataLoader(data(7), 3), DataLoader(data(8), 2), Unknown(), DataLoader(data(3), 8)]
    found = [trainer.validate(module, each) for each in (several[:3], several[4:], several)]
    found.append([torch.cat(each) for each in trainer.predict(module, several[:3])])

    return found


def test_ranks_may_have_different_numbers_of_batches_to_evaluate(tmp_path: Path) -> None:
    alone = evaluated(tmp_path)
    for found in ranks(2, evaluated_on_ranks, tmp_path):
        for number in range(3):
            assert [dict(each) for each in found[number]] == [pytest.approx(dict(each), rel=1e-6) for each in alone[number]]
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found[3], alone[3], strict=True))


def evaluated_on_ranks(root: Path) -> list[Any]:
    return evaluated(root, strategy={"fsdp": {"wrap": ["Block"]}})


# ---------------------------------------------------------------------- what is refused


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].linear.weight = self.blocks[0].linear.weight


class Manual(Net):
    automatic_optimization = False


REFUSED: list[tuple[type[Net], dict[str, Any], str]] = [
    (Net, {"wrap": ["Blok"]}, "wrap: Net has no layer of class 'Blok', did you mean 'Block'?"),
    (
        Net,
        {"activation_checkpointing": ["Attention"]},
        "activation_checkpointing: Net has no layer of class 'Attention'; there are Block, ",
    ),
    (Tied, {"wrap": ["Block"]}, "blocks.0.linear.weight and blocks.1.linear.weight are one parameter, of layers that wrap takes apart"),
    (Manual, {}, "strategy 'fsdp' needs automatic optimization"),
]


def refused(root: Path) -> list[str]:
    """One message after the other: both ranks have it, and nothing was exchanged that the next run could stumble over."""
    found = []
    for kind, options, _ in REFUSED:
        try:
            fit(root, {"fsdp": options}, 2, kind())
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_cannot_be_sharded_is_said(tmp_path: Path) -> None:
    for found in ranks(2, refused, tmp_path):
        assert len(found) == len(REFUSED)
        for words, (_, _, expected) in zip(found, REFUSED, strict=True):
            assert words.startswith(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"wrap": 0}, "wrap must be names of classes, or a number of parameters from 1 on, got 0"),
        ({"wrap": [Block]}, r"wrap must hold names of classes, .* write \['Block'\]"),
        ({"wrap": "Block"}, "wrap must be a list or a tuple or an int or None, got 'Block'"),
        ({"param_dtype": "half"}, "param_dtype must be 'float32' or 'bfloat16' or 'float16' or None, got 'half'"),
        ({"checkpoint": "parts"}, "checkpoint must be 'full' or 'sharded', got 'parts'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PluginError, match=words):
        Trainer(max_epochs=1, plugins=[], strategy={"fsdp": options})


# ---------------------------------------------------------------------- from a plain script


@pytest.mark.slow
def test_a_plain_script_gets_whole_weights_back_and_goes_on(tmp_path: Path) -> None:
    strategy = {"fsdp": {"start_method": "fork", "checkpoint": "sharded", "wrap": ["Block"]}}
    options = {"plugins": ["ema", {"checkpoint": {"monitor": "val", "every_n_epochs": 1, "top_k": 2}}], "accelerator": "cpu", "seed": 4}
    kept = {}
    for name, more in (("alone", {}), ("two", {"strategy": strategy, "devices": 2})):
        seed_everything(1)
        module, trainer = Net(), Trainer(root_dir=tmp_path / name, max_epochs=2, **options, **more)
        loaders = DataLoader(data(), 8 // (1 + bool(more)), shuffle=True), DataLoader(data(7), 3)
        trainer.fit(module, *loaders)
        trainer.max_epochs = 3
        trainer.fit(module, *loaders)
        kept[name] = {"state": module.state_dict(), "metrics": dict(trainer.metrics), "norms": [], "predicted": torch.zeros(1)}
        assert all(type(value) is Tensor for value in module.state_dict().values())
        assert not any("fsdp" in key or "training_step" in key for key in vars(module))
    close(kept["two"], kept["alone"], 1e-5)
    folder = trainer.run.dir / "checkpoints"
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "alone").rglob("checkpoints/*"))
    assert [checkpoint.verify(path) for path in folder.iterdir()] == [[]] * 3
    target = tmp_path / "weights.pt"
    assert cli.main(["export", str(folder / "last.safetensors"), str(target)]) == 0
    assert _alike(torch.load(target, weights_only=True), plain(checkpoint.load(folder / "last.safetensors")["module"]))
    Net().load_state_dict(torch.load(target, weights_only=True))
