"""Rows to conversations that can be trained on, and what was seen on the way."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprop.core.data.formats import NO_COLUMNS, Conversation, to_conversations
from backprop.core.data.preferences import preferences_of
from backprop.core.data.shapes import Message, Row
from backprop.errors import DataError

if TYPE_CHECKING:
    from backprop.config import Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Conversations that can be trained on, and what was seen on the way."""

    conversations: tuple[Conversation, ...]
    shapes: Mapping[str, int]
    warnings: tuple[str, ...]
    empty_turns: int = 0
    """Turns that say nothing and call nothing."""


def judge(rows: Iterable[Row], columns: Mapping[str, str] = NO_COLUMNS, *, objective: "Objective" = "sft") -> Judged:
    """Turn rows into conversations and refuse data with nothing to train on.

    Args:
        columns: Names by role, as ``parse_columns`` gives them.
        objective: What is learnt from them: answers, or which answers are wanted.

    Raises:
        DataError: At the first bad row; or if there are no rows, or none has an assistant turn or text.
    """
    conversations: list[Conversation] = []
    without_answer: list[str] = []
    without_choice: list[str] = []
    for row in rows:
        made = (
            to_conversations(row, columns)
            if objective == "sft"
            else preferences_of(row, columns, rated=objective == "kto")
        )
        for conversation in made:
            answers = conversation.messages[conversation.num_given :]
            if conversation.rejected and conversation.rejected == conversation.messages:
                without_choice.append(conversation.place)
            elif conversation.text.strip() or any(map(_is_answer, answers)):
                conversations.append(conversation)
            else:
                without_answer.append(conversation.place)
    if without_answer and not conversations:
        raise DataError(
            f"none of the {len(without_answer)} rows has an assistant turn with text in it, first: {without_answer[0]}",
            hint="rows need an answer to train on: a turn with `role` `assistant`",
        )
    if without_choice and not conversations:
        raise DataError(
            f"in none of the {len(without_choice)} rows do the chosen and the rejected answer differ",
            hint="look at the columns `chosen` and `rejected`",
        )
    if not conversations:
        raise DataError("the data holds no rows", hint="check the path, and that the file is not empty")
    shapes = Counter(conversation.shape for conversation in conversations)
    empty = _empty_turns(conversations)
    warnings = _warnings(conversations, shapes, empty, without_answer, without_choice)
    return Judged(conversations=tuple(conversations), shapes=dict(shapes), warnings=warnings, empty_turns=len(empty))


def _empty_turns(conversations: Sequence[Conversation]) -> list[str]:
    return [
        f"{conversation.place}, turn {number}"
        for conversation in conversations
        for number, turn in enumerate(conversation.messages, start=1)
        if not turn["content"].strip() and not turn.get("tool_calls")
    ]


def _warnings(
    conversations: Sequence[Conversation],
    shapes: Mapping[str, int],
    empty: Sequence[str],
    without_answer: Sequence[str],
    without_choice: Sequence[str],
) -> tuple[str, ...]:
    warnings: list[str] = []
    opened = sum(one.messages[0]["role"] == "assistant" for one in conversations if one.messages)
    if opened:
        warnings.append(f"{opened} conversations begin with an answer: it is context, and not trained on")
    if without_answer:
        warnings.append(
            f"{len(without_answer)} rows without an assistant turn are left out, first: {without_answer[0]}"
        )
    if without_choice:
        warnings.append(
            f"{len(without_choice)} rows are left out, whose chosen and rejected answers are the same, first: "
            f"{without_choice[0]}"
        )
    if empty:
        warnings.append(f"{len(empty)} turns are empty, first: {empty[0]}")
    if len(shapes) > 1:
        counts = ", ".join(f"{count} {shape}" for shape, count in Counter(shapes).most_common())
        warnings.append(f"the rows have several shapes: {counts}")
    return tuple(warnings)


def _is_answer(turn: Message) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip() or turn.get("tool_calls"))
