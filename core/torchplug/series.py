"""One logged name during one pass over the data: its values are added up where they are, and read when somebody needs a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["FOLD", "LogOptions", "Series", "joined", "read"]

FOLD = 128
FUNCTION = "a function"  # what a checkpoint knows of one that reduces

LogOptions = tuple[bool, bool | None, bool | None, bool | None, Any, bool, bool]
"""prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx, rank_zero_only"""


class Series:
    """One logged name during one pass over the data."""

    __slots__ = (
        "alone", "everything", "fork", "last", "logger", "name", "on_epoch", "on_step", "options", "pending", "prog_bar",
        "reduce", "source", "total", "touched", "unsent", "weight", "weights",
    )  # fmt: skip

    def __init__(self, name: str, options: LogOptions, on_step: bool, on_epoch: bool) -> None:
        self.name, self.options, self.on_step, self.on_epoch = name, options, on_step, on_epoch
        self.prog_bar, self.logger, self.reduce, self.alone = options[0], options[1], options[4], options[6]
        self.fork = on_step and on_epoch
        self.last: Any = None
        self.unsent = False  # whether there is a step value that no logger got
        self.touched = False  # whether a metric object was logged since it was computed
        self.pending: list[Any] = []
        self.weights: list[int] = []
        self.total: Tensor | None = None
        self.weight = 0
        self.everything: list[Tensor] = []
        self.source: Any = None  # an object with update / compute / reset

    def named(self, kind: str, loader: int, loaders: int) -> str:
        """The name under which a value is published: with its kind if there are two, and its loader if there are several."""
        name = self.name + (kind if self.fork else "")
        return f"{name}/dataloader_idx_{loader}" if loaders > 1 and self.options[5] else name

    def fold(self) -> None:
        """Adds the pending values to the total."""
        try:
            values = torch.stack(self.pending).flatten()
        except (TypeError, RuntimeError):  # numbers among the tensors, or several shapes, types or devices
            tensors = [_tensor(value) for value in self.pending]
            values = torch.stack([_wide(tensor.to(tensors[-1].device)) for tensor in tensors])
        values = _wide(values)
        if callable(self.reduce):
            self.everything.append(values)
        elif self.reduce in ("min", "max"):
            if self.total is not None:
                values = torch.cat((self.total.view(1), values))
            self.total = values.min() if self.reduce == "min" else values.max()
        else:
            if self.reduce == "mean":
                weights = torch.tensor(self.weights, dtype=values.dtype)
                values = values * weights.to(values.device, non_blocking=True)  # made on a device, it would be waited for
                self.weight += sum(self.weights)
            if self.total is not None:
                values = torch.cat((self.total.view(1), values))
            # cumsum adds in order on the CPU; elsewhere it is not deterministic, and sum is
            self.total = values.cumsum(0)[-1] if values.device.type == "cpu" else values.sum()
        self.pending.clear()
        self.weights.clear()

    def state_dict(self, objects: Mapping[str, Any], over: bool) -> dict[str, Any]:
        """What was logged and not yet reduced; adding it up first changes no bit of the result. Of a metric object it is where it
        is found among ``objects``; of a function that reduces, what it comes to if the epoch's batches are ``over``."""
        if self.pending:
            self.fold()
        names = ("name", "on_epoch", "on_step", "last", "unsent", "touched", "total", "weight", "everything")
        options = [*self.options[:4], self.reduce if isinstance(self.reduce, str) else FUNCTION, *self.options[5:]]
        found = next((path for path, each in objects.items() if each is self.source), "")
        values = {name: getattr(self, name) for name in names}
        if over and callable(self.reduce) and self.everything:  # nothing is logged any more that would bring the function
            values["total"] = _tensor(self.reduce(torch.cat(self.everything)))
        return {"options": options, "object": None if self.source is None else found, **values}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device, objects: Mapping[str, Any]) -> Series:
        """The series that a `state_dict` was taken of. Its options are a list, which equals no options of ``log``, if the next
        ``log`` has to bring the metric object, or the function that reduces."""
        source = objects.get(state["object"])
        waits = (state["object"] is not None and source is None) or state["options"][4] == FUNCTION
        series = cls(state["name"], state["options"] if waits else tuple(state["options"]), state["on_step"], state["on_epoch"])
        series.source = source
        for name in ("last", "unsent", "touched", "weight"):
            setattr(series, name, state[name])
        series.total = None if state["total"] is None else state["total"].to(device)
        series.everything = [values.to(device) for values in state["everything"]]
        return series

    def meets(self, value: Any, options: LogOptions) -> bool:
        """Whether ``log`` with these arguments brings what a series from a checkpoint waits for."""
        known: Any = [*options[:4], FUNCTION if callable(options[4]) else options[4], *options[5:]]
        if self.options != known:
            return False
        self.options, self.reduce = options, options[4]
        if hasattr(value, "compute") and hasattr(value, "reset"):
            self.source = value
        return True

    def part(self) -> dict[str, Any]:
        """What this rank adds to the epoch value of all ranks, as plain numbers; of a metric object nothing but that it is one."""
        if self.pending:
            self.fold()
        total = None if self.total is None else self.total.item()
        everything = torch.cat(self.everything).tolist() if self.everything else []
        last = None if self.last is None else float(self.last)
        known = {"options": (*self.options[:4], FUNCTION if callable(self.reduce) else self.reduce, *self.options[5:])}
        kinds = {"on_step": self.on_step, "on_epoch": self.on_epoch, "object": self.source is not None}
        return {**known, **kinds, "total": total, "weight": self.weight, "everything": everything, "last": last}

    def join(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Takes the `part` of each rank in place of the own one."""
        totals = [part["total"] for part in parts if part["total"] is not None]
        last = [(part["last"], part.get("size", 1.0)) for part in parts if part["last"] is not None and part.get("size", 1.0)]
        self.last = sum(value * size for value, size in last) / sum(size for _, size in last) if last else None
        self.everything = [torch.tensor(part["everything"], dtype=torch.float64) for part in parts if part["everything"]]
        self.weight = sum(part["weight"] for part in parts)
        if totals:
            combined = {"min": min, "max": max}.get(self.reduce, sum)(totals)
            self.total = torch.tensor(combined, dtype=torch.float64)

    def result(self) -> Tensor | float | None:
        """The epoch value, None if nothing was logged. Begins anew."""
        if self.source is not None:
            if not self.touched:
                return None
            self.touched = False
            value: Any = self.source.compute()
            self.source.reset()
            return value.detach() if isinstance(value, Tensor) else float(value)
        if self.pending:
            self.fold()
        total, weight, everything = self.total, self.weight, self.everything
        self.total, self.weight, self.everything = None, 0, []
        if callable(self.reduce):
            return self.reduce(torch.cat(everything)) if everything else None
        if total is None:
            return None
        return total / weight if self.reduce == "mean" else total


def joined(ranks: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The states of the series of several ranks as those of one."""
    states = {each["name"]: dict(each) for own in reversed(ranks) for each in own}
    for name, state in states.items():
        series = Series.of(state, torch.device("cpu"), {})
        series.join([Series.of(each, torch.device("cpu"), {}).part() for own in ranks for each in own if each["name"] == name])
        for field in ("last", "total", "weight", "everything"):
            state[field] = getattr(series, field)
    return list(states.values())


def _tensor(value: Any) -> Tensor:
    return value.reshape(()) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _wide(tensor: Tensor) -> Tensor:
    """``tensor`` in the widest floating-point type that its device has."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def read(values: Sequence[Tensor | float]) -> list[float]:
    """Numbers as floats; tensors of one device come back in one transfer."""
    result = [value if isinstance(value, Tensor) else float(value) for value in values]
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(result):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(i)
    for places in by_device.values():
        numbers = torch.stack([_wide(_tensor(result[i]).detach()) for i in places]).tolist()
        for i, number in zip(places, numbers, strict=True):
            result[i] = number
    return result  # type: ignore[return-value]
