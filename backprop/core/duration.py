"""How long a run will take, before it starts: enough to tell minutes from hours, and no more."""

import math
from collections.abc import Sequence
from dataclasses import replace

from backprop.config import TrainConfig
from backprop.core import engines, passes
from backprop.core.choice import Choice
from backprop.core.hardware import Hardware
from backprop.core.memory import ModelShape, met_weights
from backprop.core.passes import sides_of, start_seconds
from backprop.core.plan import DataShape, Plan, make_plan
from backprop.core.rates import BF16_CAPABILITY, rate_of

# Operations per weight and token: a product and a sum, each in the pass forward and in that of the gradients back to the
# adapters; frozen weights have no gradient of their own. A layer that is recomputed goes forward once more.
FORWARD = BACKWARD = 2

# What is estimated is rather long than short, since a needless rehearsal costs less than a missed one.
LOW = 0.8

# A run that is estimated above this is rehearsed, unless it was said otherwise: that takes 15 to 60 seconds, at most a
# thirtieth of it, and finds what would end the run at its last step.
REHEARSED_ABOVE_S = 30 * 60


def estimate_seconds(config: TrainConfig, plan: Plan, shape: ModelShape, data: DataShape, hardware: Hardware) -> float:
    """Estimate the time of a run's steps; evaluations, proofs and attention over long rows are not counted."""
    tokens = plan.batch_size.value * data.num_tokens / data.num_examples
    most = plan.micro_batch.value * plan.max_length.value * sides_of(config)
    packed, padded = tokens / most, plan.batch_size.value / plan.micro_batch.value
    num = math.ceil(packed if plan.packing.value else padded)
    given = config, shape, hardware
    return plan.steps.value * num * _pass_seconds(*given, tokens=tokens / num, recomputed=plan.recompute.value)


def _pass_seconds(
    config: TrainConfig, shape: ModelShape, hardware: Hardware, *, tokens: float, recomputed: int
) -> float:
    """Estimate the time of a pass forward and back, whose kernels are started while others run."""
    per_weight = FORWARD + BACKWARD + FORWARD * recomputed / shape.num_layers
    seconds = tokens * met_weights(shape) * per_weight / (LOW * rate_of(hardware))
    return math.hypot(seconds, start_seconds(config, shape)) if hardware.gpus else seconds


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
    seconds = estimate_seconds(config, plan, shape, data, hardware)
    gpus = choose_gpus(plan, hardware, seconds)
    compiled = choose_compile(config, plan, hardware, seconds / gpus.value, experts=shape.num_experts)

    def planned(compiled: Choice[bool]) -> Plan:
        given = config, hardware, shape, data
        return make_plan(*given, model=model, max_length=max_length, compiled=compiled, eight_bit=eight_bit)

    plan = planned(compiled)
    if compiled.value and config.compile is None:
        bare = planned(Choice(False, "compiled, a step needs more memory than there is"))
        plan = max(plan, bare, key=lambda one: _roomiest(one, hardware))
    plan = replace(plan, gpus=gpus)
    if config.deterministic or not _worth_trying(config, plan, shape, hardware, seconds / gpus.value):
        plan = replace(plan, to_try=())
    config = replace(config, dequantize=plan.dequantize.value)
    return engines.with_engine(plan, config, hardware, shape, seconds=seconds / gpus.value, installed=unsloth), seconds


def _roomiest(plan: Plan, hardware: Hardware) -> tuple[bool, bool, int]:
    """Order plans: those that fit, those with moments of 32 bits, since what is compiled must not decide the result, then the least."""
    need = plan.memory.most if plan.memory else 0
    fits = need <= passes.room_of(hardware.gpus[0])
    return fits, plan.optimizer.value == "adamw", 0 if fits else -need


# Between sizes of passes, the order of the estimate was wrong by up to 3 % for a 7B and by a fifth for a 1.5B
# (docs/speed-notes.md): what is tried may take less than that, and what comes of it is kept for later runs.
TRIED_ABOVE_S = 5 * 60
TRIED_SHARE = 0.05
PASSES_OF_A_TRY = 2


def _worth_trying(config: TrainConfig, plan: Plan, shape: ModelShape, hardware: Hardware, seconds: float) -> bool:
    """Say whether trying takes little of a run, which is long on a fast card and a few passes on a slow one.

    Args:
        seconds: An estimate of the run.
    """
    length, given = plan.max_length.value * sides_of(config), (config, shape, hardware)
    ways = ((one.examples * length, one.recomputed) for one in plan.to_try)
    each = (_pass_seconds(*given, tokens=tokens, recomputed=recomputed) for tokens, recomputed in ways)
    return seconds > TRIED_ABOVE_S and PASSES_OF_A_TRY * sum(each) <= TRIED_SHARE * seconds


# A process for another GPU is ready after some 20 seconds: imports, the model's weights, the first exchange. Two save half
# of the run, which is estimated rather too long.
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


# The first time, compiling takes half a minute to two; then it is in the cache, and takes a few seconds. It saves a sixth to a
# quarter of the time: of a 7B on an H200, 13,600 tokens a second became 16,400, and 18,100 since the loss is compiled too.
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
    return Choice(True, f"{told}: saves about a fifth of them for a minute at the start")


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
    found = f"{minutes} are estimated, at {LOW * rate_of(hardware) / 1e9:,.0f} GFLOP/s of this {device}"
    limit = f"{REHEARSED_ABOVE_S // 60} minutes"
    if whole > REHEARSED_ABOVE_S:
        return Choice(True, f"{found}, more than {limit}")
    return Choice(False, f"{found}, at most {limit}")
