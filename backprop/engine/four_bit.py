"""A base model as a training in 4 bits has it: each weight of its linear layers rounded to NF4, and back."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.core.data.formats import Message
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


def why_not() -> str:
    """Say why bitsandbytes, which holds weights in 4 bits, cannot be used; empty if it can.

    One that cannot be imported is hidden from PEFT, which else imports whatever is there, and fails.
    """
    if "bitsandbytes" in sys.modules and sys.modules["bitsandbytes"] is None:  # pyright: ignore[reportUnnecessaryComparison]
        return "cannot be imported"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "is not installed"
    try:
        importlib.import_module("bitsandbytes.functional")
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ) as error:  # of a library that does not load, or another torch
        sys.modules["bitsandbytes"] = None  # pyright: ignore[reportArgumentType]
        return f"cannot be imported: {' '.join(str(error).split())[:200]}"
    from transformers.utils.import_utils import is_bitsandbytes_available

    return "" if is_bitsandbytes_available() else "is too old for transformers"


@dataclass(frozen=True, kw_only=True, slots=True)
class AsTrained:
    """What a model that was trained on weights of 4 bits predicts: logits (T, V), float32, of each of ``sequences``."""

    rounding: Rounding
    sequences: list[list[int]]
    logits: list[Any]


def ask_as_trained(
    base: str,
    adapter: Path,
    conversations: Sequence[Sequence[Message]],
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
) -> AsTrained:
    """Load the base model in 4 bits with the adapter beside its weights, and ask it as in training."""
    from backprop.engine.batches import computing
    from backprop.engine.merge import adapted_tokenizer, wrap
    from backprop.engine.reference import logits, rendered_ids, to_compare

    whole: Any = load_base(base, dtype=dtype, device=device, four_bit=True, trust_remote_code=trust_remote_code)
    held = [f"{name}.weight" for name, module in whole.named_modules() if type(module).__name__ == "Linear4bit"]
    tokenizer = adapted_tokenizer(adapter, trust_remote_code=trust_remote_code)
    vocabulary = int(whole.config.get_text_config().vocab_size)
    sequences = to_compare(rendered_ids(tokenizer, conversations), vocabulary=vocabulary)
    model = wrap(whole, adapter, of=base).eval()
    with computing(model, dtype):
        found = [logits(model, one) for one in sequences]
    return AsTrained(rounding=Rounding(weights=frozenset(held), dtype=dtype), sequences=sequences, logits=found)


def ask_both_bases(
    base: str, adapter: Path, trained: AsTrained, *, dtype: str, device: str, trust_remote_code: bool = False
) -> tuple[list[Any], list[Any]]:
    """Give the logits of the adapter on the base as it was trained on, and on the 16-bit original."""
    from backprop.engine.merge import load_adapted
    from backprop.engine.reference import logits

    model = load_adapted(base, adapter, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    original = [logits(model, one) for one in trained.sequences]
    trained.rounding.apply_to(model.get_base_model())
    return [logits(model, one) for one in trained.sequences], original
