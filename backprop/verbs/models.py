"""The model that a run begins with: found, and if its weights are stored in fewer bits, unpacked."""

import re
from pathlib import Path

from backprop.edges import hub, model_files, rundir
from backprop.edges.places import cache_dir
from backprop.events import Phase, Sink


def find(name: str, *, offline: bool, weights: bool = True, code: bool = False, say: Sink) -> hub.ModelSource:
    """Find a model as `hub.find_model` does; one that bitsandbytes stored in 4 or 8 bits, as what they stand for, in the cache.

    Raises:
        ModelError: If it cannot be found or unpacked.
        DiskError: If there is no room for it.
    """
    found = hub.find_model(name, offline=offline, weights=weights, code=code)
    packed = Path(found.path)
    if not model_files.is_packed(packed):
        return found
    room = cache_dir() / "unpacked" / found.sha256[:16]
    target = room / re.sub(r"[^\w.-]", "-", Path(name.partition("@")[0]).name)
    if not target.exists():
        if weights:
            say(Phase(name=f"writing the weights of {name} as 16 bits to {target}, once"))
        _unpack(packed, target)
    return hub.described(name, target, packed=packed)


def _unpack(packed: Path, target: Path) -> None:
    """Do so in one process, while others wait, and after what one left that was killed."""
    from backprop.engine.packed import unpack

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with rundir.locked(target.parent, wait=True):
            rundir.sweep(target.parent)
            if not target.exists():
                with rundir.whole(target) as beside:
                    unpack(packed, beside)
    except OSError as error:
        raise rundir.disk_error(target, error) or error from error
