"""Shapes of rows: what users' files hold, turned into conversations.

Pure: rows come in as parsed values with the place they came from, so that every error can name it. A row is recognised
by its own columns, never by those of its neighbours; capitals in their names do not matter, and null is not there.

The rules, in this order:

1. Columns named by hand (`--column`) come before all that is found.
2. Conversation columns (a list of turns) win over pair columns, which are often what the turns were made of. A whole
   pair whose answer is in none of the turns is an error.
3. Pair columns (one that asks and one that answers) win over `text`. `input` beside another asking column, and `context`,
   are put below what is asked. Two that ask, or two that answer, with something in both, are an error.
4. `data` with a list of texts is the user and the assistant in turn, as are columns `user` and `assistant`; `text` is
   trained on whole.

A `system` column goes in front, a reasoning column into the answer, `tools` beside the turns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from backprop.core.data.shapes import (
    REASONING_KEYS,
    Message,
    Row,
    alternating,
    are_turns,
    bad,
    is_exchange,
    is_turn,
    name_of,
    text_of,
    tools_of,
    turns_of,
    unpacked,
)
from backprop.errors import DataError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns to train on; or plain text, if ``messages`` is empty."""

    messages: tuple[Message, ...]
    text: str
    shape: str
    place: str
    tools: tuple[Mapping[str, object], ...] = ()
    """The functions that the chat template offers, as OpenAI writes them."""
    rejected: tuple[Message, ...] = ()
    """Of a preference: the same turns with the answer that is not wanted."""
    desirable: bool | None = None
    """Whether the last answer is wanted, where it was rated."""

    @property
    def num_given(self) -> int:
        """Count the first turns that are not judged: those before the answers of a preference, or before a rated one."""
        if self.rejected:
            pairs = zip(self.messages, self.rejected, strict=False)
            return next((number for number, (one, other) in enumerate(pairs) if one != other), len(self.rejected))
        if self.desirable is not None:
            return max(number for number, turn in enumerate(self.messages) if turn["role"] == "assistant")
        return 0


# These are turns whatever they hold; the others are ordinary words, and must hold a list that begins with a turn.
CONVERSATION_KEYS = ("messages", "conversations")
MAYBE_CONVERSATION_KEYS = ("conversation", "dialog", "dialogue", "turns", "chat", "data")
ASKING_KEYS = ("instruction", "prompt", "question", "query", "input")
ANSWERING_KEYS = ("response", "output", "answer", "completion", "answers")
CONTEXT_KEYS = ("input", "context")
SYSTEM_KEYS = ("system", "system_prompt")
PAIR_REASONING_KEYS = (*REASONING_KEYS, "complex_cot")
MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos", "pixel_values")
# Pairs have the name of their columns, and these the name that people know them by.
SHAPES: dict[tuple[str, str], str] = {
    ("instruction", "output"): "alpaca",
    ("instruction", "response"): "dolly",
    ("instruction", "instances"): "alpaca seed tasks",
}
KNOWN_SHAPES = (
    "messages, conversations (ShareGPT), instruction/output (Alpaca), prompt/completion, question/answer, text"
)
# Some data sets say with such a word whether the answer was reasoned.
FLAGS = ("on", "off", "yes", "no", "true", "false")
# What `--column` can name.
COLUMN_ROLES = (
    *("messages", "system", "user", "assistant", "reasoning", "text", "tools"),
    *("chosen", "rejected", "label"),
)
NO_COLUMNS: Mapping[str, str] = {}


def parse_columns(options: Sequence[str]) -> dict[str, str]:
    """Read `--column role=NAME` options.

    Raises:
        UsageError: If one has another form, names an unknown role or one twice, or two contradict each other.
    """
    columns: dict[str, str] = {}
    for option in options:
        role, equals, name = option.partition("=")
        role = role.strip()
        if not equals or not name.strip():
            raise UsageError(f"`--column {option}` is not `role=NAME`", hint="like this: `--column assistant=answer`")
        if role not in COLUMN_ROLES:
            raise UsageError(
                f"`--column {option}` names an unknown role: `{role}`", hint=f"known roles: {', '.join(COLUMN_ROLES)}"
            )
        if role in columns:
            raise UsageError(
                f"`--column` gives `{role}` twice: `{columns[role]}` and `{name}`", hint="keep one of the two"
            )
        columns[role] = name
    kinds = [role for role in ("messages", "text", "user", "assistant") if role in columns]
    if len(kinds) > 1 and kinds != ["user", "assistant"]:
        raise UsageError(
            f"`--column` makes two shapes at once: `{kinds[0]}` and `{kinds[1]}`",
            hint="give `messages`, or `text`, or `user` and `assistant`",
        )
    return columns


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cells:
    """A row's columns by the names that the rules know."""

    values: Mapping[str, object]
    names: Mapping[str, str]
    """What the file calls each column, with those that are null."""


