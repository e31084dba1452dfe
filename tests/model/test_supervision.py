"""What is trained is what should be, packed or padded, and proved on the loaded model; planted faults are in tests/lessons."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, chat

from backprop import events
from backprop.core.data.render import Example
from backprop.engine import batches, exam

pytestmark = pytest.mark.model


def of_kind(folder: Path, kind: str, **options: Any) -> Path:
    """A random model of another architecture, with the words of the tiny one."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.25)
    model.save_pretrained(folder)
    return folder


def with_words(model: Path, tiny_model: Path) -> Path:
    import shutil

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / name, model / name)
    return model


def test_recomputing_activations_changes_no_loss(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputation runs in the backward pass, where attention once no longer knew of the documents."""
    from backprop.core import plan
    from backprop.verbs import prepare as verb

    kept = train().losses
    make = plan.make_plan

    def recomputing(*arguments: Any, **options: Any) -> plan.Plan:
        return dataclasses.replace(make(*arguments, **options), checkpointing=plan.Choice(True, "to compare"))

    monkeypatch.setattr(verb, "make_plan", recomputing)
    assert train().losses == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "packs"),
    [
        ("Mistral", {"sliding_window": 4}, True),
        ("Qwen3", {}, True),
        ("Gemma2", {"sliding_window": 4, "attn_logit_softcapping": 50.0}, False),
    ],
    ids=["a window shorter than the rows", "norms on queries and keys", "capped scores"],
)
def test_other_architectures_train_the_same_packed_or_padded_or_say_why_not(
    train: Callable[..., Run], tmp_path: Path, tiny_model: Path, kind: str, options: dict[str, Any], packs: bool
) -> None:
    model = with_words(of_kind(tmp_path / kind, kind, **options), tiny_model)
    padded = train(model=model, packing=False, learning_rate=1e-3)
    by_itself = train(model=model, learning_rate=1e-3)
    (isolated,) = [proof for proof in by_itself.all(events.Proved) if "isolated" in proof.name]
    assert isolated.ok == packs, isolated
    assert by_itself.losses == pytest.approx(padded.losses, rel=1e-5)
    warned = [event.message for event in by_itself.all(events.Warned)]
    assert any("rows are padded instead" in message for message in warned) == (not packs)
    if not packs:
        (failed,) = train(model=model, packing=True).all(events.Failed)
        assert (failed.code, failed.hint) == (6, "add `--no-packing`")


def test_every_run_proves_and_tells_what_it_proved(train: Callable[..., Run]) -> None:
    run = train(steps=5)
    names = [
        "every example is trained on",
        "nothing is cut without notice",
        "the end of each answer is trained",
        "packed documents are isolated",
        "the adapter moves, and nothing else",
        "the model got better",
        "answers stop by themselves",
    ]
    assert [(proof.name, proof.ok) for proof in run.all(events.Proved)] == [(name, True) for name in names]
    manifest = json.loads((run.folder / "run.json").read_text())
    assert [proof["name"] for proof in manifest["proofs"]] == names
    assert manifest["samples"][0]["prompt"] == "question 0"
    assert train(steps=5, skip_proofs=True).losses == run.losses
    assert json.loads((run.folder / "run.json").read_text())["config"]["skip_proofs"] is True


def test_a_model_asked_after_training_stops(train: Callable[..., Run]) -> None:
    run = train(rows=[chat(f"What is {n}?", "It is here.") for n in range(8)], steps=60)
    assert {sample.after for sample in run.all(events.Sampled)} == {"It is here."}
    (stops,) = [proof for proof in run.all(events.Proved) if "stop" in proof.name]
    assert stops.found.startswith("3 of 3 answers ended")


def test_the_mean_loss_is_the_same_packed_or_padded(loaded: Any) -> None:
    examples = [Example(tuple(range(7, 7 + n)), (False,) + (True,) * (n - 1)) for n in (3, 9, 5, 30)]
    sizes = [
        batches.PassSize(examples=2, tokens=40, packing=True),
        batches.PassSize(examples=2, tokens=40, packing=False),
    ]
    packed, padded = (exam.mean_loss(loaded, examples, size) for size in sizes)
    assert packed == pytest.approx(padded, rel=1e-5)
