"""What a dry run shows of a machine with a GPU: here one that is only told of."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import UNEVEN, Run

from backprop import console, events
from backprop.core.hardware import Gpu
from backprop.edges import device

CARD = Gpu(
    name="NVIDIA GeForce RTX 4060",
    uuid="GPU-0",
    memory_bytes=8 * 2**30,
    memory_free_bytes=7 * 2**30,
    capability=(8, 9),
    cores=3072,
    clock_mhz=3105,
)


@pytest.fixture
def shown(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Give the lines of the plan of a dry run on that card."""
    real = device.probe
    monkeypatch.setattr(device, "probe", lambda **options: replace(real(**options), gpus=(CARD,)))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")  # which is left as it is
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def shown(**options: Any) -> list[str]:
        run = train(UNEVEN, dry_run=True, method="lora", rehearse=False, **options)
        assert not run.all(events.Failed), run.failed
        (plan,) = run.all(events.PlanMade)
        assert json.loads(json.dumps(list(plan.to_try))) == list(plan.to_try)
        return console.told(plan).splitlines()

    return shown


def row(lines: list[str], name: str) -> str:
    (found,) = [line for line in lines if line.startswith(f"  {name} ")]
    return " ".join(found.split())


def test_a_dry_run_shows_memory_attention_rows_and_what_is_to_be_tried(shown: Callable[..., list[str]]) -> None:
    lines = shown(steps=200_000)
    assert row(lines, "device").endswith("cuda NVIDIA GeForce RTX 4060")
    assert row(lines, "memory").startswith("memory load 0.")
    assert row(lines, "memory").endswith("GiB, at the fullest")
    assert row(lines, "packing").startswith("packing True rows of up to ")
    assert "attention by torch's kernel for several lengths, or for a batch where long ones are alike" in str(lines)
    assert row(lines, "to try").startswith("to try 8 at once with 0 layers recomputed; ")
    assert row(lines, "to try").endswith(" at once with 0 layers recomputed, before the first step, unless known")


def test_a_short_run_tries_nothing_and_padded_rows_are_attended_as_the_model_does(
    shown: Callable[..., list[str]],
) -> None:
    lines = shown(steps=3, packing=False)
    assert not [line for line in lines if line.startswith("  to try")]
    assert "filled up to the longest at once, attention as the model has it" in row(lines, "packing")
