"""What a step is estimated to need, against what was measured, and what the plan makes of it."""

from dataclasses import replace
from typing import Any

import pytest
from shapes import QWEN25_7B

from backprop.config import TrainConfig
from backprop.core.choice import Choice
from backprop.core.duration import plan_and_seconds
from backprop.core.fitting import least_bytes
from backprop.core.hardware import Gpu, Hardware
from backprop.core.memory import (
    ROUNDING_4_BIT,
    WORKSPACE,
    ModelShape,
    adapter_weights,
    block_weights,
    met_weights,
    step_memory,
    word_weights,
)
from backprop.core.passes import Passes, needs, room_of, worth_trying
from backprop.core.phases import Footprint, Phases, mended, phases_of
from backprop.core.plan import DataShape, Plan, make_plan, memory_of
from backprop.errors import HardwareError
from backprop.presets import GIB

CONFIG = TrainConfig(data=("x",))


def test_weights_are_counted_as_the_model_has_them() -> None:
    # 7.62e9 in all, less norms and biases; 40.4e6 of LoRA with r=16, as PEFT prints them.
    assert block_weights(QWEN25_7B) + word_weights(QWEN25_7B) == pytest.approx(7_615_616_512, rel=1e-4)
    assert adapter_weights(QWEN25_7B, 16) == 40_370_176
    assert word_weights(replace(QWEN25_7B, tied=True)) == 152064 * 3584


# An H200 with torch 2.11 (docs/benchmarks.md): method, compiled, layers recomputed, tokens, GiB. Layers that are compiled and
# recomputed, all of them, are in tests/assets/memory-h200.csv.
MEASURED = [
    ("lora", True, 0, 8192, 49.4),
    ("lora", True, 0, 2048, 23.63),
    ("lora", True, 0, 16384, 83.96),
    ("lora", True, 14, 8192, 33.16),
    ("lora", False, 0, 8192, 60.63),
    ("lora", False, 0, 2048, 26.45),
    ("lora", False, 0, 16384, 106.49),
    ("lora", False, 14, 8192, 38.74),
    ("lora", False, 28, 16384, 22.27),
    ("lora", False, 28, 4096, 16.60),
    ("qlora", True, 0, 2048, 14.64),
    ("qlora", True, 0, 16384, 75.06),
    ("qlora", True, 14, 8192, 24.15),
    ("qlora", False, 0, 8192, 51.62),
    ("qlora", False, 0, 2048, 17.44),
    ("qlora", False, 0, 16384, 97.48),
    ("qlora", False, 14, 8192, 29.73),
    ("qlora", False, 28, 16384, 13.26),
    ("qlora", False, 28, 4096, 7.59),
]


@pytest.mark.parametrize(("method", "compiled", "recomputed", "tokens", "gib"), MEASURED)
def test_what_was_measured_is_estimated_within_12_percent_and_never_2_percent_under(
    method: str, compiled: bool, recomputed: int, tokens: int, gib: float
) -> None:
    config = replace(CONFIG, method=method)
    need = step_memory(config, QWEN25_7B, tokens=tokens, recomputed=recomputed, compiled=compiled).total
    print(f"{need / GIB / gib - 1:+.1%}")
    assert 0.98 <= need / GIB / gib <= 1.12


def expected(method: str, **options: Any) -> Phases:
    ways: dict[str, Any] = {"tokens": 8192, "recomputed": 0, "compiled": False, **options}
    return phases_of(replace(CONFIG, method=method), QWEN25_7B, **ways)


def test_loading_holds_the_weights_and_what_becomes_of_them() -> None:
    base, adapter = 7_615_000_000, adapter_weights(QWEN25_7B, 16)
    largest = 3584 * 18944
    assert expected("lora").load - WORKSPACE == pytest.approx(2 * base + 4 * adapter, rel=0.001)
    # Each weight comes in 16 bits before it is held in 4; the adapter, which comes later, is smaller here.
    four_bit = block_weights(QWEN25_7B) * 0.5159 + 28 * 7 * ROUNDING_4_BIT + 2 * word_weights(QWEN25_7B)
    assert expected("qlora").load - WORKSPACE == pytest.approx(four_bit + 2 * largest, rel=0.001)
    assert expected("dora").load - WORKSPACE == pytest.approx(2 * base + 4 * adapter + 12 * largest, rel=0.001)
    # In 16 bits, a copy of it, and that in float32.
    assert expected("full").load - WORKSPACE == pytest.approx(6 * base, rel=0.001)


