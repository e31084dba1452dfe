"""What the trained model does with the probes: to hold every copy against."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backprop.core.data.formats import Message
from backprop.core.fidelity import Reply
from backprop.core.probes import HARD_STRINGS, prompts_of
from backprop.engine.load import HfTokenizer
from backprop.errors import DataError

MOST_TOKENS, TOKENS_OF_ONE = 1024, 256
"""Tokens of all texts whose distributions are compared, and of one of them: V floats are kept of each."""
ASKED = 3
ANSWER_TOKENS = 48
REFUSED = "(the template refuses this)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What the trained model does with the probes."""

    texts: list[str]
    """Rendered conversations and hard strings."""
    ids: list[list[int]]
    """Of each text as it is, without tokens of its own."""
    plain_ids: list[list[int]]
    """Of each hard string, with the tokens that the tokenizer adds to a plain text."""
    prompts: list[tuple[list[Message], bool]]
    rendered: list[str]
    """Of each prompt; `REFUSED` where the template raises."""
    eos: int
    sequences: list[list[int]]
    """What `trained` and `base` hold the logits of: one array (T, V) for each."""
    trained: list[Any]
    base: list[Any]
    questions: list[str]
    replies: list[Reply]


def refer(model: Any, tokenizer: HfTokenizer, conversations: Sequence[Sequence[Message]]) -> Reference:
    """Ask the model with its adapter, and its base, all that a copy is going to be asked."""
    whole: Any = tokenizer.inner
    prompts = [one for messages in conversations for one in prompts_of(messages)]
    rendered = [render(tokenizer, messages, asks=asks) for messages, asks in prompts]
    chats = [render(tokenizer, messages, asks=messages[-1]["role"] == "user") for messages in conversations]
    texts = [*(text for text in chats if text != REFUSED), *HARD_STRINGS]
    ids = [[token.id for token in tokenizer.tokenize(text)] for text in texts]
    sequences: list[list[int]] = []
    for one in sorted(ids[: len(texts) - len(HARD_STRINGS)], key=len):
        if sum(map(len, sequences)) < MOST_TOKENS and len(one) > 1:
            sequences.append(one[:TOKENS_OF_ONE])
    questions = _questions(conversations)
    with model.disable_adapter():
        base = [logits(model, one) for one in sequences]
    return Reference(
        texts=texts,
        ids=ids,
        plain_ids=[[int(token) for token in whole(text)["input_ids"]] for text in HARD_STRINGS],
        prompts=prompts,
        rendered=rendered,
        eos=int(whole.eos_token_id),
        sequences=sequences,
        trained=[logits(model, one) for one in sequences],
        base=base,
        questions=questions,
        replies=[reply(model, tokenizer, question) for question in questions],
    )


def render(tokenizer: HfTokenizer, messages: Sequence[Message], *, asks: bool) -> str:
    """Apply the chat template, or say that it refuses these turns."""
    try:
        return tokenizer.render(messages, add_generation_prompt=asks)
    except DataError:
        return REFUSED


def logits(model: Any, ids: Sequence[int]) -> Any:
    """Give the logits of a text, of shape (T, V), float32."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        found = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    return found.float().cpu().numpy()


def reply(model: Any, tokenizer: HfTokenizer, question: str) -> Reply:
    """Answer a question greedily, with at most `ANSWER_TOKENS`."""
    import torch

    whole: Any = tokenizer.inner
    text = tokenizer.render([{"role": "user", "content": question}], add_generation_prompt=True)
    ids = torch.tensor([[token.id for token in tokenizer.tokenize(text)]], device=next(model.parameters()).device)
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=whole.pad_token_id,
    )[0, ids.shape[1] :]
    return Reply(text=str(whole.decode(found, skip_special_tokens=True)).strip(), stopped=len(found) < ANSWER_TOKENS)


def _questions(conversations: Sequence[Sequence[Message]]) -> list[str]:
    """Give the first questions that open a conversation by themselves."""
    opening = [str(one[0]["content"]) for one in conversations if one and one[0]["role"] == "user"]
    return list(dict.fromkeys(opening))[:ASKED]
