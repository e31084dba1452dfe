"""What a CI job shows: the summary, annotations, and JUnit XML."""

import re
import string
from collections.abc import Sequence
from html import unescape
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprop.ci import CELL_MOST, NO_LAST_WORD, annotation, junit, step_summary
from backprop.events import (
    Checked,
    Eval,
    Event,
    Exported,
    Failed,
    Gated,
    Phase,
    Proved,
    RunFinished,
    RunStarted,
    Step,
    Warned,
)

HOSTILE = (
    'a|b\nc\r\n<script>alert("x")</script> & `code` [x](http://evil.example) **b** \\| ]]> \x00\x1b[2J\ud800\uffff'
)


def step(number: int, loss: float, *, run: int = 1, seconds: float = 1.0, speed: float = 1000.0) -> Step:
    return Step(
        step=number,
        num_steps=20,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=1,
        seconds=seconds,
        tokens_per_second=speed,
        memory_bytes=number * 2**30,
        run=run,
    )


STARTED = RunStarted(command="train", output="output", version="1")
FINISHED = RunFinished(command="train", output="output", seconds=1234.5)
FAILED = Failed(code=6, message="a gate is not met: eval_loss<1.2", hint="train longer")
TRAINED: list[Event] = [
    STARTED,
    Proved(name="no example is cut", ok=True, found="0 of 97", seconds=0.25),
    Eval(step=0, loss=2.5),
    step(1, 2.0, seconds=1.0, speed=1000.0),
    Proved(name="rows stay apart", ok=False, found="0.3 at most", seconds=1.5),
    Warned(message="rows are padded instead"),
    Eval(step=10, loss=1.75),
    step(20, 1.5, seconds=3.0, speed=3000.0),
    Eval(step=20, loss=1.25),
    Gated(gate="eval_loss<1.2", ok=False, found="1.25"),
    Gated(gate="train_loss<2", ok=True, found="1.5"),
    FAILED,
]
CHECKED: list[Event] = [
    Checked(name="gpu", ok=True, found="A100"),
    Checked(name="gpu memory", ok=False, found="6.0 GiB", needed="8 GiB", mend="use a larger GPU"),
    Failed(code=5, message="the largest GPU has 6.0 GiB", hint="use a larger GPU"),
]
EXPORTED: list[Event] = [
    RunStarted(command="export", output="output/export", version="1"),
    Exported(
        path="model-q4_k_m.gguf",
        format="gguf",
        quantization="q4_k_m",
        size_bytes=3 * 2**20,
        question="who?",
        answer="Tobias | Wren",
    ),
    RunFinished(command="export", output="output/export", seconds=3.0),
]