def test_words_that_are_tied_are_copied_twice_while_a_whole_model_is_loaded() -> None:
    small = replace(QWEN25_7B, num_layers=1, tied=True)
    found = phases_of(replace(CONFIG, method="full"), small, tokens=1, recomputed=0, compiled=False).load
    weights, words = block_weights(small) + word_weights(small), word_weights(small)
    assert found - WORKSPACE == 4 * weights + 6 * words > 6 * weights


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "full"])
def test_evaluating_needs_less_than_a_step_and_saving_nothing_but_what_is_held(method: str) -> None:
    found = expected(method)
    assert found.save < found.evaluation < found.step
    assert found.merge == 0
    assert found.most == found.step
    assert replace(found, load=found.step + 1).most == found.step + 1
    assert expected(method, tokens=16384).save == found.save


def test_an_adapter_in_4_bits_is_held_in_16_bits_with_its_moments() -> None:
    assert expected("lora").moments == 2 * expected("qlora").moments == 8 * adapter_weights(QWEN25_7B, 16)


def test_a_second_pass_finds_the_gradients_of_the_first() -> None:
    gradients = 4 * adapter_weights(QWEN25_7B, 16)
    assert expected("lora").step - expected("lora", several=False).step == gradients


def test_what_is_measured_of_a_step_mends_what_is_expected_of_all_phases_after_it() -> None:
    before = Phases(load=50, step=400, evaluation=170, save=120, moments=20)
    after = mended(before, Footprint(held=90, peak=300))
    assert after == Phases(load=50, step=320, evaluation=160, save=110, moments=20), "and moments come later"
    assert mended(before, Footprint(held=110, peak=320), updated=True) == after
    copying = replace(before, save=130, copied=10)
    assert mended(copying, Footprint(held=90, peak=300)) == replace(after, save=120, copied=10)


def test_norms_beside_the_usual_are_kept_in_float32() -> None:
    def kept(shape: ModelShape) -> int:
        return step_memory(CONFIG, shape, tokens=1, recomputed=0, compiled=False).kept

    four = replace(QWEN25_7B, num_norms=4)
    assert kept(four) - kept(QWEN25_7B) == 28 * 2 * 4 * 3584
    assert kept(replace(four, head_norms=True)) - kept(four) == 28 * 4 * (3584 + 512)


def test_the_plan_tells_what_each_phase_needs_and_makes_room_for_the_fullest() -> None:
    plan, need = planned(24)
    assert plan.memory is not None
    assert plan.memory.step == need
    assert f"about {plan.memory.most / GIB:.1f} GiB at the fullest" in plan.micro_batch.reason


def test_the_memory_of_each_way_through_the_model_is_known_planned_or_not() -> None:
    plan, _ = planned(80)
    as_planned = {"tokens": plan.micro_batch.value * 2048, "recomputed": plan.recompute.value, "offloaded": False}
    assert memory_of(CONFIG, plan, **as_planned) == plan.memory
    other = memory_of(CONFIG, plan, tokens=2048, recomputed=28, offloaded=True)
    assert plan.memory is not None
    assert other is not None
    assert other.load == plan.memory.load
    assert other.step < plan.memory.step
    assert other.evaluation < plan.memory.evaluation


def planned(
    gib: float, *, shape: ModelShape = QWEN25_7B, length: int = 2048, eight_bit: bool = False, **options: object
) -> tuple[Plan, int]:
    """Plan a long run, of the 7B or another, and give what its step is estimated to need."""
    config = replace(CONFIG, **options)
    card = Gpu(name="a GPU", uuid="1", memory_bytes=int(gib * GIB), memory_free_bytes=int(gib * GIB), capability=(9, 0))
    hardware = Hardware(gpus=(card,), driver="", num_cpus=8, memory_bytes=64 * GIB, platform="Linux x86_64")
    data = DataShape(num_examples=10_000, num_tokens=10_000 * length)
    chosen = {"model": Choice("m", ""), "max_length": Choice(length, "")}
    plan, _ = plan_and_seconds(config, hardware, shape, data, **chosen, eight_bit=eight_bit)
    config = replace(config, optimizer=plan.optimizer.value)
    tokens = plan.micro_batch.value * length
    again, offloaded = plan.recompute.value, plan.offload.value
    need = step_memory(config, shape, tokens=tokens, recomputed=again, compiled=plan.compile.value, offloaded=offloaded)
    return plan, need.total


@pytest.mark.parametrize("gib", [8, 12, 16, 24, 40, 80, 141])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_what_is_planned_fits_where_anything_does(gib: int, method: str) -> None:
    plan, need = planned(gib, method=method)
    fits = gib >= 24 or method == "qlora"
    room = room_of(Gpu(name="", uuid="", memory_bytes=gib * GIB, memory_free_bytes=gib * GIB, capability=(9, 0)))
    assert (need <= room) == fits
    if not fits:  # the least there is
        assert plan.micro_batch.value == 1
        assert plan.recompute.value >= 26


