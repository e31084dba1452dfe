"""The terminal: how events look to a person. Everything goes to stderr; stdout carries results."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Literal, Self

from backprop.events import (
    Checked,
    Checkpointed,
    DataRead,
    Eval,
    Event,
    Examples,
    Exported,
    Failed,
    Forgetting,
    Gated,
    MemoryMended,
    Paused,
    Phase,
    PlanMade,
    Proved,
    Registered,
    Repeated,
    Resumed,
    RolledBack,
    RunFinished,
    RunMerged,
    RunStarted,
    Sampled,
    Step,
    Tried,
    Warned,
)

Detail = Literal["quiet", "normal", "verbose"]
# Seconds between step lines where there is no live bar.
LINE_EVERY_S = 10.0
GIB = 2**30
# Merging takes none of a GPU's memory.
SHOWN_PHASES = ("load", "step", "evaluation", "save")
# A text histogram: lines at most, and the longest bar in characters.
BARS_MOST, BAR_WIDTH = 12, 40
# Names of proofs, before what was found: a table.
PROOF_WIDTH = 44
TRAINED, CONTEXT, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


class Console:
    """A sink for people: a live bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, *, detail: Detail = "normal", stream: IO[str] | None = None) -> None:
        # A program started without stderr has None there.
        self._stream = stream or sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as we do
        self._detail: Detail = detail
        self._live = self._stream.isatty() and not os.environ.get("CI") and detail != "quiet"
        self._colour = self._stream.isatty() and not os.environ.get("NO_COLOR")
        self._bar: Any = None
        self._task: Any = None
        self._last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bar()

    def __call__(self, event: Event) -> None:
        """Show ``event``."""
        if isinstance(event, Step):
            self._step(event)
            return
        if isinstance(event, Failed):
            self._stop_bar()
            self._print(f"error: {event.message}" + (f"\n\nhint: {event.hint}" if event.hint else ""))
        elif self._detail != "quiet":
            if not isinstance(event, Eval | Warned):
                self._stop_bar()
            if isinstance(event, Examples) and self._colour:
                self._show(event)
                return
            text = told(event, verbose=self._detail == "verbose")
            if text:
                self._print(text)

    def _show(self, event: Examples) -> None:
        """Colour what is trained on. Nothing but our own escapes reaches the terminal."""
        for name, spans in zip(event.names, event.examples, strict=True):
            print(f"--- example {name}\n{colour_spans(spans, colour=True)}", file=self._stream, flush=True)

    def _step(self, step: Step) -> None:
        if self._detail == "quiet":
            return
        if self._live:
            self._advance(step)
            return
        now = time.monotonic()
        last = step.step == step.num_steps
        if now - self._last_line >= LINE_EVERY_S or step.step == 1 or last or self._detail == "verbose":
            self._last_line = now
            self._print(f"step {step.step}/{step.num_steps}  {_figures(step)}")

    def _advance(self, step: Step) -> None:
        if self._bar is None:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=RichConsole(file=self._stream),
            )
            self._task = self._bar.add_task("", total=step.num_steps)
            self._bar.start()
        self._bar.update(self._task, completed=step.step, description=_figures(step))

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(without_escapes(text), file=self._stream, flush=True)


def _figures(step: Step) -> str:
    right = "" if step.accuracy is None else f"  {step.accuracy:.0%} right"
    speed, memory = f"{step.tokens_per_second:,.0f} tok/s", f"{step.memory_bytes / GIB:.1f} GiB"
    return f"loss {step.loss:.3f}{right}  {speed}  {memory}"


