"""The loop: a run, its epochs, its batches, as free functions that read like the picture in `hookspecs.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchplug.blame import also, blame, note_place
from torchplug.data import IN_WORDS, batch_size, move
from torchplug.loaders import begin, close, set_working, working
from torchplug.loss import LossWatch, explain_backward, loss_of
from torchplug.optimizers import only
from torchplug.schedule import Limits, Validation, evaluating
from torchplug.seed import preserved, remembered
from torchplug.signals import Interruption
from torchplug.state import collect, freeze_metrics, go_on
from torchplug.trials import out_of_memory

if TYPE_CHECKING:
    from torchplug.hookspecs import Hooks
    from torchplug.members import Member
    from torchplug.metrics import Results
    from torchplug.optimizers import Scheduler
    from torchplug.run import Run

__all__ = ["conduct", "evaluate", "fit", "predict", "train_batch", "update"]


def conduct(run: Run, hooks: Hooks, members: Iterable[Member], work: Callable[[], Any]) -> Any:
    """Does ``work`` and, whatever comes of it, tells every plugin that it is over; the first error is raised."""
    failure: BaseException | None = None
    result = None

    def told(call: Callable[..., None], *arguments: Any) -> BaseException | None:
        """Makes a closing call; an error in it becomes the failure, or is grouped under the one there is."""
        try:
            call(run, *arguments)
        except BaseException as error:
            blame(error, members, run.rank)
            if failure is None:
                return error
            also(failure, error)
        return failure

    try:
        result = work()
    except BaseException as error:
        failure, run.training = error, False
        run.agreement = run.metrics.agreement = None  # other ranks may be anywhere: nothing can be agreed on any more
        blame(error, members, run.rank)
        note_place(error, run)
        if out_of_memory(error):
            told(hooks.on_out_of_memory, error)
        told(hooks.on_exception, error)
    if run.work == "fit":
        failure = told(hooks.on_fit_end, failure)
        if failure is None and not run.interrupted:
            failure = told(lambda run: _record(run, hooks, run.metrics.record()))
    failure = told(hooks.teardown, run.purpose)
    failure = told(hooks.on_run_end, _status(run, failure))
    try:
        if failure is not None:
            raise failure
    finally:
        failure = None  # a traceback that holds its own frame would keep everything alive
    return result


def _status(run: Run, failure: BaseException | None) -> str:
    if isinstance(failure, KeyboardInterrupt):
        return "interrupted"
    if failure is not None:
        return "failed"
    if run.interrupted:
        return "interrupted"
    return "stopped" if run.stop_reason else "finished"


# ---------------------------------------------------------------------- fit


def fit(run: Run, hooks: Hooks) -> None:
    """Trains until a limit is reached, somebody asked to stop, or a signal came."""
    if not run.module.training:
        run.say_once(f"{type(run.module).__name__} was in eval mode and is put into train mode; freeze parts of it if that is meant")
        run.module.train()
    if run.agreement is not None:
        run.agreement.begin()
    hooks.on_fit_start(run)
    validation, limits, watch = Validation(run), Limits(run), LossWatch(run)
    if validation.enabled and run.options.num_sanity_val_steps and run.loaded is None:
        hooks.on_sanity_start(run)
        with preserved(*run.loaders["validate"]), run.metrics.unseen(), suppress(Interruption):
            hooks.evaluate(run, "sanity")
        hooks.on_sanity_end(run)
    with run.metrics.open("train"):
        run.position.stage, run.training = "train", True
        hooks.on_train_start(run)
        go_on(run)
        run.settle()
        while not limits.reached():
            train_epoch(run, hooks, validation, limits, watch)
        if not run.interrupted:
            _conclude(run, hooks, watch)
            run.ended = collect(run)
        run.settle()
        run.training = False
    run.position.stage = ""


def _conclude(run: Run, hooks: Hooks, watch: LossWatch) -> None:
    """Training is over by itself."""
    run.settle()
    watch.conclude()
    if run.position.batch:  # in the middle of an epoch, whose sums a run that goes on needs
        freeze_metrics(run)
    _record(run, hooks, run.metrics.step_record(together=True))
    run.metrics.finish()
    hooks.on_train_end(run)
    _record(run, hooks, run.metrics.record())
    run.settle()


def train_epoch(run: Run, hooks: Hooks, validation: Validation, limits: Limits, watch: LossWatch) -> None:
    """One epoch, or the rest of one: its batches, the validations that fall into it, its end."""
    position, metrics = run.position, run.metrics
    every, accumulate = run.options.log_every_n_steps, limits.set_accumulation()
    run.exhausted, first_step = False, -1 if position.batch else position.step
    due: float = 0  # the micro step after which something may have to be done
    if not position.batch:
        hooks.on_train_epoch_start(run)
        _record(run, hooks, metrics.record())  # what was logged until here belongs to training, not to a validation that records first
    metrics.batches()
    batches = run.stream.epoch(position.epoch, position.batch)
    if run.agreement is not None and run.agreement.uneven:
        batches = run.agreement.until_one_ends(batches)
    if position.batch:  # what was still to be done when the checkpoint was written
        on = _after_batch(run, hooks, validation, limits)
        if not on and (run.interrupted or not run.is_last_batch):
            return
    for batch in batches:
        batch_idx, micro_step, step = position.batch, position.micro_step, position.step
        if accumulate > 1:
            limits.open_window(batch_idx)
        batch = hooks.move_batch(run, batch)
        size = metrics.size = batch_size(batch)
        if run.share is not None and limits.stands_in(batch_idx):
            size = 0
        hooks.on_train_batch_start(run, batch, batch_idx)
        outputs = hooks.train_batch(run, batch, batch_idx)
        if micro_step >= due:
            watch.look(outputs)
        position.batch, position.micro_step = batch_idx + 1, micro_step + 1
        position.samples += size
        hooks.on_train_batch_end(run, outputs, batch, batch_idx)
        batch = outputs = None  # nothing is held while the next one is fetched
        if micro_step < due and not run.attention:
            continue  # most batches have nothing more to do
        if position.step % every == 0 and position.step != step:
            _record(run, hooks, metrics.step_record(together=True))
        run.validated = False
        if not _after_batch(run, hooks, validation, limits):
            break
        due = min(watch.due, limits.next_due(), validation.next_due())
    else:
        limits.exhausted()
        step = position.step
        for index, contributions in enumerate(run.contributions):
            if contributions:  # the last window was shorter than the loader's length promised
                _end_long_window(run, hooks, index)
                run.window_ends = True
        if position.step % every == 0 and position.step != step:
            _record(run, hooks, metrics.step_record(together=True))
        run.counted = -1  # the next batch takes another step
    if run.interrupted or not run.is_last_batch:
        return
    if validation.due_after_epoch() and not _validated(run, hooks):
        return
    limits.check_progress(first_step)
    metrics.finish()
    metrics.complete = metrics.validated or not validation.enabled
    for scheduler in run.epoch_schedulers:
        if (position.epoch + 1) % scheduler.frequency == 0:
            _step_scheduler(run, hooks, scheduler)
    hooks.on_train_epoch_end(run)
    _record(run, hooks, metrics.record())
    run.agree()
    position.epoch, position.batch, run.validated = position.epoch + 1, 0, False
    run.settle()


def _after_batch(run: Run, hooks: Hooks, validation: Validation, limits: Limits) -> bool:
    """What follows a batch: boundaries, and a validation if one is due. Whether training goes on in this epoch."""
    whole = run.window_ends
    if whole and run.attention:
        run.settle()
    if whole and run.interrupted:
        return False
    if validation.within_epoch and not run.validated and validation.due_after_batch():
        if not _validated(run, hooks):
            return False
        validation.over()
        if whole and run.attention:
            run.settle()
    return not (whole and limits.stop())


def _validated(run: Run, hooks: Hooks) -> bool:
    """Validates. A signal ends that, and no trace is left in metrics and generators: the run that goes on begins it again."""
    loaders = run.loaders["validate"]
    undo, were = (remembered(*loaders), run.metrics.remembered()), [working(loader) for loader in loaders]
    try:
        hooks.evaluate(run, "validate")
    except Interruption:
        for put_back in undo:
            put_back()
        for loader, was in zip(loaders, were, strict=True):
            close(loader)
            set_working(loader, was)
        return False
    run.validated = run.metrics.validated = True
    run.agree()
    return True


def train_batch(run: Run, batch: Any, batch_idx: int) -> Any:
    """Core's answer to the operation of this name: forward, backward and, at the end of a window, the update."""
    hooks, index = run.hooks, run.turn
    if index < 0:
        return _train_in_turn(run, hooks, batch, batch_idx)
    outputs = hooks.train_step(run, batch, batch_idx, index)
    loss = outputs if isinstance(outputs, Tensor) else loss_of(run, outputs)
    if loss is not None:
        hooks.on_before_backward(run, loss)
        try:
            hooks.backward(run, loss if run.window == 1 and run.share is None else run.weighed(loss), run.optimizers[index])
        except RuntimeError as error:
            explain_backward(loss, error)
            raise
        hooks.on_after_backward(run)
        if run.window == 1:
            again = _reevaluation(run, hooks, batch, batch_idx, index, loss) if run.closures[index] else None
            update(run, hooks, index, again)
            return outputs
        run.contributions[index] += 1
    else:
        run.say_once("training_step returned None: the batch is skipped (return the loss to train on it)")
        hooks.on_step_skipped(run, "training_step returned None")
    if run.window_ends and run.contributions[index]:
        _end_long_window(run, hooks, index)
    return outputs


