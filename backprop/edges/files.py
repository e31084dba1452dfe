"""Local data files: the only place that opens what users train on.

Nothing heavy is imported, so that a typo is answered at once.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import shlex
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from backprop.core.data.formats import Row, has_known_shape
from backprop.core.data.shapes import is_turn
from backprop.edges.json_text import JsonText, TooLongError
from backprop.errors import DataError, PackageError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# A row of text is rarely over 1 MB; a line over this is a file of another kind, and would fill the memory.
MAX_LINE_BYTES = 32 * 1024 * 1024
# What libraries write beside the data, in the same kinds of files.
NOT_DATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "metadata.json",
)
# UTF-32 first: its mark begins with that of UTF-16.
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def data_files(source: str) -> list[Path]:
    """List the files that ``source``, a file or folder, stands for.

    Raises:
        DataError: If there is no such file or folder, it is empty, or not of a known kind.
    """
    path = expanded(source)
    if path.is_dir():
        files = sorted(child for child in path.rglob("*") if child.is_file() and _is_data(child.relative_to(path)))
        _refuse_links_out_of(path, files)
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


def _refuse_links_out_of(folder: Path, files: Sequence[Path]) -> None:
    """Let no folder of others bring files of this machine into the training.

    Raises:
        DataError: If one of its files is a link that leads out of it.
    """
    # The hub's own cache keeps the files of all revisions of a data set in one folder beside these.
    own = folder.resolve()
    home = next((one.parent for one in own.parents if one.name == "snapshots" and (one.parent / "blobs").is_dir()), own)
    out = next((file for file in files if not file.resolve().is_relative_to(home)), None)
    if out is not None:
        raise DataError(
            f"`{out}` is a link that leads out of `{folder}`, to `{out.resolve()}`",
            hint="if you mean that file, give it itself",
        )


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
    found = False
    for path in data_files(source):
        try:
            for row in _read_file(path):
                found = True
                yield row
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not text: byte {error.start} is not UTF-8", hint="save it as UTF-8, or give another file"
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file", hint="copy it again") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}", hint=f"try `ls -l {path}`") from error
    if not found:
        raise DataError(f"the data holds no rows: `{source}`", hint="check the path, and that there is text in it")


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return bool(_kind(path)) and not hidden and path.name.lower().removesuffix(".gz") not in NOT_DATA


def _nearby(path: Path) -> str:
    import difflib

    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]", str(path)):
        return "Windows paths mean nothing here; in Docker, put the file into `data`, and name it `/data/…`"
    siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"did you mean `{path.parent / close[0]}`?" if close else f"look at `ls {path.parent}`"


def _read_file(path: Path) -> Iterator[Row]:
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    with _open(path) as file:
        head = file.read(HEAD_BYTES)
    _refuse_other_encodings(path, head)
    with _open(path) as file:
        if kind == ".csv":
            yield from _csv_rows(path, _text_lines(path, file))
        elif kind == ".txt":
            yield from _text_rows(path, file)
        elif _is_document(path, kind, head):
            yield from _document_rows(path, file)
        else:
            yield from _jsonl_rows(path, file)


HEAD_BYTES = 4096


def _refuse_other_encodings(path: Path, head: bytes) -> None:
    name = next((name for mark, name in OTHER_ENCODINGS.items() if head.startswith(mark)), None)
    if name:
        unpack = "zcat" if path.suffix.lower() == ".gz" else "cat"
        made = shlex.quote(f"utf8-{path.name.removesuffix('.gz')}")
        raise DataError(
            f"{path} is {name} text, not UTF-8",
            hint=f"`{unpack} {shlex.quote(str(path))} | iconv -f {name} -t UTF-8 > {made}`, and give that file",
        )


def _is_document(path: Path, kind: str, head: bytes) -> bool:
    """Say whether a .json or .jsonl file holds values over several lines, or a list of rows, not a row in each line."""
    first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first not in (b"[", b"{"):
        return False
    with _open(path) as file:
        line = b""
        while not line:
            line = file.readline(MAX_LINE_BYTES).removeprefix(codecs.BOM_UTF8).strip()
        more = any(block.strip() for block in iter(lambda: file.read(HEAD_BYTES), b""))
    if not more:
        return kind == ".json" or first == b"["
    # A row in each line may be a list of turns, and then begins as a list of rows does.
    if line.endswith((b"]", b"}")) and _is_json(line):
        return False
    return kind == ".json" or first == b"[" or line == b"{"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# Text becomes a twentieth at best; what becomes a thousandth, as deflate can make it, was made to fill a memory.
EXPANDS_MOST, EXPANDED_ALWAYS_BYTES = 200, 32 * 2**20


class _Expanded(io.RawIOBase):
    """A gzip file that is not believed to expand without end.

    Raises:
        DataError: When it has grown to more than 200 times its size, and beyond 32 MiB.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, gzip.open(path, "rb")  # noqa: SIM115 - closed with this one
        self._left = max(EXPANDED_ALWAYS_BYTES, EXPANDS_MOST * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise DataError(
                f"{self._path} expands to more than {EXPANDS_MOST} times its size", hint="unpack it, and look at it"
            )
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path) -> IO[bytes]:
    return io.BufferedReader(_Expanded(path)) if path.suffix.lower() == ".gz" else path.open("rb")


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


