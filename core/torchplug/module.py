"""What a user subclasses: the model, what a step computes, and the optimizers."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchplug.data import DataModule
from torchplug.optimizers import outside_of_autocast
from torchplug.options import closest
from torchplug.run import Position

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["STEPS", "Module"]

STEPS = ("training_step", "validation_step", "test_step", "predict_step")

# methods of older trainers -> what to write now
FORMER = {
    "training_epoch_end": "on_train_epoch_end; means of what you self.log in training_step come by themselves",
    "validation_epoch_end": "on_validation_epoch_end; means of what you self.log in validation_step come by themselves",
    "test_epoch_end": "on_test_epoch_end; means of what you self.log in test_step come by themselves",
    "validation_end": "on_validation_epoch_end; means of what you self.log in validation_step come by themselves",
    "test_end": "on_test_epoch_end; means of what you self.log in test_step come by themselves",
    "training_end": "training_step, which returns the loss",
    "training_step_end": "training_step, which returns the loss",
    "validation_step_end": "validation_step",
    "test_step_end": "test_step",
    "optimizer_zero_grad": "zero_grad hooks in a plugin",
    "configure_gradient_clipping": "clip_gradients(self, optimizer)",
    "lr_scheduler_step": "scheduler_step(self, scheduler)",
    "on_save_checkpoint": "buffers for what belongs to the weights, a plugin's state_dict for the rest",
    "on_load_checkpoint": "buffers for what belongs to the weights, a plugin's load_state_dict for the rest",
    "configure_callbacks": "configure_plugins, which returns a list of plugins",
    "tng_dataloader": "train_dataloader",
    "get_progress_bar_dict": "self.log(name, value, prog_bar=True)",
    "transfer_batch_to_device": "move_batch(self, batch)",
    "on_before_batch_transfer": "move_batch(self, batch)",
    "on_after_batch_transfer": "on_train_batch_start(self, batch), which may change tensors in place",
}
KNOWN = (*STEPS, "configure_optimizers", "configure_model", "configure_plugins", "prepare_data", "setup", "teardown",
         "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader", "forward")  # fmt: skip


class Module(nn.Module):
    """A model with what it takes to train it. Define ``training_step`` and ``configure_optimizers``, and what else you need.

    A method named like a hook (``on_train_epoch_end``) is called as one; it takes the arguments that it names.

    Attributes:
        automatic_optimization: False when ``training_step`` itself calls ``manual_backward`` and the optimizers.
        example_input_array: an input of ``forward`` (a tensor, tuple or dict), for summaries and exports.
    """

    # no annotations here: TorchScript reads those of a class, and knows no Any; properties it has to be told to leave alone
    automatic_optimization = True
    example_input_array = None  # type: Any
    __jit_unused_properties__ = ("run", "device", "current_epoch", "global_step", "hparams")

    def __init__(self) -> None:
        super().__init__()
        self._run: Run | None = None
        self._hparams_argument = ""
        self._hparams_logged = True
        self._hparams = Hyperparameters()

    # ------------------------------------------------------------------ to be defined by the user

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch: a scalar tensor, a dict with it under ``loss``, or None to skip the batch. Called with batch, batch_idx."""
        raise NotImplementedError(f"{type(self).__name__} has no training_step")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """What to do with a validation batch: log metrics. Called with batch, batch_idx, dataloader_idx."""
        raise NotImplementedError(f"{type(self).__name__} has no validation_step")

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """What to do with a test batch: log metrics. Called with batch, batch_idx, dataloader_idx."""
        raise NotImplementedError(f"{type(self).__name__} has no test_step")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The prediction for a batch. By default ``forward`` of the batch, or of its first part if it is a list or tuple."""
        batch = args[0]
        return self(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def configure_optimizers(self) -> Any:
        """One optimizer, several, or dicts with ``optimizer`` and ``lr_scheduler``; see `torchplug.optimizers.parse`."""
        return None

    def configure_model(self) -> None:
        """Makes layers that are too large to be made twice; called once, after ``setup``."""

    def configure_plugins(self) -> list[Any]:
        """Plugins that this module brings with it, in the forms that ``Trainer(plugins=...)`` takes."""
        return []

    def prepare_data(self) -> None:
        """Download and unpack; runs in one process of each machine."""

    def train_dataloader(self) -> Any:
        """The loader to train on."""

    def val_dataloader(self) -> Any:
        """The loader, or list of loaders, to validate on."""

    def test_dataloader(self) -> Any:
        """The loader, or list of loaders, to test on."""

    def predict_dataloader(self) -> Any:
        """The loader, or list of loaders, to predict for."""

    # ------------------------------------------------------------------ during a run

    @property
    def run(self) -> Run:
        """The run that the module takes part in.

        Raises:
            RuntimeError: it is not in a run.
        """
        if self._run is None:
            raise RuntimeError(
                f"{type(self).__name__} is not in a run: self.run, self.optimizers() and the like work inside of trainer.fit(...)"
            )
        return self._run

    @property
    def device(self) -> torch.device:
        """Where the first parameter or buffer is; the CPU for a module without any."""
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def current_epoch(self) -> int:
        """Index of the current epoch, 0 outside of a run."""
        return self._run.position.epoch if self._run else 0

    @property
    def global_step(self) -> int:
        """Finished optimizer steps, 0 outside of a run."""
        return self._run.position.step if self._run else 0

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Tensor], Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Records a metric.

        Args:
            name: its name; with ``on_step`` and ``on_epoch`` both, loggers get ``name_step`` and ``name_epoch``.
            value: a number, a tensor with one element, or an object with update, compute and reset.
            prog_bar: show it in the progress display.
            logger: hand it to loggers (None: yes).
            on_step: record the value of the step, every ``log_every_n_steps`` steps (None: in training).
            on_epoch: record the reduction over the epoch (None: in evaluation, and outside of batches).
            reduce_fx: mean (weighted by batch size), sum, min, max, or a function of the tensor of all values.
            enable_graph: keep the graph of the value.
            sync_dist: accepted for code that gives it. The values of all ranks are always combined, when they are recorded: those of
                a step at logging steps, those of an epoch at its end. It costs nothing in between.
            sync_dist_group: not supported.
            add_dataloader_idx: with several loaders, append ``/dataloader_idx_N``.
            batch_size: the weight of the value in a mean; found in the batch if not given.
            metric_attribute: accepted for code that gives it; not needed.
            rank_zero_only: whether rank 0 alone logs it, as it is there. Do not monitor it: other ranks do not know it.
        """
        if self._run is None:
            _say_once_outside(name)
            return
        if sync_dist_group is not None:
            raise ValueError(f"log({name!r}): sync_dist_group is not supported; the values of all ranks are combined")
        options = (prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx, rank_zero_only)
        self._run.metrics.log(name, value, options, enable_graph, batch_size)

    def log_dict(self, values: Mapping[str, Any], **options: Any) -> None:
        """`log` for each name and value."""
        for name, value in values.items():
            self.log(name, value, **options)

    def optimizers(self) -> Any:
        """The optimizers for manual optimization, one or a list; their ``step`` is counted and announced."""
        manual = self.run.manual_optimizers
        return manual[0] if len(manual) == 1 else manual

    def lr_schedulers(self) -> Any:
        """The schedulers, one or a list; None without any."""
        schedulers = [each.scheduler for each in self.run.schedulers]
        return schedulers[0] if len(schedulers) == 1 else schedulers or None

    def manual_backward(self, loss: Tensor) -> None:
        """``loss.backward()`` with precision and hooks, for manual optimization."""
        run = self.run
        with outside_of_autocast(run):
            run.hooks.on_before_backward(run, loss)
            run.hooks.backward(run, loss if run.share is None else run.weighed(loss), None)
            run.hooks.on_after_backward(run)

    # ------------------------------------------------------------------ hyperparameters

    @property
    def hparams(self) -> Hyperparameters:
        """What `save_hyperparameters` took; its keys are attributes too."""
        return self._hparams

    def save_hyperparameters(self, *args: Any, ignore: str | list[str] | tuple[str, ...] = (), logger: bool = True) -> None:
        """Keeps arguments of ``__init__`` in ``hparams`` and in every checkpoint. Call it in ``__init__``.

        Args:
            args: nothing for all arguments of ``__init__``, some of their names, or a dict, Namespace or dataclass.
            ignore: names to leave out.
            logger: whether loggers get them.

        Raises:
            TypeError: something that is none of these forms.
            ValueError: the name of an argument that ``__init__`` does not have.
        """
        frame = inspect.currentframe()
        given = _init_arguments(self, frame.f_back if frame else None)
        left_out = {ignore} if isinstance(ignore, str) else set(ignore)
        if not args:
            chosen = given
        elif all(isinstance(arg, str) for arg in args):
            for name in args:
                if name not in given:
                    raise ValueError(f"save_hyperparameters: {type(self).__name__}.__init__ has no argument {name!r}{closest(name, given)}")
            chosen = {name: given[name] for name in args}
        elif len(args) == 1 and isinstance(args[0], Mapping):
            chosen = dict(args[0])
        elif len(args) == 1 and hasattr(args[0], "__dict__") and not isinstance(args[0], type):
            chosen = dict(vars(args[0]))
        else:
            raise TypeError(f"save_hyperparameters takes names of arguments, a dict, a Namespace or a dataclass, got {args!r}")
        if len(args) == 1 and not isinstance(args[0], str):  # load_from_checkpoint gives it back under the argument's name
            self._hparams_argument = next((name for name, value in given.items() if value is args[0]), "")
        self.hparams.update({name: value for name, value in chosen.items() if name not in left_out})
        self._hparams_logged = logger

    @classmethod
    def load_from_checkpoint(cls, path: str | Path, strict: bool = True, averaged: str | None = None, **overrides: Any) -> Any:
        """A module of this class built from the hyperparameters in a checkpoint (and ``overrides``), with its weights.

        Args:
            path: a checkpoint that torchplug wrote.
            strict: whether names of parameters must match exactly.
            averaged: the name of a plugin whose weights to take, such as "ema" for the average; None: the module's own.
            overrides: arguments of ``__init__`` in place of those that were saved.

        Raises:
            TypeError: ``__init__`` needs arguments that are neither saved nor given; they are named.
        """
        from torchplug import checkpoint

        state = checkpoint.load(path)
        saved = {name: _attributes(value) for name, value in state["hyperparameters"].items()}
        if state["hyperparameters_argument"]:
            saved = {state["hyperparameters_argument"]: Hyperparameters(saved)}
        arguments = {**saved, **overrides}
        parameters = inspect.signature(cls.__init__).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for name in overrides:
                if name not in parameters:
                    raise TypeError(f"{cls.__name__}.__init__ has no argument {name!r}{closest(name, list(parameters)[1:])}")
            arguments = {name: value for name, value in arguments.items() if name in parameters}
        needed = [
            name
            for name, p in list(parameters.items())[1:]
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and name not in arguments
        ]
        if needed:
            names = ", ".join(needed)
            raise TypeError(
                f"{cls.__name__}.load_from_checkpoint: {path} does not hold {names}; call self.save_hyperparameters() in __init__, "
                f"or give them here: load_from_checkpoint(path, {needed[0]}=...)"
            )
        module = cls(**arguments)
        module.load_state_dict(state["module"] if averaged is None else checkpoint.weights(path, averaged), strict=strict)
        return module

    # ------------------------------------------------------------------ conveniences

    def freeze(self) -> None:
        """Turns gradients of all parameters off and goes into eval mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Turns gradients of all parameters on and goes into train mode."""
        self.requires_grad_(True)
        self.train()

    def _example(self, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``forward`` in an example input, by place and by name."""
        example = self.example_input_array if example is None else example
        if example is None:
            raise ValueError(f"{type(self).__name__} has no example input: give one, or set self.example_input_array")
        if isinstance(example, dict):
            return (), example
        return (example if isinstance(example, tuple) else (example,)), {}

    @contextmanager
    def _exporting(self) -> Iterator[None]:
        """In eval mode without gradients, each submodule afterwards in the mode it was in."""
        modes, run = [(module, module.training) for module in self.modules()], self._run
        self.eval()
        if run is None:  # exporters look at every attribute, and `run` must not raise then
            self.__dict__["_run"] = SimpleNamespace(position=Position(), metrics=SimpleNamespace(log=lambda *_: None))
        try:
            with torch.no_grad():
                yield
        finally:
            self._run = run
            for module, training in modes:
                module.training = training

    def to_onnx(self, path: str | Path, example: Any = None, **options: Any) -> None:
        """Exports ``forward`` with ``torch.onnx.export``; ``example`` defaults to ``example_input_array``."""
        with self._exporting():
            places, names = self._example(example)
            by_name: dict[str, Any] = {"kwargs": names} if names else {}
            torch.onnx.export(self, places, str(path), **by_name, **options)

    def to_torchscript(self, path: str | Path | None = None, method: str = "script", example: Any = None) -> Any:
        """``forward`` as TorchScript, by ``method`` "script" or "trace"; saved to ``path`` if it is given."""
        if method not in ("script", "trace"):
            raise ValueError(f"method must be 'script' or 'trace', got {method!r}")
        with self._exporting():
            if method == "script":
                plain: Any = torch.jit.script(self)
            else:
                places, names = self._example(example)
                plain = torch.jit.trace(self, places or None, example_kwarg_inputs=names or None)  # type: ignore[no-untyped-call]
        if path is not None:
            torch.jit.save(plain, str(path))
        return plain

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}  # a copy is not part of the run


@functools.cache
def _say_once_outside(name: str) -> None:
    logging.getLogger("torchplug").warning("self.log(%r) was called outside of a run; nothing is recorded", name)


class Hyperparameters(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}{closest(name, self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def _attributes(value: Any) -> Any:
    """Dicts, which may have been Namespaces or dataclasses, with their keys as attributes."""
    return Hyperparameters({key: _attributes(part) for key, part in value.items()}) if isinstance(value, dict) else value


def _init_arguments(instance: Any, frame: FrameType | None) -> dict[str, Any]:
    """The arguments of ``__init__`` of ``instance``, from the outermost ``__init__`` frame that is running."""
    arguments: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__" and next(iter(frame.f_locals.values()), None) is instance:
        names, _, keywords, values = inspect.getargvalues(frame)
        own = {name: values[name] for name in (*names[1:], *_keyword_only(frame))}
        arguments = {**arguments, **own, **(values[keywords] if keywords else {})}
        frame = frame.f_back
    return arguments


def _keyword_only(frame: FrameType) -> tuple[str, ...]:
    code = frame.f_code
    return code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]


def defines(module: Module, method: str) -> bool:
    """Whether the user's class defines ``method`` itself."""
    return getattr(type(module), method) is not getattr(Module, method)


def check_names(owner: Any) -> None:
    """Refuses methods of older trainers, and misspelt ones where the right one is missing, in a module or data module.

    Raises:
        TypeError: names the method and what to write.
    """
    for base in type(owner).__mro__:
        if base in Module.__mro__ or base is DataModule:
            continue
        for name, value in vars(base).items():
            if not inspect.isfunction(value) or name in KNOWN:
                continue
            where = f"{base.__name__}.{name}"
            if name in FORMER:
                raise TypeError(f"{where} is not called any more: write {FORMER[name]}")
            near = closest(name, [known for known in KNOWN if known not in vars(base) and _similar(name, known)])
            if near:
                raise TypeError(f"{where} is not a method that is called{near}")


def _similar(name: str, known: str) -> bool:
    """Whether one looks like a slip of the other: a few letters off, and not just a longer name for something else."""
    return difflib.SequenceMatcher(None, name, known).ratio() > 0.88 and abs(len(name) - len(known)) <= 2
