"""Ollama: hand a quantized GGUF to a running server, look at what it made of it, and ask it once.

A model is made under a name of its own, proven there, and only then copied to the name that was asked for: whatever
fails, a model that had that name before is still there as it was.
"""

import ast
import re
import secrets
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from backprop.console import without_escapes
from backprop.core.fidelity import SAME_START, Reply
from backprop.edges import ollama_template
from backprop.edges.ollama_http import CHUNK_BYTES, Server, fetch, fetch_lines, finds, is_broken, one_line, said, send
from backprop.edges.ollama_template import Rendering
from backprop.edges.rundir import sha256_of
from backprop.errors import DiskError, OllamaError, UsageError
from backprop.events import Phase, Registered, Sink, Warned

OLDEST = (0, 5, 5)
"""The first release whose `/api/create` takes `files`; older ones want the text of a Modelfile."""
# What a server that was built from its source, without a release, calls itself.
UNRELEASED = (0, 0, 0)
ATTEMPTS = 4
"""How often a file is sent whose connection breaks."""
BACKOFF_S = 1.0
"""Seconds before the second attempt; twice as many before each further one."""
TOLD_EVERY_S = 10.0
# Characters; 64 tokens stay far below.
ANSWER_MOST = 10_000
NAME_HINT = "give `--ollama-name NAME` or `NAMESPACE/NAME:TAG`, of letters, digits, `_`, `-` and `.`"
# https://github.com/ollama/ollama/blob/main/types/model/name.go: each part begins with a letter, digit or `_`.
NAMESPACE = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"
PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParts:
    """What a model is besides its weights; what is empty is left to Ollama."""

    template: str = ""
    """A Go template."""
    system: str = ""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, without being part of it."""
    license: str = ""


def check_name(name: str) -> None:
    """Refuse what cannot name a model.

    Raises:
        UsageError: If it is not `[namespace/]name[:tag]` by Ollama's rules, or has a tag that means another server.
    """
    found = re.fullmatch(rf"(?:{NAMESPACE}/)?{PART}(?::({PART}))?", name)
    if found is None or ".." in name:
        raise UsageError(f"{name[:200]!a} cannot name a model of Ollama", hint=NAME_HINT)
    # https://github.com/ollama/ollama/blob/main/internal/modelref/modelref.go
    tag = (found[1] or "").lower()
    if tag in ("cloud", "local") or tag.endswith("-cloud"):
        raise UsageError(f"the tag of `{name}` tells Ollama where a model is", hint="choose another tag")


def modelfile(gguf: str, parts: ModelParts) -> str:
    """Write the Modelfile from which `ollama create` makes the model again.

    Args:
        gguf: Name of the file, which stands beside the Modelfile.

    Raises:
        UsageError: If a text cannot stand in a Modelfile, which has no escapes: one with three quotes in a row, or with
            characters that its parser drops.
    """
    lines = [f"FROM {_value('the file name', f'./{gguf}')}"]
    if parts.template:
        lines.append(f"TEMPLATE {_quoted('the template', parts.template)}")
    lines += [f"PARAMETER stop {_value('a stop text', stop)}" for stop in parts.stop]
    if parts.system:
        lines.append(f"SYSTEM {_quoted('the system prompt', parts.system)}")
    if parts.license:
        lines.append(f"LICENSE {_quoted('the license', parts.license)}")
    return "\n".join(lines) + "\n"


def _value(what: str, text: str) -> str:
    """Quote a text of one line with one quote on each side, as people do, and others with three."""
    quoted = _quoted(what, text)
    return quoted if '"' in text or "\n" in text or "\r" in text else f'"{text}"'


def _quoted(what: str, text: str) -> str:
    # https://github.com/ollama/ollama/blob/main/parser/parser.go keeps what Go calls printable, tabs and line breaks.
    dropped = next((char for char in text if not char.isprintable() and char not in "\t\n\r"), None)
    if dropped is not None:
        raise UsageError(f"{what} holds U+{ord(dropped):04X}, which a Modelfile cannot hold", hint="take it out")
    if '"""' in text:
        raise UsageError(f'{what} holds `"""`, which a Modelfile cannot hold', hint="take it out")
    return f'"""{text}"""'