def told(event: Event, *, verbose: bool = False) -> str:
    """Give ``event`` as text; empty if it is not worth a line."""
    match event:
        case PlanMade():
            return _planned(event)
        case DataRead():
            told_data = {**event.ledger, "lengths": event.ledger.get("lengths", ()) if verbose else ()}
            sizes = {"tokens": event.tokens, "trained_tokens": event.trained_tokens, "longest": event.longest}
            return ledger_text({"rows": event.rows, "held_out": event.eval_rows, **told_data, **sizes})
        case Eval():
            return _evaluated(event)
        case RunMerged():
            return f"run {event.run}/{event.num_runs} merged ({event.mode}{_weight(event.exponent)})"
        case Forgetting():
            return _remembered(event)
        case Proved():
            found = event.found if verbose or not event.ok else event.found.partition("; ")[0]
            return f"{'proved' if event.ok else 'NOT PROVED'}: {event.name:<{PROOF_WIDTH}} {found}".rstrip()
        case Gated():
            return f"gate {'met' if event.ok else 'NOT MET'}: {event.gate} ({event.found})"
        case Checkpointed():
            return f"checkpoint after step {event.step} in {event.seconds:.2f} s: {event.path}" if verbose else ""
        case Resumed():
            return f"going on after step {event.step}, from {event.path}"
        case RolledBack():
            return f"warning: {event.reason}: going back to step {event.step}, with {event.rate_share:g} of the rate"
        case Repeated():
            return f"compared with {event.path}: {event.found}"
        case Sampled():
            return f"asked: {_line(event.prompt)}\n  before: {_line(event.before)}\n  after:  {_line(event.after)}"
        case Warned():
            return f"warning: {event.message}"
        case Paused():
            return f"pausing: {event.reason}"
        case MemoryMended():
            before = event.estimated["step"] / GIB
            return f"memory, {event.how}: {_phases(event.phases)}; {before:.1f} were estimated for a step"
        case Examples():
            return event.text
        case Phase():
            return f"{event.name} …"
        case Tried():
            return _tried(event)
        case Exported():
            return f"{event.path}  {event.size_bytes / 2**20:,.0f} MiB{_asked(event)}"
        case Registered():
            return f"{'replaced' if event.replaced else 'registered'} {event.name} at {event.server}{_asked(event)}"
        case Checked():
            return _checked(event)
        case RunFinished() if event.result.get("dry_run"):
            return "dry run: nothing was trained or written"
        case RunFinished():
            return f"done in {event.seconds:.0f} s: {event.output}" if event.output else ""
        case RunStarted():
            return f"backprop {event.version} {event.command}" if verbose else ""
        case _:
            return ""


def _planned(event: PlanMade) -> str:
    width = max(len(name) for name in event.choices)
    rows = [
        f"  {name.replace('_', ' '):<{width}}  {_short(value):<14}  {event.reasons[name]}"
        for name, value in event.choices.items()
    ]
    memory = [f"  {'memory':<{width}}  {_phases(event.memory)}, at the fullest"] if event.memory else []
    ways = (
        [f"  {'to try':<{width}}  {'; '.join(event.to_try)}, before the first step, unless known"]
        if len(event.to_try) > 1
        else []
    )
    return "\n".join(["plan", *rows, *memory, *ways])


def _phases(memory: Mapping[str, int]) -> str:
    return " · ".join(f"{name} {memory[name] / GIB:.1f}" for name in SHOWN_PHASES) + " GiB"


def _weight(exponent: float | None) -> str:
    if exponent is None:
        return ""
    words = {0.0: "the last run alone", 1.0: "the mean of all runs"}
    return f": {words.get(exponent, f'each i-th run has a share of 1/i^{exponent:g}')}"


def _remembered(event: Forgetting) -> str:
    general = ""
    if event.general_loss is not None and event.general_loss_before is not None:
        general = f"; general loss {event.general_loss:.3f}, {event.general_loss_before:.3f} before"
    return (
        f"after run {event.run}: average performance {event.average_performance:.3f}, learning accuracy "
        f"{event.learning_accuracy:.3f}, backward transfer {event.backward_transfer:+.3f}, forgetting "
        f"{event.forgetting:.3f}{general}"
    )


def _evaluated(event: Eval) -> str:
    if event.part != "eval":
        exact = "" if event.exact_match is None else f", {event.exact_match:.0%} of the answers exact,"
        return f"loss {event.loss:.3f}{exact} on {event.part} after run {event.run}"
    if event.accuracy is None or event.margin is None:
        return f"held-out loss {event.loss:.3f} (perplexity {event.perplexity:.3g}) after step {event.step}"
    return (
        f"held-out loss {event.loss:.3f}, {event.accuracy:.0%} preferred rightly, by {event.margin:.3f} nats on average, "
        f"after step {event.step}"
    )


