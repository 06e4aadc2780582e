"""What README and docs show is true: examples run, links lead somewhere, figures come from the benchmark, nothing is undocumented.

Each page's examples are one program, run from top to bottom in an empty folder. Its lines have the numbers that they have in the page.
Comments in a page, which readers do not see, say what is special:

    <!-- first:            Python that is run at this place, and not shown
    ...
    -->
    <!-- built: WHY -->    above a block: its trainers are built, with plugins and options, and their methods do nothing
    <!-- not run: WHY -->  above commands: they exist, and are not run
    <!-- followed by PATH -->   anywhere: the test in PATH does what this page says

A block that begins with a line such as ``# config.yaml`` is written to that file, for the commands that follow.
A page with a link to docs/names.md, and the README of every plugin, may use the names that are defined there.
"""

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import Any

import pytest

from torchplug.hookspecs import Hooks
from torchplug.members import PARAMETERS
from torchplug.options import fields_of
from torchplug.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "cli" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
]
PLUGINS = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
NAMES = ROOT / "docs" / "names.md"
LANGUAGES = {"python", "sh", "bash", "yaml", "toml", "json", "text"}
BUILT_AT_MOST = 5  # blocks that this machine cannot run

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass
class Block:
    """A block of a page: its language, the number of its first line (from 0), its lines, and the comment above it."""

    language: str
    start: int
    lines: list[str]
    comment: str = ""

    @property
    def file(self) -> str:
        """The name of the file that the block is."""
        found = re.fullmatch(r"# ([\w./-]+\.\w+)", self.lines[0]) if self.lines else None
        return found[1] if found else ""


def parts(page: Path) -> Iterator[Block]:
    """The blocks of a page and, as Python, what stands in its comments ``<!-- first:``."""
    lines, comment, number = page.read_text(encoding="utf-8").splitlines(), "", 0
    while number < len(lines):
        line = lines[number]
        fence = re.match(r" *```(.*)$", line)
        if fence or line == "<!-- first:":
            last = "```" if fence else "-->"
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == last)
            yield Block(fence[1] if fence else "first", number + 1, lines[number + 1 : end], comment)
            number = end
        note = re.fullmatch(r"<!-- (.*) -->", line)
        comment = note[1] if note else ""
        number += 1


