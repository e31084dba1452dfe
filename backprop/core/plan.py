"""What a run will do, each choice with its reason: a pure function of config, hardware, model shape and data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from backprop.config import Method, Optimizer, TrainConfig
from backprop.core import passes
from backprop.core.hardware import Hardware
from backprop.core.memory import FLOAT32, ModelShape, adapter_weights, block_weights, moments_bytes, word_weights
from backprop.core.passes import Passes
from backprop.core.phases import Phases, phases_of
from backprop.errors import HardwareError, UsageError
from backprop.presets import DEFAULTS, DEMO, GIB, PRESETS, Preset

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """A value, and why it."""

    value: T
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DataShape:
    """What the plan needs of the data."""

    num_examples: int
    num_tokens: int
    """Of all examples together."""


STAY = Choice(False, "the inputs of layers stay where they are used")


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
    lora_alpha: Choice[float]
    recompute: Choice[int]
    """Layers whose activations are computed again on the way back."""
    offload: Choice[bool] = STAY
    """Whether the inputs of these layers wait for it in main memory."""
    compile: Choice[bool]
    fp8_backward: Choice[bool] = Choice(False, "in 16 bits")
    """Whether gradients go through frozen feed-forward layers in 8 bits."""
    to_try: tuple[Passes, ...] = ()
    """What is tried on the GPU before the first step, instead of micro_batch, recompute and offload as estimated."""
    memory: Phases | None = None
    """What each phase is estimated to need of a GPU; None without one."""
    try_engines: bool = False
    """Whether the other engine is to be tried beside this one before the model is loaded."""

    @property
    def compiles_layers(self) -> bool:
        """Whether we compile the layers; the other engine does so itself."""
        return self.compile.value and self.engine.value == "torch"

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


def sides_of(config: TrainConfig) -> int:
    """Count what goes through the model at once for each example: both sides of a preference."""
    return 2 if config.objective in ("dpo", "orpo") else 1


def disk_bytes(config: TrainConfig, shape: ModelShape, data: DataShape) -> int:
    """Estimate what a run writes at most to its directory: the adapter twice while it is replaced, and its checkpoints.

    Each checkpoint has how often each example was seen, and how likely its sides were before; so has what is kept while
    that is found, twice while it is replaced.
    """
    every = block_weights(shape) + word_weights(shape)
    adapter = 4 * (every if config.method == "full" else adapter_weights(shape, config.lora_r))
    delivered = adapter * (2 if config.pissa else 1)  # what was trained, less what it began with
    moments, best = moments_bytes(config, FLOAT32) / FLOAT32, int(config.early_stopping is not None)
    seen, weighed = 4 * data.num_examples, 8 * data.num_examples * (config.objective in ("dpo", "kto"))
    checkpoint = int(adapter * (1 + moments + best)) + seen + weighed
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


def least_bytes(
    config: TrainConfig, shape: ModelShape, *, length: int, method: Method, dtype: str, main_bytes: int
) -> int:
    """Estimate what a run needs with a single example of ``length`` tokens at once, and every layer recomputed.

    Args:
        main_bytes: Of main memory, what there is for each GPU.
    """
    own = replace(config, method=method)
    tokens = length * sides_of(config)
    return phases_of(
        own,
        shape,
        tokens=tokens,
        recomputed=shape.num_layers,
        compiled=False,
        dtype=dtype,
        offloaded=passes.most_offloaded(shape, tokens, main_bytes) > 0,
    ).most


def choose_method(
    config: TrainConfig, hardware: Hardware, shape: ModelShape, *, length: int, four_bit: bool
) -> Choice[Method]:
    """Take LoRA, or QLoRA where LoRA does not fit, even with its moments in 8 bits.

    Args:
        four_bit: Whether what holds weights in 4 bits, and moments in 8, is installed.
    """
    if config.method is not None:
        return Choice(config.method, "set by `--method`")
    if not hardware.gpus:
        return Choice("lora", "the exact one that trains least")
    dtype = _choose_dtype(hardware).value
    room = passes.room_of(hardware.gpus[0])
    least = replace(config, optimizer=config.optimizer or ("adamw-8bit" if four_bit else "adamw"))
    need = least_bytes(least, shape, length=length, method="lora", dtype=dtype, main_bytes=hardware.memory_for_each_gpu)
    told = f"LoRA needs {need / GIB:.1f} GiB at least, and there is room for {room / GIB:.1f}"
    if need <= room:
        return Choice("lora", told)
    if config.pissa or config.fp8_backward:
        return Choice("lora", f"{told}; `--{'pissa' if config.pissa else 'fp8-backward'}` is for it alone")
    if not four_bit:
        return Choice("lora", f"{told}; for 4 bits, `pip install 'backprop[standard]'`")
    return Choice("qlora", told)


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
        HardwareError: If the method needs a GPU, and there is none.
    """
    on_gpu = bool(hardware.gpus)
    if config.method == "qlora" and not on_gpu:
        # bitsandbytes 0.50 multiplies 4-bit weights on a CPU without a gradient: most of the adapter would stand still.
        raise HardwareError("`--method qlora` needs an NVIDIA GPU, and none was found", hint="add `--method lora`")
    fp8_backward = _choose_fp8_backward(config, hardware)
    batch = _choose_batch(config, data)
    given = batch.value, max_length.value * sides_of(config), shape, hardware
    as_compiled = compiled is not None and compiled.value
    optimizer = _choose_optimizer(config, *given, compiled=as_compiled, eight_bit=eight_bit)
    config = replace(config, optimizer=optimizer.value)
    micro, recompute, offload, to_try = _choose_passes(config, *given, compiled=as_compiled)
    steps = _choose_steps(config, data, batch.value)
    plan = Plan(
        model=model,
        device=Choice("cuda", hardware.gpus[0].name) if on_gpu else Choice("cpu", "no GPU was found"),
        dtype=_choose_dtype(hardware),
        max_length=max_length,
        batch_size=batch,
        micro_batch=micro,
        packing=Choice(True, "no padding, if the model proves at the start that no example sees another")
        if config.packing is None
        else Choice(config.packing, "set by `--packing`" if config.packing else "set by `--no-packing`"),
        steps=steps,
        eval_steps=_choose_eval_steps(config, steps.value),
        learning_rate=_choose_rate(config, shape),
        optimizer=optimizer,
        lora_alpha=_choose_alpha(config),
        recompute=recompute,
        offload=offload,
        compile=compiled or Choice(False, "nothing is known of how long it takes"),
        fp8_backward=fp8_backward,
        to_try=to_try,
    )
    return replace(plan, memory=_memory(config, shape, plan)) if on_gpu else plan


