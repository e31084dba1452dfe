"""How layers run in training: one graph for rows of any documents, and adapters as PEFT computes them."""

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from backprop import events

torch = pytest.importorskip("torch")


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12, "vocab_size": 90}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **options))


def with_adapter(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def causal(start: int, end: int) -> Any:
    return torch.ones(end - start, end - start, dtype=torch.bool).tril()


def forward_kernel(query: Any, key: Any, value: Any, ends: Any, *_: Any, scale: Any = None, **__: Any) -> Any:
    """What torch's kernel for documents computes, as its definition has it."""
    output_THD = torch.empty_like(query)
    for start, end in pairwise(ends.tolist()):
        parts = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            *parts, is_causal=True, scale=scale, enable_gqa=True
        )
        output_THD[start:end] = attended.transpose(0, 1)
    nothing = torch.zeros(())
    return output_THD, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64), nothing, nothing


def backward_kernel(gradient: Any, *tensors: Any, scale: Any = None, **_: Any) -> Any:
    query, key, value, _, _, ends, *_ = tensors
    found = [torch.empty_like(tensor) for tensor in (query, key, value)]
    for start, end in pairwise(ends.tolist()):
        q, k, v, g = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value, gradient))
        shared = len(q) // len(k)
        k, v = (tensor.repeat_interleave(shared, 0) for tensor in (k, v))
        weights = (q @ k.mT * scale).masked_fill(~causal(start, end), -torch.inf).softmax(-1)
        moved = g @ v.mT
        scores = weights * (moved - (moved * weights).sum(-1, keepdim=True)) * scale
        parts = (
            scores @ k,
            *((one.mT @ by).unflatten(0, (-1, shared)).sum(1) for one, by in ((scores, q), (weights, g))),
        )
        for whole, part in zip(found, parts, strict=True):
            whole[start:end] = part.transpose(0, 1)
    return tuple(found)


