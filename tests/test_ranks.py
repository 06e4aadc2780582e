"""Ranks that a program starts: what they did comes back to it, every way to end ends them all, and mistakes are said clearly."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchplug.checkpoint
import torchplug.launching
from torchplug import DataModule, Module, PluginError, Trainer, hookimpl
from torchplug.distributed import RankFailed, Ranks

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def data(samples: int = 64) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True))


class Net(Module):
    """Makes a layer before the run, and remembers what happened.

    Args:
        late: whether to do so.
        at: what a rank does at its third step, by rank.
    """

    def __init__(self, late: bool = False, at: dict[int, Any] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.late, self.at, self.seen, self.opened = late, at or {}, 0, None

    def configure_model(self) -> None:
        if self.late and not hasattr(self, "more"):
            self.more = nn.Linear(1, 1)

    def forward(self, x: Any) -> Any:
        return self.more(self.layer(x)) if self.late else self.layer(x)

    def training_step(self, batch: Any) -> Any:
        if self.global_step == 2 and (what := self.at.get(self.run.rank)) is not None:
            what(self)
        self.seen += len(batch[0])
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val", nn.functional.mse_loss(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.05)


class Keeping:
    """Keeps plain values, and one that nobody can send."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.process = 0
        self.lock: Any = None

    @hookimpl
    def on_train_epoch_end(self, run: Any) -> None:
        self.epochs.append(run.position.epoch)
        self.process, self.lock = os.getpid(), (each for each in ())


