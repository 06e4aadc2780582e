"""A file is written while training goes on: it holds the state of its moment, and nothing is lost on any way out."""

import errno
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import wait

import pytest
import torch
from torch import nn

from torchplug import Module, Trainer, hookimpl
from torchplug.checkpoint import CheckpointError, load, verify
from torchplug_checkpoint import Checkpoint
from torchplug_checkpoint.saver import Saver
from torchplug_checkpoint.writer import HostCopy, Writer

BATCHES = [torch.ones(2, 3)] * 4


class Net(Module):
    """Tied weights, a buffer, dropout, and an optimizer with a state."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm, self.drop = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.two.weight = self.one.weight

    def training_step(self, batch):
        return self.drop(self.norm(self.two(self.one(batch * torch.rand_like(batch))))).pow(2).mean()

    def validation_step(self, batch):
        self.log("val_loss", self.one(batch).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Held:
    """Writes begin, and then wait until they are let go; what happens is written down."""

    def __init__(self):
        self.begun, self.go, self.log = threading.Event(), threading.Event(), []

    @hookimpl(wrapper=True)
    def save_checkpoint(self, path, state):
        self.begun.set()
        assert self.go.wait(60), "nobody let it go"
        result = yield
        self.log.append(f"written {state['position']['step']}")
        return result

    @hookimpl
    def on_checkpoint_saved(self, path, reason):
        self.log.append(f"told of {path.stem}")


def fit(path, *plugins, module=None, **options):
    torch.manual_seed(0)
    trainer = Trainer(**{"max_epochs": 1, "root_dir": path, "plugins": list(plugins), "accelerator": "cpu", **options})
    trainer.fit(module or Net(), BATCHES, [BATCHES])
    return trainer


def writing():
    """The threads that write."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("torchplug checkpoint")]


