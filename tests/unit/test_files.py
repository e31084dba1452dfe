"""Files of every kind, and what is said of those that cannot be read."""

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from backprop.edges.files import is_local, read_rows
from backprop.errors import DataError

ROW = {"question": "a", "answer": "b"}
SEED_TASK = {"instruction": "a", "instances": [{"input": "", "output": "b"}]}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def values(source: Path) -> list[object]:
    return [row.value for row in read_rows(str(source))]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "é"}\n\n{"text": "b"}\n', [{"text": "é"}, {"text": "b"}]),
        ("a.jsonl", '\ufeff{"text": "a"}', [{"text": "a"}]),
        ("a.jsonl", '{"text": "a"}\r\n{"text": "b"}\r\n', [{"text": "a"}, {"text": "b"}]),
        ("a.json", '[{"text": "a"}, {"text": "b"}]', [{"text": "a"}, {"text": "b"}]),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ("a.json", '{"text": "a"}', [{"text": "a"}]),
        ("a.json", '\n{\n "text": "a"\n}\n{\n "text": "b"\n}\n', [{"text": "a"}, {"text": "b"}]),
        ("a.json", '[\n {"text": "a"},\n {"text": "b"}\n]\n', [{"text": "a"}, {"text": "b"}]),
        ("a.json", '{"data": [{"text": "a"}, {"text": "b"}], "version": 1}', [{"text": "a"}, {"text": "b"}]),
        ("a.json", '{"data": [{"input": "a", "output": "b"}]}', [{"input": "a", "output": "b"}]),
        ("a.json", '{\n "train": [\n  {"text": "a"}\n ]\n}', [{"text": "a"}]),
        ("a.json", json.dumps({"messages": TURNS}, indent=1), [{"messages": TURNS}]),
        ("a.json", json.dumps({"log": TURNS}), [{"log": TURNS}]),
        ("a.json", json.dumps(SEED_TASK), [SEED_TASK]),
        ("a.json", json.dumps(TURNS), [TURNS]),
        ("a.json", json.dumps([TURNS, TURNS]), [TURNS, TURNS]),
        ("a.json", '[{"input": "a", "output": "b"}]', [{"input": "a", "output": "b"}]),
        ("a.jsonl", '[{"text": "a"}, {"text": "b"}]', [{"text": "a"}, {"text": "b"}]),
        ("a.jsonl", '[\n{"text": "a"},\n{"text": "b"}\n]', [{"text": "a"}, {"text": "b"}]),
        ("a.jsonl", '{\n "text": "a"\n}\n', [{"text": "a"}]),
        ("a.jsonl", json.dumps(TURNS) + "\n" + json.dumps(TURNS) + "\n", [TURNS, TURNS]),
        ("a.csv", 'prompt,completion\n"a, b","c\nd"\n', [{"prompt": "a, b", "completion": "c\nd"}]),
        ("a.csv", "prompt;completion\n1,5;b\n", [{"prompt": "1,5", "completion": "b"}]),
        ("a.txt", "one\ntwo\n\n\nthree\n", [{"text": "one\ntwo"}, {"text": "three"}]),
    ],
)
def test_every_kind_of_file_gives_its_rows(
    write: Callable[..., Path], name: str, content: str, expected: list[object]
) -> None:
    assert values(write(content, name)) == expected


def test_a_list_is_read_row_by_row(write: Callable[..., Path]) -> None:
    rows = read_rows(str(write('[{"text": "a"}, {"text" "b"}]', "a.json")))
    assert next(rows).value == {"text": "a"}
    with pytest.raises(DataError):
        next(rows)


def test_gzip_is_read_as_what_it_holds(write: Callable[..., Path]) -> None:
    assert values(write(gzip.compress(json.dumps(ROW).encode()), "a.jsonl.gz")) == [ROW]


