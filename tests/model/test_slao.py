"""Promises of `backprop.core.slao`; the numbers in brackets are the invariants of the algorithm they hold up.

Legend: [1] orthonormal, [2] canonical, [3] same function, [4] degenerate A, [5] one run and lambda, [6] interval,
[7] weights, [8] signs, [9] continuation and purity, [10] delivery, [11] counting.
"""

import itertools
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from backprop.config import MergeMode
from backprop.core.slao import (
    MergeState,
    carried,
    check_mergeable,
    fingerprint,
    merge,
    merge_weight,
    next_start,
    orthonormal_rows,
    step,
)
from backprop.errors import UsageError

pytestmark = pytest.mark.model

State = dict[str, torch.Tensor]

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A = f"{LAYER}.lora_A.weight"
B = f"{LAYER}.lora_B.weight"
MAGNITUDE = f"{LAYER}.lora_magnitude_vector"
HEAD = "base_model.model.lm_head.weight"

MODES = get_args(MergeMode)
BLENDS = tuple(mode for mode in MODES if mode != "stack")  # "stack" has factors of its own, the others' lie between
INITS = ("function-preserving", "literal")
DTYPES = (torch.float32, torch.bfloat16)

# One rounding to the dtype, at entries of size 1: 2^-24 and 2^-9, with room for sums of up to 9 of them.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

few = settings(max_examples=25, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def quarters(draw: st.DrawFn) -> torch.Tensor:
    """Draw a matrix of a few small quarters: exact in bfloat16, and often zero or rank-deficient."""
    r = draw(st.integers(1, 4))
    d_in = draw(st.integers(r, 9))
    entries = draw(st.lists(st.integers(-4, 4), min_size=r * d_in, max_size=r * d_in))
    return torch.tensor(entries, dtype=torch.float32).reshape(r, d_in) / 4


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed: int, *, dtype: torch.dtype = torch.float32, singular: bool = False) -> State:
    """Give an adapter of rank 3 with all kinds of entries; of a singular A, one row is twice another."""
    shapes = {A: (3, 8), B: (5, 3), MAGNITUDE: (5,), HEAD: (4, 5)}
    state = {key: gaussian(seed + i, *shape).to(dtype) for i, (key, shape) in enumerate(shapes.items())}
    if singular:
        state[A][1] = 2 * state[A][0]
    return state


def train(start: State, seed: int, *, singular: bool = False) -> State:
    """Stand in for a training run: add D, which depends on nothing but the seed; a singular A is left as it is."""
    change = adapter(seed)
    if singular:
        change[A].zero_()
    return {key: (tensor.float() + 0.3 * change[key]).to(tensor.dtype) for key, tensor in start.items()}


def run(
    start: State, run_seeds: list[int], *, mode: MergeMode = "slao", init: str = "literal", singular: bool = False
) -> list[MergeState]:
    """Give the state after each run; the A of the first may stay singular."""
    states: list[MergeState] = []
    for seed in run_seeds:
        last = states[-1] if states else None
        begin = start if last is None else next_start(last.fine_tuned, init=init)
        states.append(step(last, train(begin, seed, singular=singular and last is None), mode=mode, init=init))
    return states


def delta(state: State) -> torch.Tensor:
    return state[B].double() @ state[A].double()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, atol: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


# orthonormal_rows


@pytest.mark.parametrize("dtype", DTYPES)
@given(a=quarters())
@few
def test_rows_are_orthonormal_whatever_a_is(dtype: torch.dtype, a: torch.Tensor) -> None:  # [1] [4]
    q = orthonormal_rows(a.to(dtype))
    assert (q.shape, q.dtype, q.device) == (a.shape, dtype, a.device)
    assert_close(q.double() @ q.double().T, torch.eye(len(a)), atol=ROUNDING[dtype])


@pytest.mark.parametrize(
    "a",
    [
        torch.zeros(3, 3),
        torch.zeros(3, 8),
        torch.ones(3, 8),
        gaussian(0, 3, 8) * torch.tensor([[1.0], [0.0], [1.0]]),
        gaussian(0, 3, 8) * 1e-30,
        gaussian(0, 3, 8) * 1e30,
        gaussian(0, 3, 1) @ gaussian(1, 1, 8),
        gaussian(0, 1, 1),
    ],
    ids=["zero square", "zero", "equal rows", "zero row", "tiny", "huge", "rank 1", "one number"],
)
def test_degenerate_a_still_gives_the_same_orthonormal_rows_each_time(a: torch.Tensor) -> None:  # [4]
    q = orthonormal_rows(a)
    assert_close(q @ q.T, torch.eye(len(a)), atol=1e-6)
    assert torch.equal(q, orthonormal_rows(a.clone()))


@pytest.mark.parametrize("dtype", DTYPES)
@given(a=quarters())
@few
def test_orthonormal_rows_stay_as_they_are(dtype: torch.dtype, a: torch.Tensor) -> None:  # [2]
    q = orthonormal_rows(a.to(dtype))
    assert_close(orthonormal_rows(q), q, atol=ROUNDING[dtype])


