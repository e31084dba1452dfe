"""The same on a GPU. Skipped without one; docs/benchmarks.md has the last result with date and hardware."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import backprop_process, chat

from backprop import Trainer, events
from backprop.edges import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.probe().gpus, reason="no NVIDIA GPU here; last result in docs/benchmarks.md"),
]

ROWS = [chat(f"What is {n}?", "It is here.") for n in range(12)]
OPTIONS = ["--steps", "30", "--batch-size", "4", "--lora-r", "8", "--lr", "0.01"]


@pytest.fixture(autouse=True)
def no_room_for_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `qlora` hold 4 bits, which it does not on a card as large as these are tested on."""
    monkeypatch.setenv("BACKPROP_DEQUANTIZE", "false")


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "full"])
def test_every_method_trains_in_bfloat16_and_learns(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    options = [*OPTIONS[:-1], "0.002"] if method == "full" else OPTIONS
    done = backprop_process(
        "train", "--data", write(ROWS), "--model", tiny_model, "--method", method, *options, "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    losses = [event["loss"] for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "step"]
    assert losses[-1] < 0.5 * losses[0]
    plan = result(tmp_path / "output")["plan"]
    assert (plan["device"]["value"], plan["dtype"]["value"]) == ("cuda", "bfloat16")


def test_qlora_holds_16_bits_where_there_is_room(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BACKPROP_DEQUANTIZE")
    steps, proved = steps_of("--data", write(ROWS), "--model", tiny_model, "--method", "qlora", *OPTIONS, cwd=tmp_path)
    assert result(tmp_path / "output")["plan"]["dequantize"]["value"] is True
    assert all(proof["ok"] for proof in proved)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]


def test_what_was_trained_on_4_bits_is_merged_into_what_it_was_trained_on(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    said: list[Any] = []
    trainer = Trainer(str(tiny_model), say=said.append, output=tmp_path / "run", method="qlora")
    trainer.train(write(ROWS), steps=60, batch_size=4, lora_r=16, learning_rate=1e-2)
    trainer.export(quantization="f16")
    (phase,) = [event.name for event in said if isinstance(event, events.Phase) and "goes into" in event.name]
    assert phase.startswith("the adapter goes into the base as it was trained on"), phase
    print(phase)
    print(*[f"{event.name}: {event.found}" for event in said if isinstance(event, events.Proved)][-6:], sep="\n")


def test_the_first_loss_on_the_gpu_is_that_on_the_cpu(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    data = write(ROWS)
    first: list[float] = []
    for name, visible in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        options = ["--data", data, "--model", tiny_model, *OPTIONS, "--output", tmp_path / name, "--json"]
        done = backprop_process("train", *options, cwd=tmp_path, **visible)
        assert done.returncode == 0, done.stderr
        first.append(next(e["loss"] for e in map(json.loads, done.stdout.splitlines()) if e["event"] == "step"))
    assert first[0] == pytest.approx(first[1], rel=0.01)  # bfloat16 keeps 8 bits of each factor


@pytest.mark.skipif(
    not any(gpu.capability >= (8, 9) for gpu in device.probe().gpus), reason="no GPU here multiplies in 8 bits"
)
@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_gradients_go_back_in_8_bits(
    wide_model: Path, write: Callable[..., Path], tmp_path: Path, compiled: str
) -> None:
    data = write([chat(f"question {n}", "word " * (3 * n + 1)) for n in range(16)])
    options = ["--data", data, "--model", wide_model, "--steps", "8", "--batch-size", "8", "--skip-proofs", compiled]
    exact, _ = steps_of(*options, "--output", tmp_path / "exact", cwd=tmp_path)
    argv = [*options, "--fp8-backward", "--output", tmp_path / "rounded", "--json"]
    done = backprop_process("train", *argv, cwd=tmp_path)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    proof = next(event for event in told if event["event"] == "proof" and "8 bits" in event["name"])
    print(proof["found"])
    assert proof["ok"]
    assert not any("cannot be compiled" in event["message"] for event in told if event["event"] == "warning")
    losses = [[step["loss"] for step in steps if step["event"] == "step"] for steps in (told, exact)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_multi_run_merges_on_the_gpu(tiny_model: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    # Enough steps for an end to be learnt, at a rate at which it is; a run whose answers never stop is not green.
    long = ["--steps", "80", "--batch-size", "4", "--lora-r", "16", "--lr", "0.005"]
    sources = [option for name in "ab" for option in ("--data", write(ROWS, f"{name}.jsonl"))]
    done = backprop_process("multi-run", *sources, "--model", tiny_model, *long, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "output")["result"]["runs"] == 2


def test_doctor_finds_the_gpu_and_all_that_it_runs_there_is_right(tmp_path: Path) -> None:
    started = time.monotonic()
    done = backprop_process("doctor", "--json", cwd=tmp_path)
    print(f"doctor took {time.monotonic() - started:.1f} s")
    found = {event["name"]: event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "check"}
    print(*(f"{one['name']}: {one['found']} {one['needed']}" for one in found.values()), sep="\n")
    assert found["gpu 0"]["ok"]
    if "computes on the GPU" in found["torch product"]["found"]:
        pytest.skip("other work is on the GPU, which doctor does not slow down; run this test by itself")
    assert "cuda" in found["torch product"]["found"]
    for name in ("torch product", "fp8 product", "packed attention", "triton kernel", "compiled function"):
        assert found[name]["ok"], found[name]
    assert found.get("4-bit product", {"ok": True})["ok"], found["4-bit product"]


def test_doctor_says_how_a_model_would_be_trained_here(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    done = backprop_process("doctor", "--model", tiny_model, "--data", write(ROWS), "--json", cwd=tmp_path)
    found = {event["name"]: event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "check"}
    print(found["model"]["found"])
    assert "fits: lora in bfloat16 on" in found["model"]["found"]


def test_the_card_is_read_in_milliseconds_and_its_energy_is_told(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backprop.edges import nvml

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with nvml.opened():
        handle = nvml.card_of(device.probe().gpus[0].uuid)
        started = time.perf_counter()
        readings = [nvml.read(handle) for _ in range(20)]
        each = (time.perf_counter() - started) / 20
        print(
            f"{1000 * each:.2f} ms for {readings[-1]}; slows down at {nvml.slowdown_c(handle)} °C, "
            f"memory at most {nvml.memory_limit_c(handle)} °C; {nvml.state_of(handle)}"
        )
    assert each < 0.1
    assert readings[-1].temperature_c is not None
    steps_of("--data", write(ROWS), "--model", tiny_model, *OPTIONS, cwd=tmp_path)
    spent = result(tmp_path / "output")["spent"]
    print(spent)
    assert spent["energy_wh"] > 0
    assert 10 < spent["hottest_c"] < 110


def test_a_real_card_above_its_limit_is_waited_for_and_the_time_limit_is_heard(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    # Any card in use is warmer than 30 °C, or gets so.
    options = [
        "--data",
        write(ROWS),
        "--model",
        tiny_model,
        "--steps",
        "100000",
        "--gpu-max-temp",
        "30",
        "--max-minutes",
        "1",
    ]
    options += ["--skip-proofs", "--no-rehearse", "--no-compile"]
    done = backprop_process("train", *options, "--json", cwd=tmp_path)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    paused = [event for event in told if event["event"] == "paused"]
    print(paused[:1], told[-1])
    assert paused
    assert done.returncode == 75
    assert result(tmp_path / "output")["spent"]["paused_seconds"] > 0


def steps_of(*options: str | Path, cwd: Path, **environment: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train, and give the steps and the proofs."""
    done = backprop_process("train", *options, "--json", cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return [event for event in told if event["event"] == "step"], [event for event in told if event["event"] == "proof"]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_packed_rows_train_as_padded_ones_through_the_kernel_for_several_lengths(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    data = write([chat(f"question {n}", "word " * (3 * n + 1)) for n in range(16)])
    options = ["--data", data, "--model", tiny_model, "--method", method, "--steps", "5", "--batch-size", "8"]
    packed, proved = steps_of(*options, "--packing", "--output", tmp_path / "packed", cwd=tmp_path)
    padded, _ = steps_of(*options, "--no-packing", "--output", tmp_path / "padded", cwd=tmp_path)
    assert all(proof["ok"] for proof in proved)
    losses = [[step["loss"] for step in steps] for steps in (packed, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("method", ["lora", "qlora", "qlora --dequantize", "dora", "full"])
def test_compiled_layers_train_as_they_do_uncompiled(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    data = write([chat(f"question {n}", "word " * (3 * n + 1)) for n in range(16)])
    options = ["--data", data, "--model", tiny_model, "--method", *method.split(), "--steps", "5", "--batch-size", "8"]
    options += ["--recompute", "1", "--micro-batch", "2"]
    plain, _ = steps_of(*options, "--output", tmp_path / "plain", cwd=tmp_path)
    done = backprop_process(
        "train",
        *options,
        "--compile",
        "--output",
        tmp_path / "compiled",
        "--json",
        cwd=tmp_path,
        XDG_CACHE_HOME=tmp_path,
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert not any("cannot be compiled" in event["message"] for event in told if event["event"] == "warning")
    assert list((tmp_path / "backprop" / "inductor").iterdir())
    losses = [[step["loss"] for step in steps if step["event"] == "step"] for steps in (told, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_preferences_are_learnt_packed_as_padded_from_the_model_before(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, objective: str, method: str
) -> None:
    rows = [{"prompt": f"question {n}", "chosen": "good " * (n % 4 + 1), "rejected": "bad " * 3} for n in range(24)]
    options = ["--data", write(rows), "--model", tiny_model, "--method", method, "--objective", objective]
    options += ["--steps", "12", "--batch-size", "8", "--lr", "1e-3" if method == "full" else "5e-3"]
    packed, proved = steps_of(*options, "--packing", "--output", tmp_path / "packed", cwd=tmp_path)
    padded, _ = steps_of(*options, "--no-packing", "--output", tmp_path / "padded", cwd=tmp_path)
    assert all(proof["ok"] for proof in proved)
    assert packed[-1]["accuracy"] == 1.0
    losses = [[step["loss"] for step in steps] for steps in (packed, padded)]
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=0.02)
    start = {"dpo": math.log(2), "kto": 0.5}.get(objective)
    if start is not None:
        # bfloat16 finds an answer of eight tokens likelier or less by some hundredths of a nat in another pass.
        assert losses[0][0] == pytest.approx(start, rel=1e-2)


def test_singular_vectors_come_out_of_a_bfloat16_base_and_what_is_delivered_fits_it(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    options = ["--data", write(ROWS), "--model", tiny_model, "--pissa", "--steps", "60", *OPTIONS[2:]]
    steps, proved = steps_of(*options, "--gate-data", write(ROWS, "old.jsonl"), cwd=tmp_path)
    assert all(proof["ok"] for proof in proved)
    assert steps[-1]["loss"] < steps[0]["loss"]
    done = backprop_process("export", tmp_path / "output", "-q", "f16", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_4_bit_layer_is_held_against_its_own_weights(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backprop.engine import load, nf4, proofs

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    model: Any = load.load_base(str(tiny_model), dtype="bfloat16", device="cuda", four_bit=True)
    assert proofs.prove_quantized_layer(model).ok
    nf4.unpack_within_compiled_code(model)
    assert proofs.prove_quantized_layer(model).ok
    assert proofs.prove_quantized_layer(model, compiled=True).ok
    layer = next(module for module in model.modules() if isinstance(module, nf4._FourBit))
    forward = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: forward(self, x) * 1.05)
    assert not proofs.prove_quantized_layer(model).ok


def test_a_pass_is_begun_while_the_one_before_is_computed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    import torch
    from peft import LoraConfig, get_peft_model

    from backprop.core.data.render import Example
    from backprop.engine import load
    from backprop.engine.attention import within_documents
    from backprop.engine.batches import computing, packed
    from backprop.engine.objectives import Supervised

    base: Any = load.load_base(str(tiny_model), dtype="bfloat16", device="cuda")
    model: Any = get_peft_model(base, LoraConfig(target_modules="all-linear")).train()
    example = Example(tuple(range(5, 45)), (False,) * 10 + (True,) * 30)
    gpu = torch.device("cuda", 0)
    with within_documents(model), computing(model, "bfloat16"):
        for waiting in ("default", "error"):  # what is done once is done the first time
            torch.cuda.set_sync_debug_mode(waiting)
            try:
                Supervised().part(model, packed([example, example]), {"tokens": 60}, gpu).loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert all(weight.grad.any() for name, weight in model.named_parameters() if "lora_B" in name)


def killed_after_step(step: int, *options: str | Path, cwd: Path) -> None:
    """Start a training and kill it as soon as it tells of ``step``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "backprop", "train", *map(str, options), "--json"],
        cwd=cwd,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["step"] == step:
            process.kill()
    assert process.wait() == -signal.SIGKILL


# Matrices of 4,096 weights and more, whose moments bitsandbytes holds in 8 bits.
EIGHT_BIT = ["--optimizer", "adamw-8bit", "--lora-r", "64"]


@pytest.mark.parametrize(
    "method",
    [["lora"], ["qlora"], *(["lora", *EIGHT_BIT], ["qlora", *EIGHT_BIT], ["full", *EIGHT_BIT[:2]])],
    ids=" ".join,
)
def test_a_killed_run_ends_with_the_same_bits(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, method: list[str]
) -> None:
    data = write([chat(f"question {n}", "word " * (3 * n + 1)) for n in range(16)])
    options = ["--data", data, "--model", tiny_model, "--method", *method, "--steps", "12", "--batch-size", "8"]
    options += ["--deterministic", "--save-steps", "2", *([] if "full" in method else ["--lora-dropout", "0.1"])]
    undisturbed, _ = steps_of(*options, "--output", tmp_path / "undisturbed", cwd=tmp_path)
    killed_after_step(7, *options, "--output", tmp_path / "killed", cwd=tmp_path)
    resumed, proofs = steps_of(*options, "--output", tmp_path / "killed", cwd=tmp_path)
    assert resumed[0]["step"] in (7, 8)
    assert [step["loss"] for step in undisturbed[-len(resumed) :]] == [step["loss"] for step in resumed]
    assert all(proof["ok"] for proof in proofs)
    hashes = [result(tmp_path / name)["result"]["adapter_sha256"] for name in ("undisturbed", "killed")]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    "method",
    [
        ["lora", "--lr", "2e-3"],
        ["lora", "--lr", "5e-4", "--lora-plus", "8"],
        ["qlora", "--lr", "2e-3"],
        ["full", "--lr", "1e-3"],
    ],
    ids=" ".join,
)
def test_moments_of_8_bits_teach_what_those_of_32_do(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, method: list[str]
) -> None:
    data = write([chat(f"question {n}", "word " * (3 * n + 1)) for n in range(16)])
    options = ["--data", data, "--model", tiny_model, "--method", *method, "--steps", "40", "--batch-size", "8"]
    options += ["--weight-decay", "0.1", *([] if "full" in method else EIGHT_BIT[2:])]
    exact, eight = (
        steps_of(*options, "--optimizer", kind, "--output", tmp_path / kind, cwd=tmp_path)[0]
        for kind in ("adamw", "adamw-8bit")
    )
    losses = [[step["loss"] for step in steps] for steps in (exact, eight)]
    print(method, losses[0][0], losses[0][-1], losses[1][-1])
    assert result(tmp_path / "adamw-8bit")["plan"]["optimizer"]["value"] == "adamw-8bit"
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[1] != losses[0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.02)


def test_every_weight_is_trained_in_6_bytes_less_with_moments_of_8_bits(
    wide_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    data = write([chat(f"question {n}", "word " * 8) for n in range(8)])
    options = ["--data", data, "--model", wide_model, "--method", "full", "--steps", "3", "--batch-size", "2"]
    options += ["--skip-proofs", "--no-compile"]
    peaks = [
        max(
            step["memory_bytes"]
            for step in steps_of(*options, *given, "--output", tmp_path / given[1], cwd=tmp_path)[0]
        )
        for given in (["--optimizer", "adamw"], ["--optimizer", "adamw-8bit"])
    ]
    model = AutoModelForCausalLM.from_pretrained(wide_model)
    weights = sum(weight.numel() for weight in model.parameters()) - model.get_input_embeddings().weight.numel()
    less = (peaks[0] - peaks[1]) / weights
    print(
        f"{peaks[0] / 2**20:.0f} MiB and {peaks[1] / 2**20:.0f} for {weights:,} weights: {less:.2f} bytes less for each"
    )
    # Two moments of 8 bits, with 4 bytes for each 256, instead of two of 32; but for those of words, which keep these.
    assert less == pytest.approx(2 * (4 - 1 - 4 / 256), rel=0.05)


SHORT_OF_MEMORY = """
import sys, torch
from backprop import BackpropError, Trainer, events
model, data, output, allowed, batch = sys.argv[1:]
said = []

def say(event):
    said.append(event)
    if isinstance(event, events.Phase) and event.name == "training":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if allowed:
            torch.cuda.set_per_process_memory_fraction(int(allowed) / torch.cuda.mem_get_info()[1])

options = dict(steps=3, batch_size=int(batch), micro_batch=int(batch), skip_proofs=True, deterministic=True)
try:
    Trainer(model, say=say, output=output).train(data, **options)
except BackpropError as error:
    print(error.message, error.hint, file=sys.stderr)
    sys.exit(error.code)
print(torch.cuda.max_memory_reserved())
print(sum("the memory was full in step" in event.message for event in said if isinstance(event, events.Warned)))
print(*[event.loss for event in said if isinstance(event, events.Step)])
"""


def short_of_memory(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", SHORT_OF_MEMORY, *arguments]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose activations outweigh its weights, and the part of the logits that the loss holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_model, folder)
    config = LlamaConfig.from_pretrained(tiny_model, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_full_memory_is_met_with_recomputing_and_smaller_passes_and_changes_no_loss(
    wide_model: Path, write: Callable[..., Path], tmp_path: Path, share: float
) -> None:
    """In a process that may take only a share of the memory that the step needs."""
    data = write([chat(f"question {n}", "word " * 100) for n in range(64)])

    def trained(name: str, allowed: str) -> tuple[int, int, list[float]]:
        done = short_of_memory(wide_model, data, tmp_path / name, allowed, "64", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        reserved, warned, losses = done.stdout.splitlines()[-3:]
        return int(reserved), int(warned), [float(loss) for loss in losses.split()]

    needed, warned, losses = trained("whole", "")
    assert warned == 0
    allowed = int(share * needed)
    taken, warned, short = trained("short", str(allowed))
    print(f"{needed / 2**20:.0f} MiB needed, {taken / 2**20:.0f} of {allowed / 2**20:.0f} taken, {warned} warnings")
    assert warned > 0
    assert taken <= allowed
    assert short == pytest.approx(losses, rel=1e-3)


def test_the_inputs_of_layers_wait_in_main_memory_and_change_no_gradient(wide_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from backprop.engine import layers

    model: Any = AutoModelForCausalLM.from_pretrained(wide_model, dtype=torch.bfloat16).cuda().train()
    ids = torch.arange(4096, device="cuda")[None] % 500

    def run(*, offloaded: bool) -> tuple[int, list[Any]]:
        model.zero_grad(set_to_none=True)
        layers.recompute(model, 99, offloaded=offloaded)
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        return held, [weight.grad.clone() for weight in model.parameters()]

    run(offloaded=False)
    (held, plain), (less, gradients) = run(offloaded=False), run(offloaded=True)
    entry = ids.numel() * model.config.hidden_size * 2
    print(f"{held} bytes held without, {less} with {model.config.num_hidden_layers} inputs of {entry} in main memory")
    assert held - less >= (model.config.num_hidden_layers - 1) * entry
    # Sums come in another order each time.
    assert all((one - other).norm() <= 0.01 * one.norm() for one, other in zip(plain, gradients, strict=True))


def test_too_little_memory_for_one_example_is_exit_5_with_what_to_change(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    data = write([chat("x", "word " * 400)])  # its logits alone are 80 MB
    done = short_of_memory(tiny_model, data, tmp_path / "run", str(64 * 10**6), "1", cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "the GPU's memory is" in done.stderr
    assert "--max-length" in done.stderr


TOGETHER = """
import sys
from backprop.core import duration
from backprop.core.plan import Choice
number = int(sys.argv.pop(1))
duration.choose_gpus = lambda *_: Choice(number, "a test")
from backprop.__main__ import main
main()
"""
several = pytest.mark.skipif(len(device.probe().gpus) < 2, reason="one GPU here")


def together(number: int, *options: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Start a training on ``number`` GPUs, however short it is."""
    argv = [sys.executable, "-c", TOGETHER, str(number), "train", *map(str, options), "--json"]
    return subprocess.Popen(argv, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def losses_of(number: int, *options: str | Path, cwd: Path) -> list[float]:
    process = together(number, *options, cwd=cwd)
    printed, said = process.communicate()
    assert process.returncode == 0, said
    return [event["loss"] for event in map(json.loads, printed.splitlines()) if event["event"] == "step"]


@several
@pytest.mark.parametrize(
    "method",
    [
        *(["lora"], ["lora", "--pissa"], ["qlora"], ["dora"], ["full", "--lr", "1e-3"], ["lora", "--objective", "kto"]),
        ["lora", *EIGHT_BIT],
    ],
    ids=" ".join,
)
def test_one_gpu_and_two_give_one_curve(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, method: list[str]
) -> None:
    rows = [chat(f"question {n}", "word " * (3 * n + 1)) for n in range(16)]
    if "kto" in method:
        rows = [{"prompt": f"question {n}", "completion": "word " * n, "label": n % 2 == 0} for n in range(1, 17)]
    options = ["--data", write(rows), "--model", tiny_model, "--steps", "6", "--batch-size", "8", "--method", *method]
    alone, shared = (losses_of(number, *options, "--output", tmp_path / str(number), cwd=tmp_path) for number in (1, 2))
    assert result(tmp_path / "2")["plan"]["gpus"]["value"] == 2
    print(method, max(abs(one - other) for one, other in zip(alone, shared, strict=True)))
    assert alone == pytest.approx(shared, rel=0.01)  # passes are cut differently, and bfloat16 keeps 8 bits


@several
@pytest.mark.parametrize(
    ("stop", "code"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75), (None, 5)],
    ids=["KILL", "TERM", "worker"],
)
def test_two_gpus_that_are_stopped_leave_nothing_and_go_on_to_the_same_bits(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, stop: signal.Signals | None, code: int
) -> None:
    rows = [chat(f"question {n}", "word " * (3 * n + 1)) for n in range(16)]
    options = ["--data", write(rows), "--model", tiny_model, "--steps", "60", "--batch-size", "8", "--skip-proofs"]
    options += ["--deterministic", "--save-steps", "5", "--lora-dropout", "0.1"]
    losses_of(2, *options, "--output", tmp_path / "whole", cwd=tmp_path)
    process = together(2, *options, "--output", tmp_path / "run", cwd=tmp_path)
    assert process.stdout
    next(line for line in process.stdout if json.loads(line).get("step") == 12)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    started = time.monotonic()
    if stop is None:
        os.kill(int(children[0]), signal.SIGKILL)
    else:
        process.send_signal(stop)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert time.monotonic() - started < 8
    time.sleep(1)
    left = [number for number in children if Path(f"/proc/{number}/cmdline").is_file()]
    assert not [number for number in left if Path(f"/proc/{number}/cmdline").read_text()], "a worker outlived its run"
    losses_of(2, *options, "--output", tmp_path / "run", cwd=tmp_path)
    hashes = [result(tmp_path / name)["result"]["adapter_sha256"] for name in ("whole", "run")]
    assert hashes[0] == hashes[1]


with_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason="unsloth is not installed here")
UNSLOTH_ROWS = [chat(f"question {n}", "word " * (3 * n + 1)) for n in range(16)]
SHORT = ["--steps", "5", "--batch-size", "8", "--lora-r", "8", "--lr", "1e-3", "--no-rehearse"]


def trained_by(
    engine: str, *options: str | Path, cwd: Path, **environment: str
) -> tuple[list[float], list[dict[str, Any]]]:
    """Train with an engine, and give the losses and all that was said; no other word may be on either stream."""
    started = time.monotonic()
    argv = [*options, "--engine", engine, "--json"]
    done = backprop_process("train", *argv, cwd=cwd, timeout_s=600, **environment)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]  # each line is an event
    losses = [event["loss"] for event in told if event["event"] == "step"]
    print(f"{engine}: {time.monotonic() - started:.0f} s; {losses}")
    if engine == "unsloth":
        assert "Unsloth" not in done.stderr, done.stderr  # as its banners have it
        proofs = {event["name"]: event for event in told if event["event"] == "proof"}
        print(*(f"{name}: {proof['found']}" for name, proof in proofs.items()), sep="\n")
        assert all(proof["ok"] for proof in proofs.values())
    return losses, told


def tiny_qwen2(folder: Path, tiny_model: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shutil.copytree(tiny_model, folder)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = Qwen2Config(**sizes, **ends, num_key_value_heads=2, vocab_size=49152, max_position_embeddings=512)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@with_unsloth
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_unsloth_trains_as_torch_does_and_plain_peft_loads_what_it_delivers(
    wide_model: Path, write: Callable[..., Path], tmp_path: Path, method: str, packing: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    here = tmp_path / "here"
    here.mkdir()
    options = ["--data", write(UNSLOTH_ROWS), "--model", wide_model, "--method", method, packing, *SHORT]
    other, told = trained_by("unsloth", *options, "--output", tmp_path / "unsloth", cwd=here)
    assert list(here.iterdir()) == [], "something was written beside the run"
    assert ("packed documents are isolated" in {event.get("name") for event in told}) == (packing == "--packing")
    assert result(tmp_path / "unsloth")["plan"]["engine"]["value"] == "unsloth"
    assert result(tmp_path / "unsloth")["result"]["packing"] == (packing == "--packing")
    own, _ = trained_by("torch", *options, "--output", tmp_path / "torch", cwd=here)
    assert other == pytest.approx(own, rel=0.01)  # bfloat16 keeps 8 bits, and both round elsewhere
    assert other[0] != other[-1]
    loader: Any = AutoModelForCausalLM
    model: Any = PeftModel.from_pretrained(loader.from_pretrained(wide_model), str(tmp_path / "unsloth" / "lora"))
    moved = [bool(weight.any()) for name, weight in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 7 * 8
    assert all(moved)


@with_unsloth
@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_unsloth_recomputed_or_compiled_is_the_same(
    wide_model: Path, write: Callable[..., Path], tmp_path: Path, packing: str
) -> None:
    options = ["--data", write(UNSLOTH_ROWS), "--model", wide_model, packing, *SHORT, "--micro-batch", "4"]
    options += ["--skip-proofs"]
    found: dict[str, list[float]] = {}
    for name, more in {
        "plain": ["--no-compile", "--recompute", "0"],
        "some again": ["--no-compile", "--recompute", "3"],
        "all again": ["--no-compile", "--recompute", "8"],
        "compiled": ["--compile", "--recompute", "0"],
        "compiled, some again": ["--compile", "--recompute", "3"],
    }.items():
        found[name], told = trained_by("unsloth", *options, *more, "--output", tmp_path / name, cwd=tmp_path)
        memory = [event["memory_bytes"] for event in told if event["event"] == "step"]
        print(f"{name}: {max(memory) / 2**20:.0f} MiB")
    assert found["some again"] == pytest.approx(found["plain"], rel=2e-3)
    for losses in found.values():
        assert losses == pytest.approx(found["plain"], rel=0.01)


@with_unsloth
def test_unsloth_killed_goes_on_and_ends_as_undisturbed(
    wide_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    options = ["--data", write(UNSLOTH_ROWS), "--model", wide_model, *SHORT[2:], "--steps", "24", "--save-steps", "2"]
    undisturbed, _ = trained_by("unsloth", *options, "--output", tmp_path / "undisturbed", cwd=tmp_path)
    argv = [*options, "--output", tmp_path / "killed", "--engine", "unsloth"]
    killed_after_step(7, *argv, cwd=tmp_path)
    resumed, told = trained_by("unsloth", *argv[:-2], cwd=tmp_path)
    first = next(event["step"] for event in told if event["event"] == "step")
    assert first > 1
    assert len(resumed) == 24 - first + 1
    # Not the same bits: some of unsloth's sums come in another order each time.
    assert resumed == pytest.approx(undisturbed[first - 1 :], rel=0.01)


AUTO = """
import sys
from backprop.core import duration, engines
duration.TRIED_ABOVE_S = engines.TRIED_ABOVE_S = -1
duration.TRIED_SHARE = 1e9
from backprop.__main__ import main
main()
"""


@with_unsloth
@pytest.mark.parametrize("family", ["llama-untied", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_auto_tries_both_engines_and_takes_the_faster_one_that_computes_the_same(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, family: str, method: str
) -> None:
    from tiny_models import tiny

    model = tiny_qwen2(tmp_path / "m", tiny_model) if family == "qwen2" else tiny(family, tmp_path / "m")
    # Of answers this short an end is learnt first of all.
    rows = [chat("word " * (3 * n + 1), "It is.") for n in range(16)]
    options = ["--data", write(rows), "--model", model, "--method", method, *SHORT, "--no-compile"]
    argv = [sys.executable, "-c", AUTO, "train", *map(str, options), "--output", str(tmp_path / "run"), "--json"]
    # What was found is this test's own, what was compiled is not.
    names = ("UNSLOTH_COMPILE_LOCATION", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    kept = {name: str(tmp_path.parent / name.lower()) for name in names}
    environment = {**os.environ, **kept, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    chosen: list[dict[str, str]] = []
    for again in (False, True):
        more = ["--overwrite", "--resume", "never"] if again else []
        started = time.monotonic()
        done = subprocess.run(
            [*argv, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        phases = [event["name"] for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "phase"]
        chosen.append(result(tmp_path / "run")["plan"]["engine"])
        print(
            f"{time.monotonic() - started:.0f} s", *(name for name in phases if "engine" in name or "fastest" in name)
        )
        assert sum(name.startswith("trying the engine") for name in phases) == (0 if again else 2)
    assert chosen[0]["reason"].startswith("the faster here"), "what unsloth computes is not what torch does"
    assert chosen[1] == {"value": chosen[0]["value"], "reason": f"in an earlier run {chosen[0]['reason']}"}


IN_ONE_PROCESS = """
import json, sys
from backprop import Trainer, events
model, data, output = sys.argv[1:]
for engine in ("unsloth", "torch"):
    said = []
    trainer = Trainer(model, say=said.append, output=f"{output}/{engine}", engine=engine)
    trainer.train(data, steps=60, batch_size=4, lora_r=16, learning_rate=1e-2)
    if engine == "unsloth":
        trainer.export("safetensors")
    print(*[f"{one.name}: {one.found}" for one in said if isinstance(one, events.Proved)], sep="\\n", file=sys.stderr)
    print(json.dumps([one.loss for one in said if isinstance(one, events.Step)]))
"""


@with_unsloth
def test_what_unsloth_has_trained_is_exported_and_torch_trains_in_the_same_process(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    argv = [sys.executable, "-c", IN_ONE_PROCESS, str(tiny_model), str(write(ROWS)), str(tmp_path)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    other, own = map(json.loads, done.stdout.splitlines())
    assert other[:5] == pytest.approx(own[:5], rel=0.02)
    assert own[-1] < 0.5 * own[0]
    assert other[-1] < 0.5 * other[0]


@with_unsloth
def test_several_runs_by_unsloth_are_merged(tiny_model: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    long = ["--steps", "80", "--batch-size", "4", "--lora-r", "16", "--lr", "0.005", "--engine", "unsloth"]
    sources = [option for name in "ab" for option in ("--data", write(ROWS, f"{name}.jsonl"))]
    for method in ("lora", "qlora"):
        folder = tmp_path / method
        argv = [*sources, "--model", tiny_model, "--method", method, *long, "--output", folder]
        done = backprop_process("multi-run", *argv, cwd=tmp_path, timeout_s=600)
        assert done.returncode == 0, done.stderr
        assert result(folder)["result"]["runs"] == 2


@with_unsloth
def test_a_rehearsal_goes_the_way_of_unsloth(wide_model: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--data", write(UNSLOTH_ROWS), "--model", wide_model, *SHORT[:-1], "--rehearse"]
    _, told = trained_by("unsloth", *options, cwd=tmp_path)
    assert "the rehearsal went through" in {event.get("name") for event in told}
