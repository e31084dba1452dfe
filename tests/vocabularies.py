"""The real vocabularies and chat templates of well-known families, as folders of tokenizers.

The weights of these families are not at hand on every machine. What their words and turns are, llama.cpp's source release holds:
the one that `backprop.edges.llama_cpp_build` compiles, by its hash. What is made of it is kept in the cache.
"""

import json
import shutil
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tiny_models import sentencepiece_json

from backprop.edges import llama_cpp_build
from backprop.edges.demo_model import open_gguf
from backprop.edges.places import cache_dir

CACHE = cache_dir() / f"vocabularies-{llama_cpp_build.VERSION}-1"
"""The last number is of what is made here: another one makes it again."""

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Kinds of tokens, as in https://github.com/google/sentencepiece, sentencepiece_model.proto."""

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""What is merged within; Llama 3 takes up to three digits together."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a tokenizer comes from, and what its published folder says beside."""

    vocabulary: str
    template: str
    settings: Mapping[str, Any]
    digits: str = ""
    normalizer: str | None = None
    control: Mapping[int, str] = field(default_factory=dict)
    """Names that a later version gives to tokens that the first one had no use for."""
    text: Mapping[int, str] = field(default_factory=dict)
    """The same of tokens that are not special."""
    pieces: int = 0
    """Of `tokenizer.model`; what stands behind is added."""
    swallowing: Collection[str] = ()
    """Tokens that swallow the white space behind them."""


QWEN_CONTROL = dict(
    enumerate(
        [
            "<|object_ref_start|>",
            "<|object_ref_end|>",
            "<|box_start|>",
            "<|box_end|>",
            "<|quad_start|>",
            "<|quad_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|vision_pad|>",
            "<|image_pad|>",
            "<|video_pad|>",
        ],
        151646,
    )
)
QWEN_2_TEXT = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
)
QWEN_3_TEXT = f"{QWEN_2_TEXT} <tool_response> </tool_response> <think> </think>"
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LLAMA_3 = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "pad_token": "<|finetune_right_pad_id|>",
}
PHI_3 = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": False,
    "bos_token": "<s>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<unk>",
    "pad_token": "<|endoftext|>",
}
FAMILIES = {
    "qwen2.5": Family(
        vocabulary="qwen2",
        template="Qwen-Qwen2.5-7B-Instruct",
        settings=QWEN,
        normalizer="NFC",
        control=QWEN_CONTROL,
        text=dict(enumerate(QWEN_2_TEXT.split(), 151657)),
    ),
    "qwen3-0.6b": Family(
        vocabulary="qwen2",
        template="Qwen-Qwen3-0.6B",
        settings=QWEN,
        normalizer="NFC",
        control=QWEN_CONTROL,
        text=dict(enumerate(QWEN_3_TEXT.split(), 151657)),
    ),
    "llama3.2": Family(
        vocabulary="llama-bpe",
        template="meta-llama-Llama-3.2-3B-Instruct",
        settings=LLAMA_3,
        digits="{1,3}",
        control={128004: "<|finetune_right_pad_id|>", 128008: "<|eom_id|>", 128010: "<|python_tag|>"},
    ),
    "phi3.5": Family(
        vocabulary="phi-3",
        template="microsoft-Phi-3.5-mini-instruct",
        settings=PHI_3,
        pieces=32000,
        swallowing=("</s>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
    ),
}


def real(family: str, folder: Path) -> int:
    """Copy a family's tokenizer into ``folder``; give the size of its vocabulary."""
    kept = CACHE / family
    if not kept.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / family
            made.mkdir()
            _make(FAMILIES[family], made)
            made.replace(kept)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    return len(json.loads((folder / "kinds.json").read_text()))


def tokenized(family: str) -> Iterator[tuple[str, list[int]]]:
    """Give the texts of llama.cpp's own tests of a vocabulary, each with its tokens."""
    vocabulary = _release() / f"ggml-vocab-{FAMILIES[family].vocabulary}.gguf"
    texts = Path(f"{vocabulary}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = [[int(number) for number in line.split()] for line in Path(f"{vocabulary}.out").read_text().split("\n")]
    yield from zip(texts, ids, strict=True)


def _release() -> Path:
    """Give the folder with vocabularies and templates; download them if they are not there."""
    folder = CACHE / "release"
    if not folder.is_dir():
        wanted = tuple(
            name for one in FAMILIES.values() for name in (f"ggml-vocab-{one.vocabulary}.gguf", f"{one.template}.jinja")
        )
        CACHE.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=CACHE) as scratch:
            models = Path(scratch) / "models"
            models.mkdir()
            with tarfile.open(llama_cpp_build._fetch(Path(scratch))) as archive:
                for member in archive:
                    name = Path(member.name).name
                    content = archive.extractfile(member) if name.startswith(wanted) else None
                    if content is not None:
                        (models / name).write_bytes(content.read())
            models.replace(folder)
    return folder


def _make(family: Family, folder: Path) -> None:
    gguf = open_gguf(_release() / f"ggml-vocab-{family.vocabulary}.gguf")
    read = {key: found.contents() for key, found in gguf.fields.items() if key.startswith("tokenizer.ggml.")}
    named = {**family.control, **family.text}
    tokens = [named.get(number, token) for number, token in enumerate(read["tokenizer.ggml.tokens"])]
    kinds = [
        CONTROL if number in family.control else USER_DEFINED if number in family.text else kind
        for number, kind in enumerate(read["tokenizer.ggml.token_type"])
    ]
    added = {
        str(number): {
            "content": tokens[number],
            "special": kind == CONTROL,
            "rstrip": tokens[number] in family.swallowing,
            **dict.fromkeys(("normalized", "lstrip", "single_word"), False),
        }
        for number, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED)
    }
    if scores := read.get("tokenizer.ggml.scores"):
        pieces = list(zip(tokens, scores, kinds, strict=True))[: family.pieces]
        _write_pieces(pieces, folder / "tokenizer.model")
        whole = sentencepiece_json([(piece, score) for piece, score, _ in pieces], added, "<unk>")
    else:
        words = {
            token: number for number, token in enumerate(tokens) if kinds[number] != UNUSED and str(number) not in added
        }
        whole = _bpe(family, words, added, read["tokenizer.ggml.merges"])
    template = (_release() / f"{family.template}.jinja").read_text(encoding="utf-8")
    config = {**family.settings, "added_tokens_decoder": added, "chat_template": template}
    for name, content in (("tokenizer", whole), ("tokenizer_config", config), ("kinds", kinds)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def _bpe(family: Family, words: Mapping[str, int], added: Mapping[str, Any], merges: list[str]) -> dict[str, Any]:
    """Give `tokenizer.json` of a vocabulary of bytes."""
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut = {
        "type": "Split",
        "pattern": {"Regex": WORDS.replace("DIGITS", family.digits)},
        "behavior": "Isolated",
        "invert": False,
    }
    begin = family.settings.get("bos_token")
    number = next((int(number) for number, token in added.items() if token["content"] == begin), 0)
    begins = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [number], "tokens": [begin]}},
    }
    return {
        "version": "1.0",
        "added_tokens": [{"id": int(number), **token} for number, token in added.items()],
        "normalizer": family.normalizer and {"type": family.normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, as_bytes]},
        "post_processor": {"type": "Sequence", "processors": [as_bytes, begins]} if begin else as_bytes,
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "byte_fallback": False,
            "ignore_merges": bool(family.digits),
            "vocab": words,
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _write_pieces(pieces: list[tuple[str, float, int]], path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())
