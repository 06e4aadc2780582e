"""What strategies of several processes have in common: ranks are started and find each other, data are dealt out, values exchanged.

The processes are torch's: `torchrun` starts them, or its launcher's API from a plain script, and `torch.distributed` connects them.
"""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from torchplug.agreement import Agreement
from torchplug.blame import add_note
from torchplug.dealing import dealt, shares_itself, shares_of
from torchplug.hookspecs import hookimpl
from torchplug.launching import Done, Task
from torchplug.options import check_fields, duration
from torchplug.run import Run
from torchplug.signals import leave

__all__ = ["RankFailed", "Ranks"]

logger = logging.getLogger("torchplug")
HOW = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
STARTED = "TORCHPLUG_RESULT"  # in the environment of ranks that were started here: where the result goes
CONNECTION = ("onnection", "Timed out", "Broken pipe", "NCCL")  # what torch's errors say where a rank is gone
PATIENCE = timedelta(seconds=5)  # how long a rank that lost its connection waits for a word of the others

# of this process, in which there can be one group of all ranks
_store: Any = None  # where they found each other
_cpu: Any = None  # the group in which values on the CPU are exchanged
_broken = False  # whether the group cannot be left in good order


class RankFailed(RuntimeError):
    """One of the processes of a run ended with an error, which is printed above."""


