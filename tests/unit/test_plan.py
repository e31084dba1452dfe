"""Choices and their reasons."""

import math
from dataclasses import replace
from typing import Any

import pytest

from backprop.config import Objective, TrainConfig
from backprop.core.choice import Choice
from backprop.core.fitting import choose_method, least_bytes
from backprop.core.hardware import Gpu, Hardware
from backprop.core.passes import even, room_of
from backprop.core.plan import (
    DataShape,
    ModelShape,
    Plan,
    choose_max_length,
    choose_model,
    disk_bytes,
    make_plan,
    spill_bytes,
    taken_over,
)
from backprop.errors import HardwareError, UsageError
from backprop.presets import GIB, PRESETS

SMALL = ModelShape(hidden_size=576, intermediate_size=1536, num_layers=30, max_positions=8192, vocabulary=49152)


def machine(*gpu_gib: float) -> Hardware:
    gpus = tuple(
        Gpu(name="a GPU", uuid="GPU-1", memory_bytes=int(g * GIB), memory_free_bytes=int(g * GIB), capability=(8, 6))
        for g in gpu_gib
    )
    return Hardware(gpus=gpus, driver="", num_cpus=2, memory_bytes=16 * GIB, platform="Linux x86_64")


def plan(config: TrainConfig | None = None, *, examples: int = 100, hardware: Hardware | None = None) -> Plan:
    return make_plan(
        config or TrainConfig(data=("x",)),
        hardware or machine(),
        SMALL,
        DataShape(num_examples=examples, num_tokens=100 * examples),
        model=Choice("m", ""),
        max_length=Choice(100, ""),
    )


def test_every_choice_says_why() -> None:
    assert all(choice.reason for name, choice in plan().choices().items() if name not in ("model", "max_length"))


@pytest.mark.parametrize(
    ("gpu_gib", "expected"), [((), "smollm2-135m"), ((1,), "smollm2-135m"), ((8,), "qwen3-1.7b"), ((24,), "qwen3-8b")]
)
def test_the_default_model_is_the_largest_that_fits(gpu_gib: tuple[float, ...], expected: str) -> None:
    assert choose_model(None, machine(*gpu_gib)).value == expected


def test_a_preset_that_cannot_fit_is_refused_with_both_numbers_and_one_that_does() -> None:
    with pytest.raises(HardwareError) as raised:
        choose_model("qwen3-8b", machine(4))
    assert "4.0 GiB are free" in raised.value.message
    assert "qwen3-0.6b" in (raised.value.hint or "")


def test_seven_billion_weights_fit_a_small_card_in_4_bits_only() -> None:
    # The two cards of speed-minded beginners: 8 GiB holds 7B in 4 bits, 16 bits need more than 16.
    assert PRESETS["mistral-7b"].qlora_gib < 8 < 16 < PRESETS["mistral-7b"].lora_gib


@pytest.mark.parametrize(("examples", "steps"), [(8, 20), (100, 125), (400, 150), (1000, 125), (16_000, 1000)])
def test_small_data_is_passed_ten_times_and_large_data_once(examples: int, steps: int) -> None:
    assert plan(examples=examples).steps.value == steps


def test_epochs_become_steps() -> None:
    config = TrainConfig(data=("x",), epochs=1.5, batch_size=10)
    assert plan(config, examples=100).steps.value == 15


@pytest.mark.parametrize(("width", "expected"), [(2000, 5e-4), (576, 1.3e-3), (4096, 2.9e-4)])
def test_the_rate_falls_with_the_width(width: int, expected: float) -> None:
    # 5e-4 * (2000 / width) ** 0.781, to two digits.
    shape = ModelShape(hidden_size=width, intermediate_size=1, num_layers=1, max_positions=1, vocabulary=1)
    made = make_plan(
        TrainConfig(data=("x",)),
        machine(),
        shape,
        DataShape(num_examples=10, num_tokens=100),
        model=Choice("m", ""),
        max_length=Choice(10, ""),
    )
    assert made.learning_rate.value == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("batch", [1, 6, 7, 8, 12])
