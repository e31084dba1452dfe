"""Rows of earlier parts among those of a run, so that they are not forgotten."""

import random
from collections.abc import Sequence
from itertools import chain, islice, zip_longest
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
    budget = round(share / (1 - share) * len(own))
    dice = random.Random(seed)
    old = Joined(earlier)
    starts = [sum(map(len, earlier[:number])) for number in range(len(earlier))]
    places = [range(start, start + len(part)) for start, part in zip(starts, earlier, strict=True)]
    piles = [dice.sample(some, min(budget, len(some))) for some in places]
    dice.shuffle(piles)
    dealt = (number for number in chain.from_iterable(zip_longest(*piles)) if number is not None)
    drawn = pick(old, sorted(islice(dealt, budget)))
    both = Joined([own, drawn])
    return tuple(both) if isinstance(own, tuple) else both
