"""What each run of a multi-run trains on, and what it holds out."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import chat

from backprop.config import MultiRunConfig, TrainConfig
from backprop.errors import UsageError
from backprop.verbs import prepare
from backprop.verbs.parts import leaks, parts_of


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


def test_data_that_comes_again_is_read_once_and_replayed_from_the_others_alone(
    source: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what was replayed beside a data set that came again were its own rows."""
    read: list[str] = []
    real = prepare.rows_of
    monkeypatch.setattr(prepare, "rows_of", lambda source, **more: read.append(source) or real(source, **more))
    config = TrainConfig(data=(source("a"), source("b")))
    *_, third, fourth = parts_of(config, MultiRunConfig(runs=4, replay=0.5))
    assert read == list(config.data)
    for part, old in ((third, "b"), (fourth, "a")):
        rows = asked(part.judged.conversations)
        assert {one[0] for one in rows[:8]}.isdisjoint(old)
        assert [one[0] for one in rows[8:]] == [old] * 8


def test_held_out_rows_that_another_part_trains_on_are_told(write: Callable[..., Path]) -> None:
    """Each part was compared with its own held-out rows alone, and what it was never to see raised its scores later."""
    files = {
        "a": [chat(f"a {n}", "yes") for n in range(8)],
        "a-held": [*(chat(f"held {n}", "yes") for n in range(4)), chat("a 1", "yes")],
        "b": [*(chat(f"b {n}", "yes") for n in range(8)), chat("held 1", " yes "), chat("held 3", "yes")],
        "b-held": [chat("b-held", "yes"), chat("a 1", "no")],
    }
    paths = {name: str(write(rows, f"{name}.jsonl")) for name, rows in files.items()}
    config = TrainConfig(data=(paths["a"], paths["b"]), eval_data=(paths["a-held"], paths["b-held"]))
    general = prepare.judge_rows(prepare.rows_of(paths["b-held"], offline=True), config).conversations
    parts = parts_of(config, MultiRunConfig(runs=4, replay=0.5))
    told = "2 evaluation rows of part 1 a.jsonl are trained on, first in part 2 b.jsonl: its scores would flatter"
    assert leaks(parts, ()) == [told]
    assert leaks(parts, general) == [told]
    trained = parts[1].judged.conversations[:5]
    assert leaks(parts, trained) == [
        *("5 evaluation rows of general are trained on, first in part 2 b.jsonl: its scores would flatter", told)
    ]


def test_a_data_set_given_twice_is_no_leak_of_itself_nor_are_its_chunks(source: Callable[..., str]) -> None:
    both, held = source("a", 400), source("held")
    twice = parts_of(TrainConfig(data=(both, both)), MultiRunConfig())
    assert twice[0].held_out
    assert twice[0].held_out == twice[1].held_out
    chunks = [parts_of(TrainConfig(data=(both,), eval_data=more), MultiRunConfig(runs=2)) for more in ((), (held,))]
    assert [leaks(parts, ()) for parts in (twice, *chunks)] == [[], [], []]
