"""An adapter that was trained on weights of 4 bits is merged into the base that it was trained on; with bitsandbytes on a CPU.

Training on 4 bits needs a GPU (its 4-bit product has no gradient on a CPU):
here an adapter is trained on weights that were rounded before, which is the same.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from apart import needs_bitsandbytes, with_bitsandbytes
from conftest import HERE, Done, backprop, trained_run
from tiny_models import tiny

from backprop.core.fidelity import likeness
from backprop.edges import hub, llama_cpp
from backprop.engine import four_bit, load, merge, reference

pytestmark = pytest.mark.model

ROUND = """
import sys, torch
from pathlib import Path
from backprop.engine.four_bit import Rounding
from safetensors.torch import load_file, save_file
path = Path(sys.argv[1]) / "model.safetensors"
weights = load_file(path)
rounding = Rounding(weights=frozenset(name for name in weights if "proj" in name), dtype="float32")
save_file({name: rounding.apply(one) if "proj" in name else one for name, one in weights.items()}, path, {"format": "pt"})
"""
EXPORT = "import sys; from backprop.__main__ import main; main()"
# As if bitsandbytes here rounded in another way than it did in training.
SPOILT = """
import torch
from backprop.engine.four_bit import Rounding
Rounding.apply = lambda self, weight: torch.zeros_like(weight)
"""


def told(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def bitsandbytes_of(folder: Path, code: str) -> Path:
    """Put a package of that name into ``folder`` that does so as it is imported."""
    (folder / "bitsandbytes").mkdir(parents=True)
    (folder / "bitsandbytes" / "__init__.py").write_text(code)
    return folder


def pretend(run: Path, base: Path) -> None:
    """Let a run say that it was trained on the weights of ``base``, in 4 bits."""
    manifest = json.loads((run / "run.json").read_text())
    manifest["config"]["method"] = "qlora"
    manifest["model"] = {"name": str(base), "path": str(base), "sha256": hub.find_model(str(base), offline=True).sha256}
    (run / "run.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama-untied", tmp_path_factory.mktemp("original") / "model")


@pytest.fixture(scope="module")
def run(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the original's weights in 4 bits; `rounded` beside it holds these weights."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(original, folder / "rounded")
    done = with_bitsandbytes(ROUND, folder / "rounded", cwd=folder)
    assert done.returncode == 0, done.stderr
    run = trained_run(folder / "rounded", folder, HERE, steps=16, learning_rate=5e-3)
    pretend(run, original)
    return run


@needs_bitsandbytes
@pytest.mark.slow
def test_the_file_is_the_model_as_it_was_trained(run: Path, original: Path, tmp_path: Path) -> None:
    done = with_bitsandbytes(EXPORT, "export", run, "-q", "f16", "--output", tmp_path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (said,) = [one["name"] for one in told(done) if one["event"] == "phase" and "goes into" in one["name"]]
    assert said.startswith("the adapter goes into the base as it was trained on: with the base as it was trained on")
    rounded, unrounded = (merge.load_adapted(str(base), run / "lora") for base in (run.parent / "rounded", original))
    ids = list(range(20, 60))
    with llama_cpp.loaded(tmp_path / "run-f16.gguf", context=64, all_logits=True) as model:
        found = [model.logits(ids)]
    near, far = (likeness([reference.logits(one, ids)], found).mean_kl for one in (rounded, unrounded))
    assert near < 1e-5 < 1e-3 < far


@needs_bitsandbytes
@pytest.mark.slow
def test_a_file_whose_base_was_not_measured_is_made_again_once_it_can_be(run: Path, tmp_path: Path) -> None:
    options = ("export", run, "-q", "f16", "--output", tmp_path, "--json")
    without = "from backprop.engine import four_bit; four_bit.why_not = lambda: 'is missing'\n"
    files: list[bytes] = []
    for program in (without + EXPORT, without + EXPORT, EXPORT, EXPORT):
        done = with_bitsandbytes(program, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        files.append((tmp_path / "run-f16.gguf").read_bytes())
    assert files[0] == files[1] != files[2] == files[3]
    assert not [one for one in told(done) if one["event"] == "phase"], "it is made once more"


@needs_bitsandbytes
@pytest.mark.slow
def test_safetensors_are_the_model_as_it_was_trained(run: Path, tmp_path: Path) -> None:
    options = ("--format", "safetensors", "--output", tmp_path, "--json")
    done = with_bitsandbytes(EXPORT, "export", run, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert any("goes into the base as it was trained on" in one.get("name", "") for one in told(done))


@needs_bitsandbytes
@pytest.mark.slow
def test_the_original_is_taken_where_it_is_nearer(run: Path, tmp_path: Path) -> None:
    done = with_bitsandbytes(SPOILT + EXPORT, "export", run, "-q", "f16", "--output", tmp_path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert any("goes into the 16-bit original" in one.get("name", "") for one in told(done))


@pytest.mark.slow
@pytest.mark.parametrize("why", ["bitsandbytes", "--no-verify"])
def test_where_it_cannot_be_measured_the_original_is_taken_aloud(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(four_bit, "why_not", lambda: "is not installed")
    options = ("--no-verify",) if why == "--no-verify" else ()
    done = backprop("export", run, "-q", "f16", "--output", tmp_path, *options, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (warned,) = [one["message"] for one in told(done) if one["event"] == "warning"]
    assert "is merged into the 16-bit original" in warned
    assert why in warned


@needs_bitsandbytes
@pytest.mark.slow
def test_a_rounded_weight_that_is_stored_in_another_way_is_not_merged_one_by_one(run: Path, original: Path) -> None:
    from backprop.engine import streamed

    odd = four_bit.Rounding(weights=frozenset({"model.layers.0.mlp.experts.3.weight"}), dtype="float32")
    assert streamed.why_not(original, run / "lora") == ""
    assert "is stored under another name" in streamed.why_not(original, run / "lora", odd)


AS_IN_TRAINING = """
import json, sys
from pathlib import Path
from types import SimpleNamespace as Given
from backprop.config import TrainConfig
from backprop.engine import batches, four_bit, load, reference
base, adapter = sys.argv[1], Path(sys.argv[2])
chats = [[{"role": "user", "content": "What is 3?"}, {"role": "assistant", "content": "It is here."}]]
asked = four_bit.ask_as_trained(base, adapter, chats, dtype="bfloat16", device="cpu")
settings = json.loads((adapter / "adapter_config.json").read_text())
config = TrainConfig(data=("none",), method="qlora", lora_r=settings["r"])
plan = Given(engine=Given(value="torch"), recompute=Given(value=0), lora_alpha=Given(value=settings["lora_alpha"]))
model = load.add_adapter(load.load_base(base, dtype="bfloat16", device="cpu", four_bit=True), config, plan)
load.set_adapter_state(model, load.read_adapter(adapter))
with batches.computing(model.eval(), "bfloat16"):
    trained = [reference.logits(model, one) for one in asked.sequences]
