"""Checkpoints at a URL are written, found, read and removed as local ones are, and nobody finds half of one."""

import re
import subprocess
import sys
import textwrap
import time
import uuid
from datetime import datetime, timezone

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from torchplug import Module, Trainer, hookimpl
from torchplug.checkpoint import CheckpointError, load
from torchplug_checkpoint import Checkpoint
from torchplug_checkpoint.remote import Remote, fetch

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


@pytest.fixture
def url():
    place = f"memory://{uuid.uuid4().hex}"
    yield place
    if memory().exists(place):
        memory().rm(place, recursive=True)


def memory():
    return fsspec.filesystem("memory")


def names(url):
    return {path.rpartition("/")[2] for path in memory().ls(url, detail=False)}


def fit(path, *plugins, epochs=2, ckpt_path=None):
    trainer = Trainer(max_epochs=epochs, root_dir=path, plugins=list(plugins), num_sanity_val_steps=0, accelerator="cpu")
    trainer.fit(Scripted(), BATCHES, [BATCHES], ckpt_path=ckpt_path)
    return trainer


def best(url, **options):
    return Checkpoint(dir=url, monitor="val_loss", **options)


def epoch(i):
    return f"epoch={i}-step={2 * i + 2}.safetensors"


# ---------------------------------------------------------------------- as local ones


def test_a_run_writes_resumes_and_tests_at_a_url(tmp_path, url):
    told = []

    class Listener:
        @hookimpl
        def on_checkpoint_saved(self, path):
            told.append(path)

        @hookimpl
        def on_checkpoint_removed(self, path):
            told.append(f"removed {path}")

        @hookimpl
        def on_checkpoint_loaded(self, path):
            told.append(f"loaded {path}")

    run = fit(tmp_path, best(url), Listener()).run
    assert names(url) == {epoch(1), LAST}
    assert (run.best_path, run.last_path) == (f"{url}/{epoch(1)}", f"{url}/{LAST}")
    assert told == [f"{url}/{epoch(0)}", f"{url}/{epoch(1)}", f"removed {url}/{epoch(0)}"]
    assert not (run.dir / "checkpoints").exists()
    goes_on = fit(tmp_path, best(url), Listener(), epochs=3, ckpt_path="last").run
    assert (goes_on.resumed, goes_on.id, goes_on.dir) == (f"{url}/{LAST}", run.id, run.dir)
    assert told[3:] == [f"loaded {url}/{LAST}", f"{url}/{epoch(1)}", f"removed {url}/{epoch(0)}", f"{url}/{LAST}"]
    assert names(url) == {epoch(1), LAST}
    trainer = Trainer(root_dir=tmp_path, plugins=[best(url)], accelerator="cpu")
    for ckpt_path in ("best", f"{url}/{epoch(1)}"):
        assert trainer.test(Scripted(), BATCHES, ckpt_path=ckpt_path)[0]["weight"] == -2.0
    assert trainer.test(Scripted(), BATCHES, ckpt_path="last")[0]["weight"] == -3.0


def test_what_is_read_does_not_need_the_file_that_it_was_fetched_to(tmp_path, url):
    fit(tmp_path, best(url))
    state = fetch(f"{url}/{LAST}")
    assert state["module"]["weight"].item() == -2.0
    state["module"]["weight"] += 1


def test_files_of_others_are_neither_overwritten_nor_deleted(tmp_path, url):
    memory().pipe_file(f"{url}/{epoch(0)}", b"mine")
    memory().pipe_file(f"{url}/{LAST}", b"theirs")
    fit(tmp_path, best(url, top_k=-1))
    assert names(url) == {epoch(0), "epoch=0-step=2-v1.safetensors", epoch(1), LAST, "last-v1.safetensors"}
    assert memory().cat_file(f"{url}/{epoch(0)}") == b"mine"
    assert memory().cat_file(f"{url}/last-v1.safetensors") == b"theirs"


