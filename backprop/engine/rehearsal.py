"""A small random copy of a model's architecture, to rehearse on."""

import shutil
from pathlib import Path
from typing import Any

from backprop.engine.load import HfTokenizer
from backprop.errors import ModelError

LAYERS, HEADS = 2, 4
# Vocabularies have up to 262,144 tokens, each as wide as the copy: wide heads are fewer, so that all stays under 2 GB.
WIDTH = 256
# What an architecture raises whose dimensions do not go together.
MISFITS = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    ImportError,
)


def write_small_copy(path: str, folder: Path, tokenizer: HfTokenizer, *, trust_remote_code: bool) -> None:
    """Write a model of the same architecture to ``folder``: two layers, up to four heads, random weights, the real tokenizer.

    The size of a head, the vocabulary and all that is odd about the architecture stay as they are.

    Raises:
        ModelError: If this architecture cannot be made small so.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    configs: Any = AutoConfig
    models: Any = AutoModelForCausalLM
    config: Any = configs.from_pretrained(path, trust_remote_code=trust_remote_code)
    try:
        _shrink(config)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = models.from_config(config, trust_remote_code=trust_remote_code)
            model(torch.tensor([[0, 1, 2]]))
        model.save_pretrained(folder)
    except (*MISFITS, StrictDataclassError) as error:
        raise ModelError(
            f"no small copy of this architecture can be made: {' '.join(str(error).split())[:200]}",
            hint="leave out `--rehearse`",
        ) from error
    whole: Any = tokenizer.inner
    whole.save_pretrained(folder)
    pieces = Path(path) / "tokenizer.model"
    if pieces.is_file():
        shutil.copyfile(pieces, folder / pieces.name)


def _shrink(config: Any) -> None:
    text: Any = config.get_text_config()
    for one in (config, text):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    heads = max(1, min(HEADS, WIDTH // head_size))
    smaller = {
        "num_key_value_heads": max(1, heads * groups // text.num_attention_heads),
        "num_attention_heads": heads,
        "hidden_size": heads * head_size,
        "intermediate_size": 2 * heads * head_size,
        "num_hidden_layers": LAYERS,
        "layer_types": _some_of_each(getattr(text, "layer_types", None) or []),
    }
    for name, value in smaller.items():
        if getattr(text, name, None):
            setattr(text, name, value)


def _some_of_each(layer_types: list[str]) -> list[str]:
    """Choose two layers, of different kinds if there are several."""
    kinds = list(dict.fromkeys(layer_types))
    return (kinds + layer_types)[:LAYERS]
