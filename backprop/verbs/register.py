"""An exported file in Ollama: refused before any work where it cannot be, asked there, and compared."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from backprop.config import ExportConfig
from backprop.core.data.formats import Message
from backprop.core.go_template import turns_of
from backprop.edges import llama_cpp, ollama, rundir
from backprop.edges.ollama import ModelParts
from backprop.edges.ollama_http import Server, find_server
from backprop.edges.ollama_template import Rendering
from backprop.engine.load import HfTokenizer, load_tokenizer
from backprop.errors import OllamaError, UsageError
from backprop.events import Sink
from backprop.verbs.card import licence_of
from backprop.verbs.source import Adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """Where a file is to be registered, and as what."""

    server: Server
    name: str


def destination(config: ExportConfig, adapter: Adapter) -> Destination | None:
    """Find the server that was asked for, if one was, and see that it can take such a model of that name.

    Raises:
        UsageError: If the name, that of the file, the address, the system prompt or the licence cannot be.
        OllamaError: If the server cannot be reached, or is too old.
    """
    if not (config.ollama or config.ollama_name):
        return None
    name = config.ollama_name or adapter.name
    ollama.check_name(name)
    server = find_server(config.ollama_url)
    told = ModelParts(system=config.system or "", license=licence_of(Path(adapter.base)) or "")
    ollama.modelfile(f"{adapter.name}.gguf", told)
    ollama.check(server)
    if config.system:
        parts_of(load_tokenizer(str(adapter.folder), trust_remote_code=config.trust_remote_code), adapter, config)
    return Destination(server=server, name=name)


def register(where: Destination, gguf: Path, adapter: Adapter, *, config: ExportConfig, say: Sink) -> None:
    """Hand a file over, with the stop text and system prompt that it was trained with, its base's licence, and keep the Modelfile.

    Where the server would render prompts otherwise than in training, it is given a template too.

    Raises:
        OllamaError: If the server refuses, or its answer is not that of llama.cpp; what was made there is removed.
    """
    tokenizer = load_tokenizer(str(adapter.folder), trust_remote_code=config.trust_remote_code)
    added = default_system(tokenizer)
    parts = parts_of(tokenizer, adapter, config)
    modelfile = gguf.with_name("Modelfile")
    rundir.write_text(modelfile, ollama.modelfile(gguf.name, parts))
    (expected,) = llama_cpp.ask(gguf, [_asked(adapter, parts.system)])
    try:
        _, made = ollama.register(
            gguf,
            where.name,
            server=where.server,
            parts=parts,
            question=adapter.question,
            expected=expected,
            wanted=wanted(tokenizer, adapter, gguf.name, parts, default=added),
            say=say,
        )
    except OllamaError as error:
        error.hint = f"{error.hint}; `{gguf}` is kept: `{_again(adapter, config)}` then only registers it"
        raise
    rundir.write_text(modelfile, ollama.modelfile(gguf.name, made))


def parts_of(tokenizer: HfTokenizer, adapter: Adapter, config: ExportConfig) -> ModelParts:
    """Give what a model is registered with besides its weights.

    Raises:
        UsageError: If the chat template takes no system prompt.
    """
    from backprop.engine.reference import REFUSED, render

    system = config.system if config.system is not None else default_system(tokenizer)
    if system and render(tokenizer, _asked(adapter, system), asks=True) == REFUSED:
        raise UsageError("the model's chat template refuses a system prompt", hint="leave out `--system`")
    licence = licence_of(Path(adapter.base)) or ""
    return ModelParts(system=system, stop=stops_of(tokenizer), license=licence)


def _asked(adapter: Adapter, system: str) -> list[Message]:
    lead: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*lead, {"role": "user", "content": adapter.question}]


def stops_of(tokenizer: HfTokenizer) -> tuple[str, ...]:
    """Give the texts that end an answer: the token behind the model's turns in its chat template, and that behind any text."""
    from backprop.engine.reference import render

    whole: Any = tokenizer.inner
    said: Sequence[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    _, found, after = render(tokenizer, said, asks=False).rpartition(MARK)
    ids = whole(after.lstrip(), add_special_tokens=False)["input_ids"][:1] if found else []
    ends = [whole.convert_ids_to_tokens(one) for one in ids if one in whole.added_tokens_decoder]
    return tuple(dict.fromkeys([*ends, str(whole.eos_token)]))


def _again(adapter: Adapter, config: ExportConfig) -> str:
    """Write the command that finds the files made, and registers the first."""
    words = ["backprop", "export", str(adapter.run or adapter.folder)]
    for one in fields(config):
        value, flag = getattr(config, one.name), f"--{one.name.replace('_', '-')}"
        if value == one.default or one.name == "overwrite":
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"{flag}={each}" for each in values]
    return shlex.join(words)


def wanted(tokenizer: HfTokenizer, adapter: Adapter, gguf: str, parts: ModelParts, *, default: str) -> Rendering:
    """Say how prompts are rendered in training, and find the Go template that renders so.

    Args:
        gguf: Name of the file.
        parts: Of the model, with its system prompt.
        default: The system turn that the chat template adds by itself.
    """
    from backprop.engine.reference import REFUSED, render

    def rendered(messages: Sequence[Message], asks: bool) -> str:
        text = render(tokenizer, messages, asks=asks)
        if text == REFUSED:
            raise ValueError("it refuses plain turns")
        return text

    added, template, why_not = _added(tokenizer), "", ""
    known = [one for one in adapter.probes if {turn["role"] for turn in one} <= {"user", "assistant"}]
    try:
        template = turns_of(rendered, known, added=added, system=default).to_go()
        ollama.modelfile(gguf, replace(parts, template=template))
    except (ValueError, UsageError) as error:
        template, why_not = "", f"of the chat template, {error}"
    lead: list[Message] = [{"role": "system", "content": parts.system}] if parts.system else []
    asked: list[Message] = [
        {"role": "user", "content": adapter.question},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    prompts = [(one, render(tokenizer, [*lead, *one], asks=True)) for one in (asked[:1], asked)]
    return Rendering(
        prompts=[(one, text) for one, text in prompts if text != REFUSED],
        template=template,
        why_not=why_not,
        left_out="tools" if "tools" in str(tokenizer.inner.chat_template) else "",
        added=added,
    )


def _added(tokenizer: HfTokenizer) -> str:
    """Give the text of the token that the tokenizer adds to the beginning of any text; empty if it adds none."""
    whole: Any = tokenizer.inner
    begin = whole.bos_token_id
    return str(whole.bos_token) if begin is not None and list(whole("a")["input_ids"])[:1] == [begin] else ""


MARK = "a turn stands here"


def default_system(tokenizer: HfTokenizer) -> str:
    """Give the system turn that a chat template adds by itself, which Ollama's own templates leave out; empty for none."""
    asked: Sequence[Message] = [{"role": "user", "content": "?"}]
    from backprop.engine.reference import render

    given = render(tokenizer, [{"role": "system", "content": MARK}, *asked], asks=True)
    bare = render(tokenizer, asked, asks=True)
    before, _, after = given.partition(MARK)
    if not after or not bare.startswith(before) or not bare.endswith(after) or len(bare) < len(before) + len(after):
        return ""
    return bare[len(before) : len(bare) - len(after)]
