"""Turns: what the lists of turns in users' files hold, made into the messages that chat templates read.

Pure: rows come in as parsed values with the place they came from, so that every error can name it. What is not text, or
not JSON where JSON belongs, never gets past this module.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

from backprop.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]


class Function(TypedDict):
    """The function that is called, and with what."""

    name: str
    arguments: Mapping[str, object]


class ToolCall(TypedDict):
    """One call of a tool."""

    type: Literal["function"]
    function: Function
    id: NotRequired[str]


class Message(TypedDict):
    """One turn, with the keys that the chat templates of transformers read."""

    role: Role
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A parsed row and where it stands: ``place`` reads like `train.jsonl, line 3`."""

    place: str
    value: object
    origin: "Row | None" = None
    """The row of the file, if this one was made of it; errors show that."""
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the file calls columns that have another name here."""

    @property
    def as_written(self) -> object:
        """Give what stands in the file."""
        return self.origin.as_written if self.origin else self.value


# ShareGPT and its relatives name the speakers in several ways.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
# LLaMA-Factory's and ms-swift's speakers of a turn that is nothing but calls, as JSON.
CALLERS = ("function_call", "tool_call")
SPEAKER_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
# One object holds a question and its answer: the speakers are its keys; `input` and `output` are XTuner's.
EXCHANGE_KEYS: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "input": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "output": "assistant",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Deeper than any schema of a tool; what is far deeper can't be written as JSON again.
MOST_NESTED = 100


def is_turn(value: object) -> bool:
    """Say whether ``value`` is an object that names a speaker, and has something that was said."""
    if not isinstance(value, Mapping) or not any(key in value for key in SPEAKER_KEYS):
        return False
    return any(key in value for key in (*CONTENT_KEYS, "tool_calls", "function_call"))


def is_exchange(value: object) -> bool:
    """Say whether ``value`` is an object that holds what the user and the assistant say: {"user": …, "assistant": …}."""
    if not isinstance(value, Mapping):
        return False
    return {"user", "assistant"} <= {EXCHANGE_KEYS[key] for key in EXCHANGE_KEYS if isinstance(value.get(key), str)}


def are_turns(value: object) -> bool:
    """Say whether ``value`` is a list that begins with a turn or an exchange."""
    return isinstance(value, list) and bool(value) and (is_turn(value[0]) or is_exchange(value[0]))


def turns_of(row: Row, value: object) -> tuple[Message, ...]:
    """Read a list of turns: `role` and `content`, `from` and `value`, or objects like {"user": …, "assistant": …}.

    The list may be text in JSON, as in a table. Of several reasoning keys the first filled one is taken, in the order of
    ``REASONING_KEYS``.

    Raises:
        DataError: Naming the turn that cannot be read.
    """
    value = unpacked(value)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else name_of(value)
        raise bad(row, f"holds {found} where a list of turns belongs")
    return tuple(message for number, turn in enumerate(value, start=1) for message in _turn(row, number, turn))


def alternating(row: Row, texts: Sequence[object]) -> tuple[Message, ...]:
    """Read texts of the user and the assistant in turn, as UltraChat's."""
    roles: tuple[Role, Role] = ("user", "assistant")
    return tuple(
        {"role": roles[number % 2], "content": text_of(row, text, f"turn {number + 1}")}
        for number, text in enumerate(texts)
    )


