"""Files that are quantized while the weights are converted are byte for byte those that llama.cpp makes of the 16-bit file."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import HERE, backprop, trained_run
from tiny_models import MODELS, smollm2, tiny

from backprop.config import NEEDS_IMATRIX, ExportConfig, Quantization
from backprop.edges import device, llama_cpp, llama_quants, places, process
from backprop.engine import streamed
from backprop.errors import ExportError
from backprop.verbs import gguf

pytestmark = pytest.mark.model

KINDS = ("q4_k_m", "q5_k_s", "q3_k_m", "q8_0", "q6_k", "iq4_nl", "q4_0", "iq3_s")
NUM_WEIGHTS = 3_219_776
"""Of the tiny model."""
PLAIN = [kind for kind in get_args(Quantization) if kind not in (*NEEDS_IMATRIX, *llama_cpp.CONVERTED)]


def converted(model: Path, room: Path, kinds: Iterable[str], *, keep: bool) -> Path:
    """Convert a whole checkpoint, and quantize beside; give the 16-bit file."""
    room.mkdir()
    options = room / "options.json"
    beside = {kind: room / f"{kind}.gguf" for kind in kinds}
    streamed.write_options(options, model, None, rounding=None, trust_remote_code=False, quantized=beside, keep=keep)
    source = room / "f16.gguf"
    llama_cpp.convert(model, source, kind="f16", through=("-m", "backprop.engine.streamed", str(options)))
    return source


def assert_as_llama_cpp(source: Path, room: Path, kinds: Iterable[str]) -> None:
    for kind in kinds:
        expected = room / "expected.gguf"
        llama_cpp.quantize(source, expected, quantization=kind)
        assert (room / f"{kind}.gguf").read_bytes() == expected.read_bytes(), kind


def other(name: str, folder: Path, **special: Any) -> Path:
    """Write a random model of another architecture, with the tokenizer of SmolLM2."""
    import torch
    import transformers

    whole: Any = transformers
    vocabulary = smollm2(folder)
    torch.manual_seed(0)
    settings = {"vocab_size": vocabulary, "num_hidden_layers": 3, "max_position_embeddings": 64, **special}
    config = getattr(whole, f"{name}Config")(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    getattr(whole, f"{name}ForCausalLM")(config).save_pretrained(folder)
    return folder


def test_every_type_is_as_llama_cpp_makes_it_also_where_widths_fit_none_of_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    """64 wide: all K types fall back to others, and types beside the file's own are many."""
    source = converted(tiny_model, tmp_path / "made", PLAIN, keep=True)
    assert_as_llama_cpp(source, tmp_path / "made", PLAIN)
    plain = tmp_path / "plain.gguf"
    llama_cpp.convert(tiny_model, plain, kind="f16")
    assert plain.read_bytes() == source.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in ("llama-tied", "qwen3", "gemma3") else pytest.mark.long)
        for name in MODELS
    ],
)
def test_each_architecture_is_as_llama_cpp_makes_it(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture, tmp_path / "model")
    source = converted(model, tmp_path / "made", KINDS, keep=True)
    assert_as_llama_cpp(source, tmp_path / "made", KINDS)


EXPERTS = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "special"),
    [
        pytest.param(
            "Mixtral",
            {**EXPERTS, "num_local_experts": 8, "num_experts_per_tok": 2},
            id="eight experts",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "Qwen2Moe",
            {
                **EXPERTS,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 96,
                "shared_expert_intermediate_size": 128,
            },
            id="experts of which a width is no multiple of 256",
        ),
        pytest.param(
            "Llama",
            {**EXPERTS, "intermediate_size": 48, "attention_bias": True},
            id="a width that is no multiple of 32, and biases",
        ),
        pytest.param("Mamba", {"hidden_size": 256, "state_size": 16}, id="no attention, and matrices in 32 bits"),
    ],
)
def test_what_is_rare_is_as_llama_cpp_makes_it(name: str, special: dict[str, Any], tmp_path: Path) -> None:
    model = other(name, tmp_path / "model", **special)
    source = converted(model, tmp_path / "made", KINDS, keep=True)
    assert_as_llama_cpp(source, tmp_path / "made", KINDS)


def test_the_16_bit_file_is_not_written_where_nobody_asks_for_it(tiny_model: Path, tmp_path: Path) -> None:
    source = converted(tiny_model, tmp_path / "kept", ["q4_k_m", "q8_0"], keep=True)
    head = converted(tiny_model, tmp_path / "made", ["q4_k_m", "q8_0"], keep=False)
    assert head.stat().st_size == source.stat().st_size, "what llama.cpp plans by"
    assert 512 * head.stat().st_blocks < source.stat().st_size - NUM_WEIGHTS, "weights were written"
    assert_as_llama_cpp(source, tmp_path / "made", ["q4_k_m", "q8_0"])


