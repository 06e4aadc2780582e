"""A plugin that writes down every hook call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchplug.hookspecs import hookimpl
from torchplug.members import PARAMETERS

__all__ = ["Recording", "recorded"]

PLAIN = (str, int, float, bool, type(None), Path)


class Recording:
    """What a recorder has seen. Values that are no plain numbers or texts are kept as the name of their type."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    @property
    def names(self) -> list[str]:
        """The hooks in the order in which they were called."""
        return [name for name, _ in self.calls]

    def record(self, hook: str, arguments: dict[str, Any]) -> None:
        plain = {key: value if isinstance(value, PLAIN) else type(value).__name__ for key, value in arguments.items()}
        self.calls.append((hook, plain))


def recorded(*hooks: str) -> Recording:
    """A plugin that records each call of these hooks, of all if none are named.

    ::

        calls = recorded()
        tiny_fit(calls, "early_stopping")
        assert calls.names.count("on_train_batch_end") == 4

    ``.names`` are the hooks in order, ``.calls`` pairs of a hook and its arguments. It answers no operation. One that a plugin listed
    before it answered is not asked of it: list it first to see every call.
    """
    unknown = set(hooks) - PARAMETERS.keys()
    if unknown:
        raise ValueError(f"recorded: no hook {sorted(unknown)[0]!r} (hooks: {', '.join(PARAMETERS)})")
    methods = {hook: hookimpl(_recording_hook(hook)) for hook in hooks or PARAMETERS}
    made: Recording = type("Recorder", (Recording,), methods)()
    return made


def _recording_hook(hook: str) -> Callable[..., None]:
    """A hook implementation that takes every argument of its spec, records the call and answers nothing."""
    parameters = PARAMETERS[hook]
    arguments = ", ".join(f"{name!r}: {name}" for name in parameters)
    namespace: dict[str, Any] = {}
    exec(f"def {hook}({', '.join(('self', *parameters))}):\n    self.record({hook!r}, {{{arguments}}})", namespace)
    function: Callable[..., None] = namespace[hook]
    return function
