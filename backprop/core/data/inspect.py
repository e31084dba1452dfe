"""The data ledger: what a data set holds, before anything is trained on it.

Pure, and one pass over each part. It counts rows that say the same twice, rows that are also in the evaluation data, and
languages; it never changes or drops a row.

Near-duplicates are found by MinHash over shingles of five words: one permutation hashing with densification
(arXiv:1703.04664), banded (Leskovec et al., Mining of Massive Datasets, sec. 3.4).
"""

import json
import random
import re
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import blake2b
from operator import eq
from typing import Any, NamedTuple

from backprop.core.data.formats import Conversation, Message
from backprop.core.data.language import language_of
from backprop.core.data.sequences import Picked
from backprop.events import JSON

# Near-duplicates are looked for among at most this many rows, which take about 120 MiB.
NEAR_MOST = 100_000
# Shorter texts have too few shingles to be like each other.
NEAR_FEWEST_WORDS = 8
SHINGLE = 5
# 16 bands of 4 and this threshold find 92 % of pairs with Jaccard 0.8, and of 1000 with 0.42 not one.
BINS, BAND = 64, 4
ALIKE = 0.72
# Of the smallest shingles of two answers this share must be the same: answers may differ more than the whole, but must
# not be other answers, which a long shared context would hide. Answers under eight words must be equal.
ANSWER_SHINGLES, ANSWERS_ALIKE = 16, 0.25
# Rows of one bucket that are compared: a template shared by all rows must not make the work quadratic.
BUCKET_MOST = 16

