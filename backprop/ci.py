"""What a CI job shows of a command: a summary in Markdown, annotations, and test results in JUnit XML.

Pure functions from events to text; who calls them decides where it goes. All work on any first part of a command's events.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from xml.etree import ElementTree

from backprop.events import (
    Checked,
    Eval,
    Event,
    Exported,
    Failed,
    Gated,
    Proved,
    RunFinished,
    RunStarted,
    Step,
    Warned,
)

GIB, MIB = 2**30, 2**20
# GitHub refuses a summary of more than 1 MiB; an answer of a model has no bound of its own.
CELL_MOST = 500
# What XML 1.0 forbids (https://www.w3.org/TR/xml/#charsets): control characters, lone surrogates, two non-characters.
FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Characters that have a meaning in Markdown within a line or a table cell.
MARKUP = re.compile(r"([\\`*_\[\]|~!#$])")
# A bare address would become a link.
ADDRESS = re.compile(r"(?i)(://|www\.)")
NO_LAST_WORD = "ended without a last word"


def step_summary(events: Sequence[Event]) -> str:
    """Write the Markdown that GitHub shows on the page of a job."""
    parts = [f"## backprop {_text(_command(events))}: {_ending(events)}"]
    parts += [_error(event) for event in events if isinstance(event, Failed)]
    parts += _table(("figure", "value"), _figures(events))
    gates = [event for event in events if isinstance(event, Gated)]
    parts += _table(("gate", "met", "found"), [(_named(gate, events), _mark(gate.ok), gate.found) for gate in gates])
    proofs = [event for event in events if isinstance(event, Proved)]
    parts += _table(("proof", "held", "found"), [(_named(one, events), _mark(one.ok), one.found) for one in proofs])
    checks = [event for event in events if isinstance(event, Checked)]
    parts += _table(
        ("check", "ok", "found", "needed", "mend"),
        [(check.name, _mark(check.ok), check.found, check.needed, check.mend) for check in checks],
    )
    parts += _table(
        ("file", "held as", "size", "said"),
        [
            (event.path, f"{event.format} {event.quantization}", f"{event.size_bytes / MIB:,.0f} MiB", event.answer)
            for event in events
            if isinstance(event, Exported)
        ],
    )
    warnings = [f"- warning: {_text(event.message)}" for event in events if isinstance(event, Warned)]
    return "\n\n".join([*parts, *(["\n".join(warnings)] if warnings else [])]) + "\n"


def annotation(event: Event) -> str | None:
    """Give the workflow command by which GitHub marks a job with ``event``; None if it deserves no mark."""
    match event:
        case Failed():
            hint = f"\nhint: {event.hint}" if event.hint else ""
            return _workflow_command("error", f"backprop: exit {event.code}", event.message + hint)
        case Warned():
            return _workflow_command("warning", "", event.message)
        case Proved(ok=False):
            # Not each of these ends the run; one that does is followed by its `Failed`.
            return _workflow_command("warning", f"not proved: {event.name}", event.found)
        case _:
            return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One test case: `wrong` is None if it passed."""

    name: str
    seconds: float = 0.0
    wrong: str | None = None
    detail: str = ""


def junit(events: Sequence[Event], *, seconds: float) -> str:
    """Write test results in JUnit's XML: each proof, gate and check, and at last the command itself.

    Args:
        seconds: What the command took. The last case gets what the others leave of it, so that the cases sum up to it.
    """
    command = _command(events)
    cases = [case for event in events for case in _cases(event, events)]
    rest = max(0.0, seconds - sum(case.seconds for case in cases))
    last = _last_word(events)
    hint = last.hint if isinstance(last, Failed) else ""
    wrong = last.message if isinstance(last, Failed) else None if last else NO_LAST_WORD
    end = Case(name="the command", seconds=rest, wrong=wrong, detail=hint)
    suite = ElementTree.Element(
        "testsuite",
        name=_clean(f"backprop {command}"),
        tests=str(len(cases) + 1),
        failures=str(sum(case.wrong is not None for case in cases)),
        errors=str(int(end.wrong is not None)),
        skipped="0",
        time=f"{seconds:.3f}",
    )
    for (case, name), element in zip(_told_apart([*cases, end]), ["failure"] * len(cases) + ["error"], strict=True):
        one = ElementTree.SubElement(
            suite, "testcase", classname=_clean(f"backprop.{command}"), name=name, time=f"{case.seconds:.3f}"
        )
        if case.wrong is not None:
            ElementTree.SubElement(one, element, message=_clean(case.wrong)).text = _clean(case.detail or case.wrong)
    ElementTree.indent(suite)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suite, encoding="unicode")}\n'


