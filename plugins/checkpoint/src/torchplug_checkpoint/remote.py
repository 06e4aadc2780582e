"""Files at a URL, through fsspec: whoever looks there finds a whole file or none."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from torchplug import Run
from torchplug.checkpoint import CheckpointError, header, load, write

__all__ = ["Remote", "fetch", "put"]

PREFIX = ".upload-"
DAY = 24 * 60 * 60.0


class Remote:
    """A folder at a URL such as ``s3://bucket/folder`` or ``memory://folder``."""

    def __init__(self, url: str) -> None:
        self.place = url.rstrip("/")
        self._mark = ""
        with _explained(f"{self.place} cannot be reached"):
            self._fs, self._folder = _opened(self.place)

    def path(self, name: str) -> str:
        return f"{self.place}/{name}"

    def name_of(self, path: Path | str) -> str | None:
        folder, _, name = str(path).rpartition("/")
        return name if folder == self.place else None

    def prepare(self, run: Run) -> None:
        probe, self._mark = f".{run.id}.tmp", run.id
        with _explained(f"checkpoints cannot be written into {self.place!r}", "choose another dir"):
            self._fs.makedirs(self._folder, exist_ok=True)
            self._fs.pipe_file(self._at(probe), b"torchplug")
            for age, name in self.ages():  # what this run left when it was killed; what others write now is theirs
                if name.endswith(probe) or (name.startswith(".") and name.endswith(".tmp") and time.time() - age > DAY):
                    self._fs.rm_file(self._at(name))
        for folder in run.dir.glob(f"{PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def names(self) -> set[str]:
        return {_name(entry) for entry in self._entries()}

    def header(self, name: str) -> dict[str, Any] | None:
        try:
            size = self._fs.info(self._at(name))["size"]
            count = int.from_bytes(self._fs.cat_file(self._at(name), 0, 8), "little")
            with tempfile.TemporaryDirectory() as folder:
                head = Path(folder) / name
                with open(head, "wb") as file:  # as long as the whole, and empty where the tensors are
                    file.write(self._fs.cat_file(self._at(name), 0, min(8 + count, size)))
                    file.truncate(size)
                found: dict[str, Any] = header(head)
                return found
        except (CheckpointError, FileNotFoundError):
            return None

    def copy(self, name: str, other: str) -> None:
        with _explained(f"{self.path(other)} could not be made from {name}"):
            try:
                self._fs.cp_file(self._at(name), self._at(_temporary(other, self._mark)))
            except NotImplementedError:  # it has no copies, so the file goes there and back
                with tempfile.TemporaryDirectory() as folder:
                    self._fs.get_file(self._at(name), f"{folder}/{other}")
                    self._fs.put_file(f"{folder}/{other}", self._at(_temporary(other, self._mark)))
            self.rename(_temporary(other, self._mark), other)

    def rename(self, name: str, other: str) -> None:
        if type(self._fs).mv is not AbstractFileSystem.mv:  # it has a way of its own, which is a rename
            self._fs.mv(self._at(name), self._at(other))
        else:  # a store of objects, where each appears as a whole
            self._fs.cp_file(self._at(name), self._at(other))
            self._fs.rm_file(self._at(name))

    def remove(self, name: str) -> None:
        with _explained(f"{self.path(name)} could not be deleted"), suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def ages(self) -> list[tuple[float, str]]:
        return [(self._age(entry), _name(entry)) for entry in self._entries() if entry["type"] == "file"]

    def write(self, run: Run, name: str, state: dict[str, Any]) -> None:
        """Writes a state to a file beside the run's directory's, and then over there under a temporary name first."""
        temporary = _temporary(name, run.id)
        with tempfile.TemporaryDirectory(dir=run.dir, prefix=PREFIX) as folder:
            local = Path(folder) / name
            write(local, state)
            with _explained(f"{self.path(name)} could not be written", "what was there before is unharmed"):
                try:
                    self._fs.put_file(str(local), self._at(temporary))
                    self.rename(temporary, name)
                except BaseException:
                    with suppress(Exception):
                        self._fs.rm_file(self._at(temporary))
                    raise

    def _at(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _age(self, entry: dict[str, Any]) -> float:
        for key in ("mtime", "LastModified", "last_modified"):  # what a listing says is not asked for again
            value = entry.get(key)
            if isinstance(value, datetime):
                return value.timestamp()
            if isinstance(value, (int, float)):
                return float(value)
        return float(self._fs.modified(entry["name"]).timestamp())

    def _entries(self) -> list[dict[str, Any]]:
        with _explained(f"{self.place} cannot be listed"):
            self._fs.invalidate_cache(self._folder)
            try:
                entries: list[dict[str, Any]] = self._fs.ls(self._folder, detail=True)
            except FileNotFoundError:
                return []
            return entries


def put(run: Run, url: str, state: dict[str, Any]) -> str:
    """Writes ``state`` to a URL."""
    folder, _, name = url.rpartition("/")
    Remote(folder).write(run, name, state)
    return url


def fetch(url: str) -> dict[str, Any]:
    """The state in the checkpoint at a URL.

    Raises:
        CheckpointError: there is none, it cannot be reached, or it is not good.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / url.rpartition("/")[2]
        with _explained(f"{url} cannot be read"):
            filesystem, path = _opened(url)
            filesystem.get_file(path, str(local))
        try:
            return load(local)
        except CheckpointError as error:  # which speaks of the copy
            raise CheckpointError(str(error).replace(str(local), url)) from None


def _opened(url: str) -> tuple[Any, str]:
    filesystem, path = url_to_fs(url)
    return filesystem, str(path).rstrip("/")


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _temporary(name: str, mark: str) -> str:
    return f".{name}.{mark}.tmp"


@contextmanager
def _explained(what: str, then: str = "") -> Iterator[None]:
    """Whatever a file system raises, in the words of this plugin; each has errors of its own."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({type(error).__name__}: {error})" + (f"; {then}" if then else "")) from error
