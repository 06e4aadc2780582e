"""Whatever goes wrong, and wherever: everybody is told that it is over, and the first error is the one that is raised."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchplug import DataModule, hookimpl
from torchplug.members import CLOSING, OPERATIONS, PARAMETERS

EVENTS = [hook for hook in PARAMETERS if hook not in OPERATIONS]


class Boom(Exception):
    """What the plugins below raise."""


class Listener:
    """Writes down that it was torn down and what it heard at the end."""

    def __init__(self, name: str, heard: list[Any]) -> None:
        self.name, self.heard = name, heard

    @hookimpl
    def on_fit_end(self, exception: Any) -> None:
        self.heard.append((self.name, "fit end", exception))

    @hookimpl
    def teardown(self) -> None:
        self.heard.append((self.name, "teardown", None))

    @hookimpl
    def on_run_end(self, status: str) -> None:
        self.heard.append((self.name, "end", status))


def failing(hook: str, name: str, heard: list[Any], error: BaseException, **attributes: Any) -> Any:
    """A listener that raises ``error`` in ``hook``."""

    def fails(self: Any) -> None:
        raise error

    return type("Failing", (Listener,), {hook: hookimpl(fails), **attributes})(name, heard)


class Busy:
    """Does everything that a plugin can ask of a run, so that every hook fires."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @hookimpl
    def on_train_batch_end(self, run: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            path = run.save_checkpoint(self.folder / "busy.safetensors")
            run.log_figure("figure", SimpleNamespace(savefig=print))
            run.log_text("text", "hello")
            run.log_artifact(path)
            run.remove_checkpoint(path, "no longer needed")
        if batch_idx == 3:
            run.request_stop("enough")


class Data(DataModule):
    """No data, but a data module that hears of the end."""

    def __init__(self, heard: list[Any]) -> None:
        super().__init__()
        self.heard = heard

    def teardown(self, stage: str) -> None:
        self.heard.append(("data", "teardown", None))


@pytest.fixture
def scene(rich: type, trainer: Any, tmp_path: Path) -> Any:
    """A function that runs whatever makes ``hook`` fire, with ``plugin`` between two listeners."""

    class Scene(rich):  # type: ignore[misc, valid-type]
        def __init__(self, heard: list[Any], fails: bool) -> None:
            super().__init__()
            self.heard, self.fails = heard, fails

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.fails:
                raise MemoryError("no memory left")
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

        def teardown(self) -> None:
            self.heard.append(("module", "teardown", None))

    def run(hook: str, plugin: Any, heard: list[Any]) -> None:
        module, data = Scene(heard, hook in ("on_exception", "on_out_of_memory")), Data(heard)
        work, options = "fit", {}
        if "checkpoint" in hook and "load" in hook:
            work, options = "test", {"ckpt_path": _written(module, data, trainer, tmp_path)}
        elif "test" in hook or "predict" in hook:
            work = "test" if "test" in hook else "predict"
        elif hook == "tune":
            work = "tune"
        heard.clear()
        plugins = [{"first": Listener("first", heard)}, {"middle": plugin}, {"last": Listener("last", heard)}, Busy(tmp_path)]
        it = trainer(plugins=plugins, num_sanity_val_steps=1, log_every_n_steps=1, max_epochs=2)
        getattr(it, work)(module, datamodule=data, **options)

    return run


def _written(module: Any, data: Any, trainer: Any, folder: Path) -> Path:
    """A checkpoint of ``module``."""

    class Writes:
        @hookimpl
        def on_train_end(self, run: Any) -> None:
            run.save_checkpoint(folder / "written.safetensors")

    trainer(plugins=[Writes()]).fit(module, datamodule=data)
    return folder / "written.safetensors"


TORN_DOWN = ["last", "middle", "first", "module", "data"]


BEFORE = ("find_checkpoints", "load_checkpoint")  # a run begins when it is known what it starts from


AMONG_RANKS = ("reduce", "gather", "broadcast", "barrier")  # asked for where there are several processes


@pytest.mark.parametrize("hook", [hook for hook in PARAMETERS if hook not in (*BEFORE, *AMONG_RANKS)])
def test_after_an_error_in_a_hook_everybody_is_torn_down_and_that_error_is_raised(hook: str, scene: Any) -> None:
    heard: list[Any] = []
    error = Boom("in the middle")
    plugin = failing(hook, "middle", heard, error)
    expected = MemoryError if hook in ("on_exception", "on_out_of_memory") else Boom
    with pytest.raises(expected) as caught:
        scene(hook, plugin, heard)

    torn_down = [name for name, what, _ in heard if what == "teardown"]
    assert torn_down == [name for name in TORN_DOWN if name != "middle" or hook != "teardown"]
    statuses = {name: status for name, what, status in heard if what == "end"}
    others = dict.fromkeys(["first", "last"] if hook == "on_run_end" else ["first", "middle", "last"])
    assert statuses == dict.fromkeys(others, "stopped" if hook == "on_run_end" else "failed")

    notes = "\n".join(caught.value.__notes__)
    assert f"raised by plugin 'middle' in {hook}, rank 0" in notes
    if expected is Boom:
        assert caught.value is error
        assert traceback.extract_tb(error.__traceback__)[-1].name == "fails"
    else:  # the run's own error comes first, with the plugin's one under it
        assert "Boom: in the middle" in notes and ", in fails" in notes
    fit_ends = {name: exception for name, what, exception in heard if what == "fit end"}
    if fit_ends and hook not in CLOSING:
        assert fit_ends == dict.fromkeys(["first", "middle", "last"], caught.value)


@pytest.mark.parametrize("hook", BEFORE)
def test_an_error_before_a_run_begins_names_the_plugin_and_nothing_is_begun(hook: str, tiny: Any, trainer: Any, tmp_path: Path) -> None:
    heard: list[Any] = []
    plugin = failing(hook, "middle", heard, Boom("in the middle"))
    path = tmp_path / "x.safetensors"
    path.touch()
    with pytest.raises(Boom) as caught:
        trainer(plugins=[{"middle": plugin}]).test(tiny(), ckpt_path="last" if hook == "find_checkpoints" else path)
    assert f"raised by plugin 'middle' in {hook}, rank 0" in caught.value.__notes__
    assert heard == [] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("hook", sorted(OPERATIONS - {*BEFORE, *AMONG_RANKS}))
def test_an_error_in_a_wrapper_after_the_operation_is_no_exception_to_that(hook: str, scene: Any) -> None:
    heard: list[Any] = []

    def fails(self: Any) -> Any:
        yield
        raise Boom("afterwards")

    plugin = type("Wrapping", (Listener,), {hook: hookimpl(wrapper=True)(fails)})("middle", heard)
    with pytest.raises(Boom) as caught:
        scene(hook, plugin, heard)
    assert [name for name, what, _ in heard if what == "teardown"] == TORN_DOWN
    assert f"raised by plugin 'middle' in {hook}, rank 0" in caught.value.__notes__


@pytest.mark.parametrize("hook", EVENTS)
def test_an_observer_that_fails_in_a_hook_stops_nobody(hook: str, scene: Any, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Any] = []
    plugin = failing(hook, "middle", heard, Boom("observing"), on_error="disable")
    if hook in ("on_exception", "on_out_of_memory"):
        with pytest.raises(MemoryError):
            scene(hook, plugin, heard)
    else:
        scene(hook, plugin, heard)
    assert f"plugin 'middle' failed in {hook} and is switched off, training goes on: Boom: observing" in caplog.messages
    torn_down = [name for name, what, _ in heard if what == "teardown"]
    assert torn_down == [name for name in TORN_DOWN if name != "middle" or hook != "teardown"]
    assert {status for _, what, status in heard if what == "end"} <= {"finished", "stopped", "failed"}
    assert len([status for _, what, status in heard if what == "end"]) == (2 if hook == "on_run_end" else 3)


# ---------------------------------------------------------------------- several errors


def test_later_errors_are_grouped_under_the_first_and_do_not_replace_it(tiny: Any, trainer: Any) -> None:
    heard: list[Any] = []
    hooks = ["on_train_start", "on_exception", "on_fit_end", "teardown", "on_run_end"]
    plugins = [{f"in_{hook}": failing(hook, hook, heard, Boom(f"number {i}"))} for i, hook in enumerate(hooks)]
    with pytest.raises(Boom, match="number 0") as caught:
        trainer(plugins=plugins).fit(tiny(val=0))
    own, _, *later = caught.value.__notes__
    assert own == "raised by plugin 'in_on_train_start' in on_train_start, rank 0"
    assert len(later) == 4
    for i, (hook, note) in enumerate(zip(hooks[1:], later, strict=True), 1):
        assert note.startswith("while this error was handled, another one came up:\nTraceback (most recent call last):")
        assert f"Boom: number {i}" in note
        assert f"raised by plugin 'in_{hook}' in {hook}, rank 0" in note
    assert [name for name, what, _ in heard if what == "teardown"] == [hook for hook in reversed(hooks) if hook != "teardown"]


@pytest.mark.parametrize("hook", sorted(CLOSING - {"on_exception"}))
def test_two_errors_in_one_closing_hook_are_one_error_with_the_other_under_it(hook: str, tiny: Any, trainer: Any) -> None:
    heard: list[Any] = []
    plugins = [{name: failing(hook, name, heard, Boom(f"from {name}"))} for name in ("one", "two")]
    with pytest.raises(Boom, match="from two") as caught:  # the end is announced in reverse order
        trainer(plugins=plugins).fit(tiny(val=0))
    notes = "\n".join(caught.value.__notes__)
    assert f"raised by plugin 'two' in {hook}, rank 0" in notes
    assert "Boom: from one" in notes
    assert f"raised by plugin 'one' in {hook}, rank 0" in notes


def test_an_error_in_teardown_is_what_the_run_ends_with(tiny: Any, trainer: Any) -> None:
    heard: list[Any] = []
    plugins = [{"a": Listener("a", heard)}, {"b": failing("teardown", "b", heard, Boom("late"))}]
    with pytest.raises(Boom, match="late"):
        trainer(plugins=plugins).fit(tiny(val=0))
    assert [each for each in heard if each[1] != "fit end"] == [("a", "teardown", None), ("b", "end", "failed"), ("a", "end", "failed")]


def test_a_plugin_whose_setup_was_never_reached_is_torn_down_too(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    recorder = make_recorder("setup", "on_run_start", "teardown", "on_run_end")
    with pytest.raises(Boom):
        trainer(plugins=[{"fails": failing("setup", "fails", [], Boom())}, recorder]).fit(tiny())
    assert recorder.names == ["teardown", "on_run_end"]


def test_an_error_in_the_module_names_the_module(tiny: Any, trainer: Any) -> None:
    class Mine(tiny.Module):
        def on_train_start(self) -> None:
            raise Boom("own")

    with pytest.raises(Boom) as caught:
        trainer().fit(Mine())
    assert "raised by Mine in on_train_start, rank 0" in caught.value.__notes__


def test_after_an_error_trainer_module_and_plugins_can_be_used_again(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    class Once:
        done = False

        @hookimpl
        def on_train_start(self) -> None:
            if not self.done:
                self.done = True
                raise Boom

    recorder, module = make_recorder("on_run_end"), tiny()
    again = trainer(plugins=[Once(), recorder])
    with pytest.raises(Boom):
        again.fit(module)
    with pytest.raises(RuntimeError, match="is not in a run"):
        _ = module.run
    again.fit(module)
    assert [arguments["status"] for _, arguments in recorder.calls] == ["failed", "finished"]


# ---------------------------------------------------------------------- how a run ended


@pytest.mark.parametrize("work", ["fit", "validate", "test", "predict"])
def test_a_run_that_went_well_is_finished(work: str, tiny: Any, trainer: Any, make_recorder: Any) -> None:
    recorder = make_recorder("on_run_end", "teardown")
    getattr(trainer(plugins=[recorder]), work)(tiny())
    assert [(name, arguments.get("status", arguments.get("stage"))) for name, arguments in recorder.calls] == [
        ("teardown", work), ("on_run_end", "finished"),
    ]  # fmt: skip


def test_a_run_that_was_asked_to_stop_is_stopped(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    class Stops:
        @hookimpl
        def on_train_start(self, run: Any) -> None:
            run.request_stop("no wish to train")

    recorder = make_recorder("on_run_end", "on_exception", "on_train_batch_start", "on_train_end")
    trainer(plugins=[Stops(), recorder]).fit(tiny())
    assert recorder.names == ["on_train_end", "on_run_end"]
    assert recorder.calls[-1][1]["status"] == "stopped"


def test_ctrl_c_is_an_interrupted_run_that_everybody_hears_of(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    class Interrupted(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyboardInterrupt

    recorder = make_recorder("on_train_end", "on_exception", "on_fit_end", "teardown", "on_run_end")
    with pytest.raises(KeyboardInterrupt):
        trainer(plugins=[recorder]).fit(Interrupted())
    assert recorder.names == ["on_exception", "on_fit_end", "teardown", "on_run_end"]
    assert recorder.calls[0][1]["exception"] == recorder.calls[1][1]["exception"] == "KeyboardInterrupt"
    assert recorder.calls[-1][1]["status"] == "interrupted"


def test_an_evaluation_that_fails_is_announced_as_failed_too(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    class Wrong(tiny.Module):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            raise Boom

    recorder = make_recorder("on_exception", "on_fit_end", "teardown", "on_run_end")
    with pytest.raises(Boom):
        trainer(plugins=[recorder]).test(Wrong())
    assert recorder.names == ["on_exception", "teardown", "on_run_end"]  # there was no fit to end
    assert recorder.calls[-1][1]["status"] == "failed"


def test_nobody_is_blamed_for_ctrl_c(tiny: Any, trainer: Any, loader: Any) -> None:
    class Running:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            raise KeyboardInterrupt  # it came while this was running

    made = trainer(plugins=[Running()])
    with pytest.raises(KeyboardInterrupt) as caught:
        made.fit(tiny(), loader(2))
    assert not any("raised by" in note for note in caught.value.__notes__)
