"""Rows of earlier parts among those of a run, so that they are not forgotten."""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

from backprop.core.data.sequences import Joined, pick

T = TypeVar("T")


def with_replay(parts: Sequence[Sequence[T]], *, share: float, seed: int) -> Sequence[T]:
    """Give the rows of the last part, and behind them rows drawn from the earlier ones: each gives as many, while it can.

    How many does not grow with the number of parts. A part that is there twice counts once, and the last is not drawn from.

    Args:
        share: Of all rows that come out, those of earlier parts; fewer if there are not as many.
    """
    *_, own = parts
    earlier = [*{id(part): part for part in parts if part is not own}.values()]
    if not earlier or not share:
        return own
    left = round(share / (1 - share) * len(own))
    dice = random.Random(seed)
    dice.shuffle(earlier)  # who gives one more where the budget is not even
    earlier.sort(key=len)
    drawn: list[Sequence[T]] = []
    for others, part in zip(reversed(range(len(earlier))), earlier, strict=True):
        number = min(len(part), math.ceil(left / (others + 1)))
        drawn.append(pick(part, sorted(dice.sample(range(len(part)), number))))
        left -= number
    both = Joined([own, *drawn])
    return tuple(both) if isinstance(own, tuple) else both