def _checked(event: Checked) -> str:
    line = f"{'note' if event.ok and event.needed else 'ok  ' if event.ok else 'FAIL'}  {event.name}: {event.found}"
    needed = (
        f"  ({'better' if event.ok else 'needed'}: {event.needed})\n      mend: {event.mend}" if event.needed else ""
    )
    return line + needed


def _tried(event: Tried) -> str:
    if event.size_bytes is None:
        return f"  {event.quantization:8} {'refused':>12}  {event.refused}"
    size = f"{event.size_bytes / 2**20:,.0f} MiB"
    return f"  {event.quantization:8} {size:>12}  KL {event.mean_kl:.3g}, likeliest token equal in {event.top1:.1%}"


def _asked(event: Exported | Registered) -> str:
    return f"\n  asked: {event.question}\n  said:  {event.answer}"


def _line(text: str, *, most: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def without_escapes(text: str) -> str:
    """Show control characters, which could drive the terminal, instead of sending them."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def ledger_text(data: Mapping[str, object]) -> str:
    """Tell what the data holds in a few plain lines and a histogram.

    Args:
        data: The ledger as JSON. `lengths`, a list of (low, below, count), `tokens`, `trained_tokens` and `longest` are
            told if they are there.
    """
    rows, held_out = _count(data, "rows"), _count(data, "held_out")
    sizes = [f"rows {rows + held_out:,} ({rows:,} to train on, {held_out:,} held out)"]
    if "tokens" in data:
        sizes.append(f"{_count(data, 'trained_tokens'):,} trained tokens of {_count(data, 'tokens'):,}")
    if "longest" in data:
        sizes.append(f"longest {_count(data, 'longest'):,}")
    repeats = [f"duplicates {_count(data, 'duplicates'):,}", f"near-duplicates {_count(data, 'near_duplicates'):,}"]
    if held_out:
        nearly = f" and {_count(data, 'near_overlap'):,} nearly" if data.get("near_overlap") else ""
        repeats.append(f"overlap with evaluation {_count(data, 'overlap'):,}{nearly}")
    if data.get("same_question"):
        repeats.append(f"same question, another answer {_count(data, 'same_question'):,}")
    if data.get("contradictions"):
        repeats.append(f"same answer, judged otherwise {_count(data, 'contradictions'):,}")
    lines = [" · ".join(sizes), " · ".join(repeats)]
    languages = data.get("languages")
    if isinstance(languages, Mapping) and languages:
        lines.append("languages: " + ", ".join(f"{name} {_share(languages, name)}" for name in languages))
    lengths = data.get("lengths")
    if isinstance(lengths, list | tuple) and lengths:
        lines += ["tokens per example", *_bars([(low, high, count) for low, high, count in lengths])]
    return without_escapes("\n".join(lines))


def _count(data: Mapping[str, object], key: str) -> int:
    count = data.get(key, 0)
    return count if isinstance(count, int) else 0


def _share(counts: Mapping[str, object], name: str) -> str:
    share = _count(counts, name) / sum(_count(counts, one) for one in counts)
    return "under 1 %" if share < 0.01 else f"{share:.0%}".replace("%", " %")


def _bars(buckets: Sequence[tuple[int, int, int]]) -> list[str]:
    merged = -(-len(buckets) // BARS_MOST)
    groups = [buckets[start : start + merged] for start in range(0, len(buckets), merged)]
    rows = [(f"{one[0][0]:,} to {one[-1][1] - 1:,}", sum(count for _, _, count in one)) for one in groups]
    width, top = max(len(name) for name, _ in rows), max(count for _, count in rows) or 1
    return [f"  {name:>{width}}  {_bar(count / top)} {count:,}" for name, count in rows]


def _bar(share: float) -> str:
    """Draw ``share`` of the longest bar, in eighths of a character; what is not nothing is seen."""
    eighths = -int(-share * BAR_WIDTH * 8 // 1)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def colour_spans(spans: Sequence[tuple[str, bool]], *, colour: bool) -> str:
    """Show a text in which some spans are trained on: green with the rest dim; without colour, between » and «.

    Control characters in the spans are shown, not sent.
    """
    marks = {True: (TRAINED, RESET), False: (CONTEXT, RESET)} if colour else {True: ("»", "«"), False: ("", "")}
    return "".join(f"{marks[trained][0]}{without_escapes(text)}{marks[trained][1]}" for text, trained in spans)
