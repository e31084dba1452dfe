"""The terminal: how events look to a person. Everything goes to stderr; stdout carries results."""

import os
import sys
import time
from types import TracebackType
from typing import IO, Any, Literal, Self

from backprop.events import (
    Checked,
    DataRead,
    Eval,
    Event,
    Examples,
    Exported,
    Failed,
    Phase,
    PlanMade,
    RunFinished,
    RunMerged,
    RunStarted,
    Step,
    Warned,
)

Detail = Literal["quiet", "normal", "verbose"]
# Seconds between step lines where there is no live bar.
LINE_EVERY_S = 10.0
GIB = 2**30


class Console:
    """A sink for people: a live bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, *, detail: Detail = "normal", stream: IO[str] | None = None) -> None:
        # A program started without stderr has None there.
        self._stream = stream or sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as we do
        self._detail: Detail = detail
        self._live = self._stream.isatty() and not os.environ.get("CI") and detail != "quiet"
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
            text = told(event, verbose=self._detail == "verbose")
            if text:
                self._print(text)

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
            self._print(
                f"step {step.step}/{step.num_steps}  loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tok/s  "
                f"{step.memory_bytes / GIB:.1f} GiB"
            )

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
        text = f"loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tok/s  {step.memory_bytes / GIB:.1f} GiB"
        self._bar.update(self._task, completed=step.step, description=text)

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(without_escapes(text), file=self._stream, flush=True)


def told(event: Event, *, verbose: bool = False) -> str:
    """Give ``event`` as text; empty if it is not worth a line."""
    match event:
        case PlanMade():
            width = max(len(name) for name in event.choices)
            rows = [
                f"  {name.replace('_', ' '):<{width}}  {_short(value):<14}  {event.reasons[name]}"
                for name, value in event.choices.items()
            ]
            return "\n".join(["plan", *rows])
        case DataRead():
            held = f", {event.eval_rows} held out" if event.eval_rows else ""
            return (
                f"data: {event.rows} rows{held}, {event.examples} examples, {event.tokens:,} tokens of which "
                f"{event.trained_tokens:,} trained; longest {event.longest}"
            )
        case Eval():
            return (
                f"held-out loss {event.loss:.3f} after step {event.step}"
                if event.part == "eval"
                else (f"loss {event.loss:.3f} on {event.part} after run {event.run}")
            )
        case RunMerged():
            return f"run {event.run}/{event.num_runs} merged ({event.mode})"
        case Warned():
            return f"warning: {event.message}"
        case Examples():
            return event.text
        case Phase():
            return f"{event.name} …"
        case Exported():
            return (
                f"{event.path}  {event.size_bytes / 2**20:,.0f} MiB\n  asked: {event.question}\n  said:  {event.answer}"
            )
        case Checked():
            mark = "ok  " if event.ok else "FAIL"
            needed = "" if event.ok else f"  (needed: {event.needed})\n      mend: {event.mend}"
            return f"{mark}  {event.name}: {event.found}{needed}"
        case RunFinished() if event.result.get("dry_run"):
            return "dry run: nothing was trained or written"
        case RunFinished():
            return f"done in {event.seconds:.0f} s: {event.output}" if event.output else ""
        case RunStarted():
            return f"backprop {event.version} {event.command}" if verbose else ""
        case _:
            return ""


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def without_escapes(text: str) -> str:
    """Show control characters, which could drive the terminal, instead of sending them."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
