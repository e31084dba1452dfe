"""LoRA layers that compute what PEFT's do, in fewer and narrower steps.

Torch is imported at the top since these are classes of PEFT's; only `load` imports this, when it adds an adapter.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora

if TYPE_CHECKING:
    Mixin = lora.Linear
else:
    Mixin = object

BESIDE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read the same: transformers' names for them."""


class _Together:
    """The products with A of layers that read the same, as one: seven of a Llama's layer become four.

    The first of them that comes computes those of all, and each takes its own, the last of which clears the place.
    """

    def __init__(self, members: list[Any]) -> None:
        self._members = members
        self._of: torch.Tensor | None = None
        self._found: dict[int, torch.Tensor] = {}

    def product(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """Give the product of ``x`` with the A of the layer at ``place``."""
        if self._of is not x or place not in self._found:
            weights = [member.lora_A["default"].weight for member in self._members]
            product = torch.nn.functional.linear(x, torch.cat(weights))
            self._of = x
            self._found = dict(enumerate(product.split([len(weight) for weight in weights], dim=-1)))
        mine = self._found.pop(place)
        if not self._found:
            self._of = None
        return mine

    def forget(self) -> None:
        """Drop what nobody has taken, which holds all that the layers before have kept for the way back."""
        self._of, self._found = None, {}


class _Narrow(Mixin):
    """Scales what is as narrow as the rank.

    PEFT scales what is as wide as the layer, and copies the input into the adapter's precision or the output of a 4-bit
    layer: each is written once more, and kept for the way back.
    """

    together: _Together | None = None
    place: int

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if self.together is None:
            product = self.lora_A["default"](self.lora_dropout["default"](x))
        else:
            product = self.together.product(x, self.place)
        return self.base_layer(x) + self.lora_B["default"](product * self.scaling["default"])


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
    for members in _reading_the_same(model):
        together = _Together(members)
        for place, member in enumerate(members):
            member.together, member.place = together, place


def forget(model: Any) -> None:
    """Drop what layers computed for others that never came, as where the memory was full in between."""
    for module in model.modules():
        if isinstance(module, _Narrow) and module.together is not None:
            module.together.forget()


def _reading_the_same(model: Any) -> Iterator[list[Any]]:
    """Give the narrow layers whose products can be one, those that drop inputs apart: each drops its own."""
    for module in model.modules():
        for names in BESIDE:
            found: list[Any] = [getattr(module, name, None) for name in names]
            if all(
                isinstance(one, _Narrow)
                and isinstance(one.lora_dropout["default"], torch.nn.Identity)
                and one.in_features == found[0].in_features
                for one in found
            ):
                yield found
