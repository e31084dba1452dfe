"""Where a training stands: all that its next step depends on, captured into a checkpoint and put back.

The examples, the rate and the random state of a step are functions of the run and the step's number. They are written
down all the same, and a program that would go on with others is refused.
"""

import hashlib
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from backprop.config import TrainConfig
from backprop.core.plan import Plan
from backprop.core.schedule import Schedule
from backprop.edges import checkpoints, stopping
from backprop.edges.checkpoints import Checkpoint
from backprop.engine.batches import PassSize
from backprop.engine.exam import Exam
from backprop.engine.load import set_adapter_state, start_of
from backprop.engine.validation import Validation
from backprop.errors import UsageError
from backprop.events import JSON, Checkpointed, Sink, Warned

if TYPE_CHECKING:
    import torch

ADAPTER, OPTIMIZER, PROGRESS = "adapter_model.safetensors", "optimizer.safetensors", "progress.safetensors"
# What must be the same for a checkpoint to go on; the rest of a plan changes no result.
DECIDED = ("max_length", "batch_size", "steps", "learning_rate", "lora_alpha", "dtype")
GIVEN = (
    *("seed", "scheduler", "warmup", "weight_decay", "optimizer", "loss_on", "method", "early_stopping"),
    *("lora_r", "rslora", "pissa", "lora_plus", "lora_dropout", "target_modules", "objective", "beta"),
    "fp8_backward",
)
FORMAT = 5
# Saving costs at most this share of the time.
MOST_SAVING = 0.02
SAVE_EVERY_S = 300.0


@dataclass(kw_only=True)
class Progress:
    """What a run has done so far."""

    seen: "torch.Tensor"
    """How often each example was trained on; int32."""
    losses: list[float] = field(default_factory=list[float])
    """Of each finished step."""
    tokens: int = 0
    """Tokens that went through the model, without padding."""
    seconds: float = 0.0
    """Of all steps; evaluations and proofs are not counted."""
    ended: bool = False
    """Whether no step is to follow."""
    skipped_proofs: bool = False
    """Whether proofs were left out that can only be made at the start."""
    rate_share: float = 1.0
    """Of the planned rates; less after training diverged and went back."""

    @property
    def step(self) -> int:
        """Steps that are finished."""
        return len(self.losses)

    @classmethod
    def start(cls, num_examples: int) -> "Progress":
        """Give the progress of a run that has not begun."""
        import torch

        return cls(seen=torch.zeros(num_examples, dtype=torch.int32))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stand:
    """Where a training stands, before its next step."""

    size: PassSize
    progress: Progress
    exam: Exam
    validation: Validation
    checkpoint: Checkpoint | None
    """Where it comes from."""


@contextmanager
def saved_when_stopped(save: Callable[[], None]) -> Generator[None]:
    """Save where the work stands when it is interrupted, by this thread or, if that cannot hear, another."""
    try:
        with stopping.rescued_by(save):
            yield
    except KeyboardInterrupt as interrupt:
        stopping.accept(interrupt)
        save()
        raise
    finally:
        stopping.let_go()


class Steps(Protocol):
    """What knows how much goes through the model at once, and what comes next."""

    size: PassSize
    schedule: Schedule


