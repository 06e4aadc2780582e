"""The one order of plugins: what ``before`` and ``after`` say, else what the user wrote, whatever was installed first."""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchplug import PluginError, hookimpl
from torchplug.members import Member
from torchplug.ordering import order
from torchplug.plugins import build


def member(name: str, **wishes: Any) -> Member:
    """A plugin called ``name`` with ``before`` and ``after`` as given."""
    return Member(name, type("Wishes", (), wishes)())


def ordered(*members: Member) -> list[str]:
    return [each.name for each in order(members)]


# a small package: five plugins, one order
CHAIN = {"alpha": (), "beta": ("alpha",), "gamma": ("beta",), "delta": ("gamma",), "last": ("*",)}


@pytest.mark.parametrize("seed", range(50))
def test_the_order_is_the_same_whatever_the_order_of_installation_and_listing(
    seed: int, package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffle = random.Random(seed)
    folders = []
    for name, after in shuffle.sample(list(CHAIN.items()), len(CHAIN)):
        source = f"class Plugin:\n    after = {after!r}\n"
        folders.append(str(package(f"torchplug-{name}-{seed}", source, **{name: "Plugin"})))
    others = [each for each in sys.path if each not in folders]
    monkeypatch.setattr(sys, "path", [*shuffle.sample(folders, len(folders)), *others])
    listed = shuffle.sample(list(CHAIN), len(CHAIN))
    assert ordered(*build(listed)) == list(CHAIN)


@pytest.mark.parametrize("seed", range(5))
def test_a_run_calls_plugins_in_that_order_and_tears_them_down_in_reverse(seed: int, tiny: Any, trainer: Any) -> None:
    calls: list[str] = []

    class Tells:
        def __init__(self, name: str, after: tuple[str, ...]) -> None:
            self.name, self.after = name, after

        @hookimpl
        def setup(self) -> None:
            calls.append(f"setup {self.name}")

        @hookimpl
        def on_train_batch_start(self) -> None:
            calls.append(f"batch {self.name}")

        @hookimpl
        def teardown(self) -> None:
            calls.append(f"teardown {self.name}")

    plugins: list[Any] = [{name: Tells(name, after)} for name, after in CHAIN.items()]
    random.Random(seed).shuffle(plugins)
    trainer(plugins=plugins).fit(tiny(train=1, val=0))
    assert calls == [
        *(f"setup {name}" for name in CHAIN), *(f"batch {name}" for name in CHAIN), *(f"teardown {name}" for name in reversed(CHAIN)),
    ]  # fmt: skip


# ---------------------------------------------------------------------- before and after


def test_plugins_without_wishes_stay_as_the_user_wrote_them() -> None:
    assert ordered(member("c"), member("a"), member("b")) == ["c", "a", "b"]


def test_after_and_before_move_no_more_than_they_must() -> None:
    assert ordered(member("a", after="c"), member("b"), member("c"), member("d")) == ["b", "c", "a", "d"]
    assert ordered(member("a"), member("b"), member("c", before=("a",))) == ["b", "c", "a"]


def test_names_that_are_not_enabled_are_ignored() -> None:
    assert ordered(member("b", after=("absent", "a"), before=("gone",)), member("a")) == ["a", "b"]


def test_a_text_and_a_tuple_say_the_same() -> None:
    assert ordered(member("b", after="a"), member("a")) == ordered(member("b", after=("a",)), member("a")) == ["a", "b"]


def test_a_star_means_all_others() -> None:
    assert ordered(member("last", after="*"), member("a"), member("b")) == ["a", "b", "last"]
    assert ordered(member("a"), member("b"), member("first", before=("*",))) == ["first", "a", "b"]


def test_two_stars_stay_as_the_user_wrote_them() -> None:
    assert ordered(member("y", after="*"), member("a"), member("x", after="*")) == ["a", "y", "x"]
    assert ordered(member("a"), member("y", before="*"), member("x", before="*")) == ["y", "x", "a"]


def test_a_star_gives_way_to_a_name() -> None:
    assert ordered(member("upload", after="checkpoint"), member("checkpoint", after="*"), member("a")) == ["a", "checkpoint", "upload"]
    assert ordered(member("first", before="*"), member("a"), member("earlier", before="first")) == ["earlier", "first", "a"]


def test_a_star_gives_way_to_a_chain_of_names() -> None:
    members = member("notify", after="upload"), member("upload", after="checkpoint"), member("checkpoint", after="*"), member("a")
    assert ordered(*members) == ["a", "checkpoint", "upload", "notify"]
    members = member("a"), member("first", before="*"), member("earlier", before="first"), member("earliest", before="earlier")
    assert ordered(*members) == ["earliest", "earlier", "first", "a"]


def test_a_plugin_may_ask_for_an_instance_or_for_all_instances_of_a_name() -> None:
    instances = member("checkpoint:a"), member("checkpoint:b")
    assert ordered(member("x", after="checkpoint:a"), *instances) == ["checkpoint:a", "x", "checkpoint:b"]
    assert ordered(member("x", after="checkpoint"), *instances) == ["checkpoint:a", "checkpoint:b", "x"]


def test_each_member_knows_the_rule_that_placed_it() -> None:
    rules = {each.name: each.rule for each in order([member("b", after="a"), member("a"), member("z", after="*")])}
    assert rules == {"a": "as listed", "b": "b says after='a'", "z": "z says after='*'"}


# ---------------------------------------------------------------------- cycles


def test_a_cycle_is_printed_with_the_wishes_that_make_it() -> None:
    members = [member("a", after="c"), member("b", after="a"), member("x", after="b"), member("c", before=(), after="b")]
    with pytest.raises(PluginError) as caught:
        order(members)
    assert str(caught.value) == (
        "plugins ask for an order that cannot be: a -> b -> c -> a (b says after='a'; c says after='b'; a says after='c')"
    )


def test_before_and_after_that_contradict_each_other_are_a_cycle() -> None:
    with pytest.raises(PluginError, match=r"cannot be: a -> b -> a \(b says after='a'; b says before='a'\)"):
        order([member("a"), member("b", before="a", after="a")])


def test_a_cycle_is_an_error_when_the_trainer_is_built(trainer: Any) -> None:
    class A:
        after = ("b",)

    class B:
        after = ("a",)

    with pytest.raises(PluginError, match="plugins ask for an order that cannot be: b -> a -> b"):
        trainer(plugins=[B(), A()])


# ---------------------------------------------------------------------- properties

NAMES = ["a", "b", "c", "d", "e", "f"]


@st.composite
def wishes(draw: st.DrawFn) -> dict[str, tuple[str, ...]]:
    """For each name the earlier letters that it wants to come after: no cycle."""
    return {name: tuple(draw(st.lists(st.sampled_from(NAMES[:i]), max_size=2))) if i else () for i, name in enumerate(NAMES)}


@given(wishes(), st.sets(st.sampled_from(NAMES)), st.permutations(NAMES))
def test_what_is_asked_by_name_holds_and_stars_never_make_a_cycle(
    after: dict[str, tuple[str, ...]], stars: set[str], listed: list[str]
) -> None:
    result = ordered(*(member(name, after=(*after[name], "absent", *(["*"] if name in stars else []))) for name in listed))
    assert sorted(result) == NAMES
    for name, others in after.items():
        assert all(result.index(other) < result.index(name) for other in others)
    led = stars | _followers(after, stars)
    for star in stars:  # after everybody who did not ask to come after a star
        assert all(result.index(other) < result.index(star) for other in NAMES if other not in led)


def _followers(after: dict[str, tuple[str, ...]], stars: set[str]) -> set[str]:
    """Who asked by name, directly or through others, to come after one of ``stars``."""
    found: set[str] = set()
    for name in NAMES:
        if any(other in stars or other in found for other in after[name]):
            found.add(name)
    return found


@given(wishes(), st.permutations(NAMES))
def test_the_order_of_the_list_decides_wherever_wishes_leave_it_open(after: dict[str, tuple[str, ...]], listed: list[str]) -> None:
    result = ordered(*(member(name, after=after[name]) for name in listed))
    for first, second in pairwise(result):
        assert listed.index(first) < listed.index(second) or first in after[second]


@given(wishes(), st.permutations(NAMES))
def test_before_says_the_same_as_after_seen_from_the_other_side(after: dict[str, tuple[str, ...]], listed: list[str]) -> None:
    mirrored = {name: tuple(other for other in NAMES if name in after[other]) for name in NAMES}
    by_after = ordered(*(member(name, after=after[name]) for name in listed))
    assert ordered(*(member(name, before=mirrored[name]) for name in listed)) == by_after
