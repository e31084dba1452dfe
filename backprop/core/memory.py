"""How much of a GPU's memory a training step needs, from shapes alone: no weight is loaded.

Counted as the tensors that torch keeps for the way back, layer by layer; scripts/bench-gpu holds it against a GPU.
"""

from dataclasses import dataclass

from backprop.config import TrainConfig

BF16, FLOAT32 = 2, 4
# A weight in nf4 with doubly quantized scales: 4 bits, 8 for each 64 weights, and 32 for each 256 of these
# (arXiv:2305.14314, section 3).
NF4 = 4 / 8 + 1 / 64 + 4 / (64 * 256)
# A trained weight in float32, with its gradient and AdamW's two moments.
TRAINED = 4 * FLOAT32
# What cuBLAS and others keep to work in.
WORKSPACE = 2**27
# Logits that the loss holds at once, of `engine.linear_cross_entropy`: in bfloat16, in float32 and their gradient.
LOSS_BYTES = 2**25 * (BF16 + FLOAT32 + BF16)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What the plan needs of a model's configuration."""

    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward part."""
    num_layers: int
    max_positions: int
    vocabulary: int
    query_size: int = 0
    """Width of all queries together; 0 stands for ``hidden_size``."""
    key_size: int = 0
    """Width of all keys together; 0 stands for that of all queries."""
    tied: bool = False
    """Whether the weights of words also make the logits."""
    plain_logits: bool = True
    """Whether the last product makes the logits as they are, neither scaled nor capped."""
    num_experts: int = 1
    """How many feed-forward parts a layer has, of which each token meets some."""
    expert_size: int = 0
    """Width of each."""
    family: str = ""
    """What its configuration calls the architecture."""

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of all queries and of all keys."""
        queries = self.query_size or self.hidden_size
        return queries, self.key_size or queries


def block_weights(shape: ModelShape) -> int:
    """Count the weights of all layers' products, with those of every expert."""
    return _block_weights(shape, shape.num_experts * shape.expert_size or shape.intermediate_size)


def met_weights(shape: ModelShape) -> int:
    """Count the weights that a token meets on its way."""
    return _block_weights(shape, shape.intermediate_size) + shape.hidden_size * shape.vocabulary


def _block_weights(shape: ModelShape, feed_forward: int) -> int:
    queries, keys = shape.widths
    attention = shape.hidden_size * (2 * queries + 2 * keys)
    return shape.num_layers * (attention + 3 * shape.hidden_size * feed_forward)


def word_weights(shape: ModelShape) -> int:
    """Count the weights of the words, on both ends of the model."""
    return shape.hidden_size * shape.vocabulary * (1 if shape.tied else 2)


def adapter_weights(shape: ModelShape, rank: int) -> int:
    """Count the weights of LoRA on all products of all layers."""
    queries, keys = shape.widths
    attention = 2 * (shape.hidden_size + queries) + 2 * (shape.hidden_size + keys)
    return shape.num_layers * rank * (attention + 3 * (shape.hidden_size + shape.intermediate_size))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """What a training step holds at its fullest, in bytes."""

    weights: int
    """Of the base, of what is trained, and of its optimizer."""
    kept: int
    """Activations that wait for the way back."""
    working: int
    """What one layer, or the loss, needs beside them."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kept + self.working


def step_memory(
    config: TrainConfig,
    shape: ModelShape,
    *,
    tokens: int,
    recomputed: int,
    compiled: bool,
    dtype: str = "bfloat16",
    offloaded: bool = False,
) -> StepMemory:
    """Estimate what a step needs on a GPU.

    Args:
        tokens: Of the largest pass.
        recomputed: Layers whose activations are computed again on the way back.
        compiled: Whether layers are compiled, which fuses what would be kept in between.
        offloaded: Whether the inputs of layers that are computed again wait in main memory.
    """
    width = BF16 if dtype == "bfloat16" else FLOAT32
    whole = config.method == "full"
    blocks, words = block_weights(shape), word_weights(shape)
    held = int(blocks * (NF4 if config.method == "qlora" else width)) + words * width
    trained = blocks + words if whole else adapter_weights(shape, config.lora_r)
    layer = tokens * kept_per_token(config, shape, compiled=compiled) * width
    entry = tokens * shape.hidden_size * width
    # Two: one on its way out, and one that a layer works on.
    entries = min(recomputed, 2) if offloaded else recomputed
    kept = (shape.num_layers - recomputed) * layer + entries * entry
    # On the way back through a layer: the gradients of its widest part, and of what goes through it.
    way_back = tokens * width * (2 * shape.intermediate_size + 6 * shape.hidden_size)
    if config.fp8_backward and not compiled:
        # A gradient's absolute values, and itself in float32 twice.
        way_back += tokens * shape.intermediate_size * (BF16 + 2 * FLOAT32)
    if config.method == "qlora":
        way_back += shape.hidden_size * shape.intermediate_size * width
    in_parts = shape.plain_logits and not whole
    logits = LOSS_BYTES if in_parts else tokens * shape.vocabulary * (width + 3 * FLOAT32)
    loss = logits + 4 * entry
    again = layer if recomputed else 0
    # The first layers are those that are computed again: when their turn comes, the others have let go of theirs.
    if recomputed < shape.num_layers:
        again = max(0, again - (shape.num_layers - recomputed) * layer)
    # Feed-forward weights once more in 8 bits.
    held += shape.num_layers * 3 * shape.hidden_size * shape.intermediate_size if config.fp8_backward else 0
    # Weights that are trained in float32 are computed with in 16 bits, and kept so for the way back.
    held += trained * width if whole and width == BF16 else 0
    return StepMemory(weights=held + TRAINED * trained, kept=kept, working=WORKSPACE + max(loss, way_back + again))


def kept_per_token(config: TrainConfig, shape: ModelShape, *, compiled: bool) -> int:
    """Count the numbers that one layer keeps of each token for the way back."""
    hidden, (queries, keys) = shape.hidden_size, shape.widths
    # What goes into each product, both residual sums, and attention's queries, keys, values and output.
    numbers = 4 * hidden + 2 * queries + 2 * keys + 3 * shape.intermediate_size
    if not compiled:
        # Norms in float32, positions turned into queries and keys, and the gate before it was multiplied.
        numbers += hidden + queries + keys + shape.intermediate_size
        # PEFT's DoRA makes a copy of an adapter's input for each.
        numbers += 4 * hidden if config.method == "dora" else 0
    if config.lora_dropout and config.method != "full":
        # Each input of an adapter once more, with a mask of one byte.
        numbers += (5 * hidden + queries + shape.intermediate_size) * 3 // 2
    return numbers
