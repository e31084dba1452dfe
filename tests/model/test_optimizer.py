"""AdamW with moments of 8 bits, by bitsandbytes on a CPU: what it teaches, what its checkpoints hold, and which go on.

bitsandbytes is not installed where there is no GPU (see `test_four_bit`), and is used in processes of their own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LONG, ROOT, UNEVEN, Run
from safetensors.torch import save_file

from backprop.config import TrainConfig
from backprop.core.choice import Choice
from backprop.core.fitting import least_bytes
from backprop.core.hardware import Gpu, Hardware
from backprop.core.memory import ModelShape
from backprop.core.passes import CUDA_BYTES, SHARE_FOR_STEP
from backprop.core.plan import Plan
from backprop.edges import checkpoints
from backprop.edges.checkpoints import Checkpoint
from backprop.engine import four_bit
from backprop.engine.snapshot import FORMAT, OPTIMIZER, decided, moments_of, refuse_other, restore_optimizer
from backprop.errors import UsageError
from backprop.presets import GIB
from backprop.verbs.fits import method_that_fits
from backprop.verbs.session import Session, running

pytestmark = pytest.mark.model
APART = ROOT / ".venv" / "apart"
needs_bitsandbytes = pytest.mark.skipif(
    four_bit.why_not() and not APART.is_dir(), reason="no bitsandbytes: `scripts/setup`"
)

TRAIN = """
import json, sys
from backprop import BackpropError, Trainer, events
model, data, runs = sys.argv[1:]
for options in json.loads(runs):
    said, failed = [], ""
    try:
        Trainer(model, say=said.append, output=options.pop("output")).train(data, skip_proofs=True, **options)
    except BackpropError as error:
        failed = error.message
    print(json.dumps({
        "losses": [event.loss for event in said if isinstance(event, events.Step)],
        "plan": [event.choices["optimizer"] for event in said if isinstance(event, events.PlanMade)],
        "failed": failed,
    }))
