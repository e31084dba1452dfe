"""The importance matrix of an export: by the rows that a run kept, or the one that was given."""

from pathlib import Path

from backprop.config import WITHOUT_IMATRIX, ExportConfig
from backprop.edges import llama_tools, rundir
from backprop.engine.load import HfTokenizer
from backprop.errors import UsageError
from backprop.events import Phase, Sink
from backprop.verbs.source import Adapter

AUTO = "auto"


def refuse_early(adapter: Adapter, config: ExportConfig) -> None:
    """See that `--imatrix` can be had, before any work.

    Raises:
        UsageError: If there are no rows to compute it with, or the file is none.
        ToolError: If llama.cpp's programs are missing.
    """
    if config.imatrix is None:
        return
    llama_tools.tool("quantize")
    if config.imatrix != AUTO and not llama_tools.is_importance_matrix(Path(config.imatrix)):
        raise UsageError(
            f"`{config.imatrix}` is no importance matrix", hint="give a file of llama-imatrix, or `--imatrix auto`"
        )
    if config.imatrix == AUTO:
        llama_tools.tool("imatrix")
        if not any(messages[-1]["role"] == "assistant" for messages in adapter.probes):
            what = f"the run in `{adapter.run}` kept no chats" if adapter.run else f"`{adapter.folder}` is not of a run"
            raise UsageError(f"{what}, which `--imatrix auto` would need", hint="give a file with `--imatrix FILE`")


def matters(kind: str, config: ExportConfig) -> bool:
    """Say whether a file of this type depends on the importance matrix."""
    return config.imatrix is not None and kind not in WITHOUT_IMATRIX


def identity(config: ExportConfig) -> str | None:
    """Name the matrix in the records: `auto`, or the hash of the file."""
    return config.imatrix if config.imatrix in (None, AUTO) else rundir.sha256_of(Path(config.imatrix))


def find(adapter: Adapter, config: ExportConfig, tokenizer: HfTokenizer, source: Path, say: Sink) -> Path:
    """Give the file that was asked for, or compute one beside ``source``, the 16-bit GGUF.

    Raises:
        DataError: If the rows are too few.
        ExportError: If llama.cpp's program fails.
    """
    from backprop.engine.reference import REFUSED, render

    if config.imatrix not in (None, AUTO):
        return Path(config.imatrix)
    say(Phase(name="computing the importance matrix"))
    texts = [render(tokenizer, messages, asks=False) for messages in adapter.probes]
    texts = [text for text in texts if text != REFUSED]
    matrix = source.with_name("imatrix.gguf")
    llama_tools.weigh(source, texts, matrix, num_tokens=sum(len(tokenizer.tokenize(text)) for text in texts))
    return matrix
