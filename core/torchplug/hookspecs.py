"""The contract: every hook of torchplug, in the order in which it fires.

Two kinds of hook, told apart by name:

* **Events** (``on_...``, ``setup``, ``teardown``, ``log_...``): every plugin is told, in order. What it returns is ignored.
* **Operations** (a verb): plugins are asked in order, the first that returns something other than ``None`` decides, and core
  answers last. A plugin replaces an operation by answering it and surrounds it with ``@hookimpl(wrapper=True)``.

An implementation names only the arguments it wants. The picture of a run::

    launch
      [find_checkpoints  load_checkpoint]          when starting from a file
      setup
      setup_module
      for loader: prepare_loader
      on_run_start
      log_hyperparameters
      [on_checkpoint_loaded]                       when starting from a file
      on_fit_start
      on_sanity_start  evaluate  on_sanity_end
      on_train_start
      for epoch:
        on_train_epoch_start
        for batch:
          move_batch
          on_train_batch_start
          train_batch                              around the following:
            train_step
            on_before_backward  backward  on_after_backward
            at the end of an accumulation window:
              reduce_gradients
              on_before_optimizer_step  clip_gradients  optimizer_step  on_after_optimizer_step
              on_before_zero_grad  zero_grad
              scheduler_step  on_scheduler_step
          on_train_batch_end
          [log_metrics]                            every log_every_n_steps
          when validation is due: evaluate
            on_validation_start  on_validation_epoch_start
            for batch: move_batch  on_validation_batch_start  validation_step  on_validation_batch_end  [log_metrics]
            on_validation_epoch_end  [log_metrics]  on_validation_end  [log_metrics]
        [scheduler_step  on_scheduler_step]        schedulers with interval="epoch"
        [on_train_epoch_end  log_metrics]          unless training stops in the middle of it
      [log_metrics]                                step values since the last record
      on_train_end
      [log_metrics]
      on_fit_end                                   always, also after an error
      [log_metrics]
    teardown                                       always, in reverse order
    on_run_end                                     always, in reverse order

``test`` and ``predict`` have the hooks of validation under their own names, between ``on_run_start`` and ``teardown``.
In the sanity check the validation events reach the module and the data module alone; operations work as ever.

A hook or argument that will go is marked first: ``@event(warn_on_impl=DeprecationWarning("..."))`` or ``warn_on_impl_args={"batch":
DeprecationWarning("...")}``, with a text that says since when and what to write instead. Whoever implements it is warned by name.

Where several processes train together, each of them (a *rank*) goes through this picture. ``log_metrics`` and the like reach
rank 0 alone, with values of all ranks. Between two logging steps ranks exchange gradients and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from torchplug.launching import Task
    from torchplug.optimizers import Scheduler
    from torchplug.run import Run

__all__ = ["SPECS", "Hooks", "hookimpl"]

Function = TypeVar("Function", bound=Callable[..., Any])

hookimpl = pluggy.HookimplMarker("torchplug")
event = pluggy.HookspecMarker("torchplug")
operation = event(firstresult=True)


def action(function: Function) -> Function:
    """Marks an operation that does something and has no value: whoever did it answers ``True``."""
    function.torchplug_action = True  # type: ignore[attr-defined]
    return operation(function)


def closing(function: Function) -> Function:
    """Marks an event that reaches every plugin even if one of them raises, the last plugin first."""
    function.torchplug_closing = True  # type: ignore[attr-defined]
    return event(function)


class Hooks:
    """All hooks. The loop calls an object of this type; a plugin may inherit from it to have its signatures checked."""

    # ------------------------------------------------------------------ the start of a run

    @operation
    def launch(self, run: Run, main: Task) -> Any:
        """Once, first of all: run ``main()`` here, or in other processes.

        A strategy answers with the `torchplug.launching.Done` that ``main()`` gave. ``main`` can be pickled and called in another
        process, and brings back what came of it. ``None``: core calls ``main()`` in this process. Since 0.1.
        """

    @operation
    def find_checkpoints(self, run: Run, which: str) -> Any:
        """When ``ckpt_path`` is "last" or "best" (``which``): where to look. The run has no directory yet.

        Answer with a list of paths (``Path``, or ``str`` for a URL), the preferred one first: the first that can be loaded is
        taken. ``None``: this plugin keeps no checkpoints; core knows of none. Since 0.1.
        """

    @operation
    def load_checkpoint(self, run: Run, path: Path | str) -> Any:
        """When starting from a file, before anything is set up: read it, with no other effect.

        Answer with the state. ``None``: core reads a local file. Since 0.1.
        """

    @event
    def setup(self, run: Run, stage: str) -> None:
        """Once, before module, optimizers and loaders are prepared; ``stage`` is fit, validate, test or predict.

        Make what the run needs and forget what an earlier run left. ``run.device`` may be set here. Since 0.1.
        """

    @operation
    def setup_module(self, run: Run, module: Any) -> Any:
        """Once, after ``configure_model`` and before ``configure_optimizers``: move or wrap the module.

        Answer with the module. ``None``: core moves it to ``run.device`` and to the dtype of the precision. Since 0.1.
        """

    @operation
    def prepare_loader(self, run: Run, loader: Any, stage: str, dataloader_idx: int) -> Any:
        """Once for each loader: distribute or prefetch it; ``stage`` is train, validate, test or predict.

        Answer with an iterable of batches. ``None``: the loader is used as it is. Since 0.1.
        """

    @event
    def on_run_start(self, run: Run) -> None:
        """Once, when run directory, run id and options are known: loggers open. Since 0.1."""

    @event
    def log_hyperparameters(self, run: Run, hyperparameters: dict[str, Any]) -> None:
        """Once, after ``on_run_start``, with the ``hparams`` of module and data module if there are any. Since 0.1."""

    @event
    def on_checkpoint_loaded(self, run: Run, path: Path | str) -> None:
        """After the state of ``path`` was put in place. Since 0.1."""

    # ------------------------------------------------------------------ fit

    @event
    def on_fit_start(self, run: Run) -> None:
        """Once, before the sanity check. Since 0.1."""

    @event
    def on_sanity_start(self, run: Run) -> None:
        """Before the sanity check: a few validation batches that leave no trace in metrics or generators. Since 0.1."""

    @event
    def on_sanity_end(self, run: Run) -> None:
        """After the sanity check. Since 0.1."""

    @event
    def on_train_start(self, run: Run) -> None:
        """Once, before the first epoch. Since 0.1."""

    @event
    def on_train_epoch_start(self, run: Run) -> None:
        """Before the first batch of an epoch is fetched. Since 0.1."""

    @operation
    def move_batch(self, run: Run, batch: Any) -> Any:
        """For each batch of every stage: bring it to the device. Answer with the batch to use.

        ``None``: core moves every tensor inside it to ``run.device``. Since 0.1.
        """

    @event
    def on_train_batch_start(self, run: Run, batch: Any, batch_idx: int) -> None:
        """Before a batch is trained on. Tensors in ``batch`` may be changed in place. Since 0.1."""

    @operation
    def train_batch(self, run: Run, batch: Any, batch_idx: int) -> Any:
        """The whole of one batch: forward, backward and, at the end of a window, the update. ``None``: core does all of it.

        What answers replaces everything up to ``on_train_batch_end`` (a compiled step, two-pass optimizers), counts
        ``run.position.step`` itself and answers with the outputs. Since 0.1.
        """

    @operation
    def train_step(self, run: Run, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        """The forward pass. ``None``: core calls the module's ``training_step``.

        Answers a scalar loss, or a dict with one under ``loss``. Wrap it for autocast. Since 0.1.
        """

    @event
    def on_before_backward(self, run: Run, loss: Tensor) -> None:
        """Before each backward pass; ``loss`` is as the step returned it, not divided or scaled. Since 0.1."""

    @action
    def backward(self, run: Run, loss: Tensor, optimizer: Optimizer | None) -> bool | None:
        """Compute gradients; ``loss`` is divided by the window's length. ``optimizer`` is None in manual optimization.

        Return ``True`` when done; ``None`` leaves it to the next plugin, and in the end to core. Since 0.1.
        """

    @event
    def on_after_backward(self, run: Run) -> None:
        """After each backward pass. Inside a window gradients are still incomplete. Since 0.1."""

    @action
    def reduce_gradients(self, run: Run, optimizer: Optimizer) -> bool | None:
        """At the end of a window, before anybody sees the gradients: make them the mean over ranks, if they are not yet.

        ``True`` when done; ``None`` where there is nothing to do. Since 0.1.
        """

    @event
    def on_before_optimizer_step(self, run: Run, optimizer: Optimizer) -> None:
        """Before clipping and update: gradients are complete, unscaled and not yet clipped. They may be changed. Since 0.1."""

    @action
    def clip_gradients(self, run: Run, optimizer: Optimizer) -> bool | None:
        """Clip the gradients of ``optimizer``. ``True`` when done; ``None``: core follows ``gradient_clip_val``. Since 0.1."""

    @action
    def optimizer_step(self, run: Run, optimizer: Optimizer, closure: Callable[[], Tensor] | None) -> bool | None:
        """Update the parameters. ``True``: updated, ``False``: skipped (it is not counted), ``None``: core does it.

        ``closure`` evaluates the loss again and is None for an optimizer that needs none. Since 0.1.
        """

    @event
    def on_after_optimizer_step(self, run: Run, optimizer: Optimizer) -> None:
        """After an update; gradients are still there, clipped. ``run.position.step`` has been counted up. Since 0.1."""

    @event
    def on_before_zero_grad(self, run: Run, optimizer: Optimizer) -> None:
        """Before gradients are cleared, right after the update. Since 0.1."""

    @action
    def zero_grad(self, run: Run, optimizer: Optimizer) -> bool | None:
        """Clear the gradients. ``True`` when done; ``None``: core sets them to None. Since 0.1."""

    @action
    def scheduler_step(self, run: Run, scheduler: Scheduler) -> bool | None:
        """Step a learning-rate scheduler whose turn it is. ``True`` when stepped, ``False`` when it waits, ``None``: core does it.

        Since 0.1.
        """

    @event
    def on_scheduler_step(self, run: Run, scheduler: Scheduler) -> None:
        """After a scheduler stepped: the learning rates are the new ones. Since 0.1."""

    @event
    def on_train_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a batch; ``outputs`` is what the step returned, None if it was skipped. Since 0.1."""

    @event
    def log_metrics(self, run: Run, metrics: dict[str, float], stage: str, step: int, epoch: int, samples: int, seconds: float) -> None:
        """A record for loggers: at logging steps and at the end of each epoch and evaluation.

        ``step`` counts optimizer steps, ``samples`` training samples, ``seconds`` the time since the run started. Since 0.1.
        """

    # ------------------------------------------------------------------ validation

    @operation
    def evaluate(self, run: Run, stage: str) -> Any:
        """One pass over the loaders of ``stage`` (sanity, validate, test). Wrap it to evaluate with other weights.

        Answers a dict of metrics for each loader. ``None``: core runs the loop below. Since 0.1.
        """

    @event
    def on_validation_start(self, run: Run) -> None:
        """Before a validation; the module is in eval mode. Since 0.1."""

    @event
    def on_validation_epoch_start(self, run: Run) -> None:
        """After ``on_validation_start``, before the first batch is fetched. Since 0.1."""

    @event
    def on_validation_batch_start(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Before a validation batch. Since 0.1."""

    @operation
    def validation_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """The forward pass of validation. ``None``: core calls the module's ``validation_step``. Since 0.1."""

    @event
    def on_validation_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """After a validation batch. Since 0.1."""

    @event
    def on_validation_epoch_end(self, run: Run) -> None:
        """After the last batch: the means are in ``run.metrics``, and more may be logged. Since 0.1."""

    @event
    def on_validation_end(self, run: Run) -> None:
        """After the metrics were handed to loggers: act on them. Since 0.1."""

    # ------------------------------------------------------------------ the end of training

    @event
    def on_train_epoch_end(self, run: Run) -> None:
        """After an epoch's batches, validation and schedulers; training means are in ``run.metrics``. Since 0.1."""

    @event
    def on_train_end(self, run: Run) -> None:
        """Once, when training ended by itself or was stopped, not after an error or a signal. The module may be changed. Since 0.1."""

    @closing
    def on_fit_end(self, run: Run, exception: BaseException | None) -> None:
        """Always, also after an error (then with it). Since 0.1."""

    # ------------------------------------------------------------------ test

    @event
    def on_test_start(self, run: Run) -> None:
        """Before a test; the module is in eval mode. Since 0.1."""

    @event
    def on_test_epoch_start(self, run: Run) -> None:
        """After ``on_test_start``, before the first batch is fetched. Since 0.1."""

    @event
    def on_test_batch_start(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Before a test batch. Since 0.1."""

    @operation
    def test_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """The forward pass of a test. ``None``: core calls the module's ``test_step``. Since 0.1."""

    @event
    def on_test_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """After a test batch. Since 0.1."""

    @event
    def on_test_epoch_end(self, run: Run) -> None:
        """After the last batch: the means are in ``run.metrics``, and more may be logged. Since 0.1."""

    @event
    def on_test_end(self, run: Run) -> None:
        """After the metrics were handed to loggers. Since 0.1."""

    # ------------------------------------------------------------------ predict

    @event
    def on_predict_start(self, run: Run) -> None:
        """Before prediction; the module is in eval mode. Since 0.1."""

    @event
    def on_predict_epoch_start(self, run: Run) -> None:
        """After ``on_predict_start``, before the first batch is fetched. Since 0.1."""

    @event
    def on_predict_batch_start(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Before a batch is predicted. Since 0.1."""

    @operation
    def predict_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """The prediction for a batch. ``None``: core calls the module's ``predict_step``. Since 0.1."""

    @event
    def on_predict_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """After a batch was predicted: write ``outputs`` away when ``return_predictions=False``. Since 0.1."""

    @event
    def on_predict_epoch_end(self, run: Run) -> None:
        """After the last batch. Since 0.1."""

    @event
    def on_predict_end(self, run: Run) -> None:
        """Once, when prediction is over. Since 0.1."""

    # ------------------------------------------------------------------ at any time

    @event
    def on_step_skipped(self, run: Run, reason: str) -> None:
        """When a training step returned None, or the loss scaler skipped an update. Since 0.1."""

    @event
    def on_stop_requested(self, run: Run, reason: str, plugin: str) -> None:
        """When ``run.request_stop(reason)`` was called first; ``plugin`` is who called it, "" if nobody knows.

        Also when a signal interrupts the run (``run.interrupted``), between two optimizer steps: a checkpoint that is asked for
        now is the last thing that happens in training. Since 0.1.
        """

    @operation
    def save_checkpoint(self, run: Run, path: Path | str, state: dict[str, Any]) -> Any:
        """When a checkpoint is due: write ``state``, which ``run.state()`` gave. A writer may call it from a thread of its own.

        Answer with the path that was written. ``None``: core writes one local safetensors file. Since 0.1.
        """

    @event
    def on_checkpoint_saved(self, run: Run, path: Path | str, metrics: dict[str, float], reason: str) -> None:
        """After a checkpoint is complete on disk; ``reason`` says why it was kept (best, last, ...). Since 0.1."""

    @event
    def on_checkpoint_removed(self, run: Run, path: Path | str, reason: str) -> None:
        """After a checkpoint was deleted by ``run.remove_checkpoint``. Since 0.1."""

    @event
    def log_figure(self, run: Run, name: str, figure: Any, step: int) -> None:
        """A matplotlib figure for loggers, from ``run.log_figure``. Since 0.1."""

    @event
    def log_text(self, run: Run, name: str, text: str, step: int) -> None:
        """A text for loggers, from ``run.log_text``. Since 0.1."""

    @event
    def log_artifact(self, run: Run, path: Path, name: str) -> None:
        """A file for loggers that keep files, from ``run.log_artifact``. Since 0.1."""

    @operation
    def reduce(self, run: Run, values: Tensor, how: str) -> Any:
        """Combine a tensor on the CPU over ranks, element by element; ``how`` is sum, min or max.

        Answer with a tensor of the same shape, the same on all ranks. ``None``: there is one process. Every rank must ask. Since 0.1.
        """

    @operation
    def gather(self, run: Run, value: Any) -> Any:
        """Collect one picklable value from each rank. Answer with the list, by rank. ``None``: there is one process. Since 0.1."""

    @operation
    def broadcast(self, run: Run, value: Any) -> Any:
        """Answer with the picklable value that rank 0 has. ``None``: there is one process. Since 0.1."""

    @operation
    def barrier(self, run: Run) -> Any:
        """Wait until every rank is here. Answer ``True``. ``None``: there is one process. Since 0.1."""

    @operation
    def tune(self, run: Run) -> Any:
        """``trainer.tune``: look for a good value and set it. Answer with results by name; ``None``: nothing to tune. Since 0.1."""

    # ------------------------------------------------------------------ the end of a run

    @event
    def on_out_of_memory(self, run: Run, exception: BaseException) -> None:
        """When an error says that memory ran out, before ``on_exception``. Since 0.1."""

    @closing
    def on_exception(self, run: Run, exception: BaseException) -> None:
        """When an error (or Ctrl-C) ends the run, before ``on_fit_end``. It is raised again afterwards. Since 0.1."""

    @closing
    def teardown(self, run: Run, stage: str) -> None:
        """Always, in reverse order, also for plugins whose ``setup`` was never reached. Give back what is held. Since 0.1."""

    @closing
    def on_run_end(self, run: Run, status: str) -> None:
        """Always, last: loggers close; ``status`` is finished, stopped, interrupted or failed. Since 0.1."""


SPECS = {name: spec for name, spec in vars(Hooks).items() if hasattr(spec, "torchplug_spec")}
