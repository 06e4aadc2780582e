"""Nothing is held longer than the step that needs it, and a long run takes no more memory than a short one."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchplug import Module, hookimpl


class Watch:
    """Weak references to what belongs to a step: batches, outputs, what is inside of them, and activations."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Any]] = []
        self.checks = 0

    def see(self, *things: Any) -> None:
        for thing in things:
            if isinstance(thing, Tensor):
                self.alive.append(weakref.ref(thing))
            elif isinstance(thing, dict):
                self.see(*thing.values())
            elif isinstance(thing, (list, tuple)):
                self.see(*thing)

    def all_dead(self) -> None:
        left = [ref() for ref in self.alive if ref() is not None]
        assert not left, f"{len(left)} tensors of an earlier step are alive, of shapes {[tuple(each.shape) for each in left]}"
        self.checks += bool(self.alive)
        self.alive.clear()

    def loader(self, count: int) -> Fresh:
        return Fresh(self, count)


class Fresh:
    """A loader that makes each batch anew, and looks before it does whether everything of the last step is gone."""

    def __init__(self, watch: Watch, count: int) -> None:
        self.watch, self.count = watch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            self.watch.all_dead()
            yield self.batch()
        self.watch.all_dead()

    def batch(self) -> list[Tensor]:
        batch = [torch.randn(2, 4), torch.randn(2, 1)]
        self.watch.see(batch)
        return batch


@pytest.fixture
def watch() -> Iterator[Watch]:
    """With the garbage collector off: what only it would find is held too long."""
    gc.disable()
    try:
        yield Watch()
    finally:
        gc.enable()


