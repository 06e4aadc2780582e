"""The code of hooks, made from the specs: for a plugin that is to have just these."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Sequence

import torchplug
from torchplug import hookspecs
from torchplug.hookspecs import SPECS

__all__ = ["with_hooks"]


def with_hooks(module: str, hooks: Sequence[str]) -> str:
    """``module``, the code of a plugin with one hook, with these hooks in the place of that one.

    Each has the signature of its spec and the first line of its documentation, and does what the one in ``module`` does; an operation
    is left to the next plugin. Of what the specs import, only what these hooks need is imported.
    """
    lines, tree = module.splitlines(keepends=True), ast.parse(module)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))][1:]  # behind `from __future__`
    (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    (method,) = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name in SPECS]
    code = ast.get_source_segment(module, method.body[-1]) or ""
    methods = "\n".join(_method(hook, code.replace(method.name, hook)) for hook in hooks)
    head, between = lines[: imports[0].lineno - 1], lines[imports[-1].end_lineno : method.decorator_list[0].lineno - 1]
    return "".join([*head, _imports(imports, hooks), *between, methods, *lines[method.end_lineno :]])


def _method(hook: str, code: str) -> str:
    """A hook as a method of a plugin."""
    spec = SPECS[hook]
    signature = inspect.signature(spec)
    arguments = ", ".join(["self", *(f"{each.name}: {each.annotation}" for each in list(signature.parameters.values())[1:])])
    line = re.sub(r" *Since [\d.]+\.$", "", (inspect.getdoc(spec) or "").partition("\n")[0])
    lines = ["@hookimpl", f"def {hook}({arguments}) -> {signature.return_annotation}:", f'    """{line}"""', f"    {code}"]
    if spec.torchplug_spec["firstresult"]:
        lines.append("    return None  # no answer: the next plugin is asked, and core in the end")
    return "".join(f"    {line}\n" for line in lines)


def _imports(nodes: Sequence[ast.Import | ast.ImportFrom], hooks: Sequence[str]) -> str:
    """Import statements in two groups: the standard library, and other packages."""
    homes = _homes()
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    wanted = {(alias.name, str(node.module)) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    wanted = {(name, module) for name, module in wanted if name not in homes}
    wanted |= {(name, homes[name]) for hook in hooks for name in _names(hook) if name in homes}
    standard = [f"import {name}" for name in sorted(plain)]
    others: list[str] = []
    for module in sorted({module for _, module in wanted}):
        group = standard if module.partition(".")[0] in sys.stdlib_module_names else others
        group.append(f"from {module} import {', '.join(sorted(name for name, home in wanted if home == module))}")
    return "\n".join([*standard, "", *others, ""])


def _names(hook: str) -> Iterator[str]:
    """The names in the annotations of a hook."""
    signature = inspect.signature(SPECS[hook])
    for annotation in (signature.return_annotation, *(each.annotation for each in list(signature.parameters.values())[1:])):
        for node in ast.walk(ast.parse(str(annotation), mode="eval")):
            if isinstance(node, ast.Name):
                yield node.id


def _homes() -> dict[str, str]:
    """From which module to import each name that the specs use; what is in the front door, from there."""
    homes = {}
    for node in ast.walk(ast.parse(inspect.getsource(hookspecs))):
        if isinstance(node, ast.ImportFrom) and node.module:
            homes.update({alias.name: "torchplug" if alias.name in torchplug.__all__ else node.module for alias in node.names})
    return homes
