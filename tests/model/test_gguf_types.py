"""What GGUF can be: every type of the quantizer, the adapter alone, metadata, importance matrices, splits; on a tiny model."""

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import backprop, chat, lose_last_tensors, trained_run

from backprop.config import NEEDS_IMATRIX, ExportConfig, Quantization
from backprop.core.fidelity import MOST_KL
from backprop.edges import llama_cpp, llama_tools
from backprop.errors import DataError, ExportError, UsageError
from backprop.verbs import card
from backprop.verbs.source import Adapter

pytestmark = pytest.mark.model

ROWS = [chat(f"What is {n}?", "It is here.") for n in range(12)]
TYPES = get_args(Quantization)
OF_EXPERTS_OR_FEW_BITS = {"mxfp4_moe", "nvfp4", "tq1_0", "tq2_0", "q1_0", "q2_0"}
PLAIN = [kind for kind in TYPES if kind not in NEEDS_IMATRIX]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tiny_model, tmp_path_factory.mktemp("trained"), ROWS, steps=100, learning_rate=5e-3)


def exported(run: Path, output: Path, *options: str | Path) -> list[dict[str, Any]]:
    """Export quietly, and give what was said of each file."""
    done = backprop("export", run, "--output", output, "--json", *options, cwd=output.parent)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return [event for event in events if event["event"] == "exported"]


def metadata(gguf: Path) -> dict[str, Any]:
    gguf_package = pytest.importorskip("gguf")
    return {name: field.contents() for name, field in gguf_package.GGUFReader(gguf).fields.items()}


def proofs_of(folder: Path) -> dict[str, list[bool]]:
    record = json.loads((folder / "verification.json").read_text())
    return {kind: [proof["ok"] for proof in proofs] for kind, proofs in record["proofs"].items()}


# Types


def test_the_types_are_those_of_the_pinned_llama_cpp() -> None:
    prefix = "LLAMA_FTYPE_MOSTLY_"
    known = {name.removeprefix(prefix).lower() for name in dir(llama_cpp.bindings()) if name.startswith(prefix)}
    assert known - OF_EXPERTS_OR_FEW_BITS == set(TYPES) - {"f32"}


def test_every_type_has_a_bound() -> None:
    assert {f"lora-{kind}" for kind in ("f32", "f16", "bf16", "q8_0")} | set(TYPES) == set(MOST_KL)


def test_the_types_that_need_an_importance_matrix_are_those_that_the_quantizer_refuses(tmp_path: Path) -> None:
    llama_cpp.quantize_tiny(tmp_path)
    refused: list[str] = []
    for kind in [kind for kind in TYPES if kind not in llama_cpp.CONVERTED]:
        try:
            llama_cpp.quantize(tmp_path / "tiny.gguf", tmp_path / "out.gguf", quantization=kind)
        except ExportError:
            refused.append(kind)
    assert set(refused) == set(NEEDS_IMATRIX)


