"""What the Weights & Biases logger promises online: wandb itself, with a stand-in for its server that keeps rows by their offset."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import wandb
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, Trainer
from torchplug.tracking import Place, deliver, first
from torchplug_wandb import Wandb

KEY = "a" * 40


class Server:
    """Answers what wandb 0.31 asks when it sends a run: who am I, what is there of the run, take these lines."""

    def __init__(self):
        self.runs, self.files, self.port, self.asked = {}, {}, 0, []
        self.start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(ConnectionError):
                    super().handle()

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                text = json.dumps(store.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_PUT = do_POST

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path, body):
        if path.startswith("/storage"):
            self.files[path] = body
            return {}
        if path.endswith("/file_stream"):
            return self.lines(path.split("/")[4], json.loads(body))
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        name = asked.get("operationName") or re.search(r"(?:query|mutation) (\w+)", asked["query"])[1]
        self.asked.append((name, asked.get("variables", {})))
        answers = getattr(self, name, None)
        return {"data": answers(**asked.get("variables", {})) if answers else {}}

    def lines(self, run, sent):
        kept = self.runs[run]
        if "wandb-history.jsonl" in sent.get("files", {}):
            part = sent["files"]["wandb-history.jsonl"]
            kept["rows"][part["offset"] :] = [json.loads(line) for line in part["content"]]
        if "wandb-summary.json" in sent.get("files", {}):
            kept["summary"] = sent["files"]["wandb-summary.json"]["content"][-1]
        if sent.get("complete"):
            kept["exits"].append(sent.get("exitcode"))
        return {"limits": {}}

    def Viewer(self, **_):
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}}

    def bucket(self, name):
        kept = self.runs[name]
        project = {"id": "p", "name": kept["project"], "entity": {"id": "e", "name": "me"}}
        tail = json.dumps([json.dumps(row) for row in kept["rows"][-1:]])
        return {
            "id": name, "name": name, "displayName": name, "config": kept["config"], "project": project, "summaryMetrics": kept["summary"],
            "historyLineCount": len(kept["rows"]), "eventsLineCount": 0, "logLineCount": 0, "historyTail": tail, "eventsTail": "[]",
            "tags": [], "notes": None, "wandbConfig": '{"t": 1}', "description": None, "sweepName": None,
        }  # fmt: skip

    def RunResumeStatus(self, name, project, **_):
        there = name in self.runs and self.runs[name]["project"] == project
        entity = {"id": "e", "name": "me"}
        return {"model": {"id": "p", "name": project, "entity": entity, "bucket": self.bucket(name) if there else None}}

    def UpsertBucket(self, name, config, project, **_):
        fresh = {"rows": [], "summary": "{}", "config": "{}", "exits": [], "project": project}
        self.runs.setdefault(name, fresh)["config"] = config or self.runs[name]["config"]
        return {"upsertBucket": {"bucket": self.bucket(name), "inserted": True}}

    def CreateRunFiles(self, run, files, **_):
        places = [{"name": name, "uploadUrl": f"{self.address}/storage/{run}/{name}"} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": places}}

    def GetDefaultEntity(self, **_):
        return {"viewer": {"id": "u", "entity": "me"}}

    def ArtifactType(self, **_):
        return {"project": {"artifact": None}}

    def CreateArtifact(self, **_):
        return {"createArtifact": {"artifact": {"id": "A", "state": "PENDING", "artifactSequence": {"id": "S", "latestArtifact": None}}}}

    def CreateArtifactManifest(self, **_):
        file = {"id": "F", "uploadUrl": f"{self.address}/storage/manifest", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}

    def CreateArtifactFiles(self, input, **_):
        def node(name):
            place = {"storagePath": name, "uploadUrl": f"{self.address}/storage/artifact/{name}", "uploadHeaders": []}
            return {"node": {**place, "uploadMultipartUrls": None, "artifact": {"id": "A"}}}

        return {"createArtifactFiles": {"files": {"edges": [node(file["name"]) for file in input["artifactFiles"]]}}}

    def CommitArtifact(self, **_):
        return {"commitArtifact": {"artifact": {"id": "A", "digest": "d"}}}


@pytest.fixture
def server(tmp_path, monkeypatch, capfd):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home" / name))
    server = Server()
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", server.address)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    wandb.teardown()
    server.stop()
    assert "Tried to log to step" not in capfd.readouterr().err  # wandb drops nothing of what it is given


class Net(Module):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"lr": 0.1})
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test", self.layer(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Failing(Net):
    at = 0

    def on_train_batch_end(self):
        if self._run.position.step == self.at:
            raise RuntimeError("on purpose")


def loader():
    return DataLoader(TensorDataset(torch.arange(12.0).reshape(-1, 2)), batch_size=2)


def trainer(tmp_path, *plugins, board=None, **options):
    options = {"max_epochs": 2, "log_every_n_steps": 1, "root_dir": tmp_path / "runs", "accelerator": "cpu", **options}
    return Trainer(plugins=["journal", *plugins, {"wandb": board or {}}], **options)


def replay(run_dir, **options):
    path = run_dir / "journal.jsonl"
    plugin = Wandb(**options)
    return deliver(plugin.backend(), Place(path, first(path), run_dir, plugin.folder(run_dir, "wandb")))


def journal(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "journal.jsonl").read_text().splitlines()]


def expected(run_dir):
    """{(optimizer step, name): value}, which is what a reader of the run looks for."""
    return {(r["step"], k): v for r in journal(run_dir) if r["event"] == "log_metrics" for k, v in r["metrics"].items()}


def found(server, run_id):
    """The same from the server, where each may stand once only; its own step is at least that of the optimizer."""
    rows = server.runs[run_id]["rows"]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps)) and all(row["_step"] >= row["step"] for row in rows)
    values = [((row["step"], k), row[k]) for row in rows for k in row if k in ("loss", "val", "test")]
    assert len(values) == len(dict(values))
    return dict(values)


@pytest.mark.slow
def test_rows_config_and_exit_code_arrive_and_a_test_goes_on_in_the_same_run(server, tmp_path):
    t = trainer(tmp_path)
    net = Net()
    t.fit(net, loader(), loader())
    assert found(server, t.run.id) == expected(t.run.dir)
    assert t.run.report["wandb"].endswith(f"/me/Net/runs/{t.run.id}")
    t.test(net, loader())
    kept = server.runs[t.run.id]
    assert found(server, t.run.id) == expected(t.run.dir) and len(expected(t.run.dir)) == 9
    assert kept["exits"] == [0, 0] and json.loads(kept["config"])["lr"]["value"] == 0.1
    assert kept["rows"][-1]["_step"] == 7 and kept["rows"][-1]["step"] == 6  # W&B had closed that step


def test_the_best_checkpoint_is_uploaded_and_its_copy_is_gone(server, tmp_path):
    t = trainer(tmp_path, {"checkpoint": {"monitor": "val"}}, board={"log_model": "best"})
    t.fit(Net(), loader(), loader())
    (made,) = [variables["input"] for name, variables in server.asked if name == "CreateArtifact"]
    assert made["artifactCollectionName"] == f"model-{t.run.id}" and {each["alias"] for each in made["aliases"]} == {"latest", "best"}
    assert server.files[f"/storage/artifact/{t.run.best_path.name}"] == t.run.best_path.read_bytes()
    assert any(name == "CommitArtifact" for name, _ in server.asked) and server.runs[t.run.id]["exits"] == [0]
    assert not list((t.run.dir / "wandb").rglob("*.safetensors"))


def test_a_replay_sends_once(server, tmp_path):
    t = trainer(tmp_path, board={"mode": "disabled"})
    net = Net()
    t.fit(net, loader(), loader())
    t.test(net, loader())
    assert replay(t.run.dir).sent == len(journal(t.run.dir)) and replay(t.run.dir).sent == 0
    assert found(server, t.run.id) == expected(t.run.dir) and server.runs[t.run.id]["exits"] == [0]


def test_a_run_that_goes_on_from_a_checkpoint_has_each_step_once(server, tmp_path):
    saved = {"checkpoint": {"every_n_steps": 2}}
    t = trainer(tmp_path, saved)
    net = Failing()
    net.at = 5
    with pytest.raises(RuntimeError, match="on purpose"):
        t.fit(net, loader(), loader())
    assert server.runs[t.run.id]["exits"] == [1]
    t = trainer(tmp_path, saved)
    t.fit(Failing(), loader(), loader(), ckpt_path="last")
    assert found(server, t.run.id) == expected(t.run.dir)
    assert server.runs[t.run.id]["exits"] == [1, 0]


def test_what_the_last_row_lacks_comes_behind_it(server, tmp_path):
    t = trainer(tmp_path, board={"mode": "disabled"})
    t.fit(Net(), loader(), loader())
    path, text = t.run.dir / "journal.jsonl", (t.run.dir / "journal.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    (last,) = [n for n, line in enumerate(lines) if '"val"' in line and '"step": 6' in line]
    path.write_text("".join(lines[:last]))
    replay(t.run.dir)
    assert (6, "val") not in found(server, t.run.id)
    path.write_text(text)
    unfinished(t.run.dir)
    replay(t.run.dir)
    assert found(server, t.run.id) == expected(t.run.dir)


def unfinished(run_dir):
    """As if the last replay had been killed."""
    (remembered,) = (run_dir / "wandb").glob("sent.*.json")
    kept = json.loads(remembered.read_text())
    kept["parts"][-1]["n"] = 0
    remembered.write_text(json.dumps(kept))


@pytest.mark.parametrize("arrived", [0, 1, 2])
def test_a_test_that_was_broken_off_on_its_way_is_complete_and_there_once(server, tmp_path, arrived):
    class Two(Net):
        def on_test_end(self):
            self._run.log_text("note", "behind it")

    t = trainer(tmp_path, board={"mode": "disabled"})
    net = Two()
    t.fit(net, loader(), loader())
    replay(t.run.dir)
    t.test(net, loader())
    path, text = t.run.dir / "journal.jsonl", (t.run.dir / "journal.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    begins = [n for n, line in enumerate(lines) if '"on_run_start"' in line][1]
    stops = [begins, *(n for n, line in enumerate(lines) if '"metrics": {"test"' in line or '"log_text"' in line)]
    path.write_text("".join(lines[: stops[arrived] + 1]))
    replay(t.run.dir)
    path.write_text(text)
    unfinished(t.run.dir)
    replay(t.run.dir)
    assert found(server, t.run.id) == expected(t.run.dir)
    assert len([row for row in server.runs[t.run.id]["rows"] if "note" in row]) == 1


@pytest.mark.slow
def test_wandb_sync_makes_one_run_of_offline_folders(server, tmp_path):
    t = trainer(tmp_path, board={"mode": "offline"})
    net = Net()
    t.fit(net, loader(), loader())
    t.test(net, loader())
    command = shlex.split(t.run.report["wandb"])
    assert command[:2] == ["wandb", "sync"] and len(command) == 4
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert found(server, t.run.id) == expected(t.run.dir)


PROGRAM = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from test_online import Net, loader, trainer
from pathlib import Path

class Slow(Net):
    def on_train_batch_start(self):
        time.sleep(0.05)

t = trainer(Path(sys.argv[2]), board={"close_timeout": float(sys.argv[3])}, max_epochs=5)
begin = time.perf_counter()
t.fit(Slow(), loader(), loader())
print(json.dumps({"seconds": time.perf_counter() - begin, "report": t.run.report}), flush=True)
"""


