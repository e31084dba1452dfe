"""What a chat template has a place for, and what happens to the rest."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import LetterTokenizer

from backprop.core.data.formats import Conversation, Message
from backprop.core.data.shapes import ToolCall
from backprop.core.data.template import adapt
from backprop.errors import DataError

ALL = ("turns of text", "system turns", "later system turns", "tools", "tool calls", "tool results", "reasoning")

SYSTEM: Message = {"role": "system", "content": "be brief"}
ASKS: Message = {"role": "user", "content": "1 + 0?"}
ANSWERS: Message = {"role": "assistant", "content": "1"}
CALL: ToolCall = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT: Message = {"role": "tool", "content": "1"}
THINKS: Message = {"role": "assistant", "content": "1", "reasoning_content": " hm\n"}
TOOLS = ({"type": "function", "function": {"name": "add"}},)


class Knowing(LetterTokenizer):
    """A template that writes what it knows, leaves out what it does not, and refuses what it is told to."""

    def __init__(self, *knows: str, refuses: Sequence[str] = ()) -> None:
        self.knows, self.refuses = knows, refuses
        self.rendered = 0

    def render(self, messages: Sequence[Message], *, tools: Sequence[Any] = (), add_generation_prompt: bool) -> str:
        self.rendered += 1
        lines = [self.part("tools", str(tool)) for tool in tools]
        for number, message in enumerate(messages):
            system = "later system turns" if number else "system turns"
            thing = {"system": system, "tool": "tool results"}.get(message["role"], "turns of text")
            lines.append(self.part(thing, f"{message['role']}: {message['content']}"))
            if "tool_calls" in message:
                lines.append(self.part("tool calls", str(message["tool_calls"])))
            if "reasoning_content" in message:
                lines.append(self.part("reasoning", message["reasoning_content"]))
        return "\n".join(lines)

    def part(self, thing: str, text: str) -> str:
        if thing in self.refuses:
            raise DataError(f"no place for {thing}")
        return text if thing in self.knows else ""


def without(*things: str) -> Knowing:
    return Knowing(*(thing for thing in ALL if thing not in things))


def said(*messages: Message, tools: Sequence[Any] = (), place: str = "data.jsonl, line 3") -> Conversation:
    return Conversation(messages=messages, text="", shape="messages", place=place, tools=tuple(tools))


def test_nothing_is_changed_or_said_where_all_is_known() -> None:
    rows = [
        said(SYSTEM, ASKS, THINKS),
        said(ASKS, CALLS, RESULT, ANSWERS, tools=TOOLS),
        Conversation(messages=(), text="once", shape="text", place=""),
    ]
    adapted = adapt(rows, Knowing(*ALL))
    assert adapted.conversations == tuple(rows)
    assert adapted.notes == ()


def test_each_thing_is_tried_once_and_only_if_some_row_has_it() -> None:
    template = Knowing(*ALL)
    adapt([Conversation(messages=(), text="once", shape="text", place="")] * 5, template)
    assert template.rendered == 0
    adapt([said(SYSTEM, ASKS, ANSWERS)] * 5, template)
    assert template.rendered == 2  # turns of text, and system turns


@pytest.mark.parametrize("refuses", [False, True], ids=["left out", "refused"])
def test_system_turns_go_to_the_head_of_the_question_that_follows(refuses: bool) -> None:
    template = Knowing(*ALL, refuses=["system turns"]) if refuses else without("system turns")
    second: Message = {"role": "user", "content": "2 + 0?"}
    adapted = adapt([said(SYSTEM, ASKS, ANSWERS, second, ANSWERS), said(ASKS, ANSWERS)], template)
    asks: Message = {"role": "user", "content": "be brief\n\n1 + 0?"}
    assert adapted.conversations[0].messages == (asks, ANSWERS, second, ANSWERS)
    assert adapted.conversations[1] == said(ASKS, ANSWERS)
    assert adapted.notes == (
        "this model's template has no place for system turns: in 1 conversations they stand at the head of the question that follows",
    )


HEADED: Message = {"role": "user", "content": "be brief\n\n1 + 0?"}
ENDED: Message = {"role": "user", "content": "1 + 0?\n\nbe brief"}
ALONE: Message = {"role": "user", "content": "be brief"}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ((SYSTEM, ANSWERS), (ALONE, ANSWERS)),
        ((SYSTEM, SYSTEM, ASKS, ANSWERS), ({"role": "user", "content": "be brief\n\nbe brief\n\n1 + 0?"}, ANSWERS)),
        ((ASKS, ANSWERS, SYSTEM, ASKS, ANSWERS), (ASKS, ANSWERS, HEADED, ANSWERS)),
        ((ASKS, SYSTEM, ANSWERS), (ENDED, ANSWERS)),
        ((ASKS, ANSWERS, SYSTEM, ANSWERS), (ASKS, ANSWERS, ALONE, ANSWERS)),
        ((ASKS, ANSWERS, SYSTEM), (ASKS, ANSWERS, ALONE)),
    ],
    ids=["no question", "two in front", "later", "after the question", "between answers", "last"],
)
def test_system_turns_are_moved_wherever_they_stand(turns: tuple[Message, ...], expected: object) -> None:
    (made,) = adapt([said(*turns)], without("system turns", "later system turns")).conversations
    assert made.messages == expected


def test_a_template_that_writes_only_the_first_system_turn_keeps_that_and_gets_the_others_in_questions() -> None:
    """Some templates read the system turn from the first place only, and leave out others without a word."""
    row = said(SYSTEM, ASKS, ANSWERS, SYSTEM, ASKS, ANSWERS)
    adapted = adapt([row], without("later system turns"))
    assert adapted.conversations[0].messages == (SYSTEM, ASKS, ANSWERS, HEADED, ANSWERS)
    assert "no place for system turns after the first turn: in 1 conversations" in adapted.notes[0]
    assert adapt([row], Knowing(*ALL)).conversations == (row,)


def test_a_template_that_writes_the_system_turn_only_where_the_question_stands_last_does_not_know_it() -> None:
    """Mistral 7B v0.3 writes [system, user], and nothing of the system turn once there is an answer."""

    class Mistral(Knowing):
        def render(self, messages: Sequence[Message], **options: Any) -> str:
            asks_last = messages[-1]["role"] == "user"
            return super().render([one for one in messages if one["role"] != "system" or asks_last], **options)

    (made,) = adapt([said(SYSTEM, ASKS, ANSWERS)], Mistral(*ALL)).conversations
    assert made.messages == ({"role": "user", "content": "be brief\n\n1 + 0?"}, ANSWERS)


def test_reasoning_goes_before_the_answer_it_led_to() -> None:
    adapted = adapt([said(ASKS, THINKS, ASKS, ANSWERS), said(ASKS, THINKS)], without("reasoning"))
    thought: Message = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n1"}
    assert adapted.conversations[0].messages == (ASKS, thought, ASKS, ANSWERS)
    assert adapted.conversations[1].messages == (ASKS, thought)
    assert adapted.notes == (
        "this model's template has no place for reasoning: in 2 conversations it is written as <think>…</think> before the answer",
    )


def test_the_rows_given_are_not_changed() -> None:
    row = said(SYSTEM, ASKS, THINKS)
    before = copy.deepcopy(row)
    adapt([row], without("system turns", "reasoning"))
    assert row == before


def test_several_things_are_moved_at_once_and_each_is_counted() -> None:
    adapted = adapt([said(SYSTEM, ASKS, THINKS), said(ASKS, THINKS)], without("system turns", "reasoning"))
    thought: Message = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n1"}
    assert adapted.conversations[0].messages == ({"role": "user", "content": "be brief\n\n1 + 0?"}, thought)
    assert [note.split(": ")[1].split(" conv")[0] for note in adapted.notes] == ["in 1", "in 2"]


@pytest.mark.parametrize("refuses", [False, True], ids=["left out", "refused"])
@pytest.mark.parametrize(
    ("thing", "row", "remedy"),
    [
        ("tools", said(ASKS, ANSWERS, tools=TOOLS), "a model that knows tools"),
        ("tool calls", said(ASKS, CALLS, ANSWERS), "a model that knows tools"),
        ("tool results", said(ASKS, CALLS, RESULT, ANSWERS), "a model that knows tools"),
        ("turns of text", said(ASKS, ANSWERS), "whose chat template takes text"),
    ],
)
def test_what_can_not_be_moved_is_an_error_that_names_the_row(
    thing: str, row: Conversation, remedy: str, refuses: bool
) -> None:
    template = Knowing(*ALL, refuses=[thing]) if refuses else without(thing)
    good = said(place="data.jsonl, line 1")
    with pytest.raises(DataError) as raised:
        adapt([good, row], template)
    assert raised.value.message.startswith(
        f"data.jsonl, line 3 has {thing}, which this model's chat template leaves out"
    )
    assert remedy in (raised.value.hint or "")


def test_calls_are_tried_with_an_id_as_mistral_wants_it() -> None:
    """Its template refuses calls whose id is not nine letters and digits; good rows must not be refused for ours."""

    class Strict(Knowing):
        def part(self, thing: str, text: str) -> str:
            if thing == "tool calls" and "'id': 'probe1234'" not in text:
                raise DataError("Tool call IDs should be alphanumeric strings with length 9!")
            return super().part(thing, text)

    row = said(ASKS, CALLS, RESULT, ANSWERS)
    assert adapt([row], Strict(*ALL)).conversations == (row,)