def check(server: Server) -> str:
    """Ask a server for its version.

    Raises:
        OllamaError: If it cannot be reached, is no Ollama, or is older than `OLDEST`.
    """
    version = fetch(server, "GET", "/api/version").get("version")
    found = re.match(r"v?([0-9]{1,6})\.([0-9]{1,6})(?:\.([0-9]{1,6}))?", version) if isinstance(version, str) else None
    if found is None:
        raise OllamaError(
            f"`{server.url}` does not answer as Ollama does: version {said(server, str(version))}",
            hint="give its address with `--ollama-url`",
        )
    numbers = tuple(int(number or 0) for number in found.groups())
    if numbers != UNRELEASED and numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise OllamaError(
            f"Ollama at `{server.url}` is {said(server, found.string)}, and {oldest} is needed",
            hint="update Ollama there",
        )
    return said(server, found.string)


def register(
    gguf: Path,
    name: str,
    *,
    server: Server,
    parts: ModelParts,
    question: str,
    expected: Reply | None = None,
    wanted: Rendering | None = None,
    say: Sink,
) -> tuple[Registered, ModelParts]:
    """Give a quantized GGUF to a server under ``name``, once it has shown there that it answers.

    A file that the server has already is not sent. One whose connection breaks is sent again from its first byte: the
    server takes files whole. A file that was sent for a model that then failed goes when its model goes, or, if none was
    made, when the server starts next.

    Args:
        question: What the model is asked.
        expected: What llama.cpp answers with the same file; the answer there must begin so, and stop where that does.
        wanted: How prompts were rendered in training: if the server would render them otherwise, it is given a template.

    Returns:
        What was registered, and of which parts.

    Raises:
        UsageError: If ``name`` cannot be.
        DiskError: If ``gguf`` cannot be read.
        OllamaError: If the server cannot be reached or refuses, or what it made is not what it was given.
    """
    check_name(name)
    check(server)
    if server.token_withheld:
        say(Warned(message=f"OLLAMA_API_KEY is not sent to `{server.url}`: anyone on the way could read it"))
    say(Phase(name=f"handing {gguf.name} to Ollama at {server.url}"))
    family = f"{name.partition(':')[0]}:unproven-"
    there = _tidied(server, family)
    digest = _digest(gguf)
    upload(server, gguf, digest, say=say)
    unproven = f"{family}{secrets.token_hex(4)}"
    with _removed_afterwards(server, unproven, say):
        parts = _create_as_wanted(server, unproven, digest, parts, wanted, say)
        verify(server, unproven, parts)
        say(Phase(name=f"asking {name} in Ollama"))
        answer = ask(server, unproven, question)
        _refuse_other_answer(answer, expected, question)
        fetch(server, "POST", "/api/copy", {"source": unproven, "destination": name})
    verify(server, name, parts)
    registered = Registered(
        name=name,
        server=server.url,
        size_bytes=gguf.stat().st_size,
        replaced=(name if ":" in name else f"{name}:latest").lower() in there,
        question=question,
        answer=without_escapes(answer.text[:ANSWER_MOST]),
    )
    say(registered)
    return registered, parts


def _tidied(server: Server, family: str) -> set[str]:
    """Remove what a process that was killed left there, and give the names of all models that were there."""
    there = names(server)
    for left in there:
        if left.startswith(family.lower()):
            delete(server, left)
    return there


def _create_as_wanted(
    server: Server, name: str, digest: str, parts: ModelParts, wanted: Rendering | None, say: Sink
) -> ModelParts:
    """Make a model, and again with a template if it would render prompts otherwise than is wanted; give its parts."""
    create(server, name, digest, parts)
    if wanted is None or parts.template or not ollama_template.needed(server, name, wanted, say):
        return parts
    parts = replace(parts, template=wanted.template)
    create(server, name, digest, parts)
    differs = ollama_template.other(server, name, wanted)
    if differs:  # some families are rendered by the server's own code, whatever the template says
        say(Warned(message=f"Ollama renders prompts otherwise than in training, also with a TEMPLATE: {differs}"))
    return parts


