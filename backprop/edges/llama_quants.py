"""llama.cpp's quantizing, a tensor at a time: which type each gets, and the kernels, of the library that the bindings load."""

import ctypes
import importlib.util
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from backprop.edges.llama_cpp import bindings, ftype_of
from backprop.edges.places import llama_library
from backprop.errors import ExportError

# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp: what is printed of each tensor of a dry run.
PRINTED = re.compile(
    r"^\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = +(\w+), size = [^(\n]*?(?:\((\w+)\))?$", re.MULTILINE
)
NEEDS_MATRIX = "will require an imatrix"
# ggml.h, enum ggml_type
FLOAT32 = 0
TO_FLOAT32 = {1: "ggml_fp16_to_fp32_row", 30: "ggml_bf16_to_fp32_row"}


def kernels_path() -> Path | None:
    """Find the library of the kernels; None if there is none by itself."""
    own = llama_library("ggml-base")
    package = importlib.util.find_spec("llama_cpp")
    if not llama_library("llama").is_file() and package and package.origin:  # as `bindings` chooses
        own = Path(package.origin).parent / "lib" / own.name
    return own if own.is_file() else None


@cache
def _kernels() -> Any:
    library = ctypes.CDLL(str(kernels_path()))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes, library.ggml_row_size.restype = [ctypes.c_int, number], ctypes.c_size_t
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    for name in TO_FLOAT32.values():
        convert = getattr(library, name)
        convert.argtypes, convert.restype = [pointer, pointer, number], None
    return library


def plan(source: Path, *, quantization: str) -> dict[str, str]:
    """Tell the type that each tensor of a file gets, like `Q4_K`, in the order in which llama.cpp writes them.

    Args:
        source: A GGUF of 16 or 32 bits; its tensors are not read, and may be missing, if the length is right.

    Raises:
        ExportError: If llama.cpp refuses.
    """
    llama_cpp = bindings()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.dry_run = ftype_of(quantization), True
    said: list[bytes] = []

    def hear(_level: int, text: bytes, _data: object) -> None:
        said.append(text)

    heard = llama_cpp.llama_log_callback(hear)
    llama_cpp.llama_log_set(heard, None)
    try:
        code = llama_cpp.llama_model_quantize(os.fsencode(source), b"", parameters)
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)
    text = b"".join(said).decode(errors="replace")
    if code != 0 or NEEDS_MATRIX in text:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), f"code {code}")
        raise ExportError(f"llama.cpp does not quantize to {quantization}: {last}", hint="run `backprop doctor`")
    return {name: (new or old).upper() for name, old, new in PRINTED.findall(text)}


def row_bytes(kind: int, width: int) -> int:
    """Give the bytes of a row of ``width`` weights in a type, which is a number of ggml's."""
    return int(_kernels().ggml_row_size(kind, width))


def quantize_rows(rows: Any, kind: int, *, width: int, stored: int) -> Any:
    """Quantize whole rows of weights; the same whatever rows are given together. It may run in many threads.

    Args:
        rows: A contiguous array of bytes.
        kind: The type to become, a number of ggml's.
        width: Weights in a row.
        stored: The type of what is given: float32, float16 or bfloat16, to become another, or any other to stay.

    Returns:
        An array of bytes; None if a weight is no number, before or after.
    """
    import numpy

    library = _kernels()
    if not library.ggml_validate_row_data(stored, rows.ctypes.data, rows.nbytes):
        return None
    if kind == stored:
        return rows
    number = rows.nbytes // row_bytes(stored, width)
    wide = rows
    if stored != FLOAT32:
        wide = numpy.empty(number * width, numpy.float32)
        getattr(library, TO_FLOAT32[stored])(rows.ctypes.data, wide.ctypes.data, number * width)
    made = numpy.empty(number * row_bytes(kind, width), numpy.uint8)
    library.ggml_quantize_chunk(kind, wide.ctypes.data, made.ctypes.data, 0, number, width, None)
    return made if library.ggml_validate_row_data(kind, made.ctypes.data, made.nbytes) else None
