"""Tensors of which each rank holds a part (torch's DTensor): made whole, spread out again, and as a checkpoint in parts.

A checkpoint in parts is a folder that `torch.distributed.checkpoint` writes, each rank its own file, with one more file beside them:
`state.json` has everything that is no tensor, and the size and CRC-32 of each of the others. A folder without it is not complete.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchplug.codec import DTYPES, CheckpointError, Encoder, decode
from torchplug.files import FULL, exchange, flush_folder, remove
from torchplug.layout import FORMAT, NAMES, WRONG, Entry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["copy", "is_sharded", "is_spread", "like", "like_parameters", "local", "parts", "problems", "read", "spread"]
__all__ += ["state_in", "whole", "write"]

STATE = "state.json"
CHUNK = 1 << 22  # bytes that are summed up at a time
PART = "$part"  # marks a part of a tensor in a state


def is_spread(value: Any) -> bool:
    """Whether ``value`` is a tensor of which this rank holds a part. torch's module for such is loaded by who makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(value: Tensor) -> Tensor:
    """What this rank holds of ``value``, in the same memory."""
    return value.to_local() if is_spread(value) else value  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- whole, in parts, and spread out again


def whole(value: Any, keep: bool = True) -> Any:
    """``value`` with the tensors that are spread over ranks as plain ones on the CPU; tied ones are the same tensor.

    Every rank calls it with values of the same structure. Tensors are gathered one by one. A rank that does not ``keep`` them gets
    tensors on the meta device.
    """
    known: dict[tuple[Any, ...], Tensor] = {}

    def gathered(tensor: Any) -> Tensor:
        own = tensor.to_local()
        full: Tensor = tensor.detach().full_tensor()
        if not keep:
            return full.to("meta")
        key = (own.data_ptr(), full.shape, own.stride(), full.dtype)
        if full.numel() and key in known:  # the first part is the first rank's, and never empty
            return known[key]
        known[key] = full = full.cpu()
        return full

    return _mapped(value, gathered)


def parts(value: Any) -> Any:
    """``value`` with the part of this rank in place of each tensor that is spread over ranks, as plain values that `write` knows.

    Raises:
        ValueError: a tensor that is spread in another way than along one of its axes, over all ranks.
    """

    def part(tensor: Any) -> Any:
        if all(placement.is_replicate() for placement in tensor.placements):
            return tensor.to_local().detach()
        if len(tensor.placements) != 1 or not tensor.placements[0].is_shard():
            raise ValueError(f"a tensor that is spread as {tensor.placements} cannot be saved in parts; write checkpoint='full'")
        return {PART: tensor.to_local().detach(), "shape": list(tensor.shape), "axis": tensor.placements[0].dim}

    return _mapped(value, part)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with each tensor changed that is spread over ranks; containers without any stay what they are."""
    if is_spread(value):
        return change(value)
    if isinstance(value, dict):
        changed = {key: _mapped(each, change) for key, each in value.items()}
        return value if all(changed[key] is value[key] for key in value) else changed
    if type(value) in (list, tuple):
        several = [_mapped(each, change) for each in value]
        return value if all(new is old for new, old in zip(several, value, strict=True)) else type(value)(several)
    return value


def like(value: Tensor, target: Tensor) -> Tensor:
    """``value``, which all ranks have as a whole, spread over ranks as ``target`` is; of another shape, each has all of it.

    Nothing is exchanged. Where ``target`` is a plain tensor, or ``value`` is spread already, ``value`` itself.
    """
    if not is_spread(target) or is_spread(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    if value.shape != target.shape:
        placements = [Replicate()] * mesh.ndim
    own = value = value.detach().contiguous()
    for count, index, placement in zip(mesh.shape, mesh.get_coordinate(), placements, strict=True):
        if placement.is_shard():  # as torch.chunk does it, is torch's rule
            pieces = own.chunk(count, placement.dim)
            own = pieces[index] if index < len(pieces) else own.narrow(placement.dim, 0, 0)
    own = own.to(local(target).device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


def spread(values: Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name, each as the target of its name."""
    return {
        name: like(value, targets[name]) if isinstance(value, Tensor) and isinstance(targets.get(name), Tensor) else value
        for name, value in values.items()
    }


def like_parameters(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer, each tensor in it as the parameter that it belongs to; numbers stay plain tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(map(is_spread, parameters)):
        return state
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=True))
    spread_out = {
        number: {name: like(each, of[number]) if isinstance(each, Tensor) and each.dim() else each for name, each in values.items()}
        if number in of
        else values
        for number, values in state["state"].items()
    }
    return {**state, "state": spread_out}


# ---------------------------------------------------------------------- written in parts


