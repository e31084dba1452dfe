"""Which rows an exported file is asked: held-out ones first, and others where these are too few."""

from typing import Any

from backprop.core.data.formats import Conversation, Message
from backprop.core.probes import MOST_ASKED, MOST_PROBES, choose, choose_of_each, first_question


def row(question: str, answer: str = "Yes.", **options: Any) -> Conversation:
    turns: tuple[Message, ...] = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Conversation(**{"messages": turns, "text": "", "shape": "messages", "place": question, **options})


def asked(chosen: list[Conversation]) -> list[str]:
    return [str(one.messages[0]["content"]) for one in chosen]


def test_held_out_rows_come_first_and_others_fill_up_to_64() -> None:
    held_out = [row(f"held out {number}, which is long") for number in range(10)]
    others = [row(f"{number}") for number in range(100)]
    chosen = asked(choose(held_out, others))
    assert len(chosen) == MOST_PROBES == 64
    assert chosen[:10] == asked(held_out)
    assert set(chosen[10:]) <= set(asked(others))
    many = [row(f"held out {number}") for number in range(70)]
    assert set(asked(choose(many, others))) <= set(asked(many))


def test_of_several_parts_each_has_its_share_however_long_its_rows_are() -> None:
    short, long = ([row(f"{word} {number}") for number in range(100)] for word in ("a", "a longer question, number"))
    chosen = asked(choose(choose_of_each([short, long])))
    assert [sum(question in asked(part) for question in chosen) for part in (short, long)] == [32, 32]


def test_what_cannot_be_asked_is_left_out() -> None:
    unwanted = [row("a", desirable=False), row("b", tools=({"name": "t"},)), row("c", messages=row("c").messages[:1])]
    assert choose(unwanted, [row("d")]) == [row("d")]


def test_no_more_than_a_manifest_should_hold() -> None:
    chosen = choose([row("x" * 50_000) for _ in range(5)], [row("y" * 20_000), row("z" * 30_000)])
    assert [len(text) for text in asked(chosen)] == [50_000, 50_000, 20_000]


def test_a_question_is_short_and_held_out_where_there_is_one() -> None:
    long = row("x" * (MOST_ASKED + 1))
    assert first_question([long, row("short")], [row("trained on")]) == "short"
    assert first_question([long], [row(" "), row("trained on")]) == "trained on"
    assert first_question([long], []) == ""
