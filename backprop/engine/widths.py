"""How wide the layers are that get an adapter, known before any weights are loaded."""

from typing import Any

from backprop.config import TrainConfig


def narrowest_layer(path: str, config: TrainConfig) -> tuple[str, int] | None:
    """Give the name and the width (of what goes in) of the narrowest layer that gets an adapter.

    Returns:
        None if `--target-modules` names no layer, no such model is known, or it needs a package: `load_model` says so.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    code, targets = config.trust_remote_code, config.target_modules
    loader: Any = AutoModelForCausalLM
    settings: Any = AutoConfig.from_pretrained(path, trust_remote_code=code)  # a folder # nosec B615
    try:
        with torch.device("meta"):
            base = loader.from_config(settings, trust_remote_code=code)
    except (ValueError, ImportError):
        return None
    widths: dict[str, int] = {}
    for name, layer in base.named_modules():
        wanted = not targets or any(name == target or name.endswith(f".{target}") for target in targets)
        if layer is not base.get_output_embeddings() and wanted and isinstance(layer, torch.nn.Linear | Conv1D):
            widths[name] = layer.in_features if isinstance(layer, torch.nn.Linear) else int(layer.weight.shape[0])
    return min(widths.items(), key=lambda one: one[1], default=None)
