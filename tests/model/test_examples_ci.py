"""The commands of the CI examples, run for real: train with a gate, stop in time, go on, export."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from conftest import ROOT, chat

pytestmark = pytest.mark.slow

ROWS = [chat(f"What is {n}?", "It is here.") for n in range(60)]
# What the examples say for a real model, and what a random one of two layers needs.
CHANGES = {"eval_loss<1.2": "eval_loss<9", "--max-minutes 120": "--max-minutes 120 --steps 90 --batch-size 8"}


def github_script(name: str) -> str:
    steps = yaml.safe_load((ROOT / "examples" / "ci" / "github.yml").read_text())["jobs"]["finetune"]["steps"]
    (script,) = [step["run"] for step in steps if step.get("name") == name]
    return script


def ran(script: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=cwd,
        env={**os.environ, **environment, "PATH": path, "GITHUB_OUTPUT": str(cwd / "github-output")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_job_stops_in_time_goes_on_and_exports(
    tmp_path: Path, tiny_model: Path, write: Callable[..., Path]
) -> None:
    script = github_script("Train")
    for old, new in CHANGES.items():
        assert old in script
        script = script.replace(old, new)
    job = {"DATA": str(write(ROWS)), "MODEL": str(tiny_model), "RUN": str(tmp_path / "run"), "GITHUB_ACTIONS": "true"}
    soon = ran(script.replace("--max-minutes 120", "--max-minutes 0.03"), tmp_path, **job)
    assert soon.returncode == 0, soon.stderr
    assert "::notice title=not finished::" in soon.stdout
    done = ran(script, tmp_path, **job)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "github-output").read_text() == "finished=yes\n"
    suite = ElementTree.parse(tmp_path / "run.junit.xml").getroot()
    assert "gate eval_loss<9" in {case.get("name") for case in suite.iter("testcase")}
    assert not list(suite.iter("failure"))
    again = ran(script, tmp_path, **job)
    assert again.returncode == 0, again.stderr
    for _ in range(2):
        exported = ran(github_script("Export"), tmp_path, **job)
        assert exported.returncode == 0, exported.stderr
    assert [path.suffix for path in (tmp_path / "run" / "export").glob("*.gguf")] == [".gguf"]


def test_the_gitlab_job_trains_and_exports(tmp_path: Path, tiny_model: Path, write: Callable[..., Path]) -> None:
    job = yaml.safe_load((ROOT / "examples" / "ci" / "gitlab.yml").read_text())["finetune"]
    script = "\n".join(line for line in job["script"] if line.startswith(("backprop train", "backprop export")))
    for old, new in CHANGES.items():
        assert old in script
        script = script.replace(old, new)
    done = ran(script, tmp_path, DATA=str(write(ROWS)), MODEL=str(tiny_model), run=str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "junit.xml").is_file()
    assert (tmp_path / "run" / "export" / "run-q4_k_m.gguf").is_file()


def test_the_job_fails_when_the_gate_is_not_met(tmp_path: Path, tiny_model: Path, write: Callable[..., Path]) -> None:
    script = github_script("Train").replace("--max-minutes 120", "--max-minutes 120 --steps 2")
    job = {"DATA": str(write(ROWS)), "MODEL": str(tiny_model), "RUN": str(tmp_path / "run")}
    done = ran(script, tmp_path, **job)
    assert done.returncode == 6
    assert "gates are not met: eval_loss<1.2" in done.stderr
    assert not (tmp_path / "github-output").exists()
