"""What the norms of gradients are, against autograd and closed formulas."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchplug import Module, PluginError, Trainer, hookimpl
from torchplug.testing import check_plugin
from torchplug_grad_norm import GradNorm

INF = math.inf


def batches(count: int = 6) -> list[Tensor]:
    return list(torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(1)))


class Records:
    """Keeps what loggers get: (step, metrics)."""

    def __init__(self) -> None:
        self.all: list[tuple[int, dict[str, float]]] = []

    @hookimpl
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.all.append((step, metrics))


class Net(Module):
    """Two layers, one of them nested, a parameter of its own, and one that is never used."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.scale, self.idle, self.lr = nn.Parameter(torch.ones(2)), nn.Linear(2, 2), lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(path: Any, module: Any, *plugins: Any, data: Any = None, **options: Any) -> list[tuple[int, dict[str, float]]]:
    records = Records()
    defaults = {"max_epochs": 1, "log_every_n_steps": 1, "root_dir": path}
    Trainer(**{**defaults, **options}, plugins=[*plugins, records]).fit(module, batches() if data is None else data)
    return records.all


def expected(module: Any, data: list[Tensor], p: float = 2.0) -> dict[str, float]:
    """The norms of the mean loss over some batches, layer by layer, from autograd and float64."""
    loss = sum(module.training_step(batch, 0) for batch in data) / len(data)
    named = [(name, q) for name, q in module.named_parameters() if not name.startswith("idle")]
    gradients = dict(zip([n for n, _ in named], torch.autograd.grad(loss, [q for _, q in named]), strict=True))

    def norm(*names: str) -> float:
        flat = torch.cat([gradients[name].double().flatten() for name in names]).abs()
        return float(flat.max() if p == INF else (flat**p).sum() ** (1 / p))

    return {
        f"grad_{p}_norm_total": norm(*gradients),
        f"grad_{p}_norm/net.0": norm("net.0.weight", "net.0.bias"),
        f"grad_{p}_norm/net.2": norm("net.2.weight", "net.2.bias"),
        f"grad_{p}_norm/scale": norm("scale"),
    }


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("grad_norm")


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF])
def test_norms_are_those_of_autograd(tmp_path: Any, p: float) -> None:
    found = fit(tmp_path, Net(), GradNorm(norm_type=p))
    assert found == [(step, pytest.approx(expected(Net(), [batch], p), rel=1e-6)) for step, batch in enumerate(batches(), 1)]


def test_a_window_has_the_gradient_of_its_mean_loss_the_short_one_too(tmp_path: Any) -> None:
    data = batches()
    found = fit(tmp_path, Net(), GradNorm(), accumulate_grad_batches=4)
    assert found == [
        (1, pytest.approx(expected(Net(), data[:4]), rel=1e-5)),
        (2, pytest.approx(expected(Net(), data[4:]), rel=1e-5)),
    ]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_norms_are_those_before_clipping(tmp_path: Any, algorithm: str) -> None:
    clipped = fit(tmp_path, Net(), GradNorm(), gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    assert clipped == fit(tmp_path, Net(), GradNorm())


def test_the_total_is_what_torchs_clipping_compares(tmp_path: Any) -> None:
    seen = []

    class Clips:
        @hookimpl
        def clip_gradients(self, run: Any) -> bool:
            seen.append(float(torch.nn.utils.clip_grad_norm_(run.module.parameters(), 0.1)))
            return True

    found = fit(tmp_path, Net(), GradNorm(), Clips())
    assert [metrics["grad_2.0_norm_total"] for _, metrics in found] == pytest.approx(seen, rel=1e-6)


def test_plugins_that_change_gradients_come_later(tmp_path: Any) -> None:
    class Doubles:
        @hookimpl
        def on_before_optimizer_step(self, run: Any) -> None:
            for parameter in run.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(2)

    assert fit(tmp_path, Net(), Doubles(), GradNorm()) == fit(tmp_path, Net(), GradNorm())


def test_half_precision_gives_the_unscaled_norm_and_no_skipped_step(tmp_path: Any) -> None:
    class Skips:
        """Makes the first three steps overflow."""

        @hookimpl
        def on_fit_start(self, run: Any) -> None:
            run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**40})

    steps = fit(tmp_path, Net(), Skips(), GradNorm(), precision="16-mixed", data=batches(60))
    assert 0 < len(steps) < 50
    plain = [expected(Net(), [batch])["grad_2.0_norm_total"] for batch in batches(60)][-len(steps) :]
    assert [metrics["grad_2.0_norm_total"] for _, metrics in steps] == pytest.approx(plain, rel=2e-2)


def test_norms_of_a_skipped_step_are_not_logged_with_a_later_one(tmp_path: Any) -> None:
    class Turns(Net):
        """The second optimizer's gradients overflow at step 2."""

        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            loss = self.net[0](batch).square().mean() if optimizer_idx == 0 else self.net[2].weight.square().mean()
            return loss * float("inf") if (optimizer_idx, batch_idx) == (1, 1) else loss

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[0].parameters(), lr=0.0), torch.optim.SGD([*self.net[2].parameters(), self.scale], lr=0.0)]

    found = fit(tmp_path, Turns(), GradNorm(per_layer=False), data=batches(3), precision="16-mixed", log_every_n_steps=2)
    assert [(step, set(metrics)) for step, metrics in found] == [(2, {"grad_2.0_norm_total/0"})]


