"""How much of a GPU's memory a training step needs, from shapes alone: no weight is loaded.

Counted as the tensors that torch keeps for the way back, layer by layer; scripts/bench-gpu holds it against a GPU.
"""

from dataclasses import dataclass

from backprop.config import TrainConfig

BF16, FLOAT32 = 2, 4
# A weight in nf4 with doubly quantized scales: 4 bits, 8 for each 64 weights, and 32 for each 256 of these
# (arXiv:2305.14314, section 3).
NF4 = 4 / 8 + 1 / 64 + 4 / (64 * 256)
# A moment of AdamW in 8 bits, with a scale for each 256 of them (arXiv:2110.02861, section 2.1, as bitsandbytes has it; it
# keeps those of matrices below 4,096 in float32).
MOMENT_8_BIT = 1 + FLOAT32 / 256
# What cuBLAS keeps to work in, on an H200.
WORKSPACE = 2**26
# What a weight in 4 bits takes beside its own size: torch gives out memory in pieces that are up to 1 MiB larger.
ROUNDING_4_BIT = 3 * 2**16
# Logits that the loss holds at once (`engine.linear_cross_entropy`), about, in rows that fill the tiles of a GPU's products;
# and bytes of each, uncompiled: in 16 bits, in float32, and as their sum is taken once more.
LOSS_LOGITS, TILE_ROWS = 2**25, 128
LOGIT_BYTES = BF16 + FLOAT32 + FLOAT32
# Of logits that are held whole: in float32, as logarithms and as a gradient on the way back; without one, in 16 bits before.
WHOLE_LOGIT_BYTES = 3 * FLOAT32

# Architectures that norm what comes out of attention and of the feed-forward part, too; and those that norm queries and keys.
NORMED_AFTER = ("gemma2", "gemma3_text", "gemma3n_text", "glm4")
NORMED_HEADS = ("gemma3_text", "gemma3n_text", "olmo2", "olmo3", "qwen3", "qwen3_moe")


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
    num_norms: int = 2
    """Of a layer."""
    head_norms: bool = False
    """Whether queries and keys are normed too."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What is held of a model at any time, in bytes."""

    base: int
    trained: int
    """Of what is trained, the weights alone; a gradient takes as much."""
    moments: int
    """Of the same, what AdamW keeps from its first update on."""
    casts: int
    """Of the same, once more in 16 bits where it is in float32, for the length of a pass."""


def in_4_bits(config: TrainConfig) -> bool:
    """Say whether the base's weights are held in 4 bits throughout a run."""
    return config.method == "qlora" and not config.dequantize


def held_memory(config: TrainConfig, shape: ModelShape, *, dtype: str = "bfloat16") -> Held:
    """Estimate what the weights take."""
    width = BF16 if dtype == "bfloat16" else FLOAT32
    blocks, words = block_weights(shape), word_weights(shape)
    base = int(blocks * (NF4 if in_4_bits(config) else width)) + words * width
    base += shape.num_layers * 7 * ROUNDING_4_BIT if in_4_bits(config) else 0
    # Feed-forward weights once more in 8 bits.
    base += shape.num_layers * 3 * shape.hidden_size * shape.intermediate_size if config.fp8_backward else 0
    trained = trained_weights(config, shape)
    # An adapter of a 4-bit model is held in 16 bits.
    size = width if config.method == "qlora" else FLOAT32
    return Held(
        base=base,
        trained=trained * size,
        moments=moments_bytes(config, shape, size),
        casts=trained * width if size > width else 0,
    )


def trained_weights(config: TrainConfig, shape: ModelShape) -> int:
    """Count what is trained: an adapter on every product, or all."""
    return (
        block_weights(shape) + word_weights(shape) if config.method == "full" else adapter_weights(shape, config.lora_r)
    )


def moments_bytes(config: TrainConfig, shape: ModelShape, width: int) -> int:
    """Give what AdamW's two moments take of all that is trained, in ``width`` bytes each."""
    trained = trained_weights(config, shape)
    if config.optimizer != "adamw-8bit":
        return 2 * trained * width
    # What words begin with keeps 32 bits (`engine.trainer`).
    exact = shape.hidden_size * shape.vocabulary if config.method == "full" else 0
    return int(2 * ((trained - exact) * MOMENT_8_BIT + exact * FLOAT32))


