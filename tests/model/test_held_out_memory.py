"""Held-out rows and those of old tasks may be more than the memory holds: Python's objects do not grow with them."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run, chat

from backprop import events
from backprop.edges import spill
from backprop.engine import objectives

pytestmark = [pytest.mark.model, pytest.mark.slow]

# One word each, of which the ledger keeps no sketch, and some 300 tokens.
ROWS = [chat(f"{n}x" * 60, "yes") for n in range(10_000, 10_316)]
FEWER, MORE = 30, 300
# An unpacked example takes 44 bytes a token; digests, lengths, positions and losses together about 200.
BYTES_PER_ROW = 1000


@pytest.mark.parametrize("option", ["eval_data", "gate_data"])
def test_ten_times_as_many_rows_take_no_more_memory(
    train: Callable[..., Run], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(spill, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(objectives, "MEASURED_AT_ONCE", 32)

    def peak_of(num: int) -> int:
        held_out = (str(write(ROWS[:num], "held.jsonl")),)
        tracemalloc.start()
        run = train(ROWS[-16:], **{option: held_out}, steps=1, skip_proofs=True)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        failed = run.all(events.Failed)
        assert not failed, failed
        return peak

    peak_of(FEWER)  # what is loaded once
    peaks = [peak_of(num) for num in (FEWER, MORE)]
    assert peaks[1] - peaks[0] < BYTES_PER_ROW * (MORE - FEWER)