@given(seed=seeds, r=st.integers(1, 4), scale=st.floats(1e-3, 1e3))
@few
def test_scale_of_a_does_not_matter(seed: int, r: int, scale: float) -> None:  # [2]
    a = gaussian(seed, r, r + 5)
    # 1e-4: rounding scale * a to float32 (6e-8) times a's condition number, below 1000 for such matrices.
    assert_close(orthonormal_rows(scale * a), orthonormal_rows(a), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@given(a=quarters(), exponent=st.integers(-20, 20))
@few
def test_a_power_of_two_does_not_matter_for_any_a(dtype: torch.dtype, a: torch.Tensor, exponent: int) -> None:  # [2]
    # Exact in both dtypes; of another scale, the rows that a singular A cannot fill would be those of its rounding.
    a = a.to(dtype)
    assert_close(orthonormal_rows(2.0**exponent * a), orthonormal_rows(a), atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, r=st.integers(1, 4))
@few
def test_row_space_is_kept(dtype: torch.dtype, seed: int, r: int) -> None:  # [2]
    a = gaussian(seed, r, r + 5).to(dtype)
    q = orthonormal_rows(a).double()
    assert_close(q.T @ q, torch.linalg.pinv(a.double()) @ a.double(), atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@given(a=quarters())
@few
def test_row_space_of_any_a_is_within_that_of_its_orthonormal_rows(dtype: torch.dtype, a: torch.Tensor) -> None:  # [2]
    q = orthonormal_rows(a.to(dtype)).double()
    assert_close(a.double() @ q.T @ q, a, atol=ROUNDING[dtype] * max(1.0, float(a.norm())))


@given(a=quarters())
@few
def test_each_row_points_the_way_it_did(a: torch.Tensor) -> None:  # [2]; without the sign fix about half are reversed
    assert ((orthonormal_rows(a) * a).sum(dim=1) >= -1e-6).all()  # diag R >= 0, but for rounding


def test_start_of_peft_keeps_its_direction_and_gets_longer_by_the_square_root_of_three() -> None:
    d_in = 2048
    uniform = torch.rand(16, d_in, generator=torch.Generator().manual_seed(0)) * 2 - 1
    a = uniform / math.sqrt(d_in)  # kaiming_uniform_(a=sqrt(5)): variance 1 / (3 d_in), so rows of length 1/sqrt(3)
    q = orthonormal_rows(a)
    cosine = (q * a).sum() / (q.norm() * a.norm())
    assert cosine > 0.99  # rows of random directions are orthogonal to within 1/sqrt(d_in); -0.5 without the sign fix
    assert q.norm() / a.norm() == pytest.approx(math.sqrt(3), rel=0.02)  # 2 %: 16 * 2048 random numbers


@pytest.mark.parametrize(
    ("a", "words"),
    [
        (torch.zeros(4), "must be a matrix"),
        (torch.zeros(2, 3, 1, 1), "must be a matrix"),
        (torch.zeros(4, 3), "4 rows of length 3"),
        (torch.tensor([[1.0, math.nan]]), "NaN or infinity"),
        (torch.tensor([[1.0, math.inf]]), "NaN or infinity"),
    ],
)
def test_rows_that_cannot_be_orthonormal_are_an_error(a: torch.Tensor, words: str) -> None:  # [4]
    with pytest.raises(ValueError, match=words):
        orthonormal_rows(a)


# next_start


@pytest.mark.parametrize("dtype", DTYPES)
@given(a=quarters(), seed=seeds)
@few
def test_function_preserving_start_leaves_the_outputs_unchanged(  # [3]
    dtype: torch.dtype, a: torch.Tensor, seed: int
) -> None:
    old = {A: a.to(dtype), B: gaussian(seed, 5, len(a)).to(dtype)}
    new = next_start(old, init="function-preserving")
    x = gaussian(seed + 1, 4, a.shape[1]).double()
    size = float(x.norm() * old[A].double().norm() * old[B].double().norm())
    assert_close(x @ delta(new).T, x @ delta(old).T, atol=ROUNDING[dtype] * size)
    assert_close(new[A].double() @ new[A].double().T, torch.eye(len(a)), atol=ROUNDING[dtype])


def test_literal_start_keeps_b_and_makes_a_orthonormal() -> None:
    old = adapter(0)
    new = next_start(old, init="literal")
    assert torch.equal(new[B], old[B])
    assert torch.equal(new[A], orthonormal_rows(old[A]))


@pytest.mark.parametrize("init", INITS)
def test_what_is_not_a_factor_is_taken_over(init: str) -> None:
    old = adapter(0, dtype=torch.bfloat16)
    new = next_start(old, init=init)
    assert list(new) == list(old)
    assert all(torch.equal(new[key], old[key]) for key in (MAGNITUDE, HEAD))
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}


def test_bfloat16_is_rounded_once_at_the_end() -> None:  # [1]
    old = adapter(0, dtype=torch.bfloat16)
    exact = next_start({key: tensor.float() for key, tensor in old.items()}, init="function-preserving")
    rounded = next_start(old, init="function-preserving")
    assert all(torch.equal(rounded[key], exact[key].bfloat16()) for key in old)


def test_autocast_left_on_by_the_training_does_not_coarsen_the_start() -> None:
    old = adapter(0)
    expected = next_start(old, init="function-preserving")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = next_start(old, init="function-preserving")
    assert fingerprint(actual) == fingerprint(expected)


def test_rank_above_the_width_of_a_layer_is_the_users_to_mend() -> None:
    with pytest.raises(UsageError, match=r"rank 4 is larger than the width 3 of .*lora_A") as caught:
        next_start({A: torch.zeros(4, 3), B: torch.zeros(5, 4)}, init="literal")
    assert caught.value.hint == "give `--lora-r 3` or less"


def test_factors_of_a_convolution_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"lora_A.* must be matrices"):
        next_start({A: torch.zeros(2, 3, 1, 1), B: torch.zeros(5, 2, 1, 1)}, init="literal")


