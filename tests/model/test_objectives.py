"""Learning which answers are wanted: losses held against trl's, the same however examples share a pass, trained for real."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Run, backprop, went_on

from backprop import events
from backprop.core.data.judge import judge
from backprop.core.data.render import Example, encode_all, with_mismatched
from backprop.core.data.shapes import Row
from backprop.engine import loop, objectives
from backprop.engine.batches import PassSize, padded
from backprop.engine.load import load_tokenizer
from backprop.engine.objectives import DPO, KTO, ORPO, Objective, measure, parts_of, rating_weights, with_references

pytestmark = pytest.mark.model

PAIRS = [
    {"prompt": f"question {n}", "chosen": "good " * (n % 5 + 1), "rejected": "bad " * (7 - n % 4)} for n in range(12)
]
RATED = [
    {"prompt": f"question {n}", "completion": ("bad " if n % 3 else "good ") * (n % 4 + 1), "label": n % 3 == 0}
    for n in range(12)
]
PADDED = PassSize(examples=32, tokens=512, packing=False)
SIZES = [
    PassSize(examples=2, tokens=0, packing=False),
    PassSize(examples=1, tokens=0, packing=False),
    PassSize(examples=0, tokens=64, packing=True),
    PassSize(examples=0, tokens=512, packing=True),
]
OBJECTIVES: dict[str, Objective] = {"dpo": DPO(0.1), "orpo": ORPO(0.1), "kto": KTO(0.1, 2.0, 1.0)}


@pytest.fixture(scope="module")
def before_and_after(loaded: Any) -> tuple[Any, Any]:
    """A model, and one that training has moved away from it."""
    import torch

    torch.manual_seed(1)
    after = copy.deepcopy(loaded)
    for weight in after.parameters():
        weight.data += 0.05 * weight.std() * torch.randn_like(weight)
    return loaded.eval(), after.eval()


@pytest.fixture(scope="module")
def examples(tiny_model: Path, before_and_after: tuple[Any, Any]) -> Callable[[str], Sequence[Example]]:
    tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)

    def examples(objective: str) -> Sequence[Example]:
        values = RATED if objective == "kto" else PAIRS
        rows = [Row(place=f"line {number}", value=value) for number, value in enumerate(values)]
        judged = judge(rows, objective=objective)  # type: ignore[arg-type]
        made = encode_all(judged.conversations, tokenizer, loss_on="assistant").examples
        made = with_mismatched(made, made, 512) if objective == "kto" else made
        return with_references(before_and_after[0], made, PADDED)

    return examples


def loss_and_gradient(model: Any, objective: Objective, given: Sequence[Example], size: PassSize) -> tuple[float, Any]:
    import torch

    from backprop.engine.attention import within_documents

    model.zero_grad()
    total = 0.0
    if size.packing:
        with within_documents(model):
            for part in parts_of(objective, model, objective.passes(given, size), "cpu"):
                part.loss.backward()
                total += part.loss.item()
    else:
        for part in parts_of(objective, model, objective.passes(given, size), "cpu"):
            part.loss.backward()
            total += part.loss.item()
    return total, torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_how_examples_share_a_pass_changes_no_loss_and_no_gradient(
    name: str, before_and_after: tuple[Any, Any], examples: Callable[[str], Sequence[Example]]
) -> None:
    model, objective, given = before_and_after[1], OBJECTIVES[name], examples(name)
    expected, wanted = loss_and_gradient(model, objective, given, PADDED)
    for size in SIZES:
        loss, gradient = loss_and_gradient(model, objective, given, size)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert float((gradient - wanted).norm() / wanted.norm()) < 1e-4
        assert measure(model, given, size, objective).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_many_examples_are_measured_part_by_part_as_if_they_were_one_step(
    name: str,
    before_and_after: tuple[Any, Any],
    examples: Callable[[str], Sequence[Example]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, objective, given = before_and_after[1], OBJECTIVES[name], examples(name)
    expected = measure(model, given, PADDED, objective)
    made: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(objective, name)

        def passes(self, part: Sequence[Example], size: PassSize) -> Any:
            made.append(len(part))
            return objective.passes(part, size)

    monkeypatch.setattr(objectives, "MEASURED_AT_ONCE", 5)
    found = measure(model, given, PADDED, Watched())  # type: ignore[arg-type]
    assert max(made) == 5
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.accuracy == expected.accuracy
    assert found.margin == pytest.approx(expected.margin, rel=1e-5)


def batch_of(given: Sequence[Example]) -> dict[str, Any]:
    """Rows as trl's collators make them."""
    import torch

    one = padded(given)
    mask = torch.nn.utils.rnn.pad_sequence([torch.tensor(example.mask).int() for example in given], batch_first=True)
    return {"input_ids": one["input_ids"], "attention_mask": one["attention_mask"], "completion_mask": mask}


