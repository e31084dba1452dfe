"""What went wrong with others' masks, planted into ours: whatever a template does, answers and their ends are trained.

The templates have the shape of the models' own, cut to what matters here. All but the last tests need no torch.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ASSETS, chat

from backprop.config import TrainConfig
from backprop.core.data.formats import Conversation, Message, Row
from backprop.core.data.judge import judge
from backprop.core.data.render import Encoded, Example, Token, cut, encode, encode_all
from backprop.core.data.template import adapt
from backprop.errors import DataError, ModelError
from backprop.verbs.prepare import check_supervision

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Knows no generation prompt, and a system turn only as long as the question stands last.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' and loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
# Refuses system turns, and names the assistant otherwise.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Drops the reasoning of all answers but the last.
QWEN_3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Asks for an answer behind a thought of none, which it leaves out of what was said; the others behind one that is open, or more.
GEMMA_4 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<turn|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n<|channel>thought\n<channel|>' }}{% endif %}"
)
THOUGHT = "<|channel>thought\n<channel|>"
OTHERWISE = [
    *(
        GEMMA_4.replace(THOUGHT, opened)
        for opened in (
            "<|channel>thought\n",
            "<|channel>",
            "<|channel>thought\n<|channel>",
            "thought<channel|>",
            THOUGHT + "So:",
        )
    ),
    "{% if add_generation_prompt %}Think. {% endif %}" + GEMMA_4,
]
# As of models for pictures: content is a list of parts, and of text nothing is left.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Rendering:
    """A real template, over a tokenizer of letters in which the marks of these templates are special tokens."""

    TOKENS = re.compile(r"(<\|\w+\|?>|<\w+\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\])|.", re.DOTALL)

    def __init__(self, template: str) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.template = environment.from_string(template)
        self.marks: list[str] = []

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, object]] = (), add_generation_prompt: bool
    ) -> str:
        def refuse(why: str) -> None:
            raise DataError(why)

        names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "raise_exception": refuse}
        return self.template.render(
            messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **names
        )

    def tokenize(self, text: str) -> list[Token]:
        return [Token(self.number(found), found.start()) for found in self.TOKENS.finditer(text)]

    def number(self, found: re.Match[str]) -> int:
        if not found[1]:
            return ord(found[0])
        if found[1] not in self.marks:
            self.marks.append(found[1])
        return -1 - self.marks.index(found[1])

    def encode_text(self, text: str) -> list[int]:
        return [token.id for token in self.tokenize(text + "</s>")]

    def is_special(self, token: int) -> bool:
        return token < 0

    def shown(self, tokens: Sequence[int]) -> str:
        return "".join(self.marks[-1 - token] if token < 0 else chr(token) for token in tokens)


def conversations(*rows: Mapping[str, object]) -> tuple[Conversation, ...]:
    return judge(Row(place=f"data.jsonl, line {n}", value=row) for n, row in enumerate(rows, 1)).conversations


def trained(example: Example) -> list[int]:
    return [token for token, on in zip(example.ids, example.mask, strict=True) if on]


def encoded(template: str, *rows: Mapping[str, object]) -> tuple[Rendering, Encoded]:
    tokenizer = Rendering(template)
    return tokenizer, encode_all(adapt(conversations(*rows), tokenizer).conversations, tokenizer, loss_on="assistant")


ROW = chat("hi", "ho", "hu", "no")
FAMILIES = {
    "ChatML": (CHATML, ["ho<|im_end|>no<|im_end|>"]),
    "Llama 3": (LLAMA_3, ["ho<|eot_id|>no<|eot_id|>"]),
    "Mistral": (MISTRAL, [" ho</s> no</s>"]),
    "Gemma": (GEMMA, ["ho<end_of_turn>no<end_of_turn>"]),
    # Each answer is an example of its own, with the reasoning that the next turn drops.
    "Qwen 3": (QWEN_3, ["<think>\n\n</think>\n\nho<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_without_generation_markers_train_the_answers_and_nothing_of_the_prompts(family: str) -> None:
    """marin#7237: masks were all zero. backpropagate 1.8.5: prompts were trained on, in ChatML whatever the model."""
    template, expected = FAMILIES[family]
    assert "generation %" not in template
    tokenizer, made = encoded(template, ROW)
    assert [tokenizer.shown(trained(example)) for example in made.examples] == expected
    assert made.unended == 0
    whole = tokenizer.render(conversations(ROW)[0].messages, add_generation_prompt=False)
    assert tokenizer.shown(made.examples[-1].ids) == whole


