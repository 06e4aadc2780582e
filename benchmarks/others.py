"""The same work with other trainers, written as their documentation does it; each is imported only when it is asked for."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contenders import MLP, Work
from measuring import WINDOW, Batch, Batches
from torch import Tensor, nn


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A folder for what is written; what is warned of is not shown."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield folder


# ---------------------------------------------------------------------- Lightning


def lightning(level: str) -> Work:
    """``"bare"``: nothing on. ``"one log"``: on step and epoch. ``"usual"``: also a validation and its bar, callbacks and TensorBoard."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it sets its own when it is imported

    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            if level != "bare":
                self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=32)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=0.01)

    class Validated(Lit):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", nn.functional.cross_entropy(self.net(x), y), batch_size=32)

    def run(batches: Batches) -> nn.Module:
        with _folder() as folder:
            options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            if level == "usual":
                callbacks = [ModelCheckpoint(folder, monitor="val_loss"), EarlyStopping("val_loss")]
                options = {"logger": TensorBoardLogger(folder), "callbacks": callbacks}
            trainer = Trainer(
                max_epochs=1, accelerator="cpu", enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, **options
            )
            module = Validated() if level == "usual" else Lit()
            trainer.fit(module, batches, Batches(WINDOW) if level == "usual" else None)
            return module.net

    return run


# ---------------------------------------------------------------------- Ignite


def ignite(level: str) -> Work:
    """``"bare"``: an Engine around the step of the loop by hand.

    ``"as documented"``: the process function that its documentation shows, with ``model.train()`` and ``loss.item()`` in each step.
    ``"one log"``: that with a RunningAverage of the loss. ``"usual"``: also a bar, an evaluator, EarlyStopping, Checkpoint, TensorBoard.
    """
    from ignite.engine import Engine
    from ignite.metrics import RunningAverage

    def run(batches: Batches) -> nn.Module:
        net = MLP()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

        def step(engine: Any, batch: Batch) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        def documented(engine: Any, batch: Batch) -> float:
            net.train()
            optimizer.zero_grad()
            x, y = batch
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            return loss.item()

        with _folder() as folder:
            trainer, close = Engine(step if level == "bare" else documented), None
            if level in ("one log", "usual"):
                RunningAverage(output_transform=lambda loss: loss).attach(trainer, "train_loss")
            if level == "usual":
                close = _ignite_handlers(trainer, net, optimizer, folder)
            trainer.run(batches, max_epochs=1)
            if close:
                close()
        return net

    return run


def _ignite_handlers(trainer: Any, net: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> Callable[[], None]:
    """The usual handlers; returns what closes the writer of TensorBoard."""
    from ignite.engine import Events, create_supervised_evaluator
    from ignite.handlers import Checkpoint, DiskSaver, EarlyStopping, ProgressBar, TensorboardLogger, global_step_from_engine
    from ignite.metrics import Loss

    def score(engine: Any) -> float:
        return -float(engine.state.metrics["val_loss"])

    ProgressBar().attach(trainer, ["train_loss"])
    evaluator = create_supervised_evaluator(net, metrics={"val_loss": Loss(nn.CrossEntropyLoss())})
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(Batches(WINDOW)))
    evaluator.add_event_handler(Events.COMPLETED, EarlyStopping(patience=3, score_function=score, trainer=trainer))
    kept = {"net": net, "optimizer": optimizer}
    saved = Checkpoint(kept, DiskSaver(folder, require_empty=False), score_function=score, score_name="val_loss", n_saved=1)
    evaluator.add_event_handler(Events.COMPLETED, saved)
    board = TensorboardLogger(log_dir=folder)
    board.attach_output_handler(
        trainer, Events.ITERATION_COMPLETED(every=WINDOW), tag="train", output_transform=lambda loss: {"loss": loss}
    )
    board.attach_output_handler(
        evaluator, Events.COMPLETED, tag="val", metric_names=["val_loss"], global_step_transform=global_step_from_engine(trainer)
    )
    return board.close


# ---------------------------------------------------------------------- skorch


def skorch(level: str) -> Work:
    """``"callbacks off"``: ``callbacks="disable"``, as its documentation advises for speed; the loss of each batch is in the
    history also then.

    ``"print log off"``: the callbacks it has by itself, ``verbose=0``. ``"usual"``: those, its table, a bar, a validation, EarlyStopping,
    Checkpoint, TensorBoard.
    """
    from skorch import NeuralNetClassifier
    from skorch.helper import predefined_split
    from torch.utils.data import TensorDataset
    from torch.utils.tensorboard import SummaryWriter

    def options(folder: str, validation: TensorDataset) -> dict[str, Any]:
        from skorch.callbacks import Checkpoint, EarlyStopping, ProgressBar, TensorBoard

        if level == "callbacks off":
            return {"callbacks": "disable", "train_split": None}
        if level == "print log off":
            return {"verbose": 0, "train_split": None}
        writer = SummaryWriter(folder)  # type: ignore[no-untyped-call]
        callbacks = [ProgressBar(), EarlyStopping(), Checkpoint(dirname=folder, monitor="valid_loss_best"), TensorBoard(writer)]
        return {"callbacks": callbacks, "train_split": predefined_split(validation), "iterator_valid": lambda *_, **__: Batches(WINDOW)}

    def run(batches: Batches) -> nn.Module:
        data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches.data, strict=True)))
        with _folder() as folder:
            net = NeuralNetClassifier(
                MLP,
                criterion=nn.CrossEntropyLoss,
                optimizer=torch.optim.SGD,
                lr=0.01,
                max_epochs=1,
                iterator_train=lambda *_, **__: batches,  # in the place of a DataLoader, as everybody else has it
                **options(folder, data),
            )
            net.fit(data, None)
            trained: nn.Module = net.module_
            return trained

    return run


# by the name of each: how it is made, and what is measured of it
OTHERS: dict[str, tuple[Callable[[str], Work], list[str]]] = {
    "lightning": (lightning, ["bare", "one log", "usual"]),
    "ignite": (ignite, ["bare", "as documented", "one log", "usual"]),
    "skorch": (skorch, ["callbacks off", "print log off", "usual"]),
}
