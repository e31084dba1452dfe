"""What the trained model does with the probes: to hold every copy against."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

from backprop.core.data.formats import Message
from backprop.core.fidelity import Reply
from backprop.core.placement import Placement
from backprop.core.probes import CONTROL_BY_NAME, HARD_STRINGS, prompts_of
from backprop.engine.load import HfTokenizer, load_base, load_tokenizer
from backprop.engine.merge import compute_in_float32
from backprop.errors import DataError

MOST_TOKENS, TOKENS_OF_ONE = 1024, 256
"""Tokens of all texts whose distributions are compared, and of one of them."""
MOST_BYTES = 2**28
"""Of their logits, in each of three models: fewer tokens of a large vocabulary."""
ASKED = 3
ANSWER_TOKENS = 48
REFUSED = "(the template refuses this)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What the trained model does with the probes."""

    texts: list[str]
    """Rendered conversations, and `hard`."""
    ids: list[list[int]]
    """Of each text as it is, without tokens of its own."""
    hard: list[str]
    """Hard strings, each behind a control token."""
    plain_ids: list[list[int]]
    """Of each of `hard`, with the tokens that the tokenizer adds to a plain text."""
    taken_out: tuple[str, ...]
    """Words that the texts are without, since llama.cpp reads them otherwise in any file."""
    cut: int
    """Conversations among them that held one."""
    prompts: list[tuple[list[Message], bool]]
    rendered: list[str]
    """Of each prompt; `REFUSED` where the template raises."""
    eos: int
    vocabulary: int
    """Tokens that the model may answer with."""
    sequences: list[list[int]]
    """What `trained` and `base` hold the logits of: one array (T, V) for each."""
    trained: list[Any]
    base: list[Any]
    rounded: list[Any]
    """What `trained` become by what llama.cpp rounds to 16 bits: what no copy can be held to."""
    questions: list[list[Message]]
    replies: list[Reply]


def refer(model: Any, tokenizer: HfTokenizer, conversations: Sequence[Sequence[Message]]) -> Reference:
    """Ask the model with its adapter, and its base, all that a copy is going to be asked."""
    whole: Any = tokenizer.inner
    prompts = [one for messages in conversations for one in prompts_of(messages)]
    rendered = [render(tokenizer, messages, asks=asks) for messages, asks in prompts]
    chats = [
        (render(tokenizer, messages, asks=messages[-1]["role"] == "user"), messages[-1]["role"] == "assistant")
        for messages in conversations
    ]
    answered = [ends for text, ends in chats if text != REFUSED]
    foreign, said = foreign_words(tokenizer), [text for text, _ in chats if text != REFUSED]
    # Behind a control token, where the words of a chat stand: some tokenizers treat the start of a text in another way.
    hard = [f"{whole.eos_token}{_without(foreign, text)}" for text in HARD_STRINGS]
    # Some tokenizers compose characters first, which llama.cpp never does: docs/export.md.
    texts = [normalize("NFC", text) for text in (*(_without(foreign, text) for text in said), *hard)]
    ids = [[token.id for token in tokenizer.tokenize(text)] for text in texts]
    vocabulary = int(model.config.get_text_config().vocab_size)
    sequences = to_compare(ids[: len(texts) - len(hard)], vocabulary=vocabulary)
    questions = _questions(tokenizer, conversations)
    whole_chats = [ids_of for ids_of, one in zip(ids, answered, strict=False) if one]
    ends = _ends(model, tokenizer, whole_chats)
    with model.disable_adapter():
        base = [logits(model, one) for one in sequences]
    with rounding_to_16_bits(model):
        rounded = logits_together(model, sequences)
    return Reference(
        texts=texts,
        ids=ids,
        hard=hard,
        plain_ids=[[int(token) for token in whole(text)["input_ids"]] for text in hard],
        taken_out=tuple(word for word in foreign if any(word in text for text in (*said, *HARD_STRINGS))),
        cut=sum(any(word in text for word in foreign) for text in said),
        prompts=prompts,
        rendered=rendered,
        eos=int(whole.eos_token_id),
        vocabulary=vocabulary,
        sequences=sequences,
        trained=[logits(model, one) for one in sequences],
        base=base,
        rounded=rounded,
        questions=questions,
        replies=[reply(model, tokenizer, messages, ends) for messages in questions],
    )


