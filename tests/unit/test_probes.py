"""Which rows an exported file is asked: held-out ones first, and others where these are too few."""

from typing import Any

from backprop.core.data.formats import Conversation, Message
from backprop.core.probes import MOST_ASKED, MOST_PROBES, choose, first_question


def row(question: str, answer: str = "Yes.", **options: Any) -> Conversation:
    turns: tuple[Message, ...] = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Conversation(**{"messages": turns, "text": "", "shape": "messages", "place": question, **options})


def asked(chosen: list[Conversation]) -> list[str]:
    return [str(one.messages[0]["content"]) for one in chosen]


def test_held_out_rows_come_first_and_others_fill_up_to_64() -> None:
    held_out = [row(f"held out {number}, which is long") for number in range(10)]
    others = [row(f"{number}") for number in range(100)]
    chosen = asked(choose([held_out], [others]))
    assert len(chosen) == MOST_PROBES == 64
    assert chosen[:10] == asked(held_out)
    assert set(chosen[10:]) <= set(asked(others))
    many = [row(f"held out {number}") for number in range(70)]
    assert set(asked(choose([many], [others]))) <= set(asked(many))


def test_parts_take_turns_however_many_and_how_long_their_rows_are() -> None:
    short, long = ([row(f"{word} {number}") for number in range(100)] for word in ("a", "a longer question, number"))
    assert shares(choose([short, long]), short, long) == [32, 32]
    assert shares(choose([short[:4], long]), short[:4], long) == [4, 60]
    held_out = [row(f"held out {number}, which is long") for number in range(40)]
    assert shares(choose([held_out[:5], held_out[5:]], [short, long]), held_out, short, long) == [40, 12, 12]
    longest = [row(f"{number} {'x' * 8_000}") for number in range(100)]
    assert shares(choose([short, longest]), short, longest) == [49, 15]  # 15 of them fill what a manifest holds


def shares(chosen: list[Conversation], *parts: list[Conversation]) -> list[int]:
    return [sum(question in asked(part) for question in asked(chosen)) for part in parts]


def test_what_cannot_be_asked_is_left_out() -> None:
    unwanted = [row("a", desirable=False), row("b", tools=({"name": "t"},)), row("c", messages=row("c").messages[:1])]
    assert choose([unwanted], [[row("d")]]) == [row("d")]


def test_no_more_than_a_manifest_should_hold() -> None:
    chosen = choose([[row("x" * 50_000) for _ in range(5)]], [[row("y" * 20_000), row("z" * 30_000)]])
    assert [len(text) for text in asked(chosen)] == [50_000, 50_000, 20_000]


def test_a_question_is_short_and_held_out_where_there_is_one() -> None:
    long = row("x" * (MOST_ASKED + 1))
    assert first_question([long, row("short")], [row("trained on")]) == "short"
    assert first_question([long], [row(" "), row("trained on")]) == "trained on"
    assert first_question([long], []) == ""
