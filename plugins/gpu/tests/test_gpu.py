"""What can be promised without a GPU: which device is chosen, what is said where there is none, that switches are put back, and that
copies on a stream of their own come neither too late nor too early, whatever order a device made up for the test works in."""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset

import torchplug_gpu
from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_gpu import AHEAD, Gpu, _choose, _Transfer

NAMES = ["NVIDIA A", "NVIDIA B", "NVIDIA C"]


# ---------------------------------------------------------------------- a device that is made up


class Stream:
    """Work in the order in which it was queued; none of it is done before somebody makes the device work."""

    def __init__(self) -> None:
        self.work: list[tuple[str, Any]] = []
        self.finished = 0

    @property
    def queued(self) -> int:
        return self.finished + len(self.work)

    def wait_event(self, event: Event) -> None:
        self.work.append(("wait", (event, event.recorded)))


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.recorded, self.reached = device, 0, 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        stream.work.append(("record", (self, self.recorded)))

    def synchronize(self) -> None:
        while self.reached < self.recorded:
            assert self.device.step(), "the program waits for ever"


class Device:
    """Two streams, and memory that is used again as the allocator of torch does it.

    Args:
        prefer: which stream goes on as long as it can: "compute" or "copies".
    """

    def __init__(self, prefer: str = "compute") -> None:
        self.compute, self.copies = Stream(), Stream()
        self.current = self.compute
        self.prefer = prefer
        self.buffers: list[Tensor] = []  # everything that was ever allocated
        self.free: list[tuple[Tensor, int]] = []  # with how much of the computing must be finished before it is used again
        self.recorded: set[int] = set()

    def step(self) -> bool:
        """One piece of work on the preferred stream, or on the other one; whether there was any."""
        order = [self.compute, self.copies] if self.prefer == "compute" else [self.copies, self.compute]
        return any(self.advance(stream) for stream in order)

    def advance(self, stream: Stream) -> bool:
        if not stream.work:
            return False
        kind, what = stream.work[0]
        if kind == "wait" and what[0].reached < what[1]:
            return False
        if kind == "record":
            what[0].reached = what[1]
        elif kind == "call":
            what()
        stream.work.pop(0)
        stream.finished += 1
        return True

    def drain(self) -> None:
        while self.step():
            pass
        assert not self.compute.work and not self.copies.work, "a stream waits for ever"

    def queue(self, call: Callable[[], Any]) -> None:
        self.current.work.append(("call", call))

    # what stands in the place of torch

    def copied(self, source: Tensor, *_: Any, **options: Any) -> Tensor:
        """``source.to(device)``: memory at once, its content when the stream comes to it."""
        usable = [each for each in self.free if each[1] <= self.compute.finished]
        if usable:
            buffer = usable[0][0]
            self.free = [each for each in self.free if each[0] is not buffer]
        else:
            buffer = torch.full_like(source, float("nan"))
            self.buffers.append(buffer)
        self.queue(functools.partial(buffer.copy_, source.clone()))
        result = buffer.detach()
        weakref.finalize(result, self.released, buffer)
        self.recorded.discard(buffer.data_ptr())
        return result

    def released(self, buffer: Tensor) -> None:
        self.free.append((buffer, self.compute.queued if buffer.data_ptr() in self.recorded else 0))

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        assert stream is self.compute
        self.recorded.add(tensor.data_ptr())

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def torch(self) -> Any:
        """torch as the plugin sees it."""
        number = [0]
        cuda = SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: len(NAMES),
            get_device_name=NAMES.__getitem__,
            get_device_properties=lambda _: SimpleNamespace(total_memory=80e9),
            current_device=lambda: number[0],
            set_device=functools.partial(number.__setitem__, 0),
            reset_peak_memory_stats=lambda _: None,
            Stream=lambda _: self.copies,
            Event=lambda **_: Event(self),
            current_stream=lambda _: self.current,
            stream=self.stream,
            max_memory_allocated=lambda _: 2_340_000_000,
            max_memory_reserved=lambda _: 3_000_000_000,
            memory_allocated=lambda _: 1_500_000_000,
            memory_reserved=lambda _: 2_500_000_000,
            mem_get_info=lambda _: (500_000_000, 80_000_000_000),
        )

        class Torch:
            def __init__(self) -> None:
                self.cuda = cuda
                self.device = torch.device

            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

        return Torch()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A made-up device for the plugin; copies to it stay in the memory of the host."""
    made_up = Device()
    monkeypatch.setattr(torchplug_gpu, "torch", made_up.torch())
    return made_up


@pytest.fixture
def simulated(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The same, and copies to it are queued."""
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **options: device.copied(tensor, *args, **options))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: device.record_stream(tensor, stream))
    return device