@pytest.mark.slow
def test_all_types_come_from_one_conversion(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converting, converted = llama_cpp.converting, list[str]()

    def counted(folder: Path, gguf: Path, *, kind: str, through: Sequence[str]) -> Any:
        converted.append(kind)
        return converting(folder, gguf, kind=kind, through=through)

    monkeypatch.setattr(llama_cpp, "converting", counted)
    told = exported(run, tmp_path / "out", *(part for kind in PLAIN for part in ("-q", kind)))
    assert [event["quantization"] for event in told] == PLAIN
    assert {event["answer"] for event in told if event["quantization"] in ("f32", "f16", "q8_0")} == {"It is here."}
    assert sorted(converted) == ["bf16", "f16", "f32"]
    assert set(proofs_of(tmp_path / "out")) == set(PLAIN)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": ("q4_k_m", "iq2_xs")}, "iq2_xs needs an importance matrix"),
        ({"quantization": ("f16", "q8_0"), "imatrix": "auto"}, "`--imatrix` changes nothing in f16, q8_0"),
        ({"imatrix": "no-such-file"}, "no such file: `no-such-file`"),
        ({"format": "safetensors", "imatrix": "auto"}, "`--imatrix` is for `--format gguf`"),
        ({"format": "lora-gguf", "split_size": "2G"}, "`--split-size` is for `--format gguf`"),
        ({"format": "lora-gguf", "quantization": ("q4_k_m",)}, "an adapter alone cannot be q4_k_m"),
        ({"format": "lora-gguf", "ollama": True}, "Ollama takes GGUF of a whole model"),
        ({"split_size": "2G", "ollama": True}, "Ollama takes a GGUF in one file"),
        *(
            ({"split_size": size}, "`--split-size` is a number and M or G")
            for size in ("2", "0G", "-1G", "2 G", "1.5G")
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        ExportConfig(**options)
    assert raised.value.hint


# The adapter alone


@pytest.mark.slow
def test_the_adapter_alone_makes_the_base_model_the_one_that_was_trained(run: Path, tmp_path: Path) -> None:
    told = exported(run, tmp_path / "out", "--format", "lora-gguf", "-q", "f16", "-q", "q8_0")
    assert [(event["format"], event["quantization"], event["answer"]) for event in told] == [
        ("lora-gguf", "f16", "It is here."),
        ("lora-gguf", "q8_0", "It is here."),
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "exports.json",
        "run-lora-f16.gguf",
        "run-lora-q8_0.gguf",
        "verification.json",
    }
    assert proofs_of(tmp_path / "out") == {"lora-f16": [True] * 3, "lora-q8_0": [True] * 3}
    found = metadata(tmp_path / "out" / "run-lora-f16.gguf")
    assert (found["general.type"], found["adapter.type"], found["adapter.lora.alpha"]) == ("adapter", "lora", 32.0)
    assert found["general.name"] == "run"


def rescaled(change: Callable[[dict[str, Any]], object], run: Path, folder: Path) -> Path:
    shutil.copytree(run / "lora", folder)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    return folder


@pytest.mark.slow
def test_an_adapter_that_divides_by_the_root_of_its_rank_keeps_its_scale(run: Path, tmp_path: Path) -> None:
    # llama.cpp's converter does not read `use_rslora`: such an adapter came out a quarter as strong.
    adapter = rescaled(lambda settings: settings.update(use_rslora=True, lora_alpha=8.0), run, tmp_path / "rs")
    exported(adapter, adapter / "export", "--format", "lora-gguf", "--question", "What is 0?")
    assert proofs_of(adapter / "export") == {"lora-f16": [True] * 3}
    assert metadata(adapter / "export" / "rs-lora-f16.gguf")["adapter.lora.alpha"] == 32.0


@pytest.mark.slow
def test_an_adapter_alone_of_another_strength_is_rejected(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = llama_cpp.convert_adapter

    def faulty(folder: Path, base: Path, gguf: Path, *, kind: str) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16.0}))
        convert(folder, base, gguf, kind=kind)

    monkeypatch.setattr(llama_cpp, "convert_adapter", faulty)
    done = backprop("export", run, "--format", "lora-gguf", "--output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "not proved" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"verification.json", "run-lora-f16.gguf.rejected"}


def test_magnitudes_have_no_place_in_an_adapter_alone(run: Path, tmp_path: Path) -> None:
    adapter = rescaled(lambda settings: settings.update(use_dora=True), run, tmp_path / "dora")
    done = backprop("export", adapter, "--format", "lora-gguf", cwd=tmp_path)
    assert done.returncode == 7
    assert "no place for DoRA's magnitudes" in done.stderr


# Metadata

HOSTILE = 'a: "b" #\n---\nlicense: evil\x00\u2028{}[]*&!%@`\\ \udcff 😀'


@pytest.mark.slow
def test_the_file_says_what_it_was_made_of(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "My Base")
    (tmp_path / "My Base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    shutil.copytree(run, tmp_path / "my: run")
    path = tmp_path / "my: run" / "run.json"
    manifest = json.loads(path.read_text())
    manifest["model"] |= {"path": str(tmp_path / "My Base"), "name": str(tmp_path / "My Base")}
    path.write_text(json.dumps(manifest))
    exported(tmp_path / "my: run", tmp_path / "out", "-q", "q4_0", "--no-verify")
    found = metadata(tmp_path / "out" / "my: run-q4_0.gguf")
    assert found["general.name"] == "my: run"
    assert found["general.license"] == "apache-2.0"
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.name"] == "My Base"
    assert found["general.dataset.0.version"] == f"sha256:{manifest['identity']['data_sha256']}"
    assert "<|im_start|>" in found["tokenizer.chat_template"]
    assert str(tmp_path) not in str(found)


def adapter_on(base: Path, base_name: str, *, data_sha256: str | None = None) -> Adapter:
    return Adapter(
        folder=base,
        base=str(base),
        base_as_found=str(base),
        base_name=base_name,
        data_sha256=data_sha256,
        output=base,
        name=base_name,
        question="Hello?",
        probes=[],
        run=None,
        sha256="",
    )


def test_hostile_names_are_only_names(tmp_path: Path) -> None:
    import yaml

    card.write_card(adapter_on(tmp_path, HOSTILE, data_sha256="0"), tmp_path, name=HOSTILE)
    lines = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("---", "---", 5)
    facts = yaml.safe_load("\n".join(lines[1:-1]))
    assert set(facts) == {"model_name", "base_model", "datasets"}
    assert facts["model_name"] == 'a: "b" # --- license: evil  {}[]*&!%@`\\   😀'


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("smollm2-135m", {"organization": "HuggingFaceTB", "name": "SmolLM2-135M-Instruct"}),
        ("Qwen/Qwen3-4B", {"organization": "Qwen", "name": "Qwen3-4B"}),
        ("Qwen/Qwen3-4B@0123abcd", {"organization": "Qwen", "name": "Qwen3-4B"}),
        ("/home/me/models/mine", {"name": "mine"}),
        ("./models", {"name": "models"}),
        ("models/mine", {"name": "mine"}),
    ],
)
def test_a_base_model_is_named_by_the_hub_or_by_its_folder_without_the_way_to_it(
    tmp_path: Path, name: str, base: dict[str, str]
) -> None:
    import yaml

    folder = tmp_path / "models" / "mine"
    card.write_card(adapter_on(folder, name), tmp_path, name="x")
    (found,) = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])["base_model"]
    url = found.pop("repo_url", None)
    assert found == base
    assert url == (
        f"https://huggingface.co/{found['organization']}/{found['name']}" if "organization" in base else None
    )


