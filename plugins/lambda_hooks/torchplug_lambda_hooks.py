"""Calls plain functions in the hooks of a run."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torchplug import hookimpl
from torchplug.hookspecs import Hooks

__all__ = ["LambdaHooks"]

_ARGUMENTS = {  # of every hook
    name: list(inspect.signature(spec).parameters)[1:]
    for name, spec in vars(Hooks).items()
    if inspect.isfunction(spec) and not name.startswith("_")
}


@dataclass(kw_only=True, eq=False)
class LambdaHooks:
    """Hooks from functions, without a class of one's own. A function takes the arguments of the hook that it names.

    The answer of a function for an operation (`train_step`, `clip_gradients`, ...) is the answer of the plugin. An argument with
    a default that the hook does not have keeps its default.

    Args:
        hooks: Functions by the names of hooks: {"on_train_epoch_end": function}. A text is where to import one from:
            "package.module:function".
    """

    hooks: dict[str, Callable[..., Any] | str]

    _functions: dict[str, Callable[..., Any]] = field(init=False, default_factory=dict, repr=False)  # take all arguments of the hook

    def __post_init__(self) -> None:
        if not isinstance(self.hooks, dict):
            raise TypeError(f"hooks must be a dict of functions by the names of hooks, got {self.hooks!r}")
        for hook, function in self.hooks.items():
            if hook not in _ARGUMENTS:
                raise ValueError(f"hooks: there is no hook {hook!r}{_closest(hook, _ARGUMENTS)}")
            self._functions[hook] = _adapted(hook, function)
        for hook in _ARGUMENTS:
            if hook not in self._functions:
                setattr(self, hook, None)  # not implemented by this instance

    def __getstate__(self) -> dict[str, Any]:
        """What other processes get: the functions as they were given, which may be of a module that is there too."""
        return {"hooks": self.hooks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.hooks, self._functions = state["hooks"], {}
        self.__post_init__()


def _closest(word: Any, words: Any) -> str:
    near = difflib.get_close_matches(str(word), words, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _adapted(hook: str, function: Any) -> Callable[..., Any]:
    """``function``, called with all arguments of the hook, as a function that gets those that it names."""
    if isinstance(function, str):
        try:
            function = pkgutil.resolve_name(function)
        except (ValueError, ImportError, AttributeError) as error:
            raise ValueError(f"hooks: {function!r} for {hook} cannot be imported: {error}") from error
    if not callable(function) or inspect.isclass(function):
        raise TypeError(f"hooks: {hook} must be a function, got {function!r}")
    names, there = [], _ARGUMENTS[hook]
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in there and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            names.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"hooks: the function for {hook} takes {parameter}{_closest(parameter.name, there)}, the hook has {', '.join(there)}"
            )
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(kind(each) for kind in kinds for each in (function, type(function).__call__)):
        raise TypeError(f"hooks: {hook} must be a plain function, without async and yield, got {function!r}")
    adapted: Callable[..., Any] = eval(
        f"lambda {', '.join(there)}: function({', '.join(f'{name}={name}' for name in names)})", {"function": function}
    )
    return adapted


def _method(hook: str) -> Callable[..., Any]:
    """A method for the hook, with arguments of its own, that calls the function of the instance."""
    arguments = ", ".join(_ARGUMENTS[hook])
    namespace: dict[str, Any] = {}
    exec(f"def {hook}(self, {arguments}):\n    return self._functions[{hook!r}]({arguments})", namespace)
    method: Callable[..., Any] = namespace[hook]
    method.__qualname__ = f"LambdaHooks.{hook}"
    return method


for _hook in _ARGUMENTS:
    setattr(LambdaHooks, _hook, hookimpl(_method(_hook)))
