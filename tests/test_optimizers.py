"""What `configure_optimizers` may return, and what is said of everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR

from torchplug.optimizers import Scheduler, needs_closure, only, parse


def optimizer(lr: float = 0.1) -> SGD:
    return SGD([nn.Parameter(torch.zeros(2))], lr=lr)


def both() -> tuple[SGD, StepLR]:
    one = optimizer()
    return one, StepLR(one, 1)


# each form, and (optimizers, [(interval, frequency, monitor, name) of each scheduler])
FORMS: dict[str, tuple[Callable[[], Any], int, list[tuple[Any, ...]]]] = {
    "one": (optimizer, 1, []),
    "list of one": (lambda: [optimizer()], 1, []),
    "list of two": (lambda: [optimizer(), optimizer()], 2, []),
    "tuple of two": (lambda: (optimizer(), optimizer()), 2, []),
    "two lists": (lambda: [[part] for part in both()], 1, [("epoch", 1, None, None)]),
    "tuple of two lists": (lambda: tuple([part] for part in both()), 1, [("epoch", 1, None, None)]),
    "list and empty list": (lambda: ([optimizer(), optimizer()], []), 2, []),
    "list and one scheduler": (lambda: ((pair := both()) and [pair[0]], pair[1]), 1, [("epoch", 1, None, None)]),
    "list and dict of scheduler": (
        lambda: ([(pair := both())[0]], {"scheduler": pair[1], "interval": "step"}),
        1,
        [("step", 1, None, None)],
    ),
    "lists with dict of scheduler": (
        lambda: ([(pair := both())[0]], [{"scheduler": pair[1], "interval": "step", "frequency": 5, "name": "warm"}]),
        1,
        [("step", 5, None, "warm")],
    ),
    "dict": (lambda: {"optimizer": optimizer()}, 1, []),
    "dict with scheduler": (lambda: dict(zip(("optimizer", "lr_scheduler"), both(), strict=True)), 1, [("epoch", 1, None, None)]),
    "dict with dict of scheduler": (
        lambda: {"optimizer": (pair := both())[0], "lr_scheduler": {"scheduler": pair[1], "interval": "epoch", "frequency": 2}},
        1,
        [("epoch", 2, None, None)],
    ),
    "dict with several schedulers": (
        lambda: {
            "optimizer": (pair := both())[0],
            "lr_scheduler": [pair[1], {"scheduler": ExponentialLR(pair[0], 0.9), "interval": "step"}],
        },
        1,
        [("epoch", 1, None, None), ("step", 1, None, None)],
    ),
    "dict with monitor beside": (
        lambda: {"optimizer": (one := optimizer()), "lr_scheduler": ReduceLROnPlateau(one), "monitor": "val_loss"},
        1,
        [("epoch", 1, "val_loss", None)],
    ),
    "dict with monitor inside": (
        lambda: {"optimizer": (one := optimizer()), "lr_scheduler": {"scheduler": ReduceLROnPlateau(one), "monitor": "val_loss"}},
        1,
        [("epoch", 1, "val_loss", None)],
    ),
    "the monitor inside wins": (
        lambda: {"optimizer": (one := optimizer()), "lr_scheduler": {"scheduler": ReduceLROnPlateau(one), "monitor": "b"}, "monitor": "a"},
        1,
        [("epoch", 1, "b", None)],
    ),
    "Lightning's reduce_on_plateau is accepted": (
        lambda: {
            "optimizer": (one := optimizer()),
            "lr_scheduler": {"scheduler": ReduceLROnPlateau(one), "monitor": "a", "reduce_on_plateau": True, "strict": False},
        },
        1,
        [("epoch", 1, "a", None)],
    ),
    "several dicts": (
        lambda: [{"optimizer": optimizer()}, dict(zip(("optimizer", "lr_scheduler"), both(), strict=True))],
        2,
        [("epoch", 1, None, None)],
    ),
    "tuple of dicts": (
        lambda: tuple(dict(zip(("optimizer", "lr_scheduler"), both(), strict=True)) for _ in range(2)),
        2,
        [("epoch", 1, None, None)] * 2,
    ),
    "none": (lambda: None, 0, []),
}


@pytest.mark.parametrize(("make", "count", "expected"), FORMS.values(), ids=FORMS)
def test_every_form_becomes_optimizers_and_schedulers_with_their_turns(make: Any, count: int, expected: Any) -> None:
    optimizers, schedulers = parse(make())
    assert len(optimizers) == count
    assert all(isinstance(each, torch.optim.Optimizer) for each in optimizers)
    assert [(s.interval, s.frequency, s.monitor, s.name) for s in schedulers] == expected
    assert all(any(s.optimizer is each for each in optimizers) for s in schedulers)


@pytest.mark.parametrize(("make", "count", "expected"), FORMS.values(), ids=FORMS)
def test_every_form_trains(make: Any, count: int, expected: Any, tiny: Any, trainer: Any) -> None:
    """The parameters are those of the form's own optimizers; what counts here is that each steps and each scheduler too."""
    if count == 0:
        return

    class Formed(tiny.Module):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return make()

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizers = self.optimizers()
            for each in optimizers if isinstance(optimizers, list) else [optimizers]:
                parameter = each.param_groups[0]["params"][0]
                self.manual_backward((parameter - 1).square().sum())
                each.step()
                each.zero_grad()
            schedulers = self.lr_schedulers()
            for each in schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []:
                each.step(*([1.0] if isinstance(each, ReduceLROnPlateau) else []))

    made = trainer()
    made.fit(Formed(train=2, val=0))
    assert made.run.optimizer_steps == [2] * count
    assert len(made.run.schedulers) == len(expected)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a text": (lambda: "sgd", TypeError, r"configure_optimizers must return one optimizer, a list of them.*got str"),
    "a class": (lambda: SGD, TypeError, r"configure_optimizers must return .*got type"),
    "a number in a list": (lambda: [optimizer(), 3], TypeError, r"got int in place of an optimizer"),
    "a scheduler as an optimizer": (lambda: both()[1], TypeError, r"configure_optimizers must return .*got StepLR"),
    "a scheduler in place of an optimizer": (lambda: [both()[1]], TypeError, r"got StepLR in place of an optimizer"),
    "optimizer and scheduler as a plain pair": (both, TypeError, r"got StepLR in place of an optimizer"),
    "parameters": (lambda: nn.Linear(1, 1).parameters(), TypeError, r"got generator"),
    "a dict without optimizer": (lambda: {"lr_scheduler": both()[1]}, TypeError, r"got NoneType in place of an optimizer"),
    "an empty dict": (dict, TypeError, r"in place of an optimizer"),
    "a misspelt key": (lambda: {"optimiser": optimizer()}, ValueError, r"unknown key 'optimiser', did you mean 'optimizer'\?"),
    "an unknown key": (
        lambda: {"optimizer": optimizer(), "scheduler": both()[1]},
        ValueError,
        r"unknown key 'scheduler', did you mean 'lr_scheduler'\? \(there are: optimizer, lr_scheduler, monitor\)",
    ),
    "a misspelt scheduler key": (
        lambda: {"optimizer": (p := both())[0], "lr_scheduler": {"scheduler": p[1], "intervall": "step"}},
        ValueError,
        r"unknown scheduler key 'intervall', did you mean 'interval'\?",
    ),
    "a dict without scheduler": (
        lambda: {"optimizer": optimizer(), "lr_scheduler": {"interval": "step"}},
        ValueError,
        r"the dict of a scheduler needs the key 'scheduler'",
    ),
    "something that is no scheduler": (
        lambda: {"optimizer": optimizer(), "lr_scheduler": 0.9},
        TypeError,
        r"configure_optimizers: 0.9 is not a learning-rate scheduler",
    ),
    "a wrong interval": (
        lambda: {"optimizer": (p := both())[0], "lr_scheduler": {"scheduler": p[1], "interval": "batch"}},
        ValueError,
        r"interval must be 'epoch' or 'step', got 'batch'",
    ),
    "a frequency of 0": (
        lambda: {"optimizer": (p := both())[0], "lr_scheduler": {"scheduler": p[1], "frequency": 0}},
        ValueError,
        r"frequency must be at least 1, got 0",
    ),
    "a frequency that is a fraction": (
        lambda: {"optimizer": (p := both())[0], "lr_scheduler": {"scheduler": p[1], "frequency": 0.5}},
        ValueError,
        r"frequency must be at least 1, got 0.5",
    ),
    "a plateau without monitor": (
        lambda: {"optimizer": (o := optimizer()), "lr_scheduler": ReduceLROnPlateau(o)},
        ValueError,
        r"ReduceLROnPlateau needs 'monitor', the name of a logged metric",
    ),
    "a plateau without monitor in a list": (
        lambda: ([(o := optimizer())], [ReduceLROnPlateau(o)]),
        ValueError,
        r"ReduceLROnPlateau needs 'monitor'",
    ),
}


