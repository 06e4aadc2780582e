"""Trains on a GPU: picks the device, brings batches to it while it computes, and says how much of its memory was used."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from torchplug import Run, hookimpl, map_batch

__all__ = ["Gpu"]

logger = logging.getLogger("torchplug")
AHEAD = 4  # batches that may be on the device before those of them that it computed with are gone
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclass(kw_only=True, eq=False)
class Gpu:
    """Trains on a device of CUDA or ROCm, or on MPS where there is neither.

    Args:
        matmul_precision: How float32 matrices are multiplied on CUDA: 'highest' exactly, 'high' in TF32 or three bfloat16 products,
            'medium' in bfloat16. None leaves torch's own setting.
        cudnn_tf32: Whether cuDNN may round the float32 inputs of convolutions and recurrent layers to TF32, of 10 bits. None leaves
            torch's own setting.
        prefetch: Bring batches to a CUDA device on a stream of their own, while it computes the steps before, and let loaders with
            workers pin them.
    """

    matmul_precision: Literal["highest", "high", "medium"] | None = None
    cudnn_tf32: bool | None = None
    prefetch: bool = True

    _device: torch.device | None = field(init=False, default=None, repr=False)  # of the run; None where it has no GPU
    _transfer: _Transfer | None = field(init=False, default=None, repr=False)
    _undo: ExitStack = field(init=False, default_factory=ExitStack, repr=False)  # puts torch's global switches back

    def __post_init__(self) -> None:
        if self.matmul_precision not in (None, "highest", "high", "medium"):
            raise ValueError(f"matmul_precision must be 'highest', 'high', 'medium' or None, got {self.matmul_precision!r}")
        if self.cudnn_tf32 is not None and not isinstance(self.cudnn_tf32, bool):
            raise TypeError(f"cudnn_tf32 must be True, False or None, got {self.cudnn_tf32!r}")
        if not isinstance(self.prefetch, bool):
            raise TypeError(f"prefetch must be True or False, got {self.prefetch!r}")

    # ------------------------------------------------------------------ the device

    @hookimpl
    def setup(self, run: Run) -> None:
        options = run.options
        if options.accelerator == "cpu":
            return
        cuda = torch.cuda.is_available()
        if not cuda and not torch.backends.mps.is_available():
            missing = f"there is no GPU that can be used: {_reason()}"
            if options.accelerator != "auto":
                raise RuntimeError(f"{missing}; accelerator='cpu' trains on the CPU")
            logger.warning("%s; the CPU is used", missing)
            return
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["MPS"]
        number = _choose(options.devices, names)
        if not cuda:
            run.device = self._device = torch.device("mps")
            run.say_once("uses the GPU through MPS", logging.INFO)
            return
        run.device = self._device = torch.device("cuda", number)
        unused = ""
        if len(names) > 1 and options.strategy == "auto" and not isinstance(options.devices, list):
            unused = f", 1 of {len(names)}; strategy='ddp', devices='auto' uses all"
        total = torch.cuda.get_device_properties(number).total_memory
        run.say_once(f"uses cuda:{number} ({names[number]}, {_size(total)}){unused}", logging.INFO)
        self._set_switches(number)
        torch.cuda.reset_peak_memory_stats(number)
        if self.prefetch:  # like core's own answer to move_batch, with another way to get there
            self._transfer = _Transfer(self._device, torch.bfloat16 if options.precision == "bf16-true" else None)

    def _set_switches(self, number: int) -> None:
        """Makes the device the current one and sets how it computes; ``_undo`` has what was."""
        self._undo.callback(torch.cuda.set_device, torch.cuda.current_device())
        torch.cuda.set_device(number)
        if self.matmul_precision is not None:
            self._undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision(self.matmul_precision)
        if self.cudnn_tf32 is not None:
            self._undo.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
            torch.backends.cudnn.allow_tf32 = self.cudnn_tf32

    @hookimpl
    def teardown(self, run: Run) -> None:
        device = self._device
        if device is not None and device.type == "cuda":
            peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
            total = torch.cuda.get_device_properties(device).total_memory
            run.report[run.name_of(self)] = f"at most {_size(peak)} of {_size(total)} used on {device}, {_size(reserved)} reserved"
        self._release()

    def _release(self) -> None:
        self._device = self._transfer = None
        self._undo.close()

    @hookimpl
    def on_out_of_memory(self, exception: BaseException) -> None:
        device = self._device
        if device is None or device.type != "cuda" or isinstance(exception, (MemoryError, OSError)):  # of the host
            return
        free, total = torch.cuda.mem_get_info(device)
        logger.error(
            "out of memory on %s: %s allocated (at most %s), %s reserved, %s free of %s. Smaller batches need less: the plugin "
            "batch_size_finder looks for the largest, accumulate_grad_batches makes up for it; so does precision='bf16-mixed'",
            device, _size(torch.cuda.memory_allocated(device)), _size(torch.cuda.max_memory_allocated(device)),
            _size(torch.cuda.memory_reserved(device)), _size(free), _size(total),
        )  # fmt: skip

    # ------------------------------------------------------------------ batches

    @hookimpl(wrapper=True)
    def prepare_loader(self) -> Generator[None, Any, Any]:
        loader = yield
        # workers have no tensors on a device, so that theirs can be pinned, by a thread; without workers it would be done in the loop
        if self._transfer is None or not isinstance(loader, DataLoader) or loader.num_workers == 0 or loader.pin_memory:
            return loader
        pinning = copy.copy(loader)
        pinning.pin_memory = True
        return pinning

    @hookimpl
    def move_batch(self, batch: Any) -> Any:
        return None if self._transfer is None else self._transfer(batch)


class _Transfer:
    """Copies batches to a device on a stream of its own.

    A copy begins at once, while the device is still busy with earlier steps, which the program runs ahead of; the step that needs
    it waits for it on the device. Nothing is taken from the loader before its turn.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.compute = torch.cuda.current_stream(device)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # A batch's memory is free when the device is done with it. Without a bound, a program far ahead of it would fill the memory.
        self.done = [torch.cuda.Event(blocking=True) for _ in range(AHEAD)]  # type: ignore[no-untyped-call]
        self.turn = 0

    def __call__(self, batch: Any) -> Any:
        compute = self.compute = torch.cuda.current_stream(self.device)
        done = self.done[self.turn]
        self.turn = (self.turn + 1) % AHEAD
        done.synchronize()  # nothing to wait for, unless the device is `AHEAD` steps behind and has work for as long
        done.record(compute)
        with torch.cuda.stream(self.stream):
            moved = map_batch(self._moved, batch)
            self.copied.record(self.stream)
        compute.wait_event(self.copied)
        return moved

    def _moved(self, part: Any) -> Any:
        if type(part) is Tensor and part.device.type == "cpu" and part.layout is torch.strided:
            moved = part.to(self.device, self.dtype if part.is_floating_point() else None, non_blocking=True)
        elif not isinstance(part, Tensor) and hasattr(part, "record_stream"):  # such as the graphs of PyG and DGL
            moved = part.to(self.device, non_blocking=True)
        else:  # what may be computed on the device at this moment, or whose memory nobody can speak for
            with torch.cuda.stream(self.compute):
                if not isinstance(part, Tensor):
                    return part.to(self.device)
                return part.to(self.device, self.dtype if part.is_floating_point() else None, non_blocking=True)
        moved.record_stream(self.compute)  # its memory is not used for another batch before the steps are done with it
        return moved


