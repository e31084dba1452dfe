"""An engine that is tried, in a process of its own: it loads the model, proves it, measures it, and ends."""

import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from backprop.core.engines import Raced
from backprop.edges import cards
from backprop.engine import load, loop
from backprop.engine.attention import within_documents
from backprop.engine.batches import PassSize
from backprop.engine.choosing import measured_fastest
from backprop.engine.objectives import Objective, objective_of
from backprop.engine.race import Answer, Job
from backprop.engine.ranks import Ranks, hear, tell
from backprop.errors import BackpropError, HardwareError
from backprop.events import Event, Paused, Phase, Proved, Sink


def main() -> None:
    """Do the one job that comes over the socket."""
    connection = Connection(int(sys.argv[1]))
    job: Job = hear(connection)
    loop.quieten()
    try:
        with loop.hardware_told(job.plan):
            tell(connection, _raced(job, connection))
    except BackpropError as error:
        tell(connection, error)


def _raced(job: Job, connection: Connection) -> Answer:
    engine = job.plan.engine.value
    failed: list[Proved] = []

    def say(event: Event) -> None:
        if isinstance(event, Proved) and not event.ok:
            failed.append(event)
        if isinstance(event, Phase):
            tell(connection, Phase(name=f"{engine}: {event.name}"))
        if isinstance(event, Paused):
            tell(connection, event)

    with cards.watching(say, asked_c=job.config.gpu_max_temp, started=time.monotonic()):
        cards.look_after(job.gpus)
        loss, gradient, speed = _measured(job, say)
    if not speed:
        raise HardwareError("its memory was full in all that was tried")
    unproved = failed[0].found if failed else ""
    raced = Raced(tokens_per_second=speed, loss=loss, proved=not failed, unproved=unproved)
    return Answer(raced=raced, gradient=gradient)


def _measured(job: Job, say: Sink) -> tuple[float, dict[str, Any], float]:
    """Give the loss and the gradient of a step, and the tokens per second of the fastest; 0 if nothing fits."""
    model = load.load_model(job.path, job.config, job.plan)
    size = loop.pass_size(model, job.config, job.plan, loop.prover(say, 1), say)
    objective, ranks = objective_of(job.config, job.examples), Ranks(job.plan)
    loss, gradient = _step(model, objective, job, size, ranks)
    given = (model, objective, job.examples, size)
    _, speed = measured_fastest(*given, config=job.config, plan=job.plan, ranks=ranks, say=say)
    return loss, gradient, speed


def _step(model: Any, objective: Objective, job: Job, size: PassSize, ranks: Ranks) -> tuple[float, dict[str, Any]]:
    """Give the loss and the gradient of one example, the longest, with every layer computed again: it fits if any step does."""
    from contextlib import nullcontext

    passes = objective.passes(job.examples[:1], size)
    ranks.meet(model)
    model.train()
    ranks.recompute(MOST_LAYERS)
    with within_documents(model) if size.packing else nullcontext():
        parts = ranks.step(model, objective, passes, seed=0)
    if parts is None:
        raise HardwareError("its memory was full with one example")
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.grad is not None]
    gradient = {name: weight.grad.float().cpu() for name, weight in trained}
    ranks.recompute(job.plan.recompute.value, job.plan.offload.value)
    ranks.forget()
    return float(sum(part.loss.float() for part in parts)), gradient


MOST_LAYERS = 10_000

if __name__ == "__main__":
    main()
