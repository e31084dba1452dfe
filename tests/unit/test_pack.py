"""Packing, and the order of samples."""

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from backprop.core.data.order import SampleOrder
from backprop.core.data.pack import balanced, best_fit, even_rows

lengths = st.lists(st.integers(1, 40), max_size=60)


@settings(max_examples=50)
@given(lengths=lengths, capacity=st.integers(1, 60))
def test_every_example_is_in_exactly_one_row_and_no_row_is_too_full(lengths: list[int], capacity: int) -> None:
    rows = best_fit(lengths, capacity)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    assert all(sum(lengths[position] for position in row) <= capacity for row in rows if len(row) > 1)


@settings(max_examples=50)
@given(lengths=lengths)
def test_no_more_rows_than_best_fit_decreasing_may_need(lengths: list[int]) -> None:
    """Two rows at most half full would have been one; so at least half of all but one row is used."""
    rows = best_fit(lengths, 40)
    used = sorted(sum(lengths[position] for position in row) for row in rows)
    assert all(first + second > 40 for first, second in itertools.pairwise(used))


def test_the_fullest_row_with_room_is_taken() -> None:
    # 6 and 5 open rows with 4 and 5 left; the 4 belongs into the first, the 3 into the second.
    assert best_fit([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]


@settings(max_examples=50)
@given(num=st.integers(1, 30), batch=st.integers(1, 40), seed=st.integers(0, 5))
def test_after_each_pass_every_example_was_seen_equally_often(num: int, batch: int, seed: int) -> None:
    order = SampleOrder(num_examples=num, batch_size=batch, seed=seed)
    taken = [number for step in range(-(-3 * num // batch)) for number in order.of_step(step)]
    for epoch in range(3):
        assert Counter(taken[epoch * num : (epoch + 1) * num]) == Counter(range(num))


def test_passes_and_seeds_have_orders_of_their_own_and_steps_can_be_asked_for_again() -> None:
    one, two = (SampleOrder(num_examples=50, batch_size=50, seed=seed) for seed in (1, 2))
    assert len({one.of_step(0), one.of_step(1), two.of_step(0)}) == 3
    assert one.of_step(0) == SampleOrder(num_examples=50, batch_size=50, seed=1).of_step(0)
    # Cut into other steps, the same examples follow each other.
    assert SampleOrder(num_examples=50, batch_size=7, seed=1).of_step(0) == one.of_step(0)[:7]


@given(num_examples=st.integers(1, 30), batch_size=st.integers(1, 12), num_steps=st.integers(0, 30))
def test_how_often_each_is_seen_is_what_the_steps_say(num_examples: int, batch_size: int, num_steps: int) -> None:
    order = SampleOrder(num_examples=num_examples, batch_size=batch_size, seed=7)
    seen = Counter(number for step in range(num_steps) for number in order.of_step(step))
    assert order.times_seen(num_steps) == [seen[number] for number in range(num_examples)]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), num=st.integers(1, 8))
def test_every_rank_is_given_a_pass_as_soon_as_there_is_one_for_each(lengths: list[int], num: int) -> None:
    rows = even_rows(lengths, 60, num)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    assert len(rows) >= min(num, len(lengths))
    assert all(sum(lengths[position] for position in row) <= 60 for row in rows)


def test_rows_for_several_ranks_are_as_many_for_each_and_of_about_the_same_length() -> None:
    lengths = [50, 40, 30, 30, 20, 20, 10, 10, 5, 5]  # 220 tokens
    for num in (2, 3, 4):
        rows = [sum(lengths[position] for position in row) for row in even_rows(lengths, 100, num)]
        assert len(rows) % num == 0
        assert max(rows) - min(rows) <= 10


def test_the_heaviest_is_shared_out_first() -> None:
    # 9 and 7, then 6 beside the 7, 5 beside the 9, and the 1 to the lighter.
    assert balanced([1, 5, 9, 6, 7], 2) == [[1, 2], [0, 3, 4]]