def _turn(row: Row, number: int, turn: object) -> list[Message]:
    where = f"turn {number}"
    if not isinstance(turn, Mapping):
        raise bad(row, f"{where} is {name_of(turn)}, not an object")
    # Tables give each turn the keys of all: what is null is not there.
    said: dict[str, object] = {key: value for key, value in turn.items() if value is not None}
    speaker = next((key for key in SPEAKER_KEYS if key in said), None)
    if speaker is None and any(isinstance(said[key], str) for key in EXCHANGE_KEYS if key in said):
        return _exchange(row, where, said)
    role_name = str(said[speaker]).strip().lower() if speaker and isinstance(said[speaker], str) else ""
    content_key = next((key for key in CONTENT_KEYS if key in said), None)
    content_key = content_key or next((key for key in CONTENT_KEYS if key in turn), None)
    calls = said.get("tool_calls") or said.get("function_call")
    if not speaker or not (content_key or calls):
        columns = ", ".join(f"`{key}`" for key in turn) or "none"
        raise bad(
            row, f"{where} has the keys {columns}", hint="a turn needs `role` and `content`, or `from` and `value`"
        )
    if role_name not in ROLES:
        raise bad(row, f"{where} has an unknown role: {said[speaker]!r}", hint=f"known roles: {', '.join(ROLES)}")
    if role_name in CALLERS:
        return [{"role": "assistant", "content": "", "tool_calls": calls_of(row, where, said.get(content_key or ""))}]
    content = said.get(content_key or "", "" if calls and ROLES[role_name] == "assistant" else None)
    message: Message = {"role": ROLES[role_name], "content": text_of(row, _joined_parts(row, where, content), where)}
    if calls:
        if message["role"] != "assistant":
            raise bad(row, f"{where} has tool calls, but is not the assistant's")
        message["tool_calls"] = calls_of(row, where, calls)
    _add_extras(row, where, said, message)
    return [message]


def _add_extras(row: Row, where: str, said: Mapping[str, object], message: Message) -> None:
    reasoning = next((key for key in REASONING_KEYS if said.get(key)), None)
    if reasoning and message["role"] == "assistant":
        message["reasoning_content"] = text_of(row, said[reasoning], f"{where}, {reasoning}")
    if said.get("tool_call_id"):
        message["tool_call_id"] = text_of(row, said["tool_call_id"], f"{where}, tool_call_id")
    if said.get("name"):
        message["name"] = text_of(row, said["name"], f"{where}, name")


def _exchange(row: Row, where: str, said: Mapping[str, object]) -> list[Message]:
    """Read {"user": …, "assistant": …}; the order of the keys says nothing, for writers sort them."""
    order: tuple[Role, ...] = ("system", "user", "assistant")
    messages: list[Message] = []
    for role in order:
        for key, value in said.items():
            if EXCHANGE_KEYS.get(key) == role:
                messages.append({"role": role, "content": text_of(row, value, f"{where}, {key}")})
    return messages


def calls_of(row: Row, where: str, value: object) -> list[ToolCall]:
    """Read calls of tools: one or a list, wrapped in `function` or bare, as objects or as JSON text."""
    value = _json_of(row, where, value) if isinstance(value, str) else value
    calls = value if isinstance(value, list) else [value]
    return [_call(row, f"{where}, call {number}", call) for number, call in enumerate(calls, start=1)]


