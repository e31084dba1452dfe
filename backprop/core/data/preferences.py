"""Rows that say which answer is wanted: pairs of a chosen and a rejected one, and answers that are rated.

Each side of a pair is read as if it were a row of its own, by the rules of ``formats``. What both sides begin with is
given; what follows is judged.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from backprop.core.data.formats import (
    ANSWERING_KEYS,
    ASKING_KEYS,
    CONVERSATION_KEYS,
    MAYBE_CONVERSATION_KEYS,
    NO_COLUMNS,
    Conversation,
    is_filled,
    is_null,
    no_column,
    to_conversations,
)
from backprop.core.data.shapes import Row, are_turns, bad, is_turn, name_of, unpacked
from backprop.errors import DataError

ANSWER = "completion"
"""What an answer is called in a row that is made of one side."""
LABEL_KEYS = ("label", "kto_tag")
JUDGED = ("chosen", "rejected", "label")
"""What `--column` can name here, and nowhere else."""
RATINGS: Mapping[object, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
PAIR_HINT = "each row needs a prompt, `chosen` and `rejected`; or train on answers alone: leave out `--objective`"
RATED_HINT = "each row needs an answer and a `label` of true or false, or `chosen` and `rejected`"
# How Anthropic's hh-rlhf writes turns into one text.
TURN = re.compile(r"\n\n(Human|Assistant): ?")


def preferences_of(row: Row, columns: Mapping[str, str], *, rated: bool) -> list[Conversation]:
    """Read a pair as one conversation with what is rejected; or, if answers are to be rated, as two with a rating each.

    Args:
        columns: Names by role, as ``parse_columns`` gives them.
        rated: Whether each answer stands alone, so that rows with a label are read too.

    Raises:
        DataError: If the row is no preference, or its sides differ before their answers.
    """
    hint = RATED_HINT if rated else PAIR_HINT
    if not isinstance(row.value, Mapping):
        raise bad(row, f"is {name_of(row.value)}, not an object", hint=hint)
    for role in JUDGED:
        if role in columns and columns[role] not in row.value:
            raise no_column(row, row.value, role, columns[role])
    names = {key.strip().lower(): key for key in row.value} | {
        role: columns[role] for role in JUDGED if role in columns
    }
    others = {role: name for role, name in columns.items() if role not in JUDGED}
    if all(key in names and not is_null(row.value[names[key]]) for key in ("chosen", "rejected")):
        kept = {key: value for key, value in row.value.items() if key not in (names["chosen"], names["rejected"])}
        sides = [_side(row, kept, names[key], others) for key in ("chosen", "rejected")]
        if rated and sides[0].messages != sides[1].messages:
            return [_rated(row, side, wanted=wanted) for side, wanted in zip(sides, (True, False), strict=True)]
        return [_paired(row, *sides)]
    label = next((names[key] for key in LABEL_KEYS if key in names), None)
    if not rated or label is None:
        raise bad(row, "is no preference", hint=hint)
    wanted = _rating(row, label, row.value[label])
    rest = {key: value for key, value in row.value.items() if key != label}
    return [_rated(row, _alone(row, rest, others), wanted=wanted)]


def _rating(row: Row, name: str, value: object) -> bool:
    given = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(given, int | float | str) or given not in RATINGS:
        raise bad(
            row, f"holds {value!r} in `{name}` where true or false belongs", hint="name it: `--column label=NAME`"
        )
    return RATINGS[given]


def _side(row: Row, kept: Mapping[str, object], name: str, columns: Mapping[str, str]) -> Conversation:
    """Read one side: an answer to the row's prompt or conversation; or a conversation that is whole."""
    assert isinstance(row.value, Mapping)
    answer: object = row.value[name]
    answer = unpacked(answer) if are_turns(unpacked(answer)) else answer  # an answer may be a list of numbers
    if isinstance(answer, str) and TURN.match(answer):
        answer = _split(answer)
    answer = [answer] if is_turn(answer) else answer
    if columns.keys() & {"assistant", "text"}:
        raise bad(
            row, "has its answers in two columns, and `--column` names a third", hint="leave out `assistant=NAME`"
        )
    asking = [key for key in kept if _asks(key, columns) and is_filled(kept[key])]
    listed = [key for key in kept if _is_conversation(key, kept[key], columns)]
    unwanted = {key for key in kept if key.strip().lower() in ANSWERING_KEYS}
    if are_turns(answer) and not _answers(row, answer):
        value = {key: kept[key] for key in kept if key not in {*asking, *listed, *unwanted}}
        around = {role: name for role, name in columns.items() if role in ("system", "tools")}
        return _alone(row, {**value, "messages": answer}, around)
    if asking and listed and "user" not in columns:
        raise bad(
            row,
            f"asks in `{asking[0]}` and in `{listed[0]}`",
            hint=f"name one: `--column user={asking[0]}` or `--column messages={listed[0]}`",
        )
    more = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    value = {key: kept[key] for key in kept if key not in {*asking, *listed, *unwanted}}
    around = {role: name for role, name in columns.items() if role not in ("user", "messages")}
    if asking and isinstance(prompt := kept[asking[0]], str) and TURN.match(prompt):
        said = [{"role": "assistant", "content": answer.strip()}] if isinstance(answer, str) else more
        return _alone(row, {**value, "messages": [*_split(prompt), *said]}, around)
    if asking:
        value = {key: kept[key] for key in kept if key not in {*listed, *unwanted}}
        made = _alone(row, {**value, ANSWER: answer}, columns, names={ANSWER: name})
        return replace(made, shape=f"{made.shape.removesuffix(f'/{name.lower()}')}/{ANSWER}")
    if listed:
        turns = unpacked(kept[listed[0]])
        assert isinstance(turns, list)
        return _alone(row, {**value, "messages": [*turns, *more]}, around)
    raise bad(row, "is a preference without a prompt", hint="name it: `--column user=NAME`")


