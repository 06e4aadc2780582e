"""What is trusted: a lock refuses a package that is not the one that was locked, and an environment variable leaves all plugins out."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchplug import PluginError, Trainer, hookimpl
from torchplug.cli import main
from torchplug.testing import hermetic

SOURCE = """
    from torchplug import hookimpl

    class Shout:
        @hookimpl
        def on_fit_start(self): ...
"""


def record(folder: Path, *extra: str) -> None:
    """The RECORD that pip writes, of all files in a folder, with more lines."""
    info = next(folder.glob("*.dist-info"))
    (info / "RECORD").unlink(missing_ok=True)
    lines = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).decode().rstrip("=")
        lines.append(f"{file.relative_to(folder).as_posix()},sha256={digest},{file.stat().st_size}")
    (info / "RECORD").write_text("\n".join([*lines, *extra, f"{info.name}/RECORD,,", ""]), encoding="utf-8")


@pytest.fixture
def shout(package: Callable[..., Path]) -> Path:
    """A plugin as pip installs it."""
    folder = package("acme-shout", SOURCE, shout="Shout")
    record(folder)
    return folder


@pytest.fixture
def locked(shout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A lock of it."""
    file = tmp_path / "torchplug.lock"
    assert main(["lock", str(file), "--plugins", "shout"]) == 0
    assert capsys.readouterr().out == f"{file}: torchplug and shout; use it with Trainer(lock={str(file)!r})\n"
    return file


def refused(lock: Path, *plugins: Any) -> str:
    with pytest.raises(PluginError) as caught:
        Trainer(plugins=list(plugins or ["shout"]), lock=lock, accelerator="cpu")
    return str(caught.value)


def test_a_lock_names_package_version_and_hash_of_plugins_and_core(locked: Path) -> None:
    content = json.loads(locked.read_text(encoding="utf-8"))
    assert content["version"] == 1 and list(content["packages"]) == ["torchplug", "shout"]
    shout = content["packages"]["shout"]
    assert (shout["distribution"], shout["version"]) == ("acme-shout", "1.0")
    assert shout["hash"].startswith("sha256=") and len(shout["hash"]) == 7 + 64
    assert "acme_shout" not in sys.modules


def test_what_is_locked_is_taken(locked: Path, tiny: Any) -> None:
    trainer = Trainer(plugins=["shout"], lock=locked, max_steps=1, num_sanity_val_steps=0, accelerator="cpu")
    trainer.fit(tiny())
    assert trainer.run is not None and trainer.run.packages == {"shout": "acme-shout 1.0"}


