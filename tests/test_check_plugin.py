"""`check_plugin` finds what is wrong: for each check a plugin that is broken in this one way, and a good one that passes them all."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from torchplug.testing import Report, check, check_plugin, company, hermetic, manners, processes, two_ranks
from torchplug.testing.check import CHECKS
from torchplug.testing.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

GOOD = '''
    import os, signal, threading, time
    from dataclasses import dataclass, field
    from typing import Any

    import torch

    from torchplug import Run, hookimpl


    @dataclass(kw_only=True, eq=False)
    class Counter:
        """Counts optimizer steps.

        Args:
            every: Count every this many steps.
        """

        every: int = 1

        count: int = field(init=False, default=0)

        def __post_init__(self) -> None:
            pass

        @hookimpl
        def setup(self, run: Run, stage: str) -> None:
            self.count = 0

        @hookimpl
        def on_after_optimizer_step(self, run: Run) -> None:
            if run.position.step % self.every == 0:
                self.count += 1

        @hookimpl
        def teardown(self, run: Run) -> None:
            pass

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]
'''

METHOD = "        @hookimpl\n        def teardown(self, run: Run)"  # further methods stand before it


def method(text: str, wrapper: bool = False) -> tuple[str, str]:
    """The change that adds a hook."""
    marker = "@hookimpl(wrapper=True)" if wrapper else "@hookimpl"
    lines = "".join(f"        {line}\n" for line in [marker, *text.strip("\n").split("\n")])
    return METHOD, f"{lines}\n{METHOD}"


@pytest.fixture
def counter(package: Callable[..., Path]) -> Iterator[Callable[..., None]]:
    """Installs the counting plugin with changes, pairs of an old and a new text; no other plugin is visible but those named."""
    stack = []

    def make(*changes: tuple[str, str], distribution: str = "acme-counter", needs: str = "torchplug>=0.1,<0.2", beside: Any = ()) -> None:
        source = GOOD
        for old, new in changes:
            assert old in source, old
            source = source.replace(old, new, 1)
        folder = package(distribution, source, counter="Counter")
        (metadata,) = folder.glob("*.dist-info/METADATA")
        metadata.write_text(metadata.read_text() + (f"Requires-Dist: {needs}\n" if needs else ""))
        stack.append(hermetic("counter", *beside))
        stack[-1].__enter__()

    yield make
    for each in stack:
        each.__exit__(None, None, None)
    os.environ.pop("COUNTER", None)


def failures(**options: Any) -> dict[str, str]:
    """What `check_plugin` finds wrong, by check."""
    with pytest.raises(AssertionError) as caught:
        check_plugin("counter", **options)
    parts = str(caught.value).split("  FAILED: ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


@pytest.mark.slow
def test_a_good_plugin_passes_them_all(counter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    counter(beside=("lr_monitor", "early_stopping"))
    report = check_plugin("counter", every=2)
    names = [check.__name__.replace("_", " ") for check in CHECKS]
    observing = "an observer leaves training as it is"
    assert report.passed == [name for name in names if name != observing] and not report.failed
    assert list(report.left_out) == [observing]
    assert report.plugin == "plugin 'counter' (acme-counter 1.0)"
    shown = capsys.readouterr().out
    assert shown == f"{report}\n" and shown.startswith(f"{report.plugin}: {len(names) - 1} checks passed\n")
    assert re.search(r"costs (less than the noise of this machine, )?\d+\.\d us per step \(a bare step of .* takes \d+\.\d us\)", shown)


@pytest.mark.slow
def test_an_observer_is_held_to_that(counter: Any) -> None:
    counter(("every: int = 1", 'on_error = "disable"\n        every: int = 1'))
    report = check_plugin("counter")
    assert "an observer leaves training as it is" in report.passed


SEEDED = "            torch.rand(1)"
BROKEN: dict[str, tuple[str, list[tuple[str, str]], dict[str, Any], list[str]]] = {
    "an unrelated distribution": (
        "entry point and names agree", [], {"distribution": "acme-thing"},
        ["the module acme_thing does not end with the plugin's name", "call it ..._counter"],
    ),
    "no range of versions": (
        "entry point and names agree", [], {"needs": ""},
        ["acme-counter does not say with which versions of torchplug it works", "add 'torchplug>=0.1,<0.2' to its dependencies"],
    ),
    "a class of another module": (
        "entry point and names agree", [("    @dataclass(kw_only", "    from torchplug_lr_monitor import LRMonitor as Counter"),
         ("=True, eq=False)\n    class Counter", "\n    class Other")], {},
        ["acme_counter:Counter comes from the module torchplug_lr_monitor", "name that module in the entry point"],
    ),
    "a misspelt hook": (
        "hooks have their signatures", [method("def on_train_stard(self) -> None:\n    pass")], {},
        ["Counter.on_train_stard is not a hook, did you mean 'on_train_start'?"],
    ),
    "a wrong argument": (
        "hooks have their signatures", [method("def on_train_start(self, trainer) -> None:\n    pass")], {},
        ["the hook has no argument 'trainer'", "it has: run"],
    ),
    "half a state": (
        "hooks have their signatures", [("def load_state_dict", "def load_state")], {},
        ["it has state_dict and no load_state_dict", "write both"],
    ),
    "an option without text": (
        "every option is documented", [("            every: Count every this many steps.\n", "            each: Another one.\n")], {},
        ["option 'every' has no text", "describe it in the section Args:"],
    ),
    "an option by position": (
        "every option is documented", [("kw_only=True, ", "")], {},
        ["option 'every' can be given by its position", "write @dataclass(kw_only=True)"],
    ),
    "an option that is used unchecked": (
        "every option is checked",
        [("    import torch\n", "    import torch\n    from typing import NewType\n    Count = NewType('Count', int)\n"),
         ("every: int = 1", "every: Count = 1"), ("            pass\n", "            self.every = abs(self.every)\n")], {},
        ["option 'every' of a wrong type is refused without its name", "name it in the message"],
    ),
    "an option that may be anything but says otherwise": (
        "every option is checked",
        [("    import torch\n", "    import torch\n    from typing import NewType\n    Count = NewType('Count', int)\n"),
         ("every: int = 1", "every: Count = 1"), ("% self.every == 0", "% 2 == 0")], {},
        ["option 'every' takes a value of a wrong type", "check it in __post_init__"],
    ),
    "parameters that are not finite": (
        "parameters are finite",
        [method("def on_train_end(self, run: Run) -> None:\n    run.module.layer.weight.data.fill_(float('nan'))")], {},
        ["parameter layer.weight is not finite after 12 steps", "look at what the plugin does to gradients and weights"],
    ),
    "an unsafe state": (
        "parameters are finite", [('{"count": self.count}', '{"count": object()}')], {},
        ["plugins.counter.count"],
    ),
    "a list of the class": (
        "built twice it is two objects",
        [("every: int = 1", "every: int = 1\n        steps = []"), ("self.count += 1", "self.count += 1; self.steps.append(1)")], {},
        ["a run changed Counter.steps, which all instances share", "make it a field with a default_factory"],
    ),
    "a shared default": (
        "built twice it is two objects", [("    @dataclass", "    class Box: pass\n    BOX = Box()\n    @dataclass"),
         ("default=0)", "default=0)\n        box: Any = field(init=False, default=BOX)"),
         ("            pass\n", "            self.box = self.box\n")], {},
        ["two Counter share box, a Box", "field(default_factory=Box)"],
    ),
    "a random observer": (
        "an observer leaves training as it is",
        [("every: int = 1", 'on_error = "disable"\n        every: int = 1'),
         ("self.count += 1", "self.count += 1\n            if run.world_size == 1:\n                torch.rand(1)")], {},
        ["a run with it and one without it differ in weights.layer.weight", "draw random numbers inside of torchplug.preserved()"],
    ),
    "a state that is not taken": (
        "its state survives a checkpoint", [('self.count = state["count"]', "pass")], {},
        ["has nothing of its state at count", "put it back in load_state_dict"],
    ),
    "a state that is forgotten": (
        "its state survives a checkpoint", [method("def on_train_start(self) -> None:\n    self.count = 0")], {},
        ["has nothing of its state at count", "do not forget it in on_fit_start or on_train_start"],
    ),
    "something that decides and is not kept": (
        "a killed run goes on as if nothing had happened",
        [("default=0)", "default=0)\n        _seen: int = field(init=False, default=0)"), ("self.count = 0", "self.count = self._seen = 0"),
         method("def on_before_optimizer_step(self, run: Run) -> None:\n    self._seen += 1\n"
                "    run.module.layer.weight.grad.mul_(1 + self._seen)")], {},
        ["differs from one that was not, in weights.layer.weight", "keep in state_dict whatever decides how it goes on"],
    ),
    "an environment variable": (
        "global state is put back", [("self.count = 0", "self.count = 0; os.environ['COUNTER'] = str(time.time())")], {},
        ["environment: COUNTER has changed", "put it back in teardown"],
    ),
    "a value that is read": (
        "nothing is read back between logging steps", [method("def on_before_backward(self, loss) -> None:\n    float(loss.detach())")], {},
        ["a value is read from the device by local_scalar_dense (acme_counter.py:", "float(loss.detach()))", "keep tensors, detached"],
    ),
    "a value that is copied": (
        "nothing is read back between logging steps", [method("def on_before_backward(self, loss) -> None:\n    loss.detach().cpu()")], {},
        ["by cpu (acme_counter.py:", "read them in log_metrics"],
    ),
    "a list that grows": (
        "memory does not grow",
        [("default=0)", "default=0)\n        losses: list = field(init=False, default_factory=list)"),
         method("def on_before_backward(self, loss) -> None:\n    self.losses.append(loss.detach())")], {},
        ["there are 80 more tensors (without it 40)", "keep a running sum or the last value"],
    ),
    "a lock": (
        "it goes to other processes", [("            pass\n", "            self._lock = threading.Lock()\n")], {},
        ["an instance, new, cannot be pickled (TypeError: cannot pickle '_thread.lock' object)", "leave them out in __getstate__"],
    ),
    "no company": (
        "it works with every other plugin",
        [("self.count = 0", "self.count = 0\n            if 'lr_monitor' in run.plugins:\n                raise RuntimeError('too many')")],
        {"beside": ("lr_monitor", "grad_norm")},
        ["with 'lr_monitor' after it, a run fails with RuntimeError: too many", "say with before and after where it must stand"],
    ),
    "ranks that differ": (
        "it trains on two ranks",
        [method("def on_train_end(self, run: Run) -> None:\n    run.module.layer.weight.data.add_(run.rank)")], {},
        ["the two ranks have different weights at the end (layer.weight)", "must be the same on every rank"],
    ),
    "an error that is replaced": (
        "an error in each hook is named",
        [method("def train_batch(self) -> Any:\n    try:\n        return (yield)\n    except Exception:\n"
                "        raise RuntimeError('oh') from None", wrapper=True)], {},
        ["an error in on_after_optimizer_step (fit) is not named (RuntimeError: oh came out)", "let errors of hooks pass as they are"],
    ),
    "a tear-down that needs a start": (
        "an error in each hook is named",
        [method("def on_train_start(self) -> None:\n    self._lines = []"),
         ("Run) -> None:\n            pass", "Run) -> None:\n            self._lines")], {},
        ["an error in setup (fit) makes its own tear-down fail too (AttributeError:", "give every attribute a value in __post_init__"],
    ),
}  # fmt: skip


def each_broken() -> Iterator[Any]:
    """The names of `BROKEN`; those that fail a check which another one has failed before are slow."""
    seen = set()
    for case, (words, *_) in BROKEN.items():
        yield pytest.param(case, marks=[pytest.mark.slow] if words in seen else [])
        seen.add(words)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(each_broken()))
def test_a_plugin_that_is_broken_in_one_way_fails_one_check_which_says_what_to_do(case: str, counter: Any) -> None:
    check, changes, options, words = BROKEN[case]
    counter(*changes, **options)
    found = failures()
    assert list(found) == [check], found
    for text in words:
        assert text in found[check]


@pytest.mark.slow
def test_what_depends_on_time_is_found_by_all_that_compare(counter: Any) -> None:
    noise = "run.module.layer.weight.data.add_((time.time_ns() // 1000 % 1000) * 1e-4)"
    counter(method(f"def on_train_end(self, run: Run) -> None:\n    {noise}"))
    found = failures()
    compare = ["runs of one seed are equal", "a killed run goes on as if nothing had happened", "it trains on two ranks"]
    assert list(found) == compare
    assert "two runs of one seed differ in weights.layer.weight" in found[compare[0]] and "Trainer(seed=)" in found[compare[0]]


def test_every_check_has_a_plugin_that_fails_it() -> None:
    names = {check.__name__.replace("_", " ") for check in CHECKS}
    broken = {check for check, *_ in BROKEN.values()} | {"runs of one seed are equal", BUILT}
    assert names - broken == {"a step costs"}, "it measures, and demands nothing"


@pytest.mark.slow
def test_a_tear_down_that_fails_is_found_where_errors_switch_the_plugin_off(counter: Any) -> None:
    counter(
        ("every: int = 1", 'on_error = "disable"\n        every: int = 1'),
        method("def on_train_start(self) -> None:\n    self._lines = []"),
        ("Run) -> None:\n            pass", "Run) -> None:\n            self._lines"),
    )
    found = failures()
    assert list(found) == ["an error in each hook is named"]
    assert "an error in setup (fit) makes its own tear-down fail too" in found["an error in each hook is named"]


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_for_ever_are_found(counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company, "two_ranks", partial(two_ranks, timeout=4))
    one_rank = "if run.rank == 0 and run.world_size > 1:\n        torch.distributed.barrier()"
    counter(method(f"def on_train_end(self, run: Run) -> None:\n    {one_rank}"))
    found = failures()
    assert list(found) == ["it trains on two ranks"]
    assert "two ranks wait for each other for ever" in found["it trains on two ranks"]
    assert "in on_train_end" in found["it trains on two ranks"], "it says where"


@pytest.mark.slow
def test_processes_are_spawned_where_an_accelerator_cannot_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_can_fork", lambda: False)
    with hermetic("ema"):
        report = check_plugin("ema")
    assert {"a killed run goes on as if nothing had happened", "it trains on two ranks"} <= set(report.passed)


@pytest.mark.slow
def test_all_that_is_wrong_is_told_at_once(counter: Any) -> None:
    counter(("kw_only=True, ", ""), method("def on_before_backward(self, loss) -> None:\n    float(loss.detach())"))
    assert list(failures()) == ["every option is documented", "nothing is read back between logging steps"]


@pytest.mark.slow
def test_the_cost_of_a_step_is_measured(counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CHECKS", (manners.a_step_costs,))
    counter(method("def on_before_backward(self, loss) -> None:\n    time.sleep(0.003)"))
    report = check_plugin("counter")
    assert report.cost is not None and 2500 < report.cost < 30000
    assert report.bare is not None and 0 < report.bare < 10000
    assert f"costs {report.cost:.1f} us per step (a bare" in str(report)


@pytest.mark.parametrize(("own", "cost"), [([1.0], 0.0), ([2.4], 0.0), ([4.5], 2.5e6)])
def test_a_cost_below_the_noise_is_none(own: list[float], cost: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = iter([[1.0, 2.0, 3.0], own] * manners.ROUNDS)
    monkeypatch.setattr(manners._Clock, "windows", lambda clock: next(found))
    monkeypatch.setattr(Subject, "bare", lambda *given, **options: None)
    monkeypatch.setattr(Subject, "fit", lambda *given, **options: None)
    monkeypatch.setattr(Subject, "launcher", False)
    subject = Subject("counter", {}, tmp_path)
    assert list(manners.a_step_costs(subject)) == []
    assert subject.cost == (cost, 2e6, 2e6)


def test_what_a_report_says_of_a_cost_below_the_noise() -> None:
    report = Report("plugin 'counter'", passed=["a step costs"], cost=0.0, bare=100.0, noise=12.0)
    assert str(report).splitlines() == [
        "plugin 'counter': 1 check passed",
        "  costs less than the noise of this machine, 12.0 us per step (a bare step of the tiny module takes 100.0 us)",
    ]


def test_a_name_that_is_not_installed_is_said() -> None:
    with pytest.raises(AssertionError, match=r"plugin 'nowhere' is not installed.* pip install torchplug-nowhere"):
        check_plugin("nowhere")


BUILT = "it can be built with these options"


def test_a_mistake_in_the_options_is_said_and_nothing_else(counter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    counter()
    found = failures(ever=1)
    assert list(found) == [BUILT] and "no option 'ever', did you mean 'every'?" in found[BUILT]
    assert capsys.readouterr().out == "", "what is wrong is in the error alone"


def test_a_missing_option_is_said_and_nothing_else(counter: Any) -> None:
    counter(("every: int = 1", "every: int"))
    found = failures()
    assert list(found) == [BUILT] and "option 'every' must be given" in found[BUILT]


@pytest.mark.slow
def test_an_option_that_is_compared_before_its_type_is_known_is_named_by_core(counter: Any) -> None:
    counter(("            pass\n", "            if self.every < 1:\n                raise ValueError('too few')\n"))
    assert "every option is checked" in check_plugin("counter").passed


@pytest.mark.slow
def test_neighbours_with_the_same_trouble_are_told_of_in_one_line(counter: Any) -> None:
    beside = ("early_stopping", "grad_norm", "lr_monitor", "summary", "throughput")
    never = f"if set(run.plugins) & set({beside}):\n                raise RuntimeError('no')"
    counter(("self.count = 0", f"self.count = 0\n            {never}"), beside=beside)
    lines = failures()["it works with every other plugin"].strip().splitlines()
    assert len(lines) == 2
    for line, where in zip(lines, ("after", "before"), strict=True):
        assert f"with 'early_stopping', 'grad_norm', 'lr_monitor' and 2 more {where} it, a run fails with RuntimeError: no; " in line


# ---------------------------------------------------------------------- each thing that is global

GLOBAL = {
    "signal handlers: SIGUSR2 has changed": "signal.signal(signal.SIGUSR2, lambda *args: None)",
    "grad mode has changed": "torch.set_grad_enabled(False)",
    "torch.backends.cudnn has changed": "torch.backends.cudnn.deterministic = True",
    "default dtype has changed": "torch.set_default_dtype(torch.float64)",
    "float32 matmul precision has changed": "torch.set_float32_matmul_precision('high')",
    "number of threads of torch has changed": "torch.set_num_threads(2)",
    "working directory has changed": "os.chdir('/')",
    "a file is still open": "self._file = open('left.txt', 'w')",
    "a thread still runs": "threading.Thread(target=time.sleep, args=(20,), daemon=True, name='left').start()",
    "warning filters has changed": "import warnings; warnings.simplefilter('ignore')",
    "garbage collection has changed": "import gc; gc.disable()",
    "stdout and stderr has changed": "import sys, io; sys.stderr = io.StringIO()",
    "handlers of the root logger has changed": "import logging; logging.getLogger().addHandler(logging.NullHandler())",
}


PROGRAM = """
import sys
from pathlib import Path
from torchplug.testing import manners, subject, surroundings
surroundings.PATIENCE = 0.1
with subject.quiet():
    found = list(manners.global_state_is_put_back(subject.Subject("counter", {}, Path(".").absolute())))
