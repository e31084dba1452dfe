"""Merge adapters that were trained one after another, and start the next run from the last (SLAO, arXiv:2512.23017).

Arithmetic on adapter state dicts as PEFT saves them, nothing else: no files, no models, no random numbers, and no input
is changed. `a` is A, shape (r, d_in), and `b` is B, shape (d_out, r); an adapter adds s B A to a weight. Results are
computed in float32 or wider and keep the dtype and device of what came in.

Two states live side by side. The next run starts from the last *fine-tuned* one (`next_start`); the *merged* one is
what is evaluated and delivered. The merge never feeds back into the training.

A and B mean something only together: T A beside B T^-1 is the same adapter in another basis of its ranks. A
function-preserving start changes the basis, so the merged state is first carried over into it (`carried`): what is
averaged are then factors in one basis. The paper keeps B as it is, in the basis of the run before.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, assert_never, cast

from backprop.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from backprop.config import MergeMode

    State = Mapping[str, torch.Tensor]

Init = Literal["function-preserving", "literal"]

# A choice of this project, without evidence for or against: half old, half new, however many runs there were.
EMA_WEIGHT = 0.5
# Of the largest entry of R's diagonal: A in another basis has entries at most so many times as large, which float32 bears.
LEAST_SHARE = 1e-3
PAPERS_EXPONENT = 0.5
EXPONENTS = (0.0, 0.25, PAPERS_EXPONENT, 0.75, 1.0)
"""What "auto" chooses from: from the last run alone to the mean of all."""

# PEFT's names for A: `….lora_A.weight` of a linear layer, `….lora_embedding_A` of an embedding.
_A_KEY = re.compile(r"\.lora_(embedding_)?A(?=\.|$)")

# What must be equal for s B A to mean the same in both: what PEFT takes a missing entry for, and the option behind it.
_MUST_EQUAL: dict[str, tuple[object, str | None]] = {
    "base_model_name_or_path": (None, "--model"),
    "r": (8, "--lora-r"),
    "lora_alpha": (8, "--lora-alpha"),
    "use_rslora": (False, "--rslora"),
    "use_dora": (False, "--method"),
    "target_modules": (None, "--target-modules"),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeState:
    """What a multi-run carries from run to run; its size does not depend on the number of runs."""

    merged: State
    """The adapter to evaluate and deliver."""
    fine_tuned: State
    """The last run's adapter as trained: what `next_start` takes."""
    num_merges: int
    """Successful merges so far."""


def orthonormal_rows(a: torch.Tensor) -> torch.Tensor:
    """Turn A into an orthonormal basis of its rows, each pointing the way A's row does.

    Rows that A cannot fill, because it is zero or its rank is below r, are filled by the same rule each time.

    Args:
        a: A after fine-tuning, shape (r, d_in) with r <= d_in.

    Returns:
        Q with ``Q @ Q.T == I_r``, shape (r, d_in). Equals ``a`` when its rows are orthonormal already.

    Raises:
        ValueError: If ``a`` is not a matrix, has more rows than columns, or is not finite.
    """
    if a.ndim != 2:
        raise ValueError(f"A must be a matrix of shape (r, d_in): {tuple(a.shape)}")
    if a.shape[0] > a.shape[1]:
        raise ValueError(f"{a.shape[0]} rows of length {a.shape[1]} cannot be orthonormal")
    if not a.isfinite().all():
        raise ValueError("A holds NaN or infinity")
    return _signed_qr(a)[0].to(a.dtype).contiguous()