"""


def trained(model: Path, data: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train one after the other, with bitsandbytes, and give what each said."""
    path = os.pathsep.join([*([str(APART)] if APART.is_dir() else []), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, model, data, json.dumps(runs)],
        cwd=data.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@needs_bitsandbytes
@pytest.mark.parametrize(
    "options",
    [
        # Matrices of 4,096 weights and more: below, bitsandbytes keeps moments in 32 bits.
        pytest.param({"lora_r": 64, "learning_rate": 2e-3, "weight_decay": 0.1}, id="lora"),
        pytest.param(
            {"lora_r": 64, "learning_rate": 5e-4, "lora_plus": 8.0, "weight_decay": 0.1},
            id="lora-plus",
            marks=LONG,
        ),
        pytest.param({"method": "full", "learning_rate": 1e-3}, id="full"),
    ],
)
def test_moments_of_8_bits_teach_the_same_take_less_and_go_on_bit_for_bit(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    from safetensors.torch import load_file

    both = {**options, "steps": 24, "batch_size": 8, "save_steps": 9, "keep_checkpoints": 9}
    eight, kept = {**both, "optimizer": "adamw-8bit"}, str(tmp_path / "eight" / "checkpoints" / "step-000009")
    whole, exact, again, refused = trained(
        tiny_model,
        write(UNEVEN),
        [
            {**eight, "output": str(tmp_path / "eight")},
            {**both, "output": str(tmp_path / "exact")},
            {**eight, "output": str(tmp_path / "again"), "resume": kept},
            {**both, "output": str(tmp_path / "refused"), "resume": kept, "optimizer": "adamw"},
        ],
    )
    assert (whole["plan"], exact["plan"]) == (["adamw-8bit"], ["adamw"])  # on a CPU never by itself
    assert exact["losses"][-1] < 0.8 * exact["losses"][0]
    assert whole["losses"] != exact["losses"]
    assert whole["losses"][-1] == pytest.approx(exact["losses"][-1], rel=0.02)
    assert again["losses"] == whole["losses"][9:]
    adapters = [(tmp_path / name / "lora" / "adapter_model.safetensors").read_bytes() for name in ("eight", "again")]
    assert adapters[0] == adapters[1]
    assert "optimizer: adamw-8bit before, adamw now" in refused["failed"]
    states = [load_file(tmp_path / name / "checkpoints/step-000009" / OPTIMIZER) for name in ("eight", "exact")]
    # What words begin with, which `full` trains too, keeps 32 bits.
    words = [{name: one for name, one in state.items() if one.numel() == 49152 * 64} for state in states]
    assert [len(one) for one in words] == ([2, 2] if options.get("method") == "full" else [0, 0])
    assert {one.dtype for state in words for one in state.values()} <= {torch.float32}
    sizes = [
        sum(one.nbytes for name, one in state.items() if name not in known)
        for state, known in zip(states, words, strict=True)
    ]
    assert sizes[0] < 0.4 * sizes[1]  # of what is tiny, beside its smallest matrices


class Kept:
    """An optimizer of one weight, as bitsandbytes' and torch's give and take their state."""

    def __init__(self, state: dict[int, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "param_groups": [{"params": [0, 1]}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]


def test_what_an_optimizer_keeps_comes_back_with_its_types(tmp_path: Path) -> None:
    """bitsandbytes 0.50 nests its moments, shares the maps of what 8 bits stand for, and counts steps in an integer."""
    shared = torch.linspace(-1, 1, 256)
    eight = {"state1": torch.arange(4096, dtype=torch.uint8), "absmax1": torch.rand(16), "qmap1": shared}
    of_32_bits = {"state1": torch.rand(9), "state2": torch.rand(9)}
    state = {
        0: {"step": 3, "__bnb_optimizer_quant_state__": eight},
        1: {"step": 3, "__bnb_optimizer_quant_state__": {**of_32_bits, "qmap1": shared}},
        2: {"step": torch.tensor(3.0), "exp_avg": torch.rand(9)},  # torch's own
    }
    save_file(moments_of(Kept(state)), tmp_path / OPTIMIZER)
    fresh = Kept({})
    restore_optimizer(Checkpoint(folder=tmp_path, state={}), fresh)
    for number, values in ((0, eight), (1, of_32_bits)):
        assert type(fresh.state[number]["step"]) is int
        assert fresh.state[number]["step"] == 3
        for name, value in values.items():
            assert fresh.state[number][name].dtype == value.dtype
            assert fresh.state[number][name].equal(value)
    assert fresh.state[2]["step"].dtype == torch.float32
    assert fresh.state[2]["exp_avg"].equal(state[2]["exp_avg"])


def plan_of(config: TrainConfig) -> Plan:
    count, share, not_so = Choice(1, ""), Choice(1.0, ""), Choice(False, "")
    named = {"model": Choice("m", ""), "device": Choice("cpu", ""), "dtype": Choice("float32", "")}
    counted = dict.fromkeys(("max_length", "batch_size", "micro_batch", "steps", "eval_steps", "recompute"), count)
    return Plan(**named, **counted, packing=not_so, learning_rate=share, lora_alpha=share, compile=not_so)


@pytest.mark.parametrize(("before", "now"), [("adamw", "adamw-8bit"), ("adamw-8bit", "adamw"), (None, "adamw-8bit")])
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path, before: Any, now: Any) -> None:
    """Also one of before there were two, which was of the one in 32 bits."""
    config = TrainConfig(data=("x",), method="lora", optimizer=now)
    plan = plan_of(config)
    run = {**decided(config, plan, "of the data"), "optimizer": before}
    if before is None:
        del run["optimizer"]
    checkpoint = Checkpoint(folder=tmp_path, state={"format": FORMAT, "run": run})
    with pytest.raises(UsageError, match=f"differs in optimizer: {before or 'adamw'} before, {now} now"):
        refuse_other(checkpoint, config, plan, "of the data")
    refuse_other(checkpoint, replace(config, optimizer=before or "adamw"), plan, "of the data")


def test_a_run_that_goes_on_keeps_the_optimizer_that_was_chosen_when_it_began(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        json.dumps({"identity": {}, "config": {"method": "full", "optimizer": "adamw-8bit"}})
    )
    asked = TrainConfig(data=("x",), output=tmp_path)
    session = Session(asked, "train", {}, lambda event: None)
    assert session.as_begun(asked) == (asked, {})
    session.goes_on = session.has_begun = True
    config, begun = session.as_begun(asked)
    assert (config.method, config.optimizer) == ("full", "adamw-8bit")
    assert begun == {name: Choice(getattr(config, name), "as this run began") for name in ("method", "optimizer")}
    config, begun = session.as_begun(replace(asked, optimizer="adamw"))
    assert config.optimizer == "adamw"
    assert "optimizer" not in begun, "it is set in this command"


def test_a_checkpoint_of_before_anything_waited_in_main_memory_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knew how many layers were recomputed, and the same command ended as a bug."""
    asked = TrainConfig(data=("x",), output=tmp_path)
    session = Session(asked, "train", {}, lambda event: None)
    session.has_begun = True
    size = {"examples": 2, "tokens": 40, "packing": True, "dtype": "bfloat16", "recomputed": 3}
    monkeypatch.setattr(checkpoints, "newest_state", lambda _: {"size": size})
    found = session.ways_begun(asked, tmp_path)
    assert {name: choice.value for name, choice in found.items()} == {
        "micro_batch": 2,
        "recompute": 3,
        "offload": False,
    }


@pytest.mark.parametrize("asked", [None, "adamw"])
def test_a_run_of_before_there_were_two_goes_on_with_moments_of_32_bits(tmp_path: Path, asked: Any) -> None:
    """A plan may choose 8 bits now, which its checkpoints refuse; and `--optimizer adamw` was refused as another run."""
    config = TrainConfig(data=("x",), output=tmp_path, optimizer=asked)
    known = {"engine": "auto"} if asked else {}  # which once made another run
    identity = {"command": "train", "data_sha256": "of the data", "data": ["x"], "method": None, **known}
    (tmp_path / "run.json").write_text(json.dumps({"identity": identity, "config": {"method": "lora"}}))
    with running(config, command="train", fingerprint="of the data", say=lambda event: None) as session:
        assert session.goes_on
        assert session.as_begun(config)[0].optimizer == "adamw"


@pytest.mark.parametrize("same", [True, False], ids=["finished", "another"])
def test_a_run_that_is_begun_anew_from_a_checkpoint_elsewhere_has_nothing_of_the_one_that_it_overwrites(
    tmp_path: Path, same: bool
) -> None:
    """It silently had the method, optimizer and engine that were chosen for the old one."""
    config = TrainConfig(data=("x",), output=tmp_path, overwrite=True, resume=str(tmp_path / "elsewhere"))
    chosen = {"method": "qlora", "optimizer": "adamw-8bit"}
    with running(config, command="train", fingerprint="of the data", say=lambda event: None) as session:
        identity = {**session._manifest["identity"], "data_sha256": "of the data" if same else "of others"}
    manifest = {"identity": identity, "config": chosen, "plan": {"engine": {"value": "unsloth"}}, "status": "finished"}
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    with running(config, command="train", fingerprint="of the data", say=lambda event: None) as session:
        assert session.as_begun(config) == (config, {})
        assert session.goes_on, "it was rehearsed where its checkpoint is from"


def test_a_model_that_fits_with_moments_of_8_bits_alone_is_told_to_fit() -> None:
    shape = ModelShape(hidden_size=4096, intermediate_size=11008, num_layers=32, max_positions=512, vocabulary=1000)
    config = TrainConfig(data=("x",), lora_r=64, method="qlora")
    least, most = (
        least_bytes(
            replace(config, optimizer=kind), shape, length=100, method="qlora", dtype="bfloat16", main_bytes=GIB
        )
        for kind in ("adamw-8bit", "adamw")
    )
    free = int((least + most) / 2 / SHARE_FOR_STEP + CUDA_BYTES)
    card = Gpu(name="a card", uuid="1", memory_bytes=free, memory_free_bytes=free, capability=(9, 0))
    machine = Hardware(gpus=(card,), driver="", num_cpus=2, memory_bytes=GIB, platform="Linux x86_64")
    fitting, need = method_that_fits(config, machine, shape, length=100)
    assert (fitting.method, fitting.optimizer, need) == ("qlora", "adamw-8bit", least)


def test_the_manifest_says_which_optimizer_was_chosen(train: Callable[..., Run]) -> None:
    run = train(steps=1, skip_proofs=True)
    manifest = json.loads((run.folder / "run.json").read_text())
    assert manifest["config"]["optimizer"] == manifest["plan"]["optimizer"]["value"] == "adamw"


@pytest.mark.skipif(not four_bit.why_not(), reason="bitsandbytes is installed")
def test_8_bits_without_what_holds_them_are_refused_before_any_work(train: Callable[..., Run]) -> None:
    run = train(optimizer="adamw-8bit")
    assert run.failed.code == 2
    assert "`adamw-8bit` needs the package `bitsandbytes`" in run.failed.message
    assert "backprop[standard]" in run.failed.hint
    assert not run.folder.exists()
