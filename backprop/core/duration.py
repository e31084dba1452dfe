"""How long a run will take, before it starts: enough to tell minutes from hours, and no more."""

from collections.abc import Sequence
from dataclasses import replace

from backprop.config import TrainConfig
from backprop.core import engines, passes
from backprop.core.choice import Choice
from backprop.core.fitting import BF16_CAPABILITY
from backprop.core.hardware import Hardware
from backprop.core.memory import ModelShape, met_weights
from backprop.core.plan import DataShape, Plan, make_plan
from backprop.presets import GIB

# Operations per weight and token: a product and a sum, each in the pass forward and in that of the gradients back to the
# adapters; frozen weights have no gradient of their own. A layer that is recomputed goes forward once more.
FORWARD = BACKWARD = 2

# All rates are low, since a needless rehearsal costs less than a missed one. A core: SmolLM2 135M in float32 on two, whose
# 138 to 301 tokens a second (docs/benchmarks.md) are 40 to 90 GFLOP/s for each.
CPU_RATE = 45e9
# A GPU, per GiB of its memory: the data sheets from RTX 3060 to B200 name 2 to 12 TFLOP/s in bfloat16 for each GiB, and
# training reaches a part of that; an H100, 0.8 to 1.5 (docs/benchmarks.md). Without bfloat16, a quarter.
GPU_RATE = 0.5e12
GPU_RATE_FLOAT32 = GPU_RATE / 4

# A run that is estimated above this is rehearsed, unless it was said otherwise.
REHEARSED_ABOVE_S = 30 * 60


def rate_of(hardware: Hardware) -> float:
    """Give the operations per second that are assumed of this machine."""
    if not hardware.gpus:
        return CPU_RATE * hardware.num_cpus
    gpu = hardware.gpus[0]
    return (GPU_RATE if gpu.capability >= BF16_CAPABILITY else GPU_RATE_FLOAT32) * gpu.memory_bytes / GIB


def estimate_seconds(plan: Plan, shape: ModelShape, data: DataShape, hardware: Hardware) -> float:
    """Estimate the time of a run's steps; evaluations, proofs and attention over long rows are not counted."""
    tokens = plan.steps.value * plan.batch_size.value * data.num_tokens / data.num_examples
    per_weight = FORWARD + BACKWARD + FORWARD * plan.recompute.value / shape.num_layers
    return tokens * met_weights(shape) * per_weight / rate_of(hardware)


def plan_and_seconds(
    config: TrainConfig,
    hardware: Hardware,
    shape: ModelShape,
    data: DataShape,
    *,
    model: Choice[str],
    max_length: Choice[int],
    eight_bit: bool = False,
    unsloth: bool = False,
) -> tuple[Plan, float]:
    """Decide what the run will do, and estimate how many seconds it takes.

    Whether compiling is worth it depends on how long the run is; how much is recomputed, on whether layers are compiled.

    Args:
        eight_bit: Whether what holds moments in 8 bits is installed.
        unsloth: Whether it is installed.
    """
    plan = make_plan(config, hardware, shape, data, model=model, max_length=max_length)
    seconds = estimate_seconds(plan, shape, data, hardware)
    gpus = choose_gpus(plan, hardware, seconds)
    compiled = choose_compile(config, plan, hardware, seconds / gpus.value, experts=shape.num_experts)

    def planned(compiled: Choice[bool]) -> Plan:
        given = config, hardware, shape, data
        return make_plan(*given, model=model, max_length=max_length, compiled=compiled, eight_bit=eight_bit)

    plan = planned(compiled)
    if compiled.value and config.compile is None:
        bare = planned(Choice(False, "compiled, a step needs more memory than there is"))
        plan = max(plan, bare, key=lambda one: _roomiest(one, hardware))
    worth_trying = seconds / gpus.value > TRIED_ABOVE_S and not config.deterministic
    plan = replace(plan, gpus=gpus, to_try=plan.to_try if worth_trying else ())
    config = replace(config, dequantize=plan.dequantize.value)
    return engines.with_engine(plan, config, hardware, shape, seconds=seconds / gpus.value, installed=unsloth), seconds