@pytest.fixture
def watched(watch: Watch) -> Any:
    """A class of modules whose activations are watched too."""

    class Watched(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
            self.net[1].register_forward_hook(lambda module, args, output: watch.see(output))

        def loss(self, batch: Any) -> Tensor:
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            watch.see(loss)
            return loss

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            outputs = {"loss": loss, "more": loss * 2}
            watch.see(outputs)
            return outputs

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("val_loss", loss)
            return {"loss": loss}

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            prediction = self.net(batch[0])
            watch.see(prediction)
            return prediction

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    return Watched


class Listener:
    """Listens without keeping anything."""

    @hookimpl
    def on_train_batch_start(self, batch: Any) -> None:
        pass

    @hookimpl
    def on_train_batch_end(self, outputs: Any, batch: Any) -> None:
        pass

    @hookimpl
    def log_metrics(self, metrics: Any) -> None:
        pass


class Wrapper:
    """Wraps what touches a batch, which takes pluggy's own way of calling."""

    @hookimpl(wrapper=True)
    def train_batch(self) -> Any:
        return (yield)

    @hookimpl(wrapper=True)
    def train_step(self) -> Any:
        return (yield)

    @hookimpl(wrapper=True)
    def backward(self) -> Any:
        return (yield)

    @hookimpl(wrapper=True)
    def validation_step(self) -> Any:
        return (yield)

    @hookimpl(wrapper=True)
    def evaluate(self) -> Any:
        return (yield)


@pytest.mark.parametrize(
    "options",
    [{}, {"log_every_n_steps": 1}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"},
     {"precision": "16-mixed", "nonfinite_loss": "ignore"}, {"max_time": "1h", "max_epochs": 2}, {"val_check_interval": 2}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("plugins", [[], [Listener], [Wrapper]], ids=["no plugins", "listener", "wrapper"])
def test_nothing_of_a_training_step_is_alive_when_the_next_batch_is_fetched(
    options: Any, plugins: Any, watch: Watch, watched: Any, trainer: Any
) -> None:
    trainer(plugins=[each() for each in plugins], **{"max_epochs": 2, **options}).fit(watched(), watch.loader(7), watch.loader(3))
    assert watch.checks >= 14


def test_nothing_of_a_skipped_step_is_alive(watch: Watch, watched: Any, trainer: Any) -> None:
    class Skipping(watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            return outputs if batch_idx % 2 else None

    trainer(accumulate_grad_batches=2).fit(Skipping(), watch.loader(6))
    assert watch.checks == 6


def test_nothing_of_a_step_with_two_optimizers_is_alive(watch: Watch, watched: Any, trainer: Any) -> None:
    class Two(watched):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.01) for i in (0, 2)]

    trainer().fit(Two(), watch.loader(5))
    assert watch.checks == 5


def test_nothing_of_a_manual_step_is_alive(watch: Watch, watched: Any, trainer: Any) -> None:
    class Manual(watched):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
            return loss

    trainer().fit(Manual(), watch.loader(5))
    assert watch.checks == 5


def test_nothing_of_a_step_that_evaluates_the_loss_again_is_alive(watch: Watch, watched: Any, trainer: Any) -> None:
    class Closed(watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    trainer().fit(Closed(), watch.loader(4))
    assert watch.checks == 4


@pytest.mark.parametrize("work", ["validate", "test"])
@pytest.mark.parametrize("loaders", [1, 2])
def test_nothing_of_an_evaluation_step_is_alive_when_the_next_batch_is_fetched(
    work: str, loaders: int, watch: Watch, watched: Any, trainer: Any
) -> None:
    getattr(trainer(log_every_n_steps=2), work)(watched(), [watch.loader(5) for _ in range(loaders)])
    assert watch.checks == 5 * loaders


def test_streamed_predictions_are_not_kept(watch: Watch, watched: Any, trainer: Any) -> None:
    assert trainer().predict(watched(), watch.loader(5), return_predictions=False) is None
    assert watch.checks == 5


def test_predictions_that_are_returned_keep_no_batch(watch: Watch, watched: Any, trainer: Any) -> None:
    class Plain(watched):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    assert len(trainer().predict(Plain(), watch.loader(5))) == 5
    assert watch.checks == 5


def test_gradients_are_gone_while_the_next_forward_runs(watched: Any, watch: Watch, trainer: Any) -> None:
    class Looking(watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert all(p.grad is None for p in self.parameters())
            return super().training_step(batch, batch_idx)

    trainer(max_epochs=2).fit(Looking(), watch.loader(4))


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_is_not_held_by_its_trainer_more_than_by_a_plain_attribute(fails: bool, watched: Any, watch: Watch, trainer: Any) -> None:
    """When trainer and module go, everything goes; nothing global keeps them."""

    class Sometimes(watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if fails:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    module, made = Sometimes(), trainer()
    try:
        made.fit(module, watch.loader(2))
    except RuntimeError as error:
        assert str(error) == "boom"
    parameter = weakref.ref(module.net[0].weight)
    del module, made
    gc.collect()
    assert parameter() is None


# ---------------------------------------------------------------------- long runs

LONG = """
import gc, json, os, sys, tempfile
import torch
from torchplug import Module, Trainer, hookimpl

torch.set_num_threads(1)
work, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 4)

    def training_step(self, batch):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("high", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return {"loss": loss, "more": batch[0] * 2}

    def validation_step(self, batch):
        self.log("val_loss", self.layer(batch[0]).square().mean(), on_step=True, on_epoch=True)

    def predict_step(self, batch):
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Batches:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            yield [torch.randn(32, 64)]


def measure():
    gc.collect()
    objects = gc.get_objects()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    tensors = sum(isinstance(each, torch.Tensor) for each in objects)
    return {"tensors": tensors, "objects": len(objects), "bytes": pages * os.sysconf("SC_PAGE_SIZE")}


class Meter:
    count = 0
    measured = []

    def step(self):
        self.count += 1
        if self.count in (first, last):
            self.measured.append(measure())

    @hookimpl
    def on_train_batch_end(self):
        if work in ("fit", "epochs"):
            self.step()

    @hookimpl
    def on_validation_batch_end(self):
        if work == "validate":
            self.step()

    @hookimpl
    def on_predict_batch_end(self):
        self.step()


meter = Meter()
options = {"plugins": [meter], "root_dir": tempfile.mkdtemp(), "accelerator": "cpu", "num_sanity_val_steps": 0}
if work == "fit":
    Trainer(max_epochs=1, **options).fit(Net(), Batches(last))
elif work == "epochs":
    Trainer(max_steps=last, **options).fit(Net(), Batches(5), Batches(2))
elif work == "validate":
    Trainer(**options).validate(Net(), Batches(last))
else:
    Trainer(**options).predict(Net(), Batches(last), return_predictions=False)
print(json.dumps(meter.measured))
"""


def _grown(programs: Any, work: str, first: int, last: int, tmp_path: Any) -> dict[str, int]:
    done = programs.run(LONG, work, str(first), str(last), timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    return {name: after[name] - before[name] for name in before}


@pytest.mark.slow
@pytest.mark.parametrize("work", ["fit", "epochs", "validate", "predict"])
def test_memory_is_flat_from_step_1000_to_10000(work: str, tmp_path: Any, programs: Any) -> None:
    """A batch is 8 KiB: if each of 9,000 steps left one behind, it would be 70 MiB; one tensor each would be 9,000."""
    grown = _grown(programs, work, 1_000, 10_000, tmp_path)
    assert grown["tensors"] <= 4 * 128  # values that wait to be added up, for each name that is logged
    assert grown["objects"] <= 1_500
    assert grown["bytes"] <= 8 * 2**20


@pytest.mark.slow
def test_memory_is_flat_over_a_few_hundred_steps(tmp_path: Any, programs: Any) -> None:
    """The same in short, for every run of the tests."""
    grown = _grown(programs, "epochs", 50, 400, tmp_path)
    assert grown["tensors"] <= 50
    assert grown["objects"] <= 200
