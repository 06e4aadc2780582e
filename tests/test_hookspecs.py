"""The contract: the picture in `hookspecs.py`, the hooks that exist and what a run calls are one and the same."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import torchplug.hookspecs
from torchplug import hookimpl
from torchplug.hookspecs import Hooks
from torchplug.members import ACTIONS, CLOSING, OPERATIONS, PARAMETERS

# not drawn in the picture: the hooks of validation under the names of the other evaluations ...
TEST = ["on_test_start", "on_test_epoch_start", "on_test_batch_start", "test_step", "on_test_batch_end", "on_test_epoch_end", "on_test_end"]
PREDICT = [
    "on_predict_start", "on_predict_epoch_start", "on_predict_batch_start", "predict_step", "on_predict_batch_end",
    "on_predict_epoch_end", "on_predict_end",
]  # fmt: skip
# ... and what may happen at any time
ANY_TIME = [
    "on_step_skipped", "on_stop_requested", "save_checkpoint", "on_checkpoint_saved", "on_checkpoint_removed", "log_figure", "log_text",
    "log_artifact", "reduce", "gather", "broadcast", "barrier", "tune", "on_out_of_memory", "on_exception",
]  # fmt: skip

Line = tuple[int, str, str]


def picture() -> list[Line]:
    """The lines of the picture as (indentation, words before a colon, the hooks after it), comments left out."""
    _, _, text = torchplug.hookspecs.__doc__.partition("The picture of a run::\n\n")
    lines = []
    for line in text.partition("\n\n")[0].splitlines():
        content = re.split(r" {4,}", line.strip())[0]
        heading, _, hooks = content.rpartition(":")
        lines.append((len(line) - len(line.lstrip()), heading, hooks))
    return lines


def pattern(lines: list[Line]) -> str:
    """The runs that the picture allows as a regular expression: ``for`` repeats, ``when``, ``at`` and brackets are optional."""
    expression = ""
    while lines:
        indent, heading, hooks = lines[0]
        inside = next((i for i, line in enumerate(lines[1:], 1) if line[0] <= indent), len(lines))
        words = (f"(?:{word} )" if word.isidentifier() else word for word in re.findall(r"[\[\]]|\w+", hooks))
        own = "".join(words).replace("[", "(?:").replace("]", ")?")
        often = {"for": "*", "at": "?", "when": "?"}.get(heading.split(" ")[0], "")
        expression += f"(?:{own}{pattern(lines[1:inside])}){often}"
        lines = lines[inside:]
    return expression


def without_sanity(names: list[str]) -> list[str]:
    """The names without what fires inside the sanity check: the picture draws an evaluation once, where training validates."""
    if "on_sanity_start" not in names:
        return names
    start, end = names.index("on_sanity_start"), names.index("on_sanity_end")
    return names[: start + 1] + names[end:]


def words(text: str) -> list[str]:
    """A golden list, written in lines for the eye."""
    return text.split()


def shown(recorder: Any) -> list[str]:
    """What was recorded as ``hook:batch_idx/dataloader_idx@stage=status``, as far as the hook has these arguments."""
    signs = {"batch_idx": ":", "dataloader_idx": "/", "stage": "@", "status": "="}
    return [
        name + "".join(f"{sign}{arguments[key]}" for key, sign in signs.items() if key in arguments) for name, arguments in recorder.calls
    ]


def watched(module: type, recorder: Any) -> type:
    """A subclass of ``module`` whose methods, one for every event, tell ``recorder``."""
    events = {hook: vars(type(recorder))[hook] for hook in PARAMETERS if hook not in OPERATIONS}
    return type("Watched", (module,), {**events, "record": lambda self, hook, arguments: recorder.record(hook, arguments)})


# ---------------------------------------------------------------------- picture, hooks and runs are the same


def test_every_hook_is_drawn_in_the_picture_or_in_a_group_of_its_own() -> None:
    drawn = [name for _, _, hooks in picture() for name in re.findall(r"\w+", hooks)]
    assert len(drawn) > 40
    assert set(drawn) | {*TEST, *PREDICT, *ANY_TIME} == set(PARAMETERS)
    assert not set(drawn) & {*TEST, *PREDICT, *ANY_TIME}


def test_the_picture_draws_the_hooks_in_the_order_of_the_file() -> None:
    drawn = [name for _, _, hooks in picture() for name in re.findall(r"\w+", hooks)]
    drawn.remove("evaluate")  # the one in the sanity check: it is defined where training validates
    first_seen = list(dict.fromkeys(drawn))
    assert first_seen == [name for name in PARAMETERS if name in first_seen]


def test_the_groups_of_test_and_predict_mirror_validation() -> None:
    validation = [name for name in PARAMETERS if name.startswith(("on_validation_", "validation_"))]
    assert [name.replace("validation", "test") for name in validation] == TEST
    assert [name.replace("validation", "predict") for name in validation] == PREDICT
    for ours, theirs in (*zip(validation, TEST, strict=True), *zip(validation, PREDICT, strict=True)):
        assert PARAMETERS[ours] == PARAMETERS[theirs]


def test_hooks_are_defined_in_the_order_in_which_a_fit_first_fires_them(rich: type, recorder: Any, trainer: Any) -> None:
    trainer(plugins=[recorder], num_sanity_val_steps=2, log_every_n_steps=1).fit(rich())
    fired = list(dict.fromkeys(without_sanity(recorder.names)))
    undrawn = {*TEST, *PREDICT, *ANY_TIME, "find_checkpoints", "load_checkpoint", "on_checkpoint_loaded"}
    assert fired == [name for name in PARAMETERS if name not in undrawn]


@pytest.mark.parametrize("work", ["test", "predict"])
def test_hooks_are_defined_in_the_order_in_which_an_evaluation_fires_them(
    work: str, rich: type, trainer: Any, tmp_path: Any, make_recorder: Any
) -> None:
    path = _checkpoint(rich(), trainer, tmp_path)
    recorder = make_recorder(*(hook for hook in PARAMETERS if hook not in ("move_batch", "log_metrics", "evaluate")))
    getattr(trainer(plugins=[recorder]), work)(rich(), ckpt_path=path)
    fired = list(dict.fromkeys(recorder.names))
    assert fired == [name for name in PARAMETERS if name in fired]
    assert set(TEST if work == "test" else PREDICT) <= set(fired)
    assert {"load_checkpoint", "on_checkpoint_loaded", "log_hyperparameters"} <= set(fired)


def _checkpoint(module: Any, trainer: Any, folder: Any) -> Any:
    class Save:
        @hookimpl
        def on_train_end(self, run: Any) -> None:
            run.save_checkpoint(folder / "end.safetensors")

    trainer(plugins=[Save()]).fit(module)
    return folder / "end.safetensors"


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 1},
        {"max_epochs": 2, "num_sanity_val_steps": 2},
        {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 2, "log_every_n_steps": 1},
        {"max_epochs": 3, "accumulate_grad_batches": 3, "check_val_every_n_epoch": 2, "log_every_n_steps": 2},
        {"max_epochs": 1, "limit_val_batches": 0},
        {"max_steps": 3},
        {"max_steps": 6, "log_every_n_steps": 4},
        {"fast_dev_run": True},
    ],
    ids=str,
)
def test_a_fit_follows_the_picture_from_the_first_line_to_the_last(
    options: dict[str, Any], rich: type, recorder: Any, trainer: Any
) -> None:
    trainer(plugins=[recorder], **options).fit(rich())
    allowed = pattern(picture()).replace("(?:on_sanity_start )(?:evaluate )(?:on_sanity_end )", "(?:on_sanity_start on_sanity_end )?")
    names = without_sanity(recorder.names)
    followed = _followed(allowed, names)
    assert followed == len(names), f"the picture does not allow {names[followed]} after {names[max(0, followed - 8) : followed]}"


def _followed(allowed: str, names: list[str]) -> int:
    """How many of the names a run that the picture allows can begin with."""
    unfinished = re.compile(re.sub(r"\(\?:(\w+) \)", r"(?:\1 |\\Z)", allowed))  # any hook may be the last one seen
    finished = re.compile(allowed)
    if finished.fullmatch("".join(f"{name} " for name in names)):
        return len(names)
    return next(n for n in range(len(names) - 1, -1, -1) if unfinished.fullmatch("".join(f"{name} " for name in names[:n])))


# ---------------------------------------------------------------------- documentation


@pytest.mark.parametrize("hook", PARAMETERS)
def test_every_hook_says_when_it_fires_and_since_which_version(hook: str) -> None:
    text = inspect.getdoc(getattr(Hooks, hook)) or ""
    assert re.search(r"Since \d+\.\d+\.$", text), "the docstring must end with 'Since X.Y.'"
    assert len(text.split("Since")[0].split()) >= 4


@pytest.mark.parametrize("hook", sorted(OPERATIONS))
def test_every_operation_says_what_none_means(hook: str) -> None:
    assert "None" in (inspect.getdoc(getattr(Hooks, hook)) or ""), "the docstring must say what the answer None means"


def test_events_and_operations_are_told_apart_by_their_names() -> None:
    events = [name for name in PARAMETERS if name not in OPERATIONS]
    assert all(name.startswith(("on_", "log_")) or name in ("setup", "teardown") for name in events)
    assert not any(name.startswith(("on_", "log_")) for name in OPERATIONS)
    assert sorted(ACTIONS) == ["backward", "clip_gradients", "optimizer_step", "reduce_gradients", "scheduler_step", "zero_grad"]
    assert sorted(CLOSING) == ["on_exception", "on_fit_end", "on_run_end", "teardown"]


def test_every_hook_takes_the_run_first_and_annotates_every_argument() -> None:
    for hook, parameters in PARAMETERS.items():
        assert parameters[0] == "run", hook
        annotations = inspect.get_annotations(getattr(Hooks, hook))
        assert set(annotations) == {*parameters, "return"}, hook


# ---------------------------------------------------------------------- golden lists: fit

PLUGIN_FIT = """
launch  setup@fit  setup_module  prepare_loader/0@train  prepare_loader/0@validate
on_run_start  on_fit_start
on_sanity_start  evaluate@sanity
    move_batch  validation_step:0/0
    move_batch  validation_step:1/0
