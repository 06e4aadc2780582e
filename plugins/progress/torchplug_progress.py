"""Shows how far a run is: bars in a terminal, plain lines in a file, a notebook or a log of CI.

A batch costs one look at the clock. Values are read from the device when something is shown, never between: at most
``rate`` times a second and at the end of each epoch. Everything is drawn from the training thread, so that no other
thread reads metrics while they are written.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from torchplug import Run, hookimpl

__all__ = ["Progress"]

SHARE = 0.05  # of the time at most goes into drawing, however slow the terminal is
WINDOW = 30.0  # seconds over which the rate in a bar is taken


@dataclass(eq=False)
class _Bar:
    """How far one pass over data is, and how fast."""

    label: str
    unit: str = ""  # what the rate counts; empty: only the label is shown
    total: int | None = None
    done: int = 0  # batches
    count: int = 0  # what the rate counts: optimizer steps in training, batches elsewhere
    away: float = 0.0  # seconds that evaluations inside of it took
    started: float = field(default_factory=lambda: perf_counter())
    marks: deque[tuple[float, int, int]] = field(default_factory=lambda: deque([(0.0, 0, 0)]))

    def follow(self, run: Run) -> None:
        """Takes over what the run knows."""
        self.count = self.done

    def working(self) -> float:
        """Seconds spent in this pass itself."""
        return perf_counter() - self.started - self.away

    def mark(self) -> None:
        """Notes where it stands, so that the rate is that of the last half minute."""
        now = self.working()
        self.marks.append((now, self.done, self.count))
        while len(self.marks) > 2 and now - self.marks[0][0] > WINDOW:
            self.marks.popleft()

    def batches(self) -> str:
        """How many are done, of how many if that is known."""
        return f"{self.done}" if self.total is None else f"{self.done}/{self.total}"

    def rate(self) -> str:
        """How fast it has been lately, empty if that is not known yet."""
        oldest, newest = self.marks[0], self.marks[-1]
        count = newest[2] - oldest[2]
        return _rate(count, newest[0] - oldest[0], self.unit) if count else ""

    def left(self) -> str:
        """The time that the rest will take, empty if that is not known."""
        oldest, newest = self.marks[0], self.marks[-1]
        batches = newest[1] - oldest[1]
        if self.total is None or not batches:
            return ""
        return _clock((self.total - self.done) * (newest[0] - oldest[0]) / batches)


@dataclass(eq=False)
class _Epoch(_Bar):
    """The bar of a training epoch."""

    unit: str = "steps"
    first_step: int = 0

    def follow(self, run: Run) -> None:
        position, options = run.position, run.options
        self.done, self.count, self.total = position.batch, position.step - self.first_step, run.num_batches
        if self.total is not None and options.max_steps is not None and run.module.automatic_optimization:
            window = run.batches_per_step(position.epoch)
            self.total = min(self.total, self.done - self.done % window + (options.max_steps - position.step) * window)
        if self.total is not None and self.total < self.done:  # the loader gives more than its length said
            self.total = None


class _Screen:
    """Bars at the bottom of a terminal; lines and whatever else is written appear above them.

    It is drawn anew by rich with everything that is written.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None
        self.bars: list[_Bar] = []
        self.values: Mapping[str, float] = {}
        self.handlers: list[tuple[Any, str, Any]] = []  # whose attribute was changed, and to what it goes back

    def draw(self, bars: list[_Bar], values: Mapping[str, float]) -> None:
        self.bars, self.values = list(bars), values
        if self.live is None:
            self._start()
        assert self.live is not None
        self.live.refresh()

    def line(self, text: str, bars: list[_Bar]) -> None:
        self.bars = bars
        self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Clears the bars, shows the cursor and gives back the streams."""
        live, self.live = self.live, None
        if live is None:
            return
        try:
            live.stop()
        finally:
            while self.handlers:
                handler, attribute, before = self.handlers.pop()
                _set(handler, attribute, before)

    def _start(self) -> None:
        # stdout may go to a file while stderr is a terminal: then it has nothing to do with the bars
        self.live = Live(self, console=self.console, auto_refresh=False, transient=True, redirect_stdout=_is_terminal(sys.stdout))
        streams = {id(stream): name for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr))}
        self.live.start()
        for handler in _log_handlers():  # those that took hold of a stream before it was redirected
            name = streams.get(id(getattr(handler, "stream", None)))
            if name is not None and handler.stream is not getattr(sys, name):
                self.handlers.append((handler, "stream", handler.stream))
                _set(handler, "stream", getattr(sys, name))
            elif isinstance(getattr(handler, "console", None), Console):  # rich's own handler
                self.handlers.append((handler, "console", handler.console))
                _set(handler, "console", self.console)

    def __rich__(self) -> RenderableType:
        fixed = [Column(no_wrap=True, justify="right") for _ in range(3)]
        grid = Table.grid(Column(no_wrap=True), Column(max_width=40), *fixed, padding=(0, 1))
        for bar in self.bars:
            if bar.unit:
                length = ProgressBar(total=bar.total, completed=bar.done)
                grid.add_row(
                    bar.label, length, bar.batches(), Text(bar.rate(), "progress.data.speed"), Text(bar.left(), "progress.remaining")
                )
            else:
                grid.add_row(bar.label)
        values = Text("  ".join(_values(self.values)))
        return Group(grid, values) if values else grid


class _Lines:
    """The same in plain text, for what is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def draw(self, bars: list[_Bar], values: Mapping[str, float]) -> None:
        bar = bars[-1]
        left = bar.left()
        self.line(_line(bar.label, f"{bar.batches()} batches", *_values(values), bar.rate(), left and f"{left} left"), [])

    def line(self, text: str, bars: list[_Bar]) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """There is nothing to give back."""


