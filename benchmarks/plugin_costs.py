"""What plugins cost per step: from none to fifty that listen or stay silent, and each of the bundled ones.

Listening plugins are measured without a step, where a tenth of a microsecond is seen, beside the same trainer without them. The
bundled ones are measured in real steps with one log, beside the same trainer without them, in windows of CPU time as in
`overhead.py`; what their threads do counts. What a plugin does at the ends of a run or of an epoch is not in a figure.

    python benchmarks/plugin_costs.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from contenders import Net, Validated, measure, nothing, with_torchplug
from measuring import CONTENDERS, WINDOW, Row, Table, Tables, beside, program, taking_part

from torchplug import hookimpl

COUNTS = (0, 1, 5, 10, 20, 50)
BUNDLED: dict[str, Any] = {
    "accumulation_schedule": {"scheduling": {0: 1}},
    "checkpoint": {"every_n_steps": 500},
    "csv": {},
    "device_stats": {},
    "early_stopping": {"monitor": "val_loss"},
    "ema": {"decay": 0.999},
    "freeze": {"frozen": ["net.l1"]},
    "grad_norm": {},
    "journal": {},
    "lambda_hooks": {"hooks": {"on_train_batch_end": lambda run: None}},
    "lr_monitor": {},
    "mlflow": {},
    "profiler": {"timeline": False},
    "progress": {},
    "standard": {},
    "summary": {},
    "swa": {"start": 0, "every_n_steps": 1},
    "tensorboard": {},
    "throughput": {},
    "wandb": {"mode": "offline"},
}
LEFT_OUT = {
    "batch_size_finder": "works in `trainer.tune`",
    "ddp": "needs several processes, see Ranks",
    "fsdp": "needs several processes",
    "gpu": "needs a GPU, see GPU",
    "lr_finder": "works in `trainer.tune`",
    "prediction_writer": "works in `trainer.predict`",
    "ray": "needs processes that Ray starts",
}
COUNTED = {
    "plugins": "{name}",
    "they listen to two events of each batch": "{over:+.2f}",
    "range": "{over_low:+.2f} to {over_high:+.2f}",
    "they listen to none": "{silent:+.2f}",
    "the range": "{silent_low:+.2f} to {silent_high:+.2f}",
}
EACH = {
    "plugin": "`{name}`",
    "without it": "{base:.1f}",
    "with it": "{work:.1f}",
    "what it adds": "{over:+.2f}",
    "range": "{over_low:+.2f} to {over_high:+.2f}",
}


class Listens:
    """Listens to two events of every batch."""

    @hookimpl
    def on_train_batch_start(self, run: Any, batch: Any, batch_idx: int) -> None:
        pass

    @hookimpl
    def on_train_batch_end(self, run: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


class Silent:
    """Listens to nothing that happens per batch."""

    @hookimpl
    def on_fit_start(self, run: Any) -> None:
        pass


def counted(count: int, repeats: int, steps: int) -> Row:
    """So many plugins beside none; 0 shows how much two equal runs differ."""
    none = nothing()
    sides = [nothing(*({f"{side.__name__.lower()}_{i}": side()} for i in range(count))) for side in (Listens, Silent)]
    for work in (none, *sides):
        measure(work, WINDOW * 4)
    listening, silent = (
        beside(f"{count}", lambda: measure(none, steps), lambda work=work: measure(work, steps), repeats)  # type: ignore[misc]
        for work in sides
    )
    return {**listening, "silent": silent["over"], "silent_low": silent["over_low"], "silent_high": silent["over_high"]}


def alone(name: str, options: dict[str, Any], repeats: int, steps: int) -> Row:
    """One of the bundled plugins, beside the same trainer without any."""
    module = Validated if name == "early_stopping" else Net
    without, there = (with_torchplug(module, *given, logs=True) for given in ([], [{name: options}]))
    for work in (without, there):
        measure(work, WINDOW * 4)
    return beside(name, lambda: measure(without, steps), lambda: measure(there, steps), repeats)


def tables(repeats: int = 7, steps: int = 3000, without: Sequence[str] = ()) -> Tables:
    """The two tables, and a third that says which plugins are not in the second."""
    absent = set(CONTENDERS) - set(taking_part([name for name in CONTENDERS if name in BUNDLED], without))
    bundled = [alone(name, options, repeats, steps) for name, options in BUNDLED.items() if name not in absent]
    left_out = [{"name": name, "why": why} for name, why in LEFT_OUT.items()]
    return {
        "counts": Table(COUNTED, [counted(count, repeats, steps) for count in COUNTS]),
        "bundled": Table(EACH, bundled),
        "left_out": Table({"not in the table": "`{name}`", "because it": "{why}"}, left_out),
    }


if __name__ == "__main__":
    program(tables)
