"""Prints a table of the model when a fit starts: layers, parameters, sizes and, for an example input, shapes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchplug import Run, hookimpl, preserved

__all__ = ["Summary"]

WIDTH = 120  # columns where there is no terminal; a wider table takes what it needs


@dataclass
class _Count:
    """Parameters of a module, each counted once, and the bytes of its parameters and buffers."""

    total: int = 0
    trainable: int = 0
    size: int = 0
    lazy: int = 0  # parameters without a shape so far

    @classmethod
    def of(cls, parameters: Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> _Count:
        count = cls()
        for parameter in parameters:
            if is_lazy(parameter):
                count.lazy += 1
                continue
            count.total += parameter.numel()
            count.trainable += parameter.numel() * parameter.requires_grad
            count.size += parameter.numel() * parameter.element_size()
        count.size += sum(buffer.numel() * buffer.element_size() for buffer in buffers if not is_lazy(buffer))
        return count

    def cells(self) -> tuple[str, str, str]:
        """Parameters, trainable ones and MB, as the table shows them."""
        if self.lazy and not self.total:
            return "uninitialized", "uninitialized", "?"
        more = " + uninitialized" if self.lazy else ""
        return _short(self.total) + more, _short(self.trainable) + more, f"{self.size / 1e6:.3f}"


@dataclass
class _Layer:
    """One row of the table."""

    name: str
    type: str
    count: _Count
    input: str = ""
    output: str = ""


@dataclass(kw_only=True, eq=False)
class Summary:
    """Prints a table of the module's layers when a fit starts, to stderr.

    With ``example_input_array`` set in the module, the shapes that each layer takes and gives are found in one forward
    pass that leaves no trace.

    Args:
        max_depth: Levels of nested layers to show: 1 for the module's own attributes, -1 for all, 0 for the totals alone.
    """

    max_depth: int = 1

    on_error = "disable"

    def __post_init__(self) -> None:
        if not isinstance(self.max_depth, int) or isinstance(self.max_depth, bool):
            raise TypeError(f"max_depth must be a whole number, got {self.max_depth!r}")
        if self.max_depth < -1:
            raise ValueError(f"max_depth must be -1 (all levels) or at least 0, got {self.max_depth!r}")

    @hookimpl
    def on_fit_start(self, run: Run) -> None:
        module = run.module
        layers = _layers(module, self.max_depth)
        shapes = bool(layers) and module.example_input_array is not None and self._find_shapes(run, module, layers)
        if run.rank == 0:
            _print(layers, _totals(module), shapes)

    def _find_shapes(self, run: Run, module: Any, layers: list[_Layer]) -> bool:
        """Fills in the shapes; in every process, because a forward of a distributed module is one of all processes."""
        if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
            run.say_once("summary: shapes are left out: the first forward pass would initialize the module's lazy parameters")
            return False
        try:
            with run.metrics.unseen():
                _forward(run, module, {layer.name: layer for layer in layers})
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            run.say_once(f"summary: shapes are left out: forward of example_input_array failed: {type(error).__name__}: {reason}")
            return False
        return True


# ---------------------------------------------------------------------- layers and their shapes


def _layers(module: nn.Module, depth: int) -> list[_Layer]:
    """The module's layers down to ``depth``, and the parameters that belong to none of them."""
    layers = []
    for name, child in module.named_modules(remove_duplicate=False):
        if name and (depth == -1 or name.count(".") < depth):
            layers.append(_Layer(name, type(child).__name__, _Count.of(child.parameters(), child.buffers())))
    if depth:
        for name, parameter in module.named_parameters(recurse=False):
            layers.append(_Layer(name, type(parameter).__name__, _Count.of([parameter])))
    return layers