def test_a_large_card_recomputes_nothing_and_one_in_between_a_part() -> None:
    assert planned(141)[0].recompute.value == 0
    assert planned(141)[0].micro_batch.value > 1
    assert 0 < planned(24)[0].recompute.value < 28
    assert planned(8, method="qlora")[0].recompute.value >= 26


def test_the_inputs_of_layers_wait_in_main_memory_where_nothing_else_fits() -> None:
    assert not planned(12, method="qlora")[0].offload.value
    # What 8 GB may have free beside a desktop: with them on the GPU, 6.9 GiB would be needed.
    plan, need = planned(7.5, method="qlora")
    assert (plan.micro_batch.value, plan.recompute.value, plan.offload.value) == (1, 28, True)
    assert 6.5 * GIB < need < 6.6 * GIB
    assert planned(7, method="qlora", recompute=20)[0].offload.value is False


@pytest.mark.parametrize(
    ("gib", "compiled", "reason"),
    [(7.5, True, "minutes are estimated"), (7.2, False, "needs more memory than there is"), (6.0, False, "needs more")],
)
def test_what_fits_only_uncompiled_or_not_at_all_is_not_compiled(gib: float, compiled: bool, reason: str) -> None:
    plan, need = planned(gib, method="qlora", eight_bit=True)
    assert plan.compile.value is compiled
    assert reason in plan.compile.reason
    if gib > 7:
        assert plan.optimizer.value == "adamw", "what is compiled must not decide the result"
    more = planned(gib, method="qlora", eight_bit=True, compile=True)
    assert more[1] >= need
    assert more[0].compile.reason == "set by `--compile`"


def test_the_inputs_of_layers_wait_in_main_memory_where_that_is_asked_for() -> None:
    plan, _ = planned(80, offload=True)
    assert plan.offload == Choice(True, "set by `--offload`")
    assert plan.recompute.value == 28
    assert plan.recompute.reason.startswith("all layers, for `--offload`; about ")
    assert plan.micro_batch.value > 1
    assert {(one.recomputed, one.offloaded) for one in plan.to_try} == {(28, True)}
    plan, _ = planned(80, offload=True, recompute=10, micro_batch=2)
    assert (plan.micro_batch.value, plan.recompute.value, plan.offload.value) == (2, 10, True)
    assert plan.recompute.reason == "set by `--recompute`, of 28 layers"


def test_nothing_waits_in_main_memory_where_that_is_forbidden() -> None:
    plan, need = planned(7, method="qlora", offload=False)
    assert plan.offload == Choice(False, "set by `--no-offload`")
    assert not any(one.offloaded for one in plan.to_try)
    room = room_of(Gpu(name="", uuid="", memory_bytes=0, memory_free_bytes=7 * GIB, capability=(9, 0)))
    assert need > room, "and so it does not fit"
    least = {
        offload: least_bytes(replace(CONFIG, offload=offload), QWEN25_7B, length=2048, method="lora", **MACHINE)
        for offload in (None, True, False)
    }
    assert least[None] == least[True] < least[False]


MACHINE: dict[str, Any] = {"dtype": "bfloat16", "main_bytes": 64 * GIB}


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({}, "28 layers begin with takes 24.5 GiB of main memory with 1 example at once", "`--max-length`"),
        ({"recompute": 7, "micro_batch": 5}, "7 layers begin with takes 24.5 GiB of main memory with 4 ex", "`--micro"),
    ],
    ids=["all", "some"],
)
def test_a_main_memory_that_is_too_small_to_wait_in_is_told_with_both_numbers(
    options: dict[str, Any], said: str, hint: str
) -> None:
    # 65,536 tokens of 3,584 numbers of 4 bytes are 0.875 GiB for each layer.
    with pytest.raises(HardwareError, match=said) as raised:
        planned(141, length=65_536, offload=True, batch_size=8, **options)
    assert "16.0 may be held" in raised.value.message
    assert hint in (raised.value.hint or "")


