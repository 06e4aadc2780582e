"""What README and docs show is true: examples run, links lead somewhere, figures come from the benchmark."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "plugins").glob("*/README.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_example_the_resume_and_the_plugin_of_the_readme_run_as_they_stand(tmp_path, programs):
    example, resume, plugin = blocks(ROOT / "README.md", "python")
    went_on = "\nassert trainer.run.position.epoch == 8 and trainer.run.dir.name == 'version_0', trainer.run\n"
    code = example + resume + went_on + plugin + "\nTrainer(max_epochs=3, plugins=[LossPrinter()]).fit(Line(), data)\n"
    done = programs.run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [line.split() for line in done.stdout.splitlines() if re.match(r"\d \d", line)]
    assert [row[0] for row in printed[-3:]] == ["0", "1", "2"]
    assert float(printed[-1][1]) < float(printed[-3][1])
    assert (tmp_path / "runs/Line/version_0/checkpoints/last.safetensors").exists()


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_names_every_plugin_and_its_install_line():
    text = (ROOT / "README.md").read_text()
    for folder in sorted(path.name for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").exists()):
        assert f"| `{folder}` | `pip install torchplug-{folder.replace('_', '-')}` |" in text


def test_the_readme_has_the_two_commands_that_ci_runs():
    commands = [command.strip() for command in blocks(ROOT / "README.md", "sh")]
    ci = (ROOT / ".ci" / "run").read_text()
    assert len(commands) == 2
    for command in commands:
        assert command in ci
