"""How an Ollama server renders a conversation, and the template that it is given where that is not as in training."""

from collections.abc import Sequence
from dataclasses import dataclass

from backprop.core.data.formats import Message
from backprop.edges.ollama_http import Server, fetch, one_line
from backprop.events import Phase, Sink, Warned

NONE = ("", "{{ .Prompt }}")
"""What a server says is the template of a model for which it found none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """How conversations were rendered in training."""

    prompts: Sequence[tuple[Sequence[Message], str]]
    """Conversations without the model's system prompt, which the server adds, and the text that each becomes."""
    template: str
    """The Go template that renders so; empty if none does."""
    why_not: str = ""
    """Why none does."""
    left_out: str = ""
    """What the training's template does besides, and the Go template does not."""
    added: str = ""
    """The text of the token that begins any text, which is in a rendering or is added later."""


def rendered(server: Server, name: str, messages: Sequence[Message]) -> str | None:
    """Let a server render a conversation without answering it; None where it cannot, which then answers with one token.

    Raises:
        OllamaError: If the server refuses.
    """
    fields = {
        "model": name,
        "messages": [dict(message) for message in messages],
        "stream": False,
        "keep_alive": 0,
        "options": {"num_predict": 1},
        "_debug_render_only": True,
    }
    told: object = fetch(server, "POST", "/api/chat", fields, slow=True).get("_debug_info")
    text: object = told.get("rendered_template") if isinstance(told, dict) else None
    return text if isinstance(text, str) else None


def other(server: Server, name: str, wanted: Rendering) -> str | None:
    """Say how a model's rendering differs from the training's; empty if it does not, None if the server does not tell.

    Raises:
        OllamaError: If the server refuses.
    """
    for messages, expected in wanted.prompts:
        found = rendered(server, name, messages)
        if found is None:
            return None
        mine, theirs = (text.removeprefix(wanted.added) for text in (expected, found))
        if mine != theirs:
            return f'"{one_line(theirs)}" instead of "{one_line(mine)}"'
    return ""


def needed(server: Server, name: str, wanted: Rendering, say: Sink) -> bool:
    """Say whether a model needs the template of ``wanted``, and tell why; warn if there is none.

    Raises:
        OllamaError: If the server refuses.
    """
    differs = other(server, name, wanted)
    if differs is None:
        shown = str(fetch(server, "POST", "/api/show", {"model": name}).get("template") or "").strip()
        differs = "nothing around the words of a turn" if shown in NONE else ""
        if not differs:
            say(Warned(message="this Ollama does not tell how it renders prompts: only its answer was compared"))
    if not differs:
        return False
    told = f"Ollama would render prompts otherwise than in training: {differs}"
    if not wanted.template:
        say(Warned(message=f"{told}; no TEMPLATE can mend that: {wanted.why_not}"))
        return False
    say(Phase(name=f"{told}; it is given a TEMPLATE"))
    if wanted.left_out:
        say(Warned(message=f"the TEMPLATE for Ollama renders plain turns: {wanted.left_out} are left out"))
    return True
