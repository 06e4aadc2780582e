"""What it takes until training begins: importing a trainer, building one, and the first step of a new process.

Each contender is a small program of its own, started in turn with the others; the figures are its CPU time, so that a slow disk
and other processes fall out. The first round, which writes byte code, does not count.

    python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

from measuring import Row, Table, Tables, child, program, spread, taking_part

COLUMNS = {
    "": "{name}",
    "import, beyond `import torch`": "{imported:.0f}",
    "range": "{imported_low:.0f} to {imported_high:.0f}",
    "trainer built": "{built:.1f}",
    "first step is over, from the start of the process": "{first:.0f}",
    "its range": "{first_low:.0f} to {first_high:.0f}",
    "beyond the loop by hand": "{beyond:+.0f}",
}

# the parts of a program: what it imports, how it builds a trainer, how it trains
BEFORE = """
import json, os, tempfile, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
times = [time.process_time()]
{imports}
times.append(time.process_time())
class Batches:
    def __len__(self):
        return 2
    def __iter__(self):
        yield torch.randn(32, 32), torch.zeros(32, dtype=torch.int64)
        times.append(time.process_time())
        print("\\n" + json.dumps(times), flush=True)
        os._exit(0)  # of the rest nothing is asked
network = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
loss_of = torch.nn.functional.cross_entropy
folder = tempfile.gettempdir()
{module}
begin = time.process_time()
{build}
times.append(time.process_time() - begin)
{train}
"""
MODULE = """
class Net({base}):
    def __init__(self):
        super().__init__()
        self.net = network
    def training_step(self, batch, batch_idx):
        loss = loss_of(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
"""
LOOP = """
optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
def step(engine, batch):
    loss = loss_of(network(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
OURS = 'trainer = Trainer(max_epochs=1, accelerator="cpu", root_dir=tempfile.mkdtemp(){plugins})'
LIGHTNING = 'trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tempfile.mkdtemp(){rest})'
OFF = ", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False"
SKORCH = """
trainer = NeuralNetClassifier(
    network, criterion=torch.nn.CrossEntropyLoss, iterator_train=lambda *_, **__: Batches(), train_split=None
)
"""
PROGRAMS: dict[str, dict[str, str]] = {
    "loop by hand": {"imports": "", "module": LOOP, "build": "", "train": "for batch in Batches(): step(None, batch)"},
    "torchplug, bare": {
        "imports": "from torchplug import *",
        "module": MODULE.format(base="Module"),
        "build": OURS.format(plugins=", plugins=[]"),
        "train": "trainer.fit(Net(), Batches())",
    },
    "torchplug, standard plugins": {
        "imports": "from torchplug import *",
        "module": MODULE.format(base="Module"),
        "build": OURS.format(plugins=""),
        "train": "trainer.fit(Net(), Batches())",
    },
    "lightning, bare": {
        "imports": "import lightning",
        "module": MODULE.format(base="lightning.LightningModule"),
        "build": LIGHTNING.format(rest=OFF),
        "train": "trainer.fit(Net(), Batches())",
    },
    "lightning, as it comes": {
        "imports": "import lightning",
        "module": MODULE.format(base="lightning.LightningModule"),
        "build": LIGHTNING.format(rest=""),
        "train": "trainer.fit(Net(), Batches())",
    },
    "ignite, bare": {
        "imports": "from ignite.engine import Engine",
        "module": LOOP,
        "build": "trainer = Engine(step)",
        "train": "trainer.run(Batches(), max_epochs=1)",
    },
    "skorch, as it comes": {
        "imports": "from skorch import NeuralNetClassifier",
        "module": "data = torch.utils.data.TensorDataset(torch.randn(64, 32), torch.zeros(64, dtype=torch.int64))",
        "build": SKORCH,
        "train": "trainer.fit(data, None)",
    },
}


def started(parts: dict[str, str]) -> Row:
    """Milliseconds of one process."""
    after_torch, after_import, built, first = child(BEFORE.format(**parts))
    return {"imported": (after_import - after_torch) * 1e3, "built": built * 1e3, "first": first * 1e3}


def tables(repeats: int = 5, without: Sequence[str] = ()) -> Tables:
    """All contenders, in turn."""
    others = taking_part(["lightning", "ignite", "skorch"], without)
    names = [name for name in PROGRAMS if name.partition(",")[0] in ("loop by hand", "torchplug", *others)]
    rounds: list[dict[str, Row]] = []
    for number in range(repeats + 1):
        print(f"  round {number} of {repeats}", file=sys.stderr, flush=True)
        rounds.append({name: started(PROGRAMS[name]) for name in names})
    rows = []
    for name in names:
        row: Row = {"name": name}
        for key in ("imported", "built", "first"):
            row |= spread(key, [each[name][key] for each in rounds[1:]])
        rows.append(row | {"beyond": statistics.median(each[name]["first"] - each["loop by hand"]["first"] for each in rounds[1:])})
    return {"processes": Table(COLUMNS, rows)}


if __name__ == "__main__":
    program(tables)