on_sanity_end
on_train_start
    on_train_epoch_start
        move_batch  on_train_batch_start:0  train_batch:0
            train_step:0  on_before_backward  backward  on_after_backward
        on_train_batch_end:0
        move_batch  on_train_batch_start:1  train_batch:1
            train_step:1  on_before_backward  backward  on_after_backward
            reduce_gradients  on_before_optimizer_step  clip_gradients  optimizer_step  on_after_optimizer_step
            on_before_zero_grad  zero_grad
        on_train_batch_end:1  log_metrics@train
        evaluate@validate  on_validation_start  on_validation_epoch_start
            move_batch  on_validation_batch_start:0/0  validation_step:0/0  on_validation_batch_end:0/0
            move_batch  on_validation_batch_start:1/0  validation_step:1/0  on_validation_batch_end:1/0
        on_validation_epoch_end  log_metrics@validate  on_validation_end
        move_batch  on_train_batch_start:2  train_batch:2
            train_step:2  on_before_backward  backward  on_after_backward
        on_train_batch_end:2
        move_batch  on_train_batch_start:3  train_batch:3
            train_step:3  on_before_backward  backward  on_after_backward
            reduce_gradients  on_before_optimizer_step  clip_gradients  optimizer_step  on_after_optimizer_step
            on_before_zero_grad  zero_grad
        on_train_batch_end:3  log_metrics@train
        evaluate@validate  on_validation_start  on_validation_epoch_start
            move_batch  on_validation_batch_start:0/0  validation_step:0/0  on_validation_batch_end:0/0
            move_batch  on_validation_batch_start:1/0  validation_step:1/0  on_validation_batch_end:1/0
        on_validation_epoch_end  log_metrics@validate  on_validation_end
    on_train_epoch_end
    on_train_epoch_start
        move_batch  on_train_batch_start:0  train_batch:0
            train_step:0  on_before_backward  backward  on_after_backward
        on_train_batch_end:0
        move_batch  on_train_batch_start:1  train_batch:1
            train_step:1  on_before_backward  backward  on_after_backward
            reduce_gradients  on_before_optimizer_step  clip_gradients  optimizer_step  on_after_optimizer_step
            on_before_zero_grad  zero_grad
        on_train_batch_end:1  log_metrics@train
        evaluate@validate  on_validation_start  on_validation_epoch_start
            move_batch  on_validation_batch_start:0/0  validation_step:0/0  on_validation_batch_end:0/0
            move_batch  on_validation_batch_start:1/0  validation_step:1/0  on_validation_batch_end:1/0
        on_validation_epoch_end  log_metrics@validate  on_validation_end
        move_batch  on_train_batch_start:2  train_batch:2
            train_step:2  on_before_backward  backward  on_after_backward
        on_train_batch_end:2
        move_batch  on_train_batch_start:3  train_batch:3
            train_step:3  on_before_backward  backward  on_after_backward
            reduce_gradients  on_before_optimizer_step  clip_gradients  optimizer_step  on_after_optimizer_step
            on_before_zero_grad  zero_grad
        on_train_batch_end:3  log_metrics@train
        evaluate@validate  on_validation_start  on_validation_epoch_start
            move_batch  on_validation_batch_start:0/0  validation_step:0/0  on_validation_batch_end:0/0
            move_batch  on_validation_batch_start:1/0  validation_step:1/0  on_validation_batch_end:1/0
        on_validation_epoch_end  log_metrics@validate  on_validation_end
    on_train_epoch_end
