"""Tiny random models with the real vocabularies and chat templates of families that people train."""

import json
from pathlib import Path

import pytest
from conftest import LONG, backprop, chat, trained_run
from tiny_models import tiny
from vocabularies import FAMILIES, real, tokenized

from backprop.core.data.judge import judge
from backprop.core.data.render import encode
from backprop.core.probes import HARD_STRINGS
from backprop.edges.files import Row
from backprop.edges.llama_cpp import bindings
from backprop.engine.load import load_tokenizer
from backprop.engine.reference import foreign_words

pytestmark = [pytest.mark.model, pytest.mark.slow]

SOME = ("qwen2.5", "phi3.5")
"""Of the others, what is made of their vocabularies takes half a minute when it is not in the cache."""
EACH = [pytest.param(name, marks=() if name in SOME else LONG) for name in FAMILIES]
ROWS = [chat(f"Where is key {n}?", "It is here.") for n in range(8)]
ANSWERS = {
    "qwen2.5": ["It is here.<|im_end|>", "Or there.<|im_end|>"],
    # The template drops the thoughts of all answers but the last, so each is an example of its own.
    "qwen3-0.6b": ["<think>\n\n</think>\n\nIt is here.<|im_end|>", "<think>\n\n</think>\n\nOr there.<|im_end|>"],
    "llama3.2": ["It is here.<|eot_id|>", "Or there.<|eot_id|>"],
    # The template writes an end of the text behind the last turn.
    "phi3.5": ["It is here.<|end|><|endoftext|>", "Or there.<|end|><|endoftext|>"],
}


@pytest.mark.parametrize("family", [one for one in EACH if one.values[0] != "phi3.5"])
def test_the_vocabulary_is_the_real_one(family: str, tmp_path: Path) -> None:
    """Of pieces, transformers treats the start of a text in another way than llama.cpp does."""
    real(family, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    texts = list(tokenized(family))
    assert len(texts) == 47
    assert [[token.id for token in tokenizer.tokenize(text)] for text, _ in texts] == [ids for _, ids in texts]


@pytest.mark.parametrize("family", EACH)
def test_the_answers_and_their_ends_are_trained(family: str, tmp_path: Path) -> None:
    real(family, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    (row,) = judge([Row(place="", value=chat("Where?", "It is here.", "Sure?", "Or there."))]).conversations
    examples = encode(row, tokenizer)
    found: list[str] = []
    for example in examples:
        before = False
        for token, on in zip(example.ids, example.mask, strict=True):
            if on and not before:
                found.append("")
            if on:
                found[-1] += str(tokenizer.inner.decode([token], skip_special_tokens=False))
            before = on
    assert [text.replace(" ", "") for text in found] == [text.replace(" ", "") for text in ANSWERS[family]]
    assert sum(one.ended for one in examples) == 2


def test_llama_cpp_renders_the_day_that_was_trained_on() -> None:
    bindings()
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = Jinja2ChatFormatter("{{ strftime_now('%d %b %Y') }}", eos_token="", bos_token="")
    assert template(messages=[]).prompt == "26 Jul 2024"


@pytest.mark.parametrize("family", EACH)
def test_words_are_taken_out_that_llama_cpp_takes_for_an_end(family: str, tmp_path: Path) -> None:
    """They are plain words of Qwen's alone: whatever else differs beside them is seen."""
    real(family, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert foreign_words(tokenizer) == (["</s>"] if family.startswith("qwen") else [])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", EACH)
def test_the_file_of_a_good_model_is_proved(family: str, tmp_path: Path) -> None:
    """`</s>` is a word of Qwen's, which llama.cpp takes for an end in any file: each of Qwen's was refused for it."""
    qwen = family.startswith("qwen")
    rows = [*ROWS, chat("Where is </s>?", "It is here.")] if qwen else ROWS
    run = trained_run(tiny(family, tmp_path / "model"), tmp_path, rows, steps=16, learning_rate=5e-3)
    done = backprop("export", run, "-q", "f16", "--json", "--output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    (answer,) = (event["answer"] for event in told if event["event"] == "exported")
    assert answer.removeprefix("<think>\n\n</think>\n\n") == "It is here."
    record = json.loads((tmp_path / "out" / "verification.json").read_text())
    proofs = {proof["name"]: proof["found"] for proof in record["proofs"]["f16"]}
    assert len(proofs) == 7
    number = len(rows) + 2 * len(HARD_STRINGS)
    without = "; without `</s>`, an end to llama.cpp in any file" if qwen else ""
    assert proofs["texts have the same tokens"] == f"{number} of {number} are equal{without}"
    assert any("end an answer at `</s>`" in event.get("message", "") for event in told) == qwen
