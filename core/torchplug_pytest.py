"""Fixtures for the tests of plugins, there wherever torchplug is installed. Nothing of torchplug is imported until one is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchplug.testing import Recording, Report, TinyModule
    from torchplug.trainer import Trainer


@pytest.fixture
def tiny_module() -> TinyModule:
    """A module of five numbers that brings its loaders: `torchplug.testing.TinyModule`."""
    from torchplug.testing import TinyModule

    return TinyModule()


@pytest.fixture
def tiny_fit(tmp_path: Path) -> Callable[..., Trainer]:
    """`torchplug.testing.tiny_fit`, which writes into the folder of the test: ``tiny_fit("ema", max_epochs=2)``."""
    from torchplug import testing

    def fit(*plugins: Any, **options: Any) -> Trainer:
        return testing.tiny_fit(*plugins, **{"root_dir": tmp_path, **options})

    return fit


@pytest.fixture
def recorded() -> Recording:
    """A plugin that records every hook call with its arguments: ``.names``, ``.calls``."""
    from torchplug.testing import recorded

    return recorded()


@pytest.fixture
def hermetic() -> Iterator[Callable[..., None]]:
    """``hermetic("ema")`` hides all plugins but those named until the test is over."""
    from torchplug import testing

    with ExitStack() as stack:

        def hide(*names: str) -> None:
            stack.enter_context(testing.hermetic(*names))

        yield hide


@pytest.fixture
def two_ranks() -> Callable[..., list[Any]]:
    """`torchplug.testing.two_ranks`: a function in two processes that are ranks of a gloo group."""
    from torchplug.testing import two_ranks

    return two_ranks


@pytest.fixture
def check_plugin() -> Callable[..., Report]:
    """`torchplug.testing.check_plugin`."""
    from torchplug.testing import check_plugin

    return check_plugin