@pytest.mark.parametrize("p", [2.0, INF])
def test_gradients_without_an_element_count_for_nothing(tmp_path: Any, p: float) -> None:
    class Empty(Net):
        def __init__(self) -> None:
            super().__init__()
            self.none, self.words = nn.Parameter(torch.zeros(0)), nn.Embedding(5, 2, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + self.none.sum() + self.words(torch.zeros(0, dtype=torch.long)).sum()

    ((_, found), *_) = fit(tmp_path, Empty(), GradNorm(norm_type=p))
    assert found == pytest.approx({**expected(Net(), [batches()[0]], p), f"grad_{p}_norm/words": 0.0}, rel=1e-6)


def test_bfloat16_gradients_are_summed_in_float32(tmp_path: Any) -> None:
    class Wide(Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4097))

        def training_step(self, batch: Any) -> Any:
            return (self.w * 1.0).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    ((_, metrics),) = fit(tmp_path, Wide(), GradNorm(norm_type=1.0), precision="bf16-true", data=[torch.zeros(1)])
    assert metrics == {"grad_1.0_norm_total": 4097.0, "grad_1.0_norm/w": 4097.0}


def test_sparse_gradients_are_summed_up_first(tmp_path: Any) -> None:
    class Words(Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 1, sparse=True)

        def training_step(self, batch: Any) -> Any:
            return self.words(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    ((_, metrics),) = fit(tmp_path, Words(), GradNorm(per_layer=False), data=[torch.tensor([1, 1, 1, 2])])
    assert metrics == {"grad_2.0_norm_total": pytest.approx(math.sqrt(9 + 1))}


def test_several_optimizers_have_a_total_each(tmp_path: Any) -> None:
    class Turns(Net):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int = 0) -> Any:
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[0].parameters(), lr=0.0), torch.optim.SGD([*self.net[2].parameters(), self.scale], lr=0.0)]

    (one, *_) = fit(tmp_path, Turns(), GradNorm(), log_every_n_steps=2)
    truth = expected(Net(), [batches()[1]])
    second = math.hypot(truth["grad_2.0_norm/net.2"], truth["grad_2.0_norm/scale"])
    del truth["grad_2.0_norm_total"]
    totals = {"grad_2.0_norm_total/0": truth["grad_2.0_norm/net.0"], "grad_2.0_norm_total/1": second}
    assert one == (2, pytest.approx({**truth, **totals}, rel=1e-6))


def test_in_manual_optimization_gradients_of_the_other_optimizer_do_not_count(tmp_path: Any) -> None:
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizers = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[0].parameters(), lr=0.0), torch.optim.SGD([*self.net[2].parameters(), self.scale], lr=0.0)]

    ((_, found), *_) = fit(tmp_path, Manual(), GradNorm(per_layer=False))
    truth = expected(Net(), [batches()[0]])
    second = math.hypot(truth["grad_2.0_norm/net.2"], truth["grad_2.0_norm/scale"])
    assert found == pytest.approx({"grad_2.0_norm_total/0": truth["grad_2.0_norm/net.0"], "grad_2.0_norm_total/1": second}, rel=1e-6)


def test_nothing_is_computed_or_read_between_logging_steps(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    norm = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *args, **kwargs: computed.append(1) or norm(*args, **kwargs))
    found = fit(tmp_path, Net(), GradNorm(per_layer=False), data=batches(7), log_every_n_steps=3)
    assert [step for step, _ in found] == [3, 6]
    assert len(computed) == 2 * (5 + 2 + 1)  # five parameters, two layers of two, the total
    assert all(list(metrics) == ["grad_2.0_norm_total"] for _, metrics in found)


class Operations(TorchDispatchMode):
    """What the device does for each training batch, and how often it is waited for."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.done: Counter[int] = Counter()
        self.read: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        batch = self.module._run.position.micro_step if self.module._run else -1
        self.done[batch] += 1
        self.read[batch] += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_it_reads_nothing_itself_and_does_nothing_between_logging_steps(tmp_path: Any) -> None:
    seen = []
    for plugins in ([], [GradNorm()]):
        module = Net()
        with Operations(module) as operations:
            fit(tmp_path, module, *plugins, data=batches(8), log_every_n_steps=3)
        seen.append(operations)
    bare, watched = seen
    assert bare.read == watched.read
    assert all(bare.done[batch] == watched.done[batch] for batch in (0, 1, 4, 7))  # 3 and 6 begin with the records of steps 3 and 6
    assert all(bare.done[batch] < watched.done[batch] for batch in (2, 5))


@pytest.mark.parametrize("step", range(1, 6))
def test_a_run_that_goes_on_logs_what_the_other_did_and_weights_are_those_without_it(tmp_path: Any, step: int) -> None:
    class Saves:
        @hookimpl
        def on_train_batch_end(self, run: Any) -> None:
            run.save_checkpoint(tmp_path / f"{run.position.step}.safetensors")

    bare, watched, again = Net(0.1), Net(0.1), Net(0.1)
    fit(tmp_path, bare, log_every_n_steps=2)
    whole = fit(tmp_path, watched, GradNorm(), Saves(), log_every_n_steps=2)
    records = Records()
    trainer = Trainer(max_epochs=1, log_every_n_steps=2, root_dir=tmp_path, plugins=[GradNorm(), records])
    trainer.fit(again, batches(), ckpt_path=tmp_path / f"{step}.safetensors")
    assert records.all == [record for record in whole if record[0] > step]
    for one, two, three in zip(bare.parameters(), watched.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm_type": 0}, "norm_type must be a number above 0, or inf, got 0"),
        ({"norm_type": math.nan}, "norm_type must be a number above 0, or inf, got nan"),
        ({"norm_type": "inf"}, "norm_type must be a number above 0, or inf, got 'inf'"),
        ({"per_layer": 2}, "per_layer must be True or False, got 2"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, words: str) -> None:
    with pytest.raises(PluginError, match=f"plugin 'grad_norm' .torchplug-grad-norm 0.1.0.: {words}"):
        Trainer(max_epochs=1, plugins=[{"grad_norm": options}])
