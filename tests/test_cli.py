"""The command line says what is installed, what an argument means, and who is called when."""

import json
import subprocess
import sys

import pytest

from torchplug.cli import main
from torchplug.options import fields_of
from torchplug.settings import RENAMED, Settings


def test_plugins_lists_name_package_version_and_whether_the_bundle_uses_it(capsys):
    assert main(["plugins"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    rows = {words[0]: words[1:] for words in lines}
    assert rows["early_stopping"] == ["torchplug-early-stopping", "0.1.0", "available"]
    assert rows["progress"] == ["torchplug-progress", "0.1.0", "on"]
    assert rows["standard"] == ["torchplug-standard", "0.1.0", "on"]


def test_plugins_reads_metadata_alone():
    code = (
        "import sys; from torchplug.cli import main; main(['plugins']);"
        "print([name for name in sys.modules if name.startswith('torchplug_') or name in ('rich', 'tensorboard')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_plugins_verbose_json_has_hooks_and_documented_options(capsys):
    assert main(["plugins", "-v", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    stopping = rows["early_stopping"]
    assert "on_validation_end" in stopping["hooks"]
    options = {option["name"]: option for option in stopping["options"]}
    assert options["monitor"]["default"] == "required"
    assert options["patience"]["type"] == "int"
    assert options["patience"]["text"]
    assert rows["standard"]["bundle"] == ["progress", "summary", "checkpoint", "journal", "tensorboard"]


def test_plugins_verbose_for_people(capsys):
    assert main(["plugins", "-v"]) == 0
    out = capsys.readouterr().out
    assert "a bundle of progress, summary, checkpoint, journal, tensorboard" in out
    assert "    monitor: str, required. " in out


@pytest.mark.parametrize("name", [field.name for field in fields_of(Settings)])
def test_every_trainer_argument_is_explained_with_type_and_default(name, capsys):
    assert main(["explain", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}: ")
    assert "default" in out
    assert len(out.rpartition("default")[2]) > 30, "the text says what it does"


def test_explain_without_a_name_lists_every_argument(capsys):
    assert main(["explain"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [field.name for field in fields_of(Settings)]


def test_explain_says_unit_and_range_of_gradient_clip_val(capsys):
    main(["explain", "gradient_clip_val"])
    out = capsys.readouterr().out
    assert "(above 0)" in out
    assert "largest norm" in out
    assert "0.1 to 10" in out


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_explain_answers_arguments_of_older_trainers(name, capsys):
    assert main(["explain", name]) == 0
    assert RENAMED[name] in capsys.readouterr().out


def test_explain_shows_for_each_hook_who_is_called_from_which_package_and_why(capsys):
    assert main(["explain", "checkpoint", "early_stopping"]) == 0
    out = capsys.readouterr().out
    order = out.partition("\n\n")[0]
    assert order.index("1. early_stopping  torchplug-early-stopping 0.1.0  (as listed)") < order.index(
        "2. checkpoint  torchplug-checkpoint 0.1.0"
    )
    assert "after='*' of checkpoint" in order
    hook = out[out.index("on_validation_end:") :]
    assert hook.index("early_stopping  torchplug-early-stopping 0.1.0  (as listed)") < hook.index("checkpoint  torchplug-checkpoint 0.1.0")


def test_a_misspelt_name_is_answered_with_the_closest_and_exit_code_2(capsys):
    assert main(["explain", "max_epoch"]) == 2
    assert "'max_epoch' is neither a Trainer argument nor an installed plugin, did you mean 'max_epochs'?" in capsys.readouterr().err


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "torchplug", "explain", "seed"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("seed: int | None (at least 0), default None.")
