"""The rehearsal goes the whole way before training, and finds what would fail after it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import backprop, chat

ROWS = [chat(f"What is {n}?", "It is here.") for n in range(12)]


@pytest.mark.slow
def test_a_model_that_cannot_become_a_gguf_is_found_before_training(
    tiny_model: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    """A tokenizer that splits words in a way unknown to llama.cpp: six hours of training once ended there."""
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    words = json.loads(path.read_text())
    words["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
    path.write_text(json.dumps(words))
    options = ["--data", write(ROWS), "--model", "model", "--rehearse"]
    done = backprop("train", *options, cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "the rehearsal failed, before any training" in done.stderr
    assert "pre-tokenizer" in done.stderr
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_the_rehearsal_goes_through_and_trains_nothing_in_a_dry_run(
    tiny_model: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    done = backprop("train", "--data", write(ROWS), "--model", tiny_model, "--rehearse", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a GGUF, q4_k_m, and a question to llama.cpp" in done.stderr
    assert not (tmp_path / "output").exists()
