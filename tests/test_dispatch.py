"""Dispatch: the plain calls that the loop makes do what pluggy's own calls would do, and cost nothing where nobody listens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchplug import hookimpl
from torchplug.dispatch import dispatch, register, watch
from torchplug.members import CLOSING, OPERATIONS, PARAMETERS, Member

# one and several arguments; events, operations and actions
PLAIN_HOOKS = [
    "on_train_start", "on_train_batch_start", "log_metrics", "launch", "train_step", "move_batch", "optimizer_step", "scheduler_step",
]  # fmt: skip
ERRORS = (ValueError, KeyError, KeyboardInterrupt)


@dataclass(frozen=True)
class Step:
    """What one implementation does: the arguments it names, whether it wraps, what it answers or raises, and when."""

    takes: tuple[str, ...]
    wraps: bool
    answer: Any
    before: type[BaseException] | None = None
    after: type[BaseException] | None = None
    swallows: bool = False


@dataclass(eq=False)
class Behaviour:
    """What a plugin does in each hook, and the list to which it writes that it was called."""

    name: str
    steps: dict[str, Step]
    trace: list[Any] = field(default_factory=list)

    def plain(self, hook: str, values: dict[str, Any]) -> Any:
        step = self.steps[hook]
        self.trace.append((self.name, values))
        if step.before:
            raise step.before(self.name)
        return step.answer

    def wrapper(self, hook: str, values: dict[str, Any]) -> Iterator[Any]:
        step = self.steps[hook]
        self.trace.append((self.name, "before", values))
        if step.before:
            raise step.before(self.name)
        try:
            result = yield
        except BaseException as error:
            self.trace.append((self.name, "saw", type(error)))
            if not step.swallows:
                raise
            return step.answer
        self.trace.append((self.name, "got", result))
        if step.after:
            raise step.after(self.name)
        return result if step.answer is None else step.answer


def make_plugin(name: str, steps: dict[str, Step], trace: list[Any]) -> Any:
    """A plugin with one method for each hook in ``steps``, whose signature names just what it takes."""
    behaviour = Behaviour(name, steps, trace)
    methods: dict[str, Any] = {}
    for hook, step in steps.items():
        values = "{" + ", ".join(f"{each!r}: {each}" for each in step.takes) + "}"
        how = f"return (yield from wrapper({hook!r}, {values}))" if step.wraps else f"return plain({hook!r}, {values})"
        namespace: dict[str, Any] = {"plain": behaviour.plain, "wrapper": behaviour.wrapper}
        exec(f"def {hook}({', '.join(('self', *step.takes))}):\n    {how}", namespace)
        methods[hook] = hookimpl(wrapper=step.wraps)(namespace[hook])
    return type(name, (), methods)()


@st.composite
def steps(draw: st.DrawFn, hooks: list[str], wrappers: bool = True) -> dict[str, Step]:
    """What one plugin does: some of the hooks, each with some of its arguments in any order."""
    chosen = {}
    for hook in draw(st.lists(st.sampled_from(hooks), unique=True)):
        names = draw(st.permutations(PARAMETERS[hook]))
        chosen[hook] = Step(
            takes=tuple(names[: draw(st.integers(0, len(names)))]),
            wraps=wrappers and draw(st.booleans()),
            answer=draw(st.sampled_from([None, None, 0, False, "answer"])),
            before=draw(st.sampled_from([None, None, None, None, *ERRORS])),
            after=draw(st.sampled_from([None, None, None, *ERRORS])),
            swallows=draw(st.booleans()),
        )
    return chosen


def outcome(call: Callable[[], Any], trace: list[Any]) -> tuple[Any, Any, list[Any]]:
    """The result of ``call``, the type and text of its error, and who was called with what."""
    trace.clear()
    try:
        result, error = call(), None
    except BaseException as raised:
        result, error = None, (type(raised), str(raised))
    return result, error, list(trace)


def values_of(hook: str) -> dict[str, Any]:
    """A different value for each argument of a hook."""
    return {name: f"<{name}>" for name in PARAMETERS[hook]}


def members_of(plugins: list[dict[str, Step]], trace: list[Any]) -> list[Member]:
    return [Member(f"p{i}", make_plugin(f"p{i}", each, trace)) for i, each in enumerate(plugins)]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(steps(PLAIN_HOOKS), max_size=5))
def test_a_dispatched_call_equals_pluggys_own_call(plugins: list[dict[str, Step]]) -> None:
    trace: list[Any] = []
    manager = register(members_of(plugins, trace))
    hooks = dispatch(manager)
    for hook in PLAIN_HOOKS:
        values = values_of(hook)
        expected, error, order = outcome(lambda hook=hook, values=values: getattr(manager.hook, hook)(**values), trace)
        result, raised, called = outcome(lambda hook=hook, values=values: getattr(hooks, hook)(*values.values()), trace)
        assert (raised, called) == (error, order), hook
        if hook in OPERATIONS:  # what an event returns is ignored
            assert result == expected, hook


@settings(max_examples=100, deadline=None)
@given(st.lists(steps(PLAIN_HOOKS), max_size=5), st.sets(st.integers(0, 4)))
def test_deaf_members_miss_the_events_and_answer_operations_as_ever(plugins: list[dict[str, Step]], deaf: set[int]) -> None:
    trace: list[Any] = []
    members = members_of(plugins, trace)
    manager = register(members)
    out = [member for i, member in enumerate(members) if i in deaf]
    hooks = dispatch(manager, out)
    for hook in PLAIN_HOOKS:
        values = values_of(hook)
        caller = getattr(manager.hook, hook) if hook in OPERATIONS else manager.subset_hook_caller(hook, out)
        _, error, order = outcome(lambda caller=caller, values=values: caller(**values), trace)
        _, raised, called = outcome(lambda hook=hook, values=values: getattr(hooks, hook)(*values.values()), trace)
        assert (raised, called) == (error, order), hook


class Watcher:
    """Notes which calls began, and how many are running; they end in the order in which they must."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, str]] = []
        self.running = 0

    def enter_call(self, member: str, hook: str) -> None:
        self.begun.append((member, hook))
        self.running += 1

    def leave_call(self) -> None:
        self.running -= 1
        assert self.running >= 0


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(steps(PLAIN_HOOKS), max_size=5))
def test_a_watcher_hears_of_every_call_and_changes_nothing(plugins: list[dict[str, Step]]) -> None:
    trace: list[Any] = []
    plain, watcher, members = dispatch(register(members_of(plugins, trace))), Watcher(), members_of(plugins, trace)
    members.append(Member("watcher", watcher))
    watch(members)
    hooks = dispatch(register(members))
    for hook in PLAIN_HOOKS:
        values = values_of(hook)
        expected = outcome(lambda hook=hook, values=values: getattr(plain, hook)(*values.values()), trace)
        watcher.begun.clear()
        assert outcome(lambda hook=hook, values=values: getattr(hooks, hook)(*values.values()), trace) == expected, hook
        assert watcher.running == 0
        reached = [(entry[0], hook) for entry in expected[2]]
        assert [entry for entry in watcher.begun if entry in reached] == watcher.begun
        for name in {name for name, _ in reached}:  # a wrapper has two parts, if what it surrounds was begun
            assert watcher.begun.count((name, hook)) == reached.count((name, hook))