def _roomiest(plan: Plan, hardware: Hardware) -> tuple[bool, bool, int]:
    """Order plans: those that fit, those with moments of 32 bits, since what is compiled must not decide the result, then the least."""
    need = plan.memory.most if plan.memory else 0
    fits = need <= passes.room_of(hardware.gpus[0])
    return fits, plan.optimizer.value == "adamw", 0 if fits else -need


# Six passes are tried; what comes of it is kept for later runs.
TRIED_ABOVE_S = 5 * 60


# A process for another GPU is ready after some 20 seconds: imports, the model's weights, the first exchange.
SHARED_ABOVE_S = 60


def choose_gpus(plan: Plan, hardware: Hardware, seconds: float) -> Choice[int]:
    """Let all GPUs that are alike share the passes of each step, where that saves more than it costs.

    Args:
        seconds: An estimate of the run on one.
    """
    found = len(hardware.gpus)
    if found < 2:
        return Choice(1, "no other like it is visible and free" if found else "the CPU trains in one process")
    if not hardware.platform.startswith("Linux"):
        return Choice(1, f"{found} are there, and only on Linux do they share a step")
    if seconds <= SHARED_ABOVE_S:
        return Choice(
            1, f"{found} are there, and one is estimated to need {seconds:,.0f} s: starting others takes as long"
        )
    most = plan.batch_size.value
    if most < found:
        return Choice(most, f"{found} are there, and a step has {most} examples")
    return Choice(found, "all that are visible, alike and free")


# The first time, compiling takes a GPU's machine one to two minutes; then it is in the cache. It makes a step a fifth faster.
COMPILED_ABOVE_S = 5 * 60


def choose_compile(
    config: TrainConfig, plan: Plan, hardware: Hardware, seconds: float, *, experts: int = 1
) -> Choice[bool]:
    """Compile the layers where that saves more than it costs.

    Args:
        seconds: An estimate of the run.
        experts: Feed-forward parts of a layer.
    """
    if config.compile is not None:
        return Choice(config.compile, "set by `--compile`" if config.compile else "set by `--no-compile`")
    if not hardware.gpus:
        return Choice(False, "on a CPU it saves nothing")
    if config.deterministic:
        return Choice(False, "`--deterministic`: the kernels that it chooses may differ from start to start")
    if not (hardware.platform.startswith("Linux") and hardware.gpus[0].capability >= BF16_CAPABILITY):
        return Choice(False, "only on Linux, and for GPUs that multiply in bfloat16")
    if config.method in ("dora", "full"):
        return Choice(False, f"not measured with `--method {config.method}` yet")
    if experts > 1:
        return Choice(False, "layers with experts are compiled anew for every row")
    told = f"{seconds / 60:,.0f} minutes are estimated"
    if seconds <= COMPILED_ABOVE_S:
        return Choice(False, f"{told}: not worth the minute that it takes")
    return Choice(True, f"{told}: saves about a sixth of them for a minute at the start")


def choose_rehearsal(config: TrainConfig, seconds: Sequence[float], hardware: Hardware) -> Choice[bool]:
    """Rehearse what would take long.

    Args:
        seconds: Estimates of the run, or of each of several.
    """
    if config.rehearse is not None:
        return Choice(config.rehearse, "set by `--rehearse`" if config.rehearse else "set by `--no-rehearse`")
    whole = sum(seconds)
    device = "GPU" if hardware.gpus else "CPU"
    minutes = f"{whole / 60:,.0f} minutes" if whole >= 60 else "under a minute"
    found = f"{minutes} are estimated, at {rate_of(hardware) / 1e9:,.0f} GFLOP/s of this {device}"
    limit = f"{REHEARSED_ABOVE_S // 60} minutes"
    if whole > REHEARSED_ABOVE_S:
        return Choice(True, f"{found}, more than {limit}")
    return Choice(False, f"{found}, at most {limit}")
