"""One enabled plugin as pluggy sees it: its hooks, checked and named, and what happens when one of them fails."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal

from torchplug.data import DataModule
from torchplug.discovery import PluginError
from torchplug.hookspecs import SPECS, Hooks
from torchplug.module import STEPS, Module
from torchplug.options import closest

__all__ = ["ACTIONS", "CLOSING", "OPERATIONS", "PARAMETERS", "Member"]

logger = logging.getLogger("torchplug")

PARAMETERS = {name: tuple(inspect.signature(spec).parameters)[1:] for name, spec in SPECS.items()}
OPERATIONS = {name for name, spec in SPECS.items() if spec.torchplug_spec["firstresult"]}
ACTIONS = {name for name, spec in SPECS.items() if hasattr(spec, "torchplug_action")}
CLOSING = {name for name, spec in SPECS.items() if hasattr(spec, "torchplug_closing")}

Kind = Literal["plugin", "module", "data module", "core"]


@dataclass(eq=False)
class Member:
    """A plugin in a run; its hook methods are attributes of it, which is what pluggy registers.

    Args:
        name: the instance's own name ("checkpoint", "checkpoint:hourly", "module").
        plugin: the object that the user named, listed, or trains.
        kind: plugin, module, data module or core.
        distribution: the package it came from, empty if it was given as an object of unknown origin.
        version: the version of that package.
        rule: why it stands where it stands in the order.
    """

    name: str
    plugin: Any
    kind: Kind = "plugin"
    distribution: str = ""
    version: str = ""
    rule: str = "as listed"
    hooks: dict[str, Any] = field(default_factory=dict)  # hook name -> pluggy's options for the implementation
    codes: dict[Any, str] = field(default_factory=dict)  # code object -> hook name, to find who was at fault
    position: Any = None  # where the run stands, set when it starts
    failure: str = ""  # set when the plugin was switched off after an error

    def __post_init__(self) -> None:
        if inspect.isclass(self.plugin):
            raise PluginError(f"{self.label}: got the class {self.plugin.__name__}, have you forgotten the ()?")
        policy = self.on_error
        if policy not in ("abort", "disable"):
            raise PluginError(f"{self.label}: on_error must be 'abort' or 'disable', got {policy!r}")
        for hook, function, options in self._implementations():
            method = getattr(self.plugin, hook)
            if method is None:  # set to None on the instance: not implemented this time
                continue
            if function.__defaults__:
                method = _without_defaults(method)
            self.codes[inspect.unwrap(function).__code__] = hook
            if policy == "disable":
                if options["wrapper"] or hook in OPERATIONS:
                    raise PluginError(
                        f"{self.label}: on_error='disable' is for plugins that only observe, but {hook} "
                        f"{'wraps' if options['wrapper'] else 'is'} an operation; write on_error='abort'"
                    )
                method = self._guarded(hook, method)
            elif self.kind in ("module", "data module") and hook in ACTIONS:
                method = _answered(method)
            self.hooks[hook] = options
            setattr(self, hook, method)

    @property
    def on_error(self) -> str:
        """``"abort"`` (an error ends the run) or ``"disable"`` (the plugin is switched off, the run goes on)."""
        return getattr(self.plugin, "on_error", "abort") if self.kind == "plugin" else "abort"

    @property
    def base(self) -> str:
        """The plugin's name without the instance's part."""
        return self.name.partition(":")[0]

    @property
    def label(self) -> str:
        """How every message about the plugin begins."""
        if self.kind != "plugin":
            return self.name
        return f"plugin {self.name!r}" + (f" ({self.distribution} {self.version})" if self.distribution else "")

    def _implementations(self) -> Iterator[tuple[str, FunctionType, dict[str, Any]]]:
        """Each hook method with its function and pluggy's options, refusing what cannot work."""
        cls = type(self.plugin)
        bare = self.kind in ("module", "data module")
        names = _own_names(cls) if bare else dir(cls)
        for name in names:
            function = inspect.getattr_static(cls, name)
            if name in PARAMETERS and isinstance(function, (staticmethod, classmethod)):
                raise PluginError(f"{self.label}: {cls.__name__}.{name} must be a method, not a {type(function).__name__}")
            if not isinstance(function, FunctionType):
                continue
            options = getattr(function, "torchplug_impl", None)
            if name not in PARAMETERS:
                if options is not None or name.startswith("on_"):
                    raise PluginError(f"{self.label}: {cls.__name__}.{name} is not a hook{closest(name, PARAMETERS)}")
                continue
            if options is None and not bare:
                if getattr(Hooks, name, None) is function:
                    continue  # inherited from Hooks for its signatures
                raise PluginError(f"{self.label}: {cls.__name__}.{name} has the name of a hook but no @hookimpl; add it, or rename")
            options = dict(options or {"wrapper": False})
            self._check(name, function, options)
            yield name, function, options

    def _check(self, hook: str, function: FunctionType, options: dict[str, Any]) -> None:
        where = f"{self.label}: {type(self.plugin).__name__}.{hook}"
        if any(options.get(key) for key in ("hookwrapper", "tryfirst", "trylast", "optionalhook", "specname")):
            raise PluginError(f"{where}: only wrapper=True is used in @hookimpl; order is said by before and after")
        if options["wrapper"] and hook in CLOSING:
            raise PluginError(f"{where}: {hook} reaches every plugin and cannot be wrapped")
        if options["wrapper"] and not inspect.isgeneratorfunction(function):
            raise PluginError(f"{where}: a wrapper must yield once")
        if not options["wrapper"] and inspect.isgeneratorfunction(function):
            raise PluginError(f"{where}: it yields, so its body would never run; write @hookimpl(wrapper=True), or do not yield")
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise PluginError(f"{where}: hooks are called, not awaited; write it without async")
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            if parameter.name not in PARAMETERS[hook]:
                if self.kind != "plugin":
                    raise PluginError(
                        f"{where} has the name of a hook, whose arguments are {', '.join(PARAMETERS[hook])}; it takes {parameter.name!r}"
                        f"{closest(parameter.name, PARAMETERS[hook])} (rename it if it is a method of your own)"
                    )
                possible = ", ".join(PARAMETERS[hook])
                raise PluginError(
                    f"{where}: the hook has no argument {parameter.name!r}{closest(parameter.name, PARAMETERS[hook])} (it has: {possible})"
                )
            if parameter.kind is parameter.KEYWORD_ONLY or (parameter.default is not parameter.empty and self.kind == "plugin"):
                raise PluginError(f"{where}: argument {parameter.name!r} must be plain, without a default and not keyword-only")

    def _guarded(self, hook: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, but an error in it switches the plugin off instead of ending the run."""
        last_words = hook in CLOSING

        @functools.wraps(method)
        def guarded(*args: Any) -> None:
            if self.failure and not last_words:
                return
            try:
                method(*args)
            except Exception as error:
                if self.failure:
                    logger.error("%s, which is switched off, failed in %s too: %s: %s", self.label, hook, type(error).__name__, error)
                else:
                    when = f" at step {self.position.step}" if self.position is not None else ""
                    self.failure = f"{type(error).__name__} in {hook}{when}: {error}"
                    logger.error(
                        "%s failed in %s and is switched off, training goes on: %s: %s",
                        self.label, hook, type(error).__name__, error, exc_info=error,
                    )  # fmt: skip

        return guarded


def _own_names(cls: type) -> Iterator[str]:
    """What a user's Module or DataModule defines itself, step methods and nn.Module's own names left out."""
    seen = set(STEPS)
    for base in cls.__mro__:
        if base in Module.__mro__ or base in DataModule.__mro__:
            continue
        for name in vars(base):
            if name not in seen and not hasattr(Module.__mro__[1], name):
                seen.add(name)
                yield name


def _without_defaults(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` of a module so that pluggy passes all arguments: also the usual ``dataloader_idx=0`` and ``stage=None``."""
    names = ", ".join(inspect.signature(method).parameters)
    full: Callable[..., Any] = eval(f"lambda {names}: method({names})", {"method": method})
    return full


def _answered(method: Callable[..., Any]) -> Callable[..., Any]:
    """A module that overrides an action has done it, whatever it returns."""

    @functools.wraps(method)
    def answered(*args: Any) -> Any:
        answer = method(*args)
        return True if answer is None else answer

    return answered
