"""Base model and adapter, ready to train."""

import json
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from backprop.config import TrainConfig
from backprop.core.data.formats import Message
from backprop.core.data.render import Token, strftime_now
from backprop.core.memory import NORMED_AFTER, NORMED_HEADS, ModelShape
from backprop.core.plan import Plan
from backprop.engine import templates
from backprop.engine.attention import kernels_ahead
from backprop.engine.widths import attention_widths, experts, widest
from backprop.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HfTokenizer:
    """A transformers tokenizer behind the `ChatTokenizer` protocol."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.inner = tokenizer
        self.template_added = False
        added = cast(Mapping[int, Any], tokenizer.added_tokens_decoder)
        self._special = {number for number, token in added.items() if token.special}

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, object]] = (), add_generation_prompt: bool
    ) -> str:
        """Apply the chat template.

        Raises:
            DataError: If the template refuses these turns.
            ModelError: If it takes too long, or makes too much of them.
        """
        from jinja2 import TemplateError

        template: Any = self.inner
        try:
            with templates.limited():
                text = template.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    strftime_now=strftime_now,
                )
            return templates.hold(str(text))
        except (
            *(TemplateError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError, RecursionError),
        ) as error:
            raise DataError(
                f"this model's chat template refuses a conversation: {error}; turns: "
                f"{', '.join(message['role'] for message in messages)}",
                hint="mend the order of the turns, or choose another model",
            ) from error

    def tokenize(self, text: str) -> list[Token]:
        """Tokenise a rendered text as it is, adding nothing."""
        whole: Any = self.inner
        found = whole(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens: list[Token] = []
        previous_end = 0
        for id, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            # Some tokenizers leave white space out of their offsets; it belongs to the token that follows.
            tokens.append(Token(id, min(start, previous_end)))
            previous_end = end
        return tokens

    def encode_text(self, text: str) -> list[int]:
        """Tokenise plain text and end it with the end-of-text token."""
        whole: Any = self.inner
        ids = cast(list[int], whole(text)["input_ids"])
        begin, end = whole.bos_token_id, whole.eos_token_id
        if begin is not None and begin != end and ids[:2] == [begin, begin]:
            ids = ids[1:]  # the text brings its own
        return ids if ids and ids[-1] == end else [*ids, end]

    def is_special(self, token: int) -> bool:
        """Say whether ``token`` is a control token."""
        return token in self._special

    def special_texts(self) -> set[str]:
        """Give the texts that become control tokens."""
        added = cast(Mapping[int, Any], self.inner.added_tokens_decoder)
        return {str(token.content) for token in added.values() if token.special}


IN_NO_VOCABULARY = "\U0010ffff"


def load_tokenizer(path: str, *, trust_remote_code: bool) -> HfTokenizer:
    """Load a model's tokenizer.

    Raises:
        ModelError: If it cannot be, or has no chat template.
    """
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer(IN_NO_VOCABULARY)
    except BaseException as error:
        # The library for tokenizers tells of damaged files by bare exceptions, or by a panic, which is none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"the tokenizer of `{path}` cannot be loaded: {error}", hint=_code_hint(error)) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of `{path}` cannot say where its tokens stand in the text, so that no mask can be made",
            hint="convert it to a tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of `{path}` has no end-of-text token, so that no answer could stop",
            hint="name one as `eos_token` in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    wrapped = HfTokenizer(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = templates.plain(begins=tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
        wrapped.template_added = True
    templates.check(tokenizer.chat_template)
    return wrapped


def load_shape(path: str, *, trust_remote_code: bool) -> ModelShape:
    """Read a model's dimensions from its configuration, without its weights.

    Raises:
        ModelError: If its architecture is not known.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    loader: Any = AutoConfig
    try:
        config = loader.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        told = " ".join(str(error).split())[:300]
        raise ModelError(f"`{path}` is of an unsupported architecture: {told}", hint=_code_hint(error)) from error
    try:
        return ModelShape(
            hidden_size=int(config.hidden_size),
            # Older architectures name none: it is four times the width there.
            intermediate_size=widest(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
            num_layers=int(config.num_hidden_layers),
            max_positions=int(config.max_position_embeddings),
            vocabulary=int(config.vocab_size),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            plain_logits=all(getattr(config, name, None) in (None, 1) for name in CHANGES_LOGITS),
            num_norms=4 if config.model_type in NORMED_AFTER else 2,
            head_norms=config.model_type in NORMED_HEADS,
            family=str(config.model_type),
            **attention_widths(config),
            **experts(config),
        )
    except AttributeError as error:
        raise ModelError(
            f"`{path}` is of an unsupported architecture: its configuration has no {error.name}",
            hint="choose a model with attention and positions, such as a preset",
        ) from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"`{path}` has a configuration that cannot be: {error}", hint="fetch it again") from error


CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""How configurations say that logits are scaled or capped."""


def _code_hint(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "it brings its own Python code: read it, then add `--trust-remote-code`"
    return "check the folder, or choose a preset: `backprop doctor`"


def load_base(
    path: str, *, dtype: str, device: str, four_bit: bool = False, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """Load the base model's weights, from safetensors only.

    Raises:
        ModelError: If the weights do not fit the configuration or are damaged.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from backprop.engine import unsloth_engine

    unsloth_engine.undo()
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if four_bit:
        options["quantization_config"] = _nf4(options["dtype"])
    loader: Any = AutoModelForCausalLM
    try:
        model = loader.from_pretrained(path, use_safetensors=True, device_map={"": device}, **options)
    except SafetensorError as error:
        raise ModelError(f"the weights in `{path}` are damaged: {error}", hint="fetch them again") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the model in `{path}` cannot be loaded: {error}", hint=_code_hint(error)) from error
    return cast("PreTrainedModel", model)


def _nf4(dtype: "torch.dtype") -> object:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def load_model(path: str, config: TrainConfig, plan: Plan) -> Any:
    """Load the base model with a fresh adapter.

    Raises:
        ModelError: If the weights cannot be loaded, or `--target-modules` names no layer of this model.
    """
    if plan.engine.value == "unsloth":
        from backprop.engine import unsloth_engine

        return unsloth_engine.load_model(path, config, plan)
    with kernels_ahead(plan.device.value, plan.dtype.value):
        base = load_base(
            path,
            dtype=plan.dtype.value,
            device=plan.device.value,
            four_bit=config.method == "qlora",
            trust_remote_code=config.trust_remote_code,
        )
    if config.method == "qlora":
        from backprop.engine import nf4

        (nf4.hold_in_16_bits if plan.dequantize.value else nf4.unpack_within_compiled_code)(base)
    model = add_adapter(base, config, plan)
    if plan.fp8_backward.value:
        from backprop.engine import fp8

        fp8.prepare(model)
    return model


def add_adapter(base: "PreTrainedModel", config: TrainConfig, plan: Plan) -> Any:
    """Wrap the base model with a fresh adapter, or with a copy of all its weights, in float32: small steps are not lost.

    Raises:
        ModelError: If `--target-modules` names no layer of this model.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from backprop.engine.adapters import narrow

    _check_targets(base, config.target_modules)
    set_seed(config.seed)
    model: Any = base
    if config.method == "full":
        whole: Any = get_peft_model(model, _every_weight(model))
        for weight in whole.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
        return whole
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=cast(int, plan.lora_alpha.value),
        lora_dropout=config.lora_dropout,
        use_dora=config.method == "dora",
        use_rslora=config.rslora,
        init_lora_weights=cast(Any, PISSA if config.pissa else True),
        target_modules=list(config.target_modules) or "all-linear",
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, lora)
    if plan.engine.value == "torch":
        narrow(adapted)
    if config.method == "qlora":
        as_trl_trains(adapted)
    if config.pissa:
        setattr(adapted, START, adapter_state(adapted))
    return adapted


def as_trl_trains(model: Any) -> None:
    """Hold the adapter of a 4-bit model in bfloat16 (arXiv:2305.14314, section 3), as trl's trainer would later."""
    import torch

    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16) if weight.requires_grad else weight.data


# Singular vectors by 16 rounds of subspace iteration, as PEFT's documentation advises (arXiv:2404.02948).
PISSA = "pissa_niter_16"
START = "backprop_start"
"""Where a model keeps the adapter that PiSSA took out of its weights."""


def start_of(model: Any) -> Mapping[str, "torch.Tensor"]:
    """Give the adapter that the base model needs to be itself, under PEFT's names; empty if it is whole without."""
    return cast(Mapping[str, "torch.Tensor"], getattr(model, START, {}))