def _train_in_turn(run: Run, hooks: Hooks, batch: Any, batch_idx: int) -> Any:
    """A batch in manual optimization, or for several optimizers, one after the other."""
    if not run.automatic:
        outputs = hooks.train_step(run, batch, batch_idx, 0)
        run.window_ends = run.counted == run.position.micro_step  # gradients may be added up over batches that do not step
        return outputs
    answers = []
    try:
        for index, optimizer in enumerate(run.optimizers):
            run.turn = index
            with only(optimizer, run.optimizers):
                answers.append(train_batch(run, batch, batch_idx))
    finally:
        run.turn = -1
    return answers


def _end_long_window(run: Run, hooks: Hooks, index: int) -> None:
    """The end of a window of several batches. Where some were skipped, or fewer came than the loader's length
    promised, the gradients become the true mean all the same."""
    contributions, run.contributions[index] = run.contributions[index], 0
    update(run, hooks, index, None, run.window / contributions)


def update(run: Run, hooks: Hooks, index: int, closure: Callable[[], Tensor] | None, scale: float = 1.0) -> None:
    """One optimizer step with the hooks around it, gradients multiplied with ``scale``. In automatic optimization gradients are
    cleared and schedulers step."""
    optimizer, position = run.optimizers[index], run.position
    hooks.reduce_gradients(run, optimizer)
    if scale != 1.0:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None):
            parameter.grad.mul_(scale)
    hooks.on_before_optimizer_step(run, optimizer)
    hooks.clip_gradients(run, optimizer)
    updated = hooks.optimizer_step(run, optimizer, closure) is not False
    if updated:
        run.optimizer_steps[index] += 1
        if run.counted != position.micro_step:  # a batch with several optimizers is one step
            run.counted = position.micro_step
            position.step += 1
        hooks.on_after_optimizer_step(run, optimizer)
    else:
        hooks.on_step_skipped(run, "the gradients were not finite; the loss scale was lowered")
    if run.automatic:
        hooks.on_before_zero_grad(run, optimizer)
        hooks.zero_grad(run, optimizer)
    if updated and run.step_schedulers:
        for scheduler in run.step_schedulers:
            if scheduler.optimizer is optimizer and run.optimizer_steps[index] % scheduler.frequency == 0:
                _step_scheduler(run, hooks, scheduler)


