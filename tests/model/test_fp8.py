"""Gradients that go back through frozen feed-forward layers in 8 bits, by torch's own product of two such matrices."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import UNEVEN, Run, went_on

from backprop import events
from backprop.core.plan import Choice

torch = pytest.importorskip("torch")

from backprop.engine.fp8 import by_rows as BY_ROWS  # noqa: E402, N812


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the plan of a CPU take what only GPUs are quick at; its numbers are the same."""
    from backprop.core import plan

    monkeypatch.setattr(plan, "_choose_fp8_backward", lambda *_: plan.Choice(True, "a test"))


def test_rows_are_rounded_by_a_scale_of_their_own() -> None:
    from backprop.engine.fp8 import by_rows

    torch.manual_seed(0)
    matrix = torch.randn(4, 64) * torch.tensor([[1e-6], [1.0], [1e6], [0.0]])
    rounded, scales = by_rows(matrix)
    assert rounded.dtype == torch.float8_e4m3fn
    error = (rounded.float() * scales - matrix).norm(dim=1)
    # Three bits of mantissa: half a step in 16 at most, 2.7 % on the average.
    assert (error <= 0.03 * matrix.norm(dim=1)).all()
    assert (error[:3] > 0.02 * matrix[:3].norm(dim=1)).all()


NOT_PROVED = "gradients go back in 16 bits, which is slower: 8 were not proved in this run"


@pytest.mark.usefixtures("one_thread", "asked")
@pytest.mark.parametrize("options", [{}, {"packing": False, "skip_proofs": True}], ids=["packed", "padded"])
def test_it_is_proved_and_leaves_the_loss_alone(train: Callable[..., Run], options: dict[str, Any]) -> None:
    from backprop.engine import fp8

    run = train(UNEVEN, learning_rate=1e-3, **options)
    proof = next(event for event in run.all(events.Proved) if event.name == "the way back in 8 bits gives the gradient")
    assert proof.ok, proof.found
    assert "6 of 6 layers" in proof.found  # three in each of two
    assert NOT_PROVED not in run.warned
    assert json.loads((run.folder / "run.json").read_text())["result"]["fp8_backward"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "prepare", lambda _: None)  # none of its layers
        plain = train(UNEVEN, learning_rate=1e-3, **options)
    assert NOT_PROVED in plain.warned
    assert not json.loads((plain.folder / "run.json").read_text())["result"]["fp8_backward"]
    assert run.losses[0] == plain.losses[0]
    assert run.losses != plain.losses
    assert run.losses == pytest.approx(plain.losses, rel=1e-3)


