"""`--budget`: of the types whose file is not too large, the one that predicts most like the 16-bit file."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import get_args

from backprop.config import NEEDS_IMATRIX, ExportConfig, Quantization
from backprop.edges import llama_cpp, llama_tools
from backprop.engine import streamed
from backprop.errors import ExportError, UsageError
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
        raise _too_small(config, {"any file of this model": least})


def to_make(config: ExportConfig, source: Path) -> Sequence[str]:
    """Name the types that may have to be made; none if there is no budget, or the 16-bit file fits it."""
    if config.budget is None or source.stat().st_size <= bytes_of(config.budget):
        return ()
    kinds = [kind for kind in MAY_CHOOSE if kind not in llama_cpp.CONVERTED]
    return [kind for kind in kinds if config.imatrix is not None or kind not in NEEDS_IMATRIX]


def rank(
    config: ExportConfig, source: Path, verifier: Verifier, imatrix: Path | None, say: Sink
) -> tuple[Sequence[str], Path]:
    """Make and measure the types that fit, beside ``source``; name them, the nearest first, and give the file of that one.

    Types that llama.cpp refuses to make are told and left out; the files of the others are removed.

    Args:
        source: The 16-bit file.
        verifier: Knows the logits of ``source``.

    Raises:
        UsageError: If no file fits.
        ExportError: If llama.cpp makes none.
    """
    budget = bytes_of(config.budget or "")
    if source.stat().st_size <= budget:
        return ["f16"], source
    sizes = _sizes(source, config, imatrix, say)
    fitting = sorted((kind for kind, size in sizes.items() if size <= budget), key=lambda kind: -sizes[kind])
    if not fitting:
        raise _too_small(config, sizes)
    say(Phase(name=f"trying what fits {config.budget}"))
    ranked, largest = list[tuple[float, str]](), 0
    for kind in fitting:
        if sizes[kind] < WORTH_TRYING * largest:
            break
        found = _try(kind, source, verifier, imatrix if importance.matters(kind, config) else None, say)
        if found is None:
            del sizes[kind]
            continue
        size, mean_kl = found
        sizes[kind] = size
        losers = {kind}
        if size <= budget:
            largest = max(largest, size)
            losers |= {other for _, other in ranked}
            ranked = sorted([*ranked, (mean_kl, kind)])
            losers -= {ranked[0][1]}
        for loser in losers:
            _tried(loser, source).unlink(missing_ok=True)
    if not ranked:
        raise _too_small(config, sizes)
    return [kind for _, kind in ranked], _tried(ranked[0][1], source)


def _try(kind: str, source: Path, verifier: Verifier, imatrix: Path | None, say: Sink) -> tuple[int, float] | None:
    """Make a type, tell what it costs, and give its size in bytes and its mean divergence; None if llama.cpp refuses it, or it is broken."""
    made = _tried(kind, source)
    try:
        quantize(kind, source, made, imatrix=imatrix)
    except ExportError as error:
        made.unlink(missing_ok=True)
        say(Tried(quantization=kind, refused=error.message))
        return None
    found, size = verifier.measure(made), made.stat().st_size
    if not isfinite(found.mean_kl):
        made.unlink()
        say(Tried(quantization=kind, refused="what it predicts is no number"))
        return None
    say(Tried(quantization=kind, size_bytes=size, mean_kl=found.mean_kl, p99_kl=found.p99_kl, top1=found.top1))
    return size, found.mean_kl


def _tried(kind: str, source: Path) -> Path:
    return source.with_name(f"tried-{kind}.gguf")


def quantize(kind: str, source: Path, target: Path, *, imatrix: Path | None) -> None:
    """Quantize the 16-bit file, by an importance matrix if there is one."""
    if imatrix is None:
        llama_cpp.quantize(source, target, quantization=kind)
    else:
        llama_tools.quantize(source, target, quantization=kind, imatrix=imatrix)


def _sizes(source: Path, config: ExportConfig, imatrix: Path | None, say: Sink) -> dict[str, int]:
    """Give the bytes of the file of each type that may have to be made, and tell which llama.cpp refuses."""
    sizes: dict[str, int] = {}
    for kind in to_make(config, source):
        try:
            sizes[kind] = llama_tools.size_as(
                kind, source, imatrix=imatrix if importance.matters(kind, config) else None
            )
        except ExportError as error:
            say(Tried(quantization=kind, refused=error.message))
    return sizes


def _too_small(config: ExportConfig, sizes: Mapping[str, int]) -> UsageError | ExportError:
    """Say that nothing fits, and what the smallest file takes; ``sizes`` are of the types that can be made."""
    if not sizes:
        return ExportError(
            "llama.cpp makes none of the types that fit a `--budget`", hint="choose one with `--quantization`"
        )
    smallest = min(sizes, key=lambda kind: sizes[kind])
    smaller = "" if config.imatrix else "add `--imatrix auto` for smaller types, "
    return UsageError(
        f"nothing fits a `--budget` of {config.budget}: {smallest} takes {sizes[smallest] / 2**20:,.2f} MiB",
        hint=f"give more, {smaller}or train a smaller model",
    )
