"""What a user may set: the arguments of the Trainer, each documented and checked."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from torchplug.options import above, at_least, check_fields, closest, duration

__all__ = ["RENAMED", "Settings"]

Precision = Literal["32", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16", "bf16", 16, 32]
UNFIT = ("SIGKILL", "SIGSTOP", "SIGCHLD", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL")  # cannot be taken, or are no request
SIGNALS = tuple(each.name for each in signal.Signals if each.name not in UNFIT)
PRECISIONS = {"32-true": "32", "16": "16-mixed", "bf16": "bf16-mixed", 16: "16-mixed", 32: "32"}

# what older trainers called it -> what to write now
RENAMED = {
    "gpus": "write accelerator='gpu', devices=N",
    "tpu_cores": "TPUs are not supported",
    "num_processes": "write strategy='ddp', devices=N",
    "auto_lr_find": "add 'lr_finder' to plugins, or call trainer.tune(module)",
    "auto_scale_batch_size": "add 'batch_size_finder' to plugins, or call trainer.tune(module)",
    "progress_bar_refresh_rate": "write {'progress': {'rate': ...}} in plugins",
    "enable_progress_bar": "leave 'progress' out of plugins",
    "enable_model_summary": "leave 'summary' out of plugins",
    "weights_summary": "write {'summary': {'max_depth': ...}} in plugins",
    "enable_checkpointing": "leave 'checkpoint' out of plugins",
    "checkpoint_callback": "write {'checkpoint': {...}} in plugins",
    "callbacks": "write plugins=[...]: names, name -> options, or objects",
    "logger": "write plugins=['tensorboard', ...]: loggers are plugins",
    "distributed_backend": "write strategy='ddp'",
    "default_root_dir": "write root_dir",
    "weights_save_path": "write {'checkpoint': {'dir': ...}} in plugins",
    "resume_from_checkpoint": "give the checkpoint's path to the method: trainer.fit(module, ckpt_path=...)",
    "stochastic_weight_avg": "add 'swa' to plugins",
    "track_grad_norm": "add 'grad_norm' to plugins",
    "terminate_on_nan": "write nonfinite_loss='error'",
    "max_nb_epochs": "write max_epochs",
    "min_nb_epochs": "write min_epochs",
    "amp_backend": "write precision='16-mixed' or 'bf16-mixed'",
    "amp_level": "write precision='16-mixed' or 'bf16-mixed'",
    "sync_batchnorm": "write strategy={'ddp': {'sync_batchnorm': True}}",
    "replace_sampler_ddp": "the strategy wraps the sampler that you gave",
    "use_distributed_sampler": "the strategy wraps the sampler that you gave",
    "profiler": "add 'profiler' to plugins",
    "log_gpu_memory": "add 'device_stats' to plugins",
    "flush_logs_every_n_steps": "loggers write from their own thread",
    "reload_dataloaders_every_n_epochs": "give an iterable that makes its own loader",
    "move_metrics_to_cpu": "values stay on their device until they are read",
    "inference_mode": "evaluation runs under torch.no_grad()",
    "truncated_bptt_steps": "use automatic_optimization = False",
    "automatic_optimization": "set self.automatic_optimization = False in the module",
    "barebones": "write plugins=[]",
    "benchmark_mode": "write benchmark",
}  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Settings:
    """How to train, in numbers and names.

    Args:
        max_epochs: Train for this many epochs. One of max_epochs, max_steps, max_time is needed to fit.
        max_steps: Train for this many optimizer steps.
        max_time: Train for this long ('30m', '1h30m', '00:12:00:00' as days:hours:minutes:seconds, a timedelta, or a dict
            of its arguments). The step that is running is finished.
        min_epochs: A request to stop waits until this many epochs are done.
        min_steps: A request to stop waits until this many optimizer steps are done.
        limit_train_batches: Batches of an epoch: a count, or a fraction up to 1.0 of them.
        limit_val_batches: Batches of each validation loader: a count, or a fraction. 0 switches validation off.
        limit_test_batches: Batches of each test loader: a count, or a fraction.
        limit_predict_batches: Batches of each loader to predict for: a count, or a fraction.
        overfit_batches: Train on the same few batches, without shuffling: a count, or a fraction; 0 is off. Validation
            uses them too.
        fast_dev_run: Run one batch (or this many) of training, validation and test to see that everything works; whatever
            is written goes into a temporary folder and is deleted.
        val_check_interval: When to validate in an epoch: a fraction of it, a number of batches, or a time ('10m',
            a timedelta). With check_val_every_n_epoch=None batches are counted over the whole run.
        check_val_every_n_epoch: Validate in every n-th epoch. None: val_check_interval alone decides.
        num_sanity_val_steps: Validation batches to try before training starts, to find errors early; -1 takes all.
        log_every_n_steps: Hand step values to loggers every this many optimizer steps.
        accumulate_grad_batches: Add up the gradients of this many batches before each optimizer step. The loss is divided
            by the number of batches that were really added up, also in the short last window of an epoch.
        gradient_clip_val: Clip gradients before each step: the largest norm (in the units of the gradient, all parameters
            taken together), or the largest absolute value of an element. Typical norms are 0.1 to 10. None does not clip.
        gradient_clip_algorithm: What gradient_clip_val limits: the norm of all gradients together, or each value.
        precision: Number format: '32', 'bf16-mixed' and '16-mixed' (autocast; the second with a loss scaler), 'bf16-true'
            (parameters too). 16 means '16-mixed'.
        deterministic: Use deterministic algorithms only; 'warn' warns where there is none. Equal runs need seed too, and on
            CUDA the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8; workers of a loader get their seeds from it.
        benchmark: Let cuDNN try algorithms and keep the fastest. None leaves torch's own setting.
        detect_anomaly: Find the operation that made a gradient NaN. Slow.
        nonfinite_loss: What happens when the loss stays NaN or infinite: 'error' ends the run, 'warn' says so, 'ignore'.
        signals: Signals that end a fit after the step that is running, with a checkpoint, as 'SIGTERM' does; Ctrl-C always
            does. The program then exits with 128 + the signal's number.
        seed: Seed every random generator with this number when the run starts.
        accelerator: 'auto' (a GPU where there is one and its plugin is installed), 'cpu', or the name of a plugin.
        devices: How many devices, or a list of their numbers, or 'auto'.
        num_nodes: How many machines take part.
        strategy: 'auto' (one process), or the name of a plugin such as 'ddp', or {name: options}.
        root_dir: Where runs are kept: root_dir/name/version_N.
        name: The run's name. None takes the name of the module's class.
        plugins: Plugins to use: names, {name: options} and objects. None takes the bundle 'standard' if it is installed.
        lock: A file that the command torchplug lock wrote. A plugin that is not the one that is locked there is refused before
            it is imported.
        trace: Write a timeline of every hook of every plugin to this file, for Chrome or Perfetto, and show what each cost, with
            the plugin 'profiler'.
    """

    max_epochs: Annotated[int | None, at_least(1)] = None
    max_steps: Annotated[int | None, at_least(1)] = None
    max_time: str | timedelta | dict[str, Any] | None = None
    min_epochs: Annotated[int | None, at_least(1)] = None
    min_steps: Annotated[int | None, at_least(1)] = None
    limit_train_batches: Annotated[int | float, above(0)] = 1.0
    limit_val_batches: Annotated[int | float, at_least(0)] = 1.0
    limit_test_batches: Annotated[int | float, at_least(0)] = 1.0
    limit_predict_batches: Annotated[int | float, at_least(0)] = 1.0
    overfit_batches: Annotated[int | float, at_least(0)] = 0
    fast_dev_run: bool | Annotated[int, at_least(0)] = False
    val_check_interval: Annotated[int | float, above(0)] | str | timedelta | dict[str, Any] = 1.0
    check_val_every_n_epoch: Annotated[int | None, at_least(1)] = 1
    num_sanity_val_steps: Annotated[int, at_least(-1)] = 2
    log_every_n_steps: Annotated[int, at_least(1)] = 50
    accumulate_grad_batches: Annotated[int, at_least(1)] = 1
    gradient_clip_val: Annotated[int | float | None, above(0)] = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    precision: Precision = "32"
    deterministic: bool | Literal["warn"] = False
    benchmark: bool | None = None
    detect_anomaly: bool = False
    nonfinite_loss: Literal["error", "warn", "ignore"] = "error"
    signals: list[str] | tuple[str, ...] = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
    seed: Annotated[int | None, at_least(0)] = None
    accelerator: str = "auto"
    devices: Annotated[int, at_least(1)] | list[int] | Literal["auto"] = 1
    num_nodes: Annotated[int, at_least(1)] = 1
    strategy: str | dict[str, Any] = "auto"
    root_dir: str | os.PathLike[str] = "runs"
    name: str | None = None
    plugins: list[Any] | tuple[Any, ...] | None = None
    lock: str | os.PathLike[str] | None = None
    trace: str | os.PathLike[str] | None = None

    def __new__(cls, *args: Any, **arguments: Any) -> Any:
        if args:
            raise TypeError(f"{cls.__name__} takes its arguments by name, got {args[0]!r} without one")
        for name in arguments:
            if name in RENAMED:
                raise TypeError(f"{cls.__name__} has no argument {name!r}: {RENAMED[name]}")
            if name not in Settings.__dataclass_fields__:
                raise TypeError(f"{cls.__name__} has no argument {name!r}{closest(name, Settings.__dataclass_fields__)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches"):
            value = getattr(self, name)
            if isinstance(value, float) and value > 1.0:
                raise ValueError(f"{name} as a fraction must be at most 1.0, got {value!r}; a number of batches is written as an int")
        if isinstance(self.val_check_interval, float) and self.val_check_interval > 1.0:
            raise ValueError(
                f"val_check_interval as a fraction must be at most 1.0, got {self.val_check_interval!r}; a number of batches is "
                "written as an int, several epochs as check_val_every_n_epoch"
            )
        if isinstance(self.seed, int) and self.seed >= 2**32:
            raise ValueError(f"seed must be below {2**32}, got {self.seed!r}")
        for name in self.signals:
            if name not in SIGNALS and name not in Settings.signals:  # not every system has all of them
                raise ValueError(f"signals: there is no {name!r}{closest(str(name), SIGNALS)}; write names such as 'SIGTERM'")
        for name in ("max_time", "val_check_interval"):
            value = getattr(self, name)
            if isinstance(value, (str, timedelta, dict)):
                duration(name, value)
        if isinstance(self.devices, list) and (not self.devices or any(type(d) is not int or d < 0 for d in self.devices)):
            raise ValueError(f"devices must list at least one device number from 0 on, got {self.devices!r}")
        if self.name is not None and (self.name in ("", ".", "..") or Path(self.name).name != self.name):
            raise ValueError(f"name must be usable as the name of one folder, got {self.name!r}")
        for name in ("accelerator", "strategy"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must be 'auto' or the name of a plugin, got ''")
        if isinstance(self.strategy, dict) and len(self.strategy) != 1:
            raise ValueError(f"strategy must be a name or one {{name: options}}, got {self.strategy!r}")
        if self.min_epochs and self.max_epochs and self.min_epochs > self.max_epochs:
            raise ValueError(f"min_epochs={self.min_epochs} is more than max_epochs={self.max_epochs}")
        if self.min_steps and self.max_steps and self.min_steps > self.max_steps:
            raise ValueError(f"min_steps={self.min_steps} is more than max_steps={self.max_steps}")
        self.precision = PRECISIONS.get(self.precision, self.precision)  # type: ignore[assignment]
        if self.plugins is not None:
            self.plugins = list(self.plugins)  # the user's own list is never touched
