"""How much of a GPU's memory each phase of a run needs, from shapes alone: no weight is loaded."""

from dataclasses import dataclass

from backprop.config import TrainConfig
from backprop.core.memory import (
    BF16,
    FLOAT32,
    LOSS_BYTES,
    NF4,
    WORKSPACE,
    ModelShape,
    StepMemory,
    adapter_weights,
    block_weights,
    word_weights,
)

# AdamW's two moments of a trained weight, which a run has from its first update on.
MOMENTS = 2 * FLOAT32


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """What each phase of a run holds at its fullest, in bytes."""

    load: int
    step: int
    """Of the longest row."""
    evaluation: int
    save: int
    """Nothing beside what is held between two steps: tensors are written one by one."""
    merge: int = 0
    """Adapters are merged in main memory."""

    @property
    def most(self) -> int:
        """The largest."""
        return max(self.load, self.step, self.evaluation, self.save, self.merge)


def phases(config: TrainConfig, shape: ModelShape, step: StepMemory, *, tokens: int, dtype: str = "bfloat16") -> Phases:
    """Estimate what each phase needs on a GPU.

    Args:
        step: Of the largest pass.
        tokens: In that pass; as many are evaluated at once.
    """
    width = BF16 if dtype == "bfloat16" else FLOAT32
    whole = config.method == "full"
    blocks, words = block_weights(shape), word_weights(shape)
    base = int(blocks * (NF4 if config.method == "qlora" else width)) + words * width
    trained = trained_weights(config, shape)
    largest = shape.hidden_size * max(shape.intermediate_size, *shape.widths)
    # Of the weight under way: in 16 bits while it becomes one of 4, and as its norm is taken for DoRA.
    under_way = {"qlora": largest * width, "dora": 3 * largest * FLOAT32}.get(config.method or "", 0)
    load = base + trained * FLOAT32 + under_way
    held = base + trained * (FLOAT32 + MOMENTS)
    # Of a layer that keeps nothing: its feed-forward part, and what goes through it.
    layer = tokens * width * (4 * shape.intermediate_size + 4 * shape.hidden_size)
    layer += largest * width if config.method == "qlora" else 0
    logits = LOSS_BYTES if shape.plain_logits and not whole else tokens * shape.vocabulary * (width + 2 * FLOAT32)
    loss = logits + tokens * shape.hidden_size * (width + FLOAT32)
    return Phases(load=load, step=step.total, evaluation=WORKSPACE + held + max(layer, loss), save=WORKSPACE + held)


def trained_weights(config: TrainConfig, shape: ModelShape) -> int:
    """Count the weights that are trained."""
    if config.method == "full":
        return block_weights(shape) + word_weights(shape)
    return adapter_weights(shape, config.lora_r)


def mended(config: TrainConfig, shape: ModelShape, measured: int) -> int:
    """Give what a step needs at its fullest, from what was measured of one before the first update.

    What the optimizer keeps comes later, and is known exactly.
    """
    return measured + MOMENTS * trained_weights(config, shape)