@pytest.mark.parametrize("key", [A, B, HEAD])
def test_an_adapter_with_nan_is_refused_by_name(key: str) -> None:  # [4]
    sick = adapter(0)
    sick[key][0, 0] = math.nan
    with pytest.raises(ValueError, match=rf"{key}. holds NaN"):
        next_start(sick, init="literal")
    with pytest.raises(ValueError, match=rf"{key}. holds NaN"):
        merge(adapter(1), sick, num_merges=2, mode="slao")


def test_a_state_without_factors_is_refused() -> None:
    full = {HEAD: torch.zeros(2, 2)}
    with pytest.raises(UsageError, match="no LoRA factors"):
        next_start(full, init="literal")
    with pytest.raises(UsageError, match="no LoRA factors"):
        step(None, full, mode="slao", init="literal")


# merge


@pytest.mark.parametrize(
    ("num_merges", "expected"), [(1, 1.0), (4, 0.5), (100, 0.1), (400, 0.05), (10_000, 0.01)]
)  # squares, so that 1/sqrt(i) is known by heart
def test_weight_is_one_over_the_square_root(num_merges: int, expected: float) -> None:  # [5]
    assert merge_weight(num_merges) == expected


@pytest.mark.parametrize(("exponent", "expected"), [(0.0, 1.0), (0.25, 0.5), (0.5, 0.25), (1.0, 0.0625)])
def test_weight_of_another_exponent(exponent: float, expected: float) -> None:
    assert merge_weight(16, exponent=exponent) == expected


def test_weight_falls_strictly_and_has_no_floor() -> None:  # [5]
    weights = [merge_weight(i) for i in range(1, 1001)]
    assert all(later < earlier for earlier, later in itertools.pairwise(weights))


@pytest.mark.parametrize("num_merges", [0, -1])
def test_merges_are_counted_from_one(num_merges: int) -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        merge(adapter(0), adapter(1), num_merges=num_merges, mode="sequential")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@given(seed=seeds, singular=st.booleans())
@few
def test_one_run_gives_the_trained_adapter_bit_for_bit(
    mode: MergeMode, dtype: torch.dtype, seed: int, singular: bool
) -> None:  # [5]
    trained = adapter(seed, dtype=dtype, singular=singular)
    trained[B][0, 0] = -0.0
    state = step(None, trained, mode=mode, init="literal")
    assert fingerprint(state.merged) == fingerprint(state.fine_tuned) == fingerprint(trained)
    assert state.num_merges == 1
    assert fingerprint(merge(adapter(9, dtype=dtype), trained, num_merges=1, mode=mode)) == fingerprint(trained)


@pytest.mark.parametrize("mode", BLENDS)
@given(seed=seeds, num_merges=st.integers(1, 300), dtype=st.sampled_from([*DTYPES, torch.float16, torch.float64]))
@few
def test_merging_an_adapter_with_itself_changes_nothing(  # [5]
    mode: MergeMode, seed: int, num_merges: int, dtype: torch.dtype
) -> None:
    same = {key: (tensor.double() / 3).to(dtype) for key, tensor in adapter(seed).items()}
    assert fingerprint(merge(same, same, num_merges=num_merges, mode=mode)) == fingerprint(same)


