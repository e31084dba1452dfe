"""What makes a run fit the memory that there is, each with its reason: method, precision, optimizer, and the passes of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from backprop.config import Method, Optimizer, TrainConfig
from backprop.core import passes
from backprop.core.choice import Choice
from backprop.core.hardware import Hardware
from backprop.core.memory import ModelShape
from backprop.core.passes import Passes, sides_of
from backprop.core.phases import phases_of
from backprop.core.rates import BF16_CAPABILITY
from backprop.errors import HardwareError
from backprop.presets import GIB

STAY = Choice(False, "the inputs of layers stay where they are used")
# Tokens of one forward pass on a CPU: more brings no speed, and less memory is touched (scripts/bench).
CPU_TOKENS_PER_PASS = 2048


def refuse_without_gpu(config: TrainConfig, hardware: Hardware) -> None:
    """Refuse what only a GPU does.

    Raises:
        HardwareError: If there is none.
    """
    if hardware.gpus:
        return
    if config.method == "qlora":
        # bitsandbytes 0.50 multiplies 4-bit weights on a CPU without a gradient: most of the adapter would stand still.
        hint = f"add `--method lora`{', and leave out `--dequantize`' if config.dequantize else ''}"
        raise HardwareError("`--method qlora` needs an NVIDIA GPU, and none was found", hint=hint)
    if config.offload:
        raise HardwareError("`--offload` needs an NVIDIA GPU, and none was found", hint="leave it out")


def choose_dtype(hardware: Hardware) -> Choice[str]:
    """Compute in bfloat16 where that is fast."""
    if not hardware.gpus:
        return Choice("float32", "on a CPU float32 is faster than bfloat16, and exact")
    if hardware.gpus[0].capability >= BF16_CAPABILITY:
        return Choice("bfloat16", "this GPU multiplies in it")
    return Choice("float32", "this GPU has no bfloat16")


def least_bytes(
    config: TrainConfig, shape: ModelShape, *, length: int, method: Method, dtype: str, main_bytes: int
) -> int:
    """Estimate what a run needs with a single example of ``length`` tokens at once, and every layer recomputed.

    Args:
        main_bytes: Of main memory, what there is for each GPU.
    """
    own = replace(config, method=method)
    tokens = length * sides_of(config)
    can_wait = passes.most_offloaded(shape, tokens, main_bytes) > 0
    return phases_of(
        own,
        shape,
        tokens=tokens,
        recomputed=shape.num_layers,
        compiled=False,
        dtype=dtype,
        offloaded=can_wait if config.offload is None else config.offload,
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
    dtype = choose_dtype(hardware).value
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


def choose_optimizer(
    config: TrainConfig,
    batch: int,
    length: int,
    shape: ModelShape,
    hardware: Hardware,
    *,
    compiled: bool,
    eight_bit: bool,
) -> Choice[Optimizer]:
    """Hold the moments in 8 bits where no pass fits without: all else that makes room changes no result.

    Args:
        eight_bit: Whether what holds moments in 8 bits is installed.
    """
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


def choose_dequantize(
    config: TrainConfig, batch: int, length: int, shape: ModelShape, hardware: Hardware, *, compiled: bool
) -> Choice[bool]:
    """Make 16 bits of 4 once, and not in each product, where the memory for that slows no pass."""
    if config.method != "qlora":
        return Choice(False, "no weights are in 4 bits")
    if config.dequantize is not None:
        return Choice(config.dequantize, f"set by `--{'' if config.dequantize else 'no-'}dequantize`")
    if config.engine == "unsloth":
        return Choice(False, "unsloth makes 16 bits of 4 itself")
    if config.deterministic:
        return Choice(False, "`--deterministic`: the same products at each start, whatever room it finds")
    given = batch, length, shape, hardware
    packed, whole = (_ways(replace(config, dequantize=one), *given, compiled=compiled)[-1] for one in (False, True))
    if packed is None or whole is None:
        return Choice(False, "the GPU's memory is too small for weights in 16 bits")
    slows_nothing = whole.examples >= packed.examples and whole.recomputed <= packed.recomputed
    if slows_nothing and whole.offloaded <= packed.offloaded:
        return Choice(True, "rounded to 4 and held in 16: there is room for that, and each product is faster")
    return Choice(False, "in 16 bits, the weights would take the room of passes")


def choose_passes(
    config: TrainConfig, batch: int, length: int, shape: ModelShape, hardware: Hardware, *, compiled: bool
) -> tuple[Choice[int], Choice[int], Choice[bool], tuple[Passes, ...]]:
    """Choose how many examples go through at once, how many layers are computed again, where their inputs wait; what else to try.

    Raises:
        HardwareError: If the inputs of layers are to wait in main memory, and it is too small for those of one pass.
    """
    if not hardware.gpus:
        most = max(1, CPU_TOKENS_PER_PASS // length)
        size = passes.divisor(batch, most) if config.micro_batch is None else passes.even(batch, config.micro_batch)
        only = Passes(size, min(config.recompute or 0, shape.num_layers))
        return *_told(config, only, shape, f"at most {CPU_TOKENS_PER_PASS} tokens at once", "main memory is enough"), ()
    need, ways, fitting = _ways(config, batch, length, shape, hardware, compiled=compiled)
    chosen = fitting or min(need, key=need.__getitem__)
    free = hardware.gpus[0].memory_free_bytes / GIB
    told = f"about {need[chosen] / GIB:.1f} GiB at the fullest, and {free:.1f} GiB are free"
    layers = f"of {shape.num_layers} layers; {told}"
    layers = f"all layers, for `--offload`; {told}" if config.offload else layers
    return *_told(config, chosen, shape, told, layers), passes.worth_trying(ways)


def _ways(
    config: TrainConfig, batch: int, length: int, shape: ModelShape, hardware: Hardware, *, compiled: bool
) -> tuple[Mapping[Passes, int], Sequence[Passes], Passes | None]:
    """Give the bytes that each way needs, those that may fit, the fastest first, and the first that does fit."""
    gpu = hardware.gpus[0]
    need = _needs(config, batch, length, shape, hardware, compiled=compiled)
    ways = passes.fastest_first(config, need, batch, length, shape, gpu)
    return need, ways, next((one for one in ways if need[one] <= passes.room_of(gpu)), None)


def _needs(
    config: TrainConfig, batch: int, length: int, shape: ModelShape, hardware: Hardware, *, compiled: bool
) -> Mapping[Passes, int]:
    dtype, main = choose_dtype(hardware).value, hardware.memory_for_each_gpu
    need = passes.needs(config, batch, length, shape, compiled=compiled, dtype=dtype, main_bytes=main)
    if need:
        return need
    fewest = 1 if config.micro_batch is None else passes.even(batch, config.micro_batch)
    layers = shape.num_layers if config.recompute is None else min(config.recompute, shape.num_layers)
    waiting, option = (
        fewest * passes.waiting_bytes(shape, length, layers),
        "micro-batch" if fewest > 1 else "max-length",
    )
    raise HardwareError(
        f"`--offload`: what {layers} layers begin with takes {waiting / GIB:.1f} GiB of main memory with {fewest} "
        f"example{'s' * (fewest > 1)} at once, and {passes.SHARE_OFFLOADED * main / GIB:.1f} may be held for it",
        hint=f"leave it out, or give a smaller `--{option}`",
    )


def _told(
    config: TrainConfig, chosen: Passes, shape: ModelShape, size: str, layers: str
) -> tuple[Choice[int], Choice[int], Choice[bool]]:
    if config.micro_batch is not None:
        size = "set by `--micro-batch`, in passes as even as can be"
    if config.recompute is not None:
        layers = f"set by `--recompute`, of {shape.num_layers} layers"
    offload = Choice(True, "the GPU's memory is too small for the inputs of layers") if chosen.offloaded else STAY
    if config.offload is not None:
        offload = Choice(config.offload, f"set by `--{'' if config.offload else 'no-'}offload`")
    return Choice(chosen.examples, size), Choice(chosen.recomputed, layers), offload
