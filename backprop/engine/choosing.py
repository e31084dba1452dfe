"""What is chosen on the loaded model, just before the first step: by trying it, not by an estimate."""

import time
from collections.abc import Sequence
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
from backprop.engine.layers import give_back_memory
from backprop.engine.objectives import Objective, is_mismatched
from backprop.engine.ranks import Ranks
from backprop.events import JSON, Phase, Sink, Warned
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
    before: JSON,
) -> Plan:
    """Let gradients go back in 8 bits if that was proved when the run began.

    Args:
        before: What was found then; None if it begins now.
    """
    from backprop.engine import fp8

    ranks.meet(model)
    proved = prove(lambda: fp8.prove(model, objective, examples, size, ranks)).ok if before is None else before
    if proved:
        return plan
    ranks.keep_16_bits()
    say(Warned(message="gradients go back in 16 bits, which is slower: 8 were not proved in this run"))
    return replace(plan, fp8_backward=Choice(False, "not proved"))


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

    What an earlier run found under the same circumstances is taken as it is. No weight is changed. What was measured mends
    the memory that is expected.
    """
    if len(plan.to_try) < 2:
        return size
    before = _recalled(tried.recall(_circumstances(model, size, config, plan)), plan.to_try)
    if before is not None:
        chosen, found_before = before
        say(Phase(name=f"{_told(chosen)}: was the fastest when this was tried in an earlier run"))
        found = _sized(size, chosen, config, plan)
        expected = footprint.expected(config, plan, found)
        footprint.tell(expected, found_before, "tried in an earlier run", say, run=run)
        return found
    given = (model, objective, examples, size)
    return measured_fastest(*given, config=config, plan=plan, ranks=ranks, say=say, run=run)[0]


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
    """Try all the same, remember what was the fastest, and give it with its tokens per second; 0 if nothing fits."""
    ranks.meet(model)
    model.train()  # else nothing is recomputed
    found: dict[Passes, _Measured] = {}
    with within_documents(model) if size.packing else nullcontext():
        for one in plan.to_try:
            cards.rest(lambda: None)  # there is nothing to save yet
            say(Phase(name=f"trying {_told(one)}"))
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
    tried.remember(_circumstances(model, size, config, plan), {"way": asdict(chosen), **asdict(measured.memory)})
    others = "; ".join(f"{_told(one)}: {other}" for one, other in found.items() if one != chosen)
    say(Phase(name=f"the fastest here: {_told(chosen)}: {measured} ({others or 'no other fits'})"))
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


def _recalled(found: JSON, ways: Sequence[Passes]) -> tuple[Passes, Footprint] | None:
    """Read what was kept of an earlier run; None if it is something else, or none of these ways."""
    match found:
        case {"way": way, "held": int(held), "peak": int(peak)}:
            chosen = next((one for one in ways if asdict(one) == way), None)
            return chosen and (chosen, Footprint(held=held, peak=peak))
        case _:
            return None


def _told(one: Passes) -> str:
    where = " from main memory" if one.offloaded else ""
    return f"{one.examples} at once with {one.recomputed} layers recomputed{where}"


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
        "to_try": [asdict(one) for one in plan.to_try],
        **chosen_for_all(plan),
    }


def chosen_for_all(plan: Plan) -> dict[str, JSON]:
    """Give the machine and what a plan has chosen that changes the speed, whatever is tried."""
    chosen = {name: choice.value for name, choice in plan.choices().items()}
    for name in ("steps", "eval_steps", "learning_rate", "lora_alpha", "micro_batch", "recompute", "offload"):
        del chosen[name]
    return {"version": backprop.__version__, "gpu": plan.device.reason, **chosen}