def transfer(dtype: torch.dtype | None = None, kind: str = "cpu") -> _Transfer:
    return _Transfer(torch.device(kind), dtype)


# ---------------------------------------------------------------------- the transfer, in any order of work


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("gpu")


@pytest.mark.parametrize("prefer", ["compute", "copies"])
def test_each_step_computes_with_its_batch_however_far_the_program_is_ahead(simulated: Device, prefer: str) -> None:
    simulated.prefer = prefer
    move, seen = transfer(), []
    for number in range(25):
        x, y = move([torch.full((3,), float(number)), torch.full((3,), -float(number))])
        for part in (x, y):
            inside = part.detach()  # what the kernels of the step have: an address
            for _ in range(3):
                simulated.queue(lambda inside=inside: seen.append(inside[0].item()))
        del x, y, part
    simulated.drain()
    assert seen == [value for number in range(25) for value in [number] * 3 + [-number] * 3]


def test_copies_do_not_wait_for_the_steps_before_and_steps_wait_for_no_later_copy(simulated: Device) -> None:
    move, batches, done = transfer(), [], []
    for number in range(AHEAD):
        batches.append(move(torch.full((3,), float(number))))
        simulated.queue(lambda number=number: done.append(number))
    while simulated.advance(simulated.copies):  # the device is busy with the first step all the time
        pass
    assert done == [] and [each[0].item() for each in batches] == list(range(AHEAD))
    move(torch.zeros(3))
    while simulated.advance(simulated.compute):
        pass
    assert done == list(range(AHEAD))


def test_no_more_batches_than_the_bound_and_the_one_that_comes_lie_in_the_memory_of_the_device(simulated: Device) -> None:
    move = transfer()
    for number in range(50):
        batch = move(torch.full((3,), float(number)))
        simulated.queue(lambda: None)
        del batch
    assert len(simulated.buffers) == AHEAD + 1


def test_a_batch_that_the_user_keeps_is_not_overwritten(simulated: Device) -> None:
    simulated.prefer = "copies"
    move, kept, seen = transfer(), None, []
    for number in range(20):
        batch = move(torch.full((3,), float(number)))
        if kept is not None:  # the batch before is used in this step, and given up right after
            inside = kept.detach()
            simulated.queue(lambda inside=inside: seen.append(inside[0].item()))
        kept = batch
        del batch
    simulated.drain()
    assert seen == list(range(19))


Pair = namedtuple("Pair", "left right")


class Graph:
    """An object that moves itself and knows what to do about streams."""

    def __init__(self, device: Device) -> None:
        self.device, self.moved, self.recorded = device, [], []

    def to(self, target: Any, non_blocking: bool = False) -> Graph:
        self.moved.append((target, self.device.current, non_blocking))
        return self

    def record_stream(self, stream: Stream) -> None:
        self.recorded.append(stream)


class Encoding:
    """An object that moves itself."""

    def __init__(self, device: Device) -> None:
        self.device, self.moved = device, []

    def to(self, target: Any) -> Encoding:
        self.moved.append((target, self.device.current))
        return self


