"""`backprop export`: from an adapter to a file that runs, asked once before success is claimed."""

import json
import os
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import backprop
from backprop.config import ExportConfig
from backprop.core.data.formats import Message
from backprop.core.probes import by_itself
from backprop.edges import device, hub, llama_cpp, rundir, stopping
from backprop.errors import BackpropError, DiskError, ExportError, UsageError
from backprop.events import Exported, Failed, Phase, RunFinished, RunStarted, Sink, tee
from backprop.verbs.register import destination, register

# Room for the merged checkpoint in float32, its 16-bit GGUF and one quantized file, per weight: 4 + 2 + 1 bytes.
BYTES_PER_WEIGHT = 7
DEFAULT_QUANTIZATION = "q4_k_m"
DEFAULT_QUESTION = "Hello! Who are you?"
REJECTED = ".rejected"
"""What the name of a file ends with that is not the model that was trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """An adapter on disk and the base model it was trained on."""

    folder: Path
    base: str
    output: Path
    name: str
    question: str
    probes: list[list[Message]]
    """Conversations to prove a copy with."""
    run: Path | None
    """The run directory it stands in; None for an adapter by itself."""
    sha256: str
    """Of its weights."""


def export(source: Path, config: ExportConfig, *, say: Sink) -> list[Path]:
    """Export an adapter or a run directory.

    Returns:
        The files (gguf) or folder (safetensors) that were written.

    Raises:
        UsageError: If ``source`` is neither, or a file of that name is there already.
        ExportError: If a step fails, or the exported model gives no answer.
    """
    started = time.monotonic()
    adapter = find_adapter(source, config)
    targets = _targets(config, adapter)
    if config.format == "gguf":
        llama_cpp.converter()
        llama_cpp.bindings()
    where = destination(config, default_name=adapter.name)
    _make_room(adapter)
    with ExitStack() as stack:
        for folder in {adapter.output.resolve(), *([adapter.run.resolve()] if adapter.run else [])}:
            stack.enter_context(rundir.locked(folder))
        rundir.sweep(adapter.output)
        done = {} if config.overwrite else _refuse_others(adapter, targets, verify=config.verify)
        if adapter.run is not None and os.access(adapter.run, os.W_OK):
            log = stack.enter_context(rundir.event_log(adapter.run))
            stack.enter_context(_told_to_the_end(log))
            say = tee(say, log)
        say(RunStarted(command="export", output=str(adapter.output), version=backprop.__version__))
        for exported in done.values():
            say(exported)
        missing = {kind: path for kind, path in targets.items() if kind not in done}
        if missing:
            _write(adapter, missing, config, say)
        if where:
            register(where, next(iter(targets.values())), adapter.folder, adapter.question, config=config, say=say)
        seconds = round(time.monotonic() - started, 1)
        result = {"files": [str(path) for path in targets.values()]}
        stopping.finished()
        say(RunFinished(command="export", output=str(adapter.output), seconds=seconds, result=result))
    return list(targets.values())


def _write(adapter: Adapter, targets: Mapping[str, Path], config: ExportConfig, say: Sink) -> None:
    try:
        if config.format == "safetensors":
            _export_safetensors(adapter, targets["safetensors"], config, say)
        else:
            _export_gguf(adapter, targets, config, say)
    except Exception as error:
        told = rundir.disk_error(adapter.output, error)
        if told is None or isinstance(error, DiskError):
            raise
        raise told from error


@contextmanager
def _told_to_the_end(log: Sink) -> Generator[None]:
    """Write into the run's log how an export ended early."""

    def end(error: BackpropError) -> None:
        with suppress(DiskError):
            log(Failed(code=error.code, message=error.message, hint=error.hint or ""))

    try:
        with stopping.ends_with(end):
            yield
    except BackpropError as error:
        end(error)
        raise
    except Exception as error:
        end(BackpropError(f"a bug: {error!r}"))
        raise
    except KeyboardInterrupt as interrupt:
        stopped = stopping.accept(interrupt)
        end(stopped)
        raise stopped from None


