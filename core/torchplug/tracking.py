"""Loggers that follow the journal: whatever happens to a tracker, training does not notice, and nothing is lost.

The journal on disk is the queue. Training writes a record there and nowhere else; each logger has a thread that reads on from
where it stands and sends what is new, several records at a time. A backend that fails is tried again after growing pauses, one
that hangs holds up its own thread alone, and what neither got by the end of the run is sent later by ``torchplug replay``, which
does the same from a finished file. How to write a logger: a `Backend` with five methods, and a `Tracker` that makes it.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

from torchplug.hookspecs import hookimpl
from torchplug.options import above, check_fields
from torchplug.run import Run

__all__ = ["Backend", "Mark", "Place", "Reader", "Record", "Refused", "Tracker", "deliver", "first"]

Record = dict[str, Any]  # a line of the journal

PATIENCE = 10.0  # seconds that a run waits for a backend before it starts without
PAUSES = (1.0, 60.0)  # seconds between attempts: the first, and the longest
LAST_ATTEMPTS = 3  # when the run is over


class Mark(NamedTuple):
    """How far a backend has got in a journal: by how many records, and by the time of the last, which tells one past from another."""

    n: int = 0
    time: float = 0.0


@dataclass(frozen=True)
class Place:
    """Which run is logged, and where its files may lie.

    Args:
        journal: the file; paths in records, such as those of figures, are seen from its folder.
        start: its first ``on_run_start``, with id, module, options, versions.
        run_dir: the directory of the run.
        folder: where this logger keeps files; it may not be there yet.
    """

    journal: Path
    start: Record
    run_dir: Path
    folder: Path

    @property
    def trial(self) -> bool:
        """Whether it is a ``fast_dev_run``, which must leave nothing behind."""
        return bool(self.start["options"].get("fast_dev_run"))

    @property
    def name(self) -> str:
        """What runs of this kind are called: that of Trainer, or the module's class."""
        return str(self.start["options"].get("name") or self.start["module"])

    def found(self, path: str) -> Path:
        """Where a file of a record lies now: the directory of the run may have been moved. It may be gone, too."""
        if Path(path).is_relative_to(self.start["dir"]):
            moved = self.run_dir / Path(path).relative_to(self.start["dir"])
            if moved.exists():
                return moved
        return Path(path)


class Refused(Exception):
    """A backend will never take these records, however often they are sent. Among several, the others are sent one by one."""


class Backend(Protocol):
    """What a logger does with records, in one thread; made anew for each run and each replay.

    What any method raises means that the backend is not to be reached now: `close` is called, and `connect` some time later.
    """

    where: str
    """How to look at the run, for the user: a command or an address. Known when it is connected."""

    def connect(self, place: Place) -> list[Mark]:
        """Opens what belongs to the run, for the first time or again. Returns the places up to which it has everything and could
        go back to, the newest last; what it was sent twice must show once."""

    def go_back(self, mark: Mark) -> None:
        """What was sent after ``mark`` is not the past any more: the run went on from a checkpoint that stands before it. It is one
        of those that `connect` returned, or the beginning; where that returned none, this is not called."""

    def send(self, records: Sequence[Record], mark: Mark) -> None:
        """Takes the next records, and remembers ``mark`` with them; kinds that it has no use for are passed over.

        Raises:
            Refused: they can never be stored.
        """

    def finish(self, status: str) -> None:
        """Everything is sent. ``status`` is that of ``on_run_end``, or killed where the journal has none."""

    def close(self) -> None:
        """Lets go, after an error or `finish`."""


