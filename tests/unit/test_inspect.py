"""The data ledger."""

import json
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from backprop.core.data.formats import Conversation, Message
from backprop.core.data.inspect import histogram, inspect
from backprop.core.data.judge import judge
from backprop.core.data.language import language_of
from backprop.edges.files import read_rows

VOCABULARY = [f"{start}{end}" for start in "bdfgklmnprst" for end in ("aven", "ilo", "orm", "ush", "ester", "ing")]


def words(seed: int, count: int) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


def chat(question: str, answer: str, *, place: str = "", system: str = "") -> Conversation:
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages=tuple(turns), text="", shape="messages", place=place)


def plain(text: str, *, place: str = "") -> Conversation:
    return Conversation(messages=(), text=text, shape="text", place=place)


def changed(text: Sequence[str], at: int) -> str:
    return " ".join([*text[:at], "changed", *text[at + 1 :]])


DISTINCT = [
    chat(" ".join(words(seed, 12)), " ".join(words(1000 + seed, 30)), place=f"line {seed}") for seed in range(200)
]


def test_distinct_rows_raise_no_alarm() -> None:
    ledger = inspect(DISTINCT[:180], DISTINCT[180:])
    assert ledger.warnings() == ()
    assert (ledger.rows, ledger.held_out, ledger.near_checked) == (180, 20, 180)


def test_several_phrasings_of_one_fact_are_no_duplicates() -> None:
    ledger = inspect(judge(read_rows(str(ROOT / "examples/pottlesea.jsonl"))).conversations, ())
    assert ledger.warnings() == ()
    assert ledger.languages == {"English": ledger.rows}


def test_a_row_that_stands_twice_is_found_whatever_its_white_space() -> None:
    rows = [
        chat("Who?", "Cornelius  Pym.", place="a.jsonl, line 3"),
        *DISTINCT[:5],
        chat(" Who?\n", "Cornelius Pym.", place="b.jsonl, line 9"),
        chat("Who?", "Cornelius Pym.", place="b.jsonl, line 10"),
        chat("who?", "Cornelius Pym.", place="b.jsonl, line 11"),
    ]
    ledger = inspect(rows, ())
    assert (ledger.duplicates, ledger.near_duplicates) == (2, 0)
    assert ledger.warnings() == ("2 of 9 rows are exact duplicates, first: b.jsonl, line 9 = a.jsonl, line 3",)


def test_what_a_turn_holds_beside_its_text_makes_it_another() -> None:
    def call(city: str) -> Conversation:
        turns: list[dict[str, object]] = [
            {"role": "user", "content": "What is the weather?"},
            {"role": "assistant", "content": "", "tool_calls": [{"arguments": city}]},
        ]
        return Conversation(messages=tuple(turns), text="", shape="messages", place=city)  # pyright: ignore[reportArgumentType]

    assert inspect([call("Pottlesea"), call("Bruges")], ()).duplicates == 0
    assert inspect([call("Pottlesea"), call("Pottlesea")], ()).duplicates == 1


def test_one_word_in_sixty_changed_is_a_near_duplicate() -> None:
    """Each of 100 planted pairs has a Jaccard similarity of 51 / 61 = 0.84."""
    rows: list[Conversation] = []
    for seed in range(100):
        text = words(seed, 60)
        rows += [plain(" ".join(text), place=f"{seed}"), plain(changed(text, 30), place=f"{seed} again")]
    ledger = inspect(rows, ())
    assert ledger.near_duplicates >= 90
    assert ledger.near_duplicates_first == ("0 again", "0")
    # Plain texts ask nothing.
    assert (ledger.duplicates, ledger.same_question) == (0, 0)


def test_half_the_words_in_common_is_rarely_near() -> None:
    """Each of 100 planted pairs has a Jaccard similarity of 36 / 76 = 0.47."""
    rows: list[Conversation] = []
    for seed in range(100):
        text = words(seed, 60)
        other = [f"x{seed}" if at in (10, 25, 40, 52) else word for at, word in enumerate(text)]
        rows += [plain(" ".join(text)), plain(" ".join(other))]
    assert inspect(rows, ()).near_duplicates <= 1


def test_characters_are_words_where_no_spaces_stand() -> None:
    text = (
        "図書館は古い風車の中にあります。"
        + "毎朝九時に開き、日曜日は休みです。子供たちは絵本を借りて、窓辺で静かに読みます。"
    )
    assert inspect([plain(text), plain(text.replace("九", "八"))], ()).near_duplicates == 1


def test_short_texts_are_only_compared_exactly() -> None:
    ledger = inspect([plain("The cat sat on the mat today."), plain("the cat sat on the mat today")], ())
    assert (ledger.duplicates, ledger.near_duplicates, ledger.near_checked) == (0, 0, 0)


def test_another_answer_to_the_same_question_is_counted_and_no_duplicate() -> None:
    question = " ".join(words(1, 80))
    rows = [
        chat(question, "positive", place="line 1"),
        chat(question, "negative", place="line 2"),
        chat(question, " ".join(words(2, 12)), place="line 3"),
        chat(question, "positive", place="line 4", system="Answer the other way round."),
    ]
    ledger = inspect(rows, ())
    assert (ledger.same_question, ledger.same_question_first) == (2, ("line 2", "line 1"))
    assert ledger.duplicates == 0
    # The fourth asks under other instructions and answers like the first: nearly the same row, and no contradiction.
    assert (ledger.near_duplicates, ledger.near_duplicates_first) == (1, ("line 4", "line 1"))


