"""How wide the layers are, known before any weights are loaded."""

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


def experts(config: Any) -> dict[str, int]:
    """Give how many feed-forward parts a layer has and how wide each is, where there are several."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    number = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), 0)
    size = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    return {"num_experts": number, "expert_size": widest(size)} if number > 1 and size else {}


def attention_widths(config: Any) -> dict[str, int]:
    """Give the widths of all queries and of all keys, where each head has the same."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return {}
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return {"query_size": heads * size, "key_size": keys * size} if isinstance(size, int) else {}


def widest(size: Any) -> int:
    """Give the size of the widest layer; some architectures have one for each."""
    return max(map(int, size)) if isinstance(size, list | tuple) else int(size)
