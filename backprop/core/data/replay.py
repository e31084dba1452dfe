"""Rows of earlier parts among those of a run, so that they are not forgotten."""

import random
from collections.abc import Sequence
from typing import TypeVar

from backprop.core.data.sequences import Joined, pick

T = TypeVar("T")


def with_replay(parts: Sequence[Sequence[T]], *, share: float, seed: int) -> Sequence[T]:
    """Give the rows of the last part, and behind them rows drawn from the earlier ones, as evenly as they are large.

    Args:
        share: Of all rows that come out, those of earlier parts; fewer if there are not as many.
    """
    *earlier, own = parts
    if not earlier or not share:
        return own
    old = Joined(earlier)
    wanted = min(len(old), round(share / (1 - share) * len(own)))
    drawn = pick(old, sorted(random.Random(seed).sample(range(len(old)), wanted)))
    both = Joined([own, drawn])
    return tuple(both) if isinstance(own, tuple) else both
