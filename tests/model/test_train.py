"""Training for real, on a tiny random Llama with the SmolLM2 tokenizer."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import Done, backprop, backprop_process, chat

from backprop import BackpropError, Trainer
from backprop.schema import schema

pytestmark = pytest.mark.model

ROWS = [chat(f"What is {n}?", f"It is number {n}.") for n in range(12)]


def adapter(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run / "lora" / "adapter_model.safetensors")


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events(run) if event["event"] == "step"]


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path, write: Callable[..., Path]) -> Callable[..., Path]:
    """Train in this process, quietly, into a fresh directory."""
    data = write(ROWS)

    def train(name: str = "run", rows: list[Any] | None = None, **options: Any) -> Path:
        source = write(rows, f"{name}.jsonl") if rows is not None else data
        trainer = Trainer(str(tiny_model), say=lambda event: None, output=tmp_path / name)
        defaults = {"steps": 3, "batch_size": 4, "lora_r": 4, "learning_rate": 1e-2, "skip_proofs": True}
        return trainer.train(source, **{**defaults, **options})

    return train


OF_FINISHED = (
    *("--data", "data.jsonl", "--steps", "12", "--batch-size", "4", "--lora-r", "4", "--lr", "0.02"),
    *("--eval-data", "held.jsonl", "--eval-steps", "5"),
)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """One run through the command line, as a user or CI job starts it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "held.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    done = backprop_process("train", *OF_FINISHED, "--model", tiny_model, "--json", cwd=folder)
    return folder / "output", done


def test_a_run_ends_with_0_and_says_so_in_valid_events(
    finished: tuple[Path, Done],
) -> None:
    run, done = finished
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{**event, "t": ""} for event in printed] == [{**event, "t": ""} for event in events(run)]
    validator = jsonschema.Draft202012Validator(schema())
    for event in printed:
        validator.validate(event)
    assert printed[-1]["event"] == "run_finished"
    assert [event["step"] for event in printed if event["event"] == "step"] == list(range(1, 13))
    assert [event["step"] for event in printed if event["event"] == "eval"] == [0, 5, 10, 12]


def test_the_loss_falls_and_the_held_out_loss_with_it(
    finished: tuple[Path, Done],
) -> None:
    run, _ = finished
    # Random weights start no better than a guess among all tokens: ln 49152 = 10.8.
    assert losses(run)[0] > 10.8
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    result = manifest(run)["result"]
    assert result["eval_loss"] < 0.7 * result["eval_loss_before"]


def test_the_manifest_holds_what_a_run_was(finished: tuple[Path, Done]) -> None:
    run, _ = finished
    written = manifest(run)
    assert (written["status"], written["command"]) == ("finished", "train")
    assert written["config"]["learning_rate"] == 0.02
    assert written["plan"]["steps"] == {"value": 12, "reason": "set by `--steps`"}
    assert len(written["identity"]["data_sha256"]) == 64
    assert written["versions"]["torch"]


def test_the_report_shows_the_curve_and_stands_alone(finished: tuple[Path, Done]) -> None:
    page = (finished[0] / "report.html").read_text()
    assert "<h1>backprop train: finished</h1>" in page
    assert "<polyline" in page
    assert "held-out loss" in page
    assert "set by `--steps`" in page
    assert "http" not in page.replace("http-equiv", "")


def test_only_known_files_are_left(finished: tuple[Path, Done]) -> None:
    run, _ = finished
    assert {path.name for path in run.iterdir()} == {"run.json", "events.jsonl", "report.html", "lora", "checkpoints"}


