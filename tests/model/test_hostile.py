"""Data sets, models, adapters, run directories and settings of someone who means harm. SECURITY.md names each."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, Run, backprop, backprop_process, chat

from backprop.edges import files, model_files, rundir
from backprop.engine import templates
from backprop.engine.load import load_tokenizer
from backprop.errors import DataError, ModelError, UsageError
from backprop.verbs.source import find_adapter

pytestmark = pytest.mark.model

# What shows that code of a stranger has run.
TOUCH = "__import__('pathlib').Path({path!r}).touch()"


class Bomb:
    """What pickle would run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self._path),))


def copy_of(model: Path, folder: Path, **config: Any) -> Path:
    """Copy a model, with other settings."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def refused(model: Path, data: Path, *options: str, cwd: Path) -> str:
    """Give what a dry run says of a model that it must refuse as one (exit 4), soon."""
    started = time.process_time()
    done = backprop("train", "--data", data, "--model", model, "--dry-run", *options, cwd=cwd)
    assert done.returncode == 4, done.stderr
    assert time.process_time() - started < 10
    assert "Traceback" not in done.stderr
    return done.stderr


# --- the data set


@pytest.mark.slow
@pytest.mark.long
def test_a_file_that_expands_without_end_is_refused(tmp_path: Path) -> None:
    for name, row in (
        ("lines.jsonl.gz", b"\n" * 2**20),
        ("list.json.gz", b"[" + b" " * 2**20),
        ("t.txt.gz", b"a\n" * 2**19),
    ):
        path = tmp_path / name
        with gzip.open(path, "wb") as file:
            for _ in range(40):
                file.write(row)
        with pytest.raises(DataError, match=r"expands to more than 200 times its size"):
            list(files.read_rows(str(path)))


def test_well_packed_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(chat("a", "b " * 200)) + "\n" for _ in range(20_000))
    assert sum(1 for _ in files.read_rows(str(path))) == 20_000


def test_a_folder_of_data_brings_no_files_of_this_machine(tmp_path: Path, write: Callable[..., Path]) -> None:
    secret = write([chat("my", "secret")], "secret.jsonl")
    folder = tmp_path / "theirs"
    folder.mkdir()
    shutil.copy(secret, folder / "good.jsonl")
    assert len(list(files.read_rows(str(folder)))) == 1
    (folder / "inside.jsonl").symlink_to("good.jsonl")
    assert len(list(files.read_rows(str(folder)))) == 2
    (folder / "outside.jsonl").symlink_to(secret)
    with pytest.raises(DataError, match="a link that leads out of"):
        list(files.read_rows(str(folder)))


def test_the_hubs_own_cache_may_link_to_its_files(tmp_path: Path, write: Callable[..., Path]) -> None:
    blob = tmp_path / "datasets--a--b" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    shutil.move(write([chat("a", "b")]), blob)
    folder = tmp_path / "datasets--a--b" / "snapshots" / "main"
    folder.mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").symlink_to(blob)
    assert len(list(files.read_rows(str(folder)))) == 1
    assert len(list(files.read_rows(str(folder / "data")))) == 1
    blob.parent.rename(tmp_path / "datasets--a--b" / "others")
    (folder / "data" / "rows.jsonl").unlink()
    (folder / "data" / "rows.jsonl").symlink_to(tmp_path / "datasets--a--b" / "others" / "0123")
    with pytest.raises(DataError, match="a link that leads out of"):
        list(files.read_rows(str(folder)))


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is not a file"):
        list(files.read_rows(str(path)))


def test_escapes_of_a_terminal_in_data_are_shown_and_not_sent(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m<script>alert(1)</script>"
    done = backprop("train", "--data", write([chat(evil, evil)] * 4), "--model", tiny_model, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not set("\x1b\x07\x9b") & set(done.stdout + done.stderr)


# --- the model's repository


def test_pickled_weights_are_not_opened(tiny_model: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    import pickle

    model = copy_of(tiny_model, tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    done = backprop("train", "--data", write(HERE), "--model", model, "--steps", "1", "--skip-proofs", cwd=tmp_path)
    assert done.returncode == 0, "the safetensors beside them are enough"
    (model / "model.safetensors").unlink()
    assert "can run code when opened" in refused(model, write(HERE), cwd=tmp_path)
    assert not (tmp_path / "ran").exists()


def with_code(model: Path, ran: Path, *, where: str = "") -> Path:
    """Let a model bring code of its own, or name code elsewhere."""
    names = {"AutoConfig": f"{where}code.Config", "AutoModelForCausalLM": f"{where}code.Model"}
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": names, "model_type": "their_own"}))
    (model / "code.py").write_text(TOUCH.format(path=str(ran)) + "\n")
    return model


def test_code_of_a_model_does_not_run_unasked(tiny_model: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    model = with_code(copy_of(tiny_model, tmp_path / "model"), tmp_path / "ran")
    said = refused(model, write(HERE), cwd=tmp_path)
    assert "--trust-remote-code" in said
    assert not (tmp_path / "ran").exists()


def test_code_of_another_repository_never_runs(tiny_model: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    model = with_code(copy_of(tiny_model, tmp_path / "model"), tmp_path / "ran", where="owner/evil--")
    said = refused(model, write(HERE), "--trust-remote-code", cwd=tmp_path)
    assert "takes code from another repository" in said


def test_code_of_the_hub_needs_a_revision(write: Callable[..., Path], tmp_path: Path) -> None:
    options = ["train", "--data", write(HERE), "--trust-remote-code", "--offline", "--dry-run", "--model"]
    for name in ("owner/name", "owner/name@main", "owner/name@v1.0"):
        done = backprop(*options, name, cwd=tmp_path)
        assert done.returncode == 2
        assert "--model owner/name@COMMIT" in done.stderr
    done = backprop(*options, "owner/name@0123abc", cwd=tmp_path)
    assert done.returncode == 4
    assert "is not here" in done.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000, and 10000"),
        ({"vocab_size": 10**15}, "vocab_size: 1000000000000000"),
        ({"text_config": {"hidden_size": 10**12}}, "hidden_size"),
        ({"hidden_size": float("nan")}, "hidden_size: nan"),
    ],
    ids=["layers", "words", "inside", "no number"],
)
def test_absurd_numbers_are_refused(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    assert said in refused(copy_of(tiny_model, tmp_path / "model", **config), write(HERE), cwd=tmp_path)


@pytest.mark.slow
def test_no_kind_of_model_that_transformers_knows_is_refused(tmp_path: Path) -> None:
    """The defaults of Gemma 3n and 4 were: words for each layer, gradients clipped at 1e10, infinite limits."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tried = 0
    for kind in CONFIG_MAPPING:
        try:
            text = CONFIG_MAPPING[kind]().to_json_string(use_diff=False)
        except (ValueError, OSError, ImportError, StrictDataclassError):
            continue  # made of others, which it must be given
        (tmp_path / "config.json").write_text(text)
        model_files.check_model(tmp_path)
        tried += 1
    assert tried > 500