def test_everything_in_a_nested_batch_arrives_on_the_stream_that_is_safe_for_it(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    on: list[tuple[Any, Stream]] = []
    recorded: list[Tensor] = []
    plain = torch.Tensor.to

    def to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        on.append((type(tensor), device.current))
        return plain(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(tensor))
    graph, encoding = Graph(device), Encoding(device)
    batch = {
        "pair": Pair(torch.ones(2), (torch.ones(3), [torch.arange(4)])), "text": ["a", None, 3], "graph": graph, "encoding": encoding,
    }  # fmt: skip
    move = transfer(torch.bfloat16, "meta")
    moved = move(batch)
    assert type(moved["pair"]) is Pair and moved["text"] == ["a", None, 3]
    found = [moved["pair"].left, moved["pair"].right[0], moved["pair"].right[1][0]]
    assert [(each.device.type, each.dtype) for each in found] == [
        ("meta", torch.bfloat16), ("meta", torch.bfloat16), ("meta", torch.int64),
    ]  # fmt: skip
    assert {stream for _, stream in on} == {device.copies} and len(recorded) == 3
    assert graph.moved == [(move.device, device.copies, True)] and graph.recorded == [device.compute]
    assert encoding.moved == [(move.device, device.compute)]
    assert batch["pair"].left.device.type == "cpu", "the loader's own batch is left alone"
    on.clear()
    already, sparse = torch.ones(2, device="meta"), torch.eye(2).to_sparse()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: pytest.fail("not of this tensor"))
    assert move([already])[0].dtype == torch.bfloat16 and move([sparse])[0].is_sparse
    assert {stream for _, stream in on} == {device.compute}
    packed = move(pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]))
    assert type(packed) is PackedSequence and packed.data.device.type == "meta"
    assert {stream for _, stream in on} == {device.compute}


def test_loaders_with_workers_pin_and_others_are_left_alone(device: Device) -> None:
    def prepared(plugin: Gpu, loader: Any) -> Any:
        inside = plugin.prepare_loader()
        next(inside)
        with pytest.raises(StopIteration) as end:
            inside.send(loader)
        return end.value.value

    data, plugin = torch.arange(6), Gpu()
    assert prepared(plugin, before := DataLoader(data, num_workers=2)) is before, "not before there is a device"
    plugin._transfer = transfer()
    loader = DataLoader(data, 2, num_workers=2, persistent_workers=True)
    pinning = prepared(plugin, loader)
    assert type(pinning) is DataLoader and pinning.pin_memory and not loader.pin_memory
    assert pinning.dataset is data and pinning.batch_sampler is loader.batch_sampler and pinning.persistent_workers
    for same in (DataLoader(data), DataLoader(data, num_workers=2, pin_memory=True), [data]):
        assert prepared(plugin, same) is same


# ---------------------------------------------------------------------- runs


