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
    plain = re.sub(r"[^\w.-]", "-", Path(name.partition("@")[0]).name)
    target = cache_dir() / "unpacked" / f"{plain}-{found.sha256[:16]}"
    if not target.exists():
        from backprop.engine.packed import unpack

        if weights:
            say(Phase(name=f"writing the weights of {name} as 16 bits to {target}, once"))
        with rundir.whole(target) as beside:
            unpack(packed, beside)
    return hub.described(name, target, packed=packed)