def _reevaluation(run: Run, hooks: Hooks, batch: Any, batch_idx: int, index: int, loss: Tensor) -> Callable[[], Tensor]:
    """The closure of an optimizer that evaluates the loss several times; the first answer is known already."""
    known = [loss]

    def together(loss: Tensor) -> Tensor:
        """The loss of all ranks, by which an optimizer decides; gradients are those of all anyhow."""
        if run.agreement is None:
            return loss
        own = run.weighed(loss).detach().to("cpu", torch.float64)
        total: Tensor = hooks.reduce(run, own, "sum")
        return (total / run.world_size).to(loss)

    def closure() -> Tensor:
        if known:
            return together(known.pop())
        with torch.enable_grad():
            hooks.zero_grad(run, run.optimizers[index])
            again = loss_of(run, hooks.train_step(run, batch, batch_idx, index))
            if again is None:
                raise ValueError("training_step returned None while the optimizer evaluated the loss again")
            hooks.on_before_backward(run, again)
            hooks.backward(run, run.weighed(again), run.optimizers[index])
            hooks.on_after_backward(run)
            hooks.reduce_gradients(run, run.optimizers[index])
            hooks.clip_gradients(run, run.optimizers[index])  # the search must not mix clipped with unclipped ones
        return together(again)

    return closure


def _step_scheduler(run: Run, hooks: Hooks, scheduler: Scheduler) -> None:
    if hooks.scheduler_step(run, scheduler) is not False:
        hooks.on_scheduler_step(run, scheduler)


