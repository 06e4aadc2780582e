"""Writes checkpoints while a run trains, and keeps the best ones and the newest."""

from __future__ import annotations

import bisect
import difflib
import logging
import math
import os
import re
import shutil
import string
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchplug import Run, duration, hookimpl

__all__ = ["Checkpoint"]

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class _Kept:
    """A file that this plugin wrote, and what it is ranked by: the monitored value, or how many saves came before it."""

    path: Path
    score: float


@dataclass(kw_only=True, eq=False)
class Checkpoint:
    """Keeps the ``top_k`` best checkpoints of a run by one metric, and the newest one as ``last.safetensors``.

    Each event writes at most one file; where it is both among the best and the last, the second name is a hard link to it
    (a copy where the file system has none). A monitored value counts once, when it is new: after the validation or at the
    end of the epoch that computed it. An old value means wait; one that is NaN or infinite is never best; a metric that
    nobody logs is an error as soon as every metric had its chance. Only files that this plugin wrote in this run are deleted.

    Args:
        dir: Folder to write into. None: `checkpoints` in the run's directory, and in it a folder for each instance that has
            a name of its own.
        monitor: Name of the metric that says which checkpoint is best. None: there is no best, only newer ones.
        mode: Which values are better: 'min' for lower ones (a loss), 'max' for higher ones (an accuracy).
        top_k: How many of the best checkpoints to keep, or of the newest ones without a monitor; -1 keeps all, 0 none.
        last: Keep the newest checkpoint as `last.safetensors`.
        every_n_steps: Save every this many optimizer steps.
        every_n_epochs: Save at the end of every n-th epoch; other epochs' values of the monitor are not looked at then.
            None: every epoch if neither steps nor a time is given.
        every_time: Save when this long has passed since the last save: '30s', '10m', '1h30m' or a timedelta.
        filename: Template for the names of all files but the last: {epoch}, {step} and any metric, such as {val_loss:.3f}.

    Attributes:
        best_path: The best checkpoint so far, None without a monitor.
        best_score: The monitored value of the best checkpoint.
        last_path: The newest checkpoint that is kept.
    """

    dir: str | os.PathLike[str] | None = None
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    top_k: int = 1
    last: bool = True
    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    every_time: str | timedelta | None = None
    filename: str = "epoch={epoch}-step={step}"

    best_path: Path | None = field(init=False, default=None)
    best_score: float | None = field(init=False, default=None)
    last_path: Path | None = field(init=False, default=None)

    after = ("*",)  # the state that is saved is the one after everybody handled the event

    def __post_init__(self) -> None:
        self._check()
        self._seconds = None if self.every_time is None else duration("every_time", self.every_time)
        between = self.every_n_steps is not None or self._seconds is not None
        self._epochs = self.every_n_epochs or (None if between else 1)
        self._sign = 1 if self.monitor is not None and self.mode == "min" else -1
        if not between:  # not a hook then: training steps are many, and a hook that nobody listens to is free
            self.on_train_batch_end = None  # type: ignore[assignment]
        self._forget()

    def _check(self) -> None:
        if self.dir is not None and (not isinstance(self.dir, (str, os.PathLike)) or not os.fspath(self.dir)):
            raise TypeError(f"dir must be a path or None, got {self.dir!r}")
        if self.dir is not None and "://" in os.fspath(self.dir):
            raise ValueError(f"dir must be a local folder, got {self.dir!r}; remote places cannot be written yet")
        if self.monitor is not None and (not isinstance(self.monitor, str) or not self.monitor):
            raise ValueError(f"monitor must be the name of a metric or None, got {self.monitor!r}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {self.mode!r}")
        if type(self.top_k) is not int or self.top_k < -1:
            raise ValueError(f"top_k must be a number of checkpoints, -1 for all or 0 for none, got {self.top_k!r}")
        if not isinstance(self.last, bool):
            raise TypeError(f"last must be True or False, got {self.last!r}")
        for name in ("every_n_steps", "every_n_epochs"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number from 1 on or None, got {value!r}")
        if not self.last and self.top_k == 0:
            raise ValueError("top_k=0 with last=False would keep nothing; leave the plugin out, or keep one of them")
        if not self.last and self.monitor is not None and (self.every_n_steps is not None or self.every_time is not None):
            raise ValueError(
                "with a monitor, every_n_steps and every_time write last.safetensors alone, because what they save has no value to be "
                "ranked by: leave them out, or write last=True"
            )
        _check_template(self.filename)

    def _forget(self) -> None:
        """Nothing of an earlier run stays."""
        self.best_path, self.best_score, self.last_path = None, None, None
        self._name, self._folder, self._leads = "checkpoint", Path(), False
        self._kept: list[_Kept] = []  # the best first
        self._saves = 0
        self._seen = -1  # serial of the last reading
        self._step = 0  # when every_n_steps was looked at
        self._clock = time.monotonic()
        self._saved: tuple[int, list[Tensor]] = (-1, [])  # the state that was saved last

    # ------------------------------------------------------------------ hooks

    @hookimpl
    def setup(self, run: Run, stage: str) -> None:
        if stage != "fit":
            return
        self._forget()
        self._name = run.name_of(self)
        self._folder = self._folder_of(run)
        judges = [each for each in run.plugins.values() if isinstance(each, Checkpoint) and each.monitor is not None and each.top_k]
        self._leads = judges[:1] == [self]  # with several monitors, the first one says what the run's best is

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        for name, other in run.plugins.items():
            if isinstance(other, Checkpoint) and other is not self and other._folder.resolve() == self._folder.resolve():
                raise ValueError(f"{self._name!r} and {name!r} would both write into {str(self._folder)!r}; give each a dir of its own")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise type(error)(
                error.errno, f"checkpoints cannot be written into {str(self._folder)!r} ({error.strerror}); choose another dir"
            ) from error

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self._step, self._clock = run.position.step, time.monotonic()

    @hookimpl
    def on_train_batch_end(self, run: Run) -> None:
        if run.position.step != self._step and self._due(run):  # never within an accumulation window
            self._save(run, None)

    @hookimpl
    def on_validation_end(self, run: Run) -> None:
        if run.work == "fit" and not run.is_last_batch:  # at the end of an epoch it is on_train_epoch_end that saves
            value = self._fresh(run)
            if value is not None:
                self._save(run, value)

    @hookimpl
    def on_train_epoch_end(self, run: Run) -> None:
        value = self._fresh(run)
        due = self._due(run)
        if value is not None or due or (self._epochs is not None and (run.position.epoch + 1) % self._epochs == 0):
            self._save(run, value)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        if self.monitor is not None and self._seen < 0:
            there = ", ".join(sorted(run.metrics.results())) or "none"
            run.say_once(
                f"plugin {self._name!r}: training ended before any value of {self.monitor!r} was computed, so there is no best "
                f"checkpoint (there are: {there})"
            )
        (batches, values), now = self._saved, _state_of(run)
        if batches != now[0] or not all(map(torch.equal, values, now[1])):
            self._save(run, None)

    @hookimpl
    def on_fit_end(self, run: Run) -> None:
        if self._saves and not run.options.fast_dev_run:  # whose folder is about to vanish
            best = f"best {self.best_path} ({self.monitor}={self.best_score:.6g})\n    " if self.best_path is not None else ""
            run.report[self._name] = f"{best}last {self.last_path}"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the files there are and what they are ranked by."""
        return {
            "best_path": _text(self.best_path),
            "best_score": self.best_score,
            "last_path": _text(self.last_path),
            "kept": [{"path": str(kept.path), "score": kept.score} for kept in self._kept],
            "saves": self._saves,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.best_path, self.last_path = (Path(state[name]) if state[name] is not None else None for name in ("best_path", "last_path"))
        self.best_score, self._saves = state["best_score"], state["saves"]
        self._kept = [_Kept(Path(kept["path"]), kept["score"]) for kept in state["kept"]]

    # ------------------------------------------------------------------ when

    def _fresh(self, run: Run) -> float | None:
        """The monitored value if there is a new one that can be ranked."""
        if self.monitor is None:
            return None
        reading = run.metrics.fresh(self.monitor, self._seen)
        if reading is None:
            return None
        self._seen = reading.serial
        if not math.isfinite(reading.value) or (run.position.epoch + 1) % (self.every_n_epochs or 1):
            return None
        return reading.value

    def _due(self, run: Run) -> bool:
        """Whether every_n_steps or every_time say that it is time."""
        step, before, every = run.position.step, self._step, self.every_n_steps
        self._step = step
        if every is not None and step // every != before // every:
            return True
        return self._seconds is not None and time.monotonic() - self._clock >= self._seconds

    # ------------------------------------------------------------------ what is written and what goes

    def _save(self, run: Run, value: float | None) -> None:
        """All that one event does: at most one file is written, `last` is made from it, what lost its place is deleted."""
        score = float(self._saves) if self.monitor is None else value
        place = self._place(score)
        if place is None and not self.last:
            return
        before = self.state_dict()
        path = newest = self._folder / f"last{SUFFIX}"
        if self.last and self.last_path is None:
            self._keep_foreign(run, newest)
        dropped, reason = [], "last"
        if place is not None and score is not None:
            path = self._free(_filled(self.filename, run))
            dropped = self._enter(place, _Kept(path, score))
            reason = ("newest" if self.monitor is None else "top_k" if place else "best") + " and last" * self.last
        self._saves += 1
        self.last_path = newest if self.last else path
        try:  # the books are kept before the file is written, because they are part of it
            written = run.save_checkpoint(path, reason, {} if self.monitor is None or value is None else {self.monitor: value})
            if self.last and path != newest:
                _link(written, newest)
        except BaseException:
            self.load_state_dict(before)
            raise
        self._saved, self._clock = _state_of(run), time.monotonic()
        run.last_path = self.last_path
        if self._leads:
            run.best_path = self.best_path
        for kept in dropped:
            run.remove_checkpoint(kept.path, f"no longer among the {self.top_k} {'newest' if self.monitor is None else 'best'}")

    def _place(self, score: float | None) -> int | None:
        """Where a checkpoint with this score stands among those kept, None if it is not one of them; the earlier of equals stands first."""
        if score is None or self.top_k == 0:
            return None
        place = bisect.bisect_right([self._sign * kept.score for kept in self._kept], self._sign * score)
        return None if place == self.top_k else place

    def _enter(self, place: int, new: _Kept) -> list[_Kept]:
        """Takes ``new`` in among those kept and hands out those that lose their place."""
        self._kept.insert(place, new)
        dropped = self._kept[self.top_k :] if self.top_k > 0 else []
        del self._kept[len(self._kept) - len(dropped) :]
        if self.monitor is not None:
            self.best_path, self.best_score = self._kept[0].path, self._kept[0].score
        return dropped

    def _free(self, stem: str) -> Path:
        """A path for a new file: no checkpoint is written over another one."""
        path, version = self._folder / f"{stem}{SUFFIX}", 0
        while os.path.lexists(path) or (stem == "last" and version == 0):
            version += 1
            path = self._folder / f"{stem}-v{version}{SUFFIX}"
        return path

    def _keep_foreign(self, run: Run, newest: Path) -> None:
        """A `last` that another run left in the folder gets another name, because it is not ours to write over."""
        if newest.exists():
            other = self._free("last")
            newest.rename(other)
            run.say_once(f"plugin {self._name!r}: {newest} was there before this run, it is {other.name} now", logging.INFO)

    def _folder_of(self, run: Run) -> Path:
        if self.dir is not None and not run.options.fast_dev_run:  # a trial run leaves nothing behind
            return Path(self.dir).expanduser()
        base, _, instance = self._name.partition(":")
        own = instance or ("" if base == "checkpoint" else base)
        return run.dir / "checkpoints" / _safe(own) if own else run.dir / "checkpoints"


def _state_of(run: Run) -> tuple[int, list[Tensor]]:
    """Tells one state of training from another: batches seen, and up to about a thousand values of each tensor of the module.

    A plugin may change the module when training has ended (averaged weights), and the newest checkpoint must have that.
    """
    tensors = (*run.module.parameters(), *run.module.buffers())
    return run.position.micro_step, [each.detach().reshape(-1)[:: 1 + each.numel() // 1000].to("cpu", copy=True) for each in tensors]


def _link(written: Path, newest: Path) -> None:
    """Makes ``newest`` a second name of the file ``written``, or a copy; whoever looks finds the old one or the new one, whole."""
    temporary = newest.with_name(f".{newest.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(written, temporary)
        except OSError:  # this file system has no hard links
            with open(written, "rb") as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
        os.replace(temporary, newest)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------- names


class _ByName(string.Formatter):
    """Formats fields by their whole name: dots and slashes in it are part of a metric's name."""

    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return kwargs[field_name], field_name


def _check_template(template: Any) -> None:
    """Refuses a file name template that cannot be filled in."""
    if not isinstance(template, str) or not template:
        raise ValueError(f"filename must be a template such as '{{epoch}}-{{step}}-{{val_loss:.3f}}', got {template!r}")
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"filename {template!r} is not a template: {error}") from error
    if any(not name or name.isdigit() for name in names):
        raise ValueError(f"filename {template!r} must say by name what to put in, such as {{epoch}}")


def _filled(template: str, run: Run) -> str:
    """A file name from the template, without the suffix, safe on every file system."""
    place = {"epoch": run.position.epoch, "step": run.position.step}
    values = {**place, **run.metrics.results(), **place}
    try:
        name = _ByName().vformat(template, (), values)
    except KeyError as error:
        near = difflib.get_close_matches(str(error.args[0]), values, n=1)
        meant = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"filename {template!r}: there is no {error.args[0]!r}{meant}; there are: {', '.join(values)}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"filename {template!r} cannot be filled in: {error}") from error
    return _safe(name.removesuffix(SUFFIX))


def _safe(name: str) -> str:
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", name)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
