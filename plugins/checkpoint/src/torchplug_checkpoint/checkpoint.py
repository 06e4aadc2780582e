"""When something is saved: the options of the plugin, and the events that it acts on."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from torchplug import Run, duration, hookimpl
from torchplug_checkpoint import finding
from torchplug_checkpoint.books import Books, Save
from torchplug_checkpoint.names import DEFAULT, LAST, check_template, filled
from torchplug_checkpoint.saver import Saver
from torchplug_checkpoint.store import is_url, open_store
from torchplug_checkpoint.writer import Writer

__all__ = ["Checkpoint"]


@dataclass(kw_only=True, eq=False)
class Checkpoint:
    """Keeps the ``top_k`` best checkpoints of a run by one metric, and the newest one as ``last.safetensors``.

    Each event writes at most one file; where it is both among the best and the last, the second name is a hard link to it
    (a copy where the file system has none). A monitored value counts once, when it is new: after the validation or at the
    end of the epoch that computed it. An old value means wait; one that is NaN or infinite is never best; a metric that
    nobody logs is an error as soon as every metric had its chance. Only files that this plugin wrote in this run are deleted,
    and never one that a run was resumed from.

    Args:
        dir: Folder to write into, or a URL such as `s3://bucket/folder`. None: `checkpoints` in the run's directory, and in it
            a folder for each instance that has a name of its own.
        monitor: Name of the metric that says which checkpoint is best. None: there is no best, only newer ones.
        mode: Which values are better: 'min' for lower ones (a loss), 'max' for higher ones (an accuracy).
        top_k: How many of the best checkpoints to keep, or of the newest ones without a monitor; -1 keeps all, 0 none.
        last: Keep the newest checkpoint as `last.safetensors`.
        every_n_steps: Save every this many optimizer steps.
        every_n_epochs: Save at the end of every n-th epoch; other epochs' values of the monitor are not looked at then.
            None: every epoch if neither steps nor a time is given.
        every_time: Save when this long has passed since the last save: '30s', '10m', '1h30m' or a timedelta.
        filename: Template for the names of all files but the last: {epoch}, {step} and any metric, such as {val_loss:.3f}.
        background: Go on training while a file is written: the state is copied to host memory first, which stays for the next.
        save_weights_only: Leave out what only a resume needs: optimizers, generators, plugins and so on.
        save_on_exception: When an error ends the run, write the state that it left to `exception-epoch=...-step=...`.

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
    filename: str = DEFAULT
    background: bool = True
    save_weights_only: bool = False
    save_on_exception: bool = False

    after = ("*",)  # what is decided here is decided after everybody handled the event
    observes = True  # an error of it ends the run all the same

    def __post_init__(self) -> None:
        self._check()
        self._seconds = None if self.every_time is None else duration("every_time", self.every_time)
        between = self.every_n_steps is not None or self._seconds is not None
        self._epochs = self.every_n_epochs or (None if between else 1)
        if not between:  # not a hook then: training steps are many, and a hook that nobody listens to is free
            self.on_train_batch_end = None  # type: ignore[assignment]
        self._saver: Saver | None = None
        self._forget()

    def _check(self) -> None:
        if self.dir is not None and (not isinstance(self.dir, (str, os.PathLike)) or not os.fspath(self.dir)):
            raise TypeError(f"dir must be a path, a URL or None, got {self.dir!r}")
        if self.monitor is not None and (not isinstance(self.monitor, str) or not self.monitor):
            raise ValueError(f"monitor must be the name of a metric or None, got {self.monitor!r}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {self.mode!r}")
        if type(self.top_k) is not int or self.top_k < -1:
            raise ValueError(f"top_k must be a number of checkpoints, -1 for all or 0 for none, got {self.top_k!r}")
        for name in ("last", "background", "save_weights_only", "save_on_exception"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
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
        check_template(self.filename)

    def _forget(self) -> None:
        """Nothing of an earlier run stays."""
        self._books = Books(self.top_k, 1 if self.monitor is not None and self.mode == "min" else -1, self.monitor is not None)
        self._writer = Writer()
        self._seen = -1  # serial of the last reading
        self._step = 0  # when every_n_steps was looked at
        self._since = 0.0  # seconds since the last save that passed before this process
        self._active = self._loaded = self._trains = False

    @property
    def best_path(self) -> Path | str | None:
        return None if self._saver is None else self._saver.best_path

    @property
    def best_score(self) -> float | None:
        return None if self._saver is None else self._saver.best_score

    @property
    def last_path(self) -> Path | str | None:
        return None if self._saver is None else self._saver.last_path

    # ------------------------------------------------------------------ the start

    @hookimpl
    def find_checkpoints(self, run: Run, which: str) -> list[Path | str] | None:
        instances = _instances(run)
        if which not in ("last", "best") or next(iter(instances.values())) is not self:  # the first one answers for all
            return None
        return finding.newest(run, instances) if which == "last" else finding.best(run, instances)

    @hookimpl
    def setup(self, run: Run, stage: str) -> None:
        if stage != "fit":
            return
        self._forget()
        self._active = True
        name, instances = run.name_of(self), _instances(run)
        folder = None if run.options.fast_dev_run else self.dir  # a trial run leaves nothing behind
        judges = [each for each in instances.values() if each.monitor is not None and each.top_k]
        self._saver = Saver(
            name=name,
            books=self._books,
            store=open_store(finding.folder_in(run.dir, name) if folder is None else folder),
            own=folder is None,
            writer=lambda: next(iter(instances.values()))._writer,
            weights_only=self.save_weights_only,
            leads=judges[:1] == [self],  # with several monitors, the first one says what the run's best is
            why_gone=f"no longer among the {self.top_k} {'newest' if self.monitor is None else 'best'}",
            now=lambda: run.seconds,
        )

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        saver = self._the_saver
        for name, other in _instances(run).items():
            if other is not self and other._the_saver.store.place == saver.store.place:
                raise ValueError(f"{saver.name!r} and {name!r} would both write into {saver.store.place!r}; give each a dir of its own")
        saver.reconcile(run)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self._trains = True
        self._the_saver.clock = run.seconds - self._since
        if self._loaded:
            run.at_boundary(lambda: self._the_saver.finish_owed(run))
        if self.monitor not in run.metrics:  # serials begin anew where metrics were not resumed
            self._seen = -1
        self._step = min(self._step, run.position.step) if self._loaded else run.position.step

    # ------------------------------------------------------------------ when

    @hookimpl
    def on_train_batch_end(self, run: Run) -> None:
        if run.agreement is None:  # several ranks do not talk at every step
            self._the_saver.check(run)
        if run.position.step != self._step and self._due(run):  # never within an accumulation window
            self._save(run, None)

    @hookimpl
    def on_validation_end(self, run: Run) -> None:
        if run.work != "fit":
            return
        self._the_saver.check(run)
        if not run.is_last_batch:  # at the end of an epoch it is on_train_epoch_end that saves
            value = self._fresh(run)
            if value is not None:
                self._save(run, value)

    @hookimpl
    def on_train_epoch_end(self, run: Run) -> None:
        self._the_saver.check(run)
        value = self._fresh(run)
        due = self._due(run)
        if value is not None or due or (self._epochs is not None and (run.position.epoch + 1) % self._epochs == 0):
            self._save(run, value)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        saver = self._the_saver
        saver.settle(run)
        if self.monitor is not None and self._seen < 0:
            there = ", ".join(sorted(run.metrics.results())) or "none"
            run.say_once(
                f"plugin {saver.name!r}: training ended before any value of {self.monitor!r} was computed, so there is no best "
                f"checkpoint (there are: {there})"
            )
        if not saver.holds(run):
            self._save(run, None, final=True)

    @hookimpl
    def on_stop_requested(self, run: Run) -> None:
        if not run.interrupted or not self._trains:
            return
        saver = self._the_saver
        saver.settle(run)
        if self._books.owed or saver.holds(run):  # what is owed is written at this boundary
            return
        name = LAST
        if not self.last:  # a name that needs no metric will do
            template = self.filename if self._seen >= 0 or self.monitor is None else DEFAULT
            name = saver.decided(run, lambda: saver.free(run, filled(template, run)))
        saver.put_off(run, Save(name, self.last, f"interrupted by {run.interrupted}", counted=False, behind=False))

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
        return self._seconds is not None and run.seconds - self._the_saver.clock >= self._seconds

    def _save(self, run: Run, value: float | None, final: bool = False) -> None:
        """All that one event does: at most one file, which is `last` too, and what lost its place goes."""
        saver, books = self._the_saver, self._books
        saver.settle(run)
        score = float(books.saves) if self.monitor is None else value
        place = books.place(score)
        if place is None and not self.last:
            return

        def named() -> str:
            if self.last:
                saver.keep_foreign(run)
            return LAST if place is None else saver.free(run, filled(self.filename, run))

        name, reason = saver.decided(run, named), "last"
        if place is not None:
            reason = ("newest" if self.monitor is None else "top_k" if place else "best") + " and last" * self.last
        metrics = {} if self.monitor is None or value is None else {self.monitor: value}
        save = Save(name, self.last, reason, metrics, behind=self.background and not final)  # no training is behind the final one
        saver.put_off(run, save, place, 0.0 if score is None else score)

    # ------------------------------------------------------------------ the end

    @hookimpl
    def on_exception(self, run: Run, exception: BaseException) -> None:
        if run.rank or not self.save_on_exception or not self._trains or not isinstance(exception, Exception):
            return  # who pressed Ctrl-C twice is in a hurry
        try:
            self._the_saver.emergency(run, exception)
        except Exception as error:  # the run has an error already, and that is the one to be seen
            run.say_once(f"plugin {self._the_saver.name!r}: the emergency checkpoint could not be written: {error!r}")

    @hookimpl
    def on_fit_end(self, run: Run) -> None:
        if not self._active:  # something failed before setup
            return
        saver = self._the_saver
        try:
            saver.close(run)
        finally:
            if saver.last_path is not None and not run.options.fast_dev_run:  # whose folder is about to vanish
                best = f"best {saver.best_path} ({self.monitor}={saver.best_score:.6g})\n    " if saver.best_path is not None else ""
                run.report[saver.name] = f"{best}last {saver.last_path}"

    @hookimpl
    def teardown(self) -> None:
        self._active = self._trains = False
        self._writer.close()
        if self._saver is not None:
            self._saver.release()

    # ------------------------------------------------------------------ files that are no local ones

    @hookimpl
    def save_checkpoint(self, run: Run, path: Path | str, state: dict[str, Any]) -> str | None:
        if not is_url(path):
            return None
        from torchplug_checkpoint.remote import put

        return put(run, str(path), state) if run.rank == 0 else str(path)

    @hookimpl
    def load_checkpoint(self, path: Path | str) -> dict[str, Any] | None:
        if not is_url(path):
            return None
        from torchplug_checkpoint.remote import fetch

        return fetch(str(path))

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the files there are, what they are ranked by, and what is decided and not done."""
        books = self._books
        return {
            **books.state_dict(),
            "best": books.kept[0].name if books.ranked and books.kept else None,
            "ranked_by": [self.monitor, self.mode],
            "seen": self._seen,
            "step": self._step,
            "since": self._saver.now() - self._saver.clock if self._seconds is not None and self._saver is not None else 0.0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; scores of another metric are no scores."""
        self._books.load_state_dict(state)
        self._seen, self._step, self._since, self._loaded = state["seen"], state["step"], state["since"], True
        if state["ranked_by"] != [self.monitor, self.mode]:
            self._books.kept, self._seen = [], -1

    @property
    def _the_saver(self) -> Saver:
        assert self._saver is not None, "setup comes first"
        return self._saver


def _instances(run: Run) -> dict[str, Checkpoint]:
    return {name: each for name, each in run.plugins.items() if isinstance(each, Checkpoint)}