@pytest.mark.parametrize(("make", "kind", "text"), WRONG.values(), ids=WRONG)
def test_every_wrong_form_is_an_error_that_says_what_is_right(make: Any, kind: type[Exception], text: str, tiny: Any, trainer: Any) -> None:
    class Wrong(tiny.Module):
        def configure_optimizers(self) -> Any:
            return make()

    with pytest.raises(kind, match=text):
        trainer().fit(Wrong())


def test_a_scheduler_of_an_optimizer_that_was_not_returned_is_an_error(tiny: Any, trainer: Any) -> None:
    class Foreign(tiny.Module):
        def configure_optimizers(self) -> Any:
            return [super().configure_optimizers()], [StepLR(optimizer(), 1)]

    with pytest.raises(ValueError, match=r"Foreign.configure_optimizers returned a scheduler whose optimizer is not among"):
        trainer().fit(Foreign())


@pytest.mark.parametrize("form", [[], None, ([], [])], ids=repr)
def test_no_optimizer_is_an_error(form: Any, tiny: Any, trainer: Any) -> None:
    class Without(tiny.Module):
        def configure_optimizers(self) -> Any:
            return form

    with pytest.raises(ValueError, match=r"Without.configure_optimizers returned no optimizer; return one, such as torch.optim"):
        trainer().fit(Without())


