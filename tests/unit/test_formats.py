"""Shapes of rows, and what is refused."""

import json

import pytest

from backprop.core.data.formats import Conversation, Row, parse_columns, to_conversations
from backprop.core.data.judge import judge
from backprop.core.data.shapes import is_turn
from backprop.errors import DataError, UsageError

ANSWERED = [("user", "hi"), ("assistant", "ho")]


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def row(value: object) -> Row:
    return Row(place="data.jsonl, line 3", value=value)


def one(value: object, **columns: str) -> Conversation:
    (conversation,) = to_conversations(row(value), columns)
    return conversation


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in conversation.messages]


def refused(value: object, **columns: str) -> DataError:
    with pytest.raises(DataError) as raised:
        to_conversations(row(value), columns)
    assert "data.jsonl, line 3" in raised.value.message
    assert raised.value.hint
    return raised.value


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
        ({"messages": TURNS, "prompt": "hi", "prompt_id": "7"}, "messages"),
        ({"messages": TURNS, "question": "hi", "answer": "ho"}, "messages"),
        ({"messages": json.dumps(TURNS)}, "messages"),
        (TURNS, "messages"),
        ({"conversation": [{"human": "hi", "assistant": "ho"}]}, "sharegpt"),
        ({"conversation": [{"assistant": "ho", "user": "hi", "id": 1}]}, "sharegpt"),
        ({"conversation": [{"system": None, "input": "hi", "output": "ho"}]}, "sharegpt"),
        ({"dialog": TURNS}, "sharegpt"),
        ({"dialogue": TURNS, "summary": "greetings"}, "sharegpt"),
        ({"turns": TURNS}, "sharegpt"),
        ({"chat": TURNS}, "sharegpt"),
        ({"dialogue": "A: hi", "question": "hi", "answer": "ho"}, "question/answer"),
        ({"data": ["hi", "ho"], "id": "1"}, "data"),
        ({"input": "hi", "output": "ho"}, "input/output"),
        ({"query": "hi", "response": "ho"}, "query/response"),
        ({"Question": "hi", "Answer": "ho"}, "question/answer"),
        ({"question": "hi", "answers": ["ho", "hu"]}, "question/answers"),
        ({"instruction": "", "input": "hi", "output": "ho"}, "input/output"),
        ({"prompt": TURNS[:1], "completion": "ho"}, "prompt/completion"),
        ({"user": "hi", "assistant": "ho"}, "user/assistant"),
        ({"question": "hi", "answer": "ho", "input": float("nan"), "text": None}, "question/answer"),
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
    conversation = one(value)
    assert said(conversation) == ANSWERED
    assert conversation.shape == shape


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        ({"instruction": "add", "input": "1 2", "output": "3"}, "add\n\n1 2"),
        ({"instruction": "add", "context": "1 2", "response": "3"}, "add\n\n1 2"),
        ({"question": "add", "context": "1 2", "answer": "3"}, "add\n\n1 2"),
    ],
)
def test_context_follows_what_is_asked(value: object, asked: str) -> None:
    assert said(one(value))[0] == ("user", asked)


@pytest.mark.parametrize(
    "value",
    [
        {"system": "be brief", "instruction": "hi", "output": "ho"},
        {"system_prompt": "be brief", "question": "hi", "response": "ho"},
        {"system": "be brief", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"messages": [{"role": "developer", "content": "be brief"}, *TURNS]},
        {"system": "be long", "messages": [{"role": "system", "content": "be brief"}, *TURNS]},
    ],
)
def test_a_system_turn_goes_in_front(value: object) -> None:
    assert said(one(value)) == [("system", "be brief"), *ANSWERED]


def test_history_goes_before_the_question() -> None:
    value = {"instruction": "hi", "output": "ho", "history": [["a", "b"], ["c", "d"]], "system": "s"}
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert said(one(value)) == list(zip(roles, ["s", "a", "b", "c", "d", "hi", "ho"], strict=True))


def test_each_instance_of_a_seed_task_is_a_conversation_and_named() -> None:
    value = {"instruction": "add", "instances": [{"input": "", "output": "0"}, {"input": "1 2", "output": "3"}]}
    first, second = to_conversations(row(value))
    assert said(first) == [("user", "add"), ("assistant", "0")]
    assert said(second) == [("user", "add\n\n1 2"), ("assistant", "3")]
    assert second.place == "data.jsonl, line 3, instance 2"
    assert "instance 2" in refused({**value, "instances": [{"output": "0"}, {"output": 3}]}).message


@pytest.mark.parametrize(
    ("value", "turn"),
    [
        ({"role": "user", "content": "hi"}, True),
        ({"from": "gpt", "value": ""}, True),
        ({"role": "assistant", "tool_calls": []}, True),
        ({"role": "user"}, False),
        ({"role": "user", "weight": 1}, False),
        ({"content": "hi"}, False),
        ("user", False),
    ],
    ids=str,
)
def test_a_turn_names_a_speaker_and_says_something(value: object, turn: bool) -> None:
    assert is_turn(value) == turn


