"""What the Weights & Biases logger promises, read back from the files that wandb writes."""

import html
import json
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from torch.utils.data import DataLoader, TensorDataset
from wandb.proto import wandb_internal_pb2 as messages

from torchplug import Module, Trainer, hookimpl
from torchplug.testing import check_logger
from torchplug.tracking import Place, deliver, first
from torchplug_wandb import Wandb

BATCHES = 3
KEY = "a" * 40
NOTHING_THERE = "http://127.0.0.1:9"  # the port is closed


@pytest.fixture(autouse=True)
def account(tmp_path, monkeypatch):
    """No key and no settings of whoever runs the tests, no file outside of the test's folder, no process that stays."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home" / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", NOTHING_THERE)
    yield
    wandb.teardown()


class Net(Module):
    def __init__(self, lr=0.1, **more):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr / 1000)


def loader(**options):
    return DataLoader(TensorDataset(torch.arange(2.0 * 2 * BATCHES).reshape(-1, 2)), batch_size=2, **options)


def trainer(tmp_path, *plugins, board=None, **options):
    options = {"max_epochs": 1, "log_every_n_steps": 1, "root_dir": tmp_path / "runs", "accelerator": "cpu", **options}
    return Trainer(plugins=["journal", *plugins, {"wandb": {"mode": "offline", **(board or {})}}], **options)


def records(path):
    """The records of an offline file: a head of 7 bytes, then blocks of 32 KiB as in LevelDB's log."""
    data = Path(path).read_bytes()
    assert data[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        check, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if not kind:
            place += left
            continue
        body = data[place + 7 : place + 7 + length]
        if len(body) < length:
            return
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) == check
        place += 7 + length
        parts = body if kind in (1, 2) else parts + body
        if kind in (1, 4):
            yield messages.Record.FromString(parts)


def files(folder):
    return sorted(Path(folder).glob("wandb/offline-run-*/*.wandb"))


def contents(folder):
    """All records of the finished offline runs in the folder of the logger, in order; wandb may be a moment behind."""
    end = time.monotonic() + 10
    while True:
        found = [list(records(file)) for file in files(folder)]
        if all(any(each.WhichOneof("record_type") == "exit" for each in one) for one in found) or time.monotonic() > end:
            return [each for one in found for each in one]
        time.sleep(0.02)


def rows(folder):
    found = [each.history for each in contents(folder) if each.WhichOneof("record_type") == "history"]
    return [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in found]


def written(folder):
    """The rows without what wandb adds: [(step, time, {name: value})]."""
    return [(row.pop("_step"), row.pop("_timestamp"), {k: v for k, v in row.items() if k != "_runtime"}) for row in rows(folder)]


def journal(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "journal.jsonl").read_text().splitlines()]


def expected(run_dir):
    """The same from the journal: one row for the records of one step that follow one another in one call of fit or test."""
    found = []
    for record in journal(run_dir):
        if record["event"] == "on_run_start" and record["work"] != "fit":
            found.append(None)
        if record["event"] != "log_metrics":
            continue
        values = {name: record[name] for name in ("step", "epoch", "samples", "seconds")} | record["metrics"]
        if found and found[-1] is not None and found[-1][0] == record["step"]:
            values = found.pop()[2] | values
        found.append((record["step"], record["time"], values))
    return [each for each in found if each is not None]


def same(found, wanted):
    """Equal, with NaN equal to NaN."""
    return repr([(s, float(t), sorted((k, float(v)) for k, v in row.items())) for s, t, row in found]) == repr(
        [(s, float(t), sorted((k, float(v)) for k, v in row.items())) for s, t, row in wanted]
    )


def equal(run_dir, name="wandb"):
    assert expected(run_dir)
    return same(written(Path(run_dir) / name), expected(run_dir))


def replay(run_dir, **options):
    path = run_dir / "journal.jsonl"
    plugin = Wandb(**{"mode": "offline", **options})
    return deliver(plugin.backend(), Place(path, first(path), run_dir, plugin.folder(run_dir, "wandb")))


