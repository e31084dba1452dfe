"""The report page: one self-contained HTML file about a run. Everything from the data is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from backprop.events import DataRead, Eval, Event, Forgetting, Step
from backprop.heat_map import heat_map

WIDTH, HEIGHT, MARGIN = 720, 240, 60
# Of a histogram; at most so many of its edges are labelled.
BARS_HEIGHT, LABELS_MOST = 180, 6

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #d0d5dd; --paper: #ffffff; --curve: #2563eb;
  --other: #d97706; --third: #059669; --fourth: #be185d; --fifth: #7c3aed; --sixth: #64748b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #344054; --paper: #12161d;
  --curve: #60a5fa; --other: #fbbf24; --third: #34d399; --fourth: #f472b6; --fifth: #a78bfa; --sixth: #94a3b8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 760px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h3 { font-size: 1rem; } table.samples { table-layout: fixed; }
.soft { color: var(--soft); margin-top: .2rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
table.heat th { font-weight: 500; overflow-wrap: anywhere; } table.heat th + th { text-align: right; padding: .3rem .5rem; }
table.heat td.number { padding: .3rem .5rem; }
td.said { white-space: pre-wrap; overflow-wrap: anywhere; } td.failed { color: var(--other); font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; } svg .axis { stroke: var(--line); }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A curve: points (x, y), finite, in order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str = "--curve"
    dots: bool = False


def page(manifest: Mapping[str, object], events: Sequence[Event]) -> str:
    """Write the page of a run from its manifest and events."""
    steps = [event for event in events if isinstance(event, Step)]
    title = f"backprop {manifest['command']}: {manifest['status']}"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(_headline(manifest, steps))}</p>']
    parts += _error(manifest)
    parts += _forgetting([event for event in events if isinstance(event, Forgetting)])
    if steps:
        parts += _curves(steps, [event for event in events if isinstance(event, Eval)])
    parts += _samples(_mappings(manifest.get("samples")))
    parts += _gates(_mappings(manifest.get("gates")))
    parts += _proofs(_mappings(manifest.get("proofs")))
    parts += ["<h2>Plan</h2>", _plan_table(manifest)]
    parts += _data(manifest, [event for event in events if isinstance(event, DataRead)])
    parts += ["<h2>Result</h2>", _table(_mapping(manifest.get("result")).items())]
    parts += _spent(_mapping(manifest.get("spent")))
    parts += ["<h2>Versions</h2>", _table(_mapping(manifest.get("versions")).items())]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>\n{body}\n</body></html>\n"
    )


def _headline(manifest: Mapping[str, object], steps: Sequence[Step]) -> str:
    model = _mapping(manifest.get("model")).get("name", "no model yet")
    if not steps:
        return f"{model}, no steps"
    return f"{model}, {len(steps)} steps, loss {steps[0].loss:.3f} at first, {steps[-1].loss:.3f} at last"


def _error(manifest: Mapping[str, object]) -> list[str]:
    error = _mapping(manifest.get("error"))
    return [f"<p><strong>error: {escape(str(error['message']))}</strong></p>"] if error else []


def _curves(steps: Sequence[Step], evals: Sequence[Eval]) -> list[str]:
    # In a multi-run the step starts at one again in each run: the axis goes on.
    first_of_run = {event.run: index for index, event in reversed(list(enumerate(steps)))}
    losses = Series(name="training loss", points=[(index + 1, step.loss) for index, step in enumerate(steps)])
    measured = [(first_of_run.get(e.run, 0) + e.step, e) for e in evals if e.part == "eval"]
    held_out = Series(name="held-out loss", points=[(at, e.loss) for at, e in measured], color="--other", dots=True)
    rates = Series(name="learning rate", points=[(index + 1, step.learning_rate) for index, step in enumerate(steps)])
    speeds = Series(name="tokens/s", points=[(index + 1, step.tokens_per_second) for index, step in enumerate(steps)])
    return [
        "<h2>Loss</h2>",
        _chart([losses, held_out]),
        *_preferred(steps, measured),
        "<h2>Throughput, tokens per second</h2>",
        _chart([speeds]),
        "<h2>Learning rate</h2>",
        _chart([rates]),
        f'<p class="soft">peak memory {max(step.memory_bytes for step in steps) / 2**30:.2f} GiB</p>',
    ]


def _preferred(steps: Sequence[Step], measured: Sequence[tuple[int, Eval]]) -> list[str]:
    trained = [(index + 1, step.accuracy) for index, step in enumerate(steps) if step.accuracy is not None]
    if not trained:
        return []
    held_out = [(at, event.accuracy) for at, event in measured if event.accuracy is not None]
    series = [
        Series(name="in training", points=trained),
        Series(name="held out", points=held_out, color="--other", dots=True),
    ]
    return ["<h2>Share of preferences on their right side</h2>", _chart(series)]


COLORS = ("--curve", "--other", "--third", "--fourth", "--fifth", "--sixth")


def _forgetting(told: Sequence[Forgetting]) -> list[str]:
    if not told:
        return []
    shown = list(zip(told[-1].parts, COLORS, strict=False))
    curves = [
        Series(
            name=name,
            points=[(one.run, one.scores[number]) for one in told if number < len(one.scores)],
            color=color,
            dots=True,
        )
        for number, (name, color) in enumerate(shown)
    ]
    legend = " ".join(f'<span style="color: var({color})">&#9632;</span> {escape(name)}' for name, color in shown)
    more = len(told[-1].parts) - len(shown)
    legend += f"; {more} more are in the table only" if more else ""
    title = "<h3>Score of each part, run by run</h3>"
    return [*heat_map(told), title, _chart(curves, unit="run", legend=False), f'<p class="soft">{legend}</p>']


def _chart(series: Sequence[Series], *, unit: str = "step", legend: bool = True) -> str:
    drawn = [one for one in series if one.points]
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points]
    left, right, top = min(xs), max(max(xs), min(xs) + 1), max(ys) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + (x - left) / (right - left) * (WIDTH - 2 * MARGIN)
        return round(across, 1), round(HEIGHT - MARGIN / 2 - y / top * (HEIGHT - MARGIN), 1)

    marks: list[str] = []
    for share in (0, 0.5, 1):
        _, y = place(left, share * top)
        marks.append(f'<line class="axis" x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text x="{MARGIN - 6}" y="{y + 4}" text-anchor="end">{_axis(share * top)}</text>')
    marks.append(f'<text x="{MARGIN}" y="{HEIGHT - 4}">{unit} {left:.0f}</text>')
    marks.append(f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 4}" text-anchor="end">{right:.0f}</text>')
    for number, one in enumerate(drawn):
        placed = [place(x, y) for x, y in one.points]
        line = " ".join(f"{x},{y}" for x, y in placed)
        marks.append(f'<polyline fill="none" stroke="var({one.color})" stroke-width="2" points="{line}"/>')
        if one.dots or len(placed) == 1:
            marks += [f'<circle cx="{x}" cy="{y}" r="4" fill="var({one.color})"/>' for x, y in placed]
        if legend and len(drawn) > 1:
            x = WIDTH - MARGIN - 130
            marks.append(f'<rect x="{x}" y="{8 + 18 * number}" width="12" height="12" fill="var({one.color})"/>')
            marks.append(f'<text x="{x + 18}" y="{18 + 18 * number}">{escape(one.name)}</text>')
    label = escape(" and ".join(one.name for one in drawn))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(marks)}</svg>'


def _plan_table(manifest: Mapping[str, object]) -> str:
    rows = [(name, _mapping(choice)) for name, choice in _mapping(manifest.get("plan")).items()]
    body = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{escape(_shown(choice['value']))}</td>"
        f"<td>{escape(str(choice['reason']))}</td></tr>"
        for name, choice in rows
    )
    return f'<div class="scroll"><table><tr><th>choice</th><th>value</th><th>why</th></tr>{body}</table></div>'


def _data(manifest: Mapping[str, object], read: Sequence[DataRead]) -> list[str]:
    ledger = _mapping(manifest.get("data"))
    parts = ["<h2>Data</h2>"] if read or ledger else []
    parts += [_table(_data_rows(data)) for data in read]
    if not ledger:
        return parts
    parts.append(_table(_ledger_rows(ledger)))
    buckets = _buckets(ledger.get("lengths"))
    if buckets:
        parts += ["<h3>Tokens per example</h3>", _bars(buckets)]
    languages = _mapping(ledger.get("languages"))
    if languages:
        parts += ["<h3>Languages</h3>", _table((name, f"{count} rows") for name, count in languages.items())]
    return parts


LEDGER_NAMES = {
    "rows": "rows to train on",
    "held_out": "rows held out",
    "duplicates": "exact duplicates",
    "near_duplicates": "near-duplicates",
    "near_checked": "rows compared for near-duplicates",
    "overlap": "held-out rows also trained on",
    "near_overlap": "held-out rows nearly trained on",
    "same_question": "same question, another answer",
    "contradictions": "same answer, judged otherwise",
}


def _ledger_rows(ledger: Mapping[str, object]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, name in LEDGER_NAMES.items():
        if key in ledger:
            pair = ledger.get(f"{key}_first")
            first = f", first: {' = '.join(map(str, pair))}" if isinstance(pair, list | tuple) else ""
            rows.append((name, f"{ledger[key]}{first}"))
    return rows


def _bars(buckets: Sequence[tuple[int, int, int]]) -> str:
    """Draw a histogram of (low, below, count); each bar tells its numbers when pointed at."""
    top = max(count for _, _, count in buckets) or 1
    floor = BARS_HEIGHT - MARGIN / 2
    slot = (WIDTH - 2 * MARGIN) / len(buckets)
    every = -(-len(buckets) // LABELS_MOST)
    marks: list[str] = []
    for number, (low, high, count) in enumerate(buckets):
        x, tall = MARGIN + number * slot, count / top * (floor - 20)
        marks.append(
            f'<rect x="{x + 1:.1f}" y="{floor - tall:.1f}" width="{slot - 2:.1f}" height="{tall:.1f}" '
            f'fill="var(--curve)"><title>{low} to {high - 1}: {count}</title></rect>'
        )
        if count:
            marks.append(f'<text x="{x + slot / 2:.1f}" y="{floor - tall - 5:.1f}" text-anchor="middle">{count}</text>')
        if number % every == 0:
            marks.append(f'<text x="{x:.1f}" y="{BARS_HEIGHT - 10}" text-anchor="middle">{low}</text>')
    right = WIDTH - MARGIN
    marks.append(f'<text x="{right}" y="{BARS_HEIGHT - 10}" text-anchor="middle">{buckets[-1][1]}</text>')
    marks.append(f'<line class="axis" x1="{MARGIN}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    label = f"tokens per example, from {buckets[0][0]} to {buckets[-1][1]}"
    return f'<svg viewBox="0 0 {WIDTH} {BARS_HEIGHT}" role="img" aria-label="{label}">{"".join(marks)}</svg>'


def _proofs(proofs: Sequence[Mapping[str, object]]) -> list[str]:
    rows = [(proof["name"], proof["ok"], proof["found"], _shown(proof["seconds"])) for proof in proofs]
    return _verdicts("Proofs", ("name", "result", "found", "seconds"), rows, words=("passed", "failed"))


def _gates(gates: Sequence[Mapping[str, object]]) -> list[str]:
    rows = [(gate["gate"], gate["ok"], gate["found"]) for gate in gates]
    return _verdicts("Gates", ("gate", "result", "found"), rows, words=("met", "not met"))


def _verdicts(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, words: tuple[str, str]
) -> list[str]:
    """Write a table whose second column says whether something holds, and whose fourth, if any, is a number."""
    if not rows:
        return []
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = ""
    for name, ok, found, *number in rows:
        result = f"<td>{words[0]}</td>" if ok else f'<td class="failed">{words[1]}</td>'
        figures = "".join(f'<td class="number">{escape(str(one))}</td>' for one in number)
        body += f"<tr><td>{escape(str(name))}</td>{result}<td>{escape(str(found))}</td>{figures}</tr>"
    return [f"<h2>{title}</h2>", f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>']


def _samples(samples: Sequence[Mapping[str, object]]) -> list[str]:
    if not samples:
        return []
    columns = ("prompt", "before", "after")
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f"<tr>{_said(sample[column] for column in columns)}</tr>" for sample in samples)
    return ["<h2>Samples</h2>", f'<div class="scroll"><table class="samples"><tr>{head}</tr>{body}</table></div>']


def _data_rows(data: DataRead) -> list[tuple[str, object]]:
    shapes = ", ".join(f"{count} {shape}" for shape, count in data.shapes.items())
    return [
        ("shapes", shapes),
        ("rows", data.rows),
        ("held-out rows", data.eval_rows),
        ("examples", data.examples),
        ("tokens", data.tokens),
        ("trained tokens", data.trained_tokens),
        ("tokens cut", data.tokens_cut),
        ("examples dropped", data.examples_dropped),
        ("longest example", data.longest),
    ]


SPENT_NAMES = {
    "seconds": "time, s",
    "paused_seconds": "of it, waiting for a GPU to cool, s",
    "energy_wh": "energy of the GPUs, Wh",
    "power_note": "note on that, by `--power-note`",
    "hottest_c": "hottest, °C",
    "cost": "cost, by `--price-per-hour`",
}


def _spent(spent: Mapping[str, object]) -> list[str]:
    rows = [(name, spent[key]) for key, name in SPENT_NAMES.items() if spent.get(key) is not None]
    return ["<h2>Spent</h2>", _table(rows)] if rows else []


def _table(rows: Iterable[tuple[object, object]]) -> str:
    body = "".join(
        f"<tr><td>{escape(str(name).replace('_', ' '))}</td><td>{escape(_shown(value))}</td></tr>"
        for name, value in rows
    )
    return f'<div class="scroll"><table>{body}</table></div>'


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _said(texts: Iterable[object]) -> str:
    return "".join(f'<td class="said">{escape(str(text))}</td>' for text in texts)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: object) -> list[Mapping[str, object]]:
    return [_mapping(one) for one in value] if isinstance(value, list | tuple) else []


def _buckets(value: object) -> list[tuple[int, int, int]]:
    return [(int(low), int(high), int(count)) for low, high, count in value] if isinstance(value, list | tuple) else []


def _axis(value: float) -> str:
    """Write a number at an axis, where there is room for six characters."""
    return f"{value:,.0f}" if 1000 <= value < 100_000 else f"{value:.3g}"