def test_text_has_no_turns() -> None:
    conversation = one({"text": "once"})
    assert (conversation.messages, conversation.text) == ((), "once")


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "function_call", "value": '[{"name": "add", "arguments": "{\\"a\\": 1}"}]'},
    ],
)
def test_calls_of_tools_are_read_as_templates_want_them(turn: object) -> None:
    conversation = one({"conversations": [{"from": "human", "value": "1 + 0?"}, turn]})
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert len(judge([row({"messages": [turn]})]).conversations) == 1


@pytest.mark.parametrize("role", ["tool", "function", "observation", "tool_response", "function_response", "ipython"])
def test_what_a_tool_says_is_a_turn_of_the_tool(role: str) -> None:
    turn = {"role": role, "content": "3", "tool_call_id": "c1", "name": "add"}
    call = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]}
    messages = one({"messages": [call, turn]}).messages
    assert messages[1] == {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}
    assert messages[0].get("tool_calls") == [{**CALL, "id": "c1"}]


def test_no_arguments_are_an_empty_object() -> None:
    for arguments in ("", None, {}, "{}"):
        turn = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": arguments}}]}
        (call,) = one({"messages": [turn]}).messages[0].get("tool_calls", [])
        assert call["function"]["arguments"] == {}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_tools_of_a_row_are_kept_as_functions(packed: bool, bare: bool) -> None:
    function = {"name": "add", "parameters": {"type": "object"}}
    tools = [function if bare else {"type": "function", "function": function}]
    conversation = one({"messages": TURNS, "tools": json.dumps(tools) if packed else tools})
    assert conversation.tools == ({"type": "function", "function": function},)
    assert one({"messages": TURNS, "tools": "[]"}).tools == ()


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_apart_from_the_answer(key: str) -> None:
    answer = {"role": "assistant", "content": "ho", "reasoning_content": "hm"}
    assert one({"messages": [TURNS[0], {**TURNS[1], key: "hm"}]}).messages[1] == answer
    assert one({"Question": "hi", "Response": "ho", key: "hm"}).messages[1] == answer


def test_reasoning_columns_of_real_data_sets_are_read() -> None:
    assert one({"Question": "hi", "Complex_CoT": "hm", "Response": "ho"}).messages[1].get("reasoning_content") == "hm"
    # NVIDIA's post-training set says so whether the answer was reasoned.
    assert "reasoning_content" not in one({"input": "hi", "output": "ho", "reasoning": "off"}).messages[1]
    thought = "<think>hm</think>ho"
    assert said(one({"question": "hi", "answer": thought}))[1] == ("assistant", thought)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1, 2], "is a list, not an object"),
        ("hi", "is text, not an object"),
        (None, "is null, not an object"),
        ({"question": "hi"}, "asks in `question`, but has no answer to train on"),
        ({"turns": ["hi", "hu"], "category": "x"}, "asks in `turns`, but has no answer to train on"),
        ({}, "has unknown columns: none"),
        ({"messages": TURNS, "question": "x", "answer": "y"}, "has two shapes at once: messages and question/answer"),
        ({"messages": TURNS, "conversations": TURNS}, "two shapes at once: turns in `messages` and `conversations`"),
        ({"prompt": "a", "question": "b", "answer": "c"}, "two shapes at once: it asks in `prompt` and `question`"),
        ({"question": "b", "answer": "c", "output": "d"}, "two shapes at once: it answers in `output` and `answer`"),
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
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has a part of kind 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": ["a"]}]}]}, "has a part of kind a list"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "turn 1, call 1 is not a call of a tool"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "{a}"}}]}, "is not JSON"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "[1]"}}]}, "are a list, not"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": NaN}'}}]}, "holds nan"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": {"a": "\ud800"}}}]}, "half a"),
        ({"messages": [{"from": "function_call", "value": "add 1"}]}, "turn 1 is not JSON"),
        ({"messages": [{"role": "user", "content": "hi", "tool_calls": [CALL]}]}, "has tool calls, but is not the"),
        ({"messages": TURNS, "tools": "hammer"}, "`tools` is not JSON"),
        ({"messages": TURNS, "tools": [{"type": "function"}]}, "tool 1 is not a function with a name"),
        ({"messages": TURNS, "tools": {"name": "add"}}, "holds an object in `tools`"),
        ({"image": {"bytes": "x"}, "question": "hi", "answer": "ho"}, "has pictures or sound in `image`"),
        ({"audio": "a.wav", "messages": TURNS}, "has pictures or sound in `audio`"),
        ({"instruction": "hi", "output": "ho", "history": [["a"]]}, "entry 1 of `history` is not"),
        ({"instruction": "hi", "instances": []}, "has no answer to train on: `instances` is empty"),
        ({"instruction": "hi", "instances": [3]}, "instance 1 is a number, not an object"),
        ({"prompt": "hi", "completion": True}, "holds true or false in `completion`"),
        ({"text": "\ud800"}, "holds half a character"),
    ],
)
def test_a_bad_row_is_named_with_its_place_and_its_fault(value: object, said: str) -> None:
    assert said in refused(value).message