Pair = tuple[str, str]
"""The places of two rows: the later one, and the one that it repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """What the training part holds, and what of it is also held out."""

    rows: int
    held_out: int
    duplicates: int
    """Rows that repeat an earlier row, but for white space."""
    duplicates_first: Pair | None
    near_duplicates: int
    """Rows that are nearly an earlier row, and answered alike; exact duplicates are not among them."""
    near_duplicates_first: Pair | None
    near_checked: int
    """Rows that were compared for near-duplicates: those of eight words or more, without exact duplicates; in a large set
    a sample of these by content hash."""
    overlap: int
    """Held-out rows that are also trained on."""
    overlap_first: Pair | None
    near_overlap: int
    """Held-out rows that are nearly a row that is trained on."""
    near_overlap_first: Pair | None
    same_question: int
    """Rows that ask what an earlier row asks, with the same turns before, and answer otherwise."""
    same_question_first: Pair | None
    contradictions: int
    """Preferences and rated answers that an earlier row judges the other way: the same answers to the same."""
    contradictions_first: Pair | None
    languages: Mapping[str, int]
    """Rows by guessed language, the most frequent first."""

    def to_json(self) -> dict[str, JSON]:
        """Give the ledger as plain JSON values."""
        plain: dict[str, JSON] = json.loads(json.dumps(asdict(self)))
        return plain

    def warnings(self) -> tuple[str, ...]:
        """Say what the user should look at; nothing if all is fine."""
        trained = f"of {self.rows} rows"
        compared = f"of {self.near_checked} compared rows"
        held_out = f"of {self.held_out} evaluation rows"
        flatter = "the evaluation would flatter"
        findings = (
            (self.duplicates, f"{trained} are exact duplicates", self.duplicates_first),
            (self.near_duplicates, f"{compared} are near-duplicates", self.near_duplicates_first),
            (self.overlap, f"{held_out} are also in the training data: {flatter}", self.overlap_first),
            (self.near_overlap, f"{held_out} are nearly in the training data: {flatter}", self.near_overlap_first),
            (self.same_question, f"{trained} answer a question otherwise than a row before", self.same_question_first),
            (
                self.contradictions,
                f"{trained} judge the same answers otherwise than a row before",
                self.contradictions_first,
            ),
        )
        return tuple(f"{count} {what}, first: {pair[0]} = {pair[1]}" for count, what, pair in findings if pair)


@dataclass(frozen=True, slots=True)
class Bucket:
    """How many lengths are at least ``low`` and below ``high``."""

    low: int
    high: int
    count: int


def inspect(train: Sequence[Conversation], held_out: Sequence[Conversation], *, near_most: int = NEAR_MOST) -> Ledger:
    """Read both parts once and give their ledger."""
    import numpy as np

    trained, held = _read(train, near_most), _read(held_out, near_most)
    digests, others = (np.array(part.digests, np.uint64) for part in (trained, held))
    first = _first_alike(digests)
    repeated = first != np.arange(len(digests))
    overlap = np.isin(others, digests)
    asked, answered = (np.array(values, np.uint64) for values in (trained.asked, trained.answered))
    asking: Any = np.flatnonzero(~repeated & (asked != 0))
    first_asked = asking[_first_alike(asked[asking])]
    differing: Any = answered[asking] != answered[first_asked]
    other_answers, contradicting = (differing & (trained.judged == judged) for judged in (False, True))
    sketches = list(trained.sketches.values())
    held_sketched = np.array([*held.sketches], np.uint64)
    new = [held.sketches[int(digest)] for digest in held_sketched[~np.isin(held_sketched, digests)]]
    near, near_overlap = _alike(sketches, sketches), _alike(sketches, new)

    def pair(later: Any, places: Sequence[Conversation], earlier: Callable[[int], int]) -> Pair | None:
        if not later.any():
            return None
        number = int(later.argmax())
        return places[number].place, train[earlier(number)].place

    return Ledger(
        rows=len(digests),
        held_out=len(others),
        duplicates=int(repeated.sum()),
        duplicates_first=pair(repeated, train, lambda number: int(first[number])),
        near_duplicates=len(near),
        near_duplicates_first=_first(sketches, sketches, near),
        near_checked=len(sketches),
        overlap=int(overlap.sum()),
        overlap_first=pair(overlap, held_out, lambda number: int((digests == others[number]).argmax())),
        near_overlap=len(near_overlap),
        near_overlap_first=_first(sketches, new, near_overlap),
        same_question=int(other_answers.sum()),
        same_question_first=pair(other_answers, Picked(train, asking), lambda number: int(first_asked[number])),
        contradictions=int(contradicting.sum()),
        contradictions_first=pair(contradicting, Picked(train, asking), lambda number: int(first_asked[number])),
        languages=dict(trained.languages.most_common()),
    )


def _first_alike(digests: Any) -> Any:
    """Give for each digest the number of the first that is the same."""
    import numpy as np

    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    return first[which]


class _Sketch(NamedTuple):
    """A row to compare; ``answer`` holds the smallest shingles of the answer, few or none if it is short."""

    place: str
    rating: bool | None
    whole: "array[int]"
    answer: "array[int]"
    answer_digest: int


class _Parts(NamedTuple):
    """A conversation by what its turns are for: identities to compare exactly, and the words that were said."""

    order: str
    asked: str
    answered: str
    question: str
    answer: str


@dataclass(kw_only=True, slots=True)
class _Part:
    """What is remembered of the rows of a part: 24 bytes each, besides the sketches."""

    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    asked: "array[int]" = field(default_factory=lambda: array("Q"))
    """Of what is asked, or of the answers that are judged and what they answer; 0 where nothing is."""
    answered: "array[int]" = field(default_factory=lambda: array("Q"))
    """Of the answer, or of how they are judged."""
    judged: bool = False
    """Whether these are preferences or rated answers."""
    sketches: dict[int, _Sketch] = field(default_factory=dict[int, _Sketch])
    languages: Counter[str] = field(default_factory=Counter[str])


def _read(conversations: Iterable[Conversation], near_most: int) -> _Part:
    part = _Part()
    # Rows with a digest below this are compared; it halves whenever they become too many.
    below = 2**64
    for conversation in conversations:
        parts = _parts_of(conversation)
        part.languages[language_of(f"{parts.question}\n{parts.answer}")] += 1
        digest = _content(parts)
        part.digests.append(digest)
        part.judged = part.judged or bool(conversation.num_given)
        asked, answered = _verdict(conversation) if conversation.num_given else (parts.asked, parts.answered)
        part.asked.append(_digest(asked) if asked else 0)
        part.answered.append(_digest(answered))
        if digest >= below or digest in part.sketches:
            continue
        sketch = _sketch_of(parts, conversation)
        if sketch:
            part.sketches[digest] = sketch
        while len(part.sketches) > near_most:
            below //= 2
            part.sketches = {digest: sketch for digest, sketch in part.sketches.items() if digest < below}
    return part


def _parts_of(conversation: Conversation) -> _Parts:
    text = conversation.text
    if not conversation.messages:
        return _Parts(order="", asked="", answered=_one_space(text), question="", answer=text)
    asked: list[str] = []
    answered: list[str] = []
    question: list[str] = []
    answer: list[str] = []
    # A preference is another one where another answer is rejected, and a rating where it is the other.
    turns = (*conversation.messages, *conversation.rejected[conversation.num_given :])
    for message in turns:
        is_answer = message["role"] == "assistant"
        (answered if is_answer else asked).append(_identity(message))
        # A system turn is often that of all rows, and would make them alike.
        if message["role"] != "system":
            (answer if is_answer else question).append(message["content"])
    return _Parts(
        order=" ".join((*(message["role"] for message in turns), str(conversation.desirable or ""))),
        asked="\0".join(asked),
        answered="\0".join(answered),
        question="\n".join(question),
        answer="\n".join(answer),
    )


def _verdict(conversation: Conversation) -> tuple[str, str]:
    """Give what is judged, whichever answer is wanted, and how it is judged."""
    given = conversation.num_given
    before, *sides = (
        "\0".join(map(_identity, turns))
        for turns in (conversation.messages[:given], conversation.messages[given:], conversation.rejected[given:])
    )
    judged = sides[0] if conversation.rejected else str(conversation.desirable)
    return "\0\0".join((before, *sorted(sides))), judged


def _identity(message: Message) -> str:
    """Give all that a turn says, with what it holds beside its text, such as calls of tools."""
    more = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    shown = json.dumps(more, sort_keys=True, default=str) if more else ""
    return f"{message['role']} {_one_space(message['content'])}\0{shown}"


def _one_space(text: str) -> str:
    return " ".join(text.split())


def identity(conversation: Conversation) -> int:
    """Hash what its turns say, but for white space: 64 bits."""
    return _content(_parts_of(conversation))


def _content(parts: _Parts) -> int:
    return _digest(f"{parts.order}\0{parts.asked}\0{parts.answered}")


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


# In scripts without spaces between words, each character counts as one.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_word_hash = lru_cache(maxsize=1 << 16)(_digest)
# For each bin, the order of bins to borrow from if it is empty.
_PROBES = [random.Random(own).sample(range(BINS), BINS) for own in range(BINS)]


def _sketch_of(parts: _Parts, conversation: Conversation) -> _Sketch | None:
    question = _WORD.findall(parts.question.lower())
    answer = _WORD.findall(parts.answer.lower())
    if len(question) + len(answer) < NEAR_FEWEST_WORDS:
        return None
    words = [_word_hash(word) for word in (*question, *answer)]
    # The hash of a tuple of integers is not salted: it is the same in each run.
    shingles = [hash(shingle) >> 32 & 0xFFFFFFFF for shingle in zip(*(words[i:] for i in range(SHINGLE)), strict=False)]
    return _Sketch(
        place=conversation.place,
        rating=conversation.desirable,
        whole=_signature(shingles),
        answer=array("I", sorted(shingles[len(question) :])[:ANSWER_SHINGLES]),
        answer_digest=_digest(parts.answered),
    )


def _signature(shingles: Iterable[int]) -> "array[int]":
    """Give the smallest shingle of each bin. The share of equal ones estimates the Jaccard similarity of two texts."""
    # Of the shingles of a bin, the last one written, which is the smallest, stays.
    smallest = {shingle * BINS >> 32: shingle for shingle in sorted(shingles, reverse=True)}
    return array(
        "I",
        [
            smallest[own] if own in smallest else next(smallest[one] for one in _PROBES[own] if one in smallest)
            for own in range(BINS)
        ],
    )


def _alike(known: Sequence[_Sketch], asked: Sequence[_Sketch]) -> dict[int, int]:
    """Map the index of each row of ``asked`` that is nearly a row of ``known`` to that row's index.

    If both are the same rows, each is compared with those before it. Answers that are rated otherwise are not alike.
    """
    found: dict[int, int] = {}
    for start in range(0, BINS, BAND):
        buckets: defaultdict[tuple[bool | None, bytes], list[int]] = defaultdict(list)
        for index, sketch in enumerate(known):
            bucket = buckets[sketch.rating, sketch.whole[start : start + BAND].tobytes()]
            if len(bucket) < BUCKET_MOST:
                bucket.append(index)
        for index, sketch in enumerate(asked):
            if index in found:
                continue
            for other in buckets.get((sketch.rating, sketch.whole[start : start + BAND].tobytes()), ()):
                if known is asked and other >= index:
                    break
                if _is_near(known[other], sketch):
                    found[index] = other
                    break
    return found


def _is_near(one: _Sketch, other: _Sketch) -> bool:
    if sum(map(eq, one.whole, other.whole)) < ALIKE * BINS:
        return False
    if one.answer_digest == other.answer_digest:
        return True
    fewer = min(len(one.answer), len(other.answer))
    return fewer > NEAR_FEWEST_WORDS - SHINGLE and len({*one.answer} & {*other.answer}) >= ANSWERS_ALIKE * fewer


def _first(known: Sequence[_Sketch], asked: Sequence[_Sketch], found: Mapping[int, int]) -> Pair | None:
    if not found:
        return None
    index = min(found)
    return asked[index].place, known[found[index]].place


def histogram(lengths: Sequence[int], *, buckets: int = 12) -> tuple[Bucket, ...]:
    """Count ``lengths`` (none below 0) in at most ``buckets`` buckets with round edges.

    The buckets have one width of 1, 2 or 5 times a power of ten; or, if the longest is over 50 times the shortest, each
    is as many times the one before, a power of two.
    """
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    edges = _doubling_edges(low, high, buckets) if high > 50 * max(low, 1) else _even_edges(low, high, buckets)
    counts = Counter(bisect_right(edges, length) - 1 for length in lengths)
    return tuple(Bucket(edges[i], edges[i + 1], counts[i]) for i in range(len(edges) - 1))


def _even_edges(low: int, high: int, buckets: int) -> list[int]:
    exponent = 0
    while True:
        for digit in (1, 2, 5):
            width = digit * 10**exponent
            first = low // width * width
            if high < first + buckets * width:
                return list(range(first, high + width + 1, width))
        exponent += 1


def _doubling_edges(low: int, high: int, buckets: int) -> list[int]:
    factor = 2
    while True:
        first = 1
        while first * factor <= low:
            first *= factor
        edges = [first if low else 0]
        edge = first
        while edge <= high:
            edge *= factor
            edges.append(edge)
        if len(edges) - 1 <= buckets:
            return edges
        factor *= 2
