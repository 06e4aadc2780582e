"""A file written from front to back, past the system's page cache where that is possible.

What goes through the cache is copied there page by page, pushes out what training reads, and is waited for when it is flushed.
Past it, blocks go to the disk from buffers of its own, and one thread writes while the other fills the next buffer. FastPersist
(Wang et al., arXiv:2406.13768) has this for checkpoints.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import zlib
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch import Tensor

__all__ = ["BLOCK", "Outflow"]

BLOCK = 4096  # bytes; where a write past the cache begins in memory and file, and how long it is, are multiples of it
BUFFER = 1 << 20  # bytes
BUFFERS = 4


class Outflow:
    """Writes a new file: the body with `write`, in order, then what stands in front of it with `finish`. It is used in ``with``.

    Args:
        path: where to write.
        start: where the body begins, a multiple of `BLOCK`.

    Raises:
        OSError: it cannot be written; here, or at one of the next calls.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._file = open(path, "wb", buffering=0, opener=_past_cache)  # noqa: SIM115 - __exit__ closes it
        self._past_cache = True
        self._file.seek(start)
        self._empty, self._full = SimpleQueue[memoryview](), SimpleQueue["memoryview | None"]()
        for _ in range(BUFFERS):
            self._empty.put(memoryview(mmap.mmap(-1, BUFFER)))
        self._buffer, self._used = self._empty.get(), 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._empty_buffers, name="torchplug outflow")

    def __enter__(self) -> Outflow:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._full.put(None)
        self._thread.join()
        self._file.close()

    def write(self, tensor: Tensor, total: int) -> int:
        """Takes the bytes of a contiguous tensor on the CPU; returns their CRC-32, which begins with ``total``."""
        source, left = tensor.data_ptr(), tensor.nbytes
        while left:
            count = min(left, BUFFER - self._used)
            part = self._buffer[self._used : self._used + count]
            ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(part)), source, count)  # others may run meanwhile
            total = zlib.crc32(part, total)
            source, left, self._used = source + count, left - count, self._used + count
            if self._used == BUFFER:
                self._next()
        return total

    def finish(self, beginning: bytes) -> None:
        """Writes the first bytes of the file; all of it is with the system then."""
        self._next()
        self._full.put(None)
        self._thread.join()
        self._check()
        self._through_cache()
        self._file.seek(0)
        self._out(memoryview(beginning))

    def _next(self) -> None:
        self._check()
        self._full.put(self._buffer[: self._used])
        self._buffer, self._used = self._empty.get(), 0

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _empty_buffers(self) -> None:
        """What the other thread does."""
        for part in iter(self._full.get, None):
            try:
                if self._error is None:
                    self._out(part)
            except BaseException as error:  # for the thread that waits
                self._error = error
            self._empty.put(memoryview(part.obj))

    def _out(self, part: memoryview) -> None:
        """Writes all of ``part``. What cannot go past the cache goes through it, or fails there for the true reason."""
        if len(part) % BLOCK:
            self._through_cache()
        while part:
            try:
                part = part[self._file.write(part) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._past_cache:
                    raise
            if part:
                self._through_cache()

    def _through_cache(self) -> None:
        """From here on, bytes are written in the usual way."""
        if self._past_cache and hasattr(os, "O_DIRECT"):
            import fcntl

            fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT)
        self._past_cache = False


def _past_cache(path: str, flags: int) -> int:
    """Opens a file so that writes go past the cache, if this file system has that."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666)
