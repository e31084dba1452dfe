"""Both engines on the longest examples, each in a process of its own, before the model is loaded here."""

import importlib.metadata
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from heapq import nlargest
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

from backprop.config import TrainConfig
from backprop.core.choice import Choice
from backprop.core.data.render import Example
from backprop.core.engines import Raced, faster
from backprop.core.hardware import Gpu
from backprop.core.plan import Plan
from backprop.edges import process, tried
from backprop.engine.choosing import MOST_EXAMPLES, chosen_for_all
from backprop.engine.ranks import hear, tell
from backprop.errors import BackpropError, ToolError
from backprop.events import JSON, Event, Phase, Sink

RACER = (sys.executable, "-m", "backprop.engine.racer")
"""The program of an engine that is tried; it takes the number of its socket."""
ENGINES = ("torch", "unsloth")
# Loading, compiling and waiting for a card to cool say nothing: longer than this, and what is tried would cost more than it
# could save.
MOST_SILENT_S = 25 * 60
VERSIONED = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "triton",
    "unsloth",
    "unsloth_zoo",
    "xformers",
    "flash_attn",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What an engine is tried with."""

    path: str
    config: TrainConfig
    plan: Plan
    examples: Sequence[Example]
    gpus: Sequence[Gpu] = ()
    """To look after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of it."""

    raced: Raced
    gradient: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of a step before any update, by the names of the trained weights; in main memory."""


def with_faster(
    path: str, config: TrainConfig, plan: Plan, examples: Sequence[Example], *, gpus: Sequence[Gpu] = (), say: Sink
) -> Plan:
    """Try both engines, and let the plan have the faster one that computes what torch does; torch if one cannot be tried.

    What is found is kept for later runs; why one could not be tried is not.
    """
    longest = nlargest(plan.batch_size.value, islice(examples, MOST_EXAMPLES), key=lambda one: len(one.ids))
    answers: dict[str, Answer] = {}
    for engine in ENGINES:
        say(Phase(name=f"trying the engine {engine} on the longest examples, in a process of its own"))
        planned = replace(plan, engine=Choice(engine, "tried"), try_engines=False)
        try:
            job = Job(path=path, config=config, plan=planned, examples=longest, gpus=gpus)
            answers[engine] = _answer(job, say=say)
        except BackpropError as error:
            told = f"{engine} could not be tried: {' '.join(error.message.split())[:300]}"
            say(Phase(name=f"the engine is torch: {told}"))
            return replace(plan, engine=Choice("torch", told), try_engines=False)
    apart = distance(*(answers[engine].gradient for engine in reversed(ENGINES)))
    chosen = faster({engine: answer.raced for engine, answer in answers.items()}, apart=apart)
    say(Phase(name=f"the engine is {chosen.value}: {chosen.reason}"))
    tried.remember(_circumstances(config, plan), [chosen.value, chosen.reason])
    return replace(plan, engine=chosen, try_engines=False)


def with_known(config: TrainConfig, plan: Plan) -> Plan:
    """Let the plan have the engine that an earlier run of the kind has found to be the faster, if one has."""
    if not plan.try_engines:
        return plan
    match tried.recall(_circumstances(config, plan)):
        case ["torch" | "unsloth" as engine, str(reason)]:
            return replace(plan, engine=Choice(engine, f"in an earlier run {reason}"), try_engines=False)
        case _:
            return plan


def distance(gradient: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Give how far a gradient is from another, as a share of the norm of that; more than all where weights are missing."""
    if gradient.keys() != reference.keys() or not reference:
        return float("inf")
    off = sum(float((gradient[name] - one).double().square().sum()) for name, one in reference.items())
    whole = sum(float(one.double().square().sum()) for one in reference.values())
    return (off / whole) ** 0.5 if whole else float("inf")


def _answer(job: Job, *, say: Sink) -> Answer:
    """Let a process of its own do a job, and pass on what it says.

    Raises:
        BackpropError: What kept the engine from it, or how the process ended.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ours, theirs = socket.socketpair()
    with Connection(ours.detach()) as connection, theirs:
        argv = [*RACER, str(theirs.fileno())]
        with process.running(argv, env=environment, timeout_s=10, inherited=(theirs.fileno(),)) as end:
            theirs.close()
            with suppress(OSError):  # it has ended already, and is asked why
                tell(connection, job)
            return _heard(connection, end, say)


def _heard(connection: Connection, end: Callable[[], str], say: Sink) -> Answer:
    while True:
        try:
            if not connection.poll(MOST_SILENT_S):
                raise ToolError(f"its process said nothing for {MOST_SILENT_S / 60:.0f} minutes")
            heard = hear(connection)
        except (EOFError, OSError):
            end()  # raises what it has said
            raise ToolError("its process ended without a word") from None
        if isinstance(heard, BackpropError):
            raise heard
        if isinstance(heard, Answer):
            return heard
        assert isinstance(heard, Event)
        say(heard)


def _circumstances(config: TrainConfig, plan: Plan) -> JSON:
    """Give what decides which engine is the faster, but for the lengths of the data."""
    return {
        **chosen_for_all(plan),
        "engine": "tried",
        "versions": {name: _version(name) for name in VERSIONED},
        "adapter": [config.lora_r, *config.target_modules],
        "given": [config.micro_batch, config.recompute, config.offload],
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