@pytest.mark.parametrize(("gib", "whole"), [(16, False), (24, False), (80, False), (141, True)])
def test_weights_of_4_bits_are_held_in_16_where_that_costs_nothing(gib: int, whole: bool) -> None:
    plan, _ = planned(gib, method="qlora")
    packed, _ = planned(gib, method="qlora", dequantize=False)
    assert plan.dequantize.value is whole
    assert (plan.micro_batch.value, plan.recompute.value) == (packed.micro_batch.value, packed.recompute.value)
    assert packed.dequantize == Choice(False, "set by `--no-dequantize`")
    assert plan.memory
    assert packed.memory
    more = plan.memory.save - packed.memory.save
    assert more == (0 if not whole else pytest.approx(block_weights(QWEN25_7B) * (2 - 0.5159), rel=0.01))
    assert not planned(gib, method="lora")[0].dequantize.value
    assert planned(gib, method="qlora", dequantize=True)[0].dequantize == Choice(True, "set by `--dequantize`")
    assert not planned(gib, method="qlora", deterministic=True)[0].dequantize.value


QWEN3_06B = ModelShape(
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    max_positions=40960,
    vocabulary=151936,
    query_size=2048,
    key_size=1024,
    tied=True,
)


@pytest.mark.parametrize(
    ("method", "shape", "gib", "expected"),
    [
        ("qlora", QWEN25_7B, 7.2, "adamw"),  # from main memory, which changes no result
        ("qlora", QWEN25_7B, 7.1, "adamw-8bit"),
        ("full", QWEN3_06B, 17, "adamw"),
        ("full", QWEN3_06B, 13, "adamw-8bit"),
        ("full", QWEN3_06B, 12, "adamw-8bit"),
    ],
)
def test_moments_are_held_in_8_bits_where_all_that_changes_no_result_is_not_enough(
    method: str, shape: ModelShape, gib: float, expected: str
) -> None:
    length = 2048 if method == "qlora" else 1024
    plan, need = planned(gib, shape=shape, length=length, method=method, eight_bit=True)
    room = room_of(Gpu(name="", uuid="", memory_bytes=0, memory_free_bytes=int(gib * GIB), capability=(9, 0)))
    assert plan.optimizer.value == expected
    assert need <= room
    if expected == "adamw-8bit":
        assert "with moments of 32 bits, a step needs" in plan.optimizer.reason
        # Neither is it forced, nor is there another way.
        without, more = planned(gib, shape=shape, length=length, method=method, optimizer="adamw")
        assert more > room
        assert (without.optimizer.value, without.micro_batch.value, without.offload.value) == ("adamw", 1, True)
    if method == "full":
        assert not plan.offload.value  # what they leave free is made use of


def test_moments_in_8_bits_need_what_holds_them_and_are_told_of_where_it_is_missing() -> None:
    plan, _ = planned(13, shape=QWEN3_06B, length=1024, method="full")
    assert plan.optimizer.value == "adamw"
    assert "backprop[standard]" in plan.optimizer.reason


@pytest.mark.parametrize("forced", ["adamw", "adamw-8bit"])
def test_an_optimizer_that_is_forced_is_taken_and_the_rest_fitted_to_it(forced: str) -> None:
    options = {"shape": QWEN3_06B, "length": 1024, "method": "full", "optimizer": forced, "eight_bit": True}
    small, large = (planned(gib, **options) for gib in (13, 80))
    assert {plan.optimizer for plan, _ in (small, large)} == {Choice(forced, "set by `--optimizer`")}
    assert small[0].offload.value == (forced == "adamw")


@pytest.mark.parametrize(("main_gib", "most"), [(64, 16), (4, 1), (1, 0)])
def test_no_more_waits_in_main_memory_than_a_quarter_of_it(main_gib: int, most: int) -> None:
    # 28 layers of 2,048 tokens of 3,584 numbers of 4 bytes are 0.77 GiB.
    ways = needs(CONFIG, 16, 2048, QWEN25_7B, compiled=True, dtype="bfloat16", main_bytes=main_gib * GIB)
    assert max((one.examples for one in ways if one.offloaded), default=0) == most
    assert all(one.recomputed == 28 for one in ways if one.offloaded)


def test_gpus_share_main_memory() -> None:
    card = Gpu(name="a GPU", uuid="1", memory_bytes=8 * GIB, memory_free_bytes=7 * GIB, capability=(9, 0))
    one = Hardware(gpus=(card,), driver="", num_cpus=8, memory_bytes=4 * GIB, platform="Linux x86_64")
    data = DataShape(num_examples=10_000, num_tokens=10_000 * 2048)
    config = replace(CONFIG, method="qlora")

    def offloads(hardware: Hardware) -> bool:
        length = Choice(2048, "")
        plan = make_plan(config, hardware, QWEN25_7B, data, model=Choice("m", ""), max_length=length)
        return plan.offload.value

    assert offloads(one)
    assert not offloads(replace(one, gpus=(card, replace(card, uuid="2"))))


