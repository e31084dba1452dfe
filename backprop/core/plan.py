"""What a run will do, each choice with its reason: a pure function of config, hardware, model shape and data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from backprop.config import Optimizer, TrainConfig
from backprop.core.choice import Choice
from backprop.core.fitting import (
    STAY,
    choose_dequantize,
    choose_dtype,
    choose_optimizer,
    choose_passes,
    refuse_without_gpu,
)
from backprop.core.hardware import Hardware
from backprop.core.memory import FLOAT32, ModelShape, moments_bytes, trained_weights
from backprop.core.passes import SHARE_OFFLOADED, Passes, sides_of, waiting_bytes
from backprop.core.phases import Phases, phases_of
from backprop.errors import HardwareError, UsageError
from backprop.presets import DEFAULTS, DEMO, GIB, PRESETS, Preset


@dataclass(frozen=True, kw_only=True, slots=True)
class DataShape:
    """What the plan needs of the data."""

    num_examples: int
    num_tokens: int
    """Of all examples together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything decided before the first step."""

    model: Choice[str]
    method: Choice[str] = Choice("lora", "set by `--method`")
    engine: Choice[str] = Choice("torch", "set by `--engine`")
    """What computes a step: `torch` or `unsloth`."""
    device: Choice[str]
    gpus: Choice[int] = Choice(1, "all is done in one process")
    """How many share the passes of a step; 1 on a CPU."""
    dtype: Choice[str]
    max_length: Choice[int]
    batch_size: Choice[int]
    micro_batch: Choice[int]
    packing: Choice[bool]
    steps: Choice[int]
    eval_steps: Choice[int]
    learning_rate: Choice[float]
    optimizer: Choice[Optimizer] = Choice("adamw", "moments in 32 bits")
    dequantize: Choice[bool] = Choice(False, "no weights are in 4 bits")
    """Whether weights that were rounded to 4 bits are held in 16."""
    lora_alpha: Choice[float]
    recompute: Choice[int]
    """Layers whose activations are computed again on the way back."""
    offload: Choice[bool] = STAY
    """Whether the inputs of these layers wait for it in main memory."""
    compile: Choice[bool]
    fp8_backward: Choice[bool] = Choice(False, "in 16 bits")
    """Whether gradients go through frozen feed-forward layers in 8 bits."""
    layers_in_16_bits: tuple[int, ...] = ()
    """Of the decoder, those in which they do not, since 8 bits were not proved there."""
    to_try: tuple[Passes, ...] = ()
    """What is tried on the GPU before the first step, instead of micro_batch, recompute and offload as estimated."""
    memory: Phases | None = None
    """What each phase is estimated to need of a GPU; None without one."""
    shape: ModelShape | None = None
    """Of the model, to estimate the same of other ways; None without a GPU."""
    may_wait_bytes: int = 0
    """What the inputs of layers may take of main memory."""
    try_engines: bool = False
    """Whether the other engine is to be tried beside this one before the model is loaded."""

    @property
    def compiles_layers(self) -> bool:
        """Whether we compile the layers; the other engine does so itself."""
        return self.compile.value and self.engine.value == "torch"

    def may_wait(self, tokens: int, layers: int) -> bool:
        """Say whether main memory may hold what so many layers begin with; without a model's shape there is no GPU."""
        return self.shape is None or waiting_bytes(self.shape, tokens, layers) <= self.may_wait_bytes

    def choices(self) -> dict[str, Choice[str | int | float | bool]]:
        """Give every choice by name, in the order they are shown."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if isinstance(value, Choice)}


def choose_model(name: str | None, hardware: Hardware) -> Choice[str]:
    """Take the named model, or the largest default that fits this machine.

    Raises:
        HardwareError: If the named preset does not fit even in 4 bits.
    """
    gpu_gib = max((gpu.memory_free_bytes for gpu in hardware.gpus), default=0) / GIB
    if name is not None:
        preset = PRESETS.get(name)
        if preset and hardware.gpus and preset.qlora_gib > gpu_gib:
            raise HardwareError(
                f"`{name}` needs about {preset.qlora_gib:.1f} GiB even in 4 bits, and {gpu_gib:.1f} GiB are free",
                hint=f"try `--model {_largest_that_fits(gpu_gib).name}`, or stop other programs on this GPU",
            )
        return Choice(name, "set by `--model`")
    if not hardware.gpus:
        return Choice(DEMO.name, "no GPU here: the smallest preset")
    preset = _largest_that_fits(gpu_gib)
    return Choice(preset.name, f"needs about {preset.lora_gib:.1f} GiB for LoRA, and {gpu_gib:.1f} GiB are free")


def _largest_that_fits(gpu_gib: float) -> Preset:
    fitting = [PRESETS[name] for name in DEFAULTS if PRESETS[name].lora_gib <= gpu_gib]
    return fitting[-1] if fitting else DEMO


def choose_max_length(config: TrainConfig, longest: int, shape: ModelShape) -> Choice[int]:
    """Keep every token that the model has positions for.

    Raises:
        UsageError: If `--max-length` is beyond these.
    """
    if config.max_length is not None and config.max_length > shape.max_positions:
        raise UsageError(
            f"`--max-length {config.max_length}` is beyond the {shape.max_positions} positions of this model",
            hint=f"give `--max-length {shape.max_positions}` or less",
        )
    if config.max_length is not None:
        return Choice(config.max_length, "set by `--max-length`")
    if longest > shape.max_positions:
        return Choice(shape.max_positions, f"the model has no more positions; the longest example has {longest} tokens")
    return Choice(longest, "the longest example, so that nothing is cut")


# Tokenizer, report, events.
SMALL_FILES_BYTES = 64 * 2**20


def disk_bytes(config: TrainConfig, shape: ModelShape, data: DataShape) -> int:
    """Estimate what a run writes at most to its directory: the adapter twice while it is replaced, and its checkpoints.

    Each checkpoint has how often each example was seen, and how likely its sides were before; so has what is kept while
    that is found, twice while it is replaced.
    """
    adapter = FLOAT32 * trained_weights(config, shape)
    delivered = adapter * (2 if config.pissa else 1)  # what was trained, less what it began with
    moments, best = moments_bytes(config, shape, FLOAT32), int(config.early_stopping is not None)
    seen, weighed = 4 * data.num_examples, 8 * data.num_examples * (config.objective in ("dpo", "kto"))
    checkpoint = adapter * (1 + best) + moments + seen + weighed
    return 2 * (delivered + weighed) + (config.keep_checkpoints + 1) * checkpoint + SMALL_FILES_BYTES


# Of an example, beside its question: four bytes for each token and one for whether it is trained on. A token of the
# tokenizers in use has three characters or more on the average of a language with spaces. A chat template adds some 25 to
# a row. Of what is kept of real rows, this is 1.1 to 1.4 times (SmolLM2's tokenizer).
EXAMPLE_BYTES_PER_CHARACTER = 5 / 3 + 1
EXAMPLE_BYTES = 150


def spill_bytes(config: TrainConfig, *, rows: int, characters: int) -> int:
    """Estimate what the tokens of so many rows take on the disk while a run is under way.

    Once; once more if they are cut; and once more, each with another answer beside it, for `kto`.
    """
    copies = 1 + (config.max_length is not None) + 2 * (config.objective == "kto")
    return int(copies * (EXAMPLE_BYTES_PER_CHARACTER * characters + EXAMPLE_BYTES * rows))


def make_plan(
    config: TrainConfig,
    hardware: Hardware,
    shape: ModelShape,
    data: DataShape,
    *,
    model: Choice[str],
    max_length: Choice[int],
    compiled: Choice[bool] | None = None,
    eight_bit: bool = False,
) -> Plan:
    """Decide what `train` will do.

    Args:
        eight_bit: Whether what holds moments in 8 bits is installed.

    Raises:
        HardwareError: If something needs a GPU, or more main memory, and there is none.
    """
    on_gpu = bool(hardware.gpus)
    refuse_without_gpu(config, hardware)
    fp8_backward = _choose_fp8_backward(config, hardware)
    batch = _choose_batch(config, data)
    given = batch.value, max_length.value * sides_of(config), shape, hardware
    as_compiled = compiled is not None and compiled.value
    optimizer = choose_optimizer(config, *given, compiled=as_compiled, eight_bit=eight_bit)
    config = replace(config, optimizer=optimizer.value)
    dequantize = choose_dequantize(config, *given, compiled=as_compiled)
    config = replace(config, dequantize=dequantize.value)
    micro, recompute, offload, to_try = choose_passes(config, *given, compiled=as_compiled)
    steps = _choose_steps(config, data, batch.value)
    plan = Plan(
        model=model,
        device=Choice("cuda", hardware.gpus[0].name) if on_gpu else Choice("cpu", "no GPU was found"),
        dtype=choose_dtype(hardware),
        max_length=max_length,
        batch_size=batch,
        micro_batch=micro,
        packing=_choose_packing(config, hardware, tokens=micro.value * max_length.value * sides_of(config)),
        steps=steps,
        eval_steps=_choose_eval_steps(config, steps.value),
        learning_rate=_choose_rate(config, shape),
        optimizer=optimizer,
        dequantize=dequantize,
        lora_alpha=_choose_alpha(config),
        recompute=recompute,
        offload=offload,
        compile=compiled or Choice(False, "nothing is known of how long it takes"),
        fp8_backward=fp8_backward,
        to_try=to_try,
    )
    if not on_gpu:
        return plan
    may_wait = int(SHARE_OFFLOADED * hardware.memory_for_each_gpu)
    return with_memory(config, replace(plan, shape=shape, may_wait_bytes=may_wait))


def with_memory(config: TrainConfig, plan: Plan) -> Plan:
    """Let a plan know what each phase needs of a GPU."""
    micro, length = plan.micro_batch.value, plan.max_length.value
    tokens = micro * length * sides_of(config)
    memory = memory_of(config, plan, tokens=tokens, recomputed=plan.recompute.value, offloaded=plan.offload.value)
    return replace(plan, memory=memory)


def memory_of(config: TrainConfig, plan: Plan, *, tokens: int, recomputed: int, offloaded: bool) -> Phases | None:
    """Estimate what each phase needs of a GPU where a step goes through the model so, planned or not; None without one.

    Args:
        tokens: Of the largest pass.
        recomputed: Layers whose activations are computed again on the way back.
        offloaded: Whether their inputs wait in main memory.
    """
    if plan.shape is None:
        return plan.memory
    return phases_of(
        config,
        plan.shape,
        tokens=tokens,
        recomputed=recomputed,
        compiled=plan.compile.value,
        dtype=plan.dtype.value,
        offloaded=offloaded,
        several=tokens < plan.batch_size.value * plan.max_length.value * sides_of(config),
    )


def taken_over(asked: TrainConfig, config: TrainConfig, reason: str) -> dict[str, Choice[Any]]:
    """Give the choices that options decide which are not as this command has them."""
    names = [one.name for one in fields(config) if one.name in Plan.__dataclass_fields__]
    given = {name: getattr(config, name) for name in names}
    return {name: Choice(value, reason) for name, value in given.items() if value != getattr(asked, name)}


def with_known(config: TrainConfig, plan: Plan, known: Mapping[str, Choice[Any]]) -> Plan:
    """Let a plan have choices that were made before it."""
    return with_memory(config, replace(plan, **known)) if known else plan


# Ada, Hopper and later: compute capability 8.9.
FP8_CAPABILITY = (8, 9)


def _choose_fp8_backward(config: TrainConfig, hardware: Hardware) -> Choice[bool]:
    """Take it where it was asked for, until it is known on more than one kind of GPU.

    Raises:
        HardwareError: If the GPU does not multiply in 8 bits.
    """
    if not config.fp8_backward:
        return Choice(False, "not asked for")
    if not hardware.gpus or hardware.gpus[0].capability < FP8_CAPABILITY:
        raise HardwareError(
            "`--fp8-backward` needs a GPU that multiplies in 8 bits, of compute capability 8.9 or more",
            hint="leave it out",
        )
    return Choice(True, "set by `--fp8-backward`, if the gradient is proved")


def _choose_packing(config: TrainConfig, hardware: Hardware, *, tokens: int) -> Choice[bool]:
    """Pack, and say how long rows are and what attends within their examples.

    Args:
        tokens: Of the longest row.
    """
    if config.packing is False:
        return Choice(False, "set by `--no-packing`: filled up to the longest at once, attention as the model has it")
    kernel = "attention one example after the other"
    if config.engine == "unsloth":
        kernel = "attention by unsloth"
    elif hardware.gpus and choose_dtype(hardware).value == "bfloat16":
        kernel = "attention by torch's kernel for several lengths, or for a batch where long ones are alike"
    how = f"rows of up to {tokens:,} tokens, {kernel}"
    if config.packing:
        return Choice(True, f"set by `--packing`: {how}")
    return Choice(True, f"{how}; if the model proves at the start that no example sees another")


def _choose_alpha(config: TrainConfig) -> Choice[float]:
    if config.method == "full":
        return Choice(0.0, "every weight is trained: no adapter")
    if config.lora_alpha is not None:
        return Choice(config.lora_alpha, "set by `--lora-alpha`")
    if config.rslora:
        return Choice(2.0 * math.sqrt(config.lora_r), "twice the root of the rank, for `--rslora`")
    return Choice(2.0 * config.lora_r, "twice the rank")


# Pottlesea (examples/, SmolLM2 135M): 125 steps of 4 teach what 130 steps of 8 do, in half the time.
BATCH_SIZES = ((4, 250), (8, 1000))
LARGEST_BATCH = 16


def _choose_batch(config: TrainConfig, data: DataShape) -> Choice[int]:
    if config.batch_size is not None:
        return Choice(config.batch_size, "set by `--batch-size`")
    # Small sets need many steps more than they need smooth ones, and each step costs less.
    size = next((size for size, fewer_than in BATCH_SIZES if data.num_examples < fewer_than), LARGEST_BATCH)
    return Choice(min(size, data.num_examples), f"{data.num_examples} examples")


# A small set is learnt in about this many steps, and passes beyond ten only repeat (examples/, SmolLM2 135M).
WANTED_STEPS = 130
MOST_EPOCHS = 10


def _choose_steps(config: TrainConfig, data: DataShape, batch: int) -> Choice[int]:
    if config.steps is not None:
        return Choice(config.steps, "set by `--steps`")
    epochs = config.epochs or max(1, min(MOST_EPOCHS, round(WANTED_STEPS * batch / data.num_examples)))
    return Choice(math.ceil(epochs * data.num_examples / batch), f"{epochs:g} passes over {data.num_examples} examples")


# Evaluations of a run that may stop early: often enough to stop in time, rare enough to cost little.
EVALUATIONS = 20


def _choose_eval_steps(config: TrainConfig, steps: int) -> Choice[int]:
    if config.eval_steps is not None:
        return Choice(config.eval_steps, "set by `--eval-steps`")
    if config.early_stopping is not None:
        return Choice(math.ceil(steps / EVALUATIONS), f"at most {EVALUATIONS} evaluations, for `--early-stopping`")
    return Choice(steps, "only after the last step")


# Schulman et al., "LoRA Without Regret" (Thinking Machines Lab, 2025), and its cookbook: ten times the rate of full
# fine-tuning (5e-5), falling with the width as (2000 / width) ** 0.781 for the Llama family, whatever the rank.
RATE_AT_2000 = 5e-4
RATE_EXPONENT = 0.781
FASTER_THAN_FULL = 10
# Preferences move a model that answers already, and need far less; see docs/preferences.md.
RATE_SHARES = {"sft": 1.0, "orpo": 0.2, "dpo": 0.05, "kto": 0.05}


def _choose_rate(config: TrainConfig, shape: ModelShape) -> Choice[float]:
    if config.learning_rate is not None:
        return Choice(config.learning_rate, "set by `--learning-rate`")
    share = RATE_SHARES[config.objective]
    full = config.method == "full"
    rate = share * RATE_AT_2000 * (2000 / shape.hidden_size) ** RATE_EXPONENT / (FASTER_THAN_FULL if full else 1)
    less = f", {share:g} of it for {config.objective}" if share < 1 else ""
    faster = f"; B learns {config.lora_plus:g} times faster" if config.lora_plus else ""
    trained = "every weight" if full else "LoRA"
    return Choice(float(f"{rate:.1e}"), f"for {trained} at width {shape.hidden_size}{less}{faster}")
