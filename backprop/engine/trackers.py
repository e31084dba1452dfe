"""Trackers: accelerate's TensorBoard, Weights & Biases, trackio and MLflow, kept on this machine and away from training.

Whatever a tracker does, the run goes on: it is told once, and gets no more figures.
"""

import importlib
import io
import os
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backprop.config import TrainConfig
from backprop.events import Sink, Warned

PROJECT = "backprop"


class Trackers:
    """The trackers of one training.

    Args:
        folder: Where their files go, unless the user's own settings name another place.
        first: Steps that are done already.
    """

    def __init__(self, config: TrainConfig, folder: Path, *, first: int, say: Sink) -> None:
        self._first, self._say = first, say
        self._open: dict[str, Any] = {}
        for name in config.report_to:
            self._guard(name, lambda name=name: self._start(name, config, folder))

    def _start(self, name: str, config: TrainConfig, folder: Path) -> None:
        tracker = _tracker(name, config, folder, first=self._first)
        tracker.start()
        self._open[name] = tracker
        if name != "tensorboard":  # it would write a table of all options as a run of its own
            tracker.store_init_configuration(_flat(config))

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """Hand over the figures of a step, counted from the start of this training."""
        # The trainer's epoch counts passes over the steps, not over the data.
        numbers = {
            f"train/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float) and name != "epoch"
        }
        for name, tracker in list(self._open.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(numbers, step=self._first + step))

    def close(self) -> None:
        """Let each write what it still holds; safe to call twice."""
        for name, tracker in list(self._open.items()):
            self._guard(name, tracker.finish)
        self._open.clear()

    def _guard(self, name: str, work: Callable[[], None]) -> None:
        try:
            with redirect_stdout(io.StringIO()):  # stdout carries results only
                work()
        except Exception as error:  # noqa: BLE001 - each raises what it likes, and none may end hours of training
            self._open.pop(name, None)
            first = next(iter(str(error).splitlines()), "")
            what = re.sub(r"//[^/@\s]+@", "//…@", f"{type(error).__name__}: {first[:200]}")
            self._say(Warned(message=f"`{name}` failed and gets no more figures; training goes on: {what}"))


def _tracker(name: str, config: TrainConfig, folder: Path, *, first: int) -> Any:
    """Make accelerate's tracker of that name; offline, unless the user's own settings say otherwise."""
    from accelerate import tracking

    run = config.output.resolve().name
    if folder.resolve() != config.output.resolve():
        run = f"{run}-{folder.name}"
    match name:
        case "tensorboard":
            # Where an earlier process wrote later steps, they are done again.
            return tracking.TensorBoardTracker("tensorboard", folder, purge_step=first + 1)
        case "wandb":
            return tracking.WandBTracker(
                os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", run),
                mode=os.environ.get("WANDB_MODE", "offline"),
                dir=os.environ.get("WANDB_DIR", str(folder)),
                settings={"silent": True, "console": "off"},
            )
        case "trackio":
            return tracking.TrackioTracker(PROJECT, name=run, resume="allow", embed=False)
        case _:
            mlflow: Any = importlib.import_module("mlflow")
            if "MLFLOW_TRACKING_URI" not in os.environ:
                room = folder.resolve() / "mlflow"
                room.mkdir(parents=True, exist_ok=True)
                mlflow.set_tracking_uri(f"sqlite:///{room / 'mlflow.db'}")
                return tracking.MLflowTracker(PROJECT, run_name=run, logging_dir=str(room / "artifacts"))
            return tracking.MLflowTracker(PROJECT, run_name=run)


def _flat(config: TrainConfig) -> dict[str, str | int | float | bool]:
    return {
        name: value if isinstance(value, str | int | float | bool) else str(value)
        for name, value in asdict(config).items()
    }
