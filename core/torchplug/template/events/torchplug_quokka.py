"""Follows a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torchplug import Run, hookimpl

__all__ = ["Quokka"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Quokka:
    """Is called at these moments of a run, and says so if it is asked to.

    Args:
        log_calls: Log each call of a hook, to see when it comes.
    """

    log_calls: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.log_calls, bool):
            raise TypeError(f"log_calls must be True or False, got {self.log_calls!r}")

    @hookimpl
    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a batch; ``outputs`` is what the step returned, None if it was skipped."""
        self.called("on_train_batch_end")

    def called(self, hook: str) -> None:
        """What all hooks do so far."""
        if self.log_calls:
            logger.info("%s is called", hook)
