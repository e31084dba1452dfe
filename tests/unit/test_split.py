"""The held-out part."""

from hypothesis import given, settings
from hypothesis import strategies as st

from backprop.core.data.formats import Conversation
from backprop.core.data.render import Example
from backprop.core.data.split import choosing, hold_out


def texts(*names: str) -> list[Conversation]:
    return [Conversation(messages=(), text=name, shape="text", place="") for name in names]


rows = st.lists(st.text(max_size=5), min_size=1, max_size=60).map(lambda names: texts(*names))


@settings(max_examples=50)
@given(rows=rows, fraction=st.floats(0, 0.5))
def test_the_parts_never_overlap_and_lose_nothing(rows: list[Conversation], fraction: float) -> None:
    kept, held = hold_out(rows, fraction=fraction)
    assert {row.text for row in kept}.isdisjoint(row.text for row in held)
    assert sorted(row.text for row in (*kept, *held)) == sorted(row.text for row in rows)
    assert kept


# A row that stays in training at any share; without one, nothing would be held out when all rows would be.
KEPT = hold_out(texts(*map(str, range(20))), fraction=0.5)[0][0]


@settings(max_examples=50)
@given(rows=rows, more=rows)
def test_held_out_rows_stay_held_out_when_others_are_added(rows: list[Conversation], more: list[Conversation]) -> None:
    _, before = hold_out([KEPT, *rows], fraction=0.3)
    kept, _ = hold_out([KEPT, *rows, *more], fraction=0.3)
    assert {row.text for row in before}.isdisjoint(row.text for row in kept)


def test_a_small_set_holds_nothing_out_by_itself() -> None:
    kept, held = hold_out(texts(*map(str, range(199))), fraction=None)
    assert (len(kept), len(held)) == (199, 0)


def test_the_share_is_about_what_was_asked() -> None:
    _, held = hold_out(texts(*map(str, range(5000))), fraction=0.1)
    assert 437 <= len(held) <= 563  # 500, give or take three standard deviations of 21.2


def examples(*numbers: int) -> list[Example]:
    return [Example(ids=(number, number + 1), mask=(False, True)) for number in numbers]


numbered = st.lists(st.integers(0, 50), max_size=60).map(lambda numbers: examples(*numbers))


@settings(max_examples=50)
@given(rows=numbered, more=numbered)
def test_rows_that_choose_are_never_scored_whatever_is_beside_them(rows: list[Example], more: list[Example]) -> None:
    chosen, others = choosing(rows, most=99, most_others=99)
    assert sorted(one.ids for one in (*chosen, *others)) == sorted(one.ids for one in rows)
    chosen_beside, others_beside = choosing([*more, *rows], most=999, most_others=999)
    assert set(chosen) <= set(chosen_beside)
    assert set(others) <= set(others_beside)
    assert set(chosen_beside).isdisjoint(others_beside)


def test_a_third_chooses_up_to_a_number_and_no_more_rows_are_read_than_are_needed() -> None:
    chosen, others = choosing(examples(*range(900)), most=999, most_others=999)
    assert 258 <= len(chosen) <= 342  # 300, give or take three standard deviations of 14.1
    assert choosing(examples(*range(900)), most=8, most_others=20) == (chosen[:8], others[:20])
    read: list[int] = []
    endless = (read.append(number) or one for number, one in enumerate(examples(*range(900))))
    choosing(endless, most=8, most_others=20)
    assert len(read) < 60