on_train_end
on_fit_end
teardown@fit
on_run_end=finished
"""

MODULE_FIT = """
setup@fit
on_run_start  on_fit_start
on_sanity_start
    on_validation_start  on_validation_epoch_start
    on_validation_batch_start:0/0  on_validation_batch_end:0/0
    on_validation_batch_start:1/0  on_validation_batch_end:1/0
    on_validation_epoch_end  on_validation_end
on_sanity_end
on_train_start
    on_train_epoch_start
        on_train_batch_start:0  on_before_backward  on_after_backward  on_train_batch_end:0
        on_train_batch_start:1  on_before_backward  on_after_backward
            on_before_optimizer_step  on_after_optimizer_step  on_before_zero_grad
        on_train_batch_end:1  log_metrics@train
        on_validation_start  on_validation_epoch_start
            on_validation_batch_start:0/0  on_validation_batch_end:0/0
            on_validation_batch_start:1/0  on_validation_batch_end:1/0
        on_validation_epoch_end  log_metrics@validate  on_validation_end
        on_train_batch_start:2  on_before_backward  on_after_backward  on_train_batch_end:2
        on_train_batch_start:3  on_before_backward  on_after_backward
            on_before_optimizer_step  on_after_optimizer_step  on_before_zero_grad
        on_train_batch_end:3  log_metrics@train
        on_validation_start  on_validation_epoch_start
            on_validation_batch_start:0/0  on_validation_batch_end:0/0
            on_validation_batch_start:1/0  on_validation_batch_end:1/0
        on_validation_epoch_end  log_metrics@validate  on_validation_end
    on_train_epoch_end
    on_train_epoch_start
        on_train_batch_start:0  on_before_backward  on_after_backward  on_train_batch_end:0
        on_train_batch_start:1  on_before_backward  on_after_backward
            on_before_optimizer_step  on_after_optimizer_step  on_before_zero_grad
        on_train_batch_end:1  log_metrics@train
        on_validation_start  on_validation_epoch_start
            on_validation_batch_start:0/0  on_validation_batch_end:0/0
            on_validation_batch_start:1/0  on_validation_batch_end:1/0
        on_validation_epoch_end  log_metrics@validate  on_validation_end
        on_train_batch_start:2  on_before_backward  on_after_backward  on_train_batch_end:2
        on_train_batch_start:3  on_before_backward  on_after_backward
            on_before_optimizer_step  on_after_optimizer_step  on_before_zero_grad
        on_train_batch_end:3  log_metrics@train
        on_validation_start  on_validation_epoch_start
            on_validation_batch_start:0/0  on_validation_batch_end:0/0
            on_validation_batch_start:1/0  on_validation_batch_end:1/0
        on_validation_epoch_end  log_metrics@validate  on_validation_end
    on_train_epoch_end
