"""The arguments of the Trainer: what is taken, and what is said of everything else."""

from __future__ import annotations

import dataclasses
import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from torchplug import PluginError, Trainer
from torchplug.options import documentation, duration
from torchplug.settings import RENAMED, Settings

ARGUMENTS = [field.name for field in dataclasses.fields(Settings)]
TEXTS = ("accelerator", "strategy", "root_dir", "name", "lock", "trace")  # any text is the right type for these

# for each argument: values of the wrong type, and values of the right type that are out of range
WRONG: dict[str, tuple[list[Any], list[Any]]] = {
    "max_epochs": (["3", 1.5, True, [3]], [0, -1]),
    "max_steps": (["3", 1.5, True], [0, -1]),
    "max_time": ([3, 1.5, True], ["3", "soon", "", "0s", "-1s", timedelta(0), timedelta(seconds=-1), {"hors": 1}, {"hours": "1"}, {}]),
    "min_epochs": (["3", 1.5, True], [0, -1]),
    "min_steps": (["3", 1.5, True], [0, -1]),
    "limit_train_batches": (["3", None, True], [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf]),
    "limit_val_batches": (["3", None, True], [-1, -0.5, 1.5, math.nan, math.inf]),
    "limit_test_batches": (["3", None, True], [-1, -0.5, 1.5, math.nan, math.inf]),
    "limit_predict_batches": (["3", None, True], [-1, -0.5, 1.5, math.nan, math.inf]),
    "overfit_batches": (["3", None, True], [-1, -0.5, 1.5, math.nan, math.inf]),
    "fast_dev_run": (["3", "True", 1.5, None], [-1]),
    "val_check_interval": ([None, True, [3]], [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, "3", "often", "0s", timedelta(0), {"hors": 1}]),
    "check_val_every_n_epoch": (["3", 1.5, True], [0, -1]),
    "num_sanity_val_steps": (["3", 1.5, True, None], [-2]),
    "log_every_n_steps": (["3", 1.5, True, None], [0, -1]),
    "accumulate_grad_batches": (["3", 1.5, True, None, {0: 2}], [0, -1]),
    "gradient_clip_val": (["3", True, [1.0]], [0, -1, 0.0, -0.5, math.nan]),
    "gradient_clip_algorithm": ([3, None, True], ["l2", "Norm", ""]),
    "precision": ([3.5, None, True], ["3", "fp16", 8, 64, ""]),
    "deterministic": (["yes", 1, None], ["WARN"]),
    "benchmark": (["yes", 1, "None"], []),
    "detect_anomaly": (["yes", 1, None], []),
    "nonfinite_loss": ([True, None, 3], ["stop", ""]),
    "signals": (["SIGTERM", 15, None], [["SIGTREM"], [15], ["SIGKILL"]]),
    "seed": (["3", 1.5, True], [-1, 2**32]),
    "accelerator": ([3, None, True, ["cpu"]], ["3", "gppu", ""]),
    "devices": ([1.5, None, True], [0, -1, [], [-1], ["0"], [True], [0.5], "3", "all"]),
    "num_nodes": (["3", 1.5, True, None], [0, -1]),
    "strategy": ([3, None, True], ["3", "ddpp", "", {}, {"a": {}, "b": {}}]),
    "root_dir": ([3, None, True, ["runs"]], []),
    "name": ([3, True, ["a"]], ["", "a/b", ".", ".."]),
    "plugins": (["checkpoint", 3, True, {"checkpoint": {}}, {"checkpoint"}], [[3], [None], [{}], [{"a": {}, "b": {}}]]),
    "lock": ([3, True, ["a"]], ["there-is-none"]),
    "trace": ([3, True, ["a"]], []),
}


def test_the_table_of_wrong_values_has_every_argument() -> None:
    assert list(WRONG) == ARGUMENTS


def _cases(which: int) -> Any:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in WRONG.items() for value in values[which]]


