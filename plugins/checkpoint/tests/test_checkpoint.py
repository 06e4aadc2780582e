"""What the checkpoint plugin promises, on real fits of a module that logs a given sequence of values."""

import errno
import logging
import math
import os
import shutil
import stat
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import torchplug.run
import torchplug_checkpoint
from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.checkpoint import CheckpointError, load, verify
from torchplug.testing import check_plugin
from torchplug_checkpoint import Checkpoint

NAN, INF = math.nan, math.inf
BATCHES = [torch.ones(1, 1)] * 2


class Scripted(Module):
    """Logs ``values`` one after the other as val_loss, one for each validation, and remembers its weights at each."""

    def __init__(self, values, name="val_loss"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.values, self.name = list(values), name
        self.weights = []  # at each validation
        self.epochs = []  # at the end of each epoch

    def training_step(self, batch):
        return (self.weight * batch).sum()  # each step takes 0.1 off each weight

    def validation_step(self, batch):
        pass

    def on_validation_epoch_end(self):
        if self.run.position.stage == "validate":
            self.log(self.name, self.values[len(self.weights) % len(self.values)])
            self.weights.append(self.weight.detach().clone())

    def on_train_epoch_end(self):
        self.epochs.append(self.weight.detach().clone())

    def test_step(self, batch):
        self.log("weight", self.weight[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Listener:
    """Writes down what is told about checkpoints."""

    def __init__(self):
        self.saved, self.removed = [], []

    @hookimpl
    def on_checkpoint_saved(self, run, path, metrics, reason):
        self.saved.append((path.name, metrics, reason))

    @hookimpl
    def on_checkpoint_removed(self, path, reason):
        self.removed.append((path.name, reason))


def fit(path, module, *plugins, **options):
    trainer = Trainer(**{"max_epochs": len(module.values), "root_dir": path, "plugins": list(plugins), **options})
    trainer.fit(module, BATCHES, [BATCHES])
    return trainer


def files(folder):
    return {path.name for path in folder.iterdir()}


def weight(path):
    return load(path)["module"]["weight"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


# ---------------------------------------------------------------------- the best


@pytest.mark.slow
def test_it_passes_the_conformance_checks():
    check_plugin("checkpoint", monitor="val_loss")


@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, NAN, INF, -INF]), min_size=1, max_size=7),
    top_k=st.integers(-1, 4),
    mode=st.sampled_from(["min", "max"]),
    last=st.booleans(),
)
@example(values=[2.0, 1.0, 1.0, NAN, 0.0], top_k=2, mode="min", last=True)
@example(values=[1.0, 1.0, 1.0], top_k=2, mode="max", last=False)
def test_what_is_on_disk_is_exactly_the_k_best_and_the_last(folder, values, top_k, mode, last):
    if top_k == 0 and not last:
        return
    module, plugin = Scripted(values), Checkpoint(monitor="val_loss", top_k=top_k, mode=mode, last=last)
    trainer = fit(folder, module, plugin)
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    ranked = sorted(finite, key=lambda i: values[i] if mode == "min" else -values[i])  # stable: of equals the earlier one
    best = ranked if top_k < 0 else ranked[:top_k]
    written = trainer.run.dir / "checkpoints"
    expected = {f"epoch={i}-step={2 * (i + 1)}.safetensors" for i in best}
    assert files(written) == expected | ({"last.safetensors"} if last else set())
    for i in best:
        assert torch.equal(weight(written / f"epoch={i}-step={2 * (i + 1)}.safetensors"), module.weights[i])
    if last:
        assert torch.equal(weight(plugin.last_path), module.weights[-1])
    assert plugin.best_score == (values[best[0]] if best else None)
    assert plugin.best_path == (written / f"epoch={best[0]}-step={2 * (best[0] + 1)}.safetensors" if best else None)
    assert (trainer.run.best_path, trainer.run.last_path) == (plugin.best_path, plugin.last_path)


