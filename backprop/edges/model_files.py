"""Models and adapters come from strangers: what is refused of their files before any library reads them."""

import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from backprop.errors import ModelError

CONFIG_MOST_BYTES = 16 * 2**20
# Of the numbers of a configuration, those by which memory is taken, with many times what any model has. Others are as large
# as they like: gradients that are not clipped, or infinite limits of a step in time.
MOST = {
    re.compile(r"(n|num)_(\w+_)?layers?|(en|de)coder_layers"): 10_000,
    re.compile(r"(\w+_)?(n|num)_(\w+_)?(heads?|experts)"): 2**20,
    re.compile(r"(\w+_)?(size|dim|rank)|n_embd|(max|n)_position(s|_embeddings)"): 2**31,
}
RANK_MOST = 2**16
NESTING_MOST = 100  # more than any configuration has, and little enough for the libraries that read it after us
INDEX = "model.safetensors.index.json"
TRANSPOSED = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"))
"""Models whose linear weights transformers holds the other way round (`Conv1D`): PEFT sees that."""
# Kinds of adapters that bring no weights to merge, and whose settings make PEFT load other models and tokenizers.
OTHER_ADAPTERS = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT"),
    *("XLORA", "POLY"),
)
# By these, PEFT imports a module of the adapter's choice, or makes as many layers as it says.
REFUSED_SETTINGS = ("megatron_config", "layer_replication")
# What PEFT takes for regular expressions, which it tries on the name of each layer: strings, and the keys of objects; also
# what stands in the lists of the last two.
PATTERNS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save")
# On a name of 60 letters, five repetitions can be laid out in some million ways, and many more without end.
REPETITIONS_MOST = 5
HINT = "use a model from a source that you trust"


