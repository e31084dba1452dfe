"""Examples to the tensors of forward passes: packed in rows without padding, or padded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from backprop.core.data.pack import best_fit
from backprop.core.data.render import Example

IGNORED = -100
"""The label that torch's cross-entropy skips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSize:
    """How much goes through the model at once."""

    examples: int
    """Most examples of a padded pass."""
    tokens: int
    """Most tokens of a packed pass."""
    packing: bool
    dtype: str = "float32"
    """What the model computes in: training, evaluation and proofs alike."""


def labels_of(example: Example) -> list[int]:
    """Give each token as its own label where it is trained on, and `IGNORED` elsewhere.

    Nothing in the example stands before its first token; in a packed row, another example does.
    """
    labels = [token if trained else IGNORED for token, trained in zip(example.ids, example.mask, strict=True)]
    return [IGNORED, *labels[1:]]


def passes(examples: Sequence[Example], size: PassSize) -> list[dict[str, Any]]:
    """Cut examples into forward passes: the arguments of the model, and `labels`.

    Which examples share a pass changes no result: losses are summed over all passes.
    """
    if size.packing:
        rows = best_fit([len(example.ids) for example in examples], size.tokens)
        return [packed([examples[position] for position in row]) for row in rows]
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [padded(ordered[start : start + size.examples]) for start in range(0, len(ordered), size.examples)]


def packed(examples: Sequence[Example]) -> dict[str, Any]:
    """Put examples one after the other in a row of shape (1, T), each with positions of its own."""
    import torch

    lengths = [len(example.ids) for example in examples]
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example.ids]]),
        "position_ids": torch.tensor([[position for length in lengths for position in range(length)]]),
        "labels": torch.tensor([[label for example in examples for label in labels_of(example)]]),
        "document_lengths": tuple(lengths),
        "document_ends": torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32),
    }


def padded(examples: Sequence[Example]) -> dict[str, Any]:
    """Put each example in a row of its own, of shape (B, T), filled up at its end."""
    import torch

    length = max(len(example.ids) for example in examples)
    gaps = [length - len(example.ids) for example in examples]
    rows: Mapping[str, list[list[int]]] = {
        "input_ids": [[*example.ids, *[0] * gap] for example, gap in zip(examples, gaps, strict=True)],
        "attention_mask": [[1] * len(example.ids) + [0] * gap for example, gap in zip(examples, gaps, strict=True)],
        "labels": [labels_of(example) + [IGNORED] * gap for example, gap in zip(examples, gaps, strict=True)],
    }
    return {name: torch.tensor(row) for name, row in rows.items()}


def num_tokens(one: Mapping[str, Any]) -> int:
    """Count the tokens of a pass, without padding."""
    mask = one.get("attention_mask")
    return int(mask.sum()) if mask is not None else int(one["input_ids"].shape[1])


def num_trained(one: Mapping[str, Any]) -> int:
    """Count the trained tokens of a pass."""
    return int((one["labels"] != IGNORED).sum())


def to_device(one: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Move the tensors of a pass."""
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in one.items()}


def computing(model: Any, dtype: str) -> Any:
    """Give the context in which ``model`` computes in ``dtype``, whatever its weights and adapters are held in."""
    import torch

    device = model.get_input_embeddings().weight.device
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def sum_of_losses(model: Any, one: Mapping[str, Any]) -> Any:
    """Sum the negative log-likelihood over the trained tokens of a pass, in nats; a scalar tensor.

    Logits are made only at positions where some row is trained: with a large vocabulary and short answers that saves
    a good part of the time and most of the memory.
    """
    import torch

    targets_BT = one["labels"][:, 1:]
    keep_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    rest = {name: value for name, value in one.items() if name != "labels"}
    logits_BKV = model(**rest, logits_to_keep=keep_K, use_cache=False).logits.float()
    assert logits_BKV.shape[1] == len(keep_K), "this architecture does not know `logits_to_keep`"
    return torch.nn.functional.cross_entropy(
        logits_BKV.flatten(0, 1), targets_BT[:, keep_K].flatten(), ignore_index=IGNORED, reduction="sum"
    )
