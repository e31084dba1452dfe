"""Checkpoints on disk: complete or absent, and never believed unread."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from backprop.edges import checkpoints
from backprop.errors import DiskError, UsageError
from backprop.events import Event, Warned


def put(parent: Path, step: int, *, keep: int = 3) -> Path:
    def fill(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes(range(200)))

    return checkpoints.write(parent, {"step": step, "note": "x"}, fill, keep=keep)


def newest(parent: Path) -> tuple[int | None, str]:
    said: list[Event] = []
    found = checkpoints.newest(parent, say=said.append)
    return found.step if found else None, "\n".join(event.message for event in said if isinstance(event, Warned))


def test_the_newest_is_found_by_its_step_and_old_ones_go(tmp_path: Path) -> None:
    for step in (9, 10, 1_000_000, 1_000_001):
        put(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-1000000", "step-1000001"]
    assert newest(tmp_path) == (1_000_001, "")


def test_a_copy_under_another_name_is_not_ours(tmp_path: Path) -> None:
    put(tmp_path, 3).rename(tmp_path / "step-000003-keep")
    for step in (6, 9, 12):
        put(tmp_path, step, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003-keep", "step-000012"]


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "nosuch") == (None, "")


def test_a_power_cut_finds_only_what_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file or folder holds on the disk is what it held when it was last synced: nothing else is renamed or removed."""
    on_disk: dict[str, object] = {}
    steps: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def held(path: Path) -> object:
        return sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        on_disk[str(path)] = held(path)
        steps.append(f"sync {path.name}")
        real["fsync"](descriptor)

    def moved(name: str, source: Path, target: Path) -> None:
        steps.append(f"{name} {'new' if source.name.endswith('.part') else 'old'}")
        if source.name.endswith(".part"):
            for path in (source, *source.rglob("*")):
                assert on_disk[str(path)] == held(path)
        real[name](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, lambda source, target, name=name: moved(name, Path(source), Path(target)))
    removed = checkpoints.rundir.shutil.rmtree
    monkeypatch.setattr(
        checkpoints.rundir.shutil, "rmtree", lambda path: (steps.append(f"remove {Path(path).name}"), removed(path))
    )
    parent = tmp_path / "checkpoints"
    put(parent, 1, keep=1)
    put(parent, 1, keep=1)  # over one of the same step, which a run may come to again
    put(parent, 2, keep=1)
    told = [step for step in steps if not step.startswith("sync") or step == "sync checkpoints"]
    assert [step.replace(str(os.getpid()), "N") for step in told] == [
        "replace new",
        "sync checkpoints",
        "rename old",
        "rename new",
        "sync checkpoints",
        "remove .backprop-step-000001.N.old",
        "replace new",
        "sync checkpoints",
        "remove step-000001",
    ]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: flip(folder / "weights"),
    "a file that is too short": lambda folder: (folder / "weights").write_bytes(b""),
    "a missing file": lambda folder: (folder / "weights").unlink(),
    "a missing state": lambda folder: (folder / "state.json").unlink(),
    "a missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "zeros for a manifest": lambda folder: (folder / "manifest.json").write_bytes(bytes(100)),
    "a manifest of another kind": lambda folder: (folder / "manifest.json").write_text("[]"),
    "a manifest without files": lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_one_is_told_and_the_one_before_is_taken(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    put(tmp_path, 3)
    damage(put(tmp_path, 6))
    step, said = newest(tmp_path)
    assert step == 3
    assert "step-000006` is damaged" in said
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    damage(tmp_path / "step-000003")
    assert newest(tmp_path)[0] is None


def test_one_that_is_named_must_be_whole(tmp_path: Path) -> None:
    flip(put(tmp_path, 3) / "weights")
    with pytest.raises(UsageError, match="`weights` is not what was written"):
        checkpoints.read(tmp_path / "step-000003")
    assert (tmp_path / "step-000003").is_dir()


def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(tmp_path: Path) -> None:
    put(tmp_path, 3)

    def fill(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors tells of it

    with pytest.raises(DiskError, match="No space left"):
        checkpoints.write(tmp_path, {"step": 6}, fill, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    assert newest(tmp_path) == (3, "")
