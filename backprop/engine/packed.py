"""A base whose weights are stored in 4 or 8 bits by bitsandbytes, as the numbers of 16 bits that they stand for.

The format: `QuantState.as_dict(packed=True)` and `Linear8bitLt` of bitsandbytes 0.50, which transformers stores beside each weight.
Read here without bitsandbytes, which trusts what stands in the file.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.edges.model_files import INDEX, TRANSPOSED, read_object
from backprop.errors import DiskError, ModelError

if TYPE_CHECKING:
    import torch

FORM = b"1"
"""Of what `unpack` writes: another one where that changes."""
FOUR_BIT = ".quant_state.bitsandbytes__"
EIGHT_BIT = ".SCB"
ORDER = ".weight_format"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ORDER, EIGHT_BIT)
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "README.md")
SHARD_BYTES = 2**30
BLOCKS = range(1, 4097)
STATE_MOST_BYTES = 2**12
# bitsandbytes' own, where 1/127 would round otherwise.
OF_EIGHT_BITS = 7.874015718698502e-3


def key_of(packed: Path, sha256: str) -> str:
    """Name what `unpack` makes of a folder: by the fingerprint of its weights, and all else that is copied."""
    digest = hashlib.sha256(FORM + sha256.encode())
    for name, content in _copied(packed).items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def unpack(packed: Path, target: Path) -> None:
    """Write the model in ``packed`` to the new folder ``target``, a shard at a time.

    A shard is in memory at once, and about ten bytes for each number of the weight in hand.

    Raises:
        ModelError: If the weights do not fit together.
        DiskError: If there is too little room.
    """
    target.mkdir()
    for name, content in _copied(packed).items():
        (target / name).write_bytes(content)
    settings = read_object(packed / "config.json")
    plain = {key: value for key, value in settings.items() if key != "quantization_config"}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    (target / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")
    with _Weights(packed, settings) as weights:
        _check_room(weights.num_bytes(), target)
        _write_shards(weights, target)


def _copied(packed: Path) -> Mapping[str, bytes]:
    paths = {path for pattern in COPIED for path in packed.glob(pattern) if path.is_file()}
    try:
        return {path.name: path.read_bytes() for path in sorted(paths) if path.name not in ("config.json", INDEX)}
    except OSError as error:
        raise ModelError(f"`{error.filename}` cannot be read: {error.strerror}", hint="mend its owner") from error


def _write_shards(weights: "_Weights", target: Path) -> None:
    from safetensors.torch import save_file

    shard: dict[str, torch.Tensor] = {}
    shard_of: dict[str, str] = {}

    def write() -> None:
        name = f"model-{len(set(shard_of.values())) + 1:05}.safetensors"
        save_file(shard, target / name, metadata={"format": "pt"})
        # safetensors writes files that only their owner can read.
        (target / name).chmod((target / "config.json").stat().st_mode)
        shard_of.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in weights.unpacked():
        if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        shard[name] = tensor
    write()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}), encoding="utf-8")


def _check_room(need: int, target: Path) -> None:
    free = shutil.disk_usage(target).free
    if need > free:
        raise DiskError(
            f"the weights in 16 bits take {need / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB free in `{target.parent}`",
            hint="set `XDG_CACHE_HOME` to a larger disk",
        )


class _Weights:
    """The tensors of a model's files, whichever of them a weight's parts are in.

    Raises:
        ModelError: If one is missing, or they cannot be read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from safetensors import SafetensorError, safe_open

        self._folder, self._settings = folder, settings
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path, names in self._listed().items():
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise self._damaged(f"`{path.name}` cannot be read: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))
            lost = sorted(names - set(file.keys()))
            if lost:
                raise self._damaged(f"`{path.name}` has no `{lost[0]}`")
        self._states = {name.partition(FOUR_BIT)[0]: name for name in self._files if FOUR_BIT in name}
        self._names = [name for name in self._files if FOUR_BIT not in name and not name.endswith(PARTS)]
        lost = sorted(set(self._states) - set(self._names))
        if lost:
            raise self._damaged(f"there is no `{lost[0]}`")

    def _listed(self) -> Mapping[Path, set[str]]:
        """Give the files, as transformers chooses them, with the names that they must have."""
        if (self._folder / "model.safetensors").is_file() or not (self._folder / INDEX).is_file():
            return {self._folder / "model.safetensors": set()}
        shards: Mapping[str, str] = read_object(self._folder / INDEX)["weight_map"]
        return {
            self._folder / shard: {name for name, of in shards.items() if of == shard} for shard in set(shards.values())
        }

    def __enter__(self) -> "_Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def num_bytes(self) -> int:
        """Give what all weights take; those that are not packed, as they are."""
        total = 0
        for name in self._names:
            stored = self._files[name].get_slice(name)
            if name in self._states:
                state = self._state(name)
                total += prod(state["shape"]) * (4 if state["dtype"] == "float32" else 2)
            else:
                total += prod(stored.get_shape()) * {"F32": 4, "F64": 8}.get(stored.get_dtype(), 2)
        return total

    def unpacked(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Give each weight by its name."""
        turned = self._settings.get("model_type") in TRANSPOSED  # they hold their layers as bitsandbytes does not
        for name in self._names:
            packed = True
            if name in self._states:
                found = self._of_four_bits(name)
            elif name.removesuffix(".weight") + EIGHT_BIT in self._files:
                found = self._of_eight_bits(name)
            else:
                packed, found = False, self._read(name)
                self._check(name, found.is_floating_point() or not name.endswith(".weight"))
            yield name, found.T.contiguous() if packed and turned else found

    def _read(self, name: str) -> "torch.Tensor":
        if name not in self._files:
            raise self._damaged(f"there is no `{name}`")
        found: torch.Tensor = self._files[name].get_tensor(name)
        return found

    def _state(self, name: str) -> Mapping[str, Any]:
        """Read how a weight of 4 bits is stored."""
        stored = self._files[name].get_slice(name)
        stored_bytes = prod(stored.get_shape()) * {"U8": 1, "I8": 1, "F32": 4}.get(stored.get_dtype(), 2)
        try:
            told = self._read(self._states[name])
            self._check(name, told.numel() <= STATE_MOST_BYTES)
            state = json.loads(bytes(told.tolist()))
            shape, nested = state["shape"], "nested_blocksize" in state
            self._check(
                name,
                state["dtype"] in ("bfloat16", "float16", "float32"),
                len(shape) == 2,
                all(type(size) is int and size > 0 for size in shape),
                ceil(prod(shape) / 2) == stored_bytes,
                type(state["blocksize"]) is int and state["blocksize"] in BLOCKS,
                not nested or (type(state["nested_blocksize"]) is int and state["nested_blocksize"] in BLOCKS),
                not nested or isinstance(state["nested_offset"], float | int),
            )
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            raise self._damaged(f"what is said of `{name}` cannot be: {error}") from error
        return state

    def _of_four_bits(self, name: str) -> "torch.Tensor":
        import torch

        state, packed = self._state(name), self._read(name).contiguous().view(torch.uint8)
        scales = self._read(f"{name}.absmax")
        if "nested_blocksize" in state:
            codes = self._codes(f"{name}.nested_quant_map", 256)
            self._check(name, scales.dtype == torch.uint8)
            outer = self._read(f"{name}.nested_absmax")
            scales = self._scaled(name, codes[scales.flatten().int()], outer, state["nested_blocksize"])
            scales += torch.tensor(state["nested_offset"], dtype=torch.float32)
        codes = self._codes(f"{name}.quant_map", 16)
        # Of each byte the higher half is first.
        pairs = torch.cartesian_prod(codes, codes)
        values = pairs[packed.flatten().int()].flatten()[: prod(state["shape"])]
        return (
            self._scaled(name, values, scales, state["blocksize"])
            .to(getattr(torch, state["dtype"]))
            .view(state["shape"])
        )

    def _codes(self, name: str, number: int) -> "torch.Tensor":
        found = self._read(name)
        self._check(name, found.shape == (number,), found.is_floating_point())
        return found.float()

    def _scaled(self, name: str, values: "torch.Tensor", scales: "torch.Tensor", block: int) -> "torch.Tensor":
        """Multiply each block of numbers with its own scale."""
        import torch

        self._check(name, scales.numel() == ceil(values.numel() / block), scales.is_floating_point())
        length, rest = values.numel(), -values.numel() % block
        whole = torch.nn.functional.pad(values, (0, rest)) if rest else values
        return whole.view(-1, block).mul_(scales.float().view(-1, 1)).flatten()[:length]

    def _of_eight_bits(self, name: str) -> "torch.Tensor":
        import torch

        stem = name.removesuffix(".weight")
        packed, largest = self._read(name), self._read(stem + EIGHT_BIT)
        by_rows = stem + ORDER not in self._files or not self._read(stem + ORDER).any()
        self._check(name, packed.dtype == torch.int8, packed.dim() == 2, largest.shape == packed.shape[:1], by_rows)
        return (packed.float() * largest.float().view(-1, 1) * OF_EIGHT_BITS).to(self._dtype())

    def _dtype(self) -> "torch.dtype":
        """Give the type that the model computes in, as its configuration has it."""
        import torch

        text = self._settings.get("text_config")
        both = [self._settings, *([text] if isinstance(text, dict) else [])]
        named = {str(one.get("dtype") or one.get("torch_dtype")) for one in both}
        return torch.float16 if "float16" in named else torch.bfloat16

    def _check(self, name: str, *facts: bool) -> None:
        if not all(facts):
            raise self._damaged(f"the parts of `{name}` do not fit together")

    def _damaged(self, why: str) -> ModelError:
        return ModelError(f"the weights in `{self._folder}` are damaged: {why}", hint="fetch them again")
