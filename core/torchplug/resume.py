"""Where a run starts from: which file, what it was read as, and how it is put in place."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchplug.checkpoint import CheckpointError
from torchplug.matching import Choice, check_model
from torchplug.run import located
from torchplug.sharded import spread
from torchplug.state import restore

if TYPE_CHECKING:
    from torchplug.run import Run

__all__ = ["Start", "find_start", "go_on_as", "put_in_place"]

logger = logging.getLogger("torchplug")


@dataclass
class Start:
    """A state to start from.

    Args:
        path: the file it was read from, None for the end of the trainer's own earlier run.
        state: what was read.
        choice: which parts of it are wanted.
    """

    path: Path | str | None
    state: dict[str, Any]
    choice: Choice


def find_start(run: Run, ckpt_path: str | Path, choice: Choice, fitted: Run | None) -> Start | None:
    """What a run starts from; where there are several ranks, the first one says which file that is.

    Raises:
        CheckpointError: the file cannot be used, or none of the candidates can.
        FileNotFoundError: there is no such file, or nothing to evaluate.
    """
    if run.world_size == 1:
        return _found(run, ckpt_path, choice, fitted)
    found: list[Start | None] = []

    def look() -> Path | str | None:
        found.append(_found(run, ckpt_path, choice, fitted))
        return None if found[0] is None else found[0].path

    path = run.from_rank_0(look)
    if found:
        return found[0]
    return None if path is None else Start(path, _read(run, path, asked_for=True), choice)


def _found(run: Run, ckpt_path: str | Path, choice: Choice, fitted: Run | None) -> Start | None:
    """Reads what ``ckpt_path`` means: a path, or "last" or "best", of which the first candidate that can be used is taken.

    Raises:
        CheckpointError: the file cannot be used, or none of the candidates can.
        FileNotFoundError: there is no such file, or nothing to evaluate.
    """
    if ckpt_path not in ("last", "best"):
        path = located(ckpt_path)
        if isinstance(path, Path) and not path.exists():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        return Start(path, _read(run, path, asked_for=True), choice)
    known = getattr(fitted, f"{ckpt_path}_path", None) if run.work != "fit" else None
    candidates = [known] if known is not None else run.hooks.find_checkpoints(run, ckpt_path)
    if candidates is None:
        raise ValueError(f"ckpt_path={ckpt_path!r}: no enabled plugin knows where checkpoints are; enable 'checkpoint', or give a path")
    passed_over = []
    for path in candidates:
        try:
            start = Start(path, _read(run, path), choice)
        except (CheckpointError, OSError) as error:
            passed_over.append(str(error))
            continue
        for line in passed_over:
            logger.warning("passed over: %s", line)
        return start
    if passed_over:
        lines = "\n  ".join(passed_over)
        raise CheckpointError(f"ckpt_path={ckpt_path!r}: none of {len(passed_over)} checkpoints can be used:\n  {lines}")
    if run.work != "fit" or ckpt_path == "best":
        raise FileNotFoundError(f"ckpt_path={ckpt_path!r}: there is no checkpoint of an earlier run")
    logger.info("there is no checkpoint of an earlier run: training starts from the beginning")
    return None


def _read(run: Run, path: Path | str, asked_for: bool = False) -> dict[str, Any]:
    """The state in a file, if it is good for what the run does."""
    state: dict[str, Any] = run.hooks.load_checkpoint(run, path)
    if run.work == "fit" and not asked_for:
        if state["kind"] != "run":
            raise CheckpointError(f"{path} holds weights only")
        if state["emergency"]:
            raise CheckpointError(f"{path} was written in an emergency ({state['emergency']}); give its path to use it")
    elif run.work == "fit" and state.get("emergency"):
        logger.warning("%s was written in an emergency (%s): the step that failed may be done in part", path, state["emergency"])
    return state


def go_on_as(run: Run, start: Start) -> None:
    """The run has the identity and the position of the one that wrote the checkpoint, and its directory if that is among the
    runs of this name."""
    run.place(start.state)
    run.resumed = start.path
    own = Path(run.options.root_dir) / (run.options.name or type(run.module).__name__)
    above = list(start.path.parents)[:4] if isinstance(start.path, Path) else []
    for folder in (*above, Path(start.state["run"]["dir"])):
        if folder.is_dir() and folder.absolute().parent == own.absolute() and not run.options.fast_dev_run:
            run.dir = folder
            return


def put_in_place(run: Run, start: Start) -> None:
    """Puts a state into a prepared run and tells everybody."""
    if run.work != "fit":
        check_model(run, start.state["module"], str(start.path))
        run.module.load_state_dict(spread(start.state["module"], run.module.state_dict()))
        logger.info("%s with the weights of %s", run.work, start.path)
    else:
        report = restore(run, start.state, start.path, start.choice)
        place = run.position
        logger.info(
            "goes on from %s at epoch %d, batch %d, step %d: %s",
            start.path or "its earlier run", place.epoch, place.batch, place.step, report,
        )  # fmt: skip
        run.resumption = report
        options = run.options
        if place.epoch >= (options.max_epochs or float("inf")) or place.step >= (options.max_steps or float("inf")):
            logger.warning("nothing is left to train: max_epochs or max_steps is reached; raise it to go on")
    if start.path is not None:
        run.hooks.on_checkpoint_loaded(run, start.path)
