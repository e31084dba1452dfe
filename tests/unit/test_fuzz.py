"""Damaged data files: the short form of scripts/fuzz."""

import runpy
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

NUMBER = 150


@pytest.fixture(scope="module")
def fuzz() -> dict[str, object]:
    return runpy.run_path(str(ROOT / "scripts" / "fuzz"))


def test_damaged_files_are_read_or_refused_by_an_error_to_act_on(fuzz: dict, tmp_path: Path) -> None:
    ends: Counter[str] = Counter()
    for seed in range(NUMBER):
        name, content, damaged = fuzz["file_of"](seed)
        path = tmp_path / name
        path.write_bytes(content)
        ended, fault = fuzz["fault_of"](path, damaged=damaged, objective=fuzz["objective_of"](seed))
        assert not fault, f"scripts/fuzz 1 {seed}: {fault}"
        ends[ended] += 1
    assert min(ends["read"], ends["refused"]) > NUMBER // 5, "the files are too good, or too bad, to say anything"


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_one_row_of_every_shape_is_read(fuzz: dict, tmp_path: Path, kind: str, objective: str) -> None:
    for number, row in enumerate(fuzz["VALID"][objective][0]):
        path = tmp_path / f"{number}.{kind}"
        path.write_text(fuzz["json"].dumps(row if kind == "jsonl" else [row]))
        assert fuzz["fault_of"](path, damaged=False, objective=objective) == ("read", "")


def test_an_error_without_a_hint_or_a_file_is_a_fault(fuzz: dict, tmp_path: Path) -> None:
    from backprop.errors import DataError, ModelError

    path = tmp_path / "a.jsonl"
    assert fuzz["fault_of_error"](DataError("a.jsonl is bad", hint="mend it"), path) == ""
    assert fuzz["fault_of_error"](DataError("a.jsonl is bad"), path).startswith("no hint")
    assert fuzz["fault_of_error"](DataError("it is bad", hint="mend it"), path).startswith("the file is not named")
    assert fuzz["fault_of_error"](ModelError("a.jsonl is bad", hint="mend it"), path).startswith("code 4")
    assert fuzz["fault_of_error"](DataError("a.jsonl \ud800", hint="mend it"), path).startswith("it cannot be printed")
