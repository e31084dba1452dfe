"""What the caller demands of a finished training: figures within bounds, and old tasks that did not suffer."""

from collections.abc import Mapping, Sequence
from typing import Any

from backprop.config import TrainConfig
from backprop.core import gate
from backprop.core.data.formats import Conversation, parse_columns
from backprop.core.data.judge import judge
from backprop.core.data.preferences import JUDGED
from backprop.core.data.render import Example
from backprop.edges import spill
from backprop.errors import DataError, TrainingError, UsageError
from backprop.events import JSON, Gated, Phase, Sink
from backprop.verbs.prepare import Prepared, rows_of


def read_gates(config: TrainConfig) -> Sequence[Conversation]:
    """Read what `--gate` and `--gate-data` say, before any work.

    Raises:
        UsageError: If a gate cannot be read.
        DataError: If the rows cannot.
    """
    for text in config.gate:
        gate.parse_gate(text)
    if not config.gate_data:
        return ()
    rows = (row for source in config.gate_data for row in rows_of(source, offline=config.offline))
    columns = {role: name for role, name in parse_columns(config.column).items() if role not in JUDGED}
    try:
        return judge(rows, columns, keep=spill.conversations()).conversations
    except DataError as error:
        hint = error.hint if config.objective == "sft" else "old tasks are compared by rows with answers: give such"
        raise DataError(f"gate data: {error.message}", hint=hint) from error


def refuse_gates_without_figures(config: TrainConfig, *, held_out: bool) -> None:
    """Refuse a gate on what will not be measured, before any work.

    Raises:
        UsageError: Naming it.
    """
    for text in config.gate:
        metric = gate.parse_gate(text).metric
        if metric == ("eval_accuracy" if config.objective == "sft" else "perplexity"):
            raise UsageError(
                f"`--gate {text}` cannot be measured with `--objective {config.objective}`",
                hint="`eval_accuracy` is of preferences, `perplexity` of answers",
            )
        if gate.parse_gate(text).needs_held_out and not held_out:
            raise UsageError(
                f"`--gate {text}` needs held-out rows, and there are none",
                hint="add `--eval-data held-out.jsonl` or `--eval-fraction 0.1`",
            )


def check_gates(config: TrainConfig, prepared: Prepared, model: Any, figures: Mapping[str, JSON], *, say: Sink) -> None:
    """Hold a trained model to `--gate` and `--gate-data`.

    Args:
        figures: What training measured, by the names that a gate may use.

    Raises:
        TrainingError: Naming every gate that is not met.
    """
    numbers = {
        name: float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    gates: list[Gated] = []
    for text in config.gate:
        ok, found = gate.parse_gate(text).judge(numbers)
        gates.append(Gated(gate=text, ok=ok, found=found))
    if prepared.gate_rows:
        say(Phase(name="comparing with the base model"))
        ok, found = gate.judge_old(_interval(model, prepared.gate_rows, prepared))
        gates.append(Gated(gate="old tasks are not worse", ok=ok, found=found))
        if prepared.held_out and config.objective == "sft":  # preferences may make a wanted answer less likely
            ok, found = gate.judge_new(_interval(model, prepared.held_out, prepared))
            gates.append(Gated(gate="new tasks are better", ok=ok, found=found))
    for one in gates:
        say(one)
    unmet = [f"{one.gate}: {one.found}" for one in gates if not one.ok]
    if unmet:
        raise TrainingError(
            f"{len(unmet)} of {len(gates)} gates are not met: {'; '.join(unmet)}",
            hint=f"the adapter is in {config.output / 'lora'}; look at report.html before anything is made of it",
        )


def _interval(model: Any, examples: Sequence[Example], prepared: Prepared) -> gate.Interval:
    from backprop.engine.exam import row_losses
    from backprop.engine.load import as_before_training

    dtype = prepared.plan.dtype.value
    after = row_losses(model, examples, dtype=dtype)
    with as_before_training(model):
        before = row_losses(model, examples, dtype=dtype)
    return gate.paired_interval(before, after)
