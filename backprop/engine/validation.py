"""Validation while training: the held-out loss at intervals, the best adapter so far, and when to stop."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from backprop.engine.load import adapter_state, set_adapter_state
from backprop.engine.objectives import Measured
from backprop.events import JSON, Eval, Phase, Sink


class Validation:
    """The held-out losses of a run. Without held-out examples it does nothing.

    Args:
        patience: Evaluations without a better loss after which training should stop; None to go on, and to deliver the
            last adapter rather than the best.
    """

    def __init__(
        self, model: Any, measure: Callable[[], Measured | None], *, patience: int | None, say: Sink, run: int
    ) -> None:
        self._model, self._measure, self._patience, self._say, self._run = model, measure, patience, say, run
        self._best: tuple[Measured, int] | None = None
        self._waited = 0
        self.best: dict[str, Any] = {}
        """The adapter with the lowest loss so far; empty if none is kept."""
        self.last: tuple[int, Measured] | None = None
        """Step and figures of the last evaluation."""
        self.delivered_step: int | None = None
        """The step whose adapter `finish` put back; None if it is the last."""

    def evaluate(self, step: int) -> bool:
        """Measure and tell the loss after ``step``, and say whether training should stop."""
        found = self._measure()
        if found is None:
            return False
        self.last = (step, found)
        self._say(told(found, step=step, run=self._run))
        if self._patience is None:
            return False
        if self._best is None or found.loss < self._best[0].loss or math.isnan(self._best[0].loss):
            self._best, self._waited, self.best = (found, step), 0, adapter_state(self._model)
        else:
            self._waited += 1
        return self._waited >= self._patience

    def evaluated(self, step: int) -> bool:
        """Say whether the loss after ``step`` is known."""
        return self.last is not None and self.last[0] == step

    def to_json(self) -> dict[str, JSON]:
        """Give what `restore` takes, but for the adapter."""
        best = self._best and (asdict(self._best[0]), self._best[1])
        last = self.last and (self.last[0], asdict(self.last[1]))
        return {"best": best, "waited": self._waited, "last": last}

    def restore(self, state: Mapping[str, Any], best: dict[str, Any]) -> None:
        """Go on from where another stood."""
        self._best = (Measured(**state["best"][0]), int(state["best"][1])) if state["best"] else None
        self.last = (int(state["last"][0]), Measured(**state["last"][1])) if state["last"] else None
        self._waited, self.best = int(state["waited"]), best

    def finish(self, step: int) -> Measured | None:
        """Evaluate after the last step, put the best adapter back if another was better, and give its figures."""
        if not self.evaluated(step):
            self.evaluate(step)
        if self.last is None:
            return None
        if self._best is not None and self._best[1] != step:
            found, best_step = self._best
            set_adapter_state(self._model, self.best)
            self.delivered_step = best_step
            self._say(
                Phase(
                    name=f"delivering the adapter after step {best_step}: its held-out loss {found.loss:.3f} is the best"
                )
            )
            return found
        return self.last[1]


def told(found: Measured, *, step: int, run: int) -> Eval:
    """Say what was measured after ``step``."""
    return Eval(step=step, loss=found.loss, accuracy=found.accuracy, margin=found.margin, run=run)
