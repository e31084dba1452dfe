"""Cross-entropy of a frozen linear layer's output, a part of the rows at a time.

Torch is imported at the top since autograd functions are classes of its; only `cross_entropy` imports this, when it computes.
"""

from typing import Any, cast

import torch

from backprop.core.memory import loss_rows
from backprop.engine.batches import IGNORED


def linear_cross_entropy(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Give the negative log-likelihood of each row's target, in nats; of shape (K,), float32, and 0 where it is `IGNORED`.

    The gradient to ``hidden`` is made beside it, so that no logits are kept for the way back, as in Liger's kernels
    (arXiv:2410.10989, section 3.2). ``head`` is frozen: it has none.

    Args:
        hidden: Of shape (K, H).
        targets: Of shape (K,).
    """
    return cast(torch.Tensor, _LinearCrossEntropy.apply(hidden, head.weight, head.bias, targets))


def losses_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, *, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Give each row's loss in float32, and if wanted the gradient of the losses' sum to the logits, in their precision.

    A row whose target is `IGNORED` is given a gradient too, which the caller makes 0.

    Args:
        logits: Of shape (C, V).
        targets: Of shape (C,).
    """
    targets_C1 = targets.clamp(min=0)[:, None]
    wide_CV = logits.float()
    normalizers_C1 = wide_CV.logsumexp(dim=1, keepdim=True)
    surprises_C1 = normalizers_C1 - wide_CV.gather(1, targets_C1)
    losses_C = surprises_C1[:, 0] * (targets != IGNORED)
    if not wanted:
        return losses_C, None
    # Softmax less one at the target.
    made_CV = wide_CV.sub_(normalizers_C1).exp_().to(logits.dtype)
    return losses_C, made_CV.scatter_(1, targets_C1, torch.expm1(-surprises_C1).to(logits.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        hidden_KH, weight_VH, bias_V, targets_K = arguments
        losses_K = torch.empty(len(hidden_KH), device=hidden_KH.device)
        wanted = ctx.needs_input_grad[0]
        gradient_KH = torch.empty_like(hidden_KH) if wanted else None
        rows = loss_rows(len(weight_VH))
        for start in range(0, len(hidden_KH), rows):
            part = slice(start, start + rows)
            logits_CV = torch.nn.functional.linear(hidden_KH[part], weight_VH, bias_V)
            losses_K[part], made_CV = losses_and_gradient(logits_CV, targets_K[part], wanted=wanted)
            if gradient_KH is not None and made_CV is not None:
                gradient_KH[part] = made_CV.to(weight_VH.dtype) @ weight_VH
        if gradient_KH is not None:
            gradient_KH *= (targets_K != IGNORED)[:, None]
        ctx.save_for_backward(gradient_KH)
        return losses_K

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (gradient_KH,) = ctx.saved_tensors
        return (gradient_KH * gradients[0][:, None]).to(gradient_KH.dtype), None, None, None
