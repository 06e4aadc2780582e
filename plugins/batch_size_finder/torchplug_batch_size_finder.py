"""Finds the largest batch size that a run has memory for, by training steps and validations that leave no trace."""

from __future__ import annotations

import difflib
import gc
import inspect
import logging
import math
from collections.abc import Callable, Generator, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset

from torchplug import Module, Run, Trainer, hookimpl
from torchplug.optimizers import change_rates
from torchplug.trials import Trial, apart, out_of_memory, rebatched, trial

__all__ = ["BatchSize", "BatchSizeFinder", "scale_batch_size", "search"]

UNKNOWN = 2**16  # the largest size that is tried where the data have no length
PATIENCE = 30  # steps more than asked for, until each optimizer has stepped: a loss scaler finds its scale by skipping some
EVALUATED = 2  # validation batches of each loader in a trial


@dataclass(frozen=True)
class BatchSize:
    """What was found.

    Args:
        size: samples in a batch; steps and validations of this size were made twice.
        accumulate_grad_batches: the accumulation that goes with it; another one than before with keep_effective alone.
        lr_scale: by what scale_lr multiplies learning rates.
        before: samples in a batch before, None if that was not a number.
        attribute: what was set, None if the size is that of loaders given to the method.
        trials: each size that was tried with the error that it ended in, "" if it passed; in order.
    """

    size: int
    accumulate_grad_batches: int
    lr_scale: float
    before: int | None
    attribute: str | None
    trials: tuple[tuple[int, str], ...]


# ---------------------------------------------------------------------- the search, without any training


def search(fits: Callable[[int], bool], mode: str, init: int, limit: int) -> int:
    """The largest size up to ``limit`` that fits, among those that ``mode`` reaches; 0 if not even 1 does.

    Both begin with ``init``. "power" doubles it while it fits, or halves it until it does: at most log2(limit) + 2 sizes are
    tried. "binary" doubles too, up to ``limit``, and then halves the interval between the last size that fits and the first
    that does not: at most 2 log2(limit) + 3 sizes. No size is tried twice.
    """
    size = min(init, limit)
    if mode == "power":
        if fits(size):
            while 2 * size <= limit and fits(2 * size):
                size *= 2
            return size
        while size > 1:
            size //= 2
            if fits(size):
                return size
        return 0
    good, bad = 0, limit + 1
    while good < limit:
        if not fits(size):
            bad = size
            break
        good, size = size, min(2 * size, limit)
    while bad - good > 1:
        size = (good + bad) // 2
        if fits(size):
            good = size
        else:
            bad = size
    return good


