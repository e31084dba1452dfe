"""How much of a GPU's memory each phase of a run needs, from shapes alone, and from what was measured of a step."""

from dataclasses import dataclass, replace

from backprop.config import TrainConfig
from backprop.core.memory import (
    BF16,
    FLOAT32,
    WORKSPACE,
    ModelShape,
    dora_memory,
    held_memory,
    in_4_bits,
    loss_memory,
    step_memory,
    word_weights,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """What each phase of a run holds of a GPU's memory at its fullest, in bytes."""

    load: int
    step: int
    """Of the longest row."""
    evaluation: int
    save: int
    """Of what is held between two steps nothing is copied but `copied`."""
    merge: int = 0
    """Adapters are merged in main memory."""
    moments: int
    """Of all but loading, what the optimizer keeps from its first update on."""
    copied: int = 0
    """Of saving: words that are trained and tied are written twice."""

    @property
    def most(self) -> int:
        """What the run needs."""
        return max(self.load, self.step, self.evaluation, self.save, self.merge)


def phases_of(
    config: TrainConfig,
    shape: ModelShape,
    *,
    tokens: int,
    recomputed: int,
    compiled: bool,
    dtype: str = "bfloat16",
    offloaded: bool = False,
    several: bool = True,
) -> Phases:
    """Estimate what each phase needs on a GPU.

    Args:
        tokens: Of the largest pass; as many are evaluated at once.
        recomputed: Layers whose activations are computed again on the way back.
        compiled: Whether layers are compiled.
        offloaded: Whether the inputs of layers that are computed again wait in main memory.
        several: Whether a step has more than one pass.
    """
    step = step_memory(
        config,
        shape,
        tokens=tokens,
        recomputed=recomputed,
        compiled=compiled,
        dtype=dtype,
        offloaded=offloaded,
        several=several,
    )
    held = held_memory(config, shape, dtype=dtype)
    copied = word_weights(shape) * FLOAT32 if config.method == "full" and shape.tied else 0
    between = WORKSPACE + held.base + held.trained + held.moments
    return Phases(
        load=WORKSPACE + _load_memory(config, shape, dtype=dtype),
        step=step.total,
        evaluation=between + held.casts + _forward_memory(config, shape, tokens=tokens, dtype=dtype),
        save=between + copied,
        moments=held.moments,
        copied=copied,
    )


def _load_memory(config: TrainConfig, shape: ModelShape, *, dtype: str) -> int:
    held, width = held_memory(config, shape, dtype=dtype), BF16 if dtype == "bfloat16" else FLOAT32
    largest = shape.hidden_size * max(shape.intermediate_size, *shape.widths)
    match config.method:
        case "full":
            # All are copied, words that are tied once for each end; then copies become float32 one by one, words first.
            words = word_weights(shape)
            copied = 2 * held.base + words * (FLOAT32 + width * shape.tied)
            return max(held.base + held.trained, copied)
        case "qlora":
            # One weight at a time comes in 16 bits, or goes back to them; then the adapter.
            return held.base + max(largest * width, held.trained)
        case "dora":
            # The norm of each weight is taken with its adapter's product in it.
            return held.base + held.trained + 3 * largest * FLOAT32
        case _:
            return held.base + held.trained


def _forward_memory(config: TrainConfig, shape: ModelShape, *, tokens: int, dtype: str) -> int:
    """Estimate what a pass without a gradient works with: one layer, or the loss."""
    width = BF16 if dtype == "bfloat16" else FLOAT32
    # Of its feed-forward part, and of what goes through it.
    layer = tokens * width * (4 * shape.intermediate_size + 4 * shape.hidden_size)
    layer += shape.hidden_size * shape.intermediate_size * width if in_4_bits(config) else 0
    if config.method == "dora":
        layer = dora_memory(shape, tokens=tokens) + 2 * tokens * width * shape.intermediate_size
    return max(layer, loss_memory(config, shape, tokens=tokens, width=width, gradient=False))


@dataclass(frozen=True, slots=True)
class Footprint:
    """What was measured of a step, in bytes."""

    held: int
    """Before it."""
    peak: int
    """In it, before its update."""


def mended(expected: Phases, found: Footprint, *, updated: bool = False) -> Phases:
    """Put what was measured in place of what was estimated.

    Args:
        found: Of the fullest step. What the optimizer keeps is added where it comes later: it is known exactly.
        updated: Whether the optimizer had made its state before.
    """
    later = 0 if updated else expected.moments
    more = found.held + later + expected.copied - expected.save
    return replace(expected, step=found.peak + later, evaluation=expected.evaluation + more, save=expected.save + more)