print(*found, sep="\\n", file=sys.__stdout__)
"""


def left_by(statements: list[str], counter: Any, tmp_path: Path, programs: Any) -> list[str]:
    """What is said of a plugin that does this in its tear-down."""
    counter(("Run) -> None:\n            pass", "Run) -> None:" + "".join(f"\n            {each}" for each in statements)))
    (folder,) = (tmp_path / "site").iterdir()
    done = programs.run(PROGRAM, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stderr
    return list(done.stdout.splitlines())


OPEN = ("a file is still open", "a thread still runs")  # a first run may import what opens files and starts threads, a second one not


@pytest.mark.parametrize("left", [OPEN, [words for words in GLOBAL if words not in OPEN]], ids=["open", "changed"])
def test_all_that_a_plugin_leaves_is_found(left: Sequence[str], counter: Any, tmp_path: Path, programs: Any) -> None:
    lines = left_by([GLOBAL[words] for words in left], counter, tmp_path, programs)
    for words in left:
        assert any(re.match(f"after a run {words}: .*; put it back in teardown", line) for line in lines), (words, lines)


@pytest.mark.slow
@pytest.mark.parametrize("words", GLOBAL)
def test_what_a_plugin_leaves_changed_is_found_and_nothing_else(words: str, counter: Any, tmp_path: Path, programs: Any) -> None:
    lines = left_by([GLOBAL[words]], counter, tmp_path, programs)
    assert lines and all(re.match(f"after a run( that failed)? {words}: .*; put it back in teardown", line) for line in lines), lines


def test_what_only_a_run_that_fails_leaves_changed_is_found(counter: Any, tmp_path: Path) -> None:
    counter(method("def on_train_start(self) -> None:\n    os.environ['COUNTER'] = 'trains'"),
            method("def on_train_end(self) -> None:\n    del os.environ['COUNTER']"))  # fmt: skip
    (line,) = failures()["global state is put back"].strip().splitlines()
    assert line.startswith("after a run that failed environment: COUNTER has changed: it was None and is 'trains'")


def test_a_subject_is_what_it_says(counter: Any, tmp_path: Path) -> None:
    counter()
    subject = Subject("counter", {"every": 3}, tmp_path)
    assert set(subject.hooks) == {"setup", "on_after_optimizer_step", "teardown"}
    assert subject.build().every == 3 and not subject.observer and not subject.launcher and not subject.bundle


LIBRARY = """
import os, warnings

used = False

def use():
    global used
    if not used:
        used = True
        os.environ["COUNTER"] = "the address of a service"
        warnings.filterwarnings("ignore", "a warning of this library")
"""


@pytest.mark.parametrize("where", ["at its first use", "in every run"])
def test_what_a_library_that_was_imported_before_adds_at_its_first_use_is_told_from_what_the_plugin_adds(
    where: str, counter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme_library.py").write_text(LIBRARY if where == "at its first use" else LIBRARY.replace("if not used", "if True"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(check, "CHECKS", (manners.global_state_is_put_back,))
    library = importlib.import_module("acme_library")
    try:
        counter(("self.count = 0", "self.count = 0; import acme_library; acme_library.use()"))
        if where == "at its first use":
            assert check_plugin("counter").passed == ["global state is put back"]
            assert os.environ["COUNTER"] == "the address of a service", "the library still has it"
            assert any("a warning of this library" in str(each) for each in warnings.filters)
        else:
            lines = failures()["global state is put back"]
            assert "after a run environment: COUNTER has changed" in lines and "after a run warning filters has changed" in lines
    finally:
        sys.modules.pop(library.__name__)
