"""Metrics, hyperparameters, texts, figures and the model's graph for TensorBoard."""

from __future__ import annotations

import io
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch

from torchplug import Run, hookimpl, preserved

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Tensorboard"]


@dataclass(kw_only=True, eq=False)
class Tensorboard:
    """Writes TensorBoard's event files, from the first process only.

    Each metric is a scalar under the name it was logged with, at the optimizer step of its record. The hyperparameters are one
    row in HPARAMS, beside the last value of every metric and with how the run ended. A run that goes on in the same folder (a
    test after a fit) adds an event file there. One that goes on from a checkpoint does so too, and what was written behind that
    checkpoint moves to files that TensorBoard does not read, so that no point shows twice.

    Args:
        dir: Folder of the event files. None: tensorboard in the directory of the run.
        log_graph: Whether to draw the graph of the module, traced with its example_input_array when a fit starts.
        flush_secs: Hand what was recorded to the system at least every this many seconds, as far as anything is recorded.
        close_timeout: Wait at most this many seconds for the files to be complete when the run is over.
    """

    dir: str | os.PathLike[str] | None = None
    log_graph: bool = False
    flush_secs: float = 30.0
    close_timeout: float = 30.0

    on_error = "disable"
    before = ("*",)  # open before anybody has something to log, closed after everybody

    _writer: Any = field(init=False, default=None, repr=False)
    _folder: Path = field(init=False, default=Path(), repr=False)
    _suffix: str = field(init=False, default="", repr=False)  # of the run's event files
    _earlier: dict[str, int] = field(init=False, default_factory=dict, repr=False)  # files of the run that other processes wrote
    _back: dict[str, int] | None = field(init=False, default=None, repr=False)  # the files to go back to
    _validating: dict[str, int] | None = field(init=False, default=None, repr=False)  # the files when the validation began
    _in_hparams: bool = field(init=False, default=False, repr=False)
    _ended: Run | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.dir is not None and not isinstance(self.dir, (str, os.PathLike)):
            raise TypeError(f"dir must be a folder or None, got {self.dir!r}")
        for name in ("flush_secs", "close_timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number of seconds, got {value!r}")
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")

    @property
    def experiment(self) -> SummaryWriter:
        """TensorBoard's own writer, for everything that has no hook (histograms, images, embeddings).

        Raises:
            RuntimeError: no run is going on, or this is not its first process.
        """
        if self._writer is None:
            raise RuntimeError("the writer of TensorBoard is there from on_run_start to on_run_end, and in the process of rank 0 only")
        return self._writer

    def _open(self, run: Run) -> Any:
        """The writer, made when it is first needed; None in all processes but the first, and when the run is over."""
        if self._writer is None and run.rank == 0 and self._ended is not run:
            from torch.utils.tensorboard import SummaryWriter  # slow, and of no use to the other processes

            self._folder, self._suffix = self._place(run), f".{run.id}"
            self._earlier, self._back, self._validating = self._files(), None, None
            self._writer = SummaryWriter(str(self._folder), flush_secs=self.flush_secs, filename_suffix=self._suffix)
            self._in_hparams = False
        return self._writer

    def _place(self, run: Run) -> Path:
        if self.dir is None or run.options.fast_dev_run:  # a trial run leaves nothing behind
            return run.dir / "tensorboard"
        return Path(self.dir)

    # ------------------------------------------------------------------ what is logged

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        self._open(run)

    @hookimpl
    def log_hyperparameters(self, run: Run, hyperparameters: dict[str, Any]) -> None:
        if writer := self._open(run):
            writer.file_writer.add_summary(_session_start(dict(_flat(hyperparameters))))
            self._in_hparams = True

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        writer = self._open(run)
        if writer is not None and run.resumed is not None:
            self._go_back()
        if writer is not None and self.log_graph:
            self._draw(run, writer)

    @hookimpl
    def log_metrics(self, run: Run, metrics: dict[str, float], step: int) -> None:
        if writer := self._open(run):
            writer.file_writer.add_summary(_scalars(metrics), step)

    @hookimpl
    def log_text(self, run: Run, name: str, text: str, step: int) -> None:
        if writer := self._open(run):
            writer.add_text(name, text, step)

    @hookimpl
    def log_figure(self, run: Run, name: str, figure: Any, step: int) -> None:
        if writer := self._open(run):
            canvas = figure.canvas  # add_figure gives the figure one of its own, and others may want to show it
            try:
                writer.add_figure(name, figure, step, close=False)
            finally:
                figure.set_canvas(canvas)

    # ------------------------------------------------------------------ when it is written

    @hookimpl
    def on_train_epoch_start(self) -> None:
        self._flush()  # the record of an epoch comes after on_train_epoch_end

    @hookimpl
    def on_validation_start(self) -> None:
        if self._writer is not None:
            self._validating = self._written()

    @hookimpl
    def on_validation_end(self) -> None:
        self._flush()
        self._validating = None

    @hookimpl
    def on_train_end(self) -> None:
        self._flush()

    @hookimpl
    def on_test_end(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    @hookimpl
    def on_run_end(self, run: Run, status: str) -> None:
        writer, self._writer, self._ended = self._writer, None, run
        if writer is None:
            return
        folder = self._place(run)
        if not run.options.fast_dev_run:
            # one folder up: TensorBoard finds no metrics for HPARAMS where the files lie in the very folder that it is given
            opened = run.dir if self.dir is None else folder
            run.report["tensorboard"] = f"tensorboard --logdir {shlex.quote(str(opened))}"

        def close() -> None:
            try:
                if self._in_hparams:
                    writer.file_writer.add_summary(_session_end(status))
            finally:
                writer.close()

        if not _within(self.close_timeout, close):
            run.say_once(f"tensorboard: the files in {folder} were not complete after {self.close_timeout:g} s; their end may be missing")

    # ------------------------------------------------------------------ a run that goes on

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the event files of the run, and how many bytes of each are written.

        A validation that is broken off does not count: the run that goes on begins it again.
        """
        return {"files": self._validating or self._written()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` stood, when the fit starts: what goes wrong with a file goes wrong in a hook."""
        self._back = dict(state["files"])

    def _written(self) -> dict[str, int]:
        with suppress(OSError):  # a full disk fails the next record too, where it is dealt with
            self._flush()
        return self._files()

    def _files(self) -> dict[str, int]:
        """The event files of the run with their bytes, whichever process wrote them; those of other runs in this folder not."""
        found = self._folder.rglob(f"*tfevents*{self._suffix}") if self._suffix else ()
        return {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in sorted(found)}

    def _go_back(self) -> None:
        """Puts aside what processes that are gone wrote after the checkpoint: the same steps come again."""
        kept, self._back = self._back, None
        if not kept:  # nothing was written when the checkpoint was
            return
        for name, size in self._earlier.items():
            if size > kept.get(name, 0):
                _put_aside(self._folder / name, kept.get(name, 0))

    # ------------------------------------------------------------------ the graph

    def _draw(self, run: Run, writer: SummaryWriter) -> None:
        """Adds the graph of the module; a module that cannot be traced goes without, which is said."""
        module = run.module
        if module.example_input_array is None:
            run.say_once("tensorboard: log_graph=True needs an input to trace: set self.example_input_array in the module")
            return
        modes = [(part, part.training) for part in module.modules()]
        try:
            # what torch prints when it fails is said below
            with preserved(), run.metrics.unseen(), torch.no_grad(), redirect_stdout(io.StringIO()):
                example = run.hooks.move_batch(run, module.example_input_array)
                writer.add_graph(module, example, use_strict_trace=False)  # not strict: forward may return a dict
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            run.say_once(f"tensorboard: the graph could not be traced and is left out: {type(error).__name__}: {reason}")
        finally:
            for part, training in modes:
                part.training = training


def _within(seconds: float, work: Callable[[], None]) -> bool:
    """Does ``work`` and waits for at most ``seconds``; False if it is still going on then. An error in it is raised."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=guarded, name="torchplug-tensorboard-close", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return not thread.is_alive()


def _put_aside(path: Path, start: int) -> None:
    """Moves what a file has from byte ``start`` on to one beside it whose name TensorBoard does not take for an event file's."""
    with open(path, "rb+") as file:
        file.seek(start)
        with open(path.with_name(path.name.replace("tfevents", "abandoned")), "ab") as aside:
            shutil.copyfileobj(file, aside)
            aside.flush()
            os.fsync(aside.fileno())  # only then it may go
        file.truncate(start)
    if not start:
        path.unlink()


def _scalars(metrics: Mapping[str, float]) -> Any:
    """What ``SummaryWriter.add_scalar`` writes for each of them, in one message: the cost is that of a message."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()])


# ---------------------------------------------------------------------- HPARAMS
#
# SummaryWriter.add_hparams would write the final metrics into the curves a second time and fix the columns of the table to
# those of this run. A session alone makes TensorBoard take all scalars as columns, over all runs that it shows, and the last
# value of each. What makes a session has no function outside of TensorFlow, so it is put together from its messages.


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Nested hyperparameters as ``outer/inner``; what is neither a finite number, a bool nor a text becomes text."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/")
        elif isinstance(value, (bool, str)) or (isinstance(value, (int, float)) and math.isfinite(value)):
            yield name, value
        else:  # the page of TensorBoard cannot show a number that is not finite
            yield name, str(value)


def _session_start(hyperparameters: dict[str, bool | float | str]) -> Any:
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in hyperparameters.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    return _session(metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start))


def _session_end(status: str) -> Any:
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    good = status in ("finished", "stopped")
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS if good else api_pb2.STATUS_FAILURE, end_time_secs=time.time())
    return _session(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end))


def _session(tag: str, data: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    return Summary(value=[Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)])
