"""Files that are whole or not there: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchplug.codec import CheckpointError

__all__ = ["FULL", "exchange", "flush_folder", "remove", "replacing", "sweep"]

FULL = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk full (the quota is used up)", errno.EFBIG: "disk full (a file may not be so large)"}

_written: set[str] = set()  # temporary files that this process is writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to; what was written is flushed to disk and takes the place of ``path``.

    Whatever fails, the old file is untouched, and the temporary one is gone.

    Raises:
        CheckpointError: the disk is full, or another thread writes to the same path.
        OSError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    known = os.path.realpath(temporary)
    if known in _written:
        raise CheckpointError(f"{path} is being written already, by another thread")
    _written.add(known)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise CheckpointError(f"{FULL[error.errno]} while writing {path}; what was there before is unharmed") from error
    finally:
        with suppress(OSError):  # where there is an error already, that is the one to be seen
            temporary.unlink(missing_ok=True)
        _written.discard(known)


def flush_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Deletes a file or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def exchange(path: Path, other: Path) -> bool:
    """Each takes the place of the other at one moment. False where the system or the file system cannot do that."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None  # of Linux; Python has no name for it
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(path), here, os.fsencode(other), swap) == 0


def sweep(folder: str | Path) -> list[Path]:
    """Removes the temporary files and folders of writes that were killed; returns what was removed.

    A file of a process that is alive is left alone, and so is every other file. Processes are looked for on this machine:
    jobs that run on several machines at a time need a folder each.
    """
    swept = []
    for path in sorted(Path(folder).glob(".*.safetensors.*.tmp")):
        process = re.fullmatch(r"\..+\.safetensors\.(\d+)\.tmp", path.name)
        if process is None or os.path.realpath(path) in _written or _alive(int(process[1])):
            continue
        if path.is_dir() and not any(path.glob("__*.distcp")):  # not what ranks write together
            continue
        with suppress(OSError):  # another run was faster, or it is not ours to delete
            remove(path)
            swept.append(path)
    return swept


def _alive(process: int) -> bool:
    """Whether another process of this number is there. In a container, a job may have the same number at each start."""
    if process == os.getpid() or os.name != "posix":
        return process != os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