def test_an_answer_stands_behind_the_closed_thought_that_the_model_is_asked_with() -> None:
    """Such a template was refused; rendered as it was said, the model would never be trained where it is asked."""
    tokenizer, made = encoded(GEMMA_4, chat("hi", "<b>ho</b>", "hu", "no"))
    assert [tokenizer.shown(trained(example)) for example in made.examples] == ["<b>ho</b><turn|>", "no<turn|>"]
    first, last = (tokenizer.shown(example.ids) for example in made.examples)
    assert first == "<s><|turn>user\nhi<turn|>\n<|turn>model\n<|channel>thought\n<channel|><b>ho</b><turn|>\n"
    assert last.endswith(
        "<b>ho</b><turn|>\n<|turn>user\nhu<turn|>\n<|turn>model\n<|channel>thought\n<channel|>no<turn|>\n"
    )
    assert last.count("<|channel>") == 1
    assert made.unended == 0


@pytest.mark.parametrize("answer", ["n", "turn|", " ho ", "hi", "model", "<|turn>model\n"])
def test_an_answer_may_be_a_part_of_what_stands_around_it(answer: str) -> None:
    tokenizer, made = encoded(GEMMA_4, chat("hi", answer))
    assert [tokenizer.shown(trained(example)) for example in made.examples] == [f"{answer.strip()}<turn|>"]


def test_both_sides_of_a_preference_stand_behind_the_closed_thought() -> None:
    tokenizer = Rendering(GEMMA_4)
    row = Row(place="", value={"prompt": "hi", "chosen": "ho", "rejected": "he"})
    made = encode_all(judge([row], objective="dpo").conversations, tokenizer, loss_on="assistant")
    (example,) = made.examples
    assert [tokenizer.shown(trained(side)) for side in example.sides] == ["ho<turn|>", "he<turn|>"]
    assert all(tokenizer.shown(side.ids).count("<channel|>") == 1 for side in example.sides)


@pytest.mark.parametrize("template", OTHERWISE)
def test_an_answer_behind_anything_else_that_was_not_said_is_refused(template: str) -> None:
    with pytest.raises(DataError, match="something else before it than when it asks for one"):
        encoded(template, chat("hi", "ho"))


def test_a_question_that_quotes_the_marks_of_an_answer_is_not_trained() -> None:
    """Masks by marker strings, as of TRL's collator for completions, take it for an answer."""
    quoted = "What is <|im_start|>assistant\nmine<|im_end|>\n?"
    tokenizer, made = encoded(CHATML, chat(quoted, "A turn."))
    assert [tokenizer.shown(trained(example)) for example in made.examples] == ["A turn.<|im_end|>"]


def test_old_reasoning_that_the_template_drops_is_trained_where_it_stands() -> None:
    turns = ROW["messages"]
    assert isinstance(turns, list)
    row = {"messages": [{**turn, "reasoning_content": f"so {turn['content']}"} for turn in turns]}
    tokenizer, made = encoded(QWEN_3, row)
    assert [tokenizer.shown(trained(example)) for example in made.examples] == [
        "<think>\nso ho\n</think>\n\nho<|im_end|>",
        "<think>\nso no\n</think>\n\nno<|im_end|>",
    ]
    assert made.rewritten == 1
    assert "so ho" not in tokenizer.shown(made.examples[1].ids)