def test_the_micro_batch_divides_the_batch(batch: int) -> None:
    made = plan(TrainConfig(data=("x",), batch_size=batch))
    assert batch % made.micro_batch.value == 0


@pytest.mark.parametrize("hardware", [machine(), machine(24)], ids=["CPU", "GPU"])
@pytest.mark.parametrize(("asked", "size"), [(3, 3), (5, 4), (7, 4), (8, 8), (20, 8), (1, 1)])
def test_a_micro_batch_is_made_as_even_as_can_be(hardware: Hardware, asked: int, size: int) -> None:
    """A run with 3 of 8 examples at once, which a GPU's plan may choose, was done again with 2: not bit for bit."""
    made = plan(TrainConfig(data=("x",), batch_size=8, micro_batch=asked), hardware=hardware)
    assert made.micro_batch.value == size


def test_every_size_that_a_plan_may_choose_is_taken_as_it_is_when_the_run_is_done_again() -> None:
    for batch in range(1, 65):
        for size in {math.ceil(batch / passes) for passes in range(1, batch + 1)}:
            assert even(batch, size) == size


def test_nothing_is_cut_unless_the_model_has_no_positions() -> None:
    config = TrainConfig(data=("x",))
    assert choose_max_length(config, 100, SMALL).value == 100
    assert choose_max_length(config, 10_000, SMALL).value == 8192
    assert choose_max_length(TrainConfig(data=("x",), max_length=50), 100, SMALL).value == 50


def test_more_positions_than_the_model_has_are_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match="beyond the 8192 positions"):
        choose_max_length(TrainConfig(data=("x",), max_length=9000), 100, SMALL)


def test_weights_of_4_bits_without_a_gpu_are_refused_before_any_work() -> None:
    """bitsandbytes trains on a CPU without complaint, but most of the adapter stands still."""
    with pytest.raises(HardwareError, match="needs an NVIDIA GPU"):
        plan(TrainConfig(data=("x",), method="qlora"))
    assert plan(TrainConfig(data=("x",), method="qlora"), hardware=machine(8)).device.value == "cuda"


def test_main_memory_as_a_place_to_wait_needs_a_gpu_and_layers_that_are_recomputed() -> None:
    with pytest.raises(HardwareError, match="`--offload` needs an NVIDIA GPU, and none was found") as raised:
        plan(TrainConfig(data=("x",), offload=True))
    assert raised.value.hint == "leave it out"
    with pytest.raises(UsageError, match="`--offload` is for layers that are recomputed") as refused:
        TrainConfig(data=("x",), offload=True, recompute=0)
    assert refused.value.hint == "leave out `--recompute 0`"
    assert plan(TrainConfig(data=("x",), offload=False)).offload == Choice(False, "set by `--no-offload`")
    assert not TrainConfig(data=("x",), offload=False, recompute=0).offload


def test_choices_that_this_command_does_not_make_say_where_they_are_from() -> None:
    asked = TrainConfig(data=("x",), micro_batch=2)
    config = replace(asked, method="qlora", steps=3, engine="unsloth", seed=1)
    found = taken_over(asked, config, "from there")
    assert found == {name: Choice(getattr(config, name), "from there") for name in ("method", "steps", "engine")}


def test_the_disk_holds_an_adapter_of_twice_the_rank_for_pissa() -> None:
    data = DataShape(num_examples=100, num_tokens=10_000)
    of_8, of_16 = (disk_bytes(TrainConfig(data=("x",), lora_r=rank), SMALL, data) for rank in (8, 16))
    pissa = disk_bytes(TrainConfig(data=("x",), lora_r=8, pissa=True), SMALL, data)
    # Rank 8, float32, in each of 30 layers: two ends of four matrices of attention and of three of the feed-forward part.
    adapter = 4 * 8 * 30 * (4 * 2 * 576 + 3 * (576 + 1536))
    assert of_16 - of_8 == (2 + 3 * 3) * adapter  # two delivered ones, and three checkpoints with two moments each
    eight = [disk_bytes(TrainConfig(data=("x",), lora_r=rank, optimizer="adamw-8bit"), SMALL, data) for rank in (8, 16)]
    assert eight[1] - eight[0] == (2 + 3 * (1 + 2 * (1 + 4 / 256) / 4)) * adapter
    assert pissa - of_8 == 2 * adapter