def test_a_weight_that_is_no_number_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """As llama.cpp does, when it reads the 16-bit file: here nothing else would look."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][100, 7] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError) as refused:
        converted(tmp_path / "model", tmp_path / "made", ["q4_k_m"], keep=False)
    found = "blk.1.ffn_up.weight has a weight that is no number as q4_k_m"
    assert refused.value.message.endswith(f"\n{found}")
    assert refused.value.hint == "train again", "another format would have it too"
    assert "raise ExportError" not in refused.value.message, "it is no bug"


def test_what_quantizes_on_the_way_may_take_more_than_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 billion weights to iq4_xs take two cores an hour and a half, after which all was thrown away."""
    limits: list[float] = []
    running = process.running

    def noted(*given: Any, timeout_s: float = 3600, **named: Any) -> Any:
        limits.append(timeout_s)
        return running(*given, timeout_s=timeout_s, **named)

    monkeypatch.setattr(process, "running", noted)
    with pytest.raises(ExportError, match="is not a directory"):
        llama_cpp.convert(tmp_path / "none", tmp_path / "f16.gguf", kind="f16")
    assert limits == [7 * 24 * 3600]


def test_a_type_that_needs_an_importance_matrix_is_refused(tmp_path: Path) -> None:
    source = llama_cpp.write_tiny(tmp_path)
    for kind in NEEDS_IMATRIX:
        with pytest.raises(ExportError, match=f"does not quantize to {kind}: .*imatrix"):
            llama_quants.plan(source, quantization=kind)


def test_the_plan_is_made_of_the_head_of_a_file_alone(tmp_path: Path) -> None:
    source = llama_cpp.write_tiny(tmp_path)
    before = llama_quants.plan(source, quantization="q4_k_m")
    length = source.stat().st_size
    with source.open("r+b") as file:
        file.truncate(length - 4 * 256 * 256 * 4)
        file.truncate(length)
    assert llama_quants.plan(source, quantization="q4_k_m") == before
    assert list(before.items()) == [
        ("output.weight", "Q6_K"),
        ("token_embd.weight", "Q4_K"),
        ("blk.0.attn_q.weight", "Q4_K"),
        ("blk.0.ffn_down.weight", "Q6_K"),
    ]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tiny_model, tmp_path_factory.mktemp("trained"), HERE, steps=30)


def files_of(run: Path, output: Path, *options: str) -> dict[str, bytes]:
    done = backprop("export", run, "-q", "q4_k_m", "-q", "q8_0", "--output", output, *options, cwd=output.parent)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in output.glob("*.gguf")}


def test_an_export_gives_the_same_files_whichever_way_they_are_quantized(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without proofs and with them, and by llama.cpp's own quantizer where the kernels are missing."""
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "quantize", lambda *_, **__: pytest.fail("the 16-bit file is quantized once more"))
        with pytest.MonkeyPatch.context() as nearly_full:
            nearly_full.setattr(device, "disk_free_bytes", lambda _: int(2.2 * NUM_WEIGHTS))
            quick = files_of(run, tmp_path / "quick", "--no-verify")
        proved = files_of(run, tmp_path / "proved")
    monkeypatch.setattr(llama_quants, "kernels_path", lambda: None)
    plain = files_of(run, tmp_path / "plain", "--no-verify")
    assert set(quick) == {"run-q4_k_m.gguf", "run-q8_0.gguf"}
    assert quick == proved == plain
    assert not [path for folder in ("quick", "proved") for path in (tmp_path / folder).glob(".*")]


def test_the_16_bit_file_that_is_to_be_proved_is_asked_room_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "disk_free_bytes", lambda _: int(2.2 * NUM_WEIGHTS))
    done = backprop("export", run, "-q", "q4_k_m", "--output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 9
    assert "export writes up to 9 MiB" in done.stderr  # 3 bytes for each of 3.2 million weights


def test_an_adapter_that_changes_nothing_is_told_in_the_same_words_without_proofs(run: Path, tmp_path: Path) -> None:
    """It is the converter's process that finds out then, and what that prints is no message."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(run / "lora", tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    done = backprop("export", tmp_path / "lora", "--no-verify", cwd=tmp_path)
    assert done.returncode == 7
    assert "is all zero: nothing was learnt" in done.stderr
    assert "cannot convert" not in done.stderr
    assert list((tmp_path / "lora" / "export").iterdir()) == []


def test_without_the_library_by_itself_the_quantizer_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llama_quants.kernels_path() is not None
    kinds, config = ("q4_k_m",), ExportConfig(verify=False)
    assert (gguf.quantized_beside(kinds, config), gguf.keeps_source(kinds, config)) == (["q4_k_m"], False)
    monkeypatch.setenv("BACKPROP_LLAMA_CPP", str(tmp_path))
    assert places.llama_library("llama").parent == tmp_path / "tools"
    assert (gguf.quantized_beside(kinds, config), gguf.keeps_source(kinds, config)) == ((), True)


@pytest.mark.parametrize(
    ("kinds", "options", "beside", "kept"),
    [
        (("q4_k_m", "q8_0"), {"verify": False}, ["q4_k_m", "q8_0"], False),
        (("q4_k_m",), {}, ["q4_k_m"], True),
        (("q4_k_m", "f16"), {"verify": False}, ["q4_k_m"], True),
        (("q4_k_m", "q8_0"), {"verify": False, "imatrix": "auto"}, ["q8_0"], True),
        ((), {"budget": "5GiB"}, [], True),
    ],
)
def test_only_what_needs_no_other_file_is_quantized_beside(
    kinds: tuple[str, ...], options: dict[str, Any], beside: list[str], kept: bool
) -> None:
    config = ExportConfig(**options)
    assert (list(gguf.quantized_beside(kinds, config)), gguf.keeps_source(kinds, config)) == (beside, kept)
