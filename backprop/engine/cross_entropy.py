"""What a model finds likely: the negative log-likelihood of trained tokens.

Where the logits are a frozen linear layer's output and nothing else, those of a whole pass are never held.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from backprop.engine.attention import sent
from backprop.engine.batches import BESIDE, IGNORED


def sum_of_losses(model: Any, one: Mapping[str, Any]) -> Any:
    """Sum the negative log-likelihood over the trained tokens of a pass, in nats; a scalar tensor.

    Logits are made only at positions where some row is trained: with a large vocabulary and short answers that saves
    a good part of the time and most of the memory.
    """
    losses_BK, _ = _cross_entropy(model, one)
    return losses_BK.sum()


def log_likelihoods(model: Any, one: Mapping[str, Any]) -> Any:
    """Sum the log-likelihood over the trained tokens of each document of a pass, in nats; of shape (D,)."""
    losses_BK, keep_K = _cross_entropy(model, one)
    return -_by_document(losses_BK, keep_K, one)


def surprises(model: Any, one: Mapping[str, Any]) -> Any:
    """Count the trained tokens of each document of a pass that are not the likeliest where they stand; of shape (D,).

    Without any, they are what a greedy answer would be.
    """
    arguments, targets_BK, keep_K = _kept(one)
    missed_BK = (model(**arguments).logits.argmax(dim=-1) != targets_BK) & (targets_BK != IGNORED)
    return _by_document(missed_BK.int(), keep_K, one)


def _by_document(values: Any, kept: Any, one: Mapping[str, Any]) -> Any:
    """Sum what stands at the kept positions, of shape (B, K), over each document of a pass; of shape (D,)."""
    import torch

    if "documents" not in one:
        return values.sum(dim=1)
    # Sums by index are not the same bits each time on a GPU, and a product with ones would be one of 16 bits.
    documents = one["documents"]
    documents_K = torch.bucketize(kept + 1, documents.ends[1:], right=True)
    numbers_D = torch.arange(len(documents.lengths), device=kept.device)
    return torch.where(documents_K == numbers_D[:, None], values, 0).sum(dim=1)


def trained_by_document(one: Mapping[str, Any]) -> Any:
    """Count the trained tokens of each document of a pass; of shape (D,)."""
    import torch

    trained_BT = one["labels"] != IGNORED
    if "documents" not in one:
        return trained_BT.sum(dim=1)
    return torch.stack([part.sum() for part in trained_BT[0].split(one["documents"].lengths)])


def _cross_entropy(model: Any, one: Mapping[str, Any]) -> tuple[Any, Any]:
    """Give the negative log-likelihood of each kept token, 0 where it is not trained, and which positions were kept."""
    import torch

    arguments, targets_BK, keep_K = _kept(one)
    hidden = _before_the_head(model, arguments)
    made = model(**arguments).logits if hidden is None else hidden
    assert made.shape[1] == len(keep_K), "this architecture does not know `logits_to_keep`"
    if hidden is not None:
        from backprop.engine.linear_cross_entropy import linear_cross_entropy

        losses = linear_cross_entropy(made.flatten(0, 1), model.get_output_embeddings(), targets_BK.flatten())
    else:
        losses = torch.nn.functional.cross_entropy(
            made.float().flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORED, reduction="none"
        )
    return losses.view_as(targets_BK), keep_K


def _kept(one: Mapping[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Give the model's arguments for the positions where some row is trained, what comes next there, and which they are."""
    targets_BT = one["labels"][:, 1:]
    keep_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    device = one["input_ids"].device
    targets_BK, keep_K = sent(targets_BT[:, keep_K], device), sent(keep_K, device)
    rest = {name: value for name, value in one.items() if name not in BESIDE}
    return {**rest, "logits_to_keep": keep_K, "use_cache": False}, targets_BK, keep_K


PLAIN_HEAD = "backprop_plain_head"
"""Where a model keeps whether its logits are a frozen linear layer's output and nothing else."""


def _before_the_head(model: Any, arguments: Mapping[str, Any]) -> Any:
    """Give what goes into the layer that makes the logits; None where that is trained, or they are scaled or capped."""
    import torch

    head = model.get_output_embeddings()
    known = getattr(model, PLAIN_HEAD, None)
    if known is False or type(head) is not torch.nn.Linear or head.weight.requires_grad:
        return None
    # If this was in vain, the pass that follows draws the same random numbers.
    with _passing_on(head) as given, torch.random.fork_rng(enabled=known is None):
        made = model(**arguments).logits
    if known is None and made.numel():
        known = len(given) == 1 and made.shape == given[0].shape and torch.equal(made, given[0].to(made.dtype))
        setattr(model, PLAIN_HEAD, known)
    return given[0] if known else None


@contextmanager
def _passing_on(layer: Any) -> Generator[list[Any]]:
    """Let ``layer`` give back what it is given, for the length of the block, and remember it."""
    given: list[Any] = []

    def pass_on(hidden: Any) -> Any:
        given.append(hidden)
        return hidden

    layer.forward = pass_on
    try:
        yield given
    finally:
        del layer.forward
