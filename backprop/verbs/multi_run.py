"""`backprop multi-run`: a fold over train, merged after each run. What is delivered is the merged adapter."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.config import ONLY_OF_TRAIN, MergeMode, MultiRunConfig, RunSchedule, TrainConfig
from backprop.core import slao
from backprop.core.data.judge import Judged
from backprop.core.forgetting import Score, measure, over_trained
from backprop.core.plan import taken_over
from backprop.core.probes import first_question
from backprop.edges import network, rundir, stopping
from backprop.errors import DataError, TrainingError, UsageError
from backprop.events import JSON, Gated, Phase, Resumed, RunMerged, Sink, Warned
from backprop.verbs.adapter import measures, train_one
from backprop.verbs.engines import check_engine, with_faster_engine
from backprop.verbs.examples import show_examples
from backprop.verbs.forgetting import MOST_EVALUATED, Book, best_of
from backprop.verbs.parts import Part, leaks, parts_of
from backprop.verbs.prepare import (
    Prepared,
    fingerprint_of,
    judge_rows,
    prepare,
    probes_of,
    rows_of,
)
from backprop.verbs.rehearsal import rehearse_if_due
from backprop.verbs.session import CHOSEN, Session, running
from backprop.verbs.train import check_disk, check_packages

if TYPE_CHECKING:
    from backprop.engine.batches import PassSize
    from backprop.engine.loop import Fit


def multi_run(config: TrainConfig, options: MultiRunConfig, *, say: Sink) -> Path:
    """Train run after run and deliver one merged adapter.

    Returns:
        The run directory; the merged adapter is in its `lora/`, each run's own in `runs/NNN/lora/`.
    """
    with network.limited(offline=config.offline), stopping.time_limit(config.max_minutes):
        return _multi_run(config, options, say)


def _multi_run(config: TrainConfig, options: MultiRunConfig, say: Sink) -> Path:
    check_packages(config)
    check_engine(config)
    _check(config)
    parts = parts_of(config, options)
    lasting = _general_rows(config, options)
    mode = options.merge_mode or ("slao" if len(config.data) > 1 else "sequential")
    everything = chain(
        lasting.conversations, (row for part in parts for row in chain(part.judged.conversations, part.held_out))
    )
    with running(
        config, command="multi-run", fingerprint=fingerprint_of(everything), say=say, extra=options
    ) as session:
        if session.done:
            session.end_again()
            return config.output
        _advise(config, options, say=session.say)
        general = [f"general rows: {warning}" for warning in lasting.warnings]
        for warning in (*general, *leaks(parts, lasting.conversations)):
            session.say(Warned(message=warning))
        config, prepared = _prepared(config, options, parts, lasting, session)
        first = prepared[0]
        if config.dry_run:
            rows = [len(part.judged.conversations) for part in parts]
            session.say(Phase(name=f"{len(parts)} runs on {rows} rows, merged by {mode}"))
            session.say(show_examples(first))
        else:
            check_disk(config, prepared)
        prepared = with_faster_engine(config, prepared, say=session.say)
        first = prepared[0]
        rehearse_if_due(config, prepared, goes_on=session.goes_on, say=session.say)
        if config.dry_run:
            session.finish({"dry_run": True})
            return config.output
        held_out = [part.held_out for part in parts]
        rows = [part.judged.conversations for part in parts]
        probes = probes_of(held_out, rows, first.tokenizer)
        session.claim(first, question=first_question(*held_out, *rows), probes=probes)
        named = [(part.name, one) for part, one in zip(parts, prepared, strict=True)]
        fold = _Fold(config, options, named, mode, session.say)
        for number in range(1, len(parts) + 1):
            fold.run(number)
        session.finish(fold.result())
    return config.output


def _prepared(
    asked: TrainConfig, options: MultiRunConfig, parts: Sequence[Part], lasting: Judged, session: Session
) -> tuple[TrainConfig, list[Prepared]]:
    """Prepare every part, and give the configuration with what is chosen with the first, once for all runs."""
    prepared: list[Prepared] = []
    config, known = session.as_begun(asked)
    for number, part in enumerate(parts):
        if options.replay and number:
            old, rows = part.judged.replayed, len(part.judged.conversations)
            session.say(Phase(name=f"part {part.name}: {old} of {rows} rows are of earlier parts"))
        one = prepare(
            seeded(config, number),
            part.judged,
            part.held_out,
            gate_rows=() if number else lasting.conversations,
            rate_share=rate_share(options.schedule, number, len(parts)),
            known={**known, **session.ways_begun(asked, run_folder(session.directory, number + 1))},
            say=session.say,
        )
        if not number:
            config = dataclasses.replace(config, **{name: getattr(one.config, name) for name in CHOSEN})
            known = {**taken_over(asked, config, "as in the first run"), **known}
            check_rank(config, one)
        prepared.append(one)
    return config, prepared


def _general_rows(config: TrainConfig, options: MultiRunConfig) -> Judged:
    if not options.general_eval:
        return Judged(conversations=(), shapes={}, warnings=())
    in_turn = zip_longest(*(rows_of(source, offline=config.offline) for source in options.general_eval))
    rows = (row for one_of_each in in_turn for row in one_of_each if row is not None)
    try:
        return judge_rows(islice(rows, MOST_EVALUATED), config)
    except DataError as error:
        raise DataError(f"general rows: {error.message}", hint=error.hint) from error


def _check(config: TrainConfig) -> None:
    """Refuse what only `train` can do.

    Raises:
        UsageError: Naming the option.
    """
    if config.resume not in ("auto", "never"):
        raise UsageError("`--resume FOLDER` is for train", hint="`--resume auto` goes on where the runs were stopped")
    for one in dataclasses.fields(config):
        if one.name in ONLY_OF_TRAIN and getattr(config, one.name) != one.default:
            flag = f"--{one.name.replace('_', '-')}"
            raise UsageError(f"`{flag}` is for train", hint=ONLY_OF_TRAIN[one.name])
    if config.method == "full":
        raise UsageError("multi-run merges adapters, and `--method full` trains none", hint="add `--method lora`")


def check_rank(config: TrainConfig, prepared: Prepared) -> None:
    """Refuse a rank larger than a layer is wide, whose rows cannot be orthonormal, before any weights are loaded.

    Raises:
        UsageError: Naming the layer.
    """
    from backprop.engine.widths import narrowest_layer

    name, width = narrowest_layer(prepared.model.path, config) or ("", config.lora_r)
    if config.lora_r > width:
        raise UsageError(
            f"rank {config.lora_r} is larger than the width {width} of `{name}`",
            hint=f"give `--lora-r {width}` or less, or name wider layers alone by `--target-modules`",
        )


def _advise(config: TrainConfig, options: MultiRunConfig, *, say: Sink) -> None:
    if len(config.data) == 1 and options.merge_mode is None:
        say(Phase(name="chunks of one data set: merged by `sequential`, since SLAO neither helps nor hurts there"))
    elif len(config.data) == 1 and options.merge_mode == "slao":
        say(Phase(name="on chunks of one data set SLAO neither helps nor hurts; `sequential` is simpler"))
    elif len(config.data) > 1 and not options.replay:
        told = "a tenth of each run from rows of earlier parts keeps more than a merge alone: add `--replay 0.1`"
        say(Phase(name=told))


def seeded(config: TrainConfig, number: int) -> TrainConfig:
    """Give each run a seed of its own, counted on from the first."""
    return dataclasses.replace(config, seed=(config.seed + number) % 2**32)


def rate_share(schedule: RunSchedule, number: int, num_runs: int) -> float:
    """Give the share of the peak rate that a run has; the first, number 0, has all of it."""
    gone = number / num_runs
    return {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}[schedule]


def run_folder(directory: Path, number: int) -> Path:
    """Give where the run of this number has its own files; the first is 1."""
    return directory / "runs" / f"{number:03d}"


@dataclass
class _Fold:
    """The runs so far, and what they became."""

    config: TrainConfig
    options: MultiRunConfig
    parts: Sequence[tuple[str, Prepared]]
    mode: MergeMode
    say: Sink
    states: dict[float, slao.MergeState] = field(default_factory=dict[float, slao.MergeState])
    """By exponent of the merge weight: more than one where the best is to be chosen. All know the same last run."""
    settings: Mapping[str, object] | None = None
    """Of the first adapter."""
    finished: list[int] = field(default_factory=list[int])
    failed: dict[int, TrainingError] = field(default_factory=dict[int, TrainingError])
    delivered: tuple[int, str] | None = None
    """The last run whose merge forgot little enough, and the hash of its file."""

    def __post_init__(self) -> None:
        self.book = Book(self.config.output, self.say, choose=self.mode == "auto")

    def run(self, number: int) -> None:
        """Do a run, or take up what it did before; one whose training fails changes nothing."""
        folder = self._folder(number)
        measured = folder / "metrics.json"
        if measured.is_file():
            self._take_up(number, folder, _figures_in(measured))
            return
        figures: dict[str, Any]
        try:
            figures = self._train(number, folder)
        except TrainingError as error:
            figures = {"failed": error.message, "hint": error.hint}
            if error.details:
                rundir.write_text(folder / "crash.txt", error.details)
            self._note_failure(number, error)
        # A run that has its figures is never done again, and nothing is delivered before it has.
        rundir.write_text(measured, json.dumps(figures, indent=2) + "\n")
        rundir.remove(folder / "checkpoints")
        if "failed" not in figures:
            self._judge(number, figures["merged_sha256"])
            self._deliver()
        from backprop.engine import loop

        loop.release()

    def _folder(self, number: int) -> Path:
        return run_folder(self.config.output, number)

    def _take_up(self, number: int, folder: Path, figures: Mapping[str, Any]) -> None:
        from backprop.engine import load

        if "failed" in figures:
            self._note_failure(number, TrainingError(figures["failed"], hint=figures.get("hint")))
            return
        if figures.get("format") != FORMAT or not _is(folder / "lora", figures["adapter_sha256"]):
            raise UsageError(
                f"the adapter in `{folder}` is not what this run wrote, or of an earlier version of backprop",
                hint="choose another `--output`, or add `--overwrite`",
            )
        self._check_settings(folder)
        self._step(load.read_adapter(folder / "lora"), parent=figures["parent"] or "")
        if figures["general"]:
            self.book.general_before = Score(**figures["general_before"])
            self.book.general.append(Score(**figures["general"]))
        self.finished.append(number)
        self.book.enter(self.parts[number - 1][0], number, [Score(**one) for one in figures["scores"]])
        self._judge(number, figures["merged_sha256"])
        self.say(Resumed(step=0, path=str(folder), run=number + 1))

    def _note_failure(self, number: int, error: TrainingError) -> None:
        self.failed[number] = error
        hint = f" ({error.hint})" if error.hint else ""
        self.say(Warned(message=f"run {number} failed and changes nothing: {error.message}{hint}"))

    def _train(self, number: int, folder: Path) -> dict[str, Any]:
        from backprop.engine import loop

        last = next(iter(self.states.values())).fine_tuned if self.states else None
        start = slao.next_start(last, init=self.options.init) if last else None
        parent = slao.fingerprint(last) if last else None
        config = seeded(self.config, number - 1)
        _, part = self.parts[number - 1]
        model, fit = train_one(config, part, output=folder, say=self.say, start=start, run=number)
        with loop.hardware_told(part.plan), loop.same_bits(config.deterministic):
            return {**measures(fit, folder), **self._merge(number, folder, model, fit, parent)}

    def _merge(self, number: int, folder: Path, model: Any, fit: "Fit", parent: str | None) -> dict[str, Any]:
        from backprop.engine import load

        _, part = self.parts[number - 1]
        self._check_settings(folder)
        self._step(load.adapter_state(model), parent=parent)
        self.finished.append(number)
        seen = [self.parts[one - 1] for one in self.finished]
        exponent = self._choose(model, [part for _, part in seen], fit.size)
        chosen = exponent if self.mode == "auto" else None
        self.say(RunMerged(run=number, num_runs=len(self.parts), mode=self.mode, exponent=chosen))
        load.set_adapter_state(model, self.states[exponent].merged)
        with rundir.whole(folder / "merged") as beside:
            load.save_adapter(model, part.tokenizer, beside)
        self.say(Phase(name="evaluating the merged adapter, as it is on the disk, on every part so far"))
        load.set_adapter_state(model, load.read_adapter(folder / "merged"))
        self.book.measure(model, seen, self.parts[0][1].gate_rows, fit.size, run=number)
        self.book.tell()
        if over_trained(fit.losses):
            told = f"run {number} had nothing left to learn for half of its steps, which forget what came before"
            self.say(Warned(message=f"{told}: fewer `--steps` or `--epochs` keep more"))
        general = self.book.general
        return {
            "format": FORMAT,
            "parent": parent,
            "losses": fit.losses,
            "scores": [asdict(one) for one in self.book.scores[-1]],
            "general_before": asdict(self.book.general_before) if self.book.general_before else None,
            "general": asdict(general[-1]) if general else None,
            "merged_sha256": rundir.sha256_of(folder / "merged" / "adapter_model.safetensors"),
        }

    def _step(self, fine_tuned: "slao.State", *, parent: str | None) -> None:
        for exponent in slao.EXPONENTS if self.mode == "auto" else (slao.PAPERS_EXPONENT,):
            self.states[exponent] = slao.step(
                self.states.get(exponent),
                fine_tuned,
                mode=self.mode,
                init=self.options.init,
                parent=parent,
                exponent=exponent,
            )

    def _choose(self, model: Any, seen: Sequence[Prepared], size: "PassSize") -> float:
        if len(seen) == 1 or len(self.states) == 1:  # one run, or one way
            return slao.PAPERS_EXPONENT
        self.say(Phase(name="choosing the merge that does best on rows of every part so far"))
        return best_of(model, {exponent: state.merged for exponent, state in self.states.items()}, seen, size)

    def _check_settings(self, folder: Path) -> None:
        settings: Mapping[str, object] = json.loads(
            (folder / "lora" / "adapter_config.json").read_text(encoding="utf-8")
        )
        self.settings = self.settings or settings
        slao.check_mergeable(self.settings, settings)

    def _judge(self, number: int, sha256: str) -> None:
        most = self.options.max_forgetting
        if most is None or self.book.ledger.lost(number) <= most:
            self.delivered = number, sha256

    def _deliver(self) -> None:
        """Let the merge that is to be delivered take the place of the one before."""
        if self.delivered is None:
            return
        number, sha256 = self.delivered
        merged, delivered = self._folder(number) / "merged", self.config.output / "lora"
        if _is(merged, sha256) and not _is(delivered, sha256):
            with rundir.whole(delivered) as beside:
                shutil.copytree(merged, beside)

    def result(self) -> Mapping[str, JSON]:
        """Say what is delivered.

        Raises:
            TrainingError: If no run finished, or no merge met `--max-forgetting`.
            UsageError: If `lora/` is not what was written there.
        """
        if not self.finished:
            for number in self.failed:  # the same command is to try again
                rundir.remove(self._folder(number) / "metrics.json")
            first = next(iter(self.failed.values()))
            raise TrainingError(
                f"none of the {len(self.parts)} runs finished: {first.message}",
                hint=first.hint or "lower `--learning-rate`",
                details=first.details,
            )
        self._tell_gate()
        self._deliver()
        assert self.delivered is not None
        run, sha256 = self.delivered
        delivered = self.config.output / "lora"
        if not _is(delivered, sha256):
            raise UsageError(
                f"`{delivered}` is not what run {run} wrote", hint="choose another `--output`, or add `--overwrite`"
            )
        ledger = self.book.ledger
        return {
            "runs": len(self.finished),
            "failed_runs": [{"run": number, "why": error.message} for number, error in self.failed.items()],
            "merge_mode": self.mode,
            "loss_by_run_and_part": [[score.loss for score in row] for row in ledger.scores],
            "delivered_run": run,
            "adapter_sha256": sha256,
            **asdict(measure(ledger.scores[: self.finished.index(run) + 1])),
        }

    def _tell_gate(self) -> None:
        most = self.options.max_forgetting
        if most is None:
            return
        last = self.finished[-1]
        of_last = f"{self.book.ledger.lost(last):.3f} after run {last}"
        if self.delivered is None:
            rundir.remove(self.config.output / "lora")  # which another gate let through
            self.say(Gated(gate=f"forgetting at most {most:g}", ok=False, found=of_last))
            raise TrainingError(
                f"no merge met `--max-forgetting {most:g}`: {of_last}",
                hint="the same command with a larger one delivers what is there; `--replay 0.1` or fewer `--steps` forget less",
            )
        run = self.delivered[0]
        if run != last:
            told = f"`--max-forgetting {most:g}` is not met by the last merge, {of_last}"
            self.say(Warned(message=f"{told}: the merge after run {run} is delivered, the last that met it"))
        found = f"{self.book.ledger.lost(run):.3f} after run {run}, which is delivered"
        self.say(Gated(gate=f"forgetting at most {most:g}", ok=True, found=found))


FORMAT = 4
"""Of `metrics.json`."""


def _figures_in(path: Path) -> Mapping[str, Any]:
    """Read what a run measured; of another format, only that is known.

    Raises:
        UsageError: If it is damaged.
    """
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if figures.get("format") == FORMAT:
            scores = [*figures["scores"], *filter(None, (figures["general"], figures["general_before"]))]
            assert all(Score(**one) for one in scores)
            assert all(isinstance(figures[name], str) for name in ("adapter_sha256", "merged_sha256"))
            assert "parent" in figures
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise UsageError(f"`{path}` is damaged", hint="remove this file: its run is done again") from error
    return figures


def _is(adapter: Path, sha256: str) -> bool:
    weights = adapter / "adapter_model.safetensors"
    return weights.is_file() and rundir.sha256_of(weights) == sha256
