"""What each run of a multi-run trains on, and what it holds out."""

import functools
import random
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from backprop.config import MultiRunConfig, TrainConfig
from backprop.core.data.formats import Conversation
from backprop.core.data.inspect import identity
from backprop.core.data.judge import Judged
from backprop.core.data.replay import with_replay
from backprop.core.data.sequences import pick
from backprop.core.data.split import hold_out
from backprop.errors import DataError, UsageError
from backprop.verbs.prepare import check_held_out, judge_rows, read_data, rows_of

DEFAULT_RUNS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one run trains on, and what it holds out."""

    name: str
    judged: Judged
    held_out: Sequence[Conversation]


def parts_of(config: TrainConfig, options: MultiRunConfig) -> list[Part]:
    """Cut the data into one part per run: each `--data` in turn, or chunks of the only one; with `--replay`, rows of
    earlier parts among those of each.

    Raises:
        UsageError: If there are not as many `--eval-data` as `--data`, or fewer runs than these.
        DataError: If there are fewer rows than runs.
    """
    if config.eval_data and len(config.eval_data) != len(config.data):
        raise UsageError(
            f"{len(config.data)} `--data` and {len(config.eval_data)} `--eval-data` are given",
            hint="give one `--eval-data` for each `--data`, in the same order",
        )
    if options.runs and options.runs < len(config.data):
        raise UsageError(
            f"`--runs {options.runs}` would leave out {len(config.data) - options.runs} of {len(config.data)} `--data`",
            hint="leave `--runs` out, or leave out the `--data`",
        )
    parts = _sources(config, options) if len(config.data) > 1 else _chunks(config, options)
    rows = [part.judged.conversations for part in parts]
    mixed = [
        with_replay(rows[: number + 1], share=options.replay, seed=config.seed + number) for number in range(len(parts))
    ]
    return [
        replace(part, judged=replace(part.judged, conversations=more, replayed=len(more) - len(own)))
        for part, own, more in zip(parts, rows, mixed, strict=True)
    ]


def leaks(parts: Sequence[Part], general: Sequence[Conversation]) -> list[str]:
    """Say which rows are held out of one part, or in no part, and trained on in another: to know these is no memory."""
    # Data that comes again holds out the same rows. What it trains on of them, the data ledger tells.
    measured = {id(part.held_out): (f"part {part.name}", part.held_out) for part in reversed(parts)}
    measured[id(general)] = ("general", general)
    owners: defaultdict[int, list[int]] = defaultdict(list)
    for owner, (_, rows) in measured.items():
        for digest in {identity(row) for row in rows}:
            owners[digest].append(owner)
    trained: defaultdict[int, dict[int, str]] = defaultdict(dict)
    for part in parts if owners else ():
        rows = part.judged.conversations
        for digest in map(identity, islice(rows, len(rows) - part.judged.replayed)):
            for owner in owners.get(digest, ()):
                if owner != id(part.held_out):
                    trained[owner].setdefault(digest, part.name)
    return [
        f"{len(found)} evaluation rows of {measured[owner][0]} are trained on, first in part {next(iter(found.values()))}: "
        "its scores would flatter"
        for owner, found in trained.items()
    ]


def _sources(config: TrainConfig, options: MultiRunConfig) -> list[Part]:
    evaluation = config.eval_data or [None] * len(config.data)
    sources = list(zip(config.data, evaluation, strict=True))

    @functools.cache
    def read(data: str, held_out: str | None) -> tuple[Judged, Sequence[Conversation]]:
        one = replace(config, data=(data,), eval_data=(held_out,) if held_out else ())
        return read_data(one, most=options.samples)

    parts: list[Part] = []
    for number, source in enumerate(islice(cycle(sources), options.runs or len(sources)), start=1):
        judged, held_out = read(*source)
        parts.append(Part(name=f"{number} {Path(source[0]).name}", judged=judged, held_out=held_out))
    return parts


def _chunks(config: TrainConfig, options: MultiRunConfig) -> list[Part]:
    runs = options.runs or DEFAULT_RUNS
    wanted = runs * options.samples if options.samples else None
    judged = judge_rows(islice(rows_of(config.data[0], offline=config.offline), wanted), config)
    numbers = array("I", range(len(judged.conversations)))
    if len(numbers) < runs:
        raise DataError(
            f"{len(numbers)} rows cannot be cut into {runs} runs", hint=f"give `--runs {len(numbers)}` or less"
        )
    random.Random(config.seed).shuffle(numbers)
    evaluation = [judge_rows(rows_of(source, offline=config.offline), config) for source in config.eval_data]
    parts: list[Part] = []
    for number in range(runs):
        kept = pick(judged.conversations, numbers[number::runs])
        held_out: Sequence[Conversation] = evaluation[0].conversations if evaluation else ()
        if not evaluation:
            kept, held_out = hold_out(kept, fraction=config.eval_fraction)
            check_held_out(config, held_out)
        share = replace(judged, conversations=kept, characters=judged.characters // runs)
        parts.append(Part(name=f"{number + 1} chunk", judged=share, held_out=held_out))
    return parts
