"""A base whose weights bitsandbytes stored in 4 or 8 bits is trained, exported and proved as the numbers they stand for."""

import functools
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from apart import needs_bitsandbytes, with_bitsandbytes
from conftest import HERE, backprop, trained_run
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from backprop.config import ExportConfig
from backprop.edges import model_files
from backprop.edges.places import llama_cpp_home
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
source, target, kind = sys.argv[1:]
options = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}[kind]
model = AutoModelForCausalLM.from_pretrained(
    source, dtype=torch.bfloat16, device_map="cpu", quantization_config=BitsAndBytesConfig(**options)
)
model.save_pretrained(target, max_shard_size="150KB")
found = {}
for name, module in model.named_modules():
    weight = getattr(module, "weight", None)
    if type(weight).__name__ == "Params4bit":
        found[name + ".weight"] = functional.dequantize_4bit(weight.data, weight.quant_state)
    elif type(weight).__name__ == "Int8Params":
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        found[name + ".weight"] = functional.int8_vectorwise_dequant(weight.data, scales).to(torch.bfloat16)
save_file({name: one.contiguous() for name, one in found.items()}, target + "/../expected.safetensors")
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a tiny model as bitsandbytes stores it; ``expected.safetensors`` beside it is what it takes the weights for."""
    original = tiny("llama-untied", tmp_path_factory.mktemp("original") / "model")

    @functools.cache
    def packed(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind) / f"tiny-{kind}"
        shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        done = with_bitsandbytes(PACK, original, folder, kind, cwd=folder)
        assert done.returncode == 0, done.stderr
        return folder

    return packed


def weights_of(folder: Path) -> dict[str, Any]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_weights_are_what_bitsandbytes_takes_them_for(
    packed: Callable[[str], Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backprop.engine.packed.SHARD_BYTES", 300_000)
    folder = packed(kind)
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
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@needs_bitsandbytes
def test_a_run_on_them_is_exported_and_proved_also_when_the_cache_is_gone(
    packed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = llama_cpp_home()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKPROP_LLAMA_CPP", str(llama))
    folder = packed("nf4")
    run = trained_run(folder, tmp_path, HERE, steps=16, learning_rate=5e-3)
    assert json.loads((run / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    (plain,) = (tmp_path / "cache" / "backprop" / "unpacked").glob("*/*")
    assert find_adapter(run, ExportConfig()).base == str(plain)
    alone = tmp_path / "alone"  # as another tool leaves it, which says how it trained and on what
    shutil.copytree(run / "lora", alone)
    (alone / "README.md").write_text("- load_in_4bit: True\n")
    adapter = find_adapter(alone, ExportConfig())
    assert (adapter.base, adapter.four_bit_by_card) == (str(plain), False)
    shutil.rmtree(plain)
    done = backprop("export", run, "-q", "q8_0", "--offline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "as 16 bits" in done.stderr
    proofs = json.loads((run / "export" / "verification.json").read_text())
    assert "the f16 file predicts as the trained model" in json.dumps(proofs)


@needs_bitsandbytes
def test_damaged_parts_are_refused(packed: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = weights_of(packed("nf4"))
    folder = tmp_path / "damaged"
    shutil.copytree(packed("nf4"), folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    layer = "model.layers.0.mlp.up_proj.weight"
    (state,) = (name for name in tensors if name.startswith(f"{layer}.quant_state"))
    told = json.loads(bytes(tensors[state].tolist()))

    def said(**changes: Any) -> Any:
        import torch

        return torch.tensor(list(json.dumps({**told, **changes}).encode()), dtype=torch.uint8)

    faults = {
        "short scales": {f"{layer}.absmax": tensors[f"{layer}.absmax"][:-1]},
        "short scales of scales": {f"{layer}.nested_absmax": tensors[f"{layer}.nested_absmax"][:0]},
        "few codes": {f"{layer}.quant_map": tensors[f"{layer}.quant_map"][:8]},
        "another shape": {state: said(shape=[2**40, 2])},
        "no block": {state: said(blocksize=0)},
        "an unknown type": {state: said(dtype="__class__")},
        "no object": {state: said()[:5]},
    }
    for fault, changes in faults.items():
        save_file({**tensors, **changes}, folder / "model.safetensors")
        with pytest.raises((ModelError, DiskError)) as raised:
            unpack(folder, tmp_path / fault)
        assert "damaged" in str(raised.value) or fault == "another shape", fault
    without = {name: one for name, one in tensors.items() if name != f"{layer}.absmax"}
    save_file(without, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"has no .*absmax"):
        unpack(folder, tmp_path / "lacking")


def said_to_be_packed(model: Path, folder: Path, *ignored: str) -> Path:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(*ignored))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    assert model_files.is_packed(folder)
    return folder


def test_without_weights_the_settings_are_unpacked(tiny_model: Path, tmp_path: Path) -> None:
    """As a plan needs them that fetches no weights."""
    folder = said_to_be_packed(tiny_model, tmp_path / "packed", "*.safetensors")
    unpack(folder, tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == json.loads(
        (tiny_model / "config.json").read_text()
    )


def test_of_two_that_need_it_at_once_one_unpacks_it_after_one_that_was_killed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = said_to_be_packed(tiny_model, tmp_path / "packed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    began: list[Path] = []

    def slowly(packed: Path, target: Path) -> None:
        began.append(target)
        time.sleep(0.5)
        unpack(packed, target)

    def killed(packed: Path, target: Path) -> None:
        unpack(packed, target)
        shutil.copytree(target, target.with_name(".backprop-packed.1.part"))
        raise KeyboardInterrupt

    monkeypatch.setattr("backprop.engine.packed.unpack", killed)
    with pytest.raises(KeyboardInterrupt):
        models.find(str(folder), offline=True, say=list[object]().append)
    monkeypatch.setattr("backprop.engine.packed.unpack", slowly)
    said: list[object] = []
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda _: models.find(str(folder), offline=True, say=said.append), range(2))
    assert one == other
    assert (len(began), len(said)) == (1, 2)
    assert list(Path(one.path).parent.iterdir()) == [Path(one.path)]
    assert (one.public_name, one.revision) == (str(folder), None)
    assert models.find(one.path, offline=True, say=said.append).sha256 == one.sha256
    assert len(said) == 2