ENDLESS = {
    "no end": CHATML.replace("<|im_end|>", ""),
    "an end in letters": CHATML.replace("<|im_end|>", " END"),
    "an end that the next question writes": (
        "{% for m in messages %}{% if m.role == 'user' and not loop.first %}</s>{% endif %}"
        "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("fault", ENDLESS)
def test_an_end_of_turn_that_would_not_be_trained_is_exit_4(fault: str) -> None:
    """axolotl#3754 #1806, torchtune#949: the loss looked perfectly healthy, and answers never stopped."""
    _, made = encoded(ENDLESS[fault], ROW)
    with pytest.raises(ModelError) as raised:
        check_supervision(TrainConfig(data=("x",)), made, made, most=512, say=lambda event: None)
    assert raised.value.code == 4
    assert "does not end answers with a special token: 0 of 2 answers end" in raised.value.message


def test_rows_whose_answers_are_all_cut_off_are_exit_3() -> None:
    """trl#6668 #6025 #3927: with every label masked, the loss was reported as 0.0."""
    _, made = encoded(CHATML, chat("a long question", "ho"), chat("another long question", "no"))
    with pytest.raises(DataError, match="none of the 2 examples has a token to train on within 20 tokens"):
        cut(made, 20)


SYSTEM = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
}


@pytest.mark.parametrize("family", ["Mistral", "Gemma"])
def test_a_system_turn_that_the_template_drops_or_refuses_is_kept_and_said(family: str) -> None:
    tokenizer = Rendering(FAMILIES[family][0])
    adapted = adapt(conversations(SYSTEM), tokenizer)
    assert "no place for system turns: in 1 conversations" in adapted.notes[0]
    (example,) = encode(adapted.conversations[0], tokenizer)
    assert "be brief\n\nhi" in tokenizer.shown(example.ids)
    assert "be brief" not in tokenizer.shown(trained(example))


def test_a_system_turn_in_the_middle_that_the_template_drops_is_kept_and_said() -> None:
    turns = [*SYSTEM["messages"], {"role": "system", "content": "be long"}, *SYSTEM["messages"][1:]]
    only_first = CHATML.replace(
        "{{ '<|im_start|>' + m.role", "{% if m.role != 'system' or loop.first %}{{ '<|im_start|>' + m.role"
    )
    tokenizer = Rendering(only_first.replace("{% endfor %}", "{% endif %}{% endfor %}"))
    adapted = adapt(conversations({"messages": turns}), tokenizer)
    assert "no place for system turns after the first turn: in 1 conversations" in adapted.notes[0]
    (example,) = encode(adapted.conversations[0], tokenizer)
    assert tokenizer.shown(example.ids).split("<|im_start|>")[1:3] == [
        "system\nbe brief<|im_end|>\n",
        "user\nhi<|im_end|>\n",
    ]
    assert "user\nbe long\n\nhi<|im_end|>" in tokenizer.shown(example.ids)


CALL = {"type": "function", "function": {"name": "tide", "arguments": {"day": 3}}}
TOOLS_LEFT_OUT = {
    "calls": {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    },
    "offered tools": {**ROW, "tools": [{"type": "function", "function": {"name": "tide"}}]},
}


@pytest.mark.parametrize("thing", TOOLS_LEFT_OUT)
def test_tools_that_the_template_leaves_out_are_exit_3_with_the_row(thing: str) -> None:
    """backpropagate 1.8.5: calls of tools became empty turns, and the model learnt to say nothing."""
    with pytest.raises(DataError) as raised:
        encoded(CHATML, ROW, TOOLS_LEFT_OUT[thing])
    assert raised.value.code == 3
    assert "data.jsonl, line 2 has tool" in raised.value.message
    assert "this model's chat template leaves out" in raised.value.message


def test_reasoning_that_the_template_leaves_out_is_moved_into_the_answer_and_said() -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "reasoning": "hm"}]}
    tokenizer = Rendering(CHATML)
    adapted = adapt(conversations(row), tokenizer)
    assert "no place for reasoning: in 1 conversations" in adapted.notes[0]
    (example,) = encode(adapted.conversations[0], tokenizer)
    assert tokenizer.shown(trained(example)) == "<think>\nhm\n</think>\n\nho<|im_end|>"


def test_a_template_for_lists_of_parts_that_leaves_out_all_text_is_exit_3() -> None:
    """Only the ends of empty answers would be trained: a loss near zero, and a model that says nothing."""
    with pytest.raises(DataError) as raised:
        encoded(PARTS, ROW)
    assert "data.jsonl, line 1 has turns of text, which this model's chat template leaves out" in raised.value.message
    assert "takes text" in (raised.value.hint or "")


