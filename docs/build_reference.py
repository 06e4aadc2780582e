"""Makes the pages of the site that say what the code says: hooks, Trainer, plugins and their options, public modules, sources.

mkdocs calls the functions `on_...` (``hooks`` in mkdocs.yml). Nothing is written into the repository: README.md
becomes the home page, each plugin's README.md its page, with a table of options that comes from the plugin's dataclass, and a file that a
page links to becomes a page with its source.
"""

from __future__ import annotations

import importlib
import inspect
import posixpath
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torchplug import hookspecs
from torchplug.members import ACTIONS, CLOSING, OPERATIONS, PARAMETERS
from torchplug.options import Field, fields_of
from torchplug.settings import RENAMED, Settings

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
MODULES = (
    "averaging",
    "checkpoint",
    "distributed",
    "launching",
    "optimizers",
    "sharded",
    "testing",
    "tracking",
    "trials",
)  # hooks have a page of their own
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changes.md", "cli/README.md": "cli.md"}  # files that are pages
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")

# ---------------------------------------------------------------------- what mkdocs calls


def on_config(config: Any) -> None:
    """Puts the pages of plugins and modules into the navigation, where mkdocs.yml has ``plugins/`` and ``reference/api/``."""
    if missing := not_installed():
        from mkdocs.exceptions import PluginError

        raise PluginError(missing)
    pages = {
        "plugins/": ["plugins/index.md", *({name: f"plugins/{name}.md"} for name in PLUGINS)],
        "reference/api/": [{title: path} for path, title in _modules().items()],
    }

    def filled(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: filled(target) for title, target in entry.items()}
        return [filled(each) for each in entry] if isinstance(entry, list) else pages.get(entry, entry)

    config.nav = filled(config.nav)


def on_files(files: Any, config: Any) -> None:
    """Adds the generated pages."""
    from mkdocs.structure.files import File  # what makes the pages needs no mkdocs

    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leaves out comments, and lets links to files of the repository lead to their pages."""
    return rendered(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings end a text with ``::`` before code; the page shows the code, and no second colon."""
    return re.sub(r"::</p>", ":</p>", html.replace("<p>::</p>", ""))


def not_installed() -> str:
    """What to do where a plugin, whose options the pages show, is not installed; empty if all are."""
    missing = next((name for name in PLUGINS if name not in entry_points(group="torchplug").names), "")
    return f"plugin {missing!r} is not installed: pip install -r requirements-dev.txt" if missing else ""


# ---------------------------------------------------------------------- pages


