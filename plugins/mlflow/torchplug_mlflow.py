"""Metrics, hyperparameters, texts, figures, artifacts and checkpoints for MLflow."""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import shlex
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import quote, urlsplit

from torchplug import Run, hookimpl
from torchplug.tracking import Mark, Place, Reader, Record, Refused, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Mlflow"]

STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED", "killed": "KILLED", "failed": "FAILED"}
NAME, VALUE, TAG = 250, 6000, 8000  # characters that MLflow takes
METRICS, OTHERS, SIZE = 900, 90, 80_000  # of one request: metrics, parameters or tags, and characters in it
ATTEMPTS = 3  # to store a file while the tracking server answers
WITHOUT_A_SERVER = ("sqlite", "postgresql", "mysql", "mssql")

logger = logging.getLogger("torchplug")


@dataclass(kw_only=True, eq=False)
class Mlflow(Tracker):
    """Logs a run to MLflow: a database in the directory of all runs, or a tracking server.

    Args:
        tracking_uri: Address of a server or a database. None: MLFLOW_TRACKING_URI, else mlflow.db in root_dir, with files in mlartifacts.
        experiment: Name of the experiment. None: that of the run, which is the name of the module's class unless it was given.
        run_name: Name in MLflow. None: that of the run's folder.
        tags: Tags of the run.
        parent: Id of the MLflow run that this one stands under.
        log_model: Which checkpoints are stored: "best" (one, when the run is over), "all" (each, until its file is removed) or none.
        dir: Not used; MLflow has a place for its files.
        close_timeout: Wait at most this many seconds for MLflow over the whole run; what is missing then stays in the journal.
    """

    tracking_uri: str | None = None
    experiment: str | None = None
    run_name: str | None = None
    tags: dict[str, Any] | None = None
    parent: str | None = None
    log_model: Literal[False, "best", "all"] = False

    interval = 1.0
    batch = 20  # what MLflow does with more takes so long that training would wait for the interpreter

    _held: bool = field(init=False, default=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tracking_uri", "experiment", "run_name", "parent"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must not be empty")
        if self.experiment is not None and len(self.experiment) > 500:
            raise ValueError(f"experiment must have at most 500 characters, got {len(self.experiment)}")
        for name, value in (self.tags or {}).items():
            if not isinstance(value, (str, int, float)):
                raise TypeError(f"a tag must be a text or a number, got {value!r} for {name!r}")
            if _taken(name) != name:
                raise ValueError(f"MLflow takes no tag of the name {name!r}, but {_taken(name)!r}")

    def backend(self) -> _Backend:
        """MLflow, not connected yet."""
        with _environment:
            import mlflow  # noqa: F401 - it takes a second, here rather than in the thread, and reads variables

        return _Backend(self)

    @property
    def client(self) -> MlflowClient:
        """MLflow's own client, for everything that has no hook (datasets, models, traces).

        Raises:
            RuntimeError: there is no run, it is not the process of rank 0, or MLflow cannot be reached.
        """
        return cast(_Backend, self.connected).client

    @property
    def run_id(self) -> str:
        """Under which id MLflow knows the run.

        Raises:
            RuntimeError: there is no run, it is not the process of rank 0, or MLflow cannot be reached.
        """
        return cast(_Backend, self.connected).run_id

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        if run.rank == 0 and not self._held:
            _environment.__enter__()  # from here to the end: the environment of a process is not changed while threads are busy
            self._held = True
        try:
            super().on_run_start(run)
        except BaseException:
            self._leave()
            raise

    @hookimpl
    def on_run_end(self, run: Run, status: str) -> None:
        try:
            super().on_run_end(run, status)
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._held:
            self._held = False
            _environment.__exit__()