def _record(run: Run, hooks: Hooks, metrics: dict[str, float]) -> None:
    """Hands values to the loggers, if there are any."""
    if metrics and run.rank == 0:
        where = run.position
        hooks.log_metrics(run, metrics, where.stage or "train", where.step, where.epoch, where.samples, run.seconds)


# ---------------------------------------------------------------------- validate, test, predict


class _Evaluation(NamedTuple):
    """The hooks of one kind of evaluation."""

    start: Callable[[Run], None]
    epoch_start: Callable[[Run], None]
    batch_start: Callable[[Run, Any, int, int], None]
    step: Callable[[Run, Any, int, int], Any]
    batch_end: Callable[[Run, Any, Any, int, int], None]
    epoch_end: Callable[[Run], None]
    end: Callable[[Run], None]


def _evaluation(hooks: Hooks, stage: str) -> _Evaluation:
    if stage == "test":
        return _Evaluation(
            hooks.on_test_start, hooks.on_test_epoch_start, hooks.on_test_batch_start, hooks.test_step,
            hooks.on_test_batch_end, hooks.on_test_epoch_end, hooks.on_test_end,
        )  # fmt: skip
    if stage == "predict":
        return _Evaluation(
            hooks.on_predict_start, hooks.on_predict_epoch_start, hooks.on_predict_batch_start, hooks.predict_step,
            hooks.on_predict_batch_end, hooks.on_predict_epoch_end, hooks.on_predict_end,
        )  # fmt: skip
    return _Evaluation(
        hooks.on_validation_start, hooks.on_validation_epoch_start, hooks.on_validation_batch_start, hooks.validation_step,
        hooks.on_validation_batch_end, hooks.on_validation_epoch_end, hooks.on_validation_end,
    )  # fmt: skip


def evaluate(run: Run, hooks: Hooks, stage: str) -> list[Results]:
    """Core's answer to the operation of this name: one pass over the loaders of ``stage``, a dict of metrics for each."""
    return _one_pass(run, hooks, stage, None)


def predict(run: Run, hooks: Hooks, keep: bool) -> list[list[Any]] | None:
    """One pass over the loaders to predict for; what ``predict_step`` returned, batch by batch, if it is to be kept."""
    kept: list[list[Any]] | None = [[] for _ in run.loaders["predict"]] if keep else None
    _one_pass(run, hooks, "predict", kept)
    if kept is not None and run.agreement is not None:  # batches were dealt out in turn
        ranks, none = run.agreement.gather(move(kept, torch.device("cpu"))), object()
        turns = [zip_longest(*parts, fillvalue=none) for parts in zip(*ranks, strict=True)]
        return [[batch for batch in chain.from_iterable(each) if batch is not none] for each in turns]
    return kept


def _one_pass(run: Run, hooks: Hooks, stage: str, kept: list[list[Any]] | None) -> list[Results]:
    source = "validate" if stage == "sanity" else stage
    loaders, metrics, every = run.loaders[source], run.metrics, run.options.log_every_n_steps
    on = _evaluation(hooks, stage)
    with evaluating(run, stage), metrics.open(stage, len(loaders)):
        on.start(run)
        on.epoch_start(run)
        for dataloader_idx, loader in enumerate(loaders):
            metrics.batches(dataloader_idx)
            count = 0
            for batch in islice(begin(loader, run.position.epoch, run.position.micro_step), run.limits[stage][dataloader_idx]):
                if run.attention and run.interrupted and run.work == "fit" and run.window_ends:
                    raise Interruption
                batch = hooks.move_batch(run, batch)
                metrics.size = batch_size(batch)
                on.batch_start(run, batch, count, dataloader_idx)
                outputs = on.step(run, batch, count, dataloader_idx)
                on.batch_end(run, outputs, batch, count, dataloader_idx)
                if kept is not None:
                    kept[dataloader_idx].append(outputs)
                batch = outputs = None
                count += 1
                if count % every == 0 and stage != "sanity":
                    _record(run, hooks, metrics.step_record())
            if count == 0 and run.agreement is None:
                raise ValueError(f"the {IN_WORDS[stage]} loader {dataloader_idx} gave no batch; is its data set empty, or used up?")
        results = metrics.finish()
        on.epoch_end(run)
        values = metrics.record()
        if stage != "sanity":
            _record(run, hooks, values)
        on.end(run)
        late = metrics.record()
        if stage != "sanity":
            _record(run, hooks, late)
    return metrics.complete_results(results, {**values, **late})