def exits(folder):
    return [each.exit.exit_code for each in contents(folder) if each.WhichOneof("record_type") == "exit"]


def config(folder):
    found = {}
    for each in contents(folder):
        kind = each.WhichOneof("record_type")
        if kind in ("run", "config"):
            update = each.run.config.update if kind == "run" else each.config.update
            found |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update}
    return found


def artifacts(folder):
    return [each.artifact for each in contents(folder) if each.WhichOneof("record_type") == "artifact"]


# ---------------------------------------------------------------------- the plugin


@pytest.mark.slow
def test_it_passes_the_conformance_checks(tmp_path):
    """In a new interpreter: what wandb changes at its first import is no fault of the plugin, and later it would look like one."""
    code = "from torchplug.testing import check_plugin; check_plugin('wandb', mode='offline')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_nothing_of_wandb_is_imported_before_a_run():
    code = "import sys, torchplug_wandb; torchplug_wandb.Wandb(project='p'); sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"mode": "of"}, ValueError, "mode must be 'online' or 'offline' or 'disabled' or None, got 'of'"),
        ({"log_model": True}, ValueError, "log_model must be"),
        ({"tags": "a"}, TypeError, "tags must be"),
        ({"tags": [""]}, ValueError, "tags must be texts of 1 to 64 characters, got ''"),
        ({"project": "a/b"}, ValueError, "project must be a name of at most 128 characters"),
        ({"close_timeout": 0}, ValueError, "close_timeout must be above 0"),
    ],
)
def test_a_bad_option_is_an_error_at_once(options, kind, text):
    with pytest.raises(kind, match=text.replace("|", r"\|")):
        Wandb(**options)


# ---------------------------------------------------------------------- rows


@pytest.mark.slow
def test_rows_are_the_records_of_the_journal_for_fit_validate_and_test(tmp_path):
    t = trainer(tmp_path, max_epochs=2)
    net = Net()
    t.fit(net, loader(), loader())
    t.validate(net, loader())
    t.test(net, loader())
    assert equal(t.run.dir)
    found = written(t.run.dir / "wandb")
    assert [step for step, _, _ in found] == [1, 2, 3, 4, 5, 6, 6, 6]
    assert len(files(t.run.dir / "wandb")) == 3 and exits(t.run.dir / "wandb") == [0, 0, 0]
    ids = {each.run.run_id for each in contents(t.run.dir / "wandb") if each.WhichOneof("record_type") == "run"}
    assert ids == {t.run.id}


@pytest.mark.slow
def test_it_keeps_every_promise_of_a_logger():
    def stored(run_dir):
        for step, _, row in written(run_dir / "wandb"):
            columns = {"epoch", "samples", "seconds"} | ({"step"} if row["step"] == step else set())  # a metric of that name wins
            yield from ((name.removeprefix("metric:"), step, value) for name, value in row.items() if name not in columns)

    check_logger("wandb", read=stored, mode="offline")


def test_the_step_is_that_of_the_optimizer_with_accumulation_too(tmp_path):
    t = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    t.fit(Net(), loader(), loader())
    assert equal(t.run.dir)
    assert [step for step, _, _ in written(t.run.dir / "wandb")] == [1, 2, 3, 4]


def test_numbers_of_any_kind_and_odd_names_are_kept(tmp_path):
    odd = {
        "l(x)@1": math.nan,
        "größe mit leer": math.inf,
        "a/b.c": -math.inf,
        "e" * 300: 1e-300,
        "x\ny": 0.1,
        "..": 1e300,
        "half \ud800": 2.0,
    }
    reserved = {"_step": 1.5, "_runtime": 2.5, "_timestamp": 3.5, "_wandb": 4.5}

    class Odd(Net):
        def on_train_epoch_end(self):
            self.log_dict({**odd, **reserved, "epoch": -1.0})

    t = trainer(tmp_path)
    t.fit(Odd(), loader())
    (last,) = [row for step, _, row in written(t.run.dir / "wandb") if step == BATCHES]
    assert math.isnan(last.pop("l(x)@1"))
    odd.pop("l(x)@1")
    assert {name: last[name.replace("\ud800", r"\ud800")] for name in odd} == odd
    assert {name: last[f"metric:{name}"] for name in reserved} == reserved
    assert last["epoch"] == -1.0  # a metric wins over the column of its name


