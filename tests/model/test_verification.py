"""An exported file that is not the model that was trained is rejected: faults planted between the merge and the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, backprop, chat, lose_last_tensors, trained_run
from tiny_models import tiny

from backprop.core.fidelity import likeness
from backprop.edges import device, hub, llama_cpp
from backprop.engine import merge, reference, streamed
from backprop.engine.load import HfTokenizer
from backprop.verbs import gguf

pytestmark = [pytest.mark.model, pytest.mark.slow]

ROWS = [chat(f"What is {n}?", f"It is {n}.") for n in range(12)]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tiny_model, tmp_path_factory.mktemp("trained"), ROWS, steps=60)


def adapted(run: Path) -> tuple[Any, HfTokenizer]:
    base = json.loads((run / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    return merge.load_adapted(base, run / "lora"), merge.adapted_tokenizer(run / "lora")


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def weights_changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def template(old: str, new: str) -> Callable[[Path], None]:
    """Put ``new`` for ``old`` in the chat template."""

    def edit(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))

    return edit


other_template = template("<|im_start|>", "<|im_start|> ")


def without_the_middle(tensors: dict[str, Any]) -> None:
    embedding = tensors["model.embed_tokens.weight"]
    embedding[1000:1400] = embedding[1000:1400].flip(0)


def shuffled_attention(tensors: dict[str, Any]) -> None:
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.1.self_attn.q_proj.weight"] = query.roll(16, 0).contiguous()


def rounded(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = (tensor * 32).round() / 32


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another template": (other_template, "prompts are rendered the same"),
    "another end token": (
        edited("tokenizer_config.json", lambda config: config.update(eos_token="<|endoftext|>")),
        "texts end with the same token",
    ),
    "another rope base": (
        edited("config.json", lambda config: config["rope_parameters"].update(rope_theta=100.0)),
        "predicts as the trained model",
    ),
    "a head in another place": (weights_changed(shuffled_attention), "predicts as the trained model"),
    "embeddings in another order": (weights_changed(without_the_middle), "predicts as the trained model"),
    "weights rounded in the merge": (weights_changed(rounded), "predicts as the trained model"),
}


def merge_there(folder: Path, merger: streamed.Merger) -> None:
    """Put merged weights in the place of the link to the base model's."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    merged = {name: merger.merge(name, one) if merger.changes(name) else one for name, one in weights.items()}
    (folder / "model.safetensors").unlink()
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})


def without_an_end(folder: Path) -> None:
    edited("tokenizer_config.json", lambda config: config.pop("eos_token"))(folder)
    for name in ("config.json", "generation_config.json"):
        edited(name, lambda config: config.pop("eos_token_id"))(folder)


def begins_nothing(folder: Path) -> None:
    edited("tokenizer_config.json", lambda config: config.update(add_bos_token=False))(folder)
    edited("tokenizer.json", lambda config: config.update(post_processor=None))(folder)


# Of tokenizers with a SentencePiece model: Llama 2's begins a text with a token, and so does its template; Phi-3's does not.
FAULTS_OF_PIECES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no first token of a text": ("llama-untied", begins_nothing, "texts have the same tokens"),
    "a first token of a text too many": (
        "phi3",
        edited("tokenizer_config.json", lambda config: config.update(add_bos_token=True)),
        "texts have the same tokens",
    ),
    "no first token in the template": (
        "llama-untied",
        template("{{- bos_token -}}", ""),
        "prompts are rendered the same",
    ),
    "two first tokens in the template": (
        "llama-untied",
        template("{{- bos_token -}}", "{{- bos_token + bos_token -}}"),
        "prompts are rendered the same",
    ),
    "no end token in the template": (
        "llama-untied",
        template("message.content + eos_token", "message.content"),
        "prompts are rendered the same",
    ),
    "no end token": ("phi3", without_an_end, "texts end with the same token"),
    "pieces without their scores": (
        "llama-untied",
        lambda folder: (folder / "tokenizer.model").unlink(),
        "texts have the same tokens",
    ),
    "marks of a turn that are plain text": (
        "gemma3",
        edited("tokenizer_config.json", lambda config: config.pop("added_tokens_decoder")),
        "texts have the same tokens",
    ),
    # This architecture's converter cuts the matrix to fit; the others' leave a file that cannot be loaded.
    "a vocabulary that is cut": (
        "gemma3",
        edited("config.json", lambda config: config.update(vocab_size=config["vocab_size"] - 40)),
        "the vocabulary is whole",
    ),
}


def planted(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], None]) -> None:
    """Let the converter read a folder whose weights are merged already, and a fault in it."""
    write_options, write_card = streamed.write_options, gguf.write_card
    mergers: list[streamed.Merger] = []

    def merged_already(path: Path, base: Path, adapter: Path, **told: Any) -> None:
        mergers.append(streamed.Merger(base, adapter, rounding=told["rounding"]))
        write_options(path, base, None, **told)

    def faulty(adapter: Any, folder: Path, *, name: str) -> None:
        write_card(adapter, folder, name=name)
        merge_there(folder, mergers[0])
        fault(folder)

    monkeypatch.setattr(streamed, "write_options", merged_already)
    monkeypatch.setattr(gguf, "write_card", faulty)


