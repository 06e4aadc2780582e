"""The kit for those who write plugins: something tiny to train, what was called, ranks, and `check_plugin`. It needs no pytest."""

from torchplug.testing.check import Report, check_plugin
from torchplug.testing.hermetic import hermetic
from torchplug.testing.logger import check_logger
from torchplug.testing.processes import two_ranks
from torchplug.testing.recorded import Recording, recorded
from torchplug.testing.tiny import TinyModule, make_loader, tiny_fit, tiny_trainer

__all__ = [
    "Recording", "Report", "TinyModule", "check_logger", "check_plugin", "hermetic", "make_loader", "recorded", "tiny_fit", "tiny_trainer",
    "two_ranks",
]  # fmt: skip
