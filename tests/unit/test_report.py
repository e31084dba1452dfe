"""The report page."""

from html.parser import HTMLParser
from typing import Any

from backprop import report
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
