"""Gradients that go back through frozen feed-forward layers in 8 bits, by torch's own product of two such matrices."""

from collections.abc import Callable
from typing import Any

import pytest
from conftest import UNEVEN, Run, went_on

from backprop import events

torch = pytest.importorskip("torch")


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
    # Three bits of mantissa: half a step in 16 at most, less on the average.
    assert (error <= 0.04 * matrix.norm(dim=1)).all()
    assert (error[:3] > 0.01 * matrix[:3].norm(dim=1)).all()


@pytest.mark.usefixtures("one_thread", "asked")
@pytest.mark.parametrize("packing", [True, False])
def test_it_is_proved_trains_as_16_bits_do_and_leaves_the_loss_alone(train: Callable[..., Run], packing: bool) -> None:
    from backprop.engine import fp8

    run = train(UNEVEN, packing=packing, learning_rate=1e-3)
    proof = next(event for event in run.all(events.Proved) if event.name == "the way back in 8 bits gives the gradient")
    assert proof.ok, proof.found
    assert not any("16 bits" in event.message for event in run.all(events.Warned))
    assert train(UNEVEN, packing=packing, learning_rate=1e-3, skip_proofs=True).losses == run.losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "prepare", lambda _: None)  # none of its layers
        plain = train(UNEVEN, packing=packing, learning_rate=1e-3)
    assert run.losses[0] == plain.losses[0]
    assert run.losses != plain.losses
    assert run.losses == pytest.approx(plain.losses, rel=1e-3)
    told = [event.message for event in plain.all(events.Warned) if "16 bits" in event.message]
    assert told == ["gradients go back in 16 bits, which is slower: no feed-forward layer of this model can go back so"]


@pytest.mark.usefixtures("one_thread", "asked")
def test_what_does_not_give_the_gradient_is_not_used(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backprop.engine import fp8

    def coarse(matrix: Any) -> Any:
        rounded, scales = honest(matrix)
        return (rounded.float() / 64).round().mul(64).to(fp8.FP8), scales

    plain_by_rows, honest = fp8.by_rows, fp8.by_rows
    monkeypatch.setattr(fp8, "by_rows", coarse)
    run = train(UNEVEN)
    assert any("gradients go back in 16 bits" in event.message for event in run.all(events.Warned))
    monkeypatch.setattr(fp8, "by_rows", plain_by_rows)
    monkeypatch.setattr(fp8, "prepare", lambda _: None)
    assert run.losses == train(UNEVEN).losses


@pytest.mark.parametrize("options", [{"method": "dora"}, {"pissa": True}, {"objective": "dpo"}])
def test_where_it_is_not_proved_to_work_it_is_refused(train: Callable[..., Run], options: dict[str, Any]) -> None:
    assert "fp8-backward" in train(fp8_backward=True, **options).failed.message


def test_without_such_a_gpu_it_is_refused(train: Callable[..., Run]) -> None:
    failed = train(fp8_backward=True).failed
    assert failed.code == 5
    assert "8.9" in failed.message


@pytest.mark.usefixtures("one_thread", "asked")
def test_a_run_goes_on_to_the_same_bits(train: Callable[..., Run]) -> None:
    went_on(train, UNEVEN, step=2)
