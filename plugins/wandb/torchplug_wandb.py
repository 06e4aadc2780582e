"""Metrics, hyperparameters, texts, figures and files of a run for Weights & Biases."""

from __future__ import annotations

import errno
import hashlib
import html
import json
import logging
import math
import os
import re
import shlex
import shutil
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchplug import Run, hookimpl
from torchplug.checkpoint import replacing
from torchplug.tracking import Mark, Place, Reader, Record, Refused, Tracker

if TYPE_CHECKING:
    import wandb

__all__ = ["Wandb"]

INIT_TIMEOUT = 5.0  # seconds that wandb.init may take to reach the server
PROBE_TIMEOUT = 3.0  # seconds in which the server must say anything
COLUMNS = ("step", "epoch", "samples", "seconds")  # in each row; its own step is another one where W&B has got further already
RESERVED = {"", "_step", "_runtime", "_timestamp", "_wandb"}  # names that wandb writes itself or drops
EXIT_CODES = {"finished": 0, "stopped": 0, "failed": 1}
INTERRUPTED = 255  # what wandb itself says after Ctrl-C
SPARE = 1 << 16  # bytes that are free on a disk that is not full
LONGEST = 150  # bytes of a figure's or a text's name: wandb makes it a part of the name of a file

logger = logging.getLogger("torchplug")


@dataclass(kw_only=True, eq=False)
class Wandb(Tracker):
    """Logs to Weights & Biases.

    Each record of metrics is a row at its optimizer step and its time, with the columns ``step``, ``epoch``, ``samples`` and
    ``seconds`` beside the metrics. A run that goes on (a test after a fit, a resumed fit) goes on under the same id. Offline runs lie in a
    folder that ``wandb sync`` sends. A run of wandb that is open when the Trainer starts is used, and left open.

    Args:
        project: Name of the project. None: WANDB_PROJECT, or the run's name, which is that of the module's class unless Trainer has one.
        entity: The user or team that owns the project. None: what W&B takes.
        name: The name that is shown for the run. None: that of the run's folder.
        mode: 'online', 'offline' or 'disabled'. None: what wandb takes from WANDB_MODE or `wandb offline`, else online.
        group: Runs with the same group are shown together.
        tags: Tags of the run.
        notes: A text about the run.
        log_model: Checkpoints as artifacts: 'all' of them when they are written, the 'best' one when the run is over, or none.
        dir: Where it keeps files. None: a folder of its own name in the directory of the run.
        close_timeout: Wait at most this many seconds for the backend over the whole run; what is missing then stays in the journal.
    """

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None
    group: str | None = None
    tags: list[str] | None = None
    notes: str | None = None
    log_model: Literal[False, "best", "all"] = False

    _training: bool = field(init=False, default=False, repr=False)  # a run that must end in time, not a replay

    def __post_init__(self) -> None:
        super().__post_init__()
        for tag in self.tags or []:
            if not isinstance(tag, str) or not 1 <= len(tag) <= 64:
                raise ValueError(f"tags must be texts of 1 to 64 characters, got {tag!r}")
        if self.project is not None and (not self.project or len(self.project) > 128 or re.search(r"[/\\#?%:]", self.project)):
            raise ValueError(f"project must be a name of at most 128 characters without any of / \\ # ? % :, got {self.project!r}")

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        self._training = True
        try:
            super().on_run_start(run)
        finally:
            self._training = False

    def backend(self) -> Account:
        """The run at W&B, not begun yet."""
        import wandb

        return Account(self, wandb.run, self.close_timeout / 2 if self._training else 0.0)

    @property
    def experiment(self) -> wandb.Run:
        """The run of wandb, for everything that has no hook (tables, histograms, alerts).

        Raises:
            RuntimeError: no run is going on, this is not its first process, or W&B cannot be reached.
        """
        account = self.connected
        assert isinstance(account, Account)
        return account.shared()


