"""What early stopping promises, on real fits of a module that logs a given sequence of values."""

import logging
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_early_stopping import EarlyStopping

NAN, INF = math.nan, math.inf
BATCHES = [torch.zeros(1, 1)] * 2


class Scripted(Module):
    """Logs ``values`` one after the other as val_loss, one for each validation; None logs nothing."""

    def __init__(self, values, name="val_loss"):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.values, self.name, self.done = list(values), name, 0

    def training_step(self, batch):
        return self.layer(batch).square().mean()

    def validation_step(self, batch):
        pass

    def on_validation_epoch_end(self):
        if self.run.position.stage == "validate":
            value = self.values[self.done % len(self.values)]
            self.done += 1
            if value is not None:
                self.log(self.name, value)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(path, module, *plugins, ckpt_path=None, **options):
    trainer = Trainer(**{"max_epochs": len(module.values), "root_dir": path, "plugins": list(plugins), **options})
    trainer.fit(module, BATCHES, [BATCHES], ckpt_path=ckpt_path)
    return trainer


def stopped_after(path, values, **options):
    """How many validations there were, and the plugin."""
    module, plugin = Scripted(values), EarlyStopping(monitor="val_loss", **options)
    fit(path, module, plugin)
    return module.done, plugin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


# ---------------------------------------------------------------------- patience


@pytest.mark.slow
def test_it_passes_the_conformance_checks():
    check_plugin("early_stopping", monitor="val_loss")


@pytest.mark.parametrize(("patience", "epochs"), [(0, 3), (1, 3), (2, 4), (3, 5), (9, 8)])
def test_it_stops_when_patience_values_in_a_row_did_not_improve(tmp_path, patience, epochs):
    done, plugin = stopped_after(tmp_path, [3.0, 2.0, 2.5, 2.0, 2.1, 2.2, 2.3, 2.4], patience=patience)
    assert done == epochs
    assert plugin.best_score == 2.0
    assert bool(plugin.reason) == (epochs < 8)


def test_an_improvement_resets_the_count(tmp_path):
    done, plugin = stopped_after(tmp_path, [5.0, 6.0, 4.0, 6.0, 3.0, 6.0, 6.0, 0.0], patience=2)
    assert done == 7
    assert plugin.best_score == 3.0


def test_max_looks_for_higher_values(tmp_path):
    done, plugin = stopped_after(tmp_path, [0.1, 0.5, 0.4, 0.3, 0.9], mode="max", patience=2)
    assert done == 4
    assert plugin.best_score == 0.5


def test_an_improvement_must_be_more_than_min_delta(tmp_path):
    done, plugin = stopped_after(tmp_path, [4.0, 3.5, 3.0, 2.0, 1.5, 1.0], min_delta=1.0, patience=2)
    # 3.5 and 3.0 are not better than 4.0 by MORE than 1.0
    assert done == 3
    assert plugin.best_score == 4.0


def test_the_reason_names_monitor_value_best_step_patience_and_unit(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "torchplug"):
        _, plugin = stopped_after(tmp_path, [0.5, 0.25, 0.75, 0.8, 0.1], patience=2)
    assert plugin.reason == ("val_loss did not improve for 2 values in a row: 0.8 at step 8, best 0.25 at step 4 (patience=2 values)")
    assert plugin.stopped_step == 8
    assert f"stopped by early_stopping: {plugin.reason}" in caplog.messages


def test_the_run_and_other_plugins_are_told(tmp_path):
    class Listener:
        heard = None

        @hookimpl
        def on_stop_requested(self, reason, plugin):
            self.heard = (reason, plugin)

    listener, plugin = Listener(), EarlyStopping(monitor="val_loss", patience=1)
    trainer = Trainer(max_epochs=9, root_dir=tmp_path, plugins=[listener, plugin])
    trainer.fit(Scripted([1.0, 2.0, 3.0]), BATCHES, [BATCHES])
    assert listener.heard == (plugin.reason, "early_stopping")
    assert trainer.run.stop_reason == plugin.reason
    assert trainer.run.position.epoch == 2


def test_a_run_that_was_not_stopped_has_no_reason(tmp_path):
    plugin = EarlyStopping(monitor="val_loss")
    trainer = fit(tmp_path, Scripted([3.0, 2.0, 1.0]), plugin)
    assert (plugin.reason, plugin.stopped_step, plugin.wait, plugin.best_score) == ("", 0, 0, 1.0)
    assert trainer.run.stopped_by == ""


