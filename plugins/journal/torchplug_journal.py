"""The journal of a run: every metric record and every event of its life, one JSON line each, in one file.

Everything that happens to a run can be read from it afterwards, which is what other loggers and a replay follow.
A line holds

* ``n``: the number of the record, which is the number of its line, from 0;
* ``event``: the name of the hook that it records, ``time``: when, in seconds since 1970;
* ``stage``, ``epoch``, ``batch``, ``step``, ``samples``: where the run stood (for ``log_metrics`` what the record says);
* the arguments of the hook under their names.

Numbers that are not finite are written ``NaN``, ``Infinity`` and ``-Infinity``: Python's ``json`` reads them back, stricter
readers may not. All lines are ASCII. Each one is handed to the system when it is written, so that a process that is killed
loses nothing that was recorded.

Figures are drawn into ``figures/`` beside it, each under the number of its record; ``path`` says where, seen from the journal.

A run that is resumed has one timeline: its checkpoint says how many records there were, what a process that is gone wrote
behind them moves to ``journal.abandoned.jsonl``, and the run goes on from there.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import json
import math
import os
import platform
import re
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from io import BufferedRandom
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from torchplug import Run, __version__, hookimpl

__all__ = ["Journal"]

PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")  # name and password in an address
LARGEST = 1000  # elements of an array that are written out


@dataclass(kw_only=True, eq=False)
class Journal:
    """Writes down metrics and events of a run as JSON lines in ``journal.jsonl``.

    A run that goes on in the same folder (a test after a fit) goes on in the same file. One that goes on from a checkpoint goes
    on behind the records of its moment; what stood there is moved to ``journal.abandoned.jsonl``.

    Args:
        dir: Folder of journal.jsonl. None: the directory of the run.
    """

    dir: str | os.PathLike[str] | None = None

    on_error = "disable"
    before = ("*",)  # an event stands before what others do because of it, and the end of the run comes last

    _file: BufferedRandom | None = field(init=False, default=None, repr=False)
    _next: int = field(init=False, default=0, repr=False)
    _time: float = field(init=False, default=0.0, repr=False)  # of the last record
    _before: int = field(init=False, default=0, repr=False)  # records that this run found
    _back: dict[str, Any] | None = field(init=False, default=None, repr=False)  # the state to go back to
    _validating: dict[str, Any] | None = field(init=False, default=None, repr=False)  # the state when the validation began
    _ended: Run | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.dir is not None and not isinstance(self.dir, (str, os.PathLike)):
            raise TypeError(f"dir must be a folder or None, got {self.dir!r}")

    # ------------------------------------------------------------------ the file

    def _record(self, run: Run, event: str, **values: Any) -> None:
        """Writes one line, at the place where the run stands."""
        where = run.position
        step = values.pop("step", where.step)
        self._write(run, event, where.stage, where.epoch, step, where.samples, json.dumps(_plain(values))[1:-1])

    def _write(self, run: Run, event: str, stage: str, epoch: int, step: int, samples: int, body: str) -> None:
        """What is recorded before ``on_run_start`` opens the file, what comes after the end closes it again."""
        if run.rank != 0 or run.dir == Path():  # a run that could not be launched has no folder
            return
        file = self._file or self._open(run)
        if self._back is not None:
            self._go_back(run, file)
        self._time = time.time()
        line = (
            f'{{"n": {self._next}, "event": "{event}", "time": {self._time!r}, "stage": "{stage}", "epoch": {epoch}, '
            f'"batch": {run.position.batch}, "step": {step}, "samples": {samples}{", " * bool(body)}{body}}}\n'
        ).encode()
        if file.raw.write(line) != len(line):
            raise OSError(errno.ENOSPC, f"the disk took a part of record {self._next} only")
        self._next += 1
        if self._ended is run:
            self._close()

    def _open(self, run: Run) -> BufferedRandom:
        folder = run.dir if self.dir is None or run.options.fast_dev_run else Path(self.dir)  # a trial run leaves nothing behind
        folder.mkdir(parents=True, exist_ok=True)
        run.journal = folder / "journal.jsonl"
        file = self._file = open(run.journal, "ab+")  # noqa: SIM115
        self._next, end = _whole_lines(file)
        file.truncate(end)
        self._before, self._back, self._validating = self._next, None, None
        return file

    def _go_back(self, run: Run, file: BufferedRandom) -> None:
        """Takes out what stands behind the records of a checkpoint and was there when this run opened the file."""
        state, self._back = self._back, None
        assert state is not None
        n = state["n"]
        if run.resumed is None or not 0 < n < self._before:  # nothing was broken off, or the file is not where it was
            return
        file.seek(0)
        last = deque(islice(file, n), maxlen=1).pop()
        if json.loads(last).get("time") != state["time"]:  # the journal of something else
            return
        end = file.tell()
        with open(Path(file.name).with_name("journal.abandoned.jsonl"), "ab") as abandoned:
            abandoned.writelines(islice(file, self._before - n))
            abandoned.flush()
            os.fsync(abandoned.fileno())  # only then it may go
        own = [json.loads(line) for line in file]
        file.truncate(end)
        file.writelines(json.dumps({**record, "n": number}).encode() + b"\n" for number, record in enumerate(own, n))
        file.flush()
        self._before, self._next = n, n + len(own)

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: how many records there are, and the time of the last, by which it is known again.

        A validation that is broken off does not count: the run that goes on begins it again.
        """
        return self._validating or {"n": self._next, "time": self._time}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` stood, with the next record: an error in a file is an error in a hook."""
        self._back = state

    # ------------------------------------------------------------------ a run from start to end

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        self._record(
            run,
            "on_run_start",
            id=run.id,
            work=run.work,
            dir=run.dir,
            module=type(run.module).__name__,
            device=run.device,
            world_size=run.world_size,
            versions={"torchplug": __version__, "torch": torch.__version__, "python": platform.python_version(), **run.packages},
            options={name: value for name, value in _options(run.options).items() if name != "plugins"},
            plugins={name: _options(plugin) for name, plugin in run.plugins.items()},
        )

    @hookimpl
    def log_hyperparameters(self, run: Run, hyperparameters: dict[str, Any]) -> None:
        self._record(run, "log_hyperparameters", hyperparameters=hyperparameters)

    @hookimpl
    def on_checkpoint_loaded(self, run: Run, path: Path | str) -> None:
        self._record(run, "on_checkpoint_loaded", path=path)

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        self._record(run, "on_fit_start")

    @hookimpl
    def on_sanity_start(self, run: Run) -> None:
        self._record(run, "on_sanity_start")

    @hookimpl
    def on_sanity_end(self, run: Run) -> None:
        self._record(run, "on_sanity_end")

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self._record(run, "on_train_start")

    @hookimpl
    def on_train_epoch_start(self, run: Run) -> None:
        self._record(run, "on_train_epoch_start")

    @hookimpl
    def log_metrics(self, run: Run, metrics: dict[str, float], stage: str, step: int, epoch: int, samples: int, seconds: float) -> None:
        self._write(run, "log_metrics", stage, epoch, step, samples, f'"metrics": {json.dumps(metrics)}, "seconds": {seconds!r}')

    @hookimpl
    def on_validation_start(self, run: Run) -> None:
        self._validating = self.state_dict()
        self._record(run, "on_validation_start")

    @hookimpl
    def on_validation_end(self, run: Run) -> None:
        self._record(run, "on_validation_end")
        self._validating = None

    @hookimpl
    def on_train_epoch_end(self, run: Run) -> None:
        self._record(run, "on_train_epoch_end")

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        self._record(run, "on_train_end")

    @hookimpl
    def on_fit_end(self, run: Run, exception: BaseException | None) -> None:
        self._record(run, "on_fit_end", exception=_said(exception))

    @hookimpl
    def on_test_start(self, run: Run) -> None:
        self._record(run, "on_test_start")

    @hookimpl
    def on_test_end(self, run: Run) -> None:
        self._record(run, "on_test_end")

    @hookimpl
    def on_predict_start(self, run: Run) -> None:
        self._record(run, "on_predict_start")

    @hookimpl
    def on_predict_end(self, run: Run) -> None:
        self._record(run, "on_predict_end")

    @hookimpl
    def on_run_end(self, run: Run, status: str) -> None:
        self._ended = run
        try:
            self._record(run, "on_run_end", status=status)
        finally:
            self._close()

    # ------------------------------------------------------------------ at any time

    @hookimpl
    def on_step_skipped(self, run: Run, reason: str) -> None:
        self._record(run, "on_step_skipped", reason=reason)

    @hookimpl
    def on_stop_requested(self, run: Run, reason: str, plugin: str) -> None:
        self._record(run, "on_stop_requested", reason=reason, plugin=plugin)

    @hookimpl
    def on_checkpoint_saved(self, run: Run, path: Path | str, metrics: dict[str, float], reason: str) -> None:
        self._record(run, "on_checkpoint_saved", path=path, metrics=metrics, reason=reason)

    @hookimpl
    def on_checkpoint_removed(self, run: Run, path: Path | str, reason: str) -> None:
        self._record(run, "on_checkpoint_removed", path=path, reason=reason)

    @hookimpl
    def log_figure(self, run: Run, name: str, figure: Any, step: int) -> None:
        if run.rank != 0:
            return
        if self._file is None:
            self._open(run)
        assert run.journal is not None
        path = Path("figures", f"{self._next}.png")
        try:
            (run.journal.parent / path.parent).mkdir(exist_ok=True)
            figure.savefig(run.journal.parent / path, format="png")
        except Exception as error:  # a figure that cannot be drawn is the user's
            run.say_once(f"journal: figure {name!r} cannot be drawn and is left out: {type(error).__name__}: {error}")
            return
        self._record(run, "log_figure", name=name, step=step, path=path)

    @hookimpl
    def log_text(self, run: Run, name: str, text: str, step: int) -> None:
        self._record(run, "log_text", name=name, text=text, step=step)

    @hookimpl
    def log_artifact(self, run: Run, path: Path, name: str) -> None:
        self._record(run, "log_artifact", path=path, name=name)

    @hookimpl
    def on_out_of_memory(self, run: Run, exception: BaseException) -> None:
        self._record(run, "on_out_of_memory", exception=_said(exception))

    @hookimpl
    def on_exception(self, run: Run, exception: BaseException) -> None:
        lines = traceback.format_exception(type(exception), exception, exception.__traceback__)
        self._record(run, "on_exception", exception=_said(exception), traceback="".join(lines))


def _said(exception: BaseException | None) -> str | None:
    return None if exception is None else f"{type(exception).__name__}: {exception}"


def _options(owner: Any) -> dict[str, Any]:
    """The public fields of a dataclass; nothing for a plugin that is none."""
    if not dataclasses.is_dataclass(owner):
        return {}
    return {each.name: getattr(owner, each.name) for each in dataclasses.fields(owner) if each.init and not each.name.startswith("_")}


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it and a person can read it: times as ``"90.0s"``, paths and whatever else as text."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, str):
        return PASSWORD.sub("***@", value) if "://" in value else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, timedelta):
        return f"{value.total_seconds()}s"
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(part) for name, part in _options(value).items()}
    if hasattr(value, "tolist") and math.prod(getattr(value, "shape", ())) <= LARGEST:  # tensors, numpy's arrays and numbers
        return _plain(value.tolist())
    return str(value)


def _whole_lines(file: BufferedRandom) -> tuple[int, int]:
    """How many whole lines a file has and where they end; behind them may lie what a killed process could not finish."""
    count = end = read = 0
    file.seek(0)
    while block := file.read(1 << 20):
        count += block.count(b"\n")
        if b"\n" in block:
            end = read + block.rindex(b"\n") + 1
        read += len(block)
    return count, end