def test_plain_peft_loads_the_adapter_and_gets_the_loss_that_was_reported(
    finished: tuple[Path, Done], tiny_model: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(run / "lora")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run / "lora")
    prompt = tokenizer.apply_chat_template(ROWS[0]["messages"][:1], tokenize=False, add_generation_prompt=True)
    whole = prompt + "It is number 0.<|im_end|>"
    ids = tokenizer(whole, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss.item()
    assert loss == pytest.approx(manifest(run)["result"]["eval_loss"], rel=1e-4)


def test_a_second_run_in_the_same_directory_is_refused(finished: tuple[Path, Done], tiny_model: Path) -> None:
    run, _ = finished
    before = (run / "run.json").read_bytes()
    done = backprop("train", "--data", "data.jsonl", "--model", tiny_model, "--steps", "3", cwd=run.parent)
    assert done.returncode == 2
    assert "holds another run, which differs in" in done.stderr
    assert "steps: 12 before, 3 now" in done.stderr
    assert (run / "run.json").read_bytes() == before


@pytest.mark.slow
def test_a_run_of_a_version_with_fewer_options_is_still_the_same_run(
    finished: tuple[Path, Done], tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    older = tmp_path / "older"
    shutil.copytree(finished[0], older)
    told = json.loads((older / "run.json").read_text())
    for name in ("objective", "beta", "pissa"):
        del told["identity"][name]
    (older / "run.json").write_text(json.dumps(told))
    command = ["train", *OF_FINISHED, "--model", tiny_model, "--output", older]
    again = backprop(*command, cwd=finished[0].parent)
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stderr
    other = backprop(*command, "--beta", "0.3", cwd=finished[0].parent)
    assert other.returncode == 2
    assert "beta" in other.stderr


def test_the_same_run_twice_gives_the_same_bits(train: Callable[..., Path]) -> None:
    one, two = adapter(train("one")), adapter(train("two"))
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.slow
def test_another_seed_starts_from_another_adapter_and_takes_the_rows_in_another_order(
    train: Callable[..., Path],
) -> None:
    # At a rate too small to matter, the adapter is where it began, and the losses are those of the rows.
    one, two = (train(f"run {seed}", learning_rate=1e-12, seed=seed) for seed in (1, 2))
    starts = [adapter(run) for run in (one, two)]
    assert not any(starts[0][name].allclose(starts[1][name], atol=1e-3) for name in starts[0] if "lora_A" in name)
    assert losses(one) != losses(two)


def test_the_loss_is_that_of_plain_transformers(train: Callable[..., Path], tiny_model: Path) -> None:
    """The first step of one row: what `transformers` itself computes for the same labels."""
    import torch
    from transformers import AutoModelForCausalLM

    from backprop.core.data.formats import Row
    from backprop.core.data.judge import judge
    from backprop.core.data.render import encode
    from backprop.engine.batches import labels_of
    from backprop.engine.load import load_tokenizer

    row = chat("one", "two three", "four", "five")
    (example,) = encode(
        judge([Row(place="", value=row)]).conversations[0], load_tokenizer(str(tiny_model), trust_remote_code=False)
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels_of(example)])).loss.item()
    assert losses(train(rows=[row], batch_size=1))[0] == pytest.approx(expected, rel=1e-5)


def test_with_the_real_tokenizer_the_answers_and_their_end_tokens_are_trained(tiny_model: Path) -> None:
    from backprop.core.data.formats import Row
    from backprop.core.data.judge import judge
    from backprop.core.data.render import encode
    from backprop.engine.load import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)
    (example,) = encode(judge([Row(place="", value=chat("hi there", "ho", "hu", "no"))]).conversations[0], tokenizer)
    trained = [token for token, on in zip(example.ids, example.mask, strict=True) if on]
    assert tokenizer.inner.decode(trained) == "ho<|im_end|>no<|im_end|>"


def test_an_answer_that_opens_with_line_breaks_and_a_conversation_that_opens_with_an_answer_train(
    train: Callable[..., Path],
) -> None:
    """BPE merges the template's line break with the answer's; such rows were once refused with the whole file."""
    opened = {"messages": [{"role": "assistant", "content": "hi"}, *chat("hu", "no")["messages"]]}
    run = train(rows=[chat("code?", "\n\n    x = 1"), opened])
    assert len(losses(run)) == 3


def test_one_step_trains(train: Callable[..., Path]) -> None:
    """The warm-up once gave the first step a rate of zero, and the run said that it was done."""
    assert all(tensor.any() for name, tensor in adapter(train(steps=1)).items() if "lora_B" in name)