@pytest.mark.parametrize(("name", "value"), _cases(0))
def test_a_value_of_the_wrong_type_is_an_error_that_names_the_argument_and_the_value(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be .*got {re.escape(repr(value))}$"):
        Trainer(**{"plugins": [], name: value})


@pytest.mark.parametrize(("name", "value"), _cases(1))
def test_a_value_out_of_range_is_an_error_that_names_the_argument(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError, PluginError), match=name):
        Trainer(**{"plugins": [], name: value})


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in TEXTS])
def test_a_text_where_something_else_is_due_is_an_error_in_every_argument(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be .*'a text'"):
        Trainer(**{"plugins": [], name: "a text"})


def test_a_number_out_of_range_is_told_the_range() -> None:
    with pytest.raises(ValueError, match=r"^max_epochs must be at least 1, got 0$"):
        Trainer(plugins=[], max_epochs=0)
    with pytest.raises(ValueError, match=r"^gradient_clip_val must be above 0, got -0.5$"):
        Trainer(plugins=[], gradient_clip_val=-0.5)
    with pytest.raises(ValueError, match=r"^limit_train_batches as a fraction must be at most 1.0, got 1.5"):
        Trainer(plugins=[], limit_train_batches=1.5)
    with pytest.raises(TypeError, match=r"^max_epochs must be an int \(at least 1\) or None, got '3'$"):
        Trainer(plugins=[], max_epochs="3")
    with pytest.raises(ValueError, match=r"^gradient_clip_algorithm must be 'norm' or 'value', got 'l2'$"):
        Trainer(plugins=[], gradient_clip_algorithm="l2")
    with pytest.raises(ValueError, match=r"^max_time must be a time above 0 such as '10s', '1h30m', .*got 'soon'$"):
        Trainer(plugins=[], max_time="soon")


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_a_minimum_above_the_maximum_is_an_error(unit: str) -> None:
    with pytest.raises(ValueError, match=rf"^min_{unit}=3 is more than max_{unit}=2$"):
        Trainer(plugins=[], **{f"min_{unit}": 3, f"max_{unit}": 2})


RIGHT: dict[str, list[Any]] = {
    "max_epochs": [1, None],
    "max_time": ["10s", "1h30m", "00:12:00:00", timedelta(minutes=1), {"hours": 1}, None],
    "limit_train_batches": [1, 1.0, 0.5, 7],
    "limit_val_batches": [0, 0.0, 1.0, 3],
    "overfit_batches": [0, 0.1, 5],
    "fast_dev_run": [True, False, 0, 7],
    "val_check_interval": [1, 0.25, 1.0, 1000, "10m", timedelta(hours=1), {"minutes": 5}],
    "check_val_every_n_epoch": [None, 1, 5],
    "num_sanity_val_steps": [-1, 0, 2],
    "gradient_clip_val": [None, 1, 0.5],
    "deterministic": [True, False, "warn"],
    "benchmark": [True, False, None],
    "signals": [[], ["SIGTERM"], ("SIGUSR1", "SIGHUP")],
    "seed": [None, 0, 2**32 - 1],
    "devices": [1, [0], "auto"],
    "root_dir": ["runs", Path("runs")],
    "name": [None, "my-run"],
    "plugins": [[], ()],
    "trace": [None, "trace.json", Path("trace.json")],
}


@pytest.mark.parametrize(("name", "value"), [pytest.param(n, v, id=f"{n}={v!r}") for n, values in RIGHT.items() for v in values])
def test_what_the_documentation_allows_is_taken(name: str, value: Any) -> None:
    made = Trainer(**{"plugins": [], name: value})
    assert getattr(made, name) == (list(value) if name == "plugins" else value)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("32", "32"), ("32-true", "32"), (32, "32"), ("16", "16-mixed"), (16, "16-mixed"), ("16-mixed", "16-mixed"), ("bf16", "bf16-mixed"),
        ("bf16-mixed", "bf16-mixed"), ("bf16-true", "bf16-true"),
    ],
)  # fmt: skip
def test_precision_is_understood_in_every_spelling(value: Any, meaning: str) -> None:
    assert Trainer(plugins=[], precision=value).precision == meaning


# ---------------------------------------------------------------------- arguments that do not exist


@pytest.mark.parametrize(
    ("name", "closest"),
    [("max_epoch", "max_epochs"), ("maxepochs", "max_epochs"), ("accumulate_grad_batch", "accumulate_grad_batches"), ("plugin", "plugins"),
     ("gradient_clip", "gradient_clip_val"), ("presicion", "precision")],
)  # fmt: skip
def test_a_misspelt_argument_is_an_error_with_the_closest(name: str, closest: str) -> None:
    with pytest.raises(TypeError, match=rf"^Trainer has no argument '{name}', did you mean '{closest}'\?$"):
        Trainer(**{name: 1})


