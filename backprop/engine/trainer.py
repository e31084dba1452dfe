"""trl's SFTTrainer, made to take optimizer steps that are lists of forward passes.

The one module that imports torch and trl at its top, since it has classes of theirs; only `loop` imports it, when it trains.
"""

import functools
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft.optimizers import create_loraplus_optimizer
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from backprop.config import TrainConfig
from backprop.core.data.order import SampleOrder
from backprop.core.data.render import Example
from backprop.core.plan import Plan
from backprop.core.schedule import rate_share
from backprop.engine.batches import PassSize, num_tokens, num_trained, passes, sum_of_losses, to_device
from backprop.engine.exam import Prove
from backprop.engine.load import HfTokenizer
from backprop.engine.proofs import Movement
from backprop.engine.validation import Validation
from backprop.errors import TrainingError
from backprop.events import Sink, Step


class StepPasses(torch.utils.data.Dataset[Any]):
    """The forward passes of each optimizer step, and the numbers of its examples."""

    def __init__(self, examples: Sequence[Example], config: TrainConfig, plan: Plan, size: PassSize) -> None:
        self._examples, self._size, self._num_steps = examples, size, plan.steps.value
        self._order = SampleOrder(num_examples=len(examples), batch_size=plan.batch_size.value, seed=config.seed)

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        numbers = self._order.of_step(step)
        return {"numbers": numbers, "passes": passes([self._examples[number] for number in numbers], self._size)}


class Watch(TrainerCallback):
    """Turns trl's logs into events, and stops before a step that is not finite."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        *,
        prove: Prove,
        say: Sink,
        validation: Validation,
        describe: Callable[[Sequence[int]], str],
        run: int,
    ) -> None:
        self.losses: list[float] = []
        self.tokens = 0
        self.numbers: Sequence[int] = ()
        """Examples of the step under way."""
        self._config, self._plan, self._prove, self._say, self._run = config, plan, prove, say, run
        self._validation, self._describe = validation, describe
        self.seconds = 0.0
        """Of all steps so far."""
        self._tokens_before = 0
        self._started, self._step_seconds = time.monotonic(), 1e-9
        self._movement: Movement | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Before the first step, note where every weight stands; then start the clock."""
        if state.global_step == 0 and not self._config.skip_proofs:
            self._movement = Movement(model)
        self._started, self._tokens_before = time.monotonic(), self.tokens

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Stop before an update with a gradient that is not finite."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        # Clipping has been done: where the norm overflowed, it left nothing but zeros.
        if not math.isfinite(norm) or norm == 0:
            raise self._diverged(
                f"the gradient is not finite at step {state.global_step + 1} (norm {norm} after clipping)"
            )
        if self._movement is not None:
            self._movement.see_gradients()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Tell of a step; at intervals, evaluate."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss} at step {state.global_step}")
        self.losses.append(loss)
        self._say(
            Step(
                step=state.global_step,
                num_steps=self._plan.steps.value,
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=float(logs["grad_norm"]),
                seconds=self._step_seconds,
                tokens_per_second=(self.tokens - self._tokens_before) / self._step_seconds,
                memory_bytes=memory_bytes(),
                run=self._run,
            )
        )
        step = state.global_step
        if (
            step % self._plan.eval_steps.value == 0
            and step < self._plan.steps.value
            and self._validation.evaluate(step)
        ):
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock when the GPU is done; after the first step, prove what moved."""
        if self._plan.device.value == "cuda":
            torch.cuda.synchronize()
        self._step_seconds = max(time.monotonic() - self._started, 1e-9)
        self.seconds += self._step_seconds
        if self._movement is not None:
            proof, self._movement = self._prove(self._movement.prove), None
            if not proof.ok:
                raise TrainingError(
                    f"not proved: {proof.name}: {proof.found}",
                    hint="look at `--target-modules`; if you mean it, add `--skip-proofs`",
                )

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            what,
            hint="lower `--learning-rate`, and look at the rows of this step in crash.txt",
            details=self._describe(self.numbers),
        )


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
        watch: Watch,
        scratch: Path,
        curves: Path | None,
    ) -> None:
        super().__init__(
            model=model,
            args=_arguments(config, plan, scratch),
            # What is trained comes from `steps`; trl looks at one row to know of which kind the data is.
            train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
            processing_class=tokenizer.inner,
            callbacks=[watch],
        )
        self._steps, self._watch, self._config = steps, watch, config
        self.remove_callback(PrinterCallback)
        if curves is not None:
            self.add_callback(_tensorboard(curves))

    def get_train_dataloader(self) -> Any:
        """Give the steps in order, each as it is."""
        return torch.utils.data.DataLoader(self._steps, batch_size=None)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Run every pass forward and backward, and give the loss of the step."""
        model.train()
        self._watch.numbers = inputs["numbers"]
        count = sum(num_trained(one) for one in inputs["passes"])
        losses: list[Any] = []
        for one in inputs["passes"]:
            self._watch.tokens += num_tokens(one)
            with self.compute_loss_context_manager():
                loss = sum_of_losses(model, to_device(one, self.args.device)) / count
            self.accelerator.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: transformers would look for one batch of tokens."""
        return 0

    def create_optimizer(self, model: Any = None) -> Any:
        """Let B learn faster than A where LoRA+ was asked for (arXiv:2402.12354)."""
        if self._config.lora_plus is None:
            return super().create_optimizer(model)
        self.optimizer: Any = create_loraplus_optimizer(
            cast(Any, model or self.model),
            torch.optim.AdamW,
            lr=self.args.learning_rate,
            loraplus_lr_ratio=self._config.lora_plus,
            loraplus_weight_decay=self._config.weight_decay,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Let the rate follow `rate_share`."""
        share = functools.partial(
            rate_share,
            num_steps=num_training_steps,
            num_warmup=int(self._config.warmup * num_training_steps),
            kind=self._config.scheduler,
        )
        stepped: Any = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(stepped, share)
        return self.lr_scheduler


def _arguments(config: TrainConfig, plan: Plan, scratch: Path) -> Any:
    on_gpu = plan.device.value == "cuda"
    return SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=plan.steps.value,
        learning_rate=plan.learning_rate.value,
        weight_decay=config.weight_decay,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=plan.dtype.value == "bfloat16",
        use_cpu=not on_gpu,
        gradient_checkpointing=plan.checkpointing.value,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )


def memory_bytes() -> int:
    """Give the peak of memory: the GPU's if one is in use, else this process's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))
