"""What a run on a CUDA device promises; every test here needs one."""

from __future__ import annotations

import gc
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import torchplug_gpu
from torchplug import Module, Trainer, hookimpl
from torchplug.checkpoint import load
from torchplug_batch_size_finder import scale_batch_size
from torchplug_gpu import AHEAD, _Transfer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # with workers; CUDA has threads
]
MB = 10**6


class Samples(Dataset):
    """Points of a plane with noise from the global generator of the process, in nested containers."""

    def __init__(self, length: int = 256) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(8, generator=generator)
        return {"inputs": {"x": x + 0.01 * torch.rand(8)}, "target": [x.sum().view(1), index]}


class Net(Module):
    """Keeps the batches that it saw, on the device."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Dropout(dropout), nn.Tanh(), nn.Linear(32, 1))
        self.batches: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.losses: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        return (self.layers(batch["inputs"]["x"]) - batch["target"][0]).square().mean()

    def training_step(self, batch: Any) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.batches.append(batch["inputs"]["x"])
        self.indices.append(batch["target"][1])
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: Any) -> Any:
        return self.layers(batch["inputs"]["x"])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader(workers: int = 0, length: int = 256, **options: Any) -> DataLoader:
    return DataLoader(Samples(length), 16, num_workers=workers, **options)


def fit(path: Any, module: Any, train: Any, *plugins: Any, val: Any = None, ckpt_path: Any = None, **options: Any) -> Trainer:
    defaults = {"max_epochs": 2, "seed": 5, "root_dir": path, "accelerator": "gpu", "plugins": list(plugins), "num_sanity_val_steps": 0}
    trainer = Trainer(**{**defaults, **options})
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return trainer


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def busy(milliseconds: float = 100) -> None:
    """Keeps the current stream busy for about as long, without waiting for it."""
    x = torch.randn(2048, 2048, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.mm(x, x)
    start.record()
    for _ in range(10):
        torch.mm(x, x)
    end.record()
    end.synchronize()
    for _ in range(int(10 * milliseconds / start.elapsed_time(end)) + 1):
        torch.mm(x, x)


# ---------------------------------------------------------------------- numbers


def test_training_equals_that_on_the_cpu(tmp_path: Any) -> None:
    class Smooth(Net):  # Adam divides gradients by themselves, which makes much of a last bit
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    modules = {}
    for accelerator in ("cpu", "gpu"):
        module = modules[accelerator] = Smooth()
        options = {"accelerator": accelerator, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
        trainer = fit(tmp_path, module, loader(shuffle=True), val=loader(), **options)
        module.val_loss = trainer.metrics["val_loss"]
        module.cpu_weights = [p.detach().cpu() for p in module.parameters()]
        assert trainer.run.device.type == ("cpu" if accelerator == "cpu" else "cuda")
    cpu, gpu = modules["cpu"], modules["gpu"]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu.batches, gpu.batches, strict=True))
    for a, b in zip(cpu.cpu_weights, gpu.cpu_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert cpu.val_loss == pytest.approx(gpu.val_loss, rel=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_changes_no_bit_of_batches_and_weights(tmp_path: Any, workers: int) -> None:
    plain, prefetched = Net(0.3), Net(0.3)
    for module, prefetch in ((plain, False), (prefetched, True)):
        fit(tmp_path, module, loader(workers, shuffle=True), {"gpu": {"prefetch": prefetch}})
    assert len(plain.batches) == len(prefetched.batches) == 32
    assert all(map(torch.equal, plain.batches, prefetched.batches)) and all(map(torch.equal, plain.indices, prefetched.indices))
    assert all(map(torch.equal, plain.losses, prefetched.losses)) and equal(plain, prefetched)


def test_batches_are_right_while_the_device_is_far_behind_the_program() -> None:
    """Each batch is read twice, behind slow work, and its memory is given back before that is done."""
    move, wrong = _Transfer(torch.device("cuda", 0), None), torch.zeros((), dtype=torch.int64, device="cuda")
    x = torch.randn(2048, 2048, device="cuda")
    for number in range(60):
        source = torch.full((2 * MB,), number)
        batch = move(source.pin_memory() if number % 2 else source)
        source.fill_(-1)
        for _ in range(2):
            for _ in range(5):
                torch.mm(x, x)
            wrong += (batch != number).sum()
        del batch, source
    assert wrong.item() == 0


@pytest.mark.parametrize("batch", [1, 9, 16, 25])
def test_a_run_that_goes_on_is_bitwise_the_one_that_was_never_stopped(tmp_path: Any, batch: int) -> None:
    class Saves:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            if run.position.micro_step == batch:
                run.save_checkpoint(tmp_path / "saved.safetensors")
                run.request_stop("enough")

    whole, first, second = Net(0.3), Net(0.3), Net(0.3)
    for module in (whole, first, second):
        plugins = [Saves()] if module is first else []
        fit(tmp_path, module, loader(2, shuffle=True), *plugins, ckpt_path=tmp_path / "saved.safetensors" if module is second else None)
    assert len(first.losses) == batch
    assert all(map(torch.equal, whole.losses, [*first.losses, *second.losses])) and equal(whole, second)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_lower_precision_trains(tmp_path: Any, precision: str) -> None:
    module = Net()
    trainer = fit(tmp_path, module, loader(shuffle=True), max_epochs=8, precision=precision)
    losses = [loss.item() for loss in module.losses]
    assert sum(losses[-16:]) < 0.3 * sum(losses[:16])
    assert {each.dtype for each in module.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    assert (trainer.run.scaler is not None) is (precision == "16-mixed")
    if trainer.run.scaler is not None:
        assert trainer.run.scaler.get_scale() >= 1 and trainer.run.position.step > 100


def test_predictions_are_those_of_the_cpu(tmp_path: Any) -> None:
    def predicted(accelerator: str) -> Tensor:
        trainer = Trainer(seed=1, root_dir=tmp_path, accelerator=accelerator, plugins=[])
        return torch.cat([each.cpu() for each in trainer.predict(Net(), loader(2))])

    torch.testing.assert_close(predicted("cpu"), predicted("gpu"), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- waiting


class WaitsForNothing:
    """From batch 5 to batch 205 whatever waits for the device is an error."""

    @staticmethod
    def mode(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says that it does not see everything
            torch.cuda.set_sync_debug_mode(mode)

    def __init__(self) -> None:
        self.steps = 0

    @hookimpl
    def on_train_batch_start(self, batch_idx: int) -> None:
        if batch_idx == 5:
            self.mode("error")

    @hookimpl
    def on_train_batch_end(self, batch_idx: int) -> None:
        self.steps += torch.cuda.get_sync_debug_mode() == 2
        if batch_idx == 205:
            self.mode("default")

    @hookimpl
    def teardown(self) -> None:
        self.mode("default")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("prefetch", [False, True])
def test_200_steps_with_the_standard_plugins_wait_for_nothing_between_logging_steps(tmp_path: Any, workers: int, prefetch: bool) -> None:
    waits = WaitsForNothing()
    options = {"log_every_n_steps": 1000, "max_epochs": 1, "gradient_clip_val": 1.0}
    train = loader(workers, 220 * 16, shuffle=True)
    fit(tmp_path, Net(0.3), train, "standard", {"gpu": {"prefetch": prefetch}}, waits, **options)
    assert waits.steps == 201


def test_what_waits_is_found() -> None:
    waits = WaitsForNothing()
    waits.mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        waits.mode("default")


def test_a_checkpoint_in_the_background_waits_for_nothing_and_holds_what_was_there(tmp_path: Any) -> None:
    class Weights:
        def __init__(self) -> None:
            self.at: dict[int, Tensor] = {}

        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            if run.position.step % 50 == 0:
                self.at[run.position.step] = run.module.layers[0].weight.detach().clone()

    waits, weights = WaitsForNothing(), Weights()
    saving = {"checkpoint": {"every_n_steps": 50, "top_k": -1, "dir": tmp_path / "kept"}}
    fit(tmp_path, Net(), loader(0, 220 * 16), saving, weights, waits, log_every_n_steps=1000, max_epochs=1)
    assert waits.steps == 201
    found = {
        state["position"]["step"]: state["module"]["layers.0.weight"] for state in map(load, (tmp_path / "kept").glob("*.safetensors"))
    }
    assert {50, 100, 150, 200} <= set(found)
    assert all(torch.equal(found[step], weight.cpu()) for step, weight in weights.at.items())


def test_a_copy_is_over_before_the_step_that_the_device_is_busy_with() -> None:
    move, source = _Transfer(torch.device("cuda", 0), None), torch.ones(8 * MB).pin_memory()
    busy(1)  # first-time work
    torch.cuda.synchronize()
    busy(200)
    step, copy = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step.record()
    batch = move(source)
    copy.record(move.stream)
    assert not step.query(), "the program did not wait for the device"
    torch.cuda.synchronize()
    assert copy.elapsed_time(step) > 50  # milliseconds from the end of the copy to that of the step
    assert batch.sum().item() == 8 * MB


# ---------------------------------------------------------------------- memory


def test_the_report_has_the_peak_and_afterwards_memory_is_as_before(tmp_path: Any) -> None:
    class Wide(Net):
        def training_step(self, batch: Any) -> Any:
            torch.empty(500 * MB, dtype=torch.uint8, device=self.device)
            return super().training_step(batch)

    def train() -> str:
        return fit(tmp_path, Wide(), loader(2), max_epochs=1).run.report["gpu"]

    train()  # what libraries keep for themselves falls out
    gc.collect()
    before = torch.cuda.memory_allocated()
    line = train()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    total = torch.cuda.get_device_properties(0).total_memory
    amount, unit = line.removeprefix("at most ").split()[:2]
    assert float(amount) * {"MB": 1e6, "GB": 1e9}[unit] == pytest.approx(before + 500 * MB, rel=0.1)
    assert f"of {torchplug_gpu._size(total)} used on cuda:0" in line


def test_batches_ahead_of_the_device_are_bounded() -> None:
    move, x = _Transfer(torch.device("cuda", 0), None), torch.randn(2048, 2048, device="cuda")
    source = torch.ones(20 * MB // 4).pin_memory()
    torch.mm(x, x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]  # with what is given up and waits for the device
    for _ in range(60):
        batch = move(source)
        for _ in range(5):
            torch.mm(x, x)
        batch += 1
        del batch
    torch.cuda.synchronize()
    product = x.numel() * 4
    used = torch.cuda.memory_stats()["active_bytes.all.peak"] - before
    assert 3 * 20 * MB < used <= (AHEAD + 2) * 20 * MB + product + 2 * MB, "some are ahead, and not too many"


def limited(size: int) -> None:
    """Lets this process have about ``size`` bytes more than it has."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + size) / total))


