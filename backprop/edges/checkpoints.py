"""Checkpoints of a run: complete or absent, and never believed unread."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from backprop.edges import rundir, stopping
from backprop.errors import UsageError
from backprop.events import JSON, Sink, Warned

MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step-\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint whose every file is as it was written."""

    folder: Path
    state: Mapping[str, Any]
    """What is not a tensor."""

    @property
    def step(self) -> int:
        """Steps that were finished."""
        return int(self.state["step"])


def write(parent: Path, state: Mapping[str, JSON], fill: Callable[[Path], None], *, keep: int) -> Path:
    """Write a checkpoint of ``state`` and of the files that ``fill`` puts into a folder, and remove old ones.

    Args:
        state: With the number of finished steps as `step`.
        keep: Checkpoints that stay, this one included.

    Raises:
        DiskError: If the disk is full or may not be written; what was there stays.
    """
    folder = parent / f"step-{state['step']:06d}"
    with stopping.held():
        put(folder, state, fill)
        # Later ones are of a run that was begun from an earlier checkpoint again.
        others = [other for other in _folders(parent) if other != folder]
        later = [other for other in others if _step_of(other) > _step_of(folder)]
        for old in (*later, *others[: len(others) - len(later)][: -(keep - 1) or None]):
            shutil.rmtree(old)
    return folder


def put(folder: Path, state: Mapping[str, JSON], fill: Callable[[Path], None]) -> None:
    """Write one checkpoint; what was in ``folder`` before stays until it is whole.

    Raises:
        DiskError: If the disk is full or may not be written.
    """
    with rundir.whole(folder) as beside:
        beside.mkdir()
        fill(beside)
        (beside / STATE).write_text(json.dumps(state, allow_nan=True) + "\n", encoding="utf-8")
        files = {path.name: _facts_of(path) for path in sorted(beside.iterdir())}
        (beside / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def newest(parent: Path, *, say: Sink) -> Checkpoint | None:
    """Find the newest checkpoint that is whole; damaged ones are told and removed. None if there is none."""
    found = (whole_one(folder, say=say, instead="the one before is taken") for folder in reversed(_folders(parent)))
    return next(filter(None, found), None)


def whole_one(folder: Path, *, say: Sink, instead: str) -> Checkpoint | None:
    """Read a checkpoint that may be missing; a damaged one is removed, and told with what is done ``instead``."""
    if not folder.is_dir():
        return None
    try:
        return read(folder)
    except UsageError as error:
        say(Warned(message=f"{error.message}: {instead}"))
        shutil.rmtree(folder)
    return None


def newest_state(parent: Path) -> Mapping[str, Any]:
    """Give the state of the newest checkpoint, if it is whole; empty otherwise. Nothing is removed or told."""
    folders = _folders(parent)
    if not folders or _damage(folders[-1]):
        return {}
    return cast(Mapping[str, Any], json.loads((folders[-1] / STATE).read_text(encoding="utf-8")))


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint, and hold every file of it to its size and hash.

    Raises:
        UsageError: If it is none, or damaged.
    """
    # Not `Path.exists`, which raises where a name is too long to be one.
    if not any(os.path.exists(folder / name) for name in (STATE, MANIFEST)):
        raise UsageError(f"`{folder}` is no checkpoint", hint="give `auto`, `never`, or a folder like step-000120")
    damage = _damage(folder)
    if damage:
        raise UsageError(f"the checkpoint `{folder}` is damaged: {damage}", hint="give another, or none")
    return Checkpoint(folder=folder, state=json.loads((folder / STATE).read_text(encoding="utf-8")))


def _damage(folder: Path) -> str:
    """Say what is wrong with a checkpoint; empty for nothing."""
    try:
        files = cast(
            Mapping[str, Mapping[str, Any]], json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        )
        for name, facts in files.items():
            if _facts_of(folder / name) != facts:
                return f"`{name}` is not what was written"
        return "" if STATE in files else f"it has no {STATE}"
    except OSError as error:
        return f"{error.strerror}: `{Path(str(error.filename)).name}`"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"`{MANIFEST}` cannot be read"


def _facts_of(path: Path) -> dict[str, JSON]:
    return {"bytes": path.stat().st_size, "sha256": rundir.sha256_of(path)}


def _folders(parent: Path) -> list[Path]:
    """Give the checkpoints in order of their steps; what has another name is not ours."""
    found = parent.iterdir() if parent.is_dir() else ()
    named = {folder: NAME.fullmatch(folder.name) for folder in found if folder.is_dir()}
    return sorted((folder for folder, match in named.items() if match), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
