"""What was found to be fastest on this machine, kept in the cache from run to run."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from backprop.edges import rundir
from backprop.edges.places import cache_dir
from backprop.errors import DiskError
from backprop.events import JSON


def recall(circumstances: JSON) -> JSON:
    """Give what was found under the same circumstances; None if nothing was, or it cannot be read."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return json.loads(_file(circumstances).read_text(encoding="utf-8"))["found"]
    return None


def remember(circumstances: JSON, found: JSON) -> None:
    """Keep what was found; a cache that cannot be written is no reason to stop."""
    with suppress(DiskError, OSError):
        path = _file(circumstances)
        path.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_text(path, json.dumps({"circumstances": circumstances, "found": found}, indent=1))


def _file(circumstances: JSON) -> Path:
    name = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / "tried" / f"{name}.json"