class Data(DataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size, self.asked, self.big = batch_size, 0, torch.zeros(3)

    def train_dataloader(self) -> Any:
        self.asked += 1
        self.big += 1
        return DataLoader(data(), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(data(7), 2)

    def test_dataloader(self) -> Any:
        return DataLoader(data(5), 2)

    def predict_dataloader(self) -> Any:
        return DataLoader(data(5), 2)


def trainer(*plugins: Any, world: int = 2, **options: Any) -> Trainer:
    several: dict[str, Any] = {"strategy": {"ddp": {"start_method": "fork", "timeout": "60s"}}, "devices": world} if world > 1 else {}
    defaults = {"max_epochs": 2, "log_every_n_steps": 2, "num_sanity_val_steps": 0, "accelerator": "cpu", "root_dir": "runs"}
    return Trainer(plugins=list(plugins), **{**defaults, **several, **options})


# ---------------------------------------------------------------------- what comes back


@pytest.mark.slow
def test_fit_test_predict_and_another_fit_go_on_as_in_one_process(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    both = []
    for world in (1, 2):
        torch.manual_seed(0)
        net, keeping, source = Net(late=True), Keeping(), Data(8 // world)
        one = trainer(keeping, world=world)
        one.fit(net, datamodule=source)
        assert one.run is not None
        where = one.run.position
        first = {
            "position": (where.epoch, where.step, where.samples), "epochs": list(keeping.epochs), "asked": source.asked,
            "metrics": dict(one.metrics), "test": one.test(datamodule=source)[0],
            "predictions": torch.cat(one.predict(datamodule=source)).flatten().tolist(),
        }  # fmt: skip
        assert net.seen == 128 // world and (keeping.process == os.getpid()) == (world == 1)
        one.max_epochs = 3
        one.fit(net, datamodule=source)
        where = one.run.position
        weights = torch.cat([each.detach().flatten() for each in net.parameters()])
        both.append((first, (where.epoch, where.step, where.samples), weights, torch.rand(1).item()))
        assert one.run.dir.is_dir() and torch.equal(source.big, torch.full((3,), 2.0 if world == 1 else 0.0))
    (alone, end, weights, drawn), (first, *others) = both
    for name, value in alone.items():
        assert first[name] == (pytest.approx(value, rel=1e-6, abs=1e-6) if name in ("metrics", "test", "predictions") else value), name
    assert others[0] == end and others[2] == drawn
    assert torch.allclose(others[1], weights, atol=1e-6)
    assert "stayed in the processes that did the run, as it cannot be pickled: keeping.lock" in caplog.text.lower()
    assert {number: signal.getsignal(number) for number in handlers} == handlers, "torch's launcher has taken signals"
    assert multiprocessing.active_children() == [] and [*temporary.glob("torchplug*"), *temporary.glob("torchelastic*")] == []


@pytest.mark.slow
def test_what_a_notebook_defines_needs_no_pickling(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    notebook = ModuleType("__main__")  # without __file__
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    cell = """
import torch, torchplug
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(torchplug.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.activation = nn.Linear(4, 1), lambda x: torch.tanh(x)

    def training_step(self, batch):
        return self.activation(self.layer(batch[0])).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

net = Net()
before = net.layer.weight.detach().clone()
trainer = torchplug.Trainer(max_epochs=1, strategy="ddp", devices=2, plugins=[], accelerator="cpu", root_dir="runs")
trainer.fit(net, DataLoader(TensorDataset(torch.randn(32, 4)), 4))
"""
    exec(cell, vars(notebook))
    assert notebook.trainer.run.position.step == 4
    assert not torch.equal(notebook.net.layer.weight, notebook.before)


# ---------------------------------------------------------------------- ways to end


@pytest.mark.slow
def test_one_rank_s_wish_to_stop_stops_all_after_the_same_step() -> None:
    note = lambda net: setattr(net, "opened", str(signal.getsignal(signal.SIGQUIT)))  # noqa: E731
    net = Net(at={0: note, 1: lambda net: net.run.request_stop("enough")})
    one = trainer(max_epochs=9)
    one.fit(net, DataLoader(data(), 4))
    assert one.run is not None
    assert net.opened == str(signal.getsignal(signal.SIGQUIT)), "a rank that was forked has the handlers of torch's launcher"
    assert (one.run.stop_reason, one.run.position.step, one.run.position.samples) == ("enough", 4, 32)  # the next logging step


@pytest.mark.slow
def test_sigterm_to_one_rank_ends_all_with_a_checkpoint_and_its_exit_code() -> None:
    one = trainer("checkpoint", max_epochs=9)
    with pytest.raises(SystemExit) as ended:
        one.fit(Net(at={1: lambda net: os.kill(os.getpid(), signal.SIGTERM)}), DataLoader(data(), 4))
    assert ended.value.code == 143
    assert one.run is not None and (one.run.interrupted, one.run.position.step) == ("SIGTERM", 4)
    state = torchplug.checkpoint.load(one.run.dir / "checkpoints" / "last.safetensors")
    assert state["position"]["step"] == 4 and multiprocessing.active_children() == []


@pytest.mark.slow
def test_ctrl_c_to_one_rank_ends_all() -> None:
    one = trainer(max_epochs=9)
    with pytest.raises(KeyboardInterrupt):
        one.fit(Net(at={1: lambda net: os.kill(os.getpid(), signal.SIGINT)}), DataLoader(data(), 4))
    assert one.run is not None and one.run.position.step == 4


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_and_is_printed_first(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(net: Any) -> None:
        raise LookupError("rank 1 has had it")

    began = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 failed with exit code 1; its error is above"):
        trainer().fit(Net(at={1: fail}), DataLoader(data(), 4))
    assert time.monotonic() - began < 20 and multiprocessing.active_children() == []
    printed = capfd.readouterr().err
    first = printed.index("Traceback")
    assert printed.index("LookupError: rank 1 has had it") < (printed.find("Traceback", first + 1) % len(printed))
    assert "failed (exitcode" not in printed


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_is_named() -> None:
    with pytest.raises(RankFailed, match="rank 1 was ended by SIGKILL"):
        trainer().fit(Net(at={1: lambda net: os.kill(os.getpid(), signal.SIGKILL)}), DataLoader(data(), 4))
    assert multiprocessing.active_children() == []


# ---------------------------------------------------------------------- what is said


def test_what_cannot_be_pickled_is_forked_unless_spawn_is_asked_for(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)  # who runs the tests may have none

    class Local(Net):
        pass

    ranks = Ranks()
    caplog.set_level(logging.INFO, "torchplug")
    method, _ = ranks._packed(torchplug.launching.Task(trainer(world=1), Local()), tmp_path / "task")  # type: ignore[arg-type]
    assert method == "fork" and "starts processes by forking, as something cannot be pickled" in caplog.text
    with pytest.raises(Exception, match="Local") as refused:
        Ranks(start_method="spawn")._packed(torchplug.launching.Task(None, Local()), tmp_path / "task")  # type: ignore[arg-type]
    assert "start_method='spawn' sends everything to other processes" in str(refused.value.__notes__)


def test_a_gpu_in_use_is_no_place_to_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is in use already, so processes cannot be forked"):
        trainer().fit(Net(), DataLoader(data(), 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": "soon"}, "timeout"),
        ({"start_method": "thread"}, "start_method"),
        ({"deal": "no"}, "deal"),
        ({"bucket_cap_mb": 0}, "bucket_cap_mb"),
        ({"find_unused": True}, "find_unused_parameters"),
    ],
)
def test_a_wrong_option_is_an_error_when_the_trainer_is_built(options: dict[str, Any], words: str) -> None:
    with pytest.raises((PluginError, ValueError, TypeError), match=words):
        Trainer(max_epochs=1, strategy={"ddp": options}, devices=2, plugins=[])


def test_several_machines_need_a_place_to_meet() -> None:
    with pytest.raises(ValueError, match="num_nodes=2: say where they meet with rendezvous='host:port'"):
        trainer(num_nodes=2).fit(Net(), DataLoader(data(), 4))


def test_a_rank_without_a_local_rank_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE are set and LOCAL_RANK is not"):
        trainer().fit(Net(), DataLoader(data(), 4))


def test_one_device_is_one_process_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    net = Net()
    Trainer(max_epochs=1, strategy="ddp", plugins=[], accelerator="cpu", root_dir="runs").fit(net, DataLoader(data(8), 4))
    assert "strategy 'ddp' with one device: one process" in caplog.text and net.seen == 8
