"""Mistakes that were in core once, each with what it did to a user."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from torchplug import hookimpl
from torchplug.metrics import MissingMetric


def test_a_loss_that_grows_in_place_after_it_was_logged_is_recorded_as_it_was(tiny: Any, trainer: Any) -> None:
    class Penalised(tiny.Module):
        def __init__(self) -> None:
            super().__init__(val=0)
            self.plain: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.plain.append(float(loss.detach()))
            self.log("plain", loss, on_step=False, on_epoch=True)
            loss += 100.0
            return loss

    module, made = Penalised(), trainer()
    made.fit(module)
    assert made.metrics["plain"] == pytest.approx(sum(module.plain) / len(module.plain), rel=1e-12)


def test_a_test_without_a_module_never_takes_the_checkpoint_of_another_one(tiny: Any, trainer: Any) -> None:
    made = trainer(plugins=[{"checkpoint": {"monitor": "val_loss"}}])
    made.fit(tiny())
    other = tiny()
    with torch.no_grad():
        other.layer.weight.fill_(7.0)
    made.validate(other)
    made.test()
    assert made._module is other
    assert torch.equal(other.layer.weight, torch.full((1, 4), 7.0))


def test_a_misspelt_override_of_load_from_checkpoint_is_an_error(tiny: Any, trainer: Any, tmp_path: Any) -> None:
    class Sized(tiny.Module):
        def __init__(self, hidden: int = 3) -> None:
            super().__init__(val=0)
            self.save_hyperparameters()

    class Save:
        @hookimpl
        def on_train_end(self, run: Any) -> None:
            run.save_checkpoint(tmp_path / "x.safetensors")

    trainer(plugins=[Save()]).fit(Sized())
    assert Sized.load_from_checkpoint(tmp_path / "x.safetensors", hidden=5).hparams.hidden == 5
    with pytest.raises(TypeError, match=r"Sized.__init__ has no argument 'hiden', did you mean 'hidden'\?"):
        Sized.load_from_checkpoint(tmp_path / "x.safetensors", hiden=5)


class Records:
    """What loggers get."""

    def __init__(self) -> None:
        self.all: list[tuple[str, int, dict[str, float]]] = []

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], stage: str, step: int) -> None:
        self.all.append((stage, step, metrics))


def test_what_is_logged_before_the_first_batch_is_recorded_as_training_at_step_0(tiny: Any, trainer: Any) -> None:
    class Early(tiny.Module):
        def on_train_epoch_start(self) -> None:
            self.log("temperature", 1.0)

    records = Records()
    trainer(plugins=[records], max_epochs=1).fit(Early())
    assert records.all[0] == ("train", 0, {"temperature": 1.0})


def test_a_validation_longer_than_its_interval_does_not_run_after_every_batch(tiny: Any, trainer: Any, monkeypatch: Any) -> None:
    clock = [0.0]
    monkeypatch.setattr("torchplug.run.time.monotonic", lambda: clock[0])

    class Slow(tiny.Module):
        validations = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            clock[0] += 1.0
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            clock[0] += 100.0

        def on_validation_end(self) -> None:
            self.validations += 1

    module = Slow(train=20)
    trainer(val_check_interval="5s", num_sanity_val_steps=0).fit(module)
    assert module.validations == 4


class Mean:
    """A metric object as torchmetrics has them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.values: list[float] = []

    def update(self, value: float) -> None:
        self.values.append(value)

    def compute(self) -> Tensor:
        return torch.tensor(sum(self.values) / len(self.values))