class Account:
    """One run at W&B, and the list of what was sent to it.

    What is sent from `connect` to `finish` is a part. Only a part that is finished counts: wandb keeps rows in a process of its
    own, so what it had when it was killed is not known. Offline each part is a folder, and one that was not finished, or that a
    run which was resumed has left behind, is made anew from the journal. Online nothing can be taken back: steps that the server
    has already are passed over.

    Args:
        options: those of the plugin.
        theirs: a run that the user has begun.
        timeout: seconds that W&B has at the end, 0 for as long as it takes.
    """

    def __init__(self, options: Wandb, theirs: wandb.Run | None, timeout: float) -> None:
        self.options, self.theirs, self.timeout = options, theirs, timeout
        self.where = ""
        self.run: wandb.Run | None = None
        self.parts: list[dict[str, Any]] = []
        self._lock = threading.Lock()  # `shared` is called from training
        self._said: set[str] = set()
        self._first = 0  # the step that a row must have at least, as W&B says
        self._until = 0.0  # the time of its last row, which is that of the last record in it
        self._begin(Mark(), again=False)

    def _begin(self, mark: Mark, again: bool) -> None:
        """Sending begins behind ``mark``."""
        self._next = mark.n
        self._again = again and self._until > mark.time  # W&B may have some of what comes
        self._row: tuple[int, int] = (-1, -1)  # the step of the last record, and the one that it has at W&B
        self._keys: set[str] = set()  # in that row
        self._mark = Mark()
        self._best: Record | None = None
        self._models: dict[str, Any] = {}  # path -> artifact, None if it came too late

    # ------------------------------------------------------------------ what was sent

    def connect(self, place: Place) -> list[Mark]:
        import wandb

        self.place, self.run, self.where, self._first, self._until = place, None, "", 0, 0.0
        settings = _setup(wandb)
        self.mode = {"dryrun": "offline", "run": "online"}.get(mode := self.options.mode or settings.mode, mode)
        if place.trial or (self.mode == "disabled" and self.theirs is None):
            self.where = "nothing is logged, as mode is disabled"
            self.run = _disabled(wandb)
            self._begin(Mark(), again=False)
            return []
        self.project = self.options.project or settings.project or re.sub(r"[/\\#?%:]", "-", place.name)[:128]
        self.rebuilds = self.theirs is None and self.mode == "offline"
        entity = self.options.entity or settings.entity
        goal = ["run", self.theirs.id] if self.theirs else [self.mode, settings.base_url, entity or "", self.project]
        digest = hashlib.sha256("\n".join(goal).encode()).hexdigest()[:8]
        place.folder.mkdir(parents=True, exist_ok=True)
        self._list = place.folder / f"sent.{place.start['id']}.{digest}.json"
        kept = json.loads(self._list.read_text())["parts"] if self._list.exists() else []
        self.parts, self._goal = [part for part in kept if part["n"]], goal
        self._drop(part for part in kept if not part["n"])
        marks = [Mark(part["n"], part["time"]) for part in self.parts]
        if not self._anything_new(marks):
            self._look()
            return marks
        self.run = self.theirs or self._open(wandb, settings, entity)
        if not self.rebuilds:
            self._first = max(self.run.step, self.run.starting_step)  # the former is 0 in a run that was resumed (wandb 0.31.0)
            self._until = self.run.summary.get("_timestamp") or 0.0  # type: ignore[no-untyped-call]
        self._begin(marks[-1] if marks else Mark(), again=len(kept) > len(self.parts))
        folder = self.run.sync_dir if self.theirs else os.path.relpath(self.run.sync_dir, place.folder)
        self.parts.append({"folder": folder, "n": 0, "time": 0.0, "shared": False})
        self._keep()
        self._look()
        return marks

    def _anything_new(self, marks: list[Mark]) -> bool:
        """Whether the journal has more than the parts that are finished."""
        with closing(Reader(self.place.journal)) as reader:
            return not marks or reader.seek(marks) != marks[-1] or bool(reader.records(1))

    def _keep(self) -> None:
        with replacing(self._list) as temporary:
            temporary.write_text(json.dumps({"run": self.place.start["id"], "to": self._goal, "parts": self.parts}, indent=1))

    def _look(self) -> None:
        """Says how to look at the run."""
        if not self.rebuilds and self.run is not None and not self.run.offline:
            self.where = self.run.url or ""
        else:
            folders = [str(self.place.folder / part["folder"]) for part in self.parts]
            self.where = shlex.join(["wandb", "sync", *folders]) if folders else ""

    def _drop(self, parts: Iterable[dict[str, Any]]) -> None:
        """Takes folders out of the way of ``wandb sync``. One in which there may be more than the journal has is kept aside."""
        for part in parts if self.rebuilds else ():
            folder = self.place.folder / part["folder"]
            if not folder.is_dir():
                continue
            if any(folder.glob("*.synced")):
                self._say(f"wandb: {folder} was synced before it was complete; delete the run at W&B before you sync its new folder")
            if part["shared"]:
                folder.rename(folder.with_name(f"abandoned-{folder.name}"))
            else:
                shutil.rmtree(folder)

    def go_back(self, mark: Mark) -> None:
        current = self.parts[-1:] if self.run is not None else []
        old = self.parts[: len(self.parts) - len(current)]
        self.parts = [part for part in old if part["n"] <= mark.n]
        self._drop(part for part in old if part["n"] > mark.n)
        self.parts += current
        self._begin(mark, again=True)
        self._keep()
        self._look()

    def _say(self, text: str) -> None:
        """A line for the user, once."""
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)

    # ------------------------------------------------------------------ the run

    def _open(self, wandb: Any, settings: Any, entity: str | None) -> wandb.Run:
        """Begins a part. wandb.init would wait for a server that is not there, ask for a key, or write somewhere else."""
        if not os.access(self.place.folder, os.W_OK):
            raise PermissionError(f"{self.place.folder} cannot be written")
        if self.mode != "offline":
            _reach(settings)
            _check_key(wandb, settings)
        options, start = self.options, self.place.start
        before = set(self.place.folder.glob("*wandb/*run-*"))
        try:
            return wandb.init(  # type: ignore[no-any-return]
                project=self.project,
                entity=entity,
                name=options.name or settings.run_name or self.place.run_dir.absolute().name,
                group=options.group,
                tags=options.tags,
                notes=options.notes,
                mode=self.mode,
                dir=str(self.place.folder.absolute()),
                id=start["id"],
                resume="allow",
                reinit="create_new",
                config={"torchplug": _plain({key: start[key] for key in ("module", "options", "versions")})},
                settings=wandb.Settings(
                    init_timeout=INIT_TIMEOUT,
                    finish_timeout=self.timeout,
                    finish_timeout_raises=True,
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    silent=True,
                ),
            )
        except Exception as error:
            for folder in set(self.place.folder.glob("*wandb/*run-*")) - before:
                shutil.rmtree(folder, ignore_errors=True)
            _let_go(wandb, error)
            raise

    def shared(self) -> wandb.Run:
        """The run, for somebody else too: what it gets then is in no journal."""
        if self.run is None:
            raise RuntimeError("wandb has no run at present")
        with self._lock:
            if self.parts and not self.parts[-1]["shared"]:
                self.parts[-1]["shared"] = True
                self._keep()
        return self.run

    def finish(self, status: str) -> None:
        if self.run is None or not self.parts:
            return
        if self._best is not None:
            self._model(self._best, ["latest", "best"])
        if self.theirs is None:
            code = EXIT_CODES.get(status, INTERRUPTED)
            folder, online = Path(self.run.sync_dir) / "artifacts", not self.run.offline
            self.run.finish(exit_code=code)
            if not online and shutil.disk_usage(self.place.folder).free < SPARE:
                raise OSError(errno.ENOSPC, "the disk is full, and wandb drops what it cannot write", str(self.place.folder))
            if online:
                shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            self.parts[-1].update(n=self._mark.n, time=self._mark.time)
            self._keep()

    def close(self) -> None:
        run, self.run = self.run, None
        if run is not None and self.theirs is None:
            run.finish(exit_code=1)  # of one that is finished already, nothing

    # ------------------------------------------------------------------ records

    def send(self, records: Sequence[Record], mark: Mark) -> None:
        for record in records:
            if record["n"] < self._next:  # sent already, with another that was refused
                continue
            try:
                self._send(record)
            except (ValueError, TypeError, FileNotFoundError) as error:
                raise Refused(f"{type(error).__name__}: {error}") from error
            self._next = record["n"] + 1
        self._mark = mark

    def _send(self, record: Record) -> None:
        import wandb

        assert self.run is not None
        event = record["event"]
        if event == "log_metrics":
            self._log(record, {_allowed(name, "metric"): value for name, value in record["metrics"].items()})
        elif event == "log_text":
            text = f'<pre style="white-space: pre-wrap">{html.escape(_utf8(record["text"]))}</pre>'
            self._log(record, {_short(record["name"]): wandb.Html(text, data_is_not_path=True)})
        elif event == "log_figure":
            self._log(record, {_short(record["name"]): wandb.Image(str(self.place.journal.parent / record["path"]))})
        elif event == "log_hyperparameters":
            values = {_allowed(name, "hyperparameter"): value for name, value in record["hyperparameters"].items()}
            self.run.config.update(_plain(values), allow_val_change=True)  # type: ignore[no-untyped-call]
        elif event == "log_artifact":
            self._file(record)
        elif event == "on_checkpoint_saved" and self.options.log_model == "all":
            self._model(record, ["latest", "best"] if _is_best(record) else ["latest"])
        elif event == "on_checkpoint_saved" and self.options.log_model == "best":
            if _is_best(record) or self._best is None or not _is_best(self._best):
                self._best = record
        elif event == "on_checkpoint_removed" and self.options.log_model == "all":
            self._remove(record["path"])

    def _log(self, record: Record, values: dict[str, Any]) -> None:
        """One row. wandb merges rows of one step, and drops those of an earlier one."""
        step: int = record["step"]
        assert self.run is not None
        if self._again and self._has(record["time"], step):
            return
        if step != self._row[0]:
            lowest = max(self._row[1] + 1, self.run.step if self.theirs is not None else self._first)
            self._row, self._keys = (step, max(step, lowest)), set()
        columns = {name: record[name] for name in COLUMNS if name in record}
        for name in sorted(self._keys.intersection(values)):
            self._say(f"wandb keeps one value of a name for each step, the last one, and {name!r} has several")
        self._keys.update(values)
        self.run.log({**columns, **values, "_timestamp": record["time"]}, step=self._row[1])

    def _has(self, time: float, step: int) -> bool:
        """Whether W&B has a row that it may have been sent before: those up to the last that it got, or up to the step of that one
        where the run has another past by now."""
        has = step < self._first
        if not has or time == self._until:
            self._again = False
        return has

    # ------------------------------------------------------------------ files

    def _file(self, record: Record) -> None:
        path = self._found(record["path"])
        kind = "folder" if path.is_dir() else "file"
        self._artifact(record, path, re.sub(r"[^\w.-]", "-", record["name"], flags=re.ASCII)[:128], kind, [], link=False)

    def _model(self, record: Record, aliases: list[str]) -> None:
        try:
            path: Path | str = record["path"] if "://" in record["path"] else self._found(record["path"])
        except FileNotFoundError:
            self._say("wandb: a checkpoint that was deleted before it was W&B's turn is not an artifact")
            self._models[record["path"]] = None
            return
        name = f"model-{self.place.start['id']}"
        self._models[record["path"]] = self._artifact(record, path, name, "model", aliases, link=True)

    def _artifact(self, record: Record, path: Path | str, name: str, kind: str, aliases: list[str], link: bool) -> Any:
        """Hands a file over, as it is now. wandb would copy it to a folder outside of the run's; here it lies beside the rows."""
        import wandb

        assert self.run is not None
        about = {key: record[key] for key in ("step", "epoch", "path", "reason") if key in record}
        artifact = wandb.Artifact(name, kind, metadata=_plain({**about, **record.get("metrics", {})}))
        if isinstance(path, str):
            artifact.add_reference(path, checksum=False)
        else:
            copy = Path(self.run.sync_dir) / "artifacts" / str(record["n"]) / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            how = _link if link else shutil.copyfile
            if path.is_dir():
                shutil.copytree(path, copy, copy_function=how, dirs_exist_ok=True)
                artifact.add_dir(str(copy), skip_cache=True, policy="immutable")
            else:
                how(str(path), str(copy))
                artifact.add_file(str(copy), skip_cache=True, policy="immutable")
        return self.run.log_artifact(artifact, aliases=aliases or None)

    def _remove(self, path: str) -> None:
        """Deletes the version of a checkpoint that is gone; offline there is nothing yet that could be deleted."""
        import wandb

        assert self.run is not None
        known, artifact = path in self._models, self._models.pop(path, None)
        if self.run.offline or self.run.disabled or (known and artifact is None):
            return
        try:
            if artifact is not None:
                found = [artifact.wait(timeout=60)]
            else:
                logged = wandb.Api().run(self.run.path).logged_artifacts()
                found = [each for each in logged if each.type == "model" and each.metadata.get("path") == path]
            for each in found:
                each.delete(delete_aliases=True)
        except Exception as error:  # it is there once too often, which is no reason to hold up the rest
            self._say(f"wandb: the artifact of a checkpoint that was deleted could not be deleted: {type(error).__name__}: {error}")

    def _found(self, path: str) -> Path:
        """Where a file of the run is.

        Raises:
            FileNotFoundError: it is gone.
        """
        found = self.place.found(path)
        if not found.exists():
            raise FileNotFoundError(f"{path} is not there any more")
        return found


