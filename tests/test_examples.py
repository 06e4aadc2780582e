"""Every file in examples/ is run as a user runs it, and does what its first lines say."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchplug.checkpoint import verify

EXAMPLES = Path(__file__).parent.parent / "examples"
FASHION_MNIST = Path(os.environ.get("TORCHPLUG_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))

QUICK = ("quickstart", "fashion_mnist", "own_plugin")

Check = Callable[[str, Path], None]
CHECKS: dict[str, tuple[tuple[str, ...], Check]] = {}  # example -> its arguments, and what must hold for its output


def example(name: str, *arguments: str) -> Callable[[Check], Check]:
    """Marks the function that looks at what ``examples/name.py`` wrote: its output, and the folder it ran in."""

    def remember(check: Check) -> Check:
        CHECKS[name] = (arguments, check)
        return check

    return remember


def start(script: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, with ``folder`` as its working directory and no terminal."""
    command = [sys.executable, str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240)


def output_of(name: str, folder: Path, *arguments: str) -> str:
    """What the example printed, after it ended well and without a warning."""
    done = start(EXAMPLES / f"{name}.py", folder, *arguments)
    assert done.returncode == 0, done.stdout
    assert "Warning" not in done.stdout, done.stdout
    assert "\x1b" not in done.stdout, "control characters where there is no terminal"
    return done.stdout


def number(pattern: str, output: str) -> float:
    """The number that the group in ``pattern`` matches in ``output``."""
    return float(part(pattern, output))


def part(pattern: str, output: str) -> str:
    """The text that the group in ``pattern`` matches in ``output``."""
    found = re.search(pattern, output)
    assert found, f"{pattern!r} is not in the output:\n{output}"
    return found[1]


def fashion_mnist() -> Path:
    """The folder with the original files of Fashion-MNIST; without it the tests fail and say what to do."""
    if not any(FASHION_MNIST.glob("train-images-idx3-ubyte*")):
        pytest.fail(
            f"no Fashion-MNIST in {str(FASHION_MNIST)!r}: install Debian's package dataset-fashion-mnist, or set "
            "TORCHPLUG_FASHION_MNIST to a folder with the four original IDX files"
        )
    return FASHION_MNIST


# ---------------------------------------------------------------------- each example


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")  # MLflow's own
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(each.stem for each in EXAMPLES.glob("*.py"))],
)
def test_example_runs_and_keeps_its_promise(name: str, tmp_path: Path) -> None:
    if name not in CHECKS:
        pytest.fail(f"examples/{name}.py has no check: write one here with @example({name!r})")
    arguments, check = CHECKS[name]
    check(output_of(name, tmp_path, *(str(fashion_mnist()) if word == "FASHION_MNIST" else word for word in arguments)), tmp_path)


def test_every_check_has_its_example() -> None:
    assert sorted(CHECKS) == sorted(each.stem for each in EXAMPLES.glob("*.py"))


@example("quickstart")
def quickstart(output: str, folder: Path) -> None:
    assert number(r"test accuracy: ([\d.]+)", output) > 0.95
    assert "parameters: 21.4 K" in output, "the model table"
    assert "epoch 1/" in output, "progress"
    assert (folder / part(r"run directory: (\S+)", output) / "config.yaml").exists()
    assert verify(folder / part(r"best (\S+\.safetensors)", output)) == []
    assert list((folder / part(r"tensorboard --logdir (\S+)", output)).rglob("events.out.tfevents.*"))
    assert sorted(each.name for each in folder.iterdir()) == ["runs"], "nothing is written anywhere else"


@example("fashion_mnist", "--data", "FASHION_MNIST", "--limit", "3210", "--epochs", "2")
def fashion_mnist_small(output: str, folder: Path) -> None:
    equal_bit_for_bit(output, epochs=2)


