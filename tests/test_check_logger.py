"""`check_logger`: a good logger passes, and each way in which one can be wrong fails the check that is made for it, with the remedy."""

from __future__ import annotations

import importlib
import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from torchplug import PluginError
from torchplug.testing import check_logger, logged, logger, outages, stored
from torchplug.testing.case import Case
from torchplug.testing.faults import Faults
from torchplug.testing.logger import CHECKS

GOOD = '''
import json
import math
import os
import time
from dataclasses import dataclass

import torch

from torchplug import hookimpl
from torchplug.tracking import Mark, Tracker


class Lines:
    """Each record is a line, which is its own mark."""

    def connect(self, place):
        place.folder.mkdir(parents=True, exist_ok=True)
        self.path, self.where = place.folder / "lines.jsonl", str(place.folder)
        lines = self.lines()
        self.rewrite(lines)
        self.file = open(self.path, "a")
        return [Mark(line["n"], line["time"]) for line in lines]

    def lines(self):
        whole = [line for line in self.path.read_text().splitlines(True) if line.endswith("\\n")] if self.path.exists() else []
        return [json.loads(line) for line in whole]

    def rewrite(self, lines):
        self.path.write_text("".join(json.dumps(line) + "\\n" for line in lines))

    def go_back(self, mark):
        self.rewrite([line for line in self.lines() if line["n"] <= mark.n])

    def send(self, records, mark):
        for record in records:
            metrics = self.metrics(record) if record["event"] == "log_metrics" else {}
            line = {"n": record["n"] + 1, "time": record["time"], "step": record["step"], "metrics": metrics}
            self.file.write(json.dumps(line) + "\\n")
        self.file.flush()

    def metrics(self, record):
        return record["metrics"]

    def finish(self, status): ...

    def close(self):
        if hasattr(self, "file"):
            self.file.close()


class Backend(Lines): ...


@dataclass(kw_only=True, eq=False)
class Logger(Tracker):
    """Metrics as lines of JSON."""

    def backend(self):
        return Backend()
'''

DIRECT = '''
import json
import time

from torchplug import hookimpl


class Logger:
    """Metrics as lines of JSON, written in the training thread; a run that goes on keeps what stood before its checkpoint."""

    on_error = "disable"

    @hookimpl
    def on_run_start(self, run):
        self.path = run.dir / "tried" / "lines.jsonl"

    @hookimpl
    def on_fit_start(self, run):
        if run.resumed is not None:
            lines = [line for line in self.path.read_text().splitlines(True) if json.loads(line)["step"] <= run.position.step]
            self.path.write_text("".join(lines))

    @hookimpl
    def log_metrics(self, step, metrics):
        self.write(step, metrics)

    def write(self, step, metrics):
        self.path.parent.mkdir(exist_ok=True)
        with open(self.path, "a") as file:
            print(json.dumps({"step": step, "metrics": metrics}), file=file)
'''


