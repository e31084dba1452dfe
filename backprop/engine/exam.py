"""What a model knows before training and after it: losses and answers, compared."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from backprop.core.data.render import Example
from backprop.core.gate import RowLosses
from backprop.engine import proofs
from backprop.engine.batches import PassSize, computing, inputs_on, num_trained, padded
from backprop.engine.cross_entropy import sum_of_losses
from backprop.engine.load import HfTokenizer
from backprop.engine.objectives import Measured, Objective, measure
from backprop.events import JSON, Proved, Sampled, Sink, Warned

Prove = Callable[[Callable[[], Proved]], Proved]
"""Time a proof, tell its result, and give it."""

# Examples of the training data that stand in where nothing is held out.
MOST_EXAMINED = 16


class Exam:
    """Losses and answers before training, to compare with those after it.

    On held-out examples; without any, on some of those that are trained.

    Args:
        before: What `to_json` gave before training, for a model that is trained already.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: HfTokenizer,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        *,
        objective: Objective,
        size: PassSize,
        proofs_too: bool,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._held_out = model, tokenizer, held_out
        self._objective, self._size = objective, size
        self._proofs_too = proofs_too
        self._seen = examples[:MOST_EXAMINED] if proofs_too and not held_out else ()
        self._asked = proofs.askable(held_out or self._seen) if proofs_too else []
        self._seconds_before = {"loss": 0.0, "answers": 0.0}
        if before is None:
            started = time.monotonic()
            self.before = self.measure()
            self._seen_before = self._measure_seen()
            measured = time.monotonic()
            self._answers_before = self._answers()
            self._seconds_before = {"loss": measured - started, "answers": time.monotonic() - measured}
        else:
            self.before, self._seen_before = (
                Measured(**before[name]) if before[name] else None for name in ("held_out", "seen")
            )
            self._answers_before = proofs.Asked(**before["answers"]) if before["answers"] else None

    def to_json(self) -> dict[str, JSON]:
        """Give what was found before training."""
        answers = asdict(self._answers_before) if self._answers_before else None
        held_out, seen = (asdict(one) if one else None for one in (self.before, self._seen_before))
        return {"held_out": held_out, "seen": seen, "answers": answers}

    def measure(self) -> Measured | None:
        """Give the loss on the held-out examples; None without any."""
        return measure(self._model, self._held_out, self._size, self._objective) if self._held_out else None

    def _measure_seen(self) -> Measured | None:
        return measure(self._model, self._seen, self._size, self._objective) if self._seen else None

    def _answers(self) -> proofs.Asked | None:
        if not self._asked:
            return None
        with computing(self._model, self._size.dtype):
            return proofs.ask(self._model, self._tokenizer, self._asked)

    def judge(
        self, measured_after: Measured | None, *, last_loss: float, prove: Prove, say: Sink, run: int
    ) -> tuple[Proved, ...]:
        """Prove what was learnt; give what does not hold.

        Args:
            measured_after: On the held-out examples; None without any.
            last_loss: Of the last training step.
        """
        if not self._proofs_too:
            return ()
        made: list[Proved] = []
        before = self.before if self._held_out else self._seen_before

        def learnt() -> Proved:
            after = self._measure_seen() if self._seen else measured_after
            assert before is not None
            assert after is not None
            preferences = after.accuracy is not None
            held_out = bool(self._held_out)
            proof = proofs.prove_learnt(before.loss, after.loss, held_out=held_out, preferences=preferences)
            return replace(proof, seconds=self._seconds_before["loss"])

        if before is not None:
            made.append(prove(learnt))
        started = time.monotonic()
        asked_before, asked_after = self._answers_before, self._answers()
        if asked_before and asked_after:
            seconds = self._seconds_before["answers"] + time.monotonic() - started
            for prompt, old, new in zip(asked_after.questions, asked_before.answers, asked_after.answers, strict=True):
                say(Sampled(prompt=prompt, before=old, after=new, run=run))
            stopping = proofs.prove_stopping(asked_before, asked_after, loss=last_loss)
            if stopping is None:
                say(Warned(message="too little is learnt to tell whether answers will stop by themselves: none did"))
            else:
                made.append(prove(lambda: replace(stopping, seconds=seconds)))
        return tuple(proof for proof in made if not proof.ok)


def row_losses(model: Any, examples: Sequence[Example], *, dtype: str) -> RowLosses:
    """Give for each example the summed negative log-likelihood of its trained tokens, in nats, and their number."""
    import torch

    found = RowLosses()
    was_training = bool(model.training)
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad(), computing(model, dtype):
        for example in examples:
            one = padded([example])
            found.append((float(sum_of_losses(model, inputs_on(one, device))), num_trained(one)))
    model.train(was_training)
    return found