@dataclass(kw_only=True, eq=False)
class Ranks:
    """A base for strategies whose ranks are processes: those that torchrun started, or that are started here.

    Args:
        backend: What exchanges gradients: 'nccl', 'gloo' or another one of torch.distributed. None: nccl on CUDA, else gloo.
        timeout: How long a rank waits for the others before the run fails: '30m', '90s', a timedelta or a dict of its arguments.
        start_method: How processes are started from a plain script: 'spawn' needs a script with `if __name__ == "__main__":`
            and things that can be pickled, 'fork' takes them as they are and cannot be used once CUDA is. 'auto' forks in a
            notebook and where something cannot be pickled.
        deal: Whether the data are dealt out over the ranks. False: the loaders give each rank its own part already.
        rendezvous: Where the machines meet if there are several, as host:port of the first; with torchrun leave it out.
    """

    backend: str | None = None
    timeout: str | timedelta | dict[str, Any] = "30m"
    start_method: Literal["auto", "spawn", "fork"] = "auto"
    deal: bool = True
    rendezvous: str | None = None

    before = ("*",)  # what it puts around module and loaders is innermost

    def __post_init__(self) -> None:
        check_fields(self)
        duration("timeout", self.timeout)

    # ------------------------------------------------------------------ processes

    @hookimpl
    def launch(self, run: Run, main: Task) -> Done | None:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return self._take_part(run, main)
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # torch and Python have no public way to ask
            raise RuntimeError('the script starts itself again and again: put what calls fit under `if __name__ == "__main__":`')
        count = self._devices(run)
        if count == 1 and run.options.num_nodes == 1:
            run.say_once(f"strategy {run.name_of(self)!r} with one device: one process, nothing is exchanged", logging.INFO)
            return None
        return self._start(run, main, count)

    def _devices(self, run: Run) -> int:
        """How many processes there are on this machine."""
        devices = run.options.devices
        if isinstance(devices, list):
            return len(devices)
        if devices == "auto":
            return torch.cuda.device_count() if run.options.accelerator != "cpu" and torch.cuda.is_available() else 1
        return int(devices)

    def _take_part(self, run: Run, main: Task) -> Done:
        """This process is a rank."""
        rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        asked = self._devices(run) * run.options.num_nodes
        if asked not in (1, world):
            devices, nodes = run.options.devices, run.options.num_nodes
            raise ValueError(
                f"{world} processes were started, but devices={devices!r} and num_nodes={nodes} ask for {asked}: "
                "let torchrun's --nproc-per-node and --nnodes say the same, or leave devices out"
            )
        run.rank, run.world_size, run.local_rank = rank, world, local
        self._connect(run)
        run.agreement = run.metrics.agreement = Agreement(run)
        try:
            done = main()
            run.agreement = run.metrics.agreement = None
            self.barrier()  # nobody is left talking to somebody who is gone
        except BaseException as error:
            self._tell(run, error)
            raise
        if STARTED in os.environ and rank == 0:
            main.outcome(Path(os.environ[STARTED]), done)
        return done

    def _connect(self, run: Run) -> None:
        """Joins the group of all ranks. It lasts as long as the process: a test after a fit meets in it again."""
        global _store, _cpu
        on_cuda = run.options.accelerator != "cpu" and torch.cuda.is_available()
        timeout = timedelta(seconds=duration("timeout", self.timeout))
        if not dist.is_initialized():
            if on_cuda:
                devices = run.options.devices
                torch.cuda.set_device(devices[run.local_rank] if isinstance(devices, list) else run.local_rank)
            _store, rank, world = next(rendezvous("env://", timeout=timeout))
            backend = self.backend or ("nccl" if on_cuda else "gloo")
            dist.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=timeout)
            _cpu = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
            atexit.register(_disconnect)
        elif _cpu is None:  # somebody else made the group
            _cpu = dist.new_group(backend="gloo", timeout=timeout)

    def _tell(self, run: Run, error: BaseException) -> None:
        """Leaves a word for the other ranks, who see no more than a closed connection; notes on such an error what they left."""
        global _broken
        _broken = True
        if _store is None or not isinstance(error, Exception):
            return
        words = PrefixStore("torchplug", _store)
        words.set_timeout(PATIENCE)
        connection = isinstance(error, (dist.DistError, RuntimeError)) and any(text in str(error) for text in CONNECTION)
        try:
            words.set(str(run.rank), "lost the connection" if connection else f"failed: {type(error).__name__}: {error}")
            if connection:
                add_note(error, self._heard(run, words))
        except RuntimeError:  # the store is gone as well
            add_note(error, f"the first machine ({os.environ.get('MASTER_ADDR')}) is out of reach, or its process has ended")

    def _heard(self, run: Run, words: Store) -> str:
        """What became of the others."""
        others = [rank for rank in range(run.world_size) if rank != run.rank]
        end = time.monotonic() + PATIENCE.total_seconds()
        while time.monotonic() < end and not words.check([str(rank) for rank in others]):
            time.sleep(0.1)
        there = {rank: words.get(str(rank)).decode() for rank in others if words.check([str(rank)])}
        lines = [f"rank {rank} {text}" for rank, text in there.items() if text.startswith("failed")]
        silent = [str(rank) for rank in others if rank not in there]
        lines += [f"out of reach, or killed: rank {', '.join(silent)}"] * bool(silent)
        return "; ".join(lines) or "all other ranks lost their connections too"

    # ------------------------------------------------------------------ from a plain script

    def _start(self, run: Run, main: Task, count: int) -> Done:
        """Lets torch's launcher start the ranks on this machine, waits for them, and takes what came of it."""
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        with tempfile.TemporaryDirectory(prefix="torchplug-") as folder:
            result = Path(folder) / "result"
            method, task = self._packed(main, Path(folder) / "task")
            nodes = run.options.num_nodes
            config = LaunchConfig(
                min_nodes=nodes, max_nodes=nodes, nproc_per_node=count, run_id=uuid.uuid4().hex if nodes == 1 else str(run.options.name),
                rdzv_backend="c10d", rdzv_endpoint=self.rendezvous or "localhost:0", max_restarts=0, start_method=method,
            )  # fmt: skip
            try:
                elastic_launch(config, _work)(task, result, self if method == "fork" else None, run if method == "fork" else None)
            except ChildFailedError as error:
                if not result.exists():  # the ranks ended as a signal asked them to, if there is one
                    raise RankFailed(_words(error)) from None
            except SignalException as error:
                if not result.exists():
                    leave(signal.Signals(error.sigval).name)
            return main.take(result)

    def _packed(self, main: Task, path: Path) -> tuple[str, Any]:
        """How processes are started, and what they are given: the task itself, or a file that holds it."""
        method = self.start_method
        if method != "fork" and (method == "spawn" or hasattr(sys.modules["__main__"], "__file__")):
            try:
                path.write_bytes(pickle.dumps(main))
            except Exception as error:
                if method == "spawn":
                    add_note(error, "start_method='spawn' sends everything to other processes: leave it out, or write 'fork'")
                    raise
                logger.info("starts processes by forking, as something cannot be pickled: %s", error)
            else:
                return "spawn", path
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                "CUDA is in use already, so processes cannot be forked: touch no GPU before fit, or let torchrun start the script"
            )
        return "fork", main

    # ------------------------------------------------------------------ data

    @hookimpl
    def prepare_loader(self, run: Run, loader: Any, stage: str) -> Any:
        if run.world_size == 1 or not self.deal:
            return None
        if shares_itself(loader):
            run.say_once(
                "an iterable data set is not dealt out: each rank loads all of it, unless it takes its part by its rank", logging.INFO
            )
        mine = dealt(loader, stage, run.rank, run.world_size, self.broadcast)
        if stage == "train":
            shares = shares_of(mine)
            run.share = lambda batch_idx: shares.get(batch_idx, 1.0)
        return mine

    # ------------------------------------------------------------------ values

    @hookimpl
    def reduce(self, values: Tensor, how: str) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, HOW[how], group=_cpu)
        return values

    @hookimpl
    def gather(self, run: Run, value: Any) -> list[Any]:
        gathered = [None] * run.world_size
        dist.all_gather_object(gathered, value, group=_cpu)
        return gathered

    @hookimpl
    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_cpu)
        return box[0]

    @hookimpl
    def barrier(self) -> bool:
        dist.barrier(_cpu)
        return True


def _work(task: Any, result: Path, ranks: Ranks | None, run: Run | None) -> None:
    """What a process does that was started here."""
    os.environ[STARTED] = str(result)
    torch.set_num_threads(
        max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])) if ranks is None else 1
    )  # a fork has no pool
    try:
        if ranks is not None and run is not None:
            ranks._take_part(run, task)
        else:
            pickle.loads(task.read_bytes())()
    except Exception:
        traceback.print_exc()  # torch's launcher shows a summary alone
        raise
    finally:
        _disconnect()


def _words(error: Any) -> str:
    """Which rank failed first, in one line; its traceback is above."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}"
    return f"rank {rank} failed with exit code {failure.exitcode}; its error is above"


def _disconnect() -> None:
    """Leaves the group before the interpreter takes things apart: threads of the connections must not outlive it."""
    gc.collect()
    if dist.is_initialized() and not _broken:
        dist.destroy_process_group()
