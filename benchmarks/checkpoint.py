"""What saving and loading a checkpoint costs: beside torch.save and torch.load, back to back, on the same disk.

The state is 500 MB (50 tensors of 10 MB). Each figure is the median over the repeats, with the range; a ratio is the median of
the ratios of the pairs. What was written is flushed before the clock starts, so that nobody pays for another one's file. The
checksums are always included. Loading is measured in a process of its own each time, as a job that goes on loads once, and
again in one process, where torch.load gets memory that was used before. "The same bytes alone" is one big write, flushed: no
file that survives a power cut is there sooner.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --folder /mnt/disk --repeats 9 --device cuda
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchplug import checkpoint
from torchplug.layout import place
from torchplug_checkpoint.writer import HostCopy, Writer

Work = Callable[[], Any]
State = dict[str, dict[str, Tensor]]


def make_state(tensors: int, device: str) -> State:
    """Tensors of 10 MB, each of which was written to."""
    return {"module": {f"layer{i}.weight": torch.randn(2_621_440, device=device) for i in range(tensors)}}


def size_of(state: State) -> int:
    return sum(tensor.nbytes for tensor in state["module"].values())


def flush(path: Path) -> None:
    """What it takes for a file to survive a power cut."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def save(path: Path, state: State, flushed: bool = False) -> None:
    """``torch.save``, as a loop by hand has it."""
    torch.save(state, path)
    if flushed:
        flush(path)


# ---------------------------------------------------------------------- times


def seconds(work: Work) -> float:
    os.sync()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compare(name: str, work: Work, base: Work, repeats: int, clock: Callable[[Work], float] = seconds) -> dict[str, Any]:
    """Pairs of ``base`` and ``work``, back to back, after one of each that does not count."""
    clock(base), clock(work)
    pairs = [(clock(base), clock(work)) for _ in range(repeats)]
    ratios = [there / here for here, there in pairs]
    row = {
        "name": name,
        "base": statistics.median(here for here, _ in pairs) * 1e3,
        "ms": statistics.median(there for _, there in pairs) * 1e3,
        "low": min(there for _, there in pairs) * 1e3,
        "high": max(there for _, there in pairs) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }
    spread, between = f"{row['low']:.0f} to {row['high']:.0f}", f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
    print(f"| {name} | {row['base']:.0f} | {row['ms']:.0f} | {spread} | {row['ratio']:.2f} | {between} |", flush=True)
    return row


def writing(state: State, folder: Path, repeats: int) -> list[dict[str, Any]]:
    ours, theirs, threads = folder / "a.safetensors", folder / "a.pt", Writer()
    copy = HostCopy()
    copy.take(state)  # the first one makes the buffers

    host = {name: tensor.cpu() for name, tensor in state["module"].items()}
    entries = place(host).values()

    def sums() -> None:
        found: list[int] = []
        checkpoint._in_threads(lambda entry: found.append(zlib.crc32(checkpoint._view(host[entry.name]))), entries)

    def alone() -> None:
        with open(folder / "bytes", "wb") as file:
            for tensor in host.values():
                file.write(checkpoint._view(tensor))
            file.flush()
            os.fsync(file.fileno())

    def background() -> None:
        taken = copy.take(state)
        threads.submit(lambda: (copy.ready(), checkpoint.write(ours, taken)))

    def clock(work: Work) -> float:
        took = seconds(work)
        threads.drain()  # one write is in flight at most
        return took

    rows = [
        compare("write, flushed", lambda: checkpoint.write(ours, state), lambda: save(theirs, state), repeats),
        compare("write, over torch.save flushed too", lambda: checkpoint.write(ours, state), lambda: save(theirs, state, True), repeats),
        compare("the same bytes alone, flushed", alone, lambda: save(theirs, state), repeats),
        compare("the checksums alone", sums, lambda: save(theirs, state), repeats),
        compare("background: what training waits for", background, lambda: save(theirs, state), repeats, clock),
    ]
    threads.close()
    return rows


def loading(state: State, folder: Path, repeats: int) -> list[dict[str, Any]]:
    ours, theirs = folder / "b.safetensors", folder / "b.pt"
    checkpoint.write(ours, state)
    save(theirs, state)
    state.clear()

    def fresh(job: str, path: Path) -> Work:
        return lambda: float(child(job, path)["seconds"])

    return [
        compare("load, in a new process", fresh("load", ours), fresh("torch.load", theirs), repeats, lambda work: float(work())),
        compare("load, again in the same process", lambda: checkpoint.load(ours), lambda: torch.load(theirs), repeats),
        compare("verify", lambda: checkpoint.verify(ours), lambda: torch.load(theirs), repeats),
        compare("header", lambda: checkpoint.header(ours), lambda: torch.load(theirs), repeats),
    ]


# ---------------------------------------------------------------------- in a process of its own


def child(job: str, path: Path, tensors: int = 0) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", job, "--folder", str(path), "--tensors", str(tensors)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def memory(name: str) -> int:
    """Bytes that this process has now (VmRSS), or had at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def in_child(job: str, path: Path, tensors: int) -> dict[str, Any]:
    """One job; how long it took, and how much memory it had beyond that before it."""
    state = make_state(tensors, "cpu")
    copy = HostCopy()

    def twice() -> None:
        for _ in range(2):
            taken = copy.take(state)
            checkpoint.write(path, taken)

    jobs: dict[str, Work] = {
        "load": lambda: checkpoint.load(path),
        "torch.load": lambda: torch.load(path),
        "write": lambda: checkpoint.write(path, state),
        "torch.save": lambda: save(path, state),
        "background": twice,
    }
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    took = seconds(jobs[job])
    return {"seconds": took, "extra": memory("VmHWM") - before}


def extra_memory(folder: Path, tensors: int) -> list[dict[str, Any]]:
    """Memory beyond the state, at its peak, as a share of the state."""
    size, rows = tensors * 2_621_440 * 4, []
    print("\n| extra memory at its peak | MB | of the state |\n|---|---|---|")
    jobs = [("torch.save", "c.pt", tensors), ("write", "c.safetensors", tensors), ("background", "c.safetensors", tensors)]
    for job, name, count in [*jobs, ("torch.load", "c.pt", 0), ("load", "c.safetensors", 0)]:
        extra = child(job, folder / name, count)["extra"]
        rows.append({"name": f"memory of {job}", "extra": extra, "share": extra / size})
        print(f"| {job} | {extra / 1e6:.0f} | {extra / size:.2f} |", flush=True)
    return rows


# ---------------------------------------------------------------------- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7, help="pairs for each row")
    parser.add_argument("--tensors", type=int, default=50, help="how many tensors of 10 MB")
    parser.add_argument("--device", default="cpu", help="where the state lies")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder otherwise")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(in_child(options.child, options.folder, options.tensors)))
        return
    torch.set_num_threads(1)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "safetensors", "torchplug")]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, state = Path(name), make_state(options.tensors, options.device)
        print(f"Python {platform.python_version()}, {', '.join(versions)}, {platform.machine()}, {os.cpu_count()} processors")
        print(f"1 thread of torch, {size_of(state) / 1e6:.0f} MB on {options.device}, milliseconds, median of {options.repeats} pairs\n")
        print("| | torch.save or torch.load | torchplug | range | ratio | range |\n|---|---|---|---|---|---|")
        rows = writing(state, folder, options.repeats) + loading(state, folder, options.repeats) + extra_memory(folder, options.tensors)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
