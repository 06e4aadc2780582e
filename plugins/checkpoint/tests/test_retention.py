"""What is in the folder at the end is what an undisturbed run leaves, wherever its process was killed on the way."""

import math
import shutil
import uuid

import fsspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import torchplug.checkpoint
from torchplug import Module, Trainer, hookimpl
from torchplug.checkpoint import CheckpointError, load
from torchplug_checkpoint import Checkpoint
from torchplug_checkpoint.remote import Remote, fetch
from torchplug_checkpoint.store import Local

NAN, INF = math.nan, math.inf
BATCHES = [torch.ones(1, 1)] * 2
LAST = "last.safetensors"


class Scripted(Module):
    """Logs the value of the step as val_loss; each step takes 0.5 off the weight. A process may be killed in each."""

    def __init__(self, values, disk):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.values, self.disk = values, disk

    def training_step(self, batch):
        self.disk.count()
        return (self.weight * batch).sum()

    def validation_step(self, batch):
        pass

    def on_validation_epoch_end(self):
        self.log("val_loss", self.values[self.run.position.step - 1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Lines:
    """A journal: what it heard goes back to what it was in the checkpoint that a run goes on from."""

    def __init__(self):
        self.lines = []

    @hookimpl
    def setup(self):
        self.lines = []

    @hookimpl
    def on_checkpoint_saved(self, path, metrics, reason):
        self.lines.append(f"saved {str(path).rpartition('/')[2]} {metrics} {reason}")

    @hookimpl
    def on_checkpoint_removed(self, path, reason):
        self.lines.append(f"removed {str(path).rpartition('/')[2]} {reason}")

    @hookimpl
    def on_train_epoch_end(self, run):
        self.lines.append(f"epoch {run.position.epoch}")

    def state_dict(self):
        return {"lines": list(self.lines)}

    def load_state_dict(self, state):
        self.lines = list(state["lines"])


class Sources:
    """From which files runs went on."""

    def __init__(self):
        self.names = set()

    @hookimpl
    def on_checkpoint_loaded(self, path):
        self.names.add(str(path).rpartition("/")[2])


class Killed(BaseException):
    """The process is gone."""


class Disk:
    """Everything that is done to files, in order; after so many actions nothing is done any more, as in a process that was killed.

    A write is two actions, so that it can be killed before it begins and in the middle of it, when something half is left.
    """

    def __init__(self, monkeypatch):
        self.left = None
        for owner, name in (
            (torchplug.checkpoint, "write"), (Remote, "write"), (Local, "copy"), (Local, "remove"), (Remote, "copy"), (Remote, "remove"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name), name == "write"))

    def watched(self, function, writes):
        def action(*args):
            if writes:
                self.count()
                self.half(*args)
            self.count()
            return function(*args)

        return action

    def count(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    def half(self, first, *rest):
        if self.left == 0 and isinstance(first, Remote):
            first._fs.pipe_file(f"{first._folder}/.{rest[1]}.{rest[0].id}.tmp", b"half")
        elif self.left == 0:
            first.with_name(f".{first.name}.{999_999_999}.tmp").write_bytes(b"half")


class Place:
    """A folder, local or in memory, that is looked at in the same way."""

    def __init__(self, root, remote):
        self.root, self.remote = root, remote
        self.url = f"memory://{uuid.uuid4().hex}" if remote else root / "there"
        self.filesystem = fsspec.filesystem("memory") if remote else None

    def names(self):
        if self.remote:
            return {path.rpartition("/")[2] for path in self.filesystem.ls(self.url, detail=False)}
        return {path.name for path in self.url.iterdir()}

    def put(self, name, content):
        if self.remote:
            self.filesystem.pipe_file(f"{self.url}/{name}", content)
        else:
            self.url.mkdir(parents=True, exist_ok=True)
            (self.url / name).write_bytes(content)

    def read(self, name):
        return self.filesystem.cat_file(f"{self.url}/{name}") if self.remote else (self.url / name).read_bytes()

    def state(self, name):
        return fetch(f"{self.url}/{name}") if self.remote else load(self.url / name)

    def clear(self):
        shutil.rmtree(self.root)
        if self.remote and self.filesystem.exists(self.url):
            self.filesystem.rm(self.url, recursive=True)


@pytest.fixture(scope="module")
def disk():
    monkeypatch = pytest.MonkeyPatch()
    yield Disk(monkeypatch)
    monkeypatch.undo()


def run_once(disk, root, values, plugins, ckpt_path=None, **options):
    torch.manual_seed(0)
    lines = Lines()
    trainer = Trainer(
        max_epochs=len(values) // 2, root_dir=root, plugins=[*plugins, lines], num_sanity_val_steps=0, accelerator="cpu", **options
    )
    trainer.fit(Scripted(values, disk), BATCHES, [BATCHES], ckpt_path=ckpt_path)
    return trainer, lines.lines


def run_with_kills(disk, root, values, plugins, kills, **options):
    """Trains to the end, in a new process after each kill; what was resumed from on the way is returned too."""
    sources, ckpt_path = set(), None
    for left in (*kills, None):
        disk.left, heard = left, Sources()
        try:
            trainer, lines = run_once(disk, root, values, [*plugins(), heard], ckpt_path, **options)
            return trainer, lines, sources | heard.names
        except Killed:
            ckpt_path = "last"
        except CheckpointError:  # it was killed before anything was written
            disk.left = None
            trainer, lines = run_once(disk, root, values, plugins(), **options)
            return trainer, lines, sources
        finally:
            sources |= heard.names
            disk.left = None


def expected_best(values, top_k, mode):
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    ranked = sorted(finite, key=lambda i: values[i] if mode == "min" else -values[i])  # stable: of equals the earlier one
    return ranked if top_k < 0 else ranked[:top_k]


VALUES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, NAN, INF, -INF]), min_size=1, max_size=6)
KILLS = st.lists(st.integers(0, 25), max_size=3)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    values=VALUES,  # of the epochs
    top_k=st.integers(-1, 3),
    mode=st.sampled_from(["min", "max"]),
    background=st.booleans(),
    remote=st.booleans(),
    kills=KILLS,
)
@example(values=[3.0, 2.0, 1.0], top_k=1, mode="min", background=True, remote=False, kills=[5])
@example(values=[3.0, 2.0, 1.0], top_k=1, mode="min", background=True, remote=True, kills=[5])
@example(values=[1.0, 1.0, 1.0], top_k=2, mode="max", background=True, remote=False, kills=[9])
def test_exactly_the_k_best_of_the_whole_run_and_the_last_remain(disk, tmp_path_factory, values, top_k, mode, background, remote, kills):
    place = Place(tmp_path_factory.mktemp("run"), remote)
    foreign = {"epoch=0-step=2.safetensors": b"mine", "epoch=9-step=9.safetensors": b"old", LAST: b"theirs", "notes.txt": b"text"}
    for name, content in foreign.items():
        place.put(name, content)

    def plugins():
        return [Checkpoint(dir=place.url, monitor="val_loss", top_k=top_k, mode=mode, background=background)]

    trainer, _, sources = run_with_kills(disk, place.root, [each for value in values for each in (value, value)], plugins, kills)
    best = expected_best(values, top_k, mode)
    files = {f"epoch={i}-step={2 * i + 2}{'-v1' if i == 0 else ''}.safetensors": i for i in best}
    names = place.names()
    if remote and not sources:  # over there nobody can tell what a dead process left from what another one writes now
        names = {name for name in names if not name.endswith(".tmp")}
    assert names == {*foreign, *files, LAST, "last-v1.safetensors"}
    for name, i in files.items():
        assert place.state(name)["module"]["weight"].item() == -0.5 * (2 * i + 2)
    assert place.state(LAST)["module"]["weight"].item() == -0.5 * 2 * len(values)
    moved = {"last-v1.safetensors" if name == LAST else name: content for name, content in foreign.items()}
    assert {name: place.read(name) for name in moved} == moved
    assert sources <= {LAST}  # and not the second name of it, which would have to be kept
    plugin = trainer.enabled["checkpoint"]
    assert plugin.best_score == (values[best[0]] if best else None)
    assert list(trainer.run.dir.rglob("*.tmp")) == list(trainer.run.dir.rglob(".upload-*")) == []
    place.clear()


