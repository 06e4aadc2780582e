"""A run that Ray does with two workers on this machine, and what comes back."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, PluginError, Trainer, checkpoint, hookimpl, seed_everything
from torchplug.distributed import RankFailed
from torchplug.testing import check_plugin


def data(samples: int) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True))


def a_module(fails: bool = False) -> Module:
    """Of a class that no other process can import."""

    class Net(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
            self.ranks = 0

        def training_step(self, batch: Any) -> Any:
            if fails and self.run.rank == 1:
                raise KeyError("broken on rank 1")
            self.ranks = self.run.world_size
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 0.01)

    return Net()


class Remembers:
    """A plugin whose attributes come back."""

    def __init__(self) -> None:
        self.steps = 0

    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        self.steps = run.position.step


def test_it_passes_the_conformance_checks() -> None:
    check_plugin("ray")


@pytest.mark.slow
def test_two_workers_train_as_one_process_does(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=trained_by_ray, args=(tmp_path,))  # Ray changes the logging of a process
    process.start()
    process.join(300)
    assert process.exitcode == 0


def trained_by_ray(tmp_path: Path) -> None:
    import ray

    warnings.simplefilter("ignore")  # Ray's own
    seed_everything(5)
    alone, together = a_module(), a_module()
    together.load_state_dict(alone.state_dict())
    plugin = Remembers()
    options: dict[str, Any] = {"max_epochs": 2, "seed": 1, "accelerator": "cpu", "log_every_n_steps": 2}
    trainers = [
        Trainer(root_dir=tmp_path / "one", plugins=[], **options),
        Trainer(root_dir=tmp_path / "two", plugins=[plugin, "journal", "checkpoint", "ray"], strategy="ddp", devices=2, **options),
    ]
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for trainer, module, size in zip(trainers, (alone, together), (8, 4), strict=True):
            trainer.fit(module, DataLoader(data(28), size, shuffle=True))
        assert ray.is_initialized(), "who started it ends it"
        assert {number: signal.getsignal(number) for number in handlers} == handlers
        with pytest.raises(RankFailed, match="broken on rank 1"):
            trainers[1].fit(a_module(fails=True), DataLoader(data(28), 4))
    finally:
        ray.shutdown()
    for one, two in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert together.ranks == 2 and plugin.steps == 8 and "RANK" not in os.environ
    (path,) = (tmp_path / "two").glob("Net/version_0/checkpoints/last.safetensors")
    assert checkpoint.load(path)["position"]["step"] == 8 and trainers[1].enabled["checkpoint"].last_path == path


def test_it_needs_a_strategy(tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, root_dir=tmp_path, plugins=["ray"], accelerator="cpu")
    with pytest.raises(ValueError, match="write strategy='ddp' or 'fsdp' too"):
        trainer.fit(a_module(), DataLoader(data(4), 2))


@pytest.mark.parametrize(
    ("options", "message"), [({"address": 5}, "address must be"), ({"storage_pth": "x"}, "did you mean 'storage_path'")]
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        Trainer(max_epochs=1, plugins=[{"ray": options}])
