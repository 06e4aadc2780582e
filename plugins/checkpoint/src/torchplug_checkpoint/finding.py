"""Where the checkpoints of earlier runs are: what ``ckpt_path="last"`` and ``"best"`` look through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchplug import Run
from torchplug_checkpoint.names import LAST, is_checkpoint, safe
from torchplug_checkpoint.store import Local, Store, open_store

if TYPE_CHECKING:
    from torchplug_checkpoint.checkpoint import Checkpoint

__all__ = ["best", "folder_in", "newest"]


def folder_in(directory: Path, name: str) -> Path:
    """The folder in a run's directory that is used by the instance of this name."""
    base, _, instance = name.partition(":")
    own = instance or ("" if base == "checkpoint" else base)
    return directory / "checkpoints" / safe(own) if own else directory / "checkpoints"


def newest(run: Run, instances: Mapping[str, Checkpoint]) -> list[Path | str]:
    """All checkpoints in all folders, the newest first."""
    return [store.path(name) for store, name in _newest_first(run, instances)]


def best(run: Run, instances: Mapping[str, Checkpoint]) -> list[Path | str]:
    """The best checkpoints of each run, the newest run first; which they are is said by its newest checkpoint that can be read."""
    found: list[Path | str] = []
    asked = set()
    for store, name in _newest_first(run, instances):
        header = store.header(name)
        for instance, plugin in instances.items():
            books = (header or {}).get("plugins", {}).get(instance)
            if header is None or not books or books["best"] is None:
                continue
            home = _home(store, instance, plugin, header)
            if home.place in asked:
                break
            asked.add(home.place)
            there, owed = home.names(), {save["name"] for save in books["owed"]}
            for kept in (each["name"] for each in books["kept"]):
                if kept in there:
                    found.append(home.path(kept))
                elif kept in owed:  # the process ended before it was made, and this is the same state
                    found.append(store.path(name))
            break
    return found


def _home(store: Store, instance: str, plugin: Checkpoint, header: Mapping[str, Any]) -> Store:
    """The folder of an instance in the run that wrote a checkpoint into ``store``."""
    if plugin.dir is not None:
        return open_store(plugin.dir)
    if isinstance(store, Local):
        for folder in (store.folder, *store.folder.parents):
            if folder.name == "checkpoints":
                return Local(folder_in(folder.parent, instance))
    return Local(folder_in(Path(header["run"]["dir"]), instance))


def _newest_first(run: Run, instances: Mapping[str, Checkpoint]) -> list[tuple[Store, str]]:
    """Every checkpoint as folder and name. Of the same state, the newest checkpoint's own name comes first."""
    found = []
    for store in _stores(run, instances):
        ages = [(age, name) for age, name in store.ages() if is_checkpoint(name)]
        ages.sort(key=lambda each: (-each[0], each[1] != LAST, each[1]))
        if not isinstance(store, Local):
            _put_last_first(store, ages)
        found += [(age, store, name) for age, name in ages]
    found.sort(key=lambda each: -each[0])  # stable: within one moment as above
    return [(store, name) for _, store, name in found]


def _put_last_first(store: Store, ages: list[tuple[float, str]]) -> None:
    """A copy has an age of its own, a little less than what it was made from."""
    names = [name for _, name in ages]
    if LAST not in names[1:]:
        return
    front, last = store.header(names[0]), store.header(LAST)
    if front is not None and last is not None and all(front[part] == last[part] for part in ("run", "position", "time")):
        ages.insert(0, (ages[0][0], ages.pop(names.index(LAST))[1]))


def _stores(run: Run, instances: Mapping[str, Checkpoint]) -> Iterator[Store]:
    """Every folder that the instances write into, or wrote into in earlier runs of this name."""
    seen = set()
    for plugin in instances.values():
        if plugin.dir is not None:
            store = open_store(plugin.dir)
            if store.place not in seen:
                seen.add(store.place)
                yield store
    if any(plugin.dir is None for plugin in instances.values()):
        runs = Path(run.options.root_dir) / (run.options.name or type(run.module).__name__)
        for folder in runs.glob("version_*/checkpoints"):
            for each in (folder, *(inner for inner in folder.rglob("*") if inner.is_dir())):
                yield Local(each)
