"""multi-run for real: what is delivered is the merge, whatever the mode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import backprop, chat

pytestmark = pytest.mark.model

OPTIONS = ["--steps", "3", "--batch-size", "4", "--lora-r", "4", "--skip-proofs"]


def adapter(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "lora" / "adapter_model.safetensors")


def rows(word: str) -> list[dict[str, object]]:
    return [chat(f"{word} {n}?", f"{word} is {n}.") for n in range(8)]


@pytest.fixture
def multi_run(tiny_model: Path, write: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    sources = [option for word in "abc" for option in ("--data", str(write(rows(word), f"{word}.jsonl")))]

    def multi_run(*options: str, data: list[str] = sources, rate: float = 0.01) -> Path:
        done = backprop("multi-run", *data, "--model", tiny_model, *OPTIONS, "--lr", str(rate), *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return tmp_path / "output"

    return multi_run


def test_the_delivered_adapter_is_the_slao_merge_of_the_runs_on_disk_measured_on_every_part_so_far(
    multi_run: Callable[..., Path],
) -> None:
    run = multi_run()
    result = json.loads((run / "run.json").read_text())["result"]
    assert [len(losses) for losses in result["loss_by_run_and_part"]] == [1, 2, 3]
    assert (result["runs"], result["merge_mode"]) == (3, "slao")
    trained = [adapter(run / "runs" / f"{number:03d}") for number in (1, 2, 3)]
    delivered = adapter(run)
    for name, tensor in delivered.items():
        if "lora_A" in name:
            expected = trained[2][name]
        else:
            # B_m after three merges: lambda = 1, 1/sqrt(2), 1/sqrt(3) (slao, arXiv:2512.23017).
            merged = trained[0][name]
            merged = merged + (trained[1][name] - merged) / 2**0.5
            expected = merged + (trained[2][name] - merged) / 3**0.5
        assert tensor.allclose(expected, atol=1e-6), name
    assert any(not delivered[name].equal(trained[2][name]) for name in delivered), "the last run is not the merge"


@pytest.mark.slow
def test_each_run_starts_from_the_last_fine_tuned_adapter_never_from_the_merged(
    multi_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backprop.core.slao import next_start
    from backprop.verbs import adapter as verb

    starts: list[Any] = []

    def watched(*arguments: Any, start: Any = None, **options: Any) -> Any:
        starts.append(start)
        return verb.train_one(*arguments, start=start, **options)

    monkeypatch.setattr("backprop.verbs.multi_run.train_one", watched)
    run = multi_run()
    assert starts[0] is None
    for number, start in enumerate(starts[1:], start=1):
        expected = next_start(adapter(run / "runs" / f"{number:03d}"), init="function-preserving")
        assert all(start[name].allclose(expected[name], atol=1e-6) for name in expected), f"run {number + 1}"


@pytest.mark.slow
def test_sequential_delivers_the_last_run(multi_run: Callable[..., Path]) -> None:
    run = multi_run("--merge-mode", "sequential")
    delivered, last = adapter(run), adapter(run / "runs" / "003")
    assert all(delivered[name].equal(last[name]) for name in delivered)


@pytest.mark.slow
def test_chunks_of_one_data_set_use_every_row_and_are_sequential(
    multi_run: Callable[..., Path], write: Callable[..., Path]
) -> None:
    data = ["--data", str(write(rows("x")[:7], "big.jsonl"))]
    run = multi_run("--runs", "2", data=data)
    assert json.loads((run / "run.json").read_text())["result"]["merge_mode"] == "sequential"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["rows"] for event in events if event["event"] == "data"] == [4, 3]
    assert json.loads((run / "runs" / "002" / "metrics.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_slao_on_chunks_of_one_data_set_is_told_to_be_neutral(
    multi_run: Callable[..., Path], write: Callable[..., Path]
) -> None:
    data = ["--data", str(write(rows("x"), "big.jsonl"))]
    run = multi_run("--runs", "2", "--merge-mode", "slao", data=data)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert "SLAO neither helps nor hurts" in next(event["message"] for event in events if event["event"] == "warning")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [(["--runs", "9"], 3, "8 rows cannot be cut into 9 runs"), (["--eval-data", "x.jsonl"], 2, "--eval-fraction")],
)
def test_what_cannot_be_a_multi_run_is_refused_before_any_work(
    write: Callable[..., Path], tmp_path: Path, options: list[str], code: int, said: str
) -> None:
    done = backprop("multi-run", "--data", write(rows("x"), "big.jsonl"), *options, cwd=tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert not (tmp_path / "output").exists()


def test_dry_run_shows_the_runs_and_writes_nothing(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    data = ["--data", write(rows("a"), "a.jsonl"), "--data", write(rows("b"), "b.jsonl")]
    done = backprop("multi-run", *data, "--model", tiny_model, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 runs on [8, 8] rows, merged by slao" in done.stderr
    assert not (tmp_path / "output").exists()


def test_bad_data_of_a_later_run_is_found_before_the_first(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    data = ["--data", str(write(rows("a"), "a.jsonl")), "--data", "missing.jsonl"]
    done = backprop("multi-run", *data, "--model", tiny_model, *OPTIONS, cwd=tmp_path)
    assert done.returncode == 3
    assert not (tmp_path / "output").exists()
