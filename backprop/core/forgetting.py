"""What a sequence of runs learnt and forgot: a matrix of scores, and the four figures of continual learning.

a[i][j] is the score on part j after run i, between 0 and 1 and larger is better. Pure arithmetic: nothing is measured here.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from backprop.core.slao import PAPERS_EXPONENT
from backprop.events import JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How the model does on the held-out rows of one part."""

    loss: float
    """Mean over the trained tokens, in nats."""
    exact_match: float | None = None
    """Share of answers whose every token is the likeliest, where answers are short; None where they are not."""


def values_of(column: Sequence[Score]) -> list[float]:
    """Give the scores of the same rows, in the order they were measured in, on one scale.

    It is exact match if the first of them has any, else the inverse perplexity: a token's likelihood, as a geometric mean.
    Where no answer is exact, none can be lost, and exact match would be blind to all that is forgotten. Who gives no loss, because it
    is not a number, knows nothing.
    """
    return _on_scale(column, exact=bool(column[0].exact_match))


def _on_scale(column: Sequence[Score], *, exact: bool) -> list[float]:
    known = [score.exact_match or 0.0 if exact else math.exp(-score.loss) for score in column]
    return [0.0 if math.isnan(score.loss) else value for score, value in zip(column, known, strict=True)]


def matrix_of(scores: Sequence[Sequence[Score]]) -> list[list[float]]:
    """Give the values of a lower triangle of scores, each part on one scale."""
    columns = [values_of([row[j] for row in scores[j:]]) for j in range(len(scores))]
    return [[columns[j][i - j] for j in range(i + 1)] for i in range(len(scores))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Learning and forgetting after the last of T runs; backward transfer and forgetting are 0 after the first.

    Backward transfer is that of Lopez-Paz & Ranzato (arXiv:1706.08840), forgetting that of Chaudhry et al.
    (arXiv:1801.10112), with the last run among those whose best counts, so that it is never negative.
    """

    average_performance: float
    """AP: mean over j of a[T][j]."""
    learning_accuracy: float
    """LA: mean over j of a[j][j]."""
    backward_transfer: float
    """BWT: mean over j < T of a[T][j] - a[j][j]; below 0 where something was forgotten."""
    forgetting: float
    """F: mean over j < T of the best that part j ever was, less a[T][j]."""


def measure(scores: Sequence[Sequence[Score]]) -> Measures:
    """Give the figures of a lower triangle of scores: after run i, of parts 1 to i."""
    a = matrix_of(scores)
    last = a[-1]
    earlier = range(len(last) - 1)
    changes = [last[j] - a[j][j] for j in earlier]
    losses = [max(row[j] for row in a[j:]) - last[j] for j in earlier]
    return Measures(
        average_performance=math.fsum(last) / len(last),
        learning_accuracy=math.fsum(row[-1] for row in a) / len(a),
        backward_transfer=math.fsum(changes) / len(changes) if changes else 0.0,
        forgetting=math.fsum(losses) / len(losses) if losses else 0.0,
    )


def best_exponent(exponents: Sequence[float], measured: Sequence[Sequence[Score]]) -> float:
    """Choose the merge weight whose merge does best on all parts alike: the higher score, else the lower loss, else the paper's.

    Args:
        measured: For each exponent, of each part.
    """
    columns = [
        _on_scale(column, exact=any(one.exact_match for one in column)) for column in zip(*measured, strict=True)
    ]

    def rank(number: int) -> tuple[float, float, bool]:
        score = math.fsum(column[number] for column in columns)
        loss = math.fsum(math.inf if math.isnan(one.loss) else one.loss for one in measured[number])
        return score, -loss, exponents[number] == PAPERS_EXPONENT

    return exponents[max(range(len(exponents)), key=rank)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """All that was measured between runs."""

    parts: Sequence[str]
    """Names of the parts of the runs that finished, in their order."""
    runs: Sequence[int]
    """The numbers of these runs."""
    scores: Sequence[Sequence[Score]]
    general_before: Score | None = None
    """Of the base model, on rows that are never trained on."""
    general: Sequence[Score] = ()
    """On the same rows, after each run."""

    def lost(self, run: int) -> float:
        """Give what is forgotten after a run that finished: F, or what the general rows lost, whichever is more."""
        number = self.runs.index(run)
        of_parts = measure(self.scores[: number + 1]).forgetting
        if self.general_before is None:
            return of_parts
        before, *after = values_of([self.general_before, *self.general])
        return max(of_parts, before - after[number])

    def to_json(self) -> dict[str, JSON]:
        """Give everything, matrices with a row for each run."""
        return {
            "parts": list(self.parts),
            "runs": list(self.runs),
            "score": matrix_of(self.scores),
            "loss": [[score.loss for score in row] for row in self.scores],
            "exact_match": [[score.exact_match for score in row] for row in self.scores],
            "measures": [asdict(measure(self.scores[: number + 1])) for number in range(len(self.scores))],
            "general_loss_before": self.general_before and self.general_before.loss,
            "general_loss": [score.loss for score in self.general],
        }

    def to_csv(self) -> str:
        """Give one line for each run and part; the base model is run 0."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("run", "part", "loss", "exact_match", "score"))
        before = [self.general_before] if self.general_before else []
        general = list(
            zip([*before, *self.general], values_of([*before, *self.general]) if before else (), strict=True)
        )
        lines = [(0, "general", *one) for one in general[:1]]
        for number, (run, row, values) in enumerate(zip(self.runs, self.scores, matrix_of(self.scores), strict=True)):
            lines += [(run, *one) for one in zip(self.parts, row, values, strict=False)]
            lines += [(run, "general", *one) for one in general[number + 1 : number + 2]]
        for run, part, score, value in lines:
            exact = "" if score.exact_match is None else score.exact_match
            table.writerow((run, part, score.loss, exact, value))
        return text.getvalue()


# A token that is predicted with 95 % costs this much, in nats: below it, there is little left to learn.
LEARNT_LOSS = 0.05
FEWEST_STEPS = 8


def over_trained(losses: Sequence[float]) -> bool:
    """Say whether a run trained on for most of its steps after there was nothing left to learn.

    What it does then moves the weights all the same, and with them what earlier runs learnt.
    """
    return len(losses) >= FEWEST_STEPS and sum(loss < LEARNT_LOSS for loss in losses) > len(losses) / 2