class Saver:
    """Writes checkpoints of one training, by time or steps, and gives back the newest.

    Args:
        folder: Where they go.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        plan: Plan,
        model: Any,
        stand: Stand,
        steps: Steps,
        *,
        references: "torch.Tensor | None",
        data_sha256: str,
        say: Sink,
        run: int,
    ) -> None:
        self._references = references
        self._folder, self._config, self._plan, self._say, self._run = folder, config, plan, say, run
        self._model, self._steps, self.progress = model, steps, stand.progress
        self._exam, self.validation = stand.exam, stand.validation
        self._data_sha256 = data_sha256
        self.optimizer: Any = None
        self._saved = (self.progress.step, self.progress.ended)
        self._saved_at, self._cost = time.monotonic(), 0.0

    def save_if_due(self, *, evaluated: bool = False) -> None:
        """Save after a step if it is time: by steps, by minutes, at the end, or for the sake of an evaluation."""
        waited = time.monotonic() - self._saved_at
        cheap = self._cost <= MOST_SAVING * waited
        by_steps = self._config.save_steps
        due = self.progress.step % by_steps == 0 if by_steps else cheap and (evaluated or waited >= SAVE_EVERY_S)
        if due or self.progress.ended:
            self.save()

    def save(self) -> None:
        """Save where the run stands, if that is not saved yet. Safe in any thread, at any moment between two updates."""
        with stopping.held():
            now = (self.progress.step, self.progress.ended)
            if self.optimizer is None or now in ((0, False), self._saved):
                return
            started = time.monotonic()
            path = checkpoints.write(self._folder, self._state(), self._fill, keep=self._config.keep_checkpoints)
            self._saved, self._saved_at = now, time.monotonic()
            self._cost = self._saved_at - started
        self._say(Checkpointed(step=self.progress.step, path=str(path), seconds=round(self._cost, 3), run=self._run))

    def _state(self) -> dict[str, JSON]:
        done = self.progress
        figures: dict[str, JSON] = {"tokens": done.tokens, "seconds": done.seconds, "ended": done.ended}
        figures |= {"rate_share": done.rate_share, "skipped_proofs": done.skipped_proofs}
        measured = {"exam": self._exam.to_json(), "validation": self.validation.to_json()}
        size = asdict(self._steps.size)
        return {
            **run_of(self._model, self._config, self._plan, self._data_sha256),
            "step": done.step,
            "next": self._steps.schedule.of_step(done.step),
            "scaler": None,  # nothing is computed in float16
            "size": size,
            "gpus": self._plan.gpus.value,
            "engine": self._plan.engine.value,
            "fp8_backward": self._plan.fp8_backward.value,
            "layers_in_16_bits": list(self._plan.layers_in_16_bits),
            **figures,
            **measured,
        }

    def _fill(self, folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        self._model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card, about nothing
        save_file(moments_of(self.optimizer), folder / OPTIMIZER)
        losses = torch.tensor(self.progress.losses, dtype=torch.float64)
        best = {f"best.{name}": tensor.contiguous() for name, tensor in self.validation.best.items()}
        weighed = {} if self._references is None else {"references": self._references}
        save_file({"losses": losses, "seen": self.progress.seen, **weighed, **best}, folder / PROGRESS)


def decided(config: TrainConfig, plan: Plan, data_sha256: str) -> dict[str, JSON]:
    """Give what must be the same for a checkpoint to go on."""
    given = {name: getattr(config, name) for name in GIVEN}
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()},
        **{name: getattr(plan, name).value for name in DECIDED},
        "data": data_sha256,
    }


def run_of(model: Any, config: TrainConfig, plan: Plan, data_sha256: str) -> dict[str, JSON]:
    """Give what `refuse_other` and `refuse_other_start` look at."""
    run = decided(config, plan, data_sha256)
    return {"format": FORMAT, "run": run, "start": fingerprint(start_of(model))}


def refuse_other(checkpoint: Checkpoint, config: TrainConfig, plan: Plan, data_sha256: str) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        UsageError: Naming what differs.
    """
    if checkpoint.state.get("format") != FORMAT:
        raise UsageError(
            f"`{checkpoint.folder}` was written by another version of backprop",
            hint="go on with that version, or begin anew with `--resume never`",
        )
    # Of before there was another.
    before = {"optimizer": "adamw", **cast(Mapping[str, JSON], checkpoint.state["run"])}
    now = decided(config, plan, data_sha256)
    changed = [f"{name}: {before.get(name)} before, {now[name]} now" for name in now if before.get(name) != now[name]]
    changed = ["the rows of the data" if one.startswith("data: ") else one for one in changed]
    if changed:
        raise UsageError(
            f"`{checkpoint.folder}` is of another run, which differs in {'; '.join(changed)}",
            hint="give what it had, or begin anew with `--resume never`",
        )


def refuse_other_start(checkpoint: Checkpoint, model: Any) -> None:
    """Refuse to go on from another start than PiSSA found when this run began; singular vectors vary with the machine.

    Raises:
        UsageError: If it differs.
    """
    if checkpoint.state["start"] != fingerprint(start_of(model)):
        raise UsageError(
            f"`{checkpoint.folder}` began with other singular vectors than this machine computes",
            hint="go on with the machine and the versions that began it, or begin anew with `--resume never`",
        )


