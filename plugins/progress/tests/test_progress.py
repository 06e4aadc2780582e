"""What the progress plugin shows, what it costs, and what it leaves behind."""

import io
import logging
import math
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

import torchplug_progress
from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_progress import Progress

BATCHES = [torch.full((2, 3), float(i)) for i in range(4)]


def some(count: int) -> DataLoader:
    """A loader of the first batches; a list of batches would be taken for several loaders."""
    return DataLoader(BATCHES[:count], batch_size=None)


class Net(Module):
    """Logs numbers that are known beforehand; ``each`` and ``each_validation`` are called in every batch."""

    def __init__(self, each: Callable[[Any, int], None] | None = None, each_validation: Callable[[Any, int], None] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.each, self.each_validation = each, each_validation

    def forward(self, batch):
        return self.layer(batch)

    def training_step(self, batch, batch_idx):
        if self.each is not None:
            self.each(self, batch_idx)
        self.log("shown", float(batch_idx), prog_bar=True)
        self.log("hidden", 77.0)
        self.log("mean", float(batch_idx), on_step=False, on_epoch=True)
        return self(batch).mean()

    def validation_step(self, batch, batch_idx):
        if self.each_validation is not None:
            self.each_validation(self, batch_idx)
        self.log("val", 10.0 * self.current_epoch + batch_idx, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Training(Net):
    """Without validation, which core would miss a loader for."""

    validation_step = Module.validation_step


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after ``text`` was written to it; the last one says whether the cursor is hidden."""
    rows, row, column, hidden = [[]], 0, 0, False
    for match in re.finditer(r"\x1b\[\??(\d*)[\d;]*([A-Za-z])|([\s\S])", text):
        number, operation, character = match.groups()
        if operation == "A":
            row = max(0, row - int(number or 1))
        elif operation == "K":
            rows[row] = []
        elif operation in ("h", "l"):
            hidden = operation == "l"
        elif operation is not None:
            assert operation == "m", f"unknown control sequence {match.group()!r}"
        elif character == "\n":
            row, column = row + 1, 0
            rows += [[]] * (row == len(rows))
        elif character == "\r":
            column = 0
        else:
            rows[row] = rows[row][:column] + [" "] * (column - len(rows[row])) + [character] + rows[row][column + 1 :]
            column += 1
    lines = ["".join(each).rstrip() for each in rows]
    return [line for line in lines if line] + ["cursor hidden" if hidden else "cursor shown"]


class Clock:
    """Time as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(torchplug_progress, "perf_counter", lambda: self.now)

    def tick(self, seconds: float) -> Callable[[Any, int], None]:
        def each(module: Any, batch_idx: int) -> None:
            self.now += seconds

        return each


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A terminal of 100 columns, whatever the tests run in."""
    torch.set_num_threads(1)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")


class Place:
    """Where a run's output goes. The streams are put in place by `trainer`: pytest sets its own between fixtures and test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, **streams: io.StringIO | None) -> None:
        self.monkeypatch, self.root, self.streams = monkeypatch, root, streams

    def trainer(self, *plugins: Any, **options: Any) -> Trainer:
        for name, stream in self.streams.items():
            self.monkeypatch.setattr(sys, name, stream)
        return Trainer(plugins=list(plugins), root_dir=self.root, **{"max_epochs": 1, "num_sanity_val_steps": 0, **options})

    @property
    def text(self) -> str:
        return self.streams["stderr"].getvalue()

    @property
    def drawn(self) -> str:
        """Everything that was ever drawn, without colours."""
        return re.sub(r"\x1b\[[\d;]*m", "", self.text)

    @property
    def screen(self) -> list[str]:
        return screen(self.text)

    @property
    def lines(self) -> list[str]:
        """Lines of plain output, values in alphabetical order, times and rates, which differ from run to run, left out."""
        assert "\x1b" not in self.text and "\r" not in self.text
        lines = []
        for line in self.text.splitlines():
            head, *values = re.sub(r", [\d.]+ s, [\d.e+]+ \w+/s$", "", line).split(", ")
            lines.append(", ".join([head, *sorted(values)]))
        return lines


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    """stdout and stderr on one terminal that takes no time."""
    stream = Terminal()
    monkeypatch.setattr(torchplug_progress, "SHARE", math.inf)
    return Place(monkeypatch, tmp_path, stdout=stream, stderr=stream)


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """stderr in a file."""
    return Place(monkeypatch, tmp_path, stderr=io.StringIO())


# ---------------------------------------------------------------------- plain lines


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("progress")


def test_plain_output_is_one_line_per_epoch_with_its_values(plain):
    plain.trainer(Progress(), max_epochs=2).fit(Net(), BATCHES, some(3))
    assert re.fullmatch(r"(epoch \d/2: .*, \d+\.\d\d s, [\d.e+]+ steps/s\n){2}", plain.text)
    assert plain.lines == [
        "epoch 1/2: step 4, mean 1.500, shown 3.000, val 1.000",
        "epoch 2/2: step 8, mean 1.500, shown 3.000, val 11.00",
    ]


def test_each_evaluation_of_its_own_ends_with_a_line(plain):
    trains, net = plain.trainer(Progress()), Net()
    trains.validate(net, some(4))
    trains.test(net, some(2))
    trains.predict(net, some(3))
    assert plain.lines == ["validate: 4 batches, val 1.500", "test: 2 batches, val 0.5000", "predict: 3 batches"]


def test_a_validation_within_an_epoch_has_a_line_and_one_at_its_end_stands_in_the_epochs_line(plain):
    plain.trainer(Progress(), val_check_interval=0.5).fit(Net(), BATCHES, some(3))
    assert plain.lines == [
        "validate at step 2: 3 batches, val 1.000",
        "epoch 1/1: step 4, mean 1.500, shown 3.000, val 1.000",
    ]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_line_of_an_evaluation_has_the_values_of_the_whole_pass_and_not_of_its_steps(plain, stage):
    class Both(Net):
        def validation_step(self, batch, batch_idx):
            self.log("value", float(batch_idx), on_step=True, on_epoch=True)

        test_step = validation_step

    getattr(plain.trainer(Progress(), log_every_n_steps=1), stage)(Both(), some(3))
    assert plain.lines == [f"{stage}: 3 batches, value_epoch 1.000"]


def test_values_of_an_earlier_epoch_are_not_shown_as_values_of_this_one(plain):
    plain.trainer(Progress(), max_epochs=3, check_val_every_n_epoch=2).fit(Net(), BATCHES, some(3))
    assert ["val" in line for line in plain.lines] == [False, True, False]


def test_an_epoch_in_which_nothing_was_logged_has_its_line_before_the_next_begins(plain):
    class Silent(Training):
        def training_step(self, batch, batch_idx):
            assert len(plain.lines) == self.current_epoch
            return self(batch).mean()

    plain.trainer(Progress(), max_epochs=2).fit(Silent(), BATCHES)
    assert plain.lines == ["epoch 1/2: step 4", "epoch 2/2: step 8"]


def test_a_mean_over_the_epoch_in_the_bar_ends_as_the_mean_and_not_as_the_last_value(plain):
    class Shown(Training):
        def training_step(self, batch, batch_idx):
            self.log("mean", float(batch_idx), on_step=False, on_epoch=True, prog_bar=True)
            return self(batch).mean()

    plain.trainer(Progress()).fit(Shown(), BATCHES)
    assert plain.lines == ["epoch 1/1: step 4, mean 1.500"]


def test_what_plugins_log_at_the_end_of_an_epoch_stands_in_its_line(plain):
    class Late:
        after = ("progress",)

        @hookimpl
        def on_train_epoch_end(self, run):
            run.log("late", 5.0)

    plain.trainer(Progress(), Late()).fit(Training(), BATCHES)
    assert plain.lines == ["epoch 1/1: step 4, late 5.000, mean 1.500, shown 3.000"]


def test_a_run_that_stops_within_an_epoch_says_where_and_with_which_values(plain):
    class Stop:
        @hookimpl
        def on_train_batch_end(self, run, batch_idx):
            if run.position.step == 6:
                run.request_stop("enough")

    plain.trainer(Progress(), Stop(), max_epochs=3).fit(Training(), BATCHES)
    assert plain.lines[1:] == ["epoch 2/3: stopped after 2 batches, mean 0.5000, shown 1.000, step 6"]


def test_a_step_value_that_was_recorded_at_a_logging_step_is_shown_as_it_is_at_the_end(plain):
    plain.trainer(Progress(), max_epochs=2, log_every_n_steps=3).fit(Net(), BATCHES)
    assert plain.lines == ["epoch 1/2: step 4, mean 1.500, shown 3.000", "epoch 2/2: step 8, mean 1.500, shown 3.000"]


def test_a_metric_on_step_and_epoch_is_shown_under_two_names_not_three(plain):
    class Both(Net):
        def training_step(self, batch, batch_idx):
            self.log("loss", float(batch_idx), on_step=True, on_epoch=True, prog_bar=True)
            return self(batch).mean()

    plain.trainer(Progress(), log_every_n_steps=1).fit(Both(), BATCHES)
    (line,) = plain.lines
    assert sorted(line.removeprefix("epoch 1/1: step 4, ").split(", ")) == ["loss 1.500", "loss_step 3.000"]


def test_long_epochs_have_a_line_at_most_every_plain_every_seconds(plain, monkeypatch):
    clock = Clock(monkeypatch)
    batches = [BATCHES[0]] * 100  # 100 s an epoch
    plain.trainer(Progress(plain_every=30), max_epochs=2).fit(Net(clock.tick(1.0)), batches)
    assert plain.text.splitlines() == [
        "epoch 1/2: 30/100 batches, shown 29.00, 1 steps/s, 0:01:10 left",
        "epoch 1/2: 60/100 batches, shown 59.00, 1 steps/s, 0:00:40 left",
        "epoch 1/2: 90/100 batches, shown 89.00, 1 steps/s, 0:00:10 left",
        "epoch 1/2: step 100, shown 99.00, mean 49.50, 0:01:40, 1 steps/s",
        "epoch 2/2: 30/100 batches, shown 29.00, 1 steps/s, 0:01:10 left",
        "epoch 2/2: 60/100 batches, shown 59.00, 1 steps/s, 0:00:40 left",
        "epoch 2/2: 90/100 batches, shown 89.00, 1 steps/s, 0:00:10 left",
        "epoch 2/2: step 200, shown 99.00, mean 49.50, 0:01:40, 1 steps/s",
    ]


def test_lines_that_are_further_apart_than_the_window_of_the_rate_have_a_rate(plain, monkeypatch):
    clock = Clock(monkeypatch)
    plain.trainer(Progress(plain_every=45)).fit(Net(clock.tick(1.0)), [BATCHES[0]] * 100)
    assert [line.split("shown")[1] for line in plain.text.splitlines()[:2]] == [
        " 44.00, 1 steps/s, 0:00:55 left",
        " 89.00, 1 steps/s, 0:00:10 left",
    ]


def test_the_sanity_check_writes_nothing_in_plain_output(plain):
    plain.trainer(Progress(plain_every=1e-9, rate=1e9), num_sanity_val_steps=2, limit_train_batches=1).fit(Net(), BATCHES, some(4))
    assert "sanity" not in plain.text


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_file_gets_no_control_characters_even_where_colours_are_forced(plain, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    plain.trainer(Progress(rate=1e9)).fit(Net(), BATCHES, some(3))
    assert plain.lines == ["epoch 1/1: step 4, mean 1.500, shown 3.000, val 1.000"]


def test_a_terminal_without_a_movable_cursor_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal.trainer(Progress(rate=1e9, plain_every=1e-9)).fit(Net(), BATCHES, some(3))
    assert sum("/4 batches" in line for line in terminal.lines) == 4
    assert terminal.lines[-1] == "epoch 1/1: step 4, mean 1.500, shown 3.000, val 1.000"


def test_a_notebook_gets_plain_lines_and_no_widget(plain, monkeypatch):
    class ZMQInteractiveShell:
        """What a notebook's kernel calls itself."""

    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    assert Console().is_jupyter
    plain.trainer(Progress(rate=1e9)).fit(Net(), BATCHES, some(3))
    assert plain.lines == ["epoch 1/1: step 4, mean 1.500, shown 3.000, val 1.000"]


# ---------------------------------------------------------------------- bars


def test_bars_show_epoch_counts_and_metrics_of_the_bar(terminal):
    terminal.trainer(Progress(rate=1e9), max_epochs=2).fit(Net(), BATCHES, some(3))
    drawn = terminal.drawn
    for epoch in (1, 2):
        for batch in range(1, 5):
            assert re.search(rf"epoch {epoch}/2 [━╸╺]+ +{batch}/4 +.* steps/s 0:00:00", drawn)
    for batch in range(1, 4):
        assert re.search(rf"validate  [━╸╺]+ +{batch}/3 +.* batches/s 0:00:00", drawn)
    assert "shown 2.000" in drawn and "hidden" not in drawn


def test_test_and_predict_have_bars_of_their_own(terminal):
    trains, net = terminal.trainer(Progress(rate=1e9)), Net()
    trains.test(net, some(4))
    trains.predict(net, some(2))
    drawn = terminal.drawn
    assert re.search(r"test [━╸╺]+ +3/4 ", drawn) and re.search(r"predict [━╸╺]+ +1/2 ", drawn)


def test_the_values_of_training_stay_below_the_bars_during_validation(terminal):
    seen = []

    def look(module, batch_idx):
        seen.append(terminal.screen[-2])

    terminal.trainer(Progress(rate=1e9)).fit(Net(each_validation=look), BATCHES, some(3))
    assert seen[1].strip() == "shown 3.000"


def test_the_sanity_check_is_shown_while_it_lasts(terminal):
    seen = []

    def look(module, batch_idx):
        seen.append(terminal.screen)

    terminal.trainer(Progress(rate=1e9), num_sanity_val_steps=1).fit(Net(look, look), BATCHES[:1], some(1))
    assert seen[0] == ["sanity check", "cursor hidden"]
    assert not any("sanity" in line for later in seen[1:] for line in later)


def test_finished_bars_leave_one_line_each_and_nothing_else(terminal):
    terminal.trainer(Progress(rate=1e9), max_epochs=2, num_sanity_val_steps=1).fit(Net(), BATCHES, some(3))
    first, second, cursor = terminal.screen
    assert first.startswith("epoch 1/2: step 4, shown 3.000, val 1.000, mean 1.500, ")
    assert second.startswith("epoch 2/2: step 8, shown 3.000, val 11.00, mean 1.500, ")
    assert cursor == "cursor shown"


def test_leave_false_clears_the_terminal(terminal):
    terminal.trainer(Progress(rate=1e9, leave=False), max_epochs=2).fit(Net(), BATCHES, some(3))
    assert "4/4" in terminal.drawn
    assert terminal.screen == ["cursor shown"]


class Stream(IterableDataset):
    """Five samples, though it believes that there are more."""

    def __len__(self):
        return 100

    def __iter__(self):
        return iter([torch.ones(3)] * 5)


def test_unknown_lengths_show_counts_and_rates_without_a_total(terminal):
    loader = DataLoader(Stream(), batch_size=1)
    terminal.trainer(Progress(rate=1e9)).fit(Net(), loader, loader)
    drawn = terminal.drawn
    assert re.search(r"epoch 1/1 [━╸╺]+ 5 [\d.e+]+ steps/s *\n", drawn)
    assert re.search(r"validate  [━╸╺]+ 5 +[\d.e+]+ batches/s *\n", drawn)
    assert not re.search(r"[━╸╺] +\d+/\d|\d:\d\d:\d\d", drawn)


def test_a_limit_on_an_unknown_length_is_no_total(terminal):
    loader = DataLoader(Stream(), batch_size=1)
    terminal.trainer(Progress(rate=1e9), limit_val_batches=9, limit_train_batches=9).fit(Net(), loader, loader)
    assert "/9" not in terminal.text


def test_several_validation_loaders_are_one_bar(terminal):
    class Several(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("val", 1.0)

    terminal.trainer(Progress(rate=1e9), limit_val_batches=3).fit(Several(), BATCHES[:1], [some(4), some(2)])
    assert re.findall(r"validate  [━╸╺]+ (\d)/5 ", terminal.drawn)[-1] == "5"


def test_max_steps_shortens_the_bar_of_the_last_epoch_and_says_where_it_stopped(terminal):
    terminal.trainer(Progress(rate=1e9), max_epochs=None, max_steps=7, accumulate_grad_batches=2).fit(Net(), BATCHES * 4)
    drawn = terminal.drawn
    assert set(re.findall(r"epoch 1 [━╸╺]+ +\d+/(\d+)", drawn)) == {"14"}
    assert terminal.screen[0].startswith("epoch 1: stopped after 14 batches, step 7, shown 13.00")


def test_the_bar_of_the_last_epoch_knows_a_schedule_of_windows(terminal):
    class Windows:
        @hookimpl
        def setup(self, run):
            run.accumulation = lambda epoch: 2

    terminal.trainer(Progress(rate=1e9), Windows(), max_epochs=None, max_steps=7).fit(Net(), BATCHES * 4)
    assert set(re.findall(r"epoch 1 [━╸╺]+ +\d+/(\d+)", terminal.drawn)) == {"14"}


def test_rate_counts_optimizer_steps_and_time_left_counts_batches_and_neither_counts_validation(terminal, monkeypatch):
    clock = Clock(monkeypatch)
    net = Net(clock.tick(0.5), clock.tick(100.0))
    terminal.trainer(Progress(rate=1e-3), accumulate_grad_batches=4, val_check_interval=8).fit(net, BATCHES * 5, some(1))
    drawn = terminal.drawn
    assert "validate at step 2: 1 batch, val 0.000, 0:01:40, 0.01 batches/s" in drawn
    assert re.search(r"epoch 1/1: step 5, .*, 0:03:30, 0.5 steps/s", drawn)  # 20 batches of 0.5 s and two validations


def test_time_left_follows_the_speed_of_the_last_half_minute(plain, monkeypatch):
    clock = Clock(monkeypatch)

    def each(module, batch_idx):
        clock.now += 1.0 if batch_idx < 50 else 2.0

    plain.trainer(Progress(plain_every=10)).fit(Net(each), [BATCHES[0]] * 100)
    # after 80 batches of which the last 30 took 60 s: 20 more at 2 s each
    assert "epoch 1/1: 80/100 batches, shown 79.00, 0.5 steps/s, 0:00:40 left" in plain.text


# ---------------------------------------------------------------------- a run that goes on from a checkpoint


class Saves:
    """Writes a checkpoint at a step, or at an epoch's end."""

    def __init__(self, path, step=None, epoch=None):
        self.path, self.step, self.epoch = path, step, epoch

    @hookimpl
    def on_train_batch_end(self, run):
        if run.position.step == self.step:
            run.save_checkpoint(self.path)

    @hookimpl
    def on_train_epoch_end(self, run):
        if run.position.epoch == self.epoch:
            run.save_checkpoint(self.path)


def resumed(place, net, batches, validation=None, progress=None, **options):
    path = place.root / "here.safetensors"
    place.trainer(Progress(**(progress or {})), **options).fit(net, batches, validation, ckpt_path=path)


def test_a_run_that_goes_on_in_mid_epoch_shows_the_bar_from_there_on(terminal):
    terminal.trainer(Saves(terminal.root / "here.safetensors", step=6), max_epochs=3).fit(Training(), BATCHES)
    resumed(terminal, Training(), BATCHES, max_epochs=3, progress={"rate": 1e9})
    drawn = re.findall(r"(epoch \d/3) [━╸╺]+ +(\d/4) ", terminal.drawn)
    assert list(dict.fromkeys(drawn))[:4] == [("epoch 2/3", "2/4"), ("epoch 2/3", "3/4"), ("epoch 2/3", "4/4"), ("epoch 3/3", "0/4")]
    second, third, _ = terminal.screen
    assert second.startswith("epoch 2/3: step 8, shown 3.000") and third.startswith("epoch 3/3: step 12, ")


def test_a_run_that_goes_on_has_the_lines_of_the_rest_of_one_that_was_not_stopped(plain):
    plain.trainer(Progress(), Saves(plain.root / "here.safetensors", step=6), max_epochs=3).fit(Net(), BATCHES, some(3))
    whole = plain.lines
    resumed(plain, Net(), BATCHES, some(3), max_epochs=3)
    assert len(whole) == 3 and plain.lines == whole + whole[1:]


def test_a_run_that_goes_on_from_an_epochs_end_begins_with_the_next(plain):
    plain.trainer(Progress(), Saves(plain.root / "here.safetensors", epoch=0), max_epochs=3).fit(Net(), BATCHES, some(3))
    whole = plain.lines
    resumed(plain, Net(), BATCHES, some(3), max_epochs=3)
    assert plain.lines == whole + whole[1:]


def test_rate_and_time_left_count_the_batches_of_this_process_alone(plain, monkeypatch):
    clock = Clock(monkeypatch)
    batches = [BATCHES[0]] * 100
    plain.trainer(Saves(plain.root / "here.safetensors", step=60)).fit(Training(clock.tick(1.0)), batches)
    resumed(plain, Training(clock.tick(2.0)), batches, progress={"plain_every": 20})
    assert plain.text.splitlines() == [
        "epoch 1/1: 70/100 batches, shown 69.00, 0.5 steps/s, 0:01:00 left",
        "epoch 1/1: 80/100 batches, shown 79.00, 0.5 steps/s, 0:00:40 left",
        "epoch 1/1: 90/100 batches, shown 89.00, 0.5 steps/s, 0:00:20 left",
        "epoch 1/1: 100/100 batches, shown 99.00, 0.5 steps/s, 0:00:00 left",
        "epoch 1/1: step 100, shown 99.00, mean 49.50, 0:01:20, 0.5 steps/s",
    ]


def test_an_epoch_of_which_only_the_end_was_left_has_its_line_without_a_rate(plain):
    plain.trainer(Saves(plain.root / "here.safetensors", step=4)).fit(Training(), BATCHES)
    resumed(plain, Training(), BATCHES)
    assert re.fullmatch(r"epoch 1/1: step 4, shown 3.000, mean 1.500, \d+\.\d\d s\n", plain.text)


def test_a_fit_that_goes_on_with_more_epochs_counts_on(plain):
    trains, net = plain.trainer(Progress(), max_epochs=1), Training()
    trains.fit(net, BATCHES)
    trains.max_epochs = 3
    trains.fit(net, BATCHES)
    assert [line.split(",")[0] for line in plain.lines] == ["epoch 1/1: step 4", "epoch 2/3: step 8", "epoch 3/3: step 12"]


def test_a_run_that_was_stopped_and_goes_on_only_to_stop_again_says_where(plain):
    class Stop:
        @hookimpl
        def on_train_start(self, run):
            run.request_stop("enough")

    plain.trainer(Saves(plain.root / "here.safetensors", step=6), max_epochs=3).fit(Training(), BATCHES)
    plain.trainer(Progress(), Stop(), max_epochs=3).fit(Training(), BATCHES, ckpt_path=plain.root / "here.safetensors")
    assert re.fullmatch(r"epoch 2/3: stopped after 2 batches, step 6, shown 1.000, mean 0.5000, \d+\.\d\d s\n", plain.text)


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_signal_closes_the_bars_and_says_where_it_was(terminal, where):
    def interrupt(module, batch_idx):
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    net = Net(interrupt) if where == "training" else Net(None, interrupt)
    with pytest.raises(SystemExit):
        terminal.trainer(Progress(rate=1e9)).fit(net, BATCHES, some(4))
    line, cursor = terminal.screen
    done = 3 if where == "training" else 4
    assert line.startswith(f"epoch 1/1: interrupted after {done} batches, step {done}, ")
    assert cursor == "cursor shown" and sys.stderr is terminal.streams["stderr"]


def test_the_time_of_a_validation_that_a_signal_breaks_off_is_not_training_time(plain, monkeypatch):
    clock = Clock(monkeypatch)

    def interrupt(module, batch_idx):
        clock.now += 100.0
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        plain.trainer(Progress(plain_every=1e9)).fit(Net(clock.tick(0.5), interrupt), BATCHES, some(2))
    assert plain.text.endswith(", 0:01:42, 2 steps/s\n")


# ---------------------------------------------------------------------- cost


class ReadBacks(TorchDispatchMode):
    """Counts how values come back from the device: one by one, or stacked and then together."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.stack.default)
        return func(*args, **(kwargs or {}))


class Tensors(Net):
    """Logs what is on the device."""

    def training_step(self, batch, batch_idx):
        loss = self(batch).mean()
        self.log("shown", loss, prog_bar=True)
        return loss


def read_backs(place, *plugins):
    """Read-backs between the first and the 100th step, and how often progress values were asked for until then."""
    counts, asked = [], []
    mode = ReadBacks()

    class Counter:
        before = ("*",)

        @hookimpl
        def on_fit_start(self, run):
            progress = run.metrics.progress
            run.metrics.progress = lambda: asked.append(1) or progress()

        @hookimpl
        def on_train_batch_start(self, batch_idx):
            if batch_idx in (1, 101):
                counts.extend((mode.count, len(asked)))

    with mode:
        place.trainer(Counter(), *plugins, log_every_n_steps=1000).fit(Tensors(), [BATCHES[1]] * 102)
    return counts[2] - counts[0], counts[3] - counts[1]


def test_nothing_is_read_from_the_device_while_a_refresh_is_not_due(terminal):
    bare = read_backs(terminal)
    assert read_backs(terminal, Progress(rate=1e-9)) == bare == (bare[0], 0)
    every_batch = read_backs(terminal, Progress(rate=1e9))  # the count would show it
    assert every_batch == (bare[0] + 100, 100)


def test_nothing_is_read_from_the_device_between_plain_lines(plain):
    bare = read_backs(plain)
    assert read_backs(plain, Progress()) == bare


@pytest.mark.parametrize("rate", [10.0, 2.5])
def test_values_are_read_at_most_rate_times_a_second(terminal, monkeypatch, rate):
    clock = Clock(monkeypatch)
    moments = []

    class Counter:
        before = ("*",)

        @hookimpl
        def on_fit_start(self, run):
            progress = run.metrics.progress
            run.metrics.progress = lambda: moments.append(clock.now) or progress()

    terminal.trainer(Counter(), Progress(rate=rate)).fit(Net(clock.tick(0.003)), [BATCHES[0]] * 1000)  # 3 s
    within = moments[:-1]  # the last is the epoch's end
    assert min(later - earlier for earlier, later in pairwise(within)) >= 1 / rate
    assert 3 * rate * 0.9 <= len(within) <= 3 * rate


def test_a_slow_terminal_takes_a_small_share_of_the_time(terminal, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(torchplug_progress, "SHARE", 0.05)
    draws = []
    draw = torchplug_progress._Screen.draw

    def slow(self, *args):
        clock.now += 0.5
        draws.append(clock.now)
        draw(self, *args)

    monkeypatch.setattr(torchplug_progress._Screen, "draw", slow)
    terminal.trainer(Progress()).fit(Net(clock.tick(0.1)), [BATCHES[0]] * 1000)
    assert len(draws) * 0.5 <= 0.06 * (clock.now - 100)


def test_random_generators_are_not_touched(terminal):
    numpy = pytest.importorskip("numpy")
    after = []
    for plugins in ([], [Progress(rate=1e9)]):
        random.seed(1), torch.manual_seed(1), numpy.random.seed(1)
        net = Net()
        terminal.trainer(*plugins, num_sanity_val_steps=1).fit(net, BATCHES, some(4))
        after.append((random.random(), torch.rand(3).tolist(), numpy.random.rand(), net.layer.weight.tolist()))
    assert after[0] == after[1]


# ---------------------------------------------------------------------- streams and endings


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_an_exception_closes_the_bars_and_says_where_it_was(terminal, error, where):
    def fail(module, batch_idx):
        if batch_idx == 2:
            raise error

    net = Net(fail) if where == "training" else Net(None, fail)
    with pytest.raises(type(error)):
        terminal.trainer(Progress(rate=1e9)).fit(net, BATCHES, some(4))
    assert sys.stderr is terminal.streams["stderr"] and sys.stdout is terminal.streams["stderr"]
    what = "interrupted" if isinstance(error, KeyboardInterrupt) else "ValueError"
    line, *_, cursor = terminal.screen
    assert line.startswith(f"epoch 1/1: {what} after {2 if where == 'training' else 4}/4 batches, shown ")
    assert cursor == "cursor shown" and len(terminal.screen) == 2


def test_an_error_in_the_sanity_check_closes_the_display(terminal):
    def fail(module, batch_idx):
        raise ValueError("no")

    with pytest.raises(ValueError):
        terminal.trainer(Progress(), num_sanity_val_steps=1).fit(Net(None, fail), BATCHES, some(4))
    assert terminal.screen == ["sanity check: ValueError", "cursor shown"]
    assert sys.stderr is terminal.streams["stderr"]


def test_bars_are_gone_before_other_plugins_say_their_last(terminal):
    seen = []

    class Late:
        @hookimpl
        def on_fit_end(self):
            seen.append((sys.stderr, terminal.screen[-1], len(terminal.screen)))

    def fail(module, batch_idx):
        raise ValueError("no")

    with pytest.raises(ValueError):
        terminal.trainer(Late(), Progress(rate=1e9)).fit(Training(fail), BATCHES)
    assert seen == [(terminal.streams["stderr"], "cursor shown", 2)]


def test_an_error_after_the_sanity_check_is_not_put_down_to_it(terminal):
    class Broken:
        @hookimpl
        def on_train_start(self):
            raise ValueError("no")

    with pytest.raises(ValueError):
        terminal.trainer(Progress(), Broken(), num_sanity_val_steps=1).fit(Net(), BATCHES, some(1))
    assert terminal.screen == ["cursor shown"]


def test_an_error_while_another_plugin_ends_the_run_leaves_no_bar(terminal):
    class Broken:
        @hookimpl
        def on_train_batch_end(self):
            raise ValueError("no")

    with pytest.raises(ValueError):
        terminal.trainer(Progress(rate=1e9), Broken()).fit(Net(), BATCHES)
    assert terminal.screen[-1] == "cursor shown" and sys.stderr is terminal.streams["stderr"]


def test_prints_and_log_lines_stay_whole_above_the_bars(terminal, monkeypatch):
    logger, handler = logging.getLogger("torchplug"), logging.StreamHandler(terminal.streams["stderr"])
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logging.INFO)

    def speak(module, batch_idx):
        print(f"print {batch_idx}")
        logger.info("log %d", batch_idx)

    terminal.trainer(Progress(rate=1e9)).fit(Training(speak), BATCHES[:2])
    shown = terminal.screen
    assert shown[:4] == ["print 0", "log 0", "print 1", "log 1"]
    assert shown[4].startswith("epoch 1/1: step 2") and shown[5].startswith("fit took")
    assert handler.stream is terminal.streams["stderr"]


def test_log_lines_of_a_user_who_set_up_no_logging_stay_whole(terminal, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("torchplug"), "handlers", [])  # the trainer brings its own

    def speak(module, batch_idx):
        logging.getLogger("torchplug").info("log %d", batch_idx)

    terminal.trainer(Progress(rate=1e9)).fit(Training(speak), BATCHES[:2])
    assert terminal.screen[:2] == ["log 0", "log 1"]


def test_log_lines_through_richs_handler_stay_whole(terminal, monkeypatch):
    from rich.logging import RichHandler

    console = Console(file=terminal.streams["stderr"], force_terminal=True)
    handler = RichHandler(console=console, show_time=False, show_path=False)
    monkeypatch.setattr(logging.getLogger("torchplug"), "handlers", [handler])

    def speak(module, batch_idx):
        logging.getLogger("torchplug").warning("log %d", batch_idx)

    terminal.trainer(Progress(rate=1e9)).fit(Training(speak), BATCHES[:2])
    assert [line.split()[-2:] for line in terminal.screen[:2]] == [["log", "0"], ["log", "1"]]
    assert handler.console is console


def test_stdout_that_goes_to_a_file_still_does_while_bars_are_shown(terminal, monkeypatch):
    file = terminal.streams["stdout"] = io.StringIO()
    terminal.trainer(Progress(rate=1e9)).fit(Training(lambda module, i: print(f"result {i}")), BATCHES[:2])
    assert file.getvalue() == "result 0\nresult 1\n"
    assert "result" not in terminal.text


def test_a_plugin_instance_can_be_used_again(plain):
    trains = plain.trainer(Progress())
    for _ in range(2):
        trains.fit(Net(), BATCHES, some(3))
    assert plain.lines == ["epoch 1/1: step 4, mean 1.500, shown 3.000, val 1.000"] * 2


def test_only_the_first_process_shows_and_reads_anything(terminal):
    class Second:
        @hookimpl
        def setup(self, run):
            run.rank = 1

    read = read_backs(terminal, Second(), Progress(rate=1e9))
    assert terminal.text == "" and read == read_backs(terminal)


def test_a_stream_that_breaks_switches_the_display_off_and_training_goes_on(terminal, monkeypatch, caplog):
    def broken(self, *args):
        raise BrokenPipeError("gone")

    monkeypatch.setattr(torchplug_progress._Screen, "draw", broken)
    trains = terminal.trainer(Progress(rate=1e9))
    trains.fit(Net(), BATCHES)
    assert trains.run.position.step == 4
    assert "is switched off, training goes on: BrokenPipeError: gone" in caplog.text
    assert sys.stderr is terminal.streams["stderr"]


def test_a_process_without_stderr_trains(tmp_path, monkeypatch):
    trains = Place(monkeypatch, tmp_path, stderr=None).trainer(Progress(rate=1e9))
    trains.fit(Net(), BATCHES)
    assert trains.run.position.step == 4


def test_fast_dev_run_is_shown(plain):
    plain.trainer(Progress(), fast_dev_run=True).fit(Net(), BATCHES, some(4))
    assert plain.lines == ["epoch 1/1: step 1, mean 0.000, shown 0.000, val 0.000"]


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"rate": 0}, ValueError, "rate must be above 0, got 0"),
        ({"rate": float("nan")}, ValueError, "rate must be above 0, got nan"),
        ({"rate": "fast"}, TypeError, "rate must be a number above 0, got 'fast'"),
        ({"plain_every": -1.0}, ValueError, "plain_every must be above 0, got -1.0"),
        ({"leave": 1}, TypeError, "leave must be True or False, got 1"),
    ],
)
def test_an_option_that_cannot_be_is_named_with_what_it_may_be(options, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        Progress(**options)


def test_options_by_name_are_checked_when_the_trainer_is_built(plain):
    assert plain.trainer({"progress": {"rate": 2, "leave": False}}).enabled["progress"].rate == 2
    with pytest.raises(PluginError, match=r"plugin 'progress' \(torchplug-progress .*\): rate must be above 0, got 0"):
        plain.trainer({"progress": {"rate": 0}})
    with pytest.raises(PluginError, match="no option 'rates', did you mean 'rate'"):
        plain.trainer({"progress": {"rates": 1}})
