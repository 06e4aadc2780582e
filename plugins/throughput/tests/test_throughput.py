"""What the rates are, on a clock that only moves when the test says so, and against operations counted by hand."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchplug_throughput
from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_throughput import Throughput


class Clock:
    """Time as the test tells it, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(torchplug_throughput, "time", made)
    return made


class Records:
    """Keeps what loggers get: (step, metrics)."""

    def __init__(self) -> None:
        self.all: list[tuple[int, dict[str, float]]] = []

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        mine = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("throughput/")}
        if mine:
            self.all.append((step, mine))

    def of(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.all if name in metrics}


class Net(Module):
    """Takes ``seconds[i]`` for training batch i of the run, and 100 s for a validation batch."""

    def __init__(self, clock: Clock | None = None, seconds: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
        self.clock, self.seconds, self.done = clock, seconds or (lambda i: 1.0), 0

    def _loss(self, batch: Any) -> Tensor:
        return self.net(batch["x"] if isinstance(batch, dict) else batch).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.clock is not None:
            self.clock.now += self.seconds(self.done)
        self.done += 1
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.clock is not None:
            self.clock.now += 100.0
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 3, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]


def fit(path: Any, module: Any, data: Any, *plugins: Any, val: Any = None, **options: Any) -> Records:
    records = Records()
    defaults = {"max_epochs": 1, "log_every_n_steps": 1, "root_dir": path, "num_sanity_val_steps": 0}
    Trainer(**{**defaults, **options}, plugins=[*plugins, records]).fit(module, data, val)
    return records


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("throughput", window_size=2, peak_flops=1e12)


def test_rates_are_samples_and_steps_by_the_time_since_the_first_batch(tmp_path: Any, clock: Clock) -> None:
    module = Net(clock, lambda i: 50.0 if i == 0 else 2.0)
    records = fit(tmp_path, module, batches(4, 4, 4, 6), Throughput())
    assert records.all == [
        (2, {"samples_per_sec": 2.0, "steps_per_sec": 0.5}),
        (3, {"samples_per_sec": 2.0, "steps_per_sec": 0.5}),
        (4, {"samples_per_sec": 14 / 6, "steps_per_sec": 0.5}),
    ]


def test_the_window_slides(tmp_path: Any, clock: Clock) -> None:
    module = Net(clock, lambda i: float(i))  # batch i, counted from 0, takes i seconds
    records = fit(tmp_path, module, batches(*[2] * 8), Throughput(window_size=3))
    assert records.of("steps_per_sec") == {
        2: 1 / 1, 3: 2 / 3, 4: 3 / 6, 5: 3 / 9, 6: 3 / 12, 7: 3 / 15, 8: 3 / 18
    }  # fmt: skip


def test_a_window_begins_at_a_logging_step(tmp_path: Any, clock: Clock) -> None:
    module = Net(clock, lambda i: float(i))
    records = fit(tmp_path, module, batches(*[2] * 12), Throughput(window_size=4), log_every_n_steps=3)
    # step s is batch s - 1: steps 2 and 3 take 1 + 2 s, and so on
    assert records.of("steps_per_sec") == {
        3: 2 / 3, 6: 5 / sum(range(1, 6)), 9: 6 / sum(range(3, 9)), 12: 6 / sum(range(6, 12)),
    }  # fmt: skip


def test_accumulated_batches_are_one_step(tmp_path: Any, clock: Clock) -> None:
    records = fit(tmp_path, Net(clock), batches(*[2] * 6), Throughput(), accumulate_grad_batches=2)
    assert records.all == [(step, {"samples_per_sec": 2.0, "steps_per_sec": 0.5}) for step in (2, 3)]


def test_a_step_of_manual_optimization_may_take_several_batches(tmp_path: Any, clock: Clock) -> None:
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            if batch_idx % 3 == 2:
                self.optimizers().step()

    records = fit(tmp_path, Manual(clock), batches(*[2] * 9), Throughput(peak_flops=1.0))
    rates = {"samples_per_sec": 2.0, "steps_per_sec": 1 / 3, "flops_per_sec": operations(2), "mfu": operations(2)}
    assert records.all == [(step, pytest.approx(rates)) for step in (2, 3)]


def test_waiting_for_data_counts(tmp_path: Any, clock: Clock) -> None:
    class Slow:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Any:
            for batch in batches(2, 2, 2, 2):
                clock.now += 3.0
                yield batch

    records = fit(tmp_path, Net(clock), Slow(), Throughput())
    assert records.of("samples_per_sec") == {2: 0.5, 3: 0.5, 4: 0.5}


