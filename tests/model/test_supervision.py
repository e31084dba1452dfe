"""What is trained is what should be: packed or padded, in any pass size, and proved on the loaded model."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import chat

from backprop import BackpropError, Trainer, events
from backprop.core.data.render import Example
from backprop.engine import attention, batches, exam, proofs

pytestmark = pytest.mark.model

# Rows of very different lengths, so that a mean of means would differ.
ROWS = [chat(f"question {n}", "word " * (3 * n + 1)) for n in range(8)]


@dataclasses.dataclass
class Run:
    """A finished training, and what it said."""

    folder: Path
    said: list[events.Event]

    def all(self, kind: type) -> list[Any]:
        return [event for event in self.said if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.all(events.Step)]


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path, write: Callable[..., Path]) -> Callable[..., Run]:
    def train(rows: Sequence[Any] = ROWS, model: Path = tiny_model, **options: Any) -> Run:
        run = Run(tmp_path / "run", [])
        trainer = Trainer(str(model), say=run.said.append, output=run.folder)
        defaults = {"steps": 3, "batch_size": 8, "lora_r": 4, "learning_rate": 1e-2, "overwrite": True}
        try:
            trainer.train(write(list(rows)), **{**defaults, **options})
        except BackpropError as error:
            run.said.append(events.Failed(code=error.code, message=error.message, hint=error.hint or ""))
        return run

    return train


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


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


def test_how_examples_share_a_pass_changes_no_loss(train: Callable[..., Run]) -> None:
    """8x1 = 4x2 = 1x8, packed or padded: one class whose curves agree."""
    whole = train(packing=False, micro_batch=8).losses
    others = [(True, 8), (True, 2), (True, 1), (False, 4), (False, 2), (False, 1)]
    curves = {one: train(packing=one[0], micro_batch=one[1]).losses for one in others}
    assert curves == {one: pytest.approx(whole, rel=1e-5) for one in others}


def test_recomputing_activations_changes_no_loss(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputation runs in the backward pass, where attention once no longer knew of the documents."""
    from backprop.core import plan
    from backprop.verbs import train as verb

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


def leaky(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """Attention that takes a packed row for one document: what happened to others."""
    whole = query.shape[2]
    return attention.attend_as_told(module, query, key, value, mask, **{**options, "document_lengths": (whole,)})


def test_documents_that_see_each_other_are_found(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attend_as_told", attention.attend_within_documents, raising=False)
    monkeypatch.setattr(attention, "attend_within_documents", leaky)
    run = train()
    (isolated,) = [proof for proof in run.all(events.Proved) if "isolated" in proof.name]
    assert not isolated.ok
    assert any("rows are padded instead" in event.message for event in run.all(events.Warned))
    (failed,) = train(packing=True).all(events.Failed)
    assert failed.code == 6


def test_positions_that_run_on_are_found_where_they_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    def running_on(examples: Sequence[Example]) -> dict[str, Any]:
        one = packed(examples)
        return {**one, "position_ids": torch.arange(one["input_ids"].shape[1])[None]}

    torch.manual_seed(0)
    # Learnt positions; rotary ones count only relative to each other, within a document.
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, initializer_range=0.5))
    packed = batches.packed
    assert proofs.prove_isolation(model).ok
    monkeypatch.setattr(proofs, "packed", running_on)
    assert not proofs.prove_isolation(model).ok


