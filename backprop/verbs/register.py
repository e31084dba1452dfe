"""An exported file in Ollama: refused before any work where it cannot be, asked there, and compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backprop.config import ExportConfig
from backprop.core.data.formats import Message
from backprop.edges import llama_cpp, ollama, rundir
from backprop.edges.ollama import ModelParts
from backprop.edges.ollama_http import Server, find_server
from backprop.engine.load import HfTokenizer, load_tokenizer
from backprop.errors import OllamaError
from backprop.events import Sink
from backprop.verbs.card import licence_of
from backprop.verbs.source import Adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """Where a file is to be registered, and as what."""

    server: Server
    name: str


def destination(config: ExportConfig, *, default_name: str) -> Destination | None:
    """Find the server that was asked for, if one was, and see that it can take a model of that name.

    Raises:
        UsageError: If the name or address cannot be.
        OllamaError: If the server cannot be reached, or is too old.
    """
    if not (config.ollama or config.ollama_name):
        return None
    name = config.ollama_name or default_name
    ollama.check_name(name)
    server = find_server(config.ollama_url)
    ollama.check(server)
    return Destination(server=server, name=name)


def register(where: Destination, gguf: Path, adapter: Adapter, *, config: ExportConfig, say: Sink) -> None:
    """Hand a file over, with the stop text and system prompt that it was trained with, its base's licence, and keep the Modelfile.

    Raises:
        OllamaError: If the server refuses, or its answer is not that of llama.cpp; what was made there is removed.
    """
    tokenizer = load_tokenizer(str(adapter.folder), trust_remote_code=config.trust_remote_code)
    system = config.system if config.system is not None else default_system(tokenizer)
    licence = licence_of(Path(adapter.base)) or ""
    parts = ModelParts(system=system, stop=(str(tokenizer.inner.eos_token),), license=licence)
    rundir.write_text(gguf.with_name("Modelfile"), ollama.modelfile(gguf.name, parts))
    turns: list[Message] = [{"role": "user", "content": adapter.question}]
    if system:
        turns.insert(0, {"role": "system", "content": system})
    (expected,) = llama_cpp.ask(gguf, [turns])
    try:
        ollama.register(
            gguf,
            where.name,
            server=where.server,
            parts=parts,
            question=adapter.question,
            expected=expected.text,
            say=say,
        )
    except OllamaError as error:
        error.hint = f"{error.hint}; `{gguf}` is kept: the same command then only registers it"
        raise


MARK = "a system turn stands here"


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