def program(page: Path) -> str:
    """The examples of a page, each line with the number that it has there."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (len(text.splitlines()) + 1)
    if page.parent.parent == ROOT / "plugins" or re.search(r"\]\((docs/)?names\.md\)", text):
        lines[0] = "from names import *"
    for block in parts(page):
        before, after, code, content = "", "", [], "\n".join(block.lines) + "\n"
        if block.file:
            before = f"pages.file({block.file!r}, {content!r})"
        if block.language in ("python", "first") and not block.file:
            code = block.lines
            if block.comment.startswith("built: "):
                before, after = "pages.training(False)", "pages.training(True)"
        elif block.language == "yaml":
            before += ("; " if before else "") + f"pages.configuration({content!r})"
        elif block.language in ("sh", "bash"):
            commands = content.replace("\\\n", " ").splitlines()
            before = "; ".join(f"pages.shell({line!r}, {not block.comment.startswith('not run: ')})" for line in commands) or "pass"
        lines[block.start - 1] = f"import pages; {before}" if before else ""
        lines[block.start : block.start + len(code)] = code
        lines[block.start + len(block.lines)] = after
    return "\n".join(lines) + "\n"


# as a file, because processes that a program starts read it too
RUN = """
import sys, types
sys.modules["__main__"] = main = types.ModuleType("__main__")
main.__file__ = sys.argv[1]
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), vars(main))
"""


def run_page(page: Path, folder: Path, programs: Any) -> Any:
    """Runs the examples of a page in ``folder``."""
    (folder / "names.py").write_text("\n".join(line for block in parts(NAMES) for line in block.lines))
    (folder / "page.py").write_text(program(page))
    paths = os.pathsep.join([str(folder), str(ROOT / "tests" / "fixtures"), os.environ.get("PYTHONPATH", "")])
    settings = {
        "PYTHONPATH": paths,
        "MPLBACKEND": "Agg",
        "WANDB_MODE": "offline",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    return programs.run(RUN, str(folder / "page.py"), cwd=folder, env={**os.environ, **settings})


def followed(page: Path) -> str | None:
    """The test that does what the page says, in place of the one below."""
    found = re.search(r"<!-- followed by (\S+) -->", page.read_text(encoding="utf-8"))
    return found and found[1]


RUN_HERE = [page for page in PAGES[1:] if any(parts(page)) and not followed(page)]  # README has a test that looks at what it prints
SLOW = ("docs/distributed.md", "docs/loggers.md", "plugins/mlflow/README.md")  # start processes, import what trackers bring


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name, marks=pytest.mark.slow if name in SLOW else ())
        for page in RUN_HERE
        for name in [str(page.relative_to(ROOT))]
    ],
)
def test_the_examples_of_a_page_run(page, tmp_path, programs):
    done = run_page(page, tmp_path, programs)
    assert done.returncode == 0, f"{page}: {done.stderr}"


def test_blocks_that_are_not_run_are_few_and_say_why():
    comments = [block.comment for page in PAGES for block in parts(page) if block.comment]
    for comment in comments:
        assert re.fullmatch(r"(built|not run): \w.+|followed by \S+", comment), comment
    assert sum(comment.startswith("built: ") for comment in comments) <= BUILT_AT_MOST


@each_page
def test_every_block_says_what_it_is_and_is_that(page):
    for block in parts(page):
        assert block.language in {*LANGUAGES, "first"}, f"{page}, line {block.start}: {block.language!r}"
        if block.language == "toml":
            tomllib.loads("\n".join(block.lines))
        elif block.language == "json":
            json.loads("\n".join(block.lines))


@each_page
def test_what_follows_a_page_is_there_and_reads_it(page):
    if test := followed(page):
        assert page.name in (ROOT / test).read_text(encoding="utf-8")


# ---------------------------------------------------------------------- nothing is undocumented


@pytest.fixture(scope="module")
def reference() -> Any:
    """The module that makes the generated pages."""
    spec = importlib.util.spec_from_file_location("build_reference", ROOT / "docs" / "build_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("hook", PARAMETERS)
def test_a_hook_has_a_version_that_is_out_and_a_type_for_each_argument(hook, reference):
    text, since = reference.since_of(hook)  # that there are both is said by tests/test_hookspecs.py
    assert text.endswith(".")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [int(part) for part in since.split(".")] <= [int(part) for part in project["version"].split(".")[:2]]
    signature = inspect.signature(getattr(Hooks, hook))
    for argument in list(signature.parameters.values())[1:]:
        assert argument.annotation is not argument.empty, argument
    assert signature.return_annotation is not signature.empty


def test_the_page_of_hooks_has_every_hook_in_the_order_of_the_file_and_the_picture_leads_there(reference):
    page = reference.hooks_page()
    assert re.findall(r"^### `\w+` \{ #(\w+) \}$", page, re.MULTILINE) == list(PARAMETERS)
    drawn = re.findall(r'<a href="#(\w+)">', page)
    assert {"launch", "train_batch", "optimizer_step", "on_validation_end", "teardown"} <= set(drawn) <= set(PARAMETERS)
    entry = reference.hook_entry("optimizer_step")
    assert (
        "Action" in entry and "since 0.1" in entry and "closure: Callable[[], Tensor] | None" in entry and "Update the parameters" in entry
    )
    assert "Since" not in entry


@pytest.mark.parametrize("field", fields_of(Settings), ids=lambda field: field.name)
def test_the_page_of_the_trainer_has_each_argument_with_text_type_and_default(field, reference):
    assert len(field.text.split()) >= 3 and field.type and field.default
    (entry,) = re.findall(rf"^### `{field.name}`\n\n(.*?)(?=\n\n##)", reference.trainer_page(), re.DOTALL | re.MULTILINE)
    assert f"; default `{field.default}`" in entry and field.range in entry
    assert field.text.split()[-1].strip(".") in entry


@pytest.mark.parametrize("name", PLUGINS)
def test_the_page_of_a_plugin_has_each_option_with_text_type_and_default_as_its_readme_says(name, reference):
    page, readme = reference.plugin_page(name), (ROOT / "plugins" / name / "README.md").read_text(encoding="utf-8")
    assert f"pip install torchplug-{name.replace('_', '-')}" in page
    plugin = entry_points(group="torchplug")[name].load()
    said = dict(re.findall(r"^\| `(\w+)` \| `?([^|]+?)`? \|", readme.partition("\n## Options\n")[2], re.MULTILINE))
    for field in fields_of(plugin) if inspect.isclass(plugin) else []:
        assert field.text and field.type
        (row,) = re.findall(rf"^\| `{field.name}` \| .*\|$", page.partition("\n## Options\n")[2], re.MULTILINE)
        cells = re.split(r" (?<!\\)\| ", row.strip("| "))
        assert len(cells) == 4 and cells[1] and cells[3] and cells[2].strip("`") == field.default
        assert _value(said[field.name]) == _value(field.default), f"README says that {field.name} is {said[field.name]} by default"
    for hook in PARAMETERS:
        if hasattr(vars(plugin).get(hook) if inspect.isclass(plugin) else None, "torchplug_impl") and name != "lambda_hooks":
            assert f"[`{hook}`](../../docs/reference/hooks.md#{hook})" in page


def _value(text: str) -> Any:
    """A default as a value, so that ``"min"`` and ``'min'`` are the same; "required" as it is."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def test_there_is_a_page_for_every_module_that_plugins_may_use(reference):
    (public,) = re.findall(
        r"^PUBLIC = (\{.*?\})", (ROOT / "tests" / "test_layout.py").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert {"torchplug", "torchplug.hookspecs", *(f"torchplug.{name}" for name in reference.MODULES)} == ast.literal_eval(public)


# ---------------------------------------------------------------------- the site


def test_a_plugin_that_is_not_installed_is_named_with_what_to_do(reference, monkeypatch):
    installed = [EntryPoint(name, "module:Plugin", "torchplug") for name in PLUGINS]
    monkeypatch.setattr(reference, "entry_points", lambda group: EntryPoints(installed).select(group=group))
    assert reference.not_installed() == ""
    del installed[PLUGINS.index("ema")]
    assert reference.not_installed() == "plugin 'ema' is not installed: pip install -r requirements-dev.txt"


def test_the_colons_of_a_docstring_before_its_code_are_no_text(reference):
    html = "<p>Some text::</p>\n<p>::</p>\n<pre><code>a::b</code></pre>"
    assert reference.on_page_content(html) == "<p>Some text:</p>\n\n<pre><code>a::b</code></pre>"


@pytest.mark.slow
def test_the_site_is_built_and_fetches_nothing_from_elsewhere(tmp_path, reference):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {str(path.relative_to(tmp_path / "site")): path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert {f"plugins/{name}.html" for name in PLUGINS} <= set(pages)
    for name, text in pages.items():
        fetched = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"?([^\"\s>]+)", text)
        assert not [url for url in fetched if re.match(r"(https?:)?//", url)], name
        assert '<meta name="viewport"' in text, name
        assert "@import" not in text and "fonts.g" not in text, name
    for hook in PARAMETERS:
        assert f'id="{hook}"' in pages["reference/hooks.html"]
    assert "<!--" not in re.sub(r"<!--\[if.*?-->", "", pages["plugins/ema.html"]), "comments are for the tests"
    for page in ("testing", "averaging"):
        assert "::</p>" not in pages[f"reference/api/{page}.html"]
    assert all("site.css" in text for text in pages.values())


# ---------------------------------------------------------------------- README


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def without_figures(text: str) -> str:
    return re.sub(r"[\d.]+(e-\d+)?", "#", text)


def test_the_example_the_plugin_and_the_resume_of_the_readme_run_as_they_stand_and_print_what_it_says(tmp_path, programs):
    example, plugin, resume = blocks(ROOT / "README.md", "python")
    went_on = "\nassert trainer.run.position.epoch == 8 and trainer.run.dir.name == 'version_0', trainer.run\n"
    used = "Trainer(max_epochs=3, plugins=[LossPrinter(every=2)]).fit(Line(), data)\n"
    assert (
        len([line for line in example.splitlines() if line.strip()]) == 20 and len([li for li in plugin.splitlines() if li.strip()]) <= 15
    )
    done = programs.run(f"{example}import sys; sys.stderr.write('END\\n')\n{plugin}{resume}{went_on}{used}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed, said = done.stderr.partition("END\n")[0], blocks(ROOT / "README.md", "text")[0]
    assert without_figures(printed) == without_figures(said)
    losses, shown = (re.findall(r"train_loss(?:_step)? ([\d.]+)", text) for text in (printed, said))
    assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in shown], rel=0.02)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["1"]
    assert (tmp_path / "runs/Line/version_0/checkpoints/last.safetensors").exists()


