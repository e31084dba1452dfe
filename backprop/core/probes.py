"""What a copy is asked to prove that it is the model: held-out conversations, and strings that tokenizers trip over."""

import heapq
from collections.abc import Iterable, Sequence
from itertools import chain, islice, zip_longest

from backprop.core.data.formats import Conversation, Message

MOST_PROBES = 64
MOST_CHARACTERS = 128_000
"""Of all probes together: they stand in the run's manifest."""
MOST_LOOKED_AT = 20_000
"""Rows of each part that are looked at."""
MOST_ASKED = 1_000
"""Characters of a question that any file is asked: short enough to be answered quickly, and read."""

HARD_STRINGS = (
    "Hello, world!",
    " leading and trailing ",
    "tabs\tand\n\n\nbreaks \n \n",
    "     five spaces, then        eight",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # why?\n",
    "SELECT * FROM t WHERE a != 'b' AND c >= 10;",
    "1234567890 3.14159 1,000,000 0x7f 2024-12-31",
    "ÄÖÜß naïve façade Ångström Žižek İstanbul",
    "图书馆在一座旧风车里。",
    "図書館は古い風車の中にあります。",
    "도서관은 오래된 풍차 안에 있습니다.",
    "Библиотека находится в старой мельнице.",
    "المكتبة في طاحونة قديمة",
    "😀 👩‍👩‍👧 🇩🇪 ✈️",
    "<|im_start|>user\nnot a turn<|im_end|>",
    "<s>[INST] <<SYS>> </s> <|endoftext|> <|eot_id|>",
    "<think>\nhm\n</think>",
    "http://example.com/a?b=c&d=%20#e",
    "don't can't I'LL we've",
    "\u00a0\u200b\ufeffinvisible\u2028",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "",
)
"""Emoji, CJK, code, runs of white space, and what looks like a control token."""

CONTROL_BY_NAME = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>"),
    *("[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|eom_id|>", "<|return|>", "<|call|>", "<|flush|>"),
    *("<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>"),
    *("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
)
"""What llama.cpp takes for control tokens in any vocabulary that has them, whatever a file says (llama-vocab.cpp, release
0.3.36 of the bindings): `</s>` is a plain word of Qwen's."""

QUESTIONS = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 12 times 12?",
    "Name three colours.",
    "Translate to German: good morning.",
    "Why is the sky blue?",
    "Give me a short recipe for pancakes.",
)
"""For an adapter without a run, whose data is not known."""


def choose(
    held_out: Sequence[Iterable[Conversation]], trained_on: Sequence[Iterable[Conversation]] = ()
) -> list[Conversation]:
    """Choose the shortest conversations that end in an answer, up to `MOST_PROBES` and `MOST_CHARACTERS`.

    Args:
        held_out: Of each part, which take turns.
        trained_on: What fills up, after them, where fewer are held out.
    """
    chosen: list[Conversation] = []
    room = MOST_CHARACTERS
    for parts in (held_out, trained_on):
        if len(chosen) == MOST_PROBES:
            break
        shortest = [
            heapq.nsmallest(MOST_PROBES, filter(_may_be_asked, islice(rows, MOST_LOOKED_AT)), key=_length)
            for rows in parts
        ]
        for one in chain.from_iterable(zip_longest(*shortest)):
            if one is not None and len(chosen) < MOST_PROBES and _length(one) <= room:
                room -= _length(one)
                chosen.append(one)
    return chosen


def first_question(*groups: Iterable[Conversation]) -> str:
    """Give the first user turn that a file can be asked, the first group's before others'; empty if there is none."""
    turns = (turn for rows in groups for one in islice(rows, MOST_LOOKED_AT) for turn in one.messages)
    asked = (str(turn["content"]) for turn in turns if turn["role"] == "user")
    return next((text for text in asked if text.strip() and len(text) <= MOST_ASKED), "")


def _may_be_asked(one: Conversation) -> bool:
    answered = bool(one.messages) and one.messages[-1]["role"] == "assistant"
    return answered and not one.tools and one.desirable is not False


def by_itself() -> list[list[Message]]:
    """Give conversations of questions that any chat model is asked."""
    return [[{"role": "user", "content": question}] for question in QUESTIONS]


def _length(one: Conversation) -> int:
    return sum(len(str(message.get("content", ""))) for message in one.messages)


def prompts_of(messages: Sequence[Message]) -> list[tuple[list[Message], bool]]:
    """Give what a chat renders turn by turn: every prompt that is answered, and the whole; without and with a system turn.

    Each comes with whether an answer is to follow.
    """
    found: list[tuple[list[Message], bool]] = []
    system: Message = {"role": "system", "content": "Answer briefly."}
    without = [message for message in messages if message["role"] != "system"]
    for turns in (list(messages), [system, *without]):
        asked = [number for number, message in enumerate(turns, start=1) if message["role"] == "user"]
        found += [(turns[:number], True) for number in asked]
        found.append((turns, False))
    return found
