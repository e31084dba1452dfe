"""The part of Go's text/template that Ollama's templates of turns are written in, for the double of its server.

What Go refuses, or this does not know, is an error: a template is never taken for what it is not.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
WORD = re.compile(r'\s*("(?:[^"\\\n]|\\[\\"nt])*"|:=|[(),]|\$?\.[A-Za-z.]+|\$\w*(?:\.\w+)*|-?\d+|\w+|\.)')
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda one, *others: one in others,
    "ne": lambda one, other: one != other,
    "gt": lambda one, other: one > other,
    "len": len,
    "not": lambda one: not one,
    "slice": lambda items, start: items[start:],
    "and": lambda *all_of: next((one for one in all_of if not one), all_of[-1]),
    "or": lambda *any_of: next((one for one in any_of if one), any_of[-1]),
}


class TemplateError(Exception):
    """What Go would say."""


@dataclass
class Node:
    kind: str
    words: list[str]
    text: str = ""
    body: list["Node"] = field(default_factory=list)
    other: list["Node"] = field(default_factory=list)


def parse(template: str) -> list[Node]:
    tokens = list(_tokens(template))
    nodes, rest = _block(tokens, 0, ())
    assert rest == len(tokens)
    return nodes


def _tokens(template: str) -> Iterator[Node]:
    position, trims = 0, False
    for found in ACTION.finditer(template):
        text = template[position : found.start()]
        yield from _text(text.lstrip() if trims else text, rstrip=bool(found[1]))
        position, trims = found.end(), bool(found[3])
        words = _words(found[2].strip())
        kind = words[0] if words and words[0] in ("if", "else", "range", "end") else "print"
        yield Node(kind, words if kind == "print" else words[1:])
    rest = template[position:]
    yield from _text(rest.lstrip() if trims else rest, rstrip=False)


def _text(text: str, *, rstrip: bool) -> Iterator[Node]:
    if "{{" in text or "}}" in text:
        raise TemplateError("unclosed action")
    text = text.rstrip() if rstrip else text
    if text:
        yield Node("text", [], text)


def _words(text: str) -> list[str]:
    words, position = [], 0
    while position < len(text.rstrip()):
        found = WORD.match(text, position)
        if found is None:
            raise TemplateError(f"unexpected {text[position : position + 10]!r} in command")
        words.append(found[1])
        position = found.end()
    if not words:
        raise TemplateError("missing value for command")
    return words


def _block(tokens: Sequence[Node], position: int, ends: Sequence[str]) -> tuple[list[Node], int]:
    nodes: list[Node] = []
    while position < len(tokens):
        node = tokens[position]
        if node.kind in ("end", "else"):
            if node.kind not in ends:
                raise TemplateError(f"unexpected {{{{{node.kind}}}}}")
            return nodes, position
        position += 1
        if node.kind in ("if", "range"):
            position = _branches(node, tokens, position)
        nodes.append(node)
    if ends:
        raise TemplateError("unexpected EOF")
    return nodes, position


def _branches(node: Node, tokens: Sequence[Node], position: int) -> int:
    """Read up to the end of an `if` or `range`, and give the position behind it."""
    node.body, position = _block(tokens, position, ("else", "end"))
    if tokens[position].kind == "end":
        return position + 1
    words = tokens[position].words
    if words[:1] == ["if"]:
        other = Node("if", words[1:])
        node.other = [other]
        return _branches(other, tokens, position + 1)
    node.other, position = _block(tokens, position + 1, ("end",))
    return position + 1


def fields_of(nodes: Sequence[Node]) -> set[str]:
    words = {word for node in nodes for word in node.words if "." in word and not word.startswith('"')}
    return words | {one for node in nodes for one in fields_of([*node.body, *node.other])}


def execute(nodes: Sequence[Node], dot: Any, variables: dict[str, Any]) -> str:
    text = ""
    for node in nodes:
        if node.kind == "text":
            text += node.text
        elif node.kind == "if":
            text += execute(node.body if _value(node.words, dot, variables) else node.other, dot, dict(variables))
        elif node.kind == "range":
            names, words = _range(node.words)
            for number, item in enumerate(_value(words, dot, variables)):
                values = [number, item][-len(names) :] if names else []
                text += execute(node.body, item, {**variables, **dict(zip(names, values, strict=True))})
        elif node.words[1:2] == [":="]:
            variables[node.words[0]] = _value(node.words[2:], dot, variables)
        else:
            text += str(_value(node.words, dot, variables))
    return text


def _range(words: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    if ":=" not in words:
        return [], words
    at = words.index(":=")
    return [word for word in words[:at] if word != ","], words[at + 1 :]


def _value(words: Sequence[str], dot: Any, variables: Mapping[str, Any]) -> Any:
    values, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word == "(":
            inner, depth = list[str](), 1
            while True:
                if not rest:
                    raise TemplateError("unclosed left paren")
                inner.append(rest.pop(0))
                depth += {"(": 1, ")": -1}.get(inner[-1], 0)
                if depth == 0:
                    break
            values.append(_value(inner[:-1], dot, variables))
        else:
            values.append(_operand(word, dot, variables))
    if callable(values[0]):
        return values[0](*values[1:])
    if len(values) != 1:
        raise TemplateError(f"can't give argument to non-function {words[0]}")
    return values[0]


def _operand(word: str, dot: Any, variables: Mapping[str, Any]) -> Any:
    if word.startswith('"'):
        return re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), word[1:-1])
    if word.lstrip("-").isdigit():
        return int(word)
    if word in FUNCTIONS:
        return FUNCTIONS[word]
    name, *path = word.split(".")
    value = dot if not name else variables.get(name, _NONE)
    for key in [key for key in path if key]:
        if not isinstance(value, Mapping) or key not in value:
            raise TemplateError(f"can't evaluate field {key}")
        value = value[key]
    if value is _NONE:
        raise TemplateError(
            f'undefined variable "{word}"' if name.startswith("$") else f'function "{word}" not defined'
        )
    return value


_NONE = object()


def render(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Render turns as a server does: by `.Messages` if the template has it, else by `.System`, `.Prompt` and `.Response`."""
    nodes = parse(template)
    system = "\n\n".join(one["content"] for one in messages if one["role"] == "system")
    if any(name.endswith(".Messages") for name in fields_of(nodes)):
        values: dict[str, Any] = {
            "System": system,
            "Messages": [{"Role": one["role"], "Content": one["content"]} for one in messages],
            "Tools": [],
            "Response": "",
        }
        return execute(nodes, values, {"$": values})
    text, turn = "", {"System": "", "Prompt": "", "Response": ""}
    keys = {"system": "System", "user": "Prompt", "assistant": "Response"}
    for message in messages:
        key = keys[message["role"]]
        if (key == "Prompt" and turn["Response"]) or (key == "System" and (turn["Prompt"] or turn["Response"])):
            text += execute(nodes, turn, {"$": turn})
            turn = dict.fromkeys(turn, "")
        turn[key] = message["content"]
    # The last time, all behind the response is left out.
    cut = next((n for n, node in enumerate(nodes) if ".Response" in fields_of([node])), len(nodes))
    return text + execute(nodes[:cut], turn, {"$": turn})
