"""A base whose weights are stored in 4 or 8 bits by bitsandbytes, as the numbers of 16 bits that they stand for.

The format: `QuantState.as_dict(packed=True)` and `Linear8bitLt` of bitsandbytes 0.50, which transformers stores beside each weight.
Read here without bitsandbytes, which trusts what stands in the file.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.edges.model_files import INDEX, read_object
from backprop.errors import DiskError, ModelError

if TYPE_CHECKING:
    import torch

FOUR_BIT = ".quant_state.bitsandbytes__"
EIGHT_BIT = ".SCB"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".weight_format", EIGHT_BIT)
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "README.md")
SHARD_BYTES = 2**30
LARGEST_INT8 = 127


def unpack(packed: Path, target: Path) -> None:
    """Write the model in ``packed``, whose weights may be left out, to the new folder ``target``; a shard is in memory at once.

    Raises:
        ModelError: If the weights do not fit together.
        DiskError: If there is too little room.
    """
    target.mkdir()
    for pattern in COPIED:
        for path in packed.glob(pattern):
            if path.name not in ("config.json", INDEX):
                shutil.copyfile(path, target / path.name)
    settings = {
        key: value for key, value in read_object(packed / "config.json").items() if key != "quantization_config"
    }
    (target / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    with _Weights(packed) as weights:
        if weights.names:
            _check_room(weights, target)
            _write_shards(weights, target)


def _write_shards(weights: "_Weights", target: Path) -> None:
    from safetensors.torch import save_file

    shard: dict[str, torch.Tensor] = {}
    shard_of: dict[str, str] = {}

    def write() -> None:
        name = f"model-{len(set(shard_of.values())) + 1:05}.safetensors"
        save_file(shard, target / name, metadata={"format": "pt"})
        shard_of.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in weights.unpacked():
        if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        shard[name] = tensor
    write()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}), encoding="utf-8")


def _check_room(weights: "_Weights", target: Path) -> None:
    need, free = weights.num_bytes(), shutil.disk_usage(target).free
    if need > free:
        raise DiskError(
            f"the weights in 16 bits take {need / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB free in `{target.parent}`",
            hint="set `XDG_CACHE_HOME` to a larger disk",
        )


class _Weights:
    """The tensors of a model's files, whichever of them a weight's parts are in."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise self._damaged(f"`{path.name}` cannot be read: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))
        self._states = {name.partition(FOUR_BIT)[0]: name for name in self._files if FOUR_BIT in name}
        self.names = [name for name in self._files if FOUR_BIT not in name and not name.endswith(PARTS)]

    def __enter__(self) -> "_Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def num_bytes(self) -> int:
        """Give what all weights take in 16 bits; those that are not packed, as they are."""
        total = 0
        for name in self.names:
            stored = self._files[name].get_slice(name)
            if name in self._states:
                total += 2 * prod(self._state(name)["shape"])
            else:
                total += prod(stored.get_shape()) * {"F32": 4, "F64": 8}.get(stored.get_dtype(), 2)
        return total

    def unpacked(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Give each weight by its name."""
        for name in self.names:
            scales = name.removesuffix(".weight") + EIGHT_BIT
            if name in self._states:
                yield name, self._of_four_bits(name)
            elif scales in self._files:
                yield name, self._of_eight_bits(name, scales)
            else:
                yield name, self._read(name)

    def _read(self, name: str) -> "torch.Tensor":
        if name not in self._files:
            raise self._damaged(f"it has no `{name}`")
        found: torch.Tensor = self._files[name].get_tensor(name)
        return found

    def _state(self, name: str) -> Mapping[str, Any]:
        try:
            state = json.loads(bytes(self._read(self._states[name]).tolist()))
            sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
            if all(isinstance(size, int) and size > 0 for size in sizes) and state["dtype"] in (
                "bfloat16",
                "float16",
                "float32",
            ):
                return state
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise self._damaged(f"what is said of `{name}` cannot be")

    def _of_four_bits(self, name: str) -> "torch.Tensor":
        import torch

        state, packed = self._state(name), self._read(name)
        length, block = prod(state["shape"]), state["blocksize"]
        scales = self._read(f"{name}.absmax")
        if "nested_blocksize" in state:
            codes, outer = self._read(f"{name}.nested_quant_map"), self._read(f"{name}.nested_absmax")
            self._check(name, scales.dtype == torch.uint8, codes.numel() == 256)
            offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
            scales = self._scaled(name, codes[scales.int()], outer, state["nested_blocksize"]) + offset
        codes = self._read(f"{name}.quant_map").float()
        self._check(name, packed.dtype == torch.uint8, packed.numel() == ceil(length / 2), codes.numel() == 16)
        # Of each byte the higher half is first.
        pairs = torch.cartesian_prod(codes, codes)
        values = pairs[packed.flatten().int()].flatten()[:length]
        return self._scaled(name, values, scales, block).to(getattr(torch, state["dtype"])).view(state["shape"])

    def _scaled(self, name: str, values: "torch.Tensor", scales: "torch.Tensor", block: int) -> "torch.Tensor":
        """Multiply each block of numbers with its own scale."""
        import torch

        self._check(name, scales.numel() == ceil(values.numel() / block), scales.is_floating_point())
        length, rest = values.numel(), -values.numel() % block
        whole = torch.nn.functional.pad(values, (0, rest)) if rest else values
        return whole.view(-1, block).mul_(scales.float().view(-1, 1)).flatten()[:length]

    def _of_eight_bits(self, name: str, scales: str) -> "torch.Tensor":
        import torch

        packed, largest = self._read(name), self._read(scales)
        self._check(name, packed.dtype == torch.int8, packed.dim() == 2, largest.shape == packed.shape[:1])
        return (packed.float() * (largest.float().view(-1, 1) / LARGEST_INT8)).to(self._dtype())

    def _dtype(self) -> "torch.dtype":
        """Give the type that the model computes in, as its configuration has it."""
        import torch

        settings = read_object(self._folder / "config.json")
        named = str(settings.get("dtype") or settings.get("torch_dtype"))
        return torch.float16 if named == "float16" else torch.bfloat16

    def _check(self, name: str, *facts: bool) -> None:
        if not all(facts):
            raise self._damaged(f"the parts of `{name}` do not fit together")

    def _damaged(self, why: str) -> ModelError:
        return ModelError(f"the weights in `{self._folder}` are damaged: {why}", hint="fetch them again")
