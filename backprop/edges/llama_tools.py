"""llama.cpp's own programs, for what its bindings lack: importance matrices, quantizing by them, splitting.

`python -m backprop.edges.llama_cpp_build` puts them beside the converter, with the libraries that they were built for.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from backprop.edges import process
from backprop.edges.llama_cpp import BUILD_HINT, home
from backprop.errors import DataError, DiskError, ExportError, ToolError

TOOLS = ("imatrix", "quantize", "gguf-split")
CHUNK_TOKENS, LEAST_CHUNK_TOKENS = 512, 32
"""Tokens that are looked at together; llama-imatrix asks for two such chunks at least."""


MORE_METADATA_BYTES = 2**16
"""More than quantizing adds, and than the two figures of `size_as` are rounded by."""


def folder() -> Path:
    """Give the folder of the programs."""
    return home() / "tools"


def tool(name: str) -> Path:
    """Find one of `TOOLS`.

    Raises:
        ToolError: If it is missing.
    """
    program = folder() / f"llama-{name}"
    if not program.is_file():
        raise ToolError(f"`{program.name}` is not in `{folder()}`", hint=BUILD_HINT)
    return program.resolve()


def weigh(source: Path, texts: Sequence[str], target: Path, *, num_tokens: int) -> None:
    """Write the importance matrix of a GGUF of 16 bits: how strongly each weight is used on these texts.

    Args:
        texts: Rendered conversations; what looks like a control token is one.
        num_tokens: Of all texts.

    Raises:
        DataError: If there are too few tokens.
        ExportError: If the program fails.
    """
    chunk = CHUNK_TOKENS
    while 2 * chunk > num_tokens and chunk > LEAST_CHUNK_TOKENS:
        chunk //= 2
    if 2 * chunk > num_tokens:
        raise DataError(
            f"the rows have {num_tokens} tokens, and an importance matrix needs {2 * chunk}",
            hint="give a file with `--imatrix FILE`, or leave it out",
        )
    # The program writes the names of its files into the matrix, and they go from there into every model: plain ones.
    rows = target.with_name("rows.txt")
    rows.write_text("\n".join(texts), encoding="utf-8")
    options = ["--parse-special", "--no-ppl", "-ngl", "0", "-c", str(chunk), "-b", str(chunk)]
    argv = [str(tool("imatrix")), "-m", str(source.resolve()), "-f", rows.name, "-o", target.name, *options]
    _run([*argv, "-t", str(process.cpus())], target.parent, "compute an importance matrix")


def is_importance_matrix(path: Path) -> bool:
    """Say whether a file begins as one of llama-imatrix does: as GGUF, or with counts and a tensor's name, as it was before."""
    with path.open("rb") as file:
        head = file.read(64)
    count, length = (int.from_bytes(head[start : start + 4], "little") for start in (0, 4))
    return head.startswith(b"GGUF") or (0 < count < 2**20 and 0 < length <= 56 and head[8 : 8 + length].isascii())


def quantize(source: Path, target: Path, *, quantization: str, imatrix: Path) -> None:
    """Quantize a GGUF file of 16 or 32 bits by an importance matrix.

    Raises:
        ExportError: If llama.cpp refuses, with its own last words.
        DiskError: If the disk is full.
    """
    options = ["--imatrix", imatrix.name, str(source.resolve()), str(target.resolve()), quantization]
    _run([str(tool("quantize")), *options, str(process.cpus())], imatrix.parent, f"quantize to {quantization}", target)


def size_as(quantization: str, source: Path, *, imatrix: Path | None = None) -> int:
    """Give the bytes that a GGUF of 16 or 32 bits would have as another type, without making it.

    Args:
        imatrix: By which it would be made: some tensors then get other types.

    Raises:
        ExportError: If llama.cpp refuses, with its own last words.
    """
    by = ["--imatrix", str(imatrix.resolve())] if imatrix else []
    argv = [str(tool("quantize")), "--dry-run", *by, str(source.resolve()), quantization]
    said = _run(argv, source.parent, "tell a file's size", errors_too=True)
    found = {kind: float(mib) for kind, mib in re.findall(r"(model|quant) size += +([0-9.]+) MiB", said)}
    if len(found) != 2:
        raise ExportError("llama.cpp did not tell a file's size", hint="run `backprop doctor`")
    return source.stat().st_size + int(2**20 * (found["quant"] - found["model"])) + MORE_METADATA_BYTES


def split(gguf: Path, target: Path, *, name: str, size: str) -> Path:
    """Split a GGUF into the folder ``target``, as `NAME-00001-of-00003.gguf` and so on, and give the first.

    Args:
        size: The most bytes of the tensors in one, as `2G` or `500M`; the first also holds the metadata.

    Raises:
        ExportError: If llama.cpp refuses, with its own last words.
        DiskError: If the disk is full.
    """
    target.mkdir()
    options = ["--split", "--split-max-size", size, str(gguf.resolve()), str((target / name).resolve())]
    hint = "choose a larger `--split-size`: one tensor is never split"
    _run([str(tool("gguf-split")), *options], target, f"split the file at {size}", target, hint)
    return min(target.iterdir())


def _run(
    argv: list[str],
    cwd: Path,
    what: str,
    target: Path | None = None,
    hint: str = "run `backprop doctor`",
    *,
    errors_too: bool = False,
) -> str:
    try:
        return process.run(argv, cwd=cwd, errors_too=errors_too)
    except ToolError as error:
        if target is not None and shutil.disk_usage(cwd).free < 2**20:
            raise DiskError(
                f"`{target}` cannot be written: the disk is full", hint="make room, or `--output`"
            ) from error
        raise ExportError(f"llama.cpp did not {what}: {error.message}", hint=hint) from error
