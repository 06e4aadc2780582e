"""From pluggy's ordered implementations to plain calls, once per run.

pluggy owns registration, validation, ordering, wrappers and ``firstresult``. What the loop calls is one plain function
for each hook, so that a hook nobody listens to costs an empty call and a listener costs one more call.

A plugin that has methods ``enter_call(member, hook)`` and ``leave_call()`` is told of every call of an implementation, its own
included. Without one nothing is there to be told.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from typing import Any, cast

import pluggy

from torchplug.blame import also, blame
from torchplug.discovery import PluginError
from torchplug.hookspecs import Hooks
from torchplug.members import CLOSING, OPERATIONS, PARAMETERS, Member

__all__ = ["Manager", "dispatch", "register", "watch"]


class Manager(pluggy.PluginManager):
    """pluggy's manager for `Member` objects: which methods are hooks is known already."""

    def __init__(self) -> None:
        super().__init__("torchplug")
        self.add_hookspecs(Hooks)

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        options = plugin.hooks.get(name)
        if options is None:
            return None
        defaults = {"hookwrapper": False, "optionalhook": False, "tryfirst": False, "trylast": False, "specname": None}
        return {**defaults, **options}


def register(members: Iterable[Member]) -> Manager:
    """A manager in which the hooks of ``members`` are called in the order given."""
    manager = Manager()
    for member in reversed(list(members)):  # pluggy calls the last registered first
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                manager.register(member, f"{member.kind} {member.name}")  # a plugin may be called like the module's class
            except pluggy.PluginValidationError as error:
                raise PluginError(f"{member.label}: {error}") from None
        for warning in caught:
            _pass_on(warning, member)
    return manager


def _pass_on(warning: warnings.WarningMessage, member: Member) -> None:
    """Says whose use of something deprecated it is, and points to the method: pluggy does not know what stands before it."""
    for code, hook in member.codes.items():
        spec = getattr(Hooks, hook).torchplug_spec
        if any(warning.message is each for each in (spec["warn_on_impl"], *(spec["warn_on_impl_args"] or {}).values())):
            text = f"{member.label}: {warning.message}"
            module = type(member.plugin).__module__  # in a script it is shown, as Python does with every deprecation there
            warnings.warn_explicit(text, warning.category, code.co_filename, code.co_firstlineno, module)
            return
    warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def watch(members: Sequence[Member]) -> None:
    """Lets the plugins that want to know of every call know, before the members are registered."""
    for watcher in [member.plugin for member in members if member.kind == "plugin" and hasattr(member.plugin, "enter_call")]:
        for member in members:
            for hook, options in member.hooks.items():
                told = _told_of_both_parts if options["wrapper"] else _told
                enter = functools.partial(watcher.enter_call, member.name, hook)
                setattr(member, hook, told(getattr(member, hook), enter, watcher.leave_call))


def _told(method: Callable[..., Any], enter: Callable[[], None], leave: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any) -> Any:
        enter()
        try:
            return method(*args)
        finally:
            leave()

    return call


def _told_of_both_parts(method: Callable[..., Any], enter: Callable[[], None], leave: Callable[[], None]) -> Callable[..., Any]:
    """What a wrapper does before and after that which it surrounds."""

    @functools.wraps(method)
    def call(*args: Any) -> Generator[None, Any, Any]:
        inner = method(*args)
        part = _told(lambda proceed, *value: proceed(*value), enter, leave)
        part(next, inner)
        try:
            answer = yield
        except BaseException as error:
            proceed, value = inner.throw, error
        else:
            proceed, value = inner.send, answer
        try:
            part(proceed, value)
        except StopIteration as end:
            return end.value
        yield  # it yields twice: pluggy says so
        return None

    return call


def dispatch(manager: Manager, deaf: Collection[Member] = ()) -> Hooks:
    """One plain callable per hook; the events (not the operations) pass over the members in ``deaf``."""
    hooks = cast("Hooks", _Dispatched())
    for name, parameters in PARAMETERS.items():
        caller = getattr(manager.hook, name)
        if deaf and name not in OPERATIONS:
            caller = manager.subset_hook_caller(name, deaf)
        implementations = list(reversed(caller.get_hookimpls()))
        if name in CLOSING:
            function = _reaching_all(parameters, implementations)
        elif any(implementation.wrapper for implementation in implementations):
            function = _through_pluggy(name, parameters, caller)
        else:
            function = _plain(name, parameters, implementations)
        setattr(hooks, name, function)
    return hooks


def _plain(name: str, parameters: tuple[str, ...], implementations: list[pluggy.HookImpl]) -> Callable[..., Any]:
    """A function that calls the implementations one after the other with just the arguments that they name."""
    if not implementations:
        return _NOBODY[len(parameters)]
    if len(implementations) == 1 and implementations[0].argnames == parameters:
        return implementations[0].function
    lines = [f"def {name}({', '.join(parameters)}):", "    pass"]
    for i, implementation in enumerate(implementations):
        call = f"call_{i}({', '.join(implementation.argnames)})"
        if name in OPERATIONS:
            lines += [f"    answer = {call}", "    if answer is not None:", "        return answer"]
        else:
            lines.append(f"    {call}")
    namespace: dict[str, Any] = {f"call_{i}": each.function for i, each in enumerate(implementations)}
    exec(compile("\n".join(lines), f"<torchplug dispatch of {name}>", "exec"), namespace)
    function: Callable[..., Any] = namespace[name]
    return function


# What a hook is that nobody implements, by its number of arguments: hooks share them, so that they stay in the processor's caches.
_NOBODY: list[Callable[..., None]] = [
    lambda: None,
    lambda a: None,
    lambda a, b: None,
    lambda a, b, c: None,
    lambda a, b, c, d: None,
    lambda a, b, c, d, e: None,
    lambda a, b, c, d, e, f: None,
    lambda a, b, c, d, e, f, g: None,
]


class _Dispatched:
    """The callables of all hooks. Slots, and no methods of the same names, make looking one up as cheap as can be."""

    __slots__ = tuple(PARAMETERS)


def _through_pluggy(name: str, parameters: tuple[str, ...], caller: Any) -> Callable[..., Any]:
    """pluggy's own call, which knows what wrappers need; it takes keywords only."""
    keywords = ", ".join(f"{parameter}={parameter}" for parameter in parameters)
    function: Callable[..., Any] = eval(f"lambda {', '.join(parameters)}: caller({keywords})", {"caller": caller})
    return function


def _reaching_all(parameters: tuple[str, ...], implementations: list[pluggy.HookImpl]) -> Callable[..., Any]:
    """Calls every implementation, the last plugin first; the first error is raised when all were called."""
    calls = [(each.plugin, each.function, [parameters.index(name) for name in each.argnames]) for each in reversed(implementations)]

    def closing(*args: Any) -> None:
        first: BaseException | None = None
        for member, function, positions in calls:
            try:
                function(*(args[position] for position in positions))
            except BaseException as error:
                blame(error, [cast("Member", member)], getattr(args[0], "rank", 0))
                if first is None:
                    first = error
                else:
                    also(first, error)
        if first is not None:
            raise first

    return closing
