"""Who was at fault: found from frames only when something went wrong, so that it costs nothing until then."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchplug.members import Member
    from torchplug.run import Run

__all__ = ["add_note", "also", "blame", "caller", "note_place"]

logger = logging.getLogger("torchplug")


def add_note(error: BaseException, text: str) -> None:
    """Adds a line to what is printed with ``error``; Python 3.10, which prints no notes, gets it as a log line."""
    if sys.version_info >= (3, 11):
        error.add_note(text)
    else:
        setattr(error, "__notes__", [*getattr(error, "__notes__", []), text])  # noqa: B010
        logger.error("%s: %s", type(error).__name__, text)


def also(first: BaseException, later: BaseException) -> None:
    """Groups a later error under the first one, with its traceback, so that it neither replaces it nor is lost."""
    if later is first:
        return
    text = "".join(traceback.format_exception(type(later), later, later.__traceback__)).rstrip()
    add_note(first, "while this error was handled, another one came up:\n" + text)


def _culprit(frames: Iterable[FrameType], members: Iterable[Member]) -> tuple[Member, str] | None:
    """The member whose hook is in the first of ``frames`` that belongs to a hook."""
    by_code: dict[object, list[tuple[Member, str]]] = {}
    for member in members:
        if member.kind == "core":  # it only calls what is the user's
            continue
        for code, hook in member.codes.items():
            by_code.setdefault(code, []).append((member, hook))
    for frame in frames:
        for member, hook in by_code.get(frame.f_code, []):
            if frame.f_locals.get(frame.f_code.co_varnames[0]) is member.plugin:
                return member, hook
    return None


def blame(error: BaseException, members: Iterable[Member], rank: int) -> None:
    """Notes on ``error`` the plugin, package, version, hook and rank it came from, if it came from a hook."""
    if isinstance(error, KeyboardInterrupt) or any(note.startswith("raised by ") for note in getattr(error, "__notes__", [])):
        return  # whoever was running when Ctrl-C came has done nothing
    members = list(members)
    if unsafe := re.match(r"plugins\.([^.[ ]+).* cannot be saved: ", str(error)):  # torchplug.codec says where a value stands
        label = next((member.label for member in members if member.name == unsafe[1]), f"plugin {unsafe[1]!r}")
        add_note(error, f"raised by {label} in state_dict, rank {rank}")  # whoever wrote it down has done nothing
        return
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = _culprit(reversed(frames), members)
    if found is not None:
        member, hook = found
        add_note(error, f"raised by {member.label} in {hook}, rank {rank}")


def note_place(error: BaseException, run: Run) -> None:
    """Notes on ``error`` where the run stood, once."""
    if not any(note.startswith("while in stage ") for note in getattr(error, "__notes__", [])):
        where = run.position
        add_note(error, f"while in stage {where.stage or run.work}: epoch {where.epoch}, batch {where.batch}, step {where.step}")


def caller(members: Iterable[Member]) -> str:
    """The name of the plugin whose hook is running now, empty outside of hooks."""

    def up() -> Iterator[FrameType]:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            yield frame
            frame = frame.f_back

    found = _culprit(up(), members)
    return found[0].name if found else ""
