"""The part of the double that patches a model which has its adapter."""

from typing import Any

from peft import PeftModelForCausalLM

PATCHED: set[int] = set()


def patched(base: Any) -> bool:
    """Say whether a base model has been patched with its adapter."""
    return id(base) in PATCHED


def restore_transformers_family(model_types: tuple[str, ...]) -> None:
    """Leave other models as they are: this double has changed none."""
    assert "llama" in model_types


class FastLlamaModel:
    """What patches an adapter's layers."""

    @staticmethod
    def patch_peft_model(model: Any, use_gradient_checkpointing: bool) -> Any:
        """Hold trained weights in float32, as the real one does."""
        assert isinstance(model, PeftModelForCausalLM)
        assert not use_gradient_checkpointing
        assert all(type(module).__module__ != "backprop.engine.adapters" for module in model.modules())
        for weight in model.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
        PATCHED.add(id(model.get_base_model()))
        return model
