"""From what a user writes to enabled plugins, what is said when that cannot be, and what happens when a plugin fails."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch

from torchplug import PluginError, Trainer, discovery, hookimpl
from torchplug.discovery import discover
from torchplug.hookspecs import Hooks
from torchplug.plugins import build

SHOUT = '''
    from dataclasses import dataclass

    from torchplug import hookimpl

    @dataclass(kw_only=True, eq=False)
    class Shout:
        """Says a word.

        Args:
            volume: how loud.
            word: what is said.
        """

        volume: int = 1
        word: str = "hey"

        def __post_init__(self):
            if self.volume < 0:
                raise ValueError(f"volume must be at least 0, got {self.volume!r}")

        @hookimpl
        def on_train_start(self, run):
            if self.word == "fail":
                raise OSError("no voice")
'''


@pytest.fixture
def shout(package: Callable[..., Path]) -> None:
    """An installed plugin ``shout``."""
    package("torchplug-shout", SHOUT, version="1.2", shout="Shout")


@pytest.fixture
def refused() -> Callable[[list[Any]], str]:
    """Why a list of plugins is refused."""

    def why(plugins: list[Any]) -> str:
        with pytest.raises(PluginError) as caught:
            Trainer(plugins=plugins, accelerator="cpu")
        return str(caught.value)

    return why


def only_from(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Hides what is installed outside of ``folder``."""
    everything = discovery.scan

    def inside(group: str) -> tuple[list[discovery.Found], list[str]]:
        found, unreadable = everything(group)
        return [each for each in found if each.folder.startswith(str(folder))], unreadable

    monkeypatch.setattr(discovery, "scan", inside)


def test_names_mappings_and_objects_are_built_alike(shout: None) -> None:
    import torchplug_shout

    plugins = Trainer(
        plugins=["shout", {"shout:loud": {"volume": 3}}, {"shout:none": None}, {"mine": torchplug_shout.Shout(volume=3)}]
    ).enabled
    assert list(plugins) == ["shout", "shout:loud", "shout:none", "mine"]
    assert [type(each) for each in plugins.values()] == [torchplug_shout.Shout] * 4
    assert [(each.volume, each.word) for each in plugins.values()] == [(1, "hey"), (3, "hey"), (1, "hey"), (3, "hey")]


def test_an_object_takes_the_name_and_package_of_its_entry_point(shout: None) -> None:
    import torchplug_shout

    (member,) = build([torchplug_shout.Shout()])
    assert member.label == "plugin 'shout' (torchplug-shout 1.2)"


def test_an_object_without_an_entry_point_is_called_after_its_class() -> None:
    class HTTPLogger:
        pass

    class MyOwnThing:
        pass

    assert list(Trainer(plugins=[HTTPLogger(), MyOwnThing()]).enabled) == ["http_logger", "my_own_thing"]


def test_the_users_own_list_is_not_touched(shout: None, tiny: Any, trainer: Any) -> None:
    options = {"volume": 2, "on_error": "abort"}
    mine = ["shout", {"shout:b": options}]
    trained = trainer(plugins=mine)
    trained.fit(tiny(val=0))
    assert mine == ["shout", {"shout:b": options}]
    assert options == {"volume": 2, "on_error": "abort"}
    assert trained.plugins is not mine