def test_an_argument_that_resembles_nothing_is_an_error_too() -> None:
    with pytest.raises(TypeError, match=r"^Trainer has no argument 'zzz'$"):
        Trainer(zzz=1)


@pytest.mark.parametrize("name", RENAMED)
def test_an_argument_of_older_trainers_is_an_error_with_what_to_write_now(name: str) -> None:
    with pytest.raises(TypeError) as caught:
        Trainer(**{name: 1})
    assert str(caught.value) == f"Trainer has no argument {name!r}: {RENAMED[name]}"
    assert len(RENAMED[name]) > 10


def test_no_argument_is_called_old_and_exists() -> None:
    assert not set(RENAMED) & set(ARGUMENTS)


LIGHTNING_1 = {
    "gpus", "tpu_cores", "num_processes", "auto_lr_find", "auto_scale_batch_size", "progress_bar_refresh_rate", "distributed_backend",
    "checkpoint_callback", "weights_summary", "weights_save_path", "resume_from_checkpoint", "stochastic_weight_avg", "track_grad_norm",
    "terminate_on_nan", "amp_backend", "amp_level", "replace_sampler_ddp", "flush_logs_every_n_steps", "log_gpu_memory",
    "move_metrics_to_cpu", "truncated_bptt_steps",
}  # fmt: skip
LIGHTNING_2 = {
    "accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks", "fast_dev_run", "max_epochs", "min_epochs",
    "max_steps", "min_steps", "max_time", "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
    "overfit_batches",
    "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "enable_checkpointing",
    "enable_progress_bar", "enable_model_summary", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm",
    "deterministic", "benchmark", "inference_mode", "use_distributed_sampler", "profiler", "detect_anomaly", "barebones", "plugins",
    "sync_batchnorm", "reload_dataloaders_every_n_epochs", "default_root_dir",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LIGHTNING_1 | LIGHTNING_2))
def test_what_somebody_writes_who_comes_from_lightning_works_or_is_answered(name: str) -> None:
    assert name in ARGUMENTS or name in RENAMED


def test_an_argument_without_its_name_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"^Trainer takes its arguments by name, got 3 without one$"):
        Trainer(3)


# ---------------------------------------------------------------------- what belongs together


@pytest.mark.parametrize("options", [{"devices": 2}, {"devices": [0, 1]}, {"num_nodes": 2}], ids=str)
def test_several_devices_need_a_strategy(options: Any) -> None:
    with pytest.raises(ValueError, match=r"take several processes: name a strategy, such as strategy='ddp'"):
        Trainer(plugins=[], **options)


def test_the_list_of_plugins_that_the_user_gave_is_left_alone() -> None:
    class Nothing:
        pass

    given = [Nothing()]
    made = Trainer(plugins=given)
    assert made.plugins == given
    assert made.plugins is not given
    made.plugins.append("other")
    assert len(given) == 1


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_is_documented(name: str) -> None:
    assert len(documentation(Settings)[name].split()) >= 4
    assert len(documentation(Trainer)[name].split()) >= 4


# ---------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("10s", 10.0), ("500ms", 0.5), ("1.5h", 5400.0), ("1h30m", 5400.0), ("2d", 172800.0), ("1m30s250ms", 90.25),
        ("00:00:00:10", 10.0), ("01:02:03:04", 93784.0), (timedelta(minutes=2), 120.0), ({"hours": 1, "seconds": 1}, 3601.0),
    ],
    ids=str,
)  # fmt: skip
def test_a_time_is_read_in_every_form(value: Any, seconds: float) -> None:
    assert duration("max_time", value) == seconds


@pytest.mark.parametrize(
    "value", ["10", "ten", "", "1x", "1 h", "-5s", "0s", "1:00", "s", "1h-5m", timedelta(0), {"hours": 0}, {"hour": 1}], ids=repr
)
def test_what_is_no_time_is_an_error_with_examples(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^val_check_interval must be a time above 0 such as '10s', '1h30m'.*got " + re.escape(repr(value))
    ):
        duration("val_check_interval", value)
