"""An exported file in Ollama, from the command line: a strict double answers with llama.cpp from the file it received."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import go_templates
import ollama_double as double_of
import pytest
from conftest import HERE, backprop, chat, trained_run
from ollama_double import OllamaDouble
from tiny_models import TOKENIZERS

from backprop.edges.ollama import ModelParts
from backprop.engine.load import load_tokenizer
from backprop.verbs.register import default_system, stops_of, wanted

pytestmark = pytest.mark.model

ROWS = [chat(f"What is {n}?", "It is here.") for n in range(12)]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_model, model)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    return trained_run(model, tmp_path_factory.mktemp("trained"), ROWS, steps=60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OllamaDouble]:
    (tmp_path / "ollama").mkdir()
    with double_of.llama_answerer(tmp_path / "ollama") as answer, OllamaDouble(answer) as one:
        yield one


# What Ollama takes SmolLM2's template for.
CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
WITHOUT_END = CHATML.replace("<|im_end|>", "")


@pytest.mark.slow
def test_an_export_is_registered_and_answers_there_as_in_llama_cpp(
    run: Path, tmp_path: Path, server: OllamaDouble
) -> None:
    server.detected = CHATML
    command = ("export", run, "-q", "q8_0", "--output", tmp_path / "out", "--json", "--no-verify")
    done = backprop(*command, "--ollama", "--ollama-name", "my-model", cwd=tmp_path, OLLAMA_HOST=server.url)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    (registered,) = [event for event in told if event["event"] == "registered"]
    assert (registered["name"], registered["answer"]) == ("my-model", "It is here.")
    assert set(server.models) == {"my-model:latest"}
    model = server.models["my-model:latest"]
    assert model.parameters["stop"] == ["<|im_end|>"]
    assert "helpful AI assistant" in model.system
    assert model.license == "apache-2.0"
    written = (tmp_path / "out" / "Modelfile").read_text()
    assert written.endswith('LICENSE """apache-2.0"""\n')
    assert written.startswith('FROM "./run-q8_0.gguf"\nPARAMETER stop "<|im_end|>"\nSYSTEM ')
    for detected, renders_only in ((double_of.NO_TEMPLATE, False), (WITHOUT_END, True)):
        server.detected, server.renders_only = detected, renders_only
        again = backprop(*command, "--ollama", "--ollama-name", "my-model", cwd=tmp_path, OLLAMA_HOST=server.url)
        assert again.returncode == 0, again.stderr
        written = (tmp_path / "out" / "Modelfile").read_text()
        assert f'TEMPLATE """{server.models["my-model:latest"].template}"""' in written
        assert "it is given a TEMPLATE" in again.stdout


@pytest.mark.slow
def test_a_chat_template_that_no_go_template_says_is_told(run: Path, tmp_path: Path, server: OllamaDouble) -> None:
    shutil.copytree(run, tmp_path / "run")
    template = tmp_path / "run" / "lora" / "chat_template.jinja"
    old = "message['content']"
    assert old in template.read_text()
    template.write_text(template.read_text().replace(old, f"{old}.split('</think>')[-1]"))
    command = ("export", tmp_path / "run", "-q", "q8_0", "--no-verify", "--ollama-name", "mine", "--json")
    done = backprop(*command, cwd=tmp_path, OLLAMA_HOST=server.url)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    (warned,) = [event["message"] for event in told if event["event"] == "warning"]
    assert "Ollama would render prompts otherwise than in training" in warned
    assert "no TEMPLATE can mend that: of the chat template, it rewrites reasoning" in warned


@pytest.mark.parametrize(
    ("architecture", "system", "holds", "stops"),
    [
        (
            "llama-tied",
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
            "<|im_end|>",
            ("<|im_end|>",),
        ),
        ("llama-untied", "", " [/INST]{{ else if", ("</s>",)),
        ("gemma3", "", "<start_of_turn>model\n{{ end }}{{ end }}", ("<end_of_turn>", "<eos>")),
        ("phi3", "", '{{ else if eq .Role "system" }}<|system|>\n{{ .Content }}<|end|>', ("<|end|>", "<|endoftext|>")),
    ],
)
def test_the_template_and_stops_of_a_family_are_found(
    architecture: str, system: str, holds: str, stops: tuple[str, ...], tmp_path: Path
) -> None:
    TOKENIZERS[architecture](tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"), trust_remote_code=False)
    adapter: Any = type("Adapter", (), {"question": "Who?", "probes": [HERE[0]["messages"]]})
    found = wanted(tokenizer, adapter, "a.gguf", ModelParts(system=system), default=default_system(tokenizer))
    assert default_system(tokenizer) == system
    assert stops_of(tokenizer) == stops
    assert (found.why_not, found.left_out) == ("", "")
    assert holds in found.template
    assert "bos" not in found.template
    assert "<s>" not in found.template
    for messages, text in found.prompts:
        lead = [{"role": "system", "content": system}] if system else []
        rendered = go_templates.render(found.template, [*lead, *map(dict, messages)])
        assert rendered == text.removeprefix(found.added)


@pytest.mark.slow
def test_a_server_that_answers_otherwise_is_exit_8_and_what_was_there_stays(run: Path, tmp_path: Path) -> None:
    with OllamaDouble(lambda asked: "Something else.") as server:
        command = ("export", run, "-q", "q8_0", "--output", tmp_path / "out", "--no-verify", "--ollama-name", "mine")
        done = backprop(*command, cwd=tmp_path, OLLAMA_HOST=server.url)
        assert done.returncode == 8, done.stderr
        assert 'Ollama answers "Something else."' in done.stderr
        assert not server.models
    made = (tmp_path / "out" / "run-q8_0.gguf").stat()
    found = re.search(r"is kept: `(backprop export .*)` then only registers it", done.stderr)
    assert found, done.stderr
    _, *told = shlex.split(found[1])
    with double_of.llama_answerer(tmp_path) as answer, OllamaDouble(answer) as server:
        again = backprop(*told, cwd=tmp_path, OLLAMA_HOST=server.url)
        assert again.returncode == 0, again.stderr
        assert set(server.models) == {"mine:latest"}
    assert (tmp_path / "out" / "run-q8_0.gguf").stat() == made, "it is not made again"


def test_what_ollama_cannot_take_is_refused_before_any_work(run: Path, tmp_path: Path) -> None:
    command = ("export", run, "--output", tmp_path / "out")
    assert backprop(*command, "--ollama-name", "../etc", cwd=tmp_path).returncode == 2
    nobody = backprop(*command, "--ollama", "--ollama-url", "http://127.0.0.1:9", cwd=tmp_path)
    assert nobody.returncode == 8, nobody.stderr
    assert backprop(*command, "--format", "safetensors", "--ollama", cwd=tmp_path).returncode == 2
    with OllamaDouble() as server:
        for system, why in (('Say """yes".', "holds"), ("no\u00a0break", "U+00A0")):
            refused = backprop(*command, "--ollama", "--system", system, cwd=tmp_path, OLLAMA_HOST=server.url)
            assert refused.returncode == 2, refused.stderr
            assert why in refused.stderr
        shutil.copytree(run, tmp_path / "run")
        template = tmp_path / "run" / "lora" / "chat_template.jinja"
        refuses = "{{ raise_exception('no system turns') if messages[0].role == 'system' }}"
        template.write_text(refuses + template.read_text())
        command = ("export", tmp_path / "run", "--output", tmp_path / "out", "--ollama", "--system", "Be brief.")
        refused = backprop(*command, cwd=tmp_path, OLLAMA_HOST=server.url)
        assert refused.returncode == 2, refused.stderr
        assert "refuses a system prompt" in refused.stderr
        hostile = shutil.copytree(run, tmp_path / 'a"\u202eb')
        command = ("export", hostile, "--output", tmp_path / "out", "--ollama", "--ollama-name", "mine")
        refused = backprop(*command, cwd=tmp_path, OLLAMA_HOST=server.url)
        assert refused.returncode == 2, refused.stderr
        assert "U+202E" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_the_system_turn_that_a_template_adds_is_found(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), trust_remote_code=False)
    assert default_system(tokenizer) == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    tokenizer.inner.chat_template = plain
    assert default_system(tokenizer) == ""
    tokenizer.inner.chat_template = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + plain
    assert default_system(tokenizer) == ""
