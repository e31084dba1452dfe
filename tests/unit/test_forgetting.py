"""What a sequence of runs learnt and forgot: the figures, the table, and the part of the report."""

import csv
import io
import json
import math
from collections import Counter

import pytest

from backprop import report
from backprop.core.data.replay import with_replay
from backprop.core.data.sequences import Joined, pick
from backprop.core.forgetting import Ledger, Score, best_exponent, measure, over_trained, values_of
from backprop.events import Forgetting

HOSTILE = '</td><script>alert("x")</script>'


def row(*values: float) -> list[Score]:
    return [Score(loss=1.0, exact_match=value) for value in values]


def test_figures_by_hand() -> None:
    figures = measure([row(0.9), row(0.5, 0.8), row(0.6, 0.4, 1.0)])
    assert figures.average_performance == pytest.approx((0.6 + 0.4 + 1.0) / 3)
    assert figures.learning_accuracy == pytest.approx((0.9 + 0.8 + 1.0) / 3)
    assert figures.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 2)
    assert figures.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)


def test_a_part_that_got_better_later_is_forgotten_from_its_best() -> None:
    figures = measure([row(0.5), row(0.9, 0.5), row(0.7, 0.5, 0.5)])
    assert figures.backward_transfer == pytest.approx(((0.7 - 0.5) + 0.0) / 2)
    assert figures.forgetting == pytest.approx(((0.9 - 0.7) + 0.0) / 2)


def test_nothing_is_forgotten_after_one_run_and_learning_nothing_shows() -> None:
    one = measure([row(0.4)])
    assert (one.backward_transfer, one.forgetting) == (0, 0)
    lazy = measure([row(0.1), row(0.1, 0.1)])
    assert (lazy.backward_transfer, lazy.average_performance) == (0, pytest.approx(0.1))


def test_a_score_is_exact_match_or_else_the_likelihood_of_a_token() -> None:
    assert values_of([Score(loss=math.log(4))]) == pytest.approx([0.25])
    known, lost = Score(loss=math.log(4), exact_match=0.75), Score(loss=math.log(8), exact_match=0.0)
    assert values_of([known, lost]) == [0.75, 0.0]
    assert values_of([lost, known]) == pytest.approx([1 / 8, 1 / 4]), "a part has one scale, whatever comes later"


def test_what_is_forgotten_shows_where_no_answer_was_ever_exact() -> None:
    """All scores were 0, nothing seemed to be lost, and `--max-forgetting` was met whatever the loss did."""
    good, bad = Score(loss=math.log(2), exact_match=0.0), Score(loss=math.log(8), exact_match=0.0)
    parts = Ledger(parts=["1 a", "2 b"], runs=[1, 2], scores=[[good], [bad, good]])
    assert measure(parts.scores).forgetting == pytest.approx(1 / 2 - 1 / 8)
    assert measure(parts.scores).backward_transfer == pytest.approx(1 / 8 - 1 / 2)
    assert parts.lost(2) == pytest.approx(1 / 2 - 1 / 8)
    general = Ledger(parts=["1 a"], runs=[1], scores=[[good]], general_before=good, general=[bad])
    assert general.lost(1) == pytest.approx(1 / 2 - 1 / 8)
    assert general.to_csv().splitlines()[-1] == f"1,general,{bad.loss},0.0,{math.exp(-bad.loss)}"
    assert json.loads(json.dumps(parts.to_json()))["score"][1] == pytest.approx([1 / 8, 1 / 2])


def test_between_merges_the_score_counts_then_the_loss_then_the_papers_weight() -> None:
    """Where no answer was exact, the merge that forgets most was taken, since it is the first."""
    from backprop.core.slao import EXPONENTS

    def chosen(*rows: list[Score]) -> float:
        return best_exponent(EXPONENTS, rows)

    none = [[Score(loss=loss, exact_match=0.0)] for loss in (5.0, 4.0, 3.0, 2.0, 2.5)]
    assert chosen(*none) == 0.75
    assert chosen(*[[Score(loss=3.0, exact_match=0.0)]] * 5) == 0.5
    assert chosen(*[[Score(loss=loss, exact_match=0.5)] for loss in (5.0, 4.0, 3.0, 2.0, 1.0)]) == 1.0
    exact = [[Score(loss=2.0, exact_match=share)] for share in (0.0, 0.5, 0.25, 0.25, 0.25)]
    assert chosen(*exact) == 0.25, "who is exact is better, though the first has no exact answer at all"


def test_a_merge_whose_loss_is_not_a_number_knows_nothing_is_not_chosen_and_meets_no_gate() -> None:
    """What the general rows lost was compared with `max`, which passes over what is not a number: the gate was met."""
    good, broken = Score(loss=math.log(2)), Score(loss=math.nan, exact_match=1.0)
    general = Ledger(parts=["1 a"], runs=[1], scores=[[good]], general_before=good, general=[broken])
    assert general.lost(1) == pytest.approx(1 / 2)
    parts = Ledger(
        parts=["1 a", "2 b"], runs=[1, 2], scores=[[good], [broken, good]], general_before=good, general=[good] * 2
    )
    assert parts.lost(2) == pytest.approx(1 / 2)
    assert best_exponent((0.0, 0.5, 1.0), [[broken], [good], [good]]) == 0.5
    assert best_exponent((0.0, 0.5, 1.0), [[broken], [broken], [Score(loss=9.0)]]) == 1.0


def ledger() -> Ledger:
    return Ledger(
        parts=["1 a.jsonl", "3 c.jsonl"],
        runs=[1, 3],
        scores=[row(0.9), [Score(loss=0.5, exact_match=0.6), Score(loss=0.25)]],
        general_before=Score(loss=0.0),
        general=[Score(loss=math.log(2)), Score(loss=math.log(4))],
    )