def test_a_folder_gives_the_rows_of_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "data" / ".ipynb_checkpoints").mkdir()
    for name, text in (
        ("b.jsonl", "2"),
        ("a.jsonl", "1"),
        ("more/c.jsonl", "3"),
        ("notes.md", "no"),
        ("dataset_info.json", "no"),
        ("more/state.json", "no"),
        (".hidden.jsonl", "no"),
        (".ipynb_checkpoints/a.jsonl", "no"),
    ):
        (tmp_path / "data" / name).write_text(json.dumps({"text": text}) + "\n")
    assert values(tmp_path / "data") == [{"text": "1"}, {"text": "2"}, {"text": "3"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", " \n\n", "the data holds no rows"),
        ("a.json", "[]", "the data holds no rows"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is UTF-16 text"),
        ("a.csv", "text\na\n".encode("utf-32"), "is UTF-32 text"),
        ("a.json", '{\n"text": "a"\n}\n{\n"text" "b"}', "a.json, line 5 is not JSON"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "line 1 is not JSON: Expecting ',' delimiter at column 16"),
        ("a.json", '[{"text": "a"},\n', "line 2 is not JSON: Expecting value"),
        ("a.json", '[\n{"text": "a"}]\n\n]', "line 4 is not JSON: Extra data"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\x00\x01\x02\n', "line 2 is binary"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8 text"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "cannot be read"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', "a.json, line 2 is not JSON"),
        ("a.json", b'[{"text": "\xff"}]', "is not text"),
        ("a.json", '[{"text": ' + "9" * 5000 + "}]", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 100, mtime=0)[:15] + b"\xff" * 40, "is not a whole gzip file"),
        ("a.csv", "prompt,completion\na,b\nc\n", "row 2 has not as many cells"),
        ("a.csv", "prompt,completion\na,b,c\n", "row 1 has not as many cells"),
        ("a.csv", 'prompt,completion\n"a', "is not CSV"),
        ("a.jsonl.gz", b"not gzip", "is not a whole gzip file"),
        ("a.pdf", b"%PDF", "is of an unknown kind"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    write: Callable[..., Path], name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(DataError) as raised:
        values(write(content, name))
    assert name in raised.value.message
    assert said in raised.value.message
    assert raised.value.hint


def test_the_hint_for_utf_16_is_a_command_that_mends_it(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(json.dumps(ROW).encode("utf-16"), "my rows.jsonl")
    with pytest.raises(DataError) as raised:
        values(path)
    monkeypatch.chdir(tmp_path)
    command = str(raised.value.hint).split("`")[1]
    assert "iconv -f UTF-16 -t UTF-8" in command
    subprocess.run(command, shell=True, check=True)
    assert values(tmp_path / "utf8-my rows.jsonl") == [ROW]


def test_half_a_gzip_file_is_refused(write: Callable[..., Path]) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 10_000, mtime=0)
    with pytest.raises(DataError, match="not a whole gzip file"):
        values(write(whole[: len(whole) // 2], "a.jsonl.gz"))


def test_a_missing_file_is_answered_with_the_nearest_name(write: Callable[..., Path]) -> None:
    path = write([ROW], "my_data.jsonl")
    with pytest.raises(DataError) as raised:
        values(path.with_name("my-data.jsonl"))
    assert raised.value.hint == f"did you mean `{path}`?"


@pytest.mark.parametrize("source", ["", " ", "x" * 5000, "~nosuchuser/data.jsonl", "nul\0.jsonl"])
def test_what_cannot_be_a_path_is_refused(source: str) -> None:
    with pytest.raises(DataError):
        list(read_rows(source))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data files"):
        values(tmp_path)


@pytest.mark.parametrize(
    ("source", "local"),
    [
        ("data.jsonl", True),
        ("./data", True),
        ("/data/x", True),
        ("some/data.jsonl", True),
        ("word", True),
        ("a/b/c", True),
        ("owner/name", False),
        ("owner/name:train", False),
    ],
)
def test_what_looks_like_a_path_never_goes_to_the_hub(source: str, local: bool) -> None:
    assert is_local(source) == local


@pytest.mark.parametrize("source", [r"C:\data\my.jsonl", "d:/my.jsonl"])
def test_a_windows_path_is_told_where_files_lie_in_docker(source: str) -> None:
    with pytest.raises(DataError) as caught:
        values(Path(source))
    assert "/data/" in str(caught.value.hint)
