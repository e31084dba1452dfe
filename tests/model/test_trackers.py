"""Trackers get the curve of a run, on this machine, and never end it. They are doubles, under the names of the packages."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, plant_in_training

from backprop import events
from backprop.engine import cross_entropy

pytestmark = pytest.mark.model

# What accelerate calls of wandb and trackio. Each call is noted as a line of JSON.
WRITER = """
import json, os
class Config:
    def update(self, values, allow_val_change=False): note("config", values)
config = Config()
def note(kind, value):
    print("noise on stdout")
    with open(os.environ["TRACKED"], "a") as file:
        file.write(json.dumps([__name__, kind, value]) + "\\n")
class Run:
    def log(self, values, step=None):
        if os.environ.get("BROKEN") == "log" and step == 2:
            raise ConnectionError("no answer from https://me:secret@host")
        note("log", {**values, "step": step})
    def finish(self):
        if os.environ.get("BROKEN") == "finish":
            raise ConnectionError("no answer")
        note("finish", None)
def init(**options):
    if os.environ.get("BROKEN") == "init":
        raise ConnectionError("no answer")
    note("init", options)
    return Run()
"""
# And of mlflow.
MLFLOW = """
import json, os, types
class validation: MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 6000, 100
utils = types.SimpleNamespace(validation=validation)
def note(kind, value):
    with open(os.environ["TRACKED"], "a") as file:
        file.write(json.dumps([__name__, kind, value]) + "\\n")
def set_tracking_uri(uri): note("uri", uri)
def search_experiments(filter_string): return []
def create_experiment(name, artifact_location, tags): note("experiment", [name, artifact_location]); return "1"
def start_run(**options): note("init", options)
def log_params(values): note("config", values)
def log_metrics(values, step=None): note("log", {**values, "step": step})
def end_run(): note("finish", None)
"""


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[tuple[str, Any]]]:
    """Put the doubles where they are imported from, and give what one of them was told."""
    room = tmp_path / "packages"
    room.mkdir()
    for name, code in (("wandb", WRITER), ("trackio", WRITER), ("mlflow", MLFLOW)):
        (room / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        for variable in ("MODE", "PROJECT", "NAME", "DIR", "SPACE_ID", "SERVER_URL", "TRACKING_URI", "EXPERIMENT_NAME"):
            monkeypatch.delenv(f"{name.upper()}_{variable}", raising=False)
    for variable in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.syspath_prepend(str(room))
    importlib.invalidate_caches()
    log = tmp_path / "tracked.jsonl"
    monkeypatch.setenv("TRACKED", str(log))

    def told(name: str) -> list[tuple[str, Any]]:
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [(kind, value) for module, kind, value in lines if module == name]

    yield told
    for name in ("wandb", "trackio", "mlflow"):
        sys.modules.pop(name, None)


Told = Callable[[str], list[tuple[str, Any]]]
QUICK: dict[str, Any] = {"skip_proofs": True, "packing": False}


def figures(told: list[tuple[str, Any]]) -> list[tuple[int, float]]:
    return [(value["step"], value["train/loss"]) for kind, value in told if kind == "log"]


def test_several_trackers_get_the_whole_curve_and_nothing_reaches_stdout(
    train: Callable[..., Run], tracked: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(report_to=["wandb", "trackio", "mlflow", "tensorboard"], **QUICK)
    assert "failed" not in run.warned
    curve = [(step, pytest.approx(loss, abs=1e-4)) for step, loss in enumerate(run.losses, start=1)]
    for name in ("wandb", "trackio", "mlflow"):
        told = tracked(name)
        assert figures(told) == curve, name
        assert told[-1] == ("finish", None)
        assert next(value for kind, value in told if kind == "config")["lora_r"] == 4
        assert {"train/learning_rate", "train/grad_norm"} <= next(value for kind, value in told if kind == "log").keys()
    assert list((run.folder / "tensorboard").rglob("events.out.tfevents.*"))
    assert capsys.readouterr().out == ""


def test_trackers_stay_on_this_machine(train: Callable[..., Run], tracked: Told) -> None:
    run = train(report_to=["wandb", "trackio", "mlflow"], **QUICK)
    options = dict(tracked("wandb"))["init"]
    assert (options["mode"], options["dir"], options["name"]) == ("offline", str(run.folder), "run")
    assert "space_id" not in dict(tracked("trackio"))["init"]
    assert dict(tracked("mlflow"))["uri"] == f"sqlite:///{run.folder}/mlflow/mlflow.db"


def test_the_users_own_settings_come_first(
    train: Callable[..., Run], tracked: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    train(report_to=["wandb", "mlflow"], **QUICK)
    options = dict(tracked("wandb"))["init"]
    assert (options["mode"], options["project"]) == ("online", "mine")
    assert "uri" not in dict(tracked("mlflow"))


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(
    train: Callable[..., Run], tracked: Told, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("BROKEN", where)
    run = train(report_to=["wandb", "mlflow"], **QUICK)
    warnings = [event.message for event in run.all(events.Warned) if "wandb" in event.message]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "`wandb` failed and gets no more figures; training goes on: ConnectionError: no answer"
    )
    assert "secret" not in warnings[0]
    assert len(run.losses) == 3
    assert len(run.all(events.RunFinished)) == 1
    assert len(figures(tracked("wandb"))) == {"init": 0, "log": 1, "finish": 3}[where]
    assert len(figures(tracked("mlflow"))) == 3


@pytest.mark.slow
def test_a_run_that_goes_on_counts_its_steps_on_and_a_stopped_one_closes_its_trackers(
    train: Callable[..., Run], tracked: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = cross_entropy.sum_of_losses, [0]

    def stopped_in_the_second_step(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    options: dict[str, Any] = {**QUICK, "overwrite": False, "resume": "auto", "micro_batch": 8, "report_to": "wandb"}
    plant_in_training(monkeypatch, stopped_in_the_second_step)
    assert train(**options).failed.code == 130
    assert tracked("wandb")[-1] == ("finish", None)
    train(**options)
    assert [step for step, _ in figures(tracked("wandb"))] == [1, 2, 3]


@pytest.mark.slow
def test_a_rehearsal_tells_no_tracker(
    train: Callable[..., Run], tracked: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKPROP_LLAMA_CPP", str(tmp_path / "nowhere"))
    train(report_to="wandb", rehearse=True, **QUICK)
    assert [kind for kind, _ in tracked("wandb")].count("init") == 1
