"""The numbers of a hand-written loop, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from torchplug import Module, hookimpl, seed_everything

EPOCHS = 3


def data(samples: int = 40, seed: int = 7) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(samples, 6, generator=generator), torch.randn(samples, 2, generator=generator))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 2))


@dataclass(frozen=True)
class Recipe:
    """What both loops are told to do."""

    accumulate: int = 1
    clip: float | None = None
    algorithm: str = "norm"
    interval: str | None = None  # of the scheduler
    workers: int = 0
    momentum: float = 0.9

    def loader(self) -> DataLoader[Any]:
        return DataLoader(data(), batch_size=4, shuffle=True, num_workers=self.workers)

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=0.1, momentum=self.momentum)


class Regression(Module):
    """The same training as `by_hand`, as a module."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.net, self.recipe = network(), recipe
        self.losses: list[Tensor] = []
        self.val_losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.recipe.optimizer(self)
        if self.recipe.interval is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.recipe.interval}}


class Validated(Regression):
    def validation_step(self, batch: Any) -> None:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.val_losses.append(loss)
        self.log("val_loss", loss)


def validate_by_hand(net: nn.Module, loader: Any) -> list[Tensor]:
    net.eval()
    with torch.no_grad():
        losses = [F.mse_loss(net(x), y) for x, y in loader]
    net.train()
    return losses


def by_hand(recipe: Recipe, val_loader: Any = None, val_every: int | None = None) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """The loop that a good engineer writes, without any framework."""
    seed_everything(1)
    net = network()
    loader, optimizer = recipe.loader(), recipe.optimizer(net)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    losses, val_losses = [], []
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(loader):
            window = min(recipe.accumulate, len(loader) - i + i % recipe.accumulate)
            loss = F.mse_loss(net(x), y)
            losses.append(loss.detach())
            (loss / window).backward()
            if (i + 1) % recipe.accumulate == 0 or i + 1 == len(loader):
                if recipe.clip is not None and recipe.algorithm == "norm":
                    nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
                elif recipe.clip is not None:
                    nn.utils.clip_grad_value_(net.parameters(), recipe.clip)
                optimizer.step()
                optimizer.zero_grad()
                if recipe.interval == "step":
                    scheduler.step()
            if val_every is not None and (i + 1) % val_every == 0:
                val_losses += validate_by_hand(net, val_loader)
        if val_loader is not None and val_every is None:
            val_losses += validate_by_hand(net, val_loader)
        if recipe.interval == "epoch":
            scheduler.step()
    return net, losses, val_losses


@pytest.fixture
def trained(trainer: Any) -> Callable[..., Any]:
    """Trains a module that `make` builds right after seeding."""

    def train(make: Callable[[], Any], *loaders: Any, **options: Any) -> Any:
        seed_everything(1)
        module = make()
        trainer(**{"max_epochs": EPOCHS, **options}).fit(module, *loaders)
        return module

    return train


def same(left: nn.Module, right: nn.Module) -> bool:
    """Whether all parameters and buffers are equal bit for bit."""
    a, b = left.state_dict(), right.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