def _memory(config: TrainConfig, shape: ModelShape, plan: Plan) -> Phases:
    return phases_of(
        config,
        shape,
        tokens=plan.micro_batch.value * plan.max_length.value * sides_of(config),
        recomputed=plan.recompute.value,
        compiled=plan.compile.value,
        dtype=plan.dtype.value,
        offloaded=plan.offload.value,
        several=plan.micro_batch.value < plan.batch_size.value,
    )


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


def _choose_alpha(config: TrainConfig) -> Choice[float]:
    if config.method == "full":
        return Choice(0.0, "every weight is trained: no adapter")
    if config.lora_alpha is not None:
        return Choice(config.lora_alpha, "set by `--lora-alpha`")
    if config.rslora:
        return Choice(2.0 * math.sqrt(config.lora_r), "twice the root of the rank, for `--rslora`")
    return Choice(2.0 * config.lora_r, "twice the rank")


# Every GPU from Ampere (compute capability 8.0) on multiplies in bfloat16.
BF16_CAPABILITY = (8, 0)


def _choose_dtype(hardware: Hardware) -> Choice[str]:
    if not hardware.gpus:
        return Choice("float32", "on a CPU float32 is faster than bfloat16, and exact")
    if hardware.gpus[0].capability >= BF16_CAPABILITY:
        return Choice("bfloat16", "this GPU multiplies in it")
    return Choice("float32", "this GPU has no bfloat16")


# Pottlesea (examples/, SmolLM2 135M): 125 steps of 4 teach what 130 steps of 8 do, in half the time.
BATCH_SIZES = ((4, 250), (8, 1000))
LARGEST_BATCH = 16


