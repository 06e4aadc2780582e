"""Checks of what a plugin is, before anything is trained: its package, its options, its hooks."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from enum import Enum
from logging import Logger
from types import ModuleType
from typing import Any, get_type_hints

from torchplug.discovery import GROUP, Found, PluginError, scan
from torchplug.options import fields_of
from torchplug.ordering import order
from torchplug.plugins import build, build_one
from torchplug.testing.subject import NotApplicable, Problems, Subject
from torchplug.testing.tiny import tiny_trainer

__all__ = [
    "built_twice_it_is_two_objects",
    "entry_point_and_names_agree",
    "every_option_is_checked",
    "every_option_is_documented",
    "hooks_have_their_signatures",
    "it_can_be_built_with_these_options",
    "it_goes_to_other_processes",
]

MUTABLE = (list, dict, set, bytearray)


def entry_point_and_names_agree(subject: Subject) -> Problems:
    """The name in Trainer, the entry point, the distribution and the module are one name.

    The entry point is the name, in lower case with underscores. The distribution is the module's name with hyphens. Where it brings
    this plugin alone, both end with the name after a prefix of their author: ``torchplug-early-stopping``, ``acme-early-stopping``.
    The package says with which versions of torchplug it works.
    """
    found, target = subject.found, subject.target
    if not re.fullmatch(r"[a-z][a-z0-9_]*", subject.name):
        yield f"the entry point {subject.name!r} is no plain name: write it with lower-case letters, digits and underscores"
    module = found.value.partition(":")[0].partition(".")[0]
    if not isinstance(target, (list, tuple)) and not inspect.isclass(target):
        yield f"the entry point {found.value} is a {type(target).__name__}: name a class, or a list of plugin names for a bundle"
    elif inspect.isclass(target) and target.__module__.partition(".")[0] != module:
        yield f"{found.value} comes from the module {target.__module__}: name that module in the entry point"
    if _plain(found.distribution) != module:
        yield f"the distribution {found.distribution} holds the module {module}: call it {module.replace('_', '-')}, or rename the module"
    elif _brought_by(found) == [subject.name] and not f"_{module}".endswith(f"_{subject.name}"):
        yield f"the module {module} does not end with the plugin's name: call it ..._{subject.name}, or give the plugin another name"
    if not found.range:
        yield f"{found.distribution} does not say with which versions of torchplug it works: add 'torchplug>=0.1,<0.2' to its dependencies"


def _plain(distribution: str) -> str:
    return re.sub(r"[-_.]+", "_", distribution).lower()


def _brought_by(found: Found) -> list[str]:
    """The plugins of the package that brings this one."""
    return [each.name for each in scan(GROUP)[0] if each.folder == found.folder]


def it_can_be_built_with_these_options(subject: Subject) -> Problems:
    """Its options are known, of their types, and all that are required."""
    if subject.bundle:
        build([{subject.name: dict(subject.options)}])
    else:
        build_one(subject.name, subject.found, subject.target, dict(subject.options))  # whether it has hooks is looked at later
    yield from ()


def hooks_have_their_signatures(subject: Subject) -> Problems:
    """Every method that has the name of a hook is one, takes arguments that the hook has, and there is at least one.

    The wishes ``before`` and ``after`` can be granted, and ``state_dict`` has its ``load_state_dict``.
    """
    subject.one_class()
    member = subject.member
    order([member])
    if not member.hooks:
        yield f"{type(member.plugin).__name__} has no hook: write a method with the name of one, under @hookimpl"
    has = [hasattr(member.plugin, name) for name in ("state_dict", "load_state_dict")]
    if has[0] != has[1]:
        there, missing = ("state_dict", "load_state_dict") if has[0] else ("load_state_dict", "state_dict")
        yield f"it has {there} and no {missing}: write both, a checkpoint needs the pair"


def every_option_is_documented(subject: Subject) -> Problems:
    """Each option is a keyword with a type, a default or 'required', and a text in the section Args: of the class."""
    subject.one_class()
    target = subject.target
    if not hasattr(target, "__dataclass_fields__"):
        if len(inspect.signature(target).parameters):
            yield f"{target.__name__} takes arguments and is no dataclass: make them fields of a @dataclass(kw_only=True, eq=False)"
        return
    if not (target.__doc__ or "").strip() or target.__doc__ == _written_by_dataclass(target):
        yield f"{target.__name__} has no docstring: say in one line what it does"
    positional = [each.name for each in dataclasses.fields(target) if each.init and not each.kw_only]
    if positional:
        yield f"option {positional[0]!r} can be given by its position: write @dataclass(kw_only=True), so that options may change places"
    for option in fields_of(target):
        if not option.text:
            yield f"option {option.name!r} has no text: describe it in the section Args: of the docstring of {target.__name__}"


def _written_by_dataclass(target: Any) -> str:
    """The docstring that a dataclass without one gets."""
    return f"{target.__name__}{inspect.signature(target)}".replace(" -> None", "")


class _Wrong:
    """A value that no option takes."""

    def __repr__(self) -> str:
        return "<a value of a wrong type>"


def every_option_is_checked(subject: Subject) -> Problems:
    """A value of a wrong type is refused when a Trainer is made with it, by an error that names the option."""
    subject.one_class()
    if not fields_of(subject.target):
        raise NotApplicable("it has no options")
    hints = get_type_hints(subject.target)
    for option in fields_of(subject.target):
        if hints[option.name] in (Any, object):
            subject.notes.append(f"option {option.name!r} may be anything, so nothing can be refused")
            continue
        advice = f"give {option.name} a type that can be checked, or check it in __post_init__"
        try:
            tiny_trainer({subject.name: {**subject.options, option.name: _Wrong()}}, root_dir=subject.folder)
        except PluginError as error:
            if not re.search(rf"\b{option.name}\b", str(error).removeprefix(subject.found.label)):
                yield f"option {option.name!r} of a wrong type is refused without its name ({error}): name it in the message"
        except Exception as error:
            yield f"option {option.name!r} of a wrong type ends in {type(error).__name__}: {error}; {advice}, before it is used"
        else:
            yield f"option {option.name!r} takes a value of a wrong type: {advice}"


def built_twice_it_is_two_objects(subject: Subject) -> Problems:
    """Two instances share nothing that can change: no list, dict, tensor or other object, neither built nor after a run of one."""
    subject.one_class()
    one, other = subject.build(), subject.build()
    cls, given = type(one).__name__, list(subject.options.values())
    if one is other:
        yield f"building {cls} twice gives one object: do not keep instances"
        return
    for name, value in getattr(one, "__dict__", {}).items():
        if value is getattr(other, name, None) and _can_change(value) and not any(value is each for each in given):
            yield f"two {cls} share {name}, a {type(value).__name__}: write {name}: ... = field(default_factory={type(value).__name__})"
    subject.one_process()
    before = {name: copy.copy(value) for name, value in _of_class(subject.target)}
    subject.fit()
    for name, value in _of_class(subject.target):
        if value != before.get(name):
            yield f"a run changed {cls}.{name}, which all instances share: make it a field with a default_factory, or set it in setup"


def _of_class(cls: type) -> Iterator[tuple[str, Any]]:
    """The lists, dicts and sets of a class and those it inherits from."""
    for base in cls.__mro__[:-1]:
        yield from ((name, value) for name, value in vars(base).items() if isinstance(value, MUTABLE) and not name.startswith("__"))


def _can_change(value: Any) -> bool:
    if isinstance(value, MUTABLE):
        return True
    frozen = dataclasses.is_dataclass(value) and getattr(value, "__dataclass_params__").frozen  # noqa: B009
    return hasattr(value, "__dict__") and not callable(value) and not frozen and not isinstance(value, (ModuleType, Enum, Logger))


def it_goes_to_other_processes(subject: Subject) -> Problems:
    """It can be pickled and copied, before a run and after one: strategies send it to the processes that they start."""
    subject.one_class()
    try:
        pickle.dumps(dict(subject.options))
    except Exception as error:
        raise NotApplicable(f"its options cannot be pickled ({type(error).__name__}), so it cannot either") from None
    built = {"new": subject.build()}
    if not subject.launcher:
        built["of a run that is over"] = subject.plugin
    for when, plugin in built.items():
        makes: dict[str, Callable[[Any], Any]] = {"pickled": lambda plugin: pickle.loads(pickle.dumps(plugin)), "copied": copy.deepcopy}
        for what, make in makes.items():
            try:
                make(plugin)
            except Exception as error:
                yield (
                    f"an instance, {when}, cannot be {what} ({type(error).__name__}: {error}): let go of files, threads and functions in "
                    "teardown or on_run_end, or leave them out in __getstate__"
                )