RECIPES = {
    "plain": Recipe(),
    "no momentum": Recipe(momentum=0.0),
    "scheduler per step": Recipe(interval="step"),
    "scheduler per epoch": Recipe(interval="epoch"),
    "accumulation with a short last window": Recipe(accumulate=3),
    "accumulation longer than an epoch": Recipe(accumulate=20),
    "clipping by norm": Recipe(clip=0.05),
    "clipping by value": Recipe(clip=0.01, algorithm="value"),
    "two workers": Recipe(workers=2),
    "everything, clipped by norm, per step": Recipe(3, 0.05, "norm", "step"),
    "everything, clipped by value, per epoch": Recipe(3, 0.01, "value", "epoch"),
    "everything with two workers": Recipe(3, 0.05, "norm", "step", workers=2),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_parameters_and_losses_are_those_of_a_hand_written_loop(recipe: Recipe, trained: Any) -> None:
    net, losses, _ = by_hand(recipe)
    module = trained(
        lambda: Regression(recipe),
        recipe.loader(),
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=recipe.clip,
        gradient_clip_algorithm=recipe.algorithm,
    )
    assert torch.equal(torch.stack(module.losses), torch.stack(losses))
    assert same(module.net, net)


def test_the_recipes_differ_from_each_other() -> None:
    """A recipe that changed nothing would prove nothing."""
    finals = [by_hand(recipe)[0] for name, recipe in RECIPES.items() if "workers" not in name]
    assert not any(same(a, b) for i, a in enumerate(finals) for b in finals[:i])


@pytest.mark.parametrize("sanity", [0, 2, -1])
@pytest.mark.parametrize("val_every", [None, 4])
def test_validation_and_sanity_check_change_no_number(sanity: int, val_every: int | None, trained: Any) -> None:
    recipe = Recipe(interval="step")
    val_loader = DataLoader(data(10, seed=8), batch_size=4)
    net, losses, val_losses = by_hand(recipe, val_loader, val_every)
    module = trained(
        lambda: Validated(recipe), recipe.loader(), val_loader, num_sanity_val_steps=sanity, val_check_interval=val_every or 1.0
    )
    tried = 3 if sanity == -1 else sanity  # what the sanity check computed comes first
    assert torch.equal(torch.stack(module.losses), torch.stack(losses))
    assert torch.equal(torch.stack(module.val_losses[tried:]), torch.stack(val_losses))
    assert same(module.net, net)


class Observer:
    """Listens to everything that happens in a step and changes nothing."""

    def __init__(self) -> None:
        self.seen = 0

    @hookimpl
    def on_train_batch_start(self, run: Any, batch: Any) -> None:
        self.seen += 1

    @hookimpl
    def on_before_backward(self, loss: Tensor) -> None:
        self.seen += 1

    @hookimpl
    def on_before_optimizer_step(self, run: Any, optimizer: Any) -> None:
        self.norm = torch.stack([p.grad.norm() for p in run.module.parameters()])

    @hookimpl(wrapper=True)
    def train_step(self) -> Iterator[None]:
        return (yield)

    @hookimpl
    def on_train_batch_end(self, run: Any, outputs: Tensor) -> None:
        run.log("seen", outputs, on_step=True, on_epoch=True)

    @hookimpl
    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.last = metrics

    @hookimpl
    def on_train_epoch_end(self, run: Any) -> None:
        self.metrics = dict(run.metrics.results())


def test_plugins_that_only_observe_change_no_number(trained: Any) -> None:
    recipe = Recipe(3, 0.05, "norm", "step")
    net, losses, _ = by_hand(recipe)
    observer = Observer()
    module = trained(
        lambda: Regression(recipe),
        recipe.loader(),
        accumulate_grad_batches=3,
        gradient_clip_val=0.05,
        log_every_n_steps=1,
        plugins=[observer],
    )
    assert observer.seen == 2 * len(losses)
    assert torch.equal(torch.stack(module.losses), torch.stack(losses))
    assert same(module.net, net)


# ---------------------------------------------------------------------- optimizers that evaluate the loss themselves


class WithLBFGS(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.02, max_iter=4)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_lbfgs_equals_a_hand_written_loop(clip: float | None, trained: Any) -> None:
    seed_everything(1)
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.02, max_iter=4)
    losses = []
    for _ in range(EPOCHS):
        for x, y in Recipe().loader():

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.mse_loss(net(x), y)
                losses.append(loss.detach())
                loss.backward()
                if clip is not None:  # every evaluation's gradient, or the search would mix clipped with unclipped ones
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                return loss

            optimizer.step(closure)
    module = trained(WithLBFGS, Recipe().loader(), gradient_clip_val=clip)
    assert len(losses) > EPOCHS * 10  # it did evaluate several times
    assert torch.equal(torch.stack(module.losses), torch.stack(losses))
    assert same(module.net, net)


# ---------------------------------------------------------------------- two optimizers


def pair() -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6)), nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def adversarial(g: nn.Module, d: nn.Module, real: Tensor, which: int) -> Tensor:
    """The generator's loss (0) or the discriminator's (1)."""
    noise = torch.randn(len(real), 3)
    if which == 0:
        return F.softplus(-d(g(noise))).mean()
    return F.softplus(-d(real)).mean() + F.softplus(d(g(noise).detach())).mean()


def gan_by_hand(accumulate: int = 1, clip: float | None = None) -> tuple[nn.ModuleList, list[Tensor]]:
    seed_everything(1)
    g, d = pair()
    optimizers = [torch.optim.Adam(g.parameters(), lr=0.01), torch.optim.Adam(d.parameters(), lr=0.02)]
    losses = []
    for _ in range(EPOCHS):
        loader = Recipe().loader()
        for i, (x, _) in enumerate(loader):
            window = min(accumulate, len(loader) - i + i % accumulate)
            for which, optimizer in enumerate(optimizers):
                own = [g, d][which]
                own.requires_grad_(True)
                [d, g][which].requires_grad_(False)
                loss = adversarial(g, d, x, which)
                losses.append(loss.detach())
                (loss / window).backward()
                if (i + 1) % accumulate == 0 or i + 1 == len(loader):
                    if clip is not None:
                        nn.utils.clip_grad_norm_(own.parameters(), clip)
                    optimizer.step()
                    optimizer.zero_grad()
    return nn.ModuleList([g, d]), losses


class Gan(Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.d = pair()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Tensor:
        loss = adversarial(self.g, self.d, batch[0], optimizer_idx)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.g.parameters(), lr=0.01), torch.optim.Adam(self.d.parameters(), lr=0.02)]


class ManualGan(Gan):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for which, optimizer in enumerate(self.optimizers()):
            loss = adversarial(self.g, self.d, batch[0], which)
            self.losses.append(loss.detach())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.05), (3, None), (3, 0.05)])
