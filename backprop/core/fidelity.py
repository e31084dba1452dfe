"""Is a copy the model that was trained? Token ids, prompts, next-token distributions and answers, compared.

Distributions are logits of shape (T, V), float32; divergences are in nats. What may differ was measured on
SmolLM2-135M-Instruct and Gemma 3 270M with small adapters: docs/export.md has the figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprop.events import Proved

if TYPE_CHECKING:
    import numpy

    Logits = numpy.ndarray

MOST_KL = {
    "f32": 1e-4,
    "f16": 1e-4,
    "bf16": 5e-3,
    "q8_0": 0.1,
    "q6_k": 0.3,
    **dict.fromkeys(("q5_k_m", "q5_k_s", "q5_1", "q5_0"), 3.0),
    **dict.fromkeys(("q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs"), 5.0),
    **dict.fromkeys(("q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs"), 5.0),
    **dict.fromkeys(("q2_k", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"), 5.0),
    "lora-f32": 1e-4,
    "lora-f16": 1e-4,
    "lora-bf16": 5e-3,
    "lora-q8_0": 5e-3,
}
"""Largest mean divergence that a file may have: of 16 and 32 bits, and an adapter alone, from the trained model; of fewer from
the 16-bit file."""

LEAST_TOP1 = {
    **dict.fromkeys(("f32", "f16", "lora-f32", "lora-f16"), 0.99),
    **dict.fromkeys(("bf16", "lora-bf16", "lora-q8_0"), 0.95),
    "q8_0": 0.8,
}
"""Smallest share of positions with the same likeliest token; of other types none is asked."""

MOST_P99 = 20.0
"""Largest divergence at the 99th percentile, in units of the largest mean: good files of 16 bits had 4 to 16 times their own
mean there (docs/export.md), and a mean may hide a few positions that are wrong."""

ADAPTER_SHARE = (0.95, 1.05)
"""How much of the adapter may be in the 16-bit file: 0 is an adapter that was lost, 2 one that was merged twice."""

# Tokens whose logits are this close (in nats) are equally likely: rounding may choose either.
TIE = 0.05

WIDEST_KL, WIDEST_TOP1 = 2e-3, 0.9
"""Of a file of f16, however far rounding moves the model: a head in another place is 2.5e-3."""

ROUNDING = 10.0
"""How far rounding in the file and in llama.cpp may move a model, in units of what rounding the same to 16 bits does to the
trained model itself: 2.9 at most in good files (docs/export.md)."""

# A divergence below this is no adapter to speak of: rounding would decide.
LEAST_LEARNT = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """How far one model's next-token distributions are from another's, over all positions."""

    mean_kl: float
    p99_kl: float
    top1: float
    """Share of positions with the same likeliest token, or one that is as likely."""
    positions: int

    def __str__(self) -> str:
        """Write all three in short."""
        return (
            f"KL {self.mean_kl:.3g} in the mean and {self.p99_kl:.2g} at the 99th percentile of {self.positions} "
            f"positions, likeliest token equal in {self.top1:.1%}"
        )


def likeness(expected: Sequence["Logits"], found: Sequence["Logits"]) -> Likeness:
    """Compare the logits of two models on the same texts: the divergence of ``found`` from ``expected``.

    Raises:
        ValueError: If the shapes differ: a vocabulary that was cut or padded.
    """
    import numpy

    if not expected:
        raise ValueError("there is no text to compare on")
    divergences: list[float] = []
    same: list[Logits] = []
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"the vocabularies differ: {one.shape} against {other.shape}")
        divergences += map(_divergence, one, other)
        chosen = numpy.take_along_axis(one, other.argmax(axis=-1, keepdims=True), axis=-1)[:, 0]
        same.append(one.max(axis=-1) - chosen <= TIE)
    every = numpy.array(divergences)
    return Likeness(
        mean_kl=float(every.mean()),
        p99_kl=float(numpy.quantile(every, 0.99)),
        top1=float(numpy.concatenate(same).mean()),
        positions=int(every.size),
    )


def _divergence(expected: "Logits", found: "Logits") -> float:
    """Give the divergence at one position, in nats; in double precision, and a position at a time, which the cache has room for."""
    import numpy

    a, b = (logits.astype(numpy.float64) - logits.max() for logits in (expected, found))
    weights, others = numpy.exp(a), numpy.exp(b)
    total = weights.sum()
    # The mean of log p - log q by p, where log p is a - log(total).
    return float((weights * (a - b)).sum() / total - numpy.log(total / others.sum()))


def prove_equal(what: str, texts: Sequence[str], expected: Sequence[object], found: Sequence[object]) -> Proved:
    """Hold the results of two implementations against each other, text by text; say where the first differs."""
    pairs = list(zip(texts, expected, found, strict=True))
    odd = [(text, one, other) for text, one, other in pairs if one != other]
    told = f"{len(pairs) - len(odd)} of {len(pairs)} are equal"
    if odd:
        text, one, other = odd[0]
        told += f"; first other: {text[:60]!r} gives {_around(one, other)} instead of {_around(other, one, swap=True)}"
    return Proved(name=what, ok=not odd, found=told)


def _around(one: object, other: object, *, swap: bool = False) -> str:
    """Write the part of ``other`` where it first differs from ``one``."""
    mine, theirs = (one, other) if not swap else (other, one)
    if isinstance(mine, str) and isinstance(theirs, str):
        start = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), 0)
        return repr((mine if swap else theirs)[max(0, start - 10) : start + 30])
    return str(mine if swap else theirs)[:60]


def prove_likeness(
    kind: str,
    of: str,
    expected: Sequence["Logits"],
    found: Sequence["Logits"],
    *,
    noise: Likeness | None = None,
) -> Proved:
    """Hold a file's distributions to those of what it was made from.

    Args:
        kind: The file's type, as in `MOST_KL`.
        of: What it was made from, in words.
        noise: How like rounding to 16 bits, as llama.cpp rounds, leaves the trained model to itself. Where that alone moves
            it far, as a model that is very sure, more is allowed, up to `WIDEST_KL` and `WIDEST_TOP1`.
    """
    name = f"the {kind} file predicts as {of}"
    try:
        measured = likeness(expected, found)
    except ValueError as error:
        return Proved(name=name, ok=False, found=str(error))
    most, least = MOST_KL[kind], LEAST_TOP1.get(kind, 0.0)
    if noise:
        most = max(most, min(ROUNDING * noise.mean_kl, WIDEST_KL))
        least = min(least, max(WIDEST_TOP1, 1 - ROUNDING * (1 - noise.top1)))
    allowed = f"at most {most:.3g} and {MOST_P99 * most:.2g}" + (f", and at least {least:.0%}," if least else "")
    alone = f" (rounding alone: {noise.mean_kl:.2g}, {noise.top1:.1%})" if noise else ""
    ok = measured.mean_kl <= most and measured.p99_kl <= MOST_P99 * most and measured.top1 >= least
    return Proved(name=name, ok=ok, found=f"{measured}; {allowed} allowed{alone}")


def prove_adapter(base: Sequence["Logits"], trained: Sequence["Logits"], found: Sequence["Logits"]) -> Proved:
    """The adapter is in the file, once: by what it did to the trained model's logits, projected onto it."""
    name = "the adapter is in it, once"
    try:
        learnt = likeness(trained, base).mean_kl
        share = _share(base, trained, found)
    except ValueError as error:
        return Proved(name=name, ok=False, found=str(error))
    if learnt < LEAST_LEARNT:
        return Proved(name=name, ok=True, found=f"KL {learnt:.2g} from the base: too little was learnt to tell")
    low, high = ADAPTER_SHARE
    return Proved(
        name=name,
        ok=low <= share <= high,
        found=f"{share:.3f} times what it did to the trained model (KL {learnt:.2g} from the base): {low:g} to {high:g} allowed",
    )


