"""mypy accepts a plugin that inherits from `Hooks` and is right, and rejects one whose arguments have other names or types."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchplug
from torchplug import PluginError, Trainer
from torchplug.members import PARAMETERS

CORE = Path(torchplug.__file__).parent

HEAD = """
from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torchplug import Run, hookimpl
from torchplug.hookspecs import Hooks
"""

GOOD = """
class Good(Hooks):
    @hookimpl
    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        run.request_stop(f"{batch_idx}")

    @hookimpl
    def on_before_backward(self, run: Run, loss: Tensor) -> None: ...

    @hookimpl
    def zero_grad(self, run: Run, optimizer: Optimizer) -> bool | None:
        optimizer.zero_grad()
        return True

    @hookimpl(wrapper=True)
    def optimizer_step(
        self, run: Run, optimizer: Optimizer, closure: Callable[[], Tensor] | None
    ) -> Generator[None, bool | None, bool | None]:
        return (yield)

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run, stage: str) -> Generator[None, Any, Any]:
        return (yield)


class Free:
    @hookimpl
    def on_train_epoch_end(self) -> None: ...
"""

BAD = {
    "another name of an argument": "def on_train_batch_start(self, run: Run, data: Any, batch_idx: int) -> None: ...",
    "another type of an argument": "def on_train_batch_start(self, run: Run, batch: Any, batch_idx: str) -> None: ...",
    "an argument too many": "def on_train_batch_start(self, run: Run, batch: Any, batch_idx: int, loss: Tensor) -> None: ...",
    "an argument missing": "def on_train_batch_start(self, run: Run) -> None: ...",
    "another answer": "def zero_grad(self, run: Run, optimizer: Optimizer) -> str: return ''",
    "the trainer in place of the run": "def on_fit_start(self, run: 'torchplug.Trainer') -> None: ...",
}
BAD_WRAPPER = "def zero_grad(self, run: Run, optimizer: Optimizer) -> Generator[None, bool | None, str]:\n        yield\n        return ''"
CALLS = {
    "a name that the package has not": "torchplug.Trainor(plugins=3)",
    "a hook that is not there": "hooks.on_train_epoch_ends(run)",
    "a call without an argument": "hooks.on_train_batch_start(run, None)",
    "a call with another type": "hooks.on_stop_requested(run, 3, '')",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What mypy --strict says of each file, without the notes."""
    folder = tmp_path_factory.mktemp("typing")
    sources = {"good": GOOD}
    for i, (method, marker) in enumerate([*((each, "hookimpl") for each in BAD.values()), (BAD_WRAPPER, "hookimpl(wrapper=True)")]):
        sources[f"bad_{i}"] = f"import torchplug\n\nclass Bad(Hooks):\n    @{marker}\n    {method}\n"
    for i, call in enumerate(CALLS.values()):
        sources[f"call_{i}"] = f"import torchplug\n\ndef call(hooks: Hooks, run: Run) -> None:\n    {call}\n"
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(HEAD + source, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", "--hide-error-context", "."],
        cwd=folder, env={**os.environ, "MYPYPATH": str(CORE.parent)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, list[str]] = {name: [] for name in sources}
    for file, message in re.findall(r"^(\w+)\.py:\d+: error: (.*)$", done.stdout, re.MULTILINE):
        found[file].append(message)
    return found


@pytest.mark.slow
def test_a_plugin_that_is_right_is_accepted(said: dict[str, list[str]]) -> None:
    assert said["good"] == []


@pytest.mark.slow
@pytest.mark.parametrize("what", [*BAD, "a wrapper with another answer"])
def test_a_plugin_that_is_wrong_is_rejected(what: str, said: dict[str, list[str]]) -> None:
    (message,) = said[f"bad_{[*BAD, 'a wrapper with another answer'].index(what)}"]
    assert re.search(r'(Signature|Return type .*) of "(on_train_batch_start|zero_grad|on_fit_start)"', message) and "Hooks" in message


@pytest.mark.slow
@pytest.mark.parametrize("what", CALLS)
def test_a_call_that_is_wrong_is_rejected(what: str, said: dict[str, list[str]]) -> None:
    assert said[f"call_{list(CALLS).index(what)}"], "mypy checks the loop against the contract"


def test_who_inherits_from_hooks_implements_only_what_it_has(trainer, tiny, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(HEAD + GOOD, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("good", tmp_path / "good.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = trainer(plugins=[module.Good(), module.Free()])
    made.fit(tiny())
    assert made.run.stop_reason == "0"
    hooks = {member.name: set(member.hooks) for member in made._members}
    assert hooks == {
        "good": {"on_train_batch_end", "on_before_backward", "zero_grad", "optimizer_step", "evaluate"}, "free": {"on_train_epoch_end"},
    }  # fmt: skip


def test_what_inherits_and_is_wrong_is_refused_when_the_trainer_is_built_too() -> None:
    from torchplug import hookimpl
    from torchplug.hookspecs import Hooks

    class Bad(Hooks):
        @hookimpl
        def on_train_batch_start(self, run, data, batch_idx): ...

    with pytest.raises(PluginError, match=r"'bad': Bad.on_train_batch_start: the hook has no argument 'data'"):
        Trainer(plugins=[Bad()])


def test_the_stub_says_what_the_specs_say() -> None:
    spec = importlib.util.spec_from_file_location("make_stub", CORE.parent / "make_stub.py")
    make_stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_stub)
    written = (CORE / "hookspecs.pyi").read_text(encoding="utf-8")
    assert ast.dump(ast.parse(make_stub.stub())) == ast.dump(ast.parse(written)), "run python core/make_stub.py"
    for hook in PARAMETERS:
        assert written.count(f"def {hook}(") == 2


def test_the_package_says_that_it_has_types() -> None:
    assert (CORE / "py.typed").exists()