@pytest.mark.parametrize(
    "text",
    [
        *("", "---\n", "---\nlicense: [\n---\n", "---\n- a\n---\n", "# no front matter\n", "---\nlicense: 3\n---\n"),
        *("---\ndate: 2026-99-99\n---\n", f"---\na: {'[' * 5000}\n---\n"),
    ],
    ids=lambda text: text[:20],
)
def test_a_card_that_names_no_licence_gives_none(tmp_path: Path, text: str) -> None:
    assert card.licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text(text)
    assert card.licence_of(tmp_path) is None


# Importance matrices


@pytest.mark.slow
def test_an_importance_matrix_of_the_runs_own_rows_changes_the_file(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    exported(run, output, "-q", "q4_0")
    without = (output / "run-q4_0.gguf").read_bytes()
    options = ("-q", "q4_0", "-q", "iq2_xs", "--imatrix", "auto")
    other = backprop("export", run, "--output", output, *options, cwd=tmp_path)
    assert (other.returncode, "is there already" in other.stderr) == (2, True)
    told = exported(run, output, *options, "--overwrite")
    assert [event["quantization"] for event in told] == ["q4_0", "iq2_xs"]
    assert (output / "run-q4_0.gguf").read_bytes() != without
    found = metadata(output / "run-q4_0.gguf")
    assert (found["quantize.imatrix.file"], found["quantize.imatrix.dataset"]) == ("imatrix.gguf", "rows.txt")
    assert found["quantize.imatrix.entries_count"] == 14  # 7 matrices in each of 2 layers
    assert {kind: all(oks) for kind, oks in proofs_of(output).items()} == dict.fromkeys(("f16", "q4_0", "iq2_xs"), True)


@pytest.mark.slow
def test_a_finished_file_by_an_importance_matrix_is_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-q", "q3_k_m", "--imatrix", "auto", "--no-verify")
    exported(run, tmp_path / "out", *options)

    def stop(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(llama_cpp, "converting", stop)
    assert len(exported(run, tmp_path / "out", *options)) == 1


@pytest.mark.slow
def test_an_importance_matrix_may_be_given(run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "base", "-q", "f16", "--no-verify")
    (tmp_path / "my files").mkdir()
    matrix = tmp_path / "my files" / "-mine.gguf"
    rows = ["<|im_start|>user\nWhat is it?<|im_end|>\n"] * 12
    llama_tools.weigh(tmp_path / "base" / "run-f16.gguf", rows, matrix, num_tokens=12 * 9)
    exported(run, tmp_path / "out", "-q", "iq3_xxs", "--imatrix", matrix, "--no-verify")
    found = metadata(tmp_path / "out" / "run-iq3_xxs.gguf")
    assert found["quantize.imatrix.file"] == "-mine.gguf"


def of_llama_cpp(folder: Path) -> bytes:
    """A model: a GGUF, and no matrix."""
    return llama_cpp.write_tiny(folder).read_bytes()


@pytest.mark.parametrize(
    "content", [b"no matrix", b"GGUF, says it", bytes(64), of_llama_cpp], ids=["text", "GGUF", "zeros", "a model"]
)
def test_a_file_that_is_no_importance_matrix_is_refused_before_any_work(
    run: Path, tmp_path: Path, content: bytes | Callable[[Path], bytes]
) -> None:
    (tmp_path / "notes.txt").write_bytes(content if isinstance(content, bytes) else content(tmp_path))
    done = backprop("export", run, "-q", "iq3_xxs", "--imatrix", "notes.txt", "--output", "other", cwd=tmp_path)
    assert done.returncode == 2
    assert "`notes.txt` is no importance matrix" in done.stderr
    assert not (tmp_path / "other").exists()


def test_importance_matrices_of_the_older_form_are_known(tmp_path: Path) -> None:
    name, numbers = b"blk.0.attn_q.weight", [1.0] * 256
    entry = struct.pack(f"<i{len(name)}sii{len(numbers)}f", len(name), name, 1, len(numbers), *numbers)
    whole = struct.pack("<i", 1) + entry + struct.pack("<ii8s", 1, 8, b"rows.txt")
    (tmp_path / "old.dat").write_bytes(whole)
    assert llama_tools.is_importance_matrix(tmp_path / "old.dat")
    (tmp_path / "old.dat").write_bytes(whole[:200])
    assert not llama_tools.is_importance_matrix(tmp_path / "old.dat")


def test_too_few_rows_make_no_importance_matrix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the rows have 63 tokens, and an importance matrix needs 64"):
        llama_tools.weigh(tmp_path / "f16.gguf", ["hi"], tmp_path / "imatrix.gguf", num_tokens=63)


def test_an_adapter_by_itself_has_no_rows_for_an_importance_matrix(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "lora", tmp_path / "mine")
    done = backprop("export", "mine", "--imatrix", "auto", "--output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "`mine` is not of a run" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--imatrix", "auto"), ("--split-size", "1M")], ids=str)