@dataclass(eq=False)
class _Ended:
    """What the line of an epoch will say."""

    bar: _Bar
    where: tuple[str, ...]
    values: dict[str, float]
    speed: tuple[str, str]


@dataclass(kw_only=True, eq=False)
class Progress:
    """Shows the progress of training and evaluation: bars in a terminal, plain lines elsewhere.

    Metrics that were logged with ``prog_bar=True`` stand below the bars. Output goes to stderr.

    Args:
        rate: How often bars are drawn and metrics are read from the device, in refreshes per second at most.
        plain_every: Where there is no terminal: seconds between two lines within an epoch, at least.
        leave: Keep a line of each finished epoch and evaluation in the terminal; plain output always has them.
    """

    rate: float = 10.0
    plain_every: float = 30.0
    leave: bool = True

    on_error = "disable"
    after = ("*",)  # the bars begin when all others are ready and, as closing goes backwards, are gone before they say their last

    _view: _Screen | _Lines | None = field(init=False, default=None, repr=False)
    _interval: float = field(init=False, default=0.0, repr=False)
    _due: float = field(init=False, default=math.inf, repr=False)  # when the next refresh is due; never while nothing is shown
    _bars: list[_Bar] = field(init=False, default_factory=list, repr=False)  # the innermost pass is the last
    _inner: _Bar = field(init=False, default_factory=lambda: _Bar(""), repr=False)  # where evaluation batches are counted
    _shown: dict[str, float] = field(init=False, default_factory=dict, repr=False)
    _evaluated: dict[str, float] = field(init=False, default_factory=dict, repr=False)  # by the last evaluation of the epoch
    _ended: _Ended | None = field(init=False, default=None, repr=False)  # the epoch whose values are still to come
    _names: dict[str, None] = field(init=False, default_factory=dict, repr=False)  # in the order in which they are shown

    def __post_init__(self) -> None:
        for name in ("rate", "plain_every"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number above 0, got {value!r}")
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if not isinstance(self.leave, bool):
            raise TypeError(f"leave must be True or False, got {self.leave!r}")

    # ------------------------------------------------------------------ start and end

    @hookimpl
    def setup(self, run: Run) -> None:
        self._close()
        self._view, self._ended, self._shown, self._evaluated, self._names = None, None, {}, {}, {}
        if run.rank != 0:
            return
        # FORCE_COLOR and the like make rich take a file for a terminal, but a cursor cannot move in one
        console = Console(stderr=True, force_terminal=None if _is_terminal(sys.stderr) else False, force_jupyter=False)
        if console.is_terminal and console.is_interactive:
            self._view, self._interval = _Screen(console), 1 / self.rate
        else:
            self._view, self._interval = _Lines(console), max(self.plain_every, 1 / self.rate)

    @hookimpl
    def on_exception(self, run: Run, exception: BaseException) -> None:
        bars = self._bars
        try:
            self._conclude()
            if bars:  # nothing is read from the device, which may be what failed
                bars[0].follow(run)
                what = "interrupted" if isinstance(exception, KeyboardInterrupt) else type(exception).__name__
                where = f" after {bars[0].batches()} batches" if bars[0].unit else ""
                self._say(_line(bars[0].label, what + where, *_values(self._shown)))
        finally:
            self._close()

    @hookimpl
    def teardown(self) -> None:
        self._conclude()
        self._close()
        self._view = None

    def _close(self) -> None:
        self._due, self._bars, self._inner = math.inf, [], _Bar("")
        if self._view is not None:
            self._view.close()

    # ------------------------------------------------------------------ training

    @hookimpl
    def on_sanity_start(self, run: Run) -> None:
        self._open(run, _Bar("sanity check"))

    @hookimpl
    def on_sanity_end(self) -> None:
        self._bars = []

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        if run.position.batch:  # a run that goes on in the middle of an epoch, which began in another
            self._begin_epoch(run)

    @hookimpl
    def on_train_epoch_start(self, run: Run) -> None:
        self._begin_epoch(run)

    def _begin_epoch(self, run: Run) -> None:
        self._conclude()
        self._bars, self._evaluated = [], {}
        bar = _Epoch(_epoch(run), first_step=run.position.step)
        bar.follow(run)
        bar.marks[0] = (0.0, bar.done, bar.count)  # what others did tells nothing of how fast this process is
        self._open(run, bar)

    @hookimpl
    def on_train_batch_end(self, run: Run) -> None:
        if perf_counter() >= self._due:
            self._refresh(run)

    @hookimpl
    def on_train_epoch_end(self, run: Run) -> None:
        self._finish_epoch(run, f"step {run.position.step}")

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        self._conclude()
        if self._bars:
            self._finish_epoch(run, f"stopped after {_batches(run.position.batch)}", f"step {run.position.step}")
        self._close()

    @hookimpl
    def on_fit_end(self, run: Run, exception: BaseException | None) -> None:
        if self._bars and exception is None:  # a signal ended the run, perhaps in a validation
            for inner in self._bars[1:]:
                self._bars[0].away += perf_counter() - inner.started
            del self._bars[1:]
            self._finish_epoch(run, f"interrupted after {_batches(run.position.batch)}", f"step {run.position.step}")

    def _finish_epoch(self, run: Run, *where: str) -> None:
        """Takes time and values of an epoch; its line is written when loggers get what was computed for it."""
        if not self._bars:
            return
        bar = self._bars.pop()
        bar.follow(run)
        if self._says:
            speed = _seconds(perf_counter() - bar.started), _rate(bar.count, bar.working(), bar.unit) if bar.count else ""
            self._ended = _Ended(bar, where, {**self._of_this_epoch(run), **self._evaluated}, speed)

    @staticmethod
    def _of_this_epoch(run: Run) -> dict[str, float]:
        """What is shown below the bar, without values of earlier epochs."""
        values = {}
        for name, value in run.metrics.progress().items():
            reading = run.metrics.fresh(name) if name in run.metrics else None
            if reading is None or reading.epoch == run.position.epoch:
                values[name] = value
        return values

    def _conclude(self, recorded: Mapping[str, float] | None = None) -> None:
        """Writes the line of the epoch that ended, with what was recorded at its end."""
        ended, self._ended = self._ended, None
        if ended is None:
            return
        values = {**ended.values, **(recorded or {})}
        shown = {name: value for name, value in values.items() if not (name.endswith("_epoch") and name[:-6] in values)}
        self._say(_line(ended.bar.label, *ended.where, *_values(self._ordered(shown)), *ended.speed), ended.bar)

    # ------------------------------------------------------------------ evaluation

    @hookimpl
    def on_validation_start(self, run: Run) -> None:
        self._begin(run, "validate")

    @hookimpl
    def on_validation_batch_end(self, run: Run) -> None:
        self._inner.done += 1
        if perf_counter() >= self._due:
            self._refresh(run)

    @hookimpl
    def on_validation_epoch_end(self) -> None:
        self._evaluated = {}  # what is recorded from now on is of the whole pass

    @hookimpl
    def on_validation_end(self, run: Run) -> None:
        self._end(run)

    @hookimpl
    def on_test_start(self, run: Run) -> None:
        self._begin(run, "test")

    @hookimpl
    def on_test_batch_end(self, run: Run) -> None:
        self._inner.done += 1
        if perf_counter() >= self._due:
            self._refresh(run)

    @hookimpl
    def on_test_epoch_end(self) -> None:
        self._evaluated = {}

    @hookimpl
    def on_test_end(self, run: Run) -> None:
        self._end(run)

    @hookimpl
    def on_predict_start(self, run: Run) -> None:
        self._begin(run, "predict")

    @hookimpl
    def on_predict_batch_end(self, run: Run) -> None:
        self._inner.done += 1
        if perf_counter() >= self._due:
            self._refresh(run)

    @hookimpl
    def on_predict_end(self, run: Run) -> None:
        self._end(run)

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], stage: str) -> None:
        if stage == "train":
            self._conclude(metrics)
        else:
            self._evaluated.update(metrics)

    def _begin(self, run: Run, stage: str) -> None:
        self._evaluated = {}
        self._inner = _Bar(stage, "batches", run.count_batches(stage))
        self._open(run, self._inner)

    def _end(self, run: Run) -> None:
        if not self._bars:
            return
        bar = self._bars.pop()
        whole = perf_counter() - bar.started
        speed = _seconds(whole), _rate(bar.done, whole, "batches")
        if not self._bars:
            values = {**run.metrics.progress(), **self._evaluated} if self._says else {}
            self._say(_line(bar.label, _batches(bar.done), *_values(values), *speed))
            self._close()
            return
        self._bars[-1].away += whole
        if not run.is_last_batch:  # at the end of an epoch the values stand in the epoch's line
            label = f"{bar.label} at step {run.position.step}"
            self._say(_line(label, _batches(bar.done), *_values(self._evaluated), *speed), *self._bars)

    # ------------------------------------------------------------------ what is shown

    @property
    def _says(self) -> bool:
        return isinstance(self._view, _Lines) or (self._view is not None and self.leave)

    def _say(self, line: str, *below: _Bar) -> None:
        """A line that stays, above the bars that go on or wait for the next."""
        if self._says:
            assert self._view is not None
            self._view.line(line, list(below))
            if self._bars and isinstance(self._view, _Lines):
                self._due = perf_counter() + self._interval

    def _open(self, run: Run, bar: _Bar) -> None:
        """Adds a bar; it is drawn at once if that is due, without reading anything."""
        if self._view is None:
            return
        self._bars.append(bar)
        if isinstance(self._view, _Lines):
            self._due = perf_counter() + self._interval
        elif self._due == math.inf or perf_counter() >= self._due:
            self._draw(run)

    def _refresh(self, run: Run) -> None:
        values = run.metrics.progress()
        if len(self._bars) > 1:  # what training showed stays while an evaluation inside of it shows its own
            values = {**self._shown, **values}
        self._shown = self._ordered(values)
        self._draw(run)

    def _ordered(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values in the order in which their names were first shown, so that none changes its place."""
        self._names.update(dict.fromkeys(values))
        return {name: values[name] for name in self._names if name in values}

    def _draw(self, run: Run) -> None:
        assert self._view is not None
        began = perf_counter()
        for bar in self._bars:
            bar.follow(run)
        self._bars[-1].mark()
        self._view.draw(self._bars, self._shown)
        ended = perf_counter()
        self._due = ended + max(self._interval, (ended - began) / SHARE)


def _epoch(run: Run) -> str:
    total = run.options.max_epochs
    return f"epoch {run.position.epoch + 1}" + (f"/{total}" if total is not None else "")


# ---------------------------------------------------------------------- text


def _line(label: str, *parts: str) -> str:
    return f"{label}: " + ", ".join(part for part in parts if part)


def _values(values: Mapping[str, float]) -> list[str]:
    return [f"{name} {_number(value)}" for name, value in values.items()]


def _batches(count: int) -> str:
    return "1 batch" if count == 1 else f"{count} batches"


def _number(value: float) -> str:
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:#.4g}".rstrip(".")


def _rate(count: int, seconds: float, unit: str) -> str:
    if seconds <= 0:
        return ""
    rate = count / seconds
    return f"{rate:.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.{2 if seconds < 10 else 1}f} s" if seconds < 60 else _clock(seconds)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


# ---------------------------------------------------------------------- streams


def _is_terminal(stream: Any) -> bool:
    """Whether ``stream`` is one; a stream may be missing or closed."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _log_handlers() -> Iterator[Any]:
    """The handlers of all loggers."""
    root = logging.getLogger()
    yield from root.handlers
    for logger in list(root.manager.loggerDict.values()):
        yield from getattr(logger, "handlers", ())


def _set(handler: Any, attribute: str, value: Any) -> None:
    """Changes where a handler writes; not in the middle of a line of another thread."""
    handler.acquire()
    try:
        setattr(handler, attribute, value)
    finally:
        handler.release()