def find_adapter(source: Path, config: ExportConfig) -> Adapter:
    """Find the adapter in a run directory or PEFT folder, and its base model.

    Raises:
        UsageError: If there is none.
        ModelError: If its base model cannot be found.
    """
    folder = source if (source / "adapter_config.json").is_file() else source / "lora"
    run = folder.parent
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"`{source}` holds no adapter", hint="give a run directory, or a folder with adapter_config.json"
        )
    manifest = rundir.read_manifest(run) or {}
    if manifest and manifest.get("status") != "finished":
        why = (manifest.get("error") or {}).get("message", "")
        raise UsageError(
            f"the run in `{run}` is not finished: {manifest.get('status')}{': ' if why else ''}{why}",
            hint="mend that and run its command again; what only a proof stopped finishes with `--skip-proofs`"
            if manifest.get("status") == "failed"
            else "run its command again, to the end",
        )
    base = _base_of_run(manifest) if "model" in manifest else _base_of(folder)
    model = hub.find_model(base, offline=config.offline)
    known = (manifest.get("model") or {}).get("sha256")
    if known not in (None, model.sha256):
        raise ExportError(
            f"`{model.path}` is not the model that the run in `{run}` was trained on: its files differ",
            hint="bring back the one that it was trained on, or train again",
        )
    output = config.output or (run if manifest else folder) / "export"
    question = config.question or manifest.get("question") or DEFAULT_QUESTION
    name = (run if manifest else folder).resolve().name
    return Adapter(
        folder=folder,
        base=model.path,
        output=output,
        name=name,
        question=question,
        probes=list(manifest.get("probes") or ()) or by_itself(),
        run=run if manifest else None,
        sha256=_adapter_hash(folder),
    )


def _adapter_hash(folder: Path) -> str:
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UsageError(f"`{weights}` is missing", hint="give a run directory, or a whole adapter")
    return rundir.sha256_of(weights)


def _base_of_run(manifest: Mapping[str, Any]) -> str:
    """Give the folder that was trained on while it is there; else its name, which may be found again."""
    model = manifest["model"]
    return str(model["path"] if Path(model["path"]).is_dir() else model["name"])


