"""Adapter into base."""

from pathlib import Path
from typing import Any, cast

from backprop.engine import four_bit
from backprop.engine.four_bit import Rounding
from backprop.engine.load import HfTokenizer, load_base, load_tokenizer
from backprop.errors import ExportError, ModelError

WEIGHTS = "adapter_model.safetensors"
OF_PEFT = "base_model.model."
"""What PEFT puts before the names of the base's modules."""
WORDS = ("embed_tokens.weight", "lm_head.weight")
"""The largest weights of a model with many tokens."""
TRAINED = ("lora_B", "lora_embedding_A", ".modules_to_save.")
"""In names of what is zero, or the base's own, until something is learnt."""


def merge(
    base: str,
    adapter: Path,
    tokenizer: HfTokenizer,
    folder: Path,
    *,
    dtype: str = "float32",
    rounding: Rounding | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the base model with the adapter merged in, and the adapter's tokenizer, to ``folder``.

    Args:
        rounding: Of the base model's weights, before the adapter is added.

    Raises:
        ModelError: If the base cannot be loaded.
        ExportError: If the adapter does not belong to it, or changes nothing.
    """
    model = load_adapted(base, adapter, rounding=rounding, trust_remote_code=trust_remote_code)
    write_merged(model, tokenizer, folder, dtype=dtype)


def load_adapted(
    base: str,
    adapter: Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    rounding: Rounding | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load the base model with the adapter beside its weights. It computes in float32.

    Args:
        dtype: In which the weights are held.
        rounding: Of the base model's weights.

    Raises:
        ModelError: If the base cannot be loaded.
        ExportError: If the adapter does not belong to it, or changes nothing.
    """
    model = load_base(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    _take_vocabulary(model, adapter)
    if rounding:
        rounding.apply_to(model)
    if dtype != "float32":
        compute_in_float32(model)
    return wrap(model, adapter, of=base).eval()


def whole_words(adapter: Path) -> dict[str, list[int]]:
    """Name the weights of words that an adapter's file holds whole, with their shapes: those that it trains so, or that came with more tokens."""
    whole = {name: shape for name, shape in shapes_of(adapter / WEIGHTS).items() if name.endswith(WORDS)}
    return {name.removeprefix(OF_PEFT): shape for name, shape in whole.items()}


def shapes_of(path: Path) -> dict[str, list[int]]:
    """Give the shapes of the tensors in a safetensors file, by their names.

    Raises:
        ExportError: If it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ExportError(f"`{path}` is damaged: {error}", hint="bring back a whole one") from error


def _take_vocabulary(model: Any, adapter: Path) -> None:
    """Make room for the tokens that an adapter adds; PEFT loads what stands there."""
    for name, shape in whole_words(adapter).items():
        if name.endswith(WORDS[0]) and shape[0] != model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(shape[0], mean_resizing=False)


def compute_in_float32(model: Any) -> None:
    """Let each module have its weights in float32 while it computes, and hold them as they are at other times."""
    import torch

    def widen(module: Any, _: object) -> None:
        module.held = {name: one.data for name, one in module.named_parameters(recurse=False)}
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()

    def narrow(module: Any, *_: object) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = module.held[name]

    for module in model.modules():
        if any(one.dtype in (torch.bfloat16, torch.float16) for one in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow, always_call=True)


def wrap(model: Any, adapter: Path, *, of: str) -> Any:
    """Put the adapter beside the weights of a model.

    Raises:
        ExportError: If it does not belong to the model ``of`` that name, or changes nothing.
    """
    four_bit.why_not()  # hides one that cannot be imported: PEFT imports what is there as soon as it is imported itself
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        wrapped: Any = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise ExportError(
            f"the adapter in `{adapter}` does not fit `{of}`: {str(error)[:300]}", hint="give the run it came from"
        ) from error
    _check_keys(wrapped, adapter, of)
    added = [value for name, value in wrapped.named_parameters() if any(part in name for part in TRAINED)]
    if not any(bool(value.any()) for value in added):
        raise ExportError(f"the adapter in `{adapter}` is all zero: nothing was learnt", hint="train it first")
    return wrapped


def adapted_tokenizer(adapter: Path, *, trust_remote_code: bool = False) -> HfTokenizer:
    """Load the tokenizer that stands beside an adapter.

    Raises:
        ExportError: If there is none.
    """
    try:
        return load_tokenizer(str(adapter), trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ExportError(
            f"`{adapter}` has no tokenizer that can be loaded: {error.message[:200]}",
            hint="copy the base model's beside it",
        ) from error


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

    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        found = set(cast(list[str], file.keys()))
    wanted = set(cast(dict[str, Any], get_peft_model_state_dict(wrapped, save_embedding_layers=False)))
    found -= {f"{OF_PEFT}{name}" for name in whole_words(adapter)} - wanted
    if found != wanted:
        odd = sorted(found ^ wanted)
        raise ExportError(
            f"the adapter in `{adapter}` does not fit `{base}`: {len(odd)} tensors have no counterpart, first {odd[0]}",
            hint="give the run it came from",
        )
