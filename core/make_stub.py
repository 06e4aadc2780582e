"""Writes torchplug/hookspecs.pyi, what type checkers see of the hooks. Run it when a hook is added: ``python core/make_stub.py``.

A hook is called by position in the loop and known by its arguments' names to whoever implements it. Both are said by two overloads:
an implementation that inherits from ``Hooks`` then has to have the right names, which a plain override does not.
"""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parent / "torchplug" / "hookspecs.py"
HEAD = """# written by core/make_stub.py from hookspecs.py
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, overload

import pluggy
from torch import Tensor
from torch.optim import Optimizer

from torchplug.launching import Task
from torchplug.optimizers import Scheduler
from torchplug.run import Run

__all__ = ["Hooks", "hookimpl"]

Function = TypeVar("Function", bound=Callable[..., Any])
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
Received = TypeVar("Received")

@overload
def hookimpl(function: Function) -> Function: ...
@overload
def hookimpl(
    *, wrapper: Literal[True]
) -> Callable[[Callable[Arguments, Generator[None, Received, Answer]]], Callable[Arguments, Answer]]: ...

event: pluggy.HookspecMarker

def operation(function: Function) -> Function: ...
def action(function: Function) -> Function: ...
def closing(function: Function) -> Function: ...

class Hooks:
"""


def stub() -> str:
    """The text of the stub."""
    (hooks,) = [node for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    parts = []
    for spec in hooks.body:
        if isinstance(spec, ast.FunctionDef):
            arguments = ", ".join(ast.unparse(each) for each in spec.args.args[1:])
            answer = ast.unparse(spec.returns or ast.Constant(None))
            for how in (arguments, f"*, {arguments}"):
                parts.append(f"    @overload\n    def {spec.name}(self, {how}) -> {answer}: ...\n")
    return HEAD + "".join(parts)


if __name__ == "__main__":
    SOURCE.with_suffix(".pyi").write_text(stub(), encoding="utf-8")
