"""torchplug trains PyTorch models with a small core and with plugins that do everything else."""

from torchplug.data import DataModule, map_batch
from torchplug.hookspecs import hookimpl
from torchplug.members import PluginError
from torchplug.module import Module
from torchplug.options import duration
from torchplug.run import Run
from torchplug.seed import preserved, seed_everything
from torchplug.trainer import Trainer
from torchplug.trial import trial

__all__ = [
    "DataModule", "Module", "PluginError", "Run", "Trainer", "duration", "hookimpl", "map_batch", "preserved", "seed_everything", "trial",
]  # fmt: skip
__version__ = "0.1.0"