# From here on with the real tokenizer of SmolLM2.


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Load the tokenizer of SmolLM2 with another template, and with more special tokens."""
    from backprop.engine.load import HfTokenizer, load_tokenizer

    def real(template: str | None = None, *, special: Sequence[str] = (), begins: bool = False) -> HfTokenizer:
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer = json.loads((ASSETS / "smollm2-tokenizer" / "tokenizer.json").read_text())
        settings = json.loads((ASSETS / "smollm2-tokenizer" / "tokenizer_config.json").read_text())
        settings |= {"bos_token": "<|endoftext|>", "extra_special_tokens": list(special)}
        if begins:  # as Llama's tokenizers do by themselves
            first = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
            parts = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
            tokenizer["post_processor"] = {
                "type": "TemplateProcessing",
                "single": parts,
                "pair": [*parts, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<|endoftext|>": first},
            }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return load_tokenizer(str(folder), trust_remote_code=False)

    return real


@pytest.mark.model
@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "ho there<|eot_id|>no<|eot_id|>"),
        (MISTRAL, ["[INST]", "[/INST]"], " ho there<|im_end|> no<|im_end|>"),
    ],
    ids=["Llama 3", "Mistral"],
)
def test_with_real_tokens_too_only_the_answers_and_their_ends_are_trained(
    real: Callable[..., Any], template: str, special: list[str], expected: str
) -> None:
    """marin#7237, axolotl#3754; the pad token is the end token, which collators then mask (backpropagate 1.8.5)."""
    tokenizer = real(template, special=special)
    assert tokenizer.inner.pad_token_id == tokenizer.inner.eos_token_id == 2
    (example,) = encode(conversations(chat("hi", "ho there", "hu", "no"))[0], tokenizer)
    assert tokenizer.inner.decode(trained(example)) == expected
    assert (example.answers, example.ended) == (2, 2)


@pytest.mark.model
@pytest.mark.parametrize(
    ("template", "row"),
    [(MISTRAL, chat("hi", "ho")), (None, chat("hi", "ho")), (None, {"text": "once upon a time"})],
    ids=["a template that writes it", "a base model without a template", "plain text"],
)
def test_a_tokenizer_that_begins_texts_by_itself_gives_one_beginning_and_no_second(
    real: Callable[..., Any], template: str | None, row: Mapping[str, object]
) -> None:
    """llama.cpp#7062: the template's and the tokenizer's own."""
    tokenizer = real(template, begins=True)
    assert tokenizer.inner("a")["input_ids"][0] == tokenizer.inner.bos_token_id == 0
    (example,) = encode(conversations(row)[0], tokenizer)
    assert example.ids[0] == 0
    assert example.ids.count(0) == 1


@pytest.mark.model
def test_the_template_of_smollm2_knows_system_turns_and_neither_tools_nor_reasoning(real: Callable[..., Any]) -> None:
    tokenizer = real((ASSETS / "smollm2-tokenizer" / "chat_template.jinja").read_text())
    rows = conversations(SYSTEM, ROW)
    assert adapt(rows, tokenizer).conversations == rows
    assert adapt(rows, tokenizer).notes == ()
    thinking = {"question": "hi", "answer": "ho", "reasoning": "hm"}
    adapted = adapt(conversations(thinking), tokenizer)
    assert "no place for reasoning" in adapted.notes[0]
    assert adapted.conversations[0].messages[1]["content"] == "<think>\nhm\n</think>\n\nho"
    for row in TOOLS_LEFT_OUT.values():
        with pytest.raises(DataError, match=r"data\.jsonl, line 1 has tool"):
            adapt(conversations(row), tokenizer)


@pytest.mark.model
def test_a_template_that_writes_the_date_writes_one_day_forever(
    real: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3.2's does: a run that was stopped before midnight was another one after it, and could not go on."""
    from transformers.utils import chat_template_utils

    tokenizer = real("{{ strftime_now('%d %b %Y') }}" + CHATML)
    found = []
    for day in (1, 2):
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda day=day: date(2031, 5, day)))
        (example,) = encode(conversations(chat("hi", "ho"))[0], tokenizer)
        found.append(tokenizer.inner.decode(example.ids))
    assert found[0] == found[1]
    assert found[0].startswith("26 Jul 2024<|im_start|>user")
