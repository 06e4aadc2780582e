"""The benchmarks run and compare equal work, and what README and docs say of speed and size is on the page that they make."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": "1"}
PACKAGES = {"lightning": "lightning", "ignite": "ignite", "skorch": "skorch"}
INSTALLED = [name for name, module in PACKAGES.items() if importlib.util.find_spec(module)]
ABSENT = [name for name in PACKAGES if name not in INSTALLED]


# ---------------------------------------------------------------------- equal work

EQUAL = """
import json
import torch
import contenders
from measuring import Batches, quiet, unseen
from others import OTHERS

quiet()
installed = json.loads({installed!r})
ours = {{"bare": contenders.bare, "usual": contenders.usual, "clearing": contenders.raw_clearing, "by hand": contenders.by_hand}}
works = {{**ours, **{{f"{{name}}, {{level}}": OTHERS[name][0](level) for name in installed for level in OTHERS[name][1]}}}}
wanted = contenders.raw(Batches(60)).state_dict()
equal = {{}}
for name, work in works.items():
    with unseen():
        found = work(Batches(60)).state_dict()
    equal[name] = list(found) == list(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)
print(json.dumps(equal))
"""


@pytest.mark.slow
def test_every_contender_trains_the_same_network_to_the_bit(tmp_path: Path, programs: Any) -> None:
    code = EQUAL.format(installed=json.dumps(INSTALLED))
    done = programs.run(code, cwd=tmp_path, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    equal = json.loads(done.stdout.splitlines()[-1])
    assert len(equal) >= 4 + 3 * len(INSTALLED)
    assert [name for name, same in equal.items() if not same] == []


# ---------------------------------------------------------------------- the parts

PARTS = """
import json, math
from measuring import Batches, Table, beside, low
from plugin_costs import BUNDLED, LEFT_OUT

ticks = iter(range(1000))
batches = Batches(120, clocks=[lambda: next(ticks) ** 2])
assert len(list(batches)) == 120
values = iter([10.0, 11.0, 10.0, 14.0, 20.0, 22.0])
row = beside("a", lambda: next(values), lambda: next(values), 3)
table = Table({"": "{name}", "over": "{over:+.1f}", "none": "{absent:.2f}"}, [row, {"name": "b", "over": 1.0, "absent": None}])
print(json.dumps([batches.windows(), low([5, 1, *[9] * 8]), row, str(table), table["b"]["over"], sorted([*BUNDLED, *LEFT_OUT])]))
"""


def test_windows_pairs_and_tables_and_that_every_plugin_is_measured_or_named(tmp_path: Path, programs: Any) -> None:
    done = programs.run(PARTS, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    windows, tenth, row, table, over, plugins = json.loads(done.stdout.splitlines()[-1])
    assert windows == [1 / 50 * 1e6, 3 / 50 * 1e6], "of the 20 steps that are left over nothing is known"
    assert tenth == 5
    assert (row["base"], row["work"], row["over"], row["over_low"], row["over_high"]) == (10, 14, 2, 1, 4)
    assert row["ratio"] == 1.1
    assert table == "|  | over | none |\n| --- | --- | --- |\n| a | +2.0 |  |\n| b | +1.0 |  |" and over == 1.0
    assert plugins == sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))


def test_what_is_not_installed_is_named_with_what_to_do(tmp_path: Path, programs: Any) -> None:
    code = "import importlib.util as u, measuring; u.find_spec = lambda name: None; print(measuring.taking_part(['ignite'], ['ignite']))"
    assert programs.run(code, cwd=tmp_path, env=ENVIRONMENT).stdout.split() == ["[]"]
    done = programs.run(code.replace("['ignite'])", "['skorch'])"), cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "'ignite' is not installed: pip install pytorch-ignite, or leave it out with --without ignite" in done.stderr


# ---------------------------------------------------------------------- the page


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [["mlflow", "wandb"]])
def test_a_quick_run_writes_the_page_with_every_section_and_a_row_for_each_contender(left_out: list[str], tmp_path: Path) -> None:
    path, without = tmp_path / "page.md", [*left_out, *ABSENT]
    command = [sys.executable, str(BENCHMARKS / "run_all.py"), "--quick", f"--output={path}", *(f"--without={name}" for name in without)]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    text = path.read_text(encoding="utf-8")
    template = (BENCHMARKS / "page.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")}
    assert list(sections)[1:] == re.findall(r"^## (.*)$", template, re.MULTILINE)
    assert "{" not in text and "--quick" in text and "its figures mean nothing" in text
    assert str(tmp_path) not in text and os.uname().nodename not in text.split()
    for name in INSTALLED:
        for section in ("The time of a step", "Memory", "Start-up"):
            assert f"\n| {name}, " in sections[section], f"{section} has no row of {name}"
    for section in ("The time of a step", "Memory", "Start-up"):
        assert "\n| torchplug, bare |" in sections[section]
        assert not [name for name in ABSENT if f"\n| {name}, " in sections[section]]
    costs = sections["The cost of plugins"]
    assert re.findall(r"^\| (\d+) \|", costs, re.MULTILINE) == ["0", "1", "5", "10", "20", "50"]
    plugins = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
    assert sorted(re.findall(r"^\| `(\w+)` \|", costs, re.MULTILINE)) == [name for name in plugins if name not in left_out]
    assert re.findall(r"^\| (\d) \|", sections["Ranks"], re.MULTILINE) == ["1", "2"]
    for row in ("write, flushed", "background: what training waits for", "load, in a new process", "header"):
        assert f"\n| {row} |" in sections["Checkpoints"]
    for row in ("journal", "tensorboard", "all of them"):
        assert sections["Loggers"].count(f"\n| {row} |") == 2
    assert sections["GPU"].startswith("GPU\n\nNo GPU was at hand")
    assert re.search(r"^\| compared \| torch \S+, torchplug \d", text, re.MULTILINE)


FILLED = """
import argparse, importlib.util
import run_all
from measuring import Table

