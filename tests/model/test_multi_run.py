"""multi-run for real: what is delivered is the merge, whatever the mode."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import backprop, chat, plant_in_training

from backprop import BackpropError, Trainer, events
from backprop.core.forgetting import Ledger
from backprop.edges import rundir
from backprop.engine import objectives
from backprop.errors import TrainingError

pytestmark = pytest.mark.model

OPTIONS = ["--steps", "3", "--batch-size", "4", "--lora-r", "4", "--skip-proofs"]


def adapter(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "lora" / "adapter_model.safetensors")


def rows(word: str) -> list[dict[str, object]]:
    return [chat(f"{word} {n}?", f"{word} is {n}.") for n in range(8)]


@pytest.fixture
def multi_run(tiny_model: Path, write: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    sources = [option for word in "abc" for option in ("--data", str(write(rows(word), f"{word}.jsonl")))]

    def multi_run(*options: str, data: list[str] = sources, rate: float = 0.01) -> Path:
        done = backprop("multi-run", *data, "--model", tiny_model, *OPTIONS, "--lr", str(rate), *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return tmp_path / "output"

    return multi_run


def test_the_delivered_adapter_is_the_slao_merge_of_the_runs_on_disk_measured_on_every_part_so_far(
    multi_run: Callable[..., Path],
) -> None:
    run = multi_run("--init", "literal")
    manifest = json.loads((run / "run.json").read_text())
    result = manifest["result"]
    asked = [probe[0]["content"] for probe in manifest["probes"]]
    assert {question[0] for question in asked} == set("abc"), "an exported file is asked rows of every part"
    assert [len(losses) for losses in result["loss_by_run_and_part"]] == [1, 2, 3]
    assert (result["runs"], result["merge_mode"]) == (3, "slao")
    trained = [adapter(run / "runs" / f"{number:03d}") for number in (1, 2, 3)]
    delivered = adapter(run)
    for name, tensor in delivered.items():
        if "lora_A" in name:
            expected = trained[2][name]
        else:
            # B_m after three merges: lambda = 1, 1/sqrt(2), 1/sqrt(3) (slao, arXiv:2512.23017).
            merged = trained[0][name]
            merged = merged + (trained[1][name] - merged) / 2**0.5
            expected = merged + (trained[2][name] - merged) / 3**0.5
        assert tensor.allclose(expected, atol=1e-6), name
    assert any(not delivered[name].equal(trained[2][name]) for name in delivered), "the last run is not the merge"


@pytest.mark.slow
def test_from_a_function_preserving_start_the_merge_is_of_factors_in_one_basis(multi_run: Callable[..., Path]) -> None:
    import torch

    run = multi_run()
    trained = [adapter(run / "runs" / f"{number:03d}") for number in (1, 2, 3)]
    delivered = adapter(run)
    for a in (name for name in delivered if "lora_A" in name):
        b = a.replace("lora_A", "lora_B")
        merged = trained[0][b].double()
        for number in (1, 2):
            # With A^T = Q R, the next run began at Q^T and B R^T: R is what turns the merge into its basis.
            upper = torch.linalg.qr(trained[number - 1][a].double().T)[1]
            upper = upper * torch.where(upper.diagonal() < 0, -1.0, 1.0)[:, None]
            merged = merged @ upper.T
            merged = merged + (trained[number][b] - merged) / (number + 1) ** 0.5
        assert delivered[b].double().allclose(merged, atol=1e-6), b
        assert delivered[a].equal(trained[2][a])


@pytest.mark.slow
def test_each_run_starts_from_the_last_fine_tuned_adapter_never_from_the_merged(
    multi_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backprop.core.slao import next_start
    from backprop.verbs import adapter as verb

    starts: list[Any] = []

    def watched(*arguments: Any, start: Any = None, **options: Any) -> Any:
        starts.append(start)
        return verb.train_one(*arguments, start=start, **options)

    monkeypatch.setattr("backprop.verbs.multi_run.train_one", watched)
    run = multi_run()
    assert starts[0] is None
    for number, start in enumerate(starts[1:], start=1):
        expected = next_start(adapter(run / "runs" / f"{number:03d}"), init="function-preserving")
        assert all(start[name].allclose(expected[name], atol=1e-6) for name in expected), f"run {number + 1}"


@pytest.mark.slow
def test_sequential_delivers_the_last_run(multi_run: Callable[..., Path]) -> None:
    run = multi_run("--merge-mode", "sequential")
    delivered, last = adapter(run), adapter(run / "runs" / "003")
    assert all(delivered[name].equal(last[name]) for name in delivered)


@pytest.mark.slow
def test_chunks_of_one_data_set_use_every_row_and_are_sequential(
    multi_run: Callable[..., Path], write: Callable[..., Path]
) -> None:
    data = ["--data", str(write(rows("x")[:7], "big.jsonl"))]
    run = multi_run("--runs", "2", data=data)
    assert json.loads((run / "run.json").read_text())["result"]["merge_mode"] == "sequential"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["rows"] for event in events if event["event"] == "data"] == [4, 3]
    assert json.loads((run / "runs" / "002" / "metrics.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_slao_on_chunks_of_one_data_set_is_told_to_be_neutral(
    multi_run: Callable[..., Path], write: Callable[..., Path]
) -> None:
    data = ["--data", str(write(rows("x"), "big.jsonl"))]
    run = multi_run("--runs", "2", "--merge-mode", "slao", data=data)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any("SLAO neither helps nor hurts" in event["name"] for event in events if event["event"] == "phase")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--runs", "9"], 3, "8 rows cannot be cut into 9 runs"),
        (["--eval-data", "x.jsonl", "--eval-data", "y.jsonl"], 2, "one `--eval-data` for each `--data`"),
        (["--gate", "eval_loss<1"], 2, "--max-forgetting"),
        (["--replay", "1"], 2, "`--replay` must be"),
    ],
)
def test_what_cannot_be_a_multi_run_is_refused_before_any_work(
    write: Callable[..., Path], tmp_path: Path, options: list[str], code: int, said: str
) -> None:
    done = backprop("multi-run", "--data", write(rows("x"), "big.jsonl"), *options, cwd=tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert not (tmp_path / "output").exists()


def test_dry_run_shows_the_runs_and_writes_nothing(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    data = ["--data", write(rows("a"), "a.jsonl"), "--data", write(rows("b"), "b.jsonl")]
    done = backprop("multi-run", *data, "--model", tiny_model, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 runs on [8, 8] rows, merged by slao" in done.stderr
    assert not (tmp_path / "output").exists()


def test_bad_data_of_a_later_run_is_found_before_the_first(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    data = ["--data", str(write(rows("a"), "a.jsonl")), "--data", "missing.jsonl"]
    done = backprop("multi-run", *data, "--model", tiny_model, *OPTIONS, cwd=tmp_path)
    assert done.returncode == 3
    assert not (tmp_path / "output").exists()


def test_a_rank_larger_than_a_layer_is_wide_is_refused_before_the_weights_are_loaded(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    """It was once found after the first run, when the second was to begin."""
    data = ["--data", write(rows("a"), "a.jsonl"), "--data", write(rows("b"), "b.jsonl")]
    done = backprop("multi-run", *data, "--model", tiny_model, "--lora-r", "65", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert "rank 65 is larger than the width 64 of `model.layers.0.self_attn.q_proj`" in done.stderr
    assert "give `--lora-r 64` or less, or name wider layers alone by `--target-modules`" in done.stderr
    wide = ["--lora-r", "65", "--target-modules", "down_proj"]  # which is 128 wide
    assert backprop("multi-run", *data, "--model", tiny_model, *wide, "--dry-run", cwd=tmp_path).returncode == 0


def test_the_widths_of_a_model_that_needs_a_missing_package_are_not_known(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the loader that says so, with the name of the package."""
    from transformers import AutoModelForCausalLM

    from backprop.config import TrainConfig
    from backprop.engine.widths import narrowest_layer

    def missing(*arguments: Any, **options: Any) -> Any:
        raise ImportError("needs timm")

    assert narrowest_layer(str(tiny_model), TrainConfig(data=("a",))) is not None
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", missing)
    assert narrowest_layer(str(tiny_model), TrainConfig(data=("a",))) is None


