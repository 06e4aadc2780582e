"""Trains on several ranks, each with a part of every parameter: a layer is whole only while it computes."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from torchplug import Module, Run, duration, hookimpl, map_batch
from torchplug.checkpoint import CheckpointError
from torchplug.distributed import Ranks, same
from torchplug.sharded import parts, whole, write

__all__ = ["Fsdp"]

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
FLUSH = "_finish_gradients"  # a forward method of the module, while it is trained
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

_writing: Any = None  # the group in which checkpoints are written in parts, while training goes on in another


@dataclass(kw_only=True, eq=False)
class Fsdp(Ranks):
    """Fully sharded data parallel training (Zhao et al., "PyTorch FSDP", 2023), by torch's ``fully_shard``.

    Started by torchrun, or from a plain script, ``Trainer(strategy="fsdp", devices=2)``. Each rank holds a part of each parameter, of its
    gradient and of the optimizer's state. Layers that ``wrap`` names are made whole one by one, for as long as they compute; all other
    parameters for a whole step. Steps, metrics and checkpoints are those of ``ddp``. Outside of the steps of the module its parameters are
    DTensors, and stay so after training; in a plain script they come back whole. The optimization must be automatic.

    With precision='bf16-mixed' or '16-mixed', parameters are made whole in that type, and gradients are added up in float32. Autocast stays
    in charge of the rest, so that losses and norms are computed in float32 as on one device.

    Args:
        backend: What exchanges values: 'nccl', 'gloo' or another one of torch.distributed. None: nccl on CUDA, else gloo.
        timeout: How long a rank waits for the others before the run fails: '30m', '90s', a timedelta or a dict of its arguments.
        start_method: How processes are started from a plain script: 'spawn' needs `if __name__ == "__main__":` in it and things that
            can be pickled, 'fork' takes them as they are and cannot be used once CUDA is. 'auto' forks in a notebook and where
            something cannot be pickled.
        deal: Whether the data are dealt out over the ranks. False: the loaders give each rank its own part already.
        rendezvous: Where several machines meet, as host:port of the first one; torchrun has options of its own for that.
        wrap: Which layers are made whole one by one: the names of their classes, such as ["TransformerBlock"], or a number: those with at
            least so many parameters that are in no smaller layer of that kind. None: all at once, which saves the optimizer's memory alone.
        reshard_after_forward: Whether such a layer is in parts again between forward and backward pass. False takes more memory and
            exchanges less.
        cpu_offload: Whether parameters, gradients and optimizers are in host memory while they are not needed.
        param_dtype: The type in which layers compute. None: that of the precision. In another one than the precision's, and without
            autocast, inputs of the step are brought to it too, and the loss is computed in it.
        reduce_dtype: The type in which gradients are added up over ranks. None: float32 where the parameters' is a lower one.
        activation_checkpointing: Names of classes of layers whose activations are computed anew in the backward pass.
        checkpoint: 'full' gathers everything on rank 0, into one file as one process writes it. 'sharded' lets each rank write its part,
            into a folder that any number of ranks can load.
    """

    wrap: list[Any] | tuple[Any, ...] | int | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    reduce_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    activation_checkpointing: list[Any] | tuple[Any, ...] = ()
    checkpoint: Literal["full", "sharded"] = "full"

    _sharded: list[Any] = field(init=False, default_factory=list, repr=False)  # the modules that were, the root first
    _undo: list[Callable[[], Any]] = field(init=False, default_factory=list, repr=False)
    _rounds: list[tuple[int, int, int]] = field(init=False, default_factory=list, repr=False)  # batches of each loader: own, fewest, most
    _input: torch.dtype | None = field(init=False, default=None, repr=False)  # to which inputs are brought, if they are
    _is_whole: bool = field(init=False, default=False, repr=False)  # whether all parameters are whole for now
    _synchronized: bool = field(init=False, default=True, repr=False)  # whether a backward pass exchanges gradients
    _pending: bool = field(init=False, default=False, repr=False)  # whether there may be gradients that were not exchanged

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.wrap, bool) or (isinstance(self.wrap, int) and self.wrap < 1):
            raise ValueError(f"wrap must be names of classes, or a number of parameters from 1 on, got {self.wrap!r}")
        for name in ("wrap", "activation_checkpointing"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)) and not all(isinstance(each, str) for each in value):
                raise TypeError(f"{name} must hold names of classes, got {value!r}; write [{', '.join(map(_name_of, value))}]")
        if self.cpu_offload and self.backend is None and torch.cuda.is_available():
            self.backend = "cpu:gloo,cuda:nccl"  # norms of gradients that lie in host memory are added up there

    # ------------------------------------------------------------------ the module

    @hookimpl
    def setup_module(self, run: Run, module: Module) -> Module | None:
        global _writing
        if run.agreement is None:  # one process, and nobody to share with
            return None
        if run.purpose == "fit" and not module.automatic_optimization:
            raise ValueError(
                f"strategy {run.name_of(self)!r} needs automatic optimization: a backward pass inside of training_step comes before the "
                "step's end, where parameters are put in order for it; strategy='ddp' takes both"
            )
        if not isinstance(module, FSDPModule):
            self._shard(run, module)
        self._sharded = [each for each in module.modules() if isinstance(each, FSDPModule)]
        for each in _of_classes(module, self.activation_checkpointing, "activation_checkpointing"):
            self._put(each, "forward", functools.partial(checkpoint, each.forward, use_reentrant=False))
        for name in STEPS:
            self._through(module, name)
        self._put(module, FLUSH, torch.clone)
        register_fsdp_forward_method(module, FLUSH)
        if self.checkpoint == "sharded" and _writing is None:
            _writing = dist.new_group(backend="gloo", timeout=timedelta(seconds=duration("timeout", self.timeout)))
        run.together = self.checkpoint == "sharded"
        policy = self._policy(run)
        self._input = policy.param_dtype if policy.cast_forward_inputs else None
        run.collect = functools.partial(self._collected, run.collect)
        self._synchronized, self._pending = True, False
        return module

    def _shard(self, run: Run, module: Module) -> None:
        """Spreads the parameters over the ranks, layer by layer, so that a device never holds more than one that is whole."""
        if run.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise RuntimeError(f"torch {torch.__version__} cannot shard on the CPU; strategy='ddp' can, and so can newer versions")
        if any(each.is_meta for each in (*module.parameters(), *module.buffers())):
            raise ValueError(f"{type(module).__name__} has parameters on the meta device, which have no values: make them on the CPU")
        if run.options.precision == "bf16-true":
            module.to(torch.bfloat16)
        layers = self._layers(module)
        _check_ties(module, layers)
        same((*module.parameters(), *module.buffers()), run.device)
        offload = CPUOffloadPolicy(pin_memory=True) if self.cpu_offload and run.device.type != "cpu" else OffloadPolicy()
        shared: dict[str, Any] = {
            "mesh": init_device_mesh(run.device.type, (run.world_size,)),
            "mp_policy": self._policy(run),
            "offload_policy": offload,
        }
        for layer in layers:
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **shared)
        fully_shard(module, reshard_after_forward=False, **shared)  # the backward pass begins at once
        for each in (*layers, module):  # torch makes a class of its own for them, which is called as the user knows it
            kind, own = type(each), type(each).__bases__[1]
            kind.__name__, kind.__qualname__, kind.__module__ = own.__name__, own.__qualname__, own.__module__

    def _policy(self, run: Run) -> MixedPrecisionPolicy:
        mixed = MIXED.get(str(run.options.precision))
        low = mixed if self.param_dtype is None else getattr(torch, self.param_dtype)
        total = None if low is None else torch.float32
        if self.reduce_dtype is not None:
            total = getattr(torch, self.reduce_dtype)
        return MixedPrecisionPolicy(param_dtype=low, reduce_dtype=total, cast_forward_inputs=mixed is None and low is not None)

    def _layers(self, module: Module) -> list[nn.Module]:
        """The layers that are made whole one by one, inner ones first."""
        if self.wrap is None:
            return []
        if not isinstance(self.wrap, int):
            return _of_classes(module, self.wrap, "wrap")
        found: list[nn.Module] = []
        taken: set[int] = set()
        for each in _inner_first(module):
            own = {id(parameter): parameter.numel() for parameter in each.parameters() if id(parameter) not in taken}
            if each is not module and sum(own.values()) >= self.wrap and not isinstance(each, (nn.ModuleList, nn.ModuleDict)):
                found.append(each)
                taken.update(own)
        return found

    def _put(self, owner: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute until `teardown`."""
        vars(owner)[name] = value
        self._undo.append(lambda: vars(owner).pop(name, None))

    def _through(self, module: Module, name: str) -> None:
        """A step of the module counts as a forward pass. Where no backward pass follows, parameters are in parts again at its end."""
        own = getattr(module, name)
        register_fsdp_forward_method(module, name)
        step = vars(module)[name]

        @functools.wraps(own)
        def call(*args: Any) -> Any:
            if self._is_whole:  # torch's forward pass would put parameters in parts
                return own(*map_batch(self._cast, args))
            outputs = step(*args)
            if not torch.is_grad_enabled():
                self._reshard()
            return outputs

        self._put(module, name, call)

    def _cast(self, value: Any) -> Any:
        """An input of a step, where all of it is computed in one type."""
        change = self._input is not None and isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._input) if change else value

    def _reshard(self) -> None:
        """All parameters are in parts, whatever they were."""
        if self._is_whole:
            self._is_whole = False
            self._keep_whole(not self.reshard_after_forward)
        for each in self._sharded:
            each.reshard()

    def _unshard(self) -> None:
        """All parameters are whole until they are put in parts again. Every rank takes part."""
        self._is_whole = True
        self._keep_whole(True)
        for each in self._sharded:
            each.unshard()

    def _keep_whole(self, whether: bool) -> None:
        for each in self._sharded[1:]:  # the module itself comes first
            if hasattr(each, "set_reshard_after_forward"):  # of newer torch; without it a layer may be called once
                each.set_reshard_after_forward(not whether, recurse=False)

    # ------------------------------------------------------------------ steps

    @hookimpl(wrapper=True)
    def train_batch(self, run: Run) -> Generator[None, Any, Any]:
        if not self._sharded:
            return (yield)
        self._pending = not run.window_ends
        self._synchronize(run.window_ends)
        outputs = yield
        self._reshard()  # after a step that was skipped
        return outputs

    def _synchronize(self, whether: bool) -> None:
        if whether != self._synchronized:
            self._synchronized = whether
            self._sharded[0].set_requires_gradient_sync(whether)

    @hookimpl
    def on_step_skipped(self, run: Run, reason: str) -> None:
        super().on_step_skipped(run, reason)
        self._pending = True  # a window whose last batch is skipped has exchanged nothing

    @hookimpl
    def reduce_gradients(self, run: Run, optimizer: Optimizer) -> bool | None:
        if not self._sharded:
            return None
        if self._pending:  # a backward pass through nothing exchanges what there is
            self._pending = False
            self._synchronize(True)
            with torch.enable_grad():
                getattr(run.module, FLUSH)(torch.zeros((), device=run.device, requires_grad=True)).backward()
        return True

    # ------------------------------------------------------------------ evaluation, in which a rank may have less to do than others

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run, stage: str) -> Generator[None, Any, Any]:
        if not self._sharded:
            return (yield)
        self._begin(run, stage)
        try:
            return (yield)
        finally:
            self._reshard()

    @hookimpl
    def on_predict_start(self, run: Run) -> None:
        if self._sharded:
            self._begin(run, "predict")

    @hookimpl
    def on_predict_end(self) -> None:
        self._reshard()

    @hookimpl(wrapper=True)
    def validation_step(self, batch_idx: int, dataloader_idx: int) -> Generator[None, Any, Any]:
        return (yield from self._evaluated(batch_idx, dataloader_idx))

    @hookimpl(wrapper=True)
    def test_step(self, batch_idx: int, dataloader_idx: int) -> Generator[None, Any, Any]:
        return (yield from self._evaluated(batch_idx, dataloader_idx))

    @hookimpl(wrapper=True)
    def predict_step(self, batch_idx: int, dataloader_idx: int) -> Generator[None, Any, Any]:
        return (yield from self._evaluated(batch_idx, dataloader_idx))

    def _begin(self, run: Run, stage: str) -> None:
        """Ranks tell each other how many batches they have. Where that is not known, parameters are whole for all of the evaluation."""
        assert run.agreement is not None
        same(run.module.buffers(), run.device)
        counts = run.lengths("validate" if stage == "sanity" else stage)
        pairs = zip(counts, run.limits[stage], strict=True)
        own: list[Any] = [count if count is None or limit is None else min(count, limit) for count, limit in pairs]
        ranks = run.agreement.gather(own)
        self._rounds = []
        if any(None in each for each in ranks):
            self._unshard()
            return
        self._rounds = [(mine, min(each), max(each)) for mine, each in zip(own, zip(*ranks, strict=True), strict=True)]
        self._pass_over(0)

    def _evaluated(self, batch_idx: int, dataloader_idx: int) -> Generator[None, Any, Any]:
        """Around a step. Where the others have no batch any more, parameters are whole: to make layers so one by one takes all ranks."""
        if not self._rounds:
            return (yield)
        own, fewest, most = self._rounds[dataloader_idx]
        if batch_idx == fewest:
            self._unshard()
        outputs = yield
        if batch_idx == own - 1:
            if own == fewest < most:
                self._unshard()
            self._reshard()
            self._pass_over(dataloader_idx + 1)
        return outputs

    def _pass_over(self, first: int) -> None:
        """Loaders of which this rank has no batch: the others need its parts all the same."""
        for own, _, most in self._rounds[first:]:
            if own:
                return
            if most:
                self._unshard()
                self._reshard()

    # ------------------------------------------------------------------ checkpoints

    def _collected(self, collect: Callable[[Run, bool], dict[str, Any]], run: Run, weights_only: bool) -> dict[str, Any]:
        """The state of the run in the form in which it is written."""
        if run.agreement is None:
            raise RuntimeError("each rank has a part of the state, and after an error it cannot be gathered any more")
        self._reshard()
        state = collect(run, weights_only)
        form: dict[str, Any] = parts(state) if self.checkpoint == "sharded" else whole(state, run.rank == 0)
        return form

    @hookimpl
    def save_checkpoint(self, run: Run, path: Path | str, state: dict[str, Any]) -> Path | None:
        if not self._sharded or self.checkpoint == "full":
            return None
        if not isinstance(path, Path):
            raise CheckpointError(f"{path!r} is not a local path, and checkpoint='sharded' knows no other; write checkpoint='full'")
        write(path, state, _writing)
        return path

    @hookimpl
    def teardown(self, run: Run) -> None:
        while self._undo:
            self._undo.pop()()
        self._reshard()
        self._sharded, self._rounds = [], []