print(sum(float(abs(one - other).max()) for one, other in zip(asked.logits, trained, strict=True)), len(trained))
print(*{str(weight.dtype) for weight in model.parameters() if weight.requires_grad})
"""


@needs_bitsandbytes
def test_the_model_as_it_was_trained_computes_as_training_does(run: Path, original: Path, tmp_path: Path) -> None:
    """Norms and the weights of words were asked in bfloat16, and are trained beside in float32."""
    done = with_bitsandbytes(AS_IN_TRAINING, original, run / "lora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.0", "1", "torch.bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", ["OSError('no libcudart')", pytest.param("ImportError('no libcudart')", marks=pytest.mark.long)]
)
def test_a_bitsandbytes_that_cannot_be_imported_is_a_warning(run: Path, tmp_path: Path, error: str) -> None:
    apart = bitsandbytes_of(tmp_path / "apart", f"raise {error}")
    options = ("export", run, "-q", "f16", "--output", tmp_path / "out", "--json")
    done = with_bitsandbytes(EXPORT, *options, cwd=tmp_path, apart=apart)
    assert done.returncode == 0, done.stderr
    (warned,) = [one["message"] for one in told(done) if one["event"] == "warning"]
    assert warned.startswith("the adapter was trained on weights of 4 bits, and is merged into the 16-bit original")
    assert "cannot be imported: no libcudart" in warned


@pytest.mark.slow
def test_an_adapter_of_16_bits_is_exported_without_waiting_for_bitsandbytes(run: Path, tmp_path: Path) -> None:
    """Importing it takes 8 seconds on two CPUs, in which nothing else would be done."""
    shutil.copytree(run / "lora", tmp_path / "plain")
    apart = bitsandbytes_of(tmp_path / "apart", f"open({str(tmp_path / 'imported')!r}, 'w')")
    options = ("export", tmp_path / "plain", "-q", "q8_0", "--no-verify", "--json")
    done = with_bitsandbytes(EXPORT, *options, cwd=tmp_path, apart=apart)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        pytest.param({}, (), id="PEFT is asked what is right"),
        pytest.param({"rank_pattern": {"none": 4}}, ("--no-verify",), id="PEFT merges", marks=pytest.mark.long),
    ],
)
def test_an_adapter_of_16_bits_is_exported_beside_a_bitsandbytes_that_cannot_be_imported(
    run: Path, tmp_path: Path, settings: dict[str, Any], options: tuple[str, ...]
) -> None:
    card = shutil.copytree(run / "lora", tmp_path / "plain") / "adapter_config.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), **settings}))
    apart = bitsandbytes_of(tmp_path / "apart", "raise OSError('no libcudart')")
    given = ("export", tmp_path / "plain", "-q", "f16", *options, "--json")
    done = with_bitsandbytes(EXPORT, *given, cwd=tmp_path, apart=apart)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_copied_adapter_whose_card_tells_of_4_bits_is_merged_into_the_original_aloud(
    run: Path, original: Path, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    model, tokenizer = merge.load_adapted(str(original), run / "lora"), merge.adapted_tokenizer(run / "lora")
    load.save_adapter(model, tokenizer, tmp_path / "plain")
    assert "load_in_4bit" not in (tmp_path / "plain" / "README.md").read_text()
    model.get_base_model().config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    load.save_adapter(model, tokenizer, tmp_path / "mine")
    for name, warnings in (("plain", 0), ("mine", 1)):
        options = ("-q", "f16", "--no-verify", "--question", "What is 3?", "--json")
        done = backprop("export", tmp_path / name, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        warned = [one["message"] for one in told(done) if one["event"] == "warning"]
        assert len(warned) == warnings
        assert all("in a run that is not known, and is merged into the 16-bit original" in one for one in warned)


UNPACK = """
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from backprop.engine.nf4 import unpack
torch.manual_seed(0)
for shape in ((64, 64), (96, 128), (512, 256), (3, 64 * 300)):
    for dtype in (torch.float32, torch.bfloat16):
        packed, state = quantize_4bit(torch.randn(shape, dtype=dtype), quant_type="nf4", compress_statistics=True)
        for again in (False, True):
            assert torch.equal(unpack(state, packed, again=again), dequantize_4bit(packed, state)), shape
