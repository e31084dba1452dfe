"""Trackers that cannot be used are refused before any work."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from backprop.cli import run

pytestmark = pytest.mark.model  # for its time: nothing here needs torch


NAMES = ("tensorboard", "wandb", "trackio", "mlflow")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Give a set: trackers that are not in it are not installed."""
    there = set[str]()
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        return (object() if name in there else None) if name in NAMES else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for variable in ("WANDB_MODE", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    return there


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_is_not_installed_is_exit_2_with_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: set[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    installed |= {*NAMES} - {name}
    others = [token for other in NAMES for token in ("--report-to", other)]
    assert run(["train", "--data", "x.jsonl", *others]) == 2
    error = capsys.readouterr().err
    assert f"`{name}` needs the package `{name}`" in error
    command = "pip install 'backprop[monitoring]'" if name == "tensorboard" else f"pip install {name}"
    assert f"hint: {command}\n" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "variable", "value", "refused"),
    [
        ("wandb", "WANDB_MODE", "online", True),
        ("wandb", "WANDB_MODE", "offline", False),
        ("trackio", "TRACKIO_SPACE_ID", "me/space", True),
        ("mlflow", "MLFLOW_TRACKING_URI", "https://host", True),
        ("mlflow", "MLFLOW_TRACKING_URI", "sqlite:///runs.db", False),
        ("tensorboard", "WANDB_MODE", "online", False),
    ],
)
def test_offline_forbids_a_tracker_that_would_use_the_network(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[..., Path],
    installed: set[str],
    name: str,
    variable: str,
    value: str,
    refused: bool,
) -> None:
    installed |= {*NAMES}
    monkeypatch.setenv(variable, value)
    tokens = ["train", "--data", str(write("")), "--report-to", name]
    assert run([*tokens, "--offline"]) == (2 if refused else 3)  # the data is empty
    assert (f"`{variable}` lets a tracker use the network" in capsys.readouterr().err) is refused
    assert run(tokens) == 3