class _Parts(Encoder):
    """Puts parts aside as well.

    Attributes:
        parts: those by the path of the tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, dict[str, Any]] = {}

    def _encode(self, value: Any, path: str) -> Any:
        if type(value) is dict and PART in value:
            self.parts[path] = value
            return {"$tensor": path}
        return super()._encode(value, path)


def write(path: Path, state: Mapping[str, Any], group: ProcessGroup) -> None:
    """Writes ``state``, in the form that `parts` gives it, into a folder that takes the place of ``path`` when it is complete.

    Every rank of ``group`` calls it, all with the same file system. What is no part comes from the first one. The group exchanges values
    on the CPU and is used by nobody else at this time, such as a thread that trains.

    Raises:
        CheckpointError: a value of any rank that has no safe form, or a disk that is full.
        OSError: the folder cannot be written.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    rank, encoder, folder = dist.get_rank(group), _Parts(), path.with_name(f".{path.name}.{os.getpid()}.tmp")
    body, error = "", None
    try:
        body = encoder.text(state)
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    except (CheckpointError, OSError) as raised:
        error = raised
    try:
        folder = Path(_agreed(error, str(folder), group))
        tensors: dict[str, Tensor] = dict(encoder.tensors) if rank == 0 else {}
        mesh = DeviceMesh.from_group(group, "cpu")
        for name, each in encoder.parts.items():
            shape, own = torch.Size(each["shape"]), each[PART].cpu().contiguous()
            stride = torch.empty(shape, device="meta").stride()
            tensors[name] = DTensor.from_local(own, mesh, [Shard(each["axis"])], run_check=False, shape=shape, stride=stride)
        try:
            save(tensors, storage_writer=FileSystemWriter(folder), process_group=group)
        except CheckpointException as raised:  # on all ranks, with what went wrong on any
            raise CheckpointError(f"{path} cannot be written: {'; '.join(map(_reason, raised.failures.values()))}") from raised
        sums: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(sums, {file.name: _sum(file) for file in folder.glob(f"__{rank}_*")}, group=group)
        if rank == 0:
            try:
                of_all = {name: found for each in sums for name, found in each.items()} | {".metadata": _sum(folder / ".metadata")}
                _complete(folder, body, of_all, tensors)
                _replace(folder, path)
            except OSError as raised:
                error = CheckpointError(f"{path} cannot be written: {raised.strerror or raised}")
        _agreed(error, "", group)
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _reason(failure: Any) -> str:
    """What torch noted of an error: the error itself, with its traceback beside it."""
    error = failure[0] if isinstance(failure, tuple) else failure
    return FULL.get(error.errno or 0, str(error)) if isinstance(error, OSError) else str(error)


def _agreed(error: Exception | None, value: str, group: ProcessGroup) -> str:
    """The value of the first rank; an error of any is raised by all."""
    import torch.distributed as dist

    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (None if error is None else str(error), value), group=group)
    if error is not None:
        raise error
    for rank, (words, _) in enumerate(told):
        if words is not None:
            raise CheckpointError(f"rank {rank}: {words}")
    first: str = told[0][1]
    return first


def _complete(folder: Path, body: str, files: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    entries = {name: [NAMES[each.dtype], list(each.shape)] for name, each in tensors.items()}
    content = json.dumps({"format": FORMAT, "body": body, "tensors": entries, "files": files})
    with open(folder / STATE, "w", encoding="utf-8") as file:
        file.write(json.dumps({"crc32": zlib.crc32(content.encode()), "content": content}))
        file.flush()
        os.fsync(file.fileno())
    flush_folder(folder)


def _replace(folder: Path, path: Path) -> None:
    """A folder takes the place of another one, or of a file, and what was there is deleted."""
    if not path.exists():
        folder.rename(path)
    elif not exchange(folder, path):  # for a moment nothing is there
        old = folder.with_name(f".old{folder.name}")
        path.rename(old)
        folder.rename(path)
        remove(old)
    flush_folder(path.parent)


def copy(path: Path, other: Path) -> None:
    """Gives a checkpoint in parts a second name; its files are the same, or copies where the file system has no hard links."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    temporary = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(path, temporary, copy_function=link)
        _replace(temporary, other)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sum(file: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    size = total = 0
    with open(file, "rb") as source:
        while block := source.read(CHUNK):
            size, total = size + len(block), zlib.crc32(block, total)
    return [size, total]


# ---------------------------------------------------------------------- read


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint in parts lies there."""
    return (path / STATE).is_file()


def state_in(path: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The number of the format, the state with an `Entry` in place of each tensor, and the files there should be, with size and CRC-32.

    Raises:
        CheckpointError: it is damaged, or of a newer format.
    """
    try:
        outer = json.loads((path / STATE).read_text(encoding="utf-8"))
        if zlib.crc32(outer["content"].encode()) != outer["crc32"]:
            raise CheckpointError(f"{path}: {STATE} is damaged")
        content = json.loads(outer["content"])
        if content["format"] > FORMAT:
            raise CheckpointError(f"{path} has format {content['format']}, this version reads up to {FORMAT}: update torchplug")
        entries = {name: Entry(name, DTYPES[dtype], tuple(shape), 0) for name, (dtype, shape) in content["tensors"].items()}
        return content["format"], dict(decode(json.loads(content["body"]), entries)), content["files"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except WRONG as error:
        raise CheckpointError(f"{path}: {STATE} is damaged ({error!r})") from error


def problems(path: Path, files: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files of a checkpoint in parts."""
    found = []
    for name, (size, total) in files.items():
        try:
            if _sum(path / name) != [size, total]:
                found.append(f"{path}: {name} is damaged")
        except OSError as error:
            found.append(f"{path}: {name} cannot be read: {error.strerror or error}")
    return found


def read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fills whole tensors, by their names. No process group is needed, and other ranks have no part in it."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            try:
                metadata: Metadata = _Harmless(io.BytesIO((path / ".metadata").read_bytes())).load()
            except pickle.UnpicklingError as error:
                raise CheckpointError(f"{path} cannot be loaded: {error}") from error
            return metadata

    reader, planner = Reader(path), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    planner.set_up_planner(dict(tensors), metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
    reader.read_data(planner.finish_plan(plan), planner).wait()


class _Harmless(pickle.Unpickler):
    """torch keeps its index of a checkpoint as a pickle; of that nothing is taken but the classes that belong into it."""

    NAMES: ClassVar = {
        "torch": {"Size", "device", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "collections": {"OrderedDict"},
        "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name in self.NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")
