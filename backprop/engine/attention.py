"""Attention for packed rows: each document attends to itself alone, on any device, without the flash-attn package."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from threading import Thread
from typing import Any

DOCUMENTS = "backprop_documents"
"""The name under which transformers knows `attend_within_documents`."""

LONG = 1024
"""Tokens of a document whose attention takes a good part of a layer's time."""

# What some architectures add to attention scores, and this attention does not know.
UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a packed row lie.

    One object, which only attention looks into: a layer that was compiled for one row serves all others.
    """

    lengths: tuple[int, ...]
    """Tokens of each."""
    ends: Any
    """The same as 0 and running sums: int32, one more than documents."""
    longest: int
    """The largest of the lengths."""
    alike: bool
    """Whether they are long, several, and all of one length, as rows are that were cut at a limit."""

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Documents":
        """Lay documents of these lengths one after the other."""
        import torch

        ends = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
        alike = len(lengths) > 1 and len(set(lengths)) == 1 and lengths[0] >= LONG
        return cls(tuple(lengths), ends, max(lengths), alike)

    def to(self, device: Any) -> "Documents":
        """Give the same for a row on ``device``."""
        return replace(self, ends=sent(self.ends, device))


def sent(value: Any, device: Any) -> Any:
    """Give a tensor, or what can be moved like one, on ``device``; a GPU need not have done all that it was asked before."""
    import torch

    beside = torch.is_tensor(value) and value.device.type == "cpu" and torch.device(device).type == "cuda"
    return value.pin_memory().to(device, non_blocking=True) if beside else value.to(device)


class UnknownAttentionError(Exception):
    """An architecture adds something to its attention scores that is not known here; it cannot be packed."""


def attend_within_documents(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    documents: Documents,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Any, None]:
    """Causal attention within each of the documents that stand one after the other in a row.

    Args:
        query: Of shape (1, heads, T, head size); ``key`` and ``value`` may have fewer heads.
        documents: Their lengths add up to T.

    Returns:
        The output, of shape (1, T, H, D), and None for the weights.

    Raises:
        UnknownAttentionError: If this architecture adds something to its scores that is not known here.
    """
    unknown = [name for name in UNKNOWN if rest.get(name) is not None]
    if unknown or attention_mask is not None:
        raise UnknownAttentionError(f"attention within documents does not know {', '.join(unknown) or 'a mask'}")
    if _varlen_fits(query, value, dropout):
        if documents.alike and (sliding_window is None or sliding_window >= documents.longest):
            return _side_by_side(query, key, value, documents.longest, scaling), None
        from backprop.engine import varlen

        return varlen.attend(query, key, value, documents.ends, documents.longest, scaling, sliding_window), None
    return _one_by_one(query, key, value, documents, scaling, dropout, sliding_window), None


def _side_by_side(query: Any, key: Any, value: Any, length: int, scaling: float | None) -> Any:
    """Attend within documents of one length, by the kernels for a batch: on an H200 they take 0.6 of the time (docs/speed-notes.md)."""
    import torch

    query_BHLD, key_BGLD, value_BGLD = (
        tensor.transpose(1, 2).unflatten(1, (-1, length))[0].transpose(1, 2) for tensor in (query, key, value)
    )
    output_BHLD = torch.nn.functional.scaled_dot_product_attention(
        query_BHLD, key_BGLD, value_BGLD, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output_BHLD.transpose(1, 2).flatten(0, 1)[None]


def _varlen_fits(query: Any, value: Any, dropout: float) -> bool:
    """Say whether torch's own kernel for documents of several lengths can take these (torch.nn.attention.varlen)."""
    import torch

    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and dropout == 0.0
        and torch.cuda.get_device_properties(query.device).major >= 8
    )


def _one_by_one(
    query: Any, key: Any, value: Any, documents: Documents, scaling: float | None, dropout: float, window: int | None
) -> Any:
    import torch

    if torch.compiler.is_dynamo_compiling():  # what is imported there takes most of a second
        from torch._dynamo import graph_break

        graph_break()  # compiled code would be one for each row, since lengths differ
    outputs: list[Any] = []
    parts = (tensor.split(documents.lengths, dim=2) for tensor in (query, key, value))
    for query_1HtD, key_1GtD, value_1GtD in zip(*parts, strict=True):
        length = query_1HtD.shape[2]
        mask = None if window is None or window >= length else _window_mask(length, window, query.device)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                query_1HtD,
                key_1GtD,
                value_1GtD,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                dropout_p=dropout,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _window_mask(length: int, window: int, device: Any) -> Any:
    import torch

    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


@contextmanager
def within_documents(model: Any) -> Generator[None]:
    """Let every layer of ``model`` attend within documents, for the length of the block."""
    from transformers import AttentionInterface

    AttentionInterface.register(DOCUMENTS, attend_within_documents)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    configs = {key: config for key, config in configs.items() if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = DOCUMENTS
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


@contextmanager
def kernels_ahead(device: str, dtype: str) -> Generator[None]:
    """Beside the block, which reads weights, let a GPU load what products and attention need: up to 2 s at their first use."""
    if device != "cuda":
        yield
        return
    import torch

    from backprop.engine import varlen  # by this thread: imported by two at once, a module may be seen half made

    beside = Thread(target=_attend_once, args=(varlen.attend, getattr(torch, dtype)))
    beside.start()
    try:
        yield
    finally:
        beside.join()


def _attend_once(attend: Any, dtype: Any) -> None:
    """Go through a product and attention, and back."""
    import torch

    with suppress(Exception):  # what cannot run here is told of by who needs it
        tokens = torch.ones(1, 2, 16, 64, device="cuda", dtype=dtype, requires_grad=True)
        heads = tokens @ tokens.new_ones(64, 64)
        ends = torch.tensor([0, 8, 16], dtype=torch.int32, device="cuda")
        attend(heads, heads, heads, ends, 8, None, None).sum().backward()
        torch.cuda.synchronize()