def test_two_optimizers_need_optimizer_idx_or_manual_optimization(tiny: Any, trainer: Any) -> None:
    class Two(tiny.Module):
        def configure_optimizers(self) -> Any:
            return [super().configure_optimizers(), super().configure_optimizers()]

    with pytest.raises(ValueError, match=r"Two has 2 optimizers: let training_step take optimizer_idx.*automatic_optimization = False"):
        trainer().fit(Two())


def test_accumulation_is_refused_where_it_cannot_work(tiny: Any, trainer: Any) -> None:
    class Closed(tiny.Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    class Manual(tiny.Module):
        automatic_optimization = False

    with pytest.raises(ValueError, match=r"LBFGS.*accumulate_grad_batches must be 1"):
        trainer(accumulate_grad_batches=2).fit(Closed())
    with pytest.raises(ValueError, match=r"accumulate_grad_batches is for automatic optimization"):
        trainer(accumulate_grad_batches=2).fit(Manual())


def test_lbfgs_needs_a_closure_and_others_do_not() -> None:
    parameter = [nn.Parameter(torch.zeros(1))]
    assert needs_closure(torch.optim.LBFGS(parameter))
    assert not any(needs_closure(kind(parameter)) for kind in (SGD, Adam, torch.optim.AdamW, torch.optim.RMSprop))


def test_an_optimizer_of_ones_own_that_needs_a_closure_gets_one(tiny: Any, trainer: Any) -> None:
    class TwoLooks(SGD):
        """Evaluates the loss twice."""

        def step(self, closure: Any) -> Any:
            self.seen = [float(closure().detach()), float(closure().detach())]
            return super().step()

    class Closed(tiny.Module):
        def configure_optimizers(self) -> Any:
            self.own = TwoLooks(self.parameters(), lr=0.01)
            return self.own

    module = Closed(train=1)
    trainer().fit(module)
    assert module.own.seen[0] == module.own.seen[1] > 0


def test_only_freezes_the_parameters_of_the_others_and_gives_them_back() -> None:
    shared, mine, theirs, frozen = (nn.Parameter(torch.zeros(1), requires_grad=grad) for grad in (True, True, True, False))
    first, second = SGD([shared, mine], lr=0.1), SGD([shared, theirs, frozen], lr=0.1)
    with pytest.raises(RuntimeError, match="boom"), only(first, [first, second]):
        assert [p.requires_grad for p in (shared, mine, theirs, frozen)] == [True, True, False, False]
        raise RuntimeError("boom")
    assert [p.requires_grad for p in (shared, mine, theirs, frozen)] == [True, True, True, False]


def test_a_scheduler_that_does_not_belong_to_torch_works(tiny: Any, trainer: Any) -> None:
    """A warm-up from another library has step and state_dict, and an optimizer."""

    class Halve:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            self.optimizer.param_groups[0]["lr"] /= 2

        def state_dict(self) -> dict[str, Any]:
            return {}

    class Foreign(tiny.Module):
        def configure_optimizers(self) -> Any:
            self.own = SGD(self.parameters(), lr=0.08)
            return [self.own], [{"scheduler": Halve(self.own), "interval": "step"}]

    module = Foreign(train=3)
    trainer().fit(module)
    assert module.own.param_groups[0]["lr"] == 0.01


def test_one_scheduler_per_optimizer_steps_with_its_own_optimizer(tiny: Any, trainer: Any) -> None:
    class Two(tiny.Module):
        def __init__(self) -> None:
            super().__init__(train=4, val=0)
            self.other = nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            if optimizer_idx and batch_idx % 2:
                return None  # the second optimizer steps in every second batch
            return ((self.layer, self.other)[optimizer_idx](batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            self.made = [SGD(self.layer.parameters(), lr=1e-3), SGD(self.other.parameters(), lr=1e-3)]
            return [{"optimizer": each, "lr_scheduler": {"scheduler": ExponentialLR(each, 0.5), "interval": "step"}} for each in self.made]

    module = Two()
    trainer().fit(module)
    assert [each.param_groups[0]["lr"] for each in module.made] == [1e-3 / 16, 1e-3 / 4]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_total_steps_is_what_a_one_cycle_schedule_needs(accumulate: int, tiny: Any, trainer: Any) -> None:
    class OneCycle(tiny.Module):
        def configure_optimizers(self) -> Any:
            self.total = self.run.total_steps
            own = SGD(self.parameters(), lr=0.1)
            return [own], [{"scheduler": OneCycleLR(own, 0.1, total_steps=self.total), "interval": "step"}]

    module = OneCycle(train=10)
    made = trainer(max_epochs=3, accumulate_grad_batches=accumulate)
    made.fit(module)
    assert module.total == made.run.position.step == 3 * -(-10 // accumulate)


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": 7, "max_epochs": 1}, 4),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 4),
        ({"fast_dev_run": 2}, 2),
        ({"max_time": "1h"}, None),
    ],
    ids=str,
)
def test_total_steps_follows_the_limits(options: Any, total: int | None, tiny: Any, trainer: Any) -> None:
    class Asking(tiny.Module):
        def configure_optimizers(self) -> Any:
            self.total = self.run.total_steps
            return super().configure_optimizers()

        def on_train_batch_start(self, run: Any) -> None:
            if options == {"max_time": "1h"}:
                run.request_stop("seen enough")

    module = Asking(train=4)
    trainer(**options).fit(module)
    assert module.total == total


def test_lr_schedulers_gives_one_a_list_or_none(tiny: Any, trainer: Any) -> None:
    class Asking(tiny.Module):
        schedulers: Any = ()

        def configure_optimizers(self) -> Any:
            own = SGD(self.parameters(), lr=0.1)
            self.made = [kind(own, 5) for kind in self.schedulers]
            return [own], self.made

        def on_train_start(self) -> None:
            self.answer, self.own = self.lr_schedulers(), self.optimizers()

    for kinds in ((), (StepLR,), (StepLR, CosineAnnealingLR)):
        module = Asking()
        module.schedulers = kinds
        trainer().fit(module)
        assert module.answer == {0: None, 1: module.made[0] if module.made else None, 2: module.made}[len(kinds)]
        assert module.own.param_groups[0]["params"][0] is module.layer.weight


def test_a_scheduler_is_described_by_its_turns() -> None:
    own = optimizer()
    scheduler = Scheduler(StepLR(own, 1), interval="step", frequency=3)
    assert (scheduler.optimizer is own, scheduler.follows_metric) == (True, False)


def test_an_optimizer_with_a_zero_grad_of_its_own_clears_in_its_own_way(tiny: Any, trainer: Any) -> None:
    cleared: list[str] = []

    class Own(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            cleared.append("class")
            super().zero_grad(set_to_none)

    class Owning(tiny.Module):
        def __init__(self, on_the_instance: bool) -> None:
            super().__init__(train=3, val=0)
            self.on_the_instance = on_the_instance

        def configure_optimizers(self) -> Any:
            if not self.on_the_instance:
                return Own(self.parameters(), lr=0.1)
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.zero_grad = lambda: cleared.append("instance")  # type: ignore[assignment, misc]
            return optimizer

    trainer().fit(Owning(False))
    trainer().fit(Owning(True))
    assert cleared == ["class"] * 3 + ["instance"] * 3
