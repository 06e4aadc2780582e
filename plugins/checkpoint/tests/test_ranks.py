"""Several ranks: the first one alone touches the folder, all of them take part in every state, and know what came of it."""

import os
import signal
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Trainer, hookimpl
from torchplug.checkpoint import load, verify
from torchplug.distributed import RankFailed
from torchplug_checkpoint import Checkpoint
from torchplug_checkpoint.saver import Saver
from torchplug_checkpoint.store import Local

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

TOUCHING = ("prepare", "names", "header", "copy", "rename", "remove", "ages")


def here() -> str:
    return os.environ.get("RANK", "caller")


class Net(Module):
    """Four values a rank, of which each has another mean: what is monitored is that of both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch):
        self.log("score", batch[0].mean() * (-1) ** self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Listener:
    """Writes down on each rank what is announced."""

    def __init__(self, folder):
        self.folder = folder

    def say(self, text):
        with open(self.folder / f"rank-{here()}", "a") as file:
            file.write(f"{text}\n")

    @hookimpl
    def on_checkpoint_saved(self, run, path, reason):
        self.say(f"saved {path.name} {reason} at step {run.position.step}")

    @hookimpl
    def on_checkpoint_removed(self, path):
        self.say(f"removed {path.name}")

    @hookimpl
    def on_exception(self, run, exception):
        self.say(f"failed {type(exception).__name__}: {exception}")


def said(folder):
    return [(folder / f"rank-{rank}").read_text().splitlines() for rank in (0, 1)]


def fit(folder, checkpoint, *plugins, epochs=3, module=None, ckpt_path=None, **options):
    """Two ranks, five steps of four samples in an epoch."""
    trainer = Trainer(
        max_epochs=epochs, root_dir=folder / "runs", plugins=[checkpoint, *plugins], accelerator="cpu", log_every_n_steps=2, seed=1,
        strategy={"ddp": {"start_method": "fork", "timeout": "30s"}}, devices=2, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    data = TensorDataset(torch.arange(1.0, 21.0).unsqueeze(1) / 20)
    trainer.fit(module or Net(), DataLoader(data, 2, shuffle=True), DataLoader(data, 5), ckpt_path=ckpt_path)
    return trainer


def alone(monkeypatch, folder):
    """On any rank but the first, whatever touches the folder is an error, and leaves a mark."""
    for name in TOUCHING:
        original = getattr(Local, name)

        def touch(store, *arguments, original=original, name=name):
            if here() == "1":
                (folder / "touched").write_text(name)
                raise AssertionError(f"rank 1 calls {name}")
            return original(store, *arguments)

        monkeypatch.setattr(Local, name, touch)


@pytest.mark.slow
def test_rank_0_alone_touches_the_folder_and_everybody_knows_what_is_in_it(tmp_path, monkeypatch):
    """A foreign `last`, a name that is taken, a write that is slow: what rank 0 finds must not make ranks part."""
    alone(monkeypatch, tmp_path)
    folder = tmp_path / "kept"
    Trainer(
        max_steps=1, plugins=[Checkpoint(dir=folder, filename="{step}", every_n_steps=1)], accelerator="cpu", root_dir=tmp_path / "other"
    ).fit(Net(), [[torch.ones(2, 1)]])
    original = Saver._put

    def slow(*arguments):  # in the thread of rank 0 alone
        time.sleep(0.02)
        original(*arguments)

    monkeypatch.setattr(Saver, "_put", slow)
    checkpoint = Checkpoint(dir=folder, monitor="score", mode="max", top_k=2, every_n_steps=2, filename="{epoch}")
    trainer = fit(tmp_path, checkpoint, Listener(tmp_path), epochs=4)
    first, second = said(tmp_path)
    assert first == second and len(first) > 8
    assert {path.name for path in folder.iterdir()} == {
        "1.safetensors",
        "last-v1.safetensors",
        "last.safetensors",
        "0.safetensors",
        "2.safetensors",
    }
    for path in folder.iterdir():
        assert verify(path) == []
    assert (checkpoint.best_path, checkpoint.last_path) == (folder / "0.safetensors", folder / "last.safetensors")  # in this process too
    assert checkpoint.best_score == pytest.approx(0.525)
    assert (trainer.run.best_path, trainer.run.last_path) == (checkpoint.best_path, checkpoint.last_path)
    state = load(folder / "last.safetensors")
    assert state["position"]["samples"] == 80 and len(state["ranks"]) == 1


class Unlike:
    """Ranks that are not equally fast, and whose clocks are far from each other before training begins."""

    @hookimpl
    def setup(self, run):
        run.agreement.seconds += 10 * run.rank

    @hookimpl
    def on_fit_start(self, run):
        time.sleep(0.3 * run.rank)

    @hookimpl
    def on_train_batch_end(self, run):
        time.sleep(0.03 * (1 + run.rank))


@pytest.mark.slow
def test_a_time_that_has_passed_is_the_same_on_all_ranks(tmp_path):
    fit(tmp_path, Checkpoint(every_time="0.2s", top_k=-1), Unlike(), Listener(tmp_path), epochs=2)
    first, second = said(tmp_path)
    assert first == second and len(first) > 2


@pytest.mark.slow
def test_a_run_that_was_killed_between_two_names_goes_on_on_both_ranks(tmp_path, monkeypatch):
    """What is owed is made up for by rank 0, and a state that has to be taken for it is taken by both."""
    alone(monkeypatch, tmp_path)
    checkpoint = {"checkpoint": {"every_n_steps": 2, "top_k": -1, "filename": "{step}", "background": False}}
    original = Saver._put

    def die(saver, run, save, state, gone, copy=None):
        if save.name == "6.safetensors":
            run.hooks.save_checkpoint(run, saver.store.path("last.safetensors"), state)
            os._exit(3)
        original(saver, run, save, state, gone, copy)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "_put", die)
        with pytest.raises(RankFailed):
            fit(tmp_path, checkpoint)
    whole = fit(tmp_path / "whole", checkpoint)
    (tmp_path / "runs/Net/version_0/checkpoints/last.safetensors").rename(tmp_path / "lost.safetensors")
    with monkeypatch.context() as patch:  # and the file that holds the state is not where it was
        patch.setattr(Local, "header", lambda store, name: None)
        rest = fit(tmp_path, checkpoint, Listener(tmp_path), ckpt_path=tmp_path / "lost.safetensors")
    for one, other in zip(whole.run.module.parameters(), rest.run.module.parameters(), strict=True):
        assert torch.equal(one, other)
    first, second = said(tmp_path)
    assert first == second and first[0] == "saved 6.safetensors newest and last at step 6"
    names = [{path.name for path in (each.run.dir / "checkpoints").iterdir()} for each in (whole, rest)]
    assert names[0] == names[1]


class Fails(Net):
    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def training_step(self, batch):
        if here() == self.rank and self.global_step == 3:
            raise ValueError("this rank is broken")
        return super().training_step(batch)


@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_an_emergency_checkpoint_needs_no_other_rank_and_hides_no_error(tmp_path, monkeypatch, capfd, rank):
    alone(monkeypatch, tmp_path)
    begin = time.monotonic()
    with pytest.raises(RankFailed):
        fit(tmp_path, Checkpoint(save_on_exception=True, every_n_steps=2), Listener(tmp_path), module=Fails(rank))
    assert time.monotonic() - begin < 30
    (file,) = (tmp_path / "runs").rglob("exception-*.safetensors")
    assert not (tmp_path / "touched").exists()
    assert file.name == "exception-epoch=0-step=3.safetensors" and verify(file) == []
    assert "failed ValueError: this rank is broken" in said(tmp_path)[int(rank)]
    assert "ValueError: this rank is broken" in capfd.readouterr().err
    assert verify(file.with_name("last.safetensors")) == [] and load(file.with_name("last.safetensors"))["position"]["step"] == 2
    rest = fit(tmp_path, Checkpoint(save_on_exception=True, every_n_steps=2), module=Fails("2"), ckpt_path=file)
    assert rest.run.position.step == 15


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_a_write_that_fails_on_rank_0_is_the_error_of_all(tmp_path, monkeypatch, background):
    original = Saver._put

    def full(saver, run, save, *rest):
        if run.position.step > 2:
            raise OSError(28, "No space left on device")
        original(saver, run, save, *rest)

    monkeypatch.setattr(Saver, "_put", full)
    options = {"every_n_steps": 2, "background": background}
    with pytest.raises(RankFailed):
        fit(tmp_path, {"checkpoint": options}, Listener(tmp_path))
    first, second = said(tmp_path)
    assert first[-1] == "failed OSError: [Errno 28] No space left on device"
    assert second[-1] == "failed RuntimeError: OSError on rank 0: [Errno 28] No space left on device"


class Stops:
    """A signal that comes to rank 1, in a step at which ranks do not talk."""

    @hookimpl
    def on_train_batch_end(self, run):
        if run.rank == 1 and run.position.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_to_one_rank_is_followed_by_one_checkpoint_of_all(tmp_path):
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, Checkpoint(every_n_epochs=5), Stops(), Listener(tmp_path))
    assert ended.value.code == 143
    first, second = said(tmp_path)
    assert first == second == ["saved last.safetensors interrupted by SIGTERM at step 4"]
    rest = fit(tmp_path, Checkpoint(every_n_epochs=5), ckpt_path="last")
    whole = fit(tmp_path / "whole", Checkpoint(every_n_epochs=5))
    for one, other in zip(whole.run.module.parameters(), rest.run.module.parameters(), strict=True):
        assert torch.equal(one, other)