def test_a_failure_before_training_leaves_the_earlier_run_as_it_was(
    train: Callable[..., Path], tmp_path: Path, write: Callable[..., Path]
) -> None:
    run = train()
    before = (run / "lora" / "adapter_model.safetensors").read_bytes()
    options = ["--output", run, "--overwrite", "--offline"]
    done = backprop("train", "--data", write(ROWS), "--model", "owner/typo", *options, cwd=tmp_path)
    assert done.returncode == 4
    assert (run / "lora" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    words = [
        sys.executable,
        "-m",
        "backprop",
        "train",
        "--data",
        write(ROWS),
        "--model",
        tiny_model,
        "--steps",
        "3",
        "--json",
    ]
    process = subprocess.Popen(
        [str(word) for word in words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert manifest(tmp_path / "output")["status"] == "finished"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_only_the_adapter_is_trained_and_all_of_it_moves(train: Callable[..., Path], method: str) -> None:
    trained = adapter(train(method=method))
    kinds = {"lora_A", "lora_B", "lora_magnitude_vector"} if method == "dora" else {"lora_A", "lora_B"}
    assert {kind for name in trained for kind in kinds if kind in name} == kinds
    assert all(any(kind in name for kind in kinds) for name in trained)
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)
    assert len([name for name in trained if "lora_A" in name]) == 2 * 7  # layers x projections
    assert not [name for name in trained if "embed" in name or "lm_head" in name]


@pytest.mark.slow
def test_with_lora_plus_b_learns_faster_by_the_ratio(train: Callable[..., Path]) -> None:
    """Adam's first step has the length of the rate."""
    options = {"steps": 1, "learning_rate": 1e-3, "scheduler": "constant", "warmup": 0.0}
    plain, plus = adapter(train("plain", **options)), adapter(train("plus", lora_plus=16.0, **options))
    for name in (name for name in plain if "lora_B" in name):
        assert float(plus[name].abs().max() / plain[name].abs().max()) == pytest.approx(16, rel=1e-3)
    assert all(plain[name].equal(plus[name]) for name in plain if "lora_A" in name)


def test_rslora_is_saved_as_such_and_scales_by_the_root_of_the_rank(
    train: Callable[..., Path], tiny_model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = train(rslora=True, lora_alpha=6.0)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run / "lora")
    layers = [module for module in model.modules() if hasattr(module, "lora_B")]
    scales = {scale for layer in layers for scale in layer.scaling.values()}
    assert scales == {3.0}  # 6 / sqrt(4)


def test_target_modules_that_do_not_exist_are_answered_with_those_that_do(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(BackpropError) as raised:
        train(target_modules=("attention",))
    assert raised.value.code == 4
    assert "q_proj" in (raised.value.hint or "")
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_a_loss_that_is_not_finite_stops_before_the_update(train: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BackpropError) as raised:
        train(learning_rate=1.0, lora_alpha=1e30)
    assert raised.value.code == 6
    assert "not finite" in raised.value.message or "the loss is" in raised.value.message
    assert not (tmp_path / "run" / "lora").exists()
    assert events(tmp_path / "run")[-1]["event"] == "error"


def test_training_stops_early_and_the_best_adapter_is_delivered(
    train: Callable[..., Path], tiny_model: Path, write: Callable[..., Path]
) -> None:
    """Answers that are learnt by heart make another answer unlikelier, once the first steps have taught the ending."""
    held = write([chat("a", "seven eight nine")], "held.jsonl")
    rows = [chat("a", "one two three four five six")] * 8
    options = {"eval_data": (str(held),), "eval_steps": 2, "learning_rate": 3e-2}
    # The same rate at each step, whatever the number of steps.
    options |= {"scheduler": "constant", "warmup": 0.0}
    run = train(rows=rows, steps=200, early_stopping=2, **options)
    measured = {event["step"]: event["loss"] for event in events(run) if event["event"] == "eval"}
    best = min((step for step in measured if step), key=lambda step: measured[step])
    assert max(measured) == best + 4 < 200
    assert manifest(run)["result"]["eval_loss"] == measured[best]
    assert manifest(run)["result"]["delivered_step"] == best
    stopped_there = train("short", rows=rows, steps=best, **options)
    delivered, wanted = adapter(run), adapter(stopped_there)
    assert all(delivered[name].equal(wanted[name]) for name in wanted)


def test_text_rows_train(train: Callable[..., Path]) -> None:
    run = train(rows=[{"text": "once upon a time"}] * 4)
    assert losses(run)[-1] < losses(run)[0]


def test_tensorboard_gets_the_curve(train: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = train(report_to="tensorboard")
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))


def test_dry_run_shows_the_plan_and_marks_what_is_trained(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    done = backprop("train", "--data", write(ROWS), "--model", tiny_model, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "»It is number 0.<|im_end|>«" in done.stderr
    assert "learning rate" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "no such model"),
        (lambda folder: folder.mkdir(), "no config.json"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "holds no weights"),
        (
            lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}"), (folder / "m.bin").touch()),
            "pickled weights only",
        ),
    ],
    ids=["unknown", "not a model", "no weights", "pickle"],
)
def test_a_bad_model_is_exit_4_and_leaves_nothing(
    tmp_path: Path, write: Callable[..., Path], make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / "model")
    done = backprop("train", "--data", write(ROWS), "--model", "model", "--offline", cwd=tmp_path)
    assert done.returncode == 4
    assert said in done.stderr
    assert not (tmp_path / "output").exists()


def test_damaged_weights_are_exit_4(tmp_path: Path, write: Callable[..., Path], tiny_model: Path) -> None:
    import shutil

    shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    done = backprop("train", "--data", write(ROWS), "--model", "model", cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert "damaged" in done.stderr


def start(command: list[str], *, cwd: Path) -> "subprocess.Popen[str]":
    """Start a process that hears Ctrl-C, also where these tests run in the background, which ignores it."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 75, "SIGTERM")])
def test_a_signal_leaves_nothing_half_written_and_another_command_is_refused(
    tmp_path: Path, write: Callable[..., Path], tiny_model: Path, sent: signal.Signals, code: int, name: str
) -> None:
    command = [sys.executable, "-m", "backprop", "train", "--data", str(write(ROWS)), "--model", str(tiny_model)]
    command += ["--steps", "100000", "--verbose", "--no-rehearse"]
    process = start(command, cwd=tmp_path)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("step 3/"):
            break
    os.kill(process.pid, sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert f"error: stopped by {name}" in error
    run = tmp_path / "output"
    assert manifest(run)["status"] == "interrupted"
    assert {path.name for path in run.iterdir()} == {"run.json", "events.jsonl", "report.html", "checkpoints"}
    assert events(run)[-1]["code"] == code
    steps = [event["step"] for event in events(run) if event["event"] == "step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{steps[-1]:06d}"]
    command[command.index("100000")] = "2"
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "steps: 100000 before, 2 now" in refused.stderr


def test_ctrl_c_while_loading_is_exit_130_too(tmp_path: Path, write: Callable[..., Path], tiny_model: Path) -> None:
    command = [sys.executable, "-m", "backprop", "train", "--data", str(write(ROWS)), "--model", str(tiny_model)]
    process = start(command, cwd=tmp_path)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("rendering"):
            break
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
