"""How much goes through the model at once, and how much of that is computed again: what fits, the fastest first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from backprop.config import TrainConfig
from backprop.core.hardware import Gpu
from backprop.core.memory import FLOAT32, ModelShape, block_weights, in_4_bits
from backprop.core.phases import phases_of
from backprop.core.rates import rate_of_gpu


@dataclass(frozen=True, slots=True)
class Passes:
    """How the examples of a step go through the model."""

    examples: int
    """At once."""
    recomputed: int
    """Layers whose activations are computed again on the way back."""
    offloaded: bool = False
    """Whether their inputs wait for it in main memory."""

    @property
    def told(self) -> str:
        """In words."""
        where = " from main memory" if self.offloaded else ""
        return f"{self.examples} at once with {self.recomputed} layers recomputed{where}"


# Of the memory that is free, CUDA itself takes some; and what is estimated is not exact.
CUDA_BYTES = 512 * 2**20
SHARE_FOR_STEP = 0.95
# What is tried first may be estimated to need more.
SHARE_TRIED = 0.98
# A pass takes at least 5 ms for each layer, in which its kernels are started (docs/speed-notes.md).
START_SECONDS = 5e-3
START_SECONDS_4_BIT = 7.5e-3
# Going forward once more, against forward and back: 1.40 and 1.41 times the time were measured.
COST_OF_RECOMPUTING = 0.4
# A layer's input goes out while the layer runs, and comes back before it runs again: 1.2 ms of 27 for 8,192 tokens of a 7B
# through 16 lanes of PCIe 5; on a smaller card both take longer.
COST_OF_OFFLOADING = 0.05
# Of the main memory, what may wait there: it cannot be swapped.
SHARE_OFFLOADED = 0.25


def sides_of(config: TrainConfig) -> int:
    """Count what goes through the model at once for each example: both sides of a preference."""
    return 2 if config.objective in ("dpo", "orpo") else 1


def room_of(gpu: Gpu) -> float:
    """Give the bytes that a run may be estimated to need."""
    return SHARE_FOR_STEP * (gpu.memory_free_bytes - CUDA_BYTES)


def room_to_try(gpu: Gpu) -> float:
    """Give the bytes that what is tried may be estimated to need."""
    return room_of(gpu) * SHARE_TRIED / SHARE_FOR_STEP


def needs(
    config: TrainConfig, batch: int, length: int, shape: ModelShape, *, compiled: bool, dtype: str, main_bytes: int
) -> Mapping[Passes, int]:
    """Estimate the bytes that a run needs in its fullest phase, of each way that the configuration allows; of none, if the main
    memory is too small for what is to wait there.

    Args:
        length: Of the longest example, in tokens.
        main_bytes: Of main memory, what there is for each GPU.
    """

    def need(one: Passes) -> int:
        return phases_of(
            config,
            shape,
            tokens=one.examples * length,
            recomputed=one.recomputed,
            compiled=compiled,
            dtype=dtype,
            offloaded=one.offloaded,
            several=one.examples < batch,
        ).most

    limits = range(1, batch + 1) if config.micro_batch is None else [config.micro_batch]
    sizes = sorted({even(batch, most) for most in limits})
    every = shape.num_layers
    again = range(every + 1) if config.recompute is None else [min(config.recompute, every)]
    ways = [Passes(size, layers) for size in sizes for layers in again]
    # Of layers that are computed again in part, the inputs wait only where both were asked for.
    could = [one for one in ways if one.recomputed == every or (config.offload and config.recompute)]
    waiting = [
        replace(one, offloaded=True)
        for one in could
        if one.examples <= most_offloaded(shape, length, main_bytes, layers=one.recomputed)
    ]
    staying = () if config.offload else ways
    return {one: need(one) for one in (*staying, *(() if config.offload is False else waiting))}


def most_offloaded(shape: ModelShape, length: int, main_bytes: int, *, layers: int | None = None) -> int:
    """Say of how many examples at once what so many layers, or all, begin with may wait in main memory."""
    return int(SHARE_OFFLOADED * main_bytes / waiting_bytes(shape, length, layers or shape.num_layers))


def waiting_bytes(shape: ModelShape, length: int, layers: int) -> int:
    """Estimate what so many layers begin with, of an example."""
    return layers * length * shape.hidden_size * FLOAT32


def fastest_first(
    config: TrainConfig, need: Mapping[Passes, int], batch: int, length: int, shape: ModelShape, gpu: Gpu
) -> Sequence[Passes]:
    """Order the ways that may fit by how long a token is estimated to take."""
    room = room_to_try(gpu)
    start = start_seconds(config, shape) * rate_of_gpu(gpu) / (4 * block_weights(shape))
    return sorted(
        (one for one, size in need.items() if size <= room),
        key=lambda one: _cost(one, shape, batch / math.ceil(batch / one.examples) * length, start),
    )


def start_seconds(config: TrainConfig, shape: ModelShape) -> float:
    """Estimate the time in which the kernels of a pass are started on a GPU, forward and back; it computes meanwhile."""
    return shape.num_layers * (START_SECONDS_4_BIT if in_4_bits(config) else START_SECONDS)


# A try takes two passes, and the first of all compiles.
MOST_TRIED = 3


def worth_trying(ways: Sequence[Passes]) -> tuple[Passes, ...]:
    """Choose those whose order the estimate may have wrong: the fastest of each size.

    Args:
        ways: The fastest first.
    """
    of_each_size: dict[int, Passes] = {}
    for one in ways:
        of_each_size.setdefault(one.examples, one)
    return tuple(of_each_size.values())[:MOST_TRIED]


def _cost(one: Passes, shape: ModelShape, tokens: float, start: float) -> float:
    """Estimate the time of a token's way through the model, against that in a long pass without recomputing.

    Args:
        tokens: Of the pass, on the average of a step.
        start: Tokens that are computed while a pass is started; both go on side by side.
    """
    more = COST_OF_RECOMPUTING * one.recomputed / shape.num_layers + COST_OF_OFFLOADING * one.offloaded
    return (1 + more) * math.hypot(1, start / tokens)


def even(batch: int, most: int) -> int:
    """Give the size of passes of at most ``most`` examples, as few and as even as can be."""
    return math.ceil(batch / math.ceil(batch / most))


def divisor(number: int, most: int) -> int:
    """Give the largest divisor of ``number`` that is at most ``most``."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)