def to_conversations(row: Row, columns: Mapping[str, str] = NO_COLUMNS) -> list[Conversation]:
    """Recognise the shape of a row, by the rules at the head of this module.

    Args:
        columns: Names by role, as ``parse_columns`` gives them.

    Returns:
        One conversation; or one for each of the row's instances.

    Raises:
        DataError: If the row is of an unknown shape or of two, holds a value of a wrong type, has no answer to train
            on, is a preference, or has pictures or sound.
    """
    if are_turns(row.value) and not columns:
        return [Conversation(messages=turns_of(row, row.value), text="", shape="messages", place=row.place)]
    if not isinstance(row.value, Mapping):
        raise bad(row, f"is {name_of(row.value)}, not an object", hint=f"each row needs one of: {KNOWN_SHAPES}")
    cells = _cells(row, row.value, columns)
    values = cells.values
    _refuse_media_and_preferences(row, cells, columns)
    if key := "messages" if "messages" in columns else _conversation_column(row, cells):
        shape = "messages" if key == "messages" else "sharegpt"
        turns = turns_of(row, values.get(key))
        if "messages" not in columns:
            _refuse_another_pair(row, cells, key, turns)
        return [_with_surroundings(row, cells, turns, shape)]
    if isinstance(values.get("instances"), list) and "instruction" in values:
        return _instances(row, cells)
    if pair := _pair_columns(row, cells):
        shape = SHAPES.get(pair, f"{cells.names[pair[0]]}/{cells.names[pair[1]]}".lower())
        return [_with_surroundings(row, cells, _pair(row, cells, *pair), shape)]
    if _are_texts(listed := unpacked(values.get("data"))):
        return [_with_surroundings(row, cells, alternating(row, listed), "data")]
    if is_exchange(values):
        return [_with_surroundings(row, cells, turns_of(row, [values]), "user/assistant")]
    if "text" in values or "text" in columns:
        text = text_of(row, values.get("text", ""), cells.names["text"])
        return [Conversation(messages=(), text=text, shape="text", place=row.place)]
    raise _unknown(row, cells)


def has_known_shape(value: Mapping[str, object]) -> bool:
    """Say whether an object has the columns of a row, whatever they hold."""
    keys = {key.lower() for key in value}
    pair = keys.intersection(ASKING_KEYS) and keys.intersection((*ANSWERING_KEYS, "instances"))
    turns = any(_is_conversation(key.lower(), value[key]) for key in value)
    preference = {"chosen", "rejected"} <= keys
    return bool(pair or turns or preference or keys.intersection((*CONVERSATION_KEYS, "text")))


def _cells(row: Row, value: Mapping[str, object], columns: Mapping[str, str]) -> _Cells:
    names: dict[str, str] = {}
    for name in value:
        key = name.strip().lower()
        if key not in names or name == key:
            names[key] = name
    for role, name in columns.items():
        if name not in value:
            raise no_column(row, value, role, name)
    # What is named by hand replaces all that could stand for the same.
    if columns.keys() & {"messages", "text", "user", "assistant"}:
        unwanted = {*CONVERSATION_KEYS, *MAYBE_CONVERSATION_KEYS, "text", "instances"}
        unwanted |= set(ASKING_KEYS) if columns.keys() & {"messages", "text", "user"} else set()
        unwanted |= set(ANSWERING_KEYS) if columns.keys() & {"messages", "text", "assistant"} else set()
        unwanted |= {*CONTEXT_KEYS, "history"} if {"user", "assistant"} <= columns.keys() else set()
        names = {key: name for key, name in names.items() if key not in unwanted}
    stands_for = {"user": "prompt", "assistant": "completion", "reasoning": REASONING_KEYS[0]}
    names |= {stands_for.get(role, role): name for role, name in columns.items()}
    # Tables have the columns of all their rows; a NaN is what pandas writes for an empty cell.
    values = {key: value[name] for key, name in names.items() if not is_null(value[name])}
    return _Cells(names={key: row.names.get(name, name) for key, name in names.items()}, values=values)


