"""`backprop train`: from rows to an adapter."""

import importlib.util
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from backprop.config import TrainConfig
from backprop.core.plan import taken_over
from backprop.core.probes import first_question
from backprop.edges import checkpoints, device, network, rundir, stopping
from backprop.errors import DiskError, PackageError, UsageError
from backprop.events import Sink
from backprop.verbs.adapter import measures, train_one
from backprop.verbs.engines import check_engine, with_faster_engine
from backprop.verbs.examples import show_examples
from backprop.verbs.gates import check_gates, read_gates, refuse_gates_without_figures
from backprop.verbs.prepare import (
    Prepared,
    fingerprint_of,
    prepare,
    probes_of,
    read_data,
)
from backprop.verbs.rehearsal import rehearse_if_due
from backprop.verbs.repeat import compare_with, losses_of, refuse_other_inputs, settings_of
from backprop.verbs.session import running


def train(config: TrainConfig, *, say: Sink) -> Path:
    """Fine-tune one adapter.

    Returns:
        The run directory; the adapter is in its `lora/`. With `dry_run`, nothing is written.

    Raises:
        BackpropError: Of the kind that names what the user can mend.
    """
    with network.limited(offline=config.offline), stopping.time_limit(config.max_minutes):
        return _train(config, say)


def _train(config: TrainConfig, say: Sink) -> Path:
    original, asked = config.from_run, config
    if original is not None:
        config = settings_of(config)
    check_packages(config)
    check_engine(config)
    check_resume(config)
    gate_rows = read_gates(config)
    judged, held_out = read_data(config)
    refuse_gates_without_figures(config, held_out=bool(held_out))
    fingerprint = fingerprint_of(chain(judged.conversations, held_out))
    with running(config, command="train", fingerprint=fingerprint, say=say) as session:
        if session.done:
            if original is not None:
                compare_with(original, losses_of(config.output), say=session.say, run=config.output)
            session.end_again()
            return config.output
        known = taken_over(asked, config, f"as in `{original}`")
        config, begun = session.as_begun(config)
        prepared = prepare(config, judged, held_out, gate_rows=gate_rows, known={**known, **begun}, say=session.say)
        config = prepared.config
        if original is not None:
            refuse_other_inputs(original, prepared, fingerprint, say=session.say)
        if config.dry_run:
            session.say(show_examples(prepared))
        else:
            check_disk(config, [prepared])
        (prepared,) = with_faster_engine(config, [prepared], say=session.say)
        rehearse_if_due(config, [prepared], goes_on=session.goes_on, say=session.say)
        if config.dry_run:
            session.finish({"dry_run": True})
            return config.output
        session.claim(
            prepared,
            question=first_question(held_out, judged.conversations),
            probes=probes_of([held_out], [judged.conversations], prepared.tokenizer),
        )
        model, fit = train_one(config, prepared, output=config.output, say=session.say)
        result = measures(fit, config.output)
        check_gates(config, prepared, model, {**result, "seconds": fit.seconds}, say=session.say)
        if original is not None:
            result |= compare_with(original, fit.losses, say=session.say, run=config.output)
        session.finish(result)
    return config.output


def check_resume(config: TrainConfig) -> None:
    """Refuse a `--resume` that is no checkpoint, before any work.

    Raises:
        UsageError: Saying what is wrong with it.
    """
    if config.resume not in ("auto", "never"):
        checkpoints.read(Path(config.resume))


def check_disk(config: TrainConfig, prepared: Sequence[Prepared]) -> None:
    """Refuse a disk that is too small for what the run, or the runs one after the other, will write.

    Raises:
        DiskError: With both figures.
    """
    need = sum(part.disk_bytes for part in prepared)
    free = device.disk_free_bytes(config.output) + rundir.size_of(config.output, ("lora", "checkpoints", "runs"))
    if free < need:
        raise DiskError(
            f"this writes up to {need / 2**20:,.1f} MiB to `{config.output}`, and there is room for {free / 2**20:,.1f}",
            hint="make room, choose another `--output`, or give a smaller `--keep-checkpoints`",
        )


# The packages that an option needs beyond the core, and what brings them.
NEEDED = {
    "qlora": ("bitsandbytes", "pip install 'backprop[standard]'"),
    "adamw-8bit": ("bitsandbytes", "pip install 'backprop[standard]'"),
    "tensorboard": ("tensorboard", "pip install 'backprop[monitoring]'"),
    "wandb": ("wandb", "pip install wandb"),
    "trackio": ("trackio", "pip install trackio"),
    "mlflow": ("mlflow", "pip install mlflow"),
}
# The variables of trackers that name a place on the network, or let them speak to one.
NETWORK = {
    "wandb": ("WANDB_MODE",),
    "trackio": ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"),
    "mlflow": ("MLFLOW_TRACKING_URI",),
}
LOCAL = ("", "offline", "disabled", "dryrun")


def check_packages(config: TrainConfig) -> None:
    """Refuse options whose package is not installed, and trackers that would break `--offline`, before any work.

    Raises:
        PackageError: Naming the package and the command that brings it.
        UsageError: Naming the variable.
    """
    for option in (*filter(None, [config.method, config.optimizer]), *config.report_to):
        package, command = NEEDED.get(option, ("json", ""))
        if importlib.util.find_spec(package) is None:
            raise PackageError(f"`{option}` needs the package `{package}`", hint=command)
    for variable in (one for name in config.report_to for one in NETWORK.get(name, ())):
        value = os.environ.get(variable, "")
        if config.offline and not (value in LOCAL or value.startswith(("sqlite:", "file:", "/", "."))):
            raise UsageError(
                f"`{variable}` lets a tracker use the network, which `--offline` forbids", hint=f"unset {variable}"
            )
