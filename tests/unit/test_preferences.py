"""Preferences: rows that say which answer is wanted, and what of them is trained on."""

import json
from collections.abc import Mapping

import pytest
from conftest import ForgetfulTokenizer, LetterTokenizer

from backprop.config import Objective, TrainConfig
from backprop.core.data.formats import Conversation, parse_columns
from backprop.core.data.inspect import Ledger, inspect
from backprop.core.data.judge import judge
from backprop.core.data.preferences import preferences_of
from backprop.core.data.render import Example, cut, encode, encode_all, with_mismatched
from backprop.core.data.shapes import Row
from backprop.core.data.split import hold_out
from backprop.core.data.template import adapt
from backprop.errors import DataError, UsageError

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "ho"}
BAD = {"role": "assistant", "content": "no"}
SIDES = ([("user", "hi"), ("assistant", "ho")], [("user", "hi"), ("assistant", "no")])


def read(value: object, *options: str, rated: bool = False) -> list[Conversation]:
    return preferences_of(Row(place="line 1", value=value), parse_columns(options), rated=rated)


def said(turns: object) -> list[tuple[str, str]]:
    assert isinstance(turns, tuple)
    return [(turn["role"], turn["content"]) for turn in turns]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "ho", "rejected": "no"},
        {"question": "hi", "chosen": "ho", "rejected": "no"},
        {"Prompt": "hi", "Chosen": "ho", "Rejected": "no"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {
            "prompt": "hi",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "score_chosen": 8.0,
            "messages": [USER, GOOD],
        },
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD], "response": "ho"},
        {"chosen": "\n\nHuman: hi\n\nAssistant: ho", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "ho"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {"messages": [USER], "chosen": "ho", "rejected": "no"},
        {"messages": [USER], "prompt": None, "chosen": "ho", "rejected": "no"},
        {"messages": [USER], "prompt": "", "chosen": "ho", "rejected": "no"},
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " ho", "rejected": " no"},
    ],
)
def test_pairs_are_read_in_every_shape_that_data_sets_have(row: object) -> None:
    (pair,) = read(row)
    assert (said(pair.messages), said(pair.rejected)) == SIDES
    assert pair.num_given == 1


def test_an_answer_that_looks_like_a_list_is_text() -> None:
    (pair,) = read({"prompt": "hi", "chosen": "[1, 2]", "rejected": '["a"]'})
    assert (said(pair.messages)[-1], said(pair.rejected)[-1]) == (("assistant", "[1, 2]"), ("assistant", '["a"]'))


def test_columns_are_named_by_hand() -> None:
    row = {"frage": "hi", "gut": "ho", "schlecht": "no"}
    (pair,) = read(row, "user=frage", "chosen=gut", "rejected=schlecht")
    assert (said(pair.messages), said(pair.rejected)) == SIDES


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": "hi", "turns_": [{"role": "user", "content": "hu"}]}, ("messages=turns_",)),
        ({"frage": "hu", "prompt": "hi"}, ("user=frage",)),
        ({"prompt": "hi", "messages": [{"role": "user", "content": "hu"}]}, ("messages=messages",)),
    ],
)
def test_what_is_named_by_hand_comes_before_what_is_found(row: dict[str, object], options: tuple[str, ...]) -> None:
    (pair,) = read({**row, "chosen": "ho", "rejected": "no"}, *options)
    assert said(pair.messages) == [("user", "hu"), ("assistant", "ho")]


def test_a_system_turn_that_is_named_by_hand_stands_before_whole_conversations() -> None:
    (pair,) = read({"persona": "s", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "system=persona")
    assert said(pair.messages)[0] == said(pair.rejected)[0] == ("system", "s")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("chosen=typo", "no column `typo`"),
        ("label=typo", "no column `typo`"),
        ("assistant=answer", "names a third"),
        ("text=answer", "names a third"),
    ],
)
@pytest.mark.parametrize("rated", [False, True])
def test_columns_that_do_not_fit_are_refused(option: str, words: str, rated: bool) -> None:
    with pytest.raises(DataError, match=words):
        read({"prompt": "hi", "chosen": "ho", "rejected": "no", "answer": "x", "label": True}, option, rated=rated)


def test_what_stands_around_a_pair_is_given_on_both_sides() -> None:
    (pair,) = read({"system": "s", "question": "hi", "context": "c", "chosen": "ho", "rejected": "no"})
    assert said(pair.messages) == [("system", "s"), ("user", "hi\n\nc"), ("assistant", "ho")]
    assert said(pair.rejected)[:2] == said(pair.messages)[:2]
    assert pair.num_given == 2


