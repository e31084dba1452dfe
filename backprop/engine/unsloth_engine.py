"""The optional other engine: a base model and its adapter with unsloth's kernels, behind the function that `load` offers.

Our loop, packing, loss, proofs and checkpoints work on it as on any model. unsloth rewrites trainers and prints when it is
imported: the trainers are put back, and it is kept silent. It must not be imported but here.
"""

import contextlib
import functools
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Generator
from typing import Any

from backprop.config import TrainConfig
from backprop.core.engines import FAMILIES
from backprop.core.plan import Plan
from backprop.edges.places import cache_dir
from backprop.engine import layers
from backprop.engine.load import add_adapter, as_trl_trains
from backprop.errors import ModelError

PACKAGES = ("unsloth", "unsloth_zoo")
"""And what they write into their cache, whose names begin with the first."""
NOT_COMPILED = ("UNSLOTH_BLOCK_COMPILE", "UNSLOTH_BLOCK_COMPILE_LEGACY")
"""By these unsloth compiles no layers; rows of several documents it never compiles."""


def load_model(path: str, config: TrainConfig, plan: Plan) -> Any:
    """Load the base model with a fresh adapter, the same as `load.load_model` gives for the same seed.

    Raises:
        ModelError: If unsloth cannot load it.
    """
    import torch

    _prepare_environment(compiled=plan.compile.value)
    with _trainers_kept(), _silent():
        try:
            from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]
            from unsloth.models.llama import FastLlamaModel  # pyright: ignore[reportMissingImports]

            base, _ = FastLanguageModel.from_pretrained(
                path,
                max_seq_length=_positions(path),  # what is longer it would cut
                dtype=getattr(torch, plan.dtype.value),
                load_in_4bit=config.method == "qlora",
                device_map={"": plan.device.value},
                use_gradient_checkpointing=False,  # `layers` sees to it
                use_exact_model_name=True,
                offload_embedding=False,
                fix_tokenizer=False,  # ours is another
                local_files_only=True,
                token=False,  # it would log in with one, and write it down
            )
            words = int(base.get_input_embeddings().weight.shape[0])
            if words != base.config.vocab_size:
                raise ModelError(
                    f"unsloth gives `{path}` {words} words instead of {base.config.vocab_size}", hint="--engine torch"
                )
            model = add_adapter(base, config, plan)
            patcher: Any = FastLlamaModel
            patcher.patch_peft_model(model, use_gradient_checkpointing=False)
        except (ImportError, OSError, ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            told = " ".join(str(error).split())[:300]
            raise ModelError(f"unsloth cannot load `{path}`: {told}", hint="add `--engine torch`") from error
    _stay_silent()
    if config.method == "qlora":
        as_trl_trains(model)
    _take_our_passes(base)
    _leave_no_trace_of_answering(base)
    return model


def undo() -> None:
    """Let models that are loaded from here on be as transformers makes them, if unsloth was at work in this process.

    Those that it has loaded are of no use afterwards.
    """
    patcher: Any = sys.modules.get("unsloth.models.llama")
    if patcher is not None:
        patcher.restore_transformers_family(FAMILIES)


def _prepare_environment(*, compiled: bool) -> None:
    """Say before the import where things are kept, and what is compiled."""
    layers.keep_compiled_code()
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth"))
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    for name in NOT_COMPILED:
        if compiled:
            os.environ.pop(name, None)
        else:
            os.environ[name] = "0"


def _positions(path: str) -> int:
    from transformers import AutoConfig

    loader: Any = AutoConfig
    return int(loader.from_pretrained(path).max_position_embeddings)  # a folder # nosec B615


@contextlib.contextmanager
def _trainers_kept() -> Generator[None]:
    """Let the classes and modules that our trainer stands on be afterwards what they were, and PEFT's model too."""
    from peft import PeftModelForCausalLM

    from backprop.engine.trainer import StepTrainer

    trainers = [one for one in StepTrainer.__mro__[1:] if one is not object]
    modules = {one.__module__: importlib.import_module(one.__module__) for one in trainers}
    before = [(place, dict(vars(place))) for place in (*trainers, *modules.values(), PeftModelForCausalLM)]
    try:
        yield
    finally:
        for place, held in before:
            for name in {*held, *vars(place)}:
                if name not in held:
                    delattr(place, name)
                elif vars(place).get(name) is not held[name]:
                    setattr(place, name, held[name])


@contextlib.contextmanager
def _silent() -> Generator[None]:
    """Keep from the terminal what is printed, warned of and logged in the block."""
    heard = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        warnings.simplefilter("ignore")
        yield


def _stay_silent() -> None:
    """Let unsloth's modules print nothing later, as they do when a layer is not compiled; errors are raised all the same."""
    from backprop.engine import loop

    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGES):
            vars(module)["print"] = _print_nothing
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name)
    loop.quieten()  # it has raised what transformers may tell


def _print_nothing(*_: object, **__: object) -> None:
    pass


def _take_our_passes(base: Any) -> None:
    """Let ``base`` take passes of several documents, and give logits at the positions that are asked for alone."""
    import torch
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fast = base.forward

    @functools.wraps(fast)
    def forward(*arguments: Any, documents: Any = None, logits_to_keep: Any = 0, **named: Any) -> Any:
        if documents is None and not torch.is_tensor(logits_to_keep):
            return fast(*arguments, logits_to_keep=logits_to_keep, **named)
        assert not arguments
        given = {name: named.get(name) for name in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")}
        if documents is not None:  # one tensor for all layers: by its identity they know what they have made of it
            given["packed_seq_lengths"] = torch.tensor(documents.lengths, dtype=torch.int32)
        base.model._has_no_labels = False  # else it looks at how rows are padded, and waits for the GPU
        hidden = base.model(**given, use_cache=False, return_dict=True).last_hidden_state
        kept = hidden[:, logits_to_keep] if torch.is_tensor(logits_to_keep) else hidden
        return CausalLMOutputWithPast(logits=base.lm_head(kept))

    base.forward = forward


def _leave_no_trace_of_answering(base: Any) -> None:
    """Let writing answers leave as it was what is computed again on the way back; unsloth switches that off."""
    fast = base.generate

    @functools.wraps(fast)
    def generate(*arguments: Any, **named: Any) -> Any:
        flags = [(one, one.gradient_checkpointing) for one in base.modules() if "gradient_checkpointing" in vars(one)]
        try:
            return fast(*arguments, **named)
        finally:
            for module, flag in flags:
                module.gradient_checkpointing = flag

    base.generate = generate
