"""Masks: what is trained on, and nothing else."""

from collections.abc import Sequence

import pytest
from conftest import ForgetfulTokenizer, LetterTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from backprop.core.data.formats import Conversation, Message
from backprop.core.data.render import Token, cut, encode, encode_all
from backprop.errors import DataError


def conversation(*turns: tuple[str, str]) -> Conversation:
    messages = tuple(Message(role=role, content=content) for role, content in turns)  # type: ignore[typeddict-item]
    return Conversation(messages=messages, text="", shape="messages", place="data.jsonl, line 1")


def seen(tokenizer: LetterTokenizer, turns: Conversation, **options: str) -> list[str]:
    examples = encode(turns, tokenizer, **options)  # type: ignore[arg-type]
    return [
        "".join(tokenizer.shown(i) if m else "." for i, m in zip(example.ids, example.mask, strict=True))
        for example in examples
    ]


def test_supervises_every_answer_and_its_end_token(letters: LetterTokenizer) -> None:
    turns = conversation(("user", "hi"), ("assistant", "ho"), ("user", "hu"), ("assistant", "no"))
    assert seen(letters, turns) == ["......ho</a>.......no</a>."]


def test_a_line_break_after_the_end_token_is_not_trained(letters: LetterTokenizer) -> None:
    (example,) = encode(conversation(("user", "a"), ("assistant", "b")), letters)
    assert not example.mask[-1]
    assert example.ids[-1] == ord("\n")


def test_system_and_user_turns_are_never_trained(letters: LetterTokenizer) -> None:
    (shown,) = seen(letters, conversation(("system", "s"), ("user", "u"), ("assistant", "a")))
    assert shown.replace(".", "") == "a</a>"


def test_loss_on_all_trains_every_token(letters: LetterTokenizer) -> None:
    (example,) = encode(conversation(("user", "a"), ("assistant", "b")), letters, loss_on="all")
    assert all(example.mask)


def test_text_is_trained_whole_and_ended(letters: LetterTokenizer) -> None:
    (example,) = encode(Conversation(messages=(), text="abc", shape="text", place=""), letters)
    assert "".join(letters.shown(token) for token in example.ids) == "abc<end>"
    assert all(example.mask)


def test_a_template_that_rewrites_old_answers_gives_each_answer_its_own_rendering() -> None:
    tokenizer = ForgetfulTokenizer()
    turns = conversation(("user", "hi"), ("assistant", "ho"), ("user", "hu"), ("assistant", "no"))
    shown = seen(tokenizer, turns)
    assert [text.replace(".", "") for text in shown] == ["ho</a>", "no</a>"]


def test_a_template_that_puts_something_else_before_an_answer_is_refused() -> None:
    class Thinking(LetterTokenizer):
        def render(self, messages: object, *, tools: object = (), add_generation_prompt: bool) -> str:
            text = super().render(messages, add_generation_prompt=add_generation_prompt)  # type: ignore[arg-type]
            return text + "?" if add_generation_prompt else text

    with pytest.raises(DataError) as raised:
        encode(conversation(("user", "hi"), ("assistant", "ho")), Thinking())
    assert "line 1: turn 2" in raised.value.message


def test_an_answer_that_opens_the_conversation_is_context(letters: LetterTokenizer) -> None:
    """ShareGPT files hold many; no prompt asks for such an answer, and most templates refuse to render none."""
    (shown,) = seen(letters, conversation(("assistant", "hi"), ("user", "ho"), ("assistant", "no")))
    assert shown.strip(".") == "no</a>"


def test_a_token_that_begins_before_the_answer_is_context() -> None:
    """BPE merges the template's line break with one that opens the answer; such rows were once refused."""

    class Merging(LetterTokenizer):
        def render(self, messages: Sequence[Message], *, tools: object = (), add_generation_prompt: bool) -> str:
            text = super().render(messages, add_generation_prompt=add_generation_prompt)
            return text.replace(self.mark("<a>"), self.mark("<a>") + "|")

        def tokenize(self, text: str) -> list[Token]:
            return [token for token in super().tokenize(text) if text[max(0, token.start - 1) :][:2] != "| "]

    (shown,) = seen(Merging(), conversation(("user", "hi"), ("assistant", " ho")))
    assert shown.strip(".") == "ho</a>"


words = st.text(st.characters(codec="utf-8", exclude_categories=["Co"]), max_size=12)
turn = st.tuples(st.sampled_from(["system", "user", "assistant"]), words)


@pytest.mark.parametrize("tokenizer", [LetterTokenizer(), ForgetfulTokenizer()], ids=["appends", "rewrites"])
@settings(max_examples=50)
@given(turns=st.lists(turn, min_size=1, max_size=6).filter(lambda turns: any(role == "assistant" for role, _ in turns)))
def test_what_is_trained_is_exactly_the_answers_in_order(
    tokenizer: LetterTokenizer, turns: list[tuple[str, str]]
) -> None:
    examples = encode(conversation(*turns), tokenizer)
    trained = [
        tokenizer.shown(token)
        for example in examples
        for token, trained in zip(example.ids, example.mask, strict=True)
        if trained
    ]
    answers = [text for number, (role, text) in enumerate(turns) if role == "assistant" and number > 0]
    assert trained == [char for text in answers for char in (*text, "</a>")]


def test_what_is_cut_and_dropped_is_counted(letters: LetterTokenizer) -> None:
    short = conversation(("user", "a"), ("assistant", "b"))  # 8 tokens, two of them trained
    long = conversation(("user", "a" * 20), ("assistant", "b"))  # its answer begins at token 24
    encoded = cut(encode_all([short, long], letters, loss_on="assistant"), 10)
    assert (len(encoded.examples), encoded.dropped) == (1, 1)
    assert encoded.tokens_cut == 17  # the long one has 27 tokens
    assert encoded.trained_tokens == 2


def test_nothing_left_to_train_on_is_an_error(letters: LetterTokenizer) -> None:
    long = conversation(("user", "a" * 20), ("assistant", "b"))
    with pytest.raises(DataError, match="none of the 1 examples"):
        cut(encode_all([long], letters, loss_on="assistant"), 10)
