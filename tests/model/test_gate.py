"""Gates: bounds on what a run measured, and intervals of what it changed."""

import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprop.core.gate import (
    METRICS,
    MIN_ROWS,
    Interval,
    RowLoss,
    judge_new,
    judge_old,
    paired_interval,
    parse_gate,
)
from backprop.errors import UsageError

pytestmark = pytest.mark.model  # for its time: thousands of resamplings


@pytest.mark.parametrize(
    ("text", "metric", "below", "strict", "bound"),
    [
        ("eval_loss<1.2", "eval_loss", True, True, 1.2),
        ("eval_loss <= 1.2", "eval_loss", True, False, 1.2),
        ("tokens_per_second>100", "tokens_per_second", False, True, 100),
        ("  tokens_per_second  >=\t1e2 ", "tokens_per_second", False, False, 100),
        ("eval_loss_change<-0.1", "eval_loss_change", True, True, -0.1),
        ("perplexity<3", "perplexity", True, True, 3),
    ],
)
def test_a_gate_is_a_measure_a_relation_and_a_bound(
    text: str, metric: str, below: bool, strict: bool, bound: float
) -> None:
    gate = parse_gate(text)
    assert gate.text == text.strip()
    assert (gate.metric, gate.below, gate.strict, gate.bound) == (metric, below, strict, bound)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("operator", ["<", "<=", ">", ">="])
def test_every_measure_has_gates(metric: str, operator: str) -> None:
    assert parse_gate(f"{metric}{operator}1").judge({metric: 1.0})[0] == ("=" in operator)


