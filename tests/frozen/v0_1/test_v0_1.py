"""Plugins that were written against torchplug 0.1 work with the core of today, and with one that has more hooks and arguments."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torchplug

HERE = Path(__file__).parent
CORE = Path(torchplug.__file__).parent

# Nobody may change these files: whoever wrote such a plugin has not changed it either.
FROZEN = {
    "frozen_counter": "db246fbca75f243ece49f4f883ba33ab3a77cf9003943556ae77eafd79cf6da4",
    "frozen_half": "eb80eb75dde477649924cd3db0fa53fee72612416ce0baf65d782e9ba9d65026",
    "frozen_tracker": "eca413099c6fe52fcdce16239749ea330d8e3debda9c40c5eaf233a7c4830742",
}
CLASSES = {"frozen_counter": "Counter", "frozen_half": "Half", "frozen_tracker": "FileTracker"}

PROGRAM = """
import json, sys
import torch, torchplug
from torchplug.testing import TinyModule

assert torchplug.__file__.startswith(sys.argv[1]), torchplug.__file__
import frozen_tracker

def fit(root, plugins, ckpt_path=None, **options):
    module = TinyModule(train=4)
    trainer = torchplug.Trainer(max_epochs=3, seed=1, plugins=[*plugins, "checkpoint"], root_dir=root, accelerator="cpu",
        log_every_n_steps=1, num_sanity_val_steps=0, **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, [parameter.tolist() for parameter in module.parameters()]

all_of_them = ["frozen_tracker", {"frozen_half": {"factor": 0.25}}, "frozen_counter"]
trainer, weights = fit("whole", all_of_them)
_, by_hand = fit("by_hand", [], limit_train_batches=4, gradient_clip_val=None)
stopped, _ = fit("parts", ["frozen_tracker", {"frozen_half": {"factor": 0.25, "stop_after": 6}}, "frozen_counter"])
resumed, again = fit("parts", all_of_them, ckpt_path="last")
records, status = frozen_tracker.read(trainer.run.dir)
print(json.dumps({
    "weights": weights, "bare": by_hand, "again": again, "order": list(trainer.run.plugins),
    "counts": (trainer.run.dir / "counts.txt").read_text().split("\\n"),
    "resumed": (resumed.run.dir / "counts.txt").read_text().split("\\n"),
    "losses": len(trainer.enabled["frozen_half"].losses), "evaluations": trainer.enabled["frozen_half"].weighed,
    "records": records, "status": status, "stopped": stopped.run.stop_reason, "packages": trainer.run.packages,
}))
"""


@pytest.fixture
def install(package: Callable[..., Path]) -> list[Path]:
    """The three as packages that ask for torchplug 0.1 or later."""
    folders = []
    for name, cls in CLASSES.items():
        source = (HERE / f"{name}.py").read_text(encoding="utf-8")
        folders.append(package(name.replace("_", "-"), source, version="0.1.0", requires=["torchplug>=0.1"], **{name: cls}))
    return folders


@pytest.mark.parametrize("name", FROZEN)
def test_the_plugins_are_those_of_then(name: str) -> None:
    assert hashlib.sha256((HERE / f"{name}.py").read_bytes()).hexdigest() == FROZEN[name]


def check(seen: dict[str, Any]) -> None:
    """What the three promised in 0.1."""
    assert seen["weights"] != seen["bare"] and seen["weights"] == seen["again"]
    order = [name for name in seen["order"] if name.startswith("frozen")]
    assert order == ["frozen_tracker", "frozen_counter", "frozen_half"]  # after=("frozen_counter",)
    assert {"setup fit: 1", "epoch start: 3", "batch: 12", "validation: 3", "finished"} <= set(seen["counts"])
    assert {"batch: 12", "stop: 6 steps are enough (frozen_half): 1"} <= set(seen["resumed"])
    assert (seen["losses"], seen["evaluations"], seen["status"], seen["stopped"]) == (12, 3, "finished", "6 steps are enough")
    assert [step for step, metrics in seen["records"] if "half_factor" in metrics] == list(range(1, 13))
    assert seen["packages"]["frozen_half"] == "frozen-half 0.1.0"


def run(tmp_path: Path, core: Path, folders: list[Path]) -> dict[str, Any]:
    (tmp_path / "work").mkdir()
    path = os.pathsep.join(map(str, [core, *folders]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(core)], cwd=tmp_path / "work", env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_they_work_with_the_core_of_today(install: list[Path], tmp_path: Path) -> None:
    check(run(tmp_path, CORE.parent, install))


def test_they_work_with_a_core_that_has_more_arguments_and_hooks(install: list[Path], tmp_path: Path) -> None:
    shutil.copytree(CORE, tmp_path / "core" / "torchplug", ignore=shutil.ignore_patterns("__pycache__"))

    def change(file: str, pattern: str, by: str) -> None:
        path = tmp_path / "core" / "torchplug" / file
        text, times = re.subn(pattern, by, path.read_text(encoding="utf-8"))
        assert times > 0, f"{file} has no {pattern}"
        path.write_text(text, encoding="utf-8")

    change("hookspecs.py", r"(def on_train_batch_end\(self, run: Run, outputs: Any, batch: Any, batch_idx: int)\)", r"\1, weather: str)")
    change(
        "hookspecs.py",
        r"(?m)^    @event\n    def on_train_epoch_start",
        "    @event\n    def on_moon(self, run: Run) -> None: ...\n\n\\g<0>",
    )
    change("loop.py", r"(\.on_train_batch_end\([^)]*)\)", r'\1, "fine")')
    change("loop.py", r"(?m)^( *)(\w+)\.on_train_epoch_start\(run\)", r"\1\2.on_moon(run)\n\g<0>")
    check(run(tmp_path, tmp_path / "core", install))