def test_a_metric_object_that_is_logged_on_steps_alone_begins_anew_with_each_epoch(tiny: Any, trainer: Any) -> None:
    class Counting(tiny.Module):
        def __init__(self) -> None:
            super().__init__(train=2, val=0)
            self.mean = Mean()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.mean.update(float(self.current_epoch))
            self.log("epoch", self.mean, on_step=True, on_epoch=False)
            return self.loss(batch)

    records = Records()
    trainer(plugins=[records], max_epochs=3, log_every_n_steps=2).fit(Counting())
    assert [metrics["epoch"] for _, _, metrics in records.all if "epoch" in metrics] == [0.0, 1.0, 2.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_forward_that_looks_at_its_run_or_logs_can_be_traced_outside_of_one(tiny: Any) -> None:
    class Looking(tiny.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.log("mean", x.mean())
            return self.layer(x) * (1 + self.current_epoch)

    module, x = Looking(), torch.randn(2, 4)
    assert torch.equal(module.to_torchscript(method="trace", example=x)(x), module(x))


def test_hook_methods_of_a_module_may_have_the_defaults_that_lightning_users_write(tiny: Any, trainer: Any) -> None:
    class Usual(tiny.Module):
        seen: list[Any]

        def setup(self, stage: str | None = None) -> None:
            self.seen = [stage]

        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.seen.append((batch_idx, dataloader_idx))

    module = Usual(val=1, val_loaders=2)
    trainer(max_epochs=1, num_sanity_val_steps=0).fit(module)
    assert module.seen == ["fit", (0, 0), (0, 1)]


def test_samples_are_counted_past_a_scalar_in_front_of_the_batch(tiny: Any, trainer: Any) -> None:
    class Weighted(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("value", float(batch_idx), on_step=False, on_epoch=True)
            return self(batch[1]).mean()

    made = trainer(max_epochs=1)
    made.fit(Weighted(val=0), [(torch.tensor(1.0), torch.randn(4, 4)), (torch.tensor(1.0), torch.randn(2, 4))])
    assert made.run.position.samples == 6
    assert made.metrics["value"] == 2 / 6


def test_a_loss_scaler_may_look_for_its_scale_over_several_short_epochs(tiny: Any, trainer: Any) -> None:
    class Large(tiny.Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch) * 1000

    made = trainer(precision="16-mixed", max_epochs=20)
    made.fit(Large(train=1, val=0, lr=1e-6))
    assert 0 < made.run.position.step < 20


class Stream(IterableDataset[Any]):
    """Seven batches of unknown number."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        for _ in range(7):
            yield torch.randn(4, 4, generator=generator), torch.randn(4, 1, generator=generator)


def test_a_window_that_the_loaders_end_cut_short_does_not_mix_two_loss_scales(tiny: Any, trainer: Any) -> None:
    class Overflowing(tiny.Module):
        def __init__(self) -> None:
            super().__init__(val=0, lr=0.0)
            self.gradients: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch) * 0.01
            return loss * 1e30 if self.current_epoch == 0 and batch_idx == 6 else loss

        def on_before_optimizer_step(self) -> None:
            if self.current_epoch == 1:
                self.gradients.append(float(self.layer.bias.grad))

    found = {}
    for precision in ("32", "16-mixed"):
        module = Overflowing()
        trainer(precision=precision, max_epochs=2, accumulate_grad_batches=2).fit(module, DataLoader(Stream(), batch_size=None))
        found[precision] = module.gradients
    assert found["16-mixed"] == pytest.approx(found["32"], rel=2e-2)


def test_a_loss_that_is_nan_for_one_of_several_optimizers_is_noticed_while_training(tiny: Any, trainer: Any) -> None:
    class Two(tiny.Module):
        def __init__(self) -> None:
            super().__init__(train=100, val=0)
            self.other = nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            return self.loss(batch) * math.nan if optimizer_idx == 0 else self.other(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.layer, self.other)]

    module, made = Two(), trainer(log_every_n_steps=5)
    with pytest.raises(FloatingPointError, match=r"the loss is nan \(seen first at step"):
        made.fit(module)
    assert made.run.position.step < 30


def test_a_plateau_scheduler_whose_metric_comes_too_late_says_when_it_is_needed(tiny: Any, trainer: Any) -> None:
    class Late(tiny.Module):
        def on_train_epoch_end(self) -> None:
            self.log("late", 1.0)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "late"},
            }

    with pytest.raises(MissingMetric) as caught:
        trainer().fit(Late(val=0))
    assert any("must be logged before on_train_epoch_end" in note for note in caught.value.__notes__)