def generated() -> dict[str, str]:
    """The pages that are in no file of docs/, by their place on the site."""
    pages = {
        **{moved: (ROOT / path).read_text(encoding="utf-8") for path, moved in MOVED.items()},
        "reference/hooks.md": hooks_page(),
        "reference/trainer.md": trainer_page(),
        "plugins/index.md": plugins_page(),
        **{f"plugins/{name}.md": plugin_page(name) for name in PLUGINS},
        **{path: module_page(title) for path, title in _modules().items()},
    }
    texts = {origin(path): text for path, text in pages.items()}
    texts |= {f"docs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    for source in sorted({target for name, text in texts.items() for target in _links(name, text)}):
        if (ROOT / source).is_file() and place(source).startswith("source/"):
            pages[place(source)] = _source_page(source)
    return pages


def hooks_page() -> str:
    """The contract: its text, the picture with links, and each hook in the order of the file."""
    text = inspect.cleandoc(hookspecs.__doc__ or "")
    before, _, rest = text.partition("The picture of a run::\n\n")
    picture, _, after = rest.partition("\n\n")
    drawn = re.sub(r"[a-z]+(?:_[a-z]+)+|\w+", _hook_link, inspect.cleandoc(picture))
    parts = [
        "# Hooks", before.replace("``", "`"),
        f'## The picture of a run\n\n<div class="highlight"><pre><code>{drawn}</code></pre></div>', after.replace("``", "`"),
    ]  # fmt: skip
    for title, names in _groups():
        parts += [f"## {title[0].upper()}{title[1:]}", *(hook_entry(name) for name in names)]
    return "\n\n".join(parts) + "\n"


def hook_entry(name: str) -> str:
    """One hook: kind, version, arguments with types, text."""
    spec = getattr(hookspecs.Hooks, name)
    text, since = since_of(name)
    arguments = list(inspect.signature(spec).parameters.values())[1:]
    listed = "".join(f"\n    {each.name}: {each.annotation}," for each in arguments)
    code = f"```python\ndef {name}(\n    self,{listed}\n) -> {inspect.signature(spec).return_annotation}\n```"
    return f"### `{name}` {{ #{name} }}\n\n{kind_of(name)}, since {since}\n\n{code}\n\n{text.replace('``', '`')}"


def kind_of(hook: str) -> str:
    """What a hook is, in the words of `hookspecs.py`."""
    if hook in ACTIONS:
        return "**Action**: an operation that answers `True` when it is done"
    if hook in OPERATIONS:
        return "**Operation**: the first answer counts"
    return "**Closing event**: reaches everybody, the last plugin first" if hook in CLOSING else "**Event**"


def since_of(hook: str) -> tuple[str, str]:
    """A hook's text, and the version that it came in."""
    text = inspect.cleandoc(getattr(hookspecs.Hooks, hook).__doc__ or "")
    found = re.search(r"\s*Since (\d+\.\d+)\.$", text)
    return (text[: found.start()], found.group(1)) if found else (text, "")


def trainer_page() -> str:
    """Every argument of the Trainer, and what older arguments are called now."""
    parts = ["# Trainer", "`torchplug.Trainer` takes these arguments, all by name. `torchplug explain ARGUMENT` says the same."]
    for field in fields_of(Settings):
        allowed = f", {field.range}" if field.range else ""
        parts.append(f"### `{field.name}`\n\n{kinds(field)}{allowed}; default `{field.default}`\n\n{_escaped(field.text)}")
    rows = "\n".join(f"| `{old}` | {_escaped(now)} |" for old, now in RENAMED.items())
    parts.append(
        f"## Arguments of other trainers\n\nEach is an error that says what to write now.\n\n| argument | now |\n|---|---|\n{rows}"
    )
    return "\n\n".join([*parts, "## Methods", "::: torchplug.trainer.Trainer\n    options: {show_root_heading: false, show_bases: false}"])


def plugins_page() -> str:
    """All plugins of this repository, each in a line."""
    rows = []
    for name in PLUGINS:
        title, summary = _readme(name).split("\n\n")[:2]
        rows.append(f"| [`{name}`]({name}.md) | {' '.join(summary.split())} | `pip install {title.removeprefix('# ')}` |")
    table = "\n".join(["| name | what it does | install |", "|---|---|---|", *rows])
    return f"# Plugins\n\nInstalling one enables nothing; naming it in `Trainer(plugins=[...])` does.\n\n{table}\n"


def plugin_page(name: str) -> str:
    """A plugin's README with its options as the code has them, links to the hooks, and where the names of its examples come from."""
    text = _readme(name)
    target = entry_points(group="torchplug")[name].load()
    if not isinstance(target, list):
        text = re.sub(r"(?<=\n## Options\n\n)(\|.*\n)+", lambda _: options_table(target), text)
    text, title, hooks = text.partition("\n## Hooks\n")
    text += "\nNames that the examples do not define are [these](../../docs/names.md).\n"
    used = [hook for hook in PARAMETERS if hasattr(getattr(target, hook, None), "torchplug_impl")]
    missing = [f"`{hook}`" for hook in used if f"`{hook}`" not in hooks]
    if missing and len(used) < len(PARAMETERS):  # where it is all of them the README says so
        hooks += f"\nIn full, also: {', '.join(missing)}.\n"
    return text + title + re.sub(r"`(\w+)`", _hook_reference, hooks)


def options_table(plugin: type) -> str:
    """The options of a plugin, from the fields of its dataclass."""
    rows = []
    for field in fields_of(plugin):
        allowed = f" ({field.range})" if field.range else ""
        default = "required" if field.default == "required" else f"`{field.default}`"
        rows.append(f"| `{field.name}` | {kinds(field)}{allowed} | {default} | {_escaped(field.text)} |")
    return "\n".join(["| name | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n" if rows else "None.\n"


def module_page(module: str) -> str:
    """The public names of a module, by mkdocstrings."""
    loaded = importlib.import_module(module)
    documented = {name: getattr(loaded, name) for name in loaded.__all__ if name != "Trainer"}
    names = [name for name, each in documented.items() if inspect.isclass(each) or inspect.isroutine(each)]
    homes = {name: getattr(documented[name], "__module__", module) for name in names}
    parts = [f"# {module}", inspect.cleandoc(loaded.__doc__ or "").replace("``", "`")]
    if module == "torchplug":
        parts.append("`Trainer` is described [here](../trainer.md), `hookimpl` with the [hooks](../hooks.md).")
    return "\n\n".join([*parts, *(f"::: {homes[name]}.{name}" for name in names)]) + "\n"


def _source_page(path: str) -> str:
    language = {".py": "python", ".toml": "toml", ".md": "markdown"}.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n````{language}\n{(ROOT / path).read_text(encoding='utf-8')}````\n"


# ---------------------------------------------------------------------- text


def rendered(markdown: str, page: str) -> str:
    """The text of a page with links that hold on the site, and without comments."""
    name, parts = origin(page), FENCE.split(markdown)
    for index in range(0, len(parts), 2):
        text = re.sub(r"<!--.*?-->\n?", "", parts[index], flags=re.DOTALL)
        parts[index] = LINK.sub(lambda found: posixpath.relpath(place(_resolved(name, found[1])), posixpath.dirname(page) or "."), text)
    return "".join(parts)


def origin(page: str) -> str:
    """The file of the repository that a page of the site is made from; a generated one is taken for a file of docs/."""
    if page in MOVED.values():
        return next(path for path, moved in MOVED.items() if moved == page)
    plugin = re.fullmatch(r"plugins/(\w+)\.md", page)
    return f"plugins/{plugin[1]}/README.md" if plugin and plugin[1] in PLUGINS else f"docs/{page}"


def place(path: str) -> str:
    """Where a file of the repository stands on the site."""
    plugin = re.fullmatch(r"plugins/(\w+)/README\.md", path)
    if plugin:
        return f"plugins/{plugin[1]}.md"
    if path in MOVED:
        return MOVED[path]
    if path == "core/torchplug/hookspecs.py":
        return "reference/hooks.md"
    module = re.fullmatch(r"core/torchplug/(\w+)\.py", path)
    if module and module[1] in MODULES:
        return f"reference/api/{module[1]}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") and not path.endswith(".py") else f"source/{path}.md"


def kinds(field: Field) -> str:
    """The types of an option: ``Literal['a', 'b'] | None`` is "`'a'` or `'b'` or `None`"."""
    words, depth = [""], 0
    for character in field.type.replace("collections.abc.", ""):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "|" and not depth:
            words.append("")
        else:
            words[-1] += character
    choices = [re.sub(r"^Literal\[(.*)\]$", r"\1", word.strip()).replace("', '", "'` or `'") for word in words]
    choices = [choice.replace(" | ", " or ") for choice in choices]  # inside of brackets; a bar would end a table's cell
    return " or ".join(f"`{choice}`" for choice in choices)


def _escaped(text: str) -> str:
    """A docstring's text as Markdown, that may stand in a table."""
    parts = re.split(r"(`[^`]*`)", text.replace("``", "`"))
    parts[::2] = [re.sub(r"([*<|]|__)", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _links(name: str, text: str) -> Iterator[str]:
    for part in FENCE.split(text)[::2]:
        yield from (_resolved(name, target) for target in LINK.findall(part))


def _resolved(name: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target))


def _hook_reference(found: re.Match[str]) -> str:
    return f"[{found[0]}](../../docs/reference/hooks.md#{found[1]})" if found[1] in PARAMETERS else found[0]


def _hook_link(found: re.Match[str]) -> str:
    return f'<a href="#{found[0]}">{found[0]}</a>' if found[0] in PARAMETERS else found[0]


def _groups() -> list[tuple[str, list[str]]]:
    """The sections of the class `Hooks`, with the hooks in each, in the order of the file."""
    source = inspect.getsource(hookspecs.Hooks)
    _, *parts = re.split(r"^    # -{10,} (.*)\n", source, flags=re.MULTILINE)
    return [(title, re.findall(r"^    def (\w+)", part, re.MULTILINE)) for title, part in zip(parts[::2], parts[1::2], strict=True)]


def _modules() -> dict[str, str]:
    return {"reference/api/torchplug.md": "torchplug"} | {f"reference/api/{name}.md": f"torchplug.{name}" for name in MODULES}


def _readme(plugin: str) -> str:
    return (ROOT / "plugins" / plugin / "README.md").read_text(encoding="utf-8")
