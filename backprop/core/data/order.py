"""Which examples each optimizer step takes: the same for any micro-batch, packed or not, and from any step on."""

import random
from array import array
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOrder:
    """Passes over the data, each in an order of its own, cut into steps of equal size.

    A step may end one pass and begin the next, so that every step has ``batch_size`` examples and none is left out.
    """

    num_examples: int
    batch_size: int
    seed: int

    def of_step(self, step: int) -> tuple[int, ...]:
        """Give the numbers of the examples that ``step``, counted from 0, trains on."""
        first = step * self.batch_size
        return tuple(self._at(position) for position in range(first, first + self.batch_size))

    def times_seen(self, num_steps: int) -> list[int]:
        """Count how often each example is trained on in the first ``num_steps`` steps."""
        whole, rest = divmod(num_steps * self.batch_size, self.num_examples)
        counts = [whole] * self.num_examples
        for number in _shuffled(self.num_examples, self.seed, whole)[:rest]:
            counts[number] += 1
        return counts

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_examples)
        return _shuffled(self.num_examples, self.seed, epoch)[place]


# A step touches two passes at most, unless the data is smaller than a step.
@lru_cache(maxsize=2)
def _shuffled(num_examples: int, seed: int, epoch: int) -> "array[int]":
    numbers = array("I", range(num_examples))
    random.Random(f"{seed}/{epoch}").shuffle(numbers)
    return numbers
