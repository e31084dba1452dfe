"""`backprop multi-run`: a fold over train, merged after each run. What is delivered is the merged adapter."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from backprop.config import MergeMode, MultiRunConfig, TrainConfig
from backprop.core import slao
from backprop.core.data.formats import Conversation, Judged, judge
from backprop.edges import rundir
from backprop.events import Eval, Phase, RunMerged, Sink, Warned
from backprop.verbs.session import running
from backprop.verbs.train import (
    Prepared,
    fingerprint_of,
    first_question,
    prepare,
    read_data,
    rows_of,
    show_examples,
    train_one,
)

DEFAULT_RUNS = 5
# Examples that a part is measured on: enough to tell a loss to about a hundredth, few enough to cost little.
MOST_EVALUATED = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one run trains on, and what it holds out."""

    judged: Judged
    held_out: tuple[Conversation, ...]


def multi_run(config: TrainConfig, options: MultiRunConfig, *, say: Sink) -> Path:
    """Train run after run and deliver one merged adapter.

    Returns:
        The run directory; the merged adapter is in its `lora/`, each run's own in `runs/NNN/lora/`.
    """
    parts = parts_of(config, options)
    mode = options.merge_mode or ("slao" if len(config.data) > 1 else "sequential")
    if config.dry_run:
        _show_first_part(config, parts, mode, say=say)
        return config.output
    everything = [row for part in parts for row in (*part.judged.conversations, *part.held_out)]
    with running(
        config, command="multi-run", fingerprint=fingerprint_of(everything), say=say, extra=options
    ) as session:
        if len(config.data) == 1 and mode == "slao":
            session.say(
                Warned(message="on chunks of one data set SLAO neither helps nor hurts; `sequential` is simpler")
            )
        result = _fold(config, options, parts, mode, session)
        session.finish(result)
    return config.output


def _show_first_part(config: TrainConfig, parts: Sequence[Part], mode: MergeMode, *, say: Sink) -> None:
    prepared = prepare(config, parts[0].judged, parts[0].held_out, say=say)
    rows = ", ".join(str(len(part.judged.conversations)) for part in parts)
    say(
        Warned(
            message=f"dry run: nothing was trained; {len(parts)} runs on {rows} rows, merged by {mode}; of the first:\n"
            f"{show_examples(prepared)}"
        )
    )


def parts_of(config: TrainConfig, options: MultiRunConfig) -> list[Part]:
    """Cut the data into one part per run: each `--data` in turn, or chunks of the only one."""
    if len(config.data) > 1:
        runs = options.runs or len(config.data)
        sources = [config.data[number % len(config.data)] for number in range(runs)]
        return [_part(dataclasses.replace(config, data=(source,)), options.samples) for source in sources]
    runs = options.runs or DEFAULT_RUNS
    source = next(iter(config.data))
    wanted = runs * options.samples if options.samples else None
    judged = judge(islice(rows_of(source), wanted))
    rows = list(judged.conversations)
    random.Random(config.seed).shuffle(rows)
    size = max(1, len(rows) // runs)
    chunks = [rows[number * size : (number + 1) * size] for number in range(runs)]
    return [
        Part(judged=dataclasses.replace(judged, conversations=tuple(chunk)), held_out=()) for chunk in chunks if chunk
    ]


def _part(config: TrainConfig, samples: int | None) -> Part:
    judged, held_out = read_data(config)
    rows = judged.conversations if samples is None else judged.conversations[:samples]
    return Part(judged=dataclasses.replace(judged, conversations=rows), held_out=held_out)


def _fold(
    config: TrainConfig, options: MultiRunConfig, parts: Sequence[Part], mode: MergeMode, session: Any
) -> Mapping[str, Any]:
    from backprop.engine import load, loop

    state: slao.MergeState | None = None
    prepared: list[Prepared] = []
    scores: list[list[float]] = []
    for number, part in enumerate(parts, start=1):
        seeded = dataclasses.replace(config, seed=config.seed + number - 1)
        prepared.append(prepare(seeded, part.judged, part.held_out, say=session.say))
        question = first_question(parts[0].judged.conversations)
        session.record(model=prepared[0].model, plan=prepared[0].plan, question=question)
        start = slao.next_start(state.fine_tuned, init=options.init) if state else None
        folder = config.output / "runs" / f"{number:03d}"
        model, _ = train_one(seeded, prepared[-1], output=folder, say=session.say, start=start, run=number)
        state = slao.step(state, load.adapter_state(model), mode=mode)
        session.say(RunMerged(run=number, num_runs=len(parts), num_merges=state.num_merges, mode=mode))
        load.set_adapter_state(model, state.merged)
        with rundir.whole(config.output / "lora") as merged:
            load.save_adapter(model, prepared[0].tokenizer, merged)
        session.say(Phase(name="evaluating the merged adapter on every part so far"))
        scores.append([])
        for index, seen in enumerate(prepared, start=1):
            examples = (seen.held_out or seen.train.examples)[:MOST_EVALUATED]
            loss = loop.mean_loss(model, examples, batch_size=seen.plan.micro_batch.value)
            session.say(Eval(step=0, loss=loss, part=f"part {index}", run=number))
            scores[-1].append(loss)
    return {"runs": len(parts), "merge_mode": mode, "loss_by_run_and_part": scores}