def confirm(fits: Callable[[int], bool], size: int, allowed: Callable[[int], int]) -> int:
    """The first of ``size``, half of it and so on that fits once more, each brought down to what is allowed; 0 if none does."""
    size = allowed(size)
    while size and not fits(size):
        size = allowed(size // 2)
    return size


def _divisor(whole: int, size: int) -> int:
    """The largest divisor of ``whole`` up to ``size``; 0 for 0."""
    return next((each for each in range(min(size, whole), 0, -1) if whole % each == 0), 0)


# ---------------------------------------------------------------------- the plugin


@dataclass(kw_only=True, eq=False)
class BatchSizeFinder:
    """Looks for the largest batch size whose training steps, and validations, do not run out of memory.

    Each trial takes optimizer steps of the run itself, with its precision, accumulation and strategy, over batches of the size in
    question; every optimizer has then stepped twice, so that its state is there while a batch is trained on. Everything is put
    back after each trial. The size that is chosen passes a second trial.

    It acts when a fit begins, before learning rates are looked for, loggers open and a checkpoint is loaded, and in
    ``trainer.tune``. The loaders and optimizers of the fit are then made anew, with the random numbers of the first time: it is
    bit for bit the fit that begins with the size. A run that goes on from a checkpoint has the size of the run that wrote it.

    The size is that of an attribute of the data module or module, or of an entry of their ``hparams``, which their dataloader
    methods read. Loaders that are given to the method are replaced by copies with another ``batch_size``.

    Args:
        mode: 'power' doubles the size; 'binary' goes on between the last size that passed and the first that did not.
        init: The size to begin with, in samples.
        max: The largest size to try, in samples. None: the number of samples in the training data, or 65536 if it is unknown.
        steps_per_trial: Optimizer steps in a trial, at least 2.
        margin: The fraction of the size found that is taken off again, from 0 to below 1, for memory that other things need later.
        attribute: The name of the attribute, or entry of hparams, that holds the size.
        evaluate: Whether validation must have memory for the size too; its loaders, if they are given, get the size as well.
        keep_effective: Whether batch size times accumulate_grad_batches stays what it is. The size then divides it.
        scale_lr: How learning rates of the fit follow the number of samples in an optimizer step: 'linear' in proportion (Goyal et
            al. 2017), 'sqrt' with its square root (Krizhevsky 2014). None: they stay.

    Attributes:
        result: A `BatchSize`, None if nothing was looked for.
    """

    mode: Literal["power", "binary"] = "power"
    init: int = 2
    max: int | None = None
    steps_per_trial: int = 3
    margin: float = 0.0
    attribute: str = "batch_size"
    evaluate: bool = True
    keep_effective: bool = False
    scale_lr: Literal["linear", "sqrt"] | None = None

    before = ("*",)

    result: BatchSize | None = field(init=False, default=None)
    _size: int = field(init=False, default=0, repr=False)  # of copies of given loaders, 0 for the loaders themselves
    _saved: dict[str, Any] = field(init=False, default_factory=dict, repr=False)  # the choice that a checkpoint keeps
    _found: dict[str, Any] = field(init=False, default_factory=dict, repr=False)  # the choice in the checkpoint that was read
    _loaders: dict[tuple[str, int], Any] = field(init=False, default_factory=dict, repr=False)  # as they were given or made

    def __post_init__(self) -> None:
        if self.mode not in ("power", "binary"):
            raise ValueError(f"mode must be 'power' or 'binary', got {self.mode!r}")
        for name, least in (("init", 1), ("steps_per_trial", 2)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {getattr(self, name)!r}")
        if self.max is not None and (type(self.max) is not int or self.max < 1):
            raise ValueError(f"max must be a whole number of samples, at least 1, or None, got {self.max!r}")
        if self.max is not None and self.init > self.max:
            raise ValueError(f"init={self.init} is more than max={self.max}")
        if not isinstance(self.margin, (int, float)) or isinstance(self.margin, bool) or not 0 <= self.margin < 1:
            raise ValueError(f"margin must be a fraction from 0 to below 1, got {self.margin!r}")
        if not isinstance(self.attribute, str) or not self.attribute.isidentifier():
            raise ValueError(f"attribute must be the name of an attribute, got {self.attribute!r}")
        for name in ("evaluate", "keep_effective"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.scale_lr not in (None, "linear", "sqrt"):
            raise ValueError(f"scale_lr must be 'linear', 'sqrt' or None, got {self.scale_lr!r}")

    # ------------------------------------------------------------------ hooks

    @hookimpl(wrapper=True)
    def load_checkpoint(self, run: Run) -> Generator[None, Any, Any]:
        state = yield
        self._found = (state.get("plugins") or {}).get(run.name_of(self)) or {}
        return state

    @hookimpl
    def setup(self, run: Run, stage: str) -> None:
        if stage != "fit":
            return
        self._size, self._loaders = 0, {}
        self._saved = (self._found if run.resumed is not None else self._saved) if _goes_on(run) else {}
        self._found = {}
        if self._saved:  # of the run that goes on: its loaders must be the same
            if self.keep_effective:
                run.options.accumulate_grad_batches = self._saved["accumulate_grad_batches"]
            self._choose(run, self._saved["size"], self._saved["attribute"])
        elif not _goes_on(run):
            self.result = None

    @hookimpl(wrapper=True)
    def prepare_loader(self, run: Run, loader: Any, stage: str, dataloader_idx: int) -> Generator[None, Any, Any]:
        answer = yield
        if run.purpose == "fit":
            self._loaders[stage, dataloader_idx] = loader
            if self._size and (stage == "train" or (self.evaluate and isinstance(answer, DataLoader))):
                return rebatched(answer, self._size)
        return answer

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        if run.work == "fit" and not _goes_on(run):
            self._look(run)

    @hookimpl(wrapper=True)
    def tune(self, run: Run) -> Generator[None, Any, Any]:
        self._look(run)
        others = yield  # those that tune after it do so with the size
        return {run.name_of(self): self.result, **(others or {})}

    @hookimpl
    def teardown(self) -> None:
        self._loaders = {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the choice, empty if there is none."""
        return dict(self._saved)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is left to do: loaders had to be made with the size before."""

    # ------------------------------------------------------------------ looking for it

    def _look(self, run: Run) -> None:
        """Finds the size and makes loaders and optimizers of the run with it."""
        name = run.name_of(self)
        if run.options.fast_dev_run:
            run.say_once(f"plugin {name!r}: fast_dev_run looks for no batch size", logging.INFO)
            return
        with _little_garbage():
            found = self._find(run)
        if found is None:  # a signal ends the run
            return
        self.result = found
        self._choose(run, found.size, found.attribute)
        if self.keep_effective:
            run.options.accumulate_grad_batches = found.accumulate_grad_batches
        run.reload()
        if found.lr_scale != 1:
            change_rates(run.optimizers, run.schedulers, lambda rate: rate * found.lr_scale)
        self._saved = {
            "size": found.size, "accumulate_grad_batches": found.accumulate_grad_batches, "attribute": found.attribute,
        }  # fmt: skip
        line = f"batch size {found.size}, after {len(found.trials)} trials"
        if self.keep_effective:
            line += f", with accumulate_grad_batches={found.accumulate_grad_batches}"
        if self.scale_lr is not None:
            line += f", with learning rates times {found.lr_scale:.4g}"
        run.say_once(f"plugin {name!r}: {line}", logging.INFO)
        run.report[name] = line

    def _find(self, run: Run) -> BatchSize | None:
        attribute = self._probe(run)
        now, accumulate, limit = self._now(run, attribute), run.batches_per_step(0), self._limit(run)
        samples = 0  # of an optimizer step, where that matters
        if self.keep_effective or self.scale_lr is not None:
            if now is None:
                raise ValueError("keep_effective and scale_lr need a batch size to begin with: set the attribute to a number")
            samples = now * accumulate
        if self.keep_effective:
            if not run.automatic:
                raise ValueError("keep_effective changes accumulate_grad_batches, which is for automatic optimization")
            if run.accumulation is not None:
                raise ValueError("keep_effective changes accumulate_grad_batches, which another plugin sets by epoch")
            limit = min(limit, samples)
        trials: list[tuple[int, str]] = []

        def accumulated(size: int) -> int:
            return -(-samples // size) if self.keep_effective else accumulate

        def fits(size: int) -> bool:
            trials.append((size, self._try(run, size, attribute, accumulated(size))))
            return not trials[-1][1]

        def allowed(size: int) -> int:
            return _divisor(samples, size) if self.keep_effective else size

        try:
            largest = search(fits, self.mode, self.init, limit)
            wanted = math.floor(largest * (1 - self.margin) + 1e-9) or 1
            size = confirm(fits, wanted, allowed) if largest else 0
        except _Interrupted:
            return None
        if not size:
            raise MemoryError(f"there is no batch size with enough memory: with {trials[-1][0]} sample: {trials[-1][1]}")
        scale = 1.0 if self.scale_lr is None else size * accumulated(size) / samples
        if self.scale_lr == "sqrt":
            scale = math.sqrt(scale)
        return BatchSize(size, accumulated(size), scale, now, attribute, tuple(trials))

    def _probe(self, run: Run) -> str | None:
        """The attribute that the loaders depend on, None for loaders that are given; refuses those that cannot be changed."""
        given = self._loaders["train", 0]
        with trial(run) as attempt, _unchanged(run):
            attempt.reload()
            same = self._loaders["train", 0] is given
        _release()
        if not same:
            if not _places(_owners(run), self.attribute):
                raise AttributeError(_missing(_owners(run), self.attribute))
            return self.attribute
        rebatched(given, self.init)
        return None

    def _now(self, run: Run, attribute: str | None) -> int | None:
        size = self._loaders["train", 0].batch_size if attribute is None else _get(_places(_owners(run), attribute)[0], attribute)
        return size if type(size) is int else None

    def _limit(self, run: Run) -> int:
        """The largest size with which the run can work at all."""
        options, limit = run.options, self.max
        for (stage, _), loader in self._loaders.items():
            samples = _samples(run, loader)
            if samples is None or (stage != "train" and not loader.drop_last):
                continue
            fewest = 1  # batches that there must be
            for share in (options.limit_train_batches, options.overfit_batches) if stage == "train" else (options.limit_val_batches,):
                if isinstance(share, float) and 0 < share < 1:
                    fewest = max(fewest, math.ceil(1 / share))
            often = type(options.val_check_interval) is int and options.check_val_every_n_epoch is not None
            if stage == "train" and often and run.loaders["validate"]:
                fewest = max(fewest, int(options.val_check_interval))  # type: ignore[arg-type]
            limit = min(limit or samples, max(samples // fewest, 1))
        return limit or UNKNOWN

    def _try(self, run: Run, size: int, attribute: str | None, accumulate: int) -> str:
        """One trial: the message of the error that says that memory ran out, "" if it did not."""
        message = ""
        with trial(run, alone=True) as attempt, _unchanged(run, self):
            self._choose(run, size, attribute)
            try:
                self._steps(run, attempt, size, attribute, accumulate)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                message = (str(error).splitlines() or [""])[0] or type(error).__name__
            attempt.close()
            if message:  # before anything is put back, which takes memory too
                _release()
        _release()
        return _agreed(run, message)

    def _steps(self, run: Run, attempt: Trial, size: int, attribute: str | None, accumulate: int) -> None:
        run.options.accumulate_grad_batches = accumulate
        attempt.reload()
        # a longer window than two needs no more memory; a schedule of windows has one sooner or later
        run.options.accumulate_grad_batches = min(accumulate, 2) if run.accumulation is None else 2
        run.accumulation = None
        loader = self._loaders["train", 0]
        made = getattr(loader, "batch_size", None)
        if attribute is not None and made not in (None, size):
            raise ValueError(
                f"{attribute}={size} has no effect: train_dataloader made a loader with batch_size={made}; let it use the attribute"
            )
        samples = _samples(run, loader)
        if samples is not None:  # no batch that is smaller than the others
            limit, full = run.limits["train"][0], max(samples // size, 1)
            run.limits["train"] = [full if limit is None else min(limit, full)]
        stepped = [0] * len(run.optimizers)
        with ExitStack() as stack:
            seen = set[int]()  # a step of a subclass that calls its base's step is announced twice
            for index, optimizer in enumerate(run.optimizers):
                stack.callback(optimizer.register_step_post_hook(partial(_note, seen, index)).remove)
            for number in range(1, self.steps_per_trial + PATIENCE + 1):
                if run.asked_to_end:
                    return
                attempt.step()
                stepped = [count + (index in seen) for index, count in enumerate(stepped)]
                seen.clear()
                if number == 1 and samples is None and 0 < attempt.size < size:
                    raise MemoryError(f"the data have no batch of {size} samples, only of {attempt.size}")
                if number >= self.steps_per_trial and min(stepped, default=2) >= 2:
                    break
        if run.optimizers and not any(stepped):
            raise RuntimeError(f"no optimizer step was taken in {number} steps with batches of {size}: nothing is known of their memory")
        if self.evaluate:
            attempt.evaluate(EVALUATED)

    def _choose(self, run: Run, size: int, attribute: str | None) -> None:
        """Loaders that are made from now on have batches of this size."""
        if attribute is None:
            self._size = size
        else:
            _set(_owners(run), attribute, size)


class _Interrupted(Exception):
    """A signal came during a trial."""


def _note(seen: set[int], index: int, *_: Any) -> None:
    seen.add(index)


def _goes_on(run: Run) -> bool:
    return run.resumed is not None or run.position.micro_step > 0


def _samples(run: Run, loader: Any) -> int | None:
    """How many samples of an epoch fall to a rank, and no batch can exceed, None if nobody knows."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    counts = []
    for each in (loader.dataset, loader.sampler):
        try:
            counts.append(len(each))  # type: ignore[arg-type]
        except TypeError:
            continue
    return max(min(counts) // run.world_size, 1) if counts else None


def _agreed(run: Run, message: str) -> str:
    """What came of a trial on all ranks.

    Raises:
        _Interrupted: a signal came to one of them.
    """
    outcome = 2 if run.asked_to_end else 1 if message else 0
    if run.world_size > 1:
        outcome = int(run.hooks.reduce(run, torch.tensor([outcome]), "max").item())
    if outcome == 2:
        raise _Interrupted
    return message or ("another rank ran out of memory" if outcome else "")


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Inside, collecting garbage passes over what was there before, which takes nearly all of its time."""
    ours = gc.get_freeze_count() == 0
    gc.collect()
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def _release() -> None:
    """Gives back what is no longer referred to; optimizers and their schedulers refer to each other."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


# ---------------------------------------------------------------------- where the size is written


def _owners(run: Run) -> list[Any]:
    return [each for each in (run.datamodule, run.module) if each is not None]


def _hparams(owner: Any) -> MutableMapping[str, Any]:
    kept = getattr(owner, "hparams", None)
    return kept if isinstance(kept, MutableMapping) else {}


def _places(owners: list[Any], name: str) -> list[Any]:
    """What holds the size: owners with the attribute and hparams with the entry; the data module comes first, as it does when
    loaders are asked for."""
    found, missing = [], object()
    for owner in owners:
        there = inspect.getattr_static(owner, name, missing)
        if there is not missing and not (isinstance(there, property) and there.fset is None):
            found.append(owner)
        if name in _hparams(owner):
            found.append(_hparams(owner))
    return found


def _get(place: Any, name: str) -> Any:
    return place[name] if isinstance(place, MutableMapping) else getattr(place, name)


def _set(owners: list[Any], name: str, size: int) -> None:
    for place in _places(owners, name):
        if isinstance(place, MutableMapping):
            place[name] = size
        else:
            setattr(place, name, size)


def _missing(owners: list[Any], name: str) -> str:
    there = {key for owner in owners for key in (*vars(owner), *_hparams(owner)) if not key.startswith("_")}
    near = difflib.get_close_matches(name, there, n=1)
    who = " and ".join(type(owner).__name__ for owner in owners)
    meant = f"did you mean attribute={near[0]!r}?" if near else "let train_dataloader use one, or give a DataLoader to the method"
    return f"there is no attribute or hyperparameter {name!r} in {who}; {meant}"


@contextmanager
def _unchanged(run: Run, finder: BatchSizeFinder | None = None) -> Iterator[None]:
    """Inside, loaders may be asked for with another size; afterwards who gives them has the attributes that it had."""
    owners = [(owner, dict(vars(owner)), dict(_hparams(owner))) for owner in _owners(run)]
    loaders, size = (dict(finder._loaders), finder._size) if finder is not None else ({}, 0)
    try:
        yield
    finally:
        for owner, attributes, hparams in owners:
            _restore(vars(owner), attributes)
            _restore(_hparams(owner), hparams)
        if finder is not None:
            finder._loaders, finder._size = loaders, size


def _restore(now: Any, before: dict[str, Any]) -> None:
    now.clear()
    now.update(before)


# ---------------------------------------------------------------------- from Python


def scale_batch_size(
    trainer: Trainer,
    module: Module,
    train_dataloaders: Any = None,
    datamodule: Any = None,
    val_dataloaders: Any = None,
    **options: Any,
) -> BatchSize:
    """Finds the batch size for a fit of ``module`` by ``trainer``, and sets the attribute, if there is one, to it.

    Nothing else is changed, neither in the trainer and its plugins, which hear of nothing, nor in the module, nor on disk.

    Args:
        trainer: its options count, and those of its plugins that take part in a step.
        module: what would be trained.
        train_dataloaders: a DataLoader, or a data module; without one those of the data module or module are used.
        datamodule: loaders and data in one object.
        val_dataloaders: a DataLoader or several, to validate on in each trial.
        options: those of `BatchSizeFinder`.

    Raises:
        TypeError: the loader is none whose batches can be made larger.
        AttributeError: the module makes its loaders, and has no such attribute.
        MemoryError: not even a batch of one sample has enough memory.
    """
    finder = BatchSizeFinder(**options)
    if hasattr(train_dataloaders, "train_dataloader"):
        datamodule, train_dataloaders = train_dataloaders, None
    with apart(trainer, module, datamodule, batch_size_finder=finder) as tuner:
        tuner.tune(module, train_dataloaders, val_dataloaders, datamodule)
    found = finder.result
    if found is None:
        raise ValueError("fast_dev_run looks for no batch size")
    if found.attribute is not None:
        _set([each for each in (datamodule, module) if each is not None], found.attribute, found.size)
    return found
