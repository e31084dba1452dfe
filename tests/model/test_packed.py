"""A base whose weights bitsandbytes stored in 4 or 8 bits is trained, exported and proved as the numbers they stand for."""

import functools
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from apart import needs_bitsandbytes, with_bitsandbytes
from conftest import HERE, backprop, trained_run
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from backprop import events
from backprop.config import ExportConfig
from backprop.edges import hub, model_files
from backprop.edges.places import llama_cpp_home
from backprop.engine import load, rehearsal
from backprop.engine import packed as packed_weights
from backprop.engine.packed import INDEX, unpack
from backprop.errors import DiskError, ModelError
from backprop.verbs import models
from backprop.verbs.source import find_adapter

pytestmark = pytest.mark.model

# Stores the model, and beside it what bitsandbytes itself takes its weights for.
PACK = """
import sys, torch
from bitsandbytes import functional
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
source, target, kind, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)
options = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage=torch.bfloat16),
    "int8": dict(load_in_8bit=True),
}[kind]
model = AutoModelForCausalLM.from_pretrained(
    source, dtype=dtype, device_map="cpu", quantization_config=BitsAndBytesConfig(**options)
)
model.save_pretrained(target, max_shard_size="150KB")
found = {}
for name, module in model.named_modules():
    weight = getattr(module, "weight", None)
    if type(weight).__name__ == "Params4bit":
        found[name + ".weight"] = functional.dequantize_4bit(weight.data, weight.quant_state)
    elif type(weight).__name__ == "Int8Params":
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        found[name + ".weight"] = functional.int8_vectorwise_dequant(weight.data, scales).to(dtype)
save_file({name: one.contiguous() for name, one in found.items()}, target + "/../expected.safetensors")
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give a tiny model as bitsandbytes stores it; ``expected.safetensors`` beside it is what it takes the weights for."""
    original = tiny("llama-untied", tmp_path_factory.mktemp("original") / "model")

    @functools.cache
    def packed(kind: str, dtype: str = "bfloat16") -> Path:
        folder = tmp_path_factory.mktemp(kind) / f"tiny-{kind}"
        shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        done = with_bitsandbytes(PACK, original, folder, kind, dtype, cwd=folder)
        assert done.returncode == 0, done.stderr
        return folder

    return packed