def in_bfloat16(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.bfloat16().to(tensor.dtype)


@pytest.mark.long
def test_a_merge_in_bfloat16_is_rejected_on_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a base in bfloat16, so that nothing but the merge rounds; on tiny random models it is no further than a good file."""
    base = tmp_path / "base"
    shutil.copytree(hub.find_model("smollm2-135m", offline=True).path, base)
    weights_changed(in_bfloat16)(base)
    data = ROOT / "examples" / "pottlesea.jsonl"
    options = ("--model", base, "--steps", "8", "--skip-proofs", "--offline")
    trained = backprop("train", "--data", data, *options, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    good = backprop("export", "output", "-q", "f16", "--output", "good", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    planted(monkeypatch, weights_changed(in_bfloat16))
    done = backprop("export", "output", "-q", "f16", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    failed = [name for name, ok in proofs_of(tmp_path / "output" / "export").items() if not ok]
    assert failed == ["the f16 file predicts as the trained model"]


def proofs_of(folder: Path, kind: str = "f16") -> dict[str, bool]:
    record = json.loads((folder / "verification.json").read_text())
    return {proof["name"]: proof["ok"] for proof in record["proofs"][kind]}


def refused(done: Any, folder: Path, proof: str) -> None:
    assert done.returncode == 7, done.stderr
    assert "error: not proved: " in done.stderr
    failed = [name for name, ok in proofs_of(folder).items() if not ok]
    assert any(proof in name for name in failed), failed
    assert {path.name for path in folder.iterdir()} == {"verification.json", "run-f16.gguf.rejected"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_is_another_model_is_rejected(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fault, proof = FAULTS[name]
    planted(monkeypatch, fault)
    done = backprop("export", run, "-q", "q8_0", "--output", tmp_path, cwd=tmp_path)
    refused(done, tmp_path, proof)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAULTS_OF_PIECES)
def test_a_file_that_is_another_tokenizer_is_rejected(
    taught: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    architecture, fault, proof = FAULTS_OF_PIECES[name]
    planted(monkeypatch, fault)
    done = backprop("export", taught(architecture), "-q", "q8_0", "--output", tmp_path, cwd=tmp_path)
    refused(done, tmp_path, proof)


# A tiny model that has learnt all there was answers nearly as far from its base with the adapter twice as with it once.
@pytest.mark.parametrize(("times", "proof"), [(0, "the adapter is in it, once"), (2, "predicts as the trained model")])
def test_an_adapter_that_is_not_in_it_or_twice_is_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, proof: str
) -> None:
    write_options = streamed.write_options
    twice = tmp_path / "twice"
    shutil.copytree(run / "lora", twice)
    edited("adapter_config.json", lambda config: config.update(lora_alpha=2 * config["lora_alpha"]))(twice)

    def faulty(path: Path, base: Path, adapter: Path, **told: Any) -> None:
        assert adapter == run / "lora"
        write_options(path, base, twice if times else None, **told)

    monkeypatch.setattr(streamed, "write_options", faulty)
    done = backprop("export", run, "-q", "f16", "--output", tmp_path / "out", cwd=tmp_path)
    refused(done, tmp_path / "out", proof)


def test_a_quantization_that_is_another_model_is_rejected_and_the_good_file_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_last_tensors(monkeypatch, "q6_k.gguf")
    done = backprop("export", run, "-q", "f16", "-q", "q6_k", "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "not proved: the q6_k file" in done.stderr
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"exports.json", "verification.json", "run-f16.gguf", "run-q6_k.gguf.rejected"}
    assert not all(proofs_of(tmp_path, "q6_k").values())


def test_every_file_is_proved_and_the_figures_kept(run: Path, tmp_path: Path) -> None:
    done = backprop("export", run, "-q", "q8_0", "-q", "q4_k_m", "--json", "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "proof"]
    assert [event["ok"] for event in told] == [True] * 11
    record = json.loads((tmp_path / "verification.json").read_text())
    assert {kind: len(proofs) for kind, proofs in record["proofs"].items()} == {"f16": 7, "q8_0": 2, "q4_k_m": 2}
    assert proofs_of(tmp_path)["the adapter is in it, once"]
    manifest = json.loads((run / "run.json").read_text())
    assert len(manifest["probes"]) == 12


def test_an_adapter_by_itself_is_proved_with_common_questions(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "lora", tmp_path / "mine")
    done = backprop("export", "mine", "-q", "q8_0", "--question", "What is 3?", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(proofs_of(tmp_path / "mine" / "export").values())


def test_an_adapter_that_brings_tokens_of_its_own_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As plain PEFT stores it: the words whole, beside LoRA on the layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny("llama-tied", tmp_path / "base")
    loaded: Any = AutoTokenizer
    tokenizer = loaded.from_pretrained(base)
    tokenizer.add_tokens(["<pottle>", "<sea>"], special_tokens=True)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, one in wrapped.named_parameters():
            if "lora_B" in name:
                one += 0.05 * torch.randn_like(one)
        words = wrapped.get_input_embeddings().weight
        words[-2:] = torch.randn_like(words[-2:])
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "mine", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "mine")
    # A random model may well answer with control tokens alone.
    monkeypatch.setattr(llama_cpp, "ask", lambda *_, **__: [reference.Reply(text="fine", stopped=True)])
    done = backprop("export", "mine", "-q", "q8_0", "--question", "<pottle>?", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "weight is whole in the adapter" in done.stderr
    assert all(proofs_of(tmp_path / "mine" / "export").values())
    with llama_cpp.loaded(tmp_path / "mine" / "export" / "mine-q8_0.gguf", context=64) as file:
        assert file.vocabulary == len(tokenizer)
        assert len(file.tokenize("<pottle><sea>")) == 2
    monkeypatch.setattr(reference.Checkpoint, "reply", lambda *_, **__: reference.Reply(text="fine", stopped=True))
    done = backprop("export", "mine", "--format", "safetensors", cwd=tmp_path)
    assert "the adapter is in it, once" in done.stderr, done.stderr
    assert proofs_of(tmp_path / "mine" / "export", "safetensors")["the adapter is in it, once"]


def test_a_checkpoint_is_proved_as_a_file_is(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("export", run, "--format", "safetensors", "--output", tmp_path)
    done = backprop(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    proofs = proofs_of(tmp_path, "safetensors")
    assert len(proofs) == 7
    assert all(proofs.values())
    assert (tmp_path / "safetensors" / "model.safetensors").is_file()
    assert backprop(*command, cwd=tmp_path).returncode == 0, "done is done"
    shutil.rmtree(tmp_path / "safetensors")
    monkeypatch.setattr(streamed.Merger, "changes", lambda *_: False)
    without_adapter = backprop(*command, cwd=tmp_path)
    assert without_adapter.returncode == 7, without_adapter.stderr
    assert not proofs_of(tmp_path, "safetensors")["the adapter is in it, once"]
    assert {path.name for path in tmp_path.iterdir()} == {"exports.json", "verification.json", "safetensors.rejected"}


def test_a_machine_without_room_for_the_trained_model_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "memory_free_bytes", lambda: 2**20)
    done = backprop("export", run, "-q", "f16", "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "1.0 GiB, and 0.0 GiB are free" in done.stderr
    assert "--no-verify" in done.stderr


def test_without_verification_nothing_is_proved(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, other_template)
    done = backprop("export", run, "-q", "q8_0", "--no-verify", "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "verification.json").exists()
    refused_later = backprop("export", run, "-q", "q8_0", "--output", tmp_path, cwd=tmp_path)
    assert refused_later.returncode == 7, "a file that was never verified was taken for one that was"
    assert "prompts are rendered the same" in refused_later.stderr


def test_the_reference_is_greedy_whatever_the_base_says_of_repetition(run: Path) -> None:
    model, tokenizer = adapted(run)
    asked = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3?"}]]
    first = reference.refer(model, tokenizer, asked)
    assert first.questions == asked
    assert first.replies[0].stopped
    model.generation_config.repetition_penalty = 9.0
    assert reference.refer(model, tokenizer, asked).replies == first.replies
    long = [[{"role": "user", "content": "word " * 600}]]
    assert reference.refer(model, tokenizer, long).questions == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_rounding_does_is_measured_and_leaves_the_model_as_it_was(
    run: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = json.loads((run / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = merge.load_adapted(base, run / "lora", dtype=dtype)
    texts = [list(range(20, 60)), list(range(100, 110))]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trained = [reference.logits(model, text) for text in texts]
    for most in (2**28, 4 * 49152 * 60):  # together, and one by one
        monkeypatch.setattr(reference, "MOST_BYTES", most)
        assert likeness(trained, reference.logits_together(model, texts)).mean_kl < 1e-9
    with reference.rounding_to_16_bits(model):
        rounded = reference.logits_together(model, texts)
        learnt = {name: one for name, one in model.named_parameters() if "q_proj.base_layer" in name}
        assert all((one == before[name]).all() for name, one in learnt.items()), (
            "weights change only while a layer computes"
        )
    assert 1e-9 < likeness(trained, rounded).mean_kl < 1e-4
    assert all(
        (one == before[name]).all() and one.dtype == before[name].dtype for name, one in model.named_parameters()
    )
    assert (reference.logits(model, texts[0]) == trained[0]).all()


def test_of_a_large_vocabulary_fewer_tokens_are_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = adapted(run)
    asked = [[{"role": "user", "content": "word " * 60}]] * 3
    assert sum(map(len, reference.refer(model, tokenizer, asked).sequences)) > 150
    monkeypatch.setattr(reference, "MOST_BYTES", 50 * 4 * 49152)
    found = reference.refer(model, tokenizer, asked)
    assert sum(map(len, found.sequences)) == sum(map(len, found.trained)) == 50
