"""`train --from-run`: a finished run done again, and how far the two are the same."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from backprop.config import TrainConfig
from backprop.core.compare import Record, compare
from backprop.edges import rundir
from backprop.errors import TrainingError, UsageError
from backprop.events import JSON, Repeated, Sink, Step, Warned
from backprop.verbs.prepare import Prepared
from backprop.verbs.session import NOT_IDENTITY, ONCE, other_versions


def settings_of(config: TrainConfig) -> TrainConfig:
    """Give the config of the run that `--from-run` names, with this command's own output and ways to tell.

    Raises:
        UsageError: If there is no finished run of `train`, or if options are given that it has itself.
    """
    assert config.from_run is not None
    manifest = _finished(config.from_run)
    given = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != field.default and field.name not in (*NOT_IDENTITY, "from_run")
    }
    if given:
        flags = ", ".join(f"`--{name.replace('_', '-')}`" for name in given)
        raise UsageError(f"{flags} cannot be given with `--from-run`, which has its own", hint="leave it out")
    if config.output.resolve() == config.from_run.resolve():
        raise UsageError("a run cannot be done again in its own directory", hint="give another `--output`")
    known = {field.name for field in fields(config)} - {*NOT_IDENTITY, "from_run"}
    settings = {name: value for name, value in manifest["config"].items() if name in known}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    settings = {**ONCE, **settings}
    if config.engine == "auto":
        settings["engine"] = (manifest["plan"].get("engine") or {}).get("value", "torch")
    if config.micro_batch is None:
        planned = manifest["plan"]["micro_batch"]["value"]
        settings["micro_batch"] = manifest["result"].get("micro_batch", planned)  # what was tried may have been faster
    return replace(config, **settings, from_run=None)


def refuse_other_inputs(run: Path, prepared: Prepared, fingerprint: str, *, say: Sink) -> None:
    """Refuse data or a model that changed since; warn of other versions.

    Raises:
        UsageError: Naming what differs.
    """
    manifest = _finished(run)
    changed = []
    if manifest["identity"].get("data_sha256") != fingerprint:
        changed.append("the data")
    if (manifest.get("model") or {}).get("sha256") != prepared.model.sha256:
        changed.append(f"the model `{prepared.model.name}`")
    if changed:
        raise UsageError(
            f"{' and '.join(changed)} changed since the run in `{run}`", hint="bring back what it was trained on"
        )
    others = other_versions(manifest.get("versions") or {})
    if others:
        say(Warned(message=f"other versions than in `{run}`: {'; '.join(others)}"))


def compare_with(original: Path, losses: tuple[float, ...], *, run: Path, say: Sink) -> dict[str, JSON]:
    """Compare a run and its losses with the one that it did again, and give what was found.

    Raises:
        TrainingError: If they are different.
    """
    result = _finished(original).get("result") or {}
    adapter = rundir.sha256_of(run / "lora" / "adapter_model.safetensors")
    found = compare(Record(str(result["adapter_sha256"]), losses_of(original)), Record(adapter, losses))
    say(Repeated(kind=found.kind, found=found.sentence(), path=str(original), largest=found.largest))
    if found.kind == "different":
        raise TrainingError(
            f"this run and `{original}` are {found.sentence()}",
            hint="compare versions, hardware and environment in their run.json; on a GPU, both need `--deterministic`",
        )
    return {"repeats": str(original), "repeated": found.kind, "found": found.sentence()}


def losses_of(run: Path) -> tuple[float, ...]:
    """Read the loss of each step from `events.jsonl`; steps that were done again count once, as they were last."""
    steps = {event.step: event.loss for event in rundir.read_events(run) if isinstance(event, Step)}
    return tuple(steps[number] for number in sorted(steps))


def _finished(run: Path) -> dict[str, Any]:
    manifest = rundir.read_manifest(run)
    if manifest is None or manifest.get("status") != "finished" or manifest.get("command") != "train":
        raise UsageError(f"`{run}` holds no finished run of `train`", hint="give the `--output` of one")
    return manifest