def is_null(value: object) -> bool:
    """Say whether a column holds nothing: null, or what pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def no_column(row: Row, value: Mapping[str, object], role: str, name: str) -> DataError:
    """Make the error about a column that `--column` names and the row does not have."""
    import difflib

    value = row.as_written if isinstance(row.as_written, Mapping) else value
    short = [key for key in value if len(key) <= 100 and key.isprintable()][:1000]
    close = difflib.get_close_matches(name, short, n=1, cutoff=0.0)
    listed = ", ".join(f"`{key}`" for key in value) or "none"
    hint = f"did you mean `--column {role}={close[0]}`?" if close else "remove this row"
    return bad(row, f"has no column `{name}` for `{role}`; it has: {listed}", hint=hint)


def _refuse_media_and_preferences(row: Row, cells: _Cells, columns: Mapping[str, str]) -> None:
    for key in MEDIA_KEYS:
        if cells.values.get(key):
            raise bad(
                row,
                f"has pictures or sound in `{cells.names[key]}`",
                hint="only text can be trained on: remove the row",
            )
    chosen = cells.values.get("chosen")
    if chosen is None or "rejected" not in cells.values or columns.keys() & {"messages", "text", "assistant"}:
        return
    role = "assistant" if any(key in cells.values for key in ASKING_KEYS) else "text"
    if are_turns(unpacked(chosen)) and not are_turns(cells.values.get("prompt")):
        role = "messages"
    raise bad(
        row,
        "is a preference (`chosen` and `rejected`), and nothing says how to learn from it",
        hint=f"add `--objective dpo`; or train on `chosen` alone: `--column {role}={cells.names['chosen']}`",
    )


def _conversation_column(row: Row, cells: _Cells) -> str | None:
    found = [key for key in CONVERSATION_KEYS if key in cells.values]
    found += [key for key in MAYBE_CONVERSATION_KEYS if _is_conversation(key, unpacked(cells.values.get(key)))]
    if len(found) > 1:
        raise bad(
            row,
            f"has two shapes at once: turns in {' and '.join(f'`{cells.names[key]}`' for key in found)}",
            hint=f"keep one, or name it: `--column messages={cells.names[found[0]]}`",
        )
    return found[0] if found else None


def _is_conversation(key: str, value: object) -> bool:
    """Say whether a column that may hold turns does; a `data` of objects without speakers is a list of rows."""
    if key not in MAYBE_CONVERSATION_KEYS or not are_turns(value):
        return False
    return key != "data" or (isinstance(value, list) and is_turn(value[0]))


def _refuse_another_pair(row: Row, cells: _Cells, key: str, turns: Sequence[Message]) -> None:
    asking = [one for one in ASKING_KEYS if is_filled(cells.values.get(one))]
    answers = {one: value.strip() for one in ANSWERING_KEYS if isinstance(value := cells.values.get(one), str)}
    answers = {one: text for one, text in answers.items() if text}
    said = "\0".join(turn["content"] for turn in turns)
    if asking and answers and not any(text in said for text in answers.values()):
        raise bad(
            row,
            f"has two shapes at once: {key} and {asking[0]}/{next(iter(answers))}",
            hint=f"keep one, or name it: `--column messages={cells.names[key]}`",
        )


def _pair_columns(row: Row, cells: _Cells) -> tuple[str, str] | None:
    asking = [key for key in ASKING_KEYS if key in cells.names]
    answering = [key for key in ANSWERING_KEYS if key in cells.names]
    if not asking or not answering:
        return None
    here = [any(key in cells.values for key in keys) for keys in (asking, answering)]
    # An answer that is null is a blank one, and the row is left out; unless this is another shape's row of the table.
    if not any(here) or (not all(here) and "text" in cells.values):
        return None
    chosen: list[str] = []
    for role, verb, keys in (("user", "asks", asking), ("assistant", "answers", answering)):
        filled = [key for key in keys if is_filled(cells.values.get(key))]
        if role == "user" and len(filled) > 1 and "input" in filled:
            filled.remove("input")  # it is context
        if len(filled) > 1:
            raise bad(
                row,
                f"has two shapes at once: it {verb} in {' and '.join(f'`{cells.names[key]}`' for key in filled)}",
                hint=f"keep one, or name it: `--column {role}={cells.names[filled[0]]}`",
            )
        chosen.append(next((key for key in (*filled, *keys) if key in cells.values), keys[0]))
    return chosen[0], chosen[1]


def is_filled(value: object) -> bool:
    """Say whether a column holds text, or a list with something in it."""
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list) and bool(value)


def _are_texts(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _pair(row: Row, cells: _Cells, ask: str, answer: str) -> tuple[Message, ...]:
    values, names = cells.values, cells.names
    turns: list[Message] = list(_history(row, cells))
    if isinstance(values.get(ask), list):
        turns += turns_of(row, values[ask])
    else:
        parts = [text_of(row, values.get(ask, ""), names[ask])]
        parts += [text_of(row, values[key], names[key]) for key in CONTEXT_KEYS if key != ask and values.get(key)]
        turns.append({"role": "user", "content": "\n\n".join(parts)})
    answered = values.get(answer, "")
    if _are_texts(answered):  # all of them right: the first is as good as any
        answered = answered[0]
    answered = "" if answered == [] else answered
    if isinstance(answered, list):
        answers = list(turns_of(row, answered))
    else:
        answers: list[Message] = [{"role": "assistant", "content": text_of(row, answered, names[answer])}]
    reasoning = _reasoning(row, cells)
    if reasoning and answers[-1]["role"] == "assistant":
        answers[-1]["reasoning_content"] = reasoning
    return (*turns, *answers)


def _reasoning(row: Row, cells: _Cells) -> str:
    for key in PAIR_REASONING_KEYS:
        value = cells.values.get(key)
        if value and not isinstance(value, bool) and not (isinstance(value, str) and value.strip().lower() in FLAGS):
            return text_of(row, value, cells.names[key])
    return ""


def _history(row: Row, cells: _Cells) -> tuple[Message, ...]:
    """Read Alpaca's earlier turns: a list of [user, assistant]; `history` that is no list is another thing."""
    history = unpacked(cells.values.get("history"))
    if not isinstance(history, list) or not history:
        return ()
    if are_turns(history):
        return turns_of(row, history)
    texts: list[object] = []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise bad(row, f"entry {number} of `{cells.names['history']}` is not a list of a question and its answer")
        texts += pair
    return alternating(row, texts)


