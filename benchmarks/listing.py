"""What ``torchplug plugins`` costs beyond the start of the interpreter, as things are and with 300 packages more, of which 20 are plugins.

CPU time of whole processes, started in turn: an interpreter that does nothing, and one that lists. The 300 are metadata folders
as pip leaves them, beside whatever the environment has. It ends with an error where the median is over the limit.

    python benchmarks/listing.py
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import Row, Table, Tables, beside, program

LIST = "import sys; from torchplug.cli import main; sys.exit(main(['plugins']))"
LIMIT = 50  # milliseconds
COLUMNS = {
    "installed": "{name}",
    "interpreter alone": "{base:.1f}",
    "listing, beyond that": "{over:.1f}",
    "range": "{over_low:.1f} to {over_high:.1f}",
}


def site(folder: Path) -> None:
    """300 packages: 20 are plugins, each third of the others has a command."""
    for i in range(300):
        info = folder / f"package_{i}-1.{i}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: package-{i}\nVersion: 1.{i}\n\n" + "A text.\n" * 200)
        if i < 20 or i % 3 == 0:
            (info / "entry_points.txt").write_text(f"[{'torchplug' if i < 20 else 'console_scripts'}]\nname_{i} = package_{i}:Class\n")


def spent(code: str, folder: Path) -> float:
    """Milliseconds of CPU time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(folder)}, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def tables(repeats: int = 15) -> Tables:
    there = sum(1 for _ in importlib.metadata.distributions())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for installed in (f"{there} packages", f"{there + 300} packages"):
            spent(LIST, folder)  # byte code and disk caches
            rows.append(beside(installed, lambda: spent("pass", folder), lambda: spent(LIST, folder), repeats))
            if len(rows) == 1:
                site(folder)
    return {"command": Table(COLUMNS, rows)}


def main() -> None:
    found: list[Tables] = []

    def measure(repeats: int = 15) -> Tables:
        found.append(tables(repeats))
        return found[-1]

    program(measure)
    if found[-1]["command"].rows[-1]["over"] > LIMIT:
        sys.exit(f"over the limit of {LIMIT} ms")


if __name__ == "__main__":
    main()
