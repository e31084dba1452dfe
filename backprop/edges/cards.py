"""The GPUs of a run, looked after: read twice a second beside the training, which pauses or ends before one comes to harm.

A thread reads. The training asks between two steps with `rest`, which alone can wait, or save and end.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from backprop.core.hardware import Gpu
from backprop.core.heat import Harm, Limits, Reading, Warmth, harm_of_xid, limits_of, warmth_of
from backprop.edges import nvml, stopping
from backprop.errors import DiskError, HardwareError, UsageError
from backprop.events import Paused, Phase, Sink, Spent, Warned

EVERY_S = 0.5
# One reading above the stop limit may be a sensor's slip.
READINGS_TO_STOP = 2
# A card that has not cooled by then will not: its fan, or the room, is at fault.
PAUSE_MOST_S = 20 * 60.0
# What was spent is told so often, so that a kill loses little of it.
TELL_EVERY_S = 60.0
# A training that has not ended so long after its GPU failed hangs in the driver.
STUCK_S = 120.0
# A driver that hangs is not waited for at the end, and after this time it is told of.
CLOSE_MOST_S = 5.0
SILENT_S = 30.0
# What other programs must hold of a card to be worth a word.
OTHERS_LEAST_BYTES = 256 * 2**20
COOL_HINT = (
    "give it air, clean its fans, or lower its power (`nvidia-smi -pl`); then run the same command again: it goes on"
)
LOST_HINT = "look at `dmesg` and `backprop doctor`; then the same command goes on from the last checkpoint"


@dataclass
class _Card:
    """One GPU, and what was seen of it."""

    name: str
    handle: Any
    limits: Limits | None
    xids: nvml.Xids
    last: Reading = field(default_factory=Reading)
    warmth: Warmth = "cool"
    too_hot: int = 0
    """Readings above the stop limit in a row."""
    told: set[str] = field(default_factory=set[str])
    """What a warning was given of."""
    energy_j: float | None = None
    """Since that was last told; None if it tells neither energy nor power."""

    def take(self, now: Reading, seconds: float) -> Harm | None:
        """Take in a reading, ``seconds`` after the last one; say what harm is to be feared."""
        before, self.last = self.last, now
        self.warmth = warmth_of(now, self.limits)
        if now.energy_j is not None and before.energy_j is not None:
            self.energy_j = (self.energy_j or 0.0) + max(0.0, now.energy_j - before.energy_j)
        elif now.energy_j is None and now.power_w is not None:
            self.energy_j = (self.energy_j or 0.0) + now.power_w * seconds
        self.too_hot = self.too_hot + 1 if self.warmth == "stop" else 0
        if self.too_hot >= READINGS_TO_STOP and self.limits is not None:
            return Harm(message=f"{self.name} is {self.temperature}; its limit is {self.limits.stop_c} °C")
        return None

    def warnings(self) -> Generator[str]:
        """Give what is to be told of the last reading, each once in a run."""
        others = self.last.others_bytes
        found = {why: f"{self.name} is slowed down by {why}" for why in self.last.slowed_by}
        if self.warmth != "cool" and self.limits is not None:
            found["warm"] = f"{self.name} is {self.temperature}: from {self.limits.pause_c} °C on, training pauses"
        if others >= OTHERS_LEAST_BYTES:
            found["others"] = f"other programs hold {others / 2**30:.1f} GiB of the memory of {self.name}"
        yield from (text for key, text in found.items() if key not in self.told)
        self.told |= set(found)

    @property
    def temperature(self) -> str:
        """How warm it is, in words."""
        memory = self.last.memory_temperature_c
        return f"at {self.last.temperature_c} °C" + ("" if memory is None else f", its memory at {memory} °C")


class Cards:
    """The GPUs that a run uses, none at first.

    Args:
        asked_c: At which temperature to pause, if the user says so.
        started: When the run began, by the monotonic clock.
    """

    def __init__(self, say: Sink, *, asked_c: int | None, started: float) -> None:
        self._say, self._asked_c = say, asked_c
        self._cards: dict[str, _Card] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._stack = ExitStack()
        self._thread: threading.Thread | None = None
        self._warnings: list[str] = []
        self._harm: Harm | None = None
        self._ends_soon: threading.Timer | None = None
        self._blind = False
        self._told_at, self._read_at = started, time.monotonic()
        self._hottest_c: int | None = None
        self._paused_s = 0.0

    def add(self, gpus: Sequence[Gpu]) -> None:
        """Look after these too, as far as the driver tells of them.

        Raises:
            UsageError: If the limit that was asked for is not below a card's own.
            HardwareError: If the driver has lost one.
        """
        new = [gpu for gpu in gpus if gpu.uuid not in self._cards]
        if not new:
            return
        if self._thread is None:
            self._stack.enter_context(nvml.opened())
            self._thread = threading.Thread(target=self._watch, daemon=True)
        for gpu in new:
            self._add(gpu)
        if not self._thread.is_alive():
            self._thread.start()

    def _add(self, gpu: Gpu) -> None:
        try:
            handle = nvml.asked(lambda: nvml.card_of(gpu.uuid))
            now = nvml.read(handle) if handle else Reading()
            slowdown, memory = (nvml.slowdown_c(handle), nvml.memory_limit_c(handle)) if handle else (None, None)
            xids = nvml.Xids(handle) if handle else None
        except nvml.GpuLostError as error:
            raise HardwareError(f"the driver has lost {gpu.name}: {error}", hint=LOST_HINT) from error
        if slowdown is not None and self._asked_c is not None and self._asked_c >= slowdown:
            raise UsageError(
                f"`--gpu-max-temp {self._asked_c}` is not below {slowdown}, where {gpu.name} slows itself down",
                hint=f"give at most {slowdown - 1}, or leave it out",
            )
        if now.temperature_c is None and self._asked_c is not None:
            self._say(Warned(message=f"{gpu.name} tells no temperature: `--gpu-max-temp` is not kept"))
        if xids is not None:
            limits = limits_of(slowdown, asked_c=self._asked_c, memory_c=memory)
            with self._lock:
                self._cards[gpu.uuid] = _Card(gpu.name, handle, limits, xids)

    def _watch(self) -> None:
        while not self._over.wait(EVERY_S):
            seconds, self._read_at = time.monotonic() - self._read_at, time.monotonic()
            try:
                for card in [*self._cards.values()]:
                    self._read(card, seconds)
            except Exception as error:  # noqa: BLE001 - whatever a driver's library does, it must not end the watching
                self._cannot_read(f"{type(error).__name__}: {error}")

    def _read(self, card: _Card, seconds: float) -> None:
        """Ask a card, without the lock: a driver that hangs must not hold up the training."""
        xids: list[int] = []
        try:
            now = nvml.read(card.handle)
            xids += card.xids.new()
        except nvml.GpuLostError as error:
            self._failed(Harm(message=f"the driver has lost {card.name}: {error}", memory_lost=True))
        else:
            with self._lock:
                harm = card.take(now, seconds)
                self._harm = self._harm or harm
                self._warnings += [*card.warnings(), *(f"{card.name} reports the error Xid {one}" for one in xids)]
                self._hottest_c = max(self._hottest_c or 0, now.temperature_c or 0) or None
        for number in xids:
            if failure := harm_of_xid(card.name, number):
                self._failed(failure)

    def _failed(self, harm: Harm) -> None:
        """Let the run end: at its next step; or, since it may hang in the driver, as this thread may too, from a third one."""
        with self._lock:
            if self._harm is None or not self._harm.memory_lost:
                self._harm = harm
        if self._ends_soon is None:
            error = HardwareError(harm.message, hint=LOST_HINT)
            self._ends_soon = threading.Timer(STUCK_S, lambda: stopping.end_process(error))
            self._ends_soon.daemon = True
            self._ends_soon.start()

    def _cannot_read(self, why: str) -> None:
        """Go on without readings: what was read before holds no longer."""
        with self._lock:
            for card in self._cards.values():
                card.warmth = "cool"
            if not self._blind:
                self._warnings.append(f"the driver does not tell how the GPU is ({why}): training goes on unwatched")
            self._blind = True

    def rest(self, save: Callable[[], object]) -> None:
        """Between two steps: tell what was seen, wait while a card is too warm, and end before one comes to harm.

        Args:
            save: Called before the run ends, if what the GPU holds can be trusted.

        Raises:
            HardwareError: If the run must end.
        """
        self._tell(save)
        warm = self._warmer_than("warm")
        if not warm:
            return
        card, started = warm[0], time.monotonic()
        self._say(Paused(reason=f"{card.name} is {card.temperature}", temperature_c=card.last.temperature_c))
        try:
            while warm := self._warmer_than("cool"):
                card = warm[0]
                time.sleep(EVERY_S)
                stopping.check()
                if time.monotonic() - started > PAUSE_MOST_S:
                    minutes = f"{PAUSE_MOST_S / 60:.0f} minutes"
                    with self._lock:  # a worse one may have come meanwhile
                        still = f"{card.name} is still {card.temperature} after a pause of {minutes}"
                        self._harm = self._harm or Harm(message=still)
                self._tell(save)
        finally:
            waited = time.monotonic() - started
            self._paused_s += waited
        self._say(Phase(name=f"going on after {waited:.0f} s, {card.name} is {card.temperature}"))

    def _warmer_than(self, warmth: Warmth) -> list[_Card]:
        milder = ("cool", "warm") if warmth == "warm" else ("cool",)
        with self._lock:
            return [card for card in self._cards.values() if card.warmth not in milder]

    def _tell(self, save: Callable[[], object]) -> None:
        if self._cards and time.monotonic() - self._read_at > SILENT_S:
            self._cannot_read("it does not answer")
        with self._lock:
            warnings, self._warnings = self._warnings, []
            harm = self._harm
        for text in warnings:
            self._say(Warned(message=text))
        if harm is not None:
            if not harm.memory_lost:
                # What cannot be saved must not hide why the run ends; torch tells of a GPU's failure by a RuntimeError.
                with contextlib.suppress(RuntimeError, DiskError):
                    save()
            raise HardwareError(harm.message, hint=LOST_HINT if harm.memory_lost else COOL_HINT)
        if time.monotonic() - self._told_at >= TELL_EVERY_S:
            self._say(self.spent())

    def refuse_if_lost(self) -> None:
        """Do not let a run end well whose GPU has failed meanwhile.

        Raises:
            HardwareError: If one has.
        """
        if self._harm is not None and self._harm.memory_lost:
            raise HardwareError(self._harm.message, hint=LOST_HINT)

    def spent(self) -> Spent:
        """Give what was spent since this was last asked."""
        with self._lock:
            now = time.monotonic()
            joules = [card.energy_j for card in self._cards.values() if card.energy_j is not None]
            spent = Spent(
                seconds=round(now - self._told_at, 3),
                energy_wh=round(sum(joules) / 3600, 6) if joules else None,
                hottest_c=self._hottest_c,
                paused_seconds=round(self._paused_s, 3),
            )
            for card in self._cards.values():
                card.energy_j = None if card.energy_j is None else 0.0
            self._told_at, self._hottest_c, self._paused_s = now, None, 0.0
        return spent

    def close(self) -> None:
        """Look no more."""
        self._over.set()
        if self._ends_soon is not None:
            self._ends_soon.cancel()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(CLOSE_MOST_S)
            if self._thread.is_alive():
                return  # in the driver, which would keep this thread too
        for card in self._cards.values():
            card.xids.close()
        self._stack.close()


_current: Cards | None = None


@contextmanager
def watching(say: Sink, *, asked_c: int | None, started: float) -> Generator[Cards]:
    """Let `look_after` and `rest` be about the run of this block."""
    global _current
    cards = _current = Cards(say, asked_c=asked_c, started=started)
    try:
        yield cards
    finally:
        _current = None
        cards.close()


def look_after(gpus: Sequence[Gpu]) -> None:
    """Look after GPUs from here to the end of the run under way, as `Cards.add`."""
    if _current is not None:
        _current.add(gpus)


def rest(save: Callable[[], object]) -> None:
    """Do between two steps what `Cards.rest` does, in the run under way."""
    if _current is not None:
        _current.rest(save)
