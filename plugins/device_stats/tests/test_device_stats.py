"""What the device statistics say, against what this process is made to use, and against a device made up for the test."""

import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import torchplug_device_stats
from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_device_stats import DeviceStats

CPU = {"cpu_percent", "cpu_vm_percent", "cpu_swap_percent", "process_cpu_percent", "process_rss_mb"}


class Records:
    """Keeps what loggers get: (step, metrics)."""

    def __init__(self) -> None:
        self.all: list[tuple[int, dict[str, float]]] = []

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.all.append((step, {name.removeprefix("device_stats/"): value for name, value in metrics.items()}))


class Net(Module):
    def __init__(self, work: Any = lambda step: None) -> None:
        super().__init__()
        self.layer, self.work = nn.Linear(2, 1), work

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.work(batch_idx + 1)
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(path: Any, module: Any, *plugins: Any, **options: Any) -> list[tuple[int, dict[str, float]]]:
    records = Records()
    defaults = {"max_epochs": 1, "log_every_n_steps": 2, "root_dir": path}
    Trainer(**{**defaults, **options}, plugins=[*plugins, records]).fit(module, [torch.ones(1, 2)] * 6)
    return records.all


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("device_stats")


def test_it_samples_at_logging_steps_what_psutil_says(tmp_path: Any) -> None:
    records = fit(tmp_path, Net(), DeviceStats())
    assert [step for step, _ in records] == [2, 4, 6]
    memory, rss = psutil.virtual_memory(), psutil.Process().memory_info().rss / 1e6
    for _, sample in records:
        assert set(sample) == CPU
        assert sample["process_rss_mb"] == pytest.approx(rss, rel=0.2)
        assert sample["cpu_vm_percent"] == pytest.approx(memory.percent, abs=10)
        assert 0 <= sample["cpu_percent"] <= 100 and 0 <= sample["cpu_swap_percent"] <= 100


def test_memory_that_the_process_takes_is_seen(tmp_path: Any) -> None:
    held = []

    def work(step: int) -> None:
        if step == 3:
            held.append(torch.ones(50_000_000))  # 200 MB

    (_, before), (_, after), (_, still) = fit(tmp_path, Net(work), DeviceStats())
    assert after["process_rss_mb"] - before["process_rss_mb"] == pytest.approx(200, abs=20)
    assert still["process_rss_mb"] - before["process_rss_mb"] == pytest.approx(200, abs=20)


def test_load_is_that_since_the_last_sample(tmp_path: Any) -> None:
    def work(step: int) -> None:
        used, until = time.process_time(), time.perf_counter() + 0.15
        while step in (3, 4) and time.process_time() - used < 0.15:
            pass
        while time.perf_counter() < until and step not in (3, 4):
            time.sleep(0.01)

    (_, idle), (_, busy), (_, again) = fit(tmp_path, Net(work), DeviceStats())
    assert busy["process_cpu_percent"] > 2 * max(idle["process_cpu_percent"], again["process_cpu_percent"])


def test_nothing_is_asked_between_logging_steps(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(name: str, value: Any) -> Any:
        return lambda: asked.append(name) or value

    process = SimpleNamespace(cpu_percent=answer("process", 50.0), memory_info=answer("rss", SimpleNamespace(rss=3e6)))
    monkeypatch.setattr(
        torchplug_device_stats, "psutil",
        SimpleNamespace(
            Process=lambda: process,
            cpu_percent=answer("cpu", 25.0),
            virtual_memory=answer("vm", SimpleNamespace(percent=60.0)),
            swap_memory=answer("swap", SimpleNamespace(percent=1.0)),
        ),
    )  # fmt: skip
    records = fit(tmp_path, Net(), DeviceStats(), log_every_n_steps=3)
    expected = {"cpu_percent": 25.0, "cpu_vm_percent": 60.0, "cpu_swap_percent": 1.0, "process_cpu_percent": 50.0, "process_rss_mb": 3.0}
    assert records == [(3, expected), (6, expected)]
    assert asked == ["cpu", "process"] + ["cpu", "vm", "swap", "process", "rss"] * 2

    class Turns(Net):
        """Both optimizers step in every batch."""

        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([parameter], lr=0.1) for parameter in self.parameters()]

    asked.clear()
    assert fit(tmp_path, Turns(), DeviceStats(), log_every_n_steps=3) == records
    assert asked == ["cpu", "process"] + ["cpu", "vm", "swap", "process", "rss"] * 2


def test_a_cuda_device_adds_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    numbers = {"mem_get_info": (6_000_000, 8_000_000), "memory_allocated": 1_500_000, "memory_reserved": 2_000_000,
               "max_memory_allocated": 1_750_000}  # fmt: skip
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda asked, value=value: value if asked == device else None)
    logged: dict[str, float] = {}
    run: Any = SimpleNamespace(device=device, position=SimpleNamespace(step=4), options=SimpleNamespace(log_every_n_steps=2))
    run.log = logged.__setitem__
    plugin = DeviceStats(cpu_stats=False)
    plugin.on_after_optimizer_step(run)
    assert logged == {
        "device_stats/cuda_allocated_mb": 1.5,
        "device_stats/cuda_reserved_mb": 2.0,
        "device_stats/cuda_max_allocated_mb": 1.75,
        "device_stats/cuda_used_percent": 25.0,
    }


def test_an_instance_in_two_fits_begins_anew(tmp_path: Any) -> None:
    plugin = DeviceStats()
    for _ in range(2):
        assert [step for step, _ in fit(tmp_path, Net(), plugin, log_every_n_steps=6)] == [6]


def test_without_cpu_stats_and_without_cuda_there_is_nothing(tmp_path: Any) -> None:
    assert fit(tmp_path, Net(), DeviceStats(cpu_stats=False)) == []


def test_a_failing_sample_switches_it_off_and_training_goes_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fail() -> Any:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(torchplug_device_stats.psutil, "virtual_memory", fail)
    assert fit(tmp_path, Net(), DeviceStats()) == []
    assert "plugin 'device_stats' (torchplug-device-stats 0.1.0) failed in on_after_optimizer_step and is switched off" in caplog.text


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_options_that_cannot_be_are_refused(value: Any) -> None:
    with pytest.raises(PluginError, match=r"plugin 'device_stats' .*: cpu_stats must be True or False, got "):
        Trainer(max_epochs=1, plugins=[{"device_stats": {"cpu_stats": value}}])
