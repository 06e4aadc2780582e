"""The Trainer: names and options in, a trained module out."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from torchplug import checkpoint, loop
from torchplug.blame import blame, caller
from torchplug.config import write_config
from torchplug.discovery import PluginError, bare
from torchplug.dispatch import dispatch, register, watch
from torchplug.hookspecs import Hooks
from torchplug.launching import Call, Done, Task
from torchplug.loaders import close
from torchplug.lock import Lock
from torchplug.matching import Choice
from torchplug.members import Member
from torchplug.metrics import Results
from torchplug.module import Module, check_names
from torchplug.operations import Operations
from torchplug.ordering import order
from torchplug.plugins import build, named
from torchplug.precision import ScaledAutocast, Unscaling, operations_for
from torchplug.prepare import Sources, check_module, is_datamodule, make_directory, prepare
from torchplug.resume import Start, find_start, go_on_as, put_in_place
from torchplug.run import Run
from torchplug.seed import seed_everything
from torchplug.settings import Settings
from torchplug.signals import leave, watching
from torchplug.state import collect

__all__ = ["Trainer"]

logger = logging.getLogger("torchplug")
SHOWN = 20  # names of metrics in the report


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Shows the package's lines to a user who has not set logging up."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        return not logging.getLogger().handlers and bool(super().filter(record))


def _speak() -> None:
    """Lets the user read what the package says, without having set logging up."""
    if not logger.handlers:
        logger.addHandler(_Console())
        logger.setLevel(logging.INFO)


@dataclass(kw_only=True, eq=False)
class Trainer(Settings):
    __doc__ = Settings.__doc__

    def __post_init__(self) -> None:
        super().__post_init__()
        _speak()
        lock = Lock.read(self.lock) if self.lock is not None else None
        if lock is not None:
            lock.check_core()
        self._begin_with(named(self), lock)

    def _begin_with(self, plugins: list[Any], lock: Lock | None) -> None:
        """The plugins of all runs, found, built and ordered."""
        self.run: Run | None = None
        self.metrics = Results()
        self._module: Module | None = None
        self._fitted: Run | None = None
        self._lock = lock
        self._pace = ""
        self._members = build(plugins, lock)
        order(self._members)  # a cycle is an error now, not when training starts

    # ------------------------------------------------------------------ what a user calls

    def fit(
        self,
        module: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        """Trains ``module``. Called again for the same module, with a larger ``max_epochs``, it goes on where it ended.

        A run that goes on is the run that was never stopped, bit for bit. A signal (``Trainer(signals=...)``) or Ctrl-C ends it
        after the step that is running, with a checkpoint.

        Args:
            module: what to train; it holds the trained parameters afterwards.
            train_dataloaders: an iterable of batches, or a data module.
            val_dataloaders: an iterable of batches, or several.
            datamodule: loaders and data in one object.
            ckpt_path: a checkpoint to go on from: a path, "last" (the newest whole one of the earlier runs of this name; without
                any, training starts from the beginning) or "best".
            resume: which parts of it: {"include": [...]} or {"exclude": [...]} of model, optimizer, scheduler, position, data,
                rng, metrics, plugins and plugin:NAME. With "strict": False a plugin may be new, or not there any more. Without
                the position training starts from the beginning, as a new run.

        Raises:
            ValueError: no end was given (max_epochs, max_steps or max_time), or an option does not fit the data.
            TypeError: something that is needed is missing in the module.
            CheckpointError: the checkpoint is damaged, or does not fit; the message says what is different.
            SystemExit: a signal ended the run; the exit code is 128 + its number, 143 for SIGTERM.
            KeyboardInterrupt: Ctrl-C ended it.
        """
        if resume is not None and ckpt_path is None:
            raise ValueError("resume says what to take from a checkpoint: give ckpt_path too")
        if self.max_epochs is None and self.max_steps is None and self.max_time is None and not self.fast_dev_run:
            raise ValueError("how long to train is not said: give Trainer max_epochs, max_steps or max_time")
        Choice(resume)  # a mistake in it is an error before anything else happens
        loaders = {"train": train_dataloaders, "validate": val_dataloaders}
        self._begin("fit", module, loaders, datamodule, ckpt_path, resume=resume)

    def validate(
        self, module: Module | None = None, dataloaders: Any = None, datamodule: Any = None, ckpt_path: str | Path | None = None
    ) -> list[Results]:
        """Evaluates on the validation data; the arguments are those of `test`."""
        results: list[Results] = self._begin("validate", module, {"validate": dataloaders}, datamodule, ckpt_path)
        return results

    def test(
        self, module: Module | None = None, dataloaders: Any = None, datamodule: Any = None, ckpt_path: str | Path | None = None
    ) -> list[Results]:
        """Evaluates on the test data.

        Args:
            module: what to evaluate; without it the module of the last run, with the best checkpoint of its fit if there is one.
            dataloaders: an iterable of batches, or several, or a data module.
            datamodule: loaders and data in one object.
            ckpt_path: weights to load first: "best", "last" (of the last fit) or a path.

        Returns:
            A dict of metrics for each loader.
        """
        results: list[Results] = self._begin("test", module, {"test": dataloaders}, datamodule, ckpt_path)
        return results

    def predict(
        self,
        module: Module | None = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool = True,
        ckpt_path: str | Path | None = None,
    ) -> Any:
        """What ``predict_step`` returns for each batch; the other arguments are those of `test`.

        Args:
            return_predictions: keep them and return them: a list of batches, or one list per loader if there are several.
                False keeps nothing: a plugin or the module takes them in ``on_predict_batch_end``.
        """
        kept = self._begin("predict", module, {"predict": dataloaders}, datamodule, ckpt_path, keep=return_predictions)
        return kept[0] if kept is not None and len(kept) == 1 else kept

    def tune(self, module: Module, train_dataloaders: Any = None, val_dataloaders: Any = None, datamodule: Any = None) -> Any:
        """Lets the enabled finders look for a good learning rate or batch size, and returns what they found, by their names.

        Raises:
            PluginError: no enabled plugin tunes anything.
        """
        return self._begin("tune", module, {"train": train_dataloaders, "validate": val_dataloaders}, datamodule, None)

    @property
    def enabled(self) -> dict[str, Any]:
        """The plugins that this trainer uses, by name."""
        return {member.name: member.plugin for member in self._members}

    # ------------------------------------------------------------------ from options to plugins

    def _assemble(self, run: Run, operations: Operations) -> list[Member]:
        """Everybody who takes part in a run, in order: data module, module, plugins, core."""
        own = [Member(m.name, m.plugin, distribution=m.distribution, version=m.version) for m in self._members]
        for brought in build([] if bare() else run.module.configure_plugins(), self._lock):
            if any(brought.name == member.name for member in own):
                raise PluginError(f"{brought.label}: named in Trainer and brought by {type(run.module).__name__}.configure_plugins()")
            own.append(brought)
        module, data = type(run.module).__name__, type(run.datamodule).__name__
        members = [Member(module, run.module, kind="module"), *order(own), Member("core", operations, kind="core")]
        if run.datamodule is not None:
            members.insert(0, Member(data if data != module else f"{data} (data)", run.datamodule, kind="data module"))
        if isinstance(operations, ScaledAutocast):
            members.insert(0, Member("loss scaling", Unscaling(operations), kind="core"))
        return members

    # ------------------------------------------------------------------ a run

    def _begin(
        self, work: str, module: Module | None, given: dict[str, Any], datamodule: Any, ckpt_path: str | Path | None, **more: Any
    ) -> Any:
        """What a method was called with, checked and completed."""
        for stage, value in list(given.items()):
            if is_datamodule(value):
                datamodule, given[stage] = value, None
        if module is None and self._module is None:
            raise TypeError(f"trainer.{work} needs a module; there was no earlier run to take it from")
        if ckpt_path is None and module is None and work != "fit":
            ckpt_path = self._best_of_fit(work)
        module = module if module is not None else self._module
        check_module(module, work)
        if datamodule is not None and not is_datamodule(datamodule):
            raise TypeError(f"datamodule must be a torchplug.DataModule, got {datamodule!r}")
        check_names(datamodule)
        assert module is not None
        return self.do(Call(work, module, given, datamodule, ckpt_path, **more))

    def do(self, call: Call) -> Any:
        """One run, from the options to the report. For a strategy, in a process of its own; everybody else calls the methods above."""
        run = Run(options=self._resolved(), module=call.module, datamodule=call.datamodule, work=call.work)
        operations = operations_for(run)
        members = self._assemble(run, operations)
        watch(members)
        manager = register(members)
        run.hooks = operations.hooks = dispatch(manager)
        run.quiet = operations.sanity_hooks = dispatch(manager, [member for member in members if member.kind == "plugin"])
        self._introduce(run, members)
        try:
            result = self._launched(run, members, call)
        finally:
            call.module._run = None
            for loader in chain.from_iterable(run.loaders.values()):  # its workers have no part in another run
                close(loader)
            for member in members:
                if member.failure:
                    logger.error("%s was switched off: %s", member.label, member.failure)
        if run.asked_to_end:
            leave(run.asked_to_end)
        return result

    def _launched(self, run: Run, members: list[Member], call: Call) -> Any:
        """The run between launch and tear-down; where launching itself fails, everybody is torn down too."""
        begun, late, inside = False, list[BaseException](), list[BaseException]()

        def here() -> Done:
            nonlocal begun
            begun, done = True, None
            signals = watching(run, run.options.signals) if run.work == "fit" else nullcontext()
            try:
                with _spoken_by(run.rank), _torch_flags(run.options), signals:
                    start = self._start(run, members, call)
                    with self._directory(run):
                        result = loop.conduct(run, run.hooks, members, lambda: self._inside(run, call, start))
                        self._report(run)
                    done = Done(result)
            except BaseException as error:
                if done is None:
                    inside.append(error)
                    raise
                late.append(error)  # of the program's own handler of a signal: it waits until ranks have parted
            return done

        try:
            result = run.hooks.launch(run, Task(self, call, here)).result
            if late:
                raise late.pop()
            return result
        except BaseException as error:
            if error not in inside:  # what happened inside has its note; that it happened inside of launch says nothing
                blame(error, members, run.rank)
            if begun:
                raise
            failure = error

        def fail() -> None:
            raise failure

        return loop.conduct(run, run.hooks, members, fail)

    def _inside(self, run: Run, call: Call, start: Start | None) -> Any:
        """What happens in every process of a run between launch and tear-down."""
        hooks = run.hooks
        if run.options.seed is not None:
            seed_everything(run.options.seed)
        prepare(run, hooks, Sources(call.given, run.datamodule))
        if run.rank == 0:
            write_config(run, self.enabled, call.given)
        hooks.on_run_start(run)
        hyperparameters = checkpoint.plain(run.module.hparams, "hyperparameters")  # what cannot be saved is said now, not at the first save
        logged = {**getattr(run.datamodule, "hparams", {}), **(hyperparameters if run.module._hparams_logged else {})}
        if logged:
            hooks.log_hyperparameters(run, checkpoint.plain(logged, "hyperparameters"))
        if start is not None:
            put_in_place(run, start)
        if run.work == "fit":
            return self._timed(run, hooks)
        if run.work == "predict":
            return loop.predict(run, hooks, call.keep)
        if run.work != "tune":
            return hooks.evaluate(run, run.work)
        found = hooks.tune(run)
        if found is None:
            raise PluginError("no enabled plugin tunes anything: name one that does, such as a learning-rate finder, in plugins")
        return found

    def _timed(self, run: Run, hooks: Hooks) -> None:
        """The loop, and how fast it was: without what torch imports for the first optimizer of a process, and without closing."""
        began, step, samples = run.clock, run.position.step, run.position.samples
        loop.fit(run, hooks)
        seconds = max(run.clock - began, 1e-6)  # a coarse clock may not have moved
        steps_per_second, samples_per_second = (run.position.step - step) / seconds, (run.position.samples - samples) / seconds
        self._pace = f"{steps_per_second:.0f} steps/s, {samples_per_second:.0f} samples/s"

    # ------------------------------------------------------------------ in other processes, and back

    def __getstate__(self) -> dict[str, Any]:
        """Options, plugins as they are, and what a run after an earlier fit goes on from."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "plugins": [{member.name: member.plugin} for member in self._members],
            "earlier": self._fitted,
            "held": self._lock,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        earlier, lock = state.pop("earlier"), state.pop("held")
        vars(self).update(state)
        _speak()
        self._begin_with(state["plugins"], lock)
        if earlier is not None:
            self._fitted, self._module = earlier, earlier.module

    def adopt(self, run: Run, metrics: Mapping[str, float]) -> None:
        """A run that other processes did counts as this trainer's own."""
        self.metrics = Results(metrics)
        if run.work == "fit":
            self._fitted = run

    def _resolved(self) -> Settings:
        """The options of one run, ``fast_dev_run`` worked out."""
        options = Settings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)})
        if options.fast_dev_run:
            few = int(options.fast_dev_run)
            options = dataclasses.replace(
                options, max_epochs=1, max_steps=None, min_epochs=None, min_steps=None, num_sanity_val_steps=0, log_every_n_steps=1,
                limit_train_batches=few, limit_val_batches=few, limit_test_batches=few, limit_predict_batches=few,
                val_check_interval=1.0, check_val_every_n_epoch=1,
            )  # fmt: skip
        return options

    def _introduce(self, run: Run, members: list[Member]) -> None:
        """Tells run, module and trainer about each other and about who takes part."""
        plugins = [member for member in members if member.kind == "plugin"]
        run.plugins = {member.name: member.plugin for member in plugins}
        run.packages = {member.name: f"{member.distribution} {member.version}" for member in plugins if member.distribution}
        run.collect = collect
        run._asking = lambda: caller(members)
        for member in members:
            member.position = run.position
        run.module._run = run
        self.run, self._module = run, run.module

    @contextmanager
    def _directory(self, run: Run) -> Iterator[None]:
        """The folder of the run; evaluation after a fit goes on in the fit's, a trial run has one that vanishes."""
        earlier = self._fitted
        if run.options.fast_dev_run:
            run.id, run.dir = run.from_rank_0(lambda: (uuid.uuid4().hex[:8], Path(tempfile.mkdtemp(prefix="torchplug-"))))
            try:
                yield
            finally:
                if run.rank == 0:
                    shutil.rmtree(run.dir, ignore_errors=True)
            return
        own = Path(run.options.root_dir) / (run.options.name or type(run.module).__name__)
        if run.dir != Path():  # that of the run that goes on
            pass
        elif earlier is not None and run.work not in ("fit", "tune") and earlier.module is run.module:
            run.go_on_from(earlier)
        else:
            run.id, run.dir = run.from_rank_0(lambda: (run.id or uuid.uuid4().hex[:8], make_directory(own.parent, own.name)))
        if run.work == "fit":
            self._fitted = run
        yield

    def _best_of_fit(self, work: str) -> Path | str | None:
        """The file whose weights an evaluation without a module and a path uses."""
        fitted = self._fitted
        path = fitted.best_path if fitted is not None and fitted.module is self._module else None
        if isinstance(path, Path) and not path.exists():
            logger.warning("the best checkpoint %s is gone: %s with the present weights", path, work)
            return None
        return path

    def _start(self, run: Run, members: list[Member], call: Call) -> Start | None:
        """What the run starts from, read before anything else happens."""
        fitted, choice = self._fitted, Choice(call.resume)
        try:
            if call.ckpt_path is None:
                ended = fitted.ended if fitted is not None and fitted.module is run.module and run.work == "fit" else None
                if fitted is None or ended is None:
                    return None
                run.go_on_from(fitted)
                run.place(ended)
                return Start(None, ended, choice)
            start = find_start(run, call.ckpt_path, choice, fitted)
        except BaseException as error:
            blame(error, members, run.rank)
            raise
        if start is not None and run.work == "fit" and "position" in choice:
            go_on_as(run, start)
        return start

    def _report(self, run: Run) -> None:
        """What a user wants to know when a run is over."""
        self.metrics = run.metrics.results()
        if run.rank:
            return
        if run.work == "fit":
            logger.info("fit took %.1f s: %d epochs, %d steps (%s)", run.seconds, run.position.epoch, run.position.step, self._pace)
            if run.interrupted:
                logger.info("interrupted by %s; ckpt_path='last' goes on from here if a checkpoint was kept", run.interrupted)
            elif run.stop_reason:
                logger.info("stopped%s: %s", f" by {run.stopped_by}" if run.stopped_by else "", run.stop_reason)
            names = list(run.metrics.names)
            names[SHOWN:] = [f"and {len(names) - SHOWN} more"] * (len(names) > SHOWN)
            logger.info("metrics recorded: %s", ", ".join(names) or "none; call self.log(name, value) in training_step")
        elif run.work != "tune" and run is not self._fitted and self._fitted is not None and run.dir == self._fitted.dir:
            return  # where everything is was said when the fit was over
        if not run.options.fast_dev_run:
            logger.info("run directory: %s", run.dir)
        for name, line in run.report.items():
            logger.info("%s: %s", name, line)


@contextmanager
def _spoken_by(rank: int) -> Iterator[None]:
    """Inside, lines for the user come from rank 0; the others tell of errors alone."""

    def first(record: logging.LogRecord) -> bool:
        return rank == 0 or record.levelno >= logging.ERROR

    logger.addFilter(first)
    try:
        yield
    finally:
        logger.removeFilter(first)


@contextmanager
def _torch_flags(options: Settings) -> Iterator[None]:
    """torch's global switches as the options say; afterwards as they were."""
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, anomaly = torch.backends.cudnn.benchmark, torch.is_anomaly_enabled()
    try:
        if options.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=options.deterministic == "warn")
        if options.benchmark is not None or options.deterministic:
            torch.backends.cudnn.benchmark = bool(options.benchmark)
        if options.detect_anomaly:
            torch.autograd.set_detect_anomaly(True)
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.autograd.set_detect_anomaly(anomaly)