def test_a_matrix_that_does_not_move_is_found(loaded: Any) -> None:
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(copy.deepcopy(loaded), LoraConfig(target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)

    def step(spoil: Callable[[], None]) -> events.Proved:
        movement = proofs.Movement(model)
        optimizer.zero_grad()
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        movement.see_gradients()
        optimizer.step()
        spoil()
        return movement.prove()

    named = dict(model.named_parameters())
    b = next(name for name in named if "lora_B" in name)
    frozen = next(name for name in named if "embed_tokens" in name)

    def set_to(name: str, value: float) -> None:
        with torch.no_grad():
            named[name][0].fill_(value)

    assert step(lambda: None).ok
    kept = named[b].detach().clone()
    found = step(lambda: named[b].data.copy_(kept))
    assert not found.ok
    assert b in found.found
    found = step(lambda: set_to(frozen, 0.5))
    assert not found.ok
    assert frozen in found.found


def test_a_run_that_makes_the_model_worse_is_not_green_but_its_adapter_is_kept(
    train: Callable[..., Run], write: Callable[..., Path]
) -> None:
    # A random model with tied embeddings thinks a repeated word likely, until it has learnt another answer.
    held_out = write([chat("a", "b " * 100)], "held.jsonl")
    rows = [chat("a", "one two three four five six")] * 8
    run = train(rows=rows, eval_data=(str(held_out),), steps=40, learning_rate=3e-2)
    (failed,) = run.all(events.Failed)
    assert failed.code == 6
    assert "the model got better" in failed.message
    assert (run.folder / "lora" / "adapter_model.safetensors").is_file()
    assert json.loads((run.folder / "run.json").read_text())["status"] == "failed"


def test_answers_that_never_end_are_found() -> None:
    asked = proofs.Asked(questions=("q",), answers=("a",), stopped=0, end_loss=3.0)
    assert not proofs.prove_stopping(asked, dataclasses.replace(asked, end_loss=4.0)).ok
    assert proofs.prove_stopping(asked, dataclasses.replace(asked, end_loss=2.0)).ok
    assert proofs.prove_stopping(asked, dataclasses.replace(asked, end_loss=4.0, stopped=1)).ok


def test_a_model_asked_after_training_stops(train: Callable[..., Run]) -> None:
    run = train(rows=[chat(f"What is {n}?", "It is here.") for n in range(8)], steps=60)
    assert {sample.after for sample in run.all(events.Sampled)} == {"It is here."}
    (stops,) = [proof for proof in run.all(events.Proved) if "stop" in proof.name]
    assert stops.found.startswith("3 of 3 answers ended")


def test_a_template_without_an_end_is_refused(train: Callable[..., Run], tmp_path: Path, tiny_model: Path) -> None:
    """The loss looked healthy, and answers never stopped."""
    import shutil

    model = tmp_path / "endless"
    shutil.copytree(tiny_model, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert "<|im_end|>" in template
    (failed,) = train(model=model).all(events.Failed)
    assert failed.code == 4
    assert "0 of 8 answers end" in failed.message
    assert not train(model=model, skip_proofs=True).all(events.Failed)


def test_a_base_model_gets_a_template_that_is_said_and_saved(
    train: Callable[..., Run], tmp_path: Path, tiny_model: Path
) -> None:
    import shutil

    from transformers import AutoTokenizer

    model = tmp_path / "base"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").unlink()
    run = train(model=model)
    assert any("without a chat template" in event.message for event in run.all(events.Warned))
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "lora")
    turns = chat("hi", "ho", "hu")["messages"]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "User:\nhi\n\nAssistant:\nho<|im_end|>\n\nUser:\nhu\n\nAssistant:\n"


def test_what_is_cut_is_counted_and_more_than_a_twentieth_is_refused(train: Callable[..., Run]) -> None:
    (failed,) = train(max_length=48).all(events.Failed)
    assert failed.code == 3
    assert "too much is cut" in failed.message
    assert not train(max_length=48, allow_truncation=True, steps=8).all(events.Failed)


def test_the_rows_of_a_diverged_step_are_written_down(train: Callable[..., Run]) -> None:
    run = train(learning_rate=1.0, lora_alpha=1e30)
    (failed,) = run.all(events.Failed)
    assert failed.code == 6
    assert "question 7" in (run.folder / "crash.txt").read_text()


def test_the_first_token_of_a_packed_text_is_not_predicted_from_the_text_before_it() -> None:
    texts = [Example(tuple(range(start, start + 3)), (True,) * 3) for start in (10, 20)]
    assert batches.packed(texts)["labels"].tolist() == [[-100, 11, 12, -100, 21, 22]]


def test_the_mean_loss_is_the_same_packed_or_padded(loaded: Any) -> None:
    examples = [Example(tuple(range(7, 7 + n)), (False,) + (True,) * (n - 1)) for n in (3, 9, 5, 30)]
    sizes = [
        batches.PassSize(examples=2, tokens=40, packing=True),
        batches.PassSize(examples=2, tokens=40, packing=False),
    ]
    packed, padded = (exam.mean_loss(loaded, examples, size) for size in sizes)
    assert packed == pytest.approx(padded, rel=1e-5)
