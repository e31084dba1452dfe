"""A strict double of what backprop asks of unsloth, for a CPU: as rude as the real one where that is to be withstood.

On import it prints, warns, logs, writes where it was told to (or into the working directory), and breaks trl's and
transformers' trainers, which the real one rewrites. Its model knows documents by `packed_seq_lengths` alone, never gives
logits at chosen positions, and forgets what is to be computed again when it writes an answer.
"""

import logging
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import trl.trainer.sft_trainer
from peft import PeftModelForCausalLM
from transformers import AutoModelForCausalLM, Trainer

from backprop.engine.attention import Documents

from .models.llama import patched

assert os.environ.get("UNSLOTH_DISABLE_STATISTICS") == "1", "it would report home"
if os.environ.get("UNSLOTH_DOUBLE") == "broken":
    raise ImportError("this double is broken")
print("==((====))== a banner")
print("another banner", file=sys.stderr)
warnings.warn("unsloth should be imported before transformers", stacklevel=2)
logging.getLogger("unsloth.anything").warning("a warning that nobody asked for")
Path(os.environ.get("UNSLOTH_COMPILE_LOCATION", "unsloth_compiled_cache")).mkdir(parents=True, exist_ok=True)


def _broken(*_: Any, **__: Any) -> Any:
    raise AssertionError("a trainer was left as unsloth rewrites it")


Trainer._inner_training_loop = _broken
Trainer.of_unsloth = True
trl.trainer.sft_trainer.SFTTrainer.__init__ = _broken
trl.trainer.sft_trainer.SFTTrainer = _broken
PeftModelForCausalLM.forward = _broken


class FastLanguageModel:
    """What backprop loads models through."""

    @staticmethod
    def from_pretrained(
        path: str,
        *,
        max_seq_length: int,
        dtype: torch.dtype,
        load_in_4bit: bool,
        device_map: dict[str, str],
        use_gradient_checkpointing: bool,
        use_exact_model_name: bool,
        offload_embedding: bool,
        fix_tokenizer: bool,
        local_files_only: bool,
        token: bool,
    ) -> tuple[Any, None]:
        """Load a model, and print."""
        print("a banner for each model")
        if "UNSLOTH_DOUBLE_LOADS" in os.environ:
            with open(os.environ["UNSLOTH_DOUBLE_LOADS"], "a", encoding="utf-8") as file:
                file.write("a model\n")
        assert not load_in_4bit
        assert use_exact_model_name
        assert local_files_only
        assert token is False, "it would log in"
        assert not any((offload_embedding, fix_tokenizer, use_gradient_checkpointing))
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map)
        assert max_seq_length == loaded.config.max_position_embeddings, "longer rows would be cut"
        transformers.logging.set_verbosity_info()
        _know_packed_rows(loaded.model)
        _give_all_logits(loaded)
        plain = loaded.generate

        def generate(*arguments: Any, **named: Any) -> Any:
            for module in loaded.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False
            return plain(*arguments, **named)

        loaded.generate = generate
        return loaded, None


def _know_packed_rows(decoder: Any) -> None:
    plain = type(decoder).forward

    def forward(self: Any, *arguments: Any, packed_seq_lengths: Any = None, **named: Any) -> Any:
        assert "documents" not in named, "unsloth does not know them under this name"
        print("a layer says something")
        if packed_seq_lengths is not None:
            assert packed_seq_lengths.dtype == torch.int32
            off = int(os.environ.get("UNSLOTH_DOUBLE_LEAKS", "0"))
            lengths = packed_seq_lengths.tolist()
            named["documents"] = Documents.of([sum(lengths)] if off else lengths)
        return plain(self, *arguments, **named)

    decoder.forward = types.MethodType(forward, decoder)


def _give_all_logits(loaded: Any) -> None:
    plain = type(loaded).forward

    def forward(self: Any, *arguments: Any, logits_to_keep: Any = 0, **named: Any) -> Any:
        assert patched(self), "the adapter was not patched"
        return plain(self, *arguments, logits_to_keep=0 if torch.is_tensor(logits_to_keep) else logits_to_keep, **named)

    loaded.forward = types.MethodType(forward, loaded)
