"""Torch's attention kernel for documents of several lengths (torch.nn.attention.varlen), as compiled layers can hold it.

Torch is imported at the top since a compiler is to see nothing but names here; only `attention` imports this, on a GPU.
"""

from inspect import signature
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

# Queries in groups that share a key: torch 2.11 takes them without being told.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        query: Of shape (1, heads, T, head size); ``key`` and ``value`` may have fewer heads.
        ends: 0 and the running sums of lengths: int32, of shape (documents + 1,).
        longest: Tokens of the longest.
        window: How many tokens each may see, itself among them; None for all before it.

    Returns:
        A tensor of shape (1, T, heads, head size).
    """
    query_THD, key_TGD, value_TGD = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    sees = (-1 if window is None else window - 1, 0)
    output_THD = varlen_attn(
        query_THD, key_TGD, value_TGD, ends, ends, longest, longest, scale=scaling, window_size=sees, **GROUPED
    )
    assert isinstance(output_THD, torch.Tensor)
    return output_THD[None]
