"""From ``self.log`` to step values, epoch values and monitored values, without waiting for the device.

A logged value stays where it is until somebody needs a number: a logger at a logging step, the progress display, a
monitor. Epoch means are weighted by batch size and summed in float64 (float32 where the device has no more), `FOLD`
values at a time and on the CPU in the order in which they came, so that they equal the plain sum of a hand-written loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchplug.agreement import different
from torchplug.options import closest
from torchplug.series import FOLD, LogOptions, Series, read

if TYPE_CHECKING:
    from torchplug.agreement import Agreement
    from torchplug.run import Position

__all__ = ["Metrics", "MissingMetric", "Reading", "Results"]

REDUCTIONS = ("mean", "sum", "min", "max")


class MissingMetric(KeyError):
    """A metric that nobody logged; the message lists those that there are."""

    def __str__(self) -> str:
        return str(self.args[0])


class Results(dict[str, float]):
    """Metric values by name; a wrong name is answered with the names that there are."""

    def __missing__(self, name: str) -> float:
        raise MissingMetric(missing(name, self))


def missing(name: str, names: Any) -> str:
    """What is said of a metric that is not there."""
    there = ", ".join(sorted(names)) or "none"
    return f"no metric {name!r} was logged{closest(name, names)}; there are: {there}"


@dataclass(frozen=True)
class Reading:
    """A monitored value and when it was computed; ``serial`` grows with each new value of any metric."""

    value: float
    step: int
    epoch: int
    serial: int


@dataclass(slots=True)
class _Published:
    """The latest value under a name; a tensor until somebody reads it."""

    value: Tensor | float
    step: int
    epoch: int
    serial: int
    prog_bar: bool
    own: bool = False  # whether it is this rank's alone, so far


@dataclass
class _Pass:
    """What is logged during one pass over the data of a stage."""

    stage: str
    in_batches: bool = False  # between the first and the last batch: what is logged then is accumulated
    loader: int = 0
    loaders: int = 1
    by_loader: list[dict[str, Series]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_loader = [{} for _ in range(self.loaders)]


class Metrics:
    """All values of a run. The loop opens passes and asks for records; modules and plugins log and read.

    ``metrics["val_loss"]`` is the latest value as a float, ``fresh`` the way to monitor one.
    """

    def __init__(self, position: Position) -> None:
        self.position = position
        self.size = 0  # samples in the current batch
        self.stand_in = False  # whether the current batch only keeps this rank in step with the others, and does not count
        self.agreement: Agreement | None = None  # with the other ranks, where there are any
        self.complete = False  # every metric of the run had its chance: a missing one is a mistake
        self.validated = False  # those of validation had theirs
        self.names: dict[str, None] = {}  # whatever was recorded, in order of appearance
        self._published: dict[str, _Published] = {}
        self._unsent: dict[str, None] = {}
        self._serial = 0
        self._pass = _Pass("")
        self._series: dict[str, Series] = {}  # of the batches that are running; empty outside of batches
        self._frozen: dict[str, Any] | None = None
        self.frozen_sums: dict[str, Any] = {}  # of metric objects, by their path in the module

    # ------------------------------------------------------------------ logging

    def log(self, name: str, value: Any, options: LogOptions, enable_graph: bool = False, batch_size: int | None = None) -> None:
        """Records a value under a name; what the options mean is said by `torchplug.Module.log`."""
        series = self._series.get(name)
        if series is None or series.options != options:
            series = self._declare(name, value, options)
            if series is None:
                return
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"log({name!r}) takes one number, got a tensor of shape {tuple(value.shape)}; reduce it first")
            if not enable_graph:  # whatever it is may be changed in place afterwards (loss += penalty), so it is copied
                value = value.detach().clone()
        elif series.source is not None:
            series.unsent = series.touched = True
            return
        elif not isinstance(value, (int, float)):
            value = self._number(name, value)
        series.last = value
        series.unsent = True
        if series.on_epoch and not self.stand_in:
            size = self.size if batch_size is None else batch_size
            if batch_size is not None or (not size and series.reduce == "mean"):
                self._check_size(name, batch_size)
            series.pending.append(value)
            series.weights.append(size)
            if len(series.pending) == FOLD:
                series.fold()

    @staticmethod
    def _check_size(name: str, batch_size: Any) -> None:
        if batch_size is None:
            raise ValueError(f"log({name!r}): the size of the batch is not known; give batch_size=")
        if type(batch_size) is not int or batch_size < 0:
            raise ValueError(f"log({name!r}): batch_size must be an int from 0 on, got {batch_size!r}")

    def _declare(self, name: str, value: Any, options: LogOptions) -> Series | None:
        """The first ``log`` of a name: its arguments are checked once. None for a value that was dealt with at once."""
        prog_bar, logger, on_step, on_epoch, reduce_fx, _, rank_zero_only = options
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of a metric must be a text, got {name!r}")
        if not self._pass.in_batches:
            self._log_once(name, value, prog_bar, logger is not False, on_step, rank_zero_only)
            return None
        there = self._series.get(name)
        if there is not None and there.meets(value, options):
            return there
        if there is not None:
            raise ValueError(f"log({name!r}) was called with other arguments before; use another name, or the same arguments")
        if not callable(reduce_fx) and reduce_fx not in REDUCTIONS:
            raise ValueError(f"log({name!r}): reduce_fx must be one of {', '.join(REDUCTIONS)} or a function, got {reduce_fx!r}")
        training = self._pass.stage == "train"
        on_step = training if on_step is None else on_step
        on_epoch = (not training) if on_epoch is None else on_epoch
        if not on_step and not on_epoch:
            raise ValueError(f"log({name!r}): on_step and on_epoch are both False, so nothing would be recorded")
        series = Series(name, options, on_step, on_epoch)
        if hasattr(value, "compute") and hasattr(value, "reset"):
            series.source = value
        self._series[name] = series
        return series

    @staticmethod
    def _number(name: str, value: Any) -> float:
        if isinstance(value, Real):  # such as NumPy's scalars
            return float(value)
        raise TypeError(f"log({name!r}) takes a number, a tensor with one element or a metric object, got {type(value).__name__} {value!r}")

    def _log_once(self, name: str, value: Any, prog_bar: bool, logger: bool, on_step: bool | None, rank_zero_only: bool) -> None:
        """A value logged outside of batches is what it is, at once."""
        if on_step:
            raise ValueError(f"log({name!r}): on_step=True has no meaning outside of batches; leave it out")
        if hasattr(value, "compute") and hasattr(value, "reset"):
            source = value
            value = source.compute()
            source.reset()
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"log({name!r}) takes one number, got a tensor of shape {tuple(value.shape)}; reduce it first")
            value = value.detach().clone()
        elif not isinstance(value, (int, float)):
            value = self._number(name, value)
        self._publish(name, value, prog_bar, logger, own=self.agreement is not None and not rank_zero_only)

    def _publish(self, name: str, value: Tensor | float, prog_bar: bool = False, logger: bool = True, own: bool = False) -> None:
        self._serial += 1
        self._published[name] = _Published(value, self.position.step, self.position.epoch, self._serial, prog_bar, own)
        if logger:
            self._unsent[name] = None

    # ------------------------------------------------------------------ passes, driven by the loop

    @contextmanager
    def open(self, stage: str, loaders: int = 1) -> Iterator[None]:
        """A pass over the data of ``stage`` inside whatever pass is open; the outer one goes on afterwards."""
        outer, size, stand_in, self.stand_in = self._pass, self.size, self.stand_in, False
        self._pass = _Pass(stage, loaders=loaders)
        self._series = {}
        whole = False
        try:
            yield
            whole = stage != "sanity"
        finally:
            if not whole:
                self._forget()
            self._pass, self.size, self.stand_in = outer, size, stand_in
            self._series = outer.by_loader[outer.loader] if outer.in_batches else {}

    def state_dict(self, objects: Mapping[str, Any], over: bool) -> dict[str, Any]:
        """All values, what the epoch has added up so far, and which of them loggers have not got yet."""
        if self._frozen is not None:
            return self._frozen
        published = {name: [e.value, e.step, e.epoch, e.serial, e.prog_bar] for name, e in self._published.items()}
        train = self._pass.by_loader[0] if self._pass.stage == "train" else {}
        return {
            "published": published, "unsent": list(self._unsent), "names": list(self.names), "serial": self._serial,
            "complete": self.complete, "validated": self.validated, "series": [each.state_dict(objects, over) for each in train.values()],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], device: torch.device, objects: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave; inside of the pass over the training data, its sums too."""
        self._published = {name: _Published(*entry) for name, entry in state["published"].items()}
        self._unsent, self.names = dict.fromkeys(state["unsent"]), dict.fromkeys(state["names"])
        self._serial, self.complete, self.validated = state["serial"], state["complete"], state["validated"]
        if self._pass.stage == "train":
            self._pass.by_loader[0] = {each["name"]: Series.of(each, device, objects) for each in state["series"]}

    def freeze(self, objects: Mapping[str, Any]) -> None:
        """Training ends in the middle of an epoch: `state_dict` stays what it is now, whatever is still concluded from it."""
        self._frozen = self.state_dict(objects, over=False)

    def batches(self, loader: int = 0) -> None:
        """Batches of a loader begin: what is logged from now on is accumulated."""
        self._pass.in_batches = True
        self._pass.loader = loader
        self._series = self._pass.by_loader[loader]

    def finish(self) -> list[Results]:
        """Batches are over: epoch values are published and returned, one dict for each loader."""
        if self.agreement is not None:
            self._join(self.agreement)
        self._pass.in_batches = self.stand_in = False
        self._series = {}
        results = []
        for loader, series in enumerate(self._pass.by_loader):
            values: dict[str, Tensor | float] = {}
            for each in series.values():
                if each.on_step and each.last is not None:  # for monitors, once: it gets stale with the epoch
                    self._publish(each.named("_step", loader, self._pass.loaders), each.last, each.prog_bar, logger=False)
                    each.last = None
                if not each.on_epoch:
                    if each.source is not None:
                        each.source.reset()
                        each.touched = each.unsent = False
                    continue
                value = each.result()
                if value is None:
                    continue
                name, sent = each.named("_epoch", loader, self._pass.loaders), each.logger is not False
                self._publish(name, value, each.prog_bar and not each.fork, sent)
                if each.fork:  # loggers get the names with suffixes, monitors find the plain one too
                    self._publish(each.named("", loader, self._pass.loaders), value, each.prog_bar, logger=False)
                values[name] = value
            results.append(Results(zip(values, read(list(values.values())), strict=True)))
        return results

    @staticmethod
    def complete_results(results: list[Results], values: dict[str, float]) -> list[Results]:
        """``results`` with the values that were logged at the end of the pass, which belong to every loader."""
        known = {name for each in results for name in each}
        names = [name for name in values if name not in known]
        return [Results({**each, **{name: values[name] for name in names}}) for each in results]

    def _join(self, agreement: Agreement) -> None:
        """The epoch values of all ranks take the place of this rank's own.

        Raises:
            RuntimeError: ranks that had batches logged different metrics.
        """
        for series in self._pass.by_loader:
            mine = {name: {**each.part(), "size": self._weight()} for name, each in series.items() if not each.alone}
            parts = agreement.gather(mine)
            filled = [part for part in parts if part]
            if any(part.keys() != filled[0].keys() for part in filled):
                raise RuntimeError(different([set(part) for part in parts]))
            for name, part in filled[0].items() if filled else ():
                if part["object"] and len(filled) < len(parts):
                    raise RuntimeError(f"log({name!r}): a metric object needs a batch on every rank; {len(parts) - len(filled)} had none")
                if name not in series:
                    series[name] = Series(name, tuple(part["options"]), part["on_step"], part["on_epoch"])
                series[name].join([part[name] for part in filled])

    def step_record(self, together: bool = False) -> dict[str, float]:
        """The step values logged since the last record, read from the device together; they are published too.

        Args:
            together: whether all ranks are here, so that the values become those of all of them.
        """
        open_pass, found = self._pass, list[tuple[str, Any, Series]]()
        for series in open_pass.by_loader[open_pass.loader].values():
            if not series.on_step or not series.unsent:
                continue
            name = series.named("_step", open_pass.loader, open_pass.loaders)
            value = series.source.compute() if series.source is not None else series.last
            if value is None:  # the epoch is over, and published it
                if name not in self._published:  # a metric object that was not logged again since a resume
                    continue
                value = self._published[name].value
            series.unsent = False
            found.append((name, value, series))
        values = [value for _, value, _ in found]
        if together and self.agreement is not None:
            shared = [i for i, (_, _, series) in enumerate(found) if not series.alone]  # what rank 0 alone logs stays its own
            means = self._mean([found[i][0] for i in shared], [values[i] for i in shared])
            for i, mean in zip(shared, means, strict=True):
                values[i] = mean
        for (name, _, series), value in zip(found, values, strict=True):
            self._publish(name, value, False, series.logger is not False)
        return self._sent()

    def _mean(self, names: list[str], values: list[Any]) -> list[float]:
        """What the ranks have on average, each with the weight of its batch."""
        assert self.agreement is not None
        return self.agreement.values(names, read(values), [self._weight()] * len(names))

    def _weight(self) -> float:
        """That of the latest batch."""
        return 0.0 if self.stand_in else float(self.size or 1)

    def record(self) -> dict[str, float]:
        """What was published and not yet handed to loggers. All ranks are here."""
        self._settle()
        return self._sent()

    def _settle(self) -> None:
        """What ranks logged outside of batches, each for itself, becomes the mean of them."""
        if self.agreement is None:
            return
        own = {name: entry for name, entry in self._published.items() if entry.own}
        parts = self.agreement.gather(dict(zip(own, read([entry.value for entry in own.values()]), strict=True)))
        if any(part.keys() != parts[0].keys() for part in parts):
            raise RuntimeError(different([set(part) for part in parts]))
        for name, entry in own.items():
            entry.value, entry.own = math.fsum(part[name] for part in parts) / len(parts), False

    def _sent(self) -> dict[str, float]:
        names = list(self._unsent)
        self._unsent.clear()
        values = read([self._published[name].value for name in names])
        for name, value in zip(names, values, strict=True):
            self._published[name].value = value
        self.names.update(dict.fromkeys(names))
        return dict(zip(names, values, strict=True))

    def _forget(self) -> None:
        """Nothing of a sanity check, or of a pass that was broken off, stays."""
        for series in self._pass.by_loader:
            for each in series.values():
                if each.source is not None:
                    each.source.reset()

    def remembered(self) -> Callable[[], None]:
        """What makes everything that is published from now on forgotten."""
        before = dict(self._published), dict(self._unsent), dict(self.names), self._serial

        def put_back() -> None:
            self._published, self._unsent, self.names, self._serial = before

        return put_back

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Whatever is published inside is forgotten afterwards."""
        put_back = self.remembered()
        try:
            yield
        finally:
            put_back()

    # ------------------------------------------------------------------ reading

    def __getitem__(self, name: str) -> float:
        if name not in self._published:
            raise MissingMetric(missing(name, self._published))
        entry = self._published[name]
        entry.value = float(entry.value)
        return entry.value

    def __contains__(self, name: object) -> bool:
        return name in self._published

    def results(self) -> Results:
        """The latest value of every metric."""
        values = read([entry.value for entry in self._published.values()])
        return Results(zip(self._published, values, strict=True))

    def fresh(self, name: str, seen: int = -1) -> Reading | None:
        """The value of a monitored metric if there is one newer than the reading with serial ``seen``.

        None means wait: it has not been computed yet, or not again since then.

        Raises:
            MissingMetric: every metric of the run had its chance, and nobody logged this one.
        """
        entry = self._published.get(name)
        if entry is not None and entry.own:  # whoever acts on it does so on all ranks
            self._settle()
        if entry is None:
            if self.complete:
                raise MissingMetric(missing(name, self._published))
            return None
        if entry.serial <= seen:
            return None
        return Reading(self[name], entry.step, entry.epoch, entry.serial)

    def progress(self) -> dict[str, float]:
        """What was logged with ``prog_bar=True``, read from the device now: call it as seldom as a person looks."""
        values: dict[str, Any] = {}
        for series in self._pass.by_loader[self._pass.loader].values():
            if series.prog_bar and series.on_step and series.source is None and series.last is not None:
                values[series.named("_step", self._pass.loader, self._pass.loaders)] = series.last
        for name, entry in self._published.items():
            if entry.prog_bar:
                values.setdefault(name, entry.value)
        return dict(zip(values, read(list(values.values())), strict=True))
