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
import threading
import time
import traceback
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

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

__all__ = ["RankFailed", "Ranks", "handlers_kept", "same"]

logger = logging.getLogger("torchplug")
HOW = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
STARTED = "TORCHPLUG_RESULT"  # in the environment of ranks that were started here: where the result goes
PATIENCE = timedelta(seconds=5)  # how long a rank that lost its connection waits for a word of the others
LOST = 75  # exit code of a rank that was started here and lost its connection to the others
BEHIND = 60.0  # seconds that a rank may be behind another one in the same batch

# of this process, in which there can be one group of all ranks
_store: Any = None  # where they found each other
_cpu: Any = None  # the group in which values on the CPU are exchanged
_broken = False  # whether the group cannot be left in good order
_runs = 0  # in which this process was a rank: words that are left for others belong to one of them


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
        strategies = [name for name, plugin in run.plugins.items() if isinstance(plugin, Ranks)]
        if len(strategies) > 1:
            raise ValueError(f"a run has one strategy, and {' and '.join(strategies)} are enabled: leave all but one out")
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
        global _runs
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("RANK and WORLD_SIZE are set and LOCAL_RANK is not: start the processes with torchrun, or set it too")
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
        run.say_once(f"strategy {run.name_of(self)!r}: {world} ranks, which exchange values by {dist.get_backend()}", logging.INFO)
        _runs += 1
        agreement = run.agreement = run.metrics.agreement = Agreement(run)
        waited_for = Path(os.environ[STARTED]) if STARTED in os.environ and local == 0 else None
        parts = set(run.module.state_dict()) if waited_for is not None else set()
        try:
            done = main()
            run.agreement = run.metrics.agreement = None
            late = self.gather(run, agreement.signal)  # from here on nobody talks to somebody who is gone
            run.interrupted = run.interrupted or next(filter(None, late), "")  # one that came too late for the loop ends all all the same
            if STARTED in os.environ:
                main.outcome(waited_for, done, parts)
            self.barrier()
        except BaseException as error:
            self._tell(run, error)
            raise
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
            found, rank, world = next(rendezvous("env://", timeout=timeout))
            _store = _of_now(found, rank, world, timeout)
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
        if _store is None:
            return
        lost = _is_lost(error)
        own = "lost the connection" if lost else f"failed: {type(error).__name__}: {error}"
        heard: list[str] = []
        telling = threading.Thread(target=self._exchange, args=(run, own, heard if lost else None), daemon=True)  # it may never come back
        telling.start()
        telling.join(2 * PATIENCE.total_seconds())
        if lost:
            add_note(error, heard[0] if heard else f"out of reach, or ended: rank 0 and its machine, {os.environ.get('MASTER_ADDR')}")

    def _exchange(self, run: Run, own: str, heard: list[str] | None) -> None:
        """Leaves this rank's word, and hears those of the others."""
        words = _words_of_ranks()
        with suppress(RuntimeError):  # the store is gone as well
            words.set(str(run.rank), own)
            if heard is not None:
                heard.append(self._heard(run, words))

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
        from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        nodes, came = run.options.num_nodes, ""
        if nodes > 1 and self.rendezvous is None:
            raise ValueError(f"num_nodes={nodes}: say where they meet with rendezvous='host:port', or let torchrun start the script")
        with tempfile.TemporaryDirectory(prefix="torchplug-") as folder, handlers_kept() as handlers:
            result = Path(folder) / "result"
            method, task = self._packed(main, Path(folder) / "task")
            config = LaunchConfig(
                min_nodes=nodes, max_nodes=nodes, nproc_per_node=count, max_restarts=0, start_method=method,
                run_id=uuid.uuid4().hex if nodes == 1 else f"torchplug {run.options.name}",
                rdzv_backend="c10d", rdzv_endpoint=self.rendezvous or "localhost:0",
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )  # fmt: skip
            if hasattr(config, "signals_to_handle"):  # older versions take the first four, ignored or not
                names = dict.fromkeys(("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", *run.options.signals))
                config.signals_to_handle = ",".join(name for name in names if _acts(name))
            try:
                elastic_launch(config, _work)(task, result, _Forked(self, run, handlers) if method == "fork" else None)
            except ChildFailedError as error:
                if not result.exists():  # the ranks ended as a signal asked them to, if there is one
                    raise RankFailed(_words(error)) from None
            except SignalException as error:
                came = signal.Signals(error.sigval).name
                if not result.exists():
                    logger.error("%s: the ranks had to be ended before the run was over", came)
                    leave(came)
            done = main.take(result)
            run.interrupted = run.interrupted or came
            return done

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
            if stage == "train" and run.agreement is not None:
                run.agreement.uneven = True  # the length of an iterable data set is a promise
            run.say_once(
                "an iterable data set is not dealt out: each rank loads all of it, unless it takes its part by its rank", logging.INFO
            )
        mine = dealt(loader, stage, run.rank, run.world_size, lambda value: self.broadcast(run, value))
        if stage == "train":
            shares = shares_of(mine)
            run.share = lambda batch_idx: shares.get(batch_idx, 1.0)
        return mine

    @hookimpl
    def on_step_skipped(self, run: Run, reason: str) -> None:
        """All ranks skip a batch, or none: a rank alone would leave the others waiting for its gradients. Nothing is exchanged at
        other batches.

        Raises:
            RuntimeError: the others do not skip it.
        """
        if run.world_size == 1 or _store is None:  # somebody else made the group, and has its store
            return
        words, world = _words_of_ranks(), run.world_size
        key = f"skipped {run.position.micro_step} {run.turn}"
        mine = words.add(key, 1)
        all_of_us = -(-mine // world) * world  # a trial may have been at this step before
        end = time.monotonic() + min(BEHIND, duration("timeout", self.timeout))
        while words.add(key, 0) < all_of_us:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"{reason} on rank {run.rank}, and not on all the others, which wait for its gradients: return None on all ranks, "
                    "or the loss times 0 where a batch is to be left out on one of them"
                )
            time.sleep(0.01)

    # ------------------------------------------------------------------ values

    @hookimpl
    def reduce(self, run: Run, values: Tensor, how: str) -> Tensor:
        values = values.clone()
        if run.alone:
            return values
        dist.all_reduce(values, HOW[how], group=_cpu)
        return values

    @hookimpl
    def gather(self, run: Run, value: Any) -> list[Any]:
        if run.alone:
            return [value] * run.world_size
        gathered = [None] * run.world_size
        dist.all_gather_object(gathered, value, group=_cpu)
        return gathered

    @hookimpl
    def broadcast(self, run: Run, value: Any) -> Any:
        if run.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_cpu)
        return box[0]

    @hookimpl
    def barrier(self) -> bool:
        dist.barrier(_cpu)
        return True


