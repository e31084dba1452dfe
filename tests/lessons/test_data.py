"""What went wrong with others' data, planted into ours: named before anything heavy is loaded, or done right."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done, backprop, chat

from backprop.config import TrainConfig
from backprop.core.data.formats import Conversation
from backprop.core.data.order import SampleOrder
from backprop.verbs.prepare import read_data

ASKS = {"role": "user", "content": "Where is the lighthouse of Quillhaven?"}
ANSWERS = {"role": "assistant", "content": "On the north pier."}
GOOD = {"messages": [ASKS, ANSWERS]}
TURNS = [("user", ASKS["content"]), ("assistant", ANSWERS["content"])]


def run(cwd: Path, *data: Path, evaluate: Path | None = None) -> Done:
    """Train with a model that is not there: what is wrong with the data comes first, in words and exit code."""
    options = ["--eval-data", evaluate] if evaluate else []
    return backprop("train", "--data", *data, *options, "--model", cwd / "no-model", cwd=cwd)


def read(path: Path, **options: object) -> tuple[Conversation, ...]:
    judged, _ = read_data(TrainConfig(data=(str(path),), **options))  # type: ignore[arg-type]
    return judged.conversations


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in conversation.messages]


REFUSED = {
    "trl#6668 #6025 #3927, every label masked: no turn is the assistant's": (
        [{"messages": [ASKS]}, {"messages": [{"role": "system", "content": "x"}, ASKS]}],
        "none of the 2 rows has an assistant turn with text in it, first: data.jsonl, line 1",
    ),
    "trl#6668 #6025 #3927, every label masked: all answers are blank": (
        [{"prompt": "a", "completion": " "}],
        "none of the 1 rows has an assistant turn",
    ),
    "backpropagate 1.8.5, an empty file was a StopIteration": ("", "`data.jsonl` is empty"),
    "backpropagate 1.8.5, a file of blank lines": ("\n \n", "the data holds no rows"),
    "backpropagate 1.8.5, wrong columns were a StopIteration": (
        [GOOD, {"frage": "a", "antwort": "b"}],
        'data.jsonl, line 2 has unknown columns: `frage`, `antwort`: {"frage": "a", "antwort": "b"}',
    ),
    "a broken line of JSON": (json.dumps(GOOD) + '\n{"messages": [\n', "data.jsonl, line 2 is not JSON"),
    "MT-Bench's rows are prompts without answers": (
        [{"question_id": 81, "category": "writing", "turns": ["Write a post.", "Rewrite it."]}],
        "data.jsonl, line 1 asks in `turns`, but has no answer to train on",
    ),
    "prompts without answers": ([{"prompt": "a"}], "data.jsonl, line 1 asks in `prompt`, but has no answer"),
    "pictures beside the turns": ([{**GOOD, "images": ["a.png"]}], "line 1 has pictures or sound in `images`"),
    "pictures in a turn": (
        [{"messages": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "a"}]}, ANSWERS]}],
        "line 1 turn 1 has a part of kind 'image_url', not text",
    ),
    "preferences trained on as text": (
        [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        "line 1 is a preference (`chosen` and `rejected`), and nothing says how to learn from it",
    ),
    "backpropagate 1.8.5, a tool call that can not be read became an empty turn": (
        [{"messages": [ASKS, {"role": "assistant", "content": None, "tool_calls": [{"arguments": "{}"}]}]}],
        "line 1 turn 2, call 1 is not a call of a tool",
    ),
    "a turn without text became an empty turn": (
        [{"messages": [{"role": "user", "content": None}, ANSWERS]}],
        "line 1 holds null in `turn 1` where text belongs",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_bad_data_is_named_with_exit_3_and_leaves_nothing(
    write: Callable[..., Path], tmp_path: Path, fault: str
) -> None:
    content, words = REFUSED[fault]
    done = run(tmp_path, write(content).relative_to(tmp_path))
    assert done.returncode == 3, done.stderr
    assert words in done.stderr
    assert "hint: " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


ACCEPTED = {
    "Dolly": {"instruction": TURNS[0][1], "context": "", "response": TURNS[1][1], "category": "open_qa"},
    "question/answer": {"question": TURNS[0][1], "answer": TURNS[1][1]},
    "prompt/completion": {"prompt": TURNS[0][1], "completion": TURNS[1][1]},
    "prompt/completion as turns": {"prompt": [ASKS], "completion": [ANSWERS]},
    "list content trained as its repr": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Where is the lighthouse"},
                    {"type": "text", "text": " of Quillhaven?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": TURNS[1][1]}]},
        ]
    },
}


@pytest.mark.parametrize("shape", ACCEPTED)
def test_rows_that_backpropagate_1_8_5_refused_or_garbled_are_read(write: Callable[..., Path], shape: str) -> None:
    (conversation,) = read(write([ACCEPTED[shape]]))
    assert said(conversation) == TURNS


def test_text_rows_that_backpropagate_1_8_5_refused_are_read(write: Callable[..., Path]) -> None:
    (conversation,) = read(write([{"text": "once upon a time"}]))
    assert (conversation.text, conversation.messages) == ("once upon a time", ())


def test_the_context_of_dolly_is_not_lost(write: Callable[..., Path]) -> None:
    (conversation,) = read(write([{"instruction": "Sum it up.", "context": "A long story.", "response": "Short."}]))
    assert said(conversation) == [("user", "Sum it up.\n\nA long story."), ("assistant", "Short.")]


def test_tool_calls_do_not_become_empty_turns(write: Callable[..., Path]) -> None:
    """backpropagate 1.8.5."""
    call = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"day": 3}'}}
    row = {"messages": [ASKS, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    ((_, answer),) = [conversation.messages for conversation in read(write([row]))]
    assert answer.get("tool_calls") == [{**call, "function": {"name": "tide", "arguments": {"day": 3}}}]


LONG = "The harbour master of Quillhaven rings the bell at noon, and the boats that lie at the south quay leave the harbour."
ONE = [chat(f"question {LONG}", f"answer {LONG}")]
WARNED = {
    "rows of the training data in the evaluation data": (
        [GOOD, chat("a", "b")],
        [GOOD],
        "1 of 1 evaluation rows are also in the training data: the evaluation would flatter, first: {held}, line 1 = {data}, line 1",
    ),
    "rows nearly of the training data in the evaluation data": (
        ONE,
        [chat(f"question {LONG}", f"answer {LONG} Now.")],
        "1 of 1 evaluation rows are nearly in the training data: the evaluation would flatter",
    ),
    "a row that stands twice": (
        [GOOD, chat("a", "b"), GOOD],
        None,
        "1 of 3 rows are exact duplicates, first: {data}, line 3 = {data}, line 1",
    ),
    "the same question answered otherwise": (
        [chat("a", "b"), chat("a", "c")],
        None,
        "1 of 2 rows answer a question otherwise than a row before, first: {data}, line 2 = {data}, line 1",
    ),
    "some rows have no answer": (
        [GOOD, {"messages": [ASKS]}],
        None,
        "1 rows without an assistant turn are left out, first: {data}, line 2",
    ),
    "a turn that is empty": (
        [{"messages": [{"role": "user", "content": ""}, ANSWERS]}],
        None,
        "1 turns are empty, first: {data}, line 1, turn 1",
    ),
}


@pytest.mark.parametrize("fault", WARNED)
def test_data_that_deceives_is_warned_of(write: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    rows, evaluation, words = WARNED[fault]
    data, held = write(rows), write(evaluation or [chat("x", "y")], "held.jsonl")
    done = run(tmp_path, data, evaluate=held)
    assert "no such model" in done.stderr
    told = " ".join(done.stderr.split())
    assert "warning: " + words.format(data=data, held=held) in told


def test_data_without_such_faults_raises_no_alarm(write: Callable[..., Path], tmp_path: Path) -> None:
    done = run(tmp_path, write([GOOD, chat("a", "b")]), evaluate=write([chat("x", "y")], "held.jsonl"))
    assert "no such model" in done.stderr
    assert "warning" not in done.stderr


def test_rows_that_are_added_move_no_held_out_row_into_the_training_data(write: Callable[..., Path]) -> None:
    """A split by shuffling draws anew for each size: what was held out is trained on next week."""
    rows = [chat(f"question {number}", f"answer {number}") for number in range(300)]
    parts = [
        read_data(TrainConfig(data=(str(write(some)),), eval_fraction=0.1))
        for some in (rows[50:], [*rows[:50], *reversed(rows[50:])])
    ]
    (_, before), (after, _) = parts
    assert before
    trained = {str(conversation.messages) for conversation in after.conversations}
    assert not trained & {str(conversation.messages) for conversation in before}


@pytest.mark.parametrize("stopped_after", [0, 1, 4, 9])
def test_samples_are_neither_repeated_nor_dropped_by_an_interruption(stopped_after: int) -> None:
    """accelerate#2823 #4071, LlamaFactory#7085; two passes over 35 examples in steps of 7."""
    before, after = (SampleOrder(num_examples=35, batch_size=7, seed=3) for _ in range(2))
    seen = [number for step in range(stopped_after) for number in before.of_step(step)]
    seen += [number for step in range(stopped_after, 10) for number in after.of_step(step)]
    assert Counter(seen) == dict.fromkeys(range(35), 2)