@pytest.fixture
def kernel_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the CPU have the kernel that only GPUs have, so that what leads to it is run here too."""
    from backprop.engine import attention

    monkeypatch.setattr(attention, "_varlen_fits", lambda *_: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward_kernel, "CPU")
        library.impl("_flash_attention_backward", backward_kernel, "CPU")
        yield


def gradients_of(model: Any, lengths: Sequence[int]) -> list[Any]:
    from backprop.engine.attention import Documents, within_documents

    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    model.zero_grad()
    with within_documents(model):
        made = model(
            input_ids=torch.arange(sum(lengths))[None] % 90,
            position_ids=positions,
            documents=Documents.of(lengths),
            use_cache=False,
        )
    made.logits.square().mean().backward()
    return [made.logits.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


def test_one_graph_serves_all_layers_and_rows_of_any_documents(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    from backprop.engine import attention
    from backprop.engine.adapters import narrow
    from backprop.engine.layers import Compiled

    rows = [[5, 9], [3, 4, 20], [7], [2, 2, 3, 50], [60, 60], [61, 61, 61]]
    monkeypatch.setattr(attention, "LONG", 60)
    model = with_adapter(llama())
    narrow(model)
    expected = [gradients_of(model, lengths) for lengths in rows]
    request.getfixturevalue("kernel_on_a_cpu")
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile_(function, backend=graphs, dynamic=True, fullgraph=True)
    )
    compiled = Compiled(model)
    made: list[int] = []
    for lengths, plain in zip(rows, expected, strict=True):
        with compiled.in_use():
            found = gradients_of(model, lengths)
        made.append(graphs.frame_count)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    # Nothing before the first layer has a gradient, so that it is compiled by itself.
    assert made[0] <= 3
    assert set(made[:4]) == {made[0]}
    # Those of one length are attended otherwise.
    assert set(made[4:]) == {made[4]}
    assert made[4] <= 2 * made[0]


def test_long_documents_of_one_length_are_attended_side_by_side_as_one_by_one(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from backprop.engine import attention

    rows = [[7, 7, 7], [7, 7, 5], [3, 3]]
    model = with_adapter(llama())
    expected = [gradients_of(model, lengths) for lengths in rows]
    request.getfixturevalue("kernel_on_a_cpu")
    monkeypatch.setattr(attention, "LONG", 7)
    real, shapes = attention._side_by_side, set[tuple[int, int]]()

    def noted(query: Any, key: Any, value: Any, length: int, scaling: float | None) -> Any:
        shapes.add((query.shape[2], length))
        return real(query, key, value, length, scaling)

    monkeypatch.setattr(attention, "_side_by_side", noted)
    for lengths, plain in zip(rows, expected, strict=True):
        torch.testing.assert_close(gradients_of(model, lengths), plain, rtol=1e-4, atol=1e-6)
    assert shapes == {(21, 7)}, "neither of several lengths, nor of short ones"


def test_a_window_shorter_than_documents_of_one_length_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from backprop.engine import attention, varlen

    documents = attention.Documents.of([2048, 2048])
    tokens = torch.zeros(1, 1, 4096, 2)
    seen: list[int | None] = []
    monkeypatch.setattr(attention, "_varlen_fits", lambda *_: True)
    monkeypatch.setattr(varlen, "attend", lambda *given: seen.append(given[-1]))
    for window in (512, 2048, None):
        attention.attend_within_documents(
            None, tokens, tokens, tokens, None, documents=documents, sliding_window=window
        )
    assert seen == [512]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "kernel_on_a_cpu", "compiled_code_kept")
def test_compiled_layers_keep_what_they_begin_with_and_compute_the_rest_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.autograd.graph import saved_tensors_hooks

    from backprop.engine import layers
    from backprop.engine.adapters import narrow

    model = with_adapter(llama())
    narrow(model)
    compiled = layers.Compiled(model)
    away: list[Any] = []

    def leave(tensor: Any) -> tuple[int]:
        away.append(tensor.clone())
        return (len(away) - 1,)

    monkeypatch.setattr(layers, "_to_main_memory", leave)
    monkeypatch.setattr(layers, "_to_gpu", lambda place: away[place[0]])

    def gradients(count: int, *, offloaded: bool = False) -> tuple[int, list[Any]]:
        kept: list[int] = []

        def note(tensor: Any) -> Any:
            kept.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel())
            return tensor

        layers.recompute(model, count, offloaded, compiled=compiled)
        with compiled.in_use(), saved_tensors_hooks(note, lambda tensor: tensor):
            found = gradients_of(model, [2, 7])
        return sum(kept), found

    whole, plain = gradients(0)
    half, found = gradients(6)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    least, found = gradients(12)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    print(whole, half, least)
    assert whole - half == pytest.approx(half - least, rel=0.1)
    assert whole - least > 12 * 9 * (4 * 32 + 3 * 64)  # what products begin with, of every token in every layer
    assert away == []
    _, found = gradients(12, offloaded=True)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    assert [tensor.shape for tensor in away] == 12 * [(1, 9, 32)]
    assert not model.is_gradient_checkpointing


def padded_gradients(model: Any, lengths: Sequence[int]) -> list[Any]:
    ids = torch.arange(len(lengths) * max(lengths)).reshape(len(lengths), -1) % 90
    mask = torch.tensor([[1] * length + [0] * (max(lengths) - length) for length in lengths])
    model.zero_grad()
    model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


@pytest.fixture
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compile nothing really, but count as torch does; give what each graph was made for."""
    made: list[str] = []

    def backend_of(name: str) -> Callable[..., Any]:
        def backend(graph: Any, inputs: Any) -> Any:
            made.append(name)
            return graph.forward

        return backend

    backends = {name: backend_of(name) for name in ("kept", "again")}
    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, backend=None, dynamic=True, fullgraph=False, options=None: compile_(
            function, backend=backends["again" if backend else "kept"], dynamic=dynamic, fullgraph=fullgraph
        ),
    )
    torch.compiler.reset()
    return made


def test_padded_rows_are_compiled_whatever_is_recomputed(quickly_compiled: list[str]) -> None:
    """Each shape of a mask and each kind of recomputing is compiled anew; torch alone would stop at eight."""
    from backprop.engine import layers

    model = with_adapter(llama())
    compiled = layers.Compiled(model)
    for lengths in ([5, 5], [3, 9], [7], [2, 2, 11]):
        plain = padded_gradients(model, lengths)
        for count in (0, 6, 12):
            layers.recompute(model, count, compiled=compiled)
            with compiled.in_use():
                torch.testing.assert_close(padded_gradients(model, lengths), plain, rtol=1e-4, atol=1e-6)
    assert quickly_compiled.count("again") > 2
    assert len(quickly_compiled) > 8


