"""Events and their schema."""

import io
import json

import jsonschema
import pytest

from backprop import events
from backprop.cli import main
from backprop.console import Console, told
from backprop.edges.rundir import json_lines
from backprop.schema import schema

MEMORY = {"load": 2**30, "step": 3 * 2**30, "evaluation": 2**31, "save": 2**30, "merge": 0, "moments": 5}
ONE_OF_EACH: list[events.Event] = [
    events.RunStarted(command="train", output="o", version="1"),
    events.PlanMade(
        choices={"model": "m", "steps": 3, "rate": 1e-3, "on": True},
        reasons={"model": "r", "steps": "s", "rate": "t", "on": "u"},
        memory=MEMORY,
        to_try=["2 at once with 0 layers recomputed"],
    ),
    events.DataRead(
        rows=1,
        eval_rows=0,
        examples=1,
        tokens=9,
        trained_tokens=3,
        tokens_cut=0,
        examples_dropped=0,
        shapes={"text": 1},
        longest=9,
    ),
    events.Examples(text="»x«"),
    events.Step(
        step=1,
        num_steps=2,
        loss=1.5,
        learning_rate=1e-3,
        grad_norm=1.0,
        seconds=0.1,
        tokens_per_second=10.0,
        memory_bytes=5,
    ),
    events.Eval(step=1, loss=1.0),
    events.RunMerged(run=1, num_runs=2, mode="slao"),
    events.Forgetting(
        run=2,
        parts=["1 a.jsonl", "2 b.jsonl"],
        scores=[0.5, 1.0],
        average_performance=0.75,
        learning_accuracy=1.0,
        backward_transfer=-0.5,
        forgetting=0.5,
        general_loss=2.0,
    ),
    events.Proved(name="n", ok=True, found="f", seconds=0.5),
    events.Gated(gate="eval_loss<1.2", ok=True, found="1.1"),
    events.Sampled(prompt="p", before="b", after="a"),
    events.Checkpointed(step=3, path="p", seconds=0.1),
    events.Resumed(step=3, path="p"),
    events.RolledBack(step=3, rate_share=0.5, reason="r"),
    events.Repeated(kind="close", found="f", path="p", largest=1e-5),
    events.Warned(message="careful"),
    events.Paused(reason="a card is at 90 °C", temperature_c=90),
    events.MemoryMended(phases=MEMORY, estimated=MEMORY, how="tried"),
    events.Spent(seconds=60.0, energy_wh=5.5, hottest_c=90, paused_seconds=12.5),
    events.Phase(name="loading"),
    events.Tried(quantization="q4_k_m", size_bytes=3, mean_kl=0.1, p99_kl=1.0, top1=0.9),
    events.Exported(path="p", format="gguf", quantization="f16", size_bytes=3, question="q", answer="a"),
    events.Registered(name="n", server="s", size_bytes=3, replaced=False, question="q", answer="a"),
    events.Checked(name="n", ok=False, found="f", needed="n", mend="m"),
    events.RunFinished(command="train", output="o", seconds=1.0, result={"loss": 1.0, "nested": [[1.0]]}),
    events.Failed(code=3, message="m", hint="h"),
]


def test_there_is_one_of_each_kind() -> None:
    assert [type(event) for event in ONE_OF_EACH] == list(events.KINDS)


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: events.KINDS[type(event)])
def test_what_is_written_fits_the_schema_and_only_its_own_kind(event: events.Event) -> None:
    file = io.StringIO()
    json_lines(file)(event)
    written = json.loads(file.getvalue())
    jsonschema.Draft202012Validator(schema()).validate(written)
    assert written["event"] == events.KINDS[type(event)]


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: events.KINDS[type(event)])
def test_what_was_written_is_read_again(event: events.Event) -> None:
    written = json.dumps({**events.to_json(event), "t": ""})
    again = events.from_json(json.loads(written))
    assert type(again) is type(event)
    assert json.dumps({**events.to_json(again), "t": ""}) == written


def test_what_another_version_wrote_is_no_event() -> None:
    assert events.from_json({"event": "nosuch"}) is None
    assert events.from_json({"event": "step", "step": 3}) is None


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_the_schema_refuses_a_wrong_type_and_a_missing_key() -> None:
    validator = jsonschema.Draft202012Validator(schema())
    written = events.to_json(next(event for event in ONE_OF_EACH if isinstance(event, events.Step)))
    assert validator.is_valid(written)
    assert not validator.is_valid({**written, "loss": "low"})
    assert not validator.is_valid({key: value for key, value in written.items() if key != "loss"})


def test_json_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--json-schema"])
    assert exit.value.code == 0
    assert json.loads(capsys.readouterr().out) == schema()


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: events.KINDS[type(event)])
def test_quiet_tells_errors_only(event: events.Event) -> None:
    stream = io.StringIO()
    Console(detail="quiet", stream=stream)(event)
    assert bool(stream.getvalue()) == isinstance(event, events.Failed)


def test_a_pipe_gets_the_first_and_last_step_and_one_now_and_then() -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    for number in range(1, 101):
        console(
            events.Step(
                step=number,
                num_steps=100,
                loss=1,
                learning_rate=1,
                grad_norm=1,
                seconds=1,
                tokens_per_second=1,
                memory_bytes=1,
            )
        )
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/100", "step 100/100"]


def test_the_plan_is_told_with_its_reasons() -> None:
    text = told(ONE_OF_EACH[1])
    assert all(reason in text.splitlines()[number] for number, reason in enumerate("rstu", start=1))


@pytest.mark.parametrize(
    ("exponent", "words"),
    [
        (None, ""),
        (0.0, ": the last run alone"),
        (0.25, ": each i-th run has a share of 1/i^0.25"),
        (1.0, ": the mean of all runs"),
    ],
)
def test_the_weight_that_was_chosen_is_told_in_words(exponent: float | None, words: str) -> None:
    merged = events.RunMerged(run=2, num_runs=3, mode="auto", exponent=exponent)
    assert told(merged) == f"run 2/3 merged (auto{words})"