class Reader:
    """Reads the records of a journal that may still grow. A line that is not finished yet is left for the next time."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - close does it
        self.n = 0

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def lines(self) -> Iterator[bytes]:
        """The lines that are there."""
        while line := self._file.readline():
            if not line.endswith(b"\n"):
                self._file.seek(-len(line), os.SEEK_CUR)
                return
            self.n += 1
            yield line

    def records(self, most: int) -> list[Record]:
        """The next records, ``most`` at a time."""
        return [json.loads(line) for line in islice(self.lines(), most)]

    def seek(self, marks: Iterable[Mark]) -> Mark:
        """Goes behind the newest of ``marks`` that stands in this journal; to the beginning if none does. Returns it."""
        times, found = {mark.n: mark for mark in marks if mark.n}, Mark()
        place = 0
        for line in self.lines():
            if self.n in times and json.loads(line)["time"] == times[self.n].time:
                found, place = times[self.n], self._file.tell()
            if self.n >= max(times, default=0):
                break
        self._file.seek(place)
        self.n = found.n
        return found


def first(path: Path) -> Record:
    """The record with which a run began.

    Raises:
        ValueError: there is none, so that this is no journal.
    """
    with closing(Reader(path)) as reader:
        try:
            for line in reader.lines():
                record: Record = json.loads(line)
                if record["event"] == "on_run_start":
                    return record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the journal of a run ({error})") from error
    raise ValueError(f"{path} does not hold the start of a run")


class _Turn:
    """One sends to a place at a time, the run itself or a replay: what one is writing, another takes for what a killed process left.

    The system ends the turn of a process that dies. Where there are no such locks nobody waits.
    """

    def __init__(self, place: Place) -> None:
        goal = place.folder.resolve()
        self._path = place.journal.with_name(f".{goal.name}.{zlib.crc32(os.fsencode(goal)):08x}.lock")
        self._file: int | None = None
        _turns.add(self)

    def begin(self) -> None:
        """Takes the turn, or has it already.

        Raises:
            RuntimeError: it is somebody else's.
        """
        if sys.platform == "win32" or not os.access(self._path.parent, os.W_OK):  # of a copy on a medium that cannot be written
            return
        import fcntl

        while self._file is None:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file), os.stat(self._path)):  # else another's turn has just ended
                        self._file = file
            except BlockingIOError:
                raise RuntimeError("this run is being sent there already, by itself or another replay; wait until that is over") from None
            except OSError:  # a file system without locks
                return
            finally:
                if self._file is None:
                    os.close(file)

    def end(self) -> None:
        """Gives it up."""
        file, self._file = self._file, None
        if sys.platform == "win32" or file is None:
            return
        import fcntl

        self._path.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


_turns: weakref.WeakSet[_Turn] = weakref.WeakSet()


def _forget_turns() -> None:
    """A process that was forked, such as a loader's worker, has no turn: it would prolong that of its parent when that is killed."""
    for turn in _turns:
        file, turn._file = turn._file, None
        if file is not None:
            os.close(file)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_turns)


class Delivery:
    """One journal on its way to one backend."""

    def __init__(self, backend: Backend, place: Place, batch: int) -> None:
        self.backend, self.place, self.batch = backend, place, batch
        self.reader: Reader | None = None
        self.marks: list[Mark] = []
        self.sent = 0
        self.refused: list[str] = []
        self.turn = _Turn(place)

    def begin(self) -> None:
        """Connects. Nothing is read yet: a run that goes on shortens its journal first."""
        self.turn.begin()
        self.marks = self.backend.connect(self.place)

    def step(self) -> bool:
        """Sends some of what is new; whether there was any."""
        if self.reader is None:
            reader = Reader(self.place.journal)
            mark = reader.seek(self.marks)
            if self.marks and mark != self.marks[-1]:
                self.backend.go_back(mark)
            self.reader = reader
        begin, records = self.reader.n, self.reader.records(self.batch)
        if not records:
            return False
        try:
            self.backend.send(records, Mark(self.reader.n, records[-1]["time"]))
        except Refused:
            for n, record in enumerate(records, begin + 1):
                try:
                    self.backend.send([record], Mark(n, record["time"]))
                except Refused as error:
                    self.refused.append(f"record {n - 1}: {error}")
        self.sent += len(records)
        return True

    def close(self) -> None:
        """Lets go of file and backend."""
        reader, self.reader = self.reader, None
        if reader is not None:
            reader.close()
        try:
            self.backend.close()
        finally:
            self.turn.end()


def deliver(backend: Backend, place: Place, batch: int = 1000) -> Delivery:
    """Sends a whole journal; returns what came of it.

    Raises:
        Exception: whatever the backend raised.
    """
    delivery = Delivery(backend, place, batch)
    try:
        delivery.begin()
        while delivery.step():
            pass
        backend.finish(_ended(place.journal))
    finally:
        delivery.close()
    return delivery


def _ended(path: Path) -> str:
    """How the last run in a journal ended."""
    status = "killed"
    with closing(Reader(path)) as reader:
        for line in reader.lines():
            if b'"on_run_' in line:
                record = json.loads(line)
                if record["event"] in ("on_run_start", "on_run_end"):
                    status = record.get("status", "killed")
    return status