@pytest.mark.parametrize("every", [0.5, 1, 1.0])
def test_validation_and_what_is_between_epochs_are_no_training_time(tmp_path: Any, clock: Clock, every: Any) -> None:
    class Waits:
        """Takes its time wherever training waits for it."""

        @hookimpl
        def on_validation_end(self) -> None:
            clock.now += 10.0

        @hookimpl
        def on_train_epoch_end(self) -> None:
            clock.now += 20.0

        @hookimpl
        def on_train_epoch_start(self) -> None:
            clock.now += 40.0

        @hookimpl(wrapper=True)
        def evaluate(self) -> Any:
            clock.now += 5.0
            result = yield
            clock.now += 5.0
            return result

    records = fit(tmp_path, Net(clock), batches(*[2] * 4), Waits(), Throughput(), val=batches(2, 2), max_epochs=3, val_check_interval=every)
    assert set(records.of("samples_per_sec").values()) == {2.0}
    assert sorted(records.of("samples_per_sec")) == list(range(2, 13))


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
def test_a_checkpoint_that_training_waits_for_is_no_training_time(tmp_path: Any, clock: Clock, hook: str) -> None:
    def ask(self: Any, run: Any) -> None:
        clock.now += 50.0 if hook == "on_train_epoch_end" else 0.0
        run.save_checkpoint(tmp_path / "it.safetensors")

    def save(self: Any, path: Any) -> Any:
        clock.now += 30.0
        return path

    saves = type("Saves", (), {hook: hookimpl(ask), "save_checkpoint": hookimpl(save)})()
    records = fit(tmp_path, Net(clock), batches(*[2] * 3), saves, Throughput(), val=batches(2), max_epochs=2)
    assert set(records.of("samples_per_sec").values()) == {2.0}


def test_a_checkpoint_that_another_thread_writes_does_not_stop_the_clock(tmp_path: Any, clock: Clock) -> None:
    from concurrent.futures import ThreadPoolExecutor

    class Writes:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            def write() -> None:
                run.hooks.save_checkpoint(run, tmp_path / "it", {})

            with ThreadPoolExecutor(1) as pool:
                pool.submit(write).result()

        @hookimpl
        def save_checkpoint(self, path: Any) -> Any:
            clock.now += 1.0
            return path

    records = fit(tmp_path, Net(clock), batches(*[2] * 4), Writes(), Throughput())
    assert set(records.of("samples_per_sec").values()) == {1.0}


