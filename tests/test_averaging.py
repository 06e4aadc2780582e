"""Averages of weights as a tool: the values alone, and a plugin of a few lines that averages in its own way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import torchplug
from torchplug import Run, hookimpl, trial
from torchplug.averaging import Average, Averaging, recompute
from torchplug.checkpoint import load, weights

TrainerOf = Callable[..., torchplug.Trainer]


@dataclass(kw_only=True, eq=False)
class Mean(Averaging):
    """The mean of all weights.

    Args:
        buffers: as in `Averaging`.
        validate: as in `Averaging`.
    """

    steps: list[int] = field(init=False, default_factory=list)

    def stepped(self, run: Run) -> None:
        self.steps.append(run.position.step)
        self.update(run)

    def weight(self) -> float:
        return 1 / (self.updates + 1)


class Watch:
    """The weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    @hookimpl
    def on_train_batch_end(self, run: Run) -> None:
        if run.position.step > len(self.steps):
            self.steps.append(values(run.module))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """In double precision, without statistics of BatchNorm, which have no plain mean of interest."""
    names = [name for name in states[0] if "running" not in name and "num_batches" not in name]
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in names}


def assert_close(now: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(now[name].double(), value.double(), rtol=tolerance, atol=tolerance)


def assert_equal(now: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert now.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(now[name], value), name


@pytest.fixture
def normed(tiny: Any) -> type:
    """A module with BatchNorm, and loaders."""

    class Normed(tiny.Module):
        def __init__(self, train: int = 6) -> None:
            super().__init__(train=train)
            torch.manual_seed(1)
            self.layer = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    return Normed


# ---------------------------------------------------------------------- the values


def test_an_average_of_any_module_is_the_recurrence_and_comes_and_goes_bit_for_bit() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).bfloat16())
    average = Average.begin(module, buffers=True)
    expected = {name: value.double() for name, value in module.state_dict().items() if value.is_floating_point()}
    for weight in (0.5, 0.25, 0.1):
        with torch.no_grad():
            for value in (*module.parameters(), *module.buffers()):
                value.copy_(value + torch.randn(value.shape)) if value.is_floating_point() else value.add_(1)
        average.update(weight)
        expected = {name: value + weight * (module.state_dict()[name].double() - value) for name, value in expected.items()}
    assert_close(average.weights, expected)
    assert average.weights["2.weight"].dtype == torch.float32 and "1.num_batches_tracked" not in average.weights
    before, places = values(module), [id(p) for p in module.parameters()]
    own = average.put_in()
    assert_close(values(module), {name: value.to(before[name].dtype) for name, value in expected.items()})
    assert module[1].num_batches_tracked == 3
    average.put_back(own)
    assert_equal(values(module), before)
    assert [id(p) for p in module.parameters()] == places
    average.put_in(rest=0.3)
    assert_close(values(module), {name: 0.7 * value + 0.3 * before[name].double() for name, value in expected.items() if "2." not in name})
    assert_close(average.weights, expected)


def test_an_average_is_restored_from_its_names_and_refuses_another_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    average = Average.begin(module)
    named = average.named()
    assert sorted(named) == sorted(module.state_dict()) and named["0.weight"] is named["1.weight"]
    again = Average.restored(module, named)
    for each in (average, again):
        with torch.no_grad():
            module[0].weight.fill_(7.0)
        each.update(0.5)
    assert_equal(again.named(), average.named())
    with pytest.raises(ValueError, match=r"of another module than BatchNorm1d: it has no 0\.weight"):
        Average.restored(nn.BatchNorm1d(2), {"0.weight": torch.zeros(2)})


def test_a_failure_while_the_averages_are_put_in_leaves_the_modules_own_values() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average, before = Average.begin(module), values(module)
    for each in average.weights.values():
        each.zero_()
    average.weights["1.bias"] = torch.zeros(3)  # fails when others are there already
    with pytest.raises(RuntimeError):
        average.put_in()
    assert_equal(values(module), before)


def test_a_parameter_that_is_unfrozen_is_averaged_from_its_value_at_that_time() -> None:
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    average = Average.begin(module)
    average.join()
    assert list(average.left_out) == ["bias"] and list(average.weights) == ["weight"]
    before = module.bias.clone()
    module.bias.requires_grad_(True)
    average.join()
    with torch.no_grad():
        module.bias.add_(1.0)
    average.update(0.25)
    torch.testing.assert_close(average.weights["bias"], before.detach() + 0.25)
    assert not average.left_out


# ---------------------------------------------------------------------- a plugin of one's own


def test_a_plugin_that_says_when_and_how_much_is_enough(trainer: TrainerOf, normed: type, loader: Any) -> None:
    module, watch, data = normed(), Watch(), loader(6)
    done = trainer(plugins=[watch, Mean(buffers="recompute")], max_epochs=2)
    done.fit(module, data)
    expected = mean(watch.steps)
    assert_close(values(module), expected)
    hand = normed()
    hand.load_state_dict({**watch.steps[-1], **expected})
    hand.train()
    update_bn(data, hand)
    assert_close(values(module), {name: value for name, value in hand.state_dict().items() if "running" in name})
    assert done.run is not None and done.run.report["mean"] == "the module holds the average of its weights at 12 steps"


