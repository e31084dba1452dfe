"""The training loop: trl's SFTTrainer on examples that are already tokens, with what a run must say and check."""

import importlib
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backprop.config import TrainConfig
from backprop.core.data.render import Example
from backprop.core.passes import sides_of
from backprop.core.plan import Plan
from backprop.core.schedule import schedule_of
from backprop.edges import checkpoints, rundir
from backprop.edges.checkpoints import Checkpoint
from backprop.engine import proofs, snapshot
from backprop.engine.attention import within_documents
from backprop.engine.batches import PassSize
from backprop.engine.choosing import fastest, with_fp8_if_proved
from backprop.engine.exam import MOST_EXAMINED, Exam, Prove
from backprop.engine.load import HfTokenizer, adapter_state, set_adapter_state
from backprop.engine.objectives import Objective, objective_of
from backprop.engine.ranks import Ranks
from backprop.engine.snapshot import (
    Progress,
    Saver,
    Stand,
    best_of,
    refuse_other,
    refuse_other_future,
    refuse_other_start,
    restore,
    saved_when_stopped,
    warn_of_other_ranks,
)
from backprop.engine.trackers import Trackers
from backprop.engine.validation import Validation, told
from backprop.engine.weighing import Both, Weighed, Weighing, needed_of
from backprop.errors import Diverged, HardwareError, TrainingError
from backprop.events import Proved, Resumed, RolledBack, Sink, Warned


@dataclass(frozen=True, slots=True)
class Fit:
    """What training measured."""

    losses: tuple[float, ...]
    """Mean loss of each step over its trained tokens."""
    seconds: float
    """Of the steps; evaluations and proofs are not counted."""
    tokens: int
    """Tokens that went through the model, without padding."""
    eval_loss_before: float | None
    """None without held-out data."""
    eval_loss: float | None
    eval_accuracy: float | None
    """Share of held-out preferences that are on their right side."""
    delivered_step: int
    """The step after which the adapter was as it is delivered."""
    size: PassSize
    """How much went through the model at once."""
    fp8_backward: bool
    """Whether gradients went back in 8 bits."""
    failed: tuple[Proved, ...]
    """Proofs of what was learnt that did not hold."""


def fit(
    model: Any,
    tokenizer: HfTokenizer,
    examples: Sequence[Example],
    *,
    config: TrainConfig,
    plan: Plan,
    ranks: Ranks,
    folder: Path,
    data_sha256: str,
    say: Sink,
    save: Callable[[], None],
    held_out: Sequence[Example] = (),
    run: int = 1,
) -> Fit:
    """Train ``model``'s adapter on ``examples`` in place, from the newest checkpoint on if there is one.

    Args:
        ranks: The processes that share the passes of each step; all else is done in this one.
        folder: Where `checkpoints/` and a tracker's files go.
        data_sha256: Hash of ``examples`` and ``held_out``; a checkpoint of others is refused.
        save: Writes the adapter as it is; called as soon as it is trained, before anything else can go wrong.
        run: The number of this run in a multi-run.

    Raises:
        TrainingError: If a loss or gradient is not finite, before the update of that step; or if a proof that training
            needs does not hold.
        HardwareError: If the GPU's memory is too small, or the GPU fails.
        UsageError: If a checkpoint is of another plan.
        KeyboardInterrupt: After saving where it stands.
    """
    prove = prover(say, run)
    with hardware_told(plan):
        size = pass_size(model, config, plan, prove, say)
        objective = objective_of(config, examples)
        trained = _Training(
            *(model, tokenizer, examples, held_out, objective, config, plan, size, ranks, folder, data_sha256),
            *(prove, say, run),
        )
        stand = trained.to_the_last_step()
        progress, validation = stand.progress, stand.validation
        save()
        after = validation.finish(progress.step)
        if validation.delivered_step is not None:
            save()
        planned = schedule_of(len(examples), config, plan).order.times_seen(progress.step)
        seen = prove(lambda: proofs.prove_order(progress.seen.tolist(), planned))
        last_loss = progress.losses[-1] if config.objective == "sft" else math.inf  # others tell nothing of answers
        failed = stand.exam.judge(after, last_loss=last_loss, prove=prove, say=say, run=run)
    return Fit(
        *(tuple(progress.losses), progress.seconds, progress.tokens),
        eval_loss_before=before.loss if (before := stand.exam.before) else None,
        eval_loss=after.loss if after else None,
        eval_accuracy=after.accuracy if after else None,
        delivered_step=progress.step if validation.delivered_step is None else validation.delivered_step,
        size=stand.size,
        fp8_backward=trained.plan.fp8_backward.value,
        failed=failed if seen.ok else (seen, *failed),
    )


