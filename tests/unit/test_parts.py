"""What each run of a multi-run trains on, and what it holds out."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import chat

from backprop.config import MultiRunConfig, TrainConfig
from backprop.errors import UsageError
from backprop.verbs.parts import parts_of


def asked(part: object) -> list[str]:
    return [one.messages[0]["content"] for one in part]  # type: ignore[attr-defined]


@pytest.fixture
def source(write: Callable[..., Path]) -> Callable[..., str]:
    return lambda word, num=8: str(write([chat(f"{word} {n}", "yes") for n in range(num)], f"{word}.jsonl"))


def test_fewer_runs_than_data_sets_are_refused_since_some_would_never_be_used(source: Callable[..., str]) -> None:
    config = TrainConfig(data=(source("a"), source("b"), source("c")))
    with pytest.raises(UsageError, match="`--runs 2` would leave out 1 of 3 `--data`"):
        parts_of(config, MultiRunConfig(runs=2))
    assert [part.name for part in parts_of(config, MultiRunConfig(runs=4))] == [
        *("1 a.jsonl", "2 b.jsonl", "3 c.jsonl", "4 a.jsonl")
    ]


def test_chunks_with_evaluation_data_train_on_every_row(source: Callable[..., str]) -> None:
    """Rows were held out of each chunk, and then neither trained on nor measured."""
    config = TrainConfig(data=(source("x", 500),), eval_data=(source("held"),))
    parts = parts_of(config, MultiRunConfig(runs=2))
    rows = [asked(part.judged.conversations) for part in parts]
    assert sorted(rows[0] + rows[1]) == sorted(f"x {n}" for n in range(500))
    assert [asked(part.held_out) for part in parts] == [[f"held {n}" for n in range(8)]] * 2


def test_replayed_rows_are_counted_and_stand_last(source: Callable[..., str]) -> None:
    config = TrainConfig(data=(source("a"), source("b")))
    first, second = parts_of(config, MultiRunConfig(replay=0.5))
    assert (first.judged.replayed, second.judged.replayed) == (0, 8)
    assert asked(second.judged.conversations)[:8] == [f"b {n}" for n in range(8)]
    assert all(one.startswith("a") for one in asked(second.judged.conversations)[8:])