def step_memory(
    config: TrainConfig,
    shape: ModelShape,
    *,
    tokens: int,
    recomputed: int,
    compiled: bool,
    dtype: str = "bfloat16",
    offloaded: bool = False,
    several: bool = True,
) -> StepMemory:
    """Estimate what a step needs on a GPU.

    Args:
        tokens: Of the largest pass.
        recomputed: Layers whose activations are computed again on the way back.
        compiled: Whether layers are compiled, which fuses what would be kept in between.
        offloaded: Whether the inputs of layers that are computed again wait in main memory.
        several: Whether a step has more passes, which find the gradients of earlier ones.
    """
    width = BF16 if dtype == "bfloat16" else FLOAT32
    whole = config.method == "full"
    held = held_memory(config, shape, dtype=dtype)
    layer = tokens * kept_per_token(config, shape, width=width, compiled=compiled)
    # Where words are trained in float32, so is what goes through the layers.
    entry = tokens * shape.hidden_size * (FLOAT32 if whole else width)
    # Two: one on its way out, and one that a layer works on.
    entries = min(recomputed, 2) if offloaded else recomputed
    own = shape.num_layers - recomputed
    kept = own * layer + entries * entry + held.casts
    # On the way back through a layer: the gradients of its widest part, and of what goes through it.
    way_back = tokens * width * (2 * shape.intermediate_size + 3 * shape.hidden_size)
    if config.fp8_backward and not compiled:
        # A gradient's absolute values, and itself in float32 twice.
        way_back += tokens * shape.intermediate_size * (BF16 + 2 * FLOAT32)
    if in_4_bits(config):
        # Compiled code makes the next weight while the last one's product runs.
        way_back += (1 + compiled) * shape.hidden_size * shape.intermediate_size * width
    if config.method == "dora":
        way_back = dora_memory(shape, tokens=tokens)
    loss = loss_memory(config, shape, tokens=tokens, width=width, compiled=compiled)
    again = layer if recomputed else 0
    if recomputed and compiled:
        # Within compiled code, what gate and up and their adapters give waits apart for the one kernel that needs it all.
        again += tokens * width * (3 * shape.intermediate_size + 2 * shape.hidden_size)
    # The first layers are those that are computed again: when their turn comes, the others have let go of theirs.
    turn = max(0, again - own * layer)
    # At the end, all gradients are there, and nothing is kept but by the first layer.
    late = 0 if several else held.trained + max(layer, again) + way_back - kept
    weights = held.base + held.trained * (1 + several) + held.moments
    return StepMemory(weights=weights, kept=kept, working=WORKSPACE + max(loss, way_back + turn, late))


def loss_rows(vocabulary: int) -> int:
    """Give how many rows the loss makes logits of at once."""
    return max(1, round(LOSS_LOGITS / vocabulary / TILE_ROWS)) * TILE_ROWS


def loss_memory(
    config: TrainConfig, shape: ModelShape, *, tokens: int, width: int, compiled: bool = False, gradient: bool = True
) -> int:
    """Estimate what the loss works with: some of the logits at once, or all where their weights are trained or they are changed."""
    entry = tokens * shape.hidden_size
    if shape.plain_logits and config.method != "full":
        rows = loss_rows(shape.vocabulary)
        logits = min(rows, tokens) * shape.vocabulary
        # Compiled, as they are and their gradient alone. Beside a further part, the gradient of the one before.
        size = width * (1 + gradient) if compiled else LOGIT_BYTES
        size += width if gradient and tokens > rows else 0
        return logits * size + entry * (FLOAT32 + width + width * gradient)
    size = WHOLE_LOGIT_BYTES if gradient else width + 2 * FLOAT32
    return tokens * shape.vocabulary * size + entry * (2 * FLOAT32 + width)


def dora_memory(shape: ModelShape, *, tokens: int) -> int:
    """Estimate what PEFT's DoRA works with in a layer, either way, in float32."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    # Of its widest products: the layer's, the adapter's, both scaled, and their sum, beside another; the weights of both.
    products = tokens * ((3 * FLOAT32 + BF16) * wide + 3 * FLOAT32 * hidden) + 2 * FLOAT32 * wide * hidden
    # An adapter is multiplied out by a unit matrix, in float32 and in 16 bits.
    unit = wide * wide * (FLOAT32 + BF16) + BF16 * wide * hidden
    return max(products, unit + tokens * (3 * FLOAT32 * hidden + BF16 * wide))


def kept_per_token(config: TrainConfig, shape: ModelShape, *, width: int, compiled: bool) -> int:
    """Count the bytes that one layer keeps of each token for the way back.

    Args:
        width: Bytes of a number that is computed with.
    """
    hidden, wide, (queries, keys) = shape.hidden_size, shape.intermediate_size, shape.widths
    whole = config.method == "full"
    if compiled:
        # What goes into each product, both residual sums, and attention's queries, keys, values and output.
        size = width * ((2 + shape.num_norms) * hidden + 2 * queries + 2 * keys + 3 * wide)
    else:
        # What goes into each norm, in float32; into each product; attention's own; and the gate before and after it is bent.
        size = FLOAT32 * shape.num_norms * hidden + width * (2 * hidden + 2 * queries + 2 * keys + 4 * wide)
        size += FLOAT32 * (queries + keys) if shape.head_norms else 0
        if whole:
            # What comes out of each norm, in float32; each product's own copy in 16 bits; and attention's output once more.
            size += FLOAT32 * shape.num_norms * hidden + width * (3 * hidden + queries)
            size += FLOAT32 * (shape.num_norms - 2) * hidden  # of Gemma's norms, their input as well
        if config.method == "dora":
            # PEFT's DoRA copies each adapter's input, and keeps what comes out of the layer and of its adapter.
            size += width * (3 * hidden + queries + 2 * (2 * hidden + queries + 2 * keys + 2 * wide))
    if not whole:
        size += width * 7 * config.lora_r
    if config.lora_dropout and not whole:
        # Each input of an adapter once more, with a mask of one byte.
        size += (5 * hidden + queries + wide) * (width + 1)
    return size
