"""What ``torchplug plugins`` costs beyond the start of the interpreter, with 300 packages installed, of which 20 are plugins.

    python benchmarks/listing.py [--repeats 15]

CPU time of whole processes, started in turn: an interpreter that does nothing, and one that lists. The 300 are metadata folders
as pip leaves them, beside whatever the environment has.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LIST = "import sys; from torchplug.cli import main; sys.exit(main(['plugins']))"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        site(Path(folder))
        spent(LIST, Path(folder))  # byte code and disk caches
        pairs = [(spent("pass", Path(folder)), spent(LIST, Path(folder))) for _ in range(repeats)]
    beyond = [listing - start for start, listing in pairs]
    print(f"interpreter alone     {statistics.median(start for start, _ in pairs):6.1f} ms")
    print(f"listing, beyond that  {statistics.median(beyond):6.1f} ms ({min(beyond):.1f} to {max(beyond):.1f}, limit 50)")
    if statistics.median(beyond) > 50:
        sys.exit("over the limit")


if __name__ == "__main__":
    main()
