"""What a dry run shows of the data: the first examples as text, and which parts of it are trained on."""

from itertools import groupby
from typing import TYPE_CHECKING, Any

from backprop.console import colour_spans
from backprop.core.data.render import Example
from backprop.events import Examples
from backprop.verbs.prepare import Prepared

if TYPE_CHECKING:
    from backprop.engine.load import HfTokenizer


def show_examples(prepared: Prepared, *, count: int = 3) -> Examples:
    """Write the first examples as text, and say which parts of it are trained on."""
    shown = [
        (f"{number}{kind}", side)
        for number, example in enumerate(prepared.train.examples[:count], start=1)
        for kind, side in _kinds(example)
    ]
    spans = [_spans(side, prepared.tokenizer) for _, side in shown]
    texts = [
        f"--- example {name}: {side.num_trained} of {len(side.ids)} tokens trained\n{colour_spans(part, colour=False)}"
        for (name, side), part in zip(shown, spans, strict=True)
    ]
    return Examples(text="\n".join(texts), examples=spans, names=[name for name, _ in shown])


def _kinds(example: Example) -> list[tuple[str, Example]]:
    """Give the sides that are judged, each with what it is."""
    if example.rejected:
        return [(", chosen", example), (", rejected", example.rejected)]
    if example.mismatched:
        return [(", wanted" if example.desirable else ", unwanted", example)]
    return [("", example)]


def _spans(example: Example, tokenizer: "HfTokenizer") -> list[tuple[str, bool]]:
    whole: Any = tokenizer.inner
    tokens = zip(example.ids, example.mask, strict=True)
    groups = [(trained, [token for token, _ in group]) for trained, group in groupby(tokens, key=lambda pair: pair[1])]
    return [(str(whole.decode(ids, skip_special_tokens=False)), trained) for trained, ids in groups]
