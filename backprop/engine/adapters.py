"""LoRA layers that compute what PEFT's do, in fewer and narrower steps.

Torch is imported at the top since these are classes of PEFT's; only `load` imports this, when it adds an adapter.
"""

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora

if TYPE_CHECKING:
    Mixin = lora.Linear
else:
    Mixin = object


class _Narrow(Mixin):
    """Scales what is as narrow as the rank.

    PEFT scales what is as wide as the layer, and copies the input into the adapter's precision or the output of a 4-bit
    layer: each is written once more, and kept for the way back.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        narrow = self.lora_A["default"](self.lora_dropout["default"](x)) * self.scaling["default"]
        return self.base_layer(x) + self.lora_B["default"](narrow)


class _Linear(_Narrow, lora.Linear):
    pass


NARROW: dict[type, type] = {lora.Linear: _Linear}
_four_bit: Any = getattr(lora, "Linear4bit", None)
if _four_bit is not None:  # where bitsandbytes is
    NARROW[_four_bit] = type("_Linear4bit", (_Narrow, _four_bit), {})


def narrow(model: Any) -> None:
    """Let every plain LoRA layer of ``model`` compute this way; DoRA's and those of other modules stay as they are."""
    for module in model.modules():
        if type(module) in NARROW and isinstance(module.base_layer, torch.nn.Linear) and not module.lora_variant:
            assert module.active_adapters == list(module.lora_A) == ["default"]
            # Its class and not its own `forward`, by which a compiler would tell every layer from the others.
            module.__class__ = NARROW[type(module)]