@pytest.mark.parametrize("shard", ["../../other/model.safetensors", "/etc/passwd", "..\\x.safetensors", "x.bin"])
def test_weights_stay_in_their_folder(tiny_model: Path, tmp_path: Path, shard: str) -> None:
    model = copy_of(tiny_model, tmp_path / "model")
    (model / model_files.INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": shard}}))
    with pytest.raises(ModelError, match="names weights outside of the folder"):
        model_files.check_model(model)


def test_weights_that_are_quantized_already_are_refused_before_training(
    tiny_model: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    """Training might have begun on them, and export, after it, could not read them."""
    model = copy_of(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    four_bits = {"quant_method": "awq", "bits": 4}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": four_bits}))
    done = backprop("train", "--data", write(HERE), "--model", model, "--steps", "1", cwd=tmp_path)
    assert done.returncode == 4
    assert "are quantized already" in done.stderr
    assert "--method qlora" in done.stderr


def test_files_of_a_model_are_plain(tiny_model: Path, tmp_path: Path) -> None:
    model = copy_of(tiny_model, tmp_path / "model")
    model_files.check_model(model)
    os.mkfifo(model / "README.md")
    with pytest.raises(ModelError, match="is no plain file"):
        model_files.check_model(model)


@pytest.mark.parametrize("content", ["[]", "{", "nul", "[" * 100_000, '{"a": NaN'])
def test_a_configuration_that_is_none_is_refused(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, content: str
) -> None:
    model = copy_of(tiny_model, tmp_path / "model")
    (model / "config.json").write_text(content)
    assert "config.json" in refused(model, write(HERE), cwd=tmp_path)


# --- the chat template

# Jinja computes it beforehand, and would take the end of the time for an error of the template.
SWALLOWING = "{% set x = ('a' * 1000 * 900) | wordwrap(1) %}"
LOOP = "{%- for a in range(90000) -%}{%- for b in range(90000) -%}{%- endfor -%}{%- endfor -%}"
DOUBLING = (
    "{%- set n = namespace(s='ab') -%}{%- for a in range(60) -%}{%- set n.s = n.s + n.s -%}{%- endfor -%}{{ n.s }}"
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOP, "works for more than"),
        (DOUBLING, "asks for too much: memory"),
        (SWALLOWING + LOOP, "works for more than"),
        ("{{ 1.5 | round(999999999, 'floor') }}", "rounds to an unknown number"),
        ("{{ 1.5 | round(precision=n) }}", "rounds to an unknown number"),
        ("{{ 1.5 | round(*many) }}", "rounds to an unknown number"),
        ("{{ [1.5] | map('round', 999999999, 'floor') | list }}", "rounds to an unknown number"),
        ("{{ [1.5] | map(name, 999999999, 'floor') | list }}", "rounds to an unknown number"),
        ("{{ 1" + "0" * 5000 + " }}", "cannot be read"),
        ("{{ 'a' * 999 * 999 * 999 * 999 }}", "asks for too much"),
        ("{% for a in range(10 ** 2) %}{% endfor %}", "computes a power"),
        ("{% set n = namespace(x=9) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}", "product of two"),
        ("{{ ('x' * 999 * 9) | replace('x', 'xxxxxxxxxx' * 100) }}", "characters of one conversation"),
        ("{{ messages", "cannot be read"),
        (" " * (2**20 + 1), "1,048,577 characters"),
    ],
    ids=[
        *("a loop", "doubling", "a constant", "digits", "digits by name", "digits in a list", "digits of each"),
        *("digits of any filter", "a huge number", "a product", "a power", "squares", "a long text", "no template"),
        "a long template",
    ],
)
def test_a_template_without_end_is_stopped(
    tiny_model: Path,
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    said: str,
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    monkeypatch.setattr(templates, "MEMORY_MOST", 2**28)
    monkeypatch.setattr(templates, "TEXT_MOST", 2**22)
    model = copy_of(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    assert said in refused(model, write(HERE), cwd=tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% set x = messages.append(1) %}",
    ],
)
def test_a_template_stays_in_its_sandbox(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, template: str
) -> None:
    model = copy_of(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    done = backprop("train", "--data", write(HERE), "--model", model, "--dry-run", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "uid=" not in done.stderr + done.stdout
    assert "Popen" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{{ 1 / 0 }}", DataError),
        ("{{ '%z' % 1 }}", DataError),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DataError),
        ('{{ "\\ud800" }}', ModelError),
    ],
    ids=["a division by nothing", "no such format", "a macro of itself", "half a character"],
)
def test_a_template_that_fails_is_an_error_of_ours(
    tiny_model: Path, tmp_path: Path, template: str, kind: type[Exception]
) -> None:
    model = copy_of(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(model), trust_remote_code=False)
    with pytest.raises(kind, match="chat template"):
        tokenizer.render([{"role": "user", "content": "hi"}], add_generation_prompt=False)