def test_a_name_that_comes_twice_at_one_step_has_its_last_value_which_is_said(tmp_path, caplog):
    class Twice(Net):
        def on_train_epoch_end(self):
            self.log("loss_step", -1.0)

    t = trainer(tmp_path, max_epochs=2)
    t.fit(Twice(), loader())
    assert [row["loss_step"] for step, _, row in written(t.run.dir / "wandb") if step in (3, 6)] == [-1.0, -1.0]
    assert [each for each in caplog.messages if "one value of a name for each step" in each] == [
        "wandb keeps one value of a name for each step, the last one, and 'loss_step' has several"
    ]


def test_integers_booleans_and_numbers_of_a_journal_by_other_hands_are_kept(tmp_path):
    t = trainer(tmp_path)
    t.fit(Net(), loader())
    path = t.run.dir / "journal.jsonl"
    lines = path.read_text().splitlines()
    last = json.loads([line for line in lines if '"log_metrics"' in line][-1])
    odd = {"big": 2**63 - 1, "exact": 2**53 + 1, "true": True, "huge": 2**70}
    lines.append(json.dumps({**last, "n": len(lines), "step": 9, "metrics": odd}))
    path.write_text("\n".join(lines) + "\n")
    replay(t.run.dir)
    *_, (step, _, row) = written(t.run.dir / "wandb")
    assert step == 9 and {name: row[name] for name in odd} == {**odd, "huge": 2.0**70} and row["true"] is True


# ---------------------------------------------------------------------- everything else that is logged


def test_hyperparameters_and_options_are_the_config(tmp_path):
    t = trainer(
        tmp_path, max_epochs=2, board={"project": "p", "name": "n", "group": "g", "tags": ["a", "b"], "notes": "why", "entity": "e"}
    )
    t.fit(Net(lr=0.2, nested={"depth": 3, "rate": math.inf}, layers=[1, 2], **{"half \ud800": None}), loader())
    found = config(t.run.dir / "wandb")
    assert (found["lr"], found["nested"], found["layers"]) == (0.2, {"depth": 3, "rate": "inf"}, [1, 2])
    assert found["half \\ud800"] is None
    assert found["torchplug"]["module"] == "Net" and found["torchplug"]["options"]["max_epochs"] == 2
    (run,) = [each.run for each in contents(t.run.dir / "wandb") if each.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_group, list(run.tags), run.notes, run.entity) == ("p", "n", "g", ["a", "b"], "why", "e")


