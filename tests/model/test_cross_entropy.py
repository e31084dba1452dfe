"""The loss that never holds the logits of a whole pass, against torch's own."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from conftest import UNEVEN, Run

from backprop import events

torch = pytest.importorskip("torch")

PREFERENCES = [{"prompt": f"question {n}", "chosen": "good " * (n % 4 + 1), "rejected": "bad"} for n in range(12)]


@pytest.mark.parametrize(
    ("held", "compiled"),
    [(1, False), (3, False), (7, False), (3, True)],
    ids=["a row at a time", "three rows", "all at once", "compiled"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, held: int, bias: bool, compiled: bool
) -> None:
    from backprop.engine import layers
    from backprop.engine import linear_cross_entropy as own

    monkeypatch.setattr(own, "loss_rows", lambda _: held)
    if compiled:
        monkeypatch.setattr(
            own, "losses_and_gradient", layers._for_one_vocabulary(layers.as_compiled(own.losses_and_gradient))
        )
    torch.manual_seed(1)
    head = torch.nn.Linear(8, 23, bias=bias).requires_grad_(False)
    targets = torch.tensor([3, -100, 22, 0, -100, 5, 5])
    weights = torch.rand(7)
    found: list[tuple[Any, Any]] = []
    hidden = torch.randn(7, 8)
    for function in (
        lambda rows: own.linear_cross_entropy(rows, head, targets),
        lambda rows: torch.nn.functional.cross_entropy(head(rows), targets, reduction="none"),
    ):
        rows = hidden.clone().requires_grad_()
        losses = function(rows)
        (losses * weights).sum().backward()
        found.append((losses.detach(), rows.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_packed_pass_has_the_labels_of_each_of_its_examples() -> None:
    from backprop.core.data.render import Example
    from backprop.engine.batches import labels_of, packed

    examples = [Example((5, 6, 7), (True, False, True)), Example((8,), (True,)), Example((9, 10), (False, True))]
    found = packed(examples)
    assert found["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert found["labels"].tolist() == [[label for example in examples for label in labels_of(example)]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]


def test_rows_of_the_loss_fill_the_tiles_of_a_gpu() -> None:
    from backprop.core.memory import loss_rows

    assert [loss_rows(words) for words in (32_000, 49_152, 128_256, 152_064, 262_144, 2**22)] == [
        *(1024, 640, 256, 256, 128, 128),
    ]


def test_one_graph_serves_rows_of_any_number_and_knows_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from backprop.engine import layers
    from backprop.engine import linear_cross_entropy as own

    shapes: list[Any] = []

    def compiling(graph: Any, inputs: Any) -> Any:
        found = (node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder")
        shapes.extend(one.shape for one in found if getattr(one, "ndim", 0) == 2)
        return graph

    loss = torch.compile(own.losses_and_gradient, dynamic=True, backend=compiling)
    known = layers._for_one_vocabulary(loss)
    for rows in (7, 5):
        known(torch.randn(rows, 23), torch.arange(rows), wanted=True)
    ((rows, words),) = shapes
    assert not isinstance(rows, int)
    assert words == 23
    assert isinstance(words, int)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_compiled_loss_holds_as_many_logits_as_are_expected(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    from backprop.config import TrainConfig
    from backprop.core import memory
    from backprop.engine import layers
    from backprop.engine import linear_cross_entropy as own

    rows, words, hidden_size = 64, 32768, 8
    for module in (own, memory):
        monkeypatch.setattr(module, "loss_rows", lambda _: rows)
    monkeypatch.setattr(
        own, "losses_and_gradient", layers._for_one_vocabulary(layers.as_compiled(own.losses_and_gradient))
    )
    head = torch.nn.Linear(hidden_size, words, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(parts * rows, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(words, (parts * rows,))
    own.linear_cross_entropy(hidden, head, targets)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        own.linear_cross_entropy(hidden, head, targets)
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    sizes = {"hidden_size": hidden_size, "intermediate_size": 1, "num_layers": 1, "max_positions": 1}
    shape = memory.ModelShape(**sizes, vocabulary=words)
    config = TrainConfig(data=("x",), method="lora")
    expected = memory.loss_memory(config, shape, tokens=parts * rows, width=2, compiled=True)
    assert max(held) == pytest.approx(expected, rel=0.05)


def tiny(kind: str, **options: Any) -> Any:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes, **options))
    model.get_output_embeddings().requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("kind", "options", "plain"),
    [
        pytest.param("Llama", {}, True, id="a linear layer and nothing else"),
        pytest.param("Granite", {"logits_scaling": 4.0}, False, id="scaled"),
        pytest.param("Gemma2", {"final_logit_softcapping": 0.5}, False, id="capped"),
    ],
)
def test_logits_that_are_scaled_or_capped_are_trained_so(kind: str, options: dict[str, Any], plain: bool) -> None:
    from backprop.engine import cross_entropy

    model = tiny(kind, **options).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    one = {"input_ids": ids, "labels": torch.tensor([[-100, 6, -100, 8, 9]])}
    logits = model(input_ids=ids).logits[0, [0, 2, 3]]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([6, 8, 9]), reduction="sum")
    for _ in range(2):  # the second time it is known
        assert cross_entropy.sum_of_losses(model, one).item() == pytest.approx(expected.item(), rel=1e-5)
    assert getattr(model, cross_entropy.PLAIN_HEAD) == plain


def test_a_model_that_makes_logits_without_calling_its_last_layer_is_trained_all_the_same() -> None:
    from backprop.engine import cross_entropy

    model = tiny("Llama")
    head, forward = model.get_output_embeddings(), model.forward

    def own_way(**arguments: Any) -> Any:
        hidden = model.model(input_ids=arguments["input_ids"]).last_hidden_state[:, arguments["logits_to_keep"]]
        return type("Output", (), {"logits": torch.nn.functional.linear(hidden, head.weight)})

    one = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    expected = cross_entropy.sum_of_losses(model, one).item()
    delattr(model, cross_entropy.PLAIN_HEAD)
    model.forward = own_way
    assert cross_entropy.sum_of_losses(model, one).item() == pytest.approx(expected, rel=1e-6)
    model.forward = forward


def test_likelihoods_of_documents_are_summed_in_32_bits_where_the_model_computes_in_16(tiny_model: Path) -> None:
    """A product with ones, in bfloat16, took an answer's likelihood for another by up to four thousandths of it."""
    from transformers import AutoModelForCausalLM

    from backprop.core.data.render import Example
    from backprop.engine import batches, cross_entropy
    from backprop.engine.attention import within_documents

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval().requires_grad_(False)
    answers = [Example(tuple(range(start, start + 40)), (False, *[True] * 39)) for start in (300, 900)]
    with within_documents(model), batches.computing(model, "bfloat16"):
        together = cross_entropy.log_likelihoods(model, batches.packed(answers))
        alone = [-cross_entropy.sum_of_losses(model, batches.packed([one])).item() for one in answers]
    assert together.tolist() == pytest.approx(alone, rel=1e-4)


