"""A run against the one it repeats."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprop.core.compare import Record, compare

NAN, INF = math.nan, math.inf


def run(*losses: float, adapter: str = "a") -> Record:
    return Record(adapter_sha256=adapter, losses=losses)


# By hand, at the usual tolerance of 0.001: a kind, the first step that differs, and the sentence.
CASES = {
    "the same": (run(2, 1.5), run(2, 1.5), "equal", None, "equal bit for bit"),
    "another adapter": (
        run(2, 1.5),
        run(2, 1.5, adapter="b"),
        "close",
        None,
        "losses equal to the last bit, but the adapter differs",
    ),
    "near": (
        run(1.5, 0.5),
        run(1.5, 0.50003, adapter="b"),
        "close",
        None,
        "within tolerance: losses differ by at most 3e-05 over 2 steps",
    ),
    "near in one step with one adapter": (
        run(0.5),
        run(0.50003),
        "close",
        None,
        "within tolerance: losses differ by at most 3e-05 over 1 step; the adapter is equal bit for bit",
    ),
    "far": (
        run(2, 1.234, 1),
        run(2, 1.301, 1, adapter="b"),
        "different",
        2,
        "different from step 2 on: loss 1.234 before, 1.301 now",
    ),
    "far from the first step on": (run(1), run(2), "different", 1, "different from step 1 on: loss 1 before, 2 now"),
    "shorter": (run(2, 1, 1), run(2, 1), "different", 3, "different from step 3 on: 3 steps before, 2 now"),
    "longer": (run(2), run(2, 1, 1), "different", 2, "different from step 2 on: 1 step before, 3 now"),
    "shorter and far": (
        run(2, 1, 1),
        run(2, 3),
        "different",
        2,
        "different from step 2 on: loss 1 before, 3 now; 3 steps before, 2 now",
    ),
    "NaN now": (run(2, 1), run(2, NAN), "different", 2, "different from step 2 on: loss 1 before, nan now"),
    "NaN before": (run(NAN, 1), run(2, 1), "different", 1, "different from step 1 on: loss nan before, 2 now"),
    "infinite before": (run(INF), run(2), "different", 1, "different from step 1 on: loss inf before, 2 now"),
    "of two infinities": (run(INF), run(-INF), "different", 1, "different from step 1 on: loss inf before, -inf now"),
    "NaN in both": (run(2, NAN), run(2, NAN), "equal", None, "equal bit for bit; the loss of step 2 is nan in both"),
    "NaN in both, another adapter": (
        run(INF, NAN),
        run(INF, NAN, adapter="b"),
        "close",
        None,
        "losses equal to the last bit, but the adapter differs; the loss of step 1 is inf in both",
    ),
    "no losses": (
        run(),
        run(),
        "equal",
        None,
        "the adapters are equal bit for bit, and there are no losses to compare",
    ),
    "no losses, another adapter": (
        run(),
        run(adapter="b"),
        "different",
        None,
        "the adapter differs, and there are no losses to compare",
    ),
    "no losses before": (run(), run(1), "different", 1, "different from step 1 on: 0 steps before, 1 now"),
}


@pytest.mark.parametrize(("old", "new", "kind", "first_step", "sentence"), CASES.values(), ids=CASES.keys())
def test_a_run_is_compared_with_the_one_it_repeats(
    old: Record, new: Record, kind: str, first_step: int | None, sentence: str
) -> None:
    found = compare(old, new)
    assert (found.kind, found.first_step, found.sentence()) == (kind, first_step, sentence)


@pytest.mark.parametrize(
    ("before", "now", "kind"),
    [
        # All of these are exact in binary: the tolerance is a quarter of the loss, but of 1 at least.
        (4.0, 5.0, "close"),
        (4.0, 3.0, "close"),
        (4.0, 5.125, "different"),
        (4.0, 2.875, "different"),
        (-4.0, -5.0, "close"),
        (5.25, 4.0, "close"),
        (4.0, 5.25, "different"),
        (0.5, 0.75, "close"),
        (0.5, 0.25, "close"),
        (0.5, 0.875, "different"),
    ],
)
def test_the_tolerance_is_a_share_of_the_old_loss_and_is_itself_within(before: float, now: float, kind: str) -> None:
    assert compare(run(before), run(now), tolerance=0.25).kind == kind


@pytest.mark.parametrize(
    ("old", "new", "largest"),
    [
        (run(2, 1, 1), run(2.5, 0.25, 1), 0.75),
        (run(2, 1), run(2, 1), 0),
        (run(), run(), 0),
        # Only over steps that both made, and only of numbers: JSON knows no infinity.
        (run(2, 1, NAN), run(2.5, NAN, NAN, 99), 0.5),
        (run(INF, 1), run(INF, 1), 0),
        (run(NAN), run(1), 0),
    ],
)
def test_the_largest_difference_is_over_common_steps_and_finite(old: Record, new: Record, largest: float) -> None:
    assert compare(old, new).largest == largest


@pytest.mark.parametrize(
    ("now", "written"),
    # 0.0301 and 0.0309 are both above 0.03: "at most" must stay true.
    [(1.0301, "0.031"), (1.0309, "0.031"), (1.03125, "0.032"), (1.5, "0.5"), (1.0 + 2**-52, "2.3e-16")],
)
def test_the_difference_is_rounded_up(now: float, written: str) -> None:
    assert f"at most {written} over" in compare(run(1), run(now), tolerance=1).sentence()


def test_losses_that_differ_are_written_so() -> None:
    """With four digits both were 1.234."""
    sentence = compare(run(1.23412), run(1.23431), tolerance=1e-6).sentence()
    assert sentence == "different from step 1 on: loss 1.2341 before, 1.2343 now"


def test_one_bit_is_not_equal() -> None:
    assert compare(run(1.0), run(1.0 + 2**-52)).kind == "close"
    assert compare(run(1.0), run(1.0 + 2**-52), tolerance=0).first_step == 1


@given(losses=st.lists(st.floats(), max_size=20), adapter=st.sampled_from("ab"))
def test_every_run_repeats_itself(losses: list[float], adapter: str) -> None:
    found = compare(run(*losses, adapter=adapter), run(*losses, adapter=adapter), tolerance=0)
    assert (found.kind, found.first_step, found.largest) == ("equal", None, 0)


@given(
    old=st.lists(st.floats(), min_size=1, max_size=20),
    new=st.lists(st.floats(), min_size=1, max_size=20),
    tolerance=st.floats(0, 10),
)
def test_a_difference_is_found_where_it_is(old: list[float], new: list[float], tolerance: float) -> None:
    found = compare(run(*old), run(*new), tolerance=tolerance)
    assert found.sentence()
    assert (found.kind == "different") == (found.first_step is not None)
    assert math.isfinite(found.largest)
    assert found.largest >= 0
    same = len(old) if found.first_step is None else found.first_step - 1
    assert compare(run(*old[:same]), run(*new[:same]), tolerance=tolerance).kind != "different"


@pytest.mark.parametrize(
    ("old", "new", "tolerance", "message"),
    [
        (run(1, adapter=""), run(1, adapter=""), 0.1, "without a hash"),
        (run(1), run(1, adapter=""), 0.1, "without a hash"),
        (run(1), run(1), -0.1, "tolerance of -0.1"),
        (run(1), run(1), NAN, "tolerance of nan"),
    ],
)
def test_nothing_is_equal_to_what_is_not_known(old: Record, new: Record, tolerance: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(old, new, tolerance=tolerance)
