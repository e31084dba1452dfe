"""Conversations to token ids and a mask: the whole of supervision, in one place.

A mask says which tokens are trained on. It is derived by rendering the conversation turn by turn with the model's own
chat template and seeing what each turn adds to the text; never from marker strings, never from a template of our own.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import groupby, pairwise
from typing import Literal, NamedTuple, Protocol, cast

from backprop.core.data.formats import Conversation, Message
from backprop.core.data.sequences import Growing
from backprop.errors import DataError

TODAY = date(2024, 7, 26)
"""For templates that write the date, as Llama 3.2's does, and the day that it falls back to. Were it the day itself, a run could
not go on, be done again, or be held to its file, on the next."""


def strftime_now(f: str) -> str:
    """Write `TODAY` in a form; templates know this by its name."""
    return TODAY.strftime(f)


class Token(NamedTuple):
    """A token and the first character of the text that it stands for."""

    id: int
    start: int


class ChatTokenizer(Protocol):
    """What rendering needs of a tokenizer."""

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, object]] = (), add_generation_prompt: bool
    ) -> str:
        """Apply the model's chat template.

        Raises:
            DataError: If the template refuses these turns.
        """
        ...

    def tokenize(self, text: str) -> list[Token]:
        """Tokenise a rendered text as it is, adding nothing."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Tokenise plain text, with the tokens that begin and end a document."""
        ...

    def is_special(self, token: int) -> bool:
        """Say whether ``token`` is a control token, such as the end of a turn."""
        ...

    def special_texts(self) -> set[str]:
        """Give the texts that become control tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and, of the same length, whether each is trained on; with what an answer is weighed against."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    answers: int = 0
    """Answers of a conversation that are trained on."""
    ended: int = 0
    """Those of them whose last trained token is the special token that ends a turn."""
    question: str = ""
    """What the last answer answers."""
    rejected: "Example | None" = None
    """Of a preference: the answer to the same that is not wanted."""
    desirable: bool = True
    """Whether this answer is wanted."""
    mismatched: "Example | None" = None
    """Of a rated answer: another's answer to the same, from which it is told how far the model has moved at all."""
    references: tuple[float, ...] = ()
    """Log-likelihoods of the sides before training, in nats, summed over their trained tokens."""

    @property
    def sides(self) -> "tuple[Example, ...]":
        """Give all that goes through the model: this, then what it is weighed against."""
        return (self, *(side for side in (self.rejected, self.mismatched) if side))

    @property
    def num_tokens(self) -> int:
        """Count the tokens of all sides."""
        return sum(len(side.ids) for side in self.sides)

    @property
    def num_trained(self) -> int:
        """Count the trained tokens. The first token has nothing before it that could predict it."""
        return sum(self.mask[1:])


class Span(NamedTuple):
    """An answer in a rendered text: from its first character to the end of its turn."""

    start: int
    end: int


def encode(
    conversation: Conversation, tokenizer: ChatTokenizer, *, loss_on: Literal["assistant", "all"] = "assistant"
) -> list[Example]:
    """Supervise the assistant's words and the token that ends its turn, and nothing else.

    An answer that opens the conversation has nothing that asks for it: it is context. Of a preference or a rated answer,
    all that is given before is context too.

    Returns:
        One example; or one for each assistant turn, if the template rewrites earlier turns (dropping old reasoning,
        say), so that no single rendering shows every turn as the model would write it.

    Raises:
        DataError: If what the template puts before an answer differs from what it puts there when asking for one; or if
            several answers that are judged together would have to be rendered apart.
    """
    if not conversation.messages:
        ids = tokenizer.encode_text(conversation.text)
        return [Example(tuple(ids), (True,) * len(ids))]
    examples = _turns(conversation, conversation.messages, tokenizer, loss_on)
    if not conversation.num_given:
        return examples
    rejected = _turns(conversation, conversation.rejected, tokenizer, loss_on) if conversation.rejected else [None]
    if len(examples) > 1 or len(rejected) > 1:
        raise DataError(
            f"{conversation.place}: this model's chat template rewrites earlier turns, and several answers are judged "
            "together",
            hint="choose another model, or rows whose sides are one answer each",
        )
    return [replace(examples[0], rejected=rejected[0], desirable=conversation.desirable is not False)]