def test_what_compiles_in_pieces_is_recomputed_around_them(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, quickly_compiled: list[str]
) -> None:
    """Each piece would keep what it begins with."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    from backprop.engine import layers

    real, seen = LlamaMLP.forward, []

    def broken(self: Any, hidden: Any) -> Any:
        torch._dynamo.graph_break()
        return real(self, hidden)

    recompute = layers.recompute

    def noted(model: Any, count: int, offloaded: bool = False, *, compiled: Any = None) -> None:
        recompute(model, count, offloaded, compiled=compiled)
        seen.append((compiled is not None, [layer.gradient_checkpointing for layer in layers.layers_of(model)]))

    monkeypatch.setattr(LlamaMLP, "forward", broken)
    monkeypatch.setattr(layers, "recompute", noted)
    plain = train(recompute=2, compile=False, learning_rate=1e-3)
    compiled = train(recompute=2, compile=True, learning_rate=1e-3)
    assert not any("cannot be compiled" in event.message for event in compiled.all(events.Warned))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert seen == [(False, [True, True]), (True, [False, False]), (True, [True, True])]


@pytest.mark.usefixtures("quickly_compiled")
def test_code_that_was_compiled_in_pieces_is_not_asked_for_one_graph_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch leaves a function alone for good that breaks off within a loop, and then finds nothing to compile."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from backprop.engine import layers

    model = llama()

    def broken(self: Any, hidden: Any) -> Any:
        for _ in range(1):
            torch._dynamo.graph_break()
        return hidden * 2

    monkeypatch.setattr(LlamaDecoderLayer, "forward", broken)
    compiled, hidden = layers.Compiled(model), torch.ones(1, 2, 32)
    with compiled.in_use():
        model.model.layers[0].forward(hidden)
    compiled.recompute(12, offloaded=False)
    with pytest.raises(layers.failures_of_compiling(), match="no compiled frames"), compiled.in_use():
        model.model.layers[0].forward(hidden)


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [
        ({}, False),
        ({"attention_dropout": 0.1}, True),
        ({"text_config": {"attention_dropout": 0.1}}, True),
        ({"parts": [{"router_jitter_noise": 0.01}]}, True),
        ({"dropout": 0.0, "is_dropped": True}, False),
    ],
    ids=str,
)
def test_a_model_that_draws_random_numbers_is_known(settings: dict[str, Any], drawn: bool) -> None:
    from backprop.engine import layers

    model = llama()
    model.config.to_dict = lambda: settings
    assert layers._draws(model) == drawn
    assert layers._draws(with_adapter(llama(), lora_dropout=0.1))


@pytest.mark.parametrize(
    "options", [{}, {"lora_alpha": 12, "use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"]
)
def test_adapters_compute_what_pefts_do(options: dict[str, Any]) -> None:
    from backprop.engine.adapters import NARROW, narrow

    model = with_adapter(llama(), **options)
    theirs = gradients_of(model, [6, 11])
    with model.disable_adapter():
        before = model(torch.arange(9)[None]).logits
    narrow(model)
    changed = [module for module in model.modules() if type(module) in NARROW.values()]
    assert len(changed) == (0 if "use_dora" in options else 12 * 7)
    torch.testing.assert_close(gradients_of(model, [6, 11]), theirs, rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(model(torch.arange(9)[None]).logits, before)
    apart = model(torch.arange(9)[None]).logits
    model.merge_adapter()
    torch.testing.assert_close(model(torch.arange(9)[None]).logits, apart, rtol=1e-4, atol=1e-5)


def test_products_with_a_of_layers_that_read_the_same_are_one_and_others_are_their_own() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from backprop.engine.adapters import narrow

    model = with_adapter(llama())
    rank = model.peft_config["default"].r
    thin: list[int] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and made.shape[-1] in (
                rank,
                2 * rank,
                3 * rank,
            ):
                thin.append(made.shape[-1] // rank)
            return made

    with Seen(), torch.no_grad():
        model(torch.arange(9)[None])
    assert thin == 12 * [1] * 7
    narrow(model)
    thin.clear()
    with Seen(), torch.no_grad():
        model(torch.arange(9)[None])
    assert thin == 12 * [3, 1, 2, 1]
    # A layer that is given something else than the first of its group computes its own.
    attention = model.base_model.model.model.layers[0].self_attn
    one, other = torch.randn(2, 1, 4, model.config.hidden_size)
    alone = attention.k_proj(other)
    attention.q_proj(one)
    torch.testing.assert_close(attention.k_proj(other), alone)
    torch.testing.assert_close(attention.v_proj(one), attention.v_proj(one.clone()))


@pytest.mark.parametrize("where", ["gate_proj", "q_proj"])
def test_a_memory_that_is_full_between_layers_that_read_the_same_holds_nothing_of_the_step(where: str) -> None:
    """What the second was to take stayed, and with it all that the layers before had kept: what was tried next had no room."""
    import weakref
    from types import SimpleNamespace

    from torch.autograd.graph import saved_tensors_hooks

    from backprop.engine.adapters import narrow
    from backprop.engine.ranks import Ranks

    model: Any = with_adapter(llama())
    narrow(model)
    layer = model.base_model.model.model.layers[8]
    full: Any = getattr(layer.mlp if where == "gate_proj" else layer.self_attn, where).base_layer

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError

    class Kept:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor.detach()

    kept: list[weakref.ref[Kept]] = []

    def keep(tensor: Any) -> Kept:
        one = Kept(tensor)
        kept.append(weakref.ref(one))
        return one

    def part(model: Any, one: Any, *_: object) -> None:
        with saved_tensors_hooks(keep, lambda one: one.tensor):
            model(one["input_ids"], use_cache=False)

    chosen = {name: SimpleNamespace(value=0) for name in ("recompute", "offload")}
    plan: Any = SimpleNamespace(**chosen, dtype=SimpleNamespace(value="float32"), compiles_layers=False)
    objective: Any = SimpleNamespace(part=part, totals=lambda *_: 1)
    full.register_forward_pre_hook(no_room)
    assert Ranks(plan).step(model, objective, [{"input_ids": torch.arange(9)[None]}], seed=0) is None
    assert len(kept) > 100
    assert not [one for one in kept if one() is not None]


def test_layers_that_read_the_same_may_be_asked_in_any_order() -> None:
    """Falcon H1 asks for up before gate: gate computed for up once more, and nothing took it away."""
    from backprop.engine.adapters import narrow

    model: Any = with_adapter(llama())
    plain = model.base_model.model.model.layers[0].mlp
    one = torch.randn(1, 4, model.config.hidden_size)
    expected = [plain.up_proj(one), plain.gate_proj(one)]
    narrow(model)
    calls: list[int] = []
    cat = torch.cat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", lambda *given: calls.append(0) or cat(*given))
        torch.testing.assert_close([plain.up_proj(one), plain.gate_proj(one)], expected)
    assert calls == [0]
    assert (plain.gate_proj.together._of, plain.gate_proj.together._found) == (None, {})


def test_layers_of_several_widths_read_something_else_each() -> None:
    """As where keys and values are of another model's states: their matrices cannot stand one above the other."""
    from backprop.engine.adapters import narrow

    base = llama()
    attention = base.model.layers[0].self_attn
    attention.k_proj, attention.v_proj = torch.nn.Linear(48, 16), torch.nn.Linear(48, 16)
    model: Any = with_adapter(base)
    seen = torch.randn(1, 4, 48)
    expected = attention.k_proj(seen)
    narrow(model)
    attention.q_proj(torch.randn(1, 4, 32))
    torch.testing.assert_close(attention.k_proj(seen), expected)