@contextmanager
def as_before_training(model: Any) -> Generator[None]:
    """Let ``model`` be what it was before training, for the length of the block."""
    start = start_of(model)
    if not start:
        with model.disable_adapter():
            yield
        return
    trained = adapter_state(model)
    set_adapter_state(model, start)
    try:
        yield
    finally:
        set_adapter_state(model, trained)


def _every_weight(base: "PreTrainedModel") -> Any:
    """Let PEFT train a copy of every module that has weights of its own.

    The base stays beside it, so that a run can be compared with it, and what is delivered is loaded, merged and proved
    as any adapter is.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    inside = {name: module for name, module in base.named_modules() if list(module.parameters(recurse=False))}
    shared = _has_shared_output(base)
    output: Any = base.get_output_embeddings()
    return LoraConfig(
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=[name for name, module in inside.items() if not (shared and module is output)],
        ensure_weight_tying=shared,
        task_type="CAUSAL_LM",
    )


def _has_shared_output(base: "PreTrainedModel") -> bool:
    output: Any = base.get_output_embeddings()
    return output is not None and output.weight is base.get_input_embeddings().weight


def _write_difference(model: Any, folder: Path) -> None:
    """Write an adapter of twice the rank for the whole base model: what was trained, less what it began with.

    BA - B₀A₀ is [B | -B₀] times A over A₀, at the same scale.
    """
    import torch
    from safetensors.torch import save_file

    start = start_of(model)
    parts = {
        name: torch.cat([now, start[name]], dim=0) if "lora_A" in name else torch.cat([now, -start[name]], dim=1)
        for name, now in adapter_state(model).items()
    }
    save_file(parts, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    scale = math.sqrt(2) if settings["use_rslora"] else 2
    plain = {"init_lora_weights": True, "r": 2 * settings["r"], "lora_alpha": scale * settings["lora_alpha"]}
    path.write_text(json.dumps({**settings, **plain}, indent=2), encoding="utf-8")


def _check_targets(base: "PreTrainedModel", targets: Sequence[str]) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    layers = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    output: Any = base.get_output_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, module in layers.items() if module is not output}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers if layers[name] is not output):
            raise ModelError(
                f"`--target-modules {target}` fits no linear layer of this model but its output",
                hint=f"they are named: {', '.join(sorted(names))}",
            )


def adapter_state(model: Any) -> dict[str, "torch.Tensor"]:
    """Copy the adapter's tensors to main memory, under the names PEFT saves them with."""
    from peft import get_peft_model_state_dict

    state = cast(dict[str, Any], get_peft_model_state_dict(model, save_embedding_layers=False))
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def read_adapter(folder: Path) -> dict[str, "torch.Tensor"]:
    """Read the tensors of a saved adapter, under the names that `adapter_state` gives."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def set_adapter_state(model: Any, state: Mapping[str, "torch.Tensor"]) -> None:
    """Put tensors into the adapter; every one must have its place."""
    from peft import set_peft_model_state_dict

    result: Any = set_peft_model_state_dict(model, dict(state))
    missing = [key for key in result.missing_keys if "lora_" in key or ".modules_to_save." in key]
    assert not missing, f"adapter tensors without a value: {missing[:3]}"
    assert not result.unexpected_keys, f"tensors without a place: {result.unexpected_keys[:3]}"


QUANTIZED = "The following `bitsandbytes` quantization config was used during training:"
"""As PEFT has it (`PeftModel.create_or_update_model_card`)."""


def name_base(model: Any, name: str, revision: str | None) -> None:
    """Let the adapter's configuration name its base model so that others find it too, at the commit that it was trained on."""
    model.peft_config["default"].base_model_name_or_path = name
    model.peft_config["default"].revision = revision


def save_adapter(model: Any, tokenizer: HfTokenizer, folder: Path) -> None:
    """Write the adapter, the tokenizer and its chat template; plain PEFT loads the folder."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if start_of(model):
        _write_difference(model, folder)
    # safetensors writes files that only their owner can read; the rest of the folder follows the user's umask.
    (folder / "adapter_model.safetensors").chmod((folder / "adapter_config.json").stat().st_mode)
    quantized: Mapping[str, object] = model.get_base_model().config.to_dict().get("quantization_config") or {}
    if quantized:  # PEFT means to write this itself, and does not
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n\n{QUANTIZED}\n" + "".join(f"- {name}: {value}\n" for name, value in quantized.items()))
    whole: Any = tokenizer.inner
    whole.save_pretrained(str(folder))
