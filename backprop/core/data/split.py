"""A held-out part, chosen by content: it stays the same when rows are added, and never overlaps with what is trained."""

import hashlib
import json
from array import array
from collections.abc import Sequence

from backprop.core.data.formats import Conversation
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
    content = json.dumps([messages, conversation.text], ensure_ascii=False, sort_keys=True)
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