def test_a_gan_with_optimizer_idx_equals_a_hand_written_loop(accumulate: int, clip: float | None, trained: Any) -> None:
    both, losses = gan_by_hand(accumulate, clip)
    module = trained(Gan, Recipe().loader(), accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    assert torch.equal(torch.stack(module.losses), torch.stack(losses))
    assert same(nn.ModuleList([module.g, module.d]), both)


def test_a_gan_in_manual_optimization_equals_a_hand_written_loop(trained: Any) -> None:
    both, losses = gan_by_hand()
    module = trained(ManualGan, Recipe().loader())
    assert torch.equal(torch.stack(module.losses), torch.stack(losses))
    assert same(nn.ModuleList([module.g, module.d]), both)


# ---------------------------------------------------------------------- accumulation against the large batch


class Skipping(Module):
    """Keeps the gradient of every window; returns None for some batches."""

    def __init__(self, skipped: set[int]) -> None:
        super().__init__()
        self.net, self.skipped = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)), skipped
        self.gradients: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx in self.skipped else F.mse_loss(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self) -> None:
        self.gradients.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stream(IterableDataset[Any]):
    """Batches without a length, or with the one that its author believes."""

    def __init__(self, claims: int | None) -> None:
        self.claims = claims

    def __iter__(self) -> Iterator[Any]:
        return iter(data())

    def __len__(self) -> int:
        if self.claims is None:
            raise TypeError("no length")
        return self.claims


class Misjudged(list[Any]):
    """A loader whose length is wrong."""

    def __len__(self) -> int:
        return self.claims


def misjudged(claims: int) -> Misjudged:
    loader = Misjudged(DataLoader(data(), batch_size=4))
    loader.claims = claims
    return loader


SOURCES: dict[str, Callable[[], Any]] = {
    "known length": lambda: DataLoader(data(), batch_size=4),
    "list of batches": lambda: list(DataLoader(data(), batch_size=4)),
    "no length": lambda: DataLoader(Stream(None), batch_size=4),
    "iterable dataset with a length that is too short": lambda: DataLoader(Stream(17), batch_size=4),
    "iterable dataset with a length that is too long": lambda: DataLoader(Stream(99), batch_size=4),
    "a length that is too long": lambda: misjudged(12),
    "an exact length": lambda: misjudged(10),
}


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("skipped", [set(), {1}, {2}, {0, 4}, {9}, {3, 4, 5}, {8, 9}], ids=str)
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_gradient_of_a_window_is_that_of_the_concatenated_batch(source: Any, skipped: set[int], trained: Any) -> None:
    module = trained(lambda: Skipping(skipped), source(), accumulate_grad_batches=3, max_epochs=1)
    seed_everything(1)
    reference = Skipping(set())
    batches = list(DataLoader(data(), batch_size=4))
    windows = [[i for i in range(start, min(start + 3, 10)) if i not in skipped] for start in range(0, 10, 3)]
    windows = [window for window in windows if window]
    assert len(module.gradients) == len(windows)
    for window, gradients in zip(windows, module.gradients, strict=True):
        x, y = (torch.cat([batches[i][part] for i in window]) for part in (0, 1))
        reference.zero_grad()
        F.mse_loss(reference.net(x), y).backward()
        for p, gradient in zip(reference.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=0, atol=1e-6)
        with torch.no_grad():
            for p, gradient in zip(reference.parameters(), gradients, strict=True):
                p.add_(gradient, alpha=-0.1)


def test_a_length_that_is_too_short_splits_a_window_but_each_part_is_a_true_mean(trained: Any) -> None:
    """The loader promised 4 batches, so the fourth ended a window; the six that came after are windows by their index."""
    module = trained(lambda: Skipping(set()), misjudged(4), accumulate_grad_batches=3, max_epochs=1)
    seed_everything(1)
    reference = Skipping(set())
    batches = list(DataLoader(data(), batch_size=4))
    for window, gradients in zip([(0, 1, 2), (3,), (4, 5), (6, 7, 8), (9,)], module.gradients, strict=True):
        x, y = (torch.cat([batches[i][part] for i in window]) for part in (0, 1))
        reference.zero_grad()
        F.mse_loss(reference.net(x), y).backward()
        for p, gradient in zip(reference.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=0, atol=1e-6)
        with torch.no_grad():
            for p, gradient in zip(reference.parameters(), gradients, strict=True):
                p.add_(gradient, alpha=-0.1)


class Rows(Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((6,), float(index))


def test_batches_come_in_the_order_that_the_loader_draws(trainer: Any) -> None:
    class Order(Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.order = nn.Linear(6, 1), []

        def training_step(self, batch: Tensor) -> Tensor:
            self.order += batch[:, 0].tolist()
            return self.layer(batch).mean() * 1e-9

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    module = Order()
    seed_everything(11)
    trainer(max_epochs=2).fit(module, DataLoader(Rows(), batch_size=5, shuffle=True))
    seed_everything(11)
    loader = DataLoader(Rows(), batch_size=5, shuffle=True)
    assert module.order == [value for _ in range(2) for batch in loader for value in batch[:, 0].tolist()]
