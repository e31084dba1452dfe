"""Chat templates said as Go templates, or refused with the reason; rendered by the Go of `go_templates`."""

from collections.abc import Callable, Sequence

import go_templates
import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from backprop.core.data.formats import Message
from backprop.core.go_template import Turns, turns_of

CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
INSTRUCTIONS = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]
{%- elif message.role == 'assistant' %} {{ message.content }}</s>
{%- else %}{{ raise_exception('only users and assistants') }}{% endif %}{% endfor %}"""
MERGED_SYSTEM = """{% for message in messages %}{% if message.role == 'system' %}{% else %}<{{ message.role }}>
{%- if loop.index == 2 and messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}{{ message.content }}</>{% endif %}{% endfor %}"""
REASONING = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
# As Llama 3.2: a system turn is written in any case, with the date, and what is said in one stands in it.
ALWAYS = (
    """{{ bos_token }}<|system|>On 26 Jul 2024.
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}<|end|>
"""
    + CHATML
)
FIRST_DIFFERS = CHATML.replace("{{ message.role }}\n", "{{ message.role }}\n{{ '(first) ' if loop.first }}")
LAST_DIFFERS = CHATML.replace("{{ message.content }}", "{{ '<think></think>' if loop.last }}{{ message.content }}")


def rendering(template: str) -> Callable[[Sequence[Message], bool], str]:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)

    def render(messages: Sequence[Message], asks: bool) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=asks, bos_token="<s>")
        except jinja2.TemplateError as error:
            raise ValueError(str(error)) from error

    return render


def chat(*texts: str, system: str = "") -> list[Message]:
    roles = ("user", "assistant")
    turns: list[Message] = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


AGAIN: list[Message] = [*chat("Hi", "Ho"), {"role": "system", "content": "Be brief."}, *chat("He")]


@pytest.mark.parametrize(
    ("template", "added", "system", "conversations"),
    [
        (CHATML, "", "", [chat("Hi"), chat("Hi", "Ho", "He"), chat("Hi", system="Be brief.")]),
        (DEFAULT + CHATML, "", "Be kind.", [chat("Hi", "Ho", "He", system="Be kind.")]),
        (DEFAULT + CHATML, "", "", [chat("Hi"), chat("Hi", "Ho", "He", system="Be brief.")]),
        (ALWAYS, "<s>", "", [chat("Hi"), chat("Hi", "Ho", "He"), chat("Hi", "Ho", "He", system="Be brief."), AGAIN]),
        ("{{ bos_token }}" + CHATML, "<s>", "", [chat("Hi"), chat("Hi", system="Be brief.")]),
        ("Begin: " + CHATML, "", "", [chat("Hi"), chat("Hi", "Ho", "He"), chat("Hi", system="Be brief.")]),
        (INSTRUCTIONS, "<s>", "", [chat("Hi"), chat("Hi", "Ho", "He")]),
        (INSTRUCTIONS, "", "", [chat("Hi"), chat("Hi", "Ho", "He")]),
    ],
)
def test_go_renders_what_the_chat_template_renders(
    template: str, added: str, system: str, conversations: Sequence[Sequence[Message]]
) -> None:
    render = rendering(template)
    written = turns_of(render, [chat("a", "b")], added=added, system=system).to_go()
    for messages in conversations:
        expected = render(messages, True).removeprefix(added)
        assert go_templates.render(written, [dict(one) for one in messages]) == expected


def test_an_answer_that_is_gone_on_with_has_no_end() -> None:
    written = turns_of(rendering(CHATML), []).to_go()
    assert go_templates.render(written, [dict(one) for one in chat("Hi", "Well,")]).endswith("assistant\nWell,")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (MERGED_SYSTEM, "a system turn does not stand by itself"),
        (REASONING, "it rewrites reasoning"),
        (LAST_DIFFERS, "last turn"),
        (FIRST_DIFFERS, "first turn in another way"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "twice"),
        ("{{ messages[-1].content }}", "leaves turns out"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}", "leaves turns out"),
        (INSTRUCTIONS.replace("[INST]", "[{{ '{{' }}]"), "would be read as a part of a Go template"),
        (
            CHATML.replace("message.content", "message.content | replace('odd', 'even')"),
            "turns that begin with 'an odd",
        ),
    ],
)
def test_what_no_go_template_says_is_refused_with_the_reason(template: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        turns_of(rendering(template), [chat("an odd one", "b")]).to_go()


def test_turns_have_a_place_or_are_refused() -> None:
    turns = Turns(begin="", system=None, user=("<", ">"), assistant=("[", "]"), answer="[")
    assert turns.render(chat("a", "b"), False) == "<a>[b]"
    with pytest.raises(ValueError, match="no place for a turn of system"):
        turns.render(chat("a", system="s"), False)
