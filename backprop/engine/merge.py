"""Adapter into base."""

from pathlib import Path
from typing import Any

from backprop.engine.load import load_base
from backprop.errors import ExportError


def merge(base: str, adapter: Path, folder: Path, *, dtype: str = "float32", trust_remote_code: bool = False) -> None:
    """Write the base model with the adapter merged in, and its tokenizer, to ``folder``.

    The product is computed in float32 and stored as ``dtype``: merging in 16 bits would round the adapter away.

    Raises:
        ModelError: If the base cannot be loaded.
        ExportError: If the adapter does not belong to it, or changes nothing.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    model = load_base(base, dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
    try:
        wrapped: Any = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise ExportError(
            f"the adapter in `{adapter}` does not fit `{base}`: {str(error)[:300]}", hint="give the run it came from"
        ) from error
    if not any(bool(value.any()) for name, value in wrapped.named_parameters() if "lora_B" in name):
        raise ExportError(f"the adapter in `{adapter}` is all zero: nothing was learnt", hint="train it first")
    merged: Any = wrapped.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    merged.save_pretrained(str(folder))
    tokenizer: Any = AutoTokenizer
    tokenizer.from_pretrained(str(adapter), trust_remote_code=trust_remote_code).save_pretrained(str(folder))


def ask(folder: Path, question: str, *, max_tokens: int = 64) -> str:
    """Load a checkpoint again, as anyone would, and give its greedy answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer
    tokenizer = tokenizer.from_pretrained(str(folder))
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(str(folder), dtype="float32", use_safetensors=True)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0]
    return str(tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