def equal_bit_for_bit(output: str, epochs: int) -> float:
    """Checks the table of both trainings; returns the last test accuracy."""
    assert "losses, accuracies and parameters are equal bit for bit" in output
    ours, plain = re.findall(r"\d+  torchplug  (.*)", output), re.findall(r"\d+  plain loop (.*)", output)
    assert len(ours) == epochs
    assert [row.split() for row in ours] == [row.split() for row in plain]
    return float(ours[-1].split()[-1])


@example("autoencoder", "--epochs", "20", "--code-size", "3", "--plot", "codes.png")
def autoencoder(output: str, folder: Path) -> None:
    assert "'code_size': 3, 'hidden': 128" in output, "the hyperparameters of the checkpoint"
    assert verify(folder / part(r"reloaded (\S+)", output)) == []
    assert "codes of shape (400, 3)" in output
    assert number(r"reconstruction error: ([\d.]+)", output) < 0.6 * number(r"the mean image: ([\d.]+)", output)
    assert number(r"by nearest neighbours: ([\d.]+)", output) > 0.7
    assert (folder / "codes.png").read_bytes().startswith(b"\x89PNG")


@example("gan", "--epochs", "10")
def gan(output: str, folder: Path) -> None:
    assert number(r", ([\d.]+) after", output) < 0.3 * number(r"real points: ([\d.]+) before", output)
    assert number(r"the generator reaches: (\d) of 8", output) >= 6


@example("own_plugin")
def own_plugin(output: str, folder: Path) -> None:
    assert number(r"gradient norm in the end: ([\d.e+-]+)", output) > 0
    assert number(r"validation_time: ([\d.]+) ms", output) > 0
    assert "gradient_size" in part(r"metrics recorded: (.*)", output)
    assert number(r"validation loss ([\d.e+-]+)", output) < 0.02  # the noise in the data alone is 0.01


