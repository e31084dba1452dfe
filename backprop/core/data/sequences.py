"""Sequences that need not be in memory: what grows, and what is picked out of another."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol, TypeVar, overload

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Growing(Protocol[T]):
    """A sequence that is filled item by item, wherever it keeps them."""

    def append(self, item: T, /) -> None:
        """Add an item at the end."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> T: ...

    def __iter__(self) -> Iterator[T]: ...


class Lazy(Sequence[T_co]):
    """A sequence that makes each item when it is asked for; its slices too."""

    @abstractmethod
    def _item(self, number: int) -> T_co:
        """Give the item at a place from 0 on."""

    @overload
    def __getitem__(self, number: int) -> T_co: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[T_co]: ...
    def __getitem__(self, number: int | slice) -> T_co | Sequence[T_co]:
        if isinstance(number, slice):
            return Picked(self, range(len(self))[number])
        return self._item(range(len(self))[number])


class Picked(Lazy[T_co]):
    """Some items of another sequence.

    Args:
        numbers: Of the items, in their new order.
    """

    def __init__(self, whole: Sequence[T_co], numbers: Sequence[int]) -> None:
        self._whole, self._numbers = whole, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def _item(self, number: int) -> T_co:
        return self._whole[self._numbers[number]]


def pick(whole: Sequence[T], numbers: Sequence[int]) -> Sequence[T]:
    """Pick items out: at once if all are in memory, else when they are asked for."""
    return tuple(whole[number] for number in numbers) if isinstance(whole, tuple) else Picked(whole, numbers)


class Joined(Lazy[T_co]):
    """Sequences one after another."""

    def __init__(self, parts: Sequence[Sequence[T_co]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _item(self, number: int) -> T_co:
        part = bisect_right(self._ends, number)
        return self._parts[part][number - (self._ends[part - 1] if part else 0)]
