"""`--budget`: of the types whose file is not too large, the one that predicts most like the 16-bit file."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from backprop.config import NEEDS_IMATRIX, ExportConfig, Quantization
from backprop.edges import llama_cpp, llama_tools
from backprop.engine import streamed
from backprop.errors import UsageError
from backprop.events import Phase, Sink, Tried
from backprop.verbs import importance
from backprop.verbs.source import Adapter
from backprop.verbs.verify import Verifier

UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}
MAY_CHOOSE: Sequence[str] = [kind for kind in get_args(Quantization) if kind not in ("f32", "bf16")]
WORTH_TRYING = 2 / 3
"""Of the largest file that fits: types of smaller ones lose more, and are not made."""
FEWEST_BITS = 1.56
"""Of a weight: iq1_s (llama-quantize --help)."""


def bytes_of(budget: str) -> int:
    """Give the bytes of a size like 5GiB or 4500MB, whose form `ExportConfig` has checked."""
    unit = next(unit for unit in UNITS if budget.endswith(unit))
    return int(float(budget.removesuffix(unit)) * UNITS[unit])


def refuse_early(adapter: Adapter, config: ExportConfig) -> None:
    """See that some type may fit, and that it can be told which, before any work.

    Raises:
        UsageError: If none can.
        ToolError: If llama.cpp's programs are missing.
    """
    if config.budget is None:
        return
    llama_tools.tool("quantize")
    least = int(streamed.size_of(Path(adapter.base))[0] * FEWEST_BITS / 8)
    if bytes_of(config.budget) < least:
        raise _too_small(config, "any file of this model", least)


def to_make(config: ExportConfig, source: Path) -> Sequence[str]:
    """Name the types that may have to be made; none if there is no budget, or the 16-bit file fits it."""
    if config.budget is None or source.stat().st_size <= bytes_of(config.budget):
        return ()
    kinds = [kind for kind in MAY_CHOOSE if kind not in llama_cpp.CONVERTED]
    return [kind for kind in kinds if config.imatrix is not None or kind not in NEEDS_IMATRIX]


def choose(config: ExportConfig, source: Path, verifier: Verifier, imatrix: Path | None, say: Sink) -> tuple[str, Path]:
    """Make and measure the types that fit, beside ``source``, and give the nearest one and its file.

    Args:
        source: The 16-bit file.
        verifier: Knows the logits of ``source``.

    Raises:
        UsageError: If no file fits.
    """
    budget = bytes_of(config.budget or "")
    if source.stat().st_size <= budget:
        return "f16", source
    kinds = _fitting(source, budget, config, imatrix)
    say(Phase(name=f"trying what fits {config.budget}: {', '.join(kinds)}"))
    best, least = kinds[0], float("inf")
    for kind in kinds:
        made = _tried(kind, source)
        quantize(kind, source, made, imatrix=imatrix if importance.matters(kind, config) else None)
        found = verifier.measure(made)
        size = made.stat().st_size
        say(Tried(quantization=kind, size_bytes=size, mean_kl=found.mean_kl, p99_kl=found.p99_kl, top1=found.top1))
        worse = kind
        if found.mean_kl < least and size <= budget:
            best, least, worse = kind, found.mean_kl, best
        if worse != best:
            _tried(worse, source).unlink()
    return best, _tried(best, source)


def _tried(kind: str, source: Path) -> Path:
    return source.with_name(f"tried-{kind}.gguf")


def quantize(kind: str, source: Path, target: Path, *, imatrix: Path | None) -> None:
    """Quantize the 16-bit file, by an importance matrix if there is one."""
    if imatrix is None:
        llama_cpp.quantize(source, target, quantization=kind)
    else:
        llama_tools.quantize(source, target, quantization=kind, imatrix=imatrix)


def _fitting(source: Path, budget: int, config: ExportConfig, imatrix: Path | None) -> Sequence[str]:
    """Name the types whose file fits and that are worth trying, the largest first."""
    kinds = to_make(config, source)
    by = {kind: imatrix if importance.matters(kind, config) else None for kind in kinds}
    sizes = {kind: llama_tools.size_as(kind, source, imatrix=by[kind]) for kind in kinds}
    fitting = {kind: size for kind, size in sizes.items() if size <= budget}
    if not fitting:
        smallest = min(sizes, key=lambda kind: sizes[kind])
        raise _too_small(config, smallest, sizes[smallest])
    enough = WORTH_TRYING * max(fitting.values())
    return sorted((kind for kind, size in fitting.items() if size >= enough), key=lambda kind: -fitting[kind])


def _too_small(config: ExportConfig, what: str, size: int) -> UsageError:
    smaller = "" if config.imatrix else "add `--imatrix auto` for smaller types, "
    return UsageError(
        f"nothing fits a `--budget` of {config.budget}: {what} takes {size / 2**20:,.0f} MiB",
        hint=f"give more, {smaller}or train a smaller model",
    )