def test_a_changed_file_is_refused_and_nothing_is_imported(locked: Path, shout: Path) -> None:
    (shout / "acme_shout.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    message = refused(locked)
    assert message == (
        f"{locked} refuses plugin 'shout' (acme-shout 1.0): {shout / 'acme_shout.py'} was changed or removed after it was installed; "
        "pip install --force-reinstall --no-deps acme-shout==1.0"
    )
    assert "acme_shout" not in sys.modules


def test_other_code_of_the_same_version_is_refused(locked: Path, shout: Path) -> None:
    (shout / "acme_shout.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    record(shout)
    message = refused(locked)
    assert message.startswith(f"{locked} refuses plugin 'shout' (acme-shout 1.0): hash sha256=")
    assert message.endswith(
        f"install acme-shout==1.0, or to accept what is installed now, write the lock anew: torchplug lock {locked} --plugins shout"
    )
    assert "acme_shout" not in sys.modules


def test_another_version_is_refused_with_both(locked: Path, shout: Path) -> None:
    metadata = next(shout.glob("*.dist-info")) / "METADATA"
    metadata.write_text(metadata.read_text(encoding="utf-8").replace("1.0", "1.1"), encoding="utf-8")
    record(shout)
    assert "version 1.1 is installed, 1.0 is locked; install acme-shout==1.0, or" in refused(locked)


def test_another_package_of_the_same_plugin_is_refused(locked: Path, shout: Path, package: Any) -> None:
    for file in (shout / next(shout.glob("*.dist-info")).name).iterdir():
        file.unlink()
    record(package("evil-shout", "raise SystemExit('imported')", shout="Shout"))
    assert "distribution evil-shout is installed, acme-shout is locked" in refused(locked)
    assert "evil_shout" not in sys.modules


def test_a_plugin_that_is_not_in_the_lock_is_refused(locked: Path) -> None:
    assert refused(locked, {"early_stopping": {"monitor": "x"}}) == (
        f"{locked} refuses plugin 'early_stopping' (torchplug-early-stopping 0.1.0), which is not in it; to accept what is installed now, "
        f"write the lock anew: torchplug lock {locked} --plugins shout,early_stopping"
    )


def test_a_lock_of_all_plugins_is_written_anew_with_all_of_them(shout: Path, package: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with hermetic("shout"):
        assert main(["lock", "all.lock"]) == 0
    record(package("acme-whisper", SOURCE, whisper="Shout"))
    with hermetic("shout", "whisper"):
        assert refused(Path("all.lock"), "whisper").endswith("write the lock anew: torchplug lock all.lock")


def test_an_object_of_a_package_is_held_to_the_lock_and_one_of_the_script_is_not(locked: Path, shout: Path) -> None:
    sys.path.insert(0, str(shout))
    from acme_shout import Shout

    class Own:
        @hookimpl
        def on_fit_start(self) -> None: ...

    assert list(Trainer(plugins=[Shout(), Own()], lock=locked, accelerator="cpu").enabled) == ["shout", "own"]
    record(shout, "more.py,sha256=" + base64.urlsafe_b64encode(hashlib.sha256(b"").digest()).decode().rstrip("=") + ",0")
    (shout / "more.py").touch()
    assert "hash" in refused(locked, Shout())


def test_what_a_module_brings_is_held_to_the_lock(locked: Path, tiny: Any) -> None:
    class Brings(tiny.Module):
        def configure_plugins(self) -> list[Any]:
            return [{"early_stopping": {"monitor": "val_loss"}}]

    with pytest.raises(PluginError, match=r"'early_stopping' .* which is not in it"):
        Trainer(plugins=["shout"], lock=locked, max_steps=1, accelerator="cpu").fit(Brings())


def test_a_change_of_the_core_is_refused(locked: Path) -> None:
    content = json.loads(locked.read_text(encoding="utf-8"))
    content["packages"]["torchplug"]["version"] = "0.0.9"
    locked.write_text(json.dumps(content), encoding="utf-8")
    assert refused(locked).startswith(f"{locked} refuses torchplug: version 0.1.0 is installed, 0.0.9 is locked")


def test_byte_code_commands_and_how_it_was_installed_make_no_difference(locked: Path, shout: Path) -> None:
    info = next(shout.glob("*.dist-info"))
    (info / "INSTALLER").write_text("another", encoding="utf-8")
    (info / "direct_url.json").write_text('{"url": "file:///elsewhere", "dir_info": {}}', encoding="utf-8")
    record(shout, "../../bin/shout,sha256=abc,3", "__pycache__/acme_shout.cpython-311.pyc,,")
    Trainer(plugins=["shout"], lock=locked, accelerator="cpu")


def test_an_editable_install_is_held_to_its_source(package: Any, tmp_path: Path) -> None:
    folder = package("acme-shout", SOURCE, shout="Shout")
    info = next(folder.glob("*.dist-info"))
    (info / "direct_url.json").write_text('{"url": "file:///somewhere", "dir_info": {"editable": true}}', encoding="utf-8")
    (info / "RECORD").write_text(f"_acme_shout.pth,,\n{info.name}/RECORD,,\n", encoding="utf-8")
    lock = tmp_path / "a.lock"
    assert main(["lock", str(lock), "--plugins", "shout"]) == 0
    Trainer(plugins=["shout"], lock=lock, accelerator="cpu")
    (folder / "acme_shout.py").write_text("x = 1", encoding="utf-8")
    assert "hash" in refused(lock)


def test_a_package_without_a_record_cannot_be_locked(package: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package("acme-shout", SOURCE, shout="Shout")
    assert main(["lock", str(tmp_path / "a.lock"), "--plugins", "shout"]) == 2
    assert "plugin 'shout' (acme-shout 1.0) was installed without a RECORD and cannot be locked" in capsys.readouterr().err
    assert not (tmp_path / "a.lock").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 1, "packages": {"shout": {}}}', '{"version": 1, "packages": 3}', '{"version": 2, "packages": {}}']
)
def test_what_is_no_lock_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.lock").write_text(content, encoding="utf-8")
    assert "is not a lock file" in refused(tmp_path / "a.lock")


def test_a_lock_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert refused(tmp_path / "a.lock") == (
        f"lock={str(tmp_path / 'a.lock')!r}: there is no such file; torchplug lock {tmp_path / 'a.lock'} writes it"
    )


def test_check_compares_and_writes_nothing(locked: Path, shout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lock", str(locked), "--check"]) == 0
    assert capsys.readouterr().out == f"{locked}: what is installed is what is locked\n"
    before = locked.read_bytes()
    (shout / "acme_shout.py").write_text("x = 1", encoding="utf-8")
    assert main(["lock", str(locked), "--check"]) == 1
    assert "was changed or removed" in capsys.readouterr().out
    assert locked.read_bytes() == before


def test_everything_that_is_installed_here_can_be_locked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lock", str(tmp_path / "all.lock")]) == 0
    assert {"checkpoint", "ema", "torchplug"} <= json.loads((tmp_path / "all.lock").read_text(encoding="utf-8"))["packages"].keys()
    Trainer(plugins=["progress", "ema"], lock=tmp_path / "all.lock", accelerator="cpu")


# ---------------------------------------------------------------------- what would be imported in place of what is locked


def test_a_folder_beside_the_locked_module_is_refused(locked: Path, shout: Path) -> None:
    (shout / "acme_shout").mkdir()
    (shout / "acme_shout" / "__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    assert f"{shout / 'acme_shout' / '__init__.py'} would be imported, which is not of this package" in refused(locked)


def test_another_module_of_this_name_earlier_on_the_path_is_refused(locked: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "acme_shout.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "first")
    assert f"{tmp_path / 'first' / 'acme_shout.py'} would be imported" in refused(locked)


def test_a_file_of_the_package_that_is_gone_is_refused(locked: Path, shout: Path) -> None:
    (shout / "acme_shout.py").unlink()
    assert "was changed or removed" in refused(locked)


def test_an_object_of_a_plugin_that_is_a_package_is_held_to_the_lock(locked: Path, package: Any) -> None:
    folder = package("acme-packaged", "", packaged="Shout")
    (folder / "acme_packaged.py").unlink()
    (folder / "acme_packaged").mkdir()
    (folder / "acme_packaged" / "__init__.py").write_text("from acme_packaged.inner import Shout", encoding="utf-8")
    source = "from torchplug import hookimpl\nclass Shout:\n    @hookimpl\n    def on_fit_start(self): ..."
    (folder / "acme_packaged" / "inner.py").write_text(source, encoding="utf-8")
    record(folder)
    from acme_packaged import Shout

    assert "acme-packaged 1.0), which is not in it" in refused(locked, Shout())


@pytest.mark.parametrize("line", ["a,md9=x,1", "a,shake_128=x,1"])
def test_a_record_that_cannot_be_read_is_said(locked: Path, shout: Path, line: str) -> None:
    (shout / "a").touch()
    record(shout, line)
    assert "its RECORD cannot be read" in refused(locked)


def test_a_lock_without_the_core_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.lock").write_text('{"version": 1, "packages": {}}', encoding="utf-8")
    assert main(["lock", str(tmp_path / "a.lock"), "--check"]) == 1
    assert "refuses torchplug, which is not in it" in capsys.readouterr().out


def test_the_lock_is_read_once_and_goes_to_other_processes_with_the_trainer(locked: Path, monkeypatch: Any, tmp_path: Path) -> None:
    import pickle

    monkeypatch.chdir(locked.parent)
    made = Trainer(plugins=[{"early_stopping": {"monitor": "x"}}], accelerator="cpu")
    assert main(["lock", "here.lock", "--plugins", "early_stopping"]) == 0
    made = Trainer(plugins=[{"early_stopping": {"monitor": "x"}}], accelerator="cpu", lock="here.lock")
    (locked.parent / "here.lock").unlink()
    assert list(pickle.loads(pickle.dumps(made)).enabled) == ["early_stopping"]


# ---------------------------------------------------------------------- without plugins


def test_the_environment_starts_runs_without_plugins_and_says_so(tiny: Any, monkeypatch: Any, caplog: Any, package: Any) -> None:
    package("acme-shout", "raise SystemExit('imported')", shout="Shout")
    monkeypatch.setenv("TORCHPLUG_PLUGINS", "none")

    class Brings(tiny.Module):
        def configure_plugins(self) -> list[Any]:
            return ["shout"]

    trainer = Trainer(
        plugins=["shout", {"ema": {"decay": 0.5}}], strategy="ddp", devices=2, accelerator="cpu", max_steps=1, num_sanity_val_steps=0
    )
    trainer.fit(Brings())
    assert trainer.enabled == {} and trainer.run is not None and trainer.run.plugins == {} and trainer.run.position.step == 1
    assert (
        "TORCHPLUG_PLUGINS=none: runs in one process on the CPU without plugins, not with "
        "plugins=['shout', {'ema': {'decay': 0.5}}], accelerator='cpu', strategy='ddp', devices=2"
    ) in caplog.text
    assert "acme_shout" not in sys.modules


def test_without_names_the_bundle_is_left_out_too(monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHPLUG_PLUGINS", "none")
    assert Trainer(strategy="ddp", devices=2).enabled == {}


def test_another_value_of_the_variable_is_an_error(monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHPLUG_PLUGINS", "ema")
    with pytest.raises(PluginError, match="TORCHPLUG_PLUGINS may be 'none', which starts without plugins, or not set; got 'ema'"):
        Trainer(plugins=[])


# ---------------------------------------------------------------------- what took part is written down


def test_the_plugins_of_a_run_and_their_versions_are_in_config_checkpoint_and_journal(tiny: Any, shout: Path, trainer: Any) -> None:
    from torchplug import checkpoint

    made = trainer(plugins=["shout", "checkpoint", "journal"])
    made.fit(tiny())
    assert "acme-shout 1.0" in (made.run.dir / "config.yaml").read_text(encoding="utf-8")
    assert checkpoint.load(made.run.dir / "checkpoints" / "last.safetensors")["versions"]["shout"] == "acme-shout 1.0"
    first = json.loads((made.run.dir / "journal.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert "acme-shout 1.0" in json.dumps(first["versions"]) and "shout" in first["plugins"]
