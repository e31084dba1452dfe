"""What a multi-run learnt and forgot, as a part of the report page. Everything from the data is escaped."""

from collections.abc import Sequence
from html import escape

from backprop.events import Forgetting

COLUMNS = ("AP", "LA", "BWT", "F")
MEANING = (
    "Each row is the merged adapter after a run, read back from the disk; each column is a part. A score is the share of exact "
    "answers where these are short and any was exact at first, else the likelihood of a token (inverse perplexity); larger is better. Where a column "
    "fades downwards, that part is forgotten. AP, average performance: the mean of a row. LA, learning accuracy: how well each part "
    "was learnt when it was new. BWT, backward transfer: the change of earlier parts since then. F, forgetting: from their best."
)

# Of the curve's colour: the numbers stay legible on it.
DARKEST_PERCENT = 60


def heat_map(told: Sequence[Forgetting]) -> list[str]:
    """Write the matrix of scores with the four figures of each row, and what the general rows say."""
    parts = told[-1].parts
    general = any(one.general_loss is not None for one in told)
    columns = [*parts, *COLUMNS, *(["general loss"] if general else [])]
    head = "".join(f"<th>{escape(column)}</th>" for column in ("after run", *columns))
    rows: list[str] = []
    if general:
        empty = '<td class="number"></td>' * (len(columns) - 1)
        rows.append(f"<tr><td>none</td>{empty}{_number(told[-1].general_loss_before)}</tr>")
    for one in told:
        cells = "".join(_cell(score) for score in one.scores) + "<td></td>" * (len(parts) - len(one.scores))
        figures = (one.average_performance, one.learning_accuracy, one.backward_transfer, one.forgetting)
        cells += "".join(_number(figure) for figure in figures)
        rows.append(f"<tr><td>{one.run}</td>{cells}{_number(one.general_loss) if general else ''}</tr>")
    table = f'<div class="scroll"><table class="heat"><tr>{head}</tr>{"".join(rows)}</table></div>'
    return ["<h2>Learnt and forgotten</h2>", f'<p class="soft">{MEANING}</p>', table]


def _cell(score: float) -> str:
    share = round(DARKEST_PERCENT * min(max(score, 0.0), 1.0))
    return f'<td class="number" style="background: color-mix(in srgb, var(--curve) {share}%, transparent)">{score:.3f}</td>'


def _number(value: float | None) -> str:
    return f'<td class="number">{"" if value is None else f"{value:.3f}"}</td>'
