"""A further rank of a training, in a process of its own: it loads the model that rank 0 trains, and does what that says.

It keeps nothing of its own from one step to the next, writes no file, and ends with rank 0.
"""

import signal
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from backprop.engine import load, loop
from backprop.engine.attention import within_documents
from backprop.engine.objectives import Part
from backprop.engine.ranks import Found, Job, Rank, Share, hear, join, tell
from backprop.errors import BackpropError


def main() -> None:
    """Serve rank 0 until it goes away."""
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 hears them, and ends this process
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        job: Job = hear(connection)
        loop.quieten()
        with loop.same_bits(job.config.deterministic):
            try:
                model = _loaded(job)
            except BackpropError as error:
                tell(connection, error)
                return
            tell(connection, "loaded")
            assert hear(connection) == ("join", ())
            group = join(job.store, job.rank, job.plan.gpus.value, job.plan.device.value)
            rank = Rank(model, job.plan, group, lambda work: work.wait())
            while True:
                name, arguments = hear(connection)
                if name == "compute":
                    tell(connection, _computed(rank, model, *arguments))
                else:
                    getattr(rank, name)(*arguments)
                if name == "add_up":
                    model.zero_grad(set_to_none=True)


def _loaded(job: Job) -> Any:
    """Load the model as rank 0 does, and as trl makes it ready; its trained weights will be those of rank 0."""
    # Singular vectors vary with the machine: rank 0 sends what it found.
    model = load.load_model(job.path, replace(job.config, pissa=False), job.plan)
    model.train()
    return model


def _computed(rank: Rank, model: Any, share: Share) -> Found | None:
    packed = any("documents" in one for one in share.passes.values())
    with within_documents(model) if packed else nullcontext():
        found = rank.compute(share)
    return found and replace(found, values=_in_main_memory(found.values))


def _in_main_memory(values: Mapping[int, Any]) -> dict[int, Any]:
    return {
        number: Part(one.loss.cpu(), None if one.margins is None else one.margins.cpu())
        if isinstance(one, Part)
        else one.cpu()
        for number, one in values.items()
    }


if __name__ == "__main__":
    main()
