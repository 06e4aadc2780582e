"""Metrics, hyperparameters, texts, figures and the model's graph for TensorBoard."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import platform
import shlex
import shutil
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from torchplug import Run, hookimpl, preserved
from torchplug.tracking import Mark, Place, Reader, Record, Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Tensorboard"]

CHOICES = ("last", "min", "max")
MARK_EVERY = 1.0  # seconds
MARKS = 100  # how many places the newest part of the list has; older ones are thinned out


@dataclass(kw_only=True, eq=False)
class Tensorboard(Tracker):
    """Writes TensorBoard's event files.

    Each metric is a scalar under the name it was logged with, at the optimizer step and the time of its record. TensorBoard keeps
    32 bits of each number. The hyperparameters are one row in HPARAMS, beside metrics and with how the run ended. A run that goes
    on in the same folder (a test after a fit) adds an event file there. One that goes on from a checkpoint does so too, and what was
    written behind that checkpoint moves to files that TensorBoard does not read, so that no point shows twice.

    Args:
        dir: Folder of the event files. None: tensorboard in the directory of the run.
        log_graph: Whether to draw the graph of the module, traced with its example_input_array when a fit starts.
        hparams_metrics: The metrics in HPARAMS, each with last, min or max: {"val_loss": "min"}. None: the last value of every one.
        close_timeout: Wait at most this many seconds for the files to be complete when the run is over.
    """

    log_graph: bool = False
    hparams_metrics: dict[str, str] | None = None

    batch = 10  # a millisecond of work, for which training may wait if both need the interpreter

    _folder: Path | None = field(init=False, default=None, repr=False)  # of the run that goes on
    _suffix: str = field(init=False, default="", repr=False)  # of the files that `experiment` writes
    _writer: Any = field(init=False, default=None, repr=False)
    _back: dict[str, int] | None = field(init=False, default=None, repr=False)  # the files to go back to
    _validating: dict[str, int] | None = field(init=False, default=None, repr=False)  # the files when the validation began

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choice in (self.hparams_metrics or {}).items():
            if choice not in CHOICES:
                raise ValueError(f"hparams_metrics[{name!r}] must be one of {', '.join(CHOICES)}, got {choice!r}")

    def backend(self) -> Events:
        """The event files of one run."""
        import torch.utils.tensorboard  # slow, and of no use to processes that write nothing  # noqa: F401

        return Events(self.hparams_metrics, self.dir is None)

    # ------------------------------------------------------------------ a writer for users, in files of its own

    @property
    def experiment(self) -> SummaryWriter:
        """TensorBoard's own writer, for everything that has no hook (histograms, images, embeddings). It is the caller's thread
        that writes with it.

        Raises:
            RuntimeError: no run is going on, or this is not its first process.
        """
        from torch.utils.tensorboard import SummaryWriter

        if self._folder is None:
            raise RuntimeError("the writer of TensorBoard is there from on_run_start to on_run_end, and in the process of rank 0 only")
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), filename_suffix=self._suffix)  # type: ignore[no-untyped-call]
        return self._writer

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        super().on_run_start(run)
        self._back, self._validating = None, None
        if self._thread is not None:
            self._folder, self._suffix = self._thread.delivery.place.folder, f".{run.id}.experiment"

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        super().on_fit_start(run)
        if self._folder is None:
            return
        if self._back is not None and run.resumed is not None:  # what came after the checkpoint comes again
            for name, size in self._files().items():
                if size > self._back.get(name, 0):
                    _put_aside(self._folder / name, self._back.get(name, 0))
        if self.log_graph:
            _draw(run, self.experiment)

    @hookimpl
    def on_validation_start(self) -> None:
        self._validating = self._files()

    @hookimpl
    def on_validation_end(self) -> None:
        self._validating = None

    @hookimpl
    def on_run_end(self, run: Run, status: str) -> None:
        writer, self._writer, self._folder = self._writer, None, None
        try:
            super().on_run_end(run, status)
        finally:
            if writer is not None:
                writer.close()  # type: ignore[no-untyped-call]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: how long the files of `experiment` are. The other ones follow the journal.

        A validation that is broken off does not count: the run that goes on begins it again.
        """
        return {"files": self._validating if self._validating is not None else self._files()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` stood, when the fit starts."""
        self._back = dict(state["files"])

    def _files(self) -> dict[str, int]:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # whoever writes next hears of it
                self._writer.flush()  # type: ignore[no-untyped-call]
        return _sizes(self._folder, self._suffix) if self._folder is not None else {}


class Events:
    """The event files of one run, and a list of the places up to which they are complete.

    A mark is a record's number and time, how long each file was then, and what HPARAMS needs to go on. The list is written after
    the events. What a process that was killed in between had written is found again by the time of its events, which is that of
    their records.
    """

    def __init__(self, chosen: Mapping[str, str] | None, nested: bool) -> None:
        self.chosen, self.nested = chosen, nested
        self.where = ""
        self._file: BinaryIO | None = None
        self._changed = False  # whether the run goes on with other versions

    # ------------------------------------------------------------------ the list

    def connect(self, place: Place) -> list[Mark]:
        self.place, self.folder, self.suffix = place, place.folder, f".{place.start['id']}"
        self.folder.mkdir(parents=True, exist_ok=True)
        # one folder up: TensorBoard finds no metrics for HPARAMS where the files lie in the very folder that it is given
        self.where = f"tensorboard --logdir {shlex.quote(str(self.folder.parent if self.nested else self.folder))}"
        self.list = self.folder / f"complete{self.suffix}.json"
        self.marks: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # after a power cut it may be cut off; the events say it too
            self.marks = json.loads(self.list.read_text())
        self._now, self._marked = self._last(), 0.0
        self._find()
        self._reached = self._end()
        self._earlier = self._files()
        return [Mark(mark["n"], mark["time"]) for mark in self.marks]

    def _copied(self) -> dict[str, Any]:
        copied: dict[str, Any] = json.loads(json.dumps(self._now))
        return copied

    def _mark(self, n: int, when: float) -> None:
        """Everything up to here is in the files."""
        self._marked = time.monotonic()
        old, new = self.marks[:-MARKS], self.marks[-MARKS:]
        mark = {**self._copied(), "n": n, "time": when, "files": self._files()}
        self.marks = [*(old[::2] if len(old) > MARKS else old), *new, mark]
        temporary = self.list.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.marks))
        os.replace(temporary, self.list)

    def _find(self) -> None:
        """Cuts off events that are not whole, and adds the records behind the last mark that were written."""
        sizes = self.marks[-1]["files"] if self.marks else {}
        times: set[float] = set()
        for name, size in self._files().items():
            if size == sizes.get(name):
                continue
            end = 0
            for end, when in _events(self.folder / name):  # noqa: B007 - the last one is used
                times.add(when)
            if end < size:
                os.truncate(self.folder / name, end)
            if not end:
                (self.folder / name).unlink()
        last, found = self._end(), Mark()
        with closing(Reader(self.place.journal)) as reader:
            if times and reader.seek([last]) == last:
                while records := reader.records(1000):
                    for n, record in enumerate(records, reader.n - len(records) + 1):
                        if record["time"] in times:
                            found = Mark(n, record["time"])
        if found.n:
            with closing(Reader(self.place.journal)) as reader:
                reader.seek([last])
                for record in reader.records(found.n - last.n):
                    self._note(record)
            self._mark(*found)

    def _files(self) -> dict[str, int]:
        return _sizes(self.folder, self.suffix)

    def go_back(self, mark: Mark) -> None:
        self.marks = [each for each in self.marks if each["n"] <= mark.n]
        sizes = self.marks[-1]["files"] if self.marks else {}
        for name, size in self._earlier.items():
            if size > sizes.get(name, 0):
                _put_aside(self.folder / name, sizes.get(name, 0))
        self._now = self._last()
        self._reached = self._end()

    def _end(self) -> Mark:
        return Mark(self.marks[-1]["n"], self.marks[-1]["time"]) if self.marks else Mark()

    def _last(self) -> dict[str, Any]:
        last: dict[str, Any] = json.loads(json.dumps(self.marks[-1])) if self.marks else {}
        return {"row": {}, "best": {}, "shown": {}, "status": "", "versions": {}, **last}

    # ------------------------------------------------------------------ what is written

    def send(self, records: Sequence[Record], mark: Mark) -> None:
        for record in records:
            self._note(record)
            self._write(record)
        if self._file is not None:
            self._file.flush()
        self._reached = mark
        if time.monotonic() > self._marked + MARK_EVERY:
            self._mark(*mark)

    def _note(self, record: Record) -> None:
        """Remembers what HPARAMS shows when the run is over."""
        if record["event"] == "on_run_start":
            self._now["status"] = ""
            self._changed = record.get("versions", {}) != self._now["versions"]
            self._now["versions"] = record.get("versions", {})
        elif record["event"] == "log_hyperparameters":
            self._now["row"] = {**self._now["row"], **dict(_flat(record["hyperparameters"]))}
        elif record["event"] == "log_metrics":
            for name, choice in (self.chosen or {}).items():
                value, best = record["metrics"].get(name, math.nan), self._now["best"].get(name)
                if choice == "last" or math.isnan(value):
                    continue
                if best is None or (value < best[0] if choice == "min" else value > best[0]):
                    self._now["best"][name] = [value, record["step"]]

    def _write(self, record: Record) -> None:
        event, time = record["event"], record["time"]
        if event == "log_metrics":
            self._add(_scalars(record["metrics"]), record["step"], time)
        elif event == "log_hyperparameters":
            row = _session_start(self._now["row"], self.place.start["time"])
            if self.chosen is not None:
                row.MergeFrom(_columns(self._now["row"], [_column(*each) for each in self.chosen.items()]))
            self._add(row, 0, time)  # one record, one event
        elif event == "on_run_start" and self._changed:
            table = [f"| {name} | {version} |" for name, version in {"what": "version", "---": "---", **record["versions"]}.items()]
            self._text("torchplug/versions", "\n".join(table), record["step"], time)
        elif event == "log_text":
            self._text(record["name"], record["text"], record["step"], time)
        elif event == "log_figure":
            self._add(_image(_utf8(record["name"]), (self.place.journal.parent / record["path"]).read_bytes()), record["step"], time)

    def _text(self, name: str, content: str, step: int, time: float) -> None:
        from torch.utils.tensorboard.summary import text

        self._add(text(_utf8(name), _utf8(content)), step, time)  # type: ignore[no-untyped-call]

    def _add(self, summary: Any, step: int, time: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            # TensorBoard reads files in the order of their names
            second = max([int(time), *(_second(name) + 1 for name in self._files())])
            path = self.folder / f"events.out.tfevents.{second:010}.{platform.node()}.{os.getpid()}.0{self.suffix}"
            self._file = open(path, "xb")  # noqa: SIM115 - close does it
            self._record = RecordWriter(self._file)
            self._record.write(Event(wall_time=time, file_version="brain.Event:2").SerializeToString())
        self._record.write(Event(wall_time=time, step=step, summary=summary).SerializeToString())

    def finish(self, status: str) -> None:
        if self._now["row"] and self._now["status"] != status:
            for name, (value, step) in self._now["best"].items():
                if self._now["shown"].get(name) != value:
                    self._add(_scalars({_column(name, (self.chosen or {})[name]): value}), step, self._reached.time)
                    self._now["shown"][name] = value
            self._add(_session_end(status, self._reached.time), 0, self._reached.time)
        self._now["status"] = status
        self.close()
        if self._reached != self._end() or (self.marks and self._files() != self.marks[-1]["files"]):
            self._mark(*self._reached)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _sizes(folder: Path, suffix: str) -> dict[str, int]:
    """The event files of a run with their bytes, whichever process wrote them; those of other runs in this folder not."""
    found = folder.rglob(f"*tfevents*{suffix}")
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(found)}


def _second(name: str) -> int:
    """When an event file was begun, by its name."""
    return int(name.partition("tfevents.")[2].partition(".")[0])


def _events(path: Path) -> Iterator[tuple[int, float]]:
    """The whole events of a file: where each ends, and its time. A TFRecord is a length, its sum, bytes, their sum."""
    from tensorboard.compat.proto.event_pb2 import Event

    with open(path, "rb") as file:
        while len(head := file.read(12)) == 12:
            length = struct.unpack("<Q", head[:8])[0]
            body = file.read(length + 4)
            if len(body) < length + 4:
                return
            event = Event.FromString(body[:length])
            yield file.tell(), event.wall_time if event.HasField("summary") else 0.0  # the first event only names the format


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


# ---------------------------------------------------------------------- messages


def _scalars(metrics: Mapping[str, float]) -> Any:
    """What ``SummaryWriter.add_scalar`` writes for each of them, in one message: the cost is that of a message."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=_utf8(name), simple_value=value) for name, value in metrics.items()])


def _image(name: str, png: bytes) -> Any:
    """A PNG as it is; its size stands in bytes 16 to 24 (PNG specification, IHDR)."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = struct.unpack(">II", png[16:24])
    return Summary(value=[Summary.Value(tag=name, image=Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png))])


# SummaryWriter.add_hparams would write the final metrics into the curves a second time and fix the columns of the table to
# those of this run. A session alone makes TensorBoard take all scalars as columns, over all runs that it shows, and the last
# value of each; columns that were chosen are said in a message of their own. What makes a session has no function outside of
# TensorFlow, so it is put together from its messages.


def _column(name: str, choice: str) -> str:
    """The scalar that a chosen metric is taken from: the best values have one of their own."""
    return name if choice == "last" else f"{choice}/{name}"


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Nested hyperparameters as ``outer/inner``; what is neither a finite number, a bool nor a text becomes text."""
    for key, value in values.items():
        name = _utf8(f"{prefix}{key}")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/")
        elif isinstance(value, str):
            yield name, _utf8(value)
        elif isinstance(value, bool) or (isinstance(value, (int, float)) and math.isfinite(value)):
            yield name, value
        else:  # the page of TensorBoard cannot show a number that is not finite
            yield name, _utf8(str(value))


def _utf8(text: str) -> str:
    """A text may have halves of surrogate pairs, which an event cannot: they are written as ``\\ud800``."""
    return text.encode("utf-8", "backslashreplace").decode()


def _columns(row: Mapping[str, bool | float | str], metrics: Sequence[str]) -> Any:
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    kinds = {bool: "DATA_TYPE_BOOL", str: "DATA_TYPE_STRING"}
    experiment = api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=name, type=kinds.get(type(value), "DATA_TYPE_FLOAT64")) for name, value in row.items()],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics],
    )
    return _session(metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment))


def _session_start(row: Mapping[str, bool | float | str], time: float) -> Any:
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time)
    for name, value in row.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    return _session(metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start))


def _session_end(status: str, time: float) -> Any:
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    good = status in ("finished", "stopped")
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS if good else api_pb2.STATUS_FAILURE, end_time_secs=time)
    return _session(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end))


def _session(tag: str, data: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    return Summary(value=[Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)])


# ---------------------------------------------------------------------- the graph


def _draw(run: Run, writer: SummaryWriter) -> None:
    """Adds the graph of the module; a module that cannot be traced goes without, which is said."""
    module = run.module
    if module.example_input_array is None:
        run.say_once("tensorboard: log_graph=True needs an input to trace: set self.example_input_array in the module")
        return
    modes = [(part, part.training) for part in module.modules()]
    try:
        # what torch prints when it fails is said below
        with preserved(), run.metrics.unseen(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            example = run.hooks.move_batch(run, module.example_input_array)
            writer.add_graph(module, example, use_strict_trace=False)  # not strict: forward may return a dict
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        run.say_once(f"tensorboard: the graph could not be traced and is left out: {type(error).__name__}: {reason}")
    finally:
        for part, training in modes:
            part.training = training
