"""trl's SFTTrainer, made to take optimizer steps that are lists of forward passes.

The one module that imports torch and trl at its top, since it has classes of theirs; only `loop` imports it, when it trains.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft.optimizers import create_loraplus_optimizer
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from backprop.config import TrainConfig
from backprop.core.data.render import Example
from backprop.core.passes import sides_of
from backprop.core.plan import Plan
from backprop.core.schedule import schedule_of
from backprop.edges import cards, stopping
from backprop.engine.batches import PassSize, num_tokens
from backprop.engine.exam import Prove
from backprop.engine.footprint import FirstStep, expected, too_small
from backprop.engine.layers import layers_of
from backprop.engine.load import HfTokenizer
from backprop.engine.objectives import Objective, accuracy_of
from backprop.engine.proofs import Movement
from backprop.engine.ranks import Ranks
from backprop.engine.snapshot import Saver, Stand, restore_optimizer
from backprop.engine.trackers import Trackers
from backprop.errors import Diverged, TrainingError
from backprop.events import Sink, Step, Warned


class StepPasses(torch.utils.data.Dataset[Any]):
    """The forward passes of each optimizer step, and the numbers of its examples.

    Args:
        first: Steps that are done already.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        objective: Objective,
        config: TrainConfig,
        plan: Plan,
        size: PassSize,
        *,
        first: int,
    ) -> None:
        self.objective, self.size, self.first = objective, size, first
        self.schedule = schedule_of(len(examples), config, plan)
        self._examples = examples
        self._longest = plan.max_length.value * sides_of(config)
        self._num_ranks, self._planned = plan.gpus.value, (plan.recompute.value, plan.offload.value)
        self._may_offload = config.offload is not False
        self._plan = plan

    def __len__(self) -> int:
        return self.schedule.num_steps - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        step = self.first + index
        numbers = self.schedule.order.of_step(step)
        return {"step": step, "numbers": numbers, "passes": self.passes_of(numbers)}

    def passes_of(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Give the forward passes of these examples, of the size that holds now."""
        size = replace(self.size, ranks=self._num_ranks)
        return self.objective.passes([self._examples[number] for number in numbers], size)

    @property
    def recomputed(self) -> tuple[int, bool]:
        """Layers that are computed again on the way back, and whether from main memory."""
        return self._planned if self.size.recomputed is None else (self.size.recomputed, self.size.offloaded)

    def recompute_all(self, ranks: Ranks, model: Any) -> bool:
        """Let every layer compute its activations again on the way back; false if all do already."""
        layers, (again, offloaded) = len(layers_of(model)), self.recomputed
        if again >= layers or (offloaded and not self._plan.may_wait(self.size.tokens, layers)):
            return False
        self.size = replace(self.size, recomputed=layers, offloaded=offloaded)
        return ranks.recompute(layers, offloaded)

    def offload(self, ranks: Ranks, model: Any) -> bool:
        """Let the inputs of all layers wait in main memory; false if they do, cannot or may not."""
        layers = len(layers_of(model))
        if (
            not layers
            or self.recomputed[1]
            or not self._may_offload
            or not self._plan.may_wait(self.size.tokens, layers)
        ):
            return False
        self.size = replace(self.size, recomputed=layers, offloaded=True)
        return ranks.recompute(layers, True)

    def shrink(self) -> bool:
        """Halve what goes through the model at once; false if it is one example already."""
        tokens, examples = max(self.size.tokens // 2, self._longest), max(self.size.examples // 2, 1)
        smaller = replace(self.size, tokens=tokens, examples=examples)
        could = smaller.tokens < self.size.tokens if self.size.packing else smaller.examples < self.size.examples
        self.size = smaller
        return could


class Watch(TrainerCallback):
    """Turns trl's logs into events and progress, saves when it is due, and stops before a step that is not finite."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        steps: StepPasses,
        saver: Saver,
        *,
        prove: Prove,
        say: Sink,
        describe: Callable[[Sequence[int]], str],
        run: int,
    ) -> None:
        self.progress = saver.progress
        self.tokens = 0
        """Of the step under way."""
        self.accuracy: float | None = None
        """Share of its preferences that are on their right side."""
        self.nothing_left = False
        """Whether they are so far on one side that no gradient is left."""
        self.numbers: Sequence[int] = ()
        """Examples of the step under way."""
        self._saver, self._told_not_compiled = saver, False
        self._config, self._plan, self._prove, self._say, self._run = config, plan, prove, say, run
        self._validation, self._describe = saver.validation, describe
        self._started, self._step_seconds = time.monotonic(), 1e-9
        self._movement: Movement | None = None
        done = self.progress.step > 0
        self.memory = FirstStep(lambda: expected(config, plan, steps.size), updated=done, say=say, run=run)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, model: Any = None, **_: Any
    ) -> None:
        """Let checkpoints hold the optimizer, and say if less can be recomputed than is planned."""
        self._saver.optimizer = optimizer
        found = len(layers_of(model))
        if 0 < self._plan.recompute.value > found:
            self._say(Warned(message=f"only {found} layers of this model can be computed again on the way back"))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Before the first step, note where every weight stands; then start the clock."""
        if self.progress.step == 0 and not self._config.skip_proofs:
            self._movement = Movement(model)
        self.memory.begin()
        self._started = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Stop before an update with a gradient that is not finite; let no interrupt tear the update."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        # Clipping has been done: where the norm overflowed, it left nothing but zeros.
        if not math.isfinite(norm) or (norm == 0 and not self.nothing_left):
            raise self._diverged(
                f"the gradient is not finite at step {self.progress.step + 1} (norm {norm} after clipping)"
            )
        self.memory.end()
        if self._movement is not None:
            self._movement.see_gradients()
        stopping.hold()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock when the GPU is done."""
        if self._plan.device.value == "cuda":
            torch.cuda.synchronize()
        self._step_seconds = max(time.monotonic() - self._started, 1e-9)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Count a step as done and tell of it; then prove, evaluate and save what is due."""
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(loss := float(logs["loss"])):
            raise self._diverged(f"the loss is {loss} at step {self.progress.step + 1}")
        self._count(loss)
        self._say(
            Step(
                step=self.progress.step,
                num_steps=self._plan.steps.value,
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=float(logs["grad_norm"]),
                seconds=self._step_seconds,
                tokens_per_second=self.tokens / self._step_seconds,
                memory_bytes=memory_bytes(),
                accuracy=self.accuracy,
                run=self._run,
            )
        )
        self._prove_movement()  # a run that goes on after the first step cannot prove it any more
        stopping.release()
        control.should_training_stop = self.evaluate_if_due()
        self._saver.save_if_due(evaluated=self._validation.evaluated(self.progress.step))
        cards.rest(self._saver.save)

    def _count(self, loss: float) -> None:
        done = self.progress
        done.losses.append(loss)
        done.seen.index_add_(0, torch.tensor(self.numbers), torch.ones(len(self.numbers), dtype=done.seen.dtype))
        done.tokens += self.tokens
        done.seconds += self._step_seconds
        done.ended = done.step >= self._plan.steps.value

    def evaluate_if_due(self) -> bool:
        """Evaluate after the last finished step if that is due and not done; say whether training has ended."""
        step = self.progress.step
        due = step % self._plan.eval_steps.value == 0 and 0 < step < self._plan.steps.value
        if due and not self._validation.evaluated(step) and self._validation.evaluate(step):
            self.progress.ended = True
        return self.progress.ended

    def _prove_movement(self) -> None:
        if self._movement is None:
            return
        proof, self._movement = self._prove(self._movement.prove), None
        if not proof.ok:
            raise TrainingError(
                f"not proved: {proof.name}: {proof.found}",
                hint="look at `--target-modules`; if you mean it, add `--skip-proofs`",
            )

    def shrunk(self, size: PassSize) -> None:
        """Tell that less goes through the model at once from here on."""
        held = f"{size.tokens} tokens" if size.packing else f"{size.examples} examples"
        self._say(
            Warned(
                message=f"the memory was full in step {self.progress.step + 1}: it was done again with {held} at once; "
                "the examples of a step stay the same"
            )
        )

    def recomputing(self) -> None:
        """Tell that every layer is computed again on the way back from here on."""
        self._tell_full("every layer is computed again on the way back")

    def offloading(self) -> None:
        """Tell that what layers begin with waits in main memory from here on."""
        self._tell_full("what each layer begins with waits in main memory")

    def _tell_full(self, then: str) -> None:
        before = f"the memory was full in step {self.progress.step + 1}: it was done again, and from here on"
        self._say(Warned(message=f"{before} {then}"))

    def tell_if_not_compiled(self, reason: str) -> None:
        """Tell once that layers run as they are, though they were to be compiled."""
        if reason and not self._told_not_compiled:
            self._say(Warned(message=f"the layers cannot be compiled here, and run slower: {reason}"))
        self._told_not_compiled = bool(reason)

    def _diverged(self, what: str) -> Diverged:
        return Diverged(
            what,
            hint="lower `--learning-rate`, and look at the rows of this step in crash.txt",
            details=self._describe(self.numbers),
        )


class Curves(TrainerCallback):
    """Hands what the trainer logs of a step to the trackers."""

    def __init__(self, trackers: Trackers) -> None:
        self._trackers = trackers

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Pass on the figures of a step."""
        if logs and "loss" in logs:
            self._trackers.log(logs, step=state.global_step)


