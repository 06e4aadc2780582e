"""Ten mistakes of those who write plugins: each is one error, which names the plugin and says what to do.

All but the sixth come before training starts; state is looked at when the first checkpoint is taken.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import torchplug
from torchplug import PluginError, Trainer, checkpoint, hookimpl


@pytest.fixture
def refused(tiny: Any, tmp_path: Path) -> Callable[..., str]:
    """What a trainer with these plugins says, at the latest when it fits, before the first batch."""

    def why(*plugins: Any) -> str:
        class Watched(tiny.Module):
            batches = 0

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                type(self).batches += 1
                return super().training_step(batch, batch_idx)

        with pytest.raises(PluginError) as caught:
            Trainer(plugins=list(plugins), max_epochs=1, root_dir=tmp_path, accelerator="cpu").fit(Watched())
        assert Watched.batches == 0
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return why


class NoMarker:
    def on_train_end(self, run: Any) -> None: ...


def test_1_a_hook_without_hookimpl(refused: Any) -> None:
    assert refused(NoMarker()) == ("plugin 'no_marker': NoMarker.on_train_end has the name of a hook but no @hookimpl; add it, or rename")


class Misspelt:
    @hookimpl
    def on_train_epoch_ends(self, run: Any) -> None: ...


class MisspeltWithoutMarker:
    def on_validaton_end(self, run: Any) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (Misspelt(), "plugin 'misspelt': Misspelt.on_train_epoch_ends is not a hook, did you mean 'on_train_epoch_end'?"),
        (
            MisspeltWithoutMarker(),
            "plugin 'misspelt_without_marker': MisspeltWithoutMarker.on_validaton_end is not a hook, did you mean 'on_validation_end'?",
        ),
    ],
    ids=["with hookimpl", "without"],
)
def test_2_a_misspelt_hook(plugin: Any, said: str, refused: Any) -> None:
    assert refused(plugin) == said


class Default:
    @hookimpl
    def on_train_batch_end(self, outputs: Any = None) -> None: ...


class Unknown:
    @hookimpl
    def on_train_batch_end(self, output: Any) -> None: ...


class KeywordOnly:
    @hookimpl
    def on_train_batch_end(self, *, outputs: Any) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (Default(), "argument 'outputs' must be plain, without a default and not keyword-only"),
        (KeywordOnly(), "argument 'outputs' must be plain, without a default and not keyword-only"),
        (Unknown(), "the hook has no argument 'output', did you mean 'outputs'? (it has: run, outputs, batch, batch_idx)"),
    ],
    ids=["default", "keyword-only", "unknown"],
)
def test_3_an_argument_that_cannot_be_passed(plugin: Any, said: str, refused: Any) -> None:
    name = type(plugin).__name__
    label = {"Default": "default", "KeywordOnly": "keyword_only", "Unknown": "unknown"}[name]
    assert refused(plugin) == f"plugin '{label}': {name}.on_train_batch_end: {said}"


class Fine:
    @hookimpl
    def on_fit_start(self) -> None: ...


def test_4_the_class_in_place_of_an_instance(refused: Any) -> None:
    assert refused(Fine) == "plugin Fine: got the class, have you forgotten the ()?"
    assert refused({"mine": Fine}) == "plugin 'mine': got the class Fine, have you forgotten the ()?"


MUTABLE = {
    "a list as default": (
        """
        from dataclasses import dataclass
        from torchplug import hookimpl

        @dataclass(kw_only=True, eq=False)
        class Shout:
            words: list = []

            @hookimpl
            def on_fit_start(self): ...
        """,
        "plugin 'shout' (acme-shout 1.0): acme_shout:Shout cannot be imported: "
        "ValueError: mutable default <class 'list'> for field words is not allowed: use default_factory",
    ),
    "a tensor as default": (
        """
        from dataclasses import dataclass
        import torch
        from torchplug import hookimpl

        @dataclass(kw_only=True, eq=False)
        class Shout:
            weights: torch.Tensor = torch.zeros(3)

            @hookimpl
            def on_fit_start(self): ...
        """,
        "plugin 'shout' (acme-shout 1.0): the default of option 'weights' is one Tensor that all instances would share; "
        "write field(default_factory=...)",
    ),
    "one object from a factory": (
        """
        from dataclasses import dataclass, field
        from torchplug import hookimpl

        WORDS = []

        @dataclass(kw_only=True, eq=False)
        class Shout:
            words: list = field(default_factory=lambda: WORDS)

            @hookimpl
            def on_fit_start(self): ...
        """,
        "plugin 'shout' (acme-shout 1.0): the default of option 'words' is one list that all instances would share; "
        "write field(default_factory=...)",
    ),
    "a list in a signature": (
        """
        from torchplug import hookimpl

        class Shout:
            def __init__(self, words=[]):
                self.words = words

            @hookimpl
            def on_fit_start(self): ...
        """,
        "plugin 'shout' (acme-shout 1.0): the default of option 'words' is one list that all instances would share; "
        "write field(default_factory=...)",
    ),
}


@pytest.mark.parametrize("case", MUTABLE)
def test_5_a_default_that_all_instances_share(case: str, refused: Any, package: Any) -> None:
    source, said = MUTABLE[case]
    package("acme-shout", source, shout="Shout")
    assert refused("shout") == said


@dataclass(kw_only=True, eq=False)
class Unsafe:
    seen: list[Any] = field(init=False, default_factory=list)

    @hookimpl
    def on_fit_start(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"layers": {"first": torch.nn.Linear(1, 1)}}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("background", [True, False])
def test_6_state_that_is_not_safe_to_load(background: bool, tiny: Any, trainer: Any) -> None:
    made = trainer(plugins=[Unsafe(), {"checkpoint": {"background": background}}])
    with pytest.raises(checkpoint.CheckpointError) as caught:
        made.fit(tiny())
    assert str(caught.value).splitlines()[0] == (
        "plugins.unsafe.layers.first cannot be saved: torch.nn.modules.linear.Linear is not a plain value or tensor; save what it is "
        "made from (numbers, texts, bytes, None, lists, tuples, dicts, tensors), and make it anew when loading"
    )
    blamed = [note for note in caught.value.__notes__ if note.startswith("raised by ")]
    assert blamed == ["raised by plugin 'unsafe' in state_dict, rank 0"], "who keeps the state, and not who writes it"


def test_7_a_name_that_is_used_twice(refused: Any, package: Any) -> None:
    assert refused(Fine(), Fine()) == (
        "plugin 'fine': named twice; give the instances names of their own: {'fine:a': ...}, {'fine:b': ...}"
    )
    source = "from torchplug import hookimpl\nclass Shout:\n    @hookimpl\n    def on_fit_start(self): ..."
    for distribution in ("acme-shout", "other-shout"):
        package(distribution, source, shout="Shout")
    assert refused("shout") == (
        "plugin 'shout' is provided by acme-shout 1.0 and other-shout 1.0: write 'acme-shout/shout' to take the first"
    )


def test_8_a_missing_dependency(refused: Any, package: Any) -> None:
    package("acme-shout", "import loudspeakers.large", shout="Shout")
    assert refused("shout") == (
        "plugin 'shout' (acme-shout 1.0): acme_shout:Shout cannot be imported: there is no module 'loudspeakers': "
        "pip install what 'loudspeakers' is part of"
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1 +", "SyntaxError: invalid syntax (acme_shout.py, line 1)"),
        ("from torchplug import hookimple", "ImportError: cannot import name 'hookimple' from 'torchplug'"),
        ("{}['key']", "KeyError: 'key'"),
        ("class Shout_: ...", "AttributeError: module 'acme_shout' has no attribute 'Shout'"),
    ],
)
def test_9_an_import_error(source: str, said: str, refused: Any, package: Any) -> None:
    package("acme-shout", source, shout="Shout")
    assert refused("shout").startswith(f"plugin 'shout' (acme-shout 1.0): acme_shout:Shout cannot be imported: {said}")


def test_9_a_module_that_is_not_where_the_entry_point_says(refused: Any, package: Any) -> None:
    folder = package("acme-shout", "", shout="Shout")
    (folder / "acme_shout.py").unlink()
    assert refused("shout") == (
        "plugin 'shout' (acme-shout 1.0): acme_shout:Shout cannot be imported: there is no module 'acme_shout': "
        "pip install --force-reinstall acme-shout"
    )


def test_10_the_wrong_version_of_the_core(refused: Any, package: Any) -> None:
    package("acme-shout", "", requires=["torchplug>=0.7,<0.8"], shout="Shout")
    assert refused("shout") == (
        f"plugin 'shout' (acme-shout 1.0) is made for torchplug>=0.7,<0.8, and torchplug {torchplug.__version__} is installed: "
        "pip install --upgrade acme-shout, or pip install 'torchplug>=0.7,<0.8'"
    )


# ---------------------------------------------------------------------- cousins


def test_words_of_the_author_about_a_missing_dependency_are_passed_on(refused: Any, package: Any) -> None:
    package("acme-shout", "raise ModuleNotFoundError('shout needs loudspeakers: pip install loudspeakers')", shout="Shout")
    assert refused("shout").endswith("acme_shout:Shout cannot be imported: shout needs loudspeakers: pip install loudspeakers")


def test_a_module_that_ends_the_program_is_an_error_that_names_it(refused: Any, package: Any) -> None:
    package("acme-shout", "raise SystemExit(3)", shout="Shout")
    assert refused("shout").endswith("acme_shout:Shout cannot be imported: SystemExit: 3")


CHECKED = """
    from dataclasses import dataclass
    from torchplug import hookimpl

    @dataclass(kw_only=True, eq=False)
    class Shout:
        \"\"\"Shouts.

        Args:
            volume: How loud, in decibels.
            times: How often.
        \"\"\"

        volume: float
        times: int = 1

        def __post_init__(self):
            if not self.volume >= 0:
                raise ValueError(f"volume must be at least 0, got {self.volume!r}")

        @hookimpl
        def on_fit_start(self): ...
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "option 'volume' must be given, as in {'shout': {'volume': ...}}; How loud, in decibels"),
        ({"volume": "high"}, "volume must be a float, got 'high'"),
        ({"volume": -1.0}, "volume must be at least 0, got -1.0"),
        ({"volume": 1.0, "times": 1.5}, "times must be an int, got 1.5"),
    ],
)
def test_an_option_that_is_missing_or_of_a_wrong_type_is_named_whatever_the_plugin_does_with_it(
    options: dict[str, Any], said: str, refused: Any, package: Any
) -> None:
    package("acme-shout", CHECKED, shout="Shout")
    assert refused({"shout": options}) == f"plugin 'shout' (acme-shout 1.0): {said}"


