"""A plugin says with which torchplug it works, and is refused, before anything of it is imported, where that is another one."""

from __future__ import annotations

import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

import torchplug
from torchplug import PluginError, Trainer, hookimpl
from torchplug.discovery import find
from torchplug.hookspecs import Hooks
from torchplug.versions import allows

numbers = st.integers(0, 3)
releases = st.lists(numbers, min_size=1, max_size=3).map(lambda parts: ".".join(map(str, parts)))
longer = st.lists(numbers, min_size=2, max_size=3).map(lambda parts: ".".join(map(str, parts)))
pre, post, dev, local = (st.sampled_from(["", *rest]) for rest in (
    ("a1", "b0", "rc1", "rc2"), (".post0", ".post1"), (".dev0", ".dev2"), ("+cpu", "+cu1"),
))  # fmt: skip


def joined(*parts: Any) -> Any:
    return st.tuples(*parts).map("".join)


public = joined(st.sampled_from(["", "1!"]), releases, pre, post, dev)
clauses = st.one_of(
    joined(st.sampled_from(["<=", ">=", ">"]), public),
    joined(st.just("<"), releases, pre, dev),
    joined(st.sampled_from(["==", "!="]), public, local),
    joined(st.sampled_from(["==", "!="]), releases, st.just(".*")),
    joined(st.just("~="), longer, pre, post),
)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.lists(clauses, min_size=1, max_size=2), joined(public, local))
def test_ranges_mean_what_pip_takes_them_to_mean(listed: list[str], version: str) -> None:
    assert allows(",".join(listed), version) == SpecifierSet(",".join(listed)).contains(version, prereleases=True)


@pytest.mark.parametrize(
    ("requirement", "version"), [("=0.1", "0.1"), (">=zero", "0.1"), (">=0.1", "newest"), ("~=1", "1.0"), (">1.*", "1")]
)
def test_what_is_no_range_or_version_is_an_error(requirement: str, version: str) -> None:
    with pytest.raises(ValueError, match=r"not a requirement|not a version|needs two numbers|only == and !="):
        allows(requirement, version)


# ---------------------------------------------------------------------- the range of a plugin

SHOUT = """
    from torchplug import hookimpl

    class Shout:
        @hookimpl
        def on_fit_start(self): ...
"""


def test_the_version_of_the_core_is_written_in_one_place() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{torchplug.__version__}"\n' in project


@pytest.mark.parametrize(
    ("requires", "range_"),
    [
        (["torchplug>=0.1,<0.2", "torch>=2.6"], ">=0.1,<0.2"),
        (["torchplug[standard] (>=0.1)"], ">=0.1"),
        (["torchplug-ema>=7", "torchplug.thing>=8", "torchplugs>=9"], ""),
        (["torchplug"], ""),
        (["torchplug>=9; extra == 'future'"], ""),
        (["TorchPlug>=0.1"], ">=0.1"),
        (["torchplug>=0.1; python_version >= '3.8'", "torchplug>=9; python_version < '3.8'"], ">=0.1"),
        ([], ""),
    ],
)
def test_the_range_is_read_from_the_requirements_of_the_package(package: Any, requires: list[str], range_: str) -> None:
    package("acme-shout", SHOUT, requires=requires, shout="Shout")
    found = find("shout")
    assert found.range == range_
    found.check_version()


def test_a_plugin_for_another_core_is_refused_before_it_is_imported_with_both_versions_and_the_pip_line(package: Any) -> None:
    package("acme-shout", "raise SystemExit('imported')", version="3.1", requires=["torchplug>=7.0,<8"], shout="Shout")
    with pytest.raises(PluginError) as caught:
        Trainer(plugins=["shout"])
    assert str(caught.value) == (
        f"plugin 'shout' (acme-shout 3.1) is made for torchplug>=7.0,<8, and torchplug {torchplug.__version__} is installed: "
        "pip install --upgrade acme-shout, or pip install 'torchplug>=7.0,<8'"
    )
    assert "acme_shout" not in sys.modules


def test_an_object_of_such_a_plugin_is_refused_too(package: Any) -> None:
    package("acme-shout", SHOUT, requires=["torchplug<0.1"], shout="Shout")
    from acme_shout import Shout

    with pytest.raises(PluginError, match=r"'shout' \(acme-shout 1.0\) is made for torchplug<0.1"):
        Trainer(plugins=[Shout()])


def test_installing_such_a_plugin_is_no_reason_to_refuse_others(package: Any) -> None:
    package("acme-shout", SHOUT, requires=["torchplug>=7"], shout="Shout")
    assert list(Trainer(plugins=[{"early_stopping": {"monitor": "loss"}}], accelerator="cpu").enabled) == ["early_stopping"]


def test_a_range_that_cannot_be_read_is_said(package: Any) -> None:
    package("acme-shout", SHOUT, requires=["torchplug>=new"], shout="Shout")
    with pytest.raises(PluginError, match=r"its requirement torchplug>=new cannot be read: 'new' is not a version"):
        Trainer(plugins=["shout"])


# ---------------------------------------------------------------------- what will go


class Old:
    @hookimpl
    def on_train_batch_end(self, batch: Any) -> None: ...


class Quiet(Old):
    on_error = "disable"


@pytest.mark.parametrize("plugin", [Old(), Quiet()], ids=["abort", "disable"])
def test_who_implements_a_deprecated_hook_is_warned_by_name_and_line(plugin: Any, tiny: Any, trainer: Any, monkeypatch: Any) -> None:
    text = "on_train_batch_end is deprecated since 0.2 and goes in 1.0; write on_batch_end"
    monkeypatch.setitem(Hooks.on_train_batch_end.torchplug_spec, "warn_on_impl", DeprecationWarning(text))
    with pytest.warns(DeprecationWarning) as caught:
        trainer(plugins=[plugin]).fit(tiny())
    (warning,) = {(str(each.message), each.filename, each.lineno) for each in caught}
    name = type(plugin).__name__.lower()
    assert warning == (f"plugin '{name}': {text}", __file__, Old.on_train_batch_end.__code__.co_firstlineno)


def test_who_takes_a_deprecated_argument_is_warned_and_nobody_else(tiny: Any, trainer: Any, monkeypatch: Any) -> None:
    text = "batch is deprecated since 0.2; write outputs"
    monkeypatch.setitem(Hooks.on_train_batch_end.torchplug_spec, "warn_on_impl_args", {"batch": DeprecationWarning(text)})

    class New:
        @hookimpl
        def on_train_batch_end(self, outputs: Any) -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(plugins=[New()]).fit(tiny())
    with pytest.warns(DeprecationWarning, match=f"^plugin 'old': {text}$"):
        trainer(plugins=[New(), Old()]).fit(tiny())


def test_in_a_script_the_warning_is_shown_without_being_asked_for(tmp_path: Path, programs: Any) -> None:
    code = """
        from torchplug import Trainer, hookimpl
        from torchplug.hookspecs import Hooks
        from torchplug.testing import TinyModule

        Hooks.on_fit_start.torchplug_spec["warn_on_impl"] = DeprecationWarning("on_fit_start goes in 1.0")

        class Old:
            @hookimpl
            def on_fit_start(self): ...

        Trainer(plugins=[Old()], max_steps=1, accelerator="cpu", num_sanity_val_steps=0).fit(TinyModule())
    """
    done = programs.run(textwrap.dedent(code), cwd=tmp_path)
    assert done.returncode == 0 and "DeprecationWarning: plugin 'old': on_fit_start goes in 1.0" in done.stderr, done.stderr
