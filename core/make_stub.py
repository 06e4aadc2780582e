"""Writes the hooks in torchplug/hookspecs.pyi, what type checkers see. Run it when a hook is added: ``python core/make_stub.py``.

A hook is called by position in the loop and known by its arguments' names to whoever implements it. Both are said by two overloads:
an implementation that inherits from ``Hooks`` then has to have the right names, which a plain override does not. What stands above the
class in the stub is written by hand.
"""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parent / "torchplug" / "hookspecs.py"
STUB = SOURCE.with_suffix(".pyi")
CLASS = "class Hooks:\n"


def stub() -> str:
    """The text of the stub."""
    (hooks,) = [node for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    parts = [STUB.read_text(encoding="utf-8").partition(CLASS)[0], CLASS]
    for spec in hooks.body:
        if isinstance(spec, ast.FunctionDef):
            arguments = ", ".join(ast.unparse(each) for each in spec.args.args[1:])
            answer = ast.unparse(spec.returns or ast.Constant(None))
            for how in (arguments, f"*, {arguments}"):
                parts.append(f"    @overload\n    def {spec.name}(self, {how}) -> {answer}: ...\n")
    return "".join(parts)


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
