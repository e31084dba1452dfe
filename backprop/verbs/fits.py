"""Whether a model fits this machine, how it would be trained, and how long that takes: from the plan, without its weights."""

from dataclasses import replace

from backprop.config import DoctorConfig, Method, Optimizer, TrainConfig
from backprop.core import duration
from backprop.core.choice import Choice
from backprop.core.data.judge import judge
from backprop.core.fitting import least_bytes
from backprop.core.hardware import Hardware
from backprop.core.memory import ModelShape
from backprop.core.passes import room_of
from backprop.core.plan import DataShape, Plan, choose_model
from backprop.edges import hub
from backprop.engine import load
from backprop.errors import HardwareError
from backprop.events import Event
from backprop.presets import GIB, PRESETS
from backprop.verbs.prepare import prepare, read_data, rows_of

# What is assumed where no data is given.
NOMINAL = DataShape(num_examples=1000, num_tokens=500_000)
NOMINAL_LENGTH = 1024


def fit_told(config: DoctorConfig, hardware: Hardware) -> str:
    """Say whether the model fits, with which plan, how fast and how long.

    Raises:
        BackpropError: If it cannot be trained here, or is no model.
    """
    chosen = choose_model(config.model, hardware)
    hub.check_name(chosen.value)
    preset = PRESETS.get(chosen.value)
    if config.model is None and preset is not None:
        return f"{chosen.value}: about {preset.lora_gib:.1f} GiB for LoRA, {preset.qlora_gib:.1f} GiB in 4 bits"
    source = hub.find_model(chosen.value, offline=False, weights=False)
    shape = load.load_shape(source.path, trust_remote_code=False)
    length = Choice(min(NOMINAL_LENGTH, shape.max_positions), "assumed")
    train = TrainConfig(data=config.data or ("none",), model=config.model)
    train, need_bytes = method_that_fits(train, hardware, shape, length=length.value)
    if config.data:
        judged, held_out = read_data(train)
        rows = f"{len(judged.conversations) + len(held_out):,} rows"
        prepared = prepare(train, judged, held_out, weights=False, say=_silent)
        plan, seconds = prepared.plan, prepared.seconds
        mean = prepared.train.tokens / len(prepared.train.examples)
    else:
        mean = NOMINAL.num_tokens / NOMINAL.num_examples
        rows = f"{NOMINAL.num_examples:,} rows of {mean:.0f} tokens, since no `--data` is given,"
        one = replace(hardware, gpus=hardware.gpus[:1])
        plan, seconds = duration.plan_and_seconds(train, one, shape, NOMINAL, model=chosen, max_length=length)
    return f"{chosen.value} fits: {_plan_told(train, plan, need_bytes)}; {_time_told(plan, seconds, mean, rows)}"


def method_that_fits(
    train: TrainConfig, hardware: Hardware, shape: ModelShape, *, length: int
) -> tuple[TrainConfig, int]:
    """Choose LoRA, or QLoRA where only that fits, and give the memory that it needs at least.

    Raises:
        HardwareError: If neither fits.
    """
    ways: tuple[tuple[Method, Optimizer | None], ...] = (("lora", None),)
    if hardware.gpus:
        ways = (("lora", None), ("lora", "adamw-8bit"), ("qlora", None), ("qlora", "adamw-8bit"))
    gpu = max(hardware.gpus, key=lambda one: one.memory_free_bytes, default=None)
    room = room_of(gpu) if gpu else hardware.memory_bytes
    need = 0
    for method, optimizer in ways:
        train = replace(train, method=method, optimizer=optimizer)
        dtype = "bfloat16" if gpu else "float32"
        main = hardware.memory_for_each_gpu
        need = least_bytes(train, shape, length=length, method=method, dtype=dtype, main_bytes=main)
        if need <= room:
            return train, need
    raise HardwareError(
        f"`{train.model}` needs {need / GIB:.1f} GiB{' even in 4 bits' if gpu else ''}, and {room / GIB:.1f} GiB are free",
        hint="a smaller `--model`, or a larger GPU" if gpu else "a smaller `--model`, or a machine with a GPU",
    )


def _plan_told(train: TrainConfig, plan: Plan, need_bytes: int) -> str:
    where = f"{plan.gpus.value} GPUs" if plan.gpus.value > 1 else plan.device.value
    again = f", {plan.recompute.value} layers recomputed" if plan.recompute.value else ""
    moments = ", moments in 8 bits" if plan.optimizer.value == "adamw-8bit" else ""
    return (
        f"{train.method} in {plan.dtype.value} on {where}, {plan.micro_batch.value} examples at once{again}{moments} "
        f"(from {need_bytes / GIB:.1f} GiB on)"
    )


def _time_told(plan: Plan, seconds: float, mean: float, rows: str) -> str:
    time = f"{seconds / 60:,.0f} minutes" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
    speed = plan.steps.value * plan.batch_size.value * mean / max(seconds, 1e-9)
    return f"{plan.steps.value:,} steps on {rows} take roughly {time}, at {speed:,.0f} tokens/s"


def data_told(sources: tuple[str, ...]) -> str:
    """Judge data as `train` would, without a model.

    Raises:
        DataError: If nothing in it can be trained on.
    """
    judged = judge(row for source in sources for row in rows_of(source, offline=False))
    shapes = ", ".join(f"{count} {shape}" for shape, count in judged.shapes.items())
    return f"{len(judged.conversations)} rows that can be trained on: {shapes}"


def _silent(event: Event) -> None:
    """Let the preparation say nothing: its outcome is told."""
