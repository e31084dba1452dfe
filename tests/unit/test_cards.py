"""The GPUs of a run, looked after: each test is a sequence of readings, and what must come of it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pynvml
import pytest
from nvml_double import GIB, Card, Now, going, install

from backprop.core.heat import FATAL_XIDS, MEMORY_XIDS, Reading, limits_of, warmth_of
from backprop.edges import cards, nvml, stopping
from backprop.errors import DiskError, HardwareError, UsageError
from backprop.events import Paused, Phase, Spent, Warned

THERMAL = pynvml.nvmlClocksEventReasonHwThermalSlowdown


class Watched:
    """A run that is looked after: what it said, and how often it was saved."""

    def __init__(self, all_cards: cards.Cards, said: list[Any], double: Any) -> None:
        self.cards, self.said, self.double = all_cards, said, double
        self.saved = 0
        self.hangs = False

    def save(self) -> None:
        self.saved += 1

    def steps(self, *, until: type | None = None) -> None:
        """Train on, one step each hundredth of a second, until the cards have come to their last reading, or an event."""
        deadline = time.monotonic() + 10
        while not (
            self.all(until) if until else all(one.position > len(one.readings) + 1 for one in self.double.cards)
        ):
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.01)
            cards.rest(self.save)
        cards.rest(self.save)

    def all(self, kind: type) -> list[Any]:
        return [event for event in self.said if isinstance(event, kind)]

    @property
    def warned(self) -> str:
        return "\n".join(event.message for event in self.all(Warned))


class Warming:
    """A card that is at first cool, then too warm until that is seen, and then cools."""

    def __init__(self, *cooling: int, cool: Now | None = None, hot: Now | None = None) -> None:
        self.said: list[Any] = []
        self._cool, self._hot, self._cooling = cool or Now(core=70), hot or Now(core=91), list(cooling)
        self._warm_at = time.monotonic() + 0.1

    def __call__(self) -> Now:
        if time.monotonic() < self._warm_at:
            return self._cool
        if not any(isinstance(event, Paused) for event in self.said):
            return self._hot
        return replace(self._cool, core=self._cooling.pop(0) if len(self._cooling) > 1 else self._cooling[0])


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(cards, "EVERY_S", 0.01)

    @contextmanager
    def watched(*doubles: Card, asked_c: int | None = None) -> Iterator[Watched]:
        double = install(monkeypatch, *doubles)
        sensor = doubles[0].sensor if doubles else None
        said: list[Any] = sensor.said if isinstance(sensor, Warming) else []
        with cards.watching(said.append, asked_c=asked_c, started=time.monotonic()) as all_cards:
            cards.look_after([card.gpu for card in doubles])
            run = Watched(all_cards, said, double)
            yield run
        assert double.opened == run.hangs, "a driver that hangs is not even told that we are done"

    return watched


def test_a_cool_card_is_left_alone(watched: Callable[..., Any]) -> None:
    with watched(Card(going(50, 60, 70, 75, 78, 80, 82, 80))) as run:
        run.steps()
    assert run.said == []
    assert run.saved == 0


def test_a_warm_card_is_told_of_once_and_trains_on(watched: Callable[..., Any]) -> None:
    with watched(Card(going(60, 83, 84, 82, 85, 87, 84))) as run:
        run.steps()
    assert run.warned == "a card is at 83 °C: from 88 °C on, training pauses"
    assert not run.all(Paused)


def test_above_the_pause_limit_training_waits_until_it_has_cooled(watched: Callable[..., Any]) -> None:
    with watched(Card(sensor=Warming(90, 87, 85, 83, 82, 79, 75))) as run:
        run.steps(until=Phase)
    (paused,), (continued,) = run.all(Paused), run.all(Phase)
    assert paused.reason.startswith("a card is at ")
    degrees = int(continued.name.split(" at ")[1].split()[0])
    assert degrees < 83, "it must cool by five degrees, or it pauses again at once"
    assert run.saved == 0
    assert run.cards.spent().paused_seconds > 0


def test_memory_at_its_limit_is_let_cool_too(watched: Callable[..., Any]) -> None:
    warming = Warming(60, cool=Now(core=60, memory=80), hot=Now(core=60, memory=105))
    with watched(Card(sensor=warming, memory_most=105)) as run:
        run.steps(until=Phase)
    assert run.all(Paused)
    assert run.all(Phase)
    assert "its memory at 105 °C" in run.all(Paused)[0].reason


def test_above_the_stop_limit_it_is_saved_and_ended(watched: Callable[..., Any]) -> None:
    with watched(Card(going(80, 89, 93, 95))) as run, pytest.raises(HardwareError) as caught:
        run.steps()
    assert "its limit is 93 °C" in caught.value.message
    assert caught.value.code == 5
    assert "run the same command again" in (caught.value.hint or "")
    assert run.saved == 1


def test_one_reading_that_slipped_ends_nothing(watched: Callable[..., Any]) -> None:
    with watched(Card(going(70, 70, 99, 70, 255, 255, 255, 0, 70))) as run:
        run.steps()
    assert run.saved == 0


def test_a_card_that_does_not_cool_ends_the_run(watched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "PAUSE_MOST_S", 0.2)
    with watched(Card(going(70, 90))) as run, pytest.raises(HardwareError, match="still at 90 °C after a pause"):
        run.steps()
    assert run.saved == 1


def test_the_limit_that_was_asked_for_comes_first(watched: Callable[..., Any]) -> None:
    with watched(Card(sensor=Warming(69, 66, 64, cool=Now(core=50), hot=Now(core=71))), asked_c=70) as run:
        run.steps(until=Phase)
    assert "from 70 °C on" in run.warned
    assert "is at 64 °C" in run.all(Phase)[0].name


def test_a_limit_above_the_cards_own_is_refused(watched: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="`--gpu-max-temp 93` is not below 93"), watched(Card(), asked_c=93):
        pass


def test_a_newer_card_tells_its_limit_as_a_distance(watched: Callable[..., Any]) -> None:
    # As an H100 does: 30 °C is 57 degrees from its reference, and it slows down 2 above that.
    with watched(Card(sensor=Warming(70, cool=Now(core=30), hot=Now(core=85)), margin=57)) as run:
        run.steps(until=Phase)
    limits = limits_of(nvml.slowdown_c(Card(going(30), margin=57)), asked_c=None)
    assert limits is not None
    assert limits.stop_c == 89


def test_a_card_that_tells_no_temperature_is_trained_on(watched: Callable[..., Any]) -> None:
    with watched(Card([Now(core=None)] * 4, slowdown=None)) as run:
        run.steps()
    assert run.said == []


def test_a_limit_that_cannot_be_kept_is_told(watched: Callable[..., Any]) -> None:
    with watched(Card([Now(core=None)] * 4, slowdown=None), asked_c=70) as run:
        run.steps()
    assert run.warned == "a card tells no temperature: `--gpu-max-temp` is not kept"


def test_a_card_that_the_driver_does_not_show_is_trained_on(
    watched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an instance of a card in a container that may not look at the card itself."""
    with watched() as run:
        install(monkeypatch)
        cards.look_after([Card().gpu])
        cards.rest(run.save)
    assert run.said == []


