"""Which implementation runs the step: torch, or unsloth where it is installed and its kernels fit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from backprop.config import TrainConfig, beyond_unsloth
from backprop.core.choice import Choice
from backprop.core.hardware import Hardware
from backprop.core.memory import ModelShape
from backprop.core.passes import room_to_try
from backprop.core.plan import Plan
from backprop.core.rates import BF16_CAPABILITY
from backprop.errors import HardwareError, ModelError, PackageError
from backprop.presets import GIB

INSTALL = "pip install 'backprop[unsloth]'"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures for which unsloth has kernels of its own, each of which was tried here."""
# Each engine is tried in a process of its own: imports, the model's weights, and up to two minutes of compiling, some three
# minutes for both, a twentieth of an hour. On an H200 there is nothing to gain: 1,069 ms for a step of a 7B that takes torch 915
# (docs/speed-notes.md); what other cards gain is not known. What is found is kept for later runs.
TRIED_ABOVE_S = 60 * 60


def refuse_if_not_there(config: TrainConfig, hardware: Hardware, *, installed: bool) -> None:
    """Refuse `--engine unsloth` where it cannot be, before any work.

    Raises:
        PackageError: If it is not installed.
        HardwareError: If there is no GPU for it, or more than one.
    """
    if config.engine != "unsloth":
        return
    if not installed:
        raise PackageError("`--engine unsloth` needs the package `unsloth`", hint=INSTALL)
    told = why_not_on(hardware)
    if told:
        fewer = "set `CUDA_VISIBLE_DEVICES=0`, or " if len(hardware.gpus) > 1 else ""
        raise HardwareError(f"`--engine unsloth`: {told}", hint=f"{fewer}leave out `--engine`")


def with_engine(
    plan: Plan, config: TrainConfig, hardware: Hardware, shape: ModelShape, *, seconds: float, installed: bool
) -> Plan:
    """Choose the engine, or say that both are to be tried.

    Args:
        seconds: An estimate of the run.
        installed: Whether unsloth is.

    Raises:
        BackpropError: If `--engine unsloth` cannot be.
    """
    refuse_if_not_there(config, hardware, installed=installed)
    if config.engine == "unsloth":
        if shape.family not in FAMILIES:
            raise ModelError(
                f"unsloth has no kernels that were tried for models of the kind `{shape.family}`",
                hint=f"leave out `--engine`; there are some for {', '.join(FAMILIES)}",
            )
        return replace(plan, engine=Choice("unsloth", "set by `--engine`"))
    if config.engine == "torch":
        return replace(plan, engine=Choice("torch", "set by `--engine`"))
    told = _why_not(config, hardware, shape, installed=installed) or _why_not_tried(plan, hardware)
    if told:
        return replace(plan, engine=Choice("torch", told))
    minutes = f"{max(seconds / 60, 1):,.0f} min are estimated"
    if seconds <= TRIED_ABOVE_S:
        return replace(plan, engine=Choice("torch", f"{minutes}: not worth trying unsloth beside it"))
    return replace(
        plan, engine=Choice("torch", f"{minutes}: unless unsloth, tried beside it first, is faster"), try_engines=True
    )


def _why_not(config: TrainConfig, hardware: Hardware, shape: ModelShape, *, installed: bool) -> str:
    """Say what keeps unsloth from this run; empty if nothing does."""
    if not installed:
        return "unsloth is not installed"
    if beyond := beyond_unsloth(config):
        return f"unsloth does not do `{beyond}`"
    if shape.family not in FAMILIES:
        return f"unsloth has no kernels that were tried for models of the kind `{shape.family}`"
    return why_not_on(hardware)


def _why_not_tried(plan: Plan, hardware: Hardware) -> str:
    """Say so where no way through the model is estimated to fit, with either; empty if one is."""
    if plan.memory is None or not hardware.gpus:
        return ""
    need, room = plan.memory.most, room_to_try(hardware.gpus[0])
    told = f"{need / GIB:.1f} GiB are estimated at least, and there is room for {room / GIB:.1f}"
    return "" if need <= room else f"{told}: nothing to try unsloth with"


def why_not_on(hardware: Hardware) -> str:
    """Say what keeps unsloth from this machine; empty if nothing does."""
    gpu = next(iter(hardware.gpus), None)
    if gpu is None:
        return "unsloth needs an NVIDIA GPU, and none was found"
    if len(hardware.gpus) > 1:
        return f"unsloth trains on one GPU, and {len(hardware.gpus)} are visible, alike and free"
    if gpu.capability < BF16_CAPABILITY:
        return "unsloth is used in bfloat16 only, in which this GPU does not multiply"
    return "" if hardware.platform.startswith("Linux") else "unsloth was tried on Linux only"


@dataclass(frozen=True, kw_only=True, slots=True)
class Raced:
    """What an engine did with the longest examples."""

    tokens_per_second: float
    loss: float
    """Of a step before any update, in nats."""
    proved: bool
    """Whether every proof at its start held."""
    unproved: str = ""
    """What the first that did not hold has found."""


# Two engines round differently in bfloat16. Each is within 5 % of the gradient's norm on a small model (docs/speed-notes.md);
# what one gets wrong is far outside.
MOST_OF_GRADIENT = 0.14
MOST_OF_LOSS = 0.01


def faster(raced: Mapping[str, Raced], *, apart: float) -> Choice[str]:
    """Take the faster engine, unless what unsloth computed is not what torch does.

    Args:
        raced: By engine: both.
        apart: How far unsloth's gradient is from torch's, as a share of its norm.
    """
    own, other = raced["torch"], raced["unsloth"]
    speeds = f"{other.tokens_per_second:,.0f} tokens/s, and torch at {own.tokens_per_second:,.0f}"
    if not other.proved:
        return Choice("torch", f"unsloth is not proved: {other.unproved}")
    if not abs(other.loss - own.loss) <= MOST_OF_LOSS * abs(own.loss):
        return Choice("torch", f"unsloth's loss is {other.loss:.4g}, and torch's {own.loss:.4g}")
    if not apart <= MOST_OF_GRADIENT:
        return Choice("torch", f"unsloth's gradient is {apart:.0%} of its norm away from torch's")
    if other.tokens_per_second <= own.tokens_per_second:
        return Choice("torch", f"the faster here: unsloth is at {speeds}")
    return Choice("unsloth", f"the faster here: it is at {speeds}; loss and gradient are torch's within rounding")