def read(run_dir: Path) -> Iterator[tuple[str, int, float]]:
    for line in (run_dir / "tried" / "lines.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record["metrics"].items():
            yield name, record["step"], value


# what is wrong -> the checks that must fail, what must be said, and how it is done
ROUNDED = """
    class Backend(Lines):
        def metrics(self, record):
            return {name: float(f"{value:.2g}") for name, value in record["metrics"].items()}
"""
LOWER = """
    class Backend(Lines):
        def metrics(self, record):
            return {name.lower(): value for name, value in record["metrics"].items()}
"""
FINITE = """
    class Backend(Lines):
        def metrics(self, record):
            return {name: value for name, value in record["metrics"].items() if math.isfinite(value)}
"""
NEVER_EMPTY = """
    class Backend(Lines):
        def metrics(self, record):
            min(record["metrics"])
            return record["metrics"]
"""
FORGETS = """
    class Backend(Lines):
        known = False

        def connect(self, place):
            marks = super().connect(place)
            known, self.known = self.known, True
            return [] if known else marks
"""
SILENT = """
    class Silent(Logger):
        @hookimpl
        def on_run_end(self, run, status):
            thread, self._thread = self._thread, None
            if thread is not None:
                thread.status = status
                thread.released.set()
                thread.wake.set()
                thread.join(1.0)
                thread.given_up = True
"""
WAITS = """
    class Waits(Logger):
        @hookimpl
        def on_train_batch_end(self, run):
            if run.rank != 0:
                return
            end, lines = time.monotonic() + 0.15, len(run.journal.read_text().splitlines())
            while self._thread.delivery.sent < lines and time.monotonic() < end:
                time.sleep(0.005)
"""
LONG_CLOSE = """
    class Patient(Logger):
        @hookimpl
        def on_run_end(self, run, status):
            thread, end = self._thread, time.monotonic() + 3.5
            while thread is not None and thread.delivery.sent < len(run.journal.read_text().splitlines()) and time.monotonic() < end:
                time.sleep(0.01)
            super().on_run_end(run, status)
"""
KEEPS_THE_PAST = """
    class Backend(Lines):
        def go_back(self, mark):
            if not self.path.with_name("finished").exists():
                super().go_back(mark)

        def finish(self, status):
            self.path.with_name("finished").touch()
"""
LOCKS = """
    class Backend(Lines):
        locked = False

        def connect(self, place):
            place.folder.mkdir(parents=True, exist_ok=True)
            self.lock = place.folder / "lock"
            if not self.locked:
                self.lock.touch(exist_ok=False)
                self.locked = True
            return super().connect(place)

        def close(self):
            super().close()
            if self.locked:
                self.lock.unlink(missing_ok=True)
                self.locked = False
"""
FIRST_FOLDER = """
    class Stays(Logger):
        def folder(self, run_dir, name):
            self.first = getattr(self, "first", None) or super().folder(run_dir, name)
            return self.first
"""
NO_TESTS = """
    class Backend(Lines):
        def metrics(self, record):
            return {} if record["stage"] == "test" else record["metrics"]
"""
ALWAYS_FINE = """
    class Fine(Logger):
        @hookimpl
        def on_run_end(self, run, status):
            super().on_run_end(run, "finished" if status == "failed" else status)
"""
HOLDS = """
    class Backend(Lines):
        def close(self):
            os.open(self.path, os.O_RDONLY)
            super().close()
"""
EVERY_RANK = """
    class Everywhere(Logger):
        @hookimpl
        def on_run_end(self, run, status):
            super().on_run_end(run, status)
            if run.rank == 1:
                with open(run.dir / "tried" / "lines.jsonl", "a") as file:
                    print(json.dumps({"n": 10**6, "time": 0.0, "step": 1, "metrics": {"train_loss": 0.0}}), file=file)
"""
DRAWS = """
    class Draws(Logger):
        @hookimpl
        def on_train_batch_end(self):
            torch.rand(1)
"""
STOPS = """
    class Stops(Logger):
        @hookimpl
        def on_train_epoch_end(self, run):
            run.request_stop("it is enough")
"""

WRONG: dict[str, tuple[str, Callable[[Case], Any], str]] = {
    "rounded": (ROUNDED, logged.values_arrive_once_at_their_step, "store numbers as they are"),
    "draws": (DRAWS, logged.values_arrive_once_at_their_step, "touch no module, optimizer, gradient and no random number"),
    "stops": (STOPS, logged.values_arrive_once_at_their_step, "ended as 'stopped', not 'finished': ask no run to stop"),
    "lower": (LOWER, logged.odd_names_arrive, "metric 'Loss' did not arrive: keep names apart"),
    "finite": (FINITE, logged.numbers_that_are_not_finite_arrive, "metric 'inf' did not arrive, and so it is with 'minus inf': "),
    "never_empty": (NEVER_EMPTY, logged.empty_and_large_records_arrive, "send raised ValueError: min() "),
    "forgets": (FORGETS, outages.an_outage_loses_nothing, "show once what is sent twice"),
    "silent": (SILENT, outages.an_outage_to_the_end_is_said_and_made_up_for, "nothing said that values are missing"),
    "waits": (WAITS, outages.training_waits_for_no_slow_backend, "let no hook wait for the backend"),
    "long_close": (LONG_CLOSE, outages.training_waits_for_no_slow_backend, "join the thread with what is left of close_timeout"),
    "keeps_the_past": (KEEPS_THE_PAST, logged.a_resumed_run_is_one_series, "take back in go_back what is not the past any more"),
    "locks": (LOCKS, logged.a_killed_run_that_goes_on_is_one_series, "connect raised FileExistsError: "),
    "first_folder": (FIRST_FOLDER, logged.fits_of_two_modules_stay_apart, "was anything stored?"),
    "no_tests": (NO_TESTS, logged.a_test_after_a_fit_is_added_to_it, "metric 'test_loss' did not arrive"),
    "always_fine": (ALWAYS_FINE, logged.an_error_in_training_closes_it_as_failed, "call Tracker's on_run_end with the status"),
    "holds": (HOLDS, logged.an_error_in_training_closes_it_as_failed, "is still open after the run: close it"),
    "every_rank": (EVERY_RANK, logged.two_ranks_write_once, "metric 'train_loss' is there twice, or was never logged, at step 1"),
}  # fmt: skip
SEVERAL = ("rounded", "draws", "stops")  # what is wrong in every run fails more checks than the one


@pytest.fixture
def install(package: Callable[..., Path]) -> Callable[..., None]:
    """Installs a logger under the name ``tried``: the last class of the source."""

    def make(good: str, changed: str = "") -> None:
        changed = textwrap.dedent(changed)
        last = [line.split()[1].partition("(")[0].rstrip(":") for line in (good + changed).splitlines() if line.startswith("class ")][-1]
        package("torchplug-tried", good + changed, tried=last if last != "Backend" else "Logger")

    return make


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case("tried", {}, read, None, tmp_path / "runs")


# ---------------------------------------------------------------------- one check


def each_wrong() -> Iterator[Any]:
    """The names of `WRONG`; those that fail a check which another one has failed before are slow."""
    seen = set()
    for wrong, (_, check, _) in WRONG.items():
        yield pytest.param(wrong, marks=[pytest.mark.slow] if check in seen else [])
        seen.add(check)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", list(each_wrong()))
def test_a_mistake_fails_the_check_that_is_made_for_it_and_the_remedy_is_said(wrong: str, install: Any, case: Case) -> None:
    changed, check, text = WRONG[wrong]
    install(GOOD, changed)
    assert text in "\n".join(check(case))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [wrong for wrong in WRONG if wrong not in SEVERAL])
