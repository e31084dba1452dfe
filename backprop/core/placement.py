"""Where a model is held that is only asked, and in what."""

from collections.abc import Sequence
from dataclasses import dataclass

# Beside the weights: what one text of 256 tokens needs on its way through, the converter at work, CUDA's own needs.
SHARE_FOR_WORK = 0.3
BYTES_FOR_WORK = 2**30
FLOAT32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A device and a type for weights."""

    device: str
    dtype: str


def place(num_weights: int, *, stored: str, gpu_free_bytes: Sequence[int], memory_free_bytes: int) -> Placement | None:
    """Choose the fastest place that has room for all weights in float32, else in the type that they are stored in.

    Args:
        stored: `bfloat16`, `float16` or `float32`.
        gpu_free_bytes: Of each GPU.

    Returns:
        None if there is room nowhere.
    """
    for device, room in (("cuda", max(gpu_free_bytes, default=0)), ("cpu", memory_free_bytes)):
        for dtype in dict.fromkeys(("float32", stored)):
            if needed_bytes(num_weights, dtype) <= room:
                return Placement(device=device, dtype=dtype)
    return None


def needed_bytes(num_weights: int, dtype: str) -> int:
    """Estimate the memory that a model needs to be asked."""
    width = FLOAT32 if dtype == "float32" else FLOAT32 // 2
    return int(num_weights * width * (1 + SHARE_FOR_WORK)) + BYTES_FOR_WORK