def test_layers_of_the_language_model_are_recomputed_not_those_that_see() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.modeling_layers import GradientCheckpointingLayer

    from backprop.engine import layers

    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8}
    sight = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 64}
    sight |= {"image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=sight))
    layers.recompute(model, 3)
    found = layers.layers_of(model)
    assert [layer.gradient_checkpointing for layer in found] == [True, True, True, False]
    every = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert [module for module in every if module.gradient_checkpointing] == found[:3]


def test_a_model_of_other_layers_recomputes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from backprop.engine import layers

    model = tiny("Llama")
    monkeypatch.setattr(layers, "layers_of", lambda _: [])
    layers.recompute(model, 1)
    assert model.is_gradient_checkpointing


def test_finding_out_draws_no_random_number_twice() -> None:
    """Else the first pass of a run that goes on would not be that of the run that was not stopped."""
    from backprop.engine import cross_entropy

    model = tiny("Granite", logits_scaling=4.0, attention_dropout=0.5).train()
    one = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, 6, 7, 8]])}
    found: list[float] = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(cross_entropy.sum_of_losses(model, one).item())
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "compiled_code_kept")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"packing": True, "lora_dropout": 0.1}, id="dropout", marks=pytest.mark.long),
        pytest.param({"packing": False}, id="padded"),
        pytest.param({"method": "dora", "recompute": 0}, id="dora", marks=pytest.mark.long),
        pytest.param({"objective": "dpo"}, id="dpo", marks=pytest.mark.long),
    ],
)
def test_compiled_layers_train_as_they_do_uncompiled(train: Callable[..., Run], options: dict[str, Any]) -> None:
    from torch._dynamo.utils import counters

    options = {"learning_rate": 1e-3, "recompute": 1, **options}
    rows = [*PREFERENCES] if "objective" in options else UNEVEN
    plain = train(rows, **options)
    counters.clear()
    compiled = train(rows, **options, compile=True)
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["inductor"]["fxgraph_cache_miss"] > 0
    assert not any("cannot be compiled" in event.message for event in compiled.all(events.Warned))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)


def test_layers_that_cannot_be_compiled_run_as_they_are(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    options = {"learning_rate": 1e-3, "packing": False, "micro_batch": 1}
    plain = train(**options).losses
    calls = [0]

    def compile_for_a_while(function: Any, **_: Any) -> Any:
        def compiled(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] > 9:  # in the midst of a step, which has left gradients
                raise TorchDynamoException("no compiler\nwas found")
            return function(*arguments, **named)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_for_a_while)
    run = train(**options, compile=True)
    assert calls[0] == 10
    told = [event.message for event in run.all(events.Warned) if "cannot be compiled" in event.message]
    assert told == ["the layers cannot be compiled here, and run slower: no compiler"]
    assert run.losses == pytest.approx(plain, rel=1e-6)
