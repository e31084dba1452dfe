"""Weighing answers before training: told as it goes, kept when it is stopped, and never believed of another run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from backprop import events
from backprop.edges import checkpoints, rundir
from backprop.engine import weighing
from backprop.engine.weighing import needed_of

pytestmark = pytest.mark.model

PAIRS = [{"prompt": f"question {n}", "chosen": "good " * (n % 3 + 1), "rejected": "bad"} for n in range(24)]
OPTIONS: dict[str, Any] = {
    "objective": "dpo",
    "steps": 6,
    "batch_size": 4,
    "eval_fraction": 0.25,
    "overwrite": False,
    "resume": "auto",
    "skip_proofs": True,
}
TOLD = "weighing the answers before training: "


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing, "WEIGHED_AT_ONCE", 4)
    monkeypatch.setattr(weighing, "TELL_EVERY_S", 0.0)


def weighed(run: Run) -> list[int]:
    """How many were weighed each time that it was told."""
    names = [phase.name.removeprefix(TOLD) for phase in run.all(events.Phase) if phase.name.startswith(TOLD)]
    assert {name.split(" of ")[1] for name in names} == {"24"}
    return [int(name.split(" of ")[0]) for name in names]


def adapter_of(run: Run) -> str:
    assert not run.all(events.Failed), run.failed
    assert not (run.folder / "checkpoints" / "weighed").exists()
    return rundir.sha256_of(run.folder / "lora" / "adapter_model.safetensors")


def stopped(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, error: type[BaseException], **options: Any
) -> None:
    """Train, and be stopped after three parts."""
    real, left = weighing.with_references, [3]

    def planted(*arguments: Any) -> Any:
        if not left[0]:
            raise error
        left[0] -= 1
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(weighing, "with_references", planted)
        if error is KeyboardInterrupt:
            assert train(PAIRS, **OPTIONS, **options).failed.code == 130
        else:
            with pytest.raises(error):
                train(PAIRS, **OPTIONS, **options)


@pytest.fixture
def undisturbed(train: Callable[..., Run]) -> str:
    run = train(PAIRS, **OPTIONS)
    assert weighed(run) == [0, 4, 8, 12, 16, 20, 24]
    adapter = adapter_of(run)
    rundir.remove(run.folder)
    return adapter


@pytest.mark.parametrize(
    ("error", "save_every_s", "kept"),
    [(KeyboardInterrupt, 1e9, 12), (ZeroDivisionError, 0.0, 12), (ZeroDivisionError, 1e9, 0)],
    ids=["Ctrl-C", "killed", "killed before anything was kept"],
)
def test_what_was_weighed_is_not_weighed_again(
    train: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: str,
    error: type[BaseException],
    save_every_s: float,
    kept: int,
) -> None:
    monkeypatch.setattr(weighing, "SAVE_EVERY_S", save_every_s)
    stopped(train, monkeypatch, error)
    again = train(PAIRS, **OPTIONS)
    assert weighed(again)[0] == kept
    assert adapter_of(again) == undisturbed


def test_what_was_damaged_is_weighed_again(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, undisturbed: str, tmp_path: Path
) -> None:
    stopped(train, monkeypatch, KeyboardInterrupt)
    file = tmp_path / "run" / "checkpoints" / "weighed" / weighing.REFERENCES
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = train(PAIRS, **OPTIONS)
    assert "is damaged" in again.warned
    assert weighed(again)[0] == 0
    assert adapter_of(again) == undisturbed


def test_what_was_weighed_of_other_rows_or_by_another_model_is_refused(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    stopped(train, monkeypatch, KeyboardInterrupt, model=model)
    other = train(PAIRS[:-1], **OPTIONS, model=model)
    assert (other.failed.code, "the rows of the data" in other.failed.message) == (2, True)
    weights = model / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    other = train(PAIRS, **OPTIONS, model=model)
    assert (other.failed.code, "the files of the model" in other.failed.message) == (2, True)
    weights.write_bytes(before)
    assert weighed(train(PAIRS, **OPTIONS, model=model))[0] == 12


def test_what_lies_there_of_another_run_is_refused(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped(train, monkeypatch, KeyboardInterrupt)
    kept = tmp_path / "run" / "checkpoints" / "weighed"
    before = checkpoints.read(kept).state
    references = (kept / weighing.REFERENCES).read_bytes()
    state = {**before, "run": {**before["run"], "data": "0"}}
    checkpoints.put(kept, state, lambda folder: (folder / weighing.REFERENCES).write_bytes(references) and None)
    other = train(PAIRS, **OPTIONS)
    assert (other.failed.code, "the rows of the data" in other.failed.message) == (2, True)


def test_only_what_is_needed_is_weighed() -> None:
    assert list(needed_of([0, 1, 0, 2, 0], 2, first=1)) == [0, 1, 3, 5, 6]


@pytest.mark.slow
def test_sigterm_ends_it_within_8_seconds_and_the_same_command_goes_on(
    tiny_model: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"question {n}", "chosen": "good " * 120, "rejected": "bad " * 120} for n in range(1500)]
    argv = [sys.executable, "-m", "backprop", "train", "--data", str(write(rows)), "--model", str(tiny_model), "--json"]
    argv += ["--objective", "dpo", "--steps", "2000", "--batch-size", "4", "--no-rehearse", "--skip-proofs"]

    def said_until_killed() -> tuple[Sequence[str], int, float]:
        """Kill it at the second word, which comes when some are weighed."""
        with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
            assert process.stdout is not None
            said: list[str] = []
            for line in process.stdout:
                if line.find(TOLD) >= 0:
                    said.append(json.loads(line)["name"].removeprefix(TOLD))
                if len(said) == 2:
                    break
            asked = time.monotonic()
            process.send_signal(signal.SIGTERM)
            said += [json.loads(line)["name"].removeprefix(TOLD) for line in process.stdout if TOLD in line]
            return said, process.wait(), time.monotonic() - asked

    ends = [said_until_killed() for _ in range(2)]
    assert [code for _, code, _ in ends] == [75, 75]
    assert max(seconds for _, _, seconds in ends) < 8
    firsts = [int(said[0].split(" of ")[0]) for said, _, _ in ends]
    assert all(before < after for before, after in pairwise(firsts)), ends
