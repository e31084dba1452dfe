"""What a sequence of runs learnt and forgot: a matrix of scores, and the four figures of continual learning.

a[i][j] is the score on part j after run i, between 0 and 1 and larger is better. Pure arithmetic: nothing is measured here.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from backprop.events import JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How the model does on the held-out rows of one part."""

    loss: float
    """Mean over the trained tokens, in nats."""
    exact_match: float | None = None
    """Share of answers whose every token is the likeliest, where answers are short; None where they are not."""

    @property
    def value(self) -> float:
        """Give exact match where there is one, else the inverse perplexity: a token's likelihood, as a geometric mean."""
        return math.exp(-self.loss) if self.exact_match is None else self.exact_match


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
    a = [[score.value for score in row] for row in scores]
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

    def lost(self) -> float:
        """Give what is forgotten after the last run: F, or what the general rows lost, whichever is more."""
        of_parts = measure(self.scores).forgetting
        if self.general_before is None:
            return of_parts
        return max(of_parts, self.general_before.value - self.general[-1].value)

    def to_json(self) -> dict[str, JSON]:
        """Give everything, matrices with a row for each run."""
        return {
            "parts": list(self.parts),
            "runs": list(self.runs),
            "score": [[score.value for score in row] for row in self.scores],
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
        lines = [(0, "general", self.general_before)] if self.general_before else []
        for number, (run, row) in enumerate(zip(self.runs, self.scores, strict=True)):
            lines += [(run, part, score) for part, score in zip(self.parts, row, strict=False)]
            lines += [(run, "general", self.general[number])] if self.general else []
        for run, part, score in lines:
            exact = "" if score.exact_match is None else score.exact_match
            table.writerow((run, part, score.loss, exact, score.value))
        return text.getvalue()


# A token that is predicted with 95 % costs this much, in nats: below it, there is little left to learn.
LEARNT_LOSS = 0.05
FEWEST_STEPS = 8


def over_trained(losses: Sequence[float]) -> bool:
    """Say whether a run trained on for most of its steps after there was nothing left to learn.

    What it does then moves the weights all the same, and with them what earlier runs learnt.
    """
    return len(losses) >= FEWEST_STEPS and sum(loss < LEARNT_LOSS for loss in losses) > len(losses) / 2