def test_the_file_that_was_resumed_from_is_never_deleted(tmp_path, url):
    fit(tmp_path, best(url))
    fit(tmp_path, best(url), epochs=4, ckpt_path=f"{url}/{epoch(1)}")
    assert names(url) == {epoch(1), epoch(3), LAST}


def test_the_last_comes_before_its_second_name_and_before_older_ones(tmp_path, url):
    class Asks:
        @hookimpl(wrapper=True)
        def find_checkpoints(self, which):
            Asks.answer = yield
            return Asks.answer

    fit(tmp_path, best(url, top_k=2))
    Trainer(root_dir=tmp_path, plugins=[best(url), Asks()], accelerator="cpu").test(Scripted(), BATCHES, ckpt_path="last")
    assert Asks.answer == [f"{url}/{name}" for name in (LAST, epoch(1), epoch(0))]
    memory().cp_file(f"{url}/{epoch(0)}", f"{url}/{epoch(0)}")  # now that is the newest
    Trainer(root_dir=tmp_path, plugins=[best(url), Asks()], accelerator="cpu").test(Scripted(), BATCHES, ckpt_path="last")
    assert Asks.answer == [f"{url}/{name}" for name in (epoch(0), epoch(1), LAST)]


def test_two_instances_with_one_url_are_refused(tmp_path, url):
    with pytest.raises(ValueError, match="would both write into 'memory://"):
        fit(tmp_path, {"checkpoint:a": {"dir": url}}, {"checkpoint:b": {"dir": url + "/"}})


def test_a_trial_run_writes_nothing_there(tmp_path, url):
    Trainer(fast_dev_run=True, root_dir=tmp_path, plugins=[best(url)], accelerator="cpu").fit(Scripted(), BATCHES, [BATCHES])
    assert not memory().exists(url)


# ---------------------------------------------------------------------- old or new, and whole


def test_whoever_looks_finds_the_old_file_or_the_new_one(tmp_path, url, monkeypatch):
    def looks(filesystem, name):
        original = getattr(MemoryFileSystem, name)

        def call(self, *args, **options):
            result = original(self, *args, **options)
            seen.extend(fetch(f"{url}/{each}")["position"]["step"] for each in sorted(names(url)) if each.endswith(".safetensors"))
            return result

        monkeypatch.setattr(filesystem, name, call)

    seen = []
    memory().mkdir(url)
    for name in ("put_file", "cp_file", "rm_file"):
        looks(MemoryFileSystem, name)
    fit(tmp_path, best(url))
    assert set(seen) == {2, 4}  # none of them was half


def test_an_upload_that_fails_is_an_error_that_names_the_file_and_leaves_the_old_one(tmp_path, url, monkeypatch):
    def breaks(self, lpath, rpath, **options):
        if load(lpath)["position"]["step"] == 4:
            memory().pipe_file(rpath, b"half")
            raise ConnectionResetError("the line is dead")
        original(self, lpath, rpath, **options)

    original = MemoryFileSystem.put_file
    monkeypatch.setattr(MemoryFileSystem, "put_file", breaks)
    plugin = best(url)
    with pytest.raises(
        CheckpointError, match=r"last.safetensors could not be written \(ConnectionResetError: the line is dead\)"
    ) as caught:
        fit(tmp_path, plugin)
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert names(url) == {epoch(0), LAST}
    assert fetch(f"{url}/{LAST}")["position"]["step"] == 2
    assert plugin.best_path == f"{url}/{epoch(0)}"
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_leftovers_go_those_of_this_run_at_once_and_those_of_others_after_a_day(tmp_path, url):
    run = fit(tmp_path, best(url)).run
    for name in (f".{LAST}.{run.id}.tmp", f".{LAST}.other.tmp", f".{LAST}.older.tmp"):
        memory().pipe_file(f"{url}/{name}", b"half")
    old = memory().store[memory()._strip_protocol(f"{url}/.{LAST}.older.tmp")]
    old.modified = datetime.fromtimestamp(time.time() - 90_000, tz=timezone.utc)
    (run.dir / ".upload-abc").mkdir()
    (run.dir / ".upload-abc" / LAST).write_bytes(b"half")
    fit(tmp_path, best(url), epochs=3, ckpt_path="last")
    assert {name for name in names(url) if name.endswith(".tmp")} == {f".{LAST}.other.tmp"}
    assert list(run.dir.glob(".upload-*")) == []


