"""Tiny random models of several architectures, each with the kind of tokenizer that its family has."""

import io
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent

# Rows of 256 are what the K types of quantization ask for.
SIZE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

INSTRUCTIONS = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '[INST] ' + message.content + ' [/INST]' -}}
{%- elif message.role == 'assistant' -%}
{{- ' ' + message.content + eos_token -}}
{%- else -%}
{{- raise_exception('only users and assistants') -}}
{%- endif -%}
{%- endfor -%}
"""

GEMMA_TURNS = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- raise_exception('System role not supported') -}}
{%- endif -%}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
{{- message.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""

PHI_TURNS = """{%- for message in messages -%}
{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""


def tiny(architecture: str, folder: Path) -> Path:
    """Write a random model of two layers and its tokenizer to ``folder``."""
    import torch
    import transformers

    kind, name, tied, special = {**MODELS, **REAL_MODELS}[architecture]
    vocabulary = TOKENIZERS[architecture](folder) if architecture in TOKENIZERS else _real(architecture, folder)
    whole: Any = transformers
    torch.manual_seed(0)
    options = {**SIZE, **special, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    config = whole.AutoConfig.for_model(kind, **options, **_ends(folder))
    model = getattr(whole, f"{name}ForCausalLM")(config)
    # Wider than the usual 0.02: no adapter could make one token much likelier than the others. Gemma widens them itself.
    for embeddings in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        torch.nn.init.normal_(embeddings, std=0.0625 if name.startswith("Gemma") else 0.125)
    model.save_pretrained(folder)
    return folder


def _ends(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer
    tokenizer = loader.from_pretrained(folder)
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _real(family: str, folder: Path) -> int:
    from vocabularies import real

    folder.mkdir(parents=True, exist_ok=True)
    return real(family, folder)


def smollm2(folder: Path) -> int:
    """Copy the tokenizer of SmolLM2; give the size of its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (TESTS / "assets" / "smollm2-tokenizer").iterdir():
        if path.name != "README.md":
            shutil.copy(path, folder / path.name)
    return 49152


def llama2(folder: Path) -> int:
    """A SentencePiece tokenizer as Llama 2 has it: it begins texts with a token, and the template writes that too."""
    return _sentencepiece(folder, INSTRUCTIONS, tokenizer_class="LlamaTokenizer")


def mistral(folder: Path) -> int:
    """The same with the marks of a turn as control tokens, as Mistral has them since its third version."""
    return _sentencepiece(folder, INSTRUCTIONS, control=("[INST]", "[/INST]"))


def gemma(folder: Path) -> int:
    """As Gemma has it: other numbers, no space before a text, and marks of a turn that are made special by hand."""
    return _sentencepiece(
        folder,
        GEMMA_TURNS,
        special=("<pad>", "<eos>", "<bos>", "<unk>"),
        marks=("<start_of_turn>", "<end_of_turn>"),
        space_before=False,
        tokenizer_class="GemmaTokenizer",
    )


def phi3(folder: Path) -> int:
    """As Phi-3 has it: no token begins a text; marks stand behind the vocabulary and swallow the white space behind them."""
    marks = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    return _sentencepiece(
        folder,
        PHI_TURNS,
        added=marks,
        swallowing=("</s>", *marks[1:]),
        eos=marks[0],
        begins=False,
        room=64,
    )


def _sentencepiece(
    folder: Path,
    template: str,
    *,
    special: tuple[str, str, str, str] = ("", "</s>", "<s>", "<unk>"),
    control: Sequence[str] = (),
    marks: Sequence[str] = (),
    added: Sequence[str] = (),
    swallowing: Sequence[str] = (),
    eos: str = "",
    space_before: bool = True,
    begins: bool = True,
    tokenizer_class: str = "PreTrainedTokenizerFast",
    room: int = 0,
) -> int:
    """Train a SentencePiece model on the example's data, and write it as the hub has it: twice, with a configuration.

    Args:
        special: To fill up, to end, to begin, and for what is unknown.
        control: Control tokens of the model itself.
        marks: Tokens of the model that only the configuration calls special.
        added: Tokens behind the model's.
        swallowing: Those that swallow the white space behind them.
        room: Rows of the matrix that no token has.
    """
    pad, end, begin, unknown = special
    pieces = _train(folder, special, control=control, marks=marks, space_before=space_before)
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    names = [*filter(None, special), *control, *marks]
    tokens = [(ids[name], name) for name in names] + [(len(ids) + number, name) for number, name in enumerate(added)]
    decoder = {
        str(number): {
            "content": name,
            "special": True,
            "normalized": False,
            "lstrip": False,
            "rstrip": name in swallowing,
            "single_word": False,
        }
        for number, name in tokens
    }
    (folder / "tokenizer.json").write_text(
        json.dumps(
            sentencepiece_json(
                pieces, decoder, unknown, (begin, ids[begin]) if begins else None, space_before=space_before
            )
        )
    )
    config = {
        "tokenizer_class": tokenizer_class,
        "add_bos_token": begins,
        "bos_token": begin,
        "eos_token": eos or end,
        "unk_token": unknown,
        "pad_token": pad or eos or end,
        "added_tokens_decoder": decoder,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(ids) + len(added) + room


def _train(
    folder: Path, special: Sequence[str], *, control: Sequence[str], marks: Sequence[str], space_before: bool
) -> list[tuple[str, float]]:
    """Write tokenizer.model, and give its pieces with their scores."""
    import sentencepiece

    names = dict(zip(("pad", "eos", "bos", "unk"), special, strict=True))
    order = [name for name in (("pad", "eos", "bos", "unk") if special[0] else ("unk", "bos", "eos")) if names[name]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=800,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=space_before,
        split_digits=True,
        control_symbols=list(control),
        user_defined_symbols=list(marks),
        minloglevel=2,
        **{f"{name}_id": order.index(name) if name in order else -1 for name in names},
        **{f"{name}_piece": names[name] for name in order},
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    read = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [(read.IdToPiece(number), read.GetScore(number)) for number in range(read.vocab_size())]


def _sentences() -> Iterable[str]:
    for line in (TESTS.parent / "examples" / "pottlesea.jsonl").read_text().splitlines():
        yield from (turn["content"] for turn in json.loads(line)["messages"])


def sentencepiece_json(
    pieces: Sequence[tuple[str, float]],
    added: dict[str, dict[str, Any]],
    unknown: str,
    begin: tuple[str, int] | None = None,
    *,
    space_before: bool = True,
) -> dict[str, Any]:
    """Write the pieces as tokenizer.json has them: a merge for every way to make a piece of two, the best first."""
    scores = dict(pieces)
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    merges = [
        (piece[:at], piece[at:])
        for piece, _ in sorted(pieces, key=lambda one: -one[1])
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores and not piece.startswith("<0x")
    ]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_before else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": [{"id": int(number), **token} for number, token in added.items()],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
        if space_before
        else spaces,
        "pre_tokenizer": None,
        "post_processor": begin
        and {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin[0]: {"id": begin[0], "ids": [begin[1]], "tokens": [begin[0]]}},
        },
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [list(pair) for pair in merges],
        },
    }


TOKENIZERS = {
    "llama-tied": smollm2,
    "llama-untied": llama2,
    "qwen3": smollm2,
    "mistral": mistral,
    "gemma2": gemma,
    "gemma3": gemma,
    "phi3": phi3,
}

MODELS: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "llama-tied": ("llama", "Llama", True, {}),
    "llama-untied": ("llama", "Llama", False, {}),
    "qwen3": ("qwen3", "Qwen3", True, {"head_dim": 64}),
    "mistral": ("mistral", "Mistral", False, {"sliding_window": None}),
    "gemma2": ("gemma2", "Gemma2", True, {"head_dim": 64, "query_pre_attn_scalar": 64}),
    "gemma3": ("gemma3_text", "Gemma3", True, {"head_dim": 64, "query_pre_attn_scalar": 64}),
    "phi3": ("phi3", "Phi3", False, {}),
}

# With the families' own vocabularies, which are large: narrow ones.
NARROW = {"hidden_size": 128, "intermediate_size": 256}
REAL_MODELS: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "qwen2.5": ("qwen2", "Qwen2", True, NARROW),
    "qwen3-0.6b": ("qwen3", "Qwen3", True, {**NARROW, "head_dim": 32}),
    "llama3.2": ("llama", "Llama", True, NARROW),
    "phi3.5": ("phi3", "Phi3", False, NARROW),
}
