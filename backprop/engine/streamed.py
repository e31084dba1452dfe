"""A base model's weights with an adapter merged in, one tensor at a time: no second copy on disk, little in memory.

Run as a program, it is llama.cpp's converter, which finds the weights in a folder merged as it reads them:
`python -m backprop.engine.streamed OPTIONS SCRIPT FOLDER --outfile …`, with what `write_options` wrote.
"""

import json
import os
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.edges import llama_cpp
from backprop.edges.model_files import TRANSPOSED
from backprop.engine.four_bit import Rounding
from backprop.engine.load import HfTokenizer
from backprop.engine.merge import OF_PEFT, WORDS, shapes_of, whole_words, wrap
from backprop.engine.plain_lora import not_finite, read_plain
from backprop.errors import ExportError

if TYPE_CHECKING:
    import torch


class Merger:
    """Merges the adapter into one weight at a time, to the numbers that PEFT's own arithmetic gives in float32.

    Args:
        folder: Of the base model: its configuration is read, and its weights only by name.
        adapter: Of PEFT, of any kind that it merges into weights.
        rounding: Of the base model's weights, before the adapter is added.

    Raises:
        ExportError: If the adapter does not belong to the base, or changes nothing.
    """

    def __init__(
        self, folder: Path, adapter: Path, *, rounding: Rounding | None = None, trust_remote_code: bool = False
    ) -> None:
        self._rounding = rounding
        self._rounded = rounding.weights if rounding else frozenset[str]()
        self._layers, self._saved = dict[str, Any](), dict[str, Any]()
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        plain = None if kind in TRANSPOSED else read_plain(adapter, shapes_in(folder))
        self._plain = plain or {}
        if plain is None:
            self._read_with_peft(folder, adapter, trust_remote_code=trust_remote_code)

    def _read_with_peft(self, folder: Path, adapter: Path, *, trust_remote_code: bool) -> None:
        wrapped = wrap(_hollow(folder, trust_remote_code=trust_remote_code), adapter, of=str(folder))
        from peft.tuners.lora import LoraLayer  # not before, which `wrap` has a reason for

        inside = dict(wrapped.get_base_model().named_modules())
        self._layers = {f"{name}.weight": module for name, module in inside.items() if isinstance(module, LoraLayer)}
        self._saved = {
            f"{name}.{key}": tensor
            for name, module in inside.items()
            if hasattr(module, "modules_to_save")
            for key, tensor in module.modules_to_save["default"].state_dict().items()
        }

    def changes(self, name: str) -> bool:
        """Say whether the adapter changes this weight, or training held it in 4 bits."""
        return any(name in these for these in (self._plain, self._layers, self._saved, self._rounded))

    def merge(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """Give ``weight`` with its part of the adapter, in float32."""
        from torch.nn import Parameter

        if name in self._saved:
            return self._saved[name].float()
        if self._rounding and name in self._rounded:
            weight = self._rounding.apply(weight)
        if name in self._plain:
            return self._plain[name].merged(name, weight)
        if name not in self._layers:
            return weight.float()
        layer = self._layers[name]
        base = layer.get_base_layer()
        hollow = base.weight
        base.weight = Parameter(weight.float(), requires_grad=False)
        try:
            layer.merge(safe_merge=True)
            return base.weight.data
        except ValueError as error:
            raise not_finite(name) from error
        finally:
            base.weight, layer.merged_adapters = hollow, []


def why_not(base: Path, adapter: Path, rounding: Rounding | None = None) -> str:
    """Say why the weights in ``base`` cannot be merged one by one; empty if they can. Reads names only."""
    weights, keys = shapes_in(base), set(shapes_in(adapter))
    biased = sorted(key for key in keys if ".lora_" in key and key.endswith(".bias"))
    if biased:
        return f"{biased[0]} changes a bias"
    brought = words_brought(weights, adapter)
    if brought:
        return f"{brought} is whole in the adapter"
    changed = {_weight_of(key) for key in keys}
    odd = sorted((changed | (rounding.weights if rounding else frozenset())) - set(weights))
    if odd:
        return f"{odd[0]} is stored under another name, or not by itself"
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    tied = any(one.get("tie_word_embeddings") for one in (settings, settings.get("text_config") or {}))
    tied = tied or not any(name.endswith("lm_head.weight") for name in weights)
    shared = sorted(name for name in changed if tied and not any(part.isdecimal() for part in name.split(".")))
    return f"{shared[0]} is shared" if shared else ""


def words_brought(shapes: Mapping[str, Sequence[int]], adapter: Path) -> str:
    """Name a weight of words that stands whole in an adapter without being trained so, or with other tokens than the base's; empty for none.

    Args:
        shapes: Of the base's weights.
    """
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    trained = tuple(settings.get("modules_to_save") or ())
    for name, shape in sorted(whole_words(adapter).items()):
        if not name.removesuffix(".weight").endswith(trained) or shape != shapes.get(name, shape):
            return name
    return ""


def _weight_of(key: str) -> str:
    """Give the weight that a tensor of PEFT's file belongs to, which may be a whole weight itself."""
    name = key.removeprefix(OF_PEFT)
    module, found, _ = name.partition(".lora_")
    return f"{module}.weight" if found else name


def _hollow(folder: Path, *, trust_remote_code: bool) -> Any:
    """Make the base model with the right shapes and names, and nothing behind them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    configs: Any = AutoConfig
    models: Any = AutoModelForCausalLM
    config = configs.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = models.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    zero = torch.zeros(())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(zero.expand(parameter.shape), requires_grad=False))
    return model


def weight_files(folder: Path) -> list[Path]:
    """Give the safetensors that transformers loads: those of the index, where there is one; a folder may hold others too."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def size_of(folder: Path) -> tuple[int, str]:
    """Count the weights in a folder's safetensors, and give the type that holds them all: 16 bits if they are all that."""
    from safetensors import safe_open

    count, kinds = 0, set[str]()
    for path in weight_files(folder):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                one = file.get_slice(name)
                count += prod(one.get_shape())
                kinds.add(one.get_dtype())
    return count, {"BF16": "bfloat16", "F16": "float16"}.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def shapes_in(folder: Path) -> dict[str, list[int]]:
    """Give the shapes of the weights in a folder's safetensors, by their names.

    Raises:
        ExportError: If a file is damaged.
    """
    return {name: shape for path in weight_files(folder) for name, shape in shapes_of(path).items()}


def words_in(folder: Path) -> int:
    """Count the weights of the largest matrix of words; 0 if they are stored under other names."""
    return max((prod(shape) for name, shape in shapes_in(folder).items() if name.endswith(WORDS)), default=0)


def lay_out(base: Path, tokenizer: HfTokenizer, folder: Path) -> None:
    """Write to ``folder`` all of a checkpoint but its weights: the configuration, and the tokenizer."""
    folder.mkdir(exist_ok=True)
    for path in base.iterdir():
        if path.name in ("config.json", "generation_config.json") or path.suffix == ".py":
            shutil.copyfile(path, folder / path.name)
    whole: Any = tokenizer.inner
    whole.save_pretrained(str(folder))


def link_weights(base: Path, folder: Path) -> None:
    """Let ``folder`` have the weights of the base model, for `main` to merge as they are read."""
    for path in (*weight_files(base), *base.glob("*.safetensors.index.json")):
        (folder / path.name).symlink_to(path.resolve())


def write_weights(base: Path, merger: Merger, folder: Path) -> None:
    """Write the merged weights in bfloat16, file by file as the base model has them."""
    import torch
    from safetensors.torch import load_file, save_file

    for path in weight_files(base):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            merged = merger.merge(name, tensor) if merger.changes(name) else tensor
            tensors[name] = merged.to(torch.bfloat16) if merged.is_floating_point() else merged
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
        # safetensors writes files that only their owner can read.
        (folder / path.name).chmod((folder / "config.json").stat().st_mode)
    for path in base.glob("*.safetensors.index.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n", encoding="utf-8")


def _merged_as_read(name: str, read: Callable[[], Any], merger: Merger) -> Callable[[], Any]:
    """Give what the converter calls for a weight: the same, merged once its data are wanted."""
    import torch
    from conversion.base import LazyTorchTensor  # pyright: ignore[reportMissingImports]

    def merged() -> Any:
        lazy: Any = read()
        meta = LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, tuple(lazy.shape))
        return LazyTorchTensor(meta=meta, args=(lazy,), func=partial(merger.merge, name))

    return merged