# ---------------------------------------------------------------------- other kinds of file system


def test_a_file_system_without_copies_gets_the_file_again(tmp_path, url, monkeypatch):
    def move(self, path1, path2, **options):
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        self.store[path2] = self.store.pop(path1)

    def no_copies(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(MemoryFileSystem, "cp_file", no_copies)
    monkeypatch.setattr(MemoryFileSystem, "mv", move)
    fit(tmp_path, best(url))
    assert names(url) == {epoch(1), LAST}
    assert memory().cat_file(f"{url}/{epoch(1)}") == memory().cat_file(f"{url}/{LAST}")


def test_a_file_system_that_renames_is_asked_to(tmp_path):
    there = tmp_path / "a [b]*c"  # and no name is taken for a pattern
    trainer = fit(tmp_path, Checkpoint(dir=f"file://{there}", filename="[{step}]"))
    assert {path.name for path in there.iterdir()} == {"[4].safetensors", LAST}
    assert trainer.run.last_path.startswith("file://")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere://bucket/x", "nowhere://bucket/x cannot be reached .*Protocol not known"),
        ("s3://bucket/x", "s3://bucket/x cannot be reached .*s3fs"),
    ],
)
def test_a_place_that_cannot_be_reached_is_an_error_before_training(tmp_path, monkeypatch, place, words):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # it is not installed
    with pytest.raises(CheckpointError, match=words):
        fit(tmp_path, Checkpoint(dir=place))


def test_a_place_that_cannot_be_written_is_an_error_before_training(tmp_path, url, monkeypatch):
    def refuse(self, path, value, **options):
        raise PermissionError("read only")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(
        CheckpointError, match=r"checkpoints cannot be written into 'memory://.*' \(PermissionError: read only\); choose another dir"
    ):
        fit(tmp_path, Checkpoint(dir=url))


def test_a_missing_file_is_an_error_that_names_it(tmp_path, url):
    with pytest.raises(CheckpointError, match=f"{url}/none.safetensors cannot be read .FileNotFoundError"):
        fit(tmp_path, best(url), ckpt_path=f"{url}/none.safetensors")


def test_a_damaged_file_is_passed_over(tmp_path, url, caplog):
    fit(tmp_path, best(url, top_k=2))
    content = bytearray(memory().cat_file(f"{url}/{LAST}"))
    content[-1] ^= 1
    memory().pipe_file(f"{url}/{LAST}", bytes(content))
    run = fit(tmp_path, best(url, top_k=2), epochs=3, ckpt_path="last").run
    assert run.resumed == f"{url}/{epoch(1)}"
    assert re.search(rf"passed over: {url}/last\.safetensors: entry .* is damaged", caplog.text)


def test_headers_are_read_without_the_tensors(tmp_path, url, monkeypatch):
    class Wide(Scripted):
        def __init__(self):
            super().__init__()
            self.more = nn.Parameter(torch.zeros(1_000_000))

    Trainer(max_epochs=1, root_dir=tmp_path, plugins=[best(url)], accelerator="cpu").fit(Wide(), BATCHES, [BATCHES])
    read, original = [], MemoryFileSystem.cat_file

    def cat_file(self, path, start=None, end=None, **options):
        read.append(end - start)
        return original(self, path, start, end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    assert Remote(url).header(LAST)["position"]["step"] == 2
    assert sum(read) < 100_000 < memory().info(f"{url}/{LAST}")["size"]
    assert Remote(url).header("none.safetensors") is None


@pytest.mark.slow
def test_fsspec_is_loaded_by_those_alone_who_need_it(tmp_path):
    script = f"""
    import sys
    from torchplug_checkpoint import Checkpoint
    Checkpoint(dir={str(tmp_path)!r})
    assert "torchplug_checkpoint.store" in sys.modules and "torchplug_checkpoint.remote" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
