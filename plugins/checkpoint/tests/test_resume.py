"""A run that goes on: what it finds, what it leaves alone, and how a run that is interrupted or fails leaves its files."""

import contextlib
import logging
import os
import shutil
import signal
import threading

import pytest
import torch
from torch import nn

from torchplug import Module, Trainer, hookimpl
from torchplug.checkpoint import CheckpointError, header, load, verify
from torchplug_checkpoint import Checkpoint

BATCHES = [torch.ones(1, 1)] * 2
LAST = "last.safetensors"


class Scripted(Module):
    """Logs the value of the epoch as val_loss; each step takes 0.5 off the weight."""

    def __init__(self, values=(3.0, 1.0, 2.0, 0.0)):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.values = values

    def training_step(self, batch):
        return (self.weight * batch).sum()

    def validation_step(self, batch):
        pass

    def on_validation_epoch_end(self):
        self.log("val_loss", self.values[self.current_epoch])

    def test_step(self, batch):
        self.log("weight", self.weight[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Noisy(Scripted):
    """Logs so much that the numbers of its readings are high."""

    def on_validation_epoch_end(self):
        self.log_dict({f"other_{i}": 0.0 for i in range(50)})
        super().on_validation_epoch_end()


class Listener:
    def __init__(self):
        self.saved, self.removed = [], []

    @hookimpl
    def on_checkpoint_saved(self, path, metrics, reason):
        self.saved.append((path.name, metrics, reason))

    @hookimpl
    def on_checkpoint_removed(self, path):
        self.removed.append(path.name)


def fit(path, *plugins, module=None, epochs=2, ckpt_path=None, **options):
    trainer = Trainer(max_epochs=epochs, root_dir=path, plugins=list(plugins), num_sanity_val_steps=0, accelerator="cpu", **options)
    trainer.fit(module or Scripted(), BATCHES, [BATCHES], ckpt_path=ckpt_path)
    return trainer


def best(**options):
    return Checkpoint(monitor="val_loss", **options)


def files(folder):
    return {path.name for path in folder.iterdir()}


def weight(path):
    return load(path)["module"]["weight"].item()


def epoch(i):
    return f"epoch={i}-step={2 * i + 2}.safetensors"


# ---------------------------------------------------------------------- what is kept


def test_the_file_that_was_resumed_from_is_never_deleted_nor_written_over(tmp_path):
    folder = fit(tmp_path, best()).run.dir / "checkpoints"
    assert files(folder) == {epoch(1), LAST}
    trainer = fit(tmp_path, best(), epochs=4, ckpt_path=folder / epoch(1))
    assert trainer.run.resumed == folder / epoch(1)
    assert files(folder) == {epoch(1), epoch(3), LAST}
    assert (weight(folder / epoch(1)), trainer.enabled["checkpoint"].best_score) == (-2.0, 0.0)
    trainer = fit(tmp_path, best(filename="epoch=1-step=4"), module=Scripted([9.0] * 4 + [-1.0]), epochs=5, ckpt_path="last")
    assert files(folder) == {epoch(1), "epoch=1-step=4-v1.safetensors", LAST}  # nor by a later one, of another name by chance
    assert weight(folder / epoch(1)) == -2.0


def test_a_run_directory_that_was_moved_goes_on_with_its_books(tmp_path):
    folder = fit(tmp_path / "here", best()).run.dir
    shutil.move(tmp_path / "here", tmp_path / "there")
    folder = tmp_path / "there" / folder.relative_to(tmp_path / "here")
    trainer = fit(tmp_path / "there", best(), epochs=3, ckpt_path="last")
    assert trainer.run.dir == folder
    assert files(folder / "checkpoints") == {epoch(1), LAST}
    assert (trainer.run.best_path, trainer.enabled["checkpoint"].best_score) == (folder / "checkpoints" / epoch(1), 1.0)
    assert not (tmp_path / "here").exists()


def test_best_and_last_are_known_before_anything_new_is_saved(tmp_path):
    class Looks:
        @hookimpl
        def on_train_epoch_start(self, run):
            self.known = run.best_path, run.last_path

    folder = fit(tmp_path, best()).run.dir / "checkpoints"
    looks = Looks()
    fit(tmp_path, best(), looks, epochs=3, ckpt_path="last")
    assert looks.known == (folder / epoch(1), folder / LAST)


def test_with_another_dir_the_old_files_stay_and_are_no_longer_ranked(tmp_path, caplog):
    old = fit(tmp_path, best(dir=tmp_path / "old"), module=Scripted([0.0] * 4)).run
    trainer = fit(tmp_path, best(dir=tmp_path / "new"), epochs=3, ckpt_path=old.last_path)
    assert files(tmp_path / "old") == {epoch(0), LAST}
    assert files(tmp_path / "new") == {epoch(2), LAST}
    assert trainer.enabled["checkpoint"].best_score == 2.0
    assert f"not in {tmp_path / 'new'} any more, so no longer ranked: {epoch(0)}" in caplog.text


def test_a_lower_top_k_takes_the_worst_away_with_the_next_that_ranks(tmp_path):
    folder = fit(tmp_path, best(top_k=3), epochs=3).run.dir / "checkpoints"
    assert files(folder) == {epoch(0), epoch(1), epoch(2), LAST}
    fit(tmp_path, best(top_k=2), epochs=4, ckpt_path="last")
    assert files(folder) == {epoch(1), epoch(3), LAST}


def test_values_of_another_metric_are_not_compared(tmp_path):
    folder = fit(tmp_path, best()).run.dir / "checkpoints"
    trainer = fit(tmp_path, best(mode="max"), epochs=3, ckpt_path="last")
    assert files(folder) == {epoch(1), epoch(2), LAST}
    assert trainer.enabled["checkpoint"].best_score == 2.0


def test_files_of_a_future_that_was_given_up_stay_until_one_of_the_same_name_replaces_them(tmp_path):
    folder = fit(tmp_path, Checkpoint(top_k=-1), epochs=4).run.dir / "checkpoints"
    stands = {name: (folder / name).read_bytes() for name in (epoch(2), epoch(3))}
    fit(tmp_path, Checkpoint(top_k=-1), epochs=3, ckpt_path=folder / epoch(1))
    assert files(folder) == {*(epoch(i) for i in range(4)), LAST}
    assert (folder / epoch(2)).read_bytes() != stands[epoch(2)]
    assert (folder / epoch(3)).read_bytes() == stands[epoch(3)]


@pytest.mark.parametrize("other", [False, True], ids=["of that future", "of another run"])
def test_nor_are_they_deleted_where_one_of_their_name_had_lost_its_place(tmp_path, other):
    class Keeps:
        @hookimpl
        def on_checkpoint_saved(self, run):
            shutil.copy(run.last_path, tmp_path / f"{run.position.step}.safetensors")

    options = {"filename": "model", "background": False}
    folder = fit(tmp_path, Checkpoint(**options), Keeps(), epochs=3).run.dir / "checkpoints"
    assert files(folder) == {"model.safetensors", LAST}  # the name was free again for the third one
    if other:
        shutil.copy(fit(tmp_path / "other", Checkpoint(), epochs=1).run.last_path, folder / "model.safetensors")
    fit(tmp_path, Checkpoint(**options), epochs=2, ckpt_path=tmp_path / "4.safetensors")  # when the first one had just lost its place
    assert files(folder) == {"model.safetensors", "model-v1.safetensors", LAST}
    weights = [weight(folder / name) for name in ("model.safetensors", "model-v1.safetensors", LAST)]
    assert weights == [-1.0 if other else -3.0, -2.0, -2.0]


def test_in_a_folder_of_ones_own_only_files_of_the_same_run_are_replaced(tmp_path):
    there = tmp_path / "shared"
    other = fit(tmp_path / "other", Checkpoint(top_k=-1, dir=there), epochs=3)
    left = {path.name: path.read_bytes() for path in there.iterdir()}
    fit(tmp_path / "mine", Checkpoint(top_k=-1, dir=there), epochs=2)
    mine = {f"epoch={i}-step={2 * i + 2}-v1.safetensors" for i in (0, 1)}
    assert files(there) == {epoch(0), epoch(1), epoch(2), LAST, "last-v1.safetensors", *mine}
    assert all((there / name).read_bytes() == left[name] for name in (epoch(0), epoch(1), epoch(2)))
    assert (there / "last-v1.safetensors").read_bytes() == left[LAST]
    fit(tmp_path / "mine", Checkpoint(top_k=-1, dir=there), epochs=2, ckpt_path=there / "epoch=0-step=2-v1.safetensors")
    assert len(files(there)) == 7  # its own second epoch was replaced
    assert other.run.id != load(there / LAST)["run"]["id"]


def test_with_position_left_out_it_is_another_run_that_deletes_nothing(tmp_path):
    there = tmp_path / "there"
    first = fit(tmp_path, best(dir=there))
    trainer = Trainer(max_epochs=4, root_dir=tmp_path, plugins=[best(dir=there)], num_sanity_val_steps=0, accelerator="cpu")
    trainer.fit(Scripted(), BATCHES, [BATCHES], ckpt_path=first.run.last_path, resume={"include": ["model", "plugins"]})
    assert trainer.run.id != first.run.id
    assert {epoch(1), epoch(3), LAST, "last-v1.safetensors"} == files(there)
    assert load(there / epoch(1))["run"]["id"] == first.run.id


def test_a_value_that_was_ranked_is_not_ranked_again_by_the_run_that_goes_on(tmp_path):
    folder = fit(tmp_path, best(top_k=-1), check_val_every_n_epoch=2).run.dir / "checkpoints"
    fit(tmp_path, best(top_k=-1), epochs=3, ckpt_path="last", check_val_every_n_epoch=2)
    assert files(folder) == {epoch(1), LAST}


def test_without_the_metrics_the_next_value_is_ranked_all_the_same(tmp_path):
    folder = fit(tmp_path, best(), module=Noisy(), name="run").run.dir / "checkpoints"
    trainer = Trainer(max_epochs=4, root_dir=tmp_path, name="run", plugins=[best()], num_sanity_val_steps=0, accelerator="cpu")
    trainer.fit(Scripted(), BATCHES, [BATCHES], ckpt_path="last", resume={"exclude": ["metrics"]})
    assert files(folder) == {epoch(3), LAST}


def test_a_fit_that_goes_on_with_more_epochs_keeps_the_books(tmp_path):
    trainer = fit(tmp_path, best())
    folder, identity = trainer.run.dir, trainer.run.id
    trainer.max_epochs = 4
    trainer.fit(trainer.run.module, BATCHES, [BATCHES])
    assert (trainer.run.dir, trainer.run.id) == (folder, identity)
    assert files(folder / "checkpoints") == {epoch(3), LAST}
    assert weight(folder / "checkpoints" / LAST) == -4.0


def test_what_killed_writes_left_is_removed(tmp_path):
    folder = fit(tmp_path, best()).run.dir / "checkpoints"
    left = folder / f".{LAST}.{2**22 + 1}.tmp"  # no process has this number
    left.write_bytes(b"half")
    fit(tmp_path, best(), epochs=3, ckpt_path="last")
    assert not left.exists()


def test_a_save_that_was_begun_and_cannot_be_made_up_for_is_taken_out_of_the_books(tmp_path, caplog):
    class Remembers:
        """Another file is written while that of an earlier moment is still being written, which then fails."""

        written = threading.Event()

        @hookimpl
        def save_checkpoint(self, run, path, state):
            if path.name == LAST:
                assert self.written.wait(60)
                raise OSError("gone")

        @hookimpl
        def on_train_batch_end(self, run):
            if run.position.step == 3:
                run.save_checkpoint(run.dir / "mine.safetensors")

        @hookimpl
        def on_checkpoint_saved(self):
            self.written.set()

    with pytest.raises(OSError, match="gone"):
        fit(tmp_path, Checkpoint(every_n_steps=2), Remembers())
    (mine,) = tmp_path.rglob("mine.safetensors")
    assert [save["name"] for save in load(mine)["plugins"]["checkpoint"]["owed"]] == [epoch(0)]
    trainer = fit(tmp_path, Checkpoint(every_n_steps=2), ckpt_path=mine)
    assert f"{epoch(0)} was being written when the process ended, and is lost" in caplog.text
    assert files(trainer.run.dir / "checkpoints") == {epoch(1), LAST}


# ---------------------------------------------------------------------- what is found


def found(path, which="last", *plugins):
    """What the plugins know, before there is a run directory."""
    seen = []

    class Asks:
        @hookimpl(wrapper=True)
        def find_checkpoints(self, which):
            answer = yield
            seen.append(answer)
            return answer

    trainer = Trainer(root_dir=path, plugins=[*(plugins or [best()]), Asks()], accelerator="cpu")
    with contextlib.suppress(FileNotFoundError, CheckpointError):
        trainer.test(Scripted(), BATCHES, ckpt_path=which)
    return seen[0]


def test_there_is_nothing_where_nothing_was_saved(tmp_path):
    assert found(tmp_path) == found(tmp_path, "best") == []


def test_the_newest_come_first_the_last_before_its_second_name_and_nothing_else_is_taken_for_one(tmp_path):
    folders = [fit(tmp_path, best(top_k=2)).run.dir / "checkpoints" for _ in range(2)]
    for name in (f".{LAST}.123.tmp", "notes.txt", "exception-epoch=1-step=3.safetensors"):
        (folders[1] / name).write_bytes(b"")
    for i, (folder, name) in enumerate((folder, name) for folder in folders for name in (epoch(0), epoch(1))):
        os.utime(folder / name, (1000 + i, 1000 + i))
    assert (folders[0] / LAST).stat().st_mtime == 1001  # it is the same file
    assert found(tmp_path) == [
        folders[1] / LAST, folders[1] / epoch(1), folders[1] / epoch(0), folders[0] / LAST, folders[0] / epoch(1), folders[0] / epoch(0),
    ]  # fmt: skip


def test_every_instance_is_looked_through(tmp_path):
    plugins = [{"checkpoint:a": {}}, {"checkpoint:b": {"dir": tmp_path / "b", "top_k": 0}}]
    run = fit(tmp_path, *plugins).run
    assert set(found(tmp_path, "last", *plugins)) == {
        run.dir / "checkpoints" / "a" / epoch(1), run.dir / "checkpoints" / "a" / LAST, tmp_path / "b" / LAST,
    }  # fmt: skip


def test_the_best_is_that_of_the_newest_run_that_has_one(tmp_path):
    first = fit(tmp_path, best(top_k=2), epochs=4).run.dir / "checkpoints"
    fit(tmp_path, Checkpoint())
    assert found(tmp_path, "best") == [first / epoch(3), first / epoch(1)]
    second = fit(tmp_path, best(), epochs=3).run.dir / "checkpoints"
    assert found(tmp_path, "best") == [second / epoch(1), first / epoch(3), first / epoch(1)]
    assert Trainer(root_dir=tmp_path, plugins=[best()], accelerator="cpu").test(Scripted(), BATCHES, ckpt_path="best")[0]["weight"] == -2.0


def test_the_best_of_a_process_that_was_killed_before_the_file_had_its_name_is_the_last(tmp_path):
    folder = fit(tmp_path, best(), module=Scripted([3.0, 1.0])).run.dir / "checkpoints"
    (folder / epoch(1)).unlink()
    assert found(tmp_path, "best") == [folder / LAST]


def test_weights_alone_are_found_as_the_best(tmp_path):
    folder = fit(tmp_path, best(save_weights_only=True, last=False), epochs=3).run.dir / "checkpoints"
    state = load(folder / epoch(1))
    assert state["kind"] == "weights"
    assert "optimizers" not in state and "generators" not in state
    assert found(tmp_path, "best", best(save_weights_only=True, last=False)) == [folder / epoch(1)]
    assert Scripted.load_from_checkpoint(folder / epoch(1)).weight.item() == -2.0


# ---------------------------------------------------------------------- interrupted


class Signal:
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    @hookimpl
    def on_train_batch_start(self, run):
        if run.position.step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"monitor": "val_loss"}, {"every_n_epochs": 5}, {"every_n_steps": 2}, {"top_k": 0}, {"every_time": "1h"}]
)
def test_a_signal_leaves_the_step_as_last_outside_of_the_ranking_and_the_resumed_run_is_as_if_there_was_none(tmp_path, options, background):
    listener = Listener()
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path / "one", Checkpoint(**options, background=background), Signal(3), listener)
    assert caught.value.code == 143
    (last,) = tmp_path.rglob(LAST)
    assert verify(last) == []
    assert load(last)["position"]["step"] == 3
    assert listener.saved[-1] == (LAST, {}, "interrupted by SIGTERM")
    resumed = fit(tmp_path / "one", Checkpoint(**options, background=background), epochs=4, ckpt_path="last").run
    undisturbed = fit(tmp_path / "two", Checkpoint(**options, background=background), epochs=4).run
    folders = [run.dir / "checkpoints" for run in (resumed, undisturbed)]
    assert files(folders[0]) == files(folders[1])
    books = [load(folder / name)["plugins"] for folder in folders for name in sorted(files(folder))]
    for each in books:
        each["checkpoint"].pop("since")
    assert books[: len(books) // 2] == books[len(books) // 2 :]


def test_a_state_that_is_saved_already_is_not_saved_again_for_a_signal(tmp_path):
    listener = Listener()
    with pytest.raises(SystemExit):
        fit(tmp_path, Checkpoint(every_n_steps=3), Signal(3), listener)
    assert listener.saved == [("epoch=1-step=3.safetensors", {}, "newest and last")]


def test_nor_when_the_signal_comes_in_the_validation_that_follows(tmp_path):
    class InValidation:
        @hookimpl
        def on_validation_start(self):
            os.kill(os.getpid(), signal.SIGTERM)

    listener = Listener()
    with pytest.raises(SystemExit):
        fit(tmp_path, Checkpoint(every_n_steps=1), InValidation(), listener, val_check_interval=1)
    assert listener.saved == [("epoch=0-step=1.safetensors", {}, "newest and last")]


def test_without_last_a_signal_leaves_a_file_by_the_template(tmp_path):
    with pytest.raises(SystemExit):
        fit(tmp_path, best(last=False, filename="{step}-{val_loss}"), Signal(1))
    with pytest.raises(SystemExit):
        fit(tmp_path, best(last=False, filename="{step}-{val_loss}"), Signal(3), ckpt_path="last")
    (folder,) = tmp_path.rglob("checkpoints")
    assert files(folder) == {"epoch=0-step=1.safetensors", "2-3.0.safetensors", "3-3.0.safetensors"}
    trainer = fit(tmp_path, best(last=False, filename="{step}-{val_loss}"), ckpt_path="last")
    assert trainer.run.resumed == folder / "3-3.0.safetensors"
    assert files(folder) == {"epoch=0-step=1.safetensors", "3-3.0.safetensors", "4-1.0.safetensors"}


def test_ctrl_c_leaves_the_step_too(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, best(), Signal(1, signal.SIGINT))
    (last,) = tmp_path.rglob(LAST)
    assert load(last)["position"]["step"] == 1


# ---------------------------------------------------------------------- errors


class Boom(Scripted):
    def training_step(self, batch):
        if self.run.position.step == 3:
            raise ZeroDivisionError("in the fourth step")
        return super().training_step(batch)


def test_an_error_leaves_an_emergency_checkpoint_that_is_marked_and_replaces_nothing(tmp_path, caplog):
    listener, plugin = Listener(), best(save_on_exception=True, dir=tmp_path / "here")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="in the fourth step"):
            fit(tmp_path, plugin, listener, module=Boom())
    names = ["exception-epoch=1-step=3.safetensors", "exception-epoch=1-step=3-v1.safetensors"]
    assert {*names} <= files(tmp_path / "here")
    for name in names:
        state = load(tmp_path / "here" / name)
        assert (state["emergency"], state["position"]["step"]) == ("ZeroDivisionError: in the fourth step", 3)
        assert (name, {}, "emergency") in listener.saved
        assert str(tmp_path / "here" / name) in caplog.text
    assert load(tmp_path / "here" / LAST)["emergency"] == ""
    assert plugin.last_path == tmp_path / "here" / LAST
    assert load(plugin.last_path)["position"]["step"] == 2
    assert not {*names} & {path.name for path in found(tmp_path, "last", best(dir=tmp_path / "here"))}