class Noisy(Dataset):
    """Samples with noise from the global generator of the process."""

    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.full((4,), float(index)) + torch.rand(4), "y": torch.tensor([float(index)])}


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.batches: list[Tensor] = []

    def training_step(self, batch: Any) -> Any:
        self.batches.append(batch["x"].clone())
        return (self.layers(batch["x"]) - batch["y"]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


class Saves:
    """Saves after a batch of the run and asks to stop."""

    def __init__(self, path: Any, batch: int) -> None:
        self.path, self.batch = path, batch

    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        if run.position.micro_step == self.batch:
            run.save_checkpoint(self.path)
            run.request_stop("enough")


class Kept:
    """Which device a run used, and what it saw of torch's switches."""

    @hookimpl
    def on_train_start(self, run: Any) -> None:
        self.device = run.device
        self.switches = switches()


def switches() -> tuple[Any, ...]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torchplug_gpu.torch.cuda.current_device()


def fit(path: Any, *plugins: Any, module: Any = None, ckpt_path: Any = None, **options: Any) -> tuple[Trainer, Any]:
    module = Net() if module is None else module
    trainer = Trainer(**{"max_epochs": 2, "seed": 5, "root_dir": path, "accelerator": "gpu", "plugins": list(plugins), **options})
    trainer.fit(module, DataLoader(Noisy(), 2, shuffle=True), ckpt_path=ckpt_path)
    return trainer, module


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture
def on_host(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A made-up device whose memory is that of the host, so that whole runs are possible; its queues have the real copies in them."""

    class OnHost:
        def __new__(cls, *_: Any) -> Any:
            return torch.device("cpu")

    monkeypatch.setattr(torchplug_gpu.torch, "device", OnHost)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    return device


def test_a_run_with_prefetch_has_the_batches_and_weights_of_one_without(tmp_path: Any, on_host: Device) -> None:
    _, plain = fit(tmp_path, accelerator="cpu")
    _, prefetched = fit(tmp_path)
    assert on_host.copies.queued == 14, "each of 14 batches was brought over once"
    assert same(plain, prefetched)
    assert all(map(torch.equal, plain.batches, prefetched.batches)) and len(plain.batches) == len(prefetched.batches) == 14


@pytest.mark.parametrize("batch", [1, 3, 7, 9, 13])
def test_a_run_that_goes_on_is_the_one_that_was_never_stopped(tmp_path: Any, on_host: Device, batch: int) -> None:
    _, whole = fit(tmp_path)
    file = tmp_path / "saved.safetensors"
    _, first = fit(tmp_path, Saves(file, batch))
    assert len(first.batches) == batch
    _, second = fit(tmp_path, ckpt_path=file)
    assert same(whole, second)
    assert all(map(torch.equal, whole.batches, [*first.batches, *second.batches]))
    assert len(first.batches) + len(second.batches) == 14


def test_bf16_true_reaches_batches_as_without_the_plugin(tmp_path: Any, on_host: Device) -> None:
    _, plain = fit(tmp_path, accelerator="cpu", precision="bf16-true")
    _, prefetched = fit(tmp_path, precision="bf16-true")
    assert {each.dtype for each in prefetched.batches} == {torch.bfloat16} and same(plain, prefetched)


def test_without_prefetch_core_moves_batches(tmp_path: Any, on_host: Device) -> None:
    _, plain = fit(tmp_path, accelerator="cpu")
    _, module = fit(tmp_path, {"gpu": {"prefetch": False}})
    assert same(plain, module) and on_host.copies.queued == 0


# ---------------------------------------------------------------------- switches, what is said, memory


def test_switches_are_set_while_the_run_lasts_and_put_back_afterwards(tmp_path: Any, on_host: Device) -> None:
    before, kept = switches(), Kept()
    assert before == ("highest", True, 0)
    fit(tmp_path, {"gpu": {"matmul_precision": "medium", "cudnn_tf32": False}}, kept, devices=[2])
    assert kept.switches == ("medium", False, 2) and switches() == before
    fit(tmp_path, kept)
    assert kept.switches == before == switches(), "None leaves torch's own setting"


def test_switches_are_put_back_after_an_error(tmp_path: Any, on_host: Device) -> None:
    class Fails(Net):
        def training_step(self, batch: Any) -> Any:
            raise ArithmeticError("in the step")

    before = switches()
    with pytest.raises(ArithmeticError):
        fit(tmp_path, {"gpu": {"matmul_precision": "high", "cudnn_tf32": False}}, module=Fails(), devices=[1])
    assert switches() == before


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"devices": [2]}, "uses cuda:2 (NVIDIA C, 80.0 GB)"),
        ({"devices": 1}, "uses cuda:0 (NVIDIA A, 80.0 GB), 1 of 3; strategy='ddp', devices='auto' uses all"),
        ({"devices": "auto"}, "uses cuda:0 (NVIDIA A, 80.0 GB), 1 of 3; strategy='ddp', devices='auto' uses all"),
    ],
)
def test_one_line_says_which_device_is_used(tmp_path: Any, on_host: Device, caplog: Any, options: Any, line: str) -> None:
    with caplog.at_level(logging.INFO, "torchplug"):
        fit(tmp_path, **options)
    assert [each for each in caplog.messages if "cuda" in each or "GPU" in each] == [line]


def run_of(plugin: Gpu, **options: Any) -> Any:
    """A run as far as the plugin looks at one."""
    defaults = {"accelerator": "gpu", "devices": 1, "strategy": "auto", "precision": "32"}
    run = SimpleNamespace(options=SimpleNamespace(**{**defaults, **options}), device=torch.device("cpu"), report={}, said=[])
    run.say_once = lambda text, level: run.said.append(text)
    run.name_of = lambda _: "gpu"
    return run


def test_the_device_is_in_the_run_and_the_report_says_how_much_memory_was_used(device: Device) -> None:
    plugin = Gpu()
    run = run_of(plugin, devices=[1])
    plugin.setup(run)
    assert run.device == torch.device("cuda", 1)
    plugin.teardown(run)
    assert run.report == {"gpu": "at most 2.3 GB of 80.0 GB used on cuda:1, 3.0 GB reserved"}
    run.report.clear()
    plugin.teardown(run)  # of a run that ended before its set-up
    assert run.report == {}


def test_with_a_strategy_nothing_is_said_of_devices_that_other_processes_use(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    plugin = Gpu()
    run = run_of(plugin, devices="auto", strategy="ddp")
    plugin.setup(run)
    assert run.device == torch.device("cuda", 2) and run.said == ["uses cuda:2 (NVIDIA C, 80.0 GB)"]
    plugin.teardown(run)


def test_out_of_memory_is_one_line_with_numbers_and_what_to_do(device: Device, caplog: Any) -> None:
    plugin = Gpu()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    plugin.on_out_of_memory(error)  # no device
    plugin.setup(run_of(plugin))
    plugin.on_out_of_memory(MemoryError())  # of the host
    assert caplog.messages == []
    plugin.on_out_of_memory(error)
    (line,) = caplog.messages
    assert line.startswith("out of memory on cuda:0: 1.5 GB allocated (at most 2.3 GB), 2.5 GB reserved, 500 MB free of 80.0 GB. ")
    assert "batch_size_finder" in line and "accumulate_grad_batches" in line


def test_mps_is_used_where_there_is_no_cuda(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    torchplug_gpu.torch.cuda.is_available = lambda: False
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    plugin = Gpu()
    run = run_of(plugin)
    plugin.setup(run)
    assert run.device == torch.device("mps") and run.said == ["uses the GPU through MPS"]
    assert plugin.move_batch([torch.ones(1)]) is None, "core brings batches there"
    plugin.teardown(run)
    assert run.report == {}
    with pytest.raises(ValueError, match=r"devices=\[1\]: there is no device 1; there is 0 \(MPS\)"):
        plugin.setup(run_of(plugin, devices=[1]))


# ---------------------------------------------------------------------- which device


@pytest.mark.parametrize(
    ("devices", "rank", "number"),
    [
        (1, None, 0),
        (3, None, 0),
        ("auto", None, 0),
        ([2], None, 2),
        ([2, 0], None, 2),
        ([2, 0], 1, 0),
        (1, 2, 2),
        (3, 1, 1),
        ("auto", 2, 2),
    ],
)
def test_a_process_takes_the_device_of_its_local_rank(devices: Any, rank: int | None, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert _choose(devices, NAMES) == number


THERE = r"there are 0 \(NVIDIA A\), 1 \(NVIDIA B\), 2 \(NVIDIA C\)"


@pytest.mark.parametrize(
    ("devices", "rank", "message"),
    [
        ([3], 0, rf"devices=\[3\]: there is no device 3; {THERE}"),
        ([0, 7], 0, rf"devices=\[0, 7\]: there is no device 7; {THERE}"),
        (4, 0, rf"devices=4: that many there are not; {THERE}"),
        ([1], 1, rf"devices=\[1\]: there is none for the process with LOCAL_RANK=1; {THERE}"),
        ("auto", 3, rf"devices='auto': there is none for the process with LOCAL_RANK=3; {THERE}"),
    ],
)
def test_a_device_that_is_not_there_is_an_error_that_names_those_there(
    devices: Any, rank: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(ValueError, match=f"^{message}, as CUDA_VISIBLE_DEVICES='4,5,6' leaves them$"):
        _choose(devices, NAMES)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ValueError, match=f"^{message}$"):
        _choose(devices, NAMES)


# ---------------------------------------------------------------------- no GPU


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, on a machine with or without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in torchplug_gpu.VISIBLE:
        monkeypatch.delenv(name, raising=False)


def built_without(monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, name, None)
    return r"torch \S+ is built without CUDA and ROCm \(get another build: https://pytorch.org/\S+\)"


def without_driver(monkeypatch: pytest.MonkeyPatch) -> str:
    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that\nit is there")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    return r"Found no NVIDIA driver on your system\. Please check that"


def hidden(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return r"the environment variable CUDA_VISIBLE_DEVICES='' hides every device"


def misnumbered(monkeypatch: pytest.MonkeyPatch) -> str:
    def init() -> None:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    return r"No CUDA GPUs are available, with CUDA_VISIBLE_DEVICES='9'"


@pytest.mark.parametrize("why", [built_without, without_driver, hidden, misnumbered])
def test_without_a_gpu_accelerator_gpu_is_an_error_that_says_what_torch_sees(
    tmp_path: Any, nothing: None, why: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason, module = why(monkeypatch), Net()
    before = copy.deepcopy(module)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    message = f"^there is no GPU that can be used: {reason}; accelerator='cpu' trains on the CPU(\n|$)"
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path, module=module)
    assert same(module, before) and module.batches == []


def test_the_error_names_the_plugin(tmp_path: Any, nothing: None, caplog: Any) -> None:
    with pytest.raises(RuntimeError, match="there is no GPU that can be used") as error:
        fit(tmp_path)
    assert "raised by plugin 'gpu' (torchplug-gpu 0.1.0) in setup, rank 0" in error.value.__notes__


def test_the_plugin_named_beside_accelerator_auto_says_that_the_cpu_is_used(tmp_path: Any, nothing: None, caplog: Any) -> None:
    _, plain = fit(tmp_path, accelerator="cpu")
    trainer, module = fit(tmp_path, "gpu", accelerator="auto")
    (line,) = [record for record in caplog.records if "GPU" in record.message]
    assert line.levelname == "WARNING" and line.message.endswith("; the CPU is used")
    assert same(plain, module) and trainer.run.device.type == "cpu" and "gpu" not in trainer.run.report


def test_with_accelerator_cpu_the_plugin_does_nothing(tmp_path: Any, on_host: Device, caplog: Any) -> None:
    before, kept = switches(), Kept()
    trainer, _ = fit(tmp_path, {"gpu": {"matmul_precision": "medium"}}, kept, accelerator="cpu")
    assert kept.switches == before and on_host.copies.queued == 0 and "gpu" not in trainer.run.report


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matmul_precision": "low"}, "matmul_precision must be 'highest', 'high', 'medium' or None, got 'low'"),
        ({"cudnn_tf32": 1}, "cudnn_tf32 must be True, False or None, got 1"),
        ({"prefetch": None}, "prefetch must be True or False, got None"),
        ({"prefetc": True}, "no option 'prefetc', did you mean 'prefetch'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, message: str) -> None:
    with pytest.raises(PluginError, match=rf"plugin 'gpu' \(torchplug-gpu 0.1.0\): {message}"):
        Trainer(max_epochs=1, plugins=[{"gpu": options}], accelerator="cpu")


def test_an_accelerator_that_is_also_named_with_options_is_there_once() -> None:
    trainer = Trainer(max_epochs=1, plugins=[{"gpu": {"prefetch": False}}], accelerator="gpu")
    assert list(trainer.enabled) == ["gpu"] and trainer.enabled["gpu"].prefetch is False
