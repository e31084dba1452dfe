"""Shapes of rows: what users' files hold, turned into conversations.

Pure: rows come in as parsed values with the place they came from, so that every error can name it. A row is recognised
by its own keys, never by those of its neighbours.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

from backprop.errors import DataError

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A parsed row and where it stands: ``place`` reads like `train.jsonl, line 3`."""

    place: str
    value: object


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns to train on; or plain text, if ``messages`` is empty."""

    messages: tuple[Message, ...]
    text: str
    shape: str
    place: str


# ShareGPT and its relatives name the speakers in several ways.
ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
KNOWN_SHAPES = (
    "messages, conversations (ShareGPT), instruction/output (Alpaca), prompt/completion, question/answer, text"
)


def to_conversation(row: Row) -> Conversation:
    """Recognise the shape of a row.

    Raises:
        DataError: If the row is not an object, has an unknown shape or two of them, or holds a value of a wrong type.
    """
    if not isinstance(row.value, Mapping):
        raise _bad(row, f"is {_name_of(row.value)}, not an object", hint=f"each row needs one of: {KNOWN_SHAPES}")
    # Tables have the columns of all their rows: what is null in this one is not there.
    value: Mapping[str, object] = {key: item for key, item in row.value.items() if item is not None}
    found = [shape for shape, keys in SHAPES.items() if all(key in value for key in keys)]
    if len(found) > 1 and "text" in found:
        found.remove("text")  # a rendering of the other columns, as in tatsu-lab/alpaca
    if not found:
        columns = ", ".join(f"`{key}`" for key in row.value) or "none"
        raise _bad(row, f"has unknown columns: {columns}", hint=f"each row needs one of: {KNOWN_SHAPES}")
    if len(found) > 1:
        raise _bad(row, f"has two shapes at once: {' and '.join(found)}", hint="keep the columns of one shape")
    shape = found[0]
    if shape == "text":
        return Conversation(messages=(), text=_text(row, value["text"], "text"), shape=shape, place=row.place)
    messages = _turns(row, value[SHAPES[shape][0]]) if shape in ("messages", "sharegpt") else _pair(row, value, shape)
    return Conversation(messages=messages, text="", shape=shape, place=row.place)


# The columns that make each shape; a row may have others beside them.
SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "prompt/completion": ("prompt", "completion"),
    "question/answer": ("question", "answer"),
    "text": ("text",),
}


def _pair(row: Row, value: Mapping[str, object], shape: str) -> tuple[Message, ...]:
    ask, answer = SHAPES[shape]
    if shape == "prompt/completion" and isinstance(value[ask], list):
        return (*_turns(row, value[ask]), *_turns(row, value[answer]))
    prompt = _text(row, value[ask], ask)
    extra = {"alpaca": "input", "dolly": "context"}.get(shape)
    context = value.get(extra) if extra else None
    if extra and context:
        prompt = f"{prompt}\n\n{_text(row, context, extra)}"
    turns: list[Message] = []
    if value.get("system"):
        turns.append({"role": "system", "content": _text(row, value["system"], "system")})
    turns.append({"role": "user", "content": prompt})
    turns.append({"role": "assistant", "content": _text(row, value[answer], answer)})
    return tuple(turns)


def _turns(row: Row, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _bad(row, f"holds {_name_of(value)} where a list of turns belongs")
    return tuple(_turn(row, number, turn) for number, turn in enumerate(value, start=1))


def _turn(row: Row, number: int, turn: object) -> Message:
    where = f"turn {number}"
    if not isinstance(turn, Mapping):
        raise _bad(row, f"{where} is {_name_of(turn)}, not an object")
    if "role" in turn and "content" in turn:
        role, content = turn["role"], turn["content"]
    elif "from" in turn and "value" in turn:
        role, content = turn["from"], turn["value"]
    else:
        columns = ", ".join(f"`{key}`" for key in turn)
        raise _bad(
            row, f"{where} has the keys {columns}", hint="a turn needs `role` and `content`, or `from` and `value`"
        )
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise _bad(row, f"{where} has an unknown role: {role!r}", hint=f"known roles: {', '.join(ROLES)}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise _bad(row, f"{where} has tool calls, which cannot be trained on yet", hint="remove the row")
    return {"role": known, "content": _text(row, _joined_parts(row, where, content), where)}


def _joined_parts(row: Row, where: str, content: object) -> object:
    """Join content given as a list of text parts; refuse parts of another kind by name."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise _bad(row, f"{where} has a part of kind {kind!r}, not text", hint="only text can be trained on")
        texts.append(text)
    return "".join(texts)


def _text(row: Row, value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _bad(row, f"holds {_name_of(value)} in `{name}` where text belongs")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise _bad(row, f"holds half a character (a lone surrogate) in `{name}`", hint="write the file as UTF-8 again")
    return value


def _name_of(value: object) -> str:
    for kind, name in (
        (dict, "an object"),
        (list, "a list"),
        (str, "text"),
        (bool, "true or false"),
        (type(None), "null"),
    ):
        if isinstance(value, kind):
            return name
    return "a number"


def _bad(row: Row, what: str, *, hint: str = "mend this row, or remove it") -> DataError:
    shown = json.dumps(row.value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return DataError(f"{row.place} {what}: {shown}", hint=hint)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Conversations that can be trained on, and what was seen on the way."""

    conversations: tuple[Conversation, ...]
    shapes: Mapping[str, int]
    warnings: tuple[str, ...]


def judge(rows: Iterable[Row]) -> Judged:
    """Turn rows into conversations and refuse data with nothing to train on.

    Raises:
        DataError: At the first bad row; or if there are no rows, or none has an assistant turn or text.
    """
    conversations: list[Conversation] = []
    without_answer: list[str] = []
    for row in rows:
        conversation = to_conversation(row)
        answers = [turn for turn in conversation.messages if turn["role"] == "assistant" and turn["content"].strip()]
        if answers or conversation.text.strip():
            conversations.append(conversation)
        else:
            without_answer.append(row.place)
    if without_answer and not conversations:
        raise DataError(
            f"none of the {len(without_answer)} rows has an assistant turn with text in it, first: {without_answer[0]}",
            hint="rows need an answer to train on: a turn with `role` `assistant`",
        )
    if not conversations:
        raise DataError("the data holds no rows", hint="check the path, and that the file is not empty")
    warnings: list[str] = []
    opened = sum(one.messages[0]["role"] == "assistant" for one in conversations if one.messages)
    if opened:
        warnings.append(f"{opened} conversations begin with an answer: it is context, and not trained on")
    if without_answer:
        warnings.append(
            f"{len(without_answer)} rows without an assistant turn are left out, first: {without_answer[0]}"
        )
    shapes = Counter(conversation.shape for conversation in conversations)
    if len(shapes) > 1:
        counts = ", ".join(f"{count} {shape}" for shape, count in shapes.most_common())
        warnings.append(f"the rows have several shapes: {counts}")
    return Judged(conversations=tuple(conversations), shapes=dict(shapes), warnings=tuple(warnings))