def _instances(row: Row, cells: _Cells) -> list[Conversation]:
    """Read the seed tasks of Alpaca: one instruction, and several inputs with their outputs."""
    instances = cells.values["instances"]
    assert isinstance(instances, list)
    if not instances:
        raise bad(row, f"has no answer to train on: `{cells.names['instances']}` is empty")
    conversations: list[Conversation] = []
    for number, instance in enumerate(instances, start=1):
        if not isinstance(instance, Mapping):
            raise bad(row, f"instance {number} is {name_of(instance)}, not an object")
        place = f"{row.place}, instance {number}" if len(instances) > 1 else row.place
        value = {key: item for key, item in {**cells.values, **instance}.items() if key != "instances"}
        for made in to_conversations(Row(place=place, value=value, origin=row)):
            conversations.append(replace(made, shape=SHAPES["instruction", "instances"]))
    return conversations


def _with_surroundings(row: Row, cells: _Cells, turns: tuple[Message, ...], shape: str) -> Conversation:
    """Add what stands beside the turns: the system turn, if they have none, and the tools."""
    system = next((key for key in SYSTEM_KEYS if cells.values.get(key)), None)
    if system and all(turn["role"] != "system" for turn in turns):
        turns = ({"role": "system", "content": text_of(row, cells.values[system], cells.names[system])}, *turns)
    tools = tools_of(row, cells.values.get("tools"))
    return Conversation(messages=turns, text="", shape=shape, place=row.place, tools=tools)


def _unknown(row: Row, cells: _Cells) -> DataError:
    """Say why no shape fits: there are prompts only, or nothing that is known."""
    prompts = [key for key in (*ASKING_KEYS, "turns") if is_filled(cells.values.get(key))]
    if prompts:
        return bad(
            row,
            f"asks in `{cells.names[prompts[0]]}`, but has no answer to train on",
            hint="add a column `answer`, or name the one that answers: `--column assistant=NAME`",
        )
    assert isinstance(row.value, Mapping)
    columns = ", ".join(f"`{key}`" for key in row.value) or "none"
    return bad(
        row,
        f"has unknown columns: {columns}",
        hint=f"each row needs one of: {KNOWN_SHAPES}; or name them: `--column user=NAME --column assistant=NAME`",
    )
