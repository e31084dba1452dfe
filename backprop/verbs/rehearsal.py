"""The rehearsal: all that a run will do, on a small copy of the model, so that hours never end in an export that cannot be."""

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from backprop.config import TrainConfig
from backprop.core.plan import Choice
from backprop.edges import llama_cpp, rundir
from backprop.edges.hub import ModelSource
from backprop.errors import BackpropError, ToolError, TrainingError
from backprop.events import Event, Phase, Proved, Resumed, Sink, Warned
from backprop.verbs.adapter import train_one
from backprop.verbs.prepare import Prepared

STEPS, EXAMPLES = 3, 8
QUANTIZATION = "q4_k_m"


def rehearse(config: TrainConfig, prepared: Prepared, *, say: Sink) -> None:
    """Train, merge, convert, quantize and ask a copy with two layers and random weights.

    Raises:
        BackpropError: Of the kind that the run itself would have ended with.
    """
    started = time.monotonic()
    say(Phase(name="rehearsing on a small copy of the model"))
    with TemporaryDirectory(prefix="backprop-rehearsal-") as room:
        try:
            done = _rehearse_in(Path(room), config, prepared, say)
        except BackpropError as error:
            error.message = f"the rehearsal failed, before any training: {error.message}"
            raise
    seconds = round(time.monotonic() - started, 1)
    say(Proved(name="the rehearsal went through", ok=True, found=done, seconds=seconds))


def _rehearse_in(room: Path, config: TrainConfig, prepared: Prepared, say: Sink) -> str:
    from backprop.engine import merge
    from backprop.engine.rehearsal import write_small_copy

    write_small_copy(
        prepared.model.path, room / "model", prepared.tokenizer, trust_remote_code=config.trust_remote_code
    )
    examples = tuple(sorted(prepared.train.examples, key=lambda example: len(example.ids))[:EXAMPLES])
    small = replace(
        prepared,
        model=ModelSource(name="rehearsal", path=str(room / "model"), sha256=""),
        train=replace(prepared.train, examples=examples),
        held_out=(),
        plan=replace(prepared.plan, steps=Choice(STEPS, "rehearsal"), batch_size=Choice(2, "rehearsal")),
    )
    # The copy has learnt nothing: what it knows proves nothing.
    quick = replace(config, skip_proofs=True, early_stopping=None, save_steps=1, keep_checkpoints=STEPS, resume="auto")
    train_one(quick, small, output=room, say=_silent)
    rundir.remove(room / "checkpoints" / f"step-{STEPS:06d}")
    resumed: list[Event] = []
    train_one(quick, small, output=room, say=resumed.append)
    if [event.step for event in resumed if isinstance(event, Resumed)] != [STEPS - 1]:
        raise TrainingError("the small copy did not go on from its checkpoint", hint="please report it")
    merge.merge(str(room / "model"), room / "lora", room / "merged", trust_remote_code=config.trust_remote_code)
    try:
        llama_cpp.converter()
        llama_cpp.bindings()
    except ToolError as error:
        say(Warned(message=f"the way to a GGUF was not rehearsed: {error.message}"))
        return f"{STEPS} steps, a checkpoint, going on from it, and the merge"
    llama_cpp.convert(room / "merged", room / "f16.gguf", kind="f16")
    llama_cpp.quantize(room / "f16.gguf", room / "small.gguf", quantization=QUANTIZATION)
    llama_cpp.ask(room / "small.gguf", [[{"role": "user", "content": "Hello?"}]])
    return (
        f"{STEPS} steps, a checkpoint, going on from it, the merge, a GGUF, {QUANTIZATION}, and a question to llama.cpp"
    )


def _silent(event: Event) -> None:
    pass
