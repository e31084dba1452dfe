"""How far a run repeats an earlier one: its adapter by hash, its losses step by step. Reads no files."""

import decimal
import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Record:
    """What is compared of a run."""

    adapter_sha256: str
    losses: tuple[float, ...]
    """Of each step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How a run compares with the one it repeats."""

    kind: Literal["equal", "close", "different"]
    """Equal is bit for bit, the adapter as well as every loss. Close is every loss within the tolerance."""
    first_step: int | None
    """The first step, from 1, beyond the tolerance or made by one run alone. None if there is no such step."""
    largest: float
    """Largest absolute difference of two losses of a step, where both are finite; 0 without any."""
    old: Record = field(repr=False)
    new: Record = field(repr=False)

    def sentence(self) -> str:
        """Say it in one line."""
        if self.kind == "different":
            return self._difference()
        if not self.old.losses:
            return "the adapters are equal bit for bit, and there are no losses to compare"
        bad = _first_not_finite(self.old.losses)
        return self._likeness() + (f"; the loss of step {bad} is {self.old.losses[bad - 1]} in both" if bad else "")

    def _likeness(self) -> str:
        if self.kind == "equal":
            return "equal bit for bit"
        if all(map(_are_equal, self.old.losses, self.new.losses)):
            return "losses equal to the last bit, but the adapter differs"
        spread = f"losses differ by at most {_rounded_up(self.largest)} over {_steps(self.old)}"
        same_adapter = self.old.adapter_sha256 == self.new.adapter_sha256
        return f"within tolerance: {spread}" + ("; the adapter is equal bit for bit" if same_adapter else "")

    def _difference(self) -> str:
        if self.first_step is None:
            return "the adapter differs, and there are no losses to compare"
        old, new = self.old.losses, self.new.losses
        numbers = f"{_steps(self.old)} before, {len(new)} now"
        if self.first_step > min(len(old), len(new)):
            return f"different from step {self.first_step} on: {numbers}"
        before, now = _apart(old[self.first_step - 1], new[self.first_step - 1])
        return f"different from step {self.first_step} on: loss {before} before, {now} now" + (
            f"; {numbers}" if len(old) != len(new) else ""
        )


def compare(old: Record, new: Record, *, tolerance: float = 1e-3) -> Comparison:
    """Compare a run with the one it repeats.

    NaN is equal to NaN, as a repeated run has it, and beyond any tolerance of every other loss.

    Args:
        old: The run that is repeated.
        new: The run that repeats it.
        tolerance: The share of the old loss, or of 1 if that is larger, that a loss may differ by.

    Raises:
        ValueError: If a hash is empty, or the tolerance is negative or NaN.
    """
    if not old.adapter_sha256 or not new.adapter_sha256:
        raise ValueError("an adapter without a hash cannot be compared")
    if not tolerance >= 0:
        raise ValueError(f"a tolerance of {tolerance}")
    pairs = list(zip(old.losses, new.losses, strict=False))
    beyond = (step for step, (before, now) in enumerate(pairs, start=1) if not _is_within(before, now, tolerance))
    first_step = next(beyond, None)
    if first_step is None and len(old.losses) != len(new.losses):
        first_step = len(pairs) + 1

    same_adapter = old.adapter_sha256 == new.adapter_sha256
    kind: Literal["equal", "close", "different"] = "close"
    # Without losses, the adapter alone tells.
    if first_step is not None or not (pairs or same_adapter):
        kind = "different"
    elif same_adapter and all(_are_equal(before, now) for before, now in pairs):
        kind = "equal"
    largest = max((abs(now - before) for before, now in pairs if math.isfinite(now - before)), default=0.0)
    return Comparison(kind=kind, first_step=first_step, largest=largest, old=old, new=new)


def _is_within(before: float, now: float, tolerance: float) -> bool:
    # An infinite loss would make its own tolerance infinite.
    if not (math.isfinite(before) and math.isfinite(now)):
        return _are_equal(before, now)
    return abs(now - before) <= tolerance * max(1.0, abs(before))


def _are_equal(before: float, now: float) -> bool:
    return before == now or (math.isnan(before) and math.isnan(now))


def _steps(run: Record) -> str:
    return f"{len(run.losses)} step{'' if len(run.losses) == 1 else 's'}"


def _first_not_finite(losses: tuple[float, ...]) -> int | None:
    return next((step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss)), None)


def _rounded_up(difference: float) -> str:
    """Write two digits that are no less than ``difference``."""
    context = decimal.Context(prec=2, rounding=decimal.ROUND_UP)
    return f"{float(context.create_decimal_from_float(difference)):g}"


def _apart(before: float, now: float) -> tuple[str, str]:
    """Write two losses in the fewest digits, but four, that tell one from the other."""
    digits = 4
    while digits < 17 and f"{before:.{digits}g}" == f"{now:.{digits}g}":
        digits += 1
    return f"{before:.{digits}g}", f"{now:.{digits}g}"
