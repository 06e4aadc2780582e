"""``torchplug new``: what it writes is a plugin as it stands, whatever was asked for, and what should not be is refused."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hatchling.build import build_editable, build_sdist, build_wheel

import torchplug
from torchplug.cli import main
from torchplug.hookspecs import Hooks
from torchplug.members import PARAMETERS
from torchplug.new import FILES, TEMPLATE
from torchplug.versions import allows

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
VARIANTS = ("logger", "strategy", "events")
EVENTS = "on_train_batch_end,on_validation_end,optimizer_step"
KINDS = {
    "plain": [],
    "logger": ["--logger"],
    "strategy": ["--strategy", "--prefix", "acme"],
    "events": ["--events", EVENTS],
    "every hook": ["--events", ",".join(PARAMETERS)],
}
DESCRIPTION = "Does what it says, for a test"

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git knows one name, whoever runs the tests."""
    (tmp_path / "gitconfig").write_text("[user]\n    name = Ada Lovelace\n", encoding="utf-8")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))


def written(kind: str = "plain", name: str = "batch_noise", description: str = DESCRIPTION) -> Path:
    """The folder of a new package."""
    assert main(["new", name, *KINDS[kind], *(["--description", description] if description else [])]) == 0
    prefix = "acme" if "acme" in KINDS[kind] else "torchplug"
    return Path(f"{prefix}-{name.replace('_', '-')}").absolute()


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file()}


def project(folder: Path) -> Any:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def built(how: Any, folder: Path, into: Path) -> Path:
    """What a build of the package in ``folder`` gives."""
    into.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return into / how(str(into))
    finally:
        os.chdir(before)


# ---------------------------------------------------------------------- what is written


def test_it_writes_a_package_and_prints_the_next_three_commands(capsys: Any) -> None:
    folder = written()
    assert set(texts(folder)) == {
        "torchplug_batch_noise.py", "tests/test_batch_noise.py", "README.md", "pyproject.toml", "hatch_build.py", "LICENSE",
        ".gitignore", ".github/workflows/test.yml",
    }  # fmt: skip
    assert "\n    cd torchplug-batch-noise\n    pip install -e . pytest\n    pytest\n" in capsys.readouterr().out


@each_kind
def test_nothing_of_the_template_is_left(kind: str) -> None:
    for path, text in texts(written(kind)).items():
        assert "quokka" not in (path + text).lower(), path
        assert "how a plugin for torchplug is made" not in text and "torchplug maintainers" not in text, path


@each_kind
def test_the_first_test_of_each_is_the_check_of_everything(kind: str) -> None:
    text = (written(kind) / "tests" / "test_batch_noise.py").read_text(encoding="utf-8")
    first = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
    assert ast.unparse(first.body[0]) == "check_plugin('batch_noise')"
    assert ("check_logger('batch_noise', read=stored)" in ast.unparse(ast.parse(text))) == (kind == "logger")


def test_the_four_names_and_the_class() -> None:
    described = project(written())
    assert described["name"] == "torchplug-batch-noise"
    assert described["entry-points"]["torchplug"] == {"batch_noise": "torchplug_batch_noise:BatchNoise"}


def test_a_prefix_of_ones_own() -> None:
    assert main(["new", "batch_noise", "--prefix", "acme-labs"]) == 0
    described = project(Path("acme-labs-batch-noise"))
    assert described["name"] == "acme-labs-batch-noise"
    assert described["entry-points"]["torchplug"] == {"batch_noise": "acme_labs_batch_noise:BatchNoise"}
    assert Path("acme-labs-batch-noise/acme_labs_batch_noise.py").exists()


def test_it_is_written_into_the_folder_that_was_named(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "an empty one").mkdir()
    assert main(["new", "batch_noise", "--into", "an empty one"]) == 0
    assert (tmp_path / "an empty one" / "pyproject.toml").exists()
    assert "    cd 'an empty one'\n" in capsys.readouterr().out
    assert main(["new", "batch_noise", "--into", str(tmp_path / "some" / "where")]) == 0
    assert (tmp_path / "some" / "where" / "torchplug_batch_noise.py").exists()