def test_a_long_answer_with_another_word_is_nearly_the_same_and_another_answer_is_not() -> None:
    question, answer = " ".join(words(1, 200)), words(2, 24)
    near = [chat(question, " ".join(answer), place="line 1"), chat(question, changed(answer, 12), place="line 2")]
    assert inspect(near, ()).near_duplicates == 1
    other = " ".join([*answer[:7], *words(3, 17)])  # which begins in the same way
    assert inspect([near[0], chat(question, other, place="line 2")], ()).near_duplicates == 0


def test_a_system_turn_in_all_rows_does_not_make_them_alike() -> None:
    system = " ".join(words(7, 300))
    rows = [chat(" ".join(words(seed, 10)), "yes", system=system) for seed in range(20)]
    assert inspect(rows, ()).near_duplicates == 0


def test_overlap_with_the_held_out_rows_is_found_exactly_and_nearly() -> None:
    text = words(3, 60)
    train = [*DISTINCT[:50], plain(" ".join(text), place="train, line 51")]
    held = [chat("Who?", "Pym."), DISTINCT[7], plain(changed(text, 20), place="held, line 3")]
    ledger = inspect(train, held)
    assert (ledger.overlap, ledger.overlap_first) == (1, ("line 7", "line 7"))
    assert (ledger.near_overlap, ledger.near_overlap_first) == (1, ("held, line 3", "train, line 51"))
    assert [warning.split(":")[0] for warning in ledger.warnings()] == [
        "1 of 3 evaluation rows are also in the training data",
        "1 of 3 evaluation rows are nearly in the training data",
    ]


def test_of_many_rows_a_sample_is_compared_and_all_are_counted() -> None:
    rows = [*DISTINCT, DISTINCT[0]]
    ledger = inspect(rows, (), near_most=100)
    assert (ledger.rows, ledger.duplicates) == (201, 1)
    assert 20 <= ledger.near_checked <= 100


def test_the_ledger_is_plain_json() -> None:
    ledger = inspect([DISTINCT[0], DISTINCT[0]], ())
    written = ledger.to_json()
    assert json.loads(json.dumps(written)) == written
    assert written["duplicates_first"] == ["line 0", "line 0"]
    assert inspect((), ()).warnings() == ()


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("English", "What is the ferry called?"),
        ("German", "Die Bäckerei ist nicht weit von der Kirche."),
        ("French", "La bibliothèque se trouve dans un vieux moulin."),
        ("Spanish", "La biblioteca está en un viejo molino."),
        ("Italian", "La biblioteca è in un vecchio mulino."),
        ("Portuguese", "A biblioteca fica num moinho velho e não abre ao domingo."),
        ("Dutch", "De bibliotheek is in een oude molen."),
        ("Polish", "Biblioteka jest w starym młynie i nie otwiera się w niedzielę."),
        ("other Latin", "Kütüphane eski bir değirmende bulunuyor."),
        ("other Latin", "Kirjasto on vanhassa tuulimyllyssä ja kahvila avataan aamulla kello yhdeksän joka päivä."),
        ("other Latin", "Casa de Silva"),
        ("Japanese", "図書館は古い風車の中にあります。"),
        ("Japanese", "古い風車内図書館は毎朝九時開館。"),
        ("Chinese", "图书馆在一座旧风车里。"),
        ("Korean", "도서관은 오래된 풍차 안에 있습니다."),
        ("Cyrillic script", "Библиотека находится в старой мельнице."),
        ("Arabic script", "المكتبة في طاحونة قديمة."),
        ("Devanagari script", "पुस्तकालय एक पुरानी पवनचक्की में है।"),
        ("Greek", "Η βιβλιοθήκη είναι σε έναν παλιό μύλο."),
        ("Hebrew", "הספרייה נמצאת בטחנת רוח ישנה."),
        ("Thai", "ห้องสมุดอยู่ในกังหันลมเก่า"),
        ("no words", "2 + 2 = 4"),
        ("code", "def add(a, b):\n    return a + b"),
        ("code", "Write it, please.\n```\nwhile not done do step\n```"),
        ("code", "int main() {\n  return 0;\n}"),
        ("English", "return the book to the library"),
        ("English", "Because I could not stop for Death;\nhe kindly stopped for me;"),
    ],
)
def test_languages_are_guessed_by_script_and_function_words(language: str, text: str) -> None:
    assert language_of(text) == language


spans = st.sampled_from([9, 60, 500, 100_000])
lengths = spans.flatmap(lambda most: st.lists(st.integers(0, most), min_size=1, max_size=40))


@settings(max_examples=60, database=None)
@given(lengths=lengths, buckets=st.integers(1, 20))
def test_a_histogram_loses_no_length_and_has_no_gap(lengths: list[int], buckets: int) -> None:
    drawn = histogram(lengths, buckets=buckets)
    assert len(drawn) <= buckets
    assert sum(bucket.count for bucket in drawn) == len(lengths)
    assert all(bucket.count == sum(bucket.low <= length < bucket.high for length in lengths) for bucket in drawn)
    assert all(one.high == after.low for one, after in pairwise(drawn))
    assert drawn[0].count
    assert drawn[-1].count


@pytest.mark.parametrize(
    ("lengths", "edges"),
    [
        ([], []),
        ([7], [7, 8]),
        ([17, 312], [0, 50, 100, 150, 200, 250, 300, 350]),
        ([1, 64], [1, 2, 4, 8, 16, 32, 64, 128]),
        ([10, 4000], [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]),
        ([0, 1_000_000], [0, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576]),
    ],
)
def test_edges_are_round_and_double_over_a_wide_span(lengths: list[int], edges: list[int]) -> None:
    drawn = histogram(lengths)
    assert [bucket.low for bucket in drawn] + [bucket.high for bucket in drawn[-1:]] == edges
