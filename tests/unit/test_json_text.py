"""JSON files are read a piece at a time, to the same values and the same faults as at once."""

import codecs
import io
import json
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprop.edges import files, json_text
from backprop.edges.files import read_rows
from backprop.edges.json_text import JsonText
from backprop.errors import DataError

PATH = Path("rows.json")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
chunks = st.integers(min_value=1, max_value=40)


def items(text: str, chunk: int) -> list[object]:
    """Read the values of a text one after another, forgetting each."""
    found: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "CHUNK_BYTES", chunk)
        held = JsonText(PATH, io.BytesIO(text.encode()))
        at = held.after_space(0)
        while held.at(at):
            value, at = held.decode(at)
            found.append(value)
            at = held.after_space(held.forget(at))
    return found


@given(st.lists(values, min_size=1, max_size=6), st.booleans(), st.sampled_from(["\n", " ", "\n\n \r\n"]), chunks)
def test_values_come_out_whole_wherever_chunks_end(
    wanted: list[Any], ascii_only: bool, between: str, chunk: int
) -> None:
    text = between.join(json.dumps(value, ensure_ascii=ascii_only, indent=chunk % 3 or None) for value in wanted)
    assert items(text, chunk) == wanted


@given(values, st.data(), chunks)
def test_a_fault_is_named_where_it_is(value: Any, data: st.DataObject, chunk: int) -> None:
    text = json.dumps([value, value], indent=1)
    at = data.draw(st.integers(min_value=0, max_value=len(text) - 1))
    broken = f"[1]\n\n[2]  {text[:at]}\x01{text[at + 1 :]}"
    with pytest.raises(json.JSONDecodeError) as wanted:
        json.loads(broken[10:])
    with pytest.raises(DataError) as caught:
        items(broken, chunk)
    line, column = wanted.value.lineno, wanted.value.colno + (5 if wanted.value.lineno == 1 else 0)
    assert f"line {line + 2} is not JSON: {wanted.value.msg} at column {column}" in caught.value.message


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 2**20])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "marked"])
@pytest.mark.parametrize("bad", [b"\xff", b'\xe2\x82"', b"\xe2\x82"], ids=["never", "torn", "at the end"])
def test_the_byte_that_is_not_text_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, mark: bytes, bad: bytes
) -> None:
    before = mark + '["é", "€'.encode()
    path = tmp_path / "rows.json"
    path.write_bytes(before + bad)
    monkeypatch.setattr(json_text, "CHUNK_BYTES", chunk)
    with pytest.raises(DataError, match=f"byte {len(before)} is not UTF-8"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("after", ["", ".5", "e-2", "E+1"])
def test_a_number_is_too_long_only_where_it_is_whole(after: str) -> None:
    digits = "9" * 4400
    if after:
        assert items(digits + after, 4350) == [float(digits + after)]
        return
    with pytest.raises(DataError, match="value has 4400 digits"):
        items(digits + " ", 4350)


def wrapped(text: str, chunk: int) -> list[object]:
    """Read the rows of an object of which no more than a few characters may be held at once."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(json_text, "CHUNK_BYTES", chunk)
        patch.setattr(files, "MAX_LINE_BYTES", 10)
        path = Path(folder) / "rows.json"
        path.write_text(text)
        return [row.value for row in read_rows(str(path))]


rows = st.lists(st.fixed_dictionaries({"prompt": st.text(max_size=8), "n": values}), min_size=1, max_size=6)
named = st.dictionaries(
    st.text(max_size=5), st.none() | st.integers() | st.lists(st.integers(), max_size=3), max_size=3
)


@given(named, rows, named, chunks)
def test_rows_in_a_long_object_come_out_as_of_a_list(
    before: dict[str, Any], wanted: list[Any], after: dict[str, Any], chunk: int
) -> None:
    text = json.dumps({**before, "the rows": wanted, **after}, indent=chunk % 3 or None)
    assert wrapped(text, chunk) == wanted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": [{"x": 1}], "b": [{"x": 2}]}', "two lists of objects in it"),
        ('{"a": 1, "b": ["a text", "and another"]}', "no list of objects in it"),
        ('{"a": [{"x": 1}, 3]}', "a list of objects and others"),
        ('{"a": [{"role": "user", "content": "hi"}]}', "turns"),
        ('{"prompt": "p", "completion": "c", "a": [{"x": 1}]}', "the columns of a row"),
        ('{"a": [{"x": 1}], 5: 3}', "line 1 is not JSON: Expecting '\"' delimiter at column 19"),
        ('{"a": [{"x": 1}], "b" 3}', "line 1 is not JSON: Expecting ':' delimiter at column 23"),
        ('{"a": [{"x": 1}, {"x": 2} {"x": 3}]}', "line 1 is not JSON: Expecting ',' delimiter at column 27"),
        ('{"a": [{"x": 1}]} {"b": 1}', "line 1 is not JSON: Extra data at column 19"),
        ('{"a": [{"x": 1}', "line 1 is not JSON: Expecting ',' delimiter at column 16"),
    ],
)
def test_a_long_object_that_wraps_no_rows_is_an_error(text: str, told: str) -> None:
    with pytest.raises(DataError) as caught:
        wrapped(text, 4)
    assert told in caught.value.message


@pytest.mark.parametrize("name", ["", '{"info": {"made": "today"}, "data": '], ids=["a list", "an object"])
def test_many_rows_are_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        file.write(f"{name}[\n")
        for number in range(60_000):
            file.write(f'{", " if number else ""}{{"prompt": "question {number}", "completion": "{"word " * 60}"}}')
        file.write("]}" if name else "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(str(path))) == 60_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 19 * 2**20
    assert peak < 8 * 2**20