@pytest.mark.parametrize("there", ["file", "folder"])
def test_nothing_is_overwritten(there: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "torchplug-batch-noise"
    if there == "folder":
        path.mkdir()
        path = path / "notes.txt"
    path.write_text("mine", encoding="utf-8")
    assert main(["new", "batch_noise"]) == 2
    assert capsys.readouterr().err == (
        "torchplug: torchplug-batch-noise is there already and is not an empty folder; name another one with --into\n"
    )
    assert path.read_text(encoding="utf-8") == "mine" and len(list(tmp_path.glob("torchplug-batch-noise/*"))) == (there == "folder")


# ---------------------------------------------------------------------- what only the author can say


def test_description_and_author_are_in_pyproject_and_readme(capsys: Any) -> None:
    assert main(["new", "batch_noise", "--description", 'Adds "white"  noise \\ to batches.', "--author", 'Gödel "K"']) == 0
    described = project(Path("torchplug-batch-noise"))
    assert described["description"] == 'Adds "white" noise \\ to batches'
    assert described["authors"] == [{"name": 'Gödel "K"'}]
    assert (
        Path("torchplug-batch-noise/README.md")
        .read_text(encoding="utf-8")
        .startswith('# torchplug-batch-noise\n\nAdds "white" noise \\ to batches.\n\n```\n')
    )
    assert "Before you publish" not in capsys.readouterr().out


def test_the_author_is_who_git_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert project(written())["authors"] == [{"name": "Ada Lovelace"}]
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    assert "authors" not in project(written(name="batch_blur"))
    monkeypatch.setenv("PATH", "")
    assert "authors" not in project(written(name="batch_fog"))


@pytest.mark.parametrize("text", ["", "TODO", "Noise", "my plugin", "test", "A description\x00 of it", "."])
def test_a_description_that_says_nothing_is_refused(text: str, capsys: Any) -> None:
    assert main(["new", "batch_noise", "--description", text]) == 2
    assert capsys.readouterr().err == f"torchplug: --description must say in one sentence what the plugin does, got {text!r}\n"
    assert not Path("torchplug-batch-noise").exists()


def test_an_author_of_two_lines_is_refused(capsys: Any) -> None:
    assert main(["new", "batch_noise", "--author", "Ada\nLovelace"]) == 2
    assert capsys.readouterr().err == "torchplug: --author must be a name, got 'Ada\\nLovelace'\n"


@pytest.mark.parametrize("build", [build_wheel, build_sdist])
def test_a_package_that_does_not_say_what_it_does_cannot_be_built_and_is_installed_for_its_author(
    build: Any, tmp_path: Path, capsys: Any
) -> None:
    folder = written(description="")
    assert "Before you publish it, write what it does into pyproject.toml and README.md" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"pyproject.toml: description is empty; write what the plugin does in one sentence"):
        built(build, folder, tmp_path / "dist")
    assert built(build_editable, folder, tmp_path / "dist").exists()
    pyproject, readme = folder / "pyproject.toml", folder / "README.md"
    said = pyproject.read_text(encoding="utf-8").replace('description = ""', 'description = "Adds noise to the batches."')
    pyproject.write_text(said, encoding="utf-8")
    with pytest.raises(ValueError, match=r"README.md does not say 'Adds noise to the batches', the description in pyproject.toml"):
        built(build, folder, tmp_path / "dist")
    text = readme.read_text(encoding="utf-8").replace("\n\n", "\n\nAdds noise\nto the batches.\n\n", 1)
    readme.write_text(text, encoding="utf-8")
    assert built(build, folder, tmp_path / "dist").exists()


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("batch-noise", "must be lower-case words joined by '_': write 'batch_noise'"),
        ("BatchNoise", "must be lower-case words joined by '_': write 'batch_noise'"),
        ("2nd order", "must be lower-case words joined by '_': write 'nd_order'"),
        ("_noise", "must be lower-case words joined by '_': write 'noise'"),
        ("noise__", "must be lower-case words joined by '_': write 'noise'"),
        ("", "must be lower-case words joined by '_': take a name"),
        ("лес", "must be lower-case words joined by '_': take a name"),
        ("class", "means something in Python"),
        ("none", "means something in Python"),
        ("value_error", "means something in Python"),
        ("my_plugin", "is a placeholder; take a name that says what the plugin does, such as 'batch_noise'"),
        ("foo", "is a placeholder"),
        ("example", "is a placeholder"),
        ("name", "is a placeholder"),
        ("plugin", "is a placeholder"),
        ("test", "is a placeholder"),
        ("hello_world", "is a placeholder"),
        ("quokka", "is a placeholder"),
        ("logger", "is a placeholder"),
        ("x", "is a placeholder"),
        ("noise_plugin", "stands where plugins are named: leave the last word out, write 'noise'"),
        ("noise_callback", "stands where plugins are named: leave the last word out, write 'noise'"),
        ("on_train_start", "is a hook"),
        ("teardown", "is a hook"),
        ("max_epochs", "means something to Trainer"),
        ("auto", "means something to Trainer"),
        ("ema", "is that of torchplug-ema 0.1.0, which is installed; take another one, or pip uninstall it first"),
        ("torchplug_noise", "the package begins with 'torchplug' by itself, write 'noise'"),
        ("run", "its class Run would hide what a plugin needs under that name"),
        ("tiny_module", "its class TinyModule would hide what a plugin needs under that name"),
    ],
)  # fmt: skip
def test_names_that_should_not_be_are_refused(name: str, words: str, tmp_path: Path, capsys: Any) -> None:
    there = set(tmp_path.iterdir())
    assert main(["new", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"torchplug: name {name!r}") and words in error and error.count("\n") == 1
    assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize("name", ["test_time", "my_scale", "new_york", "match", "top2_loss", "event_logger"])
def test_names_that_only_look_like_those_are_taken(name: str) -> None:
    assert project(written(name=name))["entry-points"]["torchplug"] == {
        name: f"torchplug_{name}:{''.join(word.capitalize() for word in name.split('_'))}"
    }


def test_a_module_that_is_there_already_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "acme_batch_noise.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["new", "batch_noise", "--prefix", "acme"]) == 2
    assert capsys.readouterr().err == (
        "torchplug: name 'batch_noise' makes the module acme_batch_noise, which is there already; take another name, or another --prefix\n"
    )


def test_a_prefix_that_cannot_be_is_refused(capsys: Any) -> None:
    assert main(["new", "batch_noise", "--prefix", "Acme"]) == 2
    assert capsys.readouterr().err == "torchplug: prefix 'Acme' must be lower-case words, such as 'acme'\n"


@pytest.mark.parametrize(
    ("first", "second"), [("--logger", "--strategy"), ("--strategy", "--events=setup"), ("--logger", "--events=setup")]
)
def test_two_kinds_exclude_each_other(first: str, second: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["new", "batch_noise", first, second])
    assert ended.value.code == 2
    assert f"argument {second.partition('=')[0]}: not allowed with argument {first}" in capsys.readouterr().err
    assert not Path("torchplug-batch-noise").exists()


# ---------------------------------------------------------------------- a list of hooks


def test_events_makes_exactly_these_hooks_with_signature_and_first_line_of_their_specs() -> None:
    folder = written("events")
    (cls,) = [node for node in ast.parse(texts(folder)["torchplug_batch_noise.py"]).body if isinstance(node, ast.ClassDef)]
    methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    assert list(methods) == ["optimizer_step", "on_train_batch_end", "on_validation_end"]  # as they fire
    for name, method in methods.items():
        spec = getattr(Hooks, name)
        (expected,) = ast.parse(inspect.cleandoc(f"def {name}{inspect.signature(spec)}: ...".replace("'", ""))).body
        assert isinstance(expected, ast.FunctionDef) and method.returns is not None and expected.returns is not None
        assert ast.unparse(method.args) == ast.unparse(expected.args)
        assert ast.unparse(method.returns) == ast.unparse(expected.returns)
        assert spec.__doc__.strip().startswith(ast.get_docstring(method)) and "Since" not in (ast.get_docstring(method) or "")
    assert ast.unparse(methods["optimizer_step"].body[-1]) == "return None"
    assert len(methods["on_train_batch_end"].body) == 2  # documentation, and what it does
    assert "`optimizer_step`, `on_train_batch_end`, `on_validation_end`." in texts(folder)["README.md"]


def test_events_imports_what_these_hooks_need_and_nothing_else() -> None:
    assert main(["new", "batch_noise", "--events", "setup,save_checkpoint,clip_gradients"]) == 0
    lines = Path("torchplug-batch-noise/torchplug_batch_noise.py").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(("import ", "from "))] == [
        "from __future__ import annotations",
        "import logging",
        "from dataclasses import dataclass",
        "from pathlib import Path",
        "from typing import Any",
        "from torch.optim import Optimizer",
        "from torchplug import Run, hookimpl",
    ]
    assert main(["new", "batch_blur", "--events", "setup"]) == 0
    assert "typing" not in Path("torchplug-batch-blur/torchplug_batch_blur.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ("on_train_batch_ends", "--events: there is no hook 'on_train_batch_ends', did you mean 'on_train_batch_end'? (hooks: launch, "),
        ("setup,,nothing_at_all", "--events: there is no hook 'nothing_at_all' (hooks: launch, "),
        (" , ", "--events takes hooks, such as on_train_batch_end,on_validation_end, got ' , '"),
    ],
)
def test_events_that_are_no_hooks_are_refused(events: str, words: str, capsys: Any) -> None:
    assert main(["new", "batch_noise", "--events", events]) == 2
    assert capsys.readouterr().err.startswith(f"torchplug: {words}")
    assert not Path("torchplug-batch-noise").exists()