# ---------------------------------------------------------------------- which layers


def _inner_first(module: nn.Module) -> Iterable[nn.Module]:
    """Every module in ``module``, after those that are in it; a compiled one stands for what it compiled."""
    found: dict[int, nn.Module] = {}

    def visit(each: nn.Module) -> None:
        if id(each) in found:
            return
        for child in _compiled(each).children():
            visit(child)
        found.setdefault(id(each), each)

    visit(module)
    return found.values()


def _compiled(module: nn.Module) -> nn.Module:
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def _of_classes(module: nn.Module, names: Sequence[str], option: str) -> list[nn.Module]:
    """The layers whose class has one of the names.

    Raises:
        ValueError: a name that no layer has.
    """
    layers = [(type(_compiled(each)).__name__, each) for each in _inner_first(module) if each is not module]
    there = sorted({name for name, _ in layers})
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(there) or 'none'}"
            raise ValueError(f"{option}: {type(module).__name__} has no layer of class {name!r}{hint}")
    return [each for name, each in layers if name in names]


def _name_of(value: Any) -> str:
    return repr(value.__name__ if isinstance(value, type) else str(value))


def _check_ties(module: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Refuses a parameter of two layers that are made whole at different times.

    Raises:
        ValueError: there is one; it is named.
    """
    owner: dict[int, int] = {}  # of each module, the layer that it is in
    for index, layer in enumerate(layers):
        for each in layer.modules():
            owner.setdefault(id(each), index)
    first: dict[int, tuple[str, int]] = {}
    for path, each in module.named_modules(remove_duplicate=False):
        for name, parameter in each.named_parameters(path, recurse=False):
            other, place = first.setdefault(id(parameter), (name, owner.get(id(each), -1)))
            if place != owner.get(id(each), -1):
                raise ValueError(f"{other} and {name} are one parameter, of layers that wrap takes apart; wrap what has both, or neither")
