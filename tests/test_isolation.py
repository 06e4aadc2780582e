"""What core may know: no plugin that was not named, no optional package, nothing of the environment, no module above its own."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torchplug
from torchplug.discovery import find
from torchplug.members import PARAMETERS

CORE = Path(torchplug.__file__).parent
ROOT = Path(__file__).parents[1]

# each module imports from earlier layers alone
LAYERS = [
    {"__init__"},
    {"agreement", "blame", "codec", "data", "hookspecs", "options", "seed", "series", "signals", "versions"},
    {"discovery", "files", "layout", "loaders", "outflow", "metrics", "optimizers", "schedule", "settings"},
    {"lock", "sharded", "skeleton"},
    {"checkpoint", "loss", "stream"},
    {"dealing", "matching", "run"},
    {"state", "tracking"},
    {"resume", "trials"},
    {"averaging", "module"},
    {"launching", "loop", "members"},
    {"dispatch", "operations", "ordering", "plugins", "prepare"},
    {"config", "precision"},
    {"distributed", "trainer"},
    {"checkpoint_cli", "doctor", "listing", "new", "replay"},
    {"explaining", "testing"},
    {"cli"},
    {"__main__"},
]


def sources() -> dict[str, ast.Module]:
    """The modules of core by name; the parts of a package within it by its name and theirs."""
    files = [*sorted(CORE.glob("*.py")), *sorted((CORE / "testing").glob("*.py"))]
    return {".".join(file.relative_to(CORE).with_suffix("").parts): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imported(node: ast.AST, outside: bool = True) -> Iterator[tuple[str, bool]]:
    """The modules that are imported at run time, each with whether that happens when ``node`` itself is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, outside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are written out"
            names = [f"torchplug.{alias.name}" for alias in child.names] if child.module == "torchplug" else [str(child.module)]
            yield from ((name, outside) for name in names)
        else:
            yield from imported(child, outside and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


# ---------------------------------------------------------------------- read from the source


def test_core_imports_torch_pluggy_safetensors_and_the_standard_library_alone() -> None:
    packages = {name.split(".")[0] for tree in sources().values() for name, _ in imported(tree)}
    assert packages - set(sys.stdlib_module_names) == {"torch", "pluggy", "safetensors", "torchplug"}


def test_the_distribution_asks_for_the_same_three() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^dependencies = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)
    assert found is not None
    assert {re.split(r"[<>=~!\[ ]", each)[0] for each in re.findall(r'"([^"]+)"', found.group(1))} == {"torch", "pluggy", "safetensors"}


def test_core_tries_no_import_that_might_fail() -> None:
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Try):
                inside = [child for part in node.body for child in ast.walk(part)]
                assert not any(isinstance(child, (ast.Import, ast.ImportFrom)) for child in inside), module


def test_every_module_imports_from_earlier_layers_alone() -> None:
    layer = {module: i for i, modules in enumerate(LAYERS) for module in modules}
    modules = [(name.partition(".")[0], tree) for name, tree in sources().items()]
    assert {name for name, _ in modules} <= layer.keys(), "a new module needs its place in LAYERS"
    for module, tree in modules:
        for name, _ in imported(tree):  # inside of functions too
            if not name.startswith("torchplug"):
                continue
            other = name.partition(".")[2].split(".")[0] or "__init__"
            other = other if other in layer else "__init__"
            assert layer[other] < layer[module] or other == module == "testing", f"{module} imports {other}"


def test_the_page_of_the_architecture_has_the_same_modules_in_the_same_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Who may import whom")[2]
    rows = [cells.split("|")[2] for cells in page.splitlines() if cells.startswith("| ")][1:]
    said = [set(re.findall(r"`(\w+)`", part)) for row in rows for part in row.split(", then ")]
    contract, tools, *others = said
    assert [contract | tools, *others] == LAYERS[1:-1]


def test_the_page_of_the_architecture_walks_through_the_hooks_of_a_batch_in_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*?\|(.*)\|$", page.partition("## One batch")[2].partition("\n## ")[0], re.MULTILINE)
    walked = [hook for hook, _ in rows]
    assert walked == [hook for hook in PARAMETERS if hook in walked] and {"move_batch", "train_step", "zero_grad"} <= set(walked)
    first, last = (list(PARAMETERS).index(hook) for hook in ("move_batch", "on_train_batch_end"))
    assert set(walked) == set(list(PARAMETERS)[first : last + 1])
    for hook, cell in rows:
        for name in re.findall(r"`(\w+)`", cell):
            assert hasattr(getattr(find(name).load(), hook), "torchplug_impl"), f"{name} has no {hook}"


def test_the_loop_gets_a_run_and_never_the_trainer() -> None:
    for module in ("loop", "operations", "run", "prepare"):
        tree = sources()[module]
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert "Trainer" not in names and "trainer" not in names, module


# ---------------------------------------------------------------------- seen in a fresh process


def python(code: str, *folders: Path) -> str:
    """What a fresh interpreter prints."""
    path = os.pathsep.join([*(str(folder) for folder in folders), str(CORE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = """
import os, sys
import torch, torch.utils.data, pluggy, safetensors.torch

class Watched:
    def __init__(self, real):
        self.real = real
    def __getattr__(self, name):
        self.look(name)
        return getattr(self.real, name)
    def __getitem__(self, name):
        self.look(name)
        return self.real[name]
    def __setitem__(self, name, value):
        self.look(name)
        self.real[name] = value
    def __contains__(self, name):
        self.look(name)
        return name in self.real
    def __iter__(self):
        self.look("iter")
        return iter(self.real)
    def look(self, what):
        frame = sys._getframe(2)
        while frame.f_globals["__name__"] == "os":
            frame = frame.f_back
        if frame.f_globals["__name__"].split(".")[0] == "torchplug":
            print("READ", what, frame.f_globals["__name__"])

os.environ = Watched(os.environ)
before = set(sys.modules)
import torchplug, torchplug.trainer, torchplug.cli
print("FROM", torchplug.__file__)
for name in sorted(set(sys.modules) - before):
    print("NEW", name)
"""


def test_importing_torchplug_imports_no_plugin_and_reads_no_environment_variable() -> None:
    lines = [line.split(" ", 1) for line in python(IMPORT).splitlines()]
    assert ["FROM", str(CORE / "__init__.py")] in lines
    assert [what for kind, what in lines if kind == "READ"] == []
    new = {what.split(".")[0] for kind, what in lines if kind == "NEW"}
    assert "torchplug" in new
    assert {name for name in new if name not in sys.stdlib_module_names} == {"torchplug"}


FIT = """
import logging, sys
logging.disable()
import torch, torchplug

class Model(torchplug.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch):
        return self.layer(batch).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = torchplug.Trainer(plugins=PLUGINS, max_epochs=1, root_dir=ROOT)
trainer.fit(Model(), [torch.ones(2, 2)])
print(*sorted(name for name in sys.modules if name.startswith("torchplug_") or name in ("tensorboard", "rich")))
"""


def test_an_installed_plugin_that_is_not_named_is_never_imported(package: Callable[..., Path], tmp_path: Path) -> None:
    source = "from torchplug import hookimpl\nclass Plugin:\n    @hookimpl\n    def on_fit_start(self): pass\n"
    folders = [package(f"torchplug-{name}", source, **{name: "Plugin"}) for name in ("wanted", "unwanted")]
    code = FIT.replace("PLUGINS", "['wanted']").replace("ROOT", repr(str(tmp_path)))
    assert python(code, *folders).split() == ["torchplug_wanted"]
