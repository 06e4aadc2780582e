"""Makes the pictures of the documentation: a small run, as a terminal, TensorBoard and MLflow show it.

python docs/build_pictures.py    # writes docs/pictures/progress.svg, tensorboard.png and mlflow.png

It needs what requirements-dev.txt installs, and Debian's packages chromium and chromium-driver. The tests in
tests/slow/test_browser.py start servers and browser with the functions of this file.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.terminal_theme import DIMMED_MONOKAI
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import torchplug_progress
from torchplug import Module, Run, Trainer, hookimpl, seed_everything

PICTURES = Path(__file__).parent / "pictures"
METRICS = ("train/accuracy", "train/loss", "val/accuracy", "val/loss")

# ---------------------------------------------------------------------- the run


class Digits(Module):
    """Tells which digit an image of 8x8 pixels shows, and logs `METRICS`."""

    def __init__(self, width: int = 32, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def measure(self, batch: Sequence[torch.Tensor], stage: str) -> torch.Tensor:
        images, labels = batch
        logits = self.layers(images)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/accuracy", (logits.argmax(1) == labels).float().mean())
        return loss

    def training_step(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.measure(batch, "train")

    def validation_step(self, batch: Sequence[torch.Tensor]) -> None:
        self.measure(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def train(folder: Path, plugins: list[Any], max_epochs: int = 15) -> Run:
    """A run of `Digits` with its files in ``folder``."""
    seed_everything(1)
    digits = load_digits()
    dataset = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train, val = random_split(dataset, [1397, 400])
    trainer = Trainer(max_epochs=max_epochs, log_every_n_steps=10, root_dir=folder, accelerator="cpu", plugins=plugins)
    trainer.fit(Digits(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=400))
    assert trainer.run is not None
    return trainer.run


# ---------------------------------------------------------------------- the terminal


class Terminal(Console):
    """A terminal of 64 columns, which fits a phone, that remembers what was written and what its bars are."""

    made: list[Terminal] = []  # noqa: RUF012

    def __init__(self, **_: Any) -> None:
        super().__init__(file=io.StringIO(), force_terminal=True, force_interactive=True, width=64, record=True)
        self.live: Live | None = None
        self.made.append(self)

    def set_live(self, live: Live) -> bool:
        self.live = live
        return super().set_live(live)

    def picture(self) -> str:
        """The lines that stay, and the bars below them, as an SVG that fetches no fonts."""
        assert self.live is not None
        lines = re.findall(r"epoch \d+/\d+: .*", self.export_text(clear=False))
        shown = Console(file=io.StringIO(), force_terminal=True, width=self.width, record=True)
        for line in lines:
            shown.print(line, highlight=False)
        shown.print(self.live.get_renderable())
        picture = shown.export_svg(title="trainer.fit(Digits(), train, val)", theme=DIMMED_MONOKAI)
        return re.sub(r"\s*@font-face \{.*?\}|<!--.*?-->", "", picture, flags=re.DOTALL)


def progress(folder: Path) -> str:
    """The display in the middle of the fourth epoch of a run of `Digits`."""
    pictures: list[str] = []
    real = torchplug_progress.Console

    class Camera:
        @hookimpl
        def on_train_batch_end(self, run: Run) -> None:
            time.sleep(0.01)  # so that a person could watch it, and the display is drawn
            if (run.position.epoch, run.position.batch) == (3, 26):
                pictures.append(Terminal.made[-1].picture())

    torchplug_progress.Console = Terminal  # type: ignore[misc]
    try:
        train(folder, ["progress", Camera()], max_epochs=4)
    finally:
        torchplug_progress.Console = real  # type: ignore[misc]
    return pictures[0]


# ---------------------------------------------------------------------- the servers


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The address of a TensorBoard that has read the runs in ``folder``."""
    # names from the folder up, as a user sees them who starts it there
    command = ["-m", "tensorboard.main", "--logdir", folder.name]
    with _server(command, folder.parent, "data/plugin/scalars/tags") as address:
        yield address