class Bag:
    """A batch with attributes."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.count = ids, 7

    def to(self, device: Any) -> "Bag":
        return self


TOKENS: dict[str, tuple[Any, Any, list[int]]] = {
    "a key": ("ids", lambda i: {"x": torch.ones(2, 3), "ids": torch.zeros(2, i + 1)}, [2, 4, 6, 8]),
    "a number under a key": ("n", lambda i: {"x": torch.ones(2, 3), "n": 10 + i}, [10, 11, 12, 13]),
    "a number in a tensor": ("n", lambda i: {"x": torch.ones(2, 3), "n": torch.tensor(10 + i)}, [10, 11, 12, 13]),
    "a function": (lambda batch: batch["x"].numel(), lambda i: {"x": torch.ones(2 + i, 3)}, [6, 9, 12, 15]),
    "a function that gives a tensor": (lambda batch: batch["x"].sum(), lambda i: {"x": torch.full((2, 3), float(i))}, [0, 6, 12, 18]),
    "an attribute": ("ids", lambda i: Bag(torch.zeros(i + 1, 2)), [2, 4, 6, 8]),
    "an attribute that is a number": ("count", lambda i: Bag(torch.zeros(1, 2)), [7, 7, 7, 7]),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_are_counted(tmp_path: Any, clock: Clock, name: str) -> None:
    tokens, make, counts = TOKENS[name]

    class Any_(Net):
        def _loss(self, batch: Any) -> Tensor:
            return self.net(torch.ones(4, 3)).square().mean()

    records = fit(tmp_path, Any_(clock), [make(i) for i in range(4)], Throughput(tokens=tokens))
    assert records.of("tokens_per_sec") == {2: counts[1], 3: sum(counts[1:3]) / 2, 4: sum(counts[1:]) / 3}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bfloat16, torch.float16, torch.bool])
def test_counts_of_few_bits_are_added_up_in_more(tmp_path: Any, clock: Clock, dtype: torch.dtype) -> None:
    count = torch.tensor(200).to(dtype)  # 1 as a bool
    records = fit(tmp_path, Net(clock), batches(*[2] * 800), Throughput(tokens=lambda batch: count), log_every_n_steps=400)
    assert records.of("tokens_per_sec") == {400: float(count), 800: float(count)}


def test_a_long_run_still_counts_single_tokens(tmp_path: Any, clock: Clock) -> None:
    counts = iter([2.0**24, 2.0**24, 1.0, 1.0, 1.0])
    records = fit(tmp_path, Net(clock), batches(*[2] * 5), Throughput(tokens=lambda batch: torch.tensor(next(counts)), window_size=1))
    assert records.of("tokens_per_sec") == {2: 2.0**24, 3: 1.0, 4: 1.0, 5: 1.0}


def test_tokens_in_a_tensor_are_read_at_logging_steps_alone(tmp_path: Any, clock: Clock) -> None:
    read: list[int] = []
    records = fit(tmp_path, Net(clock), batches(*[2] * 8), Throughput(tokens=lambda batch: _Sum(read)), log_every_n_steps=4)
    assert len(read) == 3  # the first batch, steps 4 and 8
    assert records.of("tokens_per_sec") == {4: 1.0, 8: 1.0}


class _Sum:
    """A number that notes when it is read."""

    def __init__(self, read: list[int], value: int = 1) -> None:
        self.read, self.value = read, value

    def __radd__(self, other: int) -> "_Sum":
        return _Sum(self.read, self.value + other)

    def __add__(self, other: "_Sum") -> "_Sum":
        return _Sum(self.read, self.value + other.value)

    def __float__(self) -> float:
        self.read.append(1)
        return float(self.value)


def test_a_batch_without_the_key_is_an_error_that_names_it(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="tokens='ids' is no key or attribute of the batch, a Tensor; give a function of it"):
        fit(tmp_path, Net(), batches(2), Throughput(tokens="ids"))


# ---------------------------------------------------------------------- operations


def operations(size: int) -> int:
    """Forward 2 * n * in * out for each product; backward the same for the weights, and for the input of the second."""
    return size * 2 * (3 * 5 * 2 + 5 * 2 * 3)


def test_mfu_is_the_share_of_the_peak(tmp_path: Any, clock: Clock) -> None:
    records = fit(tmp_path, Net(clock, lambda i: 2.0), batches(4, 4, 4, 8), Throughput(peak_flops=1000.0))
    flops = {2: operations(4) / 2, 3: operations(4) / 2, 4: operations(16) / 6}
    assert records.of("flops_per_sec") == pytest.approx(flops)
    assert records.of("mfu") == pytest.approx({step: value / 1000 for step, value in flops.items()})


def test_batches_without_a_size_count_as_equal(tmp_path: Any, clock: Clock) -> None:
    class Fixed(Net):
        def _loss(self, batch: Any) -> Tensor:
            return self.net(torch.ones(4, 3)).square().mean()

    records = fit(tmp_path, Fixed(clock), ["a", "b", "c"], Throughput(peak_flops=1000.0))
    assert records.all == [(step, {"steps_per_sec": 1.0, "flops_per_sec": operations(4), "mfu": operations(4) / 1000}) for step in (2, 3)]


def test_operations_of_a_window_of_several_batches(tmp_path: Any, clock: Clock) -> None:
    records = fit(tmp_path, Net(clock), batches(*[4] * 6), Throughput(peak_flops=1e3), accumulate_grad_batches=3)
    assert records.of("flops_per_sec") == pytest.approx({2: operations(4)})


def test_a_first_batch_that_is_skipped_is_not_the_measure(tmp_path: Any, clock: Clock) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx > 1 else None

    records = fit(tmp_path, Skips(clock), batches(*[4] * 5), Throughput(peak_flops=1.0))
    assert records.of("mfu") == pytest.approx({2: operations(4), 3: operations(4)})


def test_a_module_without_operations_that_can_be_counted_logs_no_mfu_and_says_so(tmp_path: Any, clock: Clock, caplog: Any) -> None:
    class Shift(Net):
        def __init__(self, clock: Clock) -> None:
            super().__init__(clock)
            self.net = nn.Sequential()
            self.by = nn.Parameter(torch.zeros(3))

        def _loss(self, batch: Any) -> Tensor:
            return (batch + self.by).square().mean()

    records = fit(tmp_path, Shift(clock), batches(2, 2), Throughput(peak_flops=1.0))
    assert records.all == [(2, {"samples_per_sec": 2.0, "steps_per_sec": 1.0})]
    assert "plugin 'throughput': the first batch has no operation that torch can count, so mfu is not logged" in caplog.text


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_measuring_changes_no_bit_of_the_training(tmp_path: Any, precision: str) -> None:
    def trained(*plugins: Any) -> list[Tensor]:
        torch.manual_seed(5)
        module = Net()
        fit(tmp_path, module, batches(*[4] * 5), *plugins, precision=precision, log_every_n_steps=2)
        return [*module.state_dict().values(), torch.get_rng_state()]

    bare, watched = trained(), trained(Throughput(peak_flops=1e9, tokens=len))
    assert all(torch.equal(one, two) for one, two in zip(bare, watched, strict=True))


def test_counting_ends_with_the_first_batch_also_when_it_fails(tmp_path: Any) -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as modes  # torch has no public way to ask

    during: list[list[int]] = []
    fails: list[bool] = []

    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            during[-1].append(len(modes()))
            if fails:
                raise ZeroDivisionError("in the first batch")
            return super().training_step(batch, batch_idx)

    during.append([])
    fit(tmp_path, Fails(), batches(2, 2, 2), Throughput(peak_flops=1.0))
    assert during == [[1, 0, 0]] and modes() == []
    during.append([])
    fit(tmp_path, Fails(), batches(2, 2), Throughput())  # nothing is counted without peak_flops
    assert during.pop() == [0, 0]
    during.append([])
    fails.append(True)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Fails(), batches(2, 2, 2), Throughput(peak_flops=1.0))
    assert during[1] == [1] and modes() == []


def test_a_second_fit_and_a_run_that_goes_on_measure_anew(tmp_path: Any, clock: Clock) -> None:
    plugin = Throughput()
    for seconds in (2.0, 4.0):
        records = fit(tmp_path, Net(clock, lambda i, s=seconds: s), batches(2, 2, 2), plugin)
        assert records.of("samples_per_sec") == {2: 2 / seconds, 3: 2 / seconds}

    class Saves:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            run.save_checkpoint(tmp_path / f"{run.position.step}.safetensors")

    class Waits(Saves):
        @hookimpl
        def save_checkpoint(self, path: Any) -> Any:
            clock.now += 30.0
            return path

    fit(tmp_path, Net(clock), batches(*[2] * 6), Saves(), plugin)
    clock.now += 1000.0
    records = Records()
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, root_dir=tmp_path, plugins=[plugin, Waits(), records])
    trainer.fit(Net(clock, lambda i: 5.0), batches(*[2] * 6), ckpt_path=tmp_path / "3.safetensors")
    assert records.of("samples_per_sec") == {5: 0.4, 6: 0.4}


def test_what_a_cuda_device_still_has_to_do_counts(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    device, plugin = torch.device("cuda", 1), Throughput()

    def wait(asked: Any) -> None:
        clock.now += 5.0 if asked == device else 100.0

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    run: Any = SimpleNamespace(device=device, position=SimpleNamespace(step=0, micro_step=0), logged={}, world_size=1)
    run.metrics = SimpleNamespace(size=16)
    run.options, run.log = SimpleNamespace(log_every_n_steps=1), run.logged.__setitem__
    plugin.on_train_start(run)
    for step in (1, 2):
        clock.now += 3.0
        run.position.step = step
        plugin.on_train_batch_end(run, None, None)
    assert run.logged == {"throughput/samples_per_sec": 2.0, "throughput/steps_per_sec": 1 / 8}
    plugin.on_train_epoch_end(run)  # 5 s of training are still to be done
    for _ in plugin.on_train_epoch_start():
        clock.now += 1000.0
    clock.now += 3.0
    run.position.step = 3
    plugin.on_train_batch_end(run, None, None)
    assert run.logged["throughput/samples_per_sec"] == 32 / (8 + 5 + 8)


def test_on_a_real_clock_it_is_about_the_time_that_steps_take(tmp_path: Any) -> None:
    real = SimpleNamespace(now=0.0)

    class Sleeps(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.01)
            return super().training_step(batch, batch_idx)

    records = fit(tmp_path, Sleeps(real), batches(*[2] * 20), Throughput(), log_every_n_steps=20)
    assert 1 < records.of("steps_per_sec")[20] <= 100  # a sleep takes at least as long as it was told to


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_size": 0}, "window_size must be a whole number of steps, at least 1, got 0"),
        ({"window_size": 2.0}, "window_size must be a whole number of steps, at least 1, got 2.0"),
        ({"tokens": 3}, "tokens must be a function of the batch, or the name of a key or attribute of it, got 3"),
        ({"tokens": ""}, "tokens must be a function of the batch, or the name of a key or attribute of it, got ''"),
        ({"peak_flops": 0}, "peak_flops must be a number of operations per second above 0, or None, got 0"),
        ({"peak_flops": "1e15"}, "peak_flops must be a number of operations per second above 0, or None, got '1e15'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, words: str) -> None:
    with pytest.raises(PluginError, match=f"plugin 'throughput' .torchplug-throughput 0.1.0.: {words}"):
        Trainer(max_epochs=1, plugins=[{"throughput": options}])
