"""What a step holds of a GPU's memory, measured, and what that makes of the estimates."""

import math
from collections.abc import Callable
from dataclasses import asdict

from backprop.config import TrainConfig
from backprop.core.phases import Footprint, Phases, mended
from backprop.core.plan import Plan, memory_of
from backprop.engine.batches import PassSize
from backprop.errors import HardwareError
from backprop.events import MemoryMended, Sink


def begin() -> int:
    """Begin to measure anew, and give the bytes that are held now; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def end(begun: int) -> Footprint:
    """Give what was held when `begin` was called, and the most since."""
    import torch

    return Footprint(held=begun, peak=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def room() -> float:
    """Give the bytes that this process may hold of the GPU, those that it holds included; without end where there is none."""
    import torch

    if not torch.cuda.is_available():
        return math.inf
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def too_small(config: TrainConfig, plan: Plan) -> HardwareError:
    """Give the error of a memory that is full where nothing is left to make a step smaller."""
    longest = plan.max_length.value
    instead = "leave out `--no-offload`, or " if config.offload is False else ""
    instead += "add `--no-dequantize`, or " if plan.dequantize.value else ""
    return HardwareError(
        f"the GPU's memory is too small for one example of up to {longest} tokens",
        hint=f"{instead}add a `--max-length` below {longest}, a smaller `--model`, or `--method qlora`",
    )


def expected(config: TrainConfig, plan: Plan, size: PassSize) -> Phases | None:
    """Estimate what each phase needs with passes of this size, planned or not; None without a GPU."""
    again, offloaded = size.recomputed, size.offloaded
    if again is None:
        again, offloaded = plan.recompute.value, plan.offload.value
    return memory_of(config, plan, tokens=size.tokens, recomputed=again, offloaded=offloaded)


def tell(expected: Phases | None, found: Footprint, how: str, say: Sink, *, run: int, updated: bool = False) -> None:
    """Mend what was expected of a way through the model by what was found of its step, and tell of it.

    Args:
        how: Where it was found.
        run: The number of this run in a multi-run.
        updated: Whether the optimizer had made its state before.
    """
    if expected is None or not found.peak:
        return
    known = asdict(mended(expected, found, updated=updated))
    say(MemoryMended(phases=known, estimated=asdict(expected), how=how, run=run))


class FirstStep:
    """Measures the first step of this process, and mends what is expected of the others.

    Args:
        expected: Gives what is estimated of the way in which it went through the model.
        updated: Whether the optimizer made its state in an earlier process.
    """

    def __init__(self, expected: Callable[[], Phases | None], *, updated: bool, say: Sink, run: int) -> None:
        self._expected, self._updated, self._say, self._run = expected, updated, say, run
        self._begun, self._over = 0, False

    def begin(self) -> None:
        """Begin before the passes of a step, and anew where the memory was full."""
        self._begun = 0 if self._over else begin()

    def end(self) -> None:
        """Measure what they took, before the update."""
        if not self._over:
            found = end(self._begun)
            tell(self._expected(), found, "in the first step", self._say, updated=self._updated, run=self._run)
        self._over = True
