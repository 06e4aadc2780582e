"""Steps that leave no trace, for those who look for a good learning rate or batch size."""

from __future__ import annotations

import copy
import dataclasses
import errno
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchplug.data import batch_size
from torchplug.loaders import again, begin, close, has_state, places_of, rebatched
from torchplug.loss import loss_of
from torchplug.run import Run
from torchplug.seed import preserved, remembered
from torchplug.signals import Interruption
from torchplug.state import metric_objects, sums
from torchplug.stream import alike

if TYPE_CHECKING:
    from torchplug.trainer import Trainer

__all__ = ["Trial", "apart", "out_of_memory", "rebatched", "trial"]

PLAIN = (bool, int, float, complex, str, bytes, type(None))
# what a step is made of, and where it runs
STEP = (
    "launch", "setup_module", "prepare_loader", "move_batch", "train_batch", "train_step", "backward", "reduce_gradients",
    "clip_gradients", "optimizer_step", "zero_grad", "evaluate", "validation_step",
)  # fmt: skip
OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP, XPU and MPS, with the backend's name before it
    "_STATUS_ALLOC_FAILED",  # cuDNN, cuBLAS and their HIP counterparts
    "can't allocate memory",  # the allocator of the CPU
    "not enough memory: you tried to allocate",  # the same on Windows
)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the memory of a device or of the machine did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # a worker that could not be started
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def trial(run: Run, alone: bool = False) -> Iterator[Trial]:
    """Inside, steps of training can be tried; on any way out everything that they changed is put back.

    That is the module with its buffers, gradients, modes and plain attributes, optimizers, schedulers, the loss scaler, the random
    generators, the place in the data, metrics, the fields of the run (requests to stop, options), and the state of plugins. What
    is taken lies in host memory. Plugins hear of no event inside; those that replace operations (precision, strategies) work
    as in training, and so do the hooks of the module and the data module.

    Args:
        alone: whether each of several ranks tries by itself: no gradients, orders of data or metrics are exchanged, so that one may
            fail while the others go on. They meet again when the trial is over.
    """
    put_back = _taken(run)
    attempt = Trial(run)
    try:
        with run.metrics.unseen(), run.metrics.open("train"):
            run.metrics.batches()
            run.hooks = run.quiet
            run.step_schedulers = []
            run.position.stage, run.training, run.alone = "train", False, alone
            yield attempt
    finally:
        attempt.close()
        interrupted = run.interrupted
        put_back()
        if interrupted:  # a signal that came inside is not undone
            run.interrupted, run.attention = interrupted, True


@contextmanager
def apart(trainer: Trainer, module: nn.Module, datamodule: Any, **finder: Any) -> Iterator[Trainer]:
    """Inside, a trainer like ``trainer`` for trials that have no run of their own; afterwards no trace of them is left.

    It has the plugins of ``trainer`` that answer an operation which a step is made of, those that say ``in_trials = True`` because
    they change steps in another way, and the one given as ``name=plugin``. What it writes goes into a folder that vanishes; module,
    data module and plugins get the attributes back that they had, the module's tensors their device and type, and the random
    generators their places.
    """
    ((name, own),) = finder.items()
    taking_part = {other: plugin for other, plugin in trainer.enabled.items() if type(plugin) is not type(own) and _changes_steps(plugin)}
    with tempfile.TemporaryDirectory() as folder, preserved(), _as_before(module, *taking_part.values(), datamodule):
        plugins = [*({other: plugin} for other, plugin in taking_part.items()), {name: own}]
        yield dataclasses.replace(trainer, root_dir=folder, plugins=plugins)


def _changes_steps(plugin: Any) -> bool:
    return getattr(plugin, "in_trials", False) or any(hasattr(getattr(plugin, each, None), "torchplug_impl") for each in STEP)


@contextmanager
def _as_before(module: nn.Module, *others: Any) -> Iterator[None]:
    """Afterwards a module has the tensors, on the device and of the type, and everybody the attributes that they had before."""
    kept = []
    for owner in (*module.modules(), *others):
        if hasattr(owner, "__dict__"):
            inside = {name: copy.copy(value) for name, value in vars(owner).items() if isinstance(value, (list, dict, set))}
            kept.append((owner, dict(vars(owner)), inside))
    tensors = [
        (p, p.device, p.dtype, p.data.to("cpu"), None if p.grad is None else p.grad.to("cpu", copy=True)) for p in module.parameters()
    ]
    try:
        yield
    finally:
        for owner, attributes, inside in kept:
            vars(owner).clear()
            vars(owner).update(attributes)
            for name, content in inside.items():
                container = attributes[name]
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        for parameter, device, dtype, data, gradient in tensors:
            if (parameter.device, parameter.dtype) != (device, dtype):
                parameter.grad = None  # it must have the type and place of its parameter
                parameter.data = data.to(device)
                parameter.grad = None if gradient is None else gradient.to(device)