def test_the_loop_of_the_readme_has_hooks_in_the_order_of_the_contract():
    drawn = blocks(ROOT / "README.md", "text")[1]
    hooks = [word for word in re.findall(r"\w+", drawn) if word in PARAMETERS]
    assert len(hooks) >= 20
    assert hooks == [hook for hook in PARAMETERS if hook in hooks]
    assert max(map(len, drawn.splitlines())) <= 45, "a phone shows no more"


def test_the_logger_that_the_docs_show_logs(tmp_path, programs):
    *_, logger = blocks(ROOT / "docs/loggers.md", "python")
    model = blocks(ROOT / "README.md", "python")[0].partition("trainer = ")[0]
    use = "\ntrainer = Trainer(max_epochs=2, plugins=[TextLogger()])\ntrainer.fit(Line(), data)\nprint(trainer.run.report['text_logger'])"
    done = programs.run(model + logger + use, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = done.stdout.split()[-1]
    lines = (tmp_path / path).read_text().splitlines()
    assert lines[0].startswith("20 {'train_loss_step'") or lines[0].startswith("10 {'train_loss"), lines
    assert lines[-1] == "finished"


@each_page
def test_links_lead_to_files_that_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_names_every_plugin_and_its_install_line():
    text = (ROOT / "README.md").read_text()
    for folder in sorted(path.name for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").exists()):
        row = rf"^\| \[`{folder}`\]\(plugins/{folder}/README.md\) \| .+ \| `pip install torchplug-{folder.replace('_', '-')}` \|$"
        assert re.search(row, text, re.MULTILINE), folder


def test_the_readme_has_the_two_commands_that_ci_runs():
    commands = [command.strip() for command in blocks(ROOT / "README.md", "sh")]
    ci = (ROOT / ".ci" / "run").read_text()
    assert len(commands) == 2
    for command in commands:
        assert command in ci