def test_what_is_forced_is_taken_and_the_rest_fitted_to_it() -> None:
    plan, _ = planned(80, recompute=28)
    assert plan.recompute.value == 28
    assert "--recompute" in plan.recompute.reason
    plan, _ = planned(80, micro_batch=1)
    assert (plan.micro_batch.value, plan.recompute.value) == (1, 0)


def test_logits_that_are_scaled_or_capped_and_those_of_full_are_held_whole() -> None:
    plain = step_memory(CONFIG, QWEN25_7B, tokens=8192, recomputed=28, compiled=False).working
    capped = replace(QWEN25_7B, plain_logits=False)
    whole = step_memory(CONFIG, capped, tokens=8192, recomputed=28, compiled=False).working
    assert (
        whole - plain > 8192 * 152064 * 10
    )  # bytes of a logit: in 16 bits, in float32 as they are and for the way back


def test_every_expert_is_held_and_few_are_met() -> None:
    # Qwen3-30B-A3B: 30.5 billion weights, 3.3 of them met by a token.
    mixture = ModelShape(
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=48,
        max_positions=40960,
        vocabulary=151936,
        query_size=4096,
        key_size=512,
        num_experts=128,
        expert_size=768,
    )
    assert block_weights(mixture) + word_weights(mixture) == pytest.approx(30.5e9, rel=0.01)
    assert met_weights(mixture) == pytest.approx(3.3e9, rel=0.1)


def test_what_is_trained_in_full_is_held_in_20_bytes_a_weight() -> None:
    full = step_memory(replace(CONFIG, method="full"), QWEN25_7B, tokens=8, recomputed=28, compiled=False)
    # In 16 bits and in 32, a gradient and two moments; and for the length of a pass once more in 16.
    assert full.weights / 7.615e9 == pytest.approx(18, rel=0.01)
    assert full.kept / 7.615e9 == pytest.approx(2, rel=0.01)
    alone = step_memory(
        replace(CONFIG, method="full"), QWEN25_7B, tokens=8, recomputed=28, compiled=False, several=False
    )
    assert alone.weights / 7.615e9 == pytest.approx(14, rel=0.01)
    assert alone.total / 7.615e9 == pytest.approx(18, rel=0.02), "at the end of the way back all gradients are there"
    eight = replace(CONFIG, method="full", optimizer="adamw-8bit")
    less = step_memory(eight, QWEN25_7B, tokens=8, recomputed=28, compiled=False)
    # Two moments of 8 instead of 32 bits, less the 4 bytes of a scale for each 256.
    # But for those of what words begin with, which keep 32.
    words = 152064 * 3584
    assert (full.total - less.total) / (7.615e9 - words) == pytest.approx(2 * (4 - 1 - 4 / 256), rel=0.001)


def test_the_fastest_of_each_size_is_worth_trying() -> None:
    ways = [Passes(4, 0), Passes(4, 1), Passes(2, 0), Passes(8, 3), Passes(1, 0)]
    assert worth_trying(ways) == (Passes(4, 0), Passes(2, 0), Passes(8, 3))


@pytest.mark.parametrize(
    ("options", "tried"),
    [({}, True), ({"steps": 1}, False), ({"deterministic": True}, False), ({"micro_batch": 2, "recompute": 0}, False)],
    ids=["long", "short", "deterministic", "forced"],
)
def test_a_long_run_on_a_gpu_tries_what_fits(options: dict[str, object], tried: bool) -> None:
    plan, _ = planned(80, **options)
    assert (len(plan.to_try) > 1) == tried
    if tried:
        assert plan.to_try[0] == Passes(plan.micro_batch.value, plan.recompute.value)
    assert "to_try" not in plan.choices()


def test_the_examples_of_a_step_go_through_in_any_number_of_passes() -> None:
    ways = needs(CONFIG, 8, 2048, QWEN25_7B, compiled=True, dtype="bfloat16", main_bytes=64 * GIB)
    assert {one.examples for one in ways} == {8, 4, 3, 2, 1}


def test_what_is_tried_may_need_more_than_what_is_planned() -> None:
    plan, need = planned(8.5, method="qlora")
    room = room_of(
        Gpu(name="", uuid="", memory_bytes=17 * GIB // 2, memory_free_bytes=17 * GIB // 2, capability=(9, 0))
    )
    assert need <= room
    first = plan.to_try[0]
    assert (first.examples, first.recomputed) == (plan.micro_batch.value, plan.recompute.value - 1)
    assert [one.examples for one in plan.to_try] == sorted({one.examples for one in plan.to_try})
