"""What went wrong in others' training, planted into ours: a proof fails, or the loss is what it should be.

A 4-bit layer that computes wrongly (bitsandbytes#2034) is planted in tests/model/test_gpu.py.
"""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, backprop, chat

from backprop import events
from backprop.core.data.render import Example
from backprop.engine import attention, batches, proofs

pytestmark = pytest.mark.model


@pytest.fixture
def changed(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the tiny model with another chat template (None: without one), or with other settings."""

    def changed(template: str | None, **settings: Any) -> Path:
        model = tmp_path / "changed"
        shutil.copytree(tiny_model, model, copy_function=shutil.copy)
        (model / "chat_template.jinja").unlink()
        if template is not None:
            (model / "chat_template.jinja").write_text(template)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **settings}))
        return model

    return changed


# Loss and steps.


def test_how_examples_share_a_pass_changes_no_loss(train: Callable[..., Run]) -> None:
    """One pass, passes of two packed, and passes of one are the same: transformers#34191 #35203 took a mean of the means of passes."""
    whole = train(packing=False, micro_batch=8, steps=2, skip_proofs=True).losses
    others = [(True, 2), (False, 1)]
    curves = {one: train(packing=one[0], micro_batch=one[1], steps=2, skip_proofs=True).losses for one in others}
    assert curves == {one: pytest.approx(whole, rel=1e-5) for one in others}


def test_the_first_token_of_a_packed_text_is_not_predicted_from_the_text_before_it() -> None:
    texts = [Example(tuple(range(start, start + 3)), (True,) * 3) for start in (10, 20)]
    assert batches.packed(texts)["labels"].tolist() == [[-100, 11, 12, -100, 21, 22]]


def test_an_end_token_that_is_also_the_pad_token_is_trained_and_the_padding_is_not() -> None:
    """Collators that mask all tokens equal to the pad token leave out the end, and answers never stop."""
    end = 2
    texts = [Example((7, 8, end), (False, True, True)), Example((7, 8, 9, 9, end), (False, False, True, True, True))]
    assert batches.padded(texts)["labels"].tolist() == [[-100, 8, end, -100, -100], [-100, -100, 9, 9, end]]
    assert batches.padded(texts)["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batches.packed(texts)["labels"].tolist() == [[-100, 8, end, -100, -100, 9, 9, end]]


def test_the_rows_of_a_diverged_step_are_written_down(train: Callable[..., Run]) -> None:
    run = train(learning_rate=1.0, lora_alpha=1e30, skip_proofs=True)
    assert run.failed.code == 6
    assert "not finite" in run.failed.message or "the loss is" in run.failed.message
    assert "question 7" in (run.folder / "crash.txt").read_text()
    assert not (run.folder / "lora").exists()


# Packing.


def leaky(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """Attention that takes a packed row for one document: what happened to others."""
    whole = query.shape[2]
    return attention.attend_as_told(
        module, query, key, value, mask, **{**options, "documents": attention.Documents.of((whole,))}
    )


def test_documents_that_see_each_other_are_found(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """trl#1230 #3067 #3910, unsloth#126."""
    monkeypatch.setattr(attention, "attend_as_told", attention.attend_within_documents, raising=False)
    monkeypatch.setattr(attention, "attend_within_documents", leaky)
    run = train(steps=1)
    (isolated,) = [proof for proof in run.all(events.Proved) if "isolated" in proof.name]
    assert not isolated.ok
    assert "rows are padded instead" in run.warned
    failed = train(packing=True).failed
    assert (failed.code, failed.hint) == (6, "add `--no-packing`")


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_deep_model_carries_rounding_far_and_a_fault_farther(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """On a GPU, 32 random layers in bfloat16 moved packed logits by 6 %, and packing was given up for nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=32)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    one_by_one = attention._one_by_one
    assert proofs.prove_isolation(model, dtype=dtype).ok
    with monkeypatch.context() as patch:  # every packed attention is off by a bit of bfloat16, as another kernel's is
        noise = 1 + 2**-9 if dtype == "bfloat16" else 1 + 2**-22
        patch.setattr(attention, "_one_by_one", lambda *given: one_by_one(*given) * noise)
        assert proofs.prove_isolation(model, dtype=dtype).ok
    monkeypatch.setattr(attention, "_one_by_one", lambda *given: one_by_one(*given).flip(1))
    assert not proofs.prove_isolation(model, dtype=dtype).ok


# What moves, and what was learnt.


def test_a_matrix_that_does_not_move_and_a_frozen_weight_that_does_are_found(loaded: Any) -> None:
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


def test_a_first_step_with_a_rate_of_zero_is_exit_6(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up from zero: a run of one step trained nothing, and said that it was done."""
    from backprop.core import schedule

    monkeypatch.setattr(schedule, "rate_share", lambda step, **_: min(step, 1))
    failed = train(steps=1).failed
    assert failed.code == 6
    assert "not proved: the adapter moves, and nothing else: 0 of 28 trained matrices moved" in failed.message


@pytest.mark.slow
def test_a_run_that_makes_the_model_worse_is_exit_6_but_its_adapter_is_kept(
    train: Callable[..., Run], write: Callable[..., Path]
) -> None:
    # A random model with tied embeddings thinks a repeated word likely, until it has learnt another answer.
    held_out = write([chat("a", "b " * 100)], "held.jsonl")
    rows = [chat("a", "one two three four five six")] * 8
    run = train(rows=rows, eval_data=(str(held_out),), steps=20, learning_rate=3e-2)
    assert run.failed.code == 6
    assert "the model got better" in run.failed.message
    assert (run.folder / "lora" / "adapter_model.safetensors").is_file()
    assert json.loads((run.folder / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("stopped", "end_loss", "loss", "ok"),
    [
        (1, 9.0, 0.1, True),  # one ended
        (0, 2.0, 3.0, True),  # one in seven will
        (0, 9.0, 0.1, False),  # the answers are known, their end is not
        (0, 9.5, 3.0, False),  # the end became unlikelier
        (0, 8.0, 3.0, None),  # little is learnt yet
    ],
)
def test_answers_that_never_end_are_found(stopped: int, end_loss: float, loss: float, ok: bool | None) -> None:
    before = proofs.Asked(questions=("q",), answers=("a",), stopped=0, end_loss=9.0)
    proof = proofs.prove_stopping(before, dataclasses.replace(before, stopped=stopped, end_loss=end_loss), loss=loss)
    assert (proof and proof.ok) == ok


def test_ends_that_are_masked_after_all_masks_were_proved_are_found(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a collator does that takes the end token for padding: the loss looks healthy, and answers never stop."""
    from backprop.engine import objectives

    def without_ends(*arguments: Any) -> list[dict[str, Any]]:
        return [
            {**one, "labels": one["labels"].masked_fill(one["labels"] == 2, batches.IGNORED)}
            for one in batches.passes(*arguments)
        ]

    monkeypatch.setattr(objectives, "passes", without_ends)
    run = train(rows=[chat(f"What is {n}?", "It is here.") for n in range(8)], steps=60)
    (failed,) = run.all(events.Failed)
    assert failed.code == 6
    assert "answers stop by themselves: 0 of 3" in failed.message


# Templates and lengths, as a run tells of them.


def test_a_template_without_an_end_is_exit_4(train: Callable[..., Run], changed: Callable[..., Path]) -> None:
    """axolotl#3754 #1806, torchtune#949."""
    model = changed(
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    failed = train(model=model).failed
    assert failed.code == 4
    assert "0 of 8 answers end" in failed.message
    assert not train(model=model, skip_proofs=True, dry_run=True).all(events.Failed)


def test_a_base_model_gets_a_template_that_is_said_and_saved(
    train: Callable[..., Run], changed: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer

    run = train(model=changed(None), steps=1, skip_proofs=True)
    assert "without a chat template" in run.warned
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "lora")
    turns = chat("hi", "ho", "hu")["messages"]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "User:\nhi\n\nAssistant:\nho<|im_end|>\n\nUser:\nhu\n\nAssistant:\n"


CHATML = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = CHATML.replace("m.content", "(m.content | selectattr('type', 'equalto', 'text') | join('', 'text'))")
SYSTEM = {"role": "system", "content": "be brief"}
THINKS = {"role": "assistant", "content": "ho", "reasoning_content": "hm"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "tide", "arguments": "{}"}}]}
ASKS = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("template", "turns", "code", "words"),
    [
        (
            CHATML,
            [SYSTEM, ASKS, THINKS],
            0,
            [
                "no place for system turns: in 1",
                "no place for reasoning: in 1",
                "»<think>\nhm\n</think>\n\nho<|im_end|>«",
            ],
        ),
        (CHATML, [ASKS, CALLS], 3, ["line 1 has tool calls, which this model's chat template leaves out or refuses"]),
        (
            PARTS,
            [ASKS, THINKS],
            3,
            ["line 1 has turns of text, which this model's chat template leaves out or refuses"],
        ),
    ],
    ids=["system refused and reasoning left out", "backpropagate 1.8.5, tool calls left out", "all text left out"],
)
def test_what_a_template_leaves_out_is_told_before_training(
    changed: Callable[..., Path],
    write: Callable[..., Path],
    tmp_path: Path,
    template: str,
    turns: list[object],
    code: int,
    words: list[str],
) -> None:
    data = write([{"messages": turns}])
    done = backprop("train", "--data", data, "--model", changed(template), "--dry-run", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert all(" ".join(word.split()) in " ".join(done.stderr.split()) for word in words), done.stderr
    assert not (tmp_path / "output").exists()


def test_what_is_cut_is_counted_and_more_than_a_twentieth_is_exit_3(train: Callable[..., Run]) -> None:
    """trl#3449 #5697, unsloth#2904: rows were cut at 1024 or 2048 tokens without a word."""
    failed = train(max_length=48, dry_run=True).failed
    assert failed.code == 3
    assert "too much is cut" in failed.message
    assert "--allow-truncation" in failed.hint
    allowed = train(max_length=48, dry_run=True, allow_truncation=True)
    (read,) = allowed.all(events.DataRead)
    assert read.tokens_cut > 0
    assert f"{read.tokens_cut} tokens" in allowed.warned
    failed = train(max_length=20, dry_run=True, allow_truncation=True).failed
    assert failed.code == 3
    assert "none of the 8 examples has a token to train on within 20 tokens" in failed.message


def test_the_length_is_that_of_the_longest_row_also_beyond_2048(
    train: Callable[..., Run], changed: Callable[..., Path]
) -> None:
    """trl#3449 #5697, unsloth#2904."""
    model = changed(CHATML, max_position_embeddings=8192)
    run = train(rows=[chat("short", "row"), chat("a", "word " * 3000)], model=model, dry_run=True)
    (read,) = run.all(events.DataRead)
    assert not run.all(events.Failed)
    assert (read.tokens_cut, read.examples_dropped) == (0, 0)
    assert read.longest > 3000


@pytest.mark.slow
def test_without_proofs_the_same_is_trained_and_what_does_not_hold_is_not_called_proved(
    train: Callable[..., Run], changed: Callable[..., Path]
) -> None:
    endless = changed(
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert train(skip_proofs=True).losses == train().losses
    run = train(model=endless, skip_proofs=True)
    ends = next(proof for proof in run.all(events.Proved) if "end" in proof.name)
    assert not ends.ok
    assert not run.all(events.Failed)
    assert json.loads((run.folder / "run.json").read_text())["config"]["skip_proofs"] is True
