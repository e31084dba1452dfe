"""What is chosen on the loaded model, just before the first step: by trying it, not by an estimate."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from heapq import nlargest
from itertools import filterfalse, islice
from typing import Any

import backprop
from backprop.config import TrainConfig
from backprop.core.choice import Choice
from backprop.core.data.render import Example
from backprop.core.passes import Passes, sides_of
from backprop.core.phases import Footprint
from backprop.core.plan import Plan
from backprop.edges import cards, tried
from backprop.engine import footprint
from backprop.engine.attention import within_documents
from backprop.engine.batches import PassSize, num_tokens
from backprop.engine.exam import Prove
from backprop.engine.layers import give_back_memory, layers_of
from backprop.engine.objectives import Objective, is_mismatched
from backprop.engine.ranks import Ranks
from backprop.events import JSON, Phase, Proved, Sink, Warned
from backprop.presets import GIB


def with_fp8_if_proved(
    model: Any,
    objective: Objective,
    examples: Sequence[Example],
    size: PassSize,
    *,
    plan: Plan,
    ranks: Ranks,
    prove: Prove,
    say: Sink,
    before: Mapping[str, JSON] | None,
) -> Plan:
    """Let gradients go back in 8 bits where that was proved when the run began.

    Args:
        before: What a checkpoint knows of it; None if the run begins now.
    """
    from backprop.engine import fp8

    ranks.meet(model)
    if before is None:
        layers: list[int] = []

        def proof() -> Proved:
            found, stay = fp8.prove(model, objective, examples, size, ranks)
            layers.extend(stay)
            return found

        proved = prove(proof).ok
    else:
        kept: Any = before.get("layers_in_16_bits", [])
        proved, layers = before["fp8_backward"], list(kept)
        if proved and layers:
            ranks.keep_16_bits(layers)
    if not proved:
        ranks.keep_16_bits()
        say(Warned(message="gradients go back in 16 bits, which is slower: 8 were not proved in this run"))
        return replace(plan, fp8_backward=Choice(False, "not proved"))
    if not layers:
        return plan
    told = f"in {fp8.layers_told(layers)} they go back in 16 bits: 8 were not proved there"
    say(Warned(message=f"gradients go back in 8 bits, but {told}"))
    chosen = Choice(True, f"{plan.fp8_backward.reason}; {told}")
    return replace(plan, fp8_backward=chosen, layers_in_16_bits=tuple(layers))


# Of so many examples the longest are tried.
MOST_EXAMPLES = 4096


def fastest(
    model: Any,
    objective: Objective,
    examples: Sequence[Example],
    size: PassSize,
    *,
    config: TrainConfig,
    plan: Plan,
    ranks: Ranks,
    say: Sink,
    run: int,
) -> PassSize:
    """Try the ways of the plan on the longest examples, and give the fastest that fits; as planned if none does.

    A single way is tried only where little memory would be left: else a full memory is found with the longest examples,
    perhaps hours later. What an earlier run found under the same circumstances is taken as it is, if it still fits. No weight
    is changed. What was measured mends the memory that is expected.

    Raises:
        HardwareError: If the memory was full in the way that needs least.
    """
    if not plan.to_try or (len(plan.to_try) == 1 and not _is_tight(plan)):
        return size
    before = _recalled(tried.recall(_circumstances(model, size, config, plan)), size, config, plan)
    if before is not None:
        chosen, found_before = before
        say(Phase(name=f"{chosen.told}: was the fastest when this was tried in an earlier run"))
        found = _sized(size, chosen, config, plan)
        expected = footprint.expected(config, plan, found)
        footprint.tell(expected, found_before, "tried in an earlier run", say, run=run)
        return found
    given = (model, objective, examples, size)
    chosen, speed = measured_fastest(*given, config=config, plan=plan, ranks=ranks, say=say, run=run)
    if not speed:
        if _needs_least(model, size, config, plan):
            raise footprint.too_small(config, plan)
        told = "the memory was full with the longest examples in all that was tried"
        say(Warned(message=f"{told}: a step in which it is full again is done with less at once"))
    return chosen


# Estimates are up to 1 % low (docs/benchmarks.md), and what is free wanders: of the memory, a way that needs more than this
# is not believed to fit.
TIGHT = 0.9


def _is_tight(plan: Plan) -> bool:
    return plan.memory is not None and plan.memory.most >= TIGHT * footprint.room()


def _needs_least(model: Any, size: PassSize, config: TrainConfig, plan: Plan) -> bool:
    """Say whether nothing is left to make a step of this plan smaller."""
    layers = len(layers_of(model))
    waits = plan.offload.value or config.offload is False or not plan.may_wait(size.tokens, layers)
    return plan.micro_batch.value == 1 and plan.recompute.value >= layers and waits


def measured_fastest(
    model: Any,
    objective: Objective,
    examples: Sequence[Example],
    size: PassSize,
    *,
    config: TrainConfig,
    plan: Plan,
    ranks: Ranks,
    say: Sink,
    run: int = 1,
) -> tuple[PassSize, float]:
    """Try all the same, remember what was the fastest, and give it with its tokens per second; 0 if nothing fits.

    What is planned is tried last, where nothing else fits: what is tried may be estimated to need more.
    """
    ranks.meet(model)
    model.train()  # else nothing is recomputed
    found: dict[Passes, _Measured] = {}
    with within_documents(model) if size.packing else nullcontext():
        for one in _with_planned(plan):
            if found and one not in plan.to_try:
                break
            cards.rest(lambda: None)  # there is nothing to save yet
            say(Phase(name=f"trying {one.told}"))
            ranks.recompute(one.recomputed, one.offloaded)
            passes = _hardest(objective, examples, _sized(size, one, config, plan), plan)
            several = one.examples * plan.gpus.value < plan.batch_size.value
            measured = _measured(ranks, model, objective, passes, several=several)
            later = plan.memory.moments if plan.memory else 0  # which the first update makes
            if measured is not None and measured.memory.peak + later <= footprint.room():
                found[one] = measured
    give_back_memory(main=True)
    if not found:
        ranks.recompute(plan.recompute.value, plan.offload.value)
        return size, 0.0
    chosen = max(found, key=lambda one: found[one].speed)
    measured = found[chosen]
    known = {"way": asdict(chosen), **asdict(measured.memory), "room": footprint.room()}
    tried.remember(_circumstances(model, size, config, plan), known)
    others = "; ".join(f"{one.told}: {other}" for one, other in found.items() if one != chosen)
    say(Phase(name=f"the fastest here: {chosen.told}: {measured} ({others or 'no other fits'})"))
    size = _sized(size, chosen, config, plan)
    footprint.tell(footprint.expected(config, plan, size), measured.memory, "tried", say, run=run)
    return size, measured.speed


@dataclass(frozen=True, slots=True)
class _Measured:
    speed: float
    """Tokens per second, forward and back."""
    memory: Footprint

    def __str__(self) -> str:
        peak = self.memory.peak
        return f"{self.speed:,.0f} tokens/s" + (f" in {peak / GIB:.1f} GiB" if peak else "")


def _with_planned(plan: Plan) -> Sequence[Passes]:
    """Give the ways to try, and then, if it is none of them, that of the plan."""
    planned = Passes(plan.micro_batch.value, plan.recompute.value, plan.offload.value)
    return tuple(dict.fromkeys((*plan.to_try, planned)))


# What is free wanders from run to run. With this many times as much, ways may fit that did not when others were tried.
MORE_ROOM = 1.1


def _recalled(found: JSON, size: PassSize, config: TrainConfig, plan: Plan) -> tuple[Passes, Footprint] | None:
    """Read what was kept of an earlier run; None if it is something else, does not fit now, or more does than then.

    Of the ways that fit in less room, it is the fastest as well.
    """
    match found:
        case {
            "way": {"examples": int(examples), "recomputed": int(recomputed), "offloaded": bool(offloaded)},
            "held": int(held),
            "peak": int(peak),
            "room": int(room) | float(room),
        } if 1 <= examples <= plan.batch_size.value and recomputed >= 0:
            way = Passes(examples, recomputed, offloaded)
            later = plan.memory.moments if plan.memory else 0
            fits = peak + later <= footprint.room() <= MORE_ROOM * room
            may = not way.offloaded or plan.may_wait(_sized(size, way, config, plan).tokens, way.recomputed)
            return (way, Footprint(held=held, peak=peak)) if fits and may else None
        case _:
            return None


def _sized(size: PassSize, one: Passes, config: TrainConfig, plan: Plan) -> PassSize:
    tokens = one.examples * plan.max_length.value * sides_of(config)
    return replace(size, examples=one.examples, tokens=tokens, recomputed=one.recomputed, offloaded=one.offloaded)


def _hardest(objective: Objective, examples: Sequence[Example], size: PassSize, plan: Plan) -> Sequence[dict[str, Any]]:
    """Give the largest pass for each rank of a step of the longest examples; of what needs no gradient, as much again."""
    longest = nlargest(plan.batch_size.value, islice(examples, MOST_EXAMPLES), key=lambda one: len(one.ids))
    step = objective.passes(longest, replace(size, ranks=plan.gpus.value))
    kinds = (filterfalse(is_mismatched, step), filter(is_mismatched, step))
    return [one for kind in kinds for one in nlargest(plan.gpus.value, kind, key=num_tokens)]


def _measured(
    ranks: Ranks, model: Any, objective: Objective, passes: Sequence[Any], *, several: bool
) -> _Measured | None:
    """Run the passes twice, since the first time compiles; None if the memory was full.

    Args:
        several: Whether a step has more passes, which find gradients of earlier ones.
    """
    begun = footprint.begin()
    both = [_seconds(ranks, model, objective, passes, forget=not several), _seconds(ranks, model, objective, passes)]
    memory = footprint.end(begun)
    return None if both[1] is None else _Measured(sum(map(num_tokens, passes)) / both[1], memory)


def _seconds(
    ranks: Ranks, model: Any, objective: Objective, passes: Sequence[Any], *, forget: bool = True
) -> float | None:
    """Measure a step without its update; None if the memory was full."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.monotonic()
    parts = ranks.step(model, objective, passes, seed=0)
    wait()
    seconds = time.monotonic() - started
    if forget:
        ranks.forget()
    return None if parts is None else seconds


def _circumstances(model: Any, size: PassSize, config: TrainConfig, plan: Plan) -> JSON:
    """Give what decides which way is the fastest, but for the lengths of the data."""
    import torch

    return {
        "torch": torch.__version__,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "adapter": [config.lora_r, config.lora_dropout, config.objective, *config.target_modules],
        "packing": size.packing,
        "given": [config.micro_batch, config.recompute, config.offload],
        **chosen_for_all(plan),
    }


def chosen_for_all(plan: Plan) -> dict[str, JSON]:
    """Give the machine and what a plan has chosen that changes the speed, whatever is tried."""
    chosen = {name: choice.value for name, choice in plan.choices().items()}
    for name in ("steps", "eval_steps", "learning_rate", "lora_alpha", "micro_batch", "recompute", "offload"):
        del chosen[name]
    return {"version": backprop.__version__, "gpu": plan.device.reason, **chosen}
