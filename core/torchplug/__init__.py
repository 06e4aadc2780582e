"""torchplug trains PyTorch models with a small core and with plugins that do everything else.

What stands here is imported when it is asked for: a command that needs no torch, such as ``torchplug plugins``, does not wait for it.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchplug.data import DataModule, map_batch
    from torchplug.discovery import PluginError
    from torchplug.hookspecs import hookimpl
    from torchplug.module import Module
    from torchplug.options import duration
    from torchplug.run import Run
    from torchplug.seed import preserved, seed_everything
    from torchplug.trainer import Trainer
    from torchplug.trials import trial

__all__ = [
    "DataModule", "Module", "PluginError", "Run", "Trainer", "duration", "hookimpl", "map_batch", "preserved", "seed_everything", "trial",
]  # fmt: skip
__version__ = "0.1.0"

_HOMES = {
    "DataModule": "data", "map_batch": "data", "PluginError": "discovery", "hookimpl": "hookspecs", "Module": "module",
    "duration": "options", "Run": "run", "preserved": "seed", "seed_everything": "seed", "Trainer": "trainer", "trial": "trials",
}  # fmt: skip


if not TYPE_CHECKING:  # type checkers see the names above, and no others

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            globals()[name] = value = getattr(import_module(f"torchplug.{_HOMES[name]}"), name)
            return value
        if name.isidentifier() and not name.startswith("_") and find_spec(f"torchplug.{name}") is not None:
            return import_module(f"torchplug.{name}")
        raise AttributeError(f"module 'torchplug' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