@contextmanager
def mlflow(folder: Path) -> Iterator[str]:
    """The address of an MLflow server that keeps everything in ``folder``."""
    store = ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "artifacts"]
    with _server(["-m", "mlflow", "server", *store, "--workers", "1"], folder, "health") as address:
        yield address


@contextmanager
def _server(command: Sequence[str], folder: Path, ready: str) -> Iterator[str]:
    """A server of Python's on a free port of this machine, from its first real answer to ``ready`` on.

    Raises:
        RuntimeError: it ended or did not answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not _answers(f"{address}/{ready}"):
                if server.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    said = output.read().decode(errors="replace")
                    raise RuntimeError(f"{' '.join(command)} does not answer at {address}:\n{said}")
                time.sleep(0.2)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # what it started itself is in its group
            server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.read().strip() != b"{}")  # TensorBoard has not read any run yet
    except OSError:
        return False


# ---------------------------------------------------------------------- the browser


@contextmanager
def browser() -> Iterator[Chrome]:
    """Chromium without a window, and without anything of the user's.

    Raises:
        RuntimeError: it is not installed.
    """
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise RuntimeError("no chromium or no chromedriver in PATH: install Debian's packages chromium and chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = chromium
        for option in ("headless=new", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars", "window-size=1200,1000"):
            options.add_argument(f"--{option}")
        options.add_argument("--no-sandbox")  # it does not start for root otherwise; the pages are our own
        options.add_argument(f"--user-data-dir={profile}")
        page = Chrome(options, Service(driver))
        try:
            yield page
        finally:
            page.quit()


def show(page: Chrome, url: str, names: Sequence[str], seconds: float = 60) -> None:
    """Opens ``url`` and waits until each of the names can be read in the page, and as many curves are drawn.

    Raises:
        TimeoutError: that did not come about.
    """
    page.get(url)
    deadline = time.monotonic() + seconds
    while True:
        text = page.find_element(By.TAG_NAME, "body").text  # what can be seen: neither address nor title
        missing = [name for name in names if name not in text]
        curves = page.execute_script(CURVES)
        if not missing and curves >= len(names):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} shows {curves} curves, and no {', '.join(missing) or 'more'} in this text:\n{text}")
        time.sleep(0.3)


# TensorBoard's and Plotly's lines are paths of the class "line" and "js-line", some of them in shadow trees.
CURVES = """
    const curves = root => [...root.querySelectorAll("*")].reduce((sum, element) => sum
        + (element.matches("path.line, path.js-line") && /L/.test(element.getAttribute("d")))
        + (element.shadowRoot ? curves(element.shadowRoot) : 0), 0);
    return curves(document)"""


def scalars_page(address: str) -> str:
    return f"{address}/#scalars"


def run_page(run: Run) -> str:
    """MLflow's page of a run, with its curves; the address of the run is in the lines that the trainer shows at its end."""
    return f"{run.report['mlflow']}/model-metrics?workflowType=machine_learning"


def save(page: Chrome, path: Path) -> None:
    """What the browser shows, in 256 colours."""
    picture = Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB")
    path.parent.mkdir(exist_ok=True)
    picture.quantize(256).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, browser() as page:
        folder = Path(name)
        (PICTURES / "progress.svg").write_text(progress(folder / "shown"), encoding="utf-8")
        with mlflow(folder) as address:
            run = train(folder / "runs", ["tensorboard", {"mlflow": {"tracking_uri": address}}])
            page.set_window_size(1200, 1205)  # the charts are higher than TensorBoard's
            show(page, run_page(run), METRICS)
            # what covers the curves: the panel of an assistant, and the tools of each chart
            page.find_element(By.CSS_SELECTOR, "[data-component-id='mlflow.assistant.chat_panel.close']").click()
            page.execute_script("for (const tools of document.querySelectorAll('.modebar')) tools.style.display = 'none'")
            time.sleep(2)  # the charts take the room of the panel
            save(page, PICTURES / "mlflow.png")
        with tensorboard(folder / "runs") as address:
            page.set_window_size(1200, 1000)
            show(page, scalars_page(address), METRICS)
            time.sleep(1)
            save(page, PICTURES / "tensorboard.png")


if __name__ == "__main__":
    main()