def test_the_names_of_project_and_run_come_from_the_run(tmp_path, monkeypatch):
    t = trainer(tmp_path, name="a%b")
    t.fit(Net(), loader())
    (run,) = [each.run for each in contents(t.run.dir / "wandb") if each.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("a-b", "version_0")
    wandb.teardown()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    t = trainer(tmp_path)
    t.fit(Net(), loader())
    (run,) = [each.run for each in contents(t.run.dir / "wandb") if each.WhichOneof("record_type") == "run"]
    assert run.project == "mine"


def test_texts_and_figures_are_shown_at_their_step_whatever_their_names(tmp_path):
    pyplot = pytest.importorskip("matplotlib.figure")
    names = ["note", "a/b", "é" * 150, "", "../up", "x\ny", "half \ud800"]

    class Shows(Net):
        def on_train_epoch_end(self):
            for name in names:
                self._run.log_text(name, f"1 < 2\n{name}")
                figure = pyplot.Figure()
                figure.subplots().plot([1, 2])
                self._run.log_figure(f"figure {name}", figure)

    t = trainer(tmp_path)
    t.fit(Shows(), loader())
    folder, journal_of = t.run.dir / "wandb", journal(t.run.dir)
    (row,) = [row for row in rows(folder) if row["_step"] == BATCHES]
    (run_dir,) = folder.glob("wandb/offline-run-*")
    texts = [(run_dir / "files" / row[key]).read_text() for key in row if row[key] and key.endswith(".path") and "html" in str(row[key])]
    shown = [f"1 < 2\n{name}".encode("utf-8", "backslashreplace").decode() for name in names]
    assert sorted(html.unescape(text.partition('pre-wrap">')[2].rpartition("</pre>")[0]) for text in texts) == sorted(shown)
    assert row["note._type"] == "html-file" and row["figure a/b._type"] == "image-file"
    pictures = {row[key] for key in row if key.startswith("figure") and key.endswith(".path")}
    drawn = [t.run.dir / record["path"] for record in journal_of if record["event"] == "log_figure"]
    assert sorted((run_dir / "files" / picture).read_bytes() for picture in pictures) == sorted(path.read_bytes() for path in drawn)
    assert len(texts) == len(pictures) == len(names)


def test_files_and_folders_are_artifacts_that_lie_beside_the_rows(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "b.txt").write_text("b")
    (tmp_path / "a b.txt").write_text("a")

    class Files(Net):
        def on_fit_start(self):
            self._run.log_artifact(tmp_path / "a b.txt")
            self._run.log_artifact(tmp_path / "folder", "all of it")
            self._run.log_artifact(tmp_path / "not there")

    t = trainer(tmp_path)
    t.fit(Files(), loader())
    found = {each.name: each for each in artifacts(t.run.dir / "wandb")}
    assert {name: each.type for name, each in found.items()} == {"a-b.txt": "file", "all-of-it": "folder"}
    (tmp_path / "a b.txt").write_text("changed")  # it is kept as it was
    lies = {entry.path: Path(entry.local_path) for each in found.values() for entry in each.manifest.contents}
    assert {path: lies[path].read_text() for path in lies} == {"a b.txt": "a", "deep/b.txt": "b"}
    assert all(path.is_relative_to(t.run.dir / "wandb") for path in lies.values())
    assert not list((tmp_path / "home").rglob("staging/*"))
    assert equal(t.run.dir)  # the missing one is said, and holds up nothing


def test_checkpoints_are_artifacts_all_of_them_or_the_best(tmp_path):
    saved = {"checkpoint": {"monitor": "val/loss", "top_k": 2}}
    t = trainer(tmp_path, saved, board={"log_model": "all"}, max_epochs=3)
    t.fit(Net(), loader(), loader())
    found = artifacts(t.run.dir / "wandb")
    assert {each.name for each in found} == {f"model-{t.run.id}"} and {each.type for each in found} == {"model"}
    assert all("latest" in each.aliases for each in found) and any("best" in each.aliases for each in found)
    best = [each for each in found if "best" in each.aliases][-1].manifest.contents[0]
    assert Path(best.local_path).read_bytes() == t.run.best_path.read_bytes()
    assert os.path.samefile(best.local_path, t.run.best_path)  # no second copy on the disk
    assert json.loads(found[-1].metadata)["path"] == str(t.run.dir / "checkpoints" / found[-1].manifest.contents[0].path)

    t = trainer(tmp_path, saved, board={"log_model": "best"}, max_epochs=3)
    net = Net()
    t.fit(net, loader(), loader())
    t.test(net, loader())
    (model,) = artifacts(t.run.dir / "wandb")
    assert set(model.aliases) == {"latest", "best"}
    assert Path(model.manifest.contents[0].local_path).read_bytes() == t.run.best_path.read_bytes()


def test_a_checkpoint_that_is_gone_before_its_turn_is_left_out_and_said(tmp_path, caplog):
    t = trainer(tmp_path, {"checkpoint": {"monitor": "val/loss", "top_k": 1}}, max_epochs=2)
    t.fit(Net(), loader(), loader())
    for path in (t.run.dir / "checkpoints").iterdir():
        path.unlink()
    replay(t.run.dir, log_model="all", project="other")
    assert "wandb: a checkpoint that was deleted before it was W&B's turn is not an artifact" in caplog.messages


def test_disabled_and_trial_runs_leave_nothing(tmp_path, monkeypatch):
    t = trainer(tmp_path, board={"mode": "disabled"})
    t.fit(Net(), loader())
    assert t.run.report["wandb"] == "nothing is logged, as mode is disabled"
    assert not (t.run.dir / "wandb").exists() and wandb.run is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    t = trainer(tmp_path, board={"mode": None})
    t.fit(Net(), loader())
    assert not (t.run.dir / "wandb").exists()
    before = set(tmp_path.rglob("*"))
    t = trainer(tmp_path, board={"dir": tmp_path / "elsewhere"}, fast_dev_run=True)
    t.fit(Net(), loader())
    assert {path for path in set(tmp_path.rglob("*")) - before if "home" not in path.parts} == set()


# ---------------------------------------------------------------------- whose run it is


def test_a_run_that_the_user_began_is_used_and_left_open(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    mine = wandb.init(project="mine", dir=tmp_path, id="mine", settings=wandb.Settings(console="off", silent=True))
    mine.log({"before": 1.0}, step=1)
    t = trainer(tmp_path, board={"mode": None}, max_epochs=2)
    net = Net()
    t.fit(net, loader())
    trial = trainer(tmp_path, board={"mode": None}, fast_dev_run=True)
    trial.fit(Net(), loader())
    assert wandb.run is mine
    t.test(net, loader())
    mine.log({"after": 2.0}, step=7)
    mine.finish(exit_code=3)
    assert exits(tmp_path) == [3] and len(files(tmp_path)) == 1
    found = {row["_step"]: row for row in rows(tmp_path)}
    assert found[1]["before"] == 1.0 and found[7]["after"] == 2.0
    wanted = {}
    for record in journal(t.run.dir):
        if record["event"] == "log_metrics":
            wanted.setdefault(record["step"], {}).update(record["metrics"])
    assert {step: {name: found[step][name] for name in row} for step, row in wanted.items()} == wanted
    assert config(tmp_path)["lr"] == 0.1


def test_rows_come_behind_those_that_the_users_run_has_already(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    mine = wandb.init(project="mine", dir=tmp_path, settings=wandb.Settings(console="off", silent=True))
    mine.log({"before": 1.0}, step=100)
    t = trainer(tmp_path, board={"mode": None})
    t.fit(Net(), loader())
    mine.finish()
    found = [row for row in rows(tmp_path) if "loss_step" in row]
    assert [row["step"] for row in found] == [1, 2, 3] and [row["_step"] for row in found] == [100, 101, 102]


def test_experiment_is_the_run_of_wandb(tmp_path):
    class Mine(Net):
        def on_train_epoch_end(self):
            t.enabled["wandb"].experiment.log({"mine": 7}, step=50)

    t = trainer(tmp_path)
    t.fit(Mine(), loader())
    assert [row["_step"] for row in rows(t.run.dir / "wandb") if "mine" in row] == [50]
    with pytest.raises(RuntimeError, match="from on_run_start to on_run_end"):
        t.enabled["wandb"].experiment  # noqa: B018


def test_two_runs_in_one_process_share_nothing(tmp_path):
    done = []

    def work(number):
        t = trainer(tmp_path, name=f"run{number}", max_epochs=3)
        t.fit(Net(lr=float(number)), loader(), loader())
        done.append(t)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2 and all(equal(t.run.dir) for t in done)
    assert sorted(config(t.run.dir / "wandb")["lr"] for t in done) == [1.0, 2.0]
    assert wandb.run is None


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader_neither_hang_nor_write(tmp_path, start):
    epochs, workers = (2, 2) if start == "fork" else (1, 1)  # each of them imports torch
    t = trainer(tmp_path, max_epochs=epochs)
    t.fit(Net(), loader(num_workers=workers, multiprocessing_context=start), loader(num_workers=1, multiprocessing_context=start))
    assert equal(t.run.dir) and len(files(t.run.dir / "wandb")) == 1


def test_wandb_leaves_the_hooks_of_the_process_alone(tmp_path):
    before = sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer(tmp_path).fit(Net(), loader())
    assert (sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ---------------------------------------------------------------------- again


def test_a_replay_makes_the_run_once_however_often_it_is_repeated(tmp_path):
    t = trainer(tmp_path, board={"mode": "disabled"}, max_epochs=2)
    net = Net()
    t.fit(net, loader(), loader())
    t.test(net, loader())
    first_time, second = replay(t.run.dir), replay(t.run.dir)
    assert first_time.sent == len(journal(t.run.dir)) and second.sent == 0
    assert second.backend.where == first_time.backend.where
    assert second.backend.where == f"wandb sync {files(t.run.dir / 'wandb')[0].parent}"
    found = written(t.run.dir / "wandb")
    assert [step for step, _, _ in found] == [1, 2, 3, 4, 5, 6] and "test_loss" in found[-1][2] and exits(t.run.dir / "wandb") == [0]


def test_a_replay_sends_what_came_since_the_last(tmp_path):
    t = trainer(tmp_path, board={"mode": "disabled"})
    net = Net()
    t.fit(net, loader(), loader())
    replay(t.run.dir)
    t.test(net, loader())
    replay(t.run.dir)
    assert equal(t.run.dir) and exits(t.run.dir / "wandb") == [0, 0]


def test_online_and_offline_and_projects_are_remembered_apart(tmp_path):
    t = trainer(tmp_path, board={"mode": "disabled"})
    t.fit(Net(), loader())
    assert replay(t.run.dir, project="a").sent == replay(t.run.dir, project="b").sent > 0
    assert replay(t.run.dir, project="a").sent == 0


class Stop(Net):
    """Ends in its own way at a step."""

    how, step = None, 0

    def on_train_batch_end(self):
        if self._run.position.step == self.step:
            self.how()


def stopping(how, step):
    net = Stop()
    net.how, net.step = how, step
    return net


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


def test_a_run_that_was_resumed_is_the_journal_and_its_old_folder_is_gone(tmp_path):
    def fail():
        raise RuntimeError("on purpose")

    saved = {"checkpoint": {"every_n_steps": 2}}
    t = trainer(tmp_path, saved, max_epochs=3)
    with pytest.raises(RuntimeError, match="on purpose"):
        t.fit(stopping(fail, 5), loader(), loader())
    (old,) = files(t.run.dir / "wandb")
    t = trainer(tmp_path, saved, max_epochs=3)
    t.fit(Stop(), loader(), loader(), ckpt_path="last")
    assert equal(t.run.dir) and exits(t.run.dir / "wandb") == [0]
    assert [step for step, _, _ in written(t.run.dir / "wandb")] == list(range(1, 10))
    assert not old.exists() and len(files(t.run.dir / "wandb")) == 1


def test_what_was_logged_past_the_journal_is_kept_aside(tmp_path):
    def fail():
        t.enabled["wandb"].experiment.log({"mine": 7}, step=50)
        raise RuntimeError("on purpose")

    saved = {"checkpoint": {"every_n_steps": 2}}
    t = trainer(tmp_path, saved, max_epochs=2)
    with pytest.raises(RuntimeError, match="on purpose"):
        t.fit(stopping(fail, 5), loader(), loader())
    t = trainer(tmp_path, saved, max_epochs=2)
    t.fit(Stop(), loader(), loader(), ckpt_path="last")
    assert equal(t.run.dir)
    (aside,) = (t.run.dir / "wandb" / "wandb").glob("abandoned-offline-run-*")
    assert any(each.WhichOneof("record_type") == "history" for each in records(next(aside.glob("*.wandb"))))


# ---------------------------------------------------------------------- the end


def test_the_exit_code_says_how_a_run_ended(tmp_path):
    def fail():
        raise RuntimeError("on purpose")

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)

    codes = []
    for how, expects in ((fail, RuntimeError), (interrupt, KeyboardInterrupt), (terminate, SystemExit)):
        t = trainer(tmp_path, max_epochs=2)
        try:
            t.fit(stopping(how, 2), loader())
        except expects as error:
            assert isinstance(error, expects)
        assert equal(t.run.dir)
        codes.append((journal(t.run.dir)[-1]["status"], exits(t.run.dir / "wandb")))
    assert codes == [("failed", [1]), ("interrupted", [255]), ("interrupted", [255])]


class Stopped:
    @hookimpl
    def on_train_batch_end(self, run):
        run.request_stop("enough")


def test_a_run_that_was_stopped_is_a_success(tmp_path):
    t = trainer(tmp_path, Stopped())
    t.fit(Net(), loader())
    assert journal(t.run.dir)[-1]["status"] == "stopped" and exits(t.run.dir / "wandb") == [0]


# ---------------------------------------------------------------------- outages

PROGRAM = """
import json, os, pathlib, signal, sys, time
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchplug import Module, Trainer

options = json.loads(sys.argv[1])

class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.last, self.longest = None, 0.0

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        time.sleep(options["pause"])
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch[0]).square().mean())

    def on_train_batch_start(self):
        now = time.perf_counter()
        self.longest = max(self.longest, now - self.last) if self.last else 0.0
        self.last = now

    def on_train_epoch_end(self):
        self.last = None
        if options["kill"]:
            for children in pathlib.Path("/proc/self/task").glob("*/children"):
                for child in children.read_text().split():
                    if "wandb-core" in pathlib.Path(f"/proc/{child}/cmdline").read_text():
                        os.kill(int(child), signal.SIGKILL)
            options["kill"] = False
            time.sleep(1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

def loader():
    return DataLoader(TensorDataset(torch.arange(200.0).reshape(-1, 2) / 100), batch_size=2)

torch.manual_seed(0)
net = Net()
loggers = ["journal", {"wandb": options["wandb"]}] if options["wandb"] else ["journal"]
trainer = Trainer(plugins=loggers, max_epochs=2, log_every_n_steps=1, accelerator="cpu", root_dir=options["root"])
begin = time.perf_counter()
trainer.fit(net, loader(), loader())
seconds = time.perf_counter() - begin
weights = [parameter.tolist() for parameter in net.parameters()]
report = trainer.run.report
print(json.dumps({"dir": str(trainer.run.dir), "seconds": seconds, "longest": net.longest, "weights": weights, "report": report}))
"""


def program(tmp_path, board, pause=0.001, kill=False):
    return PROGRAM, json.dumps({"wandb": board, "root": str(tmp_path / "runs"), "pause": pause, "kill": kill})


@pytest.fixture
def ran(tmp_path, programs):
    """Runs `PROGRAM` with options of the plugin. What it said, and how long all of it took."""

    def run(board, kill=False, **environment):
        begin, environment = time.perf_counter(), {**os.environ, **environment}
        done = programs.run(*program(tmp_path, board, kill=kill), env=environment, imports=["wandb"])
        assert done.returncode == 0, done.stderr
        return {**json.loads(done.stdout.splitlines()[-1]), "all": time.perf_counter() - begin, "said": done.stderr}

    return run


@pytest.mark.slow
@pytest.mark.alone
def test_an_address_that_does_not_answer_costs_nothing_and_is_made_up_for(ran):
    bare = ran(None)
    out = ran({"mode": "online", "close_timeout": 4.0}, WANDB_API_KEY=KEY)
    assert out["weights"] == bare["weights"]
    assert out["longest"] < bare["longest"] + 0.05
    assert out["all"] < bare["all"] + 4.0 + 4.0  # wandb takes seconds to be imported
    run_dir = Path(out["dir"])
    assert "torchplug replay" in out["report"]["wandb"]
    assert len([line for line in out["said"].splitlines() if f"{NOTHING_THERE} does not answer" in line and "takes nothing" in line]) == 1
    events = [(each["event"], each.get("step"), each.get("metrics")) for each in journal(run_dir)]
    assert events == [(each["event"], each.get("step"), each.get("metrics")) for each in journal(bare["dir"])]
    assert not files(run_dir / "wandb")
    replay(run_dir)
    assert equal(run_dir)


@pytest.mark.slow
@pytest.mark.alone
def test_a_server_that_says_nothing_holds_up_nobody(ran):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        out = ran({"mode": "online", "close_timeout": 8.0}, WANDB_API_KEY=KEY, WANDB_BASE_URL=address)
    assert out["longest"] < 0.05 + 0.05 and out["seconds"] < 8.0 + 8.0
    assert f"{address} does not answer (timed out)" in out["said"]


@pytest.mark.slow
def test_a_missing_key_is_said_at_once_and_never_asked_for(tmp_path, programs):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), daemon=True).start()
        terminal, end = os.openpty()  # one at which wandb would ask
        environment = {**os.environ, "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "TERM": "xterm"}
        command = program(tmp_path, {"mode": "online", "close_timeout": 5.0})
        process = programs.start(*command, stdin=end, stderr=end, env=environment, imports=["wandb"])
        assert process.wait(30) == 0
        said = os.read(terminal, 65536).decode()
        os.close(terminal)
        os.close(end)
    assert len([line for line in said.splitlines() if "takes nothing" in line and "there is no API key: set WANDB_API_KEY" in line]) == 1


def answer(server, text):
    """Says the same to everybody."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.recv(65536)
            connection.sendall(text)


@pytest.mark.slow
@pytest.mark.alone
def test_errors_of_the_server_hold_up_nobody(ran):
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        threading.Thread(target=answer, args=(server, text), daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        out = ran({"mode": "online", "close_timeout": 10.0}, WANDB_API_KEY=KEY, WANDB_BASE_URL=address)
    assert out["longest"] < 0.1 and out["seconds"] < 10.0 + 6.0 and out["all"] < 24.0
    assert "is in use" not in out["said"]  # a second attempt is one
    assert not list((Path(out["dir"]) / "wandb").glob("wandb/run-*"))


@pytest.mark.slow
def test_a_run_that_was_killed_is_made_up_for(tmp_path, programs):
    child = programs.start(*program(tmp_path, {"mode": "offline"}, pause=0.01), imports=["wandb"])
    path = tmp_path / "runs" / "Net" / "version_0" / "journal.jsonl"
    end = time.monotonic() + 60
    while not (path.exists() and len(journal(path.parent)) > 60 and files(path.parent / "wandb")):
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.05)
    child.kill()
    child.wait()
    replay(path.parent)
    assert len(files(path.parent / "wandb")) == 1 and exits(path.parent / "wandb") == [255]
    assert equal(path.parent)
    assert replay(path.parent).sent == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process in /proc")
def test_rows_are_complete_after_the_process_of_wandb_died(ran):
    out = ran({"mode": "offline"}, kill=True)
    assert equal(out["dir"]) and exits(Path(out["dir"]) / "wandb") == [0]
    assert len([line for line in out["said"].splitlines() if "takes nothing at present" in line]) >= 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk")
def test_a_full_disk_is_said_and_made_up_for(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(mounted.stderr)
    try:
        t = trainer(tmp_path, board={"dir": disk, "close_timeout": 5.0}, max_epochs=500)
        t.fit(Net(lr=1e-3), loader(), loader())
        assert "not everything was delivered" in t.run.report["wandb"] and "disk" in t.run.report["wandb"]
        for thread in threading.enumerate():
            if thread.name == "torchplug tracking":  # it was given up, in the middle of another attempt
                thread.join(30)
        subprocess.run(["mount", "-o", "remount,size=20m", "tmpfs", disk], check=True)
        replay(t.run.dir, dir=disk)
        assert same(written(disk), expected(t.run.dir))
    finally:
        wandb.teardown()
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_without_space_counts_as_nothing_sent(tmp_path, monkeypatch):
    t = trainer(tmp_path, board={"mode": "disabled"})
    t.fit(Net(), loader())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(OSError, match="the disk is full, and wandb drops what it cannot write"):
            replay(t.run.dir)
    replay(t.run.dir)
    assert equal(t.run.dir) and len(files(t.run.dir / "wandb")) == 1