@pytest.mark.parametrize(
    ("mode", "a", "b"),
    [
        # Factors 1, 2, 4 in turn. b: 1 + (2 - 1)/sqrt(2) = 1.70711; that + (4 - that)/sqrt(3) = 3.03091, by hand.
        ("slao", 4, 3.03091),
        ("sequential", 4, 4),
        ("average", 7 / 3, 7 / 3),
        ("ema", 4, 2.75),  # (1 + 2)/2 = 1.5; (1.5 + 4)/2
    ],
)
def test_modes_by_hand(mode: MergeMode, a: float, b: float) -> None:
    state = None
    for value in (1.0, 2.0, 4.0):
        trained = {key: torch.full_like(tensor, value) for key, tensor in adapter(0).items()}
        state = step(state, trained, mode=mode, init="literal")
    assert state is not None
    assert_close(state.merged[A], torch.full((3, 8), a), atol=1e-5)
    for key in (B, MAGNITUDE, HEAD):
        assert_close(state.merged[key], torch.full_like(state.merged[key], b), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", BLENDS)
@given(run_seeds=st.lists(seeds, min_size=1, max_size=6), exponent=st.integers(-20, 20))
@few
def test_merged_entries_lie_between_those_of_the_runs_and_the_adapter_does_not_grow(  # [6]
    mode: MergeMode, dtype: torch.dtype, run_seeds: list[int], exponent: int
) -> None:
    runs = [{key: value * 2.0**exponent for key, value in adapter(seed, dtype=dtype).items()} for seed in run_seeds]
    state = None
    for trained in runs:
        state = step(state, trained, mode=mode, init="literal")
    assert state is not None
    assert {key: (x.shape, x.dtype) for key, x in state.merged.items()} == {
        key: (x.shape, x.dtype) for key, x in runs[0].items()
    }
    for key, merged in state.merged.items():
        entries = torch.stack([trained[key] for trained in runs])
        assert ((entries.amin(0) <= merged) & (merged <= entries.amax(0))).all()  # no tolerance: rounding keeps order


def in_the_last_basis(states: list[MergeState], init: str) -> list[torch.Tensor]:
    """Give the fine-tuned B of each run, carried over into the basis of the last."""
    found: list[State] = []
    for before, state in zip([None, *states], states, strict=False):
        found = [carried(one, before.fine_tuned, init=init) for one in found] if before else []
        found.append(dict(state.fine_tuned))
    return [one[B].double() for one in found]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", INITS)
@given(run_seeds=st.lists(seeds, min_size=1, max_size=6), singular=st.booleans())
@few
def test_merged_b_is_the_weighted_mean_of_the_runs_in_the_last_basis(
    init: str, dtype: torch.dtype, run_seeds: list[int], singular: bool
) -> None:  # [6] [7]
    states = run(adapter(0, dtype=dtype, singular=singular), run_seeds, init=init, singular=singular)
    shares = [i**-0.5 for i in range(1, len(states) + 1)]
    weights = [share * math.prod(1 - later for later in shares[i + 1 :]) for i, share in enumerate(shares)]
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    bs = in_the_last_basis(states, init)
    size = max(1.0, *(float(b.abs().max()) for b in bs))  # a start keeps B A, so B grows as the rows of A were long
    expected = sum(w * b for w, b in zip(weights, bs, strict=True))
    merged = states[-1].merged[B].double()
    assert_close(merged, expected, atol=ROUNDING[dtype] * size)
    least, most = (end(torch.stack(bs), 0) for end in (torch.amin, torch.amax))
    assert ((least - ROUNDING[dtype] * size <= merged) & (merged <= most + ROUNDING[dtype] * size)).all()
    assert torch.equal(states[-1].merged[A], states[-1].fine_tuned[A])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, collapsed=st.sampled_from([None, 0.0, 1e-7, 1e-3, 1.0]))
@few
def test_what_is_carried_over_is_the_same_adapter(  # [3] [4] [7]
    dtype: torch.dtype, mode: MergeMode, seed: int, collapsed: float | None
) -> None:
    """Where a run left an A that was nearly singular, "average" and "stack" lost some or nearly all of the merge."""
    first = run(adapter(seed, dtype=dtype), [seed + 1], mode=mode, init="function-preserving")[-1]
    trained = train(next_start(first.fine_tuned, init="function-preserving"), seed + 2)
    if collapsed is not None:
        trained[A][1] = 2 * trained[A][0] + collapsed * trained[A][1]
    state = step(first, trained, mode=mode, init="function-preserving")
    moved = carried(state.merged, state.fine_tuned, init="function-preserving")
    size = max(float(moved[A].abs().max()) * float(moved[B].abs().max()), float(delta(state.merged).abs().max()))
    assert_close(delta(moved), delta(state.merged), atol=3 * ROUNDING[dtype] * size)
    assert {key: (x.shape, x.dtype) for key, x in moved.items()} == {
        key: (x.shape, x.dtype) for key, x in state.merged.items()
    }
    assert all(torch.equal(moved[key], state.merged[key]) for key in (MAGNITUDE, HEAD))