on_train_end
on_fit_end
teardown@fit
on_run_end=finished
"""

FIT = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 2, "num_sanity_val_steps": 2, "log_every_n_steps": 1}


def test_a_plugin_sees_a_fit_in_this_order(tiny: Any, trainer: Any, recorder: Any) -> None:
    trainer(plugins=[recorder], **FIT).fit(tiny(train=4, val=2))
    assert shown(recorder) == words(PLUGIN_FIT)


def test_the_module_sees_a_fit_in_this_order_and_validation_in_the_sanity_check_too(tiny: Any, trainer: Any, recorder: Any) -> None:
    trainer(**FIT).fit(watched(tiny.Module, recorder)(train=4, val=2))
    assert shown(recorder) == words(MODULE_FIT)


def test_the_module_is_told_of_an_event_before_the_plugins(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    recorder, order = make_recorder("on_train_start"), []
    recorder.record = lambda hook, arguments: order.append("plugin")
    module = watched(tiny.Module, make_recorder())()
    type(module).record = lambda self, hook, arguments: order.append("module") if hook == "on_train_start" else None
    trainer(plugins=[recorder]).fit(module)
    assert order == ["module", "plugin"]


def test_records_carry_stage_step_epoch_and_samples(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    recorder = make_recorder("log_metrics")
    trainer(plugins=[recorder], **FIT).fit(tiny(train=4, val=2, batch_size=2))
    keys = ("stage", "step", "epoch", "samples")
    assert [tuple(arguments[key] for key in keys) for _, arguments in recorder.calls] == [
        ("train", 1, 0, 4), ("validate", 1, 0, 4), ("train", 2, 0, 8), ("validate", 2, 0, 8),
        ("train", 3, 1, 12), ("validate", 3, 1, 12), ("train", 4, 1, 16), ("validate", 4, 1, 16),
    ]  # fmt: skip


def test_what_is_logged_at_the_end_of_an_evaluation_is_in_the_record_before_its_last_event(
    tiny: Any, trainer: Any, make_recorder: Any
) -> None:
    class Logs(tiny.Module):
        def on_validation_epoch_end(self) -> None:
            self.log("of_the_epoch", 1.0)

    recorder, records = make_recorder("log_metrics", "on_validation_epoch_end", "on_validation_end"), []
    recorder.record = lambda hook, arguments: records.append([hook, *sorted(arguments.get("metrics", []))])
    trainer(plugins=[recorder]).validate(Logs())
    assert records == [["on_validation_epoch_end"], ["log_metrics", "of_the_epoch", "val_loss"], ["on_validation_end"]]


def test_schedulers_step_after_their_optimizer_and_at_the_end_of_the_epoch(rich: type, trainer: Any, make_recorder: Any) -> None:
    recorder = make_recorder(
        "on_after_optimizer_step", "zero_grad", "scheduler_step", "on_scheduler_step", "on_train_batch_end", "on_validation_end",
        "on_train_epoch_end",
    )  # fmt: skip
    trainer(plugins=[recorder], accumulate_grad_batches=2).fit(rich(train=3))
    expected = """
        on_train_batch_end:0
        on_after_optimizer_step  zero_grad  scheduler_step  on_scheduler_step  on_train_batch_end:1
        on_after_optimizer_step  zero_grad  scheduler_step  on_scheduler_step  on_train_batch_end:2
        on_validation_end
        scheduler_step  on_scheduler_step
        on_train_epoch_end
    """
    assert shown(recorder) == words(expected)


def test_a_batch_whose_step_returns_none_is_skipped_and_the_window_still_ends(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    class Skips(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (1, 2, 3) else self.loss(batch)

    recorder = make_recorder(
        "on_train_batch_start", "train_step", "backward", "optimizer_step", "zero_grad", "on_step_skipped", "on_train_batch_end"
    )
    trainer(plugins=[recorder], accumulate_grad_batches=2).fit(Skips(train=4, val=0))
    expected = """
        on_train_batch_start:0  train_step:0  backward  on_train_batch_end:0
        on_train_batch_start:1  train_step:1  on_step_skipped  optimizer_step  zero_grad  on_train_batch_end:1
        on_train_batch_start:2  train_step:2  on_step_skipped  on_train_batch_end:2
        on_train_batch_start:3  train_step:3  on_step_skipped  on_train_batch_end:3
    """
    assert shown(recorder) == words(expected)
    assert [arguments["outputs"] for name, arguments in recorder.calls if name == "on_train_batch_end"] == ["Tensor", None, None, None]


class StopAt:
    """Asks to stop at the end of a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    @hookimpl
    def on_train_batch_end(self, run: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            run.request_stop("enough")


@pytest.mark.parametrize("batch", [2, 3])
def test_a_stop_in_mid_epoch_lets_the_running_window_end_and_leaves_out_the_end_of_the_epoch(
    batch: int, tiny: Any, trainer: Any, make_recorder: Any
) -> None:
    recorder = make_recorder(*(hook for hook in PARAMETERS if hook not in OPERATIONS and "backward" not in hook and "zero" not in hook))
    trainer(plugins=[recorder, StopAt(batch)], max_epochs=5, accumulate_grad_batches=2).fit(tiny(train=6))
    stops = {2: ["", "on_stop_requested", ""], 3: ["", "", "on_stop_requested"]}[batch]
    expected = f"""
        setup@fit  on_run_start  on_fit_start  on_train_start  on_train_epoch_start
        on_train_batch_start:0  on_train_batch_end:0
        on_train_batch_start:1  on_before_optimizer_step  on_after_optimizer_step  on_train_batch_end:1 {stops[0]}
        on_train_batch_start:2  on_train_batch_end:2 {stops[1]}
        on_train_batch_start:3  on_before_optimizer_step  on_after_optimizer_step  on_train_batch_end:3 {stops[2]}
        log_metrics@train  on_train_end  on_fit_end  teardown@fit  on_run_end=stopped
    """
    assert shown(recorder) == words(expected)
    (request,) = (arguments for name, arguments in recorder.calls if name == "on_stop_requested")
    assert (request["reason"], request["plugin"]) == ("enough", "stop_at")


# ---------------------------------------------------------------------- golden lists: validate, test, predict


@pytest.mark.parametrize("stage, name", [("validate", "validation"), ("test", "test")])
def test_a_plugin_sees_an_evaluation_in_this_order(stage: str, name: str, tiny: Any, trainer: Any, recorder: Any) -> None:
    getattr(trainer(plugins=[recorder]), stage)(tiny(val=2, test=2))
    expected = f"""
        launch  setup@{stage}  setup_module  prepare_loader/0@{stage}  on_run_start
        evaluate@{stage}
            on_{name}_start  on_{name}_epoch_start
            move_batch  on_{name}_batch_start:0/0  {name}_step:0/0  on_{name}_batch_end:0/0
            move_batch  on_{name}_batch_start:1/0  {name}_step:1/0  on_{name}_batch_end:1/0
            on_{name}_epoch_end  log_metrics@{stage}  on_{name}_end
        teardown@{stage}  on_run_end=finished
    """
    assert shown(recorder) == words(expected)


def test_a_plugin_sees_a_prediction_in_this_order(tiny: Any, trainer: Any, recorder: Any) -> None:
    trainer(plugins=[recorder]).predict(tiny(predict=2))
    expected = """
        launch  setup@predict  setup_module  prepare_loader/0@predict  on_run_start
        on_predict_start  on_predict_epoch_start
        move_batch  on_predict_batch_start:0/0  predict_step:0/0  on_predict_batch_end:0/0
        move_batch  on_predict_batch_start:1/0  predict_step:1/0  on_predict_batch_end:1/0
        on_predict_epoch_end  on_predict_end
        teardown@predict  on_run_end=finished
    """
    assert shown(recorder) == words(expected)


@pytest.mark.parametrize("stage, name", [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_the_module_sees_the_same_events_of_an_evaluation(stage: str, name: str, tiny: Any, trainer: Any, recorder: Any) -> None:
    getattr(trainer(), stage)(watched(tiny.Module, recorder)())
    record = "" if stage == "predict" else f"log_metrics@{stage}"
    expected = f"""
        setup@{stage}  on_run_start  on_{name}_start  on_{name}_epoch_start
        on_{name}_batch_start:0/0  on_{name}_batch_end:0/0
        on_{name}_batch_start:1/0  on_{name}_batch_end:1/0
        on_{name}_epoch_end  {record}  on_{name}_end
        teardown@{stage}  on_run_end=finished
    """
    assert shown(recorder) == words(expected)


def test_several_validation_loaders_are_gone_through_one_after_the_other(tiny: Any, trainer: Any, recorder: Any) -> None:
    trainer(plugins=[recorder]).validate(tiny(val=2, val_loaders=2))
    expected = """
        launch  setup@validate  setup_module  prepare_loader/0@validate  prepare_loader/1@validate  on_run_start
        evaluate@validate  on_validation_start  on_validation_epoch_start
            move_batch  on_validation_batch_start:0/0  validation_step:0/0  on_validation_batch_end:0/0
            move_batch  on_validation_batch_start:1/0  validation_step:1/0  on_validation_batch_end:1/0
            move_batch  on_validation_batch_start:0/1  validation_step:0/1  on_validation_batch_end:0/1
            move_batch  on_validation_batch_start:1/1  validation_step:1/1  on_validation_batch_end:1/1
        on_validation_epoch_end  log_metrics@validate  on_validation_end
        teardown@validate  on_run_end=finished
    """
    assert shown(recorder) == words(expected)


def test_starting_from_a_file_reads_it_first_and_puts_it_in_place_between_the_start_of_the_run_and_its_work(
    tiny: Any, trainer: Any, tmp_path: Any, make_recorder: Any
) -> None:
    path = _checkpoint(tiny(), trainer, tmp_path)
    recorder = make_recorder("on_run_start", "load_checkpoint", "on_checkpoint_loaded", "evaluate")
    trainer(plugins=[recorder]).test(tiny(), ckpt_path=path)
    assert recorder.names == ["load_checkpoint", "on_run_start", "on_checkpoint_loaded", "evaluate"]
    assert recorder.calls[0][1]["path"] == recorder.calls[2][1]["path"] == path


def test_saving_and_removing_a_checkpoint_is_announced(tiny: Any, trainer: Any, tmp_path: Any, make_recorder: Any) -> None:
    class Keep:
        @hookimpl
        def on_train_end(self, run: Any) -> None:
            path = run.save_checkpoint(tmp_path / "a.safetensors", "last", {"x": 1.0})
            run.remove_checkpoint(path, "too many")

    recorder = make_recorder("save_checkpoint", "on_checkpoint_saved", "on_checkpoint_removed", "on_train_end")
    trainer(plugins=[recorder, Keep()]).fit(tiny())
    assert recorder.names == ["on_train_end", "save_checkpoint", "on_checkpoint_saved", "on_checkpoint_removed"]
    assert [arguments.get("reason") for _, arguments in recorder.calls] == [None, None, "last", "too many"]


def test_an_error_is_announced_before_the_end_of_the_fit(tiny: Any, trainer: Any, make_recorder: Any) -> None:
    class Fails(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise MemoryError("no memory left")

    recorder = make_recorder("on_train_end", "on_out_of_memory", "on_exception", "on_fit_end", "teardown", "on_run_end")
    with pytest.raises(MemoryError):
        trainer(plugins=[recorder]).fit(Fails())
    assert shown(recorder) == ["on_out_of_memory", "on_exception", "on_fit_end", "teardown@fit", "on_run_end=failed"]
    assert recorder.calls[2][1]["exception"] == "MemoryError"
