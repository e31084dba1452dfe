"""Which engine a run has, decided from facts alone."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from backprop.config import TrainConfig, beyond_unsloth
from backprop.core import engines
from backprop.core.duration import plan_and_seconds
from backprop.core.hardware import Gpu, Hardware
from backprop.core.memory import ModelShape
from backprop.core.plan import Choice, DataShape, Plan
from backprop.errors import BackpropError, HardwareError, ModelError, PackageError
from backprop.presets import GIB

CARD = Gpu(name="a GPU", uuid="1", memory_bytes=80 * GIB, memory_free_bytes=80 * GIB, capability=(9, 0))
ONE = Hardware(gpus=(CARD,), driver="580", num_cpus=2, memory_bytes=64 * GIB, platform="Linux x86_64")
LLAMA = ModelShape(
    hidden_size=2048, intermediate_size=8192, num_layers=16, max_positions=8192, vocabulary=49152, family="llama"
)
LONG = 2_000_000


def planned(
    *, hardware: Hardware = ONE, shape: ModelShape = LLAMA, steps: int = LONG, unsloth: bool = True, **options: Any
) -> Plan:
    config = TrainConfig(data=("x",), **{"method": "lora", "steps": steps, "batch_size": 8, **options})
    data = DataShape(num_examples=100, num_tokens=50_000)
    known = {"model": Choice("m", ""), "max_length": Choice(500, "")}
    return plan_and_seconds(config, hardware, shape, data, **known, unsloth=unsloth)[0]


@pytest.mark.parametrize("options", [{}, {"method": "qlora", "dequantize": False}])
def test_a_long_run_tries_both_where_unsloth_is_installed(options: dict[str, Any]) -> None:
    plan = planned(**options)
    assert plan.try_engines
    assert plan.engine.value == "torch"
    assert plan.engine.reason.endswith("min are estimated: unless unsloth, tried beside it first, is faster")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"unsloth": False}, "unsloth is not installed"),
        ({"steps": 100}, "1 min are estimated: not worth trying unsloth beside it"),
        ({"engine": "torch"}, "set by `--engine`"),
        ({"method": "dora"}, "unsloth does not do `--method dora`"),
        ({"method": "full"}, "unsloth does not do `--method full`"),
        ({"objective": "kto"}, "unsloth does not do `--objective kto`"),
        ({"deterministic": True}, "unsloth does not do `--deterministic`"),
        ({"fp8_backward": True}, "unsloth does not do `--fp8-backward`"),
        ({"pissa": True}, "unsloth does not do `--pissa`"),
        ({"lora_dropout": 0.1}, "unsloth does not do `--lora-dropout`"),
        ({"trust_remote_code": True}, "unsloth does not do `--trust-remote-code`"),
        ({"method": "qlora"}, "unsloth does not do `--dequantize`"),  # there is room for 16 bits here
        (
            {"shape": replace(LLAMA, family="gemma3_text")},
            "unsloth has no kernels that were tried for models of the kind",
        ),
        ({"hardware": replace(ONE, gpus=())}, "unsloth needs an NVIDIA GPU, and none was found"),
        ({"hardware": replace(ONE, gpus=(CARD, CARD))}, "unsloth trains on one GPU, and 2 are visible"),
        ({"hardware": replace(ONE, gpus=(replace(CARD, capability=(7, 5)),))}, "unsloth is used in bfloat16 only"),
        ({"hardware": replace(ONE, platform="Windows AMD64")}, "unsloth was tried on Linux only"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, dict) else "",
)
def test_else_it_is_torch_with_the_reason(options: dict[str, Any], reason: str) -> None:
    plan = planned(**options)
    assert not plan.try_engines
    assert plan.engine.value == "torch"
    assert plan.engine.reason.startswith(reason)


@pytest.mark.parametrize("steps", [100, LONG])
def test_where_nothing_fits_it_is_not_time_that_decides(steps: int) -> None:
    """The reason was that so many minutes are not worth trying unsloth."""
    small = replace(CARD, memory_bytes=2 * GIB, memory_free_bytes=2 * GIB)
    plan = planned(hardware=replace(ONE, gpus=(small,)), steps=steps)
    assert not plan.try_engines
    assert plan.engine.value == "torch"
    assert re.fullmatch(
        r"\d\.\d GiB are estimated at least, and there is room for 1\.5: nothing to try unsloth with",
        plan.engine.reason,
    )


def test_what_is_asked_for_is_taken_and_compiles_no_layer_of_ours() -> None:
    plan = planned(engine="unsloth", compile=True)
    assert plan.engine == Choice("unsloth", "set by `--engine`")
    assert not plan.try_engines
    assert plan.compile.value
    assert not plan.compiles_layers
    assert planned(engine="torch", compile=True).compiles_layers


@pytest.mark.parametrize(
    ("options", "kind", "hint"),
    [
        ({"unsloth": False}, PackageError, "pip install 'backprop[unsloth]'"),
        ({"hardware": replace(ONE, gpus=())}, HardwareError, "leave out `--engine`"),
        (
            {"hardware": replace(ONE, gpus=(CARD, CARD))},
            HardwareError,
            "set `CUDA_VISIBLE_DEVICES=0`, or leave out `--engine`",
        ),
        ({"shape": replace(LLAMA, family="phi3")}, ModelError, "leave out `--engine`; there are some for llama"),
    ],
    ids=["package", "no GPU", "two GPUs", "family"],
)
def test_what_is_asked_for_and_cannot_be_is_an_error(
    options: dict[str, Any], kind: type[BackpropError], hint: str
) -> None:
    with pytest.raises(kind) as raised:
        planned(engine="unsloth", **options)
    assert (raised.value.hint or "").startswith(hint)


def test_plain_lora_and_qlora_are_within_what_it_does() -> None:
    for method in (None, "lora", "qlora"):
        config = TrainConfig(data=("x",), engine="unsloth", method=method, lora_plus=16, rslora=True)
        assert beyond_unsloth(config) == ""


def test_nothing_that_is_not_a_number_passes_the_checks() -> None:
    good = engines.Raced(tokens_per_second=100, loss=2.0, proved=True)
    fast = replace(good, tokens_per_second=200)
    assert engines.faster({"torch": good, "unsloth": fast}, apart=0.05).value == "unsloth"
    for raced, apart in ((fast, math.nan), (fast, math.inf), (replace(fast, loss=math.nan), 0.0)):
        assert engines.faster({"torch": good, "unsloth": raced}, apart=apart).value == "torch"