VARIABLES = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # who tries again is the thread
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class _Environment:
    """`VARIABLES`, which MLflow reads at each call and no argument stands for: as the user set them, or these while somebody is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._own: list[str] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._own = [name for name in VARIABLES if name not in os.environ]
                os.environ.update({name: VARIABLES[name] for name in self._own})

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for name in self._own:
                    if os.environ.get(name) == VARIABLES[name]:
                        del os.environ[name]


_environment = _Environment()


class _Backend:
    """One run of MLflow, known again by its tag ``torchplug.run_id``; the tag ``torchplug.records`` says how much of it is there."""

    def __init__(self, options: Mlflow) -> None:
        self._options = options
        self.where = ""
        self.run_id = ""
        self.client: MlflowClient
        self._held = False
        self._last = 0.0  # time of the newest record that was seen
        self._said: set[Path] = set()

    # ------------------------------------------------------------------ the run

    def connect(self, place: Place) -> list[Mark]:
        from mlflow import MlflowClient

        if not self._held:
            _environment.__enter__()
            self._held = True
        self._place = place
        root = _root(place)
        uri = self._options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        if uri is None or place.trial:
            uri = _database(root)
        with _alone(root) if uri.startswith(WITHOUT_A_SERVER) else nullcontext():
            self.client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(root, uri)
        run = self._find(experiment)
        self.run_id, tags = run.info.run_id, run.data.tags
        self._artifacts = (run.info.artifact_uri, uri)
        self._params: dict[str, str] = dict(run.data.params)
        self._named = {name for name in tags if name.startswith("torchplug.name.")}
        self._best = tags.get("torchplug.best")
        self._resumed = "torchplug.resumed" in tags
        self._rows: dict[str, set[tuple[int, float | None]]] = {}
        self.where = _where(uri, experiment, self.run_id)
        count, _, moment = tags.get("torchplug.records", "").partition(" ")
        mark = Mark(int(count), float(moment)) if moment else Mark()
        self._last = max(self._last, mark.time, place.start["time"])
        return [mark] if mark.n else []

    def _experiment(self, root: Path, uri: str) -> str:
        """The id of the experiment, which is made where there is none."""
        from mlflow.exceptions import MlflowException

        name = self._options.experiment or self._place.name
        found = self.client.get_experiment_by_name(name)
        if found is None:
            # without a server MLflow would put files into the working directory
            folder = (root / "mlartifacts").as_uri() if uri.startswith(WITHOUT_A_SERVER) else None
            try:
                return str(self.client.create_experiment(name, artifact_location=folder))
            except MlflowException:  # another process was faster
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise RuntimeError(f"the experiment {name!r} was deleted in MLflow; restore it there or choose another one")
        return str(found.experiment_id)

    def _find(self, experiment: str) -> Any:
        """The run in MLflow, running; made where there is none."""
        start, options = self._place.start, self._options
        found = self.client.search_runs([experiment], f"tags.`torchplug.run_id` = '{start['id']}'", max_results=1)
        if found:
            if found[0].info.status != "RUNNING":
                self.client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0]
        tags = {"torchplug.run_id": start["id"], "mlflow.source.name": sys.argv[0] or start["module"], "mlflow.source.type": "LOCAL"}
        with suppress(Exception):  # a machine where the user has no name
            tags["mlflow.user"] = getpass.getuser()
        if options.parent is not None:
            tags["mlflow.parentRunId"] = options.parent
        tags.update(options.tags or {})
        tags = {name: _clean(str(value))[:TAG] for name, value in tags.items()}
        name = options.run_name or self._place.run_dir.name
        return self.client.create_run(experiment, start_time=_milliseconds(start["time"]), tags=tags, run_name=name)

    def finish(self, status: str) -> None:
        if self._options.log_model == "best":
            try:
                self._put_best()
            except Refused as error:
                logger.warning("mlflow: the best checkpoint is not stored: %s", error)
        self.client.set_terminated(self.run_id, STATUS.get(status, "FAILED"), end_time=_milliseconds(self._last))

    def close(self) -> None:
        if self._held:
            self._held = False
            _environment.__exit__()
        tracking = getattr(getattr(self, "client", None), "_tracking_client", None)
        engine = getattr(getattr(tracking, "store", None), "engine", None)
        if engine is not None:  # MLflow keeps each file that it knows open; it opens it again where it is needed
            engine.dispose()

    # ------------------------------------------------------------------ records

    def go_back(self, mark: Mark) -> None:
        """Nothing can be taken out of MLflow: from now on a value that it has at that step already is passed over, also by who
        connects later."""
        self.client.set_tag(self.run_id, "torchplug.resumed", "true")
        self._resumed = True

    def send(self, records: Sequence[Record], mark: Mark) -> None:
        from mlflow.entities import Metric, RunTag

        self._last = records[-1]["time"]
        metrics: list[Metric] = []
        tags: dict[str, str] = {}
        params: dict[str, str] = {}
        models: dict[str, bool] = {}  # whether the file is there
        files = False
        with self._refusing():
            for record in records:
                event = record["event"]
                if event == "log_metrics":
                    metrics += self._metrics(record, tags)
                elif event == "on_run_start":  # of torchplug, torch, Python and the plugins: others, perhaps, where a run goes on
                    tags["torchplug.versions"] = json.dumps(record["versions"])[:TAG]
                elif event == "log_hyperparameters":
                    self._hyperparameters(record["hyperparameters"], params, tags)
                elif event in ("on_checkpoint_saved", "on_checkpoint_removed") and self._options.log_model == "all":
                    models[record["path"]] = event == "on_checkpoint_saved"
                elif event in ("log_text", "log_figure", "log_artifact"):
                    getattr(self, f"_{event}")(record)
                    files = True
            for path, there in models.items():
                self._put_model(path) if there else self._remove_model(path)
            self._store_params(params)
            if not (metrics or tags or params or models or files):
                return
            for portion in _portions(list(tags.items()), OTHERS):
                self.client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in portion], synchronous=True)
            *most, rest = list(_portions(metrics, METRICS)) or [[]]
            for portion in most:
                self.client.log_batch(self.run_id, metrics=portion, synchronous=True)
            here = RunTag("torchplug.records", f"{mark.n} {mark.time!r}")
            self.client.log_batch(self.run_id, metrics=rest, tags=[here], synchronous=True)
            self._named.update(tags)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What MLflow does not take as it is, is refused; all other errors are for later."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"):
                raise
            if self.client.get_run(self.run_id).info.lifecycle_stage != "active":
                raise RuntimeError("the run was deleted in MLflow") from error  # it will be made anew
            raise Refused(str(error)) from error

    def _metrics(self, record: Record, tags: dict[str, str]) -> Iterator[Any]:
        from mlflow.entities import Metric

        step, moment = record["step"], _milliseconds(record["time"])
        for name, value in record["metrics"].items():
            key, number = self._name(name, tags), _number(value)
            if not self._resumed or not self._has(key, step, number):
                yield Metric(key, number, moment, step)

    def _has(self, key: str, step: int, number: float) -> bool:
        """Whether MLflow had a value when it was asked for the first time."""
        if key not in self._rows:  # who went back only goes on from there: earlier steps are of no interest
            history = self.client.get_metric_history(self.run_id, key)
            self._rows[key] = {(row.step, _same(row.value)) for row in history if row.step >= step}
        return (step, _same(number)) in self._rows[key]

    def _name(self, name: str, tags: dict[str, str]) -> str:
        """The name under which MLflow takes something; what it was is kept in a tag."""
        taken = _taken(name)
        tag = f"torchplug.name.{taken}"
        if taken != name and tag not in self._named:
            tags[tag] = _clean(name)[:TAG]
        return taken

    def _hyperparameters(self, hyperparameters: Mapping[str, Any], params: dict[str, str], tags: dict[str, str]) -> None:
        """Adds what is new to ``params``; for what is there with another value, which MLflow does not change, a tag."""
        for name, text in _flat(hyperparameters):
            parts = [text[i : i + VALUE] for i in range(0, len(text), VALUE)] or [""]
            new = {self._name(f"{name}.{n}" if n else name, tags): part for n, part in enumerate(parts)}
            known = {**self._params, **params}
            if any(known.get(key, part) != part for key, part in new.items()):
                tags[_taken(f"torchplug.changed.{name}")] = text[:TAG]
            else:
                params.update({key: part for key, part in new.items() if key not in known})

    def _store_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        for portion in _portions(list(params.items()), OTHERS):
            self.client.log_batch(self.run_id, params=[Param(*param) for param in portion], synchronous=True)
            self._params.update(portion)

    # ------------------------------------------------------------------ files

    def _log_text(self, record: Record) -> None:
        path = _path(f"{record['name']}/{record['step']}.txt")
        self._put(path, lambda: self.client.log_text(self.run_id, _clean(record["text"]), path))

    def _log_figure(self, record: Record) -> None:
        self._put_file(self._place.journal.parent / record["path"], f"figures/{record['name']}/{record['step']}.png")

    def _log_artifact(self, record: Record) -> None:
        self._put_file(self._place.found(record["path"]), f"artifacts/{record['name']}")

    def _put_file(self, source: Path, name: str) -> None:
        """Stores a file, or each in a folder; one that is not there is said once."""
        if source.is_dir():
            for each in sorted(source.rglob("*")):
                if each.is_file():
                    self._put_file(each, f"{name}/{each.relative_to(source).as_posix()}")
        elif source.exists():
            path = _path(name)
            self._put(path, lambda: self._upload(source, path))
        elif source not in self._said:
            self._said.add(source)
            logger.warning("mlflow: %s is not there and cannot be stored", source)

    def _upload(self, source: Path, path: str) -> None:
        folder, name = posixpath.split(path)
        if source.name == name:
            self.client.log_artifact(self.run_id, str(source), folder)
            return
        with tempfile.TemporaryDirectory() as other:  # MLflow names it after the file
            link = Path(other, name)
            try:
                link.symlink_to(source.absolute())
            except OSError:
                shutil.copyfile(source, link)
            self.client.log_artifact(self.run_id, str(link), folder)

    def _put(self, path: str, put: Callable[[], None]) -> None:
        """Files have a store of their own: one that fails while the tracking server answers must not hold up the rest.

        Raises:
            Refused: it failed several times.
        """
        for attempt in range(ATTEMPTS):
            time.sleep(attempt / 2)
            try:
                return put()
            except Exception as error:
                self.client.get_run(self.run_id)  # where that fails too, it is the server
                failed = error
        raise Refused(f"{path} cannot be stored: {type(failed).__name__}: {failed}") from failed

    # ------------------------------------------------------------------ checkpoints

    def _put_model(self, path: str) -> None:
        source = self._place.found(path)
        if "://" in path:
            logger.warning("mlflow: %s is not a local file and is not stored", path)
        elif source.exists():  # else it has been removed by now
            self._put_file(source, self._model(path))

    def _remove_model(self, path: str) -> None:
        # MlflowClient cannot remove files
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        artifacts, uri = self._artifacts
        name = _path(self._model(path))
        store: Any = get_artifact_repository(artifacts, tracking_uri=uri)
        self._put(name, lambda: store.delete_artifacts(name))

    def _put_best(self) -> None:
        """Stores the best checkpoint in place of an earlier one; the newest where nothing says which is best."""
        found = best = ""
        for record in _saved(self._place.journal):
            if record["reason"].startswith("best"):
                best = f"{record['time']!r} {record['path']}"
            elif record["reason"].startswith("newest"):
                found = f"{record['time']!r} {record['path']}"
        best = best or found
        path = best.partition(" ")[2]
        if not best or best == self._best or not self._place.found(path).exists():
            return
        if self._best is not None and self._best.partition(" ")[2] != path:
            self._remove_model(self._best.partition(" ")[2])
        self._put_model(path)
        self.client.set_tag(self.run_id, "torchplug.best", best[:TAG])

    def _model(self, path: str) -> str:
        """The name of a checkpoint in MLflow: as in the directory of the run."""
        try:
            name = Path(path).relative_to(self._place.start["dir"]).as_posix()
        except ValueError:
            name = Path(path).name
        return name if name.startswith("checkpoints/") else f"checkpoints/{name}"


# ---------------------------------------------------------------------- where things are


def _root(place: Place) -> Path:
    """The directory of all runs, which has that of this run in root/name/version_N; that one itself in a trial run."""
    run_dir = place.run_dir.absolute()
    if place.trial:
        return run_dir
    if run_dir.parent.name == place.name:  # also when the runs, or the working directory, have moved
        return run_dir.parents[1]
    return Path(place.start["options"]["root_dir"]).absolute()


def _database(root: Path) -> str:
    """The address of the database in ``root``.

    Raises:
        sqlite3.OperationalError: it cannot be opened. MLflow would try for minutes.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / "mlflow.db"
    sqlite3.connect(path).close()
    from sqlalchemy import make_url

    text = re.sub(r"\?|%(?=[0-9A-Fa-f]{2})", lambda match: f"%{ord(match[0]):X}", path.as_posix())  # SQLAlchemy 2.1 decodes these
    if make_url(f"sqlite:///{text}").database == path.as_posix():
        return f"sqlite:///{text}"
    return f"sqlite:///file:{quote(path.as_posix())}?uri=true"  # SQLite decodes what SQLAlchemy up to 2.0 leaves as it is


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One at a time: processes that let MLflow make its tables at once disturb each other. The lock is a database, which a system
    lets go of when its process dies."""
    with closing(sqlite3.connect(root / "mlflow.lock", timeout=60.0, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield


def _where(uri: str, experiment: str, run_id: str) -> str:
    parts = urlsplit(uri)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri  # no password
    if parts.scheme in ("http", "https"):
        return f"{address.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
    return f"mlflow ui --backend-store-uri {shlex.quote(address)} --port 5000"


def _saved(journal: Path) -> Iterator[Record]:
    """The checkpoints of a run."""
    with closing(Reader(journal)) as reader:
        for line in reader.lines():
            if b'"on_checkpoint_saved"' in line:
                record = json.loads(line)
                if record["event"] == "on_checkpoint_saved":
                    yield record


# ---------------------------------------------------------------------- what MLflow takes

LETTERS = r"/\w.\- " + ":" * (os.name != "nt")  # in names of metrics, parameters and tags
LETTERS_OF_FILES = r"/\w.\- =+,()"
ESCAPED = re.compile(r"_x[0-9a-f]*_")


def _taken(name: str) -> str:
    """``name`` where MLflow takes it; else one that no other name becomes. What is too long then is cut and ends with a hash."""
    new = _spelt(name, LETTERS)
    most = NAME if new == name else 230  # leaves room for the tag that has the name
    return new if len(new) <= most else _cut(new, name, 230)


def _spelt(name: str, letters: str) -> str:
    """``name`` in ``letters``, and good as a path.

    Another character becomes ``_x`` its code in hexadecimal digits ``_``, an empty name ``_x_``; in such a name, and in one that
    looks like it, so does the ``_`` of every ``_x``. Different names stay different.
    """
    good = re.fullmatch(f"[{letters}]+", name) and posixpath.normpath(name) == name and not name.startswith(("/", ".."))
    if good and name != "." and not ESCAPED.search(name):
        return name
    bad = rf"[^{letters}]|_(?=x)|^/|(?<=/)/|/\Z|^\.\.|(?:^|(?<=/))\.\.?(?=/|\Z)"
    return re.sub(bad, lambda match: "".join(f"_x{ord(letter):x}_" for letter in match[0]), name) or "_x_"


def _cut(text: str, name: str, most: int) -> str:
    digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{text[: most - 9]}-{digits}"


def _path(name: str) -> str:
    """The path of a file in MLflow, each part of it short enough for a file system."""
    parts = _spelt(name, LETTERS_OF_FILES).split("/")
    return "/".join(part if len(part.encode()) <= 200 else _cut(part, part, 50) for part in parts)


def _clean(text: str) -> str:
    """A text that every database takes."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested hyperparameters as ``outer/inner``, all as text."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", _clean(str(value))


def _number(value: float) -> float:
    """``value`` as MLflow keeps it: a float, the largest ones in place of infinite ones."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    return math.copysign(sys.float_info.max, number) if math.isinf(number) else number


def _same(number: float) -> float | None:
    """Something that is equal for equal numbers, also for those that are none."""
    return None if math.isnan(number) else number


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _portions(items: list[Any], most: int) -> Iterator[list[Any]]:
    """``items`` in lists that one request can take."""
    portion: list[Any] = []
    size = 0
    for item in items:
        length = len(item.key) + 100 if hasattr(item, "key") else len(item[0]) + len(item[1]) + 100
        if portion and (len(portion) == most or size + length > SIZE):
            yield portion
            portion, size = [], 0
        portion.append(item)
        size += length
    if portion:
        yield portion