def with_plain_head(model: Any, outputs: Sequence[str] = ()) -> None:
    """Let ``model`` give log-probabilities as trl's own head does, which is written in Triton and needs a GPU."""
    import torch

    forward = model.forward

    def plain(*, labels: Any, fused_lm_head: bool, **rest: Any) -> Any:
        logits = forward(**rest).logits[:, :-1].float()
        log_probs, targets = logits.log_softmax(-1), labels[:, 1:]
        chosen = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        nothing = torch.zeros_like(chosen)
        told = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
        return SimpleNamespace(log_probs=chosen.masked_fill(targets == -100, 0), **told)

    model.forward = plain


def of_trl(kind: str, before_and_after: tuple[Any, Any], tiny_model: Path, folder: Path) -> Any:
    """One of trl's trainers, with a reference model beside the one that is trained."""
    import importlib

    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    before, after = (copy.deepcopy(model) for model in before_and_after)
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), beta=0.1, report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=2
    )
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]
    if kind == "KTO":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module(f"trl.trainer.{kind.lower()}_trainer")
        patch.setattr(module, "add_fused_lm_head", with_plain_head)
        return getattr(trl, f"{kind}Trainer")(
            model=after,
            ref_model=before,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )


def test_dpo_is_trls(
    before_and_after: tuple[Any, Any],
    examples: Callable[[str], Sequence[Example]],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    given = examples("dpo")
    trainer = of_trl("DPO", before_and_after, tiny_model, tmp_path)
    sides = [*given, *(example.rejected for example in given if example.rejected)]
    theirs = trainer.compute_loss(trainer.model, batch_of(sides))
    mine = measure(before_and_after[1], given, PADDED, DPO(0.1))
    assert mine.loss == pytest.approx(theirs.item(), rel=1e-5)
    assert mine.loss != pytest.approx(math.log(2), rel=1e-2)
    (logged,) = ({name: values[-1] for name, values in kept.items()} for kept in trainer._metrics.values() if kept)
    assert mine.accuracy == pytest.approx(logged["rewards/accuracies"])
    assert mine.margin == pytest.approx(logged["rewards/margins"], rel=1e-3)


@pytest.mark.parametrize("backwards", [False, True], ids=["nearer", "farther"])
def test_kto_is_trls(
    before_and_after: tuple[Any, Any],
    examples: Callable[[str], Sequence[Example]],
    tiny_model: Path,
    tmp_path: Path,
    backwards: bool,
) -> None:
    import torch

    pair = before_and_after[::-1] if backwards else before_and_after
    given = with_references(pair[0], examples("kto"), PADDED)
    trainer = of_trl("KTO", pair, tiny_model, tmp_path)
    trainer.desirable_weight = 3.0
    mismatched = batch_of([example.mismatched for example in given if example.mismatched])
    batch = {
        **batch_of(given),
        **{f"KL_{name}": value for name, value in mismatched.items()},
        "label": torch.tensor([example.desirable for example in given]),
    }
    theirs = trainer.compute_loss(trainer.model, batch).item()
    (distance,) = next(kept for kept in trainer._metrics.values() if kept)["kl"]
    assert (distance > 0.1) != backwards
    assert measure(pair[1], given, PADDED, KTO(0.1, 3.0, 1.0)).loss == pytest.approx(theirs, rel=1e-5)


def test_the_odds_of_orpo_are_trls_and_its_other_part_is_the_loss_of_the_chosen_answers(
    before_and_after: tuple[Any, Any], examples: Callable[[str], Sequence[Example]], loaded: Any
) -> None:
    import torch
    from trl.experimental.orpo import ORPOTrainer

    from backprop.engine.objectives import Supervised

    given, model = examples("orpo"), before_and_after[1]
    theirs: Any = ORPOTrainer
    itself = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    means: list[Any] = []
    for side in (given, [example.rejected for example in given if example.rejected]):
        batch = batch_of(side)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        means.append(theirs.get_batch_logps(logits, labels, average_log_prob=True))
    odds = theirs.odds_ratio_loss(itself, *means)[0].mean()
    answers = measure(model, given, PADDED, Supervised()).loss
    assert measure(model, given, PADDED, ORPO(0.1)).loss == pytest.approx(answers - float(odds), rel=1e-5)


def test_rarer_ratings_weigh_more() -> None:
    assert rating_weights(10, 40) == (4.0, 1.0)
    assert rating_weights(40, 10) == (1.0, 4.0)
    assert rating_weights(7, 7) == rating_weights(7, 0) == (1.0, 1.0)


LEARNABLE = [{"prompt": f"question {n}", "chosen": "good", "rejected": "bad"} for n in range(24)]


@pytest.mark.parametrize(
    ("objective", "start"), [("dpo", math.log(2)), ("kto", 0.5), ("orpo", None)], ids=["dpo", "kto", "orpo"]
)
def test_what_is_wanted_is_learnt_and_told(train: Callable[..., Run], objective: str, start: float | None) -> None:
    run = train(LEARNABLE, objective=objective, steps=12, eval_fraction=0.25, eval_steps=6, lora_plus=4.0)
    assert not run.all(events.Failed), run.failed
    first, *_, last = run.all(events.Eval)
    assert last.accuracy == 1.0
    assert last.margin > 0
    assert last.loss < first.loss
    assert last.perplexity is None
    assert run.all(events.Step)[-1].accuracy == 1.0
    proofs = {proof.name: proof.ok for proof in run.all(events.Proved)}
    assert proofs["the adapter moves, and nothing else"]
    assert proofs["packed documents are isolated"]
    assert proofs["every example is seen as often as planned"]
    assert proofs["the model got better"]
    if start is not None:  # nothing has moved from the reference before the first step
        assert run.losses[0] == pytest.approx(start, rel=1e-5)
        assert first.loss == pytest.approx(start, rel=1e-5)
        assert first.accuracy == 0.5


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_going_on_weighs_against_the_model_before_all_training(
    train: Callable[..., Run], objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"objective": objective, "steps": 6, "eval_fraction": 0.25}
    kept = went_on(train, LEARNABLE, step=3, **options)
    # On a GPU what is computed again differs in its last bits: the checkpoint is believed instead.
    monkeypatch.delattr(loop, "Weighing")
    assert not train(LEARNABLE, **options, resume=str(kept)).all(events.Failed)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_that_are_learnt_to_the_last_bit_end_well(train: Callable[..., Run], objective: str) -> None:
    rows = [{"prompt": f"q {n}", "chosen": "good " * 60, "rejected": "bad " * 60} for n in range(16)]
    run = train(rows, objective=objective, steps=20, learning_rate=2e-2, beta=5.0, skip_proofs=True)
    assert not run.all(events.Failed), run.failed
    assert min(step.grad_norm for step in run.all(events.Step)) == 0


def test_other_held_out_rows_cannot_go_on(
    train: Callable[..., Run], write: Callable[..., Path], tmp_path: Path
) -> None:
    held = [str(write(LEARNABLE[: 3 + n], f"held-{n}.jsonl")) for n in range(2)]
    options = {"objective": "dpo", "steps": 4}
    whole = train(LEARNABLE, save_steps=2, keep_checkpoints=9, eval_data=(held[0],), **options)
    kept = tmp_path / "kept"
    (whole.folder / "checkpoints" / "step-000002").rename(kept)
    other = train(LEARNABLE, eval_data=(held[1],), resume=str(kept), **options)
    assert other.failed.code == 2
    assert "the rows of the data" in other.failed.message


def test_preferences_that_got_worse_are_not_called_better() -> None:
    from backprop.engine.proofs import prove_learnt

    assert not prove_learnt(0.693, 0.705, held_out=True, preferences=True).ok
    assert prove_learnt(0.693, 0.694, held_out=True, preferences=True).ok
    assert not prove_learnt(0.01, 0.09, held_out=True, preferences=True).ok
    assert prove_learnt(0.693, 0.705, held_out=True).ok


def test_another_beta_cannot_go_on(train: Callable[..., Run], tmp_path: Path) -> None:
    whole = train(LEARNABLE, objective="dpo", steps=4, save_steps=2, keep_checkpoints=9)
    kept = tmp_path / "kept"
    (whole.folder / "checkpoints" / "step-000002").rename(kept)
    other = train(LEARNABLE, objective="dpo", steps=4, beta=0.3, resume=str(kept))
    assert other.failed.code == 2
    assert "beta: 0.1 before, 0.3 now" in other.failed.message


def test_the_first_examples_show_both_sides(tiny_model: Path, tmp_path: Path, write: Callable[..., Path]) -> None:
    data = write(LEARNABLE)
    done = backprop("train", "--data", data, "--model", tiny_model, "--objective", "dpo", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "example 1, chosen" in done.stderr
    assert "»good<|im_end|>«" in done.stderr
    assert "example 3, rejected" in done.stderr
    assert "»bad<|im_end|>«" in done.stderr


def test_rows_without_preferences_are_exit_3_and_preferences_without_an_objective_too(
    train: Callable[..., Run],
) -> None:
    assert train(objective="dpo").failed.code == 3
    refused = train(LEARNABLE).failed
    assert refused.code == 3
    assert "--objective dpo" in refused.hint


def test_gates_know_preferences(train: Callable[..., Run], write: Callable[..., Path]) -> None:
    options = {"objective": "dpo", "steps": 8, "eval_fraction": 0.25}
    met = train(LEARNABLE, gate=("eval_accuracy>0.9",), **options)
    assert [gate.ok for gate in met.all(events.Gated)] == [True]
    assert train(LEARNABLE, gate=("perplexity<9",), **options).failed.code == 2
    assert train(gate=("eval_accuracy>0.9",), eval_fraction=0.25).failed.code == 2
    old = (str(write(LEARNABLE, "old.jsonl")),)
    refused = train(LEARNABLE, gate_data=old, **options).failed
    assert refused.message.startswith("gate data: ")
    assert "rows with answers" in refused.hint
