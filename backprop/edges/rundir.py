"""The run directory: create, append, write whole or not at all."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TextIO, cast

from backprop.config import differences
from backprop.edges import stopping
from backprop.errors import DiskError, UsageError
from backprop.events import JSON, Checkpointed, Event, Sink, from_json, to_json

MANIFEST = "run.json"


# What a run leaves in its directory; nothing else is ever removed.
RUN_FILES = (
    *("lora", "runs", "checkpoints", "export", "events.jsonl", "report.html", "crash.txt", "tensorboard"),
    *("wandb", "mlflow", "forgetting.json", "forgetting.csv"),
    MANIFEST,
)
# What a write that did not end leaves; no other program names files so.
MARK = ".backprop-"
LEFTOVERS = (f"{MARK}*.part", f"{MARK}*.old", f"{MARK}export-*")
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file: with any ending.
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
Found = Literal["nothing", "unfinished", "finished"]


@contextlib.contextmanager
def scratch(directory: Path) -> Generator[Path]:
    """Give a folder in ``directory`` for what an export makes on its way; gone after the block, whatever stops it."""
    room: TemporaryDirectory[str] | None = None
    try:
        with stopping.held():
            room = TemporaryDirectory(prefix=f"{MARK}export-", dir=directory)
        yield Path(room.name)
    finally:
        if room is not None:
            room.cleanup()


def check(directory: Path, identity: Mapping[str, object], *, overwrite: bool) -> Found:
    """Say what a directory holds of this run, and refuse one that is not free for it; change nothing.

    Args:
        identity: What makes a run the same one: its config, and the fingerprint of its data.

    Raises:
        UsageError: If it holds another run, or files that are not of a run; if another process is at work in it; or if
            it cannot be a folder on Windows.
        DiskError: If it cannot be looked at, or is a file.
    """
    reserved = next((part for part in directory.parts if os.name == "nt" and RESERVED.fullmatch(part)), None)
    if reserved is not None:
        raise UsageError(f"`{reserved}` is a device on Windows, not a folder", hint="choose another `--output`")
    try:
        if directory.exists() and not directory.is_dir():
            raise DiskError(f"`{directory}` is a file, not a folder", hint="choose another `--output`")
        nearest = next(folder for folder in (directory.absolute(), *directory.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            what = "cannot be written" if nearest == directory.absolute() else f"cannot be made in `{nearest}`"
            raise DiskError(f"`{directory}` {what}", hint=f"choose another `--output`, or {whose_it_is()}")
        if directory.is_dir():
            with locked(directory):
                pass
        return _found(directory, identity, overwrite=overwrite)
    except OSError as error:
        raise _unusable(directory, error) from error


def _found(directory: Path, identity: Mapping[str, object], *, overwrite: bool) -> Found:
    left = sorted(child.name for child in directory.iterdir()) if directory.is_dir() else []
    manifest = read_manifest(directory)
    if manifest is None and set(left) - {".lock"} and not _is_abandoned(left):
        raise UsageError(
            f"`{directory}` holds files that are not of a run: {', '.join(left[:5])}", hint="choose another `--output`"
        )
    if manifest is None:
        return "nothing"
    finished = manifest.get("status") == "finished"
    changed = _changed(manifest, identity)
    if overwrite and (finished or changed):
        return "nothing"
    if changed:
        raise UsageError(
            f"`{directory}` holds another run, which differs in {'; '.join(changed)}",
            hint="choose another `--output`, or add `--overwrite`",
        )
    return "finished" if finished else "unfinished"


def _is_abandoned(names: Sequence[str]) -> bool:
    """Say whether a folder holds nothing but what a run left that was killed while it wrote its first file."""
    return all(name in (".writable", ".lock") or any(fnmatch(name, pattern) for pattern in LEFTOVERS) for name in names)


@contextlib.contextmanager
def claim(directory: Path, identity: Mapping[str, object], *, overwrite: bool, keep: bool = False) -> Generator[bool]:
    """Make ``directory`` this run's own while the block runs, and say whether it goes on with what it did before.

    Args:
        keep: Whether to go on where the same run was interrupted; else the directory is emptied of all runs' files.

    Raises:
        UsageError: As `check`.
        DiskError: If it cannot be written.
    """
    check(directory, identity, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(directory))
            refuse_links(directory)
            goes_on = keep and _found(directory, identity, overwrite=overwrite) != "nothing"
            for name in ("crash.txt",) if goes_on else RUN_FILES:
                remove(directory / name)
            tidy(directory)
            probe = directory / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise _unusable(directory, error) from error
        yield goes_on


def refuse_links(directory: Path) -> None:
    """Let no run that was handed over lead its writes and removals out of its own folder.

    Raises:
        UsageError: If something of it is a link.
    """
    runs = directory / "runs"
    folders = [directory, *(runs.iterdir() if runs.is_dir() and not runs.is_symlink() else ())]
    ours = [folder / name for folder in folders for name in (*RUN_FILES, "merged")]
    ours += [*folders[1:], *(step for folder in folders for step in (folder / "checkpoints").glob("*"))]
    link = next((path for path in ours if path.is_symlink()), None)
    if link is not None:
        raise UsageError(
            f"`{link}` is a link to `{os.readlink(link)}`, and a run writes into its own folder only",
            hint="put what it leads to in its place, or choose another `--output`",
        )


def tidy(directory: Path) -> None:
    """Remove what writes left that were killed, in the folders that a run writes to."""
    runs = directory.glob("runs/*")
    folders = [directory, *(folder for run in runs for folder in (run, run / "checkpoints"))]
    for folder in (*folders, directory / "checkpoints"):
        sweep(folder)
    (directory / ".writable").unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what writes left in ``folder`` that were killed."""
    for pattern in LEFTOVERS:
        for left in folder.glob(pattern):
            name = left.name.removeprefix(MARK).rsplit(".", 2)[0]
            if left.suffix == ".old" and not (folder / name).exists():
                left.rename(folder / name)  # killed between the two renames of `_replace`
            else:
                remove(left)