@pytest.fixture
def child(tmp_path, programs):
    """Starts `PROGRAM`."""

    def start(close_timeout=30.0):
        arguments = str(Path(__file__).parent), str(tmp_path), str(close_timeout)
        return programs.start(PROGRAM, *arguments, imports=["wandb", "pytest"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def wait_for(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_that_was_killed_is_made_up_for(server, tmp_path, child):
    process = child()
    run_dir = tmp_path / "runs" / "Slow" / "version_0"
    wait_for(lambda: (run_dir / "journal.jsonl").exists() and len(journal(run_dir)) > 15)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(1.0)  # the process of wandb hears of it
    replay(run_dir)
    (run_id,) = server.runs
    assert found(server, run_id) == expected(run_dir)
    assert server.runs[run_id]["exits"][-1] == 255


@pytest.mark.slow
@pytest.mark.alone
def test_a_server_that_stops_in_mid_run_costs_no_more_than_close_timeout(server, tmp_path, child):
    process = child(4.0)
    run_dir = tmp_path / "runs" / "Slow" / "version_0"
    wait_for(lambda: (run_dir / "journal.jsonl").exists() and len(journal(run_dir)) > 15)
    server.stop()
    stopped = time.perf_counter()
    out, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert time.perf_counter() - stopped < 2.0 + 4.0 + 5.0
    assert "torchplug replay" in json.loads(out.splitlines()[-1])["report"]["wandb"]
    server.start()
    replay(run_dir)
    (run_id,) = server.runs
    assert found(server, run_id) == expected(run_dir) and len(expected(run_dir)) == 20
    assert server.runs[run_id]["exits"][-1] == 0
