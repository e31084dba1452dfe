"""A value that was chosen, and why it: what a plan is made of."""

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """A value, and why it."""

    value: T
    reason: str