def test_validations_in_mid_epoch_are_counted_once_each(tmp_path):
    module, plugin = Scripted([1.0, 2.0, 3.0, 0.0]), EarlyStopping(monitor="val_loss", patience=2)
    trainer = fit(tmp_path, module, plugin, val_check_interval=1)
    assert module.done == 3  # two batches in an epoch: the third validation is after the first batch of epoch 1
    assert (trainer.run.position.epoch, trainer.run.position.batch) == (1, 1)


def test_a_stale_value_is_not_counted_again(tmp_path):
    module, plugin = Scripted([1.0, 2.0]), EarlyStopping(monitor="val_loss", patience=2)
    fit(tmp_path, module, plugin, check_val_every_n_epoch=3, max_epochs=8)  # validations in epochs 2 and 5 alone
    assert module.done == 2
    assert (plugin.wait, plugin.reason) == (1, "")


def test_a_metric_of_the_training_batches_counts_once_an_epoch(tmp_path):
    class Training(Scripted):
        def training_step(self, batch):
            self.log("train_loss", float(self.values[self.current_epoch]), on_step=False, on_epoch=True)
            return super().training_step(batch)

    module, plugin = Training([1, 2, 3, 4, 5]), EarlyStopping(monitor="train_loss", patience=2)
    trainer = fit(tmp_path, module, plugin, val_check_interval=1)
    assert trainer.run.position.epoch == 3


def test_min_epochs_is_kept_and_the_first_reason_stays(tmp_path):
    module, plugin = Scripted([1.0, 2.0, 0.5, 0.6, 0.7, 0.1]), EarlyStopping(monitor="val_loss", patience=1)
    trainer = fit(tmp_path, module, plugin, min_epochs=5)
    assert trainer.run.position.epoch == 5
    assert plugin.stopped_step == 4
    assert "2 at step 4" in plugin.reason


def test_the_sanity_check_and_trainer_validate_count_nothing(tmp_path):
    class Elsewhere(Scripted):
        def on_validation_epoch_end(self):
            if self.run.work == "validate":
                self.log_dict({f"other_{i}": 0.0 for i in range(9)})  # so that what follows would count as new
            super().on_validation_epoch_end()
            if self.run.position.stage == "sanity":
                self.log("val_loss", -100.0)

    module, plugin = Elsewhere([2.0, 1.0]), EarlyStopping(monitor="val_loss", patience=1)
    trainer = fit(tmp_path, module, plugin)
    assert (plugin.best_score, plugin.wait) == (1.0, 0)
    module.values = [7.0]
    trainer.validate(module, [BATCHES])
    assert (plugin.best_score, plugin.wait, plugin.reason) == (1.0, 0, "")


# ---------------------------------------------------------------------- thresholds and values that are not finite


@pytest.mark.parametrize(("mode", "values"), [("min", [3.0, 2.0, 1.0, 0.5]), ("max", [-3.0, -2.0, -1.0, -0.5])])
def test_it_stops_as_soon_as_a_value_is_at_least_as_good_as_stopping_threshold(tmp_path, mode, values):
    done, plugin = stopped_after(tmp_path, values, mode=mode, stopping_threshold=values[2])
    assert done == 3
    assert plugin.reason == f"val_loss reached stopping_threshold={values[2]:g}: {values[2]:g} at step 6"
    assert plugin.best_score == values[2]