def next_start(fine_tuned: State, *, init: Init) -> dict[str, torch.Tensor]:
    """Give the adapter the next run starts from: A with orthonormal rows, B as fine-tuned.

    Everything that is not a factor (DoRA's magnitudes, biases, `modules_to_save`) is taken over as it is.

    Args:
        fine_tuned: The last run's adapter as trained, never the merged one.
        init: "function-preserving" puts ``B R^T`` beside ``Q^T`` (A^T = Q R), so that B A stays what it was. "literal"
            keeps B, as the paper does: with PEFT's usual first A, that start is about 1.7 times as strong.

    Raises:
        UsageError: If there are no LoRA factors in it, or a rank is larger than its layer is wide.
        ValueError: If a factor is not a finite matrix.
    """
    _require_factors(fine_tuned)
    _require_finite(fine_tuned)
    start = {key: _copy(tensor) for key, tensor in fine_tuned.items()}
    for a_key, b_key in _pairs(fine_tuned):
        a, b = fine_tuned[a_key], fine_tuned[b_key]
        if a.ndim != 2 or b.ndim != 2:
            raise ValueError(f"`{a_key}` and its B must be matrices: {tuple(a.shape)} and {tuple(b.shape)}")
        if a.shape[0] > a.shape[1]:
            raise UsageError(
                f"rank {a.shape[0]} is larger than the width {a.shape[1]} of `{a_key}`",
                hint=f"give `--lora-r {a.shape[1]}` or less",
            )
        q, upper = _signed_qr(a)
        start[a_key] = q.to(a.dtype).contiguous()
        if init == "function-preserving":
            start[b_key] = (b.detach().double() @ upper.T).to(b.dtype)
    return start


def carried(merged: State, fine_tuned: State, *, init: Init) -> dict[str, torch.Tensor]:
    """Give the merged adapter in the basis that the run after ``fine_tuned`` has: the same weight change, B A.

    With A^T = Q R of the fine-tuned A, the start of the next run is (R^-T A, B R^T); so is this of the merged. A merged A
    that is the fine-tuned one becomes Q^T, however singular R is; beside another, such an R is made invertible.

    Args:
        init: "literal" changes nothing: there, B is taken for what it is whatever A stands beside it.
    """
    moved = {key: _copy(tensor) for key, tensor in merged.items()}
    if init == "literal":
        return moved
    for a_key, b_key in _pairs(fine_tuned):
        q, upper = _signed_qr(fine_tuned[a_key])
        a, b = merged[a_key].detach(), merged[b_key].detach()
        same = a.equal(fine_tuned[a_key])
        turn = upper if same else _invertible(upper)
        moved_a = q if same else turn.T.pinverse() @ a.double()
        moved |= {a_key: moved_a.to(a.dtype).contiguous(), b_key: (b.double() @ turn.T).to(b.dtype)}
    return moved


def merge_weight(num_merges: int, *, exponent: float = PAPERS_EXPONENT) -> float:
    """Give lambda(i) = i^-p, the share of the newest run in the merged B; the paper has 1/sqrt(i) (arXiv:2512.23017).

    Args:
        num_merges: Successful merges, this one included: the first is 1.
        exponent: p; 0 delivers the last run, 1 the mean of all.
    """
    if num_merges < 1:
        raise ValueError(f"merges are counted from 1: {num_merges}")
    return 1 / math.sqrt(num_merges) if exponent == PAPERS_EXPONENT else num_merges**-exponent


def merge(
    merged: State, fine_tuned: State, *, num_merges: int, mode: MergeMode, exponent: float = PAPERS_EXPONENT
) -> dict[str, torch.Tensor]:
    """Take one more fine-tuned adapter into the merged one.

    A share w of 1 takes the new value bit for bit; else it is old + w (new - old), which never leaves the interval
    between the two. With i = ``num_merges``:

    - "slao", and "auto" with the exponent that was chosen: w = 1 for A, ``merge_weight(i)`` for B.
    - "sequential": w = 1 for both: the last run as it is.
    - "average": w = 1/i for both: the mean of all runs.
    - "ema": w = 1 for A, ``EMA_WEIGHT`` for B.
    - "stack": w = 1/i of B A itself: the two are stacked, which is exact, and cut to the nearest of their rank. Their
      basis does not matter; the entries of its factors lie in no interval.

    What is not a factor goes with B; where it is not a floating-point number, the new value is taken. If the dtypes
    of the two differ, the result has the one that holds both. Merge in float32 where there is a choice: bfloat16
    rounds small shares away.

    Args:
        merged: The merged adapter so far; for the first merge, ``fine_tuned`` itself.
        fine_tuned: The adapter to take in. It must come from a run that began at ``next_start`` of the one before.
        num_merges: Successful merges, this one included: the first is 1, and gives ``fine_tuned`` bit for bit.
        mode: One of the above.
        exponent: Of `merge_weight`.

    Raises:
        UsageError: If the two differ in keys or shapes, or hold no LoRA factors.
        ValueError: If ``fine_tuned`` is not finite, or ``num_merges`` below 1.
    """
    weight_a, weight_b = _weights(mode, num_merges, exponent)
    _require_same_layout(merged, fine_tuned)
    _require_factors(fine_tuned)
    _require_finite(fine_tuned)
    blended = {
        key: _blend(merged[key], new, weight_a if _A_KEY.search(key) else weight_b) for key, new in fine_tuned.items()
    }
    return blended | _stacked(merged, fine_tuned, weight_b) if mode == "stack" and weight_b != 1 else blended


