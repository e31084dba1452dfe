"""The report page, and the data as the terminal tells it."""

from html.parser import HTMLParser
from typing import Any

import pytest

from backprop import report
from backprop.console import colour_spans, ledger_text
from backprop.core.data.inspect import Ledger, histogram
from backprop.events import DataRead, Eval, Event, Step

HOSTILE = '</title><script>alert("x")</script>'


def step(number: int, loss: float, *, run: int = 1) -> Step:
    return Step(
        step=number,
        num_steps=2,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=1,
        seconds=1,
        tokens_per_second=10,
        memory_bytes=2**30,
        run=run,
    )


def page(*events: Event, **manifest: object) -> str:
    return report.page({"command": "train", "status": "finished", **manifest}, events)


def tags(text: str) -> list[str]:
    found: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            found.append(tag)

    Parser().feed(text)
    return found


def test_everything_from_outside_is_escaped() -> None:
    data = DataRead(
        rows=1,
        eval_rows=0,
        examples=1,
        tokens=1,
        trained_tokens=1,
        tokens_cut=0,
        examples_dropped=0,
        shapes={HOSTILE: 1},
        longest=1,
    )
    text = page(
        data,
        step(1, 2.0),
        model={"name": HOSTILE},
        plan={HOSTILE: {"value": HOSTILE, "reason": HOSTILE}},
        result={HOSTILE: HOSTILE},
        error={"message": HOSTILE},
        versions={"x": HOSTILE},
    )
    assert "script" not in tags(text)
    assert text.count("&lt;script&gt;") >= 8


def test_the_runs_of_a_multi_run_stand_one_after_another() -> None:
    text = page(step(1, 4.0), step(2, 3.0), step(1, 2.0, run=2), step(2, 1.0, run=2), Eval(step=2, loss=1.5, run=2))
    loss = text.split("polyline")[1]
    xs = [float(point.split(",")[0]) for point in loss.split('points="')[1].split('"')[0].split()]
    assert len(xs) == 4
    assert xs == sorted(set(xs))


def test_one_step_is_seen() -> None:
    """A line through one point is nothing: the chart of a run of one step was once empty."""
    assert "<circle" in page(step(1, 4.0))


def test_a_run_without_steps_has_a_page() -> None:
    assert "no steps" in page()


LEDGER: dict[str, Any] = {
    "rows": 97,
    "held_out": 5,
    "duplicates": 3,
    "duplicates_first": [f"{HOSTILE}, line 9", "a.jsonl, line 3"],
    "near_duplicates": 0,
    "near_duplicates_first": None,
    "near_checked": 94,
    "languages": {"English": 95, HOSTILE: 2},
    "lengths": [[0, 50, 90], [50, 100, 0], [100, 150, 7]],
}


def test_the_ledger_is_a_table_a_chart_and_languages() -> None:
    text = page(data=LEDGER)
    assert text.count("<h2>Data</h2>") == 1
    assert "line 9 = a.jsonl, line 3" in text
    assert "<td>near-duplicates</td><td>0</td>" in text
    assert "<td>English</td><td>95 rows</td>" in text
    assert "<title>0 to 49: 90</title>" in text


def test_each_bar_is_as_tall_as_its_count() -> None:
    bars = page(data=LEDGER).split("<rect ")[1:]
    heights = [float(bar.split('height="')[1].split('"')[0]) for bar in bars]
    assert heights[0] == max(heights)
    assert heights[1] == 0
    assert abs(heights[2] / heights[0] - 7 / 90) < 0.001  # rounded to tenths of a pixel


def test_a_failed_proof_is_seen_without_colour() -> None:
    text = page(
        proofs=[
            {"name": "gradients flow", "ok": True, "found": "all of 420", "seconds": 0.51234},
            {"name": HOSTILE, "ok": False, "found": HOSTILE, "seconds": 2},
        ]
    )
    assert '<td>gradients flow</td><td>passed</td><td>all of 420</td><td class="number">0.5123</td>' in text
    assert '<td class="failed">failed</td>' in text
    assert "script" not in tags(text)