def rows(text: str) -> list[list[str]]:
    """Read every table row as GitHub does: a pipe behind a backslash parts no cells."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[shown(cell) for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]] for line in lines]


def shown(cell: str) -> str:
    """Undo the escapes of Markdown and HTML."""
    return unescape(re.sub(rf"\\([{re.escape(string.punctuation)}])", r"\1", cell.strip().replace("<br>", "\n")))


def suite(events: Sequence[Event], *, seconds: float = 10.0) -> ElementTree.Element:
    # Through bytes, as a file would go.
    return ElementTree.fromstring(junit(events, seconds=seconds).encode())


def names(root: ElementTree.Element) -> list[str | None]:
    return [case.get("name") for case in root]


def test_the_summary_says_how_it_ended_and_what_mends_it() -> None:
    lines = step_summary(TRAINED).splitlines()
    assert lines[0] == "## backprop train: exit 6"
    assert lines[2] == "**error:** a gate is not met: eval\\_loss&lt;1.2<br>hint: train longer"
    assert "- warning: rows are padded instead" in lines
    assert step_summary([STARTED, FINISHED]).startswith("## backprop train: done\n")


def test_the_summary_holds_figures_gates_and_proofs() -> None:
    found = rows(step_summary([*TRAINED[:-1], FINISHED]))
    assert found == [
        ["figure", "value"],
        ["steps", "20 of 20"],
        ["final loss", "1.500"],
        ["held-out loss before", "2.500"],
        ["held-out loss after step 20", "1.250"],
        # (1 s x 1000 + 3 s x 3000) / 4 s
        ["tokens/s", "2,500"],
        ["peak memory", "20.0 GiB"],
        ["seconds", "1,234"],
        ["gate", "met", "found"],
        ["eval_loss<1.2", "NO", "1.25"],
        ["train_loss<2", "yes", "1.5"],
        ["proof", "held", "found"],
        ["no example is cut", "yes", "0 of 97"],
        ["rows stay apart", "NO", "0.3 at most"],
    ]


def test_the_summary_of_doctor_holds_its_checks() -> None:
    text = step_summary(CHECKED)
    assert text.startswith("## backprop doctor: exit 5\n")
    assert rows(text)[1:] == [
        ["gpu", "yes", "A100", "", ""],
        ["gpu memory", "NO", "6.0 GiB", "8 GiB", "use a larger GPU"],
    ]


def test_the_summary_of_an_export_holds_its_files() -> None:
    text = step_summary(EXPORTED)
    assert ["model-q4_k_m.gguf", "gguf q4_k_m", "3 MiB", "Tobias | Wren"] in rows(text)


def test_a_dry_run_is_not_called_done() -> None:
    dry = RunFinished(command="train", output="output", seconds=1.0, result={"dry_run": True})
    assert step_summary([STARTED, dry]).startswith("## backprop train: dry run\n")


def test_the_last_word_counts() -> None:
    assert step_summary([STARTED, FINISHED, FAILED]).startswith("## backprop train: exit 6\n")
    assert suite([STARTED, FINISHED, FAILED]).get("errors") == "1"


def test_what_did_not_happen_has_no_table() -> None:
    assert step_summary([STARTED]) == f"## backprop train: {NO_LAST_WORD}\n"


def test_a_command_that_failed_at_once_has_a_summary() -> None:
    text = step_summary([Failed(code=2, message="no such option: `--stesp`", hint="")])
    assert text == "## backprop command line: exit 2\n\n**error:** no such option: \\`--stesp\\`\n"


def test_nothing_hostile_gets_out_of_its_cell() -> None:
    events = [
        RunStarted(command=HOSTILE, output="o", version="1"),
        Proved(name=HOSTILE, ok=True, found=HOSTILE),
        Gated(gate=HOSTILE, ok=True, found=HOSTILE),
        Checked(name=HOSTILE, ok=False, found=HOSTILE, needed=HOSTILE, mend=HOSTILE),
        Exported(path=HOSTILE, format=HOSTILE, quantization="", size_bytes=1, question=HOSTILE, answer=HOSTILE),
        Warned(message=HOSTILE),
        Failed(code=1, message=HOSTILE, hint=HOSTILE),
    ]
    text = step_summary(events)
    assert set(re.findall(r"<[^>]*>", text)) == {"<br>"}
    assert "://" not in text
    assert not re.search(r"(?<!\\)[`\[\]]", text)
    # A heading and the error; then tables of one row each, of 3, 3, 5 and 4 cells; then the warning.
    assert [len(row) for row in rows(text)] == [3, 3, 3, 3, 5, 5, 4, 4]
    assert len(text.splitlines()) == 3 + 4 * 4 + 2
    assert rows(text)[1][2] == HOSTILE.replace("\r\n", "\n").replace("\x00", "\ufffd").replace(
        "\x1b", "\ufffd"
    ).replace("\ud800", "\ufffd").replace("\uffff", "\ufffd")
    text.encode()


def test_a_long_answer_is_cut() -> None:
    """GitHub drops a summary above 1 MiB whole."""
    said = Exported(path="p", format="gguf", quantization="f16", size_bytes=1, question="q", answer="|" * 2**20)
    assert rows(step_summary([said]))[1][3] == "|" * CELL_MOST + "…"


@pytest.mark.parametrize("events", [TRAINED, CHECKED, EXPORTED], ids=["train", "doctor", "export"])
def test_every_first_part_of_a_command_is_told(events: list[Event]) -> None:
    for length in range(len(events) + 1):
        part = events[:length]
        assert step_summary(part).startswith("## backprop ")
        root = suite(part)
        assert names(root)[-1] == "the command"
        error = root[-1].find("error")
        ended = bool(part) and isinstance(part[-1], RunFinished)
        assert (error is None) == ended
        if error is not None and length < len(events):
            assert error.get("message") == NO_LAST_WORD


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (Failed(code=6, message="m", hint="h"), "::error title=backprop%3A exit 6::m%0Ahint: h"),
        (
            Failed(code=2, message="100 %\r\nno: a, b", hint=""),
            "::error title=backprop%3A exit 2::100 %25%0D%0Ano: a, b",
        ),
        (Warned(message="50%0A: a, b\nc"), "::warning::50%250A: a, b%0Ac"),
        (
            Proved(name="a, b: 5 %\r\n", ok=False, found="c: d, e"),
            "::warning title=not proved%3A a%2C b%3A 5 %25%0D%0A::c: d, e",
        ),
        (Proved(name="n", ok=True, found="f"), None),
        (Phase(name="loading"), None),
        (FINISHED, None),
    ],
)
def test_an_annotation_is_escaped_as_github_reads_it(event: Event, said: str | None) -> None:
    assert annotation(event) == said


def test_a_message_cannot_give_a_command_of_its_own() -> None:
    said = annotation(Warned(message="x\n::add-mask::secret\r::stop-commands::x"))
    assert said
    assert len(said.splitlines()) == 1


def test_each_proof_and_gate_is_a_case_and_the_command_the_last() -> None:
    root = suite(TRAINED, seconds=10.0)
    assert root.tag == "testsuite"
    counts = {"tests": "5", "failures": "2", "errors": "1", "skipped": "0", "time": "10.000"}
    assert root.attrib == {"name": "backprop train", **counts}
    assert names(root) == [
        "no example is cut",
        "rows stay apart",
        "gate eval_loss<1.2",
        "gate train_loss<2",
        "the command",
    ]
    assert {case.get("classname") for case in root} == {"backprop.train"}
    assert {case.get("name"): case[0].get("message") for case in root if len(case)} == {
        "rows stay apart": "0.3 at most",
        "gate eval_loss<1.2": "1.25",
        "the command": "a gate is not met: eval_loss<1.2",
    }
    assert [(case[0].tag, case[0].text) for case in root if len(case)] == [
        ("failure", "0.3 at most"),
        ("failure", "1.25"),
        ("error", "train longer"),
    ]


def test_the_times_of_the_cases_sum_up_to_that_of_the_command() -> None:
    times = [float(case.get("time", "nan")) for case in suite(TRAINED, seconds=10.0)]
    assert times == [0.25, 1.5, 0.0, 0.0, 8.25]


def test_no_time_is_negative() -> None:
    """A proof's own clock may run a little ahead of a short command's."""
    assert suite(TRAINED, seconds=0.1)[-1].get("time") == "0.000"


def test_each_check_of_doctor_is_a_case() -> None:
    root = suite(CHECKED)
    assert names(root) == ["gpu", "gpu memory", "the command"]
    assert {case.get("classname") for case in root} == {"backprop.doctor"}
    assert (root[1][0].tag, root[1][0].get("message")) == ("failure", "6.0 GiB (needed: 8 GiB)")
    assert root[1][0].text == "use a larger GPU"
    assert (root.get("failures"), root.get("errors")) == ("1", "1")


def test_a_command_that_is_done_has_no_error() -> None:
    root = suite(EXPORTED)
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("1", "0", "0")
    assert len(root[0]) == 0


def test_an_empty_message_still_fails() -> None:
    assert suite([STARTED, Failed(code=1, message="", hint="")]).get("errors") == "1"
    assert suite([STARTED, Proved(name="n", ok=False, found="")]).get("failures") == "1"


def test_the_runs_of_a_multi_run_are_told_apart_from_the_first_on() -> None:
    started = RunStarted(command="multi-run", output="o", version="1")
    first, second = (Proved(name="it moves", ok=True, found="f", run=run) for run in (1, 2))
    # With and without the second run, the first has the same name: a CI system compares by name.
    assert names(suite([started, first])) == ["it moves, run 1", "the command"]
    assert names(suite([started, first, second])) == ["it moves, run 1", "it moves, run 2", "the command"]
    assert [row[0] for row in rows(step_summary([started, first, second]))] == [
        "proof",
        "it moves, run 1",
        "it moves, run 2",
    ]


def test_the_held_out_loss_of_each_run_is_shown() -> None:
    started = RunStarted(command="multi-run", output="o", version="1")
    parts: list[Event] = [Eval(step=0, loss=9.0, part="part 1", run=2), step(5, 1.0, run=2)]
    evals = [Eval(step=number, loss=run + number, run=run) for run in (1, 2) for number in (0, 5)]
    assert rows(step_summary([started, *evals, *parts]))[1:-2] == [
        ["steps, run 2", "5 of 20"],
        ["final loss, run 2", "1.000"],
        ["held-out loss before, run 1", "1.000"],
        ["held-out loss after step 5, run 1", "6.000"],
        ["held-out loss before, run 2", "2.000"],
        ["held-out loss after step 5, run 2", "7.000"],
    ]


def test_equal_names_are_told_apart() -> None:
    twice = Proved(name="the command", ok=True, found="f")
    assert names(suite([STARTED, twice, twice])) == ["the command", "the command (2)", "the command (3)"]


# Of every plane, with what XML forbids more often than chance would have it.
TEXT = st.text(
    st.one_of(st.characters(), st.sampled_from("\x00\x0b\x1b\x7f\x85\ud800\udfff\ufffe\uffff<>&\"'|\r\n\\`]"))
)


@given(texts=st.lists(TEXT, min_size=6, max_size=6), ok=st.booleans(), end=st.booleans())
def test_whatever_the_texts_all_is_well_formed(texts: list[str], ok: bool, end: bool) -> None:
    command, name, found, gate, message, hint = texts
    events: list[Event] = [
        RunStarted(command=command, output="o", version="1"),
        Proved(name=name, ok=ok, found=found),
        Gated(gate=gate, ok=ok, found=found),
        Checked(name=name, ok=ok, found=found, needed=message, mend=hint),
        Warned(message=message),
        *([Failed(code=1, message=message, hint=hint)] if end else []),
    ]
    root = suite(events)
    assert len(root) == 4
    assert len(set(names(root))) == 4
    assert len(root.findall("testcase/failure")) == (0 if ok else 3)
    assert len(root.findall("testcase/error")) == 1
    text = step_summary(events)
    text.encode()
    assert [len(row) for row in rows(text)] == [3, 3, 3, 3, 5, 5]
    assert set(re.findall(r"<[^>]*>", text)) <= {"<br>"}
    for event in events:
        said = annotation(event)
        assert said is None or not re.search(r"[\r\n\x00]", said)
