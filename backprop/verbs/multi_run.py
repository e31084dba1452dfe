"""`backprop multi-run`: a fold over train, merged after each run. What is delivered is the merged adapter."""

import dataclasses
import json
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.config import ONLY_OF_TRAIN, MergeMode, MultiRunConfig, TrainConfig
from backprop.core import slao
from backprop.core.data.formats import Conversation
from backprop.core.data.judge import Judged
from backprop.core.data.sequences import pick
from backprop.core.data.split import hold_out
from backprop.edges import network, rundir, stopping
from backprop.errors import DataError, UsageError
from backprop.events import JSON, Eval, Phase, Resumed, RunMerged, Sink, Warned
from backprop.verbs.adapter import measures, train_one
from backprop.verbs.prepare import (
    Prepared,
    check_held_out,
    fingerprint_of,
    first_question,
    judge_rows,
    prepare,
    probes_of,
    read_data,
    rows_of,
    show_examples,
)
from backprop.verbs.rehearsal import rehearse_if_due
from backprop.verbs.session import running
from backprop.verbs.train import check_disk, check_packages

if TYPE_CHECKING:
    from backprop.engine.batches import PassSize

DEFAULT_RUNS = 5
# Examples that a part is measured on: enough to tell a loss to about a hundredth, few enough to cost little.
MOST_EVALUATED = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one run trains on, and what it holds out."""

    judged: Judged
    held_out: Sequence[Conversation]


def multi_run(config: TrainConfig, options: MultiRunConfig, *, say: Sink) -> Path:
    """Train run after run and deliver one merged adapter.

    Returns:
        The run directory; the merged adapter is in its `lora/`, each run's own in `runs/NNN/lora/`.
    """
    with network.limited(offline=config.offline), stopping.time_limit(config.max_minutes):
        return _multi_run(config, options, say)


def _multi_run(config: TrainConfig, options: MultiRunConfig, say: Sink) -> Path:
    check_packages(config)
    if config.resume not in ("auto", "never"):
        raise UsageError("`--resume FOLDER` is for train", hint="`--resume auto` goes on where the runs were stopped")
    for one in dataclasses.fields(config):
        if one.name in ONLY_OF_TRAIN and getattr(config, one.name) != one.default:
            flag = f"--{one.name.replace('_', '-')}"
            raise UsageError(f"`{flag}` is for train", hint=ONLY_OF_TRAIN[one.name])
    if config.method == "full":
        raise UsageError("multi-run merges adapters, and `--method full` trains none", hint="add `--method lora`")
    parts = parts_of(config, options)
    mode = options.merge_mode or ("slao" if len(config.data) > 1 else "sequential")
    everything = (row for part in parts for row in chain(part.judged.conversations, part.held_out))
    with running(
        config, command="multi-run", fingerprint=fingerprint_of(everything), say=say, extra=options
    ) as session:
        if session.done:
            session.end_again()
            return config.output
        if len(config.data) == 1 and mode == "slao":
            session.say(
                Warned(message="on chunks of one data set SLAO neither helps nor hurts; `sequential` is simpler")
            )
        prepared = [
            prepare(seeded(config, number), part.judged, part.held_out, say=session.say)
            for number, part in enumerate(parts)
        ]
        first = prepared[0]
        if config.dry_run:
            rows = [len(part.judged.conversations) for part in parts]
            session.say(Phase(name=f"{len(parts)} runs on {rows} rows, merged by {mode}"))
            session.say(show_examples(first))
        else:
            check_disk(config, prepared)
        rehearse_if_due(config, prepared, goes_on=session.goes_on, say=session.say)
        if config.dry_run:
            session.finish({"dry_run": True})
            return config.output
        conversations = parts[0].judged.conversations
        session.claim(first, question=first_question(conversations), probes=probes_of(conversations, first.tokenizer))
        session.finish(_fold(config, options, prepared, mode, say=session.say))
    return config.output


def seeded(config: TrainConfig, number: int) -> TrainConfig:
    """Give each run a seed of its own, counted on from the first."""
    return dataclasses.replace(config, seed=(config.seed + number) % 2**32)


def parts_of(config: TrainConfig, options: MultiRunConfig) -> list[Part]:
    """Cut the data into one part per run: each `--data` in turn, or chunks of the only one.

    Raises:
        DataError: If there are fewer rows than runs.
    """
    if len(config.data) > 1:
        runs = options.runs or len(config.data)
        sources = [config.data[number % len(config.data)] for number in range(runs)]
        return [_part(dataclasses.replace(config, data=(source,)), options.samples) for source in sources]
    runs = options.runs or DEFAULT_RUNS
    source = next(iter(config.data))
    wanted = runs * options.samples if options.samples else None
    judged = judge_rows(islice(rows_of(source, offline=config.offline), wanted), config)
    numbers = array("I", range(len(judged.conversations)))
    if len(numbers) < runs:
        raise DataError(
            f"{len(numbers)} rows cannot be cut into {runs} runs", hint=f"give `--runs {len(numbers)}` or less"
        )
    random.Random(config.seed).shuffle(numbers)
    parts: list[Part] = []
    for number in range(runs):
        chunk = pick(judged.conversations, numbers[number::runs])
        kept, held_out = hold_out(chunk, fraction=config.eval_fraction)
        check_held_out(config, held_out)
        share = dataclasses.replace(judged, conversations=kept, characters=judged.characters // runs)
        parts.append(Part(judged=share, held_out=held_out))
    return parts


def _part(config: TrainConfig, samples: int | None) -> Part:
    judged, held_out = read_data(config)
    rows = judged.conversations if samples is None else judged.conversations[:samples]
    return Part(judged=dataclasses.replace(judged, conversations=rows), held_out=held_out)


def _fold(
    config: TrainConfig,
    options: MultiRunConfig,
    parts: Sequence[Prepared],
    mode: MergeMode,
    *,
    say: Sink,
) -> Mapping[str, JSON]:
    from backprop.engine import load, loop

    state: slao.MergeState | None = None
    scores: list[list[float]] = []
    for number, part in enumerate(parts, start=1):
        folder = config.output / "runs" / f"{number:03d}"
        measured = folder / "metrics.json"
        if measured.is_file():
            state = slao.step(state, load.read_adapter(folder / "lora"), mode=mode)
            scores.append(json.loads(measured.read_text())["scores"])
            say(Resumed(step=0, path=str(folder), run=number + 1))
            continue
        start = slao.next_start(state.fine_tuned, init=options.init) if state else None
        model, fit = train_one(seeded(config, number - 1), part, output=folder, say=say, start=start, run=number)
        state = slao.step(state, load.adapter_state(model), mode=mode)
        say(RunMerged(run=number, num_runs=len(parts), mode=mode))
        load.set_adapter_state(model, state.merged)
        with rundir.whole(config.output / "lora") as merged:
            load.save_adapter(model, part.tokenizer, merged)
        say(Phase(name="evaluating the merged adapter on every part so far"))
        scores.append(
            [
                _score(model, seen, index, number, fit.size, say=say)
                for index, seen in enumerate(parts[:number], start=1)
            ]
        )
        # Last: a run that has its figures is never done again.
        figures = {**measures(fit, folder), "losses": fit.losses, "scores": scores[-1]}
        rundir.write_text(measured, json.dumps(figures, indent=2) + "\n")
        rundir.remove(folder / "checkpoints")
        del model
        loop.release()
    delivered = rundir.sha256_of(config.output / "lora" / "adapter_model.safetensors")
    return {"runs": len(parts), "merge_mode": mode, "loss_by_run_and_part": scores, "adapter_sha256": delivered}


def _score(model: Any, part: Prepared, index: int, run: int, size: "PassSize", *, say: Sink) -> float:
    """Measure the loss on the held-out rows of a part; on its training rows, and saying so, where none are held out."""
    from backprop.engine.objectives import Supervised, measure

    examples = (part.held_out or part.train.examples)[:MOST_EVALUATED]
    loss = measure(model, examples, size, Supervised()).loss
    say(
        Eval(step=0, loss=loss, part=f"part {index}" if part.held_out else f"part {index} (its training rows)", run=run)
    )
    return loss
