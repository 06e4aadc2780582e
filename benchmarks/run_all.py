"""Runs all benchmarks and writes docs/performance.md: the text of page.md with the tables and figures of this run.

    python benchmarks/run_all.py                       # needs: pip install lightning pytorch-ignite skorch
    python benchmarks/run_all.py --without skorch      # without one of them, which the page says
    python benchmarks/run_all.py --gpu                 # also on this machine's GPU
    python benchmarks/run_all.py --quick --output try.md   # whether it works; the figures mean nothing

Every benchmark is a program of its own and runs after the others; its tables come back as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import CONTENDERS, HERE, WINDOW, Table, Tables, taking_part

PAGE = HERE.parent / "docs" / "performance.md"
# by the name of each: its size in a whole run, and in a quick one
BENCHMARKS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "overhead": ({"repeats": 7, "steps": 3000}, {"repeats": 1, "steps": 100}),
    "plugin_costs": ({"repeats": 7, "steps": 3000}, {"repeats": 1, "steps": 100}),
    "checkpoint": ({"repeats": 7, "tensors": 50}, {"repeats": 1, "tensors": 2}),
    "loggers": ({"repeats": 3, "records": 200_000}, {"repeats": 1, "records": 1000}),
    "memory": ({"first": 1000, "last": 10_000}, {"first": 50, "last": 100}),
    "ranks": ({"repeats": 5, "steps": 1500}, {"repeats": 1, "steps": 100}),
    "startup": ({"repeats": 5}, {"repeats": 1}),
    "listing": ({"repeats": 15}, {"repeats": 1}),
    "averaging": ({"repeats": 7, "steps": 3000, "updates": 60}, {"repeats": 1, "steps": 100, "updates": 8}),
    "lr_methods": ({"seeds": 2, "epochs": 4}, {"seeds": 1, "epochs": 1}),
}
GPU = ({"repeats": 5, "steps": 1000}, {"repeats": 1, "steps": 200})
LEAVES_OUT = ("overhead", "plugin_costs", "loggers", "memory", "startup")  # know --without
COMPARED = ("torch", "torchplug", "pluggy", "safetensors", *(package for _, package in CONTENDERS.values()))
QUICK = " **It was a quick run (`--quick`), which shows that everything works: its figures mean nothing.**"
NO_GPU = """No GPU was at hand when this page was made, so it says nothing about one.
`python benchmarks/run_all.py --gpu` measures on a machine that has one."""
ON_GPU = """`python benchmarks/gpu.py` on {rows[0][device]} with torch {rows[0][torch]} ({options}): microseconds per step by the clock;
the device is waited for at the ends of windows of {window} steps.

{table}"""


def measured(name: str, size: dict[str, int], without: Sequence[str]) -> Tables:
    """The tables of one benchmark, run as its own program."""
    print(name, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tables.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(path)]
        command += [f"--{option}={value}" for option, value in size.items()]
        command += [f"--without={each}" for each in without if name in LEAVES_OUT]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
        if subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"{name} failed: nothing is written")
        return {each: Table(**table) for each, table in json.loads(path.read_text(encoding="utf-8")).items()}


def said(size: dict[str, int]) -> str:
    """``{"repeats": 7, "steps": 3000}`` as "7 repeats, 3,000 steps"."""
    texts = {"first": "looked at after {:,}", "last": "and {:,} steps"}
    return ", ".join(texts.get(name, f"{{:,}} {name}").format(value) for name, value in size.items()).replace(", and", " and")


# ---------------------------------------------------------------------- where it ran


def machine() -> str:
    """The processor, how much of it and of memory there is, and the system; no name of a host."""
    system = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    try:
        model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        model = " ".join(model.partition(":")[2].split())
    except (OSError, StopIteration):
        model = platform.machine()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.1f} GiB of memory, {system}"


def versions(names: Sequence[str]) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def plugins() -> str:
    """The bundled plugins, by version."""
    found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    ours = sorted((name, version) for name, version in found.items() if name.startswith("torchplug-"))
    by_version: dict[str, list[str]] = {}
    for name, version in ours:
        by_version.setdefault(version, []).append(name.removeprefix("torchplug-"))
    return "; ".join(f"{', '.join(names)} {version}" for version, names in by_version.items())


def page(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """Everything, measured now."""
    there, begin = taking_part(list(CONTENDERS), options.without), time.monotonic()
    sizes = {name: size[options.quick] for name, size in BENCHMARKS.items()}
    tables: dict[str, Any] = {name: measured(name, size, options.without) for name, size in sizes.items()}
    tables |= {f"{name}_options": said(size) for name, size in sizes.items()}
    gpu = NO_GPU
    if options.gpu:
        table = measured("gpu", size := GPU[options.quick], ())["steps"]
        gpu = ON_GPU.format(rows=table.rows, options=said(size), window=WINDOW, table=table)
    packages = [package for name, (_, package) in CONTENDERS.items() if name not in there]
    return (HERE / "page.md").read_text(encoding="utf-8").format(
        **tables,
        gpu=gpu,
        command=shlex.join(["python", "benchmarks/run_all.py", *arguments]),
        quick=QUICK if options.quick else "",
        date=f"{datetime.date.today()}",
        minutes=f"{(time.monotonic() - begin) / 60:.0f}",
        machine=machine(),
        python=platform.python_version(),
        versions=versions([name for name in COMPARED if name not in packages]),
        plugins=plugins(),
        window=WINDOW,
        left_out=f"Left out: {', '.join(packages)}." if packages else "",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Run all benchmarks and write docs/performance.md.")
    parser.add_argument("--without", action="append", default=[], choices=list(CONTENDERS), help="leave this out")
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU of this machine too")
    parser.add_argument("--quick", action="store_true", help="sizes so small that the figures mean nothing")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write, docs/performance.md unless given")
    options = parser.parse_args()
    arguments = [word for word in sys.argv[1:] if not word.startswith("--output") and word != str(options.output)]
    options.output.write_text(page(options, arguments), encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
