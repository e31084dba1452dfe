"""Examples to the tensors of forward passes: packed in rows without padding, or padded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backprop.core.data.pack import best_fit, even_rows
from backprop.core.data.render import Example
from backprop.engine.attention import Documents, sent

IGNORED = -100
"""The label that torch's cross-entropy skips."""
BESIDE = ("labels", "references", "desirable", "mismatched")
"""What a pass holds beside the arguments of the model."""


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
    ranks: int = 1
    """How many processes share the passes out: each is given as many, of about the same length, where there is enough."""
    recomputed: int | None = None
    """Layers whose activations are computed again on the way back; None for as many as the plan has."""
    offloaded: bool = False
    """Whether their inputs wait in main memory; counts where it is known how many these layers are."""


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
    groups = [(example,) for example in examples]
    return [as_pass([examples[number] for number in row], size) for row in rows_of(groups, size)]


def rows_of(groups: Sequence[Sequence[Example]], size: PassSize) -> list[list[int]]:
    """Share groups of examples out to forward passes, each group whole; give the numbers of the groups of each."""
    if size.packing:
        lengths = [sum(len(example.ids) for example in group) for group in groups]
        return best_fit(lengths, size.tokens) if size.ranks == 1 else even_rows(lengths, size.tokens, size.ranks)
    lengths = [max(len(example.ids) for example in group) for group in groups]
    ordered = sorted(range(len(groups)), key=lambda number: lengths[number])
    most = min(size.examples, math.ceil(len(ordered) / size.ranks))
    return [ordered[start : start + most] for start in range(0, len(ordered), most)]


def as_pass(examples: Sequence[Example], size: PassSize) -> dict[str, Any]:
    """Put examples, in their order, into one forward pass."""
    return packed(examples) if size.packing else padded(examples)


def packed(examples: Sequence[Example]) -> dict[str, Any]:
    """Put examples one after the other in a row of shape (1, T), each with positions of its own."""
    import numpy as np
    import torch

    assert all(len(example.ids) == len(example.mask) for example in examples)
    documents = Documents.of([len(example.ids) for example in examples])
    ids = torch.from_numpy(np.concatenate([np.asarray(example.ids, dtype=np.int64) for example in examples]))
    trained = torch.from_numpy(np.concatenate([np.asarray(example.mask, dtype=bool) for example in examples]))
    trained[documents.ends[:-1].long()] = False  # as in `labels_of`, which takes ten times as long
    return {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(length) for length in documents.lengths])[None],
        "labels": torch.where(trained, ids, IGNORED)[None],
        "documents": documents,
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


def inputs_on(one: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Give a pass with the tensors of its inputs on ``device``; not its labels: where logits are wanted can be told of these without waiting for a GPU."""
    return {
        name: sent(value, device) if hasattr(value, "to") and name != "labels" else value for name, value in one.items()
    }


def computing(model: Any, dtype: str) -> Any:
    """Give the context in which ``model`` computes in ``dtype``, whatever its weights and adapters are held in."""
    import torch

    device = model.get_input_embeddings().weight.device
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