def alike(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(alike(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(alike, left, right))
    return left == right


# ---------------------------------------------------------------------- training goes on


def test_training_goes_on_while_a_file_is_written(tmp_path):
    class Waits(Held):
        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.step == 3:
                assert self.begun.wait(60)
                assert self.log == []  # the file of step 2 is still being written
                self.go.set()

    held = Waits()
    trainer = fit(tmp_path, Checkpoint(every_n_steps=2, top_k=0), held)
    assert held.log == ["written 2", "told of last", "written 4", "told of last"]
    assert verify(trainer.run.last_path) == []


def test_a_file_holds_the_state_of_its_moment_although_training_went_on(tmp_path):
    class Late(Held):
        """Lets a write go when another step is done."""

        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.step % 2:
                assert run.position.step == 1 or self.begun.wait(60)
                self.go.set()
            else:
                self.begun.clear()
                self.go.clear()

        @hookimpl
        def on_train_end(self):
            self.go.set()

    options = {"every_n_steps": 2, "top_k": -1, "last": False}
    behind = fit(tmp_path / "behind", Checkpoint(**options), Late(), max_epochs=3).run.dir / "checkpoints"
    ahead = fit(tmp_path / "ahead", Checkpoint(**options, background=False), max_epochs=3).run.dir / "checkpoints"
    names = sorted(path.name for path in ahead.iterdir())
    assert len(names) == 6
    assert sorted(path.name for path in behind.iterdir()) == names
    states = [[load(folder / name) for name in names] for folder in (behind, ahead)]
    assert not alike(states[0][0]["module"], states[0][1]["module"])
    for state in (state for each in states for state in each):
        state["plugins"]["checkpoint"].pop("owed")
        state.update(time=0, run={}, versions={})
    assert alike(*states)


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    class Taken(Held):
        def state_dict(self):
            self.log.append("taken")
            return {}

        def load_state_dict(self, state):
            pass

    def settle(saver, run):
        if saver._job is not None:
            held.go.set()  # only now can the first one end
        original(saver, run)

    held, original = Taken(), Saver.settle
    monkeypatch.setattr(Saver, "settle", settle)
    fit(tmp_path, Checkpoint(every_n_steps=2, top_k=0), held)
    assert held.log[:4] == ["taken", "written 2", "told of last", "taken"]


def test_several_instances_write_in_the_order_in_which_states_were_taken(tmp_path, monkeypatch):
    most = [0]

    class Named(Held):
        @hookimpl(wrapper=True)
        def save_checkpoint(self, path, state):
            if path.parent.name == "slow":
                assert self.go.wait(60)
            result = yield
            self.log.append((path.parent.name, state["position"]["step"]))
            return result

        @hookimpl
        def on_train_batch_end(self, run):
            most[0] = max(most[0], len(writing()))

    def drain(writer):
        held.go.set()
        original(writer)

    held, original = Named(), Writer.drain
    monkeypatch.setattr(Writer, "drain", drain)
    slow, fast = {"every_n_steps": 2, "top_k": 0}, {"every_n_steps": 3, "top_k": 0, "background": False}
    trainer = fit(tmp_path, {"checkpoint:slow": slow}, {"checkpoint:fast": fast}, held)
    assert held.log[:2] == [("slow", 2), ("fast", 3)]  # the one in the foreground had to wait
    assert most == [1]
    assert writing() == []
    state = load(trainer.run.plugins["checkpoint:fast"].last_path)
    assert set(state["plugins"]) == {"checkpoint:slow", "checkpoint:fast"}


def test_two_instances_that_save_at_one_moment_both_know_of_both(tmp_path):
    trainer = fit(tmp_path, {"checkpoint:a": {"every_n_steps": 4, "top_k": 0}}, {"checkpoint:b": {"every_n_steps": 4, "top_k": 0}})
    for name in ("a", "b"):
        books = load(trainer.run.plugins[f"checkpoint:{name}"].last_path)["plugins"]
        assert [books[f"checkpoint:{each}"]["saves"] for each in ("a", "b")] == [1, 1]


# ---------------------------------------------------------------------- errors


class Fails:
    """The write of a step fails; the next event comes when that is over."""

    def __init__(self, plugin, step, error):
        self.plugin, self.step, self.error, self.noticed = plugin, step, error, None

    @hookimpl
    def save_checkpoint(self, state):
        if state["position"]["step"] == self.step:
            raise self.error

    @hookimpl
    def on_train_batch_end(self):
        if self.plugin._saver._job is not None:
            wait([self.plugin._saver._job[1]], timeout=60)

    @hookimpl
    def on_validation_end(self):
        self.on_train_batch_end()

    @hookimpl
    def on_exception(self, run, exception):
        self.noticed = run.position.step


def test_an_error_of_the_thread_is_raised_at_the_next_event_as_it_is_and_with_its_cause(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    error = CheckpointError("disk full while writing it")
    error.__cause__ = full
    plugin = Checkpoint(every_n_steps=2, dir=tmp_path / "here")
    fails = Fails(plugin, 4, error)
    with pytest.raises(CheckpointError, match="disk full while writing it") as caught:
        fit(tmp_path, plugin, fails, max_epochs=2)
    assert caught.value is error and caught.value.__cause__ is full
    assert fails.noticed == 4  # at the end of the validation, which follows the step
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["epoch=0-step=2.safetensors", "last.safetensors"]
    assert load(tmp_path / "here" / "last.safetensors")["position"]["step"] == 2
    assert plugin.last_path == tmp_path / "here" / "last.safetensors"
    assert [kept["name"] for kept in plugin.state_dict()["kept"]] == ["epoch=0-step=2.safetensors"]
    assert plugin.state_dict()["owed"] == []
    assert any("raised by plugin 'fails' in save_checkpoint" in note for note in error.__notes__)  # who is at fault, thread or not


def test_an_error_is_noticed_between_steps_too(tmp_path):
    plugin = Checkpoint(every_n_steps=2)
    fails = Fails(plugin, 2, CheckpointError("broken"))
    with pytest.raises(CheckpointError, match="broken"):
        fit(tmp_path, plugin, fails)
    assert fails.noticed == 3


def test_a_write_that_fails_while_the_run_fails_is_grouped_under_the_error_of_the_run(tmp_path):
    class Boom(Fails):
        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.step == 3:
                raise ZeroDivisionError("the run")

    plugin = Checkpoint(every_n_steps=2)
    with pytest.raises(ZeroDivisionError, match="the run") as caught:
        fit(tmp_path, plugin, Boom(plugin, 2, CheckpointError("the write")))
    assert any("the write" in note for note in caught.value.__notes__)


# ---------------------------------------------------------------------- every way out


@pytest.mark.parametrize("error", [None, ZeroDivisionError("x"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_what_was_begun_is_complete_and_told_when_the_run_is_over(tmp_path, error):
    class Ends(Held):
        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.step == 4 and error is not None:
                assert self.begun.wait(60)
                raise error

        @hookimpl
        def on_train_end(self):
            self.go.set()

        @hookimpl
        def on_exception(self):
            self.log.append("exception")
            self.go.set()

        @hookimpl
        def on_run_end(self):
            self.log.append("run end")

    held, plugin = Ends(), Checkpoint(every_n_steps=3, top_k=0, dir=tmp_path / "here")
    if error is None:
        fit(tmp_path, plugin, held)
        assert held.log == ["written 3", "told of last", "written 4", "told of last", "run end"]
    else:
        with pytest.raises(type(error)):
            fit(tmp_path, plugin, held)
        assert held.log == ["exception", "written 3", "told of last", "run end"]
    assert verify(tmp_path / "here" / "last.safetensors") == []
    assert writing() == []


@pytest.mark.slow
def test_an_interpreter_that_exits_waits_for_what_was_begun(tmp_path):
    script = f"""
    import threading, time
    from torchplug_checkpoint.writer import Writer

    over = threading.Event()

    def job():
        over.wait()
        time.sleep(0.3)  # until the main thread is through
        open({str(tmp_path / "written")!r}, "w").close()

    Writer().submit(job)
    over.set()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    assert (tmp_path / "written").exists()


def test_what_was_decided_and_never_came_to_a_boundary_is_forgotten(tmp_path):
    class Boom(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:  # after the validation in the middle of the window
                raise ZeroDivisionError

    plugin = Checkpoint(monitor="val_loss")
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, plugin, module=Boom(), accumulate_grad_batches=4, val_check_interval=2)
    assert (plugin.best_path, plugin.last_path) == (None, None)
    assert plugin.state_dict()["kept"] == plugin.state_dict()["owed"] == []


# ---------------------------------------------------------------------- the copy


def test_the_host_memory_of_one_save_is_that_of_the_next(tmp_path):
    class Looks:
        def __init__(self):
            self.seen = []

        @hookimpl
        def save_checkpoint(self, run, state):
            module, optimizer = state["module"], state["optimizers"][0]["state"]["state"]
            places = [each.data_ptr() for each in (module["one.weight"], module["norm.running_mean"], optimizer[0]["exp_avg"])]
            self.seen.append((places, threading.current_thread() in writing(), run.module.one.weight.data_ptr()))
            assert module["two.weight"] is module["one.weight"]  # tied, and copied once

    looks = Looks()
    fit(tmp_path, Checkpoint(every_n_steps=1, top_k=0), looks, max_epochs=2)
    assert len(looks.seen) == 8
    places, behind, live = zip(*looks.seen, strict=True)
    assert all(behind)
    assert places.count(places[0]) == 8
    assert live[0] not in places[0]


def test_a_copy_has_the_structure_and_the_values_of_the_state_and_shares_nothing_with_it():
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": base, "b": [base, base.t(), base[:, ::2]], 3: (1, "x", None, 2.5), "half": base.half(), "none": torch.empty(0, 2),
        "scalar": torch.tensor(3), "channels": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }  # fmt: skip
    copy = HostCopy().take(state)
    assert alike(copy, state)
    assert (type(copy[3]), copy["half"].dtype, copy["none"].shape) == (tuple, torch.float16, (0, 2))
    assert copy["b"][0] is copy["a"]
    base += 1
    state["b"].append(1)
    assert copy["a"][0, 0] == 0 and len(copy["b"]) == 3


def test_a_tensor_of_another_shape_or_type_gets_new_memory_and_what_is_gone_is_given_back():
    host = HostCopy()
    first = host.take({"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4)})
    second = host.take({"a": torch.ones(5), "b": torch.ones(4, dtype=torch.float64)})
    assert (second["a"].shape, second["b"].dtype) == ((5,), torch.float64)
    assert torch.equal(first["a"], torch.ones(4))
    assert len(host._buffers) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_copy_from_a_gpu_goes_to_pinned_memory_and_holds_what_was_there_when_it_was_taken():
    tensor = torch.zeros(1 << 24, device="cuda")
    host, places = HostCopy(), set()
    for value in range(3):
        tensor.fill_(value)
        copy = host.take({"a": tensor, "b": {"c": tensor}, "cpu": torch.ones(3)})
        tensor.fill_(-1)  # behind the copy, which may not have begun
        host.ready()
        assert copy["a"].is_pinned() and not copy["cpu"].is_pinned() and copy["b"]["c"] is copy["a"]
        assert torch.equal(copy["a"], torch.full((1 << 24,), float(value)))
        places.add(copy["a"].data_ptr())
    assert len(places) == 1
