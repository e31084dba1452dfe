"""Which engine a run has: refused early where it cannot be, and tried before the model is loaded where it may be worth it."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

from backprop.config import TrainConfig
from backprop.core import engines
from backprop.edges import device
from backprop.events import Sink
from backprop.verbs import models
from backprop.verbs.prepare import Prepared


def check_engine(config: TrainConfig) -> None:
    """Refuse `--engine unsloth` where it is not installed or has no GPU, before any work.

    Raises:
        BackpropError: Saying what is missing.
    """
    if config.engine == "unsloth":
        engines.refuse_if_not_there(config, device.use_one_gpu(device.probe()), installed=_is_installed())


def can_be(engine: str) -> bool:
    """Say whether an engine that was chosen when a run began can still be, here: a run may go on elsewhere."""
    return engine == "torch" or (_is_installed() and not engines.why_not_on(device.use_one_gpu(device.probe())))


def _is_installed() -> bool:
    return importlib.util.find_spec("unsloth") is not None


def with_faster_engine(config: TrainConfig, parts: Sequence[Prepared], *, say: Sink) -> list[Prepared]:
    """Let a run, or all of several, have the engine of the first: the faster with it, if that is to be tried."""
    first = parts[0]
    if config.dry_run:
        return list(parts)
    chosen = first.plan.engine
    if first.plan.try_engines:
        from backprop.engine import race

        folder, gpus = models.weights_of(first.model, say=say), first.hardware.gpus[:1]
        given = (folder, first.config, first.plan, first.train.examples)
        chosen = race.with_faster(*given, gpus=gpus, say=say).engine
    return [replace(part, plan=replace(part.plan, engine=chosen, try_engines=False)) for part in parts]
