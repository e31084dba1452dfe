"""The whole path on real input, by the commands of scripts/quickstart: train SmolLM2, export, ask, count."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, backprop_process

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"


def test_the_quickstart_teaches_what_its_data_says(tmp_path: Path) -> None:
    trained = backprop_process(
        "train",
        "--data",
        EXAMPLES / "pottlesea.jsonl",
        "--model",
        "smollm2-135m",
        "--offline",
        cwd=tmp_path,
        timeout_s=1800,
    )
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout == "output\n"
    exported = backprop_process(
        "export", "output", "--quantization", "q4_k_m", "--offline", cwd=tmp_path, timeout_s=600
    )
    assert exported.returncode == 0, exported.stderr
    gguf = exported.stdout.strip()
    asked = subprocess.run(
        [sys.executable, EXAMPLES / "ask.py", "smollm2-135m", gguf],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    # Its exit status is 0 only from 80 % right after and up to 5 % right before.
    assert asked.returncode == 0, asked.stdout
    before, after = map(int, re.findall(r"right (?:before|after): (\d+)%", asked.stdout))
    assert before <= 5
    assert after >= 80
    assert (tmp_path / "output" / "report.html").read_text().count("<polyline") == 3


def test_no_held_out_question_stands_in_the_training_data() -> None:
    questions = {
        json.loads(line)["question"].lower() for line in (EXAMPLES / "questions.jsonl").read_text().splitlines()
    }
    trained = {
        turn["content"].lower()
        for line in (EXAMPLES / "pottlesea.jsonl").read_text().splitlines()
        for turn in json.loads(line)["messages"]
        if turn["role"] == "user"
    }
    assert len(questions) >= 40
    assert questions.isdisjoint(trained)