def test_the_best_file_is_good_and_holds_exactly_the_weights_of_its_epoch(tmp_path):
    module, plugin = Scripted([3.0, 1.0, 2.0]), Checkpoint(monitor="val_loss")
    fit(tmp_path, module, plugin)
    assert verify(plugin.best_path) == []
    assert verify(plugin.last_path) == []
    assert torch.equal(weight(plugin.best_path), module.epochs[1])
    assert torch.equal(weight(plugin.last_path), module.epochs[2])
    assert not torch.equal(module.epochs[1], module.epochs[2])
    position = load(plugin.best_path)["position"]
    assert (position["epoch"], position["batch"]) == (2, 0)  # two epochs are done


def test_test_without_a_module_uses_the_best_and_says_which(tmp_path, caplog):
    module, plugin = Scripted([3.0, 1.0, 2.0]), Checkpoint(monitor="val_loss")
    trainer = fit(tmp_path, module, plugin)
    best = module.epochs[1].clone()
    with caplog.at_level(logging.INFO, "torchplug"):
        results = trainer.test(dataloaders=[BATCHES])
    assert results[0]["weight"] == pytest.approx(float(best[0]))
    assert f"test with the weights of {plugin.best_path}" in caplog.messages
    assert torch.equal(module.weight, best)


def test_a_validation_in_mid_epoch_saves_the_weights_that_it_judged(tmp_path):
    module, plugin = Scripted([3.0, 4.0, 1.0, 2.0]), Checkpoint(monitor="val_loss", top_k=2)
    fit(tmp_path, module, plugin, max_epochs=2, val_check_interval=1)
    assert files(plugin.best_path.parent) == {"epoch=1-step=3.safetensors", "epoch=1-step=4.safetensors", "last.safetensors"}
    assert torch.equal(weight(plugin.best_path), module.weights[2])


def test_a_stale_value_is_never_ranked_again(tmp_path):
    module, plugin, listener = Scripted([3.0, 2.0]), Checkpoint(monitor="val_loss", top_k=-1), Listener()
    fit(tmp_path, module, plugin, listener, max_epochs=5, check_val_every_n_epoch=2)
    assert listener.saved == [
        ("last.safetensors", {}, "last"),
        ("epoch=1-step=4.safetensors", {"val_loss": 3.0}, "best and last"),
        ("last.safetensors", {}, "last"),
        ("epoch=3-step=8.safetensors", {"val_loss": 2.0}, "best and last"),
        ("last.safetensors", {}, "last"),
    ]


def test_every_n_epochs_says_which_epochs_are_looked_at(tmp_path):
    module, plugin = Scripted([1.0, 5.0, 2.0, 4.0, 3.0]), Checkpoint(monitor="val_loss", top_k=-1, every_n_epochs=2)
    trainer = fit(tmp_path, module, plugin)
    assert files(trainer.run.dir / "checkpoints") == {"epoch=1-step=4.safetensors", "epoch=3-step=8.safetensors", "last.safetensors"}
    assert torch.equal(weight(plugin.last_path), module.epochs[4])


def test_a_training_metric_can_be_monitored(tmp_path):
    class Training(Scripted):
        def training_step(self, batch):
            self.log("train_loss", float(self.values[self.current_epoch]), on_step=False, on_epoch=True)
            return super().training_step(batch)

    plugin = Checkpoint(monitor="train_loss")
    fit(tmp_path, Training([3.0, 1.0, 2.0]), plugin, val_check_interval=1)
    assert (plugin.best_score, plugin.best_path.name) == (1.0, "epoch=1-step=4.safetensors")


def test_a_missing_monitor_is_an_error_at_the_end_of_the_first_epoch_that_lists_the_metrics(tmp_path):
    module = Scripted([1.0, 1.0])
    with pytest.raises(KeyError, match="no metric 'val_los' was logged, did you mean 'val_loss'\\?; there are: val_loss"):
        fit(tmp_path, module, Checkpoint(monitor="val_los", every_n_epochs=2))
    assert len(module.weights) == 1