def _turns(
    conversation: Conversation, messages: Sequence[Message], tokenizer: ChatTokenizer, loss_on: str
) -> list[Example]:
    tools = conversation.tools
    text = tokenizer.render(messages, tools=tools, add_generation_prompt=False)
    if loss_on == "all":
        ids = [token.id for token in tokenizer.tokenize(text)]
        return [Example(tuple(ids), (True,) * len(ids))]

    spans: list[Span] = []
    alone: list[tuple[str, Span, str]] = []
    rewritten = False
    for number, message in enumerate(messages):
        if number == 0 or number < conversation.num_given or message["role"] != "assistant":
            continue
        prompt = tokenizer.render(messages[:number], tools=tools, add_generation_prompt=True)
        upto = text
        if number + 1 < len(messages):
            upto = tokenizer.render(messages[: number + 1], tools=tools, add_generation_prompt=False)
        if not upto.startswith(prompt):
            upto = _behind_a_closed_thought(prompt, upto, tokenizer)
        if not upto:
            raise DataError(
                f"{conversation.place}: turn {number + 1} is an answer, but this model's chat template puts something "
                "else before it than when it asks for one",
                hint="train with `--loss-on all`, or choose another model",
            )
        span = Span(len(prompt), len(upto))
        rewritten = rewritten or not text.startswith(upto)
        spans.append(span)
        question = messages[number - 1]["content"]
        alone.append((upto, span, question))
    if rewritten:
        return [_example(upto, [span], tokenizer, question) for upto, span, question in alone]
    return [_example(text, spans, tokenizer, alone[-1][2] if alone else "")]


def _behind_a_closed_thought(prompt: str, said: str, tokenizer: ChatTokenizer) -> str:
    """Put an answer behind the prompt that asks for it, if that ends in a thought of none, as Gemma 4's does; else give "".

    Such a prompt opens a thought by one control token and closes it by another, and the template leaves both out of what
    was said. Behind a thought that is open, the answer would be one.
    """
    tokens = tokenizer.tokenize(prompt)
    *_, opened, closed = [Token(-1, 0), Token(-1, 0), *(token for token in tokens if tokenizer.is_special(token.id))]
    if (
        not tokens
        or closed != tokens[-1]
        or opened.id in (-1, closed.id)
        or not said.startswith(prompt[: opened.start])
    ):
        return ""
    follows = tokenizer.tokenize(said[opened.start :])
    return "" if not follows or follows[0].id in (opened.id, closed.id) else prompt + said[opened.start :]