BROKEN_MERGES = {
    "version": "1.0",
    "added_tokens": [],
    "model": {
        "type": "BPE",
        "continuing_subword_prefix": "a long one",
        "vocab": {"h": 0, "i": 1, "hi": 2},
        "merges": [["h", "i"]],
    },
}


WITHOUT_UNKNOWN = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"h": 0}, "unk_token": "x"},
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"version": "1.0", "added'),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Evil"}}'),
        ("tokenizer.json", json.dumps(BROKEN_MERGES)),
        ("tokenizer.json", json.dumps(WITHOUT_UNKNOWN)),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", '{"eos_token": "<|im_end|>", "model_max_length": "x"}'),
        ("tokenizer_config.json", '{"eos_token": "<|im_end|>", "chat_template": 3}'),
        ("tokenizer_config.json", '{"eos_token": "<|im_end|>", "chat_template": [{"name": "a", "template": "x"}]}'),
    ],
    ids=[
        *(
            "cut off",
            "of no known kind",
            "that makes its library panic",
            "without its token for the unknown",
            "nested without end",
            "an end that is a number",
        ),
        *("a length that is text", "a template that is a number", "templates without a default"),
    ],
)
def test_a_tokenizer_that_is_damaged_is_refused(tiny_model: Path, tmp_path: Path, name: str, text: str) -> None:
    model = copy_of(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / name).write_text(text)
    with pytest.raises(ModelError):
        load_tokenizer(str(model), trust_remote_code=False)


@templates.limited()
def endless() -> None:
    while True:
        pass


def test_a_slow_template_does_not_stop_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    with pytest.raises(ModelError):
        endless()
    for _ in range(3):
        with templates.limited():
            pass
        time.sleep(0.1)


