"""Models and data sets: from a folder, the demo package, or the hub. The only network besides Ollama."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backprop.core.data.formats import Row
from backprop.edges import demo_model, model_files, rundir
from backprop.edges.places import cache_dir
from backprop.errors import DataError, DiskError, ModelError, UsageError
from backprop.presets import DEMO, PRESETS


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Where a model's files are."""

    name: str
    """As the user gave it: preset, hub id or folder."""
    path: str
    """The local folder with its files."""
    sha256: str
    """Of its configuration and of parts of its weights: tells one model from another, and costs milliseconds."""

    @property
    def public_name(self) -> str:
        """The id of a model from the hub, which means the same on any machine; else its folder."""
        if self.revision is None:
            return self.path
        preset = PRESETS.get(self.name)
        return preset.hub_id if preset else self.name.partition("@")[0]

    @property
    def revision(self) -> str | None:
        """The commit of a model from the hub; None for a folder."""
        folder = Path(self.path)
        by_path = os.path.isdir(Path(self.name).expanduser())
        return folder.name if folder.parent.name == "snapshots" and not by_path else None


def find_model(name: str, *, offline: bool, weights: bool = True, code: bool = False) -> ModelSource:
    """Resolve a preset, hub id or folder, and look at it as far as that needs no network.

    Args:
        weights: Whether they are needed; if not, none are downloaded.
        code: Whether code that it brings may run.

    Raises:
        ModelError: If it cannot be, may not be read, or a local folder has no safe weights.
        UsageError: If code of the hub may run, and no commit is named.
    """
    try:
        found = _found(name, offline=offline, weights=weights, code=code)
        if code:
            model_files.check_code(Path(found.path))
        return found
    except PermissionError as error:
        user = f" ({os.getuid()})" if hasattr(os, "getuid") else ""
        raise ModelError(
            f"`{error.filename}` may not be read by this user{user}",
            hint=f"let all read the model: `chmod -R a+rX {Path(str(error.filename)).parent}`",
        ) from error


def _found(name: str, *, offline: bool, weights: bool, code: bool) -> ModelSource:
    if name == DEMO.name:
        gguf = demo_model.packaged_gguf()
        if gguf is not None:
            return _source(name, demo_model.unpack(gguf, cache_dir() / "models" / name))
    check_name(name)
    folder = Path(name).expanduser()
    if os.path.isdir(folder):  # `Path.is_dir` raises where a name is too long to be one
        return _source(name, folder.resolve())
    preset = PRESETS.get(name)
    hub_id, _, revision = (preset.hub_id if preset else name).partition("@")
    if code and not re.fullmatch(r"[0-9a-f]{7,40}", revision):
        raise UsageError(
            f"`--trust-remote-code` would run whatever code `{hub_id}` holds{f' in {revision!r}' if revision else ''} today",
            hint=f"name the revision that you have read, by 7 to 40 digits of its commit: `--model {hub_id}@COMMIT`",
        )
    patterns = [*FILES[0 if weights else 1 :], *(["*.py"] if code else [])]
    return _source(name, Path(fetch_model(hub_id, offline=offline, patterns=patterns, revision=revision or None)))


def _source(name: str, folder: Path) -> ModelSource:
    """Describe a model folder with a fingerprint: its configuration, and each weight file's size, head and tail."""
    model_files.check_model(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return ModelSource(name=name, path=str(folder), sha256=digest.hexdigest())


# Of the head (every tensor's name, type and place, then weights) and of the tail of each weight file.
FINGERPRINT_BYTES = 2**20


def check_name(name: str) -> None:
    """Refuse what cannot be a model, as far as that can be seen without network.

    Raises:
        ModelError: If it is no preset, no folder with safe weights, and no hub id.
    """
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:
        raise ModelError(f"no such model: `{name}`: {error}", hint=_nearest(name)) from error
    if os.path.isdir(folder):
        _check_folder(folder)
    elif name not in PRESETS and not _is_hub_id(name):
        raise ModelError(f"no such model: `{name}`", hint=_nearest(name))


FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md")


def fetch_model(hub_id: str, *, offline: bool, patterns: Sequence[str], revision: str | None = None) -> str:
    """Bring a model's files of these names into the hub's own cache; return the folder.

    Raises:
        ModelError: If the hub does not have it, does not give it, or cannot be reached.
        DiskError: If its cache may not be written.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
    except GatedRepoError as error:
        raise ModelError(
            f"`{hub_id}` is gated: its licence must be accepted",
            hint="accept it on the model's page, then `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model `{hub_id}`", hint="check its name; a private one needs `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"no model of the hub can be called `{hub_id:.100}`", hint=_nearest(hub_id)) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"`{hub_id}` has no revision `{revision}`", hint="look at its list of commits") from error
    except PermissionError as error:
        raise DiskError(f"`{error.filename}` may not be written", hint=rundir.whose_it_is()) from error
    except (LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"`{hub_id}{f'@{revision}' if revision else ''}` is not here, and the hub cannot be reached",
            hint=f"go online once, give a local folder, or use `--model {DEMO.name}` after `pip install 'backprop[demo]'`",
        ) from error
    if FILES[0] in patterns:
        if offline and model_files.lacks_weights(Path(path)):
            raise ModelError(f"`{hub_id}` is here without all of its weights", hint="go online once")
        _check_folder(Path(path))
    return path


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"`{folder}` has no config.json: not a model", hint="give a folder that `save_pretrained` wrote"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)]
    if pickles:
        raise ModelError(
            f"`{folder}` holds pickled weights only ({pickles[0]}), which can run code when opened",
            hint="convert them to safetensors with the tool of whoever made them",
        )
    raise ModelError(f"`{folder}` holds no weights (*.safetensors)", hint="give a complete model folder")


def _is_hub_id(name: str) -> bool:
    hub_id, _, revision = name.partition("@")
    owner, _, model = hub_id.partition("/")
    # A revision is also a path in the hub's cache.
    named = re.fullmatch(r"[\w./-]*", revision) and ".." not in revision and not revision.startswith("/")
    return bool(owner and model and named) and "/" not in model and not name.startswith((".", "~", "/"))


def _nearest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, PRESETS, n=1)
    if close:
        return f"did you mean `--model {close[0]}`?"
    return f"give a folder, a hub id `owner/name`, or one of: {', '.join(PRESETS)}"


def stream_rows(source: str, *, offline: bool) -> Iterator[Row]:
    """Stream the rows of a hub data set `owner/name[:split]`, without loading the rest.

    Raises:
        DataError: If the hub does not have it, cannot be reached, or may not be.
    """
    if offline:
        raise DataError(
            f"`{source}` is no local file, and with `--offline` the hub is not asked", hint="give a local file"
        )
    import httpx
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, _, split = source.partition(":")
    try:
        rows = load_dataset(name, split=split or "train", streaming=True)  # data run nothing # nosec B615
        for number, row in enumerate(rows, start=1):
            yield Row(place=f"{source}, row {number}", value=dict(row))
    except DatasetNotFoundError as error:
        raise DataError(f"the hub has no data set `{name}`", hint="check its name, or give a local file") from error
    except (httpx.HTTPError, OSError) as error:
        raise DataError(
            f"`{source}` is no local file, and the hub cannot be reached", hint="give a local file, or go online"
        ) from error
    except ValueError as error:
        raise DataError(
            f"`{source}` cannot be read: {error}", hint="give a split that it has: `owner/name:split`"
        ) from error