def _base_of(folder: Path) -> str:
    try:
        settings: Mapping[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        return str(settings["base_model_name_or_path"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UsageError(
            f"`{folder}/adapter_config.json` is damaged: {error}", hint="give the run it came from"
        ) from error


def _targets(config: ExportConfig, adapter: Adapter) -> dict[str, Path]:
    """Name the files to write."""
    if config.format == "safetensors":
        return {"safetensors": adapter.output / "safetensors"}
    kinds = config.quantization or (DEFAULT_QUANTIZATION,)
    return {kind: adapter.output / f"{adapter.name}-{kind}.gguf" for kind in kinds}


# Beside the exported files: from which adapter each came, its hash, and what it answered.
RECORDS = "exports.json"


def _records(adapter: Adapter) -> dict[str, Any]:
    """Read what earlier calls wrote down; nothing where that cannot be read."""
    try:
        return json.loads((adapter.output / RECORDS).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _refuse_others(adapter: Adapter, targets: Mapping[str, Path], *, verify: bool) -> dict[str, Exported]:
    """Refuse to write over files, and give those that an earlier call made of this very adapter, whole.

    One that was never verified is made again if it is to be.

    Raises:
        UsageError: If a file is there that is not one of them.
    """
    records = _records(adapter)
    done: dict[str, Exported] = {}
    for kind, target in targets.items():
        if not target.exists():
            continue
        record = records.get(target.name) or {}
        known = record.get("adapter") == adapter.sha256 and record.get("question") == adapter.question
        if not known or record.get("sha256") != _hash_of(target):
            raise UsageError(f"`{target}` is there already", hint="add `--overwrite`, or choose another `--output`")
        if record.get("verified") or not verify or kind == "safetensors":
            done[kind] = Exported(**record["told"])
    return done


def _record(adapter: Adapter, target: Path, beside: Path, told: Exported, *, verified: bool = False) -> None:
    """Write down what is about to stand at ``target``: the same command need not do it again."""
    records = _records(adapter)
    records[target.name] = {
        "adapter": adapter.sha256,
        "question": adapter.question,
        "sha256": _hash_of(beside),
        "verified": verified,
        "told": asdict(told),
    }
    rundir.write_text(adapter.output / RECORDS, json.dumps(records, indent=2) + "\n")


def _hash_of(target: Path) -> str:
    files = sorted(path for path in target.rglob("*") if path.is_file()) if target.is_dir() else [target]
    return " ".join(rundir.sha256_of(path) for path in files)


def _make_room(adapter: Adapter) -> None:
    """Make the folder for the files, and refuse a disk that is too small for the work."""
    try:
        adapter.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(
            f"`{adapter.output}` cannot be a folder: {error.strerror}", hint="choose another `--output`"
        ) from error
    weights = sum(path.stat().st_size for path in Path(adapter.base).glob("*.safetensors")) // 2
    need, free = weights * BYTES_PER_WEIGHT, device.disk_free_bytes(adapter.output)
    if free < need:
        raise DiskError(
            f"export writes up to {need / 2**20:,.0f} MiB to `{adapter.output}`, and {free / 2**20:,.0f} MiB are free",
            hint="make room, or `--output`",
        )


def _export_safetensors(adapter: Adapter, target: Path, config: ExportConfig, say: Sink) -> None:
    from backprop.engine import loop, merge

    loop.quieten()
    say(Phase(name="merging the adapter"))
    with rundir.whole(target) as folder:
        merge.merge(adapter.base, adapter.folder, folder, dtype="bfloat16", trust_remote_code=config.trust_remote_code)
        answer = merge.ask(folder, adapter.question, trust_remote_code=config.trust_remote_code)
        if not answer:
            raise ExportError("the exported model gave no answer", hint="ask another `--question`")
        told = Exported(
            path=str(target),
            format="safetensors",
            quantization="bf16",
            size_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            question=adapter.question,
            answer=answer,
        )
        _record(adapter, target, folder, told)
    say(told)


def _export_gguf(adapter: Adapter, targets: Mapping[str, Path], config: ExportConfig, say: Sink) -> None:
    from backprop.engine import loop, merge
    from backprop.engine.reference import refer
    from backprop.verbs.verify import Verifier, forget

    loop.quieten()
    for old in adapter.output.glob(f"*{REJECTED}"):
        if old.name.startswith(f"{adapter.name}-"):
            old.unlink()
    with TemporaryDirectory(prefix=f"{rundir.MARK}export-", dir=adapter.output) as scratch:
        checkpoint = Path(scratch) / "merged"
        say(Phase(name="merging the adapter"))
        model, tokenizer = merge.load_adapted(adapter.base, adapter.folder, trust_remote_code=config.trust_remote_code)
        verifier: Verifier | None = None
        if config.verify:
            say(Phase(name="asking the trained model what its copies will be asked"))
            reference = refer(model, tokenizer, adapter.probes)
            verifier = Verifier(reference, adapter.output, adapter_sha256=adapter.sha256, say=say)
        else:
            forget(adapter.output, targets)
        merge.write_merged(model, tokenizer, checkpoint)
        del model
        say(Phase(name="converting to GGUF"))
        # Quantizing starts from 16 bits or more; a file that is wanted as it is serves as the source too.
        source = Path(scratch) / "f16.gguf"
        llama_cpp.convert(checkpoint, source, kind="f16")
        if verifier:
            verifier.check_source(source, adapter.output / f"{adapter.name}-f16.gguf{REJECTED}")
        for kind, target in targets.items():
            say(Phase(name=f"writing {kind}"))
            with rundir.whole(target) as beside:
                if kind == "f16":
                    beside.hardlink_to(source)
                elif kind in llama_cpp.CONVERTED:
                    llama_cpp.convert(checkpoint, beside, kind=kind)
                else:
                    llama_cpp.quantize(source, beside, quantization=kind)
                if verifier:
                    verifier.check(kind, beside, target.with_name(target.name + REJECTED))
                answer = llama_cpp.ask(beside, [[{"role": "user", "content": adapter.question}]])[0]
                if not answer.text:
                    raise ExportError(
                        f"the {kind} file gave no answer to {adapter.question!r}",
                        hint="ask another `--question`, or train longer",
                    )
                told = Exported(
                    path=str(target),
                    format="gguf",
                    quantization=kind,
                    size_bytes=beside.stat().st_size,
                    question=adapter.question,
                    answer=answer.text,
                )
                _record(adapter, target, beside, told, verified=config.verify)
            say(told)
