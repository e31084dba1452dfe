"""What the merged adapter knows of every part so far, measured, told and written down."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backprop.core.data.render import Example
from backprop.core.data.split import choosing
from backprop.core.forgetting import Ledger, Score, best_exponent, matrix_of, measure
from backprop.edges import rundir
from backprop.engine.batches import PassSize
from backprop.events import Eval, Forgetting, Phase, Sink, Warned
from backprop.verbs.prepare import Prepared

# Examples that a part is measured on: enough to tell a loss to about a hundredth, few enough to cost little.
MOST_EVALUATED = 200
# Of each part, to choose between merges; fewer than the least would choose by chance.
MOST_CHOOSING, FEWEST_CHOOSING = 32, 4
# Where half of the answers have at most so many tokens, the end included, they are a label, a number, or a name.
SHORT_ANSWER_TOKENS = 16
# Exact match needs the logits themselves, of all words: these are held for a few answers at once.
EXACT_MATCH_TOKENS = 2048


def score(model: Any, examples: Sequence[Example], size: PassSize) -> Score:
    """Measure the loss on the first of these examples, and exact match where their answers are short."""
    from backprop.engine.objectives import Supervised, exact_match, measure

    asked = examples[:MOST_EVALUATED]
    longest = max(len(example.ids) for example in asked)
    # These may be longer than any that is trained on.
    size = replace(size, examples=max(1, min(size.examples, size.tokens // longest)))
    short = statistics.median(example.num_trained for example in asked) <= SHORT_ANSWER_TOKENS
    fewer = replace(size, tokens=min(size.tokens, EXACT_MATCH_TOKENS), examples=1)
    return Score(
        loss=measure(model, asked, size, Supervised()).loss,
        exact_match=exact_match(model, asked, fewer) if short else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a part is measured on."""

    scored: Sequence[Example]
    """Its scores are of these."""
    choosing: Sequence[Example] = ()
    """The merge is chosen on these: others than are scored, if there are enough rows."""
    told: str = ""
    """Which rows these are."""


def asked_of(part: Prepared, *, choose: bool) -> Asked:
    """Take the held-out rows of a part, or those it was trained on where none are; of these some ``choose`` the merge."""
    rows = part.held_out or part.own
    if not choose:
        return Asked(scored=rows)
    kind = "held-out" if part.held_out else "trained"
    some, others = choosing(rows, most=MOST_CHOOSING, most_others=MOST_EVALUATED)
    if len(some) >= FEWEST_CHOOSING and others:
        told = f"{len(some)} of its {kind} rows choose the merge, {len(others)} others are scored"
        return Asked(scored=others, choosing=some, told=told)
    trained = part.own[:MOST_CHOOSING]
    which = (
        "that are trained on choose the merge" if part.held_out else "choose the merge and are scored, which flatters"
    )
    told = f"{len(rows)} {kind} rows are too few to set some apart: {len(trained)} rows {which}"
    return Asked(scored=rows, choosing=trained, told=told)


def best_of(
    model: Any, candidates: Mapping[float, Mapping[str, Any]], seen: Sequence[Prepared], size: PassSize
) -> float:
    """Find the adapter that does best on the choosing rows of all parts alike.

    Returns:
        Its exponent of the merge weight. Of equal scores the lower loss counts, and of equal losses the paper's exponent.
    """
    from backprop.engine.load import set_adapter_state

    rows = [asked_of(part, choose=True).choosing for part in seen]
    measured: list[list[Score]] = []
    for state in candidates.values():
        set_adapter_state(model, state)
        measured.append([score(model, some, size) for some in rows])
    return best_exponent(list(candidates), measured)


@dataclass
class Book:
    """The scores of a multi-run so far, told and written as they come."""

    output: Path
    say: Sink
    choose: bool = False
    """Whether some rows of each part choose the merge."""
    parts: list[str] = field(default_factory=list[str])
    runs: list[int] = field(default_factory=list[int])
    scores: list[list[Score]] = field(default_factory=list[list[Score]])
    general_before: Score | None = None
    general: list[Score] = field(default_factory=list[Score])

    def measure(
        self, model: Any, seen: Sequence[tuple[str, Prepared]], general: Sequence[Example], size: PassSize, *, run: int
    ) -> None:
        """Measure a model on the parts of the runs that finished, this one last, and on what must not be lost."""
        from backprop.engine.load import as_before_training

        if general and self.general_before is None:
            with as_before_training(model):
                self.general_before = score(model, general, size)
            self._tell(self.general_before, "general", run=0)
            self._tell_if_none_is_exact(self.general_before, "general", run=0)
        row: list[Score] = []
        name, newest = seen[-1]
        if told := asked_of(newest, choose=self.choose).told:
            self.say(Phase(name=f"part {name}: {told}"))
        for name, part in seen:
            row.append(score(model, asked_of(part, choose=self.choose).scored, size))
            self._tell(row[-1], f"part {name}" if part.held_out else f"part {name} (its training rows)", run=run)
        self._tell_if_none_is_exact(row[-1], f"part {seen[-1][0]}", run=run)
        if general:
            self.general.append(score(model, general, size))
            self._tell(self.general[-1], "general", run=run)
        self.enter(seen[-1][0], run, row)

    def enter(self, part: str, run: int, row: list[Score]) -> None:
        """Take up what a run was measured on, and write it down."""
        self.parts.append(part)
        self.runs.append(run)
        self.scores.append(row)
        rundir.write_text(self.output / "forgetting.json", json.dumps(self.ledger.to_json(), indent=2) + "\n")
        rundir.write_text(self.output / "forgetting.csv", self.ledger.to_csv())

    def tell(self) -> None:
        """Tell how the last run left all parts so far."""
        figures = measure(self.scores)
        self.say(
            Forgetting(
                run=self.runs[-1],
                parts=tuple(self.parts),
                scores=tuple(matrix_of(self.scores)[-1]),
                average_performance=figures.average_performance,
                learning_accuracy=figures.learning_accuracy,
                backward_transfer=figures.backward_transfer,
                forgetting=figures.forgetting,
                general_loss=self.general[-1].loss if self.general else None,
                general_loss_before=self.general_before.loss if self.general_before else None,
            )
        )

    @property
    def ledger(self) -> Ledger:
        """Everything so far."""
        return Ledger(
            parts=self.parts,
            runs=self.runs,
            scores=self.scores,
            general_before=self.general_before,
            general=self.general,
        )

    def _tell_if_none_is_exact(self, first: Score, part: str, *, run: int) -> None:
        if first.exact_match == 0:
            told = f"no answer of {part} is exact {f'after run {run}' if run else 'before training'}"
            self.say(Warned(message=f"{told}: it is scored by the likelihood of a token, for `--max-forgetting` too"))

    def _tell(self, found: Score, part: str, *, run: int) -> None:
        self.say(Eval(step=0, loss=found.loss, exact_match=found.exact_match, part=part, run=run))