def _cases(event: Event, events: Sequence[Event]) -> list[Case]:
    match event:
        case Proved():
            wrong = None if event.ok else event.found
            return [Case(name=_named(event, events), seconds=event.seconds, wrong=wrong)]
        case Gated():
            return [Case(name=f"gate {_named(event, events)}", wrong=None if event.ok else event.found)]
        case Checked():
            wrong = None if event.ok else f"{event.found} (needed: {event.needed})"
            return [Case(name=event.name, wrong=wrong, detail=event.mend)]
        case _:
            return []


def _told_apart(cases: Iterable[Case]) -> list[tuple[Case, str]]:
    """Give each case a name of its own: CI systems take equal names for one test."""
    named: list[tuple[Case, str]] = []
    used: set[str] = set()
    for case in cases:
        first = name = _clean(case.name)
        number = 1
        while name in used:
            number += 1
            name = f"{first} ({number})"
        used.add(name)
        named.append((case, name))
    return named


def _named(event: Proved | Gated, events: Sequence[Event]) -> str:
    return _of_run(event.name if isinstance(event, Proved) else event.gate, event.run, events)


def _of_run(name: str, run: int, events: Sequence[Event]) -> str:
    """Add the run where a command has several: the same name however far the command came."""
    return f"{name}, run {run}" if run > 1 or _command(events) == "multi-run" else name


def _command(events: Sequence[Event]) -> str:
    """Find which command spoke. Doctor does not say that it begins; bad options fail before any command does."""
    for event in events:
        if isinstance(event, RunStarted | RunFinished):
            return event.command
        if isinstance(event, Checked):
            return "doctor"
    return "command line"


def _last_word(events: Sequence[Event]) -> RunFinished | Failed | None:
    return next((event for event in reversed(events) if isinstance(event, RunFinished | Failed)), None)


def _ending(events: Sequence[Event]) -> str:
    match _last_word(events):
        case RunFinished() as finished:
            return "dry run" if finished.result.get("dry_run") else "done"
        case Failed() as failed:
            return f"exit {failed.code}"
        case None:
            return NO_LAST_WORD


def _error(failed: Failed) -> str:
    hint = f"<br>hint: {_text(failed.hint)}" if failed.hint else ""
    return f"**error:** {_text(failed.message)}{hint}"


def _figures(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Give what a run measured, in the order of a reader's questions; only what there is."""
    steps = [event for event in events if isinstance(event, Step)]
    held_out = [event for event in events if isinstance(event, Eval) and event.part == "eval"]
    rows: list[tuple[str, str]] = []
    if steps:
        last = steps[-1]
        rows.append((_of_run("steps", last.run, events), f"{last.step:,} of {last.num_steps:,}"))
        rows.append((_of_run("final loss", last.run, events), f"{last.loss:.3f}"))
    for run in dict.fromkeys(event.run for event in held_out):
        of_run = [event for event in held_out if event.run == run]
        for event in (of_run[0], *of_run[1:][-1:]):
            when = f"after step {event.step:,}" if event.step else "before"
            rows.append((_of_run(f"held-out loss {when}", run, events), f"{event.loss:.3f}"))
            if event.accuracy is not None:
                rows.append((_of_run(f"preferred rightly {when}", run, events), f"{event.accuracy:.0%}"))
    if steps:
        busy = sum(step.seconds for step in steps)
        tokens = sum(step.tokens_per_second * step.seconds for step in steps)
        rows.append(("tokens/s", f"{tokens / busy:,.0f}" if busy else "0"))
        rows.append(("peak memory", f"{max(step.memory_bytes for step in steps) / GIB:.1f} GiB"))
    return [*rows, *(("seconds", f"{event.seconds:,.0f}") for event in events if isinstance(event, RunFinished))]


def _mark(ok: bool) -> str:
    return "yes" if ok else "NO"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Write a table; nothing without rows."""
    lines = [f"| {' | '.join(_text(cell) for cell in row)} |" for row in rows]
    return ["\n".join([f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *lines])] if lines else []


def _text(text: str) -> str:
    """Write ``text`` so that GitHub shows it as it is, on one line of Markdown."""
    shown = _clean(text).strip()
    shown = shown if len(shown) <= CELL_MOST else f"{shown[:CELL_MOST]}…"
    shown = MARKUP.sub(r"\\\1", escape(shown, quote=False))
    return "<br>".join(ADDRESS.sub(_not_a_link, shown).splitlines())


def _not_a_link(address: re.Match[str]) -> str:
    return address[0].replace(":", "&#58;").replace(".", "&#46;")


def _workflow_command(name: str, title: str, text: str) -> str:
    # As https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts escapes them: `%` first.
    data = _clean(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    value = _clean(title).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    value = value.replace(":", "%3A").replace(",", "%2C")
    return f"::{name} title={value}::{data}" if title else f"::{name}::{data}"


def _clean(text: str) -> str:
    """Replace what XML 1.0 forbids, which neither a log nor a page needs either."""
    return FORBIDDEN.sub("\ufffd", text)
