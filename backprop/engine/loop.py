"""The training loop: trl's SFTTrainer on examples that are already tokens, with what a run must say and check."""

import functools
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from backprop.config import TrainConfig
from backprop.core.data.render import Example
from backprop.core.plan import Plan
from backprop.core.schedule import rate_share
from backprop.engine.load import HfTokenizer
from backprop.errors import HardwareError, TrainingError
from backprop.events import Eval, Sink, Step

IGNORED = -100
"""The label that torch's cross-entropy skips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What training measured."""

    losses: tuple[float, ...]
    """Mean loss of each step over its trained tokens."""
    seconds: float
    tokens: int
    """Tokens that went through the model, without padding."""
    eval_loss_before: float | None
    """None without held-out data."""
    eval_loss: float | None


def fit(
    model: Any,
    tokenizer: HfTokenizer,
    examples: Sequence[Example],
    *,
    config: TrainConfig,
    plan: Plan,
    say: Sink,
    held_out: Sequence[Example] = (),
    scratch: Path,
    curves: Path | None = None,
    run: int = 1,
) -> Fit:
    """Train ``model``'s adapter on ``examples`` in place.

    Args:
        scratch: A folder that trl may write to; it holds nothing worth keeping.
        curves: A folder for TensorBoard's files; None for none.
        run: The number of this run in a multi-run.

    Raises:
        TrainingError: If a loss or gradient is not finite; the update of that step is not made.
        HardwareError: If the GPU's memory is too small.
    """
    import torch

    size = plan.micro_batch.value
    before = mean_loss(model, held_out, batch_size=size) if held_out else None
    if before is not None:
        say(Eval(step=0, loss=before, run=run))
    watch = _watch(
        lambda: mean_loss(model, held_out, batch_size=size), config, plan, say, run=run, evaluate=bool(held_out)
    )
    trainer = _trainer(model, tokenizer, examples, config=config, plan=plan, callback=watch, scratch=scratch)
    if curves is not None:
        trainer.add_callback(_tensorboard(curves))
    started = time.monotonic()
    try:
        trainer.train()
    except torch.cuda.OutOfMemoryError as error:
        raise HardwareError(
            f"the GPU's memory is full with {size} examples of up to {plan.max_length.value} tokens",
            hint=f"add `--micro-batch {max(1, size // 2)}`, a smaller `--max-length`, or `--method qlora`",
        ) from error
    seconds = time.monotonic() - started
    _check_moved(model)
    after = mean_loss(model, held_out, batch_size=size) if held_out else None
    if after is not None:
        say(Eval(step=plan.steps.value, loss=after, run=run))
    return Fit(
        losses=tuple(watch.losses), seconds=seconds, tokens=watch.tokens, eval_loss_before=before, eval_loss=after
    )


def _check_moved(model: Any) -> None:
    """Refuse an adapter that training left where it began: B starts at zero.

    Raises:
        TrainingError: If every B is still zero.
    """
    if not any(bool(value.any()) for name, value in model.named_parameters() if "lora_B" in name):
        raise TrainingError(
            "training changed nothing: the adapter is all zero", hint="raise `--steps` or `--learning-rate`"
        )