@given(a=quarters(), seed=seeds)
@few
def test_a_merge_on_a_singular_a_is_carried_over_as_it_is(a: torch.Tensor, seed: int) -> None:  # [4]
    fine_tuned, merged = ({A: a, B: gaussian(seed + n, 5, len(a))} for n in (0, 1))
    moved = carried(merged, fine_tuned, init="function-preserving")
    assert_close(delta(moved), delta(merged), atol=1e-5 * float(a.norm() * merged[B].norm()))
    assert_close(moved[A] @ moved[A].T, torch.eye(len(a)), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_runs_that_learn_nothing_change_nothing(mode: MergeMode) -> None:
    """The merge once averaged B of two bases: after a second run that stood still, the adapter was another."""
    first = adapter(0)
    state = step(None, first, mode=mode, init="function-preserving")
    for _ in range(3):
        still = next_start(state.fine_tuned, init="function-preserving")
        state = step(state, still, mode=mode, init="function-preserving")
        assert_close(delta(state.merged), delta(first), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@given(run_seeds=st.lists(seeds, min_size=2, max_size=6), singular=st.booleans())
@few
def test_changes_add_up_along_the_trajectory_because_runs_start_from_the_fine_tuned_b(  # [7]
    dtype: torch.dtype, run_seeds: list[int], singular: bool
) -> None:
    start = adapter(0, dtype=dtype, singular=singular)
    states = run(start, run_seeds, singular=singular)
    shares = [i**-0.5 for i in range(1, len(states) + 1)]
    expected = start[B].double()
    for k, seed in enumerate(run_seeds):
        big_w = 1 - math.prod(1 - share for share in shares[k:])
        expected = expected + big_w * 0.3 * adapter(seed)[B].double()
    # The largest of up to 6 runs and 6 merges, each rounded once.
    size = max(1.0, *(float(state.fine_tuned[B].abs().max()) for state in states))
    assert_close(states[-1].merged[B], expected, atol=ROUNDING[dtype] * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", INITS)
@given(run_seeds=st.lists(seeds, min_size=1, max_size=4), signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
@few
def test_signs_of_the_ranks_do_not_matter(  # [8]
    init: str, dtype: torch.dtype, run_seeds: list[int], signs: tuple[float, ...]
) -> None:
    sign = torch.tensor(signs, dtype=dtype)

    def flip(state: State) -> State:
        return {**state, A: sign[:, None] * state[A], B: state[B] * sign}

    plain = flipped = None
    for seed in run_seeds:
        first = adapter(0, dtype=dtype)
        begin = first if plain is None else next_start(plain.fine_tuned, init=init)
        begin_flipped = flip(first) if flipped is None else next_start(flipped.fine_tuned, init=init)
        plain = step(plain, train(begin, seed), mode="slao", init=init)
        flipped = step(flipped, flip(train(flip(begin_flipped), seed)), mode="slao", init=init)
    assert plain is not None
    assert flipped is not None
    # Rounding of entries up to about 10, times the condition number of a 3 x 8 matrix, over 4 runs.
    assert_close(delta(flipped.merged), delta(plain.merged), atol={torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype])


def test_bfloat16_merge_is_computed_in_float32_and_rounded_once() -> None:
    old, new = adapter(0, dtype=torch.bfloat16), adapter(10, dtype=torch.bfloat16)
    wide = merge(
        {k: v.float() for k, v in old.items()}, {k: v.float() for k, v in new.items()}, num_merges=7, mode="slao"
    )
    merged = merge(old, new, num_merges=7, mode="slao")
    assert all(torch.equal(merged[key], wide[key].bfloat16()) for key in old)


@pytest.mark.parametrize("mode", MODES)
def test_a_float32_merge_takes_in_bfloat16_runs_without_loss(mode: MergeMode) -> None:
    old, new = adapter(0), adapter(10, dtype=torch.bfloat16)
    for one, other in ((old, new), (new, old)):
        merged = merge(one, other, num_merges=3, mode=mode)
        wide = merge(
            {k: v.float() for k, v in one.items()}, {k: v.float() for k, v in other.items()}, num_merges=3, mode=mode
        )
        assert fingerprint(merged) == fingerprint(wide)


def test_whole_numbers_are_taken_from_the_last_run() -> None:
    count = "base_model.model.norm.num_batches_tracked"
    old, new = {**adapter(0), count: torch.tensor(3)}, {**adapter(1), count: torch.tensor(8)}
    merged = merge(old, new, num_merges=4, mode="average")[count]
    assert (merged.item(), merged.dtype) == (8, torch.int64)


def test_different_layers_are_refused_by_name() -> None:
    more = {**adapter(0), "base_model.model.a.lora_A.weight": torch.zeros(3, 8), "z": torch.zeros(1)}
    with pytest.raises(UsageError, match=r"only the fine-tuned one has `base_model\.model\.a\.lora_A\.weight`"):
        merge(adapter(0), more, num_merges=2, mode="slao")
    with pytest.raises(UsageError, match=r"only the merged one has `base_model\.model\.a\.lora_A\.weight`"):
        merge(more, adapter(0), num_merges=2, mode="slao")


@pytest.mark.parametrize("mode", MODES)
def test_different_shapes_are_refused_by_name_instead_of_broadcast(mode: MergeMode) -> None:
    narrow = {**adapter(0), B: torch.zeros(5, 1)}
    with pytest.raises(UsageError, match=r"lora_B\.weight` is \(5, 3\) in the merged one, \(5, 1\) in the fine-tuned"):
        merge(adapter(0), narrow, num_merges=2, mode=mode)


@given(seed=seeds, num_merges=st.integers(2, 50), d_out=st.integers(1, 9))
@few
def test_stack_is_the_nearest_adapter_of_its_rank_to_the_mean_of_the_weight_changes(
    seed: int, num_merges: int, d_out: int
) -> None:
    old, new = ({A: gaussian(seed + n, 3, 8), B: gaussian(seed + 9 + n, d_out, 3)} for n in (0, 1))
    merged = merge(old, new, num_merges=num_merges, mode="stack")
    assert {key: x.shape for key, x in merged.items()} == {key: x.shape for key, x in old.items()}
    mean = delta(old) + (delta(new) - delta(old)) / num_merges
    u, sizes, v = torch.linalg.svd(mean, full_matrices=False)
    nearest = u[:, :3] * sizes[:3] @ v[:3]  # Eckart-Young
    gap = float(sizes[2] - sizes[3]) if len(sizes) > 3 else 1.0
    if gap > 1e-2:  # else another one is as near
        assert_close(delta(merged), nearest, atol=1e-4)


def test_stack_is_what_peft_gives_for_the_same_weights() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 5, bias=False))
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(base, config, adapter_name="old")
    model.add_adapter("new", config)
    old, new = (peft.get_peft_model_state_dict(model, adapter_name=name) for name in ("old", "new"))
    model.add_weighted_adapter(["old", "new"], [0.75, 0.25], "mean", combination_type="svd", svd_rank=3)
    expected = peft.get_peft_model_state_dict(model, adapter_name="mean")
    merged = merge(old, new, num_merges=4, mode="stack")
    a, b = (next(key for key in merged if f"lora_{name}" in key) for name in "AB")
    assert_close(merged[b] @ merged[a], expected[b] @ expected[a], atol=1e-5)


# step, and what surrounds it


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@given(run_seeds=st.lists(seeds, min_size=2, max_size=4), singular=st.booleans())
@few
def test_stopped_and_continued_from_files_equals_straight_through(  # [9] [10]
    tmp_path: Path, mode: MergeMode, dtype: torch.dtype, init: str, run_seeds: list[int], singular: bool
) -> None:
    first = adapter(0, dtype=dtype, singular=singular)
    straight = run(first, run_seeds, mode=mode, init=init, singular=singular)

    last = run(first, run_seeds[:-1], mode=mode, init=init, singular=singular)[-1]
    save_file(dict(last.merged), tmp_path / "merged.safetensors")
    save_file(dict(last.fine_tuned), tmp_path / "fine_tuned.safetensors")
    back = MergeState(
        merged=load_file(tmp_path / "merged.safetensors"),
        fine_tuned=load_file(tmp_path / "fine_tuned.safetensors"),
        num_merges=last.num_merges,
    )
    start = next_start(back.fine_tuned, init=init)
    save_file(start, tmp_path / "start.safetensors")
    parent = fingerprint(back.fine_tuned)
    trained = train(load_file(tmp_path / "start.safetensors"), run_seeds[-1])
    final = step(back, trained, mode=mode, init=init, parent=parent)

    assert fingerprint(final.merged) == fingerprint(straight[-1].merged)
    assert fingerprint(final.fine_tuned) == fingerprint(straight[-1].fine_tuned)
    assert final.num_merges == straight[-1].num_merges == len(run_seeds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@given(seed=seeds, singular=st.booleans())
@few
def test_the_file_delivered_equals_the_merged_state(
    tmp_path: Path, mode: MergeMode, dtype: torch.dtype, seed: int, singular: bool
) -> None:  # [10]
    awkward = [
        {key: tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor for key, tensor in one.items()}
        for one in (adapter(seed + number, dtype=dtype, singular=singular) for number in (0, 1))
    ]
    assert not awkward[0][B].is_contiguous()  # nor any other matrix
    state = step(step(None, awkward[0], mode=mode, init="literal"), awkward[1], mode=mode, init="literal")
    save_file(dict(state.merged), tmp_path / "adapter_model.safetensors")  # refuses what is not contiguous
    save_file(dict(state.fine_tuned), tmp_path / "fine_tuned.safetensors")
    save_file(merge(*awkward, num_merges=2, mode=mode), tmp_path / "merged.safetensors")
    delivered = load_file(tmp_path / "adapter_model.safetensors")
    assert (
        fingerprint(delivered) == fingerprint(state.merged) == fingerprint(load_file(tmp_path / "merged.safetensors"))
    )
    assert fingerprint(load_file(tmp_path / "fine_tuned.safetensors")) == fingerprint(state.fine_tuned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("mode", MODES)
@given(seed=seeds, singular=st.booleans())
@few
def test_inputs_are_not_mutated(  # [9]
    mode: MergeMode, init: str, dtype: torch.dtype, seed: int, singular: bool
) -> None:
    first, second = (adapter(seed + number, dtype=dtype, singular=singular) for number in (0, 1))
    before = fingerprint(first), fingerprint(second)
    state = step(None, first, mode=mode, init="literal")
    held = fingerprint(state.merged), fingerprint(state.fine_tuned)
    step(state, second, mode=mode, init="literal")
    merge(first, second, num_merges=1, mode=mode)
    merge(first, second, num_merges=5, mode=mode)
    next_start(first, init=init)
    orthonormal_rows(first[A])
    assert (fingerprint(first), fingerprint(second)) == before
    assert (fingerprint(state.merged), fingerprint(state.fine_tuned)) == held


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("mode", MODES)
def test_results_share_no_memory_with_a_model_that_goes_on_training(mode: MergeMode, init: str) -> None:  # [9]
    live, other = adapter(0), adapter(1)
    state = step(None, live, mode=mode, init="literal")
    later = step(state, other, mode=mode, init="literal")
    start = next_start(live, init=init)
    results = [state.merged, state.fine_tuned, later.merged, later.fine_tuned, start]
    before = [fingerprint(result) for result in results]
    for tensor in (*live.values(), *other.values()):
        tensor.add_(1)
    assert [fingerprint(result) for result in results] == before


def test_parameters_of_a_live_model_leave_no_gradients_behind() -> None:
    live = {key: tensor.requires_grad_() for key, tensor in adapter(0).items()}
    state = step(step(None, live, mode="slao", init="literal"), live, mode="average", init="literal")
    results = (
        *state.merged.values(),
        *state.fine_tuned.values(),
        *next_start(live, init="function-preserving").values(),
    )
    assert not any(tensor.requires_grad for tensor in results)


@pytest.mark.parametrize("init", INITS)
def test_global_random_state_is_untouched(init: str) -> None:  # [9]
    def random_states() -> tuple[object, ...]:
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()

    before = random_states()
    zero = {key: torch.zeros_like(tensor) for key, tensor in adapter(0).items()}
    for mode in MODES:
        state = step(step(None, zero, mode=mode, init="literal"), zero, mode=mode, init="literal")
        next_start(state.fine_tuned, init=init)
    assert random_states() == before


@pytest.mark.parametrize("dtype", DTYPES)
@given(outcomes=st.lists(st.sampled_from(["good", "nan", "foreign"]), min_size=1, max_size=6), singular=st.booleans())
@few
def test_failed_and_rejected_runs_change_nothing(  # [11]
    dtype: torch.dtype, outcomes: list[str], singular: bool
) -> None:
    first, state = adapter(0, dtype=dtype, singular=singular), None
    for i, outcome in enumerate(outcomes):
        start = first if state is None else next_start(state.fine_tuned, init="literal")
        trained = train(start, i, singular=singular and state is None)
        if outcome == "good":
            state = step(state, trained, mode="slao", init="literal")
        elif outcome == "nan":
            trained[B][0, 0] = math.nan
            with pytest.raises(ValueError, match="NaN"):
                step(state, trained, mode="slao", init="literal")
        else:
            with pytest.raises(UsageError, match="another adapter"):
                step(state, trained, mode="slao", init="literal", parent=fingerprint(adapter(9)))

    good = [i for i, outcome in enumerate(outcomes) if outcome == "good"]
    if not good:
        assert state is None
        return
    assert state is not None
    assert state.num_merges == len(good)
    assert fingerprint(state.merged) == fingerprint(run(first, good, singular=singular)[-1].merged)


def test_a_run_of_another_trajectory_is_refused() -> None:
    """What had begun from nothing was taken for whatever run came before it, and a later run for the first."""
    with pytest.raises(UsageError, match="began from another adapter"):
        step(None, adapter(0), mode="slao", init="literal", parent=fingerprint(adapter(5)))
    state = step(None, adapter(0), mode="slao", init="literal", parent="")
    with pytest.raises(UsageError, match="began from another adapter"):
        step(state, adapter(1), mode="slao", init="literal", parent="")
    trained = train(next_start(state.fine_tuned, init="literal"), 1)
    with pytest.raises(UsageError, match="began from another adapter"):
        step(state, trained, mode="slao", init="literal", parent=fingerprint(adapter(5)))
    accepted = step(state, trained, mode="slao", init="literal", parent=fingerprint(state.fine_tuned))
    with pytest.raises(UsageError, match="began from another adapter"):  # its parent has been merged already
        step(accepted, trained, mode="slao", init="literal", parent=fingerprint(state.fine_tuned))


def test_fingerprint_sees_every_bit_name_dtype_and_shape_but_not_the_order() -> None:
    state = {"a": torch.tensor([[0.0, 1.0]]), "b": torch.tensor(2)}
    others: list[State] = [
        {**state, "a": torch.tensor([[-0.0, 1.0]])},
        {**state, "a": torch.tensor([[0.0], [1.0]])},
        {**state, "a": torch.tensor([[0.0, 1.0]]).view(torch.int32)},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
    ]
    assert len({fingerprint(state), *map(fingerprint, others)}) == 1 + len(others)
    assert fingerprint({"b": state["b"], "a": state["a"]}) == fingerprint(state)


# check_mergeable

CONFIG: dict[str, object] = {
    "base_model_name_or_path": "Qwen/Qwen2.5-0.5B",
    "r": 16,
    "lora_alpha": 32,
    "use_rslora": False,
    "use_dora": False,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_dropout": 0.0,
}


@pytest.mark.parametrize(
    ("name", "other", "hint"),
    [
        ("base_model_name_or_path", "Qwen/Qwen2.5-1.5B", "`--model`"),
        ("r", 8, "`--lora-r`"),
        ("lora_alpha", 16, "`--lora-alpha`"),
        ("use_rslora", True, "`--rslora`"),
        ("use_dora", True, "`--method`"),
        ("target_modules", ["q_proj"], "`--target-modules`"),
        ("target_modules", "q_proj|v_proj", "`--target-modules`"),
        ("rank_pattern", {"q_proj": 4}, "`--config`"),
        ("alpha_pattern", {"q_proj": 4}, "`--config`"),
    ],
)
def test_adapters_of_another_kind_are_refused_with_both_values(name: str, other: object, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_mergeable(CONFIG, {**CONFIG, name: other})
    assert caught.value.message == (
        f"the adapters cannot be merged: {name} is {CONFIG[name]!r} in one, {other!r} in the other"
    )
    assert caught.value.hint == f"train both with the same {hint}"


def test_all_differences_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"r is 16 in one, 8 in the other; lora_alpha is 32 in one, 9 in the other"):
        check_mergeable(CONFIG, {**CONFIG, "r": 8, "lora_alpha": 9})


def test_order_defaults_and_what_does_not_matter_are_no_difference() -> None:
    same: dict[str, object] = {
        **CONFIG,
        "target_modules": {"v_proj", "q_proj"},
        "lora_dropout": 0.1,
        "rank_pattern": None,
    }
    del same["use_rslora"], same["use_dora"]  # an older PEFT did not write them
    check_mergeable(CONFIG, same)


def test_adapters_on_expert_parameters_are_refused_because_qr_would_mix_the_experts() -> None:
    moe: dict[str, object] = {**CONFIG, "target_parameters": ["mlp.experts.gate_up_proj"]}
    with pytest.raises(UsageError, match="target_parameters"):
        check_mergeable(moe, moe)
    check_mergeable({**CONFIG, "target_parameters": None}, {**CONFIG, "target_parameters": []})


# the world outside


def test_import_does_not_load_torch() -> None:
    code = "import sys, backprop.core.slao; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_real_peft_model_answers_the_same_from_the_next_start(dora: bool) -> None:  # [3], with PEFT's own key names
    peft = pytest.importorskip("peft")

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(11, 8)
            self.q_proj = torch.nn.Linear(8, 6)
            self.head = torch.nn.Linear(6, 11)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.q_proj(self.embed(ids))))

    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=dora, target_modules=["embed", "q_proj"], modules_to_save=["head"]
    )
    check_mergeable(config.to_dict(), config.to_dict())
    model = peft.get_peft_model(Tiny(), config).eval()
    saved = peft.get_peft_model_state_dict(model)
    trained = {key: tensor + 0.5 * gaussian(i, *tensor.shape) for i, (key, tensor) in enumerate(saved.items())}
    assert sum("lora_A" in key or "lora_embedding_A" in key for key in trained) == 2

    def answers(state: State) -> torch.Tensor:
        assert not peft.set_peft_model_state_dict(model, state).unexpected_keys
        with torch.no_grad():
            return model(torch.arange(11))

    before = answers(trained)
    start = next_start(trained, init="function-preserving")
    assert_close(answers(start), before, atol=1e-5)
    assert (answers(next_start(trained, init="literal")) - before).abs().max() > 0.01  # the comparison can fail
    for key, tensor in start.items():
        if "lora_A" in key or "lora_embedding_A" in key:
            assert_close(tensor @ tensor.T, torch.eye(3), atol=1e-5)

    again = {key: tensor + 0.1 * gaussian(50 + i, *tensor.shape) for i, (key, tensor) in enumerate(start.items())}
    state = step(step(None, trained, mode="slao", init="literal"), again, mode="slao", init="literal")
    assert torch.isfinite(answers(dict(state.merged))).all()
