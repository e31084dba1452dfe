"""What is trained on a model of any architecture is what comes out of the export: nothing good is rejected."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import HERE, backprop
from tiny_models import MODELS, tiny

pytestmark = [pytest.mark.model, pytest.mark.slow]

KINDS = ("f16", "q8_0", "q4_k_m")


def test_twenty_good_pairs_of_model_and_file_are_tried() -> None:
    assert len(MODELS) * len(KINDS) >= 20


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("architecture", MODELS)
def test_the_files_of_a_good_model_are_proved_and_answer(
    architecture: str, taught: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = [argument for kind in KINDS for argument in ("-q", kind)]
    done = backprop("export", taught(architecture), *chosen, "--json", "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["answer"] for event in told if event["event"] == "exported"] == ["It is here."] * 3
    record = json.loads((tmp_path / "verification.json").read_text())
    assert {kind: len(proofs) for kind, proofs in record["proofs"].items()} == {"f16": 7, "q8_0": 2, "q4_k_m": 2}
    assert all(proof["ok"] for proofs in record["proofs"].values() for proof in proofs)
    (adapter,) = (proof["found"] for proof in record["proofs"]["f16"] if proof["name"] == "the adapter is in it, once")
    assert "too little was learnt" not in adapter


@pytest.mark.usefixtures("one_thread")
def test_a_model_with_a_sentencepiece_tokenizer_is_rehearsed(tmp_path: Path, write: Callable[..., Path]) -> None:
    """The converter refused the small copy of any Phi-3: what transformers saves lacks its `tokenizer.model`."""
    model = tiny("phi3", tmp_path / "model")
    done = backprop("train", "--data", write(HERE), "--model", model, "--rehearse", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a GGUF, q4_k_m, and a question to llama.cpp" in done.stderr