values = {"over": 1.25, "size": 524.0, "tensors": 50, "parameters": 84746, "millions": 50.4, "rounds": 57, "device": "a device"}
values["torch"] = "2"
names = ("torchplug, bare", "torchplug, one log", "write, flushed", "one update")
class AnyTable(dict):
    def __missing__(self, name):
        return Table({"measured": "{name}"}, [{"name": each, **values} for each in names])
run_all.measured = lambda *_: AnyTable()
importlib.util.find_spec = lambda name: name
run_all.versions = lambda names: ", ".join(names)
print(run_all.page(argparse.Namespace(without=["skorch"], gpu=True, quick=False), ["--gpu", "--without", "skorch"]))
"""


def test_every_place_of_the_page_is_filled(tmp_path: Path, programs: Any) -> None:
    """Before a long run ends with an error about a name."""
    done = programs.run(FILLED, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "one run of `python benchmarks/run_all.py --gpu --without skorch`" in done.stdout
    assert "524 MB of state in 50 tensors" in done.stdout and "an MLP of 84,746 parameters" in done.stdout
    assert "on a device with torch 2 (5 repeats, 1,000 steps)" in done.stdout and "No GPU was at hand" not in done.stdout
    assert "Left out: skorch." in done.stdout and "lightning, pytorch-ignite, tensorboard" in done.stdout
    assert "figures mean nothing" not in done.stdout and "{" not in done.stdout


def test_the_page_that_is_filled_in_holds_no_figure_itself() -> None:
    template = (BENCHMARKS / "page.md").read_text(encoding="utf-8")
    assert [each[0] for each in FIGURE.finditer(template)] == []
    assert {f"benchmarks/{path.name}" for path in BENCHMARKS.glob("*.py")} >= set(re.findall(r"benchmarks/\w+\.py", template))


# ---------------------------------------------------------------------- what is said elsewhere

FIGURE = re.compile(
    r"(?<![\w.,:/-])(\d[\d,]*(?:\.\d+)?) ?"
    r"(us|µs|ms|s|(?:micro|milli)?seconds?|minutes|[kKMG]i?B|kilobytes?|megabytes?|%|times (?:faster|slower|as))(?![\w-])"
)
# limits and times that are set, not measured, by page
SET: dict[str, set[str]] = {
    "docs/distributed.md": {"25 seconds", "15 minutes", "30 minutes"},
    "docs/loggers.md": {"10 s", "60 s", "30 s"},
    "docs/preemption.md": {"60 s", "10 seconds"},
}
CITING = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in ("performance.md", "decisions.md"))]


each_page = pytest.mark.parametrize("page", CITING, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def numbers() -> set[str]:
    """What stands on the page of the benchmarks."""
    measured = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    return set(re.findall(r"(?<![\w.,])[+-]?(\d[\d,]*(?:\.\d+)?)(?![\w,.]*\d)", measured))


@each_page
def test_a_figure_that_was_measured_is_on_the_page_of_the_benchmarks(page: Path, numbers: set[str]) -> None:
    shown = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = {each[0]: each[1] for each in FIGURE.finditer(shown)}
    fixed = SET.get(str(page.relative_to(ROOT)), set())
    assert {text for text, number in found.items() if text not in fixed and number not in numbers} == set()
    assert fixed <= set(found), "what is no longer said needs no exception"


@each_page
def test_a_table_of_figures_is_on_the_page_of_the_benchmarks(page: Path, numbers: set[str]) -> None:
    rows = [line.strip("| ").split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = {cell for row in rows for cell in row if re.fullmatch(r"([+-]?\d+\.\d+(, | to )?)+", cell)}
    assert {cell for cell in cells if not set(re.findall(r"\d+\.\d+", cell)) <= numbers} == set()
