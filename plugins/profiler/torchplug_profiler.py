"""Shows where the time of a run goes: by plugin and hook, as a table and as a timeline for Chrome or Perfetto."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from torchplug import Run, hookimpl

__all__ = ["Profiler", "Spent"]

WAITING = ("data", "next batch")  # what lies between the end of one batch and the beginning of the next
FIRST = ("find_checkpoints", "load_checkpoint", "launch")  # with these a run begins


@dataclass
class Spent:
    """Time in one hook of one plugin.

    Args:
        calls: how often it was called; the two parts of a wrapper are one call each.
        total: seconds between its beginning and its end.
        own: seconds of those in which no other hook ran inside of it.
    """

    calls: int = 0
    total: float = 0.0
    own: float = 0.0


class _Call(NamedTuple):
    """One that is running, and when it began, in nanoseconds."""

    key: tuple[str, str]
    begin: int


@dataclass
class _Thread:
    """What runs in one thread.

    Args:
        running: the calls that have not ended, the outermost first.
        inner: for each of them, the nanoseconds that other calls took inside of it.
        ended: for each depth, which hook ended there last (or began, for what is inside of it), and when.
    """

    running: list[_Call] = field(default_factory=list)
    inner: list[int] = field(default_factory=list)
    ended: dict[int, tuple[str, int]] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Profiler:
    """Measures every call of every hook: those of plugins, of the module, and core's own answers to operations.

    When the run is over, a table lists plugins and hooks by their own time, which is without the hooks that ran inside of them.
    ``timeline-RANK.json`` in the run's directory, or the file of ``Trainer(trace=...)``, holds the calls one by one, in the Trace
    Event Format that Chrome (``chrome://tracing``) and https://ui.perfetto.dev open. "core train_step" is the module's
    ``training_step``, "data next batch" is the time that the run waits for its loaders.

    Args:
        rows: Rows of the table that is shown; the attribute ``spent`` has all of them.
        timeline: Whether the timeline is written, or the file to write it to; of another rank than 0, FILE-RANK.
        max_calls: How many calls the timeline holds at most, the first ones. The table counts all.
        synchronize: Whether the device is waited for before and after each call. A call then takes the time of the work that
            it starts, and the run is slower. Without it, work on a GPU shows where somebody waits for it.

    Attributes:
        spent: `Spent` by (plugin, hook), of the last run.
        seconds: how long that run took.
    """

    rows: int = 20
    timeline: bool | str | os.PathLike[str] = True
    max_calls: int = 200_000
    synchronize: bool = False

    before = ("*",)  # the last of the plugins in what is told in reverse order
    observes = True  # an error of it ends the run all the same

    spent: dict[tuple[str, str], Spent] = field(init=False, default_factory=dict, repr=False)
    seconds: float = field(init=False, default=0.0, repr=False)
    _threads: dict[int, _Thread] = field(init=False, default_factory=dict, repr=False)
    _calls: list[tuple[int, str, str, int, int]] = field(init=False, default_factory=list, repr=False)
    _kept: set[str] = field(init=False, default_factory=set, repr=False)  # the files of earlier runs
    _left_out: int = field(init=False, default=0, repr=False)
    _begin: int = field(init=False, default=0, repr=False)
    _over: bool = field(init=False, default=True, repr=False)
    _run: Run | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("max_calls", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {getattr(self, name)!r}")
        if not isinstance(self.synchronize, bool):
            raise TypeError(f"synchronize must be True or False, got {self.synchronize!r}")
        if not isinstance(self.timeline, (bool, str, os.PathLike)) or not str(self.timeline):
            raise TypeError(f"timeline must be True, False or a path, got {self.timeline!r}")

    # ------------------------------------------------------------------ what core calls around every hook

    def enter_call(self, member: str, hook: str) -> None:
        """A call begins."""
        now = self._now()
        if self._over and hook in FIRST:
            self.spent, self._calls, self._threads, self._left_out = {}, [], {}, 0
            self._begin, self._over = now, False
        ident = threading.get_ident()
        thread = self._threads.get(ident)
        if thread is None:
            thread = self._threads[ident] = _Thread()
        depth = len(thread.running)
        last, since = thread.ended.get(depth, ("", now))
        if hook == "move_batch" != last:
            self._count(WAITING, since, now, now - since)
            if depth:
                thread.inner[-1] += now - since
        thread.running.append(_Call((member, hook), now))
        thread.inner.append(0)
        thread.ended[depth + 1] = hook, now

    def leave_call(self) -> None:
        """The call that began last in this thread ends."""
        now, thread = self._now(), self._threads[threading.get_ident()]
        (key, begin), inner = thread.running.pop(), thread.inner.pop()
        depth = len(thread.running)
        thread.ended[depth] = key[1], now
        if depth:
            thread.inner[-1] += now - begin
        if key[1] != "launch":  # that is the run itself
            self._count(key, begin, now, now - begin - inner)

    def _now(self) -> int:
        if self.synchronize and self._run is not None and self._run.device.type != "cpu":
            torch.accelerator.synchronize(self._run.device)
        return time.perf_counter_ns()

    def _count(self, key: tuple[str, str], begin: int, end: int, own: int) -> None:
        spent = self.spent.get(key)
        if spent is None:
            spent = self.spent[key] = Spent()
        spent.calls += 1
        spent.total += (end - begin) / 1e9
        spent.own += own / 1e9
        if not self.timeline:
            return
        if len(self._calls) < self.max_calls:
            self._calls.append((threading.get_ident(), *key, begin, end))
        else:
            self._left_out += 1

    # ------------------------------------------------------------------ hooks

    @hookimpl
    def setup(self, run: Run) -> None:
        self._run = run
        if not isinstance(self.timeline, bool):  # what cannot be written is said now, not when everything is over
            self._path(run).parent.mkdir(parents=True, exist_ok=True)
            self._path(run).write_text("", encoding="utf-8")

    @hookimpl
    def on_train_epoch_start(self) -> None:
        """Being called is enough: from here on the first batch is waited for."""

    @hookimpl
    def on_predict_epoch_start(self) -> None:
        """The same; an evaluation is a call itself."""

    @hookimpl
    def on_run_end(self, run: Run) -> None:
        self.seconds = (time.perf_counter_ns() - self._begin) / 1e9
        lines = [self.table()]
        if self.timeline:
            path = self._path(run)
            self._write(path, run.rank)
            self._kept.add(str(path))
            lines.append(f"{len(self._calls)} calls in {path}" + (f", {self._left_out} later ones left out" if self._left_out else ""))
        run.report[run.name_of(self)] = "\n".join(lines)
        self._over, self._run, self._calls = True, None, []

    def _path(self, run: Run) -> Path:
        path = run.dir / f"timeline-{run.rank}.json" if isinstance(self.timeline, bool) else Path(self.timeline)
        if run.rank and not isinstance(self.timeline, bool):
            path = path.with_stem(f"{path.stem}-{run.rank}")
        if str(path) in self._kept:  # a test after a fit has a file of its own
            path = path.with_stem(f"{path.stem}-{run.work}")
        return path

    def table(self) -> str:
        """Where the time of the last run went, the most expensive hook first."""
        listed = sorted(self.spent.items(), key=lambda item: -item[1].own)
        outside = self.seconds - sum(spent.own for _, spent in listed)
        rows = [*listed[: self.rows], (("outside of hooks", ""), Spent(1, outside, outside))]
        rest = [spent for _, spent in listed[self.rows :]]
        if rest:
            together = Spent(sum(each.calls for each in rest), sum(each.total for each in rest), sum(each.own for each in rest))
            rows.insert(-1, ((f"{len(rest)} more", ""), together))
        plugin, hook = max(len(name) for (name, _), _ in rows), max(len(what) for (_, what), _ in rows)
        lines = [
            f"{self.seconds:.2f} s in all",
            f"{'plugin':{plugin}}  {'hook':{hook}}  {'calls':>9}  {'total s':>9}  {'own s':>9}  own us/call  share",
        ]
        for (name, what), spent in rows:
            each, share = spent.own / spent.calls * 1e6, spent.own / self.seconds if self.seconds else 0.0
            lines.append(
                f"{name:{plugin}}  {what:{hook}}  {spent.calls:9d}  {spent.total:9.3f}  {spent.own:9.3f}  {each:11.1f}  {share:5.1%}"
            )
        return "\n".join(lines)

    def _write(self, path: Path, rank: int) -> None:
        """Times in the file are microseconds from the beginning of the run."""
        with path.open("w", encoding="utf-8") as file:
            name = {"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n' + json.dumps(name))
            for thread, member, hook, begin, end in self._calls:
                event = {
                    "name": f"{member} {hook}", "cat": member, "ph": "X", "pid": rank, "tid": thread,
                    "ts": (begin - self._begin) / 1e3, "dur": (end - begin) / 1e3,
                }  # fmt: skip
                file.write(",\n" + json.dumps(event))
            file.write("\n]}\n")