class Trial:
    """Steps of training, one optimizer step at a time, over batches that the loader gives from the beginning of an epoch on.

    Attributes:
        run: the run; the loaders and limits that it has at the first step count.
        size: samples of the largest batch of the last step, 0 if that cannot be told.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.size = run, 0
        self._loader: Any = None
        self._batches = self._endless()

    @property
    def loader(self) -> Any:
        """The training data, with a place of its own in them.

        Raises:
            TypeError: they are an iterator, which cannot be begun again.
        """
        if self._loader is None:
            self._loader = again(self.run.loaders["train"][0])
        return self._loader

    def reload(self) -> None:
        """Before the first step: loaders and optimizers are made anew for this trial, as what they depend on was changed."""
        self.run.reload()
        self.run.step_schedulers = []

    def step(self) -> float:
        """Trains on as many batches as an optimizer step takes; returns the mean of their losses (NaN if all were skipped).

        Schedulers do not step.

        Raises:
            TypeError: the training data are an iterator, which cannot be begun again.
        """
        run, hooks, position, losses = self.run, self.run.hooks, self.run.position, list[Tensor]()
        self.size, run.window = 0, run.batches_per_step(position.epoch)
        for part in range(run.window):
            run.window_ends = part == run.window - 1
            batch = hooks.move_batch(run, next(self._batches))
            run.metrics.size = batch_size(batch)
            self.size = max(self.size, run.metrics.size)
            hooks.on_train_batch_start(run, batch, position.batch)
            outputs = hooks.train_batch(run, batch, position.batch)
            for each in outputs if isinstance(outputs, list) else [outputs]:  # one for each optimizer
                loss = loss_of(run, each)
                if loss is not None:
                    losses.append(loss.detach().float())
            position.batch, position.micro_step = position.batch + 1, position.micro_step + 1
            hooks.on_train_batch_end(run, outputs, batch, position.batch - 1)
            batch = outputs = None  # nothing is held while the next one is fetched
        mean = torch.stack(losses).mean().item() if losses else float("nan")
        if run.agreement is not None:  # what is decided by it is decided by all ranks
            mean = math.fsum(run.agreement.gather(mean)) / run.world_size
        return mean

    def batches(self) -> Iterator[Any]:
        """The batches of one epoch, on the device, for who does something else with them than train."""
        run = self.run
        for batch in islice(begin(self.loader, run.position.epoch, run.position.micro_step), run.limits["train"][0]):
            batch = run.hooks.move_batch(run, batch)
            run.metrics.size = batch_size(batch)
            yield batch

    def evaluate(self, batches: int) -> None:
        """Validates on the first ``batches`` of each loader, as the sanity check does; nothing happens where there is none."""
        run, own, limits = self.run, self.run.loaders["validate"], self.run.limits
        loaders = [again(loader) for loader in own]
        run.loaders["validate"] = loaders
        limits["sanity"] = [batches if limit is None else min(batches, limit) for limit in limits["validate"]]
        try:
            if loaders:
                with suppress(Interruption):  # a signal: who makes the trial looks at ``run.interrupted``
                    run.hooks.evaluate(run, "sanity")
        finally:
            run.loaders["validate"] = own
            for loader, given in zip(loaders, own, strict=True):
                if loader is not given:
                    close(loader)

    def _endless(self) -> Iterator[Any]:
        """Epoch after epoch."""
        limit = self.run.limits["train"][0]
        while True:
            count = 0
            for batch in islice(begin(self.loader, self.run.position.epoch, self.run.position.micro_step), limit):
                yield batch
                count += 1
            if not count:
                raise ValueError("the training loader gave no batch: its data set is empty, or smaller than one batch with drop_last=True")

    def close(self) -> None:
        """Ends the workers of the loader."""
        self._batches.close()  # type: ignore[attr-defined]
        if self._loader is not None and self._loader is not self.run.loaders["train"][0]:
            close(self._loader)


# ---------------------------------------------------------------------- what is taken, and how it is put back


def _taken(run: Run) -> Callable[[], None]:
    """Takes everything; returns what puts it back."""
    loaders = [loader for several in run.loaders.values() for loader in several]
    fields = _fields(run)
    ours = [_module(run.module), *map(_metric, dict(metric_objects(run.module)).values())]
    ours += [_owner(each) for each in run.optimizers]
    ours += [_owner(each.scheduler) for each in run.schedulers]
    ours += [_fields(each) for each in run.schedulers]
    if run.scaler is not None:
        ours += [_owner(run.scaler), partial(_between_steps, run.scaler)]
    places = [place for loader in loaders for place in places_of(loader)]
    datasets = [getattr(loader, "dataset", None) for loader in loaders]
    ours += [_owner(each) for each in (*places, *datasets, *loaders, run.datamodule) if each is not None and has_state(each)]
    if run.datamodule is not None and not has_state(run.datamodule):
        ours.append(_plain_of(run.datamodule))
    plugins = {name: (plugin, _copied(plugin.state_dict())) for name, plugin in run.plugins.items() if has_state(plugin)}
    generators = remembered(*loaders)

    def put_back() -> None:
        fields()
        for each in ours:
            each()
        for plugin, state in plugins.values():
            if not alike(_copied(plugin.state_dict()), state):
                plugin.load_state_dict(state)
        generators()

    return put_back


def _module(module: nn.Module) -> Callable[[], None]:
    """Parameters and buffers are put back into the tensors that they are in, as optimizers and others hold them."""
    tensors = [
        (group, name, tensor, _host(tensor), tensor.requires_grad, None if tensor.grad is None else _host(tensor.grad))
        for each in module.modules()
        for group in (each._parameters, each._buffers)
        for name, tensor in group.items()
        if tensor is not None
    ]
    inner = [(each, each.training, _plain_of(each)) for each in module.modules()]

    def put_back() -> None:
        with torch.no_grad():
            for group, name, tensor, value, requires_grad, gradient in tensors:
                group[name] = tensor  # type: ignore[assignment]
                tensor.requires_grad_(requires_grad)
                if tensor.shape != value.shape:
                    tensor.data = torch.empty_like(value, device=tensor.device)
                tensor.copy_(value)
                tensor.grad = None if gradient is None else gradient.to(tensor.device)
        for each, training, plain in inner:
            each.training = training
            plain()

    return put_back


def _metric(metric: Any) -> Callable[[], None]:
    """The sums of a metric object, which are in no state dict."""
    before = _copied(sums(metric))
    device = next((value.device for value in sums(metric).values() if isinstance(value, Tensor)), torch.device("cpu"))
    return lambda: vars(metric).update(_mapped(before, lambda tensor: tensor.to(device)))


def _owner(owner: Any) -> Callable[[], None]:
    """Something with a state of its own, and plain attributes beside it."""
    state, plain = _copied(owner.state_dict()), _plain_of(owner)

    def put_back() -> None:
        owner.load_state_dict(state)
        plain()

    return put_back


def _between_steps(scaler: torch.amp.GradScaler) -> None:
    """What a scaler notes from unscaling to its update, which a step that was broken off left; there is no public way to drop it."""
    scaler._per_optimizer_states.clear()


def _plain_of(owner: Any) -> Callable[[], None]:
    """The attributes that are plain values or containers of such, as a counter or a list of results is."""
    before = {name: copy.deepcopy(value) for name, value in vars(owner).items() if _is_plain(value)}

    def put_back() -> None:
        now = vars(owner)
        for name in [name for name, value in now.items() if name not in before and _is_plain(value)]:
            del now[name]
        now.update(before)

    return put_back


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values())) and all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _fields(owner: Any) -> Callable[[], None]:
    """The attributes of a dataclass: the objects that they are, what is in containers, and a run's position and options."""
    names = [field.name for field in dataclasses.fields(owner) if hasattr(owner, field.name)]
    before = {name: getattr(owner, name) for name in names}
    inside = {name: copy.copy(value) for name, value in before.items() if isinstance(value, (list, dict, set))}
    nested = [_fields(before[name]) for name in ("position", "options") if name in before]

    def put_back() -> None:
        for name, value in before.items():
            setattr(owner, name, value)
        for name, content in inside.items():
            container = before[name]
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for each in nested:
            each()

    return put_back


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _copied(value: Any) -> Any:
    """A state with every tensor in host memory, and nothing shared."""
    return _mapped(value, _host)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_mapped(part, change) for part in value]
        return parts if isinstance(value, list) else type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return copy.deepcopy(value)