def step(
    state: MergeState | None,
    fine_tuned: State,
    *,
    mode: MergeMode,
    init: Init,
    parent: str | None = None,
    exponent: float = PAPERS_EXPONENT,
) -> MergeState:
    """Fold one successful run into the state. A failed or rejected run is not folded, and so counts for nothing.

    Args:
        state: The state after the run before; None before the first run.
        fine_tuned: The run's adapter as trained. It is copied, so a live model may go on training.
        mode: As in `merge`.
        init: How this run began, as `next_start` was told.
        parent: `fingerprint` of the fine-tuned adapter whose `next_start` this run began from, as recorded when it
            began; "" if it began from none. None if the caller knows that it was ``state.fine_tuned``.
        exponent: As in `merge`.

    Raises:
        UsageError: If ``parent`` is another adapter than ``state.fine_tuned``, or as in `merge`.
        ValueError: As in `merge`.
    """
    if parent is not None and parent != (fingerprint(state.fine_tuned) if state else ""):
        raise UsageError(
            "this run began from another adapter than the last merged run: their factors have nothing in common",
            hint="run `backprop multi-run` again with a new `--output`",
        )
    before = fine_tuned if state is None else carried(state.merged, state.fine_tuned, init=init)
    num_merges = 1 if state is None else state.num_merges + 1
    merged = merge(before, fine_tuned, num_merges=num_merges, mode=mode, exponent=exponent)
    kept = {key: _copy(tensor) for key, tensor in fine_tuned.items()}
    return MergeState(merged=merged, fine_tuned=kept, num_merges=num_merges)


def fingerprint(state: State) -> str:
    """Give a SHA-256 of names, dtypes, shapes and bits; the order of the keys does not matter."""
    import torch

    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_mergeable(config_a: Mapping[str, object], config_b: Mapping[str, object]) -> None:
    """Refuse two adapters whose factors do not mean the same: other scale, layers or base model.

    Args:
        config_a: PEFT's `adapter_config.json` of one adapter; `LoraConfig.to_dict()` has the same keys.
        config_b: That of the other.

    Raises:
        UsageError: Naming everything that differs, with both values; or if `target_parameters` is used at all, because
            its factors hold several experts in one matrix, which a QR would mix.
    """
    for config in (config_a, config_b):
        if config.get("target_parameters"):
            raise UsageError(
                "an adapter on `target_parameters` cannot be merged: one factor holds all experts",
                hint="name linear layers with `--target-modules`",
            )
    values = {name: (_comparable(config_a, name), _comparable(config_b, name)) for name in _MUST_EQUAL}
    unequal = {name: pair for name, pair in values.items() if pair[0] != pair[1]}
    if not unequal:
        return
    facts = "; ".join(f"{name} is {one!r} in one, {other!r} in the other" for name, (one, other) in unequal.items())
    options = [f"`{option}`" for name in unequal if (option := _MUST_EQUAL[name][1])]
    raise UsageError(
        f"the adapters cannot be merged: {facts}",
        hint=f"train both with the same {' '.join(options)}" if options else "train both with the same `--config`",
    )