# ---------------------------------------------------------------------- wandb


def _setup(wandb: Any) -> Any:
    """The settings of the session. wandb replaces sys.exit and sys.excepthook when it starts its process; they are put back."""
    before = sys.exit, sys.excepthook
    settings = wandb.setup().settings
    if type(getattr(sys.exit, "__self__", None)).__module__.startswith("wandb."):
        sys.exit = before[0]
    if type(getattr(sys.excepthook, "__self__", None)).__module__.startswith("wandb."):
        sys.excepthook = before[1]
    return settings


def _disabled(wandb: Any) -> wandb.Run:
    """A run that does nothing. wandb would put it in the place of a run that the user has begun."""
    before = dict(vars(wandb))
    run = wandb.init(mode="disabled", reinit="create_new", settings=wandb.Settings(silent=True))
    for name, value in before.items():
        if getattr(wandb, name) is not value:
            setattr(wandb, name, value)
    return run  # type: ignore[no-any-return]


def _let_go(wandb: Any, error: Exception) -> None:
    """Ends the process of wandb after a wandb.init that failed: until then it holds the id to be in use (wandb 0.31.0). Other runs
    of the user stop that, unless the process is dead, where nothing of theirs works any more."""
    dead = isinstance(error, ConnectionError) or type(error).__name__ in ("MailboxClosedError", "HandleAbandonedError")
    if dead or wandb.setup().most_recent_active_run is None:
        try:
            wandb.teardown()
        except (Exception, SystemExit) as another:  # it exits with the code of its process
            logger.debug("wandb.teardown: %s", another)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """Does not follow: it has answered."""