def _example(text: str, spans: Sequence[Span], tokenizer: ChatTokenizer, question: str) -> Example:
    """Mask the tokens that begin inside a span, up to the special token that ends its turn.

    A token that begins before the answer (a line break of the template merged with one of the answer) is context: when
    the model is asked, its prompt ends there, and it never writes that token.
    """
    tokens = tokenizer.tokenize(text)
    mask = [False] * len(tokens)
    ended = 0
    for span in spans:
        inside = [index for index, token in enumerate(tokens) if span.start <= token.start < span.end]
        end = next((index for index in reversed(inside) if tokenizer.is_special(tokens[index].id)), None)
        # After the end token, templates add a line break that the model never has to write.
        if end is not None and end < inside[-1] and text[tokens[end + 1].start : span.end].strip():
            end = None  # a special token amid the answer
        last = max(inside, default=-1) if end is None else end
        ended += end is not None
        for index in inside:
            mask[index] = index <= last
    return Example(tuple(token.id for token in tokens), tuple(mask), answers=len(spans), ended=ended, question=question)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Examples of a data set, and what encoding them cost."""

    examples: Sequence[Example]
    lengths: Sequence[int] = ()
    """Tokens of each side of each example."""
    trained: Sequence[int] = ()
    """Those of them that are trained on."""
    answers: int = 0
    ended: int = 0
    """Answers whose end is trained."""
    teaching: bool = True
    """Whether there is something to learn from every example."""
    dropped: int = 0
    alike: int = 0
    """Of the dropped: preferences whose sides the template makes alike."""
    tokens_cut: int = 0
    trained_tokens_cut: int = 0
    rewritten: int = 0
    """Conversations whose answers became examples of their own."""

    @property
    def tokens(self) -> int:
        """Count all tokens, of both sides of a preference."""
        return sum(self.lengths)

    @property
    def trained_tokens(self) -> int:
        """Count the trained tokens."""
        return sum(self.trained)

    @property
    def unended(self) -> int:
        """Count the answers whose end is not trained, so that the model would not learn to stop."""
        return self.answers - self.ended

    @property
    def longest(self) -> int:
        """Give the number of tokens of the longest side."""
        return max(self.lengths, default=0)


class _Collected:
    """Examples that are kept, and counted as they come."""

    def __init__(self, keep: Growing[Example] | None) -> None:
        self._keep = keep
        self._kept: Growing[Example] = [] if keep is None else keep
        self._lengths, self._trained = array("I"), array("I")
        self._answers, self._ended, self._teaching = 0, 0, True

    def add(self, example: Example) -> None:
        self._kept.append(example)
        self._teaching = self._teaching and _teaches(example)
        for side in example.sides:
            self._lengths.append(len(side.ids))
            self._trained.append(side.num_trained)
            self._answers += side.answers
            self._ended += side.ended

    def encoded(self, **counts: int) -> Encoded:
        return Encoded(
            examples=tuple(self._kept) if self._keep is None else cast(Sequence[Example], self._keep),
            lengths=self._lengths,
            trained=self._trained,
            answers=self._answers,
            ended=self._ended,
            teaching=self._teaching,
            **counts,
        )


def encode_all(
    conversations: Iterable[Conversation],
    tokenizer: ChatTokenizer,
    *,
    loss_on: Literal["assistant", "all"],
    keep: Growing[Example] | None = None,
) -> Encoded:
    """Encode every conversation, whole.

    Args:
        keep: Where the examples go; None for memory.
    """
    collected = _Collected(keep)
    rewritten = 0
    for conversation in conversations:
        examples = _encode_named(conversation, tokenizer, loss_on)
        rewritten += len(examples) > 1
        for example in examples:
            collected.add(example)
    return collected.encoded(rewritten=rewritten)


def _encode_named(
    conversation: Conversation, tokenizer: ChatTokenizer, loss_on: Literal["assistant", "all"]
) -> list[Example]:
    """Name the row in what goes wrong with it."""
    try:
        return encode(conversation, tokenizer, loss_on=loss_on)
    except DataError as error:
        if conversation.place in error.message:
            raise
        raise DataError(f"{conversation.place}: {error.message}", hint=error.hint) from error


def cut(encoded: Encoded, max_length: int, *, keep: Growing[Example] | None = None) -> Encoded:
    """Keep the first ``max_length`` tokens of each example, and drop those with nothing to train on; both counted.

    Args:
        keep: Where the examples go if any is cut or dropped; None for memory.

    Raises:
        DataError: If no example has a trained token left.
    """
    if encoded.examples and encoded.teaching and encoded.longest <= max_length:
        return encoded
    collected = _Collected(keep)
    kept = tokens = trained = alike = 0
    for example in encoded.examples:
        short = _sides_shortened(example, max_length)
        alike += _are_alike(example)
        tokens += short.num_tokens
        trained += sum(side.num_trained for side in short.sides)
        if _teaches(short):
            collected.add(short)
            kept += 1
    if not kept:
        raise DataError(
            f"none of the {len(encoded.examples)} examples has a token to train on within {max_length} tokens",
            hint="raise `--max-length`, and look at three rows with `--dry-run`",
        )
    return collected.encoded(
        dropped=len(encoded.examples) - kept,
        alike=alike,
        tokens_cut=encoded.tokens - tokens,
        trained_tokens_cut=encoded.trained_tokens - trained,
        rewritten=encoded.rewritten,
    )


def _teaches(example: Example) -> bool:
    """Say whether there is something to learn: trained tokens on each side, and sides that differ."""
    return not _are_alike(example) and all(side.num_trained for side in example.sides)


def _are_alike(example: Example) -> bool:
    return example.rejected is not None and example.ids == example.rejected.ids


def _sides_shortened(example: Example, max_length: int) -> Example:
    rejected = example.rejected and _shortened(example.rejected, max_length)
    return replace(_shortened(example, max_length), rejected=rejected)


def with_mismatched(
    examples: Sequence[Example], others: Sequence[Example], max_length: int, *, keep: Growing[Example] | None = None
) -> Sequence[Example]:
    """Give each rated answer another's beside it: the same prompt, answered as one of ``others`` that asks otherwise.

    From these KTO estimates how far the model has moved whatever it is asked (arXiv:2402.01306, section 4.1). Which
    answer it is depends on the data alone, so that a run that goes on later finds the same.

    Raises:
        DataError: If all of ``others`` ask the same.
    """
    made: Growing[Example] = [] if keep is None else keep
    asked = array("q", (hash(_prompt_of(other)) for other in others))
    following, runs = _next_that_differs(asked), _run_lengths(asked)
    for number, one in enumerate(examples):
        mine, place = hash(_prompt_of(one)), number % len(others)
        if asked[place] == mine:  # beyond the answers to this prompt, as far on as this stands among them
            place = (place + runs[place]) % len(others)
        if asked[place] == mine:
            place = following[place]
        made.append(replace(one, mismatched=_spliced(one, others[place], max_length)))
    return tuple(made) if keep is None else cast(Sequence[Example], keep)


def _prompt_of(example: Example) -> tuple[int, ...]:
    return example.ids[: example.mask.index(True)]


def _run_lengths(values: Sequence[int]) -> Sequence[int]:
    """Give for each place how many equal values stand together there."""
    lengths = [sum(1 for _ in run) for _, run in groupby(values)]
    return array("I", (length for length in lengths for _ in range(length)))


def _next_that_differs(values: Sequence[int]) -> Sequence[int]:
    """Give for each place the next one, after the last the first, that holds another value."""
    if all(value == values[0] for value in values):
        raise DataError(
            "all rated answers are to one prompt, and KTO needs those of others",
            hint="add rows, or use `--objective dpo`",
        )
    found = array("I", bytes(4 * len(values)))
    following = next(place for place, value in enumerate(values) if value != values[-1])
    for place in reversed(range(len(values))):
        if place + 1 < len(values) and values[place + 1] != values[place]:
            following = place + 1
        found[place] = following
    return found


def _spliced(one: Example, other: Example, max_length: int) -> Example:
    start, theirs = one.mask.index(True), other.mask.index(True)
    ids = (one.ids[:start] + other.ids[theirs:])[:max_length]
    return Example(ids, (one.mask[:start] + other.mask[theirs:])[:max_length])


def _shortened(example: Example, max_length: int) -> Example:
    if len(example.ids) <= max_length:
        return example
    mask = example.mask[:max_length]
    # An answer is whole if something that is not trained follows it.
    whole = sum(before and not after for before, after in pairwise(example.mask[: max_length + 1]))
    return replace(example, ids=example.ids[:max_length], mask=mask, ended=min(example.ended, whole))
