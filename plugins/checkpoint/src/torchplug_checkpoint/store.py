"""Where files lie: a folder on this machine, or a place that fsspec reaches."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from torchplug import Run, sharded
from torchplug.checkpoint import CheckpointError, header, remove, replacing, sweep

__all__ = ["Local", "Store", "is_url", "open_store"]


class Store(Protocol):
    """The folder of one instance. Names are those of files in it."""

    place: str

    def path(self, name: str) -> Path | str:
        """What hooks are told: a ``Path``, or a URL."""

    def name_of(self, path: Path | str) -> str | None:
        """The name of a file by its path, None if it lies elsewhere."""

    def prepare(self, run: Run) -> None:
        """Makes the folder, and removes what killed writes left in it.

        Raises:
            OSError, CheckpointError: nothing can be written there.
        """

    def names(self) -> set[str]:
        """The files that there are."""

    def header(self, name: str) -> dict[str, Any] | None:
        """What a checkpoint holds besides tensors, None if there is no such checkpoint."""

    def copy(self, name: str, other: str) -> None:
        """Makes ``other`` the same as ``name``; whoever looks finds what was there before or the new file, whole."""

    def rename(self, name: str, other: str) -> None:
        """Gives a file another name."""

    def remove(self, name: str) -> None:
        """Deletes a file, if it is there."""

    def ages(self) -> list[tuple[float, str]]:
        """Each file with the time of its last change before its name, in seconds since 1970."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is none of this machine's."""
    return "://" in os.fspath(path)


def open_store(place: str | os.PathLike[str]) -> Store:
    """The store at a folder or URL; nothing is made there yet."""
    if not is_url(place):
        return Local(Path(place).expanduser())
    from torchplug_checkpoint.remote import Remote  # fsspec is loaded by those who need it

    return Remote(os.fspath(place))


class Local:
    """A folder on this machine. A second name of a file is a hard link, or a copy where the file system has none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = str(folder.resolve())

    def path(self, name: str) -> Path:
        return self.folder / name

    def name_of(self, path: Path | str) -> str | None:
        if is_url(path) or str(Path(path).parent.resolve()) != self.place:
            return None
        return Path(path).name

    def prepare(self, run: Run) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise type(error)(
                error.errno, f"checkpoints cannot be written into {str(self.folder)!r} ({error.strerror}); choose another dir"
            ) from error
        sweep(self.folder)

    def names(self) -> set[str]:
        return {name for _, name in self.ages()}

    def header(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = header(self.path(name))
            return found
        except (CheckpointError, OSError):
            return None

    def copy(self, name: str, other: str) -> None:
        source = self.path(name)
        if source.is_dir():  # ranks wrote it together
            sharded.copy(source, self.path(other))
            return
        with replacing(self.path(other)) as temporary:
            temporary.unlink(missing_ok=True)
            try:
                os.link(source, temporary)
            except OSError:  # this file system has no hard links
                shutil.copyfile(source, temporary)
                shutil.copystat(source, temporary)  # a second name is as old as the first

    def rename(self, name: str, other: str) -> None:
        self.path(name).rename(self.path(other))

    def remove(self, name: str) -> None:
        remove(self.path(name))

    def ages(self) -> list[tuple[float, str]]:
        found = []
        for entry in os.scandir(self.folder) if self.folder.is_dir() else ():
            with suppress(FileNotFoundError):  # one that has just been deleted
                if entry.is_file() or sharded.is_sharded(Path(entry.path)):
                    found.append((entry.stat().st_mtime_ns / 1e9, entry.name))
        return found
