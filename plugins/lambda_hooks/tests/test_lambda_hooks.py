"""Functions as hooks: called with what they ask for, where they were meant, and refused with a reason."""

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from torchplug import Module, PluginError, Run, Trainer
from torchplug.hookspecs import Hooks
from torchplug.testing import check_plugin
from torchplug_lambda_hooks import LambdaHooks

BATCHES = [torch.full((1, 2), float(i)) for i in range(3)]
EVERY = [name for name, each in vars(Hooks).items() if inspect.isfunction(each)]
ended: list[int] = []


def note_epoch(run: Any) -> None:
    """Stands for a function of somebody's own package."""
    ended.append(run.position.epoch)


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(path: Any, *plugins: Any, **options: Any) -> Any:
    trainer = Trainer(**{"max_epochs": 2, "root_dir": path, **options}, plugins=list(plugins))
    trainer.fit(Net(), BATCHES)
    return trainer


def lambdas(**hooks: Any) -> Any:
    return {"lambda_hooks": {"hooks": hooks}}


def _count(run: Run) -> None:
    run.module.epochs = getattr(run.module, "epochs", 0) + 1


@pytest.mark.slow
def test_it_passes_the_conformance_checks() -> None:
    check_plugin("lambda_hooks", hooks={"on_train_epoch_end": _count})


def test_a_function_gets_the_arguments_that_it_names(tmp_path: Any) -> None:
    seen: list[Any] = []
    hooks = {
        "on_train_batch_end": lambda batch_idx, run: seen.append((run.position.micro_step, batch_idx)),
        "on_train_batch_start": lambda batch: seen.append(float(batch[0, 0])),
        "on_train_epoch_end": lambda: seen.append("epoch"),
        "on_run_end": lambda status: seen.append(status),
    }
    fit(tmp_path, lambdas(**hooks))
    first = [0.0, (1, 0), 1.0, (2, 1), 2.0, (3, 2), "epoch"]
    assert seen == [*first, 0.0, (4, 0), 1.0, (5, 1), 2.0, (6, 2), "epoch", "finished"]


def test_methods_partials_and_arguments_with_defaults(tmp_path: Any) -> None:
    seen: list[Any] = []

    class Keeps:
        def keep(self, run: Any) -> None:
            seen.append(("method", run.position.epoch))

        def __call__(self, run: Any) -> None:
            seen.append(("object", run.position.epoch))

    def partial(kind: str, run: Any, *, epoch_of: Any = None) -> None:
        seen.append((kind, run.position.epoch, epoch_of))

    hooks = {
        "on_train_epoch_start": Keeps().keep,
        "on_train_start": Keeps(),
        "on_train_epoch_end": functools.partial(partial, "partial"),
        "on_train_end": lambda run, times=3: seen.append(("default", times)),
    }
    fit(tmp_path, lambdas(**hooks), max_epochs=1)
    assert seen == [("object", 0), ("method", 0), ("partial", 0, None), ("default", 3)]


def test_the_answer_of_a_function_for_an_operation_counts(tmp_path: Any) -> None:
    def weights(*plugins: Any) -> Any:
        return fit(tmp_path, *plugins).run.module.layer.weight

    def scale(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)

    def halved(run: Any, optimizer: Any) -> bool:
        scale(optimizer)
        return True

    bare = weights()
    assert not torch.equal(weights(lambdas(clip_gradients=halved)), bare)
    assert torch.equal(weights(lambdas(clip_gradients=halved)), weights(lambdas(on_before_optimizer_step=scale)))
    assert torch.equal(weights(lambdas(optimizer_step=lambda: True)), Net().layer.weight)
    assert torch.equal(weights(lambdas(optimizer_step=lambda: None)), bare)


