"""What a step makes smaller: the loss of answers, or of which answers are wanted.

Each loss is one of the whole optimizer step, whatever shares a forward pass: passes give parts of it that add up. trl's
trainers take a mean of means over passes instead, and KTO's distance over one pass; the tests hold these against trl's on
a single pass, where both are the same.
"""

import math
from array import array
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

from backprop.config import TrainConfig
from backprop.core.data.render import Example
from backprop.engine.attention import sent, within_documents
from backprop.engine.batches import (
    PassSize,
    as_pass,
    computing,
    inputs_on,
    num_trained,
    passes,
    rows_of,
)
from backprop.engine.cross_entropy import log_likelihoods, sum_of_losses, surprises, trained_by_document

Pass = Mapping[str, Any]
Totals = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Part:
    """What one pass adds to the loss of a step."""

    loss: Any
    """A scalar tensor."""
    margins: Any = None
    """By how much each answer, or pair, is on its right side, in nats; of shape (D,). None without preferences."""


class Objective(Protocol):
    """A loss over the examples of a step."""

    needs_reference: bool
    """Whether it weighs against what the model said before training."""

    def passes(self, examples: Sequence[Example], size: PassSize) -> list[dict[str, Any]]:
        """Cut the examples of a step into forward passes."""
        ...

    def totals(self, step: Iterable[Pass], moved: Sequence[Any]) -> Totals:
        """Give what each pass must know of the whole step.

        Args:
            moved: What `moved_of` finds of each pass that `is_mismatched`, in their order.
        """
        ...

    def part(self, model: Any, one: Pass, totals: Totals, device: Any) -> Part:
        """Give what a pass adds to the loss of the step; not of one that `is_mismatched`."""
        ...


def is_mismatched(one: Pass) -> bool:
    """Say whether a pass only tells, without a gradient, how far the model has moved from where it was."""
    return "mismatched" in one


def parts_of(objective: Objective, model: Any, step: Iterable[Pass], device: Any) -> Iterator[Part]:
    """Give, pass by pass, what adds up to the loss of the step, which is gone through three times."""
    import torch

    with torch.no_grad():
        moved = [moved_of(model, one, device) for one in step if is_mismatched(one)]
    totals = objective.totals(step, moved)
    for one in step:
        if not is_mismatched(one):
            yield objective.part(model, one, totals, device)


def objective_of(config: TrainConfig, examples: Sequence[Example]) -> Objective:
    """Give what a run over ``examples`` makes smaller."""
    match config.objective:
        case "sft":
            return Supervised()
        case "dpo":
            return DPO(config.beta)
        case "orpo":
            return ORPO(config.beta)
        case "kto":
            wanted = sum(example.desirable for example in examples)
            return KTO(config.beta, *rating_weights(wanted, len(examples) - wanted))


def rating_weights(wanted: int, unwanted: int) -> tuple[float, float]:
    """Let as much weight lie on wanted as on unwanted answers, as eq. 8 of arXiv:2402.01306 asks, by raising the rarer."""
    if not wanted or not unwanted:
        return 1.0, 1.0
    return max(1.0, unwanted / wanted), max(1.0, wanted / unwanted)


class Supervised:
    """Mean negative log-likelihood over all trained tokens of the step, in nats."""

    needs_reference = False

    def passes(self, examples: Sequence[Example], size: PassSize) -> list[dict[str, Any]]:
        """Let every example stand alone."""
        return passes(examples, size)

    def totals(self, step: Iterable[Pass], moved: Sequence[Any]) -> Totals:
        """Count the trained tokens."""
        return {"tokens": sum(map(num_trained, step))}

    def part(self, model: Any, one: Pass, totals: Totals, device: Any) -> Part:
        """Divide the pass's sum by the tokens of the step."""
        return Part(sum_of_losses(model, inputs_on(one, device)) / totals["tokens"])


