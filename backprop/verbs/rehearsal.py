"""The rehearsal: all that a run will do, on a small copy of the model, so that hours never end in an export that cannot be."""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from heapq import nsmallest
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from backprop.config import ExportConfig, TrainConfig
from backprop.core.choice import Choice
from backprop.core.duration import choose_rehearsal
from backprop.edges import llama_cpp, rundir
from backprop.edges.hub import ModelSource
from backprop.errors import BackpropError, ModelError, ToolError, TrainingError
from backprop.events import Event, Phase, Proved, Resumed, Sink, Warned
from backprop.verbs.adapter import train_one
from backprop.verbs.gguf import lay_out, program
from backprop.verbs.prepare import Prepared
from backprop.verbs.source import Adapter

MARK = "backprop-rehearsal-"
STEPS, EXAMPLES = 3, 8
QUANTIZATION = "q4_k_m"
NAME = "the rehearsal went through"


def rehearse_if_due(config: TrainConfig, parts: Sequence[Prepared], *, goes_on: bool, say: Sink) -> None:
    """Rehearse once what will take long or was asked for, and say why it is, or is not.

    Args:
        parts: The run, or all runs of a multi-run; the first is rehearsed.
        goes_on: Whether this run began before: then it was rehearsed if that was due.

    Raises:
        BackpropError: Of the kind that the run itself would have ended with.
    """
    due = choose_rehearsal(config, [part.seconds for part in parts], parts[0].hardware)
    if goes_on and (config.rehearse is None or _went_through(config.output)):
        say(Phase(name="no rehearsal: this run goes on"))
    elif not due.value:
        say(Phase(name=f"no rehearsal: {due.reason}"))
    elif config.dry_run and config.rehearse is None:
        say(Phase(name=f"a rehearsal would come first: {due.reason}"))
    else:
        _rehearse(config, parts[0], reason=due.reason, say=say)


def _went_through(run: Path) -> bool:
    return any(isinstance(event, Proved) and event.name == NAME for event in rundir.read_events(run))


def _rehearse(config: TrainConfig, prepared: Prepared, *, reason: str, say: Sink) -> None:
    """Train, merge, convert, quantize and ask a copy with two layers and random weights."""
    from backprop.engine import loop
    from backprop.engine.rehearsal import write_small_copy

    started = time.monotonic()
    say(Phase(name=f"rehearsing on a small copy of the model: {reason}"))
    path, code = prepared.model.path, config.trust_remote_code
    with _room() as room:
        try:
            write_small_copy(path, room / "model", prepared.tokenizer, trust_remote_code=code)
        except ModelError as error:
            if config.rehearse:
                raise
            say(Warned(message=f"not rehearsed: {error.message}"))
            return
        try:
            done = _rehearse_in(room, config, prepared, say)
        except BackpropError as error:
            error.message = f"the rehearsal failed, before any training: {error.message}"
            error.hint = "; ".join(filter(None, (error.hint, "to train all the same, add `--no-rehearse`")))
            raise
        except Exception as error:
            told = rundir.disk_error(room, error)
            if told is None:
                raise
            told.hint = "set TMPDIR to a folder on a larger disk, or add `--no-rehearse`"
            raise told from error
        finally:
            loop.release()
    seconds = round(time.monotonic() - started, 1)
    say(Proved(name=NAME, ok=True, found=done, seconds=seconds))


@contextmanager
def _room() -> Generator[Path]:
    """Give a temporary folder, and remove those of rehearsals that were killed."""
    for left in Path(gettempdir()).glob(f"{MARK}*"):
        with suppress(BackpropError, OSError), rundir.locked(left):
            rundir.remove(left)
    with TemporaryDirectory(prefix=MARK) as folder, rundir.locked(Path(folder)):
        yield Path(folder)


def _rehearse_in(room: Path, config: TrainConfig, prepared: Prepared, say: Sink) -> str:
    from backprop.engine import merge

    examples = tuple(nsmallest(EXAMPLES, prepared.train.examples, key=lambda example: len(example.ids)))
    small = replace(
        prepared,
        model=ModelSource(name="rehearsal", path=str(room / "model"), sha256=""),
        train=replace(prepared.train, examples=examples),
        held_out=(),
        plan=replace(
            prepared.plan,
            steps=Choice(STEPS, "rehearsal"),
            batch_size=Choice(2, "rehearsal"),
            gpus=Choice(min(2, prepared.plan.gpus.value), "rehearsal"),
            compile=Choice(False, "rehearsal"),  # of other widths, it would serve nothing that follows
            fp8_backward=Choice(False, "rehearsal"),
            to_try=(),  # what is the fastest for the copy is not so for the model
        ),
    )
    # The copy has learnt nothing: what it knows proves nothing.
    quick = replace(
        config, report_to=(), skip_proofs=True, early_stopping=None, save_steps=1, keep_checkpoints=STEPS, resume="auto"
    )
    train_one(quick, small, output=room, say=_silent)
    rundir.remove(room / "checkpoints" / f"step-{STEPS:06d}")
    resumed: list[Event] = []
    train_one(quick, small, output=room, say=resumed.append)
    if [event.step for event in resumed if isinstance(event, Resumed)] != [STEPS - 1]:
        raise TrainingError("the small copy did not go on from its checkpoint", hint="please report it")
    code = config.trust_remote_code
    try:
        llama_cpp.converter()
        llama_cpp.bindings()
    except ToolError as error:
        tokenizer = merge.adapted_tokenizer(room / "lora", trust_remote_code=code)
        merge.merge(str(room / "model"), room / "lora", tokenizer, room / "merged", trust_remote_code=code)
        say(Warned(message=f"the way to a GGUF was not rehearsed: {error.message}: `{error.hint}`"))
        return f"{STEPS} steps, a checkpoint, going on from it, and the merge"
    adapter, exported = _adapter_in(room), ExportConfig(trust_remote_code=code)
    inputs, through = lay_out(adapter, room, exported, _silent), program(adapter, room, exported)
    llama_cpp.convert(inputs.folder, room / "f16.gguf", kind="f16", through=through)
    llama_cpp.quantize(room / "f16.gguf", room / "small.gguf", quantization=QUANTIZATION)
    llama_cpp.ask(room / "small.gguf", [[{"role": "user", "content": "Hello?"}]])
    return (
        f"{STEPS} steps, a checkpoint, going on from it, the merge, a GGUF, {QUANTIZATION}, and a question to llama.cpp"
    )


def _adapter_in(room: Path) -> Adapter:
    return Adapter(
        folder=room / "lora",
        base=str(room / "model"),
        base_as_found=str(room / "model"),
        base_name=str(room / "model"),
        data_sha256=None,
        output=room,
        name="rehearsal",
        question="Hello?",
        probes=[],
        run=None,
        sha256="",
    )


def _silent(event: Event) -> None:
    pass
