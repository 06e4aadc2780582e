"""A signal ends a run in good order wherever it comes, and leaves nothing behind in the process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import torchplug
from torchplug import Run, Trainer, hookimpl
from torchplug.checkpoint import load, verify
from torchplug.members import OPERATIONS, PARAMETERS

CODES = {"SIGTERM": 143, "SIGUSR1": 128 + signal.SIGUSR1, "SIGUSR2": 128 + signal.SIGUSR2, "SIGHUP": 129}
WITHIN = ("launch", "evaluate", "train_batch", "train_step", "backward", "optimizer_step", "zero_grad", "scheduler_step", "save_checkpoint")
HOOKS = [name for name in PARAMETERS if name not in OPERATIONS] + [*WITHIN]

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

Plan = dict[tuple[str, int], Callable[[Run], Any]]


@pytest.fixture(autouse=True)
def heard() -> Iterator[list[str]]:
    """Earlier handlers that only note what they got, so that a test that fails does not end pytest; Ctrl-C is as ever."""
    noted: list[str] = []
    before = {name: signal.getsignal(getattr(signal, name)) for name in (*CODES, "SIGINT", "SIGCHLD")}
    for name in CODES:
        signal.signal(getattr(signal, name), lambda number, frame: noted.append(signal.Signals(number).name))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield noted
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def send(name: str = "SIGTERM") -> Callable[[Run], None]:
    return lambda run: os.kill(os.getpid(), getattr(signal, name))


# ---------------------------------------------------------------------- a run in which something happens


class Moments:
    """Does something when a moment is reached for the n-th time, which is a hook or what module and data say; saves at a signal."""

    before = ("*",)

    def __init__(self, plan: Plan) -> None:
        self.plan, self.counts, self.path = plan, Counter[str](), Path("saved.safetensors").absolute()
        self.run: Run | None = None

    def reached(self, moment: str, run: Run | None = None) -> None:
        self.run = self.run or run
        self.counts[moment] += 1
        act = self.plan.get((moment, self.counts[moment]))
        if act is not None:
            assert self.run is not None
            act(self.run)


def _hook(name: str) -> Any:
    def event(self: Moments, run: Run) -> None:
        self.reached(name, run)
        if name == "on_stop_requested" and run.interrupted:
            run.save_checkpoint(self.path, "interrupted")

    def wrapper(self: Moments, run: Run) -> Iterator[Any]:
        self.reached(name, run)
        answer = yield
        self.reached(f"{name} is done", run)
        return answer

    return hookimpl(wrapper=True)(wrapper) if name in OPERATIONS else hookimpl(event)


for _name in HOOKS:
    setattr(Moments, _name, _hook(_name))


class Noisy(Dataset):
    """Samples that are different each time, by two generators."""

    def __init__(self, samples: int, reached: Callable[[str], None]) -> None:
        self.samples, self.reached = samples, reached

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        self.reached("fetch")
        x = torch.full((4,), index / self.samples) + torch.rand(4) + random.random()
        return x, x.sum(0, keepdim=True)


class Net(torchplug.Module):
    """Dropout, running means, and random numbers in validation: whatever is broken off would leave a trace."""

    def __init__(self, reached: Callable[[str], None], manual: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))
        self.reached, self.automatic_optimization = reached, not manual

    def loss(self, batch: Any) -> Any:
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.reached("training_step")
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            if batch_idx % 2 or batch_idx == 6:
                self.optimizers().step()
                self.optimizers().zero_grad()
        return loss

    def validation_step(self, batch: Any) -> None:
        self.reached("validation_step")
        self.log("val_loss", self.loss(batch) + torch.rand(()), on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        if not self.automatic_optimization:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"}}


def fit(plugin: Moments | None = None, ckpt_path: Path | None = None, manual: bool = False, **options: Any) -> Trainer:
    """Two epochs of seven batches, with two batches of validation, and one to see that it works."""
    plugin = plugin or Moments({})
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"max_epochs": 2, "seed": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 1, "accelerator": "cpu"}
    trainer = Trainer(**{**defaults, **options}, plugins=["journal", plugin])
    train = DataLoader(Noisy(14, plugin.reached), 2, shuffle=True)
    trainer.fit(Net(plugin.reached, manual), train, DataLoader(Noisy(4, lambda moment: None), 2), ckpt_path=ckpt_path)
    return trainer


def ended(plan: Plan, expected: type[BaseException] = SystemExit, **options: Any) -> tuple[Any, Moments, Run]:
    """What a run raises in which something happens, what it went through, and the run."""
    plugin = Moments(plan)
    with pytest.raises(expected) as caught:
        fit(plugin, **options)
    assert plugin.run is not None
    return caught.value, plugin, plugin.run


def journal(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.dir / "journal.jsonl").read_text().splitlines()]


def outcome(trainer: Trainer) -> dict[str, Any]:
    """All that a run comes to."""
    run = trainer.run
    assert run is not None
    optimizer = run.optimizers[0]
    tensors = [*run.module.state_dict().values(), torch.get_rng_state(), *(each["momentum_buffer"] for each in optimizer.state.values())]
    records = [(each["epoch"], each["step"], each["stage"], each["metrics"]) for each in journal(run) if each["event"] == "log_metrics"]
    return {
        "tensors": [each.tolist() for each in tensors], "python": random.getstate(), "rate": optimizer.param_groups[0]["lr"],
        "records": records, "metrics": dict(trainer.metrics), "position": run.position,
    }  # fmt: skip


# ---------------------------------------------------------------------- wherever it comes


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows of 3": {"accumulate_grad_batches": 3},
    "validation every 3 batches": {"val_check_interval": 3},
    "windows of 2 and validation every 3": {"accumulate_grad_batches": 2, "val_check_interval": 3},
    "manual": {"manual": True},
    "min_epochs": {"min_epochs": 2},
    "values every 50 steps": {"log_every_n_steps": 50},
    "max_steps at the epoch's end": {"max_epochs": None, "max_steps": 7},
}


@pytest.mark.parametrize(
    ("moment", "count", "options", "epoch", "batch", "step"),
    [
        ("setup", 1, "plain", 0, 0, 0),
        ("validation_step", 1, "plain", 0, 0, 0),  # the sanity check
        ("on_train_start", 1, "plain", 0, 0, 0),
        ("on_train_epoch_start", 1, "plain", 0, 1, 1),
        ("on_train_epoch_start", 2, "plain", 1, 1, 8),
        ("fetch", 5, "plain", 0, 3, 3),  # the third batch
        ("training_step", 3, "plain", 0, 3, 3),
        ("optimizer_step", 3, "plain", 0, 3, 3),
        ("on_train_batch_end", 3, "plain", 0, 3, 3),
        ("training_step", 7, "plain", 0, 7, 7),
        ("validation_step", 2, "plain", 0, 7, 7),
        ("on_validation_batch_end", 2, "plain", 1, 0, 7),
        ("on_validation_end", 1, "plain", 1, 0, 7),
        ("on_train_epoch_end", 1, "plain", 1, 0, 7),
        ("training_step", 14, "plain", 1, 7, 14),
        ("training_step", 4, "windows of 3", 0, 6, 2),
        ("on_train_batch_end", 6, "windows of 3", 0, 6, 2),
        ("training_step", 7, "windows of 3", 0, 7, 3),
        ("validation_step", 2, "validation every 3 batches", 0, 3, 3),
        ("on_validation_end", 1, "validation every 3 batches", 0, 3, 3),
        ("validation_step", 2, "windows of 2 and validation every 3", 0, 4, 2),
        ("training_step", 3, "manual", 0, 4, 2),
        ("training_step", 3, "min_epochs", 0, 3, 3),
        ("training_step", 3, "values every 50 steps", 0, 3, 3),
        ("training_step", 7, "max_steps at the epoch's end", 0, 7, 7),
        ("validation_step", 2, "max_steps at the epoch's end", 0, 7, 7),
    ],
)
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on_bit_for_bit(
    moment: str, count: int, options: str, epoch: int, batch: int, step: int
) -> None:
    left, plugin, run = ended({(moment, count): send()}, **OPTIONS[options])
    assert left.code == 143
    *_, last = journal(run)
    assert (last["event"], last["status"]) == ("on_run_end", "interrupted")
    assert plugin.counts["on_stop_requested"] == plugin.counts["teardown"] == 1 and not plugin.counts["on_train_end"]
    assert verify(plugin.path) == []
    where = load(plugin.path)["position"]
    assert (where["epoch"], where["batch"], where["step"]) == (epoch, batch, step)

    resumed = outcome(fit(ckpt_path=plugin.path, **OPTIONS[options]))
    assert resumed == outcome(fit(name="uninterrupted", **OPTIONS[options]))


def test_a_signal_while_a_checkpoint_is_written_lets_it_be_written_and_ends_the_run_there() -> None:
    other = Path("other.safetensors").absolute()
    left, plugin, run = ended({("on_train_batch_end", 3): lambda run: run.save_checkpoint(other), ("save_checkpoint", 1): send()})
    assert left.code == 143 and run.position.step == 3
    assert verify(other) == verify(plugin.path) == [] and load(plugin.path)["position"]["batch"] == 3
    assert plugin.counts["save_checkpoint"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [name for name in OPTIONS if name not in ("windows of 3", "min_epochs", "values every 50 steps")])
def test_a_signal_in_any_hook_loses_nothing(options: str) -> None:
    """At its first two calls and the last one, and at others by chance."""
    quiet = Moments({})
    whole, known = outcome(fit(quiet, name="whole", **OPTIONS[options])), set()
    around = {"launch", "launch is done"}  # who is launched, here or elsewhere, looks for signals
    totals = {moment: total for moment, total in quiet.counts.items() if moment not in around}
    calls = {(moment, count) for moment, total in totals.items() for count in (1, 2, total) if count <= total}
    others = [(moment, count) for moment, total in totals.items() for count in range(3, total)]
    calls.update(random.Random(options).sample(others, 100 if options == "plain" else 25))
    after = {"on_train_end", "on_fit_end", "teardown", "on_run_end"}  # then there is nothing left to save
    for number, (moment, count) in enumerate(sorted(calls)):
        left, plugin, run = ended({(moment, count): send()}, name=f"run{number}", **OPTIONS[options])
        assert left.code == 143, (moment, count)
        saved = plugin.path.exists()
        assert saved or moment in after or run.ended is not None, (moment, count)
        if saved and moment not in after:
            state = load(plugin.path)
            place = (*state["position"].values(), state["loop"]["validated"])
            if place not in known:  # whatever the moment, the state of a place is the same
                known.add(place)
                assert outcome(fit(ckpt_path=plugin.path, name=f"run{number}", **OPTIONS[options])) == whole, (moment, count)
        plugin.path.unlink(missing_ok=True)
    assert len(known) > 8


def test_a_validation_that_is_broken_off_ends_before_the_next_batch_and_logs_no_result() -> None:
    _, plugin, run = ended({("validation_step", 2): send()})
    assert plugin.counts["validation_step"] == 2 and plugin.counts["on_validation_epoch_end"] == 0
    assert not [name for name in run.metrics.results() if name.startswith("val")]


def test_a_signal_after_the_last_step_finds_the_training_concluded() -> None:
    for moment in ("on_train_end", "on_fit_end", "teardown"):
        left, plugin, run = ended({(moment, 1): send()}, name=moment)
        assert left.code == 143 and plugin.counts["on_train_end"] == plugin.counts["teardown"] == 1
        assert journal(run)[-1]["status"] == "interrupted" and run.ended is not None


def test_the_handler_only_sets_a_flag() -> None:
    seen: list[Any] = []

    def look(run: Run) -> None:
        send()(run)
        seen.append((run.interrupted, plugin.counts["on_stop_requested"], run.position.step))

    plugin = Moments({("training_step", 3): look, ("on_train_batch_end", 3): lambda run: seen.append(plugin.counts["on_stop_requested"])})
    with pytest.raises(SystemExit):
        fit(plugin)
    assert seen == [("SIGTERM", 0, 2), 0]


class Opcode:
    """Sends a signal before the n-th opcode of the functions that look whether one has come, each of them once."""

    looking = ("settle", "_after_batch", "reached", "stop", "fit")
    files = tuple(str(Path(torchplug.__file__).with_name(name)) for name in ("loop.py", "run.py", "schedule.py"))

    def __init__(self, number: int, plugin: Moments) -> None:
        self.number, self.plugin, self.count, self.at = number, plugin, 0, -1
        self.visited = set[Any]()

    def begin(self, frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_name not in self.looking or frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.next

    def next(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "opcode":
            place = frame.f_code, frame.f_lasti
            if place in self.visited:
                return self.next
            self.visited.add(place)
            self.count += 1
            if self.count == self.number:
                assert self.plugin.run is not None
                self.at = self.plugin.run.position.step
                send()(self.plugin.run)
        return self.next


@pytest.mark.slow
def test_a_signal_that_comes_while_the_loop_looks_for_one_is_not_missed() -> None:
    def traced(number: int) -> tuple[Opcode, Moments, Any]:
        plugin, left, earlier = Moments({}), None, sys.gettrace()
        opcode = Opcode(number, plugin)
        plugin.path.unlink(missing_ok=True)
        sys.settrace(opcode.begin)
        try:
            fit(plugin, max_epochs=1, limit_train_batches=5, log_every_n_steps=50)
        except SystemExit as error:
            left = error.code
        finally:
            sys.settrace(earlier)
        return opcode, plugin, left

    for number in range(1, traced(0)[0].count + 1):
        opcode, plugin, left = traced(number)
        assert left == 143 and plugin.run is not None, number
        assert plugin.run.position.step <= opcode.at + 1, number
        assert plugin.path.exists() or plugin.run.ended is not None, number
        assert plugin.counts["on_stop_requested"] <= 1, number


def test_a_signal_that_comes_while_something_put_off_is_done_is_not_missed() -> None:
    put_off = {("on_train_batch_end", 3): lambda run: run.at_boundary(lambda: send()(run))}
    _error, plugin, run = ended(put_off, max_epochs=1, log_every_n_steps=50)
    assert run.position.step == 3 and plugin.path.exists() and plugin.counts["on_stop_requested"] == 1


# ---------------------------------------------------------------------- what each signal does


@pytest.mark.parametrize("name", CODES)
def test_each_signal_has_its_exit_code_and_is_announced_by_name(name: str, heard: list[str]) -> None:
    left, _, run = ended({("training_step", 3): send(name)})
    assert left.code == CODES[name] and run.interrupted == name
    assert [each["reason"] for each in journal(run) if each["event"] == "on_stop_requested"] == [name]
    assert heard == [name]  # the handler that was there before is called too


def test_the_first_ctrl_c_ends_after_the_step_with_a_checkpoint() -> None:
    _, plugin, run = ended({("training_step", 3): send("SIGINT")}, KeyboardInterrupt)
    assert run.position.step == 3 and journal(run)[-1]["status"] == "interrupted"
    assert outcome(fit(ckpt_path=plugin.path)) == outcome(fit(name="uninterrupted"))


def test_the_second_ctrl_c_ends_at_once_without_a_checkpoint() -> None:
    def twice(run: Run) -> None:
        send("SIGINT")(run)
        assert run.interrupted
        send("SIGINT")(run)
        raise AssertionError("the second one should have been raised")

    _, plugin, run = ended({("training_step", 3): twice}, KeyboardInterrupt)
    assert run.position.step == 2 and not plugin.path.exists()
    assert plugin.counts["teardown"] == 1 and journal(run)[-1]["status"] == "interrupted"
    assert [each["exception"] for each in journal(run) if each["event"] == "on_fit_end"] == ["KeyboardInterrupt: "]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_ctrl_c_after_another_signal_is_the_first_one() -> None:
    def both(run: Run) -> None:
        send("SIGTERM")(run)
        send("SIGINT")(run)
        send("SIGTERM")(run)

    left, plugin, run = ended({("training_step", 3): both})
    assert left.code == 143 and run.position.step == 3 and plugin.path.exists()


def test_signals_that_are_not_named_do_what_they_did(heard: list[str]) -> None:
    plugin = Moments({("training_step", 3): send("SIGUSR1"), ("training_step", 4): send("SIGTERM")})
    trainer = fit(plugin, signals=[])
    assert heard == ["SIGUSR1", "SIGTERM"] and trainer.run is not None and trainer.run.position.step == 14 and not trainer.run.interrupted
    left, _, _ = ended({("training_step", 3): send("SIGUSR1"), ("training_step", 4): send("SIGTERM")}, signals=["SIGTERM"])
    assert left.code == 143


def test_signals_may_name_one_twice_and_ctrl_c(heard: list[str]) -> None:
    _, _, run = ended({("training_step", 3): send("SIGINT")}, KeyboardInterrupt, signals=["SIGTERM", "SIGINT", "SIGTERM"])
    assert run.position.step == 3
    left, _, _ = ended({("training_step", 3): send()}, signals=["SIGTERM", "SIGINT", "SIGTERM"])
    assert left.code == 143 and heard == ["SIGTERM"]


def test_signals_that_are_ignored_stay_ignored() -> None:
    for name in ("SIGHUP", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    plugin = Moments({("training_step", 3): send("SIGHUP"), ("training_step", 4): send("SIGINT")})
    trainer = fit(plugin)
    assert trainer.run is not None and not trainer.run.interrupted
    assert signal.getsignal(signal.SIGHUP) is signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_what_an_earlier_handler_raises_ends_the_program_when_the_run_is_in_order() -> None:
    def leave(number: int, frame: Any) -> None:
        sys.exit(7)

    signal.signal(signal.SIGTERM, leave)
    left, plugin, run = ended({("training_step", 3): send(), ("on_train_batch_end", 3): send()})
    assert left.code == 7 and run.position.step == 3 and plugin.path.exists()
    assert journal(run)[-1]["status"] == "interrupted"


# ---------------------------------------------------------------------- the process afterwards


def test_handlers_are_what_they_were_after_every_way_out() -> None:
    names = [*CODES, "SIGINT", "SIGCHLD"]

    def handlers() -> list[Any]:
        return [signal.getsignal(getattr(signal, name)) for name in names]

    def fail(run: Run) -> None:
        raise ZeroDivisionError

    before, within = handlers(), []
    fit(Moments({("training_step", 3): lambda run: within.append(handlers())}), name="whole")
    assert not set(before[:5]) & set(within[0][:5])
    ended({("training_step", 3): send()}, name="signal")
    ended({("training_step", 3): send("SIGINT")}, KeyboardInterrupt, name="ctrl-c")
    ended({("training_step", 3): fail}, ZeroDivisionError, name="error")
    ended({("setup", 1): fail}, ZeroDivisionError, name="early error")
    assert handlers() == before


def test_a_run_after_an_interrupted_one_in_the_same_process_is_a_run_like_any_other() -> None:
    ended({("training_step", 3): send()}, name="interrupted")
    again = fit(name="again")
    assert outcome(again) == outcome(fit(name="once more")) and again.run is not None and not again.run.interrupted


def test_who_takes_a_signal_during_the_run_keeps_it_and_what_it_passes_on_comes_to_the_earlier_handler(heard: list[str]) -> None:
    chain: list[Any] = []

    def take(run: Run) -> None:
        before = signal.getsignal(signal.SIGTERM)

        def theirs(number: int, frame: Any) -> None:
            chain.append(number)
            before(number, frame)  # type: ignore[operator, misc]

        signal.signal(signal.SIGTERM, theirs)
        chain.append(theirs)

    left, _, _ = ended({("training_step", 2): take, ("training_step", 3): send()})
    assert left.code == 143 and chain[1:] == [signal.SIGTERM] and heard == ["SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) is chain[0]
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == ["SIGTERM"] * 2


def test_a_signal_after_the_run_does_what_it_did_before_though_somebody_still_calls_the_handler_of_the_run() -> None:
    def take(run: Run) -> None:
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda number, frame: before(number, frame))  # type: ignore[operator, misc]

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        try:
            fit(Moments({("training_step", 2): take}))
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os._exit(0)  # it should be gone
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_in_another_thread_a_run_takes_no_signals_and_is_stopped_by_request() -> None:
    before, done = signal.getsignal(signal.SIGTERM), []
    plugin = Moments(
        {
            ("training_step", 3): lambda run: done.append(signal.getsignal(signal.SIGTERM)),
            ("training_step", 5): lambda run: run.request_stop("x"),
        }
    )
    thread = threading.Thread(target=lambda: done.append(fit(plugin)))
    thread.start()
    thread.join()
    assert done[0] is before and done[1].run.position.step == 5 and journal(done[1].run)[-1]["status"] == "stopped"


def test_a_child_process_of_the_user_does_what_it_did_at_a_signal() -> None:
    codes: list[int | None] = []

    def fork(run: Run) -> None:
        for name in ("SIGTERM", "SIGUSR1"):
            pid = os.fork()
            if not pid:
                os.kill(os.getpid(), getattr(signal, name))
                os._exit(0)  # it should be gone
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    for name in CODES:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    trainer = fit(Moments({("training_step", 3): fork}))
    assert codes == [-signal.SIGTERM, -signal.SIGUSR1]
    assert trainer.run is not None and not trainer.run.interrupted and trainer.run.position.step == 14


# ---------------------------------------------------------------------- a scheduler


@pytest.mark.parametrize(("code", "requeued"), [(138, True), (143, False), (1, False), (0, False)])
def test_the_job_script_of_the_page_goes_back_into_the_queue_for_the_signal_of_the_time_limit_alone(
    code: int, requeued: bool, tmp_path: Path
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "preemption.md").read_text()
    (tmp_path / "job").write_text(page.split("```bash\n")[1].split("```")[0])
    for name, line in (("srun", f"exit {code}"), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    done = subprocess.run(["bash", "job"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "requeue 42\n" if requeued else "")