def contents(place):
    """Every file with what it holds, but for the time and the run."""
    states = {name: place.state(name) for name in place.names() if name.endswith(".safetensors")}
    for state in states.values():
        state.update(time=0, run={})
        for name in ("one", "two"):
            state["plugins"][f"checkpoint:{name}"].pop("protected")
    return states


def differences(left, right, path="state"):
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [path]
    if isinstance(left, dict):
        own = [f"{path}.{key}" for key in left.keys() ^ right.keys()]
        return own + [line for key in left.keys() & right.keys() for line in differences(left[key], right[key], f"{path}.{key}")]
    if isinstance(left, (list, tuple)) and len(left) == len(right):
        return [line for i, (one, two) in enumerate(zip(left, right, strict=True)) for line in differences(one, two, f"{path}[{i}]")]
    return [] if left == right or (left != left and right != right) else [f"{path}: {left!r} and {right!r}"]


INSTANCE = st.fixed_dictionaries(
    {
        "monitor": st.sampled_from(["val_loss", None]),
        "top_k": st.integers(-1, 3),
        "every_n_steps": st.sampled_from([None, 1, 3]),
        "every_n_epochs": st.sampled_from([None, 2]),
        "background": st.booleans(),
    }
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, NAN]), min_size=1, max_size=4).map(lambda values: values * 2),
    one=INSTANCE,
    two=INSTANCE,
    remote=st.booleans(),
    kills=KILLS,
    every=st.sampled_from([1, 2]),
)
def test_a_run_that_was_killed_leaves_the_files_and_the_records_of_one_that_was_not(
    disk, tmp_path_factory, values, one, two, remote, kills, every
):
    found = []
    for killed in ([], kills):
        first, second = Place(tmp_path_factory.mktemp("run"), False), Place(tmp_path_factory.mktemp("run"), remote)

        def plugins(first=first, second=second):
            return [{"checkpoint:one": {**one, "dir": first.url}}, {"checkpoint:two": {**two, "dir": second.url}}]

        _, lines, _ = run_with_kills(disk, first.root, values, plugins, killed, val_check_interval=every)
        found.append((lines, contents(first), contents(second)))
        first.clear()
        second.clear()
    (lines, *undisturbed), (lines_with_kills, *disturbed) = found
    assert lines_with_kills == lines
    assert differences(disturbed, undisturbed) == []
