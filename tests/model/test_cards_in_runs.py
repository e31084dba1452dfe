"""The whole program on a card that gets too warm, fails or is lost: training is the CPU's, the card an NVML of ours."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, UNEVEN, Run
from nvml_double import Card, Now, install

from backprop import events
from backprop.edges import cards

pytestmark = pytest.mark.model

OPTIONS: dict[str, Any] = {"steps": 12, "batch_size": 4, "save_steps": 50, "skip_proofs": True, "resume": "auto"}
OPTIONS["overwrite"] = False


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch, train: Callable[..., Run]) -> Callable[..., Run]:
    """Train as `train` does, with a card whose state depends on what the run has said so far."""

    def on_a_card(state: Callable[[list[Any]], Now], **options: Any) -> Run:
        said: list[Any] = []
        look_after, say_to = cards.look_after, cards.Cards.__init__
        card = Card(sensor=lambda: state(said))

        def heard(self: Any, say: Any, **more: Any) -> None:
            say_to(self, lambda event: (said.append(event), say(event))[1], **more)

        with monkeypatch.context() as patch:
            install(patch, card)
            patch.setattr(cards, "EVERY_S", 0.01)
            patch.setattr(cards.Cards, "__init__", heard)
            patch.setattr(cards, "look_after", lambda _: look_after([card.gpu]))
            patch.setattr("backprop.engine.trainer.cards.rest", _slow_rest(said))
            return train(**{**OPTIONS, **options})

    return on_a_card


def _slow_rest(said: list[Any]) -> Callable[..., None]:
    """Give steps of a tiny model the time in which a card is read, and let the card know of them."""
    rest = cards.rest

    def slow(save: Callable[[], object]) -> None:
        said.append("step")
        time.sleep(0.05)
        rest(save)

    return slow


def manifest_of(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "run.json").read_text())


def steps_in(said: list[Any]) -> int:
    return said.count("step")


def kinds_in(run: Run) -> list[str]:
    return [json.loads(line)["event"] for line in (run.folder / "events.jsonl").read_text().splitlines()]


def test_a_run_that_waited_for_its_card_ends_with_the_same_adapter(
    train: Callable[..., Run], on_a_card: Callable[..., Run]
) -> None:
    undisturbed = manifest_of(train(**OPTIONS))["result"]["adapter_sha256"]

    def state(said: list[Any]) -> Now:
        paused = any(isinstance(one, events.Paused) for one in said)
        return Now(core=90 if steps_in(said) >= 4 and not paused else 60, watts=200)

    run = on_a_card(state, overwrite=True, resume="never", price_per_hour=3.6, power_note="capped at <250> W")
    manifest = manifest_of(run)
    assert manifest["result"]["adapter_sha256"] == undisturbed
    (paused,) = run.all(events.Paused)
    assert "90 °C" in paused.reason
    assert any("going on after" in one.name and "60 °C" in one.name for one in run.all(events.Phase))
    assert "paused" in kinds_in(run)
    spent = manifest["spent"]
    assert spent["hottest_c"] == 90
    assert spent["energy_wh"] > 0
    assert spent["power_note"] == "capped at <250> W"
    assert spent["cost"] == pytest.approx(spent["seconds"] / 1000, abs=1e-3)
    page = (run.folder / "report.html").read_text()
    assert "energy of the GPUs, Wh" in page
    assert "capped at &lt;250&gt; W" in page
    assert "cost, by `--price-per-hour`" in page


@pytest.mark.parametrize(
    ("now", "saved", "why"),
    [
        (Now(core=95), 5, "its limit is 93"),
        pytest.param(Now(lost=True), 4, "the driver has lost a card", marks=pytest.mark.slow),
    ],
    ids=["too hot", "lost"],
)
def test_a_run_whose_card_is_in_danger_is_exit_5_and_goes_on_to_the_same_adapter(
    train: Callable[..., Run], on_a_card: Callable[..., Run], now: Now, saved: int, why: str
) -> None:
    undisturbed = manifest_of(train(**OPTIONS))["result"]["adapter_sha256"]
    options = {"save_steps": 4} if saved == 4 else {}
    # Once it was seen, it stays so: a pause of a quarter of a second is in between.
    run = on_a_card(
        lambda said: now if steps_in(said) >= 5 else Now(core=60), overwrite=True, resume="never", **options
    )
    assert run.failed.code == 5
    assert why in run.failed.message
    failed = manifest_of(run)
    assert failed["status"] == "failed"
    assert failed["spent"]["energy_wh"] > 0
    again = on_a_card(lambda said: Now(core=60), **options)
    (resumed,) = again.all(events.Resumed)
    assert resumed.step in ((saved,) if saved == 4 else range(5, 12))
    assert manifest_of(again)["result"]["adapter_sha256"] == undisturbed
    spent = again.all(events.Spent)
    for name in ("seconds", "energy_wh"):
        both = failed["spent"][name] + sum(getattr(one, name) for one in spent)
        assert manifest_of(again)["spent"][name] == pytest.approx(both, abs=0.1)


ON_A_CARD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import nvml_double
from backprop.edges import cards
sensor = lambda: nvml_double.Now(core=int(Path("temperature").read_text()))
card = nvml_double.Card(sensor=sensor)
sys.modules["pynvml"] = nvml_double.Nvml([card])
look_after, cards.EVERY_S = cards.look_after, 0.02
cards.look_after = lambda _: look_after([card.gpu])
from backprop.__main__ import main
main()
"""


@pytest.mark.parametrize("how", ["TERM", *(pytest.param(one, marks=pytest.mark.slow) for one in ("INT", "minutes"))])
def test_a_run_that_waits_for_its_card_is_stopped_at_once(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, how: str
) -> None:
    (tmp_path / "temperature").write_text("60")
    options = ["train", "--data", write(UNEVEN), "--model", tiny_model, "--steps", "100000", "--lora-r", "4", "--json"]
    options += ["--skip-proofs", "--no-rehearse", *(["--max-minutes", "0.6"] if how == "minutes" else [])]
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_CARD.format(tests=str(ROOT / "tests")), *map(str, options)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )
    assert process.stdout
    last: dict[str, Any] = {}
    for line in process.stdout:
        last = json.loads(line)
        if last["event"] == "step" and last["step"] == 3:
            (tmp_path / "temperature").write_text("91")
        if last["event"] == "paused":
            assert "91 °C" in last["reason"]
            stopped_at = time.monotonic()
            if how != "minutes":
                time.sleep(0.2)
                process.send_signal(signal.Signals[f"SIG{how}"])
    assert process.wait() == (130 if how == "INT" else 75)
    if how != "minutes":
        assert time.monotonic() - stopped_at < 8
    assert last["event"] == "error"
    state = json.loads((tmp_path / "output" / "run.json").read_text())
    assert state["status"] == "interrupted"
    assert state["spent"]["paused_seconds"] > 0
    assert list((tmp_path / "output" / "checkpoints").glob("step-*"))
