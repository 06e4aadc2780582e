"""How a save is carried out: put off to the next boundary, written now or behind training, told when it is complete."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchplug import Run
from torchplug.sharded import local
from torchplug_checkpoint.books import Books, Save
from torchplug_checkpoint.names import LAST, SUFFIX, emergency
from torchplug_checkpoint.store import Store
from torchplug_checkpoint.writer import HostCopy, Writer

__all__ = ["Saver"]


@dataclass(eq=False)
class Saver:
    """The files of one instance in one run.

    A file is written in this order, so that a process may end anywhere in between: the newest checkpoint (to a temporary name,
    then renamed), its second name, then what lost its place is deleted. What a state says is owed is finished by the run that
    goes on from it.

    Of several ranks the first one alone touches the folder. What it finds there, and what went wrong, all others learn, so that
    each of them has the same books, and takes part in the same states of the run.

    Args:
        name: The instance's name, which keys its state.
        books: What is kept.
        store: Where.
        own: Whether the folder is the run's own, so that all names in it are ours.
        writer: The thread that all instances of the run share.
        weights_only: Whether a file holds just what it takes to use the module.
        leads: Whether the best of this instance is the best of the run.
        why_gone: What is told of a file that lost its place.
        now: The clock of the run, in seconds.
    """

    name: str
    books: Books
    store: Store
    own: bool
    writer: Callable[[], Writer]
    weights_only: bool
    leads: bool
    why_gone: str
    now: Callable[[], float]

    best_path: Path | str | None = None
    best_score: float | None = None
    last_path: Path | str | None = None
    clock: float = field(init=False)  # when the last save was

    def __post_init__(self) -> None:
        self._copy = HostCopy()
        self.clock = self.now()
        self._job: tuple[Save, Future[Any] | None] | None = None  # what is being written; the writer's part is that of rank 0
        self._saved: tuple[int, list[Tensor]] | None = None  # tells what was saved last

    def __getstate__(self) -> dict[str, Any]:
        """What a process that did not do the run gets to see of it."""
        return {name: getattr(self, name) for name in ("best_path", "best_score", "last_path")}

    def decided(self, run: Run, make: Callable[[], Any]) -> Any:
        """What ``make`` gives on rank 0, on all ranks; its error is one on all of them. After an error in a run each is alone."""
        if run.agreement is not None:
            return run.from_rank_0(make)
        return make() if run.rank == 0 else None

    # ------------------------------------------------------------------ a save, from the decision to the announcement

    def put_off(self, run: Run, save: Save, place: int | None = None, score: float = 0.0) -> None:
        """Enters a save into the books now, so that every file that is written at the next boundary has it in them."""
        self.books.enter(save, place, score)
        run.at_boundary(partial(self._write, run, save))

    def _write(self, run: Run, save: Save) -> None:
        """The state of the run is whole: takes it, and writes it or has it written."""
        self.settle(run)
        try:
            self._take(run, save)
            state = self._state(run)
            jobs: list[Future[Any]] = []

            def write() -> None:
                gone = self.books.gone(save)
                if save.behind:
                    jobs.append(self.writer().submit(partial(self._put, run, save, self._copy.take(state), gone, self._copy)))
                else:
                    self.writer().drain()
                    self._put(run, save, state, gone)

            self._in_turn(run, write)
        except BaseException:
            self._saved = None
            self.books.cancel(save)
            raise
        if save.behind:
            self._job = save, jobs[0] if jobs else None
            return
        self.clock = self.now()
        self._finish(run, save)

    def _in_turn(self, run: Run, write: Callable[[], Any]) -> None:
        """Rank 0 writes, or all ranks together; then an error is that of rank 0, which all of them have."""
        if run.together and run.rank:
            with suppress(Exception):
                write()
        self.decided(run, write)

    def _take(self, run: Run, save: Save) -> None:
        """Notes where the run stands; this is a part of the state that is taken next."""
        self._saved, self.clock = _fingerprint(run), self.now()
        self._note(save, self._where(run))

    def _note(self, save: Save, at: list[int]) -> None:
        save.at = at
        if save.counted:
            self.books.at = at

    def _state(self, run: Run) -> dict[str, Any]:
        state = run.state(weights_only=self.weights_only)
        if self.weights_only:  # the books all the same: they say which file is the best
            state["plugins"] = {self.name: run.plugins[self.name].state_dict()}
        return state

    def _put(self, run: Run, save: Save, state: dict[str, Any], gone: list[str], copy: HostCopy | None = None) -> None:
        """Everything that one save does to the folder, in this thread or that of the writer."""
        if copy is not None:
            copy.ready()
        run.hooks.save_checkpoint(run, self.store.path(LAST if save.last else save.name), state)
        if run.rank:  # it wrote its part
            return
        if save.last and save.name != LAST:
            self.store.copy(LAST, save.name)
        for name in gone:
            self.store.remove(name)

    def settle(self, run: Run) -> None:
        """Waits for the write that is in flight and tells what came of it.

        Raises:
            Exception: what went wrong in the thread; the books are what they were before.
        """
        if self._job is None:
            return
        save, future = self._job
        if run.rank and future is not None:
            future.exception()  # rank 0 has the same error
        try:
            self.decided(run, lambda: None if future is None else future.result())
        except Exception:
            self._job = None
            self.books.cancel(save)
            raise
        self._job = None
        if run.rank == 0 or run.agreement is not None:
            self._finish(run, save)

    def check(self, run: Run) -> None:
        """Raises the error of a write that has failed; one that is still going on is left alone. All ranks are here."""
        if self._job is None:
            return
        future = self._job[1]
        if self.decided(run, lambda: future is not None and future.done() and future.exception() is not None):
            self.settle(run)

    def _finish(self, run: Run, save: Save) -> None:
        """The files are complete: everybody is told."""
        self.books.owed.remove(save)
        self._show(run, save)
        run.hooks.on_checkpoint_saved(run, self.store.path(save.name), save.metrics, save.reason)
        for name in self.books.gone(save):
            run.hooks.on_checkpoint_removed(run, self.store.path(name), self.why_gone)

    def _show(self, run: Run, save: Save | None = None) -> None:
        """What the user sees is what is complete, ``save`` as the newest. This is never called while a file is written."""
        if save is not None:
            self.last_path = self.store.path(LAST if save.last else save.name)
        hidden = {save.name for save in self.books.owed if self._job is None or save is not self._job[0]}
        best = next((kept for kept in self.books.kept if kept.name not in hidden), None) if self.books.ranked else None
        self.best_path, self.best_score = (None, None) if best is None else (self.store.path(best.name), best.score)
        run.last_path = self.last_path
        if self.leads:
            run.best_path = self.best_path

    def close(self, run: Run) -> None:
        """The run is over, in whatever way: what was decided and never came to a boundary is forgotten, the rest is finished."""
        for save in list(self.books.owed):
            if save.at is None:
                self.books.cancel(save)
        self.settle(run)

    def release(self) -> None:
        """Gives the host memory back."""
        self._copy, self._saved = HostCopy(), None

    # ------------------------------------------------------------------ names

    def free(self, run: Run, stem: str, replace: bool = True) -> str:
        """A name for a new file. In the run's own folder all names are ours, elsewhere those of files that this run wrote."""
        there = set() if self.own and replace else self.store.names()
        name, version, taken = f"{stem}{SUFFIX}", 0, self.books.taken()
        while name == LAST or name in taken or (name in there and not (replace and self._ours(run, name))):
            version += 1
            name = f"{stem}-v{version}{SUFFIX}"
        return name

    def keep_foreign(self, run: Run) -> None:
        """A `last` that another run left in the folder gets another name, because it is not ours to write over."""
        if self.own or self.books.newest is not None or LAST not in self.store.names() or self._ours(run, LAST):
            return
        other = self.free(run, LAST.removesuffix(SUFFIX), replace=False)
        self.store.rename(LAST, other)
        run.say_once(f"plugin {self.name!r}: {self.store.path(LAST)} was there before this run, it is {other} now", logging.INFO)

    def _ours(self, run: Run, name: str) -> bool:
        """Whether this run wrote the file."""
        header = self.store.header(name)
        return header is not None and header["run"]["id"] == run.id

    # ------------------------------------------------------------------ a run that goes on

    def reconcile(self, run: Run) -> None:
        """Makes the folder, and compares the books that were loaded with it."""
        books = self.books
        source = None if run.resumed is None else self.store.name_of(run.resumed)
        if source is not None and source != LAST and source not in books.protected:
            books.protected.append(source)
        there, others = self.decided(run, partial(self._look, run, source))
        if others:  # only a part of a checkpoint was taken over: this is another run
            books.forget()
        lost = books.lose(there)
        if lost:
            run.say_once(f"plugin {self.name!r}: not in {self.store.place} any more, so no longer ranked: {', '.join(lost)}")
        newest = next((name for name in (books.newest, source) if name in there), None)
        self.last_path = None if newest is None else self.store.path(newest)
        self._show(run)

    def _look(self, run: Run, source: str | None) -> tuple[list[str], bool]:
        """Which of the files that matter are there, and whether those that are kept are another run's."""
        self.store.prepare(run)
        there, kept = self.store.names(), [kept.name for kept in self.books.kept]
        mine = [name for name in kept if name in there]
        header = self.store.header(mine[0]) if mine else None
        found = [name for name in (*kept, self.books.newest, source) if name is not None and name in there]
        return found, header is not None and header["run"]["id"] != run.id

    def finish_owed(self, run: Run) -> None:
        """Does what the process that is gone had decided and not done; it is called where the state is that of then."""
        here = self._where(run)
        for save in list(self.books.owed):
            self._note(save, save.at or here)
            if self.decided(run, partial(self._must_write, run, save, here)):
                if save.at != here:
                    self.books.cancel(save)
                    self.books.lose(self.decided(run, self.store.names))
                    run.say_once(f"plugin {self.name!r}: {save.name} was being written when the process ended, and is lost")
                    break
                write = partial(self._put, run, save, self._state(run), [])
                self._in_turn(run, write)
            self.decided(run, partial(self._clear, run, self.books.gone(save)))
            if save.behind and save is self.books.owed[-1]:  # it is told when it would have been told
                done: Future[Any] = Future()
                done.set_result(None)
                self._job = save, done
                self._show(run, save)
            else:
                self._finish(run, save)
        if self.books.at is not None and self.books.at[3] == run.position.micro_step:
            self._saved = _fingerprint(run)

    def _must_write(self, run: Run, save: Save, here: list[int]) -> bool:
        """Makes the files of a save complete, if one of them is there; whether none is."""
        at = save.at or here
        last, named = not save.last or self._is(run, LAST, at), self._is(run, save.name, at)
        if last and named:
            return False
        if save.last and last:
            self.store.copy(LAST, save.name)
        elif save.last and named:
            self.store.copy(save.name, LAST)
        else:
            return True
        return False

    def _clear(self, run: Run, gone: list[str]) -> None:
        for name in gone:
            if self._before_now(run, name):
                self.store.remove(name)

    def _is(self, run: Run, name: str, at: list[int]) -> bool:
        """Whether a file holds the state of the moment ``at`` of this run."""
        header = self.store.header(name)
        if header is None or header["run"]["id"] != run.id:
            return False
        saves = header.get("plugins", {}).get(self.name, {}).get("saves", at[4])
        return [*(header["position"][part] for part in ("epoch", "batch", "step", "micro_step")), saves] == at

    def _before_now(self, run: Run, name: str) -> bool:
        """Whether a file is from this run's past, not from a future that was given up when it was resumed."""
        header = self.store.header(name)
        return header is not None and header["run"]["id"] == run.id and header["position"]["micro_step"] <= run.position.micro_step

    def _where(self, run: Run) -> list[int]:
        return [run.position.epoch, run.position.batch, run.position.step, run.position.micro_step, self.books.saves]

    # ------------------------------------------------------------------ out of order

    def holds(self, run: Run) -> bool:
        """Whether the present state is the one that was saved last."""
        held = False
        if self._saved is not None:
            (batches, values), now = self._saved, _fingerprint(run)
            held = batches == now[0] and all(map(torch.equal, values, now[1]))
        return held if run.agreement is None else all(run.agreement.gather(held))

    def emergency(self, run: Run, exception: BaseException) -> None:
        """Writes the state in which an error left the run, apart from everything else. Other ranks have no part in it."""
        name = self.free(run, emergency(run), replace=False)
        state = {**self._state(run), "emergency": f"{type(exception).__name__}: {exception}"}
        run.hooks.save_checkpoint(run, self.store.path(name), state)
        run.hooks.on_checkpoint_saved(run, self.store.path(name), {}, "emergency")
        run.say_once(f"plugin {self.name!r}: the state in which the error left the run is in {self.store.path(name)}")


def _fingerprint(run: Run) -> tuple[int, list[Tensor]]:
    """Tells one state of training from another: batches seen, and up to about a thousand values of each tensor of the module.

    A plugin may change the module when training has ended (averaged weights), and the newest checkpoint must have that.
    """
    tensors = (*run.module.parameters(), *run.module.buffers())
    own = [local(each.detach()).reshape(-1) for each in tensors]
    return run.position.micro_step, [each[:: 1 + each.numel() // 1000].clone() for each in own]
