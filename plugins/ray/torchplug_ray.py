"""Lets Ray start the ranks of a run: on the cluster that the program is connected to, or on this machine."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchplug import Run, hookimpl
from torchplug.distributed import STARTED, RankFailed, handlers_kept
from torchplug.launching import Done, Task

__all__ = ["Ray"]


@dataclass(kw_only=True, eq=False)
class Ray:
    """Hands a run to Ray Train's ``TorchTrainer``: as many workers as ``devices`` and ``num_nodes`` of the Trainer say.

    A strategy says what the workers do together: ``Trainer(strategy="ddp", devices=4, plugins=["standard", "ray"])``. Module, data and
    plugins are pickled and sent to the workers; weights, metrics, predictions and the attributes of plugins come back. Where Ray is
    not initialised it is started on this machine, and ended after the run.

    Args:
        address: The cluster, such as 'auto' or 'ray://host:10001'. None: the one that the program is connected to, else this machine.
        resources_per_worker: What each worker needs, such as {"CPU": 4}. None: one CPU, and one GPU where the accelerator is one.
        storage_path: A folder that all machines share, or a URL, through which the result comes back. None: a temporary folder,
            which is enough on one machine.
    """

    address: str | None = None
    resources_per_worker: dict[str, Any] | None = None
    storage_path: str | None = None

    before = ("ddp", "fsdp", "*")

    @hookimpl
    def launch(self, run: Run, main: Task) -> Done | None:
        if "RANK" in os.environ:  # this is a worker
            return None
        if run.options.strategy == "auto":
            raise ValueError("plugin 'ray' starts workers that a strategy lets train together: write strategy='ddp' or 'fsdp' too")
        import ray

        started = not ray.is_initialized()
        with tempfile.TemporaryDirectory(prefix="torchplug-") as folder, handlers_kept():
            if started:
                ray.init(self.address, include_dashboard=False, log_to_driver=True, logging_level=logging.ERROR)
            try:
                return self._fit(run, main, folder)
            finally:
                if started:
                    ray.shutdown()

    def _fit(self, run: Run, main: Task, folder: str) -> Done:
        from ray import cloudpickle
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        devices = run.options.devices
        if not isinstance(devices, int):
            raise ValueError(f"with plugin 'ray' devices must say how many workers there are on a machine, got {devices!r}")
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "task": cloudpickle.dumps(main),  # type: ignore[no-untyped-call]
                "folder": os.getcwd(),
            },
            scaling_config=ScalingConfig(
                num_workers=devices * run.options.num_nodes,
                use_gpu=run.options.accelerator != "cpu" and torch.cuda.is_available(),
                resources_per_worker=self.resources_per_worker,
            ),
            run_config=RunConfig(name="run", storage_path=self.storage_path or folder),
        )
        try:
            result = trainer.fit()
        except Exception as error:  # of several kinds, from version to version
            raise RankFailed(f"a worker of Ray failed, with the error above: {error}") from error
        if result.checkpoint is None:
            raise RankFailed(f"Ray brought nothing back: {result.error}")
        with result.checkpoint.as_directory() as content:
            return main.take(Path(content) / "result")


def _work(config: dict[str, Any]) -> None:
    """What a worker does. Ray has made the group of all ranks already, and waits for a report of each."""
    from ray import cloudpickle, train

    if os.path.isdir(config["folder"]):  # relative paths mean the same as where the run was asked for
        os.chdir(config["folder"])
    with tempfile.TemporaryDirectory(prefix="torchplug-") as folder:
        os.environ[STARTED] = str(Path(folder) / "result")
        try:
            cloudpickle.loads(config["task"])()
        finally:
            del os.environ[STARTED]
        first = train.get_context().get_world_rank() == 0
        train.report({}, checkpoint=train.Checkpoint.from_directory(folder) if first else None)
