"""A base model as a training in 4 bits has it: each weight of its linear layers rounded to NF4, and back."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.engine.load import load_base

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """Which weights were held in 4 bits, and the type that they were computed with."""

    weights: frozenset[str]
    dtype: str

    def apply(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Round a weight as `load.load_base` lets bitsandbytes do, and give it back in its own type."""
        import torch
        from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
            dequantize_4bit,
            quantize_4bit,
        )

        packed, state = quantize_4bit(
            weight.to(getattr(torch, self.dtype)).contiguous(), quant_type="nf4", compress_statistics=True
        )
        return dequantize_4bit(packed, state).to(weight.dtype)

    def apply_to(self, model: Any) -> None:
        """Round the weights of a loaded model in place."""
        for name, module in model.named_modules():
            if f"{name.removesuffix('.base_layer')}.weight" in self.weights and not hasattr(module, "base_layer"):
                module.weight.data = self.apply(module.weight.data)


def available() -> bool:
    """Say whether bitsandbytes, which holds weights in 4 bits, is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def load_as_trained(
    base: str, adapter: Path, *, dtype: str, device: str, trust_remote_code: bool = False
) -> tuple[Any, Rounding]:
    """Load the base model in 4 bits with the adapter beside its weights, and tell which of them are held so."""
    from backprop.engine.merge import wrap

    model: Any = load_base(base, dtype=dtype, device=device, four_bit=True, trust_remote_code=trust_remote_code)
    held = [f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    return wrap(model, adapter, of=base).eval(), Rounding(weights=frozenset(held), dtype=dtype)


def logits_as_trained(model: Any, sequences: Sequence[Sequence[int]], *, dtype: str) -> list[Any]:
    """Give the logits of each text, (T, V), float32, computed as in training."""
    from backprop.engine.batches import computing
    from backprop.engine.reference import logits

    with computing(model, dtype):
        return [logits(model, one) for one in sequences]
