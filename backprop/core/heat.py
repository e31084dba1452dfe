"""How warm a GPU may get, and what a reading of it calls for: pure functions of what its driver says."""

from dataclasses import dataclass
from typing import Literal

# The driver slows a card down from its slowdown limit on; what is done before that is done without its help.
PAUSE_BELOW_C = 5
# Training goes on, and warnings begin, this far below the limit at which it pauses.
WARN_BELOW_C = 5
# Above a limit that was asked for, where the card names none of its own.
STOP_ABOVE_C = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a GPU's driver says at one moment; None where it does not say."""

    temperature_c: int | None = None
    memory_temperature_c: int | None = None
    power_w: float | None = None
    energy_j: float | None = None
    """Since the driver was loaded."""
    slowed_by: tuple[str, ...] = ()
    """Why its clocks are lower than they could be, apart from what is normal under load."""
    others_bytes: int = 0
    """Its memory that programs other than this one hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Temperatures in degrees Celsius; None where nothing is known to compare with."""

    warn_c: int
    """Also where a training that paused goes on."""
    pause_c: int
    stop_c: int
    memory_c: int | None = None
    """What the card's own driver names for its memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Harm:
    """Why a run must end now."""

    message: str
    memory_lost: bool = False
    """Whether what the GPU's memory holds may be wrong, or cannot be read."""


def limits_of(slowdown_c: int | None, *, asked_c: int | None, memory_c: int | None = None) -> Limits | None:
    """Set the limits by what the user asked for, else by the card's own.

    Args:
        slowdown_c: Where the driver begins to slow the card down.
        asked_c: `--gpu-max-temp`.
    """
    if asked_c is not None:
        pause = asked_c
    elif slowdown_c is not None:
        pause = slowdown_c - PAUSE_BELOW_C
    else:
        return None
    stop = pause + STOP_ABOVE_C if slowdown_c is None else slowdown_c
    return Limits(warn_c=pause - WARN_BELOW_C, pause_c=pause, stop_c=stop, memory_c=memory_c)


Warmth = Literal["cool", "warm", "pause", "stop"]


def warmth_of(reading: Reading, limits: Limits | None) -> Warmth:
    """Say what a temperature calls for. The memory, which has one limit only, is let cool at it."""
    if limits is None:
        return "cool"
    core, memory = reading.temperature_c, reading.memory_temperature_c
    if core is not None and core >= limits.stop_c:
        return "stop"
    if (core is not None and core >= limits.pause_c) or _above(memory, limits.memory_c):
        return "pause"
    if (core is not None and core >= limits.warn_c) or _above(memory, limits.memory_c, below=WARN_BELOW_C):
        return "warm"
    return "cool"


def _above(value: int | None, limit: int | None, *, below: int = 0) -> bool:
    return value is not None and limit is not None and value >= limit - below


# What NVIDIA's catalogue of Xid errors answers with a reset of the GPU or the machine, whoever caused it. Others are about
# one program: if it is this one, CUDA tells it by itself.
FATAL_XIDS = {
    48: "an error in its memory that could not be corrected",
    62: "its controller halted",
    64: "a bad row of its memory could not be replaced",
    79: "it has fallen off the bus",
    95: "an error in its memory that could not be contained",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "an error in its memory that could not be corrected",
}
MEMORY_XIDS = (48, 64, 79, 95, 140)
"""Those after which the memory may hold something else than was written, or cannot be read."""


def harm_of_xid(name: str, number: int) -> Harm | None:
    """Say whether an Xid error of the GPU called ``name`` ends a run; None if it does not."""
    why = FATAL_XIDS.get(number)
    if why is None:
        return None
    return Harm(message=f"{name} failed: {why} (Xid {number})", memory_lost=number in MEMORY_XIDS)