@pytest.mark.parametrize(("mode", "values"), [("min", [3.0, 2.0, 9.0, 0.5]), ("max", [-3.0, -2.0, -9.0, -0.5])])
def test_it_stops_as_soon_as_a_value_is_as_bad_as_divergence_threshold(tmp_path, mode, values):
    done, plugin = stopped_after(tmp_path, values, mode=mode, divergence_threshold=values[2], patience=5)
    assert done == 3
    assert plugin.reason == (f"val_loss reached divergence_threshold={values[2]:g}: {values[2]:g} at step 6, best {values[1]:g} at step 4")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_stops_the_run_by_default(tmp_path, bad):
    done, plugin = stopped_after(tmp_path, [2.0, bad, 1.0])
    assert done == 2
    assert plugin.reason == f"val_loss is {bad} at step 4, best 2 at step 2 (write check_finite=False to pass over such values)"
    assert plugin.best_score == 2.0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_without_check_finite_such_values_neither_improve_nor_reset_nor_use_up_patience(tmp_path, mode, bad):
    sign = 1 if mode == "min" else -1
    values = [bad, 2.0, bad, 3.0, bad, bad, 3.0, bad]
    done, plugin = stopped_after(tmp_path, [v * sign for v in values], mode=mode, patience=2, check_finite=False)
    assert done == 7  # 2.0, then 3.0 twice
    assert plugin.best_score == 2.0 * sign


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, NAN, INF]), min_size=1, max_size=7),
    patience=st.integers(0, 3),
    mode=st.sampled_from(["min", "max"]),
    min_delta=st.sampled_from([0.0, 1.0]),
)
@example(values=[0.0, NAN, 0.0, INF, 0.0], patience=2, mode="max", min_delta=0.0)
def test_for_any_sequence_it_stops_where_the_definition_says(folder, values, patience, mode, min_delta):
    done, _ = stopped_after(folder, values, patience=patience, mode=mode, min_delta=min_delta, check_finite=False)
    finite = [(i, v if mode == "min" else -v) for i, v in enumerate(values) if math.isfinite(v)]
    expected, best, since = len(values), INF, 0
    for i, value in finite:
        best, since = (value, 0) if best - value > min_delta else (best, since + 1)
        if since >= max(1, patience):
            expected = i + 1
            break
    assert done == expected


# ---------------------------------------------------------------------- missing metrics


def test_a_missing_monitor_is_an_error_at_the_end_of_the_first_epoch_that_lists_the_metrics(tmp_path):
    module = Scripted([1.0, 1.0])
    with pytest.raises(KeyError, match="no metric 'val_los' was logged, did you mean 'val_loss'\\?; there are: val_loss"):
        fit(tmp_path, module, EarlyStopping(monitor="val_los"))
    assert module.done == 1


def test_a_metric_that_no_validation_had_a_chance_to_log_is_waited_for(tmp_path):
    module, plugin = Scripted([1.0]), EarlyStopping(monitor="val_loss")
    fit(tmp_path, module, plugin, check_val_every_n_epoch=3, max_epochs=3)
    assert plugin.best_score == 1.0


def test_a_run_that_ended_before_there_was_any_value_says_so(tmp_path, caplog):
    plugin = EarlyStopping(monitor="val_loss")
    fit(tmp_path, Scripted([1.0]), plugin, max_epochs=None, max_steps=1)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "plugin 'early_stopping': training ended before any value of 'val_loss' was computed, so nothing was watched (there are: none)"
    ]


# ---------------------------------------------------------------------- several fits, state, options


def test_an_instance_in_two_fits_begins_anew(tmp_path):
    plugin = EarlyStopping(monitor="val_loss", patience=2)
    seen = []
    for _ in range(2):
        module = Scripted([1.0, 2.0, 3.0, 4.0])
        fit(tmp_path, module, plugin)
        seen.append((module.done, plugin.reason, plugin.stopped_step, plugin.best_score, plugin.wait))
    assert seen[0] == seen[1]
    assert seen[0][0] == 3


def test_two_instances_watch_apart(tmp_path):
    plugins = [
        {"early_stopping:slow": {"monitor": "val_loss", "patience": 9}},
        {"early_stopping:quick": {"monitor": "val_loss", "patience": 1}},
    ]
    trainer = Trainer(max_epochs=5, root_dir=tmp_path, plugins=plugins)
    trainer.fit(Scripted([1.0, 2.0, 3.0]), BATCHES, [BATCHES])
    assert trainer.enabled["early_stopping:slow"].reason == ""
    assert trainer.run.stopped_by == "early_stopping:quick"


def test_state_goes_round_and_is_plain(tmp_path):
    _, plugin = stopped_after(tmp_path, [1.0, 2.0, 3.0, 4.0], patience=2)
    state = plugin.state_dict()
    assert all(type(value) in (str, int, float) for value in state.values())
    other = EarlyStopping(monitor="val_loss", patience=2)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert state["seen"] > 0
    assert (other.reason, other.stopped_step, other.best_score, other.wait) == (plugin.reason, 6, 1.0, 2)


# ---------------------------------------------------------------------- a run that goes on from a checkpoint


