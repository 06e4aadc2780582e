"""The command line says what is installed, what an argument means, who is called when, and what is in a checkpoint."""

import json
import math
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from torchplug import checkpoint
from torchplug.cli import main
from torchplug.options import fields_of
from torchplug.settings import RENAMED, Settings


def test_plugins_lists_name_package_version_and_whether_the_bundle_uses_it(capsys):
    assert main(["plugins"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    rows = {words[0]: words[1:] for words in lines}
    assert rows["early_stopping"][:3] == ["torchplug-early-stopping", "0.1.0", "available"]
    assert rows["progress"][:3] == ["torchplug-progress", "0.1.0", "on"]
    assert rows["standard"][:3] == ["torchplug-standard", "0.1.0", "on"]


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
    assert "checkpoint says after='*'" in order
    hook = out[out.index("on_validation_end:") :]
    assert hook.index("early_stopping  torchplug-early-stopping 0.1.0  (as listed)") < hook.index("checkpoint  torchplug-checkpoint 0.1.0")


def test_a_misspelt_name_is_answered_with_the_closest_and_exit_code_2(capsys):
    assert main(["explain", "max_epoch"]) == 2
    assert "'max_epoch' is neither a Trainer argument nor an installed plugin, did you mean 'max_epochs'?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "torchplug", "explain", "seed"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("seed: int | None (at least 0), default None.")


# ---------------------------------------------------------------------- checkpoints


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("count", torch.tensor(3))


def state_of(module, **parts):
    """A small state of the layout of a run."""
    return {
        "time": 1767323045.0,
        "kind": "run",
        "emergency": "",
        "versions": {"torch": "2.15.0", "torchplug": "0.1.0"},
        "run": {"id": "1a2b3c4d", "class": "Tied", "dir": "/runs/Tied/version_0", "seconds": 12.345},
        "position": {"stage": "train", "epoch": 2, "batch": 3, "step": 17, "micro_step": 17, "samples": 68},
        "module": dict(module.state_dict()),
        "optimizers": [{"class": "SGD", "steps": 17, "state": {"state": {0: {"momentum": torch.ones(4, 4)}}, "of": module.encoder.weight}}],
        "plugins": {"ema": {"average": torch.ones(1000)}, "early_stopping": {"wait": 1}},
        "hyperparameters": {"lr": 0.1, "limit": math.inf, "weights": torch.ones(3), "path": ("a", b"b")},
        "options": {"precision": "32"},
        **parts,
    }


@pytest.fixture
def good(tmp_path):
    torch.manual_seed(1)
    checkpoint.write(tmp_path / "good.safetensors", state_of(Tied()))
    return tmp_path / "good.safetensors"


@pytest.fixture
def bad(tmp_path, good):
    data = bytearray(good.read_bytes())
    data[-1] ^= 4
    (tmp_path / "bad.safetensors").write_bytes(data)
    return tmp_path / "bad.safetensors"


def test_verify_says_of_each_file_whether_it_is_good_or_what_is_wrong_and_where(good, bad, capsys):
    assert main(["verify", str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: good\n"
    assert main(["verify", str(good), str(bad), str(good.parent / "none")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{good}: good"
    assert lines[1].startswith(f"{bad}: entry ") and lines[1].endswith(" is damaged")
    assert lines[2] == f"there is no checkpoint {good.parent / 'none'}"


def test_verify_takes_a_folder_for_every_checkpoint_in_it(good, bad, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path)]) == 1
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [str(bad), str(good)]
    bad.unlink()
    assert main(["verify", str(tmp_path)]) == 0
    assert main(["verify", str(tmp_path / "empty")]) == 1
    assert "is a folder without *.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["verify"], ["show"], ["export", "x"], ["verify", "x", "--nonsense"]])
def test_a_mistake_in_the_arguments_has_exit_code_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_show_says_what_is_in_a_checkpoint(good, capsys):
    assert main(["show", str(good)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(good)
    shown = {line[:18].strip(): line[19:] for line in lines[1:]}
    assert shown["kind"] == "the whole state of a run"
    assert shown["format"] == "2"
    assert shown["position"] == "stage train, epoch 2, batch 3, step 17, micro_step 17, samples 68"
    assert shown["written"].startswith("2026-01-02 ") or shown["written"].startswith("2026-01-01 ")
    assert shown["run"] == "id 1a2b3c4d, class Tied, dir /runs/Tied/version_0, seconds 12.3"
    assert shown["versions"] == "torch 2.15.0, torchplug 0.1.0"
    assert shown["plugins"] == "early_stopping, ema"
    assert shown["options"] == "precision 32"
    assert shown["module"] == "72 bytes in 2 tensors", "tied ones once"
    assert shown["optimizers"] == "64 bytes in 1 tensor"
    assert shown["plugin ema"] == "4.0 kB in 1 tensor"
    assert (shown["lr"], shown["limit"], shown["weights"]) == ("0.1", '"inf"', '"a tensor of float32 [3]"')


def test_show_tells_weights_and_emergencies_from_whole_states(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    checkpoint.write(path, state_of(Tied(), kind="weights", emergency="ZeroDivisionError: division by zero", hyperparameters={}))
    main(["show", str(path)])
    out = capsys.readouterr().out
    assert "weights only, not enough to go on from" in out
    assert "written after ZeroDivisionError: division by zero" in out
    checkpoint.write(path, {"mine": 1})
    assert main(["show", str(path)]) == 0
    assert "not the state of a run" in capsys.readouterr().out


def test_show_json_is_strict_and_has_the_same(good, capsys):
    assert main(["show", str(good), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (shown["kind"], shown["format"], shown["position"]["step"], shown["run"]["id"]) == ("run", 2, 17, "1a2b3c4d")
    assert shown["sizes"]["module"] == {"tensors": 2, "bytes": 72}
    assert shown["bytes"] == good.stat().st_size
    assert shown["plugins"] == ["early_stopping", "ema"]
    assert shown["hyperparameters"] == {"lr": 0.1, "limit": "inf", "weights": "a tensor of float32 [3]", "path": ["a", "b'b'"]}


def test_show_of_what_is_no_checkpoint_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"torchplug: {tmp_path} is a folder; name a file in it\n")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_export_writes_weights_that_load_without_torchplug(suffix, good, tmp_path, capsys):
    target = tmp_path / f"out{suffix}"
    assert main(["export", str(good), str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    weights = load_file(target) if suffix == ".safetensors" else torch.load(target, weights_only=True)
    torch.manual_seed(2)
    module = Tied()
    module.load_state_dict(weights)
    torch.manual_seed(1)
    expected = Tied().state_dict()
    assert sorted(weights) == sorted(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    other = tmp_path / "other"
    other.touch()
    assert target.stat().st_mode == other.stat().st_mode
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["good.safetensors", "other", target.name])


def test_export_refuses_what_would_be_a_mistake(good, bad, tmp_path, capsys):
    target = tmp_path / "out.pt"
    assert main(["export", str(good), str(tmp_path / "out.ckpt")]) == 2
    assert "out.ckpt must end in .safetensors or .pt" in capsys.readouterr().err
    target.write_text("mine")
    assert main(["export", str(good), str(target)]) == 2
    assert "out.pt is there already; --force replaces it" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main(["export", str(good), str(good), "--force"]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert main(["export", str(good), str(target), "--force"]) == 0
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "new.pt")]) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
    checkpoint.write(bad, {"mine": 1})
    assert main(["export", str(bad), str(tmp_path / "new.pt")]) == 1
    assert "bad.safetensors holds no module" in capsys.readouterr().err
    assert not (tmp_path / "new.pt").exists()


def test_what_is_no_tensor_in_a_module_goes_into_a_pt_alone(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    checkpoint.write(path, {"module": {"weight": torch.ones(1), "_extra_state": {"seen": 3}}})
    assert main(["export", str(path), str(tmp_path / "out.safetensors")]) == 1
    assert "_extra_state is a dict, and a safetensors file holds tensors alone; export to .pt" in capsys.readouterr().err
    assert main(["export", str(path), str(tmp_path / "out.pt")]) == 0
    assert torch.load(tmp_path / "out.pt", weights_only=True)["_extra_state"] == {"seen": 3}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_export_onto_a_full_disk_says_so_and_leaves_the_old_file(suffix, tmp_path, capsys):
    path, target = tmp_path / "x.safetensors", tmp_path / f"out{suffix}"
    checkpoint.write(path, {"module": {str(i): torch.ones(1_000_000) for i in range(2)}})
    target.write_text("mine")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = main(["export", str(path), str(target), "--force"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert f"disk full (a file may not be so large) while writing {target}" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([target.name, "x.safetensors"])
