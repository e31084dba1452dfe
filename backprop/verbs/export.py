"""`backprop export`: from an adapter to a file that runs, asked once before success is claimed."""

import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import backprop
from backprop.config import ExportConfig
from backprop.edges import device, llama_cpp, network, rundir, stopping
from backprop.errors import BackpropError, DiskError
from backprop.events import Event, Exported, Failed, Phase, Registered, RunFinished, RunStarted, Sink, tee
from backprop.verbs import bases, budget, gguf, importance
from backprop.verbs.gguf import export_gguf, target_of
from backprop.verbs.lora_gguf import export_lora_gguf
from backprop.verbs.records import answered, known_choice, record, refuse_others
from backprop.verbs.register import destination, register
from backprop.verbs.source import Adapter, find_adapter
from backprop.verbs.verify import REJECTED, room_for, verifier_for

if TYPE_CHECKING:
    from backprop.engine.four_bit import Rounding
    from backprop.engine.load import HfTokenizer

# Per weight: the 16-bit GGUF, where one is needed, and beside it a file of each kind; of others less than 1.
SOURCE_BYTES = 2
BYTES_OF_SPLIT = 2
BYTES_OF = {"f32": 4, "f16": 0, "bf16": 2, "safetensors": 0, "q8_0": 1.1}
DEFAULT_QUANTIZATION = "q4_k_m"
DEFAULT_OF_ADAPTERS = "f16"


def export(source: Path, config: ExportConfig, *, say: Sink) -> list[Path]:
    """Export an adapter or a run directory.

    Returns:
        The files that were written; folders of safetensors, or of a GGUF that is split.

    Raises:
        UsageError: If ``source`` is neither, or a file of that name is there already.
        ExportError: If a step fails, or the exported model gives no answer.
        Stopped: If the time of `--max-minutes` is over.
    """
    with network.limited(offline=config.offline), stopping.time_limit(config.max_minutes):
        return _export(source, config, say)


def _export(source: Path, config: ExportConfig, say: Sink) -> list[Path]:
    started = time.monotonic()
    adapter = find_adapter(source, config, say=say)
    rundir.refuse_links(adapter.run or adapter.folder)
    targets = _targets(config, adapter)
    if config.format != "safetensors":
        llama_cpp.converter()
        llama_cpp.bindings()
    importance.refuse_early(adapter, config)
    budget.refuse_early(adapter, config)
    gguf.refuse_early(adapter, targets, config)
    where = destination(config, adapter)
    # Two files that `--budget` tries stand beside each other.
    _make_room(adapter, list(targets) or ["tried", "tried"], config)
    with ExitStack() as stack:
        for folder in {adapter.output.resolve(), *([adapter.run.resolve()] if adapter.run else [])}:
            stack.enter_context(rundir.locked(folder))
        rundir.sweep(adapter.output)
        # What `--budget` may choose is not known yet: no file of any type may be another's.
        may_be = targets or {kind: target_of(kind, adapter, config) for kind in budget.MAY_CHOOSE}
        done = {} if config.overwrite else refuse_others(adapter, may_be, config, all_written=bool(targets))
        done = {kind: exported for kind, exported in done.items() if kind in targets}
        if adapter.run is not None and os.access(adapter.run, os.W_OK):
            log = stack.enter_context(rundir.event_log(adapter.run))
            stack.enter_context(_told_to_the_end(log))
            say = tee(say, log)
        say = _unless_time_is_over(say)
        say(RunStarted(command="export", output=str(adapter.output), version=backprop.__version__))
        for exported in done.values():
            say(exported)
        missing = {kind: path for kind, path in targets.items() if kind not in done}
        if missing or not targets:
            targets = {**targets, **_write(adapter, missing, config, say)}
        if where:
            register(where, next(iter(targets.values())), adapter, config=config, say=say)
        seconds = round(time.monotonic() - started, 1)
        result = {"files": [str(path) for path in targets.values()]}
        stopping.finished()
        say(RunFinished(command="export", output=str(adapter.output), seconds=seconds, result=result))
    return list(targets.values())


def _write(adapter: Adapter, targets: Mapping[str, Path], config: ExportConfig, say: Sink) -> Mapping[str, Path]:
    try:
        if config.format == "gguf":
            return export_gguf(adapter, targets, config, say)
        if config.format == "lora-gguf":
            export_lora_gguf(adapter, targets, config, say)
        else:
            _export_safetensors(adapter, targets["safetensors"], config, say)
        return targets
    except Exception as error:
        told = rundir.disk_error(adapter.output, error)
        if told is None or isinstance(error, DiskError):
            raise
        raise told from error