def _reach(settings: Any) -> None:
    """Finds out within seconds whether the server answers at all: after a wandb.init that failed, nothing is as it was.

    Raises:
        ConnectionError: it does not.
    """
    if settings.http_proxy or settings.https_proxy or settings.x_proxies:
        return
    try:
        urllib.request.build_opener(_Stay).open(settings.base_url, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, (ConnectionError, TimeoutError, socket.gaierror)):
            raise ConnectionError(f"{settings.base_url} does not answer ({reason})") from error


def _check_key(wandb: Any, settings: Any) -> None:
    """wandb.init would ask for a missing key at the terminal.

    Raises:
        RuntimeError: there is none.
    """
    if wandb.run is not None:  # somebody has logged in
        return
    usual = settings.mode
    if usual != "online":  # the option says otherwise
        wandb.setup(settings=wandb.Settings(mode="online"))
    try:
        if not wandb.login(prompt=False, verify=False):
            raise RuntimeError("there is no API key: set WANDB_API_KEY, call `wandb login`, or log with mode='offline'")
    finally:
        if usual != "online":
            wandb.setup(settings=wandb.Settings(mode=usual))


# ---------------------------------------------------------------------- values


def _is_best(record: Record) -> bool:
    return bool(re.search(r"\bbest\b", record["reason"]))


def _utf8(text: str) -> str:
    """A text may have halves of surrogate pairs, which a file cannot."""
    return text.encode("utf-8", "backslashreplace").decode()


def _allowed(name: str, kind: str) -> str:
    """A name that wandb takes."""
    return f"{kind}:{name}" if name in RESERVED else _utf8(name)


def _short(name: str) -> str:
    """The name of a figure or a text, which is a part of a file's name too."""
    name = _allowed(name, "media").replace("\0", "\\0")
    if len(name.encode()) <= LONGEST:
        return name
    return f"{name.encode()[:LONGEST].decode(errors='ignore')}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _plain(value: Any) -> Any:
    """Configuration as strict JSON, which has no numbers that are not finite."""
    if isinstance(value, Mapping):
        return {_utf8(str(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, str):
        return _utf8(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _link(source: str, target: str) -> str:
    """The same bytes under another name: checkpoints are replaced, never written over."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