def test_the_table_has_a_line_for_each_run_and_part_and_the_base_model_is_run_0() -> None:
    lines = list(csv.DictReader(io.StringIO(ledger().to_csv())))
    assert [(line["run"], line["part"]) for line in lines] == [
        ("0", "general"),
        ("1", "1 a.jsonl"),
        ("1", "general"),
        ("3", "1 a.jsonl"),
        ("3", "3 c.jsonl"),
        ("3", "general"),
    ]
    assert (lines[1]["exact_match"], lines[4]["exact_match"]) == ("0.9", "")
    assert float(lines[3]["score"]) == 0.6
    assert float(lines[4]["score"]) == pytest.approx(math.exp(-0.25))
    assert float(lines[5]["score"]) == pytest.approx(1 / 4)


def test_what_is_lost_is_the_worse_of_old_parts_and_general_rows() -> None:
    whole = ledger()
    assert whole.lost(3) == pytest.approx(1 - 0.25)  # general: likelihood 1 before, 1/4 now
    assert whole.lost(1) == pytest.approx(1 - 0.5), "of the run that is asked for, not of the last"
    parts_alone = Ledger(parts=whole.parts, runs=whole.runs, scores=whole.scores)
    assert parts_alone.lost(3) == pytest.approx(0.9 - 0.6)
    told = json.loads(json.dumps(whole.to_json()))
    assert told["measures"][-1]["forgetting"] == pytest.approx(0.9 - 0.6)
    assert told["general_loss"] == [math.log(2), math.log(4)]


def test_a_run_is_over_trained_when_most_of_its_steps_had_nothing_to_learn() -> None:
    assert over_trained([1.0] * 4 + [0.01] * 6)
    assert not over_trained([1.0] * 5 + [0.01] * 5)
    assert not over_trained([0.01] * 4)  # too short to tell


def test_replay_is_its_share_of_the_rows_drawn_from_earlier_parts_only() -> None:
    parts = [tuple(f"{name}{n}" for n in range(90)) for name in "abc"]
    mixed = with_replay(parts, share=0.1, seed=1)
    old = mixed[90:]
    assert mixed[:90] == parts[2]
    assert len(old) == 10  # of 100
    assert len(set(old)) == 10
    assert {one[0] for one in old} == {"a", "b"}
    assert with_replay(parts, share=0.1, seed=1) == mixed
    assert with_replay(parts, share=0.1, seed=2) != mixed
    assert with_replay(parts[:1], share=0.1, seed=1) == parts[0]
    assert with_replay(parts, share=0.0, seed=1) == parts[2]


def test_the_budget_of_replay_is_shared_alike_and_does_not_grow_with_the_parts() -> None:
    """Rows were drawn as evenly as parts are large: of a small one beside a large one, nearly none."""
    own = tuple(f"own{n}" for n in range(90))
    large, middle, small = (tuple(f"{name}{n}" for n in range(num)) for name, num in (("a", 5000), ("b", 60), ("c", 2)))

    def given(*earlier: tuple[str, ...], seed: int = 1) -> Counter[str]:
        return Counter(one[0] for one in with_replay([*earlier, own], share=0.1, seed=seed)[90:])

    assert given(large) == {"a": 10}
    assert given(large, middle) == {"a": 5, "b": 5}
    for seed in range(9):
        assert given(large, middle, small, seed=seed) == {"a": 4, "b": 4, "c": 2}, (
            "what a small one lacks the others give"
        )
    few = [(name,) * 3 for name in "abcdefghijklmnopqrst"]
    assert set(given(*few).values()) == {1}
    assert len({frozenset(given(*few, seed=seed)) for seed in range(9)}) > 1, "it is not always the same that give none"


def test_replay_does_not_draw_what_is_trained_on_anyway_and_takes_a_part_that_came_twice_for_one() -> None:
    first, second, own = (tuple(f"{name}{n}" for n in range(20)) for name in "abc")
    assert with_replay([own, own], share=0.5, seed=1) == own
    drawn = with_replay([first, own, second, first, own], share=0.5, seed=1)[20:]
    assert Counter(one[0] for one in drawn) == {"a": 10, "b": 10}
    assert len(set(drawn)) == 20


def test_replay_of_more_than_there_is_takes_all_that_there_is() -> None:
    assert sorted(with_replay([("a",), ("b", "c", "d")], share=0.9, seed=0)) == ["a", "b", "c", "d"]


def test_joined_sequences_that_are_not_in_memory_stay_so() -> None:
    lazy = pick(Joined([("a", "b"), (), ("c",)]), range(3))
    assert list(with_replay([("x",), lazy], share=0.25, seed=0)) == ["a", "b", "c", "x"]
    joined = Joined([("a", "b"), (), ("c",)])
    assert (len(joined), joined[0], joined[2], joined[-1], list(joined[1:])) == (3, "a", "c", "c", ["b", "c"])


def test_the_report_shows_the_matrix_with_names_escaped() -> None:
    told = [
        Forgetting(
            run=run,
            parts=(HOSTILE, "b.jsonl")[: len(scores)],
            scores=scores,
            average_performance=0.5,
            learning_accuracy=0.75,
            backward_transfer=-0.125,
            forgetting=0.125,
            general_loss=2.5,
            general_loss_before=1.5,
        )
        for run, scores in ((1, (0.9,)), (2, (0.111, 1.0)))
    ]
    text = report.page({"command": "multi-run", "status": "finished"}, told)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 3  # the table, the curves' label, their legend
    assert "var(--curve) 7%" in text
    for figure in ("0.111", "-0.125", "2.500", "1.500"):
        assert f">{figure}</td>" in text
    assert text.count("<polyline") == 2
    assert "table.heat th + th { text-align: right;" in text, "a heading stands over its figures"
