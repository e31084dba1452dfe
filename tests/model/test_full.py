"""Training every weight: as an adapter that is as large as the model, with all that holds for adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, UNEVEN, Run, backprop, went_on
from tiny_models import tiny

from backprop import Trainer, events

pytestmark = pytest.mark.model
SHAPES = ("llama-tied", "llama-untied")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, list[events.Event]]]:
    """Give the base, the run directory and what was said of a tiny model, all of whose weights were trained."""
    made: dict[str, tuple[Path, Path, list[events.Event]]] = {}

    def trained(architecture: str) -> tuple[Path, Path, list[events.Event]]:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            base = tiny(architecture, folder / "model")
            (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HERE))
            said: list[events.Event] = []
            trainer = Trainer(str(base), say=said.append, output=folder / "run")
            trainer.train(folder / "data.jsonl", method="full", steps=16, batch_size=4, learning_rate=2e-3)
            made[architecture] = base, folder / "run", said
        return made[architecture]

    return trained


def weights_of(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return dict(model.named_parameters())


@pytest.mark.parametrize("architecture", SHAPES)
def test_every_weight_is_trained_and_plain_peft_gives_them(
    trained: Callable[[str], tuple[Path, Path, list[events.Event]]], architecture: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, run, said = trained(architecture)
    (moved,) = [event for event in said if isinstance(event, events.Proved) and event.name.startswith("the adapter")]
    before = weights_of(base)
    assert moved.ok
    assert moved.found.startswith(f"{len(before)} of {len(before)} trained matrices moved")
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    after = dict(PeftModel.from_pretrained(model, run / "lora").merge_and_unload().named_parameters())
    assert after.keys() == before.keys()
    assert all(not after[name].equal(before[name]) for name in before)
    steps = [event for event in said if isinstance(event, events.Step)]
    assert steps[-1].loss < steps[0].loss / 2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHAPES)
def test_the_file_is_the_model_and_the_checkpoint_loads_by_itself(
    trained: Callable[[str], tuple[Path, Path, list[events.Event]]],
    architecture: str,
    tmp_path: Path,
    one_thread: None,
) -> None:
    _, run, _ = trained(architecture)
    done = backprop("export", run, "-q", "q8_0", "-o", tmp_path / "gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    proofs = json.loads((tmp_path / "gguf" / "verification.json").read_text())
    assert "adapter" in json.dumps(proofs)
    done = backprop("export", run, "--format", "safetensors", "-o", tmp_path / "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "whole" / "safetensors")


def test_what_is_no_adapter_is_refused_where_one_is_needed(
    trained: Callable[[str], tuple[Path, Path, list[events.Event]]], tmp_path: Path, write: Callable[..., Path]
) -> None:
    base, run, _ = trained("llama-tied")
    alone = backprop("export", run, "--format", "lora-gguf", "-o", tmp_path / "out", cwd=tmp_path)
    assert alone.returncode == 7
    assert "trained whole" in alone.stderr
    data = write(HERE)
    merged = backprop("multi-run", "--data", data, "--model", base, "--method", "full", cwd=tmp_path)
    assert merged.returncode == 2
    refined = backprop("train", "--data", data, "--model", base, "--method", "full", "--rslora", cwd=tmp_path)
    assert refined.returncode == 2


def test_it_goes_on_bit_for_bit_and_gates_know_the_base(train: Callable[..., Run], write: Callable[..., Path]) -> None:
    options = {"method": "full", "steps": 4, "learning_rate": 1e-4}
    old = str(write([{"prompt": f"old {n}", "completion": f"answer {n}"} for n in range(9)], "old.jsonl"))
    went_on(train, UNEVEN, step=2, **options)
    gated = train(gate_data=(old,), **options)
    assert not gated.all(events.Failed), gated.failed
    assert [gate.gate for gate in gated.all(events.Gated)] == ["old tasks are not worse"]


def test_preferences_train_every_weight(train: Callable[..., Run]) -> None:
    rows = [{"prompt": f"question {n}", "chosen": "good", "rejected": "bad"} for n in range(16)]
    run = train(rows, method="full", objective="dpo", steps=6, learning_rate=1e-4)
    assert not run.all(events.Failed), run.failed
    assert run.all(events.Step)[-1].accuracy == 1.0