def test_without_a_watcher_nothing_is_there_to_be_told() -> None:
    member = Member("p", make_plugin("p", {"on_train_start": Step((), False, None)}, []))
    before = member.on_train_start  # type: ignore[attr-defined]
    watch([member])
    assert member.on_train_start is before  # type: ignore[attr-defined]


@settings(max_examples=100, deadline=None)
@given(st.lists(steps(["on_train_batch_start", "train_step"], wrappers=False), min_size=2, max_size=6))
def test_plugins_are_called_in_the_order_of_the_list(plugins: list[dict[str, Step]]) -> None:
    trace: list[Any] = []
    hooks = dispatch(register(members_of(plugins, trace)))
    for hook in ("on_train_batch_start", "train_step"):
        listeners = [(f"p{i}", each[hook]) for i, each in enumerate(plugins) if hook in each]
        reached = []
        for name, step in listeners:
            reached.append(name)
            if step.before or (hook == "train_step" and step.answer is not None):
                break
        _, _, called = outcome(lambda hook=hook: getattr(hooks, hook)(*values_of(hook).values()), trace)
        assert [name for name, _ in called] == reached


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(steps(sorted(CLOSING), wrappers=False), max_size=6))
def test_a_closing_hook_reaches_everybody_in_reverse_and_raises_the_first_error(plugins: list[dict[str, Step]]) -> None:
    trace: list[Any] = []
    hooks = dispatch(register(members_of(plugins, trace)))
    for hook in sorted(CLOSING):
        values = values_of(hook)
        listeners = [(f"p{i}", each[hook]) for i, each in enumerate(plugins) if hook in each][::-1]
        failing = [(step.before, name) for name, step in listeners if step.before]
        trace.clear()
        raised: BaseException | None = None
        try:
            getattr(hooks, hook)(*values.values())
        except BaseException as error:
            raised = error
        assert trace == [(name, {key: values[key] for key in step.takes}) for name, step in listeners]
        assert (type(raised), raised and raised.args) == ((failing[0][0], (failing[0][1],)) if failing else (type(None), None))
        notes = [note for note in getattr(raised, "__notes__", []) if note.startswith("while this error was handled")]
        assert len(notes) == max(0, len(failing) - 1)
        for note, (kind, name) in zip(notes, failing[1:], strict=True):
            assert f"{kind.__name__}: " in note and name in note


@pytest.mark.parametrize("hook", PARAMETERS)
def test_a_hook_that_nobody_implements_calls_nobody_and_returns_none(hook: str) -> None:
    calls: list[str] = []
    other = next(each for each in PARAMETERS if each != hook)
    listener = make_plugin("listener", {other: Step((), False, None)}, [])
    function = getattr(dispatch(register([Member("listener", listener)])), hook)
    values = tuple(values_of(hook).values())

    def count(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        answer = function(*values)
    finally:
        sys.setprofile(None)
    assert answer is None
    assert len(calls) == 1, "only the empty function itself may run"


@pytest.mark.parametrize("listeners", [1, 2, 5])
def test_a_listener_costs_one_call(listeners: int) -> None:
    class Listens:
        @hookimpl
        def on_train_batch_end(self, run: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            pass

    hooks = dispatch(register([Member(f"p{i}", Listens()) for i in range(listeners)]))
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        hooks.on_train_batch_end(None, None, None, 0)  # type: ignore[arg-type]
    finally:
        sys.setprofile(None)
    assert len(calls) <= listeners + 1


def test_the_first_answer_decides_and_false_is_an_answer() -> None:
    trace: list[Any] = []
    plugins = [{"optimizer_step": Step((), False, answer)} for answer in (None, False, True)]
    hooks = dispatch(register(members_of(plugins, trace)))
    assert hooks.optimizer_step("run", "optimizer", None) is False  # type: ignore[arg-type]
    assert [name for name, _ in trace] == ["p0", "p1"]


def test_dispatched_hooks_keep_no_dictionary_that_a_misspelt_name_could_go_into() -> None:
    hooks = dispatch(register([]))
    with pytest.raises(AttributeError):
        hooks.on_train_epoch_starts = print  # type: ignore[attr-defined]