def _unusable(directory: Path, error: OSError) -> DiskError:
    return DiskError(
        f"`{directory}` cannot be used: {error.strerror or error}", hint="choose another `--output`, or mend its owner"
    )


@contextlib.contextmanager
def locked(directory: Path, *, before_waiting: Callable[[], None] | None = None) -> Generator[None]:
    """Hold a lock on a directory, which a process that died holds no longer, on whatever host. Not on Windows.

    Args:
        before_waiting: Called if another process holds it, which is then waited for; None if it is not to be.

    Raises:
        UsageError: If another process holds it, and it is not to be waited for.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # NFS locks only what is open for writing, which a folder cannot be
                file = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
                os.close(descriptor)
                descriptor = file
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if before_waiting is None:
                raise UsageError(
                    f"another process is at work in `{directory}`", hint="wait for it, or choose another `--output`"
                ) from error
            before_waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _changed(manifest: Mapping[str, object], identity: Mapping[str, object]) -> list[str]:
    before = cast(dict[str, object], manifest["identity"])
    now = cast(dict[str, object], json.loads(json.dumps(identity)))
    changed = differences(before, now)
    return ["the rows of the data" if one.startswith("data_sha256: ") else one for one in changed]


SHAPE: Mapping[str, type] = {
    "config versions plan model result error data spent": dict,
    "proofs gates samples probes": list,
    "status question examples_sha256": str,
}
"""What stands in `run.json`, where it stands there."""


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Read `run.json`; None if there is none.

    Raises:
        UsageError: If it is not what `backprop` wrote.
    """
    path = directory / MANIFEST
    if not os.path.isfile(path):  # unlike a path's own method, false where the name is too long to be one
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"`{path}` is damaged: {error}", hint="choose another `--output`") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise UsageError(f"`{path}` is not a manifest of a run", hint="choose another `--output`")
    found = cast(dict[str, Any], manifest)
    for keys, kind in SHAPE.items():
        wrong = next((key for key in keys.split() if not isinstance(found.get(key), kind | None)), None)
        if wrong is not None:
            raise UsageError(
                f"`{path}` is damaged: `{wrong}` is {found[wrong]!r:.80}", hint="choose another `--output`"
            )
    model = found.get("model")
    if model is not None and not all(isinstance(model.get(key), str) for key in ("name", "path")):
        raise UsageError(f"`{path}` is damaged: `model` has no name or path", hint="choose another `--output`")
    return found


