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

import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Row, Table, Tables, beside, child, program, quiet
from memory import resident
from torch import Tensor

from torchplug import checkpoint
from torchplug.layout import place
from torchplug_checkpoint.writer import HostCopy, Writer

Work = Callable[[], Any]
State = dict[str, dict[str, Tensor]]
TIMES = {
    "": "{name}",
    "torch.save or torch.load": "{base:.0f}",
    "torchplug": "{work:.0f}",
    "range": "{work_low:.0f} to {work_high:.0f}",
    "ratio": "{ratio:.2f}",
    "its range": "{ratio_low:.2f} to {ratio_high:.2f}",
}
MEMORY = {"extra memory at its peak": "{name}", "MB": "{extra:.0f}", "of the state": "{share:.2f}"}


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


def compare(name: str, work: Work, base: Work, repeats: int, clock: Callable[[Work], float] = seconds) -> Row:
    """Pairs of ``base`` and ``work``, in milliseconds, after one of each that does not count."""
    clock(base), clock(work)
    return beside(name, lambda: clock(base) * 1e3, lambda: clock(work) * 1e3, repeats)


def writing(state: State, folder: Path, repeats: int) -> list[Row]:
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


def loading(state: State, folder: Path, repeats: int) -> list[Row]:
    ours, theirs = folder / "b.safetensors", folder / "b.pt"
    checkpoint.write(ours, state)
    save(theirs, state)
    state.clear()

    def fresh(job: str, path: Path) -> Work:
        return lambda: float(apart(job, path)["seconds"])

    return [
        compare("load, in a new process", fresh("load", ours), fresh("torch.load", theirs), repeats, lambda work: float(work())),
        compare("load, again in the same process", lambda: checkpoint.load(ours), lambda: torch.load(theirs), repeats),
        compare("verify", lambda: checkpoint.verify(ours), lambda: torch.load(theirs), repeats),
        compare("header", lambda: checkpoint.header(ours), lambda: torch.load(theirs), repeats),
    ]


# ---------------------------------------------------------------------- in a process of its own


def apart(job: str, path: Path, tensors: int = 0) -> Row:
    """`in_child` in a new interpreter."""
    found: Row = child(f"import json, checkpoint; print(json.dumps(checkpoint.in_child({job!r}, {str(path)!r}, {tensors})))")
    return found


def in_child(job: str, name: str, tensors: int) -> Row:
    """One job; how long it took, and how much memory it had beyond that before it."""
    quiet()
    path = Path(name)
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
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    took = seconds(jobs[job])
    return {"seconds": took, "extra": (resident("VmHWM") - before) / 1e6}


def extra_memory(folder: Path, tensors: int, size: float) -> list[Row]:
    """Megabytes beyond the state, at the peak, and as a share of the state."""
    jobs = [("torch.save", "c.pt", tensors), ("write", "c.safetensors", tensors), ("background", "c.safetensors", tensors)]
    jobs += [("torch.load", "c.pt", 0), ("load", "c.safetensors", 0)]
    rows = []
    for job, name, count in jobs:
        print(f"  memory of {job}", file=sys.stderr, flush=True)
        extra = apart(job, folder / name, count)["extra"]
        rows.append({"name": job, "extra": extra, "share": extra / size})
    return rows


def tables(repeats: int = 7, tensors: int = 50, device: str = "cpu", folder: str = "") -> Tables:
    """So many tensors of 10 MB on a device; a temporary folder is made where none is named."""
    with tempfile.TemporaryDirectory(dir=folder or None) as name:
        state = make_state(tensors, device)
        size = size_of(state) / 1e6
        times = writing(state, Path(name), repeats) + loading(state, Path(name), repeats)
        memory = extra_memory(Path(name), tensors, size)
    return {"times": Table(TIMES, [{**row, "size": size, "tensors": tensors} for row in times]), "memory": Table(MEMORY, memory)}


if __name__ == "__main__":
    program(tables)