class _Thread(threading.Thread):
    """Delivers while a run goes on."""

    def __init__(self, delivery: Delivery, interval: float, say: Any) -> None:
        super().__init__(name="torchplug tracking", daemon=True)  # one that hangs does not keep the program from ending
        self.delivery, self.interval, self.say = delivery, interval, say
        self.tried = threading.Event()  # the first attempt to connect is over
        self.released = threading.Event()  # the journal may be read
        self.wake = threading.Event()
        self.status = ""  # of the run, when it has ended
        self.error: Exception | None = None
        self.connected = self.complete = self.given_up = False

    def run(self) -> None:
        pause, left = PAUSES[0], LAST_ATTEMPTS
        while not (self.complete or self.given_up):
            try:
                rest = self._work()
                pause, self.error = PAUSES[0], None
            except Exception as error:
                self._failed(error)
                left -= bool(self.status)
                if not left:
                    break
                rest, pause = pause, min(2 * pause, PAUSES[1])
            if not self.status:
                self.wake.wait(rest)
            elif self.error is not None:
                time.sleep(PAUSES[0])
        if self.given_up:
            self._failed(TimeoutError("the run was over before it answered"))

    def _work(self) -> float:
        """One thing; returns how long to wait for the next."""
        if not self.connected:
            self.delivery.begin()
            self.connected = True
            self.tried.set()
        self.released.wait()
        status, begin = self.status, time.perf_counter()
        if self.delivery.step():
            return 0.0 if status else time.perf_counter() - begin  # training has half of the time at least
        if not status:
            return self.interval
        self.delivery.backend.finish(status)
        self.delivery.close()
        self.complete = True
        return 0.0

    def _failed(self, error: Exception) -> None:
        self.say(error)
        self.error, self.connected = error, False
        try:
            self.delivery.close()
        except Exception as another:
            logging.getLogger("torchplug").debug("closing after an error failed too: %s", another)
        self.tried.set()


@dataclass(kw_only=True, eq=False)
class Tracker:
    """A plugin that sends the journal of a run to a backend, from the process of rank 0 and in a thread of its own.

    A subclass has options as fields, and `backend`. Only what the backend cannot know from the journal needs hooks.

    Args:
        dir: Where it keeps files. None: a folder of its own name in the directory of the run.
        close_timeout: Wait at most this many seconds for the backend over the whole run; what is missing then stays in the journal.
    """

    dir: str | os.PathLike[str] | None = None
    close_timeout: Annotated[float, above(0)] = 30.0

    on_error = "disable"
    requires = ("journal",)
    after = ("journal",)
    before = ("*",)
    interval = 0.5  # seconds between two looks into the journal
    batch = 100  # records that are sent together

    _thread: _Thread | None = field(init=False, default=None, repr=False)
    _name: str = field(init=False, default="", repr=False)
    _waited: float = field(init=False, default=0.0, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)

    def backend(self) -> Backend:
        """A new backend, not connected yet; what it imports, it imports here."""
        raise NotImplementedError(f"{type(self).__name__} has no backend")

    def folder(self, run_dir: Path, name: str) -> Path:
        """Where files are kept for a run in ``run_dir``, by a logger that is enabled as ``name``."""
        return Path(self.dir) if self.dir is not None else run_dir / name.replace(":", "_")

    @property
    def connected(self) -> Backend:
        """The backend of the run that goes on.

        Raises:
            RuntimeError: there is no run, it is not the process of rank 0, or the backend cannot be reached.
        """
        thread = self._thread
        if thread is None:
            raise RuntimeError(f"{type(self).__name__} is connected from on_run_start to on_run_end, and in the process of rank 0 only")
        if not thread.connected:
            raise RuntimeError(f"{type(self).__name__} cannot be reached at present: {thread.error or 'it does not answer'}")
        return thread.delivery.backend

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        self._thread = None
        if run.rank != 0:
            return
        if run.journal is None:
            raise RuntimeError("there is no journal to follow; it was switched off")
        self._name = run.name_of(self)
        trial = bool(run.options.fast_dev_run)
        folder = run.dir / self._name.replace(":", "_") if trial else self.folder(run.dir, self._name)
        delivery = Delivery(self.backend(), Place(run.journal, first(run.journal), run.dir, folder), self.batch)

        def say(error: Exception) -> None:
            run.say_once(
                f"{self._name} takes nothing at present, training goes on and the journal keeps everything: {type(error).__name__}: {error}"
            )

        self._thread = _Thread(delivery, self.interval, say)
        self._thread.start()
        begin = time.perf_counter()
        self._thread.tried.wait(min(PATIENCE, self.close_timeout / 2))
        self._waited = time.perf_counter() - begin if not self._thread.connected else 0.0
        if run.work != "fit":
            self._thread.released.set()

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        if self._thread is not None:
            self._thread.released.set()  # a run that goes on has cut its journal back by now

    @hookimpl
    def on_run_end(self, run: Run, status: str) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.status = status
        thread.released.set()
        thread.wake.set()
        thread.join(max(0.0, self.close_timeout - self._waited))
        thread.given_up = True
        delivery = thread.delivery
        if thread.complete and not run.options.fast_dev_run:
            run.report[self._name] = delivery.backend.where
        if not thread.complete:
            delivery.turn.end()  # a replay may have it, whatever holds up the thread
            reason = f"{type(thread.error).__name__}: {thread.error}" if thread.error else f"no answer within {self.close_timeout:g} s"
            later = f"torchplug replay {shlex.quote(str(run.dir))} --to {self._name.partition(':')[0]}"
            run.report[self._name] = f"not everything was delivered ({reason}); {later} sends the rest"
            run.say_once(f"{self._name}: {run.report[self._name]}")
        for line in delivery.refused:
            run.say_once(f"{self._name} does not take {line}")
