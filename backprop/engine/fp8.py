"""The way back through the frozen feed-forward products in 8 bits; the way forward, and so the loss, stays as it is.

Torch is imported at the top since these are classes of its; only `ranks` and `loop` import this, where the plan says so.
docs/speed-notes.md tells why just these products: what rounding does to gradients of real weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch

from backprop.core.data.render import Example
from backprop.engine.attention import within_documents
from backprop.engine.batches import PassSize, computing
from backprop.engine.layers import forget_step, why_not_compiled
from backprop.engine.layers import layers_of as decoder_layers
from backprop.engine.objectives import Objective
from backprop.engine.ranks import Ranks
from backprop.events import Proved

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of this format (arXiv:2209.05433, table 1)."""
MULTIPLE = 16
"""Of which the sides of a product must be, for the tensor cores."""
MOST_ROUNDING = 0.14
"""How far a gradient may be from that in 16 bits, as a share of its norm: a cosine of 0.99, where both are as long."""
MOST_LEFT_OUT = 0.5
"""Of the layers, what may stay in 16 bits: with more, little is gained for what is held twice."""
PROOF_TOKENS = 2048


def by_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of a matrix to 8 bits, with a float32 scale of its own, of shape (rows, 1)."""
    scales = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (matrix.float() / scales).to(FP8), scales


@torch.library.custom_op("backprop::product_in_8_bits", mutates_args=())
def product_in_8_bits(
    rows: torch.Tensor, of_rows: torch.Tensor, columns: torch.Tensor, of_columns: torch.Tensor
) -> torch.Tensor:
    """Multiply two matrices of 8 bits, in a step that a compiler leaves alone: its own kernels for it are no faster.

    Args:
        rows: Of shape (M, K), with scales of shape (M, 1).
        columns: Of shape (N, K), with scales of shape (N, 1): it is turned.

    Returns:
        A bfloat16 matrix of shape (M, N).
    """
    product: torch.Tensor = torch.ops.aten._scaled_mm(
        rows, columns.t(), scale_a=of_rows, scale_b=of_columns.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product


@product_in_8_bits.register_fake
def _(rows: torch.Tensor, of_rows: torch.Tensor, columns: torch.Tensor, of_columns: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((rows.shape[0], columns.shape[0]), dtype=torch.bfloat16)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        inputs, weight, bias, weight_8, scales = arguments
        ctx.save_for_backward(weight_8, scales)
        ctx.dtype = inputs.dtype
        return torch.nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        weight_8, scales = ctx.saved_tensors
        rounded, of_rows = by_rows(gradients[0].flatten(0, -2))
        made = product_in_8_bits(rounded, of_rows, weight_8, scales)
        return made.view(*gradients[0].shape[:-1], -1).to(ctx.dtype), None, None, None, None


class _Frozen(torch.nn.Linear):
    """A frozen linear layer that also holds its weight in 8 bits, turned for the way back: of shape (in, out)."""

    weight_8: torch.Tensor
    scales: torch.Tensor
    in_8_bits = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not (self.in_8_bits and torch.is_grad_enabled()):
            return super().forward(input)
        product = _Product.apply(input, self.weight, self.bias, self.weight_8, self.scales)
        return cast(torch.Tensor, product)


def prepare(model: Any) -> None:
    """Let the frozen feed-forward layers under adapters go their way back in 8 bits."""
    for layer in _feed_forward(model):
        if not any(side % MULTIPLE for side in layer.weight.shape):
            weight_8, scales = by_rows(layer.weight.data.t().contiguous())
            layer.register_buffer("weight_8", weight_8, persistent=False)
            layer.register_buffer("scales", scales, persistent=False)
            layer.__class__ = _Frozen


def _feed_forward(model: Any) -> list[Any]:
    """Give every linear layer under an adapter that is not within attention."""
    return [
        module.base_layer
        for layer in decoder_layers(model)
        for name, module in layer.named_modules()
        if isinstance(getattr(module, "base_layer", None), torch.nn.Linear)
        and "attn" not in name
        and "attention" not in name
    ]


def _prepared(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _Frozen)]


def undo(model: Any, layers: Sequence[int] | None = None) -> None:
    """Let layers of the decoder, or all that there is, be as they were."""
    every = decoder_layers(model)
    for part in [model] if layers is None else [every[number] for number in layers]:
        for layer in _prepared(part):
            del layer.weight_8, layer.scales
            layer.__class__ = torch.nn.Linear


def prove(
    model: Any, objective: Objective, examples: Iterable[Example], size: PassSize, ranks: Ranks
) -> tuple[Proved, Sequence[int]]:
    """Compare the gradient of the first examples, as training computes it, with that in 16 bits.

    A model that has learnt nothing yet has none for A: B's is compared, of every layer that is trained. The last layer of the
    decoder whose gradient is too far off stays in 16 bits, and so on; what is before it had its error from there, perhaps.

    Returns:
        The proof, and the layers that stay in 16 bits where it holds.
    """
    name = "the way back in 8 bits gives the gradient"
    layers, possible = _prepared(model), len(_feed_forward(model))
    if not layers:
        found = f"none of {possible} feed-forward layers of this model can go back so"
        return Proved(name=name, ok=False, found=found), ()
    one = objective.passes(_first(examples, min(PROOF_TOKENS, size.tokens)), size)[0]
    stay: list[int] = []
    with within_documents(model) if size.packing else nullcontext():
        exact = _exactly(model, layers, objective, one, size.dtype)
        off = _off_by(model, objective, one, ranks, exact)
        while isinstance(off, dict) and (worst := _to_leave_out(model, off, stay)) is not None:
            stay.append(worst)
            ranks.keep_16_bits([worst])
            off = _off_by(model, objective, one, ranks, exact)
    if isinstance(off, str):
        return Proved(name=name, ok=False, found=off), ()
    most = max(off, key=off.__getitem__, default="")
    told = f"; {layers_told(stay)} in 16 bits" if stay else ""
    found = f"{len(_prepared(model))} of {possible} layers; off by {off.get(most, 1):.1%} of its norm at most, in {most}{told}"
    return Proved(name=name, ok=bool(off) and not _too_far(off), found=found), sorted(stay)


def layers_told(numbers: Sequence[int]) -> str:
    """Name layers of the decoder, counted from 0."""
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))} of the decoder"


def _too_far(off: Mapping[str, float]) -> list[str]:
    return [name for name, share in off.items() if not share < MOST_ROUNDING]


def _off_by(
    model: Any, objective: Objective, one: Mapping[str, Any], ranks: Ranks, exact: Mapping[str, torch.Tensor]
) -> dict[str, float] | str:
    """Give how far the gradient of each matrix is from that in 16 bits, as a share of its norm; or why that is not known."""
    try:
        full = not exact or ranks.step(model, objective, [one], seed=0) is None
    except (RuntimeError, AssertionError) as error:  # what kernels and compilers raise that do not take this
        if "CUDA error" in str(error) and "CUBLAS_STATUS_NOT_SUPPORTED" not in str(error):
            raise
        return f"it cannot be computed here: {why_not_compiled(error)}"
    finally:
        rounded = _take_gradients(model)
    if full:
        forget_step(model)
        return "the GPU's memory was too small for the proof"
    return {
        name: float((rounded[name] - exact[name]).norm() / exact[name].norm()) for name in exact if exact[name].any()
    }


def _to_leave_out(model: Any, off: Mapping[str, float], stay: Sequence[int]) -> int | None:
    """Give the layer of the decoder that is to go back in 16 bits; None if none need to, or more than half would."""
    layers = decoder_layers(model)
    if len(stay) >= MOST_LEFT_OUT * len(layers):
        return None
    of = {id(weight): number for number, layer in enumerate(layers) for weight in layer.parameters()}
    weights = dict(model.named_parameters())
    far = [of[id(weights[name])] for name in _too_far(off) if id(weights[name]) in of]
    if not far:
        return None
    # Where its own products are in 16 bits, the error came from the next that is not.
    return next((number for number in range(max(far), len(layers)) if _prepared(layers[number])), None)


def _first(examples: Iterable[Example], tokens: int) -> list[Example]:
    found: list[Example] = []
    for example in examples:
        tokens -= len(example.ids)
        if found and tokens < 0:
            break
        found.append(example)
    return found


def _exactly(
    model: Any, layers: Sequence[Any], objective: Objective, one: Mapping[str, Any], dtype: str
) -> dict[str, torch.Tensor]:
    """Compute the gradient in 16 bits; empty if the memory was too small."""
    for layer in layers:
        layer.in_8_bits = False
    try:
        with torch.random.fork_rng(), computing(model, dtype):
            torch.manual_seed(0)
            part = objective.part(model, one, objective.totals([one], []), next(model.parameters()).device)
        part.loss.backward()
    except torch.OutOfMemoryError:
        return {}
    finally:
        for layer in layers:
            layer.in_8_bits = True
    return _take_gradients(model)


def _take_gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.float() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