def test_a_mistake_fails_no_other_check(wrong: str, install: Any) -> None:
    changed, check, text = WRONG[wrong]
    install(GOOD, changed)
    with pytest.raises(AssertionError, match="FAILED") as failed:
        check_logger("tried", read=read)
    assert [line for line in str(failed.value).splitlines() if "FAILED" in line] == [f"  FAILED: {check.__name__.replace('_', ' ')}"]
    assert text in str(failed.value)


def test_every_check_has_a_mistake_that_it_finds() -> None:
    assert {check for _, check, _ in WRONG.values()} == set(CHECKS)
    assert all(check.__doc__ for check in CHECKS)


@pytest.mark.slow
def test_an_end_that_waits_too_long_for_what_is_down_is_said(install: Any, case: Case, monkeypatch: Any) -> None:
    install(GOOD, LONG_CLOSE.replace("3.5", "1.5"))
    monkeypatch.setattr(outages, "SLACK", -4.0)  # 1 s in all
    assert "wait no longer than close_timeout" in "\n".join(outages.an_outage_to_the_end_is_said_and_made_up_for(case))


def test_a_logger_that_cannot_go_on_in_another_process_is_said(install: Any, case: Case) -> None:
    install(GOOD, """
        class Backend(Lines):
            def connect(self, place):
                if not hasattr(self, "file") and place.folder.exists():
                    raise FileExistsError(str(place.folder))
                return super().connect(place)
    """)  # fmt: skip
    said = "\n".join(outages.an_outage_to_the_end_is_said_and_made_up_for(case))
    assert "torchplug replay failed: connect raised FileExistsError" in said and "connect must go on where an earlier process ended" in said


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (
            "disable",
            "it failed: plugin 'tried' (torchplug-tried 1.0) was switched off: OSError in on_fit_start at step 0: no space: ",
        ),
        ("abort", "the run ended with OSError('no space') in place of the error of training"),
    ],
)
def test_an_error_of_the_logger_itself_is_told_from_that_of_training(policy: str, text: str, install: Any, case: Case) -> None:
    install(DIRECT, f"""
        class Fails(Logger):
            on_error = "{policy}"

            @hookimpl
            def on_fit_start(self, run):
                raise OSError("no space")
    """)  # fmt: skip
    assert text in "\n".join(logged.an_error_in_training_closes_it_as_failed(case))


