"""The kit for plugin authors: something tiny to train, hook calls on record, plugins that seem not to be there, ranks, fixtures."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from torchplug import PluginError, Trainer
from torchplug.testing import TinyModule, hermetic, recorded, tiny_fit, tiny_trainer, two_ranks
from torchplug.testing.processes import Child

# ---------------------------------------------------------------------- something tiny


def test_a_tiny_fit_trains_a_tiny_module_with_the_plugins_named_and_no_others() -> None:
    trainer = tiny_fit("lr_monitor", {"early_stopping": {"monitor": "val_loss"}}, max_epochs=2)
    assert list(trainer.enabled) == ["lr_monitor", "early_stopping"]
    assert trainer.run is not None and (trainer.run.position.epoch, trainer.run.position.step) == (2, 8)
    assert isinstance(trainer.run.module, TinyModule) and {"train_loss", "val_loss"} <= trainer.metrics.keys()
    assert not torch.equal(trainer.run.module.layer.weight, TinyModule().layer.weight)
    assert list(tiny_fit().enabled) == []


def test_its_folder_goes_away_with_the_trainer_and_one_that_is_given_stays(tmp_path: Path) -> None:
    trainer = tiny_fit("journal")
    assert trainer.run is not None
    folder = trainer.run.dir
    assert (folder / "journal.jsonl").exists()
    root = Path(trainer.root_dir)
    trainer.run = None
    del trainer
    gc.collect()
    assert not root.exists()
    given = tiny_fit("journal", root_dir=tmp_path)
    assert given.run is not None and given.run.dir.is_relative_to(tmp_path)
    del given
    assert [*tmp_path.rglob("journal.jsonl")]


def test_a_tiny_trainer_that_cannot_be_built_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PluginError):
        tiny_trainer("nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_module_of_ones_own_and_options_of_the_trainer() -> None:
    module = TinyModule(train=3, val=0)
    trainer = tiny_fit(module=module, max_steps=2)
    assert trainer.run is not None and trainer.run.module is module and trainer.run.position.step == 2


# ---------------------------------------------------------------------- hook calls


def test_every_hook_call_is_on_record_with_its_arguments() -> None:
    calls = recorded()
    tiny_fit(calls)
    assert calls.names[:2] == ["launch", "setup"] and calls.names[-2:] == ["teardown", "on_run_end"]
    assert calls.names.count("on_train_batch_end") == 4
    ended = [arguments for name, arguments in calls.calls if name == "on_train_batch_end"]
    assert [each["batch_idx"] for each in ended] == [0, 1, 2, 3]
    assert ended[0] == {"run": "Run", "outputs": "Tensor", "batch": "list", "batch_idx": 0}


def test_only_the_hooks_named_are_on_record() -> None:
    calls = recorded("on_fit_start", "teardown")
    tiny_fit(calls)
    assert calls.calls == [("on_fit_start", {"run": "Run"}), ("teardown", {"run": "Run", "stage": "fit"})]
    with pytest.raises(ValueError, match="no hook 'on_fit_begin'"):
        recorded("on_fit_begin")


# ---------------------------------------------------------------------- what is installed


def test_only_the_plugins_named_seem_to_be_installed() -> None:
    with hermetic("ema"):
        assert list(Trainer(max_epochs=1, plugins=["ema"]).enabled) == ["ema"]
        with pytest.raises(PluginError, match=r"plugin 'csv' is not installed.* pip install torchplug-csv \(installed plugins: ema\)"):
            Trainer(max_epochs=1, plugins=["csv"])
        assert list(Trainer(max_epochs=1).enabled) == [], "the bundle is hidden too"
    assert list(Trainer(max_epochs=1, plugins=["csv"]).enabled) == ["csv"]


def test_nothing_seems_to_be_installed_without_names_and_a_name_has_to_be_there() -> None:
    with hermetic(), pytest.raises(PluginError, match=r"installed plugins: none"):
        Trainer(max_epochs=1, plugins=["ema"])
    with pytest.raises(PluginError, match="plugin 'nowhere' is not installed"), hermetic("nowhere"):
        raise AssertionError("not reached")


# ---------------------------------------------------------------------- processes


def test_two_ranks_exchange_values_and_both_answers_come_back() -> None:
    def add(more: int) -> Any:
        value = torch.tensor([float(dist.get_rank() + more)])
        dist.all_reduce(value)
        return dist.get_backend(), dist.get_rank(), value.item(), os.environ["WORLD_SIZE"], os.getpid()

    answers = two_ranks(add, 1)
    assert [answer[:4] for answer in answers] == [("gloo", 0, 3.0, "2"), ("gloo", 1, 3.0, "2")]
    assert len({os.getpid(), *(answer[4] for answer in answers)}) == 3
    assert not dist.is_initialized() and "RANK" not in os.environ


def test_a_fit_in_two_ranks_is_one_of_two_ranks() -> None:
    def fit() -> Any:
        run = tiny_fit(strategy="ddp").run
        assert run is not None
        return run.world_size, run.position.step, run.module.state_dict()

    one, other = two_ranks(fit)
    assert one[:2] == other[:2] == (2, 2)
    assert all(torch.equal(value, other[2][name]) for name, value in one[2].items())


def test_the_first_rank_to_fail_is_the_one_that_is_heard() -> None:
    def fail() -> None:
        if dist.get_rank() == 1:
            raise KeyError("of rank 1")
        dist.barrier()

    with pytest.raises(KeyError, match="of rank 1") as caught:
        two_ranks(fail)
    told = str(caught.value.__cause__)
    assert "in rank 1:" in told and 'raise KeyError("of rank 1")' in told and "test_testing.py" in told


class Odd(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    def fail() -> None:
        raise Odd(1, 2)

    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        two_ranks(fail)


def test_a_rank_that_is_killed_is_said_and_the_other_one_ended() -> None:
    def die() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(RuntimeError, match="rank 1 ended without an answer, by SIGKILL"):
        two_ranks(die)


@pytest.mark.slow
def test_ranks_that_wait_for_ever_are_ended_and_it_is_said_where_they_were(tmp_path: Path) -> None:
    def wait() -> None:
        (tmp_path / f"{dist.get_rank()}").write_text(str(os.getpid()))
        if dist.get_rank() == 0:
            dist.barrier()
        while True:
            time.sleep(0.01)

    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank 0 did not end within 2 s and was killed(.|\n)*in barrier(.|\n)*in wait"):
        two_ranks(wait, timeout=2)
    assert time.monotonic() - begin < 10
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"{rank}").read_text()), 0)


def test_a_child_that_is_killed_says_so_and_one_with_an_answer_gives_it() -> None:
    one, other = Child(os.kill, 0, 0), Child(lambda: os.environ["OF_A_CHILD"], environment={"OF_A_CHILD": "yes"})
    try:
        assert other.result() == "yes" and "OF_A_CHILD" not in os.environ and other.killed_by == ""
        one.kill()
        assert one.ended() and one.killed_by in ("SIGKILL", "")
    finally:
        one.close()
        other.close()


# ---------------------------------------------------------------------- fixtures

TESTS = """
    import pytest

    def test_they_are_there(tiny_module, tiny_fit, recorded, tmp_path):
        trainer = tiny_fit(recorded, module=tiny_module)
        assert trainer.run.module is tiny_module and trainer.run.dir.is_relative_to(tmp_path)
        assert "on_train_end" in recorded.names

    def test_plugins_are_hidden(hermetic, tiny_fit):
        from torchplug import PluginError
        hermetic("ema")
        tiny_fit("ema")
        with pytest.raises(PluginError):
            tiny_fit("csv")

    def test_and_there_again(tiny_fit, check_plugin, two_ranks):
        tiny_fit("csv")
        assert callable(check_plugin) and callable(two_ranks)
"""
NOTHING = """
    import sys

    def test_nothing_is_imported(request):
        assert request.config.pluginmanager.has_plugin("torchplug")
        assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "torchplug")]
"""


OPTIONS = ["-q", "-p", "no:cacheprovider", "test_it.py"]


@pytest.mark.slow
def test_pytest_has_the_fixtures_wherever_torchplug_is_installed(tmp_path: Path, programs: Any) -> None:
    (tmp_path / "test_it.py").write_text(textwrap.dedent(TESTS))
    done = programs.run(f"import pytest\nraise SystemExit(pytest.main({OPTIONS}))", cwd=tmp_path)
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_pytest_imports_nothing_for_the_fixtures_before_they_are_used(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(textwrap.dedent(NOTHING))
    command = [sys.executable, "-m", "pytest", *OPTIONS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