def foreign_words(tokenizer: HfTokenizer) -> list[str]:
    """Give the plain words of a vocabulary that llama.cpp takes for control tokens by their names."""
    whole: Any = tokenizer.inner
    words, added = whole.get_vocab(), whole.get_added_vocab()
    return [name for name in CONTROL_BY_NAME if name in words and name not in added]


def _without(words: Sequence[str], text: str) -> str:
    for word in words:
        text = text.replace(word, "")
    return text


def rendered_ids(tokenizer: HfTokenizer, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Give the tokens of each conversation that the template takes."""
    texts = [render(tokenizer, messages, asks=messages[-1]["role"] == "user") for messages in conversations]
    return [[token.id for token in tokenizer.tokenize(normalize("NFC", text))] for text in texts if text != REFUSED]


def to_compare(texts: Sequence[list[int]], *, vocabulary: int) -> list[list[int]]:
    """Choose the shortest texts, cut, whose logits are compared."""
    most = min(MOST_TOKENS, MOST_BYTES // (4 * vocabulary))
    chosen: list[list[int]] = []
    for one in sorted(texts, key=len):
        room = min(TOKENS_OF_ONE, most - sum(map(len, chosen)))
        if room > 1 and len(one) > 1:
            chosen.append(one[:room])
    return chosen


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


def logits_together(model: Any, texts: Sequence[Sequence[int]]) -> list[Any]:
    """Give the logits of each text, of shape (T, V), float32, by few passes: what follows a text changes nothing in it."""
    import torch

    device = next(model.parameters()).device
    most = MOST_BYTES // (4 * int(model.config.get_text_config().vocab_size))
    rows: list[list[Sequence[int]]] = []
    for text in texts:
        if not rows or (len(rows[-1]) + 1) * max(len(text), *map(len, rows[-1])) > most:
            rows.append([])
        rows[-1].append(text)
    found: list[Any] = []
    for row in rows:
        longest = max(map(len, row))
        filled = [[*text, *[0] * (longest - len(text))] for text in row]
        with torch.no_grad():
            logits_BTV = model(input_ids=torch.tensor(filled, device=device), use_cache=False).logits
        found += [one[: len(text)].float().cpu().numpy() for one, text in zip(logits_BTV, row, strict=True)]
    return found


# Names of the layers that make queries, keys and values.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")


@contextmanager
def rounding_to_16_bits(model: Any) -> Generator[None]:
    """Round to float16 what llama.cpp rounds with a file of f16.

    These are the merged weights, the inputs of every linear layer, and queries, keys and values.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    hooks: list[Any] = []
    adapted: set[int] = set()
    modules: dict[str, Any] = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, LoraLayer):
            layer: Any = module
            hooks += _merge_rounded(layer)
            adapted.add(id(layer.get_base_layer()))
        if name.rsplit(".", 1)[-1] in PROJECTIONS:
            hooks.append(modules[name].register_forward_hook(_narrow_output))
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda _, given: tuple(map(_narrowed, given))))
        # Weights of 16 bits are what they are in the file.
        plain = isinstance(module, torch.nn.Linear | torch.nn.Embedding) and ".lora_" not in name
        if plain and id(module) not in adapted and module.weight.dtype == torch.float32:
            hooks += _replace_weight(module, module, lambda module: _narrowed(module.weight.data))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _narrowed(tensor: Any) -> Any:
    return tensor.half().to(tensor.dtype)


def _narrow_output(_: object, __: object, found: Any) -> Any:
    return _narrowed(found)


def _merge_rounded(layer: Any) -> list[Any]:
    """Let a layer with an adapter beside its weight have, while it computes, a weight whose sum with the adapter is of 16 bits."""

    def rounded(base: Any) -> Any:
        learnt = layer.get_delta_weight(layer.active_adapters[0]).float()
        return _narrowed(base.weight.data.float() + learnt) - learnt

    return _replace_weight(layer, layer.get_base_layer(), rounded)


def _replace_weight(outer: Any, inner: Any, weight_of: Callable[[Any], Any]) -> list[Any]:
    """Let ``inner`` have another weight while ``outer``, which may be the same, computes; give the hooks."""
    held: list[Any] = []

    def replace(*_: object) -> None:
        held.append(inner.weight.data)
        inner.weight.data = weight_of(inner)

    def bring_back(*_: object) -> None:
        if held:
            inner.weight.data = held.pop()

    return [outer.register_forward_pre_hook(replace), outer.register_forward_hook(bring_back, always_call=True)]