def _asks(key: str, columns: Mapping[str, str]) -> bool:
    if columns.keys() & {"user", "messages"}:
        return key == columns.get("user")
    return key.strip().lower() in ASKING_KEYS


def _is_conversation(key: str, value: object, columns: Mapping[str, str]) -> bool:
    if columns.keys() & {"user", "messages"}:
        return key == columns.get("messages")
    named = key.strip().lower() in (*CONVERSATION_KEYS, *MAYBE_CONVERSATION_KEYS)
    return named and are_turns(unpacked(value))


def _answers(row: Row, turns: object) -> bool:
    """Say whether turns begin with the assistant's, so that what they answer stands elsewhere."""
    (made,) = to_conversations(Row(place=row.place, value={"messages": turns}, origin=row))
    return made.messages[0]["role"] == "assistant"


def _split(text: str) -> list[dict[str, str]]:
    _, *parts = TURN.split(text)
    speakers = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": speakers[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    # A prompt ends by asking for the assistant's words.
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _alone(
    row: Row, value: Mapping[str, object], columns: Mapping[str, str], *, names: Mapping[str, str] = NO_COLUMNS
) -> Conversation:
    made = to_conversations(Row(place=row.place, value=value, origin=row, names=names), columns)
    if len(made) != 1 or not made[0].messages:
        raise bad(row, "is not one conversation, so that its answer cannot be judged")
    return made[0]


def _ends_in_answer(row: Row, side: Conversation) -> None:
    if side.messages[-1]["role"] != "assistant":
        raise bad(row, "does not end with an answer, so that nothing can be judged")
    if len(side.messages) == 1:
        raise bad(row, "is an answer without a prompt", hint="name what it answers: `--column user=NAME`")


def _rated(row: Row, side: Conversation, *, wanted: bool) -> Conversation:
    _ends_in_answer(row, side)
    return replace(side, desirable=wanted)


def _paired(row: Row, chosen: Conversation, rejected: Conversation) -> Conversation:
    for side in (chosen, rejected):
        _ends_in_answer(row, side)
    pair = replace(chosen, rejected=rejected.messages, shape=f"preference, {chosen.shape}")
    given = pair.num_given
    if pair.messages != pair.rejected and not all(
        given < len(turns) and turns[given]["role"] == "assistant" for turns in (pair.messages, pair.rejected)
    ):
        raise _no_choice(row, given)
    return pair


def _no_choice(row: Row, given: int) -> DataError:
    return bad(
        row,
        f"is a preference whose sides differ before an answer: at turn {given + 1}",
        hint="both sides must answer the same turns: mend this row, or remove it",
    )