@dataclass
class Told:
    """A multi-run in this process, and what it said."""

    folder: Path
    said: list[events.Event] = field(default_factory=list[events.Event])
    error: BackpropError | None = None

    def all(self, kind: type) -> list[Any]:
        return [event for event in self.said if isinstance(event, kind)]

    @property
    def result(self) -> dict[str, Any]:
        return self.all(events.RunFinished)[-1].result

    @property
    def warned(self) -> str:
        return "\n".join(event.message for event in self.all(events.Warned))


@pytest.fixture
def runs(tiny_model: Path, write: Callable[..., Path], tmp_path: Path, one_thread: None) -> Callable[..., Told]:
    """Train on data sets in turn, as Python users do."""

    def runs(*words: str, folder: str = "run", of: Callable[[str], list[Any]] = rows, **options: Any) -> Told:
        told = Told(tmp_path / folder)
        data = [write(of(word), f"{word}.jsonl") for word in words]
        trainer = Trainer(str(tiny_model), say=told.said.append, output=told.folder, skip_proofs=True)
        defaults = {"steps_per_run": 3, "batch_size": 4, "lora_r": 4, "learning_rate": 0.01}
        try:
            trainer.multi_run(dataset=data, **{**defaults, **options})
        except BackpropError as error:
            told.error = error
        return told

    return runs


