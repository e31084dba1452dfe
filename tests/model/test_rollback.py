"""`--on-divergence rollback`: back to what was good, and on with half the rate."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Run, plant_in_training

from backprop import events
from backprop.engine import cross_entropy, trainer

pytestmark = pytest.mark.model

OPTIONS: dict[str, Any] = {
    "steps": 8,
    "batch_size": 3,
    "save_steps": 3,
    "on_divergence": "rollback",
    "skip_proofs": True,
}


def diverge(monkeypatch: pytest.MonkeyPatch, *, calls: set[int]) -> None:
    """Make the loss infinite in these passes, counted from 1 over all attempts; each step has one pass."""
    real, count = cross_entropy.sum_of_losses, [0]

    def planted(model: Any, one: Any) -> Any:
        count[0] += 1
        return real(model, one) * (math.inf if count[0] in calls else 1.0)

    plant_in_training(monkeypatch, planted)


@pytest.mark.slow
def test_training_goes_back_to_a_checkpoint_and_on_with_half_the_rate(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(**OPTIONS)
    diverge(monkeypatch, calls={5})
    run = train(**OPTIONS)
    assert not run.all(events.Failed)
    (back,) = run.all(events.RolledBack)
    assert (back.step, back.rate_share) == (3, 0.5)
    assert "at step 5" in back.reason
    planned = [step.learning_rate for step in undisturbed.all(events.Step)]
    rates = [step.learning_rate for step in run.all(events.Step)]
    assert rates == pytest.approx([*planned[:4], *(rate / 2 for rate in planned[3:])])
    assert run.losses[4] == undisturbed.losses[3]  # the same rows and weights, before the smaller update
    manifest = json.loads((run.folder / "run.json").read_text())
    assert manifest["result"]["steps"] == 8
    assert ", 8 steps, " in (run.folder / "report.html").read_text()


@pytest.mark.slow
def test_without_a_checkpoint_it_goes_back_to_the_start(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(**OPTIONS)
    diverge(monkeypatch, calls={3})
    run = train(**OPTIONS)
    assert [back.step for back in run.all(events.RolledBack)] == [0]
    assert run.losses[2] == undisturbed.losses[0]
    assert not run.all(events.Failed)


@pytest.mark.slow
def test_a_checkpoint_that_leads_there_twice_is_left_for_the_one_before(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    diverge(monkeypatch, calls={8, 10})  # step 8, and step 8 again after going back to 6
    run = train(**OPTIONS)
    assert [(back.step, back.rate_share) for back in run.all(events.RolledBack)] == [(6, 0.5), (3, 0.25)]
    assert not run.all(events.Failed)


@pytest.mark.slow
def test_after_three_times_it_is_exit_6(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    diverge(monkeypatch, calls=set(range(2, 100)))
    run = train(**OPTIONS)
    assert run.failed.code == 6
    assert [back.rate_share for back in run.all(events.RolledBack)] == [0.5, 0.25, 0.125]


@pytest.mark.slow
def test_by_default_it_stops(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    diverge(monkeypatch, calls={5})
    run = train(**{**OPTIONS, "on_divergence": "stop"})
    assert run.failed.code == 6
    assert not run.all(events.RolledBack)


@pytest.mark.slow
def test_a_run_that_is_stopped_after_going_back_keeps_its_rate(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**OPTIONS, "overwrite": False, "resume": "auto"}
    real, count = trainer.Watch._count, [0]

    def stop(watch: Any, loss: float) -> None:
        real(watch, loss)
        count[0] += 1
        if count[0] == 8:  # step 7, after 4 steps and going back to 3
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        diverge(patch, calls={5})
        patch.setattr(trainer.Watch, "_count", stop)
        assert train(**given).failed.code == 130
    resumed = train(**given)
    assert [event.step for event in resumed.all(events.Resumed)] == [7]
    whole = train(**{**OPTIONS, "output": resumed.folder.parent / "whole"})
    last = whole.all(events.Step)[-1].learning_rate
    assert resumed.all(events.Step)[-1].learning_rate == pytest.approx(last / 2)
