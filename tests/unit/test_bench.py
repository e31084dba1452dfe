"""Which parts of the benchmark run where: what they measure is in docs/benchmarks.md."""

import subprocess
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from backprop.edges import device, hub


@pytest.fixture
def bench() -> ModuleType:
    loader = SourceFileLoader("bench", str(ROOT / "scripts" / "bench"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("gpus", "ran"),
    [((), ["train-cpu", "size"]), (("a GPU",), ["train-steps", "train-chat", "size"])],
    ids=["CPU", "GPU"],
)
def test_training_is_measured_on_what_there_is_and_each_part_is_timed(
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpus: tuple[str, ...],
    ran: list[str],
) -> None:
    monkeypatch.setattr(device, "probe", lambda: SimpleNamespace(gpus=gpus))
    found: list[str] = []
    for name in list(bench.PARTS):
        monkeypatch.setitem(bench.PARTS, name, lambda name=name: found.append(name))
    bench.main(["train", "size"])
    assert found == ran
    told = capsys.readouterr().out
    assert all(f"{part} took 0 s" in told for part in ran)
    with pytest.raises(SystemExit, match="usage: scripts/bench"):
        bench.main(["trian"])


def test_the_parts_for_a_gpu_name_modes_and_arms_that_there_are(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: ran.append(argv[1:]))
    monkeypatch.setenv("BACKPROP_BENCH_SHAPE", "1.5b")
    monkeypatch.setenv("BACKPROP_BENCH_LENGTH", "8192")
    bench.train_steps()
    bench.train_chat()
    steps, chat = ran
    assert steps[1:5] == ["--shape", "1.5B", "--length", "8192"]
    assert steps[5:8] == list(bench.STEP_MODES)
    modes = (ROOT / "scripts" / "bench-train").read_text()
    assert all(f'    "{mode}": (' in modes for mode in (*bench.STEP_MODES, *bench.PEER_MODES))
    assert [argv[0].rsplit("/", 1)[1] for argv in ran] == ["bench-train", "bench-chat"]
    assert chat[1:] == ["--shape", "1.5B", "backprop"]


def test_no_arm_of_the_comparison_on_a_cpu_sees_a_gpu(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU, backprop trained on it, and its peers on the CPU."""
    seen: list[Mapping[str, str]] = []
    line = {"event": "step", "loss": 1.0, "seconds": 1.0, "tokens_per_second": 1.0}

    def lines_of(_: Any, **environment: str) -> list[Any]:
        seen.append(environment)
        return [line] * (bench.WARM_UP + 1)

    monkeypatch.setattr(bench, "lines_of", lines_of)
    monkeypatch.setattr(bench, "TRL", "a folder")
    monkeypatch.setattr(hub, "find_model", lambda *_, **__: SimpleNamespace(path="m"))
    bench.train_cpu()
    assert len(seen) == 3 * bench.ROUNDS
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen} == {""}