def test_earlier_answers_are_given_and_not_judged(letters: LetterTokenizer) -> None:
    early = [USER, {"role": "assistant", "content": "early"}, {"role": "user", "content": "and"}]
    (pair,) = read({"chosen": [*early, GOOD], "rejected": [*early, BAD]})
    (example,) = encode(pair, letters)
    shown = [
        "".join(letters.shown(token) for token, on in zip(side.ids, side.mask, strict=True) if on)
        for side in example.sides
    ]
    assert shown == ["ho</a>", "no</a>"]
    assert example.question == "and"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "hi", "completion": "ho"}, "is no preference"),
        ({"prompt": "hi", "chosen": "ho"}, "is no preference"),
        ({"prompt": "hi", "chosen": "ho", "rejected": float("nan")}, "is no preference"),
        ({"prompt": "hi", "messages": [USER], "chosen": "ho", "rejected": "no"}, "asks in `prompt` and in `messages`"),
        ({"chosen": "ho", "rejected": "no"}, "without a prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "without a prompt"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "other"}, BAD]}, "differ before an answer"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "does not end with an answer"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "differ before an answer"),
        ({"prompt": "hi", "chosen": 3, "rejected": 4}, "text belongs"),
        ("hi", "not an object"),
    ],
)
def test_what_is_no_preference_is_refused_with_the_row(row: object, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(row)
    assert "line 1" in caught.value.message


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"prompt": "hi", "chosen": "ho", "rejected": 5}, (), "a number in `rejected`"),
        ({"prompt": "hi", "Good": 5, "Bad": "no"}, ("chosen=Good", "rejected=Bad"), "a number in `Good`"),
        (
            {"prompt": "hi", "chosen": [{"role": "assistant", "content": 7}], "rejected": "no"},
            (),
            "a number in `turn 1`",
        ),
        ({"prompt": 3, "completion": "ho", "label": True}, (), "a number in `prompt`"),
        ({"messages": [USER, {"role": "nobody", "content": "ho"}], "label": False}, (), "nobody"),
        ({"prompt": "hi", "answer": "ho", "label": True}, ("assistant=typo",), "it has: `prompt`, `answer`, `label`"),
    ],
)
def test_a_bad_row_is_shown_as_it_stands_in_the_file(row: object, options: tuple[str, ...], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row, *options, rated=True)
    assert words in caught.value.message
    assert caught.value.message.endswith(f": {json.dumps(row)}")


def test_both_sides_of_a_pair_have_one_shape() -> None:
    rated = read({"instruction": "hi", "Chosen": "ho", "rejected": "no"}, rated=True)
    assert [one.shape for one in rated] == ["instruction/completion"] * 2


@pytest.mark.parametrize(("label", "wanted"), [(True, True), (False, False), (1, True), ("False", False), ("1", True)])
@pytest.mark.parametrize("answered", [{"prompt": "hi", "completion": "ho"}, {"messages": [USER, GOOD]}])
def test_ratings_are_read(label: object, wanted: bool, answered: Mapping[str, object]) -> None:
    (rated,) = read({**answered, "label": label}, rated=True)
    assert said(rated.messages) == SIDES[0]
    assert (rated.desirable, rated.num_given) == (wanted, 1)


@pytest.mark.parametrize("label", ["good", None, 2, 0.5])
def test_a_rating_that_is_none_is_refused(label: object) -> None:
    with pytest.raises(DataError, match="true or false belongs"):
        read({"prompt": "hi", "completion": "ho", "label": label}, rated=True)


def test_a_pair_is_two_rated_answers() -> None:
    found = read({"prompt": "hi", "chosen": "ho", "rejected": "no"}, rated=True)
    assert [(said(one.messages), one.desirable) for one in found] == [(SIDES[0], True), (SIDES[1], False)]


def rows(*values: Mapping[str, object]) -> list[Row]:
    return [Row(place=f"line {number}", value=value) for number, value in enumerate(values, start=1)]


def test_pairs_without_a_choice_are_left_out_and_counted() -> None:
    same, other = ({"prompt": "hi", "chosen": "ho", "rejected": answer} for answer in ("ho", "no"))
    for objective in ("dpo", "orpo", "kto"):
        judged = judge(rows(same, other), objective=objective)
        assert len(judged.conversations) == (2 if objective == "kto" else 1)
        assert any("1 rows are left out, whose chosen" in warning for warning in judged.warnings)
        with pytest.raises(DataError, match="in none of the 1 rows"):
            judge(rows(same), objective=objective)


