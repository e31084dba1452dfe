"""The way back through the frozen feed-forward products in 8 bits; the way forward, and so the loss, stays as it is.

Torch is imported at the top since these are classes of its; only `ranks` and `loop` import this, where the plan says so.
docs/speed-notes.md tells why just these products: what rounding does to gradients of real weights.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch

from backprop.core.data.render import Example
from backprop.engine.attention import within_documents
from backprop.engine.batches import PassSize, computing
from backprop.engine.objectives import Objective
from backprop.events import Proved

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of this format (arXiv:2209.05433, table 1)."""
MULTIPLE = 16
"""Of which the sides of a product must be, for the tensor cores."""
LEAST_COSINE = 0.99
PROOF_TOKENS = 2048


def by_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of a matrix to 8 bits, with a float32 scale of its own, of shape (rows, 1)."""
    scales = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (matrix.float() / scales).to(FP8), scales


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
        made: torch.Tensor = torch.ops.aten._scaled_mm(
            rounded, weight_8.t(), scale_a=of_rows, scale_b=scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
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
    width = model.get_base_model().config.get_text_config().intermediate_size
    for module in model.modules():
        layer: Any = getattr(module, "base_layer", None)
        if type(layer) is torch.nn.Linear and width in layer.weight.shape:
            if any(side % MULTIPLE for side in layer.weight.shape):
                continue
            weight_8, scales = by_rows(layer.weight.data.t().contiguous())
            layer.register_buffer("weight_8", weight_8, persistent=False)
            layer.register_buffer("scales", scales, persistent=False)
            layer.__class__ = _Frozen


def layers_of(model: Any) -> list[Any]:
    """Give the layers that were prepared."""
    return [module for module in model.modules() if isinstance(module, _Frozen)]


def undo(model: Any) -> None:
    """Let all layers be as they were."""
    for layer in layers_of(model):
        del layer.weight_8, layer.scales
        layer.__class__ = torch.nn.Linear


def prove(model: Any, objective: Objective, examples: Iterable[Example], size: PassSize) -> Proved:
    """Compare the gradient of the first examples with that in 16 bits, for each trained matrix that has one, by cosine."""
    name = "the way back in 8 bits gives the gradient"
    layers = layers_of(model)
    if not layers:
        return Proved(name=name, ok=False, found="no feed-forward layer of this model can go back so")
    one = objective.passes(_first(examples, min(PROOF_TOKENS, size.tokens)), size)[0]
    with within_documents(model) if size.packing else nullcontext():
        exact, rounded = (
            _gradients(model, layers, objective, one, size.dtype, in_8_bits=flag) for flag in (False, True)
        )
    cosines = {
        name: float(torch.nn.functional.cosine_similarity(exact[name], rounded[name], dim=0))
        for name in exact
        if exact[name].any()
    }
    least = min(cosines, key=cosines.__getitem__)
    found = f"{len(layers)} layers; cosine to the gradient in 16 bits at least {cosines[least]:.4f}, in {least}"
    return Proved(name=name, ok=cosines[least] > LEAST_COSINE, found=found)


def _first(examples: Iterable[Example], tokens: int) -> list[Example]:
    found: list[Example] = []
    for example in examples:
        tokens -= len(example.ids)
        if found and tokens < 0:
            break
        found.append(example)
    return found


def _gradients(
    model: Any, layers: list[Any], objective: Objective, one: Mapping[str, Any], dtype: str, *, in_8_bits: bool
) -> dict[str, torch.Tensor]:
    for layer in layers:
        layer.in_8_bits = in_8_bits
    with torch.random.fork_rng(), computing(model, dtype):
        torch.manual_seed(0)
        part = objective.part(model, one, objective.totals([one], []), next(model.parameters()).device)
    part.loss.backward()
    weights = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    found = {name: gradient.float().flatten() for name, gradient in weights.items()}
    model.zero_grad(set_to_none=True)
    return found