def test_a_run_that_ended_before_there_was_any_value_says_so_and_keeps_the_last(tmp_path, caplog):
    module, plugin = Scripted([1.0]), Checkpoint(monitor="val_loss")
    fit(tmp_path, module, plugin, max_epochs=None, max_steps=1)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "plugin 'checkpoint': training ended before any value of 'val_loss' was computed, so there is no best checkpoint (there are: none)"
    ]
    assert plugin.best_path is None
    assert torch.equal(weight(plugin.last_path), module.weight)


def test_the_sanity_check_and_trainer_validate_write_nothing(tmp_path):
    class Elsewhere(Scripted):
        def on_validation_epoch_end(self):
            if self.run.work == "validate":
                self.log_dict({f"other_{i}": 0.0 for i in range(9)})  # so that what follows would count as new
            super().on_validation_epoch_end()
            if self.run.position.stage == "sanity":
                self.log("val_loss", -100.0)

    module, plugin, listener = Elsewhere([1.0]), Checkpoint(monitor="val_loss"), Listener()
    trainer = fit(tmp_path, module, plugin, listener)
    assert plugin.best_score == 1.0
    trainer.validate(module, [BATCHES])
    assert len(listener.saved) == 1
    assert trainer.run.best_path == plugin.best_path


# ---------------------------------------------------------------------- the last


def test_without_a_monitor_the_newest_k_are_kept_and_there_is_no_best(tmp_path):
    module, plugin = Scripted([1.0] * 4), Checkpoint(top_k=2)
    trainer = fit(tmp_path, module, plugin)
    assert files(trainer.run.dir / "checkpoints") == {"epoch=2-step=6.safetensors", "epoch=3-step=8.safetensors", "last.safetensors"}
    assert (plugin.best_path, plugin.best_score, trainer.run.best_path) == (None, None, None)


def test_without_last_the_last_path_is_the_newest_file(tmp_path):
    plugin = Checkpoint(last=False)
    trainer = fit(tmp_path, Scripted([1.0] * 3), plugin)
    assert files(trainer.run.dir / "checkpoints") == {"epoch=2-step=6.safetensors"}
    assert plugin.last_path == trainer.run.last_path == trainer.run.dir / "checkpoints" / "epoch=2-step=6.safetensors"


def test_one_event_writes_one_file_also_if_it_is_both_best_and_last(tmp_path):
    class Counter:
        saves = 0

        @hookimpl(wrapper=True)
        def save_checkpoint(self):
            self.saves += 1
            return (yield)

    counter, plugin = Counter(), Checkpoint(monitor="val_loss")
    fit(tmp_path, Scripted([3.0, 2.0, 4.0, 1.0]), plugin, counter)
    assert counter.saves == 4
    assert plugin.best_path.stat().st_ino == plugin.last_path.stat().st_ino


def test_writing_last_anew_does_not_touch_the_best_file_that_shares_its_bytes(tmp_path):
    module, plugin = Scripted([1.0, 2.0]), Checkpoint(monitor="val_loss")
    fit(tmp_path, module, plugin)
    assert plugin.best_path.stat().st_ino != plugin.last_path.stat().st_ino
    assert torch.equal(weight(plugin.best_path), module.epochs[0])


