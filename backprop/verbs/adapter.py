"""One adapter: load the model, train, write `lora/`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.config import TrainConfig
from backprop.edges import cards, rundir
from backprop.errors import TrainingError
from backprop.events import JSON, Phase, Sink
from backprop.verbs import models
from backprop.verbs.prepare import Prepared, digest

if TYPE_CHECKING:
    from backprop.engine.loop import Fit


def train_one(
    config: TrainConfig,
    prepared: Prepared,
    *,
    output: Path,
    say: Sink,
    start: Mapping[str, Any] | None = None,
    run: int = 1,
) -> tuple[Any, "Fit"]:
    """Load the model, train a fresh adapter (or one that starts from ``start``), and write `lora/` in ``output``."""
    folder = models.weights_of(prepared.model, say=say)
    say(Phase(name="loading the model"))
    from backprop.engine import load, loop, ranks

    plan = prepared.plan
    cards.look_after(prepared.hardware.gpus[: plan.gpus.value])
    with ranks.started(folder, config, plan, prepared.hardware) as all_ranks:
        model = load.load_model(folder, config, plan)
        load.name_base(model, prepared.model.public_name, prepared.model.revision)
        if start is not None:
            load.set_adapter_state(model, start)
        say(Phase(name="training"))

        def save() -> None:
            with rundir.whole(output / "lora") as adapter:
                load.save_adapter(model, prepared.tokenizer, adapter)

        with loop.same_bits(config.deterministic):
            result = loop.fit(
                model,
                prepared.tokenizer,
                prepared.train.examples,
                config=config,
                plan=plan,
                ranks=all_ranks,
                folder=output,
                data_sha256=f"{prepared.train_sha256} {digest(prepared.held_out)}",
                say=say,
                save=save,
                held_out=prepared.held_out,
                run=run,
            )
    if result.failed:
        proof = result.failed[0]
        raise TrainingError(
            f"not proved: {proof.name}: {proof.found}",
            hint=f"the adapter is in {output / 'lora'}; look at the samples in report.html, lower `--learning-rate` or "
            "`--epochs`; if you mean it, add `--skip-proofs`",
        )
    return model, result


def measures(fit: "Fit", output: Path) -> dict[str, JSON]:
    """Give what a run measured and delivered, for its manifest."""
    return {
        "adapter_sha256": rundir.sha256_of(output / "lora" / "adapter_model.safetensors"),
        "steps": len(fit.losses),
        "delivered_step": fit.delivered_step,
        "final_loss": fit.losses[-1],
        "eval_loss_before": fit.eval_loss_before,
        "eval_loss": fit.eval_loss,
        "eval_accuracy": fit.eval_accuracy,
        "tokens": fit.tokens,
        "tokens_per_second": fit.tokens / fit.seconds,
        "packing": fit.size.packing,
        "micro_batch": fit.size.examples,
        "fp8_backward": fit.fp8_backward,
    }