def test_what_a_rank_has_to_say_is_said_as_that(install: Any, case: Case) -> None:
    install(GOOD, """
        class Lost(Logger):
            @hookimpl
            def on_train_start(self, run):
                self.connected.file.flush()
    """)  # fmt: skip
    assert "rank 1: it failed: plugin 'tried'" in "\n".join(logged.two_ranks_write_once(case))


# ---------------------------------------------------------------------- a cause is told, and nothing that follows from it

SURROGATES = """
    class Backend(Lines):
        def send(self, records, mark):
            for record in records:
                for name in self.metrics(record) if record["event"] == "log_metrics" else ():
                    name.encode()
            super().send(records, mark)
"""


def test_what_a_backend_raises_is_told_once_and_nothing_else(install: Any, monkeypatch: Any, capsys: Any) -> None:
    install(GOOD, SURROGATES)
    monkeypatch.setattr(logger, "CHECKS", (logged.odd_names_arrive,))
    with pytest.raises(AssertionError) as failed:
        check_logger("tried", read=read)
    _, title, line = str(failed.value).splitlines()
    assert title == "  FAILED: odd names arrive"
    assert line.startswith("    send raised UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 5")
    assert line.endswith(
        "on a record with 'half \\ud800', so nothing after it arrived: raise Refused for what can never be stored, or write it in "
        "another way"
    )
    assert capsys.readouterr().out == "", "what is wrong is in the error alone"


def test_what_a_backend_raises_in_every_run_is_told_once_in_a_report(install: Any, monkeypatch: Any) -> None:
    install(GOOD, """
        class Backend(Lines):
            def finish(self, status):
                raise OSError("no space")
    """)  # fmt: skip
    some = (logged.values_arrive_once_at_their_step, logged.empty_and_large_records_arrive)
    monkeypatch.setattr(logger, "CHECKS", some)
    with pytest.raises(AssertionError) as failed:
        check_logger("tried")
    assert str(failed.value).splitlines()[1:] == [
        "  FAILED: values arrive once at their step",
        "    finish raised OSError: no space, so nothing after it arrived: raise only where trying again may help",
        "  FAILED: empty and large records arrive",
        "    the same as in 'values arrive once at their step'",
    ]


def test_what_is_left_half_done_by_a_backend_that_raises_is_told_with_that(install: Any, case: Case) -> None:
    install(GOOD, """
        class Backend(Lines):
            raised = False

            def connect(self, place):
                super().connect(place)
                return []

            def send(self, records, mark):
                super().send(records, mark)
                if mark.n > 9 and not Backend.raised:
                    Backend.raised = True
                    raise OSError("no answer")
    """)  # fmt: skip
    cause, *lines = logged.values_arrive_once_at_their_step(case)
    assert cause.startswith("send raised OSError: no answer on a record with ")
    assert "leave nothing half done behind" in cause and len(lines) == 1 and "is there twice" in lines[0]


def test_an_error_that_speaks_of_a_metric_is_told_with_its_name() -> None:
    records = [{"event": "log_metrics", "metrics": dict.fromkeys(("a", "b", "c", "loss", "e"), 1.0)}]
    for error, text in {
        KeyError("loss"): "send raised KeyError: 'loss' on a record with 'loss'",
        OSError("full"): "send raised OSError: full on a record with 'a', 'b', 'c' and 2 more",
    }.items():
        faults = Faults()
        faults.note("send", error, records)
        faults.note("close", OSError("another one"))
        assert faults.trouble == text