def test_where_there_are_no_hard_links_last_is_a_copy_and_never_a_symlink(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    plugin = Checkpoint(monitor="val_loss")
    fit(tmp_path, Scripted([2.0, 1.0]), plugin)
    assert stat.S_ISREG(plugin.last_path.lstat().st_mode)
    assert plugin.last_path.read_bytes() == plugin.best_path.read_bytes()
    assert files(plugin.last_path.parent) == {"epoch=1-step=4.safetensors", "last.safetensors"}


def test_a_copy_that_fails_leaves_whole_files_and_nothing_half_written(tmp_path, monkeypatch):
    class DiskFills(Scripted):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            if self.current_epoch == 1:
                monkeypatch.setattr(os, "link", refuse)
                monkeypatch.setattr(shutil, "copyfile", refuse)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    module, plugin = DiskFills([2.0, 1.0]), Checkpoint(monitor="val_loss", dir=tmp_path / "here", background=False)
    with pytest.raises(CheckpointError, match=r"disk full while writing .*epoch=1-step=4\.safetensors"):
        fit(tmp_path, module, plugin)
    assert files(tmp_path / "here") == {"epoch=0-step=2.safetensors", "last.safetensors"}
    assert torch.equal(weight(tmp_path / "here" / "epoch=0-step=2.safetensors"), module.epochs[0])
    assert torch.equal(weight(tmp_path / "here" / "last.safetensors"), module.epochs[1])
    assert plugin.best_path.name == "epoch=0-step=2.safetensors"


def test_the_last_step_of_training_is_always_saved(tmp_path):
    module, plugin = Scripted([1.0]), Checkpoint()
    fit(tmp_path, module, plugin, max_epochs=None, max_steps=5)
    assert load(plugin.last_path)["position"]["step"] == 5
    assert torch.equal(weight(plugin.last_path), module.weight)


def test_a_state_that_was_saved_already_is_not_saved_again_at_the_end(tmp_path):
    listener = Listener()
    fit(tmp_path, Scripted([1.0, 2.0]), Checkpoint(), listener)
    assert [reason for _, _, reason in listener.saved] == ["newest and last"] * 2


def test_a_module_that_a_plugin_changed_when_training_ended_is_saved(tmp_path):
    class Averaging:
        @hookimpl
        def on_train_end(self, run):
            run.module.weight.data.copy_(torch.full((3,), 7.0))  # the way that torch does not count

    module, plugin = Scripted([1.0, 2.0]), Checkpoint(monitor="val_loss")
    fit(tmp_path, module, plugin, Averaging())
    assert weight(plugin.last_path).tolist() == [7.0] * 3
    assert torch.equal(weight(plugin.best_path), module.epochs[0])


# ---------------------------------------------------------------------- when


def test_every_n_steps_counts_optimizer_steps(tmp_path):
    listener = Listener()
    trainer = Trainer(max_epochs=1, root_dir=tmp_path, accumulate_grad_batches=2, plugins=[Checkpoint(every_n_steps=2, top_k=-1), listener])
    trainer.fit(Scripted([1.0]), [torch.ones(1, 1)] * 12)
    assert [name for name, _, _ in listener.saved] == [f"epoch=0-step={step}.safetensors" for step in (2, 4, 6)]


def test_a_step_that_the_end_of_the_loader_brought_is_counted_too(tmp_path):
    def unknown_length():
        yield from [torch.ones(1, 1)] * 3

    class Loader:
        def __iter__(self):
            return unknown_length()

    listener = Listener()
    trainer = Trainer(max_epochs=2, root_dir=tmp_path, accumulate_grad_batches=2, plugins=[Checkpoint(every_n_steps=2, top_k=-1), listener])
    trainer.fit(Scripted([1.0]), Loader())  # steps after batches 2 and 3 of each epoch
    assert [name for name, _, _ in listener.saved] == ["epoch=0-step=2.safetensors", "epoch=1-step=4.safetensors"]


@pytest.fixture
def minutes(monkeypatch):
    """A module whose training step takes a minute on the clock of the run."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(torchplug.run, "time", clock)

    class Minutes(Scripted):
        def on_fit_start(self):
            clock.now += 600  # what comes before training does not count

        def training_step(self, batch):
            clock.now += 60
            return super().training_step(batch)

    return Minutes([1.0])


def test_every_time_saves_when_it_has_passed_since_the_last_save(tmp_path, minutes):
    listener = Listener()
    trainer = Trainer(max_epochs=1, root_dir=tmp_path, plugins=[Checkpoint(every_time="3m"), listener])
    trainer.fit(minutes, [torch.ones(1, 1)] * 8)
    assert [name for name, _, _ in listener.saved] == [f"epoch={e}-step={s}.safetensors" for e, s in ((0, 3), (0, 6), (1, 8))]


def test_a_time_that_passes_within_an_accumulation_window_waits_for_its_step(tmp_path, minutes):
    plugin = Checkpoint(every_time="3m", top_k=-1)
    trainer = Trainer(max_epochs=1, root_dir=tmp_path, accumulate_grad_batches=4, plugins=[plugin])
    trainer.fit(minutes, [torch.ones(1, 1)] * 8)
    paths = sorted((trainer.run.dir / "checkpoints").glob("epoch*"))
    assert [(path.stem, load(path)["position"]["micro_step"]) for path in paths] == [("epoch=0-step=1", 4), ("epoch=0-step=2", 8)]


def test_with_a_monitor_saves_between_validations_are_the_last_alone(tmp_path):
    listener = Listener()
    fit(tmp_path, Scripted([2.0, 1.0]), Checkpoint(monitor="val_loss", every_n_steps=1), listener)
    assert [(name, reason) for name, _, reason in listener.saved] == [
        ("last.safetensors", "last"),
        ("last.safetensors", "last"),
        ("epoch=0-step=2.safetensors", "best and last"),
        ("last.safetensors", "last"),
        ("last.safetensors", "last"),
        ("epoch=1-step=4.safetensors", "best and last"),
    ]


def test_batches_are_listened_to_only_where_steps_or_a_time_are_asked_for(tmp_path):
    quiet = fit(tmp_path, Scripted([1.0]), Checkpoint(monitor="val_loss")).run
    busy = fit(tmp_path, Scripted([1.0]), Checkpoint(every_n_steps=100)).run
    timed = fit(tmp_path, Scripted([1.0]), Checkpoint(every_time=timedelta(hours=1))).run
    assert quiet.hooks.on_train_batch_end is quiet.hooks.log_text  # both are the one that nobody listens to
    assert busy.hooks.on_train_batch_end is not busy.hooks.log_text
    assert timed.hooks.on_train_batch_end is not timed.hooks.log_text


# ---------------------------------------------------------------------- the state that is saved


def test_the_state_in_a_file_is_that_after_every_plugin_handled_the_event(tmp_path):
    class Later:
        """Listed after the checkpoint."""

        epochs = 0

        @hookimpl
        def on_train_epoch_end(self):
            self.epochs += 1

        def state_dict(self):
            return {"epochs": self.epochs}

        def load_state_dict(self, state):
            self.epochs = state["epochs"]

    fitted = fit(tmp_path, Scripted([1.0, 2.0]), Checkpoint(top_k=-1), Later())
    written = fitted.run.dir / "checkpoints"
    assert [load(written / f"epoch={i}-step={2 * i + 2}.safetensors")["plugins"]["later"]["epochs"] for i in (0, 1)] == [1, 2]


def test_a_file_holds_the_early_stopping_state_of_its_own_event(tmp_path):
    pytest.importorskip("torchplug_early_stopping")
    plugins = [{"checkpoint": {"monitor": "val_loss", "top_k": -1}}, {"early_stopping": {"monitor": "val_loss", "patience": 2}}]
    trainer = fit(tmp_path, Scripted([1.0, 2.0, 3.0, 0.0]), *plugins)
    states = [load(path)["plugins"]["early_stopping"] for path in sorted((trainer.run.dir / "checkpoints").glob("epoch*"))]
    assert [(state["wait"], bool(state["reason"])) for state in states] == [(0, False), (1, False), (2, True)]


def test_a_file_knows_of_itself(tmp_path):
    plugin = Checkpoint(monitor="val_loss", top_k=2)
    fit(tmp_path, Scripted([3.0, 1.0, 2.0]), plugin)
    state = load(plugin.last_path)["plugins"]["checkpoint"]
    assert state["best"] == plugin.best_path.name
    assert [kept["name"] for kept in state["kept"]] == ["epoch=1-step=4.safetensors", "epoch=2-step=6.safetensors"]
    (save,) = state.pop("owed")  # while it is written it is not done
    assert (save["name"], save["dropped"]) == ("epoch=2-step=6.safetensors", [{"name": "epoch=0-step=2.safetensors", "score": 3.0}])
    assert plugin.state_dict() == {**state, "owed": []}


def test_the_books_hold_names_alone_so_that_a_run_can_be_moved(tmp_path):
    plugin = Checkpoint(monitor="val_loss", top_k=2)
    fit(tmp_path, Scripted([3.0, 1.0, 2.0]), plugin)
    assert str(tmp_path) not in repr(plugin.state_dict())


def test_state_goes_round(tmp_path):
    plugin, other = Checkpoint(monitor="val_loss", top_k=2), Checkpoint(monitor="val_loss", top_k=2)
    fit(tmp_path, Scripted([3.0, 1.0, 2.0]), plugin)
    other.load_state_dict(plugin.state_dict())
    assert other.state_dict() == plugin.state_dict()


def test_a_save_that_fails_ends_the_run_and_leaves_files_and_books_as_they_were(tmp_path):
    class Broken:
        @hookimpl
        def save_checkpoint(self, run):
            if run.position.epoch == 2:
                raise OSError("the disk is gone")

    module, plugin = Scripted([2.0, 1.0]), Checkpoint(monitor="val_loss", dir=tmp_path / "here")
    with pytest.raises(OSError, match="the disk is gone"):
        fit(tmp_path, module, plugin, Broken())
    assert files(tmp_path / "here") == {"epoch=0-step=2.safetensors", "last.safetensors"}
    assert (plugin.best_path.name, plugin.best_score) == ("epoch=0-step=2.safetensors", 2.0)
    assert torch.equal(weight(plugin.last_path), module.epochs[0])


# ---------------------------------------------------------------------- what is told


def test_saves_and_removals_are_announced_with_value_and_reason(tmp_path):
    listener = Listener()
    fit(tmp_path, Scripted([2.0, 3.0, 1.0, NAN]), Checkpoint(monitor="val_loss", top_k=2), listener)
    assert listener.saved == [
        ("epoch=0-step=2.safetensors", {"val_loss": 2.0}, "best and last"),
        ("epoch=1-step=4.safetensors", {"val_loss": 3.0}, "top_k and last"),
        ("epoch=2-step=6.safetensors", {"val_loss": 1.0}, "best and last"),
        ("last.safetensors", {}, "last"),
    ]
    assert listener.removed == [("epoch=1-step=4.safetensors", "no longer among the 2 best")]


def test_the_end_of_the_run_says_where_the_best_and_the_last_are(tmp_path, caplog):
    plugin = Checkpoint(monitor="val_loss")
    with caplog.at_level(logging.INFO, "torchplug"):
        fit(tmp_path, Scripted([0.25, 0.5]), plugin)
    assert f"checkpoint: best {plugin.best_path} (val_loss=0.25)\n    last {plugin.last_path}" in caplog.messages


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{epoch}-{step}-{val/loss:.3f}", "0-2-0.125"),
        ("val/loss={val/loss:.2e}", "val_loss=1.25e-01"),
        ("{epoch:03d}.safetensors", "000"),
        ("../up", ".._up"),
    ],
)
def test_the_template_gives_safe_names(tmp_path, template, name):
    trainer = fit(tmp_path, Scripted([0.125], "val/loss"), Checkpoint(filename=template))
    assert files(trainer.run.dir / "checkpoints") == {f"{name}.safetensors", "last.safetensors"}


def test_a_metric_with_dots_in_its_name_can_be_used(tmp_path):
    trainer = fit(tmp_path, Scripted([0.5], "val.loss"), Checkpoint(filename="{val.loss}"))
    assert files(trainer.run.dir / "checkpoints") == {"0.5.safetensors", "last.safetensors"}


def test_an_unknown_name_in_the_template_is_an_error_that_lists_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="there is no 'val_los', did you mean 'val_loss'\\?; there are: epoch, step, val_loss"):
        fit(tmp_path, Scripted([1.0]), Checkpoint(filename="{val_los}"))
    with pytest.raises(ValueError, match="cannot be filled in: Unknown format code 'd'"):
        fit(tmp_path, Scripted([1.0]), Checkpoint(filename="{val_loss:d}"))


def test_checkpoints_of_one_name_do_not_overwrite_each_other(tmp_path):
    module, plugin = Scripted([3.0, 2.0, 1.0]), Checkpoint(monitor="val_loss", top_k=-1, filename="last")
    fit(tmp_path, module, plugin)
    assert files(plugin.best_path.parent) == {"last-v1.safetensors", "last-v2.safetensors", "last-v3.safetensors", "last.safetensors"}
    for version, weights in enumerate(module.epochs, 1):
        assert torch.equal(weight(plugin.best_path.parent / f"last-v{version}.safetensors"), weights)


def test_files_of_others_are_neither_overwritten_nor_deleted(tmp_path):
    there = tmp_path / "shared"
    there.mkdir()
    foreign = {"epoch=0-step=2.safetensors": b"mine", "epoch=5-step=9.safetensors": b"old", "last.safetensors": b"theirs"}
    for name, content in foreign.items():
        (there / name).write_bytes(content)
    fit(tmp_path, Scripted([3.0, 2.0, 1.0]), Checkpoint(monitor="val_loss", dir=there))
    assert files(there) == {*foreign, "last-v1.safetensors", "epoch=2-step=6.safetensors"}
    assert (there / "epoch=0-step=2.safetensors").read_bytes() == b"mine"
    assert (there / "epoch=5-step=9.safetensors").read_bytes() == b"old"
    assert (there / "last-v1.safetensors").read_bytes() == b"theirs"
    assert verify(there / "last.safetensors") == []


# ---------------------------------------------------------------------- where


def test_two_instances_in_one_run_keep_apart(tmp_path):
    plugins = [{"checkpoint:hourly": {"every_n_steps": 1}}, {"checkpoint:best": {"monitor": "val_loss", "top_k": 1}}]
    trainer = fit(tmp_path, Scripted([1.0, 2.0]), *plugins)
    there = trainer.run.dir / "checkpoints"
    assert files(there) == {"best", "hourly"}
    assert files(there / "best") == {"epoch=0-step=2.safetensors", "last.safetensors"}
    assert files(there / "hourly") == {"epoch=1-step=4.safetensors", "last.safetensors"}
    assert trainer.run.best_path == there / "best" / "epoch=0-step=2.safetensors"
    assert set(load(trainer.run.last_path)["plugins"]) == {"checkpoint:best", "checkpoint:hourly"}
    assert list(trainer.run.report) == ["checkpoint:best", "checkpoint:hourly"]


def test_of_two_monitors_the_first_one_says_what_the_best_of_the_run_is(tmp_path):
    plugins = [{"checkpoint:low": {"monitor": "val_loss"}}, {"checkpoint:high": {"monitor": "val_loss", "mode": "max"}}]
    trainer = fit(tmp_path, Scripted([1.0, 2.0, 3.0]), *plugins)
    assert trainer.run.best_path == trainer.enabled["checkpoint:low"].best_path
    assert trainer.enabled["checkpoint:high"].best_score == 3.0


def test_two_instances_with_one_folder_are_refused_before_training(tmp_path):
    plugins = [{"checkpoint:a": {"dir": tmp_path / "x"}}, {"checkpoint:b": {"dir": tmp_path / "y/../x"}}]
    module = Scripted([1.0])
    with pytest.raises(ValueError, match=r"'checkpoint:a' and 'checkpoint:b' would both write into .*x'; give each a dir of its own"):
        fit(tmp_path, module, *plugins)
    assert module.weight.tolist() == [0.0] * 3


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    module = Scripted([1.0])
    with pytest.raises(OSError, match=r"checkpoints cannot be written into .*file/here' .Not a directory.; choose another dir"):
        fit(tmp_path, module, Checkpoint(dir=tmp_path / "file" / "here"))
    assert module.weight.tolist() == [0.0] * 3


def test_a_folder_that_is_there_and_cannot_be_written_is_an_error_before_training(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torchplug_checkpoint.store.tempfile, "TemporaryFile", refuse)
    module = Scripted([1.0])
    with pytest.raises(PermissionError, match=r"checkpoints cannot be written into .*here' .Permission denied.; choose another dir"):
        fit(tmp_path, module, Checkpoint(dir=tmp_path / "here"))
    assert module.weight.tolist() == [0.0] * 3


def test_fast_dev_run_writes_nothing_that_stays(tmp_path):
    trainer = fit(tmp_path, Scripted([1.0]), Checkpoint(monitor="val_loss", dir=tmp_path / "here"), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []
    assert trainer.run.report == {}


def test_an_instance_in_two_fits_begins_anew(tmp_path):
    plugin, seen = Checkpoint(monitor="val_loss", top_k=2), []
    for values in ([3.0, 1.0, 2.0], [30.0, 10.0, 20.0]):
        trainer = fit(tmp_path, Scripted(values), plugin)
        seen.append(trainer.run.dir / "checkpoints")
        assert plugin.best_score == values[1]
        assert plugin.best_path.parent == seen[-1]
    assert files(seen[0]) == files(seen[1]) == {"epoch=1-step=4.safetensors", "epoch=2-step=6.safetensors", "last.safetensors"}


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172800), ("250ms", 0.25), (timedelta(minutes=2), 120)],
)
def test_times_are_understood(text, seconds):
    assert Checkpoint(every_time=text)._seconds == seconds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dir": 3}, "dir must be a path, a URL or None, got 3"),
        ({"background": "yes"}, "background must be True or False, got 'yes'"),
        ({"save_weights_only": 1}, "save_weights_only must be True or False, got 1"),
        ({"save_on_exception": None}, "save_on_exception must be True or False, got None"),
        ({"monitor": ""}, "monitor must be the name of a metric or None, got ''"),
        ({"mode": "auto"}, "mode must be 'min' or 'max', got 'auto'"),
        ({"top_k": -2}, "top_k must be a number of checkpoints, -1 for all or 0 for none, got -2"),
        ({"top_k": True}, "top_k must be .* got True"),
        ({"last": "link"}, "last must be True or False, got 'link'"),
        ({"every_n_steps": 0}, "every_n_steps must be a whole number from 1 on or None, got 0"),
        ({"every_n_epochs": 1.0}, "every_n_epochs must be a whole number from 1 on or None, got 1.0"),
        ({"every_time": "soon"}, "every_time must be a time above 0 such as .* or a dict of its arguments, got 'soon'"),
        ({"every_time": "10"}, "every_time must be a time .* got '10'"),
        ({"every_time": timedelta(0)}, "every_time must be a time .* got datetime.timedelta"),
        ({"every_time": 10}, "every_time must be a time .* got 10"),
        ({"filename": ""}, "filename must be a template such as '{epoch}-{step}-{val_loss:.3f}', got ''"),
        ({"filename": "{epoch"}, "filename '{epoch' is not a template"),
        ({"filename": "{}"}, "filename '{}' must say by name what to put in, such as {epoch}"),
        ({"top_k": 0, "last": False}, "top_k=0 with last=False would keep nothing"),
        ({"monitor": "x", "every_n_steps": 5, "last": False}, "with a monitor, every_n_steps and every_time write last.safetensors alone"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Checkpoint(**options)
    with pytest.raises(PluginError, match=f"plugin 'checkpoint' .torchplug-checkpoint 0.1.0.: {words}"):
        Trainer(max_epochs=1, plugins=[{"checkpoint": options}])