@pytest.mark.parametrize(
    ("value", "option"),
    [
        ({"prompt": "hi", "chosen": "ho", "rejected": "hu"}, "assistant=chosen"),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]}, "assistant=chosen"),
        ({"prompt": "hi", "chosen": TURNS, "rejected": TURNS}, "messages=chosen"),
    ],
)
def test_preferences_are_named_and_the_hint_works(value: object, option: str) -> None:
    error = refused(value)
    assert "is a preference (`chosen` and `rejected`)" in error.message
    assert f"--column {option}" in str(error.hint)
    assert said(one(value, **parse_columns([option]))) == ANSWERED


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ({"Frage": "hi", "Antwort": "ho"}, ["user=Frage", "assistant=Antwort"]),
        ({"prompt": "x", "question": "hi", "answer": "ho"}, ["user=question"]),
        ({"question": "hi", "input": "x", "answer": "ho", "output": "x"}, ["user=question", "assistant=answer"]),
        ({"q": "hi", "context": "x", "history": [["x", "x"]], "a": "ho"}, ["user=q", "assistant=a"]),
        ({"log": TURNS, "messages": "x"}, ["messages=log"]),
        ({"a=b": "hi", "answer": "ho"}, ["user=a=b"]),
    ],
)
def test_columns_named_by_hand_come_before_all_that_is_found(value: object, options: list[str]) -> None:
    assert said(one(value, **parse_columns(options))) == ANSWERED


def test_every_role_can_be_named_by_hand() -> None:
    value = {"a": "be brief", "b": "hi", "c": "ho", "d": "hm", "e": [{"name": "add"}], "f": "once"}
    made = one(value, **parse_columns(["system=a", "user=b", "assistant=c", "reasoning=d", "tools=e"]))
    assert said(made) == [("system", "be brief"), *ANSWERED]
    assert made.messages[-1].get("reasoning_content") == "hm"
    assert made.tools == ({"type": "function", "function": {"name": "add"}},)
    assert one(value, text="f").text == "once"


def test_a_column_that_the_row_lacks_is_answered_with_those_it_has() -> None:
    error = refused({"question": "hi", "antwort": "ho"}, assistant="Antwort")
    assert "has no column `Antwort` for `assistant`; it has: `question`, `antwort`" in error.message
    assert error.hint == "did you mean `--column assistant=antwort`?"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["answer"], "`--column answer` is not `role=NAME`"),
        (["user="], "`--column user=` is not `role=NAME`"),
        (["gpt=answer"], "names an unknown role: `gpt`"),
        (["user=a", "user=b"], "gives `user` twice"),
        (["text=a", "user=b"], "two shapes at once: `text` and `user`"),
        (["messages=a", "text=b"], "two shapes at once: `messages` and `text`"),
    ],
)
def test_a_bad_column_option_is_a_usage_error(options: list[str], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_columns(options)
    assert said in raised.value.message
    assert raised.value.hint


def test_a_long_row_is_quoted_in_part() -> None:
    assert len(refused({"nothing": "x" * 100_000}).message) < 400  # 200 characters of the row, and the words round it


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def test_what_is_nested_too_deeply_to_be_written_again_is_refused() -> None:
    turn = {"role": "assistant", "function_call": {"name": "f", "arguments": deep(102)}}
    assert "nested over 100 levels deep" in refused({"messages": [turn]}).message
    assert (
        "nested over 100 levels deep" in refused({"messages": TURNS, "tools": [{"name": "f", "x": deep(102)}]}).message
    )
    assert "too deeply nested to be shown" in refused({"nothing": deep(5000)}).message


def test_an_answer_that_is_null_in_a_table_is_left_out_as_a_blank_one_is() -> None:
    judged = judge([row({"question": "a", "answer": "b"}), row({"question": "a", "answer": None})])
    assert (len(judged.conversations), judged.shapes) == (1, {"question/answer": 1})
    # A table of two shapes has the columns of both.
    assert one({"question": None, "answer": "x", "text": "once"}).text == "once"


def test_empty_turns_are_counted_and_said() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    judged = judge([row({"messages": [call, {"role": "tool", "content": " "}, *TURNS]}), row({"text": "once"})])
    assert judged.empty_turns == 1
    assert "1 turns are empty, first: data.jsonl, line 3, turn 2" in judged.warnings


def test_columns_named_by_hand_are_judged() -> None:
    assert judge([row({"a": "hi", "b": "ho"})], columns={"user": "a", "assistant": "b"}).shapes == {"a/b": 1}


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