"""


@needs_bitsandbytes
def test_weights_of_4_bits_are_made_into_16_bit_for_bit_as_bitsandbytes_does(tmp_path: Path) -> None:
    done = with_bitsandbytes(UNPACK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


HELD = """
import gc, weakref
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from backprop.engine.nf4 import hold_in_16_bits
torch.manual_seed(0)
layer = Linear4bit(128, 96, compute_dtype=torch.bfloat16, quant_type="nf4")
layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
layer.to("cpu")
model = torch.nn.Sequential(torch.nn.Sequential(layer, torch.nn.ReLU()), torch.nn.Linear(96, 4).bfloat16()).eval()
rounded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # before it computes, which packs weights for this CPU
rows = torch.randn(5, 128, dtype=torch.bfloat16)
expected = model[1](torch.relu(torch.nn.functional.linear(rows, rounded, layer.bias)))
gc.disable()  # what is let go of must not wait for it
layers = [weakref.ref(layer) for layer in model.modules() if isinstance(layer, Linear4bit)]
del layer, rounded
hold_in_16_bits(model)
assert len(layers) == 1 and layers[0]() is None
held, plain = model[0][0], model[1]
assert type(held) is type(plain) is torch.nn.Linear and not held.weight.requires_grad and not held.training
assert held.weight.shape == (96, 128) and held.bias is not None
assert torch.equal(model(rows), expected)
"""


@needs_bitsandbytes
def test_what_was_rounded_to_4_bits_is_held_in_16_and_computes_the_same(tmp_path: Path) -> None:
    done = with_bitsandbytes(HELD, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


COMPILED = """
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from backprop.engine import layers, nf4
torch.manual_seed(0)
model = torch.nn.Sequential(
    Linear4bit(128, 512, compute_dtype=torch.float32, quant_type="nf4"),
    torch.nn.SiLU(),
    Linear4bit(512, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4"),
).to("cpu").train()
rounded = {name: dequantize_4bit(model[name].weight.data, model[name].weight.quant_state) for name in (0, 2)}
nf4.unpack_within_compiled_code(model)
assert all(type(model[name]) is nf4._FourBit for name in rounded)
rows = torch.randn(40, 128, requires_grad=True)
hidden = torch.nn.functional.silu(torch.nn.functional.linear(rows, rounded[0], model[0].bias))
expected = torch.nn.functional.linear(hidden, rounded[2])
gradient, = torch.autograd.grad(expected.square().sum(), rows)
for backend in (None, layers._keeping_little):
    torch._dynamo.reset()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        found = layers.as_compiled(model.forward, backend)(rows)
    back, = torch.autograd.grad(found.square().sum(), rows)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(back, gradient)
    whole = [one.shape for one in kept if one.is_floating_point() and one.numel() >= 512 * 64]
    assert kept and not whole, whole
    assert not [one.shape for one in kept if not one.is_floating_point() and one.dtype != torch.uint8]
"""


PROVED = """
import torch
from bitsandbytes.nn import Linear4bit
from backprop.engine import layers, nf4, proofs
torch.manual_seed(0)

def proof():
    torch._dynamo.reset()
    return proofs.prove_quantized_layer(torch.nn.Sequential(layer), compiled=True)

layer = Linear4bit(128, 96, compute_dtype=torch.float32, quant_type="nf4").to("cpu").train()
nf4.unpack_within_compiled_code(torch.nn.Sequential(layer))
assert proof().ok, proof()
made, product = nf4.unpack, nf4._Product.backward
for again in (False, True):
    nf4.unpack = lambda *given, again=False, of=again: made(*given, again=again) * (1 + 0.1 * (again == of))
    assert not proof().ok, again
nf4.unpack = made
nf4._Product.backward = staticmethod(lambda ctx, gradient: (0 * product(ctx, gradient)[0], None, None))
assert proof().found.endswith("gradient by 1, at most 0.02 allowed"), proof()

class NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.new_zeros(len(x), 96)
    @staticmethod
    def backward(ctx, gradient):
        raise torch._dynamo.exc.TorchDynamoException("as the compiler of the way back does")

layers.as_compiled = lambda forward: NoWayBack.apply
assert proof().ok, "what cannot be compiled is not in training either"
"""


@needs_bitsandbytes
def test_a_4_bit_layer_is_proved_as_it_is_compiled(tmp_path: Path) -> None:
    done = with_bitsandbytes(PROVED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@needs_bitsandbytes
def test_compiled_layers_make_16_bits_of_4_again_on_the_way_back_and_keep_none(tmp_path: Path) -> None:
    done = with_bitsandbytes(COMPILED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