def _document_rows(path: Path, file: IO[bytes]) -> Iterator[Row]:
    """Read the rows of a list, of a list inside an object, or of objects one after another; no list is in memory as a whole."""
    text = JsonText(path, file)
    values = _items(text) if text.at(text.after_space(0)) == "[" else _values(text)
    for number, value in enumerate(values, start=1):
        yield Row(place=f"{path}, row {number}", value=value)


def _items(text: JsonText) -> Iterator[object]:
    """Give the items of the list that ``text`` is; or the list itself, if it is one conversation."""
    start = text.after_space(0)
    first = text.after_space(start + 1)
    if text.at(first) != "]" and is_turn(text.decode(first)[0]):
        whole, at = text.decode(start)
        yield whole
    else:
        at = yield from _of_list(text, start)
    _hold_end(text, at)


def _of_list(text: JsonText, at: int, *, objects: bool = False) -> Generator[object, None, int]:
    """Give the items of the list at a position, which may have to be objects all of them; give back where it ends."""
    at = text.after_space(at + 1)
    closed = text.at(at) == "]"
    while not closed:
        item, at = text.decode(at)
        if objects and not isinstance(item, Mapping):
            raise _unclear(text, "a list of objects and others")
        yield item
        at = text.after_space(text.forget(at))
        closed = text.at(at) == "]"
        at = at if closed else text.after_space(text.expect(",", at) + 1)
    return at + 1


def _hold_end(text: JsonText, at: int) -> None:
    at = text.after_space(at)
    if text.at(at):
        raise text.fault("Extra data", at)


def _values(text: JsonText) -> Iterator[object]:
    """Give the objects of ``text``; or the rows of a single one that wraps them, as {"data": […]} does."""
    try:
        value, at = text.decode(text.after_space(0), MAX_LINE_BYTES)
    except TooLongError:
        yield from _of_wrapper(text)
        return
    at = text.after_space(at)
    if not text.at(at) and isinstance(value, Mapping):
        yield from _wrapped(value) or [value]
        return
    yield value
    while text.at(at):
        value, at = text.decode(at)
        at = text.after_space(text.forget(at))
        yield value


def _of_wrapper(text: JsonText) -> Iterator[object]:
    """Give the rows that an object wraps which is too long to be a row itself: the items of its only list of objects."""
    at, members, rows, more = text.expect("{", 0), dict[str, object](), "", True
    while more:
        key, at = text.decode(text.expect('"', at + 1))
        at = text.after_space(text.expect(":", at) + 1)
        first = text.after_space(at + 1)
        if text.at(at) == "[" and text.at(first) == "{":
            if rows:
                raise _unclear(text, "two lists of objects in it")
            item, _ = text.decode(first)
            rows, members[str(key)] = str(key), [item]
            if is_turn(item):
                raise _unclear(text, "turns in it")
            at = yield from _of_list(text, at, objects=True)
        else:
            members[str(key)], at = text.decode(at)
        at = text.after_space(text.forget(at))
        more = text.at(at) == ","
    _hold_end(text, text.expect("}", at) + 1)
    if not rows:
        raise _unclear(text, "no list of objects in it")
    if has_known_shape(members):
        raise _unclear(text, "the columns of a row")


def _unclear(text: JsonText, what: str) -> DataError:
    return DataError(
        f"{text.path} is one object of more than {MAX_LINE_BYTES // 2**20} MiB with {what}: where its rows are is not clear",
        hint="give the rows as a list, or one on each line of a .jsonl file",
    )


def _wrapped(value: Mapping[str, object]) -> list[object]:
    """Give the rows that an object wraps, or none: they are its only list of objects, and it is no row itself."""
    lists = [
        items
        for items in value.values()
        if isinstance(items, list) and items and all(isinstance(item, Mapping) for item in items)
    ]
    return lists[0] if len(lists) == 1 and not has_known_shape(value) and not is_turn(lists[0][0]) else []


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    head = next(lines, "")
    # Spreadsheets write semicolons where the comma is the decimal sign.
    delimiter = ";" if ";" in head and "," not in head else ","
    reader = csv.DictReader(chain([head], lines), strict=True, delimiter=delimiter)
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