def test_a_driver_that_hangs_holds_up_no_training(watched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "CLOSE_MOST_S", 0.1)
    monkeypatch.setattr(cards, "SILENT_S", 0.2)
    released = threading.Event()
    hot = Card(sensor=lambda: Now(core=86))
    with watched(hot) as run:
        time.sleep(0.1)
        monkeypatch.setattr(nvml, "read", lambda handle: released.wait(60) and Reading())
        run.hangs = True
        time.sleep(0.3)
        for _ in range(3):
            cards.rest(run.save)
        run.cards.spent()
    assert run.warned.count("(it does not answer): training goes on unwatched") == 1
    assert not released.is_set()
    released.set()


def test_a_reading_that_fails_otherwise_ends_no_watching(
    watched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that was too warm when its last reading came is not waited for."""
    monkeypatch.setattr(cards, "PAUSE_MOST_S", 0.2)
    taken: list[Any] = []

    def read(handle: Any) -> Reading:
        taken.append(handle)
        if len(taken) > 5:
            raise OSError("of another kind")
        return Reading(temperature_c=90)

    with watched(Card()) as run:
        monkeypatch.setattr(nvml, "read", read)
        time.sleep(0.2)
        cards.rest(run.save)
    assert not run.all(Paused)
    assert run.warned.count("OSError: of another kind") == 1


def test_a_card_that_is_lost_between_two_looks_is_told_of(watched: Callable[..., Any]) -> None:
    with pytest.raises(HardwareError, match="the driver has lost a card") as caught, watched(Card([Now(lost=True)])):
        pass
    assert caught.value.code == 5


def test_the_card_that_is_too_warm_is_named(watched: Callable[..., Any]) -> None:
    """And not the one that is warmer, which may be."""
    other = Card(going(94), uuid="GPU-1", name="another", slowdown=105)
    with watched(Card(sensor=Warming(70)), other) as run:
        run.steps(until=Phase)
    assert run.all(Paused)[0].reason.startswith("a card is at ")


def test_slow_clocks_are_told_of_once_with_the_reason(watched: Callable[..., Any]) -> None:
    power = pynvml.nvmlClocksEventReasonSwPowerCap
    brake = pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown | pynvml.nvmlClocksEventReasonHwSlowdown
    readings = [Now(slowed=one) for one in (0, power, power | THERMAL, THERMAL, 0, THERMAL, brake)]
    with watched(Card(readings)) as run:
        run.steps()
    assert run.warned.splitlines() == [
        "a card is slowed down by its temperature",
        "a card is slowed down by the power supply",
    ]


@pytest.mark.parametrize(
    ("processes", "found"),
    [
        (((0, 20 * GIB),), ""),
        (((0, 20 * GIB), (999_999_999, 2 * GIB)), "2.0 GiB"),
        (((999_999_999, 20 * GIB),), ""),
        (((999_999_998, 3 * GIB), (999_999_999, 20 * GIB)), "3.0 GiB"),
        (((0, 20 * GIB), (999_999_999, 100 * 2**20)), ""),
    ],
    ids=["alone", "another", "alone in a container", "another in a container", "a desktop"],
)
def test_other_programs_that_take_memory_are_told_of(
    watched: Callable[..., Any], processes: tuple[tuple[int, int], ...], found: str
) -> None:
    with watched(Card([Now(), *[Now(processes=processes)] * 3])) as run:
        run.steps()
    assert found in run.warned
    assert bool(run.warned) == bool(found)


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 63, 92, 94])
def test_an_error_of_some_program_is_told_of_and_ends_nothing(watched: Callable[..., Any], xid: int) -> None:
    with watched(Card([Now(), Now(xids=(xid,)), Now(), Now()])) as run:
        run.steps()
    assert run.warned == f"a card reports the error Xid {xid}"


@pytest.mark.parametrize("xid", sorted(FATAL_XIDS))
def test_an_error_of_the_card_ends_the_run_and_saves_what_can_be_trusted(watched: Callable[..., Any], xid: int) -> None:
    with watched(Card([Now(), Now(xids=(xid,)), Now(), Now()])) as run, pytest.raises(HardwareError) as caught:
        run.steps()
    assert f"(Xid {xid})" in caught.value.message
    assert run.saved == (0 if xid in MEMORY_XIDS else 1), "a memory that failed must not become a checkpoint"


def test_a_lost_card_ends_the_run_without_touching_it(watched: Callable[..., Any]) -> None:
    with watched(Card([Now(), Now(), Now(lost=True)])) as run, pytest.raises(HardwareError, match="has lost a card"):
        run.steps()
    assert run.saved == 0


def test_a_run_whose_card_failed_after_its_last_step_does_not_end_well(watched: Callable[..., Any]) -> None:
    with watched(Card([Now(), Now(xids=(48,)), Now()])) as run:
        run.cards.refuse_if_lost()
        time.sleep(0.3)
        with pytest.raises(HardwareError, match="Xid 48"):
            run.cards.refuse_if_lost()


@pytest.mark.parametrize("now", [Now(lost=True), Now(xids=(62,)), Now(xids=(119,))], ids=["lost", "62", "119"])
def test_a_run_that_hangs_with_its_card_is_ended(
    watched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, now: Now
) -> None:
    """Also where the thread that looks hangs in the driver, from then on."""
    ended: list[Any] = []
    monkeypatch.setattr(cards, "STUCK_S", 0.1)
    monkeypatch.setattr(cards, "CLOSE_MOST_S", 0.1)
    monkeypatch.setattr(stopping, "end_process", ended.append)
    released = threading.Event()
    with watched(Card([Now(), now])) as run:
        run.hangs = True
        time.sleep(0.1)
        monkeypatch.setattr(nvml, "read", lambda handle: released.wait(60) and Reading())
        time.sleep(0.3)
    released.set()
    assert ended
    assert ended[0].code == 5


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), DiskError("full")])
def test_what_cannot_be_saved_does_not_hide_why(watched: Callable[..., Any], error: Exception) -> None:
    def fail() -> None:
        raise error

    with watched(Card(going(70, 95, 95, 95))) as run:
        run.save = fail
        with pytest.raises(HardwareError, match="its limit is 93"):
            run.steps()


def test_every_card_is_looked_after_also_one_that_joins_later(watched: Callable[..., Any]) -> None:
    first, second = Card(going(60)), Card(going(60, 60, 60, 60, 95, 95), uuid="GPU-1", name="another")
    with watched(first) as run:
        run.double.cards.append(second)
        cards.look_after([first.gpu, second.gpu])
        with pytest.raises(HardwareError, match="another is at 95"):
            run.steps()


def test_an_interrupt_is_heard_while_it_waits(watched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread of a notebook, which no signal reaches: there `check` alone tells of the end."""

    def over() -> None:
        raise stopping.OutOfTime

    monkeypatch.setattr(cards, "PAUSE_MOST_S", 1)
    with watched(Card(going(70, 90))) as run:
        time.sleep(0.1)
        monkeypatch.setattr(stopping, "check", over)
        with pytest.raises(stopping.OutOfTime):
            cards.rest(run.save)
    assert run.cards.spent().paused_seconds > 0


@pytest.mark.parametrize("counts", [True, False])
def test_energy_comes_from_the_counter_or_else_from_the_power(watched: Callable[..., Any], counts: bool) -> None:
    with watched(Card([Now(watts=360)] * 20, counts_energy=counts)) as run:
        run.steps()
        first, second = run.cards.spent(), run.cards.spent()
        read = run.double.cards[0].position
    # The counter of the double goes on by half a second's power at each reading.
    expected = 360 * 0.5 * (read - 1) / 3600 if counts else 360 * first.seconds / 3600
    assert first.energy_wh == pytest.approx(expected, rel=0.3)
    assert second.energy_wh is not None
    assert second.energy_wh < first.energy_wh / 2, "what was told is not told again"


def test_a_machine_without_a_gpu_spends_time_alone() -> None:
    said: list[Any] = []
    with cards.watching(said.append, asked_c=None, started=time.monotonic() - 100) as all_cards:
        cards.look_after(())
        cards.rest(lambda: None)
    (spent,) = said
    assert isinstance(spent, Spent)
    assert spent.seconds == pytest.approx(100, abs=5)
    assert (spent.energy_wh, spent.hottest_c) == (None, None)
    assert all_cards.spent().seconds < 5


def test_without_limits_nothing_is_too_warm() -> None:
    assert limits_of(None, asked_c=None) is None
    assert warmth_of(Reading(temperature_c=120), None) == "cool"
    limits = limits_of(None, asked_c=70)
    assert limits is not None
    assert warmth_of(Reading(temperature_c=80), limits) == "stop"


def test_a_card_tells_of_its_cores_and_clock_and_a_part_of_it_has_a_part_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {"nvmlDeviceGetNumGpuCores": 16896, "nvmlDeviceGetMaxClockInfo": 1980}
    whole = Card(memory=80 * GIB, answers=told)
    part = Card(uuid="MIG-1", memory=10 * GIB, answers={"nvmlDeviceGetDeviceHandleFromMigDeviceHandle": whole})
    silent = Card(uuid="GPU-2")
    double = install(monkeypatch, whole, part, silent)
    found = [nvml.gpu_of(card) for card in double.cards]
    assert [(one.cores, one.clock_mhz) for one in found] == [(16896, 1980), (2112, 1980), (0, 0)]
