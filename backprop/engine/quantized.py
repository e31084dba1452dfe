"""Quantized files written while the converter computes the weights, in place of a 16-bit file or beside it.

Runs in the converter's process (`streamed.main`). Each file is byte for byte what llama.cpp makes of the 16-bit file:
llama.cpp says which type each tensor gets, from the head of that file alone, and its kernels quantize.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import dropwhile, zip_longest
from math import prod
from pathlib import Path
from typing import Any

from backprop.edges import llama_cpp, llama_quants, threads
from backprop.errors import ExportError

WEIGHTS_AT_ONCE = 2**17
"""In a thread: half a MiB of float32, which stay in a core's own cache, and parts enough for many cores in a narrow tensor."""


def write_beside(gguf: Any, quantized: Mapping[str, Path], *, keep: bool) -> None:
    """Let the converter compute a tensor while it writes and quantizes the one before.

    Args:
        gguf: The converter's package of that name.
        quantized: Files to make, by their types.
        keep: Whether to write the converter's own file too; else only its head is, and its length.
    """

    def write(writer: Any, **_: Any) -> None:
        length = _write_head(writer)
        (file,) = writer.fout
        with ExitStack() as stack:
            targets = [stack.enter_context(_Target(gguf, writer, path, kind)) for kind, path in quantized.items()]
            pool = stack.enter_context(ThreadPoolExecutor(threads.cpus()))  # ends first: it writes into their files

            def write_one(name: str, found: Future[Any]) -> None:
                array = found.result()
                parts = [pool.submit(part) for target in targets for part in target.parts(name, array)]
                if keep:
                    array.tofile(file)
                    writer.write_padding(file, array.nbytes)
                for part in parts:
                    part.result()

            _compute_ahead(writer, write_one)
        if keep and file.tell() != length:
            raise ExportError(f"{file.tell()} bytes were written of {length}", hint="please report it")
        writer.state = gguf.gguf_writer.WriterState.WEIGHTS

    gguf.GGUFWriter.write_tensors_to_file = write


def _write_head(writer: Any) -> int:
    """Write all but the tensors, and let the file have its length already, which llama.cpp asks for; give that."""
    writer.write_ti_data_to_file()
    (file,), (tensors,) = writer.fout, writer.tensors
    writer.write_padding(file, file.tell())
    file.flush()
    length = file.tell() + sum(writer.ggml_pad(info.nbytes, writer.data_alignment) for info in tensors.values())
    os.truncate(writer.path, length)
    return int(length)


def _compute_ahead(writer: Any, write: Callable[[str, Future[Any]], None]) -> None:
    """Have each tensor computed while the one before is written; no more than two are in memory."""
    (tensors,) = writer.tensors
    with ThreadPoolExecutor(1) as ahead:

        def begin(info: Any) -> Future[Any]:
            tensor, info.tensor = info.tensor, None
            return (
                ahead.submit(tensor.to_eager, tensor) if hasattr(tensor, "to_eager") else ahead.submit(lambda: tensor)
            )

        following = None
        for (name, info), after in zip_longest(tensors.items(), list(tensors.items())[1:]):
            found = following or begin(info)
            following = begin(after[1]) if after else None
            write(name, found)


class _Target:
    """A quantized file, whose tensors may come in any order.

    Args:
        source: The writer of the 16-bit file, which has its head and its length.

    Raises:
        ExportError: If llama.cpp refuses the type.
    """

    def __init__(self, gguf: Any, source: Any, path: Path, quantization: str) -> None:
        (self._tensors,) = source.tensors
        types = llama_quants.plan(Path(source.path), quantization=quantization)
        if set(types) != set(self._tensors) or source.data_alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
            raise ExportError("llama.cpp's quantizer lists other tensors than the file has", hint="please report it")
        self._quantization = quantization
        self._kinds = {name: gguf.GGMLQuantizationType[kind] for name, kind in types.items()}
        self._offsets: dict[str, int] = {}
        head = gguf.GGUFWriter(path, source.arch)
        head.kv_data = [_facts(gguf, source, quantization)]
        self._begin = self._write_head(head)
        self._file = os.open(path, os.O_WRONLY)

    def _write_head(self, head: Any) -> int:
        """Write all but the tensors, and let the file have its length; give where they begin."""
        length = 0
        for name, kind in self._kinds.items():
            *outer, width = self._tensors[name].shape
            size = prod(outer) * llama_quants.row_bytes(kind, width)
            shape = (*dropwhile(lambda number: number == 1, outer), width)
            head.add_tensor_info(name, shape, None, size, raw_dtype=kind)
            self._offsets[name] = length
            length += head.ggml_pad(size, head.data_alignment)
        head.write_header_to_file()
        head.write_kv_data_to_file()
        head.write_ti_data_to_file()
        (file,) = head.fout
        head.write_padding(file, file.tell())
        begin = int(file.tell())
        head.close()
        os.truncate(head.path, begin + length)
        return begin

    def parts(self, name: str, array: Any) -> Iterator[Callable[[], None]]:
        """Give what quantizes and writes the parts of a tensor, in any order or at once."""
        import numpy

        info, kind = self._tensors[name], self._kinds[name]
        width, stored = info.shape[-1], llama_quants.row_bytes(info.dtype, info.shape[-1])
        rows = numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8).reshape(-1, stored)
        begin, made = self._begin + self._offsets[name], llama_quants.row_bytes(kind, width)
        step = max(1, WEIGHTS_AT_ONCE // width)
        for first in range(0, len(rows), step):
            offset = begin + first * made
            yield partial(self._write, name, rows[first : first + step], kind, width, info.dtype, offset)

    def _write(self, name: str, rows: Any, kind: int, width: int, stored: int, offset: int) -> None:
        found = llama_quants.quantize_rows(rows, kind, width=width, stored=stored)
        if found is None:
            raise ExportError(f"{name} has a weight that is no number as {self._quantization}", hint="train again")
        left = memoryview(found).cast("B")
        while left:
            written = os.pwrite(self._file, left, offset)
            left, offset = left[written:], offset + written

    def __enter__(self) -> "_Target":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _facts(gguf: Any, source: Any, quantization: str) -> dict[str, Any]:
    """Give the metadata as llama.cpp has them: those of the 16-bit file, and at their end what it sets."""
    (facts,) = source.kv_data
    kind, number = gguf.GGUFValueType.UINT32, gguf.gguf_writer.GGUFValue
    changed = {
        gguf.Keys.General.QUANTIZATION_VERSION: number(gguf.GGML_QUANT_VERSION, kind),
        gguf.Keys.General.FILE_TYPE: number(llama_cpp.ftype_of(quantization), kind),
    }
    return {key: value for key, value in facts.items() if key not in changed} | changed