def _refuse_other_answer(found: Reply, wanted: Reply | None, question: str) -> None:
    if not found.text:
        raise OllamaError(
            f'the model gave no answer to "{one_line(question)}" in Ollama',
            hint="ask another `--question`, or train longer",
        )
    if wanted is None:
        return
    # What a model says to itself first, Ollama keeps apart.
    both = (found.text, wanted.text)
    answer, expected = (re.sub(r"^\s*<think>.*?</think>\s*", "", text, flags=re.DOTALL) for text in both)
    if expected and wanted.stopped and not found.stopped and answer.startswith(expected):
        raise OllamaError(
            f'Ollama goes on after "{one_line(expected)}", with which llama.cpp ends its answer to "{one_line(question)}"',
            hint="Ollama may not know the text that ends a turn: please report it with the Modelfile",
        )
    if expected and answer[:SAME_START] != expected[:SAME_START]:
        raise OllamaError(
            f'Ollama answers "{one_line(answer)}" to "{one_line(question)}", and llama.cpp "{one_line(expected)}"',
            hint="Ollama may have taken another chat template for it: give `--system`, or use llama.cpp",
        )


@contextmanager
def _removed_afterwards(server: Server, name: str, say: Sink) -> Generator[None]:
    try:
        yield
    finally:
        try:
            delete(server, name)
        except OllamaError as error:
            say(Warned(message=f"`{name}` may be left there: {error.message}; remove it with `ollama rm {name}`"))


def _digest(gguf: Path) -> str:
    try:
        return f"sha256:{sha256_of(gguf)}"
    except OSError as error:
        raise _unreadable(gguf, error) from error


def _unreadable(gguf: Path, error: OSError) -> DiskError:
    return DiskError(f"`{gguf}` cannot be read: {error.strerror or error}", hint="export it again")


def upload(server: Server, gguf: Path, digest: str, *, say: Sink) -> None:
    """Send a file, unless the server has it; if the connection breaks, again, up to `ATTEMPTS` times.

    Args:
        digest: `sha256:` and 64 hexadecimal digits in lower case. The server compares.

    Raises:
        DiskError: If ``gguf`` cannot be read, or changes meanwhile.
        OllamaError: If the server refuses it, or the connection keeps breaking.
    """
    path = f"/api/blobs/{digest}"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if not finds(server, "HEAD", path):
                size_bytes = gguf.stat().st_size
                send(server, path, _told_chunks(gguf, size_bytes, say), size_bytes=size_bytes)
            return
        except OllamaError as error:
            if attempt == ATTEMPTS or not is_broken(error):
                raise
            wait_s = BACKOFF_S * 2 ** (attempt - 1)
            say(Warned(message=f"{error.message}; trying again from the file's first byte in {wait_s:g} s"))
            time.sleep(wait_s)


def _told_chunks(gguf: Path, size_bytes: int, say: Sink) -> Iterator[bytes]:
    """Read exactly ``size_bytes``, and tell now and then how many went out."""
    sent, told_at = 0, time.monotonic()
    try:
        with gguf.open("rb") as file:
            while sent < size_bytes and (chunk := file.read(min(CHUNK_BYTES, size_bytes - sent))):
                yield chunk
                sent += len(chunk)
                if time.monotonic() - told_at >= TOLD_EVERY_S:
                    told_at = time.monotonic()
                    say(Phase(name=f"sent {sent / 2**20:,.0f} of {size_bytes / 2**20:,.0f} MiB to Ollama"))
    except OSError as error:
        raise _unreadable(gguf, error) from error
    if sent < size_bytes:
        raise DiskError(f"`{gguf}` became shorter while it was sent", hint="export it again")