def same(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Every rank takes the values of rank 0, which go from ``device`` to ``device``, wherever the tensors are."""
    for tensor in map(Tensor.detach, tensors):
        values = tensor.to(device).contiguous()
        dist.broadcast(values, 0)
        if values.data_ptr() != tensor.data_ptr():
            tensor.copy_(values)


def _of_now(store: Store, rank: int, world: int, timeout: timedelta) -> Store:
    """``store`` with keys that nobody has used before.

    That of torchrun outlives the ranks that it starts again, and has the addresses of those that are gone. Rank 0 gives all keys a
    name, which each rank asks for in its own: an answer can only be meant for it.

    Raises:
        TimeoutError: some ranks did not come.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    meeting, mine = PrefixStore("torchplug", store), uuid.uuid4().hex
    if rank:
        meeting.set(str(rank), mine)
        meeting.wait([mine], timeout)
        name = meeting.get(mine).decode()
        meeting.set(f"{name} {rank}", "")
        return PrefixStore(name, store)
    missing, end = set(range(1, world)), time.monotonic() + timeout.total_seconds()
    while missing:
        missing = {other for other in missing if not meeting.check([f"{mine} {other}"])}
        for other in missing:
            if meeting.check([str(other)]):  # perhaps by one that is gone: it is looked at again
                meeting.set(meeting.get(str(other)).decode(), mine)
        if missing and time.monotonic() > end:
            raise TimeoutError(f"ranks {', '.join(map(str, sorted(missing)))} did not come within {timeout.total_seconds():g} s")
        time.sleep(0.01 * bool(missing))
    return PrefixStore(mine, store)


class _Forked(NamedTuple):
    """What a process that was forked takes over from the one that waits."""

    ranks: Ranks
    run: Run
    handlers: dict[int, Any]


def _work(task: Any, result: Path, forked: _Forked | None) -> None:
    """What a process does that was started here."""
    os.environ[STARTED] = str(result)
    if forked is not None:
        gc.freeze()  # garbage of the process that waits has threads there, whose end would not be found here
    cores = max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"]))
    torch.set_num_threads(cores if forked is None else 1)  # torch's pool of threads does not come along with a fork
    try:
        if forked is None:
            pickle.loads(task.read_bytes())()
            return
        _put_back(forked.handlers)  # those of torch's launcher came along
        forked.ranks._take_part(forked.run, task)
        if forked.run.asked_to_end:
            leave(forked.run.asked_to_end)
    except KeyboardInterrupt:  # torch takes it for a good end, and waits for a result
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        traceback.print_exc()  # torch's launcher shows a summary alone
        if _is_lost(error):
            time.sleep(PATIENCE.total_seconds())  # torch's launcher sees first who caused it, and ends this rank then
            raise SystemExit(LOST) from None
        raise
    finally:
        _disconnect()


def _is_lost(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _acts(name: str) -> bool:
    """Whether there is a signal of this name, and it is not ignored, as SIGHUP is under nohup."""
    return hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN


@contextmanager
def handlers_kept() -> Iterator[dict[int, Any]]:
    """Inside, a launcher may take signals, and torch's does not log what a failed rank has printed; gives the handlers there were."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {int(number): signal.getsignal(number) for number in signal.Signals if signal.getsignal(number) is not None}
    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    log.addFilter(_news)
    try:
        yield handlers
    finally:
        log.removeFilter(_news)
        _put_back(handlers)


def _put_back(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("failed (exitcode")


def _words_of_ranks() -> Store:
    """What ranks leave for each other during this run."""
    return PrefixStore(f"torchplug/{_runs}", _store)


def _words(error: Any) -> str:
    """Which rank failed first, in one line; its traceback is above."""
    victims = (LOST, -signal.SIGTERM)  # who lost the connection, or was ended by torch's launcher because another rank failed
    rank, failure = min(error.failures.items(), key=lambda each: (each[1].exitcode in victims, each[1].timestamp))
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}"
    return f"rank {rank} failed with exit code {failure.exitcode}; its error is above"


def _disconnect() -> None:
    """Leaves the group before the interpreter takes things apart: threads of the connections must not outlive it."""
    gc.collect()
    if not dist.is_initialized():
        return
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)  # it may never come back where a rank is out of reach
    leaving.start()
    leaving.join(PATIENCE.total_seconds() if _broken else None)
