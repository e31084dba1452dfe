"""What a chat template can render, and conversations adapted to it: never a turn that silently becomes nothing.

Some templates refuse system turns, and many leave out what they do not know: tool calls, tool results, reasoning. Those
of models for pictures may want lists of parts, and leave out all text. Each is tried with words of its own, and looked for
in what the template makes of them.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from backprop.core.data.formats import Conversation
from backprop.core.data.render import ChatTokenizer
from backprop.core.data.shapes import Message
from backprop.errors import DataError

TOOL: Mapping[str, object] = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe_description",
        "parameters": {"type": "object", "properties": {"where": {"type": "string", "description": "a place"}}},
    },
}
SYSTEM: Message = {"role": "system", "content": "probe_system"}
ASKED: Message = {"role": "user", "content": "probe_question"}
ANSWERED: Message = {"role": "assistant", "content": "probe_answer"}
# Mistral's templates refuse calls without an id of nine letters and digits.
CALLED: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "probe1234",
            "function": {"name": "probe_tool", "arguments": {"where": "probe_place"}},
        }
    ],
}
# What each thing looks like, and the words of it that a template that knows it writes.
PROBES: Mapping[str, tuple[Sequence[Message], Sequence[Mapping[str, object]], Sequence[str]]] = {
    "turns of text": ([ASKED, ANSWERED], (), ["probe_question", "probe_answer"]),
    "system turns after the first turn": ([ASKED, ANSWERED, SYSTEM, ASKED, ANSWERED], (), ["probe_system"]),
    # With an answer: Mistral's templates write the system turn only where the question stands last.
    "system turns": ([SYSTEM, ASKED, ANSWERED], (), ["probe_system"]),
    "tools": ([ASKED], (TOOL,), ["probe_tool", "probe_description"]),
    "tool calls": ([ASKED, CALLED], (TOOL,), ["probe_tool", "probe_place"]),
    "tool results": (
        [
            ASKED,
            CALLED,
            {"role": "tool", "content": "probe_result", "name": "probe_tool", "tool_call_id": "probe1234"},
        ],
        (TOOL,),
        ["probe_result"],
    ),
    "reasoning": (
        [ASKED, {**ANSWERED, "reasoning_content": "probe_reasoning"}],
        (),
        ["probe_reasoning", "probe_answer"],
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """Conversations that the template renders whole, and what was done to make them so."""

    conversations: tuple[Conversation, ...]
    notes: tuple[str, ...]


def adapt(conversations: Iterable[Conversation], tokenizer: ChatTokenizer) -> Adapted:
    """Put what a template has no place for where it has one: system turns into the question, reasoning into the answer.

    Raises:
        DataError: If there are tools, calls of them or their results, or plain turns, and the template would leave them
            out.
    """
    adapter = Adapter(tokenizer)
    adapted = tuple(map(adapter.adapted, conversations))
    return Adapted(conversations=adapted, notes=adapter.notes)


class Adapter:
    """Adapts one conversation after the other, and remembers what it did."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, bool] = {}
        self._moved: Counter[str] = Counter()

    def adapted(self, conversation: Conversation) -> Conversation:
        """Give a conversation that the template renders whole.

        Raises:
            DataError: As `adapt`.
        """
        for thing in _things(conversation):
            if thing not in self._known:
                self._known[thing] = _knows(self._tokenizer, thing)
            if self._known[thing]:
                continue
            if thing not in MOVES:
                raise DataError(
                    f"{conversation.place} has {thing}, which this model's chat template leaves out or refuses",
                    hint="choose a model whose chat template takes text"
                    if thing == "turns of text"
                    else "choose a model that knows tools, such as Qwen 3; or remove these rows",
                )
            self._moved[thing] += 1
            move = MOVES[thing]
            conversation = replace(
                conversation, messages=move(conversation.messages), rejected=move(conversation.rejected)
            )
        return conversation

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what was moved so far."""
        return tuple(
            f"this model's template has no place for {thing}: {SAID[thing].format(count)}"
            for thing, count in self._moved.items()
        )


class Forgeries:
    """Conversations whose own texts hold control tokens of the model, which end or forge turns."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._found = re.compile("|".join(map(re.escape, sorted(tokenizer.special_texts()))) or "(?!)")
        self.count, self.first = 0, ""

    def seen(self, conversation: Conversation) -> Conversation:
        """Look at a conversation, count it if it is one, and give it."""
        texts = [conversation.messages, conversation.rejected, conversation.tools]
        if self._found.search(json.dumps(texts, ensure_ascii=False)):
            self.first = self.first if self.count else conversation.place
            self.count += 1
        return conversation


def _things(conversation: Conversation) -> list[str]:
    sides = (conversation.messages, conversation.rejected)
    messages = [*conversation.messages, *conversation.rejected]
    found = {
        "turns of text": bool(messages),
        "system turns after the first turn": any(message["role"] == "system" for side in sides for message in side[1:]),
        "system turns": bool(messages) and messages[0]["role"] == "system",
        "tools": bool(conversation.tools),
        "tool calls": any(message.get("tool_calls") for message in messages),
        "tool results": any(message["role"] == "tool" for message in messages),
        "reasoning": any(message.get("reasoning_content") for message in messages),
    }
    return [thing for thing in found if found[thing]]


def _knows(tokenizer: ChatTokenizer, thing: str) -> bool:
    messages, tools, words = PROBES[thing]
    try:
        text = tokenizer.render(messages, tools=tools, add_generation_prompt=False)
    except DataError:
        return False
    return all(word in text for word in words)


def _system_into_question(messages: Sequence[Message], *, first: int = 0) -> tuple[Message, ...]:
    """Put system turns, from number ``first`` on, at the head of the question that follows.

    Where none follows, they stand at the end of the question before; or are one, where there is none.
    """
    moved: list[Message] = []
    waiting: list[str] = []
    for number, message in enumerate(messages):
        if message["role"] == "system" and number >= first:
            waiting.append(message["content"])
        elif waiting and message["role"] == "user":
            moved.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            moved = [*_with_said(moved, waiting), message]
            waiting = []
    return tuple(_with_said(moved, waiting))


def _with_said(messages: Sequence[Message], said: Sequence[str]) -> list[Message]:
    if not said:
        return [*messages]
    if messages and messages[-1]["role"] == "user":
        return [*messages[:-1], {**messages[-1], "content": "\n\n".join([messages[-1]["content"], *said])}]
    return [*messages, {"role": "user", "content": "\n\n".join(said)}]


def _reasoning_into_answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(_with_thought(message) for message in messages)


def _with_thought(message: Message) -> Message:
    thought = message.get("reasoning_content")
    if not thought:
        return message
    kept: Message = {**message, "content": f"<think>\n{thought.strip()}\n</think>\n\n{message['content']}"}
    kept.pop("reasoning_content", None)
    return kept


MOVES: Mapping[str, Callable[[Sequence[Message]], tuple[Message, ...]]] = {
    "system turns after the first turn": partial(_system_into_question, first=1),
    "system turns": _system_into_question,
    "reasoning": _reasoning_into_answer,
}
IN_QUESTION = "in {} conversations they stand at the head of the question that follows"
SAID = {
    "system turns after the first turn": IN_QUESTION,
    "system turns": IN_QUESTION,
    "reasoning": "in {} conversations it is written as <think>…</think> before the answer",
}