def test_a_preference_without_an_objective_is_refused_with_the_way_out() -> None:
    with pytest.raises(DataError) as caught:
        judge(rows({"prompt": "hi", "chosen": "ho", "rejected": "no"}))
    assert "--objective dpo" in str(caught.value.hint)


def test_answers_to_one_prompt_are_held_out_together() -> None:
    made = [
        {"prompt": f"question {number}", "chosen": f"good {number} {way}", "rejected": f"bad {number}"}
        for number in range(200)
        for way in "ab"
    ]
    for objective in ("dpo", "kto"):
        kept, held_out = hold_out(judge(rows(*made), objective=objective).conversations, fraction=0.3)
        asked = [{one.messages[0]["content"] for one in part} for part in (kept, held_out)]
        assert asked[1]
        assert not asked[0] & asked[1]


def test_pairs_that_reject_otherwise_are_no_duplicates() -> None:
    one, other = ({"prompt": "hi", "chosen": "ho", "rejected": answer} for answer in ("no", "ha"))
    assert inspect(judge(rows(one, other), objective="dpo").conversations, ()).duplicates == 0
    assert inspect(judge(rows(one, one), objective="dpo").conversations, ()).duplicates == 1
    rated = inspect(judge(rows(one), objective="kto").conversations, ())
    assert (rated.duplicates, rated.same_question) == (0, 0)


def ledger_of(objective: Objective, *values: Mapping[str, object]) -> Ledger:
    return inspect(judge(rows(*values), objective=objective).conversations, ())


def test_answers_that_are_rated_good_and_bad_contradict_each_other() -> None:
    good, bad = ({"prompt": "hi", "completion": "ho", "label": label} for label in (True, False))
    elsewhere = {"prompt": "hello", "completion": "ho", "label": False}
    found = ledger_of("kto", good, elsewhere, bad, bad, good)
    assert (found.duplicates, found.contradictions, found.contradictions_first) == (2, 1, ("line 3", "line 1"))
    assert found.same_question == 0
    assert "1 of 5 rows judge the same answers otherwise than a row before, first: line 3 = line 1" in found.warnings()
    other_answer = {"prompt": "hi", "completion": "no", "label": False}
    assert ledger_of("kto", good, other_answer, elsewhere).warnings() == ()


def test_pairs_with_their_sides_exchanged_contradict_each_other() -> None:
    one = {"prompt": "hi", "chosen": "ho", "rejected": "no"}
    exchanged = {"prompt": "hi", "chosen": "no", "rejected": "ho"}
    for objective, count in (("dpo", 1), ("kto", 2)):
        found = ledger_of(objective, one, exchanged, {**one, "prompt": "hello"})
        assert (found.contradictions, found.duplicates) == (count, 0)
    assert ledger_of("dpo", one, {**one, "rejected": "other"}).contradictions == 0


@pytest.mark.parametrize("label", [True, False])
def test_rated_answers_are_nearly_alike_by_prompt_and_answer_if_they_are_rated_alike(label: bool) -> None:
    prompt, answer = " ".join(f"asked{n}" for n in range(30)), [f"said{n}" for n in range(30)]
    one = {"prompt": prompt, "completion": " ".join(answer), "label": label}
    nearly = {**one, "completion": " ".join([*answer[:20], "changed", *answer[21:]])}
    found = ledger_of("kto", one, nearly)
    assert (found.near_duplicates, found.near_checked, found.duplicates) == (1, 2, 0)
    assert ledger_of("kto", one, {**nearly, "label": not label}).near_duplicates == 0
    assert ledger_of("kto", one, {**one, "completion": " ".join(reversed(answer))}).near_duplicates == 0
    assert ledger_of("kto", one, {**one, "prompt": " ".join(f"else{n}" for n in range(30))}).near_duplicates == 0


class NoSystem(LetterTokenizer):
    def render(self, messages: object, **options: object) -> str:
        assert isinstance(messages, (list, tuple))
        if any(message["role"] == "system" for message in messages):
            raise DataError("no system turns", hint="")
        return super().render(messages, **options)  # type: ignore[arg-type]


def test_both_sides_are_adapted_to_the_template() -> None:
    (pair,) = read({"system": "s", "prompt": "hi", "chosen": "ho", "rejected": "no"})
    (adapted,) = adapt([pair], NoSystem()).conversations
    assert said(adapted.messages) == [("user", "s\n\nhi"), ("assistant", "ho")]
    assert said(adapted.rejected) == [("user", "s\n\nhi"), ("assistant", "no")]