class StepTrainer(SFTTrainer):
    """SFTTrainer whose batch is a whole optimizer step, and whose loss is the mean over all trained tokens of the step.

    trl 1.15 fuses its own loss in Triton only, which a CPU has not.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: HfTokenizer,
        steps: StepPasses,
        config: TrainConfig,
        plan: Plan,
        *,
        ranks: Ranks,
        watch: Watch,
        start: Stand,
        folder: Path,
    ) -> None:
        super().__init__(
            model=model,
            args=_arguments(config, plan, folder, num_steps=len(steps)),
            # What is trained comes from `steps`; trl looks at one row to know of which kind the data is.
            train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
            processing_class=tokenizer.inner,
            callbacks=[watch],
        )
        self._steps, self._watch, self._config, self._plan = steps, watch, config, plan
        self._ranks, self._checkpoint = ranks, start.checkpoint
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> Any:
        """Give the steps in order, each as it is."""
        return torch.utils.data.DataLoader(self._steps, batch_size=None)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Run every pass forward and backward, and give the loss of the step; less at once if the memory is full."""
        model.train()
        self._watch.numbers = inputs["numbers"]
        todo, shrunk = inputs["passes"], False
        seed = self._steps.schedule.random_seed(inputs["step"])
        while (parts := self._ranks.step(model, self._steps.objective, todo, seed=seed)) is None:
            if self._steps.recompute_all(self._ranks, model):
                self._watch.recomputing()
            elif self._steps.shrink():
                shrunk = True
            elif self._steps.offload(self._ranks, model):
                self._watch.offloading()
            else:
                raise too_small(self._config, self._plan)
            todo = self._steps.passes_of(self._watch.numbers)
            self._watch.memory.begin()
        if shrunk:
            self._watch.shrunk(self._steps.size)
        self._watch.tell_if_not_compiled(self._ranks.not_compiled)
        margins = [margin for part in parts if part.margins is not None for margin in part.margins.tolist()]
        self._watch.tokens = sum(num_tokens(one) for one in todo)
        self._watch.accuracy = accuracy_of(margins) if margins else None
        # Before clipping, which makes zeros of what overflowed.
        self._watch.nothing_left = bool(margins) and _largest_gradient(model) < NO_GRADIENT
        return torch.stack([part.loss for part in parts]).sum()

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: transformers would look for one batch of tokens."""
        return 0

    def create_optimizer(self, model: Any = None) -> Any:
        """Let B learn faster than A where LoRA+ was asked for (arXiv:2402.12354); go on with a checkpoint's moments."""
        kind: Any = torch.optim.AdamW
        if self._plan.optimizer.value == "adamw-8bit":
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

            # Betas and epsilon are torch's; weight decay comes with the groups of weights.
            kind = AdamW8bit
            self.optimizer_cls_and_kwargs: Any = kind, {"lr": self.args.learning_rate}
        if self._config.lora_plus is None:
            super().create_optimizer(model)
        else:
            self.optimizer: Any = create_loraplus_optimizer(
                cast(Any, model or self.model),
                # By its name PEFT would know AdamW8bit, and keep every model's embeddings in a list that nothing empties.
                cast(Any, lambda groups, **options: kind(groups, **options)),  # pyright: ignore[reportUnknownLambdaType]
                lr=self.args.learning_rate,
                loraplus_lr_ratio=self._config.lora_plus,
                loraplus_weight_decay=self._config.weight_decay,
            )
        if self._plan.optimizer.value == "adamw-8bit":
            _keep_words_exact(self.optimizer, cast(Any, model or self.model))
        if self._checkpoint is not None:
            restore_optimizer(self._checkpoint, self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Let the rate follow the schedule."""

        def share(step: int) -> float:
            return self._watch.progress.rate_share * self._steps.schedule.rate_share(self._steps.first + step)

        stepped: Any = optimizer or self.optimizer
        for group in stepped.param_groups:
            group.pop("initial_lr", None)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(stepped, share)
        return self.lr_scheduler


def _keep_words_exact(optimizer: Any, model: Any) -> None:
    """Let moments of what words begin with have 32 bits, as bitsandbytes advises: most steps meet few of the words."""
    from bitsandbytes.optim import GlobalOptimManager  # pyright: ignore[reportMissingImports]

    # Not the one for all, which would know these weights by their addresses when others have them.
    own: Any = GlobalOptimManager.__new__(GlobalOptimManager)
    own.initialize()
    words = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    own.override_config([weight for weight in words if weight.requires_grad], "optim_bits", 32)
    own.register_parameters(optimizer.param_groups)
    optimizer.mng = own


def _arguments(config: TrainConfig, plan: Plan, folder: Path, *, num_steps: int) -> Any:
    on_gpu = plan.device.value == "cuda"
    return SFTConfig(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=max(1, num_steps),
        learning_rate=plan.learning_rate.value,
        weight_decay=config.weight_decay,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=plan.dtype.value == "bfloat16",
        use_cpu=not on_gpu,
        gradient_checkpointing=False,  # `layers` sees to it
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )


# The square of less is nothing in float32.
NO_GRADIENT = 1e-19


def _largest_gradient(model: Any) -> float:
    return max(float(weight.grad.abs().max()) for weight in model.parameters() if weight.grad is not None)


def memory_bytes() -> int:
    """Give the peak of memory: the GPU's if one is in use, else this process's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info()._asdict().get("peak_wset", 0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
