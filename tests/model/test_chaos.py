"""Killed runs: the short form of scripts/chaos."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

CHAOS = ROOT / "scripts" / "chaos"
KILLS = 6


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    loader = SourceFileLoader("chaos", str(CHAOS))
    spec = spec_from_loader("chaos", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["chaos"] = module  # its dataclasses look themselves up there
    loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_if_nothing_had_happened() -> None:
    argv = [sys.executable, str(CHAOS), "--kills", str(KILLS), "--seed", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heads, *rows, _ = [line.rsplit(maxsplit=7) for line in done.stdout.splitlines()]
    assert len(rows) > 2, done.stdout
    kills, finished, equal, *faults = map(int, rows[-1][1:])
    assert kills >= KILLS, heads
    assert finished == equal >= KILLS // 4, "too few runs to say anything"
    assert faults == [0] * 4
    folder = done.stderr.split(";")[0].removeprefix("in ")
    assert not Path(folder).exists(), "the folders were not removed"


@pytest.fixture
def case(chaos: ModuleType, tmp_path: Path) -> object:
    """A case whose run ended as its reference did, without either having been started."""
    reference = chaos.Reference(folder=tmp_path, run=tmp_path / "run", trained=tmp_path / "trained" / "run")
    case = chaos.Case(seed=1, starter=None, reference=reference, home=tmp_path / "case")
    proofs = [{"name": "every example is seen as often as planned", "ok": True}]
    for run in (reference.run, reference.trained, case.run):
        (run / "lora").mkdir(parents=True)
        (run / chaos.ADAPTER).write_bytes(b"weights")
        (run / "run.json").write_text(json.dumps({"status": "finished", "result": {"steps": 40}, "proofs": proofs}))
        (run / "events.jsonl").write_text('{"event": "step", "step": 1, "loss": 2.5}\n')
    return case


def test_an_equal_run_is_no_fault(case: object) -> None:
    case.compare()
    assert case.faults == []
    assert case.counts["equal hash"] == 1


@pytest.mark.parametrize(
    ("spoil", "column"),
    [
        (lambda run: (run / "lora" / "adapter_model.safetensors").write_bytes(b"weighty"), "other"),
        (lambda run: shutil.rmtree(run / "lora"), "stray files"),
        (lambda run: (run / ".run.json.1.part").write_text(""), "stray files"),
        (lambda run: (run / "events.jsonl").write_text('{"event": "step", "step": 1, "loss": 2.6}\n'), "other"),
        (lambda run: (run / "events.jsonl").write_text(""), "other"),
        (lambda run: (run / "run.json").write_text('{"status": "running"}'), "other"),
    ],
    ids=["another adapter", "no adapter", "a file half-written", "another loss", "no steps", "not finished"],
)
def test_what_differs_is_a_fault(case: object, spoil: Callable[[Path], None], column: str) -> None:
    spoil(case.run)
    case.compare()
    assert case.counts[column] >= 1, case.faults


def test_every_damage_of_a_checkpoint_is_one(case: object) -> None:
    from backprop.edges import checkpoints
    from backprop.errors import UsageError

    for seed in range(30):
        folder = checkpoints.write(
            case.run / "checkpoints", {"step": 3}, lambda to: (to / "a.safetensors").write_bytes(b"abc"), keep=2
        )
        (case.run / "run.json").write_text('{"status": "interrupted"}')
        case.dice, case.history = random.Random(seed), [""]
        case.damage()
        with pytest.raises(UsageError, match="is damaged"):
            checkpoints.read(folder)
        shutil.rmtree(folder)