def _choose_batch(config: TrainConfig, data: DataShape) -> Choice[int]:
    if config.batch_size is not None:
        return Choice(config.batch_size, "set by `--batch-size`")
    # Small sets need many steps more than they need smooth ones, and each step costs less.
    size = next((size for size, fewer_than in BATCH_SIZES if data.num_examples < fewer_than), LARGEST_BATCH)
    return Choice(min(size, data.num_examples), f"{data.num_examples} examples")


def _choose_optimizer(
    config: TrainConfig,
    batch: int,
    length: int,
    shape: ModelShape,
    hardware: Hardware,
    *,
    compiled: bool,
    eight_bit: bool,
) -> Choice[Optimizer]:
    """Hold the moments in 8 bits where no pass fits without: all else that makes room changes no result."""
    if config.optimizer is not None:
        return Choice(config.optimizer, "set by `--optimizer`")
    if not hardware.gpus:
        return Choice("adamw", "main memory is enough")
    need = min(_needs(config, batch, length, shape, hardware, compiled=compiled).values())
    room = passes.room_of(hardware.gpus[0])
    told = f"a step needs {need / GIB:.1f} GiB at least, and there is room for {room / GIB:.1f}"
    if need <= room:
        return Choice("adamw", told)
    if not eight_bit:
        return Choice("adamw", f"{told}; for 8 bits, `pip install 'backprop[standard]'`")
    return Choice("adamw-8bit", f"with moments of 32 bits, {told}")


def _needs(
    config: TrainConfig, batch: int, length: int, shape: ModelShape, hardware: Hardware, *, compiled: bool
) -> Mapping[Passes, int]:
    dtype, main = _choose_dtype(hardware).value, hardware.memory_for_each_gpu
    return passes.needs(config, batch, length, shape, compiled=compiled, dtype=dtype, main_bytes=main)


# Tokens of one forward pass on a CPU: more brings no speed, and less memory is touched (scripts/bench).
CPU_TOKENS_PER_PASS = 2048


def _choose_passes(
    config: TrainConfig, batch: int, length: int, shape: ModelShape, hardware: Hardware, *, compiled: bool
) -> tuple[Choice[int], Choice[int], Choice[bool], tuple[Passes, ...]]:
    """Choose how many examples go through at once, how many layers are computed again, where their inputs wait; what else to try."""
    if not hardware.gpus:
        most = max(1, CPU_TOKENS_PER_PASS // length)
        size = passes.divisor(batch, most) if config.micro_batch is None else passes.even(batch, config.micro_batch)
        micro = Choice(size, f"at most {CPU_TOKENS_PER_PASS} tokens at once")
        recompute = Choice(min(config.recompute or 0, shape.num_layers), "main memory is enough")
        return *_as_set(config, micro, recompute, shape), STAY, ()
    gpu = hardware.gpus[0]
    need = _needs(config, batch, length, shape, hardware, compiled=compiled)
    ways = passes.fastest_first(config, need, batch, length, shape, gpu)
    fitting = (one for one in ways if need[one] <= passes.room_of(gpu))
    chosen = next(fitting, min(need, key=need.__getitem__))
    told = f"about {need[chosen] / GIB:.1f} GiB at the fullest, and {gpu.memory_free_bytes / GIB:.1f} GiB are free"
    recompute = Choice(chosen.recomputed, f"of {shape.num_layers} layers; {told}")
    offload = Choice(True, "the GPU's memory is too small for the inputs of layers") if chosen.offloaded else STAY
    return *_as_set(config, Choice(chosen.examples, told), recompute, shape), offload, passes.worth_trying(ways)


def _as_set(
    config: TrainConfig, micro: Choice[int], recompute: Choice[int], shape: ModelShape
) -> tuple[Choice[int], Choice[int]]:
    if config.micro_batch is not None:
        micro = Choice(micro.value, "set by `--micro-batch`, in passes as even as can be")
    if config.recompute is not None:
        recompute = Choice(recompute.value, f"set by `--recompute`, of {shape.num_layers} layers")
    return micro, recompute


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
