"""Rows of old tasks may be more than the memory holds: Python's objects do not grow with them."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, chat

from backprop import events
from backprop.edges import spill
from backprop.engine import load

pytestmark = [pytest.mark.model, pytest.mark.slow]

# One word each, of which the ledger keeps no sketch, and some 300 tokens.
ROWS = [chat(f"{n}x" * 60, "yes") for n in range(10_000, 10_316)]
FEWER, MORE = 30, 300
# An unpacked example takes 44 bytes a token; digests, lengths, positions and losses together about 200.
BYTES_PER_ROW = 1000


def test_ten_times_as_many_rows_of_old_tasks_take_no_more_memory(
    train: Callable[..., Run], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "IN_MEMORY_BYTES", 1000)

    real = load.load_model

    def load_model(*arguments: Any) -> Any:
        model = real(*arguments)
        tracemalloc.reset_peak()  # reading the weights takes more than the rows of this test
        return model

    monkeypatch.setattr(load, "load_model", load_model)

    def peak_of(num: int) -> int:
        old = (str(write(ROWS[:num], "old.jsonl")),)
        tracemalloc.start()
        run = train(ROWS[-16:], gate_data=old, steps=1, skip_proofs=True)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert run.all(events.Gated)
        return peak

    peak_of(FEWER)  # what is loaded once
    peaks = [peak_of(num) for num in (FEWER, MORE)]
    assert peaks[1] - peaks[0] < BYTES_PER_ROW * (MORE - FEWER)