def _trainer(
    model: Any,
    tokenizer: HfTokenizer,
    examples: Sequence[Example],
    *,
    config: TrainConfig,
    plan: Plan,
    callback: Any,
    scratch: Path,
) -> Any:
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.trainer.sft_trainer import SFTTrainer

    rows = Dataset.from_dict({"input_ids": [list(e.ids) for e in examples], "labels": [labels_of(e) for e in examples]})

    class TrainedTokensTrainer(SFTTrainer):
        """SFTTrainer with a loss that needs no Triton, so that a CPU can train (trl 1.15 fuses it in Triton only)."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            assert not return_outputs, "nothing here asks for the outputs"
            assert num_items_in_batch is not None, "the loss is divided by the trained tokens of the whole step"
            callback.tokens += int(inputs["attention_mask"].sum())
            return sum_of_losses(model, inputs) / num_items_in_batch

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            share = functools.partial(
                rate_share,
                num_steps=num_training_steps,
                num_warmup=int(config.warmup * num_training_steps),
                kind=config.scheduler,
            )
            stepped: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(stepped, share)
            return self.lr_scheduler

    trainer = TrainedTokensTrainer(
        model=model,
        args=_arguments(config, plan, scratch),
        train_dataset=rows,
        processing_class=tokenizer.inner,
        callbacks=[callback],
    )
    # The loss above divides by the whole step's tokens, whatever the model says of its own.
    trainer.model_accepts_loss_kwargs = True
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(config: TrainConfig, plan: Plan, scratch: Path) -> Any:
    from trl.trainer.sft_config import SFTConfig

    on_gpu = plan.device.value == "cuda"
    return SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=plan.micro_batch.value,
        gradient_accumulation_steps=plan.batch_size.value // plan.micro_batch.value,
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
        dataloader_pin_memory=on_gpu,
    )


def sum_of_losses(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Sum the negative log-likelihood over the trained tokens of a padded batch, in nats; a scalar tensor.

    Logits are made only at positions where some row is trained: with a large vocabulary and short answers that saves
    a good part of the time and most of the memory.
    """
    import torch

    targets_BT = inputs["labels"][:, 1:]
    keep_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    rest = {name: value for name, value in inputs.items() if name not in ("labels", "attention_mask")}
    logits_BKV = model(
        **rest, attention_mask=inputs["attention_mask"], logits_to_keep=keep_K, use_cache=False
    ).logits.float()
    assert logits_BKV.shape[1] == len(keep_K), "this architecture does not know `logits_to_keep`"
    return torch.nn.functional.cross_entropy(
        logits_BKV.flatten(0, 1), targets_BT[:, keep_K].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


def labels_of(example: Example) -> list[int]:
    """Give each token as its own label where it is trained on, and `IGNORED` elsewhere."""
    return [token if trained else IGNORED for token, trained in zip(example.ids, example.mask, strict=True)]


def _watch(
    evaluate_now: Callable[[], float], config: TrainConfig, plan: Plan, say: Sink, *, run: int, evaluate: bool
) -> Any:
    """Give the callback that turns trl's logs into events and stops before a step that is not finite."""
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.tokens = 0
            self.tokens_before = 0
            self.last = time.monotonic()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.last, self.tokens_before = time.monotonic(), self.tokens

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            # Clipping has been done: where the norm overflowed, it left nothing but zeros.
            if not math.isfinite(norm) or norm == 0:
                raise TrainingError(
                    f"the gradient is not finite at step {state.global_step + 1} (norm {norm} after clipping)",
                    hint="lower `--learning-rate`, and look at the data",
                )

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            seconds = max(time.monotonic() - self.last, 1e-9)
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {state.global_step}",
                    hint="lower `--learning-rate`, and look at the data",
                )
            self.losses.append(loss)
            say(
                Step(
                    step=state.global_step,
                    num_steps=plan.steps.value,
                    loss=loss,
                    learning_rate=float(logs["learning_rate"]),
                    grad_norm=float(logs["grad_norm"]),
                    seconds=seconds,
                    tokens_per_second=(self.tokens - self.tokens_before) / seconds,
                    memory_bytes=memory_bytes(),
                    run=run,
                )
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            if evaluate and config.eval_steps and step % config.eval_steps == 0 and step < plan.steps.value:
                say(Eval(step=step, loss=evaluate_now(), run=run))

    return Watch()


def memory_bytes() -> int:
    """Give the peak of memory: the GPU's if one is in use, else this process's."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mean_loss(model: Any, examples: Sequence[Example], *, batch_size: int) -> float:
    """Mean of the negative log-likelihood over all trained tokens of ``examples``, in nats."""
    import torch

    total, count = 0.0, 0
    was_training = bool(model.training)
    model.eval()
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda example: len(example.ids))
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            batch = _padded(ordered[start : start + batch_size])
            inputs = {name: torch.tensor(rows, device=device) for name, rows in batch.items()}
            total += float(sum_of_losses(model, inputs))
            count += int((inputs["labels"][:, 1:] != IGNORED).sum())
    model.train(was_training)
    return total / count


def _padded(batch: Sequence[Example]) -> dict[str, list[list[int]]]:
    length = max(len(example.ids) for example in batch)
    gaps = [length - len(example.ids) for example in batch]
    return {
        "input_ids": [[*example.ids, *[0] * gap] for example, gap in zip(batch, gaps, strict=True)],
        "attention_mask": [[1] * len(example.ids) + [0] * gap for example, gap in zip(batch, gaps, strict=True)],
        "labels": [labels_of(example) + [IGNORED] * gap for example, gap in zip(batch, gaps, strict=True)],
    }


def release() -> None:
    """Give back the memory of models that nothing refers to any more; trainers leave cycles behind."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def quieten() -> None:
    """Keep the libraries' own notices off the terminal; what the user must know is said as an event."""
    import logging

    # bitsandbytes looks for optional kernels when peft imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cast(Any, datasets).disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
