"""Weights merged one at a time are those that PEFT merges all at once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from backprop.core.placement import Placement, place
from backprop.edges import llama_cpp
from backprop.engine import merge, reference, streamed
from backprop.engine.plain_lora import read_plain
from backprop.errors import ExportError

pytestmark = pytest.mark.model

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora, other ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "a whole head": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """In 16 bits and three files, with a head of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=False, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="6MB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


def adapted(base: Path, folder: Path, **options: Any) -> Path:
    """Write an adapter of random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options))
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter) * (parameter.abs().mean() + ("lora_B" in name))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    for path in base.glob("*token*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_is_what_peft_makes_of_it(base: Path, tmp_path: Path, kind: str) -> None:
    import torch
    from safetensors import safe_open

    adapter = adapted(base, tmp_path, **KINDS[kind])
    model = merge.load_adapted(str(base), adapter)
    expected = model.merge_and_unload(safe_merge=True).state_dict()
    merger = streamed.Merger(base, adapter)
    assert streamed.why_not(base, adapter) == ""
    names = set(streamed.shapes_in(base))
    assert names == set(expected)
    changed = {name for name in names if merger.changes(name)}
    assert len(changed) == (15 if kind == "a whole head" else 14)
    for _ in range(2):  # nothing of a merge stays behind
        for path in base.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in changed & set(file.keys()):
                    before = file.get_tensor(name)
                    found = merger.merge(name, before)
                    assert torch.equal(found, expected[name]), name
                    assert not torch.equal(found, before.float()), name


def test_plain_lora_is_read_without_peft_and_only_that(base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shapes = streamed.shapes_in(base)
    adapter = adapted(base, tmp_path)
    plain = read_plain(adapter, shapes)
    assert plain is not None
    assert len(plain) == 14
    for number, kind in enumerate(kind for kind in KINDS if kind not in ("lora", "rslora")):
        assert read_plain(adapted(base, tmp_path / str(number), **KINDS[kind]), shapes) is None, kind

    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    told, whole = json.loads(config.read_text()), load_file(weights)
    key = next(key for key in whole if "q_proj.lora_B" in key)
    for changed in (
        {"rank_pattern": {"q_proj": 2}},
        {"init_lora_weights": "pissa"},
        {"fan_in_fan_out": True},
        {"an option of a later release": 1},
        {"target_modules": "all-linear"},
        {"r": 8},
        {"bias": "all"},
        {"layers_to_transform": 0},
        {"r": 0},
    ):
        config.write_text(json.dumps({**told, **changed}))
        assert read_plain(adapter, shapes) is None, changed
    config.write_text(json.dumps(told))
    for which, tensors in {
        "a tensor is missing": {name: one for name, one in whole.items() if name != key},
        "one too many": {**whole, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": whole[key].clone()},
        "another shape": {**whole, key: whole[key][:-1].contiguous()},
        "16 bits": {**whole, key: whole[key].to(torch.bfloat16)},
        "nothing was learnt": {name: one * ("lora_B" not in name) for name, one in whole.items()},
    }.items():
        save_file(tensors, weights)
        assert read_plain(adapter, shapes) is None, which
    save_file(whole, weights)
    assert read_plain(adapter, shapes) is not None
    weights.write_bytes(b"no")
    assert read_plain(adapter, shapes) is None


def test_weights_that_are_held_the_other_way_round_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    """Of a square one the shapes do not tell; PEFT looks at the layer, whatever the adapter's file says."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8)).save_pretrained(
        tmp_path / "base"
    )

    def base() -> Any:
        return GPT2LMHeadModel.from_pretrained(tmp_path / "base")

    wrapped: Any = get_peft_model(base(), LoraConfig(r=2, target_modules=["attn.c_proj"], task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "fan_in_fan_out": False}))
    merged: Any = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    name = "transformer.h.0.attn.c_proj.weight"
    expected = merged.merge_and_unload().state_dict()[name]
    found = streamed.Merger(tmp_path / "base", tmp_path / "adapter").merge(name, base().state_dict()[name])
    assert torch.allclose(found, expected)


def test_an_adapter_on_a_shared_weight_is_merged_in_memory(tiny_model: Path, tmp_path: Path) -> None:
    adapter = adapted(tiny_model, tmp_path, modules_to_save=["embed_tokens"])
    assert streamed.why_not(tiny_model, adapter) == "model.embed_tokens.weight is shared"