def test_several_answers_that_are_rendered_apart_cannot_be_judged_together() -> None:
    more = [{"role": "user", "content": "and"}, {"role": "assistant", "content": "more"}]
    (pair,) = read({"chosen": [USER, GOOD, *more], "rejected": [USER, BAD, *more]})
    with pytest.raises(DataError, match="judged together"):
        encode(pair, ForgetfulTokenizer())


def test_what_is_cut_from_either_side_is_counted_and_pairs_that_no_longer_differ_are_dropped(
    letters: LetterTokenizer,
) -> None:
    pairs = judge(
        rows(
            {"prompt": "hi", "chosen": "ho", "rejected": "no"},
            {"prompt": "hi", "chosen": "same beginning, one end", "rejected": "same beginning, other end"},
            {"prompt": "a question beyond all", "chosen": "ho", "rejected": "no"},
        ),
        objective="dpo",
    ).conversations
    whole = encode_all(pairs, letters, loss_on="assistant")
    assert whole.tokens == sum(len(side.ids) for one in whole.examples for side in (one, one.rejected) if side)
    short = cut(whole, 16)
    assert (len(short.examples), short.dropped) == (1, 2)
    assert short.tokens_cut == sum(max(0, len(side.ids) - 16) for one in whole.examples for side in one.sides)


def test_a_mismatched_answer_follows_its_own_prompt(letters: LetterTokenizer) -> None:
    texts = (("one?", "first"), ("two?", "second"), ("three?", "third"))
    rated = judge(
        rows(*({"prompt": ask, "completion": answer, "label": True} for ask, answer in texts)), objective="kto"
    ).conversations
    examples = with_mismatched(*[encode_all(rated, letters, loss_on="assistant").examples] * 2, max_length=15)

    def shown(example: Example | None, *, trained: bool) -> str:
        assert example
        return "".join(
            letters.shown(token) for token, on in zip(example.ids, example.mask, strict=True) if on == trained
        )

    assert [shown(one.mismatched, trained=True) for one in examples] == ["second</a>", "third</a>", "first"]
    assert all(
        shown(one.mismatched, trained=False).startswith(shown(one, trained=False).rstrip("\n")) for one in examples
    )


def test_every_token_of_preferences_cannot_be_trained() -> None:
    with pytest.raises(UsageError, match="loss-on"):
        TrainConfig(data=("a.jsonl",), objective="dpo", loss_on="all")


def test_a_mismatched_answer_is_of_another_prompt_also_where_answers_to_one_stand_together(
    letters: LetterTokenizer,
) -> None:
    pairs = [{"prompt": f"prompt {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    rated = judge(rows(*pairs), objective="kto").conversations
    examples = encode_all(rated, letters, loss_on="assistant").examples

    def answer_of(example: Example | None) -> str:
        assert example
        words = "".join(letters.shown(t) for t, on in zip(example.ids, example.mask, strict=True) if on)
        return words.removesuffix("</a>")

    made = with_mismatched(examples, examples, 99)
    # As many wanted as unwanted ones, or the distance would be that of one kind.
    assert [answer_of(one.mismatched) for one in made] == [
        f"{kind} {(n + 1) % 4}" for n in range(4) for kind in ("good", "bad")
    ]
    (alone,) = with_mismatched(examples[:1], examples, 99)  # held out: others are those that are trained on
    assert answer_of(alone.mismatched) == "good 1"
    with pytest.raises(DataError, match="to one prompt"):
        with_mismatched(examples[:2], examples[:2], 99)


def test_sides_that_the_template_makes_alike_are_not_called_cut() -> None:
    class Trimming(LetterTokenizer):
        def render(self, messages: object, **options: object) -> str:
            assert isinstance(messages, (list, tuple))
            trimmed = [{**message, "content": message["content"].strip()} for message in messages]
            return super().render(trimmed, **options)  # type: ignore[arg-type]

    pairs = judge(
        rows({"prompt": "hi", "chosen": "ho", "rejected": " ho"}, {"prompt": "hi", "chosen": "ho", "rejected": "no"}),
        objective="dpo",
    ).conversations
    short = cut(encode_all(pairs, Trimming(), loss_on="assistant"), 99)
    assert (len(short.examples), short.dropped, short.alike, short.tokens_cut) == (1, 1, 1, 0)


def test_an_empty_answer_on_either_side_is_told() -> None:
    judged = judge(rows({"prompt": "hi", "chosen": "ho", "rejected": " "}), objective="dpo")
    assert judged.empty_turns == 1