class _Paired:
    """Passes that hold the two sides of each pair one after the other."""

    def passes(self, examples: Sequence[Example], size: PassSize) -> list[dict[str, Any]]:
        """Keep the sides of a pair together."""
        rows = rows_of([example.sides for example in examples], size)
        return [_with_references([examples[number] for number in row], size) for row in rows]


def _with_references(examples: Sequence[Example], size: PassSize) -> dict[str, Any]:
    import torch

    one = as_pass([side for example in examples for side in example.sides], size)
    references = [value for example in examples for value in example.references]
    return {**one, "references": torch.tensor(references)} if references else one


def moved_of(model: Any, one: Pass, device: Any) -> Any:
    """Give how much likelier each document of a pass has become since before training, in nats; of shape (D,)."""
    one = inputs_on(one, device)
    return log_likelihoods(model, one) - one["references"]


@dataclass(frozen=True)
class DPO(_Paired):
    """Direct preference optimization (arXiv:2305.18290, eq. 7): mean over the pairs of the step."""

    beta: float
    needs_reference = True

    def totals(self, step: Iterable[Pass], moved: Sequence[Any]) -> Totals:
        """Count the pairs."""
        return {"pairs": sum(len(one["references"]) // 2 for one in step)}

    def part(self, model: Any, one: Pass, totals: Totals, device: Any) -> Part:
        """Weigh how much likelier each side has become against the other."""
        import torch

        moved_D = moved_of(model, one, device)
        margins_P = self.beta * (moved_D[0::2] - moved_D[1::2])
        return Part(-torch.nn.functional.logsigmoid(margins_P).sum() / totals["pairs"], margins_P.detach())


@dataclass(frozen=True)
class ORPO(_Paired):
    """Odds ratio preference optimization (arXiv:2403.07691, eq. 6 and 7).

    The loss of the chosen answers is the mean over their trained tokens in the step; what is given is not trained on.
    """

    beta: float
    needs_reference = False

    def totals(self, step: Iterable[Pass], moved: Sequence[Any]) -> Totals:
        """Count the trained tokens of the chosen answers, and the pairs."""
        counts = (trained_by_document(one) for one in step)
        tokens, pairs = zip(*((int(count[0::2].sum()), len(count) // 2) for count in counts), strict=True)
        return {"tokens": sum(tokens), "pairs": sum(pairs)}

    def part(self, model: Any, one: Pass, totals: Totals, device: Any) -> Part:
        """Add to the loss of the chosen answers how their odds stand against those of the rejected."""
        import torch

        likelihoods_D = log_likelihoods(model, inputs_on(one, device))
        mean_D = likelihoods_D / sent(trained_by_document(one), device)
        # Of a token that is certain the odds are infinite.
        log_odds_D = mean_D - torch.log(-torch.expm1(mean_D.clamp(max=-1e-6)))
        margins_P = log_odds_D[0::2] - log_odds_D[1::2]
        odds = -torch.nn.functional.logsigmoid(margins_P).sum() / totals["pairs"]
        return Part(-likelihoods_D[0::2].sum() / totals["tokens"] + self.beta * odds, margins_P.detach())


@dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky optimization (arXiv:2402.01306, eq. 7 and 8): mean over the rated answers of the step.

    How far the model has moved at all is estimated over the whole step, from answers that belong to other prompts.
    """

    beta: float
    weight_wanted: float = 1.0
    weight_unwanted: float = 1.0
    needs_reference = True

    def passes(self, examples: Sequence[Example], size: PassSize) -> list[dict[str, Any]]:
        """Put the mismatched answers, which need no gradient, into passes of their own."""
        import torch

        made: list[dict[str, Any]] = []
        for number, group in enumerate(zip(*(example.sides for example in examples), strict=True)):
            for row in rows_of([(side,) for side in group], size):
                references = torch.tensor([examples[one].references[number] for one in row])
                one = {**as_pass([group[one] for one in row], size), "references": references}
                kind = "mismatched" if number else "desirable"
                made.append({**one, kind: torch.tensor([examples[n].desirable for n in row])})
        return made

    def totals(self, step: Iterable[Pass], moved: Sequence[Any]) -> Totals:
        """Count the rated answers, and estimate how far the model has moved from those that belong to other prompts."""
        import torch

        distance = float(torch.cat(list(moved)).mean().clamp(min=0))
        return {"answers": sum(len(one["desirable"]) for one in step if "desirable" in one), "distance": distance}

    def part(self, model: Any, one: Pass, totals: Totals, device: Any) -> Part:
        """Weigh each answer against how far the model has moved."""
        import torch

        wanted_D = one["desirable"].to(device)
        moved_D = moved_of(model, one, device) - totals["distance"]
        margins_D = self.beta * moved_D * torch.where(wanted_D, 1.0, -1.0)
        weights_D = torch.where(wanted_D, self.weight_wanted, self.weight_unwanted)
        return Part((weights_D * torch.sigmoid(-margins_D)).sum() / totals["answers"], margins_D.detach())


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A loss over a set of examples."""

    loss: float
    accuracy: float | None = None
    """Share of pairs, or of rated answers, that are on their right side."""
    margin: float | None = None
    """By how much on average, in nats."""


# Examples whose passes lie in memory together.
MEASURED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class _InTurn:
    """The passes of any number of examples, made anew each time they are gone through."""

    objective: Objective
    examples: Sequence[Example]
    size: PassSize

    def __iter__(self) -> Iterator[Pass]:
        for start in range(0, len(self.examples), MEASURED_AT_ONCE):
            yield from self.objective.passes(tuple(self.examples[start : start + MEASURED_AT_ONCE]), self.size)


def measure(model: Any, examples: Sequence[Example], size: PassSize, objective: Objective) -> Measured:
    """Give the loss of ``examples``, as if they were one step."""
    total, margins = 0.0, array("d")
    with _looking(model, size) as device:
        for part in parts_of(objective, model, _InTurn(objective, examples, size), device):
            total += float(part.loss)
            margins.extend(() if part.margins is None else part.margins.tolist())
    if not margins:
        return Measured(loss=total)
    return Measured(loss=total, accuracy=accuracy_of(margins), margin=math.fsum(margins) / len(margins))


def exact_match(model: Any, examples: Sequence[Example], size: PassSize) -> float:
    """Give the share of examples whose answers a greedy model gives word for word, each of their turns after the true ones."""
    found = 0
    with _looking(model, size) as device:
        for one in passes(examples, size):
            found += int((surprises(model, inputs_on(one, device)) == 0).sum())
    return found / len(examples)


def accuracy_of(margins: Sequence[float]) -> float:
    """Give the share that is on its right side; what is on neither, as all are before training, counts half."""
    return sum((margin > 0) + (margin == 0) / 2 for margin in margins) / len(margins)


def with_references(model: Any, examples: Sequence[Example], size: PassSize) -> tuple[Example, ...]:
    """Write beside each example how likely the model finds its sides, as it is now."""
    found: dict[int, tuple[float, ...]] = {}
    with _looking(model, size) as device:
        for row in rows_of([example.sides for example in examples], size):
            one = as_pass([side for number in row for side in examples[number].sides], size)
            values = iter(log_likelihoods(model, inputs_on(one, device)).tolist())
            found |= {number: tuple(next(values) for _ in examples[number].sides) for number in row}
    return tuple(replace(example, references=found[number]) for number, example in enumerate(examples))


@contextmanager
def _looking(model: Any, size: PassSize) -> Generator[Any]:
    """Let the model compute as in training, but for dropout and gradients; gives its device."""
    import torch

    was_training = bool(model.training)
    model.eval()
    documents = within_documents(model) if size.packing else nullcontext()
    try:
        with torch.no_grad(), documents, computing(model, size.dtype):
            yield next(model.parameters()).device
    finally:
        model.train(was_training)