def test_a_logger_that_is_switched_off_is_told_of_in_one_line(install: Any, case: Case) -> None:
    install(DIRECT, """
        class Fails(Logger):
            def write(self, step, metrics):
                raise OSError("no space")
    """)  # fmt: skip
    (line,) = logged.values_arrive_once_at_their_step(case)
    assert "was switched off: OSError in log_metrics at step" in line
    lines = list(logged.two_ranks_write_once(case))
    assert all("was switched off: OSError in log_metrics at step" in line for line in lines) and lines


# ---------------------------------------------------------------------- good ones


@pytest.mark.slow
def test_a_good_logger_passes_and_a_summary_is_printed(install: Any, capsys: Any) -> None:
    install(GOOD)
    report = check_logger("tried", read=read)
    assert (len(report.passed), report.failed, report.left_out) == (len(CHECKS), {}, {})
    assert capsys.readouterr().out == f"plugin 'tried' (torchplug-tried 1.0) as a logger: {len(CHECKS)} of {len(CHECKS)} checks passed\n"


@pytest.mark.slow
def test_a_good_logger_that_writes_by_itself_passes(install: Any) -> None:
    install(DIRECT)
    assert len(check_logger("tried", read=read).passed) == len(CHECKS)


def test_without_read_what_needs_it_is_reported_as_not_made(install: Any, case: Case, monkeypatch: Any) -> None:
    install(GOOD)
    some = (logged.values_arrive_once_at_their_step, logged.an_error_in_training_closes_it_as_failed)
    monkeypatch.setattr(logger, "CHECKS", some)
    report = check_logger("tried")
    assert report.passed == [] and list(report.left_out) == [check.__name__.replace("_", " ") for check in some]
    assert "NOT MADE: values arrive once at their step (what it stored was not compared, give read=" in str(report)


def test_without_read_what_is_wrong_all_the_same_is_said(install: Any, monkeypatch: Any) -> None:
    install(GOOD, DRAWS)
    monkeypatch.setattr(logger, "CHECKS", (logged.values_arrive_once_at_their_step,))
    with pytest.raises(AssertionError, match="touch no module"):
        check_logger("tried")


# ---------------------------------------------------------------------- what a logger is written to


def test_the_authors_own_outage_is_used(install: Any, case: Case) -> None:
    install(GOOD, """
        class Backend(Lines):
            down = False

            def send(self, records, mark):
                if Backend.down:
                    raise ConnectionError("it is down")
                super().send(records, mark)
    """)  # fmt: skip
    went = []

    @contextmanager
    def down() -> Iterator[None]:
        backend = importlib.import_module("torchplug_tried").Backend
        backend.down = True
        try:
            yield
        finally:
            backend.down = False
            went.append(True)

    case.outage = down
    assert list(outages.an_outage_loses_nothing(case)) == []
    assert list(outages.an_outage_to_the_end_is_said_and_made_up_for(case)) == []
    assert len(went) == 2


SWALLOWS = """
    class Swallows(Logger):
        down = False

        def write(self, step, metrics):
            if not Swallows.down:
                super().write(step, metrics)
"""


def test_a_logger_that_loses_values_without_a_word_fails(install: Any, case: Case) -> None:
    install(DIRECT, SWALLOWS)

    @contextmanager
    def down() -> Iterator[None]:
        plugin = importlib.import_module("torchplug_tried").Swallows
        plugin.down = True
        try:
            yield
        finally:
            plugin.down = False

    case.outage = down
    assert "metric 'train_loss' is missing at step 4, 5, 6, ..." in "\n".join(outages.an_outage_loses_nothing(case))
    assert "nothing said that values are missing" in "\n".join(outages.an_outage_to_the_end_is_said_and_made_up_for(case))


def test_a_logger_that_ends_the_run_when_it_fails_is_told_how_not_to(install: Any, case: Case) -> None:
    install(DIRECT, """
        class Strict(Logger):
            on_error = "abort"
    """)  # fmt: skip
    assert 'write on_error = "disable" in the class' in "\n".join(outages.an_outage_loses_nothing(case))