def test_a_text_says_where_to_import_a_function_from(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys.py").write_text(
        "class Own:\n    @staticmethod\n    def note(run):\n        run.own = 1\n        seen.append(1)\nseen = []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import somebodys  # type: ignore[import-not-found]

    somebodys.Own.note = staticmethod(lambda run: somebodys.seen.append(run.position.epoch))
    fit(tmp_path, lambdas(on_train_epoch_end="somebodys:Own.note"))
    assert somebodys.seen == [0, 1]
    with pytest.raises(PluginError, match=r"hooks: 'somebodys:nothing' for on_train_end cannot be imported: .*has no attribute 'nothing'"):
        Trainer(max_epochs=1, plugins=[lambdas(on_train_end="somebodys:nothing")])
    with pytest.raises(PluginError, match="hooks: 'no_such_package:f' for on_train_end cannot be imported: No module named"):
        Trainer(max_epochs=1, plugins=[lambdas(on_train_end="no_such_package:f")])


def test_only_the_hooks_that_are_named_are_implemented(tmp_path: Any) -> None:
    trainer = fit(tmp_path, lambdas(on_train_epoch_end=lambda: None))
    (member,) = trainer._members
    assert list(member.hooks) == ["on_train_epoch_end"]


def test_every_hook_can_be_named() -> None:
    for hook in EVERY:
        trainer = Trainer(max_epochs=1, plugins=[lambdas(**{hook: lambda: None})])
        assert list(trainer._members[0].hooks) == [hook]


def test_several_instances_for_one_hook(tmp_path: Any) -> None:
    seen: list[str] = []
    named = [{f"lambda_hooks:{name}": {"hooks": {"on_train_start": lambda name=name: seen.append(name)}}} for name in "ab"]
    fit(tmp_path, *named)
    assert seen == ["a", "b"]


def test_an_error_in_a_function_names_the_plugin_and_the_hook(tmp_path: Any) -> None:
    def fail(run: Any) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as error:
        fit(tmp_path, lambdas(on_train_epoch_end=fail))
    assert any("lambda_hooks" in note and "on_train_epoch_end" in note for note in error.value.__notes__)


def test_it_may_be_switched_off_by_an_error_if_that_is_wanted(tmp_path: Any, caplog: Any) -> None:
    def fail() -> None:
        raise ZeroDivisionError("mine")

    run = fit(tmp_path, {"lambda_hooks": {"hooks": {"on_train_epoch_end": fail}, "on_error": "disable"}}).run
    assert run.position.epoch == 2 and "is switched off" in caplog.text


async def asynchronous() -> None: ...


class Yields:
    """An object whose call would never run."""

    def __call__(self, run: Any) -> Any:
        yield run


def yields() -> Any:
    yield


@pytest.mark.parametrize(
    ("hooks", "words"),
    [
        ({"on_epoch_ends": print}, "hooks: there is no hook 'on_epoch_ends', did you mean 'on_"),
        ({"on_train_epoch_ends": print}, "hooks: there is no hook 'on_train_epoch_ends', did you mean 'on_train_epoch_end'"),
        ({"zzz": print}, "hooks: there is no hook 'zzz'$"),
        ({"__init__": print}, "hooks: there is no hook '__init__'"),
        ({"on_train_end": 3}, "hooks: on_train_end must be a function, got 3"),
        ({"on_train_end": Net}, "hooks: on_train_end must be a function, got <class"),
        ({"on_train_end": "nowhere"}, "hooks: 'nowhere' for on_train_end cannot be imported"),
        ({"on_train_end": lambda runn: None}, "hooks: the function for on_train_end takes runn, did you mean 'run'.*the hook has run$"),
        ({"on_train_end": lambda run, batch: None}, "hooks: the function for on_train_end takes batch, the hook has run$"),
        ({"on_train_end": lambda *args: None}, "hooks: the function for on_train_end takes \\*args, the hook has run$"),
        ({"on_train_end": lambda run, /: None}, "hooks: the function for on_train_end takes run.* the hook has run$"),
        ({"on_train_end": asynchronous}, "hooks: on_train_end must be a plain function, without async and yield"),
        ({"on_train_end": yields}, "hooks: on_train_end must be a plain function, without async and yield"),
        ({"on_train_end": Yields()}, "hooks: on_train_end must be a plain function, without async and yield"),
        ([print], "hooks must be a dict of functions by the names of hooks, got "),
    ],
)
def test_what_cannot_be_a_hook_is_refused_with_the_closest_name(hooks: Any, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        Trainer(max_epochs=1, plugins=[{"lambda_hooks": {"hooks": hooks}}])
    with pytest.raises((TypeError, ValueError), match=words):
        LambdaHooks(hooks=hooks)


def test_hooks_are_required() -> None:
    with pytest.raises(PluginError, match="hooks"):
        Trainer(max_epochs=1, plugins=["lambda_hooks"])
