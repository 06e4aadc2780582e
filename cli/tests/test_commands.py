"""What the commands do, and what they say when something is wrong."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from torchplug import Trainer, seed_everything
from torchplug.checkpoint import load

START = "import sys; from torchplug.cli import main; sys.exit(main(sys.argv[1:]))"


def weights(folder):
    return load(folder / "checkpoints" / "last.safetensors")["module"]


def assert_equal(one, other):
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------- what they do


def test_fit_trains_what_the_file_says_and_what_the_command_line_changes(project):
    code, output, _ = project("fit", "config.yaml", "--set", "trainer.max_epochs=3", "--set", "plugins.checkpoint.top_k=2")
    assert (code, output) == (0, "")
    state = load(project.folder / "runs/Net/version_0/checkpoints/last.safetensors")
    assert (state["position"]["epoch"], state["position"]["step"]) == (3, 18)
    assert state["hyperparameters"]["lr"] == 0.1


def test_fit_is_the_run_that_python_does(project):
    assert project("fit", "config.yaml")[0] == 0
    sys.path.insert(0, str(project.folder))
    from nets import Net, Points

    seed_everything(3)
    data = Points()
    seed_everything(3)
    trainer = Trainer(max_epochs=2, seed=3, accelerator="cpu", plugins=["checkpoint"], name="python")
    trainer.fit(Net(), datamodule=data)
    assert_equal(weights(project.folder / "runs/Net/version_0"), weights(project.folder / "runs/python/version_0"))


def test_what_one_of_data_and_module_draws_does_not_change_the_other(project):
    assert (
        project(
            "fit",
            "config.yaml",
            "--set",
            "trainer.max_epochs=1",
            "--set",
            "trainer.limit_train_batches=1",
            "--set",
            "module.init_args.lr=0",
        )[0]
        == 0
    )
    other = ["--set", "data.init_args.n=8", "--set", "trainer.name=other", "--set", "module.init_args.lr=0"]
    assert project("fit", "config.yaml", *other)[0] == 0
    assert_equal(weights(project.folder / "runs/Net/version_0"), weights(project.folder / "runs/other/version_0"))


@pytest.mark.parametrize("data", ["nets.loaders", "nets.py:loaders"])
def test_data_may_come_from_a_function(project, data):
    file = project.write(
        "c.yaml",
        f"trainer: {{max_epochs: 1}}\nplugins: []\nmodule: {{class_path: nets.Net}}\ndata: {{class_path: '{data}', init_args: {{n: 8}}}}",
    )
    code, _, errors = project("fit", file)
    assert code == 0 and "2 steps" in errors and "val_loss" in errors
    code, output, _ = project("test", file)
    assert code == 0 and json.loads(output)[0].keys() == {"test_loss"}


def test_one_loader_is_for_the_work_at_hand(project):
    common = ["config.yaml", "--set", "data.class_path=nets.one_loader", "--set", "plugins=[]"]
    assert "val_loss" not in project("fit", *common)[2]
    assert json.loads(project("validate", *common)[1])[0].keys() == {"val_loss"}


def test_evaluation_takes_the_weights_of_a_checkpoint_and_prints_metrics_as_json(project):
    assert project("fit", "config.yaml")[0] == 0
    path = "runs/Net/version_0/checkpoints/last.safetensors"
    fresh = json.loads(project("test", "config.yaml")[1])[0]["test_loss"]
    code, output, _ = project("test", "config.yaml", "--ckpt-path", path)
    (metrics,) = json.loads(output)
    assert code == 0 and metrics["test_loss"] < fresh
    assert json.loads(project("test", "config.yaml", "--set", f"ckpt_path={path}")[1]) == [metrics]
    assert json.loads(project("validate", "config.yaml", "--ckpt-path", path)[1]) == [{"val_loss": metrics["test_loss"]}]


def test_fit_goes_on_from_a_checkpoint(project):
    assert project("fit", "config.yaml")[0] == 0
    code, _, errors = project("fit", "config.yaml", "--set", "trainer.max_epochs=3", "--ckpt-path", "last")
    assert code == 0 and "goes on from" in errors
    assert project("fit", "config.yaml", "--set", "trainer.max_epochs=3", "--set", "trainer.name=whole")[0] == 0
    assert_equal(weights(project.folder / "runs/Net/version_0"), weights(project.folder / "runs/whole/version_0"))


def test_predict_leaves_the_predictions_to_a_plugin(project):
    code, output, _ = project("predict", "config.yaml", "--set", "plugins=[{prediction_writer: {dir: out}}]")
    assert (code, output) == (0, "")
    assert len(list(Path("out").rglob("*.pt"))) == 3


def test_tune_prints_what_was_found(project):
    code, output, _ = project("tune", "config.yaml", "--set", "plugins=[{lr_finder: {steps: 10}}]")
    found = json.loads(output)["lr_finder"]
    assert code == 0 and "lrs" not in found
    assert found["suggestion"] is None or 0 < found["suggestion"] < 100


def test_no_plugins_starts_bare(project, monkeypatch):
    monkeypatch.delenv("TORCHPLUG_PLUGINS")
    code, _, errors = project("fit", "config.yaml", "--no-plugins")
    assert code == 0 and "TORCHPLUG_PLUGINS=none" in errors
    assert sorted(each.name for each in (project.folder / "runs/Net/version_0").iterdir()) == ["config.yaml"]
    assert "TORCHPLUG_PLUGINS" not in os.environ


def test_a_plugin_of_ones_own_is_named_with_its_class(project):
    plugins = "plugins=[{mine: {class_path: 'nets.py:Count', init_args: {every: 2}}}]"
    code, _, errors = project("fit", "config.yaml", "--set", plugins)
    assert code == 0 and "count: 6" in errors
    again = "runs/Net/version_0/config.yaml"
    assert "count: 6" in project("fit", again)[2]
    assert "has no argument 'evry', did you mean 'every'?" in project.refused(
        "fit", "config.yaml", "--set", plugins.replace("every", "evry")
    )


def test_nested_classes_are_made_from_their_own_class_paths(project):
    file = project.write(
        "c.yaml",
        """
        trainer: {max_epochs: 1, seed: 1}
        plugins: [checkpoint]
        module:
          class_path: nets.Built
          init_args:
            encoder: {class_path: "nets.py:Deep", init_args: {width: 5, drop: 0.25}}
        data: {class_path: nets.Points}
        """,
    )
    assert project("fit", file)[0] == 0
    assert weights(project.folder / "runs/Built/version_0")["head.weight"].shape == (1, 5)
    assert project("fit", "runs/Built/version_0/config.yaml", "--set", "module.init_args.encoder.init_args.width=6")[0] == 0
    assert weights(project.folder / "runs/Built/version_1")["head.weight"].shape == (1, 6)


@pytest.mark.parametrize("text", ['"5"', "no", '"1e-3"', '"null"'])
def test_a_text_stays_a_text_even_if_it_looks_like_a_number(project, text):
    settings = ["module.class_path=nets.Loose", f"module.init_args={{note: {text}, either: {text}}}", "trainer.limit_train_batches=1"]
    assert project("fit", "config.yaml", *(word for setting in settings for word in ("--set", setting)))[0] == 0
    saved = load(project.folder / "runs/Loose/version_0/checkpoints/last.safetensors")["hyperparameters"]
    assert (saved["note"], saved["either"]) == (text.strip('"'), text.strip('"'))


# ---------------------------------------------------------------------- the same run again


def test_the_file_in_the_runs_folder_starts_the_same_run_again(project):
    extra = [
        "--set",
        "plugins.ema.decay=0.9",
        "--set",
        "plugins.swa={start: 1, lr: 0.01}",
        "--set",
        "plugins.checkpoint:two={every_n_steps: 5, top_k: 0}",
    ]
    assert project("fit", "config.yaml", *extra[:2], "--set", "module.init_args={lr: 1e-3, tag: off}", *extra[4:])[0] == 0
    first = project.folder / "runs/Net/version_0"
    code, _, errors = project("fit", str(first / "config.yaml"))
    second = project.folder / "runs/Net/version_1"
    assert code == 0 and "was written with" not in errors
    assert_equal(weights(first), weights(second))
    assert (first / "config.yaml").read_text() == (second / "config.yaml").read_text()
    assert 'init_args: {lr: 0.001, tag: "off"}' in (first / "config.yaml").read_text()


def test_the_file_of_a_run_in_python_starts_it_again_too(project):
    sys.path.insert(0, str(project.folder))
    from nets import Net, Points

    seed_everything(7)
    data = Points(n=16)
    seed_everything(7)
    trainer = Trainer(max_epochs=2, seed=7, precision=32, max_time="1h", plugins=["checkpoint", {"ema": {"decay": 0.9}}])
    trainer.fit(Net(lr=0.05), datamodule=data)
    assert project("fit", "runs/Net/version_0/config.yaml")[0] == 0
    assert_equal(weights(project.folder / "runs/Net/version_0"), weights(project.folder / "runs/Net/version_1"))


def test_a_file_of_other_versions_is_read_with_a_note(project):
    file = project.write(
        "c.yaml",
        (project.folder / "config.yaml").read_text() + 'versions: {torch: "1.0", checkpoint: "torchplug-checkpoint 9.9", more: "1"}',
    )
    code, _, errors = project("fit", file)
    assert code == 0
    assert f"the configuration was written with torch 1.0, here is {torch.__version__}" in errors
    assert "written with checkpoint torchplug-checkpoint 9.9, here is torchplug-checkpoint 0.1.0" in errors
    assert errors.count("was written with") == 2


@pytest.mark.parametrize(
    ("text", "said", "given"),
    [
        (
            "module: {class_path: nets.Net, init_args: {lr: {unwritten: not saved}}}",
            "module.init_args.lr is not in the file (not saved)",
            "module.init_args.lr=0.1",
        ),
        ("data: {unwritten: loaders}", "data is not in the file (loaders)", "data.class_path=nets.Points"),
        (
            "plugins: [{mlflow: {tracking_uri: 'http://***@host/'}}]",
            "plugins.mlflow.tracking_uri is 'http://***@host/', without the name",
            "plugins=[]",
        ),
    ],
)  # fmt: skip
def test_what_a_run_could_not_write_is_asked_for(project, text, said, given):
    file = project.write("over.yaml", text)
    assert said in project.refused("fit", "config.yaml", file)
    assert project("fit", "config.yaml", file, "--set", given, "--set", "trainer.limit_train_batches=1")[0] == 0


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.max_epoch=3"], "trainer: Trainer has no argument 'max_epoch', did you mean 'max_epochs'?"),
        (["trainer.gpus=1"], "Trainer has no argument 'gpus': write accelerator='gpu', devices=N"),
        (["trainer.max_epochs=three"], "trainer: max_epochs must be an int (at least 1) or None, got 'three'"),
        (["trainer.max_epochs=0"], "max_epochs must be at least 1, got 0"),
        (["trainer.plugins=[]"], "plugins have a section of their own"),
        (["trainer.max_epochs=null"], "how long to train is not said"),
        (["plugins.emma.decay=0.9"], "plugin 'emma' is not installed, did you mean 'ema'?"),
        (["plugins.ema.decy=0.9"], "plugin 'ema' (torchplug-ema 0.1.0): no option 'decy', did you mean 'decay'?"),
        (["plugins.ema.decay=2"], "plugin 'ema' (torchplug-ema 0.1.0): decay must be"),
        (["plugins.ema.decay=high"], "plugin 'ema' (torchplug-ema 0.1.0): decay must be"),
        (["plugins.early_stopping.patience=2"], "plugin 'early_stopping' (torchplug-early-stopping 0.1.0): "),
        (["trainer.strategy=dpp"], "strategy='dpp': plugin 'dpp' is not installed, did you mean 'ddp'?"),
        (["module.class_path=nets.Nett"], "'nets.Nett' cannot be imported, there is no 'Nett' in 'nets', did you mean 'Net'?"),
        (["module.class_path=netz.Net"], "'netz.Net' cannot be imported, there is no module 'netz'"),
        (["module.class_path=nets.py:Nett"], "there is no 'Nett' in 'nets', did you mean 'Net'?"),
        (["module.class_path=netz.py:Net"], "module.class_path: there is no file 'netz.py'"),
        (["module.class_path=Net"], "module.class_path must be 'package.module.Class' or 'folder/file.py:Class', got 'Net'"),
        (["module.class_path=nets.Points"], "module.class_path: 'nets.Points' is no subclass of torchplug.Module"),
        (["module.class_path=nets.loaders"], "module.class_path: 'nets.loaders' is no subclass of torchplug.Module"),
        (["module.init_args.rate=0.1"], "module.init_args: Net has no argument 'rate' (arguments: lr, tag, fails, ends)"),
        (["module.init_args.lrr=0.1"], "Net has no argument 'lrr', did you mean 'lr'?"),
        (["module.init_args.lr=high"], "module.init_args.lr must be of type float, got high"),
        (["module.init_args.ends=[1]"], "module.init_args.ends must be of type str or None, got [1]"),
        (["module.class_path=nets.Built"], "module.init_args: "),
        (["module.class_path=nets.Built", "--set", "module.init_args.encoder.class_path=nets.Nope"], "has no attribute 'Nope'"),
        (["data.class_path=nets.EXTRA"], "there is no 'EXTRA' in 'nets'"),
        (["data.class_path=nets.torch"], "data.class_path: 'nets.torch' is neither a class nor a function"),
        (["ckpt_path=nothing.safetensors"], "nothing.safetensors"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_the_exit_code_2(project, words, said):
    assert said in project.refused("fit", "config.yaml", "--set", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit"], "give a configuration file"),
        (["fit", "config.yaml", "--sett", "a=1"], "unrecognized arguments: --sett"),
        (["fit", "config.yaml", "--set"], "argument --set: expected one argument"),
        (["tune", "config.yaml"], "no enabled plugin tunes anything"),
        (["tune", "config.yaml", "--ckpt-path", "x"], "unrecognized arguments: --ckpt-path"),
        (["fit", "--set", "trainer.max_epochs=1"], "there is no module: write module:"),
        (["validate", "config.yaml", "--set", "trainer.limit_val_batches=0"], "limit_val_batches=0 leaves nothing for trainer.validate"),
        (["predict", "config.yaml", "--set", "data.class_path=nets.loaders"], "trainer.predict needs data"),
        (["schema", "more"], "unrecognized arguments: more"),
    ],
)
def test_a_mistake_in_the_words_is_one_line_too(project, words, said):
    assert said in project.refused(*words)


def test_options_may_stand_between_files(project):
    over = project.write("over.yaml", "trainer: {max_epochs: 1}")
    assert "1 epochs" in project("fit", "config.yaml", "--set", "trainer.limit_train_batches=1", over)[2]


def test_loaders_under_an_unknown_name_are_refused(project):
    project.write("more.py", "def loaders():\n    return {'training': []}\n")
    said = project.refused("fit", "config.yaml", "--set", "data.class_path=more.loaders")
    assert "more.loaders returned loaders under 'training', did you mean 'train'?" in said


def test_a_file_with_the_name_of_another_module_is_refused(project):
    project.write("json.py", "class Net: ...")
    assert "'json.py' has the name of another module, 'json': rename the file" in project.refused(
        "fit", "config.yaml", "--set", "module.class_path=json.py:Net"
    )


def test_what_the_users_module_cannot_import_is_raised_as_it_is(project):
    project.write("needs.py", "import something_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_there"):
        project("fit", "config.yaml", "--set", "module.class_path=needs.Net")


@pytest.mark.parametrize("kind", ["RuntimeError", "PluginError"])
def test_an_exception_in_training_keeps_its_traceback_and_the_exit_code_1(project, programs, kind):
    done = programs.run(START, "fit", "config.yaml", "--set", f"module.init_args.fails={kind}", cwd=project.folder)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "in training_step" in done.stderr and "a mistake in the user's code" in done.stderr


@pytest.mark.parametrize(
    ("method", "body", "kind", "said"),
    [
        ("configure_optimizers(self)", "raise ValueError('of the user')", ValueError, "of the user"),  # before the first batch, not core's
        ("training_step(self, batch)", "return 'loss'", TypeError, "loss"),  # core's, and in training
    ],
)
def test_an_error_is_no_mistake_of_the_call_where_it_comes_from_the_users_code_or_from_training(project, method, body, kind, said):
    project.write("more.py", f"from nets import Net\n\nclass Wrong(Net):\n    def {method}:\n        {body}\n")
    with pytest.raises(kind, match=said):
        project("fit", "config.yaml", "--set", "module.class_path=more.Wrong")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_ends_it_with_the_code_of_the_core(project, programs, name):
    done = programs.run(START, "fit", "config.yaml", "--set", f"module.init_args.ends={name}", cwd=project.folder)
    if name == "SIGINT":  # 1 where something runs code at the end of the interpreter, as torch's compiler does
        assert done.returncode in {-signal.SIGINT, 130, 1} and "\nKeyboardInterrupt" in done.stderr, done.stderr
    else:
        assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert load(project.folder / "runs/Net/version_0/checkpoints/last.safetensors")["position"]["step"] == 1


@pytest.mark.slow
def test_two_ranks_run_what_the_file_says(project, programs):
    words = [
        "fit",
        "config.yaml",
        "--set",
        "trainer.devices=2",
        "--set",
        "trainer.strategy={ddp: {backend: gloo}}",
        "--set",
        "module.class_path=nets.py:Net",
    ]
    done = programs.run(START, *words, cwd=project.folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    first = project.folder / "runs/Net/version_0"
    again = programs.run(START, "fit", str(first / "config.yaml"), cwd=project.folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert again.returncode == 0, again.stderr
    assert_equal(weights(first), weights(project.folder / "runs/Net/version_1"))


def test_help_says_what_there_is(project, capsys):
    with pytest.raises(SystemExit) as ended:
        project("fit", "--help")
    output = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(word in output for word in ("--set KEY=VALUE", "--ckpt-path", "--no-plugins", "--print-config"))


def test_nothing_is_said_about_how_it_works(project, caplog):
    with caplog.at_level(logging.WARNING):
        assert project("fit", "config.yaml")[0] == 0
    assert not [record for record in caplog.records if "jsonargparse" in record.name]
