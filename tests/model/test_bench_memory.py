"""scripts/bench-memory, which is meant for a GPU, runs through on a CPU; its figures need the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.model


def test_its_way_through_the_program_is_whole(tmp_path: Path) -> None:
    argv = [sys.executable, str(ROOT / "scripts" / "bench-memory"), "--self-test"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OUT": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert {one["case"]["method"] for one in told} == {"lora", "dora", "full"}
    for one in told:
        assert "failed" not in one, done.stdout
        assert len(one["measured"]["later"]["passes"]) == 1 + one["case"]["several"]
        assert set(one["estimate"]["phases"]) == {"load", "step", "evaluation", "save", "merge", "moments", "copied"}