def test_adapters_drop_what_pefts_drop() -> None:
    from backprop.engine.adapters import narrow

    model = with_adapter(llama(), lora_dropout=0.5).train()
    found: list[Any] = []
    for change in (lambda _: None, narrow):
        change(model)
        torch.manual_seed(3)
        found.append(gradients_of(model, [6, 11]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_what_is_compiled_is_used_in_training_alone_and_kept_beside_other_downloads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import os

    import transformers  # noqa: F401  it sets a folder of its own
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from backprop.engine import linear_cross_entropy
    from backprop.engine.layers import Compiled

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setenv("TRITON_CACHE_DIR", "chosen")
    model = llama()
    plain = linear_cross_entropy.losses_and_gradient
    with Compiled(model).in_use():
        assert linear_cross_entropy.losses_and_gradient is not plain
        assert "forward" in vars(model.model.layers[3])
    assert linear_cross_entropy.losses_and_gradient is plain
    assert "forward" not in vars(model.model.layers[3])
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "backprop" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "chosen"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_more_kinds_of_layers_than_torch_compiles_run_as_they_are_and_it_is_told(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backprop.engine import layers

    torch.compiler.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend="eager", dynamic=True))
    plain = train(packing=False)
    monkeypatch.setattr(layers, "MOST_KINDS", 1)
    run = train(packing=False, compile=True)
    assert run.losses == pytest.approx(plain.losses, rel=1e-6)
    told = [event.message for event in run.all(events.Warned) if "cannot be compiled" in event.message]
    assert told == ["the layers cannot be compiled here, and run slower: they are of more kinds than torch compiles"]


def test_a_gpu_loads_its_kernels_beside_the_weights_and_who_needs_them_tells_of_faults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from backprop.engine import attention

    asked: list[tuple[object, bool]] = []

    def ones(*_: int, dtype: object, **__: object) -> None:
        asked.append((dtype, threading.current_thread() is threading.main_thread()))
        raise RuntimeError("no kernel image")

    failed: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", ones)
        patch.setattr(threading, "excepthook", failed.append)
        with attention.kernels_ahead("cuda", "bfloat16"):
            pass
        with attention.kernels_ahead("cpu", "bfloat16"):
            pass
    assert asked == [(torch.bfloat16, False)]
    assert not failed