def test_by_its_path_an_emergency_checkpoint_can_be_used(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, best(save_on_exception=True), module=Boom())
    (path,) = tmp_path.rglob("exception-*")
    assert fit(tmp_path, best(), ckpt_path=path).run.position.step == 4


def test_without_the_option_and_for_ctrl_c_and_before_training_nothing_is_written(tmp_path):
    class AtFitStart:
        @hookimpl
        def on_fit_start(self):
            raise ZeroDivisionError

    class Twice:
        @hookimpl
        def on_train_batch_end(self):
            raise KeyboardInterrupt

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, best(), module=Boom())
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, best(save_on_exception=True), AtFitStart())
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, best(save_on_exception=True), Twice())
    assert list(tmp_path.rglob("exception-*")) == []


def test_an_error_while_the_emergency_is_written_does_not_hide_that_of_the_run(tmp_path, caplog):
    class Full:
        @hookimpl
        def save_checkpoint(self, path):
            if path.name.startswith("exception"):
                raise CheckpointError("disk full")

    with pytest.raises(ZeroDivisionError, match="in the fourth step") as caught:
        fit(tmp_path, best(save_on_exception=True), Full(), module=Boom())
    assert not any("disk full" in note for note in getattr(caught.value, "__notes__", []))
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "plugin 'checkpoint': the emergency checkpoint could not be written: CheckpointError('disk full')" in messages


def test_a_run_that_fails_before_setup_is_closed_all_the_same(tmp_path):
    class AtSetup:
        before = ("*",)

        @hookimpl
        def setup(self):
            raise ZeroDivisionError("early")

    plugin = best()
    fit(tmp_path, plugin)
    with pytest.raises(ZeroDivisionError, match="early") as caught:
        fit(tmp_path, AtSetup(), plugin)
    assert not any("while this error was handled" in note for note in caught.value.__notes__)


def test_the_header_of_a_file_says_what_the_plugin_decided(tmp_path):
    plugin = best()
    fit(tmp_path, plugin)
    assert header(plugin.last_path)["plugins"]["checkpoint"]["best"] == epoch(1)
