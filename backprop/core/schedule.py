"""What a step works with besides the model and the optimizer's moments: a function of the run and the step's number."""

import math
import random
from dataclasses import dataclass
from typing import Any, Literal

from backprop.config import TrainConfig
from backprop.core.data.order import SampleOrder
from backprop.core.plan import Plan

Kind = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The examples, the rate and the random state of every step. Steps are counted from 0."""

    order: SampleOrder
    num_steps: int
    num_warmup: int
    kind: Kind

    def rate_share(self, step: int) -> float:
        """Give the share of the peak rate, in (0, 1]."""
        return rate_share(step, num_steps=self.num_steps, num_warmup=self.num_warmup, kind=self.kind)

    def random_seed(self, step: int) -> int:
        """Give what everything random in a step, as dropout, is drawn from."""
        return random.Random(f"{self.order.seed}/{step}").getrandbits(32)

    def of_step(self, step: int) -> dict[str, Any]:
        """Give all of it, to be written down and held to later; empty after the last step."""
        if step >= self.num_steps:
            return {}
        return {
            "examples": list(self.order.of_step(step)),
            "rate_share": self.rate_share(step),
            "random_seed": self.random_seed(step),
        }


def schedule_of(num_examples: int, config: TrainConfig, plan: Plan) -> Schedule:
    """Give the schedule of a run over ``num_examples``."""
    num_steps = plan.steps.value
    return Schedule(
        order=SampleOrder(num_examples=num_examples, batch_size=plan.batch_size.value, seed=config.seed),
        num_steps=num_steps,
        num_warmup=int(config.warmup * num_steps),
        kind=config.scheduler,
    )


def rate_share(step: int, *, num_steps: int, num_warmup: int, kind: Kind) -> float:
    """Give the share of the peak rate that a step trains with, in (0, 1].

    No step is wasted on a rate of zero: neither the first of the warm-up nor the last.

    Args:
        step: Counted from 0.
    """
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    if kind == "constant":
        return 1.0
    # A scheduler asks for one step more than is made; it must not rise again.
    done = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
    return 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2
