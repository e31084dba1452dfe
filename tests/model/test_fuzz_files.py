"""Damaged settings, models, tokenizers, adapters, run directories, GGUF headers and answers of servers: the short form of scripts/fuzz-files."""

import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytestmark = pytest.mark.model

NUMBERS = {"config": 60, "model": 80, "tokenizer": 150, "adapter": 50, "manifest": 120, "gguf": 150, "ollama": 80}


@pytest.fixture(scope="module")
def fuzz() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "fuzz-files"))


@pytest.mark.parametrize("kind", NUMBERS)
def test_damaged_files_are_read_or_refused_by_an_error_to_act_on(
    fuzz: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    room = fuzz["Room"](tmp_path)
    ends: Counter[str] = Counter()
    try:
        for seed in range(NUMBERS[kind]):
            ended, fault = fuzz["fault_of"](kind, seed, room)
            assert not fault, f"scripts/fuzz-files 1 {seed} {kind}: {fault}"
            ends[ended] += 1
    finally:
        room.server.shutdown()
    assert ends["refused"] > NUMBERS[kind] // 5, "the files are too good to say anything"
    assert kind == "config" or ends["read"] > NUMBERS[kind] // 20, "the files are too bad to say anything"


def test_a_crash_or_an_error_without_a_hint_is_a_fault(fuzz: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from backprop.errors import DataError

    def raising(error: Exception) -> Callable[..., str]:
        def tried(*_: Any) -> str:
            raise error

        return tried

    for error, said in ((ValueError("x"), "Traceback"), (DataError("x"), "no hint"), (DataError("x", hint="y"), "")):
        monkeypatch.setitem(fuzz["TRIED"], "config", raising(error))
        assert said in fuzz["fault_of"]("config", 0, None)[1]
