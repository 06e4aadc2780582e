"""What the schedule promises: the weights of a hand-written loop with the same windows, and exact resume."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchplug import Module, PluginError, Trainer, hookimpl, seed_everything
from torchplug.checkpoint import CheckpointError
from torchplug.testing import check_plugin
from torchplug_accumulation_schedule import AccumulationSchedule


def batches(count: int = 7) -> list[Tensor]:
    return list(torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(1)))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class Steps:
    """Notes (epoch, batch) of each optimizer step, and the length of its window."""

    def __init__(self) -> None:
        self.all: list[tuple[int, int]] = []
        self.windows: list[int] = []

    @hookimpl
    def on_after_optimizer_step(self, run: Any) -> None:
        self.all.append((run.position.epoch, run.position.batch))
        self.windows.append(run.window)


def schedule(**options: Any) -> AccumulationSchedule:
    return AccumulationSchedule(**options)


def fit(path: Any, module: Any, *plugins: Any, data: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    trainer = Trainer(**{"max_epochs": 4, "root_dir": path, "log_every_n_steps": 1, **options}, plugins=list(plugins))
    trainer.fit(module, batches() if data is None else data, ckpt_path=ckpt_path)
    return trainer.run


def by_hand(data: list[Tensor], lengths: list[int]) -> nn.Sequential:
    """The plain loop: ``lengths`` by epoch, the loss divided by the true length of each window."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for length in lengths:
        for start in range(0, len(data), length):
            window = data[start : start + length]
            for batch in window:
                (net(batch).square().mean() / len(window)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return net


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("accumulation_schedule", scheduling={0: 1, 1: 2})


@pytest.mark.parametrize(
    ("scheduling", "lengths"),
    [
        ({0: 3, 2: 2}, [3, 3, 2, 2]),
        ({1: 4, 3: 1}, [1, 4, 4, 1]),
        ({2: 5, 0: 8, 1: 7}, [8, 7, 5, 5]),
        ({9: 3}, [1, 1, 1, 1]),
    ],
)
def test_weights_are_bit_for_bit_those_of_a_loop_with_these_windows(tmp_path: Any, scheduling: Any, lengths: list[int]) -> None:
    module = Net()
    torch.manual_seed(4)
    run = fit(tmp_path, module, schedule(scheduling=scheduling))
    torch.manual_seed(4)
    assert equal(module.net, by_hand(batches(), lengths))
    assert run.position.step == sum(-(-7 // length) for length in lengths)


@settings(max_examples=25, deadline=None)
@given(
    scheduling=st.dictionaries(st.integers(0, 4), st.integers(1, 6), min_size=1),
    count=st.integers(1, 6),
)
def test_steps_are_where_the_definition_says(tmp_path_factory: Any, scheduling: dict[int, int], count: int) -> None:
    steps = Steps()
    fit(tmp_path_factory.mktemp("runs"), Net(), schedule(scheduling=scheduling), steps, data=batches(count), max_epochs=4)
    places, windows = [], []
    length = 1
    for epoch in range(4):
        length = scheduling.get(epoch, length)
        for start in range(0, count, length):
            windows.append(min(length, count - start))
            places.append((epoch, start + windows[-1] - 1))
    assert (steps.all, steps.windows) == (places, windows)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 9])
def test_one_length_is_what_the_trainer_does_with_it(tmp_path: Any, length: int) -> None:
    states = []
    for plugins, accumulate in ([schedule(scheduling={0: length})], 1), ([], length):
        torch.manual_seed(4)
        run = fit(tmp_path, Net(), *plugins, accumulate_grad_batches=accumulate)
        states.append([*run.module.state_dict().values(), torch.get_rng_state()])
        states[-1] += [torch.tensor(run.metrics["loss"]), torch.tensor(run.position.step)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


class Stream(IterableDataset[Tensor]):
    """Gives ``count`` samples and does not say how many."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        yield from torch.cat(batches())[: self.count]


@pytest.mark.parametrize("count", [14, 12, 6, 2])
def test_a_loader_without_a_length_has_the_true_short_window_too(tmp_path: Any, count: int) -> None:
    module = Net()
    loader = DataLoader(Stream(count), batch_size=2, generator=torch.Generator())  # the global one is left to dropout
    torch.manual_seed(4)
    run = fit(tmp_path, module, schedule(scheduling={0: 3, 2: 1, 3: 2}), data=loader)
    torch.manual_seed(4)
    hand = by_hand(batches()[: count // 2], [3, 3, 1, 2])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(module.net.state_dict().values(), hand.state_dict().values(), strict=True))
    assert run.position.step == sum(-(-count // 2 // length) for length in [3, 3, 1, 2])


@pytest.mark.parametrize("said", [3, 5, 9])
def test_a_loader_whose_length_is_wrong_trains_on_all_that_it_gives(tmp_path: Any, said: int) -> None:
    class Lies:
        def __len__(self) -> int:
            return said

        def __iter__(self) -> Any:
            return iter(batches())

    scheduled, steps, plain, plain_steps = Net(), Steps(), Net(), Steps()
    for module, watch, plugins, accumulate in (scheduled, steps, [schedule(scheduling={0: 2})], 1), (plain, plain_steps, [], 2):
        torch.manual_seed(4)
        fit(tmp_path, module, watch, *plugins, data=Lies(), max_epochs=2, accumulate_grad_batches=accumulate)
    assert steps.all == plain_steps.all and equal(scheduled, plain)


def test_skipped_batches_leave_a_true_mean(tmp_path: Any) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    one, other = Skips(), Skips()
    for module, plugins, accumulate in (one, [schedule(scheduling={0: 3})], 1), (other, [], 3):
        torch.manual_seed(4)
        fit(tmp_path, module, *plugins, accumulate_grad_batches=accumulate)
    assert equal(one, other)


def test_a_stop_waits_for_the_end_of_a_window(tmp_path: Any) -> None:
    class Stops:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            if run.position.micro_step == 9:
                run.request_stop("enough")

    run = fit(tmp_path, Net(), schedule(scheduling={0: 2, 1: 5}), Stops())
    assert (run.position.epoch, run.position.batch, run.position.step) == (1, 5, 5)


def test_half_precision_and_clipping_see_whole_windows(tmp_path: Any) -> None:
    ends = []
    for plugins, accumulate in ([schedule(scheduling={0: 4})], 1), ([], 4):
        torch.manual_seed(4)
        options = {"precision": "16-mixed", "gradient_clip_val": 0.01, "accumulate_grad_batches": accumulate}
        ends.append(fit(tmp_path, Net(), *plugins, data=batches(20), max_epochs=3, **options).module)
    assert equal(*ends)


# ---------------------------------------------------------------------- a run that goes on from a checkpoint


class Saves:
    """Saves after every batch; where a window is open, as soon as it is not."""

    def __init__(self, path: Any) -> None:
        self.path = path

    @hookimpl
    def on_train_batch_end(self, run: Any) -> None:
        run.save_checkpoint(self.path / f"{run.position.micro_step}.safetensors")

    @hookimpl
    def on_train_epoch_end(self, run: Any) -> None:
        run.save_checkpoint(self.path / f"end-{run.position.epoch}.safetensors")


def shuffled() -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.cat(batches())), batch_size=2, shuffle=True, collate_fn=lambda samples: torch.stack([x for (x,) in samples])
    )


POINTS = [*range(1, 28), "end-0", "end-1", "end-2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Any:
    path = tmp_path_factory.mktemp("whole")
    seed_everything(3)
    steps = Steps()
    run = fit(path, Net(), schedule(scheduling={0: 3, 1: 5, 2: 2}), Saves(path), steps, data=shuffled())
    return path, run.state(), run.metrics.results(), steps


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_goes_on_from_any_batch_is_the_uninterrupted_one(tmp_path: Any, whole: Any, point: Any) -> None:
    path, state, metrics, steps = whole
    seed_everything(99)
    rest = Steps()
    run = fit(tmp_path, Net(), schedule(scheduling={0: 3, 1: 5, 2: 2}), rest, data=shuffled(), ckpt_path=path / f"{point}.safetensors")
    own = run.state()
    for name in ("module", "generators", "position"):
        assert _alike(own[name], state[name]), name
    assert _alike(own["optimizers"][0]["state"], state["optimizers"][0]["state"])
    assert (run.metrics.results(), steps.all[len(steps.all) - len(rest.all) :]) == (metrics, rest.all)
    assert steps.windows[len(steps.all) - len(rest.all) :] == rest.windows


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other) if not hasattr(one, "shape") else bool((one == other).all())


def test_another_schedule_is_refused_unless_it_is_left_out(tmp_path: Any, whole: Any) -> None:
    path, *_ = whole
    with pytest.raises(ValueError, match=r"written with scheduling=\{0: 3, 1: 5, 2: 2\}, now it is \{0: 2\}; set it back, or let another"):
        fit(tmp_path, Net(), schedule(scheduling={0: 2}), data=shuffled(), ckpt_path=path / "end-1.safetensors")
    with pytest.raises(CheckpointError, match="accumulate_grad_batches was 2, is 1"):
        fit(tmp_path, Net(), data=shuffled(), ckpt_path=path / "end-1.safetensors")
    reordered = schedule(scheduling={2: 2, 1: 5, 0: 3})  # is no other one
    run = fit(tmp_path, Net(), reordered, data=shuffled(), ckpt_path=path / "end-1.safetensors")
    assert run.position.step == whole[1]["position"]["step"]
    trainer = Trainer(max_epochs=4, root_dir=tmp_path, plugins=[schedule(scheduling={0: 7})])
    trainer.fit(Net(), shuffled(), ckpt_path=path / "end-1.safetensors", resume={"exclude": ["plugin:accumulation_schedule", "data"]})
    assert trainer.run is not None and trainer.run.position.step == 3 + 2 + 2


def test_an_instance_of_another_name_is_left_out_by_that_name(tmp_path: Any) -> None:
    def named(scheduling: Any) -> Any:
        return Trainer(
            max_epochs=2, root_dir=tmp_path, plugins=[{"accumulation_schedule:own": {"scheduling": scheduling}}, Saves(tmp_path)]
        )

    named({0: 3}).fit(Net(), batches())
    with pytest.raises(ValueError, match=r"begin with resume=\{'exclude': \['plugin:accumulation_schedule:own'\]\}"):
        named({0: 3, 5: 2}).fit(Net(), batches(), ckpt_path=tmp_path / "end-0.safetensors")


def test_the_steps_of_the_run_are_those_of_the_schedule(tmp_path: Any) -> None:
    class Asks(Net):
        def configure_optimizers(self) -> Any:
            self.asked = self.run.total_steps
            return super().configure_optimizers()

    run = fit(tmp_path, Asks(), schedule(scheduling={0: 3, 2: 2}))
    assert run.module.asked == run.position.step == 3 + 3 + 4 + 4


def test_keys_that_are_texts_as_in_json_are_epochs(tmp_path: Any) -> None:
    given = {"0": 3, 2: 2}
    plugin = schedule(scheduling=given)
    assert plugin.scheduling == {0: 3, 2: 2} and given == {"0": 3, 2: 2}
    assert fit(tmp_path, Net(), plugin).position.step == 3 + 3 + 4 + 4


def test_a_second_fit_goes_on_with_the_schedule(tmp_path: Any) -> None:
    ends = []
    for epochs in [4], [1, 3, 4]:
        seed_everything(3)
        trainer = Trainer(max_epochs=epochs[0], root_dir=tmp_path, plugins=[schedule(scheduling={0: 3, 1: 2, 3: 4})])
        module, data = Net(), shuffled()
        for last in epochs:
            trainer.max_epochs = last
            trainer.fit(module, data)
        ends.append(module)
    assert equal(*ends)


# ---------------------------------------------------------------------- what cannot be


def test_what_cannot_be_together_is_refused(tmp_path: Any) -> None:
    begun = []

    class Begins:
        @hookimpl
        def on_run_start(self, run: Any) -> None:
            begun.append(run)

    with pytest.raises(ValueError, match="accumulate_grad_batches=2 and a schedule contradict each other; leave it at 1"):
        fit(tmp_path, Net(), Begins(), schedule(scheduling={0: 2}), accumulate_grad_batches=2)
    assert not begun

    with pytest.raises(ValueError, match="the length of the windows is set by another plugin already; name one schedule"):
        fit(tmp_path, Net(), *({f"accumulation_schedule:{name}": {"scheduling": {0: 2}}} for name in "ab"))

    class Manual(Net):
        automatic_optimization = False

    with pytest.raises(ValueError, match="a schedule is for automatic optimization"):
        fit(tmp_path, Manual(), schedule(scheduling={0: 2}))

    class Searching(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"an optimizer that evaluates the loss itself .LBFGS. needs one batch at a time"):
        fit(tmp_path, Searching(), schedule(scheduling={0: 2}))
    assert fit(tmp_path, Searching(), schedule(scheduling={0: 1}), max_epochs=1).position.step == 7
    Trainer(root_dir=tmp_path, plugins=[schedule(scheduling={0: 2})], accumulate_grad_batches=2).predict(Predicts(), batches(2))


class Predicts(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch)


@pytest.mark.parametrize(
    ("scheduling", "words"),
    [
        ({}, "scheduling must be a dict of batches by epoch, such as {0: 8, 4: 4}, got {}"),
        ([8, 4], "scheduling must be a dict of batches by epoch"),
        ({"first": 8}, "scheduling: an epoch must be a whole number, at least 0, got 'first'"),
        ({-1: 8}, "scheduling: an epoch must be a whole number, at least 0, got -1"),
        ({0: 0}, "scheduling: the batches from epoch 0 on must be a whole number, at least 1, got 0"),
        ({4: 2.0}, "scheduling: the batches from epoch 4 on must be a whole number, at least 1, got 2.0"),
        ({4: True}, "scheduling: the batches from epoch 4 on must be a whole number, at least 1, got True"),
    ],
)
def test_options_that_cannot_be_are_refused(scheduling: Any, words: str) -> None:
    with pytest.raises(PluginError, match=f"plugin 'accumulation_schedule' .torchplug-accumulation-schedule 0.1.0.: {words}"):
        Trainer(max_epochs=1, plugins=[{"accumulation_schedule": {"scheduling": scheduling}}])


def test_a_learning_rate_is_looked_for_with_the_windows_of_the_schedule(tmp_path: Any) -> None:
    from torchplug_lr_finder import lr_find

    def losses(*plugins: Any, **options: Any) -> list[float]:
        seed_everything(3)
        trainer = Trainer(root_dir=tmp_path, plugins=list(plugins), **options)
        return lr_find(trainer, Net(), DataLoader(batches(), batch_size=None), steps=10).losses  # type: ignore[arg-type]

    scheduled = losses(AccumulationSchedule(scheduling={0: 3, 1: 1}))
    assert scheduled == losses(accumulate_grad_batches=3) != losses()