def weights_of(folder: Path) -> dict[str, Any]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int8 float16"])
def test_weights_are_what_bitsandbytes_takes_them_for(
    packed: Callable[..., Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backprop.engine.packed.SHARD_BYTES", 300_000)
    folder = packed(*kind.split())
    assert len(list(folder.glob("*.safetensors"))) > 2
    expected = load_file(folder.parent / "expected.safetensors")
    unpack(folder, tmp_path / "plain")
    found = weights_of(tmp_path / "plain")
    assert len(expected) == 14
    assert all(one.equal(found[name]) and one.dtype == found[name].dtype for name, one in expected.items())
    stored = weights_of(folder)
    others = [name for name in found if name not in expected]
    assert "model.embed_tokens.weight" in others
    assert all(stored[name].equal(found[name]) for name in others)
    index = json.loads((tmp_path / "plain" / INDEX).read_text())["weight_map"]
    assert set(index) == set(found)
    assert len(set(index.values())) > 2
    model_files.check_model(tmp_path / "plain")
    assert len({path.stat().st_mode for path in (tmp_path / "plain").iterdir()}) == 1
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@needs_bitsandbytes
def test_a_run_on_them_is_exported_and_proved_also_when_the_cache_is_gone(
    packed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = llama_cpp_home()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKPROP_LLAMA_CPP", str(llama))
    folder = packed("nf4")
    run = trained_run(folder, tmp_path, HERE, steps=16, learning_rate=5e-3)
    assert json.loads((run / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    (plain,) = (tmp_path / "cache" / "backprop" / "unpacked").glob("*/*")
    assert find_adapter(run, ExportConfig(), say=print).base == str(plain)
    alone = tmp_path / "alone"  # as another tool leaves it, which says how it trained and on what
    shutil.copytree(run / "lora", alone)
    (alone / "README.md").write_text("- load_in_4bit: True\n")
    adapter = find_adapter(alone, ExportConfig(), say=print)
    assert (adapter.base, adapter.four_bit_by_card) == (str(plain), False)
    shutil.rmtree(plain)
    done = backprop("export", run, "-q", "q8_0", "--offline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "as 16 bits" in done.stderr
    proofs = json.loads((run / "export" / "verification.json").read_text())
    assert "the f16 file predicts as the trained model" in json.dumps(proofs)


@needs_bitsandbytes
def test_damaged_parts_are_refused(packed: Callable[..., Path], tmp_path: Path) -> None:
    tensors = weights_of(packed("nf4"))
    folder = tmp_path / "damaged"
    shutil.copytree(packed("nf4"), folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    layer = "model.layers.0.mlp.up_proj.weight"
    (state,) = (name for name in tensors if name.startswith(f"{layer}.quant_state"))
    told = json.loads(bytes(tensors[state].tolist()))

    def said(**changes: Any) -> Any:
        import torch

        return torch.tensor(list(json.dumps({**told, **changes}).encode()), dtype=torch.uint8)

    def without(name: str) -> dict[str, Any]:
        return {key: one for key, one in tensors.items() if key != name}

    nested = tensors[f"{layer}.nested_quant_map"]
    faults = {
        "no scales": without(f"{layer}.absmax"),
        "no weight": without(layer),
        "short scales": {**tensors, f"{layer}.absmax": tensors[f"{layer}.absmax"][:-1]},
        "short scales of scales": {**tensors, f"{layer}.nested_absmax": tensors[f"{layer}.nested_absmax"][:0]},
        "few codes": {**tensors, f"{layer}.quant_map": tensors[f"{layer}.quant_map"][:8]},
        "codes that are no numbers": {**tensors, f"{layer}.quant_map": tensors[f"{layer}.quant_map"].int()},
        "codes in a square": {**tensors, f"{layer}.nested_quant_map": nested.view(16, 16)},
        "scales of another type": {**tensors, f"{layer}.absmax": tensors[f"{layer}.absmax"].float()},
        "numbers of 8 bits without scales": {**tensors, "model.norm.weight": tensors["model.norm.weight"].char()},
        **{
            f"said {changes}": {**tensors, state: said(**changes)}
            for changes in (
                *({"shape": shape} for shape in ([2**40, 2], [2**70], [True, 16384], "64", None)),
                *({"blocksize": size} for size in (0, 2**34, 2**70, "64")),
                *({"nested_offset": number} for number in (None, "0", [0.1])),
                {"dtype": "__class__"},
            )
        },
        "no object": {**tensors, state: said()[:5]},
        "a book": {**tensors, state: said(told="x" * 2**12)},
    }
    for number, (fault, changed) in enumerate(faults.items()):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ModelError, match="are damaged") as raised:
            unpack(folder, tmp_path / f"{number}")
        assert raised.value.code == 4, fault


@needs_bitsandbytes
def test_weights_are_read_from_the_files_that_transformers_reads(packed: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed("nf4"), tmp_path / "packed"))
    norm = "model.norm.weight"
    save_file({norm: weights_of(folder)[norm] * 7, "x": weights_of(folder)[norm]}, folder / "zz.safetensors")
    unpack(folder, tmp_path / "plain")
    found = weights_of(tmp_path / "plain")
    assert "x" not in found
    assert found[norm].equal(weights_of(packed("nf4"))[norm])
    shards = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / shards[norm]).unlink()
    with pytest.raises(ModelError, match=f"`{shards[norm]}` cannot be read"):
        unpack(folder, tmp_path / "lacking")
    save_file({"x": found[norm]}, folder / shards[norm])
    with pytest.raises(ModelError, match=f"`{shards[norm]}` has no"):
        unpack(folder, tmp_path / "other")


def said_to_be_packed(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    return folder


def unpacked(folder: Path, say: Callable[[object], object] = print) -> Path:
    return Path(models.weights_of(hub.find_model(str(folder), offline=True), say=say))


def test_a_plan_writes_no_weights(tiny_model: Path, tmp_path: Path, write: Callable[..., Path]) -> None:
    folder = said_to_be_packed(tiny_model, tmp_path / "packed")
    options = ("--data", write(HERE), "--model", folder, "--dry-run")
    for command in ("train", "multi-run"):
        done = backprop(command, *options, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "backprop" / "unpacked").exists()


def test_a_small_copy_of_it_has_plain_weights(tiny_model: Path, tmp_path: Path) -> None:
    folder = said_to_be_packed(tiny_model, tmp_path / "packed")
    tokenizer = load.load_tokenizer(str(folder), trust_remote_code=False)
    rehearsal.write_small_copy(str(folder), tmp_path / "small", tokenizer, trust_remote_code=False)
    model_files.check_model(tmp_path / "small")
    assert not model_files.is_packed(tmp_path / "small")


def test_another_template_or_code_is_another_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = said_to_be_packed(tiny_model, tmp_path / "packed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    first = unpacked(Path())
    assert (first, first.name) == (unpacked(folder), "packed")
    (folder / "modeling_x.py").write_text("")
    second = unpacked(folder)
    assert {path.name for path in second.iterdir()} - {path.name for path in first.iterdir()} == {"modeling_x.py"}
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert unpacked(folder) not in (first, second)
    (first / "config.json").unlink()
    (folder / "modeling_x.py").unlink()
    shutil.copy(tiny_model / "chat_template.jinja", folder)
    assert (unpacked(folder), (first / "config.json").is_file()) == (first, True)


def test_what_cannot_be_read_is_told_of_where_it_is(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = said_to_be_packed(tiny_model, tmp_path / "packed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (folder / "notes.txt").mkdir()
    (folder / "gone.json").symlink_to("nowhere")
    assert not {"notes.txt", "gone.json"} & {path.name for path in unpacked(folder).iterdir()}
    monkeypatch.setattr(packed_weights, "SHARD_BYTES", 1)
    monkeypatch.setattr(packed_weights.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    (folder / "README.md").write_text("new")
    with pytest.raises(DiskError, match="free in"):
        unpacked(folder)


@pytest.mark.parametrize("where", ["", "text_config"])
def test_only_what_bitsandbytes_stored_is_unpacked(tmp_path: Path, where: str) -> None:
    def says(how: object) -> bool:
        config = {"quantization_config": how}
        (tmp_path / "config.json").write_text(json.dumps({where: config} if where else config))
        return model_files.is_packed(tmp_path)

    assert says({"quant_method": "bitsandbytes"})
    assert says({"load_in_8bit": True})
    assert not says(None)
    assert not says({"quant_method": "gptq", "load_in_4bit": True})
    with pytest.raises(ModelError, match="quantized already"):
        model_files.check_model(tmp_path)


def test_of_two_that_need_it_at_once_one_unpacks_it_after_one_that_was_killed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = said_to_be_packed(tiny_model, tmp_path / "packed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    began: list[Path] = []
    awaited = Event()

    def slowly(packed: Path, target: Path) -> None:
        began.append(target)
        assert awaited.wait(60)
        unpack(packed, target)

    def killed(packed: Path, target: Path) -> None:
        unpack(packed, target)
        shutil.copytree(target, target.with_name(".backprop-packed.1.part"))
        raise KeyboardInterrupt

    monkeypatch.setattr(packed_weights, "unpack", killed)
    with pytest.raises(KeyboardInterrupt):
        unpacked(folder)
    monkeypatch.setattr(packed_weights, "unpack", slowly)
    said: list[str] = []

    def say(event: events.Event) -> None:
        assert isinstance(event, events.Phase)
        said.append(event.name.split()[0])
        if said[-1] == "waiting":
            awaited.set()

    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda _: unpacked(folder, say), range(2))
    assert one == other
    assert len(began) == 1
    assert sorted(said) == ["waiting", "writing"]
    assert list(one.parent.iterdir()) == [one]


def test_layers_that_stand_on_end_are_unpacked_so(tmp_path: Path) -> None:
    """GPT-2 holds (inputs, outputs), and bitsandbytes stores (outputs, inputs)."""
    import torch

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "quantization_config": {}}))
    numbers = torch.tensor([[127, 0], [64, -127], [0, 1]], dtype=torch.int8)
    stored = {"h.weight": numbers, "h.SCB": torch.ones(3), "h.weight_format": torch.tensor(0, dtype=torch.uint8)}
    save_file({**stored, "wte.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    unpack(tmp_path, tmp_path / "plain")
    found = weights_of(tmp_path / "plain")
    assert found["h.weight"].round(decimals=1).tolist() == [[1, 0.5, 0], [0, -1, 0]]
    assert found["wte.weight"].shape == (3, 2)
    save_file({**stored, "h.weight_format": torch.tensor(2, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="do not fit together"):
        unpack(tmp_path, tmp_path / "other")
