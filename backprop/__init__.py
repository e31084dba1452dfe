"""Fine-tune language models on the GPU you have, and hand over a model that runs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backprop.api import Trainer
    from backprop.errors import BackpropError

__version__ = "0.1.0"
__all__ = ["BackpropError", "Trainer", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Trainer":
        from backprop.api import Trainer

        return Trainer
    if name == "BackpropError":
        from backprop.errors import BackpropError

        return BackpropError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
