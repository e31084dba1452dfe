"""Conversations to token ids and a mask: the whole of supervision, in one place.

A mask says which tokens are trained on. It is derived by rendering the conversation turn by turn with the model's own
chat template and seeing what each turn adds; never from marker strings, never from a template of our own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from backprop.core.data.formats import Conversation, Message
from backprop.errors import DataError


class ChatTokenizer(Protocol):
    """What rendering needs of a tokenizer."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """Apply the model's chat template and tokenise."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Tokenise plain text, with the tokens that begin and end a document."""
        ...

    def is_special(self, token: int) -> bool:
        """Say whether ``token`` is a control token, such as the end of a turn."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and, of the same length, whether each is trained on."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]

    @property
    def num_trained(self) -> int:
        """Count the trained tokens. The first token has nothing before it that could predict it."""
        return sum(self.mask[1:])


def encode(
    conversation: Conversation, tokenizer: ChatTokenizer, *, loss_on: Literal["assistant", "all"] = "assistant"
) -> list[Example]:
    """Supervise the assistant's words and the token that ends its turn, and nothing else.

    Returns:
        One example; or one for each assistant turn, if the template rewrites earlier turns (dropping old reasoning,
        say), so that no single rendering shows every turn as the model would write it.

    Raises:
        DataError: If what the template puts before an answer differs from what it puts there when asking for one.
    """
    if not conversation.messages:
        ids = tokenizer.encode_text(conversation.text)
        return [Example(tuple(ids), (True,) * len(ids))]
    messages = conversation.messages
    if loss_on == "all":
        ids = tokenizer.render(messages, add_generation_prompt=False)
        return [Example(tuple(ids), (True,) * len(ids))]

    # Where an answer's text ends and its turn's end token follows does not depend on the words.
    ids: list[int] = []
    mask: list[bool] = []
    for number, message in enumerate(messages):
        upto = tokenizer.render(messages[: number + 1], add_generation_prompt=False)
        if upto[: len(ids)] != ids:
            return _one_example_per_answer(conversation, tokenizer)
        mask += [False] * (len(upto) - len(mask))
        if message["role"] == "assistant":
            span = _answer_span(messages, number, upto, tokenizer)
            if span is None:
                raise _no_mask(conversation, number)
            mask[span[0] : span[1]] = [True] * (span[1] - span[0])
        ids = upto
    return [Example(tuple(ids), tuple(mask))]


def _one_example_per_answer(conversation: Conversation, tokenizer: ChatTokenizer) -> list[Example]:
    examples: list[Example] = []
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        ids = tokenizer.render(conversation.messages[: number + 1], add_generation_prompt=False)
        span = _answer_span(conversation.messages, number, ids, tokenizer)
        if span is None:
            raise _no_mask(conversation, number)
        start, end = span
        examples.append(Example(tuple(ids), tuple(start <= position < end for position in range(len(ids)))))
    return examples


def _answer_span(
    messages: Sequence[Message], number: int, ids: list[int], tokenizer: ChatTokenizer
) -> tuple[int, int] | None:
    """Find where answer ``number`` starts and ends (its end token included) in ``ids``.

    Returns:
        None if ``ids`` does not begin with the prompt that would have asked for this answer.
    """
    prompt = tokenizer.render(messages[:number], add_generation_prompt=True)
    if ids[: len(prompt)] != prompt:
        return None
    end = len(ids)
    # After the end token, templates add a line break that the model never has to write.
    while end > len(prompt) and not tokenizer.is_special(ids[end - 1]):
        end -= 1
    return (len(prompt), end if end > len(prompt) else len(ids))


def _no_mask(conversation: Conversation, number: int) -> DataError:
    return DataError(
        f"{conversation.place}: turn {number + 1} is an answer, but this model's chat template puts something else "
        "before it than when it asks for one",
        hint="train with `--loss-on all`, or choose another model",
    )


def cut(example: Example, max_length: int) -> Example:
    """Keep the first ``max_length`` tokens."""
    return Example(example.ids[:max_length], example.mask[:max_length])


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Examples of a data set, and what encoding them cost."""

    examples: tuple[Example, ...]
    dropped: int
    tokens_cut: int
    rewritten: int

    @property
    def tokens(self) -> int:
        """Count all tokens."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        """Count the trained tokens."""
        return sum(example.num_trained for example in self.examples)

    @property
    def longest(self) -> int:
        """Give the number of tokens of the longest example; 0 if there is none."""
        return max((len(example.ids) for example in self.examples), default=0)


def encode_all(
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    *,
    loss_on: Literal["assistant", "all"],
    max_length: Callable[[int], int],
) -> Encoded:
    """Encode every conversation, cut to length, and drop examples with no trained token, counted.

    Args:
        max_length: From the length of the longest example to the tokens that each may keep.

    Raises:
        DataError: If no example has a trained token.
    """
    whole: list[Example] = []
    rewritten = 0
    for conversation in conversations:
        examples = encode(conversation, tokenizer, loss_on=loss_on)
        rewritten += len(examples) > 1
        whole += examples
    limit = max_length(max(len(example.ids) for example in whole))
    short = [cut(example, limit) for example in whole]
    kept = tuple(example for example in short if example.num_trained)
    if not kept:
        raise DataError(
            f"none of the {len(whole)} examples has a token to train on within {limit} tokens",
            hint="raise `--max-length`",
        )
    lost = sum(len(example.ids) for example in whole) - sum(len(example.ids) for example in short)
    return Encoded(examples=kept, dropped=len(whole) - len(kept), tokens_cut=lost, rewritten=rewritten)
