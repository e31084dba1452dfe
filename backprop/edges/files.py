"""Local data files: the only place that opens what users train on.

Nothing heavy is imported, so that a typo is answered at once.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from backprop.core.data.formats import Row
from backprop.errors import DataError, PackageError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# A row of text is rarely over 1 MB; a line over this is a file of another kind, and would fill the memory.
MAX_LINE_BYTES = 32 * 1024 * 1024


def data_files(source: str) -> list[Path]:
    """List the files that ``source``, a file or folder, stands for.

    Raises:
        DataError: If there is no such file or folder, it is empty, or not of a known kind.
    """
    path = expanded(source)
    if path.is_dir():
        files = sorted(child for child in path.rglob("*") if child.is_file() and _kind(child))
        if not files:
            raise DataError(f"the folder `{source}` holds no data files", hint=f"known kinds: {', '.join(SUFFIXES)}")
        return files
    if not path.exists():
        raise DataError(f"no such file: `{source}`", hint=_nearby(path))
    if not path.is_file():
        raise DataError(f"`{source}` is not a file", hint="give a file, a folder, or `owner/name` of a hub data set")
    if not _kind(path):
        raise DataError(
            f"`{source}` is of an unknown kind", hint=f"known kinds: {', '.join(SUFFIXES)}, each also as .gz"
        )
    if path.stat().st_size == 0:
        raise DataError(f"`{source}` is empty", hint="it needs at least one row")
    return [path]


def expanded(source: str) -> Path:
    """Give ``source`` as a path, with `~` resolved.

    Raises:
        DataError: If it cannot be a path: empty, too long, or of a user that does not exist.
    """
    if not source.strip():
        raise DataError("`--data` is empty", hint="give a file, a folder, or `owner/name` of a hub data set")
    try:
        path = Path(source).expanduser()
        path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"`{source[:80]}` cannot be a path: {error}", hint="check the path of `--data`") from error
    return path


def is_local(source: str) -> bool:
    """Say whether ``source`` means a path here rather than a data set on the hub."""
    path = expanded(source)
    if path.exists() or _kind(path) or source.startswith((".", "/", "~")):
        return True
    return source.count("/") != 1 or any(not part for part in source.split("/"))


def read_rows(source: str) -> Iterator[Row]:
    """Read the rows of a file or folder, in order.

    Raises:
        DataError: At what cannot be read, naming the file and line.
    """
    for path in data_files(source):
        try:
            yield from _read_file(path)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not text: byte {error.start} is not UTF-8", hint="save it as UTF-8, or give another file"
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file", hint="copy it again") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}", hint=f"try `ls -l {path}`") from error


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def _nearby(path: Path) -> str:
    import difflib

    siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"did you mean `{path.parent / close[0]}`?" if close else f"look at `ls {path.parent}`"


def _read_file(path: Path) -> Iterator[Row]:
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    with _open(path) as file:
        if kind == ".csv":
            yield from _csv_rows(path, _text_lines(path, file))
        elif kind == ".txt":
            yield from _text_rows(path, file)
        elif kind == ".json" and _first_char(path) == "[":
            yield from _list_rows(path, file)
        else:
            yield from _jsonl_rows(path, file)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _first_char(path: Path) -> str:
    with _open(path) as file:
        return file.read(4096).decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")[:1]


def _text_lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{path}, line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB",
                hint="put one row on each line; a list of rows belongs in a .json file",
            )
        if b"\0" in line:
            raise DataError(f"{path}, line {number} is binary, not text", hint="give a text file, or .parquet")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number} is not UTF-8 text (byte {error.start} of the line)",
                hint="save the file as UTF-8",
            ) from error


def _jsonl_rows(path: Path, file: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(_text_lines(path, file), start=1):
        if line.strip():
            yield Row(place=f"{path}, line {number}", value=_parse(line, f"{path}, line {number}"))


def _parse(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 30) : error.pos + 30].strip()
        raise DataError(
            f"{place} is not JSON: {error.msg} at column {error.colno}, near: {near}",
            hint="each line of a .jsonl file is one JSON object",
        ) from error
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply", hint="a row is one flat JSON object") from error
    except ValueError as error:  # a number of over 4,300 digits
        raise DataError(f"{place} cannot be read: {error}", hint="quote numbers that are text") from error


def _list_rows(path: Path, file: IO[bytes]) -> Iterator[Row]:
    text = file.read().decode("utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno} is not JSON: {error.msg} at column {error.colno}",
            hint="a .json file is one list of objects",
        ) from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply", hint="a .json file is one list of flat objects") from error
    except ValueError as error:  # a number of over 4,300 digits
        raise DataError(f"{path} cannot be read: {error}", hint="quote numbers that are text") from error
    for number, value in enumerate(rows, start=1):
        yield Row(place=f"{path}, row {number}", value=value)


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader(lines, strict=True)
    try:
        for number, value in enumerate(reader, start=1):
            if None in value or None in value.values():
                raise DataError(
                    f"{path}, row {number} has not as many cells as the head has columns",
                    hint='put text with commas or line breaks in double quotes: "a, b"',
                )
            yield Row(place=f"{path}, row {number}", value=value)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}", hint="save it again as CSV") from error


def _text_rows(path: Path, file: IO[bytes]) -> Iterator[Row]:
    """Give each paragraph, set off by an empty line, as a text of its own."""
    paragraph: list[str] = []
    start = 1
    for number, line in enumerate(_text_lines(path, file), start=1):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Row(place=f"{path}, line {start}", value={"text": "".join(paragraph).rstrip()})
            paragraph = []
    if paragraph:
        yield Row(place=f"{path}, line {start}", value={"text": "".join(paragraph).rstrip()})


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise PackageError("reading .parquet needs `pyarrow`", hint="pip install pyarrow") from error
    opened: Any = parquet
    try:
        number = 0
        for batch in opened.ParquetFile(path).iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                number += 1
                yield Row(place=f"{path}, row {number}", value=value)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a whole parquet file: {error}", hint="copy it again") from error