class Saves:
    """Saves at every epoch's end, and when training is over."""

    @hookimpl
    def on_train_epoch_end(self, run):
        run.save_checkpoint(run.dir / f"{run.position.epoch}.safetensors")

    @hookimpl
    def on_train_end(self, run):
        run.save_checkpoint(run.dir / "end.safetensors")


class Counts(Scripted):
    """Goes on in its script where the run goes on."""

    def on_train_start(self):
        self.done = self.current_epoch


def resumed(path, module, plugin, **options):
    return fit(path.parents[2], module, plugin, name="net", ckpt_path=path, **options)


def outcome(plugin):
    return plugin.reason, plugin.stopped_step, plugin.best_score, plugin.wait, plugin.state_dict()


VALUES = [3.0, 2.0, 2.5, NAN, 2.2, 1.9, 2.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize("epoch", range(9))
def test_a_run_that_goes_on_from_any_epoch_stops_where_the_other_did_and_for_the_same_reason(tmp_path, epoch):
    def stopper():
        return EarlyStopping(monitor="val_loss", patience=3, check_finite=False)

    plugin, again = stopper(), stopper()
    whole = fit(tmp_path / "runs", Counts(VALUES), plugin, Saves(), name="net").run
    assert whole.position.epoch == 9
    module = Counts(VALUES)
    run = resumed(whole.dir / f"{epoch}.safetensors", module, again).run
    assert (run.position.epoch, run.stop_reason) == (9, whole.stop_reason)
    assert outcome(again) == outcome(plugin)


def test_an_old_value_is_not_counted_again_after_a_resume(tmp_path):
    plugin = EarlyStopping(monitor="val_loss", patience=2)
    options = {"name": "net", "check_val_every_n_epoch": 3, "max_epochs": 5}
    whole = fit(tmp_path / "runs", Scripted([1.0, 2.0]), EarlyStopping(monitor="val_loss", patience=2), Saves(), **options).run
    # the second value comes in epoch 5, the first one is seen in epochs 2, 3 and 4
    resumed(whole.dir / "2.safetensors", Scripted([2.0]), plugin, check_val_every_n_epoch=3, max_epochs=5)
    assert (plugin.best_score, plugin.wait, plugin.reason) == (1.0, 0, "")


def test_a_run_that_was_stopped_stops_at_once_when_it_goes_on(tmp_path):
    whole = fit(tmp_path / "runs", Scripted([1.0, 2.0, 3.0, 0.0]), EarlyStopping(monitor="val_loss", patience=2), Saves(), name="net").run
    assert whole.position.epoch == 3
    plugin, module = EarlyStopping(monitor="val_loss", patience=2), Scripted([0.0])
    run = resumed(whole.dir / "end.safetensors", module, plugin, max_epochs=9).run
    assert (run.position.epoch, run.position.step, module.done) == (3, 6, 0)
    assert (run.stop_reason, run.stopped_by, plugin.stopped_step) == (whole.stop_reason, "early_stopping", 6)


def test_a_run_that_was_stopped_in_mid_epoch_stops_at_once_too(tmp_path):
    options = {"val_check_interval": 1, "max_epochs": 9}
    plugin = EarlyStopping(monitor="val_loss", patience=1)
    whole = fit(tmp_path / "runs", Scripted([2.0, 1.0, 3.0, 0.0]), plugin, Saves(), name="net", **options).run
    assert (whole.position.epoch, whole.position.batch) == (1, 1)
    again, module = EarlyStopping(monitor="val_loss", patience=1), Scripted([0.0])
    run = resumed(whole.dir / "end.safetensors", module, again, **options).run
    assert (run.position.epoch, run.position.batch, module.done) == (1, 1, 0)
    assert outcome(again) == outcome(plugin)


@pytest.mark.parametrize(
    ("values", "options", "otherwise"),
    [
        ([1.0, 2.0, 3.0], {"patience": 2}, {"patience": 4}),
        ([3.0, 1.0], {"stopping_threshold": 2.0}, {"stopping_threshold": 0.5}),
        ([3.0, 9.0], {"divergence_threshold": 5.0}, {"divergence_threshold": 50.0}),
        ([3.0, NAN], {}, {"check_finite": False}),
        ([3.0, INF], {"divergence_threshold": 5.0}, {"check_finite": False}),
    ],
)
def test_options_that_make_the_reason_void_let_a_stopped_run_go_on(tmp_path, values, options, otherwise):
    plugin = EarlyStopping(monitor="val_loss", **options)
    whole = fit(tmp_path / "runs", Scripted(values), plugin, Saves(), name="net", max_epochs=9).run
    assert plugin.reason and whole.position.epoch == len(values)
    path = whole.dir / "end.safetensors"
    same, other = EarlyStopping(monitor="val_loss", **options), EarlyStopping(monitor="val_loss", **{**options, **otherwise})
    assert resumed(path, Scripted([0.9, 0.8]), same, max_epochs=len(values) + 2).run.position.epoch == len(values)
    run = resumed(path, Scripted([0.9, 0.8]), other, max_epochs=len(values) + 2).run
    assert run.position.epoch == len(values) + 2
    assert (other.reason, other.stopped_step, other.best_score) == ("", 0, 0.8)


def test_a_larger_patience_counts_on_from_the_values_that_did_not_improve(tmp_path):
    whole = fit(tmp_path / "runs", Scripted([1.0, 2.0, 3.0]), EarlyStopping(monitor="val_loss", patience=2), Saves(), name="net").run
    plugin = EarlyStopping(monitor="val_loss", patience=3)
    run = resumed(whole.dir / "end.safetensors", Scripted([4.0, 5.0]), plugin, max_epochs=9).run
    assert (run.position.epoch, plugin.wait, plugin.best_score) == (4, 3, 1.0)


def test_a_request_that_waited_for_min_epochs_still_waits_and_is_not_taken_back(tmp_path):
    values, options = [1.0, 2.0, 0.5, 0.6, 0.7, 0.1], {"min_epochs": 5, "name": "net"}
    plugin, again = EarlyStopping(monitor="val_loss", patience=1), EarlyStopping(monitor="val_loss", patience=1)
    whole = fit(tmp_path / "runs", Counts(values), plugin, Saves(), **options).run
    run = resumed(whole.dir / "2.safetensors", Counts(values), again, min_epochs=5).run  # 0.5 was better, after the request
    assert run.position.epoch == 5 and again.stopped_step == 4
    assert outcome(again) == outcome(plugin)


@pytest.mark.parametrize("options", [{"monitor": "other"}, {"mode": "max"}])
def test_values_of_another_monitor_or_mode_are_not_compared(tmp_path, options):
    whole = fit(tmp_path / "runs", Scripted([1.0, 2.0, 3.0]), EarlyStopping(monitor="val_loss", patience=2), Saves(), name="net").run
    plugin = EarlyStopping(**{"monitor": "val_loss", **options}, patience=2)
    run = resumed(whole.dir / "end.safetensors", Scripted([7.0, 8.0, 9.0], plugin.monitor), plugin, max_epochs=4).run
    assert run.position.epoch == 4 and (plugin.best_score, plugin.wait, plugin.reason) == (7.0, 0, "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"monitor": ""}, "monitor must be the name of a metric, got ''"),
        ({"mode": "auto"}, "mode must be 'min' or 'max', got 'auto'"),
        ({"patience": -1}, "patience must be a whole number of values, at least 0, got -1"),
        ({"patience": 1.5}, "patience must be a whole number of values, at least 0, got 1.5"),
        ({"patience": True}, "patience must be a whole number of values, at least 0, got True"),
        ({"min_delta": -0.1}, "min_delta must be a finite number, at least 0 .mode says the direction., got -0.1"),
        ({"stopping_threshold": NAN}, "stopping_threshold must be a finite number or None, got nan"),
        ({"divergence_threshold": "3"}, "divergence_threshold must be a finite number or None, got '3'"),
        ({"check_finite": "no"}, "check_finite must be True or False, got 'no'"),
        ({"stopping_threshold": 3.0, "divergence_threshold": 1.0}, "stopping_threshold=3.0 must be better than divergence_threshold=1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        EarlyStopping(**{"monitor": "val_loss", **options})
    with pytest.raises(PluginError, match=f"plugin 'early_stopping' .torchplug-early-stopping 0.1.0.: {words}"):
        Trainer(max_epochs=1, plugins=[{"early_stopping": {"monitor": "val_loss", **options}}])


def test_the_monitor_is_required():
    with pytest.raises(PluginError, match="monitor"):
        Trainer(max_epochs=1, plugins=["early_stopping"])
