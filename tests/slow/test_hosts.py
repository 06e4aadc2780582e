"""Two machines: network namespaces joined by a cable, each with a torchrun of its own; then the cable is cut."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchplug import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ip") is None or os.geteuid() != 0, reason="needs iproute2, and root to make network namespaces"),
]

SCRIPT = """
import os, sys, time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Trainer, seed_everything

torch.set_num_threads(1)
STEPS, ROOT, PAUSE = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])


class Net(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def training_step(self, batch):
        time.sleep(PAUSE)
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def on_train_batch_end(self):
        if self.run.rank == 0:
            print("step", self.run.position.step, flush=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


if __name__ == "__main__":
    seed_everything(1)
    x = torch.randn(100, 10)
    options = {"num_nodes": 2} if "RANK" in os.environ else {"devices": 2}
    trainer = Trainer(
        max_steps=STEPS, root_dir=ROOT, accelerator="cpu", strategy={"ddp": {"timeout": "8s", "start_method": "fork"}}, seed=1,
        plugins=["journal", {"checkpoint": {"every_n_steps": 4}}], log_every_n_steps=5, **options,
    )
    trainer.fit(Net(), DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4, shuffle=True), ckpt_path="last")
    print("done at step", trainer.run.position.step, flush=True)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=20)


class Hosts:
    """The two machines; what runs in them is ended when they are taken away."""

    def __init__(self, folder: Path) -> None:
        self.folder, mark = folder, f"{os.getpid() % 100000}"
        self.names = [f"tp{mark}a", f"tp{mark}b"]
        self.script = folder / "train.py"
        self.script.write_text(SCRIPT)
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", self.names[0], "type", "veth", "peer", "name", "cable1", "netns", self.names[1])
        for i, name in enumerate(self.names):
            # torchrun asks for the name of its machine, and of those that connect to it
            hosts = Path("/etc/netns", name, "hosts")
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(f"127.0.0.1 localhost\n10.77.0.{i + 1} {socket.gethostname()}\n10.77.0.1 one\n10.77.0.2 two\n")
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"cable{i}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"cable{i}", "up")
            # how often a lost packet is sent again before a connection counts as broken: 25 seconds instead of 15 minutes
            self.inside(i, "sysctl", "-qw", "net.ipv4.tcp_retries2=6").communicate(timeout=20)

    def inside(self, i: int, *command: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(["ip", "netns", "exec", self.names[i], *command], text=True, **options)

    def cable(self, state: str) -> None:
        ip("-n", self.names[0], "link", "set", "cable0", state)

    def train(self, name: str, steps: int, pause: float) -> list[subprocess.Popen[str]]:
        """The documented command on each machine."""
        started = []
        for i in range(2):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{i}"}
            command = [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
                f"--rdzv-id={name}", "--rdzv-endpoint=10.77.0.1:29500", f"--local-addr=10.77.0.{i + 1}",
                str(self.script), str(steps), str(self.folder / "runs"), str(pause),
            ]  # fmt: skip
            with (self.folder / f"{name}{i}.txt").open("w") as out:
                started.append(self.inside(i, *command, stdout=out, stderr=subprocess.STDOUT, env=environment))
        return started

    def said(self, name: str, i: int) -> str:
        return (self.folder / f"{name}{i}.txt").read_text()

    def processes(self) -> list[int]:
        found = []
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True, timeout=20).stdout
            found += [int(word) for word in listed.split()]
        return found

    def remove(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for name in self.names:
            ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns", name))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    try:
        yield made
    finally:
        made.remove()


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.1)


def last(folder: Path) -> Any:
    (path,) = folder.glob("Net/version_0/checkpoints/last.safetensors")
    return checkpoint.load(path)


def test_a_cut_cable_ends_both_sides_and_the_run_goes_on_exactly(hosts: Hosts, tmp_path: Path) -> None:
    alone = [sys.executable, str(hosts.script), "20", str(tmp_path / "alone"), "0"]
    subprocess.run(alone, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)

    both = hosts.train("first", 20, 0.3)
    wait_for(lambda: "step 10\n" in hosts.said("first", 0), 60)
    hosts.cable("down")
    cut = time.monotonic()
    assert [each.wait(timeout=90) for each in both] == [1, 1]
    assert time.monotonic() - cut < 60
    wait_for(lambda: not hosts.processes(), 5)
    assert "out of reach, or killed: rank 1" in hosts.said("first", 0)
    assert "out of reach, or ended: rank 0 and its machine, 10.77.0.1" in hosts.said("first", 1)

    hosts.cable("up")
    both = hosts.train("second", 20, 0.0)
    assert [each.wait(timeout=90) for each in both] == [0, 0], hosts.said("second", 0)
    assert "at epoch 0, batch 8, step 8" in hosts.said("second", 0)
    assert "done at step 20" in hosts.said("second", 0)

    one, two = last(tmp_path / "alone"), last(tmp_path / "runs")
    assert one["position"] == two["position"] and one["position"]["step"] == 20
    for name, value in one["module"].items():
        assert torch.equal(value, two["module"][name]), name
    for index, own in one["optimizers"][0]["state"]["state"].items():
        for name, value in own.items():
            assert torch.equal(value, two["optimizers"][0]["state"]["state"][index][name]), (index, name)