def _narrow_as_read(name: str, read: Callable[[], Any]) -> Callable[[], Any]:
    """Round the weights of words from bfloat16 to float16 as they are read: with float32 between, they would take thrice the room."""
    import torch
    from conversion.base import LazyTorchTensor  # pyright: ignore[reportMissingImports]

    def narrowed() -> Any:
        lazy: Any = read()
        if not name.endswith(WORDS) or lazy.dtype != torch.bfloat16:
            return lazy
        meta = LazyTorchTensor.meta_with_dtype_and_shape(torch.float16, tuple(lazy.shape))
        return LazyTorchTensor(meta=meta, args=(lazy,), func=torch.Tensor.half)

    return narrowed


def _narrow_with_torch(gguf: Any) -> None:
    """Let torch round weights to 16 bits, on all cores: numpy does 200 MB/s (docs/benchmarks.md)."""
    import numpy
    import torch

    quantize = gguf.quants.quantize

    def narrowed(data: Any) -> Any:
        return torch.from_numpy(data).to(torch.float16).numpy()

    def quantize_fast(data: Any, qtype: Any) -> Any:
        if qtype != gguf.GGMLQuantizationType.F16 or not isinstance(data, gguf.LazyNumpyTensor):
            return quantize(data, qtype)
        meta = gguf.LazyNumpyTensor.meta_with_dtype_and_shape(numpy.float16, data.shape)
        return gguf.LazyNumpyTensor(meta=meta, args=(data,), func=narrowed)

    gguf.quants.quantize = quantize_fast