TRACED = """
import sys
from backprop.engine import templates
from backprop.errors import ModelError

@templates.limited()
def render(*, on_and_on):
    while on_and_on:
        pass

def traced():
    sys.settrace(lambda *_: lambda *_: None)
    [None for _ in range(9)]
    sys.settrace(None)

render(on_and_on=False)
traced()
templates.SECONDS = 0.2
try:
    render(on_and_on=True)
except ModelError:
    traced()
    print("ended")
"""


def test_the_limit_of_time_and_a_debugger_go_together() -> None:
    """Python 3.11 traced the same instruction for ever once an exception of another thread was taken back."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "ended\n", done.stderr


def test_threads_render_one_after_the_other_and_leave_the_limit_of_memory_as_it_was() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)

    def render(seconds: float) -> None:
        with templates.limited():
            time.sleep(seconds)

    threads = [threading.Thread(target=render, args=(seconds,)) for seconds in (0.2, 0.3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_templates_of_the_presets_kinds_are_not_refused(taught: Callable[[str], Path]) -> None:
    load_tokenizer(str(taught("llama-tied") / "lora"), trust_remote_code=False)
    templates.check("{{ '  ' * depth }}{{ 2 * loop.index0 }}{% generation %}x{% endgeneration %}{% break %}")
    templates.check("{{ 1.23 | round(1) }}{{ 2 | round }}{{ messages | map(attribute='role') | map('upper') | list }}")


# --- the adapter


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING, which cannot be merged"),
        ({"peft_type": "XLORA"}, "XLORA, which cannot be merged"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"r": 10**9}, "r: 1000000000"),
        ({"rank_pattern": {"q": 10**9}}, "q: 1000000000"),
        ({"target_modules": "(.*a)*(.*b)*x"}, "target_modules: `(.*a)*(.*b)*x`"),
        ({"target_modules": "(a|a)+x"}, "which may take for ever"),
        ({"target_modules": "(?x)(.+) +x"}, "which may take for ever"),
        ({"target_modules": ".?" * 50 + "x"}, "which may take for ever"),
        ({"exclude_modules": "((.+))+x"}, "exclude_modules"),
        ({"layers_pattern": ["(.+)+x"]}, "layers_pattern"),
        ({"modules_to_save": ["lm_head", "(.+)+x"]}, "modules_to_save"),
        ({"modules_to_save": ["["]}, "modules_to_save"),
        ({"layers_pattern": [[]]}, "layers_pattern"),
        ({"auto_mapping": json.loads("[" * 150 + "]" * 150)}, "levels deep"),
        ({"rank_pattern": {"(.+){2,}x": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_adapter_does_no_more_than_adapt(
    taught: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    from backprop.config import ExportConfig

    folder = tmp_path / "adapter"
    shutil.copytree(taught("llama-tied") / "lora", folder)
    path = folder / "adapter_config.json"
    assert find_adapter(folder, ExportConfig(), say=print).folder == folder
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(ModelError) as caught:
        find_adapter(folder, ExportConfig(), say=print)
    assert said in caught.value.message


@pytest.mark.parametrize(
    "settings",
    [
        {
            "target_modules": ["q_proj", "(.*)*"],
            "rank_pattern": {r"^layers\.0\.self_attn\.q_proj": 4, "mlp.down_proj": 8},
        },
        {"target_modules": "all-linear", "exclude_modules": None, "layers_pattern": "layers"},
        {"target_modules": r"model\.layers\.(?:[0-9]|1[0-9])\.(self_attn|mlp)\.(?:(?:q|k|v|o)_proj|\w+_proj)"},
        {
            "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
            r"(?:q_proj|k_proj|v_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
        },
    ],
    ids=["names", "all", "a pattern", "as unsloth writes it"],
)
def test_patterns_of_adapters_that_end_are_accepted(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **settings}))
    model_files.check_adapter(tmp_path)


@pytest.mark.parametrize("base", ["owner/evil@0123abc", "its own"])
def test_an_adapter_chooses_no_code(taught: Callable[[str], Path], tmp_path: Path, base: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(taught("llama-tied") / "lora", folder)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    if base == "its own":
        base = str(shutil.copytree(settings["base_model_name_or_path"], folder / "model"))
    path.write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    done = backprop("export", folder, "--trust-remote-code", "--offline", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "itself chooses the code" in done.stderr


def test_a_pickled_adapter_is_not_opened(taught: Callable[[str], Path], tmp_path: Path) -> None:
    import pickle

    folder = tmp_path / "adapter"
    shutil.copytree(taught("llama-tied") / "lora", folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    done = backprop("export", folder, "--no-verify", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "ran").exists()


# --- the run directory


@pytest.mark.parametrize(
    "name", ["events.jsonl", "run.json", "lora", "checkpoints", "checkpoints/step-000002", "runs", "report.html"]
)
def test_a_run_that_was_handed_over_leads_nowhere_else(train: Callable[..., Run], tmp_path: Path, name: str) -> None:
    run = train(steps=2, save_steps=1, skip_proofs=True)
    state = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**state, "status": "running"}))
    ours = tmp_path / "ours"
    target = run.folder / name
    if name == "runs":
        ours.mkdir()
    else:
        shutil.move(target, ours)
    target.symlink_to(ours)
    before = {path: path.read_bytes() for path in tmp_path.glob("ours*/**/*") if path.is_file()}
    again = train(steps=2, save_steps=1, skip_proofs=True, overwrite=False, resume="auto")
    assert "is a link to" in again.failed.message
    assert again.failed.code == 2
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("by_itself", [True, False], ids=["an adapter", "a run"])
def test_an_export_is_led_nowhere_else(taught: Callable[[str], Path], tmp_path: Path, by_itself: bool) -> None:
    folder, ours = tmp_path / "theirs", tmp_path / "ours"
    shutil.copytree(taught("llama-tied") / ("lora" if by_itself else ""), folder)
    shutil.rmtree(folder / "export", ignore_errors=True)
    ours.mkdir()
    (folder / "export").symlink_to(ours)
    done = backprop("export", folder, "--no-verify", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "is a link to" in done.stderr
    assert list(ours.iterdir()) == []


@pytest.mark.parametrize("name", ["CON", "nul.txt", "Com1", "a/LPT9/b", "aux.", "com¹"])
def test_devices_of_windows_are_no_folders_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    assert rundir.check(path, {}, overwrite=False) == "nothing"
    monkeypatch.setattr("backprop.edges.rundir.os.name", "nt")
    try:
        with pytest.raises(UsageError, match="is a device on Windows"):
            rundir.check(path, {}, overwrite=False)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize(
    "state", ['{"identity": {}, "result": 3}', '{"identity": {"steps": []}}', '{"identity": {}, "status": {}}', "\x00"]
)
def test_a_forged_manifest_is_refused_in_words(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, state: str
) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "run.json").write_text(state)
    done = backprop("train", "--data", write(HERE), "--model", tiny_model, "--steps", "1", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


# --- settings


@pytest.mark.parametrize(
    "text",
    [
        "steps: !!python/object/apply:os.mkdir ['ran']",
        "a: &a [x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        + "data: *i\n",
        "? [a]\n: 1",
        "steps: 1" + "0" * 5000,
        "- " * 5000,
    ],
    ids=["an object", "a billion laughs", "a list as key", "a huge number", "deep"],
)
def test_a_config_file_runs_nothing_and_ends_soon(tiny_model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    started = time.monotonic()
    done = backprop_process("train", "--config", "run.yaml", "--model", tiny_model, cwd=tmp_path, timeout_s=20)
    assert done.returncode in (2, 3), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 10
    assert not (tmp_path / "ran").exists()


# --- secrets

SECRETS = {
    "HF_TOKEN": "hf_secret0123456789",
    "OLLAMA_API_KEY": "ollama-secret-0123",
    "WANDB_API_KEY": "wandb-secret-0123",
    "HTTPS_PROXY": "http://me:proxy-secret@127.0.0.1:9",
}


@pytest.mark.slow
def test_no_secret_is_written_or_told(tiny_model: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--data", write(HERE), "--model", tiny_model, "--steps", "2", "--skip-proofs", "--save-steps", "1"]
    said = [backprop_process("train", *options, "--json", "--verbose", cwd=tmp_path, **SECRETS)]
    said += [
        backprop_process("train", *options[:-4], "--overwrite", "--lr", "1", "--steps", "3", cwd=tmp_path, **SECRETS)
    ]
    said += [backprop_process("doctor", "--json", cwd=tmp_path, **SECRETS)]
    said += [backprop_process("train", *options[:2], "--model", "owner/none", "--offline", cwd=tmp_path, **SECRETS)]
    told = "".join(one.stdout + one.stderr for one in said)
    written = b"".join(path.read_bytes() for path in (tmp_path / "output").rglob("*") if path.is_file())
    for secret in ("secret0123456789", "ollama-secret", "wandb-secret", "proxy-secret"):
        assert secret not in told
        assert secret.encode() not in written