def _unless_time_is_over(say: Sink) -> Sink:
    """Let each event be an instant at which `--max-minutes` is heard, also in threads, where no alarm rings."""

    def checked(event: Event) -> None:
        say(event)
        # What is whole and told may have been the last: the work that follows says so itself, and is stopped then.
        if not isinstance(event, Exported | Registered):
            stopping.check()

    return checked


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


def _targets(config: ExportConfig, adapter: Adapter) -> dict[str, Path]:
    """Name the files to write; none where `--budget` is to choose yet."""
    if config.format == "safetensors":
        return {"safetensors": adapter.output / "safetensors"}
    if config.format == "lora-gguf":
        kinds = config.quantization or (DEFAULT_OF_ADAPTERS,)
        return {f"lora-{kind}": adapter.output / f"{adapter.name}-lora-{kind}.gguf" for kind in kinds}
    kinds = config.quantization or (DEFAULT_QUANTIZATION,)
    if config.budget:
        kinds = [kind for kind in [known_choice(adapter, config)] if kind]
    return {kind: target_of(kind, adapter, config) for kind in kinds}


def _make_room(adapter: Adapter, kinds: Sequence[str], config: ExportConfig) -> None:
    """Make the folder for the files, and refuse a disk that is too small for the work."""
    try:
        adapter.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(
            f"`{adapter.output}` cannot be a folder: {error.strerror}", hint="choose another `--output`"
        ) from error
    from backprop.engine.streamed import size_of, why_not

    base = Path(adapter.base)
    files = sum(BYTES_OF.get(kind, 1) for kind in kinds) + (BYTES_OF_SPLIT if config.split_size else 0)
    source = SOURCE_BYTES if config.format != "gguf" or gguf.keeps_source(kinds, config) else 0
    in_memory = BYTES_OF["f32"] if why_not(base, adapter.folder) else 0
    need = size_of(base)[0] * (source + files + in_memory)
    free = device.disk_free_bytes(adapter.output)
    if free < need:
        raise DiskError(
            f"export writes up to {need / 2**20:,.0f} MiB to `{adapter.output}`, and {free / 2**20:,.0f} MiB are free",
            hint="make room, or `--output`",
        )


def _export_safetensors(adapter: Adapter, target: Path, config: ExportConfig, say: Sink) -> None:
    from backprop.engine import loop
    from backprop.engine.merge import adapted_tokenizer
    from backprop.engine.reference import Checkpoint

    loop.quieten(data=False)
    rejected = target.with_name(target.name + REJECTED)
    rundir.remove(rejected)
    rounding = bases.nearest_base(adapter, config, say)
    tokenizer = adapted_tokenizer(adapter.folder, trust_remote_code=config.trust_remote_code)
    verifier = verifier_for(adapter, tokenizer, ["safetensors"], config, say, rounding=rounding)
    with rundir.whole(target) as folder:
        _write_checkpoint(adapter, tokenizer, folder, rounding, config, say)
        model = Checkpoint(folder, room_for(folder), trust_remote_code=config.trust_remote_code)
        if verifier:
            verifier.check_checkpoint(folder, model, rejected)
        answer = model.reply([{"role": "user", "content": adapter.question}]).text
        told = answered(adapter, answer, target, folder, rejected, format="safetensors", quantization="bf16")
        record(adapter, target, folder, told, config, base=bases.name_of(rounding, adapter, config))
    say(told)


def _write_checkpoint(
    adapter: Adapter,
    tokenizer: "HfTokenizer",
    folder: Path,
    rounding: "Rounding | None",
    config: ExportConfig,
    say: Sink,
) -> None:
    from backprop.engine import merge, streamed

    base, trust = Path(adapter.base), config.trust_remote_code
    why_not = streamed.why_not(base, adapter.folder, rounding)
    say(Phase(name=f"merging the adapter{' in memory: ' if why_not else ''}{why_not}"))
    if why_not:
        merge.merge(
            adapter.base,
            adapter.folder,
            tokenizer,
            folder,
            dtype="bfloat16",
            rounding=rounding,
            trust_remote_code=trust,
        )
    else:
        merger = streamed.Merger(base, adapter.folder, rounding=rounding, trust_remote_code=trust)
        streamed.lay_out(base, tokenizer, folder)
        streamed.write_weights(base, merger, folder)