@pytest.mark.parametrize(
    ("text", "why", "hint"),
    [
        ("eval_los<1.2", "a run has no measure `eval_los`", "did you mean `eval_loss<1.2`? known: eval_loss, eval_"),
        ("Tokens-Per-Second >= 9", "a run has no measure `Tokens-Per-Second`", "did you mean `tokens_per_second>=9`?"),
        ("STEPS>9", "a run has no measure `STEPS`", "did you mean `steps>9`?"),
        ("loss<1", "a run has no measure `loss`", "did you mean `eval_loss<1`?"),
        ("eval_loss", "that is a measure, one of `<` `<=` `>` `>=`, and a number", '`"eval_loss<1.2"`: a shell'),
        ("eval_loss=1.2", "that is a measure, one of", "put it in quotes"),
        ("eval_loss==1.2", "that is a measure, one of", "put it in quotes"),
        ("eval_loss=<1.2", "that is a measure, one of", "put it in quotes"),
        ("<1.2", "that is a measure, one of", "put it in quotes"),
        ("", "that is a measure, one of", "put it in quotes"),
        ("eval_loss<", "`` is no finite number", "write it as in `eval_loss<1.2`"),
        ("eval_loss<1,2", "`1,2` is no finite number", "write it as in `eval_loss<1.2`"),
        ("eval_loss< =1.2", "`=1.2` is no finite number", "write it as in `eval_loss<1.2`"),
        ("eval_loss<<1.2", "`<1.2` is no finite number", "write it as in `eval_loss<1.2`"),
        ("eval_loss<nan", "`nan` is no finite number", "write it as in `eval_loss<1.2`"),
        ("eval_loss>-inf", "`-inf` is no finite number", "write it as in `eval_loss<1.2`"),
        ("eval_loss<1e999", "`1e999` is no finite number", "write it as in `eval_loss<1.2`"),
    ],
)
def test_what_is_no_gate_is_named_with_an_example(text: str, why: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate(text)
    assert caught.value.message.startswith(f"`{text}` cannot be a gate: ")
    assert why in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_a_measure_like_no_other_gets_no_guess() -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate("bleu>20")
    assert caught.value.hint == f"known: {', '.join(METRICS)}"


@given(text=st.text(st.sampled_from("eval_loss<>=1.2 nan\n"), max_size=20) | st.text(max_size=20))
def test_a_gate_is_read_or_refused(text: str) -> None:
    try:
        gate = parse_gate(text)
    except UsageError:
        return
    assert gate.metric in METRICS
    assert math.isfinite(gate.bound)


@pytest.mark.parametrize(
    ("text", "measures", "met", "sentence"),
    [
        ("eval_loss<1.2", {"eval_loss": 1.31}, False, "eval_loss is 1.31, not below 1.2"),
        ("eval_loss<1.2", {"eval_loss": 1.1}, True, "eval_loss is 1.1, below 1.2"),
        ("eval_loss<1.2", {"eval_loss": 1.2}, False, "eval_loss is 1.2, not below 1.2"),
        ("eval_loss<=1.2", {"eval_loss": 1.2}, True, "eval_loss is 1.2, at most 1.2"),
        ("eval_loss<=1.2", {"eval_loss": 1.3}, False, "eval_loss is 1.3, not at most 1.2"),
        ("steps>100", {"steps": 100}, False, "steps is 100, not above 100"),
        ("steps>100", {"steps": 101}, True, "steps is 101, above 100"),
        ("steps>=100", {"steps": 100}, True, "steps is 100, at least 100"),
        ("steps>=100", {"steps": 99}, False, "steps is 99, not at least 100"),
        # Four digits, more where they would not show on which side the figure is, and none of a number lost.
        ("eval_loss<1.2", {"eval_loss": 1.19996}, True, "eval_loss is 1.19996, below 1.2"),
        ("eval_loss<1.2", {"eval_loss": 1.23456}, False, "eval_loss is 1.235, not below 1.2"),
        ("tokens<2e6", {"tokens": 1234567}, True, "tokens is 1234567, below 2000000"),
        ("tokens_per_second>9", {"tokens_per_second": 12345.6}, True, "tokens_per_second is 12346, above 9"),
        # exp(1) and 1.5 - 2, from the losses that a run measured.
        ("perplexity<3", {"eval_loss": 1.0}, True, "perplexity is 2.718, below 3"),
        ("eval_loss_change<0", {"eval_loss": 1.5, "eval_loss_before": 2.0}, True, "eval_loss_change is -0.5, below 0"),
        (
            "eval_loss_change<0",
            {"eval_loss": 2.0, "eval_loss_before": 1.5},
            False,
            "eval_loss_change is 0.5, not below 0",
        ),
        ("perplexity<3", {"perplexity": 2.5}, True, "perplexity is 2.5, below 3"),
        ("perplexity<3", {"perplexity": 2.5, "eval_loss": 0.9}, True, "perplexity is 2.5, below 3"),
        ("eval_loss_change<0", {"eval_loss_change": -0.5, "eval_loss": 9}, True, "eval_loss_change is -0.5, below 0"),
        ("tokens>1", {"tokens": 1e300}, True, "tokens is 1.0000000000000001e+300, above 1"),
    ],
)
def test_a_gate_is_judged_with_the_figure(
    text: str, measures: Mapping[str, float | None], met: bool, sentence: str
) -> None:
    assert parse_gate(text).judge(measures) == (met, sentence)


@pytest.mark.parametrize("relation", ["<1e9", "<=1e9", ">-1e9", ">=-1e9"])
@pytest.mark.parametrize(
    ("metric", "measures", "sentence"),
    [
        ("eval_loss", {}, "eval_loss was not measured: it needs held-out rows"),
        ("eval_loss", {"eval_loss": None}, "eval_loss was not measured: it needs held-out rows"),
        ("perplexity", {"eval_loss": None}, "perplexity was not measured: it needs held-out rows"),
        ("eval_loss_change", {"eval_loss": 1.0}, "eval_loss_change was not measured: it needs held-out rows"),
        ("eval_loss_change", {"eval_loss_before": 1.0}, "eval_loss_change was not measured: it needs held-out rows"),
        ("seconds", {}, "seconds was not measured"),
        ("eval_loss", {"eval_loss": math.nan}, "eval_loss is nan, which meets no gate"),
        ("final_loss", {"final_loss": math.inf}, "final_loss is inf, which meets no gate"),
        ("perplexity", {"eval_loss": math.nan}, "perplexity is nan, which meets no gate"),
        ("perplexity", {"eval_loss": 1000.0}, "perplexity is inf, which meets no gate"),
        (
            "eval_loss_change",
            {"eval_loss": math.inf, "eval_loss_before": math.inf},
            "eval_loss_change is nan, which meets no gate",
        ),
    ],
)
def test_what_is_no_figure_meets_no_gate(
    relation: str, metric: str, measures: Mapping[str, float | None], sentence: str
) -> None:
    assert parse_gate(metric + relation).judge(measures) == (False, sentence)


@given(value=st.floats(-1e6, 1e6), bound=st.floats(-1e6, 1e6))
def test_a_measure_is_on_one_side_of_a_bound_and_is_written_there(value: float, bound: float) -> None:
    judged = {op: parse_gate(f"steps{op}{bound!r}").judge({"steps": value}) for op in ("<", "<=", ">", ">=")}
    met = {op for op, (is_met, _) in judged.items() if is_met}
    assert met == ({"<", "<="} if value < bound else {">", ">="} if value > bound else {"<=", ">="})
    written = float(judged["<"][1].removeprefix("steps is ").split(",")[0])
    assert (written < bound, written > bound) == (value < bound, value > bound)


losses = st.floats(0, 1e4)
pairs = st.lists(st.tuples(losses, losses, st.integers(1, 2000)), min_size=1, max_size=30)


def under(pairs: list[tuple[float, float, int]]) -> tuple[list[RowLoss], list[RowLoss]]:
    return [(before, num) for before, _, num in pairs], [(after, num) for _, after, num in pairs]


@given(pairs=pairs, seed=st.integers(0, 99))
def test_the_interval_holds_the_change(pairs: list[tuple[float, float, int]], seed: int) -> None:
    before, after = under(pairs)
    found = paired_interval(before, after, draws=200, seed=seed)
    mean_before, mean_after = (sum(nats for nats, _ in rows) / sum(num for _, num in rows) for rows in (before, after))
    assert found.change == pytest.approx(mean_after - mean_before, abs=1e-9 * (1 + mean_before + mean_after))
    # Rounding: the same mean may come out of another order of the rows.
    slack = 1e-12 * (1 + abs(found.change))
    assert found.low - slack <= found.change <= found.high + slack
    assert found.rows == len(pairs)


@given(pairs=pairs, seed=st.integers(0, 99))
def test_swapping_before_and_after_mirrors_the_interval(pairs: list[tuple[float, float, int]], seed: int) -> None:
    before, after = under(pairs)
    found = paired_interval(before, after, draws=100, seed=seed)
    mirrored = paired_interval(after, before, draws=100, seed=seed)
    assert (mirrored.change, mirrored.low, mirrored.high) == (-found.change, -found.high, -found.low)


@given(pairs=pairs)
def test_equal_losses_changed_by_nothing(pairs: list[tuple[float, float, int]]) -> None:
    before, _ = under(pairs)
    assert paired_interval(before, before, draws=100) == Interval(0, 0, 0, len(pairs))


def gauss_rows(
    rng: random.Random, num_rows: int, *, change: float, noise: float
) -> tuple[list[RowLoss], list[RowLoss]]:
    """Make rows whose losses per token differ widely, and change by nearly the same."""
    before: list[RowLoss] = []
    after: list[RowLoss] = []
    for _ in range(num_rows):
        num, loss = rng.randint(5, 300), rng.uniform(0.5, 6)
        before.append((loss * num, num))
        after.append(((loss + change + rng.gauss(0, noise)) * num, num))
    return before, after


@pytest.mark.parametrize("change", [-0.02, 0.02])
def test_a_small_change_of_rows_that_differ_widely_is_seen(change: float) -> None:
    """Rows drawn apart would hide it: losses per token spread over 5.5, so a mean of 40 rows by about 0.3."""
    found = paired_interval(*gauss_rows(random.Random(3), 40, change=change, noise=0.01))
    assert found.low < change < found.high
    assert found.low > 0 or found.high < 0
    assert found.high - found.low < 0.01


def test_long_rows_weigh_more() -> None:
    """By hand: (3 - 1) over 9 + 1 tokens; the mean of the rows' own means would be (3/9 - 1/1) / 2 < 0."""
    assert paired_interval([(0.0, 9), (1.0, 1)], [(3.0, 9), (0.0, 1)]).change == pytest.approx(0.2, abs=1e-15)


def test_the_ends_of_an_interval_are_those_of_efron_and_tibshirani() -> None:
    """Of two rows that change by 0 and 1, a draw's mean is 0, 0.5 or 1 with probability 1/4, 1/2, 1/4."""
    before, after = [(0.0, 1), (0.0, 1)], [(0.0, 1), (1.0, 1)]
    ends = {level: paired_interval(before, after, level=level) for level in (0.4, 0.6)}
    assert [(found.low, found.high) for found in ends.values()] == [(0.5, 0.5), (0, 1)]


@pytest.mark.parametrize(("level", "share"), [(0.95, 0.77), (0.9, 0.43)])
def test_the_ends_of_39_draws_are_the_first_and_the_last_or_the_second_ones(level: float, share: float) -> None:
    """(39 + 1) x 2.5% = 1, and x 5% = 2.

    Of three rows of which one changes, all drawn are that one with p = 1/27: at least once in 39 draws with probability
    1 - (26/27)^39 = 0.77, and at least twice with 0.77 - 39/27 (26/27)^38 = 0.43.
    """
    before, after = [(0.0, 1)] * 3, [(0.0, 1), (0.0, 1), (1.0, 1)]
    ends = [paired_interval(before, after, draws=39, level=level, seed=seed).high for seed in range(400)]
    # A standard deviation is 0.025.
    assert ends.count(1) / 400 == pytest.approx(share, abs=0.08)


def test_about_95_percent_of_intervals_hold_the_truth() -> None:
    """Long rows change more here, so that a mean of rows in place of tokens would miss it."""
    rng = random.Random(11)
    # Lengths are uniform on 1..100, and a token of a row of n changes by n/100 on average: E[n²] / 100 E[n] = 67.
    truth = sum(n * n for n in range(1, 101)) / 100 / sum(range(1, 101))
    held = 0
    for seed in range(200):
        before: list[RowLoss] = []
        after: list[RowLoss] = []
        for _ in range(40):
            num = rng.randint(1, 100)
            loss = rng.uniform(0, 5)
            before.append((loss * num, num))
            after.append(((loss + num / 100 + rng.gauss(0, 0.5)) * num, num))
        found = paired_interval(before, after, draws=399, seed=seed)
        held += found.low <= truth <= found.high
    # Of 200 at 95%: 190, with a standard deviation of 3; percentile intervals of 40 rows hold a little less.
    assert 180 <= held <= 197


def test_an_interval_is_the_same_for_the_same_seed() -> None:
    rows = gauss_rows(random.Random(1), 20, change=0.1, noise=1)
    assert paired_interval(*rows) == paired_interval(*rows)
    assert paired_interval(*rows) != paired_interval(*rows, seed=1)


def test_a_wider_level_is_wider() -> None:
    rows = gauss_rows(random.Random(1), 20, change=0.1, noise=1)
    of_50, of_95 = paired_interval(*rows, level=0.5), paired_interval(*rows, level=0.95)
    assert of_95.low < of_50.low < of_50.high < of_95.high
    assert (of_50.level, of_95.level) == (0.5, 0.95)


@pytest.mark.parametrize(
    ("before", "after", "draws", "level", "message"),
    [
        ([(1.0, 1)], [], 2000, 0.95, "1 rows before, and 0 after"),
        ([], [], 2000, 0.95, "no rows to compare"),
        ([(1.0, 1), (0.0, 0)], [(1.0, 1), (0.0, 0)], 2000, 0.95, "row 2 has no trained tokens"),
        ([(1.0, 3)], [(1.0, 2)], 2000, 0.95, "row 1 has 3 trained tokens before, and 2 after"),
        ([(1.0, 1)], [(1.0, 1)], 38, 0.95, "38 draws give no interval at level 0.95"),
        ([(1.0, 1)], [(1.0, 1)], 2000, 1.0, "2000 draws give no interval at level 1.0"),
        ([(1.0, 1)], [(1.0, 1)], 2000, 0.0, "2000 draws give no interval at level 0.0"),
    ],
)
def test_what_is_no_pair_of_rows_is_refused(
    before: list[RowLoss], after: list[RowLoss], draws: int, level: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_interval(before, after, draws=draws, level=level)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_shows_nothing(bad: float) -> None:
    """Both comparisons with NaN are false, so that a ruined model was `not shown to be worse`."""
    rows = [(1.0, 1)] * 9
    ruined = [*rows[1:], (bad, 1)]
    for found in (paired_interval(rows, ruined), paired_interval(ruined, rows)):
        assert math.isnan(found.change)
        assert judge_old(found) == (False, "old rows: a loss among the 9 is not finite, so nothing is shown")
        assert judge_new(found) == (False, "new rows: a loss among the 9 is not finite, so nothing is shown")


@pytest.mark.parametrize(
    ("change", "low", "high", "kept", "learnt"),
    [
        (-0.2, -0.3, -0.1, True, True),
        (-0.1, -0.3, 0.1, True, False),
        (0.1, -0.1, 0.3, True, False),
        (0.2, 0.1, 0.3, False, False),
        # An interval that touches 0 shows nothing, either way.
        (0.1, 0.0, 0.3, True, False),
        (-0.1, -0.3, 0.0, True, False),
        (0.0, 0.0, 0.0, True, False),
    ],
)
def test_old_rows_must_not_be_shown_worse_and_new_ones_must_be_shown_better(
    change: float, low: float, high: float, kept: bool, learnt: bool
) -> None:
    interval = Interval(change, low, high, 40)
    assert (judge_old(interval)[0], judge_new(interval)[0]) == (kept, learnt)
    assert ("not shown to be worse" in judge_old(interval)[1]) == kept
    assert ("not shown to be better" in judge_new(interval)[1]) == (not learnt)


def test_the_sentence_tells_change_interval_and_rows() -> None:
    worse = Interval(0.0213, 0.004, 0.0386, 40)
    described = "loss changed by +0.0213 (95% interval +0.004 to +0.0386, 40 rows)"
    assert judge_old(worse)[1] == f"old rows: {described}: worse"
    assert judge_new(worse)[1] == f"new rows: {described}: not shown to be better"
    better = Interval(-0.25, -0.5, -0.0, 8, level=0.9)
    assert judge_old(better)[1] == (
        "old rows: loss changed by -0.25 (90% interval -0.5 to +0, 8 rows): not shown to be worse"
    )


def test_too_few_rows_show_nothing() -> None:
    few, enough = (Interval(-0.2, -0.3, -0.1, rows) for rows in (MIN_ROWS - 1, MIN_ROWS))
    why = "7 of them, and at least 8 are needed to tell a change from chance"
    assert judge_old(few) == (False, f"old rows: {why}")
    assert judge_new(few) == (False, f"new rows: {why}")
    assert judge_old(enough)[0]
    assert judge_new(enough)[0]
