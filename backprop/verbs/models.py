"""The weights of the model that a run begins with, unpacked if bitsandbytes stored them in 4 or 8 bits."""

import re
from pathlib import Path

from backprop.edges import hub, model_files, rundir
from backprop.edges.places import cache_dir
from backprop.events import Phase, Sink

MOST_NAME = 100


def weights_of(model: hub.ModelSource, *, say: Sink) -> str:
    """Give the model's folder; of one that is stored in fewer bits, a folder of the cache with what they stand for.

    Raises:
        ModelError: If it cannot be unpacked.
        DiskError: If there is no room for it.
    """
    found = Path(model.path)
    if not model_files.is_packed(found):
        return model.path
    from backprop.engine import packed

    named = found.name if model.revision is None else model.public_name.rpartition("/")[2]
    room = cache_dir() / "unpacked" / packed.key_of(found, model.sha256)
    target = room / (re.sub(r"[^\w.-]", "-", named)[:MOST_NAME] or "model")
    if not _is_whole(target):
        try:
            room.mkdir(parents=True, exist_ok=True)
            waiting = Phase(name=f"waiting for another process that writes the weights of {model.name} as 16 bits")
            with rundir.locked(room, before_waiting=lambda: say(waiting)):
                rundir.sweep(room)
                if not _is_whole(target):
                    say(Phase(name=f"writing the weights of {model.name} as 16 bits to {target}, once"))
                    rundir.remove(target)
                    with rundir.whole(target) as beside:
                        packed.unpack(found, beside)
        except OSError as error:
            raise rundir.disk_error(room, error) or error from error
    return str(target)


def _is_whole(target: Path) -> bool:
    return (target / "config.json").is_file()