def check_model(folder: Path) -> None:
    """Refuse a model folder whose files are no plain files, whose weights lie elsewhere or are quantized, or whose numbers are absurd.

    Raises:
        ModelError: Saying what.
    """
    for path in folder.iterdir():
        if path.exists() and not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise ModelError(f"`{path}` is no plain file", hint=HINT)
    settings = read_object(folder / "config.json")
    if _quantized(settings) and not _by_bitsandbytes(settings):
        # Neither the estimates of memory nor llama.cpp's converter know these.
        raise ModelError(
            f"the weights in `{folder}` are quantized already",
            hint="give the model of 16 bits that they were made from (say, a name without `-AWQ`): `--method qlora` "
            "holds that in 4 bits",
        )
    for name, number in _numbers(settings):
        most = next((most for names, most in MOST.items() if names.fullmatch(name)), None)
        if most is not None and not abs(number) <= most:
            raise ModelError(f"`{folder / 'config.json'}` says {name}: {number}, and {most} is the most", hint=HINT)
    if (folder / INDEX).is_file():
        shards = read_object(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise ModelError(f"`{folder / INDEX}` names no weights", hint="fetch it again")
        for shard in set(map(str, cast(Mapping[str, object], shards).values())):
            if shard != Path(shard).name or not shard.endswith(".safetensors") or "\\" in shard:
                raise ModelError(f"`{folder / INDEX}` names weights outside of the folder: `{shard}`", hint=HINT)


def is_packed(folder: Path) -> bool:
    """Say whether bitsandbytes stored the weights in 4 or 8 bits."""
    return _by_bitsandbytes(read_object(folder / "config.json"))


def _by_bitsandbytes(settings: Mapping[str, Any]) -> bool:
    how = _quantized(settings)
    if not isinstance(how, dict):
        return False
    named = cast(Mapping[str, object], how)
    loads = named.get("load_in_4bit") or named.get("load_in_8bit")  # older ones do not say by what
    return named.get("quant_method", "bitsandbytes" if loads else "") == "bitsandbytes"


def _quantized(settings: Mapping[str, Any]) -> object:
    """Give how a model's weights are quantized, which may stand with those of its text; nothing if they are not."""
    text = settings.get("text_config")
    of_text = cast(Mapping[str, object], text).get("quantization_config") if isinstance(text, dict) else None
    return settings.get("quantization_config") or of_text


def lacks_weights(folder: Path) -> bool:
    """Say whether a folder has no weights at all, or not all that its index names."""
    shards = read_object(folder / INDEX).get("weight_map") if (folder / INDEX).is_file() else None
    if isinstance(shards, dict):
        return not all((folder / str(name)).is_file() for name in cast(Mapping[str, object], shards).values())
    return not any(path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt") for path in folder.iterdir())


def check_code(folder: Path) -> None:
    """Refuse a model whose code stands in another repository, from which transformers would take what is there today.

    Raises:
        ModelError: Naming it.
    """
    for name in ("config.json", "tokenizer_config.json"):
        named = json.dumps(read_object(folder / name).get("auto_map")) if (folder / name).is_file() else ""
        if "--" in named:
            raise ModelError(
                f"`{folder / name}` takes code from another repository: {named[:200]}",
                hint="copy that code into a folder with the model, and name it there without `--`",
            )


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that would make PEFT do more than add it to a model.

    Raises:
        ModelError: Saying what.
    """
    path = folder / "adapter_config.json"
    settings = read_object(path)
    kind = str(settings.get("peft_type", "")).upper()
    if kind in OTHER_ADAPTERS:
        raise ModelError(f"`{path}` is of the kind {kind}, which cannot be merged", hint="train a LoRA adapter")
    asked = next((name for name in REFUSED_SETTINGS if settings.get(name)), None)
    if asked is not None:
        raise ModelError(f"`{path}` sets `{asked}`, which is not supported", hint="train a plain LoRA adapter")
    for name in PATTERNS:
        named = settings.get(name)
        regular = isinstance(named, dict) or (isinstance(named, list) and name in PATTERNS[-2:])
        for pattern in [named] if isinstance(named, str) else cast(Iterable[object], named) if regular else ():
            if not _ends_soon(str(pattern)):
                raise ModelError(
                    f"`{path}` says {name}: `{pattern!s:.80}`, which may take for ever to search for",
                    hint="name the layers in a list",
                )
    for name, number in _numbers({key: settings.get(key) for key in ("r", "rank_pattern", "lora_alpha")}):
        if abs(number) > RANK_MOST:
            raise ModelError(f"`{path}` says {name}: {number}, and {RANK_MOST} is the most", hint=HINT)


def _ends_soon(pattern: str) -> bool:
    """Say whether a regular expression repeats little, and no groups, within which there could be more to repeat or choose."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    atoms = re.sub(r"\\.|\[\^?\]?(\\.|[^\]\\])*\]", "a", pattern, flags=re.DOTALL)
    plain = re.sub(r"\(\?([:=!]|<[=!]|P<\w+>)", "(", atoms)
    repeated = re.findall(r"(.)(?:[*+?]|\{[\d,]+\})[?+]?", plain)
    return "(?" not in plain and len(repeated) <= REPETITIONS_MOST and not re.search(r"\)[*+{]", plain)


def read_object(path: Path) -> Mapping[str, Any]:
    """Read a JSON object of a reasonable size.

    Raises:
        ModelError: If it is none.
    """
    try:
        if path.stat().st_size > CONFIG_MOST_BYTES and path.name != INDEX:
            raise ModelError(f"`{path}` is larger than {CONFIG_MOST_BYTES // 2**20} MiB", hint=HINT)
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"`{path}` is no JSON: {error}", hint="fetch it again") from error
    except OSError as error:
        raise ModelError(f"`{path}` cannot be read: {error.strerror}", hint="give a complete folder") from error
    if not isinstance(found, dict):
        raise ModelError(f"`{path}` is no JSON object", hint="fetch it again")
    if _is_deep(cast(object, found)):
        raise ModelError(f"`{path}` is nested more than {NESTING_MOST} levels deep", hint=HINT)
    return cast(Mapping[str, Any], found)


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(NESTING_MOST):
        level = [inner for outer in level for inner in _inside(outer)]
    return bool(level)


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return cast(Mapping[str, object], value).values()
    return cast(list[object], value) if isinstance(value, list) else ()


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in cast(Mapping[str, object], value).items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in cast(list[object], value):
            yield from _numbers(inner, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
