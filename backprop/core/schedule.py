"""The learning rate over the steps of a run."""

import math
from typing import Literal


def rate_share(step: int, *, num_steps: int, num_warmup: int, kind: Literal["cosine", "linear", "constant"]) -> float:
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