@pytest.mark.slow
def test_a_logger_that_takes_long_in_the_training_thread_fails(install: Any, case: Case, monkeypatch: Any) -> None:
    install(DIRECT, """
        class Slow(Logger):
            def write(self, step, metrics):
                time.sleep(0.03)
                super().write(step, metrics)
    """)  # fmt: skip
    assert list(outages.training_waits_for_no_slow_backend(case)) == []
    monkeypatch.setattr(outages, "DEAR", 0.02)
    assert "of training: hand it to a thread, as torchplug.tracking does" in "\n".join(outages.training_waits_for_no_slow_backend(case))


# ---------------------------------------------------------------------- what is said


def test_a_plugin_that_is_no_logger_is_refused() -> None:
    with pytest.raises(PluginError, match=r"plugin 'ema' \(torchplug-ema .*\) is no logger: it has neither a backend"):
        check_logger("ema", decay=0.9)
    with pytest.raises(PluginError, match="plugin 'nothing_of_this_name' is not installed"):
        check_logger("nothing_of_this_name")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([("a", 1, 0.5), ("a", 2, 1.5), ("b", 9, 9.0)], ""),  # a name that was not logged is the logger's own
        ([("a", 1, 0.5)], "metric 'a' is missing at step 2: "),
        ([("a", 1, 0.5), ("a", 2, 1.25)], "metric 'a' has another value at step 2 (1.25, not 1.5): "),
        ([("a", 1, 0.5), ("a", 2, 1.5), ("a", 2, 1.5)], "metric 'a' is there twice, or was never logged, at step 2: "),
        ([("a", 1, 0.5), ("a", 2, 1.5), ("a", 3, 1.5)], "metric 'a' is there twice, or was never logged, at step 3: "),
        ([("a", 2, 1.5), ("a", 1, 0.5)], "metric 'a' goes back in its steps, 2, 1: "),
        ([], "metric 'a' did not arrive: "),
    ],
)
def test_each_difference_has_its_words(found: list[tuple[str, int, float]], text: str) -> None:
    said = list(stored.folded(stored.differences([("a", 1, 0.5), ("a", 2, 1.5)], found)))
    assert len(said) == bool(text) and all(line.startswith(text) and len(line) > len(text) + 10 for line in said)


def test_names_with_the_same_trouble_are_told_of_in_one_line() -> None:
    wanted = [(name, 1, 0.5) for name in "abcdef"]
    (line,) = stored.folded(stored.differences(wanted, [("f", 1, 0.5)]))
    assert line.startswith("metric 'a' did not arrive, and so it is with 'b', 'c', 'd' and 1 more: keep names apart")
    lines = list(stored.folded(stored.differences(wanted, [(name, 1, 0.25) for name in "ab"] + wanted[4:])))
    assert [line.partition(":")[0] for line in lines] == [
        "metric 'a' has another value at step 1 (0.25, not 0.5), and so it is with 'b'",
        "metric 'c' did not arrive, and so it is with 'd'",
    ]


def test_numbers_are_compared_with_the_bits_that_every_backend_has() -> None:
    nan, inf = float("nan"), float("inf")
    wanted = [("a", 1, nan), ("a", 2, inf), ("a", 3, -inf), ("a", 4, 0.1), ("a", 5, -0.0), ("half \ud800", 1, 1.0)]
    found = [("a", 1, nan), ("a", 2, 1.7976931348623157e308), ("a", 3, -inf), ("a", 4, 0.10000000149011612), ("a", 5, 0.0)]
    assert list(stored.differences(wanted, [*found, ("half \\ud800", 1, 1.0)])) == []
    assert len(list(stored.differences(wanted, [("a", step, value + 0.001) for _, step, value in found]))) == 2


def test_a_warning_counts_for_a_name_only_if_it_has_it_in_quotes() -> None:
    line = "tried drops 'a b' at step 3"
    assert stored.named("a b", line) and not stored.named("step", line) and not stored.named("a", line)
    assert stored.named("x" * 300, f"the name {'x' * 60}... is too long")
