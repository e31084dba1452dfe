"""Frozen weights in 4 bits within compiled code: 16 bits are made of them by the compiler's own kernels, one for each weight.

bitsandbytes makes them in operations of its own, which a compiler starts one by one from Python: three for a weight on the
way back. Torch and bitsandbytes are imported at the top since these are classes of theirs; only `load` imports this.
"""

from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]
from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:
    Mixin = torch.nn.Linear
else:
    Mixin = Linear4bit

BLOCK, OF_SCALES = 64, 256
"""Weights that share a scale, and scales that share one of their own."""


def unpack(state: Any, packed: torch.Tensor, *, again: bool = False) -> torch.Tensor:
    """Make the weights of nf4 with doubly quantized scales (arXiv:2305.14314, section 3), uncompiled bit for bit as bitsandbytes.

    Args:
        state: What bitsandbytes keeps of them.
        packed: Two to a byte, the first in its upper half; of any shape.
        again: By other operations: a compiler that finds the same ones twice would keep what they give.
    """
    pairs = packed.view(-1, BLOCK // 2)
    halves = (torch.bitwise_right_shift(pairs, 4), pairs % 16) if again else (pairs >> 4, pairs & 15)
    numbers = torch.stack(halves, dim=-1).flatten(1).int()
    of_scales = state.state2.absmax[:, None].expand(-1, OF_SCALES).flatten()[: len(pairs)]
    scales = state.state2.code[state.absmax.long() if again else state.absmax.int()] * of_scales + state.offset
    return (state.code[numbers] * scales[:, None]).to(state.dtype).view(state.shape)


class _Product(torch.autograd.Function):
    """A product with weights that are made into 16 bits for it, and anew for the way back: never held in between.

    Nothing is cast in here: the compiler of torch 2.11 loses, without a word, the gradient of an input that is used through what
    may be itself.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, packed: torch.Tensor, state: Any) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.state = state
        return torch.nn.functional.linear(input, unpack(state, packed))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (packed,) = ctx.saved_tensors
        return gradient @ unpack(ctx.state, packed, again=True), None, None


class _FourBit(Mixin):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(input)
        weight: Any = self.weight
        bias: Any = self.bias
        made = _Product.apply(input.to(weight.quant_state.dtype), weight.data, weight.quant_state)
        made = made if bias is None else made + bias
        return made.to(input.dtype)


def hold_in_16_bits(model: Any) -> None:
    """Let the 4-bit layers of ``model`` be plain ones of the same weights, one after the other, so that both are held of one alone."""
    for module in model.modules():
        for name, layer in list(module.named_children()):
            if isinstance(layer, Linear4bit):
                whole = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                held: Any = layer.weight
                made: Any = dequantize_4bit(held.data, held.quant_state)
                whole.weight = torch.nn.Parameter(made, requires_grad=False)
                whole.bias = layer.bias
                held.module = None  # else it and the layer hold each other until garbage is collected
                setattr(module, name, whole.train(layer.training))


def unpack_within_compiled_code(model: Any) -> None:
    """Let the 4-bit layers of ``model`` do so, where they are held as this knows them."""
    for module in model.modules():
        if type(module) is Linear4bit and _is_known(module.weight.quant_state):
            module.__class__ = _FourBit


def _is_known(state: Any) -> bool:
    return (
        state.quant_type == "nf4"
        and state.nested
        and (state.blocksize, state.state2.blocksize) == (BLOCK, OF_SCALES)
        and not getattr(state, "packing_format_for_cpu", False)
        and state.shape.numel() % BLOCK == 0
    )