@pytest.mark.parametrize(("objective", "bytes_each"), [("sft", 4 * 3), ("orpo", 4 * 3), ("dpo", 12 * 3 + 8 * 2)])
def test_the_disk_holds_what_checkpoints_know_of_each_example(objective: Objective, bytes_each: int) -> None:
    config = TrainConfig(data=("x",), objective=objective)
    fewer, more = (disk_bytes(config, SMALL, DataShape(num_examples=n, num_tokens=n)) for n in (1, 10_000_001))
    assert more - fewer == 10_000_000 * bytes_each


def test_tokens_are_kept_once_more_where_they_are_cut_and_beside_other_answers() -> None:
    plain, cut, kto = (
        spill_bytes(config, rows=1000, characters=3_000_000)
        for config in (
            TrainConfig(data=("x",)),
            TrainConfig(data=("x",), max_length=100),
            TrainConfig(data=("x",), objective="kto"),
        )
    )
    assert (plain, cut, kto) == (8_150_000, 16_300_000, 24_450_000)


def test_a_cpu_has_moments_of_8_bits_only_where_they_are_asked_for() -> None:
    assert plan().optimizer.value == "adamw"
    assert plan(TrainConfig(data=("x",), optimizer="adamw-8bit")).optimizer.reason == "set by `--optimizer`"


def test_moments_of_8_bits_come_before_weights_of_4() -> None:
    shape = replace(SMALL, hidden_size=4096, intermediate_size=11008, vocabulary=1000)
    config = TrainConfig(data=("x",), lora_r=64)

    def least(**options: Any) -> int:
        asked = replace(config, **options)
        return least_bytes(asked, shape, length=100, method="lora", dtype="bfloat16", main_bytes=16 * GIB)

    between = (least() + least(optimizer="adamw-8bit")) / 2  # of what LoRA needs with either
    hardware = machine(between / 0.95 / GIB + 0.5)
    chosen = choose_method(config, hardware, shape, length=100, four_bit=True)
    assert chosen.value == "lora"
    forced = replace(config, optimizer="adamw")
    assert choose_method(forced, hardware, shape, length=100, four_bit=True).value == "qlora"


@pytest.mark.parametrize(
    ("gpu_gib", "options", "four_bit", "expected"),
    [
        ((), {}, True, "lora"),
        ((1.0,), {}, True, "qlora"),
        ((1.0,), {}, False, "lora"),
        ((1.0,), {"method": "lora"}, True, "lora"),
        ((1.0,), {"method": "dora"}, True, "dora"),
        ((1.0,), {"pissa": True}, True, "lora"),
        ((24,), {}, True, "lora"),
    ],
)
def test_4_bits_are_chosen_where_only_they_fit(
    gpu_gib: tuple[float, ...], options: dict[str, Any], four_bit: bool, expected: str
) -> None:
    config = TrainConfig(data=("x",), **options)
    chosen = choose_method(config, machine(*gpu_gib), SMALL, length=100, four_bit=four_bit)
    assert chosen.value == expected
    assert chosen.reason
    least = {
        method: least_bytes(TrainConfig(data=("x",)), SMALL, length=100, method=method, dtype="bfloat16", main_bytes=0)
        for method in ("lora", "qlora")
    }
    if gpu_gib == (1.05,):
        assert least["qlora"] < room_of(machine(*gpu_gib).gpus[0]) < least["lora"]