@pytest.fixture
def wrong_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the weights of one layer of the decoder be wrong in 8 bits."""
    from backprop.engine import fp8

    real = fp8.prepare

    def wrong_in(number: int) -> None:
        def prepare(model: Any) -> None:
            real(model)
            for layer in fp8._prepared(fp8.decoder_layers(model)[number]):
                layer.scales *= 1.3

        monkeypatch.setattr(fp8, "prepare", prepare)

    return wrong_in


@pytest.mark.usefixtures("one_thread", "asked")
@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_that_is_not_proved_stays_in_16_bits_by_itself(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, wrong_in: Callable[[int], None], number: int
) -> None:
    """One matrix that was too far off left every layer in 16 bits."""
    from backprop.engine import fp8

    real = fp8.prepare
    wrong_in(number)
    run = train(UNEVEN, learning_rate=1e-3)
    (proof,) = [event for event in run.all(events.Proved) if "8 bits" in event.name]
    assert proof.ok
    assert proof.found.startswith("3 of 6 layers; off by ")
    assert proof.found.endswith(f"; layer {number} of the decoder in 16 bits")
    there = f"in layer {number} of the decoder they go back in 16 bits: 8 were not proved there"
    assert f"gradients go back in 8 bits, but {there}" in run.warned
    monkeypatch.setattr(fp8, "prepare", lambda model: (real(model), fp8.undo(model, [number])))
    assert run.losses == train(UNEVEN, learning_rate=1e-3).losses, "the other layer goes back in 8 bits"
    monkeypatch.setattr(fp8, "prepare", real)
    assert run.losses != train(UNEVEN, learning_rate=1e-3).losses


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "asked")
def test_a_run_goes_on_with_the_layers_that_stayed_in_16_bits(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, wrong_in: Callable[[int], None]
) -> None:
    from backprop.engine import fp8

    real = fp8.prepare
    wrong_in(1)
    kept = went_on(train, UNEVEN, step=2)
    whole = train(UNEVEN).losses
    monkeypatch.setattr(fp8, "prepare", real)  # nothing is wrong with it any more
    run = train(UNEVEN, resume=str(kept))
    assert "in layer 1 of the decoder they go back in 16 bits" in run.warned
    assert run.losses == whole[2:]


def coarse(matrix: Any) -> Any:
    rounded, scales = BY_ROWS(matrix)
    return (rounded.float() / 128).round().mul(128).to(torch.float8_e4m3fn), scales


def too_long(matrix: Any) -> Any:
    rounded, scales = BY_ROWS(matrix)
    return rounded, scales * 1.2


def nothing(matrix: Any) -> Any:
    rounded, scales = BY_ROWS(matrix)
    return rounded, scales * torch.nan


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "asked")
@pytest.mark.parametrize("wrong", [coarse, too_long, nothing])
def test_what_does_not_give_the_gradient_is_not_used(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], Any]
) -> None:
    from backprop.engine import fp8

    monkeypatch.setattr(fp8, "by_rows", wrong)
    run = train(UNEVEN)
    assert NOT_PROVED in run.warned
    monkeypatch.setattr(fp8, "prepare", lambda _: None)
    assert run.losses == train(UNEVEN).losses


@pytest.mark.usefixtures("one_thread", "asked")
@pytest.mark.parametrize("message", ["no such kernel", "CUDA error: device-side assert"])
def test_what_cannot_be_computed_is_not_used_and_what_broke_the_gpu_is_told(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    from backprop.engine import fp8

    def fails(*_: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(fp8, "product_in_8_bits", fails)
    run = train(UNEVEN, steps=1)
    if "CUDA" in message:
        assert run.failed.code == 5
        return
    (proof,) = [event for event in run.all(events.Proved) if "8 bits" in event.name]
    assert proof.found == "it cannot be computed here: no such kernel"
    assert NOT_PROVED in run.warned
    assert len(run.losses) == 1


@pytest.mark.usefixtures("one_thread", "asked")
def test_a_memory_that_is_full_in_the_proof_leaves_nothing_behind(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backprop.engine import adapters, fp8

    left: list[bool] = []
    real = fp8.prove

    def full(model: Any, *given: Any) -> Any:
        layer = fp8.decoder_layers(model)[1].mlp.gate_proj

        def fails(_: Any) -> Any:
            raise torch.OutOfMemoryError

        with monkeypatch.context() as patch:
            patch.setattr(layer.base_layer, "forward", fails)
            proof = real(model, *given)
        left.append(layer.together._of is not None or any(one.grad is not None for one in model.parameters()))
        assert isinstance(layer.together, adapters._Together)
        return proof

    monkeypatch.setattr(fp8, "prove", full)
    run = train(UNEVEN, steps=1)
    assert any("too small for the proof" in proof.found for proof in run.all(events.Proved))
    assert left == [False]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "asked")
def test_a_run_goes_on_as_was_decided_when_it_began(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    from backprop.engine import fp8

    monkeypatch.setattr(fp8, "MOST_ROUNDING", 0)
    kept = went_on(train, UNEVEN, step=2)
    whole = train(UNEVEN).losses
    monkeypatch.undo()
    monkeypatch.setattr("backprop.core.plan._choose_fp8_backward", lambda *_: Choice(True, "a test"))
    run = train(UNEVEN, resume=str(kept))
    assert NOT_PROVED in run.warned
    assert run.losses == whole[2:]


def test_layers_are_those_beside_attention(taught: Callable[[str], Path]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

    from backprop.engine import fp8

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    fused = Phi3ForCausalLM(Phi3Config(**sizes, num_hidden_layers=2, vocab_size=90, pad_token_id=0))
    for model, names in (
        (
            AutoModelForCausalLM.from_pretrained(taught("llama-tied").parent / "model"),
            {"gate_proj", "up_proj", "down_proj"},
        ),
        (fused, {"gate_up_proj", "down_proj"}),
    ):
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        fp8.prepare(adapted)
        found = {name.split(".")[-2] for name, module in adapted.named_modules() if hasattr(module, "weight_8")}
        assert found == names
        fp8.undo(adapted)
        assert not any(hasattr(module, "weight_8") for module in adapted.modules())


@pytest.mark.parametrize("options", [{"method": "dora"}, {"pissa": True}, {"objective": "dpo"}])
def test_where_it_is_not_proved_to_work_it_is_refused(train: Callable[..., Run], options: dict[str, Any]) -> None:
    assert "fp8-backward" in train(fp8_backward=True, **options).failed.message


def test_without_such_a_gpu_it_is_refused(train: Callable[..., Run]) -> None:
    failed = train(fp8_backward=True).failed
    assert failed.code == 5
    assert "8.9" in failed.message


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "asked")
def test_a_run_goes_on_to_the_same_bits(train: Callable[..., Run]) -> None:
    went_on(train, UNEVEN, step=2)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "asked")
@pytest.mark.parametrize("most", [0.14, 0.0], ids=["proved", "not proved"])
def test_several_processes_go_back_alike(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, most: float
) -> None:
    from backprop.core import duration
    from backprop.engine import fp8

    monkeypatch.setattr(fp8, "MOST_ROUNDING", most)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found: list[list[float]] = []
    for number in (1, 2):
        monkeypatch.setattr(duration, "choose_gpus", lambda *_, number=number: Choice(number, "a test"))
        run = train(UNEVEN, micro_batch=2)
        assert (NOT_PROVED in run.warned) == (most == 0)
        found.append(run.losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