def write_manifest(directory: Path, manifest: Mapping[str, object]) -> None:
    """Write `run.json`, whole."""
    write_text(directory / MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all.

    Raises:
        DiskError: If the disk is full or may not be written.
    """
    with whole(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def whole(path: Path) -> Generator[Path]:
    """Give a path beside ``path`` for a file or folder; when the block ends well, it is synced and takes its place.

    What stood at ``path`` before stays until then. When the block fails, nothing is left behind.

    Raises:
        DiskError: If the disk is full or may not be written.
    """
    beside = path.with_name(f"{MARK}{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(beside)
        yield beside
        _sync_tree(beside)
        _replace(beside, path)
    except Exception as error:
        told = disk_error(path, error)
        if told is None:
            raise
        raise told from error
    finally:
        with contextlib.suppress(OSError):  # what could not be made cannot be removed either
            remove(beside)


# How libraries that are not Python's own, or other programs, tell of a failed write: Rust, Python, numpy.
FOREIGN = re.compile(
    r"([^:]*) ?\(os error \d+\)|\[Errno (?:27|28|122)\] ([^:]*)|OSError: (\d+ requested and \d+ written)"
)


def whose_it_is() -> str:
    """Say what lets this user write to a folder."""
    if not hasattr(os, "getuid"):
        return "let this user write there"
    return (
        f"let user {os.getuid()} write there (`ls -ld`, `chown`); in Docker, `BACKPROP_USER` in .env says who that is"
    )


def disk_error(path: Path, error: Exception) -> DiskError | None:
    """Give the error of a disk that is full or may not be written, if ``error`` tells of one."""
    found = FOREIGN.search(str(error))
    if isinstance(error, OSError):
        why = error.strerror or str(error)
    elif found:
        why = (found[1] or found[2] or found[3] or "").strip()
    else:
        return None
    hint = "look at `df -h`; then run the same command again"
    if isinstance(error, PermissionError):
        hint = whose_it_is()
    return DiskError(f"`{path}` cannot be written: {why}", hint=hint)


def _full(path: Path, error: OSError) -> DiskError:
    told = disk_error(path, error)
    assert told is not None
    return told


def _replace(beside: Path, path: Path) -> None:
    if path.is_dir() and beside.is_dir():
        # A folder cannot be renamed over one that holds files.
        old = path.with_name(f"{MARK}{path.name}.{os.getpid()}.old")
        os.rename(path, old)
        os.rename(beside, path)
        _sync(path.parent)
        shutil.rmtree(old)
    else:
        os.replace(beside, path)
        _sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    for child in [*path.rglob("*"), path] if path.is_dir() else [path]:
        _sync(child)


def _sync(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY") and path.is_dir():  # Windows opens no folders, and syncs what may be written only
        return
    descriptor = os.open(path, os.O_RDONLY if hasattr(os, "O_DIRECTORY") else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def event_log(directory: Path) -> Generator[Sink]:
    """Append every event to `events.jsonl` while the block runs."""
    path = directory / "events.jsonl"
    try:
        _end_last_line(path)
        file = path.open("a", encoding="ascii")
    except OSError as error:
        raise _full(path, error) from error
    write = json_lines(file)

    def say(event: Event) -> None:
        try:
            write(event)
            if isinstance(event, Checkpointed):  # what led to it is to outlive a power cut as it does
                os.fsync(file.fileno())
        except OSError as error:
            raise _full(path, error) from error

    try:
        yield say
    finally:
        with contextlib.suppress(OSError):  # what could not be written was told
            file.close()


def _end_last_line(path: Path) -> None:
    """Cut off a line that was not written to its end: a full disk or a power cut leaves such."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def read_events(directory: Path) -> list[Event]:
    """Read `events.jsonl`, without what cannot be read."""
    path = directory / "events.jsonl"
    found: list[Event] = []
    for line in path.read_text(encoding="ascii", errors="replace").splitlines() if path.is_file() else ():
        try:
            event = from_json(json.loads(line))
        except (ValueError, AttributeError, RecursionError):
            continue
        if event is not None:
            found.append(event)
    return found


def size_of(directory: Path, names: Sequence[str]) -> int:
    """Give the bytes of these files and folders in a run directory."""
    files = (path for name in names for path in [directory / name, *(directory / name).rglob("*")])
    return sum(path.stat().st_size for path in files if path.is_file())


def sha256_of(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_lines(file: TextIO) -> Sink:
    """Write every event to ``file`` as a JSON line, at once."""
    import structlog

    write: Callable[..., None] = structlog.wrap_logger(
        structlog.WriteLogger(file), processors=[structlog.processors.JSONRenderer()]
    ).info

    def say(event: Event) -> None:
        fields: dict[str, JSON] = to_json(event)
        write(**fields)

    return say
