"""How long a run will take, and whether it is rehearsed for that."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from backprop.config import TrainConfig
from backprop.core.duration import (
    REHEARSED_ABOVE_S,
    SHARED_ABOVE_S,
    choose_compile,
    choose_gpus,
    choose_rehearsal,
    estimate_seconds,
    plan_and_seconds,
)
from backprop.core.hardware import Gpu, Hardware
from backprop.core.plan import Choice, DataShape, ModelShape, make_plan
from backprop.edges import device
from backprop.presets import GIB

CONFIG = TrainConfig(data=("x",), steps=3, batch_size=8)
TWO_CORES = Hardware(gpus=(), driver="", num_cpus=2, memory_bytes=16 * GIB, platform="Linux x86_64")
SMOLLM2 = ModelShape(hidden_size=576, intermediate_size=1536, num_layers=30, max_positions=8192, vocabulary=49152)
RANDOM_1B = ModelShape(hidden_size=2048, intermediate_size=8192, num_layers=16, max_positions=8192, vocabulary=49152)


def gpu(gib: int, capability: tuple[int, int] = (9, 0)) -> Hardware:
    card = Gpu(name="a GPU", uuid="1", memory_bytes=gib * GIB, memory_free_bytes=gib * GIB, capability=capability)
    return replace(TWO_CORES, gpus=(card,))


def estimate(
    hardware: Hardware,
    shape: ModelShape,
    *,
    steps: int = 3,
    tokens: int = 50,
    examples: int = 10,
    batch: int = 8,
    recompute: int | None = None,
) -> float:
    """Estimate steps of 8 examples, each of ``tokens`` tokens."""
    data = DataShape(num_examples=examples, num_tokens=examples * tokens)
    config = replace(CONFIG, steps=steps, batch_size=batch, recompute=recompute)
    plan = make_plan(config, hardware, shape, data, model=Choice("m", ""), max_length=Choice(100, ""))
    return estimate_seconds(plan, shape, data, hardware)


def test_the_estimate_is_operations_over_rate() -> None:
    # Two layers of 10 * (40 + 120) weights and 1000 of logits, 1200 tokens: 4 operations each on two cores of 45 GFLOP/s;
    # 6 where all is computed again, on a GPU of 8 GiB at half a TFLOP/s for each.
    shape = ModelShape(hidden_size=10, intermediate_size=40, num_layers=2, max_positions=100, vocabulary=100)
    assert estimate(TWO_CORES, shape) == pytest.approx(4 * 4200 * 1200 / 90e9, rel=1e-12)
    assert estimate(gpu(8), shape, recompute=2) == pytest.approx(6 * 4200 * 1200 / 4e12, rel=1e-12)
    assert estimate(gpu(8, (7, 5)), shape, recompute=2) == pytest.approx(6 * 4200 * 1200 / 1e12, rel=1e-12)
    assert estimate(gpu(8), shape, recompute=1) == pytest.approx(5 * 4200 * 1200 / 4e12, rel=1e-12)


def test_layers_are_compiled_by_the_time_that_all_gpus_need_together() -> None:
    card = gpu(8).gpus[0]
    data = DataShape(num_examples=1600, num_tokens=1600 * 300)
    found: list[bool] = []
    for number in (1, 8):
        hardware = replace(TWO_CORES, gpus=(card,) * number)
        config = replace(CONFIG, steps=200)
        plan, seconds = plan_and_seconds(
            config, hardware, RANDOM_1B, data, model=Choice("m", ""), max_length=Choice(400, "")
        )
        assert 5 * 60 < seconds < 40 * 60
        assert plan.gpus.value == number
        found.append(plan.compile.value)
    assert found == [True, False]


def chosen(hardware: Hardware, *, seconds: float = 3600, **options: bool) -> bool:
    config = replace(CONFIG, **options)
    data = DataShape(num_examples=10, num_tokens=500)
    plan = make_plan(config, hardware, SMOLLM2, data, model=Choice("m", ""), max_length=Choice(100, ""))
    return choose_compile(config, plan, hardware, seconds).value


def test_layers_are_compiled_where_a_long_run_on_a_gpu_gains_by_it() -> None:
    assert chosen(gpu(8))
    assert not chosen(gpu(8), seconds=60)
    assert not chosen(gpu(8, (7, 5)))
    assert not chosen(TWO_CORES)
    assert not chosen(gpu(8), deterministic=True)
    assert not chosen(gpu(8), compile=False)
    assert chosen(TWO_CORES, compile=True)


@pytest.mark.parametrize(
    ("hardware", "shape", "measured"),
    [
        # Tokens per second, from docs/benchmarks.md.
        pytest.param(TWO_CORES, SMOLLM2, 270, id="two cores"),
        pytest.param(gpu(80), RANDOM_1B, 20_150, id="H100, packed"),
        pytest.param(gpu(80), RANDOM_1B, 15_000, id="H100, LoRA"),
        pytest.param(gpu(80), RANDOM_1B, 11_000, id="H100, QLoRA"),
    ],
)
def test_runs_that_were_measured_are_estimated_at_their_time_or_up_to_four_times_it(
    hardware: Hardware, shape: ModelShape, measured: float
) -> None:
    took = 100 * 8 * 50 / measured
    assert took <= estimate(hardware, shape, steps=100) <= 4 * took


def test_each_pass_over_more_rows_of_any_length_takes_longer() -> None:
    once = estimate(TWO_CORES, SMOLLM2, steps=10)
    assert estimate(TWO_CORES, SMOLLM2, steps=20) == pytest.approx(2 * once)
    assert estimate(TWO_CORES, SMOLLM2, steps=10, tokens=100) == pytest.approx(2 * once)
    assert estimate(TWO_CORES, SMOLLM2, steps=10, batch=16, examples=20) == pytest.approx(2 * once)


def test_a_run_over_half_an_hour_is_rehearsed_and_the_reason_has_all_figures() -> None:
    just = choose_rehearsal(CONFIG, [REHEARSED_ABOVE_S], TWO_CORES)
    over = choose_rehearsal(CONFIG, [45 * 60], TWO_CORES)
    assert (just.value, over.value) == (False, True)
    assert over.reason == "45 minutes are estimated, at 90 GFLOP/s of this CPU, more than 30 minutes"
    assert "of this GPU, at most 30 minutes" in choose_rehearsal(CONFIG, [5], gpu(8)).reason


def test_the_runs_of_a_multi_run_are_estimated_together() -> None:
    assert choose_rehearsal(CONFIG, 3 * [11 * 60], TWO_CORES).value
    assert not choose_rehearsal(CONFIG, 2 * [11 * 60], TWO_CORES).value


@pytest.mark.parametrize("asked", [True, False])
def test_what_the_user_says_comes_first(asked: bool) -> None:
    for seconds in (1, 1e6):
        choice = choose_rehearsal(replace(CONFIG, rehearse=asked), [seconds], TWO_CORES)
        assert choice.value is asked
        assert choice.reason.startswith("set by `--")


@pytest.mark.parametrize(
    ("gpus", "seconds", "batch", "used", "why"),
    [
        (0, 1e5, 8, 1, "the CPU"),
        (1, 1e5, 8, 1, "no other"),
        (4, SHARED_ABOVE_S, 8, 1, "starting others takes as long"),
        (4, SHARED_ABOVE_S + 1, 8, 4, "all"),
        (4, 1e5, 3, 3, "a step has 3 examples"),
    ],
)
def test_gpus_are_shared_where_that_saves_more_than_it_costs(
    gpus: int, seconds: float, batch: int, used: int, why: str
) -> None:
    hardware = replace(TWO_CORES, gpus=gpus * gpu(80).gpus)
    data = DataShape(num_examples=10, num_tokens=100)
    config = replace(CONFIG, batch_size=batch)
    plan = make_plan(config, hardware, SMOLLM2, data, model=Choice("m", ""), max_length=Choice(100, ""))
    choice = choose_gpus(plan, hardware, seconds)
    assert choice.value == used
    assert why in choice.reason
    elsewhere = choose_gpus(plan, replace(hardware, platform="Windows AMD64"), seconds)
    assert elsewhere.value == 1


def test_only_gpus_that_are_alike_and_free_share_the_work_of_the_freest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    cards = [("a", "H100", 79), ("b", "H100", 80), ("c", "H100", 20), ("d", "A100", 80)]
    gpus = tuple(
        Gpu(name=name, uuid=uuid, memory_bytes=80 * GIB, memory_free_bytes=free * GIB, capability=(9, 0))
        for uuid, name, free in cards
    )
    found = device.use_one_gpu(replace(TWO_CORES, gpus=gpus))
    assert [one.uuid for one in found.gpus] == ["b", "a"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "b"
    # A second run of the same process sees one card, and others may still work beside it.
    assert device.use_one_gpu(replace(TWO_CORES, gpus=gpus[1:2])) == found


@pytest.mark.parametrize(
    ("name", "system", "wsl", "before", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", "linux", False, {}, "expandable_segments:True"),
        ("NVIDIA A40-8Q", "linux", False, {}, None),
        ("GRID A100-1-5CME", "linux", False, {}, None),
        ("NVIDIA GeForce RTX 4090", "linux", True, {}, None),
        ("NVIDIA GeForce RTX 4090", "win32", False, {}, None),
        ("NVIDIA H100", "linux", False, {"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ("NVIDIA H100", "linux", False, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
    ids=[
        "a card",
        "a virtual card",
        "a part of one",
        "WSL2",
        "Windows",
        "the user's word",
        "the user's word, as it was",
    ],
)
def test_memory_is_mapped_without_gaps_where_that_works(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    system: str,
    wsl: bool,
    before: dict[str, str],
    expected: str | None,
) -> None:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(variable, "")  # which is put back as it was after the test
        monkeypatch.delenv(variable)
    for variable, value in before.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr(device, "WSL", tmp_path if wsl else tmp_path / "none")
    device.use_one_gpu(replace(TWO_CORES, gpus=(replace(gpu(8).gpus[0], name=name),)))
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