def test_one_object_may_take_part_in_several_runs_and_trainers(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    recorder = make_recorder("setup")
    for _ in range(2):
        two = trainer(plugins=[recorder])
        two.fit(tiny(val=0))
        two.fit(tiny(val=0))
    assert recorder.names == ["setup"] * 4


def test_two_instances_have_names_states_and_options_of_their_own(shout: None, tiny: Any, trainer: Any) -> None:
    trained = trainer(plugins=[{"shout:a": {"word": "a"}}, {"shout:b": {"word": "b"}}])
    trained.fit(tiny(val=0))
    assert {name: each.word for name, each in trained.run.plugins.items()} == {"shout:a": "a", "shout:b": "b"}
    assert trained.run.packages == dict.fromkeys(("shout:a", "shout:b"), "torchplug-shout 1.2")


def test_equal_objects_are_two_plugins(tiny: Any, trainer: Any) -> None:
    calls = []

    @dataclass  # with __eq__, and so without __hash__
    class Equal:
        x: int = 1

        @hookimpl
        def on_train_start(self) -> None:
            calls.append(id(self))

    first, second = Equal(), Equal()
    trainer(plugins=[{"a": first}, {"b": second}]).fit(tiny(val=0))
    assert calls == [id(first), id(second)]


def test_the_properties_of_a_plugin_are_not_read_when_it_is_registered(tiny: Any, trainer: Any) -> None:
    class Careful:
        @property
        def experiment(self) -> Any:
            raise AssertionError("was read")

        @property
        def on_something(self) -> Any:
            raise AssertionError("was read")

        @hookimpl
        def on_train_start(self) -> None:
            pass

    trainer(plugins=[Careful()]).fit(tiny(val=0))


def test_a_plugin_may_inherit_from_hooks_and_implements_what_it_marks(tiny: Any, trainer: Any) -> None:
    calls = []

    class Typed(Hooks):
        @hookimpl
        def on_train_start(self, run: Any) -> None:
            calls.append("start")

    trainer(plugins=[Typed()]).fit(tiny(val=0))
    assert calls == ["start"]


def test_a_hook_set_to_none_on_the_object_is_not_implemented(tiny: Any, trainer: Any) -> None:
    class Sometimes:
        def __init__(self) -> None:
            self.on_train_start = None

        @hookimpl
        def on_train_start(self) -> None:
            raise AssertionError("was called")

    trainer(plugins=[Sometimes()]).fit(tiny(val=0))


def test_what_an_accelerator_or_strategy_names_is_a_plugin_with_options(shout: None) -> None:
    assert Trainer(strategy={"shout": {"volume": 5}}, plugins=[], accelerator="cpu").enabled["shout"].volume == 5
    assert list(Trainer(strategy="shout", plugins=["shout"], accelerator="cpu").enabled) == ["shout"]
    with pytest.raises(PluginError, match=r"plugin 'warp' is not installed.*pip install torchplug-warp"):
        Trainer(accelerator="warp", plugins=[])


def test_plugins_that_a_module_brings_take_part(shout: None, tiny: Any, trainer: Any) -> None:
    class Brings(tiny.Module):
        def configure_plugins(self) -> list[Any]:
            return [{"shout": {"volume": 7}}]

    trained = trainer()
    trained.fit(Brings(val=0))
    assert trained.run.plugins["shout"].volume == 7
    with pytest.raises(PluginError) as caught:
        trainer(plugins=["shout"]).fit(Brings(val=0))
    assert str(caught.value) == "plugin 'shout' (torchplug-shout 1.2): named in Trainer and brought by Brings.configure_plugins()"


# ---------------------------------------------------------------------- bundles


def test_a_bundle_stands_for_its_plugins(shout: None, package: Any) -> None:
    package("torchplug-pair", "names = ['shout', {'shout:b': {'volume': 2}}]", pair="names")
    assert list(Trainer(plugins=["pair"]).enabled) == ["shout", "shout:b"]


def test_a_plugin_of_a_bundle_gives_way_to_the_users_own(shout: None, package: Any) -> None:
    package("torchplug-pair", "names = ['shout']", pair="names")
    options = {"volume": 4}
    for plugins in (["pair", {"shout": options}], [{"shout": options}, "pair"], ["pair", {"torchplug-shout/shout": options}]):
        assert [(name, each.volume) for name, each in Trainer(plugins=plugins).enabled.items()] == [("shout", 4)]


def test_a_bundle_takes_no_options(shout: None, package: Any, refused: Any) -> None:
    package("torchplug-pair", "names = ['shout']", pair="names")
    assert refused([{"pair": {"volume": 2}}]) == "plugin 'pair' is a bundle of shout and takes no options; name its plugins instead"


def test_without_plugins_the_trainer_takes_the_bundle_standard(
    shout: None, package: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package("torchplug-standard", "names = ['shout']", standard="names")
    only_from(monkeypatch, tmp_path)
    assert list(Trainer(accelerator="cpu").enabled) == ["shout"]
    assert Trainer(plugins=[], accelerator="cpu").enabled == {}


def test_without_the_bundle_installed_it_trains_bare_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only_from(monkeypatch, tmp_path)
    assert Trainer(accelerator="cpu").enabled == {}
    assert caplog.messages == ["trains without plugins: pip install torchplug-standard for progress, checkpoints and logs"]


# ---------------------------------------------------------------------- what cannot be found


def test_a_misspelt_plugin_is_answered_with_the_closest_name(shout: None, refused: Any) -> None:
    text = refused(["shuot"])
    assert text.startswith("plugin 'shuot' is not installed, did you mean 'shout'?")
    assert re.search(r"\(installed plugins: .*\bshout\b.*\)$", text)


def test_a_plugin_that_is_not_installed_is_answered_with_the_pip_line(refused: Any) -> None:
    text = refused([{"quantum_annealing": {"x": 1}}])
    assert text.startswith("plugin 'quantum_annealing' is not installed; ")
    assert "pip install torchplug-quantum-annealing " in text


def test_nothing_is_installed_is_said_too(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_from(monkeypatch, tmp_path)
    assert refused(["shout"]).endswith("pip install torchplug-shout (installed plugins: none)")


def test_two_packages_with_one_name_are_an_error_that_lists_both(shout: None, package: Any, refused: Any) -> None:
    package("acme-shout", SHOUT, version="0.9", shout="Shout")
    text = refused(["shout"])
    assert text == "plugin 'shout' is provided by acme-shout 0.9 and torchplug-shout 1.2: write 'acme-shout/shout' to take the first"


def test_the_name_of_the_package_picks_one_of_two(shout: None, package: Any) -> None:
    package("acme-shout", SHOUT, version="0.9", shout="Shout")
    for plugins in (["acme-shout/shout"], [{"acme-shout/shout": {"volume": 2}}]):
        (member,) = build(plugins)
        assert (member.name, member.label) == ("shout", "plugin 'shout' (acme-shout 0.9)")
        assert type(member.plugin).__module__ == "acme_shout"
    (member,) = build(["torchplug-shout/shout:b"])
    assert member.label == "plugin 'shout:b' (torchplug-shout 1.2)"


def test_a_package_that_does_not_have_the_plugin_is_not_taken(shout: None, refused: Any) -> None:
    assert refused(["acme-shout/shout"]).startswith("plugin 'acme-shout/shout' is not installed")


def test_installed_plugins_are_listed_by_name_and_package(
    shout: None, package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for distribution, name in (("zeta-shout", "shout"), ("torchplug-alpha", "alpha"), ("alpha-zeta", "zeta")):
        package(distribution, SHOUT, **{name: "Shout"})
    only_from(monkeypatch, tmp_path)
    assert [(each.name, each.distribution) for each in discover()] == [
        ("alpha", "torchplug-alpha"), ("shout", "torchplug-shout"), ("shout", "zeta-shout"), ("zeta", "alpha-zeta"),
    ]  # fmt: skip


def test_a_package_that_cannot_be_imported_is_named(package: Any, refused: Any) -> None:
    package("torchplug-broken", "import no_such_module_anywhere", broken="Broken")
    assert refused(["broken"]) == (
        "plugin 'broken' (torchplug-broken 1.0): torchplug_broken:Broken cannot be imported: "
        "there is no module 'no_such_module_anywhere': pip install what 'no_such_module_anywhere' is part of"
    )


def test_an_entry_point_that_points_nowhere_is_named(package: Any, refused: Any) -> None:
    package("torchplug-empty", "x = 1", empty="Empty", number="x")
    assert refused(["empty"]).startswith("plugin 'empty' (torchplug-empty 1.0): torchplug_empty:Empty cannot be imported: AttributeError")
    assert refused(["number"]) == (
        "plugin 'number' (torchplug-empty 1.0): its entry point torchplug_empty:x must be a class or a list of names, got int"
    )


def test_discovery_reads_metadata_alone(package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package("torchplug-boom", "raise RuntimeError('imported')", version="3.1", boom="Boom")
    only_from(monkeypatch, tmp_path)
    assert [(each.name, each.value, each.distribution, each.version) for each in discover()] == [
        ("boom", "torchplug_boom:Boom", "torchplug-boom", "3.1")
    ]


# ---------------------------------------------------------------------- what cannot be built


def test_a_misspelt_option_is_answered_with_the_closest_one(shout: None, refused: Any) -> None:
    assert refused([{"shout": {"volum": 3}}]) == (
        "plugin 'shout' (torchplug-shout 1.2): no option 'volum', did you mean 'volume'? (options: volume, word, on_error)"
    )


def test_an_option_of_another_type_is_named(shout: None, refused: Any) -> None:
    assert refused([{"shout": {"volume": "3"}}]).startswith("plugin 'shout' (torchplug-shout 1.2): ")
    assert refused([{"shout:b": {"word": 3}}]) == "plugin 'shout:b' (torchplug-shout 1.2): word must be a str, got 3"


def test_an_option_out_of_range_is_named(shout: None, refused: Any) -> None:
    assert refused([{"shout": {"volume": -1}}]) == "plugin 'shout' (torchplug-shout 1.2): volume must be at least 0, got -1"


def test_an_option_that_is_required_is_named(package: Any, refused: Any) -> None:
    source = "from dataclasses import dataclass\n@dataclass(kw_only=True)\nclass Needs:\n    path: str\n"
    package("torchplug-needs", source, needs="Needs")
    text = refused(["needs"])
    assert text.startswith("plugin 'needs' (torchplug-needs 1.0): ") and "'path'" in text


def test_a_class_in_place_of_an_object_is_refused(refused: Any) -> None:
    class Thing:
        pass

    assert refused([Thing]) == "plugin Thing: got the class, have you forgotten the ()?"
    assert refused([{"mine": Thing}]) == "plugin 'mine': got the class Thing, have you forgotten the ()?"


def test_a_plugin_named_twice_is_refused_and_shown_how_to_name_both(shout: None, refused: Any) -> None:
    text = refused(["shout", {"shout": {"volume": 2}}])
    assert text.startswith("plugin 'shout' (torchplug-shout 1.2): named twice; give the instances names of their own: ")
    assert "{'shout:a': ...}, {'shout:b': ...}" in text


def test_a_mapping_of_several_plugins_is_refused(shout: None, refused: Any) -> None:
    text = refused([{"shout": {}, "shout:b": {}}])
    assert text == ("plugins takes names, {name: options} with one name each, and objects, got {'shout': {}, 'shout:b': {}}")


@pytest.mark.parametrize("value", [5, None, 1.5, print])
def test_a_plain_value_is_no_plugin(value: Any, refused: Any) -> None:
    assert f"got {value!r}" in refused([value])


def test_a_plain_value_stands_for_no_options(shout: None, refused: Any) -> None:
    assert refused([{"shout": True}]).endswith("got True")


def test_the_name_of_a_plugin_is_a_text(refused: Any) -> None:
    assert "got 3 as a name" in refused([{3: {}}])


@pytest.mark.parametrize("wishes", [{"after": 5}, {"before": ("a", 3)}])
def test_before_and_after_are_names(wishes: dict[str, Any], refused: Any) -> None:
    (which,) = wishes
    assert refused([_with(**wishes)]) == f"plugin 'thing': {which} must be a name or several, got {wishes[which]!r}"


@pytest.mark.parametrize("name", ["core", "TinyModule"])
def test_a_plugin_may_have_any_name(name: str, tiny: Any, trainer: Any, make_recorder: Any) -> None:
    recorder = make_recorder("on_train_start")
    trainer(plugins=[{name: recorder}]).fit(tiny(val=0))
    assert recorder.names == ["on_train_start"]


# ---------------------------------------------------------------------- what is no hook


def _with(**methods: Any) -> Any:
    return type("Thing", (), methods)()


def test_a_misspelt_hook_is_answered_with_the_closest_one(refused: Any) -> None:
    def on_train_strat(self: Any) -> None: ...

    expected = "plugin 'thing': Thing.on_train_strat is not a hook, did you mean 'on_train_start'?"
    assert refused([_with(on_train_strat=hookimpl(on_train_strat))]) == expected
    assert refused([_with(on_train_strat=on_train_strat)]) == expected  # the prefix says what was meant


def test_a_marked_method_that_is_no_hook_is_refused_whatever_its_name(refused: Any) -> None:
    def frobnicate(self: Any) -> None: ...

    assert refused([_with(frobnicate=hookimpl(frobnicate))]) == "plugin 'thing': Thing.frobnicate is not a hook"


def test_a_forgotten_hookimpl_is_an_error(refused: Any) -> None:
    def on_train_start(self: Any) -> None: ...

    expected = "plugin 'thing': Thing.on_train_start has the name of a hook but no @hookimpl; add it, or rename"
    assert refused([_with(on_train_start=on_train_start)]) == expected


def test_an_unknown_argument_is_answered_with_those_that_there_are(refused: Any) -> None:
    def on_train_batch_start(self: Any, run: Any, bach: Any) -> None: ...

    assert refused([_with(on_train_batch_start=hookimpl(on_train_batch_start))]) == (
        "plugin 'thing': Thing.on_train_batch_start: the hook has no argument 'bach', did you mean 'batch'? (it has: run, batch, batch_idx)"
    )


def test_arguments_with_a_default_or_by_keyword_only_are_refused(refused: Any) -> None:
    def default(self: Any, run: Any = None) -> None: ...

    def keyword(self: Any, *, run: Any) -> None: ...

    for method in (default, keyword):
        assert refused([_with(on_train_start=hookimpl(method))]) == (
            "plugin 'thing': Thing.on_train_start: argument 'run' must be plain, without a default and not keyword-only"
        )


def test_starred_arguments_are_refused(refused: Any) -> None:
    def stars(self: Any, **options: Any) -> None: ...

    assert "the hook has no argument 'options'" in refused([_with(on_train_start=hookimpl(stars))])


def test_methods_that_could_never_do_their_work_are_refused(refused: Any) -> None:
    def forgot_wrapper(self: Any, run: Any) -> Any:
        yield

    async def awaits(self: Any, run: Any) -> None: ...

    def plain(run: Any) -> None: ...

    for method in (forgot_wrapper, awaits):
        assert refused([_with(on_train_start=hookimpl(method))]).startswith("plugin 'thing': Thing.on_train_start")
    for kind in (staticmethod, classmethod):
        assert refused([_with(on_train_start=kind(hookimpl(plain)))]).startswith("plugin 'thing': Thing.on_train_start")


def test_a_wrapper_that_does_not_yield_is_refused(refused: Any) -> None:
    def train_step(self: Any) -> None: ...

    text = refused([_with(train_step=hookimpl(wrapper=True)(train_step))])
    assert text == "plugin 'thing': Thing.train_step: a wrapper must yield once"


def test_a_closing_hook_cannot_be_wrapped(refused: Any) -> None:
    def teardown(self: Any) -> Any:
        yield

    text = refused([_with(teardown=hookimpl(wrapper=True)(teardown))])
    assert text == "plugin 'thing': Thing.teardown: teardown reaches every plugin and cannot be wrapped"


@pytest.mark.parametrize("option", [{"tryfirst": True}, {"trylast": True}, {"optionalhook": True}, {"specname": "on_fit_start"}])
def test_pluggys_other_ways_to_order_and_rename_are_refused(option: dict[str, Any], refused: Any) -> None:
    def on_train_start(self: Any) -> None: ...

    marked = pluggy.HookimplMarker("torchplug")(**option)(on_train_start)
    assert refused([_with(on_train_start=marked)]) == (
        "plugin 'thing': Thing.on_train_start: only wrapper=True is used in @hookimpl; order is said by before and after"
    )


def test_a_misspelt_hook_in_the_module_is_named_when_the_run_begins(tiny: Any, trainer: Any) -> None:
    class Mine(tiny.Module):
        def on_train_epoch_ends(self) -> None: ...

    with pytest.raises((PluginError, TypeError), match=r"Mine\.on_train_epoch_ends is not a hook, did you mean 'on_train_epoch_end'\?"):
        trainer().fit(Mine())


# ---------------------------------------------------------------------- on_error


class Observer:
    """Fails from a batch on; only observes."""

    on_error = "disable"

    def __init__(self, batch: int = 1) -> None:
        self.batch, self.calls = batch, []

    @hookimpl
    def on_train_batch_end(self, batch_idx: int) -> None:
        self.calls.append(batch_idx)
        if batch_idx == self.batch:
            raise OSError("disk is full")

    @hookimpl
    def on_run_end(self) -> None:
        self.calls.append("end")


def test_an_observer_that_fails_is_switched_off_with_one_loud_line_and_training_goes_on(
    tiny: Any, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    observer, alone = Observer(), tiny(train=4, val=0)
    trainer(max_epochs=2).fit(alone)
    caplog.clear()
    observed = tiny(train=4, val=0)
    trainer(max_epochs=2, plugins=[observer]).fit(observed)
    assert observer.calls == [0, 1, "end"]  # not called again, except to say goodbye
    for a, b in zip(alone.parameters(), observed.parameters(), strict=True):
        assert torch.equal(a, b)
    loud = [record for record in caplog.records if record.levelno >= logging.ERROR]
    failed, repeated = (record.getMessage() for record in loud)
    assert failed == ("plugin 'observer' failed in on_train_batch_end and is switched off, training goes on: OSError: disk is full")
    assert loud[0].exc_info is not None
    assert repeated == "plugin 'observer' was switched off: OSError in on_train_batch_end at step 2: disk is full"
    assert caplog.records[-1] is loud[1]


def test_a_plugin_that_was_switched_off_is_back_in_the_next_run(tiny: Any, trainer: Any) -> None:
    observer = Observer()
    again = trainer(plugins=[observer])
    again.fit(tiny(val=0))
    observer.calls.clear()
    again.fit(tiny(val=0))
    assert observer.calls == [0, 1, "end"]


def test_an_observer_that_fails_at_the_very_end_is_reported_and_does_not_end_the_run(
    tiny: Any, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class FailsLate:
        on_error = "disable"

        @hookimpl
        def on_run_end(self) -> None:
            raise OSError("cannot close")

    trainer(plugins=[FailsLate()]).fit(tiny(val=0))
    assert "plugin 'fails_late' was switched off: OSError in on_run_end at step 4: cannot close" in caplog.messages


def test_ctrl_c_inside_an_observer_ends_the_run_all_the_same(tiny: Any, trainer: Any) -> None:
    class Slow:
        on_error = "disable"

        @hookimpl
        def on_train_start(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(plugins=[Slow()]).fit(tiny(val=0))


def test_an_error_keeps_type_and_traceback_and_gets_a_note_of_who_raised_it(shout: None, tiny: Any, trainer: Any) -> None:
    with pytest.raises(OSError) as caught:
        trainer(plugins=[{"shout:b": {"word": "fail"}}]).fit(tiny(val=0))
    assert (type(caught.value), str(caught.value)) == (OSError, "no voice")
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "on_train_start"
    assert "raised by plugin 'shout:b' (torchplug-shout 1.2) in on_train_start, rank 0" in caught.value.__notes__


def test_the_note_names_the_plugin_behind_a_decorator_too(tiny: Any, trainer: Any) -> None:
    class NoGrad:
        @hookimpl
        @torch.no_grad()
        def on_train_start(self, run: Any) -> None:
            raise ValueError("inside")

    with pytest.raises(ValueError) as caught:
        trainer(plugins=[NoGrad()]).fit(tiny(val=0))
    assert "raised by plugin 'no_grad' in on_train_start, rank 0" in caught.value.__notes__


def test_the_note_names_the_instance_whose_call_failed_and_not_its_twin(shout: None, tiny: Any, trainer: Any) -> None:
    with pytest.raises(OSError) as caught:
        trainer(plugins=["shout", {"shout:b": {"word": "fail"}}, "shout:c"]).fit(tiny(val=0))
    assert [note for note in caught.value.__notes__ if "raised by" in note] == [
        "raised by plugin 'shout:b' (torchplug-shout 1.2) in on_train_start, rank 0"
    ]


def test_the_note_names_the_inner_plugin_when_one_called_another(tiny: Any, trainer: Any, tmp_path: Path) -> None:
    class Outer:
        @hookimpl
        def on_train_end(self, run: Any) -> None:
            run.log_text("a", "b")

    class Inner:
        @hookimpl
        def log_text(self, name: str, text: str) -> None:
            raise ValueError("inner")

    with pytest.raises(ValueError) as caught:
        trainer(plugins=[Inner(), Outer()]).fit(tiny(val=0))
    assert "raised by plugin 'inner' in log_text, rank 0" in caught.value.__notes__


def test_an_error_in_the_users_own_step_is_not_blamed_on_core(tiny: Any, trainer: Any) -> None:
    class Wrong(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("my own mistake")

    with pytest.raises(ValueError) as caught:
        trainer().fit(Wrong(val=0))
    assert not any("raised by core" in note for note in caught.value.__notes__)
    assert "while in stage train: epoch 0, batch 0, step 0" in caught.value.__notes__


def test_the_user_may_make_an_acting_plugin_an_observer_and_the_other_way_round(
    shout: None, package: Any, tiny: Any, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(plugins=[{"shout": {"word": "fail", "on_error": "disable"}}]).fit(tiny(val=0))
    assert "plugin 'shout' (torchplug-shout 1.2) was switched off: OSError in on_train_start at step 0: no voice" in caplog.messages
    package("torchplug-mild", SHOUT + '        on_error = "disable"\n', mild="Shout")
    trainer(plugins=[{"mild": {"word": "fail"}}]).fit(tiny(val=0))
    with pytest.raises(OSError, match="no voice"):
        trainer(plugins=[{"mild": {"word": "fail", "on_error": "abort"}}]).fit(tiny(val=0))


def test_on_error_has_two_values(shout: None, refused: Any) -> None:
    assert refused([{"shout": {"on_error": "ignore"}}]) == (
        "plugin 'shout' (torchplug-shout 1.2): on_error must be 'abort' or 'disable', got 'ignore'"
    )


def test_a_plugin_that_answers_or_wraps_cannot_be_switched_off(refused: Any) -> None:
    def train_step(self: Any) -> None: ...

    def wraps(self: Any) -> Any:
        yield

    ending = "; write on_error='abort'"
    answers = refused([_with(on_error="disable", train_step=hookimpl(train_step))])
    assert answers == f"plugin 'thing': on_error='disable' is for plugins that only observe, but train_step is an operation{ending}"
    text = refused([_with(on_error="disable", evaluate=hookimpl(wrapper=True)(wraps))])
    assert text == f"plugin 'thing': on_error='disable' is for plugins that only observe, but evaluate wraps an operation{ending}"
