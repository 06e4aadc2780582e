"""What the files are called."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Mapping
from typing import Any

from torchplug import Run

__all__ = ["DEFAULT", "LAST", "SUFFIX", "check_template", "emergency", "filled", "is_checkpoint", "safe"]

SUFFIX = ".safetensors"
LAST = f"last{SUFFIX}"
DEFAULT = "epoch={epoch}-step={step}"
EMERGENCY = re.compile(rf"exception-epoch=\d+-step=\d+(-v\d+)?{re.escape(SUFFIX)}")


class _ByName(string.Formatter):
    """Formats fields by their whole name: dots and slashes in it are part of a metric's name."""

    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return kwargs[field_name], field_name


def check_template(template: Any) -> None:
    """Refuses a file name template that cannot be filled in."""
    if not isinstance(template, str) or not template:
        raise ValueError(f"filename must be a template such as '{{epoch}}-{{step}}-{{val_loss:.3f}}', got {template!r}")
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"filename {template!r} is not a template: {error}") from error
    if any(not name or name.isdigit() for name in names):
        raise ValueError(f"filename {template!r} must say by name what to put in, such as {{epoch}}")


def filled(template: str, run: Run) -> str:
    """A file name from the template, without the suffix, safe on every file system."""
    place = {"epoch": run.position.epoch, "step": run.position.step}
    values = {**place, **run.metrics.results(), **place}
    try:
        name = _ByName().vformat(template, (), values)
    except KeyError as error:
        near = difflib.get_close_matches(str(error.args[0]), values, n=1)
        meant = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"filename {template!r}: there is no {error.args[0]!r}{meant}; there are: {', '.join(values)}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"filename {template!r} cannot be filled in: {error}") from error
    return safe(name.removesuffix(SUFFIX))


def safe(name: str) -> str:
    """``name`` without characters that some file system refuses."""
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", name)


def emergency(run: Run) -> str:
    """The name, without the suffix, of what is saved when an error ends the run."""
    return f"exception-epoch={run.position.epoch}-step={run.position.step}"


def is_checkpoint(name: str) -> bool:
    """Whether a file of this name is a whole checkpoint of a state that training can go on from."""
    return name.endswith(SUFFIX) and EMERGENCY.fullmatch(name) is None
