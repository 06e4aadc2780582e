"""Number formats: what autocast covers, what the loss scaler does, and what hooks see of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torchplug import Module, hookimpl, seed_everything

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(40, 6, generator=generator), torch.randn(40, 2, generator=generator)), batch_size=4)


class Network(Module):
    """Two layers; notes the formats that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
        self.formats: dict[str, set[Any]] = {}

    def note(self, where: str, output: Tensor) -> Tensor:
        self.formats.setdefault(where, set()).add((torch.is_autocast_enabled("cpu"), output.dtype, next(self.parameters()).dtype))
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.note("train", self.net(batch[0])).float(), batch[1].float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("validate", self.net(batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note("test", self.net(batch[0]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.note("predict", self.net(batch[0]))

    def on_before_backward(self) -> None:
        assert not torch.is_autocast_enabled("cpu")  # backward runs outside of autocast

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("32", (False, torch.float32, torch.float32)),
        ("32-true", (False, torch.float32, torch.float32)),
        ("bf16-mixed", (True, torch.bfloat16, torch.float32)),
        ("16-mixed", (True, torch.float16, torch.float32)),
        (16, (True, torch.float16, torch.float32)),
        ("bf16-true", (False, torch.bfloat16, torch.bfloat16)),
    ],
    ids=str,
)
def test_every_step_runs_in_the_format_that_was_asked_for(precision: Any, expected: Any, trainer: Any) -> None:
    module, made = Network(), trainer(precision=precision)
    made.fit(module, data(), data())
    made.test(module, data())
    made.predict(module, data())
    assert module.formats == {stage: {expected} for stage in ("train", "validate", "test", "predict")}
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_true_casts_floating_point_inputs_and_nothing_else(trainer: Any) -> None:
    class Looking(Network):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen = {name: (part.dtype if isinstance(part, Tensor) else part) for name, part in batch.items()}
            return self.net(batch["x"]).mean()

    batch = {"x": torch.zeros(2, 6), "double": torch.zeros(2, dtype=torch.float64), "class": torch.zeros(2, dtype=torch.int64), "text": "a"}
    module = Looking()
    trainer(precision="bf16-true").fit(module, [batch])
    assert module.seen == {"x": torch.bfloat16, "double": torch.bfloat16, "class": torch.int64, "text": "a"}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", MIXED)
def test_mixed_precision_equals_a_hand_written_loop_bit_for_bit(precision: str, accumulate: int, clip: float | None, trainer: Any) -> None:
    seed_everything(1)
    net = Network()
    optimizer = net.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    batches = list(data())
    for _ in range(2):
        for i, batch in enumerate(batches):
            with torch.autocast("cpu", MIXED[precision]):
                loss = net.training_step(batch, i)
            scaler.scale(loss / min(accumulate, len(batches) - i + i % accumulate)).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(batches):
                scaler.unscale_(optimizer)
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    seed_everything(1)
    module = Network()
    trainer(precision=precision, max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=clip).fit(module, data())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), module.parameters(), strict=True))


class Watch:
    """Keeps what a plugin sees of gradients and updates."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.after_backward: list[Tensor] = []
        self.before_step: list[list[Tensor]] = []
        self.updates: list[int] = []
        self.skips: list[str] = []
        self.scheduled = 0

    @hookimpl
    def on_before_backward(self, loss: Tensor) -> None:
        self.losses.append(float(loss.detach()))

    @hookimpl
    def on_after_backward(self, run: Any) -> None:
        gradient = run.module.net[0].weight.grad
        self.after_backward.append(gradient if gradient is None else gradient.clone())

    @hookimpl
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert not torch.is_autocast_enabled("cpu")
        self.before_step.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    @hookimpl
    def on_after_optimizer_step(self, run: Any) -> None:
        self.updates.append(run.position.micro_step)

    @hookimpl
    def on_step_skipped(self, reason: str) -> None:
        self.skips.append(reason)

    @hookimpl
    def on_scheduler_step(self) -> None:
        self.scheduled += 1


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", MIXED)
def test_gradients_before_the_step_are_those_of_full_precision(precision: str, accumulate: int, trainer: Any) -> None:
    seen = {}
    for each in ("32", precision):
        seed_everything(1)
        watch = Watch()
        trainer(precision=each, accumulate_grad_batches=accumulate, limit_train_batches=accumulate, plugins=[watch]).fit(Network(), data())
        seen[each] = watch
    for exact, half in zip(seen["32"].before_step[0], seen[precision].before_step[0], strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
    assert seen[precision].losses == pytest.approx(seen["32"].losses, rel=0.02)  # not scaled, not divided


class Overflowing(Network):
    """The gradient is infinite in one batch."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.bad = bad
        self.net[0].weight.register_hook(self.spoil)

    def spoil(self, gradient: Tensor) -> Tensor:
        return gradient * math.inf if self.run.position.micro_step == self.bad else gradient

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.0)  # so that gradients of the same batch can be compared
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]


