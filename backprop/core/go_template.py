"""A chat template as Ollama needs it: as a Go template, found by rendering turns whose words are known.

Only a template that writes each turn between the same words can be said so; what else it does is refused, never guessed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backprop.core.data.formats import Message
from backprop.core.data.shapes import Role

Render = Callable[[Sequence[Message], bool], str]
"""Renders turns, with the beginning of an answer if the second argument says so; raises ValueError if it refuses them."""

TEXTS = ("the words of one", "what two answers", "three asks again", "four answers too", "the last is five")
"""No template writes these by itself, and none is in another."""
SYSTEM = "a system turn stands here"
REASONED = "<think>\nsix\n</think>\n\nseven"


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """What a chat template writes around the words of each turn."""

    begin: str
    """Before all turns."""
    system: tuple[str, str] | None
    """Before and after; None if there is no place for a system turn."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    """What begins an answer that is asked for."""
    bare: str = ""
    """In place of a system turn at the beginning, where there is none."""
    later: tuple[str, str] | None = None
    """Around a system turn that does not begin, where that is written in another way."""

    def render(self, messages: Sequence[Message], asks: bool) -> str:
        """Render turns as the chat template does.

        Raises:
            ValueError: If there is no place for one of them.
        """
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        text = self.begin + ("" if messages[0]["role"] == "system" else self.bare)
        for number, message in enumerate(messages):
            found = around.get(message["role"])
            found = self.later if self.later and number and message["role"] == "system" else found
            if found is None or set(message) - {"role", "content"}:
                raise ValueError(f"there is no place for a turn of {message['role']}")
            text += found[0] + str(message["content"]) + found[1]
        return text + (self.answer if asks else "")

    def to_go(self) -> str:
        """Write the Go template.

        Raises:
            ValueError: If a text cannot stand in one as it is.
        """
        pieces = [
            self.begin,
            self.bare,
            *(self.system or ()),
            *(self.later or ()),
            *self.user,
            *self.assistant,
            self.answer,
        ]
        odd = next((piece for piece in pieces if "{{" in piece or "}}" in piece or piece.endswith("{")), None)
        if odd is not None:
            raise ValueError(f"{odd!r} would be read as a part of a Go template")
        (before, after), (begun, ended) = self.user, self.assistant
        text = self.begin + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        if self.bare:
            text += f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{self.bare}{{{{ end }}}}'
        text += f'{{{{ if eq .Role "user" }}}}{before}{{{{ .Content }}}}{after}'
        if self.system:
            begins, ends = (
                f"{{{{ if eq $i 0 }}}}{first}{{{{ else }}}}{other}{{{{ end }}}}" if self.later else first
                for first, other in zip(self.system, self.later or self.system, strict=True)
            )
            text += f'{{{{ else if eq .Role "system" }}}}{begins}{{{{ .Content }}}}{ends}'
        # A last turn that is an answer is to be gone on with.
        text += (
            f'{{{{ else if eq .Role "assistant" }}}}{begun}{{{{ .Content }}}}{{{{ if not $last }}}}{ended}{{{{ end }}}}'
        )
        return (
            text + f'{{{{ end }}}}{{{{ if and $last (ne .Role "assistant") }}}}{self.answer}{{{{ end }}}}{{{{ end }}}}'
        )


def turns_of(render: Render, conversations: Sequence[Sequence[Message]], *, added: str = "", system: str = "") -> Turns:
    """Find what a chat template writes around turns, and see that it renders ``conversations`` so.

    Args:
        added: What the tokenizer adds to the beginning of any text, and a Go template therefore must not.
        system: The system turn that the template adds where there is none; all is rendered with one then.

    Raises:
        ValueError: If the template does more than that, or less; in words.
    """
    roles: tuple[Role, Role] = ("user", "assistant")
    chat = [_turn(roles[number % 2], text) for number, text in enumerate(TEXTS)]
    lead = [_turn("system", SYSTEM)] if _takes_system(render) else []
    if system and not lead:
        raise ValueError("it adds a system turn, and takes none")
    first, *rest = _between(
        render([*lead, *chat], True).removeprefix(added), [*(one["content"] for one in lead), *TEXTS]
    )
    asked = _between(render([*lead, chat[0]], False), TEXTS[:1])[1]
    answered = _between(render([*lead, *chat[:2]], False), TEXTS[:2])[2]
    begun, before, begun_again, before_again, answer = (
        _without(piece, ahead)
        for piece, ahead in zip(rest[-5:], (asked, answered, asked, answered, asked), strict=True)
    )
    if (begun, before) != (begun_again, before_again):
        raise ValueError("it writes the last turn in another way than the others")
    bare, later = "", None
    if lead:
        if not rest[0].endswith(before):
            raise ValueError("a system turn does not stand by itself in it")
        begin = "" if system else _begin(render(chat[:1], True).removeprefix(added), before)
        if not first.startswith(begin):  # a system turn without words, as Llama 3.2 writes it
            begin, bare = "", begin
            later = _later(render, chat, before, answered)
        around = (first[len(begin) :], rest[0][: len(rest[0]) - len(before)])
    else:
        around, begin = None, _begin(first + TEXTS[0], before)
    sides = {"user": (before, asked), "assistant": (begun, answered)}
    turns = Turns(begin=begin, system=around, **sides, answer=answer, bare=bare, later=later)
    reasoned = [*lead, chat[0], _turn("assistant", REASONED), chat[2]]
    plain = [] if system else [chat[:1], chat[:3]]
    for messages in (*plain, reasoned, *([*lead, *one] if system else one for one in conversations)):
        _hold(turns, render, messages, added)
    return turns


def _later(render: Render, chat: Sequence[Message], before: str, answered: str) -> tuple[str, str] | None:
    """Find what stands around a system turn behind an answer; None if there is no place for one."""
    try:
        text = render([*chat[:2], _turn("system", SYSTEM), chat[2]], True)
        _, _, ahead, behind, _ = _between(text, [TEXTS[0], TEXTS[1], SYSTEM, TEXTS[2]])
    except ValueError:
        return None
    if not ahead.startswith(answered) or not behind.endswith(before):
        return None
    return ahead[len(answered) :], behind[: len(behind) - len(before)]


def _begin(text: str, before: str) -> str:
    """Give what stands before all turns, of a text that begins with a turn of the user."""
    begin, found, _ = text.partition(before + TEXTS[0])
    if not found:
        raise ValueError("it writes the first turn in another way than the others")
    return begin


def _hold(turns: Turns, render: Render, messages: Sequence[Message], added: str) -> None:
    asks = messages[-1]["role"] != "assistant"
    if turns.render(messages, asks) != render(messages, asks).removeprefix(added):
        reasons = any(one["content"] == REASONED for one in messages)
        what = "reasoning" if reasons else f"turns that begin with {str(messages[0]['content'])[:40]!r}"
        raise ValueError(f"it rewrites {what}")


def _turn(role: Role, text: str) -> Message:
    return {"role": role, "content": text}


def _takes_system(render: Render) -> bool:
    try:
        return SYSTEM in render([_turn("system", SYSTEM), _turn("user", TEXTS[0])], True)
    except ValueError:
        return False


def _between(text: str, marks: Sequence[str]) -> list[str]:
    """Cut a text at ``marks``, which must stand in it in this order, each once."""
    pieces: list[str] = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError("it leaves turns out, or writes them twice")
        piece, _, text = text.partition(mark)
        pieces.append(piece)
    return [*pieces, text]


def _without(piece: str, ahead: str) -> str:
    if not piece.startswith(ahead):
        raise ValueError("it writes the last turn in another way than the others")
    return piece[len(ahead) :]
