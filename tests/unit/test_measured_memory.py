"""What each phase is estimated to need, against what torch allocated on an H200 (scripts/bench-memory, 2026-11-30; some of the day before)."""

import csv
from pathlib import Path

import pytest

from backprop.config import TrainConfig
from backprop.core.memory import WORKSPACE, ModelShape
from backprop.core.phases import phases_of

TABLE = Path(__file__).parent.parent / "assets" / "memory-h200.csv"
POSITIONS = 32768


def shape(
    *sizes: int, keys: int, vocabulary: int, queries: int = 0, tied: bool = True, gemma: bool = False
) -> ModelShape:
    hidden, wide, layers = sizes
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=wide,
        num_layers=layers,
        max_positions=POSITIONS,
        vocabulary=vocabulary,
        query_size=queries,
        key_size=keys,
        tied=tied,
        num_norms=4 if gemma else 2,
        head_norms=gemma,
    )


SHAPES = {
    "0.5B": shape(896, 4864, 24, keys=128, vocabulary=151936),
    "1.5B": shape(1536, 8960, 28, keys=256, vocabulary=151936),
    "3B": shape(2048, 11008, 36, keys=256, vocabulary=151936),
    "7B": shape(3584, 18944, 28, keys=512, vocabulary=152064, tied=False),
    "llama-1B": shape(2048, 8192, 16, keys=512, vocabulary=128256),
    "llama-8B": shape(4096, 14336, 32, keys=1024, vocabulary=128256, tied=False),
    "gemma-1B": shape(1152, 6912, 26, queries=1024, keys=256, vocabulary=262144, gemma=True),
}


def rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def errors(phase: str) -> list[float]:
    found: list[float] = []
    for row in rows():
        config = TrainConfig(data=("x",), method=row["method"])
        tokens, again = int(row["length"]) * int(row["examples"]), int(row["recomputed"])
        several = row["several_passes"] == "1"
        compiled = row["compiled"] == "1"
        need = phases_of(
            config, SHAPES[row["shape"]], tokens=tokens, recomputed=again, compiled=compiled, several=several
        )
        expected = getattr(need, phase)
        if (
            phase == "load" and row["kernels_ahead"] == "0"
        ):  # what was measured before they were loaded beside the weights
            expected -= WORKSPACE
        if int(row[phase]):
            found.append(expected / int(row[phase]) - 1)
    return found


@pytest.mark.parametrize("phase", ["load", "step", "evaluation", "save"])
def test_each_phase_is_estimated_within_12_percent_and_never_2_percent_under(phase: str) -> None:
    found = errors(phase)
    print(f"{len(found)}: {min(found):+.1%} to {max(found):+.1%}")
    assert len(found) > 40
    assert -0.02 <= min(found) <= max(found) <= 0.12
    assert sorted(map(abs, found))[int(0.95 * len(found))] <= 0.05, "as close as what is measured may leave it"