def test_an_update_with_an_infinite_gradient_is_skipped_told_and_not_counted(trainer: Any) -> None:
    watch, module = Watch(), Overflowing(bad=2)
    made = trainer(precision="16-mixed", plugins=[watch])
    same = [next(iter(data()))] * 5
    made.fit(module, same)
    assert watch.skips == ["the gradients were not finite; the loss scale was lowered"]
    assert (made.run.position.step, made.run.optimizer_steps, made.run.position.micro_step) == (4, [4], 5)
    assert watch.updates == [0, 1, 3, 4]
    assert watch.scheduled == 4  # a scheduler counts updates
    assert not watch.before_step[2][0].isfinite().any()
    assert all(gradient.isfinite().all() for i in (0, 1, 3, 4) for gradient in watch.before_step[i])  # nothing of it is left
    scale = watch.after_backward[1] / watch.before_step[1][0]
    lowered = watch.after_backward[3] / watch.before_step[3][0]
    assert scale.nanmean() == pytest.approx(65536)
    assert lowered.nanmean() == pytest.approx(32768)


def test_parameters_stay_what_they_were_when_an_update_is_skipped(trainer: Any) -> None:
    class Keeping(Overflowing):
        def __init__(self) -> None:
            super().__init__(bad=1)
            self.kept: list[Tensor] = []

        def on_train_batch_end(self) -> None:
            self.kept.append(self.net[0].weight.detach().clone())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Keeping()
    trainer(precision="16-mixed").fit(module, data())
    assert torch.equal(module.kept[0], module.kept[1])
    assert not torch.equal(module.kept[1], module.kept[2])


def test_without_a_scaler_an_infinite_gradient_is_not_hidden(trainer: Any) -> None:
    with pytest.raises(FloatingPointError, match=r"nan|inf"):
        trainer(precision="bf16-mixed").fit(Overflowing(bad=2), data())


class Two(Network):
    """Two optimizers, one for each layer."""

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Tensor:
        return 0.01 * F.mse_loss(self.net(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


def test_two_optimizers_share_one_scale(trainer: Any) -> None:
    class OneBad(Two):
        def __init__(self) -> None:
            super().__init__()
            self.net[2].weight.register_hook(lambda gradient: gradient * math.inf if self.run.position.micro_step == 1 else gradient)

    watch = Watch()
    made = trainer(precision="16-mixed", plugins=[watch])
    made.fit(OneBad(), data())
    assert (made.run.optimizer_steps, made.run.position.step, len(watch.skips)) == ([10, 9], 10, 1)


@pytest.mark.parametrize("steps", [1, 2])
def test_manual_optimization_is_scaled_too(steps: int, trainer: Any) -> None:
    class Manual(Network):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(steps):
                optimizer.zero_grad()
                self.manual_backward(0.1 * F.mse_loss(self.net(batch[0]).float(), batch[1]))
                assert self.net[0].weight.grad.abs().max() > 100  # scaled
                optimizer.step()

    watch = Watch()
    made = trainer(precision="16-mixed", plugins=[watch], gradient_clip_val=1.0)
    made.fit(Manual(), data())
    assert (made.run.optimizer_steps, made.run.position.step) == ([10 * steps], 10)
    assert max(float(gradient.abs().max()) for gradients in watch.before_step for gradient in gradients) < 100


@pytest.mark.parametrize("precision", MIXED)
def test_in_manual_optimization_a_second_forward_sees_what_the_first_step_changed(precision: str, trainer: Any) -> None:
    """Autocast keeps the low-precision copies of weights that it made; after an update they are out of date."""

    class Twice(Network):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(2):
                self.manual_backward(0.1 * F.mse_loss(self.net(batch[0]).float(), batch[1]))
                self.optimizers().step()
                self.optimizers().zero_grad()

    seed_everything(1)
    net = Network()
    optimizer = net.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    for x, y in data():
        for _ in range(2):
            with torch.autocast("cpu", MIXED[precision]):
                loss = 0.1 * F.mse_loss(net.net(x).float(), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    seed_everything(1)
    module = Twice()
    trainer(precision=precision).fit(module, data())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), module.parameters(), strict=True))


def test_an_optimizer_that_evaluates_the_loss_itself_cannot_be_scaled(trainer: Any) -> None:
    class Closed(Network):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match=r"precision='16-mixed' cannot be used with LBFGS, which evaluates the loss itself"):
        trainer(precision="16-mixed").fit(Closed(), data())


def test_steps_that_were_skipped_for_none_need_no_scaler(trainer: Any) -> None:
    class Skipping(Network):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else 0.01 * super().training_step(batch, batch_idx)

    made = trainer(precision="16-mixed")
    made.fit(Skipping(), data())
    assert made.run.position.step == 5