def _choose(devices: int | list[int] | str, names: list[str]) -> int:
    """The number of this process's device among those with ``names``: as many processes of a machine take one each.

    Raises:
        ValueError: there is none with that number, or there are too few.
    """
    there = f"there {'is' if len(names) == 1 else 'are'} {', '.join(f'{i} ({name})' for i, name in enumerate(names))}"
    there += "".join(f", as {name}={os.environ[name]!r} leaves them" for name in VISIBLE if name in os.environ)
    numbers = devices if isinstance(devices, list) else range(len(names))
    wrong = [number for number in numbers if number >= len(names)]
    if wrong:
        raise ValueError(f"devices={devices!r}: there is no device {wrong[0]}; {there}")
    if isinstance(devices, int) and devices > len(names):
        raise ValueError(f"devices={devices}: that many there are not; {there}")
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank >= len(numbers):
        raise ValueError(f"devices={devices!r}: there is none for the process with LOCAL_RANK={rank}; {there}")
    return numbers[rank]


def _reason() -> str:
    """Why torch finds no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        if torch.backends.mps.is_built():
            return "MPS is not available on this machine"
        return f"torch {torch.__version__} is built without CUDA and ROCm (get another build: https://pytorch.org/get-started/locally)"
    for name in VISIBLE:
        if os.environ.get(name, "0").strip() in ("", "-1"):
            return f"the environment variable {name}={os.environ[name]!r} hides every device"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        why = "torch.cuda.is_available() is False"
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
    return why + "".join(f", with {name}={os.environ[name]!r}" for name in VISIBLE if name in os.environ)


def _size(count: float) -> str:
    """Bytes in MB or GB, of 10^6 and 10^9."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
