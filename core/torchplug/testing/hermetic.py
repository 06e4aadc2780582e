"""Which plugins are installed, as a test wants it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torchplug import discovery
from torchplug.discovery import GROUP, Found

__all__ = ["hermetic", "scanned_once"]


@contextmanager
def hermetic(*names: str) -> Iterator[None]:
    """Inside, the plugins ``names`` are the only ones that seem to be installed, whatever the environment has.

    Any other name is the error that it is where nothing of the kind is installed. ``hermetic()`` hides them all.

    Raises:
        PluginError: one of ``names`` is not installed.
    """
    for name in names:
        discovery.find(name)
    real = discovery.scan

    def visible(group: str) -> tuple[list[Found], list[str]]:
        found, unreadable = real(group)
        return [each for each in found if group != GROUP or each.name in names], unreadable

    discovery.scan = visible
    try:
        yield
    finally:
        discovery.scan = real


@contextmanager
def scanned_once() -> Iterator[None]:
    """Inside, what is installed is read once: nothing is installed while many trainers are built."""
    real = discovery.scan
    discovery.scan = functools.cache(real)
    try:
        yield
    finally:
        discovery.scan = real
