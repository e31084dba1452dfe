"""What a CI job relies on: gates, JUnit, summaries, and a run that is done again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import UNEVEN, Run, backprop, chat

from backprop import events
from backprop.engine import merge

pytestmark = pytest.mark.model

OLD = [chat(f"old {n}", f"thing {n} is here") for n in range(12)]
NEW = [chat(f"What is {n}?", "It is here.") for n in range(40)]
OPTIONS: dict[str, Any] = {"steps": 12, "batch_size": 8, "overwrite": False, "resume": "auto", "skip_proofs": True}


def gates(run: Run) -> dict[str, tuple[bool, str]]:
    return {event.gate: (event.ok, event.found) for event in run.all(events.Gated)}


def test_gates_that_are_met_are_told_and_kept(train: Callable[..., Run], write: Callable[..., Path]) -> None:
    held_out = (str(write(NEW[20:], "held.jsonl")),)
    run = train(rows=NEW[:20], **OPTIONS, eval_data=held_out, gate=("eval_loss<20", "steps>=12", "eval_loss_change<0"))
    assert not run.all(events.Failed)
    assert [ok for ok, _ in gates(run).values()] == [True, True, True]
    manifest = json.loads((run.folder / "run.json").read_text())
    assert [gate["gate"] for gate in manifest["gates"]] == ["eval_loss<20", "steps>=12", "eval_loss_change<0"]
    assert "<h2>Gates</h2>" in (run.folder / "report.html").read_text()


@pytest.mark.slow
def test_an_unmet_gate_is_exit_6_each_time_and_a_looser_one_needs_no_training(train: Callable[..., Run]) -> None:
    run = train(**OPTIONS, gate=("final_loss<0.001", "steps>=12"))
    assert run.failed.code == 6
    assert run.failed.message.startswith("1 of 2 gates are not met: final_loss<0.001: final_loss is ")
    assert json.loads((run.folder / "run.json").read_text())["status"] == "failed"
    again = train(**OPTIONS, gate=("final_loss<0.001", "steps>=12"))
    assert again.failed.code == 6
    assert not again.all(events.Step)
    looser = train(**OPTIONS, gate=("final_loss<100",))
    assert not looser.all(events.Failed)
    assert not looser.all(events.Step)


@pytest.mark.slow
def test_a_stricter_gate_on_a_finished_run_is_judged(train: Callable[..., Run]) -> None:
    assert not train(**OPTIONS).all(events.Failed)
    stricter = train(**OPTIONS, gate=("final_loss<0.001",))
    assert stricter.failed.code == 6
    assert not stricter.all(events.Step)


def test_a_gate_without_its_figure_is_refused_before_any_work(train: Callable[..., Run]) -> None:
    run = train(**OPTIONS, gate=("eval_loss<100",))
    assert (run.failed.code, run.failed.message) == (
        2,
        "`--gate eval_loss<100` needs held-out rows, and there are none",
    )
    assert not run.folder.exists()


def test_a_gate_that_cannot_be_read_is_refused_before_any_work(train: Callable[..., Run]) -> None:
    run = train(**OPTIONS, gate=("evil_loss<3",))
    assert run.failed.code == 2
    assert "eval_loss" in run.failed.hint
    assert not run.folder.exists()


@pytest.mark.slow
def test_new_tasks_must_be_shown_to_be_better_and_old_ones_not_worse(
    train: Callable[..., Run], write: Callable[..., Path]
) -> None:
    data = {"eval_data": (str(write(NEW[20:], "held.jsonl")),), "gate_data": (str(write(OLD, "old.jsonl")),)}
    # A random model knows nothing: learning any words makes it better at all others.
    run = train(rows=NEW[:20], **OPTIONS, **data)
    assert not run.all(events.Failed)
    found = gates(run)
    assert found["new tasks are better"][0]
    assert found["old tasks are not worse"][0]
    assert "12 rows" in found["old tasks are not worse"][1]


@pytest.mark.slow
def test_old_tasks_that_got_worse_are_exit_6(
    train: Callable[..., Run], write: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    first = train(rows=OLD, **{**OPTIONS, "steps": 60})
    knows_old = tmp_path / "knows-old"
    adapter = first.folder / "lora"
    merge.merge(str(tiny_model), adapter, merge.adapted_tokenizer(adapter), knows_old)
    old = (str(write(OLD, "old.jsonl")),)
    run = train(rows=NEW, model=knows_old, **{**OPTIONS, "steps": 60, "overwrite": True}, gate_data=old)
    assert run.failed.code == 6
    assert "old tasks are not worse: old rows: loss changed by " in run.failed.message


@pytest.mark.slow
def test_a_run_done_again_is_equal_bit_for_bit(train: Callable[..., Run], tmp_path: Path) -> None:
    first = train(**OPTIONS, lora_dropout=0.2)
    done = backprop("train", "--from-run", first.folder, "-o", "again", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (repeated,) = [line for line in lines if line["event"] == "repeated"]
    assert (repeated["kind"], repeated["found"]) == ("equal", "equal bit for bit")
    assert lines[-1]["result"]["repeated"] == "equal"


@pytest.mark.slow
def test_a_run_done_again_that_differs_says_from_which_step_on(
    train: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(**OPTIONS)
    log = first.folder / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if line["event"] == "step" and line["step"] >= 5:
            line["loss"] += 0.5
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = backprop("train", "--from-run", first.folder, "-o", "again", cwd=tmp_path)
    assert done.returncode == 6
    assert "different from step 5 on" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run, data: data.write_text(data.read_text().replace("question 1", "question one")), "the data changed"),
        (lambda run, data: (run / "run.json").unlink(), "holds no finished run"),
        (lambda run, data: shutil.rmtree(run), "holds no finished run"),
    ],
    ids=["other data", "no manifest", "no run"],
)
def test_a_run_that_cannot_be_done_again_is_refused(
    train: Callable[..., Run], tmp_path: Path, change: Callable[[Path, Path], object], said: str
) -> None:
    first = train(**OPTIONS)
    change(first.folder, tmp_path / "data.jsonl")
    done = backprop("train", "--from-run", first.folder, "-o", "again", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "9"], "`--steps` cannot be given with `--from-run`"),
        (["--data", "x.jsonl"], "both `--data` and `--from-run`"),
        (["-o", "run"], "cannot be done again in its own directory"),
    ],
    ids=["an option", "data", "its own folder"],
)
def test_what_a_run_has_itself_cannot_be_given(
    train: Callable[..., Run], tmp_path: Path, arguments: list[str], said: str
) -> None:
    first = train(**OPTIONS)
    done = backprop("train", "--from-run", first.folder, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_ci_job_gets_junit_a_summary_and_annotations(
    tmp_path: Path, tiny_model: Path, write: Callable[..., Path]
) -> None:
    command = ["train", "--data", write(UNEVEN), "--model", tiny_model, "--steps", "2", "--junit", "junit.xml"]
    job = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    done = backprop(*command, "--gate", "final_loss<0.0001", cwd=tmp_path, **job)
    assert done.returncode == 6, done.stderr
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert cases["packed documents are isolated"].find("failure") is None
    assert cases["gate final_loss<0.0001"].find("failure") is not None
    assert len(list(suite.iter("error"))) == 1
    assert "exit 6" in (tmp_path / "summary.md").read_text()
    assert "::error title=" in done.stderr
    assert backprop(*command, "--gate", "final_loss<99", cwd=tmp_path, **job).returncode == 0
    assert not list(ElementTree.parse(tmp_path / "junit.xml").iter("failure"))
    assert (tmp_path / "summary.md").read_text().count("\n# ") + (tmp_path / "summary.md").read_text().startswith(
        "#"
    ) >= 1


def test_a_junit_file_that_cannot_be_written_is_no_success(
    tmp_path: Path, tiny_model: Path, write: Callable[..., Path]
) -> None:
    data = write(UNEVEN)
    command = ["train", "--data", data, "--model", tiny_model, "--steps", "1"]
    done = backprop(*command, "--junit", data / "x.xml", cwd=tmp_path)
    assert done.returncode == 2
    assert "x.xml` cannot be a file" in done.stderr
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine").write_text("x")
    assert backprop("doctor", "--junit", "results", cwd=tmp_path).returncode == 2
    assert (tmp_path / "results" / "mine").read_text() == "x"
    assert backprop("train", "--junit", "refused.xml", "--steps", "0", cwd=tmp_path).returncode == 2
    assert list(ElementTree.parse(tmp_path / "refused.xml").iter("error"))


@pytest.mark.slow
def test_a_job_that_is_run_again_gets_its_proofs_and_gates_again(train: Callable[..., Run]) -> None:
    first = train(**OPTIONS, gate=("steps>=12",))
    again = train(**OPTIONS, gate=("steps>=12",))
    assert again.all(events.Proved)
    assert {proof.name for proof in again.all(events.Proved)} == {proof.name for proof in first.all(events.Proved)}
    assert again.all(events.Gated) == first.all(events.Gated)


@pytest.mark.slow
def test_other_gates_on_a_finished_run_without_its_checkpoints_train_nothing_anew(train: Callable[..., Run]) -> None:
    run = train(**OPTIONS)
    shutil.rmtree(run.folder / "checkpoints")
    other = train(**OPTIONS, gate=("steps>=12",))
    assert other.failed.code == 2
    assert "its last checkpoint is gone" in other.failed.message
    assert json.loads((run.folder / "run.json").read_text())["status"] == "finished"


def test_doctor_gives_junit_too(tmp_path: Path) -> None:
    backprop("doctor", "--junit", "doctor.xml", cwd=tmp_path)
    assert len(list(ElementTree.parse(tmp_path / "doctor.xml").iter("testcase"))) > 3
