"""A small random copy of a model's architecture, to rehearse on."""

from pathlib import Path
from typing import Any

from backprop.engine.load import HfTokenizer

LAYERS, HEADS = 2, 4


def write_small_copy(path: str, folder: Path, tokenizer: HfTokenizer, *, trust_remote_code: bool) -> None:
    """Write a model of the same architecture to ``folder``: two layers, four heads, random weights, the real tokenizer.

    The size of a head, the vocabulary and all that is odd about the architecture stay as they are.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    configs: Any = AutoConfig
    config: Any = configs.from_pretrained(path, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text: Any = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    smaller = {
        "num_key_value_heads": max(1, HEADS * groups // text.num_attention_heads),
        "num_attention_heads": HEADS,
        "hidden_size": HEADS * head_size,
        "intermediate_size": 2 * HEADS * head_size,
        "num_hidden_layers": LAYERS,
        "layer_types": _some_of_each(getattr(text, "layer_types", None) or []),
    }
    for name, value in smaller.items():
        if getattr(text, name, None):
            setattr(text, name, value)
    models: Any = AutoModelForCausalLM
    models.from_config(config, trust_remote_code=trust_remote_code).save_pretrained(folder)
    whole: Any = tokenizer.inner
    whole.save_pretrained(folder)


def _some_of_each(layer_types: list[str]) -> list[str]:
    """Choose two layers, of different kinds if there are several."""
    kinds = list(dict.fromkeys(layer_types))
    return (kinds + layer_types)[:LAYERS]