@pytest.fixture
def one_gb() -> Any:
    limited(1000 * MB)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


class Hungry(Module):
    """A sample takes about 100 kB."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.layers = nn.Sequential(*[part for _ in range(6) for part in (nn.Linear(2048, 2048), nn.ReLU())])

    def train_dataloader(self) -> Any:
        return DataLoader(torch.rand(2**15, 2048), self.batch_size)

    def training_step(self, batch: Any) -> Any:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_the_batch_size_finder_meets_the_end_of_memory_and_what_it_finds_trains(tmp_path: Any, one_gb: None) -> None:
    trainer = Trainer(max_steps=3, root_dir=tmp_path, accelerator="gpu", plugins=[])
    module = Hungry()
    found = scale_batch_size(trainer, module)
    assert any("out of memory" in error for _, error in found.trials)
    assert 64 <= found.size <= 2**14 and module.batch_size == found.size
    trainer.fit(module)
    assert trainer.run.position.step == 3
    module.batch_size = 4 * found.size
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(max_steps=3, root_dir=tmp_path, accelerator="gpu", plugins=[]).fit(module)


def test_out_of_memory_is_said_in_numbers_and_the_device_can_be_used_afterwards(tmp_path: Any, one_gb: None, caplog: Any) -> None:
    with caplog.at_level(logging.ERROR, "torchplug"), pytest.raises(torch.OutOfMemoryError):
        Trainer(max_steps=1, root_dir=tmp_path, accelerator="gpu", plugins=[]).fit(Hungry(2**15))
    (line,) = [each for each in caplog.messages if each.startswith("out of memory on cuda:0: ")]
    assert "reserved" in line and "batch_size_finder" in line
    gc.collect()
    trainer = Trainer(max_steps=2, root_dir=tmp_path, accelerator="gpu", plugins=[])
    trainer.fit(Hungry(2))
    assert trainer.run.position.step == 2


# ---------------------------------------------------------------------- what is set


def test_the_device_and_the_switches_are_put_back(tmp_path: Any) -> None:
    seen: list[Any] = []

    class Looks(Net):
        def training_step(self, batch: Any) -> Any:
            seen.append((torch.cuda.current_device(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().training_step(batch)

    last = torch.cuda.device_count() - 1
    before = torch.cuda.current_device(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    options = {"matmul_precision": "high", "cudnn_tf32": False}
    fit(tmp_path, Looks(), loader(), {"gpu": options}, devices=[last], max_steps=1)
    assert seen == [(last, "high", False)]
    assert before == (torch.cuda.current_device(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)


def test_a_loader_whose_data_are_on_the_device_already_is_used_as_it_is(tmp_path: Any) -> None:
    class Doubles(Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))
            self.seen: list[Tensor] = []

        def training_step(self, batch: Any) -> Any:
            self.seen.append(batch)
            return (batch.float() * self.weight).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data, module = torch.arange(40, device="cuda").view(10, 4), Doubles()
    fit(tmp_path, module, DataLoader(data, 2), max_epochs=1)
    assert torch.equal(torch.cat(module.seen), data)
