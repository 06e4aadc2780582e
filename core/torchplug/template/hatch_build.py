"""Refuses to build the package for others as long as it does not say what the plugin does. `pip install -e .` is not refused."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SaysWhatItDoes(BuildHookInterface[Any]):
    """`description` in pyproject.toml and the first sentence of README.md are the same, and are not empty."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        description = self.metadata.core.description.rstrip(".")
        if not description:
            raise ValueError("pyproject.toml: description is empty; write what the plugin does in one sentence, here and in README.md")
        if description not in " ".join(Path(self.root, "README.md").read_text(encoding="utf-8").split()):
            raise ValueError(f"README.md does not say {description!r}, the description in pyproject.toml; write it below the title")