def warn_of_other_ranks(checkpoint: Checkpoint, plan: Plan, say: Sink) -> None:
    """Say that a run which goes on with more or fewer GPUs, or on another engine, is the same, but for its last bits."""
    engine = checkpoint.state.get("engine", "torch")
    if engine != plan.engine.value:
        told = f"this run goes on with the engine {plan.engine.value}, and had {engine} before"
        say(Warned(message=f"{told}: its steps stay the same, but for the last bits of the adapter"))
    before, now = checkpoint.state["gpus"], plan.gpus.value
    if before != now:
        say(
            Warned(
                message=f"this run goes on with {now} GPU{'s' * (now > 1)}, and had {before} before: its steps stay the "
                "same, but gradients are added up in another order, which changes the last bits of the adapter"
            )
        )


def fingerprint(state: "Mapping[str, torch.Tensor]") -> str:
    """Hash tensors with their names; empty if there are none."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest() if state else ""


def refuse_other_future(checkpoint: Checkpoint, schedule: Schedule) -> None:
    """Refuse to go on with other examples, another rate or another random state than was meant at the time.

    Raises:
        UsageError: Naming what differs.
    """
    meant, now = cast(Mapping[str, JSON], checkpoint.state["next"]), schedule.of_step(checkpoint.step)
    changed = [name.replace("_", " ") for name in {**meant, **now} if meant.get(name) != now.get(name)]
    if changed:
        raise UsageError(
            f"`{checkpoint.folder}` was to go on with other {', '.join(changed)} than this version would choose",
            hint="go on with the version of backprop that began it, or begin anew with `--resume never`",
        )


def restore(checkpoint: Checkpoint, model: Any) -> Progress:
    """Put a checkpoint's adapter into ``model``, and give how far it was."""
    from safetensors.torch import load_file

    kept = load_file(checkpoint.folder / PROGRESS)
    set_adapter_state(model, load_file(checkpoint.folder / ADAPTER))
    state = checkpoint.state
    return Progress(
        seen=kept["seen"],
        losses=kept["losses"].tolist(),
        tokens=int(state["tokens"]),
        seconds=float(state["seconds"]),
        ended=bool(state["ended"]),
        rate_share=float(state["rate_share"]),
        skipped_proofs=bool(state["skipped_proofs"]),
    )


def references_of(checkpoint: Checkpoint) -> "torch.Tensor":
    """Give what a checkpoint remembers of how likely its examples were before training."""
    from safetensors.torch import load_file

    return load_file(checkpoint.folder / PROGRESS)["references"]


def best_of(checkpoint: Checkpoint) -> dict[str, "torch.Tensor"]:
    """Give the best adapter that a checkpoint keeps; empty if none."""
    from safetensors.torch import load_file

    kept = load_file(checkpoint.folder / PROGRESS)
    return {name.removeprefix("best."): tensor for name, tensor in kept.items() if name.startswith("best.")}


def restore_optimizer(checkpoint: Checkpoint, optimizer: Any) -> None:
    """Put a checkpoint's moments into a fresh optimizer of the same kind and parameters."""
    import torch
    from safetensors.torch import load_file

    state: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(checkpoint.folder / OPTIMIZER).items():
        number, key = name.split(".", 1)
        # bitsandbytes counts steps in an integer, torch in a tensor of float32.
        state.setdefault(int(number), {})[key] = tensor if tensor.dtype != torch.int64 else int(tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def moments_of(optimizer: Any) -> dict[str, "torch.Tensor"]:
    """Give what an optimizer keeps of each weight, by name, each a tensor of its own; bitsandbytes nests some."""
    import torch

    found: dict[str, torch.Tensor] = {}
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            for name, one in value.items() if isinstance(value, Mapping) else [(key, value)]:
                # All weights share the maps of what 8 bits stand for.
                own = one.clone() if name.startswith("qmap") else torch.as_tensor(one)
                found[f"{number}.{name}"] = own.detach().contiguous()
    return found