def test_statistics_are_taken_anew_for_the_weights_that_the_module_has(trainer: TrainerOf, normed: type, loader: Any) -> None:
    class Zero:
        @hookimpl
        def on_train_end(self, run: Run) -> None:
            with torch.no_grad():
                run.module.layer[0].weight.zero_()
                run.module.layer[0].bias.fill_(0.5)
            assert recompute(run)

    module = normed()
    trainer(plugins=[Zero()]).fit(module, loader(6))
    torch.testing.assert_close(module.layer[1].running_mean, torch.full((3,), 0.5))
    torch.testing.assert_close(module.layer[1].running_var, torch.zeros(3))
    assert module.layer[1].num_batches_tracked == 6 and module.layer[1].momentum == 0.1


def test_a_state_that_is_taken_during_a_validation_holds_both_sets(trainer: TrainerOf, normed: type, tmp_path: Path) -> None:
    taken: list[Any] = []

    class Take:
        @hookimpl
        def on_validation_end(self, run: Run) -> None:
            run.hooks.save_checkpoint(run, tmp_path / "within.safetensors", run.state())
            taken.append(values(run.module))

    module, watch = normed(), Watch()
    trainer(plugins=[watch, Mean(), Take()]).fit(module)
    state = load(tmp_path / "within.safetensors")
    assert_close(state["module"], mean(watch.steps))
    kept = state["plugins"]["mean"]
    assert_close(kept["average"], mean(watch.steps))
    assert_equal({**taken[0], **kept["own"]}, watch.steps[-1])


def test_plain_weights_are_either_set(trainer: TrainerOf, normed: type, tmp_path: Path) -> None:
    class Save:
        @hookimpl
        def on_train_batch_end(self, run: Run) -> None:
            run.save_checkpoint(tmp_path / f"{run.position.step}.safetensors")

    module, watch = normed(), Watch()
    done = trainer(plugins=[watch, Mean(buffers="keep"), Save()], max_epochs=1)
    done.fit(module)
    assert_equal(weights(tmp_path / "4.safetensors"), watch.steps[3])
    assert_close(weights(tmp_path / "4.safetensors", "mean"), mean(watch.steps[:4]))
    assert done.run is not None
    done.run.save_checkpoint(tmp_path / "end.safetensors")
    for name in (None, "mean"):
        assert_equal(weights(tmp_path / "end.safetensors", name), values(module))


def test_a_trial_in_the_middle_of_training_leaves_no_trace_in_the_average(trainer: TrainerOf, normed: type) -> None:
    class Try:
        @hookimpl
        def on_train_epoch_start(self, run: Run) -> None:
            if run.position.epoch == 1:
                with trial(run) as attempt:
                    for _ in range(3):
                        attempt.step()
                    attempt.evaluate(1)
                    assert run.plugins["mean"].updates == 6

    ended = []
    for plugins in ([Mean()], [Mean(), Try()]):
        module, done = normed(), trainer(plugins=plugins, max_epochs=2)
        done.fit(module)
        ended.append(values(module))
    assert_equal(*ended)


def test_an_average_taken_into_a_new_run_counts_the_steps_of_the_new_one(trainer: TrainerOf, normed: type, tmp_path: Path) -> None:
    first, plugin, path = trainer(plugins=[Mean()]), Mean(), tmp_path / "end.safetensors"
    first.fit(normed())
    assert first.run is not None
    first.run.save_checkpoint(path)
    second = trainer(plugins=[plugin], accumulate_grad_batches=3)
    second.fit(normed(), ckpt_path=path, resume={"include": ["model", "plugin:mean"]})
    assert plugin.steps == [1, 2] and plugin.updates == 6 + 2


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_leaves_the_average_and_once_more_the_modules_own_weights(
    trainer: TrainerOf, normed: type, loader: Any, again: bool
) -> None:
    class Press(normed):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 4 or (again and not torch.is_grad_enabled() and batch_idx == 3):
                os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(batch, batch_idx)

    module, watch, data = Press(), Watch(), loader(6)
    done = trainer(plugins=[watch, Mean(buffers="recompute")], max_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        done.fit(module, data)
    assert len(watch.steps) == 5
    if again:
        assert_equal(values(module), watch.steps[-1])
    else:
        assert_close(values(module), mean(watch.steps))
    assert module.layer[1].momentum == 0.1


def test_a_plugin_without_a_weight_is_told_so(trainer: TrainerOf, tiny: Any) -> None:
    @dataclass(kw_only=True, eq=False)
    class Nothing(Averaging):
        def stepped(self, run: Run) -> None:
            self.update(run)

    with pytest.raises(NotImplementedError, match="Nothing does not say with which weight it averages"):
        trainer(plugins=[Nothing()]).fit(tiny())
