"""The whole of doctor as a user calls it, on the machine that is here, and what it says of a model and data."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import HERE, backprop, backprop_process

from backprop.config import DoctorConfig
from backprop.core.checkup import LEAST_DISK_BYTES
from backprop.core.hardware import Gpu, Hardware
from backprop.edges import device
from backprop.engine import attention, trials
from backprop.errors import DataError, HardwareError
from backprop.verbs.doctor import try_all
from backprop.verbs.fits import data_told, fit_told

pytestmark = pytest.mark.model


def checks_of(printed: str) -> dict[str, dict[str, object]]:
    return {one["name"]: one for one in map(json.loads, printed.splitlines()) if one["event"] == "check"}


def test_this_machine_is_told_and_what_it_runs_is_right(tmp_path: Path) -> None:
    done = backprop_process("doctor", "--json", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    found = checks_of(done.stdout)
    for name in ("python", "machine", "torch", "torch product", "packed attention", "model"):
        assert found[name]["ok"], found[name]
    roomy = shutil.disk_usage(tmp_path).free >= LEAST_DISK_BYTES
    assert found["disk for output"]["ok"] == roomy, "as it is: the machine that tests may be short of disk"
    assert "on cpu" in str(found["torch product"]["found"])
    assert list(tmp_path.iterdir()) == [], "it leaves nothing"


def test_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention._one_by_one
    monkeypatch.setattr(attention, "_one_by_one", lambda *these: 1.05 * real(*these))
    with pytest.raises(HardwareError, match="attention on packed rows within 2%"):
        trials.try_attention(trials.Machine())


def test_several_processes_add_up() -> None:
    (finding,), _ = try_all(["several gpus"], trials.Machine(gpus=["one", "two"]))
    assert finding.found == "2 of them add up rightly"


def test_a_model_and_data_are_told_from_the_plan(tiny_model: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    # Weights are not needed: these are damaged.
    (tiny_model.parent / "weightless").mkdir(exist_ok=True)
    for path in tiny_model.iterdir():
        content = b"" if path.suffix == ".safetensors" else path.read_bytes()
        (tiny_model.parent / "weightless" / path.name).write_bytes(content)
    model = tiny_model.parent / "weightless"
    done = backprop("doctor", "--model", model, "--data", write(HERE * 4), "--json", cwd=tmp_path)
    found = checks_of(done.stdout)
    told = str(found["model"]["found"])
    assert re.search(r"fits: lora in float32 on cpu, \d+ examples at once", told)
    assert re.search(r"\d+ steps on 24 rows take roughly \d+ s, at [\d,]+ tokens/s", told)
    assert found["data"]["found"] == "24 rows that can be trained on: 24 messages"
    without = fit_told(DoctorConfig(model=str(model)), device.probe())
    assert "1,000 rows of 500 tokens, since no `--data` is given" in without


@pytest.mark.parametrize(
    ("free_gib", "told"),
    [(24, "fits: lora in bfloat16 on cuda"), (6, "fits: qlora in bfloat16 on cuda"), (2, "")],
)
def test_a_model_of_three_billion_fits_as_its_card_lets_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: int, told: str
) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 8, "head_dim": 128}))
    (folder / "model.safetensors").write_bytes(b"")
    card = Gpu(
        name="a card", uuid="GPU-0", memory_bytes=24 * 2**30, memory_free_bytes=free_gib * 2**30, capability=(8, 9)
    )
    machine = Hardware(gpus=(card,), driver="580", num_cpus=2, memory_bytes=2**34, platform="Linux x86_64")
    monkeypatch.setattr(device, "probe", lambda: machine)
    asked = DoctorConfig(model=str(folder))
    if told:
        assert told in fit_told(asked, machine)
    else:
        with pytest.raises(HardwareError, match=r"even in 4 bits, and .* are free"):
            fit_told(asked, machine)


def test_a_model_that_is_none_is_exit_4_and_data_that_is_none_3(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backprop.verbs.doctor.LEAST_DISK_BYTES", 0)
    done = backprop("doctor", "--model", "no-such-preset", "--data", write([{"a": 1}]), "--json", cwd=tmp_path)
    found = checks_of(done.stdout)
    assert not found["model"]["ok"]
    assert not found["data"]["ok"]
    assert done.returncode == 4, "the code of the first that is wrong"
    with pytest.raises(DataError):
        data_told((str(tmp_path / "data.jsonl"),))


def test_what_is_tried_without_a_gpu_loads_no_compiler() -> None:
    """It takes most of a second."""
    code = "import sys\nfrom backprop.engine import trials\ntrials.try_product(trials.Machine())\ntrials.try_attention(trials.Machine())\n"
    loaded = "print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-c", code + loaded]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
