"""Starting from singular vectors: the base loses them while it is trained, and what is delivered fits the whole base."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import UNEVEN, Run, went_on

from backprop import events
from backprop.config import TrainConfig
from backprop.core.data.judge import judge
from backprop.core.data.render import encode_all
from backprop.core.data.shapes import Row
from backprop.engine import load
from backprop.engine.batches import PassSize
from backprop.engine.objectives import Supervised, measure
from backprop.errors import UsageError

pytestmark = pytest.mark.model


def loss_of(model: Any, tokenizer: load.HfTokenizer, rows: Sequence[Any]) -> float:
    judged = judge([Row(place="", value=row) for row in rows])
    examples = encode_all(judged.conversations, tokenizer, loss_on="assistant").examples
    return measure(model, examples, PassSize(examples=8, tokens=512, packing=False), Supervised()).loss


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_delivered_fits_the_whole_base(
    train: Callable[..., Run], write: Callable[..., Path], tiny_model: Path, rslora: bool
) -> None:
    """Plain PEFT gets the losses that the run measured while the singular vectors were out of the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    held_out = UNEVEN[:6]
    data = (str(write(held_out, "held-out.jsonl")),)
    run = train(pissa=True, rslora=rslora, steps=4, learning_rate=1e-3, eval_data=data)
    assert not run.all(events.Failed), run.failed
    first, *_, last = run.all(events.Eval)
    assert last.loss < first.loss
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = load.load_tokenizer(str(tiny_model), trust_remote_code=False)
    assert loss_of(base, tokenizer, held_out) == pytest.approx(first.loss, rel=1e-4)
    adapted = PeftModel.from_pretrained(base, run.folder / "lora")
    assert loss_of(adapted, tokenizer, held_out) == pytest.approx(last.loss, rel=1e-4)
    settings = json.loads((run.folder / "lora" / "adapter_config.json").read_text())
    assert (settings["r"], settings["init_lora_weights"]) == (8, True)


def test_the_start_takes_the_largest_directions_out_of_the_base_and_gives_them_back(tiny_model: Path) -> None:
    import torch

    base = load.load_base(str(tiny_model), dtype="float32", device="cpu")
    whole: Any = base.get_parameter("model.layers.0.mlp.up_proj.weight").detach().clone()
    ids = torch.arange(20)[None]
    logits = base(input_ids=ids).logits.detach()
    plan: Any = SimpleNamespace(engine=SimpleNamespace(value="torch"), lora_alpha=SimpleNamespace(value=8.0))
    model = load.add_adapter(base, TrainConfig(data=("x",), pissa=True, lora_r=4), plan)
    left: Any = model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    before, after = torch.linalg.svdvals(whole), torch.linalg.svdvals(left)
    assert torch.allclose(after[: len(before) - 4], before[4:], rtol=0.05)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.data += 0.1
    assert not torch.allclose(model(input_ids=ids).logits, logits, atol=1e-2)
    with load.as_before_training(model):
        assert torch.allclose(model(input_ids=ids).logits, logits, atol=1e-4)
    assert not torch.allclose(model(input_ids=ids).logits, logits, atol=1e-2)


def test_it_goes_on_bit_for_bit_and_from_no_other_start(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"pissa": True, "steps": 4, "learning_rate": 1e-3}
    kept = went_on(train, UNEVEN, step=2, **options)
    monkeypatch.setattr(load, "PISSA", "pissa_niter_1")
    other = train(**options, resume=str(kept))
    assert other.failed.code == 2
    assert "other singular vectors" in other.failed.message


@pytest.mark.parametrize("method", ["qlora", "dora", "full"])
def test_other_methods_begin_otherwise(method: str) -> None:
    with pytest.raises(UsageError):
        TrainConfig(data=("x",), pissa=True, method=method)  # type: ignore[arg-type]