def create(server: Server, name: str, digest: str, parts: ModelParts) -> None:
    """Make a model of a file that the server has.

    Raises:
        OllamaError: If the server refuses it, also in the middle of its answer, or does not say that it is done.
    """
    # The server looks at the ending only; no name of a file of this machine leaves it.
    fields: dict[str, object] = {"model": name, "files": {"model.gguf": digest}}
    if parts.template:
        fields["template"] = parts.template
    if parts.system:
        fields["system"] = parts.system
    if parts.stop:
        fields["parameters"] = {"stop": list(parts.stop)}
    if parts.license:
        fields["license"] = parts.license
    lines = fetch_lines(server, "/api/create", fields)
    last = lines[-1].get("status") if lines else None
    if last != "success":
        raise OllamaError(
            f"Ollama at `{server.url}` stopped making the model: its last word is {said(server, str(last))}",
            hint="look into its log",
        )


def verify(server: Server, name: str, parts: ModelParts) -> None:
    """Compare what the server says of a model with what it was given.

    The file itself is compared by its digest when it is sent, and not again: newer servers store another file, made of it.

    Raises:
        OllamaError: If something is missing or different.
    """
    shown = fetch(server, "POST", "/api/show", {"model": name})
    details: object = shown.get("details")
    kind: object = details.get("format") if isinstance(details, dict) else None
    stops = _stops(shown)
    different = [
        what
        for what, equal in (
            ("format", kind == "gguf"),
            ("template", not parts.template or _text(shown, "template") == parts.template.strip()),
            ("system prompt", not parts.system or _text(shown, "system") == parts.system.strip()),
            ("stop texts", set(parts.stop) <= stops),
            ("license", parts.license.strip() in _text(shown, "license")),
        )
        if not equal
    ]
    if different:
        raise OllamaError(
            f"the model in Ollama at `{server.url}` is not what it was given: its {' and '.join(different)} differ",
            hint="update Ollama there, and run the same command again",
        )


def _text(shown: Mapping[str, Any], key: str) -> str:
    return str(shown.get(key) or "").strip()


def _stops(shown: Mapping[str, Any]) -> set[str]:
    """Read the stop texts from the parameters, one a line, each quoted as Go does."""
    found: set[str] = set()
    for line in _text(shown, "parameters").splitlines():
        key, _, value = line.partition(" ")
        value = value.strip()
        if key == "stop":
            # Python reads all of Go's escapes.
            quoted = re.fullmatch(
                r'"(?:[^"\\]|\\["\\abfnrtv]|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U000[0-9a-f]{5})*"', value
            )
            found.add(str(ast.literal_eval(value)) if quoted else value)
    return found


def ask(server: Server, name: str, question: str, *, max_tokens: int = 64) -> Reply:
    """Let a model answer, always with its likeliest token, and let the server forget it afterwards.

    Raises:
        OllamaError: If the server fails, or its answer is not complete.
    """
    fields = {
        "model": name,
        "stream": False,
        "keep_alive": 0,
        "options": {"temperature": 0, "seed": 0, "repeat_penalty": 1.0, "num_predict": max_tokens},
    }
    messages = [{"role": "user", "content": question}]
    reply = fetch(server, "POST", "/api/chat", {**fields, "messages": messages}, slow=True)
    message: object = reply.get("message")
    # What a model says to itself first may take all of its tokens.
    text: object = message.get("content") or message.get("thinking", "") if isinstance(message, dict) else None
    if not isinstance(text, str) or reply.get("done") is not True:
        raise OllamaError(
            f"Ollama at `{server.url}` did not end its answer: {said(server, str(dict(reply)))}",
            hint="look into its log",
        )
    return Reply(text=text.strip(), stopped=reply.get("done_reason") == "stop")


def names(server: Server) -> set[str]:
    """Give the names of a server's models, each with its tag, in lower case.

    Raises:
        OllamaError: If the server cannot be reached or refuses.
    """
    models: object = fetch(server, "GET", "/api/tags").get("models")
    listed = cast(list[object], models) if isinstance(models, list) else []
    return {str(cast(dict[str, object], one).get("name")).lower() for one in listed if isinstance(one, dict)}


def delete(server: Server, name: str) -> None:
    """Remove a model, if it is there, and the files that only it needs.

    Raises:
        OllamaError: If the server cannot be reached or refuses.
    """
    finds(server, "DELETE", "/api/delete", {"model": name})