# ---------------------------------------------------------------------- what is written works


TESTS = """
    import sys, zipfile
    import pytest
    from hatchling.build import build_wheel
    site = sys.argv[1]
    zipfile.ZipFile(f"{site}.dist/" + build_wheel(f"{site}.dist")).extractall(site)
    sys.path.insert(0, site)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "error", "tests"]))
"""


def own_tests(folder: Path, site: Path, programs: Any) -> str:
    """The output of a package's own tests, in a process in which its wheel is installed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what else is installed may have warnings of its own
    done = programs.run(inspect.cleandoc(TESTS), str(site), cwd=folder, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.mark.slow
@each_kind
def test_the_tests_of_what_was_written_pass(kind: str, tmp_path: Path, programs: Any) -> None:
    name = f"noise_{kind.replace(' ', '_')}"
    output = own_tests(written(kind, name), tmp_path / "site", programs)
    count = {"plain": 8, "logger": 7}.get(kind, 5)
    assert f"{count} passed" in output


@pytest.mark.slow
def test_the_template_is_a_plugin_as_it_stands(tmp_path: Path, programs: Any) -> None:
    for path in FILES:
        (tmp_path / "template" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "template" / path).write_bytes((TEMPLATE / path).read_bytes())
    assert "8 passed" in own_tests(tmp_path / "template", tmp_path / "site", programs)


def test_ruff_finds_nothing_in_what_was_written() -> None:
    for kind in KINDS:
        folder = written(kind, f"noise_{kind.replace(' ', '_')}")
        for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
            done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_finds_nothing_in_what_was_written(tmp_path: Path) -> None:
    folders = [written(kind, f"noise_{kind.replace(' ', '_')}") for kind in KINDS]
    files = [str(file) for folder in folders for file in (*folder.glob("*_noise_*.py"), *folder.glob("tests/*.py"))]
    env = {**os.environ, "MYPYPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-m", "mypy", "--strict", *files, str(folders[0] / "hatch_build.py")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"no issues found in {2 * len(KINDS) + 1} source files" in done.stdout


# ---------------------------------------------------------------------- the template


def test_every_file_of_the_template_is_used() -> None:
    there = {str(path.relative_to(TEMPLATE)) for path in TEMPLATE.rglob("*") if path.is_file() and "cache" not in str(path)}
    own = {f"{variant}/{path}" for variant in VARIANTS for path in ("README.md", "torchplug_quokka.py", "tests/test_quokka.py")}
    assert there == set(FILES) | own


def test_the_template_is_made_for_this_core_and_has_its_licence() -> None:
    (range_,) = project(TEMPLATE)["dependencies"]
    assert allows(range_.removeprefix("torchplug"), torchplug.__version__)
    assert (TEMPLATE / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_of_core_holds_the_whole_template(tmp_path: Path) -> None:
    with zipfile.ZipFile(built(build_wheel, ROOT, tmp_path / "dist")) as wheel:
        for variant in ("", *VARIANTS):
            for path in FILES:
                file = TEMPLATE / variant / path
                if file.exists():
                    assert wheel.read(f"torchplug/template/{file.relative_to(TEMPLATE)}") == file.read_bytes()