@example("loggers", "--epochs", "2")
def loggers(output: str, folder: Path) -> None:
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = folder / part(r"run directory: (\S+)", output)
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    records = [(record["step"], record["metrics"]) for record in journal if record["event"] == "log_metrics"]
    losses = [(step, metrics["val_loss"]) for step, metrics in records if "val_loss" in metrics]
    assert len(losses) == 2
    events = EventAccumulator(str(folder / part(r"tensorboard --logdir (\S+)", output) / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == [(step, pytest.approx(loss)) for step, loss in losses]
    assert events.Images("first unit") and events.Tensors("note/text_summary")
    client = MlflowClient(part(r"--backend-store-uri (\S+)", output))
    (stored,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [(metric.step, metric.value) for metric in client.get_metric_history(stored.info.run_id, "val_loss")] == losses
    assert list((folder / part(r"wandb sync (\S+)", output)).glob("run-*.wandb"))
    assert sorted(each.name for each in folder.iterdir()) == ["runs"], "nothing is written anywhere else"


@example("averaging", "--data", "FASHION_MNIST", "--limit", "3000", "--epochs", "2")
def averaging(output: str, folder: Path) -> None:
    rows = dict(re.findall(r"^(SGD.*?|SWA|EMA.*?) {2,}([\d.]+) %", output, re.MULTILINE))
    assert len(rows) == 5 and all(float(value) > 70 for value in rows.values()), output


@example("tune", "--epochs", "6", "--max-batch-size", "48", "--plot", "rates.png")
def tune(output: str, folder: Path) -> None:
    size, tried = part(r"batch size (\d+) \(was 8\)", output), part(r"trials: \[(.*)\]", output)
    assert size == "48" and tried == "2, 4, 8, 16, 32, 48, 48", "doubled, up to the limit, and confirmed"
    rate = part(r"by minimum +(\S+) +<- chosen", output)
    assert 0.003 < float(rate) < 0.5 and rate != "1.00e-02", "another one than before"
    assert f"trained with batches of {size} and a learning rate of {rate}" in output
    assert "epoch 6/6: step 180" in output, "30 batches of 48 in 1397 samples"
    assert number(r"other images: ([\d.]+)", output) > 0.85
    assert (folder / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(each.name for each in folder.iterdir()) == ["rates.png", "runs"], "nothing is written anywhere else"


@example("preemptible")
def preemptible(output: str, folder: Path) -> None:
    """Stopped at step 60 and started again in another folder, it ends with the same line: steps, loss, and every bit of the weights."""
    (other := folder / "other").mkdir()
    stopped = start(EXAMPLES / "preemptible.py", other, "--preempt-at", "60")
    assert stopped.returncode == 143, stopped.stdout
    assert "steps:" not in stopped.stdout
    again = output_of("preemptible", other)
    assert "goes on from" in again and "step 61" in again
    assert part(r"(steps: .*)", again) == part(r"(steps: .*)", output)


# ---------------------------------------------------------------------- more of fashion_mnist


@pytest.mark.slow
def test_fashion_mnist_in_full_equals_the_plain_loop(tmp_path: Path) -> None:
    output = output_of("fashion_mnist", tmp_path, "--data", str(fashion_mnist()))
    assert equal_bit_for_bit(output, epochs=5) > 0.83


def module(name: str) -> Any:
    """The functions of an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.slow
def test_fashion_mnist_without_data_reads_what_torchvision_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "data/FashionMNIST/raw"  # torchvision finds it here and downloads nothing
    raw.mkdir(parents=True)
    for packed in fashion_mnist().glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    example = module("fashion_mnist")
    parts = [example.datasets(folder) for folder in (None, raw, fashion_mnist())]
    assert [len(each) for each in parts[0]] == [60_000, 10_000]
    for by_torchvision, unpacked, packed in zip(*parts, strict=True):
        for one, two, three in zip(by_torchvision.tensors, unpacked.tensors, packed.tensors, strict=True):
            assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("what", ["losses", "parameters"])
def test_fashion_mnist_fails_if_the_trainings_differ(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = module("fashion_mnist")
    by_hand, small = example.by_hand, torch.utils.data.TensorDataset(torch.rand(40, 28, 28), torch.arange(40) % 10)

    def a_little_different(*arguments: Any) -> Any:
        network, history = by_hand(*arguments)
        if what == "losses":
            history[-1] = (math.nextafter(history[-1][0], 9.0), *history[-1][1:])
        else:
            network.l2.bias.data[3] += 1e-7
        return network, history

    monkeypatch.setattr(example, "datasets", lambda folder: [small, small])
    monkeypatch.setattr(sys, "argv", ["fashion_mnist.py", "--epochs", "1"])
    example.main()
    monkeypatch.setattr(example, "by_hand", a_little_different)
    with pytest.raises(SystemExit, match="DIFFER"):
        example.main()


# ---------------------------------------------------------------------- more of own_plugin


@pytest.mark.slow
def test_own_plugin_becomes_a_package_in_the_way_it_says(tmp_path: Path) -> None:
    source = (EXAMPLES / "own_plugin.py").read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    (plugin,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GradientSize"]
    module = [*(ast.unparse(node) for node in imports), *lines[plugin.decorator_list[0].lineno - 1 : plugin.end_lineno]]
    shown = source[source.index("pyproject.toml ") : source.index("After `pip install")]

    package, installed = tmp_path / "package", tmp_path / "installed"
    package.mkdir()
    (package / "torchplug_gradient_size.py").write_text("\n".join(module) + "\n", encoding="utf-8")
    (package / "pyproject.toml").write_text(re.sub(r"(?m)^( |pyproject\.toml)+", "", shown), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(installed), str(package)]
    subprocess.run(pip, check=True, timeout=120)

    script = tmp_path / "use.py"
    script.write_text("from torchplug import Trainer\nprint(Trainer(plugins=[{'gradient_size': {'norm_type': 1.0}}]).enabled)\n")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120)
    assert "{'gradient_size': GradientSize(norm_type=1.0)}" in done.stdout, done.stderr
