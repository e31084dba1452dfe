"""Adapter into base."""

from pathlib import Path
from typing import Any, cast

from backprop.engine.load import HfTokenizer, load_base, load_tokenizer
from backprop.errors import ExportError, ModelError


def merge(base: str, adapter: Path, folder: Path, *, dtype: str = "float32", trust_remote_code: bool = False) -> None:
    """Write the base model with the adapter merged in, and its tokenizer, to ``folder``.

    Raises:
        ModelError: If the base cannot be loaded.
        ExportError: If the adapter does not belong to it, or changes nothing.
    """
    model, tokenizer = load_adapted(base, adapter, trust_remote_code=trust_remote_code)
    write_merged(model, tokenizer, folder, dtype=dtype)


def load_adapted(base: str, adapter: Path, *, trust_remote_code: bool = False) -> tuple[Any, HfTokenizer]:
    """Load the base model in float32 with the adapter beside its weights, and the adapter's tokenizer.

    Raises:
        ModelError: If the base cannot be loaded.
        ExportError: If the adapter does not belong to it, or changes nothing.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    model = load_base(base, dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
    try:
        wrapped: Any = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise ExportError(
            f"the adapter in `{adapter}` does not fit `{base}`: {str(error)[:300]}", hint="give the run it came from"
        ) from error
    _check_keys(wrapped, adapter, base)
    if not any(bool(value.any()) for name, value in wrapped.named_parameters() if "lora_B" in name):
        raise ExportError(f"the adapter in `{adapter}` is all zero: nothing was learnt", hint="train it first")
    try:
        tokenizer = load_tokenizer(str(adapter), trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ExportError(
            f"`{adapter}` has no tokenizer that can be loaded: {error.message[:200]}",
            hint="copy the base model's beside it",
        ) from error
    return wrapped.eval(), tokenizer


def write_merged(wrapped: Any, tokenizer: HfTokenizer, folder: Path, *, dtype: str = "float32") -> None:
    """Write the model with its adapter merged in; ``wrapped`` is used up.

    The product is computed in float32 and stored as ``dtype``: merging in 16 bits would round the adapter away.
    """
    import torch

    merged: Any = wrapped.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    merged.save_pretrained(str(folder))
    whole: Any = tokenizer.inner
    whole.save_pretrained(str(folder))


def _check_keys(wrapped: Any, adapter: Path, base: str) -> None:
    """Refuse an adapter with tensors for layers that the model has not, or without for layers that it has.

    PEFT only warns of these, and merges the rest.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        found = set(cast(list[str], file.keys()))
    wanted = set(cast(dict[str, Any], get_peft_model_state_dict(wrapped, save_embedding_layers=False)))
    if found != wanted:
        odd = sorted(found ^ wanted)
        raise ExportError(
            f"the adapter in `{adapter}` does not fit `{base}`: {len(odd)} tensors have no counterpart, first {odd[0]}",
            hint="give the run it came from",
        )


def ask(folder: Path, question: str, *, trust_remote_code: bool = False, max_tokens: int = 64) -> str:
    """Load a checkpoint again, as anyone would, and give its greedy answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer
    tokenizer = tokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(
        str(folder), dtype="float32", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0]
    return str(tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
