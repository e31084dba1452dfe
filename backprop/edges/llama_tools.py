"""llama.cpp's own programs, for what its bindings lack: importance matrices, quantizing by them, splitting.

`python -m backprop.edges.llama_cpp_build` puts them beside the converter, with the libraries that they were built for.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from backprop.edges import process, threads
from backprop.edges.llama_cpp import BUILD_HINT, write_tiny
from backprop.edges.places import llama_programs
from backprop.errors import DataError, DiskError, ExportError, ToolError

CHUNK_TOKENS, LEAST_CHUNK_TOKENS = 512, 32
"""Tokens that are looked at together; llama-imatrix asks for two such chunks at least."""


MORE_METADATA_BYTES = 2**16
"""More than quantizing adds, and than the two figures of `size_as` are rounded by."""


def tool(name: str) -> Path:
    """Find one of `LLAMA_PROGRAMS`.

    Raises:
        ToolError: If it is missing.
    """
    program = llama_programs() / f"llama-{name}"
    if not program.is_file():
        raise ToolError(f"`{program.name}` is not in `{llama_programs()}`", hint=BUILD_HINT)
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
    options = ["--parse-special", "--no-ppl", "-dev", "none", "-c", str(chunk), "-b", str(chunk)]
    argv = [str(tool("imatrix")), "-m", str(source.resolve()), "-f", rows.name, "-o", target.name, *options]
    _run([*argv, "-t", str(threads.cpus())], target.parent, "compute an importance matrix")


def is_importance_matrix(path: Path) -> bool:
    """Say whether llama-quantize takes a file as one of llama-imatrix: it is given a model of four matrices to try."""
    with TemporaryDirectory() as room:
        source = write_tiny(Path(room))
        size_as("q4_k_m", source)  # it works without the file
        try:
            size_as("q4_k_m", source, imatrix=path)
        except ExportError:
            return False
    return True


def quantize(source: Path, target: Path, *, quantization: str, imatrix: Path) -> None:
    """Quantize a GGUF file of 16 or 32 bits by an importance matrix.

    Raises:
        ExportError: If llama.cpp refuses, with its own last words.
        DiskError: If the disk is full.
    """
    options = ["--imatrix", imatrix.name, str(source.resolve()), str(target.resolve()), quantization]
    _run([str(tool("quantize")), *options, str(threads.cpus())], imatrix.parent, f"quantize to {quantization}", target)


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


# https://github.com/ggml-org/llama.cpp/blob/master/tools/gguf-split/gguf-split.cpp: powers of ten.
SPLIT_UNITS = {"M": 10**6, "G": 10**9}
LEAST_BITS = {
    "f32": 32.0,
    **dict.fromkeys(("f16", "bf16"), 16.0),
    "q8_0": 8.5,
    "q6_k": 6.5625,
    "q5_1": 6.0,
    **dict.fromkeys(("q5_k_m", "q5_k_s", "q5_0"), 5.5),
    "q4_1": 5.0,
    **dict.fromkeys(("q4_k_m", "q4_k_s", "q4_0", "iq4_nl"), 4.5),
    "iq4_xs": 4.25,
    **dict.fromkeys(("q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s"), 3.4375),
    **dict.fromkeys(("iq3_xs", "iq3_xxs"), 3.0625),
    **dict.fromkeys(("q2_k", "q2_k_s"), 2.625),
}
"""Of a weight in a matrix of words, by the type of the file (blocks of ggml-common.h); some get more."""
FEWEST_BITS = 2.0
"""The same in files of all other types, which never have words in less than iq2_xxs."""


def bytes_of_split(size: str) -> int:
    """Give the bytes of a size like 2G or 500M, as llama-gguf-split reads it."""
    return int(size[:-1]) * SPLIT_UNITS[size[-1]]


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