def write_options(
    path: Path,
    base: Path,
    adapter: Path | None,
    *,
    rounding: Rounding | None,
    trust_remote_code: bool,
    quantized: Mapping[str, Path] | None = None,
    keep: bool = True,
) -> None:
    """Write down for `main` what is to be merged, and which other files are to be made beside one of 16 bits.

    Args:
        adapter: None if the weights are merged already.
        quantized: Files to be quantized from the 16-bit one, by their types.
        keep: Whether the 16-bit file is to be written too.
    """
    rounded = {"dtype": rounding.dtype, "weights": sorted(rounding.weights)} if rounding else None
    told = {"base": str(base), "rounding": rounded, "trust_remote_code": trust_remote_code, "keep": keep}
    told["adapter"] = adapter and str(adapter)
    told["quantized"] = {kind: str(made) for kind, made in (quantized or {}).items()}
    path.write_text(json.dumps(told), encoding="utf-8")


def merger_of(told: Mapping[str, Any]) -> Merger | None:
    """Make the merger of what `write_options` wrote; None if the weights are merged already."""
    if told["adapter"] is None:
        return None
    rounded = told["rounding"]
    rounding = Rounding(weights=frozenset(rounded["weights"]), dtype=rounded["dtype"]) if rounded else None
    trust = bool(told["trust_remote_code"])
    return Merger(Path(told["base"]), Path(told["adapter"]), rounding=rounding, trust_remote_code=trust)


def main() -> None:
    """Run the converter script on the rest of the arguments, with an adapter in every weight that it reads.

    What it is to read may come later, whole; until then all is made ready.
    """
    options, *sys.argv = sys.argv[1:]
    home, to_f16 = Path(sys.argv[0]).parent, "f16" in sys.argv
    sys.path[:0] = [str(home), str(home / "gguf-py")]
    import gguf
    from conversion.base import ModelBase  # pyright: ignore[reportMissingImports]

    from backprop.engine import quantized

    told: dict[str, Any] = json.loads(Path(options).read_text(encoding="utf-8"))
    _narrow_with_torch(gguf)
    wanted = {kind: Path(path) for kind, path in told["quantized"].items()} if to_f16 else {}
    quantized.write_beside(gguf, wanted, keep=told["keep"] or not to_f16)
    merger = merger_of(told)
    if merger is not None:
        _merge_as_read(ModelBase, merger, to_f16=to_f16)
    _wait_for(Path(sys.argv[1]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except ExportError as error:
        # Whoever waits for this quotes its last words.
        sys.exit(f"{error.message}{llama_cpp.HINT}{error.hint}" if error.hint else error.message)


def _wait_for(folder: Path) -> None:
    parent = os.getppid()
    while not folder.exists():
        if os.getppid() != parent:
            sys.exit("nobody waits for this any more")
        time.sleep(0.02)


def _merge_as_read(models: Any, merger: Merger, *, to_f16: bool) -> None:
    """Let all of the converter's models find the adapter in every weight that they read."""
    index = models.index_tensors

    def index_merged(model: Any, *args: Any, **options: Any) -> Any:
        keep = model.filter_tensors

        def filter_merged(item: tuple[str, Callable[[], Any]]) -> Any:
            name, read = item
            if merger.changes(name):
                return keep((name, _merged_as_read(name, read, merger)))
            return keep((name, _narrow_as_read(name, read) if to_f16 else read))

        model.filter_tensors = filter_merged
        try:
            return index(model, *args, **options)
        finally:
            del model.filter_tensors

    models.index_tensors = index_merged


if __name__ == "__main__":
    main()