def test_options_that_are_no_mapping_are_said(refused: Any) -> None:
    assert refused({"early_stopping": "val_loss"}) == (
        "plugin 'early_stopping': its options must be a mapping such as {'option': value}, got 'val_loss'"
    )


def test_a_name_that_is_nearly_right_is_no_package_to_install(refused: Any) -> None:
    assert refused("progres").startswith("plugin 'progres' is not installed, did you mean 'progress'? (installed plugins: ")
    assert refused("torchplug-early-stopping").startswith(
        "plugin 'torchplug-early-stopping' is not installed, did you mean 'early_stopping'?"
    )


# ---------------------------------------------------------------------- objects of plugins that are packages


def packaged(package: Any, **options: Any) -> Any:
    """A plugin whose class lies deeper than its entry point says, and an object of it."""
    folder = package("acme-deep", "", deep="Deep", **options)
    (folder / "acme_deep.py").unlink()
    (folder / "acme_deep").mkdir()
    (folder / "acme_deep" / "__init__.py").write_text("from acme_deep.inner import Deep", encoding="utf-8")
    source = "from torchplug import hookimpl\nclass Deep:\n    @hookimpl\n    def on_fit_start(self): ..."
    (folder / "acme_deep" / "inner.py").write_text(source, encoding="utf-8")
    from acme_deep import Deep

    return Deep()


def test_an_object_is_known_by_its_package_wherever_its_class_lies(package: Any, trainer: Any, tiny: Any) -> None:
    made = trainer(plugins=[packaged(package)])
    made.fit(tiny())
    assert made.run.packages == {"deep": "acme-deep 1.0"}


def test_in_another_process_it_is_known_too(trainer: Any) -> None:
    made = pickle.loads(pickle.dumps(trainer(plugins=["checkpoint"])))
    assert [(member.name, member.distribution) for member in made._members] == [("checkpoint", "torchplug-checkpoint")]


def test_its_range_is_checked_too(package: Any, refused: Any) -> None:
    assert "is made for torchplug>=9" in refused(packaged(package, requires=["torchplug>=9"]))


def test_an_object_takes_the_place_of_the_same_plugin_in_a_bundle() -> None:
    from torchplug_checkpoint import Checkpoint

    mine = Checkpoint()
    assert Trainer(plugins=["standard", mine], accelerator="cpu").enabled["checkpoint"] is mine