def _call(row: Row, where: str, call: object) -> ToolCall:
    call = _json_of(row, where, call) if isinstance(call, str) else call
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not function.get("name"):
        raise bad(
            row,
            f"{where} is not a call of a tool",
            hint='a call is an object like {"name": "add", "arguments": {"a": 1}}',
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _json_of(row, f"{where}, arguments", arguments)
    # A call without arguments is written as "", null or nothing by several servers.
    arguments = {} if arguments is None or arguments == "" else arguments
    if not isinstance(arguments, Mapping):
        raise bad(
            row, f"{where} has arguments that are {name_of(arguments)}, not an object", hint="arguments are like {}"
        )
    check_json(row, f"{where}, arguments", arguments)
    made: ToolCall = {
        "type": "function",
        "function": {"name": text_of(row, function["name"], f"{where}, name"), "arguments": dict(arguments)},
    }
    if call.get("id"):
        made["id"] = text_of(row, call["id"], f"{where}, id")
    return made


def tools_of(row: Row, value: object) -> tuple[Mapping[str, object], ...]:
    """Read the `tools` that a row offers: a list of functions, or JSON text of one; bare functions are wrapped."""
    hint = 'a tool is like {"type": "function", "function": {"name": "add", …}}; rename `tools` if it holds others'
    value = _json_of(row, "`tools`", value, hint=hint) if isinstance(value, str) and value.strip() else value
    if not value:
        return ()
    if not isinstance(value, list):
        raise bad(row, f"holds {name_of(value)} in `tools` where a list of functions belongs", hint=hint)
    tools: list[Mapping[str, object]] = []
    for number, given in enumerate(value, start=1):
        where = f"tool {number}"
        tool = _json_of(row, where, given, hint=hint) if isinstance(given, str) else given
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(tool, Mapping) or not isinstance(function, Mapping) or not function.get("name"):
            raise bad(row, f"{where} is not a function with a name", hint=hint)
        text_of(row, function["name"], f"{where}, name")
        check_json(row, where, tool)
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tuple(tools)


def _json_of(row: Row, where: str, text: str, *, hint: str = "write it as JSON, or remove this row") -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise bad(row, f"{where} is not JSON: {error.msg} at character {error.pos}", hint=hint) from error
    except RecursionError as error:
        raise bad(row, f"{where} is nested too deeply", hint=hint) from error
    except ValueError as error:  # a number of over 4,300 digits
        raise bad(row, f"{where} cannot be read: {error}", hint=hint) from error


def unpacked(value: object) -> object:
    """Give the list that ``value`` is as JSON text, as tables hold lists; else ``value`` itself."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list) else value
    return value


def check_json(row: Row, where: str, value: object) -> None:
    """Refuse what cannot be written as JSON and read again: it would break in the middle of a chat template."""
    waiting: list[tuple[int, object]] = [(0, value)]
    while waiting:
        depth, item = waiting.pop()
        if depth > MOST_NESTED:
            raise bad(row, f"{where} is nested over {MOST_NESTED} levels deep")
        if isinstance(item, Mapping):
            for key, inner in item.items():
                text_of(row, key, f"{where}, a key")
                waiting.append((depth + 1, inner))
        elif isinstance(item, list):
            waiting += [(depth + 1, inner) for inner in item]
        elif isinstance(item, str):
            text_of(row, item, where)
        elif isinstance(item, float) and not math.isfinite(item):
            raise bad(row, f"{where} holds {item}, which JSON does not have", hint="write null, or text")
        elif item is not None and not isinstance(item, (bool, int, float)):
            raise bad(row, f"{where} holds {name_of(item)}, which JSON does not have", hint="write it as text")


def _joined_parts(row: Row, where: str, content: object) -> object:
    """Join content given as a list of text parts; refuse parts of another kind by name."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            shown = repr(kind) if kind is None or isinstance(kind, str) else name_of(kind)
            raise bad(row, f"{where} has a part of kind {shown}, not text", hint="only text can be trained on")
        texts.append(text)
    return "".join(texts)


def text_of(row: Row, value: object, name: str) -> str:
    """Give ``value``, which has to be text that can be written as UTF-8; ``name`` is its column or turn."""
    if not isinstance(value, str):
        raise bad(row, f"holds {name_of(value)} in `{name}` where text belongs")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad(
            row, f"holds half a character (a lone surrogate) in `{name}`", hint="write the file as UTF-8 again"
        ) from error
    return value


def name_of(value: object) -> str:
    """Name the kind of a value as JSON does, with its article."""
    for kind, name in (
        (Mapping, "an object"),
        (list, "a list"),
        (str, "text"),
        (bool, "true or false"),
        (type(None), "null"),
        ((int, float), "a number"),
    ):
        if isinstance(value, kind):
            return name
    return f"a value of type {type(value).__name__}"


# A few rows fit a terminal; a row of 30 MB does not.
MOST_SHOWN = 200


def bad(row: Row, what: str, *, hint: str = "mend this row, or remove it") -> DataError:
    """Make the error about ``row``: its place, what is wrong, and its beginning."""
    try:
        shown = json.dumps(row.as_written, ensure_ascii=False, default=str)
    except RecursionError:
        shown = "(too deeply nested to be shown)"
    shown = shown.encode("utf-8", "backslashreplace").decode()
    what = what if len(what) <= 2 * MOST_SHOWN else f"{what[: 2 * MOST_SHOWN]}…"
    shown = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}…"
    return DataError(f"{row.place} {what.encode('utf-8', 'backslashreplace').decode()}: {shown}", hint=hint)
