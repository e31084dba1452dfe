"""What is trained is what should be, packed or padded, and proved on the loaded model; planted faults are in tests/lessons."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run, chat

from backprop import events
from backprop.config import TrainConfig
from backprop.core.data.judge import judge
from backprop.core.data.render import Example, encode_all
from backprop.core.plan import spill_bytes
from backprop.edges import device, files, spill
from backprop.engine import batches, exam
from backprop.engine.load import load_tokenizer
from backprop.engine.objectives import Supervised, measure

pytestmark = pytest.mark.model

ONE_ANSWER = [chat(f"What is {n}?", "It is here.") for n in range(8)]


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


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recomputing_activations_changes_no_loss(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Recomputation runs in the backward pass, where attention once no longer knew of the documents."""
    from transformers import modeling_utils

    real, times = modeling_utils.checkpoint, [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        times[0] += 1
        return real(*arguments, **named)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    losses: list[Any] = []
    counts: list[int] = []
    for layers in (0, 1, 99):
        losses.append(train(recompute=layers, method=method, learning_rate=1e-3).losses)
        counts.append(times[0] - sum(counts))
    assert counts[0] == 0
    assert counts[2] == 2 * counts[1] > 0  # the model has two
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_only_what_a_recomputed_layer_begins_with_waits_elsewhere(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In main memory, on a GPU (tests/model/test_gpu.py); here in a list."""
    import torch
    from transformers import AutoModelForCausalLM

    from backprop.engine import layers

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    waiting: list[Any] = []

    def gradients() -> list[Any]:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [weight.grad for weight in model.parameters()]

    def leave(tensor: Any) -> int:
        waiting.append(tensor.detach().clone())
        return len(waiting) - 1

    monkeypatch.setattr(layers, "_to_main_memory", leave)
    monkeypatch.setattr(layers, "_to_gpu", lambda number: waiting[number])
    layers.recompute(model, 2)
    plain = gradients()
    assert waiting == []
    layers.recompute(model, 1, offloaded=True)
    begun: list[Any] = []
    layer = layers.layers_of(model)[0]
    hook = layer.register_forward_pre_hook(lambda _, given: begun.append(weakref.ref(given[0])))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert begun[0]() is None, "it still waits on the GPU, too"
    hook.remove()
    del loss
    waiting.clear()
    again = gradients()
    assert [tensor.shape for tensor in waiting] == [(1, 4, model.config.hidden_size)]
    assert all(one.equal(other) for one, other in zip(plain, again, strict=True))
    waiting.clear()
    monkeypatch.setattr(layers, "_to_gpu", lambda number: 2 * waiting[number])
    assert not all(one.equal(other) for one, other in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize(
    ("kind", "options", "packs"),
    [
        pytest.param("Mistral", {"sliding_window": 4}, True, id="a window shorter than the rows"),
        pytest.param("Qwen3", {}, True, id="norms on queries and keys", marks=pytest.mark.slow),
        pytest.param(
            "Gemma2",
            {"sliding_window": 4, "attn_logit_softcapping": 50.0},
            False,
            id="capped scores",
            marks=pytest.mark.slow,
        ),
    ],
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


def test_every_run_proves_and_tells_what_it_proved(train: Callable[..., Run]) -> None:
    run = train(rows=ONE_ANSWER, steps=60)
    names = [
        "every example is trained on",
        "nothing is cut without notice",
        "the end of each answer is trained",
        "packed documents are isolated",
        "the adapter moves, and nothing else",
        "every example is seen as often as planned",
        "the model got better",
        "answers stop by themselves",
    ]
    assert [(proof.name, proof.ok) for proof in run.all(events.Proved)] == [(name, True) for name in names]
    assert run.all(events.Proved)[-1].found.startswith("3 of 3 answers ended")
    assert [(sample.prompt, sample.after) for sample in run.all(events.Sampled)] == [
        (f"What is {number}?", "It is here.") for number in range(3)
    ]
    manifest = json.loads((run.folder / "run.json").read_text())
    assert [proof["name"] for proof in manifest["proofs"]] == names
    assert manifest["samples"][0]["after"] == "It is here."


def test_packing_is_proved_even_where_proofs_are_skipped(
    train: Callable[..., Run], tmp_path: Path, tiny_model: Path
) -> None:
    """It costs milliseconds, and without it a model that cannot pack ended in a traceback, or trained on a leak."""
    model = with_words(of_kind(tmp_path / "gemma", "Gemma2", attn_logit_softcapping=50.0), tiny_model)
    run = train(model=model, skip_proofs=True)
    assert any("rows are padded instead" in event.message for event in run.all(events.Warned))
    assert json.loads((run.folder / "run.json").read_text())["result"]["packing"] is False


@pytest.mark.slow
def test_held_out_rows_longer_than_all_others_are_measured_whole(
    train: Callable[..., Run], write: Callable[..., Path]
) -> None:
    """They were cut to the longest training row without a word, and the loss was that of their first words."""
    held = write([chat("a", "word " * 90)], "held.jsonl")
    run = train(rows=[chat("a", "b")] * 8, eval_data=(str(held),), steps=1)
    (plan,) = run.all(events.PlanMade)
    assert plan.choices["max_length"] > 90
    assert not [event for event in run.all(events.Warned) if "cut" in event.message]
    cut = train(rows=[chat("a", "b")] * 8, eval_data=(str(held),), steps=1, max_length=50)
    assert [event for event in cut.all(events.Warned) if event.message.startswith("evaluation data: ")]


def test_ends_that_are_cut_are_counted(train: Callable[..., Run]) -> None:
    run = train(rows=[chat("a", "word " * 40)] * 2 + [chat("a", "b")] * 6, max_length=45, allow_truncation=True)
    ends = next(proof for proof in run.all(events.Proved) if proof.name.startswith("the end"))
    assert ends.found == "8 of 8 answers end with a trained token that stops them; 2 of these ends are cut"


def test_a_trained_adapter_is_saved_before_anything_else_can_go_wrong(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exam.Exam, "judge", judge)
    run = train()
    assert run.all(events.Failed)[0].code == 130
    assert (run.folder / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"target_modules": ("lm_head",)}, 4, "`--target-modules lm_head` fits no linear layer"),
        ({"target_modules": ("q_proj", "nosuch")}, 4, "`--target-modules nosuch` fits no linear layer"),
        ({"early_stopping": 1}, 2, "`--early-stopping` needs held-out rows"),
        ({"eval_steps": 1}, 2, "`--eval-steps` needs held-out rows"),
    ],
    ids=["the output layer", "a name among others", "stopping", "evaluating"],
)
def test_an_option_that_would_do_nothing_is_refused(
    train: Callable[..., Run], options: dict[str, Any], code: int, said: str
) -> None:
    (failed,) = train(**options).all(events.Failed)
    assert failed.code == code
    assert said in failed.message


def test_rows_too_short_for_every_layer_to_learn_from_raise_no_alarm(train: Callable[..., Run]) -> None:
    """With two tokens, the first attends to itself alone: queries and keys get no gradient."""
    run = train(rows=[{"text": "sea"}], batch_size=1)
    assert not run.all(events.Failed)
    assert all(proof.ok for proof in run.all(events.Proved))


def test_texts_that_hold_control_tokens_are_told(train: Callable[..., Run]) -> None:
    run = train(rows=[chat("a", "b"), chat("a", "b<|im_end|>c"), chat("a", "d")], steps=1)
    (told,) = [event.message for event in run.all(events.Warned) if "control tokens" in event.message]
    assert told.startswith("1 rows")
    assert told.endswith("line 2")


def test_the_mean_loss_is_that_of_plain_transformers_packed_or_padded(loaded: Any) -> None:
    import torch

    examples = [Example(tuple(range(7, 7 + n)), (False,) + (True,) * (n - 1)) for n in (3, 9, 5, 30)]
    sizes = [batches.PassSize(examples=2, tokens=40, packing=packing) for packing in (True, False)]
    with torch.no_grad():
        ids = [torch.tensor([example.ids]) for example in examples]
        sums = [float(loaded(input_ids=one, labels=one).loss) * (one.shape[1] - 1) for one in ids]
    expected = sum(sums) / sum(one.shape[1] - 1 for one in ids)
    assert [measure(loaded, examples, size, Supervised()).loss for size in sizes] == [
        pytest.approx(expected, rel=1e-5)
    ] * 2


def test_what_is_kept_of_real_rows_is_about_what_was_estimated(tiny_model: Path) -> None:
    judged = judge(files.read_rows(str(ROOT / "examples" / "pottlesea.jsonl")))
    kept = spill.examples()
    encode_all(
        judged.conversations, load_tokenizer(str(tiny_model), trust_remote_code=False), loss_on="assistant", keep=kept
    )
    estimate = spill_bytes(TrainConfig(data=("x",)), rows=len(judged.conversations), characters=judged.characters)
    assert kept.num_bytes <= estimate < 1.5 * kept.num_bytes


def test_a_cache_too_small_for_the_tokens_is_exit_9_before_they_are_made(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(device, "disk_free_bytes", lambda path: 2000)
    run = train()
    assert run.failed.code == 9
    assert "XDG_CACHE_HOME" in run.failed.hint
    assert "rendering the data" not in [phase.name for phase in run.all(events.Phase)]