def _forward(run: Run, module: Any, layers: Mapping[str, _Layer]) -> None:
    """One forward pass of the example input that notes shapes and leaves everything as it was."""
    example = run.hooks.move_batch(run, copy.deepcopy(module.example_input_array))  # forward may write into it
    with ExitStack() as stack:
        for name, child in module.named_modules(remove_duplicate=False):
            if name in layers:
                handle = child.register_forward_hook(partial(_note, layers[name]), with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(_unchanged(module))
        stack.enter_context(torch.no_grad())
        if any(hasattr(child, "_orig_mod") or getattr(child, "_compiled_call_impl", None) for child in module.modules()):
            # nothing is compiled for one batch in eval mode; there is no public way to ask whether a module would be
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if isinstance(example, Mapping):
            module(**example)
        elif isinstance(example, tuple):
            module(*example)
        else:
            module(example)


def _note(layer: _Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if not layer.output:  # a layer that is used several times shows the first
        layer.input = ", ".join([*map(_shape, args), *(f"{name}={_shape(value)}" for name, value in kwargs.items())])
        layer.output = _shape(output)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Inside, everything is in eval mode; afterwards modes, buffers and random generators are as they were."""
    modes = [(child, child.training) for child in module.modules()]
    buffers = [(child, name, buffer, buffer.clone()) for child in module.modules() for name, buffer in child.named_buffers(recurse=False)]
    with _generators_unchanged(module):
        module.eval()
        try:
            yield
        finally:
            for child, training in modes:
                child.training = training
            with torch.no_grad():
                for child, name, buffer, values in buffers:
                    if getattr(child, name) is not buffer:
                        setattr(child, name, buffer)
                    buffer.copy_(values)


@contextmanager
def _generators_unchanged(module: nn.Module) -> Iterator[None]:
    """Whatever is drawn inside, the global generators and the module's own are afterwards as they were before."""
    own = {id(value): value for child in module.modules() for value in vars(child).values() if isinstance(value, torch.Generator)}
    states = [(generator, generator.get_state()) for generator in own.values()]
    try:
        with preserved():
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _shape(value: Any) -> str:
    """``[32, 10]`` for a tensor; the same inside of lists, tuples and dicts; the name of the type for anything else."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_shape, value)) + ")"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shape(part)}" for key, part in value.items()) + "}"
    return type(value).__name__


# ---------------------------------------------------------------------- text


def _short(number: int) -> str:
    """A number with three digits and a unit: ``392 K``."""
    value = float(number)
    for unit in ("", " K", " M", " B"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:,.3g} T" if value < 999.5 else f"{value:,.0f} T"


def _print(layers: list[_Layer], totals: list[str], shapes: bool) -> None:
    # FORCE_COLOR and the like make rich take a file for a terminal
    console = Console(stderr=True, force_terminal=None if _is_terminal(sys.stderr) else False, force_jupyter=False)
    if layers:
        table = _table(layers, shapes)
        if not console.is_terminal:
            console.width = 100_000
            console.width = max(WIDTH, Measurement.get(console, console.options, table).maximum)
        console.print(table)
    for line in totals:
        console.print(Text(line), soft_wrap=True)


def _table(layers: list[_Layer], shapes: bool) -> Table:
    table = Table(box=box.MARKDOWN, show_edge=False)  # pure ASCII
    for title in ("name", "type"):
        table.add_column(title, overflow="fold")
    for title in ("params", "trainable", "size (MB)"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("input", "output") if shapes else ():
        table.add_column(title, overflow="fold")
    for layer in layers:
        cells = [layer.name, layer.type, *layer.count.cells()]
        if shapes:
            cells += [layer.input or "-", layer.output or "-"]
        table.add_row(*map(Text, cells))
    return table


def _totals(module: nn.Module) -> list[str]:
    """The lines below the table."""
    count = _Count.of(module.parameters(), module.buffers())
    everywhere = _Count.of(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
    lines = [
        f"parameters: {_short(count.total)} ({count.total:,})",
        f"trainable: {_short(count.trainable)}, non-trainable: {_short(count.total - count.trainable)}",
        f"size: {count.size / 1e6:.3f} MB (parameters and buffers)",
    ]
    if everywhere.total > count.total:
        lines.append(f"shared between layers, counted once: {_short(everywhere.total - count.total)}")
    if count.lazy:
        lines.append(f"uninitialized, not counted: {count.lazy} parameters, whose shapes the first batch decides")
    return lines


def _is_terminal(stream: Any) -> bool:
    """Whether ``stream`` is one; a stream may be missing or closed."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False