# How often a run goes back when it diverges, each time with half the rate.
MOST_ROLLBACKS = 3


@dataclass
class _Training:
    """What one training works with, and its way to the last step."""

    model: Any
    tokenizer: HfTokenizer
    examples: Sequence[Example]
    held_out: Sequence[Example]
    objective: Objective
    config: TrainConfig
    plan: Plan
    size: PassSize
    ranks: Ranks
    folder: Path
    data_sha256: str
    prove: Prove
    say: Sink
    run: int
    references: Any = None
    """Of all examples, then of all that are held out; a tensor of shape (N, sides), NaN where none is needed."""

    def to_the_last_step(self) -> Stand:
        """Train from the newest checkpoint on; where that diverges and it is wanted, go back and on with half the rate.

        Raises:
            Diverged: If it does all the same.
        """
        rollback = self.config.on_divergence == "rollback"
        start = adapter_state(self.model) if rollback else {}
        checkpoint = checkpoints.newest(self.folder / "checkpoints", say=self.say)
        if checkpoint is None and self.config.resume not in ("auto", "never"):
            checkpoint = checkpoints.read(Path(self.config.resume))
        if checkpoint is not None:
            refuse_other(checkpoint, self.config, self.plan, self.data_sha256)
            refuse_other_start(checkpoint, self.model)
            refuse_other_future(checkpoint, schedule_of(len(self.examples), self.config, self.plan))
        if self.objective.needs_reference:
            self._refer(checkpoint)
        given = (self.model, self.objective, self.examples, self.size)
        if self.plan.fp8_backward.value:
            before = checkpoint.state if checkpoint else None
            self.plan = with_fp8_if_proved(
                *given, plan=self.plan, ranks=self.ranks, prove=self.prove, say=self.say, before=before
            )
        if checkpoint is None:
            self.size = fastest(
                *given, config=self.config, plan=self.plan, ranks=self.ranks, say=self.say, run=self.run
            )
        stand = self._stand(checkpoint)
        for left in reversed(range(MOST_ROLLBACKS + 1)):
            try:
                ended = self._train(stand)
                rundir.remove(self._weighed_folder)  # the last checkpoint has it
                return ended
            except Diverged as error:
                if not rollback or not left:
                    raise
                stand = self._back_from(stand, start, reason=error.message)
        raise AssertionError

    def _refer(self, checkpoint: Checkpoint | None) -> None:
        """Let each example know what the model said before training, which a checkpoint remembers."""
        trained, held = self.examples, self.held_out
        self.references = self._weighed() if checkpoint is None else snapshot.references_of(checkpoint)
        of_trained, of_held = self.references.split([len(trained), len(held)])
        self.examples, self.held_out = Weighed(trained, of_trained), Weighed(held, of_held)

    def _weighed(self) -> Any:
        """Find it, or the rest of it where that was interrupted."""
        seen = schedule_of(len(self.examples), self.config, self.plan).order.times_seen(self.plan.steps.value)
        weighing = Weighing(
            *(self.model, Both(self.examples, self.held_out)),
            *(needed_of(seen, len(self.held_out), first=MOST_EXAMINED), self.size),
            folder=self._weighed_folder,
            run=snapshot.run_of(self.model, self.config, self.plan, self.data_sha256),
            say=self.say,
        )
        kept = checkpoints.whole_one(self._weighed_folder, say=self.say, instead="all are weighed again")
        if kept is not None:
            refuse_other(kept, self.config, self.plan, self.data_sha256)
            refuse_other_start(kept, self.model)
            weighing.go_on(kept)
        with saved_when_stopped(weighing.save):
            return weighing.finish()

    @property
    def _weighed_folder(self) -> Path:
        return self.folder / "checkpoints" / "weighed"

    def _train(self, stand: Stand) -> Stand:
        from backprop.engine.trainer import Curves, StepPasses, StepTrainer, Watch

        first = stand.progress.step
        steps = StepPasses(self.examples, self.objective, self.config, self.plan, stand.size, first=first)
        saver = Saver(
            self.folder / "checkpoints",
            self.config,
            self.plan,
            self.model,
            stand,
            steps,
            references=self.references,
            data_sha256=self.data_sha256,
            say=self.say,
            run=self.run,
        )
        describe = _describe(self.tokenizer, self.examples)
        watch = Watch(
            *(self.config, self.plan, steps, saver), prove=self.prove, say=self.say, describe=describe, run=self.run
        )
        trainer = StepTrainer(
            *(self.model, self.tokenizer, steps, self.config, self.plan),
            ranks=self.ranks,
            watch=watch,
            start=stand,
            folder=self.folder,
        )
        # After the trainer, which makes the state that accelerate's trackers ask for.
        trackers = Trackers(self.config, self.folder, first=steps.first, say=self.say)
        trainer.add_callback(Curves(trackers))
        with closing(trackers), saved_when_stopped(saver.save):
            if not (stand.progress.ended or watch.evaluate_if_due()):
                self.ranks.meet(self.model)
                self.ranks.recompute(*steps.recomputed)
                with within_documents(self.model) if stand.size.packing else nullcontext():
                    trainer.train()
        return replace(stand, size=steps.size)

    def _back_from(self, failed: Stand, start: Mapping[str, Any], *, reason: str) -> Stand:
        """Go back to the newest checkpoint, or to the start; a checkpoint that led here twice is left for the one before."""
        checkpoint = checkpoints.newest(self.folder / "checkpoints", say=self.say)
        if checkpoint is not None and failed.checkpoint is not None and checkpoint.step == failed.checkpoint.step:
            rundir.remove(checkpoint.folder)
            checkpoint = checkpoints.newest(self.folder / "checkpoints", say=self.say)
        if checkpoint is None:
            set_adapter_state(self.model, start)
        stand = self._stand(checkpoint, known=failed.exam.to_json())
        stand.progress.rate_share = failed.progress.rate_share / 2
        self.say(
            RolledBack(step=stand.progress.step, rate_share=stand.progress.rate_share, reason=reason, run=self.run)
        )
        return stand

    def _stand(self, checkpoint: Checkpoint | None, *, known: Mapping[str, Any] | None = None) -> Stand:
        """Examine a model that has learnt nothing yet, or put a checkpoint into it."""
        before: Mapping[str, Any] = checkpoint.state if checkpoint else {}
        size = self.size
        if before and before["size"]["packing"] == size.packing:
            size = PassSize(**before["size"])
            if self.config.micro_batch is not None:  # as the hint of an out-of-memory error says
                size = replace(
                    size,
                    examples=min(size.examples, self.size.examples),
                    tokens=min(size.tokens, self.size.tokens),
                )
            if self.config.recompute is not None or self.config.offload:
                size = replace(size, recomputed=self.plan.recompute.value, offloaded=self.plan.offload.value)
            elif self.config.offload is False:
                size = replace(size, offloaded=False)
        examined = known or before.get("exam")
        exam = Exam(
            self.model,
            self.tokenizer,
            self.examples,
            self.held_out,
            objective=self.objective,
            size=size,
            proofs_too=not self.config.skip_proofs,
            before=examined,
        )
        patience = self.config.early_stopping
        validation = Validation(self.model, exam.measure, patience=patience, say=self.say, run=self.run)
        if checkpoint is None:
            progress = Progress.start(len(self.examples))
            progress.skipped_proofs = self.config.skip_proofs
            if exam.before is not None and not examined:
                self.say(told(exam.before, step=0, run=self.run))
        else:
            progress = restore(checkpoint, self.model)
            if progress.skipped_proofs and not self.config.skip_proofs:
                self.say(
                    Warned(
                        message="this run began with `--skip-proofs`: what is compared with its start stays unproved"
                    )
                )
            if known is None:
                self.say(Resumed(step=checkpoint.step, path=str(checkpoint.folder), run=self.run))
                warn_of_other_ranks(checkpoint, self.plan, self.say)
            validation.restore(before["validation"], best_of(checkpoint))
        return Stand(size=size, progress=progress, exam=exam, validation=validation, checkpoint=checkpoint)