def reply(
    model: Any, tokenizer: HfTokenizer, messages: Sequence[Message], ends: set[int], *, max_tokens: int = ANSWER_TOKENS
) -> Reply:
    """Answer with the likeliest token each time, until one of ``ends`` or the limit.

    Not with `generate`, which obeys what the base model's configuration says of repetition.
    """
    import torch

    whole: Any = tokenizer.inner
    device = next(model.parameters()).device
    ids = torch.tensor([prompt_ids(tokenizer, messages)], device=device)
    found: list[int] = []
    cache: Any = None
    with torch.no_grad():
        while len(found) < max_tokens:
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            token, cache = int(out.logits[0, -1].argmax()), out.past_key_values
            if token in ends:
                break
            found.append(token)
            ids = torch.tensor([[token]], device=device)
    text = str(whole.decode(found, skip_special_tokens=True)).strip()
    return Reply(text=text, stopped=len(found) < max_tokens, tokens=tuple(found))


def prompt_ids(tokenizer: HfTokenizer, messages: Sequence[Message]) -> list[int]:
    """Give the tokens of a prompt that is to be answered."""
    return [token.id for token in tokenizer.tokenize(tokenizer.render(messages, add_generation_prompt=True))]


def _questions(tokenizer: HfTokenizer, conversations: Sequence[Sequence[Message]]) -> list[list[Message]]:
    """Give the first conversations up to their first question, where the template takes it and it is short."""
    found: list[list[Message]] = []
    for messages in conversations:
        end = next((number for number, one in enumerate(messages, start=1) if one["role"] == "user"), 0)
        opening = list(messages[:end])
        if not opening or opening in found or render(tokenizer, opening, asks=True) == REFUSED:
            continue
        if len(prompt_ids(tokenizer, opening)) <= TOKENS_OF_ONE:
            found.append(opening)
    return found[:ASKED]


def _ends(model: Any, tokenizer: HfTokenizer, chats: Sequence[Sequence[int]]) -> set[int]:
    """Collect what ends an answer: for the model, for its tokenizer, and at the end of these conversations."""
    configured: Any = model.generation_config.eos_token_id
    known = [*configured] if isinstance(configured, list) else [configured]
    written = [next((token for token in reversed(ids) if tokenizer.is_special(token)), None) for ids in chats]
    whole: Any = tokenizer.inner
    return {int(end) for end in (*known, whole.eos_token_id, *written) if end is not None}


class Checkpoint:
    """A checkpoint on disk, loaded as anyone would load it, that can be asked as `edges.llama_cpp.Loaded` can."""

    def __init__(self, folder: Path, where: Placement, *, trust_remote_code: bool = False) -> None:
        self._model: Any = load_base(
            str(folder), dtype=where.dtype, device=where.device, trust_remote_code=trust_remote_code
        ).eval()
        if where.dtype != "float32":
            compute_in_float32(self._model)
        self._tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)

    def tokenize(self, text: str, *, plain: bool = False) -> list[int]:
        """Tokenise a text as it is; or a plain one, with the tokens that the tokenizer adds."""
        whole: Any = self._tokenizer.inner
        return [int(token) for token in whole(text, add_special_tokens=plain)["input_ids"]]

    @property
    def eos(self) -> int:
        """The token that ends a text."""
        whole: Any = self._tokenizer.inner
        return int(whole.eos_token_id)

    @property
    def vocabulary(self) -> int:
        """How many tokens the checkpoint has."""
        return int(self._model.config.get_text_config().vocab_size)

    def render(self, messages: Sequence[Message], *, asks: bool) -> str:
        """Apply the chat template; `REFUSED` if it refuses these turns."""
        return render(self._tokenizer, messages, asks=asks)

    def logits(self, ids: Sequence[int]) -> Any:
        """Give the logits of a text, of shape (T, V), float32."""
        return logits(self._model, ids)

    def reply(
        self, messages: Sequence[Message], *, max_tokens: int = ANSWER_TOKENS, expected: Reply | None = None
    ) -> Reply:
        """Answer a conversation greedily, until a token that the checkpoint itself names as an end; whatever is expected."""
        ends = _ends(self._model, self._tokenizer, [])
        return reply(self._model, self._tokenizer, messages, ends, max_tokens=max_tokens)
