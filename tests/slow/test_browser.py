"""A run looks as it should where its user looks at it: a real browser reads its metric in the pages of real servers."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torchplug
from torchplug import Trainer

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "docs" / "build_pictures.py"
METRIC = "lantern/brightness"  # nothing else in a page has this name


@pytest.fixture(scope="module")
def pictures() -> Any:
    """The script that makes the pictures of the documentation: it starts servers and browsers."""
    spec = importlib.util.spec_from_file_location("build_pictures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser(pictures: Any) -> Iterator[Any]:
    with pictures.browser() as browser:
        yield browser


class Lantern(torchplug.Module):
    """Logs `METRIC` at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        self.log(METRIC, loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder: Path, plugin: Any) -> torchplug.Run:
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, root_dir=folder, accelerator="cpu", plugins=[plugin])
    trainer.fit(Lantern(), DataLoader(TensorDataset(torch.rand(20, 1)), batch_size=2))
    assert trainer.run is not None
    return trainer.run


def test_the_scalars_page_of_tensorboard_shows_the_metric_and_its_curve(tmp_path: Path, pictures: Any, browser: Any) -> None:
    fit(tmp_path / "runs", "tensorboard")
    with pictures.tensorboard(tmp_path / "runs") as address:
        pictures.show(browser, pictures.scalars_page(address), [METRIC])
        with pytest.raises(TimeoutError, match="no lantern/darkness"):
            pictures.show(browser, pictures.scalars_page(address), ["lantern/darkness"], seconds=2)


def test_the_page_of_a_run_in_mlflow_shows_the_metric_and_its_curve(tmp_path: Path, pictures: Any, browser: Any) -> None:
    with pictures.mlflow(tmp_path) as address:
        run = fit(tmp_path / "runs", {"mlflow": {"tracking_uri": address}})
        pictures.show(browser, pictures.run_page(run), [METRIC])
        with pytest.raises(TimeoutError, match="no lantern/darkness"):
            pictures.show(browser, pictures.run_page(run), ["lantern/darkness"], seconds=2)


def test_who_has_no_browser_is_told_what_to_install(pictures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="install Debian's packages chromium and chromium-driver"), pictures.browser():
        pass