def test_without_the_programs_the_command_that_builds_them_is_named(
    run: Path, tmp_path: Path, options: tuple[str, str]
) -> None:
    shutil.copytree(llama_cpp.llama_cpp_home(), tmp_path / "llama.cpp", ignore=shutil.ignore_patterns("tools"))
    done = backprop(
        "export",
        run,
        *options,
        "--output",
        tmp_path / "out",
        cwd=tmp_path,
        BACKPROP_LLAMA_CPP=str(tmp_path / "llama.cpp"),
    )
    assert done.returncode == 7
    assert "python -m backprop.edges.llama_cpp_build" in done.stderr
    assert not (tmp_path / "out").exists()


# Splits


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model with more than its embeddings: 6.3 and 1.7 MB of 16 bits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(tiny_model, folder / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, intermediate_size=2048))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.25)
    model.save_pretrained(folder / "model")
    return trained_run(folder / "model", folder, ROWS, steps=40)


@pytest.mark.slow
def test_a_split_file_loads_and_is_the_same_model(wide: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("-q", "f16", "-q", "q4_0", "--split-size", "7M")
    told = exported(wide, output, *options)
    assert [event["path"] for event in told] == [str(output / "run-f16"), str(output / "run-q4_0")]
    assert {path.name for path in output.iterdir()} == {"exports.json", "run-f16", "run-q4_0", "verification.json"}
    names = sorted(path.name for path in (output / "run-f16").iterdir())
    assert names == ["run-f16-00001-of-00002.gguf", "run-f16-00002-of-00002.gguf"]
    assert [path.name for path in (output / "run-q4_0").iterdir()] == ["run-q4_0-00001-of-00001.gguf"]
    assert told[0]["size_bytes"] == sum(path.stat().st_size for path in (output / "run-f16").iterdir())
    (answer,) = llama_cpp.ask(
        output / "run-f16" / names[0], [[{"role": "user", "content": ROWS[0]["messages"][0]["content"]}]]
    )
    assert answer.text == told[0]["answer"]
    before = [path.stat().st_mtime_ns for path in (output / "run-f16").iterdir()]
    assert exported(wide, output, *options)
    assert [path.stat().st_mtime_ns for path in (output / "run-f16").iterdir()] == before
    other = backprop("export", wide, "--output", output, "-q", "f16", "--split-size", "8M", cwd=tmp_path)
    assert (other.returncode, "is there already" in other.stderr) == (2, True)
    exported(wide, output, "-q", "f16", "--split-size", "8M", "--no-verify", "--overwrite")
    assert [path.name for path in (output / "run-f16").iterdir()] == ["run-f16-00001-of-00001.gguf"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-q", "q4_0", "-q", "f16"), "one matrix of f16 takes 6.3M or more"),
        (("--split-size", "1M"), "one matrix of q4_k_m takes 1.8M or more"),
        (("-q", "q8_0", "--split-size", "3M"), "one matrix of q8_0 takes 3.3M or more"),
    ],
)
def test_a_size_below_that_of_a_matrix_is_refused_before_any_work(
    run: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    given = ("--split-size", "6M") if "--split-size" not in options else ()
    done = backprop("export", run, *given, *options, "--no-verify", "--output", tmp_path / "o", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "o").exists()


def test_no_word_of_a_file_has_fewer_bits_than_are_counted_on(tmp_path: Path) -> None:
    source = llama_cpp.write_tiny(tmp_path)
    for kind in [kind for kind in PLAIN if kind not in llama_cpp.CONVERTED]:
        made = tmp_path / f"{kind}.gguf"
        llama_cpp.quantize(source, made, quantization=kind)
        reader = pytest.importorskip("gguf").GGUFReader(made)
        words = [one for one in reader.tensors if one.name in ("token_embd.weight", "output.weight")]
        least = min(8 * int(one.n_bytes) / int(one.n_elements) for one in words)
        assert least >= llama_tools.LEAST_BITS[kind], kind


@pytest.mark.slow
def test_a_file_that_is_rejected_is_not_split(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_last_tensors(monkeypatch, "q6_k.gguf")
    done = backprop("export", run, "--output", tmp_path / "out", "-q", "q6_k", "--split-size", "3M", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"verification.json", "run-q6_k.gguf.rejected"}