def test_samples_stand_side_by_side_and_are_escaped() -> None:
    samples = [
        {"prompt": f"say {HOSTILE}", "before": "no", "after": "yes\nyes"},
        {"prompt": "x", "before": HOSTILE, "after": HOSTILE},
    ]
    text = page(samples=samples, data=LEDGER)
    assert "<th>prompt</th><th>before</th><th>after</th>" in text
    assert '<td class="said">no</td><td class="said">yes\nyes</td>' in text
    assert "script" not in tags(text)
    assert text.count("&lt;script&gt;") == 5


def test_a_section_without_its_key_is_absent() -> None:
    text = page(step(1, 2.0))
    assert not [name for name in ("Data", "Proofs", "Samples") if f"<h2>{name}</h2>" in text]


def test_the_terminal_tells_the_ledger_in_plain_lines() -> None:
    sizes = {
        "tokens": 19332,
        "trained_tokens": 4210,
        "longest": 312,
        "overlap": 1,
        "near_overlap": 2,
        "same_question": 4,
    }
    assert ledger_text({**LEDGER, **sizes, "languages": {"English": 95, "German": 2}}).splitlines() == [
        "rows 102 (97 to train on, 5 held out) · 4,210 trained tokens of 19,332 · longest 312",
        "duplicates 3 · near-duplicates 0 · overlap with evaluation 1 and 2 nearly · same question, another answer 4",
        "languages: English 98 %, German 2 %",
        "tokens per example",
        f"     0 to 49  {'█' * 40} 90",
        "    50 to 99   0",
        "  100 to 149  ███▏ 7",
    ]


def test_the_terminal_says_nothing_of_what_is_not_there() -> None:
    assert ledger_text({"rows": 3, "held_out": 0, "languages": {}}).splitlines() == [
        "rows 3 (3 to train on, 0 held out)",
        "duplicates 0 · near-duplicates 0",
    ]


def test_the_terminal_reads_what_the_ledger_writes() -> None:
    """A key renamed on one side would be told as 0."""
    names = ("duplicates", "near_duplicates", "overlap", "near_overlap", "same_question", "contradictions")
    counts = dict.fromkeys(names, 7)
    pairs = {f"{key}_first": ("a", "b") for key in counts}
    ledger = Ledger(rows=70, held_out=7, near_checked=7, languages={"English": 70}, **counts, **pairs)  # pyright: ignore[reportArgumentType]
    assert ledger_text(ledger.to_json()).splitlines()[1].count("7") == 6
    assert page(data=ledger.to_json()).count("<td>7, first: a = b</td>") == 6


@pytest.mark.parametrize("buckets", [1, 12, 13, 40])
def test_a_text_histogram_has_at_most_twelve_lines_and_loses_nothing(buckets: int) -> None:
    lengths = [[50 * number, 50 * (number + 1), number] for number in range(buckets)]
    lines = ledger_text({"rows": 1, "lengths": lengths}).splitlines()[3:]
    assert len(lines) <= 12
    assert sum(int(line.split()[-1]) for line in lines) == sum(range(buckets))


def test_the_smallest_bar_is_seen() -> None:
    lengths = [[one.low, one.high, one.count] for one in histogram([10] * 5000 + [300])]
    assert "▏ 1" in ledger_text({"rows": 5001, "lengths": lengths}).splitlines()[-1]


SPANS = [("ask\x1b[2J", False), ("answer\r\nnext", True), ("end", False)]


def test_trained_text_stands_between_marks_without_colour() -> None:
    assert colour_spans(SPANS, colour=False) == "ask\\x1b[2J»answer\\r\nnext«end"


def test_trained_text_is_green_and_the_rest_dim_and_no_escape_of_the_data_gets_through() -> None:
    shown = colour_spans(SPANS, colour=True)
    assert shown == "\x1b[2mask\\x1b[2J\x1b[0m\x1b[32manswer\\r\nnext\x1b[0m\x1b[2mend\x1b[0m"
