"""The NVIDIA driver's own account of its GPUs, through NVML. Asks only; what a card does not support is left out."""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from backprop.core.checkup import CardState
from backprop.core.hardware import Gpu
from backprop.core.heat import Reading
from backprop.errors import HardwareError

# Outside of these, a limit or a reading is a fault of a sensor or driver.
PLAUSIBLE_C = range(1, 130)
WITHOUT_DRIVER = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")
LOST = ("NVMLError_GpuIsLost", "NVMLError_ResetRequired")
MISMATCH = "NVMLError_LibRmVersionMismatch"


class GpuLostError(Exception):
    """The driver has lost a GPU that it knew, or cannot use it before a reset."""


@contextmanager
def opened() -> Generator[None]:
    """Let NVML be asked in the block.

    Raises:
        FileNotFoundError: If there is no driver.
        HardwareError: If it answers with an error, in the block too.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if type(error).__name__ in WITHOUT_DRIVER:
            raise FileNotFoundError("no NVIDIA driver") from error
        raise _told("the NVIDIA driver answers with", error) from error
    try:
        yield
    except pynvml.NVMLError as error:
        raise _told("a GPU answers with", error) from error
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _told(what: str, error: Exception) -> HardwareError:
    if type(error).__name__ == MISMATCH:
        return HardwareError(
            "the NVIDIA driver was updated, and the old one still runs: library and kernel module differ",
            hint="restart the machine; in a container, start the container again",
        )
    if type(error).__name__ in LOST:
        return HardwareError(
            f"{what}: {error}", hint="look at `dmesg | grep Xid`; restart the machine, or `nvidia-smi --gpu-reset`"
        )
    return HardwareError(f"{what}: {error}", hint="try `nvidia-smi`")


def visible_handles() -> list[Any]:
    """Give the GPUs that CUDA_VISIBLE_DEVICES names, by index, UUID or the beginning of one; all where it is not set.

    Raises:
        HardwareError: If it names one that is not here.
    """
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return every if visible is None else [_named(name.strip(), every) for name in visible.split(",")]


def _named(name: str, every: Sequence[Any]) -> Any:
    import pynvml

    if name.isdecimal() and int(name) < len(every):
        return every[int(name)]
    if name.startswith("GPU-"):
        found = [handle for handle in every if str(pynvml.nvmlDeviceGetUUID(handle)).startswith(name)]
    else:
        found = [handle for handle in [asked(lambda: pynvml.nvmlDeviceGetHandleByUUID(name))] if handle is not None]
    if len(found) != 1:
        known = ", ".join(f"{number} ({pynvml.nvmlDeviceGetUUID(one)})" for number, one in enumerate(every))
        raise HardwareError(
            f"CUDA_VISIBLE_DEVICES names a GPU that is not here: `{name}`",
            hint=f"unset it, or name one of: {known}" if known else "unset it",
        )
    return found[0]


def gpu_of(handle: Any) -> Gpu:
    """Describe a GPU; a part of a card (MIG) with as large a part of its cores as of its memory."""
    import pynvml

    memory, uuid = pynvml.nvmlDeviceGetMemoryInfo(handle), str(pynvml.nvmlDeviceGetUUID(handle))
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    card = card_of(uuid)
    whole = asked(lambda: pynvml.nvmlDeviceGetMemoryInfo(card).total) if uuid.startswith("MIG-") else memory.total
    share = int(memory.total) / int(whole) if whole else 0.0
    return Gpu(
        name=str(pynvml.nvmlDeviceGetName(handle)),
        uuid=uuid,
        memory_bytes=int(memory.total),
        memory_free_bytes=int(memory.free),
        capability=(int(major), int(minor)),
        cores=int(share * (asked(lambda: pynvml.nvmlDeviceGetNumGpuCores(card)) or 0)),
        clock_mhz=asked(lambda: pynvml.nvmlDeviceGetMaxClockInfo(card, pynvml.NVML_CLOCK_SM)) or 0,
    )


def card_of(uuid: str) -> Any:
    """Give the handle of the card with this id: sensors belong to the card, also where a part of it (MIG) is used."""
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    return pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if uuid.startswith("MIG-") else handle


def asked(question: Callable[[], Any]) -> Any:
    """Give the answer; None if this card or driver has none.

    Raises:
        GpuLostError: If the driver has lost the card.
    """
    import pynvml

    try:
        return question()
    except pynvml.NVMLError as error:
        if type(error).__name__ in LOST:
            raise GpuLostError(str(error)) from error
        return None


def read(handle: Any) -> Reading:
    """Ask a card how it is.

    Raises:
        GpuLostError: If the driver has lost it.
    """
    import pynvml

    power = asked(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    energy = asked(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    return Reading(
        temperature_c=_plausible(asked(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))),
        memory_temperature_c=_plausible(_field(handle, pynvml.NVML_FI_DEV_MEMORY_TEMP)),
        power_w=None if power is None else power / 1000,
        energy_j=None if energy is None else energy / 1000,
        slowed_by=slowed_by(handle),
        others_bytes=sum(held for _, held in others(handle, computing=True)),
    )


def slowed_by(handle: Any) -> tuple[str, ...]:
    """Say why a card's clocks are low, apart from what is normal: idling, its power limit under load, set clocks."""
    import pynvml

    # The older name is that of drivers before 535.
    found = asked(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    if found is None:
        found = asked(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    reasons = {
        pynvml.nvmlClocksEventReasonSwThermalSlowdown: "its temperature",
        pynvml.nvmlClocksEventReasonHwThermalSlowdown: "its temperature",
        pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "the power supply",
        pynvml.nvmlClocksEventReasonHwSlowdown: "its temperature or power supply",
    }
    told = dict.fromkeys(why for bit, why in reasons.items() if found & bit)
    return tuple(told)[:1]  # the last is set together with one of the others


def slowdown_c(handle: Any) -> int | None:
    """Give the temperature at which the driver slows the card down; None if it does not tell.

    Newer cards tell it as a distance from a reference, as they do their present temperature.
    """
    import pynvml

    margin = asked(lambda: pynvml.nvmlDeviceGetMarginTemperature(handle))
    at = _signed_field(handle, pynvml.NVML_FI_DEV_TEMPERATURE_SLOWDOWN_TLIMIT)
    now = asked(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    if None not in (margin, at, now):
        return _plausible(now + margin - at)
    return _plausible(_threshold(handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN))


def memory_limit_c(handle: Any) -> int | None:
    """Give the temperature that the card's memory may have at most; None if the driver does not tell."""
    import pynvml

    return _plausible(_threshold(handle, pynvml.NVML_TEMPERATURE_THRESHOLD_MEM_MAX))


def others(handle: Any, *, computing: bool) -> list[tuple[int, int]]:
    """Give the processes that compute on a card, other than this one and its children: id, and bytes they hold.

    In a container the driver tells of processes by numbers that mean nothing there.

    Args:
        computing: Whether this one computes on it: if no number is its own, the largest is then taken for it.
    """
    import pynvml

    running = asked(partial(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)) or ()
    found = sorted(((int(one.pid), int(one.usedGpuMemory or 0)) for one in running), key=lambda one: one[1])
    mine = {os.getpid(), *children_of(os.getpid())}
    known = [one for one in found if one[0] not in mine]
    return found[:-1] if computing and len(known) == len(found) else known


def children_of(pid: int) -> list[int]:
    """Give the processes that ``pid`` has started, on Linux."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except OSError:
        return []


class Xids:
    """The errors that the driver reports of a card, since this object was made. Not in WSL2, which has no such events."""

    def __init__(self, handle: Any) -> None:
        import pynvml

        self._events: Any = asked(pynvml.nvmlEventSetCreate)
        kinds = pynvml.nvmlEventTypeXidCriticalError
        if self._events is not None:
            asked(lambda: pynvml.nvmlDeviceRegisterEvents(handle, kinds, self._events))

    def new(self) -> Iterator[int]:
        """Give the numbers of those that came since this was last asked."""
        import pynvml

        while self._events is not None:
            event = asked(lambda: pynvml.nvmlEventSetWait_v2(self._events, 0))
            if event is None:
                return
            yield int(event.eventData)

    def close(self) -> None:
        """Listen no more."""
        import pynvml

        if self._events is not None:
            with suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(self._events)


def _plausible(value: int | None) -> int | None:
    return value if value in PLAUSIBLE_C else None


def _threshold(handle: Any, kind: int) -> int | None:
    import pynvml

    return asked(lambda: pynvml.nvmlDeviceGetTemperatureThreshold(handle, kind))


def _field(handle: Any, field: int) -> int | None:
    value = _field_value(handle, field)
    return None if value is None else int(value.uiVal)


def _signed_field(handle: Any, field: int) -> int | None:
    value = _field_value(handle, field)
    return None if value is None else int(value.siVal)


def _field_value(handle: Any, field: int) -> Any:
    import pynvml

    found = asked(lambda: pynvml.nvmlDeviceGetFieldValues(handle, [field]))
    return found[0].value if found is not None and found[0].nvmlReturn == pynvml.NVML_SUCCESS else None


def state_of(handle: Any, *, whole: bool = True) -> CardState:
    """Ask a card all that doctor looks at.

    Args:
        whole: Whether the whole card is to compute, and not an instance of it.

    Raises:
        GpuLostError: If the driver has lost it.
    """
    import pynvml

    now = read(handle)
    limit = asked(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    remapped = asked(lambda: pynvml.nvmlDeviceGetRemappedRows(handle)) or (0, 0, 0, 0)
    mig = asked(lambda: pynvml.nvmlDeviceGetMigMode(handle)) or (0, 0)
    persistence = asked(lambda: pynvml.nvmlDeviceGetPersistenceMode(handle))
    mode = asked(lambda: pynvml.nvmlDeviceGetComputeMode(handle))
    lanes = asked(lambda: pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle))
    most = asked(lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
    uncorrected = asked(
        lambda: pynvml.nvmlDeviceGetTotalEccErrors(
            handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        )
    )
    return CardState(
        temperature_c=now.temperature_c,
        slowdown_c=slowdown_c(handle),
        power_w=now.power_w,
        power_limit_w=None if limit is None else limit / 1000,
        clock_mhz=asked(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        max_clock_mhz=asked(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        slowed_by=now.slowed_by,
        others=tuple((_program(pid), held) for pid, held in others(handle, computing=False)),
        uncorrected=uncorrected,
        remap_pending=bool(remapped[2]),
        remap_failed=bool(remapped[3]),
        mig=whole and bool(mig[0]),
        persistence=None if persistence is None else bool(persistence),
        prohibited=mode == pynvml.NVML_COMPUTEMODE_PROHIBITED,
        exclusive=mode == pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS,
        link=(lanes, most) if lanes and most else None,
    )


def _program(pid: int) -> str:
    """Name another user's program, by what the system shows of it."""
    try:
        return f"{Path(f'/proc/{pid}/comm').read_text(encoding='utf-8').strip()} ({pid})"
    except OSError:
        return f"process {pid}"