def test_weights_under_other_names_are_merged_in_memory(base: Path, tmp_path: Path, tiny_model: Path) -> None:
    adapter = adapted(base, tmp_path, modules_to_save=["lm_head"])
    assert "lm_head.weight is stored" in streamed.why_not(tiny_model, adapter)


def test_an_adapter_that_changes_a_bias_is_merged_in_memory(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = adapted(base, tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in weights if "q_proj.lora_B" in key)
    weights[key.replace(".weight", ".bias")] = weights[key][:, 0].contiguous()
    save_file(weights, adapter / "adapter_model.safetensors")
    assert streamed.why_not(base, adapter).endswith("lora_B.bias changes a bias")


def test_a_head_that_is_not_stored_is_shared_whatever_the_configuration_leaves_out(
    tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": None}))
    adapter = adapted(tiny_model, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    assert streamed.why_not(tmp_path / "model", adapter) == "model.embed_tokens.weight is shared"


def test_only_the_files_that_transformers_loads_are_weights(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    shutil.copy(next(base.glob("*.safetensors")), tmp_path / "model" / "consolidated.safetensors")
    assert sorted(streamed.shapes_in(tmp_path / "model")) == sorted(streamed.shapes_in(base))
    assert streamed.size_of(tmp_path / "model") == streamed.size_of(base)


def test_a_damaged_file_is_told(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ExportError, match="is damaged"):
        streamed.why_not(base, tmp_path)


def test_a_weight_that_is_not_finite_is_refused(base: Path, tmp_path: Path) -> None:
    import torch

    merger = streamed.Merger(base, adapted(base, tmp_path))
    with pytest.raises(ExportError, match="not finite"):
        merger.merge("model.layers.0.self_attn.q_proj.weight", torch.full((64, 64), float("inf")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_file_is_byte_for_byte_that_of_a_merged_checkpoint(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = adapted(base, tmp_path / "adapter", **KINDS[kind])
    tokenizer = merge.adapted_tokenizer(adapter)
    streamed.lay_out(base, tokenizer, tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "whole" / "model")
    streamed.link_weights(base, tmp_path / "model")
    model = merge.load_adapted(str(base), adapter)
    merged: Any = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "model.safetensors", tmp_path / "whole" / "model")
    streamed.write_options(tmp_path / "merge.json", base, adapter, rounding=None, trust_remote_code=False)
    program = ("-m", "backprop.engine.streamed", str(tmp_path / "merge.json"))
    llama_cpp.convert(tmp_path / "model", tmp_path / "streamed.gguf", kind="f16", through=program)
    llama_cpp.convert(tmp_path / "whole" / "model", tmp_path / "plain.gguf", kind="f16")
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_weights_held_in_16_bits_are_computed_with_in_32(base: Path, tmp_path: Path) -> None:
    import torch

    adapter = adapted(base, tmp_path, use_dora=True)
    whole = merge.load_adapted(str(base), adapter)
    half = merge.load_adapted(str(base), adapter, dtype="bfloat16")
    ids = list(range(100, 130))
    assert torch.equal(torch.tensor(reference.logits(half, ids)), torch.tensor(reference.logits(whole, ids)))
    layers = [one for name, one in half.named_parameters() if "base_layer" in name]
    assert {one.dtype for one in layers} == {torch.bfloat16}


GIB = 2**30


@pytest.mark.parametrize(
    ("gpus", "memory", "expected"),
    [
        ([80 * GIB], 8 * GIB, Placement(device="cuda", dtype="float32")),
        ([24 * GIB, 8 * GIB], 64 * GIB, Placement(device="cuda", dtype="bfloat16")),
        ([8 * GIB], 64 * GIB, Placement(device="cpu", dtype="float32")),
        ([], 24 * GIB, Placement(device="cpu", dtype="bfloat16")),
        ([8 * GIB], 16 * GIB, None),
    ],
)
def test_an_8b_model_is_asked_where_there_is_room(gpus: list[int], memory: int, expected: Placement | None) -> None:
    assert place(8_000_000_000, stored="bfloat16", gpu_free_bytes=gpus, memory_free_bytes=memory) == expected
