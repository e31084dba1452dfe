"""How long a run will take, and whether it is rehearsed for that."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shapes import QWEN25_7B

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
from backprop.core.passes import Passes
from backprop.core.plan import Choice, DataShape, ModelShape, make_plan
from backprop.core.rates import rate_of_gpu
from backprop.edges import device
from backprop.presets import GIB

CONFIG = TrainConfig(data=("x",), steps=3, batch_size=8)
TWO_CORES = Hardware(gpus=(), driver="", num_cpus=2, memory_bytes=16 * GIB, platform="Linux x86_64")
SMOLLM2 = ModelShape(hidden_size=576, intermediate_size=1536, num_layers=30, max_positions=8192, vocabulary=49152)
RANDOM_1B = ModelShape(hidden_size=2048, intermediate_size=8192, num_layers=16, max_positions=8192, vocabulary=49152)
QWEN25_15B = replace(
    QWEN25_7B, hidden_size=1536, intermediate_size=8960, query_size=1536, key_size=256, vocabulary=151936, tied=True
)


def gpu(gib: int, capability: tuple[int, int] = (9, 0), **told: Any) -> Hardware:
    given = {"name": "a GPU", **told}
    card = Gpu(uuid="1", memory_bytes=gib * GIB, memory_free_bytes=gib * GIB, capability=capability, **given)
    return replace(TWO_CORES, gpus=(card,))


H200 = gpu(139, name="NVIDIA H200", cores=16896, clock_mhz=1980)
RTX_3060 = gpu(12, (8, 6), name="NVIDIA GeForce RTX 3060", cores=3584, clock_mhz=2115)


def estimate(
    hardware: Hardware,
    shape: ModelShape,
    *,
    steps: int = 3,
    tokens: int = 50,
    examples: int = 10,
    batch: int = 8,
    length: int = 100,
    **options: Any,
) -> float:
    """Estimate steps of 8 examples, each of ``tokens`` tokens, of which the longest has ``length``."""
    data = DataShape(num_examples=examples, num_tokens=examples * tokens)
    config = replace(CONFIG, steps=steps, batch_size=batch, **options)
    plan = make_plan(config, hardware, shape, data, model=Choice("m", ""), max_length=Choice(length, ""))
    return estimate_seconds(config, plan, shape, data, hardware)


def test_the_estimate_is_operations_over_rate() -> None:
    # Two layers of 10 * (40 + 120) weights and 1000 of logits, 1200 tokens: 4 operations each on two cores of 45 GFLOP/s.
    shape = ModelShape(hidden_size=10, intermediate_size=40, num_layers=2, max_positions=100, vocabulary=100)
    assert estimate(TWO_CORES, shape) == pytest.approx(4 * 4200 * 1200 / 90e9, rel=1e-12)


@pytest.mark.parametrize(("recompute", "operations"), [(0, 4), (14, 5), (28, 6)])
def test_a_gpu_computes_what_its_cores_and_clock_allow_and_starts_kernels_meanwhile(
    recompute: int, operations: int
) -> None:
    # 8 examples of 1000 tokens through 7.07e9 weights in passes of 100 tokens at most; 5 ms for each of 28 layers.
    rate = 0.8 * 0.4 * 32 * 16896 * 1980e6
    each = ((operations * 7.07e9 * 100 / rate) ** 2 + (28 * 5e-3) ** 2) ** 0.5
    found = estimate(H200, QWEN25_7B, steps=1, tokens=1000, recompute=recompute, micro_batch=1)
    assert found == pytest.approx(80 * each, rel=1e-3)


def test_layers_are_compiled_by_the_time_that_all_gpus_need_together() -> None:
    card = gpu(8).gpus[0]
    data = DataShape(num_examples=1600, num_tokens=1600 * 300)
    found: list[bool] = []
    for number in (1, 8):
        hardware = replace(TWO_CORES, gpus=(card,) * number)
        config = replace(CONFIG, steps=1000)
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


def test_a_cpu_that_was_measured_is_estimated_at_its_time_or_up_to_four_times_it() -> None:
    # 246 to 343 tokens a second (docs/benchmarks.md).
    took = 100 * 8 * 50 / 308
    assert took <= estimate(TWO_CORES, SMOLLM2, steps=100) <= 4 * took


@pytest.mark.parametrize(
    ("shape", "method", "rows", "recompute", "length", "measured"),
    [
        # On an H200, from docs/benchmarks.md, layers as they are; then compiled.
        pytest.param(QWEN25_7B, "lora", 8, 0, 2048, 13_589, id="7B"),
        pytest.param(QWEN25_7B, "lora", 4, 14, 2048, 11_055, id="7B, half recomputed"),
        pytest.param(QWEN25_7B, "lora", 8, 28, 2048, 9_684, id="7B, all recomputed"),
        pytest.param(QWEN25_7B, "qlora", 8, 0, 2048, 13_393, id="7B in 4 bits"),
        pytest.param(QWEN25_7B, "qlora", 8, 28, 2048, 9_579, id="7B in 4 bits, all recomputed"),
        pytest.param(QWEN25_7B, "lora", 8, 0, 2048, 18_106, id="7B compiled"),
        pytest.param(QWEN25_7B, "lora", 1, 0, 2048, 14_334, id="7B compiled, short passes"),
        pytest.param(QWEN25_7B, "qlora", 1, 0, 2048, 9_783, id="7B in 4 bits compiled, short passes"),
        pytest.param(QWEN25_7B, "qlora", 2, 26, 2048, 13_080, id="7B in 4 bits compiled, 8.5 GiB"),
        pytest.param(QWEN25_7B, "lora", 2, 0, 8192, 15_772, id="7B compiled, long rows"),
        pytest.param(QWEN25_15B, "lora", 8, 0, 2048, 52_460, id="1.5B compiled"),
        pytest.param(QWEN25_15B, "qlora", 8, 0, 2048, 41_622, id="1.5B in 4 bits compiled"),
    ],
)
def test_gpu_runs_that_were_measured_are_estimated_within_a_fifth_below_their_time_and_twice_it(
    shape: ModelShape, method: str, rows: int, recompute: int, length: int, measured: float
) -> None:
    """A 7B was estimated at 7 to 12 times its time."""
    options = {"method": method, "micro_batch": rows, "recompute": recompute, "dequantize": False}
    seconds = estimate(H200, shape, steps=10, tokens=length, examples=80, length=length, **options)
    # Where layers are compiled in any case, the estimate is for what is slower.
    assert 0.8 <= seconds / (10 * 8 * length / measured) <= 2


@pytest.mark.parametrize(
    ("name", "capability", "cores", "clock_mhz", "sheet"),
    [
        # TFLOP/s in bfloat16 with sums in float32, not sparse, by the data sheets; clocks as drivers tell them.
        ("NVIDIA GeForce RTX 3060", (8, 6), 3584, 2115, 25.5),
        ("NVIDIA GeForce RTX 3090", (8, 6), 10496, 2100, 71.2),
        ("NVIDIA GeForce RTX 4090", (8, 9), 16384, 3105, 165.2),
        ("NVIDIA GeForce RTX 5090", (12, 0), 21760, 3090, 209.5),
        ("NVIDIA RTX A6000", (8, 6), 10752, 2100, 154.8),
        ("NVIDIA L4", (8, 9), 7424, 2040, 121),
        ("NVIDIA L40S", (8, 9), 18176, 2520, 362),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 6912, 1410, 312),
        ("NVIDIA H100 80GB HBM3", (9, 0), 16896, 1980, 989),
        ("NVIDIA B200", (10, 0), 18944, 1965, 2250),
        ("Tesla T4", (7, 5), 2560, 1590, 8.1),  # in float32
    ],
)
def test_cards_are_expected_to_reach_as_large_a_part_of_their_data_sheets(
    name: str, capability: tuple[int, int], cores: int, clock_mhz: int, sheet: float
) -> None:
    card = gpu(16, capability, name=name, cores=cores, clock_mhz=clock_mhz).gpus[0]
    assert 0.35 <= rate_of_gpu(card) / (sheet * 1e12) <= 0.55


def test_what_is_not_told_is_taken_from_the_memory() -> None:
    assert rate_of_gpu(gpu(24).gpus[0]) == pytest.approx(24e12)
    assert rate_of_gpu(gpu(24, (7, 5)).gpus[0]) == pytest.approx(6e12)


@pytest.mark.parametrize(
    ("hardware", "minutes", "tried"),
    [(H200, 4, False), (H200, 8, True), (RTX_3060, 8, False), (RTX_3060, 120, True)],
    ids=["short", "long", "few passes", "many passes"],
)
def test_ways_are_tried_where_that_takes_little_of_the_run(hardware: Hardware, minutes: float, tried: bool) -> None:
    """A slow card was to try six passes of a run that has twenty."""
    config = replace(CONFIG, method="qlora", steps=1)
    data = DataShape(num_examples=800, num_tokens=800 * 1500)
    given: dict[str, Any] = {"model": Choice("m", ""), "max_length": Choice(2048, "")}
    _, step = plan_and_seconds(config, hardware, QWEN25_7B, data, **given)
    plan, _ = plan_and_seconds(replace(config, steps=int(60 * minutes / step)), hardware, QWEN25_7B, data, **given)
    assert bool(plan.to_try) == tried
    assert all(isinstance(one, Passes) for one in plan.to_try)


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
