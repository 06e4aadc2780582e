"""``Trainer(trace="trace.json")`` writes a timeline of all hooks that Chrome and Perfetto open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchplug import PluginError, Trainer, hookimpl
from torchplug.testing import hermetic


class Listener:
    @hookimpl
    def on_train_batch_end(self, batch: Any) -> None: ...

    @hookimpl(wrapper=True)
    def train_step(self, batch: Any) -> Any:
        return (yield)


def test_every_call_of_a_plugin_is_in_the_file_with_hook_plugin_and_times_that_lie_in_each_other(
    trainer: Any, tiny: Any, tmp_path: Path
) -> None:
    made = trainer(plugins=[Listener()], trace=tmp_path / "trace.json")
    made.fit(tiny(train=3))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    calls = [event for event in events if event["ph"] == "X"]
    assert all({"name", "cat", "ph", "pid", "tid", "ts", "dur"} <= event.keys() and event["dur"] >= 0 for event in calls)
    mine = [event for event in calls if event["cat"] == "listener"]
    assert [event["name"] for event in mine].count("listener on_train_batch_end") == 3
    assert [event["name"] for event in mine].count("listener train_step") == 6, "the two parts of a wrapper"
    step = [event for event in calls if event["name"] == "core train_step"][1]
    around = [event for event in calls if event["name"] == "core train_batch"][1]
    assert around["ts"] <= step["ts"] and step["ts"] + step["dur"] <= around["ts"] + around["dur"] + 1e-3
    assert str(tmp_path / "trace.json") in made.run.report["profiler"]


def test_the_path_is_seen_from_the_working_directory_and_the_bundle_stays_as_it_is(tiny: Any, tmp_path: Path) -> None:
    made = Trainer(plugins=["csv"], trace="trace.json", max_steps=1, num_sanity_val_steps=0, accelerator="cpu", root_dir=tmp_path / "runs")
    assert list(made.enabled) == ["profiler", "csv"]
    made.fit(tiny())
    assert json.loads(Path("trace.json").read_text(encoding="utf-8"))["traceEvents"]


def test_who_names_the_profiler_too_is_told_where_to_write_the_file() -> None:
    with pytest.raises(PluginError) as caught:
        Trainer(plugins=[{"profiler": {"rows": 3}}], trace="a.json")
    assert str(caught.value) == (
        "trace='a.json' takes the plugin 'profiler', which plugins names too: write {'profiler': {'timeline': 'a.json'}} there, "
        "without trace"
    )


def test_without_the_profiler_it_says_what_to_install() -> None:
    with hermetic("csv"), pytest.raises(PluginError, match=r"^trace='a.json': plugin 'profiler' is not installed.*torchplug-profiler"):
        Trainer(plugins=["csv"], trace="a.json")


def test_without_it_nothing_is_watched(trainer: Any, tiny: Any) -> None:
    made = trainer(plugins=[Listener()])
    made.fit(tiny())
    assert list(made.enabled) == ["listener"]


def test_of_two_ranks_each_has_a_file(trainer: Any, tiny: Any, tmp_path: Path) -> None:
    from torchplug_profiler import Profiler

    made = trainer(plugins=[], trace=tmp_path / "trace.json")
    profiler = made.enabled["profiler"]
    assert isinstance(profiler, Profiler)
    made.fit(tiny())
    made.run.rank = 1
    assert profiler._path(made.run) == tmp_path / "trace-1.json"


def test_a_folder_that_is_not_there_is_made_before_training(trainer: Any, tiny: Any, tmp_path: Path) -> None:
    trainer(plugins=[], trace=tmp_path / "new" / "trace.json").fit(tiny())
    assert json.loads((tmp_path / "new" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]


def test_a_file_that_cannot_be_written_is_an_error_before_training(trainer: Any, tiny: Any, tmp_path: Path) -> None:
    made = trainer(plugins=[], trace=tmp_path)
    with pytest.raises(IsADirectoryError):
        made.fit(tiny())
    assert made.run.position.step == 0


def test_a_test_after_a_fit_has_a_file_of_its_own(trainer: Any, tiny: Any, tmp_path: Path) -> None:
    made = trainer(plugins=[], trace=tmp_path / "trace.json")
    made.fit(tiny())
    whole = (tmp_path / "trace.json").read_bytes()
    made.test(tiny())
    assert (tmp_path / "trace.json").read_bytes() == whole
    assert "core test_step" in (tmp_path / "trace-test.json").read_text(encoding="utf-8")


def test_the_working_directory_may_change_meanwhile(trainer: Any, tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    made = trainer(plugins=[], trace="here.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made.fit(tiny())
    assert (tmp_path / "here.json").exists() and not Path("here.json").exists()