def _share(base: Sequence["Logits"], trained: Sequence["Logits"], found: Sequence["Logits"]) -> float:
    """Give the length of (found - base) along (trained - base), in units of the latter; a constant added to all logits is no change."""
    along, length = 0.0, 0.0
    for zero, one, other in zip(base, trained, found, strict=True):
        wanted, there = (array - array.mean(axis=-1, keepdims=True) for array in (one - zero, other - zero))
        along += float((wanted * there).sum())
        length += float((wanted * wanted).sum())
    return along / length if length else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a model answered greedily, and whether it ended by itself within the limit."""

    text: str
    stopped: bool
    tokens: tuple[int, ...] = ()
    """Of the trained model's: what others are likely to answer too."""


# An answer starts alike if these first characters are the same; on close calls rounding may choose another word.
SAME_START = 12


def have_parted(expected: Reply, begun: str) -> bool:
    """Say whether an answer that began so can neither start as the expected one nor go on where that stops."""
    prefix = expected.text.startswith(begun) or begun.startswith(expected.text)
    return not prefix and len(begun) >= SAME_START


def prove_replies(kind: str, questions: Sequence[str], expected: Sequence[Reply], found: Sequence[Reply]) -> Proved:
    """Greedy answers stop where the trained model's do; those of f16 and f32 also start alike, two of three."""
    name = f"the {kind} file answers as the trained model"
    if not questions:
        return Proved(name=name, ok=True, found="not asked: no question is short enough, or the template refuses all")
    pairs = list(zip(expected, found, strict=True))
    alike = sum(a.text[:SAME_START] == b.text[:SAME_START] for a, b in pairs)
    # Where the answers part, one may well be longer than the other.
    run_on = sum(a.stopped and not b.stopped and b.text.startswith(a.text) for a, b in pairs)
    ok = not run_on and (kind not in ("f32", "f16", "lora-f32", "lora-f16") or 3 * alike >= 2 * len(questions))
    told = f"{alike} of {len(questions)} answers start alike; {run_on} go on where the trained model's stop"
    other = next((number for number, (a, b) in enumerate(pairs) if a.text != b.text), None)
    if other is not None:
        told += f"; {questions[other][:40]!r}: {found[other].text[:40]!r} instead of {expected[other].text[:40]!r}"
    return Proved(name=name, ok=ok, found=told)
