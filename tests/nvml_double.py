"""An NVML that answers as it is told: the real module's constants, errors and structures, with cards of its own.

`install` puts it in the place of `pynvml`. Each card goes through its readings, one each time its power is asked for, and
stays at the last.
"""
# ruff: noqa: N802 - the names are NVML's

import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pynvml

from backprop.core.hardware import Gpu

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Now:
    """A card at one moment."""

    core: int | None = 50
    memory: int | None = None
    watts: float = 300.0
    slowed: int = 0
    """Bits of `nvmlClocksEventReason…`."""
    xids: tuple[int, ...] = ()
    processes: tuple[tuple[int, int], ...] = ()
    """Ids, and bytes that they hold."""
    lost: bool = False


@dataclass
class Card:
    """A card, and what becomes of it."""

    readings: Sequence[Now] = (Now(),)
    sensor: Callable[[], Now] | None = None
    """Instead of readings: how it is whenever that is asked."""
    name: str = "a card"
    uuid: str = "GPU-0"
    slowdown: int | None = 93
    memory_most: int | None = None
    margin: int | None = None
    """Newer cards: how far it is from its reference; then `slowdown` is told from that too."""
    counts_energy: bool = True
    memory: int = 24 * GIB
    free: int = 23 * GIB
    capability: tuple[int, int] = (8, 6)
    answers: dict[str, Any] = field(default_factory=dict)
    """What further questions, by NVML's names, are answered with; an exception is raised."""
    position: int = -1
    joules: float = 1000.0
    waiting: list[int] = field(default_factory=list)

    @property
    def now(self) -> Now:
        return self.sensor() if self.sensor else self.readings[max(0, min(self.position, len(self.readings) - 1))]

    def go_on(self) -> None:
        self.position += 1
        self.joules += 0.5 * self.now.watts
        if self.position < len(self.readings):
            self.waiting += self.now.xids

    @property
    def gpu(self) -> Gpu:
        return Gpu(
            name=self.name,
            uuid=self.uuid,
            memory_bytes=self.memory,
            memory_free_bytes=self.free,
            capability=self.capability,
        )


def going(*temperatures: int, **others: Any) -> list[Now]:
    """Give readings of these temperatures."""
    return [Now(core=one, **others) for one in temperatures]


def unsupported(*_: Any) -> Any:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


class Nvml(types.ModuleType):
    """What is put in the place of `pynvml`."""

    def __init__(self, cards: Sequence[Card], *, driver: str = "580.95.05", fails: int | None = None) -> None:
        super().__init__("pynvml")
        self.__dict__.update({name: value for name, value in vars(pynvml).items() if not name.startswith("__")})
        for name in vars(pynvml):
            if name.startswith("nvml") and callable(vars(pynvml)[name]) and not isinstance(vars(pynvml)[name], type):
                setattr(self, name, self._question(name))
        self.cards, self.driver, self.fails = list(cards), driver, fails
        self.opened = 0

    def _question(self, name: str) -> Callable[..., Any]:
        def ask(*arguments: Any) -> Any:
            if self.fails is not None and name != "nvmlShutdown":
                raise pynvml.NVMLError(self.fails)
            card = arguments[0] if arguments and isinstance(arguments[0], Card) else None
            if card is not None and name in card.answers:
                answer = card.answers[name]
                if isinstance(answer, Exception):
                    raise answer
                return answer
            if card is not None and card.now.lost and name != "nvmlDeviceGetPowerUsage":
                raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
            return getattr(self, f"_{name}", unsupported)(*arguments)

        return ask

    def _nvmlInit(self) -> None:
        self.opened += 1

    def _nvmlShutdown(self) -> None:
        self.opened -= 1

    def _nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def _nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        found = [card for card in self.cards if card.uuid == uuid]
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return found[0]

    def _nvmlDeviceGetName(self, card: Card) -> str:
        return card.name

    def _nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def _nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:
        return types.SimpleNamespace(total=card.memory, free=card.free, used=card.memory - card.free)

    def _nvmlDeviceGetCudaComputeCapability(self, card: Card) -> tuple[int, int]:
        return card.capability

    def _nvmlDeviceGetPowerUsage(self, card: Card) -> int:
        card.go_on()
        if card.now.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return int(1000 * card.now.watts)

    def _nvmlDeviceGetTotalEnergyConsumption(self, card: Card) -> int:
        return int(1000 * card.joules) if card.counts_energy else unsupported()

    def _nvmlDeviceGetTemperature(self, card: Card, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return unsupported() if card.now.core is None else card.now.core

    def _nvmlDeviceGetMarginTemperature(self, card: Card) -> int:
        return unsupported() if card.margin is None else card.margin

    def _nvmlDeviceGetTemperatureThreshold(self, card: Card, kind: int) -> int:
        told = {
            pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN: card.slowdown if card.margin is None else None,
            pynvml.NVML_TEMPERATURE_THRESHOLD_MEM_MAX: card.memory_most,
        }.get(kind)
        return unsupported() if told is None else told

    def _nvmlDeviceGetFieldValues(self, card: Card, fields: Sequence[int]) -> list[Any]:
        found = []
        for number in fields:
            one = pynvml.c_nvmlFieldValue_t(fieldId=number, nvmlReturn=pynvml.NVML_ERROR_NOT_SUPPORTED)
            if number == pynvml.NVML_FI_DEV_MEMORY_TEMP and card.now.memory is not None:
                one.nvmlReturn, one.value.uiVal = pynvml.NVML_SUCCESS, card.now.memory
            if number == pynvml.NVML_FI_DEV_TEMPERATURE_SLOWDOWN_TLIMIT and card.margin is not None:
                one.nvmlReturn, one.value.siVal = pynvml.NVML_SUCCESS, -2
            found.append(one)
        return found

    def _nvmlDeviceGetCurrentClocksEventReasons(self, card: Card) -> int:
        return card.now.slowed

    def _nvmlDeviceGetComputeRunningProcesses_v3(self, card: Card) -> list[Any]:
        pids = ((os.getpid() if pid == 0 else pid, held) for pid, held in card.now.processes)
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in pids]

    def _nvmlEventSetCreate(self) -> list[Card]:
        return []

    def _nvmlDeviceRegisterEvents(self, card: Card, kinds: int, events: list[Card]) -> None:
        assert kinds == pynvml.nvmlEventTypeXidCriticalError
        events.append(card)

    def _nvmlEventSetWait_v2(self, events: list[Card], timeout_ms: int) -> Any:
        card = next((card for card in events if card.waiting), None)
        if card is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        return types.SimpleNamespace(eventData=card.waiting.pop(0))

    def _nvmlEventSetFree(self, events: list[Card]) -> None:
        events.clear()


def install(patch: Any, *cards: Card, **options: Any) -> Nvml:
    """Put a double with these cards in the place of `pynvml`."""
    double = Nvml([replace(card) for card in cards], **options)
    patch.setitem(sys.modules, "pynvml", double)
    return double
