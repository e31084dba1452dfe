"""Rows to conversations that can be trained on, and what was seen on the way."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from backprop.core.data.formats import NO_COLUMNS, Conversation, to_conversations
from backprop.core.data.preferences import preferences_of
from backprop.core.data.sequences import Growing
from backprop.core.data.shapes import Message, Row
from backprop.errors import DataError

if TYPE_CHECKING:
    from backprop.config import Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Conversations that can be trained on, and what was seen on the way."""

    conversations: Sequence[Conversation]
    shapes: Mapping[str, int]
    warnings: tuple[str, ...]
    empty_turns: int = 0
    """Turns that say nothing and call nothing."""
    characters: int = 0
    """Of all turns and texts."""
    replayed: int = 0
    """Of `conversations`, the last so many are rows of earlier parts."""


@dataclass
class _Places:
    """How many there are, and where the first is."""

    count: int = 0
    first: str = ""

    def add(self, place: str) -> None:
        self.first = self.first if self.count else place
        self.count += 1


@dataclass
class _Seen:
    """What is counted while rows are read."""

    shapes: Counter[str] = field(default_factory=Counter[str])
    without_answer: _Places = field(default_factory=_Places)
    without_choice: _Places = field(default_factory=_Places)
    empty: _Places = field(default_factory=_Places)
    opened: int = 0
    characters: int = 0

    def note(self, conversation: Conversation) -> None:
        """Count a conversation that is kept."""
        self.shapes[conversation.shape] += 1
        messages = conversation.messages
        self.opened += bool(messages) and messages[0]["role"] == "assistant"
        self.characters += len(conversation.text) + sum(
            len(turn["content"]) for turn in (*messages, *conversation.rejected)
        )
        for number, turn in enumerate((*messages, *conversation.rejected[conversation.num_given :]), start=1):
            if not turn["content"].strip() and not turn.get("tool_calls"):
                self.empty.add(f"{conversation.place}, turn {number}")

    def warnings(self) -> tuple[str, ...]:
        """Say what the user should look at."""
        found: list[str] = []
        if self.opened:
            found.append(f"{self.opened} conversations begin with an answer: it is context, and not trained on")
        if self.without_answer.count:
            found.append(
                f"{self.without_answer.count} rows without an assistant turn are left out, first: "
                f"{self.without_answer.first}"
            )
        if self.without_choice.count:
            found.append(
                f"{self.without_choice.count} rows are left out, whose chosen and rejected answers are the same, first: "
                f"{self.without_choice.first}"
            )
        if self.empty.count:
            found.append(f"{self.empty.count} turns are empty, first: {self.empty.first}")
        if len(self.shapes) > 1:
            counts = ", ".join(f"{count} {shape}" for shape, count in self.shapes.most_common())
            found.append(f"the rows have several shapes: {counts}")
        return tuple(found)


def judge(
    rows: Iterable[Row],
    columns: Mapping[str, str] = NO_COLUMNS,
    *,
    objective: "Objective" = "sft",
    keep: Growing[Conversation] | None = None,
) -> Judged:
    """Turn rows into conversations and refuse data with nothing to train on.

    Args:
        columns: Names by role, as ``parse_columns`` gives them.
        objective: What is learnt from them: answers, or which answers are wanted.
        keep: Where the conversations go; None for memory.

    Raises:
        DataError: At the first bad row; or if there are no rows, or none has an assistant turn or text.
    """
    kept: Growing[Conversation] = [] if keep is None else keep
    seen = _Seen()
    for row in rows:
        rated = objective == "kto"
        made = to_conversations(row, columns) if objective == "sft" else preferences_of(row, columns, rated=rated)
        for conversation in made:
            answers = conversation.messages[conversation.num_given :]
            if conversation.rejected and conversation.rejected == conversation.messages:
                seen.without_choice.add(conversation.place)
            elif conversation.text.strip() or any(map(_is_answer, answers)):
                kept.append(conversation)
                seen.note(conversation)
            else:
                seen.without_answer.add(conversation.place)
    if not len(kept):
        raise _nothing_to_train_on(seen)
    return Judged(
        conversations=tuple(kept) if keep is None else cast(Sequence[Conversation], keep),
        shapes=dict(seen.shapes),
        warnings=seen.warnings(),
        empty_turns=seen.empty.count,
        characters=seen.characters,
    )


def _nothing_to_train_on(seen: _Seen) -> DataError:
    if seen.without_answer.count:
        return DataError(
            f"none of the {seen.without_answer.count} rows has an assistant turn with text in it, first: "
            f"{seen.without_answer.first}",
            hint="rows need an answer to train on: a turn with `role` `assistant`",
        )
    if seen.without_choice.count:
        return DataError(
            f"in none of the {seen.without_choice.count} rows do the chosen and the rejected answer differ, first: "
            f"{seen.without_choice.first}",
            hint="look at the columns `chosen` and `rejected`",
        )
    return DataError("the data holds no rows", hint="check the path, and that the file is not empty")


def _is_answer(turn: Message) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip() or turn.get("tool_calls"))
