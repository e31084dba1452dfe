"""LoRA that is two float32 matrices beside each linear layer, and nothing else: read without PEFT, which takes seconds to load."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.engine.merge import OF_PEFT, WEIGHTS
from backprop.errors import ExportError

if TYPE_CHECKING:
    import torch

MUST_BE = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}
"""Settings of PEFT's configuration that must be so; of those that are neither here nor below, none may be set."""
MAY_BE_ANYTHING = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    ]
)
UNSET = ("null", "false", "[]", "{}", '""')
"""Values of PEFT's settings that set nothing; 0 is none of them, say of a layer's number."""


@dataclass(frozen=True, slots=True)
class Plain:
    """The adapter of one layer: A of shape (r, inputs), B of shape (outputs, r)."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    scaling: float

    def merged(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """Give ``weight`` with the adapter in it, in float32: PEFT's very numbers, each looked at once.

        Raises:
            ExportError: If one is not finite.
        """
        import torch

        merged = self.b @ self.a
        merged.mul_(self.scaling).add_(weight)
        if not (torch.isfinite(merged.sum()) or torch.isfinite(merged).all()):
            raise not_finite(name)
        return merged


def not_finite(name: str) -> ExportError:
    """Make the error of a weight that is no number once it is merged."""
    return ExportError(f"{name} is not finite with the adapter in it", hint="train again")


def read_plain(adapter: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Plain] | None:
    """Read an adapter by the names of the weights that it changes.

    Args:
        shapes: Of the base's weights, by their names.

    Returns:
        None if it is of another kind, or does not fit the base in every name and shape: PEFT says what it is then.
    """
    from safetensors import SafetensorError

    try:
        return _read(adapter, shapes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, SafetensorError):
        return None


def _read(adapter: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Plain] | None:
    import torch
    from safetensors.torch import load_file

    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    told = {key for key, value in config.items() if json.dumps(value) not in UNSET}
    odd = told - set(MUST_BE) - MAY_BE_ANYTHING
    targets, rank = config["target_modules"], config["r"]
    if odd or not isinstance(targets, list) or any(config[key] != value for key, value in MUST_BE.items()):
        return None
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    left, found = load_file(adapter / WEIGHTS), dict[str, Plain]()
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module == name or not any(module == target or module.endswith(f".{target}") for target in targets):
            continue
        a, b = (left.pop(f"{OF_PEFT}{module}.lora_{which}.weight") for which in "AB")
        if [*b.shape, *a.shape] != [shape[0], rank, rank, *shape[1:]] or {a.dtype, b.dtype} != {torch.float32}:
            return None
        found[name] = Plain(a, b, scaling)
    return found if not left and any(bool(one.b.any()) for one in found.values()) else None
