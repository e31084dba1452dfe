"""Parts chosen by content: what is held out, and what of it chooses. They stay the same when rows are added, and never overlap."""

import hashlib
import json
from array import array
from collections.abc import Sequence

from backprop.core.data.formats import Conversation
from backprop.core.data.render import Example
from backprop.core.data.sequences import pick

# Below this many rows a held-out part would cost more than it tells.
FEWEST_ROWS = 200
DEFAULT_FRACTION = 0.05
# More held-out rows than this make evaluation slow without making it better.
MOST_HELD_OUT = 500


def hold_out(
    conversations: Sequence[Conversation], *, fraction: float | None
) -> tuple[Sequence[Conversation], Sequence[Conversation]]:
    """Split into a part to train on and a held-out part.

    Args:
        fraction: Share to hold out; None for the default, which holds nothing out of a small set.

    Returns:
        Both parts, in the order of ``conversations``. Equal conversations are always on the same side. The part to
        train on is never empty.
    """
    if fraction is None:
        enough = len(conversations) >= FEWEST_ROWS
        fraction = min(DEFAULT_FRACTION, MOST_HELD_OUT / len(conversations)) if enough else 0.0
    if not fraction:
        return conversations, ()
    kept, held = array("I"), array("I")
    for number, conversation in enumerate(conversations):
        (held if _position(conversation) < fraction else kept).append(number)
    return (pick(conversations, kept), pick(conversations, held)) if kept else (conversations, ())


def _position(conversation: Conversation) -> float:
    """Map the content to a number in [0, 1) that looks random and never changes."""
    # Answers to one prompt, of which one is wanted and one is not, must not be on both sides.
    messages = conversation.messages[: conversation.num_given or None]
    return _hashed(json.dumps([messages, conversation.text], ensure_ascii=False, sort_keys=True))


# Of the rows that a part is measured on, to choose between models: the scores are then of the others.
CHOOSING_FRACTION = 1 / 3


def choosing(examples: Sequence[Example], *, most: int, most_others: int) -> tuple[list[Example], list[Example]]:
    """Split into a part to choose between models on, and the others, whose scores are not flattered by the choice.

    Returns:
        The first ``most`` and ``most_others``. Equal examples are always on the same side, whatever is beside them.
    """
    chosen: list[Example] = []
    others: list[Example] = []
    for example in examples:
        side, room = (chosen, most) if _hashed(repr(example.ids)) < CHOOSING_FRACTION else (others, most_others)
        if len(side) < room:
            side.append(example)
        elif len(chosen) == most and len(others) == most_others:
            break
    return chosen, others


def _hashed(content: str) -> float:
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