@contextmanager
def hardware_told(plan: Plan) -> Generator[None]:
    """Say what to change when the GPU's memory is too small, or what to do when it fails.

    Raises:
        HardwareError: In either case.
    """
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        micro, longest = plan.micro_batch.value, plan.max_length.value
        fewer = f"`--micro-batch {micro // 2}`, " if micro > 1 else ""
        raise HardwareError(
            f"the GPU's memory is full with {micro} example{'s' * (micro > 1)} of up to {longest} tokens",
            hint=f"add {fewer}a `--max-length` below {longest}, or `--{'no-dequantize' if plan.dequantize.value else 'method qlora'}`",
        ) from error
    except RuntimeError as error:
        if "CUDA error" not in str(error):
            raise
        raise HardwareError(
            f"the GPU failed: {str(error).splitlines()[0]}",
            hint="look at `nvidia-smi` and `backprop doctor`; then the same command goes on from the last checkpoint",
        ) from error


def prover(say: Sink, run: int) -> Prove:
    """Give a function that makes a proof and tells of it."""

    def prove(proof: Callable[[], Proved]) -> Proved:
        proved = replace(proofs.timed(proof), run=run)
        say(proved)
        return proved

    return prove


def pass_size(model: Any, config: TrainConfig, plan: Plan, prove: Prove, say: Sink) -> PassSize:
    """Prove what the model computes, and give up packing where it cannot keep documents apart.

    Raises:
        TrainingError: If 4-bit weights are computed wrongly; or if packing was asked for and cannot be.
    """
    micro = plan.micro_batch.value
    tokens = micro * plan.max_length.value * sides_of(config)
    size = PassSize(
        examples=micro,
        tokens=tokens,
        packing=plan.packing.value,
        dtype=plan.dtype.value,
        recomputed=plan.recompute.value,
        offloaded=plan.offload.value,
    )
    if config.method == "qlora" and not plan.dequantize.value and not config.skip_proofs:
        proof = prove(lambda: proofs.prove_quantized_layer(model, compiled=plan.compiles_layers))
        if not proof.ok:
            raise TrainingError(
                f"not proved: {proof.name}: {proof.found}", hint="`backprop doctor`, or train with `--method lora`"
            )
    if not size.packing:
        return size
    proof = prove(lambda: proofs.prove_isolation(model, dtype=plan.dtype.value))
    if proof.ok:
        return size
    if config.packing:
        raise TrainingError(f"not proved: {proof.name}: {proof.found}", hint="add `--no-packing`")
    say(Warned(message=f"this model cannot keep packed examples apart, so rows are padded instead: {proof.found}"))
    return replace(size, packing=False)


def _describe(tokenizer: HfTokenizer, examples: Sequence[Example]) -> Callable[[Sequence[int]], str]:
    """Give a function that writes examples out, for a crash report."""
    whole: Any = tokenizer.inner

    def describe(numbers: Sequence[int]) -> str:
        return "\n".join(f"example {number}: {whole.decode(list(examples[number].ids))}" for number in numbers)

    return describe


@contextmanager
def same_bits(wanted: bool) -> Generator[None]:
    """Let torch compute the same bits each time on a GPU while the block runs; a CPU does anyway."""
    import torch

    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def release() -> None:
    """Give back the memory of models that nothing refers to any more; trainers leave cycles behind."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def quieten(*, data: bool = True) -> None:
    """Keep the libraries' own notices off the terminal, and with ``data`` those about data sets; the user is told by events."""
    import logging

    import transformers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for optional kernels when peft imports it
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    if data:
        datasets: Any = importlib.import_module("datasets")
        datasets.disable_progress_bars()
