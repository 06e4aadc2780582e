"""Which files are kept: the books of one instance, plain logic that knows neither a run nor a disk."""

from __future__ import annotations

import bisect
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from torchplug_checkpoint.names import LAST

__all__ = ["Books", "Kept", "Save"]


@dataclass(frozen=True)
class Kept:
    """A file and what it is ranked by: the monitored value, or how many saves came before it."""

    name: str
    score: float


@dataclass(eq=False)
class Save:
    """A save that was decided.

    Args:
        name: The file.
        last: Whether the file of the newest checkpoint is written too (it may be ``name`` itself).
        reason: Why it is written.
        metrics: The monitored value by its name, if it has one.
        counted: Whether it is one of the saves of an undisturbed run; one for a signal is not, and leaves no trace in the books.
        behind: Whether training goes on while it is written.
        dropped: The files that lose their place to it.
        previous: What was the newest file before.
        at: Where the run stood when its state was taken: epoch, batch, step, micro step, and saves until then. None: not yet.
    """

    name: str
    last: bool
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)
    counted: bool = True
    behind: bool = False
    dropped: list[Kept] = field(default_factory=list)
    previous: str | None = None
    at: list[int] | None = None


class Books:
    """The files that are kept, the best first, and the saves that were decided and are not done yet.

    Every state that is saved holds the books as they are after the save that it belongs to, so that a run that goes on from
    it knows what was decided and can finish what was not done.

    Args:
        top_k: How many files are kept, -1 for all.
        sign: 1 where lower scores are better, -1 where higher ones are.
        ranked: Whether scores are values of a metric, so that there is a best.
    """

    def __init__(self, top_k: int, sign: int, ranked: bool) -> None:
        self.top_k, self.sign, self.ranked = top_k, sign, ranked
        self.protected: list[str] = []  # a run was resumed from them
        self.forget()

    def forget(self) -> None:
        """Nothing was saved yet."""
        self.kept: list[Kept] = []
        self.owed: list[Save] = []
        self.saves = 0
        self.newest: str | None = None
        self.at: list[int] | None = None  # where the run stood at the last save

    def place(self, score: float | None) -> int | None:
        """Where a file with this score would stand, None if it would not be kept; the earlier of equals stands first."""
        if score is None or self.top_k == 0:
            return None
        place = bisect.bisect_right([self.sign * kept.score for kept in self.kept], self.sign * score)
        return None if 0 < self.top_k <= place else place

    def enter(self, save: Save, place: int | None = None, score: float = 0.0) -> None:
        """Takes a save in, at ``place`` among those kept if it has one."""
        save.previous = self.newest
        if save.counted:
            self.newest = LAST if save.last else save.name
            self.saves += 1
        if place is not None:
            self.kept.insert(place, Kept(save.name, score))
            if self.top_k > 0:
                save.dropped = self.kept[self.top_k :]
                del self.kept[self.top_k :]
        self.owed.append(save)

    def cancel(self, save: Save) -> None:
        """Makes a save and all that were decided after it undone, the latest first."""
        while save in self.owed:
            last = self.owed.pop()
            if any(kept.name == last.name for kept in self.kept):
                self.kept = [kept for kept in self.kept if kept.name != last.name] + last.dropped
            self.saves -= last.counted
            self.newest = last.previous

    def gone(self, save: Save) -> list[str]:
        """The files that may be deleted once ``save`` is complete."""
        return [kept.name for kept in save.dropped if kept.name not in self.protected]

    def taken(self) -> set[str]:
        """Names that a new file must not have."""
        return {*(kept.name for kept in self.kept), *(save.name for save in self.owed), *self.protected}

    def lose(self, there: Collection[str]) -> list[str]:
        """Takes out what is not ``there`` any more and not owed either; returns it."""
        owed = {save.name for save in self.owed}
        lost = [kept.name for kept in self.kept if kept.name not in there and kept.name not in owed]
        self.kept = [kept for kept in self.kept if kept.name not in lost]
        return lost

    def state_dict(self) -> dict[str, Any]:
        """The books as plain values."""
        return {
            "kept": [asdict(kept) for kept in self.kept],
            "owed": [asdict(save) for save in self.owed],
            "saves": self.saves,
            "newest": self.newest,
            "protected": list(self.protected),
            "at": self.at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.kept = [Kept(**kept) for kept in state["kept"]]
        self.owed = [Save(**{**save, "dropped": [Kept(**kept) for kept in save["dropped"]]}) for save in state["owed"]]
        self.saves, self.newest, self.protected, self.at = state["saves"], state["newest"], list(state["protected"]), state["at"]
