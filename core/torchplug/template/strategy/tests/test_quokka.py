"""The strategy keeps the rules of plugins, and two ranks train as one process does with batches of twice the size."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchplug import PluginError, Trainer
from torchplug.testing import TinyModule, check_plugin, tiny_fit, two_ranks

from torchplug_quokka import Quokka


class Drifting(TinyModule):
    """Begins with other weights on each rank, and has a buffer that goes its own way there."""

    drift: Tensor

    def __init__(self, train: int, batch_size: int) -> None:
        super().__init__(train=train, batch_size=batch_size)
        self.rank = int(os.environ.get("RANK", "0"))
        torch.nn.init.constant_(self.layer.bias, self.rank)
        self.register_buffer("drift", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.drift += self.rank
        return super().training_step(batch, batch_idx)


def numbers(trainer: Trainer) -> list[float]:
    """Parameters and buffers."""
    assert trainer.run is not None
    return [number for tensor in trainer.run.module.state_dict().values() for number in tensor.flatten().tolist()]


def alone() -> list[float]:
    return numbers(tiny_fit(module=Drifting(train=4, batch_size=4)))


def one_rank(exchange: str) -> list[float]:
    return numbers(tiny_fit(module=Drifting(train=8, batch_size=2), strategy={"quokka": {"exchange": exchange}}))


def test_it_keeps_the_rules() -> None:
    check_plugin("quokka")


def test_two_ranks_train_as_one_process_with_batches_of_twice_the_size() -> None:
    first, second = two_ranks(one_rank, "as they are")
    assert first == second == pytest.approx(alone(), rel=1e-5)


def test_gradients_that_are_exchanged_in_bf16_are_less_exact() -> None:
    first, second = two_ranks(one_rank, "bf16")
    assert first == second == pytest.approx(alone(), rel=0.05)
    assert first != pytest.approx(alone(), rel=1e-5)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(PluginError, match="exchange must be 'as they are' or 'bf16', got 'fp8'"):
        Trainer(max_epochs=1, strategy={"quokka": {"exchange": "fp8"}})


def test_the_readme_lists_every_option() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for option in dataclasses.fields(Quokka):
        assert not option.init or f"| `{option.name}` |" in readme
