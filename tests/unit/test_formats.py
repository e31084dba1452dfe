"""Shapes of rows, and what is refused."""

import pytest

from backprop.core.data.formats import Row, judge, to_conversation
from backprop.errors import DataError

ANSWERED = [("user", "hi"), ("assistant", "ho")]


def row(value: object) -> Row:
    return Row(place="data.jsonl, line 3", value=value)


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, "sharegpt"),
        ({"conversations": [{"role": "User", "content": "hi"}, {"role": "model", "content": "ho"}]}, "sharegpt"),
        ({"instruction": "hi", "input": "", "output": "ho", "id": 7}, "alpaca"),
        ({"instruction": "hi", "response": "ho", "category": "open_qa"}, "dolly"),
        ({"prompt": "hi", "completion": "ho"}, "prompt/completion"),
        (
            {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]},
            "prompt/completion",
        ),
        ({"question": "hi", "answer": "ho"}, "question/answer"),
        ({"question": "hi", "answer": "ho", "messages": None}, "question/answer"),
        ({"instruction": "hi", "input": "", "output": "ho", "text": "Below is an instruction …"}, "alpaca"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                    {"role": "assistant", "content": "ho"},
                ]
            },
            "messages",
        ),
    ],
)
def test_every_shape_becomes_the_same_turns(value: object, shape: str) -> None:
    conversation = to_conversation(row(value))
    assert [(turn["role"], turn["content"]) for turn in conversation.messages] == ANSWERED
    assert conversation.shape == shape


def test_alpaca_input_follows_the_instruction() -> None:
    conversation = to_conversation(row({"instruction": "add", "input": "1 2", "output": "3"}))
    assert conversation.messages[0]["content"] == "add\n\n1 2"


def test_a_system_turn_is_kept() -> None:
    conversation = to_conversation(row({"system": "be brief", "instruction": "hi", "output": "ho"}))
    assert conversation.messages[0] == {"role": "system", "content": "be brief"}


def test_text_has_no_turns() -> None:
    conversation = to_conversation(row({"text": "once"}))
    assert (conversation.messages, conversation.text) == ((), "once")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1, 2], "is a list, not an object"),
        ("hi", "is text, not an object"),
        (None, "is null, not an object"),
        ({"question": "hi"}, "has unknown columns: `question`"),
        ({}, "has unknown columns: none"),
        ({"messages": [], "question": "x", "answer": "y"}, "has two shapes at once: messages and question/answer"),
        ({"text": None}, "has unknown columns: `text`"),
        ({"messages": []}, "where a list of turns belongs"),
        ({"messages": "hi"}, "holds text where a list of turns belongs"),
        ({"messages": ["hi"]}, "turn 1 is text, not an object"),
        ({"messages": [{"role": "user"}]}, "turn 1 has the keys `role`"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "turn 1 has an unknown role: 'robot'"),
        ({"messages": [{"role": 3, "content": "hi"}]}, "turn 1 has an unknown role: 3"),
        ({"messages": [{"role": "user", "content": 3}]}, "holds a number in `turn 1`"),
        ({"messages": [{"role": "user", "content": None}]}, "holds null in `turn 1`"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part of kind 'image'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "has tool calls"),
        ({"prompt": "hi", "completion": True}, "holds true or false in `completion`"),
        ({"text": "\ud800"}, "holds half a character"),
    ],
)
def test_a_bad_row_is_named_with_its_place_and_its_fault(value: object, said: str) -> None:
    with pytest.raises(DataError) as raised:
        to_conversation(row(value))
    assert "data.jsonl, line 3" in raised.value.message
    assert said in raised.value.message


def test_a_long_row_is_quoted_in_part() -> None:
    with pytest.raises(DataError) as raised:
        to_conversation(row({"nothing": "x" * 100_000}))
    assert len(raised.value.message) < 400  # 200 characters of the row, and the words round it


def test_rows_without_an_answer_are_left_out_and_said() -> None:
    judged = judge([row({"question": "a", "answer": "b"}), row({"question": "a", "answer": "  "})])
    assert len(judged.conversations) == 1
    assert "1 rows without an assistant turn" in judged.warnings[0]


def test_rows_of_several_shapes_are_taken_and_counted() -> None:
    judged = judge([row({"question": "a", "answer": "b"}), row({"text": "c"})])
    assert judged.shapes == {"question/answer": 1, "text": 1}
    assert "several shapes: 1 question/answer, 1 text" in judged.warnings[0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no rows"),
        ([row({"messages": [{"role": "user", "content": "hi"}]})], "none of the 1 rows has an assistant turn"),
        ([row({"text": ""})], "none of the 1 rows"),
    ],
)
def test_nothing_to_train_on_is_an_error(rows: list[Row], said: str) -> None:
    with pytest.raises(DataError) as raised:
        judge(rows)
    assert said in raised.value.message
    assert raised.value.hint