def plainly_measured(model: Any, tokenizer: Any, path: Path) -> tuple[float, float]:
    """Give the mean loss of the answers in a file, and the share that greedy decoding gives word for word."""
    import torch

    losses: list[float] = []
    exact: list[bool] = []
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        answer = whole[len(asked) : whole.rindex("<|im_end|>") + len("<|im_end|>")]
        prompt, wanted = (tokenizer(text, return_tensors="pt").input_ids for text in (asked, answer))
        with torch.no_grad():
            logits = model(torch.cat([prompt, wanted], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
            said = model.generate(prompt, max_new_tokens=wanted.shape[1], do_sample=False)[0, prompt.shape[1] :]
        losses += torch.nn.functional.cross_entropy(logits, wanted[0], reduction="none").tolist()
        exact.append(said.tolist() == wanted[0].tolist())
    return sum(losses) / len(losses), sum(exact) / len(exact)


@pytest.mark.slow
def test_what_is_measured_is_what_plain_peft_loads_from_the_delivered_folder(
    runs: Callable[..., Told], write: Callable[..., Path], tiny_model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def same(word: str) -> list[dict[str, object]]:
        return [chat(f"Now {n}?", f"{word}.") for n in range(8)]

    held = [write(same(word)[:4], f"{word}-held.jsonl") for word in ("yes", "no")]
    general = write(rows("else")[:3], "general.jsonl")
    options = {"eval_data": [str(one) for one in held], "general_eval": [str(general)]}
    told = runs("yes", "no", of=same, steps_per_run=16, lora_r=16, **options)
    assert told.error is None, told.error
    tokenizer: Any = AutoTokenizer.from_pretrained(told.folder / "lora")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model: Any = PeftModel.from_pretrained(base, told.folder / "lora").eval()
    found = [plainly_measured(model, tokenizer, path) for path in (*held, general)]
    with model.disable_adapter():
        before, _ = plainly_measured(model, tokenizer, general)
    assert 0 < sum(exact for _, exact in found) < 3, "some are known by heart, and some are not"
    written = json.loads((told.folder / "forgetting.json").read_text())
    assert written["loss"][-1] == pytest.approx([loss for loss, _ in found[:2]], abs=1e-3)
    assert written["exact_match"][-1] == [exact for _, exact in found[:2]]
    assert written["general_loss"][-1] == pytest.approx(found[2][0], abs=1e-3)
    assert written["general_loss_before"] == pytest.approx(before, abs=1e-3)
    assert told.result["adapter_sha256"] == rundir.sha256_of(told.folder / "lora" / "adapter_model.safetensors")
    assert told.result["forgetting"] == written["measures"][-1]["forgetting"]
    assert len((told.folder / "forgetting.csv").read_text().splitlines()) == 1 + 1 + 2 + 3
    page = (told.folder / "report.html").read_text()
    assert "Learnt and forgotten" in page
    assert f">{written['score'][-1][0]:.3f}</td>" in page


@pytest.mark.slow
def test_a_run_that_fails_changes_nothing_and_is_told(
    runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backprop.core import slao
    from backprop.verbs import multi_run as verb

    real, result, begun = verb.train_one, verb._Fold.result, []

    def killed(fold: Any) -> Any:
        monkeypatch.setattr(verb._Fold, "result", result)
        raise SystemExit(9)

    def failing(config: Any, prepared: Any, **options: Any) -> Any:
        begun.append(options["run"])
        if options["run"] == 2:
            raise TrainingError("the loss is not finite", hint="eat more fruit")
        return real(config, prepared, **options)

    monkeypatch.setattr(verb, "train_one", failing)
    monkeypatch.setattr(verb._Fold, "result", killed)
    with pytest.raises(SystemExit):
        runs("a", "b", "c")
    told = runs("a", "b", "c")
    assert begun == [1, 2, 3], "a run that failed is not tried again"
    assert told.error is None
    assert "run 2 failed and changes nothing: the loss is not finite (eat more fruit)" in told.warned
    assert told.result["failed_runs"] == [{"run": 2, "why": "the loss is not finite"}]
    assert told.result["runs"] == 2
    trained = [adapter(told.folder / "runs" / name) for name in ("001", "003")]
    state = None
    for one in trained:
        state = slao.step(state, one, mode="slao", init="function-preserving")
    assert state is not None
    assert slao.fingerprint(adapter(told.folder)) == slao.fingerprint(state.merged)
    assert json.loads((told.folder / "forgetting.json").read_text())["parts"] == ["1 a.jsonl", "3 c.jsonl"]
    assert "Learnt and forgotten" in (told.folder / "report.html").read_text()


@pytest.mark.slow
def test_a_run_that_began_from_nothing_is_not_merged_with_one_that_stands_before_it_now(
    runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A first run that failed and was done again put itself before runs that knew nothing of it: unrelated factors."""
    from backprop.verbs import multi_run as verb

    real = verb.train_one

    def failing(config: Any, prepared: Any, **options: Any) -> Any:
        if options["run"] == 1:
            raise TrainingError("the loss is not finite", hint="eat more fruit")
        return real(config, prepared, **options)

    def killed(fold: Any) -> Any:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(verb, "train_one", failing)
        patch.setattr(verb._Fold, "result", killed)
        with pytest.raises(SystemExit):
            runs("a", "b", "c")
    (tmp_path / "run" / "runs" / "001" / "metrics.json").unlink()
    told = runs("a", "b", "c")
    assert told.error is not None
    assert told.error.code == 2
    assert "this run began from another adapter than the last merged run" in told.error.message


@pytest.mark.slow
def test_no_run_that_finishes_is_an_error_and_the_same_command_tries_again(
    runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = objectives.sum_of_losses
    with monkeypatch.context() as patch:
        plant_in_training(patch, lambda model, one: real(model, one) * float("nan"))
        told = runs("a", "b")
    assert told.error is not None
    assert told.error.code == 6
    assert "none of the 2 runs finished" in told.error.message
    assert "look at the rows of this step in crash.txt" in (told.error.hint or ""), "what the run itself advised"
    assert "example" in (told.folder / "crash.txt").read_text()
    assert (told.folder / "runs" / "002" / "crash.txt").is_file()
    assert not (told.folder / "lora").exists()
    assert json.loads((told.folder / "run.json").read_text())["status"] == "failed"
    assert runs("a", "b").error is None


def long_rows(word: str) -> list[dict[str, object]]:
    """Answers of more than 16 tokens, whose score is a likelihood, which a little training changes."""
    return [chat(f"What of {n}?", f"{word} " * 20) for n in range(8)]


@pytest.mark.slow
def test_the_last_merge_that_forgot_little_enough_is_delivered(runs: Callable[..., Told]) -> None:
    options = {"of": long_rows, "steps_per_run": 24, "lora_r": 16, "merge_mode": "sequential"}
    told = runs("left", "right", max_forgetting=0.05, **options)
    assert told.error is None
    assert told.result["delivered_run"] == 1
    assert told.result["forgetting"] == 0
    assert told.all(events.Forgetting)[-1].forgetting > 0.05
    assert "the merge after run 1 is delivered" in told.warned
    gate = told.all(events.Gated)[-1]
    assert (gate.ok, gate.found) == (True, "0.000 after run 1, which is delivered")
    assert adapter(told.folder).keys() == (first := adapter(told.folder / "runs" / "001")).keys()
    assert all(tensor.equal(first[name]) for name, tensor in adapter(told.folder).items())
    kind = runs("left", "right", max_forgetting=0.99, **options)
    assert kind.error is None
    assert not kind.all(events.Step), "another gate trains nothing anew"
    assert kind.result["delivered_run"] == 2
    assert [one["gate"] for one in json.loads((kind.folder / "run.json").read_text())["gates"]] == [
        "forgetting at most 0.99"
    ]
    strict = runs("left", "right", max_forgetting=0.05, **options)
    assert strict.result == told.result
    assert all(tensor.equal(first[name]) for name, tensor in adapter(told.folder).items())
    assert kind.result["forgetting"] == told.all(events.Forgetting)[-1].forgetting


@pytest.mark.slow
def test_memory_that_is_full_while_a_merge_is_measured_is_told_as_such(
    runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from backprop.verbs import forgetting

    def full(*arguments: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forgetting, "score", full)
    told = runs("a", num_runs=1)
    assert told.error is not None
    assert told.error.code == 5
    assert "the GPU's memory is full" in told.error.message


@pytest.mark.slow
def test_where_every_merge_forgot_too_much_nothing_is_delivered(
    runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only general rows can be lost by the first run already; a random model knows none to lose.
    monkeypatch.setattr(Ledger, "lost", lambda ledger, run: 0.5)
    told = runs("a", "b", max_forgetting=0.4)
    assert told.error is not None
    assert told.error.code == 6
    assert "no merge met `--max-forgetting 0.4`" in told.error.message
    assert not (told.folder / "lora").exists()
    assert (told.folder / "runs" / "002" / "lora").is_dir()
    assert not told.all(events.Gated)[-1].ok


@pytest.mark.slow
def test_auto_delivers_the_merge_that_does_best_on_rows_of_every_part(
    runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backprop.core import slao
    from backprop.verbs import forgetting

    real, seen = forgetting.score, []

    def watched(*arguments: Any) -> Any:
        seen.append(real(*arguments))
        return seen[-1]

    options = {"of": long_rows, "steps_per_run": 8, "lora_r": 16, "merge_mode": "auto"}
    monkeypatch.setattr(forgetting, "score", watched)
    told = runs("left", "right", **options)
    assert told.error is None
    compared = [math.exp(-one.loss) for one in seen[1:-2]]  # one measurement after the first run, two after the second
    sums = [sum(compared[n : n + 2]) for n in range(0, len(compared), 2)]
    assert len(sums) == len(slao.EXPONENTS)
    best = slao.EXPONENTS[sums.index(max(sums))]
    assert len({f"{one:.6f}" for one in sums}) > 1
    assert [event.exponent for event in told.all(events.RunMerged)] == [0.5, best]
    state = None
    for name in ("001", "002"):
        trained = adapter(told.folder / "runs" / name)
        state = slao.step(state, trained, mode="auto", init="function-preserving", exponent=best)
    assert state is not None
    assert slao.fingerprint(adapter(told.folder)) == slao.fingerprint(state.merged)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "held", "told"),
    [
        (8, 24, "held-out rows choose the merge, "),
        (8, 3, "3 held-out rows are too few to set some apart: 8 rows that are trained on choose the merge"),
        (24, 0, "trained rows choose the merge, "),
        (1, 0, "1 trained rows are too few to set some apart: 1 rows choose the merge and are scored, which flatters"),
    ],
)
def test_auto_chooses_on_other_rows_than_its_scores_are_of(
    runs: Callable[..., Told],
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    trained: int,
    held: int,
    told: str,
) -> None:
    from backprop.verbs import forgetting

    real, seen = forgetting.score, []

    def watched(model: Any, examples: Any, size: Any) -> Any:
        seen.append([example.ids for example in examples])
        return real(model, examples, size)

    def numbered(word: str) -> list[dict[str, object]]:
        return [chat(f"{word} {n}?", "It is here.") for n in range(trained)]

    monkeypatch.setattr(forgetting, "score", watched)
    options = {"of": numbered, "merge_mode": "auto", "steps_per_run": 2}
    if held:
        asked = {word: [chat(f"{word} held {n}?", "It is here.") for n in range(held)] for word in ("left", "right")}
        options["eval_data"] = [str(write(rows, f"held-{word}.jsonl")) for word, rows in asked.items()]
    ended = runs("left", "right", **options)
    assert ended.error is None
    after_first, *compared, left, right = seen  # five times both, then what is written down
    assert len(compared) == 10
    assert after_first == left
    assert compared[::2] == [compared[0]] * 5
    phases = [event.name for event in ended.all(events.Phase) if event.name.startswith("part")]
    assert [phase.split(":")[0] for phase in phases] == ["part 1 left.jsonl", "part 2 right.jsonl"]
    for choosing, scored, phase in zip(compared[:2], (left, right), phases, strict=True):
        assert told in phase
        if "too few" in told:
            assert (len(choosing), len(scored)) == (trained, held or trained)
        else:
            assert f"{len(choosing)} of its" in phase
            assert f"{len(scored)} others are scored" in phase
            assert len({*choosing, *scored}) == len(choosing) + len(scored) == (held or trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "mode"),
    [
        ("before it is measured", "auto"),
        ("before it is delivered", "slao"),
        ("at the end", "slao"),
    ],
)
def test_a_multi_run_that_is_killed_between_two_steps_of_its_own_ends_the_same(
    runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, mode: str
) -> None:
    from backprop.verbs import forgetting, multi_run

    options = {"replay": 0.5, "steps_per_run": 2, "merge_mode": mode}
    expected = runs("a", "b", "c", folder="undisturbed", **options).result
    kill = {
        "before it is measured": (forgetting.Book, "measure"),
        "before it is delivered": (multi_run.shutil, "copytree"),
        "at the end": (multi_run._Fold, "result"),
    }[place]
    real, calls = getattr(*kill), []

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if place == "at the end" else 2):
            raise SystemExit(9)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*kill, killed)
        with pytest.raises(SystemExit):
            runs("a", "b", "c", **options)
    if place == "before it is delivered":
        # Done again, it could fail, and the merge that took the place of a good one would be nobody's.
        assert (tmp_path / "run" / "runs" / "002" / "metrics.json").is_file()
    again = runs("a", "b", "c", **options)
    assert again.error is None
    assert again.all(events.Resumed)
    assert again.result == expected


def test_the_plan_of_the_run_that_goes_on_has_its_passes_as_they_were_and_no_other_plan_has(
    runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only `train` looked for them; each plan of a multi-run told of passes that its run did not have."""
    options = {"steps_per_run": 2, "save_steps": 1}
    real, calls = objectives.sum_of_losses, [0]

    def killed(model: Any, one: Any) -> Any:
        calls[0] += model.training
        if calls[0] > 3 * 4:  # after two steps of the first run, and one of the second
            raise SystemExit(9)
        return real(model, one)

    with monkeypatch.context() as patch:
        plant_in_training(patch, killed)
        with pytest.raises(SystemExit):
            runs("a", "b", "c", micro_batch=1, packing=False, **options)
    plans = runs("a", "b", "c", packing=False, **options).all(events.PlanMade)
    assert [plan.choices["micro_batch"] for plan in plans] == [4, 1, 4]
    kept = [plan.reasons["micro_batch"] == "as in this run's last checkpoint" for plan in plans]
    assert kept == [False, True, False]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_multi_run_whose_process_is_killed_at_any_instant_ends_with_the_same_hashes(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    sources = [option for word in "abc" for option in ("--data", str(write(rows(word), f"{word}.jsonl")))]
    argv = [sys.executable, "-m", "backprop", "multi-run", *sources, "--model", str(tiny_model), *OPTIONS]
    argv += ["--lr", "0.01", "--save-steps", "1", "--json", "--quiet", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*argv, name], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    def hashes(name: str) -> dict[str, str]:
        files = sorted((tmp_path / name).glob("**/lora/adapter_model.safetensors"))
        return {str(file.relative_to(tmp_path / name)): rundir.sha256_of(file) for file in files}

    assert start("whole").wait() == 0
    dice, killed = random.Random(0), 0
    for run in (1, 1, 3, 0):  # the last goes on to the end
        process = start("killed")
        assert process.stdout
        for line in process.stdout:
            event = json.loads(line)
            if run and event["event"] == "step" and event["run"] == run:
                time.sleep(0.05 * dice.random())
                process.kill()
                killed += process.wait() == -signal.SIGKILL
                break
        assert process.wait() in (0, -signal.SIGKILL)
    assert killed >= 2
    assert hashes("killed") == hashes("whole")
    assert len(hashes("whole")) == 4


@pytest.mark.slow
def test_an_adapter_that_another_run_put_there_is_refused(
    runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from backprop.verbs import multi_run

    def killed(fold: Any) -> Any:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(multi_run._Fold, "result", killed)
        with pytest.raises(SystemExit):
            runs("a", "b")
    first, second = (tmp_path / "run" / "runs" / name / "lora" / "adapter_model.safetensors" for name in ("001", "002"))
    measured = tmp_path / "run" / "runs" / "001" / "metrics.json"
    whole = measured.read_text()
    for damaged in (whole[:-40], "[]", whole.replace("merged_sha256", "other"), whole.replace('"loss"', '"lost"')):
        measured.write_text(damaged)
        told = runs("a", "b")
        assert told.error is not None
        assert told.error.code == 2
        assert f"`{measured}` is damaged" in told.error.message
    measured.write_text(whole)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    told = runs("a", "b")
    assert told.error is not None
    assert told.error.code == 2
    assert "is not what this run wrote" in told.error.message
    first.write_bytes(kept)
    assert runs("a", "b").error is None


@pytest.mark.slow
def test_the_rate_falls_from_run_to_run_and_replay_adds_rows_to_the_training_alone(
    runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a part was measured on were also rows of earlier parts, drawn for the replay."""
    from backprop.verbs import forgetting

    real, measured = forgetting.score, []

    def watched(model: Any, examples: Any, size: Any) -> Any:
        measured.append(len(examples))
        return real(model, examples, size)

    monkeypatch.setattr(forgetting, "score", watched)
    told = runs("a", "b", schedule="linear", replay=0.5, merge_mode="stack")
    assert told.error is None
    peaks = {run: max(one.learning_rate for one in told.all(events.Step) if one.run == run) for run in (1, 2)}
    assert peaks[2] == pytest.approx(peaks[1] / 2)
    assert [event.rows for event in told.all(events.DataRead)] == [8, 16]
    assert told.result["merge_mode"] == "stack"
    assert measured == [8, 8, 8]


def test_advice_comes_before_the_training(runs: Callable[..., Told]) -> None:
    options = {"dry_run": True}

    def advised(*words: str, **more: Any) -> str:
        return "\n".join(event.name for event in runs(*words, **options, **more).all(events.Phase))

    assert "add `--replay 0.1`" in advised("a", "b")
    replayed = advised("a", "b", replay=0.2)
    assert "--replay" not in replayed
    assert "part 1 a.jsonl:" not in replayed
    assert "part 2 b.jsonl: 2 of 10 rows are of earlier parts" in replayed
    chunks = advised("a", num_runs=2)
    assert "--replay" not in chunks
    assert "merged by `sequential`" in chunks


@pytest.mark.slow
def test_a_run_with_nothing_left_to_learn_is_told(runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "backprop.core.forgetting.LEARNT_LOSS", 100.0
    )  # a tiny model does not come below 0.05 in a second
    told = runs("a", num_runs=1, steps_per_run=8)
    assert "run 1 had nothing left to learn" in told.warned


def test_general_rows_are_of_every_source_and_what_is_wrong_with_them_is_told(
    runs: Callable[..., Told], write: Callable[..., Path]
) -> None:
    many = write([*rows("many") * 40], "many.jsonl")
    few = write([*rows("few"), *rows("a")[:2], {"messages": [{"role": "user", "content": "and?"}]}], "few.jsonl")
    told = runs("a", num_runs=1, general_eval=[str(many), str(few)], dry_run=True)
    assert told.error is None
    assert f"general rows: 1 rows without an assistant turn are left out, first: {few}, line 11" in told.warned
    flattered = "2 evaluation rows of general are trained on, first in part 1 chunk: its scores would flatter"
    assert flattered in told.warned


def test_measuring_rows_longer_than_any_that_is_trained_on_takes_no_more_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from backprop.core.data.render import Example
    from backprop.engine.batches import PassSize, passes
    from backprop.verbs.forgetting import score

    lengths = [20] * 8 + [100] * 8
    examples = [Example(ids=(1,) * length, mask=(False, *(True,) * (length - 1))) for length in lengths]
    taken: list[int] = []

    def measured(model: Any, asked: Any, size: PassSize, objective: Any) -> objectives.Measured:
        taken.extend(one["input_ids"].numel() for one in passes(asked, size))
        return objectives.Measured(loss=1.0)

    monkeypatch.setattr(objectives, "measure", measured)
    score(None, examples, PassSize(examples=8, tokens=8 * 20, packing=False))
    assert max(taken) <= 8 * 20


def test_samples_reads_no_more_rows_than_it_needs(runs: Callable[..., Told], monkeypatch: pytest.MonkeyPatch) -> None:
    from backprop.verbs import prepare

    real, taken = prepare.rows_of, []

    def counted(source: str, **options: Any) -> Any:
        for row in real(source, **options):
            taken.append(source)
            yield row

    monkeypatch.setattr(prepare, "rows_of", counted)
    told = runs("a", "b", samples_per_run=3, dry_run=True)
    assert told.error is None
    assert [event.rows for event in told.all(events.DataRead)] == [3, 3]
    assert len(taken) <= 6