def _signed_qr(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give Q^T (r, d_in) and R (r, r) of A^T = Q R with diag R >= 0, in float64."""
    import torch

    # Not float32: TF32 and autocast, which the training loop may leave on, would round its products.
    factors = torch.linalg.qr(a.detach().double().T)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    q, upper = cast("tuple[torch.Tensor, torch.Tensor]", factors)  # (d_in, r), (r, r)
    # QR is unique only up to the sign of each column; sign(0) must not erase one.
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return (q * sign).T, upper * sign[:, None]


def _invertible(upper: torch.Tensor) -> torch.Tensor:
    """Give R itself, unless its diagonal has next to nothing somewhere, which is raised there to `LEAST_SHARE`."""
    diagonal = upper.diagonal()
    # Any invertible matrix keeps B A; one that is nearly R keeps what is averaged nearly in one basis.
    least = LEAST_SHARE * diagonal.max() if diagonal.any() else 1.0
    return upper + (diagonal.clamp(min=least) - diagonal).diag()


def _weights(mode: MergeMode, num_merges: int, exponent: float) -> tuple[float, float]:
    """Give the share of the newest run in A, and in B and the rest."""
    slao = merge_weight(num_merges, exponent=exponent)
    match mode:
        case "slao" | "auto":
            return 1.0, slao
        case "sequential":
            return 1.0, 1.0
        case "average" | "stack":
            return 1 / num_merges, 1 / num_merges
        case "ema":
            return 1.0, 1.0 if num_merges == 1 else EMA_WEIGHT
        case _:
            assert_never(mode)


def _blend(old: torch.Tensor, new: torch.Tensor, weight: float) -> torch.Tensor:
    import torch

    dtype = torch.promote_types(old.dtype, new.dtype)
    if weight == 1 or not dtype.is_floating_point:
        return _copy(new.to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    return torch.lerp(old.detach().to(wide), new.detach().to(wide), weight).to(dtype).contiguous()


def _stacked(old: State, new: State, weight: float) -> dict[str, torch.Tensor]:
    """Give the factors of rank r nearest to (1 - w) B A of ``old`` + w B A of ``new`` (Eckart-Young), without making either."""
    import torch

    found: dict[str, torch.Tensor] = {}
    for a_key, b_key in _pairs(new):
        a_KN = torch.cat([old[a_key].detach().double(), new[a_key].detach().double()])
        b_MK = torch.cat([(1 - weight) * old[b_key].detach().double(), weight * new[b_key].detach().double()], dim=1)
        left, down = torch.linalg.qr(b_MK)
        right, up = torch.linalg.qr(a_KN.T)
        u, sizes, v = torch.linalg.svd(down @ up.T, full_matrices=False)
        r = min(len(new[a_key]), len(sizes))
        roots = sizes[:r].sqrt()
        found[a_key] = _filled(roots[:, None] * (v[:r] @ right.T), old[a_key], new[a_key])
        found[b_key] = _filled(left @ u[:, :r] * roots, old[b_key], new[b_key])
    return found


def _filled(factor: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Fill a factor of a layer with fewer rows than ranks up with zeros."""
    import torch

    whole = torch.zeros(new.shape, dtype=torch.promote_types(old.dtype, new.dtype), device=new.device)
    whole[tuple(map(slice, factor.shape))] = factor.to(whole.dtype)
    return whole


def _pairs(state: State) -> list[tuple[str, str]]:
    """Give the keys of each A and its B."""
    return [(key, _A_KEY.sub(lambda found: f".lora_{found[1] or ''}B", key)) for key in state if _A_KEY.search(key)]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # safetensors refuses tensors that are not contiguous.
    return tensor.detach().clone().contiguous()


def _require_same_layout(merged: State, fine_tuned: State) -> None:
    hint = "start every run from the same model, `--lora-r` and `--target-modules`"
    for key in sorted({*merged, *fine_tuned}):
        if key not in merged or key not in fine_tuned:
            place = "fine-tuned" if key in fine_tuned else "merged"
            raise UsageError(f"the adapters cannot be merged: only the {place} one has `{key}`", hint=hint)
        if merged[key].shape != fine_tuned[key].shape:
            raise UsageError(
                f"the adapters cannot be merged: `{key}` is {tuple(merged[key].shape)} in the merged one, "
                f"{tuple(fine_tuned[key].shape)} in the fine-tuned one",
                hint=hint,
            )


def _require_factors(state: State) -> None:
    if not any(_A_KEY.search(key) for key in state):
        raise UsageError(
            "there are no LoRA factors in this adapter", hint="train it with `--method lora`, `qlora` or `dora`"
        )


def _require_finite(state: State) -> None:
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"`{key}` holds NaN or infinity")


def _comparable(config: Mapping[str, object], name: str) -> object:
    value = config.get(name)
    if value is None:
        return _MUST_EQUAL[name][0]
    if name == "target_modules" and not isinstance(value, str):  # a string is a pattern
        return sorted(set(cast("Collection[str]", value)))
    return value
